package bouncer

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/edgeward/edgeward/internal/crowdsec"
	"github.com/edgeward/edgeward/internal/lapi"
)

// gate is a node with the auth endpoint.
type gate struct {
	*node
	log bytes.Buffer
}

func newGate(t testing.TB, change func(*Config)) *gate {
	g := &gate{}
	g.node = newNode(t, "", func(c *Config) {
		c.Auth.Listen = netip.MustParseAddrPort("127.0.0.1:9478")
		c.Auth.TrustedProxies = []Source{{Prefixes: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("fd00::/8")}}}
		if change != nil {
			change(c)
		}
	})
	if _, err := g.turn(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.auth.log = slog.New(slog.NewJSONHandler(&g.log, nil))
	return g
}

// ask is a request of a proxy, about a client if one is given.
func (g *gate) ask(peer, client string, change ...func(*http.Request)) *httptest.ResponseRecorder {
	r := httptest.NewRequest("GET", AuthPath, nil)
	r.RemoteAddr = netip.AddrPortFrom(netip.MustParseAddr(peer), 4711).String()
	if client != "" {
		r.Header.Set("X-Forwarded-For", client)
	}
	for _, c := range change {
		c(r)
	}
	w := httptest.NewRecorder()
	g.Auth().ServeHTTP(w, r)
	return w
}

var picture = []lapi.Row{
	decided(1, "203.0.113.66", "ban", "crowdsec", "ssh"),
	decided(2, "203.0.113.67", "captcha", "crowdsec", "http"),
	decided(3, "203.0.113.68", "throttle", "crowdsec", "http"),
	decided(4, "198.51.100.0/24", "ban", "lists", "firehol"),
	decided(5, "203.0.113.7", "ban", "CAPI", "ssh"), // the operator's
	decided(6, "192.168.9.9", "ban", "CAPI", "ssh"), // private
	decided(7, "192.168.9.8", "ban", "crowdsec", "ssh"),
	decided(8, "2001:db8::66", "ban", "CAPI", "ssh"),
	decided(9, "203.0.113.69", "odd", "crowdsec", "http"),
}

func TestAuthAnswersFromTheTable(t *testing.T) {
	g := newGate(t, nil)
	g.answer(true, picture...)
	for _, c := range []struct {
		name, peer, client string
		status             int
		verdict            string
	}{
		{"nobody", "10.42.0.5", "203.0.113.200", 200, "pass"},
		{"a ban", "10.42.0.5", "203.0.113.66", 403, "ban 1"},
		{"a captcha, which cannot be shown", "10.42.0.5", "203.0.113.67", 403, "captcha 2"},
		{"a throttle, which is not counted here", "10.42.0.5", "203.0.113.68", 200, "pass"},
		{"a range", "10.42.0.5", "198.51.100.9", 403, "ban 4"},
		{"the operator", "10.42.0.5", "203.0.113.7", 200, "pass"},
		{"private, decided elsewhere", "10.42.0.5", "192.168.9.9", 200, "pass"},
		{"private, decided here", "10.42.0.5", "192.168.9.8", 403, "ban 7"},
		{"IPv6", "fd00::5", "2001:db8::66", 403, "ban 8"},
		{"a type nobody knows", "10.42.0.5", "203.0.113.69", 403, "ban 9"},
		{"IPv4 in IPv6", "::ffff:10.42.0.5", "::ffff:203.0.113.66", 403, "ban 1"},
		{"a claim before the proxy's word", "10.42.0.5", "203.0.113.200, 203.0.113.66", 403, "ban 1"},
		{"a stranger who names another", "203.0.113.200", "203.0.113.66", 200, "pass"},
		{"a banned stranger who names another", "203.0.113.66", "203.0.113.200", 403, "ban 1"},
		{"a proxy that says nothing", "10.42.0.5", "", 200, "pass"},
	} {
		w := g.ask(c.peer, c.client)
		if got := w.Header().Get("X-Edgeward-Verdict"); w.Code != c.status || got != c.verdict {
			t.Errorf("%s: %d %s, want %d %s", c.name, w.Code, got, c.status, c.verdict)
		}
	}
	for _, method := range []string{"HEAD", "POST", "OPTIONS", "PROPFIND"} {
		if w := g.ask("10.42.0.5", "203.0.113.66", func(r *http.Request) { r.Method = method }); w.Code != 403 {
			t.Errorf("%s: %d", method, w.Code)
		}
	}
	if w := g.ask("10.42.0.5", "203.0.113.200", func(r *http.Request) { r.URL.Path = "/v1/auth/x" }); w.Code != 404 {
		t.Errorf("another path: %d", w.Code)
	}

	g.answer(false, lapi.Row{ID: 1})
	if w := g.ask("10.42.0.5", "203.0.113.66"); w.Code != 200 {
		t.Errorf("after the unban: %d", w.Code)
	}

	totals, err := g.Totals()
	if err != nil {
		t.Fatal(err)
	}
	for series, want := range map[crowdsec.Series]uint64{
		{Name: "dropped", Unit: "request", Origin: "crowdsec", Remediation: "captcha", IPType: "ipv4"}:  1,
		{Name: "dropped", Unit: "request", Origin: "lists:firehol", Remediation: "ban", IPType: "ipv4"}: 1,
		{Name: "dropped", Unit: "request", Origin: "CAPI", Remediation: "ban", IPType: "ipv6"}:          1,
		{Name: "processed", Unit: "request", IPType: "ipv6"}:                                            1,
		{Name: "processed", Unit: "request", IPType: "ipv4"}:                                            19,
	} {
		if totals[series] != want {
			t.Errorf("%+v: %d, want %d", series, totals[series], want)
		}
	}
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(g.Collector())
	page := httptest.NewRecorder()
	promhttp.HandlerFor(registry, promhttp.HandlerOpts{}).ServeHTTP(page, httptest.NewRequest("GET", "/metrics", nil))
	for _, want := range []string{
		`edgeward_auth_requests_total{verdict="pass"} 7`, `edgeward_auth_requests_total{verdict="refuse"} 13`,
		`edgeward_auth_refused_total{ip_type="ipv4",origin="lists:firehol",remediation="ban"} 1`,
	} {
		if !strings.Contains(page.Body.String(), "\n"+want+"\n") {
			t.Errorf("no metric says %s:\n%s", want, page.Body)
		}
	}
}

func TestAuthChoices(t *testing.T) {
	all := map[string]string{"203.0.113.66": "ban 1", "203.0.113.67": "captcha 2", "203.0.113.68": "throttle 3", "198.51.100.9": "ban 4"}
	for _, c := range []struct {
		name    string
		change  func(*Config)
		refuses []string
	}{
		{"bans alone", func(c *Config) { c.Auth.Remediations = []Remediation{"ban"} }, []string{"203.0.113.66", "198.51.100.9"}},
		{"throttles too", func(c *Config) { c.Auth.Remediations = []Remediation{"ban", "captcha", "throttle"} }, []string{"198.51.100.9", "203.0.113.66", "203.0.113.67", "203.0.113.68"}},
		{"whatever the kernel enforces", func(c *Config) { c.Decisions.Remediations = []Remediation{"captcha"} }, []string{"203.0.113.66", "203.0.113.67", "198.51.100.9"}},
		{"without lists", func(c *Config) { c.Decisions.ExceptOrigins = []string{"lists"} }, []string{"203.0.113.66", "203.0.113.67"}},
		{"another header", func(c *Config) { c.Auth.Header = "x-real-ip" }, nil},
		{"the same header", func(c *Config) { c.Auth.Header = "x-forwarded-for" }, []string{"203.0.113.66", "203.0.113.67", "198.51.100.9"}},
		{"observing", func(c *Config) { c.Mode = Observe }, nil},
	} {
		g := newGate(t, c.change)
		g.answer(true, picture...)
		for addr, verdict := range all {
			w := g.ask("10.42.0.5", addr)
			got := w.Header().Get("X-Edgeward-Verdict")
			switch {
			case slices.Contains(c.refuses, addr) && (w.Code != 403 || got != verdict), !slices.Contains(c.refuses, addr) && w.Code != 200:
				t.Errorf("%s: %s: %d %s", c.name, addr, w.Code, got)
			case c.name == "observing" && addr == "203.0.113.66" && (got != "observe ban 1" || !strings.Contains(g.log.String(), "would be refused")):
				t.Errorf("%s: %s\n%s", addr, got, g.log.String())
			}
		}
	}
	g := newGate(t, func(c *Config) { c.Auth.Header = "X-Real-IP" })
	g.answer(true, picture...)
	if w := g.ask("10.42.0.5", "203.0.113.200", func(r *http.Request) { r.Header.Set("X-Real-Ip", "203.0.113.66") }); w.Code != 403 {
		t.Errorf("by X-Real-IP: %d", w.Code)
	}
}

func TestAuthBeforeAnythingIsKnown(t *testing.T) {
	for _, closed := range []bool{false, true} {
		g := newGate(t, func(c *Config) { c.Auth.FailClosed = closed })
		want := map[bool]int{false: 200, true: 403}[closed]
		if w := g.ask("10.42.0.5", "203.0.113.200"); w.Code != want || closed && w.Header().Get("X-Edgeward-Verdict") != "unknown" {
			t.Errorf("closed %v: %d", closed, w.Code)
		}
		if w := g.ask("10.42.0.5", "203.0.113.7"); w.Code != 200 {
			t.Errorf("closed %v: the operator: %d", closed, w.Code)
		}
		g.answer(true)
		if w := g.ask("10.42.0.5", "203.0.113.200"); w.Code != 200 {
			t.Errorf("closed %v, and all is known: %d", closed, w.Code)
		}
	}
}

// TestAuthWithoutAClient: where all must be known, a proxy's word is needed, and
// its own address, which is protected with the cluster's, does not stand for it.
func TestAuthWithoutAClient(t *testing.T) {
	for _, closed := range []bool{false, true} {
		g := newGate(t, func(c *Config) { c.Auth.FailClosed = closed })
		g.answer(true, picture...)
		for client, want := range map[string]string{"": "unknown", "unknown": "unknown", "203.0.113.200, x, 10.42.0.6": "unknown",
			"10.42.0.9": "pass", "10.42.0.5": "pass", "203.0.113.200": "pass"} {
			if !closed {
				want = "pass"
			}
			if got := g.ask("10.42.0.5", client).Header().Get("X-Edgeward-Verdict"); got != want {
				t.Errorf("closed %v, %q: %s, want %s", closed, client, got, want)
			}
		}
	}
}

// TestAuthOrdersBeforeAnythingIsKnown: what the operator lets pass does, also
// where nobody else may yet.
func TestAuthOrdersBeforeAnythingIsKnown(t *testing.T) {
	g := newGate(t, func(c *Config) { c.Auth.FailClosed = true })
	passes := func(client string, want int) {
		t.Helper()
		if w := g.ask("10.42.0.5", client); w.Code != want {
			t.Errorf("%s: %d %s, want %d", client, w.Code, w.Header().Get("X-Edgeward-Verdict"), want)
		}
	}
	if _, _, err := g.enforcer.allow(netip.MustParsePrefix("203.0.113.200/32"), time.Hour, "", "me"); err != nil {
		t.Fatal(err)
	}
	passes("203.0.113.200", 200)
	passes("203.0.113.201", 403)
	if _, _, err := g.enforcer.pause(10*time.Minute, "", "me"); err != nil {
		t.Fatal(err)
	}
	passes("203.0.113.201", 200)
	g.at = g.at.Add(11 * time.Minute)
	passes("203.0.113.201", 403)
}

func TestAuthTellsTheClientInItsOwnForm(t *testing.T) {
	g := newGate(t, nil)
	g.answer(true, picture...)
	for accept, want := range map[string]string{
		"text/html,application/xhtml+xml,*/*;q=0.8": "text/html; charset=utf-8",
		"application/json":                          "application/problem+json",
		"text/html;q=0.1, application/json":         "application/problem+json",
		"":                                          "text/plain; charset=utf-8",
		"text/html;q=NaN, image/png":                "text/plain; charset=utf-8",
	} {
		w := g.ask("10.42.0.5", "203.0.113.66", func(r *http.Request) { r.Header.Set("Accept", accept) })
		if got := w.Header().Get("Content-Type"); got != want || w.Header().Get("Cache-Control") != "no-store" {
			t.Errorf("%q: %s", accept, got)
		}
		if strings.Contains(w.Body.String(), "crowdsec") || strings.Contains(w.Body.String(), "ssh") {
			t.Errorf("%q: the client learns %s", accept, w.Body)
		}
		if want == "application/problem+json" && !json.Valid(w.Body.Bytes()) {
			t.Error(w.Body)
		}
	}
}

// TestAuthLogsRefusals: one line each, for a while; and a proxy that nobody
// trusts, or that names nobody, is pointed out.
func TestAuthLogsRefusals(t *testing.T) {
	g := newGate(t, nil)
	g.answer(true, picture...)
	for range 50 {
		g.ask("10.42.0.5", "203.0.113.66", func(r *http.Request) {
			r.Header.Set("X-Forwarded-Host", "blog.example.com")
			r.Header.Set("X-Original-Method", "POST")
			r.Header.Set("X-Forwarded-Uri", "/"+strings.Repeat("x", 1000))
		})
	}
	lines := strings.Split(strings.TrimSpace(g.log.String()), "\n")
	if len(lines) != linesPerSecond {
		t.Errorf("%d lines", len(lines))
	}
	var line map[string]any
	if err := json.Unmarshal([]byte(lines[0]), &line); err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]string{"level": "INFO", "msg": "request refused", "reason": "decision", "status": "403", "address": "203.0.113.66", "proxy": "10.42.0.5", "decision": "1",
		"remediation": "ban", "origin": "crowdsec", "scenario": "ssh", "host": "blog.example.com", "method": "POST", "path": "/" + strings.Repeat("x", 199) + "..."} {
		if got := fmt.Sprint(line[key]); got != want {
			t.Errorf("%s: %s, want %s", key, got, want)
		}
	}
	g.auth.tell()
	if !strings.Contains(g.log.String(), `"suppressed":30`) {
		t.Error(g.log.String())
	}
	g.log.Reset()
	for range 3 {
		if g.Admits(netip.MustParseAddr("10.99.0.5")) || !g.Admits(netip.MustParseAddr("10.42.0.5")) {
			t.Error("not the trusted proxies alone are admitted")
		}
		g.ask("10.42.0.5", "unknown")
	}
	for text, peer := range map[string]string{"is not in auth.trustedProxies": "10.99.0.5", "names no client": "10.42.0.5"} {
		if n := strings.Count(g.log.String(), text); n != 1 || !strings.Contains(g.log.String(), peer) {
			t.Errorf("%s: said %d times: %s", text, n, g.log.String())
		}
	}
}

// TestStatusSaysWhatIsNotServed: an address that another program has.
func TestStatusSaysWhatIsNotServed(t *testing.T) {
	g := newGate(t, nil)
	g.Serves(func() error { return errors.New("listen tcp 127.0.0.1:9478: address already in use") })
	g.Serves(func() error { return nil })
	if s := g.Status(); len(s.Unserved) != 1 || !strings.Contains(s.Unserved[0], ":9478: address already") {
		t.Errorf("%q", s.Unserved)
	}
}

// BenchmarkAuth is the judgement of one client: address, table, verdict.
func BenchmarkAuth(b *testing.B) {
	g := newGate(b, nil)
	var rows []lapi.Row
	for i := range 100_000 {
		rows = append(rows, decided(i, netip.AddrFrom4([4]byte{20, byte(i >> 16), byte(i >> 8), byte(i)}).String(), "ban", "CAPI", "ssh"))
	}
	g.answer(true, rows...)
	peer := netip.MustParseAddr("10.42.0.5")
	for name, client := range map[string]string{"free": "203.0.113.9", "free6": "2001:db8::9", "banned": "20.0.1.2"} {
		header := http.Header{"X-Forwarded-For": {client}}
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				g.auth.judge(clientOf(g.auth.trusted, "", header, peer))
			}
		})
	}
	b.Run("handler", func(b *testing.B) {
		r := httptest.NewRequest("GET", AuthPath, nil)
		r.RemoteAddr = "10.42.0.5:4711"
		r.Header.Set("X-Forwarded-For", "203.0.113.9")
		w := &discard{header: http.Header{}}
		b.ReportAllocs()
		for b.Loop() {
			g.auth.ServeHTTP(w, r)
		}
	})
}

type discard struct{ header http.Header }

func (d *discard) Header() http.Header         { return d.header }
func (d *discard) Write(p []byte) (int, error) { return len(p), nil }
func (d *discard) WriteHeader(int)             {}

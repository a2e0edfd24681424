package tunnel

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/edgeward/edgeward/internal/crowdsec"
	"github.com/edgeward/edgeward/internal/lapi"
)

const signingKey = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa="

// world is a gate before an origin service that tells what it got.
type world struct {
	t      testing.TB
	dir    string
	origin *httptest.Server
	gate   *Gate
	logs   *strings.Builder
	config string

	mu   sync.Mutex
	now  time.Time
	jump time.Duration // of the wall clock
}

func (w *world) clock() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now
}

func (w *world) wall() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now.Add(w.jump)
}

func (w *world) wait(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.now = w.now.Add(d)
}

// safe is a log that the gate's goroutines may share.
type safe struct {
	mu sync.Mutex
	to *strings.Builder
}

func (s *safe) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.to.Write(p)
}

// newWorld makes one; ORIGIN and DIR in the configuration stand for what the
// test made.
func newWorld(t testing.TB, config string) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), now: time.Unix(1_700_000_000, 0), logs: new(strings.Builder)}
	w.origin = httptest.NewServer(http.HandlerFunc(tell))
	t.Cleanup(w.origin.Close)
	if err := os.WriteFile(filepath.Join(w.dir, "key"), []byte(signingKey), 0o600); err != nil {
		t.Fatal(err)
	}
	gate, err := newGate(w.parse(config), clock{w.clock, w.wall}, slog.New(slog.NewTextHandler(&safe{to: w.logs}, nil)))
	if err != nil {
		t.Fatal(err)
	}
	w.gate = gate
	return w
}

func (w *world) parse(config string) Config {
	w.t.Helper()
	w.config = strings.NewReplacer("ORIGIN", w.origin.URL, "DIR", w.dir).Replace(config)
	c, err := Parse("tunnel.yaml", []byte(w.config))
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

// told is what an origin service got.
type toldOrigin struct {
	Method, Host, URI string
	Header            http.Header
	Body              string
	Trailer           http.Header
}

func tell(rw http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	rw.Header().Set("Trailer", "X-Sum")
	rw.Header().Set(IdentityHeader, "echo")
	rw.Header().Set("Connection", "X-Hop")
	rw.Header().Set("X-Hop", "1")
	_ = json.NewEncoder(rw).Encode(toldOrigin{r.Method, r.Host, r.RequestURI, r.Header, string(body), r.Trailer})
	rw.Header().Set("X-Sum", "42")
}

// pull hands LAPI's answer to the gate.
func (w *world) pull(full bool, rows ...lapi.Row) {
	s := w.gate.Sink()
	s.Begin(full, w.clock())
	for i := range rows {
		s.Add(&rows[i])
	}
	s.Commit()
}

func row(id int, value, typ, origin string) lapi.Row {
	r := lapi.Row{ID: id, Scope: "Ip", Value: value, Type: typ, Origin: origin, Scenario: "test/" + origin, Duration: "1h0m0s"}
	if strings.Contains(value, "/") {
		r.Scope = "Range"
	}
	if len(value) == 2 {
		r.Scope = "Country"
	}
	return r
}

// visit is a request as the edge sends it.
func visit(method, target, from string, header ...string) *http.Request {
	u, err := url.Parse(target)
	if err != nil {
		panic(err)
	}
	req := &http.Request{Method: method, URL: u, Host: u.Host, Header: http.Header{}, Body: http.NoBody, Proto: "HTTP/2.0", ProtoMajor: 2}
	req.Header.Set("Cf-Connecting-Ip", from)
	req.Header.Set("X-Forwarded-For", from)
	req.Header.Set("X-Forwarded-Proto", "https")
	req.Header.Set("Cf-Ray", "0-AMS")
	for _, line := range header {
		if line == "" {
			continue
		}
		name, value, _ := strings.Cut(line, ": ")
		req.Header.Add(name, value)
	}
	return req
}

func (w *world) ask(tunnel string, req *http.Request) (*http.Response, string) {
	w.t.Helper()
	res, err := w.gate.For(tunnel).RoundTrip(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return res, string(body)
}

func (w *world) status(req *http.Request) int {
	w.t.Helper()
	res, _ := w.ask("home", req)
	return res.StatusCode
}

const gateConfig = lapiSection + oneTunnel + `
hosts:
  - {host: app.example.com, service: ORIGIN, fail: closed}
  - {host: open.example.com, service: ORIGIN}
identity: {keyFile: DIR/key}
decisions: {allow: [203.0.113.99]}
`

func TestGateTellsOriginsWhoItIs(t *testing.T) {
	w := newWorld(t, gateConfig)
	w.pull(true)
	req := visit("POST", "http://app.example.com/a%2Fb/../c?q=%20x;y", "2001:DB8::7",
		"X-Forwarded-Host: evil", "X-Forwarded-Prefix: /evil", "Forwarded: for=1.1.1.1", "X-Real-Ip: 1.1.1.1", "True-Client-Ip: 1.1.1.1",
		"X_Forwarded_For: 1.1.1.1", "Cf_Connecting_Ip: 1.1.1.1", "Cf-Connecting-Ipv6: 2001:db8::1", IdentityHeader+": v1 forged", "X_Edgeward_Client: forged",
		"Connection: keep-alive, X-Drop, Authorization-Not", "X-Drop: 1", "Keep-Alive: 1", "Proxy-Authorization: x", "Te: trailers, deflate",
		"Transfer-Encoding: chunked", "Content-Length: 999", "Cookie: a=b", "X-Latin: caf\xe9", "Accept-Encoding: br")
	req.Body, req.ContentLength = io.NopCloser(strings.NewReader("hello")), 5
	res, body := w.ask("home", req)
	var got toldOrigin
	if err := json.Unmarshal([]byte(body), &got); err != nil {
		t.Fatal(err, body)
	}
	value := got.Header.Get(IdentityHeader)
	got.Header.Del(IdentityHeader)
	if d := cmp.Diff(toldOrigin{
		Method: "POST", Host: "app.example.com", URI: "/a%2Fb/../c?q=%20x;y", Body: "hello",
		Header: http.Header{
			"Cf-Connecting-Ip": {"2001:db8::7"}, "X-Forwarded-For": {"2001:db8::7"}, "X-Real-Ip": {"2001:db8::7"},
			"X-Forwarded-Proto": {"https"}, "X-Forwarded-Host": {"app.example.com"}, "Cf-Ray": {"0-AMS"},
			"Cookie": {"a=b"}, "X-Latin": {"caf\xe9"}, "Accept-Encoding": {"br"}, "Te": {"trailers"}, "Content-Length": {"5"},
		},
	}, got); d != "" {
		// JSON makes of what is no UTF-8 a sign of its own.
		if !strings.Contains(d, "caf") || strings.Count(d, "\n+")+strings.Count(d, "\n-") > 2 {
			t.Error(d)
		}
	}
	if !strings.HasPrefix(value, "v1 1700000000 https 2001:db8::7 ") || len(value) > 128 {
		t.Errorf("it is signed as %q", value)
	}
	if res.Header.Get(IdentityHeader) != "" || res.Header.Get("X-Hop") != "" || res.Header.Get("Connection") != "" {
		t.Errorf("the visitor sees %v", res.Header)
	}
	if res.Trailer.Get("X-Sum") != "42" {
		t.Errorf("the trailers are %v", res.Trailer)
	}
	if got := req.Header.Get("X-Forwarded-Host"); got != "evil" {
		t.Errorf("the connector's own request was changed: %q", got)
	}
}

// TestSignedValueIsTheReadersOwn holds the writer to a value that the plugin's
// tests hold the reader to.
func TestSignedValueIsTheReadersOwn(t *testing.T) {
	s := &Signer{}
	s.add([]byte(signingKey))
	const read = "v1 1700000000 https 203.0.113.7 nBFdIYWrFfKCw76tK85cTrpV4sNO8uWkUvsfYtsmnNE"
	if got := s.Sign(time.Unix(1_700_000_000, 0), "https", netip.MustParseAddr("203.0.113.7"), "GET", "App.example.com:443"); got != read {
		t.Errorf("signed as %q", got)
	}
	s.add([]byte(strings.Repeat("b", 32)))
	if got := s.Sign(time.Unix(1_700_000_000, 0), "https", netip.MustParseAddr("203.0.113.7"), "GET", "app.example.com"); !strings.HasPrefix(got, read+" ") || len(got) != len(read)+44 {
		t.Errorf("with two keys signed as %q", got)
	}
}

func TestSignerWantsGoodKeys(t *testing.T) {
	dir := t.TempDir()
	for text, want := range map[string]string{
		"":                              "it is empty",
		"short":                         "want one line of 32 characters",
		strings.Repeat("two\nlines", 9): "want one line of 32 characters",
		signingKey + "\n":               "",
	} {
		file := filepath.Join(dir, "key")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		var c IdentityConfig
		if err := c.KeyFile.UnmarshalText([]byte(file)); err != nil {
			t.Fatal(err)
		}
		_, err := NewSigner(c)
		if got := fmt.Sprint(err); want == "" && err != nil || !strings.Contains(got, want) || text != "" && strings.Contains(got, text) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestVerdicts(t *testing.T) {
	w := newWorld(t, gateConfig)
	from := func(host, addr string, header ...string) int {
		return w.status(visit("GET", "http://"+host+"/", addr, header...))
	}
	if got := from("app.example.com", "203.0.113.7"); got != 503 {
		t.Errorf("before anything is known, a host that fails closed answers %d", got)
	}
	if got := from("app.example.com", "203.0.113.99"); got != 200 {
		t.Errorf("before anything is known, an allowed address gets %d", got)
	}
	if got := from("open.example.com", "203.0.113.7"); got != 200 {
		t.Errorf("before anything is known, a host that fails open answers %d", got)
	}
	w.pull(true, row(1, "203.0.113.66", "ban", "crowdsec"), row(2, "198.51.100.0/24", "captcha", "CAPI"), row(3, "2001:db8::/48", "ban", "lists"),
		row(4, "203.0.113.5", "throttle", "cscli"), row(5, "203.0.113.6", "odd", "cscli"), row(6, "ZZ", "ban", "cscli"), row(7, "203.0.113.99", "ban", "crowdsec"))
	for _, c := range []struct {
		addr   string
		header string
		want   int
	}{
		{"203.0.113.7", "", 200}, {"203.0.113.66", "", 403}, {"::ffff:203.0.113.66", "", 403}, {"198.51.100.9", "", 403}, {"2001:db8::9", "", 403},
		{"2001:db8:1::9", "", 200}, {"203.0.113.6", "", 403}, {"203.0.113.99", "", 200}, {"203.0.113.7", "Cf-Ipcountry: ZZ", 403}, {"203.0.113.7", "Cf-Ipcountry: zz", 403},
		{"203.0.113.7", "Cf-Ipcountry: NL", 200}, {"203.0.113.99", "Cf-Ipcountry: ZZ", 200}, {"240.1.2.3", "Cf-Connecting-Ipv6: 2001:db8::9", 403}, {"240.1.2.3", "", 400}, {"240.1.2.3", "Cf-Connecting-Ipv6: junk", 400},
		{"203.0.113.7", "Cf-Connecting-Ipv6: 2001:db8::9", 200}, {"203.0.113.66", "X-Forwarded-For: 203.0.113.99", 403},
	} {
		if got := from("app.example.com", c.addr, c.header); got != c.want {
			t.Errorf("%s %s gets %d, want %d", c.addr, c.header, got, c.want)
		}
	}
	// An unknown host tells a banned visitor nothing.
	if got := from("other.example.com", "203.0.113.66"); got != 403 {
		t.Errorf("a banned visitor of an unknown host gets %d", got)
	}
	for i := range 12 {
		res, _ := w.ask("home", visit("GET", "http://app.example.com/", "203.0.113.5"))
		if i < 10 && res.StatusCode != 200 || i >= 10 && (res.StatusCode != 429 || res.Header.Get("Retry-After") != "2") {
			t.Errorf("throttled request %d gets %d after %q", i, res.StatusCode, res.Header.Get("Retry-After"))
		}
	}
	w.wait(2 * time.Second)
	if got := from("app.example.com", "203.0.113.5"); got != 200 {
		t.Errorf("after two seconds the throttled visitor gets %d", got)
	}
	if log := w.logs.String(); !strings.Contains(log, "request refused") || !strings.Contains(log, "decision=1 ") || !strings.Contains(log, "scenario=test/crowdsec") || !strings.Contains(log, "layer=tunnel") || !strings.Contains(log, "value=ZZ") {
		t.Errorf("the log is %s", log)
	}
	totals, err := w.gate.Totals()
	if err != nil {
		t.Fatal(err)
	}
	for series, want := range map[crowdsec.Series]uint64{
		{Name: crowdsec.Dropped, Unit: crowdsec.Request, Origin: "crowdsec", Remediation: "ban", IPType: "ipv4"}:           4,
		{Name: crowdsec.Dropped, Unit: crowdsec.Request, Origin: "lists:test/lists", Remediation: "ban", IPType: "ipv6"}:   2,
		{Name: crowdsec.Dropped, Unit: crowdsec.Request, Origin: "cscli", Remediation: "throttle", IPType: "ipv4"}:         2,
		{Name: crowdsec.ActiveDecisions, Unit: crowdsec.IP, Origin: "CAPI", Remediation: "captcha", IPType: crowdsec.IPv4}: 1,
		{Name: crowdsec.Processed, Unit: crowdsec.Request, IPType: crowdsec.IPv6}:                                          3,
	} {
		if totals[series] != want {
			t.Errorf("%+v is %d, want %d", series, totals[series], want)
		}
	}

	// Decisions end by themselves, and age.
	w.wait(9 * time.Minute)
	if got := from("app.example.com", "203.0.113.7"); got != 200 {
		t.Errorf("before the last pull is too old a visitor gets %d", got)
	}
	w.wait(2 * time.Minute)
	if got := from("app.example.com", "203.0.113.7"); got != 503 {
		t.Errorf("when the last pull is too old a visitor gets %d", got)
	}
	w.wait(time.Hour)
	if got := from("open.example.com", "203.0.113.66"); got != 200 {
		t.Errorf("when its ban has ended a visitor gets %d", got)
	}
	// A deletion frees at once.
	w.pull(true, row(11, "203.0.113.66", "ban", "crowdsec"))
	if got := from("app.example.com", "203.0.113.66"); got != 403 {
		t.Errorf("banned again: %d", got)
	}
	s := w.gate.Sink()
	s.Begin(false, w.clock())
	s.Delete(11)
	s.Commit()
	if got := from("app.example.com", "203.0.113.66"); got != 200 {
		t.Errorf("freed: %d", got)
	}
}

func TestObserve(t *testing.T) {
	w := newWorld(t, gateConfig+"mode: observe\n")
	w.pull(true, row(1, "203.0.113.66", "ban", "crowdsec"))
	if got := w.status(visit("GET", "http://app.example.com/", "203.0.113.66")); got != 200 {
		t.Errorf("an observer refuses with %d", got)
	}
	if !strings.Contains(w.logs.String(), "request would be refused") {
		t.Errorf("the log is %s", w.logs)
	}
	totals, _ := w.gate.Totals()
	for s, n := range totals {
		if s.Name == crowdsec.Dropped && n > 0 {
			t.Errorf("an observer counts %v", s)
		}
	}
}

func TestRefusalsInEveryForm(t *testing.T) {
	w := newWorld(t, gateConfig)
	w.pull(true, row(17, "203.0.113.66", "ban", "crowdsec"))
	for accept, want := range map[string]string{
		"text/html,*/*;q=0.8": "text/html; charset=utf-8|decision 17",
		"application/json":    `application/problem+json|"decision":17`,
		"":                    "text/plain; charset=utf-8|(decision 17)",
		"text/html;q=0, */*":  "text/plain; charset=utf-8|(decision 17)",
	} {
		res, body := w.ask("home", visit("GET", "http://app.example.com/", "203.0.113.66", "Accept: "+accept))
		kind, holds, _ := strings.Cut(want, "|")
		if res.Header.Get("Content-Type") != kind || !strings.Contains(body, holds) || res.Header.Get("Cache-Control") != "no-store" || strings.Contains(body, "crowdsec") {
			t.Errorf("%q: %v %s", accept, res.Header, body)
		}
	}
	res, body := w.ask("home", visit("HEAD", "http://app.example.com/", "203.0.113.66"))
	if res.StatusCode != 403 || body != "" || res.Header.Get("Content-Length") == "0" {
		t.Errorf("HEAD: %d %q %v", res.StatusCode, body, res.Header)
	}
	// The body of a refused request is closed, as a RoundTripper must.
	closed := make(chan struct{})
	req := visit("POST", "http://app.example.com/", "203.0.113.66")
	req.Body, req.ContentLength = closer{func() { close(closed) }}, -1
	w.status(req)
	select {
	case <-closed:
	default:
		t.Error("the body is left open")
	}
}

type closer struct{ close func() }

func (closer) Read([]byte) (int, error) { return 0, io.EOF }
func (c closer) Close() error           { c.close(); return nil }

func TestWhatTheEdgeNeverSends(t *testing.T) {
	w := newWorld(t, gateConfig)
	w.pull(true)
	edit := func(change func(*http.Request)) *http.Request {
		r := visit("GET", "http://app.example.com/", "203.0.113.7")
		change(r)
		return r
	}
	for name, c := range map[string]struct {
		req  *http.Request
		want int
	}{
		"no address":            {edit(func(r *http.Request) { r.Header.Del("Cf-Connecting-Ip") }), 400},
		"an empty address":      {edit(func(r *http.Request) { r.Header.Set("Cf-Connecting-Ip", "") }), 400},
		"two addresses":         {edit(func(r *http.Request) { r.Header.Add("Cf-Connecting-Ip", "203.0.113.8") }), 400},
		"a list of addresses":   {edit(func(r *http.Request) { r.Header.Set("Cf-Connecting-Ip", "203.0.113.7, 203.0.113.8") }), 400},
		"an address and more":   {edit(func(r *http.Request) { r.Header.Set("Cf-Connecting-Ip", "203.0.113.7 ") }), 400},
		"an address and a port": {edit(func(r *http.Request) { r.Header.Set("Cf-Connecting-Ip", "203.0.113.7:80") }), 400},
		"a zone":                {edit(func(r *http.Request) { r.Header.Set("Cf-Connecting-Ip", "fe80::1%eth0") }), 400},
		"octal":                 {edit(func(r *http.Request) { r.Header.Set("Cf-Connecting-Ip", "203.0.113.007") }), 400},
		"nowhere":               {edit(func(r *http.Request) { r.Header.Set("Cf-Connecting-Ip", "0.0.0.0") }), 400},
		"bad UTF-8":             {edit(func(r *http.Request) { r.Header.Set("Cf-Connecting-Ip", "203.0.113.7\xff") }), 400},
		"another spelling":      {edit(func(r *http.Request) { r.Header["cf-connecting-ip"] = []string{"203.0.113.8"} }), 400},
		"only another spelling": {edit(func(r *http.Request) {
			r.Header["CF-CONNECTING-IP"] = r.Header["Cf-Connecting-Ip"]
			delete(r.Header, "Cf-Connecting-Ip")
		}), 200},
		"a smuggled line":      {edit(func(r *http.Request) { r.Header["X-A"] = []string{"b\r\nCf-Connecting-Ip: 203.0.113.8"} }), 400},
		"a smuggled name":      {edit(func(r *http.Request) { r.Header["X-A: b\r\nCf-Connecting-Ip"] = []string{"203.0.113.8"} }), 400},
		"a name with a space":  {edit(func(r *http.Request) { r.Header["Cf-Connecting-Ip "] = []string{"203.0.113.8"} }), 400},
		"a nul":                {edit(func(r *http.Request) { r.Header["X-A"] = []string{"b\x00"} }), 400},
		"too much":             {edit(func(r *http.Request) { r.Header["X-A"] = []string{strings.Repeat("a", headerLimit)} }), 431},
		"a host with a space":  {edit(func(r *http.Request) { r.Host = "app.example.com evil" }), 400},
		"a host with a line":   {edit(func(r *http.Request) { r.Host = "app.example.com\r\nX: y" }), 400},
		"no host":              {edit(func(r *http.Request) { r.Host = "" }), 400},
		"a host with user":     {edit(func(r *http.Request) { r.Host = "app.example.com@evil" }), 400},
		"bad UTF-8 in a host":  {edit(func(r *http.Request) { r.Host = "app\xff.example.com" }), 400},
		"a host with a port":   {edit(func(r *http.Request) { r.Host = "APP.example.com:443" }), 200},
		"no port after all":    {edit(func(r *http.Request) { r.Host = "app.example.com:" }), 200},
		"a name for a port":    {edit(func(r *http.Request) { r.Host = "app.example.com:evil.com" }), 400},
		"a second host":        {edit(func(r *http.Request) { r.Host = "app.example.com:80,evil.com" }), 400},
		"a second port":        {edit(func(r *http.Request) { r.Host = "app.example.com:80:80" }), 400},
		"a long port":          {edit(func(r *http.Request) { r.Host = "app.example.com:" + strings.Repeat("9", 60000) }), 400},
		"a tunnel in a tunnel": {edit(func(r *http.Request) { r.Method = "CONNECT" }), 405},
		"a trace":              {edit(func(r *http.Request) { r.Method = "TRACE" }), 405},
		"a relative path":      {edit(func(r *http.Request) { r.URL.Path = "x" }), 400},
		"a line in the query":  {edit(func(r *http.Request) { r.URL.RawQuery = "a=b HTTP/1.1\r\nX: y" }), 400},
		"an opaque target":     {edit(func(r *http.Request) { r.URL.Opaque = "//evil/x" }), 400},
		"a method with spaces": {edit(func(r *http.Request) { r.Method = "GET /evil" }), 400},
	} {
		if got := w.status(c.req); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}

func TestRouting(t *testing.T) {
	w := newWorld(t, lapiSection+`
tunnels: [{name: home, tokenFile: /t}, {name: work, tokenFile: /t}]
hosts:
  - {host: app.example.com, tunnel: home, service: ORIGIN, origin: {hostHeader: root.internal}}
  - {host: app.example.com, path: /api, tunnel: home, service: ORIGIN, origin: {hostHeader: api.internal}}
  - {host: app.example.com, path: /api/v2, tunnel: home, service: ORIGIN, origin: {hostHeader: v2.internal}}
  - {host: only.example.com, path: /x, tunnel: home, service: ORIGIN, origin: {hostHeader: x.internal}}
  - {host: "*.example.com", tunnel: home, service: ORIGIN, origin: {hostHeader: wild.internal}}
  - {host: "*.deep.example.com", tunnel: home, service: ORIGIN, origin: {hostHeader: deep.internal}}
  - {host: work.example.net, tunnel: work, service: ORIGIN, origin: {hostHeader: work.internal}}
  - {host: nas.example.com, tunnel: home, service: ORIGIN, exposure: internal}
internalHosts: ["*.secret.example.com", db.deep.example.com]
`)
	for _, c := range []struct{ tunnel, target, want string }{
		{"home", "app.example.com/", "root.internal"},
		{"home", "app.example.com/apix", "root.internal"},
		{"home", "app.example.com/api", "api.internal"},
		{"home", "app.example.com/api/v1", "api.internal"},
		{"home", "app.example.com/api/v2/x", "v2.internal"},
		{"home", "app.example.com/x/../api/./v2", "v2.internal"},
		{"home", "app.example.com//api", "api.internal"},
		{"home", "app.example.com/%61pi", "api.internal"},
		{"home", "APP.Example.com./api", "api.internal"},
		{"home", "only.example.com/x", "x.internal"},
		{"home", "only.example.com/y", ""},
		{"home", "other.example.com/", "wild.internal"},
		{"home", "a.b.example.com/", "wild.internal"},
		{"home", "a.deep.example.com/", "deep.internal"},
		{"home", "deep.example.com/", "wild.internal"},
		{"home", "example.com/", ""},
		{"home", "example.org/", ""},
		{"home", "evilexample.com/", ""},
		{"home", "work.example.net/", ""},
		{"work", "work.example.net/", "work.internal"},
		{"work", "app.example.com/", ""},
		{"home", "nas.example.com/", ""},
		{"home", "a.secret.example.com/", ""},
		{"home", "a.b.secret.example.com/", ""},
		{"home", "db.deep.example.com/", ""},
		{"home", "192.0.2.1/", ""},
	} {
		res, body := w.ask(c.tunnel, visit("GET", "http://"+c.target, "203.0.113.7"))
		var got toldOrigin
		_ = json.Unmarshal([]byte(body), &got)
		if got.Host != c.want || (res.StatusCode == 404) != (c.want == "") {
			t.Errorf("%s by %s goes to %q with %d, want %q", c.target, c.tunnel, got.Host, res.StatusCode, c.want)
		}
	}
}

// TestInternalHostsNeverGetRoutes makes a configuration that validation would
// refuse, and demands that the connector's side refuses it, too.
func TestInternalHostsNeverGetRoutes(t *testing.T) {
	w := newWorld(t, gateConfig)
	w.pull(true)
	c := w.parse(gateConfig)
	c.InternalHosts = []Host{"*.example.com"}
	if err := w.gate.Apply(c); err != nil {
		t.Fatal(err)
	}
	if got := w.status(visit("GET", "http://app.example.com/", "203.0.113.7")); got != 404 {
		t.Errorf("an internal host answers %d", got)
	}
	if len(c.PublicHosts()) != 0 {
		t.Errorf("public are %v", c.PublicHosts())
	}
}

func TestServicesThatDoNotAnswer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone := "http://" + l.Addr().String()
	l.Close()
	hang := make(chan struct{})
	slow := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-hang }))
	defer slow.Close()
	defer close(hang)
	w := newWorld(t, oneTunnel+`
hosts:
  - {host: gone.example.com, service: "`+gone+`"}
  - {host: slow.example.com, service: "`+slow.URL+`", origin: {responseTimeout: 50ms}}
`)
	for host, want := range map[string]int{"gone.example.com": 502, "slow.example.com": 504} {
		if got := w.status(visit("GET", "http://"+host+"/", "203.0.113.7")); got != want {
			t.Errorf("%s: %d, want %d", host, got, want)
		}
	}
	if strings.Contains(w.logs.String(), "203.0.113.7") {
		t.Error("a failing service names visitors")
	}
	// A visitor who leaves is no failure of the service.
	ctx, cancel := context.WithCancel(t.Context())
	req := visit("GET", "http://slow.example.com/", "203.0.113.7").WithContext(ctx)
	cancel()
	if _, err := w.gate.For("home").RoundTrip(req); err == nil {
		t.Error("nobody is answered")
	}
}

func TestWebSocket(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "websocket" || r.Header.Get("Connection") != "Upgrade" || r.Header.Get("X-Forwarded-For") != "203.0.113.7" {
			http.Error(rw, fmt.Sprint(r.Header), 400)
			return
		}
		conn, buffered, err := http.NewResponseController(rw).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		fmt.Fprint(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
		_, _ = io.Copy(conn, buffered)
	})}
	go func() { _ = server.Serve(l) }()
	defer server.Close()
	for _, http2 := range []string{"false", "true"} {
		w := newWorld(t, lapiSection+oneTunnel+`hosts: [{host: ws.example.com, service: "http://`+l.Addr().String()+`", origin: {http2: `+http2+`}}]`+"\n")
		res, err := w.gate.For("home").RoundTrip(visit("GET", "http://ws.example.com/", "203.0.113.7", "Connection: Upgrade", "Upgrade: websocket"))
		if err != nil {
			t.Fatal(err)
		}
		if res.StatusCode != 101 {
			t.Fatalf("the upgrade is answered %d", res.StatusCode)
		}
		both := res.Body.(io.ReadWriteCloser)
		if _, err := both.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 5)
		if _, err := io.ReadFull(both, got); err != nil || string(got) != "hello" {
			t.Errorf("the echo is %q, %v", got, err)
		}

		// What does not ban its visitor leaves it open, and so does an observer.
		w.pull(true, row(1, "203.0.113.66", "ban", "cscli"), row(2, "203.0.113.7", "throttle", "cscli"))
		if err := w.gate.Apply(w.parse(w.config + "mode: observe\n")); err != nil {
			t.Fatal(err)
		}
		w.pull(true, row(1, "203.0.113.66", "ban", "cscli"), row(3, "203.0.113.0/24", "ban", "CAPI"))
		if _, err := both.Write([]byte("again")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(both, got); err != nil || string(got) != "again" {
			t.Errorf("before its visitor is banned the echo is %q, %v", got, err)
		}
		ended := make(chan error, 1)
		go func() { _, err := both.Read(got); ended <- err }()
		if err := w.gate.Apply(w.parse(strings.TrimSuffix(w.config, "mode: observe\n"))); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-ended:
			if err == nil {
				t.Error("the stream of a banned visitor says more")
			}
		case <-time.After(10 * time.Second):
			t.Fatal("the stream of a banned visitor goes on")
		}
		w.pull(true, row(3, "203.0.113.0/24", "ban", "CAPI"))
		if log := w.logs.String(); strings.Count(log, "stream cut") != 1 || !strings.Contains(log, "decision=3 ") {
			t.Errorf("the log is %s", log)
		}
		totals, err := w.gate.Totals()
		if err != nil {
			t.Fatal(err)
		}
		if n := totals[crowdsec.Series{Name: crowdsec.Dropped, Unit: crowdsec.Request, Origin: "CAPI", Remediation: "ban", IPType: "ipv4"}]; n != 1 {
			t.Errorf("%d are counted as dropped", n)
		}
		both.Close()
		if n := w.gate.exchanges.n; n != 0 || w.gate.exchanges.first != nil {
			t.Errorf("%d exchanges are remembered", n)
		}
	}
}

// TestBansCutWhatIsUnderWay bans a visitor who has something of every kind under
// way with services of both protocols: all of it ends at once, and nobody else's.
func TestBansCutWhatIsUnderWay(t *testing.T) {
	arrived := make(chan string)
	gone := make(chan string, 16) // services that were told to stop before they had answered
	service := httptest.NewUnstartedServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		control := http.NewResponseController(rw)
		_ = control.EnableFullDuplex()
		switch r.URL.Path {
		case "/events": // goes silent after the first
			fmt.Fprint(rw, "data: 0\n\n")
			_ = control.Flush()
			<-r.Context().Done()
		case "/download":
			for piece := make([]byte, 1<<10); r.Context().Err() == nil; time.Sleep(time.Millisecond) {
				_, _ = rw.Write(piece)
			}
		case "/stream": // answers while it hears
			_ = control.Flush()
			_, _ = io.Copy(rw, r.Body)
		case "/upload", "/stalled": // hears all before it answers
			_, _ = r.Body.Read(make([]byte, 1))
			arrived <- r.URL.Path
			_, _ = io.Copy(io.Discard, r.Body)
			gone <- r.URL.Path
		case "/late": // does not answer
			arrived <- r.URL.Path
			<-r.Context().Done()
			gone <- r.URL.Path
		}
	}))
	service.Config.Protocols = new(http.Protocols)
	service.Config.Protocols.SetHTTP1(true)
	service.Config.Protocols.SetUnencryptedHTTP2(true)
	service.Start()
	defer service.Close()
	for _, http2 := range []string{"false", "true"} {
		w := newWorld(t, lapiSection+oneTunnel+`hosts: [{host: app.example.com, service: "`+service.URL+`", origin: {http2: `+http2+`}}]`+"\n")
		w.pull(true)
		const banned, other = "203.0.113.66", "203.0.113.7"
		type end struct {
			path, from string
			status     int
			err        error
		}
		ends := make(chan end, 16)
		var leave []io.Closer
		open := func(path, from string, upload bool) {
			req := visit("GET", "http://app.example.com"+path, from)
			if upload {
				visitor, body := io.Pipe()
				leave = append(leave, visitor)
				// Over QUIC, to close a body ends no read of it.
				req.Method, req.Body, req.ContentLength = "POST", io.NopCloser(visitor), -1
				go func() {
					for {
						if _, err := body.Write(make([]byte, 4<<10)); err != nil || path == "/stalled" {
							return
						}
						time.Sleep(time.Millisecond)
					}
				}()
			}
			ready := make(chan struct{})
			late := path == "/upload" || path == "/stalled" || path == "/late"
			go func() {
				res, err := w.gate.For("home").RoundTrip(req)
				if err != nil {
					ends <- end{path, from, 0, err}
					return
				}
				if !late {
					_, _ = res.Body.Read(make([]byte, 1))
					close(ready)
				}
				_, err = io.Copy(io.Discard, res.Body)
				res.Body.Close()
				ends <- end{path, from, res.StatusCode, err}
			}()
			if late {
				<-arrived
			} else {
				<-ready
			}
		}
		for _, path := range []string{"/events", "/download", "/late"} {
			open(path, banned, false)
		}
		for _, path := range []string{"/stream", "/upload", "/stalled"} {
			open(path, banned, true)
		}
		open("/events", other, false)
		w.pull(false, row(1, banned, "ban", "cscli"))
		for range 6 {
			select {
			case e := <-ends:
				// What had no answer yet gets the same as a new request.
				late := e.path == "/upload" || e.path == "/stalled" || e.path == "/late"
				if e.from != banned || late && (e.status != 403 || e.err != nil) || !late && (e.status != 200 || e.err == nil) {
					t.Errorf("http2 %s: %s of %s ends with %d, %v", http2, e.path, e.from, e.status, e.err)
				}
			case <-time.After(10 * time.Second):
				t.Fatalf("http2 %s: something of a banned visitor goes on; the log is %s", http2, w.logs)
			}
		}
		for _, l := range leave { // as the connector does with the stream of a request that is over
			l.Close()
		}
		for range 3 {
			select {
			case <-gone:
			case <-time.After(10 * time.Second):
				t.Fatalf("http2 %s: a service goes on with what a banned visitor asked", http2)
			}
		}
		select {
		case e := <-ends:
			t.Errorf("%s of another visitor ends with %v", e.path, e.err)
		case <-time.After(50 * time.Millisecond):
		}
		if n := w.gate.exchanges.n; n != 1 {
			t.Errorf("%d exchanges are remembered, want the other visitor's", n)
		}
		if n := strings.Count(w.logs.String(), "stream cut"); n != 6 {
			t.Errorf("%d lines say that something was cut: %s", n, w.logs)
		}
		w.pull(false, row(2, other, "ban", "cscli"))
		<-ends
		if n := w.gate.exchanges.n; n != 0 || w.gate.exchanges.first != nil {
			t.Errorf("%d exchanges are remembered", n)
		}
	}
}

// TestNothingSlipsPastABan has requests that would never end come at the very
// moment of a ban: each is refused or cut.
func TestNothingSlipsPastABan(t *testing.T) {
	service := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(rw).Flush()
		<-r.Context().Done()
	}))
	defer service.Close()
	w := newWorld(t, lapiSection+oneTunnel+`hosts: [{host: app.example.com, service: "`+service.URL+`"}]`+"\n")
	const banned = "203.0.113.66"
	var refused, cut atomic.Int64
	for range 200 {
		w.pull(true)
		var requests sync.WaitGroup
		for range 4 {
			requests.Go(func() {
				time.Sleep(rand.N(600 * time.Microsecond))
				res, err := w.gate.For("home").RoundTrip(visit("GET", "http://app.example.com/", banned))
				if err != nil {
					t.Error(err)
					return
				}
				_, err = io.Copy(io.Discard, res.Body)
				res.Body.Close()
				if res.StatusCode == 403 {
					refused.Add(1)
				} else {
					cut.Add(1)
				}
				if (res.StatusCode == 403) != (err == nil) {
					t.Errorf("answered %d, and then %v", res.StatusCode, err)
				}
			})
		}
		time.Sleep(rand.N(600 * time.Microsecond))
		w.pull(true, row(1, banned, "ban", "cscli"))
		over := make(chan struct{})
		go func() { requests.Wait(); close(over) }()
		select {
		case <-over:
		case <-time.After(10 * time.Second):
			t.Fatal("a request slipped through")
		}
		s := w.gate.Sink()
		s.Begin(false, w.clock())
		s.Delete(1)
		s.Commit()
	}
	if refused.Load() == 0 || cut.Load() == 0 {
		t.Errorf("%d requests were refused, %d cut: the test met no moment between", refused.Load(), cut.Load())
	}
}

// TestApplyChangesEverythingAtOnce swaps routes a hundred times under load.
func TestApplyChangesEverythingAtOnce(t *testing.T) {
	w := newWorld(t, gateConfig)
	w.pull(true)
	stop := make(chan struct{})
	var done sync.WaitGroup
	for range 4 {
		done.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				res, err := w.gate.For("home").RoundTrip(visit("GET", "http://app.example.com/", "203.0.113.7"))
				if err != nil || res.StatusCode != 200 {
					t.Errorf("%v, %v", res, err)
					return
				}
				_, _ = io.Copy(io.Discard, res.Body)
				res.Body.Close()
			}
		})
	}
	for i := range 100 {
		extra := ""
		for j := range i % 5 {
			extra += fmt.Sprintf("  - {host: h%d.example.com, service: ORIGIN, origin: {connectTimeout: %ds}}\n", j, i+1)
		}
		if err := w.gate.Apply(w.parse(strings.Replace(gateConfig, "identity:", extra+"identity:", 1))); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	done.Wait()
	// What is wrong changes nothing.
	bad := w.parse(strings.Replace(gateConfig, "app.example.com", "new.example.com", 1))
	bad.Identity.KeyFile = "/nonexistent/key"
	if err := w.gate.Apply(bad); err == nil || !strings.Contains(err.Error(), "identity.keyFile") {
		t.Errorf("applied: %v", err)
	}
	if got := w.status(visit("GET", "http://app.example.com/", "203.0.113.7")); got != 200 {
		t.Errorf("after a bad configuration: %d", got)
	}
}

func TestWhy(t *testing.T) {
	w := newWorld(t, gateConfig)
	w.pull(true, row(1, "203.0.113.0/24", "captcha", "CAPI"), row(2, "203.0.113.66", "ban", "crowdsec"),
		row(3, "198.51.100.1", "throttle", "crowdsec"))
	y := w.gate.Why(netip.MustParseAddr("203.0.113.66"), "")
	if y.Verdict != "ban" || len(y.Decisions) != 2 || y.Decisions[0].ID != 2 || !y.Decisions[0].Enforced {
		t.Errorf("%+v", y)
	}
	if want := "its requests are answered 403 until " + w.clock().Add(time.Hour).Format(time.DateTime); y.Says != want {
		t.Errorf("why says %q, want %q", y.Says, want)
	}
	if y := w.gate.Why(netip.MustParseAddr("198.51.100.1"), ""); y.Verdict != "throttle" || !strings.HasPrefix(y.Says, "30 of its requests a minute pass, and more are answered 429 until ") {
		t.Errorf("%+v", y)
	}
	if y := w.gate.Why(netip.MustParseAddr("203.0.113.99"), ""); y.Verdict != "allow" || len(y.Decisions) != 1 || y.Decisions[0].Because != "the address is in decisions.allow" {
		t.Errorf("%+v", y)
	}
	if y := w.gate.Why(netip.MustParseAddr("192.0.2.1"), ""); y.Says != "no decision holds it" {
		t.Errorf("%+v", y)
	}
}

// TestWhyKnowsAllReasons has visitors who are refused for more than a decision on
// their address.
func TestWhyKnowsAllReasons(t *testing.T) {
	const closed = lapiSection + oneTunnel + "hosts: [{host: app.example.com, service: http://app, fail: closed}]\n"
	w := newWorld(t, closed)
	country := row(7, "NL", "ban", "cscli")
	country.Scope = "Country"
	w.pull(true, country)
	visitor := netip.MustParseAddr("192.0.2.1")
	if y := w.gate.Why(visitor, ""); y.Verdict != "allow" || y.Says != "no decision holds it; there are decisions on visitors from NL: name the country of this one with --country" {
		t.Errorf("without a country: %+v", y)
	}
	if y := w.gate.Why(visitor, "de"); y.Verdict != "allow" || y.Says != "no decision holds it" {
		t.Errorf("of another country: %+v", y)
	}
	if y := w.gate.Why(visitor, "nl"); y.Verdict != "ban" || len(y.Decisions) != 1 || y.Decisions[0].Country != "NL" || !y.Decisions[0].Enforced {
		t.Errorf("of the country: %+v", y)
	}
	if s := w.gate.Status(nil); len(s.Countries) != 1 || s.Countries[0].Country != "NL" || s.Countries[0].Remediation != "ban" {
		t.Errorf("the status has the countries %+v", s.Countries)
	}
	w.wait(11 * time.Minute)
	if y := w.gate.Why(visitor, "de"); !strings.Contains(y.Says, "hosts that fail closed are refused with 503") {
		t.Errorf("with old decisions: %+v", y)
	}
	if err := w.gate.Apply(w.parse("mode: observe\n" + closed)); err != nil {
		t.Fatal(err)
	}
	w.pull(true, country)
	if y := w.gate.Why(visitor, "nl"); y.Decisions[0].Enforced || y.Decisions[0].Because != "counted, and not enforced: the mode is observe" {
		t.Errorf("an observer: %+v", y)
	}
	// A LAPI that answers nonsense does not answer.
	w.gate.Pulled(errors.New("pull decisions: the answer is 500"))
	if s := w.gate.Status(nil).LAPI; s.Answering || s.Error != "pull decisions: the answer is 500" {
		t.Errorf("after a pull that failed: %+v", s)
	}
	w.gate.Pulled(nil)
	if s := w.gate.Status(nil).LAPI; !s.Answering || s.Error != "" {
		t.Errorf("after one that did not: %+v", s)
	}
}

// FuzzIdentity demands that whatever a visitor sends, the origin service learns
// the address that the edge vouches for and no other, or nothing at all.
func FuzzIdentity(f *testing.F) {
	f.Add("X-Forwarded-For", "1.1.1.1", "203.0.113.7", "app.example.com")
	f.Add("cf-connecting-ip", "1.1.1.1", "203.0.113.7", "app.example.com")
	f.Add("X_REAL_IP", "1.1.1.1", "2001:db8::7", "app.example.com:443")
	f.Add("Connection", "X-Real-Ip, Cf-Connecting-Ip, X-Edgeward-Client", "203.0.113.7", "app.example.com")
	f.Add("X-Edgeward-Client", "v1 1 https 1.1.1.1 AAAA", "::ffff:203.0.113.7", "app.example.com")
	f.Add("X-A\r\nX-Real-Ip", "\xff", "203.0.113.7\r\n", "app\n.example.com")
	f.Fuzz(func(t *testing.T, name, value, vouched, host string) {
		req := &http.Request{Method: "GET", URL: &url.URL{Path: "/"}, Host: host, Header: http.Header{"Cf-Connecting-Ip": {vouched}}}
		if name != "Cf-Connecting-Ip" {
			req.Header[name] = []string{value}
		}
		in, reason := read(req)
		if reason != "" {
			return
		}
		want, err := netip.ParseAddr(vouched)
		if err != nil || in.addr != want.Unmap() && !pseudo.Contains(want) {
			t.Fatalf("the visitor is %v, vouched for %q", in.addr, vouched)
		}
		out := in.outgoing(req.Context(), req, &route{to: Service{"http", "origin"}})
		for name, values := range out.Header {
			flat := http.CanonicalHeaderKey(strings.ReplaceAll(name, "_", "-"))
			switch flat {
			case "X-Forwarded-For", "X-Real-Ip", "Cf-Connecting-Ip":
				if name != flat || len(values) != 1 || values[0] != in.addr.String() {
					t.Fatalf("%s is %q", name, values)
				}
			case "Forwarded", "True-Client-Ip", IdentityHeader, "Cf-Connecting-Ipv6":
				t.Fatalf("%s goes on", name)
			}
			for _, v := range values {
				if strings.ContainsAny(name+v, "\r\n\x00") {
					t.Fatalf("%q: %q goes on", name, v)
				}
			}
		}
		if strings.ContainsAny(out.Host, "\r\n \x00") {
			t.Fatalf("the host is %q", out.Host)
		}
	})
}

// BenchmarkVerdict is what the gate adds to a request before it is routed.
func BenchmarkVerdict(b *testing.B) {
	for _, n := range []int{0, 15_000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			w := newWorld(b, gateConfig)
			rows := make([]lapi.Row, n)
			for i := range rows {
				rows[i] = row(i+1, netip.AddrFrom4([4]byte{198, byte(i >> 16), byte(i >> 8), byte(i)}).String(), "ban", "CAPI")
			}
			w.pull(true, rows...)
			s := w.gate.feed.seen.Load()
			addr := netip.MustParseAddr("203.0.113.7")
			now := w.clock()
			b.ResetTimer()
			for range b.N {
				if v := s.lookup(addr, "NL", now); v.ID != 0 {
					b.Fatal(v)
				}
			}
		})
	}
}

// TestJumpOfTheClock sets the wall clock forth and back by years: no decision
// ends or lasts because of that, nothing known grows old, and what people and the
// plugin read follows the wall.
func TestJumpOfTheClock(t *testing.T) {
	for _, jump := range []time.Duration{50 * 365 * 24 * time.Hour, 2 * time.Hour, -2 * time.Hour, -50 * 365 * 24 * time.Hour} {
		w := newWorld(t, gateConfig)
		w.pull(true, row(1, "203.0.113.66", "ban", "cscli"), row(2, "203.0.113.67", "throttle", "cscli"))
		w.mu.Lock()
		w.jump = jump
		w.mu.Unlock()
		banned := func() int { return w.status(visit("GET", "http://app.example.com/", "203.0.113.66")) }
		if got := banned(); got != 403 {
			t.Errorf("after a jump by %v a banned visitor gets %d", jump, got)
		}
		_, body := w.ask("home", visit("GET", "http://app.example.com/", "203.0.113.7")) // where it fails closed
		if want := fmt.Sprintf("v1 %d https 203.0.113.7", w.wall().Unix()); !strings.Contains(body, want) {
			t.Errorf("after a jump by %v the service sees %s, want %s", jump, body, want)
		}
		until := w.wall().Add(time.Hour).UTC().Format(time.RFC3339)
		if !strings.Contains(w.logs.String(), "until="+until) {
			t.Errorf("after a jump by %v the log is %s, want until %s", jump, w.logs, until)
		}
		if y := w.gate.Why(netip.MustParseAddr("203.0.113.66"), ""); len(y.Decisions) != 1 || !y.Decisions[0].Until.Equal(w.wall().Add(time.Hour)) {
			t.Errorf("after a jump by %v: %+v", jump, y)
		}
		if s := w.gate.Status(nil).LAPI; !s.Answering || !s.LastPull.Equal(w.wall()) {
			t.Errorf("after a jump by %v LAPI stands as %+v", jump, s)
		}
		passed := 0
		for range 20 {
			if w.status(visit("GET", "http://app.example.com/", "203.0.113.67")) == 200 {
				passed++
			}
		}
		if passed != throttleBurst {
			t.Errorf("after a jump by %v a throttled visitor gets %d of 20 requests through", jump, passed)
		}
		// An hour later the ban is over, whatever the wall says.
		w.wait(time.Hour + time.Second)
		w.pull(false)
		if got := banned(); got != 200 {
			t.Errorf("when its ban is over a visitor gets %d", got)
		}
	}
}

// BenchmarkExchange is what it costs every request that a ban can cut it.
func BenchmarkExchange(b *testing.B) {
	w := newWorld(b, gateConfig)
	req := visit("GET", "http://app.example.com/", "203.0.113.7")
	in, _ := read(req)
	for range 64 { // under way meanwhile
		_, _ = w.gate.exchanges.begin(req, in)
	}
	b.ReportAllocs()
	for range b.N {
		e, _ := w.gate.exchanges.begin(req, in)
		e.end()
	}
}

// BenchmarkIdentity is what reading, cleaning and signing a request costs.
func BenchmarkIdentity(b *testing.B) {
	w := newWorld(b, gateConfig)
	set := w.gate.setup.Load()
	req := visit("GET", "http://app.example.com/", "203.0.113.7", "Accept: text/html", "Accept-Language: en", "Cookie: a=b", "User-Agent: x", "Cf-Ipcountry: NL", "Cdn-Loop: cloudflare")
	to := set.routes.find("home", "app.example.com", "/")
	b.ReportAllocs()
	for range b.N {
		in, _ := read(req)
		out := in.outgoing(req.Context(), req, to)
		out.Header[IdentityHeader] = []string{set.signer.Sign(w.clock(), in.scheme, in.addr, out.Method, out.Host)}
	}
}

// TestServicesOfEveryKind reaches services over TLS and HTTP/2.
func TestServicesOfEveryKind(t *testing.T) {
	grpc := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		rw.Header().Set("Trailer", "Grpc-Status")
		fmt.Fprintf(rw, "%s %s", r.Proto, r.Trailer.Get("X-Sent"))
		rw.Header().Set("Grpc-Status", "0")
	})
	clear := httptest.NewUnstartedServer(grpc)
	clear.Config.Protocols = new(http.Protocols)
	clear.Config.Protocols.SetUnencryptedHTTP2(true)
	clear.Start()
	defer clear.Close()
	secure := httptest.NewUnstartedServer(grpc)
	secure.EnableHTTP2 = true
	secure.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	secure.StartTLS()
	defer secure.Close()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw})
	w := newWorld(t, oneTunnel+"hosts: []")
	if err := os.WriteFile(filepath.Join(w.dir, "ca.pem"), ca, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(w.dir, "bad.pem"), []byte("no certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	host := func(name, service, origin string) string {
		return "  - {host: " + name + ".example.com, service: '" + service + "', origin: {" + origin + "}}\n"
	}
	if err := w.gate.Apply(w.parse(oneTunnel + "hosts:\n" +
		host("clear", clear.URL, "grpc: true") + host("h2", secure.URL, "http2: true, caFile: DIR/ca.pem") +
		host("tls", secure.URL, "caFile: DIR/ca.pem, serverName: example.com") + host("blind", secure.URL, "insecureSkipVerify: true") +
		host("unknown", secure.URL, "") + host("other", secure.URL, "caFile: DIR/ca.pem, serverName: other.test"))); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"clear": "200 HTTP/2.0 yes", "h2": "200 HTTP/2.0 yes", "tls": "200 HTTP/1.1 yes", "blind": "200 HTTP/1.1 yes", "unknown": "502", "other": "502",
	} {
		req := visit("POST", "http://"+name+".example.com/", "203.0.113.7", "Te: trailers")
		req.Body, req.ContentLength, req.Trailer = io.NopCloser(strings.NewReader("x")), -1, http.Header{"X-Sent": {"yes"}}
		res, body := w.ask("home", req)
		if got := fmt.Sprint(res.StatusCode, " ", body); !strings.HasPrefix(got, want) || res.StatusCode == 200 && res.Trailer.Get("Grpc-Status") != "0" {
			t.Errorf("%s: %s %v, want %s", name, got, res.Trailer, want)
		}
	}
	if err := w.gate.Apply(w.parse(oneTunnel + "hosts:\n" + host("bad", secure.URL, "caFile: DIR/bad.pem"))); err == nil || !strings.Contains(err.Error(), "no PEM certificate") {
		t.Errorf("applied: %v", err)
	}
}

func TestThrottleIsBounded(t *testing.T) {
	throttle := newThrottle()
	now := time.Unix(1_700_000_000, 0)
	for i := range throttleBounds + 100 {
		throttle.take(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), now)
	}
	if n := len(throttle.buckets); n != throttleBounds {
		t.Errorf("%d buckets", n)
	}
	throttle.rest.AllowN(now, throttleBurst)
	// Who has no room shares what is left, and the idle make room.
	if throttle.take(netip.MustParseAddr("192.0.2.1"), now) == 0 {
		t.Error("a stranger without room is let in at will")
	}
	if throttle.take(netip.MustParseAddr("192.0.2.1"), now.Add(time.Minute)) != 0 || len(throttle.buckets) != 1 {
		t.Errorf("after a minute there are %d buckets", len(throttle.buckets))
	}
	for i := range 20 {
		wait := throttle.take(netip.MustParseAddr(fmt.Sprintf("2001:db8::%x", i+1)), now)
		if (wait == 0) != (i < throttleBurst) {
			t.Errorf("request %d of one /64 waits %d", i, wait)
		}
	}
}

// BenchmarkRoundTrip is a whole request to a service on loopback: as a transport
// alone makes it, through a gate that only routes, and through one that looks
// the visitor up among 15,000 decisions and signs.
func BenchmarkRoundTrip(b *testing.B) {
	service := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { _, _ = rw.Write(make([]byte, 2048)) }))
	defer service.Close()
	rows := make([]lapi.Row, 15_000)
	for i := range rows {
		rows[i] = row(i+1, netip.AddrFrom4([4]byte{198, 51, byte(i >> 8), byte(i)}).String(), "ban", "CAPI")
	}
	hosts := "hosts: [{host: app.example.com, service: '" + service.URL + "'}]\n"
	routing := newWorld(b, oneTunnel+hosts)
	deciding := newWorld(b, lapiSection+oneTunnel+hosts+"identity: {keyFile: DIR/key}\n")
	deciding.pull(true, rows...)
	transport := &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true}
	defer transport.CloseIdleConnections()
	address := strings.TrimPrefix(service.URL, "http://")
	for _, c := range []struct {
		name string
		way  http.RoundTripper
	}{{"transport", transport}, {"routing", routing.gate.For("home")}, {"deciding", deciding.gate.For("home")}} {
		b.Run(c.name, func(b *testing.B) {
			for range b.N {
				req := visit("GET", "http://app.example.com/", "203.0.113.7", "User-Agent: x")
				if c.name == "transport" {
					req.URL.Host = address
				}
				res, err := c.way.RoundTrip(req)
				if err != nil || res.StatusCode != 200 {
					b.Fatal(res, err)
				}
				_, _ = io.Copy(io.Discard, res.Body)
				res.Body.Close()
			}
		})
	}
}

// TestMetricsAreConsistent gathers all metrics, which the registry checks, and
// holds their names to the house's rules.
func TestMetricsAreConsistent(t *testing.T) {
	w := newWorld(t, gateConfig)
	w.pull(true, row(1, "203.0.113.66", "ban", "crowdsec"))
	w.status(visit("GET", "http://app.example.com/", "203.0.113.66"))
	w.status(visit("GET", "http://app.example.com/", ""))
	links := func() []Link {
		return []Link{{Tunnel: "home", Wanted: 2, Connections: []Connection{{Registered: true, Protocol: "quic", Location: "ams01"}, {Index: 1, Registered: true, Protocol: "quic", Location: "ams01"}}}}
	}
	calls := func() Calls {
		return Calls{Made: map[Call]uint64{{What: "list records", Outcome: "ok"}: 3}, Left: 1100}
	}
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(w.gate.Collector(links, calls))
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		name := f.GetName()
		if counter := f.GetType().String() == "COUNTER"; !strings.HasPrefix(name, "edgeward_") || counter != strings.HasSuffix(name, "_total") || f.GetHelp() == "" {
			t.Errorf("%s is a %s: %s", name, f.GetType(), f.GetHelp())
		}
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if _, err := netip.ParseAddr(l.GetValue()); err == nil {
					t.Errorf("%s has an address for %s", name, l.GetName())
				}
			}
		}
	}
	if err := Ready(links()); err != nil {
		t.Error(err)
	}
	if err := Ready([]Link{{Tunnel: "home", Refused: "Unauthorized"}}); err == nil || !strings.Contains(err.Error(), "tunnel home: Unauthorized") {
		t.Error(err)
	}
	if s := w.gate.Status(links()); s.Ready != "yes" || !s.LAPI.Answering || len(s.Hosts) != 2 || len(s.Decisions) != 1 {
		t.Errorf("the status is %+v", s)
	}
}

// TestTrailersClaimNoIdentity has them filled in after the body, as they are.
func TestTrailersClaimNoIdentity(t *testing.T) {
	w := newWorld(t, gateConfig)
	w.pull(true)
	req := visit("POST", "http://app.example.com/", "203.0.113.7")
	req.Body, req.ContentLength = io.NopCloser(strings.NewReader("x")), -1
	req.Trailer = http.Header{"X-Forwarded-For": {"192.0.2.6"}, IdentityHeader: {"v1 forged"}, "Cf-Connecting-Ip": {"192.0.2.6"}, "X-Forwarded_for": {"192.0.2.6"}, "X-Sent": {"yes"}}
	_, body := w.ask("home", req)
	var told toldOrigin
	if err := json.Unmarshal([]byte(body), &told); err != nil || len(told.Trailer) != 1 || told.Trailer.Get("X-Sent") != "yes" {
		t.Errorf("the service gets the trailers %v, %v", told.Trailer, err)
	}
}

func TestUnaskedSwitchOfProtocols(t *testing.T) {
	service := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(rw).Hijack()
		if err == nil {
			fmt.Fprint(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n")
			conn.Close()
		}
	}))
	defer service.Close()
	w := newWorld(t, oneTunnel+"hosts: [{host: app.example.com, service: \""+service.URL+"\"}]\n")
	if got := w.status(visit("GET", "http://app.example.com/", "203.0.113.7")); got != 502 {
		t.Errorf("the answer is %d", got)
	}
}

// TestTooManyAtOnce fills the gate, and expects room again after the last byte.
func TestTooManyAtOnce(t *testing.T) {
	w := newWorld(t, gateConfig)
	w.pull(true)
	w.gate.exchanges.n = mostExchanges - 1
	one, err := w.gate.For("home").RoundTrip(visit("GET", "http://app.example.com/", "203.0.113.7"))
	if err != nil || one.StatusCode != 200 {
		t.Fatalf("the last that fits: %v, %v", one, err)
	}
	if res, _ := w.ask("home", visit("GET", "http://app.example.com/", "203.0.113.7")); res.StatusCode != 503 || res.Header.Get("Retry-After") != "5" {
		t.Errorf("one more is answered %d, Retry-After %q", res.StatusCode, res.Header.Get("Retry-After"))
	}
	if n := w.gate.counts.unserved[[2]string{"app.example.com", "overload"}]; n == nil || n.Load() != 1 {
		t.Error("it is not counted")
	}
	one.Body.Close()
	one.Body.Close()
	if got := w.status(visit("GET", "http://app.example.com/", "203.0.113.7")); got != 200 || w.gate.exchanges.n != mostExchanges-1 {
		t.Errorf("after it: %d, %d under way", got, w.gate.exchanges.n)
	}
}

func TestLongPagesAreRefused(t *testing.T) {
	w := newWorld(t, gateConfig)
	page := filepath.Join(t.TempDir(), "page")
	if err := os.WriteFile(page, []byte(strings.Repeat("a", longestPage+1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := w.gate.Apply(w.parse(w.config + "ban: {pageFile: " + page + "}\n")); err == nil || !strings.Contains(err.Error(), "over 1 MiB") {
		t.Errorf("a long page: %v", err)
	}
}

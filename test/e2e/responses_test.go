package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/edgeward/edgeward/test/rig"
)

// TestRefusal: what a banned client is told.
func TestRefusal(t *testing.T) {
	t.Parallel()
	g := newGateway(t, rig.TraefikOptions{TrustForwarded: true})
	l := newLAPI(t, rig.LAPIOptions{})
	const bad = "2001:db8::bad"
	l.decide(t, rig.Decision{Value: bad, Duration: time.Hour, Scenario: "crowdsecurity/secret-scenario"})
	dir := t.TempDir()
	page, broken := filepath.Join(dir, "page.html"), filepath.Join(dir, "broken.html")
	for name, text := range map[string]string{page: "<p>{{.Status}} {{.Address}} {{.Decision}} {{.Reason}}", broken: "{{.NoSuchField}}"} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	guard := func(ban object) object {
		config := object{"lapi": l.config(), "client": posing}
		if ban != nil {
			config["ban"] = ban
		}
		return config
	}
	g.serve(t, site{plugins: map[string]object{
		"guard":   guard(nil),
		"page":    guard(object{"pageFile": page, "status": 451}),
		"broken":  guard(object{"pageFile": broken}),
		"missing": guard(object{"pageFile": filepath.Join(dir, "none.html")}),
	}})
	g.becomes(t, bad, "guard", 403, 2*promise)

	const (
		html = "text/html; charset=utf-8"
		text = "text/plain; charset=utf-8"
		json = "application/problem+json"
	)
	for _, test := range []struct {
		name   string
		to     string
		method string
		accept string
		status int
		kind   string
		body   string // a pattern
	}{
		{"a browser gets a page", "guard", "GET", "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8", 403, html, `^<!DOCTYPE html>(?s:.*)2001:db8::bad &middot; decision \d+`},
		{"an API client gets a problem", "guard", "GET", "application/json", 403, json, `^\{.*"status":403`},
		{"who prefers a problem gets it", "guard", "POST", "text/html;q=0.5, application/problem+json", 403, json, `"decision":\d+`},
		{"curl gets a line", "guard", "GET", "*/*", 403, text, `^Access from your network is blocked\. \(decision \d+\)\n$`},
		{"who names nothing gets a line", "guard", "GET", "", 403, text, `^Access`},
		{"who accepts nothing gets a line", "guard", "GET", "image/png, text/html;q=0", 403, text, `^Access`},
		{"nonsense is no preference", "guard", "GET", ";;q=,,/;q=x,text/html;q=nan", 403, text, `^Access`},
		{"HEAD gets no body", "guard", "HEAD", "text/html", 403, html, `^$`},
		{"an upload is refused the same", "guard", "PUT", "text/plain", 403, text, `^Access`},
		{"an own page and status", "page", "GET", "text/html", 451, html, `^<p>451 2001:db8::bad \d+ Access`},
		{"an own status for all", "page", "GET", "application/json", 451, json, `"status":451`},
		{"a page that is no template falls back", "broken", "GET", "text/html", 403, html, `^<!DOCTYPE html>`},
		{"a page that is not there falls back", "missing", "GET", "text/html", 403, html, `^<!DOCTYPE html>`},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := g.origin.Requests()
			r := as(bad, test.to)
			r.method, r.path = test.method, "/<script>alert(1)</script>?x=%3Cscript%3E"
			r.header = append(r.header, "User-Agent: <script>alert(1)</script>", "Referer: <script>", "Origin: https://evil.example")
			if test.accept != "" {
				r.header = append(r.header, "Accept: "+test.accept)
			}
			if test.method == "PUT" {
				r.body = strings.Repeat("x", 100000)
			}
			a := g.ask(t, r)
			if a.status != test.status {
				t.Errorf("status is %d, want %d", a.status, test.status)
			}
			for name, want := range map[string]string{
				"Content-Type": test.kind, "Cache-Control": "no-store", "Vary": "Accept",
				"X-Content-Type-Options": "nosniff", "Access-Control-Allow-Origin": "",
			} {
				if got := a.header.Get(name); got != want {
					t.Errorf("%s is %q, want %q", name, got, want)
				}
			}
			if !regexp.MustCompile(test.body).MatchString(a.body) {
				t.Errorf("body is %q, want it to match %s", a.body, test.body)
			}
			if test.method != "HEAD" && a.header.Get("Content-Length") != strconv.Itoa(len(a.body)) {
				t.Errorf("Content-Length is %q, want %d", a.header.Get("Content-Length"), len(a.body))
			}
			said := fmt.Sprint(a.header, a.body)
			for _, secret := range []string{"<script>", "secret-scenario", "cscli", "evil"} {
				if strings.Contains(said, secret) {
					t.Errorf("the answer says %q: %s", secret, said)
				}
			}
			if n := g.origin.Requests() - before; n != 0 {
				t.Errorf("%d requests reached the origin, want none", n)
			}
		})
	}
	t.Run("a page that cannot be used is said in the log", func(t *testing.T) {
		files := map[string]bool{}
		for _, l := range g.lines("cannot use ban.pageFile, showing the built-in page") {
			files[filepath.Base(fmt.Sprint(l["file"]))] = true
		}
		if diff := cmp.Diff(map[string]bool{"broken.html": true, "none.html": true}, files); diff != "" {
			t.Errorf("files that the log complains of (- want, + got):\n%s", diff)
		}
	})
	t.Run("a problem is JSON", func(t *testing.T) {
		r := as(bad, "guard")
		r.header = append(r.header, "Accept: application/json")
		var problem struct {
			Type, Title, Detail string
			Status, Decision    int
		}
		if err := unmarshal(g.ask(t, r).body, &problem); err != nil {
			t.Fatal(err)
		}
		if problem.Type != "about:blank" || problem.Title != "Forbidden" || problem.Status != 403 || problem.Detail == "" || problem.Decision == 0 {
			t.Errorf("problem is %+v, want type, title, status, detail and decision", problem)
		}
	})
}

func unmarshal(text string, into any) error { return json.Unmarshal([]byte(text), into) }

// limitHeaders are what an answer says of limits.
func limitHeaders(a reply) string {
	return fmt.Sprintf("%d | %s | %s | %s", a.status, a.header.Get("RateLimit-Policy"), a.header.Get("RateLimit"), a.header.Get("Retry-After"))
}

// TestRateLimits: who is counted with whom, and what clients are told. Every
// case has policies and addresses of its own.
func TestRateLimits(t *testing.T) {
	t.Parallel()
	g := newGateway(t, rig.TraefikOptions{TrustForwarded: true})
	limits := func(limits ...object) object { return object{"client": posing, "rateLimits": limits} }
	// slow limits hardly refill while a test runs.
	slow := func(name string, burst int, more object) object {
		limit := object{"name": name, "average": 1, "period": "1h", "burst": burst}
		for k, v := range more {
			limit[k] = v
		}
		return limit
	}
	conf := site{
		plugins: map[string]object{
			"truth":   limits(object{"name": "truth", "average": 1, "period": "2s", "burst": 3}),
			"flow":    limits(object{"name": "flow", "average": 50, "period": "1s", "burst": 20}),
			"shared":  limits(slow("shared", 4, nil)),
			"same":    limits(slow("shared", 4, nil)),
			"twin":    limits(slow("twin", 4, nil)),
			"keys":    limits(slow("keys", 2, nil)),
			"wide":    limits(slow("wide", 2, object{"key": object{"ipv4Prefix": 24, "ipv6Prefix": 56}})),
			"token":   limits(slow("token", 2, object{"key": object{"header": "X-Token"}})),
			"exempt":  limits(slow("exempt", 1, object{"exempt": []string{"203.0.113.0/28", "2001:db8:e::/48"}})),
			"quiet":   limits(slow("quiet", 1, object{"hideHeaders": true})),
			"several": limits(slow("all", 5, nil), slow("sign in", 1, object{"match": object{"pathPrefixes": []string{"/login"}, "methods": []string{"post"}}})),
			"hosts":   limits(slow("hosts", 1, object{"match": object{"hosts": []string{"Hosts.test", "*.deep.test"}}})),
			"flood":   limits(slow("flood", 1, nil)),
			"watch":   {"mode": "observe", "client": posing, "rateLimits": []object{slow("watch", 1, nil)}},
		},
		routers: map[string][]string{"shared2": {"shared"}, "a.deep": {"hosts"}, "other": {"hosts"}},
	}
	g.serve(t, conf)

	// spend makes n requests and returns their statuses.
	spend := func(t *testing.T, n int, r request) (statuses []int) {
		for range n {
			statuses = append(statuses, g.ask(t, r).status)
		}
		return statuses
	}
	wantSpent := func(t *testing.T, r request, want ...int) {
		t.Helper()
		if diff := cmp.Diff(want, spend(t, len(want), r)); diff != "" {
			t.Errorf("statuses of requests to %s with %q (- want, + got):\n%s", r.to, r.header, diff)
		}
	}

	t.Run("Retry-After is true", func(t *testing.T) {
		r := as("203.0.113.1", "truth")
		var said []string
		for range 4 {
			said = append(said, limitHeaders(g.ask(t, r)))
		}
		if diff := cmp.Diff([]string{
			`200 | "truth";q=3;w=6 | "truth";r=2;t=2 | `,
			`200 | "truth";q=3;w=6 | "truth";r=1;t=2 | `,
			`200 | "truth";q=3;w=6 | "truth";r=0;t=2 | `,
			`429 | "truth";q=3;w=6 | "truth";r=0;t=2 | 2`,
		}, said); diff != "" {
			t.Errorf("status, policy, limit and Retry-After (- want, + got):\n%s", diff)
		}
		for range 3 {
			a := g.ask(t, r)
			wait, err := strconv.Atoi(a.header.Get("Retry-After"))
			if a.status != 429 || err != nil {
				t.Fatalf("answer is %s, want a 429 with Retry-After", limitHeaders(a))
			}
			if a.header.Get("Cache-Control") != "no-store" {
				t.Errorf("Cache-Control of a 429 is %q, want no-store", a.header.Get("Cache-Control"))
			}
			time.Sleep(time.Duration(wait) * time.Second)
			if a := g.ask(t, r); a.status != 200 {
				t.Errorf("after the %d s of Retry-After the answer is %s, want 200", wait, limitHeaders(a))
			}
		}
	})
	t.Run("no more than burst and rate pass, and no less", func(t *testing.T) {
		const clients = 16
		var passed, refused atomic.Int64
		var wait sync.WaitGroup
		began := time.Now()
		end := began.Add(3 * time.Second)
		for range clients {
			wait.Go(func() {
				for time.Now().Before(end) {
					a, err := g.try(t.Context(), as("203.0.113.2", "flow"))
					switch {
					case err != nil:
						t.Error(err)
						return
					case a.status == 200:
						passed.Add(1)
					default:
						refused.Add(1)
					}
				}
			})
		}
		wait.Wait()
		took := time.Since(began)
		due := 20 + 50*took.Seconds()
		t.Logf("%d passed and %d were refused in %s; %.0f were due", passed.Load(), refused.Load(), took.Round(time.Millisecond), due)
		if got := float64(passed.Load()); got > due+1 || got < due-10 {
			t.Errorf("%.0f requests passed in %s, want %.0f: a burst of 20 and 50 a second", got, took, due)
		}
	})
	t.Run("routers and middlewares of one policy share the count", func(t *testing.T) {
		for i, router := range []string{"shared", "shared2", "same", "shared"} {
			if a := g.ask(t, as("203.0.113.3", router)); a.status != 200 {
				t.Errorf("request %d, to %s, is answered %s, want 200", i+1, router, limitHeaders(a))
			}
		}
		g.want(t, "203.0.113.3", 429, "shared", "shared2", "same")
		g.want(t, "203.0.113.3", 200, "twin")
		g.want(t, "203.0.113.4", 200, "shared2")
	})
	t.Run("an IPv4 address and an IPv6 /64 count for one", func(t *testing.T) {
		wantSpent(t, as("203.0.113.5", "keys"), 200, 200, 429)
		wantSpent(t, as("203.0.113.6", "keys"), 200)
		wantSpent(t, as("2001:db8:5:1::1", "keys"), 200)
		wantSpent(t, as("2001:db8:5:1:ffff::2", "keys"), 200, 429)
		wantSpent(t, as("2001:db8:5:2::1", "keys"), 200)
	})
	t.Run("prefixes can be wider", func(t *testing.T) {
		wantSpent(t, as("203.0.113.7", "wide"), 200)
		wantSpent(t, as("203.0.113.8", "wide"), 200, 429)
		wantSpent(t, as("2001:db8:6:1::1", "wide"), 200)
		wantSpent(t, as("2001:db8:6:ff::1", "wide"), 200, 429)
		wantSpent(t, as("2001:db8:6:100::1", "wide"), 200)
	})
	t.Run("a header can be the key", func(t *testing.T) {
		a, b, none := as("203.0.113.9", "token"), as("203.0.113.10", "token"), as("203.0.113.11", "token")
		a.header = append(a.header, "X-Token: one")
		b.header = append(b.header, "x-token: one")
		wantSpent(t, a, 200)
		wantSpent(t, b, 200, 429)
		wantSpent(t, none, 200, 200, 429)
		b.header[1] = "X-Token: " + strings.Repeat("long", 1000)
		wantSpent(t, b, 200, 200, 429)
	})
	t.Run("exempt addresses are not counted", func(t *testing.T) {
		wantSpent(t, as("203.0.113.15", "exempt"), 200, 200, 200)
		wantSpent(t, as("2001:db8:e:1::1", "exempt"), 200, 200, 200)
		wantSpent(t, as("203.0.113.16", "exempt"), 200, 429)
	})
	t.Run("headers can be hidden, all but Retry-After", func(t *testing.T) {
		said := []string{limitHeaders(g.ask(t, as("203.0.113.17", "quiet"))), limitHeaders(g.ask(t, as("203.0.113.17", "quiet")))}
		if diff := cmp.Diff([]string{"200 |  |  | ", "429 |  |  | 3600"}, said); diff != "" {
			t.Errorf("status, policy, limit and Retry-After (- want, + got):\n%s", diff)
		}
	})
	t.Run("each limit counts the requests it is for", func(t *testing.T) {
		login := as("203.0.113.18", "several")
		login.method, login.path = http.MethodPost, "/login/now?x=1"
		var said []string
		for _, r := range []request{login, login, as("203.0.113.18", "several"), {to: "several", header: login.header, method: "POST", path: "/loginx"}} {
			said = append(said, limitHeaders(g.ask(t, r)))
		}
		if diff := cmp.Diff([]string{
			`200 | "all";q=5;w=18000, "sign in";q=1;w=3600 | "all";r=4;t=3600, "sign in";r=0;t=3600 | `,
			`429 | "sign in";q=1;w=3600 | "sign in";r=0;t=3600 | 3600`,
			`200 | "all";q=5;w=18000 | "all";r=2;t=3600 | `,
			`200 | "all";q=5;w=18000 | "all";r=1;t=3600 | `,
		}, said); diff != "" {
			t.Errorf("status, policy, limit and Retry-After (- want, + got):\n%s", diff)
		}
	})
	t.Run("hosts match by name and below a domain", func(t *testing.T) {
		wantSpent(t, as("203.0.113.19", "hosts"), 200, 429)
		wantSpent(t, as("203.0.113.20", "a.deep"), 200, 429)
		wantSpent(t, as("203.0.113.19", "other"), 200, 200)
	})
	t.Run("a flood from one /48 is held together", func(t *testing.T) {
		passed := 0
		for i := range 400 {
			if g.status(t, fmt.Sprintf("2001:db8:f:%x::1", i), "flood") == 200 {
				passed++
			}
		}
		if passed >= 300 {
			t.Errorf("of 400 /64s in one /48 %d passed, want them to share a bucket before that", passed)
		}
		g.want(t, "2001:db8:a:1::1", 200, "flood")
	})
	t.Run("observing refuses nobody and says nothing to clients", func(t *testing.T) {
		for range 3 {
			if got := limitHeaders(g.ask(t, as("203.0.113.21", "watch"))); got != "200 |  |  | " {
				t.Errorf("status, policy, limit and Retry-After are %s, want 200 alone", got)
			}
		}
	})
	t.Run("counts survive a reload", func(t *testing.T) {
		wantSpent(t, as("203.0.113.22", "twin"), 200, 200, 200)
		conf.others = map[string]object{"mark": {"headers": object{"customResponseHeaders": object{"X-Mark": "1"}}}}
		conf.routers["twin"] = []string{"mark", "twin"}
		conf.plugins["twin"]["log"] = object{"level": "debug"}
		g.serve(t, conf)
		if a := g.ask(t, as("203.0.113.22", "twin")); a.status != 200 || a.header.Get("X-Mark") != "1" {
			t.Fatalf("answer is %d with X-Mark %q, want 200 with 1, from the new configuration", a.status, a.header.Get("X-Mark"))
		}
		g.want(t, "203.0.113.22", 429, "twin")
		g.want(t, "203.0.113.3", 429, "shared", "same")
	})
	t.Run("another burst is another policy", func(t *testing.T) {
		conf.plugins["twin"]["rateLimits"] = []object{slow("twin", 5, nil)}
		g.serve(t, conf)
		wantSpent(t, as("203.0.113.22", "twin"), 200, 200, 200, 200, 200, 429)
	})
}

package plugin

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/edgeward/edgeward/internal/decision"
)

// lapiStub serves the decision stream from a list that the test changes.
type lapiStub struct {
	*httptest.Server
	mu      sync.Mutex
	rows    []string
	deleted []int
	keys    []string
	full    int
	fail    bool
}

// startLAPI starts one, and ends the engines of earlier tests, of which a new one
// would take the table over.
func startLAPI(rows ...string) *lapiStub {
	engines.mu.Lock()
	for id, e := range engines.all {
		e.stop()
		delete(engines.all, id)
	}
	engines.mu.Unlock()
	s := &lapiStub{rows: rows}
	s.Server = httptest.NewServer(http.HandlerFunc(s.serve))
	return s
}

func (s *lapiStub) serve(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys = append(s.keys, r.Header.Get("X-Api-Key"))
	if s.fail {
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	if r.URL.Query().Get("startup") == "true" {
		s.full++
	}
	deleted := []string{}
	for _, id := range s.deleted {
		deleted = append(deleted, fmt.Sprintf(`{"id":%d}`, id))
	}
	_, _ = fmt.Fprintf(w, `{"new":[%s],"deleted":[%s]}`, strings.Join(s.rows, ","), strings.Join(deleted, ","))
}

func (s *lapiStub) set(fail bool, rows ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail = fail
	s.rows = rows
}

func (s *lapiStub) pulls() (all, full int, lastKey string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.keys) > 0 {
		lastKey = s.keys[len(s.keys)-1]
	}
	return len(s.keys), s.full, lastKey
}

func decisionRow(id int, value, typ, origin string) string {
	scope := "Ip"
	if strings.Contains(value, "/") {
		scope = "Range"
	}
	return fmt.Sprintf(`{"id":%d,"scope":%q,"value":%q,"type":%q,"origin":%q,"scenario":"test/%s","duration":"1h0m0s"}`, id, scope, value, typ, origin, origin)
}

// forgetLimits makes a test repeatable in one process.
func forgetLimits() {
	limiters.mu.Lock()
	limiters.all = map[limitPolicy]*limiter{}
	limiters.mu.Unlock()
}

// passed is the handler behind the middleware.
var passed = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusTeapot) })

// site is a middleware under test.
type site struct {
	t      *testing.T
	h      http.Handler
	cancel context.CancelFunc
}

func open(t *testing.T, config *Config) *site {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	h, err := New(ctx, passed, config, "edgeward@test")
	if err != nil {
		t.Fatal(err)
	}
	return &site{t, h, cancel}
}

func (s *site) get(addr string, edit func(*http.Request)) *httptest.ResponseRecorder {
	req := httptest.NewRequest(http.MethodGet, "http://site.example/path?query", nil)
	req.RemoteAddr = addr + ":4711"
	if strings.Contains(addr, ":") {
		req.RemoteAddr = "[" + addr + "]:4711"
	}
	if edit != nil {
		edit(req)
	}
	rec := httptest.NewRecorder()
	s.h.ServeHTTP(rec, req)
	return rec
}

// becomes waits until requests from addr get the status.
func (s *site) becomes(addr string, status int) {
	s.t.Helper()
	got := 0
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if got = s.get(addr, nil).Code; got == status {
			return
		}
	}
	s.t.Fatalf("%s gets %d, and never %d", addr, got, status)
}

func (s *site) is(addr string, status int) {
	s.t.Helper()
	if got := s.get(addr, nil).Code; got != status {
		s.t.Errorf("%s gets %d, want %d", addr, got, status)
	}
}

func pulling(s *lapiStub, key string) *Config {
	c := CreateConfig()
	c.LAPI.URL = s.URL
	c.LAPI.Key = key
	c.LAPI.Interval = "1s"
	c.Log.Level = "error"
	return c
}

func TestDecisions(t *testing.T) {
	lapi := startLAPI(
		decisionRow(1, "192.0.2.1", "ban", "crowdsec"),
		decisionRow(2, "198.51.100.0/24", "ban", "CAPI"),
		decisionRow(3, "2001:db8::/32", "ban", "crowdsec"),
		decisionRow(4, "192.0.2.4", "captcha", "crowdsec"),
		decisionRow(5, "192.0.2.5", "odd", "crowdsec"),
		decisionRow(6, "192.0.2.6", "ban", "lists:tor"),
	)
	defer lapi.Close()
	s := open(t, pulling(lapi, "decisions"))
	s.becomes("192.0.2.1", 403)
	for addr, want := range map[string]int{
		"192.0.2.2": 418, "198.51.100.255": 403, "198.51.101.0": 418, "2001:db8::1": 403, "2001:db9::1": 418,
		"::ffff:192.0.2.1": 403, "192.0.2.4": 403, "192.0.2.5": 403, "192.0.2.6": 403, "fe80::1%eth0": 418,
	} {
		s.is(addr, want)
	}

	// Other middlewares see the same decisions their own way, at once.
	only := pulling(lapi, "decisions")
	only.Decisions.Origins = []string{"capi", "lists"}
	only.Decisions.Fallback = "ignore"
	narrow := open(t, only)
	narrow.is("192.0.2.1", 418)
	narrow.is("198.51.100.1", 403)
	narrow.is("192.0.2.6", 403)
	ignoring := pulling(lapi, "decisions")
	ignoring.Decisions.Fallback = "ignore"
	ignoring.Decisions.ExceptScenarios = []string{"/CAPI"}
	ignoring.Decisions.Allow = []string{"192.0.2.1", "2001:db8:1::/48"}
	lax := open(t, ignoring)
	lax.is("192.0.2.5", 418)
	lax.is("198.51.100.1", 418)
	lax.is("192.0.2.1", 418)
	lax.is("2001:db8:1::1", 418)
	lax.is("2001:db8:2::1", 403)
	if _, full, key := lapi.pulls(); full != 1 || key != "decisions" {
		t.Errorf("three middlewares made %d full pulls, with key %q", full, key)
	}
}

func TestBehindAProxy(t *testing.T) {
	lapi := startLAPI(decisionRow(1, "192.0.2.1", "ban", "crowdsec"), decisionRow(2, "10.0.0.1", "ban", "crowdsec"))
	defer lapi.Close()
	config := pulling(lapi, "proxy")
	config.Client.TrustedProxies = []string{"10.0.0.0/8"}
	s := open(t, config)
	forwarded := func(text string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Set("X-Forwarded-For", text) }
	}
	s.becomes("10.0.0.1", 403)
	if got := s.get("10.0.0.1", forwarded("192.0.2.1")).Code; got != 403 {
		t.Errorf("a banned client behind a proxy gets %d", got)
	}
	if got := s.get("10.0.0.1", forwarded("192.0.2.1, 192.0.2.2")).Code; got != 418 {
		t.Errorf("a client that claims a banned address gets %d", got)
	}
	if got := s.get("192.0.2.1", forwarded("192.0.2.2")).Code; got != 403 {
		t.Errorf("a banned client that claims another address gets %d", got)
	}
}

func TestRefusalsFollowAccept(t *testing.T) {
	lapi := startLAPI(decisionRow(77, "192.0.2.1", "ban", "crowdsec"))
	defer lapi.Close()
	file := filepath.Join(t.TempDir(), "page.html")
	if err := os.WriteFile(file, []byte(`<p>{{.Status}} {{.Address}} {{.Decision}}</p>`), 0o600); err != nil {
		t.Fatal(err)
	}
	config := pulling(lapi, "refusals")
	config.Ban.Status = 451
	config.Ban.PageFile = file
	s := open(t, config)
	s.becomes("192.0.2.1", 451)
	for _, c := range []struct{ accept, contentType, contains string }{
		{"", "text/plain; charset=utf-8", "decision 77"},
		{"*/*", "text/plain; charset=utf-8", "decision 77"},
		{"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "text/html; charset=utf-8", "<p>451 192.0.2.1 77</p>"},
		{"application/json", "application/problem+json", `"decision":77`},
		{"application/problem+json", "application/problem+json", `"status":451`},
		{"text/html;q=0.5, application/json", "application/problem+json", `"status":451`},
		{"text/html;q=0, text/plain", "text/plain; charset=utf-8", "blocked"},
		{"image/png", "text/plain; charset=utf-8", "blocked"},
		{"text/html;q=banana", "text/plain; charset=utf-8", "blocked"},
	} {
		accept := c.accept
		rec := s.get("192.0.2.1", func(r *http.Request) { r.Header.Set("Accept", accept) })
		if got := rec.Header().Get("Content-Type"); got != c.contentType || !strings.Contains(rec.Body.String(), c.contains) {
			t.Errorf("Accept %q: %s %q", c.accept, got, rec.Body.String())
		}
		if rec.Header().Get("Cache-Control") != "no-store" || rec.Header().Get("Content-Length") != strconv.Itoa(rec.Body.Len()) {
			t.Errorf("Accept %q: headers %v", c.accept, rec.Header())
		}
		if strings.Contains(c.contentType, "json") && !json.Valid(rec.Body.Bytes()) {
			t.Errorf("Accept %q: not JSON: %q", c.accept, rec.Body.String())
		}
		if strings.Contains(rec.Body.String(), "crowdsec") {
			t.Errorf("Accept %q: the origin is told to the client", c.accept)
		}
	}
	if rec := s.get("192.0.2.1", func(r *http.Request) { r.Method = http.MethodHead }); rec.Code != 451 || rec.Body.Len() != 0 {
		t.Errorf("HEAD: %d %q", rec.Code, rec.Body.String())
	}
}

func TestAPageThatCannotBeUsed(t *testing.T) {
	dir := t.TempDir()
	broken := filepath.Join(dir, "broken.html")
	if err := os.WriteFile(broken, []byte(`{{.Nonsense}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{filepath.Join(dir, "missing.html"), broken} {
		log := &bytes.Buffer{}
		html := page(file, slog.New(slog.NewJSONHandler(log, nil)))
		rec := httptest.NewRecorder()
		req := httptest.NewRequest(http.MethodGet, "/", nil)
		req.Header.Set("Accept", "text/html")
		answer(rec, req, refusal{Status: 403, Reason: "No <b>.", Address: "192.0.2.1"}, html)
		if !strings.Contains(rec.Body.String(), "No &lt;b&gt;.") || !strings.Contains(log.String(), "cannot use ban.pageFile") {
			t.Errorf("%s: page %q, log %q", file, rec.Body.String(), log.String())
		}
	}
}

func TestObserveRefusesNothing(t *testing.T) {
	forgetLimits()
	lapi := startLAPI(decisionRow(1, "192.0.2.1", "ban", "crowdsec"), decisionRow(2, "192.0.2.2", "throttle", "crowdsec"))
	defer lapi.Close()
	enforcing := open(t, pulling(lapi, "observe"))
	enforcing.becomes("192.0.2.1", 403)
	config := pulling(lapi, "observe")
	config.Mode = "observe"
	config.RateLimits = []RateLimitConfig{{Name: "observed", Average: 1, Period: "1h"}}
	config.Decisions.FailClosed = true
	config.Decisions.MaxAge = "2s"
	s := open(t, config)
	log := &bytes.Buffer{}
	s.h.(*handler).log = newBlockLog(slog.New(slog.NewJSONHandler(log, nil)), "edgeward@test", true)
	s.h.(*handler).log.pace = &linePace{}
	for i := 0; i < 3; i++ {
		rec := s.get("192.0.2.1", nil)
		if rec.Code != 418 || len(rec.Header()) != 0 {
			t.Fatalf("an observer answered %d with %v", rec.Code, rec.Header())
		}
	}
	for _, want := range []string{`"msg":"request would be refused"`, `"reason":"decision"`, `"decision":1`, `"origin":"crowdsec"`, `"scenario":"test/crowdsec"`, `"address":"192.0.2.1"`, `"reason":"rate limit"`, `"limit":"observed"`, `"host":"site.example"`, `"path":"/path"`} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log has no %s:\n%s", want, log.String())
		}
	}
	if strings.Contains(log.String(), "query") {
		t.Error("the query is in the log")
	}
}

func TestFailClosedAndOpen(t *testing.T) {
	lapi := startLAPI(decisionRow(1, "192.0.2.1", "ban", "crowdsec"))
	defer lapi.Close()
	lapi.set(true)
	config := pulling(lapi, "closed")
	config.Decisions.FailClosed = true
	config.Decisions.MaxAge = "2s"
	config.Decisions.Allow = []string{"192.0.2.9"}
	closed := open(t, config)
	opened := open(t, pulling(lapi, "closed"))
	closed.is("192.0.2.2", 503)
	closed.is("192.0.2.9", 418)
	opened.is("192.0.2.2", 418)
	lapi.set(false, decisionRow(1, "192.0.2.1", "ban", "crowdsec"))
	closed.becomes("192.0.2.2", 418)
	closed.is("192.0.2.1", 403)
	lapi.set(true)
	closed.becomes("192.0.2.2", 503)
	closed.is("192.0.2.1", 403)
	opened.is("192.0.2.2", 418)
	opened.is("192.0.2.1", 403)
}

func TestThrottleDecisions(t *testing.T) {
	forgetLimits()
	lapi := startLAPI(decisionRow(1, "192.0.2.1", "throttle", "crowdsec"), decisionRow(2, "192.0.2.2", "ban", "crowdsec"))
	defer lapi.Close()
	s := open(t, pulling(lapi, "throttle"))
	s.becomes("192.0.2.2", 403)
	refused := 0
	for i := 0; i < 15; i++ {
		rec := s.get("192.0.2.1", nil)
		if rec.Code == 429 {
			refused++
			if rec.Header().Get("Retry-After") == "" {
				t.Error("a throttled client is not told when to come back")
			}
		}
	}
	if refused != 5 {
		t.Errorf("%d of 15 requests were refused, want 5", refused)
	}
	s.is("192.0.2.3", 418)
}

func TestRateLimits(t *testing.T) {
	forgetLimits()
	config := CreateConfig()
	config.Log.Level = "error"
	config.RateLimits = []RateLimitConfig{
		{Name: "login", Average: 1, Period: "1h", Burst: 2, Match: MatchConfig{PathPrefixes: []string{"/login"}, Methods: []string{"POST"}, Hosts: []string{"site.example", "*.shop.example"}}},
		{Name: "all", Average: 1, Period: "1h", Burst: 5, Exempt: []string{"192.0.2.99"}},
	}
	s := open(t, config)
	login := func(r *http.Request) {
		r.Method = http.MethodPost
		r.URL.Path = "/login/form"
		r.Host = "a.SHOP.example.:443"
	}
	for i, want := range []struct {
		code            int
		policies, limit string
	}{
		{418, `"login";q=2;w=7200, "all";q=5;w=18000`, `"login";r=1;t=3600, "all";r=4;t=3600`},
		{418, `"login";q=2;w=7200, "all";q=5;w=18000`, `"login";r=0;t=3600, "all";r=3;t=3600`},
		{429, `"login";q=2;w=7200`, `"login";r=0;t=3600`},
	} {
		rec := s.get("192.0.2.1", login)
		if rec.Code != want.code || rec.Header().Get("RateLimit-Policy") != want.policies || rec.Header().Get("RateLimit") != want.limit {
			t.Errorf("login %d: %d, %v", i, rec.Code, rec.Header())
		}
		if (rec.Code == 429) != (rec.Header().Get("Retry-After") == "3600") {
			t.Errorf("login %d: %d with Retry-After %q", i, rec.Code, rec.Header().Get("Retry-After"))
		}
	}
	for _, edit := range []func(r *http.Request){
		func(r *http.Request) { r.URL.Path = "/loginx"; r.Method = http.MethodPost },
		func(r *http.Request) { r.URL.Path = "/login" },
		func(r *http.Request) { r.URL.Path = "/login"; r.Method = http.MethodPost; r.Host = "shop.example" },
	} {
		if rec := s.get("192.0.2.1", edit); rec.Code != 418 || strings.Contains(rec.Header().Get("RateLimit"), "login") {
			t.Errorf("a request that is no login is counted as one: %d %v", rec.Code, rec.Header())
		}
	}
	for _, path := range []string{"/LOGIN", "/x/../login", "//login", "/./login/a", "/login;x=1", "/\\login", "/a;b/../login"} {
		r := httptest.NewRequest("pOsT", "http://site.example/", nil)
		r.URL.Path = path
		if !limitApplies(&s.h.(*handler).limits[0].rule, r, []byte{192, 0, 2, 1}) {
			t.Errorf("%s is a way round the limit", path)
		}
	}
	for _, path := range []string{"/", "/x/../log;in", "/loginx", "/x/login"} {
		r := httptest.NewRequest("POST", "http://site.example/", nil)
		r.URL.Path = path
		if limitApplies(&s.h.(*handler).limits[0].rule, r, []byte{192, 0, 2, 1}) {
			t.Errorf("%s is taken for a login", path)
		}
	}
	s.is("192.0.2.1", 429) // the sixth for all
	s.is("192.0.2.2", 418)
	for i := 0; i < 20; i++ {
		s.is("192.0.2.99", 418)
	}

	// Another router with the same policy goes on counting; one with other
	// settings begins anew.
	again := open(t, config)
	again.is("192.0.2.1", 429)
	other := *config
	other.RateLimits = append([]RateLimitConfig(nil), config.RateLimits...)
	other.RateLimits[1].Burst = 6
	open(t, &other).is("192.0.2.1", 418)
}

func TestRateLimitKeys(t *testing.T) {
	forgetLimits()
	config := CreateConfig()
	config.Log.Level = "error"
	config.RateLimits = []RateLimitConfig{{Name: "keys", Average: 1, Period: "1h", Burst: 1, Key: KeyConfig{Header: "x-api-key", IPv4Prefix: 24, IPv6Prefix: 56}, HideHeaders: true}}
	s := open(t, config)
	key := func(k string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Set("X-Api-Key", k) }
	}
	for i, c := range []struct {
		addr string
		edit func(*http.Request)
		want int
	}{
		{"192.0.2.1", nil, 418},
		{"192.0.2.200", nil, 429},
		{"192.0.3.1", nil, 418},
		{"2001:db8:0:aa00::1", nil, 418},
		{"2001:db8:0:aaff::1", nil, 429},
		{"2001:db8:0:ab00::1", nil, 418},
		{"192.0.2.1", key("one"), 418},
		{"198.51.100.1", key("one"), 429},
		{"192.0.2.1", key("two"), 418},
		{"192.0.2.1", key(strings.Repeat("x", 5000)), 418},
		{"192.0.2.1", key(strings.Repeat("x", 5000)), 429},
		{"192.0.2.1", key(strings.Repeat("x", 4999) + "y"), 418},
	} {
		rec := s.get(c.addr, c.edit)
		if rec.Code != c.want || rec.Header().Get("RateLimit") != "" {
			t.Errorf("request %d: %d, want %d (%v)", i, rec.Code, c.want, rec.Header())
		}
	}
}

func TestTheShortWayCountsLikeTheLongOne(t *testing.T) {
	forgetLimits()
	for _, extra := range []bool{false, true} {
		config := CreateConfig()
		config.Log.Level = "error"
		config.RateLimits = []RateLimitConfig{{Name: fmt.Sprintf("short%v", extra), Average: 1, Period: "1h", Burst: 3}}
		if extra {
			config.RateLimits = append(config.RateLimits, RateLimitConfig{Name: "never", Average: 1, Match: MatchConfig{Methods: []string{"TRACE"}}})
		}
		s := open(t, config)
		if _, short := s.h.(*limited); short == extra {
			t.Fatalf("with another limit %v: %T", extra, s.h)
		}
		for _, addr := range []string{"192.0.2.1", "2001:db8::1"} {
			for i, want := range []int{418, 418, 418, 429} {
				rec := s.get(addr, nil)
				if rec.Code != want || i < 3 && !strings.HasSuffix(rec.Header().Get("RateLimit"), fmt.Sprintf(";r=%d;t=3600", 2-i)) {
					t.Errorf("with another limit %v, %s, request %d: %d %v", extra, addr, i, rec.Code, rec.Header())
				}
			}
		}
	}
}

// TestTheShortWaysJudgeLikeTheLongOne sends the same requests to a middleware
// and to the handler behind its short way.
func TestTheShortWaysJudgeLikeTheLongOne(t *testing.T) {
	lapi := startLAPI(decisionRow(1, "192.0.2.1", "ban", "crowdsec"), decisionRow(2, "10.0.0.66", "ban", "crowdsec"), decisionRow(3, "2001:db8::/64", "ban", "crowdsec"))
	defer lapi.Close()
	for _, header := range []string{"", "X-Forwarded-For", "CF-Connecting-IP"} {
		config := pulling(lapi, "short")
		if header != "" {
			config.Client.TrustedProxies = []string{"10.0.0.0/8", "fd00::/8"}
			config.Client.Header = header
		} else {
			header = "X-Forwarded-For"
		}
		s := open(t, config)
		var long *handler
		if h, ok := s.h.(*direct); ok {
			long = h.all
		} else if h, ok := s.h.(*proxied); ok {
			long = h.all
		}
		if long == nil {
			t.Fatalf("%T is no short way", s.h)
		}
		s.becomes("192.0.2.1", 403)
		peers := []string{"192.0.2.1", "192.0.2.2", "10.0.0.1", "10.0.0.66", "fd00::1", "2001:db8::1", "2001:db8:1::1", "::ffff:10.0.0.1", "::ffff:192.0.2.1"}
		values := [][]string{nil, {""}, {"192.0.2.1"}, {"192.0.2.2"}, {" 192.0.2.1"}, {"192.0.2.1:80"}, {"192.0.2.1, 10.0.0.2"}, {"10.0.0.66"}, {"junk"},
			{"2001:db8::1"}, {"::ffff:192.0.2.1"}, {"192.0.2.2", "192.0.2.1"}, {"192.0.2.1", "192.0.2.2"}, {"fe80::1%eth0"}}
		for _, peer := range peers {
			for _, value := range values {
				sent, name := value, canonical(header)
				edit := func(r *http.Request) { r.Header[name] = sent }
				first := s.get(peer, edit)
				short := s.get(peer, edit)
				whole := (&site{t: t, h: long}).get(peer, edit)
				if first.Code != short.Code {
					t.Errorf("%s with %s %q: %d at first and then %d", peer, header, value, first.Code, short.Code)
				}
				if short.Code != whole.Code || short.Body.String() != whole.Body.String() {
					t.Errorf("%s with %s %q: %d by the short way, %d by the long one", peer, header, value, short.Code, whole.Code)
				}
			}
		}
	}
}

func TestWhoWasFreeIsJudgedAgainUnderANewTable(t *testing.T) {
	lapi := startLAPI(decisionRow(1, "192.0.2.1", "ban", "crowdsec"))
	defer lapi.Close()
	limits := pulling(lapi, "again")
	limits.RateLimits = []RateLimitConfig{{Name: "again", Average: 1000}}
	behind := pulling(lapi, "again")
	behind.Client.TrustedProxies = []string{"10.0.0.1"}
	plain, limited, proxied := open(t, pulling(lapi, "again")), open(t, limits), open(t, behind)
	plain.becomes("192.0.2.1", 403)
	from := func(r *http.Request) { r.Header.Set("X-Forwarded-For", "192.0.2.7") }
	for i := 0; i < 3; i++ {
		plain.is("192.0.2.7", 418)
		limited.is("192.0.2.7", 418)
		if code := proxied.get("10.0.0.1", from).Code; code != 418 {
			t.Fatalf("behind a proxy: %d", code)
		}
	}
	lapi.set(false, decisionRow(1, "192.0.2.1", "ban", "crowdsec"), decisionRow(2, "192.0.2.0/29", "ban", "crowdsec"))
	plain.becomes("192.0.2.7", 403)
	limited.is("192.0.2.7", 403)
	if code := proxied.get("10.0.0.1", from).Code; code != 403 {
		t.Errorf("behind a proxy: %d", code)
	}
}

func TestWhoWasFreeIsRememberedWithinBounds(t *testing.T) {
	config := CreateConfig()
	config.RateLimits = []RateLimitConfig{{Name: "remembered", Average: 1}}
	s := open(t, config)
	place := s.h.(*limited).sight
	for i := 0; i < maxTexts+100; i++ {
		note(place, place.Load().(*sight), strconv.Itoa(i), []byte{1, 2, 3, 4})
	}
	if n := place.Load().(*sight).free.n.Load(); n > 200 {
		t.Errorf("%d texts are remembered after the bound was passed", n)
	}
	note(place, place.Load().(*sight), strings.Repeat("x", 500), []byte{1, 2, 3, 4})
	if _, ok := place.Load().(*sight).free.octets.Load(strings.Repeat("x", 500)); ok {
		t.Error("a long text is remembered")
	}
}

func TestReloadsShareOneEngine(t *testing.T) {
	lapi := startLAPI(decisionRow(1, "192.0.2.1", "ban", "crowdsec"))
	defer lapi.Close()
	config := pulling(lapi, "reloads")
	s := open(t, config)
	s.becomes("192.0.2.1", 403)
	for i := 0; i < 50; i++ {
		s.cancel()
		s = open(t, config)
		s.is("192.0.2.1", 403)
	}
	if _, full, _ := lapi.pulls(); full != 1 {
		t.Errorf("50 reloads made %d full pulls", full)
	}
}

func TestANewKeyKeepsTheTable(t *testing.T) {
	lapi := startLAPI(decisionRow(1, "192.0.2.1", "ban", "crowdsec"))
	defer lapi.Close()
	s := open(t, pulling(lapi, "old"))
	s.becomes("192.0.2.1", 403)
	s.cancel()
	lapi.set(true)
	s = open(t, pulling(lapi, "new"))
	s.is("192.0.2.1", 403)
	_, before, _ := lapi.pulls()
	lapi.set(false, decisionRow(2, "192.0.2.2", "ban", "crowdsec"))
	s.becomes("192.0.2.2", 403)
	if _, full, key := lapi.pulls(); key != "new" || full <= before {
		t.Errorf("pulled with key %q, %d full pulls", key, full-before)
	}
	// A first answer that lacks what was held is not believed at once.
	s.is("192.0.2.1", 403)
}

func TestAnotherAddressKeepsTheTable(t *testing.T) {
	lapi := startLAPI(decisionRow(1, "192.0.2.1", "ban", "crowdsec"))
	defer lapi.Close()
	s := open(t, pulling(lapi, "moves"))
	s.becomes("192.0.2.1", 403)
	other := startOther(lapi, "127.0.0.1:1")
	elsewhere := open(t, other)
	elsewhere.is("192.0.2.1", 418) // while the first LAPI is in use, it is another
	s.cancel()
	elsewhere.becomes("192.0.2.1", 403)
	other.Decisions.FailClosed = true
	closed := open(t, other)
	closed.is("192.0.2.1", 403)
	closed.is("192.0.2.2", 503)
}

// startOther returns a configuration for a LAPI elsewhere, with a key of its own.
func startOther(lapi *lapiStub, host string) *Config {
	c := pulling(lapi, "elsewhere")
	c.LAPI.URL = "http://" + host
	return c
}

// TestTheSameKeyUnderTwoNames: one key, given in two ways, means two engines that
// take deltas away from each other; both must know everything all the same.
func TestTheSameKeyUnderTwoNames(t *testing.T) {
	lapi := startLAPI(decisionRow(1, "192.0.2.1", "ban", "crowdsec"))
	defer lapi.Close()
	file := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, []byte("shared\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	byFile := pulling(lapi, "")
	byFile.LAPI.KeyFile = file
	a := open(t, pulling(lapi, "shared"))
	b := open(t, byFile)
	a.becomes("192.0.2.1", 403)
	b.becomes("192.0.2.1", 403)
	all, full, _ := lapi.pulls()
	time.Sleep(2500 * time.Millisecond)
	if all2, full2, _ := lapi.pulls(); full2-full < all2-all || all2-all < 3 {
		t.Errorf("of %d pulls, %d were full", all2-all, full2-full)
	}
	count := func() int {
		engines.mu.Lock()
		defer engines.mu.Unlock()
		return len(engines.all)
	}
	// One of them goes: it must not linger.
	a.cancel()
	for end := time.Now().Add(2 * time.Second); count() > 1 && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
	}
	if n := count(); n != 1 {
		t.Errorf("%d engines pull with one key", n)
	}
	b.is("192.0.2.1", 403)
}

// TestSettingsThatDiffer: two middlewares with one key and different intervals;
// reloads in any order must not restart the stream.
func TestSettingsThatDiffer(t *testing.T) {
	lapi := startLAPI(decisionRow(1, "192.0.2.1", "ban", "crowdsec"))
	defer lapi.Close()
	slow, quick := pulling(lapi, "differ"), pulling(lapi, "differ")
	slow.LAPI.Interval = "1h"
	a := open(t, slow)
	b := open(t, quick)
	a.becomes("192.0.2.1", 403)
	time.Sleep(settleTime + 300*time.Millisecond)
	_, before, _ := lapi.pulls()
	for i := 0; i < 4; i++ {
		a.cancel()
		b.cancel()
		if i%2 == 0 {
			b = open(t, quick)
			a = open(t, slow)
		} else {
			a = open(t, slow)
			b = open(t, quick)
		}
		time.Sleep(settleTime + 100*time.Millisecond)
	}
	if _, full, _ := lapi.pulls(); full != before {
		t.Errorf("four reloads made %d full pulls", full-before)
	}
	a.is("192.0.2.1", 403)
	b.is("192.0.2.1", 403)
}

// TestARestartForgetsNothing: after a change of settings an empty answer is as
// hard to believe as before.
func TestARestartForgetsNothing(t *testing.T) {
	lapi := startLAPI(decisionRow(1, "192.0.2.1", "ban", "crowdsec"))
	defer lapi.Close()
	config := pulling(lapi, "restart")
	config.LAPI.Interval = "1h"
	s := open(t, config)
	s.becomes("192.0.2.1", 403)
	s.cancel()
	lapi.set(false)
	s = open(t, pulling(lapi, "restart"))
	for end := time.Now().Add(settleTime + 1500*time.Millisecond); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if s.get("192.0.2.1", nil).Code != 403 {
			t.Fatal("an empty answer after a restart of the stream lifted a ban")
		}
	}
	if _, full, _ := lapi.pulls(); full < 2 {
		t.Errorf("%d full pulls: the new interval did not take effect", full)
	}
}

// TestClosedMeansClosed: a banned client may be told that nothing is known yet,
// and then that it is banned, and nothing else in between.
func TestClosedMeansClosed(t *testing.T) {
	rows := []string{decisionRow(1, "192.0.2.1", "ban", "crowdsec")}
	for i := 0; i < 3000; i++ {
		rows = append(rows, decisionRow(i+2, fmt.Sprintf("10.%d.%d.1", i/250, i%250), "ban", "lists"))
	}
	lapi := startLAPI(rows...)
	defer lapi.Close()
	config := pulling(lapi, "closed means closed")
	config.Decisions.FailClosed = true
	s := open(t, config)
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); {
		code := s.get("192.0.2.1", nil).Code
		if code == 403 {
			return
		}
		if code != 503 {
			t.Fatalf("a banned client got %d", code)
		}
	}
	t.Fatal("the ban never came")
}

func TestARedirectIsNotFollowed(t *testing.T) {
	followed := false
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { followed = true }))
	defer elsewhere.Close()
	redirecting := httptest.NewServer(http.RedirectHandler(elsewhere.URL, http.StatusFound))
	defer redirecting.Close()
	client, authorize := connect(source{url: redirecting.URL, key: "secret", timeout: time.Second}, func(string) {})
	req, err := http.NewRequest(http.MethodGet, redirecting.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := authorize(req); err != nil {
		t.Fatal(err)
	}
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	if res.StatusCode != http.StatusFound || followed {
		t.Errorf("status %d, followed %v", res.StatusCode, followed)
	}
}

func TestNewSettingsRestartTheStreamOnly(t *testing.T) {
	lapi := startLAPI(decisionRow(1, "192.0.2.1", "ban", "crowdsec"))
	defer lapi.Close()
	config := pulling(lapi, "settings")
	config.LAPI.Interval = "1h"
	s := open(t, config)
	s.becomes("192.0.2.1", 403)
	lapi.set(false, decisionRow(1, "192.0.2.1", "ban", "crowdsec"), decisionRow(2, "192.0.2.2", "ban", "crowdsec"))
	config = pulling(lapi, "settings")
	s2 := open(t, config)
	s2.is("192.0.2.1", 403)
	s2.becomes("192.0.2.2", 403)
	s.is("192.0.2.2", 403)
}

func TestAnEngineEndsAfterItsLinger(t *testing.T) {
	lapi := startLAPI()
	defer lapi.Close()
	registry := &engineRegistry{all: map[string]*engine{}, linger: 50 * time.Millisecond}
	src := source{url: lapi.URL, key: "linger", interval: 10 * time.Millisecond, timeout: time.Second, resync: time.Hour}
	log := slog.New(slog.NewTextHandler(&bytes.Buffer{}, nil))
	e := registry.acquire(src, log)
	if again := registry.acquire(src, log); again != e {
		t.Fatal("two engines for one source")
	}
	registry.release(e, src)
	registry.release(e, src)
	if again := registry.acquire(src, log); again != e {
		t.Fatal("the engine did not wait for the next user")
	}
	registry.release(e, src)
	ended := func() bool {
		registry.mu.Lock()
		defer registry.mu.Unlock()
		return len(registry.all) == 0
	}
	for end := time.Now().Add(3 * time.Second); !ended() && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
	}
	if !ended() {
		t.Fatal("the engine never ended")
	}
	time.Sleep(50 * time.Millisecond)
	before, _, _ := lapi.pulls()
	time.Sleep(100 * time.Millisecond)
	if after, _, _ := lapi.pulls(); after != before {
		t.Errorf("an ended engine pulled %d times", after-before)
	}
}

func TestAKeyFileIsReadForEachPull(t *testing.T) {
	lapi := startLAPI()
	defer lapi.Close()
	file := filepath.Join(t.TempDir(), "key")
	config := pulling(lapi, "")
	config.LAPI.KeyFile = file
	open(t, config) // the file is not there yet: no error
	if err := os.WriteFile(file, []byte("first\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	wait := func(want string) {
		t.Helper()
		for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
			if _, _, key := lapi.pulls(); key == want {
				return
			}
		}
		t.Fatalf("the key never became %q", want)
	}
	wait("first")
	if err := os.WriteFile(file, []byte("second"), 0o600); err != nil {
		t.Fatal(err)
	}
	wait("second")
}

func TestTheBlockLogIsBounded(t *testing.T) {
	out := &bytes.Buffer{}
	b := newBlockLog(slog.New(slog.NewJSONHandler(out, nil)), "m", false)
	b.pace = &linePace{}
	req := httptest.NewRequest(http.MethodGet, "http://h.example/"+strings.Repeat("a", 500), nil)
	for i := 0; i < 1000; i++ {
		b.block(req, refusal{Status: 403, Address: "192.0.2.1", slug: "decision"}, decision.Verdict{})
	}
	lines := strings.Count(out.String(), "\n")
	if lines > 3*linesPerSecond || lines < 1 {
		t.Errorf("1,000 refusals made %d lines", lines)
	}
	b.tell()
	if !strings.Contains(out.String(), `"total":1000`) || !strings.Contains(out.String(), "more refusals than are logged") {
		t.Error("what was left out was never told")
	}
	if strings.Contains(out.String(), strings.Repeat("a", 300)) {
		t.Error("a long path is logged in full")
	}
}

func TestRefusalsAreCountedOverReloads(t *testing.T) {
	out := &bytes.Buffer{}
	log := slog.New(slog.NewJSONHandler(out, nil))
	req := httptest.NewRequest(http.MethodGet, "http://h.example/", nil)
	for i := 0; i < 3; i++ {
		b := newBlockLog(log, "reloaded@file", false)
		b.pace = &linePace{}
		b.block(req, refusal{Status: 403, slug: "decision"}, decision.Verdict{})
	}
	if !strings.Contains(out.String(), `"total":3`) {
		t.Errorf("three refusals over three loads of one middleware are counted as:\n%s", out.String())
	}
}

func TestAMiddlewareSaysOnceWhatItEnforces(t *testing.T) {
	out := &bytes.Buffer{}
	log := slog.New(slog.NewJSONHandler(out, nil))
	config := good()
	for _, c := range []struct {
		mode string
		want int
	}{{"enforce", 1}, {"enforce", 1}, {"observe", 2}, {"observe", 2}, {"enforce", 3}} {
		config.Mode = c.mode
		s, err := understand(config)
		if err != nil {
			t.Fatal(err)
		}
		announce(log, "announced@file", s)
		if n := strings.Count(out.String(), "middleware in force"); n != c.want {
			t.Errorf("after %s it was said %d times, want %d", c.mode, n, c.want)
		}
	}
	if strings.Contains(out.String(), config.LAPI.Key) {
		t.Error("the key is in the log")
	}
}

func TestAMissingFileIsNamedUnlessItMayBeASecret(t *testing.T) {
	for name, want := range map[string]string{
		"/tmp/edgeward/lapi-key": " /tmp/edgeward/lapi-key",
		"/nowhere/lapi-key":      "",
		"/lapi-key":              "",
		"s3cret/with/slashes":    "",
		"":                       "",
	} {
		if got := shownPath(name); got != want {
			t.Errorf("shownPath(%q) = %q, want %q", name, got, want)
		}
	}
}

func TestHostOf(t *testing.T) {
	for in, want := range map[string]string{"A.example": "a.example", "a.example:8080": "a.example", "a.example.": "a.example", "[::1]:80": "[::1]", "[::1]": "[::1]", "": ""} {
		if got := hostOf(in); got != want {
			t.Errorf("hostOf(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestLimitKeyCutsAtAnyLength(t *testing.T) {
	for _, c := range []struct {
		a, b  string
		bits4 int
		bits6 int
		same  bool
	}{
		{"192.0.2.1", "192.0.2.1", 32, 64, true},
		{"192.0.2.1", "192.0.2.2", 32, 64, false},
		{"192.0.2.1", "192.0.2.254", 24, 64, true},
		{"192.0.2.1", "192.0.2.127", 25, 64, true},
		{"192.0.2.1", "192.0.2.128", 25, 64, false},
		{"192.0.2.1", "192.0.3.1", 23, 64, true},
		{"192.0.2.1", "192.0.4.1", 23, 64, false},
		{"2001:db8::1", "2001:db8::2", 32, 128, false},
		{"2001:db8::1", "2001:db8:0:7f::2", 32, 57, true},
		{"2001:db8::1", "2001:db8:0:80::2", 32, 57, false},
		{"2001:db8::1", "2001:db8:0:ffff::2", 32, 48, true},
	} {
		a, _ := limitKey(netip.MustParseAddr(c.a).AsSlice(), c.bits4, c.bits6)
		b, _ := limitKey(netip.MustParseAddr(c.b).AsSlice(), c.bits4, c.bits6)
		if (a == b) != c.same {
			t.Errorf("%s and %s at /%d and /%d: %q, %q", c.a, c.b, c.bits4, c.bits6, a, b)
		}
	}
}

func TestPeersWithoutAnAddress(t *testing.T) {
	config := CreateConfig()
	config.Log.Level = "error"
	config.RateLimits = []RateLimitConfig{{Name: "odd peers", Average: 1, Period: "1h", Burst: 100, Key: KeyConfig{IPv6Prefix: 57}}}
	s := open(t, config)
	for _, remote := range []string{"", "@", "192.0.2.1", "banana:80", "[::1]", "[::1%lo]:80"} {
		peer := remote
		if rec := s.get("192.0.2.1", func(r *http.Request) { r.RemoteAddr = peer }); rec.Code != 418 {
			t.Errorf("RemoteAddr %q: %d", remote, rec.Code)
		}
	}
}

func TestNewNamesTheMiddleware(t *testing.T) {
	config := CreateConfig()
	config.Mode = "x"
	if _, err := New(context.Background(), passed, config, "edgeward@file"); err == nil || !strings.HasPrefix(err.Error(), "edgeward@file: mode") {
		t.Errorf("New: %v", err)
	}
}

package plugin

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"
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

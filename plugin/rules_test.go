package plugin

import (
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
)

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

package plugin

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"testing"
)

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

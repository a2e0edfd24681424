package e2e

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/edgeward/edgeward/test/rig"
)

// TestLog: every refusal is told with its reason, in either mode; observing
// tells and does nothing; a flood of refusals is not a flood of lines.
func TestLog(t *testing.T) {
	g := newGateway(t, rig.TraefikOptions{TrustForwarded: true})
	l := newLAPI(t, rig.LAPIOptions{})
	const banned, ranged, throttled, limited = "192.0.2.1", "198.51.100.7", "2001:db8::7", "203.0.113.1"
	began := time.Now()
	l.decide(t, rig.Decision{Value: banned, Duration: time.Hour, Scenario: "crowdsecurity/ssh-bf"})
	l.decide(t, rig.Decision{Value: "198.51.100.0/24", Type: "captcha", Duration: 2 * time.Hour, Scenario: "crowdsecurity/http-probing"})
	if err := l.Import(soon(t, time.Minute), []rig.Decision{{Value: throttled, Type: "throttle", Duration: time.Hour, Scenario: "slow down"}}); err != nil {
		t.Fatal(err)
	}
	config := func(mode string) object {
		return object{
			"mode": mode, "lapi": l.config(), "client": posing,
			"rateLimits": []object{{"name": mode, "average": 1, "period": "1h", "burst": 1, "exempt": []string{throttled}}},
		}
	}
	g.serve(t, site{
		plugins: map[string]object{"watch": config("observe"), "guard": config("enforce")},
		routers: map[string][]string{"watch2": {"watch"}},
	})
	g.becomes(t, throttled, "guard", 429, 2*promise+10*time.Second)
	time.Sleep(2 * time.Second) // the bound on lines counts by the second

	const path = "/some/path" // told apart from other requests by it
	told := map[string][]line{}
	for _, test := range []struct {
		router, message string
		statuses        map[string]int
	}{
		{"watch", "request would be refused", map[string]int{banned: 200, ranged: 200, throttled: 200, limited: 200}},
		{"guard", "request refused", map[string]int{banned: 403, ranged: 403, throttled: 429, limited: 429}},
	} {
		// A throttled client has some requests free, and soon has one again.
		g.becomes(t, throttled, "guard", 429, promise)
		for _, address := range []string{banned, ranged, throttled, limited} {
			if address == limited { // the second request is one too many
				g.want(t, limited, 200, test.router)
			}
			r := as(address, test.router)
			r.path = path + "?and=query"
			a := g.ask(t, r)
			if a.status != test.statuses[address] {
				t.Errorf("router %s answers %s with %d, want %d", test.router, address, a.status, test.statuses[address])
			}
			if test.router == "watch" && (a.header.Get("Retry-After") != "" || a.header.Get("RateLimit") != "" || a.header.Get("Cache-Control") != "") {
				t.Errorf("observing, the answer to %s has the headers %v, want only the origin's", address, a.header)
			}
		}
		for _, l := range g.lines(test.message) {
			if l["path"] == path {
				told[test.router] = append(told[test.router], l)
			}
		}
	}

	t.Run("each refusal is a line, real or not", func(t *testing.T) {
		ids := map[string]float64{}
		for _, value := range []string{banned, "198.51.100.0/24", throttled} {
			for _, id := range l.decisionIDs(t, value) {
				var n float64
				if err := unmarshal(id, &n); err != nil {
					t.Fatal(err)
				}
				ids[value] = n
			}
		}
		for router, mode := range map[string]string{"watch": "observe", "guard": "enforce"} {
			message := map[string]string{"observe": "request would be refused", "enforce": "request refused"}[mode]
			common := line{"level": "INFO", "msg": message, "component": "plugin", "layer": "ingress", "middleware": router + "@file",
				"method": "GET", "host": router + ".test", "path": path}
			line := func(more line) line {
				for k, v := range common {
					more[k] = v
				}
				return more
			}
			want := []map[string]any{
				line(map[string]any{"reason": "decision", "status": 403.0, "address": banned, "decision": ids[banned], "remediation": "ban", "type": "ban", "value": banned + "/32", "origin": "cscli", "scenario": "crowdsecurity/ssh-bf"}),
				line(map[string]any{"reason": "decision", "status": 403.0, "address": ranged, "decision": ids["198.51.100.0/24"], "remediation": "captcha", "type": "captcha", "value": "198.51.100.0/24", "origin": "cscli", "scenario": "crowdsecurity/http-probing"}),
				line(map[string]any{"reason": "throttle", "status": 429.0, "address": throttled, "decision": ids[throttled], "remediation": "throttle", "type": "throttle", "value": throttled + "/128", "origin": "cscli-import", "scenario": "slow down"}),
				line(map[string]any{"reason": "rate limit", "status": 429.0, "address": limited, "limit": mode}),
			}
			var got []map[string]any
			for _, l := range told[router] {
				got = append(got, l)
			}
			if diff := cmp.Diff(want, got, cmpopts.IgnoreMapEntries(func(k string, _ any) bool { return k == "time" || k == "until" || k == "total" })); diff != "" {
				t.Errorf("lines of %s (- want, + got):\n%s", router, diff)
			}
			if len(told[router]) == 0 {
				continue
			}
			until, err := time.Parse(time.RFC3339, told[router][0]["until"].(string))
			if off := until.Sub(began.Add(time.Hour)); err != nil || off < -2*time.Second || off > 5*time.Second {
				t.Errorf("the ban is told to end at %v, %s off (%v)", told[router][0]["until"], off, err)
			}
		}
	})

	t.Run("a flood of refusals is some lines that add up", func(t *testing.T) {
		const requests = 2000
		before := len(g.lines("request refused"))
		total := func() (n float64) {
			for _, l := range g.lines("request refused") {
				n = max(n, l["total"].(float64))
			}
			return n
		}
		had := total()
		started := time.Now()
		for range requests {
			if got := g.status(t, banned, "guard"); got != 403 {
				t.Fatalf("status is %d, want 403", got)
			}
		}
		took := time.Since(started)
		said := len(g.lines("request refused")) - before
		seconds := int(took/time.Second) + 2
		t.Logf("%d refusals in %s: %d lines", requests, took.Round(time.Millisecond), said)
		if said == 0 || said > 20*seconds {
			t.Errorf("%d refusals in %s are %d lines, want 20 a second", requests, took, said)
		}
		// The last ones are told by the next line, at the latest after 10 s.
		time.Sleep(time.Second)
		g.want(t, banned, 403, "guard")
		lines := g.lines("request refused")
		if got := lines[len(lines)-1]["total"].(float64) - had; got != requests+1 {
			t.Errorf("the lines tell of %.0f refusals, want %d", got, requests+1)
		}
		untold := 0.0
		for _, l := range lines[before:] {
			n, _ := l["suppressed"].(float64)
			untold += n + 1
		}
		if untold != requests+1 {
			t.Errorf("lines and what they say was suppressed add up to %.0f, want %d", untold, requests+1)
		}
	})
}

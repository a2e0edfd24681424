package e2e

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/edgeward/edgeward/test/rig"
)

// promise is how long a change at LAPI may take to reach clients.
const promise = interval + time.Second

// early is how much before its time a ban may end: cscli and LAPI both cut
// times to whole seconds, the one the start, the other what is left.
const early = 2 * time.Second

// decisionIDs returns the ids of the live decisions on a value, by duration as
// it was asked for: whatever is left of it, rounded up to ten seconds.
func (l lapi) decisionIDs(t testing.TB, value string) map[time.Duration]string {
	t.Helper()
	out, err := l.Cscli(soon(t, time.Minute), "alerts", "list", "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	var alerts []struct {
		Decisions []struct {
			ID              json.Number
			Value, Duration string
		}
	}
	if err := json.Unmarshal(out, &alerts); err != nil {
		t.Fatalf("read the list of alerts: %v: %s", err, out)
	}
	ids := map[time.Duration]string{}
	for _, a := range alerts {
		for _, d := range a.Decisions {
			left, err := time.ParseDuration(d.Duration)
			if err != nil {
				t.Fatal(err)
			}
			if d.Value == value && left > 0 {
				ids[(left + 10*time.Second - 1).Truncate(10*time.Second)] = d.ID.String()
			}
		}
	}
	return ids
}

// TestDecisions: what cscli says at LAPI is what clients meet, in time, through
// middlewares that read the same decisions in different ways.
func TestDecisions(t *testing.T) {
	g := newGateway(t, rig.TraefikOptions{TrustForwarded: true})
	l := newLAPI(t, rig.LAPIOptions{})
	view := func(decisions object) object {
		config := object{"lapi": l.config(), "client": posing}
		if decisions != nil {
			config["decisions"] = decisions
		}
		return config
	}
	g.serve(t, site{plugins: map[string]object{
		"guard":    view(nil),
		"allow":    view(object{"allow": []string{"203.0.113.8", "2001:db8:8::/48"}}),
		"captcha":  view(object{"fallback": "captcha"}),
		"ignore":   view(object{"fallback": "ignore"}),
		"cscli":    view(object{"origins": []string{"cscli"}}),
		"imported": view(object{"origins": []string{"cscli-import"}}),
		"others":   view(object{"exceptOrigins": []string{"CSCLI"}}),
		"ssh":      view(object{"scenarios": []string{"ssh"}}),
		"notssh":   view(object{"exceptScenarios": []string{"ssh"}}),
	}})
	everywhere := []string{"guard", "allow", "captcha", "ignore"}

	t.Run("in time", func(t *testing.T) {
		// Nearly all of this is waiting, and each works on addresses of its own.
		for _, test := range []struct {
			name string
			run  func(t *testing.T)
		}{
			{"a ban refuses and an unban admits within the interval and a second", func(t *testing.T) {
				var banned, unbanned figures
				for range 4 {
					l.ban(t, "127.1.1.1")
					banned = append(banned, g.becomes(t, "127.1.1.1", "guard", 403, promise))
					l.unban(t, "127.1.1.1")
					unbanned = append(unbanned, g.becomes(t, "127.1.1.1", "guard", 200, promise))
				}
				t.Logf("from cscli's end to 403: %v; to 200: %v", banned, unbanned)
			}},
			{"a range bans all that is in it and nothing beside it", func(t *testing.T) {
				l.ban(t, "198.51.100.64/27", "2001:db8:1:40::/58")
				g.becomes(t, "2001:db8:1:40::", "guard", 403, 2*promise)
				for _, in := range []string{"198.51.100.64", "198.51.100.77", "198.51.100.95", "2001:db8:1:7f:ffff:ffff:ffff:ffff", "2001:DB8:1:50:0:0:0:1"} {
					g.want(t, in, 403, everywhere...)
				}
				for _, out := range []string{"198.51.100.63", "198.51.100.96", "2001:db8:1:3f:ffff:ffff:ffff:ffff", "2001:db8:1:80::"} {
					g.want(t, out, 200, everywhere...)
				}
				l.unban(t, "198.51.100.64/27")
				g.becomes(t, "198.51.100.77", "guard", 200, promise)
			}},
			{"an IPv6 address is one in all its forms", func(t *testing.T) {
				l.ban(t, "2001:db8:2::a", "203.0.113.66")
				g.becomes(t, "203.0.113.66", "guard", 403, 2*promise)
				for _, same := range []string{"2001:db8:2::a", "2001:DB8:2:0:0:0:0:A", "2001:0db8:0002:0000:0000:0000:0000:000a", "[2001:db8:2::a]:443", "::ffff:203.0.113.66", "::ffff:cb00:7142", "203.0.113.66:5000"} {
					g.want(t, same, 403, everywhere...)
				}
				g.want(t, "2001:db8:2::b", 200, everywhere...)
				g.want(t, "::203.0.113.66", 200, everywhere...)
			}},
			{"of two bans on one address the one left counts", func(t *testing.T) {
				const address, short = "203.0.113.2", 10 * time.Second
				before := time.Now()
				l.decide(t, rig.Decision{Value: address, Duration: short})
				after := time.Now()
				l.decide(t, rig.Decision{Value: address, Duration: 40 * time.Second})
				g.becomes(t, address, "guard", 403, promise)
				ids := l.decisionIDs(t, address)
				if ids[40*time.Second] == "" || len(ids) != 2 {
					t.Fatalf("LAPI holds the decisions %v, want one of 10s and one of 40s", ids)
				}
				if _, err := l.Cscli(t.Context(), "decisions", "delete", "--id", ids[40*time.Second]); err != nil {
					t.Fatal(err)
				}
				g.stays(t, address, "guard", 403, before.Add(short-early))
				g.becomes(t, address, "guard", 200, time.Until(after.Add(short+time.Second)))
				g.stays(t, address, "guard", 200, time.Now().Add(promise))
			}},
			{"a ban given again lasts as long as the longer one", func(t *testing.T) {
				const address = "203.0.113.3"
				l.decide(t, rig.Decision{Value: address, Duration: 4 * time.Second})
				g.becomes(t, address, "guard", 403, promise)
				before := time.Now()
				l.decide(t, rig.Decision{Value: address, Duration: 9 * time.Second})
				after := time.Now()
				g.stays(t, address, "guard", 403, before.Add(9*time.Second-early))
				g.becomes(t, address, "guard", 200, time.Until(after.Add(10*time.Second)))
			}},
			{"a captcha beside a shorter ban is what remains of the two", func(t *testing.T) {
				const address = "203.0.113.4"
				l.decide(t, rig.Decision{Value: address, Type: "captcha", Duration: time.Hour})
				l.decide(t, rig.Decision{Value: address, Duration: 4 * time.Second})
				g.becomes(t, address, "guard", 403, promise)
				// Until there is a captcha to solve it refuses like a ban.
				g.stays(t, address, "guard", 403, time.Now().Add(6*time.Second))
				l.unban(t, address)
				g.becomes(t, address, "guard", 200, promise)
			}},
			{"an unknown type means what the fallback says", func(t *testing.T) {
				const address = "203.0.113.5"
				l.decide(t, rig.Decision{Value: address, Type: "mfa", Duration: time.Hour})
				g.becomes(t, address, "guard", 403, promise)
				g.want(t, address, 403, "guard", "captcha")
				g.want(t, address, 200, "ignore")
			}},
			{"a throttle slows a client down and lets it go on", func(t *testing.T) {
				const address = "203.0.113.6"
				l.decide(t, rig.Decision{Value: address, Type: "throttle", Duration: time.Hour})
				g.becomes(t, address, "guard", 429, promise+10*time.Second)
				a := g.ask(t, as(address, "guard"))
				if a.status != 429 || a.header.Get("Retry-After") == "" {
					t.Errorf("answer is %d with Retry-After %q, want 429 with the seconds to wait", a.status, a.header.Get("Retry-After"))
				}
				g.want(t, "203.0.113.7", 200, "guard")
			}},
			{"an allowlist beats bans of the address and of ranges around it", func(t *testing.T) {
				l.ban(t, "203.0.113.8", "203.0.113.8/31", "2001:db8:8:1::/64")
				g.becomes(t, "2001:db8:8:1::9", "guard", 403, 2*promise)
				for _, allowed := range []string{"203.0.113.8", "2001:db8:8:1::9"} {
					g.want(t, allowed, 403, "guard")
					g.want(t, allowed, 200, "allow")
				}
				g.want(t, "203.0.113.9", 403, "guard", "allow")
			}},
			{"each middleware sees the origins and scenarios it asks for", func(t *testing.T) {
				l.decide(t, rig.Decision{Value: "203.0.113.10", Duration: time.Hour, Scenario: "crowdsecurity/ssh-bf"})
				if err := l.Import(soon(t, time.Minute), []rig.Decision{{Value: "203.0.113.11", Duration: time.Hour, Scenario: "crowdsecurity/http-probing"}}); err != nil {
					t.Fatal(err)
				}
				g.becomes(t, "203.0.113.11", "guard", 403, 2*promise)
				g.want(t, "203.0.113.10", 403, "guard", "cscli", "ssh")
				g.want(t, "203.0.113.10", 200, "imported", "others", "notssh")
				g.want(t, "203.0.113.11", 403, "guard", "imported", "others", "notssh")
				g.want(t, "203.0.113.11", 200, "cscli", "ssh")
			}},
		} {
			t.Run(test.name, func(t *testing.T) {
				t.Parallel()
				test.run(t)
			})
		}
	})

	t.Run("nine middlewares are one client to LAPI", func(t *testing.T) {
		bouncers, err := l.Bouncers(soon(t, time.Minute))
		if err != nil {
			t.Fatal(err)
		}
		if len(bouncers) != 1 {
			t.Fatalf("LAPI knows %d bouncers, want 1: %+v", len(bouncers), bouncers)
		}
		b := bouncers[0]
		if b.Type != "crowdsec-edgeward-traefik-bouncer" || !strings.HasPrefix(b.Version, "v") || time.Since(b.LastPull) > 2*promise {
			t.Errorf("LAPI knows the bouncer as %q %q, last pull %s ago; want crowdsec-edgeward-traefik-bouncer vX.Y.Z, a moment ago", b.Type, b.Version, time.Since(b.LastPull))
		}
	})

	t.Run("a ban ends in time with LAPI gone", func(t *testing.T) {
		const address, length = "203.0.113.20", 5 * time.Second
		before := time.Now()
		l.decide(t, rig.Decision{Value: address, Duration: length})
		after := time.Now()
		g.becomes(t, address, "guard", 403, promise)
		if err := l.Stop(soon(t, time.Minute)); err != nil {
			t.Fatal(err)
		}
		g.stays(t, address, "guard", 403, before.Add(length-early))
		g.becomes(t, address, "guard", 200, time.Until(after.Add(length+time.Second)))
		t.Logf("free %s after its %s had passed", time.Since(after.Add(length)).Round(time.Millisecond), length)
		g.want(t, "203.0.113.66", 403, everywhere...)
	})
}

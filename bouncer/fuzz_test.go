package bouncer

import (
	"errors"
	"log/slog"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/edgeward/edgeward/internal/config"
	"github.com/edgeward/edgeward/internal/decision"
	"github.com/edgeward/edgeward/internal/lapi"
)

// FuzzConfig feeds anything for a bouncer.yaml: what is accepted makes a ruleset
// and a policy, and what is not says where it is wrong.
func FuzzConfig(f *testing.F) {
	const lapi = "lapi: {url: http://192.0.2.9:8080, keyFile: /k}\n"
	for _, seed := range []string{
		lapi, lapi + "mode: observe\nlisten: '[::1]:9477'\n",
		lapi + "firewall: {points: [input, forward], action: reject, replies: drop, priority: -10, synPriority: -310, exempt: [lo, cni*], shared: true}\n",
		lapi + "firewall:\n  log: {enabled: true, perSecond: 7, burst: 9, group: 3}\n  locks:\n    - {name: web, ports: [80, 443], from: [cloudflare, 10.0.0.0/8], to: [192.0.2.0/24]}\n",
		lapi + "decisions: {remediations: [ban, captcha], origins: [CAPI], exceptOrigins: [lists:x], fallback: ignore}\nprotect: {addresses: [203.0.113.7], cluster: [], cloudflare: false, private: false}\n",
		lapi + "protect: {addresses: ['::ffff:0.0.0.0/96', 0.0.0.0/0]}\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := Parse("bouncer.yaml", text)
		again, _ := Parse("bouncer.yaml", text)
		if !reflect.DeepEqual(c, again) {
			t.Fatal("read twice, differently")
		}
		if err != nil {
			if problems, ok := errors.AsType[config.Problems](err); !ok || len(problems) == 0 {
				t.Fatalf("%T: %v", err, err)
			}
			return
		}
		if c.nft().Validate() != nil || c.nft().Layout() == "" {
			t.Error("accepted, and no kernel could do it")
		}
		for _, p := range c.Protect.Addresses {
			if p.Bits() == 0 {
				t.Errorf("%v protects everybody", p)
			}
		}
		c.policy(true).Accept(decision.Class{Type: "ban", Origin: "lists", Scenario: "x", Remediation: decision.Ban})
	})
}

// FuzzRows feeds anything for a decision, between two that are sound: those are
// enforced whatever it is, and the kernel is told nothing that makes no sense.
func FuzzRows(f *testing.F) {
	for _, r := range []lapi.Row{
		{ID: 3, Scope: "Ip", Value: "203.0.113.5", Type: "ban", Origin: "CAPI", Scenario: "s", Duration: "4h"},
		{ID: 1, Scope: "Range", Value: "::/0", Type: "ban", Origin: "lists", Duration: "2562047h47m16.854775807s"},
		{ID: 3, Scope: "range", Value: "::ffff:203.0.113.0/120", Type: "Ban", Origin: "lists:x", Duration: "0.3ms"},
		{ID: -1, Scope: "ip", Value: "fe80::1%eth0", Type: "captcha", Duration: "-5s"},
		{ID: 1 << 40, Scope: "AS", Value: "64496", Type: "odd", Duration: "1h"},
		{ID: 3, Scope: "Range", Value: "255.255.255.255/1", Type: "ban", Origin: strings.Repeat("o", 300), Duration: "1ns"},
		{ID: 3, Scope: "Range", Value: "::fffe:0:0/95", Type: "ban", Origin: "\x00/\n", Duration: "1h"},
	} {
		f.Add(r.ID, r.Scope, r.Value, r.Type, r.Origin, r.Scenario, r.Duration, true)
		f.Add(r.ID, r.Scope, r.Value, r.Type, r.Origin, r.Scenario, r.Duration, false)
	}
	f.Fuzz(func(t *testing.T, id int, scope, value, typ, origin, scenario, duration string, full bool) {
		c := Defaults()
		c.StateDir = ""
		c.Decisions.Remediations = []Remediation{"ban", "captcha", "throttle"}
		time := clock{epoch}
		m := newMemory(time.now)
		g := &guard{log: slog.New(slog.DiscardHandler), fixed: []Protected{{netip.MustParsePrefix("198.51.100.7/32"), "test"}}}
		b, err := newBouncer(c, m, g, time.now, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.turn(t.Context()); err != nil {
			t.Fatal(err)
		}
		b.seenLists() // there are none
		sink := b.Sink()
		sink.Begin(full, time.now())
		first, last := decided(1, "20.0.0.1", "ban", "crowdsec", "s"), decided(2, "2001:db8:1::/48", "ban", "crowdsec", "s")
		sink.Add(&first)
		sink.Add(&lapi.Row{ID: id, Scope: scope, Value: value, Type: typ, Origin: origin, Scenario: scenario, Duration: duration})
		sink.Add(&last)
		sink.Commit()
		if r := b.enforcer.stands(); r.Failures != 0 {
			t.Fatalf("%v", r.Err)
		}
		for _, sound := range []struct {
			id   int
			addr string
		}{{1, "20.0.0.1"}, {2, "2001:db8:1::5"}} {
			if !m.drops(netip.MustParseAddr(sound.addr)) && id != sound.id {
				t.Errorf("%s is not dropped", sound.addr)
			}
		}
		if m.drops(netip.MustParseAddr("198.51.100.7")) {
			t.Error("the protected is dropped")
		}
		time.at = time.at.Add(1000)
		if _, err := b.turn(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}

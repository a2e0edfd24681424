package wireguard

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestPlan(t *testing.T) {
	replaced := func(pairs ...string) string { return strings.NewReplacer(pairs...).Replace(houseText()) }
	k := func(n int) string { return "'" + key(n).String() + "'" }
	before := desired(t, houseText(), Secrets{}, noon)
	for _, c := range []struct {
		name, text string
		now        time.Time
		line       string
		changes    []string
	}{
		{"nothing", houseText(), noon, "nothing changes", nil},
		{"a peer comes", replaced("services:\n", peer(9, ", addresses: [10.66.0.19, 'fd66::19'], groups: [family]")+"services:\n"), noon,
			"1 peer changes, 0 sessions reset, p9 gains grafana",
			[]string{"p9 [added] false [grafana] -"}},
		{"a grant goes", replaced("to: [group:family], services: [grafana]", "to: [group:admins], services: [grafana]"), noon,
			"2 peers change, 0 sessions reset, bob loses grafana, tv loses grafana",
			[]string{"bob [] false - [grafana]", "tv [] false - [grafana]"}},
		{"a peer goes", replaced("  - {name: bob,", "  - {name: bob, enabled: false,"), noon,
			"1 peer changes, 1 session reset, bob loses grafana",
			[]string{"bob [disabled] true - [grafana]"}},
		{"a peer expires", houseText(), noon.Add(2 * time.Hour),
			"1 peer changes, 1 session reset, bob loses grafana",
			[]string{"bob [expired] true - [grafana]"}},
		{"a peer comes back", replaced("enabled: false", "enabled: true"), noon,
			"1 peer changes, 0 sessions reset, eve gains grafana",
			[]string{"eve [live, was disabled] false [grafana] -"}},
		{"a peer is renamed", replaced("name: bob", "name: robert"), noon,
			"1 peer changes, 0 sessions reset",
			[]string{"robert [renamed from bob] false - -"}},
		{"a key is replaced", replaced("publicKey: "+k(2), "publicKey: "+k(22)), noon,
			"1 peer changes, 1 session reset",
			[]string{"bob [key replaced] true - -"}},
		{"a key is staged", replaced("publicKey: "+k(2), "publicKey: "+k(2)+", nextPublicKey: "+k(22)), noon,
			"1 peer changes, 0 sessions reset",
			[]string{"bob [next key staged] false - -"}},
		{"a preshared key goes", replaced(", presharedKeyFile: /psk/alice", ""), noon,
			"1 peer changes, 0 sessions reset",
			[]string{"alice [preshared key taken out: the peer needs a new configuration] false - -"}},
		{"addresses, groups, networks, expiry", replaced("10.66.0.10,", "10.66.0.20,", "192.168.7.0/24", "192.168.8.0/24", "[family, admins]", "[family]", "2026-06-02T12:00:00Z", "2027-06-02T12:00:00Z"), noon,
			"3 peers change, 0 sessions reset, alice loses lan, nas",
			[]string{
				"alice [addresses 10.66.0.10, fd66::10 -> 10.66.0.20, fd66::10; groups admins, family -> family] false - [lan nas]",
				"cabin [networks 192.168.7.0/24 -> 192.168.8.0/24] false - -",
				"tv [expiry 2026-06-02T12:00:00Z -> 2027-06-02T12:00:00Z] false - -",
			}},
		{"the gateway", replaced("endpoint: vpn.example.com", "listenPort: 51999, mtu: 1400"), noon,
			"the gateway changes, 0 peers change, 4 sessions reset",
			[]string{"gateway [listen port 51830 -> 51999; mtu 1420 -> 1400] true - -"}},
		{"a service", replaced("443/tcp", "8443/tcp"), noon,
			"0 peers change, 0 sessions reset, service grafana: ports 443/tcp -> 8443/tcp",
			[]string{"service grafana [ports 443/tcp -> 8443/tcp] false - -"}},
		{"everything", section, noon,
			"the gateway changes, 5 peers change, 4 sessions reset, service grafana: removed, service lan: removed, service nas: removed, alice is removed, bob is removed, and 3 more",
			[]string{
				"gateway [resolver on 10.66.0.1, fd66::1 -> none; upstreams 10.43.0.10:53 -> none; zones home.example.com -> none] false - -",
				"service grafana [removed] false - -", "service lan [removed] false - -", "service nas [removed] false - -",
				"alice [removed] true - [grafana lan nas]", "bob [removed] true - [grafana]", "cabin [removed] true - [lan nas]", "eve [removed] false - -", "tv [removed] true - [grafana]",
			}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := NewPlan(before, desired(t, c.text, Secrets{}, c.now))
			if d := cmp.Diff(c.line, p.String()); d != "" {
				t.Error(d)
			}
			var changes []string
			for _, c := range p.Changes {
				who := string(c.Peer)
				if c.Service != "" {
					who = "service " + string(c.Service)
				}
				if who == "" {
					who = "gateway"
				}
				services := func(names []Name) string {
					if names == nil {
						return "-"
					}
					return fmt.Sprint(names)
				}
				changes = append(changes, fmt.Sprintf("%s [%s] %v %s %s", who, strings.Join(c.What, "; "), c.Session, services(c.Gains), services(c.Loses)))
			}
			if d := cmp.Diff(c.changes, changes); d != "" {
				t.Error(d)
			}
			if is := p.Among(map[Name]bool{"bob": true}).Sessions; is != min(p.Sessions, 1) {
				t.Errorf("with bob alone connected %d sessions are reset", is)
			}
		})
	}
}

func TestPlanOfARotation(t *testing.T) {
	text := func(rest string) string { return section + "peers:\n  - {name: a, " + rest + "}\n" }
	one, two := "publicKey: '"+key(1).String()+"'", "publicKey: '"+key(2).String()+"'"
	steps := []string{text(one), text(one + ", nextPublicKey: '" + key(2).String() + "'"), text(two), text(two + ", nextPublicKey: '" + key(3).String() + "'"), text(two)}
	want := []string{"next key staged", "rotation finished", "next key staged", "staged key taken out"}
	for i, w := range want {
		p := NewPlan(desired(t, steps[i], Secrets{}, noon), desired(t, steps[i+1], Secrets{}, noon))
		if p.Sessions != 0 || len(p.Changes) != 1 || strings.Join(p.Changes[0].What, ", ") != w {
			t.Errorf("step %d: %+v, want %s", i, p, w)
		}
	}
}

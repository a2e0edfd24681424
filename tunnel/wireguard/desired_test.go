package wireguard

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/edgeward/edgeward/internal/config"
)

const house = `
wireguard: {addresses: [10.66.0.1/24, 'fd66::1/64'], endpoint: vpn.example.com, names: {upstreams: [10.43.0.10], zones: [home.example.com]}}
peers:
  - {name: alice, publicKey: KEY1, addresses: [10.66.0.10, 'fd66::10'], groups: [family, admins], presharedKeyFile: /psk/alice}
  - {name: bob, publicKey: KEY2, addresses: [10.66.0.11, 'fd66::11'], groups: [family], expires: 2026-06-01T13:00:00Z}
  - {name: cabin, publicKey: KEY3, addresses: [10.66.0.12, 'fd66::12'], allowedIPs: [192.168.7.0/24]}
  - {name: eve, publicKey: KEY4, addresses: [10.66.0.13, 'fd66::13'], groups: [family], enabled: false}
  - {name: tv, publicKey: KEY5, addresses: [10.66.0.14, 'fd66::14'], groups: [family], expires: 2026-06-02T12:00:00Z}
services:
  - {name: grafana, host: grafana.home.example.com, addresses: [10.66.0.100, 'fd66::100'], targets: ['fd42::7', 10.42.0.7], ports: [443/tcp]}
  - {name: lan, addresses: [192.168.1.0/24], ports: [80/tcp, 22/tcp]}
  - {name: nas, host: nas.home.example.com, addresses: [192.168.1.5], ports: [20-30/tcp, 445/tcp]}
grants:
  - {to: [group:family], services: [grafana]}
  - {to: [group:admins, peer:cabin], services: [lan, nas]}
`

func houseText() string {
	text := house
	for i := range 9 {
		text = strings.ReplaceAll(text, fmt.Sprintf("KEY%d", i), "'"+key(i).String()+"'")
	}
	return text
}

// desired is what a configuration wants at noon.
func desired(t testing.TB, text string, secrets Secrets, now time.Time) Desired {
	t.Helper()
	c := mustParse(t, text)
	var l Leases
	all, _, err := l.Assign(c, now)
	if err != nil {
		t.Fatal(err)
	}
	return Compile(c, all, secrets, now)
}

func TestCompile(t *testing.T) {
	private := NewPrivateKey()
	psk := NewPresharedKey()
	d := desired(t, houseText(), Secrets{PrivateKey: private, Preshared: map[config.File]PresharedKey{"/psk/alice": psk}}, noon)

	if d.Device.PublicKey != private.Public() || d.Device.PrivateKey != private || fmt.Sprint(d.Device.Addresses, d.Device.Routes) != "[10.66.0.1/24 fd66::1/64] [192.168.7.0/24]" {
		t.Errorf("the device is %+v", d.Device)
	}
	var peers []string
	for _, p := range d.Peers {
		peers = append(peers, fmt.Sprintf("%s %v %v psk=%v", p.Name, p.AllowedIPs(), p.Services, p.PresharedKey == psk))
	}
	for _, p := range d.Idle {
		peers = append(peers, fmt.Sprintf("%s %s %s", p.Name, p.State, p.Why))
	}
	if d := cmp.Diff([]string{
		"alice [10.66.0.10/32 fd66::10/128] [grafana lan nas] psk=true",
		"bob [10.66.0.11/32 fd66::11/128] [grafana] psk=false",
		"cabin [10.66.0.12/32 fd66::12/128 192.168.7.0/24] [lan nas] psk=false",
		"tv [10.66.0.14/32 fd66::14/128] [grafana] psk=false",
		"eve disabled ",
	}, peers); d != "" {
		t.Error(d)
	}
	if want := time.Date(2026, 6, 1, 13, 0, 0, 0, time.UTC); !d.Next.Equal(want) {
		t.Errorf("it changes at %v", d.Next)
	}

	// Three sets of services are three groups; bob and tv share one.
	groups := map[string]string{}
	for _, g := range d.Access.Groups {
		var reach []string
		for _, r := range g.Reach {
			reach = append(reach, fmt.Sprintf("%s %s %s", short(r.To), r.Ports, r.Service))
		}
		groups[g.Name] = strings.Join(reach, ", ")
	}
	var sources []string
	for _, s := range d.Access.Sources {
		sources = append(sources, fmt.Sprintf("%s %s: %s", short(s.Prefix), s.Peer, groups[s.Group]))
	}
	const (
		grafana = "10.66.0.100 443/tcp grafana, fd66::100 443/tcp grafana"
		lan     = "192.168.1.0/24 22/tcp lan, 192.168.1.0/24 80/tcp lan, 192.168.1.5 20-30/tcp nas, 192.168.1.5 445/tcp nas"
	)
	if d := cmp.Diff([]string{
		"10.66.0.10 alice: 10.66.0.100 443/tcp grafana, " + lan + ", fd66::100 443/tcp grafana",
		"10.66.0.11 bob: " + grafana,
		"10.66.0.12 cabin: " + lan,
		"10.66.0.14 tv: " + grafana,
		"192.168.7.0/24 cabin: " + lan,
		"fd66::10 alice: 10.66.0.100 443/tcp grafana, " + lan + ", fd66::100 443/tcp grafana",
		"fd66::11 bob: " + grafana,
		"fd66::12 cabin: " + lan,
		"fd66::14 tv: " + grafana,
	}, sources); d != "" {
		t.Error(d)
	}
	if len(d.Access.Groups) != 3 {
		t.Errorf("%d groups", len(d.Access.Groups))
	}
	if got := fmt.Sprint(d.Access.Translate, d.Access.Gateway, d.Access.Resolver); got != "[{grafana 10.66.0.100 10.42.0.7 [443/tcp]} {grafana fd66::100 fd42::7 [443/tcp]}] [10.66.0.1 fd66::1] true" {
		t.Error(got)
	}
	if got := fmt.Sprint(d.Names); got != "{[10.66.0.1 fd66::1] map[grafana.home.example.com:[10.66.0.100 fd66::100] nas.home.example.com:[192.168.1.5]] [home.example.com] [10.43.0.10:53] [10.66.0.10/32 10.66.0.11/32 10.66.0.12/32 10.66.0.14/32 192.168.7.0/24 fd66::10/128 fd66::11/128 fd66::12/128 fd66::14/128]}" {
		t.Error(got)
	}

	// Names of groups do not depend on who else is there.
	less := desired(t, strings.Replace(houseText(), "to: [group:admins, peer:cabin]", "to: [group:admins]", 1), Secrets{}, noon)
	if a, b := groupOf(d, "bob"), groupOf(less, "bob"); a != b || a == "" {
		t.Errorf("the group was %s and is %s", a, b)
	}
	if groupOf(less, "cabin") != "" {
		t.Error("cabin was granted nothing, and has a group")
	}

	// Expiry is exact: at that time the peer is out, and the next is at hand.
	just, at := desired(t, houseText(), Secrets{}, d.Next.Add(-time.Nanosecond)), desired(t, houseText(), Secrets{}, d.Next)
	if state(just, "bob") != Live || state(at, "bob") != Expired || groupOf(at, "bob") != "" || !at.Next.Equal(time.Date(2026, 6, 2, 12, 0, 0, 0, time.UTC)) {
		t.Errorf("bob is %s, then %s; next is %v", state(just, "bob"), state(at, "bob"), at.Next)
	}
	if over := desired(t, houseText(), Secrets{}, noon.Add(99*time.Hour)); !over.Next.IsZero() {
		t.Errorf("nothing changes any more, and next is %v", over.Next)
	}
}

// TestNetworks holds that a network is no way to what lies in it and is another's.
func TestNetworks(t *testing.T) {
	const text = `
wireguard: {addresses: [10.66.0.1/24, 'fd66::1/64'], clusterNetworks: [10.42.0.0/16, 10.43.0.0/16, '2001:db8:42::/56']}
peers:
  - {name: alice, publicKey: KEY1, addresses: [10.66.0.10, 'fd66::10']}
  - {name: office, publicKey: KEY2, addresses: [10.66.0.12], allowedIPs: [198.51.100.0/24]}
services:
  - {name: internet, addresses: [0.0.0.0/0, '::/0'], ports: [1-65535/tcp]}
  - {name: inside, addresses: [10.0.0.0/8], ports: [443/tcp]}
  - {name: peers, addresses: [10.66.0.0/24], ports: [22/tcp]}
  - {name: nas, addresses: [192.168.1.5, 203.0.113.5], ports: [445/tcp]}
grants: [{to: [peer:alice], services: [SERVICES]}]
`
	for _, tt := range []struct{ services, reached, refused string }{
		{"internet", "1.1.1.1 9.9.9.9 11.0.0.1 100.63.255.255 203.0.113.5 223.255.255.255 2606:4700::1111 2001:db8:41:ffff::1 2a00::1",
			"0.0.0.1 10.0.0.1 10.42.0.1 10.43.0.1 10.66.0.1 10.66.0.12 100.64.0.1 127.0.0.1 169.254.169.254 172.16.0.1 172.31.255.255 192.168.1.5 198.51.100.7 224.0.0.251 255.255.255.255 " +
				"::1 ::ffff:7f00:1 64:ff9b::a00:1 2002:a00:1::1 fd66::1 fd66::10 fe80::1 ff02::1 2001:db8:42::1"},
		{"internet, nas", "1.1.1.1 192.168.1.5 203.0.113.5", "192.168.1.4 192.168.1.6"},
		{"inside", "10.0.0.1 10.41.255.255 10.44.0.0 10.66.1.1 10.255.255.255", "10.42.0.1 10.43.0.1 10.66.0.1 10.66.0.12 11.0.0.1"},
		{"internet, inside, peers", "10.1.0.1 10.66.0.12 1.1.1.1", "10.42.0.1 10.66.0.1 192.168.1.5"},
	} {
		file := strings.NewReplacer("KEY1", "'"+key(1).String()+"'", "KEY2", "'"+key(2).String()+"'", "SERVICES", tt.services).Replace(text)
		d := desired(t, file, Secrets{}, noon)
		judgeAccess(t, mustParse(t, file), d)
		reach := map[string][]Reach{}
		for _, g := range d.Access.Groups {
			reach[g.Name] = g.Reach
		}
		mine := reach[groupOf(d, "alice")]
		reaches := func(text string) bool {
			return slices.ContainsFunc(mine, func(r Reach) bool { return r.To.Contains(netip.MustParseAddr(text)) })
		}
		for _, a := range strings.Fields(tt.reached) {
			if !reaches(a) {
				t.Errorf("%s: %s is not reached", tt.services, a)
			}
		}
		for _, a := range strings.Fields(tt.refused) {
			if reaches(a) {
				t.Errorf("%s: %s is reached", tt.services, a)
			}
		}
		if len(mine) > 200 {
			t.Errorf("%s: %d places", tt.services, len(mine))
		}
	}
	// An address that may be the machine's own keeps its ports beside a network.
	both := desired(t, strings.NewReplacer("KEY1", "'"+key(1).String()+"'", "KEY2", "'"+key(2).String()+"'", "SERVICES", "internet, nas").Replace(text), Secrets{}, noon)
	if r := both.Access.Groups[0].Reach; !slices.ContainsFunc(r, func(r Reach) bool { return short(r.To) == "203.0.113.5" && r.Service == "nas" }) {
		t.Errorf("%v", r)
	}
	c := mustParse(t, strings.NewReplacer("KEY1", "'"+key(1).String()+"'", "KEY2", "'"+key(2).String()+"'", "SERVICES", "internet").Replace(text))
	warnings := strings.Join(c.Warnings(), "\n")
	for _, want := range []string{
		"service inside: 10.0.0.0/8 does not hold 10.42.0.0/16, 10.43.0.0/16, 10.66.0.0/24, which is another's",
		"alice: the internet is granted and wireguard.masquerade is off",
	} {
		if !strings.Contains(warnings, want) {
			t.Errorf("no warning %q in:\n%s", want, warnings)
		}
	}
	if strings.Contains(warnings, "service peers: 10.66") || strings.Contains(warnings, "service internet: ") {
		t.Errorf("too many warnings:\n%s", warnings)
	}
}

func groupOf(d Desired, name Name) string {
	for _, s := range d.Access.Sources {
		if s.Peer == name {
			return s.Group
		}
	}
	return ""
}

func state(d Desired, name Name) State {
	switch p := parties(d)[name]; {
	case p.live != nil:
		return Live
	case p.idle != nil:
		return p.idle.State
	}
	return ""
}

// TestPeersWithoutKeys holds that a preshared key that cannot be had shuts its
// peer out, and stages no next key.
func TestPeersWithoutKeys(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) config.File {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return config.File(path)
	}
	good := write("good", NewPresharedKey().Reveal())
	bad := write("bad", "geheim")
	text := fmt.Sprintf("wireguard: {addresses: [10.66.0.1/24], privateKeyFile: %s/private}\npeers:\n", dir) +
		peer(1, ", presharedKeyFile: "+string(good)) +
		peer(2, ", presharedKeyFile: "+string(bad)) +
		peer(3, fmt.Sprintf(", presharedKeyFile: %s/none", dir)) +
		peer(4, fmt.Sprintf(", nextPublicKey: '%s', nextPresharedKeyFile: %s/none2", key(44), dir)) +
		peer(5, fmt.Sprintf(", nextPublicKey: '%s'", key(55)))
	c := mustParse(t, text)
	secrets, made, err := ReadSecrets(c, Secrets{}, "")
	if err != nil || !made || secrets.PrivateKey.IsZero() || len(secrets.Preshared) != 1 || len(secrets.Failed) != 3 {
		t.Fatalf("%v, made %v: %+v", err, made, secrets)
	}
	d := desired(t, text, secrets, noon)
	for name, want := range map[Name]State{"p1": Live, "p2": Unready, "p3": Unready, "p4": Live, "p5": Live} {
		if got := state(d, name); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
	if len(d.Idle) == 2 && (!strings.Contains(d.Idle[0].Why, string(bad)) || strings.Contains(d.Idle[0].Why, "geheim") || !strings.Contains(d.Idle[1].Why, "no such file")) {
		t.Errorf("%+v", d.Idle)
	}
	if !d.Peers[1].Next.IsZero() || !strings.Contains(d.Peers[1].Problem, "none2") || d.Peers[2].Next != key(55) || d.Peers[2].Problem != "" {
		t.Errorf("%+v", d.Peers)
	}
	if plan := desired(t, text, Secrets{}, noon); len(plan.Peers) != 5 {
		t.Errorf("away from the gateway %d are live", len(plan.Peers))
	}

	c.PublicKey = key(7)
	if _, _, err := ReadSecrets(c, Secrets{}, ""); err == nil || !strings.Contains(err.Error(), "wireguard.publicKey is "+key(7).String()) {
		t.Errorf("another public key: %v", err)
	}
	c.PrivateKeyFile = config.File(filepath.Join(dir, "nowhere", "key"))
	if _, _, err := ReadSecrets(c, Secrets{}, ""); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("nowhere to write: %v", err)
	}
}

// TestFileWarnings has the key files judged, where their directory can be read.
func TestFileWarnings(t *testing.T) {
	dir := t.TempDir()
	put := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	text := fmt.Sprintf("wireguard: {addresses: [10.66.0.1/24], privateKeyFile: %s/private, presharedKeyDir: %s}\npeers:\n", dir, dir) +
		peer(1, fmt.Sprintf(", presharedKeyFile: %s/one.psk", dir)) + peer(2, fmt.Sprintf(", presharedKeyFile: %s/two.psk", dir)) +
		peer(3, fmt.Sprintf(", presharedKeyFile: %s/nowhere/three.psk", dir))
	c := mustParse(t, text)
	put("two.psk", "junk")
	put("four.psk", NewPresharedKey().Reveal())
	judge := func(want ...string) {
		t.Helper()
		got := c.FileWarnings()
		if len(got) != len(want) {
			t.Fatalf("%d warnings, want %d: %q", len(got), len(want), got)
		}
		for i := range want {
			if !strings.Contains(got[i], want[i]) {
				t.Errorf("%q lacks %q", got[i], want[i])
			}
		}
	}
	judge("no device of a peer knows that one", "peer p1: its preshared key cannot be read here", "peer p2: its preshared key cannot be read here", "four.psk is the preshared key of no peer")
	put("private", "junk")
	judge("private key, cannot be read here", "peer p1", "peer p2", "four.psk")
	if err := c.CheckKey(); err != nil {
		t.Errorf("a key that cannot be read: %v", err)
	}
	private := NewPrivateKey()
	put("private", private.Reveal())
	put("one.psk", NewPresharedKey().Reveal())
	put("two.psk", NewPresharedKey().Reveal())
	judge("four.psk")
	if err := c.CheckKey(); err != nil {
		t.Error(err)
	}
	c.Peers[1].PublicKey, c.Peers[2].NextPublicKey = private.Public(), private.Public()
	if err := c.CheckKey(); err == nil || err.Error() != "peers[1].publicKey is the gateway's own: every peer has its own\npeers[2].nextPublicKey is the gateway's own: every peer has its own" {
		t.Errorf("the gateway's own key: %v", err)
	}
}

func TestDesiredSurvivesJSON(t *testing.T) {
	d := desired(t, houseText(), Secrets{PrivateKey: NewPrivateKey(), Preshared: map[config.File]PresharedKey{"/psk/alice": NewPresharedKey()}}, noon)
	text, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), d.Device.PrivateKey.Reveal()) || strings.Contains(string(text), d.Peers[0].PresharedKey.Reveal()) || strings.Contains(string(text), "[redacted]") {
		t.Errorf("secrets are in %s", text)
	}
	var again Desired
	if err := json.Unmarshal(text, &again); err != nil {
		t.Fatal(err)
	}
	if p := NewPlan(d, again); !p.Empty() {
		t.Errorf("the plan from one to the other is %v", p)
	}
	d.Device.PrivateKey = PrivateKey{}
	d.Peers[0].PresharedKey = PresharedKey{}
	if d := cmp.Diff(d, again, plain, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); d != "" {
		t.Error(d)
	}
}

// FuzzConfig holds of any configuration that is taken: the addresses are as they
// must be, what each peer reaches is what a naive reading of the grants says, no
// two places of a group overlap, and Desired survives JSON.
func FuzzConfig(f *testing.F) {
	f.Add(houseText())
	f.Add(section)
	f.Add(section + "peers:\n" + peer(1, "") + "services:\n  - {name: a, addresses: [10.0.0.0/8, 10.1.0.0/16, '::/0', 0.0.0.0/0], ports: [1-65535/tcp, 5-10/udp]}\n  - {name: b, addresses: [10.1.2.3, 10.1.0.0/16], ports: [1-6/udp, 8/udp]}\ngrants: [{to: [peer:p1], services: [a, b]}]")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := parse(text)
		if err != nil {
			if problems, ok := errors.AsType[config.Problems](err); !ok || len(problems) == 0 {
				t.Fatalf("%T: %v", err, err)
			}
			return
		}
		c.Warnings()
		var l Leases
		all, _, _ := l.Assign(c, noon)
		hold(t, c, all, l)
		d := Compile(c, all, Secrets{}, noon)
		judgeAccess(t, c, d)
		out, err := json.Marshal(d)
		var again Desired
		if err == nil {
			err = json.Unmarshal(out, &again)
		}
		if err != nil {
			t.Fatal(err)
		}
		if p := NewPlan(d, again); !p.Empty() {
			t.Fatalf("%v", p)
		}
		for i := range c.Peers {
			c.RoutesFor(&c.Peers[i])
			c.DNSFor(&c.Peers[i])
		}
	})
}

// judgeAccess compares what groups reach with what grants say, at the corners of
// every service.
func judgeAccess(t *testing.T, c *Config, d Desired) {
	t.Helper()
	groups := map[string][]Reach{}
	for _, g := range d.Access.Groups {
		for i, a := range g.Reach {
			if a.Ports.First > a.Ports.Last {
				t.Fatalf("%v", a)
			}
			for _, b := range g.Reach[:i] {
				if a.To.Overlaps(b.To) && a.Ports.overlaps(b.Ports) && (a.To == b.To || !a.To.IsSingleIP() && !b.To.IsSingleIP()) {
					t.Fatalf("%v overlaps %v", a, b)
				}
			}
		}
		groups[g.Name] = g.Reach
	}
	var corners []netip.Addr
	var ports []uint16
	for _, s := range c.Services {
		for _, p := range s.Addresses {
			corners = append(corners, p.Addr(), lastOf(p), p.Addr().Prev(), lastOf(p).Next())
		}
		for _, p := range s.Ports {
			ports = append(ports, p.First, p.Last, p.First-1, p.Last+1)
		}
	}
	inner := c.inner()
	for _, n := range inner[:min(len(inner), 8)] {
		corners = append(corners, n.Addr(), lastOf(n).Next())
	}
	// holds reports whether an address is meant by a service's: not where something
	// in between has it.
	holds := func(p netip.Prefix, a netip.Addr) bool {
		return p.Contains(a) && !slices.ContainsFunc(inner, func(n netip.Prefix) bool { return n.Contains(a) && n != p && covers(p, n) })
	}
	corners, ports = corners[:min(len(corners), 40)], ports[:min(len(ports), 40)]
	for _, p := range d.Peers {
		granted := c.Granted(p.Name, p.Groups)
		for _, a := range corners {
			for _, port := range ports {
				for _, protocol := range []Protocol{TCP, UDP} {
					may := slices.ContainsFunc(c.Services, func(s Service) bool {
						return granted[s.Name] != nil && slices.ContainsFunc(s.Addresses, func(p netip.Prefix) bool { return holds(p, a) }) && slices.ContainsFunc(s.Ports, Ports{port, port, protocol}.overlaps)
					})
					does := slices.ContainsFunc(groups[groupOf(d, p.Name)], func(r Reach) bool {
						return r.To.Contains(a) && r.Ports.overlaps(Ports{port, port, protocol})
					})
					if may != does {
						t.Fatalf("%s to %s %d/%s: may %v, does %v", p.Name, a, port, protocol, may, does)
					}
				}
			}
		}
	}
}

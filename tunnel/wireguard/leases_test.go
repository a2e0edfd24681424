package wireguard

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var noon = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)

func addrs(text string) []netip.Addr {
	var out []netip.Addr
	for word := range strings.FieldsSeq(text) {
		out = append(out, netip.MustParseAddr(word))
	}
	return out
}

// told is who has what, a line each.
func lines(all Assigned) string {
	var out []string
	for name, has := range all {
		out = append(out, fmt.Sprintf("%s %s", name, texts(has)))
	}
	slices.Sort(out)
	return strings.Join(out, "\n")
}

func TestAssign(t *testing.T) {
	const small = "wireguard: {addresses: [10.66.0.1/29, 'fd66::1/64'], reserved: [10.66.0.6]}\nservices: [{name: s, addresses: [10.66.0.5], targets: [10.42.0.1], ports: [80/tcp]}]\npeers:\n"
	var l Leases
	turn := func(text string, now time.Time, want string) {
		t.Helper()
		all, _, err := l.Assign(mustParse(t, text), now)
		got := lines(all)
		if err != nil {
			got += "\n" + err.Error()
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
	}
	// Free are 2, 3 and 4: 0 and 7 are the network's, 1 the gateway's, 5 a
	// service's, 6 reserved.
	turn(small+peer(1, ", addresses: [10.66.0.3]"), noon, "p1 10.66.0.3, fd66::3")
	turn(small+peer(1, "")+peer(2, ", addresses: ['fd66::4']"), noon, "p1 10.66.0.3, fd66::3\np2 10.66.0.4, fd66::4")
	turn(small+peer(1, "")+peer(3, "")+peer(2, ""), noon, "p1 10.66.0.3, fd66::3\np2 10.66.0.4, fd66::4\np3 10.66.0.2, fd66::2")
	// p1 left: its addresses rest, and p4 has to wait. One day more, and it has
	// them.
	gone := small + peer(2, "") + peer(3, "") + peer(4, "")
	turn(gone, noon, "p2 10.66.0.4, fd66::4\np3 10.66.0.2, fd66::2\np4 \nassign addresses: none is left in 10.66.0.0/29, fd66::/64 for p4: those of peers that are gone rest for 30 days; take a larger network, or take out peers")
	turn(gone, noon.Add(Rest-time.Second), "p2 10.66.0.4, fd66::4\np3 10.66.0.2, fd66::2\np4 \nassign addresses: none is left in 10.66.0.0/29, fd66::/64 for p4: those of peers that are gone rest for 30 days; take a larger network, or take out peers")
	if rests := l.ByName["p1"]; rests.Freed != noon || texts(rests.Addresses) != "10.66.0.3, fd66::3" {
		t.Errorf("p1 rests %+v", rests)
	}
	turn(gone, noon.Add(Rest), "p2 10.66.0.4, fd66::4\np3 10.66.0.2, fd66::2\np4 10.66.0.3, fd66::3")
	// What somebody declares is theirs, and who had it moves.
	turn(small+peer(2, ", addresses: [10.66.0.3, 'fd66::77']")+peer(3, "")+peer(4, ""), noon, "p2 10.66.0.3, fd66::77\np3 10.66.0.2, fd66::2\np4 10.66.0.4, fd66::3")
	// Another network: nothing of the old one is kept.
	turn("wireguard: {addresses: [10.67.0.1/30]}\npeers:\n"+peer(2, ""), noon, "p2 10.67.0.2")
}

func TestLeaseOfOneWhoComesBack(t *testing.T) {
	var l Leases
	with := mustParse(t, section+"peers:\n"+peer(1, ""))
	first, _, _ := l.Assign(with, noon)
	if _, changed, _ := l.Assign(with, noon.Add(time.Hour)); changed {
		t.Error("nothing changed")
	}
	l.Assign(mustParse(t, section), noon.Add(2*time.Hour))
	if l.ByName["p1"].Freed.IsZero() {
		t.Error("the lease does not rest")
	}
	again, changed, _ := l.Assign(with, noon.Add(3*time.Hour))
	if d := cmp.Diff(lines(first), lines(again)); d != "" || !changed || !l.ByName["p1"].Freed.IsZero() {
		t.Errorf("changed %v: %s", changed, d)
	}
	// Without the file the name leads to the same addresses.
	var lost Leases
	anew, _, _ := lost.Assign(with, noon)
	if d := cmp.Diff(lines(first), lines(anew)); d != "" {
		t.Error(d)
	}
	picked, err := l.Pick(mustParse(t, section), Peer{Name: "p1"}, noon)
	if err != nil || texts(picked) != texts(first["p1"]) || l.ByName["p1"].Freed.IsZero() == false {
		t.Errorf("picked %v, %v", picked, err)
	}
}

func TestLeasesFile(t *testing.T) {
	path := LeasesPath(t.TempDir())
	l, err := LoadLeases(path)
	if err != nil || l.ByName != nil {
		t.Fatalf("%v, %v", l, err)
	}
	l.Assign(mustParse(t, section+"peers:\n"+peer(1, "")+peer(2, "")), noon)
	l.Assign(mustParse(t, section+"peers:\n"+peer(1, "")), noon)
	for range 2 { // over what is there, too
		if err := l.Save(path); err != nil {
			t.Fatal(err)
		}
	}
	again, err := LoadLeases(path)
	if d := cmp.Diff(l, again, plain); err != nil || d != "" {
		t.Error(err, d)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	for _, text := range []string{"", "{", `{"leases": {"a": {"addresses": ["x"]}}}`, `{"leases": {"A B": {}}}`} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadLeases(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// TestAssignMany fills a large network nearly.
func TestAssignMany(t *testing.T) {
	f := Config{Settings: mustParse(t, "wireguard: {addresses: [172.16.0.1/18, 'fd66::1/64'], reserved: [172.16.4.0-172.16.31.255]}").Settings}
	for i := range 9000 {
		f.Peers = append(f.Peers, Peer{Name: Name(fmt.Sprintf("p%d", i))})
	}
	began := time.Now()
	var l Leases
	all, _, err := l.Assign(&f, noon)
	t.Logf("9000 of 9214 addresses in %v", time.Since(began))
	if err != nil || len(all) != 9000 {
		t.Fatal(len(all), err)
	}
	hold(t, &f, all, l)
}

// hold is what must be true of every assignment.
func hold(t *testing.T, c *Config, all Assigned, l Leases) {
	t.Helper()
	networks, declared := c.Networks(), map[Name]bool{}
	for i := range c.Peers {
		declared[c.Peers[i].Name] = true
	}
	whose := map[netip.Addr]Name{}
	for _, a := range c.gateway() {
		whose[a] = "the gateway"
	}
	for _, s := range c.Services {
		for _, a := range s.Addresses {
			if a.IsSingleIP() && len(s.Targets) > 0 {
				whose[a.Addr()] = "service " + s.Name
			}
		}
	}
	for name, lease := range l.ByName {
		if declared[name] {
			continue
		}
		for _, a := range lease.Addresses {
			if other, taken := whose[a]; taken {
				t.Errorf("%s rests with %s and is %s's", a, name, other)
			}
			whose[a] = name
		}
	}
	for i := range c.Peers {
		p := &c.Peers[i]
		has := all[p.Name]
		for _, a := range p.Addresses {
			if !slices.Contains(has, a) {
				t.Errorf("%s lost %s, which it declares", p.Name, a)
			}
		}
		if len(has) > len(networks) || !slices.IsSortedFunc(has, netip.Addr.Compare) {
			t.Errorf("%s has %v", p.Name, has)
		}
		for _, a := range has {
			if other, taken := whose[a]; taken {
				t.Errorf("%s is %s's and %s's", a, other, p.Name)
			}
			whose[a] = p.Name
			n := slices.IndexFunc(networks, func(n netip.Prefix) bool { return n.Contains(a) })
			if n < 0 || outer(networks[n], a) {
				t.Errorf("%s has %s, of %s", p.Name, a, list(networks))
			}
			if !slices.Contains(p.Addresses, a) && slices.ContainsFunc(c.Reserved, func(r Range) bool { return r.Contains(a) }) {
				t.Errorf("%s was given %s, which is reserved", p.Name, a)
			}
		}
	}
}

// FuzzAllocator has peers come and go, move and come back, in networks of all
// sizes. No address is given twice, none that is reserved or rests, and who
// keeps its name keeps its addresses.
func FuzzAllocator(f *testing.F) {
	for i := range uint64(8) {
		f.Add(i, uint8(28+i%3), uint8(i%3), uint8(120+i))
	}
	f.Fuzz(func(t *testing.T, seed uint64, bits, families, bits6 uint8) {
		r := rand.New(rand.NewPCG(seed, 0))
		c := &Config{Settings: Defaults()}
		v4 := netip.PrefixFrom(netip.MustParseAddr("10.66.37.0"), int(8+bits%23)).Masked()
		v6 := netip.PrefixFrom(netip.MustParseAddr("fd66:1:2:3:4:5:6:0"), int(8+bits6%119)).Masked()
		var networks []netip.Prefix
		switch families % 3 {
		case 0:
			networks = []netip.Prefix{v4, v6}
		case 1:
			networks = []netip.Prefix{v4}
		case 2:
			networks = []netip.Prefix{v6}
		}
		some := func(n netip.Prefix) netip.Addr { // one that a peer may declare
			for {
				places := uint64(1) << min(n.Addr().BitLen()-n.Bits(), 40)
				if a := at(n, r.Uint64N(min(places, []uint64{8, 64, 1 << 40}[r.IntN(3)]))); !outer(n, a) {
					return a
				}
			}
		}
		for _, n := range networks {
			c.Settings.Addresses = append(c.Settings.Addresses, InterfaceAddress{netip.PrefixFrom(some(n), n.Bits())})
			if r.IntN(2) == 0 {
				a, b := some(n), some(n)
				if b.Less(a) {
					a, b = b, a
				}
				c.Reserved = append(c.Reserved, Range{a, b})
			}
		}
		for _, n := range networks {
			if a := some(n); r.IntN(2) == 0 && !slices.Contains(c.gateway(), a) {
				c.Services = append(c.Services, Service{Name: "s", Addresses: []netip.Prefix{single(a)}, Targets: addrs("10.42.0.1 fd42::1")})
			}
		}
		var l Leases
		now := noon
		for range 12 {
			// As the check would have it: no address is declared twice.
			declared := map[netip.Addr]bool{}
			for _, a := range c.gateway() {
				declared[a] = true
			}
			for _, s := range c.Services {
				declared[s.Addresses[0].Addr()] = true
			}
			c.Peers = nil
			for i := range 12 {
				if r.IntN(3) == 0 {
					continue
				}
				p := Peer{Name: Name(fmt.Sprintf("p%d", i))}
				for _, n := range networks {
					if a := some(n); r.IntN(4) == 0 && !declared[a] {
						declared[a] = true
						p.Addresses = append(p.Addresses, a)
					}
				}
				c.Peers = append(c.Peers, p)
			}
			// What the check refuses is asked before it speaks.
			stray := Peer{Name: "stray", Addresses: []netip.Addr{[]netip.Addr{netip.MustParseAddr("172.31.0.9"), netip.AddrFrom16(v4.Addr().As16()), {}}[r.IntN(3)]}}
			if got, err := l.Pick(c, stray, now); err == nil && !slices.Contains(got, stray.Addresses[0]) {
				t.Fatalf("%v declared, %v given", stray.Addresses, got)
			}
			was := Leases{}
			was.ByName = map[Name]Lease{}
			for name, lease := range l.ByName {
				was.ByName[name] = lease
			}
			all, _, err := l.Assign(c, now)
			hold(t, c, all, l)
			for i := range c.Peers {
				p := &c.Peers[i]
				if missing := len(all[p.Name]) < len(networks); missing && (err == nil || !strings.Contains(err.Error(), string(p.Name))) {
					t.Errorf("%s lacks an address, and nobody says so: %v", p.Name, err)
				}
				for _, a := range was.ByName[p.Name].Addresses {
					reserved := slices.ContainsFunc(c.Reserved, func(r Range) bool { return r.Contains(a) }) // declared before
					if !slices.Contains(all[p.Name], a) && !declared[a] && !has(p.Addresses, a) && !reserved {
						t.Errorf("%s had %s and has %v", p.Name, a, all[p.Name])
					}
				}
			}
			for name, lease := range was.ByName {
				if c.Peer(name) != nil || !lease.Freed.IsZero() && now.Sub(lease.Freed) >= Rest {
					continue
				}
				for _, a := range lease.Addresses {
					if !declared[a] && !slices.Contains(l.ByName[name].Addresses, a) {
						t.Errorf("%s of %s does not rest", a, name)
					}
				}
			}
			if again, changed, _ := l.Assign(c, now); changed || lines(again) != lines(all) {
				t.Errorf("asked again, it gave\n%s\nafter\n%s", lines(again), lines(all))
			}
			if t.Failed() {
				t.Fatalf("networks %v, gateway %v, reserved %v, services %v", networks, c.gateway(), c.Reserved, c.Services)
			}
			now = now.Add(time.Duration(r.Int64N(int64(Rest))))
		}
	})
}

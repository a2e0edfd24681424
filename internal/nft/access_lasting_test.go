package nft

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/edgeward/edgeward/internal/netns"
)

// A thousand times the rules are replaced or changed, and of what was never
// granted not one packet passes, while what always was does.
func TestAccessUnderFire(t *testing.T) {
	w := newVPN(t)
	port := w.inPod.Addr.Port()
	lost4, lost6 := addr("10.66.0.99"), addr("fd66::1:99")
	a := w.family()
	for i := range 2 {
		name := fmt.Sprintf("others-%d", i)
		a.Groups = append(a.Groups, Group{name, reaches(pod4, pod6, TCP, 1000, 1000+uint16(i))})
		a.Sources = append(a.Sources, sources(name, numberedAddr(addr("10.66.0.110"), i), numberedAddr(addr("fd66::1:110"), i))...)
	}
	w.apply(a)

	// Alice may open the port by TCP only.
	forbidden4, forbidden6 := []netip.Addr{bob4, lost4, alice4}, []netip.Addr{bob6, lost6, alice6}
	blasters := []*netns.Blaster{
		w.peers.Blast(netip.AddrPortFrom(pod4, port), forbidden4...),
		w.peers.Blast(netip.AddrPortFrom(pod6, port), forbidden6...),
	}
	w.inPod.Push(netip.AddrPortFrom(alice4, w.atPeers.Addr.Port()), 100*time.Microsecond)
	w.inPod.Push(netip.AddrPortFrom(alice6, w.atPeers.Addr.Port()), 100*time.Microsecond)
	// What is granted all the time may drown in the flood, and come again; it may
	// not be refused.
	stop, done := make(chan struct{}), make(chan int, 1)
	go func() {
		for n, served := 0, 0; ; n++ {
			select {
			case <-stop:
				done <- served
				return
			default:
			}
			from, to := []netip.Addr{alice4, alice6}[n%2], []netip.Addr{pod4, pod6}[n%2]
			if w.peers.TCP(from, netip.AddrPortFrom(to, port)) == nil {
				served++
			}
		}
	}()

	all, begun := a, time.Now()
	replaced := 0
	for i := range 1000 {
		next := all
		next.Groups, next.Sources = slices.Clone(all.Groups), slices.Clone(all.Sources)
		switch i % 5 {
		case 0:
			next.Networks = vpnNets[i%2:]
		case 1: // some peers go
			next.Sources = next.Sources[:4+i%4]
		case 2: // other groups change what they may
			for n := 1; n < len(next.Groups); n++ {
				next.Groups[n].Reach = reaches(pod4, pod6, TCP, 1000, 1000+uint16(i%7))
			}
		case 3: // Alice changes group
			next.Groups[0].Name = fmt.Sprintf("family-%d", i%3)
			for n := range 2 {
				next.Sources[n].Group = next.Groups[0].Name
			}
		case 4:
			next.Everyone = reaches(vpnGateway4, vpnGateway6, UDP, 53, 53+uint16(i%2))
		}
		if w.apply(next).Replaced {
			replaced++
		}
	}
	t.Logf("1,000 changes, %d of them replacements, in %v", replaced, time.Since(begun))
	close(stop)
	served := <-done
	denied, err := w.conn.Denied()
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range denied {
		if row.Proto == uint8(TCP) {
			t.Errorf("what is granted all the time was denied: %+v", row)
		}
	}
	sent := 0
	for _, b := range blasters {
		n, err := b.Stop()
		if err != nil {
			t.Error(err)
		}
		sent += n
	}
	time.Sleep(20 * time.Millisecond) // what is on its way
	for from, n := range w.inPod.Received() {
		t.Errorf("%d packets from %v reached the pod", n, from)
	}
	for from, n := range w.atPeers.Received() {
		t.Errorf("%d packets from %v reached a peer", n, from)
	}
	if sent < 10_000 || served < 100 || replaced < 400 {
		t.Errorf("%d packets were sent, %d connections served, and %d times all was replaced: this shows little", sent, served, replaced)
	}
	if n := strings.Count(w.list(), "map hosts4_"); n != 1 {
		t.Errorf("%d generations are there", n)
	}
}

// allows is what a means, told naively.
func (a Access) allows(from netip.Addr, proto Proto, to netip.Addr, port uint16) bool {
	var best *Source
	for i, s := range a.Sources {
		if s.Prefix.Contains(from) && (best == nil || s.Prefix.Bits() > best.Prefix.Bits()) {
			best = &a.Sources[i]
		}
	}
	if best == nil {
		return false
	}
	reach := slices.Clone(a.Everyone)
	for _, g := range a.Groups {
		if g.Name == best.Group {
			reach = append(reach, g.Reach...)
		}
	}
	return slices.ContainsFunc(reach, func(r Reach) bool {
		return r.Proto == proto && r.To.Contains(to) && (proto == Echo || r.First <= port && port <= r.Last)
	})
}

// vary is an Access out of few addresses and ports, so that much overlaps.
type vary struct{ *rand.Rand }

func (v vary) source(six bool) netip.Prefix {
	if six {
		return v.prefix(addr("fd66::1:0"), 112, 128)
	}
	return v.prefix(addr("10.66.0.64"), 26, 32)
}

func (v vary) target(six bool) netip.Prefix {
	if six {
		return v.prefix(addr("fd42::f0"), 124, 128)
	}
	return v.prefix(addr("10.42.0.240"), 28, 32)
}

// prefix is one inside base; of the bits that differ only the last four may be
// set.
func (v vary) prefix(base netip.Addr, short, long int) netip.Prefix {
	a := base.AsSlice()
	a[len(a)-1] |= byte(v.IntN(16))
	p, _ := netip.AddrFromSlice(a)
	return netip.PrefixFrom(p, max(short, long-v.IntN(6)*v.IntN(2))).Masked()
}

func (v vary) reach(six bool) Reach {
	r := Reach{To: v.target(six), Proto: []Proto{TCP, UDP, UDP, Echo}[v.IntN(4)]}
	if r.Proto != Echo {
		r.First = uint16(1000 + v.IntN(20))
		r.Last = r.First + uint16(v.IntN(30)*v.IntN(2))
	}
	return r
}

func (v vary) reaches(n int) (out []Reach) {
	for range v.IntN(n) {
		out = append(out, v.reach(v.IntN(2) == 0))
	}
	return out
}

func (v vary) sources(groups []Group) (out []Source) {
	seen := map[netip.Prefix]bool{}
	for range 5 + v.IntN(20) {
		s := Source{Prefix: v.source(v.IntN(2) == 0)}
		if n := v.IntN(4*len(groups) + 1); n > 0 {
			s.Group = groups[n/4%len(groups)].Name
		}
		if !seen[s.Prefix] {
			seen[s.Prefix] = true
			out = append(out, s)
		}
	}
	return out
}

func (v vary) access() Access {
	a := Access{Interface: "edgeward0", Networks: vpnNets, Everyone: v.reaches(4), Masquerade: v.IntN(2) == 0}
	for i := range v.IntN(4) {
		a.Groups = append(a.Groups, Group{fmt.Sprint("group", i), v.reaches(40)})
	}
	a.Sources = v.sources(a.Groups)
	return a
}

// packet is one that may or may not pass.
func (v vary) packet() (from netip.Addr, proto Proto, to netip.Addr, port uint16) {
	six := v.IntN(2) == 0
	proto, port = []Proto{TCP, UDP, UDP}[v.IntN(3)], uint16(995+v.IntN(50))
	return v.source(six).Addr(), proto, v.target(six).Addr(), port
}

// The kernel judges packets as a naive reading of any Access does, however it came
// to hold that: at once, or by changes to another.
func TestAccessMeaning(t *testing.T) {
	w := newVPN(t)
	v := vary{rand.New(rand.NewPCG(1, 2))}
	type key struct {
		from, to netip.Addr
		proto    uint8
		port     uint16
	}
	counts := func() map[bool]map[key]uint64 {
		out := map[bool]map[key]uint64{true: {}, false: {}}
		for pass, read := range map[bool]func() ([]Attempt, error){true: w.conn.Granted, false: w.conn.Denied} {
			attempts, err := read()
			if err != nil {
				t.Fatal(err)
			}
			for _, a := range attempts {
				out[pass][key{a.From, a.To, a.Proto, a.Port}] = a.Packets
			}
		}
		return out
	}
	a := v.access()
	passed, stopped, replaced := 0, 0, 0
	for round := range 40 {
		switch v.IntN(4) {
		case 0:
			a = v.access()
		case 1:
			a.Sources = v.sources(a.Groups)
		case 2: // one group goes, another comes
			a.Groups = append(slices.Clone(a.Groups[min(1, len(a.Groups)):]), Group{fmt.Sprint("late", round), v.reaches(40)})
			a.Sources = v.sources(a.Groups)
		case 3:
			a.Groups = slices.Clone(a.Groups)
			slices.Reverse(a.Groups)
			if len(a.Sources) > 0 {
				a.Sources = a.Sources[1:]
			}
		}
		if w.apply(a).Replaced {
			replaced++
		}
		before, sent := counts(), map[key]uint64{}
		var probes []probe
		for range 100 {
			from, proto, to, port := v.packet()
			if to == addr("10.42.0.255") {
				continue // the gateway hears at that: a network does not mean it
			}
			sent[key{from, to, uint8(proto), port}]++
			probes = append(probes, probe{from, proto, to, port})
		}
		w.probe(probes)
		after := counts()
		for k, n := range sent {
			want := a.allows(k.from, Proto(k.proto), k.to, k.port)
			if want {
				passed++
			} else {
				stopped++
			}
			if got := after[want][k] - before[want][k]; got != n {
				t.Errorf("round %d: %d of %d packets %+v are judged right (granted: %t)", round, got, n, k, want)
			}
			if got := after[!want][k] - before[!want][k]; got != 0 {
				t.Errorf("round %d: %d of %d packets %+v are judged wrong (granted: %t)", round, got, n, k, want)
			}
		}
		if t.Failed() {
			t.Fatalf("%+v\n%s", a, w.list())
		}
	}
	t.Logf("%d passed, %d were stopped, %d times all was replaced", passed, stopped, replaced)
	if passed < 200 || stopped < 200 || replaced < 5 || replaced > 35 {
		t.Error("this shows little")
	}
}

type probe struct {
	from  netip.Addr
	proto Proto
	to    netip.Addr
	port  uint16
}

// probe sends the first packet of each connection, and no second.
func (w *vpn) probe(probes []probe) {
	w.t.Helper()
	w.peers.Must(func() error {
		for _, p := range probes {
			typ, family := unix.SOCK_DGRAM, unix.AF_INET
			sockaddr := func(a netip.Addr, port uint16) unix.Sockaddr {
				return &unix.SockaddrInet4{Addr: a.As4(), Port: int(port)}
			}
			if p.from.Is6() {
				family = unix.AF_INET6
				sockaddr = func(a netip.Addr, port uint16) unix.Sockaddr {
					return &unix.SockaddrInet6{Addr: a.As16(), Port: int(port)}
				}
			}
			if p.proto == TCP {
				typ = unix.SOCK_STREAM
			}
			fd, err := unix.Socket(family, typ|unix.SOCK_NONBLOCK, 0)
			if err != nil {
				return err
			}
			err = unix.Bind(fd, sockaddr(p.from, 0))
			if err == nil {
				err = unix.Connect(fd, sockaddr(p.to, p.port))
			}
			if err == nil && p.proto == UDP {
				_, err = unix.Write(fd, []byte("probe"))
			}
			unix.Close(fd)
			if err != nil && !errors.Is(err, unix.EINPROGRESS) && !errors.Is(err, unix.EHOSTUNREACH) && !errors.Is(err, unix.EACCES) {
				return fmt.Errorf("probe %+v: %w", p, err)
			}
		}
		return nil
	})
}

// What others do to an open table is found and mended; a table that is ours they
// cannot touch.
func TestAccessRepaired(t *testing.T) {
	for _, tt := range []struct{ name, rules string }{
		{"flushed", "flush ruleset"},
		{"deleted", "delete table inet edgeward_vpn"},
		{"let through", "insert rule inet edgeward_vpn access accept"},
		{"rules flushed", "flush chain inet edgeward_vpn access"},
		{"hook deleted", "flush chain inet edgeward_vpn access-forward; delete chain inet edgeward_vpn access-forward"},
		{"peer deleted", "delete element inet edgeward_vpn hosts4_1 { 10.66.0.70 }"},
		{"peer added", "add element inet edgeward_vpn hosts4_1 { 10.66.0.99 : goto group-family_1 }"},
		{"service added", "delete element inet edgeward_vpn ports6-family_1 { fd42::2 . tcp . PORT }"},
		{"chain emptied", "flush chain inet edgeward_vpn denied_1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newVPN(t)
			port := w.inPod.Addr.Port()
			a := w.family()
			w.conn.Close()
			w.conn = w.open(Options{Shared: true})
			w.apply(a)
			events, err := w.conn.Watch(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			load(t, w.gateway, strings.ReplaceAll(tt.rules, "PORT", fmt.Sprint(port)))
			select {
			case <-events:
			case <-time.After(5 * time.Second):
				t.Error("nobody was told")
			}
			if h, err := w.conn.read(); err != nil || h.Intact {
				t.Errorf("%+v, %v", h, err)
			}
			if done := w.apply(a); !done.Repaired || !done.Changed {
				t.Errorf("%+v", done)
			}
			w.demand(both(w.peers, alice4, alice6, TCP, pod4, pod6, port),
				both(w.peers, bob4, bob6, UDP, pod4, pod6, port))
			if done := w.apply(a); done != (Applied{}) {
				t.Errorf("the same again: %+v", done)
			}
			// What others did between writing and reading is not taken for ours.
			count := w.conn.checked
			load(t, w.gateway, strings.NewReplacer("PORT", fmt.Sprint(port), "_1", fmt.Sprintf("_%d", w.conn.generation)).Replace(tt.rules))
			if err := w.conn.remember(count); err != nil {
				t.Fatal(err)
			}
			if done := w.apply(a); !done.Replaced {
				t.Errorf("after others were at work meanwhile: %+v", done)
			}
			if done := w.apply(a); done != (Applied{}) {
				t.Errorf("the same again: %+v", done)
			}

			// And now nobody can.
			w.conn.Close()
			w.conn = w.open(Options{})
			if done := w.apply(a); !done.Replaced {
				t.Errorf("taking the table: %+v", done)
			}
			h, err := w.conn.read()
			if diff := cmp.Diff(accessHave{Present: true, Owner: true, Persist: true, Intact: true, Generation: h.Generation, Ruleset: h.Ruleset}, h); diff != "" || err != nil {
				t.Error(diff, err)
			}
			w.gateway.Exec("nft", "flush", "ruleset")
			if done := w.apply(a); done.Changed {
				t.Errorf("after a flush: %+v", done)
			}
		})
	}
}

// Where the kernel does not tell the numbers of elements, they are counted.
func TestAccessCounts(t *testing.T) {
	w := newVPN(t)
	a := w.family()
	a.Sources = append(a.Sources, Source{site4, ""}, Source{prefix("192.168.8.0/24"), "family"}, Source{prefix("255.255.255.0/24"), ""}, Source{site6, "family"})
	w.apply(a)
	s, err := w.conn.conn.inspect(AccessTableName)
	if err != nil {
		t.Fatal(err)
	}
	for base, want := range map[string]int{"hosts4": 2, "hosts6": 2, "sites4": 3, "sites6": 1} {
		n, err := w.conn.count(fmt.Sprintf("%s_%d", base, w.conn.generation))
		if n != want || err != nil {
			t.Errorf("%s has %d elements (%v), want %d", base, n, err, want)
		}
	}
	if same, err := w.conn.matches(s); !same || err != nil {
		t.Errorf("matches: %t, %v", same, err)
	}
	s.table.flags = 0 // as if it were open
	for _, remove := range []bool{true, false} {
		clear(s.generations[w.conn.generation].counts) // as if it were older
		s.fingerprint = w.conn.fingerprint
		if same, err := w.conn.matches(s); !same || err != nil {
			t.Errorf("matches by counting: %t, %v", same, err)
		}
		if remove {
			w.conn.live.sites[0] = w.conn.live.sites[0][1:]
		} else {
			w.conn.live.hosts[1] = w.conn.live.hosts[1][1:]
		}
		if same, _ := w.conn.matches(s); same {
			t.Error("matches what it is not")
		}
		w.apply(a)
	}
}

// Rules of another table come and go without a look at all of ours being needed
// to trust it, and nothing of this touches the table of bans.
func TestAccessBesideBans(t *testing.T) {
	w := newVPN(t)
	bans, err := Open(Options{NetNS: w.gateway.FD()})
	if err != nil {
		t.Fatal(err)
	}
	defer bans.Close()
	if err := bans.Install(Config{Exempt: []string{"lo", "cni*", "edgeward0"}}, content(nil, ban(alice4), ban(bob4))); err != nil {
		t.Fatal(err)
	}
	a := w.family()
	w.apply(a)
	before := w.gateway.MustExec("nft", "list", "table", "inet", TableName)
	for i := range 5 {
		for _, c := range []Changes{{Put: []Element{ban(bad4)}}, {Delete: []netip.Addr{bad4}}} {
			if err := bans.Update(c); err != nil {
				t.Fatal(err)
			}
		}
		if done := w.apply(a); done != (Applied{}) {
			t.Errorf("%+v", done)
		}
		if i%2 == 0 {
			a.Masquerade = !a.Masquerade
		} else {
			a.Sources = a.Sources[:len(a.Sources)-1]
		}
		w.apply(a)
	}
	w.demand(both(w.peers, alice4, alice6, TCP, pod4, pod6, w.inPod.Addr.Port()), nil) // banned, and exempt
	counted := regexp.MustCompile(`packets \d+ bytes \d+|expires \w+`)
	after := w.gateway.MustExec("nft", "list", "table", "inet", TableName)
	if diff := cmp.Diff(counted.ReplaceAllString(before, ""), counted.ReplaceAllString(after, "")); diff != "" {
		t.Error(diff)
	}
	if err := w.conn.Delete(); err != nil {
		t.Fatal(err)
	}
	if err := w.conn.Delete(); err != nil {
		t.Errorf("delete what is not there: %v", err)
	}
	if h, err := bans.Read(); err != nil || !h.Intact {
		t.Errorf("bans: %+v, %v", h, err)
	}
	if h, err := w.conn.read(); err != nil || h.Present {
		t.Errorf("%+v, %v", h, err)
	}
}

// A process that dies leaves the rules, and its successor finds them enforced
// until it puts its own in their place.
func TestAccessSuccessor(t *testing.T) {
	w := newVPN(t)
	port := w.inPod.Addr.Port()
	a := w.family()
	w.apply(a)
	if _, err := OpenAccess(Options{NetNS: w.gateway.FD()}); !errors.Is(err, ErrOwned) {
		t.Errorf("open what is owned: %v", err)
	}
	reader := w.open(Options{ReadOnly: true})
	if h, err := reader.read(); err != nil || !h.Present || !h.Owner || h.Intact {
		t.Errorf("%+v, %v", h, err)
	}
	if _, err := reader.Apply(a); err == nil {
		t.Error("a reader applies")
	}
	if err := reader.Delete(); !errors.Is(err, ErrOwned) {
		t.Errorf("a reader deletes: %v", err)
	}
	w.conn.conn.sock.close() // as if killed
	pass, fail := both(w.peers, alice4, alice6, TCP, pod4, pod6, port), both(w.peers, bob4, bob6, UDP, pod4, pod6, port)
	w.demand(pass, fail)
	w.conn = w.open(Options{})
	w.demand(pass, fail)
	denied := w.counters().Denied
	if done := w.apply(a); !done.Replaced || done.Repaired {
		t.Errorf("%+v", done)
	}
	w.demand(pass, fail)
	if n := w.counters().Denied; n <= denied {
		t.Errorf("counters began again: %d after %d", n, denied)
	}
	w.conn.Close()
	if _, err := w.conn.Apply(a); err == nil {
		t.Error("a closed connection applies")
	}
}

// The rules are there before the interface.
func TestAccessBeforeInterface(t *testing.T) {
	w := newVPN(t)
	a := w.family()
	a.Interface = "edgeward1"
	w.apply(a)
	far := netns.New(t)
	netns.Cable(netns.End{NS: far, Name: "wg0", Addrs: []netip.Prefix{prefix("10.66.2.70/24")}},
		netns.End{NS: w.gateway, Name: "edgeward1", Addrs: []netip.Prefix{prefix("10.66.2.1/24")}})
	if err := far.UDP(addr("10.66.2.70"), netip.AddrPortFrom(addr("10.66.2.1"), w.onGateway.Addr.Port())); err == nil {
		t.Error("the first packet passed")
	}
	a.Sources = append(a.Sources, sources("", addr("10.66.2.70"))...)
	a.Everyone = []Reach{{single(addr("10.66.2.1")), UDP, 1, 65535}}
	w.apply(a)
	if err := far.UDP(addr("10.66.2.70"), netip.AddrPortFrom(addr("10.66.2.1"), w.onGateway.Addr.Port())); err != nil {
		t.Error(err)
	}
}

// Ten thousand peers with many groups, more than one message or one attribute can
// hold.
func TestAccessLarge(t *testing.T) {
	w := newVPN(t)
	a := manyPeers(10_000)
	for i := range 300 {
		a.Sources = append(a.Sources, Source{netip.PrefixFrom(numberedAddr(addr("172.16.0.0"), i*256), 24), a.Groups[i%100].Name})
	}
	wide := Group{Name: "wide"}
	for i := range 5000 {
		wide.Reach = append(wide.Reach, Reach{single(numberedAddr(addr("10.44.0.0"), i)), TCP, 80, 443}, Reach{single(numberedAddr(addr("10.45.0.0"), i)), TCP, 443, 443})
	}
	a.Groups = append(a.Groups, wide)
	a.Sources = append(a.Sources, sources("wide", alice4)...)
	begun := time.Now()
	w.apply(a)
	t.Logf("loaded in %v", time.Since(begun))
	if h, err := w.conn.read(); err != nil || !h.Intact {
		t.Errorf("%+v, %v", h, err)
	}
	begun = time.Now()
	if done := w.apply(a); done.Changed {
		t.Errorf("%+v", done)
	}
	t.Logf("applied again in %v", time.Since(begun))
	a.Sources = a.Sources[2:]
	begun = time.Now()
	if done := w.apply(a); done.Replaced || !done.Changed {
		t.Errorf("%+v", done)
	}
	t.Logf("without one peer in %v", time.Since(begun))
	to := numberedAddr(addr("10.44.0.0"), 4999)
	w.probe([]probe{{alice4, TCP, to, 80}, {alice4, TCP, to, 443}, {alice4, TCP, numberedAddr(addr("10.45.0.0"), 4999), 443}, {alice4, TCP, to, 444}, {alice4, UDP, to, 80}})
	granted, err := w.conn.Granted()
	if err != nil {
		t.Fatal(err)
	}
	denied, err := w.conn.Denied()
	if err != nil {
		t.Fatal(err)
	}
	denied = slices.DeleteFunc(denied, func(a Attempt) bool { return a.From != alice4 })
	if len(granted) != 3 || len(denied) != 2 {
		t.Errorf("granted %+v, denied %+v", granted, denied)
	}

	// All peers go at once, and come again.
	all := a.Sources
	a.Sources = nil
	if done := w.apply(a); done.Replaced {
		t.Errorf("%+v", done)
	}
	a.Sources = all
	if done := w.apply(a); done.Replaced {
		t.Errorf("%+v", done)
	}
	if h, err := w.conn.read(); err != nil || !h.Intact {
		t.Errorf("%+v, %v", h, err)
	}
}

// What cannot be written leaves what is enforced.
func TestAccessErrors(t *testing.T) {
	w := newVPN(t)
	port := w.inPod.Addr.Port()
	if h, err := w.conn.read(); err != nil || h.Present {
		t.Errorf("read nothing: %+v, %v", h, err)
	}
	if n, err := w.conn.Counters(); err != nil || n != (AccessCounters{}) {
		t.Errorf("counters of nothing: %+v, %v", n, err)
	}
	if n, err := w.conn.Denied(); err != nil || n != nil {
		t.Errorf("attempts of nothing: %+v, %v", n, err)
	}
	a := w.family()
	w.apply(a)
	pass, fail := both(w.peers, alice4, alice6, TCP, pod4, pod6, port), both(w.peers, bob4, bob6, UDP, pod4, pod6, port)

	// A message that does not fit, as in a namespace where limits cannot be forced.
	raw, err := w.conn.conn.sock.conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 16<<10) })
	if err != nil {
		t.Fatal(err)
	}
	large := manyPeers(1000)
	large.Sources = slices.DeleteFunc(large.Sources, func(s Source) bool {
		return slices.Contains(a.Sources, Source{s.Prefix, "family"}) || s.Prefix == single(bob6)
	})
	large.Sources = append(large.Sources, a.Sources...)
	large.Groups = append(large.Groups, a.Groups...)
	if _, err := w.conn.Apply(large); !errors.Is(err, unix.EMSGSIZE) {
		t.Errorf("a small buffer: %v", err)
	}
	w.demand(pass, fail)
	if done := w.apply(large); !done.Replaced { // with a new connection
		t.Errorf("%+v", done)
	}
	w.demand(pass, fail)
	w.apply(a)

	// A connection that is lost.
	w.conn.conn.sock.close()
	if _, err := w.conn.Apply(large); err == nil {
		t.Error("a closed socket applies")
	}
	w.demand(pass, fail)
	w.apply(large)
	w.demand(pass, fail)
}

// What the administrator saves can be loaded again.
func TestAccessListingLoads(t *testing.T) {
	w := newVPN(t)
	w.conn.Close()
	w.conn = w.open(Options{Shared: true})
	a := w.family()
	a.Groups = append(a.Groups, Group{"all of it", []Reach{{prefix("0.0.0.0/0"), TCP, 1, 65535}, {prefix("::/0"), UDP, 1, 65535}, {single(pod4), Echo, 0, 0}, {single(pod6), Echo, 0, 0}, {single(pod4), UDP, 7, 99}}})
	a.Groups = append(a.Groups, Group{strings.Repeat("a long name ", 30) + "\"}; #", nil})
	a.Sources = append(a.Sources, Source{site4, "all of it"}, Source{site6, a.Groups[2].Name}, Source{prefix("255.255.255.0/24"), ""})
	a.Outward = []Flow{{prefix("0.0.0.0/0"), Reach{site4, UDP, 53, 53}}, {prefix("fd42::/64"), Reach{site6, UDP, 53, 63}}}
	a.Translate = []Translation{{vip4, TCP, 80, 90, pod4, 0}, {vip6, UDP, 80, 80, pod6, 8080}, {vip4, 0, 0, 0, pod4, 0}}
	a.Masquerade = true
	w.apply(a)
	w.peers.UDP(bob4, netip.AddrPortFrom(pod4, 9))
	ping(w.peers, bob6, pod6)
	file := t.TempDir() + "/saved.nft"
	if err := os.WriteFile(file, []byte(w.list()), 0o600); err != nil {
		t.Fatal(err)
	}
	fresh := netns.New(t)
	if _, err := fresh.Exec("nft", "-f", file); err != nil {
		t.Error(err)
	}
	if _, err := fresh.Exec("nft", "-j", "list", "ruleset"); err != nil {
		t.Error(err)
	}
}

// What an Access comes to means the same, and is in the form that the kernel
// takes: no two of its intervals overlap.
func FuzzAccess(f *testing.F) {
	for i := range uint64(20) {
		f.Add(i, i*7)
	}
	f.Fuzz(func(t *testing.T, one, two uint64) {
		v := vary{rand.New(rand.NewPCG(one, two))}
		a := v.access()
		g, err := a.compile()
		if err != nil {
			t.Fatal(err)
		}
		shuffled := a
		shuffled.Sources, shuffled.Everyone = slices.Clone(a.Sources), slices.Clone(a.Everyone)
		v.Shuffle(len(a.Sources), func(i, j int) {
			shuffled.Sources[i], shuffled.Sources[j] = shuffled.Sources[j], shuffled.Sources[i]
		})
		slices.Reverse(shuffled.Everyone)
		if other, err := shuffled.compile(); err != nil || !reflect.DeepEqual(g, other) {
			t.Fatalf("in another order, %+v is another (%v)", a, err)
		}
		for i := range 2 {
			for _, grp := range append(slices.Clone(g.groups), g.everyone) {
				for _, all := range [][]span{slices.Concat(grp.exact[i], grp.boxes[i]), grp.wide[i]} {
					for n, s := range all {
						for _, o := range all[:n] {
							if overlap(s, o, 4+12*i) {
								t.Fatalf("%x and %x overlap", s, o)
							}
						}
					}
				}
			}
			for n := 1; n < len(g.sites[i]); n++ {
				if !g.sites[i][n-1].to.Less(g.sites[i][n].from) {
					t.Fatalf("%v and %v overlap", g.sites[i][n-1], g.sites[i][n])
				}
			}
		}
		for range 200 {
			from, proto, to, port := v.packet()
			if got, want := g.allow(from, proto, to, port), a.allows(from, proto, to, port); got != want {
				t.Fatalf("%v to %v by %d to port %d: %t, want %t by %+v", from, to, proto, port, got, want, a)
			}
		}
		// Apply goes from one to the other by what differs.
		b := v.access()
		h, err := b.compile()
		if err != nil {
			t.Fatal(err)
		}
		for i := range 2 {
			gone, come := differ(g.hosts[i], h.hosts[i], func(a, b host) int { return a.addr.Compare(b.addr) })
			left := slices.DeleteFunc(slices.Clone(g.hosts[i]), func(o host) bool { return slices.Contains(gone, o) })
			left = append(left, come...)
			slices.SortFunc(left, func(a, b host) int { return a.addr.Compare(b.addr) })
			if !slices.Equal(left, h.hosts[i]) {
				t.Fatalf("%v without %v and with %v is not %v", g.hosts[i], gone, come, h.hosts[i])
			}
		}
	})
}

// allow is what the kernel does with what it is told.
func (g *grants) allow(from netip.Addr, proto Proto, to netip.Addr, port uint16) bool {
	i := familyIndex(from)
	in := func(grp *group) bool {
		key := target(to, proto, uint32(port))
		return slices.ContainsFunc(slices.Concat(grp.exact[i], grp.boxes[i], grp.wide[i]), func(s span) bool { return overlap(s, span{key, key}, 4+12*i) })
	}
	name, known := "", false
	for _, s := range g.sites[i] {
		if s.from.Compare(from) <= 0 && from.Compare(s.to) <= 0 {
			name, known = s.group, true
		}
	}
	for _, h := range g.hosts[i] {
		if h.addr == from {
			name, known = h.group, true
		}
	}
	return known && (in(&g.everyone) || slices.ContainsFunc(g.groups, func(grp group) bool { return grp.name == name && in(&grp) }))
}

// overlap reports whether two intervals of targets have one in common.
func overlap(a, b span, width int) bool {
	for _, field := range [][2]int{{0, width}, {width, width + 4}, {width + 4, width + 8}} {
		part := func(k []byte) []byte { return k[field[0]:field[1]] }
		if slices.Compare(part(a.to), part(b.from)) < 0 || slices.Compare(part(b.to), part(a.from)) < 0 {
			return false
		}
	}
	return true
}

func TestAccessValidate(t *testing.T) {
	ok := Access{Interface: "edgeward0"}
	for _, tt := range []struct {
		set  func(*Access)
		want string
	}{
		{func(*Access) {}, ""},
		{func(a *Access) { a.Interface = "" }, "no interface is called"},
		{func(a *Access) { a.Interface = "edge*" }, "no interface is called"},
		{func(a *Access) { a.Interface = "abcdefghijklmnop" }, "no interface is called"},
		{func(a *Access) { a.Networks = []netip.Prefix{{}} }, "networks: no network"},
		{func(a *Access) { a.Sources = []Source{{prefix("10.0.0.0/8"), "x"}} }, `there is no group "x"`},
		{func(a *Access) { a.Sources = []Source{{prefix("10.0.0.1/8"), ""}, {prefix("10.0.0.2/8"), ""}} }, "source 10.0.0.0/8 is there twice"},
		{func(a *Access) { a.Sources = sources("", alice4, bob4, alice4) }, "source 10.66.0.70 is there twice"},
		{func(a *Access) { a.Sources = []Source{{prefix("::ffff:10.66.0.70/128"), ""}, {single(alice4), ""}} }, "is there twice"},
		{func(a *Access) { a.Sources = []Source{{prefix("::ffff:0:0/90"), ""}} }, "it is of IPv4 and IPv6"},
		{func(a *Access) { a.Groups = []Group{{}} }, "a group has no name"},
		{func(a *Access) { a.Groups = []Group{{"a", nil}, {"b", nil}, {"a", nil}} }, `two groups are called "a"`},
		{func(a *Access) { a.Everyone = []Reach{{single(pod4), 132, 1, 1}} }, "everyone: no access is granted to protocol 132"},
		{func(a *Access) { a.Everyone = []Reach{{single(pod4), TCP, 0, 0}} }, "no range of ports: 0 to 0"},
		{func(a *Access) { a.Everyone = []Reach{{single(pod4), UDP, 9, 8}} }, "no range of ports: 9 to 8"},
		{func(a *Access) { a.Everyone = []Reach{{single(pod4), Echo, 9, 9}} }, "an echo has no ports"},
		{func(a *Access) { a.Outward = []Flow{{single(pod6), Reach{single(pod4), TCP, 1, 1}}} }, "different families"},
		{func(a *Access) { a.Outward = []Flow{{single(pod4), Reach{single(pod4), Echo, 0, 0}}} }, "no pings"},
		{func(a *Access) { a.Translate = []Translation{{At: vip4, To: pod6}} }, "no addresses of one family"},
		{func(a *Access) { a.Translate = []Translation{{At: vip4, To: addr("127.0.0.1")}} }, "nothing that comes by a network gets there"},
		{func(a *Access) { a.Translate = []Translation{{At: vip4, To: pod4, Port: 80}} }, "ports without a protocol"},
		{func(a *Access) {
			a.Translate = []Translation{{vip4, TCP, 80, 90, pod4, 0}, {vip4, TCP, 90, 99, pod4, 0}}
		}, "two translations of protocol 6 at port 90"},
		{func(a *Access) {
			a.Translate = []Translation{{vip4, TCP, 80, 90, pod4, 0}, {vip4, UDP, 90, 99, pod4, 0}, {At: vip4, To: pod4}}
		}, ""},
	} {
		a := ok
		tt.set(&a)
		got := ""
		if _, err := a.compile(); err != nil {
			got = err.Error()
		}
		if tt.want == "" && got != "" || !strings.Contains(got, tt.want) {
			t.Errorf("%+v: error %q, want %q", a, got, tt.want)
		}
	}
}

// manyPeers is an Access of n peers of two addresses each, in groups of ten that
// may reach ten services of two addresses each.
func manyPeers(n int) Access {
	a := Access{Interface: "edgeward0", Networks: []netip.Prefix{prefix("10.66.0.0/16"), prefix("fd66::/64")},
		Everyone: []Reach{{single(vpnGateway4), UDP, 53, 53}, {single(vpnGateway6), UDP, 53, 53}}}
	for g := range max(n/100, 1) {
		grp := Group{Name: fmt.Sprintf("group-%d", g)}
		for s := range 10 {
			for _, base := range []netip.Addr{addr("10.43.0.0"), addr("fd43::")} {
				grp.Reach = append(grp.Reach, Reach{single(numberedAddr(base, g*10+s)), TCP, 443, 443})
			}
		}
		a.Groups = append(a.Groups, grp)
	}
	for i := range n {
		g := a.Groups[i%len(a.Groups)].Name
		a.Sources = append(a.Sources, Source{single(numberedAddr(addr("10.66.1.0"), i)), g}, Source{single(numberedAddr(addr("fd66::1:0"), i)), g})
	}
	return a
}

func numberedAddr(base netip.Addr, n int) netip.Addr {
	b := base.As16()
	n += int(b[14])<<8 | int(b[15])
	b[13], b[14], b[15] = b[13]+byte(n>>16), byte(n>>8), byte(n)
	return netip.AddrFrom16(b).Unmap()
}

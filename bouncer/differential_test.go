package bouncer

import (
	"fmt"
	"log/slog"
	"math/rand"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/edgeward/edgeward/internal/lapi"
	"github.com/edgeward/edgeward/internal/netns"
	"github.com/edgeward/edgeward/internal/nft"
)

// TestHundredThousandChanges sends a long random stream through the Sink of a
// bouncer on the real kernel: bans and other remediations of several origins on
// addresses and ranges that overlap, renewed, changed, deleted and ending by
// themselves, deltas and full pulls. A naive oracle that looks at each decision
// says what must be dropped. The kernel is asked by look-ups, and by packets.
func TestHundredThousandChanges(t *testing.T) {
	const changes, ids = 100_000, 1500
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	w := rand.New(rand.NewSource(seed))
	client, ns := netns.New(t), netns.New(t)
	node4, node6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	netns.Cable(
		netns.End{NS: client, Name: "c0", Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.2/24"), netip.MustParsePrefix("2001:db8::2/64")}},
		netns.End{NS: ns, Name: "up0", Addrs: []netip.Prefix{netip.PrefixFrom(node4, 24), netip.PrefixFrom(node6, 64)}})
	places := []netip.Addr{netip.MustParseAddr("203.0.112.0"), netip.MustParseAddr("10.9.0.0"), netip.MustParseAddr("2001:db8:f00::")}
	for i, a := range places {
		p := netip.PrefixFrom(a, a.BitLen()-10)
		client.Own(p)
		ns.Route(p, []netip.Addr{netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8::2")}[i])
	}
	server := ns.Serve(netip.AddrPortFrom(netip.IPv6Unspecified(), 0))
	conn, err := nft.Open(nft.Options{NetNS: ns.FD()})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()

	// Protected: the cable, an address, and a range of each place.
	c := Defaults()
	c.StateDir = ""
	g := &guard{log: slog.New(slog.DiscardHandler)}
	for _, p := range []string{"192.0.2.0/24", "2001:db8::/64", "fe80::/10", "203.0.112.7/32", "203.0.113.64/27", "2001:db8:f00::100/121"} {
		g.fixed = append(g.fixed, Protected{netip.MustParsePrefix(p), "test"})
	}
	b, err := newBouncer(c, conn, g, time.Now, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	b.seenLists() // there are none
	sink := b.Sink()
	turn := func() {
		t.Helper()
		if _, err := b.turn(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	turn()

	pick := func() netip.Addr {
		octets := places[w.Intn(len(places))].AsSlice()
		n := w.Intn(1024)
		octets[len(octets)-2] |= byte(n >> 8)
		octets[len(octets)-1] = byte(n)
		a, _ := netip.AddrFromSlice(octets)
		return a
	}
	oracle := map[int]naive{}
	draw := func() naive {
		a := pick()
		bits := a.BitLen()
		switch n := w.Intn(1000); {
		case n < 150:
			bits -= 1 + w.Intn(6)
		case n == 150:
			bits = w.Intn(a.BitLen() - 10) // wide, up to all there is
		}
		left := time.Hour + time.Duration(w.Intn(100))*time.Minute
		if w.Intn(20) == 0 || bits < a.BitLen()-10 {
			left = time.Duration(1+w.Intn(5)) * time.Second
		}
		return naive{
			prefix: netip.PrefixFrom(a, bits).Masked(), typ: []string{"ban", "ban", "captcha", "odd"}[w.Intn(4)],
			origin: []string{"crowdsec", "cscli", "CAPI", "lists"}[w.Intn(4)], until: time.Now().Add(left),
		}
	}
	add := func(id int, n naive) {
		scope := "Ip"
		if !n.prefix.IsSingleIP() {
			scope = "Range"
		}
		sink.Add(&lapi.Row{ID: id, Scope: scope, Value: n.prefix.String(), Type: n.typ, Origin: n.origin, Scenario: "s", Duration: time.Until(n.until).String()})
	}
	change := func(n int, deltas bool) {
		// An answer of LAPI names an id once.
		for _, id := range w.Perm(ids)[:n] {
			have, ok := oracle[id]
			switch {
			case ok && w.Intn(3) == 0:
				delete(oracle, id)
				if deltas {
					sink.Delete(id)
				}
				continue
			case ok && w.Intn(2) == 0: // renewed, or of another class
				if w.Intn(2) == 0 {
					have.typ = []string{"ban", "captcha"}[w.Intn(2)]
				}
				if have.prefix.Bits() > have.prefix.Addr().BitLen()-10 {
					have.until = time.Now().Add(time.Duration(1+w.Intn(7200)) * time.Second)
				}
			default:
				have = draw()
			}
			if oracle[id] = have; deltas {
				add(id, have)
			}
		}
	}
	// want is the oracle's word, unsure where something has just ended, or will:
	// the end of a range is the agent's to write.
	want := func(a netip.Addr) (drop, sure bool) {
		for _, p := range g.fixed {
			if p.Prefix.Contains(a) {
				return false, true
			}
		}
		now := time.Now()
		sure = true
		for _, n := range oracle {
			if !n.prefix.Contains(a) || n.typ == "captcha" || a.IsPrivate() && (n.origin == "CAPI" || n.origin == "lists") {
				continue
			}
			switch left := n.until.Sub(now); {
			case left > time.Second:
				return true, true
			case left > -2*time.Second:
				sure = false
			}
		}
		return false, sure
	}
	// class is the oracle's word on what drops a: the decision that ends last, of
	// those on a itself if there are any. It is empty where two end about the same
	// time, or one has just ended.
	class := func(a netip.Addr) string {
		now := time.Now()
		var best naive
		sure := true
		for _, n := range oracle {
			if !n.prefix.Contains(a) || n.typ == "captcha" || a.IsPrivate() && (n.origin == "CAPI" || n.origin == "lists") {
				continue
			}
			left := n.until.Sub(now)
			sure = sure && (left > time.Second || left < -3*time.Second)
			if left <= 0 {
				continue
			}
			switch itself, before := n.prefix.IsSingleIP(), best.prefix.IsValid() && best.prefix.IsSingleIP(); {
			case !best.prefix.IsValid(), itself && !before:
				best = n
			case !itself && before:
			default:
				gap := n.until.Sub(best.until)
				sure = sure && (n.origin == best.origin || gap.Abs() > 5*time.Second)
				if gap > 0 {
					best = n
				}
			}
		}
		if !sure || !best.prefix.IsValid() {
			return ""
		}
		if best.origin == "lists" {
			return "ban/lists:s"
		}
		return "ban/" + best.origin
	}
	protected := func(a netip.Addr) bool {
		return slices.ContainsFunc(g.fixed, func(p Protected) bool { return p.Prefix.Contains(a) })
	}
	asked, dropped, classed, sent := 0, 0, 0, 0
	ask := func(what string, n int) {
		t.Helper()
		addrs := make([]netip.Addr, n)
		for i := range addrs {
			addrs[i] = pick()
		}
		found, err := conn.Sample(addrs)
		if err != nil {
			t.Fatal(err)
		}
		for i, a := range addrs {
			drop, sure := want(a)
			if !sure {
				continue
			}
			asked++
			if got := found[i].Banned() && !protected(a); got != drop {
				t.Fatalf("%s: the kernel drops %v: %v, want %v (%+v)", what, a, got, drop, found[i])
			} else if got {
				dropped++
				if want := class(a); want != "" {
					if classed++; found[i].Name != want {
						t.Fatalf("%s: %v is dropped as %s, want %s", what, a, found[i].Name, want)
					}
				}
			}
		}
	}
	send := func(what string, n int) {
		t.Helper()
		var wg sync.WaitGroup
		for range n {
			a := pick()
			drop, sure := want(a)
			if !sure {
				continue
			}
			sent++
			wg.Go(func() {
				to := netip.AddrPortFrom(node4, server.Addr.Port())
				if a.Is6() {
					to = netip.AddrPortFrom(node6, server.Addr.Port())
				}
				err := client.UDP(a, to)
				for range 3 { // a busy machine may be late, but no packet passes by chance
					if err == nil || drop {
						break
					}
					err = client.UDP(a, to)
				}
				if (err != nil) != drop {
					t.Errorf("%s: a packet from %v: %v, want drop %v", what, a, err, drop)
				}
			})
		}
		wg.Wait()
	}

	const batch = 200
	began := time.Now()
	for step := range changes / batch {
		what := fmt.Sprintf("step %d", step)
		full := step%50 == 0
		if full {
			change(batch, false)
			for doubt := true; doubt; {
				sink.Begin(true, time.Now())
				for id, n := range oracle {
					if time.Until(n.until) > 0 {
						add(id, n)
					}
				}
				doubt = sink.Commit()
			}
		} else {
			sink.Begin(false, time.Now())
			change(batch, true)
			sink.Commit()
		}
		if step%5 == 0 {
			turn()
			ask(what, 200)
		}
		if step%60 == 59 {
			send(what, 100)
		}
		if t.Failed() {
			return
		}
	}
	r := b.enforcer.stands()
	t.Logf("%d changes in %v: %d updates, %d installs; %d look-ups, %d of them dropped, %d of a known class, and %d packets agree with the oracle",
		changes, time.Since(began).Round(time.Millisecond), r.Updates, r.Installs, asked, dropped, classed, sent)
	if r.Failures != 0 || r.Interference != 0 {
		t.Errorf("report %+v", r)
	}
	if dropped < asked/10 || dropped > asked*9/10 || classed < dropped/2 || sent < 300 {
		t.Errorf("of %d look-ups %d are drops, and %d packets were sent: nothing is shown", asked, dropped, sent)
	}
}

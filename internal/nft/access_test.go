package nft

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/edgeward/edgeward/internal/netns"
)

// try is an attempt to reach something by TCP or UDP.
type try struct {
	ns    *netns.NS
	from  netip.Addr
	proto Proto
	to    netip.AddrPort
}

func (tr try) do() error {
	if tr.proto == UDP {
		return tr.ns.UDP(tr.from, tr.to)
	}
	return tr.ns.TCP(tr.from, tr.to)
}

func (tr try) String() string {
	return fmt.Sprintf("%v to %v by %s", tr.from, tr.to, map[Proto]string{TCP: "tcp", UDP: "udp"}[tr.proto])
}

// demand tries all at once, and demands that those of pass succeed and those of
// fail do not; of the latter those from peers at once.
func (w *vpn) demand(pass, fail []try) {
	w.t.Helper()
	var wg sync.WaitGroup
	var mu sync.Mutex
	complain := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		w.t.Errorf(format, args...)
	}
	for _, tr := range pass {
		wg.Go(func() {
			if err := tr.do(); err != nil {
				complain("%v: %v", tr, err)
			}
		})
	}
	for _, tr := range fail {
		wg.Go(func() {
			err := tr.do()
			switch {
			case err == nil:
				complain("%v passed", tr)
			case tr.ns == w.peers && !slices.ContainsFunc(refusals[tr.proto], func(want error) bool { return errors.Is(err, want) }):
				complain("%v was not refused at once: %v", tr, err)
			}
		})
	}
	wg.Wait()
}

// refusals are what comes of a refused attempt, by IPv4 and IPv6.
var refusals = map[Proto][]error{TCP: {syscall.ECONNREFUSED}, UDP: {syscall.EHOSTUNREACH, syscall.EACCES}}

// both are tries from one peer's addresses of both families.
func both(ns *netns.NS, from4, from6 netip.Addr, proto Proto, to4, to6 netip.Addr, port uint16) []try {
	return []try{{ns, from4, proto, netip.AddrPortFrom(to4, port)}, {ns, from6, proto, netip.AddrPortFrom(to6, port)}}
}

// reaches are Reaches of both families.
func reaches(to4, to6 netip.Addr, proto Proto, first, last uint16) []Reach {
	return []Reach{{single(to4), proto, first, last}, {single(to6), proto, first, last}}
}

func sources(group string, of ...netip.Addr) []Source {
	var out []Source
	for _, a := range of {
		out = append(out, Source{single(a), group})
	}
	return out
}

// family is an Access in which Alice may reach the pod's port by TCP.
func (w *vpn) family() Access {
	port := w.inPod.Addr.Port()
	return Access{
		Interface: "edgeward0", Networks: vpnNets,
		Sources: slices.Concat(sources("family", alice4, alice6), sources("", bob4, bob6)),
		Groups:  []Group{{"family", reaches(pod4, pod6, TCP, port, port)}},
	}
}

// free is the first port after one that is free for UDP.
func free(ns *netns.NS, after uint16) (port uint16) {
	for port = after + 1; ; port++ {
		if ns.Run(func() error {
			c, err := net.ListenUDP("udp", &net.UDPAddr{Port: int(port)})
			if err == nil {
				c.Close()
			}
			return err
		}) == nil {
			return port
		}
	}
}

// Who may reach what, and nobody anything else.
func TestAccess(t *testing.T) {
	w := newVPN(t)
	pod, gw := w.inPod.Addr.Port(), w.onGateway.Addr.Port()
	second := w.pod.Serve(netip.AddrPortFrom(netip.IPv6Unspecified(), 0)).Addr.Port()
	peers, atPeers := w.peers, w.atPeers.Addr.Port()
	guest4, guest6 := addr("192.168.7.9"), addr("fd77::9")
	server4, server6 := addr("192.168.7.200"), addr("fd77::200")
	lost4, lost6 := addr("10.66.0.99"), addr("fd66::1:99")
	// The cluster's own proxy.
	load(t, w.gateway, fmt.Sprintf(`
		table inet services { chain p { type nat hook prerouting priority dstnat;
			ip daddr %v tcp dport 80 dnat ip to %v:%d
			ip6 daddr %v tcp dport 80 dnat ip6 to [%v]:%d
		}
		chain m { type nat hook postrouting priority srcnat;
			ct original ip daddr %[1]v masquerade
		}
		}`, cluster4, pod4, pod, cluster6, pod6, pod))

	a := Access{
		Interface: "edgeward0", Networks: vpnNets,
		Sources: slices.Concat(sources("family", alice4, alice6), sources("admins", bob4, bob6), sources("", carol4, carol6),
			[]Source{{site4, "admins"}, {site6, "admins"}, {prefix("192.168.7.128/25"), "servers"}, {prefix("fd77::/121"), "admins"}, {prefix("fd77::100/120"), ""}, {prefix("fd77::200/120"), "servers"}}),
		Groups: []Group{
			{"family", slices.Concat(reaches(cluster4, cluster6, TCP, 80, 80), reaches(pod4, pod6, UDP, second, second), reaches(pod4, pod6, Echo, 0, 0))},
			{"admins", []Reach{{prefix("10.42.0.0/24"), TCP, 1, 65535}, {prefix("fd42::/64"), TCP, 1, 65535}, {single(pod4), UDP, pod, pod + 40}, {single(pod6), UDP, pod, pod + 40},
				{single(carol4), TCP, atPeers, atPeers}, {single(carol6), TCP, atPeers, atPeers}}},
			{"servers", nil},
		},
		Everyone: slices.Concat(reaches(vpnGateway4, vpnGateway6, UDP, gw, gw), reaches(vpnGateway4, vpnGateway6, Echo, 0, 0)),
		Outward: []Flow{
			{prefix("10.42.0.0/24"), reach(netip.AddrPortFrom(server4, atPeers), TCP)}, {prefix("fd42::/64"), reach(netip.AddrPortFrom(server6, atPeers), TCP)},
			{single(vpnGateway4), reach(netip.AddrPortFrom(guest4, atPeers), TCP)}, {single(vpnGateway6), reach(netip.AddrPortFrom(guest6, atPeers), TCP)},
		},
	}
	pass := slices.Concat(
		both(peers, alice4, alice6, TCP, cluster4, cluster6, 80),
		both(peers, alice4, alice6, UDP, pod4, pod6, second),
		both(peers, bob4, bob6, TCP, pod4, pod6, pod),
		both(peers, bob4, bob6, TCP, pod4, pod6, second),
		both(peers, bob4, bob6, UDP, pod4, pod6, pod),
		both(peers, guest4, guest6, TCP, pod4, pod6, second),
		both(peers, carol4, carol6, UDP, vpnGateway4, vpnGateway6, gw),
		both(peers, alice4, alice6, UDP, vpnGateway4, vpnGateway6, gw),
		both(peers, server4, server6, UDP, vpnGateway4, vpnGateway6, gw),
		both(w.pod, pod4, pod6, TCP, server4, server6, atPeers),
		both(w.gateway, vpnGateway4, vpnGateway6, TCP, guest4, guest6, atPeers),
		both(w.gateway, vpnGateway4, vpnGateway6, TCP, vpnGateway4, vpnGateway6, gw), // by loopback
		both(w.pod, pod4, pod6, TCP, addr("10.42.0.1"), addr("fd42::1"), gw),
	)
	fail := slices.Concat(
		both(peers, alice4, alice6, TCP, pod4, pod6, pod), // past the cluster's address
		both(peers, alice4, alice6, TCP, pod4, pod6, second),
		both(peers, alice4, alice6, UDP, pod4, pod6, pod),
		both(peers, bob4, bob6, TCP, cluster4, cluster6, 80),
		both(peers, bob4, bob6, TCP, vpnGateway4, vpnGateway6, gw),               // this machine
		both(peers, alice4, alice6, TCP, addr("10.42.0.1"), addr("fd42::1"), gw), // by another of its addresses
		both(peers, carol4, carol6, TCP, pod4, pod6, pod),
		both(peers, server4, server6, TCP, pod4, pod6, pod),
		both(peers, addr("192.168.7.128"), addr("fd77::100"), TCP, pod4, pod6, pod),
		both(w.pod, pod4, pod6, TCP, alice4, alice6, atPeers),
		both(w.pod, pod4, pod6, TCP, addr("192.168.7.201"), addr("fd77::201"), atPeers),
		both(w.pod, pod4, pod6, TCP, guest4, guest6, atPeers),
		both(w.gateway, vpnGateway4, vpnGateway6, TCP, alice4, alice6, atPeers),
		both(w.gateway, vpnGateway4, vpnGateway6, TCP, server4, server6, atPeers),
	)
	w.demand(slices.Concat(pass, fail), nil) // else this shows nothing
	w.apply(a)
	w.demand(pass, slices.Concat(fail,
		both(peers, alice4, alice6, TCP, cluster4, cluster6, 81),
		both(peers, lost4, lost6, UDP, vpnGateway4, vpnGateway6, gw), // an address of nobody
		both(peers, lost4, lost6, TCP, pod4, pod6, pod),
		both(peers, bob4, bob6, UDP, pod4, pod6, pod-1),
		both(peers, bob4, bob6, UDP, pod4, pod6, pod+41)))
	// A granted port that nobody listens on says so.
	for _, tr := range both(peers, bob4, bob6, UDP, pod4, pod6, free(w.pod, pod)) {
		if err := tr.do(); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%v: %v", tr, err)
		}
	}
	for _, p := range []struct {
		from, to netip.Addr
		pass     bool
	}{
		{alice4, pod4, true}, {alice6, pod6, true}, {alice4, vpnGateway4, true}, {carol6, vpnGateway6, true},
		{bob4, pod4, false}, {bob6, pod6, false}, {alice4, addr("10.42.0.1"), false}, {lost4, vpnGateway4, false},
	} {
		if err := ping(peers, p.from, p.to); (err == nil) != p.pass {
			t.Errorf("ping from %v to %v: %v", p.from, p.to, err)
		}
	}
	text := w.list()
	for _, want := range []string{
		`iifname "edgeward0" goto enter_1`, "ip saddr vmap @hosts4_1", "ip daddr . meta l4proto . th dport @ports4-family_1 goto granted_1",
		"ip saddr . meta l4proto . th sport @ranges4-admins_1 accept", "10.42.0.0/24 . tcp . 1-65535",
		"ip daddr . meta l4proto . th dport @wide4-admins_1 fib daddr type != local fib daddr type != broadcast", "192.168.7.128/25 : goto group-servers_1",
		"reject with icmpx admin-prohibited", "meta l4proto tcp reject with tcp reset", "tcp option maxseg size set rt mtu",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("nft does not list %q", want)
		}
	}
}

// A network that is granted is what is around this machine, and not the machine
// itself, whatever its addresses are: those are granted one by one.
func TestAccessOfThisMachine(t *testing.T) {
	w := newVPN(t)
	pod, gw := w.inPod.Addr.Port(), w.onGateway.Addr.Port()
	public4, public6 := addr("203.0.113.5"), addr("2001:db8:5::5")
	w.gateway.MustExec("ip", "addr", "add", "203.0.113.5/24", "dev", "cni0")
	w.gateway.MustExec("ip", "addr", "add", "2001:db8:5::5/64", "dev", "cni0", "nodad")
	lan4, lan6 := addr("10.42.0.1"), addr("fd42::1")
	everything := []Reach{
		{prefix("0.0.0.0/0"), TCP, 1, 65535}, {prefix("0.0.0.0/0"), UDP, 1, 65535}, {prefix("0.0.0.0/0"), Echo, 0, 0},
		{prefix("::/0"), TCP, 1, 65535}, {prefix("::/0"), UDP, 1, 65535}, {prefix("::/0"), Echo, 0, 0},
	}
	a := Access{
		Interface: "edgeward0", Networks: vpnNets,
		Sources: slices.Concat(sources("all", alice4, alice6), sources("admins", bob4, bob6)),
		Groups:  []Group{{"all", everything}, {"admins", slices.Concat(everything, reaches(public4, public6, TCP, gw, gw), reaches(lan4, lan6, TCP, 1, 65535), reaches(public4, public6, Echo, 0, 0))}},
	}
	own := slices.Concat(
		both(w.peers, bob4, bob6, TCP, public4, public6, gw),
		both(w.peers, bob4, bob6, TCP, lan4, lan6, gw))
	around := slices.Concat(
		both(w.peers, alice4, alice6, TCP, pod4, pod6, pod), both(w.peers, alice4, alice6, UDP, pod4, pod6, pod),
		both(w.peers, bob4, bob6, TCP, pod4, pod6, pod))
	fail := slices.Concat(
		both(w.peers, alice4, alice6, TCP, public4, public6, gw),
		both(w.peers, alice4, alice6, TCP, lan4, lan6, gw), both(w.peers, alice4, alice6, TCP, vpnGateway4, vpnGateway6, gw),
		both(w.peers, alice4, alice6, UDP, vpnGateway4, vpnGateway6, gw), both(w.peers, bob4, bob6, TCP, vpnGateway4, vpnGateway6, gw))
	w.demand(slices.Concat(own, around, fail), nil) // else this shows nothing
	w.apply(a)
	w.demand(slices.Concat(own, around), fail)
	for _, p := range []struct {
		from, to netip.Addr
		pass     bool
	}{
		{alice4, pod4, true}, {alice6, pod6, true}, {alice4, public4, false}, {alice6, public6, false}, {bob4, public4, true}, {bob6, public6, true}, {bob4, lan4, false},
	} {
		if err := ping(w.peers, p.from, p.to); (err == nil) != p.pass {
			t.Errorf("ping from %v to %v: %v", p.from, p.to, err)
		}
	}

	// What stands by a single address ends with it, though a network holds that.
	var conns []net.Conn
	for _, tr := range both(w.peers, bob4, bob6, TCP, public4, public6, gw) {
		c, err := w.peers.Dial(tr.from, tr.to)
		if err == nil {
			defer c.Close()
			err = netns.Echo(c)
		}
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	a.Groups = []Group{a.Groups[0], {"admins", everything}}
	w.apply(a)
	for _, c := range conns {
		if netns.Echo(c) == nil {
			t.Errorf("%v still reaches %v", c.LocalAddr(), c.RemoteAddr())
		}
	}
}

// A running connection ends with its grant, whichever way its packets go, and goes
// on where its own was not touched.
func TestAccessRevoked(t *testing.T) {
	for _, tt := range []struct {
		name   string
		revoke func(*Access)
		ends   bool
	}{
		{"the peer goes", func(a *Access) { a.Sources = a.Sources[2:] }, true},
		{"the peer leaves its group", func(a *Access) { a.Sources = append(sources("", alice4, alice6), a.Sources[2:]...) }, true},
		{"the group may less", func(a *Access) { a.Groups[0].Reach = nil }, true},
		{"all is written anew", func(a *Access) { a.Groups, a.Masquerade = []Group{{"family", nil}}, true }, true},
		{"another peer goes", func(a *Access) { a.Sources = a.Sources[:2] }, false},
		{"another group comes", func(a *Access) {
			a.Groups = append(a.Groups, Group{"friends", reaches(pod4, pod6, TCP, 1, 9)})
			a.Sources = append(sources("friends", carol4), a.Sources...)
		}, false},
		{"something else changes", func(a *Access) { a.Everyone = reaches(vpnGateway4, vpnGateway6, UDP, 53, 53) }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newVPN(t)
			port := w.inPod.Addr.Port()
			a := w.family()
			a.Groups[0].Reach = append(a.Groups[0].Reach, reaches(pod4, pod6, UDP, port, port)...)
			w.apply(a)
			var conns []net.Conn
			for _, tr := range slices.Concat(both(w.peers, alice4, alice6, TCP, pod4, pod6, port), both(w.peers, alice4, alice6, UDP, pod4, pod6, port)) {
				dial := tr.ns.Dial
				if tr.proto == UDP {
					dial = tr.ns.DialUDP
				}
				c, err := dial(tr.from, tr.to)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				if err := netns.Echo(c); err != nil {
					t.Fatal(err)
				}
				conns = append(conns, c)
			}
			before := w.counters().Revoked
			pushed := w.push(alice4, alice6)
			change := a
			change.Groups, change.Sources = slices.Clone(a.Groups), slices.Clone(a.Sources)
			tt.revoke(&change)
			w.apply(change)
			time.Sleep(5 * time.Millisecond) // what is on its way
			was := pushed()
			time.Sleep(50 * time.Millisecond)
			if more := pushed() - was; more > 0 == tt.ends {
				t.Errorf("%d packets that the pod sends unasked arrived after that", more)
			}
			if tt.ends && w.counters().Revoked == before {
				t.Error("answers that were stopped were not counted")
			}
			heard := w.inPod.Received()
			var wg sync.WaitGroup
			for _, c := range conns {
				wg.Go(func() {
					if err := netns.Echo(c); (err != nil) != tt.ends {
						t.Errorf("%s from %v: %v", c.RemoteAddr().Network(), c.LocalAddr(), err)
					}
				})
			}
			wg.Wait()
			if got := w.inPod.Received(); tt.ends && !maps.Equal(got, heard) {
				t.Errorf("the pod had heard %v, and then hears %v", heard, got)
			}
		})
	}
}

// push lets the pod send to peers that once spoke to it, and never again do, and
// returns a function that counts what arrives.
func (w *vpn) push(to ...netip.Addr) func() int {
	w.t.Helper()
	var arrived atomic.Int64
	port := w.inPod.Addr.Port()
	for _, a := range to {
		at := netip.AddrPortFrom(pod4, port)
		if a.Is6() {
			at = netip.AddrPortFrom(pod6, port)
		}
		c, err := w.peers.DialUDP(a, at)
		if err != nil {
			w.t.Fatal(err)
		}
		w.t.Cleanup(func() { c.Close() })
		if err := netns.Echo(c); err != nil {
			w.t.Fatal(err)
		}
		c.SetDeadline(time.Time{})
		go func() {
			for buf := make([]byte, 64); ; {
				if _, err := c.Read(buf); err == nil {
					arrived.Add(1)
				} else if errors.Is(err, net.ErrClosed) {
					return
				}
			}
		}()
		w.inPod.Push(netip.MustParseAddrPort(c.LocalAddr().String()), time.Millisecond)
	}
	return func() int { return int(arrived.Load()) }
}

func (w *vpn) counters() AccessCounters {
	w.t.Helper()
	n, err := w.conn.Counters()
	if err != nil {
		w.t.Fatal(err)
	}
	return n
}

// What was granted is sent on to where it is served, with the peer's own address,
// and comes back from where it was asked for.
func TestAccessTranslate(t *testing.T) {
	w := newVPN(t)
	port, gw := w.inPod.Addr.Port(), w.onGateway.Addr.Port()
	other := addr("10.42.9.9")
	w.pod.Own(single(other))
	w.gateway.Route(single(other), pod4)
	// A proxy of the cluster's that would take port 53 of every address here.
	load(t, w.gateway, `table inet services { chain p { type nat hook prerouting priority dstnat;
		fib daddr type local udp dport 53 dnat ip to 192.0.2.99
		ip daddr 192.0.2.50 tcp dport 81 dnat ip to `+netip.AddrPortFrom(other, port).String()+`
		}
		}`)
	shared := addr("192.0.2.50") // the proxy has some of its ports, and we the others
	a := Access{
		Interface: "edgeward0", Networks: slices.Concat(vpnNets, []netip.Prefix{prefix("10.66.1.0/24"), prefix("fd66:0:0:1::/64")}),
		Sources:  slices.Concat(sources("family", alice4, alice6), sources("", bob4, bob6)),
		Groups:   []Group{{"family", slices.Concat(reaches(vip4, vip6, TCP, port-1, port+1), reaches(vip4, vip6, UDP, 80, 80), reaches(vip4, vip6, Echo, 0, 0), []Reach{{single(shared), TCP, 80, 81}})}},
		Everyone: slices.Concat(reaches(vpnGateway4, vpnGateway6, UDP, 53, 53)),
		Translate: []Translation{
			{At: vip4, To: pod4}, {At: vip6, To: pod6},
			{At: vip4, Proto: UDP, First: 80, Last: 89, To: pod4, Port: port}, {At: vip6, Proto: UDP, First: 80, Last: 89, To: pod6, Port: port},
			{At: vpnGateway4, Proto: UDP, First: 53, Last: 53, To: vpnGateway4, Port: gw}, {At: vpnGateway6, Proto: UDP, First: 53, Last: 53, To: vpnGateway6, Port: gw},
			{At: shared, Proto: TCP, First: 80, Last: 80, To: pod4, Port: port},
		},
	}
	w.apply(a)
	pass := slices.Concat(
		both(w.peers, alice4, alice6, TCP, vip4, vip6, port),
		both(w.peers, alice4, alice6, UDP, vip4, vip6, 80),
		both(w.peers, bob4, bob6, UDP, vpnGateway4, vpnGateway6, 53),
		[]try{{w.peers, alice4, TCP, netip.AddrPortFrom(shared, 80)}, {w.peers, alice4, TCP, netip.AddrPortFrom(shared, 81)}},
	)
	fail := slices.Concat(
		both(w.peers, bob4, bob6, UDP, vip4, vip6, 80),
		both(w.peers, alice4, alice6, UDP, vip4, vip6, 81),
		both(w.peers, alice4, alice6, TCP, pod4, pod6, port),
		both(w.peers, alice4, alice6, UDP, vpnGateway4, vpnGateway6, gw),
	)
	w.demand(pass, fail)
	for _, p := range [][2]netip.Addr{{alice4, vip4}, {alice6, vip6}} {
		if err := ping(w.peers, p[0], p[1]); err != nil {
			t.Errorf("ping from %v to %v: %v", p[0], p[1], err)
		}
	}
	if got := w.inPod.Received(); got[alice4] == 0 || got[alice6] == 0 || len(got) != 2 {
		t.Errorf("the pod heard from %v, want Alice's addresses", got)
	}
	if got := w.onGateway.Received(); got[bob4] == 0 || got[bob6] == 0 {
		t.Errorf("the gateway heard from %v, want Bob's addresses", got)
	}

	a.Masquerade = true
	w.apply(a)
	w.demand(pass, fail)
	if got := w.inPod.Received(); got[addr("10.42.0.1")] == 0 || got[addr("fd42::1")] == 0 {
		t.Errorf("the pod heard from %v, want the gateway's addresses", got)
	}
	if got := w.onGateway.Received(); len(got) != 2 {
		t.Errorf("the gateway heard from %v, want no more than Bob's addresses", got)
	}

	// What runs goes on as long as it would lead to where it does, and not beyond.
	a.Masquerade = false
	w.apply(a)
	var conns []net.Conn
	for _, tr := range slices.Concat(pass[:4], both(w.peers, alice4, alice6, TCP, vip4, vip6, port)) {
		dial := tr.ns.Dial
		if tr.proto == UDP {
			dial = tr.ns.DialUDP
		}
		c, err := dial(tr.from, tr.to)
		if err == nil {
			defer c.Close()
			err = netns.Echo(c)
		}
		if err != nil {
			t.Fatalf("%v: %v", tr, err)
		}
		conns = append(conns, c)
	}
	echoes := func(when string, want bool) {
		t.Helper()
		var wg sync.WaitGroup
		for _, c := range conns {
			wg.Go(func() {
				if err := netns.Echo(c); (err == nil) != want {
					t.Errorf("%s, %v to %v: %v", when, c.LocalAddr(), c.RemoteAddr(), err)
				}
			})
		}
		wg.Wait()
	}
	a.Networks = append(a.Networks, site4) // all is written anew
	w.apply(a)
	echoes("after the same again", true)
	stream, err := w.peers.DialUDP(alice4, netip.AddrPortFrom(vip4, 80))
	if err == nil {
		defer stream.Close()
		err = netns.Echo(stream)
	}
	if err != nil {
		t.Fatal(err)
	}
	w.inPod.Push(netip.MustParseAddrPort(stream.LocalAddr().String()), time.Millisecond)
	arrive := func() (n int) {
		time.Sleep(5 * time.Millisecond) // what is on its way
		for end := time.Now().Add(50 * time.Millisecond); ; n++ {
			if err := stream.SetReadDeadline(end); err != nil {
				t.Fatal(err)
			}
			if _, err := stream.Read(make([]byte, 64)); err != nil || time.Now().After(end) {
				return n
			}
		}
	}
	if arrive() < 10 {
		t.Error("nothing is sent one way: this shows little")
	}
	turned := slices.Clone(a.Translate)
	for i := range turned[:4] {
		turned[i].To = []netip.Addr{addr("10.42.0.1"), addr("fd42::1")}[i%2]
	}
	a.Translate = turned
	w.apply(a)
	echoes("after it leads elsewhere", false)
	arrive() // what waited to be read
	if n := arrive(); n > 0 {
		t.Errorf("after it leads elsewhere %d packets came one way", n)
	}

	a.Translate = nil
	w.apply(a)
	if text := w.list(); strings.Contains(text, " dnat ip") || strings.Contains(text, " masquerade\n") {
		t.Error("what is translated no more still is")
	}
}

// Whoever claims an address of the VPN and comes from elsewhere is not heard.
func TestAccessForged(t *testing.T) {
	w := newVPN(t)
	w.pod.Own(prefix("10.66.0.70/32"))
	w.pod.Own(prefix("fd66::1:a/128"))
	forged := slices.Concat(
		both(w.pod, alice4, alice6, UDP, addr("10.42.0.1"), addr("fd42::1"), w.onGateway.Addr.Port()),
		both(w.pod, alice4, alice6, UDP, vpnGateway4, vpnGateway6, w.onGateway.Addr.Port()))
	all := w.family()
	all.Everyone = []Reach{{prefix("0.0.0.0/0"), UDP, 1, 65535}, {prefix("::/0"), UDP, 1, 65535}}
	heard := func() int { n := w.onGateway.Received(); return n[alice4] + n[alice6] }
	send := func() {
		var wg sync.WaitGroup
		for _, tr := range forged {
			wg.Go(func() { tr.do() }) // the answer goes elsewhere
		}
		wg.Wait()
	}
	send()
	if heard() != 4 {
		t.Fatalf("without rules %d of 4 arrive: this shows nothing", heard())
	}
	w.apply(all)
	send()
	if n := heard(); n != 4 {
		t.Errorf("%d forged packets were heard", n-4)
	}
	if n := w.counters().Forged; n != 4 {
		t.Errorf("%d forged packets were counted, want 4", n)
	}
}

// Who tried what is told, and how often.
func TestAccessAttempts(t *testing.T) {
	w := newVPN(t)
	port := w.inPod.Addr.Port()
	a := w.family()
	a.Groups[0].Reach = append(a.Groups[0].Reach, reaches(pod4, pod6, Echo, 0, 0)...)
	w.apply(a)
	for range 3 {
		for _, tr := range slices.Concat(both(w.peers, alice4, alice6, TCP, pod4, pod6, port), both(w.peers, bob4, bob6, UDP, pod4, pod6, 9)) {
			tr.do()
		}
		ping(w.peers, bob4, pod4)
		ping(w.peers, alice6, pod6)
	}
	a.Masquerade = true // a new generation goes on with the same counts
	w.apply(a)
	both(w.peers, bob4, bob6, TCP, pod4, pod6, port)[0].do()
	type row struct {
		from, to string
		proto    uint8
		port     uint16
		packets  uint64
	}
	rows := func(attempts []Attempt, err error) (out []row) {
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range attempts {
			if a.From.IsUnspecified() || a.To.IsMulticast() {
				continue // the cable's noise
			}
			if a.Bytes < a.Packets*28 || a.Ago < 0 || a.Ago > time.Minute {
				t.Errorf("%+v", a)
			}
			out = append(out, row{a.From.String(), a.To.String(), a.Proto, a.Port, a.Packets})
		}
		return out
	}
	want := []row{
		{"10.66.0.71", "10.42.0.2", 1, 0, 3}, {"10.66.0.71", "10.42.0.2", 6, port, 1}, {"10.66.0.71", "10.42.0.2", 17, 9, 3},
		{"fd66::1:b", "fd42::2", 17, 9, 3},
	}
	if diff := cmp.Diff(want, rows(w.conn.Denied()), cmp.AllowUnexported(row{})); diff != "" {
		t.Error(diff)
	}
	want = []row{{"10.66.0.70", "10.42.0.2", 6, port, 3}, {"fd66::1:a", "fd42::2", 6, port, 3}, {"fd66::1:a", "fd42::2", 58, 0, 3}}
	if diff := cmp.Diff(want, rows(w.conn.Granted()), cmp.AllowUnexported(row{})); diff != "" {
		t.Error(diff)
	}
	got, err := w.conn.Sources()
	if err != nil {
		t.Fatal(err)
	}
	got = slices.DeleteFunc(got, func(s SourceCount) bool { return s.Addr.IsUnspecified() })
	same := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	if diff := cmp.Diff([]SourceCount{{alice4, 3, 0}, {bob4, 0, 7}, {alice6, 6, 0}, {bob6, 0, 3}}, got, same); diff != "" {
		t.Error(diff)
	}
	if n := w.counters(); n.Granted != 9 || n.Denied < 10 {
		t.Errorf("%+v", n)
	}
	w.gateway.MustExec("nft", "list", "ruleset")

	// A scan costs no more memory than was set aside, and its packets go on being
	// counted.
	blaster := w.peers.Scan(bob4, pod4, 1, 20_000)
	if blaster != 20_000 {
		t.Errorf("%d of 20,000 ports were scanned", blaster)
	}
	denied, err := w.conn.Denied()
	if err != nil {
		t.Fatal(err)
	}
	if n := len(denied); n < attemptLimit*9/10 || n > 2*attemptLimit {
		t.Errorf("%d rows, want about %d", n, attemptLimit)
	}
	if n := w.counters().Denied; n < 20_000 {
		t.Errorf("%d packets were counted, want 20,000", n)
	}
}

// A connection through the gateway does not agree on segments that the VPN cannot
// carry, from whichever side it is opened.
func TestAccessSegments(t *testing.T) {
	w := newVPN(t)
	a := w.family()
	at := w.atPeers.Addr.Port()
	a.Outward = []Flow{{prefix("10.42.0.0/24"), reach(netip.AddrPortFrom(alice4, at), TCP)}, {prefix("fd42::/64"), reach(netip.AddrPortFrom(alice6, at), TCP)}}
	w.apply(a)
	w.gateway.MustExec("ip", "link", "set", "edgeward0", "mtu", "1420")
	for _, tr := range slices.Concat(both(w.peers, alice4, alice6, TCP, pod4, pod6, w.inPod.Addr.Port()), both(w.pod, pod4, pod6, TCP, alice4, alice6, at)) {
		c, err := tr.ns.Dial(tr.from, tr.to)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		raw, err := c.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var mss int
		raw.Control(func(fd uintptr) { mss, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG) })
		want := 1420 - 40 - 12 // with timestamps
		if tr.from.Is6() {
			want -= 20
		}
		if err != nil || mss != want {
			t.Errorf("%v: segments of %d bytes, want %d (%v)", tr, mss, want, err)
		}
	}
}

// Peers reach each other where that is granted, and nowhere else. A bridge stands
// in for WireGuard here, so that two networks can be behind one interface.
func TestAccessBetweenPeers(t *testing.T) {
	gateway, alice, carol := netns.New(t), netns.New(t), netns.New(t)
	gateway.MustExec("ip", "link", "add", "edgeward0", "type", "bridge")
	gateway.MustExec("ip", "addr", "add", "10.66.0.1/32", "dev", "edgeward0")
	gateway.MustExec("ip", "link", "set", "edgeward0", "up")
	for name, end := range map[string]netns.End{"p1": {NS: alice, Name: "wg0", Addrs: []netip.Prefix{single(alice4)}}, "p2": {NS: carol, Name: "wg0", Addrs: []netip.Prefix{single(carol4)}}} {
		netns.Cable(netns.End{NS: gateway, Name: name}, end)
		gateway.Must(func() error { return plug(name, "edgeward0") })
		gateway.MustExec("ip", "route", "add", end.Addrs[0].String(), "dev", "edgeward0")
		end.NS.MustExec("ip", "route", "add", "10.66.0.1", "dev", "wg0")
		end.NS.MustExec("ip", "route", "add", "default", "via", "10.66.0.1")
	}
	gateway.Forwarding()
	gateway.Sysctl("ipv4/conf/all/send_redirects", "0")
	gateway.Sysctl("ipv4/conf/edgeward0/send_redirects", "0")
	atAlice, atCarol := alice.Serve(netip.AddrPortFrom(alice4, 0)), carol.Serve(netip.AddrPortFrom(carol4, 0))
	w := &vpn{t: t, gateway: gateway, peers: alice}
	w.conn = w.open(Options{})
	there, back := try{alice, alice4, TCP, atCarol.Addr}, try{carol, carol4, TCP, atAlice.Addr}
	w.demand([]try{there, back}, nil)

	a := Access{Interface: "edgeward0", Networks: vpnNets, Sources: sources("", alice4, carol4)}
	w.apply(a)
	w.demand(nil, []try{there, back})
	a.Sources, a.Groups = append(sources("guests", alice4), sources("", carol4)...), []Group{{"guests", []Reach{reach(atCarol.Addr, TCP)}}}
	w.apply(a)
	w.demand([]try{there}, []try{back})
	c, err := alice.Dial(alice4, atCarol.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	a.Groups[0].Reach = []Reach{{single(carol4), UDP, 1, 9}}
	w.apply(a)
	if err := netns.Echo(c); err == nil {
		t.Error("a connection outlives its grant")
	}
}

// plug makes an interface a port of a bridge.
func plug(name, bridge string) error {
	port, err := net.InterfaceByName(name)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq(bridge)
	if err != nil {
		return err
	}
	request.SetUint32(uint32(port.Index))
	return unix.IoctlIfreq(fd, unix.SIOCBRADDIF, request)
}

package nft

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"

	"github.com/edgeward/edgeward/internal/netns"
)

// An error passes that its sender tells of a connection of its own, and no other:
// connection tracking takes it for part of the connection that it speaks of.
func TestAccessOwnErrors(t *testing.T) {
	w := newVPN(t)
	pod, atPeers := w.inPod.Addr.Port(), w.atPeers.Addr.Port()
	a := w.family()
	a.Outward = []Flow{{single(pod4), reach(netip.AddrPortFrom(alice4, atPeers), UDP)}, {single(pod6), reach(netip.AddrPortFrom(alice6, atPeers), UDP)}}
	for i, alice := range []netip.Addr{alice4, alice6} {
		at, bob, carol := []netip.Addr{pod4, pod6}[i], []netip.Addr{bob4, bob6}[i], []netip.Addr{carol4, carol6}[i]
		// The pod speaks to Alice as well, by UDP.
		w.inPod.Push(netip.AddrPortFrom(alice, atPeers), 10*time.Millisecond)
		for _, answers := range []bool{false, true} {
			now := a
			if !answers {
				now.Outward = nil
			}
			w.apply(now)
			c, err := w.peers.Dial(alice, netip.AddrPortFrom(at, pod))
			if err == nil {
				defer c.Close()
				err = netns.Echo(c)
			}
			if err != nil {
				t.Fatal(err)
			}
			own := c.LocalAddr().(*net.TCPAddr).AddrPort().Port()
			time.Sleep(50 * time.Millisecond) // the pod speaks
			for _, tt := range []struct {
				what  string
				from  netip.Addr
				proto Proto
				ports [2]uint16 // of the pod and of Alice
				pass  bool
			}{
				{"its own", alice, TCP, [2]uint16{pod, own}, true},
				{"one towards it", alice, UDP, [2]uint16{pod, atPeers}, answers},
				{"another peer's", bob, TCP, [2]uint16{pod, own}, false},
				{"one towards another peer", bob, UDP, [2]uint16{pod, atPeers}, false},
				{"another peer's, from nobody", carol, TCP, [2]uint16{pod, own}, false},
				{"none", alice, TCP, [2]uint16{pod, own + 1}, false},
			} {
				told := netip.AddrPortFrom(at, tt.ports[0])
				heard, err := w.complain(tt.from, told, netip.AddrPortFrom(alice, tt.ports[1]), tt.proto)
				if heard != tt.pass || err != nil {
					t.Errorf("an error from %v about a connection, %s (answers %t): heard %t, %v", tt.from, tt.what, answers, heard, err)
				}
			}
		}
	}
}

// complain sends an ICMP error, as from a peer that got a packet of the pod's, and
// reports whether the pod hears of it.
func (w *vpn) complain(from netip.Addr, pod, peer netip.AddrPort, proto Proto) (heard bool, err error) {
	network, typ, code := "ip4:icmp", icmp.Type(ipv4.ICMPTypeDestinationUnreachable), 3
	var pseudo []byte
	inner := append([]byte{0x45, 0, 0, 40, 0, 1, 0, 0, 64, byte(proto), 0, 0}, slices.Concat(pod.Addr().AsSlice(), peer.Addr().AsSlice())...)
	if from.Is6() {
		network, typ, code = "ip6:ipv6-icmp", ipv6.ICMPTypeDestinationUnreachable, 4
		pseudo = icmp.IPv6PseudoHeader(from.AsSlice(), pod.Addr().AsSlice())
		inner = append([]byte{0x60, 0, 0, 0, 0, 20, byte(proto), 64}, slices.Concat(pod.Addr().AsSlice(), peer.Addr().AsSlice())...)
	} else {
		sum := uint32(0)
		for i := 0; i < 20; i += 2 {
			sum += uint32(binary.BigEndian.Uint16(inner[i:]))
		}
		binary.BigEndian.PutUint16(inner[10:], ^uint16(sum+sum>>16))
	}
	inner = binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(inner, pod.Port()), peer.Port())
	inner = append(inner, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x10, 0, 0, 0, 0, 0, 0)

	var listener *icmp.PacketConn
	if err := w.pod.Run(func() (err error) { listener, err = icmp.ListenPacket(network, pod.Addr().String()); return err }); err != nil {
		return false, err
	}
	defer listener.Close()
	if err := w.peers.Run(func() error {
		c, err := icmp.ListenPacket(network, from.String())
		if err != nil {
			return err
		}
		defer c.Close()
		text, err := (&icmp.Message{Type: typ, Code: code, Body: &icmp.RawBody{Data: append(make([]byte, 4), inner...)}}).Marshal(pseudo)
		if err != nil {
			return err
		}
		_, err = c.WriteTo(text, &net.IPAddr{IP: pod.Addr().AsSlice()})
		return err
	}); err != nil {
		return false, err
	}
	if err := listener.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		return false, err
	}
	for buf := make([]byte, 1500); ; {
		n, by, err := listener.ReadFrom(buf)
		if err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				err = nil
			}
			return false, err
		}
		if m, err := icmp.ParseMessage(typ.Protocol(), buf[:n]); err == nil && m.Type == typ && by.String() == from.String() {
			return true, nil
		}
	}
}

// While the VPN's interface is away, nothing that is for its peers takes another
// way, neither an answer nor what this machine says.
func TestAccessAstray(t *testing.T) {
	w := newVPN(t)
	lan := netns.New(t)
	netns.Cable(
		netns.End{NS: lan, Name: "eth0", Addrs: []netip.Prefix{prefix("192.0.2.2/24"), prefix("2001:db8::2/64")}},
		netns.End{NS: w.gateway, Name: "lan0", Addrs: []netip.Prefix{prefix("192.0.2.1/24"), prefix("2001:db8::1/64")}})
	lan.Route(prefix("0.0.0.0/0"), addr("192.0.2.1"))
	lan.Route(prefix("::/0"), addr("2001:db8::1"))
	// Who is where the default route leads hears what is for the peers.
	w.pod.Own(prefix("10.66.0.64/26"))
	w.pod.Own(prefix("fd66::1:0/112"))
	w.gateway.MustExec("ip", "link", "set", "edgeward0", "down")
	w.gateway.Route(prefix("0.0.0.0/0"), pod4)
	w.gateway.Route(prefix("::/0"), pod6)
	port := w.inPod.Addr.Port()
	heard := func() (n int) {
		t.Helper()
		before := 0
		for _, got := range w.inPod.Received() {
			before += got
		}
		for _, tr := range slices.Concat(
			both(lan, addr("192.0.2.2"), addr("2001:db8::2"), UDP, alice4, alice6, port),
			both(w.gateway, addr("10.42.0.1"), addr("fd42::1"), UDP, alice4, alice6, port)) {
			c, err := tr.ns.DialUDP(tr.from, tr.to)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = c.Write([]byte("hello")) // may be told that it may not
			c.Close()
		}
		time.Sleep(50 * time.Millisecond)
		for _, got := range w.inPod.Received() {
			n += got
		}
		return n - before
	}
	if n := heard(); n != 4 {
		t.Fatalf("without rules %d of 4 arrive: this shows nothing", n)
	}
	w.apply(w.family())
	w.demand(both(lan, addr("192.0.2.2"), addr("2001:db8::2"), TCP, pod4, pod6, port), nil)
	if n := heard(); n > 0 {
		t.Errorf("%d packets for peers went astray", n)
	}
	if n := w.counters().Unasked; n != 4 {
		t.Errorf("%d packets that would have were counted, want 4", n)
	}
}

// What everyone may open is opened at a pace: nobody fills the table of connections
// of the node, and who tries hinders nobody else.
func TestAccessPaced(t *testing.T) {
	w := newVPN(t)
	gw := w.onGateway.Addr.Port()
	a := w.family()
	a.Everyone = reaches(vpnGateway4, vpnGateway6, UDP, gw, gw)
	w.apply(a)
	for _, tr := range both(w.peers, bob4, bob6, UDP, vpnGateway4, vpnGateway6, gw) {
		begun := time.Now()
		for range 3 * paceBurst {
			c, err := w.peers.DialUDP(tr.from, tr.to)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.Write([]byte("hello")); err != nil {
				t.Fatal(err)
			}
			c.Close()
		}
		most := paceBurst + int(paceRate*time.Since(begun).Seconds()) + 10
		if n := w.gateway.Tracked(tr.from); n > most || n < paceBurst/2 {
			t.Errorf("%v has %d connections, want at most %d", tr.from, n, most)
		}
	}
	w.demand(both(w.peers, alice4, alice6, UDP, vpnGateway4, vpnGateway6, gw), nil)
	time.Sleep(50 * time.Millisecond)
	w.demand(both(w.peers, bob4, bob6, UDP, vpnGateway4, vpnGateway6, gw), nil)
}

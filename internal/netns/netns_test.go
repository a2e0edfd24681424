package netns

import (
	"net/netip"
	"strings"
	"testing"
)

// Two namespaces and a router between them: what goes through arrives, and
// nothing of it shows outside.
func TestTraffic(t *testing.T) {
	left, router, right := New(t), New(t), New(t)
	p, a := netip.MustParsePrefix, netip.MustParseAddr
	Cable(End{left, "eth0", []netip.Prefix{p("192.0.2.2/24"), p("2001:db8:1::2/64")}},
		End{router, "left", []netip.Prefix{p("192.0.2.1/24"), p("2001:db8:1::1/64")}})
	Cable(End{right, "eth0", []netip.Prefix{p("198.51.100.2/24"), p("2001:db8:2::2/64")}},
		End{router, "right", []netip.Prefix{p("198.51.100.1/24"), p("2001:db8:2::1/64")}})
	router.Forwarding()
	left.Own(p("203.0.113.0/24"))
	router.Route(p("203.0.113.0/24"), a("192.0.2.2"))
	for ns, via := range map[*NS][]string{left: {"192.0.2.1", "2001:db8:1::1"}, right: {"198.51.100.1", "2001:db8:2::1"}} {
		ns.Route(p("0.0.0.0/0"), a(via[0]))
		ns.Route(p("::/0"), a(via[1]))
	}
	s := right.Serve(netip.AddrPortFrom(netip.IPv6Unspecified(), 0))
	for _, from := range []string{"192.0.2.2", "203.0.113.77", "2001:db8:1::2"} {
		to := netip.AddrPortFrom(a("198.51.100.2"), s.Addr.Port())
		if a(from).Is6() {
			to = netip.AddrPortFrom(a("2001:db8:2::2"), s.Addr.Port())
		}
		if err := left.TCP(a(from), to); err != nil {
			t.Errorf("tcp from %s: %v", from, err)
		}
		if err := left.UDP(a(from), to); err != nil {
			t.Errorf("udp from %s: %v", from, err)
		}
		if n := s.Received()[a(from)]; n != 1 {
			t.Errorf("%d datagrams from %s, want 1", n, from)
		}
	}
	blaster := left.Blast(netip.AddrPortFrom(a("198.51.100.2"), s.Addr.Port()), a("203.0.113.1"), a("203.0.113.2"))
	if err := left.TCP(a("192.0.2.2"), netip.AddrPortFrom(a("198.51.100.2"), s.Addr.Port())); err != nil {
		t.Error(err)
	}
	if n, err := blaster.Stop(); err != nil || n == 0 {
		t.Errorf("sent %d: %v", n, err)
	}
	if err := left.TCP(a("192.0.2.2"), netip.AddrPortFrom(a("198.51.100.2"), 1)); err == nil {
		t.Error("a connection to a closed port")
	}
	if out := router.MustExec("ip", "-o", "link"); strings.Count(out, "\n") != 3 {
		t.Errorf("the router has these interfaces:\n%s", out)
	}
}

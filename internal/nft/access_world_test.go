package nft

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/edgeward/edgeward/internal/netns"
)

// vpn is a gateway with peers on one side and a pod on the other:
//
//	peers wg0 ── edgeward0 gateway cni0 ── p0 pod
//
// A cable stands in for WireGuard, which would let each peer speak from its own
// addresses alone. Here one namespace speaks for all of them.
type vpn struct {
	t                   testing.TB
	peers, gateway, pod *netns.NS
	onGateway, inPod    *netns.Server
	atPeers             *netns.Server
	conn                *AccessConn
}

var (
	vpnGateway4, vpnGateway6 = addr("10.66.0.1"), addr("fd66::1")
	vpnNets                  = []netip.Prefix{prefix("10.66.0.0/24"), prefix("fd66::/64")}

	// Whose addresses these are is up to the Access of each test.
	alice4, alice6 = addr("10.66.0.70"), addr("fd66::1:a")
	bob4, bob6     = addr("10.66.0.71"), addr("fd66::1:b")
	carol4, carol6 = addr("10.66.0.72"), addr("fd66::1:c")
	site4, site6   = prefix("192.168.7.0/24"), prefix("fd77::/64")

	vip4, vip6         = addr("10.66.1.10"), addr("fd66:0:0:1::10") // which no cable has to find
	cluster4, cluster6 = addr("10.43.0.10"), addr("fd43::10")
)

func newVPN(t testing.TB) *vpn {
	t.Helper()
	w := &vpn{t: t, peers: netns.New(t), gateway: netns.New(t), pod: netns.New(t)}
	for _, ns := range []*netns.NS{w.peers, w.gateway} {
		ns.Sysctl("ipv6/conf/default/addr_gen_mode", "1") // WireGuard has no such addresses either
	}
	for _, ns := range []*netns.NS{w.peers, w.gateway, w.pod} {
		ns.Sysctl("ipv4/icmp_ratelimit", "0")
		ns.Sysctl("ipv6/icmp/ratelimit", "0")
		ns.Sysctl("ipv4/ping_group_range", "0 0")
	}
	netns.Cable(
		netns.End{NS: w.peers, Name: "wg0", Addrs: []netip.Prefix{prefix("10.66.0.2/24"), prefix("fd66::2/64")}},
		netns.End{NS: w.gateway, Name: "edgeward0", Addrs: []netip.Prefix{prefix("10.66.0.1/24"), prefix("fd66::1/64")}})
	w.gateway.Sysctl("ipv6/conf/default/addr_gen_mode", "0")
	netns.Cable(
		netns.End{NS: w.pod, Name: "p0", Addrs: []netip.Prefix{prefix("10.42.0.2/24"), prefix("fd42::2/64")}},
		netns.End{NS: w.gateway, Name: "cni0", Addrs: []netip.Prefix{prefix("10.42.0.1/24"), prefix("fd42::1/64")}})
	// Neither has WireGuard neighbours that are looked for.
	w.neighbour(w.gateway, "edgeward0", "fd66::2", w.peers, "wg0")
	w.neighbour(w.peers, "wg0", "fd66::1", w.gateway, "edgeward0")
	for _, p := range []netip.Prefix{prefix("10.66.0.64/26"), prefix("fd66::1:0/112"), site4, site6} {
		w.peers.Own(p)
		via := addr("10.66.0.2")
		if p.Addr().Is6() {
			via = addr("fd66::2")
		}
		w.gateway.Route(p, via)
	}
	w.peers.Route(prefix("0.0.0.0/0"), vpnGateway4)
	w.peers.Route(prefix("::/0"), vpnGateway6)
	w.pod.Route(prefix("0.0.0.0/0"), addr("10.42.0.1"))
	w.pod.Route(prefix("::/0"), addr("fd42::1"))
	w.gateway.Forwarding()
	w.onGateway = w.gateway.Serve(netip.AddrPortFrom(netip.IPv6Unspecified(), 0))
	w.inPod = w.pod.Serve(netip.AddrPortFrom(netip.IPv6Unspecified(), 0))
	w.atPeers = w.peers.Serve(netip.AddrPortFrom(netip.IPv6Unspecified(), 0))
	w.conn = w.open(Options{})
	return w
}

// neighbour tells ns where on its interface another namespace's is.
func (w *vpn) neighbour(ns *netns.NS, dev, at string, of *netns.NS, its string) {
	w.t.Helper()
	mac := strings.Fields(of.MustExec("ip", "-br", "link", "show", its))[2]
	ns.MustExec("ip", "neigh", "replace", at, "lladdr", mac, "dev", dev, "nud", "permanent")
}

func (w *vpn) open(o Options) *AccessConn {
	w.t.Helper()
	o.NetNS = w.gateway.FD()
	c, err := OpenAccess(o)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	return c
}

func (w *vpn) apply(a Access) Applied {
	w.t.Helper()
	done, err := w.conn.Apply(a)
	if err != nil {
		w.t.Fatal(err)
	}
	return done
}

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func reach(to netip.AddrPort, proto Proto) Reach {
	return Reach{single(to.Addr()), proto, to.Port(), to.Port()}
}

func (w *vpn) list() string {
	w.t.Helper()
	return w.gateway.MustExec("nft", "list", "table", "inet", AccessTableName)
}

// ping reports whether an echo is answered.
func ping(ns *netns.NS, from, to netip.Addr) error {
	return ns.Run(func() error {
		family, proto, request := unix.AF_INET, unix.IPPROTO_ICMP, byte(8)
		sockaddr := func(a netip.Addr) unix.Sockaddr { return &unix.SockaddrInet4{Addr: a.As4()} }
		if to.Is6() {
			family, proto, request = unix.AF_INET6, unix.IPPROTO_ICMPV6, 128
			sockaddr = func(a netip.Addr) unix.Sockaddr { return &unix.SockaddrInet6{Addr: a.As16()} }
		}
		fd, err := unix.Socket(family, unix.SOCK_DGRAM, proto)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		wait := unix.NsecToTimeval((300 * time.Millisecond).Nanoseconds())
		if err := errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait),
			unix.Bind(fd, sockaddr(from)), unix.Connect(fd, sockaddr(to))); err != nil {
			return err
		}
		if _, err := unix.Write(fd, []byte{request, 0, 0, 0, 0, 0, 0, 1}); err != nil {
			return err
		}
		_, err = unix.Read(fd, make([]byte, 64))
		return err
	})
}

// accessHave is what the kernel holds.
type accessHave struct {
	// Present says that the table is there; all else is zero if it is not.
	Present bool
	// Owner and Persist are as in Have.
	Owner, Persist bool
	// Intact says that what the last Apply of this Conn left is still there.
	Intact bool
	// Generation is the number of the rules that enforce.
	Generation uint32
	// Ruleset is the kernel's count of changes to any table of the namespace.
	Ruleset uint32
}

// read tells what the kernel holds.
func (c *AccessConn) read() (accessHave, error) {
	c.conn.mu.Lock()
	defer c.conn.mu.Unlock()
	if err := c.conn.connect(); err != nil {
		return accessHave{}, err
	}
	id, err := c.conn.ruleset()
	if err != nil {
		return accessHave{}, fmt.Errorf("read ruleset generation: %w", err)
	}
	s, err := c.conn.inspect(AccessTableName)
	if err != nil {
		return accessHave{}, err
	}
	h := accessHave{Ruleset: id, Present: s.table.present}
	if !h.Present {
		return h, nil
	}
	h.Owner = s.table.flags&tableOwner != 0 && s.table.owner != 0
	h.Persist = s.table.flags&tablePersist != 0
	if c.live != nil {
		if h.Intact, err = c.matches(s); err != nil {
			return accessHave{}, err
		}
	}
	if h.Intact {
		h.Generation = c.generation
	}
	return h, nil
}

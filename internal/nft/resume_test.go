package nft

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/edgeward/edgeward/internal/netns"
)

// A banned peer cannot make connection tracking take it for who answers: it resets
// its connection, is forgotten, and waits for the next segment that we send. Its
// answer to that, here another reset, would arrive. Connections of others go on
// after they were forgotten.
func TestResumed(t *testing.T) {
	protected4, waived6, inRange := addr("203.0.113.70"), addr("2001:db8:f00::70"), addr("203.0.113.100")
	for name, points := range map[string][]Point{"prerouting": nil, "input and forward": {Input, Forward}} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.node.Sysctl("netfilter/nf_conntrack_tcp_timeout_close", "1")
			cfg := config()
			cfg.Points = points
			w.install(cfg, content(nil))
			var banned, others [][2]net.Conn
			for _, at := range []*netns.NS{w.node, w.pod} {
				for _, from := range []netip.Addr{bad4, bad6, inRange} {
					banned = append(banned, w.pair(at, from))
				}
				for _, from := range []netip.Addr{peer4, peer6, protected4, waived6} {
					others = append(others, w.pair(at, from))
				}
			}
			w.update(Changes{
				Protected: []netip.Prefix{prefix("203.0.113.70/32")},
				Put:       []Element{ban(bad4), ban(bad6), ban(protected4), ban(waived6)},
				PutRanges: []Range{banRange("203.0.113.100", "203.0.113.103")},
			})
			if err := w.conn.Waive(Waivers{Bans: []Range{{waived6, waived6, 1, time.Hour}}}); err != nil {
				t.Fatal(err)
			}

			for _, c := range banned {
				c[0].(*net.TCPConn).SetLinger(0)
				c[0].Close()
			}
			for start := time.Now(); w.node.Tracked(bad4)+w.node.Tracked(bad6)+w.node.Tracked(inRange) > 0; time.Sleep(50 * time.Millisecond) {
				if time.Since(start) > 10*time.Second {
					t.Fatal("the connections are not forgotten: this test shows nothing")
				}
			}
			for _, c := range banned {
				c[1].Write([]byte("again"))
			}
			until := time.Now().Add(time.Second)
			for _, c := range banned {
				c[1].SetReadDeadline(until)
				if _, err := c[1].Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("a banned address answers: from %v to %v: %v", c[1].RemoteAddr(), c[1].LocalAddr(), err)
				}
			}
			for _, six := range []bool{false, true} {
				if w.counter(Resumed, "", six) == 0 {
					t.Errorf("IPv6 %t: nothing was counted", six)
				}
			}

			w.node.Must(func() error {
				return netlink.ConntrackTableFlush(netlink.ConntrackTable)
			})
			for _, c := range others {
				c[1].Write([]byte("again"))
				c[0].SetReadDeadline(time.Now().Add(5 * time.Second))
				if _, err := c[0].Read(make([]byte, 5)); err != nil {
					t.Errorf("what is not banned was stopped: %v: %v", c[0].LocalAddr(), err)
				}
			}
			if h := w.read(); !h.Intact || h.Layout != cfg.Layout() {
				t.Errorf("%+v", h)
			}
			w.nft()
		})
	}
}

// pair opens a connection of the client to a machine, and returns both ends.
func (w *world) pair(at *netns.NS, from netip.Addr) [2]net.Conn {
	w.t.Helper()
	var l net.Listener
	at.Must(func() (err error) {
		l, err = net.Listen("tcp", "[::]:0")
		return err
	})
	defer l.Close()
	to := map[bool][2]netip.Addr{false: {node4, node6}, true: {pod4, pod6}}[at == w.pod]
	addr := to[0]
	if from.Is6() {
		addr = to[1]
	}
	client, err := w.client.Dial(from, netip.AddrPortFrom(addr, l.Addr().(*net.TCPAddr).AddrPort().Port()))
	if err != nil {
		w.t.Fatal(err)
	}
	server, err := l.Accept()
	if err != nil {
		w.t.Fatal(err)
	}
	out := [2]net.Conn{client, server}
	w.t.Cleanup(func() {
		for _, c := range out {
			c.Close()
		}
	})
	return out
}

// Neighbour discovery of a banned address passes if it comes from the link: who is
// further away can send what looks like it, but not with this hop limit.
func TestNeighbours(t *testing.T) {
	w := newWorld(t)
	w.install(config(), content(nil, ban(bad6)))
	for _, tt := range []struct {
		hops    int
		dropped uint64
	}{{64, 1}, {254, 1}, {255, 0}} {
		before := w.counter(Banned, "ban/crowdsec", true)
		w.client.Must(func() error {
			c, err := net.DialIP("ip6:ipv6-icmp", &net.IPAddr{IP: bad6.AsSlice()}, &net.IPAddr{IP: node6.AsSlice()})
			if err != nil {
				return err
			}
			defer c.Close()
			raw, err := c.SyscallConn()
			if err != nil {
				return err
			}
			if err := raw.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, tt.hops)
			}); err != nil {
				return err
			}
			if err != nil {
				return err
			}
			_, err = c.Write(append([]byte{135, 0, 0, 0, 0, 0, 0, 0}, node6.AsSlice()...)) // a solicitation
			return err
		})
		if got := w.counter(Banned, "ban/crowdsec", true) - before; got != tt.dropped {
			t.Errorf("hop limit %d: %d dropped, want %d", tt.hops, got, tt.dropped)
		}
	}
}

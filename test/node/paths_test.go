package node_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/edgeward/edgeward/internal/netns"
)

var (
	pod4 = netip.MustParseAddr("10.42.0.2")
	pod6 = netip.MustParseAddr("fd42::2")
)

// cluster is a world with a pod behind the node, and a NodePort that leads there:
//
//	client c0 ── up0 node cni0 ── p0 pod
type cluster struct {
	*world
	pod   *netns.NS
	inPod *netns.Server
}

const nodePort = 30080

func newCluster(t testing.TB) *cluster {
	c := &cluster{world: newWorld(t), pod: netns.New(t)}
	parse, prefix := netip.MustParseAddr, netip.MustParsePrefix
	netns.Cable(
		netns.End{NS: c.pod, Name: "p0", Addrs: []netip.Prefix{netip.PrefixFrom(pod4, 24), netip.PrefixFrom(pod6, 64)}},
		netns.End{NS: c.node, Name: "cni0", Addrs: []netip.Prefix{prefix("10.42.0.1/24"), prefix("fd42::1/64")}})
	c.client.Own(prefix("104.16.0.0/13"))
	c.node.Route(prefix("104.16.0.0/13"), parse("192.0.2.2"))
	c.client.Route(prefix("10.42.0.0/24"), node4)
	c.client.Route(prefix("fd42::/64"), node6)
	c.pod.Route(prefix("0.0.0.0/0"), parse("10.42.0.1"))
	c.pod.Route(prefix("::/0"), parse("fd42::1"))
	c.node.Forwarding()
	c.inPod = c.pod.Serve(netip.AddrPortFrom(netip.IPv6Unspecified(), 0))
	port := c.inPod.Addr.Port()
	c.node.MustExec("nft", "-f", c.write("services.nft", fmt.Sprintf(`table inet services { chain p { type nat hook prerouting priority dstnat;
		meta nfproto ipv4 meta l4proto { tcp, udp } th dport %[1]d dnat ip to %[2]v:%[4]d
		meta nfproto ipv6 meta l4proto { tcp, udp } th dport %[1]d dnat ip6 to [%[3]v]:%[4]d
	}
	}`, nodePort, pod4, pod6, port)))
	return c
}

// ways are where on the node, or by way of it, an address of a family goes.
func (c *cluster) ways(from netip.Addr) map[string]netip.AddrPort {
	host, pod := node4, pod4
	if from.Is6() {
		host, pod = node6, pod6
	}
	return map[string]netip.AddrPort{
		"host":     netip.AddrPortFrom(host, c.server.Addr.Port()),
		"NodePort": netip.AddrPortFrom(host, nodePort),
		"pod":      netip.AddrPortFrom(pod, c.inPod.Addr.Port()),
	}
}

// stopped demands that addresses are stopped on every way, by TCP and UDP, or pass
// on all of them.
func (c *cluster) stopped(what string, want bool, from ...netip.Addr) {
	c.t.Helper()
	client := c.client
	if !want {
		client = client.Patient()
	}
	var wg sync.WaitGroup
	for _, a := range from {
		for way, to := range c.ways(a) {
			for proto, try := range map[string]func(netip.Addr, netip.AddrPort) error{"UDP": client.UDP, "TCP": client.TCP} {
				wg.Go(func() {
					if err := try(a, to); (err != nil) != want {
						c.t.Errorf("%s: from %v to the %s by %s: %v, want stopped %v", what, a, way, proto, err, want)
					}
				})
			}
		}
	}
	wg.Wait()
}

// outbound demands that node and pod reach servers at banned addresses, or do not.
func (c *cluster) outbound(what string, want bool, to ...netip.AddrPort) {
	c.t.Helper()
	inNode, inPod := c.node, c.pod
	if want {
		inNode, inPod = inNode.Patient(), inPod.Patient()
	}
	var wg sync.WaitGroup
	for _, at := range to {
		node, pod := node4, pod4
		if at.Addr().Is6() {
			node, pod = node6, pod6
		}
		for name, try := range map[string]func() error{
			"node by TCP": func() error { return inNode.TCP(node, at) },
			"node by UDP": func() error { return inNode.UDP(node, at) },
			"pod by TCP":  func() error { return inPod.TCP(pod, at) },
			"pod by UDP":  func() error { return inPod.UDP(pod, at) },
		} {
			wg.Go(func() {
				if err := try(); (err == nil) != want {
					c.t.Errorf("%s: %s to %v: %v, want it to work: %v", what, name, at, err, want)
				}
			})
		}
	}
	wg.Wait()
}

// TestEveryWay runs the program on a node with a NodePort and a pod: whatever way
// a banned address takes, it is stopped, in the middle of a connection as well,
// and leaves nothing in connection tracking; all others pass.
func TestEveryWay(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	ctx := t.Context()
	a := c.start()
	a.ready()
	talk4, talk6 := netip.MustParseAddr("203.0.113.70"), netip.MustParseAddr("2001:db8:f00::70")
	all := []netip.Addr{good4, good6, bad4, bad6}
	c.stopped("before any ban", false, all...)
	out := []netip.AddrPort{c.client.Serve(netip.AddrPortFrom(bad4, 0)).Addr, c.client.Serve(netip.AddrPortFrom(bad6, 0)).Addr}
	c.outbound("before any ban", true, out...)

	// Connections of TCP, and flows of UDP, that are under way.
	type flow struct {
		name string
		echo func() error
	}
	var flows []flow
	for _, from := range []netip.Addr{talk4, talk6} {
		for way, to := range c.ways(from) {
			conn, err := c.client.Dial(from, to)
			c.must(err)
			defer conn.Close()
			flows = append(flows, flow{fmt.Sprintf("TCP from %v to the %s", from, way), func() error { return netns.Echo(conn) }})
			packets, err := c.client.DialUDP(from, to)
			c.must(err)
			defer packets.Close()
			flows = append(flows, flow{fmt.Sprintf("UDP from %v to the %s", from, way), func() error { return netns.Echo(packets) }})
		}
	}
	for _, f := range flows {
		if err := f.echo(); err != nil {
			t.Fatalf("%s does not work before the ban: %v", f.name, err)
		}
	}
	for _, value := range []string{bad4.String(), bad6.String(), talk4.String(), talk6.String()} {
		c.must(c.lapi.Ban(ctx, value, time.Hour))
	}
	c.until("all are banned", 5*time.Second, func() bool { return !c.passes(bad4) && !c.passes(talk6) && !c.passes(bad6) && !c.passes(talk4) })
	tracked := func() int { return c.node.Tracked(bad4) + c.node.Tracked(bad6) }
	before := tracked() // what passed before the bans
	c.stopped("banned", true, bad4, bad6)
	c.stopped("others", false, good4, good6)
	var wg sync.WaitGroup
	for _, f := range flows {
		wg.Go(func() {
			if err := f.echo(); err == nil {
				t.Errorf("%s goes on after the ban", f.name)
			}
		})
	}
	wg.Wait()
	c.outbound("replies kept", true, out...)

	// What node and pod began is tracked as theirs. Floods leave nothing: a
	// segment that opens a connection is dropped before it is tracked, a
	// datagram while its entry is not yet in the table.
	four := c.client.Blast(c.ways(bad4)["NodePort"], bad4, netip.MustParseAddr("203.0.113.67"))
	for range 100 {
		wg.Go(func() { _ = c.client.TCP(bad4, c.ways(bad4)["NodePort"]) })
		wg.Go(func() { _ = c.client.TCP(bad6, c.ways(bad6)["host"]) })
	}
	wg.Wait()
	sent, err := four.Stop()
	c.must(err)
	if n := tracked(); n > before {
		t.Errorf("after a flood of %d datagrams and 200 connections, %d connections of banned addresses are tracked, %d were before", sent, n, before)
	}
	if c.node.Tracked(netip.MustParseAddr("203.0.113.67")) == 0 {
		t.Error("a flood of others is not tracked: nothing is shown")
	}

	// A reset instead of silence, a line in the log for each origin, and no
	// answers from a banned address either.
	a.stop(syscall.SIGTERM)
	lines := c.nflog(7)
	c.extra = "firewall:\n  replies: drop\n  action: reject\n  log: {enabled: true, perSecond: 100, burst: 100, group: 7}\n"
	a = c.start()
	a.ready()
	c.until("it rejects", 5*time.Second, func() bool { return errors.Is(c.client.TCP(bad4, c.ways(bad4)["host"]), syscall.ECONNREFUSED) })
	for _, from := range []netip.Addr{bad4, bad6} {
		for way, to := range c.ways(from) {
			if err := c.client.TCP(from, to); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("rejected, a connection from %v to the %s ends with %v", from, way, err)
			}
			if err := c.client.UDP(from, to); err == nil || errors.Is(err, unix.EAGAIN) || strings.Contains(err.Error(), "timeout") {
				t.Errorf("rejected, a datagram from %v to the %s ends with %v", from, way, err)
			}
		}
	}
	c.stopped("rejecting, others", false, good4, good6)
	c.outbound("replies dropped", false, out...)
	if got := lines(); !slices.Contains(got, "edgeward reject ban/cscli: ") {
		t.Errorf("the kernel log has %q", got)
	}
	a.stop(syscall.SIGTERM)

	// The way round Cloudflare is closed, on every interface from its first
	// packet on.
	c.extra = fmt.Sprintf("firewall:\n  locks:\n    - {name: ingress, ports: [%d, %d], from: [cloudflare]}\n", nodePort, c.server.Addr.Port())
	a = c.start()
	a.ready()
	cloud := netip.MustParseAddr("104.16.7.7")
	c.until("the ports are locked", 5*time.Second, func() bool { return c.client.UDP(good4, c.ways(good4)["host"]) != nil })
	other := c.node.Serve(netip.AddrPortFrom(netip.IPv6Unspecified(), 0))
	for _, try := range []struct {
		from netip.Addr
		to   netip.AddrPort
		pass bool
	}{
		{cloud, c.ways(cloud)["host"], true}, {cloud, c.ways(cloud)["NodePort"], true},
		{good4, c.ways(good4)["host"], false}, {good6, c.ways(good6)["host"], false},
		{good4, c.ways(good4)["NodePort"], false}, {good6, c.ways(good6)["NodePort"], false},
		{good4, netip.AddrPortFrom(node4, other.Addr.Port()), true}, {good4, c.ways(good4)["pod"], true},
	} {
		wg.Go(func() {
			for name, err := range map[string]error{"TCP": c.client.TCP(try.from, try.to), "UDP": c.client.UDP(try.from, try.to)} {
				if (err == nil) != try.pass {
					t.Errorf("locked to Cloudflare: from %v to %v by %s: %v, want it to pass: %v", try.from, try.to, name, err, try.pass)
				}
			}
		})
	}
	wg.Wait()
	late := netns.New(t)
	netns.Cable(
		netns.End{NS: late, Name: "l0", Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.3.2/24")}},
		netns.End{NS: c.node, Name: "enp9s0", Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.3.1/24")}})
	c.must(c.lapi.Ban(ctx, "192.0.3.2", time.Hour))
	if err := late.UDP(netip.MustParseAddr("192.0.3.2"), netip.MustParseAddrPort(fmt.Sprintf("192.0.3.1:%d", c.server.Addr.Port()))); err == nil {
		t.Error("the lock does not know a new interface")
	}
	to := netip.MustParseAddrPort(fmt.Sprintf("192.0.3.1:%d", other.Addr.Port()))
	c.until("the ban holds on a new interface", 5*time.Second, func() bool { return late.UDP(netip.MustParseAddr("192.0.3.2"), to) != nil })
}

// nflog listens to a group of the node's packet log, and returns what gives the
// prefixes of the lines so far.
func (w *world) nflog(group uint16) func() []string {
	w.t.Helper()
	var conn *netlink.Conn
	w.node.Must(func() (err error) {
		if conn, err = netlink.Dial(unix.NETLINK_NETFILTER, nil); err != nil {
			return err
		}
		const config, command, bind = unix.NFNL_SUBSYS_ULOG<<8 | 1, 1, 1
		data := binary.BigEndian.AppendUint16([]byte{unix.AF_UNSPEC, 0}, group)
		data = append(data, 5, 0, command, 0, bind, 0, 0, 0)
		_, err = conn.Execute(netlink.Message{Header: netlink.Header{Type: config, Flags: netlink.Request | netlink.Acknowledge}, Data: data})
		return err
	})
	w.t.Cleanup(func() { conn.Close() })
	return func() []string {
		w.t.Helper()
		const prefix = 10
		var out []string
		w.must(conn.SetReadDeadline(time.Now().Add(1500 * time.Millisecond))) // the kernel gathers for a second
		for {
			messages, err := conn.Receive()
			if err != nil {
				return out
			}
			for _, m := range messages {
				if len(m.Data) < 4 {
					continue
				}
				d, err := netlink.NewAttributeDecoder(m.Data[4:])
				w.must(err)
				for d.Next() {
					if d.Type() == prefix {
						out = append(out, d.String())
					}
				}
			}
		}
	}
}

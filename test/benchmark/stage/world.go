package stage

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/edgeward/edgeward/internal/netns"
)

// The addresses of a World.
var (
	Node4   = netip.MustParseAddr("192.0.2.1")
	Node6   = netip.MustParseAddr("2001:db8::1")
	Client4 = netip.MustParseAddr("192.0.2.2")
	Client6 = netip.MustParseAddr("2001:db8::2")
	// Inner4 is behind the node: packets to it are forwarded.
	Inner4 = netip.MustParseAddr("198.51.100.9")
)

// SinkPort is the UDP port at which a node takes what passes.
const SinkPort = 4000

// World is a node and a client that can send from any address:
//
//	client c0 ── uplink node out0 ── c1 client
type World struct {
	Scope        *Scope
	Client, Node *netns.NS
	MAC          [2]net.HardwareAddr // of the uplink and of c0
	Raw          int                 // packet socket on c0
	Sink         int                 // socket on the node that gets what passes, of both families
}

// NewWorld makes a World for as long as s lasts; uplink is the name of the node's
// interface by which the client's packets come.
func NewWorld(s *Scope, uplink string) *World {
	w := &World{Scope: s, Client: netns.New(s), Node: netns.New(s)}
	for _, name := range []string{"all", "default"} {
		w.Node.Sysctl("ipv4/conf/"+name+"/rp_filter", "0")
	}
	netns.Cable(
		netns.End{NS: w.Client, Name: "c0", Addrs: []netip.Prefix{netip.PrefixFrom(Client4, 24), netip.PrefixFrom(Client6, 64)}},
		netns.End{NS: w.Node, Name: uplink, Addrs: []netip.Prefix{netip.PrefixFrom(Node4, 24), netip.PrefixFrom(Node6, 64)}})
	w.Node.Route(netip.MustParsePrefix("0.0.0.0/0"), Client4)
	w.Node.Route(netip.MustParsePrefix("::/0"), Client6)
	w.Node.Forwarding()
	// What is forwarded goes to an address that nobody has, and is dropped at
	// once where it arrives.
	netns.Cable(
		netns.End{NS: w.Client, Name: "c1"},
		netns.End{NS: w.Node, Name: "out0", Addrs: []netip.Prefix{netip.MustParsePrefix("198.51.100.1/24")}})
	w.Node.Sysctl("ipv6/conf/out0/disable_ipv6", "1") // to send nothing of its own
	w.Node.MustExec("ip", "neigh", "add", Inner4.String(), "lladdr", "02:00:00:00:00:09", "dev", "out0", "nud", "permanent")

	for i, end := range []struct {
		ns   *netns.NS
		name string
	}{{w.Node, uplink}, {w.Client, "c0"}} {
		end.ns.Must(func() error {
			link, err := net.InterfaceByName(end.name)
			if err != nil {
				return err
			}
			w.MAC[i] = link.HardwareAddr
			if end.ns == w.Client {
				w.Raw, err = packetSocket(link.Index)
			}
			return err
		})
	}
	s.Cleanup(func() { unix.Close(w.Raw) })
	w.Node.Must(func() (err error) {
		w.Sink, err = unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if err := unix.SetsockoptInt(w.Sink, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20); err != nil {
			return err
		}
		return unix.Bind(w.Sink, &unix.SockaddrInet6{Port: SinkPort})
	})
	s.Cleanup(func() { unix.Close(w.Sink) })
	return w
}

// packetSocket sends frames on an interface, past its queue.
func packetSocket(index int) (int, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open a packet socket: %w", err)
	}
	err = unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: index})
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("open a packet socket: %w", err)
	}
	return fd, nil
}

// Track gives the node what every node of k3s has: connection tracking.
func (w *World) Track() error {
	return w.Load("table inet tracking {\n\tchain input { type filter hook input priority 0; ct state established accept; }\n" +
		"\tchain forward { type filter hook forward priority 0; ct state established accept; }\n}\n")
}

// Load gives a ruleset of nft to the node.
func (w *World) Load(ruleset string) error { return Load(w.Node, ruleset) }

// Load gives a ruleset of nft to a namespace.
func Load(ns *netns.NS, ruleset string) error {
	file, err := os.CreateTemp("", "edgeward-bench-*.nft")
	if err != nil {
		return fmt.Errorf("write a ruleset: %w", err)
	}
	defer os.Remove(file.Name())
	_, err = file.WriteString(ruleset)
	if err := errors.Join(err, file.Close()); err != nil {
		return fmt.Errorf("write a ruleset: %w", err)
	}
	_, err = ns.Exec("nft", "-f", file.Name())
	return err
}

// Passed returns how many packets the node has delivered to itself, and how many
// have left it behind.
func (w *World) Passed() (local, forwarded uint64, err error) {
	var snmp, dev []byte
	err = w.Node.Run(func() (err error) {
		if snmp, err = os.ReadFile("/proc/thread-self/net/snmp"); err != nil {
			return err
		}
		dev, err = os.ReadFile("/proc/thread-self/net/dev")
		return err
	})
	if err != nil {
		return 0, 0, fmt.Errorf("count packets: %w", err)
	}
	field := func(text []byte, line string, n int) (count uint64, err error) {
		for l := range strings.Lines(string(text)) {
			if fields := strings.Fields(l); len(fields) > n && fields[0] == line && fields[n][0] <= '9' {
				_, err = fmt.Sscan(fields[n], &count)
				return count, err
			}
		}
		return 0, errors.New("the kernel does not tell")
	}
	local, err = field(snmp, "Ip:", 9) // InDelivers
	if err == nil {
		forwarded, err = field(dev, "out0:", 10) // packets sent
	}
	if err != nil {
		return 0, 0, fmt.Errorf("count packets: %w", err)
	}
	return local, forwarded, nil
}

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/edgeward/edgeward/internal/netns"
)

// scope is whose the namespaces and processes of a measurement are: what a test
// would be. A failure inside ends the measurement, by a panic that run turns back
// into an error.
type scope struct {
	context.Context
	ends []func()
}

type failure struct{ err error }

// within calls f with a scope and ends everything that was begun in it.
func within(ctx context.Context, f func(*scope) error) (err error) {
	s := &scope{Context: ctx}
	defer func() {
		for i := len(s.ends) - 1; i >= 0; i-- {
			s.ends[i]()
		}
	}()
	defer func() {
		switch r := recover().(type) {
		case nil:
		case failure:
			err = r.err
		default:
			panic(r)
		}
	}()
	return f(s)
}

func (s *scope) Helper()                           {}
func (s *scope) Cleanup(f func())                  { s.ends = append(s.ends, f) }
func (s *scope) Fatal(args ...any)                 { panic(failure{errors.New(fmt.Sprint(args...))}) }
func (s *scope) Fatalf(format string, args ...any) { panic(failure{fmt.Errorf(format, args...)}) }

var _ netns.TB = (*scope)(nil)

var (
	node4   = netip.MustParseAddr("192.0.2.1")
	node6   = netip.MustParseAddr("2001:db8::1")
	client4 = netip.MustParseAddr("192.0.2.2")
	client6 = netip.MustParseAddr("2001:db8::2")
	// inner4 is behind the node: packets to it are forwarded.
	inner4 = netip.MustParseAddr("198.51.100.9")
	// clean4 is never banned.
	clean4 = netip.MustParseAddr("203.0.113.7")
)

const sinkPort = 4000

// world is a node and a client that can send from any address:
//
//	client c0 ── up0 node out0 ── c1 client
type world struct {
	scope        *scope
	client, node *netns.NS
	mac          [2]net.HardwareAddr // of up0 and c0
	raw          int                 // packet socket on c0
	sink         int                 // socket on the node that gets what passes, of both families
	nonce        uint32
}

func newWorld(s *scope) *world {
	w := &world{scope: s, client: netns.New(s), node: netns.New(s)}
	for _, name := range []string{"all", "default"} {
		w.node.Sysctl("ipv4/conf/"+name+"/rp_filter", "0")
	}
	netns.Cable(
		netns.End{NS: w.client, Name: "c0", Addrs: []netip.Prefix{netip.PrefixFrom(client4, 24), netip.PrefixFrom(client6, 64)}},
		netns.End{NS: w.node, Name: "up0", Addrs: []netip.Prefix{netip.PrefixFrom(node4, 24), netip.PrefixFrom(node6, 64)}})
	w.node.Route(netip.MustParsePrefix("0.0.0.0/0"), client4)
	w.node.Route(netip.MustParsePrefix("::/0"), client6)
	w.node.Forwarding()
	// What is forwarded goes to an address that nobody has, and is dropped at
	// once where it arrives.
	netns.Cable(
		netns.End{NS: w.client, Name: "c1"},
		netns.End{NS: w.node, Name: "out0", Addrs: []netip.Prefix{netip.MustParsePrefix("198.51.100.1/24")}})
	w.node.Sysctl("ipv6/conf/out0/disable_ipv6", "1") // to send nothing of its own
	w.node.MustExec("ip", "neigh", "add", inner4.String(), "lladdr", "02:00:00:00:00:09", "dev", "out0", "nud", "permanent")

	for i, end := range []struct {
		ns   *netns.NS
		name string
	}{{w.node, "up0"}, {w.client, "c0"}} {
		end.ns.Must(func() error {
			link, err := net.InterfaceByName(end.name)
			if err != nil {
				return err
			}
			w.mac[i] = link.HardwareAddr
			if end.ns == w.client {
				w.raw, err = packetSocket(link.Index)
			}
			return err
		})
	}
	s.Cleanup(func() { unix.Close(w.raw) })
	w.node.Must(func() (err error) {
		w.sink, err = unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if err := unix.SetsockoptInt(w.sink, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20); err != nil {
			return err
		}
		return unix.Bind(w.sink, &unix.SockaddrInet6{Port: sinkPort})
	})
	s.Cleanup(func() { unix.Close(w.sink) })
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

// patience is how long a packet that passes may take, where the machine is busy
// and the kernel has put it off.
const patience = 2 * time.Second

// passing sends one packet from each address, and returns those whose packets
// the node let in. A packet of a clean address behind them, in the same queue,
// tells when all have been through.
func (w *world) passing(from ...netip.Addr) (map[netip.Addr]bool, error) {
	w.nonce++
	passed := map[netip.Addr]bool{}
	for i, addr := range append(from[:len(from):len(from)], clean4) {
		payload := binary.BigEndian.AppendUint32(nil, w.nonce)
		payload = binary.BigEndian.AppendUint32(payload, uint32(i))
		to := node4
		if addr.Is6() {
			to = node6
		}
		if _, err := unix.Write(w.raw, udpFrame(w.mac, addr, to, payload)); err != nil {
			return nil, fmt.Errorf("send a packet: %w", err)
		}
	}
	var buf [64]byte
	for began := time.Now(); ; {
		n, _, err := unix.Recvfrom(w.sink, buf[:], 0)
		switch {
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
			if time.Since(began) > patience {
				return nil, errors.New("look at what passes: a packet of an address that nobody banned was lost")
			}
			time.Sleep(20 * time.Microsecond)
			continue
		case err != nil:
			return nil, fmt.Errorf("look at what passes: %w", err)
		}
		if n < 8 || binary.BigEndian.Uint32(buf[:]) != w.nonce {
			continue
		}
		i := int(binary.BigEndian.Uint32(buf[4:]))
		if i == len(from) {
			return passed, nil
		}
		passed[from[i]] = true
	}
}

// stopped waits until none of the addresses comes through any more, or, with
// want false, until all do, and returns when that was.
func (w *world) stopped(want bool, limit time.Duration, from ...netip.Addr) (time.Time, error) {
	began := time.Now()
	for {
		passed, err := w.passing(from...)
		now := time.Now()
		if err != nil {
			return now, err
		}
		if want && len(passed) == 0 || !want && len(passed) == len(from) {
			return now, nil
		}
		if now.Sub(began) > limit {
			return now, &lateError{limit, len(passed), len(from)}
		}
		// Closely at first, when milliseconds count.
		pause := time.Millisecond
		if now.Sub(began) < 50*time.Millisecond {
			pause = 50 * time.Microsecond
		}
		if err := wait(w.scope, pause); err != nil {
			return now, err
		}
	}
}

// lateError says that bans, or the end of them, did not come in time.
type lateError struct {
	after       time.Duration
	passing, of int
}

func (e *lateError) Error() string {
	return fmt.Sprintf("wait for bans: after %v, packets from %d of %d addresses pass", e.after, e.passing, e.of)
}

// dial connects to the node's loopback.
func (w *world) dial(ctx context.Context, _, addr string) (c net.Conn, err error) {
	err = w.node.Run(func() error {
		c, err = (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", addr)
		return err
	})
	return c, err
}

// listen listens on the node's loopback.
func (w *world) listen() (net.Listener, error) {
	var l net.Listener
	err := w.node.Run(func() (err error) {
		l, err = new(net.ListenConfig).Listen(context.Background(), "tcp4", "127.0.0.1:0")
		return err
	})
	return l, err
}

// serve answers on the node's loopback until the scope ends.
func (w *world) serve(h http.Handler) (url string, err error) {
	l, err := w.listen()
	if err != nil {
		return "", fmt.Errorf("listen on the node: %w", err)
	}
	server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: h}
	// Serve always ends with an error, and Close is the reason for it.
	go func() { _ = server.Serve(l) }()
	w.scope.Cleanup(func() { server.Close() })
	return "http://" + l.Addr().String(), nil
}

// passed returns how many packets the node has delivered to itself, and how many
// have left it behind.
func (w *world) passed() (local, forwarded uint64, err error) {
	var snmp, dev []byte
	err = w.node.Run(func() (err error) {
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

func wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}

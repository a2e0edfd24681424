// Package vpn_test proves the VPN as somebody who has it sees it: the built
// gateway with its one privilege, peers that the command line adds, and stock
// wg-quick and wireguard-go with the configurations that it prints, each in a
// network namespace of its own. No machine that runs it has WireGuard in its
// kernel, so the gateway carries the packets itself.
package vpn_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"

	"github.com/edgeward/edgeward/internal/daemon"
	"github.com/edgeward/edgeward/internal/netns"
	"github.com/edgeward/edgeward/test/rig"
)

var build struct {
	once sync.Once
	dir  string
	err  error
}

// TestMain removes the programs that the tests built.
func TestMain(m *testing.M) {
	code := m.Run()
	if build.dir != "" {
		os.RemoveAll(build.dir)
	}
	os.Exit(code)
}

// programs returns the directory of the built programs: ours, and wireguard-go as
// its authors have it.
func programs(t testing.TB) string {
	t.Helper()
	build.once.Do(func() {
		if build.err = rig.CheckPrograms(); build.err != nil {
			return
		}
		if build.dir, build.err = os.MkdirTemp("", "edgeward-vpn-"); build.err != nil {
			return
		}
		if build.err = rig.Build(context.Background(), build.dir, "edgeward", "edgeward-tunnel"); build.err != nil {
			return
		}
		cmd := exec.Command("go", "build", "-buildvcs=false", "-o", filepath.Join(build.dir, "wireguard-go"), "golang.zx2c4.com/wireguard")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			build.err = fmt.Errorf("build wireguard-go: %w: %s", err, out)
			return
		}
		// wg-quick hands DNS servers to this program; here nobody's are changed.
		build.err = os.WriteFile(filepath.Join(build.dir, "resolvconf"), []byte("#!/bin/sh\ncat >/dev/null\n"), 0o755)
	})
	if build.err != nil {
		t.Fatal(build.err)
	}
	return build.dir
}

// serial tells the interfaces of this process from those of others: sockets to
// userspace devices lie in one directory, whatever the network namespace.
var serial atomic.Int32

func interfaceName() string {
	return fmt.Sprintf("ew%dx%d", os.Getpid(), serial.Add(1))
}

// The addresses of the world:
//
//	alice ── 10.9.1.0/30 ──┐
//	                       gateway 203.0.113.1 ── 192.168.7.0/24 ── lan .9 .10
//	bob ──── 10.9.2.0/30 ──┘  the VPN: 10.66.0.0/24
const endpoint = "203.0.113.1"

// world is a gateway, two networks that clients dial from, and one of services.
type world struct {
	t                  testing.TB
	gateway, lan       *netns.NS
	outside            map[string]*netns.NS
	dir, file, link    string
	program            *exec.Cmd
	logs               *syncBuffer
	exited             chan struct{}
	web, nas, internal *netns.Server
	ssh                *netns.Server
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{
		t: t, gateway: netns.New(t), lan: netns.New(t), outside: map[string]*netns.NS{}, dir: t.TempDir(), link: interfaceName(),
		logs: new(syncBuffer),
	}
	prefix := netip.MustParsePrefix
	w.gateway.Own(prefix(endpoint + "/32"))
	for i, name := range []string{"alice", "bob"} {
		ns := netns.New(t)
		w.outside[name] = ns
		here, there := fmt.Sprintf("10.9.%d.1", i+1), fmt.Sprintf("10.9.%d.2", i+1)
		netns.Cable(
			netns.End{NS: ns, Name: "up0", Addrs: []netip.Prefix{prefix(there + "/30")}},
			netns.End{NS: w.gateway, Name: fmt.Sprintf("out%d", i), Addrs: []netip.Prefix{prefix(here + "/30")}})
		ns.Route(prefix(endpoint+"/32"), netip.MustParseAddr(here))
	}
	netns.Cable(
		netns.End{NS: w.gateway, Name: "lan0", Addrs: []netip.Prefix{prefix("192.168.7.1/24"), prefix("fd07::1/64")}},
		netns.End{NS: w.lan, Name: "eth0", Addrs: []netip.Prefix{prefix("192.168.7.9/24"), prefix("192.168.7.10/24"), prefix("fd07::9/64"), prefix("fd07::10/64")}})
	w.lan.Route(prefix("10.66.0.0/24"), netip.MustParseAddr("192.168.7.1"))
	w.lan.Route(prefix("fd66::/64"), netip.MustParseAddr("fd07::1"))
	all := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(netip.IPv6Unspecified(), port) }
	w.web, w.nas, w.internal = w.lan.Serve(all(80)), w.lan.Serve(all(445)), w.lan.Serve(all(8443))
	w.ssh = w.gateway.Serve(all(22))
	w.file = filepath.Join(w.dir, "tunnel.yaml")
	w.write(w.config(""))
	programs(t)
	return w
}

// config is the file without peers.
func (w *world) config(more string) string {
	return strings.NewReplacer("DIR", w.dir, "LINK", w.link, "ENDPOINT", endpoint).Replace(`# What the tests share.
wireguard:
  interface: LINK
  mode: auto
  privateKeyFile: DIR/key
  endpoint: ENDPOINT:51830
  addresses: [10.66.0.1/24, fd66::1/64]
  names:
    upstreams: ["192.168.7.9:5353"]
    zones: [home.example.com]
  presharedKeyDir: DIR
services:
  - name: grafana
    host: grafana.home.example.com
    addresses: [192.168.7.9, fd07::9]
    ports: [80/tcp, 80/udp]
  - name: nas
    host: nas.home.example.com
    addresses: [192.168.7.10, fd07::10]
    ports: [445/tcp]
  - name: apps
    host: "*.apps.example.com"
    addresses: [10.66.0.100, fd66::100]
    targets: [192.168.7.9, fd07::9]
    ports: [8443/tcp]
grants:
  - to: [group:family]
    services: [grafana, apps]
  - to: [group:admins]
    services: [grafana, nas]
listen: 127.0.0.1:9479
socket: DIR/t.sock
stateDir: DIR
logFormat: text
` + more)
}

func (w *world) write(text string) {
	w.t.Helper()
	if err := os.WriteFile(w.file, []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// start starts the gateway as its manifest does, and returns when it is ready.
func (w *world) start() {
	w.t.Helper()
	w.launch()
	w.until("the gateway is ready", func() bool { return w.status().Ready == "yes" })
}

// launch starts the gateway.
func (w *world) launch() {
	w.t.Helper()
	cmd := exec.Command("setpriv", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all,+net_admin",
		filepath.Join(programs(w.t), "edgeward-tunnel"), "run", "--role", "wireguard", "--config", w.file)
	cmd.Stdout, cmd.Stderr = w.logs, w.logs
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: 0}
	w.gateway.Must(cmd.Start)
	exited := make(chan struct{})
	w.program, w.exited = cmd, exited
	go func() { _ = cmd.Wait(); close(exited) }()
	w.t.Cleanup(func() { w.stop(syscall.SIGTERM) })
}

// stop ends the gateway by a signal.
func (w *world) stop(sig os.Signal) {
	w.t.Helper()
	_ = w.program.Process.Signal(sig)
	select {
	case <-w.exited:
	case <-time.After(20 * time.Second):
		_ = w.program.Process.Kill()
		w.t.Errorf("the gateway does not end by %v; it wrote:\n%s", sig, w.logs)
	}
}

// status is of what the gateway says of itself what is of use here.
type status struct {
	Ready, Trouble string
	VPN            struct {
		Mode, Problem string
		Peers         []struct {
			Name, State, Endpoint string
			Handshake             time.Time
			Received, Denied      uint64
		}
		Denied []struct {
			Peer, To, Service string
			Port              int
		}
	}
}

func (w *world) status() (s status) {
	_ = daemon.Ask(context.Background(), filepath.Join(w.dir, "t.sock"), "/v1/status", nil, &s)
	return s
}

// metrics is what a scrape gets.
func (w *world) metrics() string {
	w.t.Helper()
	var text []byte
	w.gateway.Must(func() error {
		conn, err := net.Dial("tcp", "127.0.0.1:9479")
		if err != nil {
			return err
		}
		defer conn.Close()
		client := http.Client{Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext:       func(context.Context, string, string) (net.Conn, error) { return conn, nil },
		}}
		res, err := client.Get("http://gateway/metrics")
		if err != nil {
			return err
		}
		defer res.Body.Close()
		text, err = io.ReadAll(res.Body)
		return err
	})
	return string(text)
}

func (w *world) until(what string, reached func() bool) {
	w.t.Helper()
	for end := time.Now().Add(20 * time.Second); !reached(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			w.t.Fatalf("%s: not within 20 s; the gateway wrote:\n%s", what, w.logs)
		}
	}
}

// edgeward runs the command line on the world's file and returns what it printed.
func (w *world) edgeward(args ...string) string {
	w.t.Helper()
	cmd := exec.Command(filepath.Join(programs(w.t), "edgeward"), append(args, "--config", w.file)...)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		w.t.Fatalf("edgeward %v: %v: %s", args, err, said.String())
	}
	return string(out)
}

// client is a device with stock tools and the configuration that the command line
// printed.
type client struct {
	*netns.NS
	w     *world
	link  string
	conf  string
	addrs []netip.Addr // in the VPN
}

// add adds a peer with the command line, on whose name the outside has a network.
func (w *world) add(name string, args ...string) *client {
	w.t.Helper()
	c := &client{NS: w.outside[name], w: w, link: interfaceName()}
	text := w.edgeward(append([]string{"peer", "add", name, "--qr", "never"}, args...)...)
	c.conf = filepath.Join(w.dir, c.link+".conf")
	if err := os.WriteFile(c.conf, []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
	for line := range strings.Lines(text) {
		if list, ok := strings.CutPrefix(line, "Address = "); ok {
			for a := range strings.SplitSeq(strings.TrimSpace(list), ",") {
				c.addrs = append(c.addrs, netip.MustParsePrefix(strings.TrimSpace(a)).Addr())
			}
		}
	}
	if len(c.addrs) != 2 {
		w.t.Fatalf("the printed configuration has no two addresses:\n%s", text)
	}
	return c
}

// sends has the client send more networks into the VPN than it was told to.
func (c *client) sends(networks string) {
	c.w.t.Helper()
	text, err := os.ReadFile(c.conf)
	if err == nil {
		err = os.WriteFile(c.conf, []byte(strings.Replace(string(text), "AllowedIPs = ", "AllowedIPs = "+networks+", ", 1)), 0o600)
	}
	if err != nil {
		c.w.t.Fatal(err)
	}
}

// up connects by wg-quick.
func (c *client) up() {
	c.w.t.Helper()
	c.quick("up")
	c.w.t.Cleanup(func() { c.quick("down") })
}

func (c *client) quick(verb string) {
	c.w.t.Helper()
	cmd := exec.Command("wg-quick", verb, c.conf)
	cmd.Env = append(os.Environ(), "PATH="+programs(c.w.t)+":"+os.Getenv("PATH"))
	var out []byte
	if err := c.Run(func() (err error) { out, err = cmd.CombinedOutput(); return err }); err != nil {
		c.w.t.Fatalf("wg-quick %s: %v: %s", verb, err, out)
	}
}

// from is the client's address of the family of to.
func (c *client) from(to netip.Addr) netip.Addr {
	if to.Is4() {
		return c.addrs[0]
	}
	return c.addrs[1]
}

// resolve asks the gateway's resolver for a name.
func (c *client) resolve(name, qtype string) (addrs []netip.Addr, rcode int, err error) {
	q := new(dns.Msg)
	q.SetQuestion(dns.Fqdn(name), dns.StringToType[qtype])
	var m *dns.Msg
	err = c.Run(func() (err error) {
		m, err = dns.Exchange(q, "10.66.0.1:53")
		return err
	})
	if err != nil {
		return nil, 0, err
	}
	for _, rr := range m.Answer {
		switch rr := rr.(type) {
		case *dns.A:
			addrs = append(addrs, netip.MustParseAddr(rr.A.String()))
		case *dns.AAAA:
			addrs = append(addrs, netip.MustParseAddr(rr.AAAA.String()))
		}
	}
	return addrs, m.Rcode, nil
}

// reaches waits until a connection is made: the first one waits for the handshake.
func (c *client) reaches(to netip.AddrPort) {
	c.w.t.Helper()
	c.w.until(fmt.Sprintf("%s reaches %s", c.link, to), func() bool { return c.TCP(c.from(to.Addr()), to) == nil })
}

// refused reports whether a connection is refused, and at once.
func (c *client) refused(to netip.AddrPort) error {
	start := time.Now()
	conn, err := c.Dial(c.from(to.Addr()), to)
	took := time.Since(start)
	if err == nil {
		_ = conn.Close()
		return errors.New("a connection was made")
	}
	var slow net.Error
	if errors.As(err, &slow) && slow.Timeout() {
		return fmt.Errorf("no answer within %v: %w", took, err)
	}
	return nil
}

// ping asks for an echo.
func (c *client) ping(to netip.Addr) error {
	network, typ, reply := "ip4:icmp", icmp.Type(ipv4.ICMPTypeEcho), icmp.Type(ipv4.ICMPTypeEchoReply)
	if to.Is6() {
		network, typ, reply = "ip6:ipv6-icmp", ipv6.ICMPTypeEchoRequest, ipv6.ICMPTypeEchoReply
	}
	return c.Run(func() error {
		conn, err := icmp.ListenPacket(network, c.from(to).String())
		if err != nil {
			return err
		}
		defer conn.Close()
		text, err := (&icmp.Message{Type: typ, Body: &icmp.Echo{ID: 7, Seq: 1, Data: []byte("hello")}}).Marshal(nil)
		if err != nil {
			return err
		}
		if _, err := conn.WriteTo(text, &net.IPAddr{IP: to.AsSlice()}); err != nil {
			return err
		}
		if err := conn.SetReadDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
			return err
		}
		for answer := make([]byte, 1500); ; {
			n, from, err := conn.ReadFrom(answer)
			if err != nil {
				return err
			}
			m, err := icmp.ParseMessage(map[bool]int{false: 1, true: 58}[to.Is6()], answer[:n])
			if err == nil && m.Type == reply && from.String() == to.String() {
				return nil
			}
		}
	})
}

// transfer is a TCP connection on which data runs, both ways, as fast as it may.
type transfer struct {
	conn net.Conn
	last atomic.Int64 // when bytes last came, in Unix nanoseconds
	done chan struct{}
}

func (c *client) transfer(to netip.AddrPort) *transfer {
	c.w.t.Helper()
	conn, err := c.Dial(c.from(to.Addr()), to)
	if err != nil {
		c.w.t.Fatalf("begin a transfer: %v", err)
	}
	x := &transfer{conn: conn, done: make(chan struct{})}
	c.w.t.Cleanup(func() { _ = conn.Close(); <-x.done })
	go func() {
		data := make([]byte, 16<<10)
		for {
			if _, err := conn.Write(data); err != nil {
				return
			}
			time.Sleep(2 * time.Millisecond)
		}
	}()
	go func() {
		defer close(x.done)
		data := make([]byte, 16<<10)
		for {
			n, err := conn.Read(data)
			if n > 0 {
				x.last.Store(time.Now().UnixNano())
			}
			if err != nil {
				return
			}
		}
	}()
	c.w.until("the transfer runs", func() bool { return x.last.Load() != 0 })
	return x
}

// stopped waits until nothing has come for a while, and returns how long after
// since bytes still came.
func (x *transfer) stopped(since time.Time) (time.Duration, error) {
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if last := time.Unix(0, x.last.Load()); time.Since(last) > 1200*time.Millisecond {
			return max(0, last.Sub(since)), nil
		}
	}
	return 0, errors.New("the transfer goes on")
}

// syncBuffer is a log that is read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// cleanup runs the verb that ends the VPN.
func (w *world) cleanup() error {
	_, err := w.gateway.Exec(filepath.Join(programs(w.t), "edgeward-tunnel"), "cleanup", "--config", w.file)
	return err
}

func listenUDP(addr string) (net.PacketConn, error) {
	return new(net.ListenConfig).ListenPacket(context.Background(), "udp", addr)
}

package device

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	wg "golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/edgeward/edgeward/internal/netns"
)

// The tests live in a world of their own: the test binary runs itself again in a
// new network namespace, which is the gateway's machine, and with a /run of its
// own, where the sockets of devices are. Clients are TUN devices in further
// namespaces, whose packets reach the gateway over loopback.
const (
	inside = "EDGEWARD_DEVICE_TEST"
	role   = "EDGEWARD_DEVICE_ROLE"
	wish   = "EDGEWARD_DEVICE_WISH"
)

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(role) == "gateway":
		os.Exit(gateway())
	case os.Getenv(inside) != "":
		if err := furnish(); err != nil {
			fmt.Fprintln(os.Stderr, "these tests need root, namespaces and /dev/net/tun:", err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	again := exec.Command("/proc/self/exe", os.Args[1:]...)
	again.Args[0] = os.Args[0]
	again.Env = append(os.Environ(), inside+"=1")
	again.Stdin, again.Stdout, again.Stderr = os.Stdin, os.Stdout, os.Stderr
	again.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS}
	err := again.Run()
	if err != nil && again.ProcessState == nil {
		fmt.Fprintln(os.Stderr, "these tests need root and namespaces:", err)
		os.Exit(1)
	}
	os.Exit(again.ProcessState.ExitCode())
}

// furnish makes the new namespaces a place to live in.
func furnish() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	// Whoever has the right may open it, as in a container; on the machine
	// itself that depends.
	if err := unix.Mknod("/run/tun", unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200))); err != nil {
		return err
	}
	if err := os.Chmod("/run/tun", 0o666); err != nil {
		return err
	}
	if err := unix.Mount("/run/tun", "/dev/net/tun", "", unix.MS_BIND, ""); err != nil {
		return err
	}
	for _, name := range []string{"all", "default"} {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/accept_dad", []byte("0"), 0o644); err != nil {
			return err
		}
	}
	return exec.Command("ip", "link", "set", "lo", "up").Run()
}

func secret() Secret {
	var s Secret
	_, _ = rand.Read(s[:])
	s[0] &= 248
	s[31] = s[31]&127 | 64
	return s
}

// freePort returns a UDP port that nobody has.
func freePort(t testing.TB) uint16 {
	t.Helper()
	c, err := net.ListenUDP("udp", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

func prefixes(all ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range all {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// basics is a device's configuration with n peers that nobody is behind.
func basics(t testing.TB, n int) Config {
	c := Config{PrivateKey: secret(), ListenPort: freePort(t), Addresses: prefixes("10.66.0.1/16", "fd66::1/64")}
	for i := range n {
		c.Peers = append(c.Peers, somePeer(i))
	}
	return c
}

// somePeer is the peer of a number, always the same but for its keys.
func somePeer(i int) Peer {
	v6 := netip.MustParseAddr("fd66::").As16()
	binary.BigEndian.PutUint32(v6[12:], uint32(i+100))
	return Peer{
		Name: fmt.Sprintf("peer-%05d", i), PublicKey: Key(secret()), PresharedKey: secret(), // nobody has the private key
		AllowedIPs: []netip.Prefix{
			netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 66, byte((i + 100) >> 8), byte(i + 100)}), 32),
			netip.PrefixFrom(netip.AddrFrom16(v6), 128),
		},
	}
}

// testLog is a log that a test reads.
type testLog struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *testLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *testLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (l *testLog) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

// mustOpen opens a device that ends with the test.
func mustOpen(t testing.TB, o Options) *Device {
	t.Helper()
	if o.Name == "" {
		o.Name = "edgeward0"
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	d, err := Open(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

func mustReconcile(t testing.TB, d *Device, want Config) Changes {
	t.Helper()
	c, err := d.Reconcile(want)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// member is somebody with a WireGuard of their own, in a namespace of their own.
type member struct {
	t    testing.TB
	ns   *netns.NS
	dev  *wg.Device
	key  Secret
	psk  Secret
	addr []netip.Prefix
}

// join makes a client of the gateway and the peer that it is to the gateway.
func join(t testing.TB, name string, gateway Config, addrs ...string) (*member, Peer) {
	t.Helper()
	m := &member{t: t, ns: netns.New(t), key: secret(), psk: secret(), addr: prefixes(addrs...)}
	var device tun.Device
	m.ns.Must(func() (err error) {
		device, err = tun.CreateTUN("wg0", 1420)
		return err
	})
	m.ns.MustExec("ip", "link", "set", "wg0", "addrgenmode", "none")
	for _, a := range addrs {
		m.ns.MustExec("ip", "address", "add", a, "dev", "wg0")
	}
	m.ns.MustExec("ip", "link", "set", "wg0", "up")
	m.ns.MustExec("ip", "route", "add", "10.66.0.0/16", "dev", "wg0")
	m.ns.MustExec("ip", "route", "add", "fd66::/64", "dev", "wg0")
	m.dev = wg.NewDevice(device, conn.NewDefaultBind(), &wg.Logger{Verbosef: wg.DiscardLogf, Errorf: wg.DiscardLogf})
	t.Cleanup(m.dev.Close)
	m.set("private_key=%s\nlisten_port=0\npublic_key=%s\npreshared_key=%s\nendpoint=127.0.0.1:%d\n"+
		"replace_allowed_ips=true\nallowed_ip=10.66.0.0/16\nallowed_ip=fd66::/64\n",
		hexOf(m.key), hexOf(gateway.PrivateKey.Public()), hexOf(m.psk), gateway.ListenPort)
	if err := m.dev.Up(); err != nil {
		t.Fatal(err)
	}
	p := Peer{Name: name, PublicKey: m.key.Public(), PresharedKey: m.psk}
	for _, a := range m.addr {
		p.AllowedIPs = append(p.AllowedIPs, netip.PrefixFrom(a.Addr(), a.Addr().BitLen()))
	}
	return m, p
}

func hexOf[T ~[32]byte](k T) string { b := [32]byte(k); return hex.EncodeToString(b[:]) }

func (m *member) set(format string, args ...any) {
	m.t.Helper()
	if err := m.dev.IpcSet(fmt.Sprintf(format, args...)); err != nil {
		m.t.Fatal(err)
	}
}

// echo answers each datagram on the gateway's machine with itself.
func echo(t testing.TB) uint16 {
	t.Helper()
	c, err := net.ListenUDP("udp", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	go func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			_, _ = c.WriteToUDPAddrPort(buf[:n], from)
		}
	}()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

// pings are datagrams to an echo, one each 20 ms.
type pings struct {
	c    net.Conn
	stop chan struct{}
	done chan struct{}

	mu   sync.Mutex
	back map[uint64]time.Duration // when each came back after it was sent
	sent []time.Time
	last time.Time
	gap  time.Duration // the longest without an answer
}

const pingEvery = 20 * time.Millisecond

// ping begins to ping and returns when the first answer is there.
func (m *member) ping(to string, port uint16) *pings {
	m.t.Helper()
	p := &pings{stop: make(chan struct{}), done: make(chan struct{}), back: map[uint64]time.Duration{}}
	m.ns.Must(func() (err error) {
		p.c, err = net.Dial("udp", netip.AddrPortFrom(netip.MustParseAddr(to), port).String())
		return err
	})
	m.t.Cleanup(func() { p.c.Close() })
	answered := make(chan struct{})
	go func() {
		for {
			var b [8]byte
			n, err := p.c.Read(b[:])
			if err == io.EOF || err != nil && strings.Contains(err.Error(), "closed") {
				return
			}
			if n != len(b) {
				continue // a refusal, while nothing listens
			}
			now := time.Now()
			p.mu.Lock()
			i := binary.BigEndian.Uint64(b[:])
			p.back[i] = now.Sub(p.sent[i])
			if p.last.IsZero() {
				close(answered)
			} else {
				p.gap = max(p.gap, now.Sub(p.last))
			}
			p.last = now
			p.mu.Unlock()
		}
	}()
	go func() {
		defer close(p.done)
		for tick := time.NewTicker(pingEvery); ; {
			p.mu.Lock()
			var b [8]byte
			binary.BigEndian.PutUint64(b[:], uint64(len(p.sent)))
			p.sent = append(p.sent, time.Now())
			p.mu.Unlock()
			_, _ = p.c.Write(b[:])
			select {
			case <-p.stop:
				return
			case <-tick.C:
			}
		}
	}()
	select {
	case <-answered:
	case <-time.After(20 * time.Second):
		m.t.Fatalf("no answer from %s:%d through the tunnel", to, port)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gap = 0
	return p
}

// end stops the pings and says how many were lost since the first answer, and the
// longest time without one.
func (p *pings) end() (lost, sent int, gap time.Duration) {
	close(p.stop)
	<-p.done
	time.Sleep(300 * time.Millisecond)
	p.mu.Lock()
	defer p.mu.Unlock()
	first := uint64(len(p.sent))
	for i := range p.back {
		first = min(first, i)
	}
	for i := first; i < uint64(len(p.sent)); i++ {
		sent++
		if _, ok := p.back[i]; !ok {
			lost++
		}
	}
	return lost, sent, max(p.gap, time.Since(p.last)-300*time.Millisecond)
}

// A gateway is this test binary as a process of its own: it opens a device, makes
// it what its environment wishes, says so, and waits to be ended.
type wished struct {
	Name, StateDir string
	Key            []byte
	Port           uint16
	Peers          []wishedPeer
}

type wishedPeer struct {
	Name     string
	Key, PSK []byte
	IPs      []netip.Prefix
}

func gateway() int {
	text, err := os.ReadFile(os.Getenv(wish))
	var w wished
	if err == nil {
		err = json.Unmarshal(text, &w)
	}
	if err != nil {
		fmt.Println("read wish:", err)
		return 1
	}
	want := Config{PrivateKey: Secret(w.Key), ListenPort: w.Port, Addresses: prefixes("10.66.0.1/16", "fd66::1/64")}
	for _, p := range w.Peers {
		want.Peers = append(want.Peers, Peer{Name: p.Name, PublicKey: Key(p.Key), PresharedKey: Secret(p.PSK), AllowedIPs: p.IPs})
	}
	d, err := Open(context.Background(), Options{
		Name: w.Name, Mode: Userspace, StateDir: w.StateDir, Want: want,
		Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
	if err == nil {
		_, err = d.Reconcile(want)
	}
	if err != nil {
		fmt.Println("error:", strings.ReplaceAll(err.Error(), "\n", "; "))
		return 1
	}
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin) // until the test closes it
	if err := d.Close(); err != nil {
		fmt.Println("error:", err)
		return 1
	}
	return 0
}

// wishFile writes what a gateway process is to be.
func wishFile(t testing.TB, name, stateDir string, c Config) string {
	t.Helper()
	w := wished{Name: name, StateDir: stateDir, Key: c.PrivateKey[:], Port: c.ListenPort}
	for _, p := range c.Peers {
		w.Peers = append(w.Peers, wishedPeer{p.Name, p.PublicKey[:], p.PresharedKey[:], p.AllowedIPs})
	}
	text, err := json.Marshal(w)
	if err != nil {
		t.Fatal(err)
	}
	file := t.TempDir() + "/wish.json"
	if err := os.WriteFile(file, text, 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

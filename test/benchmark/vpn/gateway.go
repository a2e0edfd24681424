package main

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	wg "golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/edgeward/edgeward/internal/daemon"
	"github.com/edgeward/edgeward/internal/netns"
	"github.com/edgeward/edgeward/internal/nft"
	"github.com/edgeward/edgeward/test/benchmark/stage"
	"github.com/edgeward/edgeward/tunnel/wireguard/device"
)

// service is an address of the machine that gateways are on.
var service = netip.MustParseAddr("198.51.100.9")

// A plan is what a gateway of this program is told to be, on its standard input.
// Keys are in hexadecimal, because device's secrets do not show themselves.
type plan struct {
	Name    string
	Plain   bool // wireguard-go as it is; else our device
	Key     string
	Port    uint16
	Address netip.Prefix
	Peers   []planned
}

type planned struct {
	Key, Preshared string
	Allowed        []netip.Prefix
}

func hexOf[T ~[32]byte](k T) string { b := [32]byte(k); return hex.EncodeToString(b[:]) }

func parse(text string) (k [32]byte) {
	_, _ = hex.Decode(k[:], []byte(text)) // of this program
	return k
}

// serve is a gateway's process: it reads its plan, says when it is ready, and
// lasts as long as its standard input.
func serve(in io.Reader, out io.Writer) error {
	lines := bufio.NewReader(in)
	text, err := lines.ReadBytes('\n')
	var p plan
	if err == nil {
		err = json.Unmarshal(text, &p)
	}
	if err != nil {
		return errors.New("read the plan: this program starts its gateways itself; leave -gateway out")
	}
	var end func()
	if p.Plain {
		end, err = servePlain(p)
	} else {
		end, err = serveOurs(p)
	}
	if err != nil {
		return err
	}
	defer end()
	fmt.Fprintln(out, "ready")
	_, err = io.Copy(io.Discard, lines)
	return err
}

func serveOurs(p plan) (end func(), err error) {
	want := device.Config{PrivateKey: parse(p.Key), ListenPort: p.Port, Addresses: []netip.Prefix{p.Address}}
	for i, peer := range p.Peers {
		want.Peers = append(want.Peers, device.Peer{
			Name: fmt.Sprint("peer-", i), PublicKey: parse(peer.Key), PresharedKey: parse(peer.Preshared), AllowedIPs: peer.Allowed,
		})
	}
	d, err := device.Open(context.Background(), device.Options{Name: p.Name, Mode: device.Userspace, Want: want, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, err
	}
	if _, err := d.Reconcile(want); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return func() { _ = d.Close() }, nil
}

func servePlain(p plan) (end func(), err error) {
	settings := fmt.Sprintf("private_key=%s\nlisten_port=%d\n", p.Key, p.Port)
	for _, peer := range p.Peers {
		settings += fmt.Sprintf("public_key=%s\npreshared_key=%s\n", peer.Key, peer.Preshared)
		for _, ip := range peer.Allowed {
			settings += fmt.Sprintf("allowed_ip=%v\n", ip)
		}
	}
	t, err := tun.CreateTUN(p.Name, mtu)
	if err != nil {
		return nil, fmt.Errorf("make TUN device %s: %w", p.Name, err)
	}
	d, err := startPlain(t, settings)
	if err != nil {
		return nil, err
	}
	for _, args := range [][]string{{"address", "add", p.Address.String(), "dev", p.Name}, {"link", "set", p.Name, "up"}} {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			d.Close()
			return nil, fmt.Errorf("ip %v: %w: %s", args, err, out)
		}
	}
	return d.Close, nil
}

const mtu = 1420

// startPlain starts wireguard-go as its authors have it. Its UDP socket is in the
// namespace of the caller, wherever the TUN device is.
func startPlain(t tun.Device, settings string) (*wg.Device, error) {
	d := wg.NewDevice(t, conn.NewDefaultBind(), &wg.Logger{Verbosef: wg.DiscardLogf, Errorf: wg.DiscardLogf})
	if err := errors.Join(d.IpcSet(settings), d.Up()); err != nil {
		d.Close()
		return nil, fmt.Errorf("configure wireguard-go: %w", err)
	}
	return d, nil
}

// start starts this program as a gateway, which ends with the scope.
func start(s *stage.Scope, p plan) (pid int, err error) {
	text, err := json.Marshal(p)
	if err != nil {
		return 0, err
	}
	cmd := exec.Command("/proc/self/exe", "-gateway")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return 0, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("start a gateway: %w", err)
	}
	s.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed
	})
	if _, err := in.Write(append(text, '\n')); err != nil {
		return 0, fmt.Errorf("start a gateway: %w", err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		return 0, fmt.Errorf("start a gateway: it says %q and ends", line)
	}
	return cmd.Process.Pid, nil
}

// client is somebody with a WireGuard of their own, in a namespace of their own.
type client struct {
	ns             *netns.NS
	key, preshared device.Secret
	address        netip.Addr
}

// join makes a client with the address that follows a gateway's, which knows it
// by its keys.
func join(s *stage.Scope, gateway netip.Prefix, key device.Key, port uint16) (*client, error) {
	c := &client{ns: netns.New(s), key: secret(), preshared: secret(), address: gateway.Addr().Next()}
	settings := fmt.Sprintf("private_key=%s\nlisten_port=0\npublic_key=%s\npreshared_key=%s\nendpoint=127.0.0.1:%d\nallowed_ip=0.0.0.0/0\n",
		hexOf(c.key), hexOf(key), hexOf(c.preshared), port)
	var t tun.Device
	c.ns.Must(func() (err error) {
		t, err = tun.CreateTUN("wg0", mtu)
		return err
	})
	d, err := startPlain(t, settings)
	if err != nil {
		return nil, err
	}
	s.Cleanup(d.Close)
	c.ns.MustExec("ip", "address", "add", host(c.address).String(), "dev", "wg0")
	c.ns.MustExec("ip", "link", "set", "wg0", "up")
	c.ns.MustExec("ip", "route", "add", "default", "dev", "wg0")
	return c, nil
}

// program is the built program as the gateway of this machine.
type program struct {
	scope             *stage.Scope
	binary, dir, file string
	key               device.Secret
	port              uint16
	cmd               *exec.Cmd
	log               string
}

// newProgram writes what the program reads: n peers, of which one may be a client,
// who may reach UDP port echo of the service.
func newProgram(s *stage.Scope, binaries string, n int, echo uint16) (*program, error) {
	dir, err := os.MkdirTemp("", "edgeward-bench-")
	if err != nil {
		return nil, fmt.Errorf("make a directory: %w", err)
	}
	s.Cleanup(func() {
		os.RemoveAll(dir)
		forget()
	})
	g := &program{
		scope: s, binary: filepath.Join(binaries, "edgeward-tunnel"), dir: dir, file: filepath.Join(dir, "tunnel.yaml"), log: filepath.Join(dir, "log"),
		key: secret(), port: freePort(s),
	}
	if err := os.WriteFile(filepath.Join(dir, "key"), []byte(base64.StdEncoding.EncodeToString(g.key[:])+"\n"), 0o600); err != nil {
		return nil, fmt.Errorf("write a key: %w", err)
	}
	text := fmt.Sprintf(`wireguard:
  interface: edgeward0
  mode: userspace
  listenPort: %d
  addresses: [10.66.0.1/16, fd66::1/64]
  privateKeyFile: %[2]s/key
  presharedKeyDir: %[2]s
services: [{name: echo, addresses: [%v], ports: [%d/udp]}]
grants: [{to: ["group:family"], services: [echo]}]
socket: %[2]s/sock
stateDir: %[2]s
logFormat: text
peers:
`, g.port, dir, service, echo)
	if n == 0 {
		text = strings.Replace(text, "peers:\n", "peers: []\n", 1)
	}
	if err := os.WriteFile(g.file, []byte(text), 0o600); err != nil {
		return nil, fmt.Errorf("write a configuration: %w", err)
	}
	for i := range n {
		if err := g.peer(i, device.Key(secret()), secret(), numbered(peers4, i), numbered(peers6, i)); err != nil {
			return nil, err
		}
	}
	return g, nil
}

// peer adds a peer to the file.
func (g *program) peer(i int, key device.Key, preshared device.Secret, addresses ...netip.Addr) error {
	psk := filepath.Join(g.dir, fmt.Sprintf("peer-%d.psk", i))
	err := os.WriteFile(psk, []byte(base64.StdEncoding.EncodeToString(preshared[:])+"\n"), 0o600)
	if err != nil {
		return fmt.Errorf("write a key: %w", err)
	}
	file, err := os.OpenFile(g.file, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("write a configuration: %w", err)
	}
	texts := make([]string, len(addresses))
	for i, a := range addresses {
		texts[i] = fmt.Sprintf("%q", a)
	}
	_, err = fmt.Fprintf(file, "  - {name: peer-%d, publicKey: %q, presharedKeyFile: %q, groups: [family], addresses: [%s]}\n",
		i, key, psk, strings.Join(texts, ", "))
	return errors.Join(err, file.Close())
}

// start starts the program and returns when it is ready, with the time that took.
func (g *program) start() (time.Duration, error) {
	log, err := os.OpenFile(g.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return 0, fmt.Errorf("keep a log: %w", err)
	}
	defer log.Close()
	g.cmd = exec.Command(g.binary, "run", "--role", "wireguard", "--config", g.file)
	g.cmd.Stdout, g.cmd.Stderr = log, log
	began := time.Now()
	if err := g.cmd.Start(); err != nil {
		return 0, fmt.Errorf("start the program: %w", err)
	}
	cmd := g.cmd
	g.scope.Cleanup(func() { end(cmd, syscall.SIGKILL) })
	for {
		var status struct{ Ready string }
		err := daemon.Ask(g.scope, filepath.Join(g.dir, "sock"), "/v1/status", nil, &status)
		if err == nil && status.Ready == "yes" {
			return time.Since(began), nil
		}
		if time.Since(began) > 2*time.Minute {
			text, _ := os.ReadFile(g.log)
			return 0, fmt.Errorf("the program does not get ready: %v: it wrote:\n%s", err, text[max(0, len(text)-2000):])
		}
		if err := stage.Wait(g.scope, 5*time.Millisecond); err != nil {
			return 0, err
		}
	}
}

// end ends a process, if it has not ended.
func end(cmd *exec.Cmd, by syscall.Signal) {
	if cmd.ProcessState == nil {
		_ = cmd.Process.Signal(by)
		_ = cmd.Wait() // it was told to
	}
}

// forget takes the rules away that a program leaves when it is killed, and that
// would judge the next gateway of this machine.
func forget() {
	if conn, err := nft.OpenAccess(nft.Options{}); err == nil {
		_ = conn.Delete() // or the next packets are lost, and say so
		conn.Close()
	}
}

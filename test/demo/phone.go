package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/edgeward/edgeward/internal/netns"
	"github.com/edgeward/edgeward/test/rig"
	"github.com/edgeward/edgeward/tunnel/wireguard/device"
	"github.com/edgeward/edgeward/tunnel/wireguard/wgquick"
)

// asPhone has the demo's program be WireGuard on the phone: its value is the file
// with the configuration.
const asPhone = "EDGEWARD_DEMO_PHONE"

// phone is a machine far away that has a configuration of the VPN's.
type phone struct {
	*netns.NS
	cmd    *exec.Cmd
	hangUp io.Closer
	names  netip.AddrPort // the resolver that the configuration names
	addr   netip.Addr     // in the VPN
}

// connect starts WireGuard on a machine with the configuration in a file, and
// returns when its interface is up. dir is the process's to work in.
func connect(ctx context.Context, ns *netns.NS, netNS, dir, file string) (*phone, error) {
	conf, err := readConfiguration(file)
	if err != nil {
		return nil, err
	}
	if len(conf.Interface.DNS) == 0 || len(conf.Interface.Addresses) == 0 {
		return nil, fmt.Errorf("%s names no resolver, or no address", file)
	}
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("start WireGuard on the phone: %w", err)
	}
	line := rig.OwnRun(netNS, self)
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), asPhone+"="+file)
	var wrong bytes.Buffer
	cmd.Stderr = &wrong
	hangUp, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start WireGuard on the phone: %w", err)
	}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return nil, fmt.Errorf("start WireGuard on the phone: %w", err)
	}
	p := &phone{NS: ns, cmd: cmd, hangUp: hangUp, names: netip.AddrPortFrom(conf.Interface.DNS[0], 53), addr: conf.Interface.Addresses[0].Addr()}
	up := make(chan error, 1)
	go func() {
		_, err := bufio.NewReader(out).ReadString('\n')
		up <- err
	}()
	select {
	case err = <-up:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		p.close()
		return nil, fmt.Errorf("start WireGuard on the phone: %w: %s", err, bytes.TrimSpace(wrong.Bytes()))
	}
	return p, nil
}

// close ends WireGuard on the phone.
func (p *phone) close() {
	_ = p.hangUp.Close()
	late := time.AfterFunc(5*time.Second, func() { _ = p.cmd.Process.Kill() })
	defer late.Stop()
	_ = p.cmd.Wait() // how it ended is of no interest
}

// dial connects from the phone to what may have a name.
func (p *phone) dial(ctx context.Context, network, to string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(to)
	if err != nil {
		return nil, err
	}
	// With a dot at its end a name is whole, whatever this machine searches.
	resolver := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return p.reach(ctx, network, p.names.String())
	}}
	if _, err := netip.ParseAddr(host); err != nil {
		addrs, err := resolver.LookupNetIP(ctx, "ip4", host+".")
		if err != nil {
			return nil, err
		}
		host = addrs[0].Unmap().String()
	}
	return p.reach(ctx, network, net.JoinHostPort(host, port))
}

// reach connects from the phone to an address.
func (p *phone) reach(ctx context.Context, network, to string) (conn net.Conn, err error) {
	err = p.Run(func() (err error) {
		conn, err = new(net.Dialer).DialContext(ctx, network, to)
		return err
	})
	return conn, err
}

// browser asks from the phone, each time by a connection of its own.
func (p *phone) browser() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: p.dial, DisableKeepAlives: true}}
}

func readConfiguration(file string) (wgquick.File, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return wgquick.File{}, fmt.Errorf("read the phone's configuration: %w", err)
	}
	return wgquick.Parse(filepath.Base(file), text)
}

// bePhone is WireGuard in this process, in the network that it is in, until
// standard input ends: it ends with the demo, however that does.
func bePhone(file string) error {
	signal.Ignore(os.Interrupt, syscall.SIGHUP) // of the terminal, for the demo
	conf, err := readConfiguration(file)
	if err != nil {
		return err
	}
	if err := useNames(filepath.Dir(file), conf.Interface.DNS); err != nil {
		return err
	}
	want := device.Config{PrivateKey: device.Secret(conf.Interface.PrivateKey.Bytes()), ListenPort: 51820, Addresses: conf.Interface.Addresses}
	for _, p := range conf.Peers {
		endpoint, err := netip.ParseAddrPort(p.Endpoint)
		if err != nil {
			return fmt.Errorf("read the phone's configuration: %w", err)
		}
		want.Routes = append(want.Routes, p.AllowedIPs...)
		want.Peers = append(want.Peers, device.Peer{
			Name: "gateway", PublicKey: device.Key(p.PublicKey), PresharedKey: device.Secret(p.PresharedKey.Bytes()),
			AllowedIPs: p.AllowedIPs, Endpoint: endpoint, Keepalive: p.Keepalive,
		})
	}
	d, err := device.Open(context.Background(), device.Options{
		Name: "wg0", Mode: device.Userspace, Want: want, Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
	if err != nil {
		return err
	}
	if _, err := d.Reconcile(want); err != nil {
		return errors.Join(err, d.Close())
	}
	fmt.Println("up")
	_, _ = io.Copy(io.Discard, os.Stdin)
	return d.Close()
}

// useNames has the programs of this mount namespace, and of no other, ask the
// VPN's resolver.
func useNames(dir string, servers []netip.Addr) error {
	text := ""
	for _, s := range servers {
		text += fmt.Sprintf("nameserver %v\n", s)
	}
	place := "/etc/resolv.conf"
	if to, err := os.Readlink(place); err == nil {
		if !filepath.IsAbs(to) {
			to = filepath.Join(filepath.Dir(place), to)
		}
		place = to
	}
	// What was below /run is hidden by ours, and we are free to write there.
	if slices.ContainsFunc([]string{"/run/", "/var/run/"}, func(run string) bool { return strings.HasPrefix(place, run) }) {
		if err := os.MkdirAll(filepath.Dir(place), 0o755); err != nil {
			return fmt.Errorf("use the VPN's resolver: %w", err)
		}
		return os.WriteFile(place, []byte(text), 0o644)
	}
	file := filepath.Join(dir, "resolv.conf")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		return fmt.Errorf("use the VPN's resolver: %w", err)
	}
	// Where there is no such file nobody asks for names by it.
	if err := unix.Mount(file, place, "", unix.MS_BIND, ""); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("use the VPN's resolver: %w", err)
	}
	return nil
}

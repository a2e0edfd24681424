package bouncer

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/edgeward/edgeward/internal/decision"
)

// Protected is a prefix that no decision stops, and why.
type Protected struct {
	Prefix netip.Prefix `json:"prefix"`
	Why    string       `json:"why"`
}

// guard knows what is protected. What it found once stays protected while it
// cannot look again.
type guard struct {
	fixed   []Protected
	sources []source
	log     *slog.Logger
}

// source is one place where protected addresses are found out.
type source struct {
	why     string
	read    func(context.Context) ([]netip.Prefix, error)
	last    []netip.Prefix
	trouble string // as logged
}

// newGuard returns the guard of this machine; getenv is os.Getenv, where
// Kubernetes says where its API server is.
func newGuard(c *Config, getenv func(string) string, log *slog.Logger) *guard {
	g := &guard{log: log.With("component", "guard")}
	fix := func(why string, prefixes ...netip.Prefix) {
		for _, p := range prefixes {
			g.fixed = append(g.fixed, Protected{p, why})
		}
	}
	for _, text := range []string{"127.0.0.0/8", "::1/128"} {
		fix("loopback", netip.MustParsePrefix(text))
	}
	for _, text := range []string{"169.254.0.0/16", "fe80::/10"} {
		fix("link-local", netip.MustParsePrefix(text))
	}
	for _, text := range []string{"0.0.0.0/32", "::/128"} {
		fix("a machine that has no address yet", netip.MustParsePrefix(text))
	}
	fix("protect.addresses", c.Protect.Addresses...)
	fix("protect.cluster: pods and services", c.Protect.Cluster...)
	if c.Protect.Cloudflare {
		known, _ := decision.Known("cloudflare")
		fix("Cloudflare's edge", known...)
	}
	g.sources = []source{
		{why: "this node's own address", read: interfaceAddrs},
		{why: "the default gateway", read: gateways},
		{why: "a DNS server of this node", read: nameservers},
		{why: "a VPN of this node", read: tunnels},
		{why: "the Kubernetes control plane", read: controlPlane},
	}
	if host := hostOf(c.LAPI.URL); host != "" {
		g.sources = append(g.sources, source{why: "LAPI", read: func(ctx context.Context) ([]netip.Prefix, error) { return resolve(ctx, host) }})
	}
	if host := getenv("KUBERNETES_SERVICE_HOST"); host != "" {
		g.sources = append(g.sources, source{why: "the Kubernetes API server", read: func(ctx context.Context) ([]netip.Prefix, error) { return resolve(ctx, host) }})
	}
	return g
}

// look returns all that is protected now, sorted, each prefix once.
func (g *guard) look(ctx context.Context) []Protected {
	out := slices.Clone(g.fixed)
	for i := range g.sources {
		s := &g.sources[i]
		found, err := s.read(ctx)
		switch {
		case err == nil:
			s.last = found
			s.trouble = ""
		case ctx.Err() == nil && err.Error() != s.trouble:
			s.trouble = err.Error()
			g.log.Warn("cannot find out protected addresses, keeping the last ones", "of", s.why, "err", err)
		}
		for _, p := range s.last {
			out = append(out, Protected{p, s.why})
		}
	}
	slices.SortStableFunc(out, func(a, b Protected) int {
		if c := a.Prefix.Addr().Compare(b.Prefix.Addr()); c != 0 {
			return c
		}
		return a.Prefix.Bits() - b.Prefix.Bits()
	})
	return slices.CompactFunc(out, func(a, b Protected) bool { return a.Prefix == b.Prefix })
}

// whyProtected returns why p, or part of it, is protected; the narrowest reason
// says most.
func whyProtected(list []Protected, p netip.Prefix) string {
	why, bits := "", -1
	for _, g := range list {
		if g.Prefix.Overlaps(p) && g.Prefix.Bits() > bits {
			why, bits = g.Why, g.Prefix.Bits()
		}
	}
	return why
}

func prefixesOf(list []Protected) []netip.Prefix {
	out := make([]netip.Prefix, len(list))
	for i, p := range list {
		out[i] = p.Prefix
	}
	return out
}

func single(a netip.Addr) netip.Prefix {
	a = a.Unmap().WithZone("")
	return netip.PrefixFrom(a, a.BitLen())
}

func interfaceAddrs(context.Context) ([]netip.Prefix, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list interface addresses: %w", err)
	}
	var out []netip.Prefix
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok {
			if addr, ok := netip.AddrFromSlice(n.IP); ok {
				out = append(out, single(addr))
			}
		}
	}
	return out, nil
}

func gateways(context.Context) ([]netip.Prefix, error) {
	four, err := os.ReadFile("/proc/net/route")
	if err != nil {
		return nil, fmt.Errorf("read routes: %w", err)
	}
	six, err := os.ReadFile("/proc/net/ipv6_route")
	if err != nil && !os.IsNotExist(err) { // a kernel without IPv6 has none
		return nil, fmt.Errorf("read routes: %w", err)
	}
	return append(parseRoutes4(four), parseRoutes6(six)...), nil
}

// parseRoutes4 returns the default gateways of /proc/net/route, whose lines are
// "Iface Destination Gateway Flags RefCnt Use Metric Mask ...", with addresses as
// the machine's integers.
func parseRoutes4(text []byte) []netip.Prefix {
	const zero = "00000000"
	var out []netip.Prefix
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		f := strings.Fields(lines.Text())
		if len(f) < 8 || f[1] != zero || f[7] != zero || f[2] == zero {
			continue
		}
		if b, err := hex.DecodeString(f[2]); err == nil && len(b) == 4 {
			var a [4]byte
			binary.NativeEndian.PutUint32(a[:], binary.BigEndian.Uint32(b))
			out = append(out, single(netip.AddrFrom4(a)))
		}
	}
	return out
}

// parseRoutes6 returns the default gateways of /proc/net/ipv6_route, whose lines
// are "destination length source length nexthop ...", in network order.
func parseRoutes6(text []byte) []netip.Prefix {
	zero := strings.Repeat("0", 32)
	var out []netip.Prefix
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		f := strings.Fields(lines.Text())
		if len(f) < 5 || f[0] != zero || f[1] != "00" || f[4] == zero {
			continue
		}
		if b, err := hex.DecodeString(f[4]); err == nil && len(b) == 16 {
			out = append(out, single(netip.AddrFrom16([16]byte(b))))
		}
	}
	return out
}

// resolvFiles are where a node's DNS servers stand: the second has those that
// systemd-resolved asks, where the first names itself alone.
var resolvFiles = []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"}

func nameservers(context.Context) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, path := range resolvFiles {
		text, err := os.ReadFile(path)
		if err != nil && !os.IsNotExist(err) {
			return nil, fmt.Errorf("read DNS servers: %w", err)
		}
		out = append(out, parseNameservers(text)...)
	}
	return out, nil
}

// controlPlaneFiles are where an agent of k3s keeps the addresses of its servers,
// the virtual one among them. They are there if the bouncer runs beside it as a
// unit; a pod does not see them.
const controlPlaneFiles = "/var/lib/rancher/*/agent/etc/*-agent-load-balancer.json"

func controlPlane(ctx context.Context) ([]netip.Prefix, error) {
	paths, err := filepath.Glob(controlPlaneFiles)
	if err != nil {
		return nil, fmt.Errorf("find the servers of the cluster: %w", err)
	}
	var out []netip.Prefix
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("read the servers of the cluster: %w", err)
		}
		hosts, err := parseServers(text)
		if err != nil {
			return nil, fmt.Errorf("read the servers of the cluster: %s: %w", path, err)
		}
		for _, host := range hosts {
			found, err := resolve(ctx, host)
			if err != nil {
				return nil, err
			}
			out = append(out, found...)
		}
	}
	return out, nil
}

// parseServers returns the hosts that a file of controlPlaneFiles names.
func parseServers(text []byte) ([]string, error) {
	var file struct {
		ServerURL       string
		ServerAddresses []string
	}
	if err := json.Unmarshal(text, &file); err != nil {
		return nil, err
	}
	var out []string
	if host := hostOf(file.ServerURL); host != "" {
		out = append(out, host)
	}
	for _, a := range file.ServerAddresses {
		if host, _, err := net.SplitHostPort(a); err == nil {
			a = host
		}
		if a != "" {
			out = append(out, a)
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// A tunnel may carry all that a node sends, and still not everybody is a peer:
// wider ranges than these are somebody else's network.
const (
	widestTunnel4 = 8
	widestTunnel6 = 16
)

// tunnels returns the networks of tunnels, such as WireGuard's, Tailscale's and
// OpenVPN's: those that their interfaces are in, and the private ones that routes
// of any table lead into them. Public ones are not peers': whoever sends all but
// the home network through a provider has half the world as routes.
func tunnels(context.Context) ([]netip.Prefix, error) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	var out []netip.Prefix
	add := func(p netip.Prefix) {
		p = p.Masked()
		if p.Addr().Is4() && p.Bits() >= widestTunnel4 || p.Addr().Is6() && p.Bits() >= widestTunnel6 {
			out = append(out, p)
		}
	}
	of := map[int]bool{}
	for _, i := range interfaces {
		if i.Flags&net.FlagPointToPoint == 0 {
			continue
		}
		of[i.Index] = true
		addrs, err := i.Addrs()
		if err != nil {
			return nil, fmt.Errorf("list addresses of %s: %w", i.Name, err)
		}
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok {
				if addr, ok := netip.AddrFromSlice(n.IP); ok {
					ones, _ := n.Mask.Size()
					add(netip.PrefixFrom(addr.Unmap(), ones))
				}
			}
		}
	}
	if len(of) == 0 {
		return nil, nil
	}
	table, err := syscall.NetlinkRIB(syscall.RTM_GETROUTE, syscall.AF_UNSPEC)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	routes, err := parseRoutes(table)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	private, _ := decision.Known("private")
	ours := zoneOf(private)
	for _, r := range routes {
		if of[r.out] && ours.holds(r.to.Masked()) {
			add(r.to)
		}
	}
	return out, nil
}

// route is a route to other machines, and the interface that it goes out by.
type route struct {
	to  netip.Prefix
	out int
}

// parseRoutes reads the kernel's answer to RTM_GETROUTE.
func parseRoutes(table []byte) ([]route, error) {
	messages, err := syscall.ParseNetlinkMessage(table)
	if err != nil {
		return nil, err
	}
	var out []route
	for _, m := range messages {
		// Of struct rtmsg: family, length of the destination, ..., type, flags.
		if m.Header.Type != syscall.RTM_NEWROUTE || len(m.Data) < syscall.SizeofRtMsg || m.Data[7] != syscall.RTN_UNICAST {
			continue
		}
		attrs, err := syscall.ParseNetlinkRouteAttr(&m)
		if err != nil {
			return nil, err
		}
		var r route
		for _, a := range attrs {
			switch a.Attr.Type {
			case syscall.RTA_DST:
				if addr, ok := netip.AddrFromSlice(a.Value); ok {
					r.to = netip.PrefixFrom(addr, int(m.Data[1]))
				}
			case syscall.RTA_OIF:
				if len(a.Value) == 4 {
					r.out = int(binary.NativeEndian.Uint32(a.Value))
				}
			}
		}
		if r.to.IsValid() && r.out > 0 {
			out = append(out, r)
		}
	}
	return out, nil
}

func parseNameservers(text []byte) []netip.Prefix {
	var out []netip.Prefix
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		f := strings.Fields(lines.Text())
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		if addr, err := netip.ParseAddr(f[1]); err == nil {
			out = append(out, single(addr))
		}
	}
	return out
}

// hostOf is the host of LAPI's URL; a unix socket has none.
func hostOf(text string) string {
	u, err := url.Parse(text)
	if err != nil {
		return ""
	}
	return u.Hostname()
}

// resolveTimeout is short: the loop that keeps the kernel in step waits.
const resolveTimeout = 2 * time.Second

func resolve(ctx context.Context, host string) ([]netip.Prefix, error) {
	if addr, err := netip.ParseAddr(host); err == nil {
		return []netip.Prefix{single(addr)}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, fmt.Errorf("resolve %s: %w", host, err)
	}
	var out []netip.Prefix
	for _, a := range addrs {
		out = append(out, single(a))
	}
	return out, nil
}

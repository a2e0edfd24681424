package bouncer

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"iter"
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
	fix(whyOperator, c.Protect.Addresses...)
	fix("protect.cluster: pods and services", c.Protect.Cluster...)
	if c.Protect.Cloudflare {
		known, _ := decision.Known("cloudflare")
		fix("Cloudflare's edge", known...)
	}
	g.sources = []source{
		{why: whyOwn, read: interfaceAddrs},
		{why: whyGateway, read: gateways},
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

// The reasons that say most about a range, most of all the last.
const (
	whyOperator = "protect.addresses"
	whyOwn      = "this node's own address"
	whyGateway  = "the default gateway"
)

// whyProtected returns why p, or part of it, is protected: the reason that says
// most if p is a range, and else the narrowest.
func whyProtected(list []Protected, p netip.Prefix) string {
	telling := []string{whyOperator, whyOwn, whyGateway}
	why, rank, bits := "", -1, -1
	for _, g := range list {
		if !g.Prefix.Overlaps(p) {
			continue
		}
		r := -1
		if !p.IsSingleIP() {
			r = slices.Index(telling, g.Why)
		}
		if r > rank || r == rank && g.Prefix.Bits() > bits {
			why, rank, bits = g.Why, r, g.Prefix.Bits()
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

// gateways returns those of the default routes of all tables.
func gateways(context.Context) ([]netip.Prefix, error) {
	routes, err := listRoutes()
	if err != nil {
		return nil, err
	}
	var out []netip.Prefix
	for _, r := range routes {
		if r.to.Bits() == 0 {
			for _, a := range r.via {
				out = append(out, single(a))
			}
		}
	}
	return out, nil
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
	routes, err := listRoutes()
	if err != nil {
		return nil, err
	}
	private, _ := decision.Known("private")
	ours := zoneOf(private)
	for _, r := range routes {
		if slices.ContainsFunc(r.out, func(i int) bool { return of[i] }) && ours.holds(r.to.Masked()) {
			add(r.to)
		}
	}
	return out, nil
}

// route is a route to other machines, with the interfaces that it goes out by and
// the gateways that it goes to: several if it has several paths.
type route struct {
	to  netip.Prefix
	out []int
	via []netip.Addr
}

// listRoutes returns the routes of all tables.
func listRoutes() ([]route, error) {
	table, err := syscall.NetlinkRIB(syscall.RTM_GETROUTE, syscall.AF_UNSPEC)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	routes, err := parseRoutes(table)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	return routes, nil
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
		var r route
		switch m.Data[0] { // without RTA_DST it is the default route
		case syscall.AF_INET:
			r.to = netip.PrefixFrom(netip.IPv4Unspecified(), int(m.Data[1]))
		case syscall.AF_INET6:
			r.to = netip.PrefixFrom(netip.IPv6Unspecified(), int(m.Data[1]))
		}
		r.read(m.Data[syscall.SizeofRtMsg:])
		if r.to.IsValid() && len(r.out) > 0 {
			out = append(out, r)
		}
	}
	return out, nil
}

// read takes in the attributes of a route, or of one of its paths.
func (r *route) read(attrs []byte) {
	const (
		path    = 8  // struct rtnexthop: length, flags, hops, interface
		typeVia = 18 // a gateway of another family, which its first two bytes name
	)
	leave := func(index []byte) {
		if len(index) == 4 {
			r.out = append(r.out, int(binary.NativeEndian.Uint32(index)))
		}
	}
	pass := func(gateway []byte) {
		if a, ok := netip.AddrFromSlice(gateway); ok {
			r.via = append(r.via, a)
		}
	}
	for head, value := range records(attrs, syscall.SizeofRtAttr) {
		switch binary.NativeEndian.Uint16(head[2:]) {
		case syscall.RTA_DST:
			if a, ok := netip.AddrFromSlice(value); ok {
				r.to = netip.PrefixFrom(a, r.to.Bits())
			}
		case syscall.RTA_OIF:
			leave(value)
		case syscall.RTA_GATEWAY:
			pass(value)
		case typeVia:
			pass(value[min(2, len(value)):])
		case syscall.RTA_MULTIPATH:
			for head, attrs := range records(value, path) {
				leave(head[4:])
				r.read(attrs)
			}
		}
	}
}

// records yields what stands one after another in a netlink message, each as its
// head, whose first two bytes are the length of both, and what follows that.
func records(data []byte, head int) iter.Seq2[[]byte, []byte] {
	return func(yield func([]byte, []byte) bool) {
		for len(data) >= head {
			n := int(binary.NativeEndian.Uint16(data))
			if n < head || n > len(data) || !yield(data[:head], data[head:n]) {
				return
			}
			data = data[min((n+3)&^3, len(data)):]
		}
	}
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

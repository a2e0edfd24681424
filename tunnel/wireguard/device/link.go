package device

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// mark is the alias of each interface that the kernel keeps for us, so that none
// of somebody else's is taken for our own.
const mark = "edgeward"

// routeProtocol marks our routes in the kernel; the numbers from 4 on are for
// programs like this.
const routeProtocol = 66

// ErrNoKernel is what forcing Kernel fails with where the kernel has no WireGuard.
var ErrNoKernel = errors.New("the kernel has no WireGuard")

// kind is the kernel's kind of interface for WireGuard: what differs from an
// interface of any other kind. Tests stand in for it.
type kind interface {
	// probe fails with ErrNoKernel where the kernel cannot make such an interface.
	probe() error
	// add makes one, down.
	add(name string) error
	// is says whether an interface is of the kind.
	is(netlink.Link) bool
}

// wireguardKind is the kind of that name.
type wireguardKind struct{}

// probe asks for an interface that cannot be, by an MTU out of bounds: a kernel
// that knows the kind says so (after loading the module), and one that does not
// says that instead; nothing is left behind.
func (wireguardKind) probe() error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "edgeward-probe"
	attrs.MTU = math.MaxInt32
	err := netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs})
	switch {
	case err == nil: // a kernel with no bound at all
		return netlink.LinkDel(&netlink.Wireguard{LinkAttrs: attrs})
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ERANGE):
		return nil
	case errors.Is(err, unix.EOPNOTSUPP):
		return ErrNoKernel
	}
	return fmt.Errorf("ask the kernel for WireGuard: %w", rights(err))
}

func (wireguardKind) add(name string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	return netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs})
}

func (wireguardKind) is(link netlink.Link) bool { return link.Type() == "wireguard" }

// rights says what is missing where a right is.
func rights(err error) error {
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w: give the process CAP_NET_ADMIN", err)
	}
	return err
}

// linkByName returns an interface, or nil if there is none of that name.
func linkByName(name string) (netlink.Link, error) {
	link, err := netlink.LinkByName(name)
	if none := (netlink.LinkNotFoundError{}); errors.As(err, &none) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for interface %s: %w", name, err)
	}
	return link, nil
}

// ours lists the interfaces that the kernel keeps for us.
func ours() ([]netlink.Link, error) {
	all, err := linkList()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(l netlink.Link) bool { return l.Attrs().Alias != mark }), nil
}

// linkList lists all interfaces. A dump that other changes ran into is begun again.
func linkList() ([]netlink.Link, error) {
	var all []netlink.Link
	var err error
	for range 5 {
		all, err = netlink.LinkList()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	return all, nil
}

// makeKernelLink makes the kernel's interface and marks it as ours.
func makeKernelLink(k kind, name string) error {
	if err := k.add(name); err != nil {
		return fmt.Errorf("make interface %s: %w", name, rights(err))
	}
	link, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetAlias(link, mark)
	}
	if err != nil {
		return fmt.Errorf("mark interface %s as ours: %w", name, err)
	}
	return nil
}

// waitGone waits until an interface that an ending process holds is gone.
func waitGone(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	for {
		link, err := linkByName(name)
		if link == nil || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("interface %s is a TUN device of another process: end that, or choose another name for the interface", name)
		case <-time.After(releaseStep):
		}
	}
}

// A process that was killed lets go of what it held one after the other, which the
// next one need not take for a reason to fail.
const (
	release     = 500 * time.Millisecond
	releaseStep = 10 * time.Millisecond
)

// eventually tries for as long as an ending process may stand in the way.
func eventually(try func() error) error {
	for begin := time.Now(); ; time.Sleep(releaseStep) {
		if err := try(); err == nil || time.Since(begin) > release {
			return err
		}
	}
}

// readLink fills in what of a device is the interface's.
func readLink(link netlink.Link, have *Have) error {
	have.MTU = link.Attrs().MTU
	have.Up = link.Attrs().Flags&net.FlagUp != 0
	addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("read addresses of %s: %w", link.Attrs().Name, err)
	}
	for _, a := range addrs {
		if p := prefix(a.IPNet); p.IsValid() && !p.Addr().IsLinkLocalUnicast() {
			have.Addresses = append(have.Addresses, p)
		}
	}
	have.Addresses = ordered(have.Addresses)
	routes, err := mainRoutes(link.Attrs().Index)
	if err != nil {
		return fmt.Errorf("read routes of %s: %w", link.Attrs().Name, err)
	}
	for _, r := range routes {
		if p := prefix(r.Dst); r.Protocol == routeProtocol && p.IsValid() {
			have.Routes = append(have.Routes, p)
		}
	}
	have.Routes = canonical(have.Routes)
	return nil
}

// mainRoutes lists the routes of the main table, through one interface or, with
// index 0, all.
func mainRoutes(index int) ([]netlink.Route, error) {
	filter, mask := &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE
	if index != 0 {
		filter.LinkIndex = index
		mask |= netlink.RT_FILTER_OIF
	}
	// A dump that other changes ran into is begun again.
	var routes []netlink.Route
	var err error
	for range 5 {
		routes, err = netlink.RouteListFiltered(netlink.FAMILY_ALL, filter, mask)
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return routes, err
}

// applyLink makes those of the changes that are the interface's, except to bring
// it up. It goes on after a failure.
func applyLink(link netlink.Link, c Changes) error {
	var errs []error
	try := func(err error, format string, args ...any) {
		if err != nil {
			errs = append(errs, fmt.Errorf(format+": %w", append(args, rights(err))...))
		}
	}
	if c.MTU != 0 {
		try(netlink.LinkSetMTU(link, c.MTU), "set MTU %d", c.MTU)
	}
	add := func(p netip.Prefix) error {
		addr := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD // nobody else is on the link
		}
		err := netlink.AddrReplace(link, addr)
		if err != nil && p.Addr().Is6() && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.EOPNOTSUPP)) {
			err = fmt.Errorf("%w: IPv6 is switched off on this machine: switch it on, or take the address out", err)
		}
		return err
	}
	for _, p := range c.AddAddresses {
		try(add(p), "add address %v", p)
	}
	for _, p := range c.RemoveAddresses {
		if err := netlink.AddrDel(link, &netlink.Addr{IPNet: ipNet(p)}); !errors.Is(err, unix.EADDRNOTAVAIL) {
			try(err, "remove address %v", p)
		}
	}
	for _, p := range c.RemoveRoutes {
		if err := netlink.RouteDel(route(link, p)); !errors.Is(err, unix.ESRCH) {
			try(err, "remove route %v", p)
		}
	}
	// With an IPv4 address the kernel removes those that it took for secondary.
	if len(c.RemoveAddresses) > 0 {
		for _, p := range c.AddAddresses {
			try(add(p), "add address %v", p)
		}
	}
	return errors.Join(errs...)
}

// applyRoutes adds the routes; the interface must be up.
func applyRoutes(link netlink.Link, c Changes) error {
	var errs []error
	for _, p := range c.AddRoutes {
		if err := netlink.RouteReplace(route(link, p)); err != nil {
			errs = append(errs, fmt.Errorf("add route %v: %w", p, rights(err)))
		}
	}
	return errors.Join(errs...)
}

func route(link netlink.Link, p netip.Prefix) *netlink.Route {
	r := &netlink.Route{Dst: ipNet(p), LinkIndex: link.Attrs().Index, Table: unix.RT_TABLE_MAIN, Protocol: routeProtocol}
	if p.Addr().Is4() {
		r.Scope = netlink.SCOPE_LINK
	}
	return r
}

// quiet keeps the kernel from giving the interface an address of its own choice
// and from asking for routers there. Where IPv6 is off there is nothing to do.
func quiet(link netlink.Link) {
	_ = netlink.LinkSetIP6AddrGenMode(link, nl.IN6_ADDR_GEN_MODE_NONE)
}

// sysctls is where the kernel's network settings are.
const sysctls = "/proc/sys/net"

// forwarding makes sure that the machine passes packets on, for each family that
// the VPN has. What it cannot switch on it says how to.
func forwarding(addresses []netip.Prefix) error {
	var v4, v6 bool
	for _, a := range addresses {
		v4, v6 = v4 || a.Addr().Is4(), v6 || a.Addr().Is6()
	}
	var errs []error
	if v4 {
		errs = append(errs, switchOn("ipv4/ip_forward", "net.ipv4.ip_forward", nil))
	}
	if v6 {
		errs = append(errs, switchOn("ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding", keepsListening))
	}
	return errors.Join(errs...)
}

func switchOn(path, name string, first func() error) error {
	path = filepath.Join(sysctls, path)
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // no such family: its address said so already
	}
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	if strings.TrimSpace(string(text)) != "0" {
		return nil
	}
	if first != nil {
		if err := first(); err != nil {
			return err
		}
	}
	if err := os.WriteFile(path, []byte("1"), 0o644); err != nil {
		return fmt.Errorf("peers reach nothing behind this machine: %s is 0 and cannot be set from here (%w): "+
			"set %s = 1 in /etc/sysctl.d on the node and run `sysctl --system`", name, errors.Unwrap(err), name)
	}
	return nil
}

// keepsListening refuses to make a router of a machine that has its own IPv6
// route from a router's advertisements: it would stop to hear them.
func keepsListening() error {
	routes, err := mainRoutes(0)
	if err != nil {
		return fmt.Errorf("read routes: %w", err)
	}
	for _, r := range routes {
		if r.Protocol != unix.RTPROT_RA {
			continue
		}
		link, err := netlink.LinkByIndex(r.LinkIndex)
		if err != nil {
			continue
		}
		name := link.Attrs().Name
		text, err := os.ReadFile(filepath.Join(sysctls, "ipv6/conf", name, "accept_ra"))
		if err == nil && strings.TrimSpace(string(text)) == "1" {
			return fmt.Errorf("net.ipv6.conf.all.forwarding is 0, and with 1 this machine would lose the IPv6 route that it learned on %s: "+
				"set net.ipv6.conf.%s.accept_ra = 2 and then net.ipv6.conf.all.forwarding = 1", name, strings.ReplaceAll(name, ".", "/"))
		}
	}
	return nil
}

// prefix converts; what is none comes out invalid.
func prefix(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	addr, ok := netip.AddrFromSlice(n.IP)
	if !ok {
		return netip.Prefix{}
	}
	ones, bits := n.Mask.Size()
	// The masks of an IPv4 network may come with an address of 16 bytes.
	if addr.Is4In6() && bits == 32 {
		addr = addr.Unmap()
	}
	if bits != addr.BitLen() {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(addr, ones)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func setUp(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(link)
}

func delLink(link netlink.Link) error { return netlink.LinkDel(link) }

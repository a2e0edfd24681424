package device

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// belongs says what an interface of a name that k3s gives is there for.
var belongs = map[string]string{
	"cni0":          ", where the pods of this node are",
	"flannel.1":     ", the way to the pods of other nodes",
	"flannel-wg":    ", the way to the pods of other nodes",
	"flannel-wg-v6": ", the way to the pods of other nodes",
	"kube-ipvs0":    ", where kube-proxy keeps the addresses of services",
}

// Conflict is a network of the VPN that this machine uses otherwise already.
type Conflict struct {
	Network netip.Prefix // of the VPN
	Uses    string       // what is there, such as "192.168.7.5/24, the address of lan0"
}

// Conflicts finds what of the given networks is in use on this machine already,
// beyond the interface of that name: an address, or a route that is not the
// default one. A route by way of a router for a network that holds one of ours
// is no conflict: the narrower route wins, which is what routes are like. Each
// network is named once.
func Conflicts(name string, networks []netip.Prefix) ([]Conflict, error) {
	if len(networks) == 0 {
		return nil, nil
	}
	links, err := undisturbed(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	names := make(map[int]string, len(links))
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	addrs, err := undisturbed(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	routes, err := mainRoutes(0)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	var out []Conflict
	for _, n := range networks {
		n = n.Masked()
		if uses := inUse(name, n, names, addrs, routes); uses != "" {
			out = append(out, Conflict{n, uses})
		}
	}
	return out, nil
}

// undisturbed begins a dump again that changes ran into.
func undisturbed[T any](dump func() ([]T, error)) (all []T, err error) {
	for range 10 {
		if all, err = dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}

// inUse says what of a network is in use; empty for nothing.
func inUse(name string, n netip.Prefix, names map[int]string, addrs []netlink.Addr, routes []netlink.Route) string {
	for _, a := range addrs {
		p, on := prefix(a.IPNet), names[a.LinkIndex]
		if on != name && p.IsValid() && p.Overlaps(n) {
			return fmt.Sprintf("%v, the address of %s%s", p, on, belongs[on])
		}
	}
	for _, r := range routes {
		p, on := prefix(r.Dst), names[r.LinkIndex]
		if !p.IsValid() || p.Bits() == 0 || !p.Overlaps(n) || on == name || r.Type != unix.RTN_UNICAST || r.Protocol == unix.RTPROT_KERNEL {
			continue
		}
		routed := r.Gw != nil || r.Via != nil || len(r.MultiPath) > 0
		if routed && p.Bits() < n.Bits() {
			continue
		}
		return fmt.Sprintf("%v, which this machine reaches through %s%s", p, on, belongs[on])
	}
	return ""
}

// overlaps is Conflicts as an error with its cure; the first are networks that the
// device has addresses in, the others lie behind peers.
func overlaps(name string, addresses, routes []netip.Prefix) error {
	all, err := Conflicts(name, slices.Concat(addresses, routes))
	if err != nil {
		return err
	}
	var errs []error
	for _, c := range all {
		cure := "give the VPN another network"
		if !slices.ContainsFunc(addresses, func(a netip.Prefix) bool { return a.Masked() == c.Network }) {
			cure = "take it out of its peer's allowed IPs"
		}
		errs = append(errs, fmt.Errorf("%v of the VPN overlaps %s: %s", c.Network, c.Uses, cure))
	}
	return errors.Join(errs...)
}

// portFree fails if something else receives on a UDP port, and says what, as far
// as that can be seen from here.
func portFree(port uint16) error {
	for _, network := range []string{"udp4", "udp6"} {
		conn, err := net.ListenUDP(network, &net.UDPAddr{Port: int(port)})
		if err == nil {
			_ = conn.Close()
			continue
		}
		if errors.Is(err, unix.EADDRINUSE) {
			return portTaken(port)
		}
		if errors.Is(err, unix.EACCES) {
			return fmt.Errorf("listen on UDP port %d: %w: choose one from 1024 on", port, unix.EACCES)
		}
	}
	return nil // a family that is not there is not wanted
}

// portTaken is the error for a port that something else has.
func portTaken(port uint16) error {
	who := portHolder(port)
	if who == "" {
		who = "something that cannot be seen from here"
	}
	return fmt.Errorf("UDP port %d is taken by %s: choose another listen port", port, who)
}

// portHolder names who receives on a UDP port: a process, or, since the sockets
// of the kernel's own WireGuard belong to none, such an interface.
func portHolder(port uint16) string {
	inodes := map[string]bool{}
	for _, file := range []string{"/proc/thread-self/net/udp", "/proc/thread-self/net/udp6"} {
		f, err := os.Open(file)
		if err != nil {
			continue
		}
		for lines := bufio.NewScanner(f); lines.Scan(); {
			fields := strings.Fields(lines.Text())
			if len(fields) < 10 {
				continue
			}
			if _, at, ok := strings.Cut(fields[1], ":"); ok {
				if n, err := strconv.ParseUint(at, 16, 16); err == nil && uint16(n) == port {
					inodes["socket:["+fields[9]+"]"] = true
				}
			}
		}
		_ = f.Close()
	}
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, l := range links {
		if to, err := os.Readlink(l); err == nil && inodes[to] {
			process := filepath.Dir(filepath.Dir(l))
			comm, _ := os.ReadFile(filepath.Join(process, "comm"))
			return fmt.Sprintf("process %s, %s", filepath.Base(process), strings.TrimSpace(string(comm)))
		}
	}
	var kernels []string
	if all, err := netlink.LinkList(); err == nil {
		for _, l := range all {
			if l.Type() == "wireguard" {
				kernels = append(kernels, l.Attrs().Name+belongs[l.Attrs().Name])
			}
		}
	}
	if len(kernels) > 0 {
		return "the kernel, probably for WireGuard's " + strings.Join(kernels, ", or ")
	}
	return ""
}

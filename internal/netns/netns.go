// Package netns gives tests networks of their own: namespaces, the cables
// between them, and traffic through those. What a test does there ends with it
// and reaches nothing outside. It needs root, and fails where it is not given:
// a test of the kernel that skips has shown nothing. Tests, benchmarks and the demo
// call it; the bouncer's probe, which tests a node where it stands, calls Attach.
package netns

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TB is what of a testing.TB is needed: programs that link this package do not
// link that one. Fatal and Fatalf do not return.
type TB interface {
	Helper()
	Cleanup(func())
	Fatal(...any)
	Fatalf(string, ...any)
}

// NS is a network namespace.
type NS struct {
	t    TB
	fd   int
	wait time.Duration // for traffic
}

// New makes a namespace with its loopback interface up, and nothing else. It
// goes when t ends.
func New(t TB) *NS {
	t.Helper()
	fd, err := unshare()
	if err != nil {
		t.Fatalf("this test needs root and network namespaces: unshare: %v", err)
	}
	ns := &NS{t: t, fd: fd, wait: timeout}
	t.Cleanup(func() { unix.Close(fd) })
	// Duplicate address detection would hold up the first second of IPv6.
	ns.Sysctl("ipv6/conf/all/accept_dad", "0")
	ns.Sysctl("ipv6/conf/default/accept_dad", "0")
	ns.link(func(h *netlink.Handle) error {
		lo, err := h.LinkByName("lo")
		if err != nil {
			return err
		}
		return h.LinkSetUp(lo)
	})
	return ns
}

// unshare returns a file descriptor of a new namespace.
func unshare() (int, error) {
	type result struct {
		fd  int
		err error
	}
	made := make(chan result)
	go func() {
		// Never unlocked: the thread has left the process's namespace and is
		// thrown away with the goroutine.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			made <- result{err: err}
			return
		}
		fd, err := unix.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		made <- result{fd, err}
	}()
	r := <-made
	return r.fd, r.err
}

// FD is a file descriptor of the namespace, for as long as the test runs.
func (ns *NS) FD() int { return ns.fd }

// Run calls f on a thread inside the namespace, and returns when f does.
// Sockets that f opens stay inside. f must not start goroutines that count on
// being there, nor end the test: that is for the caller, with the error.
func (ns *NS) Run(f func() error) error { return inside(ns.fd, f) }

func inside(fd int, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good, as in unshare
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter namespace: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}

// Must is Run for what has to succeed.
func (ns *NS) Must(f func() error) {
	ns.t.Helper()
	if err := ns.Run(f); err != nil {
		ns.t.Fatal(err)
	}
}

// Exec runs a command inside and returns what it wrote, all of it in the error.
func (ns *NS) Exec(name string, args ...string) (string, error) {
	var out, all bytes.Buffer
	err := ns.Run(func() error {
		cmd := exec.Command(name, args...)
		cmd.Stdout = &out
		cmd.Stderr = &all
		return cmd.Run()
	})
	if err != nil {
		return out.String(), fmt.Errorf("%s %s: %w: %s%s", name, strings.Join(args, " "), err, out.String(), all.String())
	}
	return out.String(), nil
}

// MustExec is Exec for what has to succeed.
func (ns *NS) MustExec(name string, args ...string) string {
	ns.t.Helper()
	out, err := ns.Exec(name, args...)
	if err != nil {
		ns.t.Fatal(err)
	}
	return out
}

// cables counts cables.
var cables atomic.Int32

// End is one end of a cable.
type End struct {
	NS    *NS
	Name  string
	Addrs []netip.Prefix
}

// Cable connects two namespaces by a pair of interfaces, and returns when packets
// pass.
func Cable(a, b End) {
	a.NS.t.Helper()
	a.NS.link(func(h *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = a.Name
		// Each in its namespace, both ends would get the same small number,
		// which the kernel takes for an interface without a peer, and may take
		// a second to call ready.
		attrs.Index = 1000 + int(cables.Add(1))
		veth := &netlink.Veth{LinkAttrs: attrs, PeerName: b.Name, PeerNamespace: netlink.NsFd(b.NS.fd)}
		return h.LinkAdd(veth)
	})
	for _, end := range []End{a, b} {
		end.NS.link(func(h *netlink.Handle) error {
			link, err := h.LinkByName(end.Name)
			if err != nil {
				return err
			}
			if err := h.LinkSetUp(link); err != nil {
				return err
			}
			for _, p := range end.Addrs {
				if err := h.AddrAdd(link, &netlink.Addr{IPNet: ipNet(p)}); err != nil {
					return fmt.Errorf("add address %v: %w", p, err)
				}
			}
			return nil
		})
	}
	for _, end := range []End{a, b} {
		end.NS.link(func(h *netlink.Handle) error {
			for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
				link, err := h.LinkByName(end.Name)
				if err != nil {
					return err
				}
				// Duplicate address detection is off, but an IPv6 address is of
				// no use until a kernel thread has found that out.
				addrs, err := h.AddrList(link, unix.AF_INET6)
				if err != nil {
					return err
				}
				waits := slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.Flags&unix.IFA_F_TENTATIVE != 0 })
				if link.Attrs().OperState == netlink.OperUp && !waits {
					return nil
				}
				if time.Now().After(deadline) {
					return fmt.Errorf("interface %s is %v and does not come up", end.Name, link.Attrs().OperState)
				}
			}
		})
	}
}

// Route sends packets to dst by way of via.
func (ns *NS) Route(dst netip.Prefix, via netip.Addr) {
	ns.t.Helper()
	ns.link(func(h *netlink.Handle) error {
		if err := h.RouteAdd(&netlink.Route{Dst: ipNet(dst), Gw: via.AsSlice()}); err != nil {
			return fmt.Errorf("add route to %v: %w", dst, err)
		}
		return nil
	})
}

// Own makes every address of p one of the namespace's own: to be answered, and
// to be bound to as a source.
func (ns *NS) Own(p netip.Prefix) {
	ns.t.Helper()
	if p.Addr().Is6() {
		ns.Sysctl("ipv6/ip_nonlocal_bind", "1") // IPv4 takes the route's word
	}
	ns.link(func(h *netlink.Handle) error {
		lo, err := h.LinkByName("lo")
		if err != nil {
			return err
		}
		route := &netlink.Route{
			Dst: ipNet(p), LinkIndex: lo.Attrs().Index, Table: unix.RT_TABLE_LOCAL,
			Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST,
		}
		if err := h.RouteAdd(route); err != nil {
			return fmt.Errorf("own %v: %w", p, err)
		}
		return nil
	})
}

// Sysctl sets a network setting of the namespace, such as
// "ipv4/conf/all/forwarding".
func (ns *NS) Sysctl(name, value string) {
	ns.t.Helper()
	ns.Must(func() error {
		return os.WriteFile(filepath.Join("/proc/sys/net", name), []byte(value), 0o644)
	})
}

// Forwarding lets packets pass through the namespace.
func (ns *NS) Forwarding() {
	ns.t.Helper()
	ns.Sysctl("ipv4/conf/all/forwarding", "1")
	ns.Sysctl("ipv6/conf/all/forwarding", "1")
}

// Forget empties connection tracking.
func (ns *NS) Forget() {
	ns.t.Helper()
	ns.link(func(h *netlink.Handle) error { return h.ConntrackTableFlush(netlink.ConntrackTable) }, unix.NETLINK_NETFILTER)
}

// Tracked returns how many connections of the namespace's connection tracking
// began at source.
func (ns *NS) Tracked(source netip.Addr) int {
	ns.t.Helper()
	family := netlink.InetFamily(unix.AF_INET)
	if source.Is6() {
		family = unix.AF_INET6
	}
	n := 0
	ns.link(func(h *netlink.Handle) error {
		flows, err := h.ConntrackTableList(netlink.ConntrackTable, family)
		if err != nil {
			return fmt.Errorf("list tracked connections: %w", err)
		}
		for _, f := range flows {
			if from, ok := netip.AddrFromSlice(f.Forward.SrcIP); ok && from.Unmap() == source {
				n++
			}
		}
		return nil
	}, unix.NETLINK_NETFILTER)
	return n
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// link calls f with a handle on the namespace's interfaces and routes, or what
// else it is to speak to.
func (ns *NS) link(f func(*netlink.Handle) error, families ...int) {
	ns.t.Helper()
	if len(families) == 0 {
		families = []int{unix.NETLINK_ROUTE}
	}
	ns.Must(func() error {
		h, err := netlink.NewHandle(families...)
		if err != nil {
			return err
		}
		defer h.Close()
		return f(h)
	})
}

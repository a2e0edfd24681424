package netns

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Stranger is a namespace at the other end of a cable that begins in the
// caller's network. Unlike the rest of this package it is for programs: it
// returns its errors, and goes with the process if that does not close it.
type Stranger struct {
	fd   int
	name string
}

// Attach makes a stranger. name is that of the caller's end of the cable, which
// must not be there yet.
func Attach(name string) (*Stranger, error) {
	fd, err := unshare()
	if errors.Is(err, unix.EPERM) {
		return nil, fmt.Errorf("make a network namespace: %w: run it as root, with CAP_SYS_ADMIN, on the node itself", err)
	}
	if err != nil {
		return nil, fmt.Errorf("make a network namespace: %w", err)
	}
	s := &Stranger{fd: fd, name: name}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	// Both ends with the same number would look like an interface without a
	// peer, as in Cable.
	attrs.Index = 1<<20 + rand.IntN(1<<20)
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: name, PeerNamespace: netlink.NsFd(fd)}); err != nil {
		unix.Close(fd)
		if errors.Is(err, unix.EEXIST) {
			return nil, fmt.Errorf("lay a cable: interface %s is there already: is another one at work?", name)
		}
		return nil, fmt.Errorf("lay a cable: %w", err)
	}
	err = s.each(func(h *netlink.Handle, link netlink.Link, _ bool) error { return h.LinkSetUp(link) })
	if err == nil {
		err = s.each(func(h *netlink.Handle, link netlink.Link, _ bool) error {
			for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
				link, err := h.LinkByName(name)
				if err != nil || link.Attrs().OperState == netlink.OperUp {
					return err
				}
				if time.Now().After(deadline) {
					return fmt.Errorf("interface %s is %v and does not come up", name, link.Attrs().OperState)
				}
			}
		})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lay a cable: %w", err), s.Close())
	}
	return s, nil
}

// each calls f for both ends of the cable; far says which it is.
func (s *Stranger) each(f func(h *netlink.Handle, link netlink.Link, far bool) error) error {
	here, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer here.Close()
	link, err := here.LinkByName(s.name)
	if err == nil {
		err = f(here, link, false)
	}
	if err != nil {
		return err
	}
	return s.Run(func() error {
		there, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer there.Close()
		link, err := there.LinkByName(s.name)
		if err != nil {
			return err
		}
		return f(there, link, true)
	})
}

// Address gives the ends their addresses, to be used at once.
func (s *Stranger) Address(near, far netip.Prefix) error {
	return s.each(func(h *netlink.Handle, link netlink.Link, isFar bool) error {
		p := near
		if isFar {
			p = far
		}
		addr := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD // nobody else is on the cable
		}
		if err := h.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("add address %v: %w", p, err)
		}
		return nil
	})
}

// Run calls f inside, as NS.Run does.
func (s *Stranger) Run(f func() error) error { return inside(s.fd, f) }

// Close removes the cable, and the namespace with it.
func (s *Stranger) Close() error {
	link, err := netlink.LinkByName(s.name)
	if err == nil {
		err = netlink.LinkDel(link)
	}
	if err != nil {
		err = fmt.Errorf("remove the cable: %w", err)
	}
	return errors.Join(err, unix.Close(s.fd))
}

package device

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// apply makes the changes. It goes on after a failure, so that what can be done
// is; what could not is in the error, and the next turn reads and compares anew.
// Removals come first. A port that is taken is refused before it is sent, and an
// address or route that is another's likewise: the device keeps what it has.
func (d *Device) apply(c Changes) error {
	var errs []error
	try := func(err error) {
		if err != nil {
			errs = append(errs, err)
		}
	}
	defer d.settle(c)
	rotates := c.Rotated
	peers := func(c Changes) {
		if all := peerConfigs(c); len(all) > 0 {
			if err := d.configure(wgtypes.Config{Peers: all}); err != nil {
				try(err)
				rotates = nil // not done, or not all of it: the next turn sees
			}
		}
	}

	// Kernel and wireguard-go alike stop at the first thing that they refuse. So
	// what may be refused is not before the peers that go.
	if len(c.Remove) > 0 && (c.PrivateKey != nil || c.ListenPort != nil) {
		peers(Changes{Remove: c.Remove})
		c.Remove = nil
	}
	if c.PrivateKey != nil {
		try(d.configure(wgtypes.Config{PrivateKey: (*wgtypes.Key)(c.PrivateKey)}))
	}
	if c.ListenPort != nil {
		try(d.setPort(*c.ListenPort))
	}

	// Peers that were spoken to a moment ago, by an earlier process or before they
	// were taken off, are called as soon as packets pass: they believe in sessions
	// that are gone. On a device that is not up yet they come first.
	first, rest := d.recent(c.Add)
	d.call = append(d.call, first...)
	if c.Add = first; !d.fresh {
		c.Add, rest = slices.Concat(first, rest), nil
	}
	peers(c)

	if link, err := linkByName(d.options.Name); err != nil || link == nil {
		try(fmt.Errorf("change interface %s: %w", d.options.Name, cmp.Or(err, error(fs.ErrNotExist))))
	} else {
		if err := overlaps(d.options.Name, c.AddAddresses, c.AddRoutes); err != nil {
			try(err)
			c.AddAddresses, c.AddRoutes = nil, nil
		}
		try(applyLink(link, c))
		if c.Up {
			try(d.bringUp())
		}
		try(applyRoutes(link, c))
	}
	if d.user == nil || d.user.up {
		try(d.callPeers())
		d.fresh = false
	}
	peers(Changes{Add: rest})
	d.rotated(rotates)
	return errors.Join(errs...)
}

// bringUp lets packets pass. Without a port the device would choose one, where
// nobody looks for it.
func (d *Device) bringUp() error {
	if d.port == 0 {
		return fmt.Errorf("bring up interface %s: it has no listen port", d.options.Name)
	}
	if err := setUp(d.options.Name); err != nil {
		if errors.Is(err, unix.EADDRINUSE) { // the kernel binds the port now
			return portTaken(d.port)
		}
		return fmt.Errorf("bring up interface %s: %w", d.options.Name, rights(err))
	}
	if d.user != nil {
		return d.user.bringUp(d.port)
	}
	return nil
}

// setPort sets the listen port. wireguard-go closes the old one before it opens
// the new one, and the kernel refuses all that comes with it: so a port that
// cannot be had is not asked for, and one that is refused is taken back.
func (d *Device) setPort(port uint16) error {
	if err := portFree(port); err != nil {
		return err
	}
	set := func(port uint16) error {
		p := int(port)
		return d.configure(wgtypes.Config{ListenPort: &p})
	}
	err := set(port)
	if err == nil {
		d.port = port
		return nil
	}
	if errors.Is(err, unix.EADDRINUSE) {
		err = portTaken(port)
	}
	if d.port != 0 {
		err = errors.Join(err, set(d.port))
	}
	return err
}

// callPeers has the device send something to those that are to be called, and with
// it a handshake.
func (d *Device) callPeers() error {
	peers := d.call
	d.call = nil
	if len(peers) == 0 {
		return nil
	}
	if d.user != nil {
		d.user.call(peers)
		return nil
	}
	// The kernel calls a peer when its keepalive is turned on, and at no other
	// word. What it was is set again, by the next turn at the latest.
	var on, off []wgtypes.PeerConfig
	pause := 25 * time.Second
	for _, p := range peers {
		on = append(on, wgtypes.PeerConfig{PublicKey: wgtypes.Key(p.PublicKey), UpdateOnly: true, PersistentKeepaliveInterval: &pause})
		off = append(off, wgtypes.PeerConfig{PublicKey: wgtypes.Key(p.PublicKey), UpdateOnly: true, PersistentKeepaliveInterval: &p.Keepalive})
	}
	return errors.Join(d.configure(wgtypes.Config{Peers: on}), d.configure(wgtypes.Config{Peers: off}))
}

// recently is how old a handshake may be for its peer to be called: the time that
// a session lives, that of the memory's being behind, and some for a restart.
const recently = 5 * time.Minute

// recent parts peers into those that had a session a moment ago, with the
// endpoints from which they spoke, and the rest.
func (d *Device) recent(peers []Peer) (first, rest []Peer) {
	since := d.memory.now().Add(-recently)
	for _, p := range peers {
		r := d.memory.keys[p.PublicKey]
		if r == nil || !r.Endpoint.IsValid() || r.Handshake.Before(since) {
			rest = append(rest, p)
			continue
		}
		p.Endpoint = r.Endpoint
		first = append(first, p)
	}
	return first, rest
}

// settle notes what follows from changes, done or not: Have is going to correct it.
func (d *Device) settle(c Changes) {
	for _, r := range c.Remove {
		d.memory.left(r.Key)
		if d.user != nil {
			d.user.guard.drop(r.Key)
		}
	}
	for _, u := range c.Update {
		d.memory.name(u.Key, u.Name)
		if d.user != nil && len(u.AddIPs)+len(u.RemoveIPs) > 0 {
			d.user.guard.set(u.Key, u.IPs)
		}
	}
	for _, p := range c.Add {
		d.memory.name(p.PublicKey, p.Name)
		d.memory.joined(p.PublicKey)
		if d.user != nil {
			d.user.guard.set(p.PublicKey, p.AllowedIPs)
		}
	}
	if d.user != nil && d.options.Alone {
		d.limit.peers(d.memory.present, kernelGroups, d.log)
	}
}

// rotated tells of rotations that are done.
func (d *Device) rotated(all []Rotation) {
	for _, r := range all {
		d.log.Info("peer follows its next key", "peer", r.Name)
		delete(d.staged, r.To)
		if d.options.Rotated != nil {
			go d.options.Rotated(r)
		}
	}
}

// peerConfigs says the changes of peers in wgctrl's words: removals, then changes,
// then new ones.
func peerConfigs(c Changes) []wgtypes.PeerConfig {
	all := make([]wgtypes.PeerConfig, 0, len(c.Remove)+len(c.Update)+len(c.Add))
	for _, r := range c.Remove {
		all = append(all, wgtypes.PeerConfig{PublicKey: wgtypes.Key(r.Key), Remove: true, UpdateOnly: true})
	}
	for _, u := range c.Update {
		p := wgtypes.PeerConfig{
			PublicKey: wgtypes.Key(u.Key), UpdateOnly: true, Endpoint: udpAddr(u.Endpoint),
			PresharedKey: (*wgtypes.Key)(u.PresharedKey), PersistentKeepaliveInterval: u.Keepalive,
		}
		// Nothing is without an owner for a moment if nothing goes.
		switch {
		case len(u.RemoveIPs) > 0:
			p.ReplaceAllowedIPs, p.AllowedIPs = true, ipNets(u.IPs)
		case len(u.AddIPs) > 0:
			p.AllowedIPs = ipNets(u.AddIPs)
		}
		all = append(all, p)
	}
	for _, p := range c.Add {
		all = append(all, whole(p))
	}
	return all
}

// whole is all of a peer, to be added or set.
func whole(p Peer) wgtypes.PeerConfig {
	return wgtypes.PeerConfig{
		PublicKey: wgtypes.Key(p.PublicKey), PresharedKey: (*wgtypes.Key)(&p.PresharedKey),
		Endpoint: udpAddr(p.Endpoint), PersistentKeepaliveInterval: &p.Keepalive,
		ReplaceAllowedIPs: true, AllowedIPs: ipNets(p.AllowedIPs),
	}
}

// revive makes ready to speak to the device again after an error: netlink sockets
// break, and the socket of one in userspace can be taken away.
func (d *Device) revive() error {
	_ = d.client.Close()
	c, err := d.seams.client()
	if err != nil {
		return fmt.Errorf("speak to WireGuard: %w", rights(err))
	}
	d.client = c
	return d.socketAgain()
}

// configure sends a configuration, without peers to be replaced. If there was no
// one to send it to, it tries again.
func (d *Device) configure(c wgtypes.Config) error {
	err := d.client.ConfigureDevice(d.options.Name, c)
	if err != nil && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED)) {
		if err := d.revive(); err != nil {
			return err
		}
		err = d.client.ConfigureDevice(d.options.Name, c)
	}
	if err != nil {
		return fmt.Errorf("configure device %s: %w", d.options.Name, named(rights(err)))
	}
	return nil
}

// named gives the error of a device in userspace, which comes as a number in a
// text, its meaning back.
func named(err error) error {
	var errno int
	if at := strings.Index(err.Error(), "errno=-"); at >= 0 {
		if _, scan := fmt.Sscanf(err.Error()[at:], "errno=-%d", &errno); scan == nil {
			return unix.Errno(errno)
		}
	}
	return err
}

func addrPort(a *net.UDPAddr) netip.AddrPort {
	if a == nil {
		return netip.AddrPort{}
	}
	p := a.AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}

func udpAddr(a netip.AddrPort) *net.UDPAddr {
	if !a.IsValid() {
		return nil
	}
	return net.UDPAddrFromAddrPort(a)
}

func ipNets(all []netip.Prefix) []net.IPNet {
	nets := make([]net.IPNet, len(all))
	for i, p := range all {
		nets[i] = *ipNet(p.Masked())
	}
	return nets
}

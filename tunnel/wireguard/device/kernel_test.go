package device

import (
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// fakeKernel stands in for a kernel that has WireGuard, which the machines that
// test this do not. It does what drivers/net/wireguard/netlink.c and allowedips.c
// are documented to, and splits a configuration into messages as wgctrl does:
// each message is a whole, and those before one that is refused stay applied. Its
// interfaces are bridges, with real addresses and routes.
type fakeKernel struct {
	t testing.TB

	mu       sync.Mutex
	devices  map[string]*fakeDevice
	messages []wgtypes.Config
	sessions int
	// refuse, if set, is asked about each message by its number from 0.
	refuse func(n int, m wgtypes.Config) error
}

type fakeDevice struct {
	key   wgtypes.Key
	port  int
	peers []*fakePeer // as the kernel lists them: the latest last
}

type fakePeer struct {
	wgtypes.Peer
	session int // made with the peer, ended with it
	called  int // how often the kernel sent it something unasked
}

func newFakeKernel(t testing.TB) *fakeKernel {
	return &fakeKernel{t: t, devices: map[string]*fakeDevice{}}
}

func (k *fakeKernel) seams() seams {
	return seams{k, func() (client, error) { return fakeClient{k}, nil }}
}

func (k *fakeKernel) probe() error { return nil }

func (k *fakeKernel) add(name string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return err
	}
	k.t.Cleanup(func() { _ = netlink.LinkDel(&netlink.Bridge{LinkAttrs: attrs}) })
	k.mu.Lock()
	defer k.mu.Unlock()
	k.devices[name] = &fakeDevice{}
	return nil
}

func (k *fakeKernel) is(link netlink.Link) bool { return link.Type() == "bridge" }

// fakeClient is wgctrl on it.
type fakeClient struct{ k *fakeKernel }

func (fakeClient) Close() error { return nil }

// device finds a device, or fails as wgctrl does with ENODEV and ENOTSUP.
func (k *fakeKernel) device(name string) (*fakeDevice, error) {
	if link, err := netlink.LinkByName(name); err != nil || !k.is(link) {
		return nil, os.ErrNotExist
	}
	if d := k.devices[name]; d != nil {
		return d, nil
	}
	return nil, os.ErrNotExist
}

func (c fakeClient) Device(name string) (*wgtypes.Device, error) {
	c.k.mu.Lock()
	defer c.k.mu.Unlock()
	d, err := c.k.device(name)
	if err != nil {
		return nil, err
	}
	out := &wgtypes.Device{Name: name, Type: wgtypes.LinuxKernel, PrivateKey: d.key, PublicKey: d.key.PublicKey(), ListenPort: d.port}
	for _, p := range d.peers {
		q := p.Peer
		q.AllowedIPs = slices.Clone(p.AllowedIPs)
		slices.Reverse(q.AllowedIPs) // the order is the tree's, not ours
		out.Peers = append(out.Peers, q)
	}
	return out, nil
}

func (c fakeClient) ConfigureDevice(name string, config wgtypes.Config) error {
	c.k.mu.Lock()
	defer c.k.mu.Unlock()
	for _, m := range messages(config) {
		d, err := c.k.device(name)
		if err != nil {
			return err
		}
		c.k.messages = append(c.k.messages, m)
		if c.k.refuse != nil {
			if err := c.k.refuse(len(c.k.messages)-1, m); err != nil {
				return err
			}
		}
		if err := c.k.set(name, d, m); err != nil {
			return err
		}
	}
	return nil
}

// messages splits a configuration: above 32 peers or 256 allowed IPs into one for
// each peer, or for each 256 allowed IPs of it, every one with the fields of the
// device.
func messages(c wgtypes.Config) []wgtypes.Config {
	ips := 0
	for _, p := range c.Peers {
		ips += len(p.AllowedIPs)
	}
	if len(c.Peers) <= 32 && ips <= 256 {
		return []wgtypes.Config{c}
	}
	var all []wgtypes.Config
	for _, p := range c.Peers {
		rest := p.AllowedIPs
		for first := true; first || len(rest) > 0; first = false {
			n := min(len(rest), 256)
			part := wgtypes.PeerConfig{PublicKey: p.PublicKey, UpdateOnly: p.UpdateOnly, Remove: p.Remove, AllowedIPs: rest[:n]}
			rest = rest[n:]
			if first {
				part.PresharedKey, part.Endpoint, part.PersistentKeepaliveInterval = p.PresharedKey, p.Endpoint, p.PersistentKeepaliveInterval
				part.ReplaceAllowedIPs = p.ReplaceAllowedIPs
			}
			m := c
			m.Peers = []wgtypes.PeerConfig{part}
			all = append(all, m)
		}
	}
	return all
}

// set is the kernel's wg_set_device.
func (k *fakeKernel) set(name string, d *fakeDevice, m wgtypes.Config) error {
	if m.ReplacePeers {
		k.t.Error("a message replaces all peers: that ends every session")
	}
	if m.ListenPort != nil && *m.ListenPort != d.port {
		// A running device binds now, and keeps the old port if it cannot.
		if link, err := netlink.LinkByName(name); err == nil && link.Attrs().Flags&net.FlagUp != 0 {
			if portFree(uint16(*m.ListenPort)) != nil {
				return unix.EADDRINUSE
			}
		}
		d.port = *m.ListenPort
	}
	if m.PrivateKey != nil {
		key := wgtypes.Key(Secret(*m.PrivateKey).clamped())
		if key != d.key {
			d.key = key
			d.peers = slices.DeleteFunc(d.peers, func(p *fakePeer) bool { return p.PublicKey == key.PublicKey() })
			for _, p := range d.peers {
				p.session = k.session()
			}
		}
	}
	for _, p := range m.Peers {
		if err := k.setPeer(d, p); err != nil {
			return err
		}
	}
	return nil
}

func (k *fakeKernel) session() int {
	k.sessions++
	return k.sessions
}

// setPeer is the kernel's set_peer.
func (k *fakeKernel) setPeer(d *fakeDevice, c wgtypes.PeerConfig) error {
	at := slices.IndexFunc(d.peers, func(p *fakePeer) bool { return p.PublicKey == c.PublicKey })
	if at < 0 {
		if c.Remove || c.UpdateOnly || c.PublicKey == d.key.PublicKey() {
			return nil
		}
		at = len(d.peers)
		d.peers = append(d.peers, &fakePeer{wgtypes.Peer{PublicKey: c.PublicKey, ProtocolVersion: 1}, k.session(), 0})
	}
	if c.Remove {
		d.peers = slices.Delete(d.peers, at, at+1)
		return nil
	}
	p := d.peers[at]
	if c.PresharedKey != nil {
		p.PresharedKey = *c.PresharedKey
	}
	if c.Endpoint != nil {
		p.Endpoint = c.Endpoint
	}
	if c.ReplaceAllowedIPs {
		p.AllowedIPs = nil
	}
	for _, ip := range c.AllowedIPs {
		ones, bits := ip.Mask.Size()
		if bits == 0 || ones > bits || len(ip.IP) != bits/8 {
			return unix.EINVAL
		}
		ip.IP = ip.IP.Mask(ip.Mask)
		// A network has one owner: who had it has it no more.
		for _, other := range d.peers {
			other.AllowedIPs = slices.DeleteFunc(other.AllowedIPs, func(o net.IPNet) bool { return o.String() == ip.String() })
		}
		p.AllowedIPs = append(p.AllowedIPs, ip)
	}
	if c.PersistentKeepaliveInterval != nil {
		if p.Endpoint != nil && p.PersistentKeepaliveInterval == 0 && *c.PersistentKeepaliveInterval > 0 {
			p.called++
		}
		p.PersistentKeepaliveInterval = *c.PersistentKeepaliveInterval
	}
	return nil
}

// handshake has a peer complete one.
func (k *fakeKernel) handshake(name string, key Key, at time.Time) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, p := range k.devices[name].peers {
		if Key(p.PublicKey) == key {
			p.LastHandshakeTime = at
			p.Endpoint = &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1).To4(), Port: 4321}
			return nil
		}
	}
	return fmt.Errorf("no peer %v", key)
}

// session says which session a peer has.
func (k *fakeKernel) sessionOf(name string, key Key) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, p := range k.devices[name].peers {
		if Key(p.PublicKey) == key {
			return p.session
		}
	}
	return 0
}

package wgquick

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/edgeward/edgeward/tunnel/wireguard"
)

// Server reports whether f is a server's and not a client's: it has several
// peers, or one whose addresses are others than its own and that it does not
// dial.
func (f *File) Server() bool {
	if len(f.Peers) != 1 {
		return true
	}
	peer := f.Peers[0]
	for _, a := range f.Interface.Addresses {
		if slices.ContainsFunc(peer.AllowedIPs, func(n netip.Prefix) bool { return n.Contains(a.Addr()) }) {
			return false // a client sends to its own network through the server
		}
	}
	return peer.Endpoint == "" || f.Interface.ListenPort != 0
}

// Declare turns f into peers of our own: the [Peer] sections of a server's, or
// the machine itself of a client's. Peers without a name are called peer-1 and
// so on. Their preshared keys come beside them, by name, to be written to
// files. notes say what did not carry over, a sentence each.
func (f *File) Declare(c *wireguard.Config) (peers []wireguard.Peer, preshared map[wireguard.Name]wireguard.PresharedKey, notes []string, err error) {
	for _, i := range f.Ignored {
		notes = append(notes, fmt.Sprintf("line %d: %s %s", i.Line, i.Key, i.Why))
	}
	preshared = map[wireguard.Name]wireguard.PresharedKey{}
	if !f.Server() {
		p, told, err := f.machine(c)
		if err != nil {
			return nil, nil, nil, err
		}
		if key := f.Peers[0].PresharedKey; !key.IsZero() {
			preshared[p.Name] = key
		}
		return []wireguard.Peer{p}, preshared, append(notes, told...), nil
	}
	if len(f.Peers) == 0 {
		return nil, nil, nil, errors.New("there are no peers in it to declare")
	}
	notes = append(notes, f.moved(c)...)
	taken := map[wireguard.Name]bool{}
	for i := range f.Peers {
		taken[f.Peers[i].Name] = true
	}
	n := 0
	for i := range f.Peers {
		theirs := &f.Peers[i]
		p := wireguard.Peer{Name: theirs.Name, PublicKey: theirs.PublicKey, Enabled: theirs.Enabled}
		for p.Name == "" || theirs.Name == "" && taken[p.Name] {
			n++
			p.Name = wireguard.Name(fmt.Sprintf("peer-%d", n))
		}
		notes = append(notes, place(c, &p, theirs.AllowedIPs, f.networks())...)
		if !theirs.PresharedKey.IsZero() {
			preshared[p.Name] = theirs.PresharedKey
		}
		peers = append(peers, p)
	}
	return peers, preshared, notes, nil
}

// networks are those that the file's own addresses lie in.
func (f *File) networks() []netip.Prefix {
	var out []netip.Prefix
	for _, a := range f.Interface.Addresses {
		out = append(out, a.Masked())
	}
	return out
}

// Foreign are the networks in which devices of f have addresses and that the VPN
// does not have, an address alone where f does not say its network. Declare has
// others assigned to those devices, which they learn of by a new configuration.
func (f *File) Foreign(c *wireguard.Config) []netip.Prefix {
	networks, before := c.Networks(), f.networks()
	var out []netip.Prefix
	see := func(a netip.Prefix) {
		if !a.IsSingleIP() || slices.ContainsFunc(networks, func(n netip.Prefix) bool { return n.Contains(a.Addr()) }) {
			return
		}
		network := a
		if i := slices.IndexFunc(before, func(n netip.Prefix) bool { return n.Contains(a.Addr()) }); i >= 0 {
			network = before[i]
		} else if len(before) > 0 {
			return // a single machine behind a peer
		}
		if !slices.Contains(out, network) {
			out = append(out, network)
		}
	}
	if !f.Server() {
		for _, a := range f.Interface.Addresses {
			see(netip.PrefixFrom(a.Addr(), a.Addr().BitLen()))
		}
		return out
	}
	for i := range f.Peers {
		for _, a := range f.Peers[i].AllowedIPs {
			see(a)
		}
	}
	return out
}

// moved says what devices know of the server that the gateway has otherwise.
func (f *File) moved(c *wireguard.Config) []string {
	var out []string
	if key := f.Interface.PrivateKey.Public(); !key.IsZero() && key != c.PublicKey {
		out = append(out, fmt.Sprintf("devices know the server by the key %s: put its private key into wireguard.privateKeyFile, or give every device a new configuration", key))
	}
	if port := f.Interface.ListenPort; port != 0 && port != uint16(c.ListenPort) {
		out = append(out, fmt.Sprintf("devices dial port %d, and wireguard.listenPort is %d: change one of them", port, c.ListenPort))
	}
	return out
}

// place gives a peer what its allowed IPs come to: addresses in the VPN, networks
// behind it.
func place(c *wireguard.Config, p *wireguard.Peer, allowed, before []netip.Prefix) []string {
	var notes []string
	say := func(format string, args ...any) {
		notes = append(notes, string(p.Name)+": "+fmt.Sprintf(format, args...))
	}
	networks := c.Networks()
	for _, a := range allowed {
		inVPN := slices.ContainsFunc(networks, func(n netip.Prefix) bool { return n.Contains(a.Addr()) && a.Bits() >= n.Bits() })
		wasVPN := slices.ContainsFunc(before, func(n netip.Prefix) bool { return n.Contains(a.Addr()) && a.Bits() >= n.Bits() }) || len(before) == 0 && a.IsSingleIP()
		another := slices.ContainsFunc(p.Addresses, func(b netip.Addr) bool { return b.BitLen() == a.Addr().BitLen() })
		switch {
		case a.Bits() == 0:
			say("%s is left out: a peer speaks for networks of its own, and not for all", a)
		case inVPN && a.IsSingleIP() && !another:
			p.Addresses = append(p.Addresses, a.Addr())
		case inVPN:
			say("%s is left out: a peer has one address of each family", a)
		case wasVPN:
			say("%s is none of the VPN's (%s): it gets another, and its device needs a new configuration", a, joined(networks))
		default:
			p.AllowedIPs = append(p.AllowedIPs, a)
		}
	}
	slices.SortFunc(p.Addresses, netip.Addr.Compare)
	return notes
}

// machine is the one whose configuration f is.
func (f *File) machine(c *wireguard.Config) (wireguard.Peer, []string, error) {
	if f.Interface.PrivateKey.IsZero() {
		return wireguard.Peer{}, nil, errors.New("[Interface] has no PrivateKey, so nobody knows whose configuration it is")
	}
	server := f.Peers[0]
	p := wireguard.Peer{Name: fit(f.Name), PublicKey: f.Interface.PrivateKey.Public(), Enabled: true, Keepalive: server.Keepalive}
	if p.Name == "" {
		p.Name = "peer-1"
	}
	p.FullTunnel = slices.ContainsFunc(server.AllowedIPs, func(a netip.Prefix) bool { return a.Bits() == 0 })
	var own []netip.Prefix
	for _, a := range f.Interface.Addresses {
		own = append(own, netip.PrefixFrom(a.Addr(), a.Addr().BitLen()))
	}
	notes := place(c, &p, own, own)
	if server.PublicKey != c.PublicKey {
		notes = append(notes, fmt.Sprintf("%s knows its server by the key %s: it needs that of the gateway in its place", p.Name, server.PublicKey))
	}
	if server.Endpoint != "" && !strings.EqualFold(server.Endpoint, string(c.Endpoint)) {
		notes = append(notes, fmt.Sprintf("%s dials %s: it needs the gateway's endpoint in its place", p.Name, server.Endpoint))
	}
	return p, notes, nil
}

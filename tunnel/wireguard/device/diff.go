package device

import (
	"bytes"
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Have is what a device is.
type Have struct {
	// Config has its lists of networks in the order and form that Diff compares.
	// Its Peers are the keys on the device, in no order and each a peer of its
	// own, with the endpoint from which it last spoke.
	Config
	// Up says whether the interface is.
	Up bool
	// Seen is when each key last completed a handshake, in earlier runs too and
	// whether it is on the device or not. Keys without one are not in it.
	Seen map[Key]time.Time
}

// Changes is what makes a device what it should be. It is a plain value: sorted,
// printable without a secret, empty if nothing is to be done.
type Changes struct {
	PrivateKey *Secret // nil: stays
	ListenPort *uint16 // nil: stays
	MTU        int     // zero: stays
	Up         bool    // the interface comes up

	AddAddresses    []netip.Prefix
	RemoveAddresses []netip.Prefix
	AddRoutes       []netip.Prefix
	RemoveRoutes    []netip.Prefix

	Remove []Removal // first of all, so that nothing can keep a revoked peer in
	Update []Update  // peers that stay: their sessions do too
	Add    []Peer    // a key staged for rotation is one without allowed IPs
	// Rotated are the peers whose next key has completed a handshake. What it
	// takes to follow is among Remove, Update and Add.
	Rotated []Rotation
}

// Removal is a key that leaves the device, and its session with it.
type Removal struct {
	Name string // as far as it is known
	Key  Key
}

// Update is what changes about a peer on the device. What is nil stays.
type Update struct {
	Name         string
	Key          Key
	PresharedKey *Secret
	Keepalive    *time.Duration
	Endpoint     netip.AddrPort // of a peer that has not been heard of; else invalid
	// IPs are all the allowed IPs that the peer is to have; AddIPs and RemoveIPs
	// are the difference. If that is empty, none change.
	IPs, AddIPs, RemoveIPs []netip.Prefix
}

// Rotation is a key that took another's place.
type Rotation struct {
	Name     string
	From, To Key
}

// Diff returns what makes have what want says. It is pure. The order of peers,
// addresses and routes in want does not matter.
func Diff(have Have, want Config) Changes {
	var c Changes
	if key := want.PrivateKey.clamped(); key != have.PrivateKey {
		c.PrivateKey = &key
	}
	if want.ListenPort != have.ListenPort {
		c.ListenPort = &want.ListenPort
	}
	if mtu := cmp.Or(want.MTU, defaultMTU); mtu != have.MTU {
		c.MTU = mtu
	}
	c.Up = !have.Up
	// An address is not masked: it is the device's own.
	c.AddAddresses, c.RemoveAddresses = difference(have.Addresses, ordered(want.Addresses))
	c.AddRoutes, c.RemoveRoutes = difference(have.Routes, canonical(want.Routes))

	on := make(map[Key]int, len(have.Peers))
	for i := range have.Peers {
		on[have.Peers[i].PublicKey] = i
	}
	stays := make([]bool, len(have.Peers))
	for i := range want.Peers {
		now, staged, rotation := have.stage(want.Peers[i], on)
		if rotation != nil {
			c.Rotated = append(c.Rotated, *rotation)
		}
		for _, p := range [...]*Peer{&now, staged} {
			if p == nil {
				continue
			}
			p.AllowedIPs = canonical(p.AllowedIPs)
			at, known := on[p.PublicKey]
			if !known {
				c.Add = append(c.Add, *p)
				continue
			}
			stays[at] = true
			if u, changes := update(&have.Peers[at], p, have.Seen); changes {
				c.Update = append(c.Update, u)
			}
		}
	}
	for i, p := range have.Peers {
		if !stays[i] {
			c.Remove = append(c.Remove, Removal{p.Name, p.PublicKey})
		}
	}
	c.sort()
	return c
}

// stage returns what a declared peer is on the device: itself, and its next key
// beside it until that has been used; then the next key alone. It was used if it
// was ever seen, or if an earlier process gave it the peer's allowed IPs and did
// not live to write that down.
func (have *Have) stage(p Peer, on map[Key]int) (now Peer, staged *Peer, rotated *Rotation) {
	if p.Next == (Key{}) {
		return p, nil, nil
	}
	next := p.successor()
	p.Next, p.NextPresharedKey = Key{}, Secret{}
	_, used := have.Seen[next.PublicKey]
	if at, ok := on[next.PublicKey]; ok && len(have.Peers[at].AllowedIPs) > 0 {
		used = true
	}
	if !used {
		next.AllowedIPs, next.Keepalive, next.Endpoint = nil, 0, netip.AddrPort{}
		return p, &next, nil
	}
	if _, there := on[p.PublicKey]; there {
		rotated = &Rotation{p.Name, p.PublicKey, next.PublicKey}
	}
	return next, nil, rotated
}

// successor is the peer as it is with its next key.
func (p Peer) successor() Peer {
	p.PublicKey, p.PresharedKey = p.Next, p.NextPresharedKey
	p.Next, p.NextPresharedKey = Key{}, Secret{}
	return p
}

// update compares a peer on the device with what it should be.
func update(have, want *Peer, seen map[Key]time.Time) (Update, bool) {
	u := Update{Name: want.Name, Key: want.PublicKey}
	changes := false
	if have.PresharedKey != want.PresharedKey {
		key := want.PresharedKey // a copy: want stays where it is, and is many
		u.PresharedKey, changes = &key, true
	}
	if have.Keepalive != want.Keepalive {
		pause := want.Keepalive
		u.Keepalive, changes = &pause, true
	}
	if _, heard := seen[have.PublicKey]; !heard && !have.Endpoint.IsValid() && want.Endpoint.IsValid() {
		u.Endpoint, changes = want.Endpoint, true
	}
	if !slices.Equal(have.AllowedIPs, want.AllowedIPs) {
		u.IPs, changes = want.AllowedIPs, true
		u.AddIPs, u.RemoveIPs = difference(have.AllowedIPs, want.AllowedIPs)
	}
	return u, changes
}

// Empty says whether there is nothing to do.
func (c Changes) Empty() bool {
	return c.PrivateKey == nil && c.ListenPort == nil && c.MTU == 0 && !c.Up &&
		len(c.AddAddresses)+len(c.RemoveAddresses)+len(c.AddRoutes)+len(c.RemoveRoutes) == 0 &&
		len(c.Remove)+len(c.Update)+len(c.Add)+len(c.Rotated) == 0
}

// Lines says each change in a few words, in the order of a Changes: the lines of
// an audit. They name peers, or their public keys, and no secrets or endpoints.
func (c Changes) Lines() []string {
	var lines []string
	say := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	if c.PrivateKey != nil {
		say("private key changed")
	}
	if c.ListenPort != nil {
		say("listen port %d", *c.ListenPort)
	}
	if c.MTU != 0 {
		say("MTU %d", c.MTU)
	}
	for _, a := range c.AddAddresses {
		say("address %v added", a)
	}
	for _, a := range c.RemoveAddresses {
		say("address %v removed", a)
	}
	for _, r := range c.AddRoutes {
		say("route %v added", r)
	}
	for _, r := range c.RemoveRoutes {
		say("route %v removed", r)
	}
	if c.Up {
		say("interface up")
	}
	for _, r := range c.Rotated {
		say("peer %s follows its next key", label(r.Name, r.From))
	}
	for _, r := range c.Remove {
		say("peer %s removed", label(r.Name, r.Key))
	}
	for _, u := range c.Update {
		var what []string
		for _, p := range u.AddIPs {
			what = append(what, "+"+p.String())
		}
		for _, p := range u.RemoveIPs {
			what = append(what, "-"+p.String())
		}
		if u.PresharedKey != nil {
			what = append(what, "preshared key")
		}
		if u.Keepalive != nil {
			what = append(what, fmt.Sprintf("keepalive %v", *u.Keepalive))
		}
		if u.Endpoint.IsValid() {
			what = append(what, "endpoint")
		}
		say("peer %s changed: %s", label(u.Name, u.Key), strings.Join(what, ", "))
	}
	for _, p := range c.Add {
		say("peer %s added", p.label())
	}
	return lines
}

// String is the Lines in one.
func (c Changes) String() string {
	if c.Empty() {
		return "no change"
	}
	return strings.Join(c.Lines(), "; ")
}

func (c *Changes) sort() {
	by := func(name, otherName string, key, other Key) int {
		return cmp.Or(strings.Compare(name, otherName), bytes.Compare(key[:], other[:]))
	}
	slices.SortFunc(c.Remove, func(a, b Removal) int { return by(a.Name, b.Name, a.Key, b.Key) })
	slices.SortFunc(c.Update, func(a, b Update) int { return by(a.Name, b.Name, a.Key, b.Key) })
	slices.SortFunc(c.Add, func(a, b Peer) int { return by(a.Name, b.Name, a.PublicKey, b.PublicKey) })
	slices.SortFunc(c.Rotated, func(a, b Rotation) int { return by(a.Name, b.Name, a.From, b.From) })
}

// canonical is a list of networks as the device has it: masked, in order, each
// once. What is so already is not copied.
func canonical(all []netip.Prefix) []netip.Prefix {
	masked := true
	for _, p := range all {
		masked = masked && p == p.Masked()
	}
	if masked {
		return ordered(all)
	}
	all = slices.Clone(all)
	for i, p := range all {
		all[i] = p.Masked()
	}
	return ordered(all)
}

// ordered is a list in order, each once.
func ordered(all []netip.Prefix) []netip.Prefix {
	strictly := true
	for i := 1; i < len(all); i++ {
		strictly = strictly && comparePrefixes(all[i-1], all[i]) < 0
	}
	if strictly {
		return all
	}
	all = slices.Clone(all)
	slices.SortFunc(all, comparePrefixes)
	return slices.Compact(all)
}

func comparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

// difference compares two ordered lists.
func difference(have, want []netip.Prefix) (add, remove []netip.Prefix) {
	for len(have) > 0 || len(want) > 0 {
		switch {
		case len(want) == 0 || len(have) > 0 && comparePrefixes(have[0], want[0]) < 0:
			remove, have = append(remove, have[0]), have[1:]
		case len(have) == 0 || comparePrefixes(have[0], want[0]) > 0:
			add, want = append(add, want[0]), want[1:]
		default:
			have, want = have[1:], want[1:]
		}
	}
	return add, remove
}

package wireguard

import (
	"net/netip"
	"time"
)

// Desired is what should be at a time. Two that are equal want the same; all
// lists are sorted. As JSON it holds no secrets.
type Desired struct {
	Device Device `json:"device"`
	// Peers are those that are live, by name.
	Peers []DesiredPeer `json:"peers"`
	// Idle are those that are declared and not live, by name.
	Idle []IdlePeer `json:"idle"`
	// Services are those that are declared, by name.
	Services []Service `json:"services"`
	Access   Access    `json:"access"`
	Names    Answers   `json:"names"`
	// Next is when Desired changes by itself, because a peer expires; the zero
	// time is never.
	Next time.Time `json:"next,omitzero"`
}

// Device is the interface itself.
type Device struct {
	Interface  string     `json:"interface"`
	Mode       Mode       `json:"mode,omitempty"`
	PrivateKey PrivateKey `json:"-"`
	PublicKey  PublicKey  `json:"publicKey"`
	ListenPort uint16     `json:"listenPort"`
	// Addresses are the gateway's, with the length of their networks.
	Addresses []netip.Prefix `json:"addresses"`
	MTU       int            `json:"mtu"`
	// Routes are the networks behind live peers, which the machine reaches
	// through the interface, beside those of Addresses.
	Routes []netip.Prefix `json:"routes"`
}

// DesiredPeer is a live peer.
type DesiredPeer struct {
	Name         Name         `json:"name"`
	PublicKey    PublicKey    `json:"publicKey"`
	PresharedKey PresharedKey `json:"-"`
	// Shared says that there is a preshared key.
	Shared bool `json:"shared"`
	// Next is the key that takes over at its first handshake; zero for none.
	Next             PublicKey    `json:"next,omitzero"`
	NextPresharedKey PresharedKey `json:"-"`
	// Addresses are the peer's own, IPv4 first.
	Addresses []netip.Addr `json:"addresses"`
	// Networks lie behind the peer.
	Networks []netip.Prefix `json:"networks,omitempty"`
	Groups   []Name         `json:"groups,omitempty"`
	// Services are what the peer may reach.
	Services []Name    `json:"services,omitempty"`
	Expires  time.Time `json:"expires,omitzero"`
	// Problem is why a next key that is declared is not staged, or that the
	// preshared key is an earlier one; empty for none.
	Problem string `json:"problem,omitempty"`
}

// AllowedIPs are the peer's addresses and networks.
func (p *DesiredPeer) AllowedIPs() []netip.Prefix {
	var out []netip.Prefix
	for _, a := range p.Addresses {
		out = append(out, netip.PrefixFrom(a, a.BitLen()))
	}
	return append(out, p.Networks...)
}

// State is what a peer is at a time.
type State string

// The states of peers.
const (
	Live     State = "live"
	Disabled State = "disabled"
	Expired  State = "expired"
	// Unready is a peer that could not be made live: its preshared key cannot
	// be read, no address is left, its public key is the gateway's own, or the
	// gateway's machine is at home in a network that should lie behind it.
	Unready State = "unready"
)

// IdlePeer is a peer that is declared and not live.
type IdlePeer struct {
	Name      Name         `json:"name"`
	PublicKey PublicKey    `json:"publicKey"`
	Addresses []netip.Addr `json:"addresses"`
	Groups    []Name       `json:"groups,omitempty"`
	State     State        `json:"state"`
	// Why says more of a peer that is unready.
	Why     string    `json:"why,omitempty"`
	Expires time.Time `json:"expires,omitzero"`
}

// Access is who may reach what. What it does not name is refused. Beside it
// every live peer may ask the resolver (53/tcp and 53/udp at Gateway, where
// Resolver says so) and ping the gateway's own addresses: without an answer to
// a ping nobody can tell a broken tunnel from a missing grant.
type Access struct {
	// Gateway are the gateway's own addresses, Networks the VPN's.
	Gateway  []netip.Addr   `json:"gateway"`
	Networks []netip.Prefix `json:"networks"`
	Resolver bool           `json:"resolver"`
	// Sources are the addresses and networks that are known, with the group of
	// each: sorted, and no two overlap.
	Sources []Source `json:"sources"`
	// Groups are sets of peers that may reach the same, each peer in one.
	Groups []Group `json:"groups"`
	// Translate is done to what was allowed.
	Translate  []Translation `json:"translate"`
	Masquerade bool          `json:"masquerade"`
}

// Source is an address or network of a live peer.
type Source struct {
	Prefix netip.Prefix `json:"prefix"`
	Peer   Name         `json:"peer"`
	// Group is the name of one of Access.Groups, empty for a peer that was
	// granted nothing.
	Group string `json:"group,omitempty"`
}

// Group is a set of peers that may reach the same. Its name is made of what they
// may reach: it stays the same while others come and go.
type Group struct {
	Name string `json:"name"`
	// Services are those that were granted, by name.
	Services []Name `json:"services"`
	// Reach is what that comes to: sorted, and no two overlap, but for a single
	// address with a network that holds it.
	Reach []Reach `json:"reach"`
}

// Reach is ports of a network or a single address. A network does not mean the
// addresses that the gateway's machine has in it, a single address does.
type Reach struct {
	To    netip.Prefix `json:"to"`
	Ports Ports        `json:"ports"`
	// Service is the one that is counted.
	Service Name `json:"service"`
}

// Translation sends what is for From to To; ports stay.
type Translation struct {
	Service Name       `json:"service"`
	From    netip.Addr `json:"from"`
	To      netip.Addr `json:"to"`
	Ports   []Ports    `json:"ports"`
}

// Answers is what the resolver needs to know.
type Answers struct {
	// Listen are the gateway's addresses; none where there is no resolver.
	Listen []netip.Addr `json:"listen"`
	// Hosts are the names that are answered, with their addresses.
	Hosts map[Host][]netip.Addr `json:"hosts"`
	// Zones are domains of which no other name exists.
	Zones     []Host           `json:"zones"`
	Upstreams []netip.AddrPort `json:"upstreams"`
	// Peers are the sources that are answered.
	Peers []netip.Prefix `json:"peers"`
}

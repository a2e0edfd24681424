package nft

import (
	"net/netip"
	"time"
)

// AccessTableName is the name of the table of an AccessConn, in the family inet.
const AccessTableName = "edgeward_vpn"

// Access is who may reach what through a VPN, stated whole. What it does not name
// is refused. All of it is about addresses as the peers see them: before any
// translation of the destination on the way in, after it is undone on the way
// back. The order of its lists does not matter.
type Access struct {
	// Interface is the VPN's. It need not be there: the rules go by the name, so
	// that the first packet of an interface that comes up later meets them.
	Interface string
	// Networks are the VPN's own, with those behind peers as the caller sees fit:
	// a packet with such a source that comes in by another interface is forged,
	// and dropped, as is one with such a destination that goes out by another.
	Networks []netip.Prefix
	// Sources are the addresses and networks of peers. Of networks that contain
	// one another the longest prefix counts; no prefix is there twice. A packet
	// from any other address is refused.
	Sources []Source
	// Groups are those that Sources name.
	Groups []Group
	// Everyone is what all sources may reach, beside what their group may: the
	// resolver, and an answer to a ping.
	Everyone []Reach
	// Outward is what may be opened towards the VPN from elsewhere; nothing else
	// is, neither by this machine nor through it. (Peers reach each other where
	// their groups say so.)
	Outward []Flow
	// Translate changes the destination of what was granted.
	Translate []Translation
	// Masquerade gives what peers send on through this machine the machine's own
	// address, so that answers find back without a route.
	Masquerade bool
}

// Source is an address or network of a peer.
type Source struct {
	Prefix netip.Prefix
	Group  string // empty for who may reach no more than Everyone
}

// Group is what some sources may reach.
type Group struct {
	Name  string
	Reach []Reach // overlaps are fine
}

// Proto is a protocol that access can be granted to, by its number in IP.
type Proto uint8

// The protocols. Echo is a ping: ICMP for IPv4, ICMPv6 for IPv6.
const (
	Echo Proto = 1
	TCP  Proto = 6
	UDP  Proto = 17
)

// Reach is ports of an address or a network. Of a network the addresses of this
// machine are not meant, whichever it gets: who may reach one of those is told so
// by a Reach of that single address. IPv4-mapped addresses count as IPv4.
type Reach struct {
	To          netip.Prefix
	Proto       Proto
	First, Last uint16 // both included; zero for Echo
}

// Flow is what From may open towards the VPN. Addresses are those after the
// translation of the destination and before that of the source.
type Flow struct {
	From netip.Prefix
	Reach
}

// Translation sends what is for At on to To, which something answers on: an
// address of a service that the cluster's own proxy would have to translate does
// not work, because a connection is translated once. To may be an address of this
// machine, but none of its loopback. A running connection that leads to no target of
// its address any more ends, if that is one of Networks.
type Translation struct {
	At netip.Addr
	// Proto is TCP or UDP, or zero for all that is granted at At; then there
	// are no ports.
	Proto       Proto
	First, Last uint16 // both included
	To          netip.Addr
	Port        uint16 // of To; zero leaves it as it was
}

// Applied says what Apply did.
type Applied struct {
	// Changed is false if the kernel enforced the same already.
	Changed bool
	// Replaced says that all was written, and not only what differs.
	Replaced bool
	// Repaired says that another hand had changed or removed what this Conn put
	// there.
	Repaired bool
}

// AccessCounters are numbers of packets since the table was created.
type AccessCounters struct {
	// Granted are first packets of connections from peers that passed: of UDP
	// all until one comes back.
	Granted uint64
	// Denied came from the VPN and were not granted.
	Denied uint64
	// Revoked were answers to peers on connections that are granted no more.
	Revoked uint64
	// Unasked were on their way into the VPN, and nobody there had asked, or its
	// interface was not there.
	Unasked uint64
	// Forged came by another interface with a source that belongs to the VPN.
	Forged uint64
}

// SourceCount is what one address of the VPN has done. A count begins again when
// nothing was added to it for a day, and when the table is made anew. Addresses
// beyond 16,384 of a family are only in AccessCounters.
type SourceCount struct {
	Addr            netip.Addr
	Granted, Denied uint64 // packets, as in AccessCounters
}

// Attempt is what somebody tried to reach: one row for each source, destination,
// protocol and port. Rows are kept for an hour after their last packet; beyond
// 8,192 of a family, what is new is only in SourceCount and AccessCounters.
type Attempt struct {
	From, To netip.Addr
	Proto    uint8  // its number in IP
	Port     uint16 // zero if the protocol is neither TCP nor UDP
	Packets  uint64 // for what was granted, first packets as in AccessCounters
	Bytes    uint64
	Ago      time.Duration // since the last packet
}

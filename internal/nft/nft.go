// Package nft holds bans in the kernel, and who may reach what through a VPN. It
// turns plain values (what the ruleset looks like, which addresses are banned,
// what has changed) into the nftables table "inet edgeward" and answers what that
// table holds; and an Access into the table "inet edgeward_vpn". It is the only
// room that knows google/nftables, netlink messages and errno; the node bouncer
// and the VPN's gateway are who call it.
//
// It decides nothing: which decision wins, what is trimmed around a protected
// address, what a peer was granted and when to write are the caller's business. It
// touches no other table, and it dumps no set but the small ones in which packets
// note what they tried, because the kernel needs quadratic time for that and skips
// elements while it resizes.
//
// # The table of bans
//
// A single address is an element of a hash map from address to class mark
// (bans4, bans6), a range one of a small interval map (nets4, nets6). A packet
// that hits neither leaves as it came: it has paid one look-up in the first, and
// one in the second where there are ranges at all. One that hits is asked first whether it comes from a protected address (allow4,
// allow6) or one for which bans are waived for a time (waive4, waive6, with
// timeouts), then takes its class as mark, and the verdict map "classes" sends it
// to the chain of that class, which counts, logs and drops. That is two steps,
// and not one verdict map from address to chain, because the kernel revalidates
// all of a verdict map at every commit. In observe mode the class is compared
// and not written, so that the mark of a packet that passes stays what it was.
//
// Where replies pass, one more chain stands on the way out: a banned peer that
// resets its connection makes connection tracking forget it, and would be taken
// for who answers as soon as we send a segment again.
//
// # Generations
//
// Every set and chain carries the number of its generation in its name. Install
// fills a new generation beside the one that enforces, then hooks it up in one
// transaction, and only then, in another, deletes the old one: for a moment both
// enforce, and at no moment none. A generation without a base chain is inert,
// what is left of an Install that was cut; the next one removes it.
//
// # The table of a VPN
//
// It judges what comes in by the VPN's interface before any translation of the
// destination, so that grants name what peers see, and guards this machine as well
// as what is behind it. A map leads from the packet's source to the chain of its
// group, and that looks the packet up among the group's destinations; all else is
// noted and refused. Each packet is judged anew, and each answer on its way back
// by the same grants, so that a running connection ends with its grant. Nothing
// else gets into the VPN, and nobody outside speaks with its addresses. As the
// rules go by the name of the interface, they are there before it. They need
// Linux 5.9. See AccessConn and accessLayout.
//
// Messages are encoded here and not by the library's Conn, which cannot set the
// owner flag, cannot delete what may be missing, and puts what should be one
// transaction (destroy, add, switch) in several. Its expressions and user data
// are used as they are.
package nft

import (
	"errors"
	"iter"
	"math"
	"net/netip"
	"time"
)

// TableName is the name of the table, in the family inet.
const TableName = "edgeward"

// spareName is the table that enforces while the other is made anew.
const spareName = "edgeward_spare"

// Forever is the timeout of what does not expire.
const Forever = time.Duration(math.MaxInt64)

var (
	// ErrPermission says that the process may not talk to nf_tables at all.
	ErrPermission = errors.New("not permitted: nf_tables needs CAP_NET_ADMIN in this network namespace")
	// ErrOwned says that another living process owns the table.
	ErrOwned = errors.New("the table belongs to another process")
	// ErrNotInstalled says that this Conn has not installed a generation that
	// could be changed: the answer is Install.
	ErrNotInstalled = errors.New("no generation of this process is installed")
	// ErrUnsupported says that the kernel lacks nf_tables or what the ruleset
	// needs of it.
	ErrUnsupported = errors.New("the kernel lacks what the ruleset needs")
)

// Point is where in a packet's way the ruleset stands.
type Point int

const (
	Prerouting Point = iota // every packet that comes in, before any translation of its destination
	Input                   // what is for this machine
	Forward                 // what passes through
)

// Action is what happens to a packet of a banned address.
type Action int

const (
	Drop   Action = iota
	Reject        // a TCP reset, or ICMP administratively prohibited
)

// Config is what shapes the ruleset, apart from what it holds. Two equal
// Configs give the same rules; a change to it takes an Install.
type Config struct {
	// Points is where to stand; none means Prerouting. Choose points that no
	// packet passes both of, or it is counted twice.
	Points []Point
	// SYNPriority is where at prerouting a TCP segment that opens a connection
	// is dropped; it should be before connection tracking (-200). Zero means -300.
	SYNPriority int32
	// Priority is where all other packets are dropped; at prerouting it has to
	// be after connection tracking, which tells replies. Zero means -150.
	Priority int32
	// DropReplies drops packets of banned addresses that answer this machine or
	// one behind it as well, so that connections to them are impossible, all
	// of it at SYNPriority.
	DropReplies bool
	// Observe counts and logs what would be dropped, and drops nothing.
	Observe bool
	// Action is what happens to a packet where Observe is false.
	Action Action
	// Exempt names the interfaces whose incoming packets are never stopped;
	// a trailing * stands for any ending.
	Exempt []string
	// Log, if not nil, writes dropped packets to the kernel log.
	Log *Log
	// Locks close ports to all but some sources.
	Locks []Lock
}

// Log limits how many lines each class may write.
type Log struct {
	PerSecond uint32 // zero means 1
	Burst     uint32 // zero means 5
	Group     uint16 // nflog group; zero means the kernel's own log
}

// Lock closes ports, TCP and UDP, to all sources but some. It looks at packets
// to addresses of this machine, or in To. Protected addresses and, where replies
// are told, replies pass.
type Lock struct {
	Name  string
	Ports []uint16
	From  []netip.Prefix
	To    []netip.Prefix // beside the machine's own: virtual and load-balancer addresses
}

// Class is a kind of ban that is counted for itself, such as "ban/CAPI". Mark is
// its number in elements and ranges; it is unique, and not zero.
type Class struct {
	Mark uint32
	Name string
}

// Element bans one address until Timeout has passed. A Timeout of zero or less
// has passed already: such an element is left out. IPv4-mapped addresses count
// as IPv4.
type Element struct {
	Addr    netip.Addr
	Class   uint32
	Timeout time.Duration
}

// Range bans the addresses From to To, both included. IPv4-mapped addresses are
// those of IPv6 here: a piece of a wide range of IPv6 may begin or end among them.
type Range struct {
	From, To netip.Addr
	Class    uint32
	Timeout  time.Duration
}

// Content is what a generation holds at first.
type Content struct {
	Classes []Class
	// Protected are the addresses that no ban and no lock ever stops. Overlaps
	// are fine.
	Protected []netip.Prefix
	// Elements yields each address at most once; nil yields none. Like Ranges, it
	// may be called twice.
	Elements iter.Seq[Element]
	// Size is about how many Elements there are, now or soon: it sets how often
	// the kernel collects those that have timed out. Zero will do for small
	// numbers.
	Size int
	// Ranges yields ranges that do not overlap, in any order; nil yields none.
	Ranges iter.Seq[Range]
	// Waivers hold from the start.
	Waivers Waivers
}

// Waivers let packets pass for a time, whatever is held: the kernel ends each by
// itself, with nobody alive to do it. Classes do not matter. In each list ranges
// do not overlap.
type Waivers struct {
	Bans  []Range // no ban stops packets from these
	Locks []Range // no lock does
}

// Changes is what Update writes, in one transaction.
type Changes struct {
	Classes []Class // to add; those there already are ignored
	// Protected replaces the protected addresses where it is not nil.
	Protected []netip.Prefix

	Delete []netip.Addr // may be missing
	Put    []Element    // added, or replaced: class and timeout become these

	// DeleteRanges names ranges exactly as they were put (class and timeout do
	// not matter). They may be missing.
	DeleteRanges []Range
	// PutRanges are added, or replace the range with the same bounds. They
	// overlap neither each other nor a range that stays. Changes to ranges cost
	// more while some of the map's have timed out or will within two seconds:
	// then all of it is written again. Who deletes ranges when they end, and
	// gives them a few seconds more than that for a Timeout, stays clear of it.
	PutRanges []Range
}

// Empty reports whether c changes nothing.
func (c *Changes) Empty() bool {
	return len(c.Classes) == 0 && c.Protected == nil &&
		len(c.Delete) == 0 && len(c.Put) == 0 && len(c.DeleteRanges) == 0 && len(c.PutRanges) == 0
}

// Have is what the kernel holds, as far as it can be told in constant time.
type Have struct {
	// Present says that the table is there; all else is zero if it is not.
	Present bool
	// Owner says that the table belongs to a process, and Persist that it
	// outlives it: together they keep others from changing or flushing it.
	Owner, Persist bool
	// Enforcing says that a generation is hooked up. After a start that is the
	// predecessor's: it goes on enforcing until an Install replaces it.
	Enforcing bool
	// Intact says that this generation was installed by this Conn and that its
	// chains, rules and sets are still those which Install and Update left.
	Intact bool
	// Layout is the Config.Layout that the generation was installed with.
	Layout string
	// Generation is its number.
	Generation uint32
	// Ruleset is the kernel's count of changes to any table of the namespace.
	Ruleset uint32
	// How many elements and ranges there are. Those that have timed out count
	// until the kernel collects them; a range that ends with the last address of
	// all does not count. -1 means that the kernel does not tell.
	Bans4, Bans6, Nets4, Nets6 int
}

// Found is what the kernel holds on an address.
type Found struct {
	Addr netip.Addr
	// From and To are the bounds of the range, or both Addr for a single
	// address; both are zero where nothing is held.
	From, To netip.Addr
	// Class is the mark in enforce mode, and Name the class's name where this
	// Conn knows it, or in observe mode.
	Class uint32
	Name  string
	Left  time.Duration // Forever if it does not expire
}

// Banned reports whether anything is held.
func (f Found) Banned() bool { return f.From.IsValid() }

// Kind is what a Counter counts.
type Kind int

const (
	// Banned packets, by class; in observe mode those that would have been.
	Banned Kind = iota
	// Locked packets, by lock.
	Locked
	// Seen packets: all that were looked at, each once.
	Seen
	// Protected packets, which a ban or a lock would have stopped.
	Protected
	// Unclassified packets came from a banned address of no known class. They
	// are dropped too.
	Unclassified
	// Waived packets a ban or a lock would have stopped, but for a waiver.
	Waived
	// Resumed packets are TCP segments of ours to banned addresses, stopped in the
	// middle of a connection that connection tracking does not know.
	Resumed
)

// Counter is a number of packets since the table was created: Install leaves
// counters as they are.
type Counter struct {
	Kind    Kind
	Name    string // of the class or lock
	IPv6    bool
	Packets uint64
	Bytes   uint64
}

// Event says that another process has changed some table of the namespace, or,
// with Lost, that events may have been missed. Either way Read tells what came
// of it.
type Event struct {
	Ruleset uint32 // as in Have
	Process string // who, as far as the kernel tells
	PID     uint32
	Lost    bool
}

// Options are how to open a Conn.
type Options struct {
	// NetNS is a file descriptor of the network namespace; zero means that of
	// the calling thread.
	NetNS int
	// Shared leaves the table open to others: neither owner nor persist.
	Shared bool
	// ReadOnly takes no hold of the table; such a Conn cannot write.
	ReadOnly bool
}

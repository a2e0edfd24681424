package device

import (
	"cmp"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/tun"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

const (
	// sessionTime is how long WireGuard uses a session.
	sessionTime = 180 * time.Second
	// Packets to peers without a session wait for one, 64 KiB each, until
	// wireguard-go gives up after 90 seconds, in numbers that it does not bound.
	// This many may begin to wait in each refill: a few dozen megabytes in all.
	allowance = 64
	refill    = 10 * time.Second
)

// guard stands between the TUN device and wireguard-go, so that who sprays packets
// at peers that are away does not exhaust the memory. What goes to a peer with a
// session passes at the price of a lookup, which a batch to one address pays once.
type guard struct {
	tun.Device
	events chan tun.Event

	mu    sync.RWMutex
	peers map[Key]*reach
	hosts map[netip.Addr]*reach
	nets  []netReach // the longest first; few peers have any

	left    atomic.Int64 // packets that may yet begin to wait
	filled  atomic.Int64 // when it was full, in Unix nanoseconds
	dropped atomic.Uint64
}

// reach is one peer.
type reach struct {
	ips   []netip.Prefix
	until atomic.Int64 // when its session ends, in Unix nanoseconds
}

type netReach struct {
	network netip.Prefix
	*reach
}

// last is the answer to the last lookup.
type last struct {
	addr netip.Addr
	at   *reach
}

// newGuard takes charge of a TUN device. Of its events it passes on only those of
// the MTU: whether the device is up is ours to say, at once and with an answer.
func newGuard(t tun.Device) *guard {
	g := &guard{Device: t, events: make(chan tun.Event, 1), peers: map[Key]*reach{}, hosts: map[netip.Addr]*reach{}}
	go func() {
		defer close(g.events)
		for e := range t.Events() {
			if e&tun.EventMTUUpdate != 0 {
				g.events <- tun.EventMTUUpdate
			}
		}
	}()
	return g
}

func (g *guard) Events() <-chan tun.Event { return g.events }

// set says that a peer has these allowed IPs.
func (g *guard) set(k Key, ips []netip.Prefix) {
	g.mu.Lock()
	defer g.mu.Unlock()
	r := g.peers[k]
	if r == nil {
		r = &reach{}
		g.peers[k] = r
	}
	g.forget(r)
	r.ips = canonical(ips)
	for _, p := range r.ips {
		if p.IsSingleIP() {
			g.hosts[p.Addr()] = r
			continue
		}
		at, _ := slices.BinarySearchFunc(g.nets, p, func(n netReach, p netip.Prefix) int { return cmp.Compare(p.Bits(), n.network.Bits()) })
		g.nets = slices.Insert(g.nets, at, netReach{p, r})
	}
}

// drop forgets a peer.
func (g *guard) drop(k Key) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if r := g.peers[k]; r != nil {
		g.forget(r)
		delete(g.peers, k)
	}
}

// forget takes a peer's allowed IPs out; those that another has taken over stay.
func (g *guard) forget(r *reach) {
	networks := false
	for _, p := range r.ips {
		if !p.IsSingleIP() {
			networks = true
		} else if g.hosts[p.Addr()] == r {
			delete(g.hosts, p.Addr())
		}
	}
	if networks {
		g.nets = slices.DeleteFunc(g.nets, func(n netReach) bool { return n.reach == r })
	}
	r.ips = nil
}

// sessions takes in when peers last completed a handshake.
func (g *guard) sessions(peers []wgtypes.Peer) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	for i := range peers {
		at := peers[i].LastHandshakeTime
		if at.IsZero() {
			continue
		}
		r := g.peers[Key(peers[i].PublicKey)]
		if until := at.Add(sessionTime).UnixNano(); r != nil && until > r.until.Load() {
			r.until.Store(until)
		}
	}
}

// Read drops what would only wait, as far as it is too much.
func (g *guard) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	n, err := g.Device.Read(bufs, sizes, offset)
	if n == 0 {
		return n, err
	}
	now := time.Now()
	g.mu.RLock()
	defer g.mu.RUnlock()
	var l last
	for i := range n {
		if sizes[i] < 1 {
			continue
		}
		_, to := endpoints(bufs[i][offset : offset+sizes[i]])
		r := g.find(&l, to)
		if r == nil || r.until.Load() > now.UnixNano() || g.admit(now) {
			continue // without a peer, wireguard-go drops it itself
		}
		g.dropped.Add(1)
		sizes[i] = 0
	}
	return n, err
}

// Write notes who speaks: only peers with a session can.
func (g *guard) Write(bufs [][]byte, offset int) (int, error) {
	now := time.Now()
	g.mu.RLock()
	var l last
	for _, b := range bufs {
		from, _ := endpoints(b[offset:])
		before := l.at
		if r := g.find(&l, from); r != nil && r != before && r.until.Load() < now.UnixNano() {
			r.until.Store(now.Add(refill).UnixNano()) // until the device is read
		}
	}
	g.mu.RUnlock()
	return g.Device.Write(bufs, offset)
}

// find looks up the peer that has an address.
func (g *guard) find(l *last, addr netip.Addr) *reach {
	if addr == l.addr {
		return l.at
	}
	l.addr, l.at = addr, g.hosts[addr]
	for i := 0; l.at == nil && i < len(g.nets); i++ {
		if g.nets[i].network.Contains(addr) {
			l.at = g.nets[i].reach
		}
	}
	return l.at
}

// admit says whether one more packet may wait.
func (g *guard) admit(now time.Time) bool {
	if now.UnixNano()-g.filled.Load() >= int64(refill) {
		g.filled.Store(now.UnixNano())
		g.left.Store(allowance)
	}
	return g.left.Add(-1) >= 0
}

// endpoints returns the source and destination of an IP packet, or nothing.
func endpoints(packet []byte) (from, to netip.Addr) {
	switch {
	case len(packet) >= 20 && packet[0]>>4 == 4:
		return netip.AddrFrom4([4]byte(packet[12:16])), netip.AddrFrom4([4]byte(packet[16:20]))
	case len(packet) >= 40 && packet[0]>>4 == 6:
		return netip.AddrFrom16([16]byte(packet[8:24])), netip.AddrFrom16([16]byte(packet[24:40]))
	}
	return netip.Addr{}, netip.Addr{}
}

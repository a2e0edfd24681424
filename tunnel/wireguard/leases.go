package wireguard

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Rest is how long the addresses of a peer that is gone are given to nobody
// else: its configuration may still be on a device, and logs name it.
const Rest = 30 * 24 * time.Hour

// Assigned are the addresses of peers by name, declared or given, IPv4 first.
type Assigned map[Name][]netip.Addr

// Lease is what one name has been given.
type Lease struct {
	Addresses []netip.Addr `json:"addresses"`
	// Freed is when the peer was first missed; zero while it is there.
	Freed time.Time `json:"freed,omitzero"`
}

// Leases remember which addresses were given to which peer. The zero value
// remembers none and is ready to use.
type Leases struct {
	ByName map[Name]Lease `json:"leases"`
	// Latest is the latest time that the gateway has seen, now and then: a clock
	// that begins anew must not revive whoever has expired.
	Latest time.Time `json:"latest,omitzero"`
}

// LeasesPath is the file of the leases in the program's stateDir.
func LeasesPath(stateDir string) string { return filepath.Join(stateDir, "wireguard-leases.json") }

// LoadLeases reads the file at path. One that is not there holds none; one that
// cannot be read is an error, since to begin anew could give an address twice.
func LoadLeases(path string) (Leases, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Leases{}, nil
	}
	if err != nil {
		return Leases{}, fmt.Errorf("read leases: %w", err)
	}
	var l Leases
	if err := json.Unmarshal(text, &l); err != nil {
		return Leases{}, fmt.Errorf("read leases: %s: %w: mend the file, or take it away to have addresses assigned anew", path, err)
	}
	return l, nil
}

// Save writes the file at path, whole or not at all, with mode 0600.
func (l *Leases) Save(path string) error {
	text, err := json.MarshalIndent(l, "", "\t")
	if err != nil {
		return fmt.Errorf("write leases: %w", err)
	}
	fresh, err := writeBeside(path, append(text, '\n'))
	if err == nil {
		err = os.Rename(fresh, path)
	}
	if err != nil {
		if fresh != "" {
			os.Remove(fresh)
		}
		return fmt.Errorf("write leases: %w", err)
	}
	return nil
}

// writeBeside puts text into a new file of mode 0600 in the directory of path,
// for which it is meant, and returns its name.
func writeBeside(path string, text []byte) (fresh string, err error) {
	temp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return "", err
	}
	_, err = temp.Write(text)
	if err == nil {
		err = temp.Sync()
	}
	return temp.Name(), errors.Join(err, temp.Close())
}

// Assign gives every peer of c, enabled or not, an address of each network that
// c has, and returns all addresses by name. Declared addresses win; a lease is
// kept where nothing stands against it; what remains is chosen by the peer's
// name, so that a lost file mostly leads to the same addresses. The IPv6
// address stands at the same place in its network as the IPv4 address in its
// own, where that is free. Nobody is given the gateway's address, one of a
// service, of another peer or of one that left less than Rest ago, a reserved
// one, the first of a network or the last of an IPv4 network.
//
// changed says that l should be saved. The error names the peers for which there
// was no address left, and which go without one of that family; all others
// have theirs.
func (l *Leases) Assign(c *Config, now time.Time) (all Assigned, changed bool, err error) {
	p := newPool(c)
	all = Assigned{}
	peers := map[Name]*Peer{}
	for i := range c.Peers {
		peer := &c.Peers[i]
		peers[peer.Name] = peer
		for _, a := range peer.Addresses {
			p.used[a] = true
			all[peer.Name] = append(all[peer.Name], a)
		}
	}
	names := slices.Sorted(maps.Keys(peers))

	leased := slices.Sorted(maps.Keys(l.ByName))
	for _, name := range leased {
		if peers[name] == nil {
			continue
		}
		for _, a := range l.ByName[name].Addresses {
			if p.free(a) && !has(all[name], a) {
				p.used[a] = true
				all[name] = append(all[name], a)
			}
		}
	}
	after := map[Name]Lease{}
	for _, name := range leased {
		lease := l.ByName[name]
		if peers[name] != nil {
			continue
		}
		if lease.Freed.IsZero() || lease.Freed.After(now) { // a clock that went back must not make it rest for ever
			lease.Freed = now.UTC().Truncate(time.Second)
		}
		if now.Sub(lease.Freed) >= Rest {
			continue
		}
		var rests []netip.Addr
		for _, a := range lease.Addresses {
			if !p.used[a] { // what somebody declares is theirs
				p.used[a] = true
				rests = append(rests, a)
			}
		}
		if len(rests) > 0 {
			after[name] = Lease{rests, lease.Freed}
		}
	}
	var without []string
	for _, name := range names {
		given, ok := p.complete(name, all[name])
		if !ok {
			without = append(without, string(name))
		}
		slices.SortFunc(given, netip.Addr.Compare)
		all[name] = given
		if len(given) > 0 {
			after[name] = Lease{Addresses: slices.Clone(given)}
		}
	}
	changed = !maps.EqualFunc(l.ByName, after, func(a, b Lease) bool {
		return slices.Equal(a.Addresses, b.Addresses) && a.Freed.Equal(b.Freed)
	})
	l.ByName = after
	if without != nil {
		err = fmt.Errorf("assign addresses: none is left in %s for %s: those of peers that are gone rest for %d days; take a larger network, or take out peers", list(c.Networks()), strings.Join(without, ", "), int(Rest.Hours()/24))
	}
	return all, changed, err
}

// Pick returns the addresses that a new peer would be given, with those that it
// declares. It does not change l.
func (l *Leases) Pick(c *Config, peer Peer, now time.Time) ([]netip.Addr, error) {
	with := *c
	with.Peers = append(slices.Clone(c.Peers), peer)
	trial := Leases{ByName: maps.Clone(l.ByName)}
	all, _, err := trial.Assign(&with, now)
	got := all[peer.Name]
	if len(got) < len(c.Settings.Addresses) {
		return got, err
	}
	return got, nil // what others miss is not about this one
}

// has reports whether there is an address of the family of a.
func has(list []netip.Addr, a netip.Addr) bool {
	return slices.ContainsFunc(list, func(b netip.Addr) bool { return b.BitLen() == a.BitLen() })
}

// pool knows which addresses of the VPN's networks are free.
type pool struct {
	networks []netip.Prefix
	reserved []Range
	used     map[netip.Addr]bool
	// places is how many addresses of each network are looked at: as many as the
	// smaller one has.
	places uint64
	// next is where to look on in a crowded network, by the networks in which an
	// address is missing.
	next map[string]uint64
}

// tries is how many places are tried that follow from a peer's name.
const tries = 8

// mostPlaces bounds the part of a network that addresses are chosen from.
const mostPlaces = 1 << 24

func newPool(c *Config) *pool {
	p := &pool{networks: c.Networks(), reserved: c.Reserved, used: map[netip.Addr]bool{}, places: mostPlaces, next: map[string]uint64{}}
	for _, n := range p.networks {
		if bits := n.Addr().BitLen() - n.Bits(); bits < 24 {
			p.places = min(p.places, 1<<bits)
		}
	}
	for _, a := range c.gateway() {
		p.used[a] = true
	}
	for _, s := range c.Services {
		for _, a := range s.Addresses {
			// One without targets is the gateway's or of a peer that declares
			// it.
			if a.IsSingleIP() && len(s.Targets) > 0 {
				p.used[a.Addr()] = true
			}
		}
	}
	return p
}

// free reports whether an address may be given.
func (p *pool) free(a netip.Addr) bool {
	if p.used[a] {
		return false
	}
	n := slices.IndexFunc(p.networks, func(n netip.Prefix) bool { return n.Contains(a) })
	return n >= 0 && !outer(p.networks[n], a) && !slices.ContainsFunc(p.reserved, func(r Range) bool { return r.Contains(a) })
}

// complete adds an address of each network of which a peer has none.
func (p *pool) complete(name Name, have []netip.Addr) (all []netip.Addr, ok bool) {
	all = have
	var missing []netip.Prefix
	for _, n := range p.networks {
		if !has(all, n.Addr()) {
			missing = append(missing, n)
		}
	}
	if len(missing) == 0 {
		return all, true
	}
	take := func(place uint64) bool {
		for _, n := range missing {
			if !p.free(at(n, place)) {
				return false
			}
		}
		for _, n := range missing {
			p.used[at(n, place)] = true
			all = append(all, at(n, place))
		}
		return true
	}
	for _, a := range have { // beside the one that is there
		n := slices.IndexFunc(p.networks, func(n netip.Prefix) bool { return n.Contains(a) })
		if n < 0 {
			continue // it is in none of them, which Check says
		}
		if place, near := placeOf(p.networks[n], a); near && place < p.places && take(place) {
			return all, true
		}
	}
	for try := range byte(tries) {
		h := fnv.New64a()
		h.Write(append([]byte(name), 0, try))
		if take(h.Sum64() % p.places) {
			return all, true
		}
	}
	// The network is crowded: the first that is free. What is not free now is
	// not later in this turn.
	next := p.next[list(missing)]
	for ; next < p.places; next += 1 + p.skip(missing, next) {
		if take(next) {
			p.next[list(missing)] = next + 1
			return all, true
		}
	}
	p.next[list(missing)] = next
	return all, false
}

// skip is how many places after this one are reserved as well.
func (p *pool) skip(networks []netip.Prefix, place uint64) uint64 {
	for _, n := range networks {
		a := at(n, place)
		for _, r := range p.reserved {
			if !r.Contains(a) {
				continue
			}
			last, near := placeOf(n, r.Last)
			if !near || last >= p.places {
				last = p.places - 1
			}
			return last - place
		}
	}
	return 0
}

// at is the address at a place of a network; that of the network itself is 0.
func at(n netip.Prefix, place uint64) netip.Addr {
	if n.Addr().Is4() {
		b := n.Addr().As4()
		binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+uint32(place))
		return netip.AddrFrom4(b)
	}
	b := n.Addr().As16()
	// Places fit the bits that the network leaves free.
	binary.BigEndian.PutUint64(b[8:], binary.BigEndian.Uint64(b[8:])+place)
	return netip.AddrFrom16(b)
}

// placeOf is the place of an address in its network; near is false where it is
// too far in for a number.
func placeOf(n netip.Prefix, a netip.Addr) (place uint64, near bool) {
	if a.Is4() {
		first, b := n.Addr().As4(), a.As4()
		return uint64(binary.BigEndian.Uint32(b[:]) - binary.BigEndian.Uint32(first[:])), true
	}
	first, b := n.Addr().As16(), a.As16()
	return binary.BigEndian.Uint64(b[8:]) - binary.BigEndian.Uint64(first[8:]), [8]byte(b[:8]) == [8]byte(first[:8])
}

package bouncer

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/edgeward/edgeward/internal/nft"
)

// memory is a kernel that keeps to the contract of internal/nft, and panics
// where the caller does not.
type memory struct {
	now func() time.Time

	mu         sync.Mutex
	fails      int // writes that are to fail
	generation uint32
	layout     string
	enforcing  bool
	intact     bool
	owner      bool
	classes    map[uint32]string
	protected  []netip.Prefix
	waived     []ban
	older      bool // what enforces has no waivers
	elements   map[netip.Addr]ban
	ranges     []ban
	installs   int
	updates    int
	written    int // elements and ranges of the last update
	events     chan nft.Event
	dropped    []nft.Counter
	bypasses   []nft.Bypass
}

type ban struct {
	from, to netip.Addr
	class    uint32
	until    time.Time
}

var _ kernel = (*memory)(nil)

var errKernel = errors.New("no buffer space available")

func newMemory(now func() time.Time) *memory {
	return &memory{now: now, owner: true, events: make(chan nft.Event, 1)}
}

func (m *memory) Read() (nft.Have, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	h := nft.Have{Present: m.enforcing, Owner: m.owner, Persist: m.owner, Enforcing: m.enforcing, Intact: m.intact,
		Layout: m.layout, Generation: m.generation}
	m.sweep()
	for a := range m.elements {
		if a.Is4() {
			h.Bans4++
		} else {
			h.Bans6++
		}
	}
	for _, r := range m.ranges {
		if r.from.Is4() {
			h.Nets4++
		} else {
			h.Nets6++
		}
	}
	return h, nil
}

// sweep removes what has timed out.
func (m *memory) sweep() {
	now := m.now()
	for a, b := range m.elements {
		if !b.until.After(now) {
			delete(m.elements, a)
		}
	}
	m.ranges = slices.DeleteFunc(m.ranges, func(b ban) bool { return !b.until.After(now) })
}

func (m *memory) fail() error {
	if m.fails > 0 {
		m.fails--
		return errKernel
	}
	return nil
}

func (m *memory) Install(cfg nft.Config, content nft.Content) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.installs++
	m.intact = false
	if err := m.fail(); err != nil {
		return err
	}
	now := m.now()
	classes, elements, ranges := m.classes, m.elements, m.ranges
	m.classes, m.elements, m.ranges = map[uint32]string{}, map[netip.Addr]ban{}, nil
	err := m.add(content.Classes, nil, nil, now)
	for e := range content.Elements {
		if m.elements[e.Addr].from.IsValid() {
			panic(fmt.Sprintf("%v is installed twice", e.Addr))
		}
		err = errors.Join(err, m.add(nil, []nft.Element{e}, nil, now))
	}
	for r := range content.Ranges {
		err = errors.Join(err, m.add(nil, nil, []nft.Range{r}, now))
	}
	if err != nil {
		m.classes, m.elements, m.ranges = classes, elements, ranges
		return err
	}
	m.protected = content.Protected
	m.waive(content.Waivers)
	m.generation++
	m.older = false
	m.layout = cfg.Layout()
	m.enforcing, m.intact = true, true
	return nil
}

// add puts elements and ranges that are not there.
func (m *memory) add(classes []nft.Class, elements []nft.Element, ranges []nft.Range, now time.Time) error {
	for _, c := range classes {
		if name, ok := m.classes[c.Mark]; c.Mark == 0 || ok && name != c.Name {
			panic(fmt.Sprintf("class %+v is %q already", c, name))
		}
		m.classes[c.Mark] = c.Name
	}
	for _, e := range elements {
		if m.classes[e.Class] == "" || !e.Addr.IsValid() || e.Addr.Is4In6() {
			panic(fmt.Sprintf("element %+v makes no sense", e))
		}
		if e.Timeout > 0 {
			m.elements[e.Addr] = ban{e.Addr, e.Addr, e.Class, now.Add(e.Timeout)}
		}
	}
	for _, r := range ranges {
		if m.classes[r.Class] == "" || r.From.BitLen() != r.To.BitLen() || r.To.Less(r.From) {
			panic(fmt.Sprintf("range %+v makes no sense", r))
		}
		if r.Timeout <= 0 {
			continue
		}
		for _, have := range m.ranges {
			if !r.To.Less(have.from) && !have.to.Less(r.From) && have.from.BitLen() == r.From.BitLen() {
				return fmt.Errorf("%v to %v: file exists", r.From, r.To)
			}
		}
		m.ranges = append(m.ranges, ban{r.From, r.To, r.Class, now.Add(r.Timeout)})
	}
	return nil
}

func (m *memory) Update(c nft.Changes) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.updates++
	if !m.intact {
		return nft.ErrNotInstalled
	}
	if err := m.fail(); err != nil {
		return err
	}
	now := m.now()
	m.sweep()
	m.written = len(c.Delete) + len(c.Put) + len(c.DeleteRanges) + len(c.PutRanges)
	twice := map[netip.Addr]bool{}
	for _, e := range c.Put {
		if twice[e.Addr] {
			panic(fmt.Sprintf("%v is put twice in one transaction", e.Addr))
		}
		twice[e.Addr] = true
	}
	ranges := slices.Clone(m.ranges)
	for _, r := range slices.Concat(c.DeleteRanges, c.PutRanges) {
		m.ranges = slices.DeleteFunc(m.ranges, func(b ban) bool { return b.from == r.From && b.to == r.To })
	}
	if err := m.add(c.Classes, nil, c.PutRanges, now); err != nil {
		m.ranges = ranges
		return err
	}
	for _, a := range c.Delete {
		delete(m.elements, a)
	}
	if err := m.add(nil, c.Put, nil, now); err != nil {
		return err
	}
	if c.Protected != nil {
		m.protected = c.Protected
	}
	return nil
}

func (m *memory) Sample(addrs []netip.Addr) ([]nft.Found, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.enforcing {
		return nil, nft.ErrNotInstalled
	}
	m.sweep()
	out := make([]nft.Found, len(addrs))
	for i, a := range addrs {
		out[i].Addr = a
		b, ok := m.elements[a]
		for _, r := range m.ranges {
			if !ok && r.from.BitLen() == a.BitLen() && !a.Less(r.from) && !r.to.Less(a) {
				b, ok = r, true
			}
		}
		if ok {
			out[i] = nft.Found{Addr: a, From: b.from, To: b.to, Class: b.class, Name: m.classes[b.class], Left: b.until.Sub(m.now())}
		}
	}
	return out, nil
}

func (m *memory) Counters() ([]nft.Counter, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.dropped, nil
}

func (m *memory) Bypasses([]string) ([]nft.Bypass, error) { return m.bypasses, nil }

func (m *memory) Watch(context.Context) (<-chan nft.Event, error) { return m.events, nil }

func (m *memory) Waive(w nft.Waivers) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.enforcing || m.older {
		return nft.ErrNotInstalled
	}
	if err := m.fail(); err != nil {
		return err
	}
	m.waive(w)
	return nil
}

func (m *memory) waive(w nft.Waivers) {
	m.waived = nil
	for _, r := range w.Bans {
		for _, have := range m.waived {
			if r.From.BitLen() == have.from.BitLen() && !r.To.Less(have.from) && !have.to.Less(r.From) {
				panic(fmt.Sprintf("waivers overlap at %v", r.From))
			}
		}
		m.waived = append(m.waived, ban{from: r.From, to: r.To, until: m.now().Add(r.Timeout)})
	}
}

func (m *memory) Remove() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.fail(); err != nil {
		return err
	}
	m.enforcing, m.intact, m.elements, m.ranges, m.waived = false, false, nil, nil, nil
	return nil
}

// flush is what another program's "nft flush ruleset" leaves.
func (m *memory) flush() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.enforcing, m.intact, m.elements, m.ranges, m.waived = false, false, nil, nil, nil
}

// lose takes one element out, behind everybody's back.
func (m *memory) lose(a netip.Addr) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.elements, a)
}

// drops reports whether a packet from addr would be dropped.
func (m *memory) drops(addr netip.Addr) bool {
	found, err := m.Sample([]netip.Addr{addr})
	if err != nil || !found[0].Banned() {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, w := range m.waived {
		if addr.BitLen() == w.from.BitLen() && !addr.Less(w.from) && !w.to.Less(addr) && w.until.After(m.now()) {
			return false
		}
	}
	return !slices.ContainsFunc(m.protected, func(p netip.Prefix) bool { return p.Contains(addr) })
}

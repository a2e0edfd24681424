package decision

import (
	"net/netip"
	"sort"
	"time"
)

// Held is what the decisions on exactly one prefix add up to under a policy:
// not what encloses it and not what it encloses. A kernel set keeps elements
// like these.
type Held struct {
	Prefix      netip.Prefix
	Remediation Remediation // the strongest one live
	Class       Class       // of the decision that asks for it
	ClassUntil  time.Time   // when that one ends: before Until, if another goes on
	Until       time.Time   // when the last decision that counts ends
}

// Exactly returns what holds the canonical prefix p itself at the given time,
// and whether anything does.
func (v *View) Exactly(t *Table, p netip.Prefix, now time.Time) (Held, bool) {
	return held(v, t, p, nodeAt(t.base, p), nodeAt(t.recent, p), int(now.UnixNano()))
}

// Walk calls visit for every prefix that is held at the given time, in the order
// of their addresses, IPv4 before IPv6, wider ranges first. It stops early where
// visit returns false.
func (v *View) Walk(t *Table, now time.Time, visit func(Held) bool) {
	c := &cursor{view: v, table: t, at: int(now.UnixNano())}
	for c.next() {
		if !visit(c.held) {
			return
		}
	}
}

// Change is a prefix that is held otherwise in one table than in another.
type Change struct {
	Held
	Gone bool // nothing holds Prefix any more
}

// Changes returns, in the order of Walk, what must be done to a copy of old, as
// read through was at then, to make it a copy of t, as read through v now. Ends
// that differ by at most slack are the same.
func Changes(was *View, old *Table, then time.Time, v *View, t *Table, now time.Time, slack time.Duration) []Change {
	var out []Change
	EachChange(was, old, then, v, t, now, slack, func(c Change) bool {
		out = append(out, c)
		return true
	})
	return out
}

// EachChange is Changes one by one, for as long as visit returns true.
func EachChange(was *View, old *Table, then time.Time, v *View, t *Table, now time.Time, slack time.Duration, visit func(Change) bool) {
	had := &cursor{view: was, table: old, at: int(then.UnixNano())}
	is := &cursor{view: v, table: t, at: int(now.UnixNano())}
	more, has := had.next(), is.next()
	going := true
	for going && (more || has) {
		switch {
		case more && (!has || ordered(had.held.Prefix, is.held.Prefix)):
			going = visit(Change{Held: Held{Prefix: had.held.Prefix}, Gone: true})
			more = had.next()
		case has && (!more || ordered(is.held.Prefix, had.held.Prefix)):
			going = visit(Change{Held: is.held})
			has = is.next()
		default:
			if !alike(had.held, is.held, slack) {
				going = visit(Change{Held: is.held})
			}
			more, has = had.next(), is.next()
		}
	}
}

func alike(a, b Held, slack time.Duration) bool {
	d := a.Until.Sub(b.Until)
	c := a.ClassUntil.Sub(b.ClassUntil)
	return a.Remediation == b.Remediation && a.Class == b.Class && d <= slack && d >= -slack && c <= slack && c >= -slack
}

// ordered reports whether a comes before b in the order of Walk.
func ordered(a, b netip.Prefix) bool {
	if a.Addr().Is4() != b.Addr().Is4() {
		return a.Addr().Is4()
	}
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c < 0
	}
	return a.Bits() < b.Bits()
}

// held adds up the rows of one prefix: node a of the base, node b of the
// overlay, each -1 where there is none.
func held(v *View, t *Table, p netip.Prefix, a, b int, at int) (Held, bool) {
	h := Held{Prefix: p}
	last := 0
	var best *block
	bestRow := -1
	blocks := []*block{t.base, t.recent}
	for i, node := range []int{a, b} {
		if node < 0 {
			continue
		}
		from := blocks[i]
		for row := int(from.first[node]); row < int(from.first[node+1]); row++ {
			if !counts(v, t, from, row, at) {
				continue
			}
			if from.until[row] > last {
				last = from.until[row]
			}
			if bestRow < 0 || stronger(v, from, row, best, bestRow) {
				best, bestRow = from, row
			}
		}
	}
	if bestRow < 0 {
		return h, false
	}
	h.Remediation = v.means[best.class[bestRow]]
	h.Class = t.classes[best.class[bestRow]]
	h.ClassUntil = time.Unix(0, int64(best.until[bestRow]))
	h.Until = time.Unix(0, int64(last))
	return h, true
}

// nodeAt returns the node of b for exactly p, or -1.
func nodeAt(b *block, p netip.Prefix) int {
	if b == nil {
		return -1
	}
	if p.Addr().Is4() {
		key := key4(p)
		i := sort.SearchInts(b.key4, key)
		if i < len(b.key4) && b.key4[i] == key {
			return i
		}
		return -1
	}
	key := key6(p)
	i := sort.SearchStrings(b.key6, key)
	if i < len(b.key6) && b.key6[i] == key {
		return len(b.key4) + i
	}
	return -1
}

// cursor goes through the prefixes that a table holds, in order.
type cursor struct {
	view  *View
	table *Table
	at    int
	held  Held // where the cursor stands

	base, recent int // nodes that are behind it
}

// next moves to the next prefix that is held, and reports whether there is one.
func (c *cursor) next() bool {
	for {
		p, a, b, ok := c.step()
		if !ok {
			return false
		}
		if h, ok := held(c.view, c.table, p, a, b, c.at); ok {
			c.held = h
			return true
		}
	}
}

// step takes the smaller of the next nodes of base and overlay, or both where
// they are for the same prefix.
func (c *cursor) step() (p netip.Prefix, a, b int, ok bool) {
	a, b = -1, -1
	p, ok = prefixAt(c.table.base, c.base)
	other, more := prefixAt(c.table.recent, c.recent)
	if !ok && !more {
		return p, a, b, false
	}
	first := ok && (!more || p == other || ordered(p, other))
	second := more && (!ok || p == other || ordered(other, p))
	if first {
		a = c.base
		c.base++
	}
	if second {
		b = c.recent
		c.recent++
		p = other
	}
	return p, a, b, true
}

// prefixAt returns the prefix of a node, and whether b has that many.
func prefixAt(b *block, node int) (netip.Prefix, bool) {
	if b == nil || node >= len(b.key4)+len(b.key6) {
		return netip.Prefix{}, false
	}
	return prefixOf(b, node), true
}

// Touches returns the prefixes on which Apply of d may change anything, each
// once, in the order of Walk. d must not be full.
func (s *Store) Touches(d *Delta) []netip.Prefix {
	var all []netip.Prefix
	add := func(id int) {
		for _, b := range []*block{s.base, s.recent} {
			if b == nil {
				continue
			}
			if row := rowOf(b, id); row >= 0 {
				all = append(all, prefixOf(b, nodeOfRow(b, row)))
			}
		}
	}
	for _, id := range d.gone {
		add(id)
	}
	for i, key := range d.four.key {
		add(d.four.id[i])
		all = append(all, prefixOf4(key))
	}
	for i, key := range d.six.key {
		add(d.six.id[i])
		all = append(all, prefixOf6(key))
	}
	sort.Slice(all, func(i, j int) bool { return ordered(all[i], all[j]) })
	out := all[:0]
	for i, p := range all {
		if i == 0 || p != all[i-1] {
			out = append(out, p)
		}
	}
	return out
}

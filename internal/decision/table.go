package decision

import (
	"encoding/binary"
	"net/netip"
	"sort"
	"time"
)

// Table answers which decisions hold an address. It never changes.
type Table struct {
	base    *block
	recent  *block // nil where nothing has changed since base was compiled
	gone    []int  // sorted rows of base that no longer count
	classes []Class
	numbers *classes // what numbered them
}

// Len returns the number of decisions on addresses in the table, those that
// expired since it was compiled among them.
func (t *Table) Len() int {
	n := len(t.base.id) - len(t.gone)
	if t.recent != nil {
		n += len(t.recent.id)
	}
	return n
}

// Covered reports whether any decision of t may hold the address with these
// octets, 4 or 16 of them. It is the quick question that settles nearly every
// request: false is final, true calls for View.Lookup, which knows about expiry,
// deletion and policy. IPv4-mapped addresses must be unmapped by the caller.
func Covered(t *Table, octets []byte) bool {
	if len(octets) != 4 {
		return covered6(t, octets)
	}
	x := int(binary.BigEndian.Uint32(octets)) + 1
	return t.base.seg4[sort.SearchInts(t.base.bounds4, x)-1] >= 0 || t.recent != nil && nodeOf4(t.recent, x) >= 0
}

func covered6(t *Table, octets []byte) bool {
	x := string(octets) + "\x00"
	return nodeOf6(t.base, x) >= 0 || t.recent != nil && nodeOf6(t.recent, x) >= 0
}

// Policy is how one enforcement point reads the decisions that all share.
type Policy struct {
	// Allow lists the addresses that no decision touches.
	Allow *Ranges
	// Fallback is what a decision of unknown type means; Allow ignores it.
	Fallback Remediation
	// Accept, if not nil, leaves out the classes that it refuses.
	Accept func(Class) bool
}

// View is how a Policy reads the tables of one numbering of classes. It never
// changes, and holds on to no table.
type View struct {
	numbers *classes
	allow   *Ranges
	means   []Remediation // by class: what it asks for here; Allow is nothing
}

// NewView prepares a view that can read t; it costs what the number of classes
// weighs.
func NewView(t *Table, p Policy) *View {
	v := &View{numbers: t.numbers, allow: p.Allow, means: make([]Remediation, len(t.classes))}
	for i, c := range t.classes {
		if p.Accept != nil && !p.Accept(c) {
			continue
		}
		v.means[i] = c.Remediation
		if c.Remediation == Unknown {
			v.means[i] = p.Fallback
		}
	}
	return v
}

// Reads reports whether v can read t; a table that has come since v was made may
// need a new view.
func (v *View) Reads(t *Table) bool {
	return v.numbers == t.numbers && len(v.means) >= len(t.classes)
}

// Verdict is what applies to an address and the decision that says so. The
// zero Verdict is Allow.
type Verdict struct {
	Remediation Remediation
	ID          int          // of the deciding decision
	Prefix      netip.Prefix // what that decision covers
	Until       time.Time    // when that decision ends
	Type        string       // as LAPI wrote it
	Origin      string
	Scenario    string
}

// Lookup returns the verdict of t, which v must be able to read, on addr at the
// given time: of the live decisions
// that hold it, the strongest and, among equals, the one that ends last.
func (v *View) Lookup(t *Table, addr netip.Addr, now time.Time) Verdict {
	addr = addr.Unmap()
	octets := addr.AsSlice()
	if !Covered(t, octets) || Contains(v.allow, octets) {
		return Verdict{}
	}
	at := int(now.UnixNano())
	b, row := strongest(v, t, t.base, addr, at, nil, -1)
	if t.recent != nil {
		b, row = strongest(v, t, t.recent, addr, at, b, row)
	}
	if row < 0 {
		return Verdict{}
	}
	return verdictOf(v, t, b, row)
}

// strongest walks the holders of addr in block b and returns the best of them
// and the one found so far.
func strongest(v *View, t *Table, b *block, addr netip.Addr, at int, bestBlock *block, best int) (*block, int) {
	for node := nodeOf(b, addr); node >= 0; node = b.parent[node] {
		for row := int(b.first[node]); row < int(b.first[node+1]); row++ {
			if !counts(v, t, b, row, at) {
				continue
			}
			if best < 0 || stronger(v, b, row, bestBlock, best) {
				bestBlock, best = b, row
			}
		}
	}
	return bestBlock, best
}

func counts(v *View, t *Table, b *block, row, at int) bool {
	return b.until[row] > at && v.means[b.class[row]] != Allow && (b != t.base || !has(t.gone, row))
}

func stronger(v *View, a *block, i int, b *block, j int) bool {
	mi, mj := v.means[a.class[i]], v.means[b.class[j]]
	if mi != mj {
		return mi > mj
	}
	if a.until[i] != b.until[j] {
		return a.until[i] > b.until[j]
	}
	return a.id[i] < b.id[j]
}

func verdictOf(v *View, t *Table, b *block, row int) Verdict {
	c := t.classes[b.class[row]]
	return Verdict{
		Remediation: v.means[b.class[row]],
		ID:          b.id[row],
		Prefix:      prefixOf(b, nodeOfRow(b, row)),
		Until:       time.Unix(0, int64(b.until[row])),
		Type:        c.Type,
		Origin:      c.Origin,
		Scenario:    c.Scenario,
	}
}

// Holders returns every live decision of t that holds addr, strongest first: the
// whole answer to why an address is treated as it is. An allowlisted address
// has none.
func (v *View) Holders(t *Table, addr netip.Addr, now time.Time) []Verdict {
	addr = addr.Unmap()
	if Contains(v.allow, addr.AsSlice()) {
		return nil
	}
	at := int(now.UnixNano())
	var blocks []*block
	var found []int
	for _, b := range []*block{t.base, t.recent} {
		if b == nil {
			continue
		}
		for node := nodeOf(b, addr); node >= 0; node = b.parent[node] {
			for row := int(b.first[node]); row < int(b.first[node+1]); row++ {
				if !counts(v, t, b, row, at) {
					continue
				}
				i := len(found)
				blocks = append(blocks, b)
				found = append(found, row)
				for i > 0 && stronger(v, b, row, blocks[i-1], found[i-1]) {
					blocks[i], found[i] = blocks[i-1], found[i-1]
					i--
				}
				blocks[i], found[i] = b, row
			}
		}
	}
	out := make([]Verdict, len(found))
	for i, row := range found {
		out[i] = verdictOf(v, t, blocks[i], row)
	}
	return out
}

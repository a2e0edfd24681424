package bouncer

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/edgeward/edgeward/internal/decision"
)

// keep puts a range into what is laid out.
func (e *enforcer) keep(r *reading, h decision.Held, now time.Time) {
	var pieces []decision.Held
	r.place(h, now, func(piece decision.Held) {
		pieces = append(pieces, piece)
		e.turns(h.Prefix, piece)
	})
	if len(pieces) == 1 && pieces[0].Prefix == h.Prefix {
		i, _ := slices.BinarySearchFunc(e.ranges, h.Prefix, func(h decision.Held, p netip.Prefix) int { return comparePrefixes(h.Prefix, p) })
		e.ranges = slices.Insert(e.ranges, i, pieces[0])
	} else if len(pieces) > 0 {
		e.trimmed[h.Prefix] = pieces
	}
}

// forget takes the range p out of what is laid out.
func (e *enforcer) forget(p netip.Prefix) {
	delete(e.trimmed, p)
	if i, ok := slices.BinarySearchFunc(e.ranges, p, func(h decision.Held, p netip.Prefix) int { return comparePrefixes(h.Prefix, p) }); ok {
		e.ranges = slices.Delete(e.ranges, i, i+1)
	}
}

// region returns the outermost of what is laid out that encloses p, or p itself.
// A change of p changes no span outside of it.
func (e *enforcer) region(p netip.Prefix) netip.Prefix {
	out := p
	for bits := range p.Bits() {
		outer, _ := p.Addr().Prefix(bits)
		_, found := slices.BinarySearchFunc(e.ranges, outer, func(h decision.Held, p netip.Prefix) int { return comparePrefixes(h.Prefix, p) })
		if found {
			out = outer
			break
		}
	}
	for whole := range e.trimmed {
		if whole.Bits() < out.Bits() && whole.Contains(out.Addr()) {
			out = whole
		}
	}
	return out
}

// few is up to how many regions are laid out one by one.
const few = 64

// relay lays regions out anew, drops what has ended in them, and returns which
// spans are to be deleted and which put. What a single change costs does not
// depend on how many ranges there are, but for moving spans about in memory.
func (e *enforcer) relay(regions []netip.Prefix, now time.Time, slack time.Duration) (drop, put []span) {
	zones := zoneOf(regions)
	if len(zones) > few {
		spans := e.lay(nil, now)
		drop, put = difference(e.spans, spans, slack)
		e.spans = spans
		return drop, put
	}
	for i := range zones {
		z := &zones[i]
		from, _ := slices.BinarySearchFunc(e.spans, z.from, func(s span, a netip.Addr) int { return s.from.Compare(a) })
		to := from
		for to < len(e.spans) && !z.to.Less(e.spans[to].from) {
			to++
		}
		spans := e.lay(z, now)
		d, p := difference(e.spans[from:to], spans, slack)
		drop, put = append(drop, d...), append(put, p...)
		e.spans = slices.Replace(e.spans, from, to, spans...)
	}
	return drop, put
}

// lay lays the ranges within z, or all of them, out as the kernel is to hold
// them, and drops those that have ended.
func (e *enforcer) lay(z *stretch, now time.Time) []span {
	from, to := 0, len(e.ranges)
	if z != nil {
		begins := func(h decision.Held, a netip.Addr) int { return h.Prefix.Addr().Compare(a) }
		from, _ = slices.BinarySearchFunc(e.ranges, z.from, begins)
		for to = from; to < len(e.ranges) && !z.to.Less(e.ranges[to].Prefix.Addr()); {
			to++
		}
	}
	ended := func(h decision.Held) bool { return !h.Until.After(now) }
	if slices.ContainsFunc(e.ranges[from:to], ended) {
		live := slices.DeleteFunc(slices.Clone(e.ranges[from:to]), ended)
		e.ranges = slices.Replace(e.ranges, from, to, live...)
		to = from + len(live)
	}
	all := e.ranges[from:to]
	if len(e.trimmed) > 0 {
		all = slices.Clone(all)
		for p, pieces := range e.trimmed {
			if z != nil && (p.Addr().Less(z.from) || z.to.Less(p.Addr())) {
				continue
			}
			pieces = slices.DeleteFunc(pieces, ended)
			if e.trimmed[p] = pieces; len(pieces) == 0 {
				delete(e.trimmed, p)
			}
			all = append(all, pieces...)
		}
		slices.SortFunc(all, func(a, b decision.Held) int { return comparePrefixes(a.Prefix, b.Prefix) })
	}
	spans := spansOf(all)
	for _, s := range spans {
		e.dueBy(s.turns)
	}
	return spans
}

func comparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

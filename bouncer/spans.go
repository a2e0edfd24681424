package bouncer

import (
	"net/netip"
	"slices"
	"time"

	"github.com/edgeward/edgeward/internal/decision"
)

// span is a stretch of addresses, both ends included, with the class that the
// kernel counts it under and the time at which the last ban on any of it ends.
// Spans never overlap.
type span struct {
	from, to netip.Addr
	class    decision.Class
	turns    time.Time // when the decision that names the class ends; until, at the latest
	until    time.Time
}

// spansOf lays banned ranges, given in the order of decision.View.Walk, out as
// sorted, disjoint spans. Ranges nest or are apart, never overlap by halves;
// within a range that another encloses, the stronger decision names the class
// and the later end counts. Neighbours that say the same become one if the same
// range encloses them; no span reaches out of an outermost range, so that each
// of those can be laid out by itself.
func spansOf(ranges []decision.Held) []span {
	type open struct {
		held decision.Held // with what encloses it taken in
		last netip.Addr
	}
	out := make([]span, 0, len(ranges)+len(ranges)/8) // most do not nest
	var stack []open
	var next netip.Addr // the first address that is not laid out yet
	root := 0           // the first span of the outermost range
	emit := func(to netip.Addr) {
		top := stack[len(stack)-1].held
		s := span{from: next, to: to, class: top.Class, turns: top.ClassUntil, until: top.Until}
		if n := len(out); n > root && out[n-1].to.Next() == s.from && out[n-1].class == s.class &&
			out[n-1].turns.Equal(s.turns) && out[n-1].until.Equal(s.until) {
			out[n-1].to = s.to
		} else {
			out = append(out, s)
		}
		next = to.Next()
	}
	closeBefore := func(start netip.Addr) {
		for len(stack) > 0 && (!start.IsValid() || stack[len(stack)-1].last.Less(start)) {
			if top := stack[len(stack)-1]; next.IsValid() && !top.last.Less(next) {
				emit(top.last)
			}
			stack = stack[:len(stack)-1]
		}
	}
	for _, h := range ranges {
		start := h.Prefix.Addr()
		closeBefore(start)
		if len(stack) == 0 {
			root = len(out)
		} else {
			if next.Less(start) {
				emit(start.Prev())
			}
			outer := stack[len(stack)-1].held
			if outer.Remediation > h.Remediation || outer.Remediation == h.Remediation && outer.ClassUntil.After(h.ClassUntil) {
				h.Remediation, h.Class, h.ClassUntil = outer.Remediation, outer.Class, outer.ClassUntil
			}
			if outer.Until.After(h.Until) {
				h.Until = outer.Until
			}
		}
		next = start
		stack = append(stack, open{h, lastOf(h.Prefix)})
	}
	closeBefore(netip.Addr{})
	return out
}

// lastOf returns the last address of a prefix.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	return last
}

// difference returns what turns the spans old into the spans want, both sorted:
// those to delete and those to put. A span with the bounds of an old one is put
// without deleting. Ends that differ by at most slack are the same, and become so
// in want, which is then what there is.
func difference(old, want []span, slack time.Duration) (drop, put []span) {
	i, j := 0, 0
	for i < len(old) || j < len(want) {
		switch {
		case j == len(want) || i < len(old) && compareSpans(old[i], want[j]) < 0:
			drop = append(drop, old[i])
			i++
		case i == len(old) || compareSpans(want[j], old[i]) < 0:
			put = append(put, want[j])
			j++
		default:
			if d := old[i].until.Sub(want[j].until); old[i].class != want[j].class || d > slack || d < -slack {
				put = append(put, want[j])
			} else {
				want[j].until = old[i].until
			}
			i++
			j++
		}
	}
	return drop, put
}

// compareSpans orders spans by family, start and end.
func compareSpans(a, b span) int {
	if c := a.from.Compare(b.from); c != 0 {
		return c
	}
	return a.to.Compare(b.to)
}

// covering returns the span that holds addr, if one does.
func covering(spans []span, addr netip.Addr) (span, bool) {
	i, found := slices.BinarySearchFunc(spans, addr, func(s span, a netip.Addr) int { return s.from.Compare(a) })
	if !found {
		i--
	}
	if i < 0 || spans[i].to.Less(addr) || spans[i].from.Is4() != addr.Is4() {
		return span{}, false
	}
	return spans[i], true
}

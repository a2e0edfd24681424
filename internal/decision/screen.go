package decision

import "sort"

// Screen is the first sieve of a request path: the IPv4 addresses that some
// decision of a table may hold, as one sorted list of bounds, so that a single
// search settles nearly every request. An address x is held where an odd number
// of bounds lie at or below it:
//
//	sort.SearchInts(screen.Four, x+1)&1 == 1
//
// The fields are there to be searched in place, because interpreted by Yaegi a
// call costs as much as the search. IPv6 has no screen; ask Covered.
type Screen struct {
	Table *Table
	Four  []int

	base []int // the bounds of Table's base alone
}

// NewScreen returns the screen of a table. last, which may be nil, is the screen
// before; where both tables share their base, only the overlay is worked on and
// the rest is copied in one go.
func NewScreen(t *Table, last *Screen) *Screen {
	s := &Screen{Table: t}
	if last != nil && last.Table.base == t.base {
		s.base = last.base
	} else {
		s.base = outline(t.base)
	}
	s.Four = s.base
	if t.recent != nil && len(t.recent.key4) > 0 {
		s.Four = merged(s.base, outline(t.recent))
	}
	return s
}

// outline returns the bounds at which a block's coverage of IPv4 begins and
// ends.
func outline(b *block) []int {
	bounds := b.bounds4
	out := make([]int, 0, len(bounds))
	inside := false
	for i, n := range b.seg4 {
		if inside != (n >= 0) {
			inside = !inside
			out = append(out, bounds[i])
		}
	}
	return out
}

// merged returns the union of two outlines; few is the short one. It is
// interpreted once for each stretch of few, and copies whole runs of many.
func merged(many, few []int) []int {
	out := make([]int, 0, len(many)+len(few))
	at := 0 // bounds of many that are dealt with
	for i := 0; i+1 < len(few); i += 2 {
		start, end := few[i], few[i+1]
		from := sort.SearchInts(many, start)
		if from > at {
			out = append(out, many[at:from]...)
			at = from
		}
		// Where from is odd, many is inside at start already.
		if from&1 == 0 {
			out = append(out, start)
		}
		to := sort.SearchInts(many, end+1)
		if to > at {
			at = to
		}
		if to&1 == 0 {
			out = append(out, end)
		}
	}
	return append(out, many[at:]...)
}

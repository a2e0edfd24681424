package decision

import (
	"math"
	"net/netip"
	"sort"
	"time"
)

// FirstLocal is the first id of local decisions: those that do not come from
// LAPI. Give them to Delta.Hold and Delta.Release, in deltas that are not full.
// Rows of LAPI with such ids are skipped, and a full pull leaves local decisions
// as they are.
const FirstLocal = maxID / 2

// Forever is the end of a decision that has none: it counts until it is
// released.
var Forever = time.Unix(0, math.MaxInt64)

// Release ends the local decision with this id.
func (d *Delta) Release(id int) {
	if !d.Full && id >= FirstLocal {
		d.gone = append(d.gone, id)
	}
}

// carry adds the local decisions of the store to a full delta, which is about to
// take the place of everything.
func (s *Store) carry(d *Delta) {
	hold := func(id int, p netip.Prefix, until int, class int32) {
		if id >= FirstLocal && until > d.at {
			d.Hold(id, p, time.Unix(0, int64(until)), s.classes.list[class])
		}
	}
	b := s.base
	for i := sort.SearchInts(b.ids, FirstLocal); i < len(b.ids); i++ {
		row := int(b.idRow[i])
		if !has(s.gone, row) {
			hold(b.ids[i], prefixOf(b, nodeOfRow(b, row)), b.until[row], b.class[row])
		}
	}
	for i, id := range s.four.id {
		hold(id, prefixOf4(s.four.key[i]), s.four.until[i], s.four.class[i])
	}
	for i, id := range s.six.id {
		hold(id, prefixOf6(s.six.key[i]), s.six.until[i], s.six.class[i])
	}
}

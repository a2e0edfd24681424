package nft

import (
	"iter"
	"net/netip"
	"time"
)

// ranges are those that an interval map of the kernel was given and not told to
// delete.
//
// The kernel keeps an interval as two elements, of which only the first times
// out. Until it collects the pair, which may be at some later commit, adding
// what overlaps it fails, and so does deleting it, or worse: the second goes and
// the first stays, and the collection then takes the end of another interval for
// its own. So nothing is changed singly in a map that holds what has timed out,
// or is about to. Such a map is written again as a whole, which the kernel does
// well.
type ranges struct {
	kept    map[netip.Addr]kept // by first address
	soonest time.Duration       // no range times out before; Forever if none does
}

type kept struct {
	to    netip.Addr
	class uint32
	until time.Duration // as clock tells it
}

// caution is how long before it times out a range counts as timed out: more than
// a transaction takes from here to its end.
const caution = 2 * time.Second

var epoch = time.Now()

// clock tells the time since some start. Like the kernel's timeouts, it does not
// know about changes of the date.
func clock() time.Duration { return time.Since(epoch) }

func (s *ranges) put(r Range) {
	if s.kept == nil {
		s.kept, s.soonest = map[netip.Addr]kept{}, Forever
	}
	until := Forever
	if now := clock(); r.Timeout < Forever-now {
		until = now + r.Timeout
	}
	s.soonest = min(s.soonest, until)
	s.kept[r.From] = kept{r.To, r.Class, until}
}

func (s *ranges) has(r Range) bool {
	k, ok := s.kept[r.From]
	return ok && k.to == r.To
}

// stale reports whether a range has timed out or soon will.
func (s *ranges) stale() bool {
	soon := clock() + caution
	if len(s.kept) == 0 || s.soonest > soon {
		return false
	}
	// It may have been deleted since: look.
	s.soonest = Forever
	for _, k := range s.kept {
		s.soonest = min(s.soonest, k.until)
	}
	return s.soonest <= soon
}

// live yields the ranges that have not timed out, with the time that they have
// left.
func (s *ranges) live() iter.Seq[Range] {
	now := clock()
	return func(yield func(Range) bool) {
		for from, k := range s.kept {
			left := k.until
			if left != Forever {
				left -= now
			}
			if left > 0 && !yield(Range{from, k.to, k.class, left}) {
				return
			}
		}
	}
}

// forget drops what has timed out.
func (s *ranges) forget() {
	now := clock()
	for from, k := range s.kept {
		if k.until <= now {
			delete(s.kept, from)
		}
	}
}

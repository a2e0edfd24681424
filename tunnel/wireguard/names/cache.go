package names

import (
	"container/list"
	"errors"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// What is remembered, and for how long at most. With answers of usual size, a
// full cache is some 10 MiB.
const (
	mostKept    = 8192
	largestKept = 4096 // bytes on the wire; larger ones are asked for each time
	longestKept = 24 * time.Hour
	// longestNothing is how long it is remembered that there is nothing.
	longestNothing = time.Hour
	// failureKept is how long a failure is: long enough for those who ask again
	// at once, and many do; RFC 9520.
	failureKept = time.Second
)

// cache remembers what upstreams said, the least recently used of it going
// first.
type cache struct {
	mu   sync.Mutex
	kept map[key]*list.Element // of *memory
	used *list.List            // the most recently used first
}

// memory is one answer, which is not changed, or one failure.
type memory struct {
	key   key
	told  *dns.Msg
	err   error
	since time.Time
	until time.Time
}

func newCache() *cache { return &cache{kept: map[key]*list.Element{}, used: list.New()} }

// get returns what is remembered of a question: an answer of the caller's own,
// its times to live less what has passed, or a failure; neither if nothing is.
func (c *cache) get(k key, now time.Time) (*dns.Msg, error) {
	c.mu.Lock()
	e := c.kept[k]
	if e == nil {
		c.mu.Unlock()
		return nil, nil
	}
	m := e.Value.(*memory)
	if !now.Before(m.until) {
		c.drop(e)
		c.mu.Unlock()
		return nil, nil
	}
	c.used.MoveToFront(e)
	c.mu.Unlock()
	if m.err != nil {
		return nil, m.err
	}
	told := m.told.Copy()
	passed := uint32(max(0, now.Sub(m.since)/time.Second))
	for _, section := range [][]dns.RR{told.Answer, told.Ns, told.Extra} {
		for _, rr := range section {
			h := rr.Header()
			h.Ttl -= min(h.Ttl, passed)
		}
	}
	return told, nil
}

// put remembers an answer, or a failure, for as long as it may be.
func (c *cache) put(k key, told *dns.Msg, err error, now time.Time) {
	m := &memory{key: k, told: told, err: err, since: now}
	switch keep := lifetime(told); {
	case err != nil:
		m.err = errors.New(err.Error()) // nothing of the sockets stays
		m.until = now.Add(failureKept)
	case keep <= 0 || told.Len() > largestKept:
		return
	default:
		m.until = now.Add(keep)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.kept[k]; e != nil {
		c.drop(e)
	}
	c.kept[k] = c.used.PushFront(m)
	for c.used.Len() > mostKept {
		c.drop(c.used.Back())
	}
}

// drop forgets; c.mu is held.
func (c *cache) drop(e *list.Element) {
	delete(c.kept, e.Value.(*memory).key)
	c.used.Remove(e)
}

// lifetime is how long an answer may be remembered. One that says that there is
// nothing is worth what its start of authority says; RFC 2308.
func lifetime(m *dns.Msg) time.Duration {
	if m == nil {
		return 0
	}
	if m.Rcode != dns.RcodeSuccess && m.Rcode != dns.RcodeNameError {
		return failureKept
	}
	if m.Rcode == dns.RcodeNameError || !answers(m) {
		for _, rr := range m.Ns {
			if soa, ok := rr.(*dns.SOA); ok {
				return min(time.Duration(min(soa.Hdr.Ttl, soa.Minttl))*time.Second, shortest(m, longestNothing))
			}
		}
		return 0
	}
	return shortest(m, longestKept)
}

// answers reports whether the last of an answer is of the type that was asked
// for: a chain of aliases may end in nothing.
func answers(m *dns.Msg) bool {
	if len(m.Question) != 1 {
		return false
	}
	for _, rr := range m.Answer {
		if t := rr.Header().Rrtype; t == m.Question[0].Qtype || m.Question[0].Qtype == dns.TypeANY {
			return true
		}
	}
	return false
}

// shortest is the shortest time to live in an answer, at most longest.
func shortest(m *dns.Msg, longest time.Duration) time.Duration {
	for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			longest = min(longest, time.Duration(rr.Header().Ttl)*time.Second)
		}
	}
	return longest
}

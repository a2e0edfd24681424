package plugin

import (
	"strings"
	"sync"
	"sync/atomic"

	"github.com/edgeward/edgeward/internal/decision"
)

// sight is what requests see of an engine: the table in force and, so that the
// next request of a connection need not be judged again, who was found free
// under it. A new table begins with nobody.
type sight struct {
	table *decision.Table
	free  *texts
}

func newSight(t *decision.Table) *sight { return &sight{table: t, free: &texts{}} }

// texts remembers what addresses in textual form stand for: a connection's
// RemoteAddr, the value of a forwarding header. It is bounded, because strangers
// bring them.
type texts struct {
	octets sync.Map // string → octets of the address, as a string
	n      atomic.Int32
}

const (
	maxTexts   = 16384
	maxTextLen = 64 // longer than any address with a port
)

// remember adds a text, unless there is no room for it; then it reports false,
// and the caller does well to begin anew.
func (t *texts) remember(text string, octets []byte) bool {
	if len(text) > maxTextLen {
		return true
	}
	if t.n.Add(1) > maxTexts {
		return false
	}
	t.octets.Store(strings.Clone(text), string(octets))
	return true
}

// note remembers that the address that text stands for is free under s. place
// holds s, unless there is a newer one by now.
func note(place *atomic.Value, s *sight, text string, octets []byte) {
	if !s.free.remember(text, octets) {
		place.CompareAndSwap(s, newSight(s.table))
	}
}

package bouncer

import (
	"net/netip"
	"slices"
	"time"
)

// Covered is a decision that covers protected addresses, which usually means
// that CrowdSec is told wrong client addresses.
type Covered struct {
	Prefix   netip.Prefix `json:"prefix"`
	Origin   string       `json:"origin"`
	Scenario string       `json:"scenario"`
	Protects string       `json:"protects"`
}

// coveredShown bounds how many decisions are named.
const coveredShown = 100

// tellCovering finds the decisions that cover protected addresses anew, and
// names those in the log that are new.
func (e *enforcer) tellCovering(r *reading, now time.Time) {
	known := map[netip.Prefix]bool{}
	for _, c := range *e.covering.Load() {
		known[c.Prefix] = true
	}
	prefixes := make([]netip.Prefix, 0, len(e.aside))
	for p := range e.aside {
		if r.guarded.meets(p) {
			prefixes = append(prefixes, p)
		}
	}
	slices.SortFunc(prefixes, comparePrefixes)
	list := []Covered{}
	logged := 0
	for _, p := range prefixes {
		h, held := r.all.Exactly(r.table, p, now)
		if !held || len(list) == coveredShown {
			continue
		}
		c := Covered{Prefix: p, Origin: originOf(h.Class), Scenario: h.Class.Scenario, Protects: whyProtected(r.protected, p)}
		list = append(list, c)
		if !known[p] && logged < 10 {
			logged++
			if originIn(h.Class.Origin, []string{"lists"}) { // whose authors know nothing of this node
				e.log.Info("a list names protected addresses, which stay reachable",
					"value", p.String(), "origin", c.Origin, "protects", c.Protects)
				continue
			}
			e.log.Warn("a decision covers a protected address, which stays reachable: is CrowdSec told wrong client addresses?",
				"value", p.String(), "origin", c.Origin, "scenario", c.Scenario, "protects", c.Protects)
		}
	}
	e.covering.Store(&list)
}

package decision

import (
	"fmt"
	"math/rand"
	"net/netip"
	"testing"
	"time"
)

// exactly adds up the oracle's decisions on one prefix.
func (o oracle) exactly(p netip.Prefix, now time.Time, fallback Remediation) (Remediation, time.Time) {
	best, until := Allow, time.Time{}
	for _, d := range o {
		r := remediationOf(d.typ)
		if r == Unknown {
			r = fallback
		}
		if d.prefix != p || !d.until.After(now) || r == Allow {
			continue
		}
		if r > best {
			best = r
		}
		if d.until.After(until) {
			until = d.until
		}
	}
	return best, until
}

// TestHeldFollowsChanges keeps a copy of what is held by applying the changes
// from table to table, and compares it with the oracle.
func TestHeldFollowsChanges(t *testing.T) {
	seeds := 40
	if interpreted() {
		seeds = 3
	}
	for seed := 1; seed <= seeds; seed++ {
		w := world{rand.New(rand.NewSource(int64(seed)))}
		s := NewStore()
		o := oracle{}
		now := epoch
		then := now
		table := s.Compile()
		view := NewView(table, Policy{Fallback: Ban})
		copied := map[netip.Prefix]Held{}
		for step := 0; step < 40; step++ {
			where := fmt.Sprintf("seed %d step %d", seed, step)
			d := s.NewDelta(false, now)
			given := map[int]bool{}
			for i := w.Intn(10); i > 0; i-- {
				n := naive{prefix: w.prefix(), typ: []string{"ban", "captcha", "odd"}[w.Intn(3)], origin: "o", until: now.Add(time.Duration(1+w.Intn(30)) * time.Minute)}
				id := 1 + w.Intn(60)
				if given[id] {
					continue
				}
				given[id] = true
				d.Add(&Row{ID: id, Scope: "Range", Value: n.prefix.String(), Type: n.typ, Origin: n.origin, Duration: n.until.Sub(now).String()})
				o[id] = n
			}
			for i := w.Intn(4); i > 0; i-- {
				id := 1 + w.Intn(60)
				if !given[id] {
					d.Delete(id)
					delete(o, id)
				}
			}
			touched := map[netip.Prefix]bool{}
			for _, p := range s.Touches(d) {
				touched[p] = true
			}
			s.Apply(d, now)
			if w.Intn(4) == 0 {
				s.Fold(now)
			}
			next := s.Compile()
			nextView := NewView(next, Policy{Fallback: Ban})
			for _, c := range Changes(view, table, now, nextView, next, now, 0) {
				if !touched[c.Prefix] {
					t.Fatalf("%s: %+v was not said to be touched", where, c)
				}
			}
			for _, c := range Changes(view, table, then, nextView, next, now, 0) {
				if c.Gone {
					delete(copied, c.Prefix)
				} else {
					copied[c.Prefix] = c.Held
				}
			}
			table = next
			view = nextView
			then = now
			walked := map[netip.Prefix]bool{}
			var last netip.Prefix
			view.Walk(table, now, func(h Held) bool {
				if last.IsValid() && !ordered(last, h.Prefix) {
					t.Fatalf("%s: %v comes after %v", where, h.Prefix, last)
				}
				last = h.Prefix
				walked[h.Prefix] = true
				want, until := o.exactly(h.Prefix, now, Ban)
				if h.Remediation != want || !h.Until.Equal(until) || copied[h.Prefix] != h {
					t.Fatalf("%s: walked %+v, copied %+v, want %s until %v", where, h, copied[h.Prefix], want.Name(), until)
				}
				if again, ok := view.Exactly(table, h.Prefix, now); !ok || again != h {
					t.Fatalf("%s: exactly %+v, walked %+v", where, again, h)
				}
				return true
			})
			for _, d := range o {
				if r, _ := o.exactly(d.prefix, now, Ban); (r != Allow) != walked[d.prefix] {
					t.Fatalf("%s: %v is held as %s and walked %v", where, d.prefix, r.Name(), walked[d.prefix])
				}
			}
			for p := range copied {
				if copied[p].Until.After(now) && !walked[p] {
					t.Fatalf("%s: the copy still holds %v", where, p)
				}
			}
			now = now.Add(time.Duration(w.Intn(120)) * time.Second)
		}
	}
}

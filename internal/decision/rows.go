package decision

import (
	"net/netip"
	"time"
)

// Tally is how many live decisions on addresses there are of one class.
type Tally struct {
	Class Class
	IPv4  int
	IPv6  int
}

// Tally counts the decisions that are live at the given time, by class, whatever
// a policy makes of them; classes without any are left out. It reads each
// decision once and nothing else, a few milliseconds at a million.
func (t *Table) Tally(now time.Time) []Tally {
	at := int(now.UnixNano())
	all := make([]Tally, len(t.classes))
	for i, c := range t.classes {
		all[i].Class = c
	}
	for _, b := range []*block{t.base, t.recent} {
		if b == nil {
			continue
		}
		six := int(b.first[len(b.key4)])
		for row, until := range b.until {
			if until <= at {
				continue
			}
			if row < six {
				all[b.class[row]].IPv4++
			} else {
				all[b.class[row]].IPv6++
			}
		}
	}
	six := int(t.base.first[len(t.base.key4)])
	for _, row := range t.gone {
		if t.base.until[row] <= at {
			continue
		}
		if row < six {
			all[t.base.class[row]].IPv4--
		} else {
			all[t.base.class[row]].IPv6--
		}
	}
	var out []Tally
	for _, c := range all {
		if c.IPv4+c.IPv6 > 0 {
			out = append(out, c)
		}
	}
	return out
}

// Each calls visit for every decision on addresses that is live at the given
// time, in no special order, until visit returns false. What is visited, given
// to Delta.Hold, makes a store that says the same.
func (t *Table) Each(now time.Time, visit func(id int, p netip.Prefix, until time.Time, c Class) bool) {
	at := int(now.UnixNano())
	for _, b := range []*block{t.base, t.recent} {
		if b == nil {
			continue
		}
		for node := 0; node+1 < len(b.first); node++ {
			for row := int(b.first[node]); row < int(b.first[node+1]); row++ {
				if b.until[row] <= at || b == t.base && has(t.gone, row) {
					continue
				}
				if !visit(b.id[row], prefixOf(b, node), time.Unix(0, int64(b.until[row])), t.classes[b.class[row]]) {
					return
				}
			}
		}
	}
}

// Hold records a decision that was understood before, such as one that a
// snapshot kept. It takes the same rows as Add, and counts those that it does
// not take in Skipped.
func (d *Delta) Hold(id int, p netip.Prefix, until time.Time, c Class) {
	if id < 0 || id >= maxID {
		d.skip(SkipID)
		return
	}
	if c.Type == "" {
		d.skip(SkipType)
		return
	}
	ends := int(until.UnixNano())
	if ends <= d.at {
		d.skip(SkipDuration)
		return
	}
	if !p.IsValid() || p != p.Masked() || p.Addr().Is4In6() {
		d.skip(SkipValue)
		return
	}
	if d.Len() >= maxRows {
		d.skip(SkipCapacity)
		return
	}
	if c.Type != d.typ || c.Origin != d.origin || c.Scenario != d.scenario || len(d.classes.list) == 0 {
		d.class = classOf(d.classes, c.Type, c.Origin, c.Scenario)
		d.typ, d.origin, d.scenario = c.Type, c.Origin, c.Scenario
	}
	if p.Addr().Is4() {
		d.four.key = append(d.four.key, key4(p))
		d.four.id = append(d.four.id, id)
		d.four.until = append(d.four.until, ends)
		d.four.class = append(d.four.class, d.class)
		return
	}
	d.six.key = append(d.six.key, key6(p))
	d.six.id = append(d.six.id, id)
	d.six.until = append(d.six.until, ends)
	d.six.class = append(d.six.class, d.class)
}

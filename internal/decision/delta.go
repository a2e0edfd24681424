package decision

import (
	"math"
	"strings"
	"time"
)

// Reasons why a row is skipped, the keys of Delta.Skipped.
const (
	SkipRow      = "row"      // not a decision at all
	SkipID       = "id"       // negative, or too large to be one of LAPI's
	SkipScope    = "scope"    // none of ip, range, country, as
	SkipValue    = "value"    // not an address
	SkipPrefix   = "prefix"   // an address with a prefix length it cannot have
	SkipDuration = "duration" // unreadable, zero or negative
	SkipType     = "type"     // empty
	SkipCapacity = "capacity" // more rows than a table holds
)

// rows are decisions on addresses of one family, in no special order.
type rows[K int | string] struct {
	key   []K
	id    []int
	until []int // Unix time in nanoseconds
	class []int32
}

// classes numbers the distinct classes of a store.
type classes struct {
	list   []Class
	number map[string]int32
}

func newClasses() *classes {
	return &classes{number: map[string]int32{}}
}

// Delta is one answer of LAPI's decision stream, being read row by row. Rows
// are understood and made compact as they arrive, so that no list of raw rows
// is ever held. Make one with Store.NewDelta; nothing of it counts until
// Store.Apply.
type Delta struct {
	// Full marks a complete picture (a startup pull), which replaces what
	// the store holds, rather than a change to it.
	Full bool
	// Skipped counts the rows that could not be understood, by reason.
	Skipped map[string]int

	at      int // Unix nanoseconds from which durations count
	classes *classes
	gone    []int
	obscure []int // ids of rows that were not understood
	lost    bool  // rows so unreadable that they have no id
	four    rows[int]
	six     rows[string]
	scoped  []Scoped

	// The class of the row before, because lists repeat it.
	typ, origin, scenario string
	class                 int32
}

// Len returns how many decisions on addresses the delta adds.
func (d *Delta) Len() int { return len(d.four.id) + len(d.six.id) }

// Deleted returns how many deletions the delta carries.
func (d *Delta) Deleted() int { return len(d.gone) }

func (d *Delta) skip(reason string) { d.Skipped[reason]++ }

// doubt skips a row that says something that is not understood: LAPI holds that
// decision, so what was known of it stays.
func (d *Delta) doubt(r *Row, reason string) {
	d.skip(reason)
	d.obscure = append(d.obscure, r.ID)
}

// Unreadable counts a row of which nothing could be read.
func (d *Delta) Unreadable() {
	d.skip(SkipRow)
	d.lost = true
}

// Delete records that LAPI no longer holds the decision with this id. A full
// delta has no use for it: what it does not list is gone. Local decisions are
// not LAPI's to end; Release does that.
func (d *Delta) Delete(id int) {
	if !d.Full && id < FirstLocal {
		d.gone = append(d.gone, id)
	}
}

// Add records a decision. A row that makes no sense is counted in Skipped and
// never costs its neighbours anything.
func (d *Delta) Add(r *Row) {
	if r.ID < 0 || r.ID >= FirstLocal {
		d.skip(SkipID)
		d.lost = true
		return
	}
	if r.Type == "" {
		d.doubt(r, SkipType)
		return
	}
	left, err := time.ParseDuration(r.Duration)
	if err != nil {
		d.doubt(r, SkipDuration)
		return
	}
	if left <= 0 {
		d.skip(SkipDuration)
		return
	}
	until := d.at + int(left)
	if until < d.at {
		until = math.MaxInt64
	}
	address := false
	switch r.Scope {
	case "Ip", "ip", "Range", "range":
		address = true
	default:
		switch strings.ToLower(r.Scope) {
		case "ip", "range":
			address = true
		case "country", "as":
		default:
			d.skip(SkipScope)
			return
		}
	}
	if r.Type != d.typ || r.Origin != d.origin || r.Scenario != d.scenario || len(d.classes.list) == 0 {
		d.class = classOf(d.classes, r.Type, r.Origin, r.Scenario)
		d.typ, d.origin, d.scenario = r.Type, r.Origin, r.Scenario
	}
	if !address {
		d.scoped = append(d.scoped, Scoped{
			ID:    r.ID,
			Scope: strings.ToLower(r.Scope),
			Value: r.Value,
			Class: d.classes.list[d.class],
			Until: time.Unix(0, int64(until)),
		})
		return
	}
	prefix, err := ParsePrefix(r.Value)
	if err != nil {
		slash := strings.IndexByte(r.Value, '/')
		if slash >= 0 {
			if _, err := ParsePrefix(r.Value[:slash]); err == nil {
				d.doubt(r, SkipPrefix)
				return
			}
		}
		d.doubt(r, SkipValue)
		return
	}
	if d.Len() >= maxRows {
		d.skip(SkipCapacity)
		return
	}
	if prefix.Addr().Is4() {
		d.four.key = append(d.four.key, key4(prefix))
		d.four.id = append(d.four.id, r.ID)
		d.four.until = append(d.four.until, until)
		d.four.class = append(d.four.class, d.class)
		return
	}
	d.six.key = append(d.six.key, key6(prefix))
	d.six.id = append(d.six.id, r.ID)
	d.six.until = append(d.six.until, until)
	d.six.class = append(d.six.class, d.class)
}

// classOf returns the number of a class, giving it one if it is new. The
// strings are copied out of whatever larger text they may be part of.
func classOf(c *classes, typ, origin, scenario string) int32 {
	name := typ + "\x00" + origin + "\x00" + scenario
	if n, ok := c.number[name]; ok {
		return n
	}
	n := int32(len(c.list))
	c.list = append(c.list, Class{
		Type:        strings.Clone(typ),
		Origin:      strings.Clone(origin),
		Scenario:    strings.Clone(scenario),
		Remediation: remediationOf(typ),
	})
	c.number[name] = n
	return n
}

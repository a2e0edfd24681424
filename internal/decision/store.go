package decision

import (
	"runtime"
	"sort"
	"time"
)

// Store holds every live decision by id and turns deltas into tables. What was
// compiled last (the base) stays as it is while changes gather beside it in a
// small overlay, so that a delta costs what the delta and the overlay weigh, and
// never what the base does; Fold makes the two one again before the overlay is
// large. It belongs to one goroutine.
type Store struct {
	base    *block
	classes *classes
	four    rows[int] // the overlay
	six     rows[string]
	recent  *block         // the overlay, compiled
	gone    []int          // sorted rows of base that no longer count
	scoped  map[int]Scoped // countries and autonomous systems
	doubts  int            // full pulls in a row that lacked something
	missed  []int          // sorted ids that the last of them lacked
}

// NewStore returns an empty store.
func NewStore() *Store {
	return &Store{
		base:    compile(rows[int]{}, rows[string]{}),
		classes: newClasses(),
		scoped:  map[int]Scoped{},
	}
}

// Resume returns a store that begins with what a table of another store holds.
func Resume(t *Table) *Store {
	s := NewStore()
	s.base = t.base
	s.gone = t.gone
	s.recent = t.recent
	for _, c := range t.classes {
		classOf(s.classes, c.Type, c.Origin, c.Scenario)
	}
	b := t.recent
	if b == nil {
		return s
	}
	for node, key := range b.key4 {
		for row := b.first[node]; row < b.first[node+1]; row++ {
			s.four.key = append(s.four.key, key)
			s.four.id = append(s.four.id, b.id[row])
			s.four.until = append(s.four.until, b.until[row])
			s.four.class = append(s.four.class, b.class[row])
		}
	}
	n4 := len(b.key4)
	for i, key := range b.key6 {
		for row := b.first[n4+i]; row < b.first[n4+i+1]; row++ {
			s.six.key = append(s.six.key, key)
			s.six.id = append(s.six.id, b.id[row])
			s.six.until = append(s.six.until, b.until[row])
			s.six.class = append(s.six.class, b.class[row])
		}
	}
	return s
}

// NewDelta returns a delta to be filled with the rows of one LAPI answer that
// was written at the given time. A full one describes the whole picture.
func (s *Store) NewDelta(full bool, at time.Time) *Delta {
	d := &Delta{Full: full, Skipped: map[string]int{}, at: int(at.UnixNano()), classes: s.classes}
	if full {
		d.classes = newClasses()
	}
	return d
}

// Outcome says what Apply made of a delta.
type Outcome struct {
	// Doubt is true where a full pull lacked live decisions that the store
	// holds: what it had was taken in, but nothing was deleted because of it.
	// Pull again, a little later.
	Doubt bool
	// Had and Got are the live decisions before a full pull and in it, Missing
	// those that it lacked.
	Had, Got, Missing int
}

// Apply takes a delta in: deletions first, then additions, by decision id; an
// id that is already held is replaced, so applying a delta twice changes
// nothing. A full delta replaces everything if it lacks nothing that is held and
// live. Deletions come by deltas, so what a full pull lacks is doubtful: LAPI
// can end an answer early and well-formed. It counts as deleted when two full
// pulls in a row lack it; three, where more than half of everything is missing
// or where the answer had rows that could not be read.
func (s *Store) Apply(d *Delta, now time.Time) Outcome {
	d.four, d.six = distinct(d.four, d.six)
	if d.Full {
		return s.replace(d, now)
	}
	s.merge(d, now)
	return Outcome{}
}

func (s *Store) replace(d *Delta, now time.Time) Outcome {
	s.keep(d, now)
	out := Outcome{Had: s.live(now), Got: d.Len()}
	s.carry(d)
	base := compile(d.four, d.six)
	missing := s.lacks(base, now)
	out.Missing = len(missing)
	if len(missing) == 0 {
		s.doubts = 0
	} else {
		if s.doubts > 0 && !within(missing, s.missed) {
			s.doubts = 0
		}
		s.doubts++
		needed := 2
		if d.lost || len(missing) > out.Had/2 {
			needed = 3
		}
		if s.doubts < needed {
			s.missed = missing
			s.adopt(d)
			s.merge(d, now)
			out.Doubt = true
			return out
		}
	}
	s.doubts = 0
	s.missed = nil
	s.classes = d.classes
	s.base = base
	s.four = rows[int]{}
	s.six = rows[string]{}
	s.recent = nil
	s.gone = nil
	s.scoped = map[int]Scoped{}
	for _, sc := range d.scoped {
		s.scoped[sc.ID] = sc
	}
	return out
}

// keep adds to a full delta what the store knows of the decisions that the delta
// names without making sense.
func (s *Store) keep(d *Delta, now time.Time) {
	at := int(now.UnixNano())
	t := s.Compile()
	for _, id := range d.obscure {
		b := t.recent
		row := -1
		if b != nil {
			row = rowOf(b, id)
		}
		if row < 0 {
			b = t.base
			row = rowOf(b, id)
			if row >= 0 && has(t.gone, row) {
				row = -1
			}
		}
		if row < 0 || b.until[row] <= at {
			continue
		}
		c := t.classes[b.class[row]]
		class := classOf(d.classes, c.Type, c.Origin, c.Scenario)
		node := nodeOfRow(b, row)
		if node < len(b.key4) {
			d.four.key = append(d.four.key, b.key4[node])
			d.four.id = append(d.four.id, id)
			d.four.until = append(d.four.until, b.until[row])
			d.four.class = append(d.four.class, class)
			continue
		}
		d.six.key = append(d.six.key, b.key6[node-len(b.key4)])
		d.six.id = append(d.six.id, id)
		d.six.until = append(d.six.until, b.until[row])
		d.six.class = append(d.six.class, class)
	}
	d.four, d.six = distinct(d.four, d.six)
}

// lacks returns the sorted ids of LAPI's live decisions that the store holds and
// b does not.
func (s *Store) lacks(b *block, now time.Time) []int {
	at := int(now.UnixNano())
	var missing []int
	j := 0
	for i, id := range s.base.ids {
		if id >= FirstLocal {
			break
		}
		for j < len(b.ids) && b.ids[j] < id {
			j++
		}
		if j < len(b.ids) && b.ids[j] == id {
			continue
		}
		row := int(s.base.idRow[i])
		if s.base.until[row] > at && !has(s.gone, row) {
			missing = append(missing, id)
		}
	}
	for i, id := range s.four.id {
		if s.four.until[i] > at && id < FirstLocal && rowOf(b, id) < 0 {
			missing = append(missing, id)
		}
	}
	for i, id := range s.six.id {
		if s.six.until[i] > at && id < FirstLocal && rowOf(b, id) < 0 {
			missing = append(missing, id)
		}
	}
	sort.Ints(missing)
	return missing
}

// within reports whether each of the sorted numbers a is among b's.
func within(a, b []int) bool {
	for _, n := range a {
		if !has(b, n) {
			return false
		}
	}
	return true
}

// adopt renumbers the classes of a full delta to those of the store.
func (s *Store) adopt(d *Delta) {
	number := make([]int32, len(d.classes.list))
	for i, c := range d.classes.list {
		number[i] = classOf(s.classes, c.Type, c.Origin, c.Scenario)
	}
	for i, c := range d.four.class {
		d.four.class[i] = number[c]
	}
	for i, c := range d.six.class {
		d.six.class[i] = number[c]
	}
	d.classes = s.classes
}

func (s *Store) merge(d *Delta, now time.Time) {
	drop := make(map[int]bool, len(d.gone)+d.Len())
	for _, id := range d.gone {
		drop[id] = true
		delete(s.scoped, id)
	}
	var gone []int
	for id := range drop {
		if row := rowOf(s.base, id); row >= 0 {
			gone = append(gone, row)
		}
	}
	var four rows[int]
	var six rows[string]
	for i, id := range d.four.id {
		row := rowOf(s.base, id)
		if row >= 0 && !drop[id] && !has(s.gone, row) && same(s.base, row, d.four.key[i], "", d.four.class[i], d.four.until[i]) {
			continue
		}
		if row >= 0 && !drop[id] {
			gone = append(gone, row)
		}
		drop[id] = true
		four.key = append(four.key, d.four.key[i])
		four.id = append(four.id, id)
		four.until = append(four.until, d.four.until[i])
		four.class = append(four.class, d.four.class[i])
	}
	for i, id := range d.six.id {
		row := rowOf(s.base, id)
		if row >= 0 && !drop[id] && !has(s.gone, row) && same(s.base, row, -1, d.six.key[i], d.six.class[i], d.six.until[i]) {
			continue
		}
		if row >= 0 && !drop[id] {
			gone = append(gone, row)
		}
		drop[id] = true
		six.key = append(six.key, d.six.key[i])
		six.id = append(six.id, id)
		six.until = append(six.until, d.six.until[i])
		six.class = append(six.class, d.six.class[i])
	}
	for _, sc := range d.scoped {
		s.scoped[sc.ID] = sc
	}
	if len(drop) == 0 {
		return
	}
	s.gone = union(s.gone, gone)
	at := int(now.UnixNano())
	s.four = joined[int](s.four, four, drop, at)
	s.six = joined[string](s.six, six, drop, at)
	s.recent = nil
	if len(s.four.id)+len(s.six.id) > 0 {
		s.recent = compile(s.four, s.six)
	}
}

// roomFor returns no rows, with room for n.
func roomFor[K int | string](n int) rows[K] {
	var out rows[K]
	out.key = make([]K, 0, n)
	out.id = make([]int, 0, n)
	out.until = make([]int, 0, n)
	out.class = make([]int32, 0, n)
	return out
}

// joined returns the rows of old that are still wanted, followed by added.
func joined[K int | string](old, added rows[K], drop map[int]bool, at int) rows[K] {
	var out rows[K]
	for i, id := range old.id {
		if drop[id] || old.until[i] <= at {
			continue
		}
		out.key = append(out.key, old.key[i])
		out.id = append(out.id, id)
		out.until = append(out.until, old.until[i])
		out.class = append(out.class, old.class[i])
	}
	out.key = append(out.key, added.key...)
	out.id = append(out.id, added.id...)
	out.until = append(out.until, added.until...)
	out.class = append(out.class, added.class...)
	return out
}

// union returns the sorted numbers of old and added, each once. Readers may
// still hold old, so it is left alone.
func union(old, added []int) []int {
	if len(added) == 0 {
		return old
	}
	all := make([]int, 0, len(old)+len(added))
	all = append(all, old...)
	all = append(all, added...)
	sort.Ints(all)
	out := all[:0]
	for i, n := range all {
		if i == 0 || n != all[i-1] {
			out = append(out, n)
		}
	}
	return out
}

// has reports whether a sorted list holds n.
func has(sorted []int, n int) bool {
	i := sort.SearchInts(sorted, n)
	return i < len(sorted) && sorted[i] == n
}

// live counts LAPI's unexpired decisions on addresses.
func (s *Store) live(now time.Time) int {
	at := int(now.UnixNano())
	n := 0
	for row, until := range s.base.until {
		if until > at && s.base.id[row] < FirstLocal {
			n++
		}
	}
	for _, row := range s.gone {
		if s.base.until[row] > at && s.base.id[row] < FirstLocal {
			n--
		}
	}
	for i, until := range s.four.until {
		if until > at && s.four.id[i] < FirstLocal {
			n++
		}
	}
	for i, until := range s.six.until {
		if until > at && s.six.id[i] < FirstLocal {
			n++
		}
	}
	return n
}

// Compile returns the table of what the store holds now. It shares what has
// not changed with the tables before it and costs next to nothing.
func (s *Store) Compile() *Table {
	return &Table{base: s.base, recent: s.recent, gone: s.gone, classes: s.classes.list, numbers: s.classes}
}

// Due reports whether the overlay has grown enough for Fold to pay.
func (s *Store) Due() bool {
	limit := 1024 + len(s.base.id)/128
	return len(s.four.id)+len(s.six.id) > limit || len(s.gone) > limit+len(s.base.id)/16
}

// Fold compiles base and overlay into a new base, leaving out what has expired
// by now. It costs what the whole store weighs, so it is for a quiet moment,
// after the table that Compile gave has been put to use.
func (s *Store) Fold(now time.Time) {
	at := int(now.UnixNano())
	b := s.base
	n4 := len(b.key4)
	six4 := int(b.first[n4]) // the first row of IPv6
	dead := make([]bool, len(b.id))
	for _, row := range s.gone {
		dead[row] = true
	}
	live4, live6 := 0, 0
	for row, until := range b.until {
		if dead[row] || until <= at {
			dead[row] = true
		} else if row < six4 {
			live4++
		} else {
			live6++
		}
	}
	// As large as they will be from the start: what grows leaves behind as much
	// as it is.
	four := roomFor[int](live4 + len(s.four.id))
	six := roomFor[string](live6 + len(s.six.id))
	for node, key := range b.key4 {
		if node&255 == 0 {
			runtime.Gosched()
		}
		for row := b.first[node]; row < b.first[node+1]; row++ {
			if !dead[row] {
				four.key = append(four.key, key)
				four.id = append(four.id, b.id[row])
				four.until = append(four.until, b.until[row])
				four.class = append(four.class, b.class[row])
			}
		}
	}
	for i, key := range b.key6 {
		if i&255 == 0 {
			runtime.Gosched()
		}
		for row := b.first[n4+i]; row < b.first[n4+i+1]; row++ {
			if !dead[row] {
				six.key = append(six.key, key)
				six.id = append(six.id, b.id[row])
				six.until = append(six.until, b.until[row])
				six.class = append(six.class, b.class[row])
			}
		}
	}
	for i, id := range s.four.id {
		if s.four.until[i] > at {
			four.key = append(four.key, s.four.key[i])
			four.id = append(four.id, id)
			four.until = append(four.until, s.four.until[i])
			four.class = append(four.class, s.four.class[i])
		}
	}
	for i, id := range s.six.id {
		if s.six.until[i] > at {
			six.key = append(six.key, s.six.key[i])
			six.id = append(six.id, id)
			six.until = append(six.until, s.six.until[i])
			six.class = append(six.class, s.six.class[i])
		}
	}
	s.base = compile(four, six)
	s.four = rows[int]{}
	s.six = rows[string]{}
	s.recent = nil
	s.gone = nil
	for id, sc := range s.scoped {
		if !sc.Until.After(now) {
			delete(s.scoped, id)
		}
	}
}

// Scoped returns the live decisions on countries and autonomous systems, in
// the order of their ids.
func (s *Store) Scoped(now time.Time) []Scoped {
	ids := make([]int, 0, len(s.scoped))
	for id, sc := range s.scoped {
		if sc.Until.After(now) {
			ids = append(ids, id)
		}
	}
	sort.Ints(ids)
	out := make([]Scoped, len(ids))
	for i, id := range ids {
		out[i] = s.scoped[id]
	}
	return out
}

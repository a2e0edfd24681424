package bouncer

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/edgeward/edgeward/internal/decision"
	"github.com/edgeward/edgeward/internal/nft"
)

// write gathers what one transaction writes.
type write struct {
	e       *enforcer
	r       *reading
	now     time.Time
	changes nft.Changes
	regions []netip.Prefix // in which e.ranges or e.trimmed changed
	aside   bool           // e.aside changed
	slack   time.Duration
}

func (e *enforcer) begin(r *reading, now time.Time) *write { return &write{e: e, r: r, now: now} }

// put makes p be held as h says, or not at all.
func (w *write) put(p netip.Prefix, h decision.Held, held bool) {
	e := w.e
	if watched := w.r.watched.meets(p); held && watched {
		w.aside = w.aside || !e.aside[p]
		e.aside[p] = true
	} else if e.aside[p] {
		w.aside = true
		delete(e.aside, p)
	}
	delete(e.turning, p)
	if p.IsSingleIP() {
		some := false
		if held {
			w.r.place(h, w.now, func(h decision.Held) {
				some = true
				e.turns(p, h)
				w.changes.Put = append(w.changes.Put, e.element(h, w.now))
			})
		}
		if !some {
			w.changes.Delete = append(w.changes.Delete, p.Addr())
		}
		return
	}
	w.regions = append(w.regions, e.region(p))
	e.forget(p)
	if held {
		e.keep(w.r, h, w.now)
	}
}

// commit writes what was put. Where the kernel does not take it, all of it is to
// be installed again.
func (w *write) commit() error {
	e := w.e
	if len(w.regions) > 0 {
		drop, put := e.relay(w.regions, w.now, w.slack)
		for _, s := range drop {
			w.changes.DeleteRanges = append(w.changes.DeleteRanges, e.rangeOf(s, w.now))
		}
		for _, s := range put {
			w.changes.PutRanges = append(w.changes.PutRanges, e.rangeOf(s, w.now))
		}
	}
	if w.aside {
		e.tellCovering(w.r, w.now)
	}
	if w.changes.Empty() {
		return nil
	}
	if len(w.changes.Put)+len(w.changes.PutRanges) > 0 {
		w.changes.Classes = e.classes // after rangeOf and element have numbered them
	}
	start := time.Now()
	err := e.kernel.Update(w.changes)
	took := time.Since(start)
	e.held = -1
	e.note(func(r *report) {
		r.Updates++
		r.LastWrite, r.LastTook, r.Err = w.now, took, err
		r.Installed = err == nil
	})
	if err != nil {
		e.installed = false
		e.note(func(r *report) { r.Failures++ })
		return fmt.Errorf("write bans to the kernel: %w", err)
	}
	if have, err := e.kernel.Read(); err == nil { // else the next look says so
		e.note(func(r *report) { r.Have = have })
	}
	e.log.Info("bans written", "added", len(w.changes.Put), "removed", len(w.changes.Delete),
		"rangesAdded", len(w.changes.PutRanges), "rangesRemoved", len(w.changes.DeleteRanges), "took", took.Round(time.Microsecond).String())
	return nil
}

// install has the kernel replace what it enforces by a new generation.
func (e *enforcer) install(why string) error {
	if e.stoodDown {
		return nil
	}
	r := e.reading.Load()
	now := e.now()
	e.ranges, e.trimmed, e.aside = nil, map[netip.Prefix][]decision.Held{}, map[netip.Prefix]bool{}
	e.turning, e.due = map[netip.Prefix]time.Time{}, time.Time{}
	singles := 0
	r.all.Walk(r.table, now, func(h decision.Held) bool {
		p := h.Prefix
		if r.watched.meets(p) {
			e.aside[p] = true
			r.place(h, now, func(h decision.Held) { e.mark(h.Class, h.Remediation); e.turns(p, h) })
		}
		if p.IsSingleIP() {
			singles++
			e.turns(p, h)
			e.mark(h.Class, h.Remediation)
			return true
		}
		e.keep(r, h, now)
		return true
	})
	e.spans = e.lay(nil, now)
	for _, s := range e.spans {
		e.mark(s.class, s.class.Remediation)
	}
	content := nft.Content{
		Classes:   e.classes,
		Protected: prefixesOf(r.protected),
		Size:      singles,
		Waivers:   e.orders.Load().live(now).waivers(now),
		Elements: func(yield func(nft.Element) bool) {
			r.all.Walk(r.table, now, func(h decision.Held) bool {
				more := true
				if h.Prefix.IsSingleIP() {
					r.place(h, now, func(h decision.Held) { more = more && yield(e.element(h, now)) })
				}
				return more
			})
		},
		Ranges: func(yield func(nft.Range) bool) {
			for _, s := range e.spans {
				if !yield(e.rangeOf(s, now)) {
					return
				}
			}
		},
	}
	start := time.Now()
	e.lent = time.Time{}
	err := e.kernel.Install(e.rules, content)
	took := time.Since(start)
	e.installed = err == nil
	e.ever = e.ever || e.installed
	e.held = -1
	e.deep, e.synced = now, now
	have := nft.Have{}
	if err == nil {
		have, err = e.kernel.Read()
	}
	e.note(func(r *report) {
		r.Installs++
		r.LastWrite, r.LastTook, r.Err = now, took, err
		r.Installed = e.installed
		if err != nil {
			r.Failures++
			return
		}
		r.Have, r.Looked = have, now
	})
	if err != nil {
		return fmt.Errorf("install bans in the kernel: %w", err)
	}
	e.log.Info("bans installed", "why", why, "mode", string(e.config.Mode), "bans", singles, "ranges", len(e.spans),
		"generation", have.Generation, "took", took.Round(time.Microsecond).String())
	e.tellCovering(r, now)
	return nil
}

// turns notes when p has to be put again, as h, which is p or a piece of it,
// then is of another class.
func (e *enforcer) turns(p netip.Prefix, h decision.Held) {
	if !h.ClassUntil.Before(h.Until) {
		return
	}
	if at, ok := e.turning[p]; !ok || h.ClassUntil.Before(at) {
		e.turning[p] = h.ClassUntil
	}
	e.dueBy(h.ClassUntil)
}

func (e *enforcer) dueBy(at time.Time) {
	if e.due.IsZero() || at.Before(e.due) {
		e.due = at
	}
}

// turn writes what time alone changes: ranges that ended are deleted, and what
// goes on under a weaker decision after the strongest has ended becomes of that
// one's class. After a jump of the clock nobody knows what has ended; the kernel
// does, by a clock that does not jump, and a full pull is on its way.
func (e *enforcer) turn(now time.Time) error {
	if e.jumped || e.due.IsZero() || e.due.After(now) {
		return nil
	}
	e.due = time.Time{}
	r := e.reading.Load()
	w := e.begin(r, now)
	var again []netip.Prefix
	for p, at := range e.turning {
		if at.After(now) {
			e.dueBy(at)
		} else {
			again = append(again, p)
		}
	}
	for _, s := range e.spans {
		if s.turns.After(now) {
			e.dueBy(s.turns)
		} else {
			w.regions = append(w.regions, e.region(single(s.from)))
		}
	}
	if moves := len(again) + len(w.regions); moves > many || moves*len(e.ranges) > manyMoves {
		return e.install("many decisions ended")
	}
	for _, p := range again {
		h, held := r.all.Exactly(r.table, p, now)
		w.put(p, h, held)
	}
	return w.commit()
}

// next is when time alone is to change something next; zero if it is not.
func (e *enforcer) next() time.Time {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.installed || e.jumped {
		return time.Time{}
	}
	return e.due
}

// mark returns the kernel's number of a class, which is its remediation and
// origin.
func (e *enforcer) mark(c decision.Class, means decision.Remediation) uint32 {
	if m, ok := e.memo[c]; ok {
		return m
	}
	if means == decision.Unknown {
		means, _ = decision.ParseFallback(string(e.config.Decisions.Fallback))
	}
	name := means.Name() + "/" + originOf(c)
	m, ok := e.marks[name]
	if !ok {
		m = uint32(len(e.classes) + 1)
		e.marks[name] = m
		e.classes = append(e.classes, nft.Class{Mark: m, Name: name})
	}
	e.memo[c] = m
	return m
}

func (e *enforcer) element(h decision.Held, now time.Time) nft.Element {
	return nft.Element{Addr: h.Prefix.Addr(), Class: e.mark(h.Class, h.Remediation), Timeout: e.timeout(h.Until, now)}
}

func (e *enforcer) rangeOf(s span, now time.Time) nft.Range {
	left := e.timeout(s.until, now)
	if s.until.Before(decision.Forever) && left < nft.Forever-linger {
		left += linger
	}
	return nft.Range{From: s.from, To: s.to, Class: e.mark(s.class, s.class.Remediation), Timeout: left}
}

// linger is how much longer than it should the kernel holds a range, if nobody
// deletes it. An interval map with something in it that has timed out can only be
// written again as a whole (see nft.Changes), so the agent is to be first.
const linger = 5 * time.Second

// lease is how long the kernel holds at a time what has no end. It is renewed
// while the agent lives, half of it before it runs out.
const lease = 24 * time.Hour

// timeout is how long the kernel is to hold what ends at until.
func (e *enforcer) timeout(until, now time.Time) time.Duration {
	if until.Before(decision.Forever) {
		return until.Sub(now)
	}
	if e.lent.IsZero() {
		e.lent = now
	}
	return lease
}

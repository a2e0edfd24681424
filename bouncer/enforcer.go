package bouncer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/edgeward/edgeward/internal/decision"
	"github.com/edgeward/edgeward/internal/nft"
)

// kernel is what an enforcer needs of internal/nft; *nft.Conn is one, and the
// tests have another.
type kernel interface {
	Read() (nft.Have, error)
	Install(nft.Config, nft.Content) error
	Update(nft.Changes) error
	Sample([]netip.Addr) ([]nft.Found, error)
	Counters() ([]nft.Counter, error)
	Bypasses(exempt []string) ([]nft.Bypass, error)
	Watch(context.Context) (<-chan nft.Event, error)
	Waive(nft.Waivers) error
	Remove() error
}

var _ kernel = (*nft.Conn)(nil)

// reading is a table and how it is read here. It never changes.
type reading struct {
	table     *decision.Table
	all       *decision.View // what the kernel enforces
	local     *decision.View // that, without what others decided
	protected []Protected
	guarded   zone // of protected
	private   zone // where only local decisions count
	watched   zone // both

	// What the auth endpoint refuses, and that without what others decided.
	refused, refusedLocal *decision.View
}

// place calls visit for what the kernel is to hold because h is held: h itself,
// nothing where all of it is protected, or, where it reaches into private
// ranges, its pieces as far as they count. What is protected within a wider
// range the kernel lets pass by its own list.
func (r *reading) place(h decision.Held, now time.Time, visit func(decision.Held)) {
	if !r.watched.meets(h.Prefix) {
		visit(h)
		return
	}
	if r.guarded.holds(h.Prefix) {
		return
	}
	local, some := r.local.Exactly(r.table, h.Prefix, now)
	if some && local == h {
		visit(h)
		return
	}
	r.private.divide(h.Prefix, func(piece netip.Prefix, inside bool) {
		part := h
		if inside {
			if !some {
				return
			}
			part = local
		}
		part.Prefix = piece
		visit(part)
	})
}

// enforcer keeps the kernel in step with a table. Its methods may be called from
// several goroutines; those that write take turns.
type enforcer struct {
	kernel kernel
	config *Config
	rules  nft.Config
	now    func() time.Time
	log    *slog.Logger

	reading  atomic.Pointer[reading]
	covering atomic.Pointer[[]Covered]
	orders   atomic.Pointer[Orders]
	known    atomic.Bool // reading is what LAPI, a snapshot or the lists said

	mu        sync.Mutex // held by whoever writes to the kernel
	installed bool       // the kernel holds reading, as far as we know
	ever      bool       // it did at some time
	fed       bool       // reading is what LAPI or a snapshot said
	keepUntil time.Time  // until then a predecessor's generation stays
	ranges    []decision.Held
	trimmed   map[netip.Prefix][]decision.Held // ranges of which not all counts, by decision
	spans     []span                           // as the kernel holds ranges and trimmed
	turning   map[netip.Prefix]time.Time       // held prefixes whose class ends before the last ban on them
	due       time.Time                        // when the next of turning or spans turns or ends; zero if none does
	aside     map[netip.Prefix]bool            // held prefixes that meet watched
	marks     map[string]uint32
	memo      map[decision.Class]uint32
	classes   []nft.Class
	synced    time.Time // when the kernel was last compared with a whole table
	deep      time.Time // when it was last looked at closely
	looked    time.Time // when it was last looked at
	jumped    bool      // the clock jumped, and no full pull has come since
	held      int       // elements and ranges at the last look, -1 if not known
	lent      time.Time // when the oldest lease began, zero: there is none
	told      time.Time // when interference was last logged
	probed    time.Time // when a test ban was last written
	stoodDown bool      // the operator asked for cleanup

	state  sync.Mutex
	event  *nft.Event // that was not answered yet
	report report
}

// report is how the enforcer stands.
type report struct {
	Have      nft.Have
	Installed bool // our generation, and nothing since said that it is not whole
	Fed       bool
	StoodDown bool
	Looked    time.Time
	Err       error // of the last write or look

	Installs, Updates, Failures uint64
	Repairs, Interference       uint64
	LastWrite                   time.Time
	LastTook                    time.Duration
}

// Covered is a decision that covers protected addresses, which usually means
// that CrowdSec is told wrong client addresses.
type Covered struct {
	Prefix   netip.Prefix `json:"prefix"`
	Origin   string       `json:"origin"`
	Scenario string       `json:"scenario"`
	Protects string       `json:"protects"`
}

func newEnforcer(k kernel, c *Config, now func() time.Time, log *slog.Logger) *enforcer {
	e := &enforcer{
		kernel: k, config: c, rules: c.nft(), now: now, log: log.With("component", "enforcer"),
		marks: map[string]uint32{}, memo: map[decision.Class]uint32{}, held: -1,
		turning: map[netip.Prefix]time.Time{},
	}
	r := e.read(&reading{}, decision.NewStore().Compile())
	if c.Protect.Private {
		private, _ := decision.Known("private")
		r.private = zoneOf(private)
		r.watched = r.private
	}
	e.reading.Store(r)
	e.covering.Store(&[]Covered{})
	e.orders.Store(&Orders{})
	return e
}

// read returns r with another table.
func (e *enforcer) read(r *reading, t *decision.Table) *reading {
	next := *r
	next.table = t
	if r.all == nil || !r.all.Reads(t) {
		next.all = decision.NewView(t, e.config.policy(false))
		next.local = decision.NewView(t, e.config.policy(true))
		next.refused = decision.NewView(t, e.config.policyFor(e.config.Auth.Remediations, false))
		next.refusedLocal = decision.NewView(t, e.config.policyFor(e.config.Auth.Remediations, true))
	}
	return &next
}

// start looks at what a predecessor left. What it enforces stays, until LAPI has
// answered or the patience with it is over.
func (e *enforcer) start() error {
	have, err := e.kernel.Read()
	if err != nil {
		return fmt.Errorf("read what the kernel holds: %w", err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.note(func(r *report) { r.Have = have })
	if have.Enforcing {
		e.keepUntil = e.now().Add(patience)
		e.log.Info("a predecessor's bans are enforced, keeping them", "generation", have.Generation,
			"bans", have.Bans4+have.Bans6, "ranges", have.Nets4+have.Nets6, "sameRules", have.Layout == e.rules.Layout())
	}
	return nil
}

// recall takes the table of a snapshot. It counts until follow brings better.
func (e *enforcer) recall(t *decision.Table) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.reading.Store(e.read(e.reading.Load(), t))
	e.fed = true
	e.known.Store(true)
	e.note(func(r *report) { r.Fed = true })
}

// join is follow for local decisions: alone they are no reason to replace what a
// predecessor enforces, which may hold LAPI's bans besides. Until there is a
// better one they wait, or go in with the next look where nothing is enforced.
func (e *enforcer) join(t *decision.Table, touched []netip.Prefix, full bool) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.installed {
		e.reading.Store(e.read(e.reading.Load(), t))
		return nil
	}
	return e.bring(t, touched, full)
}

// follow makes the kernel hold t instead of the table before. touched are the
// prefixes on which they may differ; with full, all are compared.
func (e *enforcer) follow(t *decision.Table, touched []netip.Prefix, full bool) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.fed = true
	e.known.Store(true)
	e.note(func(r *report) { r.Fed = true })
	if full {
		e.jumped, e.looked = false, e.now()
	}
	return e.bring(t, touched, full)
}

// bring makes the kernel hold t.
func (e *enforcer) bring(t *decision.Table, touched []netip.Prefix, full bool) error {
	old := e.reading.Load()
	r := e.read(old, t)
	e.reading.Store(r)
	defer e.review() // with what follows written
	now := e.now()
	if full {
		clear(e.memo) // of classes that may be gone
	}
	if !e.installed {
		return e.install("decisions arrived")
	}
	var changes []decision.Change
	moved := 0 // ranges, each of which moves those behind it
	if full {
		// What ended since the last comparison has to be said, because the
		// kernel may hold it under the class of a decision that is gone.
		decision.EachChange(old.all, old.table, e.synced, r.all, r.table, now, slack, func(c decision.Change) bool {
			changes = append(changes, c)
			if !c.Prefix.IsSingleIP() {
				moved++
			}
			return len(changes) <= many
		})
	}
	for _, p := range touched {
		if !p.IsSingleIP() {
			moved++
		}
	}
	if len(changes) > many || len(touched) > many+t.Len()/4 || moved*(len(e.ranges)+moved) > manyMoves {
		return e.install("many decisions changed")
	}
	w := e.begin(r, now)
	if full {
		done := map[netip.Prefix]bool{}
		for p := range e.aside {
			// Of these the views differ, and changes tells of one alone.
			done[p] = true
		}
		for p := range done {
			h, held := r.all.Exactly(r.table, p, now)
			w.put(p, h, held)
		}
		for _, c := range changes {
			if !done[c.Prefix] {
				w.put(c.Prefix, c.Held, !c.Gone)
			}
		}
		w.slack = slack
		e.synced = now
	}
	for _, p := range touched {
		h, held := r.all.Exactly(r.table, p, now)
		w.put(p, h, held)
	}
	return w.commit()
}

// many is more changes than one transaction should gather in memory: an install
// streams.
const many = 20_000

// manyMoves is more than to lay out all ranges anew costs.
const manyMoves = 10_000_000

// slack is how far two answers of LAPI may differ on when the same decision ends.
const slack = 2 * time.Second

// swap replaces the table by one that says the same.
func (e *enforcer) swap(t *decision.Table) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.reading.Store(e.read(e.reading.Load(), t))
}

// protect replaces the protected prefixes.
func (e *enforcer) protect(list []Protected) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	old := e.reading.Load()
	if slices.Equal(old.protected, list) {
		return nil
	}
	r := *old
	r.protected = list
	r.guarded = zoneOf(prefixesOf(list))
	r.watched = r.guarded
	if e.config.Protect.Private {
		private, _ := decision.Known("private")
		r.watched = zoneOf(slices.Concat(prefixesOf(list), private))
	}
	e.reading.Store(&r)
	if !e.installed {
		return nil
	}
	e.log.Info("protected addresses changed", "count", len(list))
	now := e.now()
	w := e.begin(&r, now)
	w.changes.Protected = prefixesOf(list)
	var again []netip.Prefix
	for p := range e.aside {
		again = append(again, p)
	}
	r.all.Walk(r.table, now, func(h decision.Held) bool {
		if !e.aside[h.Prefix] && r.watched.meets(h.Prefix) {
			again = append(again, h.Prefix)
		}
		return true
	})
	for _, p := range again {
		h, held := r.all.Exactly(r.table, p, now)
		w.put(p, h, held)
	}
	return w.commit()
}

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

// forget takes the range p out of what is laid out.
func (e *enforcer) forget(p netip.Prefix) {
	delete(e.trimmed, p)
	if i, ok := slices.BinarySearchFunc(e.ranges, p, func(h decision.Held, p netip.Prefix) int { return comparePrefixes(h.Prefix, p) }); ok {
		e.ranges = slices.Delete(e.ranges, i, i+1)
	}
}

// keep puts a range into what is laid out.
func (e *enforcer) keep(r *reading, h decision.Held, now time.Time) {
	var pieces []decision.Held
	r.place(h, now, func(piece decision.Held) {
		pieces = append(pieces, piece)
		e.turns(h.Prefix, piece)
	})
	if len(pieces) == 1 && pieces[0].Prefix == h.Prefix {
		i, _ := slices.BinarySearchFunc(e.ranges, h.Prefix, func(h decision.Held, p netip.Prefix) int { return comparePrefixes(h.Prefix, p) })
		e.ranges = slices.Insert(e.ranges, i, pieces[0])
	} else if len(pieces) > 0 {
		e.trimmed[h.Prefix] = pieces
	}
}

// region returns the outermost of what is laid out that encloses p, or p itself.
// A change of p changes no span outside of it.
func (e *enforcer) region(p netip.Prefix) netip.Prefix {
	out := p
	for bits := range p.Bits() {
		outer, _ := p.Addr().Prefix(bits)
		_, found := slices.BinarySearchFunc(e.ranges, outer, func(h decision.Held, p netip.Prefix) int { return comparePrefixes(h.Prefix, p) })
		if found {
			out = outer
			break
		}
	}
	for whole := range e.trimmed {
		if whole.Bits() < out.Bits() && whole.Contains(out.Addr()) {
			out = whole
		}
	}
	return out
}

// few is up to how many regions are laid out one by one.
const few = 64

// relay lays regions out anew, drops what has ended in them, and returns which
// spans are to be deleted and which put. What a single change costs does not
// depend on how many ranges there are, but for moving spans about in memory.
func (e *enforcer) relay(regions []netip.Prefix, now time.Time, slack time.Duration) (drop, put []span) {
	zones := zoneOf(regions)
	if len(zones) > few {
		spans := e.lay(nil, now)
		drop, put = difference(e.spans, spans, slack)
		e.spans = spans
		return drop, put
	}
	for i := range zones {
		z := &zones[i]
		from, _ := slices.BinarySearchFunc(e.spans, z.from, func(s span, a netip.Addr) int { return s.from.Compare(a) })
		to := from
		for to < len(e.spans) && !z.to.Less(e.spans[to].from) {
			to++
		}
		spans := e.lay(z, now)
		d, p := difference(e.spans[from:to], spans, slack)
		drop, put = append(drop, d...), append(put, p...)
		e.spans = slices.Replace(e.spans, from, to, spans...)
	}
	return drop, put
}

// lay lays the ranges within z, or all of them, out as the kernel is to hold
// them, and drops those that have ended.
func (e *enforcer) lay(z *stretch, now time.Time) []span {
	from, to := 0, len(e.ranges)
	if z != nil {
		begins := func(h decision.Held, a netip.Addr) int { return h.Prefix.Addr().Compare(a) }
		from, _ = slices.BinarySearchFunc(e.ranges, z.from, begins)
		for to = from; to < len(e.ranges) && !z.to.Less(e.ranges[to].Prefix.Addr()); {
			to++
		}
	}
	ended := func(h decision.Held) bool { return !h.Until.After(now) }
	if slices.ContainsFunc(e.ranges[from:to], ended) {
		live := slices.DeleteFunc(slices.Clone(e.ranges[from:to]), ended)
		e.ranges = slices.Replace(e.ranges, from, to, live...)
		to = from + len(live)
	}
	all := e.ranges[from:to]
	if len(e.trimmed) > 0 {
		all = slices.Clone(all)
		for p, pieces := range e.trimmed {
			if z != nil && (p.Addr().Less(z.from) || z.to.Less(p.Addr())) {
				continue
			}
			pieces = slices.DeleteFunc(pieces, ended)
			if e.trimmed[p] = pieces; len(pieces) == 0 {
				delete(e.trimmed, p)
			}
			all = append(all, pieces...)
		}
		slices.SortFunc(all, func(a, b decision.Held) int { return comparePrefixes(a.Prefix, b.Prefix) })
	}
	spans := spansOf(all)
	for _, s := range spans {
		e.dueBy(s.turns)
	}
	return spans
}

func comparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
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

// linger is how much longer than it should the kernel holds a range, if nobody
// deletes it. An interval map with something in it that has timed out can only be
// written again as a whole (see nft.Changes), so the agent is to be first.
const linger = 5 * time.Second

func (e *enforcer) rangeOf(s span, now time.Time) nft.Range {
	left := e.timeout(s.until, now)
	if s.until.Before(decision.Forever) && left < nft.Forever-linger {
		left += linger
	}
	return nft.Range{From: s.from, To: s.to, Class: e.mark(s.class, s.class.Remediation), Timeout: left}
}

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

// saw takes in that somebody else changed the ruleset of this machine.
func (e *enforcer) saw(ev nft.Event) {
	e.state.Lock()
	defer e.state.Unlock()
	e.event = &ev
}

// How often the kernel is looked at closely: by itself, and where others may
// write to the table and did write to some table.
const (
	deepInterval = 10 * time.Minute
	deepShared   = time.Minute
)

// verify looks at what the kernel holds, and mends it.
func (e *enforcer) verify() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.state.Lock()
	event := e.event
	e.event = nil
	e.state.Unlock()

	have, err := e.kernel.Read()
	if err != nil {
		e.note(func(r *report) { r.Err = err; r.Failures++ })
		return fmt.Errorf("read what the kernel holds: %w", err)
	}
	now := e.now()
	e.note(func(r *report) { r.Have, r.Looked, r.Installed = have, now, e.installed && have.Intact })
	if drift := now.Round(0).Sub(e.looked.Round(0)) - now.Sub(e.looked); !e.looked.IsZero() && (drift > 5*time.Second || drift < -5*time.Second) {
		e.jumped = true
	}
	e.looked = now
	if e.stoodDown {
		return nil
	}
	e.review()
	if e.jumped && e.installed && !e.config.hasLAPI() {
		e.jumped = false // no full pull is on its way
		return e.install("the clock jumped")
	}
	if !e.installed {
		switch {
		case e.ever:
			return e.install("a write had failed")
		case !have.Enforcing:
			return e.install("nothing was enforced")
		case !e.fed || now.Before(e.keepUntil):
			return nil
		}
		return e.install("LAPI does not answer: bans as they were saved")
	}
	if !have.Intact {
		return e.repair(event, "another program changed the table")
	}
	if !e.lent.IsZero() && now.Sub(e.lent) > lease/2 {
		return e.install("what has no end is held for another day")
	}
	if err := e.turn(now); err != nil {
		return err
	}
	total := max(have.Bans4, 0) + max(have.Bans6, 0) + max(have.Nets4, 0) + max(have.Nets6, 0)
	fell := e.held >= 0 && total < e.held-e.held/100-16
	e.held = total
	since := now.Sub(e.deep)
	if since > deepInterval || event != nil && !have.Owner && (since > deepShared || fell) {
		e.deep = now
		if !e.jumped { // what ended, and when, is then anybody's guess
			doubt, err := e.compare(have, now)
			if err != nil {
				e.note(func(r *report) { r.Err = err })
				return err
			}
			if doubt != "" {
				return e.repair(event, doubt)
			}
		}
	}
	e.note(func(r *report) { r.Err = nil })
	return nil
}

// repair installs everything again because somebody interfered.
func (e *enforcer) repair(event *nft.Event, what string) error {
	e.note(func(r *report) { r.Interference++ })
	process, pid := "", uint32(0)
	if event != nil {
		process, pid = event.Process, event.PID
	}
	if now := e.now(); now.Sub(e.told) > deepInterval {
		e.told = now
		e.log.Warn("the kernel does not hold what was written, restoring it", "why", what, "process", process, "pid", pid)
	}
	err := e.install("restored: " + what)
	if err == nil {
		e.note(func(r *report) { r.Repairs++ })
	}
	return err
}

// compare looks closely at what the kernel holds: how many there are, as far as
// what ends about now leaves that open, and some of them one by one. It returns
// what is wrong, if anything is.
func (e *enforcer) compare(have nft.Have, now time.Time) (string, error) {
	const samples = 16
	// What timed out is counted until the kernel collects it.
	uncollected := now.Add(-3 * time.Minute)
	sure := now.Add(slack)
	r := e.reading.Load()
	var least, most [2]int
	var asked []decision.Held
	seen := 0
	family := func(a netip.Addr) int {
		if a.Is4() {
			return 0
		}
		return 1
	}
	r.all.Walk(r.table, uncollected, func(h decision.Held) bool {
		if !h.Prefix.IsSingleIP() {
			return true
		}
		r.place(h, uncollected, func(h decision.Held) {
			f := family(h.Prefix.Addr())
			most[f]++
			if !h.Until.After(sure) {
				return
			}
			least[f]++
			seen++
			if len(asked) < samples {
				asked = append(asked, h)
			} else if i := rand.IntN(seen); i < samples {
				asked[i] = h
			}
		})
		return true
	})
	for f, n := range []int{have.Bans4, have.Bans6} {
		if e.probed.After(uncollected) {
			most[f]++ // a test ban
		}
		if n >= 0 && (n < least[f] || n > most[f]) {
			return fmt.Sprintf("%d addresses of IPv%d are banned there, not %d to %d", n, 4+2*f, least[f], most[f]), nil
		}
	}
	addrs := make([]netip.Addr, 0, samples+8)
	until := make([]time.Time, 0, samples+8)
	for _, h := range asked {
		addrs = append(addrs, h.Prefix.Addr())
		until = append(until, h.Until)
	}
	for range min(8, len(e.spans)) {
		s := e.spans[rand.IntN(len(e.spans))]
		// A single address may be banned for itself, and end otherwise.
		if _, banned := r.all.Exactly(r.table, single(s.from), now); !banned && s.until.After(sure) {
			addrs = append(addrs, s.from)
			until = append(until, s.until)
		}
	}
	if len(addrs) == 0 {
		return "", nil
	}
	found, err := e.kernel.Sample(addrs)
	if errors.Is(err, nft.ErrNotInstalled) {
		return "nothing is enforced", nil
	}
	if err != nil {
		return "", fmt.Errorf("sample what the kernel holds: %w", err)
	}
	for i, f := range found {
		left := until[i].Sub(e.now())
		if !until[i].Before(decision.Forever) {
			left = e.lent.Add(lease).Sub(e.now())
		}
		if !f.Banned() || f.Left < left-10*time.Second {
			return fmt.Sprintf("%v is banned for another %v there, not %v", addrs[i], f.Left.Round(time.Second), left.Round(time.Second)), nil
		}
	}
	return "", nil
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

func (e *enforcer) note(change func(*report)) {
	e.state.Lock()
	defer e.state.Unlock()
	change(&e.report)
}

// stands returns how the enforcer stands. It never waits for the kernel.
func (e *enforcer) stands() report {
	e.state.Lock()
	defer e.state.Unlock()
	return e.report
}

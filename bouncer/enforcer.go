package bouncer

import (
	"context"
	"fmt"
	"log/slog"
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

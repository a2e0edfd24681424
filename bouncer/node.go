package bouncer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/edgeward/edgeward/internal/crowdsec"
	"github.com/edgeward/edgeward/internal/decision"
	"github.com/edgeward/edgeward/internal/lapi"
	"github.com/edgeward/edgeward/internal/nft"
	"github.com/edgeward/edgeward/internal/reconcile"
)

// Bouncer keeps the bans of one node. Make it with New, give its Sink to a
// decision stream, and run it; it is a daemon.Task.
type Bouncer struct {
	config   *Config
	kernel   kernel
	enforcer *enforcer
	guard    *guard
	loop     *reconcile.Loop
	auth     *auth
	log      *slog.Logger
	now      func() time.Time
	began    time.Time

	feeding sync.Mutex // held by whoever changes the store
	store   *decision.Store
	delta   *decision.Delta // the answer of LAPI that is coming in
	row     decision.Row
	local   int // the next local id
	lists   []*list

	listsFed bool          // of the goroutine that follows the lists
	lookedAt sync.Once     // closes looked
	looked   chan struct{} // closed once each list was looked at

	mu      sync.Mutex
	feed    feed
	guarded time.Time // when the guard looked last
	saved   snapshotState
	passing []nft.Bypass // what may carry packets past the ruleset
	trouble string       // why that was not found out, as logged
	serves  []func() error
}

// feed is what is known of LAPI.
type feed struct {
	Pulls, Fulls, Doubts uint64
	Failures             uint64 // pulls that brought nothing
	Last, LastFull       time.Time
	Skipped              map[string]uint64
	Err                  error     // of the last pull
	Failing              time.Time // since when pulls fail, zero: the last came in
	changes              uint64
}

type snapshotState struct {
	At      time.Time
	Rows    int
	Err     error
	changes uint64 // that were in it
}

// How often the kernel is looked at, what is protected is looked up, and, where
// decisions changed, they are saved.
const (
	verifyInterval = 30 * time.Second
	verifyRetry    = 100 * time.Millisecond // at first: nothing may be enforced meanwhile
	guardInterval  = 15 * time.Second
	saveInterval   = 5 * time.Minute
)

// New makes the bouncer of this node, on what the kernel enforces already and
// what the last snapshot says. It changes nothing before Run. getenv is
// os.Getenv.
func New(c Config, k *nft.Conn, getenv func(string) string, log *slog.Logger) (*Bouncer, error) {
	return newBouncer(c, k, newGuard(&c, getenv, log), time.Now, log)
}

func newBouncer(c Config, k kernel, g *guard, now func() time.Time, log *slog.Logger) (*Bouncer, error) {
	b := &Bouncer{
		config: &c, kernel: k, guard: g, log: log.With("component", "bouncer"),
		now: now, began: now(), store: decision.NewStore(),
		feed: feed{Skipped: map[string]uint64{}}, looked: make(chan struct{}),
	}
	b.enforcer = newEnforcer(k, &c, b.now, log)
	orders, err := loadOrders(c.StateDir, b.now())
	if err != nil {
		b.log.Warn("cannot read the operator's orders: none is in force, give them again", "err", err)
	}
	b.enforcer.orders.Store(&orders)
	b.loop = reconcile.New(reconcile.Config{Name: "kernel", Turn: b.turn, Interval: verifyInterval, Limit: 5 * time.Minute, Retry: verifyRetry, Log: log})
	if err := b.enforcer.start(); err != nil {
		return nil, err
	}
	if c.StateDir != "" {
		rows, written, err := loadSnapshot(c.StateDir, b.store, b.now())
		switch {
		case err == nil:
			b.enforcer.recall(b.store.Compile())
			b.log.Info("decisions read from the snapshot", "count", rows, "written", written)
		case errors.Is(err, os.ErrNotExist):
			b.log.Info("no snapshot yet, nothing is known until decisions arrive")
		default:
			b.log.Warn("cannot use the snapshot, nothing is known until decisions arrive", "err", err)
		}
	}
	b.openLists()
	b.auth = newAuth(&c, b.enforcer, b.now, log)
	return b, nil
}

// String names the task.
func (b *Bouncer) String() string { return "bouncer" }

// Run keeps the kernel in step until ctx ends, leaves there what it holds, and
// saves the decisions.
func (b *Bouncer) Run(ctx context.Context) error {
	defer b.seenLists() // whatever happens, LAPI's answers wait for it
	events, err := b.kernel.Watch(ctx)
	if err != nil {
		return fmt.Errorf("watch for foreign changes: %w", err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ev := range events {
			b.enforcer.saw(ev)
			b.loop.Trigger()
		}
	}()
	// What is protected has to be known before anything is banned.
	b.protect(ctx)
	read := make(chan struct{})
	go func() {
		defer close(read)
		b.followLists(ctx)
	}()
	err = b.loop.Run(ctx)
	<-done
	select {
	case <-read:
	case <-time.After(time.Second): // a disk hangs
	}
	b.save(true)
	return err
}

// turn brings the kernel into step.
func (b *Bouncer) turn(ctx context.Context) (time.Time, error) {
	b.mu.Lock()
	due := b.now().Sub(b.guarded) >= guardInterval
	b.mu.Unlock()
	var err error
	if due {
		err = b.protect(ctx)
		b.lookAround()
	}
	err = errors.Join(err, b.enforcer.verify())
	b.save(false)
	now := b.now()
	next := now.Add(guardInterval)
	if due := b.enforcer.next(); !due.IsZero() && due.Before(next) {
		// What ends about the same time goes at once.
		next = now.Add(max(due.Sub(now), 0) + time.Second)
	}
	return next, err
}

func (b *Bouncer) protect(ctx context.Context) error {
	list := b.guard.look(ctx)
	b.mu.Lock()
	b.guarded = b.now()
	b.mu.Unlock()
	return b.enforcer.protect(list)
}

// lookAround finds out what may carry packets past the ruleset, and says so once.
func (b *Bouncer) lookAround() {
	found, err := b.kernel.Bypasses(b.config.Firewall.Exempt)
	b.mu.Lock()
	defer b.mu.Unlock()
	if err != nil {
		if err.Error() != b.trouble {
			b.log.Warn("cannot find out what may carry packets past the bans", "err", err)
		}
		b.trouble = err.Error()
		return
	}
	b.trouble = ""
	for _, p := range found {
		if !slices.Contains(b.passing, p) {
			b.log.Warn("packets may pass the bans by", "kind", p.Kind, "name", p.Name, "means", Means(p))
		}
	}
	b.passing = found
}

// Means says what a bypass does to bans.
func Means(p nft.Bypass) string {
	switch p.Kind {
	case "flowtable":
		return "established connections that it has taken over go on until they end; new ones are stopped"
	case "exempt":
		return "a default route leads out by this interface, and nothing that comes in by it is stopped: it matches firewall.exempt"
	case "cilium":
		return "Cilium may hand packets to pods before bans are asked; ban there as well"
	}
	return "an eBPF program sees packets before bans do, and may hand them on by itself"
}

// Pulled takes in how a pull of the decision stream ended.
func (b *Bouncer) Pulled(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.feed.Err = err; err == nil {
		b.feed.Failing = time.Time{}
		return
	}
	if b.feed.Failures++; b.feed.Failing.IsZero() {
		b.feed.Failing = b.now()
	}
}

// Sink takes in the decision stream.
func (b *Bouncer) Sink() lapi.Sink {
	return lapi.Sink{
		Begin: func(full bool, at time.Time) {
			b.feeding.Lock()
			defer b.feeding.Unlock()
			b.delta = b.store.NewDelta(full, at)
		},
		Add: func(r *lapi.Row) {
			b.feeding.Lock()
			defer b.feeding.Unlock()
			b.row = decision.Row(*r)
			b.delta.Add(&b.row)
		},
		Delete:     func(id int) { b.delta.Delete(id) },
		Unreadable: func() { b.delta.Unreadable() },
		Commit:     b.commit,
	}
}

// commit applies the answer that has arrived whole.
func (b *Bouncer) commit() (doubt bool) {
	// What a predecessor enforces gives way to LAPI and lists together; a list on
	// a disk that hangs does not keep LAPI's bans out.
	select {
	case <-b.looked:
	case <-time.After(patience):
	}
	b.feeding.Lock()
	defer b.feeding.Unlock()
	now := b.now()
	d := b.delta
	b.delta = nil
	var touched []netip.Prefix
	if !d.Full {
		touched = b.store.Touches(d)
	}
	outcome := b.store.Apply(d, now)
	changed := d.Full || len(touched) > 0
	if changed {
		if err := b.enforcer.follow(b.store.Compile(), touched, d.Full); err != nil {
			b.log.Warn("cannot bring decisions into the kernel, which goes on with the last ones", "err", err)
			b.loop.Trigger()
		}
	}
	b.mu.Lock()
	b.feed.Pulls++
	b.feed.Last = now
	if d.Full {
		b.feed.Fulls++
		b.feed.LastFull = now
	}
	if outcome.Doubt {
		b.feed.Doubts++
	}
	if changed {
		b.feed.changes++ // only now: a save that began before lacks it
	}
	for reason, n := range d.Skipped {
		b.feed.Skipped[reason] += uint64(n)
	}
	b.mu.Unlock()
	for reason, n := range d.Skipped {
		b.log.Warn("decisions skipped", "reason", reason, "count", n)
	}
	full := d.Full
	d = nil // it may be as large as what is held
	folded := b.store.Due()
	if folded {
		b.store.Fold(now)
		b.enforcer.swap(b.store.Compile())
	}
	if full {
		b.loop.Trigger() // to save what was pulled, if that is due
	}
	if full || folded {
		// Both leave behind as much as is held. Until the next one the memory is
		// better the machine's.
		debug.FreeOSMemory()
	}
	return outcome.Doubt
}

// save writes the snapshot if decisions changed since the last one, and with
// last whenever that was. Nothing is saved before LAPI has answered: there is
// nothing newer than what was read.
func (b *Bouncer) save(last bool) {
	if b.config.StateDir == "" {
		return
	}
	b.mu.Lock()
	feed, saved := b.feed, b.saved
	b.mu.Unlock()
	now := b.now()
	if feed.Fulls == 0 && b.config.hasLAPI() || feed.changes == saved.changes || !last && now.Sub(saved.At) < saveInterval {
		return
	}
	rows, err := saveSnapshot(b.config.StateDir, b.enforcer.reading.Load().table, now)
	if err != nil && (saved.Err == nil || saved.Err.Error() != err.Error()) {
		b.log.Warn("cannot save decisions: a boot without LAPI would begin with old ones, or none", "err", err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.saved = snapshotState{At: now, Rows: rows, Err: err, changes: feed.changes}
}

// Ready returns nil when the kernel really holds the bans that LAPI, or a
// snapshot, tells of; otherwise why not.
func (b *Bouncer) Ready() error {
	r := b.enforcer.stands()
	if r.StoodDown {
		return errStoodDown
	}
	if err := b.listsKnown(); err != nil {
		return err
	}
	switch {
	case !r.Fed && !b.config.hasLAPI():
		return errors.New("no decisions yet: the lists are not in force")
	case !r.Fed:
		return errors.New("no decisions yet: LAPI has not answered and there is no snapshot")
	case r.Err != nil:
		return r.Err
	case !r.Installed && r.Have.Enforcing:
		return errors.New("the bans of a predecessor are enforced until LAPI answers")
	case !r.Installed:
		return errors.New("bans are not in the kernel yet")
	case b.now().Sub(r.Looked) > 3*verifyInterval:
		return fmt.Errorf("the kernel was not looked at since %v", r.Looked.Format(time.TimeOnly))
	}
	return nil
}

// Totals are the usage metrics for LAPI.
func (b *Bouncer) Totals() (crowdsec.Totals, error) {
	counters, err := b.kernel.Counters()
	if err != nil {
		return nil, err
	}
	out := crowdsec.Totals{}
	for _, c := range counters {
		s := crowdsec.Series{IPType: ipType(c.IPv6)}
		switch {
		case c.Kind == nft.Seen:
			s.Name = crowdsec.Processed
		case c.Kind == nft.Banned && b.config.Mode == Enforce && c.Name != probeClass:
			s.Name = crowdsec.Dropped
			s.Remediation, s.Origin = splitClass(c.Name)
		default:
			continue
		}
		s.Unit = crowdsec.Packet
		out[s] += c.Packets
		s.Unit = crowdsec.Byte
		out[s] += c.Bytes
	}
	b.auth.totals(out)
	for _, d := range b.tally() {
		if d.Enforced {
			out[crowdsec.Series{Name: crowdsec.ActiveDecisions, Unit: crowdsec.IP, Origin: d.Origin, Remediation: d.Remediation, IPType: d.IPType}] += uint64(d.Count)
		}
	}
	return out, nil
}

func ipType(six bool) string {
	if six {
		return crowdsec.IPv6
	}
	return crowdsec.IPv4
}

// splitClass takes the name of a class apart.
func splitClass(name string) (remediation, origin string) {
	remediation, origin, _ = strings.Cut(strings.ToValidUTF8(name, "?"), "/")
	return remediation, origin
}

package plugin

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/edgeward/edgeward/internal/decision"
	"github.com/edgeward/edgeward/internal/lapi"
)

// Version is the plugin's release.
const Version = "v0.1.0"

const userAgent = "crowdsec-edgeward-traefik-bouncer/" + Version

// source is where an engine gets its decisions.
type source struct {
	url      string // base, no trailing slash; "" for none
	socket   string // unix socket that carries the requests, or ""
	key      string
	keyFile  string
	tls      tlsSource
	interval time.Duration
	timeout  time.Duration
	resync   time.Duration
}

// identity names the LAPI and how the credentials are written. Secrets are
// hashed.
func (s source) identity() string {
	return s.place() + " " + hashed(s.key, s.keyFile, s.tls.cert, s.tls.certFile, s.tls.key, s.tls.keyFile)
}

// place names the LAPI alone.
func (s source) place() string { return s.url + " " + s.socket }

func hashed(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return hex.EncodeToString(sum[:])
}

// engine keeps one table in step with one LAPI. All middlewares with the same
// LAPI and credentials share it.
type engine struct {
	id     string
	place  string
	sight  atomic.Value // *sight of the table in force, never nil
	pulled atomic.Int64 // Unix ns of the last good pull; 0 for never
	log    atomic.Value // *slog.Logger of the middleware built last
	stop   context.CancelFunc
	store  *decision.Store // of the goroutine that follows the stream

	// rivals counts the other engines that pull with the same credentials.
	// They take deltas away from each other, so each must pull all then, and
	// once more after.
	rivals  atomic.Int32
	robbed  atomic.Int32
	restart context.CancelFunc // ends the stream; the next one runs with what is wanted

	// Guarded by the registry.
	secret  string         // hash of the credentials used last, "" until then
	wants   map[source]int // by the middlewares that use it
	running source
	users   int
	release *time.Timer // pending end, nil while in use
}

const (
	// engineLinger is how long an engine outlives its last user. A reload ends
	// the old handlers before it builds the new ones, and without it would
	// lose the table each time.
	engineLinger = 30 * time.Second
	// settleTime is how long an engine waits for the last word on its
	// settings while Traefik rebuilds its middlewares.
	settleTime = time.Second
)

// engines are the engines of the process. A package variable outlives a reload,
// because the plugin is interpreted once per process.
var engines = engineRegistry{all: map[string]*engine{}, linger: engineLinger}

type engineRegistry struct {
	mu     sync.Mutex
	all    map[string]*engine
	linger time.Duration
}

// acquire returns the engine for a source, starting it if need be. Each acquire
// is paired with one release.
func (r *engineRegistry) acquire(s source, log *slog.Logger) *engine {
	id := s.identity()
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.all[id]
	if e == nil {
		e = r.start(id, s, log)
	}
	e.log.Store(log)
	if e.release != nil {
		e.release.Stop()
		e.release = nil
	}
	e.users++
	e.wants[s]++
	r.settleSoon(e)
	return e
}

// release gives an engine back; the last one to do so lets it end after the
// linger, or at once where another engine goes on with the same credentials.
func (r *engineRegistry) release(e *engine, s source) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e.users--
	e.wants[s]--
	if e.wants[s] == 0 {
		delete(e.wants, s)
	}
	if e.users > 0 {
		r.settleSoon(e)
		return
	}
	r.bequeath(e)
	if e.rivals.Load() > 0 {
		r.end(e)
		return
	}
	var timer *time.Timer
	timer = time.AfterFunc(r.linger, func() {
		defer func() { _ = recover() }()
		r.mu.Lock()
		defer r.mu.Unlock()
		if e.users == 0 && e.release == timer {
			r.end(e)
		}
	})
	e.release = timer
}

// end stops an engine for good.
func (r *engineRegistry) end(e *engine) {
	if e.release != nil {
		e.release.Stop()
		e.release = nil
	}
	e.stop()
	if r.all[e.id] == e {
		delete(r.all, e.id)
	}
	r.countRivals()
}

// wanted is what an engine should run with: of several wishes, that with the
// shortest interval, so that the order in which Traefik builds its middlewares
// does not matter.
func wanted(e *engine) source {
	var best source
	for s := range e.wants {
		if best.url == "" || s.interval < best.interval || s.interval == best.interval && fmt.Sprint(s) < fmt.Sprint(best) {
			best = s
		}
	}
	return best
}

// settleSoon restarts the stream of an engine, a moment later, if it runs with
// other settings than are wanted then. Its table stays in force.
func (r *engineRegistry) settleSoon(e *engine) {
	if e.users == 0 || wanted(e) == e.running {
		return
	}
	time.AfterFunc(settleTime, func() {
		defer func() { _ = recover() }()
		r.mu.Lock()
		defer r.mu.Unlock()
		if e.users == 0 || wanted(e) == e.running {
			return
		}
		if len(e.wants) > 1 {
			e.logger().Warn("middlewares with one key want different LAPI settings, the shortest interval counts", "component", "engine", "url", e.running.url)
		}
		e.running = wanted(e)
		e.logger().Info("LAPI settings changed", "component", "engine", "url", e.running.url, "interval", e.running.interval.String())
		e.restart()
	})
}

func (r *engineRegistry) start(id string, s source, log *slog.Logger) *engine {
	ctx, cancel := context.WithCancel(context.Background())
	e := &engine{id: id, place: s.place(), running: s, wants: map[source]int{}, stop: cancel, restart: func() {}}
	e.log.Store(log)
	e.store = decision.NewStore()
	e.publish(e.store.Compile())
	r.inherit(e)
	r.all[id] = e
	go func() {
		defer func() {
			if p := recover(); p != nil {
				e.logger().Error("engine stopped by a panic, the last table stays in force", "component", "engine", "err", fmt.Sprint(p))
			}
		}()
		r.run(ctx, e)
	}()
	return e
}

// inherit gives a new engine a table to begin with, because a new key or address
// is no reason to let everybody in: that of an engine for the same LAPI, or else
// of one that nobody uses any more.
func (r *engineRegistry) inherit(e *engine) {
	var idle *engine
	latest := int64(0)
	for _, other := range r.all {
		at := other.pulled.Load()
		if other.place == e.place && at > e.pulled.Load() {
			e.pulled.Store(at)
			e.publish(other.table())
			e.store = decision.Resume(e.table())
		}
		if other.users == 0 && at > latest {
			latest = at
			idle = other
		}
	}
	if e.pulled.Load() == 0 && idle != nil {
		e.publish(idle.table())
	}
}

// bequeath hands the table of an engine that has become idle to those that have
// never had one: the old middlewares may end a moment after the new ones began.
func (r *engineRegistry) bequeath(e *engine) {
	if e.pulled.Load() == 0 || r.all[e.id] != e {
		return
	}
	for _, other := range r.all {
		if other != e && other.pulled.Load() == 0 && other.table().Len() == 0 {
			other.publish(e.table())
		}
	}
}

// learn notes with which credentials an engine is about to pull. An idle engine
// with the same ones ends: LAPI keeps one delta cursor for each key and address.
func (r *engineRegistry) learn(e *engine, secret string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e.secret == secret || r.all[e.id] != e {
		return
	}
	e.secret = secret
	for _, other := range r.all {
		if other != e && other.secret == secret && other.users == 0 {
			r.end(other)
			e.robbed.Store(1)
		}
	}
	if r.countRivals(); e.rivals.Load() > 0 {
		e.logger().Error("two ways of naming the same LAPI or key pull with the same credentials: write them alike, or give each its own key", "component", "engine", "url", e.running.url)
	}
}

// countRivals counts, for each engine, the others with its credentials.
func (r *engineRegistry) countRivals() {
	for _, e := range r.all {
		n := int32(0)
		for _, other := range r.all {
			if other != e && other.secret == e.secret && e.secret != "" {
				n++
			}
		}
		if n != e.rivals.Load() {
			e.robbed.Store(1)
			e.rivals.Store(n)
		}
	}
}

// table returns the table in force.
func (e *engine) table() *decision.Table { return e.sight.Load().(*sight).table }

func (e *engine) logger() *slog.Logger { return e.log.Load().(*slog.Logger) }

// publish puts a table in force.
func (e *engine) publish(t *decision.Table) { e.sight.Store(newSight(t)) }

// stale reports whether nothing can be known: no good pull within maxAge.
func (e *engine) stale(now time.Time, maxAge time.Duration) bool {
	last := e.pulled.Load()
	return last == 0 || now.UnixNano()-last > int64(maxAge)
}

// run follows the stream until ctx ends, whatever happens on the way, and
// starts it anew whenever other settings are wanted.
func (r *engineRegistry) run(ctx context.Context, e *engine) {
	for ctx.Err() == nil {
		r.mu.Lock()
		turn, restart := context.WithCancel(ctx)
		e.restart = restart
		s := e.running
		r.mu.Unlock()
		if r.follow(turn, e, s) {
			// It panicked: not too fast, and not with what it left behind.
			e.store = decision.NewStore()
			pause, over := context.WithTimeout(ctx, 5*time.Second)
			<-pause.Done()
			over()
		}
		restart()
	}
}

// follow runs one stream into the engine's store until ctx ends; it reports
// whether a panic ended it before.
func (r *engineRegistry) follow(ctx context.Context, e *engine, s source) (panicked bool) {
	defer func() {
		if p := recover(); p != nil {
			panicked = true
			e.logger().Error("decision stream panicked, starting it again", "component", "engine", "err", fmt.Sprint(p))
		}
	}()
	client, authorize := connect(s, func(secret string) { r.learn(e, secret) })
	defer client.CloseIdleConnections()
	store := e.store
	var delta *decision.Delta
	row := &decision.Row{}
	stream := &lapi.Stream{
		Client:    client,
		URL:       s.url,
		Authorize: authorize,
		UserAgent: userAgent,
		Interval:  s.interval,
		Timeout:   s.timeout,
		Resync:    s.resync,
		Scopes:    []string{"ip", "range"},
		Full:      func() bool { return e.robbed.Swap(0) > 0 || e.rivals.Load() > 0 },
		Log:       func() *slog.Logger { return e.logger() },
		Sink: lapi.Sink{
			Begin: func(full bool, at time.Time) { delta = store.NewDelta(full, at) },
			Add: func(r *lapi.Row) {
				row.ID = r.ID
				row.Scope = r.Scope
				row.Value = r.Value
				row.Type = r.Type
				row.Origin = r.Origin
				row.Scenario = r.Scenario
				row.Duration = r.Duration
				delta.Add(row)
				if delta.Len()&127 == 0 {
					runtime.Gosched()
				}
			},
			Delete:     func(id int) { delta.Delete(id) },
			Unreadable: func() { delta.Unreadable() },
			Commit: func() bool {
				doubt := e.commit(delta, time.Now())
				delta = nil
				return doubt
			},
		},
	}
	stream.Run(ctx)
	return false
}

// commit takes an answer in and puts the table that comes of it in force.
func (e *engine) commit(delta *decision.Delta, now time.Time) (doubt bool) {
	log := e.logger()
	outcome := e.store.Apply(delta, now)
	if delta.Full || delta.Len()+delta.Deleted() > 0 {
		e.publish(e.store.Compile())
		log.Debug("decisions applied", "component", "engine", "full", delta.Full, "added", delta.Len(), "removed", delta.Deleted())
	}
	// Only now: who fails closed must not take the table before for this one.
	e.pulled.Store(now.UnixNano())
	for reason, n := range delta.Skipped {
		log.Warn("decisions skipped", "component", "engine", "reason", reason, "count", n)
	}
	if outcome.Doubt {
		log.Warn("a full pull lacks decisions that no delta ended, deleting nothing yet, asking again", "component", "engine", "had", outcome.Had, "got", outcome.Got, "missing", outcome.Missing)
	}
	if e.store.Due() {
		e.store.Fold(now)
		e.publish(e.store.Compile())
	}
	return outcome.Doubt
}

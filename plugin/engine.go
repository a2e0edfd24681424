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

// identity names the LAPI and the credentials: LAPI keeps one delta cursor for
// each, so there must be one engine for each. Secrets are hashed.
func (s source) identity() string {
	credentials := strings.Join([]string{s.key, s.keyFile, s.tls.cert, s.tls.certFile, s.tls.key, s.tls.keyFile}, "\x00")
	sum := sha256.Sum256([]byte(credentials))
	return s.place() + " " + hex.EncodeToString(sum[:])
}

// place names the LAPI alone.
func (s source) place() string { return s.url + " " + s.socket }

// engine keeps one table in step with one LAPI. All middlewares with the same
// LAPI and credentials share it.
type engine struct {
	screen atomic.Value // *decision.Screen of the table in force, never nil
	pulled atomic.Int64 // Unix ns of the last good pull; 0 for never
	log    *slog.Logger
	stop   context.CancelFunc // ends the engine

	// Guarded by the registry.
	wanted  source
	running source
	restart context.CancelFunc // ends the stream, so that the next one runs with what is wanted
	users   int
	release *time.Timer // pending end, nil while in use
}

// engineLinger is how long an engine outlives its last user. A reload ends the
// old handlers before it builds the new ones, and without it would lose the
// table each time.
const engineLinger = 30 * time.Second

// engines are the engines of the process. A package variable outlives a reload,
// because the plugin is interpreted once per process.
var engines = engineRegistry{all: map[string]*engine{}, linger: engineLinger}

type engineRegistry struct {
	mu     sync.Mutex
	all    map[string]*engine
	linger time.Duration
}

// settleTime is how long new settings of a running engine wait for newer ones:
// while Traefik rebuilds its middlewares, only the last word should count.
const settleTime = time.Second

// acquire returns the engine for a source, starting it if need be. Each acquire
// is paired with one release. Where two sources differ in less than the LAPI
// and the credentials, say in the interval, the one that came last counts.
func (r *engineRegistry) acquire(s source, log *slog.Logger) *engine {
	id := s.identity()
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.all[id]
	if e == nil {
		e = r.start(id, s, log)
	} else if e.wanted != s {
		e.wanted = s
		time.AfterFunc(settleTime, func() {
			defer func() { _ = recover() }()
			r.settle(e)
		})
	}
	if e.release != nil {
		e.release.Stop()
		e.release = nil
	}
	e.users++
	return e
}

// settle restarts the stream of an engine that runs with other settings than
// are wanted. Its table stays in force.
func (r *engineRegistry) settle(e *engine) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e.wanted != e.running && e.restart != nil {
		e.log.Info("LAPI settings changed", "component", "engine", "url", e.wanted.url, "interval", e.wanted.interval.String())
		e.restart()
	}
}

func (r *engineRegistry) start(id string, s source, log *slog.Logger) *engine {
	ctx, cancel := context.WithCancel(context.Background())
	e := &engine{wanted: s, log: log, stop: cancel}
	e.screen.Store(emptyScreen())
	// What was known stays known until the first pull: a new key or address is
	// no reason to let everybody in. The same LAPI knows best; failing that,
	// whoever has pulled last.
	var known *engine
	for _, same := range []bool{true, false} {
		latest := int64(0)
		for _, other := range r.all {
			if at := other.pulled.Load(); at > latest && same == (other.wanted.place() == s.place()) {
				latest = at
				known = other
			}
		}
		if known != nil {
			e.screen.Store(known.screen.Load())
			if same {
				e.pulled.Store(latest)
			}
			break
		}
	}
	r.all[id] = e
	go func() {
		defer func() {
			if p := recover(); p != nil {
				log.Error("engine stopped by a panic, the last table stays in force", "component", "engine", "err", fmt.Sprint(p))
			}
		}()
		r.run(ctx, e)
	}()
	return e
}

// release gives an engine back; the last one to do so lets it end after the
// linger.
func (r *engineRegistry) release(s source) {
	id := s.identity()
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.all[id]
	if e == nil {
		return
	}
	e.users--
	if e.users > 0 || e.release != nil {
		return
	}
	e.release = time.AfterFunc(r.linger, func() {
		defer func() { _ = recover() }()
		r.mu.Lock()
		defer r.mu.Unlock()
		if e.users == 0 {
			e.stop()
			delete(r.all, id)
		}
	})
}

func emptyScreen() *decision.Screen {
	return decision.NewScreen(decision.NewStore().Compile(), nil)
}

// publish puts a table in force.
func (e *engine) publish(t *decision.Table) {
	e.screen.Store(decision.NewScreen(t, e.screen.Load().(*decision.Screen)))
}

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
		e.running = e.wanted
		e.restart = restart
		s := e.running
		r.mu.Unlock()
		if e.follow(turn, s) {
			// It panicked: not too fast.
			pause, over := context.WithTimeout(ctx, 5*time.Second)
			<-pause.Done()
			over()
		}
		restart()
	}
}

// follow runs one stream into a store of its own until ctx ends; it reports
// whether a panic ended it before.
func (e *engine) follow(ctx context.Context, s source) (panicked bool) {
	defer func() {
		if p := recover(); p != nil {
			panicked = true
			e.log.Error("decision stream panicked, starting it again", "component", "engine", "err", fmt.Sprint(p))
		}
	}()
	client, authorize := connect(s)
	defer client.CloseIdleConnections()
	store := decision.NewStore()
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
		Log:       e.log,
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
			Unreadable: func() { delta.Skipped["row"]++ },
			Commit: func() bool {
				now := time.Now()
				outcome := store.Apply(delta, now)
				e.pulled.Store(now.UnixNano())
				if delta.Full || delta.Len()+delta.Deleted() > 0 {
					e.publish(store.Compile())
					e.log.Debug("decisions applied", "component", "engine", "full", delta.Full, "added", delta.Len(), "removed", delta.Deleted())
				}
				for reason, n := range delta.Skipped {
					e.log.Warn("decisions skipped", "component", "engine", "reason", reason, "count", n)
				}
				delta = nil
				if store.Due() {
					store.Fold(now)
					e.publish(store.Compile())
				}
				return outcome.Doubt
			},
		},
	}
	stream.Run(ctx)
	return false
}

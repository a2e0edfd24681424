package cloudflare

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
)

// A session is one generation of a tunnel's connections: the same credentials
// and settings, and one id under which Cloudflare lists them. Each connection
// has a slot, and each slot a goroutine that holds one connection after another.
type session struct {
	connector   *Connector
	id          uuid.UUID
	credentials Credentials
	settings    Settings
	pace        pace
	log         *slog.Logger
	addresses   *addresses

	ctx      context.Context // ends when everything is to stop now
	cancel   context.CancelFunc
	draining context.Context // ends when the drain begins, or with ctx
	drain    context.CancelFunc
	slots    sync.WaitGroup // slots, and links that outlive their turn in one
	served   atomic.Bool    // a connection was registered, and has ended

	mu      sync.Mutex
	changed chan struct{} // closed at every change of what follows
	held    []Connection
	links   []*link // those that are open
	// answers says that the edge has answered a canary, so that silence means
	// something.
	answers bool
}

func newSession(c *Connector, credentials Credentials, settings Settings) *session {
	s := &session{
		connector: c, id: uuid.New(), credentials: credentials, settings: settings, pace: c.pace,
		log: c.log, changed: make(chan struct{}), held: make([]Connection, settings.Connections),
	}
	s.addresses = &addresses{static: settings.Edge, region: settings.Region, log: s.log}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.draining, s.drain = context.WithCancel(s.ctx)
	for i := range s.held {
		s.held[i] = Connection{Index: i, State: Waiting, Since: time.Now()}
	}
	return s
}

func (s *session) start() {
	for slot := range s.held {
		s.slots.Go(func() { s.hold(slot) })
	}
}

// end drains and waits until all is closed.
func (s *session) end() {
	s.drain()
	s.wait()
}

func (s *session) wait() {
	s.slots.Wait()
	s.cancel()
}

// longestPutOff bounds how long the edge is taken at its word.
const longestPutOff = 5 * time.Minute

// hold keeps a connection in the slot until the session drains.
func (s *session) hold(slot int) {
	failures := 0
	awaitTurn := slot > 0
	var another, unreachable bool // for addresses.take
	for {
		if awaitTurn && !s.turn(slot) {
			return
		}
		awaitTurn = false
		s.note(slot, func(c *Connection) { c.enter(Connecting) })
		registered, err := s.connect(slot, another, unreachable)
		if s.draining.Err() != nil {
			return
		}
		var refused refusedError
		isRefused := errors.As(err, &refused)
		if registered > 0 {
			s.served.Store(true)
		}
		if registered >= s.pace.good {
			failures = 0
		} else {
			failures++
		}
		unreachable = !isRefused && registered == 0
		another = !isRefused && !errors.Is(err, errReleased)
		s.report(slot, err, registered > 0, isRefused)
		wait := s.pace.wait(failures, isRefused)
		if later, ok := errors.AsType[retryLaterError](err); ok {
			wait = max(wait, min(later.after, longestPutOff))
		}
		if !s.rest(slot, wait) {
			return
		}
	}
}

// turn waits until the slot may connect for the first time: after the first
// slot has shown that the credentials are good, or has met an edge that is
// down, as another may not be; and then one after the other.
func (s *session) turn(slot int) bool {
	patience := time.NewTimer(s.pace.patience)
	defer patience.Stop()
	for waited := false; ; {
		changed := s.watch()
		if s.registered() > 0 || waited && s.refusal() == "" {
			return s.pause(time.Duration(slot) * s.pace.stagger)
		}
		select {
		case <-changed:
		case <-patience.C:
			waited = true
		case <-s.draining.Done():
			return false
		}
	}
}

// rest waits for the next attempt. It ends early when the first of all
// connections registers, which shows that the edge can be reached again.
func (s *session) rest(slot int, wait time.Duration) bool {
	s.note(slot, func(c *Connection) { c.enter(Waiting) })
	timer := time.NewTimer(wait)
	defer timer.Stop()
	none := s.registered() == 0
	for {
		changed := s.watch()
		if n := s.registered(); n == 0 {
			none = true
		} else if none {
			return s.pause(rand.N(s.pace.firstRetry + 1))
		}
		select {
		case <-changed:
		case <-timer.C:
			return true
		case <-s.draining.Done():
			return false
		}
	}
}

func (s *session) pause(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-s.draining.Done():
		return false
	}
}

// wait is how long to wait after a number of failures in a row.
func (p pace) wait(failures int, refused bool) time.Duration {
	switch {
	case refused:
		return p.refused/2 + rand.N(p.refused/2+1)
	case failures == 0:
		return rand.N(p.firstRetry + 1)
	}
	d := min(p.retry<<min(failures-1, 16), p.slowest)
	return d/2 + rand.N(d/2+1)
}

// connect makes one connection and serves it until it ends or is let go. It
// returns how long it was registered.
func (s *session) connect(slot int, another, unreachable bool) (registered time.Duration, err error) {
	address, err := s.addresses.take(s.draining, slot, another, unreachable)
	if err != nil {
		return 0, err
	}
	l, err := s.dial(slot, address)
	if err != nil {
		return 0, err
	}
	s.open(l)
	l.start()
	select {
	case <-l.ended:
		s.closed(l)
	case <-l.released: // by the edge: what is in flight is served beside the next connection
		s.slots.Go(func() { l.linger(); s.closed(l) })
	case <-s.draining.Done():
		s.note(slot, func(c *Connection) { c.enter(Draining) })
		l.linger()
		s.closed(l)
	}
	if since := l.registeredSince(); !since.IsZero() {
		registered = max(time.Since(since), 1)
	}
	return registered, l.reason()
}

// report notes and logs why a slot has no connection. Of the attempts in a row
// that fail, the first and every tenth are logged as more than a detail; that the
// credentials are refused is one line, whichever slots hear it.
func (s *session) report(slot int, err error, lost, refused bool) {
	message := err.Error()
	var attempts int
	var known bool
	s.note(slot, func(c *Connection) {
		known = slices.ContainsFunc(s.held, func(o Connection) bool { return o.Refused })
		c.Error, c.Refused = message, refused
		if !lost { // what follows a loss is the first attempt
			c.Attempts++
		}
		attempts = c.Attempts
	})
	log := s.log.With("connection", slot, "attempts", attempts, "err", message)
	switch {
	case refused && !known:
		log.Error("tunnel refused", "mend", "give it the tunnel's present token or credentials; if the tunnel was deleted, make it anew")
	case lost:
		s.connector.totals.lost.Add(1)
		log.Warn("connection lost")
	case attempts == 1 && !refused || attempts%10 == 0:
		log.Warn("connection failed")
	default:
		log.Debug("connection failed")
	}
}

// note changes what is known of a slot and tells who watches.
func (s *session) note(slot int, change func(*Connection)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.held[slot])
	close(s.changed)
	s.changed = make(chan struct{})
}

func (c *Connection) enter(state State) { c.State, c.Since = state, time.Now() }

// watch returns a channel that is closed at the next change.
func (s *session) watch() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

func (s *session) open(l *link) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.links = append(s.links, l)
}

func (s *session) closed(l *link) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.links = slices.DeleteFunc(s.links, func(o *link) bool { return o == l })
}

func (s *session) registered() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, c := range s.held {
		if c.State == Registered {
			n++
		}
	}
	return n
}

// refusal is the edge's last word about the credentials, if that is no.
func (s *session) refusal() string { return s.errorWhere(func(c Connection) bool { return c.Refused }) }

func (s *session) lastError() string { return s.errorWhere(func(c Connection) bool { return true }) }

func (s *session) errorWhere(is func(Connection) bool) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.held {
		if c.Error != "" && is(c) {
			return c.Error
		}
	}
	return ""
}

func (s *session) inFlight() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, l := range s.links {
		n += int(l.inFlight.Load())
	}
	return n
}

// connections are the slots, with the requests in flight on their links.
func (s *session) connections() []Connection {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := slices.Clone(s.held)
	for _, l := range s.links {
		all[l.slot].InFlight += int(l.inFlight.Load())
	}
	return all
}

// canaryAnswered notes that the edge answers canaries.
func (s *session) canaryAnswered(slot int) {
	s.note(slot, func(c *Connection) { c.Canary = time.Now() })
	s.mu.Lock()
	s.answers = true
	s.mu.Unlock()
}

func (s *session) canaryTrusted() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.answers
}

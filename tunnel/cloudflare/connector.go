package cloudflare

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
)

// Options are what a Connector is made of; they do not change.
type Options struct {
	// Name is the tunnel's in logs and Status.
	Name string
	// Version is told to the edge, which shows it in the dashboard.
	Version string
	Log     *slog.Logger
	// Handler answers every request that comes through the tunnel. It gets the
	// request as the visitor sent it, with what the edge added: Host and
	// URL.Host are the visitor's, URL.Scheme is http whatever the visitor used
	// (X-Forwarded-Proto says), RequestURI is empty. It may change the request.
	// Its context ends with the visitor. An error or a panic becomes a 502, or
	// cuts a response that has begun. A WebSocket's request has its Connection
	// and Upgrade headers; the answer is 101 with a Body that can be written.
	Handler http.RoundTripper
	// Memory of networks, shared by all connectors; nil is one for this alone.
	Memory *Memory
	// Served, unless nil, is told of every request when it is over. It must be
	// quick.
	Served func(Exchange)
}

// Exchange is one request that is over.
type Exchange struct {
	Request *http.Request // as the Handler left it
	// Status is what the visitor got; 0 if the visitor left before anything
	// could be sent.
	Status int
	Took   time.Duration // until the response's last byte was handed over
	Err    error         // what cut it short, if anything
}

// A Connector holds the connections of one tunnel. Make it with New, tell it
// what is wished with Apply, end it with Drain. Its methods may be called from
// any goroutine.
type Connector struct {
	name    string
	version string
	log     *slog.Logger
	handler http.RoundTripper
	memory  *Memory
	served  func(Exchange)
	pace    pace
	totals  totals

	applying sync.Mutex      // held by Apply
	ending   context.Context // ends when Drain begins
	end      context.CancelFunc

	mu       sync.Mutex
	current  *session
	proven   *session   // the last that served, kept until the current one does; nil for none
	sessions []*session // the current one, the proven one, and those that still drain
}

type totals struct {
	requests, failed, panics, registered, lost, recycled, drained atomic.Uint64
}

// New makes a Connector that does nothing yet.
func New(o Options) *Connector {
	c := &Connector{
		name: o.Name, version: o.Version, log: o.Log.With("tunnel", o.Name),
		handler: o.Handler, memory: o.Memory, served: o.Served, pace: usualPace,
	}
	c.ending, c.end = context.WithCancel(context.Background())
	if c.memory == nil {
		c.memory = NewMemory("", o.Log)
	}
	return c
}

// ErrRefused means that the edge refuses the credentials, for good.
var ErrRefused = errors.New("the edge refuses the tunnel's credentials")

// errDrained answers Apply after Drain.
var errDrained = errors.New("the connector has been drained")

// Apply states what is wished. The first time, and whenever no connection is
// registered, it starts connecting and returns; Status tells how that goes.
// Otherwise it makes before it breaks: new connections are registered beside the
// old, and once they serve the old ones drain by themselves while Apply returns.
// If they cannot be had, Apply says why, and the old ones stay: ErrRefused if
// the edge will not have the credentials. While the edge is away nobody can say
// that, so old credentials that were good go on trying beside the new until
// those have a connection. To state the same wish again changes nothing.
func (c *Connector) Apply(ctx context.Context, credentials Credentials, settings Settings) error {
	settings, err := settings.check()
	if err != nil {
		return fmt.Errorf("apply settings: %w", err)
	}
	c.applying.Lock()
	defer c.applying.Unlock()

	c.mu.Lock()
	old := c.current
	if c.ending.Err() != nil {
		c.mu.Unlock()
		return errDrained
	}
	if old != nil && old.credentials.equal(credentials) && old.settings.equal(settings) {
		c.mu.Unlock()
		return nil
	}
	next := newSession(c, credentials, settings)
	c.sessions = append(c.sessions, next)
	c.mu.Unlock()

	next.start()
	if old != nil && old.registered() > 0 {
		if err := c.wait(ctx, old, next); err != nil {
			go func() { // what it has registered meanwhile may have requests
				next.end()
				c.forget(next)
			}()
			return fmt.Errorf("replace the connections: %w", err)
		}
	}
	var done []*session // with serving
	c.mu.Lock()
	c.current = next
	if old != nil && next.registered() == 0 && (old.served.Load() || old.registered() > 0) && old.refusal() == "" {
		done, c.proven = append(done, c.proven), old
	} else {
		done = append(done, old)
	}
	succeeds := c.proven != nil
	c.mu.Unlock()
	for _, s := range done {
		c.retire(s)
	}
	if succeeds {
		go c.succeed(next)
	}
	return nil
}

// succeed ends the proven session once next has a connection, unless another has
// taken next's place by then.
func (c *Connector) succeed(next *session) {
	for {
		changed := next.watch()
		if next.registered() > 0 {
			break
		}
		select {
		case <-changed:
		case <-next.draining.Done():
			return
		}
	}
	c.mu.Lock()
	var before *session
	if c.current == next {
		before, c.proven = c.proven, nil
	}
	c.mu.Unlock()
	c.retire(before)
}

// retire ends a session, if there is one, in good order and beside all else.
func (c *Connector) retire(s *session) {
	if s == nil {
		return
	}
	go func() {
		s.end()
		c.forget(s)
	}()
}

// wait waits until next has as many registered connections as old has, or for
// a while as many as it gets, but for one at least.
func (c *Connector) wait(ctx context.Context, old, next *session) error {
	ctx, cancel := context.WithTimeout(ctx, c.pace.swap)
	defer cancel()
	defer context.AfterFunc(c.ending, cancel)()
	enough := time.NewTimer(c.pace.swap / 3)
	defer enough.Stop()
	few := false
	for {
		changed := next.watch()
		n := next.registered()
		if n >= min(old.registered(), next.settings.Connections) && n > 0 || few && n > 0 {
			return nil
		}
		if reason := next.refusal(); n == 0 && reason != "" {
			return fmt.Errorf("%w: %s", ErrRefused, reason)
		}
		select {
		case <-changed:
		case <-enough.C:
			few = true
		case <-ctx.Done():
			if err := next.lastError(); err != "" {
				return fmt.Errorf("none was registered: %s", err)
			}
			return fmt.Errorf("none was registered: %w", ctx.Err())
		}
	}
}

func (c *Connector) forget(s *session) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sessions = slices.DeleteFunc(c.sessions, func(o *session) bool { return o == s })
}

// Drain ends the tunnel without losing a request: the edge is told to send no
// more, what it sends all the same is served during the lame duck, and what is
// in flight is waited for during the grace. Whatever is left when ctx ends is
// cut, and said in the error. When it returns, all connections are closed and
// the Connector is done.
func (c *Connector) Drain(ctx context.Context) error {
	c.end()
	c.applying.Lock()
	c.mu.Lock()
	sessions := slices.Clone(c.sessions)
	c.mu.Unlock()
	c.applying.Unlock()

	var ends sync.WaitGroup
	for _, s := range sessions {
		ends.Go(s.end)
	}
	done := make(chan struct{})
	go func() { ends.Wait(); close(done) }()
	var err error
	select {
	case <-done:
	case <-ctx.Done():
		cut := 0
		for _, s := range sessions {
			cut += s.inFlight()
			s.cancel()
		}
		<-done
		if cut > 0 {
			err = fmt.Errorf("drain tunnel %s: cut %d requests in flight: %w", c.name, cut, ctx.Err())
		}
	}
	c.mu.Lock()
	c.current, c.proven, c.sessions = nil, nil, nil
	c.mu.Unlock()
	return err
}

// Status is what a Connector has.
type Status struct {
	Name string
	// Tunnel is zero before the first Apply and after Drain.
	Tunnel uuid.UUID
	// Connector is the id under which Cloudflare lists the connections; it
	// changes when they are replaced.
	Connector uuid.UUID
	// Protocol is the one wished for.
	Protocol Protocol
	// Refused says, in the edge's words, why it will not have the credentials;
	// empty if it does, or has not been asked.
	Refused string
	// Connections are those wished for, by index, and then those that drain or
	// serve until the wished for do.
	Connections []Connection
	Totals      Totals
}

// Registered is how many connections get requests.
func (s Status) Registered() int {
	n := 0
	for _, c := range s.Connections {
		if c.State == Registered {
			n++
		}
	}
	return n
}

// Totals count since New.
type Totals struct {
	Requests   uint64 // that came through the tunnel
	Failed     uint64 // of them, those cut short or answered 502 for an error
	Panics     uint64 // of those, by a panic of the handler
	Registered uint64 // connections
	Lost       uint64 // registered connections that ended by themselves
	Recycled   uint64 // of those, because their canary was silent
	Drained    uint64 // connections that were let go
}

// State is what a connection is at.
type State string

// The states of a connection.
const (
	Waiting    State = "waiting"    // to try again
	Connecting State = "connecting" // until the edge has registered it
	Registered State = "registered"
	Draining   State = "draining"
)

// Connection is one connection to the edge, or the wish for it.
type Connection struct {
	Index int
	State State
	Since time.Time // of the state
	// ID, Protocol, Address, Location and KeyExchange are those of the last
	// connection that registered: Location is the edge's place, such as ams07.
	ID          uuid.UUID
	Protocol    Protocol
	Address     netip.AddrPort
	Location    string
	KeyExchange string
	// Canary is when the edge's tunnel service last answered; zero if it has
	// not yet.
	Canary   time.Time
	InFlight int
	// Attempts are those in a row that failed.
	Attempts int
	// Error is why it was lost or not had, the last time; empty while it is
	// registered.
	Error string
	// Refused says that Error is the edge's last word about the credentials.
	Refused bool
}

// Status says what there is.
func (c *Connector) Status() Status {
	c.mu.Lock()
	current, sessions := c.current, slices.Clone(c.sessions)
	c.mu.Unlock()
	s := Status{Name: c.name, Totals: Totals{
		Requests: c.totals.requests.Load(), Failed: c.totals.failed.Load(), Panics: c.totals.panics.Load(),
		Registered: c.totals.registered.Load(), Lost: c.totals.lost.Load(),
		Recycled: c.totals.recycled.Load(), Drained: c.totals.drained.Load(),
	}}
	if current != nil {
		s.Tunnel, s.Connector, s.Protocol = current.credentials.Tunnel, current.id, current.settings.Protocol
		s.Refused = current.refusal()
		s.Connections = current.connections()
	}
	for _, o := range sessions {
		if o != current {
			s.Connections = append(s.Connections, o.connections()...)
		}
	}
	return s
}

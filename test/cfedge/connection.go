package cfedge

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
)

// Connection is one that a connector has registered.
type Connection struct {
	ID        uuid.UUID
	Tunnel    uuid.UUID
	Connector uuid.UUID // of the process, or what it says it is
	Index     uint8     // as the connector counts its connections
	Protocol  string    // http2 or quic
	Server    string    // the address that was dialled
	Location  string
	Version   string // of the connector, in its own words
	Arch      string
	Features  []string
	Since     time.Time
	// Replace says that the connector asked to take the place of the connection
	// it had, and Attempts how many had failed before.
	Replace  bool
	Attempts uint8
	// PostQuantum says that the key exchange is hybrid, X25519MLKEM768.
	PostQuantum bool

	edge       *Edge
	link       link
	disconnect func()

	registered   atomic.Bool  // until it unregisters or is gone
	unregistered atomic.Bool  // it said goodbye
	draining     bool         // the edge sends nothing new; under its mu
	faulty       atomic.Int64 // until when the edge is to blame, Unix nanoseconds
	faults       atomic.Int64
	requests     atomic.Int64

	mu     sync.Mutex
	flying int
	landed chan struct{} // closed, and replaced, when flying becomes zero
	local  []byte
}

// link is a connection as its protocol has it.
type link interface {
	protocol() string
	// roundTrip carries a request and returns the connector's answer; an upgrade
	// is answered with status 101 and a body to write to.
	roundTrip(req *http.Request, upgrade bool) (*http.Response, error)
	// push hands over a configuration and returns the version in force.
	push(ctx context.Context, version int32, config []byte) (int32, error)
	dark(on bool)
	wedge(on bool)
	// abort ends it without goodbye.
	abort()
	// close ends it properly, for the edge's own reasons.
	close()
	// finish ends it after the connector's goodbye.
	finish()
	done() <-chan struct{}
}

// errAnswered is a connector's answer that it could not serve the request.
var errAnswered = errors.New("serve a request: the connector says it failed")

// InFlight returns how many requests are under way.
func (c *Connection) InFlight() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.flying
}

// Requests returns how many requests were sent over it.
func (c *Connection) Requests() int64 { return c.requests.Load() }

// Registered says whether it still is: neither has it said goodbye, nor has its
// link ended.
func (c *Connection) Registered() bool { return c.registered.Load() }

// Done is closed when the link has ended.
func (c *Connection) Done() <-chan struct{} { return c.link.done() }

// LocalConfig returns the configuration that the connector reported; nil: none.
func (c *Connection) LocalConfig() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.local)
}

// Kill cuts the connection as a machine does that dies: HTTP/2 is reset, QUIC
// is closed with an error.
func (c *Connection) Kill() {
	c.fault(true)
	c.link.abort()
	c.gone()
}

// Drain sends nothing new, and closes the connection when nothing is under way,
// as an edge does that is about to restart.
func (c *Connection) Drain() {
	c.edge.mu.Lock() // so that each request either is under way or goes elsewhere
	again := c.draining
	c.draining = true
	c.edge.mu.Unlock()
	if again {
		return
	}
	c.edge.spawn(func() {
		if c.settle() {
			c.link.close()
		}
	})
}

// Dark drops every packet of this connection in both directions.
func (c *Connection) Dark(on bool) {
	c.fault(on)
	c.link.dark(on)
}

// Wedge leaves the connection up, as far as the network goes, but the edge
// neither reads from it nor sends. Over QUIC the packets go on being
// acknowledged; no request starts, and the control stream is not answered.
func (c *Connection) Wedge(on bool) {
	c.fault(on)
	c.link.wedge(on)
}

// PushConfig hands the connector a configuration, JSON as the API has it, and
// returns the version that the connector says is in force.
func (c *Connection) PushConfig(ctx context.Context, version int32, config []byte) (int32, error) {
	applied, err := c.link.push(ctx, version, config)
	if err != nil {
		return 0, fmt.Errorf("push a configuration: %w", err)
	}
	return applied, nil
}

// configure pushes without waiting, as the edge does to a remotely managed
// tunnel when a connection registers and when the API is told another.
func (c *Connection) configure(version int32, config []byte) {
	c.edge.spawn(func() {
		ctx, cancel := context.WithTimeout(c.edge.ctx, handshakeTimeout)
		defer cancel()
		applied, err := c.PushConfig(ctx, version, config)
		c.edge.log.Info("configuration pushed", "connection", c.ID, "version", version, "applied", applied, "err", err)
	})
}

// recovery is for how long after a silence the edge is still to blame: what TCP
// and QUIC had under way is sent again, and the rest waits for it.
const recovery = 2 * time.Second

func (c *Connection) fault(on bool) {
	if on {
		c.faults.Add(1)
		c.faulty.Store(math.MaxInt64)
	} else {
		c.faulty.Store(time.Now().Add(recovery).UnixNano())
	}
}

// watch notes when the link ends.
func (c *Connection) watch() {
	<-c.link.done()
	c.gone()
}

// gone ends registration, and routing too, unless there was a goodbye: then the
// route goes when RouteLag is over, whatever became of the link.
func (c *Connection) gone() {
	if c.registered.Swap(false) {
		c.disconnect()
		c.edge.log.Info("connection lost", "connection", c.ID, "index", c.Index, "protocol", c.Protocol)
	}
	if !c.unregistered.Load() {
		c.edge.leave(c)
	}
}

// unregister is the connector's goodbye. Requests go on for RouteLag, and when
// the last is answered there is nothing left to keep the link for.
func (c *Connection) unregister() {
	c.unregistered.Store(true)
	if !c.registered.Swap(false) {
		return
	}
	c.disconnect()
	c.edge.mu.Lock()
	c.edge.announce()
	c.edge.mu.Unlock()
	c.edge.log.Info("connection unregistered", "connection", c.ID, "index", c.Index, "protocol", c.Protocol)
	c.edge.spawn(func() {
		timer := time.NewTimer(c.edge.opts.RouteLag)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-c.edge.ctx.Done():
		}
		c.edge.leave(c)
		if c.settle() {
			c.link.finish()
		}
	})
}

// settle waits until nothing is under way, and says whether the link is there to
// be finished.
func (c *Connection) settle() bool {
	for {
		c.mu.Lock()
		flying, landed := c.flying, c.landed
		c.mu.Unlock()
		if flying == 0 {
			return true
		}
		select {
		case <-landed:
		case <-c.link.done():
			return false
		case <-c.edge.ctx.Done():
			return false
		}
	}
}

// flight is one request on a connection.
type flight struct {
	connection *Connection
	what       string
	visitor    context.Context
	cancel     context.CancelCauseFunc
	faults     int64
	once       sync.Once
}

func (c *Connection) take(visitor context.Context, cancel context.CancelCauseFunc, what string) *flight {
	f := &flight{connection: c, what: what, visitor: visitor, cancel: cancel, faults: c.faults.Load()}
	if time.Now().UnixNano() < c.faulty.Load() {
		f.faults-- // as if it had begun just now
	}
	c.requests.Add(1)
	c.mu.Lock()
	c.flying++
	c.mu.Unlock()
	return f
}

// land counts how a request ended; only the first end counts, and says so.
func (f *flight) land(counter *atomic.Int64) (first bool) {
	f.once.Do(func() {
		first = true
		f.cancel(nil)
		counter.Add(1)
		c := f.connection
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.flying--; c.flying == 0 {
			close(c.landed)
			c.landed = make(chan struct{})
		}
	})
	return first
}

// fail counts a request that ended with err where it belongs.
func (f *flight) fail(err error) {
	c, counts := f.connection, &f.connection.edge.counts
	switch {
	case f.visitor.Err() != nil:
		f.land(&counts.canceled)
	case c.faults.Load() != f.faults, c.faults.Load() > 0 && c.linkEnded(), c.edge.ctx.Err() != nil:
		f.land(&counts.lost)
	default:
		counter, kind := &counts.failed, "failed"
		if c.unregistered.Load() {
			counter, kind = &counts.stale, "stale"
		}
		if f.land(counter) {
			c.edge.noteFailure(fmt.Sprintf("%s: %s over %s connection %d (%s): %v", kind, f.what, c.Protocol, c.Index, c.ID, err))
		}
	}
}

// linkEnded says whether the link has ended. Its requests hear of that first, so
// it waits a moment for the news.
func (c *Connection) linkEnded() bool {
	timer := time.NewTimer(100 * time.Millisecond)
	defer timer.Stop()
	select {
	case <-c.link.done():
		return true
	case <-timer.C:
		return false
	}
}

// body is a response's, watched to its end.
type body struct {
	io.ReadCloser
	flight *flight
	// left is what Content-Length still promises; negative: it promised nothing.
	left int64
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.left >= 0 {
		b.left -= int64(n)
		switch {
		case b.left < 0:
			err = errors.New("read a response: longer than Content-Length says")
		case err == io.EOF && b.left > 0:
			err = io.ErrUnexpectedEOF
		}
	}
	switch {
	case err == io.EOF:
		b.flight.land(&b.flight.connection.edge.counts.answered)
	case err != nil:
		b.flight.fail(err)
	}
	return n, err
}

func (b *body) Close() error {
	// A visitor that has read all that was promised need not wait for the end.
	if b.left == 0 {
		b.flight.land(&b.flight.connection.edge.counts.answered)
	}
	b.flight.land(&b.flight.connection.edge.counts.canceled)
	return b.ReadCloser.Close()
}

// tunnelled is the body of an upgraded connection: either side may end it.
type tunnelled struct {
	io.ReadWriteCloser
	flight *flight
}

func (t *tunnelled) Read(p []byte) (int, error) {
	n, err := t.ReadWriteCloser.Read(p)
	switch {
	case err == io.EOF:
		t.flight.land(&t.flight.connection.edge.counts.answered)
	case err != nil:
		t.flight.fail(err)
	}
	return n, err
}

func (t *tunnelled) Close() error {
	// The end is said before the request is over, which would cut it short.
	err := t.ReadWriteCloser.Close()
	t.flight.land(&t.flight.connection.edge.counts.answered)
	return err
}

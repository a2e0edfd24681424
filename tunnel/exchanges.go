package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"

	"github.com/edgeward/edgeward/internal/decision"
)

// mostExchanges is how many requests may be with origin services at a time. It is
// more than a home has visitors for, and what they cost fits into a small pod.
const mostExchanges = 4096

// exchanges are the requests that origin services have, each until the last of
// its response. A request is judged when it comes; a download, an event stream or
// a WebSocket lasts for hours or days, so all that is under way is judged again
// whenever the decisions change. All others pay for that by a place on a list,
// and are looked up no second time.
type exchanges struct {
	mu    sync.Mutex
	first *exchange
	n     int
}

// An exchange is one of them. It is the body of its response as well, and of its
// request where that has one.
type exchange struct {
	of      *exchanges
	in      *incoming
	path    string
	request io.ReadCloser // nil for no body

	// ctx is that of the request to the origin service: it ends with the visitor,
	// with the exchange, and when that is cut.
	ctx    context.Context
	cancel context.CancelFunc
	cut    atomic.Bool // its visitor is banned by now

	// Under of.mu.
	next, prev *exchange
	ended      bool
	verdict    *decision.Verdict // for which it was cut
	response   io.ReadCloser     // nil until there is one; set once
}

// errCut ends what a banned visitor has under way.
var errCut = errors.New("the visitor is banned by now")

// begin adds an exchange, if there is room.
func (x *exchanges) begin(req *http.Request, in *incoming) (e *exchange, ok bool) {
	e = &exchange{of: x, in: in, path: req.URL.Path}
	e.ctx, e.cancel = context.WithCancel(req.Context())
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.n >= mostExchanges {
		e.cancel()
		return nil, false
	}
	x.n++
	if e.next = x.first; e.next != nil {
		e.next.prev = e
	}
	x.first = e
	return e, true
}

// end takes the exchange off the list, once.
func (e *exchange) end() {
	defer e.cancel()
	e.of.mu.Lock()
	defer e.of.mu.Unlock()
	if e.ended {
		return
	}
	e.ended = true
	e.of.n--
	if e.next != nil {
		e.next.prev = e.prev
	}
	if e.prev != nil {
		e.prev.next = e.next
	} else {
		e.of.first = e.next
	}
	e.next, e.prev = nil, nil
}

// roundTrip has the origin service answer. A transport that is told to stop may
// wait for the next piece of an upload all the same, and who is banned need not
// send one: it is left behind, and ends with the visitor's stream.
func (e *exchange) roundTrip(by http.RoundTripper, out *http.Request) (*http.Response, error) {
	if e.request == nil {
		return by.RoundTrip(out)
	}
	type answer struct {
		res *http.Response
		err error
	}
	answers := make(chan answer, 1)
	go func() {
		var a answer
		defer func() {
			if v := recover(); v != nil {
				a = answer{err: fmt.Errorf("panic: %v", v)}
			}
			answers <- a
		}()
		a.res, a.err = by.RoundTrip(out)
	}()
	select {
	case a := <-answers:
		return a.res, a.err
	case <-e.ctx.Done():
		go func() {
			if a := <-answers; a.res != nil {
				_ = a.res.Body.Close()
			}
		}()
		return nil, e.ctx.Err()
	}
}

// answered hands over the response's body and returns what to read instead of
// it, or nil if the exchange was cut before.
func (e *exchange) answered(body io.ReadCloser) io.ReadCloser {
	e.of.mu.Lock()
	defer e.of.mu.Unlock()
	if e.cut.Load() {
		return nil
	}
	e.response = body
	if _, ok := body.(io.Writer); ok {
		return upgraded{e}
	}
	return e
}

// banned is what the visitor is told whose exchange was cut before it had an
// answer.
func (e *exchange) banned(set *setup) refusal {
	e.of.mu.Lock()
	defer e.of.mu.Unlock()
	r := blocked(set)
	r.Address, r.Decision = e.in.addr.String(), e.verdict.ID
	return r
}

// Read reads the response. Nothing that comes after the cut gets through.
func (e *exchange) Read(p []byte) (int, error) {
	n, err := e.response.Read(p)
	if e.cut.Load() {
		return 0, errCut
	}
	return n, err
}

// Close ends the response, and the exchange with it.
func (e *exchange) Close() error {
	defer e.end() // after the response, whose connection may serve another
	return e.response.Close()
}

// upgraded is the body of a response that the visitor writes to.
type upgraded struct{ *exchange }

func (u upgraded) Write(p []byte) (int, error) {
	if u.cut.Load() {
		return 0, errCut
	}
	return u.response.(io.Writer).Write(p)
}

// upload is the request's body.
type upload struct{ *exchange }

func (u upload) Read(p []byte) (int, error) {
	n, err := u.request.Read(p)
	if u.cut.Load() {
		return 0, errCut
	}
	return n, err
}

func (u upload) Close() error { return u.request.Close() }

// cutBanned ends what visitors who are banned by now have under way.
func (g *Gate) cutBanned() {
	g.exchanges.mu.Lock()
	all := make([]*exchange, 0, g.exchanges.n)
	for e := g.exchanges.first; e != nil; e = e.next {
		all = append(all, e)
	}
	g.exchanges.mu.Unlock()
	for _, e := range all {
		g.recheck(e)
	}
}

// recheck ends an exchange if its visitor is banned. What only slows new requests
// down leaves it alone, and so does an observer.
func (g *Gate) recheck(e *exchange) {
	config := g.setup.Load().config
	if !config.hasLAPI || config.Mode == Observe {
		return
	}
	verdict := g.feed.seen.Load().lookup(e.in.addr, e.in.country, g.clock.now())
	if verdict.Remediation == decision.Allow || verdict.Remediation == decision.Throttle {
		return
	}
	e.of.mu.Lock()
	if e.ended || e.cut.Load() {
		e.of.mu.Unlock()
		return
	}
	e.verdict = &verdict
	e.cut.Store(true)
	response := e.response
	e.of.mu.Unlock()
	g.counts.refused(verdict, e.in.addr, "stream", false)
	g.refusals.line("stream cut", append([]any{
		"layer", "tunnel", "reason", "stream", "address", e.in.addr.String(), "host", shortened(e.in.host), "path", shortened(e.path),
	}, g.provenance(verdict, e.in.country)...)...)
	e.cancel()
	if response != nil {
		go response.Close() // over TLS it may have to wait for a write
	}
}

package tunnel

import (
	"io"
	"net/http"
	"net/netip"
	"sync"

	"github.com/edgeward/edgeward/internal/decision"
)

// streams are the upgraded connections under way. A request is judged when it
// comes, and that is soon over; a WebSocket lasts for days, so it is judged again
// whenever the decisions change.
type streams struct {
	mu   sync.Mutex
	open map[*stream]struct{}
}

// stream is one of them: the connection to the origin service, and who has it.
type stream struct {
	io.ReadWriteCloser
	of                  *streams
	addr                netip.Addr
	country, host, path string
}

// Close ends the connection, which ends the visitor's side too.
func (s *stream) Close() error {
	s.of.mu.Lock()
	delete(s.of.open, s)
	s.of.mu.Unlock()
	return s.ReadWriteCloser.Close()
}

// follow keeps an upgraded connection in sight until it ends. The decision that
// ends it may have come since its request was judged.
func (g *Gate) follow(req *http.Request, in *incoming, res *http.Response) {
	conn, ok := res.Body.(io.ReadWriteCloser)
	if !ok {
		return // the connector refuses it
	}
	s := &stream{ReadWriteCloser: conn, of: &g.streams, addr: in.addr, country: in.country, host: in.host, path: req.URL.Path}
	res.Body = s
	g.streams.mu.Lock()
	if g.streams.open == nil {
		g.streams.open = map[*stream]struct{}{}
	}
	g.streams.open[s] = struct{}{}
	g.streams.mu.Unlock()
	g.recheck(s)
}

// cutBanned ends the streams of visitors who are banned by now.
func (g *Gate) cutBanned() {
	g.streams.mu.Lock()
	open := make([]*stream, 0, len(g.streams.open))
	for s := range g.streams.open {
		open = append(open, s)
	}
	g.streams.mu.Unlock()
	for _, s := range open {
		g.recheck(s)
	}
}

// recheck ends a stream if its visitor is banned. What only slows new requests
// down leaves it alone, and so does an observer.
func (g *Gate) recheck(s *stream) {
	config := g.setup.Load().config
	if !config.hasLAPI || config.Mode == Observe {
		return
	}
	verdict := g.feed.seen.Load().lookup(s.addr, s.country, g.now())
	if verdict.Remediation == decision.Allow || verdict.Remediation == decision.Throttle {
		return
	}
	s.of.mu.Lock()
	_, open := s.of.open[s]
	delete(s.of.open, s)
	s.of.mu.Unlock()
	if !open {
		return
	}
	g.counts.refused(verdict, s.addr, "stream", false)
	g.refusals.line("stream cut", append([]any{
		"layer", "tunnel", "reason", "stream", "address", s.addr.String(), "host", shortened(s.host), "path", shortened(s.path),
	}, provenance(verdict, s.country)...)...)
	go s.ReadWriteCloser.Close() // over TLS it may have to wait for a write
}

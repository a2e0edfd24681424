package cloudflare

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cloudflare/cloudflared/client"
	"github.com/cloudflare/cloudflared/connection"
	cfdquic "github.com/cloudflare/cloudflared/quic"
	"github.com/cloudflare/cloudflared/tracing"
	"github.com/cloudflare/cloudflared/tunnelrpc/pogs"
	"github.com/google/uuid"
	"github.com/quic-go/quic-go"
	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"
)

// A transport is an encrypted connection to the edge.
type transport struct {
	protocol    Protocol
	local       net.IP
	keyExchange string
	// One of the two is set.
	tcp  *watchedConn
	quic cfdquic.QUICConnection
}

// A watchedConn is a TLS connection that remembers how it ended. It does not show
// that it is one: to net/http, HTTP/2 without ALPN, as the edge speaks it, is
// something that only connections in clear text have.
type watchedConn struct {
	net.Conn
	closed  chan struct{} // by this side
	closing sync.Once
	mu      sync.Mutex
	end     error // of the first read or write that failed
}

func (c *watchedConn) Close() error {
	c.closing.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

func (c *watchedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.note(err)
	return n, err
}

func (c *watchedConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.note(err)
	return n, err
}

func (c *watchedConn) note(err error) {
	if err == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.end == nil {
		c.end = err
	}
}

// over says whether the connection has ended.
func (t transport) over() bool {
	if t.quic != nil {
		return t.quic.Context().Err() != nil
	}
	select {
	case <-t.tcp.closed:
		return true
	default:
	}
	t.tcp.mu.Lock()
	defer t.tcp.mu.Unlock()
	return t.tcp.end != nil
}

// cause says why the connection is no more, in words that are the same for the
// same cause.
func (t transport) cause() error {
	var end error
	if t.tcp != nil {
		t.tcp.mu.Lock()
		end = t.tcp.end
		t.tcp.mu.Unlock()
		// Given up by the HTTP/2 server, or by the kernel.
		if end == nil || errors.Is(end, net.ErrClosed) || errors.Is(end, unix.ETIMEDOUT) {
			return errSilence
		}
	} else {
		end = context.Cause(t.quic.Context())
		if _, ok := errors.AsType[*quic.IdleTimeoutError](end); ok {
			return errSilence
		}
	}
	if end == nil || errors.Is(end, io.EOF) {
		return errConnectionEnded
	}
	return fmt.Errorf("%w: %w", errConnectionEnded, withoutAddresses(end))
}

// close ends the connection at once.
func (t transport) close() {
	if t.tcp != nil {
		_ = t.tcp.Close()
	} else {
		_ = t.quic.CloseWithError(0, "")
	}
}

// A link is one connection to the edge with all that is served over it.
type link struct {
	transport
	session *session
	slot    int
	address netip.AddrPort
	network string // towards the address, as Memory names it
	library *zerolog.Logger
	http    http.Server // over TCP: tells the edge to go away

	inFlight     atomic.Int64
	asked        atomic.Bool // the control stream is taken
	unregistered chan struct{}
	released     chan struct{} // the edge has closed the control stream
	ended        chan struct{}

	mu    sync.Mutex
	why   error
	since time.Time // registered; zero before
}

var (
	errConnectionEnded = errors.New("the edge closed the connection")
	errSilence         = errors.New("the edge fell silent")
	errNotRegistered   = errors.New("the edge did not register the connection in time")
)

// start serves the link until it ends.
func (l *link) start() {
	stop := context.AfterFunc(l.session.ctx, l.close)
	patience := time.AfterFunc(2*l.session.pace.rpc, func() {
		if l.registeredSince().IsZero() {
			l.fail(errNotRegistered)
		}
	})
	go func() {
		defer close(l.ended)
		defer stop()
		defer patience.Stop()
		if l.tcp != nil {
			l.serveHTTP2()
		} else {
			l.serveQUIC()
		}
		l.fail(l.transport.cause())
		// The streams are dead, and their requests' contexts with them: their
		// handlers return, and nothing of this link is left running.
		l.waitIdle(context.Background(), 2*time.Second)
	}()
}

// fail ends the link for a reason; the first one counts.
func (l *link) fail(why error) {
	l.mu.Lock()
	if l.why == nil {
		l.why = why
	}
	l.mu.Unlock()
	l.close()
}

func (l *link) reason() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.why == nil {
		return errConnectionEnded
	}
	return l.why
}

func (l *link) registeredSince() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.since
}

// linger serves on for the lame duck, then while requests are in flight, for
// the grace at most, and closes the link.
func (l *link) linger() {
	defer func() { l.close(); <-l.ended }()
	select {
	case <-l.unregistered:
	case <-l.ended: // with registration given up, if it was under way
		return
	}
	l.session.connector.totals.drained.Add(1)
	lame := time.NewTimer(l.session.settings.LameDuck)
	defer lame.Stop()
	select {
	case <-lame.C:
	case <-l.ended:
		return
	}
	if !l.waitIdle(l.session.ctx, l.session.settings.Grace) {
		l.session.log.Warn("requests cut", "connection", l.slot, "requests", l.inFlight.Load(),
			"grace", l.session.settings.Grace.String())
		return
	}
	// What the last response left in buffers is still on its way. Over HTTP/2 a
	// GOAWAY follows it, by which the edge knows of a request that crosses it that
	// it was not served, and then the end. To close a QUIC connection drops what
	// was not acknowledged.
	flush := l.session.pace.flush
	if l.tcp != nil {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		go func() { _ = l.http.Shutdown(ctx) }() // which waits, and so does this
		flush = 2 * time.Second                  // the end comes sooner
	}
	bye := time.NewTimer(flush)
	defer bye.Stop()
	select {
	case <-bye.C:
	case <-l.ended:
	}
}

// waitIdle waits until no request is in flight and says whether that is so.
func (l *link) waitIdle(ctx context.Context, atMost time.Duration) bool {
	if l.inFlight.Load() == 0 {
		return true
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	end := time.NewTimer(atMost)
	defer end.Stop()
	for {
		select {
		case <-tick.C:
			if l.inFlight.Load() == 0 {
				return true
			}
		case <-end.C:
			return false
		case <-ctx.Done():
			return false
		}
	}
}

// connectionWindow is how much of all uploads may be under way over one HTTP/2
// connection: as much as net/http takes, and four times a stream's, so that an
// upload to a slow origin service does not hold up the others.
const connectionWindow = 4<<20 - 1

// serveHTTP2 serves the link as an HTTP/2 server, whose client is the edge.
func (l *link) serveHTTP2() {
	l.http.Handler = l
	l.http.BaseContext = func(net.Listener) context.Context { return l.session.ctx }
	l.http.ErrorLog = slog.NewLogLogger(l.session.log.Handler(), slog.LevelDebug)
	l.http.Protocols = new(http.Protocols)
	l.http.Protocols.SetUnencryptedHTTP2(true)
	l.http.HTTP2 = &http.HTTP2Config{
		MaxConcurrentStreams:          math.MaxUint16,
		MaxReceiveBufferPerConnection: connectionWindow,
		SendPingTimeout:               l.session.pace.silence,
		PingTimeout:                   l.session.pace.silence,
	}
	_ = l.http.Serve(&soleListener{conn: l.tcp}) // why it ended, the connection knows
}

// A soleListener has one connection, and lasts as long as that.
type soleListener struct {
	conn  *watchedConn
	taken bool
}

func (s *soleListener) Accept() (net.Conn, error) {
	if !s.taken {
		s.taken = true
		return s.conn, nil
	}
	<-s.conn.closed
	return nil, net.ErrClosed
}

func (s *soleListener) Close() error   { return nil }
func (s *soleListener) Addr() net.Addr { return s.conn.LocalAddr() }

// ServeHTTP serves one stream of an HTTP/2 link.
func (l *link) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	kind := connection.TypeHTTP
	upgrade := r.Header.Get(connection.InternalUpgradeHeader)
	switch {
	case upgrade == connection.ControlStreamUpgrade:
		kind = connection.TypeControlStream
	case upgrade == connection.ConfigurationUpdate:
		kind = connection.TypeConfiguration
	case upgrade == connection.WebsocketUpgrade:
		kind = connection.TypeWebsocket
	case connection.IsTCPStream(r):
		kind = connection.TypeTCP
	}
	answer, err := connection.NewHTTP2RespWriter(r, w, kind, l.library)
	if err != nil {
		return // it has answered
	}
	switch kind {
	case connection.TypeControlStream:
		control := &sealable{ReadWriteCloser: answer}
		err = l.ServeControlStream(r.Context(), control, nil, nil)
		control.seal()
	case connection.TypeConfiguration:
		// What the dashboard would have a connector do is not what is done here.
		err = acknowledge(answer, r.Body)
	case connection.TypeTCP:
		err = errNotServed
	default:
		r.Header.Del(connection.InternalUpgradeHeader)
		err = l.exchange(answer, r, kind == connection.TypeWebsocket)
	}
	if err != nil && !answer.WriteErrorResponse(err) {
		panic(http.ErrAbortHandler) // resets the stream, so that the edge knows
	}
}

// A sealable stream can be written to until it is sealed. The RPC session writes
// from a goroutine of its own and may do so once more after its end, while a
// response writer must not be touched after its handler, as another stream's
// response may have it by then.
type sealable struct {
	io.ReadWriteCloser
	mu     sync.Mutex
	sealed bool
}

func (s *sealable) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sealed {
		return 0, io.ErrClosedPipe
	}
	return s.ReadWriteCloser.Write(p)
}

// seal waits for a write that is under way.
func (s *sealable) seal() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sealed = true
}

// errNotServed answers what is not HTTP.
var errNotServed = errors.New("only HTTP is served here")

// serveQUIC serves the link through cloudflared's QUIC layer.
func (l *link) serveQUIC() {
	s := l.session
	// Its grace is 0: the control stream is kept until the link has drained.
	_ = connection.NewTunnelConnection(s.ctx, l.quic, uint8(l.slot), orchestra{l}, noDatagrams{l.quic}, l,
		&client.ConnectionOptionsSnapshot{}, s.pace.rpc, 0, 0, l.library).Serve(s.ctx)
}

// orchestra is what cloudflared asks for configuration and for its proxy.
type orchestra struct{ *link }

func (o orchestra) GetConfigJSON() ([]byte, error) { return []byte(localConfiguration), nil }

func (o orchestra) GetOriginProxy() (connection.OriginProxy, error) { return o, nil }

// UpdateConfig acknowledges what the edge pushes.
func (o orchestra) UpdateConfig(version int32, _ []byte) *pogs.UpdateConfigurationResponse {
	return &pogs.UpdateConfigurationResponse{LastAppliedVersion: version}
}

func (o orchestra) ProxyHTTP(w connection.ResponseWriter, r *tracing.TracedHTTPRequest, websocket bool) error {
	// cloudflared leaves 0 for a body whose length the visitor did not give, and
	// NoBody where there is none.
	if !websocket && r.ContentLength == 0 && r.Body != http.NoBody {
		r.ContentLength = -1
	}
	return o.exchange(w, r.Request, websocket)
}

func (o orchestra) ProxyTCP(context.Context, connection.ReadWriteAcker, *connection.TCPRequest) error {
	return errNotServed
}

// noDatagrams serves no UDP and no ICMP.
type noDatagrams struct{ cfdquic.QUICConnection }

// Serve lasts as long as the connection.
func (d noDatagrams) Serve(ctx context.Context) error {
	select {
	case <-ctx.Done():
	case <-d.Context().Done():
	}
	return errConnectionEnded
}

func (d noDatagrams) RegisterUdpSession(context.Context, uuid.UUID, net.IP, uint16, time.Duration, string) (*pogs.RegisterUdpSessionResponse, error) {
	return nil, errNotServed
}

func (d noDatagrams) UnregisterUdpSession(context.Context, uuid.UUID, string) error {
	return errNotServed
}

var (
	_ connection.ControlStreamHandler   = (*link)(nil)
	_ connection.Orchestrator           = orchestra{}
	_ connection.DatagramSessionHandler = noDatagrams{}
	_ io.Writer                         = libraryWriter{}
)

package cfedge

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cloudflare/cloudflared/connection"
	"github.com/cloudflare/cloudflared/tunnelrpc/pogs"
	rpcquic "github.com/cloudflare/cloudflared/tunnelrpc/quic"
	"github.com/quic-go/quic-go"
)

// quicLink is a connection over QUIC: the connector's first stream is the
// control stream, and each request is a stream that the edge opens.
type quicLink struct {
	server *server
	conn   quic.Connection

	mu     sync.Mutex
	wedged chan struct{} // closed when it is no longer so; nil: it is not
}

func (s *server) quicConfig() *quic.Config {
	return &quic.Config{
		HandshakeIdleTimeout: handshakeTimeout / 2,
		MaxIdleTimeout:       10 * time.Second, // the connector's shorter one decides
		EnableDatagrams:      true,
	}
}

func (s *server) acceptQUIC(listener *quic.Listener) {
	for {
		conn, err := listener.Accept(s.edge.ctx)
		if err != nil {
			return // the edge is closing
		}
		s.edge.spawn(func() { s.serveQUIC(conn) })
	}
}

func (s *server) serveQUIC(conn quic.Connection) {
	l := &quicLink{server: s, conn: conn}
	defer l.silencePort(false)
	defer context.AfterFunc(s.edge.ctx, l.abort)()
	opened, cancel := context.WithTimeout(conn.Context(), handshakeTimeout)
	control, err := conn.AcceptStream(opened)
	cancel()
	if err != nil {
		l.abort()
		return
	}
	r := &registrar{server: s, link: l, remote: conn.RemoteAddr(), postQuantum: conn.ConnectionState().TLS.CurveID == tls.X25519MLKEM768}
	r.serve(conn.Context(), &controlStream{control, l})
	<-conn.Context().Done()
}

func (l *quicLink) protocol() string      { return "quic" }
func (l *quicLink) done() <-chan struct{} { return l.conn.Context().Done() }
func (l *quicLink) abort()                { _ = l.conn.CloseWithError(1, "killed") }
func (l *quicLink) close()                { _ = l.conn.CloseWithError(0, "") }
func (l *quicLink) dark(on bool)          { l.silencePort(on) }

// finish leaves a QUIC connection to its connector, which closes it when its
// grace is over.
func (l *quicLink) finish() {}

func (l *quicLink) silencePort(on bool) {
	if remote, ok := l.conn.RemoteAddr().(*net.UDPAddr); ok {
		l.server.udp.silencePort(uint16(remote.Port), on)
	}
}

func (l *quicLink) wedge(on bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case on && l.wedged == nil:
		l.wedged = make(chan struct{})
	case !on && l.wedged != nil:
		close(l.wedged)
		l.wedged = nil
	}
}

// pass waits until the connection is not wedged.
func (l *quicLink) pass(ctx context.Context) error {
	l.mu.Lock()
	wedged := l.wedged
	l.mu.Unlock()
	if wedged == nil {
		return nil
	}
	select {
	case <-wedged:
		return nil
	case <-l.done():
		return context.Cause(l.conn.Context())
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// open opens a stream for a request.
func (l *quicLink) open(ctx context.Context) (quic.Stream, error) {
	if err := l.pass(ctx); err != nil {
		return nil, err
	}
	return l.conn.OpenStreamSync(ctx)
}

// controlStream is one that a wedged edge leaves unread.
type controlStream struct {
	quic.Stream
	link *quicLink
}

func (s *controlStream) Read(p []byte) (int, error) {
	n, err := s.Stream.Read(p)
	if passed := s.link.pass(s.link.conn.Context()); passed != nil && err == nil {
		return 0, passed
	}
	return n, err
}

func (s *controlStream) Write(p []byte) (int, error) {
	if err := s.link.pass(s.link.conn.Context()); err != nil {
		return 0, err
	}
	return s.Stream.Write(p)
}

func (l *quicLink) roundTrip(req *http.Request, upgrade bool) (*http.Response, error) {
	ctx := req.Context()
	body := req.Body
	if body == nil {
		body = http.NoBody
	}
	stream, err := l.open(ctx)
	if err != nil {
		body.Close()
		return nil, err
	}
	x := &quicStream{Stream: stream, upgraded: upgrade}
	x.forget = context.AfterFunc(ctx, x.reset)
	fail := func(err error) (*http.Response, error) {
		body.Close()
		x.Close()
		return nil, err
	}
	kind := pogs.ConnectionTypeHTTP
	if upgrade {
		kind = pogs.ConnectionTypeWebsocket
	}
	target := *req.URL
	target.Scheme, target.Host = "https", req.Host
	codec := &rpcquic.RequestClientStream{ReadWriteCloser: stream}
	if err := codec.WriteConnectRequestData(target.String(), kind, metadata(req, upgrade)...); err != nil {
		return fail(err)
	}
	switch {
	case upgrade:
		body.Close()
	case body == http.NoBody || req.ContentLength == 0:
		body.Close()
		x.endWrite()
	default:
		go x.send(body, req.ContentLength)
	}
	answer, err := codec.ReadConnectResponseData()
	if err != nil {
		return fail(err)
	}
	if answer.Error != "" {
		return fail(fmt.Errorf("%w: %s", errAnswered, answer.Error))
	}
	resp := &http.Response{
		Proto: "HTTP/2.0", ProtoMajor: 2, Request: req,
		Header: http.Header{}, ContentLength: -1, Body: x,
	}
	for _, m := range answer.Metadata {
		if m.Key == connection.HTTPStatus {
			if resp.StatusCode, err = strconv.Atoi(m.Val); err != nil {
				return fail(fmt.Errorf("read a response: status %q", m.Val))
			}
		}
		if name, ok := strings.CutPrefix(m.Key, connection.HTTPHeaderKey+":"); ok {
			resp.Header.Add(name, m.Val)
		}
	}
	if resp.StatusCode == 0 {
		return fail(errors.New("read a response: there is no status"))
	}
	if length := resp.Header.Get("Content-Length"); length != "" {
		if resp.ContentLength, err = strconv.ParseInt(length, 10, 64); err != nil || resp.ContentLength < 0 {
			return fail(fmt.Errorf("read a response: Content-Length %q", length))
		}
	}
	if upgrade && resp.StatusCode != http.StatusSwitchingProtocols {
		x.endWrite()
	}
	return resp, nil
}

// metadata is a request's head as it travels before the body.
func metadata(req *http.Request, upgrade bool) []pogs.Metadata {
	all := []pogs.Metadata{
		{Key: connection.HTTPMethodKey, Val: req.Method},
		{Key: connection.HTTPHostKey, Val: req.Host},
	}
	add := func(name, value string) {
		all = append(all, pogs.Metadata{Key: connection.HTTPHeaderKey + ":" + name, Val: value})
	}
	for name, values := range req.Header {
		for _, value := range values {
			add(name, value)
		}
	}
	switch {
	case upgrade:
		add(connection.InternalUpgradeHeader, connection.WebsocketUpgrade)
	case req.Body == nil || req.Body == http.NoBody:
	case req.ContentLength > 0:
		add("Content-Length", strconv.FormatInt(req.ContentLength, 10))
	case req.ContentLength < 0:
		// Without this a connector takes a request for one without a body.
		add("Transfer-Encoding", "chunked")
	}
	return all
}

func (l *quicLink) push(ctx context.Context, version int32, config []byte) (int32, error) {
	stream, err := l.open(ctx)
	if err != nil {
		return 0, err
	}
	x := &quicStream{Stream: stream}
	x.forget = context.AfterFunc(ctx, x.reset)
	defer x.Close()
	timeout := handshakeTimeout
	client, err := rpcquic.NewCloudflaredClient(ctx, stream, timeout)
	if err != nil {
		return 0, err
	}
	defer client.Close()
	ack, err := client.UpdateConfiguration(ctx, version, config)
	if err != nil {
		return 0, err
	}
	if ack.Err != nil {
		return ack.LastAppliedVersion, fmt.Errorf("the connector refuses it: %w", ack.Err)
	}
	return ack.LastAppliedVersion, nil
}

// quicStream is a request's stream. Its two directions end apart, and writing
// and ending one may not be done at once.
type quicStream struct {
	quic.Stream
	forget func() bool

	upgraded bool
	mu       sync.Mutex
	ended    bool
}

func (x *quicStream) Write(p []byte) (int, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.ended {
		return 0, io.ErrClosedPipe
	}
	return x.Stream.Write(p)
}

func (x *quicStream) endWrite() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.ended {
		return nil
	}
	x.ended = true
	return x.Stream.Close()
}

// CloseWrite ends what the visitor says, while it goes on listening.
func (x *quicStream) CloseWrite() error { return x.endWrite() }

// reset tells the connector that nobody is interested any more.
func (x *quicStream) reset() {
	x.CancelRead(0)
	x.CancelWrite(0)
}

// send sends a body, and ends the stream when it is complete.
func (x *quicStream) send(body io.ReadCloser, length int64) {
	n, err := io.Copy(struct{ io.Writer }{x}, body)
	body.Close()
	if err == nil && length >= 0 && n != length {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		x.CancelWrite(0)
		return
	}
	x.endWrite()
}

// Close gives the stream back. What was not read by then is given up, and so is
// a body that was not sent.
func (x *quicStream) Close() error {
	x.forget()
	x.CancelRead(0)
	if !x.mu.TryLock() {
		x.CancelWrite(0) // somebody is writing, maybe for ever
		return nil
	}
	defer x.mu.Unlock()
	switch {
	case x.ended:
	case x.upgraded:
		x.Stream.Close()
	default:
		x.CancelWrite(0)
	}
	x.ended = true
	return nil
}

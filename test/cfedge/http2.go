package cfedge

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/cloudflare/cloudflared/connection"
)

// h2Link is a connection over HTTP/2: the connector dials and then is the
// server; the edge is the client. The control stream is a request of the edge
// that does not end, and so is a WebSocket.
type h2Link struct {
	gate   *gate
	client *http.ClientConn
	mute   chan struct{} // closed when the control stream has ended
}

// handshakeTimeout bounds what a connector does before it registers.
const handshakeTimeout = 10 * time.Second

func (s *server) acceptTCP() {
	for {
		conn, err := s.tcp.AcceptTCP()
		if err != nil {
			return // the listener is closed
		}
		g := s.edge.newGate(conn)
		if !s.edge.spawn(func() { s.serveTCP(g) }) {
			g.Close()
		}
	}
}

func (s *server) serveTCP(g *gate) {
	defer g.Close()
	ctx, cancel := context.WithCancel(s.edge.ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { g.Close() })()
	shaken, stop := context.WithTimeout(ctx, handshakeTimeout)
	defer stop()
	conn := tls.Server(g, s.edge.tlsConfig(http2ServerName, nil))
	if err := conn.HandshakeContext(shaken); err != nil {
		s.edge.log.Info("handshake failed", "protocol", "http2", "err", err)
		return
	}
	client, err := speakHTTP2(shaken, conn)
	if err != nil {
		s.edge.log.Info("handshake failed", "protocol", "http2", "err", err)
		return
	}
	l := &h2Link{gate: g, client: client, mute: make(chan struct{})}
	go func() {
		// A connector that never answers would keep the request waiting.
		select {
		case <-g.done:
			cancel()
		case <-ctx.Done():
		}
	}()
	out, in := io.Pipe()
	req := l.request(ctx, http.MethodGet, &url.URL{Path: "/"}, "", out)
	req.Header.Set(connection.InternalUpgradeHeader, connection.ControlStreamUpgrade)
	resp, err := client.RoundTrip(req)
	if err != nil {
		s.edge.log.Info("control stream failed", "protocol", "http2", "err", err)
		return
	}
	r := &registrar{server: s, link: l, remote: g.RemoteAddr(), postQuantum: conn.ConnectionState().CurveID == tls.X25519MLKEM768}
	r.serve(ctx, &duplex{resp.Body, in})
	close(l.mute)
	<-g.done
}

// speakHTTP2 makes the edge the client on a connection that it accepted. The
// connector, which asked for no protocol, takes HTTP/2 for granted.
func speakHTTP2(ctx context.Context, conn net.Conn) (*http.ClientConn, error) {
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true) // it is encrypted, but not by the client
	transport := &http.Transport{
		Protocols: protocols, DisableCompression: true,
		DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil },
	}
	return transport.NewClientConn(ctx, "http", "connector:80")
}

// request makes one as the edge sends it; the host goes into :authority.
func (l *h2Link) request(ctx context.Context, method string, target *url.URL, host string, body io.ReadCloser) *http.Request {
	u := *target
	u.Scheme, u.Host = "https", host
	if u.Host == "" {
		u.Host = "localhost:8080"
	}
	req := &http.Request{Method: method, URL: &u, Host: u.Host, Header: http.Header{"User-Agent": {""}}, Body: body, ContentLength: -1}
	return req.WithContext(ctx)
}

func (l *h2Link) protocol() string      { return "http2" }
func (l *h2Link) done() <-chan struct{} { return l.gate.done }
func (l *h2Link) dark(on bool)          { l.gate.dark(on) }
func (l *h2Link) wedge(on bool)         { l.gate.wedge(on) }
func (l *h2Link) abort()                { l.gate.reset() }

func (l *h2Link) close() { l.gate.Close() }

func (l *h2Link) finish() {
	// The control stream, on which the goodbye was said, takes a moment to end.
	timer := time.NewTimer(handshakeTimeout)
	defer timer.Stop()
	select {
	case <-l.mute:
	case <-timer.C:
	case <-l.gate.done:
	}
	l.gate.Close()
}

func (l *h2Link) roundTrip(req *http.Request, upgrade bool) (*http.Response, error) {
	out := l.request(req.Context(), req.Method, req.URL, req.Host, req.Body)
	out.Header = req.Header
	out.ContentLength = req.ContentLength
	if out.Header.Get("User-Agent") == "" {
		out.Header["User-Agent"] = []string{""} // or the library adds its own
	}
	var in *io.PipeWriter
	if upgrade {
		var pipe *io.PipeReader
		pipe, in = io.Pipe()
		if req.Body != nil {
			req.Body.Close()
		}
		out.Body, out.ContentLength = pipe, -1
		out.Header.Set(connection.InternalUpgradeHeader, connection.WebsocketUpgrade)
	}
	resp, err := l.client.RoundTrip(out)
	if err != nil {
		return nil, err
	}
	meta := resp.Header.Get(connection.ResponseMetaHeader)
	header, err := userHeaders(resp.Header)
	if err != nil {
		resp.Body.Close()
		return nil, err
	}
	if source := new(struct{ Src string }); json.Unmarshal([]byte(meta), source) != nil || source.Src != "origin" {
		resp.Body.Close()
		return nil, fmt.Errorf("%w: status %d, meta %q", errAnswered, resp.StatusCode, meta)
	}
	// HTTP/2 has no 101, so a connector says 200 and keeps the other headers.
	if upgrade && resp.StatusCode == http.StatusOK && strings.EqualFold(header.Get("Upgrade"), "websocket") {
		resp.StatusCode = http.StatusSwitchingProtocols
		resp.Body = &duplex{resp.Body, in}
		resp.ContentLength = -1
	} else if upgrade {
		in.Close()
	}
	// The response itself is passed on, for its trailers arrive in it.
	resp.Header = header
	return resp, nil
}

// userHeaders unpacks the origin's headers, which travel in one of HTTP/2's.
func userHeaders(packed http.Header) (http.Header, error) {
	all, err := connection.DeserializeHeaders(packed.Get(connection.ResponseUserHeaders))
	if err != nil {
		return nil, fmt.Errorf("read a response's headers: %w", err)
	}
	header := http.Header{}
	for _, h := range all {
		header.Add(h.Name, h.Value)
	}
	if length := packed.Get("Content-Length"); length != "" {
		header.Set("Content-Length", length)
	}
	return header, nil
}

func (l *h2Link) push(ctx context.Context, version int32, config []byte) (int32, error) {
	text, err := json.Marshal(connection.ConfigurationUpdateBody{Version: version, Config: config})
	if err != nil {
		return 0, err
	}
	req := l.request(ctx, http.MethodPut, &url.URL{Path: "/"}, "", io.NopCloser(bytes.NewReader(text)))
	req.ContentLength = int64(len(text))
	req.Header.Set(connection.InternalUpgradeHeader, connection.ConfigurationUpdate)
	resp, err := l.client.RoundTrip(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	var ack struct {
		LastAppliedVersion int32           `json:"lastAppliedVersion"`
		Err                json.RawMessage `json:"err"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&ack); err != nil {
		return 0, errors.New("status " + strconv.Itoa(resp.StatusCode) + " without an acknowledgement")
	}
	if len(ack.Err) > 0 && string(ack.Err) != "null" {
		return ack.LastAppliedVersion, fmt.Errorf("the connector refuses it: %s", ack.Err)
	}
	return ack.LastAppliedVersion, nil
}

// duplex is a stream whose directions are a response's and a request's bodies.
type duplex struct {
	io.ReadCloser
	in *io.PipeWriter
}

func (d *duplex) Write(p []byte) (int, error) { return d.in.Write(p) }

// CloseWrite ends what the visitor says, while it goes on listening.
func (d *duplex) CloseWrite() error { return d.in.Close() }

func (d *duplex) Close() error {
	d.in.Close()
	return d.ReadCloser.Close()
}

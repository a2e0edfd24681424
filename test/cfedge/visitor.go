package cfedge

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/net/http/httpguts"
)

// Visitor is somebody on the Internet who asks the edge for a host. It is an
// http.RoundTripper, so an http.Client can stand on it; a request to upgrade to
// WebSocket is answered as http.Transport does, with status 101 and a body that
// is an io.ReadWriteCloser. As from the real edge there is always a response,
// unless the visitor leaves: what went wrong behind the edge is a status of 502,
// 524 or 530.
type Visitor struct {
	Edge *Edge
	// Addr is where the request comes from; zero: 192.0.2.1.
	Addr netip.Addr
	// Country is what the edge says of Addr; empty: XX, unknown.
	Country string
	// Tunnel is where requests go; zero: to where DNS says.
	Tunnel uuid.UUID
	// Via is the connection to take; nil: one at random, as the edge chooses.
	Via *Connection
}

// Visitor makes one with an address, and panics if it is none.
func (e *Edge) Visitor(addr string) Visitor {
	return Visitor{Edge: e, Addr: netip.MustParseAddr(addr)}
}

// Client returns an http.Client of this visitor. It follows no redirects.
func (v Visitor) Client() *http.Client {
	return &http.Client{Transport: v, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// maxHeader is how large a request's head may be, in bytes, as the real edge's
// documented limit.
const maxHeader = 128 << 10

// errSilent is a connector that took too long.
var errSilent = errors.New("wait for a response: the connector does not answer")

// RoundTrip sends a request through the edge. The scheme of its URL is what the
// visitor is said to have used.
func (v Visitor) RoundTrip(req *http.Request) (*http.Response, error) {
	e := v.Edge
	e.counts.requests.Add(1)
	drop := func() {
		if req.Body != nil {
			req.Body.Close()
		}
	}
	ray := newRay()
	upgrade := strings.EqualFold(req.Header.Get("Upgrade"), "websocket")
	ctx, cancel := context.WithCancelCause(req.Context())
	out := v.stamp(req, ray).WithContext(ctx)
	if status, text := judgeHead(out); status != 0 {
		defer cancel(nil)
		drop()
		e.counts.refused.Add(1)
		return e.page(req, ray, status, text), nil
	}
	if err := e.pause(req.Context()); err != nil {
		defer cancel(nil)
		drop()
		e.counts.canceled.Add(1)
		return nil, err
	}
	what := req.Method + " " + out.Host + out.URL.RequestURI()
	f, code := v.board(out.Host, func(c *Connection) *flight { return c.take(req.Context(), cancel, what) })
	if f == nil {
		defer cancel(nil)
		drop()
		e.counts.noTunnel.Add(1)
		return e.page(req, ray, 530, "error code: "+code), nil
	}
	timer := time.AfterFunc(e.opts.ResponseTimeout, func() { cancel(errSilent) })
	resp, err := f.connection.link.roundTrip(out, upgrade)
	timer.Stop()
	if err != nil {
		late := errors.Is(context.Cause(ctx), errSilent)
		if late {
			err = errSilent
		}
		f.fail(err)
		switch {
		case req.Context().Err() != nil:
			return nil, context.Cause(req.Context())
		case late:
			return e.page(req, ray, 524, "error code: 524"), nil
		}
		return e.page(req, ray, http.StatusBadGateway, "error code: 502"), nil
	}
	e.dress(req, resp, ray)
	switch stream, ok := resp.Body.(io.ReadWriteCloser); {
	case resp.StatusCode == http.StatusSwitchingProtocols && ok:
		resp.Header.Set("Connection", "Upgrade")
		resp.Header.Set("Upgrade", "websocket")
		resp.Body = &tunnelled{stream, f}
	case req.Method == http.MethodHead || resp.StatusCode == http.StatusNoContent || resp.StatusCode == http.StatusNotModified || resp.ContentLength == 0:
		// There is nothing to read, and a client need not try. Its end is awaited
		// all the same, for trailers come with it.
		_, err := io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		resp.Body = http.NoBody
		if err != nil {
			f.fail(err)
		}
		f.land(&e.counts.answered)
	default:
		resp.Body = &body{resp.Body, f, resp.ContentLength}
	}
	return resp, nil
}

// board finds the connection for a host and counts a request on it, in one step:
// a connection that is to end waits for its last. Without one it returns the
// error code that the visitor sees.
func (v Visitor) board(host string, take func(*Connection) *flight) (*flight, string) {
	if v.Via != nil {
		return take(v.Via), ""
	}
	tunnel := v.Tunnel
	if tunnel == (uuid.UUID{}) {
		name := host
		if h, _, err := net.SplitHostPort(host); err == nil {
			name = h
		}
		var ok bool
		if tunnel, ok = v.Edge.cloud.Route(name); !ok {
			return nil, "1016" // no record to follow
		}
	}
	v.Edge.mu.Lock()
	defer v.Edge.mu.Unlock()
	var fit []*Connection
	for _, c := range v.Edge.connections {
		if c.Tunnel == tunnel && !c.draining {
			fit = append(fit, c)
		}
	}
	if len(fit) == 0 {
		return nil, "1033" // no connection of the tunnel
	}
	return take(fit[mathrand.IntN(len(fit))]), ""
}

// hopByHop are headers that end at the edge.
var hopByHop = []string{
	"Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Proxy-Connection",
	"Trailer", "Transfer-Encoding", "Upgrade", "Expect", "Content-Length", "Host",
}

// sovereign are prefixes of headers that a visitor cannot set: they would be
// taken for the edge's own words to the connector.
var sovereign = []string{"Cf-Cloudflared-", "Cf-Int-", "Cf-Proxy-"}

// stamp makes the request that the edge sends: what the visitor says, but for
// what the edge knows better. It passes on True-Client-Ip and X-Real-Ip, as the
// real one does: nobody vouches for them.
func (v Visitor) stamp(req *http.Request, ray string) *http.Request {
	out := req.Clone(req.Context())
	out.Body = req.Body // Clone makes no copy of it
	if out.Host == "" {
		out.Host = req.URL.Host
	}
	out.URL = &url.URL{Path: req.URL.Path, RawPath: req.URL.RawPath, RawQuery: req.URL.RawQuery, ForceQuery: req.URL.ForceQuery, Opaque: req.URL.Opaque}
	if out.URL.Path == "" && out.URL.Opaque == "" {
		out.URL.Path = "/"
	}
	out.Trailer = nil
	h := out.Header
	if h == nil {
		h = http.Header{}
		out.Header = h
	}
	for _, names := range h["Connection"] {
		for name := range strings.SplitSeq(names, ",") {
			h.Del(strings.TrimSpace(name))
		}
	}
	for _, name := range hopByHop {
		h.Del(name)
	}
	for name := range h {
		for _, prefix := range sovereign {
			if strings.HasPrefix(http.CanonicalHeaderKey(name), prefix) {
				delete(h, name)
			}
		}
		switch http.CanonicalHeaderKey(name) {
		case "Cf-Connecting-Ip", "Cf-Connecting-Ipv6", "Cf-Pseudo-Ipv4", "Cf-Ray", "Cf-Visitor", "Cf-Ipcountry", "Cf-Ew-Via", "Cf-Worker":
			delete(h, name) // however it is spelt
		}
	}
	// Only gRPC's use of TE may cross HTTP/2.
	if te := h.Get("Te"); te != "" && te != "trailers" {
		h.Del("Te")
	}
	scheme := req.URL.Scheme
	if scheme == "" {
		scheme = "https"
	}
	country := v.Country
	if country == "" {
		country = "XX"
	}
	address := "192.0.2.1"
	if v.Addr.IsValid() {
		address = v.Addr.Unmap().WithZone("").String()
	}
	h.Set("Cf-Connecting-Ip", address)
	h.Set("X-Forwarded-For", strings.Join(append(h["X-Forwarded-For"], address), ", "))
	h.Set("X-Forwarded-Proto", scheme)
	h.Set("Cf-Visitor", fmt.Sprintf(`{"scheme":%q}`, scheme))
	h.Set("Cf-Ipcountry", country)
	h.Set("Cf-Ray", ray)
	h.Set("Cdn-Loop", strings.Join(append(h["Cdn-Loop"], "cloudflare; loops=1"), ", "))
	if req.Body == nil || req.Body == http.NoBody {
		out.Body, out.ContentLength = http.NoBody, 0
	} else if out.ContentLength == 0 {
		out.ContentLength = -1 // as in net/http, zero with a body is unknown
	}
	return out
}

// judgeHead refuses a request that is no HTTP or too large, with the status to
// answer; zero lets it in.
func judgeHead(req *http.Request) (status int, text string) {
	bad := !httpguts.ValidHeaderFieldName(req.Method) || !httpguts.ValidHostHeader(req.Host)
	size := len(req.Method) + len(req.Host) + len(req.URL.RequestURI())
	for name, values := range req.Header {
		bad = bad || !httpguts.ValidHeaderFieldName(name)
		for _, value := range values {
			bad = bad || !httpguts.ValidHeaderFieldValue(value)
			size += len(name) + len(value) + len(": \r\n")
		}
	}
	switch {
	case bad:
		return http.StatusBadRequest, "400 Bad Request"
	case size > maxHeader:
		return http.StatusRequestHeaderFieldsTooLarge, "Request Header Or Cookie Too Large"
	}
	return 0, ""
}

// dress makes a connector's response one of the edge.
func (e *Edge) dress(req *http.Request, resp *http.Response, ray string) {
	resp.Request = req
	resp.Status = fmt.Sprintf("%d %s", resp.StatusCode, http.StatusText(resp.StatusCode))
	for _, name := range []string{"Connection", "Keep-Alive", "Proxy-Connection", "Transfer-Encoding", "Trailer", "Upgrade"} {
		resp.Header.Del(name)
	}
	for name := range resp.Header {
		for _, prefix := range sovereign {
			if strings.HasPrefix(http.CanonicalHeaderKey(name), prefix) {
				delete(resp.Header, name)
			}
		}
	}
	resp.Header.Set("Server", "cloudflare")
	resp.Header.Set("Cf-Ray", ray)
}

// page is an answer of the edge itself.
func (e *Edge) page(req *http.Request, ray string, status int, text string) *http.Response {
	resp := &http.Response{
		StatusCode: status, Proto: "HTTP/2.0", ProtoMajor: 2,
		Header:        http.Header{"Content-Type": {"text/plain; charset=UTF-8"}},
		Body:          io.NopCloser(strings.NewReader(text)),
		ContentLength: int64(len(text)),
	}
	e.dress(req, resp, ray)
	if req.Method == http.MethodHead {
		resp.Body = http.NoBody
	}
	return resp
}

// newRay makes a request's name.
func newRay() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:]) + "-FRA"
}

package cfedge_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cloudflare/cloudflared/connection"
	"github.com/cloudflare/cloudflared/features"
	"github.com/cloudflare/cloudflared/tunnelrpc"
	"github.com/cloudflare/cloudflared/tunnelrpc/pogs"
	"github.com/google/go-cmp/cmp"
	"github.com/quic-go/quic-go"

	"github.com/edgeward/edgeward/test/cfedge"
	"github.com/edgeward/edgeward/test/rig"
	"github.com/edgeward/edgeward/test/rig/rigtest"
)

// bench is an edge with one tunnel.
type bench struct {
	*cfedge.Edge
	tunnel  cfedge.TunnelInfo
	visitor cfedge.Visitor
}

func newBench(t *testing.T, opts cfedge.Options) *bench {
	t.Helper()
	e, err := cfedge.Start(context.WithoutCancel(t.Context()), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the edge saw fail: %q", e.Failures())
		}
		e.Close()
	})
	b := &bench{Edge: e}
	b.tunnel = e.Cloud().AddTunnel(e.Cloud().AddAccount("home"), "home", nil)
	b.visitor = e.Visitor("203.0.113.9")
	b.visitor.Tunnel = b.tunnel.ID
	return b
}

// wait waits until the tunnel has n connections.
func (b *bench) wait(t *testing.T, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	if err := b.WaitConnections(ctx, b.tunnel.ID, n); err != nil {
		t.Fatal(err)
	}
}

// only returns the one connection there is.
func (b *bench) only(t *testing.T) *cfedge.Connection {
	t.Helper()
	b.wait(t, 1)
	return b.Connections()[0]
}

// ask sends a request and reads the answer.
func (b *bench) ask(t *testing.T, req *http.Request) (*http.Response, string) {
	t.Helper()
	resp, err := b.visitor.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(text)
}

// get asks for a path and returns the status.
func (b *bench) get(t *testing.T, path string) int {
	t.Helper()
	resp, _ := b.ask(t, request(t, http.MethodGet, "https://app.example.org"+path, nil))
	return resp.StatusCode
}

func (b *bench) counted(t *testing.T, want cfedge.Counts) {
	t.Helper()
	eventually(t, func() error {
		if diff := cmp.Diff(want, b.Counts()); diff != "" {
			return errors.New("counts (-want +have):\n" + diff)
		}
		return nil
	})
}

// eventually waits until a condition holds, and fails with what it says last.
func eventually(t *testing.T, holds func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if err = holds(); err == nil {
			return
		}
	}
	t.Fatal(err)
}

func request(t *testing.T, method, url string, body io.Reader) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, body)
	if err != nil {
		t.Fatal(err)
	}
	return req
}

// origin is a server for what the bench's own origin does not do.
func origin(t *testing.T) *httptest.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("/trailer", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Trailer", "Grpc-Status")
		io.WriteString(w, "body")
		w.Header().Set("Grpc-Status", "0")
	})
	mux.HandleFunc("/hints", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Link", "</style.css>")
		w.WriteHeader(http.StatusEarlyHints)
		io.WriteString(w, "body")
	})
	mux.HandleFunc("/length", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "5")
		io.WriteString(w, "12345")
	})
	mux.HandleFunc("/none", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	mux.HandleFunc("/same", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Etag", `"1"`)
		w.WriteHeader(http.StatusNotModified)
	})
	mux.HandleFunc("/sum", func(w http.ResponseWriter, r *http.Request) {
		sum := sha256.New()
		n, err := io.Copy(sum, r.Body)
		fmt.Fprintf(w, "%d %x %v %d", n, sum.Sum(nil), err, r.ContentLength)
	})
	mux.HandleFunc("/zeros", func(w http.ResponseWriter, _ *http.Request) { io.CopyN(w, zeros{}, 64<<20) })
	mux.HandleFunc("/cut", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "1000")
		io.WriteString(w, "half")
		http.NewResponseController(w).Flush()
		time.Sleep(100 * time.Millisecond) // the head is to arrive before the cut
		panic(http.ErrAbortHandler)
	})
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return s
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestRegistration(t *testing.T) {
	each(t, func(t *testing.T, p connection.Protocol) {
		b := newBench(t, cfedge.Options{})
		startStock(t, b.Edge, b.tunnel, stockOptions{protocol: p, connections: 2, curves: features.PostQuantumStrict})
		b.wait(t, 2)
		var indexes []uint8
		for _, c := range b.Connections() {
			indexes = append(indexes, c.Index)
			if c.Protocol != p.String() || c.Version != "2026.7.0" || c.Arch != "linux_amd64" || !c.PostQuantum ||
				c.Location == "" || c.Connector != b.Connections()[0].Connector || !slices.Contains(c.Features, "allow_remote_config") {
				t.Errorf("registered as %+v", c)
			}
		}
		if slices.Sort(indexes); !slices.Equal(indexes, []uint8{0, 1}) {
			t.Errorf("indexes %v", indexes)
		}
		if got := b.get(t, "/"); got != http.StatusNoContent {
			t.Errorf("answered %d", got)
		}
	})
}

// register speaks the control stream's RPC by hand, over QUIC, as no connector
// shows all of the answer.
func (b *bench) register(t *testing.T, info cfedge.TunnelInfo, index byte) (*pogs.ConnectionDetails, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 10*time.Second)
	t.Cleanup(cancel)
	trust := &tls.Config{RootCAs: b.RootCAs(), ServerName: "quic.cftunnel.com", NextProtos: []string{"argotunnel"}}
	conn, err := quic.DialAddr(ctx, b.Addrs()[0], trust, &quic.Config{EnableDatagrams: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.CloseWithError(0, "") })
	stream, err := conn.OpenStream()
	if err != nil {
		t.Fatal(err)
	}
	rpc := tunnelrpc.NewRegistrationClient(ctx, stream, 5*time.Second)
	t.Cleanup(rpc.Close)
	client := make([]byte, 16)
	return rpc.RegisterConnection(ctx, pogs.TunnelAuth{AccountTag: info.Account, TunnelSecret: info.Secret}, info.ID,
		&pogs.ConnectionOptions{Client: pogs.ClientInfo{ClientID: client, Version: "1"}}, index, nil)
}

// A refusal reaches the connector in the words that the real edge is known to
// use; only one that is not permanent is worth another attempt.
func TestRefusal(t *testing.T) {
	parent, b := t, newBench(t, cfedge.Options{Duplicates: true})
	wrong, foreign, unknown := b.tunnel, b.tunnel, b.tunnel
	wrong.Secret = []byte("something else entirely, 32 bytes")
	foreign.Account = "0"
	unknown.ID[0]++
	for _, tt := range []struct {
		name    string
		info    cfedge.TunnelInfo
		refusal *cfedge.Refusal
		want    string
		after   time.Duration // 0: permanent
	}{
		{name: "wrong secret", info: wrong, want: "Unauthorized: Invalid tunnel secret"},
		{name: "another account", info: foreign, want: "Unauthorized: Tunnel not found"},
		{name: "no such tunnel", info: unknown, want: "Unauthorized: Tunnel not found"},
		{name: "for good", info: b.tunnel, refusal: &cfedge.Refusal{Reason: "too many connections", Permanent: true}, want: "too many connections"},
		{name: "for now", info: b.tunnel, refusal: &cfedge.Refusal{Reason: "overloaded", RetryAfter: 3 * time.Second, Times: 1}, want: "overloaded", after: 3 * time.Second},
		{name: "let in", info: b.tunnel},
		{name: "twice on one server", info: b.tunnel, want: connection.DuplicateConnectionError},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b.Admit()
			if tt.refusal != nil {
				b.Refuse(*tt.refusal)
			}
			registered := len(b.Connections())
			details, err := b.register(parent, tt.info, 0)
			if tt.want == "" {
				if err != nil || details.Location == "" || !details.TunnelIsRemotelyManaged || len(b.Connections()) != registered+1 {
					t.Errorf("registered: %+v, %v", details, err)
				}
				return
			}
			if err == nil || err.Error() != tt.want {
				t.Fatalf("refused with %v, want %q", err, tt.want)
			}
			retry := new(pogs.RetryableError)
			if errors.As(err, &retry); retry.Delay != tt.after {
				t.Errorf("try again after %v, want %v", retry.Delay, tt.after)
			}
			if len(b.Connections()) != registered {
				t.Errorf("%d connections", len(b.Connections()))
			}
		})
	}
}

// With two servers, the second connection of a connector finds its own.
func TestDuplicate(t *testing.T) {
	b := newBench(t, cfedge.Options{Servers: 2, Duplicates: true})
	startStock(t, b.Edge, b.tunnel, stockOptions{protocol: connection.HTTP2, connections: 2})
	b.wait(t, 2)
	if all := b.Connections(); all[0].Server == all[1].Server {
		t.Errorf("both on %s", all[0].Server)
	}
}

func TestRequest(t *testing.T) {
	echo := rigtest.Origin(t)
	each(t, func(t *testing.T, p connection.Protocol) {
		b := newBench(t, cfedge.Options{})
		startStock(t, b.Edge, b.tunnel, stockOptions{protocol: p, origin: echo.URL})
		b.wait(t, 1)

		req := request(t, http.MethodPost, "https://app.example.org/a%2Fb/?q=1&q=%20", strings.NewReader("hello"))
		for name, values := range map[string][]string{
			"X-Own": {"1", "2"}, "Connection": {"X-Hop, keep-alive"}, "X-Hop": {"1"},
			"Cf-Connecting-Ip": {"10.0.0.1", "10.0.0.2"}, "CF-CONNECTING-IP": {"10.0.0.3"}, "X-Forwarded-For": {"10.0.0.4"},
			"X-Forwarded-Proto": {"http"}, "Cf-Ray": {"0-X"}, "Cf-Visitor": {"x"}, "Cf-Ipcountry": {"T1"}, "Cf-Connecting-Ipv6": {"::1"},
			"Cf-Cloudflared-Proxy-Connection-Upgrade": {"control-stream"}, "Cf-Cloudflared-Proxy-Src": {"x"}, "Cf-Int-Thing": {"x"},
			"X-Real-Ip": {"10.0.0.5"}, "Te": {"gzip"}, "Transfer-Encoding": {"chunked"},
		} {
			req.Header[name] = values
		}
		resp, text := b.ask(t, req)
		if resp.StatusCode != http.StatusOK || resp.Header.Get("Server") != "cloudflare" || resp.Header.Get("Cf-Ray") == "" {
			t.Errorf("answered %s, %v", resp.Status, resp.Header)
		}
		var arrived rig.Arrived
		if err := json.Unmarshal([]byte(text), &arrived); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		if ray := arrived.Header.Get("Cf-Ray"); ray != resp.Header.Get("Cf-Ray") {
			t.Errorf("Cf-Ray %q on the way in, %q on the way out", ray, resp.Header.Get("Cf-Ray"))
		}
		arrived.Header.Del("Cf-Ray")
		arrived.Header.Del("Accept-Encoding") // cloudflared's transport adds it
		want := rig.Arrived{
			Method: http.MethodPost, Host: "app.example.org", URL: "/a%2Fb/?q=1&q=%20", Proto: "HTTP/1.1", Remote: arrived.Remote,
			Header: http.Header{
				"X-Own": {"1", "2"}, "X-Real-Ip": {"10.0.0.5"}, "Content-Length": {"5"}, "Connection": {"keep-alive"},
				"Cf-Connecting-Ip": {"203.0.113.9"}, "X-Forwarded-For": {"10.0.0.4, 203.0.113.9"}, "X-Forwarded-Proto": {"https"},
				"Cf-Visitor": {`{"scheme":"https"}`}, "Cf-Ipcountry": {"XX"}, "Cdn-Loop": {"cloudflare; loops=1"}, "User-Agent": {""},
			},
		}
		for _, h := range []http.Header{arrived.Header, want.Header} {
			h.Del("Connection")
			h.Del("User-Agent")
		}
		if diff := cmp.Diff(want, arrived); diff != "" {
			t.Errorf("arrived (-want +have):\n%s", diff)
		}
		b.counted(t, cfedge.Counts{Requests: 1, Answered: 1})
	})
}

// What the edge sends and what comes back, in all the shapes that HTTP has.
func TestShapes(t *testing.T) {
	plain := origin(t)
	each(t, func(t *testing.T, p connection.Protocol) {
		b := newBench(t, cfedge.Options{})
		startStock(t, b.Edge, b.tunnel, stockOptions{protocol: p, origin: plain.URL})
		b.wait(t, 1)
		sum := fmt.Sprintf("%x", sha256.Sum256(make([]byte, 8<<20)))
		for _, tt := range []struct {
			name, method, path string
			body               io.Reader
			length             int64
			status             int
			want               string
			check              func(*http.Response) bool
		}{
			{name: "length", method: "GET", path: "/length", status: 200, want: "12345",
				check: func(r *http.Response) bool { return r.ContentLength == 5 }},
			{name: "head", method: "HEAD", path: "/length", status: 200,
				check: func(r *http.Response) bool { return r.ContentLength == 5 }},
			{name: "no content", method: "GET", path: "/none", status: 204},
			{name: "not modified", method: "GET", path: "/same", status: 304,
				check: func(r *http.Response) bool { return r.Header.Get("Etag") == `"1"` }},
			{name: "early hints", method: "GET", path: "/hints", status: 200, want: "body"},
			{name: "upload of a known length", method: "PUT", path: "/sum", body: io.LimitReader(zeros{}, 8<<20), length: 8 << 20, status: 200,
				want: fmt.Sprintf("%d %s <nil> %d", 8<<20, sum, 8<<20)},
			{name: "upload of an unknown length", method: "PUT", path: "/sum", body: io.LimitReader(zeros{}, 8<<20), status: 200,
				want: fmt.Sprintf("%d %s <nil> -1", 8<<20, sum)},
			{name: "no body", method: "GET", path: "/sum", status: 200, want: fmt.Sprintf("0 %x <nil> 0", sha256.Sum256(nil))},
			{name: "trailer", method: "GET", path: "/trailer", status: 200, want: "body", check: func(r *http.Response) bool {
				// Over QUIC there is no place for them.
				return (r.Trailer.Get("Grpc-Status") == "0") == (p == connection.HTTP2)
			}},
		} {
			t.Run(tt.name, func(t *testing.T) {
				req := request(t, tt.method, "https://app.example.org"+tt.path, tt.body)
				req.ContentLength = tt.length
				resp, text := b.ask(t, req)
				if resp.StatusCode != tt.status || text != tt.want || tt.check != nil && !tt.check(resp) {
					t.Errorf("answered %s, %v, %q, trailers %v", resp.Status, resp.Header, text, resp.Trailer)
				}
			})
		}
		t.Run("download", func(t *testing.T) {
			resp, err := b.visitor.Client().Do(request(t, "GET", "https://app.example.org/zeros", nil))
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if n, err := io.Copy(io.Discard, resp.Body); n != 64<<20 || err != nil {
				t.Errorf("read %d bytes, %v", n, err)
			}
		})
		if n := b.Counts().Answered; n != b.Counts().Requests {
			t.Errorf("counted %+v", b.Counts())
		}
		t.Run("cut short", func(t *testing.T) {
			resp, err := b.visitor.Client().Do(request(t, "GET", "https://app.example.org/cut", nil))
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			// cloudflared may have kept the head back, or not.
			if text, err := io.ReadAll(resp.Body); err == nil && resp.StatusCode != http.StatusBadGateway {
				t.Errorf("answered %s, %q, and nothing was wrong", resp.Status, text)
			}
			if got := b.Counts().Failed; got != 1 {
				t.Errorf("%d failed, want 1", got)
			}
		})
	})
}

// Both directions of a request stream at once, and an endless response ends
// with the visitor.
func TestStreaming(t *testing.T) {
	echo := rigtest.Origin(t)
	each(t, func(t *testing.T, p connection.Protocol) {
		b := newBench(t, cfedge.Options{})
		startStock(t, b.Edge, b.tunnel, stockOptions{protocol: p, origin: echo.URL})
		b.wait(t, 1)

		out, in := io.Pipe()
		req := request(t, http.MethodPost, "https://app.example.org/stream", out)
		resp, err := make(chan *http.Response, 1), make(chan error, 1)
		go func() {
			r, e := b.visitor.RoundTrip(req)
			resp <- r
			err <- e
		}()
		io.WriteString(in, "abc")
		r, e := <-resp, <-err
		if e != nil {
			t.Fatal(e)
		}
		lines := bufio.NewScanner(r.Body)
		for i, want := range []string{"3", "6", "9"} {
			if i > 0 {
				io.WriteString(in, "abc")
			}
			if !lines.Scan() || lines.Text() != want {
				t.Fatalf("piece %d: %q, %v", i, lines.Text(), lines.Err())
			}
		}
		in.Close()
		if lines.Scan() || lines.Err() != nil {
			t.Errorf("after the end: %q, %v", lines.Text(), lines.Err())
		}
		r.Body.Close()
		b.counted(t, cfedge.Counts{Requests: 1, Answered: 1})

		ctx, cancel := context.WithCancel(t.Context())
		r, e = b.visitor.RoundTrip(request(t, http.MethodGet, "https://app.example.org/sse", nil).WithContext(ctx))
		if e != nil {
			t.Fatal(e)
		}
		lines = bufio.NewScanner(r.Body)
		for lines.Scan() && lines.Text() != "data: 5" {
		}
		cancel()
		if _, err := io.Copy(io.Discard, r.Body); !errors.Is(err, context.Canceled) && err == nil {
			t.Errorf("after leaving: %v", err)
		}
		r.Body.Close()
		b.counted(t, cfedge.Counts{Requests: 2, Answered: 1, Canceled: 1})
	})
}

// A visitor that leaves is noticed by the origin, before a response and in the
// middle of an upload.
func TestCancel(t *testing.T) {
	entered, left := make(chan string, 4), make(chan string, 4)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		entered <- r.URL.Path
		if _, err := io.Copy(io.Discard, r.Body); err == nil {
			<-r.Context().Done()
		}
		left <- r.URL.Path
	}))
	t.Cleanup(server.Close)
	each(t, func(t *testing.T, p connection.Protocol) {
		b := newBench(t, cfedge.Options{})
		startStock(t, b.Edge, b.tunnel, stockOptions{protocol: p, origin: server.URL})
		b.wait(t, 1)
		for _, body := range []io.Reader{nil, zeros{}} {
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			req := request(t, http.MethodPost, "https://app.example.org/", body).WithContext(ctx)
			go func() {
				_, err := b.visitor.RoundTrip(req)
				done <- err
			}()
			<-entered
			cancel()
			if err := <-done; !errors.Is(err, context.Canceled) {
				t.Errorf("the visitor saw %v", err)
			}
			select {
			case <-left:
			case <-time.After(10 * time.Second):
				t.Fatal("the origin does not notice")
			}
		}
		b.counted(t, cfedge.Counts{Requests: 2, Canceled: 2})
	})
}

func TestWebSocket(t *testing.T) {
	echo := rigtest.Origin(t)
	each(t, func(t *testing.T, p connection.Protocol) {
		b := newBench(t, cfedge.Options{})
		startStock(t, b.Edge, b.tunnel, stockOptions{protocol: p, origin: echo.URL})
		b.wait(t, 1)
		upgrade := func(path string) *http.Response {
			req := request(t, http.MethodGet, "https://app.example.org"+path, nil)
			for name, value := range map[string]string{
				"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
			} {
				req.Header.Set(name, value)
			}
			resp, err := b.visitor.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			return resp
		}
		resp := upgrade("/ws")
		if resp.StatusCode != http.StatusSwitchingProtocols || resp.Header.Get("Sec-WebSocket-Accept") != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" {
			t.Fatalf("answered %s, %v", resp.Status, resp.Header)
		}
		stream := resp.Body.(io.ReadWriteCloser)
		for i := range 20 {
			sent := bytes.Repeat([]byte{byte(i)}, 1+i*1000)
			go stream.Write(sent)
			got := make([]byte, len(sent))
			if _, err := io.ReadFull(stream, got); err != nil || !bytes.Equal(got, sent) {
				t.Fatalf("message %d: %v", i, err)
			}
		}
		stream.Close()
		b.counted(t, cfedge.Counts{Requests: 1, Answered: 1})

		// An origin that does not upgrade answers as it likes.
		resp = upgrade("/elsewhere")
		if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("answered %s, %v", resp.Status, err)
		}
		resp.Body.Close()
	})
}

// Requests are shared among the connections, by name through DNS.
func TestRouting(t *testing.T) {
	b := newBench(t, cfedge.Options{})
	b.visitor.Tunnel = [16]byte{}
	if got := b.get(t, "/"); got != 530 {
		t.Errorf("a host that is not there: %d", got)
	}
	b.Cloud().AddRoute("app.example.org", b.tunnel.ID)
	if got := b.get(t, "/"); got != 530 {
		t.Errorf("a tunnel without connections: %d", got)
	}
	startStock(t, b.Edge, b.tunnel, stockOptions{protocol: connection.HTTP2, connections: 2})
	b.wait(t, 2)
	for range 60 {
		if got := b.get(t, "/"); got != http.StatusNoContent {
			t.Fatalf("answered %d", got)
		}
	}
	for _, c := range b.Connections() {
		if c.Requests() < 10 {
			t.Errorf("connection %d had %d of 60 requests", c.Index, c.Requests())
		}
	}
	via := b.visitor
	via.Via = b.Connections()[1]
	before := via.Via.Requests()
	b.visitor = via
	for range 10 {
		b.get(t, "/")
	}
	if got := via.Via.Requests() - before; got != 10 {
		t.Errorf("%d of 10 requests on the connection asked for", got)
	}
	req := request(t, http.MethodGet, "https://app.example.org/", nil)
	req.Header.Set("X-Large", strings.Repeat("a", 200<<10))
	if resp, _ := b.ask(t, req); resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("a huge head: %s", resp.Status)
	}
	req.Header = http.Header{"X-Split": {"a\r\nCf-Connecting-Ip: 10.0.0.1"}}
	if resp, err := b.visitor.RoundTrip(req); err != nil || resp.StatusCode != http.StatusBadRequest {
		t.Errorf("a header that is two: %+v, %v", resp, err)
	}
	b.counted(t, cfedge.Counts{Requests: 74, Answered: 70, NoTunnel: 2, Refused: 2})
}

// A drained cloudflared finishes what is under way, and serves on as long as it
// is there. What the edge still sends to it afterwards is stale.
func TestUnregister(t *testing.T) {
	echo := rigtest.Origin(t)
	each(t, func(t *testing.T, p connection.Protocol) {
		for _, lag := range []time.Duration{0, time.Hour} {
			b := newBench(t, cfedge.Options{RouteLag: lag})
			s := startStock(t, b.Edge, b.tunnel, stockOptions{protocol: p, origin: echo.URL, grace: 3 * time.Second})
			c := b.only(t)
			slow := make(chan int, 1)
			go func() { slow <- b.get(t, "/slow?for=300ms") }()
			eventually(t, func() error {
				if c.InFlight() == 0 {
					return errors.New("the request does not start")
				}
				return nil
			})
			s.drain()
			b.wait(t, 0)
			if got := <-slow; got != http.StatusOK {
				t.Errorf("lag %v, under way: %d", lag, got)
			}
			if lag == 0 {
				eventually(t, func() error {
					if got := b.get(t, "/"); got != 530 {
						return fmt.Errorf("lag %v, after the goodbye: %d", lag, got)
					}
					return nil
				})
				continue
			}
			if got := b.get(t, "/"); got != http.StatusOK {
				t.Errorf("lag %v, after the goodbye: %d", lag, got)
			}
			s.kill()
			eventually(t, func() error {
				if got := b.get(t, "/"); got != http.StatusBadGateway {
					return fmt.Errorf("lag %v, after the end: %d", lag, got)
				}
				return nil
			})
			if got := b.Counts(); got.Stale != 1 || got.Failed != 0 {
				t.Errorf("counted %+v", got)
			}
		}
	})
}

// The edge's own faults are told from the connector's.
func TestFaults(t *testing.T) {
	echo := rigtest.Origin(t)
	each(t, func(t *testing.T, p connection.Protocol) {
		b := newBench(t, cfedge.Options{ResponseTimeout: 300 * time.Millisecond})
		s := startStock(t, b.Edge, b.tunnel, stockOptions{protocol: p, origin: echo.URL})
		c := b.only(t)
		silent := func(what string, fault func(bool)) {
			fault(true)
			before := b.Counts().Lost
			if got := b.get(t, "/"); got != 524 || b.Counts().Lost != before+1 {
				t.Errorf("%s: %d, %+v", what, got, b.Counts())
			}
			fault(false)
			eventually(t, func() error {
				if got := b.get(t, "/"); got != http.StatusOK {
					return fmt.Errorf("after %s: %d", what, got)
				}
				return nil
			})
			if !c.Registered() {
				t.Errorf("%s ended the connection", what)
			}
		}
		silent("a dark connection", c.Dark)
		silent("a dark edge", b.Dark)
		silent("a wedged connection", c.Wedge)
		if p == connection.QUIC {
			silent("UDP blocked", b.BlockUDP)
		}

		under := make(chan int, 1)
		go func() { under <- b.get(t, "/slow?for=200ms") }()
		eventually(t, func() error {
			if c.InFlight() == 0 {
				return errors.New("the request does not start")
			}
			return nil
		})
		c.Kill()
		if got := <-under; got != http.StatusBadGateway {
			t.Errorf("under way on a killed connection: %d", got)
		}
		if got := b.Counts(); got.Failed+got.Stale != 0 {
			t.Errorf("counted %+v", got)
		}
		eventually(t, func() error {
			if c.Registered() {
				return errors.New("a killed connection stays")
			}
			return nil
		})

		// cloudflared may take its time to come back.
		s.kill()
		<-s.ended
		startStock(t, b.Edge, b.tunnel, stockOptions{protocol: p, origin: echo.URL})
		c = b.only(t)
		c.Drain()
		eventually(t, func() error {
			if c.Registered() {
				return errors.New("a drained connection stays")
			}
			return nil
		})
	})
}

// Without UDP, or behind what rejects its handshakes, QUIC does not register,
// while HTTP/2 does.
func TestNoQUIC(t *testing.T) {
	for name, fault := range map[string]func(*cfedge.Edge){
		"blocked":  func(e *cfedge.Edge) { e.BlockUDP(true) },
		"rejected": func(e *cfedge.Edge) { e.RejectQUIC(true) },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, cfedge.Options{})
			fault(b.Edge)
			startStock(t, b.Edge, b.tunnel, stockOptions{protocol: connection.QUIC})
			startStock(t, b.Edge, b.tunnel, stockOptions{protocol: connection.HTTP2})
			b.wait(t, 1)
			time.Sleep(100 * time.Millisecond)
			if c := b.only(t); c.Protocol != "http2" {
				t.Errorf("registered over %s", c.Protocol)
			}
		})
	}
}

// A dark edge lets nobody in, and afterwards it does.
func TestDark(t *testing.T) {
	b := newBench(t, cfedge.Options{})
	b.Dark(true)
	startStock(t, b.Edge, b.tunnel, stockOptions{protocol: connection.HTTP2})
	time.Sleep(100 * time.Millisecond)
	b.wait(t, 0)
	b.Dark(false)
	b.wait(t, 1)
}

// What is put at the API reaches a remotely managed connector: as it registers,
// and later at once.
func TestRemoteConfiguration(t *testing.T) {
	each(t, func(t *testing.T, p connection.Protocol) {
		b := newBench(t, cfedge.Options{})
		api := httptest.NewServer(cfedge.NewAPI(b.Cloud()))
		t.Cleanup(api.Close)
		token := b.Cloud().AddToken("test", cfedge.TunnelEdit(b.tunnel.Account))
		for i, status := range []int{418, 451} {
			req := request(t, http.MethodPut,
				fmt.Sprintf("%s/client/v4/accounts/%s/cfd_tunnel/%s/configurations", api.URL, b.tunnel.Account, b.tunnel.ID),
				strings.NewReader(fmt.Sprintf(`{"config":{"ingress":[{"service":"http_status:%d"}]}}`, status)))
			req.Header.Set("Authorization", "Bearer "+token)
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			if resp.Body.Close(); resp.StatusCode != http.StatusOK {
				t.Fatalf("the API says %s", resp.Status)
			}
			if i == 0 {
				startStock(t, b.Edge, b.tunnel, stockOptions{protocol: p})
				b.wait(t, 1)
			}
			eventually(t, func() error {
				if got := b.get(t, "/"); got != status {
					return fmt.Errorf("configuration %d: answered %d", i, got)
				}
				return nil
			})
		}
	})
}

// A locally managed connector reports what it runs with.
func TestLocalConfiguration(t *testing.T) {
	b := newBench(t, cfedge.Options{})
	b.Cloud().SetRemote(b.tunnel.ID, false)
	startStock(t, b.Edge, b.tunnel, stockOptions{protocol: connection.HTTP2, origin: "http_status:418"})
	c := b.only(t)
	eventually(t, func() error {
		if text := string(c.LocalConfig()); !strings.Contains(text, "http_status:418") {
			return fmt.Errorf("reported %q", text)
		}
		return nil
	})
}

// A connector takes the configuration that is pushed, and refuses one that is
// wrong.
func TestConfiguration(t *testing.T) {
	each(t, func(t *testing.T, p connection.Protocol) {
		b := newBench(t, cfedge.Options{})
		startStock(t, b.Edge, b.tunnel, stockOptions{protocol: p})
		c := b.only(t)
		for version, status := range []int{418, 451} {
			config := fmt.Sprintf(`{"ingress":[{"service":"http_status:%d"}]}`, status)
			if applied, err := c.PushConfig(t.Context(), int32(version), []byte(config)); err != nil || applied != int32(version) {
				t.Errorf("pushed version %d: %d is in force, %v", version, applied, err)
			}
			if got := b.get(t, "/"); got != status {
				t.Errorf("version %d: answered %d, want %d", version, got, status)
			}
		}
		if _, err := c.PushConfig(t.Context(), 2, []byte(`{"ingress":[{"service":"nonsense://"}]}`)); err == nil {
			t.Error("a wrong configuration is taken")
		}
		if got := b.get(t, "/"); got != 451 {
			t.Errorf("after a wrong configuration: %d", got)
		}
	})
}

func TestDelay(t *testing.T) {
	b := newBench(t, cfedge.Options{})
	startStock(t, b.Edge, b.tunnel, stockOptions{protocol: connection.HTTP2})
	b.wait(t, 1)
	b.Delay(100 * time.Millisecond)
	start := time.Now()
	b.get(t, "/")
	if took := time.Since(start); took < 100*time.Millisecond {
		t.Errorf("a slow edge answered after %v", took)
	}
}

// What the emulator starts ends with it, whatever was under way.
func TestClose(t *testing.T) {
	echo := rigtest.Origin(t)
	began := time.Now()
	for range 10 {
		e, err := cfedge.Start(t.Context(), cfedge.Options{})
		if err != nil {
			t.Fatal(err)
		}
		e.Close()
	}
	t.Logf("started and ended in %v each", time.Since(began)/10)
	each(t, func(t *testing.T, p connection.Protocol) {
		b := newBench(t, cfedge.Options{})
		startStock(t, b.Edge, b.tunnel, stockOptions{protocol: p, origin: echo.URL})
		startStock(t, b.Edge, b.tunnel, stockOptions{protocol: p, origin: echo.URL})
		b.wait(t, 2)
		b.Connections()[0].Wedge(true)
		for range 4 {
			go func() {
				if resp, err := b.visitor.RoundTrip(request(t, http.MethodGet, "https://app.example.org/sse", nil)); err == nil {
					io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
				}
			}()
		}
		eventually(t, func() error {
			if b.Counts().Requests < 4 {
				return errors.New("the requests do not start")
			}
			return nil
		})
		b.Close()
	})
	eventually(t, func() error {
		stacks := make([]byte, 4<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		for one := range strings.SplitSeq(string(stacks), "\n\n") {
			if strings.Contains(one, "edgeward/test/cfedge.") && !strings.Contains(one, "test/cfedge_test.TestClose(") {
				return fmt.Errorf("still there:\n%s", one)
			}
		}
		return nil
	})
}

// The front is an edge to a browser: HTTP/2, WebSocket, trailers, who one is.
func TestFront(t *testing.T) {
	echo, plain := rigtest.Origin(t), origin(t)
	b := newBench(t, cfedge.Options{})
	b.Cloud().AddRoute("app.example.org", b.tunnel.ID)
	startStock(t, b.Edge, b.tunnel, stockOptions{protocol: connection.HTTP2, origin: echo.URL})
	c := b.only(t)
	front := httptest.NewUnstartedServer(b.Front())
	front.TLS = b.FrontTLS()
	front.EnableHTTP2 = true
	front.StartTLS()
	t.Cleanup(front.Close)
	client := &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: b.RootCAs()}, ForceAttemptHTTP2: true, DisableCompression: true,
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, front.Listener.Addr().String())
		},
	}}
	t.Cleanup(client.CloseIdleConnections)
	ask := func(req *http.Request) (*http.Response, string) {
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp, string(text)
	}

	req := request(t, http.MethodGet, "https://app.example.org/?a;b", nil)
	req.Header.Set(cfedge.VisitorHeader, "2001:db8::9")
	req.Header.Set("X-Forwarded-For", "10.0.0.1")
	resp, text := ask(req)
	var arrived rig.Arrived
	if err := json.Unmarshal([]byte(text), &arrived); err != nil || resp.ProtoMajor != 2 {
		t.Fatalf("%v: %s %s %q", err, resp.Proto, resp.Status, text)
	}
	for name, want := range map[string]string{
		"Cf-Connecting-Ip": "2001:db8::9", "X-Forwarded-For": "10.0.0.1, 2001:db8::9", "X-Forwarded-Proto": "https", cfedge.VisitorHeader: "",
	} {
		if got := arrived.Header.Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if arrived.URL != "/?a;b" || arrived.Host != "app.example.org" {
		t.Errorf("arrived: %+v", arrived)
	}
	if resp, _ := ask(request(t, http.MethodGet, "https://nowhere.example.org/", nil)); resp.StatusCode != 530 {
		t.Errorf("a host that is not there: %s", resp.Status)
	}

	conn, err := tls.Dial("tcp", front.Listener.Addr().String(), &tls.Config{RootCAs: b.RootCAs(), ServerName: "app.example.org"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "GET /ws HTTP/1.1\r\nHost: app.example.org\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
	reader := bufio.NewReader(conn)
	resp, err = http.ReadResponse(reader, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("upgrade: %+v, %v", resp, err)
	}
	io.WriteString(conn, "hello")
	got := make([]byte, 5)
	if _, err := io.ReadFull(reader, got); err != nil || string(got) != "hello" {
		t.Errorf("through the socket: %q, %v", got, err)
	}

	if _, err := c.PushConfig(t.Context(), 0, fmt.Appendf(nil, `{"ingress":[{"service":%q}]}`, plain.URL)); err != nil {
		t.Fatal(err)
	}
	if resp, _ := ask(request(t, http.MethodGet, "https://app.example.org/trailer", nil)); resp.Trailer.Get("Grpc-Status") != "0" {
		t.Errorf("trailers: %v", resp.Trailer)
	}
}

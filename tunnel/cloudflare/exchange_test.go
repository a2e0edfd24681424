package cloudflare

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestExchanges(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, p Protocol) {
		t.Parallel()
		var served atomic.Int64
		b := newBench(t, benchOptions{settings: Settings{Protocol: p}, served: func(e Exchange) {
			if e.Status == 0 || e.Took <= 0 || e.Request == nil {
				t.Errorf("served %+v", e)
			}
			if r := e.Request; p == QUIC && r.ContentLength == 0 && r.Body != http.NoBody {
				t.Errorf("%s %s has a body of no length", r.Method, r.URL)
			}
			served.Add(1)
		}})
		for _, c := range []struct {
			name, method, target, body string
			want                       string
			status                     int
			header                     map[string][]string
		}{
			{"get", "GET", "https://app.example.org/a%2Fb/c?q=%20x", "", "GET app.example.org /a%2Fb/c?q=%20x 203.0.113.9", 200, map[string][]string{"X-Twice": {"one", "two"}}},
			{"head", "HEAD", "https://app.example.org/h", "", "", 200, map[string][]string{"X-Twice": {"one", "two"}}},
			{"post", "POST", "https://app.example.org/echo", strings.Repeat("abc", 100_000), strings.Repeat("abc", 100_000), 200, nil},
			{"post without a length", "POST", "https://app.example.org/echo", "unmeasured", "unmeasured", 200, nil},
			{"empty post", "POST", "https://app.example.org/echo", "", "", 200, nil},
			{"early hints", "GET", "https://app.example.org/early", "", "late", 200, nil},
			{"options", "OPTIONS", "http://app.example.org/", "", "OPTIONS app.example.org / 203.0.113.9", 200, nil},
			{"not found", "DELETE", "https://app.example.org/down?n=0", "", "", 200, map[string][]string{"Content-Length": {"0"}}},
		} {
			t.Run(c.name, func(t *testing.T) {
				request, err := http.NewRequestWithContext(t.Context(), c.method, c.target, strings.NewReader(c.body))
				if err != nil {
					t.Fatal(err)
				}
				if c.name == "post without a length" {
					request.ContentLength, request.Body = -1, io.NopCloser(strings.NewReader(c.body))
				}
				response, err := b.visitor().Do(request)
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = response.Body.Close() }()
				got, err := io.ReadAll(response.Body)
				if err != nil || string(got) != c.want || response.StatusCode != c.status {
					t.Errorf("got %s, %d bytes %.80q, %v", response.Status, len(got), got, err)
				}
				for name, want := range c.header {
					if got := response.Header[name]; fmt.Sprint(got) != fmt.Sprint(want) {
						t.Errorf("%s: %q, want %q", name, got, want)
					}
				}
			})
		}
		b.lossless(t)
		if n := b.connector.Status().Totals.Requests; n != 8 || served.Load() != 8 {
			t.Errorf("%d requests, %d served; want 8", n, served.Load())
		}
	})
}

func TestEventsArriveOneByOne(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, p Protocol) {
		t.Parallel()
		b := newBench(t, benchOptions{settings: Settings{Protocol: p}})
		ctx, leave := context.WithCancel(t.Context())
		request, _ := http.NewRequestWithContext(ctx, http.MethodGet, "https://app.example.org/events", nil)
		response, err := b.visitor().Do(request)
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(response.Body)
		for i := range 3 {
			if !lines.Scan() || lines.Text() != fmt.Sprintf("data: %d", i) || !lines.Scan() {
				t.Fatalf("event %d: %q, %v", i, lines.Text(), lines.Err())
			}
		}
		if n := b.connector.Status().Connections[0].InFlight; n != 1 {
			t.Errorf("%d in flight, want 1", n)
		}
		leave()
		_ = response.Body.Close()
		eventually(t, "the visitor's leaving ends the request", 5*time.Second, func() bool {
			return b.connector.Status().Connections[0].InFlight == 0
		})
	})
}

// dial opens a WebSocket.
func (b *bench) dial(t *testing.T) io.ReadWriteCloser {
	t.Helper()
	request, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://app.example.org/upgrade", nil)
	for name, value := range map[string]string{"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="} {
		request.Header.Set(name, value)
	}
	response, err := b.visitor().Transport.RoundTrip(request)
	if err != nil {
		t.Fatal(err)
	}
	if response.StatusCode != http.StatusSwitchingProtocols || response.Header.Get("Sec-Websocket-Accept") != "yes" {
		t.Fatalf("got %s, %v", response.Status, response.Header)
	}
	return response.Body.(io.ReadWriteCloser)
}

func TestWebSocket(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, p Protocol) {
		t.Parallel()
		b := newBench(t, benchOptions{settings: Settings{Protocol: p}})
		stream := b.dial(t)
		for n := range 12 {
			sent := bytes.Repeat([]byte{byte(n)}, 1<<n)
			if _, err := stream.Write(sent); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(sent))
			if _, err := io.ReadFull(stream, got); err != nil || !bytes.Equal(got, sent) {
				t.Fatalf("message %d: %v", n, err)
			}
		}
		_ = stream.Close()
		_ = b.dial(t).Close()
		eventually(t, "both streams end", 5*time.Second, func() bool {
			return b.connector.Status().Connections[0].InFlight == 0
		})
		b.lossless(t)
	})
}

// TestTrailers pins what gRPC depends on: HTTP/2 carries trailers, and cloudflared
// over QUIC drops them, which is why Settings.Trailers is there.
func TestTrailers(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, p Protocol) {
		t.Parallel()
		b := newBench(t, benchOptions{settings: Settings{Protocol: p}})
		request, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://app.example.org/trailers", strings.NewReader("x"))
		request.Header.Set("Te", "trailers")
		response, err := b.visitor().Do(request)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, response.Body)
		_ = response.Body.Close()
		want := map[Protocol]string{HTTP2: "0 unannounced", QUIC: " "}[p]
		if got := response.Trailer.Get("Grpc-Status") + " " + response.Trailer.Get("Grpc-Message"); got != want {
			t.Errorf("trailers %q, want %q", got, want)
		}
	})
	s, err := Settings{Trailers: true}.check()
	if err != nil || s.Protocol != HTTP2 {
		t.Errorf("auto with trailers is %q, %v; want http2", s.Protocol, err)
	}
	if _, err := (Settings{Trailers: true, Protocol: QUIC}).check(); err == nil {
		t.Error("quic with trailers is no error")
	}
}

func TestErrorsAndPanics(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, p Protocol) {
		t.Parallel()
		plain := originService(t)
		b := newBench(t, benchOptions{settings: Settings{Protocol: p}, handler: roundTripper(func(r *http.Request) (*http.Response, error) {
			switch r.URL.Path {
			case "/error":
				return nil, errors.New("no origin service")
			case "/panic":
				panic("at the disco")
			case "/abort":
				panic(http.ErrAbortHandler)
			case "/half":
				return &http.Response{StatusCode: 200, Header: http.Header{}, Body: io.NopCloser(io.MultiReader(strings.NewReader("half"), broken{}))}, nil
			case "/upgrade":
				return &http.Response{StatusCode: 101, Header: http.Header{"Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "Sec-Websocket-Accept": {"yes"}}, Body: &deaf{closed: make(chan struct{})}}, nil
			}
			return plain.RoundTrip(r)
		})})
		for _, c := range []struct {
			path   string
			status int
			cut    bool
		}{{"/error", 502, false}, {"/panic", 502, false}, {"/abort", 502, false}, {"/half", 200, true}, {"/", 200, false}} {
			status, body, err := get(t.Context(), b.visitor(), "https://app.example.org"+c.path)
			// The reset may overtake the head.
			if c.cut && (err != nil || status == http.StatusBadGateway) {
				continue
			}
			if status != c.status || err != nil {
				t.Errorf("%s: %d %q, %v", c.path, status, body, err)
			}
		}
		stream := b.dial(t)
		_, _ = stream.Write([]byte("hear"))
		if text, _ := io.ReadAll(stream); len(text) > 0 { // and it ends
			t.Errorf("the stream says %q", text)
		}
		got := b.connector.Status()
		if got.Registered() != 1 || got.Totals.Panics != 3 || got.Totals.Failed != 4 {
			t.Errorf("status %+v", got)
		}
		if n := strings.Count(b.log.String(), "panic in a request"); n != 3 {
			t.Errorf("%d panics logged, want 3:\n%s", n, b.log)
		}
	})
}

// broken panics when it is read, as only a body can after the head was sent.
type broken struct{}

func (broken) Read([]byte) (int, error) { panic("in the body") }

// deaf is an upgraded connection that panics when something is said to it, and
// says nothing until it is closed.
type deaf struct {
	once   sync.Once
	closed chan struct{}
}

func (d *deaf) Read([]byte) (int, error)  { <-d.closed; return 0, io.EOF }
func (d *deaf) Write([]byte) (int, error) { panic("on the stream") }
func (d *deaf) Close() error              { d.once.Do(func() { close(d.closed) }); return nil }

// TestLargeBodies moves much both ways at once, in memory that does not grow
// with it. The bodies are as large as a test may take time for; the benchmark
// moves a gigabyte.
func TestLargeBodies(t *testing.T) {
	const size = 32 << 20
	each(t, func(t *testing.T, p Protocol) {
		b := newBench(t, benchOptions{settings: Settings{Protocol: p}})
		b.mustGet(t, "https://app.example.org/")
		_, before := usage()
		defer debug.SetGCPercent(debug.SetGCPercent(25)) // what is in use counts, not what waits to be collected
		var peak atomic.Uint64
		stop := make(chan struct{})
		watched := make(chan struct{})
		go func() {
			defer close(watched)
			for {
				select {
				case <-stop:
					return
				case <-time.After(100 * time.Millisecond):
					var m runtime.MemStats
					runtime.ReadMemStats(&m)
					peak.Store(max(peak.Load(), m.HeapAlloc))
				}
			}
		}()
		done := make(chan error, 2)
		go func() {
			response, err := b.visitor().Get(fmt.Sprintf("https://app.example.org/down?n=%d", size))
			if err == nil {
				var n int64
				if n, err = io.Copy(io.Discard, response.Body); n != size {
					err = fmt.Errorf("%d bytes down, %w", n, err)
				}
				_ = response.Body.Close()
			}
			done <- err
		}()
		go func() {
			request, _ := http.NewRequestWithContext(t.Context(), http.MethodPut, "https://app.example.org/up", io.LimitReader(zeros{}, size))
			request.ContentLength = size
			response, err := b.visitor().Do(request)
			if err == nil {
				text, _ := io.ReadAll(response.Body)
				if want := fmt.Sprint(size, nil); string(text) != want {
					err = fmt.Errorf("up: %s, want %s", text, want)
				}
				_ = response.Body.Close()
			}
			done <- err
		}()
		for range 2 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		close(stop)
		<-watched
		// Both ends, the visitor, the origin service and what the collector has
		// not got to yet are in this.
		if grown := int64(peak.Load()) - int64(before); grown > size*3/4 {
			t.Errorf("the heap grew by %d MiB for bodies of %d MiB", grown>>20, size>>20)
		}
		t.Logf("the heap grew by %d MiB", (int64(peak.Load())-int64(before))>>20)
		b.lossless(t)
	})
}

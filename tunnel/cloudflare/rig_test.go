package cloudflare

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/edgeward/edgeward/test/cfedge"
)

// TestMain lets more tests run side by side than there are processors: most of
// them wait for something.
func TestMain(m *testing.M) {
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	flag.Parse() // which may say otherwise
	os.Exit(m.Run())
}

// A bench is an edge with a tunnel, a connector for it, and an origin service.
type bench struct {
	*cfedge.Edge
	tunnel    cfedge.TunnelInfo
	connector *Connector
	log       *lockedBuffer
	base      *slog.Logger // into log
}

type benchOptions struct {
	edge     cfedge.Options
	settings Settings
	// stopped leaves the first Apply to the test.
	stopped bool
	memory  *Memory
	handler http.RoundTripper
	pace    func(*pace)
	served  func(Exchange)
}

func newBench(t *testing.T, o benchOptions) *bench {
	t.Helper()
	e, err := cfedge.Start(context.WithoutCancel(t.Context()), o.edge)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{Edge: e, log: &lockedBuffer{}}
	b.tunnel = e.Cloud().AddTunnel(e.Cloud().AddAccount("home"), "home", nil)
	if o.handler == nil {
		o.handler = originService(t)
	}
	b.base = slog.New(slog.NewTextHandler(io.MultiWriter(b.log, verbose(t)), &slog.HandlerOptions{Level: slog.LevelInfo}))
	b.connector = New(Options{
		Name: "home", Version: "edgeward-test", Handler: o.handler, Memory: o.memory, Served: o.served, Log: b.base,
	})
	b.connector.pace.stagger = 20 * time.Millisecond
	if o.pace != nil {
		o.pace(&b.connector.pace)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = b.connector.Drain(ctx)
		b.Close()
	})
	if !o.stopped {
		b.apply(t, o.settings)
		b.serves(t, max(o.settings.Connections, 1))
	}
	return b
}

func verbose(t *testing.T) io.Writer {
	if testing.Verbose() {
		return t.Output()
	}
	return io.Discard
}

type lockedBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// credentials are the tunnel's present ones.
func (b *bench) credentials() Credentials {
	return Credentials{Account: b.tunnel.Account, Tunnel: b.tunnel.ID, Secret: b.tunnel.Secret}
}

// here points settings at the emulator, with one connection unless told, and a
// short lame duck.
func (b *bench) here(s Settings) Settings {
	s.Edge, s.RootCAs = b.Addrs(), b.RootCAs()
	s.Connections = max(s.Connections, 1)
	if s.LameDuck == 0 {
		s.LameDuck = 300 * time.Millisecond
	}
	return s
}

func (b *bench) apply(t *testing.T, s Settings) {
	t.Helper()
	if err := b.connector.Apply(t.Context(), b.credentials(), b.here(s)); err != nil {
		t.Fatal(err)
	}
}

// serves waits until the tunnel has n connections.
func (b *bench) serves(t *testing.T, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	if err := b.WaitConnections(ctx, b.tunnel.ID, n); err != nil {
		t.Fatalf("%v\n%s", err, b.log)
	}
	eventually(t, "the connector knows", 5*time.Second, func() bool { return b.connector.Status().Registered() >= n })
}

func (b *bench) visitor() *http.Client {
	v := b.Visitor("203.0.113.9")
	v.Tunnel = b.tunnel.ID
	return v.Client()
}

// lossless fails the test for every request that the connector lost.
func (b *bench) lossless(t *testing.T) {
	t.Helper()
	if c := b.Counts(); c.Failed+c.Stale+c.NoTunnel > 0 {
		t.Errorf("counted %+v: %s", c, strings.Join(b.Failures(), "\n"))
	}
}

func eventually(t *testing.T, what string, atMost time.Duration, is func() bool) {
	t.Helper()
	for end := time.Now().Add(atMost); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, atMost)
		}
	}
}

func get(ctx context.Context, client *http.Client, target string) (status int, body string, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return 0, "", err
	}
	response, err := client.Do(request)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = response.Body.Close() }()
	text, err := io.ReadAll(response.Body)
	return response.StatusCode, string(text), err
}

// mustGet fails the test unless the answer is 200.
func (b *bench) mustGet(t *testing.T, target string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	status, body, err := get(ctx, b.visitor(), target)
	if err != nil || status != http.StatusOK {
		t.Fatalf("GET %s: %d %q, %v\n%s", target, status, body, err, b.log)
	}
	return body
}

// each runs a test over both protocols.
func each(t *testing.T, test func(t *testing.T, p Protocol)) {
	for _, p := range []Protocol{HTTP2, QUIC} {
		t.Run(string(p), func(t *testing.T) { test(t, p) })
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// towards is a handler that sends everything to one origin service.
func towards(t *testing.T, service *httptest.Server) http.RoundTripper {
	t.Helper()
	to, err := url.Parse(service.URL)
	if err != nil {
		t.Fatal(err)
	}
	transport := service.Client().Transport.(*http.Transport)
	transport.DisableCompression = true
	transport.MaxIdleConnsPerHost = 64
	return roundTripper(func(r *http.Request) (*http.Response, error) {
		r.URL.Scheme, r.URL.Host = to.Scheme, to.Host
		return transport.RoundTrip(r)
	})
}

// originService answers: /echo the body, /down?n=bytes, /up counts, /events one
// every 50 ms, /early a 103 first, /slow after the time in ?d, /trailers,
// /upgrade as WebSocket does and then echoes, and anything else its host and path.
func originService(t *testing.T) http.RoundTripper {
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		w.Header()["X-Twice"] = []string{"one", "two"}
		fmt.Fprintf(w, "%s %s %s %s", r.Method, r.Host, r.URL.RequestURI(), r.Header.Get("Cf-Connecting-Ip"))
	})
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) })
	mux.HandleFunc("/down", func(w http.ResponseWriter, r *http.Request) {
		var n int64
		_, _ = fmt.Sscan(r.FormValue("n"), &n)
		w.Header().Set("Content-Length", fmt.Sprint(n))
		_, _ = io.CopyN(w, zeros{}, n)
	})
	mux.HandleFunc("/up", func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, n, err)
	})
	mux.HandleFunc("/events", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for i := range 1000 {
			if _, err := fmt.Fprintf(w, "data: %d\n\n", i); err != nil {
				return
			}
			w.(http.Flusher).Flush()
			select {
			case <-time.After(50 * time.Millisecond):
			case <-r.Context().Done():
				return
			}
		}
	})
	mux.HandleFunc("/early", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Link", "</style.css>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		fmt.Fprint(w, "late")
	})
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		d, _ := time.ParseDuration(r.FormValue("d"))
		select {
		case <-time.After(d):
			fmt.Fprint(w, "done")
		case <-r.Context().Done():
		}
	})
	mux.HandleFunc("/trailers", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "Grpc-Status")
		fmt.Fprint(w, "message")
		w.Header().Set("Grpc-Status", "0")
		w.Header().Set(http.TrailerPrefix+"Grpc-Message", "unannounced")
	})
	mux.HandleFunc("/upgrade", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "websocket" || r.Header.Get("Connection") != "Upgrade" || r.Header.Get("Sec-Websocket-Version") != "13" {
			http.Error(w, fmt.Sprint("no websocket: ", r.Header), http.StatusBadRequest)
			return
		}
		conn, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer func() { _ = conn.Close() }()
		_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: yes\r\n\r\n")
		_, _ = io.Copy(conn, buffered)
	})
	service := httptest.NewUnstartedServer(mux)
	service.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	service.Start()
	t.Cleanup(service.Close)
	return towards(t, service)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// usage is the number of goroutines and the heap in use, when things have
// settled: QUIC keeps what it knows of a closed connection for some seconds.
func usage() (goroutines int, heap uint64) {
	for same := 0; same < 10; time.Sleep(20 * time.Millisecond) {
		n := runtime.NumGoroutine()
		if same++; n != goroutines {
			goroutines, same = n, 0
		}
	}
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return goroutines, m.HeapAlloc
}

// flat demands that usage comes back to what it was.
func flat(t *testing.T, after string, goroutines int, heap uint64) {
	t.Helper()
	var n int
	var h uint64
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if n, h = usage(); n <= goroutines+2 && h <= heap+4<<20 {
			return
		}
	}
	text := make([]byte, 1<<20)
	t.Errorf("after %s: %d goroutines, were %d; heap %d KiB, was %d\n%s", after, n, goroutines, h>>10, heap>>10, text[:runtime.Stack(text, true)])
}

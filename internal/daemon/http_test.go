package daemon

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
)

// endpoints are those of a process with one metric.
func endpoints(log *slog.Logger) Endpoints {
	registry := prometheus.NewRegistry()
	held := prometheus.NewGauge(prometheus.GaugeOpts{Name: "edgeward_bouncer_elements", Help: "Elements that the kernel holds."})
	held.Set(7)
	registry.MustRegister(held)
	return Endpoints{
		Metrics: registry,
		Ready:   func() error { return nil },
		Status:  func() any { return map[string]int{"elements": 7} },
		Log:     log,
	}
}

// serve runs a server on loopback for the length of the test.
func serve(t *testing.T, e Endpoints) (base string, stop func() error) {
	t.Helper()
	s := Listen(netip.MustParseAddrPort("127.0.0.1:0"), e)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	stop = sync.OnceValue(func() error { cancel(); return <-ended })
	t.Cleanup(func() { _ = stop() })
	return "http://" + s.Addr().String(), stop
}

func get(t *testing.T, method, url string) (status int, header http.Header, body string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	client := http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, res.Header, string(text)
}

func TestEndpoints(t *testing.T) {
	var logged bytes.Buffer
	normal := func(*Endpoints) {}
	for _, c := range []struct {
		name   string
		change func(*Endpoints)
		method string
		path   string
		status int
		kind   string
		body   string
	}{
		{"alive", normal, "GET", "/healthz", 200, "text/plain; charset=utf-8", "ok\n"},
		{"ready", normal, "GET", "/readyz", 200, "text/plain; charset=utf-8", "ok\n"},
		{"not ready", func(e *Endpoints) { e.Ready = func() error { return errors.New("the kernel holds no table yet") } },
			"GET", "/readyz", 503, "text/plain; charset=utf-8", "the kernel holds no table yet\n"},
		{"alive, not ready", func(e *Endpoints) { e.Ready = func() error { return errors.New("no") } },
			"GET", "/healthz", 200, "text/plain; charset=utf-8", "ok\n"},
		{"readiness panics", func(e *Endpoints) { e.Ready = func() error { panic("nil map") } },
			"GET", "/readyz", 500, "text/plain; charset=utf-8", "internal error\n"},
		{"metrics", normal, "GET", "/metrics", 200, "text/plain; version=0.0.4; charset=utf-8; escaping=underscores",
			"# HELP edgeward_bouncer_elements Elements that the kernel holds.\n# TYPE edgeward_bouncer_elements gauge\nedgeward_bouncer_elements 7\n"},
		{"metrics but one", func(e *Endpoints) {
			e.Metrics.(*prometheus.Registry).MustRegister(brokenCollector{})
		}, "GET", "/metrics", 200, "text/plain; version=0.0.4; charset=utf-8; escaping=underscores",
			"# HELP edgeward_bouncer_elements Elements that the kernel holds.\n# TYPE edgeward_bouncer_elements gauge\nedgeward_bouncer_elements 7\n"},
		{"status", normal, "GET", "/v1/status", 200, "application/json", "{\n  \"elements\": 7\n}\n"},
		{"status that JSON cannot say", func(e *Endpoints) { e.Status = func() any { return math.NaN() } },
			"GET", "/v1/status", 500, "text/plain; charset=utf-8", "status cannot be written as JSON\n"},
		{"more routes", func(e *Endpoints) {
			e.Routes = map[string]http.Handler{"/v1/auth": http.RedirectHandler("/x", http.StatusFound)}
		}, "POST", "/v1/auth", 302, "", ""},
		{"unknown", normal, "GET", "/", 404, "text/plain; charset=utf-8", "404 page not found\n"},
		{"reading only", normal, "POST", "/v1/status", 405, "text/plain; charset=utf-8", "Method Not Allowed\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := endpoints(slog.New(slog.NewTextHandler(&logged, nil)))
			c.change(&e)
			base, stop := serve(t, e)
			status, header, body := get(t, c.method, base+c.path)
			if status != c.status || header.Get("Content-Type") != c.kind {
				t.Errorf("%d %s, want %d %s", status, header.Get("Content-Type"), c.status, c.kind)
			}
			if diff := cmp.Diff(c.body, body); diff != "" {
				t.Error(diff)
			}
			if err := stop(); err != nil {
				t.Error(err)
			}
		})
	}
	for _, want := range []string{"handler panicked", "path=/readyz", "cannot write status", "the kernel does not answer"} {
		if !strings.Contains(logged.String(), want) {
			t.Errorf("%q is not in the log:\n%s", want, logged.String())
		}
	}
}

// brokenCollector is one that cannot read what it should show.
type brokenCollector struct{}

var brokenDesc = prometheus.NewDesc("edgeward_broken", "Never there.", nil, nil)

func (brokenCollector) Describe(ch chan<- *prometheus.Desc) { ch <- brokenDesc }
func (brokenCollector) Collect(ch chan<- prometheus.Metric) {
	ch <- prometheus.NewInvalidMetric(brokenDesc, errors.New("the kernel does not answer"))
}

// TestTakenAddress: an address that another program has is waited for, and that
// ends nothing.
func TestTakenAddress(t *testing.T) {
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var logged bytes.Buffer
	e := endpoints(slog.New(slog.NewTextHandler(&logged, nil)))
	s := Listen(other.Addr().(*net.TCPAddr).AddrPort(), e)
	if err := s.Missing(); err == nil || !strings.Contains(err.Error(), "in use") || s.Addr().String() != other.Addr().String() {
		t.Errorf("while it is taken: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	time.Sleep(50 * time.Millisecond)
	_ = other.Close()
	for begin := time.Now(); s.Missing() != nil; time.Sleep(20 * time.Millisecond) {
		if time.Since(begin) > 5*bindRetry {
			t.Fatal(s.Missing())
		}
	}
	if status, _, _ := get(t, "GET", "http://"+s.Addr().String()+"/healthz"); status != 200 {
		t.Errorf("once it is free: %d", status)
	}
	cancel()
	if err := <-ended; err != nil || strings.Count(logged.String(), "level=WARN") != 1 {
		t.Errorf("%v\n%s", err, logged.String())
	}

	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	if other, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := Listen(other.Addr().(*net.TCPAddr).AddrPort(), e).Run(ctx); err != nil {
		t.Errorf("ended while it waits: %v", err)
	}
}

// TestStrangersAreTurnedAway: nothing is read of those who may not ask.
func TestStrangersAreTurnedAway(t *testing.T) {
	asked := make(chan struct{}, 1)
	handler := http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked <- struct{}{} })
	admit := func(peer netip.Addr) bool { return peer != netip.MustParseAddr("127.0.0.1") }
	s := ListenFor(netip.MustParseAddrPort("127.0.0.1:0"), "auth", handler, admit, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	for from, want := range map[string]bool{"127.0.0.1": false, "127.0.0.2": true} {
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		conn, err := dialer.Dial("tcp", s.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(time.Second))
		if want {
			_, _ = io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n")
		}
		text, err := io.ReadAll(conn) // who is turned away need not ask for that
		if got := strings.HasPrefix(string(text), "HTTP/1.0 200"); got != want || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: %q, %v", from, text, err)
		}
		_ = conn.Close()
	}
	cancel()
	if err := <-ended; err != nil || len(asked) != 1 {
		t.Errorf("%v, asked %d times", err, len(asked))
	}
}

// TestMostOpen: connections that are held open take no more memory than so many
// can, and there is room again once they end.
func TestMostOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var logged bytes.Buffer
		listener := &pipes{conns: make(chan net.Conn), closed: make(chan struct{})}
		s := Listen(netip.MustParseAddrPort("127.0.0.1:0"), endpoints(slog.New(slog.NewTextHandler(&logged, nil))))
		_ = s.listener.Close()
		s.listener = listener
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- s.Run(ctx) }()
		asks := func(conn net.Conn) bool {
			go func() { _, _ = io.WriteString(conn, "GET /healthz HTTP/1.0\r\n\r\n") }()
			text, _ := io.ReadAll(conn)
			return strings.HasPrefix(string(text), "HTTP/1.0 200")
		}
		var held []net.Conn
		for range mostOpen {
			held = append(held, listener.dial())
			synctest.Wait()
		}
		for range 3 {
			if asks(listener.dial()) {
				t.Errorf("one more than %d is answered", mostOpen)
			}
		}
		_ = held[0].Close()
		synctest.Wait()
		if !asks(listener.dial()) || strings.Count(logged.String(), "too many connections") != 1 {
			t.Errorf("no answer where there is room again, or not said once: %s", logged.String())
		}
		for _, conn := range held {
			_ = conn.Close()
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// TestListenForProxies: one handler, alone, for requests that carry what a
// browser sent, within bounds.
func TestListenForProxies(t *testing.T) {
	var logged bytes.Buffer
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/panic" {
			panic("oh")
		}
	})
	everybody := func(netip.Addr) bool { return true }
	s := ListenFor(netip.MustParseAddrPort("127.0.0.1:0"), "auth", handler, everybody, slog.New(slog.NewTextHandler(&logged, nil)))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	for path, want := range map[string]int{"/": 200, "/metrics": 200, "/panic": 500} {
		if status, _, _ := get(t, "GET", "http://"+s.Addr().String()+path); status != want {
			t.Errorf("%s: %d, want %d", path, status, want)
		}
	}
	for size, want := range map[int]int{100 << 10: 200, 200 << 10: 431} {
		req, err := http.NewRequest("GET", "http://"+s.Addr().String(), nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Cookie", strings.Repeat("c", size))
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != want {
			t.Errorf("%d bytes of headers: %d, want %d", size, res.StatusCode, want)
		}
	}
	cancel()
	if err := <-ended; err != nil || s.String() != "auth" || !strings.Contains(logged.String(), "handler panicked") {
		t.Errorf("%v, %s, %s", err, s, logged.String())
	}
}

// TestLostListener: a server that can no longer serve must end the process.
func TestLostListener(t *testing.T) {
	s := Listen(netip.MustParseAddrPort("127.0.0.1:0"), endpoints(slog.New(slog.DiscardHandler)))
	_ = s.listener.Close()
	if err := s.Run(t.Context()); err == nil || !strings.HasPrefix(err.Error(), "serve 127.0.0.1:") {
		t.Errorf("%v", err)
	}
}

// pipes is a listener whose connections are in memory, and so live in the
// pretended time of synctest.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case conn := <-p.conns:
		return conn, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}
func (p *pipes) Close() error   { p.once.Do(func() { close(p.closed) }); return nil }
func (p *pipes) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }
func (p *pipes) dial() net.Conn {
	ours, theirs := net.Pipe()
	p.conns <- theirs
	return ours
}

func TestSlowClients(t *testing.T) {
	for _, c := range []struct {
		name, says string
		cut        time.Duration // after which the connection ends
	}{
		{"never asks", "", readTimeout},
		{"never ends its header", "GET /healthz HTTP/1.1\r\nHost: a\r\n", readTimeout},
		{"asks, then holds the connection", "GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", idleTimeout},
		{"sends a body that never comes", "GET /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n", readTimeout},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				listener := &pipes{conns: make(chan net.Conn), closed: make(chan struct{})}
				s := Listen(netip.MustParseAddrPort("127.0.0.1:0"), endpoints(slog.New(slog.DiscardHandler)))
				_ = s.listener.Close()
				s.listener = listener
				ctx, cancel := context.WithCancel(t.Context())
				ended := make(chan error, 1)
				go func() { ended <- s.Run(ctx) }()

				conn := listener.dial()
				start := time.Now()
				go func() { _, _ = io.WriteString(conn, c.says) }()
				_, _ = io.Copy(io.Discard, conn)
				if took := time.Since(start); took > c.cut+time.Second || took == 0 {
					t.Errorf("held the connection for %v, want at most %v", took, c.cut)
				}
				_ = conn.Close()
				cancel()
				if err := <-ended; err != nil {
					t.Error(err)
				}
			})
		})
	}
}

func TestAnswersUnderWayComeToTheirEnd(t *testing.T) {
	for _, c := range []struct {
		name   string
		needs  time.Duration
		answer bool
	}{
		{"an answer that is nearly there", time.Second, true},
		{"an answer that is not", time.Minute, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				listener := &pipes{conns: make(chan net.Conn), closed: make(chan struct{})}
				e := endpoints(slog.New(slog.DiscardHandler))
				asked := make(chan struct{})
				e.Status = func() any { close(asked); time.Sleep(c.needs); return "done" }
				s := Listen(netip.MustParseAddrPort("127.0.0.1:0"), e)
				_ = s.listener.Close()
				s.listener = listener
				ctx, cancel := context.WithCancel(t.Context())
				ended := make(chan error, 1)
				go func() { ended <- s.Run(ctx) }()

				conn := listener.dial()
				go func() { _, _ = io.WriteString(conn, "GET /v1/status HTTP/1.1\r\nHost: a\r\n\r\n") }()
				go func() { <-asked; cancel() }()
				start := time.Now()
				text, _ := io.ReadAll(conn)
				if answered := strings.Contains(string(text), `"done"`); answered != c.answer || time.Since(start) > lastAnswers {
					t.Errorf("after %v: %q", time.Since(start), text)
				}
				if err := <-ended; err != nil {
					t.Error(err)
				}
				time.Sleep(time.Hour) // the handler too must leave the bubble
			})
		})
	}
}

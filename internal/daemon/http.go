package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Endpoints are what a process tells about itself over HTTP. All but Routes
// are needed.
type Endpoints struct {
	// Metrics is what /metrics shows.
	Metrics prometheus.Gatherer
	// Ready returns nil when the process does its whole work, otherwise why
	// not; /readyz says so. /healthz needs no answer but that it answers.
	Ready func() error
	// Status returns what /v1/status shows as JSON.
	Status func() any
	// Routes are further handlers, by pattern as of http.ServeMux.
	Routes map[string]http.Handler
	Log    *slog.Logger
}

// Server serves Endpoints. Make it with Listen; it is a Task.
type Server struct {
	name     string
	listener net.Listener
	server   *http.Server
}

// How long clients may take. What a scrape, a probe or the command line asks
// for is small; who is slower than this holds a connection and wants nothing.
const (
	readTimeout  = 5 * time.Second
	writeTimeout = 30 * time.Second
	idleTimeout  = 2 * time.Minute
	headerLimit  = 16 << 10
	// handedOn is what a proxy may hand on of its client's headers, cookies
	// among them: more than browsers and servers let through.
	handedOn = 128 << 10
	// lastAnswers is how long answers may take once the process is to end.
	lastAnswers = 3 * time.Second
)

// Listen takes the address, so that an address that is taken is an error
// before anything has begun; Run serves.
func Listen(addr netip.AddrPort, endpoints Endpoints) (*Server, error) {
	listener, err := net.Listen("tcp", addr.String())
	if err != nil {
		return nil, fmt.Errorf("serve metrics and health: %w", err)
	}
	return serverOf("http", listener, endpoints.handler(), writeTimeout, headerLimit, endpoints.Log), nil
}

// ListenFor is Listen for one handler that proxies ask about their clients'
// requests, in answers that are small and quick. name is the task's.
func ListenFor(addr netip.AddrPort, name string, handler http.Handler, log *slog.Logger) (*Server, error) {
	listener, err := net.Listen("tcp", addr.String())
	if err != nil {
		return nil, fmt.Errorf("serve %s: %w", name, err)
	}
	return serverOf(name, listener, contain(handler, log), readTimeout, handedOn, log), nil
}

func serverOf(name string, listener net.Listener, handler http.Handler, write time.Duration, headers int, log *slog.Logger) *Server {
	return &Server{
		name:     name,
		listener: listener,
		server: &http.Server{
			Handler:           handler,
			ReadHeaderTimeout: readTimeout,
			ReadTimeout:       readTimeout,
			WriteTimeout:      write,
			IdleTimeout:       idleTimeout,
			MaxHeaderBytes:    headers,
			ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		},
	}
}

// Addr is the address that is served, with the port that was found for port 0.
func (s *Server) Addr() netip.AddrPort {
	return s.listener.Addr().(*net.TCPAddr).AddrPort()
}

// String names the server.
func (s *Server) String() string { return s.name }

// Run serves until ctx ends, then lets answers under way come to their end.
func (s *Server) Run(ctx context.Context) error {
	stopped := make(chan error, 1)
	go func() { stopped <- s.server.Serve(s.listener) }()
	select {
	case err := <-stopped:
		return fmt.Errorf("serve %s: %w", s.Addr(), err)
	case <-ctx.Done():
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastAnswers)
	defer cancel()
	err := s.server.Shutdown(last)
	if errors.Is(err, context.DeadlineExceeded) {
		err = s.server.Close()
	}
	<-stopped
	return err
}

func (e *Endpoints) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(e.Metrics, promhttp.HandlerOpts{
		// One broken collector must not hide what the others say.
		ErrorHandling: promhttp.ContinueOnError,
		ErrorLog:      slog.NewLogLogger(e.Log.Handler(), slog.LevelWarn),
		// Scrapes read the kernel: a crowd of them is nobody's wish.
		MaxRequestsInFlight: 4,
		Timeout:             writeTimeout / 2,
	}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { answer(w, nil) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) { answer(w, e.Ready()) })
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) {
		text, err := json.MarshalIndent(e.Status(), "", "  ")
		if err != nil {
			e.Log.Error("cannot write status", "component", "http", "err", err)
			http.Error(w, "status cannot be written as JSON", http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Cache-Control", "no-store")
		_, _ = w.Write(append(text, '\n'))
	})
	for pattern, handler := range e.Routes {
		mux.Handle(pattern, handler)
	}
	return contain(mux, e.Log)
}

// answer says ok, or what is missing.
func answer(w http.ResponseWriter, err error) {
	w.Header().Set("Cache-Control", "no-store")
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = w.Write([]byte("ok\n"))
}

// contain makes a panic a log line and an answer: net/http would contain it
// too, but cut the connection and write outside our log's form.
func contain(next http.Handler, log *slog.Logger) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			if v := recover(); v == http.ErrAbortHandler {
				panic(v) // meant to cut the connection
			} else if v != nil {
				log.Error("handler panicked", "component", "http", "path", r.URL.Path, "err", fmt.Sprint(v))
				http.Error(w, "internal error", http.StatusInternalServerError)
			}
		}()
		next.ServeHTTP(w, r)
	})
}

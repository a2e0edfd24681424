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
	"sync"
	"sync/atomic"
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

// Server answers at an address. Make it with Listen or ListenFor; it is a Task.
type Server struct {
	name   string
	addr   netip.AddrPort
	log    *slog.Logger
	server *http.Server
	door   door

	mu       sync.Mutex
	listener net.Listener // nil until the address is taken
	missing  error        // why it is not
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
	// mostOpen is how many connections may be open from this machine, and how
	// many from all others: each may hold as much as its headers.
	mostOpen = 512
	// bindRetry is the time between tries to take an address, fullQuiet that
	// between two words about too many connections.
	bindRetry = 2 * time.Second
	fullQuiet = 10 * time.Minute
)

// Listen takes the address; Run serves. Where it cannot, because another program
// has it or no interface has it yet, it says so and Run goes on trying: what the
// process does matters more than questions about it.
func Listen(addr netip.AddrPort, endpoints Endpoints) *Server {
	return serverOf("http", addr, endpoints.handler(), writeTimeout, headerLimit, nil, endpoints.Log)
}

// ListenFor is Listen for one handler that proxies ask about their clients'
// requests, in answers that are small and quick. name is the task's. admit says
// which peers may ask: the others' connections are closed before anything is read
// of them. It is called by one goroutine.
func ListenFor(addr netip.AddrPort, name string, handler http.Handler, admit func(netip.Addr) bool, log *slog.Logger) *Server {
	return serverOf(name, addr, contain(handler, log), readTimeout, handedOn, admit, log)
}

func serverOf(name string, addr netip.AddrPort, handler http.Handler, write time.Duration, headers int, admit func(netip.Addr) bool, log *slog.Logger) *Server {
	s := &Server{
		name: name,
		addr: addr,
		log:  log.With("component", name),
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
	s.door = door{admit: admit, log: s.log}
	s.server.ConnState = s.door.state
	if _, err := s.take(); err != nil {
		s.log.Warn("cannot take the address, trying until it is free", "listen", addr, "err", err)
	}
	return s
}

// take takes the address, unless it is taken.
func (s *Server) take() (net.Listener, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.listener == nil {
		listener, err := net.Listen("tcp", s.addr.String())
		if s.missing = err; err != nil {
			return nil, err
		}
		s.listener = listener
	}
	return s.listener, nil
}

// Missing returns nil while the address is this server's, otherwise why it is
// not.
func (s *Server) Missing() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.missing
}

// Addr is the address that is served, with the port that was found for port 0.
func (s *Server) Addr() netip.AddrPort {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.listener == nil {
		return s.addr
	}
	return s.listener.Addr().(*net.TCPAddr).AddrPort()
}

// String names the server.
func (s *Server) String() string { return s.name }

// Run serves until ctx ends, then lets answers under way come to their end.
func (s *Server) Run(ctx context.Context) error {
	late := s.Missing() != nil
	listener, err := s.take()
	for ; err != nil; listener, err = s.take() {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(bindRetry):
		}
	}
	if late {
		s.log.Info("the address is free, serving", "listen", s.addr)
	}
	stopped := make(chan error, 1)
	s.door.Listener = listener
	go func() { stopped <- s.server.Serve(&s.door) }()
	select {
	case err := <-stopped:
		return fmt.Errorf("serve %s: %w", s.Addr(), err)
	case <-ctx.Done():
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastAnswers)
	defer cancel()
	err = s.server.Shutdown(last)
	if errors.Is(err, context.DeadlineExceeded) {
		err = s.server.Close()
	}
	<-stopped
	return err
}

// door lets connections in: from those that may ask, and no more of them than
// memory has room for. This machine has room of its own, so that strangers who
// hold every connection keep no probe out.
type door struct {
	net.Listener
	admit func(netip.Addr) bool // nil for everybody
	log   *slog.Logger
	open  [2]atomic.Int64 // from others and from this machine
	said  time.Time       // of the one goroutine that accepts
}

// Accept returns the next connection that may stay.
func (d *door) Accept() (net.Conn, error) {
	for {
		conn, err := d.Listener.Accept()
		if err != nil {
			return nil, err
		}
		peer := peerOf(conn)
		if d.admit != nil && !d.admit(peer) {
			_ = conn.Close()
			continue
		}
		if d.count(conn).Load() < mostOpen {
			return conn, nil
		}
		_ = conn.Close()
		if now := time.Now(); now.Sub(d.said) >= fullQuiet {
			d.said = now
			d.log.Warn("too many connections are open, closing new ones", "peer", peer, "open", mostOpen)
		}
	}
}

// state counts connections, as http.Server tells of them: a new one before the
// next is accepted.
func (d *door) state(conn net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew:
		d.count(conn).Add(1)
	case http.StateClosed, http.StateHijacked:
		d.count(conn).Add(-1)
	}
}

func (d *door) count(conn net.Conn) *atomic.Int64 {
	if peerOf(conn).IsLoopback() {
		return &d.open[1]
	}
	return &d.open[0]
}

// peerOf is the zero Addr for what is not TCP.
func peerOf(conn net.Conn) netip.Addr {
	if a, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
		return a.AddrPort().Addr().Unmap().WithZone("")
	}
	return netip.Addr{}
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
		http.Error(w, OneLine(err), http.StatusServiceUnavailable)
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

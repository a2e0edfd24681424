package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Socket answers the command line on a unix socket that the process's own user
// alone may use. Make it with ListenSocket; it is a Task.
type Socket struct {
	path   string
	server *http.Server
	log    *slog.Logger
	listen *net.UnixListener // nil while a predecessor has the socket
	file   os.FileInfo       // the socket that listen made
}

// Answers are what can be asked, by path: each returns what is shown as JSON.
type Answers map[string]func(query url.Values) (any, error)

// Orders are what can be ordered, by path: each is told who orders it, and
// returns what is shown as JSON. Root and the process's own user alone may give
// orders.
type Orders map[string]func(query url.Values, by string) (any, error)

// askTimeout is how long a question may take on the way in, and its answer on
// the way out. An order may have to wait for all that came before it.
const (
	askTimeout   = 10 * time.Second
	orderTimeout = time.Minute
)

// ErrNotRunning says that nobody answers at a socket.
var ErrNotRunning = errors.New("nobody answers")

// ListenSocket takes the socket at path; what a predecessor that is gone left
// there makes way. One that lives keeps it: Run then waits for its end, since a
// process may start before the one that it replaces is done. Where no socket can
// be made at all it fails.
func ListenSocket(path string, answers Answers, orders Orders, log *slog.Logger) (*Socket, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("listen for the command line: %w", err)
	}
	s := &Socket{path: path, log: log.With("component", "control socket"), server: serverOfSocket(answers, orders, log)}
	switch err := s.take(); {
	case errors.Is(err, errTaken):
		s.log.Warn("cannot take the socket, trying until it is free", "err", err)
	case err != nil:
		return nil, fmt.Errorf("listen for the command line: %w", err)
	}
	return s, nil
}

// errTaken says that a process that lives has the socket.
var errTaken = errors.New("another process answers")

// take takes the socket, if nobody who lives has it.
func (s *Socket) take() error {
	c, err := net.DialTimeout("unix", s.path, time.Second)
	switch {
	case err == nil:
		_ = c.Close()
		return fmt.Errorf("%w at %s", errTaken, s.path)
	case errors.Is(err, unix.EAGAIN): // it has more questions than it can queue
		return fmt.Errorf("%w at %s: %w", errTaken, s.path, err)
	case !errors.Is(err, unix.ECONNREFUSED):
	default:
		if info, err := os.Lstat(s.path); err == nil && info.Mode().Type() == os.ModeSocket {
			if err := os.Remove(s.path); err != nil {
				return err
			}
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.path, Net: "unix"})
	if err != nil {
		return err
	}
	l.SetUnlinkOnClose(false) // see leave
	if err = os.Chmod(s.path, 0o600); err == nil {
		s.file, err = os.Lstat(s.path)
	}
	if err != nil {
		return errors.Join(err, l.Close(), os.Remove(s.path))
	}
	s.listen = l
	return nil
}

// leave removes the socket, unless it has become another process's.
func (s *Socket) leave() {
	if info, err := os.Lstat(s.path); err == nil && os.SameFile(info, s.file) {
		_ = os.Remove(s.path)
	}
}

func serverOfSocket(answers Answers, orders Orders, log *slog.Logger) *http.Server {
	mux := http.NewServeMux()
	for path, answer := range answers {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, r *http.Request) {
			value, err := answer(r.URL.Query())
			reply(w, value, err)
		})
	}
	for path, order := range orders {
		mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
			by, err := askedBy(r.Context())
			if err != nil {
				http.Error(w, err.Error(), http.StatusForbidden)
				return
			}
			value, err := order(r.URL.Query(), by)
			reply(w, value, err)
		})
	}
	return &http.Server{
		Handler: mux, ReadTimeout: askTimeout, WriteTimeout: orderTimeout, MaxHeaderBytes: headerLimit,
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, conn)
		},
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}

func reply(w http.ResponseWriter, value any, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(value)
}

// connKey is under what a request's context has its connection.
type connKey struct{}

// askedBy is who asks, as the kernel tells it of the connection. The mode of the
// socket says who may give orders, and this once more.
func askedBy(ctx context.Context) (string, error) {
	conn, ok := ctx.Value(connKey{}).(*net.UnixConn)
	if !ok {
		return "", errors.New("orders are for the socket alone")
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return "", fmt.Errorf("ask who asks: %w", err)
	}
	var who *unix.Ucred
	if controlErr := raw.Control(func(fd uintptr) {
		who, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); controlErr != nil || err != nil {
		return "", fmt.Errorf("ask who asks: %w", errors.Join(controlErr, err))
	}
	if who.Uid != 0 && int(who.Uid) != os.Getuid() {
		return "", fmt.Errorf("orders are for root alone, not for user %d", who.Uid)
	}
	return fmt.Sprintf("user %d, process %d", who.Uid, who.Pid), nil
}

// String names the task.
func (s *Socket) String() string { return "control socket" }

// Run answers until ctx ends, and removes the socket.
func (s *Socket) Run(ctx context.Context) error {
	if s.listen == nil {
		for err := error(errTaken); err != nil; err = s.take() {
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(bindRetry):
			}
		}
		s.log.Info("the socket is free, answering", "socket", s.path)
	}
	defer s.leave()
	stopped := make(chan error, 1)
	go func() { stopped <- s.server.Serve(s.listen) }()
	select {
	case err := <-stopped:
		return fmt.Errorf("answer the command line: %w", err)
	case <-ctx.Done():
		err := s.server.Close()
		<-stopped
		return err
	}
}

// Ask puts a question to the process at a socket and reads the answer into a
// value. The error is ErrNotRunning where nobody answers.
func Ask(ctx context.Context, socket, path string, query url.Values, into any) error {
	return ask(ctx, socket, http.MethodGet, path, query, into, askTimeout)
}

// Order gives an order to the process at a socket, and returns when it has been
// carried out. Its errors are those of Ask.
func Order(ctx context.Context, socket, path string, query url.Values, into any) error {
	return ask(ctx, socket, http.MethodPost, path, query, into, orderTimeout)
}

func ask(ctx context.Context, socket, method, path string, query url.Values, into any, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, "unix", socket)
			if err != nil {
				return nil, fmt.Errorf("%w at %s: %w", ErrNotRunning, socket, err)
			}
			return c, nil
		},
	}}
	wrap := func(err error) error {
		var failed *url.Error
		if errors.As(err, &failed) {
			err = failed.Err // its URL is of no meaning
		}
		return fmt.Errorf("ask the running process: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://process"+path+"?"+query.Encode(), nil)
	if err != nil {
		return wrap(err)
	}
	res, err := client.Do(req)
	if err != nil {
		return wrap(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, 16<<20))
	if err != nil {
		return wrap(err)
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("ask the running process: %s", strings.TrimSpace(string(body)))
	}
	if err := json.Unmarshal(body, into); err != nil {
		return wrap(err)
	}
	return nil
}

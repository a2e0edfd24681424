package bouncer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Control answers the command line on a unix socket that root alone may use. It
// is a daemon.Task.
type Control struct {
	bouncer *Bouncer
	path    string
	server  *http.Server
	listen  net.Listener
}

// controlTimeout is how long a question may take on the way in, and its answer
// on the way out.
const controlTimeout = 10 * time.Second

// ListenControl takes the socket at path; what a predecessor that is gone left
// there makes way.
func ListenControl(path string, b *Bouncer, log *slog.Logger) (*Control, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("listen for the command line: %w", err)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		_ = c.Close()
		return nil, fmt.Errorf("listen for the command line: another agent answers at %s", path)
	}
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() == os.ModeSocket {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("listen for the command line: %w", err)
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen for the command line: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("listen for the command line: %w", err), l.Close())
	}
	c := &Control{bouncer: b, path: path, listen: l}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) { answer(w, b.Status(), nil) })
	mux.HandleFunc("GET /v1/why", func(w http.ResponseWriter, r *http.Request) {
		addr, err := netip.ParseAddr(r.FormValue("address"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		why, err := b.Why(addr)
		answer(w, why, err)
	})
	c.server = &http.Server{
		Handler: mux, ReadTimeout: controlTimeout, WriteTimeout: controlTimeout, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	return c, nil
}

func answer(w http.ResponseWriter, value any, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(value)
}

// String names the task.
func (c *Control) String() string { return "control socket" }

// Run answers until ctx ends.
func (c *Control) Run(ctx context.Context) error {
	stopped := make(chan error, 1)
	go func() { stopped <- c.server.Serve(c.listen) }()
	select {
	case err := <-stopped:
		return fmt.Errorf("answer the command line: %w", err)
	case <-ctx.Done():
		err := c.server.Close() // removes the socket
		<-stopped
		return err
	}
}

// ErrNoAgent says that no agent answers at the socket.
var ErrNoAgent = errors.New("no agent answers")

// AskStatus asks the agent at the socket how it stands.
func AskStatus(ctx context.Context, socket string) (Status, error) {
	var s Status
	err := ask(ctx, socket, "/v1/status", nil, &s)
	return s, err
}

// AskWhy asks the agent at the socket about an address.
func AskWhy(ctx context.Context, socket string, addr netip.Addr) (Why, error) {
	var w Why
	err := ask(ctx, socket, "/v1/why", url.Values{"address": {addr.String()}}, &w)
	return w, err
}

func ask(ctx context.Context, socket, path string, query url.Values, into any) error {
	ctx, cancel := context.WithTimeout(ctx, controlTimeout)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, "unix", socket)
			if err != nil {
				return nil, fmt.Errorf("%w at %s: %w", ErrNoAgent, socket, err)
			}
			return c, nil
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent"+path+"?"+query.Encode(), nil)
	if err != nil {
		return fmt.Errorf("ask the agent: %w", err)
	}
	res, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("ask the agent: %w", err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, 16<<20))
	if err != nil {
		return fmt.Errorf("ask the agent: %w", err)
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("ask the agent: %s", strings.TrimSpace(string(body)))
	}
	if err := json.Unmarshal(body, into); err != nil {
		return fmt.Errorf("ask the agent: %w", err)
	}
	return nil
}

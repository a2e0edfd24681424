package rig

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
)

// TunnelOptions says what a tunnel follows and where it leads.
type TunnelOptions struct {
	// Program is the built edgeward-tunnel; see Build.
	Program string
	LAPI    *LAPI
	// Key is for no other process: all of them ask LAPI from one address.
	Key string
	// Config is what its configuration says beside lapi, listen, socket and
	// stateDir.
	Config string
}

// Tunnel is the real edgeward-tunnel, built from this repository.
type Tunnel struct {
	*process

	URL        string // of /v1/status and its like
	ConfigFile string
	Dir        string // all of its files

	opts TunnelOptions
}

// NewTunnel writes the configuration of a tunnel that does not run yet. ctx bounds
// the life of what Start starts; Close ends it and removes its directory.
func NewTunnel(ctx context.Context, opts TunnelOptions) (*Tunnel, error) {
	dir, err := os.MkdirTemp("", "edgeward-tunnel-")
	if err != nil {
		return nil, fmt.Errorf("make a directory for the tunnel: %w", err)
	}
	t := &Tunnel{ConfigFile: filepath.Join(dir, "tunnel.yaml"), Dir: dir, opts: opts}
	t.process = &process{
		name:  "edgeward-tunnel",
		args:  []string{opts.Program, "run", "--role", "cloudflare", "--config", t.ConfigFile},
		dir:   dir,
		logs:  filepath.Join(dir, "tunnel.log"),
		life:  ctx,
		ready: t.whole,
	}
	ports, err := freePorts(1)
	if err == nil {
		err = t.bind(ports)
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return t, nil
}

func (t *Tunnel) bind(ports []int) error {
	key := filepath.Join(t.Dir, "lapi-key")
	if err := os.WriteFile(key, []byte(t.opts.Key+"\n"), 0o600); err != nil {
		return fmt.Errorf("configure the tunnel: %w", err)
	}
	text := fmt.Sprintf("lapi: {url: %q, keyFile: %s, interval: 1s}\nlisten: 127.0.0.1:%d\nsocket: %s\nstateDir: %s\n%s",
		t.opts.LAPI.URL, key, ports[0], filepath.Join(t.Dir, "t.sock"), filepath.Join(t.Dir, "state"), t.opts.Config)
	if err := os.WriteFile(t.ConfigFile, []byte(text), 0o600); err != nil {
		return fmt.Errorf("configure the tunnel: %w", err)
	}
	t.URL = fmt.Sprintf("http://127.0.0.1:%d", ports[0])
	return nil
}

// Start starts the tunnel, and returns when every connection that it wants is
// registered at the edge.
func (t *Tunnel) Start(ctx context.Context) error { return t.startAnywhere(ctx, 1, t.bind) }

// TunnelStatus is of what the tunnel says of itself what is of use here; this
// package is used by the tests of the core, and cannot import its types.
type TunnelStatus struct {
	Links []struct {
		Wanted      int
		Connections []struct {
			Registered bool
			Protocol   string
		}
	}
}

// Status asks the tunnel how it stands.
func (t *Tunnel) Status(ctx context.Context) (s TunnelStatus, err error) {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, t.URL+"/v1/status", nil)
	if err != nil {
		return s, fmt.Errorf("ask the tunnel: %w", err)
	}
	res, err := client.Do(req)
	if err != nil {
		return s, fmt.Errorf("ask the tunnel: %w", err)
	}
	defer res.Body.Close()
	if err := json.NewDecoder(res.Body).Decode(&s); err != nil {
		return s, fmt.Errorf("read the tunnel's answer: %w", err)
	}
	return s, nil
}

func (t *Tunnel) whole(ctx context.Context) bool {
	s, err := t.Status(ctx)
	if err != nil || len(s.Links) == 0 {
		return false
	}
	for _, l := range s.Links {
		registered := 0
		for _, c := range l.Connections {
			if c.Registered {
				registered++
			}
		}
		if registered < max(1, l.Wanted) {
			return false
		}
	}
	return true
}

// Close drains the tunnel and removes its directory.
func (t *Tunnel) Close() error {
	err := t.Stop(context.Background())
	return errors.Join(err, os.RemoveAll(t.Dir))
}

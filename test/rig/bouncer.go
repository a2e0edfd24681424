package rig

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
)

// NodeBouncerOptions says where a node bouncer runs and whom it follows.
type NodeBouncerOptions struct {
	// NetNS is a file of the network namespace that is the node, which must
	// stay there for as long as the bouncer may be started.
	NetNS string
	// LAPI must have a socket: no address is in both networks.
	LAPI *LAPI
	Key  string
	// Config is what its configuration says beside lapi, socket and stateDir.
	Config string
}

// NodeBouncer is the real edgeward-bouncer, built from this repository, running
// in a network namespace with the one privilege that the manifests give it.
type NodeBouncer struct {
	*process

	Program    string // the built program
	ConfigFile string
	SocketPath string // of the command line
	Dir        string // all of its files

	opts NodeBouncerOptions
}

// StartNodeBouncer builds the node bouncer and starts it; it returns when the
// kernel holds the bans. ctx bounds its life; Close ends it and removes its
// directory, and what the kernel holds stays, as on a node.
func StartNodeBouncer(ctx context.Context, opts NodeBouncerOptions) (*NodeBouncer, error) {
	dir, err := os.MkdirTemp("", "edgeward-node-")
	if err != nil {
		return nil, fmt.Errorf("make a directory for the node bouncer: %w", err)
	}
	b := &NodeBouncer{
		Program: filepath.Join(dir, "edgeward-bouncer"), ConfigFile: filepath.Join(dir, "bouncer.yaml"),
		SocketPath: filepath.Join(dir, "bouncer.sock"), Dir: dir, opts: opts,
	}
	b.process = &process{
		name: "edgeward-bouncer",
		args: []string{
			"nsenter", "--net=" + opts.NetNS,
			"setpriv", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all,+net_admin",
			b.Program, "run", "--config", b.ConfigFile,
		},
		dir:   dir,
		logs:  filepath.Join(dir, "bouncer.log"),
		life:  ctx,
		ready: func(ctx context.Context) bool { return saysReady(ctx, b.SocketPath) },
	}
	err = Build(ctx, dir, "edgeward-bouncer")
	if err == nil {
		err = b.Configure(opts.Config)
	}
	if err == nil {
		err = b.Start(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return b, nil
}

// Configure writes the configuration that the next start reads, with extra beside
// lapi, socket and stateDir.
func (b *NodeBouncer) Configure(extra string) error {
	key := filepath.Join(b.Dir, "lapi-key")
	if err := os.WriteFile(key, []byte(b.opts.Key+"\n"), 0o600); err != nil {
		return fmt.Errorf("configure the node bouncer: %w", err)
	}
	text := fmt.Sprintf("lapi: {url: unix://%s, keyFile: %s, interval: 1s}\nsocket: %s\nstateDir: %s\n%s",
		b.opts.LAPI.SocketPath, key, b.SocketPath, filepath.Join(b.Dir, "state"), extra)
	if err := os.WriteFile(b.ConfigFile, []byte(text), 0o600); err != nil {
		return fmt.Errorf("configure the node bouncer: %w", err)
	}
	return nil
}

// saysReady asks a program at its socket whether it does what it is there for.
func saysReady(ctx context.Context, socket string) bool {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://edgeward/v1/status", nil)
	if err != nil {
		return false
	}
	res, err := client.Do(req)
	if err != nil {
		return false
	}
	defer res.Body.Close()
	var status struct{ Ready string }
	return json.NewDecoder(res.Body).Decode(&status) == nil && status.Ready == "yes"
}

// Close stops the bouncer and removes its directory.
func (b *NodeBouncer) Close() error {
	err := b.Stop(context.Background())
	return errors.Join(err, os.RemoveAll(b.Dir))
}

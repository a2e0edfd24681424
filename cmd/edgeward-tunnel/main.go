// Command edgeward-tunnel keeps the public hosts of a cluster reachable through
// Cloudflare's edge, and stops there whom CrowdSec has banned, before anything in
// the cluster sees the request: that is the role cloudflare. In the role wireguard
// it is the gateway of the VPN, by which peers reach internal services and nothing
// else. Its run verb is the program; cleanup removes what it made at Cloudflare and
// what the gateway leaves on its machine; all others change nothing.
//
// As cloudflare it needs no privilege, no inbound port and no writable file system;
// two of them side by side serve the same hosts, and lose no request when one
// ends. As wireguard it needs CAP_NET_ADMIN, and is one on its machine.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/edgeward/edgeward/internal/command"
	"github.com/edgeward/edgeward/internal/daemon"
	"github.com/edgeward/edgeward/tunnel"
	"github.com/edgeward/edgeward/tunnel/wireguard/gateway"
)

func main() { os.Exit(program(os.Args[1:])) }

// program runs one command line and returns its exit code.
func program(args []string) int { return command.Run(commands(), args) }

// run is the program: the watcher keeps what each role needs in step with the
// file. Neither waits for the other.
func run(ctx context.Context, path string, role roles) error {
	start := time.Now()
	var log *slog.Logger
	watcher, c, err := tunnel.NewWatcher(path, func(c tunnel.Config) (_ *slog.Logger, err error) {
		log, err = daemon.NewLog(os.Stderr, string(c.LogFormat), os.Getenv)
		return log, err
	})
	if err != nil {
		return err
	}
	if role, err = role.of(path, &c); err != nil {
		return err
	}
	log.Info("starting", "version", daemon.Version().String(), "role", role.String(), "mode", string(c.Mode), "tunnels", len(c.Tunnels), "hosts", len(c.Hosts), "peers", len(c.Peers))

	file, err := filepath.Abs(path)
	if err != nil {
		return fmt.Errorf("find the configuration: %w", err)
	}
	all := &process{file: file, watcher: watcher, role: role}
	tasks := []daemon.Task{watcher}
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), all.inForce())
	if role.cloudflare {
		if all.public, err = newPublic(&c, log); err != nil {
			return err
		}
		more, err := all.public.tasks(&c, start, log)
		if err != nil {
			return err
		}
		tasks = append(tasks, more...)
		metrics.MustRegister(all.public.collector())
	}
	if role.wireguard {
		if all.vpn, err = gateway.New(gateway.Options{Config: *c.VPN(), StateDir: c.StateDir, Alone: !role.cloudflare, Log: log}); err != nil {
			return err
		}
		tasks = append(tasks, all.vpn)
		metrics.MustRegister(all.vpn.Collector())
	}
	watcher.OnChange(func(_ context.Context, next tunnel.Config) error {
		return all.enforce(restartOnly(c, next, log))
	})
	// Visitors and peers matter more than questions: an address that another
	// program has is waited for.
	server := daemon.Listen(c.Listen, daemon.Endpoints{Metrics: metrics, Ready: all.ready, Status: func() any { return all.outline() }, Log: log})
	tasks = append(tasks, server)
	if c.Socket != "" {
		if socket, err := daemon.ListenSocket(c.Socket, all.answers(), all.orders(), log); err != nil {
			log.Warn("status and why will not work", "err", err)
		} else {
			tasks = append(tasks, socket)
		}
	}
	return daemon.Run(ctx, daemon.Options{Log: log, Reload: all.reload, Grace: c.Drain.LameDuck + c.Drain.Grace + drainMargin}, tasks...)
}

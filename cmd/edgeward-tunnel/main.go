// Command edgeward-tunnel keeps the public hosts of a cluster reachable through
// Cloudflare's edge, and stops there whom CrowdSec has banned, before anything in
// the cluster sees the request. Its run verb is the program; check, status and
// why change nothing; cleanup removes what it made at Cloudflare.
//
// It needs no privilege, no inbound port and no writable file system. Two of
// them side by side serve the same hosts, and lose no request when one ends.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/edgeward/edgeward/internal/config"
	"github.com/edgeward/edgeward/internal/crowdsec"
	"github.com/edgeward/edgeward/internal/daemon"
	"github.com/edgeward/edgeward/tunnel"
)

func main() { os.Exit(program(os.Args[1:])) }

// program runs one command line and returns its exit code.
func program(args []string) int {
	root := commands()
	root.SetArgs(args)
	err := root.ExecuteContext(context.Background())
	var problems config.Problems
	switch {
	case errors.As(err, &problems):
		fmt.Fprintln(os.Stderr, problems) // a line each, which begins with its place
	case err != nil:
		fmt.Fprintln(os.Stderr, "edgeward-tunnel:", err)
	default:
		return 0
	}
	return 1
}

// run is the program: LAPI's stream goes into the gate, the connectors bring
// requests to it, and the watcher keeps both, and DNS, in step with the file. The
// gate comes first and waits for nobody; connectors and DNS follow it.
func run(ctx context.Context, path string, format tunnel.LogFormat) error {
	start := time.Now()
	log, err := daemon.NewLog(os.Stderr, string(format), os.Getenv)
	if err != nil {
		return err
	}
	watcher, c, err := tunnel.NewWatcher(path, log)
	if err != nil {
		return err
	}
	log.Info("starting", "version", daemon.Version().String(), "mode", string(c.Mode), "tunnels", len(c.Tunnels), "hosts", len(c.Hosts))

	gate, err := tunnel.New(c, log)
	if err != nil {
		return err
	}
	records := newRecords(&c, log)
	connectors := newConnectors(gate, records, &c, log)
	watcher.OnChange(func(_ context.Context, next tunnel.Config) error {
		return enforce(restartOnly(c, next, log), gate, connectors, records)
	})

	tasks := []daemon.Task{watcher, connectors, records}
	if c.HasLAPI() {
		agent := crowdsec.Agent{Type: "crowdsec-edgeward-tunnel-bouncer", Version: tunnel.Version}
		from, err := crowdsec.New(c.LAPI, agent, log)
		if err != nil {
			return err
		}
		tasks = append(tasks, stream{from.Stream(tunnel.Scopes, gate.Sink(), log)}, from.Usage(start, gate.Totals))
	}
	status := func() any { return standing(gate, connectors, records, watcher) }
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(gate.Collector(connectors.links, records.calls), collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	// Visitors matter more than questions: an address that another program has is
	// waited for.
	server := daemon.Listen(c.Listen, daemon.Endpoints{
		Metrics: metrics, Ready: func() error { return tunnel.Ready(connectors.links()) }, Status: status, Log: log,
	})
	tasks = append(tasks, server)
	if c.Socket != "" {
		// Visitors matter more than questions about them.
		if socket, err := daemon.ListenSocket(c.Socket, answers(gate, status), nil, log); err != nil {
			log.Warn("status and why will not work", "err", err)
		} else {
			tasks = append(tasks, socket)
		}
	}
	return daemon.Run(ctx, daemon.Options{Log: log, Reload: watcher.Reload, Grace: c.Drain.LameDuck + c.Drain.Grace + drainMargin}, tasks...)
}

// Command edgeward-bouncer holds CrowdSec's bans in the kernel of one node. Its
// run verb is the agent; check, status and why change nothing; allow, unban and
// pause are orders to the agent, each for a time; cleanup removes the nftables
// table inet edgeward, and nothing else does: an agent that ends leaves the node
// protected.
//
// It needs CAP_NET_ADMIN and no other privilege (check --probe is for root, with
// CAP_SYS_ADMIN), and runs once per node.
package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"runtime/debug"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/edgeward/edgeward/bouncer"
	"github.com/edgeward/edgeward/internal/command"
	"github.com/edgeward/edgeward/internal/daemon"
	"github.com/edgeward/edgeward/internal/nft"
)

func main() { os.Exit(program(os.Args[1:])) }

// program runs one command line and returns its exit code.
func program(args []string) int { return command.Run(commands(), args) }

// run is the agent: LAPI's stream and the lists go into the bouncer, which keeps
// the kernel in step; what the kernel counts goes back to LAPI and to whoever
// scrapes. Proxies may ask the same table about their clients.
func run(ctx context.Context, c bouncer.Config) error {
	start := time.Now()
	log, err := daemon.NewLog(os.Stderr, string(c.LogFormat), os.Getenv)
	if err != nil {
		return err
	}
	// Decisions are long lists of numbers, quick to collect: what would wait to be
	// collected is most of what the process takes.
	debug.SetGCPercent(30)
	log.Info("starting", "version", daemon.Version().String(), "mode", string(c.Mode), "url", c.LAPI.URL)

	kernel, err := open(ctx, nft.Options{Shared: c.Firewall.Shared}, log)
	if err != nil {
		return err
	}
	defer kernel.Close() // what it holds stays

	b, err := bouncer.New(c, kernel, os.Getenv, log)
	if err != nil {
		return err
	}
	fed, err := follow(c, b, start, log)
	if err != nil {
		return err
	}
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(b.Collector(), collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	// Bans matter more than questions about them: an address that another program
	// has is waited for.
	server := daemon.Listen(c.Listen, daemon.Endpoints{
		Metrics: metrics, Ready: b.Ready, Status: func() any { return b.Status() }, Log: log,
	})
	b.Serves(server.Missing)
	tasks := append([]daemon.Task{b, server}, fed...)
	if c.Auth.Listen.IsValid() {
		auth := daemon.ListenFor(c.Auth.Listen, "auth endpoint", b.Auth(), b.Admits, log)
		b.Serves(auth.Missing)
		tasks = append(tasks, auth)
	}
	if c.Socket != "" {
		// Bans matter more than questions about them.
		if control, err := bouncer.ListenControl(c.Socket, b, log); err != nil {
			log.Warn("status, why and orders will not work", "err", err)
		} else {
			tasks = append(tasks, control)
		}
	}
	return daemon.Run(ctx, daemon.Options{Log: log}, tasks...)
}

// ownerPatience is how long a predecessor may take to let go of the table.
const ownerPatience = 30 * time.Second

// open takes hold of the table, once a predecessor that is ending has let go.
func open(ctx context.Context, opts nft.Options, log *slog.Logger) (*nft.Conn, error) {
	for deadline := time.Now().Add(ownerPatience); ; {
		conn, err := nft.Open(opts)
		if !errors.Is(err, nft.ErrOwned) || time.Now().After(deadline) || ctx.Err() != nil {
			return conn, err
		}
		log.Warn("another agent holds the table, waiting for it to end", "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

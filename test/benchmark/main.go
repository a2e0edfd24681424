// Command benchmark measures what the plugin costs, on the machine it runs on:
//
//   - the CPU time that the real Traefik spends on a request, without and with
//     the plugin in several configurations, side by side in one run;
//   - the memory that the real Traefik holds with tables of several sizes;
//   - the decision engine by itself, compiled and interpreted.
//
// It prints Markdown on standard output and what it is doing on standard error.
// It counts CPU time and not requests per second, because the latter measures
// the load generator and the machine's mood along with Traefik. It judges
// nothing by its exit status: a busy machine is not a broken plugin.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/edgeward/edgeward/test/benchmark/figures"
	"github.com/edgeward/edgeward/test/rig"
)

// options are the sizes of a run.
type options struct {
	rounds, requests   int
	clients, decisions int
	settle             time.Duration // how long a Traefik is left alone before its memory is read
	patience           time.Duration // how long in all to wait for a quiet machine
	benchtime          string        // for each benchmark of the engine
	only               *regexp.Regexp
	readme             bool
	root               string // the repository
	log                io.Writer
}

func (o options) say(format string, args ...any) { fmt.Fprintf(o.log, format+"\n", args...) }

func main() {
	opts := options{clients: 1024, settle: 10 * time.Second, only: regexp.MustCompile(""), log: os.Stderr}
	flag.IntVar(&opts.rounds, "rounds", 5, "rounds, of which the median counts")
	flag.IntVar(&opts.requests, "requests", 30000, "requests of each line in a round")
	flag.IntVar(&opts.decisions, "decisions", 100000, "decisions in the table")
	flag.DurationVar(&opts.patience, "patience", time.Minute, "time in all to wait for a quiet machine")
	flag.StringVar(&opts.benchtime, "benchtime", "100ms", "as in go test, for the decision engine")
	flag.BoolVar(&opts.readme, "readme", false, "rewrite the tables of docs/benchmarks.md")
	flag.Func("only", "measure only the lines that match this expression; \"engine\" is all of the engine's", func(text string) (err error) {
		opts.only, err = regexp.Compile(text)
		return err
	})
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, opts, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "benchmark:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, opts options, out io.Writer) error {
	// The clients and the origin keep to one processor, and leave the others to
	// Traefik.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	var err error
	if opts.root, err = rig.Root(); err != nil {
		return err
	}
	var report []string
	section := func(parts ...string) {
		text := strings.Join(parts, "\n")
		fmt.Fprintln(out, text)
		report = append(report, text)
	}
	requests, err := measureRequests(ctx, opts)
	if err != nil {
		return fmt.Errorf("measure requests: %w", err)
	}
	if requests != nil {
		section(requests.markdown(), requests.note()+"\n")
	}
	memory, err := measureMemory(ctx, opts)
	if err != nil {
		return err
	}
	if len(memory) > 0 {
		section(memoryMarkdown(memory))
	}
	if opts.readme {
		machine, err := figures.Machine()
		if err != nil {
			return err
		}
		report = slices.Insert(report, 0, "`make bench` measures this on your machine; here it was "+machine+".\n")
		if err := figures.WriteReadme(opts.root, "bench", strings.Join(report, "\n")); err != nil {
			return err
		}
	}
	if !opts.only.MatchString("engine") {
		return nil
	}
	engine, err := measureEngine(ctx, opts)
	if err != nil {
		return err
	}
	fmt.Fprintln(out, engine.markdown())
	return nil
}

// chosen returns the routes to measure, and those that they are compared with.
func chosen(all []*route, only *regexp.Regexp) []*route {
	wanted := map[string]bool{}
	for _, r := range all {
		if only.MatchString(r.name) {
			wanted[r.host], wanted[r.over] = true, true
		}
	}
	var routes []*route
	for _, r := range all {
		if wanted[r.host] {
			routes = append(routes, r)
		}
	}
	return routes
}

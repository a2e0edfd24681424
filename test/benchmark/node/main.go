// Command node measures what the node bouncer costs, on the machine it runs on:
//
//   - the built program side by side with the bouncer that Debian packages, each
//     in a network namespace of its own, on the same real LAPI;
//   - the built program alone, with as many decisions as no LAPI sends in time;
//   - what a packet costs, clean or banned, over no table at all and against the
//     peer's layout, by packets sent between namespaces.
//
// It prints Markdown on standard output and what it is doing on standard error.
// It needs root for the namespaces, and reaches no table outside them. It judges
// nothing by its exit status: a busy machine is not a slow bouncer.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/edgeward/edgeward/test/benchmark/figures"
	"github.com/edgeward/edgeward/test/rig"
)

// options are the sizes of a run.
type options struct {
	sizes   []int // of contests
	rounds  int   // of each
	scrapes int
	limit   time.Duration // how long a program may take to start
	soon    time.Duration // when bans that do not hold then do not hold
	quiet   time.Duration // how long a program has to rest to be called done
	settle  time.Duration // how long it is left alone before its memory is read

	alone  []int // decisions, where ours runs alone
	ranges int   // beside them
	bans   int   // made one by one

	tables  []int // bans in the tables that packets meet
	origins []int
	sources int // from which packets come
	turns   int // of each kind of packet in each table

	only   *regexp.Regexp
	readme bool
	log    io.Writer
}

// full are the sizes that the published figures come from.
var full = options{
	sizes: []int{15_000, 100_000}, rounds: 3, scrapes: 5, limit: time.Minute, soon: 5 * time.Second, quiet: 1500 * time.Millisecond, settle: 3 * time.Second,
	alone: []int{500_000, 1_000_000}, ranges: 10_000, bans: 5,
	tables: []int{0, 15_000, 100_000, 1_000_000}, origins: []int{1, 10, 20}, sources: 8192, turns: 12,
}

// quick are sizes that show in seconds that all of it works.
var quick = options{
	sizes: []int{1000}, rounds: 1, scrapes: 1, limit: time.Minute, soon: 2 * time.Second, quiet: 300 * time.Millisecond, settle: 300 * time.Millisecond,
	alone: []int{2000}, ranges: 100, bans: 1,
	tables: []int{0, 1000}, origins: []int{1, 3}, sources: 256, turns: 2,
}

func (o options) say(format string, args ...any) { fmt.Fprintf(o.log, format+"\n", args...) }

func main() {
	opts := full
	small := flag.Bool("quick", false, "show in seconds that all of it works; the figures mean nothing")
	rounds := flag.Int("rounds", full.rounds, "rounds side by side, of which the median counts")
	limit := flag.Duration("limit", full.limit, "time that a program may take to start; Debian's needs minutes for 100,000 decisions")
	sizes := full.sizes
	flag.Func("sizes", "decisions side by side, as in 15000,100000", func(text string) error {
		sizes = nil
		for field := range strings.SplitSeq(text, ",") {
			n, err := strconv.Atoi(field)
			if err != nil || n < sampled {
				return fmt.Errorf("want numbers of %d and more", sampled)
			}
			sizes = append(sizes, n)
		}
		return nil
	})
	readme := flag.Bool("readme", false, "rewrite the tables of docs/benchmarks.md")
	only := regexp.MustCompile("")
	flag.Func("only", "measure only the parts that match this expression: compare, alone, packets", func(text string) (err error) {
		only, err = regexp.Compile(text)
		return err
	})
	flag.Parse()
	opts.rounds, opts.limit, opts.sizes = max(1, *rounds), *limit, sizes
	if *small {
		opts = quick
	}
	opts.readme, opts.only, opts.log = *readme, only, os.Stderr
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, opts, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "benchmark: node:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, opts options, out io.Writer) error {
	if os.Getuid() != 0 {
		return errors.New("it makes network namespaces: run it as root")
	}
	root, err := rig.Root()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "edgeward-bench-")
	if err != nil {
		return fmt.Errorf("make a directory: %w", err)
	}
	defer os.RemoveAll(dir)
	ours := sync.OnceValues(func() (program, error) { return build(ctx, root, dir) })
	var report []string
	for _, part := range []struct {
		name    string
		measure func() (string, error)
	}{
		{"compare", func() (string, error) { return comparePart(ctx, opts, ours) }},
		{"alone", func() (string, error) { return alonePart(ctx, opts, ours) }},
		{"packets", func() (string, error) { return packetsPart(ctx, opts) }},
	} {
		if !opts.only.MatchString(part.name) {
			continue
		}
		others, err := figures.WatchMachine()
		if err != nil {
			return err
		}
		began := time.Now()
		text, err := part.measure()
		if err != nil {
			return fmt.Errorf("measure %s: %w", part.name, err)
		}
		share, err := others()
		if err != nil {
			return err
		}
		opts.say("%s: %v", part.name, time.Since(began).Round(time.Second))
		text += fmt.Sprintf("While this was measured, everything else, the kernel's own threads included, used\n%.0f %% of the machine.\n", 100*share)
		fmt.Fprintln(out, text)
		report = append(report, text)
	}
	if !opts.readme {
		return nil
	}
	machine, err := figures.Machine()
	if err != nil {
		return err
	}
	kernel, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return fmt.Errorf("read what the kernel is: %w", err)
	}
	release, _, _ := strings.Cut(strings.TrimSpace(string(kernel)), "-") // who built it is of no interest
	report = append([]string{fmt.Sprintf("The node bouncer, measured by `make bench` on %s, Linux %s.\n", machine, release)}, report...)
	return figures.WriteReadme(root, "bench node", strings.Join(report, "\n"))
}

func comparePart(ctx context.Context, opts options, ours func() (program, error)) (string, error) {
	mine, err := ours()
	if err != nil {
		return "", err
	}
	peer, err := fetchPeer(ctx)
	if err != nil {
		return "", err
	}
	programs := []program{mine, peer}
	contests, conducts, err := compare(ctx, opts, programs)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for _, c := range contests {
		fmt.Fprintln(&b, contestTable(c, programs))
	}
	fmt.Fprintln(&b, conductTable(conducts, programs, opts.soon))
	fmt.Fprintf(&b, `%d rounds in changing order, each program in a namespace of its own with its kernel
tables empty at first, on the same CrowdSec LAPI, both polling it every %v. Decisions
are on single addresses, a fifth of them IPv6, because the peer holds no ranges. It is
the release that Debian packages; later ones, which start faster, were not measured.
Enforced is when packets from %d of the addresses, spread over all, no longer arrive.
`, opts.rounds, pollEvery, sampled)
	return b.String(), nil
}

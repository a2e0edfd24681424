// Command vpn measures what the VPN gateway costs, on the machine it runs on:
//
//   - a turn of the device, with nothing new and with one peer, and its load;
//   - the access rules, changed and applied again;
//   - the built program: memory, start, and how long one who talks through it is
//     without an answer when it is killed and started again;
//   - bytes through the device in userspace, beside wireguard-go as it is, and
//     with access rules beside without;
//   - what a packet pays for access rules, granted or refused;
//   - the resolver's answers.
//
// It prints Markdown on standard output and what it is doing on standard error.
// It needs root: it runs itself again in a network namespace of its own, with a
// /run of its own, and reaches nothing outside. It judges nothing by its exit
// status: a busy machine is not a slow gateway. The kernel's WireGuard is not
// measured.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/edgeward/edgeward/test/benchmark/figures"
	"github.com/edgeward/edgeward/test/benchmark/stage"
	"github.com/edgeward/edgeward/test/rig"
)

// options are the sizes of a run.
type options struct {
	sizes []int // peers of a device
	loads int   // of each
	turns int   // of each device, of each kind

	grants  []int // peers in access rules
	changes int   // of each, of each kind

	memory []int         // peers of the program whose memory is read
	settle time.Duration // how long it is left alone before

	peers    int // of the gateways that are talked through
	restarts int

	rounds int
	spell  time.Duration // of bytes one way in a round

	tables  []int // peers in the rules that packets meet
	sources int
	blasts  int // of each kind of packet in each table

	questions int

	quick  bool
	readme bool
	only   *regexp.Regexp
	log    io.Writer
}

// full are the sizes that the published figures come from.
var full = options{
	sizes: []int{10, 1000, 10_000}, loads: 3, turns: 30,
	grants: []int{100, 1000, 10_000}, changes: 10,
	memory: []int{0, 1000, 10_000}, settle: 3 * time.Second,
	peers: 1000, restarts: 10, rounds: 7, spell: 700 * time.Millisecond,
	tables: []int{1000, 10_000}, sources: 8192, blasts: 12,
	questions: 20_000,
}

// quick are sizes that show in seconds that all of it works.
var quick = options{
	sizes: []int{10}, loads: 1, turns: 2,
	grants: []int{100}, changes: 1,
	memory: []int{10}, settle: 100 * time.Millisecond,
	peers: 10, restarts: 1, rounds: 1, spell: 100 * time.Millisecond,
	tables: []int{100}, sources: 256, blasts: 2,
	questions: 100,
}

func (o options) say(format string, args ...any) { fmt.Fprintf(o.log, format+"\n", args...) }

func main() {
	small := flag.Bool("quick", false, "show in seconds that all of it works; the figures mean nothing")
	readme := flag.Bool("readme", false, "rewrite the tables of docs/benchmarks.md")
	only := regexp.MustCompile("")
	flag.Func("only", "measure only the parts that match this expression: device, rules, program, restart, bytes, packets, names", func(text string) (err error) {
		only, err = regexp.Compile(text)
		return err
	})
	var dir string
	var child bool
	flag.StringVar(&dir, "inside", "", "measure here, with the program in this directory, as this program asks of itself")
	flag.BoolVar(&child, "gateway", false, "be a gateway, as this program asks of itself")
	flag.Parse()
	opts := full
	if *small {
		opts = quick
		opts.quick = true
	}
	opts.readme, opts.only, opts.log = *readme, only, os.Stderr
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	switch {
	case child:
		err = serve(os.Stdin, os.Stdout)
	case dir != "":
		err = measure(ctx, opts, dir, os.Stdout)
	default:
		err = run(ctx, opts, os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "benchmark: vpn:", err)
		os.Exit(1)
	}
}

// run builds the program and runs measure in namespaces of its own.
func run(ctx context.Context, opts options, out io.Writer) error {
	if os.Getuid() != 0 {
		return errors.New("it makes network namespaces: run it as root")
	}
	dir, err := os.MkdirTemp("", "edgeward-bench-")
	if err != nil {
		return fmt.Errorf("make a directory: %w", err)
	}
	defer os.RemoveAll(dir)
	if err := rig.Build(ctx, dir, "edgeward-tunnel"); err != nil {
		return err
	}
	var report bytes.Buffer
	args := []string{"-inside", dir, "-only", opts.only.String()}
	if opts.quick {
		args = append(args, "-quick")
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	cmd.Stdout, cmd.Stderr = io.MultiWriter(out, &report), opts.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // it has processes of its own to end
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("measure in namespaces: %w", err)
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
	root, err := rig.Root()
	if err != nil {
		return err
	}
	return figures.WriteReadme(root, "bench vpn", fmt.Sprintf("Measured on %s, Linux %s; WireGuard is in the process.\n\n%s", machine, release, report.String()))
}

// measure measures all parts in a world that furnish makes of these namespaces.
func measure(ctx context.Context, opts options, dir string, out io.Writer) error {
	if err := furnish(); err != nil {
		return fmt.Errorf("furnish namespaces: %w", err)
	}
	others, err := figures.WatchMachine()
	if err != nil {
		return err
	}
	for _, part := range []struct {
		name    string
		measure func(*stage.Scope, options) (string, error)
	}{
		{"device", devicePart},
		{"rules", rulesPart},
		{"program", func(s *stage.Scope, o options) (string, error) { return programPart(s, o, dir) }},
		{"restart", func(s *stage.Scope, o options) (string, error) { return restartPart(s, o, dir) }},
		{"bytes", bytesPart},
		{"packets", packetsPart},
		{"names", namesPart},
	} {
		if !opts.only.MatchString(part.name) {
			continue
		}
		began := time.Now()
		var text string
		err := stage.Within(ctx, func(s *stage.Scope) (err error) {
			text, err = part.measure(s, opts)
			return err
		})
		if err != nil {
			return fmt.Errorf("measure %s: %w", part.name, err)
		}
		opts.say("%s: %v", part.name, time.Since(began).Round(100*time.Millisecond))
		fmt.Fprintln(out, text)
	}
	share, err := others()
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "While this was measured, everything else, the kernel's own threads included, used\n%.0f %% of the machine.\n", 100*share)
	return nil
}

// furnish makes new namespaces a place to live in. Sockets of devices lie in
// /run, where those of the machine's own devices are.
func furnish() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	for _, name := range []string{"all", "default"} {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/accept_dad", []byte("0"), 0o644); err != nil {
			return err
		}
	}
	for _, args := range []string{"link set lo up", "address add " + service.String() + "/32 dev lo"} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", args, err, out)
		}
	}
	return nil
}

// ms writes milliseconds, with as many digits as mean something.
func ms(d time.Duration) string { return digits(float64(d) / float64(time.Millisecond)) }

func digits(v float64) string {
	switch {
	case v < 10:
		return fmt.Sprintf("%.2g", v)
	case v < 100:
		return fmt.Sprintf("%.1f", v)
	}
	return figures.Thousands(int(v + 0.5))
}

// middle is the median of some times.
func middle(all []time.Duration) time.Duration { return figures.SpreadOf(all).Median }

// heads is the first row of a table: what, and numbers of peers.
func heads(what string, sizes []int) []string {
	row := []string{what}
	for _, n := range sizes {
		row = append(row, figures.Thousands(n)+" peers")
	}
	return append(row, "goal")
}

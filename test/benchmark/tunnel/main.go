// Command tunnel measures the connector beside cloudflared itself: the same
// requests through the same emulated edge to the same origin service, by turns
// in one run, over HTTP/2 and QUIC. The connector runs bare, with a gate behind it
// that only routes, and with one as edgeward-tunnel has it, so that the cost of
// routes and that of verdicts and signatures show. Each connector is a process of its
// own, so that its processor time and its memory are its own. How long a verdict takes
// by itself is what the benchmark of package tunnel says.
//
// It prints Markdown on standard output and what it is doing on standard error,
// and judges nothing by its exit status. Visitors, edge and origin service share
// this process and the machine with what is measured: requests per second are
// for comparing the lines with each other, and with nothing else.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/edgeward/edgeward/test/benchmark/figures"
	"github.com/edgeward/edgeward/test/cfedge"
	"github.com/edgeward/edgeward/test/rig"
)

type options struct {
	rounds, requests, busy int
	bulk                   int64 // bytes
	verdicts, readme       bool
	log                    io.Writer
}

// full are the sizes that the published figures come from.
var full = options{rounds: 5, requests: 6000, busy: 64, bulk: 1 << 30, verdicts: true}

// quick are sizes that show in seconds that all of it works.
var quick = options{rounds: 2, requests: 100, busy: 8, bulk: 1 << 20}

func (o options) say(format string, args ...any) { fmt.Fprintf(o.log, format+"\n", args...) }

func main() {
	opts := full
	small := flag.Bool("quick", false, "show in seconds that all of it works; the figures mean nothing")
	flag.IntVar(&opts.rounds, "rounds", full.rounds, "rounds, of which the median counts")
	flag.IntVar(&opts.requests, "requests", full.requests, "requests of each connector in a round")
	flag.IntVar(&opts.busy, "busy", full.busy, "requests under way at once")
	bulk := flag.Int64("bulk", full.bulk>>20, "MiB to move each way through each connector; 0 for none")
	readme := flag.Bool("readme", false, "rewrite the tables of docs/benchmarks.md")
	var child string
	flag.StringVar(&child, "connector", "", "be a connector, as this program asks of itself")
	flag.Parse()
	opts.bulk = *bulk << 20
	if *small {
		opts = quick
	}
	opts.readme, opts.log = *readme, os.Stderr
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, opts, child)
	if err != nil {
		fmt.Fprintln(os.Stderr, "tunnel:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, opts options, child string) error {
	if child != "" {
		return serve(ctx, child)
	}
	return measure(ctx, opts, os.Stdout)
}

// A plan is what a connector is told to do, on its standard input.
type plan struct {
	Protocol, Origin     string
	Account, Tunnel      string
	Secret, Authority    []byte
	Edge                 []string
	Connections, Sockets int
}

// usage is what a connector has used so far.
type usage struct {
	CPU          time.Duration
	Memory, Peak int64 // bytes, resident
}

// The contestants that are our connector, by what is behind it.
const (
	bare     = "edgeward, connections alone"
	routing  = "edgeward, with routes"
	deciding = "edgeward, with verdicts and signature"
)

// stock is the other one.
const stock = "cloudflared as a library"

// A contestant is a running connector.
type contestant struct {
	name, protocol string
	tunnel         cfedge.TunnelInfo
	process        *exec.Cmd
	ask            string // where it tells its usage

	rates, costs   []float64 // requests a second; microseconds of processor a request
	idle, after    usage
	down, up       float64 // MiB/s
	downCPU, upCPU float64 // milliseconds of processor for a MiB
	bulk           usage
}

func measure(ctx context.Context, opts options, out io.Writer) error {
	edge, err := cfedge.Start(ctx, cfedge.Options{})
	if err != nil {
		return err
	}
	defer edge.Close()
	origin, err := startOrigin(ctx)
	if err != nil {
		return err
	}
	account := edge.Cloud().AddAccount("benchmark")
	var all []*contestant
	var pids []int
	for _, protocol := range []string{"http2", "quic"} {
		for _, name := range []string{bare, routing, deciding, stock} {
			c := &contestant{name: name, protocol: protocol, tunnel: edge.Cloud().AddTunnel(account, name+" "+protocol, nil)}
			if err := c.start(ctx, edge, origin); err != nil {
				return fmt.Errorf("start %s over %s: %w", name, protocol, err)
			}
			defer c.stop()
			all, pids = append(all, c), append(pids, c.process.Process.Pid)
		}
	}
	for _, c := range all {
		if err := c.requests(ctx, edge, opts.requests/10, opts.busy, nil); err != nil { // to warm up
			return err
		}
	}
	for _, c := range all {
		if c.idle, err = c.usage(ctx); err != nil {
			return err
		}
	}
	others, err := figures.WatchMachine(pids...)
	if err != nil {
		return err
	}
	for round := range opts.rounds {
		order := slices.Clone(all)
		if round%2 == 1 {
			slices.Reverse(order) // so that none always comes after the same
		}
		for _, c := range order {
			if err := c.requests(ctx, edge, opts.requests, opts.busy, c.record); err != nil {
				return err
			}
			opts.say("round %d: %s over %s: %.0f requests/s, %.1f us", round+1, c.name, c.protocol, c.rates[round], c.costs[round])
		}
	}
	for _, c := range all {
		if c.after, err = c.usage(ctx); err != nil {
			return err
		}
	}
	if opts.bulk > 0 {
		for _, c := range all {
			if err := c.move(ctx, edge, opts); err != nil {
				return fmt.Errorf("move %d MiB by %s over %s: %w", opts.bulk>>20, c.name, c.protocol, err)
			}
			opts.say("%s over %s: %.0f MiB/s down, %.0f up, peak %d MiB", c.name, c.protocol, c.down, c.up, c.bulk.Peak>>20)
		}
	}
	share, err := others()
	if err != nil {
		return err
	}
	text := requestsTable(all)
	if opts.verdicts {
		said, err := verdicts(ctx)
		if err != nil {
			return err
		}
		text += said
	}
	text += fmt.Sprintf("While this was measured, everything else used %.0f %% of the machine.\n", 100*share)
	fmt.Fprint(out, text+"\n"+memoryTable(all, opts))
	if counts := edge.Counts(); counts.Failed+counts.NoTunnel+counts.Lost > 0 {
		return fmt.Errorf("measure requests: some failed: %+v", counts)
	}
	if !opts.readme {
		return nil
	}
	machine, err := figures.Machine()
	if err != nil {
		return err
	}
	root, err := rig.Root()
	if err != nil {
		return err
	}
	return figures.WriteReadme(root, "bench tunnel", fmt.Sprintf("Median of %d rounds on the emulated edge, each connector in a process of its own, edge and\nvisitors beside them, on %s.\n\n%s", opts.rounds, machine, text))
}

func (c *contestant) start(ctx context.Context, edge *cfedge.Edge, origin string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	c.process = exec.CommandContext(ctx, self, "-connector", c.name)
	c.process.Stderr = os.Stderr
	c.process.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	// Neither Cloudflare's DNS nor a warning about socket buffers is of use here.
	c.process.Env = append(os.Environ(), "QUIC_GO_DISABLE_RECEIVE_BUFFER_WARNING=true")
	in, err := json.Marshal(plan{
		Protocol: c.protocol, Origin: origin, Account: c.tunnel.Account, Tunnel: c.tunnel.ID.String(), Secret: c.tunnel.Secret,
		Authority: edge.CA(), Edge: edge.Addrs(), Connections: 4, Sockets: 100,
	})
	if err != nil {
		return err
	}
	c.process.Stdin = strings.NewReader(string(in) + "\n")
	stdout, err := c.process.StdoutPipe()
	if err != nil {
		return err
	}
	if err := c.process.Start(); err != nil {
		return err
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		return fmt.Errorf("hear from the connector: %w", err)
	}
	c.ask = strings.TrimSpace(line)
	ready, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	return edge.WaitConnections(ready, c.tunnel.ID, 4)
}

func (c *contestant) stop() {
	_ = c.process.Process.Kill()
	_ = c.process.Wait() // killed
}

func (c *contestant) usage(ctx context.Context) (u usage, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, c.ask, nil)
	if err != nil {
		return u, err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return u, fmt.Errorf("ask %s for its usage: %w", c.name, err)
	}
	defer response.Body.Close()
	return u, json.NewDecoder(response.Body).Decode(&u)
}

// requests sends n requests, busy at a time.
func (c *contestant) requests(ctx context.Context, edge *cfedge.Edge, n, busy int, record func(n int, took time.Duration, before, after usage)) error {
	before, err := c.usage(ctx)
	if err != nil {
		return err
	}
	visitor := edge.Visitor("203.0.113.9")
	visitor.Tunnel = c.tunnel.ID
	client := visitor.Client()
	var left atomic.Int64
	left.Store(int64(n))
	var visitors sync.WaitGroup
	failures := make(chan error, busy)
	start := time.Now()
	for range busy {
		visitors.Go(func() {
			for left.Add(-1) >= 0 {
				if err := fetch(ctx, client, "https://app.example.org/page", 2<<10); err != nil {
					failures <- err
					return
				}
			}
		})
	}
	visitors.Wait()
	took := time.Since(start)
	select {
	case err := <-failures:
		return fmt.Errorf("request through %s over %s: %w", c.name, c.protocol, err)
	default:
	}
	after, err := c.usage(ctx)
	if err == nil && record != nil {
		record(n, took, before, after)
	}
	return err
}

func (c *contestant) record(n int, took time.Duration, before, after usage) {
	c.rates = append(c.rates, float64(n)/took.Seconds())
	c.costs = append(c.costs, float64(after.CPU-before.CPU)/float64(time.Microsecond)/float64(n))
}

func fetch(ctx context.Context, client *http.Client, target string, want int64) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	got, err := io.Copy(io.Discard, response.Body)
	if err == nil && (response.StatusCode != http.StatusOK || got != want) {
		err = fmt.Errorf("%s with %d bytes, want %d", response.Status, got, want)
	}
	return err
}

// move downloads and then uploads one large body.
func (c *contestant) move(ctx context.Context, edge *cfedge.Edge, opts options) error {
	visitor := edge.Visitor("203.0.113.9")
	visitor.Tunnel = c.tunnel.ID
	client := visitor.Client()
	mib := float64(opts.bulk) / (1 << 20)

	before, err := c.usage(ctx)
	if err != nil {
		return err
	}
	start := time.Now()
	if err := fetch(ctx, client, fmt.Sprintf("https://app.example.org/down?n=%d", opts.bulk), opts.bulk); err != nil {
		return err
	}
	c.down = mib / time.Since(start).Seconds()
	between, err := c.usage(ctx)
	if err != nil {
		return err
	}
	c.downCPU = float64(between.CPU-before.CPU) / float64(time.Millisecond) / mib

	start = time.Now()
	request, err := http.NewRequestWithContext(ctx, http.MethodPut, "https://app.example.org/up", io.LimitReader(zeros{}, opts.bulk))
	if err != nil {
		return err
	}
	request.ContentLength = opts.bulk
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	if string(text) != fmt.Sprint(opts.bulk) {
		return fmt.Errorf("uploaded %s bytes of %d", text, opts.bulk)
	}
	c.up = mib / time.Since(start).Seconds()
	if c.bulk, err = c.usage(ctx); err != nil {
		return err
	}
	c.upCPU = float64(c.bulk.CPU-between.CPU) / float64(time.Millisecond) / mib
	return nil
}

// startOrigin answers 2 KiB, as many bytes as are asked for, or how many came.
func startOrigin(ctx context.Context) (string, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("start the origin service: %w", err)
	}
	page := make([]byte, 2<<10)
	mux := http.NewServeMux()
	mux.HandleFunc("/page", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(page) })
	mux.HandleFunc("/down", func(w http.ResponseWriter, r *http.Request) {
		var n int64
		_, _ = fmt.Sscan(r.FormValue("n"), &n)
		w.Header().Set("Content-Length", fmt.Sprint(n))
		_, _ = io.CopyN(w, zeros{}, n)
	})
	mux.HandleFunc("/up", func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, n)
	})
	server := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	go func() { _ = server.Serve(listener) }()
	context.AfterFunc(ctx, func() { server.Close() })
	return "http://" + listener.Addr().String(), nil
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

func median(values []float64) float64 {
	values = slices.Sorted(slices.Values(values))
	if len(values) == 0 {
		return 0
	}
	return values[len(values)/2]
}

// protocols are the ways to the edge, by the names that tables give them.
var protocols = []struct{ name, shown string }{{"http2", "http2"}, {"quic", "QUIC"}}

// requestsTable is what docs/benchmarks.md shows.
func requestsTable(all []*contestant) string {
	head := []string{"connector"}
	of := map[[2]string]*contestant{}
	for _, p := range protocols {
		head = append(head, p.shown+" requests/s", p.shown+" CPU")
	}
	var names []string
	for _, c := range all {
		if of[[2]string{c.name, c.protocol}] = c; c.protocol == protocols[0].name {
			names = append(names, c.name)
		}
	}
	rows := [][]string{head}
	for _, name := range names {
		row := []string{name}
		for _, p := range protocols {
			c := of[[2]string{name, p.name}]
			row = append(row, figures.Thousands(int(median(c.rates))), fmt.Sprintf("%.0f µs", median(c.costs)))
		}
		rows = append(rows, row)
	}
	var differs []string
	for _, p := range protocols {
		with, without := of[[2]string{deciding, p.name}], of[[2]string{routing, p.name}]
		differs = append(differs, fmt.Sprintf("%+.0f %% over %s", 100*(median(with.rates)/median(without.rates)-1), p.shown))
	}
	return figures.Table(rows) + fmt.Sprintf("\nWith verdicts and signature the requests a second differ by %s.\n", strings.Join(differs, " and "))
}

// memoryTable is what else there is to see.
func memoryTable(all []*contestant, opts options) string {
	var b strings.Builder
	b.WriteString("| connector | protocol | resident, idle | after the rounds | at most |\n|---|---|---:|---:|---:|\n")
	for _, c := range all {
		fmt.Fprintf(&b, "| %s | %s | %d MiB | %d MiB | %d MiB |\n", c.name, c.protocol, c.idle.Memory>>20, c.after.Memory>>20, c.after.Peak>>20)
	}
	if opts.bulk > 0 {
		fmt.Fprintf(&b, "\nOne body of %d MiB down, and then one up.\n\n", opts.bulk>>20)
		b.WriteString("| connector | protocol | down | CPU per MiB | up | CPU per MiB | resident at most |\n|---|---|---:|---:|---:|---:|---:|\n")
		for _, c := range all {
			fmt.Fprintf(&b, "| %s | %s | %.0f MiB/s | %.2f ms | %.0f MiB/s | %.2f ms | %d MiB |\n",
				c.name, c.protocol, c.down, c.downCPU, c.up, c.upCPU, c.bulk.Peak>>20)
		}
	}
	return b.String()
}

// verdictGoal is the most that a verdict may take.
const verdictGoal = time.Microsecond

// verdicts has package tunnel measure how long a verdict takes.
func verdicts(ctx context.Context) (string, error) {
	root, err := rig.Root()
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", "^BenchmarkVerdict$", "-benchtime", "300ms", "./tunnel")
	cmd.Dir = root
	said, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("measure verdicts: %w: %s", err, said)
	}
	var all []float64 // in nanoseconds
	for _, found := range nsPerOp.FindAllSubmatch(said, -1) {
		ns, err := strconv.ParseFloat(string(found[1]), 64)
		if err != nil {
			return "", fmt.Errorf("measure verdicts: %w", err)
		}
		all = append(all, ns)
	}
	if len(all) == 0 {
		return "", fmt.Errorf("measure verdicts: the benchmark says nothing: %s", said)
	}
	took := figures.SpreadOf(all)
	return fmt.Sprintf("A verdict is looked up in %.0f to %.0f ns, among none to 100,000 decisions (goal 1 µs: %s).\n",
		took.Least, took.Most, figures.Held(took.Most <= float64(verdictGoal.Nanoseconds()))), nil
}

var nsPerOp = regexp.MustCompile(`\s([\d.]+) ns/op`)

var errNoPlan = errors.New("read the plan: this program starts its connectors itself; leave -connector out")

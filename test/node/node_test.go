// Package node_test proves the node bouncer on what it is for: the built program,
// in a network namespace with its own kernel tables, follows a real CrowdSec LAPI,
// and packets from another namespace pass or do not. It replaces nothing by a
// fake, measures what it claims, and touches no table outside its namespaces.
package node_test

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/edgeward/edgeward/bouncer"
	"github.com/edgeward/edgeward/internal/netns"
	"github.com/edgeward/edgeward/test/rig"
	"github.com/edgeward/edgeward/test/rig/rigtest"
)

var (
	node4 = netip.MustParseAddr("192.0.2.1")
	node6 = netip.MustParseAddr("2001:db8::1")
	good4 = netip.MustParseAddr("203.0.113.7")
	good6 = netip.MustParseAddr("2001:db8:f00::7")
	bad4  = netip.MustParseAddr("203.0.113.66")
	bad6  = netip.MustParseAddr("2001:db8:f00::66")
)

// world is a LAPI, a client with many addresses, and a node on which the bouncer
// runs:
//
//	client c0 ── up0 node
type world struct {
	t            testing.TB
	lapi         *rig.LAPI
	url          string // of LAPI
	client, node *netns.NS
	server       *netns.Server
	program      string
	dir          string
	extra        string          // of the configuration
	file         string          // all of the configuration, where it is not the usual one
	enter        func(*exec.Cmd) // changes what the agent is started in, if not nil
	env          []string        // of the agent, beside the test's own
}

var build struct {
	once sync.Once
	path string
	err  error
}

// TestMain lets the tests, which mostly wait for LAPI or for packets that must not
// come, do so together, each in networks of its own; those that measure are never
// parallel. It removes the program that they built.
func TestMain(m *testing.M) {
	flag.Parse()
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	code := m.Run()
	if build.path != "" {
		os.RemoveAll(filepath.Dir(build.path))
	}
	os.Exit(code)
}

// built returns the program, built once.
func built(t testing.TB) string {
	t.Helper()
	build.once.Do(func() {
		dir, err := os.MkdirTemp("", "edgeward-bouncer-")
		if err != nil {
			build.err = err
			return
		}
		build.path = filepath.Join(dir, "edgeward-bouncer")
		cmd := exec.Command("go", "build", "-o", build.path, "../../cmd/edgeward-bouncer")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			build.err = fmt.Errorf("build the bouncer: %w: %s", err, out)
		}
	})
	if build.err != nil {
		t.Fatal(build.err)
	}
	return build.path
}

func newWorld(t testing.TB, seed ...rig.Decision) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), program: built(t)}
	w.network()
	w.lapi = rigtest.LAPI(t, rig.LAPIOptions{Socket: true, Seed: seed})
	w.url = "unix://" + w.lapi.SocketPath
	key, err := w.lapi.AddBouncer(t.Context(), "node")
	if err != nil {
		t.Fatal(err)
	}
	w.write("key", key)
	return w
}

// network makes client and node, as after a boot: no table is there.
func (w *world) network() {
	w.client, w.node = netns.New(w.t), netns.New(w.t)
	netns.Cable(
		netns.End{NS: w.client, Name: "c0", Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.2/24"), netip.MustParsePrefix("2001:db8::2/64")}},
		netns.End{NS: w.node, Name: "up0", Addrs: []netip.Prefix{netip.PrefixFrom(node4, 24), netip.PrefixFrom(node6, 64)}})
	for prefix, via := range map[string]string{"203.0.113.0/24": "192.0.2.2", "198.51.100.0/24": "192.0.2.2", "2001:db8:f00::/48": "2001:db8::2"} {
		w.client.Own(netip.MustParsePrefix(prefix))
		w.node.Route(netip.MustParsePrefix(prefix), netip.MustParseAddr(via))
	}
	w.server = w.node.Serve(netip.AddrPortFrom(netip.IPv6Unspecified(), 0))
}

func (w *world) write(name, text string) string {
	w.t.Helper()
	path := filepath.Join(w.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return path
}

// config writes the configuration and returns its path.
func (w *world) config() string {
	if w.file != "" {
		return w.write("bouncer.yaml", w.file)
	}
	return w.write("bouncer.yaml", fmt.Sprintf("lapi:\n  url: %s\n  keyFile: %s\n  interval: 1s\nsocket: %s\nstateDir: %s\n%s",
		w.url, filepath.Join(w.dir, "key"), filepath.Join(w.dir, "bouncer.sock"), filepath.Join(w.dir, "state"), w.extra))
}

// agent is the program, running on the node.
type agent struct {
	*world
	cmd  *exec.Cmd
	log  *os.File
	done chan error
}

// start starts the agent and returns at once.
func (w *world) start() *agent {
	w.t.Helper()
	log, err := os.OpenFile(filepath.Join(w.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
	if err != nil {
		w.t.Fatal(err)
	}
	a := &agent{world: w, log: log, done: make(chan error, 1)}
	// With the one privilege that the manifests give it.
	a.cmd = exec.Command("setpriv", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all,+net_admin",
		w.program, "run", "--config", w.config())
	if w.enter != nil {
		w.enter(a.cmd)
	}
	a.cmd.Env = append(os.Environ(), w.env...)
	a.cmd.Stdout, a.cmd.Stderr = log, log
	w.node.Must(a.cmd.Start)
	go func() { a.done <- a.cmd.Wait() }()
	w.t.Cleanup(func() {
		a.cmd.Process.Kill()
		<-a.done
		if w.t.Failed() {
			w.t.Logf("the agent logged:\n%s", a.logged())
		}
		log.Close()
	})
	return a
}

func (a *agent) logged() string {
	text, _ := os.ReadFile(a.log.Name())
	return string(text)
}

// stop ends the agent by a signal and returns when it has ended.
func (a *agent) stop(sig os.Signal) {
	a.t.Helper()
	if err := a.cmd.Process.Signal(sig); err != nil {
		a.t.Fatal(err)
	}
	err := <-a.done
	a.done <- err
	if sig == syscall.SIGTERM && err != nil {
		a.t.Fatalf("the agent ended with %v:\n%s", err, a.logged())
	}
}

// get asks the agent's HTTP endpoints.
func (a *agent) get(path string) (int, string, error) {
	client := &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(context.Context, string, string) (c net.Conn, err error) {
			err = errors.Join(a.node.Run(func() error {
				var err error
				c, err = net.DialTimeout("tcp", "127.0.0.1:9477", time.Second)
				return err
			}))
			return c, err
		},
	}}
	res, err := client.Get("http://127.0.0.1:9477" + path)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	return res.StatusCode, string(text), err
}

// ready waits until the agent says that the kernel holds the bans.
func (a *agent) ready() {
	a.t.Helper()
	a.until("the agent is ready", 20*time.Second, func() bool {
		code, _, err := a.get("/readyz")
		return err == nil && code == http.StatusOK
	})
}

// until waits for something and returns how long it took.
func (w *world) until(what string, limit time.Duration, is func() bool) time.Duration {
	w.t.Helper()
	start := time.Now()
	for !is() {
		if time.Since(start) > limit {
			w.t.Fatalf("after %v it is not so that %s", limit, what)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return time.Since(start)
}

// passes reports whether packets from an address come through, by UDP and TCP.
func (w *world) passes(from netip.Addr) bool {
	w.t.Helper()
	to := netip.AddrPortFrom(node4, w.server.Addr.Port())
	if from.Is6() {
		to = netip.AddrPortFrom(node6, w.server.Addr.Port())
	}
	for attempt := 0; ; attempt++ {
		udp, tcp := w.client.UDP(from, to), w.client.TCP(from, to)
		if (udp == nil) == (tcp == nil) {
			return udp == nil
		}
		// A ban that comes or goes between the two is no contradiction.
		if attempt == 2 {
			w.t.Fatalf("from %v: UDP %v, TCP %v", from, udp, tcp)
		}
	}
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// cli runs another verb of the program on the node.
func (w *world) cli(args ...string) (string, error) {
	return w.node.Exec(w.program, append(args, "--config", filepath.Join(w.dir, "bouncer.yaml"))...)
}

func (w *world) mustCLI(args ...string) string {
	w.t.Helper()
	out, err := w.cli(args...)
	w.must(err)
	return out
}

func TestBanUnbanRangeAndExpiry(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.start()
	a.ready()
	ctx := t.Context()
	for _, from := range []netip.Addr{good4, good6, bad4, bad6} {
		if !w.passes(from) {
			t.Fatalf("%v does not pass before any ban", from)
		}
	}

	for _, b := range []struct {
		value string
		addr  netip.Addr
	}{{"203.0.113.66", bad4}, {"2001:db8:f00::66", bad6}, {"203.0.113.64/28", bad4}, {"2001:db8:f00::40/122", bad6}} {
		w.must(w.lapi.Ban(ctx, b.value, time.Hour))
		stopped := w.until(b.value+" is banned", 5*time.Second, func() bool { return !w.passes(b.addr) })
		if !w.passes(good4) || !w.passes(good6) {
			t.Fatalf("with %s banned, others do not pass", b.value)
		}
		why := w.mustCLI("why", b.addr.String())
		for _, want := range []string{": drop: ", b.value, "cscli", "enforced here", "kernel", "ban/cscli"} {
			if !strings.Contains(why, want) {
				t.Errorf("why %v does not say %q:\n%s", b.addr, want, why)
			}
		}
		w.must(w.lapi.Unban(ctx, b.value))
		passed := w.until(b.value+" is unbanned", 5*time.Second, func() bool { return w.passes(b.addr) })
		t.Logf("%s: stopped after %v, passed again after %v, at a pull interval of 1s", b.value, stopped, passed)
	}

	// A captcha is for the upper layers.
	w.must(w.lapi.Decide(ctx, rig.Decision{Value: bad4.String(), Type: "captcha", Duration: time.Hour}))
	w.until("the captcha has arrived", 5*time.Second, func() bool {
		return strings.Contains(w.mustCLI("why", bad4.String()), "left to the upper layers: captcha")
	})
	if !w.passes(bad4) {
		t.Error("a captcha is enforced as a ban")
	}

	// The kernel ends a ban by itself, at its time, with LAPI and agent gone.
	w.must(w.lapi.Ban(ctx, bad6.String(), 9*time.Second))
	banned := time.Now()
	w.until("the short ban is enforced", 5*time.Second, func() bool { return !w.passes(bad6) })
	w.must(w.lapi.Stop(ctx))
	a.stop(syscall.SIGKILL)
	if w.passes(bad6) {
		t.Error("with LAPI and agent gone, the ban does not hold")
	}
	w.until("the ban has ended", 15*time.Second, func() bool { return w.passes(bad6) })
	if took := time.Since(banned); took < 7*time.Second || took > 12*time.Second {
		t.Errorf("a ban of 9s ended after %v", took)
	}
}

// TestNoGap blasts from banned addresses while the agent ends in every way and
// comes back, LAPI goes away, the configuration changes, and others flush the
// ruleset: not one packet may pass.
func TestNoGap(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := t.Context()
	range4 := netip.MustParseAddr("198.51.100.9")
	for _, value := range []string{bad4.String(), bad6.String(), "198.51.100.0/25"} {
		w.must(w.lapi.Ban(ctx, value, time.Hour))
	}
	a := w.start()
	a.ready()
	w.until("the bans are enforced", 5*time.Second, func() bool { return !w.passes(bad4) && !w.passes(bad6) && !w.passes(range4) })

	// Received counts by sender: what came before the bans is the start.
	before := w.server.Received()
	four := w.client.Blast(netip.AddrPortFrom(node4, w.server.Addr.Port()), bad4, range4)
	six := w.client.Blast(netip.AddrPortFrom(node6, w.server.Addr.Port()), bad6)

	a.stop(syscall.SIGTERM)
	a = w.start()
	a.ready()
	a.stop(syscall.SIGKILL)
	a = w.start()
	a.ready()
	w.node.MustExec("nft", "flush", "ruleset") // owned: the kernel leaves ours alone
	time.Sleep(300 * time.Millisecond)

	// Another configuration is another ruleset; with LAPI away it comes from
	// the snapshot, after LAPI was given some time.
	w.must(w.lapi.Stop(ctx))
	a.stop(syscall.SIGTERM)
	w.extra = "firewall: {replies: drop, action: reject}\n"
	a = w.start()
	a.ready()
	if !strings.Contains(a.logged(), "bans as they were saved") {
		t.Error("the agent did not install the snapshot")
	}
	w.must(w.lapi.Start(ctx))
	w.until("LAPI answers again", 60*time.Second, func() bool {
		var s bouncer.Status
		_, text, err := a.get("/v1/status")
		return err == nil && json.Unmarshal([]byte(text), &s) == nil && !s.LAPI.LastFullPull.IsZero()
	})
	a.stop(syscall.SIGTERM)

	sent4, err := four.Stop()
	w.must(err)
	sent6, err := six.Stop()
	w.must(err)
	time.Sleep(100 * time.Millisecond)
	after := w.server.Received()
	for _, from := range []netip.Addr{bad4, range4, bad6} {
		if n := after[from] - before[from]; n != 0 {
			t.Errorf("%d packets from %v passed", n, from)
		}
	}
	t.Logf("%d and %d packets sent by banned addresses, none passed", sent4, sent6)
	if sent4 < 10_000 || sent6 < 10_000 {
		t.Errorf("only %d and %d packets were sent: nothing is shown", sent4, sent6)
	}
}

// TestForeignFlush: where the table is shared, another program can flush it, and
// it is back within a second.
func TestForeignFlush(t *testing.T) {
	w := newWorld(t)
	w.extra = "firewall: {shared: true}\n"
	w.must(w.lapi.Ban(t.Context(), bad4.String(), time.Hour))
	a := w.start()
	a.ready()
	w.until("the ban is enforced", 5*time.Second, func() bool { return !w.passes(bad4) })
	before := w.server.Received()[bad4]
	blast := w.client.Blast(netip.AddrPortFrom(node4, w.server.Addr.Port()), bad4)
	start := time.Now()
	w.node.MustExec("nft", "flush", "ruleset")
	took := w.until("the table is back", 5*time.Second, func() bool {
		_, text, err := a.get("/metrics")
		return err == nil && strings.Contains(text, "edgeward_repairs_total 1\n")
	})
	seen := time.Since(start)
	time.Sleep(100 * time.Millisecond) // what is in the server's socket already
	gap := w.server.Received()[bad4] - before
	time.Sleep(200 * time.Millisecond)
	if after := w.server.Received()[bad4] - before; after != gap {
		t.Errorf("%d packets passed after the repair", after-gap)
	}
	_, err := blast.Stop()
	w.must(err)
	t.Logf("%d packets passed between the flush and the repair, which was seen after %v (%v with nft)", gap, took, seen)
	if seen > time.Second {
		t.Errorf("the repair took %v", seen)
	}
	if !strings.Contains(a.logged(), `"process":"nft"`) {
		t.Error("the log does not say who it was")
	}
}

// TestBootWithoutLAPI: a node whose kernel is empty and whose LAPI is away bans
// what it knew, at once.
func TestBootWithoutLAPI(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.must(w.lapi.Ban(t.Context(), bad4.String(), time.Hour))
	a := w.start()
	a.ready()
	w.until("the ban is enforced", 5*time.Second, func() bool { return !w.passes(bad4) })
	a.stop(syscall.SIGTERM)
	w.must(w.lapi.Stop(t.Context()))

	w.network() // boots
	if !w.passes(bad4) {
		t.Fatal("the new kernel is not empty")
	}
	began := time.Now()
	a = w.start()
	w.until("the ban is enforced again", 5*time.Second, func() bool { return !w.passes(bad4) })
	t.Logf("enforced %v after the start", time.Since(began))
	a.ready()
	if !w.passes(good4) {
		t.Error("others do not pass")
	}
}

func TestObserveDropsNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.extra = "mode: observe\n"
	w.must(w.lapi.Ban(t.Context(), bad4.String(), time.Hour))
	a := w.start()
	a.ready()
	w.until("packets are counted", 5*time.Second, func() bool {
		if !w.passes(bad4) {
			t.Fatal("a packet was dropped")
		}
		_, text, err := a.get("/metrics")
		return err == nil && strings.Contains(text, `edgeward_observed_packets_total{ip_type="ipv4",origin="cscli",remediation="ban"}`) &&
			!strings.Contains(text, `edgeward_observed_packets_total{ip_type="ipv4",origin="cscli",remediation="ban"} 0`)
	})
}

// TestCleanup removes our table, and nothing else.
func TestCleanup(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.must(w.lapi.Ban(t.Context(), bad4.String(), time.Hour))
	w.node.MustExec("nft", "add table inet theirs; add chain inet theirs input { type filter hook input priority 0; }; add rule inet theirs input counter")
	theirs := func() string { return w.node.MustExec("nft", "-s", "list", "table", "inet", "theirs") }
	before := theirs()
	a := w.start()
	a.ready()
	w.until("the ban is enforced", 5*time.Second, func() bool { return !w.passes(bad4) })
	a.stop(syscall.SIGTERM)
	if w.passes(bad4) {
		t.Error("an agent that ended took protection with it")
	}
	if out, err := w.cli("status"); err == nil || !strings.Contains(out, "the kernel enforces 1 banned address ") {
		t.Errorf("status without an agent: %q %v", out, err)
	}
	w.mustCLI("check")
	if w.passes(bad4) {
		t.Error("check changed the system")
	}
	if out := w.mustCLI("cleanup"); !strings.Contains(out, "removed the table inet edgeward") {
		t.Error(out)
	}
	if !w.passes(bad4) {
		t.Error("the ban is still enforced")
	}
	if got := theirs(); got != before {
		t.Errorf("the table of others was\n%s\nand is\n%s", before, got)
	}
	if tables := w.node.MustExec("nft", "list", "tables"); strings.Contains(tables, "edgeward") {
		t.Error(tables)
	}
	if out := w.mustCLI("cleanup"); !strings.Contains(out, "there is no table") {
		t.Error(out)
	}
}

// TestUsageMetrics: LAPI takes the last report of an agent that ends, and lists
// it under its name.
func TestUsageMetrics(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.must(w.lapi.Ban(t.Context(), bad4.String(), time.Hour))
	a := w.start()
	a.ready()
	w.until("the ban is enforced", 5*time.Second, func() bool { return !w.passes(bad4) })
	a.stop(syscall.SIGTERM) // the last report
	if log := w.lapi.Log(); !strings.Contains(log, `POST /v1/usage-metrics HTTP/1.1 201`) {
		t.Error("LAPI took no usage metrics")
	}
	bouncers, err := w.lapi.Bouncers(t.Context())
	w.must(err)
	if len(bouncers) == 0 || bouncers[0].Type != "crowdsec-edgeward-nftables-bouncer" || bouncers[0].Version != bouncer.Version {
		t.Errorf("LAPI lists %+v", bouncers)
	}
}

// TestHundredThousand is the bouncer at 100,000 bans: how long until they are
// enforced, what one more costs, a scrape, and memory.
func TestHundredThousand(t *testing.T) {
	const n = 100_000
	seed := make([]rig.Decision, n)
	for i := range seed {
		seed[i] = rig.Decision{Value: netip.AddrFrom4([4]byte{20, byte(i >> 16), byte(i >> 8), byte(i)}).String(), Duration: 365 * 24 * time.Hour}
	}
	w := newWorld(t, seed...)
	began := time.Now()
	a := w.start()
	a.ready()
	w.until("all are in the kernel", 20*time.Second, func() bool {
		_, text, err := a.get("/metrics")
		return err == nil && strings.Contains(text, "edgeward_kernel_elements{set=\"bans4\"} 100000\n")
	})
	enforced := time.Since(began)
	var writes []time.Duration // of one more each
	for more := bad4; len(writes) < 3; more = more.Next() {
		w.must(w.lapi.Ban(t.Context(), more.String(), time.Hour))
		w.until("one more is enforced", 5*time.Second, func() bool { return !w.passes(more) })
		writes = append(writes, time.Duration(a.metric("edgeward_kernel_last_write_seconds")*1e9))
	}
	slices.Sort(writes)
	took := writes[1]
	scrape := time.Hour
	for range 5 {
		start := time.Now()
		_, _, err := a.get("/metrics")
		w.must(err)
		scrape = min(scrape, time.Since(start))
	}
	resident, peak := a.resident()
	var info os.FileInfo
	w.until("the snapshot is saved", 5*time.Second, func() bool {
		var err error
		info, err = os.Stat(filepath.Join(w.dir, "state", "decisions.snapshot"))
		return err == nil
	})
	t.Logf("100,000 bans enforced %v after the start; one more written in %v, the median of %v; a scrape %v; %d MB resident, %d MB at most; a snapshot of %d KB",
		enforced.Round(time.Millisecond), took, writes, scrape, resident, peak, info.Size()>>10)
	if took <= 0 || took > 5*time.Millisecond {
		t.Errorf("one more ban took %v, the median of %v, not up to 5 ms", took, writes)
	}
}

package node_test

import (
	"encoding/json"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/edgeward/edgeward/bouncer"
)

// says demands what a verb answers.
func (w *world) says(want string, args ...string) {
	w.t.Helper()
	if out := w.mustCLI(args...); !strings.Contains(out, want) {
		w.t.Errorf("%s: %q, want %q", strings.Join(args, " "), out, want)
	}
}

// refuses demands why a verb fails.
func (w *world) refuses(want string, args ...string) {
	w.t.Helper()
	if out, err := w.cli(args...); err == nil || !strings.Contains(err.Error(), want) {
		w.t.Errorf("%s: %q %v, want the error %q", strings.Join(args, " "), out, err, want)
	}
}

// pass demands whether packets from some addresses come through now, by UDP and
// by TCP: an order is in force when it has been answered.
func (w *world) pass(want bool, from ...netip.Addr) {
	w.t.Helper()
	client := w.client
	if want {
		client = client.Patient()
	}
	var wg sync.WaitGroup
	for _, a := range from {
		to := netip.AddrPortFrom(node4, w.server.Addr.Port())
		if a.Is6() {
			to = netip.AddrPortFrom(node6, w.server.Addr.Port())
		}
		for name, try := range map[string]func(netip.Addr, netip.AddrPort) error{"UDP": client.UDP, "TCP": client.TCP} {
			wg.Go(func() {
				if err := try(a, to); (err == nil) != want {
					w.t.Errorf("%s from %v passes: %v (%v)", name, a, err == nil, err)
				}
			})
		}
	}
	wg.Wait()
}

// TestOrders gives the operator's orders: each counts within the call, beats what
// it should and no more, outlives the agent, and ends without it.
func TestOrders(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := t.Context()
	in, out := netip.MustParseAddr("198.51.100.9"), netip.MustParseAddr("198.51.100.10")
	in6 := netip.MustParseAddr("2001:db8:f00:1::9")
	for _, value := range []string{bad4.String(), bad6.String(), "198.51.100.0/24", "2001:db8:f00:1::/64"} {
		w.must(w.lapi.Ban(ctx, value, time.Hour))
	}
	a := w.start()
	a.ready()
	w.until("the bans are enforced", 5*time.Second, func() bool { return !w.passes(bad6) && !w.passes(in6) })
	w.pass(false, bad4, in, out)

	w.says("no ban stops 203.0.113.66 on this node until ", "allow", bad4.String(), "--for", "1h", "--because", "my phone")
	w.pass(true, bad4)
	w.says("on this node alone", "unban", in.String())
	w.says("cscli decisions delete --range 2001:db8:f00:1::/64", "unban", in6.String())
	w.pass(true, in, in6)
	w.pass(false, out, bad6)
	w.says("waived: it is unbanned on this node", "why", in.String())
	w.refuses("no decision that this node enforces holds", "unban", good4.String())

	// A decision that is made later counts again.
	w.must(w.lapi.Ban(ctx, in.String(), time.Hour))
	w.until("a newer decision bans it again", 5*time.Second, func() bool { return !w.passes(in) })
	w.pass(true, in6, bad4)

	// All of it with LAPI away, and through the hardest end of the agent.
	w.must(w.lapi.Stop(ctx))
	w.says("no ban stops 198.51.100.8/31", "allow", "198.51.100.8/31", "--for", "1h")
	w.pass(true, in)
	a.stop(syscall.SIGKILL)
	w.pass(true, bad4, in, in6)
	w.pass(false, out, bad6)
	w.refuses("nobody answers at", "pause", "10m")
	a = w.start()
	w.until("the agent answers", 10*time.Second, func() bool { _, err := w.cli("status"); return err == nil })
	w.says("what bans it counts again", "allow", "--end", "198.51.100.8/31") // of a predecessor's table
	w.pass(false, in)
	w.must(w.lapi.Start(ctx))
	a.ready() // with a new generation
	w.pass(true, bad4, in6)
	w.pass(false, in, out, bad6)
	var s bouncer.Status
	w.must(json.Unmarshal([]byte(w.mustCLI("status", "--output", "json")), &s))
	if len(s.Orders.Allows) != 1 || s.Orders.Allows[0].Because != "my phone" || len(s.Orders.Unbans) != 1 {
		t.Errorf("status: %+v", s.Orders)
	}
	for _, want := range []string{"allowed", "203.0.113.66/32 until ", "because: my phone", "unbanned"} {
		w.says(want, "status")
	}

	w.says("this node drops nothing until", "pause", "1h")
	w.pass(true, in, out, bad6)
	w.says("paused", "status")
	w.says("this node enforces again", "pause", "0")
	w.pass(false, in, out, bad6)

	// The kernel ends a pause with nobody there.
	w.says("and enforces again by itself then", "pause", "3s")
	began := time.Now()
	a.stop(syscall.SIGKILL)
	w.pass(true, out, bad6)
	w.until("the pause is over", 6*time.Second, func() bool { return !w.passes(out) })
	if took := time.Since(began); took < 2*time.Second {
		t.Errorf("a pause of 3s was over after %v", took)
	}
	w.pass(false, bad6)
	w.pass(true, bad4)
	if log := a.logged(); !strings.Contains(log, `"order":"allow","value":"203.0.113.66","by":"user 0, process `) {
		t.Error("the log does not say who asked")
	}
}

// TestCleanupAsksTheAgent: a live agent lets go and stays out; an orphan goes
// without a configuration.
func TestCleanupAsksTheAgent(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.must(w.lapi.Ban(t.Context(), bad4.String(), time.Hour))
	a := w.start()
	a.ready()
	w.until("the ban is enforced", 5*time.Second, func() bool { return !w.passes(bad4) })
	socket := filepath.Join(w.dir, "bouncer.sock")
	broken := w.write("broken.yaml", "lapi: [\n")
	none := filepath.Join(w.dir, "missing.yaml")
	if out, err := w.node.Exec(w.program, "cleanup", "--config", none, "--socket", filepath.Join(w.dir, "no.sock")); err == nil || !strings.Contains(err.Error(), "name its socket with --socket, or stop it") {
		t.Errorf("cleanup that does not find the agent: %s %v", out, err)
	}
	w.pass(false, bad4)
	out, err := w.node.Exec(w.program, "cleanup", "--config", broken, "--socket", socket)
	if err != nil || !strings.Contains(out, "the agent removed the table inet edgeward") {
		t.Errorf("cleanup beside an agent: %s %v", out, err)
	}
	w.pass(true, bad4)
	if code, text, err := a.get("/readyz"); err != nil || code == http.StatusOK || !strings.Contains(text, "until the agent is restarted") {
		t.Errorf("readyz: %d %q %v", code, text, err)
	}
	if code, _, err := a.get("/healthz"); err != nil || code != http.StatusOK {
		t.Errorf("healthz: %d %v", code, err)
	}
	w.says("cleanup was asked for", "status")
	w.must(w.lapi.Ban(t.Context(), bad6.String(), time.Hour))
	time.Sleep(2500 * time.Millisecond) // two pulls
	w.pass(true, bad4, bad6)
	if tables := w.node.MustExec("nft", "list", "tables"); strings.Contains(tables, "edgeward") {
		t.Error(tables)
	}
	a.stop(syscall.SIGTERM)
	a = w.start()
	a.ready()
	w.until("it is enforced after a restart", 5*time.Second, func() bool { return !w.passes(bad4) && !w.passes(bad6) })
	a.stop(syscall.SIGKILL)
	out, err = w.node.Exec(w.program, "cleanup", "--config", none, "--socket", socket)
	if err != nil || !strings.Contains(out, "removed the table inet edgeward") {
		t.Errorf("cleanup of an orphan: %s %v", out, err)
	}
	w.pass(true, bad4)
}

// TestProbe: check --probe says yes only where packets are dropped, and why not,
// and leaves nothing behind.
func TestProbe(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	// A foreign accept, before and after ours, must not matter.
	w.node.MustExec("nft", "add table inet theirs; add chain inet theirs early { type filter hook prerouting priority -400; policy accept; }; add rule inet theirs early accept")
	a := w.start()
	a.ready()
	probe := func(drops bool, want ...string) {
		t.Helper()
		out, err := w.cli("check", "--probe")
		text := out
		if err != nil {
			text = err.Error()
		}
		if (err == nil) != drops {
			t.Errorf("check --probe: %v\n%s", err, out)
		}
		for _, s := range want {
			if !strings.Contains(text, s) {
				t.Errorf("check --probe does not say %q:\n%s", s, text)
			}
		}
		if links, routes := w.node.MustExec("ip", "link"), w.node.MustExec("ip", "route"); strings.Contains(links, "ewprobe") || strings.Contains(routes, "ewprobe") {
			t.Error("the probe left something:", links, routes)
		}
		if elements := w.node.MustExec("nft", "list", "table", "inet", "edgeward"); strings.Contains(elements, "198.51.100.250") {
			t.Error("the probe left its ban")
		}
	}
	started := time.Now()
	probe(true, "ipv4", "ipv6", "packets arrive without a ban, and are dropped with it", "this node drops what is banned")
	t.Logf("a probe takes %v", time.Since(started))
	if _, text, err := a.get("/metrics"); err != nil || !strings.Contains(text, `edgeward_dropped_packets_total{ip_type="ipv6",origin="edgeward-probe",remediation="ban"}`) {
		t.Error("no counter of the probe", err)
	}

	w.says("drops nothing", "pause", "1h")
	probe(false, "because this node is paused until", "does not drop what is banned")
	w.says("enforces again", "pause", "0")

	w.node.MustExec("nft", "add chain inet theirs in { type filter hook input priority 0; }; add rule inet theirs in iifname ewprobe0 drop")
	probe(false, "do not arrive even without a ban: another firewall", "the test ban met them all the same")
	w.node.MustExec("nft", "delete", "table", "inet", "theirs")

	// Cut off in the middle, by a signal.
	cmd := exec.Command(w.program, "check", "--probe", "--config", filepath.Join(w.dir, "bouncer.yaml"))
	w.node.Must(cmd.Start)
	w.until("the probe is at work", 5*time.Second, func() bool { return strings.Contains(w.node.MustExec("ip", "link"), "ewprobe0") })
	w.must(cmd.Process.Signal(os.Interrupt))
	if err := cmd.Wait(); err == nil {
		t.Error("a probe that was cut off says yes")
	}
	if links := w.node.MustExec("ip", "link"); strings.Contains(links, "ewprobe") {
		t.Error("a probe that was cut off left", links)
	}

	cmd = exec.Command(w.program, "check", "--probe", "--config", filepath.Join(w.dir, "bouncer.yaml"))
	w.node.Must(cmd.Start)
	w.until("the probe is at work again", 5*time.Second, func() bool { return strings.Contains(w.node.MustExec("ip", "link"), "ewprobe0") })
	w.must(cmd.Process.Kill())
	_ = cmd.Wait()
	w.until("the kernel has removed what a killed probe left", 5*time.Second, func() bool { return !strings.Contains(w.node.MustExec("ip", "link"), "ewprobe") })

	// Without the privilege it says what it needs.
	if out, err := w.node.Exec("setpriv", "--bounding-set=-all,+net_admin", w.program, "check", "--probe", "--config", filepath.Join(w.dir, "bouncer.yaml")); err == nil || !strings.Contains(err.Error(), "as root, with CAP_SYS_ADMIN") {
		t.Errorf("without privilege: %s %v", out, err)
	}

	a.stop(syscall.SIGTERM)
	w.refuses("nobody answers at", "check", "--probe")
	w.extra = "mode: observe\n"
	a = w.start()
	a.ready()
	probe(false, "because the mode is observe: they are counted and pass")
}

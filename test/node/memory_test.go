package node_test

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/edgeward/edgeward/test/rig"
)

// memoryGroup is a memory control group with a limit, for what enter starts. What
// the kernel keeps for a process counts there too, the elements of its sets among
// it, and stays counted after the process has ended.
type memoryGroup struct {
	t        testing.TB
	dir      string
	peak     string // the file that holds the most it ever held
	usage    string
	attempts string // the file that counts when the limit was met
}

// newMemoryGroup makes a group below that of this process, so that no limit above
// is left behind.
func newMemoryGroup(t testing.TB, limit int) *memoryGroup {
	t.Helper()
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	g := &memoryGroup{t: t}
	name := fmt.Sprintf("edgeward-test-%d", os.Getpid())
	limitFile := ""
	for line := range strings.Lines(string(own)) {
		id, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		controllers, path, _ := strings.Cut(rest, ":")
		switch {
		case controllers == "memory": // version 1
			g.dir = filepath.Join("/sys/fs/cgroup/memory", path, name)
			g.peak, g.usage, g.attempts, limitFile = "memory.max_usage_in_bytes", "memory.usage_in_bytes", "memory.oom_control", "memory.limit_in_bytes"
		case id == "0" && g.dir == "": // version 2, where only a group without processes of its own has limited children
			for up := path; ; up = filepath.Dir(up) {
				control, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", up, "cgroup.subtree_control"))
				if err == nil && strings.Contains(string(control), "memory") {
					g.dir = filepath.Join("/sys/fs/cgroup", up, name)
					g.peak, g.usage, g.attempts, limitFile = "memory.peak", "memory.current", "memory.events", "memory.max"
					break
				}
				if up == "/" || up == "." {
					break
				}
			}
		}
	}
	if g.dir == "" {
		t.Fatal("this test needs the memory controller of control groups: boot with it (cgroup_enable=memory on a Raspberry Pi)")
	}
	if err := os.Mkdir(g.dir, 0o755); err != nil {
		t.Fatalf("this test needs root and a writable control group: %v", err)
	}
	t.Cleanup(func() {
		for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			err := os.Remove(g.dir) // a directory of these goes with all its files
			if err == nil {
				return
			}
			if time.Now().After(deadline) {
				t.Error(err)
				return
			}
		}
	})
	if err := os.WriteFile(filepath.Join(g.dir, limitFile), []byte(strconv.Itoa(limit)), 0o644); err != nil {
		t.Fatal(err)
	}
	return g
}

// enter has cmd run inside, from its first byte of memory on.
func (g *memoryGroup) enter(cmd *exec.Cmd) {
	through(cmd, `echo 0 > "$1"/cgroup.procs && shift && exec "$@"`, g.dir)
}

// through has a shell run script with args before the words of cmd, which the
// script is to execute at its end.
func through(cmd *exec.Cmd, script string, args ...string) {
	outer := exec.Command("sh", slices.Concat([]string{"-c", script, "sh"}, args, cmd.Args)...)
	cmd.Path, cmd.Args = outer.Path, outer.Args
}

func (g *memoryGroup) bytes(file string) int {
	g.t.Helper()
	text, err := os.ReadFile(filepath.Join(g.dir, file))
	if err != nil {
		g.t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		g.t.Fatal(err)
	}
	return n
}

// kills is how often the kernel had to kill for want of memory.
func (g *memoryGroup) kills() int {
	text, err := os.ReadFile(filepath.Join(g.dir, g.attempts))
	if err != nil {
		g.t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var n int
		if _, err := fmt.Sscanf(line, "oom_kill %d", &n); err == nil {
			return n
		}
	}
	g.t.Fatalf("%s does not count kills: %s", g.attempts, text)
	return 0
}

// answerMany is a full picture of n bans, the last of them bad4 and the range of
// bad6, each an hour and as many minutes long as the resync.
func answerMany(n, resync int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		buf := append(make([]byte, 0, 1<<16), `{"new":[`...)
		row := func(i int, scope, value string) {
			if i > 0 {
				buf = append(buf, ',')
			}
			buf = fmt.Appendf(buf, `{"id":%d,"origin":"%s","type":"ban","scope":"%s","value":"%s","duration":"%dm30s","scenario":"crowdsecurity/http-probing"}`,
				i+1, []string{"CAPI", "lists", "crowdsec"}[i%3], scope, value, 60+10*resync)
			if len(buf) > 60_000 {
				_, _ = w.Write(buf)
				buf = buf[:0]
			}
		}
		for i := range n - 2 {
			row(i, "Ip", netip.AddrFrom4([4]byte{20 + byte(i>>24), byte(i >> 16), byte(i >> 8), byte(i)}).String())
		}
		row(n-2, "Ip", bad4.String())
		row(n-1, "Range", "2001:db8:f00::40/122")
		_, _ = w.Write(append(buf, `],"deleted":null}`...))
	}
}

// newFakeWorld is a world whose LAPI does as it is told.
func newFakeWorld(t testing.TB) (*world, *rig.FakeLAPI) {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), program: built(t)}
	w.network()
	w.write("key", "key")
	fake, err := rig.StartFakeLAPI(t.Context())
	w.must(err)
	t.Cleanup(func() { fake.Close() })
	socket := filepath.Join(w.dir, "lapi.sock") // the node has no way to loopback here
	w.url = "unix://" + socket
	l, err := net.Listen("unix", socket)
	w.must(err)
	server := &http.Server{Handler: fake, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { server.Close() })
	return w, fake
}

// resident returns what the process holds, and the most it held since the last
// call, in MB.
func (a *agent) resident() (now, peak int) {
	a.t.Helper()
	pid := a.cmd.Process.Pid
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	a.must(err)
	for line := range strings.Lines(string(status)) {
		fmt.Sscanf(line, "VmRSS: %d kB", &now)
		fmt.Sscanf(line, "VmHWM: %d kB", &peak)
	}
	a.must(os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0o200)) // the peak begins anew
	return now >> 10, peak >> 10
}

// metric returns the value of a line of /metrics, -1 if there is none.
func (a *agent) metric(name string) float64 {
	_, text, err := a.get("/metrics")
	if err == nil {
		for line := range strings.Lines(text) {
			if value, ok := strings.CutPrefix(line, name+" "); ok {
				n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
				a.must(err)
				return n
			}
		}
	}
	return -1
}

// TestMemory runs the agent in a memory control group: with 15,000 bans idle
// within 64 MB, and with many within 768 MB, while all of them change and so two
// generations are there at once, while a delta is folded in, and while it is
// killed and comes back. Banned addresses fire all the time, and nothing passes.
// A million takes longer than a test should, so it is asked for:
// EDGEWARD_TEST_BANS=1000000.
func TestMemory(t *testing.T) {
	many := 200_000
	if text := os.Getenv("EDGEWARD_TEST_BANS"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil {
			t.Fatal(err)
		}
		many = n
	}
	for _, c := range []struct {
		bans, limit  int // the limit in MB
		steady, peak int // what the process may hold, in MB
	}{
		{15_000, 64, 30, 45},
		{many, 768, 30 + many/10_000, 50 + many/5000}, // 250 MB for a million
	} {
		t.Run(strconv.Itoa(c.bans), func(t *testing.T) {
			w, fake := newFakeWorld(t)
			var resync atomic.Int32
			fake.Answer(func(rw http.ResponseWriter, r *http.Request) {
				if r.URL.Query().Get("startup") == "true" {
					answerMany(c.bans, int(resync.Load()))(rw, r)
					return
				}
				rig.AnswerStream(nil, nil)(rw, r)
			})
			group := newMemoryGroup(t, c.limit<<20)
			w.enter = group.enter
			began := time.Now()
			a := w.start()
			enforced := func() bool {
				return a.metric(`edgeward_kernel_elements{set="bans4"}`) == float64(c.bans-1) && a.metric("edgeward_kernel_intact") == 1
			}
			w.until("all are in the kernel", 60*time.Second, enforced)
			took := time.Since(began)
			if w.passes(bad4) || w.passes(bad6) || !w.passes(good4) {
				t.Fatal("the wrong ones pass")
			}
			before := w.server.Received()
			four := w.client.Blast(netip.AddrPortFrom(node4, w.server.Addr.Port()), bad4)
			six := w.client.Blast(netip.AddrPortFrom(node6, w.server.Addr.Port()), bad6)
			steady, started := a.resident()

			// All of them renewed: another generation beside this one. A pull
			// that fails makes the next one full.
			resync.Add(1)
			writes := func() float64 {
				return a.metric(`edgeward_kernel_transactions_total{kind="install"}`) + a.metric(`edgeward_kernel_transactions_total{kind="update"}`)
			}
			written := writes()
			fake.Next(rig.AnswerWith(http.StatusInternalServerError, "text/plain", nil))
			w.until("all are replaced", 60*time.Second, func() bool {
				return writes() > written && enforced()
			})
			_, resynced := a.resident()

			// As much new as makes the store fold.
			var added []rig.FakeDecision
			for i := range 2048 + c.bans/128 {
				added = append(added, rig.FakeDecision{ID: int64(2_000_000 + i), Origin: "cscli", Type: "ban", Scope: "Ip", Duration: "3h", Scenario: "s",
					Value: netip.AddrFrom4([4]byte{120, 0, byte(i >> 8), byte(i)}).String()})
			}
			fake.Next(rig.AnswerStream(added, nil))
			w.until("a large delta is enforced", 20*time.Second, func() bool {
				return a.metric(`edgeward_kernel_elements{set="bans4"}`) == float64(c.bans-1+len(added))
			})
			time.Sleep(time.Second) // it is folded after it is enforced
			_, folded := a.resident()

			a.stop(syscall.SIGKILL)
			a = w.start()
			w.until("the next agent has all", 60*time.Second, enforced)

			for _, b := range []interface{ Stop() (int, error) }{four, six} {
				n, err := b.Stop()
				w.must(err)
				if n < 1000 {
					t.Errorf("only %d packets were sent", n)
				}
			}
			time.Sleep(100 * time.Millisecond)
			after := w.server.Received()
			for _, from := range []netip.Addr{bad4, bad6} {
				if n := after[from] - before[from]; n != 0 {
					t.Errorf("%d packets from %v passed", n, from)
				}
			}
			idle, _ := a.resident()
			t.Logf("%d bans enforced %v after the start; the process holds %d MB, at most %d MB at the start, %d in a full pull that changes all, %d in a fold, %d MB after a restart; with the kernel's share %d MB, at most %d MB",
				c.bans, took.Round(time.Millisecond), steady, started, resynced, folded, idle, group.bytes(group.usage)>>20, group.bytes(group.peak)>>20)
			if n := group.kills(); n != 0 {
				t.Errorf("the kernel killed %d times for want of memory", n)
			}
			if steady > c.steady || max(started, resynced, folded) > c.peak {
				t.Errorf("the process may hold %d MB, %d MB at most", c.steady, c.peak)
			}
		})
	}
}

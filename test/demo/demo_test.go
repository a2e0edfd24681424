package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/edgeward/edgeward/test/rig"
)

// TestMain makes the test binary the demo itself where a test asks for it.
func TestMain(m *testing.M) {
	if os.Getenv("DEMO_ITSELF") != "" || os.Getenv(asPhone) != "" {
		os.Args = append(os.Args[:1], strings.Fields(os.Getenv("DEMO_ITSELF"))...)
		main()
		return
	}
	code := m.Run()
	if programs.dir != "" {
		os.RemoveAll(programs.dir)
	}
	os.Exit(code)
}

// programs are built once for all demos that run below a shell.
var programs struct {
	once sync.Once
	dir  string
	err  error
}

func builtPrograms(t *testing.T) string {
	t.Helper()
	programs.once.Do(func() {
		if programs.dir, programs.err = os.MkdirTemp("", "edgeward-demo-programs-"); programs.err == nil {
			programs.err = rig.Build(context.Background(), programs.dir, "edgeward", "edgeward-tunnel")
		}
	})
	if programs.err != nil {
		t.Fatal(programs.err)
	}
	return programs.dir
}

func TestEveryStepHolds(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	var out bytes.Buffer
	began := time.Now()
	err := run(ctx, &out, true, 1, "") // which builds the programs itself
	t.Logf("the story took %s:\n%s", spoken(time.Since(began)), out.String())
	if err != nil {
		t.Error(err)
	}
	if got := len(regexp.MustCompile(`(?m)^\d+  `).FindAllString(out.String(), -1)); got != 20 {
		t.Errorf("%d steps were played, want 20", got)
	}
	for line := range strings.Lines(out.String()) {
		// How long the path of the temporary directory is, is not ours to say.
		if line = strings.TrimRight(line, "\n"); utf8.RuneCountInString(line) > width && !strings.Contains(line, os.TempDir()) {
			t.Errorf("line of %d columns, want at most %d: %s", utf8.RuneCountInString(line), width, line)
		}
		if strings.Contains(line, "\x1b") {
			t.Errorf("an escape sequence in what is no terminal: %q", line)
		}
	}
	wantEmpty(t, os.TempDir())
}

func TestFailedStepIsNamed(t *testing.T) {
	var played []string
	scene := func(title string, err error) step {
		return step{title, func(context.Context) error { played = append(played, title); return err }}
	}
	var out bytes.Buffer
	failed := play(t.Context(), newStory(&out), []step{
		scene("first", nil),
		scene("second", errors.New("got 200, want 403")),
		scene("third", nil),
		scene("fourth", errors.New("timed out")),
	}, 1)
	if diff := cmp.Diff([]string{"first", "second", "third", "fourth"}, played); diff != "" {
		t.Errorf("steps played (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"2 (second)", "4 (fourth)"}, failed); diff != "" {
		t.Errorf("steps that failed (-want +got):\n%s", diff)
	}
	want := "\n1  first\n\n2  second\n FAILED got 200, want 403\n\n3  third\n\n4  fourth\n FAILED timed out\n"
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("story (-want +got):\n%s", diff)
	}
}

func TestInterruptedStoryEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var out bytes.Buffer
	failed := play(ctx, newStory(&out), []step{
		{"cut", func(context.Context) error { cancel(); return ctx.Err() }},
		{"never", func(context.Context) error { t.Error("a step was played after the end"); return nil }},
	}, 1)
	if len(failed) > 0 {
		t.Errorf("steps %q failed, want none: they were interrupted", failed)
	}
}

// TestNothingIsLeftBehind ends the demo in the ways that it is ended in, in the
// middle of the story.
func TestNothingIsLeftBehind(t *testing.T) {
	for _, test := range []struct {
		name  string
		from  int
		at    string // it ends when this has been said
		end   func(shell, demo int) error
		files bool // are left, because nobody is there to remove them
		phone bool // is connected, in a third network
	}{
		{name: "interrupt", from: 1, at: "\n2  ", end: func(_, demo int) error { return syscall.Kill(demo, syscall.SIGINT) }},
		{name: "interrupt while packets fly", from: 13, at: "on-node nft flush ruleset", end: func(_, demo int) error { return syscall.Kill(demo, syscall.SIGINT) }},
		{name: "interrupt amid a rollover", from: 17, at: "# the old one", end: func(_, demo int) error { return syscall.Kill(demo, syscall.SIGINT) }},
		{name: "interrupt amid a transfer", from: 20, at: "it runs", end: func(_, demo int) error { return syscall.Kill(demo, syscall.SIGINT) }, phone: true},
		{name: "killed amid a transfer", from: 20, at: "it runs", end: func(_, demo int) error { return syscall.Kill(demo, syscall.SIGKILL) }, files: true, phone: true},
		{name: "terminate", from: 1, at: "\n2  ", end: func(_, demo int) error { return syscall.Kill(demo, syscall.SIGTERM) }},
		{name: "the parent is killed", from: 1, at: "\n2  ", end: func(shell, _ int) error { return syscall.Kill(shell, syscall.SIGKILL) }},
		{name: "killed", from: 10, at: "cscli decisions add", end: func(_, demo int) error { return syscall.Kill(demo, syscall.SIGKILL) }, files: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			dir := t.TempDir()
			shell, demo, said := begin(ctx, t, dir, fmt.Sprintf("-from %d", test.from), os.Args[0])
			wait(ctx, t, "the step", said, func() bool { return strings.Contains(said(), test.at) })
			networks := networksOf(t, dir)
			want := 2
			if test.phone {
				want = 3
			}
			if len(networks) != want {
				t.Errorf("the processes of the demo are in %d networks, want %d: the machine's, the node's and perhaps the phone's", len(networks), want)
			}
			// The number of a network that is gone is soon another's, so those who
			// were in it are watched: a network lives as long as they do.
			users := networkUsers(t, networks)
			if err := test.end(shell.Process.Pid, demo); err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			wait(ctx, t, "the demo's end", said, func() bool { return gone(demo) })
			t.Logf("the demo ended after %s", spoken(time.Since(began)))
			_ = shell.Wait() // with an error where the shell was killed
			if strings.Contains(said(), "FAILED") {
				t.Errorf("an interrupted step counts as failed:\n%s", said())
			}
			if test.files {
				// Who is killed together with the demo may take a moment to go.
				wait(ctx, t, "the end of what the demo started", said, func() bool { return len(processesIn(t, dir)) == 0 })
			} else {
				wantEmpty(t, dir)
			}
			if left := processesIn(t, dir); len(left) > 0 {
				t.Errorf("processes %v are left behind", left)
			}
			for _, process := range users {
				if !gone(process) {
					t.Errorf("process %d keeps the node's network", process)
				}
			}
		})
	}
}

// TestKernelLayerIsLeftOut: who may make no network has the ingress all the same,
// and is told of the rest.
func TestKernelLayerIsLeftOut(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	dir := t.TempDir()
	shell, _, said := begin(ctx, t, dir, "-once -from 15", "setpriv", "--bounding-set=-sys_admin", os.Args[0])
	if err := shell.Wait(); err == nil {
		t.Errorf("-once succeeds without the kernel layer:\n%s", said())
	}
	for _, want := range []string{
		"The kernel layer and the VPN are left out: they need root and namespaces\n(sudo make demo).\n",
		"\n15  ",
		"demo: the steps in the kernel and of the VPN were not played: they need root and network namespaces: ",
	} {
		if !strings.Contains(said(), want) {
			t.Errorf("the demo does not say %q:\n%s", want, said())
		}
	}
	if strings.Contains(said(), "\n10  ") || strings.Contains(said(), "\n18  ") || strings.Contains(said(), "FAILED") {
		t.Errorf("the demo said:\n%s", said())
	}
	wantEmpty(t, dir)
}

// TestVPNIsLeftOut: who may make no interface has all but the VPN, and is told.
func TestVPNIsLeftOut(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	dir := t.TempDir()
	shell, _, said := begin(ctx, t, dir, "-once -from 14", "unshare", "--mount", "sh", "-c", `mount --bind /dev/null /dev/net/tun && exec "$@"`, "sh", os.Args[0])
	if err := shell.Wait(); err == nil {
		t.Errorf("-once succeeds without the VPN:\n%s", said())
	}
	for _, want := range []string{
		"The VPN is left out: it needs /dev/net/tun, and the right to open it.\n",
		"\n14  ",
		"demo: the steps of the VPN were not played: ",
	} {
		if !strings.Contains(said(), want) {
			t.Errorf("the demo does not say %q:\n%s", want, said())
		}
	}
	if strings.Contains(said(), "\n18  ") || strings.Contains(said(), "FAILED") {
		t.Errorf("the demo said:\n%s", said())
	}
	wantEmpty(t, dir)
}

// begin starts the demo below a shell, and returns the shell, the demo's process
// id, and what it has said so far.
func begin(ctx context.Context, t *testing.T, dir, flags string, command ...string) (shell *exec.Cmd, demo int, said func() string) {
	t.Helper()
	log := filepath.Join(t.TempDir(), "log")
	script := `log=$1; shift; "$@" >"$log" 2>&1 & echo $!; wait $!`
	shell = exec.CommandContext(ctx, "sh", append([]string{"-c", script, "sh", log}, command...)...)
	shell.Env = append(os.Environ(), "DEMO_ITSELF="+flags+" -programs "+builtPrograms(t), "TMPDIR="+dir)
	shell.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := shell.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := shell.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fscan(out, &demo); err != nil {
		t.Fatal(err)
	}
	return shell, demo, func() string { text, _ := os.ReadFile(log); return string(text) }
}

// wait waits for something to come true, and shows what the demo said if it
// does not.
func wait(ctx context.Context, t *testing.T, what string, said func() string, is func() bool) {
	t.Helper()
	for !is() {
		if err := pause(ctx, 20*time.Millisecond); err != nil {
			t.Fatalf("wait for %s: %v; the demo said:\n%s", what, err, said())
		}
	}
}

// gone tells whether a process has ended; who reaps orphans may be slow about it.
func gone(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.Contains(string(stat), ") Z ")
}

func wantEmpty(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		t.Errorf("%s is left behind", entry.Name())
	}
}

// processesIn returns the processes that work below dir: LAPI, Traefik and the
// node bouncer do.
func processesIn(t *testing.T, dir string) (ids []string) {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/cwd")
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		if at, err := os.Readlink(link); err == nil && strings.HasPrefix(at, dir) {
			ids = append(ids, strings.Split(link, "/")[2])
		}
	}
	return ids
}

// networksOf returns the networks that the processes below dir are in.
func networksOf(t *testing.T, dir string) map[string]bool {
	t.Helper()
	networks := map[string]bool{}
	for _, id := range processesIn(t, dir) {
		if network, err := os.Readlink("/proc/" + id + "/ns/net"); err == nil {
			networks[network] = true
		}
	}
	return networks
}

// networkUsers returns the processes that are in one of some networks, or hold it
// open; that of the test itself does not count.
func networkUsers(t *testing.T, networks map[string]bool) (ids []int) {
	t.Helper()
	// Of this thread: the first of the process may have been left in another.
	own, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, pattern := range []string{"/proc/[0-9]*/ns/net", "/proc/[0-9]*/fd/*"} {
		links, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, link := range links {
			if network, err := os.Readlink(link); err == nil && network != own && networks[network] {
				if id, err := strconv.Atoi(strings.Split(link, "/")[2]); err == nil {
					ids = append(ids, id)
				}
			}
		}
	}
	return ids
}

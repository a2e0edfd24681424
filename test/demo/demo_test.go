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
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestMain makes the test binary the demo itself where a test asks for it.
func TestMain(m *testing.M) {
	if os.Getenv("DEMO_ITSELF") != "" {
		os.Args = os.Args[:1]
		main()
		return
	}
	os.Exit(m.Run())
}

func TestEveryStepHolds(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	var out bytes.Buffer
	began := time.Now()
	err := run(ctx, &out, true)
	t.Logf("the story took %s:\n%s", spoken(time.Since(began)), out.String())
	if err != nil {
		t.Error(err)
	}
	if got := len(regexp.MustCompile(`(?m)^\d  `).FindAllString(out.String(), -1)); got != 9 {
		t.Errorf("%d steps were played, want 9", got)
	}
	for line := range strings.Lines(out.String()) {
		// How long the path of the temporary directory is, is not ours to say.
		if line = strings.TrimRight(line, "\n"); len(line) > width && !strings.Contains(line, os.TempDir()) {
			t.Errorf("line of %d columns, want at most %d: %s", len(line), width, line)
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
	})
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
	})
	if len(failed) > 0 {
		t.Errorf("steps %q failed, want none: they were interrupted", failed)
	}
}

// TestNothingIsLeftBehind ends the demo in the ways that it is ended in, in the
// middle of the story.
func TestNothingIsLeftBehind(t *testing.T) {
	for _, test := range []struct {
		name string
		end  func(shell, demo int) error
	}{
		{"interrupt", func(_, demo int) error { return syscall.Kill(demo, syscall.SIGINT) }},
		{"terminate", func(_, demo int) error { return syscall.Kill(demo, syscall.SIGTERM) }},
		{"the parent is killed", func(shell, _ int) error { return syscall.Kill(shell, syscall.SIGKILL) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			dir := t.TempDir()
			log := filepath.Join(t.TempDir(), "log")
			cmd := exec.CommandContext(ctx, "sh", "-c", `"$0" >"$1" 2>&1 & echo $!; wait $!`, os.Args[0], log)
			cmd.Env = append(os.Environ(), "DEMO_ITSELF=1", "TMPDIR="+dir)
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			demo := 0
			said := func() string { text, _ := os.ReadFile(log); return string(text) }
			if _, err := fmt.Fscan(out, &demo); err != nil {
				t.Fatal(err)
			}
			wait(ctx, t, "the second step", said, func() bool { return strings.Contains(said(), "\n2  ") })
			if err := test.end(cmd.Process.Pid, demo); err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			wait(ctx, t, "the demo's end", said, func() bool { return gone(demo) })
			t.Logf("the demo ended after %s", spoken(time.Since(began)))
			_ = cmd.Wait() // with an error where the shell was killed
			if strings.Contains(said(), "FAILED") {
				t.Errorf("an interrupted step counts as failed:\n%s", said())
			}
			wantEmpty(t, dir)
			wantNobodyIn(t, dir)
		})
	}
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

// wantNobodyIn demands that no process works below dir: LAPI and Traefik do.
func wantNobodyIn(t *testing.T, dir string) {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/cwd")
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		if at, err := os.Readlink(link); err == nil && strings.HasPrefix(at, dir) {
			t.Errorf("process %s is left behind", strings.Split(link, "/")[2])
		}
	}
}

package daemon

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// task is a Task of one function.
type task struct {
	name string
	run  func(context.Context) error
}

func (t *task) Run(ctx context.Context) error { return t.run(ctx) }
func (t *task) String() string                { return t.name }

// untilEnd is what a task does that only ends when asked.
func untilEnd(ctx context.Context) error { <-ctx.Done(); return nil }

func TestRun(t *testing.T) {
	broken := errors.New("link is down")
	for _, c := range []struct {
		name  string
		tasks []Task
		life  time.Duration // of the context; 0: without end
		want  string        // the error; "" for none
		took  time.Duration
	}{
		{"nothing to do", nil, 0, "", 0},
		{"all done", []Task{
			&task{"a", func(context.Context) error { return nil }},
			&task{"b", func(context.Context) error { time.Sleep(time.Second); return nil }},
		}, 0, "", time.Second},
		{"asked to end", []Task{&task{"a", untilEnd}, &task{"b", untilEnd}}, time.Minute, "", time.Minute},
		{"asked to end, and says so", []Task{&task{"a", func(ctx context.Context) error {
			<-ctx.Done()
			return fmt.Errorf("pull: %w", ctx.Err())
		}}}, time.Minute, "", time.Minute},
		{"one fails, the rest end", []Task{
			&task{"a", untilEnd},
			&task{"kernel", func(context.Context) error { time.Sleep(time.Second); return broken }},
		}, 0, "kernel: link is down", time.Second},
		{"one panics, the rest end", []Task{
			&task{"a", untilEnd},
			&task{"kernel", func(context.Context) error { panic("index out of range") }},
		}, 0, "kernel: panic: index out of range", 0},
		{"a failure while ending", []Task{
			&task{"a", func(ctx context.Context) error { <-ctx.Done(); return broken }},
			&task{"b", func(context.Context) error { return broken }},
		}, 0, "b: link is down\na: link is down", 0},
		{"a task that does not end", []Task{
			&task{"a", untilEnd},
			&task{"stuck", func(context.Context) error { time.Sleep(time.Hour); return nil }},
		}, time.Minute, "tasks do not end within 15s: stuck", time.Minute + 15*time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				if c.life > 0 {
					ctx, cancel = context.WithTimeout(t.Context(), c.life)
				}
				defer cancel()
				start := time.Now()
				err := run(ctx, Options{Log: slog.New(slog.DiscardHandler)}, nil, func() {}, c.tasks)
				got := ""
				if err != nil {
					got = err.Error()
				}
				if got != c.want || time.Since(start) != c.took {
					t.Errorf("error %q after %v; want %q after %v", got, time.Since(start), c.want, c.took)
				}
				if strings.Contains(c.want, "link") && !errors.Is(err, broken) {
					t.Errorf("%v does not wrap the task's error", err)
				}
				time.Sleep(2 * time.Hour) // the stuck task too must leave the bubble
			})
		})
	}
}

func TestSignals(t *testing.T) {
	self, err := os.FindProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		end    os.Signal
		reload bool
		logs   string
	}{
		{syscall.SIGTERM, true, "msg=reloading signal=hangup\nmsg=stopping signal=terminated\nmsg=stopped\n"},
		{syscall.SIGINT, false, "msg=\"nothing to reload\" signal=hangup\nmsg=stopping signal=interrupt\nmsg=stopped\n"},
	} {
		t.Run(c.end.String(), func(t *testing.T) {
			var log bytes.Buffer
			var reloads atomic.Int32
			hungUp := make(chan struct{})
			options := Options{Log: slog.New(&firstWords{&log, hungUp})}
			if c.reload {
				options.Reload = func() { reloads.Add(1) }
			}
			err := Run(t.Context(), options, &task{"sender", func(ctx context.Context) error {
				if err := self.Signal(syscall.SIGHUP); err != nil {
					return err
				}
				<-hungUp // signals of two kinds may overtake each other
				if err := self.Signal(c.end); err != nil {
					return err
				}
				return untilEnd(ctx)
			}})
			if err != nil {
				t.Error(err)
			}
			if diff := cmp.Diff(c.logs, log.String()); diff != "" {
				t.Error(diff)
			}
			if c.reload != (reloads.Load() == 1) {
				t.Errorf("reloaded %d times", reloads.Load())
			}
		})
	}
}

// firstWords is a log handler that writes messages with their first attribute
// and closes a channel at the first.
type firstWords struct {
	to    *bytes.Buffer
	first chan struct{}
}

func (h *firstWords) Enabled(context.Context, slog.Level) bool { return true }
func (h *firstWords) WithAttrs([]slog.Attr) slog.Handler       { return h }
func (h *firstWords) WithGroup(string) slog.Handler            { return h }
func (h *firstWords) Handle(ctx context.Context, r slog.Record) error {
	r.Time = time.Time{}
	text := slog.NewTextHandler(h.to, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.LevelKey {
			return slog.Attr{}
		}
		return a
	}})
	if h.to.Len() == 0 {
		defer close(h.first)
	}
	return text.Handle(ctx, r)
}

// TestReloadMayPanic: a bad reload must not end what works.
func TestReloadMayPanic(t *testing.T) {
	self, err := os.FindProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	err = Run(ctx, Options{Log: slog.New(slog.DiscardHandler), Reload: func() {
		defer cancel()
		panic("bad file")
	}}, &task{"sender", func(ctx context.Context) error {
		if err := self.Signal(syscall.SIGHUP); err != nil {
			return err
		}
		return untilEnd(ctx)
	}})
	if err != nil {
		t.Error(err)
	}
}

// TestSecondSignalEndsAtOnce runs itself as a process that does not want to
// end and gets two signals.
func TestSecondSignalEndsAtOnce(t *testing.T) {
	const marker = "EDGEWARD_TEST_STUBBORN"
	if os.Getenv(marker) != "" {
		_ = Run(context.Background(), Options{Log: slog.New(slog.NewTextHandler(os.Stdout, nil))}, &task{"stubborn", func(ctx context.Context) error {
			fmt.Println("started")
			<-ctx.Done()
			time.Sleep(time.Hour)
			return nil
		}})
		return
	}
	command := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestSecondSignalEndsAtOnce$")
	command.Env = append(os.Environ(), marker+"=1")
	out, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	signal := func(after string) {
		t.Helper()
		for lines.Scan() && !strings.Contains(lines.Text(), after) {
		}
		if err := command.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatalf("after %q: %v", after, err)
		}
	}
	signal("started")
	signal("stopping")
	go func() { // Run lets go of the signals a moment after it said so
		for command.Process.Signal(syscall.SIGTERM) == nil {
			time.Sleep(10 * time.Millisecond)
		}
	}()
	err = command.Wait()
	if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGTERM {
		t.Errorf("ended with %v, want by the second signal", err)
	}
}

func TestNewLog(t *testing.T) {
	for _, c := range []struct {
		level, format string
		want          string // of debug, info, warn and error, those that are written
		err           string
	}{
		{"", "", "info warn error", ""},
		{"DEBUG", "json", "debug info warn error", ""},
		{"warn", "text", "warn error", ""},
		{"error", "json", "error", ""},
		{"loud", "json", "", `read EDGEWARD_LOG_LEVEL "loud": want debug, info, warn or error`},
		{"", "xml", "", `read log format "xml": want json or text`},
	} {
		var out bytes.Buffer
		log, err := NewLog(&out, c.format, func(name string) string {
			if name != "EDGEWARD_LOG_LEVEL" {
				t.Errorf("asked for %s", name)
			}
			return c.level
		})
		if err != nil || c.err != "" {
			if fmt.Sprint(err) != c.err {
				t.Errorf("%q, %q: %v, want %q", c.level, c.format, err, c.err)
			}
			continue
		}
		log.Debug("debug")
		log.Info("info")
		log.Warn("warn")
		log.Error("error")
		var got []string
		for line := range strings.Lines(out.String()) {
			record := struct{ Msg string }{}
			if c.format == "text" {
				_, record.Msg, _ = strings.Cut(strings.TrimSpace(line), "msg=")
			} else if err := json.Unmarshal([]byte(line), &record); err != nil {
				t.Errorf("%q is not JSON: %v", line, err)
			}
			got = append(got, record.Msg)
		}
		if diff := cmp.Diff(c.want, strings.Join(got, " ")); diff != "" {
			t.Errorf("%q, %q: %s", c.level, c.format, diff)
		}
	}
}

func TestVersion(t *testing.T) {
	settings := func(pairs ...string) (s []debug.BuildSetting) {
		for i := 0; i < len(pairs); i += 2 {
			s = append(s, debug.BuildSetting{Key: pairs[i], Value: pairs[i+1]})
		}
		return s
	}
	for _, c := range []struct {
		name   string
		linked string
		info   *debug.BuildInfo
		want   string
	}{
		{"nothing known", "", nil, coming},
		{"a work tree", "", &debug.BuildInfo{Main: debug.Module{Version: "(devel)"}}, coming},
		{"a commit", "", &debug.BuildInfo{Main: debug.Module{Version: "v0.0.0-20261121134237-0123456789ab+dirty"}}, coming},
		{"a commit after a release", "", &debug.BuildInfo{Main: debug.Module{Version: "v1.2.4-0.20261121134237-0123456789ab"}}, coming},
		{"a changed release", "", &debug.BuildInfo{Main: debug.Module{Version: "v1.2.3+dirty"}}, "v1.2.3"},
		{"a work tree with changes", "", &debug.BuildInfo{Settings: settings("vcs.revision", "0123456789abcdef", "vcs.modified", "true")}, coming + " (0123456789ab+)"},
		{"installed by the go command", "", &debug.BuildInfo{Main: debug.Module{Version: "v1.2.3"}}, "v1.2.3"},
		{"a release", "v1.3.0", &debug.BuildInfo{Main: debug.Module{Version: "(devel)"}, Settings: settings("vcs.revision", "0123456", "vcs.modified", "false")}, "v1.3.0 (0123456)"},
	} {
		got := version(c.linked, c.info)
		if text := got.String(); !strings.HasPrefix(text, c.want+" go1.") || !strings.Contains(text, "linux/") {
			t.Errorf("%s: %s, want %s", c.name, text, c.want)
		}
	}
	if Version().Version == "" {
		t.Error("this binary has no version")
	}
}

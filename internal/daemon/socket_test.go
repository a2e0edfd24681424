package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sub", "socket")
	log := slog.New(slog.DiscardHandler)
	answers := Answers{
		"/v1/name": func(q url.Values) (any, error) { return "hello " + q.Get("who"), nil },
		"/v1/fail": func(url.Values) (any, error) { return nil, errors.New("not an address") },
	}
	orders := Orders{"/v1/stop": func(q url.Values, by string) (any, error) { return q.Get("what") + " for " + by, nil }}
	var got string
	if err := Ask(t.Context(), path, "/v1/name", nil, &got); !errors.Is(err, ErrNotRunning) {
		t.Errorf("without a process: %v", err)
	}
	for range 2 { // the second takes the place of what the first left
		s, err := ListenSocket(path, answers, orders, log)
		if err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("the socket is %v, %v", info.Mode(), err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		if err := Ask(t.Context(), path, "/v1/name", url.Values{"who": {"you"}}, &got); err != nil || got != "hello you" {
			t.Errorf("%q, %v", got, err)
		}
		if err := Ask(t.Context(), path, "/v1/fail", nil, &got); err == nil || err.Error() != "ask the running process: not an address" {
			t.Errorf("%v", err)
		}
		who := fmt.Sprintf("it for user %d, process %d", os.Getuid(), os.Getpid())
		if err := Order(t.Context(), path, "/v1/stop", url.Values{"what": {"it"}}, &got); err != nil || got != who {
			t.Errorf("an order: %q, %v", got, err)
		}
		if err := Ask(t.Context(), path, "/v1/stop", nil, &got); err == nil {
			t.Error("a question gave an order")
		}
		if err := Ask(t.Context(), path, "/v1/other", nil, &got); err == nil || !strings.Contains(err.Error(), "404") {
			t.Errorf("%v", err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ListenSocket(path, answers, orders, log); err == nil {
		t.Error("a file that is no socket made way")
	}
}

// TestSocketIsHandedOver starts a process before the one that it replaces has
// ended: the socket stays the old one's to its end, and is the new one's then.
func TestSocketIsHandedOver(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	var logs strings.Builder
	begin := func(name string) (end func()) {
		s, err := ListenSocket(path, Answers{"/": func(url.Values) (any, error) { return name, nil }}, nil, slog.New(slog.NewTextHandler(&logs, nil)))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		return func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
	who := func() (name string) {
		_ = Ask(t.Context(), path, "/", nil, &name)
		return name
	}
	endOld := begin("old")
	endNew := begin("new")
	begin("third")() // which ends while it waits, and takes nobody's socket with it
	if name := who(); name != "old" {
		t.Errorf("%q answers beside the new process", name)
	}
	endOld()
	for deadline := time.Now().Add(3 * bindRetry); who() != "new"; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the new process never answers")
		}
	}
	endNew()
	if n := strings.Count(logs.String(), "\n"); n != 3 || !strings.Contains(logs.String(), "the socket is free") {
		t.Errorf("the log is %s", logs.String())
	}
}

package tunnel

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestWatcher(t *testing.T) {
	dir := t.TempDir()
	path, token := filepath.Join(dir, "tunnel.yaml"), filepath.Join(dir, "token")
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(path, "tunnels: [{name: a, tokenFile: "+token+"}]\n")
	write(token, "one")
	logs := new(strings.Builder)
	w, c, err := NewWatcher(path, func(Config) (*slog.Logger, error) { return slog.New(slog.NewTextHandler(logs, nil)), nil })
	if err != nil || c.Tunnels[0].Name != "a" {
		t.Fatal(c, err)
	}
	applied := 0
	var refuse error
	w.OnChange(func(context.Context, Config) error {
		applied++
		return refuse
	})
	turn := func(what string, times int, trouble, logged string) {
		t.Helper()
		applied = 0
		logs.Reset()
		w.turn(t.Context())
		if applied != times || !strings.Contains(w.Trouble(), trouble) || (w.Trouble() == "") != (trouble == "") || !strings.Contains(logs.String(), logged) || (logged == "") != (logs.Len() == 0) {
			t.Errorf("%s: applied %d times, trouble %q, logged %s", what, applied, w.Trouble(), logs)
		}
	}
	turn("at the start", 1, "", "configuration accepted")
	turn("nothing new", 0, "", "")
	write(token, "two")
	turn("another token", 1, "", "configuration accepted")
	if err := os.Remove(token); err != nil {
		t.Fatal(err)
	}
	refuse = errors.New("read tokenFile: no such file")
	turn("no token", 1, "no such file", "what was good before stays")
	turn("not tried again at once", 0, "no such file", "")
	w.again = time.Time{}
	turn("tried again, said once", 1, "no such file", "")
	if pause := time.Until(w.again); pause < w.every {
		t.Errorf("the pause is %v", pause)
	}
	refuse = nil
	write(token, "three")
	turn("a token again", 1, "", "configuration accepted")
	write(path, "tunnels: []\nhostes: []\n")
	turn("wrong", 0, "tunnels: is missing", "keeping the last good one")
	if n := strings.Count(logs.String(), "\n"); n != 2 {
		t.Errorf("two mistakes are %d lines: %s", n, logs)
	}
	turn("still wrong, said once", 0, "tunnels: is missing", "")
	w.asked = true // by Reload
	turn("still wrong, and somebody asks", 0, "tunnels: is missing", "keeping the last good one")
	write(path, "tunnels: [{name: a, tokenFile: "+token+"}]\n")
	turn("right again", 1, "", "configuration accepted")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	turn("gone", 0, "read configuration", "keeping the last good one")

	// Run looks by itself, and at once when told to.
	write(path, "tunnels: [{name: b, tokenFile: "+token+"}]\n")
	seen := make(chan string, 8)
	w.OnChange(func(_ context.Context, c Config) error { seen <- c.Tunnels[0].Name; return nil })
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	if got := <-seen; got != "b" {
		t.Errorf("seen %s", got)
	}
	write(path, "tunnels: [{name: c, tokenFile: "+token+"}]\n")
	w.Reload()
	if got := <-seen; got != "c" {
		t.Errorf("seen %s", got)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

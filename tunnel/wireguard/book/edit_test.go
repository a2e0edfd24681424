package book

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func TestEdit(t *testing.T) {
	dir := t.TempDir()
	path, link := filepath.Join(dir, "real", "tunnel.yaml"), filepath.Join(dir, "tunnel.yaml")
	if err := errors.Join(os.Mkdir(filepath.Dir(path), 0o755), os.WriteFile(path, []byte("a"), 0o600), os.Chmod(path, 0o640), os.Symlink("real/tunnel.yaml", link)); err != nil {
		t.Fatal(err)
	}
	fine := func([]byte) error { return nil }
	becomes := func(text string) func([]byte) ([]byte, error) {
		return func([]byte) ([]byte, error) { return []byte(text), nil }
	}
	inode := func() uint64 {
		t.Helper()
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o640 {
			t.Errorf("the mode is %v", info.Mode())
		}
		return info.Sys().(*syscall.Stat_t).Ino
	}
	is := func(want string) {
		t.Helper()
		if text, err := os.ReadFile(link); err != nil || string(text) != want {
			t.Errorf("have %q, %v; want %q", text, err, want)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, "real", ".*")); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
		if info, err := os.Lstat(link); err != nil || info.Mode()&os.ModeSymlink == 0 {
			t.Errorf("the link is no link any more: %v", err)
		}
	}
	before := inode()
	if err := Edit(t.Context(), link, becomes("a"), func([]byte) error { return errors.New("asked") }); err != nil || inode() != before {
		t.Errorf("text that did not change was written: %v", err)
	}
	if err := Edit(t.Context(), link, becomes("b"), fine); err != nil || inode() == before {
		t.Errorf("written in place: %v", err)
	}
	is("b")
	if err := Edit(t.Context(), link, becomes("c"), func([]byte) error { return errors.New("it is wrong") }); err == nil || !strings.HasSuffix(err.Error(), "it is wrong") {
		t.Errorf("the check said no: %v", err)
	}
	if err := Edit(t.Context(), link, func([]byte) ([]byte, error) { return nil, errors.New("no such peer") }, fine); err == nil || err.Error() != "no such peer" {
		t.Errorf("the edit failed: %v", err)
	}
	is("b")
	if err := Edit(t.Context(), filepath.Join(dir, "none"), becomes("c"), fine); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	if err := Edit(t.Context(), dir, becomes("c"), fine); err == nil {
		t.Error("a directory was edited")
	}

	// Whoever may read the file cannot keep others from it.
	reader, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if err := syscall.Flock(int(reader.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if err := Edit(t.Context(), link, becomes("b2"), fine); err != nil {
		t.Errorf("a reader has locked the file: %v", err)
	}
	is("b2")

	beside := filepath.Join(dir, "real", ".tunnel.yaml.lock")
	if err := os.Symlink(link, beside); err != nil {
		t.Fatal(err)
	}
	if err := Edit(t.Context(), link, becomes("c"), fine); !errors.Is(err, syscall.ELOOP) {
		t.Errorf("a link was followed: %v", err)
	}
	if err := os.Remove(beside); err != nil {
		t.Fatal(err)
	}

	unlock, err := lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(beside); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the lock is %v, %v", info, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := Edit(ctx, link, becomes("c"), fine); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "another edit") {
		t.Errorf("the file is locked: %v", err)
	}
	unlock()
	is("b2")
}

// TestEditsWait has many editors add a line at once: none is lost.
func TestEditsWait(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tunnel.yaml")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	const editors = 20
	var all sync.WaitGroup
	for i := range editors {
		all.Go(func() {
			if err := Edit(t.Context(), path, func(text []byte) ([]byte, error) { return fmt.Appendf(text, "%d\n", i), nil }, func([]byte) error { return nil }); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	text, err := os.ReadFile(path)
	if err != nil || bytes.Count(text, []byte("\n")) != editors {
		t.Errorf("have %q, %v", text, err)
	}
}

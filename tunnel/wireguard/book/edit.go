package book

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// Edit changes the file at path, for which other edits wait, and which this one
// waits for until ctx ends: edit gets its text and returns the new one, which
// check must accept: the error of either is returned as it is. The file is
// replaced whole and keeps its mode and owner; where path is a symbolic link, it
// is the file that it leads to. Text that did not change is not written.
func Edit(ctx context.Context, path string, edit func(text []byte) ([]byte, error), check func(text []byte) error) error {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return fmt.Errorf("edit configuration: %w", err)
	}
	unlock, err := lock(ctx, real)
	if err != nil {
		return fmt.Errorf("edit configuration: %w", err)
	}
	defer unlock()
	file, err := os.Open(real)
	if err != nil {
		return fmt.Errorf("edit configuration: %w", err)
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return fmt.Errorf("edit configuration: %w", err)
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("edit configuration: %s is not a regular file", real)
	}
	var text bytes.Buffer
	if _, err := text.ReadFrom(file); err != nil {
		return fmt.Errorf("edit configuration: %w", err)
	}
	changed, err := edit(bytes.Clone(text.Bytes()))
	if err != nil {
		return err
	}
	if bytes.Equal(changed, text.Bytes()) {
		return nil
	}
	if err := check(changed); err != nil {
		return err
	}
	if err := replace(real, changed, info); err != nil {
		return fmt.Errorf("edit configuration: %w", err)
	}
	return nil
}

// retry is how often a lock is tried.
const retry = 20 * time.Millisecond

// lock has all other edits of the file at path wait until unlock is called. What
// is locked is a file of its own beside that one, which only its owner can open:
// whoever may read the configuration could lock that, and keep others from it.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	beside := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".lock")
	for {
		file, err := os.OpenFile(beside, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, err
		}
		for {
			err = syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
			if err == nil || !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
				break
			}
			select {
			case <-ctx.Done():
				file.Close()
				return nil, fmt.Errorf("wait for another edit of %s to end: %w", path, ctx.Err())
			case <-time.After(retry):
			}
		}
		var have fs.FileInfo
		if err == nil {
			have, err = file.Stat()
		}
		if err != nil {
			file.Close()
			return nil, fmt.Errorf("lock %s: %w", beside, err)
		}
		// Who had it before has removed it: what counts is the one that is there.
		if there, err := os.Lstat(beside); err == nil && os.SameFile(have, there) {
			return func() {
				os.Remove(beside)
				file.Close()
			}, nil
		}
		file.Close()
	}
}

// replace puts a new file in the place of the one at path.
func replace(path string, text []byte, was fs.FileInfo) (err error) {
	dir := filepath.Dir(path)
	fresh, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(fresh.Name())
		}
	}()
	_, err = fresh.Write(text)
	if owner, ok := was.Sys().(*syscall.Stat_t); ok && err == nil {
		// Where that is not ours to do, better no edit than another owner.
		err = fresh.Chown(int(owner.Uid), int(owner.Gid))
	}
	if err == nil {
		err = fresh.Chmod(was.Mode().Perm()) // after the owner, which takes bits away
	}
	if err == nil {
		err = fresh.Sync()
	}
	if err = errors.Join(err, fresh.Close()); err != nil {
		return err
	}
	if err = os.Rename(fresh.Name(), path); err != nil {
		return err
	}
	if d, err := os.Open(dir); err == nil { // the name, too, outlives a power cut
		_ = d.Sync()
		d.Close()
	}
	return nil
}

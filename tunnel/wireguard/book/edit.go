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
// check must accept: the error of either is returned as it is. The file is replaced whole and keeps its mode and owner;
// where path is a symbolic link, it is the file that it leads to. Text that did
// not change is not written.
func Edit(ctx context.Context, path string, edit func(text []byte) ([]byte, error), check func(text []byte) error) error {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return fmt.Errorf("edit configuration: %w", err)
	}
	file, err := lock(ctx, real)
	if err != nil {
		return fmt.Errorf("edit configuration: %w", err)
	}
	defer file.Close() // and the lock with it
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

// lock opens the file at path and locks it. Since an edit puts a new file in its
// place, the one that was locked may be gone by then: it begins again.
func lock(ctx context.Context, path string) (*os.File, error) {
	for {
		file, err := os.Open(path)
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
		if err != nil {
			file.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		have, err := file.Stat()
		if err != nil {
			file.Close()
			return nil, err
		}
		if there, err := os.Stat(path); err == nil && os.SameFile(have, there) {
			return file, nil
		} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
			file.Close()
			return nil, err
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

package rig

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

// Debian returns the directory in which a Debian package lies unpacked, and its
// version, and downloads it first when the cache does not hold it. Nothing is
// installed: no service of the package runs, and none of its scripts.
func Debian(ctx context.Context, name string) (dir, version string, err error) {
	cache, err := CacheDir()
	if err != nil {
		return "", "", err
	}
	home := filepath.Join(cache, "tools", name+"-debian-"+runtime.GOARCH)
	dir = filepath.Join(home, "root")
	if err := os.MkdirAll(home, 0o755); err != nil {
		return "", "", fmt.Errorf("make the cache of Debian's %s: %w", name, err)
	}
	unlock, err := lock(ctx, filepath.Join(home, "lock"))
	if err != nil {
		return "", "", fmt.Errorf("lock the cache of Debian's %s: %w", name, err)
	}
	defer unlock()
	if text, err := os.ReadFile(filepath.Join(dir, "version")); err == nil {
		return dir, string(text), nil
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return "", "", fmt.Errorf("download Debian's %s: there is no apt-get: this runs on Debian", name)
	}
	partial, err := os.MkdirTemp(home, "partial-")
	if err != nil {
		return "", "", fmt.Errorf("make the cache of Debian's %s: %w", name, err)
	}
	defer os.RemoveAll(partial)
	if err := fetch(ctx, partial, name); err != nil {
		return "", "", err
	}
	archives, err := filepath.Glob(filepath.Join(partial, name+"_*.deb"))
	if err != nil || len(archives) != 1 {
		return "", "", fmt.Errorf("download Debian's %s: it brought %d packages: %w", name, len(archives), err)
	}
	unpacked := filepath.Join(partial, "root")
	if _, err := said(ctx, partial, "dpkg-deb", "--extract", archives[0], unpacked); err != nil {
		return "", "", err
	}
	if version, err = said(ctx, partial, "dpkg-deb", "--field", archives[0], "Version"); err != nil {
		return "", "", err
	}
	if err := os.WriteFile(filepath.Join(unpacked, "version"), []byte(version), 0o644); err != nil {
		return "", "", fmt.Errorf("cache Debian's %s: %w", name, err)
	}
	if err := os.Rename(unpacked, dir); err != nil {
		return "", "", fmt.Errorf("cache Debian's %s: %w", name, err)
	}
	return dir, version, nil
}

// fetch downloads a package into dir. A fresh machine has no lists of packages
// yet, which root can mend.
func fetch(ctx context.Context, dir, name string) error {
	_, err := said(ctx, dir, "apt-get", "download", name)
	if err == nil {
		return nil
	}
	if os.Getuid() == 0 {
		if _, failed := said(ctx, dir, "apt-get", "update"); failed != nil {
			return errors.Join(err, failed)
		}
		_, err = said(ctx, dir, "apt-get", "download", name)
	}
	if err != nil {
		return fmt.Errorf("%w; mend it with: apt-get update && apt-get download %s", err, name)
	}
	return nil
}

// said runs a command in dir and returns what it says.
func said(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, tail(errs.String(), 2000))
	}
	return strings.TrimSpace(string(out)), nil
}

package rig

import (
	"context"
	"fmt"
	"os/exec"
	"syscall"
)

// Build builds programs of this repository, by their names under cmd, into dir,
// as a release has them. Nothing of it goes on once ctx has ended and Build has
// returned, and all that it wrote is in dir.
func Build(ctx context.Context, dir string, names ...string) error {
	root, err := Root()
	if err != nil {
		return err
	}
	args := []string{"build", "-buildvcs=false", "-trimpath", "-ldflags", "-s -w", "-o", dir + "/"}
	for _, name := range names {
		args = append(args, "./cmd/"+name)
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = root
	cmd.Env = append(cleanGoEnv(), "CGO_ENABLED=0", "GOTMPDIR="+dir)
	// Compilers are children of the go command, and end with it only if they are
	// killed together.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %v: %w: %s", names, err, tail(string(out), 2000))
	}
	return nil
}

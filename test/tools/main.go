// Command tools builds the real tools that the suites, the demo and the
// benchmark run: Traefik, CrowdSec, Yaegi and the linters; nginx and Prometheus it fetches. It sees to the Debian
// packages that the builds need, says what it builds and about how long that
// takes, and does nothing for what the cache already holds.
//
// Without arguments it builds them all; with arguments, those named.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/edgeward/edgeward/test/rig"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "tools:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, names []string) error {
	wanted, err := choose(names)
	if err != nil {
		return err
	}
	var missing []rig.ToolSpec
	var cost time.Duration
	for _, spec := range wanted {
		path, version, built, err := spec.Cached(ctx)
		if err != nil {
			return err
		}
		if built {
			fmt.Printf("tools: %s %s is cached: %s\n", spec.Name, version, path)
			continue
		}
		missing = append(missing, spec)
		cost += spec.CPU
	}
	// The race detector needs the compiler too, even where no tool is missing.
	if err := installPackages(ctx); err != nil {
		return err
	}
	if len(names) == 0 {
		for _, name := range []string{"nginx", "prometheus", "prometheus-alertmanager"} {
			dir, version, err := rig.Debian(ctx, name)
			if err != nil {
				return err
			}
			fmt.Printf("tools: %s %s of Debian is cached: %s\n", name, version, dir)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	fmt.Printf("tools: %d to build from source, about %s of processor time together, about half that on two idle cores; if cut, the next run resumes\n", len(missing), cost)
	for _, spec := range missing {
		_, err := spec.Build(ctx, func(format string, args ...any) {
			fmt.Printf("tools: "+format+"\n", args...)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func choose(names []string) ([]rig.ToolSpec, error) {
	all := rig.Tools()
	if len(names) == 0 {
		return all, nil
	}
	var known []string
	for _, spec := range all {
		known = append(known, spec.Name)
	}
	var chosen []rig.ToolSpec
	for _, name := range names {
		i := slices.Index(known, name)
		if i < 0 {
			return nil, fmt.Errorf("choose tools: %q is none of %s", name, strings.Join(known, ", "))
		}
		chosen = append(chosen, all[i])
	}
	return chosen, nil
}

// installPackages brings a fresh machine the Debian packages that the builds
// need: by itself as root, by telling what to do otherwise.
func installPackages(ctx context.Context) error {
	err := errors.Join(rig.CheckCompiler(ctx), rig.CheckPrograms())
	if err == nil || os.Getuid() != 0 {
		return err
	}
	if _, lookErr := exec.LookPath("apt-get"); lookErr != nil {
		return err
	}
	fmt.Println("tools: installing", strings.Join(rig.Packages, " "))
	install := append([]string{"install", "-y", "--no-install-recommends"}, rig.Packages...)
	for _, args := range [][]string{{"update"}, install} {
		cmd := exec.CommandContext(ctx, "apt-get", args...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("install Debian packages: apt-get %s: %w: %s", args[0], err, out)
		}
	}
	if err := errors.Join(rig.CheckCompiler(ctx), rig.CheckPrograms()); err != nil {
		return errors.Join(errors.New("install Debian packages: they did not bring what is needed"), err)
	}
	return nil
}

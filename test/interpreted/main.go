// Command interpreted runs packages' tests as Traefik would run the packages:
// interpreted by Yaegi, where 3-clause loops share their variable, half of the
// newer standard library is absent, and passing compiled proves nothing.
//
//	go run ./test/interpreted [-run R] [-bench R] [-v] ... [PACKAGE...]
//
// Its flags are those of go test; without a package it runs all that Traefik
// interprets, as this package's own test does. Left out are files marked
// //go:build !interpreted, external tests (package x_test), fuzz targets and
// examples. It exits with 0 only if every test of every package passed.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/edgeward/edgeward/internal/bundle"
	"github.com/edgeward/edgeward/test/rig"
)

// interpreted are the packages that run inside Traefik.
var interpreted = []string{"./internal/decision", "./internal/lapi", "./plugin"}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "interpreted:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("interpreted", flag.ContinueOnError)
	passed := []string{"test", "-timeout=10m"}
	for _, name := range []string{"run", "skip", "bench", "benchtime", "count", "cpu", "parallel", "timeout"} {
		flags.Func(name, "as in go test", func(value string) error {
			passed = append(passed, "-"+name+"="+value)
			return nil
		})
	}
	for _, name := range []string{"v", "short", "failfast", "benchmem"} {
		flags.BoolFunc(name, "as in go test", func(value string) error {
			passed = append(passed, "-"+name+"="+value)
			return nil
		})
	}
	if err := flags.Parse(args); err != nil {
		return err
	}
	packages := flags.Args()
	if len(packages) == 0 {
		packages = interpreted
	}
	interpreter, err := rig.Tool(ctx, "interpreter")
	if err != nil {
		return err
	}
	root, err := rig.Root()
	if err != nil {
		return err
	}
	var failed []string
	for _, pkg := range packages {
		began := time.Now()
		verdict := "ok  "
		if err := runPackage(ctx, os.Stdout, interpreter, root, pkg, passed); err != nil {
			fmt.Println(err)
			verdict = "FAIL"
			failed = append(failed, pkg)
		}
		fmt.Printf("%s\t%s (interpreted)\t%.3fs\n", verdict, pkg, time.Since(began).Seconds())
	}
	if len(failed) > 0 {
		return fmt.Errorf("test %s: failed", strings.Join(failed, " "))
	}
	return nil
}

// runPackage tests one package in a process and a GOPATH of its own, which write
// to out.
func runPackage(ctx context.Context, out io.Writer, interpreter, root, pkg string, args []string) error {
	gopath, err := os.MkdirTemp("", "edgeward-interpreted-")
	if err != nil {
		return fmt.Errorf("make a GOPATH: %w", err)
	}
	defer os.RemoveAll(gopath)
	if err := bundle.Assemble(ctx, root, gopath, bundle.Options{Packages: []string{pkg}, Tests: true}); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, interpreter, append(args, gopath, path.Join(rig.ModulePath, filepath.ToSlash(pkg)))...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("test %s: %w", pkg, err)
	}
	return nil
}

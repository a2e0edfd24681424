// Package rigtest starts the test bench for a test: what package rig returns as
// an error fails the test, what was started ends with the test, and the log of a
// real program is shown when the test fails. Suites call it; programs call
// package rig.
package rigtest

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/edgeward/edgeward/test/rig"
)

// shown is how much of a log a failed test prints, in bytes.
const shown = 8000

// LAPI starts a CrowdSec LAPI for the length of the test.
func LAPI(t testing.TB, opts rig.LAPIOptions) *rig.LAPI {
	t.Helper()
	// The test's own context ends before its cleanups run, which would end the
	// server before what else is cleaned up had finished with it.
	l, err := rig.StartLAPI(background(t), opts)
	if err != nil {
		t.Fatal(err)
	}
	cleanup(t, "crowdsec", l)
	return l
}

// Traefik starts a Traefik for the length of the test.
func Traefik(t testing.TB, opts rig.TraefikOptions) *rig.Traefik {
	t.Helper()
	tr, err := rig.StartTraefik(background(t), opts)
	if err != nil {
		t.Fatal(err)
	}
	cleanup(t, "traefik", tr)
	return tr
}

// Origin starts an origin for the length of the test.
func Origin(t testing.TB) *rig.Origin {
	t.Helper()
	o, err := rig.StartOrigin(background(t))
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// FakeLAPI starts a LAPI that injects faults for the length of the test.
func FakeLAPI(t testing.TB) *rig.FakeLAPI {
	t.Helper()
	f, err := rig.StartFakeLAPI(background(t))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// Nginx returns the path of Debian's nginx, which is downloaded if it must be.
func Nginx(t testing.TB) string {
	t.Helper()
	dir, _, err := rig.Debian(t.Context(), "nginx")
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "usr", "sbin", "nginx")
}

// Debian returns the path of a program of a Debian package, such as usr/bin/promtool
// of prometheus, which is downloaded if it must be.
func Debian(t testing.TB, name, program string) string {
	t.Helper()
	dir, _, err := rig.Debian(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, filepath.FromSlash(program))
}

// Tool returns the path of a built tool.
func Tool(t testing.TB, name string) string {
	t.Helper()
	path, err := rig.Tool(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// background returns a context that ends when the test's cleanups reach it: not
// before those registered after it.
func background(t testing.TB) context.Context {
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	t.Cleanup(cancel)
	return ctx
}

func cleanup(t testing.TB, name string, server interface {
	Log() string
	Close() error
}) {
	t.Cleanup(func() {
		if t.Failed() {
			log := server.Log()
			if len(log) > shown {
				log = "..." + log[len(log)-shown:]
			}
			t.Logf("%s logged:\n%s", name, log)
		}
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	})
}

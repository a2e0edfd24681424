package main

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/edgeward/edgeward/test/rig"
	"github.com/edgeward/edgeward/test/rig/rigtest"
)

const manifest = "displayName: x\ntype: middleware\nsummary: x\nimport: " + rig.ModulePath + "/plugin\ntestData: {name: x, list: \"a,b\"}\n"

// TestSelfCheck shows that a bundle which Traefik or the plugin catalog would
// reject is rejected here first.
func TestSelfCheck(t *testing.T) {
	rigtest.Tool(t, "interpreter")
	for _, test := range []struct {
		name     string
		manifest string
		body     string // of New
		want     string // in the error; empty: none
	}{
		{name: "good", body: `if c.Name != "x" || len(c.List) != 2 { return nil, errors.New("testData was not decoded") }; return next, nil`},
		{name: "New refuses testData", body: `return nil, errors.New("no such thing")`, want: "no such thing"},
		{name: "New panics", body: `panic("so it is")`, want: "so it is"},
		{name: "the handler does not call next", body: `return http.NotFoundHandler(), nil`, want: "status 404"},
		{name: "what the interpreter cannot run", body: `for range 10 { }; return next, nil`, want: "exit status"},
		{name: "no testData", manifest: strings.ReplaceAll(manifest, "testData", "data"), body: `return next, nil`, want: "testData"},
		{name: "a wrong type", manifest: strings.ReplaceAll(manifest, "middleware", "thing"), body: `return next, nil`, want: "type"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			root, out := t.TempDir(), t.TempDir()
			if test.manifest == "" {
				test.manifest = manifest
			}
			write(t, root, map[string]string{
				"go.mod":       "module " + rig.ModulePath + "\n\ngo 1.26.0\n",
				".traefik.yml": test.manifest,
				"LICENSE":      "x",
				"README.md":    "x",
				"plugin/plugin.go": `package plugin

import (
	"context"
	"errors"
	"net/http"
)

var _ = errors.New

type Config struct {
	Name string
	List []string
}

func CreateConfig() *Config { return &Config{} }

func New(ctx context.Context, next http.Handler, c *Config, name string) (http.Handler, error) {
	` + test.body + `
}
`,
			})
			// Twice: what an older bundle left must not matter.
			for range 2 {
				err := run(t.Context(), root, out)
				if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
					t.Errorf("error is %v, want one with %q", err, test.want)
				}
			}
		})
	}
}

// TestTraefikLoadsTheBundle lets the real Traefik judge the tree, vendored
// module included.
func TestTraefikLoadsTheBundle(t *testing.T) {
	t.Parallel()
	sums, err := os.ReadFile("../../go.sum")
	if err != nil {
		t.Fatal(err)
	}
	root, out := t.TempDir(), t.TempDir()
	write(t, root, map[string]string{
		"go.mod":       "module " + rig.ModulePath + "\n\ngo 1.26.0\n\nrequire golang.org/x/time v0.15.0\n",
		"go.sum":       string(sums),
		".traefik.yml": manifest,
		"LICENSE":      "x",
		"README.md":    "x",
		"internal/decision/decision.go": `// Package decision is a part of the miniature.
package decision

import "golang.org/x/time/rate"

var bucket = rate.NewLimiter(0, 1)

func Free() bool { return bucket.Allow() }
`,
		"plugin/plugin.go": `// Package plugin answers 403 to all requests but the first.
package plugin

import (
	"context"
	"net/http"

	"` + rig.ModulePath + `/internal/decision"
)

type Config struct {
	Name string
	List []string
}

func CreateConfig() *Config { return &Config{} }

func New(ctx context.Context, next http.Handler, c *Config, name string) (http.Handler, error) {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if decision.Free() {
			next.ServeHTTP(w, r)
			return
		}
		w.WriteHeader(403)
	}), nil
}
`,
	})
	if err := run(t.Context(), root, out); err != nil {
		t.Fatal(err)
	}
	origin := rigtest.Origin(t)
	traefik := rigtest.Traefik(t, rig.TraefikOptions{
		Bare:    true,
		Plugins: map[string]string{"edgeward": filepath.Join(out, "plugins-local", "src", filepath.FromSlash(rig.ModulePath))},
	})
	err = traefik.SetDynamic(t.Context(), `
http:
  routers: {all: {rule: "PathPrefix(`+"`/`"+`)", service: origin, middlewares: [ours]}}
  services: {origin: {loadBalancer: {servers: [{url: "`+origin.URL+`"}]}}}
  middlewares: {ours: {plugin: {edgeward: {name: x}}}}
`)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []int{200, 403, 403} {
		resp, err := http.Get(traefik.URL)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("request %d: status %d, want %d", i, resp.StatusCode, want)
		}
	}
}

func write(t *testing.T, root string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		path := filepath.Join(root, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

package rig

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// TestBuild builds a tool in miniature, in a repository in miniature.
func TestBuild(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "test", "mini")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(path, content string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	source := func(prints string) string {
		return "package main\n\nvar version string\n\nfunc main() { print(version, \" \", " + prints + ") }\n"
	}
	write(filepath.Join(root, "go.mod"), "module "+ModulePath+"\n\ngo 1.26.0\n")
	write(filepath.Join(dir, "go.mod"), "module example.org/mini\n\ngo 1.26.0\n\n// Pinned:\n// require example.org/real v0.9.0\nrequire example.org/real v1.2.3\n")
	write(filepath.Join(dir, "main.go"), source(`"one"`))
	t.Chdir(dir)
	cache := t.TempDir()
	t.Setenv("EDGEWARD_CACHE", cache)
	// What would bend the build must not reach it.
	t.Setenv("GOFLAGS", "-tags=nonsense -mod=vendor")
	t.Setenv("GOOS", "windows")
	mini := ToolSpec{Name: "mini", module: "mini", pkg: "example.org/mini", pinned: "example.org/real", ldflags: "-X main.version=%s"}

	var mu sync.Mutex
	var said []string
	say := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		said = append(said, fmt.Sprintf(format, args...))
	}
	cut, cancel := context.WithCancel(t.Context())
	cancel()
	for _, test := range []struct {
		name    string
		ctx     context.Context
		source  string
		builds  int
		prints  string
		wantErr string
	}{
		{"cut before it ends", cut, source(`"one"`), 0, "", "canceled"},
		{"first", t.Context(), source(`"one"`), 1, "v1.2.3 one", ""},
		{"again", t.Context(), source(`"one"`), 0, "v1.2.3 one", ""},
		{"changed", t.Context(), source(`"two"`), 1, "v1.2.3 two", ""},
		{"changed back", t.Context(), source(`"one"`), 0, "v1.2.3 one", ""},
		{"broken", t.Context(), source(`undefined`), 0, "", "undefined: undefined"},
	} {
		write(filepath.Join(dir, "main.go"), test.source)
		said = nil
		// Several at once, as the test binaries of several packages are.
		var builds sync.WaitGroup
		for range 3 {
			builds.Go(func() {
				path, err := mini.Build(test.ctx, say)
				if test.wantErr != "" {
					if err == nil || !strings.Contains(err.Error(), test.wantErr) {
						t.Errorf("%s: error is %v, want one with %q", test.name, err, test.wantErr)
					}
					return
				}
				if err != nil {
					t.Errorf("%s: %v", test.name, err)
					return
				}
				if !strings.HasPrefix(path, filepath.Join(cache, "edgeward", "tools", "mini-")) {
					t.Errorf("%s: path is %s", test.name, path)
				}
				if out, err := exec.CommandContext(test.ctx, path).CombinedOutput(); string(out) != test.prints {
					t.Errorf("%s: it prints %q, error %v, want %q", test.name, out, err, test.prints)
				}
			})
		}
		builds.Wait()
		if built := strings.Count(strings.Join(said, "\n"), "built in"); built != test.builds {
			t.Errorf("%s: %d builds, want %d: %q", test.name, built, test.builds, said)
		}
	}
}

// TestPins shows that every tool's version is pinned where it is looked for.
func TestPins(t *testing.T) {
	t.Setenv("EDGEWARD_CACHE", t.TempDir())
	want := map[string]string{"traefik": "v3.7.5", "crowdsec": "v1.7.6", "cscli": "v1.7.6", "interpreter": "v0.16.1"}
	for _, spec := range Tools() {
		_, version, built, err := spec.Cached(t.Context())
		if err != nil || built {
			t.Errorf("%s: built is %t, error %v, in an empty cache", spec.Name, built, err)
		}
		// The linters may move; what stands for production may not unnoticed.
		if pin, ok := want[spec.Name]; ok && version != pin {
			t.Errorf("%s: version is %s, want %s", spec.Name, version, pin)
		}
	}
	if _, err := Tool(t.Context(), "nonsense"); err == nil {
		t.Error("a tool that does not exist is found")
	}
}

package bundle_test

import (
	"archive/zip"
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/edgeward/edgeward/internal/bundle"
)

const module = "github.com/edgeward/edgeward"

// tree writes a repository in miniature, with the real one's go.sum.
func tree(t *testing.T, also map[string]string) string {
	t.Helper()
	root := t.TempDir()
	sums, err := os.ReadFile("../../go.sum")
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{
		"go.mod":       "module " + module + "\n\ngo 1.26.0\n\nrequire golang.org/x/time v0.15.0\n\nrequire github.com/google/go-cmp v0.7.0\n",
		"go.sum":       string(sums),
		"LICENSE":      "the license\n",
		"README.md":    "the readme\n",
		".traefik.yml": "displayName: x\nimport: " + module + "/plugin\ntestData: {}\n",
		"plugin/plugin.go": "// Package plugin is.\npackage plugin\n\nimport (\n\t_ \"golang.org/x/time/rate\"\n\t_ \"net/http\"\n\n\t\"" +
			module + "/internal/decision\"\n)\n\n// V is.\nvar V = decision.V\n",
		"plugin/plugin_test.go":          "package plugin\n",
		"plugin/marked_test.go":          "//go:build !interpreted\n\npackage plugin\n\nimport _ \"github.com/google/go-cmp/cmp\"\n",
		"plugin/external_test.go":        "package plugin_test\n",
		"plugin/testdata/sub/x":          "x",
		"plugin/other_windows.go":        "package plugin\n",
		"internal/decision/decision.go":  "package decision\n\n// V is.\nvar V = 1\n",
		"internal/decision/some_test.go": "package decision\n",
		"internal/stranger/stranger.go":  "package stranger\n",
	}
	for name, content := range also {
		files[name] = content
	}
	for name, content := range files {
		path := filepath.Join(root, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	var names []string
	err := fs.WalkDir(os.DirFS(dir), ".", func(name string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			names = append(names, name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

var shipped = []string{
	".traefik.yml",
	"LICENSE",
	"go.mod",
	"internal/decision/decision.go",
	"plugin/plugin.go",
	"vendor/golang.org/x/time/LICENSE",
	"vendor/golang.org/x/time/rate/rate.go",
	"vendor/golang.org/x/time/rate/sometimes.go",
	"vendor/modules.txt",
}

func sorted(lists ...[]string) []string {
	all := slices.Concat(lists...)
	slices.Sort(all)
	return all
}

func TestTrees(t *testing.T) {
	t.Parallel()
	root := tree(t, nil)
	for _, test := range []struct {
		name  string
		write func(dst string) error
		want  []string
	}{
		{
			name: "what Traefik loads",
			write: func(dst string) error {
				return bundle.Assemble(t.Context(), root, dst, bundle.Options{})
			},
			want: within("src/"+module, shipped),
		},
		{
			name:  "the catalog's",
			write: func(dst string) error { return bundle.Catalog(t.Context(), root, dst) },
			want:  sorted(shipped, []string{"README.md"}),
		},
		{
			name: "with tests",
			write: func(dst string) error {
				return bundle.Assemble(t.Context(), root, dst, bundle.Options{Tests: true})
			},
			want: within("src/"+module, sorted(shipped, []string{
				"internal/decision/some_test.go", "plugin/plugin_test.go", "plugin/testdata/sub/x",
			})),
		},
		{
			name: "one package",
			write: func(dst string) error {
				return bundle.Assemble(t.Context(), root, dst, bundle.Options{Packages: []string{"./internal/decision"}})
			},
			want: within("src/"+module, []string{".traefik.yml", "LICENSE", "go.mod", "internal/decision/decision.go"}),
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			dst := t.TempDir()
			if err := test.write(dst); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, names(t, dst)); diff != "" {
				t.Error("files (-want +got):\n" + diff)
			}
		})
	}
}

func within(prefix string, names []string) []string {
	var all []string
	for _, name := range names {
		all = append(all, prefix+"/"+name)
	}
	return all
}

// TestGoAcceptsTheTree lets Go judge that go.mod and vendor agree and that
// nothing is missing, with no network to make up for it.
func TestGoAcceptsTheTree(t *testing.T) {
	t.Parallel()
	dst := t.TempDir()
	if err := bundle.Catalog(t.Context(), tree(t, nil), dst); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "go", "vet", "./...")
	cmd.Dir = dst
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=vendor", "GOPROXY=off", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("go vet: %v: %s", err, out)
	}
}

func TestArchiveIsReproducible(t *testing.T) {
	t.Parallel()
	root := tree(t, nil)
	var archives [2]bytes.Buffer
	for i := range archives {
		dst := t.TempDir()
		if err := bundle.Assemble(t.Context(), root, dst, bundle.Options{}); err != nil {
			t.Fatal(err)
		}
		if err := bundle.Archive(&archives[i], dst, "plugins-local"); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(archives[0].Bytes(), archives[1].Bytes()) {
		t.Error("two archives of the same tree differ")
	}
	read, err := zip.NewReader(bytes.NewReader(archives[0].Bytes()), int64(archives[0].Len()))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, file := range read.File {
		got = append(got, file.Name)
	}
	if diff := cmp.Diff(within("plugins-local/src/"+module, shipped), got); diff != "" {
		t.Error("files (-want +got):\n" + diff)
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		also map[string]string
		opts bundle.Options
		want string
	}{
		{"no import in the manifest", map[string]string{".traefik.yml": "displayName: x\n"}, bundle.Options{}, "it has no import"},
		{"an import that is not there", map[string]string{".traefik.yml": "import: " + module + "/nowhere\n"}, bundle.Options{}, "nowhere"},
		{"a package that does not parse", map[string]string{"plugin/plugin.go": "package"}, bundle.Options{}, "plugin.go"},
		{"an embedded file", map[string]string{"plugin/embed.go": "package plugin\n\nimport _ \"embed\"\n\n//go:embed plugin.go\nvar s string\n"}, bundle.Options{}, "more than Go"},
		{"a test with imports that are not there", map[string]string{"plugin/plugin_test.go": "package plugin\n\nimport _ \"github.com/google/go-cmp/cmp\"\n"}, bundle.Options{Tests: true}, "!interpreted"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			err := bundle.Assemble(t.Context(), tree(t, test.also), t.TempDir(), test.opts)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error is %v, want one with %q", err, test.want)
			}
		})
	}
}

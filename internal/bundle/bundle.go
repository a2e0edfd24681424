// Package bundle gathers what Traefik loads as a plugin: the manifest, the
// middleware's packages and the modules that they import, as sources, because
// Traefik interprets them.
//
// Three shapes come of it: a GOPATH-like tree, which Traefik reads as
// plugins-local and an interpreter as GOPATH; the same in a reproducible
// archive, to unpack where Traefik runs; and the bare module with its vendor
// directory, which is what a release tag for the plugin catalog carries.
//
// It copies what the manifest's package imports, directly or not, and nothing
// else: which imports are allowed is for the repository's laws to say. It knows
// no interpreter and checks nothing by running it. The test bench and the
// bundle command call it.
package bundle

import (
	"archive/zip"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Options says what a tree holds beside what Traefik needs.
type Options struct {
	// Packages are the packages to gather instead of the one that the manifest
	// imports, in the form ./internal/decision. The manifest is then optional.
	Packages []string
	// Tests adds the packages' own tests and their testdata, as an interpreter
	// runs them: without the files marked //go:build !interpreted and without
	// external tests (package x_test), which interpreters do not know. A test
	// that imports more than the bundle holds is an error.
	Tests bool
}

// Assemble writes the tree to gopath/src/MODULE, where gopath is what Traefik
// calls plugins-local. root is the repository.
func Assemble(ctx context.Context, root, gopath string, opts Options) error {
	b, err := load(ctx, root, opts)
	if err != nil {
		return fmt.Errorf("assemble the plugin: %w", err)
	}
	if err := b.write(filepath.Join(gopath, "src", filepath.FromSlash(b.module)), opts); err != nil {
		return fmt.Errorf("assemble the plugin: %w", err)
	}
	return nil
}

// Catalog writes the module itself to dst: the tree of a release tag that the
// plugin catalog reads, which wants dependencies vendored and a README.
func Catalog(ctx context.Context, root, dst string) error {
	b, err := load(ctx, root, Options{})
	if err != nil {
		return fmt.Errorf("assemble the catalog's tree: %w", err)
	}
	if err := b.write(dst, Options{}); err != nil {
		return fmt.Errorf("assemble the catalog's tree: %w", err)
	}
	if err := copyFile(filepath.Join(dst, "README.md"), filepath.Join(root, "README.md")); err != nil {
		return fmt.Errorf("assemble the catalog's tree: %w", err)
	}
	return nil
}

// Archive writes every file below dir to a zip archive whose bytes depend on
// the files alone: sorted names below prefix, one fixed time, one mode.
func Archive(w io.Writer, dir, prefix string) error {
	archive := zip.NewWriter(w)
	// WalkDir goes in lexical order.
	err := filepath.WalkDir(dir, func(file string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, file)
		if err != nil {
			return err
		}
		header := &zip.FileHeader{
			Name:     path.Join(prefix, filepath.ToSlash(rel)),
			Method:   zip.Deflate,
			Modified: time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC), // the oldest time that the format knows
		}
		header.SetMode(0o644)
		data, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		out, err := archive.CreateHeader(header)
		if err != nil {
			return err
		}
		_, err = out.Write(data)
		return err
	})
	if err := errors.Join(err, archive.Close()); err != nil {
		return fmt.Errorf("archive %s: %w", dir, err)
	}
	return nil
}

// bundle is what go list says about the packages to gather.
type bundle struct {
	root      string
	module    string
	goVersion string
	packages  []goPackage // ours and other modules'; never the standard library's
}

type goPackage struct {
	ImportPath   string
	Dir          string
	Standard     bool
	GoFiles      []string
	CgoFiles     []string
	TestGoFiles  []string
	TestImports  []string
	Module       *goModule
	EmbedFiles   []string
	OtherSources []string `json:"SFiles"`
}

type goModule struct {
	Path      string
	Version   string
	Dir       string
	GoVersion string
	Main      bool
}

func load(ctx context.Context, root string, opts Options) (*bundle, error) {
	patterns := opts.Packages
	if len(patterns) == 0 {
		manifest, err := os.ReadFile(filepath.Join(root, ".traefik.yml"))
		if err != nil {
			return nil, fmt.Errorf("read the manifest: %w", err)
		}
		match := regexp.MustCompile(`(?m)^import:\s*["']?([^\s"']+)`).FindSubmatch(manifest)
		if match == nil {
			return nil, errors.New("read the manifest: it has no import")
		}
		patterns = []string{string(match[1])}
	}
	args := []string{"list", "-deps", "-json=ImportPath,Dir,Standard,GoFiles,CgoFiles,TestGoFiles,TestImports,Module,EmbedFiles,SFiles"}
	if opts.Tests {
		args = append(args, "-tags", "interpreted")
	}
	cmd := exec.CommandContext(ctx, "go", append(append(args, "--"), patterns...)...)
	cmd.Dir = root
	// No workspace, no flags and no C decide what a release holds.
	cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=-mod=readonly", "CGO_ENABLED=0")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("list the packages of %s: %w: %s", strings.Join(patterns, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	b := &bundle{root: root}
	for decoder := json.NewDecoder(&stdout); ; {
		var pkg goPackage
		if err := decoder.Decode(&pkg); err == io.EOF {
			break
		} else if err != nil {
			return nil, fmt.Errorf("read the list of packages: %w", err)
		}
		if pkg.Standard {
			continue
		}
		if n := len(pkg.CgoFiles) + len(pkg.EmbedFiles) + len(pkg.OtherSources); n > 0 {
			return nil, fmt.Errorf("gather %s: it holds more than Go, which no interpreter loads", pkg.ImportPath)
		}
		b.packages = append(b.packages, pkg)
		if pkg.Module.Main {
			b.module, b.goVersion = pkg.Module.Path, pkg.Module.GoVersion
		}
	}
	if b.module == "" {
		return nil, fmt.Errorf("gather %s: no package of the module in %s", strings.Join(patterns, " "), root)
	}
	return b, nil
}

// write lays the module out below dst.
func (b *bundle) write(dst string, opts Options) error {
	if err := os.MkdirAll(dst, 0o755); err != nil {
		return err
	}
	for _, name := range []string{".traefik.yml", "LICENSE"} {
		err := copyFile(filepath.Join(dst, name), filepath.Join(b.root, name))
		if err != nil && (len(opts.Packages) == 0 || !errors.Is(err, fs.ErrNotExist)) {
			return err
		}
	}
	modules := make(map[string]*goModule)
	vendored := make(map[string][]string) // packages by module
	for _, pkg := range b.packages {
		to := filepath.Join(dst, "vendor", filepath.FromSlash(pkg.ImportPath))
		if pkg.Module.Main {
			to = filepath.Join(dst, filepath.FromSlash(strings.TrimPrefix(pkg.ImportPath, b.module)))
		} else {
			modules[pkg.Module.Path] = pkg.Module
			vendored[pkg.Module.Path] = append(vendored[pkg.Module.Path], pkg.ImportPath)
		}
		files := pkg.GoFiles
		if opts.Tests && pkg.Module.Main {
			if err := b.checkTests(pkg); err != nil {
				return err
			}
			files = slices.Concat(files, pkg.TestGoFiles)
			testdata := filepath.Join(pkg.Dir, "testdata")
			if _, err := os.Stat(testdata); err == nil {
				if err := os.CopyFS(filepath.Join(to, "testdata"), os.DirFS(testdata)); err != nil {
					return err
				}
			}
		}
		for _, name := range files {
			if err := copyFile(filepath.Join(to, name), filepath.Join(pkg.Dir, name)); err != nil {
				return err
			}
		}
	}
	return b.writeModule(dst, modules, vendored)
}

// writeModule writes go.mod, and vendor/modules.txt in agreement with it, so
// that Go itself accepts the tree: the repository's own go.mod requires much
// that the plugin does not.
func (b *bundle) writeModule(dst string, modules map[string]*goModule, vendored map[string][]string) error {
	gomod := "module " + b.module + "\n\ngo " + b.goVersion + "\n"
	var list strings.Builder
	var paths []string
	for path := range modules {
		paths = append(paths, path)
	}
	slices.Sort(paths)
	for _, path := range paths {
		module := modules[path]
		gomod += "\nrequire " + path + " " + module.Version + "\n"
		fmt.Fprintf(&list, "# %s %s\n## explicit; go %s\n", path, module.Version, module.GoVersion)
		slices.Sort(vendored[path])
		for _, pkg := range vendored[path] {
			fmt.Fprintln(&list, pkg)
		}
		license := filepath.Join(dst, "vendor", filepath.FromSlash(path), "LICENSE")
		if err := copyFile(license, filepath.Join(module.Dir, "LICENSE")); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(dst, "go.mod"), []byte(gomod), 0o644); err != nil {
		return err
	}
	if list.Len() == 0 {
		return nil
	}
	return os.WriteFile(filepath.Join(dst, "vendor", "modules.txt"), []byte(list.String()), 0o644)
}

// checkTests refuses tests that could not even be loaded, with a word on how to
// mend it: the interpreter's own error names neither file nor reason.
func (b *bundle) checkTests(pkg goPackage) error {
	for _, imported := range pkg.TestImports {
		first, _, _ := strings.Cut(imported, "/")
		held := slices.ContainsFunc(b.packages, func(p goPackage) bool { return p.ImportPath == imported })
		if strings.Contains(first, ".") && !held {
			return fmt.Errorf("gather the tests of %s: they import %s, which no interpreter can load; mark the file //go:build !interpreted", pkg.ImportPath, imported)
		}
	}
	return nil
}

func copyFile(to, from string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o644)
}

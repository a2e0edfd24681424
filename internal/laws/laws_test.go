package laws

import (
	"bytes"
	"flag"
	"fmt"
	"go/ast"
	"go/build"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	module = "github.com/edgeward/edgeward"
	root   = "../.." // of the repository, from this package
)

var update = flag.Bool("update", false, "rewrite the lists that are derived from the Go installation")

// A law is one rule of the house.
type law struct {
	name  string // of its fixture, testdata/<name>.txt
	says  string
	judge func(tree) []violation
}

// constitution is every law there is.
var constitution = []law{
	{"imports", "edges import the core, never the reverse, and never each other", judgeImports},
	{"interpreted-imports", "what Traefik interprets imports next to nothing", judgeInterpretedImports},
	{"gates", "each foreign interface has one importing package", judgeGates},
	{"links", "the node agent does not link the tunnel's client", judgeLinks},
	{"gomod", "the root module stays free of Traefik, Yaegi and forks", judgeGoMod},
	{"toplevel", "the top level holds only what the map of the repository names", judgeTopLevel},
	{"packagedoc", "every package says what it is for", judgePackageDocs},
	{"names", "no package is a drawer, no type a manager", judgeNames},
	{"words", "the glossary's words, and no others, for what they name", judgeWords},
	{"machines", "nothing here knows the machine it was written on", judgeMachines},
	{"unfinished", "nothing is left for later, and no test skips", judgeUnfinished},
	{"dialect", "what Traefik interprets is written in what Yaegi understands", judgeDialect},
}

// A violation is one place where a law is broken.
type violation struct {
	path string
	line int // from 1
	says string
}

func (v violation) String() string { return fmt.Sprintf("%s:%d: %s", v.path, v.line, v.says) }

// A tree is the text of each file by its slash-separated path.
type tree map[string]string

// paths are the tree's files in order.
func (t tree) paths() []string {
	var all []string
	for p := range t {
		all = append(all, p)
	}
	slices.Sort(all)
	return all
}

func TestRepositoryKeepsTheLaws(t *testing.T) {
	repository := readRepository(t)
	for _, l := range constitution {
		t.Run(l.name, func(t *testing.T) {
			for _, v := range l.judge(repository) {
				t.Errorf("%s (%s)", v, l.says)
			}
		})
	}
}

// TestLawsBite runs each law on its fixture, an archive of files in which every
// line that breaks the law ends in "want: " and a part of what the law says of
// it (several parts are separated by " | "). All other lines are lawful.
func TestLawsBite(t *testing.T) {
	for _, l := range constitution {
		t.Run(l.name, func(t *testing.T) {
			fixture, err := os.ReadFile(filepath.Join("testdata", l.name+".txt"))
			if err != nil {
				t.Fatal(err)
			}
			files := parseArchive(string(fixture))
			want := map[string][]string{}
			for p, text := range files {
				for i, line := range strings.Split(text, "\n") {
					if _, parts, ok := strings.Cut(line, "want: "); ok {
						want[fmt.Sprintf("%s:%d", p, i+1)] = strings.Split(parts, " | ")
					}
				}
			}
			if len(want) == 0 {
				t.Fatal("the fixture breaks nothing: it cannot show that the law bites")
			}
			got := map[string][]string{}
			for _, v := range l.judge(files) {
				at := fmt.Sprintf("%s:%d", v.path, v.line)
				says := v.says
				for _, part := range want[at] {
					if strings.Contains(says, part) {
						says = part
						break
					}
				}
				got[at] = append(got[at], says)
			}
			for _, parts := range want {
				slices.Sort(parts)
			}
			for _, parts := range got {
				slices.Sort(parts)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("violations (-want +got):\n%s", diff)
			}
		})
	}
}

// readRepository reads the files that belong to the repository: those that git
// keeps and those that it would keep when told to.
func readRepository(t *testing.T) tree {
	t.Helper()
	// A clone may belong to someone else than who tests it, as in a container.
	list := exec.Command("git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	list.Dir = root
	list.Stderr = os.Stderr
	out, err := list.Output()
	if err != nil {
		t.Fatalf("list the repository's files (the laws need git and a clone: apt-get install git): %v", err)
	}
	files := tree{}
	for p := range strings.SplitSeq(strings.TrimSuffix(string(out), "\x00"), "\x00") {
		text, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(p)))
		if os.IsNotExist(err) {
			continue // deleted, and git not yet told
		}
		if err != nil {
			t.Fatal(err)
		}
		files[p] = string(text)
	}
	if len(files) == 0 {
		t.Fatal("git lists no files: the laws would judge nothing")
	}
	return files
}

// parseArchive reads files that stand one after the other, each under a line
// "-- path --". What comes before the first is a remark.
func parseArchive(text string) tree {
	files := tree{}
	name := ""
	for line := range strings.Lines(text) {
		if p, ok := strings.CutPrefix(strings.TrimSpace(line), "-- "); ok && strings.HasSuffix(p, " --") {
			name = strings.TrimSuffix(p, " --")
			files[name] = ""
		} else if name != "" {
			files[name] += line
		}
	}
	return files
}

// A goFile is one parsed source file of the root module.
type goFile struct {
	path   string
	dir    string // "." for the root
	test   bool
	fset   *token.FileSet
	syntax *ast.File
}

func (f *goFile) at(pos token.Pos, format string, args ...any) violation {
	return violation{f.path, f.fset.Position(pos).Line, fmt.Sprintf(format, args...)}
}

// imports are the file's imports, unquoted, in order.
func (f *goFile) imports() []goImport {
	var all []goImport
	for _, spec := range f.syntax.Imports {
		all = append(all, goImport{strings.Trim(spec.Path.Value, "\"`"), spec.Pos()})
	}
	return all
}

type goImport struct {
	path string
	pos  token.Pos
}

// goFiles parses the Go files of the root module; what does not parse is a
// violation. Nested modules and testdata are left out, as the go command does.
func goFiles(t tree) ([]*goFile, []violation) {
	var files []*goFile
	var bad []violation
	fset := token.NewFileSet()
	for _, p := range t.paths() {
		if !strings.HasSuffix(p, ".go") || !t.inRootModule(p) {
			continue
		}
		syntax, err := parser.ParseFile(fset, p, t[p], parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			bad = append(bad, violation{p, 1, fmt.Sprintf("does not parse: %v", err)})
			continue
		}
		files = append(files, &goFile{p, path.Dir(p), strings.HasSuffix(p, "_test.go"), fset, syntax})
	}
	return files, bad
}

// inRootModule says whether the go command, run at the root, would see p.
func (t tree) inRootModule(p string) bool {
	for dir := path.Dir(p); dir != "."; dir = path.Dir(dir) {
		base := path.Base(dir)
		if base == "testdata" || base == "vendor" || strings.HasPrefix(base, ".") || strings.HasPrefix(base, "_") {
			return false
		}
		if _, nested := t[dir+"/go.mod"]; nested {
			return false
		}
	}
	return true
}

// isInterpreted says whether Yaegi ever sees f: not where its build tags or its
// name keep it out, and not as an external test.
func (t tree) isInterpreted(f *goFile) bool {
	if _, ok := interpreted[f.dir]; !ok || strings.HasSuffix(f.syntax.Name.Name, "_test") {
		return false
	}
	p := f.path
	ctxt := build.Default
	ctxt.BuildTags = []string{"interpreted"}
	ctxt.OpenFile = func(string) (io.ReadCloser, error) {
		text, ok := t[p]
		if !ok {
			return nil, fs.ErrNotExist
		}
		return io.NopCloser(bytes.NewReader([]byte(text))), nil
	}
	match, err := ctxt.MatchFile(path.Dir(p), path.Base(p))
	return err != nil || match
}

// top is the first element of a path.
func top(p string) string {
	first, _, _ := strings.Cut(p, "/")
	return first
}

// under says whether p is dir or within it.
func under(p, dir string) bool { return p == dir || strings.HasPrefix(p, dir+"/") }

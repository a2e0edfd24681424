package laws

import (
	"go/ast"
	"path"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"
)

// topLevel is all that the root of the repository may hold.
var topLevel = []string{
	".ci", ".editorconfig", ".gitignore", ".traefik.yml",
	"ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "SECURITY.md",
	"bouncer", "cmd", "deploy", "docs", "go.mod", "go.sum", "internal", "plugin", "test", "tunnel",
}

func judgeTopLevel(t tree) []violation {
	var bad []violation
	for _, p := range t.paths() {
		if !slices.Contains(topLevel, top(p)) {
			bad = append(bad, violation{p, 1, "the top level has no place for " + top(p)})
		}
	}
	return bad
}

// docLength is what a package doc of substance does not fall short of: two or
// three sentences, in bytes.
const docLength = 160

func judgePackageDocs(t tree) []violation {
	files, bad := goFiles(t)
	packages := map[string]*goFile{} // first file that is no test, or first
	docs := map[string]string{}
	for _, f := range files {
		if p := packages[f.dir]; p == nil || p.test && !f.test {
			packages[f.dir] = f
		}
		if f.syntax.Doc != nil && len(f.syntax.Doc.Text()) > len(docs[f.dir]) {
			docs[f.dir] = f.syntax.Doc.Text()
		}
	}
	for _, f := range files {
		if packages[f.dir] != f {
			continue
		}
		name, doc := f.syntax.Name.Name, docs[f.dir]
		switch {
		case doc == "":
			bad = append(bad, f.at(f.syntax.Package, "package %s has no doc: what is it for, what does it refuse, who calls it?", name))
		case name != "main" && !strings.HasPrefix(doc, "Package "+name+" "):
			bad = append(bad, f.at(f.syntax.Package, "the doc of package %s does not begin with its name", name))
		case len(doc) < docLength:
			bad = append(bad, f.at(f.syntax.Package, "the doc of package %s is too short to say what it is for, what it refuses and who calls it", name))
		}
	}
	return bad
}

var drawers = regexp.MustCompile(`^(utils?|helpers?|commons?|misc|shared)$`)

func judgeNames(t tree) []violation {
	files, bad := goFiles(t)
	for _, f := range files {
		if name := strings.TrimSuffix(f.syntax.Name.Name, "_test"); drawers.MatchString(name) {
			bad = append(bad, f.at(f.syntax.Name.Pos(), "package %s is a drawer: name it after what it does", name))
		} else if drawers.MatchString(path.Base(f.dir)) {
			bad = append(bad, f.at(f.syntax.Name.Pos(), "directory %s is a drawer: name it after what it holds", f.dir))
		}
		for _, decl := range f.syntax.Decls {
			gen, ok := decl.(*ast.GenDecl)
			if !ok {
				continue
			}
			for _, spec := range gen.Specs {
				if typ, ok := spec.(*ast.TypeSpec); ok && strings.HasSuffix(strings.ToLower(typ.Name.Name), "manager") {
					bad = append(bad, f.at(typ.Pos(), "type %s: say what it does instead", typ.Name.Name))
				}
			}
		}
	}
	return bad
}

var colours = regexp.MustCompile(`(?i)(black|white)[-_ ]?list|\bmasters?\b|\bslaves?\b`)

func judgeWords(t tree) []violation {
	return judgeLines(t, colours, "%q is not a word of ours: it is a ban, an allowlist, a primary, a replica")
}

// machines matches home and work directories, and the hosts that packages are
// fetched from: where they come from is the machine's business.
var machines = regexp.MustCompile(`(^|[^\w.}/-])/([r]oot\b|[w]ork\b|home/\w+|Users/\w+)` +
	`|\b(proxy|sum)\.golang\.org\b|\bgoproxy\.\w+|\bdeb\.debian\.org\b|\bregistry\.npmjs\.org\b|\bregistry\.yarnpkg\.com\b|[\w-]+\.pkg\.dev\b`)

func judgeMachines(t tree) []violation {
	return judgeLines(t, machines, "%q belongs to one machine")
}

// judgeLines reports every line of the repository's own text that matches.
func judgeLines(t tree, pattern *regexp.Regexp, says string) []violation {
	var bad []violation
	for _, p := range t.paths() {
		// Others wrote the licence and name the modules; the fixtures of the
		// laws break them on purpose.
		if p == "LICENSE" || path.Base(p) == "go.sum" || path.Base(p) == "go.mod" || under(p, "internal/laws/testdata") || !utf8.ValidString(t[p]) {
			continue
		}
		for i, line := range strings.Split(t[p], "\n") {
			if found := pattern.FindString(line); found != "" {
				bad = append(bad, violation{p, i + 1, strings.Replace(says, "%q", `"`+strings.TrimSpace(found)+`"`, 1)})
			}
		}
	}
	return bad
}

var later = regexp.MustCompile(`\b(TODO|FIXME|XXX|HACK)\b|\bfor now\b`)

func judgeUnfinished(t tree) []violation {
	files, bad := goFiles(t)
	for _, f := range files {
		for _, group := range f.syntax.Comments {
			for _, c := range group.List {
				for i, line := range strings.Split(c.Text, "\n") {
					if found := later.FindString(line); found != "" {
						v := f.at(c.Pos(), "%q: finish it, or say plainly what is not done", found)
						v.line += i
						bad = append(bad, v)
					}
				}
			}
		}
		if !f.test {
			continue
		}
		ast.Inspect(f.syntax, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			method, ok := call.Fun.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			on, ok := method.X.(*ast.Ident)
			if ok && slices.Contains([]string{"t", "b", "f", "tb"}, on.Name) {
				switch method.Sel.Name {
				case "Skip", "Skipf", "SkipNow":
					bad = append(bad, f.at(call.Pos(), "a test that skips proves nothing: fail, and say how to mend it"))
				}
			}
			return true
		})
	}
	return bad
}

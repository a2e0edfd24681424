package laws

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"go/ast"
	"go/importer"
	"go/token"
	"go/types"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The dialect is what Yaegi v0.16.1, which every Traefik 3 carries, runs as the
// Go compiler would: most of Go 1.22 and of its standard library. Each check
// below names something that it refuses, or worse, runs differently.
var dialect = []func(*unit) []violation{
	checkImports,
	checkSymbols,
	checkRanges,
	checkMisread,
	checkLoopVariables,
	checkMarshalers,
	checkGoroutines,
}

// A unit is one type-checked package with its tests, as Yaegi sees them.
type unit struct {
	files []*goFile
	info  *types.Info
}

func judgeDialect(t tree) []violation {
	all, bad := goFiles(t)
	var files []*goFile
	for _, f := range all {
		if t.isInterpreted(f) {
			files = append(files, f)
		}
	}
	c := checker{files: files, packages: map[string]*types.Package{}, loading: map[string]bool{}}
	if err := c.loadForeign(); err != nil {
		return append(bad, violation{"go.mod", 1, err.Error()})
	}
	for _, dir := range slices.Sorted(maps.Keys(interpreted)) {
		u, broken := c.unit(dir)
		bad = append(bad, broken...)
		for _, check := range dialect {
			bad = append(bad, check(u)...)
		}
	}
	return bad
}

// A checker type-checks packages of a tree. Their own imports come from the
// tree, all others as the go command compiled them.
type checker struct {
	files    []*goFile // those that are interpreted
	foreign  types.Importer
	packages map[string]*types.Package // of the tree, without tests, by import path
	loading  map[string]bool
}

// exports are the compiled packages that the go command has been asked for, by
// import path: the file with their export data.
var exports = map[string]string{}

func (c *checker) loadForeign() error {
	missing := map[string]bool{}
	for _, f := range c.files {
		for _, imp := range f.imports() {
			if !under(imp.path, module) && exports[imp.path] == "" && imp.path != "unsafe" && imp.path != "C" {
				missing[imp.path] = true
			}
		}
	}
	if len(missing) > 0 {
		list := exec.Command("go", append([]string{"list", "-export", "-f", "{{.ImportPath}} {{.Export}}"}, slices.Sorted(maps.Keys(missing))...)...)
		list.Dir = root
		var stderr bytes.Buffer
		list.Stderr = &stderr
		out, err := list.Output()
		if err != nil {
			return fmt.Errorf("compile what the dialect imports: %v: %s", err, bytes.TrimSpace(stderr.Bytes()))
		}
		for line := range strings.Lines(string(out)) {
			p, file, _ := strings.Cut(strings.TrimSpace(line), " ")
			exports[p] = file
		}
	}
	c.foreign = importer.ForCompiler(token.NewFileSet(), "gc", func(p string) (io.ReadCloser, error) {
		if exports[p] == "" {
			return nil, fmt.Errorf("no compiled package %s", p)
		}
		return os.Open(exports[p])
	})
	return nil
}

// Import is types.Importer.
func (c *checker) Import(p string) (*types.Package, error) {
	dir, ours := strings.CutPrefix(p, module+"/")
	if !ours {
		return c.foreign.Import(p)
	}
	if pkg := c.packages[p]; pkg != nil {
		return pkg, nil
	}
	if c.loading[p] {
		return nil, errors.New("import cycle")
	}
	c.loading[p] = true
	var files []*ast.File
	for _, f := range c.files {
		if f.dir == dir && !f.test {
			files = append(files, f.syntax)
		}
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("no package in %s", dir)
	}
	conf := types.Config{Importer: c, Error: func(error) {}}
	pkg, _ := conf.Check(p, c.files[0].fset, files, nil) // its own unit reports the errors
	c.packages[p] = pkg
	return pkg, nil
}

// unit type-checks the package in dir with its tests.
func (c *checker) unit(dir string) (*unit, []violation) {
	u := &unit{info: &types.Info{
		Defs:  map[*ast.Ident]types.Object{},
		Uses:  map[*ast.Ident]types.Object{},
		Types: map[ast.Expr]types.TypeAndValue{},
	}}
	var syntax []*ast.File
	for _, f := range c.files {
		if f.dir == dir {
			u.files = append(u.files, f)
			syntax = append(syntax, f.syntax)
		}
	}
	var bad []violation
	if len(u.files) == 0 {
		return u, nil
	}
	fset := u.files[0].fset
	conf := types.Config{Importer: c, Error: func(err error) {
		if e, ok := errors.AsType[types.Error](err); ok && !e.Soft {
			at := fset.Position(e.Pos)
			bad = append(bad, violation{at.Filename, at.Line, "does not compile: " + e.Msg})
		}
	}}
	_, _ = conf.Check(module+"/"+dir, fset, syntax, u.info) // the errors are in bad
	return u, bad
}

// unread are packages that Yaegi does not hand to a plugin, or that Traefik
// hands only to one that its user has declared unsafe.
var unread = []string{"C", "embed", "iter", "maps", "os/exec", "plugin", "structs", "syscall", "unique", "unsafe", "weak"}

func checkImports(u *unit) []violation {
	var bad []violation
	for _, f := range u.files {
		for _, imp := range f.imports() {
			if slices.Contains(unread, imp.path) {
				bad = append(bad, f.at(imp.pos, "a plugin cannot import %s", imp.path))
			}
		}
		for _, group := range f.syntax.Comments {
			for _, c := range group.List {
				if strings.HasPrefix(c.Text, "//go:embed") {
					bad = append(bad, f.at(c.Pos(), "Yaegi embeds no files: write the text into a constant"))
				}
			}
		}
	}
	return bad
}

// unspoken says of a symbol of Go 1.22, keyed as by symbolKey, why not to use
// it; an empty string means that it may be used.
func unspoken(key string) string {
	pkg, name, _ := cutSymbol(key)
	switch {
	case pkg == "slices" && !slices.Contains([]string{"Contains", "ContainsFunc", "EqualFunc", "Index", "IndexFunc"}, name),
		pkg == "cmp" && name != "Compare" && name != "Less" && name != "Ordered":
		return "Yaegi cannot infer its type parameters or lacks it"
	case key == "sync/atomic.Pointer":
		return "Yaegi lacks it: use atomic.Value"
	case pkg == "sync" && strings.HasPrefix(name, "Once") && name != "Once":
		return "use sync.Once"
	case key == "errors.As":
		return "it fails on interpreted error types: compare with errors.Is, or assert"
	}
	return ""
}

func checkSymbols(u *unit) []violation {
	late := map[string]bool{}
	for line := range strings.Lines(afterGo122) {
		late[strings.TrimSpace(line)] = true
	}
	var bad []violation
	for _, f := range u.files {
		ast.Inspect(f.syntax, func(n ast.Node) bool {
			id, ok := n.(*ast.Ident)
			if !ok {
				return true
			}
			obj := u.info.Uses[id]
			if b, ok := obj.(*types.Builtin); ok && slices.Contains([]string{"min", "max", "clear"}, b.Name()) {
				bad = append(bad, f.at(id.Pos(), "Yaegi has no builtin %s", b.Name()))
				return true
			}
			key := symbolKey(obj)
			if key == "" {
				return true
			}
			if why := unspoken(key); why != "" {
				bad = append(bad, f.at(id.Pos(), "%s: %s", key, why))
			} else if late[key] {
				bad = append(bad, f.at(id.Pos(), "%s came after Go 1.22, the last that Yaegi knows", key))
			}
			return true
		})
	}
	return bad
}

// symbolKey is path.Name of a symbol of the standard library, or
// path.Type.Name of a method or field; empty for all else.
func symbolKey(obj types.Object) string {
	if obj == nil || obj.Pkg() == nil || !standard(obj.Pkg().Path()) {
		return ""
	}
	if owner := ownerOf(obj); owner != "" {
		return obj.Pkg().Path() + "." + owner + "." + obj.Name()
	}
	if obj.Parent() != obj.Pkg().Scope() {
		return "" // a package name, or a parameter
	}
	return obj.Pkg().Path() + "." + obj.Name()
}

// ownerOf is the name of the type whose method or field obj is.
func ownerOf(obj types.Object) string {
	switch obj := obj.(type) {
	case *types.Func:
		recv := obj.Signature().Recv()
		if recv == nil {
			return ""
		}
		typ := recv.Type()
		if p, ok := typ.(*types.Pointer); ok {
			typ = p.Elem()
		}
		if named, ok := typ.(*types.Named); ok {
			return named.Obj().Name()
		}
	case *types.Var:
		if !obj.IsField() {
			return ""
		}
		for _, name := range obj.Pkg().Scope().Names() {
			typ, ok := obj.Pkg().Scope().Lookup(name).(*types.TypeName)
			if !ok {
				continue
			}
			if s, ok := typ.Type().Underlying().(*types.Struct); ok {
				for field := range s.Fields() {
					if field == obj {
						return name
					}
				}
			}
		}
	}
	return ""
}

// cutSymbol splits a key into package, symbol and, for methods and fields,
// member.
func cutSymbol(key string) (pkg, name, member string) {
	slash := strings.LastIndex(key, "/") + 1
	pkg, name, _ = strings.Cut(key[slash:], ".")
	name, member, _ = strings.Cut(name, ".")
	return key[:slash] + pkg, name, member
}

func checkRanges(u *unit) []violation {
	var bad []violation
	for _, f := range u.files {
		ast.Inspect(f.syntax, func(n ast.Node) bool {
			loop, ok := n.(*ast.RangeStmt)
			if !ok {
				return true
			}
			over := u.info.TypeOf(loop.X)
			if over == nil {
				return true
			}
			switch over := over.Underlying().(type) {
			case *types.Basic:
				if over.Info()&types.IsInteger != 0 {
					bad = append(bad, f.at(loop.Pos(), "Yaegi panics on a range over an integer: count"))
				}
			case *types.Signature:
				bad = append(bad, f.at(loop.Pos(), "Yaegi does not range over functions"))
			}
			return true
		})
	}
	return bad
}

// checkMisread reports what Yaegi reads as something else: select statements,
// whose cases all goroutines share; parameters without a name in a literal that
// has a result, which end up in each other's places; and nil in a list of
// assigned values, which panics.
func checkMisread(u *unit) []violation {
	var bad []violation
	for _, f := range u.files {
		ast.Inspect(f.syntax, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.SelectStmt:
				bad = append(bad, f.at(n.Pos(), "Yaegi shares the cases of a select among goroutines: wait for one channel, such as a context's"))
			case *ast.FuncLit:
				if n.Type.Results == nil {
					return true
				}
				for _, p := range n.Type.Params.List {
					if len(p.Names) == 0 {
						bad = append(bad, f.at(p.Pos(), "Yaegi misplaces the parameters of a literal that does not name them: call them _"))
						break
					}
				}
			case *ast.AssignStmt:
				if len(n.Rhs) < 2 {
					return true
				}
				for _, value := range n.Rhs {
					if name, ok := value.(*ast.Ident); ok && name.Name == "nil" {
						bad = append(bad, f.at(value.Pos(), "Yaegi panics on nil in a list of assigned values: one assignment a line"))
					}
				}
			}
			return true
		})
	}
	return bad
}

// checkLoopVariables reports what would tell a loop variable that each turn
// makes anew, as compiled, from one that all turns share, as interpreted: a
// closure or a pointer that may outlive the turn. A copy in the body is
// lawful, and so is a closure that is called before the turn ends.
func checkLoopVariables(u *unit) []violation {
	var bad []violation
	for _, f := range u.files {
		variables := map[types.Object]ast.Node{} // loop variable: its loop
		var stack []ast.Node
		ast.Inspect(f.syntax, func(n ast.Node) bool {
			if n == nil {
				stack = stack[:len(stack)-1]
				return true
			}
			stack = append(stack, n)
			switch n := n.(type) {
			case *ast.ForStmt:
				if init, ok := n.Init.(*ast.AssignStmt); ok && init.Tok == token.DEFINE {
					for _, v := range init.Lhs {
						if id, ok := v.(*ast.Ident); ok {
							variables[u.info.Defs[id]] = n
						}
					}
				}
			case *ast.RangeStmt:
				if n.Tok == token.DEFINE {
					for _, v := range []ast.Expr{n.Key, n.Value} {
						if id, ok := v.(*ast.Ident); ok && id.Name != "_" {
							variables[u.info.Defs[id]] = n
						}
					}
				}
			case *ast.Ident:
				obj := u.info.Uses[n]
				loop := variables[obj]
				if obj == nil || loop == nil {
					return true
				}
				if pointedAt(u, stack) {
					bad = append(bad, f.at(n.Pos(), "a pointer to loop variable %s: all turns share it when interpreted, so copy it first", n.Name))
				}
				for i := len(stack) - 1; stack[i] != loop; i-- {
					if _, ok := stack[i].(*ast.FuncLit); ok && !calledAtOnce(u, f, stack[:i+1]) {
						bad = append(bad, f.at(n.Pos(), "a closure over loop variable %s: all turns share it when interpreted, so copy it first", n.Name))
						break
					}
				}
			}
			return true
		})
	}
	return bad
}

// pointedAt says whether the address of the variable that ends the stack, or
// of a part of it, is taken.
func pointedAt(u *unit, stack []ast.Node) bool {
	for i := len(stack) - 1; i > 0; i-- {
		if expr, ok := stack[i].(ast.Expr); ok {
			if _, ptr := typeOf(u, expr).(*types.Pointer); ptr {
				return false
			}
			if _, slice := typeOf(u, expr).(*types.Slice); slice {
				if _, indexed := stack[i-1].(*ast.IndexExpr); indexed {
					return false // the element lives elsewhere
				}
			}
		}
		switch parent := stack[i-1].(type) {
		case *ast.ParenExpr:
		case *ast.SelectorExpr:
			if parent.X != stack[i] {
				return false
			}
		case *ast.IndexExpr:
			if parent.X != stack[i] {
				return false
			}
		case *ast.UnaryExpr:
			return parent.Op == token.AND
		default:
			return false
		}
	}
	return false
}

func typeOf(u *unit, expr ast.Expr) types.Type {
	if t := u.info.TypeOf(expr); t != nil {
		return t.Underlying()
	}
	return nil
}

// calledAtOnce says whether the function literal that ends the stack is done
// with when the statement that holds it is: called on the spot, given to a
// search or a sort of the standard library, or the body of a subtest.
func calledAtOnce(u *unit, f *goFile, stack []ast.Node) bool {
	lit := stack[len(stack)-1].(*ast.FuncLit)
	call, ok := stack[len(stack)-2].(*ast.CallExpr)
	if !ok {
		return false
	}
	switch stack[len(stack)-3].(type) {
	case *ast.GoStmt, *ast.DeferStmt:
		return false
	}
	if call.Fun == lit {
		return true
	}
	callee := calledFunc(u, call)
	if callee == nil || callee.Pkg() == nil {
		return false
	}
	switch callee.Pkg().Path() {
	case "bytes", "slices", "sort", "strings":
		return true
	case "testing":
		return f.test && callee.Name() == "Run" && !callsParallel(lit)
	}
	return false
}

// calledFunc is the declared function or method that a call calls, if it
// calls one.
func calledFunc(u *unit, call *ast.CallExpr) *types.Func {
	var id *ast.Ident
	switch fun := ast.Unparen(call.Fun).(type) {
	case *ast.Ident:
		id = fun
	case *ast.SelectorExpr:
		id = fun.Sel
	default:
		return nil
	}
	f, _ := u.info.Uses[id].(*types.Func)
	return f
}

func callsParallel(lit *ast.FuncLit) bool {
	found := false
	ast.Inspect(lit, func(n ast.Node) bool {
		if sel, ok := n.(*ast.SelectorExpr); ok && sel.Sel.Name == "Parallel" {
			found = true
		}
		return !found
	})
	return found
}

func checkMarshalers(u *unit) []violation {
	var bad []violation
	for _, f := range u.files {
		for _, decl := range f.syntax.Decls {
			fn, ok := decl.(*ast.FuncDecl)
			if ok && fn.Recv != nil && (fn.Name.Name == "MarshalJSON" || fn.Name.Name == "UnmarshalJSON") {
				bad = append(bad, f.at(fn.Name.Pos(), "encoding/json never calls an interpreted %s, and does not say so", fn.Name.Name))
			}
		}
	}
	return bad
}

// checkGoroutines reports goroutines that do not begin by deferring a recover:
// a panic in one ends Traefik. A test may well end.
func checkGoroutines(u *unit) []violation {
	bodies := map[types.Object]*ast.BlockStmt{}
	for _, f := range u.files {
		for _, decl := range f.syntax.Decls {
			if fn, ok := decl.(*ast.FuncDecl); ok {
				bodies[u.info.Defs[fn.Name]] = fn.Body
			}
		}
	}
	bodyOf := func(fun ast.Expr) *ast.BlockStmt {
		switch fun := ast.Unparen(fun).(type) {
		case *ast.FuncLit:
			return fun.Body
		case *ast.Ident:
			return bodies[u.info.Uses[fun]]
		case *ast.SelectorExpr:
			return bodies[u.info.Uses[fun.Sel]]
		}
		return nil
	}
	recovers := func(fun ast.Expr) bool {
		if typ, ok := u.info.TypeOf(fun).(*types.Named); ok && symbolKey(typ.Obj()) == "context.CancelFunc" {
			return true // compiled, and never panics
		}
		body := bodyOf(fun)
		if body == nil || len(body.List) == 0 {
			return false
		}
		first, ok := body.List[0].(*ast.DeferStmt)
		if !ok {
			return false
		}
		rescue := bodyOf(first.Call.Fun)
		return rescue != nil && callsRecover(u, rescue)
	}
	var bad []violation
	for _, f := range u.files {
		if f.test {
			continue
		}
		ast.Inspect(f.syntax, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.GoStmt:
				if !recovers(n.Call.Fun) {
					bad = append(bad, f.at(n.Pos(), "a goroutine whose first statement does not defer a recover: its panic would end Traefik"))
				}
			case *ast.CallExpr:
				callee := calledFunc(u, n)
				if callee == nil || len(n.Args) == 0 {
					return true
				}
				if key := symbolKey(callee); (key == "time.AfterFunc" || key == "context.AfterFunc") && !recovers(n.Args[1]) {
					bad = append(bad, f.at(n.Pos(), "%s runs a goroutine whose first statement does not defer a recover: its panic would end Traefik", key))
				}
			}
			return true
		})
	}
	return bad
}

// callsRecover says whether the body calls recover itself: in a function
// further in, it would recover nothing.
func callsRecover(u *unit, body *ast.BlockStmt) bool {
	found := false
	ast.Inspect(body, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncLit:
			return false
		case *ast.Ident:
			if b, ok := u.info.Uses[n].(*types.Builtin); ok && b.Name() == "recover" {
				found = true
			}
		}
		return !found
	})
	return found
}

// afterGo122 lists the symbols that the standard library gained after Go 1.22,
// one key a line, under a line with the last release that it covers. It is
// kept here because a Go that the go command fetched by itself lacks the lists
// it comes from.
//
//go:embed testdata/after-go1.22.list
var afterGo122 string

// TestAfterGo122IsCurrent keeps the list abreast of the Go that this module
// asks for. To write it anew: go test ./internal/laws -run AfterGo122 -update,
// with a Go installed from an archive of go.dev, which has api/ in it.
func TestAfterGo122IsCurrent(t *testing.T) {
	mod, err := os.ReadFile(filepath.Join(root, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	release := regexp.MustCompile(`(?m)^go (1\.\d+)`).FindStringSubmatch(string(mod))
	if release == nil {
		t.Fatal("go.mod names no Go release")
	}
	if *update {
		list := "# after Go 1.22, up to Go " + release[1] + "\n" + strings.Join(readAPI(t), "\n") + "\n"
		if err := os.WriteFile("testdata/after-go1.22.list", []byte(list), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if head, _, _ := strings.Cut(afterGo122, "\n"); !strings.HasSuffix(head, " Go "+release[1]) {
		t.Errorf("go.mod asks for Go %s, the list says %q: write it anew with -update", release[1], head)
	}
	for _, key := range []string{"strings.SplitSeq", "sync.Map.Clear", "net/http.Request.Pattern", "log/slog.DiscardHandler"} {
		if !strings.Contains(afterGo122, "\n"+key+"\n") {
			t.Errorf("the list lacks %s", key)
		}
	}
}

// apiLine matches the lines of the Go installation's api files that add a
// symbol on every platform.
var apiLine = regexp.MustCompile(`^pkg (\S+), (?:(?:func|var|const) (\w+)|method \(\*?(\w+)[^)]*\) (\w+)|type (\w+)(?:\[[^\]]*\])? (?:struct, (\w+) |interface, (\w+)\()|type (\w+))`)

func readAPI(t *testing.T) []string {
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	goroot := strings.TrimSpace(string(out))
	var keys []string
	for minor := 23; ; minor++ {
		text, err := os.ReadFile(filepath.Join(goroot, "api", fmt.Sprintf("go1.%d.txt", minor)))
		if os.IsNotExist(err) && minor > 23 {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			m := apiLine.FindStringSubmatch(line)
			if m == nil || strings.Contains(line, "//deprecated") {
				continue
			}
			switch pkg := m[1]; {
			case m[2] != "":
				keys = append(keys, pkg+"."+m[2])
			case m[3] != "":
				keys = append(keys, pkg+"."+m[3]+"."+m[4])
			case m[5] != "" && m[6] == "embedded": // its members are listed
			case m[5] != "":
				keys = append(keys, pkg+"."+m[5]+"."+m[6]+m[7])
			case m[8] != "":
				keys = append(keys, pkg+"."+m[8])
			}
		}
	}
	slices.Sort(keys)
	return slices.Compact(keys)
}

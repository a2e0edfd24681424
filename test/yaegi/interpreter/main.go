// Command interpreter runs Go sources the way Traefik runs a plugin: in Yaegi,
// with the symbols that Traefik gives it and no others.
//
//	interpreter check GOPATH MODULE
//	interpreter test [-run R] [-bench R] [-v] ... GOPATH PACKAGE
//
// check loads a plugin from GOPATH as Traefik does, decodes its manifest's
// testData into its configuration, builds a handler and sends it one request.
// test runs a package's tests; its flags are those of a compiled test, without
// the prefix. Either exits with 0 only if all went well.
//
// It lives in a module of its own because the plugin catalog refuses modules
// that require Yaegi. Package bundle lays out what it reads.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/mitchellh/mapstructure"
	"github.com/traefik/yaegi/interp"
	"github.com/traefik/yaegi/stdlib"
	"gopkg.in/yaml.v3"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "interpreter:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) > 0 && args[0] == "check" && len(args) == 3 {
		return check(args[1], args[2])
	}
	if len(args) > 0 && args[0] == "test" {
		return test(args[1:])
	}
	return errors.New("choose a verb: check GOPATH MODULE, or test [flags] GOPATH PACKAGE")
}

// newInterpreter makes an interpreter as Traefik's plugin builder does for a
// plugin that asks for nothing unsafe.
func newInterpreter(gopath string) (*interp.Interpreter, error) {
	i := interp.New(interp.Options{GoPath: gopath, Env: os.Environ()})
	if err := i.Use(stdlib.Symbols); err != nil {
		return nil, fmt.Errorf("load the standard library's symbols: %w", err)
	}
	return i, nil
}

func check(gopath, module string) error {
	data, err := os.ReadFile(filepath.Join(gopath, "src", filepath.FromSlash(module), ".traefik.yml"))
	if err != nil {
		return fmt.Errorf("read the manifest: %w", err)
	}
	var manifest struct {
		DisplayName string         `yaml:"displayName"`
		Type        string         `yaml:"type"`
		Import      string         `yaml:"import"`
		BasePkg     string         `yaml:"basePkg"`
		Summary     string         `yaml:"summary"`
		TestData    map[string]any `yaml:"testData"`
	}
	if err := yaml.Unmarshal(data, &manifest); err != nil {
		return fmt.Errorf("read the manifest: %w", err)
	}
	switch {
	case manifest.DisplayName == "", manifest.Summary == "", manifest.TestData == nil:
		return errors.New("read the manifest: displayName, summary and testData are required")
	case manifest.Type != "middleware":
		return fmt.Errorf("read the manifest: type is %q, want middleware", manifest.Type)
	case !strings.HasPrefix(manifest.Import, module):
		return fmt.Errorf("read the manifest: import %q is not in the module %s", manifest.Import, module)
	}
	i, err := newInterpreter(gopath)
	if err != nil {
		return err
	}
	if _, err := i.Eval(fmt.Sprintf("import %q", manifest.Import)); err != nil {
		return fmt.Errorf("import %s: %w", manifest.Import, err)
	}
	name := manifest.BasePkg
	if name == "" {
		name = strings.ReplaceAll(path.Base(manifest.Import), "-", "_")
	}
	createConfig, err := i.Eval(name + ".CreateConfig")
	if err != nil {
		return fmt.Errorf("find CreateConfig: %w", err)
	}
	build, err := i.Eval(name + ".New")
	if err != nil {
		return fmt.Errorf("find New: %w", err)
	}
	config := createConfig.Call(nil)[0]
	decoder, err := mapstructure.NewDecoder(&mapstructure.DecoderConfig{
		DecodeHook:       mapstructure.StringToSliceHookFunc(","),
		WeaklyTypedInput: true,
		Result:           config.Interface(),
	})
	if err != nil {
		return fmt.Errorf("decode testData: %w", err)
	}
	if err := decoder.Decode(manifest.TestData); err != nil {
		return fmt.Errorf("decode testData: %w", err)
	}

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var next http.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusNoContent) })
	results := build.Call([]reflect.Value{reflect.ValueOf(ctx), reflect.ValueOf(next), config, reflect.ValueOf("check@file")})
	if err, ok := results[1].Interface().(error); ok && err != nil {
		return fmt.Errorf("call New with testData: %w", err)
	}
	handler, ok := results[0].Interface().(http.Handler)
	if !ok {
		return fmt.Errorf("call New with testData: it returned a %s, not a handler", results[0].Type())
	}
	answer := httptest.NewRecorder()
	handler.ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "http://example.org/", nil))
	if answer.Code != http.StatusNoContent {
		return fmt.Errorf("send a request through the handler: status %d, and the next handler's was %d", answer.Code, http.StatusNoContent)
	}
	return nil
}

// test does not return when the tests ran: package testing ends the process.
func test(args []string) error {
	flags := flag.NewFlagSet("test", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	passed := []string{os.Args[0]}
	keep := func(name string) {
		flags.Func(name, "as in go test", func(value string) error {
			passed = append(passed, "-test."+name+"="+value)
			return nil
		})
	}
	keepBool := func(name string) {
		flags.BoolFunc(name, "as in go test", func(value string) error {
			passed = append(passed, "-test."+name+"="+value)
			return nil
		})
	}
	for _, name := range []string{"run", "skip", "bench", "benchtime", "count", "cpu", "parallel", "timeout"} {
		keep(name)
	}
	for _, name := range []string{"v", "short", "failfast", "benchmem"} {
		keepBool(name)
	}
	if err := flags.Parse(args); err != nil {
		return fmt.Errorf("read the flags: %w", err)
	}
	if flags.NArg() != 2 {
		return errors.New("read the arguments: want GOPATH PACKAGE")
	}
	gopath, err := filepath.Abs(flags.Arg(0))
	if err != nil {
		return err
	}
	pkg := flags.Arg(1)
	// As go test does, so that a test finds its testdata.
	if err := os.Chdir(filepath.Join(gopath, "src", filepath.FromSlash(pkg))); err != nil {
		return fmt.Errorf("find the package: %w", err)
	}
	i, err := newInterpreter(gopath)
	if err != nil {
		return err
	}
	if err := i.EvalTest(pkg); err != nil {
		return fmt.Errorf("load %s: %w", pkg, err)
	}
	tests, benchmarks, err := collect(i.Symbols(pkg)[pkg])
	if err != nil {
		return fmt.Errorf("load %s: %w", pkg, err)
	}
	if len(tests)+len(benchmarks) == 0 {
		return fmt.Errorf("load %s: it has no tests", pkg)
	}
	testing.Init()
	os.Args = passed
	flag.Parse()
	testing.Main(regexp.MatchString, tests, benchmarks, nil)
	return nil
}

var named = regexp.MustCompile(`^(Test|Benchmark)([^a-z].*)?$`)

// collect finds the tests among a package's symbols. The names decide, as they
// do for go test: a function of the right type may be there to be called by one.
func collect(symbols map[string]reflect.Value) (tests []testing.InternalTest, benchmarks []testing.InternalBenchmark, err error) {
	var names []string
	for name := range symbols {
		if named.MatchString(name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		switch f := symbols[name].Interface().(type) {
		case func(*testing.T):
			tests = append(tests, testing.InternalTest{Name: name, F: f})
		case func(*testing.B):
			benchmarks = append(benchmarks, testing.InternalBenchmark{Name: name, F: f})
		case func(*testing.M):
			return nil, nil, errors.New("find the tests: TestMain is not interpreted; do without it")
		}
	}
	return tests, benchmarks, nil
}

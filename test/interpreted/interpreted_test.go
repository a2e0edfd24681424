package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/edgeward/edgeward/test/rig"
	"github.com/edgeward/edgeward/test/rig/rigtest"
)

// TestInterpreted runs the tests of all that Traefik interprets.
func TestInterpreted(t *testing.T) {
	tool := rigtest.Tool(t, "interpreter")
	root, err := rig.Root()
	if err != nil {
		t.Fatal(err)
	}
	for _, pkg := range interpreted {
		t.Run(pkg, func(t *testing.T) {
			t.Parallel() // much of it is waiting
			var out bytes.Buffer
			if err := runPackage(t.Context(), &out, tool, root, pkg, []string{"test", "-timeout=5m"}); err != nil {
				t.Errorf("%v\n%s", err, out.String())
			}
		})
	}
}

// TestHonest shows that what is interpreted cannot fail unnoticed. Each case is
// run in a process of its own, this test binary, whose exit status is what the
// suites rely on.
func TestHonest(t *testing.T) {
	if root := os.Getenv("INTERPRETED_ROOT"); root != "" {
		// The process: one package of the miniature tree.
		args := strings.Fields("test -timeout=1m " + os.Getenv("INTERPRETED_ARGS"))
		if err := runPackage(t.Context(), os.Stdout, os.Getenv("INTERPRETED_TOOL"), root, "./plugin", args); err != nil {
			t.Fatal(err)
		}
		return
	}
	tool := rigtest.Tool(t, "interpreter")
	for _, test := range []struct {
		name string
		args string
		test string // body of plugin/plugin_test.go below its imports
		also map[string]string
		ok   bool
		says string // what the output holds
	}{
		{name: "pass", test: `func TestX(t *testing.T) { t.Log(plus(1, 2)) }`, args: "-v", ok: true, says: "--- PASS: TestX"},
		{name: "error", test: `func TestX(t *testing.T) { t.Error("so it is", plus(1, 2)) }`, says: "so it is 3"},
		{name: "fatal in a subtest", test: `func TestX(t *testing.T) { t.Run("sub", func(t *testing.T) { t.Fatal("so it is") }) }`, says: "TestX/sub"},
		{name: "fail in a parallel subtest", test: `func TestX(t *testing.T) { t.Run("sub", func(t *testing.T) { t.Parallel(); t.FailNow() }) }`, says: "TestX/sub"},
		{name: "the first of two fails", test: "func TestA(t *testing.T) { t.Fail() }\nfunc TestB(t *testing.T) {}", says: "--- FAIL: TestA"},
		{name: "panic", test: `func TestX(t *testing.T) { panic("so it is") }`, says: "so it is"},
		{name: "runtime error", test: `func TestX(t *testing.T) { var m map[string]int; m["x"] = 1 }`, says: "nil map"},
		{name: "panic in a goroutine", test: "func TestX(t *testing.T) { done := make(chan int); go func() { panic(\"so it is\") }(); <-done }", says: "so it is"},
		{name: "compile error", test: `func TestX(t *testing.T) { undefined() }`, says: "undefined"},
		{name: "symbol newer than the interpreter", test: `func TestX(t *testing.T) { for range strings.SplitSeq("a b", " ") {} }`, says: "SplitSeq"},
		{
			name: "a loop's shared variable, which passes compiled",
			test: `func TestX(t *testing.T) {
				var fs []func() int
				for i := 0; i < 3; i++ { fs = append(fs, func() int { return i }) }
				if fs[0]() != 0 { t.Error("shared") }
			}`,
			says: "shared",
		},
		{name: "no tests", test: `func testX(t *testing.T) {}`, says: "no tests"},
		{name: "TestMain", test: "func TestMain(m *testing.M) {}\nfunc TestX(t *testing.T) {}", says: "TestMain"},
		{name: "run leaves out the failing one", args: "-run=TestA$", test: "func TestA(t *testing.T) {}\nfunc TestB(t *testing.T) { t.Fail() }", ok: true},
		{name: "run picks the failing one", args: "-run=TestB$", test: "func TestA(t *testing.T) {}\nfunc TestB(t *testing.T) { t.Fail() }", says: "--- FAIL: TestB"},
		{name: "run picks a subtest", args: "-run=TestA/two", test: `func TestA(t *testing.T) { t.Run("one", func(t *testing.T) { t.Fail() }); t.Run("two", func(t *testing.T) {}) }`, ok: true},
		{name: "benchmark", args: "-bench=. -benchtime=10x", test: "func BenchmarkX(b *testing.B) { for i := 0; i < b.N; i++ { plus(1, 2) } }", ok: true, says: "BenchmarkX"},
		{name: "benchmark fails", args: "-bench=. -benchtime=10x", test: `func BenchmarkX(b *testing.B) { b.Fatal("so it is") }`, says: "so it is"},
		{
			name: "testdata",
			test: `func TestX(t *testing.T) { if b, err := os.ReadFile("testdata/x"); err != nil || string(b) != "x" { t.Error(b, err) } }`,
			also: map[string]string{"plugin/testdata/x": "x"}, ok: true,
		},
		{
			name: "marked and external tests are left out",
			test: `func TestX(t *testing.T) {}`,
			also: map[string]string{
				"plugin/marked_test.go":   "//go:build !interpreted\n\npackage plugin\n\nimport (\n\t\"testing\"\n\t\"example.org/nowhere\"\n)\n\nfunc TestY(t *testing.T) { nowhere.X(t) }\n",
				"plugin/external_test.go": "package plugin_test\n\nimport \"testing\"\n\nfunc TestZ(t *testing.T) { t.Fail() }\n",
			},
			ok: true,
		},
		{
			name: "an import that cannot be interpreted",
			test: `func TestX(t *testing.T) {}`,
			also: map[string]string{"plugin/cmp_test.go": "package plugin\n\nimport _ \"github.com/google/go-cmp/cmp\"\n"},
			says: "//go:build !interpreted",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			root := t.TempDir()
			files := map[string]string{
				"go.mod":           "module " + rig.ModulePath + "\n\ngo 1.26.0\n",
				"plugin/plugin.go": "package plugin\n\nfunc plus(a, b int) int { return a + b }\n",
				"plugin/plugin_test.go": "package plugin\n\nimport (\n\t\"os\"\n\t\"strings\"\n\t\"testing\"\n)\n\n" +
					"var _, _ = os.Args, strings.Fields\n\n" + test.test + "\n",
			}
			for name, content := range test.also {
				files[name] = content
			}
			for name, content := range files {
				path := filepath.Join(root, name)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestHonest$", "-test.v")
			cmd.Env = append(os.Environ(), "INTERPRETED_ROOT="+root, "INTERPRETED_TOOL="+tool, "INTERPRETED_ARGS="+test.args)
			out, err := cmd.CombinedOutput()
			if (err == nil) != test.ok || !bytes.Contains(out, []byte(test.says)) {
				t.Errorf("error is %v, want success %t and %q in the output:\n%s", err, test.ok, test.says, out)
			}
		})
	}
}

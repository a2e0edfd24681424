package rig

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// ModulePath is the path of the module that the repository holds.
const ModulePath = "github.com/edgeward/edgeward"

// ToolSpec says how one real tool is built. The exact version is not here: the
// tool's own nested module pins it.
type ToolSpec struct {
	Name string // what Tool is asked for, and the name of the binary
	// CPU is about what a build costs in processor time when nothing is cached,
	// to tell whoever waits.
	CPU time.Duration

	module  string // directory of the nested module, seen from test/
	pkg     string // package to build
	pinned  string // module whose version is the tool's version
	tags    string
	ldflags string // %s stands for the version
	cgo     bool
}

// crowdsecTags leaves out what no test needs, chiefly the log sources: each
// brings a cloud vendor's client library, and they double the build.
const crowdsecTags = "netgo,osusergo,expr_debug,nomsgpack,sqlite_omit_load_extension,no_db_mysql,no_db_postgres,no_cscli_setup," +
	"no_datasource_cloudwatch,no_datasource_docker,no_datasource_http,no_datasource_journalctl,no_datasource_k8saudit," +
	"no_datasource_kafka,no_datasource_kinesis,no_datasource_loki,no_datasource_s3,no_datasource_syslog," +
	"no_datasource_victorialogs,no_datasource_wineventlog"

// CrowdSec sends its version in the User-Agent and refuses to guess it.
const crowdsecLdflags = "-X github.com/crowdsecurity/go-cs-lib/version.Version=%[1]s -X github.com/crowdsecurity/go-cs-lib/version.Tag=%[1]s"

// Tools lists every tool the bench can build, in the order in which to build
// them: the ones whose compiled packages others reuse come first.
func Tools() []ToolSpec {
	return []ToolSpec{
		{
			Name: "traefik", CPU: 300 * time.Second,
			module: "traefik", pkg: "github.com/traefik/traefik/v3/cmd/traefik", pinned: "github.com/traefik/traefik/v3",
			ldflags: "-X github.com/traefik/traefik/v3/pkg/version.Version=%s",
		},
		{
			Name: "crowdsec", CPU: 150 * time.Second,
			module: "crowdsec", pkg: "github.com/crowdsecurity/crowdsec/cmd/crowdsec", pinned: "github.com/crowdsecurity/crowdsec",
			tags: crowdsecTags, ldflags: crowdsecLdflags, cgo: true,
		},
		{
			Name: "cscli", CPU: 15 * time.Second,
			module: "crowdsec", pkg: "github.com/crowdsecurity/crowdsec/cmd/crowdsec-cli", pinned: "github.com/crowdsecurity/crowdsec",
			tags: crowdsecTags, ldflags: crowdsecLdflags, cgo: true,
		},
		{
			Name: "interpreter", CPU: 40 * time.Second,
			module: "yaegi", pkg: "github.com/edgeward/edgeward/test/yaegi/interpreter", pinned: "github.com/traefik/yaegi",
		},
		{
			Name: "manifests", CPU: 25 * time.Second,
			module: "kubernetes", pkg: "github.com/edgeward/edgeward/test/kubernetes/manifests", pinned: "sigs.k8s.io/kustomize/api",
		},
		{
			Name: "images", CPU: 10 * time.Second,
			module: "../deploy/images", pkg: ".", pinned: "github.com/google/go-containerregistry",
		},
		{
			Name: "staticcheck", CPU: 30 * time.Second,
			module: "lint", pkg: "honnef.co/go/tools/cmd/staticcheck", pinned: "honnef.co/go/tools",
		},
		{
			Name: "govulncheck", CPU: 10 * time.Second,
			module: "lint", pkg: "golang.org/x/vuln/cmd/govulncheck", pinned: "golang.org/x/vuln",
		},
	}
}

// Tool returns the path of a built tool, by the name Tools gives it, and
// builds it first when the cache has no such build. Building says so on
// standard error, because a test that waits minutes without a word looks hung.
func Tool(ctx context.Context, name string) (string, error) {
	for _, spec := range Tools() {
		if spec.Name == name {
			return spec.Build(ctx, func(format string, args ...any) {
				fmt.Fprintf(os.Stderr, format+"\n", args...)
			})
		}
	}
	return "", fmt.Errorf("find tool %q: the test bench has no tool of that name", name)
}

// Cached returns the path at which the current build of the tool belongs, its
// version, and whether it is already there.
func (s ToolSpec) Cached(ctx context.Context) (path, version string, built bool, err error) {
	dir, err := s.moduleDir()
	if err != nil {
		return "", "", false, err
	}
	version, err = s.version(dir)
	if err != nil {
		return "", "", false, err
	}
	key, err := s.key(ctx, dir)
	if err != nil {
		return "", "", false, err
	}
	cache, err := CacheDir()
	if err != nil {
		return "", "", false, err
	}
	path = filepath.Join(cache, "tools", s.Name+"-"+key, s.Name)
	_, err = os.Stat(path)
	return path, version, err == nil, nil
}

// Build returns the path of the built tool, building it when the cache does
// not hold it. It reports progress through say only when it builds. A build
// that is cut short leaves nothing behind but Go's own build cache, from which
// the next one resumes.
func (s ToolSpec) Build(ctx context.Context, say func(format string, args ...any)) (string, error) {
	path, version, built, err := s.Cached(ctx)
	if err != nil || built {
		return path, err
	}
	dir, err := s.moduleDir()
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", fmt.Errorf("make the tool's cache directory: %w", err)
	}
	// Test binaries of several packages run at once and may want one tool.
	unlock, err := lock(ctx, filepath.Join(filepath.Dir(path), "lock"))
	if err != nil {
		return "", fmt.Errorf("lock the cache of %s: %w", s.Name, err)
	}
	defer unlock()
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	if s.cgo {
		if err := CheckCompiler(ctx); err != nil {
			return "", fmt.Errorf("build %s: %w", s.Name, err)
		}
	}

	say("%s %s: building from source, about %s of processor time unless a part is cached", s.Name, version, s.CPU)
	began := time.Now()
	partial := path + ".partial"
	cmd := exec.CommandContext(ctx, "go", append(s.args(version), "-o", partial, s.pkg)...)
	cmd.Dir = dir
	cmd.Env = append(cleanGoEnv(), s.env()...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build %s %s: %w: %s", s.Name, version, err, tail(string(out), 4000))
	}
	if err := os.Rename(partial, path); err != nil {
		return "", fmt.Errorf("put %s in the cache: %w", s.Name, err)
	}
	say("%s %s: built in %s", s.Name, version, time.Since(began).Round(time.Second))
	return path, nil
}

func (s ToolSpec) moduleDir() (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	return filepath.Join(root, "test", s.module), nil
}

// version reads the tool's version from the nested module that pins it.
func (s ToolSpec) version(dir string) (string, error) {
	mod, err := os.ReadFile(filepath.Join(dir, "go.mod"))
	if err != nil {
		return "", fmt.Errorf("read the pins of %s: %w", s.Name, err)
	}
	match := regexp.MustCompile(`(?m)^(?:require)?\s*` + regexp.QuoteMeta(s.pinned) + `\s+(v\S+)`).FindSubmatch(mod)
	if match == nil {
		return "", fmt.Errorf("read the pins of %s: %s does not require %s", s.Name, filepath.Join(dir, "go.mod"), s.pinned)
	}
	return string(match[1]), nil
}

func (s ToolSpec) args(version string) []string {
	ldflags := "-s -w"
	if s.ldflags != "" {
		ldflags += " " + fmt.Sprintf(s.ldflags, version)
	}
	args := []string{"build", "-trimpath", "-ldflags", ldflags}
	if s.tags != "" {
		args = append(args, "-tags", s.tags)
	}
	return args
}

func (s ToolSpec) env() []string {
	env := []string{"GOWORK=off", "GOFLAGS=-buildvcs=false", "CGO_ENABLED=0"}
	if s.cgo {
		env[2] = "CGO_ENABLED=1"
	}
	return env
}

// key hashes everything that decides what the build yields.
func (s ToolSpec) key(ctx context.Context, dir string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", "env", "GOVERSION", "GOOS", "GOARCH")
	cmd.Dir = dir
	cmd.Env = cleanGoEnv()
	toolchain, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("ask go for its version: %w", err)
	}
	sum := sha256.New()
	fmt.Fprintf(sum, "%s\n%q\n%q\n%s\n", toolchain, s.args(""), s.env(), s.pkg)
	// Sources as well as go.mod and go.sum: some modules hold code of ours.
	err = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		fmt.Fprintf(sum, "%s %d\n", rel, len(data))
		sum.Write(data)
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("hash the pins of %s: %w", s.Name, err)
	}
	return hex.EncodeToString(sum.Sum(nil))[:12], nil
}

// Root returns the repository's directory, found upwards from the working
// directory: go test runs a package's tests in the package's own directory.
func Root() (string, error) {
	start, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find the repository: %w", err)
	}
	for dir := start; ; dir = filepath.Dir(dir) {
		mod, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && bytes.HasPrefix(mod, []byte("module "+ModulePath+"\n")) {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("find the repository: no go.mod of %s above %s", ModulePath, start)
		}
	}
}

// CacheDir returns the directory that keeps built tools and filled databases
// from one run to the next: $EDGEWARD_CACHE/edgeward if set, else the user's
// cache directory.
func CacheDir() (string, error) {
	base := os.Getenv("EDGEWARD_CACHE")
	if base == "" {
		var err error
		if base, err = os.UserCacheDir(); err != nil {
			return "", fmt.Errorf("find a cache directory (set EDGEWARD_CACHE to one): %w", err)
		}
	}
	base, err := filepath.Abs(base)
	if err != nil {
		return "", fmt.Errorf("find a cache directory: %w", err)
	}
	return filepath.Join(base, "edgeward"), nil
}

// Packages are the Debian packages that the builds and the tests of the kernel
// need beside Go itself.
var Packages = []string{"gcc", "libc6-dev", "iproute2", "nftables", "wireguard-tools"}

// CheckPrograms says which programs the tests of the kernel miss: to judge rulesets
// by, and to be a peer of the VPN.
func CheckPrograms() error {
	var errs []error
	for _, p := range []struct{ name, packet string }{{"nft", "nftables"}, {"ip", "iproute2"}, {"wg-quick", "wireguard-tools"}} {
		_, err := exec.LookPath(p.name)
		if err != nil {
			_, err = exec.LookPath("/usr/sbin/" + p.name)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s is missing; install it with: apt-get install %s", p.name, p.packet))
		}
	}
	return errors.Join(errs...)
}

// ErrNoCompiler is the error of a build that needs a C compiler where there is
// none.
var ErrNoCompiler = errors.New("no working C compiler; install it with: apt-get install " + strings.Join(Packages, " "))

// CheckCompiler returns ErrNoCompiler where Packages are missing. It uses what
// they bring rather than ask dpkg, so that it holds on any distribution.
func CheckCompiler(ctx context.Context) error {
	compiler := os.Getenv("CC")
	if compiler == "" {
		compiler = "gcc"
	}
	cmd := exec.CommandContext(ctx, compiler, "-xc", "-fsyntax-only", "-")
	cmd.Stdin = strings.NewReader("#include <stdlib.h>\n")
	if cmd.Run() != nil {
		return ErrNoCompiler
	}
	return nil
}

// cleanGoEnv is the environment without what would bend a build.
func cleanGoEnv() []string {
	var env []string
	for _, pair := range os.Environ() {
		switch name, _, _ := strings.Cut(pair, "="); name {
		case "GOWORK", "GOFLAGS", "CGO_ENABLED", "GOOS", "GOARCH", "GOAMD64", "GOARM64", "GOEXPERIMENT", "GODEBUG":
		default:
			env = append(env, pair)
		}
	}
	return append(env, "GOWORK=off", "GOOS="+runtime.GOOS, "GOARCH="+runtime.GOARCH)
}

// lock takes an advisory lock that ends with the process at the latest.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err = syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { file.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			file.Close()
			return nil, err
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			file.Close()
			return nil, err
		}
	}
}

// tail keeps the last n bytes of a text, where the reason of a failure stands.
func tail(text string, n int) string {
	text = strings.TrimSpace(text)
	if len(text) > n {
		text = "..." + text[len(text)-n:]
	}
	return text
}

// Package docs holds the README and the pages of docs to what is true: a table
// lists the plugin's options, all of them and no others; the real Traefik accepts
// the examples with the bundled plugin, the node bouncer and the tunnel theirs, and
// the quick start serves a site; commands and links lead somewhere. It has no opinion on words, and nobody
// imports it.
package docs

import (
	"context"
	"encoding"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/edgeward/edgeward/bouncer"
	"github.com/edgeward/edgeward/internal/bundle"
	"github.com/edgeward/edgeward/plugin"
	"github.com/edgeward/edgeward/test/rig"
	"github.com/edgeward/edgeward/test/rig/rigtest"
	"github.com/edgeward/edgeward/tunnel"
)

// page is a text for readers.
type page struct {
	name string // from the root of the repository
	text string
}

const (
	readme     = "README.md"
	pluginPage = "docs/plugin.md"
	nodePage   = "docs/node.md"
	tunnelPage = "docs/tunnel.md"
	vpnPage    = "docs/vpn.md"
)

// vpn are the sections of tunnel.yaml that the page of the VPN has; that of the
// tunnel has the others.
var vpn = []string{"wireguard", "peers", "services", "grants"}

// pages returns the README and what docs holds.
func pages(t *testing.T) (root string, found []page) {
	t.Helper()
	root, err := rig.Root()
	if err != nil {
		t.Fatal(err)
	}
	names, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range append([]string{filepath.Join(root, readme)}, names...) {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		short, err := filepath.Rel(root, name)
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, page{filepath.ToSlash(short), string(data)})
	}
	return root, found
}

// named returns one of the pages.
func named(t *testing.T, name string) (root, text string) {
	t.Helper()
	root, all := pages(t)
	for _, p := range all {
		if p.name == name {
			return root, p.text
		}
	}
	t.Fatalf("there is no %s", name)
	return "", ""
}

// options lists the options of a section of the configuration by their paths,
// such as rateLimits[].match.hosts. tag is the key of the tag that names them.
func options(tag string, section reflect.Type, at string) []string {
	var names []string
	for i := range section.NumField() {
		name, _, _ := strings.Cut(section.Field(i).Tag.Get(tag), ",")
		typ := section.Field(i).Type
		switch {
		case name == "" || name == "-":
		case typ.Kind() == reflect.Struct && !reflect.PointerTo(typ).Implements(reflect.TypeFor[encoding.TextUnmarshaler]()):
			names = append(names, options(tag, typ, at+name+".")...)
		case typ.Kind() == reflect.Slice && typ.Elem().Kind() == reflect.Struct && !reflect.PointerTo(typ.Elem()).Implements(reflect.TypeFor[encoding.TextUnmarshaler]()):
			names = append(names, options(tag, typ.Elem(), at+name+"[].")...)
		default:
			names = append(names, at+name)
		}
	}
	return names
}

func TestTablesListExactlyTheOptions(t *testing.T) {
	var ofTunnel, ofVPN []string
	for _, option := range options("yaml", reflect.TypeFor[tunnel.Config](), "") {
		section, _, _ := strings.Cut(option, ".")
		if slices.Contains(vpn, strings.TrimSuffix(section, "[]")) {
			ofVPN = append(ofVPN, option)
		} else {
			ofTunnel = append(ofTunnel, option)
		}
	}
	for name, exist := range map[string][]string{
		pluginPage: options("json", reflect.TypeFor[plugin.Config](), ""),
		nodePage:   options("yaml", reflect.TypeFor[bouncer.Config](), ""),
		tunnelPage: ofTunnel,
		vpnPage:    ofVPN,
	} {
		_, text := named(t, name)
		_, text, _ = strings.Cut(text, "\n| option | default | meaning |\n")
		table, _, _ := strings.Cut(text, "\n\n")
		var listed []string
		for line := range strings.Lines(table) {
			cell, _, _ := strings.Cut(strings.TrimPrefix(line, "|"), "|")
			for _, match := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cell, -1) {
				listed = append(listed, match[1])
			}
		}
		slices.Sort(listed)
		slices.Sort(exist)
		if diff := cmp.Diff(exist, listed); diff != "" {
			t.Errorf("options that exist and options in the table of %s (-exist +listed):\n%s", name, diff)
		}
	}
}

// example is a YAML block of a page.
type example struct {
	line int
	yaml string
	keys []string // at the top level
}

func examples(text string) []example {
	var found []example
	lines := strings.Split(text, "\n")
	for i := 0; i < len(lines); i++ {
		if lines[i] != "```yaml" {
			continue
		}
		e := example{line: i + 1}
		for i++; lines[i] != "```"; i++ {
			e.yaml += lines[i] + "\n"
			if match := regexp.MustCompile(`^(\w+):`).FindStringSubmatch(lines[i]); match != nil {
				e.keys = append(e.keys, match[1])
			}
		}
		found = append(found, e)
	}
	return found
}

// has tells whether the example holds all of these keys at its top level.
func (e example) has(keys ...string) bool {
	for _, key := range keys {
		if !slices.Contains(e.keys, key) {
			return false
		}
	}
	return true
}

// dynamic makes of an example a dynamic configuration that serves a router with
// it; ok is false for a static one.
func (e example) dynamic() (yaml string, ok bool) {
	wrap := func(middleware string) string {
		return `
http:
  routers: {example: {rule: "PathPrefix(` + "`/`" + `)", service: nowhere, middlewares: [example]}}
  services: {nowhere: {loadBalancer: {servers: [{url: "http://127.0.0.1:9"}]}}}
  middlewares:
    example:
` + indented(middleware, 6)
	}
	sections := options("json", reflect.TypeFor[plugin.Config](), "")
	switch {
	case e.tunnel(), e.vpn():
	case e.has("http"):
		return e.yaml, true
	case e.has("apiVersion", "kind", "spec"):
		_, spec, _ := strings.Cut(e.yaml, "\nspec:\n")
		// Traefik resolves the reference, where there is a Kubernetes.
		return wrap(regexp.MustCompile(`urn:k8s:secret:[\w-]+:[\w-]+`).ReplaceAllString(spec, "the-key-of-an-example-and-of-no-other")), true
	case slices.ContainsFunc(sections, func(option string) bool {
		top, _, _ := strings.Cut(option, ".")
		return strings.TrimSuffix(top, "[]") == e.keys[0]
	}):
		return wrap("plugin:\n  edgeward:\n" + indented(e.yaml, 4)), true
	}
	return "", false
}

// node reports whether the example is a part of bouncer.yaml.
func (e example) node() bool { return e.has("lists") || e.has("auth") || e.has("firewall") }

// tunnel reports whether the example is tunnel.yaml, or a part of it, for hosts.
func (e example) tunnel() bool { return e.has("tunnels") || e.has("hosts") || e.has("cloudflare") }

// vpn reports whether the example is tunnel.yaml, or a part of it, for the VPN.
func (e example) vpn() bool { return e.has("wireguard") || e.has("grants") }

func TestTunnelAcceptsItsExamples(t *testing.T) {
	root, all := pages(t)
	const (
		lapi    = "lapi: {url: http://127.0.0.1:8080, keyFile: /etc/edgeward/tunnel-lapi-key}\n"
		tunnels = "tunnels: [{name: home, tokenFile: /etc/edgeward/tunnel-token}]\n"
		gateway = "wireguard: {addresses: [10.66.0.1/24]}\n"
	)
	judged := 0
	for _, p := range all {
		for _, e := range examples(p.text) {
			switch {
			case e.vpn():
				if !e.has("wireguard") {
					e.yaml = gateway + e.yaml
				}
			case e.tunnel():
				if !e.has("lapi") {
					e.yaml = lapi + e.yaml
				}
				if !e.has("tunnels") {
					e.yaml = tunnels + e.yaml
				}
			default:
				continue
			}
			judged++
			if _, err := tunnel.Parse(p.name, []byte(e.yaml)); err != nil {
				t.Errorf("%s:%d: %v, for\n%s", p.name, e.line, err, e.yaml)
			}
		}
	}
	if judged < 5 {
		t.Errorf("%d examples were found, want 5 or more", judged)
	}
	// What is installed is an example too.
	for _, name := range []string{"deploy/tunnel/tunnel.yaml", "deploy/kubernetes/tunnel/tunnel.yaml"} {
		if _, err := tunnel.Load(filepath.Join(root, name)); err != nil {
			t.Error(err)
		}
	}
}

func TestBouncerAcceptsItsExamples(t *testing.T) {
	_, all := pages(t)
	const lapi = "lapi: {url: http://127.0.0.1:8080, keyFile: /etc/edgeward/lapi-key}\n"
	judged := 0
	for _, p := range all {
		for _, e := range examples(p.text) {
			if !e.node() {
				continue
			}
			judged++
			// Lists need no LAPI.
			if !e.has("lists") {
				e.yaml = lapi + e.yaml
			}
			if _, err := bouncer.Parse(p.name, []byte(e.yaml)); err != nil {
				t.Errorf("%s:%d: %v, for\n%s", p.name, e.line, err, e.yaml)
			}
		}
	}
	if judged < 3 {
		t.Errorf("%d examples were found, want 3 or more", judged)
	}
}

func indented(text string, by int) string {
	return regexp.MustCompile(`(?m)^(.)`).ReplaceAllString(text, strings.Repeat(" ", by)+"$1")
}

func TestTraefikAcceptsEveryExample(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, all := pages(t)
	tr := rigtest.Traefik(t, rig.TraefikOptions{})

	// The judge bites: an option that does not exist is noticed in each form.
	for _, bad := range []example{
		{yaml: "client:\n  headr: X-Real-IP\n", keys: []string{"client"}},
		{yaml: "apiVersion: a\nkind: Middleware\nspec:\n  plugin:\n    edgeward:\n      client: {headr: X-Real-IP}\n", keys: []string{"apiVersion", "kind", "spec"}},
	} {
		yaml, _ := bad.dynamic()
		if err := tr.SetDynamic(ctx, yaml); err == nil || !strings.Contains(err.Error(), "unknown option client.headr") {
			t.Fatalf("error of an unknown option is %v, want one that names client.headr, for\n%s", err, yaml)
		}
	}

	judged := 0
	for _, p := range all {
		for _, e := range examples(p.text) {
			yaml, ok := e.dynamic()
			if !ok {
				continue // the quick start's own test has it
			}
			judged++
			if err := tr.SetDynamic(ctx, yaml); err != nil {
				t.Errorf("%s:%d: %v, for\n%s", p.name, e.line, err, yaml)
			}
		}
	}
	if judged < 4 {
		t.Errorf("%d examples were found, want 4 or more", judged)
	}
}

// TestQuickStartServesASite runs Traefik on the two configurations of the quick
// start, with nothing changed but places that belong to one machine.
func TestQuickStartServesASite(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	root, text := named(t, readme)
	origin := rigtest.Origin(t)
	lapi := rigtest.LAPI(t, rig.LAPIOptions{})
	key, err := lapi.AddBouncer(ctx, "traefik")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	listener.Close()
	places := map[string]string{
		`":80"`:                    `"` + address + `"`,
		"/etc/traefik/dynamic.yml": filepath.Join(dir, "dynamic.yml"),
		"/etc/traefik/lapi-key":    filepath.Join(dir, "lapi-key"),
		"http://127.0.0.1:8080":    lapi.URL,
		"http://127.0.0.1:3000":    origin.URL,
	}
	wanted := map[string]bool{"static": false, "dynamic": false}
	for _, e := range examples(text) {
		name := "dynamic"
		switch {
		case e.has("entryPoints"):
			name = "static"
		case e.node(), e.tunnel(), e.vpn():
			continue
		case !e.has("http"):
			if _, ok := e.dynamic(); !ok {
				t.Errorf("README.md:%d: an example of no known kind, with %q at its top level", e.line, e.keys)
			}
			continue
		}
		if wanted[name] {
			t.Fatalf("README.md:%d: a second %s configuration: which one is the quick start's?", e.line, name)
		}
		wanted[name] = true
		for place, here := range places {
			if strings.Contains(e.yaml, place) {
				e.yaml = strings.ReplaceAll(e.yaml, place, here)
				delete(places, place)
			}
		}
		if err := os.WriteFile(filepath.Join(dir, name+".yml"), []byte(e.yaml), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if len(places) > 0 || !wanted["static"] || !wanted["dynamic"] {
		t.Fatalf("the quick start lacks %v, or one of its files: %v", places, wanted)
	}
	if err := os.WriteFile(filepath.Join(dir, "lapi-key"), []byte(key+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := bundle.Assemble(ctx, root, filepath.Join(dir, "plugins-local"), bundle.Options{}); err != nil {
		t.Fatal(err)
	}

	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(rigtest.Tool(t, "traefik"), "--configfile="+filepath.Join(dir, "static.yml"))
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // with the error that it was killed
	})
	said := func() string { text, _ := os.ReadFile(log.Name()); return string(text) }
	for {
		status, err := visit(ctx, "http://"+address)
		if err == nil && status == http.StatusOK {
			break
		}
		if ctx.Err() != nil {
			t.Fatalf("the site answers %d (%v); Traefik said:\n%s", status, err, said())
		}
		time.Sleep(20 * time.Millisecond)
	}
	for {
		bouncers, err := lapi.Bouncers(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if len(bouncers) == 1 && !bouncers[0].LastPull.IsZero() {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	for line := range strings.Lines(said()) {
		if regexp.MustCompile(`\bERR\b|"level":"(error|ERROR)"`).MatchString(line) {
			t.Errorf("Traefik complains: %s", line)
		}
	}
}

// visit asks for the quick start's site and returns the status.
func visit(ctx context.Context, url string) (int, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, fmt.Errorf("make a request: %w", err)
	}
	req.Host = "blog.example.com"
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	return resp.StatusCode, resp.Body.Close()
}

func TestCommandsAndLinksLeadSomewhere(t *testing.T) {
	root, all := pages(t)
	makefile, err := os.ReadFile(filepath.Join(root, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	commands, links := 0, 0
	for _, p := range all {
		for _, target := range regexp.MustCompile(`(?m)(?:^    |\x60)make ([a-z-]+)`).FindAllStringSubmatch(p.text, -1) {
			commands++
			if !strings.Contains(string(makefile), "\n"+target[1]+":") {
				t.Errorf("%s: make %s is no command of the Makefile", p.name, target[1])
			}
		}
		for _, link := range regexp.MustCompile(`\]\(([^)]+)\)`).FindAllStringSubmatch(p.text, -1) {
			if strings.Contains(link[1], "://") {
				continue
			}
			links++
			file, _, _ := strings.Cut(link[1], "#")
			if _, err := os.Stat(filepath.Join(root, filepath.Dir(p.name), filepath.FromSlash(file))); err != nil {
				t.Errorf("%s: link to %s: %v", p.name, link[1], err)
			}
		}
	}
	if commands < 3 || links < 4 {
		t.Errorf("found %d commands and %d links, want 3 and 4 or more", commands, links)
	}
}

package rig

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/edgeward/edgeward/internal/bundle"
)

// TraefikOptions says how a Traefik differs from the plainest one: one
// cleartext entrypoint named web that believes no header, with edgeward's
// plugin loaded under the name edgeward.
type TraefikOptions struct {
	// Bare leaves edgeward's plugin out.
	Bare bool
	// Plugins are further local plugins, by name: directories that hold a
	// go.mod and a .traefik.yml.
	Plugins map[string]string
	// Alt adds a second cleartext entrypoint, alt.
	Alt bool
	// TLS adds the entrypoint websecure, with a certificate of Traefik's own
	// making. It speaks HTTP/2; the cleartext ones speak h2c.
	TLS bool
	// TrustForwarded keeps the X-Forwarded headers of clients on loopback, so
	// that a test can pose as many client addresses.
	TrustForwarded bool
	// AccessLog writes Dir/access.log, in JSON.
	AccessLog bool
	// Metrics serves /metrics beside the API.
	Metrics bool
	// Debug logs at level DEBUG, where what interpreted plugins print to
	// standard output shows.
	Debug bool
	// Env is added to the environment, such as GOMAXPROCS=1.
	Env []string
}

// Traefik is a running Traefik with the file provider and without any routers
// until SetDynamic brings some.
type Traefik struct {
	*process

	URL    string // entrypoint web
	AltURL string // entrypoint alt, when asked for
	TLSURL string // entrypoint websecure, when asked for
	APIURL string // Traefik's API and /debug/pprof
	Dir    string // working directory: plugins, configuration and log

	client *http.Client

	mu       sync.Mutex // one SetDynamic at a time
	revision int
}

// StartTraefik starts a Traefik and returns when it serves. ctx bounds its
// life; Close ends it and removes its directory.
func StartTraefik(ctx context.Context, opts TraefikOptions) (*Traefik, error) {
	binary, err := Tool(ctx, "traefik")
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "edgeward-traefik-")
	if err != nil {
		return nil, fmt.Errorf("make a directory for Traefik: %w", err)
	}
	t := &Traefik{Dir: dir, client: &http.Client{Timeout: 5 * time.Second}}
	t.process = &process{
		name: "traefik",
		args: []string{binary, "--configfile=" + filepath.Join(dir, "traefik.yml")},
		dir:  dir,
		env:  opts.Env,
		logs: filepath.Join(dir, "traefik.log"),
		life: ctx,
	}
	t.ready = t.answers
	modules, err := t.assemble(ctx, opts)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	entrypoints := opts.entrypoints()
	if err := t.startAnywhere(ctx, len(entrypoints), func(ports []int) error { return t.bind(opts, modules, entrypoints, ports) }); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return t, nil
}

// entrypoints names them, Traefik's own for its API first.
func (o TraefikOptions) entrypoints() []string {
	names := []string{"traefik", "web"}
	if o.Alt {
		names = append(names, "alt")
	}
	if o.TLS {
		names = append(names, "websecure")
	}
	return names
}

// assemble lays out the working directory and returns the plugins' modules by
// the names under which they are loaded.
func (t *Traefik) assemble(ctx context.Context, opts TraefikOptions) (map[string]string, error) {
	modules := make(map[string]string)
	local := filepath.Join(t.Dir, "plugins-local")
	if err := os.MkdirAll(filepath.Join(t.Dir, "dynamic"), 0o755); err != nil {
		return nil, fmt.Errorf("lay out Traefik's directory: %w", err)
	}
	if !opts.Bare {
		root, err := Root()
		if err != nil {
			return nil, err
		}
		if err := bundle.Assemble(ctx, root, local, bundle.Options{}); err != nil {
			return nil, err
		}
		modules["edgeward"] = ModulePath
	}
	for name, dir := range opts.Plugins {
		mod, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err != nil {
			return nil, fmt.Errorf("load plugin %s: %w", name, err)
		}
		match := regexp.MustCompile(`(?m)^module\s+(\S+)`).FindSubmatch(mod)
		if match == nil {
			return nil, fmt.Errorf("load plugin %s: its go.mod names no module", name)
		}
		modules[name] = string(match[1])
		if err := os.CopyFS(filepath.Join(local, "src", modules[name]), os.DirFS(dir)); err != nil {
			return nil, fmt.Errorf("load plugin %s: %w", name, err)
		}
	}
	return modules, nil
}

// bind writes the static configuration that holds the ports.
func (t *Traefik) bind(opts TraefikOptions, modules map[string]string, entrypoints []string, ports []int) error {
	type object = map[string]any
	points := object{}
	for i, name := range entrypoints {
		address := "127.0.0.1:" + strconv.Itoa(ports[i])
		point := object{"address": address}
		switch name {
		case "traefik":
			t.APIURL = "http://" + address
		case "web":
			t.URL = "http://" + address
		case "alt":
			t.AltURL = "http://" + address
		case "websecure":
			t.TLSURL = "https://" + address
			point["http"] = object{"tls": object{}}
		}
		if opts.TrustForwarded && name != "traefik" {
			point["forwardedHeaders"] = object{"trustedIPs": []string{"127.0.0.1/32"}}
		}
		points[name] = point
	}
	level := "INFO"
	if opts.Debug {
		level = "DEBUG"
	}
	config := object{
		"global":      object{"checkNewVersion": false, "sendAnonymousUsage": false},
		"log":         object{"level": level, "format": "json"},
		"api":         object{"insecure": true, "dashboard": false, "debug": true},
		"entryPoints": points,
		"providers": object{
			// The default, two seconds between two configurations, would only
			// make the suites wait.
			"providersThrottleDuration": "10ms",
			"file":                      object{"directory": "dynamic", "watch": true},
		},
	}
	if opts.AccessLog {
		config["accessLog"] = object{"filePath": "access.log", "format": "json"}
	}
	if opts.Metrics {
		config["metrics"] = object{"prometheus": object{}}
	}
	if len(modules) > 0 {
		plugins := object{}
		for name, module := range modules {
			plugins[name] = object{"moduleName": module}
		}
		config["experimental"] = object{"localPlugins": plugins}
	}
	// JSON is YAML, and quotes itself.
	data, err := json.MarshalIndent(config, "", "  ")
	if err != nil {
		return fmt.Errorf("configure Traefik: %w", err)
	}
	if err := os.WriteFile(filepath.Join(t.Dir, "traefik.yml"), data, 0o644); err != nil {
		return fmt.Errorf("configure Traefik: %w", err)
	}
	return nil
}

// answers tells whether Traefik's API, which comes with the first
// configuration, is there.
func (t *Traefik) answers(ctx context.Context) bool {
	status, err := t.get(ctx, t.APIURL+"/api/version")
	return err == nil && status == http.StatusOK
}

// Close stops Traefik and removes its directory.
func (t *Traefik) Close() error {
	err := t.Stop(context.Background())
	t.client.CloseIdleConnections()
	return errors.Join(err, os.RemoveAll(t.Dir))
}

// SetDynamic replaces the whole dynamic configuration by the given YAML and
// returns once Traefik serves it, or with the error that Traefik reports for
// any part of it: a file it cannot read, a router, service or middleware it
// cannot build. Parts without an error are served even then. The YAML must not
// have a section udp: that one carries the mark by which the revision is
// recognised.
func (t *Traefik) SetDynamic(ctx context.Context, yaml string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.revision++
	mark := fmt.Sprintf("rig-%d", t.revision)
	yaml = strings.TrimRight(yaml, "\n") + "\nudp: {services: {" + mark + ": {loadBalancer: {servers: [{address: \"127.0.0.1:9\"}]}}}}\n"
	logged := len(t.Log())
	// Written beside the watched directory, so that Traefik sees it whole.
	next := filepath.Join(t.Dir, "dynamic.next")
	if err := os.WriteFile(next, []byte(yaml), 0o644); err != nil {
		return fmt.Errorf("write the dynamic configuration: %w", err)
	}
	if err := os.Rename(next, filepath.Join(t.Dir, "dynamic", "dynamic.yml")); err != nil {
		return fmt.Errorf("write the dynamic configuration: %w", err)
	}
	for {
		status, err := t.get(ctx, t.APIURL+"/api/udp/services/"+mark+"@file")
		if err == nil && status == http.StatusOK {
			break
		}
		if reason := fileError(t.Log()[logged:]); reason != "" {
			return fmt.Errorf("apply the dynamic configuration: %s", reason)
		}
		select {
		case <-t.exited():
			return fmt.Errorf("apply the dynamic configuration: traefik has ended: %s", tail(t.Log(), 2000))
		default:
		}
		if err := sleep(ctx, pollEvery); err != nil {
			return fmt.Errorf("apply the dynamic configuration: %w: %s", err, tail(t.Log()[logged:], 2000))
		}
	}
	// The API changes hands together with the entrypoints, at the very end of
	// applying a configuration.
	return t.configurationErrors(ctx)
}

// fileError returns the first complaint of the file provider in a log.
func fileError(log string) string {
	for line := range strings.Lines(log) {
		var entry struct {
			Level    string `json:"level"`
			Provider string `json:"providerName"`
			Error    string `json:"error"`
			Message  string `json:"message"`
		}
		if json.Unmarshal([]byte(line), &entry) == nil && entry.Level == "error" && entry.Provider == "file" {
			return entry.Message + ": " + entry.Error
		}
	}
	return ""
}

// configurationErrors joins what Traefik's API reports on the parts of the
// present configuration.
func (t *Traefik) configurationErrors(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, t.APIURL+"/api/rawdata", nil)
	if err != nil {
		return fmt.Errorf("read Traefik's configuration: %w", err)
	}
	resp, err := t.client.Do(req)
	if err != nil {
		return fmt.Errorf("read Traefik's configuration: %w", err)
	}
	defer resp.Body.Close()
	// Sections by kind, then parts by name.
	var sections map[string]json.RawMessage
	if err := json.NewDecoder(resp.Body).Decode(&sections); err != nil {
		return fmt.Errorf("read Traefik's configuration: %w", err)
	}
	var complaints []string
	for section, raw := range sections {
		var parts map[string]struct {
			// A list for most kinds, a text for some.
			Error any `json:"error"`
		}
		if err := json.Unmarshal(raw, &parts); err != nil {
			return fmt.Errorf("read Traefik's configuration, %s: %w", section, err)
		}
		for name, part := range parts {
			if part.Error != nil {
				complaints = append(complaints, fmt.Sprintf("%s %s: %v", section, name, part.Error))
			}
		}
	}
	if len(complaints) == 0 {
		return nil
	}
	slices.Sort(complaints)
	return fmt.Errorf("apply the dynamic configuration: %s", strings.Join(complaints, "; "))
}

// Goroutines returns how many goroutines Traefik runs, plugins included.
func (t *Traefik) Goroutines(ctx context.Context) (int, error) {
	profile, err := t.GoroutineProfile(ctx)
	if err != nil {
		return 0, err
	}
	var total int
	if _, err := fmt.Sscanf(profile, "goroutine profile: total %d", &total); err != nil {
		return 0, fmt.Errorf("read Traefik's goroutine profile: %w", err)
	}
	return total, nil
}

// GoroutineProfile returns Traefik's goroutines as text, grouped by stack.
func (t *Traefik) GoroutineProfile(ctx context.Context) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, t.APIURL+"/debug/pprof/goroutine?debug=1", nil)
	if err != nil {
		return "", fmt.Errorf("read Traefik's goroutine profile: %w", err)
	}
	resp, err := t.client.Do(req)
	if err != nil {
		return "", fmt.Errorf("read Traefik's goroutine profile: %w", err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", fmt.Errorf("read Traefik's goroutine profile: %w", err)
	}
	return string(text), nil
}

func (t *Traefik) get(ctx context.Context, url string) (status int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, err
	}
	resp, err := t.client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return 0, err
	}
	return resp.StatusCode, nil
}

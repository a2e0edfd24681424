package observability

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/edgeward/edgeward/internal/netns"
	"github.com/edgeward/edgeward/test/cfedge"
	"github.com/edgeward/edgeward/test/rig"
	"github.com/edgeward/edgeward/test/rig/rigtest"
)

// bad is banned, listed is on a list; nothing of this leaves the machine.
const (
	bad    = "203.0.113.66"
	listed = "203.0.113.67"
	good   = "203.0.113.7"
)

// quiet are metrics that a gateway without trouble does not show, with the reason;
// an expression may have nothing to say where it asks for one of them.
var quiet = map[string]string{
	"edgeward_observed_packets_total":   "the mode is enforce",
	"edgeward_observed_bytes_total":     "the mode is enforce",
	"edgeward_auth_observed_total":      "the mode is enforce",
	"edgeward_observed_requests_total":  "the mode is enforce",
	"edgeward_decisions_skipped_total":  "LAPI makes sense",
	"edgeward_malformed_requests_total": "the edge is the edge",
	"edgeward_cloudflare_calls_total":   "the tunnel has a token, and needs no API",
	"edgeward_cloudflare_quota_left":    "the tunnel has a token, and needs no API",
	"edgeward_origin_failures_total":    "the service answers",
	"edgeward_resumed_packets_total":    "no connection was ended by a ban",
}

// busy are alerts that may be about to fire all the same, with the reason.
var busy = map[string]string{
	"EdgewardRefusesMany":    "most visitors of the test are banned",
	"EdgewardLimitSaturated": "and others run into a limit",
	"EdgewardDown":           "a busy machine may miss a scrape that has half a second",
	"EdgewardLAPIDown":       "a busy machine may miss a scrape that has half a second",
	"EdgewardLAPISlow":       "a busy machine may be slow",
}

// mayLack reports whether a metric may be missing.
func mayLack(name string) bool {
	_, ok := quiet[name]
	return ok || slices.ContainsFunc(elsewhere, func(beginning string) bool { return strings.HasPrefix(name, beginning) })
}

// world is the whole gateway but the VPN, with Prometheus looking at it.
type world struct {
	t          *testing.T
	lapi       *rig.LAPI
	node       *netns.NS
	bouncer    *rig.NodeBouncer
	tunnel     *rig.Tunnel
	traefik    *rig.Traefik
	edge       *cfedge.Edge
	prometheus string // address
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, node: netns.New(t), lapi: rigtest.LAPI(t, rig.LAPIOptions{Socket: true, Metrics: true})}
	life, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	t.Cleanup(cancel)
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		w.must(os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	key := func(name string) string {
		key, err := w.lapi.AddBouncer(t.Context(), name)
		w.must(err)
		return key
	}
	w.must(w.lapi.Ban(t.Context(), bad, time.Hour))
	origin := rigtest.Origin(t)

	var err error
	w.bouncer, err = rig.StartNodeBouncer(life, rig.NodeBouncerOptions{
		NetNS: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), w.node.FD()), LAPI: w.lapi, Key: key("node"),
		Config: "auth: {listen: 127.0.0.1:9478, trustedProxies: [127.0.0.1]}\n" +
			"lists: [{name: mine, path: " + file("mine.netset", listed+"\n") + "}]\n" +
			"firewall: {locks: [{name: ssh, ports: [22], from: [192.0.2.0/24]}]}\n",
	})
	w.must(err)
	t.Cleanup(func() { w.ended("bouncer", w.bouncer.Log(), w.bouncer.Close()) })

	w.edge, err = cfedge.Start(life, cfedge.Options{})
	w.must(err)
	cloud := w.edge.Cloud()
	home := cloud.AddTunnel(cloud.AddAccount("home"), "home", nil)
	cloud.AddRoute("app.example.com", home.ID)
	w.must(rig.Build(t.Context(), dir, "edgeward-tunnel"))
	edges, err := json.Marshal(w.edge.Addrs())
	w.must(err)
	w.tunnel, err = rig.NewTunnel(life, rig.TunnelOptions{
		Program: filepath.Join(dir, "edgeward-tunnel"), LAPI: w.lapi, Key: key("tunnel"),
		Config: fmt.Sprintf("tunnels: [{name: home, tokenFile: %s, protocol: http2, connections: 2}]\nedge: {addresses: %s, caFile: %s}\nhosts: [{host: app.example.com, service: %q}]\n",
			file("token", home.Token()), edges, file("ca.pem", string(w.edge.CA())), origin.URL),
	})
	w.must(err)
	w.must(w.tunnel.Start(t.Context()))
	t.Cleanup(func() { w.ended("tunnel", w.tunnel.Log(), w.tunnel.Close()) })

	w.traefik = rigtest.Traefik(t, rig.TraefikOptions{Metrics: true, TrustForwarded: true})
	w.must(w.traefik.SetDynamic(t.Context(), fmt.Sprintf(`
http:
  routers: {site: {rule: "PathPrefix(`+"`/`"+`)", service: origin, middlewares: [edgeward]}}
  services: {origin: {loadBalancer: {servers: [{url: %q}]}}}
  middlewares:
    edgeward:
      plugin:
        edgeward:
          lapi: {url: %q, keyFile: %q, interval: 1s}
          client: {trustedProxies: [127.0.0.1]}
          rateLimits: [{name: login, average: 1, period: 1h, burst: 1, match: {pathPrefixes: [/login]}}]
`, origin.URL, w.lapi.URL, file("plugin-key", key("plugin")))))
	w.watch(dir, file)
	return w
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) ended(name, log string, err error) {
	if w.t.Failed() {
		w.t.Logf("%s logged:\n%s", name, log)
	}
	if err != nil {
		w.t.Error(err)
	}
}

// inside sends a request to a port of the node's loopback.
func (w *world) inside(port string) http.RoundTripper {
	return &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (conn net.Conn, err error) {
		failed := w.node.Run(func() error {
			conn, err = net.DialTimeout("tcp", "127.0.0.1:"+port, 5*time.Second)
			return err
		})
		return conn, failed
	}}
}

// watch starts the real Prometheus with the rules.
func (w *world) watch(dir string, file func(name, text string) string) {
	w.t.Helper()
	// The node is a network of its own, so what is scraped of it is handed on.
	node := httptest.NewServer(&httputil.ReverseProxy{
		Transport: w.inside("9477"), Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(&url.URL{Scheme: "http", Host: "node"}) },
	})
	w.t.Cleanup(node.Close)
	config := "global: {scrape_interval: 500ms, scrape_timeout: 500ms, evaluation_interval: 1s}\n" +
		"rule_files: [" + file("rules.yaml", read(w.t, folder+"rules.yaml")) + "]\nscrape_configs:\n"
	for job, at := range map[string]string{"edgeward-bouncer": node.URL, "edgeward-tunnel": w.tunnel.URL, "crowdsec-lapi": w.lapi.MetricsURL, "traefik": w.traefik.APIURL} {
		where, err := url.Parse(at)
		w.must(err)
		config += fmt.Sprintf("  - {job_name: %s, static_configs: [{targets: [%q]}]}\n", job, where.Host)
	}
	log, err := os.Create(filepath.Join(dir, "prometheus.log"))
	w.must(err)
	free, err := net.Listen("tcp", "127.0.0.1:0")
	w.must(err)
	w.prometheus = free.Addr().String()
	free.Close()
	cmd := exec.Command(rigtest.Debian(w.t, "prometheus", "usr/bin/prometheus"), "--config.file="+file("prometheus.yaml", config),
		"--storage.tsdb.path="+filepath.Join(dir, "tsdb"), "--web.listen-address="+w.prometheus)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, ended := make(chan error, 1), make(chan struct{})
	go func() {
		// The signal comes when the thread ends that started the process.
		runtime.LockOSThread()
		defer close(ended)
		err := cmd.Start()
		if started <- err; err == nil {
			_ = cmd.Wait() // with the error that it was killed
		}
	}()
	w.must(<-started)
	w.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-ended
		if w.t.Failed() {
			said, _ := os.ReadFile(log.Name())
			w.t.Logf("Prometheus logged:\n%s", said)
		}
		log.Close()
	})
	w.until(10*time.Second, "answering", func() bool { _, err := w.series("vector(1)"); return err == nil })
}

// ask asks Prometheus' API.
func (w *world) ask(path string, query url.Values, into any) error {
	res, err := http.Get("http://" + w.prometheus + "/api/v1/" + path + "?" + query.Encode())
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	answer := struct {
		Status, Error string
		Data          any
	}{Data: into}
	if err := json.Unmarshal(body, &answer); err != nil {
		return fmt.Errorf("%s: %s", res.Status, body)
	}
	if answer.Status != "success" {
		return fmt.Errorf("%s: %s", answer.Status, answer.Error)
	}
	return nil
}

// series are what an expression gives, label by label.
func (w *world) series(expr string) ([]map[string]string, error) {
	var data struct {
		Result []struct{ Metric map[string]string }
	}
	err := w.ask("query", url.Values{"query": {expr}}, &data)
	var all []map[string]string
	for _, r := range data.Result {
		all = append(all, r.Metric)
	}
	return all, err
}

// status is the answer of a proxy or of a service to a visitor.
func (w *world) status(by http.RoundTripper, url string, header ...string) int {
	w.t.Helper()
	req, err := http.NewRequestWithContext(w.t.Context(), http.MethodGet, url, nil)
	w.must(err)
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := by.RoundTrip(req)
	w.must(err)
	res.Body.Close()
	return res.StatusCode
}

func (w *world) until(limit time.Duration, what string, is func() bool) {
	w.t.Helper()
	for end := time.Now().Add(limit); !is(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			w.t.Fatalf("not %s within %v", what, limit)
		}
	}
}

// TestWhatIsShownIsThere runs the gateway, and the real Prometheus on it: every
// expression of the dashboard and of the rules can be answered, every one of the
// dashboard has something to show, and every query of the log finds its fields.
func TestWhatIsShownIsThere(t *testing.T) {
	t.Parallel() // it waits more than it computes
	w := newWorld(t)
	visit := func() {
		ask := func(client string) int {
			return w.status(w.inside("9478"), "http://node/v1/auth", "X-Forwarded-For", client, "X-Forwarded-Host", "app.example.com")
		}
		site := func(client, path string) int {
			return w.status(http.DefaultTransport, w.traefik.URL+path, "X-Forwarded-For", client)
		}
		app := func(client string) int {
			return w.status(w.edge.Visitor(client), "https://app.example.com/")
		}
		for _, v := range []struct {
			what       string
			told, want int
		}{
			{"auth endpoint, banned", ask(bad), 403}, {"auth endpoint, listed", ask(listed), 403}, {"auth endpoint, good", ask(good), 200},
			{"tunnel, good", app(good), 200}, {"Traefik, good", site(good, "/"), 200},
		} {
			if v.told != v.want {
				t.Fatalf("%s: %d, want %d", v.what, v.told, v.want)
			}
		}
		w.until(5*time.Second, "refused by the tunnel", func() bool { return app(bad) == 403 })
		w.until(5*time.Second, "refused by the plugin", func() bool { return site(bad, "/") == 403 })
		w.until(5*time.Second, "limited by the plugin", func() bool { return site(good, "/login") == 429 })
	}
	visit()

	all, shows := expressions(t), map[string]bool{}
	live := map[string]bool{}
	excused := func(e shown) bool {
		for name := range asked(e.expr).metrics {
			if mayLack(name) && !live[name] {
				return true
			}
		}
		return strings.HasPrefix(e.at, "rule ")
	}
	ask := func(e shown) bool {
		found, err := w.series(e.expr)
		if err != nil {
			t.Fatalf("%s: %s: %v", e.at, e.expr, err)
		}
		shows[e.expr] = len(found) > 0
		return shows[e.expr]
	}
	var missing []string
	defer func() {
		for _, e := range missing {
			t.Errorf("nothing to show in %s", e)
		}
	}()
	w.until(30*time.Second, "all shown", func() bool {
		visit() // a rate needs two scrapes that differ
		found, err := w.series(`count by (__name__) ({__name__=~".+"})`)
		w.must(err)
		for _, s := range found {
			live[s["__name__"]] = true
		}
		missing = nil
		for _, e := range all {
			if !shows[e.expr] && !excused(e) && !ask(e) {
				missing = append(missing, e.at+": "+e.expr)
			}
		}
		return len(missing) == 0
	})
	named := known(t)
	maps.DeleteFunc(live, func(name string, _ bool) bool { _, ok := named[name]; return !ok })
	for _, e := range all {
		ask(e)
	}
	silent := 0
	for _, e := range all {
		if !shows[e.expr] && !strings.HasPrefix(e.at, "rule ") {
			silent++
		}
	}
	t.Logf("of %d expressions, rules aside, %d have nothing to say of a gateway without VPN and without trouble; %d metrics are there", len(all)-len(alerts(t, folder+"rules.yaml")), silent, len(live))
	w.labels(live)
	w.linted()
	w.evaluated()
	w.logged()
}

// linted has promtool judge what our programs say.
func (w *world) linted() {
	w.t.Helper()
	for at, by := range map[string]http.RoundTripper{"http://node/metrics": w.inside("9477"), w.tunnel.URL + "/metrics": http.DefaultTransport} {
		req, err := http.NewRequestWithContext(w.t.Context(), http.MethodGet, at, nil)
		w.must(err)
		res, err := by.RoundTrip(req)
		w.must(err)
		cmd := exec.CommandContext(w.t.Context(), rigtest.Debian(w.t, "prometheus", "usr/bin/promtool"), "check", "metrics")
		cmd.Stdin = res.Body
		said, err := cmd.CombinedOutput()
		res.Body.Close()
		if err != nil {
			w.t.Errorf("%s: %v\n%s", at, err, said)
		}
	}
}

// labels holds what was scraped to what the collectors describe, and to what the
// table of foreign metrics says.
func (w *world) labels(live map[string]bool) {
	w.t.Helper()
	all := known(w.t)
	for name := range live {
		if name == "ALERTS" {
			continue
		}
		found, err := w.series(name)
		w.must(err)
		have := map[string]bool{}
		for _, s := range found {
			for label, value := range s {
				if label != "__name__" && value != "" && !slices.Contains(given, label) {
					have[label] = true
				}
			}
		}
		has := slices.Sorted(maps.Keys(have))
		_, others := foreign[name]
		for _, label := range has {
			if !slices.Contains(all[name], label) {
				w.t.Errorf("%s has the label %s, of which nothing is known", name, label)
			}
		}
		if diff := cmp.Diff(all[name], has, cmp.Transformer("nil", func(in []string) string { return strings.Join(in, " ") })); others && diff != "" {
			w.t.Errorf("%s (-known +scraped):\n%s", name, diff)
		}
	}
	for name := range all {
		if !mayLack(name) && !live[name] && name != "ALERTS" {
			w.t.Errorf("%s is not there, and not known to be quiet", name)
		}
	}
}

// evaluated holds that Prometheus has evaluated every rule, and that nothing is
// wrong with a gateway without trouble.
func (w *world) evaluated() {
	w.t.Helper()
	var data struct {
		Groups []struct {
			Rules []struct{ Name, Health, LastError, State string }
		}
	}
	w.until(10*time.Second, "evaluated", func() bool {
		w.must(w.ask("rules", nil, &data))
		for _, group := range data.Groups {
			for _, r := range group.Rules {
				if r.Health == "unknown" {
					return false
				}
			}
		}
		return len(data.Groups) > 0
	})
	for _, group := range data.Groups {
		for _, r := range group.Rules {
			if r.Health != "ok" {
				w.t.Errorf("%s: %s", r.Name, r.LastError)
			}
			if r.State != "inactive" && busy[r.Name] == "" {
				w.t.Errorf("%s is %s, though nothing is wrong", r.Name, r.State)
			}
		}
	}
}

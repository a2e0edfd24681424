// Package tunnel_test proves the tunnel on what it is for: the built program
// follows a real CrowdSec LAPI and holds connections to an emulated Cloudflare
// edge, and visitors of that edge reach a service through the real Traefik with
// the plugin's preset, or do not. It reaches no network but loopback.
package tunnel_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/edgeward/edgeward/test/cfedge"
	"github.com/edgeward/edgeward/test/rig"
	"github.com/edgeward/edgeward/test/rig/rigtest"
	"github.com/edgeward/edgeward/tunnel"
)

const (
	good = "203.0.113.7"
	bad  = "203.0.113.66"
)

var build struct {
	once sync.Once
	path string
	err  error
}

// TestMain removes the program that the tests built.
func TestMain(m *testing.M) {
	code := m.Run()
	if build.path != "" {
		os.RemoveAll(filepath.Dir(build.path))
	}
	os.Exit(code)
}

// built returns the program, built once.
func built(t testing.TB) string {
	t.Helper()
	build.once.Do(func() {
		dir, err := os.MkdirTemp("", "edgeward-tunnel-")
		if err != nil {
			build.err = err
			return
		}
		build.path = filepath.Join(dir, "edgeward-tunnel")
		build.err = rig.Build(context.Background(), dir, "edgeward-tunnel")
	})
	if build.err != nil {
		t.Fatal(build.err)
	}
	return build.path
}

// world is an edge, a LAPI, and an origin service that two hosts lead to: app
// directly, site through Traefik.
type world struct {
	t       *testing.T
	dir     string
	edge    *cfedge.Edge
	tunnel  cfedge.TunnelInfo
	lapi    *rig.LAPI
	origin  *rig.Origin
	traefik *rig.Traefik // nil unless asked for
	program string
}

const signingKey = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa="

func newWorld(t *testing.T, withTraefik bool) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), program: built(t)}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	t.Cleanup(cancel)
	var err error
	if w.edge, err = cfedge.Start(ctx, cfedge.Options{RouteLag: 500 * time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	cloud := w.edge.Cloud()
	w.tunnel = cloud.AddTunnel(cloud.AddAccount("home"), "home", nil)
	for _, host := range []string{"app.example.com", "site.example.com", "new.example.com", "nas.example.com"} {
		cloud.AddRoute(host, w.tunnel.ID)
	}
	w.origin = rigtest.Origin(t)
	w.lapi = rigtest.LAPI(t, rig.LAPIOptions{})
	key, err := w.lapi.AddBouncer(t.Context(), "tunnel")
	if err != nil {
		t.Fatal(err)
	}
	w.write("lapi-key", key)
	w.write("token", w.tunnel.Token())
	w.write("ca.pem", string(w.edge.CA()))
	w.write("identity", signingKey)
	if withTraefik {
		w.traefik = rigtest.Traefik(t, rig.TraefikOptions{})
		if err := w.traefik.SetDynamic(t.Context(), fmt.Sprintf(`
http:
  routers:
    site: {rule: "Host(`+"`site.example.com`"+`)", service: origin, middlewares: [edgeward]}
  services:
    origin: {loadBalancer: {servers: [{url: %q}]}}
  middlewares:
    edgeward:
      plugin:
        edgeward:
          client: {preset: edgeward-tunnel, keyFile: %q}
          rateLimits: [{name: visitor, average: 3, period: 1h, match: {pathPrefixes: [/limited]}}]
`, w.origin.URL, filepath.Join(w.dir, "identity"))); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

func (w *world) write(name, text string) {
	w.t.Helper()
	// Beside it and then in its place, as a Secret changes.
	path := filepath.Join(w.dir, name)
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		w.t.Fatal(err)
	}
}

// configure writes the configuration of a process.
func (w *world) configure(name, protocol, listen, extra string) {
	w.t.Helper()
	site := w.origin.URL
	if w.traefik != nil {
		site = w.traefik.URL
	}
	edges, _ := json.Marshal(w.edge.Addrs())
	w.write(name+".yaml", strings.NewReplacer("DIR", w.dir, "NAME", name, "ORIGIN", w.origin.URL, "SITE", site).Replace(fmt.Sprintf(`
lapi: {url: %s, keyFile: DIR/lapi-key, interval: 1s}
tunnels: [{name: home, tokenFile: DIR/token, protocol: %s, connections: 2}]
edge: {addresses: %s, caFile: DIR/ca.pem}
identity: {keyFile: DIR/identity}
drain: {lameDuck: 1s, grace: 10s}
listen: %s
socket: DIR/NAME.sock
hosts:
  - {host: app.example.com, service: ORIGIN, fail: closed}
  - {host: site.example.com, service: SITE}
%s`, w.lapi.URL, protocol, edges, listen, extra)))
}

// process is the program, running.
type process struct {
	*world
	name, config, listen string
	cmd                  *exec.Cmd
	log                  *os.File
	done                 chan error
}

// prepare makes a process that does not run yet, and has no configuration.
func (w *world) prepare(name string) *process {
	return &process{world: w, name: name, listen: freeAddr(w.t), config: filepath.Join(w.dir, name+".yaml"), done: make(chan error, 1)}
}

// run starts the process and returns at once.
func (p *process) run() {
	p.t.Helper()
	var err error
	if p.log, err = os.Create(filepath.Join(p.dir, p.name+".log")); err != nil {
		p.t.Fatal(err)
	}
	p.cmd = exec.Command(p.program, "run", "--role", "cloudflare", "--config", p.config)
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	go func() { p.done <- p.cmd.Wait() }()
	p.t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.done
		if p.t.Failed() {
			p.t.Logf("%s logged:\n%s", p.name, p.logged())
		}
		p.log.Close()
	})
}

// start configures a process, starts it and returns when all its connections
// are registered.
func (w *world) start(name, protocol, extra string) *process {
	w.t.Helper()
	p := w.prepare(name)
	p.configure(name, protocol, p.listen, extra)
	p.run()
	p.until(20*time.Second, "ready", func() bool { return p.get("/readyz") == "ok\n" })
	p.until(10*time.Second, "whole", func() bool { l := p.status().Links[0]; return l.Registrations >= 2 && l.Lost == 0 })
	return p
}

func freeAddr(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func (p *process) logged() string {
	text, _ := os.ReadFile(p.log.Name())
	return string(text)
}

// stop asks the process to end and returns when it has.
func (p *process) stop() {
	p.t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		p.t.Fatal(err)
	}
	err := <-p.done
	p.done <- err
	if err != nil {
		p.t.Errorf("%s ended with %v", p.name, err)
	}
}

// reload has the process look at its files now.
func (p *process) reload() {
	p.t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		p.t.Fatal(err)
	}
}

// get asks the process's HTTP endpoints.
func (p *process) get(path string) string {
	client := &http.Client{Timeout: 2 * time.Second}
	defer client.CloseIdleConnections()
	res, err := client.Get("http://" + p.listen + path)
	if err != nil {
		return err.Error()
	}
	defer res.Body.Close()
	body, _ := io.ReadAll(res.Body)
	return string(body)
}

func (p *process) status() (s tunnel.Status) {
	p.t.Helper()
	if err := json.Unmarshal([]byte(p.get("/v1/status")), &s); err != nil {
		p.t.Fatal(err)
	}
	return s
}

// tell runs the command line on the process's configuration.
func (p *process) tell(args ...string) string {
	out, _ := exec.Command(p.program, append(args, "--config", p.config)...).CombinedOutput()
	return string(out)
}

func (w *world) until(limit time.Duration, what string, is func() bool) time.Duration {
	w.t.Helper()
	began := time.Now()
	for !is() {
		if time.Since(began) > limit {
			w.t.Fatalf("not %s within %v", what, limit)
		}
		time.Sleep(20 * time.Millisecond)
	}
	return time.Since(began)
}

// reply is what a visitor got.
type reply struct {
	status int
	body   string
	header http.Header
}

// arrived is the request as the origin saw it.
func (r reply) arrived(t testing.TB) (a rig.Arrived) {
	t.Helper()
	if err := json.Unmarshal([]byte(r.body), &a); err != nil {
		t.Fatalf("%d %s: %v", r.status, r.body, err)
	}
	return a
}

// visit is a request of a visitor with an address.
func (w *world) visit(from, method, url string, header ...string) reply {
	w.t.Helper()
	req, err := http.NewRequestWithContext(w.t.Context(), method, url, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, line := range header {
		name, value, _ := strings.Cut(line, ": ")
		req.Header.Add(name, value)
	}
	res, err := w.edge.Visitor(from).RoundTrip(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return reply{res.StatusCode, string(body), res.Header}
}

// stream opens an event stream.
func (w *world) stream(from, url string) io.ReadCloser {
	w.t.Helper()
	req, err := http.NewRequestWithContext(w.t.Context(), "GET", url, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	res, err := w.edge.Visitor(from).RoundTrip(req)
	if err != nil || res.StatusCode != 200 {
		w.t.Fatalf("an event stream: %v, %v", res, err)
	}
	return res.Body
}

// upgrade opens a WebSocket through Traefik, on which it has heard an echo.
func (w *world) upgrade(from string) io.ReadWriteCloser {
	w.t.Helper()
	req, err := http.NewRequestWithContext(w.t.Context(), "GET", "https://site.example.com/ws", nil)
	if err != nil {
		w.t.Fatal(err)
	}
	for name, value := range map[string]string{"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="} {
		req.Header.Set(name, value)
	}
	res, err := w.edge.Visitor(from).RoundTrip(req)
	if err != nil {
		w.t.Fatal(err)
	}
	both, ok := res.Body.(io.ReadWriteCloser)
	if res.StatusCode != 101 || !ok {
		w.t.Fatalf("an upgrade is answered %d", res.StatusCode)
	}
	_, _ = both.Write([]byte("echo"))
	back := make([]byte, 4)
	if _, err := io.ReadFull(both, back); err != nil || string(back) != "echo" {
		w.t.Fatalf("the WebSocket says %q, %v", back, err)
	}
	return both
}

// TestVisitorsThroughTraefik is the whole way, over both protocols.
func TestVisitorsThroughTraefik(t *testing.T) {
	w := newWorld(t, true)
	for _, protocol := range []string{"http2", "quic"} {
		t.Run(protocol, func(t *testing.T) {
			w := *w
			w.t = t
			p := w.start(protocol, protocol, "  - {host: nas.example.com, service: ORIGIN, exposure: internal}\n")
			spoofed := []string{"X-Forwarded-For: 192.0.2.1", "X-Real-Ip: 192.0.2.1", "Cf-Connecting-Ip: 192.0.2.1", "X_Forwarded_For: 192.0.2.1", tunnel.IdentityHeader + ": v1 forged"}

			// Directly: what the gate sends, with a signature.
			direct := w.visit(good, "GET", "http://app.example.com/x?y=z", spoofed...).arrived(t)
			signature := direct.Header.Get(tunnel.IdentityHeader)
			if direct.Header.Get("X-Forwarded-For") != good || direct.Host != "app.example.com" || direct.URL != "/x?y=z" || !strings.HasPrefix(signature, "v1 ") {
				t.Errorf("the service sees %+v", direct)
			}

			// Through Traefik: the plugin believes the signature, and takes it off.
			behind := w.visit(good, "GET", "https://site.example.com/", spoofed...).arrived(t)
			for name, want := range map[string]string{
				"X-Real-Ip": good, "X-Forwarded-For": good, "Cf-Connecting-Ip": good, "X-Forwarded-Proto": "https", "X_Forwarded_For": "", tunnel.IdentityHeader: "",
			} {
				if got := strings.Join(behind.Header.Values(name), "|"); got != want {
					t.Errorf("behind Traefik %s is %q, want %q", name, got, want)
				}
			}
			// Visitors have counts of their own, though Traefik sees one peer.
			from := map[string]string{"http2": "198.51.100.1", "quic": "198.51.100.2"}[protocol]
			for i := range 4 {
				if got, want := w.visit(from, "GET", "http://site.example.com/limited").status, map[bool]int{true: 200, false: 429}[i < 3]; got != want {
					t.Errorf("request %d gets %d, want %d", i, got, want)
				}
			}
			if got := w.visit("198.51.100.77", "GET", "http://site.example.com/limited").status; got != 200 && protocol == "http2" {
				t.Errorf("another visitor gets %d", got)
			}

			// Streams and upgrades go through all of it.
			w.upgrade(good).Close()
			stream := w.stream(good, "https://site.example.com/sse")
			events := make([]byte, 40)
			if _, err := io.ReadFull(stream, events); err != nil || !strings.HasPrefix(string(events), "data: 0\n\ndata: 1") {
				t.Errorf("events are %q, %v", events, err)
			}
			stream.Close()

			// A pod that saw a signature, or made one up, is itself.
			for _, forged := range []string{signature, "v1 " + fmt.Sprint(time.Now().Unix()) + " https " + good + " " + base64.RawURLEncoding.EncodeToString(make([]byte, 32))} {
				req, err := http.NewRequestWithContext(t.Context(), "GET", w.traefik.URL+"/", nil)
				if err != nil {
					t.Fatal(err)
				}
				req.Host = "site.example.com"
				req.Header.Set(tunnel.IdentityHeader, forged)
				req.Header.Set("X-Forwarded-For", good)
				req.Header.Set("Cf-Connecting-Ip", good)
				res, err := http.DefaultClient.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				body, _ := io.ReadAll(res.Body)
				res.Body.Close()
				if strings.Contains(string(body), good) {
					t.Errorf("a pod that sends %q is believed: %s", forged, body)
				}
			}

			// An internal host has a record here, by mistake, and no route.
			if got := w.visit(good, "GET", "http://nas.example.com/").status; got != 404 {
				t.Errorf("an internal host answers %d", got)
			}

			// A ban reaches the connector within the interval and a second, and
			// ends what the visitor had open.
			open := w.upgrade(bad)
			running := w.stream(bad, "https://site.example.com/sse")
			others := w.stream(good, "http://app.example.com/sse")
			if err := w.lapi.Ban(t.Context(), bad, time.Hour); err != nil {
				t.Fatal(err)
			}
			took := w.until(10*time.Second, "banned", func() bool { return w.visit(bad, "GET", "http://app.example.com/").status == 403 })
			t.Logf("a ban reached the connector after %v", took)
			if took > 2*time.Second {
				t.Errorf("a ban took %v to reach the connector: want 2s at most", took)
			}
			ended := make(chan string, 2)
			go func() { _, _ = io.Copy(io.Discard, open); ended <- "WebSocket" }()
			go func() { _, _ = io.Copy(io.Discard, running); ended <- "event stream" }()
			for range 2 {
				select {
				case <-ended:
				case <-time.After(10 * time.Second):
					t.Fatal("something of a banned visitor goes on")
				}
			}
			open.Close()
			running.Close()
			if _, err := io.ReadFull(others, make([]byte, 1000)); err != nil {
				t.Errorf("another visitor's event stream ends: %v", err)
			}
			others.Close()
			before := w.origin.Requests()
			page := w.visit(bad, "GET", "http://site.example.com/", "Accept: text/html")
			if page.status != 403 || !strings.Contains(page.body, "<h1>Access from your network is blocked.</h1>") || w.origin.Requests() != before {
				t.Errorf("a banned visitor gets %d %s", page.status, page.body)
			}
			if got := p.tell("why", bad); !strings.Contains(got, bad+": ban: its requests are answered 403 until ") || !strings.Contains(got, "cscli") {
				t.Errorf("why says %s", got)
			}
			if err := w.lapi.Unban(t.Context(), bad); err != nil {
				t.Fatal(err)
			}
			w.until(5*time.Second, "free again", func() bool { return w.visit(bad, "GET", "http://app.example.com/").status == 200 })

			s := p.status()
			if s.Ready != "yes" || len(s.Links) != 1 || len(s.Links[0].Connections) != 2 || !s.LAPI.Answering || s.Links[0].Connections[0].Protocol != protocol ||
				s.Links[0].Connections[0].KeyExchange != "X25519MLKEM768" || s.Links[0].Connections[0].Canary.IsZero() {
				t.Errorf("the status is %+v", s)
			}
			if got := p.tell("status"); !strings.Contains(got, "registered") || !strings.Contains(got, "site.example.com") {
				t.Errorf("status says %s", got)
			}
			metrics := p.get("/metrics")
			for _, want := range []string{
				`edgeward_tunnel_connections_wanted{tunnel="home"} 2`, `edgeward_tunnel_requests_total{code="2xx",host="app.example.com"}`,
				`edgeward_refused_requests_total{ip_type="ipv4",origin="cscli",reason="decision",remediation="ban"}`, `edgeward_tunnel_connections{`,
			} {
				if !strings.Contains(metrics, want) {
					t.Errorf("the metrics lack %s", want)
				}
			}
			if strings.Contains(metrics, bad) || strings.Contains(metrics, "cloudflared_") {
				t.Error("the metrics hold an address, or another's names")
			}
			if strings.Contains(p.logged(), w.tunnel.Token()) || strings.Contains(p.logged(), base64.StdEncoding.EncodeToString(w.tunnel.Secret)) || strings.Contains(p.logged(), signingKey) {
				t.Error("a secret is in the log")
			}
			p.stop()
		})
	}
}

// load makes requests, some two hundred a second, until the returned function
// is called, which says how many there were, and of those that were not answered
// well how often which error was met.
func (w *world) load() (end func() (n int, failed map[string]int)) {
	ctx, cancel := context.WithCancel(w.t.Context())
	var wait sync.WaitGroup
	var mu sync.Mutex
	n, failed := 0, map[string]int{}
	ticker := time.NewTicker(5 * time.Millisecond)
	wait.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
			}
			wait.Go(func() {
				req, _ := http.NewRequestWithContext(context.WithoutCancel(ctx), "POST", "http://app.example.com/slow?for=20ms", bytes.NewReader(make([]byte, 1000)))
				res, err := w.edge.Visitor(fmt.Sprintf("198.51.100.%d", i%200+1)).RoundTrip(req)
				if err == nil {
					_, err = io.Copy(io.Discard, res.Body)
					res.Body.Close()
				}
				if err == nil && res.StatusCode != 200 {
					err = fmt.Errorf("status %d", res.StatusCode)
				}
				mu.Lock()
				defer mu.Unlock()
				if n++; err != nil {
					failed[err.Error()]++
				}
			})
		}
	})
	return func() (int, map[string]int) {
		cancel()
		ticker.Stop()
		wait.Wait()
		return n, failed
	}
}

// TestRollover starts a second process and ends the first, under load, and
// changes routes and credentials meanwhile.
func TestRollover(t *testing.T) {
	w := newWorld(t, false)
	for _, protocol := range []string{"http2", "quic"} {
		t.Run(protocol, func(t *testing.T) {
			w := *w
			w.t = t
			old := w.start("old-"+protocol, protocol, "")
			w.until(5*time.Second, "open", func() bool { return w.visit(good, "GET", "http://app.example.com/").status == 200 })
			end := w.load()
			if got := w.visit(good, "GET", "http://new.example.com/").status; got != 404 {
				t.Errorf("a host that nobody configured answers %d", got)
			}
			// A route comes, and no connection goes.
			registered := old.status().Links[0].Registrations
			old.configure(old.name, protocol, old.listen, "  - {host: new.example.com, service: ORIGIN}\n")
			old.reload()
			w.until(10*time.Second, "routed", func() bool { return w.visit(good, "GET", "http://new.example.com/").status == 200 })
			if got := old.status().Links[0]; got.Registrations != registered || got.Lost != 0 {
				t.Errorf("a new route cost connections: %+v", got)
			}
			// What is wrong changes nothing, and is said.
			old.configure(old.name, protocol, old.listen, "  - {host: new.example.com}\n")
			old.reload()
			w.until(15*time.Second, "told", func() bool { return strings.Contains(old.status().Trouble, "hosts[2].service: is missing") })
			if got := w.visit(good, "GET", "http://new.example.com/").status; got != 200 {
				t.Errorf("under a wrong configuration the last good one answers %d", got)
			}
			old.configure(old.name, protocol, old.listen, "")

			// Credentials rotate without an end of connections that would lose anything.
			secret := w.edge.Cloud().RotateSecret(w.tunnel.ID)
			rotated := w.tunnel
			rotated.Secret = secret
			w.tunnel = rotated
			w.write("token", rotated.Token())
			old.reload()
			w.until(20*time.Second, "rotated", func() bool { l := old.status().Links[0]; return l.Registrations == registered+2 && l.Drains == 2 })

			next := w.start("new-"+protocol, protocol, "")
			began := time.Now()
			old.stop()
			t.Logf("the old process ended after %v", time.Since(began))
			time.Sleep(500 * time.Millisecond)
			n, failed := end()
			t.Logf("%d requests", n)
			if len(failed) > 0 {
				t.Errorf("of %d requests failed: %v", n, failed)
			}
			if c := w.edge.Counts(); c.Failed+c.Stale+c.Lost+c.NoTunnel > 0 {
				t.Errorf("the edge counts %+v: %v", c, w.edge.Failures())
			}
			next.stop()
		})
	}
}

// TestRoutesChangeWhileConnectionsDie changes the routes a hundred times, under
// load, while connections are killed at random. Each change is in force when the
// next is made, and nothing fails but what was in flight on a killed connection.
func TestRoutesChangeWhileConnectionsDie(t *testing.T) {
	w := newWorld(t, false)
	for _, protocol := range []string{"http2", "quic"} {
		t.Run(protocol, func(t *testing.T) {
			w := *w
			w.t = t
			p := w.start(protocol, protocol, "")
			w.until(5*time.Second, "open", func() bool { return w.visit(good, "GET", "http://app.example.com/").status == 200 })
			before := w.edge.Counts().Lost
			end := w.load()
			for i := range 100 {
				extra, want := "", 404
				if i%2 == 0 {
					extra, want = "  - {host: new.example.com, service: ORIGIN}\n", 200
				}
				p.configure(p.name, protocol, p.listen, extra)
				p.reload()
				if i%20 == 10 {
					w.until(20*time.Second, "whole again", func() bool { return len(w.edge.Connections()) == 2 })
					w.edge.Connections()[rand.IntN(2)].Kill()
				}
				w.until(10*time.Second, "changed", func() bool {
					// This request may be one of those in flight.
					res, err := w.edge.Visitor(good).RoundTrip(httptest.NewRequest("GET", "http://new.example.com/", nil))
					if err != nil {
						return false
					}
					res.Body.Close()
					return res.StatusCode == want
				})
			}
			n, failed := end()
			lost, sum := w.edge.Counts().Lost-before, 0
			for _, times := range failed {
				sum += times
			}
			t.Logf("%d requests, of which %d were lost on a killed connection", n, lost)
			if int64(sum) > lost {
				t.Errorf("%d of %d requests failed, of which %d were in flight on a killed connection: %v", sum, n, lost, failed)
			}
			if c := w.edge.Counts(); c.Failed+c.Stale+c.NoTunnel > 0 {
				t.Errorf("the edge counts %+v: %v", c, w.edge.Failures())
			}
			p.stop()
		})
	}
}

// TestCredentialsThatAreRefused are said once, in log, status and readiness,
// while the program lives on.
func TestCredentialsThatAreRefused(t *testing.T) {
	w := newWorld(t, false)
	wrong := w.tunnel
	wrong.Secret = bytes.Repeat([]byte{1}, 32)
	w.write("token", wrong.Token())
	p := w.prepare("wrong")
	p.configure(p.name, "auto", p.listen, "")
	p.run()
	w.until(20*time.Second, "refused", func() bool { return strings.Contains(p.get("/readyz"), "nauthorized") })
	if got := p.get("/healthz"); got != "ok\n" {
		t.Errorf("healthz says %s", got)
	}
	if s := p.status(); len(s.Links) != 1 || s.Links[0].Refused == "" || s.Ready == "yes" {
		t.Errorf("the status is %+v", s)
	}
	// The right token, and all is well.
	w.write("token", w.tunnel.Token())
	p.reload()
	w.until(30*time.Second, "ready", func() bool { return p.get("/readyz") == "ok\n" })
	if n := strings.Count(p.logged(), "nauthorized"); n == 0 || n > 4 {
		t.Errorf("the refusal is said %d times:\n%s", n, p.logged())
	}

	// One that is refused while the old connections serve: they go on, and all say so.
	w.write("token", wrong.Token())
	p.reload()
	w.until(20*time.Second, "told", func() bool {
		return strings.Contains(p.get("/metrics"), `edgeward_tunnel_credentials_refused{tunnel="home"} 1`)
	})
	if s := p.status(); s.Ready != "yes" || s.Links[0].Refused == "" || !strings.Contains(s.Trouble, "nauthorized") || strings.Contains(s.Trouble, "\n") {
		t.Errorf("the status is %+v", s)
	}
	// Whoever asks for it to be tried again is told again.
	before := strings.Count(p.logged(), "not all tunnels are as configured")
	p.reload()
	w.until(20*time.Second, "told again", func() bool { return strings.Count(p.logged(), "not all tunnels are as configured") == before+1 })
}

// TestFullDisk has the state directory on a disk without a free byte, and
// something to keep there: the program says so once, and visitors see nothing of
// it.
func TestFullDisk(t *testing.T) {
	w := newWorld(t, false)
	disk := filepath.Join(w.dir, "state")
	if err := os.Mkdir(disk, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", disk, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatalf("mount a small disk: %v: run the suite as root", err)
	}
	defer func() { _ = syscall.Unmount(disk, syscall.MNT_DETACH) }()
	full, err := os.Create(filepath.Join(disk, "others"))
	if err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(full, rand.NewChaCha8([32]byte{})); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("the disk takes %d bytes: %v", n, err)
	}
	full.Close()

	w.edge.BlockUDP(true) // which is worth remembering
	p := w.start("full", "auto", "stateDir: "+disk+"\n")
	const says = "memory of networks not kept"
	w.until(10*time.Second, "told", func() bool { return strings.Contains(p.logged(), says) })
	if s := p.status(); s.Ready != "yes" || s.Links[0].Connections[0].Protocol != "http2" {
		t.Errorf("the status is %+v", s)
	}
	before, lines := cpu(t, p), strings.Count(p.logged(), "\n")
	for range 20 {
		if got := w.visit(good, "GET", "http://app.example.com/").status; got != 200 {
			t.Errorf("a visitor gets %d", got)
		}
		time.Sleep(100 * time.Millisecond)
	}
	if used := cpu(t, p) - before; used > time.Second {
		t.Errorf("it used %v of the processor in two seconds", used)
	}
	if left, err := filepath.Glob(filepath.Join(disk, "*.new")); err != nil || len(left) > 0 {
		t.Errorf("half a file is left: %v, %v", left, err)
	}
	if n := strings.Count(p.logged(), says); n != 1 || strings.Count(p.logged(), "\n") > lines+2 || !strings.Contains(p.logged(), "no space left on device") {
		t.Errorf("it is said %d times:\n%s", n, p.logged())
	}
	p.stop()
}

// cpu is the processor time that a process has used.
func cpu(t *testing.T, p *process) time.Duration {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	fields := strings.Fields(rest)
	var user, system int64
	_, _ = fmt.Sscan(fields[11], &user)
	_, _ = fmt.Sscan(fields[12], &system)
	return time.Duration(user+system) * 10 * time.Millisecond
}

// TestTunnelsAndRecordsFollow begins with nothing but API tokens: the tunnel,
// its credentials and its records come by themselves, follow the configuration,
// and a credential that is rotated in the dashboard is fetched.
func TestTunnelsAndRecordsFollow(t *testing.T) {
	w := newWorld(t, false)
	cloud := w.edge.Cloud()
	account := cloud.AddAccount("other")
	cloud.AddZone(account, "example.net")
	server := httptest.NewServer(cfedge.NewAPI(cloud))
	defer server.Close()
	w.write("tunnels-token", cloud.AddToken("tunnels", cfedge.TunnelEdit(account)))
	w.write("zone-token", cloud.AddToken("zone", cfedge.ZoneRead("example.net"), cfedge.DNSEdit("example.net")))
	section := "cloudflare:\n  account: " + account + "\n  owner: test\n  policy: sync\n  interval: 10s\n  url: " + server.URL + "/client/v4\n" +
		"  tunnelTokenFile: DIR/tunnels-token\n  zones: [{name: example.net, tokenFile: DIR/zone-token}]\n"
	made := func(p *process, hosts string) {
		p.configure(p.name, "http2", p.listen, hosts+strings.ReplaceAll(section, "DIR", w.dir))
		text, err := os.ReadFile(p.config)
		if err != nil {
			t.Fatal(err)
		}
		// A tunnel without a file, and none of the hosts of the other tests.
		lines := strings.Split(string(text), "\n")
		for i, line := range lines {
			if strings.HasPrefix(line, "tunnels:") {
				lines[i] = "tunnels: [{name: made, protocol: http2, connections: 2}]"
			}
			if strings.Contains(line, "example.com") {
				lines[i] = ""
			}
		}
		w.write(p.name+".yaml", strings.Join(lines, "\n"))
	}
	p := w.prepare("api")
	made(p, "  - {host: one.example.net, service: ORIGIN}\n  - {host: two.example.net, service: ORIGIN}\n")
	p.run()
	answers := func(host string, want int) func() bool {
		return func() bool { return w.visit(good, "GET", "http://"+host+"/").status == want }
	}
	w.until(20*time.Second, "reachable", answers("one.example.net", 200))
	w.until(20*time.Second, "reachable", answers("two.example.net", 200))
	if n := len(cloud.Records("example.net")); n != 4 {
		t.Errorf("%d records for two hosts: %v", n, cloud.Records("example.net"))
	}
	made(p, "  - {host: one.example.net, service: ORIGIN}\n")
	p.reload()
	w.until(20*time.Second, "cleaned up", func() bool { return len(cloud.Records("example.net")) == 2 })
	if !answers("one.example.net", 200)() {
		t.Error("the host that stays is gone")
	}

	all := cloud.Tunnels(account)
	if len(all) != 1 || all[0].Name != "made" {
		t.Fatalf("the tunnels are %v", all)
	}
	cloud.RotateSecret(all[0].ID)
	w.edge.Kill()
	w.until(10*time.Second, "refused", func() bool { return p.status().Links[0].Refused != "" })
	p.reload() // or a wait for the next turn
	w.until(20*time.Second, "reachable with the new secret", answers("one.example.net", 200))
	if s := p.status(); s.Cloudflare == nil || s.Trouble != "" {
		t.Errorf("the status is %+v", s)
	}
	if metrics := p.get("/metrics"); !strings.Contains(metrics, `edgeward_cloudflare_calls_total{call="write records",outcome="ok"}`) {
		t.Error("the metrics lack the calls of the API")
	}

	// A stock connector on the same tunnel would judge nobody, and that is said.
	end := cloud.Connect(all[0].ID, cfedge.CloudConnection{ID: uuid.New(), ConnectorID: uuid.New(), Version: "2026.7.0"})
	p.reload()
	const shared = "is served by other connectors too (2026.7.0)"
	w.until(20*time.Second, "said", func() bool { return strings.Contains(p.tell("status"), shared) })
	if n := strings.Count(p.logged(), shared); n != 1 {
		t.Errorf("other connectors are logged %d times", n)
	}
	end()

	// What was made goes by the verb alone, and not under a tunnel that runs.
	if got := p.tell("cleanup", "--tunnels", "--yes"); !strings.Contains(got, "tunnel made is served (connections: ") || len(cloud.Records("example.net")) != 2 {
		t.Errorf("cleanup says %s", got)
	}
	p.stop()
	w.until(10*time.Second, "unserved", func() bool { return !strings.Contains(p.tell("cleanup"), "is served (") })
	if got := p.tell("cleanup"); !strings.Contains(got, "- CNAME  one.example.net") || !strings.Contains(got, "2 writes, of which none is made without --yes") || len(cloud.Records("example.net")) != 2 {
		t.Errorf("cleanup says %s", got)
	}
	if got := p.tell("cleanup", "--tunnels", "--yes"); !strings.Contains(got, "- tunnel") || !strings.Contains(got, "3 writes made") {
		t.Errorf("cleanup says %s", got)
	}
	if got := p.tell("cleanup", "--tunnels", "--yes"); got != "nothing is ours\n" || len(cloud.Records("example.net")) != 0 || len(cloud.Tunnels(account)) != 0 {
		t.Errorf("a second cleanup says %s", got)
	}
}

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/edgeward/edgeward/test/cfedge"
	"github.com/edgeward/edgeward/test/rig"
)

// publicHost is what visitors of the tunnel ask for; its zone is publicZone.
const (
	publicHost = "home." + publicZone
	publicZone = "example.org"
)

// passed is a header of every answer that comes from Traefik.
const passed = "X-Revision"

// tunnel is the way in through Cloudflare: the real edgeward-tunnel before the
// gateway's Traefik, and an emulation of Cloudflare's edge and API in the demo's
// own process.
type tunnel struct {
	*gateway
	life context.Context // bounds what it starts

	dir      string
	programs string // directory of edgeward and edgeward-tunnel
	edge     *cfedge.Edge
	front    string // where visitors find the edge, HOST:PORT
	config   string // of every process, beside what is its own
	process  *rig.Tunnel
	holds    bool // the ban of the visitor that stays banned

	cancel context.CancelFunc // ends the build
	built  chan struct{}      // closed when the build has ended, with failed
	failed error
}

// layTunnel starts what the tunnel needs before the gateway can be configured, and
// the build of the programs where there are none, beside all else. life bounds it.
func layTunnel(life context.Context, g *gateway, programs string) (*tunnel, error) {
	t := &tunnel{gateway: g, life: life, built: make(chan struct{})}
	var err error
	if programs != "" {
		if t.programs, err = filepath.Abs(programs); err != nil {
			return nil, fmt.Errorf("find the programs: %w", err)
		}
	}
	if t.dir, err = os.MkdirTemp("", "edgeward-demo-tunnel-"); err != nil {
		return nil, fmt.Errorf("make a directory for the tunnel: %w", err)
	}
	building, cancel := context.WithCancel(life)
	t.cancel = cancel
	go func() {
		defer close(t.built)
		if programs == "" {
			t.failed = rig.Build(building, t.dir, "edgeward", "edgeward-tunnel")
		}
	}()
	if programs == "" {
		t.programs = t.dir
	}
	// Who may not enlarge a socket's buffer is told of it once by the QUIC library.
	if err = os.Setenv("QUIC_GO_DISABLE_RECEIVE_BUFFER_WARNING", "true"); err != nil {
		return t, fmt.Errorf("silence the QUIC library: %w", err)
	}
	// The real edge, which is many machines, takes longer to route by what changed.
	if t.edge, err = cfedge.Start(life, cfedge.Options{RouteLag: 300 * time.Millisecond}); err != nil {
		return t, err
	}
	if t.front, err = listen(life, t.edge.Front()); err != nil {
		return t, err
	}
	cloud := t.edge.Cloud()
	account := cloud.AddAccount("demo")
	cloud.AddZone(account, publicZone)
	api, err := listen(life, cfedge.NewAPI(cloud))
	if err != nil {
		return t, err
	}
	for name, text := range map[string]string{
		"ca.pem":       string(t.edge.CA()),
		"identity-key": identityKey,
		"tunnel-token": cloud.AddToken("tunnels", cfedge.TunnelEdit(account)),
		"zone-token":   cloud.AddToken("zone", cfedge.ZoneRead(publicZone), cfedge.DNSEdit(publicZone)),
	} {
		if err := os.WriteFile(t.file(name), []byte(text), 0o600); err != nil {
			return t, fmt.Errorf("write the tunnel's files: %w", err)
		}
	}
	edges, err := json.Marshal(t.edge.Addrs())
	if err != nil {
		return t, fmt.Errorf("write the tunnel's configuration: %w", err)
	}
	t.config = strings.NewReplacer("DIR", t.dir, "HOST", publicHost, "ZONE", publicZone, "ACCOUNT", account, "API", api, "EDGES", string(edges)).Replace(`
tunnels: [{name: home, connections: 2}]
hosts: [{host: HOST, service: "TRAEFIK"}]
identity: {keyFile: DIR/identity-key}
cloudflare:
  account: ACCOUNT
  owner: demo
  policy: sync
  tunnelTokenFile: DIR/tunnel-token
  zones: [{name: ZONE, tokenFile: DIR/zone-token}]
  url: http://API/client/v4
edge: {addresses: EDGES, caFile: DIR/ca.pem}
drain: {lameDuck: 1s, grace: 5s}
`)
	return t, nil
}

// identityKey is the key that tunnel and plugin share; in earnest, openssl rand
// -base64 32 makes one.
const identityKey = "a-key-of-the-demo-and-of-nothing-else-0"

func (t *tunnel) file(name string) string { return filepath.Join(t.dir, name) }

// open waits for the programs and prepares the tunnel; it begins in the story.
func (t *tunnel) open(ctx context.Context) error {
	select {
	case <-t.built:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if t.failed != nil {
		return t.failed
	}
	var err error
	t.process, err = t.prepare(ctx, "demo-tunnel")
	return err
}

// prepare makes a process that does not run yet, with a key of its own, and has
// the commands speak of it.
func (t *tunnel) prepare(ctx context.Context, name string) (*rig.Tunnel, error) {
	key, err := t.lapi.AddBouncer(ctx, name)
	if err != nil {
		return nil, err
	}
	p, err := rig.NewTunnel(t.life, rig.TunnelOptions{
		Program: filepath.Join(t.programs, "edgeward-tunnel"), LAPI: t.lapi, Key: key, Config: strings.ReplaceAll(t.config, "TRAEFIK", t.traefik.URL),
	})
	if err != nil {
		return nil, err
	}
	// The VPN has a file of its own, with the peers.
	peers := p.ConfigFile
	if t.vpn != nil {
		peers = t.vpn.process.ConfigFile
	}
	program := func(name string) string { return fmt.Sprintf("exec '%s'", filepath.Join(t.programs, name)) }
	if err := errors.Join(
		t.command("edgeward", fmt.Sprintf("file='%s'\n[ \"$1\" != peer ] || file='%s'\nset -- \"$@\" --config \"$file\"\n%s", p.ConfigFile, peers, program("edgeward"))),
		t.command("edgeward-tunnel", fmt.Sprintf("case \" $* \" in *' --config '*) ;; *) set -- \"$@\" --config '%s' ;; esac\n%s", p.ConfigFile, program("edgeward-tunnel"))),
	); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// listen serves on a free loopback port until ctx ends.
func listen(ctx context.Context, handler http.Handler) (string, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("listen on loopback: %w", err)
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)}
	go func() { _ = server.Serve(listener) }() // ends when it is closed
	context.AfterFunc(ctx, func() { server.Close() })
	return listener.Addr().String(), nil
}

// close ends the tunnel, then the edge, and removes what they wrote.
func (t *tunnel) close() error {
	t.cancel()
	<-t.built
	var errs []error
	if t.process != nil {
		errs = append(errs, t.process.Close())
	}
	if t.edge != nil {
		t.edge.Close()
	}
	return errors.Join(append(errs, os.RemoveAll(t.dir))...)
}

// invite says what there is to play with.
func (t *tunnel) invite() string {
	return fmt.Sprintf(`
  edgeward host list
  edgeward-tunnel status
  curl -i --interface 127.0.0.21 -H 'Host: %[1]s' %[2]s
  cscli decisions add --ip 127.0.0.21 --duration 1m
  edgeward-tunnel why 127.0.0.21

  tunnel         %[3]s
                 with its log beside it; Cloudflare is emulated
`, publicHost, t.front, t.process.ConfigFile)
}

func (t *tunnel) steps() []step {
	return []step{
		{"A tunnel: its DNS record, a visitor, and those who pose as one", t.visited},
		{"A ban holds in the tunnel, before Traefik sees the request", t.banned},
		{"Another process takes the tunnel over, under load", t.rollOver},
	}
}

// The clients of the tunnel. A pod is who reaches Traefik from inside the cluster.
const (
	tunnelVisitor = "127.0.0.21"
	tunnelBanned  = "127.0.0.22"
	pod           = "127.0.0.30"
)

// begin starts the tunnel, unless it runs, and returns when a visitor gets through.
func (t *tunnel) begin(ctx context.Context) error {
	if _, err := t.process.Status(ctx); err == nil {
		return nil
	}
	bounded, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if err := t.process.Start(bounded); err != nil {
		return err
	}
	for {
		a, err := t.ask(bounded, tunnelVisitor, "/")
		if err != nil {
			return fmt.Errorf("wait for an answer through the tunnel: %w", err)
		}
		if a.status == http.StatusOK {
			return nil
		}
		if err := pause(bounded, 10*time.Millisecond); err != nil {
			return fmt.Errorf("a visitor of the tunnel gets %d: %s", a.status, strings.TrimSpace(a.body))
		}
	}
}

// ask sends a visitor's request to the edge.
func (t *tunnel) ask(ctx context.Context, from, path string, headers ...string) (answer, error) {
	return fetch(ctx, t.client(from), "http://"+t.front+path, append(headers, "Host", publicHost)...)
}

// sees demands that the origin takes somebody for the client, whatever headers
// say, and that no signature reached it.
func sees(a answer, client string) error {
	var arrived rig.Arrived
	if err := json.Unmarshal([]byte(a.body), &arrived); err != nil {
		return fmt.Errorf("read the origin's answer: %w", err)
	}
	for _, name := range []string{"X-Forwarded-For", "X-Real-Ip"} {
		if got := strings.Join(arrived.Header.Values(name), "|"); got != client {
			return fmt.Errorf("the origin was told %s %q, want %s", name, got, client)
		}
	}
	if got := arrived.Header.Get("X-Edgeward-Client"); got != "" {
		return fmt.Errorf("the origin was handed a signature: %q", got)
	}
	return nil
}

func (t *tunnel) visited(ctx context.Context) error {
	t.does("# Cloudflare's edge and API are emulated here: the real one is not reached")
	out, err := t.types(ctx, "edgeward", "host", "plan")
	if err != nil {
		return err
	}
	t.quotes(out)
	if !strings.Contains(out, "+ CNAME") || len(t.edge.Cloud().History()) > 0 {
		return fmt.Errorf("the plan does not show the record, or was carried out: %s", out)
	}
	t.does("edgeward-tunnel run --role cloudflare")
	began := time.Now()
	if err := t.begin(ctx); err != nil {
		return err
	}
	status, err := t.process.Status(ctx)
	if err != nil {
		return err
	}
	link := status.Links[0]
	t.held(time.Since(began), "tunnel and record are made, %d connections are up (%s), after", len(link.Connections), link.Connections[0].Protocol)
	if out, err = t.types(ctx, "edgeward", "host", "list"); err != nil {
		return err
	}
	t.quotes(out)
	if made := t.edge.Cloud().Records(publicZone); len(made) != 2 || !strings.Contains(out, "  ok  ") {
		return fmt.Errorf("the zone has %d records, want the host's and its owner's: %s", len(made), out)
	}
	for _, test := range []struct {
		from, to, client, says string
		claims                 []string
	}{
		{tunnelVisitor, t.front, tunnelVisitor, "200: the origin, behind Traefik, sees the visitor", nil},
		{tunnelVisitor, t.front, tunnelVisitor, "200: a visitor cannot claim to be another", []string{"X-Forwarded-For", tunnelBanned}},
		{pod, t.site(), pod, "200, as itself: nor can a pod, with Cloudflare's header", []string{"CF-Connecting-IP", tunnelVisitor}},
	} {
		a, err := t.curlAt(ctx, http.StatusOK, test.from, test.to, append([]string{"Host", publicHost}, test.claims...)...)
		if err == nil {
			err = sees(a, test.client)
		}
		if err != nil {
			return err
		}
		t.held(a.took, "%s", test.says)
	}
	mac := strings.Repeat("A", 43) // as long as a true one
	identity := fmt.Sprintf("v1 %d https %s ", time.Now().Unix(), tunnelVisitor)
	t.does("mac=" + mac)
	t.does(fmt.Sprintf("curl --interface %s -H 'Host: %s' \\\n      -H \"X-Edgeward-Client: %s$mac\" \\\n      %s", pod, publicHost, identity, t.site()))
	a, err := t.get(ctx, pod, "/", "Host", publicHost, "X-Edgeward-Client", identity+mac)
	if err == nil && a.status != http.StatusOK {
		err = fmt.Errorf("a pod with a signature that it made up got %d: %s", a.status, strings.TrimSpace(a.body))
	}
	if err == nil {
		err = sees(a, pod)
	}
	if err != nil {
		return err
	}
	t.held(a.took, "200, as itself: nor with a signature that it made up")
	return nil
}

// ban bans the visitor that stays banned, if that was not done yet, and returns
// when the tunnel refuses it.
func (t *tunnel) ban(ctx context.Context) (took time.Duration, err error) {
	if t.holds {
		return 0, nil
	}
	if err := t.cscli(ctx, "decisions", "add", "--ip", tunnelBanned, "--duration", "4h", "--reason", "demo"); err != nil {
		return 0, err
	}
	for began := time.Now(); ; {
		a, err := t.ask(ctx, tunnelBanned, "/")
		took = time.Since(began)
		switch {
		case err != nil:
			return took, err
		case a.status == http.StatusForbidden && a.header.Get(passed) == "":
			t.holds = true
			return took, nil
		case a.status != http.StatusOK && a.status != http.StatusForbidden: // of the plugin, which was told first
			return took, fmt.Errorf("%s got %d before it was refused: %s", tunnelBanned, a.status, strings.TrimSpace(a.body))
		case took > prompt:
			return took, fmt.Errorf("%s still gets past the tunnel after %s, want 403 within %s", tunnelBanned, spoken(took), prompt)
		}
		if err := pause(ctx, 10*time.Millisecond); err != nil {
			return took, err
		}
	}
}

func (t *tunnel) banned(ctx context.Context) error {
	if err := t.begin(ctx); err != nil {
		return err
	}
	before, err := t.curlAt(ctx, http.StatusOK, tunnelBanned, t.front, "Host", publicHost)
	if err != nil {
		return err
	}
	if before.header.Get(passed) == "" {
		return fmt.Errorf("an answer of Traefik has no %s", passed)
	}
	t.held(before.took, "200 so far, with Traefik's mark: %s: %s", passed, before.header.Get(passed))
	took, err := t.ban(ctx)
	if err != nil {
		return err
	}
	t.held(took, "403 in the tunnel, asked every 10 ms; the first came after")
	reached := t.origin.Requests()
	a, err := t.curlAt(ctx, http.StatusForbidden, tunnelBanned, t.front, "Host", publicHost)
	if err != nil {
		return err
	}
	if a.header.Get(passed) != "" || t.origin.Requests() != reached {
		return errors.New("the banned visitor's request went further than the tunnel")
	}
	t.held(a.took, "403 without that mark: Traefik never saw the request")
	if a, err = t.curlAt(ctx, http.StatusOK, tunnelVisitor, t.front, "Host", publicHost); err != nil {
		return err
	}
	t.held(a.took, "200: others do")
	out, err := t.types(ctx, "edgeward-tunnel", "why", tunnelBanned)
	if err != nil {
		return err
	}
	if !strings.Contains(out, tunnelBanned+": ban: ") || !strings.Contains(out, "enforced here") {
		return fmt.Errorf("why does not name the ban: %s", out)
	}
	t.quotes(out)
	return nil
}

func (t *tunnel) rollOver(ctx context.Context) (err error) {
	if err := t.begin(ctx); err != nil {
		return err
	}
	if _, err := t.ban(ctx); err != nil {
		return err
	}
	const workers = 6
	t.does(fmt.Sprintf("# %d visitors without pause, one of them banned, each answer takes 20 ms", workers+1))
	counted := t.edge.Counts()
	var requests atomic.Int64
	var group sync.WaitGroup
	var wrong [workers + 1]error
	done := make(chan struct{})
	began := time.Now()
	for i := range wrong {
		from, want := tunnelVisitor, http.StatusOK
		if i == workers {
			from, want = tunnelBanned, http.StatusForbidden
		}
		client := t.client(from)
		group.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				a, err := fetch(ctx, client, "http://"+t.front+"/slow?for=20ms", "Host", publicHost)
				if err == nil && a.status != want {
					err = fmt.Errorf("%s got %d, want %d: %s", from, a.status, want, strings.TrimSpace(a.body))
				}
				if err == nil && want == http.StatusForbidden {
					err = pause(ctx, 20*time.Millisecond) // it is answered at once
				}
				if err != nil {
					wrong[i] = err
					return
				}
				requests.Add(1)
			}
		})
	}
	failed := t.replace(ctx)
	took := time.Since(began)
	close(done)
	group.Wait()
	if err := errors.Join(append(wrong[:], failed)...); err != nil {
		return err
	}
	now := t.edge.Counts()
	if lost := now.Failed + now.Stale + now.Lost + now.NoTunnel - counted.Failed - counted.Stale - counted.Lost - counted.NoTunnel; lost > 0 {
		return fmt.Errorf("the edge counts %d failed requests: %s", lost, strings.Join(t.edge.Failures(), "; "))
	}
	t.held(took, "%d requests, not one failed, and the banned one never passed", requests.Load())
	return nil
}

// replace starts another process, and ends the one before it.
func (t *tunnel) replace(ctx context.Context) error {
	bounded, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	next, err := t.prepare(bounded, "demo-tunnel-next")
	if err != nil {
		return err
	}
	old := t.process
	began := time.Now()
	t.does("edgeward-tunnel run --role cloudflare    # a new one, beside the old one")
	if err := next.Start(bounded); err != nil {
		return errors.Join(err, next.Close())
	}
	t.process = next
	t.held(time.Since(began), "the new one knows the bans and serves, after")
	if err := pause(bounded, 300*time.Millisecond); err != nil { // over both
		return errors.Join(err, old.Close())
	}
	began = time.Now()
	t.does(fmt.Sprintf("kill %d    # the old one", old.PID()))
	if err := old.Stop(bounded); err != nil {
		return errors.Join(err, old.Close())
	}
	t.held(time.Since(began), "it said goodbye, served what still came, and ended")
	carried := 0
	for _, c := range t.edge.Connections() {
		if c.Requests() > 0 {
			carried++
		}
	}
	if carried != 2 {
		return errors.Join(fmt.Errorf("%d connections of the new process carried requests, want 2", carried), old.Close())
	}
	return errors.Join(pause(bounded, 300*time.Millisecond), old.Close())
}

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/edgeward/edgeward/test/rig"
)

// The demo asks LAPI far more often than the 10 s that are the default, so that
// nobody has to wait for what is shown.
const pollInterval = time.Second

// prompt is the longest that a decision may take to be in force: the poll
// interval, and one second for the rest.
const prompt = pollInterval + time.Second

// trustedProxy is the one address whose CF-Connecting-IP header is believed.
const trustedProxy = "127.0.0.9"

// gateway is everything the demo runs, and the clients that talk to it. All of
// 127.0.0.0/8 is loopback, so each client really connects from an address of
// its own.
type gateway struct {
	*story

	lapi    *rig.LAPI
	traefik *rig.Traefik
	origin  *rig.Origin
	node    *node // nil where barred says why
	barred  error
	tunnel  *tunnel
	vpn     *vpn  // nil where barred or closed says why
	closed  error // to the VPN alone

	bin      string                  // directory of the commands to type
	dynamic  string                  // Traefik's dynamic configuration, with REVISION in it
	clients  map[string]*http.Client // by address
	began    time.Time
	stopped  func() // ends the origin, which has no end of its own
	revision int
}

// open starts everything and returns when the gateway serves; the tunnel begins in
// the story. Where programs names no directory that has them, they are built. ctx
// bounds the start alone: what runs is ended by close, in order.
func open(ctx context.Context, s *story, programs string) (_ *gateway, err error) {
	g := &gateway{story: s, clients: map[string]*http.Client{}, began: time.Now()}
	life, cancel := context.WithCancel(context.WithoutCancel(ctx))
	g.stopped = cancel
	interrupted := context.AfterFunc(ctx, cancel)
	defer func() {
		interrupted()
		if err != nil {
			err = errors.Join(err, g.close())
		}
	}()
	if g.tunnel, err = layTunnel(life, g, programs); err != nil {
		return nil, err
	}
	if g.origin, err = rig.StartOrigin(life); err != nil {
		return nil, err
	}
	if g.lapi, err = rig.StartLAPI(life, rig.LAPIOptions{Socket: true}); err != nil {
		return nil, err
	}
	key, err := g.lapi.AddBouncer(ctx, "demo")
	if err != nil {
		return nil, err
	}
	if g.traefik, err = rig.StartTraefik(life, rig.TraefikOptions{}); err != nil {
		return nil, err
	}
	g.dynamic = strings.NewReplacer("ORIGIN", g.origin.URL, "LAPI", g.lapi.URL, "KEY", key,
		"INTERVAL", pollInterval.String(), "PROXY", trustedProxy, "HOST", publicHost, "SIGNED", g.tunnel.file("identity-key")).Replace(`
http:
  routers:
    site: {rule: "PathPrefix(` + "`/`" + `)", service: origin, middlewares: [revision, enforce]}
    observed: {rule: "PathPrefix(` + "`/observed`" + `)", service: origin, middlewares: [observe]}
    public: {rule: "Host(` + "`HOST`" + `)", service: origin, middlewares: [revision, signed]}
  services:
    origin: {loadBalancer: {servers: [{url: "ORIGIN"}]}}
  middlewares:
    revision: {headers: {customResponseHeaders: {X-Revision: "REVISION"}}}
    enforce:
      plugin:
        edgeward:
          lapi: &lapi {url: "LAPI", key: "KEY", interval: INTERVAL}
          client: {trustedProxies: [PROXY], header: CF-Connecting-IP}
          rateLimits:
            - {name: login, average: 30, period: 1m, burst: 3, match: {pathPrefixes: [/login]}}
    observe:
      plugin:
        edgeward:
          mode: observe
          lapi: *lapi
    signed:
      plugin:
        edgeward:
          lapi: *lapi
          client: {preset: edgeward-tunnel, keyFile: "SIGNED"}
`)
	if err := g.configure(ctx); err != nil {
		return nil, err
	}
	if err := g.commands(ctx); err != nil {
		return nil, err
	}
	if g.barred = closedDoor(ctx); g.barred == nil {
		if g.node, err = openNode(ctx, life, g); err != nil {
			return nil, err
		}
		if err := g.node.addCommands(); err != nil {
			return nil, err
		}
		if g.vpn, g.closed, err = layVPN(ctx, life, g); err != nil {
			return nil, err
		}
	}
	return g, g.tunnel.open(ctx)
}

// configure hands Traefik its dynamic configuration as a new revision of it.
func (g *gateway) configure(ctx context.Context) error {
	g.revision++
	return g.traefik.SetDynamic(ctx, strings.ReplaceAll(g.dynamic, "REVISION", strconv.Itoa(g.revision)))
}

// commands makes a directory for the user's PATH with a cscli that finds its
// configuration, so that the commands shown can be typed as they are.
func (g *gateway) commands(ctx context.Context) error {
	cscli, err := rig.Tool(ctx, "cscli")
	if err != nil {
		return err
	}
	if g.bin, err = os.MkdirTemp("", "edgeward-demo-"); err != nil {
		return fmt.Errorf("make a directory for the commands: %w", err)
	}
	return g.command("cscli", fmt.Sprintf("exec '%s' -c '%s'", cscli, filepath.Join(g.lapi.Dir, "etc", "config.yaml")))
}

// command writes a command into that directory. does is a shell script, the last
// line of which is given the arguments.
func (g *gateway) command(name, does string) error {
	if err := os.WriteFile(filepath.Join(g.bin, name), []byte("#!/bin/sh\n"+does+" \"$@\"\n"), 0o755); err != nil {
		return fmt.Errorf("write the commands: %w", err)
	}
	return nil
}

// types shows a command of the directory on the PATH, runs it, and returns what
// it wrote.
func (g *gateway) types(ctx context.Context, name string, args ...string) (string, error) {
	command := name
	for _, arg := range args {
		if strings.Contains(arg, " ") {
			arg = `"` + arg + `"`
		}
		command += " " + arg
	}
	g.does(command)
	out, _, err := g.call(ctx, name, args...)
	return out, err
}

// call runs a command of the directory on the PATH and returns what it wrote to
// standard output, and what it said beside that.
func (g *gateway) call(ctx context.Context, name string, args ...string) (out, said string, err error) {
	var wrote, wrong bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(g.bin, name), args...)
	cmd.Stdout, cmd.Stderr = &wrote, &wrong
	if err := cmd.Run(); err != nil {
		return wrote.String(), wrong.String(), fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(wrong.Bytes()))
	}
	return wrote.String(), wrong.String(), nil
}

// close ends everything and removes what it wrote.
func (g *gateway) close() error {
	var errs []error
	for _, client := range g.clients {
		client.CloseIdleConnections()
	}
	if g.vpn != nil {
		errs = append(errs, g.vpn.close())
	}
	if g.node != nil {
		errs = append(errs, g.node.close())
	}
	if g.tunnel != nil {
		errs = append(errs, g.tunnel.close())
	}
	if g.traefik != nil {
		errs = append(errs, g.traefik.Close())
	}
	if g.lapi != nil {
		errs = append(errs, g.lapi.Close())
	}
	if g.bin != "" {
		errs = append(errs, os.RemoveAll(g.bin))
	}
	g.stopped()
	return errors.Join(errs...)
}

// site is the gateway's address as one types it to curl.
func (g *gateway) site() string { return strings.TrimPrefix(g.traefik.URL, "http://") }

// introduce says what runs, and what to know to follow the story; a story that is
// told once ends too soon to type along.
func (g *gateway) introduce(once bool) {
	g.say("up after %s, all on loopback; each client has an address in 127.0.0.0/8\n", spoken(time.Since(g.began)))
	if g.barred != nil {
		g.say("The kernel layer and the VPN are left out: they need root and namespaces\n(sudo make demo).")
	}
	if g.closed != nil {
		g.say("The VPN is left out: it needs /dev/net/tun, and the right to open it.")
	}
	if !once {
		g.say("To type along, in another shell:\n    export PATH=%s:$PATH", g.bin)
	}
	g.say("Plugin, node bouncer and tunnel ask LAPI every %s here; 10 s is the default.", pollInterval)
}

// invite says what there is to play with while the demo stays up.
func (g *gateway) invite(failed []string) {
	if len(failed) == 0 {
		g.say("\nEvery step held. The gateway stays up until Ctrl-C. In another shell\nof the same user:\n")
	} else {
		g.say("\n%d of the steps did not hold. The gateway stays up until Ctrl-C. In another\nshell of the same user:\n", len(failed))
	}
	g.say(`  export PATH=%[1]s:$PATH
  curl -i --interface 127.0.0.2 %[2]s
  cscli decisions add --ip 127.0.0.2 --duration 1m
  cscli decisions list
  cscli decisions delete --ip 127.0.0.2
  for i in 1 2 3 4; do curl -si --interface 127.0.0.2 %[2]s/login; done
  kill -STOP %[3]d; sleep 5; kill -CONT %[3]d     # LAPI hangs for a while
%[10]s%[11]s%[12]s
  configuration  %[4]s
                 %[5]s
  refusals       %[6]s
  LAPI           %[7]s, log in
                 %[8]s
  Traefik        %[9]s/api/rawdata`,
		g.bin, g.site(), g.lapi.PID(),
		filepath.Join(g.traefik.Dir, "traefik.yml"), filepath.Join(g.traefik.Dir, "dynamic", "dynamic.yml"),
		filepath.Join(g.traefik.Dir, "traefik.log"), g.lapi.URL, filepath.Join(g.lapi.Dir, "crowdsec.log"), g.traefik.APIURL, g.node.invite(), g.tunnel.invite(), g.vpn.invite())
}

// answer is what a client got.
type answer struct {
	status int
	header http.Header
	body   string
	took   time.Duration
}

// client returns the client that connects from an address. The story asks for
// one client at a time; what it gets may be shared by goroutines.
func (g *gateway) client(from string) *http.Client {
	if g.clients[from] == nil {
		dialer := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		g.clients[from] = &http.Client{
			Timeout:   10 * time.Second,
			Transport: &http.Transport{DialContext: dialer.DialContext, MaxIdleConnsPerHost: 8},
		}
	}
	return g.clients[from]
}

// get sends one request. headers are names and values in turn.
func (g *gateway) get(ctx context.Context, from, path string, headers ...string) (answer, error) {
	return fetch(ctx, g.client(from), g.traefik.URL+path, headers...)
}

func fetch(ctx context.Context, client *http.Client, url string, headers ...string) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return answer{}, fmt.Errorf("make a request: %w", err)
	}
	for i := 0; i+1 < len(headers); i += 2 {
		if headers[i] == "Host" {
			req.Host = headers[i+1]
			continue
		}
		req.Header.Set(headers[i], headers[i+1])
	}
	began := time.Now()
	resp, err := client.Do(req)
	if err != nil {
		return answer{}, fmt.Errorf("send a request: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return answer{}, fmt.Errorf("read an answer: %w", err)
	}
	return answer{resp.StatusCode, resp.Header, string(body), time.Since(began)}, nil
}

// curl shows a request as the command that makes it, sends it, and demands a
// status.
func (g *gateway) curl(ctx context.Context, want int, from, path string, headers ...string) (answer, error) {
	return g.curlAt(ctx, want, from, g.site()+path, headers...)
}

// curlAt is curl to what may be another place than the gateway: HOST:PORT/PATH.
func (g *gateway) curlAt(ctx context.Context, want int, from, url string, headers ...string) (answer, error) {
	const room = width - 4 - len(` \`)
	words := make([]string, 0, len(headers)/2+1)
	for i := 0; i+1 < len(headers); i += 2 {
		words = append(words, fmt.Sprintf("-H '%s: %s'", headers[i], headers[i+1]))
	}
	lines := []string{"curl --interface " + from}
	for _, word := range append(words, url) {
		if last := &lines[len(lines)-1]; len(*last)+1+len(word) <= room {
			*last += " " + word
		} else {
			lines = append(lines, "  "+word)
		}
	}
	g.does(strings.Join(lines, " \\\n    "))
	a, err := fetch(ctx, g.client(from), "http://"+url, headers...)
	if err != nil {
		return a, err
	}
	if a.status != want {
		return a, fmt.Errorf("%s got %d, want %d: %s", from, a.status, want, strings.TrimSpace(a.body))
	}
	return a, nil
}

// cscli shows a command of CrowdSec's and runs it.
func (g *gateway) cscli(ctx context.Context, args ...string) error {
	g.does("cscli " + strings.Join(args, " "))
	_, err := g.lapi.Cscli(ctx, args...)
	return err
}

// await asks again and again until a client gets a status, and returns how long
// that took. Until then it must get what it got at first: a gateway that
// wavers or breaks in between is at fault.
func (g *gateway) await(ctx context.Context, want int, from string, limit time.Duration) (took time.Duration, err error) {
	began := time.Now()
	first := 0
	for {
		a, err := g.get(ctx, from, "/")
		took = time.Since(began)
		switch {
		case err != nil:
			return took, err
		case a.status == want:
			if took > limit {
				return took, fmt.Errorf("%s got %d after %s, want at most %s", from, want, spoken(took), limit)
			}
			return took, nil
		case first == 0:
			first = a.status
		case a.status != first:
			return took, fmt.Errorf("%s got %d between %d and %d: %s", from, a.status, first, want, strings.TrimSpace(a.body))
		}
		if took > limit+5*time.Second {
			return took, fmt.Errorf("%s still gets %d after %s, want %d within %s", from, a.status, spoken(took), want, limit)
		}
		if err := pause(ctx, 10*time.Millisecond); err != nil {
			return took, err
		}
	}
}

// pause waits, but no longer than ctx lives.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}

package node_test

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/edgeward/edgeward/test/rig/rigtest"
)

// Where things are on the node, which is a network of its own.
const (
	originPort  = 3000
	traefikPort = 8000
	nginxPort   = 8001
	// The node's own addresses are never refused, so clients come from afar.
	authSection = `
firewall:
  exempt: [lo, up0] # else the kernel drops before any proxy is asked
auth:
  listen: 127.0.0.1:9478
  trustedProxies: [127.0.0.1]
`
)

// TestProxiesAskTheNode has the real Traefik and the real nginx ask the agent
// about clients with addresses of their own, of both families: bans of LAPI and of
// a list stop them there, and no header of theirs helps.
func TestProxiesAskTheNode(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	list := w.write("mine.netset", "# nobody yet\n")
	w.extra = authSection + "lists:\n  - {name: mine, path: " + list + "}\n"
	w.origin()
	w.traefik(t)
	w.nginx(t)
	proxies := map[string]uint16{"traefik": traefikPort, "nginx": nginxPort}
	told := func(from netip.Addr, port uint16, header ...string) int {
		for attempt := 0; ; attempt++ { // a busy machine may be slow to connect
			code, err := w.request(from, port, header...)
			if err == nil || attempt == 5 {
				return code
			}
		}
	}
	wants := func(what string, from netip.Addr, want int) {
		t.Helper()
		for name, port := range proxies {
			w.until(fmt.Sprintf("%s: %s answers %v with %d", what, name, from, want), 10*time.Second, func() bool { return told(from, port) == want })
		}
	}
	wants("without an agent", good4, http.StatusInternalServerError)
	a := w.start()
	a.ready()
	all := []netip.Addr{good4, good6, bad4, bad6}
	for _, from := range all {
		wants("before any ban", from, http.StatusOK)
	}
	w.must(w.lapi.Ban(t.Context(), bad4.String(), time.Hour))
	wants("banned by LAPI", bad4, http.StatusForbidden)
	wants("not banned", good4, http.StatusOK)
	w.write("mine.netset", "2001:db8:f00::40/122 # IPv6\nnonsense\n")
	wants("banned by the list", bad6, http.StatusForbidden)
	wants("not on the list", good6, http.StatusOK)

	for name, port := range proxies {
		for _, from := range []netip.Addr{bad4, bad6} {
			for _, claim := range []string{"X-Forwarded-For: 203.0.113.7", "X-Forwarded-For: 127.0.0.1", "X-Real-IP: 203.0.113.7", "Forwarded: for=203.0.113.7", "CF-Connecting-IP: 203.0.113.7"} {
				if code := told(from, port, claim); code != http.StatusForbidden {
					t.Errorf("%s: %v passes with %q: %d", name, from, claim, code)
				}
			}
		}
		if code := told(good4, port, "X-Forwarded-For: "+bad4.String()); code != http.StatusOK {
			t.Errorf("%s: %v is refused for naming another: %d", name, good4, code)
		}
	}
	if why := w.mustCLI("why", bad6.String()); !strings.Contains(why, "lists") || !strings.Contains(why, "as long as listed") {
		t.Error(why)
	}
	if status := w.mustCLI("status"); !strings.Contains(status, "mine, 1 entry, 1 unreadable line,") {
		t.Error(status)
	}
	for _, want := range []string{`"msg":"request refused"`, `"address":"` + bad4.String() + `"`, `"origin":"lists:mine"`, `line 2: neither an address nor a range`} {
		if !strings.Contains(strings.ReplaceAll(a.logged(), `\\`, `\`), want) {
			t.Errorf("the log does not say %s", want)
		}
	}
	_, page, err := a.get("/metrics")
	w.must(err)
	for _, want := range []string{`edgeward_auth_refused_total{ip_type="ipv6",origin="lists:mine",remediation="ban"}`, `edgeward_list_entries{list="mine"} 1`} {
		if !strings.Contains(page, want) {
			t.Errorf("no metric says %s", want)
		}
	}

	w.must(w.lapi.Unban(t.Context(), bad4.String()))
	w.write("mine.netset", "# nobody any more\n")
	for _, from := range all {
		wants("after the bans", from, http.StatusOK)
	}
}

// TestListsWithoutLAPI: a file and the kernel are enough, and the bans outlive
// the agent.
func TestListsWithoutLAPI(t *testing.T) {
	t.Parallel()
	w := &world{t: t, dir: t.TempDir(), program: built(t)}
	w.network()
	list := w.write("mine.netset", "\ufeff203.0.113.66\r\n2001:db8:f00::40/122\r\n")
	w.file = fmt.Sprintf("lists:\n  - {name: mine, path: %s}\nsocket: %s\nstateDir: %s\n", list, filepath.Join(w.dir, "bouncer.sock"), filepath.Join(w.dir, "state"))
	a := w.start()
	a.ready()
	if w.passes(bad4) || w.passes(bad6) || !w.passes(good4) || !w.passes(good6) {
		t.Error("the list is not what is enforced")
	}
	w.write("mine.netset", "2001:db8:f00::66\n203.0.113.70\n")
	w.until("the changed list is enforced", 10*time.Second, func() bool { return w.passes(bad4) })
	if w.passes(bad6) {
		t.Error("what stayed on the list passes")
	}
	w.must(os.Remove(list))
	a.stop(syscall.SIGTERM)
	if w.passes(bad6) {
		t.Error("the list ended with the agent")
	}
	a = w.start()
	a.ready()
	if w.passes(bad6) || !w.passes(bad4) {
		t.Error("without its file, a restarted agent does not know the list")
	}
}

// origin is what the proxies serve.
func (w *world) origin() {
	var l net.Listener
	w.node.Must(func() (err error) {
		l, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", originPort))
		return err
	})
	server := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { fmt.Fprintln(rw, "hello") })}
	go server.Serve(l)
	w.t.Cleanup(func() { server.Close() })
}

// run runs a proxy on the node for the length of the test, once it serves.
func (w *world) run(port uint16, name string, args ...string) {
	w.t.Helper()
	log, err := os.Create(filepath.Join(w.dir, filepath.Base(name)+".log"))
	w.must(err)
	cmd := exec.Command(name, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = w.dir, log, log
	w.node.Must(cmd.Start)
	w.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if w.t.Failed() {
			text, _ := os.ReadFile(log.Name())
			w.t.Logf("%s said:\n%s", name, text)
		}
		log.Close()
	})
	w.until(name+" serves", 20*time.Second, func() bool {
		c, err := w.client.Dial(good4, netip.AddrPortFrom(node4, port))
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// traefik runs with the middleware of docs/auth.md.
func (w *world) traefik(t testing.TB) {
	w.write("dynamic.yml", fmt.Sprintf(`
http:
  routers:
    site: {rule: "PathPrefix(`+"`/`"+`)", service: site, middlewares: [edgeward]}
  services:
    site: {loadBalancer: {servers: [{url: "http://127.0.0.1:%d"}]}}
  middlewares:
    edgeward:
      forwardAuth:
        address: http://127.0.0.1:9478/v1/auth
`, originPort))
	static := w.write("traefik.yml", fmt.Sprintf("global: {checkNewVersion: false, sendAnonymousUsage: false}\nentryPoints: {web: {address: \":%d\"}}\nproviders: {file: {filename: %s}}\n",
		traefikPort, filepath.Join(w.dir, "dynamic.yml")))
	w.run(traefikPort, rigtest.Tool(t, "traefik"), "--configfile="+static)
	w.until("Traefik has its router", 20*time.Second, func() bool {
		code, err := w.request(good4, traefikPort)
		return err == nil && code != http.StatusNotFound
	})
}

// nginx runs with the location that docs/auth.md gives.
func (w *world) nginx(t testing.TB) {
	config := w.write("nginx.conf", fmt.Sprintf(`
daemon off;
master_process off;
pid %[1]s/nginx.pid;
error_log stderr warn;
events {}
http {
  access_log off;
  client_body_temp_path %[1]s/body;
  proxy_temp_path %[1]s/proxy;
  fastcgi_temp_path %[1]s/fastcgi;
  uwsgi_temp_path %[1]s/uwsgi;
  scgi_temp_path %[1]s/scgi;
  server {
    listen [::]:%[2]d ipv6only=off;
    location / {
      auth_request /edgeward;
      proxy_pass http://127.0.0.1:%[3]d;
    }
    location = /edgeward {
      internal;
      proxy_pass http://127.0.0.1:9478/v1/auth;
      proxy_pass_request_body off;
      proxy_set_header Content-Length "";
      proxy_set_header X-Forwarded-For $remote_addr;
    }
  }
}
`, w.dir, nginxPort, originPort))
	w.run(nginxPort, rigtest.Nginx(t), "-c", config, "-p", w.dir, "-e", "stderr")
}

// request asks a proxy on the node for its site, from a client's address, and
// returns the status.
func (w *world) request(from netip.Addr, port uint16, header ...string) (int, error) {
	to := node4
	if from.Is6() {
		to = node6
	}
	c, err := w.client.Dial(from, netip.AddrPortFrom(to, port))
	if err != nil {
		return 0, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: blog.example.com\r\nConnection: close\r\n%s\r\n", strings.Join(append(header, ""), "\r\n"))
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return 0, err
	}
	return res.StatusCode, res.Body.Close()
}

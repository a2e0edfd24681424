package node_test

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/edgeward/edgeward/bouncer"
	"github.com/edgeward/edgeward/test/rig"
)

// arrive sends datagrams from addresses of the client and returns those from
// which they reached the node's server. Answers do not count: a node may send
// them elsewhere.
func (w *world) arrive(from ...netip.Addr) []netip.Addr {
	w.t.Helper()
	before := w.server.Received()
	w.client.Must(func() error {
		for _, a := range from {
			to := netip.AddrPortFrom(node4, w.server.Addr.Port())
			if a.Is6() {
				to = netip.AddrPortFrom(node6, w.server.Addr.Port())
			}
			c, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, 0)), net.UDPAddrFromAddrPort(to))
			if err != nil {
				return err
			}
			defer c.Close()
			if _, err := c.Write([]byte("hello")); err != nil {
				return err
			}
		}
		return nil
	})
	// Who stays out is known only when the server has read what came after, and
	// a while later.
	w.until("the server answers its own node", 5*time.Second, func() bool {
		return w.node.UDP(node4, netip.AddrPortFrom(node4, w.server.Addr.Port())) == nil
	})
	for settled := time.Now().Add(100 * time.Millisecond); ; time.Sleep(time.Millisecond) {
		after := w.server.Received()
		there := slices.DeleteFunc(slices.Clone(from), func(a netip.Addr) bool { return after[a] == before[a] })
		if len(there) == len(from) || time.Now().After(settled) {
			return there
		}
	}
}

// protectedTable is whom no ban may shut out, whoever says it.
var protectedTable = []struct{ addr, why string }{
	{"192.0.2.2", "the default gateway"},
	{"2001:db8::2", "the default gateway"},
	{"203.0.113.9", "LAPI"},
	{"203.0.113.10", "the Kubernetes API server"},
	{"203.0.113.11", "the Kubernetes control plane"},
	{"203.0.113.53", "a DNS server of this node"},
	{"203.0.113.54", "a DNS server of this node"}, // whom systemd-resolved asks
	{"203.0.113.7", "protect.addresses"},
	{"2001:db8:f00::7", "protect.addresses"},
	{"10.42.7.7", "protect.cluster: pods and services"},
	{"10.43.0.1", "protect.cluster: pods and services"},
	{"10.8.0.5", "a VPN of this node"},
	{"10.9.1.1", "a VPN of this node"}, // behind a peer
	{"104.16.5.5", "Cloudflare's edge"},
	{"2606:4700::5", "Cloudflare's edge"},
}

// TestOwnerStaysIn bans what must not be banned: each protected address, the
// range around it, halves of the world and all of it, in the name of CrowdSec's
// community, of a blocklist, and of the owner. Packets show who stays in, and
// that everybody else is out.
func TestOwnerStaysIn(t *testing.T) {
	t.Parallel()
	w, fake := newFakeWorld(t)
	parse, prefix := netip.MustParseAddr, netip.MustParsePrefix
	for _, p := range []string{"10.42.0.0/16", "10.43.0.0/16", "10.8.0.0/24", "10.9.0.0/16", "104.16.0.0/13", "172.20.0.0/16", "2606:4700::/32"} {
		w.client.Own(prefix(p))
	}
	w.node.Route(prefix("0.0.0.0/0"), parse("192.0.2.2"))
	w.node.Route(prefix("::/0"), parse("2001:db8::2"))
	for _, cmd := range []string{"ip tuntap add dev wg0 mode tun", "ip addr add 10.8.0.1/24 dev wg0", "ip link set wg0 up", "ip route add 10.9.0.0/16 dev wg0 table 52"} {
		args := strings.Fields(cmd)
		w.node.MustExec(args[0], args[1:]...)
	}
	// A LAPI across the wire, which has to be reached whatever it says.
	var l net.Listener
	w.client.Must(func() (err error) {
		l, err = net.Listen("tcp", "203.0.113.9:0")
		return err
	})
	lapi := &http.Server{Handler: fake, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = lapi.Serve(l) }()
	t.Cleanup(func() { lapi.Close() })
	w.url = "http://" + l.Addr().String()
	w.env = []string{"KUBERNETES_SERVICE_HOST=203.0.113.10"}
	resolv := w.write("resolv", "nameserver 203.0.113.53\n")
	upstream := w.write("upstream", "nameserver 203.0.113.54\n")
	servers := w.write("servers", `{"ServerURL": "https://203.0.113.11:6443", "ServerAddresses": ["203.0.113.11:6443"]}`)
	w.enter = func(cmd *exec.Cmd) { // the files of a machine of its own
		through(cmd, `mount -t tmpfs none /run && mkdir -p /run/systemd/resolve && cp "$2" /run/systemd/resolve/resolv.conf && : > /run/systemd/resolve/stub-resolv.conf &&
			mount --bind "$1" /etc/resolv.conf &&
			mount -t tmpfs none /var/lib && mkdir -p /var/lib/rancher/k3s/agent/etc && cp "$3" /var/lib/rancher/k3s/agent/etc/k3s-agent-load-balancer.json &&
			shift 3 && exec "$@"`, resolv, upstream, servers)
		cmd.Args = append([]string{"unshare", "--mount"}, cmd.Args...)
		cmd.Path, _ = exec.LookPath("unshare")
	}
	w.extra = "protect:\n  addresses:\n    - 203.0.113.7\n    - 2001:db8:f00::7\n"
	a := w.start()
	a.ready()

	var owners []netip.Addr
	for _, p := range protectedTable {
		owners = append(owners, parse(p.addr))
	}
	others := []netip.Addr{bad4, bad6, parse("198.51.100.200"), parse("2001:db8:f00:1::1")}
	if got := w.arrive(slices.Concat(owners, others)...); len(got) != len(owners)+len(others) {
		t.Fatalf("before any ban, only these arrive: %v", got)
	}
	id := int64(0)
	var held []rig.FakeDecision
	ban := func(values ...string) {
		t.Helper()
		gone := held
		held = nil
		for _, v := range values {
			for _, origin := range []string{"CAPI", "lists", "cscli"} {
				id++
				scope := "Ip"
				if strings.Contains(v, "/") {
					scope = "Range"
				}
				held = append(held, rig.FakeDecision{ID: id, Origin: origin, Type: "ban", Scope: scope, Value: v, Duration: "1h", Scenario: "test"})
			}
		}
		pulls := len(fake.Requests())
		fake.Next(rig.AnswerStream(held, gone))
		w.until("the decisions were pulled", 5*time.Second, func() bool { return len(fake.Requests()) > pulls })
	}
	stay := func(what string, out ...netip.Addr) {
		t.Helper()
		w.until(what+": the others are out", 5*time.Second, func() bool { return len(w.arrive(out...)) == 0 })
		got := w.arrive(owners...)
		for _, p := range protectedTable {
			if !slices.Contains(got, parse(p.addr)) {
				t.Errorf("%s: %s is locked out (%s)", what, p.addr, p.why)
			}
		}
		if err := w.node.TCP(node4, netip.AddrPortFrom(node4, w.server.Addr.Port())); err != nil {
			t.Errorf("%s: the node cannot talk to itself: %v", what, err)
		}
		if code, _, err := a.get("/healthz"); code != http.StatusOK {
			t.Errorf("%s: the agent cannot be asked over loopback: %v", what, err)
		}
	}

	var exact, around []string
	for _, p := range owners {
		exact = append(exact, p.String())
		wide, _ := p.Prefix(p.BitLen() - 8)
		around = append(around, wide.String())
	}
	own := []string{node4.String(), node6.String(), "127.0.0.1", "::1", "fe80::1"}
	ban(slices.Concat(exact, own, []string{bad4.String()})...)
	stay("each address", bad4)
	if got := w.arrive(others[1:]...); len(got) != len(others)-1 {
		t.Errorf("of those that nobody banned, only these arrive: %v", got)
	}
	var s bouncer.Status
	w.must(json.Unmarshal([]byte(w.mustCLI("status", "--output", "json")), &s))
	why := map[string]string{}
	for _, c := range s.Covered {
		why[c.Prefix.Addr().String()] = c.Protects
	}
	for _, p := range protectedTable {
		if why[p.addr] != p.why {
			t.Errorf("status says that %s is covered as %q, want %q", p.addr, why[p.addr], p.why)
		}
		if text := w.mustCLI("why", p.addr); !strings.Contains(text, ": pass: decisions hold it, but it is protected: "+p.why) {
			t.Errorf("why %s: %s", p.addr, text)
		}
	}
	for _, addr := range own {
		if why[addr] == "" {
			t.Errorf("status does not say that %s is covered", addr)
		}
	}
	if log := a.logged(); !strings.Contains(log, "a decision covers a protected address") || !strings.Contains(log, `"protects":"the default gateway"`) {
		t.Error("the log does not warn")
	}

	ban(slices.Compact(around)...)
	stay("the ranges around", bad4)
	ban("0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1")
	stay("halves of the world", others...)
	ban("0.0.0.0/0", "::/0", "fe80::/10", "127.0.0.0/8")
	stay("all of the world", others...)

	// Nobody is found on a link without its neighbours.
	w.node.MustExec("ip", "neigh", "flush", "all")
	w.client.MustExec("ip", "neigh", "flush", "all")
	for _, from := range []netip.Addr{good4, good6} {
		if !w.passes(from) {
			t.Errorf("with no neighbour known, %v is locked out", from)
		}
	}

	// A private range is banned by who knows it, and by nobody else.
	private := parse("172.20.1.1")
	ban(bad4.String())
	w.until("the world is back", 5*time.Second, func() bool { return len(w.arrive(bad6, private)) == 2 })
	for _, origin := range []string{"CAPI", "lists", "cscli"} {
		id++
		fake.Next(rig.AnswerStream([]rig.FakeDecision{{ID: id, Origin: origin, Type: "ban", Scope: "Ip", Value: private.String(), Duration: "1h", Scenario: "test"}}, nil))
		w.until(fmt.Sprintf("the ban of %s arrived", origin), 5*time.Second, func() bool {
			return strings.Contains(w.mustCLI("why", private.String()), origin)
		})
		if got := len(w.arrive(private)) == 1; got != (origin != "cscli") {
			t.Errorf("banned by %s, packets from %v arrive: %v", origin, private, got)
		}
	}
}

// TestAllowlist: what is on an allowlist of LAPI is neither banned anew nor stays
// banned, because LAPI itself leaves it out.
func TestAllowlist(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.must(w.lapi.Ban(t.Context(), bad4.String(), time.Hour))
	a := w.start()
	a.ready()
	w.until("the ban is enforced", 5*time.Second, func() bool { return !w.passes(bad4) })
	for _, args := range [][]string{{"allowlists", "create", "friends", "-d", "test"}, {"allowlists", "add", "friends", bad4.String(), "198.51.100.0/24"}} {
		_, err := w.lapi.Cscli(t.Context(), args...)
		w.must(err)
	}
	w.until("the ban is over", 10*time.Second, func() bool { return w.passes(bad4) })
	_ = w.lapi.Ban(t.Context(), "198.51.100.9", time.Hour) // LAPI may refuse it outright
	w.must(w.lapi.Ban(t.Context(), bad6.String(), time.Hour))
	w.until("the next ban is enforced", 5*time.Second, func() bool { return !w.passes(bad6) })
	if !w.passes(netip.MustParseAddr("198.51.100.9")) {
		t.Error("what LAPI has on an allowlist is banned")
	}
}

package vpn_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
)

func at(text string) netip.AddrPort { return netip.MustParseAddrPort(text) }

// TestGrantedAndNothingElse has two peers with stock tools: each reaches what it
// was granted, by name and by address, with IPv4 and IPv6, and is refused
// everything else at once.
func TestGrantedAndNothingElse(t *testing.T) {
	w := newWorld(t)
	upstream(t, w)
	w.start()
	alice, bob := w.add("alice", "--group", "family"), w.add("bob", "--group", "admins")
	// Whoever has the device may send what they like to the gateway.
	for _, own := range []string{"203.0.113.2/32", "2001:db8:1::2/128"} {
		w.gateway.Own(netip.MustParsePrefix(own))
	}
	alice.sends("192.168.7.1/32, fd07::1/128, 203.0.113.2/32, 2001:db8:1::2/128")
	alice.up()
	bob.up()
	alice.reaches(at("192.168.7.9:80"))
	bob.reaches(at("192.168.7.9:80"))
	// What nobody listens on would be refused without any rule.
	bob.Serve(netip.AddrPortFrom(netip.IPv6Unspecified(), 22))
	w.gateway.Serve(at("10.66.0.1:9479"))
	w.gateway.Serve(at("[fd66::1]:9479"))

	for _, c := range []struct {
		client *client
		who    string
		host   string
		port   uint16
		may    bool
	}{
		{alice, "alice", "grafana.home.example.com", 80, true}, {bob, "bob", "grafana.home.example.com", 80, true},
		{alice, "alice", "nas.home.example.com", 445, false}, {bob, "bob", "nas.home.example.com", 445, true},
		{alice, "alice", "wiki.apps.example.com", 8443, true}, {bob, "bob", "wiki.apps.example.com", 8443, false},
	} {
		for _, qtype := range []string{"A", "AAAA"} {
			addrs, _, err := c.client.resolve(c.host, qtype)
			if err != nil || len(addrs) != 1 || addrs[0].Is4() != (qtype == "A") {
				t.Errorf("%s asks for %s %s: %v %v", c.who, c.host, qtype, addrs, err)
				continue
			}
			to := netip.AddrPortFrom(addrs[0], c.port)
			if err = c.client.refused(to); c.may {
				err = c.client.TCP(c.client.from(to.Addr()), to)
			}
			if err != nil {
				t.Errorf("%s and %s (%s), which it may reach %v: %v", c.who, to, c.host, c.may, err)
			}
		}
	}
	for what, to := range map[string]string{
		"another port of a granted host": "192.168.7.9:445", "another port by IPv6": "[fd07::9]:445",
		"a translated address by its target": "192.168.7.9:8443", "that by IPv6": "[fd07::9]:8443",
		"the gateway itself": "10.66.0.1:22", "that by IPv6, too": "[fd66::1]:22",
		"that by its address on the LAN": "192.168.7.1:22", "that on the LAN by IPv6": "[fd07::1]:22",
		"that by a public address": "203.0.113.2:22", "that by a public address of IPv6": "[2001:db8:1::2]:22",
		"the gateway's port 9479": "10.66.0.1:9479", "that port by IPv6": "[fd66::1]:9479",
		"the resolver's own port": "10.66.0.1:51853", "that of the resolver by IPv6": "[fd66::1]:51853",
		"another peer": bob.addrs[0].String() + ":22", "another peer by IPv6": "[" + bob.addrs[1].String() + "]:22",
	} {
		if err := alice.refused(at(to)); err != nil {
			t.Errorf("%s, %s: %v", what, to, err)
		}
	}
	if err := alice.UDP(alice.addrs[0], at("192.168.7.9:80")); err != nil {
		t.Errorf("a granted service by UDP: %v", err)
	}
	if err := w.lan.TCP(netip.MustParseAddr("192.168.7.9"), netip.AddrPortFrom(alice.addrs[0], 22)); err == nil {
		t.Error("the LAN reaches a peer that did not ask")
	}
	for to, may := range map[string]bool{"10.66.0.1": true, "fd66::1": true, "192.168.7.9": false, "fd07::10": false} {
		if err := alice.ping(netip.MustParseAddr(to)); (err == nil) != may {
			t.Errorf("a ping to %s: %v", to, err)
		}
	}
	// The service sees who comes.
	for from := range w.web.Received() {
		if from != alice.addrs[0] {
			t.Errorf("the service was asked by %v, not by %v", from, alice.addrs[0])
		}
	}

	// All other names.
	for name, want := range map[string]string{"www.example.org": "NOERROR [192.0.2.80]", "unknown.home.example.com": "NXDOMAIN []", "missing.example.org": "NXDOMAIN []"} {
		addrs, rcode, err := alice.resolve(name, "A")
		if got := fmt.Sprint(dns.RcodeToString[rcode], " ", addrs); err != nil || got != want {
			t.Errorf("%s is %s %v, want %s", name, got, err, want)
		}
	}
	w.lan.Must(func() error {
		q := new(dns.Msg)
		q.SetQuestion("grafana.home.example.com.", dns.TypeA)
		for _, server := range []string{"192.168.7.1:53", "192.168.7.1:51853", "10.66.0.1:51853"} {
			client := &dns.Client{Timeout: 300 * time.Millisecond}
			if m, _, err := client.Exchange(q, server); err == nil && m.Rcode != dns.RcodeRefused {
				t.Errorf("who is no peer is answered at %s: %v", server, m)
			}
		}
		return nil
	})

	s := w.status()
	if s.VPN.Mode != "userspace" || s.Trouble != "" || len(s.VPN.Denied) == 0 {
		t.Errorf("the status is %+v", s)
	}
	found := false
	for _, d := range s.VPN.Denied {
		found = found || d.Peer == "alice" && d.To == "192.168.7.10" && d.Port == 445 && d.Service == "nas"
	}
	if !found {
		t.Errorf("nobody was denied the NAS: %+v", s.VPN.Denied)
	}
	metrics := w.metrics()
	for _, want := range []string{`edgeward_vpn_mode{mode="userspace"} 1`, `edgeward_vpn_service_packets_total{peer="alice",service="nas",verdict="denied"}`, `edgeward_vpn_peers{state="live"} 2`, "edgeward_configuration_in_force 1"} {
		if !strings.Contains(metrics, want) {
			t.Errorf("the metrics do not say %s", want)
		}
	}
	for _, secret := range []string{"10.66.", "10.9.1.", "fd66:", "="} {
		for line := range strings.Lines(metrics) {
			if name, _, _ := strings.Cut(line, " "); strings.HasPrefix(line, "edgeward_vpn") && strings.Contains(strings.NewReplacer(`="`, "").Replace(name), secret) {
				t.Errorf("a label tells %s: %s", secret, line)
			}
		}
	}
	w.until("the status tells of both", func() bool {
		out, err := w.gateway.Exec(filepath.Join(programs(t), "edgeward-tunnel"), "status", "--config", w.file)
		return err == nil && strings.Contains(out, "2 live, 2 of them connected") && strings.Contains(out, "445/tcp") &&
			strings.Contains(out, "public key") && strings.Contains(out, "all others from 192.168.7.9:5353")
	})
	if list := w.edgeward("peer", "list"); !strings.Contains(list, "alice") || !strings.Contains(list, "live") {
		t.Errorf("peer list says %s", list)
	}
}

// TestInternet has a peer send everything: with the internet granted that is what
// it reaches, and neither the house nor the gateway, whose public address it is.
func TestInternet(t *testing.T) {
	w := newWorld(t)
	prefix := netip.MustParsePrefix
	for far, by := range map[string]string{"192.0.2.80/32": "192.168.7.9", "2001:db8:80::80/128": "fd07::9"} {
		w.lan.Own(prefix(far))
		w.gateway.Route(prefix(far), netip.MustParseAddr(by))
	}
	w.gateway.Own(prefix("203.0.113.2/32"))
	w.gateway.Own(prefix("2001:db8:1::2/128"))
	w.write(strings.NewReplacer("services:\n  -", "  masquerade: true\nservices:\n  - {name: internet, addresses: [0.0.0.0/0, '::/0'], ports: [1-65535/tcp, 1-65535/udp]}\n  -",
		"services: [grafana, nas]", "services: [grafana, internet]").Replace(w.config("")))
	w.start()
	alice := w.add("alice", "--group", "admins", "--full-tunnel")
	alice.up()
	alice.reaches(at("192.0.2.80:445"))
	alice.reaches(at("[2001:db8:80::80]:445"))
	alice.reaches(at("192.168.7.9:80")) // by a service of its own
	for _, to := range []string{
		"192.168.7.9:445", "[fd07::9]:445", "192.168.7.1:22", "203.0.113.2:22", "[2001:db8:1::2]:22", "10.66.0.1:22", "[fd66::1]:22",
	} {
		if err := alice.refused(at(to)); err != nil {
			t.Errorf("%s: %v", to, err)
		}
	}
	for from := range w.nas.Received() {
		if from != netip.MustParseAddr("192.168.7.1") && from != netip.MustParseAddr("fd07::1") {
			t.Errorf("the internet is asked by %v", from)
		}
	}
}

// upstream is a resolver of the LAN.
func upstream(t *testing.T, w *world) {
	t.Helper()
	var server *dns.Server
	w.lan.Must(func() error {
		conn, err := listenUDP("192.168.7.9:5353")
		server = &dns.Server{PacketConn: conn, Handler: dns.HandlerFunc(func(rw dns.ResponseWriter, q *dns.Msg) {
			m := new(dns.Msg)
			m.SetRcode(q, dns.RcodeNameError)
			if q.Question[0].Name == "www.example.org." {
				m.Rcode = dns.RcodeSuccess
				rr, err := dns.NewRR("www.example.org. 60 IN A 192.0.2.80")
				if err != nil {
					t.Error(err)
				}
				m.Answer = []dns.RR{rr}
			}
			if strings.HasSuffix(q.Question[0].Name, ".home.example.com.") {
				t.Errorf("an internal name was asked outside: %v", q.Question)
			}
			_ = rw.WriteMsg(m)
		})}
		return err
	})
	up := make(chan struct{})
	server.NotifyStartedFunc = func() { close(up) }
	go func() { _ = server.ActivateAndServe() }()
	<-up
	t.Cleanup(func() { _ = server.Shutdown() })
}

// TestRunningTransfersEnd takes rights away while data runs, in each way that
// there is.
func TestRunningTransfersEnd(t *testing.T) {
	w := newWorld(t)
	w.start()
	alice, bob := w.add("alice", "--group", "family"), w.add("bob", "--group", "admins")
	alice.up()
	bob.up()
	web := at("192.168.7.9:80")
	alice.reaches(web)
	bob.reaches(web)

	end := func(what string, x *transfer, since time.Time) {
		t.Helper()
		if took, err := x.stopped(since); err != nil || took > time.Second {
			t.Errorf("%s: data ran for %v more (%v)", what, took, err)
		} else {
			t.Logf("%s: data ran for %v more", what, took.Round(time.Millisecond))
		}
	}
	// Expiry, to the second, and what is another's is not touched.
	expires := time.Now().Add(3 * time.Second).UTC().Truncate(time.Second)
	others, mine := bob.transfer(web), alice.transfer(web)
	text, err := os.ReadFile(w.file)
	if err != nil {
		t.Fatal(err)
	}
	w.write(strings.Replace(string(text), "name: alice\n", "name: alice\n    expires: "+expires.Format(time.RFC3339)+"\n", 1))
	if err := w.program.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	end("expiry", mine, expires)
	if last := time.Unix(0, mine.last.Load()); last.Before(expires.Add(-100 * time.Millisecond)) {
		t.Errorf("the transfer ended %v before the expiry", expires.Sub(last))
	}
	if time.Since(time.Unix(0, others.last.Load())) > time.Second {
		t.Error("the transfer of another peer ended, too")
	}
	w.write(string(text))
	if err := w.program.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	// By itself a client takes 15 seconds to notice that its session is gone.
	alice.quick("down")
	alice.quick("up")
	alice.reaches(web)

	// A grant that is taken back.
	mine = alice.transfer(web)
	since := time.Now()
	w.write(strings.Replace(string(text), "[group:family]\n    services: [grafana, apps]", "[group:family]\n    services: [apps]", 1))
	if err := w.program.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	end("a grant that is taken back", mine, since)
	if err := alice.refused(web); err != nil {
		t.Errorf("what is granted no more: %v", err)
	}
	alice.reaches(at("10.66.0.100:8443"))
	w.write(string(text))

	// Revocation, by the command line.
	since = time.Now()
	w.edgeward("peer", "revoke", "bob")
	end("revocation", others, since)
	if s := w.status(); len(s.VPN.Peers) != 1 {
		t.Errorf("the peers are %+v", s.VPN.Peers)
	}
	alice.reaches(web)
	w.until("there is a line for an audit", func() bool { return strings.Contains(w.logs.String(), "peer=bob loses=") })
}

// TestTroubleKeepsTheLastGoodState breaks the file, the rules, the device and the
// process.
func TestTroubleKeepsTheLastGoodState(t *testing.T) {
	w := newWorld(t)
	w.start()
	alice := w.add("alice", "--group", "family")
	alice.up()
	web, nas := at("192.168.7.9:80"), at("192.168.7.10:445")
	alice.reaches(web)
	good, err := os.ReadFile(w.file)
	if err != nil {
		t.Fatal(err)
	}

	w.write(strings.Replace(string(good), "grants:", "grunts:", 1))
	if err := w.program.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	w.until("the bad edit is told of", func() bool { return strings.Contains(w.status().Trouble, "grunts") })
	w.until("the log tells of the bad edit", func() bool { return strings.Contains(w.logs.String(), `did you mean \"grants\"`) })
	if !strings.Contains(w.metrics(), "edgeward_configuration_in_force 0") {
		t.Error("the metrics do not tell of the bad edit")
	}
	alice.reaches(web)
	// The way of a ConfigMap: what the name leads to is another file at once. The
	// gateway finds that by itself.
	swapped, next := filepath.Join(w.dir, "mounted.yaml"), filepath.Join(w.dir, "next")
	if err := errors.Join(os.WriteFile(swapped, good, 0o600), os.Symlink(swapped, next), os.Rename(next, w.file)); err != nil {
		t.Fatal(err)
	}
	w.until("the good file is in force", func() bool { return w.status().Trouble == "" })

	// Rules that others take away, as far as the kernel lets them.
	if out, err := w.gateway.Exec("nft", "flush", "ruleset"); err == nil {
		t.Logf("nft flush ruleset: %s", out)
	}
	for range 20 {
		if err := alice.refused(nas); err != nil {
			t.Errorf("after the rules were flushed: %v", err)
			break
		}
	}
	alice.reaches(web)

	// The socket by which the device is asked.
	if err := os.Remove(filepath.Join("/var/run/wireguard", w.link+".sock")); err != nil {
		t.Fatal(err)
	}
	bob := w.add("bob", "--group", "admins")
	bob.up()
	bob.reaches(nas)
	alice.reaches(web)

	// A device that others take away.
	w.gateway.MustExec("ip", "link", "del", w.link)
	alice.reaches(web)
	if err := alice.refused(nas); err != nil {
		t.Errorf("after the device was made anew: %v", err)
	}

	// What would end the VPN leaves one alone that is at work.
	if err := w.cleanup(); err == nil || !strings.Contains(err.Error(), "the gateway still runs: stop it first") {
		t.Errorf("cleanup beside a gateway at work: %v", err)
	}
	alice.reaches(web)

	// A process that dies. Its rules stay, and the next one takes over.
	session := alice.transfer(web)
	for _, sig := range []os.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		before := session.last.Load()
		w.until("the transfer runs", func() bool { return session.last.Load() != before })
		w.stop(sig)
		if rules := w.gateway.MustExec("nft", "list", "table", "inet", "edgeward_vpn"); !strings.Contains(rules, w.link) {
			t.Errorf("after %v the rules are\n%s", sig, rules)
		}
		died := time.Now()
		w.start()
		w.until("the transfer goes on", func() bool { return session.last.Load() > died.UnixNano() })
		back := time.Unix(0, session.last.Load())
		t.Logf("%v: data runs again %v after the start", sig, back.Sub(died).Round(time.Millisecond))
		if err := alice.refused(nas); err != nil {
			t.Errorf("after %v and a start: %v", sig, err)
		}
	}

	w.stop(syscall.SIGTERM)
	if err := w.cleanup(); err != nil {
		t.Error(err)
	}
	if tables := w.gateway.MustExec("nft", "list", "tables"); strings.Contains(tables, "edgeward_vpn") {
		t.Errorf("cleanup leaves %s", tables)
	}
}

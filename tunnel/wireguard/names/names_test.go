package names

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/edgeward/edgeward/internal/netns"
)

// upstreamDouble is a real server of DNS on loopback that says what it is told to.
type upstreamDouble struct {
	at          netip.AddrPort
	udp, tcp    atomic.Int64
	mu          sync.Mutex
	says        func(network string, q *dns.Msg) *dns.Msg // nil answer: none
	lastQueries []*dns.Msg
}

func newUpstream(t testing.TB, says func(network string, q *dns.Msg) *dns.Msg) *upstreamDouble {
	t.Helper()
	u := &upstreamDouble{says: says}
	udp, tcp := bothAt(t)
	u.at = udp.LocalAddr().(*net.UDPAddr).AddrPort()
	handler := func(network string, n *atomic.Int64) dns.HandlerFunc {
		return func(w dns.ResponseWriter, q *dns.Msg) {
			n.Add(1)
			u.mu.Lock()
			u.lastQueries = append(u.lastQueries, q)
			u.mu.Unlock()
			if m := u.says(network, q); m != nil {
				_ = w.WriteMsg(m)
			}
		}
	}
	for _, s := range []*dns.Server{{PacketConn: udp, Handler: handler("udp", &u.udp)}, {Listener: tcp, Handler: handler("tcp", &u.tcp)}} {
		up := make(chan struct{})
		s.NotifyStartedFunc = func() { close(up) }
		go func() { _ = s.ActivateAndServe() }()
		<-up
		t.Cleanup(func() { _ = s.Shutdown() })
	}
	return u
}

// bothAt takes one port of loopback by UDP and TCP.
func bothAt(t testing.TB) (*net.UDPConn, net.Listener) {
	t.Helper()
	for range 20 {
		tcp, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(tcp.Addr().(*net.TCPAddr).AddrPort()))
		if err == nil {
			return udp, tcp
		}
		_ = tcp.Close()
	}
	t.Fatal("no port of loopback is free by UDP and TCP")
	return nil, nil
}

func freePort(t testing.TB) netip.AddrPort {
	udp, tcp := bothAt(t)
	defer udp.Close()
	defer tcp.Close()
	return udp.LocalAddr().(*net.UDPAddr).AddrPort()
}

// rig is a resolver that answers at one address of loopback.
type rig struct {
	t  testing.TB
	r  *Resolver
	at netip.AddrPort
}

func newRig(t testing.TB, c Config) *rig { return newRigAt(t, c, time.Now) }

// newRigAt is newRig with another clock.
func newRigAt(t testing.TB, c Config, now func() time.Time) *rig {
	t.Helper()
	g := &rig{t, New(slog.New(slog.DiscardHandler)), freePort(t)}
	g.r.now = now
	g.apply(c)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- g.r.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	g.until("the resolver listens", func() bool { return len(g.r.Status().Listening) == len(g.r.setup.Load().config.Listen) })
	return g
}

func (g *rig) apply(c Config) {
	g.t.Helper()
	if c.Listen == nil {
		c.Listen = []netip.AddrPort{g.at}
	}
	if c.Peers == nil {
		c.Peers = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
	}
	if err := g.r.Apply(c); err != nil {
		g.t.Fatal(err)
	}
}

func (g *rig) until(what string, true func() bool) {
	g.t.Helper()
	for end := time.Now().Add(10 * time.Second); !true(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			g.t.Fatalf("%s: not within 10 s; %+v", what, g.r.Status())
		}
	}
}

func query(name, qtype string, edns int) *dns.Msg {
	q := new(dns.Msg)
	q.SetQuestion(name, dns.StringToType[qtype])
	if edns > 0 {
		q.SetEdns0(uint16(edns), false)
	}
	return q
}

func (g *rig) exchange(network, from string, q *dns.Msg) (*dns.Msg, error) {
	c := &dns.Client{Net: network, Timeout: 5 * time.Second, UDPSize: dns.MaxMsgSize, Dialer: &net.Dialer{}}
	switch network {
	case "udp":
		c.Dialer.LocalAddr = &net.UDPAddr{IP: net.ParseIP(from)}
	case "tcp":
		c.Dialer.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
	}
	m, _, err := c.Exchange(q, g.at.String())
	return m, err
}

func (g *rig) ask(name, qtype string) *dns.Msg {
	g.t.Helper()
	m, err := g.exchange("udp", "127.0.0.1", query(name, qtype, 0))
	if err != nil {
		g.t.Fatalf("ask %s %s: %v", qtype, name, err)
	}
	return m
}

// said is an answer in one line.
func said(m *dns.Msg) string {
	var all []string
	for _, rr := range m.Answer {
		head := rr.Header().String()
		all = append(all, dns.TypeToString[rr.Header().Rrtype]+" "+strings.TrimPrefix(rr.String(), head))
	}
	out := strings.TrimSpace(dns.RcodeToString[m.Rcode] + " " + strings.Join(all, ", "))
	if len(m.Ns) > 0 {
		out += " | " + dns.TypeToString[m.Ns[0].Header().Rrtype] + " " + m.Ns[0].Header().Name
	}
	return out
}

func reply(q *dns.Msg, rcode int, answer ...string) *dns.Msg {
	m := new(dns.Msg)
	m.SetRcode(q, rcode)
	for _, text := range answer {
		section := &m.Answer
		if strings.Contains(text, " SOA ") {
			section = &m.Ns
		}
		rr, err := dns.NewRR(text)
		if err != nil {
			panic(err)
		}
		*section = append(*section, rr)
	}
	return m
}

func addrs(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, a := range list {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

var home = map[string][]netip.Addr{
	"grafana.home.example.com":  addrs("10.66.0.100", "fd66::100"),
	"v4.home.example.com":       addrs("10.66.0.101"),
	"v6.home.example.com":       addrs("fd66::102"),
	"NAS.Example.org":           addrs("10.66.0.103"),
	"*.apps.example.org":        addrs("10.66.0.104"),
	"a.b.inside.example.com":    addrs("10.66.0.105"),
	"special.apps.example.org":  addrs("10.66.0.106"),
	"mapped.home.example.com":   addrs("::ffff:10.66.0.107"),
	"nothing.home.example.com.": nil,
}

func TestDeclaredNamesNeverLeave(t *testing.T) {
	up := newUpstream(t, func(_ string, q *dns.Msg) *dns.Msg { return reply(q, dns.RcodeRefused) })
	g := newRig(t, Config{Hosts: home, Zones: []string{"inside.example.com"}, Upstreams: []netip.AddrPort{up.at}})
	for _, c := range []struct{ name, qtype, want string }{
		{"grafana.home.example.com.", "A", "NOERROR A 10.66.0.100"},
		{"GRAFANA.home.Example.com.", "AAAA", "NOERROR AAAA fd66::100"},
		{"grafana.home.example.com.", "HTTPS", "NOERROR | SOA grafana.home.example.com."},
		{"grafana.home.example.com.", "TXT", "NOERROR | SOA grafana.home.example.com."},
		{"grafana.home.example.com.", "ANY", "NOERROR A 10.66.0.100, AAAA fd66::100"},
		{"v4.home.example.com.", "AAAA", "NOERROR | SOA v4.home.example.com."},
		{"v6.home.example.com.", "A", "NOERROR | SOA v6.home.example.com."},
		{"nas.example.org.", "A", "NOERROR A 10.66.0.103"},
		{"mapped.home.example.com.", "A", "NOERROR A 10.66.0.107"},
		{"nothing.home.example.com.", "A", "NOERROR | SOA nothing.home.example.com."},
		{"x.apps.example.org.", "A", "NOERROR A 10.66.0.104"},
		{"y.x.apps.example.org.", "A", "NOERROR A 10.66.0.104"},
		{"special.apps.example.org.", "A", "NOERROR A 10.66.0.106"},
		{"inside.example.com.", "A", "NOERROR | SOA inside.example.com."},
		{"b.inside.example.com.", "A", "NOERROR | SOA inside.example.com."},
		{"a.b.inside.example.com.", "A", "NOERROR A 10.66.0.105"},
		{"other.inside.example.com.", "A", "NXDOMAIN | SOA inside.example.com."},
	} {
		for _, network := range []string{"udp", "tcp"} {
			m, err := g.exchange(network, "127.0.0.1", query(c.name, c.qtype, 0))
			if err != nil {
				t.Fatalf("%s %s by %s: %v", c.name, c.qtype, network, err)
			}
			if got := said(m); got != c.want || !m.Authoritative || m.Question[0].Name != c.name {
				t.Errorf("%s %s by %s: %s, authoritative %v, for %s; want %s", c.name, c.qtype, network, got, m.Authoritative, m.Question[0].Name, c.want)
			}
			for _, rr := range append(m.Answer, m.Ns...) {
				if rr.Header().Ttl != 30 {
					t.Errorf("%s: may be kept for %d s", c.name, rr.Header().Ttl)
				}
			}
		}
	}
	if n := up.udp.Load() + up.tcp.Load(); n != 0 {
		t.Errorf("%d questions about declared names were forwarded: %v", n, up.lastQueries)
	}
	// These are somebody else's.
	for _, name := range []string{"apps.example.org.", "example.com.", "sub.grafana.home.example.com.", "home.example.com."} {
		up.udp.Store(0)
		if g.ask(name, "A"); up.udp.Load() != 1 {
			t.Errorf("%s was not forwarded", name)
		}
	}
}

func TestOnlyPeersAreAnswered(t *testing.T) {
	up := newUpstream(t, func(_ string, q *dns.Msg) *dns.Msg { return reply(q, dns.RcodeSuccess) })
	g := newRig(t, Config{Hosts: home, Upstreams: []netip.AddrPort{up.at}, Peers: []netip.Prefix{
		netip.MustParsePrefix("127.0.0.1/32"), netip.MustParsePrefix("127.0.7.9/24"), netip.MustParsePrefix("fd66::/64"),
	}})
	for from, may := range map[string]bool{"127.0.0.1": true, "127.0.7.1": true, "127.0.7.255": true, "127.0.0.2": false, "127.0.8.1": false} {
		for _, name := range []string{"nas.example.org.", "example.com."} {
			m, err := g.exchange("udp", from, query(name, "A", 0))
			if err != nil || (m.Rcode == dns.RcodeRefused) == may {
				t.Errorf("%s asks for %s by UDP: %v %v", from, name, m, err)
			}
			m, err = g.exchange("tcp", from, query(name, "A", 0))
			if (err == nil) != may {
				t.Errorf("%s asks for %s by TCP: %v %v", from, name, m, err)
			}
		}
	}
	// Whoever is a peer no more is refused from the next question on, on a
	// connection that is open too.
	conn, err := (&dns.Client{Net: "tcp"}).Dial(g.at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, want := range []int{dns.RcodeSuccess, dns.RcodeRefused} {
		if err := conn.WriteMsg(query("nas.example.org.", "A", 0)); err != nil {
			t.Fatal(err)
		}
		if m, err := conn.ReadMsg(); err != nil || m.Rcode != want {
			t.Errorf("on an open connection: %v %v, want %s", m, err, dns.RcodeToString[want])
		}
		g.apply(Config{Hosts: home, Peers: []netip.Prefix{netip.MustParsePrefix("127.0.7.0/24")}})
	}
	if s := g.r.Status(); s.Counts.Refused == 0 {
		t.Errorf("nothing was counted: %+v", s.Counts)
	}
}

func TestWhatIsNeverAnswered(t *testing.T) {
	up := newUpstream(t, func(_ string, q *dns.Msg) *dns.Msg { return reply(q, dns.RcodeSuccess) })
	g := newRig(t, Config{Upstreams: []netip.AddrPort{up.at}})
	chaos := query("version.bind.", "TXT", 0)
	chaos.Question[0].Qclass = dns.ClassCHAOS
	version := query("example.com.", "A", 1232)
	version.IsEdns0().SetVersion(1)
	update := query("example.com.", "SOA", 0)
	update.Opcode = dns.OpcodeUpdate
	two := query("example.com.", "A", 0)
	two.Question = append(two.Question, two.Question[0])
	for _, c := range []struct {
		what string
		q    *dns.Msg
		want int
	}{
		{"a zone transfer", query("example.com.", "AXFR", 0), dns.RcodeRefused},
		{"another class", chaos, dns.RcodeRefused},
		{"another version of EDNS", version, dns.RcodeBadVers},
		{"an update", update, dns.RcodeNotImplemented},
		{"two questions", two, dns.RcodeFormatError},
	} {
		if m, err := g.exchange("udp", "127.0.0.1", c.q); err != nil || m.Rcode != c.want {
			t.Errorf("%s: %v %v, want %s", c.what, m, err, dns.RcodeToString[c.want])
		}
	}
	if n := up.udp.Load(); n != 0 {
		t.Errorf("%d were forwarded", n)
	}
	g.apply(Config{})
	if m := g.ask("example.com.", "A"); m.Rcode != dns.RcodeRefused {
		t.Errorf("without upstreams: %s", said(m))
	}
}

// clock stands still but for what is added to it.
type clock struct{ atomic.Int64 }

func (c *clock) now() time.Time { return time.Unix(1800000000, c.Load()) }

func TestCacheHonoursTimes(t *testing.T) {
	up := newUpstream(t, func(_ string, q *dns.Msg) *dns.Msg {
		const soa = "example.com. 600 IN SOA ns. host. 1 2 3 4 20"
		name := q.Question[0].Name
		switch {
		case strings.HasPrefix(name, "short"):
			return reply(q, dns.RcodeSuccess, name+" 100 IN CNAME b.example.com.", "b.example.com. 10 IN A 192.0.2.1")
		case strings.HasPrefix(name, "zero"):
			return reply(q, dns.RcodeSuccess, name+" 0 IN A 192.0.2.1")
		case strings.HasPrefix(name, "missing"):
			return reply(q, dns.RcodeNameError, soa)
		case strings.HasPrefix(name, "alias"):
			return reply(q, dns.RcodeSuccess, name+" 100 IN CNAME b.example.com.", soa)
		case strings.HasPrefix(name, "nosoa"):
			return reply(q, dns.RcodeNameError)
		case strings.HasPrefix(name, "broken"):
			return reply(q, dns.RcodeServerFailure)
		}
		return reply(q, dns.RcodeSuccess, soa)
	})
	var clock clock
	g := newRigAt(t, Config{Upstreams: []netip.AddrPort{up.at}}, clock.now)
	for _, c := range []struct {
		name string
		kept time.Duration // 0: asked for each time
		want string
	}{
		{"short.example.com.", 10 * time.Second, "NOERROR CNAME b.example.com., A 192.0.2.1"},
		{"zero.example.com.", 0, "NOERROR A 192.0.2.1"},
		{"missing.example.com.", 20 * time.Second, "NXDOMAIN | SOA example.com."},
		{"alias.example.com.", 20 * time.Second, "NOERROR CNAME b.example.com. | SOA example.com."},
		{"nosoa.example.com.", 0, "NXDOMAIN"},
		{"broken.example.com.", time.Second, "SERVFAIL"},
		{"nodata.example.com.", 20 * time.Second, "NOERROR | SOA example.com."},
	} {
		ask := func(after time.Duration, wantAsked bool) *dns.Msg {
			t.Helper()
			clock.Add(int64(after))
			before := up.udp.Load()
			m := g.ask(c.name, "A")
			if got := said(m); got != c.want || m.Authoritative || !m.RecursionAvailable {
				t.Errorf("%s: %s, want %s", c.name, got, c.want)
			}
			if asked := up.udp.Load() != before; asked != wantAsked {
				t.Errorf("%s after %v more: asked for again %v", c.name, after, asked)
			}
			return m
		}
		ask(0, true)
		if c.kept == 0 {
			ask(0, true)
			continue
		}
		first := ask(c.kept/2, false)
		ask(c.kept-c.kept/2-1, false)
		if len(first.Answer) > 0 && first.Answer[0].Header().Ttl != 100-uint32(c.kept/2/time.Second) {
			t.Errorf("%s: the time to live did not pass: %v", c.name, first.Answer[0])
		}
		ask(1, true)
	}
	counts := g.r.Status().Counts
	if counts.Cached == 0 || counts.Forwarded == 0 {
		t.Errorf("counted %+v", counts)
	}
}

func TestCacheIsBounded(t *testing.T) {
	c := newCache()
	now := time.Now()
	for i := range mostKept + 100 {
		name := fmt.Sprintf("n%d.example.com.", i)
		k := key{name: name, qtype: dns.TypeA}
		c.put(k, reply(query(name, "A", 0), dns.RcodeSuccess, name+" 60 IN A 192.0.2.1"), nil, now)
		if m, _ := c.get(key{name: "n0.example.com.", qtype: dns.TypeA}, now); m == nil {
			t.Fatalf("what was used last is gone after %d", i)
		}
	}
	if c.used.Len() != mostKept || len(c.kept) != mostKept {
		t.Errorf("%d and %d are kept", c.used.Len(), len(c.kept))
	}
	if m, _ := c.get(key{name: "n1.example.com.", qtype: dns.TypeA}, now); m != nil {
		t.Error("what was used least is there")
	}
}

func TestSizes(t *testing.T) {
	up := newUpstream(t, func(network string, q *dns.Msg) *dns.Msg {
		m := reply(q, dns.RcodeSuccess)
		for i := range 100 { // 16 bytes each, compressed
			rr, err := dns.NewRR(fmt.Sprintf("%s 0 IN A 192.0.2.%d", q.Question[0].Name, i))
			if err != nil {
				panic(err)
			}
			m.Answer = append(m.Answer, rr)
		}
		if network == "udp" {
			m.Truncate(512)
		}
		return m
	})
	g := newRig(t, Config{Upstreams: []netip.AddrPort{up.at}})
	for _, c := range []struct {
		network string
		edns    int
		largest int
		whole   bool
	}{
		{"udp", 0, 512, false}, {"udp", 100, 512, false}, {"udp", 1000, 1000, false}, {"udp", 65535, 1232, false}, {"tcp", 0, 65535, true}, {"tcp", 512, 65535, true},
	} {
		m, err := g.exchange(c.network, "127.0.0.1", query("large.example.com.", "A", c.edns))
		if err != nil {
			t.Fatal(err)
		}
		m.Compress = true
		if m.Len() > c.largest || m.Truncated == c.whole || (len(m.Answer) == 100) != c.whole || (m.IsEdns0() != nil) != (c.edns > 0) {
			t.Errorf("%s with EDNS %d: %d bytes, %d answers, truncated %v, EDNS %v", c.network, c.edns, m.Len(), len(m.Answer), m.Truncated, m.IsEdns0())
		}
	}
	if up.tcp.Load() == 0 {
		t.Error("what did not fit was not asked for again by TCP")
	}
}

func TestFailover(t *testing.T) {
	good := newUpstream(t, func(_ string, q *dns.Msg) *dns.Msg {
		return reply(q, dns.RcodeSuccess, q.Question[0].Name+" 0 IN A 192.0.2.1")
	})
	var mu sync.Mutex
	silent := true
	bad := newUpstream(t, func(_ string, q *dns.Msg) *dns.Msg {
		mu.Lock()
		defer mu.Unlock()
		if silent {
			return nil
		}
		return reply(q, dns.RcodeSuccess, q.Question[0].Name+" 0 IN A 192.0.2.2")
	})
	unwell := newUpstream(t, func(_ string, q *dns.Msg) *dns.Msg { return reply(q, dns.RcodeServerFailure) })
	liar := newUpstream(t, func(_ string, q *dns.Msg) *dns.Msg {
		m := reply(q, dns.RcodeSuccess, "example.net. 60 IN A 192.0.2.66")
		m.Question[0].Name = "example.net."
		return m
	})
	nobody := freePort(t)
	var clock clock
	g := newRigAt(t, Config{Upstreams: []netip.AddrPort{nobody, liar.at, unwell.at, bad.at, good.at}}, clock.now)
	if m := g.ask("a.example.com.", "A"); said(m) != "NOERROR A 192.0.2.1" {
		t.Errorf("the first question: %s", said(m))
	}
	if down := g.r.Status().Down; !slices.Equal(down, []netip.AddrPort{nobody, liar.at, bad.at}) {
		t.Errorf("down are %v", down)
	}
	start, asked := time.Now(), bad.udp.Load()
	for i := range 20 {
		g.ask(fmt.Sprintf("n%d.example.com.", i), "A")
	}
	if took := time.Since(start); took > tryTimeout || bad.udp.Load() != asked {
		t.Errorf("20 questions took %v, %d to the one that does not answer", took, bad.udp.Load()-asked)
	}
	mu.Lock()
	silent = false
	mu.Unlock()
	clock.Add(int64(downFor + time.Second))
	if m := g.ask("b.example.com.", "A"); said(m) != "NOERROR A 192.0.2.2" {
		t.Errorf("the one that is back: %s", said(m))
	}

	g.apply(Config{Upstreams: []netip.AddrPort{unwell.at, nobody}})
	if m := g.ask("c.example.com.", "A"); m.Rcode != dns.RcodeServerFailure {
		t.Errorf("all are unwell: %s", said(m))
	}
	g.apply(Config{Upstreams: []netip.AddrPort{nobody}})
	before := g.r.Status().Counts.Failed
	if m := g.ask("c.example.com.", "A"); m.Rcode != dns.RcodeServerFailure || g.r.Status().Counts.Failed != before+1 {
		t.Errorf("nobody is there: %s", said(m))
	}
}

func TestOneQuestionForAll(t *testing.T) {
	gate := make(chan struct{})
	up := newUpstream(t, func(_ string, q *dns.Msg) *dns.Msg {
		<-gate
		return reply(q, dns.RcodeSuccess, q.Question[0].Name+" 0 IN A 192.0.2.1")
	})
	g := newRig(t, Config{Upstreams: []netip.AddrPort{up.at}})
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			m, err := g.exchange("udp", "127.0.0.1", query("busy.example.com.", "A", 0))
			if err != nil || said(m) != "NOERROR A 192.0.2.1" {
				t.Errorf("%v %v", m, err)
			}
		})
	}
	g.until("a question arrives", func() bool { return up.udp.Load() > 0 })
	time.Sleep(200 * time.Millisecond)
	close(gate)
	all.Wait()
	// One that came late may have been put on its own.
	if n := up.udp.Load(); n > 2 {
		t.Errorf("50 at once became %d questions", n)
	}
}

func TestRate(t *testing.T) {
	g := newRig(t, Config{Hosts: home, Rate: 0.001, Burst: 10, Peers: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32"), netip.MustParsePrefix("127.0.0.2/32")}})
	conn, err := net.Dial("udp", g.at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	text, err := query("nas.example.org.", "A", 0).Pack()
	if err != nil {
		t.Fatal(err)
	}
	for range 25 {
		if _, err := conn.Write(text); err != nil {
			t.Fatal(err)
		}
	}
	g.until("all were seen", func() bool { c := g.r.Status().Counts; return c.Declared+c.Limited == 25 })
	if c := g.r.Status().Counts; c.Declared != 10 {
		t.Errorf("%d of 25 were answered, want 10", c.Declared)
	}
	if m, err := g.exchange("udp", "127.0.0.2", query("nas.example.org.", "A", 0)); err != nil || m.Rcode != dns.RcodeSuccess {
		t.Errorf("another peer: %v %v", m, err)
	}
	// Connections are bounded as well.
	var open []net.Conn
	defer func() {
		for _, c := range open {
			_ = c.Close()
		}
	}()
	for range mostConns + 5 {
		c, err := net.Dial("tcp", g.at.String())
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	g.until("the connections above the bound are closed", func() bool { return g.r.Status().Counts.Limited == 15+5 })
}

// TestOneAskerOfMany has one peer ask what no upstream answers: it waits alone, and
// its addresses are one asker.
func TestOneAskerOfMany(t *testing.T) {
	gate := make(chan struct{})
	up := newUpstream(t, func(_ string, q *dns.Msg) *dns.Msg {
		if strings.HasPrefix(q.Question[0].Name, "never") {
			<-gate
		}
		return reply(q, dns.RcodeSuccess, q.Question[0].Name+" 0 IN A 192.0.2.1")
	})
	t.Cleanup(func() { close(gate) })
	one, two, other := netip.MustParsePrefix("127.0.0.1/32"), netip.MustParsePrefix("127.0.0.2/32"), netip.MustParsePrefix("127.0.0.3/32")
	c := Config{Upstreams: []netip.AddrPort{up.at}, Peers: []netip.Prefix{one, two, other}, Owners: map[netip.Prefix]string{one: "alice", two: "alice", other: "bob"}}
	g := newRig(t, c)
	s := g.r.setup.Load()
	if s.askers[one] != s.askers[two] || s.askers[one] == s.askers[other] {
		t.Error("addresses and askers do not go together")
	}
	before := s.askers[one]
	c.Owners = map[netip.Prefix]string{one: "carol", two: "alice", other: "bob"}
	g.apply(c)
	if s := g.r.setup.Load(); s.askers[one] == before || s.askers[one] == s.askers[two] || s.askers[two] != before {
		t.Error("an address that is another's now is counted with the former one's")
	}
	conn, err := net.DialUDP("udp", &net.UDPAddr{IP: net.ParseIP("127.0.0.2")}, net.UDPAddrFromAddrPort(g.at))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for i := range mostOfOne + 20 {
		text, err := query(fmt.Sprintf("never%d.example.com.", i), "A", 0).Pack()
		if err == nil {
			_, err = conn.Write(text)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	g.until("what is too much is not waited for", func() bool { return g.r.Status().Counts.Limited == 20 })
	if m, err := g.exchange("udp", "127.0.0.3", query("www.example.com.", "A", 0)); err != nil || said(m) != "NOERROR A 192.0.2.1" {
		t.Errorf("another peer: %v %v", m, err)
	}
}

func TestSwap(t *testing.T) {
	up := newUpstream(t, func(_ string, q *dns.Msg) *dns.Msg {
		return reply(q, dns.RcodeSuccess, q.Question[0].Name+" 600 IN A 192.0.2.1")
	})
	other := newUpstream(t, func(_ string, q *dns.Msg) *dns.Msg {
		return reply(q, dns.RcodeSuccess, q.Question[0].Name+" 600 IN A 192.0.2.2")
	})
	c := Config{Upstreams: []netip.AddrPort{up.at}}
	g := newRig(t, c)
	expect := func(what, want string) {
		t.Helper()
		if got := said(g.ask("app.example.com.", "A")); got != want {
			t.Errorf("%s: %s, want %s", what, got, want)
		}
	}
	expect("public", "NOERROR A 192.0.2.1")
	g.apply(Config{Upstreams: c.Upstreams, Hosts: map[string][]netip.Addr{"app.example.com": addrs("10.66.0.1")}})
	expect("declared", "NOERROR A 10.66.0.1")
	if err := g.r.Apply(Config{Listen: []netip.AddrPort{g.at}, Upstreams: []netip.AddrPort{g.at}}); err == nil || !strings.Contains(err.Error(), "circles") {
		t.Errorf("an upstream that is the resolver itself: %v", err)
	}
	for name, bad := range map[string]Config{
		"host": {Hosts: map[string][]netip.Addr{"a..b": nil}}, "zone": {Zones: []string{"."}},
		"upstream": {Upstreams: []netip.AddrPort{{}}}, "peer": {Peers: []netip.Prefix{{}}},
	} {
		if err := g.r.Apply(bad); err == nil {
			t.Errorf("a %s that is none was taken", name)
		}
	}
	expect("after what was refused", "NOERROR A 10.66.0.1")
	g.apply(c)
	expect("undeclared, and remembered", "NOERROR A 192.0.2.1")
	if n := up.udp.Load(); n != 1 {
		t.Errorf("the cache was lost: %d questions", n)
	}
	g.apply(Config{Upstreams: []netip.AddrPort{other.at}})
	expect("another upstream", "NOERROR A 192.0.2.2")

	was := g.at
	g.at = freePort(t)
	g.apply(Config{Upstreams: []netip.AddrPort{other.at}})
	g.until("it listens elsewhere", func() bool { return slices.Equal(g.r.Status().Listening, []netip.AddrPort{g.at}) })
	expect("elsewhere", "NOERROR A 192.0.2.2")
	if conn, err := net.Dial("tcp", was.String()); err == nil {
		_ = conn.Close()
		t.Error("it listens at the old address")
	}
}

// TestAddressesComeAndGo has the resolver listen before there is an interface.
// TestMachine holds that of the machine's servers those are taken that can be asked.
func TestMachine(t *testing.T) {
	file := filepath.Join(t.TempDir(), "resolv.conf")
	const text = "search example.com\nnameserver 127.0.0.53\nnameserver 10.66.0.1\nnameserver 127.0.0.1\nnameserver 192.0.2.53\nnameserver 192.0.2.53\nnameserver 2001:db8::53\nnameserver fe80::1%eth0\nnameserver 0.0.0.0\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	ns := netns.New(t)
	ns.Must(func() error {
		udp, err := net.ListenPacket("udp", "127.0.0.53:53")
		if err != nil {
			return err
		}
		up := make(chan struct{})
		s := &dns.Server{PacketConn: udp, NotifyStartedFunc: func() { close(up) }, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
			_ = w.WriteMsg(new(dns.Msg).SetRcode(q, dns.RcodeRefused))
		})}
		go func() { _ = s.ActivateAndServe() }()
		t.Cleanup(func() { _ = s.Shutdown() })
		<-up
		return nil
	})
	ns.Must(func() error {
		got, err := Machine(t.Context(), file, []netip.Prefix{netip.MustParsePrefix("10.66.0.0/24")})
		if want := "[127.0.0.53:53 192.0.2.53:53 [2001:db8::53]:53 [fe80::1%eth0]:53]"; fmt.Sprint(got) != want {
			t.Errorf("asks %v, want %s", got, want)
		}
		return err
	})
	if got, err := Machine(t.Context(), file+"no", nil); err == nil || got != nil {
		t.Errorf("without a file: %v, %v", got, err)
	}
}

func TestAddressesComeAndGo(t *testing.T) {
	ns := netns.New(t)
	r := New(slog.New(slog.DiscardHandler))
	at := []netip.AddrPort{netip.MustParseAddrPort("10.66.0.1:53"), netip.MustParseAddrPort("[fd66::1]:53")}
	if err := r.Apply(Config{Listen: at, Hosts: home, Peers: []netip.Prefix{netip.MustParsePrefix("10.66.0.0/24"), netip.MustParsePrefix("fd66::/64")}}); err != nil {
		t.Fatal(err)
	}
	ns.Must(r.listen)
	t.Cleanup(func() {
		for _, l := range r.listening {
			l.close()
		}
	})
	for range 2 {
		ns.MustExec("ip", "link", "add", "wg9", "type", "veth", "peer", "name", "other")
		for _, a := range at {
			ns.MustExec("ip", "addr", "add", a.Addr().String(), "dev", "wg9")
		}
		ns.MustExec("ip", "link", "set", "wg9", "up")
		for _, a := range at {
			ns.Must(func() error {
				for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
					m, err := dns.Exchange(query("nas.example.org.", "A", 0), a.String())
					if err == nil && m.Rcode == dns.RcodeSuccess {
						return nil
					}
					if time.Now().After(end) {
						return fmt.Errorf("ask %s: %v %w", a, m, err)
					}
				}
			})
		}
		ns.MustExec("ip", "link", "del", "wg9")
	}
}

// TestInTheWay has another program hold the port.
func TestInTheWay(t *testing.T) {
	udp, tcp := bothAt(t)
	at := udp.LocalAddr().(*net.UDPAddr).AddrPort()
	r := New(slog.New(slog.DiscardHandler))
	if err := r.Apply(Config{Listen: []netip.AddrPort{at}}); err != nil {
		t.Fatal(err)
	}
	if err := r.listen(); err == nil || r.Status().Missing == nil || len(r.Status().Listening) > 0 {
		t.Errorf("the address is another's: %v %+v", err, r.Status())
	}
	_, _ = udp.Close(), tcp.Close()
	if err := r.listen(); err != nil || len(r.Status().Listening) != 1 {
		t.Errorf("the address is free: %v", err)
	}
	r.listening[at].close()
}

// writer is a client in memory.
type writer struct {
	dns.ResponseWriter
	from net.Addr
	told *dns.Msg
}

func (w *writer) RemoteAddr() net.Addr { return w.from }

func (w *writer) WriteMsg(m *dns.Msg) error {
	text, err := m.Pack()
	if err != nil {
		return err
	}
	w.told = new(dns.Msg)
	return w.told.Unpack(text)
}

func TestPanicIsAnAnswer(t *testing.T) {
	// The clock is read when the cache is asked, and again in a flight.
	for fatal := range int64(2) {
		var calls atomic.Int64
		g := newRigAt(t, Config{Upstreams: []netip.AddrPort{freePort(t)}}, func() time.Time {
			if calls.Add(1) == fatal+1 {
				panic("on purpose")
			}
			return time.Now()
		})
		f := g.r.setup.Load().ahead
		if m := g.ask("example.com.", "A"); m.Rcode != dns.RcodeServerFailure {
			t.Errorf("told %s", said(m))
		}
		f.mu.Lock()
		if len(f.flights) != 0 || len(f.ahead) != 0 {
			t.Errorf("%d flights and %d places are not given back", len(f.flights), len(f.ahead))
		}
		f.mu.Unlock()
	}
}

// FuzzServeDNS has any message answered: an answer can be packed, is to that
// question, and fits.
func FuzzServeDNS(f *testing.F) {
	for _, q := range []*dns.Msg{query("nas.example.org.", "A", 0), query("x.apps.example.org.", "AAAA", 4096), query("x.inside.example.com.", "ANY", 1), query(".", "NS", 0)} {
		text, err := q.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	r := New(slog.New(slog.DiscardHandler))
	if err := r.Apply(Config{Hosts: home, Zones: []string{"inside.example.com"}, Peers: []netip.Prefix{netip.MustParsePrefix("10.66.0.0/24")}, Rate: 1e9, Burst: 1e9}); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		q := new(dns.Msg)
		if q.Unpack(text) != nil {
			return
		}
		w := &writer{from: &net.UDPAddr{IP: net.IPv4(10, 66, 0, 9), Port: 9}}
		r.ServeDNS(w, q)
		if w.told == nil {
			t.Fatal("no answer")
		}
		if w.told.Id != q.Id || !w.told.Response || len(q.Question) > 0 && (len(w.told.Question) != 1 || w.told.Question[0] != q.Question[0]) {
			t.Errorf("told %v", w.told)
		}
	})
}

func BenchmarkAnswer(b *testing.B) {
	up := newUpstream(b, func(_ string, q *dns.Msg) *dns.Msg {
		return reply(q, dns.RcodeSuccess, q.Question[0].Name+" 600 IN A 192.0.2.1")
	})
	g := newRig(b, Config{Hosts: home, Upstreams: []netip.AddrPort{up.at}, Rate: 1e9, Burst: 1e9})
	for _, c := range []struct{ what, name string }{{"declared", "grafana.home.example.com."}, {"cached", "public.example.com."}} {
		g.ask(c.name, "A")
		b.Run(c.what, func(b *testing.B) {
			q := query(c.name, "A", 1232)
			w := &writer{from: &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9}}
			b.ReportAllocs()
			for b.Loop() {
				g.r.ServeDNS(w, q)
			}
		})
	}
}

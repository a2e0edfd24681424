package nft

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/edgeward/edgeward/internal/netns"
)

// What every Config that enforces has to do.
func TestStops(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		set  func(*Config)
		nft  []string // what the administrator reads
	}{
		{"default", func(*Config) {}, []string{
			"type filter hook prerouting priority raw; policy accept;", "tcp flags syn / syn,ack goto source4_1",
			"type filter hook prerouting priority mangle; policy accept;", "ct direction reply accept",
			"type filter hook postrouting priority mangle; policy accept;", "ct state new tcp flags != syn / syn,ack goto resumed_1",
			"ip daddr map @bans4_1 goto resumed-banned_1",
			"meta mark set ip saddr map @bans4_1 goto banned_1", `elements = { "cni*",`,
		}},
		{"replies dropped", func(c *Config) { c.DropReplies = true }, []string{"priority raw"}},
		{"reject", func(c *Config) { c.Action = Reject }, []string{"reject with tcp reset", "reject with icmpx"}},
		{"logged", func(c *Config) { c.Log = &Log{PerSecond: 7, Burst: 9} }, []string{
			`limit rate 7/second burst 9 packets log prefix "edgeward drop ban/lists:firehol: " level info`}},
		{"logged to a group", func(c *Config) { c.Log = &Log{Group: 3} }, []string{`log prefix "edgeward drop ban/CAPI: " group 3`}},
		{"input and forward", func(c *Config) { c.Points = []Point{Forward, Input}; c.Priority = -10 }, []string{
			"hook input priority filter - 10", "hook forward priority filter - 10"}},
		{"other priorities", func(c *Config) { c.SYNPriority, c.Priority = -310, -190 }, []string{"priority raw - 10", "priority -190"}},
		{"no interface exempt", func(c *Config) { c.Exempt = nil }, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			cfg := config()
			tt.set(&cfg)
			w.stopped(false, bad4, bad6)
			w.install(cfg, content(nil, ban(bad4), ban(bad6),
				banRange("203.0.113.100", "203.0.113.103"), banRange("2001:db8:f00::1000", "2001:db8:f00::1fff")))
			w.stopped(true, bad4, bad6, addr("203.0.113.100"), addr("203.0.113.103"), addr("2001:db8:f00::1fff"))
			w.stopped(false, peer4, peer6, addr("203.0.113.99"), addr("203.0.113.104"), addr("2001:db8:f00::2000"))
			text := w.nft()
			for _, want := range tt.nft {
				if !strings.Contains(text, want) {
					t.Errorf("nft does not list %q", want)
					t.Log(text)
				}
			}
			if got := w.counter(Banned, "ban/crowdsec", false); got == 0 {
				t.Error("nothing was counted")
			}
			got := w.read()
			want := Have{
				Present: true, Owner: true, Persist: true, Enforcing: true, Intact: true,
				Layout: cfg.Layout(), Generation: 1, Bans4: 1, Bans6: 1, Nets4: 1, Nets6: 1,
			}
			if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(Have{}, "Ruleset")); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// A connection is stopped in the middle, and what answers us is not.
func TestConnections(t *testing.T) {
	for _, replies := range []bool{false, true} {
		t.Run(fmt.Sprintf("replies dropped %t", replies), func(t *testing.T) {
			w := newWorld(t)
			cfg := config()
			cfg.DropReplies = replies
			w.install(cfg, content(nil))
			for _, from := range []netip.Addr{bad4, bad6} {
				for _, s := range []*netns.Server{w.host, w.inPod} {
					c, err := w.client.Dial(from, w.to(s, from))
					if err != nil {
						t.Fatal(err)
					}
					defer c.Close()
					if err := netns.Echo(c); err != nil {
						t.Fatal(err)
					}
					w.update(Changes{Put: []Element{ban(from)}})
					if err := netns.Echo(c); err == nil {
						t.Errorf("an established connection from %v goes on", from)
					}
					w.update(Changes{Delete: []netip.Addr{from}})
				}
			}
			w.update(Changes{Put: []Element{ban(bad4), ban(bad6)}})
			out4 := w.client.Serve(netip.AddrPortFrom(bad4, 0)).Addr
			out6 := w.client.Serve(netip.AddrPortFrom(bad6, 0)).Addr
			node, pod := w.node.Patient(), w.pod.Patient()
			for name, try := range map[string]func() error{
				"node tcp4": func() error { return node.TCP(node4, out4) },
				"node tcp6": func() error { return node.TCP(node6, out6) },
				"node udp4": func() error { return node.UDP(node4, out4) },
				"pod tcp4":  func() error { return pod.TCP(pod4, out4) },
				"pod udp6":  func() error { return pod.UDP(pod6, out6) },
			} {
				if err := try(); (err != nil) != replies {
					t.Errorf("%s: a connection to a banned address: %v", name, err)
				}
			}
		})
	}
}

// NodePort services translate the destination; the ban comes before that, and
// leaves nothing in connection tracking.
func TestTranslated(t *testing.T) {
	w := newWorld(t)
	w.load(fmt.Sprintf(`
		table inet services { chain p { type nat hook prerouting priority dstnat;
			meta nfproto ipv4 tcp dport 30080 dnat ip to %[1]v:%[3]d
			meta nfproto ipv4 udp dport 30080 dnat ip to %[1]v:%[3]d
			meta nfproto ipv6 tcp dport 30080 dnat ip6 to [%[2]v]:%[3]d
		}
		}`, pod4, pod6, w.inPod.Addr.Port()))
	at4, at6 := netip.AddrPortFrom(node4, 30080), netip.AddrPortFrom(node6, 30080)
	w.install(config(), content(nil, ban(bad4), ban(bad6)))
	for _, err := range []error{w.client.TCP(peer4, at4), w.client.UDP(peer4, at4), w.client.TCP(peer6, at6)} {
		if err != nil {
			t.Errorf("a service is out of reach: %v", err)
		}
	}
	for i, err := range []error{w.client.TCP(bad4, at4), w.client.UDP(bad4, at4), w.client.TCP(bad6, at6)} {
		if err == nil {
			t.Errorf("attempt %d reached the service", i)
		}
	}
	if w.node.Tracked(peer4) == 0 {
		t.Error("connections are not tracked: this test shows nothing")
	}
	if n := w.node.Tracked(bad4) + w.node.Tracked(bad6); n != 0 {
		t.Errorf("%d connections of banned addresses are tracked", n)
	}
}

// Whatever is banned, the protected stay in.
func TestProtected(t *testing.T) {
	t.Parallel()
	everything := []any{banRange("0.0.0.0", "255.255.255.255"), banRange("::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")}
	for _, observe := range []bool{false, true} {
		for _, locked := range []bool{false, true} {
			t.Run(fmt.Sprintf("observe %t locked %t", observe, locked), func(t *testing.T) {
				w := newWorld(t)
				cfg := config()
				cfg.Observe = observe
				if locked {
					cfg.Locks = []Lock{{Name: "all", Ports: []uint16{w.host.Addr.Port(), w.inPod.Addr.Port()}}}
				}
				protected := []netip.Prefix{prefix("203.0.113.0/29"), prefix("203.0.113.4/30"), prefix("2001:db8:f00::7/128"), prefix("::ffff:198.51.100.9/128")}
				w.install(cfg, content(protected, append(everything, ban(peer4), ban(peer6))...))
				w.stopped(false, peer4, peer6, addr("198.51.100.9"))
				w.stopped(!observe, bad4, bad6, addr("203.0.113.8"))
				w.update(Changes{Protected: append(protected, prefix("203.0.113.66/32"))})
				w.stopped(false, peer4, bad4)
				w.stopped(!observe, bad6)
				w.update(Changes{Protected: []netip.Prefix{}})
				w.stopped(!observe, peer4, bad4)
				if !observe && w.counter(Protected, "", false) == 0 {
					t.Error("what protection let through was not counted")
				}
				w.nft()
			})
		}
	}
}

// Observe counts each packet once, and what passes is as it was.
func TestObserve(t *testing.T) {
	w := newWorld(t)
	cfg := config()
	cfg.Observe, cfg.Log = true, &Log{}
	w.install(cfg, content(nil, ban(bad4), Element{bad6, 3, time.Hour}, Element{peer6, 99, time.Hour},
		Range{addr("203.0.113.100"), addr("203.0.113.103"), 2, time.Hour}))
	w.load(`table inet marks {
		chain before { type filter hook prerouting priority -400; iifname "up0" meta mark set 0x5a
		}
		chain after { type filter hook prerouting priority -100; iifname "up0" meta mark != 0x5a counter
		}
	}`)
	w.stopped(false, bad4, bad6, peer4, peer6, addr("203.0.113.102"))
	text := w.nft()
	if !strings.Contains(text, "counter packets 0 bytes 0") {
		t.Errorf("marks were changed:\n%s", text)
	}
	if strings.Contains(text, "postrouting") {
		t.Errorf("what leaves is looked at:\n%s", text)
	}

	seen := w.counter(Seen, "", false)
	was := w.counter(Banned, "ban/crowdsec", false)
	for range 5 {
		if err := w.client.UDP(bad4, w.to(w.host, bad4)); err != nil {
			t.Fatal(err)
		}
	}
	if got := w.counter(Banned, "ban/crowdsec", false) - was; got != 5 {
		t.Errorf("5 packets were counted as %d", got)
	}
	if got := w.counter(Seen, "", false) - seen; got != 5 {
		t.Errorf("5 packets were seen as %d", got)
	}
	for name, n := range map[string]uint64{
		"list on IPv6": w.counter(Banned, "ban/lists:firehol", true),
		"range":        w.counter(Banned, "ban/CAPI", false),
		"no class":     w.counter(Unclassified, "", true),
	} {
		if n == 0 {
			t.Errorf("%s: nothing counted", name)
		}
	}
	w.update(Changes{Classes: []Class{{4, "ban/late"}}, Put: []Element{{bad4, 4, time.Hour}}})
	w.stopped(false, bad4)
	if w.counter(Banned, "ban/late", false) == 0 {
		t.Error("a class that came later counts nothing")
	}
}

// Enforced packets are counted once as well, those of a SYN among them, by class
// and family, and the counts outlive the generation.
func TestCounters(t *testing.T) {
	w := newWorld(t)
	long := strings.Repeat("ban/a list with a long name ", 20)
	all := content(nil, ban(bad4), Element{bad6, 3, time.Hour}, Element{peer4, 99, time.Hour})
	all.Classes = append([]Class{{7, long}}, classes...)
	w.install(config(), all)
	w.update(Changes{Put: []Element{{addr("203.0.113.5"), 7, time.Hour}}})
	for range 4 {
		w.client.UDP(bad4, netip.AddrPortFrom(node4, 9))
	}
	w.client.TCP(bad4, w.to(w.host, bad4))
	w.client.UDP(bad6, netip.AddrPortFrom(node6, 9))
	w.client.UDP(addr("203.0.113.5"), netip.AddrPortFrom(node4, 9))
	w.client.UDP(peer4, netip.AddrPortFrom(node4, 9))
	w.install(config(), all)
	got, err := w.conn.Counters()
	if err != nil {
		t.Fatal(err)
	}
	packets := map[string]uint64{}
	for _, c := range got {
		packets[fmt.Sprintf("%d %s %t", c.Kind, c.Name, c.IPv6)] += c.Packets
	}
	want := map[string]uint64{
		"0 ban/crowdsec false": 5, "0 ban/lists:firehol true": 1, "0 " + long + " false": 1, "4  false": 1, "2  false": 7,
	}
	for key, n := range want {
		if packets[key] != n {
			t.Errorf("%s: %d packets, want %d", key, packets[key], n)
		}
	}
	w.nft()
}

// Elements and ranges end by themselves, with nobody there to remove them, and
// an odd timeout never means for ever.
func TestTimeouts(t *testing.T) {
	w := newWorld(t)
	short := 900 * time.Millisecond
	odd := []netip.Addr{addr("203.0.113.1"), addr("203.0.113.2"), addr("203.0.113.3"), addr("203.0.113.4")}
	w.install(config(), content(nil,
		Element{bad4, 1, short}, Element{bad6, 1, short}, Element{peer4, 1, Forever},
		Element{odd[0], 1, 300 * time.Microsecond}, Element{odd[1], 1, 0}, Element{odd[2], 1, -time.Hour},
		Element{odd[3], 1, 100 * 365 * 24 * time.Hour},
		Range{addr("203.0.113.100"), addr("203.0.113.103"), 1, short},
		Range{addr("203.0.113.104"), addr("203.0.113.107"), 1, Forever},
		Range{addr("203.0.113.108"), addr("203.0.113.110"), 1, -1}))
	found, err := w.conn.Sample([]netip.Addr{peer4, odd[3], addr("203.0.113.105"), odd[1], odd[2]})
	if err != nil {
		t.Fatal(err)
	}
	if found[0].Left != Forever || found[1].Left < 99*365*24*time.Hour || found[2].Left != Forever || found[3].Banned() || found[4].Banned() {
		t.Errorf("found %+v", found)
	}
	w.conn.Close()
	w.stopped(true, bad4, bad6, peer4, odd[3], addr("203.0.113.101"), addr("203.0.113.105"))
	w.stopped(false, odd[0], odd[1], odd[2], addr("203.0.113.109"))
	time.Sleep(short)
	w.stopped(false, bad4, bad6, addr("203.0.113.101"))
	w.stopped(true, peer4, addr("203.0.113.105"))
}

// A ban is renewed, shortened, reclassified and lifted by saying so, on kernels
// that can delete what may be missing and on those that cannot.
func TestUpdate(t *testing.T) {
	for _, destroys := range []bool{true, false} {
		t.Run(fmt.Sprintf("destroys %t", destroys), func(t *testing.T) {
			w := newWorld(t)
			if !w.conn.destroys {
				t.Log("this kernel has nothing but the old way")
			}
			w.conn.destroys = w.conn.destroys && destroys
			w.install(config(), content(nil, Element{bad4, 1, time.Minute}, Element{bad6, 1, time.Hour}, ban(peer6),
				Range{addr("203.0.113.100"), addr("203.0.113.103"), 1, time.Minute}, banRange("203.0.113.110", "203.0.113.120")))
			change := Changes{
				Classes: []Class{{4, "ban/late"}, {1, "ban/crowdsec"}},
				Put:     []Element{{bad4, 2, time.Hour}, {bad6, 1, time.Minute}, {peer4, 4, time.Hour}},
				Delete:  []netip.Addr{peer6, addr("203.0.113.9"), addr("2001:db8:f00::9"), peer6},
				PutRanges: []Range{
					{addr("203.0.113.100"), addr("203.0.113.103"), 3, time.Hour}, // renewed
					banRange("203.0.113.110", "203.0.113.114"),                   // a hole torn into it
					banRange("203.0.113.116", "203.0.113.120"),
				},
				DeleteRanges: []Range{banRange("203.0.113.110", "203.0.113.120"), banRange("203.0.113.200", "203.0.113.201")},
			}
			want := []Found{
				{addr("203.0.113.66"), bad4, bad4, 2, "ban/CAPI", time.Hour},
				{bad6, bad6, bad6, 1, "ban/crowdsec", time.Minute},
				{peer4, peer4, peer4, 4, "ban/late", time.Hour},
				{Addr: peer6},
				{Addr: addr("203.0.113.9")},
				{addr("203.0.113.101"), addr("203.0.113.100"), addr("203.0.113.103"), 3, "ban/lists:firehol", time.Hour},
				{addr("203.0.113.114"), addr("203.0.113.110"), addr("203.0.113.114"), 1, "ban/crowdsec", time.Hour},
				{Addr: addr("203.0.113.115")},
				{addr("203.0.113.116"), addr("203.0.113.116"), addr("203.0.113.120"), 1, "ban/crowdsec", time.Hour},
			}
			var ask []netip.Addr
			for _, f := range want {
				ask = append(ask, f.Addr)
			}
			for range 3 { // the same wish again is fine
				w.update(change)
				got, err := w.conn.Sample(ask)
				if err != nil {
					t.Fatal(err)
				}
				close := cmp.Comparer(func(a, b time.Duration) bool { return (a - b).Abs() < 5*time.Second })
				if diff := cmp.Diff(want, got, close, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
					t.Error(diff)
				}
			}
			w.stopped(true, bad4, peer4, bad6, addr("203.0.113.101"), addr("203.0.113.120"))
			w.stopped(false, peer6, addr("203.0.113.115"))
			if h := w.read(); !h.Intact {
				t.Error("our own change is taken for another's")
			}
			if w.counter(Banned, "ban/late", false) == 0 {
				t.Error("a class that came later counts nothing")
			}
			w.update(Changes{})
			w.nft()
		})
	}
}

// A class that nobody named is no way in.
// Where no range is banned none is asked for, and the first one brings the rule
// with it, in observe mode and beside locks too.
func TestFirstRange(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"enforce": func(*Config) {},
		"observe": func(c *Config) { c.Observe = true },
		"locks":   func(c *Config) { c.Locks = []Lock{{Name: "nobody", Ports: []uint16{9}}} },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			cfg := config()
			change(&cfg)
			w.install(cfg, content(nil, ban(bad4)))
			if asks := strings.Contains(w.nft(), "saddr map @nets"); asks != (name == "locks") {
				t.Errorf("ranges are asked for: %t", asks)
			}
			before := w.counter(Banned, "ban/crowdsec", false)
			w.update(Changes{PutRanges: []Range{banRange("203.0.113.0", "203.0.113.127")}})
			if err := w.client.UDP(peer4, w.to(w.host, peer4)); (err == nil) != cfg.Observe {
				t.Errorf("the first range: %v", err)
			}
			if w.counter(Banned, "ban/crowdsec", false) == before {
				t.Error("the first range counts nothing")
			}
			for range 2 {
				if h := w.read(); !h.Intact || h.Nets4 != 1 {
					t.Errorf("after the first range: %+v", h)
				}
				w.update(Changes{PutRanges: []Range{banRange("198.51.100.0", "198.51.100.255")},
					DeleteRanges: []Range{banRange("203.0.113.0", "203.0.113.127")}})
			}
			listing := w.nft()
			want := map[string]int{"ip saddr map @nets4_1": 1, "ip6 saddr map @nets6_1": 0}
			if name == "locks" {
				want["ip6 saddr map @nets6_1"] = 1
			}
			for rule, n := range want {
				if got := strings.Count(listing, rule); got != n {
					t.Errorf("%d times %q, not %d", got, rule, n)
				}
			}
		})
	}
}

func TestUnknownClass(t *testing.T) {
	w := newWorld(t)
	w.install(config(), content(nil, Element{bad4, 77, time.Hour}))
	w.stopped(true, bad4)
	if w.counter(Unclassified, "", false) == 0 {
		t.Error("nothing was counted")
	}
}

func TestLocks(t *testing.T) {
	w := newWorld(t)
	web := w.host.Addr.Port()
	lock := Lock{Name: "cloudflare only", Ports: []uint16{web, 443}, From: []netip.Prefix{prefix("198.51.100.0/24"), prefix("2001:db8:f00::/120")}}
	cfg := config()
	cfg.Locks = []Lock{lock}
	other := w.node.Serve(netip.AddrPortFrom(netip.IPv6Unspecified(), 0))
	behind := w.pod.Serve(netip.AddrPortFrom(netip.IPv6Unspecified(), web))
	cloud4, stranger6 := addr("198.51.100.3"), addr("2001:db8:f00:1::5")

	try := func(want map[string]bool) {
		t.Helper()
		got := map[string]bool{
			"stranger": w.client.TCP(peer4, netip.AddrPortFrom(node4, web)) == nil, "stranger by UDP": w.client.UDP(peer4, netip.AddrPortFrom(node4, web)) == nil,
			"stranger on IPv6": w.client.TCP(stranger6, netip.AddrPortFrom(node6, web)) == nil,
			"cloud":            w.client.TCP(cloud4, netip.AddrPortFrom(node4, web)) == nil, "cloud on IPv6": w.client.UDP(peer6, netip.AddrPortFrom(node6, web)) == nil,
			"another port":    w.client.TCP(peer4, netip.AddrPortFrom(node4, other.Addr.Port())) == nil,
			"another machine": w.client.TCP(peer4, netip.AddrPortFrom(pod4, behind.Addr.Port())) == nil,
			"from inside":     w.pod.TCP(pod4, netip.AddrPortFrom(node4, web)) == nil,
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
	w.install(cfg, content(nil))
	try(map[string]bool{"cloud": true, "cloud on IPv6": true, "another port": true, "another machine": true, "from inside": true,
		"stranger": false, "stranger by UDP": false, "stranger on IPv6": false})
	if w.counter(Locked, lock.Name, false) == 0 || w.counter(Locked, lock.Name, true) == 0 {
		t.Error("nothing was counted")
	}
	w.nft()

	cfg.Locks[0].To = []netip.Prefix{prefix("10.42.0.0/28"), prefix("fd42::/64")} // as if announced for a load balancer
	w.install(cfg, content(nil))
	try(map[string]bool{"cloud": true, "cloud on IPv6": true, "another port": true, "another machine": false, "from inside": true,
		"stranger": false, "stranger by UDP": false, "stranger on IPv6": false})

	cfg.Observe = true
	w.install(cfg, content([]netip.Prefix{prefix("203.0.113.7/32")}))
	try(map[string]bool{"cloud": true, "cloud on IPv6": true, "another port": true, "another machine": true, "from inside": true,
		"stranger": true, "stranger by UDP": true, "stranger on IPv6": true})
}

// The uint16 of an attribute's length overflows at 2341 elements a message.
func TestManyElements(t *testing.T) {
	w := newWorld(t)
	const n = 5000
	for _, observe := range []bool{false, true} { // names are longer than marks
		cfg := config()
		cfg.Observe = observe
		w.install(cfg, Content{Classes: classes, Elements: numbered(n, time.Hour)})
		if h := w.read(); h.Bans4 != n {
			t.Errorf("%d elements landed, want %d", h.Bans4, n)
		}
		var put []Element
		for e := range numbered(2*n, time.Hour) {
			e.Addr = mapped6(e.Addr)
			put = append(put, e)
		}
		var ranges []Range
		for i := range n {
			from := netip.AddrFrom4([4]byte{11, byte(i >> 8), byte(i), 0})
			ranges = append(ranges, Range{from, from.Next().Next(), 1, time.Hour})
		}
		w.update(Changes{Put: put, PutRanges: ranges})
		if h := w.read(); h.Bans6 != 2*n || h.Nets4 != n {
			t.Errorf("%d elements and %d ranges landed, want %d and %d", h.Bans6, h.Nets4, 2*n, n)
		}
		found, err := w.conn.Sample([]netip.Addr{put[0].Addr, put[2340].Addr, put[2*n-1].Addr, ranges[n-1].To})
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range found {
			if !f.Banned() {
				t.Errorf("%v is not banned", f.Addr)
			}
		}
	}
}

func mapped6(a netip.Addr) netip.Addr {
	four := a.As4()
	six := peer6.As16()
	copy(six[12:], four[:])
	return netip.AddrFrom16(six)
}

func TestErrors(t *testing.T) {
	w := newWorld(t)
	if err := w.conn.Update(Changes{Put: []Element{ban(bad4)}}); !errors.Is(err, ErrNotInstalled) {
		t.Errorf("update before install: %v", err)
	}
	if _, err := w.conn.Sample([]netip.Addr{bad4}); !errors.Is(err, ErrNotInstalled) {
		t.Errorf("sample before install: %v", err)
	}
	if h := w.read(); h.Present || h.Enforcing {
		t.Errorf("read %+v of nothing", h)
	}
	w.install(config(), content(nil, ban(bad4)))

	// None of these costs what is enforced.
	overlap := content(nil, banRange("203.0.113.1", "203.0.113.9"), Range{addr("203.0.113.5"), addr("203.0.113.12"), 2, time.Hour})
	for name, err := range map[string]error{
		"overlapping ranges": w.conn.Install(config(), overlap),
		"invalid address":    w.conn.Install(config(), content(nil, ban(netip.Addr{}))),
		"zone":               w.conn.Install(config(), content(nil, ban(addr("fe80::1%eth0")))),
		"no class":           w.conn.Install(config(), content(nil, Element{bad4, 0, time.Hour})),
		"reversed range":     w.conn.Install(config(), content(nil, banRange("203.0.113.9", "203.0.113.1"))),
		"mixed range":        w.conn.Install(config(), content(nil, banRange("203.0.113.9", "2001:db8::"))),
		"class without mark": w.conn.Install(config(), Content{Classes: []Class{{0, "ban/x"}}}),
		"two names":          w.conn.Install(config(), Content{Classes: []Class{{1, "ban/x"}, {1, "ban/y"}}}),
		"bad config":         w.conn.Install(Config{Exempt: []string{"a*b"}}, content(nil)),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
		t.Logf("%s: %v", name, err)
	}
	w.stopped(true, bad4)
	if sets := strings.Count(w.nft(), "map bans4_"); sets != 1 {
		t.Errorf("%d generations are there, want the one that enforces", sets)
	}

	other, err := Open(Options{NetNS: w.node.FD()})
	if !errors.Is(err, ErrOwned) {
		t.Errorf("open what is owned: %v", err)
	}
	if err == nil {
		other.Close()
	}
	reader := w.open(Options{ReadOnly: true})
	if h, err := reader.Read(); err != nil || !h.Enforcing || h.Intact {
		t.Errorf("read only: %+v, %v", h, err)
	}
	if f, err := reader.Sample([]netip.Addr{bad4}); err != nil || !f[0].Banned() {
		t.Errorf("read only: %+v, %v", f, err)
	}
	if err := reader.Install(config(), content(nil)); err == nil {
		t.Error("a reader installs")
	}
	if err := reader.Remove(); !errors.Is(err, ErrOwned) {
		t.Errorf("a reader removes: %v", err)
	}
	shared := w.open(Options{Shared: true})
	if err := shared.Install(config(), content(nil)); !errors.Is(err, ErrOwned) {
		t.Errorf("install on what is owned: %v", err)
	}
	w.conn.Close()
	if _, err := w.conn.Read(); err == nil {
		t.Error("a closed connection reads")
	}
}

// Without the capability there is one clear sentence.
func TestPermission(t *testing.T) {
	ns := netns.New(t)
	err := ns.Run(func() error {
		// Of this thread alone, which is thrown away.
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, 65534, 65534, 65534); errno != 0 {
			return errno
		}
		c, err := Open(Options{})
		if err == nil {
			c.Close()
		}
		return err
	})
	if !errors.Is(err, ErrPermission) {
		t.Errorf("error %v, want %v", err, ErrPermission)
	}
	t.Log(err)
}

// What the administrator saves can be loaded again: a firewall that does not
// come up at boot for a line of ours would be the worst of all.
func TestListingLoads(t *testing.T) {
	for _, observe := range []bool{false, true} {
		for _, action := range []Action{Drop, Reject} {
			w := newWorld(t)
			conn := w.open(Options{Shared: true})
			cfg := config()
			cfg.Observe, cfg.Action, cfg.Log = observe, action, &Log{PerSecond: 3, Burst: 10}
			cfg.Locks = []Lock{{Name: "web", Ports: []uint16{80, 443}, From: clientNets, To: clientNets}}
			all := content(clientNets, ban(bad4), ban(bad6), Element{peer4, 2, time.Hour},
				banRange("203.0.113.100", "203.0.113.103"), Range{addr("203.0.113.104"), addr("203.0.113.111"), 2, Forever},
				banRange("255.255.255.0", "255.255.255.255"), banRange("2001:db8:f00::1000", "2001:db8:f00::1fff"))
			all.Classes = append([]Class{{9, "ban/cut\" drop; #\n$x\\"}}, classes...) // CrowdSec takes any origin
			if err := conn.Install(cfg, all); err != nil {
				t.Fatal(err)
			}
			file := t.TempDir() + "/saved.nft"
			if err := os.WriteFile(file, []byte(w.nft()), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := netns.New(t).Exec("nft", "-f", file); err != nil {
				t.Errorf("observe %t action %d: %v", observe, action, err)
			}
		}
	}
}

// A range of IPv6 that begins, ends or lies among the IPv4-mapped addresses is a
// range of IPv6.
func TestMappedRanges(t *testing.T) {
	w := newWorld(t)
	w.install(config(), content(nil,
		banRange("::fffe:0:0", "::fffe:ffff:ffff"), banRange("::ffff:0:0", "::ffff:ffff:ffff"), banRange("::1:0:0:0:0", "2001:db8:f00::66")))
	w.stopped(false, peer4, bad4)
	w.stopped(true, bad6)
	if h := w.read(); h.Nets4 != 0 || h.Nets6 == 0 {
		t.Errorf("%+v", h)
	}
}

package nft

import (
	"encoding/json"
	"fmt"
	"iter"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/edgeward/edgeward/internal/netns"
)

// world is a client, a node that enforces, and a pod behind the node:
//
//	client c0 ── up0 node cni0 ── p0 pod
//
// The client owns clientNets and speaks from any of their addresses.
type world struct {
	t                 testing.TB
	client, node, pod *netns.NS
	host              *netns.Server // on the node
	inPod             *netns.Server
	conn              *Conn
}

var (
	clientNets = []netip.Prefix{prefix("203.0.113.0/24"), prefix("198.51.100.0/24"), prefix("2001:db8:f00::/48")}

	node4 = addr("192.0.2.1")
	node6 = addr("2001:db8::1")
	pod4  = addr("10.42.0.2")
	pod6  = addr("fd42::2")

	peer4 = addr("203.0.113.7")
	peer6 = addr("2001:db8:f00::7")
	bad4  = addr("203.0.113.66")
	bad6  = addr("2001:db8:f00::66")
)

func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }
func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, client: netns.New(t), node: netns.New(t), pod: netns.New(t)}
	netns.Cable(
		netns.End{NS: w.client, Name: "c0", Addrs: []netip.Prefix{prefix("192.0.2.2/24"), prefix("2001:db8::2/64")}},
		netns.End{NS: w.node, Name: "up0", Addrs: []netip.Prefix{prefix("192.0.2.1/24"), prefix("2001:db8::1/64")}})
	netns.Cable(
		netns.End{NS: w.pod, Name: "p0", Addrs: []netip.Prefix{prefix("10.42.0.2/24"), prefix("fd42::2/64")}},
		netns.End{NS: w.node, Name: "cni0", Addrs: []netip.Prefix{prefix("10.42.0.1/24"), prefix("fd42::1/64")}})
	for _, p := range clientNets {
		w.client.Own(p)
		via := addr("192.0.2.2")
		if p.Addr().Is6() {
			via = addr("2001:db8::2")
		}
		w.node.Route(p, via)
	}
	w.client.Route(prefix("10.42.0.0/24"), node4)
	w.client.Route(prefix("fd42::/64"), node6)
	w.pod.Route(prefix("0.0.0.0/0"), addr("10.42.0.1"))
	w.pod.Route(prefix("::/0"), addr("fd42::1"))
	w.node.Forwarding()
	w.host = w.node.Serve(netip.AddrPortFrom(netip.IPv6Unspecified(), 0))
	w.inPod = w.pod.Serve(netip.AddrPortFrom(netip.IPv6Unspecified(), 0))
	w.conn = w.open(Options{})
	return w
}

func (w *world) open(o Options) *Conn {
	w.t.Helper()
	o.NetNS = w.node.FD()
	c, err := Open(o)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	return c
}

// config is the usual one.
func config() Config { return Config{Exempt: []string{"lo", "cni*"}} }

var classes = []Class{{1, "ban/crowdsec"}, {2, "ban/CAPI"}, {3, "ban/lists:firehol"}}

func content(protected []netip.Prefix, rows ...any) Content {
	c := Content{Classes: classes, Protected: protected}
	var elements []Element
	var ranges []Range
	for _, r := range rows {
		switch r := r.(type) {
		case Element:
			elements = append(elements, r)
		case Range:
			ranges = append(ranges, r)
		}
	}
	c.Elements, c.Ranges = slices.Values(elements), slices.Values(ranges)
	return c
}

func ban(a netip.Addr) Element { return Element{a, 1, time.Hour} }

func banRange(from, to string) Range { return Range{addr(from), addr(to), 1, time.Hour} }

func (w *world) install(cfg Config, c Content) {
	w.t.Helper()
	if err := w.conn.Install(cfg, c); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) update(c Changes) {
	w.t.Helper()
	if err := w.conn.Update(c); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) read() Have {
	w.t.Helper()
	h, err := w.conn.Read()
	if err != nil {
		w.t.Fatal(err)
	}
	return h
}

// to is where on a server of the node or the pod a source of this family
// reaches it.
func (w *world) to(s *netns.Server, from netip.Addr) netip.AddrPort {
	at := map[bool]netip.Addr{false: node4, true: node6}
	if s == w.inPod {
		at = map[bool]netip.Addr{false: pod4, true: pod6}
	}
	return netip.AddrPortFrom(at[from.Is6()], s.Addr.Port())
}

// stopped demands that each of from reaches neither the node nor the pod by TCP
// or UDP, and passes the opposite.
func (w *world) stopped(want bool, from ...netip.Addr) {
	w.t.Helper()
	client := w.client
	if !want {
		client = client.Patient()
	}
	var errs []error
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, a := range from {
		for name, s := range map[string]*netns.Server{"host": w.host, "pod": w.inPod} {
			for proto, try := range map[string]func(netip.Addr, netip.AddrPort) error{"udp": client.UDP, "tcp": client.TCP} {
				wg.Go(func() {
					if err := try(a, w.to(s, a)); (err != nil) != want {
						mu.Lock()
						defer mu.Unlock()
						errs = append(errs, fmt.Errorf("%s from %v to %s: stopped %t, want %t (%v)", proto, a, name, err != nil, want, err))
					}
				})
			}
		}
	}
	wg.Wait()
	for _, err := range errs {
		w.t.Error(err)
	}
}

// load gives a ruleset of somebody else's to the node.
func (w *world) load(text string) {
	w.t.Helper()
	load(w.t, w.node, text)
}

func load(t testing.TB, ns *netns.NS, text string) {
	t.Helper()
	file := t.TempDir() + "/rules.nft"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	ns.MustExec("nft", "-f", file)
}

// nft lists the ruleset as nft sees it: that it can is part of every test.
func (w *world) nft() string {
	w.t.Helper()
	text := w.node.MustExec("nft", "list", "ruleset")
	var any struct{ Nftables []map[string]any }
	if err := json.Unmarshal([]byte(w.node.MustExec("nft", "-j", "list", "ruleset")), &any); err != nil {
		w.t.Errorf("nft -j list ruleset: %v", err)
	}
	return text
}

func (w *world) counter(k Kind, name string, six bool) uint64 {
	w.t.Helper()
	all, err := w.conn.Counters()
	if err != nil {
		w.t.Fatal(err)
	}
	for _, c := range all {
		if c.Kind == k && c.Name == name && c.IPv6 == six {
			return c.Packets
		}
	}
	w.t.Errorf("no counter of %v %q", k, name)
	return 0
}

// numbered yields n addresses of 100.64.0.0/10 on.
func numbered(n int, timeout time.Duration) iter.Seq[Element] {
	return func(yield func(Element) bool) {
		for i := range n {
			a := netip.AddrFrom4([4]byte{100 + byte(i>>24), 64 + byte(i>>16), byte(i >> 8), byte(i)})
			if !yield(Element{a, uint32(i%3) + 1, timeout}) {
				return
			}
		}
	}
}

package bouncer

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/edgeward/edgeward/internal/decision"
	"github.com/edgeward/edgeward/internal/netns"
)

func texts(list []netip.Prefix) []string {
	out := []string{}
	for _, p := range list {
		out = append(out, p.String())
	}
	return out
}

// TestGateways: those of every path of every default route, of all tables, and no
// others.
func TestGateways(t *testing.T) {
	ns := netns.New(t)
	for _, cmd := range []string{
		"link add up0 type veth peer name up1", "link set up0 up", "addr add 192.168.7.2/24 dev up0", "addr add 2001:db8:7::2/64 dev up0 nodad",
		"link set up1 up", "addr add 192.168.8.2/24 dev up1",
		"route add default via 192.168.7.1", "-6 route add default via fe80::a dev up0",
		"route add default table 77 nexthop via 192.168.7.3 nexthop via 192.168.8.3", "-6 route add default via 2001:db8:7::1 table 78",
		"route add default via inet6 fe80::b dev up1 metric 9", "route add default dev up1 metric 10", "route add 10.9.0.0/16 via 192.168.7.99",
	} {
		ns.MustExec("ip", strings.Fields(cmd)...)
	}
	var got []netip.Prefix
	ns.Must(func() (err error) {
		got, err = gateways(t.Context())
		return err
	})
	slices.SortFunc(got, netip.Prefix.Compare)
	want := []string{"192.168.7.1/32", "192.168.7.3/32", "192.168.8.3/32", "2001:db8:7::1/128", "fe80::a/128", "fe80::b/128"}
	if d := cmp.Diff(want, texts(got)); d != "" {
		t.Error(d)
	}
}

func TestParseNameservers(t *testing.T) {
	resolv := "# nameserver 10.0.0.9\nnameserver 10.0.0.1\nnameserver fe80::1%eth0\nsearch example.com\nnameserver\nnameserver x\n"
	if d := cmp.Diff([]string{"10.0.0.1/32", "fe80::1/128"}, texts(parseNameservers([]byte(resolv)))); d != "" {
		t.Error(d)
	}
}

func TestParseServers(t *testing.T) {
	for text, want := range map[string][]string{
		`{"ServerURL": "https://192.0.2.9:6443", "ServerAddresses": ["192.0.2.10:6443", "[2001:db8::1]:6443", "192.0.2.9:6443"], "Listener": null}`: {"192.0.2.10", "192.0.2.9", "2001:db8::1"},
		`{"ServerURL": "https://cluster.lan:6443"}`: {"cluster.lan"},
		`{}`: nil,
	} {
		if got, err := parseServers([]byte(text)); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %v %v, want %v", text, got, err, want)
		}
	}
	if _, err := parseServers([]byte("{")); err == nil {
		t.Error("half a file is taken for a whole one")
	}
}

// TestTunnels: what is reached through a tunnel is protected, and not the whole
// world because all goes through one.
func TestTunnels(t *testing.T) {
	ns := netns.New(t)
	for _, cmd := range []string{
		"ip tuntap add dev wg0 mode tun", "ip addr add 10.8.0.1/24 dev wg0", "ip addr add fd08::1/64 dev wg0", "ip link set wg0 up",
		"ip route add 10.9.0.0/16 dev wg0", "ip route add 100.64.0.0/10 dev wg0 table 52",
		"ip route add 0.0.0.0/1 dev wg0", "ip route add default dev wg0",
	} {
		args := strings.Fields(cmd)
		ns.MustExec(args[0], args[1:]...)
	}
	var got []netip.Prefix
	ns.Must(func() (err error) {
		got, err = tunnels(t.Context())
		return err
	})
	for p, want := range map[string]bool{"10.8.0.0/24": true, "fd08::/64": true, "10.9.0.0/16": true, "100.64.0.0/10": true,
		"0.0.0.0/1": false, "0.0.0.0/0": false, "ff00::/8": false} {
		if slices.Contains(texts(got), p) != want {
			t.Errorf("%s is protected: %v, want %v: %v", p, !want, want, got)
		}
	}
}

// TestTunnelSplit: who sends all but the home network through a provider, as
// AllowedIPs say that, does not protect the world.
func TestTunnelSplit(t *testing.T) {
	ns := netns.New(t)
	for _, cmd := range []string{
		"tuntap add dev wg0 mode tun", "addr add 10.66.0.2/32 dev wg0", "link set wg0 up", "route add 10.67.0.0/16 nexthop dev wg0 nexthop dev lo",
	} {
		ns.MustExec("ip", strings.Fields(cmd)...)
	}
	zoneOf([]netip.Prefix{netip.MustParsePrefix("192.168.0.0/16")}).divide(netip.MustParsePrefix("0.0.0.0/0"), func(p netip.Prefix, in bool) {
		if !in {
			ns.MustExec("ip", "route", "add", p.String(), "dev", "wg0")
		}
	})
	var got []netip.Prefix
	ns.Must(func() (err error) {
		got, err = tunnels(t.Context())
		return err
	})
	private, _ := decision.Known("private")
	for _, p := range got {
		if !zoneOf(private).holds(p) {
			t.Errorf("%v is public and protected", p)
		}
	}
	for _, p := range []string{"10.66.0.2/32", "10.67.0.0/16"} {
		if !slices.Contains(texts(got), p) {
			t.Errorf("%s is reached through the tunnel and not protected: %v", p, got)
		}
	}
}

// TestWhyProtected: of a wide range the reason that says most is named, of an
// address the narrowest.
func TestWhyProtected(t *testing.T) {
	var list []Protected
	for _, r := range [][2]string{
		{"0.0.0.0/32", "a machine that has no address yet"}, {"127.0.0.0/8", "loopback"}, {"192.168.7.0/24", whyOperator},
		{"192.168.7.1/32", whyGateway}, {"192.168.7.2/32", whyOwn}, {"192.168.7.3/32", "LAPI"}, {"10.42.0.0/16", "pods"}, {"10.42.0.9/32", whyOwn},
	} {
		list = append(list, Protected{netip.MustParsePrefix(r[0]), r[1]})
	}
	for p, want := range map[string]string{
		"0.0.0.0/0": whyGateway, "10.0.0.0/8": whyOwn, "192.168.7.128/25": whyOperator, "192.168.7.3/32": "LAPI", "192.168.7.9/32": whyOperator,
		"0.0.0.0/8": "a machine that has no address yet", "10.42.3.0/24": "pods", "8.0.0.0/8": "",
	} {
		if got := whyProtected(list, netip.MustParsePrefix(p)); got != want {
			t.Errorf("%s: %q, want %q", p, got, want)
		}
	}
}

func FuzzParseRoutes(f *testing.F) {
	if table, err := syscall.NetlinkRIB(syscall.RTM_GETROUTE, syscall.AF_UNSPEC); err == nil {
		f.Add(table)
	}
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, table []byte) {
		routes, err := parseRoutes(table)
		for _, r := range routes {
			if !r.to.IsValid() || len(r.out) == 0 || err != nil {
				t.Errorf("%+v %v", r, err)
			}
		}
	})
}

func TestHostOf(t *testing.T) {
	for url, want := range map[string]string{
		"http://lapi.crowdsec:8080": "lapi.crowdsec", "https://[2001:db8::1]:8080/x": "2001:db8::1",
		"unix:///run/lapi.sock": "", "http://10.0.0.1": "10.0.0.1",
	} {
		if got := hostOf(url); got != want {
			t.Errorf("%s: %q, want %q", url, got, want)
		}
	}
}

// TestGuardKeepsWhatItKnew: an address that was found once stays protected while
// its source fails, and goes when the source says so.
func TestGuardKeepsWhatItKnew(t *testing.T) {
	answers := [][]netip.Prefix{{netip.MustParsePrefix("203.0.113.1/32")}, nil, {netip.MustParsePrefix("203.0.113.2/32")}}
	turn := 0
	g := &guard{
		log:   slog.New(slog.DiscardHandler),
		fixed: []Protected{{netip.MustParsePrefix("203.0.113.1/32"), "protect.addresses"}, {netip.MustParsePrefix("127.0.0.0/8"), "loopback"}},
		sources: []source{{why: "LAPI", read: func(context.Context) ([]netip.Prefix, error) {
			turn++
			if answers[turn-1] == nil {
				return nil, errors.New("no answer")
			}
			return answers[turn-1], nil
		}}, {why: "other", read: func(context.Context) ([]netip.Prefix, error) {
			return []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")}, nil
		}}},
	}
	want := [][]string{
		{"127.0.0.0/8", "203.0.113.0/24", "203.0.113.1/32"},
		{"127.0.0.0/8", "203.0.113.0/24", "203.0.113.1/32"},
		{"127.0.0.0/8", "203.0.113.0/24", "203.0.113.1/32", "203.0.113.2/32"},
	}
	for i := range want {
		got := g.look(t.Context())
		if d := cmp.Diff(want[i], texts(prefixesOf(got))); d != "" {
			t.Errorf("turn %d: %s", i, d)
		}
		if i == 2 {
			for p, why := range map[string]string{"203.0.113.2/32": "LAPI", "203.0.113.9/32": "other", "0.0.0.0/0": "protect.addresses", "192.0.2.1/32": ""} {
				if got := whyProtected(got, netip.MustParsePrefix(p)); got != why {
					t.Errorf("%s is protected as %q, want %q", p, got, why)
				}
			}
		}
	}
}

// TestGuardOfThisMachine looks for real: whatever the machine is, its loopback,
// LAPI and API server are protected.
func TestGuardOfThisMachine(t *testing.T) {
	c := Defaults()
	c.LAPI.URL = "http://198.51.100.7:8080"
	c.Protect.Addresses = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
	env := map[string]string{"KUBERNETES_SERVICE_HOST": "198.51.100.8"}
	list := newGuard(&c, func(k string) string { return env[k] }, slog.New(slog.DiscardHandler)).look(t.Context())
	for _, want := range []string{"127.0.0.0/8", "::1/128", "fe80::/10", "10.42.0.0/16", "10.43.0.0/16", "104.16.0.0/13",
		"192.0.2.0/24", "198.51.100.7/32", "198.51.100.8/32"} {
		if !slices.Contains(texts(prefixesOf(list)), want) {
			t.Errorf("%s is not protected: %v", want, list)
		}
	}
	own, err := interfaceAddrs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range own {
		if whyProtected(list, p) == "" {
			t.Errorf("%v is this machine's and not protected", p)
		}
	}
}

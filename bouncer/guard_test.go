package bouncer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/edgeward/edgeward/internal/netns"
)

func texts(list []netip.Prefix) []string {
	out := []string{}
	for _, p := range list {
		out = append(out, p.String())
	}
	return out
}

func TestParseRoutes(t *testing.T) {
	gateway := fmt.Sprintf("%08X", binary.NativeEndian.Uint32([]byte{192, 168, 7, 1}))
	four := "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n" +
		"eth0\t00000000\t" + gateway + "\t0003\t0\t0\t0\t00000000\t0\t0\t0\n" +
		"eth0\t0007A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n" +
		"eth1\t00000000\t00000000\t0001\t0\t0\t0\t00000000\t0\t0\t0\n" +
		"eth1\t00000000\tnonsense\t0001\t0\t0\t0\t00000000\t0\t0\t0\n\nshort\n"
	if d := cmp.Diff([]string{"192.168.7.1/32"}, texts(parseRoutes4([]byte(four)))); d != "" {
		t.Error(d)
	}
	zero := "00000000000000000000000000000000"
	six := zero + " 00 " + zero + " 00 fe80000000000000000000000000000a 00000400 00000001 00000000 00450003 eth0\n" +
		"20010db8000000000000000000000000 40 " + zero + " 00 " + zero + " 00000100 00000001 00000000 00000001 eth0\n" +
		zero + " 00 " + zero + " 00 " + zero + " ffffffff 00000001 00000000 00200200 lo\n"
	if d := cmp.Diff([]string{"fe80::a/128"}, texts(parseRoutes6([]byte(six)))); d != "" {
		t.Error(d)
	}
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

func FuzzParseRoutes(f *testing.F) {
	if table, err := syscall.NetlinkRIB(syscall.RTM_GETROUTE, syscall.AF_UNSPEC); err == nil {
		f.Add(table)
	}
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, table []byte) {
		routes, err := parseRoutes(table)
		for _, r := range routes {
			if !r.to.IsValid() || r.out <= 0 || err != nil {
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

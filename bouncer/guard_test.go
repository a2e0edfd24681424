package bouncer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
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

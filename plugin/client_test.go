package plugin

import (
	"math/rand"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"github.com/edgeward/edgeward/internal/decision"
)

func trust(list ...string) *decision.Ranges { return ranges(&checker{}, "test", list, true) }

func TestClientOf(t *testing.T) {
	proxies := trust("10.0.0.0/8", "fd00::/8", "192.0.2.1")
	for _, c := range []struct {
		name   string
		header string // as in settings: "" is X-Forwarded-For
		peer   string
		sent   []string
		want   string
	}{
		{"a stranger's header is not believed", "", "203.0.113.9", []string{"198.51.100.1"}, "203.0.113.9"},
		{"nor another header", "Cf-Connecting-Ip", "203.0.113.9", []string{"198.51.100.1"}, "203.0.113.9"},
		{"a proxy's header is", "", "10.0.0.1", []string{"198.51.100.1"}, "198.51.100.1"},
		{"and another header", "Cf-Connecting-Ip", "10.0.0.1", []string{"198.51.100.1"}, "198.51.100.1"},
		{"no header", "", "10.0.0.1", nil, "10.0.0.1"},
		{"what the client claimed is left of it", "", "10.0.0.1", []string{"127.0.0.1, 198.51.100.1"}, "198.51.100.1"},
		{"two proxies", "", "10.0.0.1", []string{"1.1.1.1, 198.51.100.1, 10.0.0.2"}, "198.51.100.1"},
		{"two header lines", "", "10.0.0.1", []string{"1.1.1.1, 198.51.100.1", "10.0.0.2,10.0.0.3"}, "198.51.100.1"},
		{"a line that ends the walk", "", "10.0.0.1", []string{"1.1.1.1", "198.51.100.1"}, "198.51.100.1"},
		{"only proxies", "", "10.0.0.1", []string{"10.0.0.9, 10.0.0.2"}, "10.0.0.9"},
		{"garbage on the right", "", "10.0.0.1", []string{"198.51.100.1, unknown"}, "10.0.0.1"},
		{"garbage behind a proxy", "", "10.0.0.1", []string{"198.51.100.1, x, 10.0.0.2"}, "10.0.0.2"},
		{"an empty entry", "", "10.0.0.1", []string{"198.51.100.1,"}, "10.0.0.1"},
		{"an empty header", "", "10.0.0.1", []string{""}, "10.0.0.1"},
		{"a port", "", "10.0.0.1", []string{"198.51.100.1:4711"}, "198.51.100.1"},
		{"IPv6", "", "fd00::1", []string{"2001:DB8::1"}, "2001:db8::1"},
		{"IPv6 with a port", "", "fd00::1", []string{"[2001:db8::1]:4711"}, "2001:db8::1"},
		{"IPv6 in brackets", "", "fd00::1", []string{"[2001:db8::1]"}, "2001:db8::1"},
		{"more hops than there are", "", "10.0.0.1", []string{"198.51.100.1" + strings.Repeat(",10.0.0.2", 500)}, "10.0.0.2"},
		{"a zone is dropped", "", "10.0.0.1", []string{"2001:db8::1%eth0"}, "2001:db8::1"},
		{"IPv4 in IPv6", "", "10.0.0.1", []string{"::ffff:198.51.100.1"}, "198.51.100.1"},
		{"a proxy in IPv6 clothing", "", "10.0.0.1", []string{"198.51.100.1, ::ffff:10.0.0.2"}, "198.51.100.1"},
		{"spaces and tabs", "", "10.0.0.1", []string{" \t198.51.100.1 ,\t10.0.0.2 "}, "198.51.100.1"},
		{"two values where one belongs", "X-Real-Ip", "10.0.0.1", []string{"198.51.100.1", "198.51.100.2"}, "10.0.0.1"},
		{"a list where one belongs", "X-Real-Ip", "10.0.0.1", []string{"198.51.100.1, 198.51.100.2"}, "10.0.0.1"},
		{"leading zeros", "", "10.0.0.1", []string{"198.051.100.001"}, "10.0.0.1"},
	} {
		req := &http.Request{Header: http.Header{}}
		name := c.header
		if name == "" {
			name = "X-Forwarded-For"
		}
		req.Header[name] = c.sent
		got, _ := netip.AddrFromSlice(clientOf(proxies, c.header, req, netip.MustParseAddr(c.peer).AsSlice()))
		if got.String() != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

// TestNoUntrustedHopDecides draws chains of hops and demands that nothing to
// the left of the first hop that is not trusted, seen from the right, matters.
func TestNoUntrustedHopDecides(t *testing.T) {
	proxies := trust("10.0.0.0/8")
	w := rand.New(rand.NewSource(1))
	hops := []string{"10.0.0.1", "10.9.9.9", "198.51.100.1", "203.0.113.7", "junk", "", "::1", "2001:db8::1"}
	ask := func(peer string, chain []string) string {
		req := &http.Request{Header: http.Header{}}
		if len(chain) > 0 {
			req.Header["X-Forwarded-For"] = []string{strings.Join(chain, ", ")}
		}
		got, _ := netip.AddrFromSlice(clientOf(proxies, "", req, netip.MustParseAddr(peer).AsSlice()))
		return got.String()
	}
	for round := 0; round < 2000; round++ {
		peer := hops[w.Intn(4)]
		var chain []string
		for i := w.Intn(5); i > 0; i-- {
			chain = append(chain, hops[w.Intn(len(hops))])
		}
		// The same chain with other claims to the left of the first
		// untrusted or unreadable hop.
		keep := len(chain)
		if strings.HasPrefix(peer, "10.") {
			for keep > 0 {
				keep--
				if !strings.HasPrefix(chain[keep], "10.") {
					break
				}
			}
		}
		var forged []string
		if keep > 0 {
			forged = append(forged, hops[w.Intn(len(hops))], "127.0.0.1")
		}
		forged = append(forged, chain[keep:]...)
		if got, want := ask(peer, forged), ask(peer, chain); got != want {
			t.Fatalf("%s behind %q is %s, and behind %q %s", peer, forged, got, chain, want)
		}
	}
}

func FuzzHop(f *testing.F) {
	for _, s := range []string{"192.0.2.1", "[::1]:80", " ::ffff:10.0.0.1", "x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if octets := hop(s); octets != nil {
			addr, ok := netip.AddrFromSlice(octets)
			if !ok || addr.Is4In6() || addr.Zone() != "" {
				t.Fatalf("hop(%q) = %v", s, octets)
			}
		}
	})
}

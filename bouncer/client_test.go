package bouncer

import (
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"github.com/edgeward/edgeward/internal/decision"
)

func trust(list ...string) *decision.Ranges {
	var prefixes []netip.Prefix
	for _, text := range list {
		p, err := decision.ParsePrefix(text)
		if err != nil {
			panic(err)
		}
		prefixes = append(prefixes, p)
	}
	return decision.NewRanges(prefixes)
}

// TestClientOf has the cases of the plugin's test of the same name: where one
// changes, so must the other.
func TestClientOf(t *testing.T) {
	proxies := trust("10.0.0.0/8", "fd00::/8", "192.0.2.1")
	for _, c := range []struct {
		name   string
		header string // as in the configuration: "" is X-Forwarded-For
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
		name := c.header
		if name == "" {
			name = "X-Forwarded-For"
		}
		got, _ := clientOf(proxies, c.header, http.Header{name: c.sent}, netip.MustParseAddr(c.peer))
		if got.String() != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

// FuzzNoUntrustedHopDecides: what stands left of the first hop, seen from the
// right, that is no trusted proxy, changes nothing; nor does any header of a peer
// that is none.
func FuzzNoUntrustedHopDecides(f *testing.F) {
	f.Add("10.0.0.1", "127.0.0.1", "198.51.100.7, 10.0.0.2")
	f.Add("203.0.113.9", "127.0.0.1", "10.0.0.2")
	f.Add("10.0.0.1", "x,", "[2001:db8::1]:443,10.0.0.2")
	f.Add("::ffff:10.0.0.1", "10.0.0.3", "junk\n, 10.0.0.2")
	proxies := trust("10.0.0.0/8", "fd00::/8")
	f.Fuzz(func(t *testing.T, peerText, forged, chain string) {
		peer, err := netip.ParseAddr(peerText)
		if err != nil {
			return
		}
		peer = bare(peer)
		ask := func(values ...string) netip.Addr {
			client, _ := clientOf(proxies, "", http.Header{"X-Forwarded-For": values}, peer)
			return client
		}
		honest := ask(chain)
		if got, _ := clientOf(proxies, "X-Real-Ip", http.Header{"X-Real-Ip": {chain}, "X-Forwarded-For": {forged}}, peer); got != peer && got != hop(chain) {
			t.Fatalf("%v by X-Real-Ip %q", got, chain)
		}
		if !holds(proxies, peer) {
			if honest != peer || ask(forged, chain) != peer {
				t.Fatalf("a stranger, %v, is %v", peer, honest)
			}
			return
		}
		// A naive walk says where the trusted part of the chain begins.
		entries := strings.Split(chain, ",")
		first := len(entries) - 1
		for first >= 0 && hop(entries[first]).IsValid() && holds(proxies, hop(entries[first])) {
			first--
		}
		if first < 0 || len(entries)-first > maxHops {
			return // proxies all along: what stands left of them is theirs to say
		}
		if got := ask(forged + "," + chain); got != honest {
			t.Fatalf("%q before %q: %v, want %v", forged, chain, got, honest)
		}
		if got := ask(forged, chain); got != honest {
			t.Fatalf("%q in a line before %q: %v, want %v", forged, chain, got, honest)
		}
		want := hop(entries[first])
		if !want.IsValid() {
			want = peer
			if first+1 < len(entries) {
				want = hop(entries[first+1])
			}
		}
		if honest != want {
			t.Fatalf("%q: %v, want %v", chain, honest, want)
		}
	})
}

package wireguard

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/edgeward/edgeward/internal/decision"
)

// quoted is a value for a message, short and in one line.
func quoted(text string) string {
	if len(text) > 60 {
		text = strings.ToValidUTF8(text[:60], "") + "..."
	}
	return strconv.Quote(text)
}

// parsePrefix reads a network or an address.
func parsePrefix(text string) (netip.Prefix, error) { return decision.ParsePrefix(text) }

// lastOf is the last address of a network.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// outer reports whether a is an address of a network that no device can have: the
// first, and of IPv4 the last.
func outer(network netip.Prefix, a netip.Addr) bool {
	return a == network.Masked().Addr() || a.Is4() && a == lastOf(network)
}

// single is the network of one address.
func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// short is a network as people write it: a single address without its length.
func short(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}

// covers reports whether all of b is in a.
func covers(a, b netip.Prefix) bool { return a.Bits() <= b.Bits() && a.Overlaps(b) }

func inAny(a netip.Addr, networks []netip.Prefix) bool {
	return slices.ContainsFunc(networks, func(n netip.Prefix) bool { return n.Contains(a) })
}

func overlapsAny(p netip.Prefix, networks []netip.Prefix) bool {
	return slices.ContainsFunc(networks, p.Overlaps)
}

// comparePrefixes orders IPv4 before IPv6, then by address, then the wider first.
func comparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

// widest sorts networks and takes out what lies in another.
func widest(networks []netip.Prefix) []netip.Prefix {
	slices.SortFunc(networks, comparePrefixes)
	var out []netip.Prefix
	for _, n := range networks {
		if len(out) == 0 || !covers(out[len(out)-1], n) {
			out = append(out, n)
		}
	}
	return out
}

func sameAddresses(a, b []netip.Prefix) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.SortFunc(a, comparePrefixes)
	slices.SortFunc(b, comparePrefixes)
	return slices.Equal(a, b)
}

func list(networks []netip.Prefix) string {
	var out []string
	for _, n := range networks {
		out = append(out, n.String())
	}
	return strings.Join(out, ", ")
}

package bouncer

import (
	"net/netip"
	"slices"
)

// zone is a set of addresses: sorted stretches, both ends included, that neither
// overlap nor touch.
type zone []stretch

type stretch struct{ from, to netip.Addr }

// zoneOf returns the union of prefixes.
func zoneOf(prefixes []netip.Prefix) zone {
	all := make(zone, 0, len(prefixes))
	for _, p := range prefixes {
		p = p.Masked()
		all = append(all, stretch{p.Addr(), lastOf(p)})
	}
	slices.SortFunc(all, func(a, b stretch) int { return a.from.Compare(b.from) })
	out := all[:0]
	for _, s := range all {
		n := len(out)
		if n == 0 || out[n-1].to.Less(s.from) && out[n-1].to.Next() != s.from {
			out = append(out, s)
		} else if out[n-1].to.Less(s.to) {
			out[n-1].to = s.to
		}
	}
	return out
}

// first returns the first stretch that does not end before addr.
func (z zone) first(addr netip.Addr) (stretch, bool) {
	i, _ := slices.BinarySearchFunc(z, addr, func(s stretch, a netip.Addr) int { return s.to.Compare(a) })
	if i == len(z) {
		return stretch{}, false
	}
	return z[i], true
}

// meets reports whether any address of p is in z.
func (z zone) meets(p netip.Prefix) bool {
	s, ok := z.first(p.Addr())
	return ok && !lastOf(p).Less(s.from)
}

// holds reports whether all addresses of p are in z.
func (z zone) holds(p netip.Prefix) bool {
	s, ok := z.first(p.Addr())
	return ok && !p.Addr().Less(s.from) && !s.to.Less(lastOf(p))
}

// divide cuts p into prefixes, in order, each of which is all in z or all outside.
func (z zone) divide(p netip.Prefix, visit func(piece netip.Prefix, inside bool)) {
	switch {
	case !z.meets(p):
		visit(p, false)
	case z.holds(p):
		visit(p, true)
	default: // so p has halves: a single address is in or out
		low := netip.PrefixFrom(p.Addr(), p.Bits()+1)
		z.divide(low, visit)
		z.divide(netip.PrefixFrom(lastOf(low).Next(), p.Bits()+1), visit)
	}
}

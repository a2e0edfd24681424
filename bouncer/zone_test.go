package bouncer

import (
	"math/rand"
	"net/netip"
	"slices"
	"testing"
)

// TestZones compares zones with a scan of the prefixes, at the ends of both
// address spaces.
func TestZones(t *testing.T) {
	bases := []string{"255.255.255.0", "0.0.0.0", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ff00", "::"}
	for seed := range int64(200) {
		w := rand.New(rand.NewSource(seed))
		drawn := func() netip.Prefix {
			b := netip.MustParseAddr(bases[w.Intn(len(bases))]).AsSlice()
			b[len(b)-1] = byte(w.Intn(256))
			addr, _ := netip.AddrFromSlice(b)
			bits := addr.BitLen() - w.Intn(9)
			if w.Intn(20) == 0 {
				bits = w.Intn(9)
			}
			return netip.PrefixFrom(addr, bits).Masked()
		}
		var prefixes []netip.Prefix
		for range w.Intn(8) {
			prefixes = append(prefixes, drawn())
		}
		z := zoneOf(prefixes)
		in := func(a netip.Addr) bool {
			return slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
		}
		for range 40 {
			p := drawn()
			meets := slices.ContainsFunc(prefixes, p.Overlaps)
			if z.meets(p) != meets {
				t.Fatalf("seed %d: %v meets %v: %v, want %v", seed, p, prefixes, z.meets(p), meets)
			}
			next := p.Addr()
			z.divide(p, func(piece netip.Prefix, inside bool) {
				if piece.Addr() != next || in(piece.Addr()) != inside || in(lastOf(piece)) != inside ||
					inside != z.holds(piece) || inside != z.meets(piece) {
					t.Fatalf("seed %d: piece %v of %v, inside %v, by %v", seed, piece, p, inside, prefixes)
				}
				next = lastOf(piece).Next()
			})
			if next != lastOf(p).Next() {
				t.Fatalf("seed %d: the pieces of %v end before %v", seed, p, next)
			}
		}
	}
}

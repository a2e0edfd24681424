package bouncer

import (
	"math/rand"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/edgeward/edgeward/internal/decision"
)

// TestSpansHoldWhatTheRangesHold compares spans, address by address, with a
// scan of the ranges, and the difference of two lists with the second.
func TestSpansHoldWhatTheRangesHold(t *testing.T) {
	epoch := time.Unix(1_000_000, 0)
	for seed := range int64(300) {
		w := rand.New(rand.NewSource(seed))
		var before []span
		for range 3 {
			ranges := draw(w, epoch)
			spans := spansOf(ranges)
			for i := 1; i < len(spans); i++ {
				if !spans[i-1].to.Less(spans[i].from) {
					t.Fatalf("seed %d: %v overlaps %v", seed, spans[i-1], spans[i])
				}
			}
			for _, base := range []netip.Addr{netip.MustParseAddr("255.255.255.0"), netip.MustParseAddr("0.0.0.0"), netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ff00")} {
				for addr, n := base, 0; n < 256 && addr.IsValid(); addr, n = addr.Next(), n+1 {
					var want decision.Held
					for _, h := range ranges {
						if !h.Prefix.Contains(addr) {
							continue
						}
						if h.Remediation > want.Remediation {
							want.Remediation = h.Remediation
						}
						if h.Until.After(want.Until) {
							want.Until = h.Until
						}
					}
					got, ok := covering(spans, addr)
					if ok != (want.Remediation != decision.Allow) || ok && (got.class.Remediation != want.Remediation || !got.until.Equal(want.Until)) {
						t.Fatalf("seed %d: %s is in %+v (%v), want %+v; spans %v of %v", seed, addr, got, ok, want, spans, ranges)
					}
				}
			}
			drop, put := difference(before, spans, 0)
			after := slices.DeleteFunc(slices.Clone(before), func(s span) bool {
				return slices.ContainsFunc(drop, func(d span) bool { return d.from == s.from && d.to == s.to }) ||
					slices.ContainsFunc(put, func(p span) bool { return p.from == s.from && p.to == s.to })
			})
			after = append(after, put...)
			slices.SortFunc(after, compareSpans)
			if !slices.Equal(after, spans) {
				t.Fatalf("seed %d: %v less %v and with %v is %v, want %v", seed, before, drop, put, after, spans)
			}
			before = spans
		}
	}
}

// draw returns ranges at the ends of both address spaces, in order.
func draw(w *rand.Rand, epoch time.Time) []decision.Held {
	byPrefix := map[netip.Prefix]decision.Held{}
	for range w.Intn(12) {
		base := []string{"255.255.255.0", "0.0.0.0", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ff00"}[w.Intn(3)]
		b := netip.MustParseAddr(base).AsSlice()
		b[len(b)-1] = byte(w.Intn(256))
		addr, _ := netip.AddrFromSlice(b)
		bits := addr.BitLen() - w.Intn(9)
		if w.Intn(10) == 0 {
			bits = w.Intn(9)
		}
		p := netip.PrefixFrom(addr, bits).Masked()
		r := decision.Remediation(1 + w.Intn(3))
		byPrefix[p] = decision.Held{Prefix: p, Remediation: r, Class: decision.Class{Type: r.Name(), Remediation: r}, Until: epoch.Add(time.Duration(w.Intn(3)) * time.Hour)}
	}
	var out []decision.Held
	for _, h := range byPrefix {
		out = append(out, h)
	}
	slices.SortFunc(out, func(a, b decision.Held) int {
		if c := a.Prefix.Addr().Compare(b.Prefix.Addr()); c != 0 {
			return c
		}
		return a.Prefix.Bits() - b.Prefix.Bits()
	})
	return out
}

func BenchmarkSpans(b *testing.B) {
	w := rand.New(rand.NewSource(1))
	var ranges []decision.Held
	for i := range 10_000 {
		addr := netip.AddrFrom4([4]byte{byte(1 + i>>8), byte(i), byte(w.Intn(256)), 0})
		ranges = append(ranges, decision.Held{Prefix: netip.PrefixFrom(addr, 24), Remediation: decision.Ban, Until: time.Unix(int64(i), 0)})
	}
	old := spansOf(ranges)
	b.ResetTimer()
	for b.Loop() {
		difference(old, spansOf(ranges), time.Second)
	}
}

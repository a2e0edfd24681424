package nft

import (
	"fmt"
	"net/netip"
	"testing"
)

// manyPeers is an Access of n peers of two addresses each, in groups of ten that
// may reach ten services of two addresses each.
func manyPeers(n int) Access {
	a := Access{Interface: "edgeward0", Networks: []netip.Prefix{prefix("10.66.0.0/16"), prefix("fd66::/64")},
		Everyone: []Reach{{single(vpnGateway4), UDP, 53, 53}, {single(vpnGateway6), UDP, 53, 53}}}
	for g := range max(n/100, 1) {
		grp := Group{Name: fmt.Sprintf("group-%d", g)}
		for s := range 10 {
			for _, base := range []netip.Addr{addr("10.43.0.0"), addr("fd43::")} {
				grp.Reach = append(grp.Reach, Reach{single(numberedAddr(base, g*10+s)), TCP, 443, 443})
			}
		}
		a.Groups = append(a.Groups, grp)
	}
	for i := range n {
		a.Sources = append(a.Sources, somePeer(a, i)...)
	}
	return a
}

// somePeer is the number i of the peers of an Access.
func somePeer(a Access, i int) []Source {
	g := a.Groups[i%len(a.Groups)].Name
	return []Source{{single(numberedAddr(addr("10.66.1.0"), i)), g}, {single(numberedAddr(addr("fd66::1:0"), i)), g}}
}

func numberedAddr(base netip.Addr, n int) netip.Addr {
	b := base.As16()
	n += int(b[14])<<8 | int(b[15])
	b[13], b[14], b[15] = b[13]+byte(n>>16), byte(n>>8), byte(n)
	return netip.AddrFrom16(b).Unmap()
}

var sizes = []int{100, 1000, 10_000}

// All is written anew and takes over.
func BenchmarkAccessReplace(b *testing.B) {
	for _, n := range sizes {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			w := newVPN(b)
			a := manyPeers(n)
			for b.Loop() {
				a.Masquerade = !a.Masquerade
				if done := w.apply(a); !done.Replaced {
					b.Fatalf("%+v", done)
				}
			}
		})
	}
}

// One peer comes, and goes.
func BenchmarkAccessPeer(b *testing.B) {
	for _, n := range sizes {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			w := newVPN(b)
			a := manyPeers(n)
			w.apply(a)
			more := a
			more.Sources = append(more.Sources[:len(a.Sources):len(a.Sources)], somePeer(a, n)...)
			for b.Loop() {
				w.apply(more)
				if done := w.apply(a); done.Replaced || !done.Changed {
					b.Fatalf("%+v", done)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(2*b.N), "µs/change")
		})
	}
}

// The same again, where nobody has changed anything, and where somebody has in
// another table.
func BenchmarkAccessSame(b *testing.B) {
	for _, n := range sizes {
		for _, looks := range []bool{false, true} {
			b.Run(fmt.Sprintf("%d/looks=%t", n, looks), func(b *testing.B) {
				w := newVPN(b)
				a := manyPeers(n)
				w.apply(a)
				for b.Loop() {
					if looks {
						w.conn.checked--
					}
					if done := w.apply(a); done.Changed {
						b.Fatalf("%+v", done)
					}
				}
			})
		}
	}
}

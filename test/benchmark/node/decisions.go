package main

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/edgeward/edgeward/test/rig"
)

// life outlasts whatever the rig keeps of a filled database.
const life = 365 * 24 * time.Hour

// draw returns n different addresses to ban, a fifth of them IPv6. The same seed
// gives the same addresses, so that a filled database can be kept. They are in
// none of the ranges that a node protects by itself, nor in those of spareRange
// and spareAddr.
func draw(n int, seed uint64) []netip.Addr {
	random := rand.New(rand.NewPCG(seed, 0))
	seen := make(map[netip.Addr]bool, n)
	list := make([]netip.Addr, 0, n)
	for len(list) < n {
		var addr netip.Addr
		if len(list)%5 == 4 {
			addr = netip.AddrFrom16([16]byte{
				0x20, 0x01, 0x0d, 0xb8, byte(1 + random.IntN(255)), byte(random.IntN(256)),
				byte(random.IntN(256)), byte(random.IntN(256)), 15: byte(random.IntN(256)),
			})
		} else {
			addr = drawn4(random)
		}
		if !seen[addr] {
			seen[addr] = true
			list = append(list, addr)
		}
	}
	return list
}

// drawn4 draws from 20.0.0.0 to 59.255.255.255.
func drawn4(random *rand.Rand) netip.Addr {
	return netip.AddrFrom4([4]byte{byte(20 + random.IntN(40)), byte(random.IntN(256)), byte(random.IntN(256)), byte(random.IntN(256))})
}

// spareAddr is an address that draw never draws.
func spareAddr(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{80, byte(i >> 16), byte(i >> 8), byte(i)})
}

// spareRange is a range with none of draw's addresses, and not beside the others.
func spareRange(i int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{90, byte(i >> 6), byte(i << 2), 0}), 24)
}

// seeds are the decisions for a LAPI.
func seeds(addrs []netip.Addr) []rig.Decision {
	list := make([]rig.Decision, len(addrs))
	for i, addr := range addrs {
		list[i] = rig.Decision{Value: addr.String(), Duration: life, Scenario: fmt.Sprintf("crowdsecurity/scenario-%d", i*20/len(addrs))}
	}
	return list
}

// sample returns about n addresses from all over a list, the first and the last
// among them.
func sample(addrs []netip.Addr, n int) []netip.Addr {
	var some []netip.Addr
	for i := range n {
		some = append(some, addrs[i*(len(addrs)-1)/(n-1)])
	}
	return some
}

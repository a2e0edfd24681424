package main

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/edgeward/edgeward/internal/decision"
	"github.com/edgeward/edgeward/test/rig"
)

// life outlasts whatever the rig keeps of a filled database.
const life = 365 * 24 * time.Hour

// draw returns n decisions: a tenth of them ranges (/24 and /64), a fifth IPv6.
// The IPv4 ones lie in 127.0.0.0/8, where the clients are: as among clients from
// all over the world, searches end all over the table and not in one corner of
// it. The same seed gives the same decisions, so that a filled database can be
// kept.
func draw(n int, seed uint64) []rig.Decision {
	random := rand.New(rand.NewPCG(seed, 0))
	list := make([]rig.Decision, n)
	for i := range list {
		d := rig.Decision{Duration: life, Scenario: fmt.Sprintf("crowdsecurity/scenario-%d", i*20/n)}
		if i%5 == 4 {
			d.Value = fmt.Sprintf("2001:db8:%x:%x::%x", random.IntN(1<<16), random.IntN(1<<16), 1+random.IntN(1<<16-1))
			if i%50 == 49 {
				d.Value = netip.PrefixFrom(netip.MustParseAddr(d.Value), 64).Masked().String()
			}
		} else {
			addr := loopback(random)
			d.Value = addr.String()
			if i%50%11 == 1 { // with the IPv6 ones a tenth of all
				d.Value = netip.PrefixFrom(addr, 24).Masked().String()
			}
		}
		list[i] = d
	}
	return list
}

// loopback draws an address, but none of those that servers and proxies use.
func loopback(random *rand.Rand) netip.Addr {
	return netip.AddrFrom4([4]byte{127, byte(1 + random.IntN(255)), byte(random.IntN(256)), byte(1 + random.IntN(254))})
}

// spare returns n addresses that none of the decisions holds.
func spare(n int, lists ...[]rig.Decision) ([]netip.Addr, error) {
	var held []netip.Prefix
	for _, list := range lists {
		for _, d := range list {
			prefix, err := decision.ParsePrefix(d.Value)
			if err != nil {
				return nil, fmt.Errorf("choose clients: %w", err)
			}
			held = append(held, prefix)
		}
	}
	ranges := decision.NewRanges(held)
	random := rand.New(rand.NewPCG(3, 0))
	seen := map[netip.Addr]bool{}
	var free []netip.Addr
	for len(free) < n {
		addr := loopback(random)
		if !seen[addr] && !decision.Contains(ranges, addr.AsSlice()) {
			seen[addr] = true
			free = append(free, addr)
		}
	}
	return free, nil
}

// banned returns an address that a decision of the list holds, of each kind:
// IPv4 and IPv6, single and range.
func banned(list []rig.Decision) ([]netip.Addr, error) {
	kinds := map[[2]bool]bool{}
	var found []netip.Addr
	for _, d := range list {
		prefix, err := decision.ParsePrefix(d.Value)
		if err != nil {
			return nil, fmt.Errorf("choose banned clients: %w", err)
		}
		kind := [2]bool{prefix.Addr().Is4(), prefix.IsSingleIP()}
		if !kinds[kind] {
			kinds[kind] = true
			found = append(found, prefix.Addr().Next())
			if kind[1] {
				found[len(found)-1] = prefix.Addr()
			}
		}
	}
	return found, nil
}

package decision

import (
	"encoding/binary"
	"net/netip"
	"sort"
)

// Ranges is a fixed set of addresses given as prefixes: an allowlist, trusted
// proxies, exemptions. Overlaps and repetitions are merged.
type Ranges struct {
	// Sorted addresses at which membership changes: an address is inside
	// where an odd number of bounds lie at or below it.
	four []int
	six  []string
	n    int
}

// NewRanges returns the union of prefixes.
func NewRanges(prefixes []netip.Prefix) *Ranges {
	var four []int
	var six []string
	for _, p := range prefixes {
		if !p.IsValid() {
			continue
		}
		if p.Addr().Is4() {
			four = append(four, key4(p.Masked()))
		} else {
			six = append(six, key6(p.Masked()))
		}
	}
	sort.Ints(four)
	sort.Strings(six)
	r := &Ranges{n: len(prefixes)}
	inside := -1 // end of the IPv4 stretch being written
	for _, key := range four {
		lo, end := span4(key)
		if lo > inside {
			r.four = append(r.four, lo, end)
			inside = end
		} else if end > inside {
			r.four[len(r.four)-1] = end
			inside = end
		}
	}
	reach := ""
	for _, key := range six {
		lo, end := span6(key)
		if len(r.six) == 0 || lo > reach {
			r.six = append(r.six, lo, end)
			reach = end
		} else if end > reach {
			r.six[len(r.six)-1] = end
			reach = end
		}
	}
	return r
}

// Contains reports whether the address with these octets, 4 or 16 of them, lies
// in one of the prefixes of r; a nil r holds nothing. IPv4-mapped addresses must
// be unmapped by the caller.
func Contains(r *Ranges, octets []byte) bool {
	if r == nil || r.n == 0 {
		return false
	}
	if len(octets) == 4 {
		return sort.SearchInts(r.four, int(binary.BigEndian.Uint32(octets))+1)&1 == 1
	}
	return sort.SearchStrings(r.six, string(octets)+"\x00")&1 == 1
}

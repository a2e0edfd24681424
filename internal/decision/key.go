package decision

import (
	"encoding/binary"
	"net/netip"
	"runtime"
	"sort"
)

// Prefixes live in the engine as keys that sort by address first and by
// length second, so that an enclosing prefix always comes before what it
// encloses. IPv4: one integer, address<<6 | length. IPv6: a 17-byte string,
// the 16 bytes of the address and one byte of length.

// endOfSix sorts after every IPv6 address.
const endOfSix = "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"

func intOf(addr netip.Addr) int {
	b := addr.As4()
	return int(b[0])<<24 | int(b[1])<<16 | int(b[2])<<8 | int(b[3])
}

func key4(prefix netip.Prefix) int {
	return intOf(prefix.Addr())<<6 | prefix.Bits()
}

func key6(prefix netip.Prefix) string {
	b := prefix.Addr().As16()
	return string(append(b[:], byte(prefix.Bits())))
}

func prefixOf4(key int) netip.Prefix {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], uint32(key>>6))
	return netip.PrefixFrom(netip.AddrFrom4(b), key&63)
}

func prefixOf6(key string) netip.Prefix {
	var b [16]byte
	copy(b[:], key)
	return netip.PrefixFrom(netip.AddrFrom16(b), int(key[16]))
}

// span4 returns the first address of a key and the first one behind it.
func span4(key int) (lo, end int) {
	lo = key >> 6
	return lo, lo + 1<<uint(32-key&63)
}

// span6 is span4 for IPv6; endOfSix stands for the end of the address space.
func span6(key string) (lo, end string) {
	lo = key[:16]
	bits := int(key[16])
	if bits == 0 {
		return lo, endOfSix
	}
	b := []byte(lo)
	i := (bits - 1) / 8
	step := 1 << uint(7-(bits-1)%8)
	for i >= 0 {
		sum := int(b[i]) + step
		b[i] = byte(sum)
		if sum < 256 {
			return lo, string(b)
		}
		step = 1
		i--
	}
	return lo, endOfSix
}

// rowBits is the width of a row number inside a packed sort key; it bounds the
// rows of a block to 33 million and, with the 63 bits that an integer has,
// ids to 38 bits.
const (
	rowBits = 25
	maxRows = 1 << rowBits
	rowMask = maxRows - 1
	maxID   = 1 << 38
)

// order4 returns the row numbers in the order of their keys. It packs key and
// row into one integer so that the sort itself is one compiled call. It serves
// ids as well: both are non-negative and below 1<<38.
func order4(keys []int) []int {
	packed := make([]int, len(keys))
	for i, key := range keys {
		packed[i] = key<<rowBits | i
	}
	if !sort.IntsAreSorted(packed) {
		sort.Ints(packed)
	}
	for i, p := range packed {
		packed[i] = p & rowMask
	}
	return packed
}

func order6(keys []string) []int {
	packed := make([]string, len(keys))
	var n [4]byte
	for i, key := range keys {
		binary.BigEndian.PutUint32(n[:], uint32(i))
		packed[i] = key + string(n[:])
	}
	sort.Strings(packed)
	rows := make([]int, len(packed))
	for i, p := range packed {
		rows[i] = int(p[17])<<24 | int(p[18])<<16 | int(p[19])<<8 | int(p[20])
	}
	return rows
}

// flatten lays n prefixes, given by their first addresses and the first
// addresses behind them in the order of their keys, out as segments: bounds
// holds the sorted addresses at which the holder changes, seg the innermost
// prefix from each bound to the next (-1 for none), parent each prefix's
// enclosing one. Prefixes never overlap by halves, so a stack is enough. The
// first bound is zero, the start of the address space. base is added to every
// prefix number, so that both families share one numbering.
func flatten[K int | string](lo, end []K, zero K, base int) (bounds []K, seg, parent []int32) {
	n := len(lo)
	bounds = make([]K, 1, 2*n+1)
	seg = make([]int32, 1, 2*n+1)
	parent = make([]int32, n)
	bounds[0] = zero
	seg[0] = -1
	stack := make([]int32, 0, 130)
	ends := make([]K, 0, 130)
	last := 0
	for i := 0; i < n; i++ {
		if i&255 == 0 {
			runtime.Gosched()
		}
		start := lo[i]
		for len(ends) > 0 && ends[len(ends)-1] <= start {
			e := ends[len(ends)-1]
			ends = ends[:len(ends)-1]
			stack = stack[:len(stack)-1]
			holder := int32(-1)
			if len(stack) > 0 {
				holder = stack[len(stack)-1]
			}
			if bounds[last] == e {
				seg[last] = holder
			} else {
				bounds = append(bounds, e)
				seg = append(seg, holder)
				last++
			}
		}
		parent[i] = -1
		if len(stack) > 0 {
			parent[i] = stack[len(stack)-1]
		}
		node := int32(base + i)
		if bounds[last] == start {
			seg[last] = node
		} else {
			bounds = append(bounds, start)
			seg = append(seg, node)
			last++
		}
		stack = append(stack, node)
		ends = append(ends, end[i])
	}
	for len(ends) > 0 {
		e := ends[len(ends)-1]
		ends = ends[:len(ends)-1]
		stack = stack[:len(stack)-1]
		holder := int32(-1)
		if len(stack) > 0 {
			holder = stack[len(stack)-1]
		}
		if bounds[last] == e {
			seg[last] = holder
		} else {
			bounds = append(bounds, e)
			seg = append(seg, holder)
			last++
		}
	}
	return bounds, seg, parent
}

package decision

import (
	"net/netip"
	"runtime"
	"sort"
)

// block is a compiled, unchanging set of decisions. Rows are kept in columns,
// ordered by prefix, IPv4 before IPv6; the rows that share a prefix are one
// node; nodes point to the node that encloses them; and the address space is
// cut into sorted, disjoint segments, each naming its innermost node. So a
// search is one binary search, and the holders of an address are the rows of
// its node and of the nodes around it.
type block struct {
	// By row.
	id    []int
	until []int
	class []int32

	// By node. first has one entry more than there are nodes.
	key4   []int
	key6   []string
	first  []int32
	parent []int32

	// By segment.
	bounds4 []int
	seg4    []int32
	bounds6 []string
	seg6    []int32

	// Rows by decision id.
	ids   []int
	idRow []int32
}

// compile builds a block from rows with distinct ids. It gives way to others now
// and then: interpreted, it works for a second at 100,000 rows, and requests on
// a small machine must not wait for it.
func compile(four rows[int], six rows[string]) *block {
	n4, n6 := len(four.key), len(six.key)
	n := n4 + n6
	b := &block{
		id:     make([]int, n),
		until:  make([]int, n),
		class:  make([]int32, n),
		first:  make([]int32, 0, n+1),
		parent: make([]int32, 0, n),
		ids:    make([]int, n),
		idRow:  make([]int32, n),
	}
	order := order4(four.key)
	lo := make([]int, 0, n4)
	end := make([]int, 0, n4)
	last := -1
	b.key4 = make([]int, 0, n4)
	for to, from := range order {
		if to&255 == 0 {
			runtime.Gosched()
		}
		key := four.key[from]
		if key != last {
			last = key
			b.key4 = append(b.key4, key)
			b.first = append(b.first, int32(to))
			start := key >> 6
			lo = append(lo, start)
			end = append(end, start+1<<uint(32-key&63))
		}
		b.id[to] = four.id[from]
		b.until[to] = four.until[from]
		b.class[to] = four.class[from]
	}
	var parent []int32
	b.bounds4, b.seg4, parent = flatten(lo, end, 0, 0)
	b.parent = append(b.parent, parent...)

	order = order6(six.key)
	lo6 := make([]string, 0, n6)
	end6 := make([]string, 0, n6)
	lastSix := ""
	b.key6 = make([]string, 0, n6)
	for i, from := range order {
		if i&255 == 0 {
			runtime.Gosched()
		}
		to := n4 + i
		key := six.key[from]
		if key != lastSix {
			lastSix = key
			b.key6 = append(b.key6, key)
			b.first = append(b.first, int32(to))
			start, behind := span6(key)
			lo6 = append(lo6, start)
			end6 = append(end6, behind)
		}
		b.id[to] = six.id[from]
		b.until[to] = six.until[from]
		b.class[to] = six.class[from]
	}
	b.bounds6, b.seg6, parent = flatten(lo6, end6, "", len(b.key4))
	b.parent = append(b.parent, parent...)
	b.first = append(b.first, int32(n))

	for i, row := range order4(b.id) {
		b.ids[i] = b.id[row]
		b.idRow[i] = int32(row)
	}
	return b
}

// distinct keeps, of rows with the same id, the one that came last; an IPv6 row
// counts as later than an IPv4 one. LAPI never repeats an id in one answer, so
// nearly always there is nothing to do.
func distinct(four rows[int], six rows[string]) (rows[int], rows[string]) {
	ids := make([]int, 0, len(four.id)+len(six.id))
	ids = append(ids, four.id...)
	ids = append(ids, six.id...)
	sort.Ints(ids)
	repeated := map[int]bool{}
	for i := 1; i < len(ids); i++ {
		if ids[i] == ids[i-1] {
			repeated[ids[i]] = true
		}
	}
	if len(repeated) == 0 {
		return four, six
	}
	seen := map[int]bool{}
	var six2 rows[string]
	for i := len(six.id) - 1; i >= 0; i-- {
		id := six.id[i]
		if seen[id] {
			continue
		}
		seen[id] = repeated[id]
		six2.key = append(six2.key, six.key[i])
		six2.id = append(six2.id, id)
		six2.until = append(six2.until, six.until[i])
		six2.class = append(six2.class, six.class[i])
	}
	var four2 rows[int]
	for i := len(four.id) - 1; i >= 0; i-- {
		id := four.id[i]
		if seen[id] {
			continue
		}
		seen[id] = repeated[id]
		four2.key = append(four2.key, four.key[i])
		four2.id = append(four2.id, id)
		four2.until = append(four2.until, four.until[i])
		four2.class = append(four2.class, four.class[i])
	}
	return four2, six2
}

// rowOf returns the row of a decision, or -1.
func rowOf(b *block, id int) int {
	i := sort.SearchInts(b.ids, id)
	if i == len(b.ids) || b.ids[i] != id {
		return -1
	}
	return int(b.idRow[i])
}

// nodeOf returns the innermost node that encloses addr, or -1.
func nodeOf(b *block, addr netip.Addr) int32 {
	if addr.Is4() {
		return nodeOf4(b, intOf(addr)+1)
	}
	return nodeOf6(b, string(addr.AsSlice())+"\x00")
}

// nodeOf4 and nodeOf6 search by the key just behind an address, which makes the
// bound at the address itself count as not behind it.
func nodeOf4(b *block, behind int) int32 {
	return b.seg4[sort.SearchInts(b.bounds4, behind)-1]
}

func nodeOf6(b *block, behind string) int32 {
	return b.seg6[sort.SearchStrings(b.bounds6, behind)-1]
}

// nodeOfRow returns the node that a row belongs to.
func nodeOfRow(b *block, row int) int {
	return sort.Search(len(b.first), func(i int) bool { return int(b.first[i]) > row }) - 1
}

func prefixOf(b *block, node int) netip.Prefix {
	if node < len(b.key4) {
		return prefixOf4(b.key4[node])
	}
	return prefixOf6(b.key6[node-len(b.key4)])
}

// same reports whether a row of b says what an arriving row says: the same
// prefix and class, and an end within two seconds, which is what rounding and
// the way through the network make of one and the same end.
func same(b *block, row int, key4 int, key6 string, class int32, until int) bool {
	const slack = 2e9
	d := b.until[row] - until
	if b.class[row] != class || d > slack || d < -slack {
		return false
	}
	node := nodeOfRow(b, row)
	if node < len(b.key4) {
		return b.key4[node] == key4
	}
	return b.key6[node-len(b.key4)] == key6
}

package decision

import (
	"math/rand"
	"net/netip"
	"runtime"
	"testing"
	"time"
)

// Sizes by name, so that a report shows one column for each. Interpreted, a
// million decisions would take half a minute to build, again for each number.
var benchSizes = []struct {
	name string
	n    int
}{{"1k", 1000}, {"15k", 15000}, {"100k", 100000}, {"1M", 1000000}}

// benchOverlay is what the overlay of a store of n decisions holds in the worst
// of ordinary times: a little less than makes Fold due.
func benchOverlay(n int) int { return 1000 + n/128 }

// benched is a store of n sample decisions and what is asked of it.
type benched struct {
	n       int
	rows    []*Row
	store   *Store // nothing in the overlay
	overlay *Store // the same with a full overlay
	hits    []netip.Addr
	misses  []netip.Addr
}

// benchedBySize keeps them: they take longer to make than to measure.
var benchedBySize = map[int]*benched{}

func benchedOf(n int) *benched {
	if f := benchedBySize[n]; f != nil {
		return f
	}
	f := &benched{n: n, rows: sample(n), store: NewStore(), overlay: NewStore()}
	load(f.store, f.rows)
	load(f.overlay, f.rows)
	d := f.overlay.NewDelta(false, epoch)
	for i := 0; i < benchOverlay(n); i++ {
		d.Add(benchRow(n, i+1))
	}
	f.overlay.Apply(d, epoch)

	w := rand.New(rand.NewSource(1))
	table := f.store.Compile()
	for len(f.hits) < 1024 {
		p, _ := ParsePrefix(f.rows[w.Intn(n)].Value)
		f.hits = append(f.hits, p.Addr())
	}
	for len(f.misses) < 1024 {
		addr := netip.AddrFrom4([4]byte{byte(1 + w.Intn(223)), byte(w.Intn(256)), byte(w.Intn(256)), byte(w.Intn(256))})
		if len(f.misses)%5 == 4 {
			addr = netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, byte(w.Intn(256)), byte(w.Intn(256)), byte(w.Intn(256)), byte(w.Intn(256)), 15: 1})
		}
		if !Covered(table, addr.AsSlice()) {
			f.misses = append(f.misses, addr)
		}
	}
	benchedBySize[n] = f
	return f
}

// load is a full pull.
func load(s *Store, rows []*Row) *Table {
	d := s.NewDelta(true, epoch)
	for _, r := range rows {
		d.Add(r)
	}
	s.Apply(d, epoch)
	return s.Compile()
}

// benchRow is a decision that a sample of n does not hold.
func benchRow(n, i int) *Row {
	return &Row{ID: n + i, Scope: "Ip", Value: netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}).String(), Type: "ban", Origin: "CAPI", Scenario: "crowdsecurity/scenario-0", Duration: "4h"}
}

// sized runs a benchmark for each size.
func sized(b *testing.B, run func(b *testing.B, f *benched)) {
	for _, size := range benchSizes {
		if interpreted() && size.n > 100000 {
			continue
		}
		f := benchedOf(size.n)
		b.Run(size.name, func(b *testing.B) { run(b, f) })
	}
}

// BenchmarkBuild is a full pull, from rows to a table in force.
func BenchmarkBuild(b *testing.B) {
	sized(b, func(b *testing.B, f *benched) {
		for i := 0; i < b.N; i++ {
			load(NewStore(), f.rows)
		}
	})
}

// BenchmarkDelta is one change taken in, until the table that holds it. It is
// made to a copy of the store each time, so that changes do not pile up.
func BenchmarkDelta(b *testing.B) {
	b.Run("add", func(b *testing.B) {
		sized(b, func(b *testing.B, f *benched) { benchDelta(b, f.store, benchRow(f.n, benchOverlay(f.n)+1), -1) })
	})
	b.Run("remove", func(b *testing.B) {
		sized(b, func(b *testing.B, f *benched) { benchDelta(b, f.store, nil, f.n/2) })
	})
	b.Run("add-to-overlay", func(b *testing.B) {
		sized(b, func(b *testing.B, f *benched) { benchDelta(b, f.overlay, benchRow(f.n, benchOverlay(f.n)+1), -1) })
	})
	b.Run("remove-from-overlay", func(b *testing.B) {
		sized(b, func(b *testing.B, f *benched) { benchDelta(b, f.overlay, nil, f.n+1) })
	})
}

func benchDelta(b *testing.B, from *Store, add *Row, remove int) {
	for i := 0; i < b.N; i++ {
		s := *from
		d := s.NewDelta(false, epoch)
		if remove >= 0 {
			d.Delete(remove)
		}
		if add != nil {
			d.Add(add)
		}
		s.Apply(d, epoch)
		s.Compile()
	}
}

// BenchmarkFold makes base and overlay one.
func BenchmarkFold(b *testing.B) {
	sized(b, func(b *testing.B, f *benched) {
		for i := 0; i < b.N; i++ {
			s := *f.overlay
			s.Fold(epoch)
		}
	})
}

// BenchmarkLookup is the whole verdict, with an overlay beside the base.
func BenchmarkLookup(b *testing.B) {
	b.Run("hit", func(b *testing.B) {
		sized(b, func(b *testing.B, f *benched) { benchLookup(b, f, f.hits) })
	})
	b.Run("miss", func(b *testing.B) {
		sized(b, func(b *testing.B, f *benched) { benchLookup(b, f, f.misses) })
	})
}

func benchLookup(b *testing.B, f *benched, addrs []netip.Addr) {
	table := f.overlay.Compile()
	view := NewView(table, Policy{})
	now := epoch.Add(time.Minute)
	b.ResetTimer()
	for i := 0; i < b.N; i++ {
		view.Lookup(table, addrs[i&1023], now)
	}
}

// BenchmarkCovered is the quick question of a request path.
func BenchmarkCovered(b *testing.B) {
	b.Run("hit", func(b *testing.B) {
		sized(b, func(b *testing.B, f *benched) { benchCovered(b, f, f.hits) })
	})
	b.Run("miss", func(b *testing.B) {
		sized(b, func(b *testing.B, f *benched) { benchCovered(b, f, f.misses) })
	})
}

func benchCovered(b *testing.B, f *benched, addrs []netip.Addr) {
	table := f.overlay.Compile()
	octets := make([][]byte, len(addrs))
	for i, addr := range addrs {
		octets[i] = addr.AsSlice()
	}
	b.ResetTimer()
	for i := 0; i < b.N; i++ {
		Covered(table, octets[i&1023])
	}
}

// BenchmarkMemory reports what a store with its table holds, in bytes
// for each decision; its time means nothing.
func BenchmarkMemory(b *testing.B) {
	sized(b, func(b *testing.B, f *benched) {
		held := 0
		for i := 0; i < b.N; i++ {
			held = weigh(f.rows)
		}
		b.ReportMetric(float64(held)/float64(f.n), "B/decision")
	})
}

// weigh is a function of its own so that nothing of the weighing before is held,
// not even by an interpreter.
func weigh(rows []*Row) int {
	before := heap()
	s := NewStore()
	table := load(s, rows)
	held := heap() - before
	runtime.KeepAlive(s)
	runtime.KeepAlive(table)
	return held
}

// heap returns the bytes in use once all garbage is gone.
func heap() int {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

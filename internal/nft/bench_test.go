package nft

import (
	"fmt"
	"net/netip"
	"testing"
	"time"
)

// A generation is filled, hooked up, and the one before removed.
func BenchmarkInstall(b *testing.B) {
	for _, n := range []int{15_000, 100_000, 1_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			w := newWorld(b)
			for b.Loop() {
				w.install(config(), Content{Classes: classes, Elements: numbered(n, time.Hour), Size: n})
			}
		})
	}
}

// One address is banned and unbanned beside n others, and 1,000 ranges.
func BenchmarkUpdate(b *testing.B) {
	for _, n := range []int{0, 100_000, 1_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			w := newWorld(b)
			w.install(config(), Content{Classes: classes, Elements: numbered(n, time.Hour), Size: n, Ranges: benchRanges(1000)})
			put, del := Changes{Put: []Element{ban(bad4)}}, Changes{Delete: []netip.Addr{bad4}}
			for b.Loop() {
				w.update(put)
				w.update(del)
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(2*b.N), "µs/change")
		})
	}
}

// One range is banned and unbanned beside n others.
func BenchmarkUpdateRange(b *testing.B) {
	for _, n := range []int{100, 1000, 10_000, 50_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			w := newWorld(b)
			w.install(config(), Content{Classes: classes, Ranges: benchRanges(n)})
			r := banRange("203.0.113.100", "203.0.113.103")
			put, del := Changes{PutRanges: []Range{r}}, Changes{DeleteRanges: []Range{r}}
			for b.Loop() {
				w.update(put)
				w.update(del)
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(2*b.N), "µs/change")
		})
	}
}

// The same where a range of the map is about to time out, so that all of it is
// written again.
func BenchmarkUpdateStaleRange(b *testing.B) {
	for _, n := range []int{1000, 10_000, 50_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			w := newWorld(b)
			w.install(config(), Content{Classes: classes, Ranges: benchRanges(n)})
			c := Changes{PutRanges: []Range{{addr("203.0.113.100"), addr("203.0.113.103"), 1, caution}}}
			for b.Loop() {
				w.update(c)
			}
		})
	}
}

func benchRanges(n int) func(yield func(Range) bool) {
	return func(yield func(Range) bool) {
		for i := range n {
			from := netip.AddrFrom4([4]byte{byte(20 + i>>14), byte(i >> 6), byte(i << 2), 0})
			to := netip.AddrFrom4([4]byte{byte(20 + i>>14), byte(i >> 6), byte(i<<2) + 1, 255})
			if !yield(Range{from, to, 1, time.Hour}) {
				return
			}
		}
	}
}

func BenchmarkRead(b *testing.B) {
	w := newWorld(b)
	w.install(config(), Content{Classes: classes, Elements: numbered(100_000, time.Hour)})
	for b.Loop() {
		w.read()
	}
}

func BenchmarkCounters(b *testing.B) {
	w := newWorld(b)
	all := Content{Elements: numbered(100_000, time.Hour)}
	for i := range uint32(40) {
		all.Classes = append(all.Classes, Class{i + 1, fmt.Sprintf("ban/lists:%d", i)})
	}
	w.install(config(), all)
	for b.Loop() {
		if _, err := w.conn.Counters(); err != nil {
			b.Fatal(err)
		}
	}
}

package plugin

import (
	"encoding/binary"
	"testing"
	"time"
)

// FuzzLimitTake drives a bucket of any policy through any times and holds each
// answer against the references.
func FuzzLimitTake(f *testing.F) {
	f.Add(1, int64(time.Second), 1, []byte{0, 0, 0, 0, 255, 255, 255, 63, 1, 0, 0, 64})
	f.Add(100, int64(time.Minute), 100, []byte{0, 202, 154, 187, 0, 0, 0, 128})
	f.Add(1000000, int64(time.Second), 3, []byte{232, 3, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, average int, period int64, burst int, gaps []byte) {
		p := limitPolicy{Name: "n", Average: average, Period: time.Duration(period), Burst: burst}
		if p.check() != nil {
			return
		}
		l, e, naive := newLimiter(p), newLimitExact(p), limitNaive(p)
		now := int64(0)
		for i := 0; len(gaps) >= 4 && i < 1000; i++ {
			// Two bits of scale: nanoseconds to about twelve days.
			gap := binary.LittleEndian.Uint32(gaps)
			gaps = gaps[4:]
			now += int64(gap&0x3fffffff) << (gap >> 30 * 10 / 3)
			// A handful of requests at one instant.
			for n := 0; n <= int(gap%5); n++ {
				if err := limitCheck(l, e, naive, now); err != nil {
					t.Fatalf("%+v at %d: %v", p, now, err)
				}
			}
		}
	})
}

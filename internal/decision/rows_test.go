package decision

import (
	"fmt"
	"math/rand"
	"net/netip"
	"testing"
	"time"
)

// TestRowsAreAllThereIs rebuilds a store from what Each visits and compares
// both, and Tally, with the oracle.
func TestRowsAreAllThereIs(t *testing.T) {
	seeds := 40
	if interpreted() {
		seeds = 3
	}
	for seed := 1; seed <= seeds; seed++ {
		w := world{rand.New(rand.NewSource(int64(seed)))}
		s := NewStore()
		o := oracle{}
		now := epoch
		for step := 0; step < 20; step++ {
			where := fmt.Sprintf("seed %d step %d", seed, step)
			d := s.NewDelta(false, now)
			for i := w.Intn(10); i > 0; i-- {
				n := naive{prefix: w.prefix(), typ: []string{"ban", "captcha", "odd"}[w.Intn(3)], origin: "o", until: now.Add(time.Duration(1+w.Intn(30)) * time.Minute)}
				id := 1 + w.Intn(60)
				d.Add(&Row{ID: id, Scope: "Range", Value: n.prefix.String(), Type: n.typ, Origin: n.origin, Duration: n.until.Sub(now).String()})
				o[id] = n
				s.Apply(d, now)
				d = s.NewDelta(false, now)
			}
			if w.Intn(4) == 0 {
				s.Fold(now)
			}
			table := s.Compile()
			again := NewStore()
			copied := again.NewDelta(true, now)
			visited := 0
			table.Each(now, func(id int, p netip.Prefix, until time.Time, c Class) bool {
				visited++
				if n := o[id]; n.prefix != p || !n.until.Equal(until) || n.typ != c.Type || n.origin != c.Origin {
					t.Fatalf("%s: decision %d is %v %v %+v, want %+v", where, id, p, until, c, n)
				}
				copied.Hold(id, p, until, c)
				return true
			})
			again.Apply(copied, now)
			live := 0
			four := map[string]int{}
			six := map[string]int{}
			for _, n := range o {
				if !n.until.After(now) {
					continue
				}
				live++
				if n.prefix.Addr().Is4() {
					four[n.typ]++
				} else {
					six[n.typ]++
				}
			}
			if visited != live || again.Compile().Len() != live {
				t.Fatalf("%s: visited %d and rebuilt %d, want %d", where, visited, again.Compile().Len(), live)
			}
			for _, c := range table.Tally(now) {
				if c.IPv4 != four[c.Class.Type] || c.IPv6 != six[c.Class.Type] {
					t.Fatalf("%s: %+v, want %d and %d", where, c, four[c.Class.Type], six[c.Class.Type])
				}
				live -= c.IPv4 + c.IPv6
			}
			if live != 0 {
				t.Fatalf("%s: the tally lacks %d", where, live)
			}
			now = now.Add(time.Duration(w.Intn(300)) * time.Second)
		}
	}
}

func TestHoldTakesNothingThatMakesNoSense(t *testing.T) {
	d := NewStore().NewDelta(true, epoch)
	ban := Class{Type: "ban"}
	one := netip.MustParsePrefix("192.0.2.1/32")
	d.Hold(-1, one, epoch.Add(time.Hour), ban)
	d.Hold(maxID, one, epoch.Add(time.Hour), ban)
	d.Hold(1, one, epoch, ban)
	d.Hold(1, one, epoch.Add(time.Hour), Class{})
	d.Hold(1, netip.Prefix{}, epoch.Add(time.Hour), ban)
	d.Hold(1, netip.MustParsePrefix("192.0.2.1/24"), epoch.Add(time.Hour), ban)
	d.Hold(1, netip.MustParsePrefix("::ffff:192.0.2.1/128"), epoch.Add(time.Hour), ban)
	if d.Len() != 0 || d.Skipped[SkipID] != 2 || d.Skipped[SkipDuration] != 1 || d.Skipped[SkipType] != 1 || d.Skipped[SkipValue] != 3 {
		t.Errorf("took %d, skipped %v", d.Len(), d.Skipped)
	}
}

func TestKnownWords(t *testing.T) {
	for word, want := range map[string]int{"cloudflare": 22, "private": 9, "everybody": 0} {
		got, ok := Known(word)
		if len(got) != want || ok != (want > 0) {
			t.Errorf("%s: %d ranges, %v", word, len(got), ok)
		}
		for _, p := range got {
			if p != p.Masked() {
				t.Errorf("%s: %v has host bits", word, p)
			}
		}
	}
}

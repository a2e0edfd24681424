package decision

import (
	"fmt"
	"math/rand"
	"net/netip"
	"sort"
	"testing"
	"time"
)

// oracle is the engine as a child would write it: a list of decisions, all of
// them looked at for each address.
type oracle map[int]naive

type naive struct {
	prefix netip.Prefix
	typ    string
	origin string
	until  time.Time
}

func (o oracle) lookup(addr netip.Addr, now time.Time, fallback Remediation) (Remediation, time.Time) {
	best, until := Allow, time.Time{}
	for _, d := range o {
		if !d.prefix.Contains(addr) || !d.until.After(now) {
			continue
		}
		r := remediationOf(d.typ)
		if r == Unknown {
			r = fallback
		}
		if r > best || r == best && r != Allow && d.until.After(until) {
			best, until = r, d.until
		}
	}
	return best, until
}

// world draws decisions from a small part of both address spaces, so that
// they overlap, nest, touch and reach the spaces' edges.
type world struct{ *rand.Rand }

func (w world) addr() netip.Addr {
	var b [16]byte
	switch w.Intn(6) {
	case 0, 1, 2:
		corner := []byte{0, 10, 10, 255}[w.Intn(4)]
		fill := []byte{0, 255}[w.Intn(2)]
		return netip.AddrFrom4([4]byte{corner, fill, fill, byte(w.Intn(256))})
	case 3:
		return netip.AddrFrom4([4]byte{byte(w.Intn(256)), byte(w.Intn(256)), byte(w.Intn(256)), byte(w.Intn(256))})
	case 4:
		fill := []byte{0, 255}[w.Intn(2)]
		for i := range b {
			b[i] = fill
		}
		b[15] = byte(w.Intn(256))
	default:
		b[0], b[1], b[2], b[3] = 0x20, 0x01, 0x0d, 0xb8
		b[7], b[15] = byte(w.Intn(4)), byte(w.Intn(4))
	}
	if addr := netip.AddrFrom16(b); !addr.Is4In6() {
		return addr
	}
	return netip.IPv6Unspecified()
}

func (w world) prefix() netip.Prefix {
	addr := w.addr()
	bits := addr.BitLen()
	switch w.Intn(4) {
	case 0:
		bits -= w.Intn(9)
	case 1:
		bits = w.Intn(bits + 1)
	}
	return netip.PrefixFrom(addr, bits).Masked()
}

// run plays a random history against the store and the oracle and compares
// their verdicts on random and on neighbouring addresses, now and later.
func run(t *testing.T, seed int64, steps int) {
	t.Helper()
	w := world{rand.New(rand.NewSource(seed))}
	s := NewStore()
	o := oracle{}
	now := epoch
	types := []string{"ban", "captcha", "throttle", "odd", "Ban"}
	origins := []string{"crowdsec", "CAPI", "cscli"}
	fallbacks := []Remediation{Ban, Captcha, Allow}
	next := 1
	draw := func() (*Row, naive) {
		p := w.prefix()
		left := time.Duration(1+w.Intn(50)) * time.Minute
		n := naive{prefix: p, typ: types[w.Intn(len(types))], origin: origins[w.Intn(len(origins))], until: now.Add(left)}
		r := &Row{Scope: "Range", Value: p.String(), Type: n.typ, Origin: n.origin, Duration: left.String()}
		if w.Intn(4) == 0 && next > 1 {
			r.ID = 1 + w.Intn(next)
		} else {
			r.ID = next
			next++
		}
		return r, n
	}
	for step := 0; step < steps; step++ {
		full := w.Intn(12) == 0
		d := s.NewDelta(full, now)
		four := map[int]bool{} // by id: which family this delta gave it
		if full {
			// A picture of what lives, a little of it changed.
			ids := make([]int, 0, len(o))
			for id := range o {
				ids = append(ids, id)
			}
			sort.Ints(ids)
			for _, id := range ids {
				n := o[id]
				if !n.until.After(now) {
					delete(o, id)
					continue
				}
				four[id] = n.prefix.Addr().Is4()
				d.Add(&Row{ID: id, Scope: "Ip", Value: n.prefix.String(), Type: n.typ, Origin: n.origin, Duration: n.until.Sub(now).String()})
			}
		} else {
			for i := w.Intn(6); i > 0; i-- {
				id := 1 + w.Intn(next)
				d.Delete(id)
				delete(o, id)
			}
		}
		for i := w.Intn(12); i > 0; i-- {
			r, n := draw()
			if is4, twice := four[r.ID]; twice && is4 != n.prefix.Addr().Is4() {
				continue
			}
			four[r.ID] = n.prefix.Addr().Is4()
			d.Add(r)
			o[r.ID] = n
		}
		if len(d.Skipped) > 0 {
			t.Fatalf("seed %d step %d: skipped %v", seed, step, d.Skipped)
		}
		if out := s.Apply(d, now); out.Doubt {
			t.Fatalf("seed %d step %d: doubt %+v", seed, step, out)
		}
		if w.Intn(5) == 0 {
			s.Fold(now)
		}
		table := s.Compile()
		check(t, table)
		fallback := fallbacks[w.Intn(3)]
		view := NewView(table, Policy{Fallback: fallback})
		for probe := 0; probe < 24; probe++ {
			addr := w.addr()
			if probe%2 == 0 {
				p := w.prefix()
				for _, n := range o { // any one
					p = n.prefix
					break
				}
				addr = edge(w, p)
			}
			at := now.Add(time.Duration(w.Intn(60)) * time.Minute)
			want, until := o.lookup(addr, at, fallback)
			got := view.Lookup(table, addr, at)
			if got.Remediation != want || want != Allow && !got.Until.Equal(until) {
				t.Fatalf("seed %d step %d: %s at +%v: %s until %v (decision %d), want %s until %v", seed, step, addr, at.Sub(epoch), got.Remediation.Name(), got.Until, got.ID, want.Name(), until)
			}
			if want != Allow && !Covered(table, addr.AsSlice()) {
				t.Fatalf("seed %d step %d: %s has a verdict and is not covered", seed, step, addr)
			}
			if h := view.Holders(table, addr, at); want == Allow && len(h) != 0 || want != Allow && (len(h) == 0 || h[0] != got) {
				t.Fatalf("seed %d step %d: %s: holders %v, verdict %v", seed, step, addr, h, got)
			}
		}
		now = now.Add(time.Duration(w.Intn(180)) * time.Second)
	}
}

// edge returns an address inside, at either end of, or just outside p.
func edge(w world, p netip.Prefix) netip.Addr {
	first := p.Addr()
	b := first.AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> uint(i%8)
	}
	last, _ := netip.AddrFromSlice(b)
	out := []netip.Addr{first, last, first.Prev(), last.Next()}[w.Intn(4)]
	if !out.IsValid() || out.Is4In6() {
		return first
	}
	return out
}

// check demands what a Table promises of itself: bounds sorted and disjoint,
// neighbours different, every segment's node enclosing it.
func check(t *testing.T, table *Table) {
	t.Helper()
	for _, b := range []*block{table.base, table.recent} {
		if b == nil {
			continue
		}
		if !sort.IntsAreSorted(b.bounds4) || !sort.StringsAreSorted(b.bounds6) || !sort.IntsAreSorted(b.ids) || !sort.IntsAreSorted(table.gone) {
			t.Fatal("a table is not sorted")
		}
		for i := 1; i < len(b.bounds4); i++ {
			if b.bounds4[i] == b.bounds4[i-1] {
				t.Fatalf("empty segment at %d", i)
			}
			if n := b.seg4[i]; n >= 0 {
				lo, end := span4(b.key4[n])
				if b.bounds4[i] < lo || b.bounds4[i] >= end {
					t.Fatalf("segment %d lies outside its node", i)
				}
			}
		}
		for i := 1; i < len(b.bounds6); i++ {
			if b.bounds6[i] == b.bounds6[i-1] {
				t.Fatalf("empty IPv6 segment at %d", i)
			}
			if n := b.seg6[i]; n >= 0 {
				lo, end := span6(b.key6[int(n)-len(b.key4)])
				if b.bounds6[i] < lo || b.bounds6[i] >= end {
					t.Fatalf("IPv6 segment %d lies outside its node", i)
				}
			}
		}
		for i, id := range b.ids {
			if b.id[b.idRow[i]] != id {
				t.Fatalf("decision %d is found at another one's row", id)
			}
		}
	}
}

func TestLookupEqualsNaiveScan(t *testing.T) {
	seeds := 60
	if interpreted() {
		seeds = 4
	}
	for seed := 1; seed <= seeds; seed++ {
		run(t, int64(seed), 50)
	}
}

func FuzzLookupEqualsNaiveScan(f *testing.F) {
	f.Add(int64(1))
	f.Fuzz(func(t *testing.T, seed int64) { run(t, seed, 30) })
}

func FuzzParsePrefix(f *testing.F) {
	for _, s := range []string{"192.0.2.1", "::ffff:10.0.0.0/104", "2001:DB8::/32", "fe80::1%eth0", "1.2.3.4/33", "/", "::/0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ParsePrefix(s)
		if err != nil {
			return
		}
		if !p.IsValid() || p != p.Masked() || p.Addr().Is4In6() && p.Bits() >= 96 || p.Addr().Zone() != "" {
			t.Fatalf("ParsePrefix(%q) = %v: not canonical", s, p)
		}
		again, err := ParsePrefix(p.String())
		if err != nil || again != p {
			t.Fatalf("ParsePrefix(%q) = %v, %v", p.String(), again, err)
		}
		if p.Addr().Is4() {
			if back := prefixOf4(key4(p)); back != p {
				t.Fatalf("%v became %v", p, back)
			}
		} else if back := prefixOf6(key6(p)); back != p {
			t.Fatalf("%v became %v", p, back)
		}
	})
}

// interpreted reports whether the test runs in Yaegi, where it is a hundred
// times slower: an interpreted type has no name of its own in reflection.
func interpreted() bool {
	return fmt.Sprintf("%T", naive{}) != "decision.naive"
}

// sample is n decisions of which a tenth are ranges and a fifth IPv6.
func sample(n int) []*Row {
	w := rand.New(rand.NewSource(int64(n)))
	rows := make([]*Row, n)
	for i := range rows {
		r := &Row{ID: i + 1, Scope: "Ip", Type: "ban", Origin: "CAPI", Scenario: fmt.Sprintf("crowdsecurity/scenario-%d", i*20/n), Duration: "167h59m59s"}
		if i%5 == 4 {
			r.Value = fmt.Sprintf("2001:db8:%x:%x::%x", w.Intn(1<<16), w.Intn(1<<16), w.Intn(1<<16))
			if i%50 == 49 {
				r.Scope, r.Value = "Range", r.Value+"/64"
			}
		} else {
			r.Value = fmt.Sprintf("%d.%d.%d.%d", 1+w.Intn(223), w.Intn(256), w.Intn(256), w.Intn(256))
			if i%10 == 0 {
				r.Scope, r.Value = "Range", r.Value+"/24"
			}
		}
		rows[i] = r
	}
	return rows
}

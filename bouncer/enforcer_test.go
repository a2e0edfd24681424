package bouncer

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math/rand"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/edgeward/edgeward/internal/decision"
	"github.com/edgeward/edgeward/internal/netns"
	"github.com/edgeward/edgeward/internal/nft"
)

var epoch = time.Unix(1_800_000_000, 0)

// clock is a time that stands still until it is moved.
type clock struct{ at time.Time }

func (c *clock) now() time.Time { return c.at }

// naive is a decision as the oracle keeps it.
type naive struct {
	prefix netip.Prefix
	typ    string
	origin string
	until  time.Time
}

// stream is a LAPI, an enforcer that follows it, and an oracle that knows by
// looking at each decision what must be dropped.
type stream struct {
	clock
	*rand.Rand
	t         testing.TB
	store     *decision.Store
	enforcer  *enforcer
	oracle    map[int]naive
	protected []Protected
}

func newStream(t testing.TB, seed int64, k func(now func() time.Time) kernel) *stream {
	s := &stream{clock: clock{epoch}, Rand: rand.New(rand.NewSource(seed)), t: t, store: decision.NewStore(), oracle: map[int]naive{}}
	c := Defaults()
	c.StateDir = ""
	c.Decisions.Remediations = []Remediation{"ban", "captcha"}
	c.Decisions.Fallback = "ban"
	s.enforcer = newEnforcer(k(s.now), &c, s.now, slog.New(slog.DiscardHandler))
	return s
}

var bases = []string{"203.0.113.0", "10.0.0.0", "255.255.255.0", "0.0.0.0", "2001:db8::", "fd00::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ff00"}

func (s *stream) addr() netip.Addr {
	b := netip.MustParseAddr(bases[s.Intn(len(bases))]).AsSlice()
	b[len(b)-1] = byte(s.Intn(64))
	a, _ := netip.AddrFromSlice(b)
	return a
}

func (s *stream) prefix() netip.Prefix {
	a := s.addr()
	bits := a.BitLen()
	switch s.Intn(10) {
	case 0, 1, 2:
		bits -= 1 + s.Intn(6)
	case 3:
		bits = s.Intn(12)
	}
	return netip.PrefixFrom(a, bits).Masked()
}

func (s *stream) draw() naive {
	return naive{
		prefix: s.prefix(),
		typ:    []string{"ban", "ban", "captcha", "throttle", "odd"}[s.Intn(5)],
		origin: []string{"crowdsec", "cscli", "CAPI", "lists:bad"}[s.Intn(4)],
		until:  s.at.Add(time.Duration(1+s.Intn(40)) * time.Minute),
	}
}

func (s *stream) row(id int, n naive) *decision.Row {
	return &decision.Row{ID: id, Scope: "Range", Value: n.prefix.String(), Type: n.typ, Origin: n.origin, Scenario: "s", Duration: n.until.Sub(s.at).String()}
}

// delta changes a few decisions and has the enforcer follow.
func (s *stream) delta() error {
	d := s.store.NewDelta(false, s.at)
	given := map[int]bool{}
	for range s.Intn(6) {
		id := 1 + s.Intn(50)
		if given[id] {
			continue
		}
		given[id] = true
		if s.Intn(3) == 0 {
			d.Delete(id)
			delete(s.oracle, id)
			continue
		}
		n := s.draw()
		s.oracle[id] = n
		d.Add(s.row(id, n))
	}
	touched := s.store.Touches(d)
	s.store.Apply(d, s.at)
	if s.Intn(5) == 0 {
		s.store.Fold(s.at)
	}
	return s.enforcer.follow(s.store.Compile(), touched, false)
}

// full changes many decisions at once and has the enforcer follow a full pull.
func (s *stream) full() error {
	for range s.Intn(20) {
		id := 1 + s.Intn(50)
		if s.Intn(2) == 0 {
			delete(s.oracle, id)
		} else {
			s.oracle[id] = s.draw()
		}
	}
	for doubt := true; doubt; {
		d := s.store.NewDelta(true, s.at)
		for id, n := range s.oracle {
			d.Add(s.row(id, n))
		}
		doubt = s.store.Apply(d, s.at).Doubt
	}
	return s.enforcer.follow(s.store.Compile(), nil, true)
}

// guard changes what is protected.
func (s *stream) guard() error {
	s.protected = nil
	for range s.Intn(4) {
		s.protected = append(s.protected, Protected{s.prefix(), "test"})
	}
	return s.enforcer.protect(s.protected)
}

// want is the oracle's word on an address.
func (s *stream) want(a netip.Addr) bool {
	if slices.ContainsFunc(s.protected, func(p Protected) bool { return p.Prefix.Contains(a) }) {
		return false
	}
	private := a.IsPrivate() || a.IsLoopback() || a.IsLinkLocalUnicast() || netip.MustParsePrefix("100.64.0.0/10").Contains(a)
	for _, n := range s.oracle {
		if n.prefix.Contains(a) && n.until.After(s.at) && n.typ != "throttle" && !(private && (n.origin == "CAPI" || n.origin == "lists:bad")) {
			return true
		}
	}
	return false
}

// check compares the kernel with the oracle, on every address that plays a part.
func (s *stream) check(what string, drops func(netip.Addr) bool) {
	s.t.Helper()
	for _, base := range bases {
		b := netip.MustParseAddr(base).AsSlice()
		for i := range 66 {
			b[len(b)-1] = byte(i)
			a, _ := netip.AddrFromSlice(b)
			if got, want := drops(a), s.want(a); got != want {
				var holds []string
				for _, n := range s.oracle {
					if n.prefix.Contains(a) {
						holds = append(holds, fmt.Sprintf("%v %s %s %v", n.prefix, n.typ, n.origin, n.until.Sub(s.at)))
					}
				}
				s.t.Fatalf("%s: %v is dropped: %v, want %v; held by %v, protected %v", what, a, got, want, holds, s.protected)
			}
		}
	}
}

// TestKernelHoldsWhatDecisionsSay follows random streams with deltas, full
// pulls, time that passes, changes of what is protected, writes that fail and
// foreign flushes, and compares the kernel with the oracle after each.
func TestKernelHoldsWhatDecisionsSay(t *testing.T) {
	t.Parallel()
	for seed := range int64(60) {
		var m *memory
		s := newStream(t, seed, func(now func() time.Time) kernel { m = newMemory(now); return m })
		e := s.enforcer
		if err := e.verify(); err != nil {
			t.Fatal(err)
		}
		for step := range 60 {
			var err error
			what := ""
			switch n := s.Intn(20); {
			case n < 10:
				what, err = "delta", s.delta()
			case n < 13:
				what, err = "full pull", s.full()
			case n < 15:
				what, err = "guard", s.guard()
			case n < 16:
				what = "failing write"
				m.fails = 1 + s.Intn(2)
				_ = s.delta()
				m.fails = 0
				err = e.verify()
			case n < 17:
				what = "flush"
				m.flush()
				err = e.verify()
			default:
				what = "time"
				s.at = s.at.Add(time.Duration(s.Intn(900)) * time.Second)
				err = e.verify()
			}
			if err != nil {
				t.Fatalf("seed %d step %d, %s: %v", seed, step, what, err)
			}
			s.check(fmt.Sprintf("seed %d step %d, after a %s", seed, step, what), m.drops)
		}
		if r := e.stands(); r.Interference != r.Repairs {
			t.Fatalf("seed %d: %d repairs for %d interferences", seed, r.Repairs, r.Interference)
		}
	}
}

// TestCloseLookFindsNothingWhereNothingIs: the close look must never take what
// ends, overlaps or is protected for damage.
func TestCloseLookFindsNothingWhereNothingIs(t *testing.T) {
	for seed := range int64(100) {
		var m *memory
		s := newStream(t, seed, func(now func() time.Time) kernel { m = newMemory(now); return m })
		for step := range 40 {
			if err := []func() error{s.delta, s.full, s.guard, s.delta}[s.Intn(4)](); err != nil {
				t.Fatal(err)
			}
			s.at = s.at.Add(time.Duration(s.Intn(300)) * time.Second)
			s.enforcer.deep = time.Time{}
			if err := s.enforcer.verify(); err != nil {
				t.Fatal(err)
			}
			if r := s.enforcer.stands(); r.Interference != 0 {
				t.Fatalf("seed %d step %d: interference seen", seed, step)
			}
		}
	}
}

// ban makes the stream hold one decision more.
func (s *stream) ban(id int, value, origin string, d time.Duration) {
	s.t.Helper()
	p, err := decision.ParsePrefix(value)
	if err != nil {
		s.t.Fatal(err)
	}
	n := naive{p, "ban", origin, s.at.Add(d)}
	s.oracle[id] = n
	delta := s.store.NewDelta(false, s.at)
	delta.Add(s.row(id, n))
	touched := s.store.Touches(delta)
	s.store.Apply(delta, s.at)
	if err := s.enforcer.follow(s.store.Compile(), touched, false); err != nil {
		s.t.Fatal(err)
	}
}

func TestDamageIsFoundAndMended(t *testing.T) {
	victim := netip.MustParseAddr("203.0.113.5")
	for _, c := range []struct {
		name   string
		shared bool
		damage func(*memory)
		event  bool
		after  time.Duration
		mended bool
	}{
		{"flushed, as an event says", true, (*memory).flush, true, 0, true},
		{"flushed, and no event came", true, (*memory).flush, false, time.Minute, true},
		{"one element gone, found in time", false, func(m *memory) { m.lose(victim) }, false, 11 * time.Minute, true},
		{"one element gone, where others may write", true, func(m *memory) { m.lose(victim) }, true, 2 * time.Minute, true},
		{"many elements gone, where others may write", true, func(m *memory) {
			for i := range 100 {
				m.lose(netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}))
			}
		}, true, 0, true},
		{"one element gone, and nobody could have told yet", false, func(m *memory) { m.lose(victim) }, true, time.Minute, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			var m *memory
			s := newStream(t, 1, func(now func() time.Time) kernel { m = newMemory(now); return m })
			m.owner = !c.shared
			for i := range 100 {
				s.ban(i, fmt.Sprintf("203.0.113.%d", i), "crowdsec", time.Hour)
			}
			for range 2 { // the second knows how many there were
				if err := s.enforcer.verify(); err != nil {
					t.Fatal(err)
				}
			}
			c.damage(m)
			if c.event {
				s.enforcer.saw(nft.Event{Process: "nft", PID: 7})
			}
			s.at = s.at.Add(c.after)
			if err := s.enforcer.verify(); err != nil {
				t.Fatal(err)
			}
			if r := s.enforcer.stands(); m.drops(victim) != c.mended || (r.Repairs == 1) != c.mended || r.Interference != r.Repairs {
				t.Errorf("dropped: %v, report %+v", m.drops(victim), r)
			}
		})
	}
}

// TestDeltaCostsWhatItWeighs: one ban, one unban and one range among many write
// what changes, however many there are.
func TestDeltaCostsWhatItWeighs(t *testing.T) {
	var m *memory
	s := newStream(t, 1, func(now func() time.Time) kernel { m = newMemory(now); return m })
	d := s.store.NewDelta(true, s.at)
	for i := range 5000 {
		d.Add(s.row(i, naive{netip.PrefixFrom(netip.AddrFrom4([4]byte{20, byte(i >> 8), byte(i), 1}), 32), "ban", "CAPI", s.at.Add(time.Hour)}))
	}
	for i := range 500 {
		d.Add(s.row(10_000+i, naive{netip.PrefixFrom(netip.AddrFrom4([4]byte{21, byte(i >> 8), byte(i), 0}), 24), "ban", "CAPI", s.at.Add(time.Hour)}))
	}
	s.store.Apply(d, s.at)
	if err := s.enforcer.follow(s.store.Compile(), nil, true); err != nil {
		t.Fatal(err)
	}
	s.ban(20_000, "203.0.113.9", "crowdsec", time.Hour)
	if m.installs != 1 || m.updates != 1 || m.written != 1 {
		t.Errorf("a ban took %d installs and %d updates and wrote %d", m.installs, m.updates, m.written)
	}
	s.ban(20_001, "198.51.100.0/24", "crowdsec", time.Hour)
	if m.updates != 2 || m.written != 1 {
		t.Errorf("a range wrote %d", m.written)
	}
	// It lies within one that is there: three spans take the place of one.
	s.ban(20_002, "21.0.7.128/26", "crowdsec", 2*time.Hour)
	if m.updates != 3 || m.written != 4 {
		t.Errorf("a range within a range wrote %d", m.written)
	}
	delta := s.store.NewDelta(false, s.at)
	delta.Delete(20_000)
	touched := s.store.Touches(delta)
	s.store.Apply(delta, s.at)
	if err := s.enforcer.follow(s.store.Compile(), touched, false); err != nil {
		t.Fatal(err)
	}
	if m.updates != 4 || m.written != 1 || m.drops(netip.MustParseAddr("203.0.113.9")) {
		t.Errorf("an unban wrote %d", m.written)
	}
	// A full pull that says the same, a second later, writes nothing.
	s.at = s.at.Add(time.Second)
	again := s.store.NewDelta(true, s.at)
	s.store.Compile().Each(s.at, func(id int, p netip.Prefix, until time.Time, c decision.Class) bool {
		again.Hold(id, p, until.Add(time.Second), c)
		return true
	})
	s.store.Apply(again, s.at)
	if err := s.enforcer.follow(s.store.Compile(), nil, true); err != nil {
		t.Fatal(err)
	}
	if m.updates != 4 || m.installs != 1 {
		t.Errorf("an unchanged full pull took %d updates", m.updates-4)
	}
}

// TestPredecessorStays: what a predecessor enforces is left alone until there is
// better.
func TestPredecessorStays(t *testing.T) {
	for _, c := range []struct {
		name      string
		enforcing bool
		snapshot  bool
		after     time.Duration
		installs  int
	}{
		{"nothing enforced, nothing known", false, false, 0, 1}, // the locks count at once
		{"nothing enforced, snapshot", false, true, 0, 1},
		{"enforcing, nothing known, LAPI away for ever", true, false, time.Hour, 0},
		{"enforcing, snapshot, LAPI may answer yet", true, true, patience / 2, 0},
		{"enforcing, snapshot, LAPI away", true, true, patience, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			var m *memory
			s := newStream(t, 1, func(now func() time.Time) kernel { m = newMemory(now); return m })
			m.enforcing = c.enforcing
			if err := s.enforcer.start(); err != nil {
				t.Fatal(err)
			}
			if c.snapshot {
				d := s.store.NewDelta(true, s.at)
				d.Add(s.row(1, naive{netip.MustParsePrefix("203.0.113.5/32"), "ban", "crowdsec", s.at.Add(time.Hour)}))
				s.store.Apply(d, s.at)
				s.enforcer.recall(s.store.Compile())
			}
			s.at = s.at.Add(c.after)
			if err := s.enforcer.verify(); err != nil {
				t.Fatal(err)
			}
			if m.installs != c.installs {
				t.Errorf("%d installs, want %d", m.installs, c.installs)
			}
			if got, want := m.drops(netip.MustParseAddr("203.0.113.5")), c.snapshot && c.installs > 0; got != want {
				t.Errorf("the address of the snapshot is dropped: %v", got)
			}
			s.ban(2, "203.0.113.6", "crowdsec", time.Hour)
			if m.installs > c.installs+1 || !m.drops(netip.MustParseAddr("203.0.113.6")) {
				t.Errorf("%d installs after LAPI answered", m.installs)
			}
		})
	}
}

// TestOwnerIsNeverLockedOut bans what must not be banned, in every way that
// CrowdSec could say it.
func TestOwnerIsNeverLockedOut(t *testing.T) {
	var log bytes.Buffer
	var m *memory
	s := newStream(t, 1, func(now func() time.Time) kernel { m = newMemory(now); return m })
	s.enforcer.log = slog.New(slog.NewTextHandler(&log, nil))
	protected := map[string]string{"127.0.0.1": "loopback", "192.0.2.10": "this node's own address", "10.43.0.1": "services", "104.16.5.5": "Cloudflare's edge", "2606:4700::1": "Cloudflare's edge"}
	var list []Protected
	for text, why := range protected {
		list = append(list, Protected{single(netip.MustParseAddr(text)), why})
	}
	slices.SortFunc(list, func(a, b Protected) int { return comparePrefixes(a.Prefix, b.Prefix) })
	if err := s.enforcer.protect(list); err != nil {
		t.Fatal(err)
	}
	id := 0
	for text := range protected {
		a := netip.MustParseAddr(text)
		for _, bits := range []int{a.BitLen(), a.BitLen() - 8, 8, 0} {
			id++
			s.ban(id, netip.PrefixFrom(a, bits).Masked().String(), []string{"crowdsec", "CAPI"}[id%2], time.Hour)
		}
	}
	for text := range protected {
		if a := netip.MustParseAddr(text); m.drops(a) || m.elements[a].from.IsValid() {
			t.Errorf("%s is dropped, or written at all", text)
		}
	}
	for _, text := range []string{"8.8.8.8", "192.0.2.11", "2606:4700::2"} {
		if !m.drops(netip.MustParseAddr(text)) {
			t.Errorf("%s is not dropped", text)
		}
	}
	covering := *s.enforcer.covering.Load()
	if len(covering) < 15 {
		t.Errorf("%d decisions are said to cover protected addresses", len(covering))
	}
	for _, want := range []string{"a decision covers a protected address", "value=192.0.2.10/32", `protects="this node's own address"`} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log does not say %s:\n%s", want, log.String())
		}
	}
	// No longer protected, what is banned is dropped.
	if err := s.enforcer.protect(list[:1]); err != nil {
		t.Fatal(err)
	}
	if a := list[len(list)-1].Prefix.Addr(); !m.drops(a) {
		t.Errorf("%v is not dropped once it is not protected", a)
	}
}

// TestRealKernelHoldsWhatDecisionsSay is TestKernelHoldsWhatDecisionsSay on the
// kernel itself, in a namespace of its own; time stands still, so nothing ends.
func TestRealKernelHoldsWhatDecisionsSay(t *testing.T) {
	for seed := range int64(6) {
		ns := netns.New(t)
		var conn *nft.Conn
		open := func() *nft.Conn {
			c, err := nft.Open(nft.Options{NetNS: ns.FD(), Shared: seed%2 == 1})
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		conn = open()
		s := newStream(t, 1000+seed, func(func() time.Time) kernel { return conn })
		e := s.enforcer
		drops := func(a netip.Addr) bool {
			found, err := conn.Sample([]netip.Addr{a})
			if err != nil {
				t.Fatal(err)
			}
			return found[0].Banned() && !slices.ContainsFunc(s.protected, func(p Protected) bool { return p.Prefix.Contains(a) })
		}
		if err := e.verify(); err != nil {
			t.Fatal(err)
		}
		interfered := uint64(0)
		for step := range 40 {
			var err error
			what := ""
			switch n := s.Intn(20); {
			case n < 10:
				what, err = "delta", s.delta()
			case n < 13:
				what, err = "full pull", s.full()
			case n < 15:
				what, err = "guard", s.guard()
			case n < 17:
				what = "close look"
				e.deep = time.Time{}
				err = e.verify()
			case n < 18:
				what = "flush"
				ns.MustExec("nft", "flush", "ruleset")
				err = e.verify()
				interfered += uint64(seed % 2) // an owned table is left alone
			default:
				what = "restart"
				conn.Close()
				conn = open()
				e.kernel = conn
				e.mu.Lock()
				e.installed = false
				err = e.install("restart")
				e.mu.Unlock()
			}
			if err != nil {
				t.Fatalf("seed %d step %d, %s: %v", seed, step, what, err)
			}
			s.check(fmt.Sprintf("seed %d step %d, after a %s", seed, step, what), drops)
			if r := e.stands(); r.Interference != interfered || r.Repairs != interfered || r.Failures != 0 {
				t.Fatalf("seed %d step %d, after a %s: %+v, want %d interferences", seed, step, what, r, interfered)
			}
		}
		conn.Close()
	}
}

// TestClassFollowsWhatIsLive: what goes on after the strongest decision has ended
// is of the class of the strongest that is left, and what ended is gone, without
// a word of LAPI.
func TestClassFollowsWhatIsLive(t *testing.T) {
	type held struct {
		value, typ, origin string
		minutes            int
	}
	for _, c := range []struct {
		name string
		held []held
		want []string // by minute: class of 203.0.113.5, "" for none
	}{
		{"an address", []held{{"203.0.113.5", "ban", "CAPI", 1}, {"203.0.113.5", "captcha", "crowdsec", 3}},
			[]string{"ban/CAPI", "captcha/crowdsec", "captcha/crowdsec", ""}},
		{"an address, equals", []held{{"203.0.113.5", "ban", "CAPI", 2}, {"203.0.113.5", "ban", "cscli", 1}},
			[]string{"ban/CAPI", "ban/CAPI", ""}},
		{"three in turn", []held{{"203.0.113.5", "ban", "a", 1}, {"203.0.113.5", "captcha", "b", 2}, {"203.0.113.5", "captcha", "c", 3}},
			[]string{"ban/a", "captcha/c", "captcha/c", ""}},
		{"a range", []held{{"203.0.113.0/28", "ban", "CAPI", 1}, {"203.0.113.0/28", "captcha", "crowdsec", 2}},
			[]string{"ban/CAPI", "captcha/crowdsec", ""}},
		{"a range around a range", []held{{"203.0.113.0/24", "ban", "CAPI", 1}, {"203.0.113.0/28", "captcha", "crowdsec", 3}},
			[]string{"ban/CAPI", "captcha/crowdsec", "captcha/crowdsec", ""}},
		{"a range within a range", []held{{"203.0.113.0/24", "captcha", "CAPI", 2}, {"203.0.113.0/28", "ban", "crowdsec", 1}},
			[]string{"ban/crowdsec", "captcha/CAPI", ""}},
		{"an inner range that outlives", []held{{"203.0.113.0/24", "ban", "CAPI", 2}, {"203.0.113.0/28", "ban", "crowdsec", 3}, {"203.0.113.4/30", "captcha", "x", 4}},
			[]string{"ban/crowdsec", "ban/crowdsec", "ban/crowdsec", "captcha/x", ""}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var m *memory
			s := newStream(t, 1, func(now func() time.Time) kernel { m = newMemory(now); return m })
			d := s.store.NewDelta(false, s.at)
			for i, h := range c.held {
				p, err := decision.ParsePrefix(h.value)
				if err != nil {
					t.Fatal(err)
				}
				d.Add(s.row(i, naive{p, h.typ, h.origin, s.at.Add(time.Duration(h.minutes) * time.Minute)}))
			}
			touched := s.store.Touches(d)
			s.store.Apply(d, s.at)
			if err := s.enforcer.follow(s.store.Compile(), touched, false); err != nil {
				t.Fatal(err)
			}
			for minute, want := range c.want {
				found, err := m.Sample([]netip.Addr{netip.MustParseAddr("203.0.113.5")})
				if err != nil || found[0].Name != want {
					t.Errorf("minute %d: class %q, want %q (%v)", minute, found[0].Name, want, err)
				}
				s.at = s.at.Add(time.Minute)
				if err := s.enforcer.verify(); err != nil {
					t.Fatal(err)
				}
			}
			if m.installs != 1 {
				t.Errorf("%d installs", m.installs)
			}
		})
	}
}

// TestJumpOfTheClockEndsNothing: what has ended by a clock that jumped stays until
// LAPI has been asked.
func TestJumpOfTheClockEndsNothing(t *testing.T) {
	var m *memory
	s := newStream(t, 1, func(now func() time.Time) kernel { m = newMemory(now); return m })
	s.enforcer.config.LAPI.URL = "http://192.0.2.9:8080" // without one, no full pull is waited for
	s.ban(1, "203.0.113.0/24", "crowdsec", time.Minute)
	victim := netip.MustParseAddr("203.0.113.5")
	s.at = s.at.Add(time.Minute + time.Second)
	s.enforcer.jumped = true
	if err := s.enforcer.verify(); err != nil || !m.drops(victim) {
		t.Error("a range is gone because of the clock", err)
	}
	if next := s.enforcer.next(); !next.IsZero() {
		t.Errorf("the next turn is at %v", next)
	}
	s.enforcer.jumped = false
	if err := s.enforcer.verify(); err != nil || m.drops(victim) {
		t.Error("a range that ended stays", err)
	}
}

// BenchmarkRange is one range banned and unbanned beside n others, in the
// kernel, from the delta on.
func BenchmarkRange(b *testing.B) {
	for _, n := range []int{1000, 10_000, 50_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			conn, err := nft.Open(nft.Options{NetNS: netns.New(b).FD()})
			if err != nil {
				b.Fatal(err)
			}
			defer conn.Close()
			s := newStream(b, 1, func(func() time.Time) kernel { return conn })
			d := s.store.NewDelta(true, s.at)
			for i := range n {
				p := netip.PrefixFrom(netip.AddrFrom4([4]byte{20 + byte(i>>15), byte(i >> 7), byte(i << 1), 0}), 24)
				d.Add(s.row(i, naive{p, "ban", "CAPI", s.at.Add(time.Duration(1+i%100) * time.Hour)}))
			}
			s.store.Apply(d, s.at)
			if err := s.enforcer.follow(s.store.Compile(), nil, true); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				s.ban(1_000_000, "203.0.113.0/24", "crowdsec", time.Hour)
				d := s.store.NewDelta(false, s.at)
				d.Delete(1_000_000)
				touched := s.store.Touches(d)
				s.store.Apply(d, s.at)
				if err := s.enforcer.follow(s.store.Compile(), touched, false); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(2*b.N), "µs/change")
		})
	}
}

// TestJumpOfTheClockWithoutLAPI: where no full pull ever comes, a look does it.
func TestJumpOfTheClockWithoutLAPI(t *testing.T) {
	n := newNode(t, "", func(c *Config) {
		c.LAPI.URL = ""
		c.Lists = []ListConfig{{Name: "a", Path: "/nowhere", Remediation: "ban"}}
	})
	n.listsAreFed()
	n.turn(t.Context())
	n.enforcer.jumped = true
	n.at = n.at.Add(10 * time.Minute)
	if err := n.enforcer.verify(); err != nil || n.enforcer.jumped {
		t.Errorf("the clock is never looked past again: %v", err)
	}
}

// forgetful loses its connection when bans are to be waived, as the kernel's does.
type forgetful struct{ *memory }

func (f forgetful) Waive(nft.Waivers) error {
	f.memory.intact = false
	return errors.New("waive bans: await answer: no answer")
}

// TestLostOrderIsNobodysDoing: what we lost ourselves is made again, and does not
// count as another program's.
func TestLostOrderIsNobodysDoing(t *testing.T) {
	n := newNode(t, "", nil)
	n.turn(t.Context())
	n.answer(true, decided(1, "203.0.113.66", "ban", "crowdsec", "ssh"))
	n.enforcer.kernel = forgetful{n.memory}
	if _, _, err := n.enforcer.allow(netip.MustParsePrefix("203.0.113.66/32"), time.Hour, "", "me"); err == nil {
		t.Fatal("the order was taken: this test shows nothing")
	}
	n.enforcer.kernel = n.memory
	n.turn(t.Context())
	if r := n.enforcer.stands(); r.Interference != 0 || !r.Installed {
		t.Errorf("%+v", r)
	}
}

// TestManyRangesAtOnce: changes to very many ranges are laid out anew, because each
// by itself would move all that are behind it.
func TestManyRangesAtOnce(t *testing.T) {
	c := Defaults()
	c.StateDir = ""
	now := func() time.Time { return epoch }
	e := newEnforcer(newMemory(now), &c, now, slog.New(slog.DiscardHandler))
	s := decision.NewStore()
	d := s.NewDelta(true, epoch)
	const ranges, gone = 4000, 2000
	for i := range ranges {
		d.Add(&decision.Row{ID: i + 1, Scope: "Range", Value: fmt.Sprintf("20.%d.%d.0/24", i/128, i%128*2), Type: "ban", Origin: "crowdsec", Scenario: "s", Duration: "1h"})
	}
	s.Apply(d, epoch)
	if err := e.follow(s.Compile(), nil, true); err != nil {
		t.Fatal(err)
	}
	before := e.stands()
	d = s.NewDelta(false, epoch)
	for i := range gone {
		d.Delete(2*i + 1)
	}
	touched := s.Touches(d)
	s.Apply(d, epoch)
	if err := e.follow(s.Compile(), touched, false); err != nil {
		t.Fatal(err)
	}
	if r := e.stands(); r.Installs != before.Installs+1 || r.Updates != before.Updates {
		t.Errorf("%d installs and %d updates, want one more install than %d", r.Installs, r.Updates, before.Installs)
	}
}

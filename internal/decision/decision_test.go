package decision

import (
	"net/netip"
	"testing"
	"time"
)

func TestParsePrefix(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"192.0.2.1", "192.0.2.1/32"},
		{"192.0.2.1/32", "192.0.2.1/32"},
		{"192.0.2.77/24", "192.0.2.0/24"},
		{"0.0.0.0/0", "0.0.0.0/0"},
		{"::ffff:192.0.2.1", "192.0.2.1/32"},
		{"::FFFF:c000:0201", "192.0.2.1/32"},
		{"::ffff:192.0.2.0/120", "192.0.2.0/24"},
		{"::ffff:0:0/96", "0.0.0.0/0"},
		{"2001:DB8:0:0::1", "2001:db8::1/128"},
		{"2001:0db8:0000:0000:0000:0000:0000:0001", "2001:db8::1/128"},
		{"2001:db8::1/64", "2001:db8::/64"},
		{"::/0", "::/0"},
	} {
		got, err := ParsePrefix(c.in)
		if err != nil || got.String() != c.want {
			t.Errorf("ParsePrefix(%q) = %v, %v; want %s", c.in, got, err, c.want)
		}
	}
	for _, in := range []string{
		"", "banana", "192.0.2", "192.0.2.1.", "192.000.002.001", "192.0.2.1/33", "192.0.2.1/-1", "192.0.2.1/", "/24",
		"192.0.2.1/24/24", "2001:db8::/129", "fe80::1%eth0", "fe80::1%eth0/64", "2001:db8:::1", " 192.0.2.1", "192.0.2.1:80",
	} {
		if got, err := ParsePrefix(in); err == nil {
			t.Errorf("ParsePrefix(%q) = %v, want an error", in, got)
		}
	}
}

func TestParseFallback(t *testing.T) {
	for in, want := range map[string]Remediation{"": Ban, "ban": Ban, "captcha": Captcha, "ignore": Allow} {
		if got, err := ParseFallback(in); err != nil || got != want {
			t.Errorf("ParseFallback(%q) = %v, %v", in, got, err)
		}
	}
	if _, err := ParseFallback("Bann"); err == nil {
		t.Error("ParseFallback took a word it does not know")
	}
}

// epoch is the moment at which the tests' stories begin.
var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// row writes a decision in one line: its fields after the id.
func row(id int, value, typ, origin, duration string) *Row {
	scope := "Ip"
	for i := range value {
		if value[i] == '/' {
			scope = "Range"
		}
	}
	return &Row{ID: id, Scope: scope, Value: value, Type: typ, Origin: origin, Scenario: "test/" + origin, Duration: duration}
}

// story is a store with a clock that its test moves.
type story struct {
	t     *testing.T
	store *Store
	now   time.Time
	view  Policy
}

func begin(t *testing.T) *story {
	return &story{t: t, store: NewStore(), now: epoch, view: Policy{Fallback: Ban}}
}

func (s *story) pull(full bool, add []*Row, remove ...int) Outcome {
	d := s.store.NewDelta(full, s.now)
	for _, id := range remove {
		d.Delete(id)
	}
	for _, r := range add {
		d.Add(r)
	}
	if len(d.Skipped) > 0 {
		s.t.Fatalf("rows were skipped: %v", d.Skipped)
	}
	return s.store.Apply(d, s.now)
}

func (s *story) want(addr, want string) {
	s.t.Helper()
	table := s.store.Compile()
	v := NewView(table, s.view).Lookup(table, netip.MustParseAddr(addr), s.now)
	got := v.Remediation.Name()
	if v.Remediation != Allow {
		got += " by " + v.Origin
	}
	if got != want {
		s.t.Errorf("%s at +%v: %s, want %s", addr, s.now.Sub(epoch), got, want)
	}
}

func (s *story) wait(d time.Duration) { s.now = s.now.Add(d) }

func TestSeveralDecisionsHoldOneAddress(t *testing.T) {
	s := begin(t)
	s.pull(true, []*Row{
		row(1, "192.0.2.1", "ban", "cscli", "4h"),
		row(2, "192.0.2.1", "ban", "crowdsec", "1h"),
	})
	s.want("192.0.2.1", "ban by cscli")
	s.pull(false, nil, 1)
	s.want("192.0.2.1", "ban by crowdsec")
	s.wait(59 * time.Minute)
	s.want("192.0.2.1", "ban by crowdsec")
	s.wait(time.Minute)
	s.want("192.0.2.1", "allow")
}

func TestBanThenCaptcha(t *testing.T) {
	s := begin(t)
	s.pull(true, []*Row{
		row(1, "192.0.2.1", "captcha", "crowdsec", "4h"),
		row(2, "192.0.2.1", "ban", "crowdsec", "1h"),
		row(3, "192.0.2.0/24", "throttle", "lists", "8h"),
	})
	s.want("192.0.2.1", "ban by crowdsec")
	s.wait(time.Hour)
	s.want("192.0.2.1", "captcha by crowdsec")
	s.wait(3 * time.Hour)
	s.want("192.0.2.1", "throttle by lists")
	s.want("192.0.2.2", "throttle by lists")
	s.wait(4 * time.Hour)
	s.want("192.0.2.1", "allow")
}

func TestRangesAndFamilies(t *testing.T) {
	s := begin(t)
	s.pull(true, []*Row{
		row(1, "198.51.100.0/24", "ban", "a", "1h"),
		row(2, "198.51.100.128/25", "captcha", "b", "2h"),
		row(3, "2001:DB8::/32", "ban", "c", "1h"),
		row(4, "2001:db8:1::/48", "throttle", "d", "3h"),
		row(5, "255.255.255.255", "ban", "e", "1h"),
		row(6, "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "ban", "f", "1h"),
		row(7, "0.0.0.0", "ban", "g", "1h"),
		row(8, "::", "ban", "h", "1h"),
	})
	s.want("198.51.100.7", "ban by a")
	s.want("198.51.100.200", "ban by a")
	s.want("198.51.99.255", "allow")
	s.want("198.51.101.0", "allow")
	s.want("::ffff:198.51.100.7", "ban by a")
	s.want("2001:db8::1", "ban by c")
	s.want("2001:db8:1::1", "ban by c")
	s.want("2001:db9::", "allow")
	s.want("255.255.255.255", "ban by e")
	s.want("255.255.255.254", "allow")
	s.want("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "ban by f")
	s.want("0.0.0.0", "ban by g")
	s.want("0.0.0.1", "allow")
	s.want("::", "ban by h")
	s.want("::1", "allow")
	s.wait(time.Hour)
	s.want("198.51.100.7", "allow")
	s.want("198.51.100.200", "captcha by b")
	s.want("2001:db8:1::1", "throttle by d")
	s.want("2001:db8::1", "allow")
}

func TestEverything(t *testing.T) {
	s := begin(t)
	s.pull(true, []*Row{row(1, "0.0.0.0/0", "ban", "a", "1h"), row(2, "::/0", "ban", "b", "1h")})
	for _, addr := range []string{"0.0.0.0", "127.0.0.1", "255.255.255.255"} {
		s.want(addr, "ban by a")
	}
	for _, addr := range []string{"::", "2001:db8::1", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"} {
		s.want(addr, "ban by b")
	}
}

func TestDeletesComeBeforeAdds(t *testing.T) {
	s := begin(t)
	s.pull(true, []*Row{row(1, "192.0.2.1", "ban", "a", "1h")})
	s.pull(false, []*Row{row(1, "192.0.2.1", "ban", "a", "4h")}, 1)
	s.wait(2 * time.Hour)
	s.want("192.0.2.1", "ban by a")
}

func TestDeletingACaptchaLeavesTheBan(t *testing.T) {
	s := begin(t)
	s.pull(true, []*Row{row(1, "192.0.2.1", "captcha", "a", "1h")})
	s.pull(false, []*Row{row(2, "192.0.2.1", "ban", "b", "1h")}, 1)
	s.want("192.0.2.1", "ban by b")
	s.pull(false, nil, 1)
	s.want("192.0.2.1", "ban by b")
}

func TestRebanExtends(t *testing.T) {
	for name, rows := range map[string][]*Row{
		"same id":    {row(1, "192.0.2.1", "ban", "a", "3h")},
		"another id": {row(2, "192.0.2.1", "ban", "a", "3h")},
	} {
		for _, full := range []bool{false, true} {
			s := begin(t)
			s.pull(true, []*Row{row(1, "192.0.2.1", "ban", "a", "1h")})
			s.pull(full, rows)
			s.wait(2 * time.Hour)
			s.want("192.0.2.1", "ban by a")
			s.wait(time.Hour)
			s.want("192.0.2.1", "allow")
			if t.Failed() {
				t.Fatalf("%s, full %v", name, full)
			}
		}
	}
}

func TestAnIdThatMoves(t *testing.T) {
	s := begin(t)
	s.pull(true, []*Row{row(1, "192.0.2.1", "ban", "a", "1h")})
	s.pull(false, []*Row{row(1, "2001:db8::1", "captcha", "b", "1h")})
	s.want("192.0.2.1", "allow")
	s.want("2001:db8::1", "captcha by b")
	s.pull(false, []*Row{row(1, "192.0.2.1", "ban", "a", "1h")})
	s.want("192.0.2.1", "ban by a")
	s.want("2001:db8::1", "allow")
}

func TestUnknownTypesFollowTheFallback(t *testing.T) {
	for word, want := range map[string]string{"ban": "ban by a", "captcha": "captcha by a", "ignore": "allow"} {
		s := begin(t)
		s.view.Fallback, _ = ParseFallback(word)
		s.pull(true, []*Row{row(1, "192.0.2.1", "quarantine", "a", "1h")})
		s.want("192.0.2.1", want)
	}
}

func TestAllowlistBeatsEverything(t *testing.T) {
	s := begin(t)
	s.pull(true, []*Row{row(1, "0.0.0.0/0", "ban", "a", "1h"), row(2, "192.0.2.1", "ban", "b", "1h"), row(3, "2001:db8::/32", "ban", "c", "1h")})
	s.view.Allow = NewRanges([]netip.Prefix{netip.MustParsePrefix("192.0.2.0/28"), netip.MustParsePrefix("2001:db8:5::/48")})
	s.want("192.0.2.1", "allow")
	s.want("::ffff:192.0.2.15", "allow")
	s.want("192.0.2.16", "ban by a")
	s.want("2001:db8:5::1", "allow")
	s.want("2001:db8:6::1", "ban by c")
	table := s.store.Compile()
	view := NewView(table, s.view)
	if h := view.Holders(table, netip.MustParseAddr("192.0.2.1"), s.now); h != nil {
		t.Errorf("an allowlisted address is held by %v", h)
	}
}

func TestViewsFilterAlone(t *testing.T) {
	s := begin(t)
	s.pull(true, []*Row{row(1, "192.0.2.1", "ban", "CAPI", "1h"), row(2, "192.0.2.1", "captcha", "crowdsec", "1h")})
	s.want("192.0.2.1", "ban by CAPI")
	s.view.Accept = func(c Class) bool { return c.Origin != "CAPI" }
	s.want("192.0.2.1", "captcha by crowdsec")
	s.view.Accept = func(c Class) bool { return false }
	s.want("192.0.2.1", "allow")
}

func TestHoldersAreStrongestFirst(t *testing.T) {
	s := begin(t)
	s.pull(true, []*Row{
		row(1, "192.0.2.0/24", "captcha", "range", "9h"),
		row(2, "192.0.2.1", "throttle", "weak", "9h"),
		row(3, "192.0.2.1", "ban", "short", "1h"),
		row(4, "0.0.0.0/0", "ban", "long", "2h"),
	})
	s.pull(false, []*Row{row(5, "192.0.2.0/30", "ban", "new", "90m")}, 2)
	table := s.store.Compile()
	view := NewView(table, s.view)
	got := ""
	for _, v := range view.Holders(table, netip.MustParseAddr("192.0.2.1"), s.now) {
		got += v.Origin + " " + v.Prefix.String() + " " + v.Until.Sub(epoch).String() + "; "
	}
	want := "long 0.0.0.0/0 2h0m0s; new 192.0.2.0/30 1h30m0s; short 192.0.2.1/32 1h0m0s; range 192.0.2.0/24 9h0m0s; "
	if got != want {
		t.Errorf("holders:\n got %s\nwant %s", got, want)
	}
}

func TestBadRowsAreCountedAndCostNothing(t *testing.T) {
	s := NewStore()
	d := s.NewDelta(false, epoch)
	add := func(id int, scope, value, typ, duration string) {
		d.Add(&Row{ID: id, Scope: scope, Value: value, Type: typ, Duration: duration})
	}
	add(1, "Ip", "192.0.2.1", "ban", "1h")
	add(2, "Ip", "banana", "ban", "1h")
	add(3, "Ip", "fe80::1%eth0", "ban", "1h")
	add(4, "Range", "192.0.2.0/33", "ban", "1h")
	add(5, "Range", "2001:db8::/-1", "ban", "1h")
	add(6, "Ip", "192.0.2.2", "ban", "-5m")
	add(7, "Ip", "192.0.2.2", "ban", "0s")
	add(8, "Ip", "192.0.2.2", "ban", "soon")
	add(9, "Ip", "192.0.2.2", "ban", "99999999999h")
	add(10, "Username", "alice", "ban", "1h")
	add(-1, "Ip", "192.0.2.2", "ban", "1h")
	add(1<<40, "Ip", "192.0.2.2", "ban", "1h")
	add(11, "Ip", "192.0.2.2", "", "1h")
	add(12, "rAnGe", "192.0.2.9/31", "BAN", "2540400h10m10.000000000s")
	for reason, want := range map[string]int{SkipValue: 2, SkipPrefix: 2, SkipDuration: 4, SkipScope: 1, SkipID: 2, SkipType: 1} {
		if d.Skipped[reason] != want {
			t.Errorf("skipped for %s: %d, want %d", reason, d.Skipped[reason], want)
		}
	}
	s.Apply(d, epoch)
	table := s.Compile()
	view := NewView(table, Policy{})
	for addr, want := range map[string]Remediation{"192.0.2.1": Ban, "192.0.2.2": Allow, "192.0.2.8": Ban} {
		if got := view.Lookup(table, netip.MustParseAddr(addr), epoch).Remediation; got != want {
			t.Errorf("%s: %s, want %s", addr, got.Name(), want.Name())
		}
	}
	if got := view.Lookup(table, netip.MustParseAddr("192.0.2.8"), epoch.AddDate(230, 0, 0)).Remediation; got != Ban {
		t.Errorf("a ban longer than the clock reaches ended early")
	}
}

func TestCountriesAndSystemsAreKept(t *testing.T) {
	s := begin(t)
	cc := &Row{ID: 7, Scope: "Country", Value: "XX", Type: "ban", Origin: "a", Duration: "1h"}
	as := &Row{ID: 8, Scope: "AS", Value: "64496", Type: "captcha", Origin: "a", Duration: "2h"}
	s.pull(true, []*Row{cc, as})
	if got := s.store.Scoped(s.now); len(got) != 2 || got[0].Value != "XX" || got[0].Scope != "country" || got[1].Class.Remediation != Captcha {
		t.Errorf("scoped = %+v", got)
	}
	s.wait(time.Hour)
	if got := s.store.Scoped(s.now); len(got) != 1 || got[0].ID != 8 {
		t.Errorf("after an hour: %+v", got)
	}
	s.pull(false, nil, 8)
	if got := s.store.Scoped(s.now); len(got) != 0 {
		t.Errorf("after the deletion: %+v", got)
	}
}

// many returns n bans.
func many(n int) []*Row {
	var rows []*Row
	for i := 0; i < n; i++ {
		rows = append(rows, row(i+1, netip.AddrFrom4([4]byte{10, 0, byte((i + 1) >> 8), byte(i + 1)}).String(), "ban", "lists", "24h"))
	}
	return rows
}

// TestWhatFullPullsLack: each story is a list of full pulls, after a first one of
// all rows; a doubtful pull deletes nothing.
func TestWhatFullPullsLack(t *testing.T) {
	all := many(1000)
	few := []*Row{row(5000, "192.0.2.1", "ban", "new", "24h")}
	for _, c := range []struct {
		name  string
		first []*Row
		pulls [][]*Row
		doubt []bool
		held  bool // 10.0.0.1 and the last of first, after all pulls
	}{
		{"nothing is missing", all, [][]*Row{append(few, all...)}, []bool{false}, true},
		{"one is missing, twice", all, [][]*Row{all[1:], all[1:]}, []bool{true, false}, false},
		{"one is missing, once", all, [][]*Row{all[1:], all}, []bool{true, false}, true},
		{"one after the other is missing", all, [][]*Row{all[1:], all[:999], all[1:]}, []bool{true, true, true}, true},
		{"most are missing, twice", all, [][]*Row{few, few}, []bool{true, true}, true},
		{"most are missing, three times", all, [][]*Row{few, few, few}, []bool{true, true, false}, false},
		{"all are missing, with a good pull between", all, [][]*Row{nil, nil, all, nil, nil}, []bool{true, true, false, true, true}, true},
		{"a small list ends", all[:1], [][]*Row{nil, nil, nil}, []bool{true, true, false}, false},
		{"a small list is missing once", all[:2], [][]*Row{nil}, []bool{true}, true},
	} {
		s := begin(t)
		s.pull(true, c.first)
		for i, rows := range c.pulls {
			if out := s.pull(true, rows); out.Doubt != c.doubt[i] {
				t.Errorf("%s: pull %d: %+v", c.name, i, out)
			}
		}
		if c.held {
			s.want("10.0.0.1", "ban by lists")
			s.want(c.first[len(c.first)-1].Value, "ban by lists")
		} else {
			s.want("10.0.0.1", "allow")
		}
		if t.Failed() {
			t.Fatal(c.name)
		}
	}

	// What is new counts at once, however doubtful the pull.
	s := begin(t)
	s.pull(true, all)
	s.pull(true, few)
	s.want("192.0.2.1", "ban by new")

	// What has expired, or been deleted by a delta, is not missed.
	s = begin(t)
	s.pull(true, append(few, all...))
	s.pull(false, nil, 5000)
	if out := s.pull(true, all); out.Doubt {
		t.Errorf("a deleted decision was missed: %+v", out)
	}
	s.wait(24 * time.Hour)
	if out := s.pull(true, nil); out.Doubt {
		t.Errorf("expired decisions were missed: %+v", out)
	}
}

func TestAFullPullThatMakesNoSense(t *testing.T) {
	for name, spoil := range map[string]func(d *Delta, r Row){
		"durations":    func(d *Delta, r Row) { r.Duration = "PT1H"; d.Add(&r) },
		"values":       func(d *Delta, r Row) { r.Value = "?"; d.Add(&r) },
		"prefixes":     func(d *Delta, r Row) { r.Value += "/99"; d.Add(&r) },
		"types":        func(d *Delta, r Row) { r.Type = ""; d.Add(&r) },
		"no durations": func(d *Delta, r Row) { r.Duration = ""; d.Add(&r) },
	} {
		s := begin(t)
		rows := append(many(3), row(4, "2001:db8::1", "ban", "six", "24h"))
		s.pull(true, rows[:2])
		s.pull(false, rows[2:])
		for i := 0; i < 5; i++ {
			d := s.store.NewDelta(true, s.now)
			for _, r := range rows {
				spoil(d, *r)
			}
			s.store.Apply(d, s.now)
			s.want("10.0.0.1", "ban by lists")
			s.want("10.0.0.2", "ban by lists")
			s.want("2001:db8::1", "ban by six")
		}
		s.wait(24 * time.Hour)
		s.want("10.0.0.1", "allow")
		if t.Failed() {
			t.Fatal(name)
		}
	}
	// Rows that cannot even be told apart need three pulls.
	s := begin(t)
	s.pull(true, many(3))
	for i := 0; i < 3; i++ {
		s.want("10.0.0.3", "ban by lists")
		d := s.store.NewDelta(true, s.now)
		for _, r := range many(2) {
			d.Add(r)
		}
		d.Unreadable()
		if out := s.store.Apply(d, s.now); out.Doubt != (i < 2) {
			t.Errorf("pull %d: %+v", i, out)
		}
	}
	s.want("10.0.0.3", "allow")
}

func TestResume(t *testing.T) {
	s := begin(t)
	s.pull(true, many(50))
	s.pull(false, []*Row{row(60, "192.0.2.1", "captcha", "recent", "2h"), row(61, "2001:db8::1", "ban", "recent", "2h")}, 1)
	r := &story{t: t, store: Resume(s.store.Compile()), now: s.now, view: s.view}
	r.want("10.0.0.1", "allow")
	r.want("10.0.0.2", "ban by lists")
	r.want("192.0.2.1", "captcha by recent")
	r.pull(false, []*Row{row(62, "192.0.2.2", "ban", "later", "2h")}, 60, 2)
	r.want("192.0.2.1", "allow")
	r.want("192.0.2.2", "ban by later")
	r.want("10.0.0.2", "allow")
	r.want("2001:db8::1", "ban by recent")
	s.want("192.0.2.1", "captcha by recent")
	s.want("192.0.2.2", "allow")
	if out := r.pull(true, nil); !out.Doubt {
		t.Error("a resumed store believes anything")
	}
}

func TestApplyTwiceChangesNothing(t *testing.T) {
	s := begin(t)
	rows := []*Row{row(1, "192.0.2.1", "ban", "a", "1h"), row(2, "192.0.2.0/24", "captcha", "b", "1h")}
	s.pull(true, rows)
	before := s.store.Compile()
	s.pull(false, rows)
	s.pull(false, rows, 99)
	after := s.store.Compile()
	if after.Len() != before.Len() || after.recent != nil || len(after.gone) != 0 {
		t.Errorf("the same rows again made %d decisions of %d", after.Len(), before.Len())
	}
	s.pull(false, []*Row{row(3, "192.0.2.3", "ban", "c", "1h")})
	s.pull(false, []*Row{row(3, "192.0.2.3", "ban", "c", "1h")})
	if got := s.store.Compile().Len(); got != 3 {
		t.Errorf("Len = %d, want 3", got)
	}
	if before.Len() != 2 {
		t.Errorf("an old table changed: Len = %d", before.Len())
	}
}

func TestRanges(t *testing.T) {
	var ps []netip.Prefix
	for _, s := range []string{"10.0.0.0/8", "10.1.0.0/16", "11.0.0.0/8", "255.255.255.255/32", "0.0.0.0/32", "2001:db8::/32", "2001:db9::/32", "2001:db8:1::/48", "ffff::/16", "192.0.2.77/24"} {
		ps = append(ps, netip.MustParsePrefix(s))
	}
	r := NewRanges(ps)
	for s, want := range map[string]bool{
		"10.0.0.0": true, "10.1.2.3": true, "11.255.255.255": true, "12.0.0.0": false, "9.255.255.255": false, "255.255.255.255": true,
		"255.255.255.254": false, "0.0.0.0": true, "0.0.0.1": false, "192.0.2.1": true, "192.0.3.1": false,
		"2001:db8::": true, "2001:db9:ffff::1": true, "2001:dba::": false, "2001:db7:ffff::": false, "ffff::1": true, "fffe:ffff::": false, "::": false,
		"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff": true,
	} {
		if got := Contains(r, netip.MustParseAddr(s).AsSlice()); got != want {
			t.Errorf("Contains(%s) = %v", s, got)
		}
	}
	if len(r.four) != 8 || len(r.six) != 4 {
		t.Errorf("not merged: %v, %d IPv6 bounds", r.four, len(r.six))
	}
	if Contains(nil, ps[0].Addr().AsSlice()) || Contains(NewRanges(nil), ps[0].Addr().AsSlice()) || Contains(r, netip.Addr{}.AsSlice()) {
		t.Error("an empty set or an invalid address is contained")
	}
	all := NewRanges([]netip.Prefix{netip.MustParsePrefix("::/0"), netip.MustParsePrefix("0.0.0.0/0")})
	for _, s := range []string{"::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "0.0.0.0", "255.255.255.255"} {
		if !Contains(all, netip.MustParseAddr(s).AsSlice()) {
			t.Errorf("%s is not in everything", s)
		}
	}
}

package bouncer

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/edgeward/edgeward/internal/lapi"
)

func TestParseList(t *testing.T) {
	for name, c := range map[string]struct {
		text       string
		want       []string
		lines      int
		unreadable []string
	}{
		"nothing":             {text: ""},
		"comments":            {text: "# a list\n\n  ; of nothing\n\t\n", lines: 2},
		"addresses, ranges":   {text: "203.0.113.9\n198.51.100.0/24\n2001:db8::9\n2001:db8:1::/48\n", want: []string{"198.51.100.0/24", "203.0.113.9/32", "2001:db8::9/128", "2001:db8:1::/48"}, lines: 4},
		"comments at the end": {text: "203.0.113.9 # one\n198.51.100.0/24;SBL1\n", want: []string{"198.51.100.0/24", "203.0.113.9/32"}, lines: 2},
		"no end of line":      {text: "203.0.113.9", want: []string{"203.0.113.9/32"}, lines: 1},
		"CRLF and BOM":        {text: "\ufeff203.0.113.9\r\n\r\n203.0.113.8\r\n", want: []string{"203.0.113.8/32", "203.0.113.9/32"}, lines: 2},
		"IPv4 in IPv6":        {text: "::ffff:203.0.113.9\n::ffff:198.51.100.0/120\n", want: []string{"198.51.100.0/24", "203.0.113.9/32"}, lines: 2},
		"host bits, twice":    {text: " 198.51.100.7/24\n198.51.100.0/24 \n", want: []string{"198.51.100.0/24"}, lines: 2},
		"a neighbour's fault": {text: "203.0.113.9\n203.0.113\nx y\n0.0.0.0/0\n203.0.113.8/33\n203.0.113.8\n", want: []string{"203.0.113.8/32", "203.0.113.9/32"}, lines: 6,
			unreadable: []string{`line 2: "203.0.113": neither an address nor a range`, `line 3: neither an address nor a range`,
				`line 4: "0.0.0.0/0": wider than /8`, `line 5: "203.0.113.8/33": neither an address nor a range`}},
		"a long line": {text: "203.0.113.9\n" + strings.Repeat("1", 10_000) + "\n203.0.113.8 # " + strings.Repeat("why", 10_000) + "\n203.0.113.7",
			want: []string{"203.0.113.7/32", "203.0.113.8/32", "203.0.113.9/32"}, lines: 4,
			unreadable: []string{`line 2: the line is too long`}},
		"a secret, not repeated": {text: "0123456789abcdef0123456789abcdef\nroot:$6$salt:19000\n2001:db8::/9x\n1.2.3.4.5\n", lines: 4,
			unreadable: []string{`line 1: neither an address nor a range`, `line 2: neither an address nor a range`,
				`line 3: neither an address nor a range`, `line 4: "1.2.3.4.5": neither an address nor a range`}},
		"NUL":     {text: "\x00\n203.0.113.9\n", want: []string{"203.0.113.9/32"}, lines: 2, unreadable: []string{`line 1: neither an address nor a range`}},
		"no page": {text: "<html>404</html>\n", lines: 1, unreadable: []string{`line 1: neither an address nor a range`}},
	} {
		got, err := parseList(strings.NewReader(c.text))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var entries []string
		for i := range got.entries.len() {
			p := got.entries.at(i)
			entries = append(entries, p.String())
			if j, ok := got.entries.find(p); !ok || j != i {
				t.Errorf("%s: %v is number %d, found as %d", name, p, i, j)
			}
		}
		if d := cmp.Diff(c.want, entries); d != "" {
			t.Errorf("%s: %s", name, d)
		}
		if d := cmp.Diff(c.unreadable, got.shown); d != "" || got.unreadable != len(c.unreadable) || got.lines != c.lines {
			t.Errorf("%s: %d lines, %d unreadable, %s", name, got.lines, got.unreadable, d)
		}
	}
}

// FuzzParseList: whatever a file holds, what is read is canonical and no wider
// than a list may say, and reading what was read gives the same.
func FuzzParseList(f *testing.F) {
	f.Add([]byte("203.0.113.9\n::1/128 # x\r\n\ufeff;\n1/8"))
	f.Fuzz(func(t *testing.T, text []byte) {
		got, err := parseList(bytes.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		var again strings.Builder
		for i := range got.entries.len() {
			p := got.entries.at(i)
			if p != p.Masked() || p.Addr().Is4In6() || p.Bits() < widest {
				t.Fatalf("%v", p)
			}
			fmt.Fprintln(&again, p)
		}
		second, err := parseList(strings.NewReader(again.String()))
		if err != nil || second.unreadable > 0 {
			t.Fatal(err, second.shown)
		}
		if d := cmp.Diff(got.entries, second.entries, cmp.AllowUnexported(addresses{})); d != "" {
			t.Fatal(d)
		}
	})
}

// shelf is a node whose decisions come from a file, with or without LAPI.
type shelf struct {
	*node
	t    testing.TB
	path string
	log  bytes.Buffer
}

func newShelf(t testing.TB, dir string, withLAPI bool) *shelf {
	s := &shelf{t: t, path: filepath.Join(t.TempDir(), "list")}
	s.node = newNode(t, dir, func(c *Config) {
		if !withLAPI {
			c.LAPI.URL = ""
		}
		c.Lists = []ListConfig{{Name: "mine", Path: s.path, Remediation: "ban"}}
	})
	log := slog.New(slog.NewTextHandler(&s.log, nil))
	s.Bouncer.log, s.enforcer.log = log, log
	return s
}

// put writes the file and looks until it has come to rest.
func (s *shelf) put(lines ...string) {
	s.t.Helper()
	next := s.path + ".next"
	if err := os.WriteFile(next, []byte(strings.Join(lines, "\n")), 0o600); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Rename(next, s.path); err != nil {
		s.t.Fatal(err)
	}
	s.look()
}

func (s *shelf) look() {
	s.t.Helper()
	for range 2 {
		s.lookAt(s.lists[0])
		s.listsAreFed()
	}
	if _, err := s.turn(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
}

func (s *shelf) wants(what string, want map[string]bool) {
	s.t.Helper()
	for addr, drops := range want {
		if got := s.memory.drops(netip.MustParseAddr(addr)); got != drops {
			s.t.Errorf("%s: %s is dropped: %v", what, addr, got)
		}
	}
}

func many64(n int) []string {
	lines := []string{"# many"}
	for i := range n {
		lines = append(lines, netip.AddrFrom4([4]byte{20, byte(i >> 16), byte(i >> 8), byte(i)}).String())
	}
	return lines
}

// TestListsWithoutLAPI: a file alone is enough, and what it says counts as a
// decision of a blocklist does.
func TestListsWithoutLAPI(t *testing.T) {
	s := newShelf(t, "", false)
	s.look()
	if err := s.Ready(); err == nil || !strings.Contains(err.Error(), "the list mine was never read: stat ") {
		t.Errorf("ready without the file: %v", err)
	}
	s.put("203.0.113.9", "198.51.100.0/24 # range", "2001:db8::9", "10.0.0.9", "203.0.113.7", "nonsense")
	if err := s.Ready(); err != nil {
		t.Error(err)
	}
	// 10.0.0.9 is private, 203.0.113.7 the operator's.
	s.wants("the list", map[string]bool{"203.0.113.9": true, "198.51.100.77": true, "2001:db8::9": true, "10.0.0.9": false, "203.0.113.7": false})
	why, err := s.Why(netip.MustParseAddr("203.0.113.9"))
	if err != nil || why.Verdict != "drop" || !strings.Contains(why.Says, "for as long as a list names it") ||
		len(why.Decisions) != 1 || why.Decisions[0].Origin != "lists:mine" || !why.Decisions[0].Until.IsZero() || why.Kernel.Class != "ban/lists:mine" {
		t.Errorf("%+v %+v %v", why, why.Kernel, err)
	}
	status := s.Status()
	if len(status.Lists) != 1 || status.Lists[0].Entries != 5 || status.Lists[0].Unreadable != 1 || status.Lists[0].Error != "" || status.LAPI.Answering {
		t.Errorf("%+v", status.Lists)
	}
	if !strings.Contains(s.log.String(), `lines of a list cannot be used`) || !strings.Contains(s.log.String(), `line 6: neither an address nor a range`) ||
		!strings.Contains(s.log.String(), `level=INFO msg="a list names protected addresses`) {
		t.Error(s.log.String())
	}
	if why.Decisions[0].List != "mine" {
		t.Errorf("why names the list %q", why.Decisions[0].List)
	}
	writes := s.memory.installs + s.memory.updates
	s.look()
	if s.memory.installs+s.memory.updates != writes {
		t.Error("an unchanged file was written again")
	}
	s.put("203.0.113.9", "203.0.113.10", "2001:db8::9", "10.0.0.9", "203.0.113.7")
	s.wants("a changed list", map[string]bool{"203.0.113.9": true, "203.0.113.10": true, "198.51.100.77": false})
	if s.memory.installs+s.memory.updates != writes+1 || s.memory.written != 2 {
		t.Errorf("one more and one less took %d writes, the last one of %d", s.memory.installs+s.memory.updates-writes, s.memory.written)
	}
}

// TestListsBesideLAPI: full pulls leave lists alone, and lists leave LAPI's
// decisions alone, on the same address too.
func TestListsBesideLAPI(t *testing.T) {
	s := newShelf(t, "", true)
	s.put("203.0.113.9", "203.0.113.10")
	s.wants("before LAPI answered, on an empty kernel", map[string]bool{"203.0.113.9": true})
	if s.Ready() == nil {
		t.Error("ready before LAPI answered")
	}
	row := decided(1, "203.0.113.9", "ban", "crowdsec", "ssh")
	s.answer(true, row, decided(2, "203.0.113.66", "ban", "crowdsec", "ssh"))
	s.answer(true, row, decided(2, "203.0.113.66", "ban", "crowdsec", "ssh"))
	s.wants("after full pulls", map[string]bool{"203.0.113.9": true, "203.0.113.10": true, "203.0.113.66": true})
	if err := s.Ready(); err != nil {
		t.Error(err)
	}
	s.put("203.0.113.10")
	s.wants("after the list let go of it", map[string]bool{"203.0.113.9": true, "203.0.113.10": true})
	s.answer(false, lapi.Row{ID: 1})
	s.wants("after LAPI let go of it too", map[string]bool{"203.0.113.9": false, "203.0.113.10": true, "203.0.113.66": true})
}

// TestListsAloneReplaceNoPredecessor: what a predecessor enforces may hold
// LAPI's bans, which only LAPI can replace.
func TestListsAloneReplaceNoPredecessor(t *testing.T) {
	s := newShelf(t, "", true)
	s.memory.enforcing = true
	if err := s.enforcer.start(); err != nil {
		t.Fatal(err)
	}
	s.put("203.0.113.9")
	s.at = s.at.Add(time.Hour)
	s.look()
	if s.memory.installs != 0 {
		t.Fatal("a list replaced what a predecessor enforced")
	}
	s.answer(true, decided(1, "203.0.113.66", "ban", "crowdsec", "ssh"))
	s.wants("after LAPI answered", map[string]bool{"203.0.113.9": true, "203.0.113.66": true})
}

// TestBrokenListsKeepTheirContent: missing, emptied, cut, spoilt: what the list
// held stays, and the log says so once.
func TestBrokenListsKeepTheirContent(t *testing.T) {
	whole := many64(100)
	for _, c := range []struct {
		name    string
		break_  func(*shelf)
		says    string
		forever bool
	}{
		{"missing", func(s *shelf) { os.Remove(s.path) }, "no such file", true},
		{"a directory", func(s *shelf) { os.Remove(s.path); os.Mkdir(s.path, 0o700) }, "is not a file", true},
		{"empty", func(s *shelf) { s.put() }, "nothing in it can be read as an address, and it had 100", true},
		{"a page", func(s *shelf) { s.put("<html>", "</html>") }, "nothing in it can be read as an address, and it had 100", true},
		{"cut", func(s *shelf) { s.put(whole[:41]...) }, "it has 40 entries and had 100", false},
		{"a comment alone", func(s *shelf) { s.put("# none") }, "it has 0 entries and had 100", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newShelf(t, "", false)
			s.put(whole...)
			c.break_(s)
			s.look()
			s.look()
			s.wants(c.name, map[string]bool{"20.0.0.0": true, "20.0.0.99": true})
			if n := strings.Count(s.log.String(), "keeping what it held"); n != 1 || !strings.Contains(s.log.String(), c.says) {
				t.Errorf("said %d times:\n%s", n, s.log.String())
			}
			if err := s.Ready(); err != nil || !strings.Contains(s.Status().Lists[0].Error, c.says) {
				t.Errorf("%v, %+v", err, s.Status().Lists)
			}
			s.at = s.at.Add(listPatience)
			s.look()
			s.wants("much later", map[string]bool{"20.0.0.99": c.forever})
			os.RemoveAll(s.path)
			s.put(append(whole, "203.0.113.9")...)
			s.wants("mended", map[string]bool{"20.0.0.99": true, "203.0.113.9": true})
			if e := s.Status().Lists[0].Error; e != "" {
				t.Error(e)
			}
		})
	}
	s := newShelf(t, "", false)
	s.put("203.0.113.9", "203.0.113.10")
	s.put("# nobody any more")
	s.wants("a list of one's own", map[string]bool{"203.0.113.9": false, "203.0.113.10": false})
}

// TestListsAreReadWhenTheyRest: a file that is being written is left alone.
func TestListsAreReadWhenTheyRest(t *testing.T) {
	s := newShelf(t, "", false)
	s.put("203.0.113.9")
	l := s.lists[0]
	for i := range 3 {
		if err := os.WriteFile(s.path, []byte(strings.Repeat("203.0.113.10\n", i+1)), 0o600); err != nil {
			t.Fatal(err)
		}
		s.lookAt(l)
		s.wants("while it is written", map[string]bool{"203.0.113.9": true, "203.0.113.10": false})
	}
	s.lookAt(l)
	s.wants("at rest", map[string]bool{"203.0.113.9": false, "203.0.113.10": true})
	// A ConfigMap is a link to a link, and changes by the one in the middle.
	dir := t.TempDir()
	for i, text := range []string{"203.0.113.11", "203.0.113.12"} {
		data := filepath.Join(dir, fmt.Sprintf("..%d", i))
		if err := os.Mkdir(data, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(data, "list"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		os.Remove(filepath.Join(dir, "..data"))
		if err := os.Symlink(data, filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
		l.config.Path = filepath.Join(dir, "..data", "list")
		s.look()
		s.wants("a ConfigMap", map[string]bool{text: true})
	}
}

// TestKernelHoldsListsOnLease: what has no end is held for a day at a time, and
// for ever while the agent lives.
func TestKernelHoldsListsOnLease(t *testing.T) {
	s := newShelf(t, "", false)
	s.put("203.0.113.9", "198.51.100.0/24")
	both := map[string]bool{"203.0.113.9": true, "198.51.100.1": true}
	installs := s.memory.installs
	for range 96 {
		s.at = s.at.Add(time.Hour)
		s.look()
		s.wants("while the agent lives", both)
	}
	if n := s.memory.installs - installs; n < 7 || n > 8 {
		t.Errorf("%d renewals in 4 days", n)
	}
	s.at = s.at.Add(lease/2 - time.Hour)
	s.wants("half a day after the agent died", both)
	s.at = s.at.Add(lease)
	s.wants("a day and a half after the agent died", map[string]bool{"203.0.113.9": false, "198.51.100.1": false})
}

// TestListsSurviveARestart: the snapshot brings their content back where the
// file does not, and lists that are no longer configured go.
func TestListsSurviveARestart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	s := newShelf(t, dir, false)
	s.put("203.0.113.9", "203.0.113.10")
	s.save(true)
	os.Remove(s.path)
	s.memory.flush()
	s.boot(t)
	s.look()
	s.wants("after a boot without the file", map[string]bool{"203.0.113.9": true, "203.0.113.10": true})
	if err := s.Ready(); err != nil {
		t.Error(err)
	}
	s.put("203.0.113.10", "203.0.113.11")
	s.wants("with the file again", map[string]bool{"203.0.113.9": false, "203.0.113.10": true, "203.0.113.11": true})
	s.at = s.at.Add(12 * time.Hour)
	s.wants("half a day after the agent died", map[string]bool{"203.0.113.10": true, "203.0.113.11": true})
	s.at = s.at.Add(12 * time.Hour)
	s.wants("a day after the agent died", map[string]bool{"203.0.113.10": false, "203.0.113.11": false})
	s.look()
	if n := s.enforcer.reading.Load().table.Len(); n != 2 {
		t.Errorf("%d decisions, want 2", n)
	}
	s.save(true)
	s.config.Lists = []ListConfig{{Name: "other", Path: s.path, Remediation: "ban"}}
	s.put("203.0.113.12")
	s.boot(t)
	s.at = s.at.Add(time.Hour)
	s.look()
	s.wants("under another name", map[string]bool{"203.0.113.9": false, "203.0.113.11": false, "203.0.113.12": true})
}

// BenchmarkChangedList is a list of 100,000 of which a hundredth changes, all but
// the reading of the file: what the store, the table and a kernel in memory cost.
func BenchmarkChangedList(b *testing.B) {
	s := newShelf(b, "", false)
	s.put(many64(100_000)...)
	texts := [2]*addresses{}
	for i := range texts {
		lines := many64(99_000)
		for j := range 1000 {
			lines = append(lines, netip.AddrFrom4([4]byte{21, byte(i), byte(j >> 8), byte(j)}).String())
		}
		text, err := parseList(strings.NewReader(strings.Join(lines, "\n")))
		if err != nil {
			b.Fatal(err)
		}
		texts[i] = &text.entries
	}
	i := 0
	for b.Loop() {
		if added, removed, err := s.takeList(s.lists[0], texts[i%2]); err != nil || added != 1000 || removed != 1000 {
			b.Fatal(added, removed, err)
		}
		i++
	}
}

func BenchmarkParseList(b *testing.B) {
	text := strings.Join(many64(100_000), "\n")
	for b.Loop() {
		if _, err := parseList(strings.NewReader(text)); err != nil {
			b.Fatal(err)
		}
	}
}

// TestPredecessorGivesWayToAllAtOnce: LAPI's first answer replaces what a
// predecessor enforces, and the lists are in it, however quick LAPI is.
func TestPredecessorGivesWayToAllAtOnce(t *testing.T) {
	s := newShelf(t, "", true)
	s.looked, s.lookedAt = make(chan struct{}), sync.Once{}
	s.memory.enforcing = true
	if err := os.WriteFile(s.path, []byte("203.0.113.9\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		s.answer(true, decided(1, "203.0.113.66", "ban", "crowdsec", "ssh"))
	}()
	time.Sleep(20 * time.Millisecond) // enough for an answer that did not wait
	if s.memory.installs != 0 {
		t.Error("LAPI's answer was installed before the list was looked at")
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); s.followLists(ctx) }()
	<-answered
	cancel()
	<-done
	s.wants("after the first answer", map[string]bool{"203.0.113.9": true, "203.0.113.66": true})
	if s.memory.installs != 1 {
		t.Errorf("%d installs", s.memory.installs)
	}
}

// TestListsAndLAPIAtOnce: answers come in row by row, and lists change between
// the rows.
func TestListsAndLAPIAtOnce(t *testing.T) {
	s := newShelf(t, "", true)
	s.put("203.0.113.9")
	ban := decided(1, "203.0.113.66", "ban", "crowdsec", "ssh")
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 100 {
			other := decided(2+i, netip.AddrFrom4([4]byte{20, 0, 0, byte(i)}).String(), "ban", "crowdsec", fmt.Sprintf("s%d", i))
			s.answer(i%10 == 0, ban, other)
		}
	}()
	var sets [2]addresses
	for i := range sets {
		for j := range 40 {
			sets[i].add(netip.PrefixFrom(netip.AddrFrom4([4]byte{21, 0, byte(i * j), byte(j)}), 32))
		}
		sets[i].order()
	}
	for i := range 100 {
		if _, _, err := s.takeList(s.lists[0], &sets[i%2]); err != nil {
			t.Fatal(err)
		}
	}
	<-done
	s.answer(true, ban)
	s.wants("at the end", map[string]bool{"203.0.113.66": true, "203.0.113.9": false, "21.0.39.39": true, "21.0.0.39": false})
	for _, c := range s.Status().Decisions {
		if c.Origin == "lists:mine" && c.Count != 40 {
			t.Errorf("%d of the list, want 40", c.Count)
		}
	}
}

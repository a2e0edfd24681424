package bouncer

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/edgeward/edgeward/internal/config"
	"github.com/edgeward/edgeward/internal/decision"
)

// ListConfig names a file of addresses and ranges, one a line, that count as
// decisions of the origin lists:NAME for as long as the file names them.
type ListConfig struct {
	Name string `yaml:"name"`
	// Path is read again when the file behind it changes.
	Path string `yaml:"path"`
	// Remediation is what the entries ask for; ban unless given.
	Remediation Remediation `yaml:"remediation"`
}

var listName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

// checkLists reports what is wrong with the lists, and fills in what is not given.
func (c *Config) checkLists(check *config.Check) {
	c.Lists = slices.Clone(c.Lists) // the file's own, to be changed
	known := map[string]bool{}
	for i := range c.Lists {
		l := &c.Lists[i]
		key := fmt.Sprintf("lists[%d].", i)
		switch {
		case !listName.MatchString(l.Name):
			check.Fail(key+"name", "%q: want letters, digits, dots, dashes and underscores, at most 63", l.Name)
		case known[l.Name]:
			check.Fail(key+"name", "%q: another list has this name", l.Name)
		}
		known[l.Name] = true
		if !filepath.IsAbs(l.Path) {
			check.Fail(key+"path", "%q: want the absolute path of a file", l.Path)
		}
		if l.Remediation == "" {
			l.Remediation = "ban"
		}
	}
}

// hasLAPI reports whether decisions come from a LAPI too: without one, lists are
// all there is.
func (c *Config) hasLAPI() bool { return c.LAPI.URL != "" }

// How files are looked at, and how far they are believed. A file that changes is
// read once it has stayed the same from one look to the next: who writes to it
// may not be done. One that lost most of its entries looks like a download that
// was cut, and has to stay that way for a while before it counts.
const (
	lookInterval = 2 * time.Second
	listPatience = 10 * time.Minute
	fewEntries   = 16      // may vanish at once: somebody edits a list of their own
	mostEntries  = 5 << 20 // more are refused
	mostText     = 1 << 30 // bytes of a file
	longestLine  = 4 << 10 // bytes of a line
	widest       = 8       // bits of the widest range that a list may name
	linesShown   = 5       // of those that cannot be read
	shownText    = 60      // bytes of each
)

// list is one file and what is known of it. Only followLists touches it, but for
// state, which Bouncer.mu guards.
type list struct {
	config ListConfig
	class  decision.Class
	seen   stamp     // of the file at the last look
	taken  stamp     // of the file as it was read last, whatever came of it
	doubt  time.Time // when an implausible file was first seen, zero: none is
	looked bool      // at the file, by this process
	known  bool
	state  List
}

// List is how a list stands.
type List struct {
	Name        string      `json:"name"`
	Path        string      `json:"path"`
	Remediation Remediation `json:"remediation"`
	Entries     int         `json:"entries"`
	Unreadable  int         `json:"unreadable"`    // lines, when it was last read
	Read        time.Time   `json:"read,omitzero"` // by this process
	// Error says why the file as it is cannot be used: then it counts as it was.
	Error string `json:"error,omitempty"`
}

// stamp tells one state of a file from another, symbolic links followed.
type stamp struct {
	device, inode    uint64
	size             int64
	modified, status int64
}

func stampOf(info os.FileInfo) stamp {
	s := stamp{size: info.Size(), modified: info.ModTime().UnixNano()}
	if sys, ok := info.Sys().(*syscall.Stat_t); ok {
		s.device, s.inode, s.status = sys.Dev, sys.Ino, sys.Ctim.Nano()
	}
	return s
}

// TryLists reads each list once, and changes nothing.
func (c *Config) TryLists() []List {
	var out []List
	for _, l := range c.Lists {
		state := List{Name: l.Name, Path: l.Path, Remediation: l.Remediation}
		info, err := os.Stat(l.Path)
		if err == nil {
			var text *listText
			if text, err = readList(l.Path, stampOf(info)); err == nil {
				state.Entries, state.Unreadable = text.entries.len(), text.unreadable
			}
		}
		if err != nil {
			state.Error = err.Error()
		}
		out = append(out, state)
	}
	return out
}

// openLists makes the lists of the configuration, with what the snapshot brought
// of them, and lets go of what it brought of others.
func (b *Bouncer) openLists() {
	b.local = decision.FirstLocal
	for _, c := range b.config.Lists {
		class := decision.Class{Type: string(c.Remediation), Origin: "lists", Scenario: c.Name}
		b.lists = append(b.lists, &list{config: c, class: class, state: List{Name: c.Name, Path: c.Path, Remediation: c.Remediation}})
	}
	table := b.store.Compile()
	d := b.store.NewDelta(false, b.began)
	table.Each(b.began, func(id int, _ netip.Prefix, _ time.Time, c decision.Class) bool {
		if id < decision.FirstLocal {
			return true
		}
		b.local = max(b.local, id+1)
		for _, l := range b.lists {
			if l.is(c) {
				l.known = true
				l.state.Entries++
				return true
			}
		}
		if c.Origin == "lists" {
			d.Release(id)
		}
		return true
	})
	if d.Deleted() > 0 {
		b.store.Apply(d, b.began)
		b.enforcer.reading.Store(b.enforcer.read(b.enforcer.reading.Load(), b.store.Compile()))
	}
}

// is reports whether decisions of a class are the list's.
func (l *list) is(c decision.Class) bool {
	return c.Scenario == l.class.Scenario && c.Type == l.class.Type && c.Origin == l.class.Origin
}

// followLists reads the lists, and reads them again when they change, until ctx
// ends.
func (b *Bouncer) followLists(ctx context.Context) {
	defer b.seenLists()
	if len(b.lists) == 0 {
		return
	}
	look := time.NewTicker(lookInterval)
	defer look.Stop()
	for ctx.Err() == nil {
		for _, l := range b.lists {
			b.lookAt(l)
		}
		b.listsAreFed()
		b.seenLists()
		select {
		case <-ctx.Done():
		case <-look.C:
		}
	}
}

// seenLists lets LAPI's answers in.
func (b *Bouncer) seenLists() { b.lookedAt.Do(func() { close(b.looked) }) }

// listsAreFed makes the lists enough to enforce where there is no LAPI and all of
// them are known.
func (b *Bouncer) listsAreFed() {
	if b.config.hasLAPI() || b.listsFed || b.listsKnown() != nil {
		return
	}
	b.listsFed = true
	b.feeding.Lock()
	defer b.feeding.Unlock()
	if err := b.enforcer.follow(b.store.Compile(), nil, true); err != nil {
		b.log.Warn("cannot bring decisions into the kernel, which goes on with the last ones", "err", err)
		b.loop.Trigger()
	}
}

// listsKnown returns nil if the content of each list is known, or why not.
func (b *Bouncer) listsKnown() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, l := range b.lists {
		switch {
		case l.known:
		case l.state.Error != "":
			return fmt.Errorf("the list %s was never read: %s", l.config.Name, l.state.Error)
		default:
			return fmt.Errorf("the list %s is not read yet", l.config.Name)
		}
	}
	return nil
}

func (b *Bouncer) listStatus() []List {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []List
	for _, l := range b.lists {
		out = append(out, l.state)
	}
	return out
}

// lookAt reads a list if its file has changed and come to rest.
func (b *Bouncer) lookAt(l *list) {
	info, err := os.Stat(l.config.Path)
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a file", l.config.Path)
	}
	if err != nil {
		l.seen, l.taken, l.doubt = stamp{}, stamp{}, time.Time{}
		b.listFails(l, err)
		return
	}
	now := b.now()
	is := stampOf(info)
	waited := !l.doubt.IsZero() && now.Sub(l.doubt) >= listPatience
	// What is known so far may be an old snapshot: the first look does not wait.
	rested := is == l.seen || !l.known || !l.looked
	l.seen, l.looked = is, true
	if !rested {
		l.doubt = time.Time{} // another file
		return
	}
	if is == l.taken && !waited {
		return
	}
	start := time.Now()
	text, err := readList(l.config.Path, is)
	if errors.Is(err, errUnrest) {
		return
	}
	l.taken = is
	if err != nil {
		if path := (*os.PathError)(nil); errors.As(err, &path) {
			l.taken = stamp{} // it may go away by itself: try again
		}
		l.doubt = time.Time{}
		b.listFails(l, err)
		return
	}
	switch had, have := l.state.Entries, text.entries.len(); {
	case l.known && have == 0 && had > 0 && (text.lines == 0 || text.unreadable > 0):
		l.doubt = time.Time{}
		b.listFails(l, fmt.Errorf("nothing in it can be read as an address, and it had %d; to empty the list, leave a comment in the file", had))
		return
	case !l.known && have == 0 && text.unreadable > 0:
		b.listFails(l, fmt.Errorf("none of its %d lines is an address or a range", text.unreadable))
		return
	case l.known && !waited && have < had/2 && had-have > fewEntries:
		if l.doubt.IsZero() {
			l.doubt = now
		}
		b.listFails(l, fmt.Errorf("it has %d entries and had %d, which looks like a file that was cut: it counts if it stays so for %v", have, had, listPatience))
		return
	}
	l.doubt = time.Time{}
	added, removed, err := b.takeList(l, &text.entries)
	if err != nil {
		b.log.Warn("cannot bring decisions into the kernel, which goes on with the last ones", "err", err)
		b.loop.Trigger()
	}
	b.mu.Lock()
	l.known = true
	l.state.Entries, l.state.Unreadable, l.state.Read, l.state.Error = text.entries.len(), text.unreadable, now, ""
	if added+removed > 0 {
		b.feed.changes++
	}
	b.mu.Unlock()
	b.log.Info("list read", "list", l.config.Name, "file", l.config.Path, "entries", text.entries.len(), "added", added, "removed", removed,
		"took", time.Since(start).Round(time.Microsecond).String())
	if text.unreadable > 0 {
		b.log.Warn("lines of a list cannot be used", "list", l.config.Name, "file", l.config.Path,
			"count", text.unreadable, "first", text.shown)
	}
}

// listFails notes that a list cannot be used as it is, and says so once.
func (b *Bouncer) listFails(l *list, err error) {
	b.mu.Lock()
	again := l.state.Error == err.Error()
	l.state.Error = err.Error()
	b.mu.Unlock()
	if !again {
		b.log.Warn("cannot use a list as it is, keeping what it held", "list", l.config.Name, "file", l.config.Path, "err", err)
	}
}

// takeList makes the entries the decisions of a list. It costs a look at each of
// them, and a change for each that differs.
func (b *Bouncer) takeList(l *list, entries *addresses) (added, removed int, err error) {
	b.feeding.Lock()
	defer b.feeding.Unlock()
	now := b.now()
	d := b.store.NewDelta(false, now)
	held := make([]bool, entries.len())
	b.store.Compile().Each(now, func(id int, p netip.Prefix, _ time.Time, c decision.Class) bool {
		if id < decision.FirstLocal || !l.is(c) {
			return true
		}
		if i, ok := entries.find(p); ok && !held[i] {
			held[i] = true
			return true
		}
		d.Release(id)
		removed++
		return true
	})
	for i, is := range held {
		if !is {
			d.Hold(b.local, entries.at(i), decision.Forever, l.class)
			b.local++
			added++
		}
	}
	if added+removed == 0 {
		return 0, 0, nil
	}
	var touched []netip.Prefix
	full := added+removed > many // then it is cheaper to compare everything
	if !full {
		touched = b.store.Touches(d)
	}
	b.store.Apply(d, now)
	err = b.enforcer.join(b.store.Compile(), touched, full)
	if b.store.Due() {
		// Folding holds everything twice. What came before it leaves as much
		// behind, and so does it: the memory is better the machine's.
		d, held, touched = nil, nil, nil
		debug.FreeOSMemory()
		b.store.Fold(now)
		b.enforcer.swap(b.store.Compile())
		debug.FreeOSMemory()
	}
	b.loop.Trigger() // for what join left to it, and to save
	return added, removed, err
}

// listText is what a file says.
type listText struct {
	entries    addresses
	lines      int // that are not blank
	unreadable int
	shown      []string // the first of those, with their numbers
}

// errUnrest means that a file changed while it was read.
var errUnrest = errors.New("the file changes")

func readList(path string, is stamp) (*listText, error) {
	// A pipe in the file's place must not make us wait.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	rests := func() error {
		info, err := f.Stat()
		if err == nil && stampOf(info) != is {
			err = errUnrest
		}
		return err
	}
	if err := rests(); err != nil {
		return nil, err
	}
	text, err := parseList(io.LimitReader(f, mostText+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return text, rests()
}

// parseList reads lines that each hold an address, a range or nothing, and
// perhaps a comment behind # or ;. A line that cannot be read is counted.
func parseList(from io.Reader) (*listText, error) {
	out := &listText{}
	r := bufio.NewReaderSize(from, longestLine)
	var size int64
	for number := 1; ; number++ {
		line, err := r.ReadSlice('\n')
		size += int64(len(line))
		long := false
		if errors.Is(err, bufio.ErrBufferFull) {
			long = true
			line = bytes.Clone(line) // of the buffer that the rest goes through
		}
		for errors.Is(err, bufio.ErrBufferFull) {
			var rest []byte
			rest, err = r.ReadSlice('\n')
			size += int64(len(rest))
		}
		if err != nil && err != io.EOF {
			return nil, err
		}
		if size > mostText {
			return nil, fmt.Errorf("it is larger than %d bytes", int64(mostText))
		}
		if number == 1 {
			line = bytes.TrimPrefix(line, []byte("\ufeff"))
		}
		out.line(number, line, long)
		if out.entries.len() > mostEntries {
			return nil, fmt.Errorf("it holds more than %d entries", mostEntries)
		}
		if err == io.EOF {
			out.entries.order()
			return out, nil
		}
	}
}

func (t *listText) line(number int, line []byte, long bool) {
	blank := len(bytes.TrimSpace(line)) == 0
	text := line
	if i := bytes.IndexAny(text, "#;"); i >= 0 {
		text, long = text[:i], false // the length is the comment's
	}
	text = bytes.TrimSpace(text)
	if !blank {
		t.lines++
	}
	if len(text) == 0 && !long {
		return
	}
	var problem string
	switch p, err := decision.ParsePrefix(string(text)); {
	case long:
		problem = "the line is too long"
	case err != nil:
		problem = "neither an address nor a range"
	case p.Bits() < widest:
		problem = fmt.Sprintf("wider than /%d", widest)
	default:
		t.entries.add(p)
		return
	}
	t.unreadable++
	if len(t.shown) < linesShown {
		shown := fmt.Sprintf("line %d: ", number)
		if looksHarmless(text) {
			shown += fmt.Sprintf("%q: ", text[:min(len(text), shownText)])
		}
		t.shown = append(t.shown, shown+problem)
	}
}

// looksHarmless reports whether text was meant as an address. Anything else is
// not repeated: a path that leads to a secret must not put it into the log.
func looksHarmless(text []byte) bool {
	for _, c := range text {
		if !strings.ContainsRune("0123456789ABCDEFabcdef.:/", rune(c)) {
			return false
		}
	}
	return bytes.ContainsAny(text, ".:/")
}

// addresses is a set of prefixes, 8 bytes each for IPv4 and 17 for IPv6. It can
// be searched once it is in order.
type addresses struct {
	four []uint64 // address<<6 | bits
	six  [][17]byte
}

func (a *addresses) len() int { return len(a.four) + len(a.six) }

func key4(p netip.Prefix) uint64 {
	b := p.Addr().As4()
	return uint64(binary.BigEndian.Uint32(b[:]))<<6 | uint64(p.Bits())
}

func key6(p netip.Prefix) (key [17]byte) {
	b := p.Addr().As16()
	copy(key[:], b[:])
	key[16] = byte(p.Bits())
	return key
}

func compare6(a, b [17]byte) int { return bytes.Compare(a[:], b[:]) }

func (a *addresses) add(p netip.Prefix) {
	if p.Addr().Is4() {
		a.four = append(a.four, key4(p))
	} else {
		a.six = append(a.six, key6(p))
	}
}

// order sorts, and lets go of repetitions.
func (a *addresses) order() {
	slices.Sort(a.four)
	a.four = slices.Compact(a.four)
	slices.SortFunc(a.six, compare6)
	a.six = slices.Compact(a.six)
}

// find returns the number of p, and whether it is in the set.
func (a *addresses) find(p netip.Prefix) (int, bool) {
	if p.Addr().Is4() {
		return slices.BinarySearch(a.four, key4(p))
	}
	i, ok := slices.BinarySearchFunc(a.six, key6(p), compare6)
	return len(a.four) + i, ok
}

// at returns the prefix with this number.
func (a *addresses) at(i int) netip.Prefix {
	if i < len(a.four) {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], uint32(a.four[i]>>6))
		return netip.PrefixFrom(netip.AddrFrom4(b), int(a.four[i]&63))
	}
	key := a.six[i-len(a.four)]
	return netip.PrefixFrom(netip.AddrFrom16([16]byte(key[:16])), int(key[16]))
}

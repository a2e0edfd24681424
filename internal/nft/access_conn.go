package nft

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// AccessConn is a lasting connection to the table of a VPN. Its methods may be
// called from several goroutines; they take turns.
type AccessConn struct {
	conn Conn

	live        *grants // what the kernel was told last; nil if nobody knows
	generation  uint32
	fingerprint uint64
	checked     uint32 // the kernel's count of changes, when it held live
}

// OpenAccess connects to the kernel, and, unless opts say otherwise, takes hold
// of the table that a predecessor left: what that enforces stays enforced. Errors
// are ErrPermission, ErrUnsupported and ErrOwned.
func OpenAccess(opts Options) (*AccessConn, error) {
	c := &AccessConn{conn: Conn{opts: opts, home: AccessTableName}}
	for begin := time.Now(); ; time.Sleep(releaseStep) {
		err := c.conn.connect()
		if err == nil {
			return c, nil
		}
		if !errors.Is(err, ErrOwned) || time.Since(begin) > release {
			return nil, err
		}
	}
}

// A process that was killed holds the table for a moment longer, which its
// successor need not take for an owner.
const (
	release     = 750 * time.Millisecond
	releaseStep = 10 * time.Millisecond
)

// Close leaves the table as it is: it goes on enforcing without us, and while
// nobody is there nothing more is granted.
func (c *AccessConn) Close() error { return c.conn.Close() }

// Watch is as Conn.Watch.
func (c *AccessConn) Watch(ctx context.Context) (<-chan Event, error) { return c.conn.Watch(ctx) }

// Apply makes the kernel enforce a, whatever it holds. The same again is cheap,
// and repairs what others changed meanwhile. Where only sources and whole groups
// have come or gone, what differs is written; else all of a, beside what enforces.
// Either way a takes over in one transaction: a packet is judged by what was
// before or by a. A right that is gone is gone for running
// connections too. After an error the kernel enforces what it did before or all of
// a, and what of both is left over goes with the next Apply.
func (c *AccessConn) Apply(a Access) (Applied, error) {
	g, err := a.compile()
	if err != nil {
		return Applied{}, fmt.Errorf("apply access: %w", err)
	}
	if c.conn.opts.ReadOnly {
		return Applied{}, errors.New("apply access: the connection is read-only")
	}
	c.conn.mu.Lock()
	defer c.conn.mu.Unlock()
	done, err := c.apply(g)
	if err != nil {
		if c.conn.sock == nil || c.conn.sock.lost {
			c.live = nil
		}
		return Applied{}, fmt.Errorf("apply access: %w", err)
	}
	return done, nil
}

func (c *AccessConn) apply(g *grants) (Applied, error) {
	if err := c.conn.connect(); err != nil {
		return Applied{}, err
	}
	intact, err := c.intact()
	if err != nil {
		return Applied{}, err
	}
	done := Applied{Repaired: c.live != nil && !intact}
	if intact && c.live.shape == g.shape {
		changed, ok, err := c.change(g)
		if ok {
			return Applied{Changed: changed}, err
		}
		if c.conn.sock.lost {
			return Applied{}, err
		}
		// Something is not as it seemed: write all of it.
		done.Repaired = err != nil
	}
	if err := c.replace(g); err != nil {
		return Applied{}, err
	}
	done.Changed, done.Replaced = true, true
	return done, nil
}

// intact reports whether the kernel still holds what it was told last. Where
// nobody has changed anything in the namespace it need not look.
func (c *AccessConn) intact() (bool, error) {
	if c.live == nil {
		return false, nil
	}
	id, err := c.conn.ruleset()
	if err != nil {
		return false, fmt.Errorf("read ruleset generation: %w", err)
	}
	if id == c.checked {
		return true, nil
	}
	s, err := c.conn.inspect(AccessTableName)
	if err != nil {
		return false, err
	}
	same, err := c.matches(s)
	if same {
		c.checked = id
	}
	return same, err
}

// matches reports whether s is what c.live comes to. Elements are told by their
// number alone.
func (c *AccessConn) matches(s *state) (bool, error) {
	g := s.generations[c.generation]
	if !s.table.present || g == nil || s.fingerprint != c.fingerprint {
		return false, nil
	}
	l := &accessLayout{c.live, c.generation}
	for i, six := range []bool{false, true} {
		for _, want := range []struct {
			set
			n int
		}{{l.hostMap(six), len(l.hosts[i])}, {l.siteMap(six), len(l.sites[i])}} {
			base, _, _ := generationOf(want.name)
			n, told := g.counts[base]
			switch {
			case !told && s.table.flags&tableOwner != 0:
				continue // nobody else can have touched it
			case !told:
				var err error
				if n, err = c.count(want.name); err != nil {
					return false, err
				}
			case want.interval && want.n > 0 && !l.sites[i][want.n-1].to.Next().IsValid():
				n++ // that one has no end, and so was not counted
			}
			if n != want.n {
				return false, nil
			}
		}
	}
	return true, nil
}

// change makes the kernel's sources and groups those of g; ok is false where that
// cannot be. It is one transaction that counts. Groups that come are there before,
// and those that go are there until afterwards, because a packet on its way then
// may have seen the rules of before and the sources of now.
func (c *AccessConn) change(g *grants) (changed, ok bool, err error) {
	was, l, old := c.live, &accessLayout{g, c.generation}, &accessLayout{c.live, c.generation}
	gone, come, same := compareGroups(was.groups, g.groups)
	if !same {
		return false, false, nil
	}
	b := c.conn.begin()
	commit := func() error {
		if b.empty() {
			return nil
		}
		changed = true
		// Where the kernel's count rises by more than one, somebody else was at
		// work as well, and the next turn looks at what came of it.
		c.checked++
		return c.conn.commit()
	}
	for _, grp := range come {
		l.addGroup(b, grp)
	}
	if err := commit(); err != nil {
		return changed, false, err
	}
	for i, six := range []bool{false, true} {
		l.changeHosts(b, six, was.hosts[i], g.hosts[i])
		l.changeSites(b, six, was.sites[i], g.sites[i])
	}
	if err := commit(); err != nil {
		return changed, false, err
	}
	c.live = g
	for _, grp := range gone {
		old.dropGroup(b, grp)
	}
	if err := commit(); err != nil {
		return changed, false, err
	}
	if len(gone)+len(come) > 0 {
		return changed, true, c.remember(c.checked)
	}
	return changed, true, nil
}

// compareGroups tells what came and went; same is false if one is not what it was.
func compareGroups(was, now []group) (gone, come []*group, same bool) {
	i, j := 0, 0
	for i < len(was) || j < len(now) {
		switch {
		case j == len(now) || i < len(was) && was[i].name < now[j].name:
			gone = append(gone, &was[i])
			i++
		case i == len(was) || now[j].name < was[i].name:
			come = append(come, &now[j])
			j++
		default:
			if !was[i].equal(&now[j]) {
				return nil, nil, false
			}
			i, j = i+1, j+1
		}
	}
	return gone, come, true
}

// differ yields what of two sorted lists is only in one, or not the same in both.
func differ[T comparable](was, now []T, order func(a, b T) int) (gone, come []T) {
	i, j := 0, 0
	for i < len(was) || j < len(now) {
		o := 0
		switch {
		case j == len(now):
			o = -1
		case i == len(was):
			o = 1
		default:
			o = order(was[i], now[j])
		}
		if o <= 0 && (o < 0 || was[i] != now[j]) {
			gone = append(gone, was[i])
		}
		if o >= 0 && (o > 0 || was[i] != now[j]) {
			come = append(come, now[j])
		}
		if o <= 0 {
			i++
		}
		if o >= 0 {
			j++
		}
	}
	return gone, come
}

func (l *accessLayout) changeHosts(b *batch, six bool, was, now []host) {
	gone, come := differ(was, now, func(a, b host) int { return a.addr.Compare(b.addr) })
	name := l.hostMap(six).name
	w := writer{batch: b, typ: unix.NFT_MSG_DELSETELEM, set: name}
	for _, h := range gone {
		w.one(h.addr.AsSlice(), value{}, 0)
	}
	w.end()
	l.addHosts(b, six, slices.Values(come), func() error { return nil })
}

// addHosts writes hosts; full is asked after each message whether to go on.
func (l *accessLayout) addHosts(b *batch, six bool, hosts iter.Seq[host], full func() error) error {
	w := writer{batch: b, typ: unix.NFT_MSG_NEWSETELEM, set: l.hostMap(six).name}
	for h := range hosts {
		w.one(h.addr.AsSlice(), value{chain: l.part("group", h.group)}, 0)
		if w.n >= chunk {
			w.end()
			if err := full(); err != nil {
				return err
			}
		}
	}
	w.end()
	return nil
}

func (l *accessLayout) changeSites(b *batch, six bool, was, now []site) {
	gone, come := differ(was, now, func(a, b site) int { return cmp.Or(a.from.Compare(b.from), a.to.Compare(b.to)) })
	name := l.siteMap(six).name
	w := writer{batch: b, typ: unix.NFT_MSG_DELSETELEM, set: name}
	for _, s := range gone {
		w.span(s.from.AsSlice(), s.to.AsSlice(), value{}, 0)
	}
	w.end()
	w = writer{batch: b, typ: unix.NFT_MSG_NEWSETELEM, set: name}
	for _, s := range come {
		w.span(s.from.AsSlice(), s.to.AsSlice(), value{chain: l.part("group", s.group)}, 0)
	}
	w.end()
}

func (l *accessLayout) addGroup(b *batch, g *group) {
	for _, s := range l.groupSets(g) {
		b.newSet(s)
	}
	chains := l.groupChains(g)
	for _, ch := range chains {
		b.newChain(ch)
	}
	for _, ch := range chains {
		b.rules(ch, "")
	}
}

func (l *accessLayout) dropGroup(b *batch, g *group) {
	chains := l.groupChains(g)
	for _, ch := range chains {
		b.flushChain(ch.name)
	}
	for _, ch := range chains {
		b.delChain(ch.name)
	}
	for _, s := range l.groupSets(g) {
		b.delSet(s.name)
	}
}

// remember takes the table as it is for how it should be, if the kernel's count of
// changes is what we alone make it. Where others may change the table, and were at
// work meanwhile, nobody knows whether it is, and the next Apply writes all of it.
func (c *AccessConn) remember(count uint32) error {
	s, err := c.conn.inspect(AccessTableName)
	if err != nil {
		return fmt.Errorf("read back: %w", err)
	}
	id, err := c.conn.ruleset()
	if err != nil {
		return fmt.Errorf("read ruleset generation: %w", err)
	}
	c.fingerprint, c.checked = s.fingerprint, id
	if id != count && s.table.flags&tableOwner == 0 {
		c.live = nil
	}
	return nil
}

// replace writes a new generation beside the one that enforces, and hooks it up
// instead of that.
func (c *AccessConn) replace(g *grants) error {
	c.live = nil
	flags, err := c.conn.flags()
	if err != nil {
		return err
	}
	id, err := c.conn.ruleset()
	if err != nil {
		return fmt.Errorf("read ruleset generation: %w", err)
	}
	told := c.conn.told
	have, err := c.conn.inspect(AccessTableName)
	if err != nil {
		return err
	}
	anew := have.table.present && (have.table.flags&(tableOwner|tablePersist) != flags || !have.hooksAre(slices.Concat(accessHooks, natHooks)))
	var old []uint32
	l := &accessLayout{g, 1}
	for n := range have.generations {
		if n != 0 {
			old = append(old, n)
			l.generation = max(l.generation, n+1)
		}
	}
	b := c.conn.begin()
	// full sends what there is, where it may be in more than one transaction:
	// what is not hooked up is not met by any packet.
	full := func() error {
		if anew || len(b.buf) < fillBytes {
			return nil
		}
		return c.conn.commit()
	}
	if anew {
		// A table cannot be given away: it and its successor change places.
		b.delTable()
		have, old = &state{}, nil
	}
	if err := c.build(l, have, flags, full); err != nil {
		if !c.conn.sock.lost {
			b.reset(c.conn.sock.next, c.conn.sock.port)
			if half, readErr := c.conn.inspect(AccessTableName); readErr == nil && half.generations[l.generation] != nil {
				b.drop(half, []uint32{l.generation})
				err = errors.Join(err, c.conn.commit())
			}
		}
		return err
	}
	// And now all at once.
	rules := l.hookRules()
	for _, ch := range slices.Concat(accessHooks, natHooks) {
		// One that translated stays, if empty: connections that it translated
		// go on.
		switch ch.rules = rules[ch.name]; {
		case have.has(ch.name):
			b.flushChain(ch.name)
		case len(ch.rules) > 0:
			b.newChain(ch)
		}
		b.rules(ch, "")
	}
	if err := c.conn.commit(); err != nil {
		return err
	}
	// A packet on its way through the old rules still finds their maps.
	if len(old) > 0 {
		b.drop(have, old)
		if err := c.conn.commit(); err != nil {
			return fmt.Errorf("remove the generation before: %w", err)
		}
	}
	c.live, c.generation = g, l.generation
	return c.remember(id + c.conn.told - told)
}

// build makes all of a generation but the rules that lead to it, and what of the
// table is missing.
func (c *AccessConn) build(l *accessLayout, have *state, flags uint32, full func() error) error {
	b := &c.conn.batch
	if !have.table.present {
		b.newTable(flags)
	}
	for _, name := range accessCounters {
		b.newCounter(name)
	}
	for _, s := range noted() {
		if !have.has(s.name) {
			b.newSet(s)
		}
	}
	for _, s := range l.sets() {
		b.newSet(s)
	}
	chains := l.chains()
	for _, six := range []bool{false, true} {
		b.newSet(l.hostMap(six))
		b.newSet(l.siteMap(six))
	}
	for _, ch := range chains {
		b.newChain(ch)
	}
	l.addGroup(b, &l.everyone)
	for i := range l.groups {
		l.addGroup(b, &l.groups[i])
		if err := full(); err != nil {
			return err
		}
	}
	for _, ch := range chains {
		b.rules(ch, "")
	}
	for i, six := range []bool{false, true} {
		if err := l.addHosts(b, six, slices.Values(l.hosts[i]), full); err != nil {
			return err
		}
		l.changeSites(b, six, nil, l.sites[i])
	}
	return full()
}

// Delete removes the table, and nothing else; that it is missing is no error. The
// VPN is then open: take the interface down first.
func (c *AccessConn) Delete() error {
	c.conn.mu.Lock()
	defer c.conn.mu.Unlock()
	if err := c.conn.connect(); err != nil {
		return err
	}
	c.live = nil
	t, err := c.conn.table(AccessTableName)
	if err != nil || !t.present {
		return err
	}
	c.conn.begin().delTable()
	if err := c.conn.commit(); err != nil {
		return fmt.Errorf("remove table inet %s: %w", AccessTableName, err)
	}
	return nil
}

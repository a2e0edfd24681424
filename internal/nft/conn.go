package nft

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// Conn is a lasting connection to the table. Its methods may be called from
// several goroutines; they take turns.
//
// After any error of Install or Update, the kernel holds what it held before,
// except where the connection itself failed and nobody knows: both ask for an
// Install. The connection is then made again.
type Conn struct {
	opts Options
	home string // the table

	mu     sync.Mutex
	sock   *socket // nil after it was lost
	batch  batch
	closed bool
	told   uint32 // transactions that the kernel took from this Conn

	destroys bool    // the kernel knows how to delete what may be missing
	hold     *uint32 // the flags of a table that is ours alone; nil if not asked yet

	live        *layout // installed by this Conn; nil if none is
	classes     map[uint32]string
	ranges      map[bool]*ranges // of it, by whether they are IPv6
	asked       [2]bool          // whether ranges of IPv4 and of IPv6 are asked for
	fingerprint uint64

	ports ports
}

// Open connects to the kernel. Unless opts say otherwise it takes hold of a table
// that a predecessor left: what that enforces stays enforced, and others can no
// longer change it. Errors are ErrPermission, ErrUnsupported and ErrOwned.
func Open(opts Options) (*Conn, error) {
	c := &Conn{opts: opts, home: TableName}
	if err := c.connect(); err != nil {
		return nil, err
	}
	return c, nil
}

// Close leaves the table as it is: it goes on enforcing without us.
func (c *Conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	return c.hangUp()
}

func (c *Conn) hangUp() error {
	s := c.sock
	c.sock = nil
	if s == nil {
		return nil
	}
	return s.close()
}

// connect makes sure of a connection that is in step.
func (c *Conn) connect() error {
	if c.closed {
		return errors.New("the connection to nf_tables is closed")
	}
	if c.sock != nil && !c.sock.lost {
		return nil
	}
	c.hangUp() // first, as a table can only be claimed when its owner is gone
	s, err := dial(c.opts.NetNS)
	if err != nil {
		return err
	}
	c.sock = s
	c.ports.add(s.port)
	if err := c.greet(); err != nil {
		c.hangUp()
		return err
	}
	return nil
}

// greet learns what the kernel can, and claims the table.
func (c *Conn) greet() error {
	if _, err := c.ruleset(); err != nil {
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
			err = fmt.Errorf("%w: %w", ErrUnsupported, err)
		}
		return fmt.Errorf("read ruleset generation: %w", err)
	}
	// Of a table that cannot exist. An old kernel does not know the message; a
	// new one does not know the table.
	b := c.begin()
	b.message(msgDestroySetElem, 0, "probe")
	b.string(unix.NFTA_SET_ELEM_LIST_TABLE, "edgeward\x01")
	b.string(unix.NFTA_SET_ELEM_LIST_SET, "none")
	b.finish()
	err := c.sock.commit(b)
	c.destroys = !errors.Is(err, unix.EINVAL)
	if c.sock.lost {
		return err
	}
	if c.opts.ReadOnly || c.opts.Shared {
		return nil
	}
	t, err := c.table(c.home)
	if err != nil || t.flags&tablePersist == 0 {
		return err
	}
	b = c.begin()
	b.newTable(tableOwner | tablePersist)
	switch err := c.sock.commit(b); {
	case errors.Is(err, ErrUnsupported), errors.Is(err, ErrOwned):
		// The kernel's word for a claim on what has an owner.
		return fmt.Errorf("claim table inet %s: %w", c.home, ErrOwned)
	case err != nil:
		return fmt.Errorf("claim table: %w", err)
	}
	return nil
}

func (c *Conn) begin() *batch {
	c.batch.table = c.home
	c.batch.reset(c.sock.next, c.sock.port)
	return &c.batch
}

// commit sends what is in c.batch, if anything is, and begins anew.
func (c *Conn) commit() error {
	if c.batch.empty() {
		return nil
	}
	err := c.sock.commit(&c.batch)
	if err == nil {
		c.told++
	}
	c.batch.reset(c.sock.next, c.sock.port)
	return err
}

// Install makes the kernel enforce cfg with content, instead of whatever the
// table holds. What is enforced now stays so until all of the new is in place,
// and a failure leaves it so.
//
// Only where the table's ownership has to change (it was made with Shared and now
// is not, or the other way round) it cannot stay: then a spare table enforces
// while it is made anew, and counters begin again.
func (c *Conn) Install(cfg Config, content Content) error {
	if err := cfg.Validate(); err != nil {
		return err
	}
	if c.opts.ReadOnly {
		return errors.New("install ruleset: the connection is read-only")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.connect(); err != nil {
		return err
	}
	c.live = nil
	if err := c.install(cfg.withDefaults(), content); err != nil {
		return fmt.Errorf("install ruleset: %w", err)
	}
	return nil
}

func (c *Conn) install(cfg Config, content Content) error {
	flags, err := c.flags()
	if err != nil {
		return err
	}
	t, err := c.table(TableName)
	if err != nil {
		return err
	}
	spare, err := c.table(spareName)
	if err != nil {
		return err
	}
	if t.present && t.flags&(tableOwner|tablePersist) != flags {
		if spare.present {
			c.begin().table = spareName
			c.batch.delTable()
			if err := c.commit(); err != nil {
				return err
			}
		}
		if _, err := c.replace(spareName, 0, cfg, content); err != nil {
			return fmt.Errorf("fill the spare table: %w", err)
		}
		spare.present = true
		c.begin().delTable()
		if err := c.commit(); err != nil {
			return err
		}
	}
	l, err := c.replace(TableName, flags, cfg, content)
	if err != nil {
		return err
	}
	if spare.present {
		c.begin().table = spareName
		c.batch.delTable()
		if err := c.commit(); err != nil {
			return fmt.Errorf("remove the spare table: %w", err)
		}
	}
	c.live = l
	return c.remember()
}

// flags are those of a table as it is to be: with the strongest hold that the
// kernel knows, if it is to be held. An owner without persist takes the table
// with it, and so is none.
func (c *Conn) flags() (uint32, error) {
	if c.opts.Shared {
		return 0, nil
	}
	if c.hold == nil {
		b := c.begin()
		b.table = c.home + "_probe"
		b.newTable(tableOwner | tablePersist)
		b.delTable()
		hold := uint32(tableOwner | tablePersist)
		switch err := c.commit(); {
		case errors.Is(err, ErrUnsupported), errors.Is(err, unix.EINVAL):
			hold = 0
		case err != nil:
			return 0, fmt.Errorf("probe ownership of tables: %w", err)
		}
		c.hold = &hold
	}
	return *c.hold, nil
}

// Sizes of transactions in bytes. A commit costs next to nothing in a hash map;
// in an interval map it rebuilds all of it, so that there everything goes at
// once, if it can.
const (
	fillBytes   = 1 << 20
	rangesBytes = 64 << 20
)

// replace puts a new generation in the place of those that the table has, and
// makes the table if it is missing.
func (c *Conn) replace(table string, flags uint32, cfg Config, content Content) (l *layout, err error) {
	have, err := c.inspect(table)
	if err != nil {
		return nil, err
	}
	l = &layout{config: cfg, generation: 1, large: content.Size > largeMap}
	var old, stale []uint32
	for g, s := range have.generations {
		l.generation = max(l.generation, g+1)
		// What others put into the table may be referred to, and go with it.
		if s.hooked || g == 0 {
			old = append(old, g)
		} else {
			stale = append(stale, g)
		}
	}
	b := c.begin()
	b.table = table
	if !have.table.present {
		b.newTable(flags)
	}
	b.drop(have, stale)
	if err := c.build(l, content); err != nil {
		// Leave no half of a generation behind. If this fails as well, the
		// next Install removes it.
		if half, readErr := c.inspect(table); readErr == nil && half.generations[l.generation] != nil {
			b.reset(c.sock.next, c.sock.port)
			b.drop(half, []uint32{l.generation})
			err = errors.Join(err, c.commit())
		}
		return nil, err
	}
	for _, ch := range l.baseChains() {
		b.newChain(ch)
		b.rules(ch, "edgeward layout "+cfg.Layout())
	}
	if err := c.commit(); err != nil {
		return nil, err
	}
	// Now both enforce. In one transaction with this, a packet that is between
	// two chains of different priority could be missed by the old and the new.
	b.drop(have, old)
	if err := c.commit(); err != nil {
		return nil, fmt.Errorf("remove the generation before: %w", err)
	}
	return l, nil
}

// build makes all of a generation but its base chains. What little is left of it
// then goes with those: each transaction waits until all processors have seen it,
// which takes long where they are busy with a flood, and after a foreign flush
// nothing is enforced meanwhile.
func (c *Conn) build(l *layout, content Content) error {
	b := &c.batch
	for _, s := range l.sets(content.Protected) {
		b.newSet(s)
	}
	b.counters(l)
	chains := l.chains()
	for _, ch := range chains {
		b.newChain(ch)
	}
	for _, ch := range chains {
		b.rules(ch, "")
	}
	c.classes = map[uint32]string{}
	c.ranges = map[bool]*ranges{false: {}, true: {}}
	c.asked = [2]bool{l.asksRanges(), l.asksRanges()}
	if err := c.addClasses(l, content.Classes); err != nil {
		return err
	}
	if err := c.encodeWaivers(l.name, l.waivers(), content.Waivers); err != nil {
		return err
	}
	return c.fill(l, content)
}

// rules adds the rules of ch, the first with a comment.
func (b *batch) rules(ch chain, comment string) {
	for _, r := range ch.rules {
		b.newRule(ch.name, r, comment)
		comment = ""
	}
}

// counters makes sure of those that the rules of l refer to.
func (b *batch) counters(l *layout) {
	for _, six := range []bool{false, true} {
		for _, k := range []Kind{Seen, Protected, Waived, Unclassified, Resumed} {
			b.newCounter(counterName(k, "", six))
		}
		for _, lock := range l.config.Locks {
			b.newCounter(counterName(Locked, lock.Name, six))
		}
	}
}

// addClasses adds those of classes that are not there yet.
func (c *Conn) addClasses(l *layout, classes []Class) error {
	b := &c.batch
	for _, class := range classes {
		if class.Mark == 0 {
			return fmt.Errorf("class %q has no number", class.Name)
		}
		if name, ok := c.classes[class.Mark]; ok {
			if name != class.Name {
				return fmt.Errorf("class %d is %q and cannot become %q", class.Mark, name, class.Name)
			}
			continue
		}
		c.classes[class.Mark] = class.Name
		b.newCounter(counterName(Banned, class.Name, false))
		b.newCounter(counterName(Banned, class.Name, true))
		if l.config.Observe {
			continue // the elements name the counters themselves
		}
		ch := l.classChain(class)
		b.newChain(ch)
		b.rules(ch, "")
		b.addVerdict(l.name("classes"), class.Mark, ch.name)
	}
	return nil
}

// value is what the maps of l hold for class. A class that nobody has named
// counts as unclassified.
func (c *Conn) value(l *layout, class uint32, six bool) value {
	if !l.config.Observe {
		return value{mark: class}
	}
	if name, ok := c.classes[class]; ok {
		return value{counter: counterName(Banned, name, six)}
	}
	return value{counter: counterName(Unclassified, "", six)}
}

// fill writes the elements of content, in as many transactions as are good; the
// last of it stays in the batch.
func (c *Conn) fill(l *layout, content Content) error {
	type key struct {
		class uint32
		six   bool
	}
	values := map[key]value{}
	valueOf := func(class uint32, six bool) value {
		k := key{class, six}
		v, ok := values[k]
		if !ok {
			v = c.value(l, class, six)
			values[k] = v
		}
		return v
	}
	four := &writer{batch: &c.batch, typ: unix.NFT_MSG_NEWSETELEM}
	six := &writer{batch: &c.batch, typ: unix.NFT_MSG_NEWSETELEM}
	// One message is open at a time: families that alternate make short ones.
	turn := func(is6 bool) *writer {
		if is6 {
			four.end()
			return six
		}
		six.end()
		return four
	}
	full := func(w *writer, limit int) error {
		if w.n < chunk {
			return nil
		}
		w.end()
		if len(c.batch.buf) < limit {
			return nil
		}
		return c.commit()
	}
	var octets [16]byte
	if content.Elements != nil {
		four.set, six.set = l.name("bans4"), l.name("bans6")
		for e := range content.Elements {
			e, err := checkElement(e)
			if err != nil {
				return err
			}
			if e.Timeout <= 0 {
				continue
			}
			is6 := e.Addr.Is6()
			w, key := turn(is6), octets[:4]
			if is6 {
				octets = e.Addr.As16()
				key = octets[:]
			} else {
				a := e.Addr.As4()
				copy(key, a[:])
			}
			w.one(key, valueOf(e.Class, is6), e.Timeout)
			if err := full(w, fillBytes); err != nil {
				return err
			}
		}
	}
	four.end()
	six.end()
	if content.Ranges != nil {
		four.set, six.set = l.name("nets4"), l.name("nets6")
		for r := range content.Ranges {
			r, err := checkRange(r)
			if err != nil {
				return err
			}
			if r.Timeout <= 0 {
				continue
			}
			is6 := r.From.Is6()
			w := turn(is6)
			w.span(r.From.AsSlice(), r.To.AsSlice(), valueOf(r.Class, is6), r.Timeout)
			c.ranges[is6].put(r)
			if err := full(w, rangesBytes); err != nil {
				return err
			}
		}
	}
	four.end()
	six.end()
	for i := range c.asked {
		if len(c.ranges[i == 1].kept) > 0 {
			c.askRanges(l, i == 1)
		}
	}
	return nil
}

// askRanges has packets asked for ranges from now on.
func (c *Conn) askRanges(l *layout, six bool) {
	i := 0
	if six {
		i = 1
	}
	if !c.asked[i] {
		c.asked[i] = true
		c.batch.newRule(l.name("source"+familyOf(six)), l.ask("nets", six), "")
	}
}

// drop deletes generations: first what refers, then what is referred to.
func (b *batch) drop(have *state, generations []uint32) {
	slices.Sort(generations)
	each := func(names func(*generation) []string, f func(string)) {
		for _, g := range generations {
			for _, name := range names(have.generations[g]) {
				f(name)
			}
		}
	}
	each(func(g *generation) []string { return g.base }, b.flushChain)
	each(func(g *generation) []string { return g.chains }, b.flushChain)
	each(func(g *generation) []string { return g.sets }, b.delSet)
	each(func(g *generation) []string { return g.base }, b.delChain)
	each(func(g *generation) []string { return g.chains }, b.delChain)
}

// Update writes changes to the generation that this Conn installed, in one
// transaction; ErrNotInstalled says that there is none.
func (c *Conn) Update(changes Changes) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.connect(); err != nil {
		return err
	}
	if c.live == nil {
		return ErrNotInstalled
	}
	rebuild := false
	for attempt := 0; ; attempt++ {
		err := c.update(changes, rebuild)
		switch {
		case err == nil:
			return nil
		case c.sock.lost:
			c.live = nil
		case attempt >= 3:
		case errors.Is(err, unix.ENOENT) && !c.destroys:
			continue // between the look and the deletion an element timed out
		case errors.Is(err, unix.EEXIST) && !rebuild && len(changes.PutRanges) > 0:
			rebuild = true
			continue
		}
		return fmt.Errorf("update ruleset: %w", err)
	}
}

func (c *Conn) update(changes Changes, rebuild bool) error {
	b := c.begin()
	known, asked := len(c.classes), c.asked
	before := maps.Clone(c.classes)
	done, err := c.encode(changes, rebuild)
	if err == nil {
		err = c.commit()
	}
	if err != nil {
		b.reset(c.sock.next, c.sock.port)
		c.classes, c.asked = before, asked
		return err
	}
	done()
	if len(c.classes) != known || c.asked != asked {
		return c.remember()
	}
	return nil
}

// encode puts changes into the batch: deletions before additions, so that what
// is in both ends up there, and as the change says.
//
// The function that it returns is to be called when that is committed.
func (c *Conn) encode(changes Changes, rebuild bool) (done func(), err error) {
	l, b := c.live, &c.batch
	if err := c.addClasses(l, changes.Classes); err != nil {
		return nil, err
	}
	if changes.Protected != nil {
		four, six := prefixSpans(changes.Protected)
		for i, spans := range [][]span{four, six} {
			name := l.name(allowOf(i == 1))
			b.flushSet(name)
			w := writer{batch: b, typ: unix.NFT_MSG_NEWSETELEM, set: name}
			for _, s := range spans {
				w.span(s.from, s.to, value{}, 0)
			}
			w.end()
		}
	}

	// By family.
	var deletions [2][]netip.Addr
	var additions [2][]Element
	index := func(a netip.Addr) int {
		if a.Is6() {
			return 1
		}
		return 0
	}
	for _, a := range changes.Delete {
		e, err := checkElement(Element{Addr: a, Class: 1})
		if err != nil {
			return nil, err
		}
		deletions[index(e.Addr)] = append(deletions[index(e.Addr)], e.Addr)
	}
	for _, e := range changes.Put {
		e, err := checkElement(e)
		if err != nil {
			return nil, err
		}
		deletions[index(e.Addr)] = append(deletions[index(e.Addr)], e.Addr)
		if e.Timeout > 0 {
			additions[index(e.Addr)] = append(additions[index(e.Addr)], e)
		}
	}
	for i, base := range []string{"bans4", "bans6"} {
		if err := c.delete(l.name(base), deletions[i]); err != nil {
			return nil, err
		}
		w := writer{batch: b, typ: unix.NFT_MSG_NEWSETELEM, set: l.name(base)}
		for _, e := range additions[i] {
			w.one(e.Addr.AsSlice(), c.value(l, e.Class, i == 1), e.Timeout)
		}
		w.end()
	}
	return c.encodeRanges(changes, rebuild)
}

// delete deletes what is there of addrs. A kernel before 6.3 fails on what is
// missing: there each is looked up first.
func (c *Conn) delete(set string, addrs []netip.Addr) error {
	w := writer{batch: &c.batch, typ: msgDestroySetElem, set: set}
	if !c.destroys {
		w.typ = unix.NFT_MSG_DELSETELEM
	}
	seen := map[netip.Addr]bool{}
	for _, a := range addrs {
		if !c.destroys {
			if seen[a] {
				continue // twice would be once too often
			}
			seen[a] = true
			f, err := c.element(set, a, false)
			if err != nil {
				return err
			}
			if !f.Banned() {
				continue
			}
		}
		w.one(a.AsSlice(), value{}, 0)
	}
	w.end()
	return nil
}

// encodeRanges puts the changes of ranges into the batch: one by one, or, where
// that is not safe, by writing the whole map again.
func (c *Conn) encodeRanges(changes Changes, rebuild bool) (done func(), err error) {
	type change struct {
		gone, put []Range
	}
	all := map[bool]*change{false: {}, true: {}}
	for _, r := range changes.DeleteRanges {
		r.Class = 1
		r, err := checkRange(r)
		if err != nil {
			return nil, err
		}
		all[r.From.Is6()].gone = append(all[r.From.Is6()].gone, r)
	}
	for _, r := range changes.PutRanges {
		r, err := checkRange(r)
		if err != nil {
			return nil, err
		}
		of := all[r.From.Is6()]
		of.gone = append(of.gone, r)
		if r.Timeout > 0 {
			of.put = append(of.put, r)
		}
	}
	b, l := &c.batch, c.live
	for i, name := range []string{l.name("nets4"), l.name("nets6")} {
		six := i == 1
		of, have := all[six], c.ranges[six]
		if len(of.gone) == 0 {
			continue
		}
		gone := map[netip.Addr]bool{}
		for _, r := range of.gone {
			if have.has(r) {
				gone[r.From] = true
			}
		}
		again := rebuild || have.stale()
		if again {
			b.flushSet(name)
		} else {
			w := writer{batch: b, typ: unix.NFT_MSG_DELSETELEM, set: name}
			for from := range gone {
				w.span(from.AsSlice(), have.kept[from].to.AsSlice(), value{}, 0)
			}
			w.end()
		}
		w := writer{batch: b, typ: unix.NFT_MSG_NEWSETELEM, set: name}
		add := func(r Range) { w.span(r.From.AsSlice(), r.To.AsSlice(), c.value(l, r.Class, six), r.Timeout) }
		if again {
			for r := range have.live() {
				if !gone[r.From] {
					add(r)
				}
			}
		}
		for _, r := range of.put {
			add(r)
		}
		w.end()
		if len(of.put) > 0 {
			c.askRanges(l, six)
		}
		before := done
		done = func() {
			if before != nil {
				before()
			}
			if again {
				have.forget()
			}
			for from := range gone {
				delete(have.kept, from)
			}
			for _, r := range of.put {
				have.put(r)
			}
		}
	}
	if done == nil {
		done = func() {}
	}
	return done, nil
}

// Waive replaces the waivers of the generation that enforces, in one transaction.
// That may be a predecessor's: whoever asks to be let in does not wait for an
// Install. ErrNotInstalled says that there is none, or an older release's, which
// has no waivers.
func (c *Conn) Waive(w Waivers) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.connect(); err != nil {
		return err
	}
	have, err := c.inspect(TableName)
	if err != nil {
		return err
	}
	at := layout{}
	for n, g := range have.generations {
		if g.hooked && n > at.generation {
			at.generation = n
		}
	}
	var bases []string
	for _, base := range []string{waiveBans, waiveLocks} {
		if g := have.generations[at.generation]; g != nil && slices.Contains(g.sets, at.name(base+"6")) {
			bases = append(bases, base)
		}
	}
	if !slices.Contains(bases, waiveBans) {
		return ErrNotInstalled
	}
	b := c.begin()
	for _, base := range bases {
		b.flushSet(at.name(base + "4"))
		b.flushSet(at.name(base + "6"))
	}
	err = c.encodeWaivers(at.name, bases, w)
	if err == nil {
		err = c.commit()
	}
	if err != nil {
		b.reset(c.sock.next, c.sock.port)
		if c.sock.lost {
			c.live = nil
		}
		return fmt.Errorf("waive bans: %w", err)
	}
	return nil
}

// encodeWaivers fills the sets called bases, which are empty.
func (c *Conn) encodeWaivers(name func(string) string, bases []string, w Waivers) error {
	for _, base := range bases {
		list := w.Bans
		if base == waiveLocks {
			list = w.Locks
		}
		for _, six := range []bool{false, true} {
			out := writer{batch: &c.batch, typ: unix.NFT_MSG_NEWSETELEM, set: name(base + familyOf(six))}
			for _, r := range list {
				r.Class = 1 // of no meaning here, and missed elsewhere
				r, err := checkRange(r)
				if err != nil {
					return err
				}
				if r.Timeout > 0 && r.From.Is6() == six {
					out.span(r.From.AsSlice(), r.To.AsSlice(), value{}, r.Timeout)
				}
			}
			out.end()
		}
	}
	return nil
}

// Remove deletes the table, and nothing else; that it is missing is no error.
func (c *Conn) Remove() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.connect(); err != nil {
		return err
	}
	c.live = nil
	c.begin()
	for _, name := range []string{TableName, spareName} {
		t, err := c.table(name)
		if err != nil {
			return err
		}
		if t.present {
			c.batch.table = name
			c.batch.delTable()
		}
	}
	if err := c.commit(); err != nil {
		return fmt.Errorf("remove table: %w", err)
	}
	return nil
}

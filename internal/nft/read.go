package nft

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// attributes calls f for each attribute of data.
func attributes(data []byte, f func(typ uint16, d *netlink.AttributeDecoder)) error {
	d, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return err
	}
	d.ByteOrder = binary.BigEndian
	for d.Next() {
		f(d.Type(), d)
	}
	return d.Err()
}

// query encodes attributes, given as pairs of type and value.
func query(pairs ...any) []byte {
	var b batch
	for i := 0; i < len(pairs); i += 2 {
		switch v := pairs[i+1].(type) {
		case string:
			b.string(uint16(pairs[i].(int)), v)
		case uint32:
			b.uint32(uint16(pairs[i].(int)), v)
		}
	}
	return b.buf
}

// ruleset returns the kernel's count of changes.
func (c *Conn) ruleset() (uint32, error) {
	answers, err := c.sock.get(unix.NFT_MSG_GETGEN, unix.AF_UNSPEC, false, nil)
	if err != nil {
		return 0, err
	}
	var id uint32
	for _, m := range answers {
		e, err := parseGeneration(m.Data)
		if err != nil {
			return 0, err
		}
		id = e.Ruleset
	}
	return id, nil
}

func parseGeneration(data []byte) (Event, error) {
	var e Event
	err := attributes(data, func(typ uint16, d *netlink.AttributeDecoder) {
		switch typ {
		case unix.NFTA_GEN_ID:
			e.Ruleset = d.Uint32()
		case unix.NFTA_GEN_PROC_PID:
			e.PID = d.Uint32()
		case unix.NFTA_GEN_PROC_NAME:
			e.Process = d.String()
		}
	})
	if err != nil {
		return e, fmt.Errorf("decode generation: %w", err)
	}
	return e, nil
}

type tableState struct {
	present bool
	flags   uint32
	owner   uint32 // port; zero if none lives
}

func (c *Conn) table(name string) (tableState, error) {
	answers, err := c.sock.get(unix.NFT_MSG_GETTABLE, familyInet, false, query(unix.NFTA_TABLE_NAME, name))
	if errors.Is(err, unix.ENOENT) {
		return tableState{}, nil
	}
	if err != nil {
		return tableState{}, fmt.Errorf("read table: %w", err)
	}
	t := tableState{present: true}
	for _, m := range answers {
		if t, err = parseTable(m.Data); err != nil {
			return t, err
		}
	}
	return t, nil
}

func parseTable(data []byte) (tableState, error) {
	t := tableState{present: true}
	if err := attributes(data, func(typ uint16, d *netlink.AttributeDecoder) {
		switch typ {
		case unix.NFTA_TABLE_FLAGS:
			t.flags = d.Uint32()
		case attrTableOwner:
			t.owner = d.Uint32()
		}
	}); err != nil {
		return t, fmt.Errorf("decode table: %w", err)
	}
	return t, nil
}

// generation is what the kernel has of one.
type generation struct {
	hooked             bool
	base, chains, sets []string
	layout             string
	counts             map[string]int // by base of the name; absent if the kernel does not tell
}

// state is the whole table but for its elements.
type state struct {
	table       tableState
	generations map[uint32]*generation
	hooks       map[string]string // of chains that have one, by name: the kernel's words for it
	fingerprint uint64            // of chains, rules and sets
}

func (s *state) of(name string) *generation {
	_, g, _ := generationOf(name) // what is not ours by name counts as 0
	if s.generations[g] == nil {
		s.generations[g] = &generation{counts: map[string]int{}}
	}
	return s.generations[g]
}

func (c *Conn) inspect(table string) (*state, error) {
	s := &state{generations: map[uint32]*generation{}}
	var err error
	if s.table, err = c.table(table); err != nil || !s.table.present {
		return s, err
	}
	chains, err := c.list(table, unix.NFT_MSG_GETCHAIN, unix.NFTA_CHAIN_TABLE)
	if err != nil {
		return nil, fmt.Errorf("list chains: %w", err)
	}
	rules, err := c.list(table, unix.NFT_MSG_GETRULE, unix.NFTA_RULE_TABLE)
	if err != nil {
		return nil, fmt.Errorf("list rules: %w", err)
	}
	sets, err := c.list(table, unix.NFT_MSG_GETSET, unix.NFTA_SET_TABLE)
	if err != nil {
		return nil, fmt.Errorf("list sets: %w", err)
	}
	return s, s.take(chains, rules, sets)
}

// take reads the kernel's lists of chains, rules and sets.
func (s *state) take(chains, rules, sets [][]byte) error {
	var lines []string // of the fingerprint
	s.hooks = map[string]string{}
	for _, data := range chains {
		var name, hook string
		if err := attributes(data, func(typ uint16, d *netlink.AttributeDecoder) {
			switch typ {
			case unix.NFTA_CHAIN_NAME:
				name = d.String()
			case unix.NFTA_CHAIN_HOOK, unix.NFTA_CHAIN_POLICY:
				hook += string(d.Bytes())
			}
		}); err != nil {
			return fmt.Errorf("decode chain: %w", err)
		}
		g := s.of(name)
		if hook != "" {
			g.hooked = true
			s.hooks[name] = hook
			g.base = append(g.base, name)
		} else {
			g.chains = append(g.chains, name)
		}
		lines = append(lines, "chain "+name+"\x00"+hook)
	}
	for i, data := range rules {
		var name, comment string
		var exprs []byte
		if err := attributes(data, func(typ uint16, d *netlink.AttributeDecoder) {
			switch typ {
			case unix.NFTA_RULE_CHAIN:
				name = d.String()
			case unix.NFTA_RULE_EXPRESSIONS:
				exprs = d.Bytes()
			case unix.NFTA_RULE_USERDATA:
				comment = commentOf(d.Bytes())
			}
		}); err != nil {
			return fmt.Errorf("decode rule: %w", err)
		}
		if layout, ok := strings.CutPrefix(comment, "edgeward layout "); ok {
			s.of(name).layout = layout
		}
		// Rules come in order, by chain.
		lines = append(lines, fmt.Sprintf("rule %s %08d %s", name, i, exprs))
	}
	for _, data := range sets {
		name, count := "", -1
		if err := attributes(data, func(typ uint16, d *netlink.AttributeDecoder) {
			switch typ {
			case unix.NFTA_SET_NAME:
				name = d.String()
			case attrSetCount:
				count = int(d.Uint32())
			}
		}); err != nil {
			return fmt.Errorf("decode set: %w", err)
		}
		g := s.of(name)
		g.sets = append(g.sets, name)
		if base, _, ok := generationOf(name); ok && count >= 0 {
			g.counts[base] = count
			if !changing(base) {
				name = fmt.Sprintf("%s %d", name, count) // those nobody should touch
			}
		}
		lines = append(lines, "set "+name)
	}
	slices.Sort(lines)
	h := fnv.New64a()
	for _, l := range lines {
		h.Write(append([]byte(l), 0xff))
	}
	s.fingerprint = h.Sum64()
	return nil
}

// changing reports whether elements of a set come and go without an Install.
func changing(base string) bool {
	switch base {
	case "bans4", "bans6", "nets4", "nets6", "allow4", "allow6", waiveBans + "4", waiveBans + "6", waiveLocks + "4", waiveLocks + "6",
		"hosts4", "hosts6", "sites4", "sites6":
		return true
	}
	return false
}

// commentOf reads user data that anybody may have written.
func commentOf(data []byte) string {
	for len(data) >= 2 && len(data) >= 2+int(data[1]) {
		value := data[2 : 2+int(data[1])]
		if userdata.Type(data[0]) == userdata.TypeComment {
			return strings.TrimRight(string(value), "\x00")
		}
		data = data[2+len(value):]
	}
	return ""
}

// list returns the objects of one kind in a table. Not every kernel filters, so
// the family's others may come along.
func (c *Conn) list(table string, typ, tableAttr uint16) ([][]byte, error) {
	answers, err := c.sock.get(typ, familyInet, true, query(int(tableAttr), table))
	if err != nil {
		return nil, err
	}
	var out [][]byte
	for _, m := range answers {
		ours := false
		if err := attributes(m.Data, func(typ uint16, d *netlink.AttributeDecoder) {
			if typ == tableAttr {
				ours = d.String() == table
			}
		}); err != nil {
			return nil, err
		}
		if ours {
			out = append(out, m.Data)
		}
	}
	return out, nil
}

// remember takes the table as it is for how it should be.
func (c *Conn) remember() error {
	s, err := c.inspect(TableName)
	if err != nil {
		return fmt.Errorf("read back: %w", err)
	}
	c.fingerprint = s.fingerprint
	return nil
}

// Read tells what the kernel holds. It costs the same however many elements
// there are.
func (c *Conn) Read() (Have, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.connect(); err != nil {
		return Have{}, err
	}
	// The number first: what changes meanwhile shows next time.
	id, err := c.ruleset()
	if err != nil {
		return Have{}, fmt.Errorf("read ruleset generation: %w", err)
	}
	s, err := c.inspect(TableName)
	if err != nil {
		return Have{}, err
	}
	h := Have{Ruleset: id, Present: s.table.present}
	if !h.Present {
		return h, nil
	}
	h.Owner = s.table.flags&tableOwner != 0 && s.table.owner != 0
	h.Persist = s.table.flags&tablePersist != 0
	h.Intact = c.live != nil && s.fingerprint == c.fingerprint
	for n, g := range s.generations {
		if !g.hooked || n < h.Generation {
			continue
		}
		h.Enforcing, h.Generation, h.Layout = true, n, g.layout
		count := func(base string) int {
			if n, ok := g.counts[base]; ok {
				return n
			}
			return -1
		}
		h.Bans4, h.Bans6, h.Nets4, h.Nets6 = count("bans4"), count("bans6"), count("nets4"), count("nets6")
	}
	return h, nil
}

// Sample tells what the kernel that enforces now holds on each of addrs, in
// their order. It asks one by one, some microseconds each.
func (c *Conn) Sample(addrs []netip.Addr) ([]Found, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.connect(); err != nil {
		return nil, err
	}
	l := c.live
	if l == nil {
		s, err := c.inspect(TableName)
		if err != nil {
			return nil, err
		}
		l = &layout{}
		for n, g := range s.generations {
			if g.hooked {
				l.generation = max(l.generation, n)
			}
		}
		if l.generation == 0 {
			return nil, ErrNotInstalled
		}
	}
	out := make([]Found, 0, len(addrs))
	for _, a := range addrs {
		a = a.Unmap()
		var f Found
		for _, base := range banMaps {
			if f.Banned() {
				break
			}
			var err error
			if f, err = c.find(l.name(base+familyOf(a.Is6())), a); err != nil {
				return nil, fmt.Errorf("look up %v: %w", a, err)
			}
		}
		f.Addr = a
		for mark, name := range c.classes {
			switch {
			case f.Class == mark:
				f.Name = name
			case f.Name != "" && f.Name == unescape(word(name)):
				f.Class, f.Name = mark, name
			}
		}
		out = append(out, f)
	}
	return out, nil
}

// find looks up one address, with the bounds of its range.
func (c *Conn) find(set string, a netip.Addr) (Found, error) {
	f, err := c.element(set, a, false)
	if base, _, _ := generationOf(set); err != nil || !f.Banned() || !strings.HasPrefix(base, "nets") {
		return f, err
	}
	// Where the interval ends has to be asked for, unless it has no end: asked
	// for that, the kernel does not answer at all.
	last := lastAddr(a)
	if end, err := c.element(set, last, false); err != nil || end.From == f.From {
		f.To = last
		return f, err
	}
	// Asked at its first address, the kernel may answer with the end of the one
	// before, which is the same key; so it is asked at the second, if that
	// belongs to it.
	inside := a
	if a == f.From {
		inside = a.Next()
		if !inside.IsValid() {
			return f, nil
		}
		second, err := c.element(set, inside, false)
		if err != nil || second.From != f.From {
			return f, err
		}
	}
	end, err := c.element(set, inside, true)
	if err == nil && end.Banned() {
		f.To = end.From.Prev()
	}
	return f, err
}

// element asks for the start of the interval that holds a, or for its end, or in
// a hash map for a itself. From and To of the answer are its key.
func (c *Conn) element(set string, a netip.Addr, end bool) (Found, error) {
	var b batch
	b.string(unix.NFTA_SET_ELEM_LIST_TABLE, TableName)
	b.string(unix.NFTA_SET_ELEM_LIST_SET, set)
	list := b.nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
	elem := b.nest(unix.NFTA_LIST_ELEM)
	b.value(unix.NFTA_SET_ELEM_KEY, a.AsSlice())
	if end {
		b.uint32(unix.NFTA_SET_ELEM_FLAGS, unix.NFT_SET_ELEM_INTERVAL_END)
	}
	b.close(elem)
	b.close(list)
	answers, err := c.sock.get(unix.NFT_MSG_GETSETELEM, familyInet, false, b.buf)
	if errors.Is(err, unix.ENOENT) {
		return Found{Addr: a}, nil
	}
	if err != nil {
		return Found{}, err
	}
	f := Found{Addr: a, Left: Forever}
	for _, m := range answers {
		key, err := parseElement(m.Data, &f)
		if err != nil {
			return Found{}, fmt.Errorf("decode element: %w", err)
		}
		if f.From, _ = netip.AddrFromSlice(key); f.From.BitLen() != a.BitLen() {
			return Found{}, fmt.Errorf("decode element: a key of %d bytes", len(key))
		}
	}
	f.To = f.From
	return f, nil
}

func lastAddr(a netip.Addr) netip.Addr {
	key := a.AsSlice()
	for i := range key {
		key[i] = 0xff
	}
	last, _ := netip.AddrFromSlice(key)
	return last
}

// parseElement takes class and time left from an answer that holds one element,
// and returns its key.
func parseElement(data []byte, f *Found) (key []byte, err error) {
	err = attributes(data, func(typ uint16, d *netlink.AttributeDecoder) {
		if typ != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			return
		}
		d.Nested(func(d *netlink.AttributeDecoder) error {
			for d.Next() {
				d.Nested(func(d *netlink.AttributeDecoder) error {
					for d.Next() {
						switch d.Type() {
						case unix.NFTA_SET_ELEM_KEY:
							key = dataValue(d)
						case unix.NFTA_SET_ELEM_DATA:
							if v := dataValue(d); len(v) == 4 {
								f.Class = binary.NativeEndian.Uint32(v)
							}
						case unix.NFTA_SET_ELEM_OBJREF:
							_, f.Name, _, _ = parseCounter(d.String())
						case unix.NFTA_SET_ELEM_EXPIRATION:
							f.Left = time.Duration(min(d.Uint64(), uint64(Forever/time.Millisecond))) * time.Millisecond
						}
					}
					return nil
				})
			}
			return nil
		})
	})
	return key, err
}

// dataValue reads a NFTA_DATA_VALUE.
func dataValue(d *netlink.AttributeDecoder) (out []byte) {
	d.Nested(func(d *netlink.AttributeDecoder) error {
		for d.Next() {
			if d.Type() == unix.NFTA_DATA_VALUE {
				out = d.Bytes()
			}
		}
		return nil
	})
	return out
}

// Counters returns all counters, sorted.
func (c *Conn) Counters() ([]Counter, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.connect(); err != nil {
		return nil, err
	}
	answers, err := c.list(TableName, unix.NFT_MSG_GETOBJ, unix.NFTA_OBJ_TABLE)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("read counters: %w", err)
	}
	long := map[string]string{} // names that the kernel could not take whole
	for _, name := range c.classes {
		long[unescape(word(name))] = name
	}
	var out []Counter
	for _, data := range answers {
		n, ok, err := parseCounterObject(data)
		if err != nil {
			return nil, err
		}
		if !ok {
			continue
		}
		if n.Kind == Banned && long[n.Name] != "" {
			n.Name = long[n.Name]
		}
		out = append(out, n)
	}
	slices.SortFunc(out, func(a, b Counter) int {
		six := func(c Counter) int {
			if c.IPv6 {
				return 1
			}
			return 0
		}
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Name, b.Name), cmp.Compare(six(a), six(b)))
	})
	return out, nil
}

// parseCounterObject reads a counter; ok is false for one that is not of bans.
func parseCounterObject(data []byte) (n Counter, ok bool, err error) {
	name, n, err := parseNamedCounter(data)
	if err != nil {
		return n, false, err
	}
	n.Kind, n.Name, n.IPv6, ok = parseCounter(name)
	return n, ok, nil
}

// parseNamedCounter reads the numbers of a counter, and what it is called.
func parseNamedCounter(data []byte) (name string, n Counter, err error) {
	err = attributes(data, func(typ uint16, d *netlink.AttributeDecoder) {
		switch typ {
		case unix.NFTA_OBJ_NAME:
			name = d.String()
		case unix.NFTA_OBJ_DATA:
			d.Nested(func(d *netlink.AttributeDecoder) error {
				n.Packets, n.Bytes = count(d)
				return nil
			})
		}
	})
	if err != nil {
		err = fmt.Errorf("decode counter: %w", err)
	}
	return name, n, err
}

// count reads what is inside a counter.
func count(d *netlink.AttributeDecoder) (packets, bytes uint64) {
	for d.Next() {
		switch d.Type() {
		case unix.NFTA_COUNTER_BYTES:
			bytes = d.Uint64()
		case unix.NFTA_COUNTER_PACKETS:
			packets = d.Uint64()
		}
	}
	return packets, bytes
}

// Flowtables names the flowtables of all tables of the namespace, as
// "family table name". Established connections that one of them has taken over
// pass this ruleset by.
func (c *Conn) Flowtables() ([]string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.connect(); err != nil {
		return nil, err
	}
	families := map[uint8]string{unix.NFPROTO_IPV4: "ip", unix.NFPROTO_IPV6: "ip6", familyInet: "inet"}
	var out []string
	for family, word := range families {
		answers, err := c.sock.get(unix.NFT_MSG_GETFLOWTABLE, family, true, nil)
		if err != nil {
			return nil, fmt.Errorf("list flowtables: %w", err)
		}
		for _, m := range answers {
			name, err := parseFlowtable(m.Data)
			if err != nil {
				return nil, err
			}
			out = append(out, word+" "+name)
		}
	}
	slices.Sort(out)
	return out, nil
}

// parseFlowtable returns "table name".
func parseFlowtable(data []byte) (string, error) {
	var table, name string
	if err := attributes(data, func(typ uint16, d *netlink.AttributeDecoder) {
		switch typ {
		case attrFlowtableTable:
			table = d.String()
		case attrFlowtableName:
			name = d.String()
		}
	}); err != nil {
		return "", fmt.Errorf("decode flowtable: %w", err)
	}
	return table + " " + name, nil
}

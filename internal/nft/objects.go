package nft

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

func (b *batch) newTable(flags uint32) {
	b.message(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, "add table")
	b.string(unix.NFTA_TABLE_NAME, b.table)
	b.uint32(unix.NFTA_TABLE_FLAGS, flags)
	b.finish()
}

func (b *batch) delTable() {
	b.message(unix.NFT_MSG_DELTABLE, 0, "delete table")
	b.string(unix.NFTA_TABLE_NAME, b.table)
	b.finish()
}

// newCounter leaves the counter as it is if it is there.
func (b *batch) newCounter(name string) {
	b.message(unix.NFT_MSG_NEWOBJ, unix.NLM_F_CREATE, "add counter "+name)
	b.string(unix.NFTA_OBJ_TABLE, b.table)
	b.string(unix.NFTA_OBJ_NAME, name)
	b.uint32(unix.NFTA_OBJ_TYPE, objectCounter)
	at := b.nest(unix.NFTA_OBJ_DATA)
	b.uint64(unix.NFTA_COUNTER_BYTES, 0)
	b.uint64(unix.NFTA_COUNTER_PACKETS, 0)
	b.close(at)
	b.finish()
}

// newSet adds the set, and the elements that it has from the start. The id is
// the message's number: nobody refers to it.
func (b *batch) newSet(s set) {
	b.message(unix.NFT_MSG_NEWSET, unix.NLM_F_CREATE|unix.NLM_F_EXCL, "add set "+s.name)
	b.string(unix.NFTA_SET_TABLE, b.table)
	b.string(unix.NFTA_SET_NAME, s.name)
	var flags uint32
	if s.interval {
		flags |= unix.NFT_SET_INTERVAL
	}
	if s.timeout {
		flags |= unix.NFT_SET_TIMEOUT
	}
	if s.data != 0 {
		flags |= unix.NFT_SET_MAP
	}
	if s.counters {
		flags |= unix.NFT_SET_OBJECT
	}
	if s.fields != nil {
		flags |= setConcat
	}
	if s.dynamic {
		flags |= unix.NFT_SET_EVAL
	}
	b.uint32(unix.NFTA_SET_FLAGS, flags)
	b.uint32(unix.NFTA_SET_KEY_TYPE, s.key)
	b.uint32(unix.NFTA_SET_KEY_LEN, s.keyLen)
	if s.data != 0 {
		b.uint32(unix.NFTA_SET_DATA_TYPE, s.data)
		b.uint32(unix.NFTA_SET_DATA_LEN, s.dataLen)
	}
	if s.counters {
		b.uint32(unix.NFTA_SET_OBJ_TYPE, objectCounter)
	}
	b.uint32(unix.NFTA_SET_ID, uint32(len(b.what)))
	if s.size > 0 || s.fields != nil {
		b.describe(s)
	}
	if s.lifetime > 0 {
		b.uint64(unix.NFTA_SET_TIMEOUT, uint64(s.lifetime.Milliseconds()))
	}
	if s.sweep > 0 {
		b.uint32(unix.NFTA_SET_GC_INTERVAL, uint32(s.sweep.Milliseconds()))
	}
	ud := userdata.AppendUint32(nil, userdata.NFTNL_UDATA_SET_KEYBYTEORDER, s.order)
	if s.data == typeMark {
		ud = userdata.AppendUint32(ud, userdata.NFTNL_UDATA_SET_DATABYTEORDER, orderHost)
	}
	b.bytes(unix.NFTA_SET_USERDATA, ud)
	b.finish()
	w := writer{batch: b, typ: unix.NFT_MSG_NEWSETELEM, set: s.name}
	for _, span := range s.spans {
		switch {
		case s.fields != nil:
			w.box(span.from, span.to)
		case s.interval:
			w.span(span.from, span.to, value{}, 0)
		default:
			w.one(span.from, value{}, 0)
		}
	}
	w.end()
}

// describe tells the size of a set, and of what its keys are made.
func (b *batch) describe(s set) {
	at := b.nest(unix.NFTA_SET_DESC)
	if s.size > 0 {
		b.uint32(unix.NFTA_SET_DESC_SIZE, s.size)
	}
	if s.fields != nil {
		fields := b.nest(attrSetFields)
		for _, n := range s.fields {
			field := b.nest(unix.NFTA_LIST_ELEM)
			b.uint32(attrFieldLen, n)
			b.close(field)
		}
		b.close(fields)
	}
	b.close(at)
}

func (b *batch) delSet(name string) {
	b.message(unix.NFT_MSG_DELSET, 0, "delete set "+name)
	b.string(unix.NFTA_SET_TABLE, b.table)
	b.string(unix.NFTA_SET_NAME, name)
	b.finish()
}

// flushSet deletes all elements.
func (b *batch) flushSet(name string) {
	b.message(unix.NFT_MSG_DELSETELEM, 0, "flush set "+name)
	b.string(unix.NFTA_SET_ELEM_LIST_TABLE, b.table)
	b.string(unix.NFTA_SET_ELEM_LIST_SET, name)
	b.finish()
}

// newChain adds the chain without its rules, which may jump to chains that are
// yet to come.
func (b *batch) newChain(c chain) {
	b.message(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE|unix.NLM_F_EXCL, "add chain "+c.name)
	b.string(unix.NFTA_CHAIN_TABLE, b.table)
	b.string(unix.NFTA_CHAIN_NAME, c.name)
	if c.hook >= 0 {
		at := b.nest(unix.NFTA_CHAIN_HOOK)
		b.uint32(unix.NFTA_HOOK_HOOKNUM, uint32(c.hook))
		b.uint32(unix.NFTA_HOOK_PRIORITY, uint32(c.priority))
		b.close(at)
		b.uint32(unix.NFTA_CHAIN_POLICY, chainAccepts)
		typ := "filter"
		if c.nat {
			typ = "nat"
		}
		b.string(unix.NFTA_CHAIN_TYPE, typ)
	}
	b.finish()
}

func (b *batch) delChain(name string) {
	b.message(unix.NFT_MSG_DELCHAIN, 0, "delete chain "+name)
	b.string(unix.NFTA_CHAIN_TABLE, b.table)
	b.string(unix.NFTA_CHAIN_NAME, name)
	b.finish()
}

func (b *batch) newRule(chain string, rule exprs, comment string) {
	b.message(unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND, "add rule to "+chain)
	b.string(unix.NFTA_RULE_TABLE, b.table)
	b.string(unix.NFTA_RULE_CHAIN, chain)
	list := b.nest(unix.NFTA_RULE_EXPRESSIONS)
	for _, e := range rule {
		elem := b.nest(unix.NFTA_LIST_ELEM)
		switch e := e.(type) {
		case expr.Any:
			data, err := expr.Marshal(familyInet, e)
			if err != nil && b.err == nil {
				b.err = fmt.Errorf("encode rule of %s: %w", chain, err)
			}
			b.buf = append(b.buf, data...)
		case objectMap:
			b.string(unix.NFTA_EXPR_NAME, "objref")
			data := b.nest(unix.NFTA_EXPR_DATA)
			b.uint32(unix.NFTA_OBJREF_SET_SREG, unix.NFT_REG_1)
			b.string(unix.NFTA_OBJREF_SET_NAME, e.set)
			b.close(data)
		}
		b.close(elem)
	}
	b.close(list)
	if comment != "" {
		b.bytes(unix.NFTA_RULE_USERDATA, userdata.AppendString(nil, userdata.TypeComment, comment))
	}
	b.finish()
}

// flushChain deletes all rules of the chain.
func (b *batch) flushChain(name string) {
	b.message(unix.NFT_MSG_DELRULE, 0, "flush chain "+name)
	b.string(unix.NFTA_RULE_TABLE, b.table)
	b.string(unix.NFTA_RULE_CHAIN, name)
	b.finish()
}

// addVerdict sends a class to its chain.
func (b *batch) addVerdict(set string, mark uint32, to string) {
	b.message(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, "add element to "+set)
	b.string(unix.NFTA_SET_ELEM_LIST_TABLE, b.table)
	b.string(unix.NFTA_SET_ELEM_LIST_SET, set)
	list := b.nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
	elem := b.nest(unix.NFTA_LIST_ELEM)
	b.value(unix.NFTA_SET_ELEM_KEY, binary.NativeEndian.AppendUint32(nil, mark))
	b.leadTo(to)
	b.close(elem)
	b.close(list)
	b.finish()
}

// leadTo is the verdict of an element that sends packets to a chain.
func (b *batch) leadTo(chain string) {
	data := b.nest(unix.NFTA_SET_ELEM_DATA)
	verdict := b.nest(unix.NFTA_DATA_VERDICT)
	code := int32(unix.NFT_GOTO)
	b.uint32(unix.NFTA_VERDICT_CODE, uint32(code))
	b.string(unix.NFTA_VERDICT_CHAIN, chain)
	b.close(verdict)
	b.close(data)
}

// value is what a map holds for a key: a mark, the name of a counter, or that of
// a chain; nothing in a set.
type value struct {
	mark    uint32
	counter string
	chain   string
}

// writer puts elements of one set into messages of at most chunk elements, and
// not more bytes than an attribute can say.
type writer struct {
	batch      *batch
	typ        uint16
	set        string
	n          int // elements in the message that is open
	attributes int // where their list begins
}

// maxElement is more bytes than one element takes.
const maxElement = 512

// room makes place for n more elements that belong together.
func (w *writer) room(n int) {
	if w.n > 0 && (w.n+n > chunk || len(w.batch.buf)-w.attributes+n*maxElement > 0xffff) {
		w.end()
	}
	if w.n == 0 {
		b := w.batch
		flags, what := uint16(0), "delete elements of "
		if w.typ == unix.NFT_MSG_NEWSETELEM {
			flags, what = unix.NLM_F_CREATE, "add elements to "
		}
		b.message(w.typ, flags, what+w.set)
		b.string(unix.NFTA_SET_ELEM_LIST_TABLE, b.table)
		b.string(unix.NFTA_SET_ELEM_LIST_SET, w.set)
		w.attributes = b.nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
	}
	w.n += n
}

// end closes the message that is open, if one is.
func (w *writer) end() {
	if w.n > 0 {
		w.batch.close(w.attributes)
		w.batch.finish()
		w.n = 0
	}
}

// one writes a single key.
func (w *writer) one(key []byte, v value, timeout time.Duration) {
	w.room(1)
	w.element(key, v, timeout, 0)
}

// span writes an interval: its first key, and the one behind its last, which
// the last of all keys has not.
func (w *writer) span(from, to []byte, v value, timeout time.Duration) {
	w.room(2)
	w.element(from, v, timeout, 0)
	if after, ok := next(to); ok {
		w.element(after, value{}, 0, unix.NFT_SET_ELEM_INTERVAL_END)
	}
}

// box writes an interval of each part of a key.
func (w *writer) box(from, to []byte) {
	w.room(1)
	b := w.batch
	elem := b.nest(unix.NFTA_LIST_ELEM)
	b.value(unix.NFTA_SET_ELEM_KEY, from)
	b.value(attrElemKeyEnd, to)
	b.close(elem)
}

func (w *writer) element(key []byte, v value, timeout time.Duration, flags uint32) {
	b := w.batch
	elem := b.nest(unix.NFTA_LIST_ELEM)
	b.value(unix.NFTA_SET_ELEM_KEY, key)
	if v.mark != 0 {
		var mark [4]byte
		binary.NativeEndian.PutUint32(mark[:], v.mark)
		b.value(unix.NFTA_SET_ELEM_DATA, mark[:])
	}
	if v.chain != "" {
		b.leadTo(v.chain)
	}
	if v.counter != "" {
		b.string(unix.NFTA_SET_ELEM_OBJREF, v.counter)
	}
	if timeout > 0 && timeout != Forever {
		// Rounded up: to the kernel, zero means for ever.
		b.uint64(unix.NFTA_SET_ELEM_TIMEOUT, uint64((timeout-1)/time.Millisecond)+1)
	}
	if flags != 0 {
		b.uint32(unix.NFTA_SET_ELEM_FLAGS, flags)
	}
	b.close(elem)
}

// checkElement says what about e the kernel would refuse or misread.
func checkElement(e Element) (Element, error) {
	if !e.Addr.IsValid() || e.Addr.Zone() != "" {
		return e, fmt.Errorf("no address to ban: %v", e.Addr)
	}
	if e.Class == 0 {
		return e, fmt.Errorf("ban of %v: no class", e.Addr)
	}
	e.Addr = e.Addr.Unmap()
	return e, nil
}

func checkRange(r Range) (Range, error) {
	if !r.From.IsValid() || r.From.Zone() != "" || r.From.BitLen() != r.To.BitLen() || r.To.Less(r.From) {
		return r, fmt.Errorf("no range to ban: %v to %v", r.From, r.To)
	}
	if r.Class == 0 {
		return r, fmt.Errorf("ban of %v to %v: no class", r.From, r.To)
	}
	return r, nil
}

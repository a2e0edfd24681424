package nft

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// layoutVersion changes with the rules that a Config becomes, so that those of
// an older release are replaced.
const layoutVersion = 5

const (
	defaultSYNPriority = -300 // "raw", before connection tracking
	defaultPriority    = -150 // "mangle", after it and before translation (-100)
	conntrackPriority  = -200
)

const (
	maxName   = 200 // of 255, the prefix and generation not counted
	maxPrefix = 127 // of a log line
)

func (c Config) withDefaults() Config {
	if len(c.Points) == 0 {
		c.Points = []Point{Prerouting}
	}
	c.Points = slices.Compact(slices.Sorted(slices.Values(c.Points)))
	c.SYNPriority = cmp.Or(c.SYNPriority, defaultSYNPriority)
	c.Priority = cmp.Or(c.Priority, defaultPriority)
	c.Exempt = slices.Compact(slices.Sorted(slices.Values(c.Exempt)))
	if c.Log != nil {
		l := *c.Log
		l.PerSecond = cmp.Or(l.PerSecond, 1)
		l.Burst = cmp.Or(l.Burst, 5)
		c.Log = &l
	}
	return c
}

// Validate says what about c no kernel could do.
func (c Config) Validate() error {
	c = c.withDefaults()
	for _, p := range c.Points {
		if p < Prerouting || p > Forward {
			return fmt.Errorf("no such point: %d", p)
		}
		if p == Prerouting && !c.DropReplies && c.Priority <= conntrackPriority {
			return fmt.Errorf("priority %d is not after connection tracking (%d): replies cannot be told there", c.Priority, conntrackPriority)
		}
	}
	for _, name := range c.Exempt {
		if bare := strings.TrimSuffix(name, "*"); len(name) == 0 || len(bare) >= unix.IFNAMSIZ || strings.ContainsAny(bare, "*\x00/ ") {
			return fmt.Errorf("no interface is called %q", name)
		}
	}
	seen := map[string]bool{}
	for _, l := range c.Locks {
		switch {
		case l.Name == "" || len(escape(l.Name)) > maxName:
			return fmt.Errorf("a lock's name has to be short: %q", l.Name)
		case seen[l.Name]:
			return fmt.Errorf("two locks are called %q", l.Name)
		case len(l.Ports) == 0:
			return fmt.Errorf("lock %q has no ports", l.Name)
		}
		seen[l.Name] = true
		for _, p := range slices.Concat(l.From, l.To) {
			if !p.IsValid() {
				return fmt.Errorf("lock %q has an invalid prefix", l.Name)
			}
		}
	}
	return nil
}

// Layout names the rules that c becomes: Configs that differ in effect have
// different names, in other releases as well.
func (c Config) Layout() string {
	text, err := json.Marshal(c.withDefaults())
	if err != nil {
		panic(err) // numbers, names and prefixes only
	}
	sum := sha256.Sum256(append(strconv.AppendInt(nil, layoutVersion, 10), text...))
	return hex.EncodeToString(sum[:8])
}

// The kernel sweeps a hash map every second for what has timed out, although a
// look-up does not find that anyway: at a million elements, 6 % of a processor
// for ever. So a large map is swept less often. A small one is not told so,
// because nft before 1.0.7 lists the interval of a map, and then cannot load what
// it listed.
const (
	largeMap   = 200_000
	largeSweep = time.Minute
)

// layout is a generation as the kernel is told it, without its elements.
type layout struct {
	config     Config
	generation uint32
	large      bool
}

// name is that of a set or chain of this generation.
func (l *layout) name(base string) string {
	return base + "_" + strconv.FormatUint(uint64(l.generation), 10)
}

// generationOf takes the generation from the name of a set or chain.
func generationOf(name string) (base string, generation uint32, ok bool) {
	i := strings.LastIndexByte(name, '_')
	if i < 0 {
		return "", 0, false
	}
	n, err := strconv.ParseUint(name[i+1:], 10, 32)
	return name[:i], uint32(n), err == nil
}

// escape writes a name of ours with what nft reads as one word; unescape takes
// it back.
func escape(name string) string {
	var out []byte
	for i := range len(name) {
		switch c := name[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_', c == '/':
			out = append(out, c)
		default:
			out = append(out, '.')
			out = hex.AppendEncode(out, []byte{c})
		}
	}
	return string(out)
}

func unescape(name string) string {
	var out []byte
	for i := 0; i < len(name); i++ {
		if name[i] == '.' && i+2 < len(name) {
			if c, err := hex.DecodeString(name[i+1 : i+3]); err == nil {
				out = append(out, c...)
				i += 2
				continue
			}
		}
		out = append(out, name[i])
	}
	return string(out)
}

// word is escape for names of any length: a long one ends in its hash.
func word(name string) string {
	w := escape(name)
	if len(w) <= maxName {
		return w
	}
	h := fnv.New64a()
	h.Write([]byte(name))
	return w[:maxName-17] + "-" + hex.EncodeToString(h.Sum(nil))
}

// Counters outlive generations: their names have none.
var kindNames = map[Kind]string{Banned: "banned", Locked: "locked", Seen: "seen", Protected: "protected", Waived: "waived", Unclassified: "unclassified", Resumed: "resumed"}

func counterName(k Kind, name string, six bool) string {
	s := kindNames[k]
	if name != "" {
		s += "/" + word(name)
	}
	if six {
		return s + "/ipv6"
	}
	return s + "/ipv4"
}

// parseCounter is what counterName made of it.
func parseCounter(s string) (k Kind, name string, six, ok bool) {
	s, six = strings.CutSuffix(s, "/ipv6")
	if !six {
		if s, ok = strings.CutSuffix(s, "/ipv4"); !ok {
			return 0, "", false, false
		}
	}
	kind, name, _ := strings.Cut(s, "/")
	for k, n := range kindNames {
		if n == kind {
			return k, unescape(name), six, true
		}
	}
	return 0, "", false, false
}

// span is an interval of keys of a set, both ends included.
type span struct{ from, to []byte }

// next returns the key after k, or false if k is the last of its length.
func next(k []byte) ([]byte, bool) {
	out := slices.Clone(k)
	for i := len(out) - 1; i >= 0; i-- {
		out[i]++
		if out[i] != 0 {
			return out, true
		}
	}
	return nil, false
}

// merge returns the union of spans as disjoint ones: the kernel refuses
// overlaps.
func merge(spans []span) []span {
	slices.SortFunc(spans, func(a, b span) int { return slices.Compare(a.from, b.from) })
	var out []span
	for _, s := range spans {
		if n := len(out); n > 0 {
			after, ok := next(out[n-1].to)
			if !ok || slices.Compare(s.from, after) <= 0 {
				if slices.Compare(s.to, out[n-1].to) > 0 {
					out[n-1].to = s.to
				}
				continue
			}
		}
		out = append(out, s)
	}
	return out
}

// prefixSpans splits prefixes by family.
func prefixSpans(prefixes []netip.Prefix) (four, six []span) {
	for _, p := range prefixes {
		if a := p.Addr(); a.Is4In6() && p.Bits() >= 96 {
			p = netip.PrefixFrom(a.Unmap(), p.Bits()-96)
		}
		p = p.Masked()
		from := p.Addr().AsSlice()
		to := slices.Clone(from)
		for i := p.Bits(); i < len(to)*8; i++ {
			to[i/8] |= 0x80 >> (i % 8)
		}
		if len(from) == 4 {
			four = append(four, span{from, to})
		} else {
			six = append(six, span{from, to})
		}
	}
	return merge(four), merge(six)
}

// interfaceSpans are the names that the patterns stand for: as the kernel
// compares, 16 bytes filled up with zeros.
func interfaceSpans(patterns []string) []span {
	var spans []span
	for _, p := range patterns {
		bare, any := strings.CutSuffix(p, "*")
		s := span{make([]byte, unix.IFNAMSIZ), make([]byte, unix.IFNAMSIZ)}
		copy(s.from, bare)
		if any {
			for i := range s.to {
				s.to[i] = 0xff
			}
		}
		copy(s.to, bare)
		spans = append(spans, s)
	}
	return merge(spans)
}

func portSpans(ports []uint16) []span {
	var spans []span
	for _, p := range ports {
		key := binary.BigEndian.AppendUint16(nil, p)
		spans = append(spans, span{key, key})
	}
	return merge(spans)
}

// set is a set or map.
type set struct {
	name     string
	key      uint32 // nft's number of the type
	keyLen   uint32
	data     uint32 // type; zero for a set
	dataLen  uint32
	counters bool // its data are counters
	interval bool
	timeout  bool
	sweep    time.Duration // how often to collect what has timed out; zero is the kernel's second
	order    uint32        // byte order of the key, for nft to print it
	spans    []span        // elements of a set from the start
	fields   []uint32      // lengths of the parts of its key, where intervals are of several
	dynamic  bool          // packets add elements
	lifetime time.Duration // of those
	size     uint32        // how many elements there may be at most; zero for no limit
}

// nft's numbers of types.
const (
	typeIPv4      = 7
	typeIPv6      = 8
	typePort      = 13
	typeMark      = 19
	typeInterface = 41
	typeVerdict   = 0xffffff00

	orderHost = 1
	orderBig  = 2
)

func addressSet(name string, six bool) set {
	if six {
		return set{name: name, key: typeIPv6, keyLen: 16, order: orderBig}
	}
	return set{name: name, key: typeIPv4, keyLen: 4, order: orderBig}
}

func (l *layout) bans(base string, six, interval bool) set {
	s := addressSet(l.name(base), six)
	s.timeout, s.interval = true, interval
	if l.large && !interval {
		s.sweep = largeSweep
	}
	if l.config.Observe {
		s.counters = true
	} else {
		s.data, s.dataLen = typeMark, 4
	}
	return s
}

// sets are those of the generation; the maps of bans and classes are empty, and
// filled by others.
func (l *layout) sets(protected []netip.Prefix) []set {
	prefixSet := func(name string, six bool, spans []span) set {
		s := addressSet(name, six)
		s.interval, s.spans = true, spans
		return s
	}
	four, six := prefixSpans(protected)
	out := []set{
		l.bans("bans4", false, false), l.bans("nets4", false, true),
		l.bans("bans6", true, false), l.bans("nets6", true, true),
		prefixSet(l.name("allow4"), false, four), prefixSet(l.name("allow6"), true, six),
	}
	for _, base := range l.waivers() {
		for _, six := range []bool{false, true} {
			s := addressSet(l.name(base+familyOf(six)), six)
			s.interval, s.timeout = true, true
			out = append(out, s)
		}
	}
	if !l.config.Observe {
		out = append(out, set{name: l.name("classes"), key: typeMark, keyLen: 4, data: typeVerdict, dataLen: 16, order: orderHost})
	}
	if len(l.config.Exempt) > 0 {
		out = append(out, set{
			name: l.name("exempt"), key: typeInterface, keyLen: unix.IFNAMSIZ,
			interval: true, order: orderHost, spans: interfaceSpans(l.config.Exempt),
		})
	}
	for i, k := range l.config.Locks {
		out = append(out, set{name: l.lock(i, "ports"), key: typePort, keyLen: 2, interval: true, order: orderBig, spans: portSpans(k.Ports)})
		from4, from6 := prefixSpans(k.From)
		out = append(out, prefixSet(l.lock(i, "from4"), false, from4), prefixSet(l.lock(i, "from6"), true, from6))
		to4, to6 := prefixSpans(k.To)
		if len(to4) > 0 {
			out = append(out, prefixSet(l.lock(i, "to4"), false, to4))
		}
		if len(to6) > 0 {
			out = append(out, prefixSet(l.lock(i, "to6"), true, to6))
		}
	}
	return out
}

func (l *layout) lock(i int, part string) string {
	return l.name("lock" + strconv.Itoa(i) + "-" + part)
}

// chain is a chain with its rules; hook is -1 for one that others jump to.
type chain struct {
	name     string
	hook     int
	priority int32
	nat      bool // translates
	rules    []exprs
}

// hooks are the kernel's numbers in the family inet, and the names of chains.
var hooks = map[Point]struct {
	number int
	name   string
}{Prerouting: {0, "prerouting"}, Input: {1, "input"}, Forward: {2, "forward"}}

// baseChains hook the generation up. The first rule of each carries the comment.
func (l *layout) baseChains() []chain {
	base, _ := l.points()
	return base
}

// points are the chains at each point, and those that packets of IPv6 go on to
// from there: a packet is asked its family once in each, because that is much of
// what a clean one pays.
func (l *layout) points() (base, six []chain) {
	c := l.config
	add := func(point chain, name string, first []exprs, rules func(six bool) []exprs) {
		other := chain{name: l.name(name + "6"), hook: -1, rules: rules(true)}
		goes := rule(isFamily(true), exprs{&expr.Verdict{Kind: expr.VerdictGoto, Chain: other.name}})
		point.name, point.rules = l.name(name), slices.Concat(first, []exprs{goes}, rules(false))
		base, six = append(base, point), append(six, other)
	}
	for _, p := range c.Points {
		hook := hooks[p]
		late := chain{hook: hook.number, priority: c.Priority}
		// The first chain counts, so that each packet is seen once.
		seen := func(six bool) exprs { return counter(counterName(Seen, "", six)) }
		source := func(six bool) exprs { return jump("source"+familyOf(six), l) }
		switch {
		case c.Observe:
			// There the look-up counts, so exempt packets leave before it; see chains.
			add(late, hook.name, l.exempt(expr.MetaKeyIIFNAME, nil), func(six bool) []exprs {
				return []exprs{seen(six), rule(isReply, accept), source(six)}
			})
		case c.DropReplies:
			late.priority = c.SYNPriority
			add(late, hook.name, nil, func(six bool) []exprs { return []exprs{seen(six), source(six)} })
		case p == Prerouting:
			add(chain{hook: hook.number, priority: c.SYNPriority}, hook.name+"-syn", nil, func(six bool) []exprs {
				return []exprs{seen(six), rule(isSYN, source(six))}
			})
			// What opens a connection has been asked about there.
			add(late, hook.name, []exprs{rule(isReply, accept), rule(isSYN, accept)}, func(six bool) []exprs { return []exprs{source(six)} })
		default:
			add(late, hook.name, nil, func(six bool) []exprs {
				return []exprs{seen(six), rule(isReply, accept), source(six)}
			})
		}
		if l.tellsReplies() {
			hook := resumeHooks[p]
			base = append(base, chain{
				name: l.name(hook.name), hook: hook.number, priority: defaultPriority,
				rules: []exprs{rule(isNew, notSYN, jump("resumed", l))},
			})
		}
	}
	return base, six
}

// resumeHooks are where packets leave that a point's answer.
var resumeHooks = map[Point]struct {
	number int
	name   string
}{Prerouting: {4, "postrouting"}, Input: {3, "output"}, Forward: {2, "forward-out"}}

// tellsReplies reports whether replies of banned addresses pass, and so whether
// one has to be told from what only looks like one: a banned peer resets its
// connection, connection tracking soon forgets it, and takes the next segment
// that we send again for the first of one that we opened. Such a segment, in the
// middle of a connection that nobody knows, does not leave for who is banned.
func (l *layout) tellsReplies() bool { return !l.config.Observe && !l.config.DropReplies }

// chains are those that the base chains lead to. A packet that "source4"
// or "source6" does not send on has come to the base chain's end, and passes.
func (l *layout) chains() []chain {
	_, out := l.points()
	for _, six := range []bool{false, true} {
		out = append(out, l.source(six))
	}
	if l.config.Observe {
		observed := chain{name: l.name("observed"), hook: -1}
		observed.rules = append(l.logging("banned"), l.verdict()...)
		out = append(out, observed)
	} else {
		// That an interface is exempt is asked after a hit: nearly all packets
		// miss, and to compare a name costs more than to look for an address.
		banned := chain{name: l.name("banned"), hook: -1, rules: l.exempt(expr.MetaKeyIIFNAME, noMark)}
		for _, six := range []bool{false, true} {
			// The mark was nothing, most likely: this is before all who use it.
			banned.rules = append(banned.rules, rule(
				addressIn(six, l.name(allowOf(six)), false),
				counter(counterName(Protected, "", six)), noMark, accept),
				rule(addressIn(six, l.name(waiveBans+familyOf(six)), false),
					counter(counterName(Waived, "", six)), noMark, accept))
		}
		banned.rules = append(banned.rules, rule(isNeighbour, noMark, accept))
		banned.rules = append(banned.rules, rule(exprs{
			&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
			&expr.Lookup{SourceRegister: 1, DestRegister: 0, IsDestRegSet: true, SetName: l.name("classes")},
		}))
		banned.rules = append(banned.rules, l.count(Unclassified, "")...)
		banned.rules = append(banned.rules, l.verdict()...)
		out = append(out, banned)
		if l.tellsReplies() {
			out = append(out, l.resumed()...)
		}
	}
	for i := range l.config.Locks {
		closed := chain{name: l.lock(i, "closed"), hook: -1, rules: l.exempt(expr.MetaKeyIIFNAME, nil)}
		for _, six := range []bool{false, true} {
			closed.rules = append(closed.rules,
				rule(addressIn(six, l.name(allowOf(six)), false), counter(counterName(Protected, "", six)), accept),
				rule(addressIn(six, l.name(waiveLocks+familyOf(six)), false), counter(counterName(Waived, "", six)), accept))
		}
		name := l.config.Locks[i].Name
		closed.rules = append(closed.rules, l.count(Locked, name)...)
		closed.rules = append(closed.rules, l.logging("lock "+name)...)
		closed.rules = append(closed.rules, l.verdict()...)
		out = append(out, closed)
	}
	return out
}

// source asks for the source of a packet of one family. Each rule names the family
// again, because nft cannot read a listing otherwise.
func (l *layout) source(six bool) chain {
	out := chain{name: l.name("source" + familyOf(six)), hook: -1}
	if l.config.Observe {
		out.rules = append(out.rules,
			rule(addressIn(six, l.name(allowOf(six)), false), accept),
			rule(addressIn(six, l.name(waiveBans+familyOf(six)), false), accept))
		if six {
			out.rules = append(out.rules, rule(isNeighbour, accept))
		}
	}
	out.rules = append(out.rules, l.ask("bans", six))
	if l.asksRanges() {
		out.rules = append(out.rules, l.ask("nets", six))
	}
	for i := range l.config.Locks {
		out.rules = append(out.rules, l.lockRules(i, six)...)
	}
	return out
}

// ask sends packets on whose source a map of bans holds.
func (l *layout) ask(base string, six bool) exprs {
	if l.config.Observe {
		return rule(isFamily(six), address(six, true), exprs{objectMap{l.name(base + familyOf(six))}}, jump("observed", l))
	}
	return l.classOf(base+familyOf(six), six, true, "banned")
}

// asksRanges reports whether ranges are asked for from the start, as they have to
// be before locks. Otherwise that is the last rule of all, and comes with the first
// range: where there is none, clean packets do not pay for it.
func (l *layout) asksRanges() bool { return len(l.config.Locks) > 0 }

// resumed stops what would resume a connection to a banned address. Who is not to
// be stopped is asked first, unlike in "banned": so a packet that passes keeps its
// mark, which is the only place where nft lets a map be asked. Few packets come
// here.
func (l *layout) resumed() []chain {
	look := chain{name: l.name("resumed"), hook: -1, rules: l.exempt(expr.MetaKeyOIFNAME, nil)}
	for _, six := range []bool{false, true} {
		for _, set := range []string{allowOf(six), waiveBans + familyOf(six)} {
			look.rules = append(look.rules, rule(
				isFamily(six), address(six, false), exprs{&expr.Lookup{SourceRegister: 1, SetName: l.name(set)}}, accept))
		}
	}
	for _, six := range []bool{false, true} {
		for _, base := range banMaps {
			look.rules = append(look.rules, l.classOf(base+familyOf(six), six, false, "resumed-banned"))
		}
	}
	stop := chain{name: l.name("resumed-banned"), hook: -1, rules: l.count(Resumed, "")}
	stop.rules = append(stop.rules, rule(exprs{&expr.Verdict{Kind: expr.VerdictDrop}}))
	return []chain{stop, look}
}

// classOf marks a packet whose address is in a map of bans with its class, and
// sends it on.
func (l *layout) classOf(base string, six, source bool, to string) exprs {
	return rule(isFamily(six), address(six, source),
		exprs{&expr.Lookup{SourceRegister: 1, DestRegister: 1, IsDestRegSet: true, SetName: l.name(base)}},
		setMark, jump(to, l))
}

// banMaps begin the names of the maps of bans, those that most packets ask first.
var banMaps = []string{"bans", "nets"}

func allowOf(six bool) string { return "allow" + familyOf(six) }

// familyOf ends the names of what is there for each family.
func familyOf(six bool) string {
	if six {
		return "6"
	}
	return "4"
}

// Sets of what is waived.
const (
	waiveBans  = "waive"
	waiveLocks = "open"
)

// waivers names those of l: without locks there is nothing to open.
func (l *layout) waivers() []string {
	if len(l.config.Locks) == 0 {
		return []string{waiveBans}
	}
	return []string{waiveBans, waiveLocks}
}

// lockRules lead packets of one family to a closed port of this machine, or of To,
// to the lock's chain.
func (l *layout) lockRules(i int, six bool) []exprs {
	var out []exprs
	port := exprs{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Lookup{SourceRegister: 1, SetName: l.lock(i, "ports")},
	}
	local := exprs{
		&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.NativeEndian.AppendUint32(nil, unix.RTN_LOCAL)},
	}
	spans, to6 := prefixSpans(l.config.Locks[i].To)
	if six {
		spans = to6
	}
	closed := exprs{&expr.Verdict{Kind: expr.VerdictGoto, Chain: l.lock(i, "closed")}}
	stranger := addressIn(six, l.lock(i, "from"+familyOf(six)), true)
	for _, proto := range []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		out = append(out, rule(isFamily(six), isProtocol(proto), port, stranger, local, closed))
		if len(spans) > 0 {
			dst := rule(address(six, false), exprs{&expr.Lookup{SourceRegister: 1, SetName: l.lock(i, "to"+familyOf(six))}})
			out = append(out, rule(isFamily(six), isProtocol(proto), port, stranger, dst, closed))
		}
	}
	return out
}

// classChain counts, logs and stops the packets of one class.
func (l *layout) classChain(c Class) chain {
	out := chain{name: l.classChainName(c.Mark), hook: -1}
	out.rules = append(out.rules, l.count(Banned, c.Name)...)
	out.rules = append(out.rules, l.logging(c.Name)...)
	out.rules = append(out.rules, l.verdict()...)
	return out
}

func (l *layout) classChainName(mark uint32) string {
	return l.name("class" + strconv.FormatUint(uint64(mark), 10))
}

// exempt lets packets pass that came in or go out (which is what key says) by an
// exempt interface, after what is to be done to them first.
func (l *layout) exempt(key expr.MetaKey, first exprs) []exprs {
	if len(l.config.Exempt) == 0 {
		return nil
	}
	return []exprs{rule(exprs{
		&expr.Meta{Key: key, Register: 1},
		&expr.Lookup{SourceRegister: 1, SetName: l.name("exempt")},
	}, first, accept)}
}

func (l *layout) count(k Kind, name string) []exprs {
	return []exprs{
		rule(isFamily(false), counter(counterName(k, name, false))),
		rule(isFamily(true), counter(counterName(k, name, true))),
	}
}

// logging writes what before each line: only the colon of "lists:" and the space
// of "lock " stay as they are of what nft may not read.
func (l *layout) logging(what string) []exprs {
	if l.config.Log == nil {
		return nil
	}
	did := "drop"
	switch {
	case l.config.Observe:
		did = "observe"
	case l.config.Action == Reject:
		did = "reject"
	}
	prefix := "edgeward " + did + " " + strings.NewReplacer(".3a", ":", ".20", " ").Replace(word(what))
	prefix = prefix[:min(len(prefix), maxPrefix-2)] + ": "
	log := &expr.Log{Key: 1 << unix.NFTA_LOG_PREFIX, Data: []byte(prefix)}
	if g := l.config.Log.Group; g != 0 {
		log.Key |= 1 << unix.NFTA_LOG_GROUP
		log.Group = g
	} else {
		log.Key |= 1 << unix.NFTA_LOG_LEVEL
		log.Level = expr.LogLevelInfo
	}
	limit := &expr.Limit{
		Type: expr.LimitTypePkts, Unit: expr.LimitTimeSecond,
		Rate: uint64(l.config.Log.PerSecond), Burst: l.config.Log.Burst,
	}
	return []exprs{rule(exprs{limit, log})}
}

func (l *layout) verdict() []exprs {
	switch {
	case l.config.Observe:
		return []exprs{rule(accept)}
	case l.config.Action == Reject:
		return []exprs{
			rule(isProtocol(unix.IPPROTO_TCP), exprs{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}),
			rule(exprs{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}}),
		}
	}
	return []exprs{rule(exprs{&expr.Verdict{Kind: expr.VerdictDrop}})}
}

// exprs are a rule or a part of one: expressions of the library, and objectMaps,
// which it does not have.
type exprs []any

// objectMap counts by the counter that a map holds for the key in register 1,
// and fails where it holds none.
type objectMap struct{ set string }

func rule(parts ...exprs) exprs { return slices.Concat(parts...) }

var accept = exprs{&expr.Verdict{Kind: expr.VerdictAccept}}

// isSYN is a segment that opens a connection: SYN without ACK. notSYN is another.
var (
	isSYN  = segment(expr.CmpOpEq)
	notSYN = segment(expr.CmpOpNeq)
)

func segment(op expr.CmpOp) exprs {
	return append(isProtocol(unix.IPPROTO_TCP),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{0x12}, Xor: []byte{0}},
		&expr.Cmp{Op: op, Register: 1, Data: []byte{0x02}},
	)
}

// isNew is the first packet of a connection, as far as connection tracking knows.
var isNew = exprs{
	&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
	&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binary.NativeEndian.AppendUint32(nil, expr.CtStateBitNEW), Xor: make([]byte, 4)},
	&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
}

// isNeighbour is IPv6 neighbour discovery, without which nobody on the link
// finds us, the protected neither. It does not come from further away: a router
// would have lowered its hop limit. IPv4 has ARP for that, which does not pass here.
var isNeighbour = append(append(isFamily(true), isProtocol(unix.IPPROTO_ICMPV6)...),
	&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 7, Len: 1},
	&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{255}},
	&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
	&expr.Cmp{Op: expr.CmpOpGte, Register: 1, Data: []byte{133}}, // router solicitation
	&expr.Cmp{Op: expr.CmpOpLte, Register: 1, Data: []byte{136}}, // neighbour advertisement
)

// isReply fails, as it should, for packets that belong to no connection.
var isReply = exprs{
	&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1},
	&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{1}},
}

var setMark = exprs{&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1}}

var noMark = append(exprs{&expr.Immediate{Register: 1, Data: make([]byte, 4)}}, setMark...)

func jump(to string, l *layout) exprs {
	return exprs{&expr.Verdict{Kind: expr.VerdictGoto, Chain: l.name(to)}}
}

func counter(name string) exprs {
	return exprs{&expr.Objref{Type: objectCounter, Name: name}}
}

func isFamily(six bool) exprs {
	proto := byte(unix.NFPROTO_IPV4)
	if six {
		proto = unix.NFPROTO_IPV6
	}
	return exprs{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
	}
}

func isProtocol(proto byte) exprs {
	return exprs{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
	}
}

// address loads the source or destination address of a packet whose family is
// known.
func address(six, source bool) exprs {
	p := &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4}
	if six {
		p.Offset, p.Len = 24, 16
	}
	if source {
		p.Offset -= p.Len
	}
	return exprs{p}
}

func addressIn(six bool, set string, invert bool) exprs {
	return rule(isFamily(six), address(six, true), exprs{&expr.Lookup{SourceRegister: 1, SetName: set, Invert: invert}})
}

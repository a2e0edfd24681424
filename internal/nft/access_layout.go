package nft

import (
	"encoding/binary"
	"slices"
	"strconv"
	"time"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// accessLayout is a generation of grants as the kernel is told it. Unlike with
// bans, the chains with hooks are there once and have no generation: what changes
// are their rules, which a packet meets all old or all new. Two chains would
// judge for a moment both, or, changed in one transaction, for a moment neither.
//
// A packet from the VPN goes this way, before any translation of its destination:
//
//	access (prerouting) → enter → from → its source's group → everyone
//	                        └ denied      each of them → granted
//
// A group's networks are looked up last, and fail where the destination is this
// machine's own, as the table of routes knows it.
//
// An answer to a peer goes this way, after translations are undone:
//
//	access-answers (postrouting) → leave → to → its destination's group, backwards
//	                                 └ revoked
//
// Either way a connection that was translated has to lead where it would if it were
// opened now.
//
// And all else that is on its way into the VPN by outward, from the chains at
// forward and output. What is for a peer and about to leave by another interface,
// as while the VPN's is away, goes nowhere.
type accessLayout struct {
	*grants
	generation uint32
}

// Limits of what is noted of packets, by family and by whether it was granted. To
// read a set takes quadratic time: these take some 0.05 s each where they are full.
const (
	attemptLimit    = 8192
	attemptLifetime = time.Hour // after the last packet
	sourceLimit     = 16384
	sourceLifetime  = 24 * time.Hour
	// The pairs by which a source is compared are of no use after their packet.
	pairLimit    = 16384
	pairLifetime = 10 * time.Second
)

// What everyone may open is opened so often by each source at most: pings and
// questions for names, each of which takes a place in the node's table of
// connections for half a minute, and all have one.
const (
	paceRate     = 100 // per second
	paceBurst    = 500
	paceLifetime = time.Minute
)

// The totals.
const (
	counterGranted = "granted"
	counterDenied  = "denied"
	counterRevoked = "revoked"
	counterUnasked = "unasked"
	counterForged  = "forged"
)

var accessCounters = []string{counterGranted, counterDenied, counterRevoked, counterUnasked, counterForged}

// Chains with hooks.
const (
	chainEnter     = "access"
	chainForward   = "access-forward"
	chainOutput    = "access-output"
	chainAnswers   = "access-answers"
	chainTranslate = "access-translate"
	chainMask      = "access-masquerade"
)

// accessHooks are the chains with hooks that are always there. Nothing comes
// after the first but translation and routing, and nothing before the last but
// what undoes translation (100). At output it is the translation of the
// destination (-100) that may turn a packet towards the VPN.
var accessHooks = []chain{
	{name: chainEnter, hook: 0, priority: -150},
	{name: chainForward, hook: 2, priority: 0},
	{name: chainOutput, hook: 3, priority: 0},
	{name: chainAnswers, hook: 4, priority: 150},
}

// natHooks are those that translate, there where they have something to do. The
// first comes before others of its kind (-100), such as those that take a port of
// every address of this machine.
var natHooks = []chain{
	{name: chainTranslate, hook: 0, priority: -110, nat: true},
	{name: chainMask, hook: 4, priority: 100, nat: true},
}

// noted are the sets into which packets write what they tried: sources alone,
// and sources with destinations; sources twice, as ownErrors tells; and sources with
// how often they opened what everyone may.
func noted() []set {
	var out []set
	for _, six := range []bool{false, true} {
		addr := uint32(typeIPv4)
		width := uint32(4)
		if six {
			addr, width = typeIPv6, 16
		}
		for _, what := range []string{"granted", "denied"} {
			out = append(out, set{
				name: what + familyOf(six), key: addr, keyLen: width, order: orderBig,
				dynamic: true, timeout: true, lifetime: sourceLifetime, size: sourceLimit,
			}, set{
				name: what + "-to" + familyOf(six), key: concat(addr, addr, typeProto, typePort), keyLen: 2*width + 8,
				dynamic: true, timeout: true, lifetime: attemptLifetime, size: attemptLimit,
			})
		}
		out = append(out, set{
			name: pairs(six), key: concat(addr, addr), keyLen: 2 * width,
			dynamic: true, timeout: true, lifetime: pairLifetime, size: pairLimit,
		}, set{
			name: paces(six), key: addr, keyLen: width, order: orderBig,
			dynamic: true, timeout: true, lifetime: paceLifetime, size: sourceLimit,
		})
	}
	return out
}

func pairs(six bool) string { return "pairs" + familyOf(six) }
func paces(six bool) string { return "paces" + familyOf(six) }

const typeProto = 12

// concat is nft's number of a type made of others.
func concat(types ...uint32) uint32 {
	var out uint32
	for _, t := range types {
		out = out<<6 | t
	}
	return out
}

func (l *accessLayout) name(base string) string {
	return base + "_" + strconv.FormatUint(uint64(l.generation), 10)
}

// part names what belongs to a group; everyone's is called by the kind alone.
func (l *accessLayout) part(kind, group string) string {
	if group != "" {
		kind += "-" + word(group)
	}
	return l.name(kind)
}

// hostMap and siteMap are from sources to the chains of their groups.
func (l *accessLayout) hostMap(six bool) set {
	s := addressSet(l.name("hosts"+familyOf(six)), six)
	s.data, s.dataLen = typeVerdict, 16
	return s
}

func (l *accessLayout) siteMap(six bool) set {
	s := addressSet(l.name("sites"+familyOf(six)), six)
	s.data, s.dataLen, s.interval = typeVerdict, 16, true
	return s
}

// sets are those of the generation, but for its groups' and the maps of sources.
func (l *accessLayout) sets() []set {
	var out []set
	for i, six := range []bool{false, true} {
		networks := addressSet(l.name("networks"+familyOf(six)), six)
		networks.interval, networks.spans = true, l.networks[i]
		targets := networks
		targets.name, targets.key, targets.keyLen = l.name("targets"+familyOf(six)), concat(networks.key, networks.key), 2*networks.keyLen
		targets.interval, targets.spans = false, l.targets(six)
		out = append(out, networks, targets)
		if len(l.outward[i]) > 0 {
			addr := networks.key
			out = append(out, set{
				name: l.name("outward" + familyOf(six)), key: concat(addr, addr, typeProto, typePort), keyLen: 2*networks.keyLen + 8,
				interval: true, fields: []uint32{networks.keyLen, networks.keyLen, 1, 2}, spans: l.outward[i],
			})
		}
	}
	return out
}

// groupSets are those of one group, without the empty ones.
func (l *accessLayout) groupSets(g *group) []set {
	var out []set
	for i, six := range []bool{false, true} {
		base := addressSet("", six)
		key, keyLen := concat(base.key, typeProto, typePort), base.keyLen+8
		if len(g.exact[i]) > 0 {
			out = append(out, set{
				name: l.part("ports"+familyOf(six), g.name), key: key, keyLen: keyLen,
				size: uint32(len(g.exact[i])), spans: g.exact[i],
			})
		}
		for _, part := range []struct {
			base  string
			spans []span
		}{{"ranges", g.boxes[i]}, {"wide", g.wide[i]}} {
			if len(part.spans) > 0 {
				out = append(out, set{
					name: l.part(part.base+familyOf(six), g.name), key: key, keyLen: keyLen,
					interval: true, fields: []uint32{base.keyLen, 1, 2}, spans: part.spans,
				})
			}
		}
		for _, part := range []struct {
			base  string
			spans []span
		}{{"echo", g.echo[i]}, {"wide-echo", g.wideEcho[i]}} {
			if len(part.spans) > 0 {
				base.name, base.interval, base.spans = l.part(part.base+familyOf(six), g.name), true, part.spans
				out = append(out, base)
			}
		}
	}
	return out
}

// groupChains are the way there and the way back of one group.
func (l *accessLayout) groupChains(g *group) []chain {
	there := chain{name: l.part("group", g.name), hook: -1, rules: []exprs{rule(isReply, l.leadTo(l.part("back", g.name)))}}
	back := chain{name: l.part("back", g.name), hook: -1}
	granted := l.leadTo(l.name("granted"))
	if g.name == "" {
		granted = l.leadTo(l.name("paced"))
	}
	for i, six := range []bool{false, true} {
		for _, kind := range []struct {
			base  string
			spans []span
			wide  bool
		}{{"ports", g.exact[i], false}, {"ranges", g.boxes[i], false}, {"wide", g.wide[i], true}} {
			if len(kind.spans) > 0 {
				look := exprs{&expr.Lookup{SourceRegister: 1, SetName: l.part(kind.base+familyOf(six), g.name)}}
				there.rules = append(there.rules, rule(isFamily(six), service(six, false), look, elsewhere(kind.wide, false), granted))
				back.rules = append(back.rules, rule(isFamily(six), service(six, true), look, elsewhere(kind.wide, true), accept))
			}
		}
		for _, kind := range []struct {
			base  string
			spans []span
			wide  bool
		}{{"echo", g.echo[i], false}, {"wide-echo", g.wideEcho[i], true}} {
			if len(kind.spans) > 0 {
				look := exprs{&expr.Lookup{SourceRegister: 1, SetName: l.part(kind.base+familyOf(six), g.name)}}
				there.rules = append(there.rules, rule(isFamily(six), isEcho(six, false), address(six, false), look, elsewhere(kind.wide, false), granted))
				back.rules = append(back.rules, rule(isFamily(six), isEcho(six, true), address(six, true), look, elsewhere(kind.wide, true), accept))
			}
		}
	}
	if g.name != "" {
		there.rules = append(there.rules, rule(l.leadTo(l.part("group", ""))))
		back.rules = append(back.rules, rule(l.leadTo(l.part("back", ""))))
		return []chain{there, back}
	}
	there.rules = append(there.rules, ownErrors(false)...)
	return []chain{there, back}
}

// elsewhere is, where a reach is wide, a destination, or backwards a source, that
// is none of this machine's addresses, nor one at which it hears as one of many.
func elsewhere(wide, back bool) exprs {
	if !wide {
		return nil
	}
	out := exprs{&expr.Fib{Register: 1, FlagDADDR: !back, FlagSADDR: back, ResultADDRTYPE: true}}
	for _, typ := range []uint32{unix.RTN_LOCAL, unix.RTN_BROADCAST, unix.RTN_ANYCAST, unix.RTN_MULTICAST} {
		out = append(out, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binary.NativeEndian.AppendUint32(nil, typ)})
	}
	return out
}

// isError is what tells of trouble with a connection: that its way takes no more
// than so many bytes, for one.
func isError(six bool) []exprs {
	var out []exprs
	for _, kinds := range errorTypes[six] {
		out = append(out, rule(isFamily(six), inState(expr.CtStateBitRELATED), isICMP(six, kinds[0], kinds[1])))
	}
	return out
}

// ownErrors lets a peer tell of trouble with connections of its own, which it
// opened, or, asked, with those that were opened towards it. For connection
// tracking an error belongs to the connection that it speaks of, whoever sent it;
// so the sender has to be an end of that. The kernel cannot compare the two, but
// can look for a pair of them where the sender has just written itself down twice.
func ownErrors(asked bool) []exprs {
	var out []exprs
	for _, six := range []bool{false, true} {
		first := address(six, true)[0].(*expr.Payload)
		regs := registers(first.Len, first.Len)
		again := *first
		again.DestRegister = regs[1]
		end := &expr.Ct{Key: expr.CtKeySRCIP, Register: regs[1], OptDirection: true, Direction: expr.CtDirOriginal}
		if six {
			end.Key = expr.CtKeySRCIP6
		}
		var when exprs
		if asked {
			when, end.Direction = isReply, expr.CtDirReply
		}
		for _, told := range isError(six) {
			out = append(out,
				rule(when, told, exprs{first, &again, &expr.Dynset{SrcRegKey: 1, SetName: pairs(six), Operation: unix.NFT_DYNSET_OP_UPDATE}}),
				rule(when, told, exprs{first, end, &expr.Lookup{SourceRegister: 1, SetName: pairs(six)}}, accept))
		}
	}
	return out
}

// chains are those of the generation that no group has, those that are led to
// first.
func (l *accessLayout) chains() []chain {
	drop := rule(exprs{&expr.Verdict{Kind: expr.VerdictDrop}})
	// The kernel sends but one ICMP error a second to the same address, after the
	// first six; a page that opens more connections would hang on the rest.
	refuse := []exprs{
		rule(isProtocol(unix.IPPROTO_TCP), exprs{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}),
		rule(exprs{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}}),
	}

	granted := chain{name: l.name("granted"), hook: -1, rules: []exprs{rule(inState(expr.CtStateBitESTABLISHED), accept)}}
	granted.rules = append(granted.rules, note("granted")...)
	granted.rules = append(granted.rules, rule(counter(counterGranted)), rule(accept))

	denied := chain{name: l.name("denied"), hook: -1, rules: note("denied")}
	denied.rules = append(append(denied.rules, rule(counter(counterDenied))), refuse...)

	paced := chain{name: l.name("paced"), hook: -1, rules: []exprs{rule(inState(expr.CtStateBitESTABLISHED), accept)}}
	for _, six := range []bool{false, true} {
		paced.rules = append(paced.rules, rule(isFamily(six), address(six, true), exprs{&expr.Dynset{
			SrcRegKey: 1, SetName: paces(six), Operation: unix.NFT_DYNSET_OP_UPDATE,
			Exprs: []expr.Any{&expr.Limit{Type: expr.LimitTypePkts, Rate: paceRate, Unit: expr.LimitTimeSecond, Burst: paceBurst, Over: true}},
		}}, counter(counterDenied), drop))
	}
	paced.rules = append(paced.rules, rule(l.leadTo(granted.name)))

	from := chain{name: l.name("from"), hook: -1}
	if l.answers {
		// Where it goes on into the VPN, it is judged as an answer.
		from.rules = append(from.rules, rule(isReply, inState(expr.CtStateBitESTABLISHED), accept))
		from.rules = append(from.rules, ownErrors(true)...)
	}
	to := chain{name: l.name("to"), hook: -1}
	for _, six := range []bool{false, true} {
		for _, m := range []set{l.hostMap(six), l.siteMap(six)} {
			look := exprs{&expr.Lookup{SourceRegister: 1, DestRegister: 0, IsDestRegSet: true, SetName: m.name}}
			from.rules = append(from.rules, rule(isFamily(six), address(six, true), look))
			to.rules = append(to.rules, rule(isFamily(six), address(six, false), look))
		}
	}
	enter := chain{name: l.name("enter"), hook: -1, rules: []exprs{
		rule(exprs{&expr.Verdict{Kind: expr.VerdictJump, Chain: from.name}}), rule(l.leadTo(denied.name))}}
	// That a connection is over, or that it fails, is told to whom it was refused.
	leave := chain{name: l.name("leave"), hook: -1, rules: []exprs{
		rule(exprs{&expr.Verdict{Kind: expr.VerdictJump, Chain: to.name}}), rule(isReset, accept)}}
	for _, six := range []bool{false, true} {
		for _, told := range isError(six) {
			leave.rules = append(leave.rules, rule(told, accept))
		}
	}
	leave.rules = append(leave.rules, rule(counter(counterRevoked)), drop)

	// This machine speaks to itself by loopback, from any of its addresses.
	forged := chain{name: l.name("forged"), hook: -1, rules: []exprs{
		rule(isInterface(expr.MetaKeyIIFNAME, "lo"), accept), rule(counter(counterForged)), drop}}

	outward := chain{name: l.name("outward"), hook: -1, rules: []exprs{
		rule(clampMSS),
		rule(isReply, accept), // and judged at access-answers
		rule(isInterface(expr.MetaKeyIIFNAME, l.frame.Interface), accept), // which judged it when it came in
	}}
	for i, six := range []bool{false, true} {
		if len(l.outward[i]) > 0 {
			outward.rules = append(outward.rules, rule(isFamily(six), flow(six, true),
				exprs{&expr.Lookup{SourceRegister: 1, SetName: l.name("outward" + familyOf(six))}}, accept))
		}
	}
	outward.rules = append(append(outward.rules, rule(counter(counterUnasked))), refuse...)

	// While the VPN is not there, what is for its peers has no other way.
	astray := chain{name: l.name("astray"), hook: -1, rules: []exprs{
		rule(isInterface(expr.MetaKeyOIFNAME, "lo"), accept), rule(counter(counterUnasked)), drop}}

	clamp := chain{name: l.name("clamp"), hook: -1, rules: []exprs{rule(clampMSS)}}
	return []chain{granted, denied, paced, from, to, enter, leave, forged, outward, astray, clamp}
}

// hookRules are those of the chains with hooks, by name of these.
func (l *accessLayout) hookRules() map[string][]exprs {
	comes, goes := isInterface(expr.MetaKeyIIFNAME, l.frame.Interface), isInterface(expr.MetaKeyOIFNAME, l.frame.Interface)
	out := map[string][]exprs{
		chainEnter:   {rule(comes, l.leadTo(l.name("enter")))},
		chainForward: {rule(comes, exprs{&expr.Verdict{Kind: expr.VerdictJump, Chain: l.name("clamp")}})},
	}
	for _, six := range []bool{false, true} {
		outdated := l.outdated(six)
		out[chainForward] = append(out[chainForward],
			rule(comes, isOriginal, outdated, isProtocol(unix.IPPROTO_TCP), exprs{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}),
			rule(comes, isOriginal, outdated, exprs{&expr.Verdict{Kind: expr.VerdictDrop}}))
		out[chainAnswers] = append(out[chainAnswers], rule(goes, isReply, outdated, exprs{&expr.Verdict{Kind: expr.VerdictDrop}}))
	}
	out[chainAnswers] = append(out[chainAnswers], rule(goes, isReply, l.leadTo(l.name("leave"))))
	for _, six := range []bool{false, true} {
		out[chainEnter] = append(out[chainEnter], rule(addressIn(six, l.name("networks"+familyOf(six)), false), l.leadTo(l.name("forged"))))
		for _, kinds := range errorTypes[six] {
			// Such as that something was refused here.
			out[chainOutput] = append(out[chainOutput], rule(goes, isFamily(six), isICMP(six, kinds[0], kinds[1]), accept))
		}
	}
	out[chainForward] = append(out[chainForward], rule(goes, l.leadTo(l.name("outward"))))
	out[chainOutput] = append(out[chainOutput], rule(goes, l.leadTo(l.name("outward"))))
	for _, six := range []bool{false, true} {
		strays := rule(isFamily(six), address(six, false), exprs{&expr.Lookup{SourceRegister: 1, SetName: l.name("networks" + familyOf(six))}}, l.leadTo(l.name("astray")))
		for _, hook := range []string{chainForward, chainOutput} {
			out[hook] = append(out[hook], strays)
		}
	}
	for _, t := range l.frame.Translate {
		out[chainTranslate] = append(out[chainTranslate], rule(comes, translation(t)))
	}
	if l.frame.Masquerade {
		out[chainMask] = []exprs{rule(comes, isNotInterface(expr.MetaKeyOIFNAME, l.frame.Interface), exprs{&expr.Masq{}})}
	}
	return out
}

// targets are the addresses at which something is translated, with where it goes.
func (l *accessLayout) targets(six bool) []span {
	var out []span
	for _, t := range l.frame.Translate {
		if t.At.Is6() == six {
			pair := slices.Concat(t.At.AsSlice(), t.To.AsSlice())
			out = append(out, span{pair, pair})
		}
	}
	slices.SortFunc(out, func(a, b span) int { return slices.Compare(a.from, b.from) })
	return slices.CompactFunc(out, func(a, b span) bool { return slices.Equal(a.from, b.from) })
}

// outdated is a packet of a connection whose destination, an address of the VPN, was
// translated to what it would not be any more. Of other addresses the cluster's proxy
// may translate some ports, and we the rest.
func (l *accessLayout) outdated(six bool) exprs {
	asked := &expr.Ct{Key: expr.CtKeyDSTIP, Register: 1, OptDirection: true, Direction: expr.CtDirOriginal}
	got := &expr.Ct{Key: expr.CtKeySRCIP, OptDirection: true, Direction: expr.CtDirReply}
	width := uint32(4)
	if six {
		asked.Key, got.Key, width = expr.CtKeyDSTIP6, expr.CtKeySRCIP6, 16
	}
	got.Register = registers(width, width)[1]
	return rule(isFamily(six), exprs{
		&expr.Ct{Key: expr.CtKeySTATUS, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binary.NativeEndian.AppendUint32(nil, isTranslated), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
		asked, &expr.Lookup{SourceRegister: 1, SetName: l.name("networks" + familyOf(six))},
		asked, got, &expr.Lookup{SourceRegister: 1, SetName: l.name("targets" + familyOf(six)), Invert: true},
	})
}

// isTranslated is the bit of a connection's status that says that its destination
// was.
const isTranslated = 1 << 5

// isOriginal is on the way on which its connection was opened.
var isOriginal = exprs{
	&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1},
	&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0}},
}

func (l *accessLayout) leadTo(chain string) exprs {
	return exprs{&expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}}
}

// note writes down a packet: its source, and its source and destination. Where a
// set is full, the rule fails and no more.
func note(what string) []exprs {
	var out []exprs
	write := func(name string) exprs {
		return exprs{&expr.Dynset{SrcRegKey: 1, SetName: name, Operation: unix.NFT_DYNSET_OP_UPDATE, Exprs: []expr.Any{&expr.Counter{}}}}
	}
	for _, six := range []bool{false, true} {
		out = append(out, rule(isFamily(six), address(six, true), write(what+familyOf(six))))
		to := what + "-to" + familyOf(six)
		for _, proto := range []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
			out = append(out, rule(isFamily(six), isProtocol(proto), flow(six, true), write(to)))
		}
		out = append(out, rule(isFamily(six), isNotProtocol(unix.IPPROTO_TCP), isNotProtocol(unix.IPPROTO_UDP), flow(six, false), write(to)))
	}
	return out
}

// registers returns those of fields one after another: a key's.
func registers(widths ...uint32) []uint32 {
	var out []uint32
	at := uint32(0)
	for _, w := range widths {
		r := unix.NFT_REG32_00 + at/4
		if at%16 == 0 {
			r = unix.NFT_REG_1 + at/16 // as nft calls it
		}
		out = append(out, r)
		at += (w + 3) &^ 3
	}
	return out
}

// service loads a key of address, protocol and port: those that a packet is for,
// or, backwards, those that an answer is from.
func service(six, back bool) exprs {
	a := address(six, back)[0].(*expr.Payload)
	regs := registers(a.Len, 1, 2)
	port := &expr.Payload{DestRegister: regs[2], Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}
	if back {
		port.Offset = 0
	}
	return exprs{a, &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: regs[1]}, port}
}

// flow loads a key of source, destination, protocol and port; without a port, as
// zero.
func flow(six, hasPort bool) exprs {
	from, to := address(six, true)[0].(*expr.Payload), address(six, false)[0].(*expr.Payload)
	regs := registers(from.Len, to.Len, 1, 2)
	to.DestRegister = regs[1]
	out := exprs{from, to, &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: regs[2]}}
	if hasPort {
		return append(out, &expr.Payload{DestRegister: regs[3], Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2})
	}
	return append(out, &expr.Immediate{Register: regs[3], Data: []byte{0, 0}})
}

// isReset is a TCP segment that ends a connection at once.
var isReset = append(isProtocol(unix.IPPROTO_TCP),
	&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
	&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{0x04}, Xor: []byte{0}},
	&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{0}},
)

func inState(bit uint32) exprs {
	return exprs{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binary.NativeEndian.AppendUint32(nil, bit), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

func isInterface(key expr.MetaKey, name string) exprs {
	return compareInterface(key, name, expr.CmpOpEq)
}

func isNotInterface(key expr.MetaKey, name string) exprs {
	return compareInterface(key, name, expr.CmpOpNeq)
}

func compareInterface(key expr.MetaKey, name string, op expr.CmpOp) exprs {
	padded := make([]byte, unix.IFNAMSIZ)
	copy(padded, name)
	return exprs{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: padded}}
}

func isNotProtocol(proto byte) exprs {
	return exprs{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{proto}},
	}
}

// isICMP is ICMP or ICMPv6 of the types from first to last.
func isICMP(six bool, first, last byte) exprs {
	proto := byte(unix.IPPROTO_ICMP)
	if six {
		proto = unix.IPPROTO_ICMPV6
	}
	out := append(isProtocol(proto), &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1})
	if first == last {
		return append(out, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{first}})
	}
	return append(out,
		&expr.Cmp{Op: expr.CmpOpGte, Register: 1, Data: []byte{first}},
		&expr.Cmp{Op: expr.CmpOpLte, Register: 1, Data: []byte{last}})
}

// isEcho is a ping, or an answer to one.
func isEcho(six, back bool) exprs {
	typ := map[[2]bool]byte{{false, false}: 8, {false, true}: 0, {true, false}: 128, {true, true}: 129}[[2]bool{six, back}]
	return isICMP(six, typ, typ)
}

// errorTypes are the types of ICMP by which errors are told, as ranges: that
// something is unreachable, too big, has gone around too long, or is malformed.
var errorTypes = map[bool][][2]byte{false: {{3, 3}, {11, 12}}, true: {{1, 4}}}

// clampMSS keeps what a TCP connection says that it can take to what its way can
// carry, both ways: the VPN's packets are smaller than those around it.
var clampMSS = append(append(isProtocol(unix.IPPROTO_TCP),
	&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
	&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{0x06}, Xor: []byte{0}}, // SYN, RST
	&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0x02}}),
	&expr.Rt{Register: 1, Key: expr.RtTCPMSS},
	&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 2, Size: 2},
	&expr.Exthdr{SourceRegister: 1, Type: 2, Offset: 2, Len: 2, Op: expr.ExthdrOpTcpopt},
)

func translation(t Translation) exprs {
	six := t.At.Is6()
	family := uint32(unix.NFPROTO_IPV4)
	if six {
		family = unix.NFPROTO_IPV6
	}
	out := append(isFamily(six), address(six, false)...)
	out = append(out, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: t.At.AsSlice()})
	if t.Proto != 0 {
		first, last := binary.BigEndian.AppendUint16(nil, t.First), binary.BigEndian.AppendUint16(nil, t.Last)
		out = append(append(out, isProtocol(byte(t.Proto))...), &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2})
		if t.First == t.Last {
			out = append(out, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: first})
		} else {
			out = append(out, &expr.Range{Op: expr.CmpOpEq, Register: 1, FromData: first, ToData: last})
		}
	}
	out = append(out, &expr.Immediate{Register: 1, Data: t.To.AsSlice()})
	nat := &expr.NAT{Type: expr.NATTypeDestNAT, Family: family, RegAddrMin: 1}
	if t.Port != 0 {
		nat.RegProtoMin = 2
		out = append(out, &expr.Immediate{Register: 2, Data: binary.BigEndian.AppendUint16(nil, t.Port)})
	}
	return append(out, nat)
}

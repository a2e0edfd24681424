package nft

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// grants are an Access in the form in which the kernel is told it. Equal ones
// give the same ruleset.
type grants struct {
	// shape names all that is not sources and groups.
	shape string
	// frame holds what shape stands for; its Sources and Groups are empty.
	frame    Access
	networks [2][]span // by family, IPv4 first, as everywhere here
	hosts    [2][]host // sorted
	sites    [2][]site // sorted, disjoint
	groups   []group   // sorted by name
	everyone group     // without a name
	outward  [2][]span // boxes of source, destination, protocol and port
	answers  bool      // as answered tells
}

// host is the address of a peer, and where its packets are judged.
type host struct {
	addr  netip.Addr
	group string
}

// site is a piece of a network behind a peer. Nested networks are cut up, so
// that the kernel, which knows no longest prefix, need not choose.
type site struct {
	from, to netip.Addr
	group    string
}

// group is what a Group comes to.
type group struct {
	name string
	// exact are keys of destination, protocol and port that are looked up by
	// hash, boxes are intervals of the same, and echo are addresses that may be
	// pinged. All these are of single addresses, which may be this machine's.
	exact [2][]span
	boxes [2][]span
	echo  [2][]span
	// wide and wideEcho are of networks, in which this machine's are not meant.
	wide     [2][]span
	wideEcho [2][]span
}

func (g *group) equal(other *group) bool {
	same := func(a, b [2][]span) bool {
		for i := range a {
			if !slices.EqualFunc(a[i], b[i], func(a, b span) bool { return slices.Equal(a.from, b.from) && slices.Equal(a.to, b.to) }) {
				return false
			}
		}
		return true
	}
	return g.name == other.name && same(g.exact, other.exact) && same(g.boxes, other.boxes) && same(g.echo, other.echo) &&
		same(g.wide, other.wide) && same(g.wideEcho, other.wideEcho)
}

// compile brings a into the form for the kernel, whatever the order of its lists.
// It refuses what no kernel could do, or what makes no sense.
func (a Access) compile() (*grants, error) {
	if n := a.Interface; n == "" || len(n) >= unix.IFNAMSIZ || strings.ContainsAny(n, "*\x00/ \"") {
		return nil, fmt.Errorf("no interface is called %q", n)
	}
	g := &grants{frame: Access{Interface: a.Interface, Masquerade: a.Masquerade}}

	for _, p := range a.Networks {
		p, err := plain(p)
		if err != nil {
			return nil, fmt.Errorf("networks: %w", err)
		}
		g.frame.Networks = append(g.frame.Networks, p)
	}
	slices.SortFunc(g.frame.Networks, netip.Prefix.Compare)
	g.networks[0], g.networks[1] = prefixSpans(g.frame.Networks)

	for _, in := range a.Groups {
		if in.Name == "" {
			return nil, fmt.Errorf("a group has no name")
		}
		out, err := compileGroup(in.Name, in.Reach)
		if err != nil {
			return nil, fmt.Errorf("group %q: %w", in.Name, err)
		}
		g.groups = append(g.groups, out)
	}
	slices.SortFunc(g.groups, func(a, b group) int { return cmp.Compare(a.name, b.name) })
	for i := 1; i < len(g.groups); i++ {
		if g.groups[i].name == g.groups[i-1].name {
			return nil, fmt.Errorf("two groups are called %q", g.groups[i].name)
		}
	}
	if err := g.place(a.Sources); err != nil {
		return nil, err
	}
	var err error
	if g.everyone, err = compileGroup("", a.Everyone); err != nil {
		return nil, fmt.Errorf("everyone: %w", err)
	}
	g.frame.Everyone = slices.SortedFunc(slices.Values(a.Everyone), compareReach)

	g.frame.Outward = slices.SortedFunc(slices.Values(a.Outward), func(a, b Flow) int {
		return cmp.Or(a.From.Compare(b.From), compareReach(a.Reach, b.Reach))
	})
	if g.outward, err = compileFlows(a.Outward); err != nil {
		return nil, fmt.Errorf("outward: %w", err)
	}

	if g.frame.Translate, err = checkTranslations(a.Translate); err != nil {
		return nil, fmt.Errorf("translate: %w", err)
	}

	g.answers = g.answered()
	text, err := json.Marshal(struct {
		Access
		Answers bool
	}{g.frame, g.answers})
	if err != nil {
		panic(err) // numbers, names and addresses only
	}
	sum := sha256.Sum256(text)
	g.shape = hex.EncodeToString(sum[:8])
	return g, nil
}

// plain is p without the bits behind its length, and as one of IPv4 if it is
// mapped.
func plain(p netip.Prefix) (netip.Prefix, error) {
	if !p.IsValid() || p.Addr().Zone() != "" {
		return p, fmt.Errorf("no network: %v", p)
	}
	if a := p.Addr(); a.Is4In6() {
		if p.Bits() < 96 {
			return p, fmt.Errorf("no network: %v: it is of IPv4 and IPv6", p)
		}
		p = netip.PrefixFrom(a.Unmap(), p.Bits()-96)
	}
	return p.Masked(), nil
}

func familyIndex(a netip.Addr) int {
	if a.Is6() {
		return 1
	}
	return 0
}

// place sorts sources into hosts and sites.
func (g *grants) place(sources []Source) error {
	known := map[string]bool{"": true}
	for _, group := range g.groups {
		known[group.name] = true
	}
	var networks [2][]Source
	g.hosts[0], g.hosts[1] = make([]host, 0, len(sources)), make([]host, 0, len(sources))
	for _, s := range sources {
		p, err := plain(s.Prefix)
		if err != nil {
			return fmt.Errorf("source: %w", err)
		}
		if !known[s.Group] {
			return fmt.Errorf("source %v: there is no group %q", p, s.Group)
		}
		i := familyIndex(p.Addr())
		if p.IsSingleIP() {
			g.hosts[i] = append(g.hosts[i], host{p.Addr(), s.Group})
		} else {
			networks[i] = append(networks[i], Source{p, s.Group})
		}
	}
	for i := range networks {
		slices.SortFunc(g.hosts[i], func(a, b host) int { return a.addr.Compare(b.addr) })
		for n, h := range g.hosts[i] {
			if n > 0 && h.addr == g.hosts[i][n-1].addr {
				return fmt.Errorf("source %v is there twice", h.addr)
			}
		}
		slices.SortFunc(networks[i], compareSource)
		for n, s := range networks[i] {
			if n > 0 && s.Prefix == networks[i][n-1].Prefix {
				return fmt.Errorf("source %v is there twice", s.Prefix)
			}
		}
		g.sites[i] = cut(networks[i])
	}
	return nil
}

// compareSource puts outer networks before inner ones.
func compareSource(a, b Source) int {
	return cmp.Or(a.Prefix.Addr().Compare(b.Prefix.Addr()), cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits()))
}

// cut returns the pieces into which networks of one family, sorted and all
// different, fall where the longest prefix counts.
func cut(networks []Source) []site {
	var out []site
	var open []site   // those around the place we are at
	var at netip.Addr // where the next piece begins; not valid behind the last address
	add := func(to netip.Addr, group string) {
		if at.IsValid() && at.Compare(to) <= 0 {
			out = append(out, site{at, to, group})
			at = to.Next()
		}
	}
	// leave ends the networks that end before a.
	leave := func(a netip.Addr) {
		for len(open) > 0 && (!a.IsValid() || open[len(open)-1].to.Less(a)) {
			top := open[len(open)-1]
			open = open[:len(open)-1]
			add(top.to, top.group)
		}
	}
	for _, n := range networks {
		from, to := n.Prefix.Addr(), lastOf(n.Prefix)
		leave(from)
		if len(open) > 0 && at.Less(from) {
			add(from.Prev(), open[len(open)-1].group)
		}
		at = from
		open = append(open, site{from, to, n.Group})
	}
	leave(netip.Addr{})
	return out
}

func lastOf(p netip.Prefix) netip.Addr {
	key := p.Addr().AsSlice()
	for i := p.Bits(); i < len(key)*8; i++ {
		key[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(key)
	return last
}

func compareReach(a, b Reach) int {
	return cmp.Or(a.To.Compare(b.To), cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.First, b.First), cmp.Compare(a.Last, b.Last))
}

func checkReach(r Reach) (Reach, error) {
	var err error
	if r.To, err = plain(r.To); err != nil {
		return r, err
	}
	return r, checkPorts(r.Proto, r.First, r.Last)
}

func checkPorts(proto Proto, first, last uint16) error {
	switch {
	case proto == Echo && first == 0 && last == 0:
	case proto == Echo:
		return fmt.Errorf("an echo has no ports")
	case proto != TCP && proto != UDP:
		return fmt.Errorf("no access is granted to protocol %d", proto)
	case first == 0 || last < first:
		return fmt.Errorf("no range of ports: %d to %d", first, last)
	}
	return nil
}

// few is up to how many ports of a single address are written one by one: to look
// something up by hash costs less than among intervals.
const few = 16

// portRange has both ends included; their type leaves room for one more.
type portRange struct{ first, last uint32 }

// compileGroup makes disjoint what reach grants: the kernel refuses overlaps.
func compileGroup(name string, reach []Reach) (group, error) {
	out := group{name: name}
	type key struct {
		to    netip.Prefix
		proto Proto
	}
	asked := map[key][]portRange{}
	var echo, wideEcho []netip.Prefix
	for _, r := range reach {
		r, err := checkReach(r)
		if err != nil {
			return out, err
		}
		switch {
		case r.Proto == Echo && r.To.IsSingleIP():
			echo = append(echo, r.To)
			continue
		case r.Proto == Echo:
			wideEcho = append(wideEcho, r.To)
			continue
		}
		k := key{r.To, r.Proto}
		asked[k] = append(asked[k], portRange{uint32(r.First), uint32(r.Last)})
	}
	out.echo[0], out.echo[1] = prefixSpans(echo)
	out.wideEcho[0], out.wideEcho[1] = prefixSpans(wideEcho)
	// Wider networks come before those in them.
	keys := slices.SortedFunc(maps.Keys(asked), func(a, b key) int {
		return cmp.Or(compareSource(Source{Prefix: a.to}, Source{Prefix: b.to}), cmp.Compare(a.proto, b.proto))
	})
	type network struct {
		netip.Prefix
		ranges []portRange // with those of the networks around it
	}
	around := map[Proto][]network{} // those around the place that we are at, the narrowest last
	for _, k := range keys {
		open := around[k.proto]
		for len(open) > 0 && !open[len(open)-1].Contains(k.to.Addr()) {
			open = open[:len(open)-1]
		}
		// What a wider network grants already is not said again, but for a single
		// address, which means this machine's too.
		ranges := union(asked[k])
		if all := ranges; !k.to.IsSingleIP() {
			if len(open) > 0 {
				wider := open[len(open)-1].ranges
				ranges, all = subtract(ranges, wider), union(slices.Concat(wider, ranges))
			}
			open = append(open, network{k.to, all})
		}
		around[k.proto] = open
		i := familyIndex(k.to.Addr())
		for _, r := range ranges {
			if k.to.IsSingleIP() && r.last-r.first < few {
				for port := r.first; port <= r.last; port++ {
					at := target(k.to.Addr(), k.proto, port)
					out.exact[i] = append(out.exact[i], span{at, at})
				}
				continue
			}
			box := span{target(k.to.Addr(), k.proto, r.first), target(lastOf(k.to), k.proto, r.last)}
			if k.to.IsSingleIP() {
				out.boxes[i] = append(out.boxes[i], box)
			} else {
				out.wide[i] = append(out.wide[i], box)
			}
		}
	}
	return out, nil
}

// union returns ranges as disjoint ones, sorted, that do not touch.
func union(ranges []portRange) []portRange {
	ranges = slices.SortedFunc(slices.Values(ranges), func(a, b portRange) int { return cmp.Compare(a.first, b.first) })
	var out []portRange
	for _, r := range ranges {
		if n := len(out); n > 0 && r.first <= out[n-1].last+1 {
			out[n-1].last = max(out[n-1].last, r.last)
			continue
		}
		out = append(out, r)
	}
	return out
}

// subtract returns what of from is not in less; both are unions.
func subtract(from, less []portRange) []portRange {
	var out []portRange
	for _, r := range from {
		for _, l := range less {
			if l.last < r.first || l.first > r.last {
				continue
			}
			if l.first > r.first {
				out = append(out, portRange{r.first, l.first - 1})
			}
			r.first = l.last + 1
		}
		if r.first <= r.last {
			out = append(out, r)
		}
	}
	return out
}

// target is a key of destination, protocol and port, each filled up to four
// bytes, as registers are.
func target(to netip.Addr, proto Proto, port uint32) []byte {
	key := append(to.AsSlice(), byte(proto), 0, 0, 0)
	return append(binary.BigEndian.AppendUint16(key, uint16(port)), 0, 0)
}

// compileFlows cuts up what overlaps; there are few.
func compileFlows(flows []Flow) ([2][]span, error) {
	bySource := map[netip.Prefix][]Reach{}
	for _, f := range flows {
		from, err := plain(f.From)
		if err != nil {
			return [2][]span{}, fmt.Errorf("from: %w", err)
		}
		r, err := checkReach(f.Reach)
		if err != nil {
			return [2][]span{}, err
		}
		if r.Proto == Echo {
			return [2][]span{}, fmt.Errorf("no pings")
		}
		if from.Addr().Is6() != r.To.Addr().Is6() {
			return [2][]span{}, fmt.Errorf("%v and %v are of different families", from, r.To)
		}
		bySource[from] = append(bySource[from], r)
	}
	// A narrow source may do what each wider one may.
	var sources []Source
	for from := range bySource {
		sources = append(sources, Source{Prefix: from})
	}
	var out [2][]span
	for i := range out {
		family := slices.DeleteFunc(slices.Clone(sources), func(s Source) bool { return familyIndex(s.Prefix.Addr()) != i })
		slices.SortFunc(family, compareSource)
		for _, piece := range cut(family) {
			var reach []Reach
			for from, rs := range bySource {
				if from.Contains(piece.from) {
					reach = append(reach, rs...)
				}
			}
			g, err := compileGroup("", reach)
			if err != nil {
				return out, err
			}
			for _, s := range slices.Concat(g.exact[i], g.boxes[i], g.wide[i]) {
				out[i] = append(out[i], span{slices.Concat(piece.from.AsSlice(), s.from), slices.Concat(piece.to.AsSlice(), s.to)})
			}
		}
	}
	return out, nil
}

func checkTranslations(list []Translation) ([]Translation, error) {
	out := slices.Clone(list)
	for i, t := range out {
		t.At, t.To = t.At.Unmap(), t.To.Unmap()
		out[i] = t
		switch {
		case !t.At.IsValid() || !t.To.IsValid() || t.At.Is6() != t.To.Is6() || t.At.Zone()+t.To.Zone() != "":
			return nil, fmt.Errorf("no addresses of one family: %v to %v", t.At, t.To)
		case t.To.IsLoopback() || t.To.IsUnspecified() || t.To.IsMulticast():
			return nil, fmt.Errorf("%v to %v: nothing that comes by a network gets there", t.At, t.To)
		case t.Proto == 0 && (t.First != 0 || t.Last != 0 || t.Port != 0):
			return nil, fmt.Errorf("%v to %v: ports without a protocol", t.At, t.To)
		case t.Proto == Echo:
			return nil, fmt.Errorf("%v to %v: pings go with the rest or not at all", t.At, t.To)
		case t.Proto != 0:
			if err := checkPorts(t.Proto, t.First, t.Last); err != nil {
				return nil, fmt.Errorf("%v to %v: %w", t.At, t.To, err)
			}
		}
	}
	// The rule that comes first counts: those with ports before those without.
	slices.SortFunc(out, func(a, b Translation) int {
		return cmp.Or(a.At.Compare(b.At), -cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.First, b.First), cmp.Compare(a.Last, b.Last))
	})
	for i := 1; i < len(out); i++ {
		if a, b := out[i-1], out[i]; a.At == b.At && a.Proto == b.Proto && b.First <= a.Last {
			return nil, fmt.Errorf("%v: two translations of protocol %d at port %d", a.At, a.Proto, b.First)
		}
	}
	return out, nil
}

// answered reports whether peers may answer at all: something may be opened
// towards one, from outside the VPN or from another peer. Otherwise nothing that
// comes from the VPN is an answer, whatever connection tracking thinks.
func (g *grants) answered() bool {
	if len(g.outward[0])+len(g.outward[1]) > 0 {
		return true
	}
	reaches := func(grp *group) bool {
		for i := range 2 {
			for _, list := range [][]span{grp.exact[i], grp.boxes[i], grp.echo[i], grp.wide[i], grp.wideEcho[i]} {
				if slices.ContainsFunc(list, func(s span) bool { return g.among(i, s) }) {
					return true
				}
			}
		}
		return false
	}
	return reaches(&g.everyone) || slices.ContainsFunc(g.groups, func(grp group) bool { return reaches(&grp) })
}

// among reports whether a peer is among the destinations of s.
func (g *grants) among(family int, s span) bool {
	width := 4 + 12*family
	from, _ := netip.AddrFromSlice(s.from[:width])
	to, _ := netip.AddrFromSlice(s.to[:width])
	n, _ := slices.BinarySearchFunc(g.hosts[family], from, func(h host, a netip.Addr) int { return h.addr.Compare(a) })
	m, _ := slices.BinarySearchFunc(g.sites[family], from, func(s site, a netip.Addr) int { return s.to.Compare(a) })
	return n < len(g.hosts[family]) && g.hosts[family][n].addr.Compare(to) <= 0 ||
		m < len(g.sites[family]) && g.sites[family][m].from.Compare(to) <= 0
}

package nft

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/google/go-cmp/cmp"
)

func TestLayoutNames(t *testing.T) {
	base := config()
	if base.Layout() != (Config{Exempt: []string{"cni*", "lo", "lo"}, Points: []Point{Prerouting}, Priority: -150}).Layout() {
		t.Error("equal Configs have different names")
	}
	seen := map[string]int{base.Layout(): -1}
	for i, c := range []Config{
		{}, {Exempt: []string{"lo"}}, {DropReplies: true}, {Observe: true}, {Action: Reject}, {Points: []Point{Input}},
		{Points: []Point{Input, Forward}}, {Priority: -100}, {SYNPriority: -310}, {Log: &Log{}}, {Log: &Log{Group: 2}},
		{Locks: []Lock{{Name: "web", Ports: []uint16{443}}}}, {Locks: []Lock{{Name: "web", Ports: []uint16{443}, From: clientNets}}},
	} {
		if j, ok := seen[c.Layout()]; ok {
			t.Errorf("Configs %d and %d have the same name", i, j)
		}
		seen[c.Layout()] = i
	}
}

func TestValidate(t *testing.T) {
	for _, tt := range []struct {
		config Config
		want   string
	}{
		{Config{}, ""},
		{Config{Priority: -50, SYNPriority: -1000, Exempt: []string{"lo", "cni*", "*", "abcdefghijklmno"}}, ""},
		{Config{Priority: -300, DropReplies: true}, ""},
		{Config{Priority: -300, Points: []Point{Forward}}, ""},
		{Config{Priority: -200}, "after connection tracking"},
		{Config{Points: []Point{7}}, "no such point"},
		{Config{Exempt: []string{""}}, "no interface is called"},
		{Config{Exempt: []string{"e*h"}}, "no interface is called"},
		{Config{Exempt: []string{"abcdefghijklmnop"}}, "no interface is called"},
		{Config{Locks: []Lock{{Ports: []uint16{1}}}}, "a lock's name"},
		{Config{Locks: []Lock{{Name: strings.Repeat("x", 201), Ports: []uint16{1}}}}, "a lock's name"},
		{Config{Locks: []Lock{{Name: "a", Ports: []uint16{1}}, {Name: "a", Ports: []uint16{2}}}}, "two locks"},
		{Config{Locks: []Lock{{Name: "a"}}}, "has no ports"},
		{Config{Locks: []Lock{{Name: "a", Ports: []uint16{1}, From: []netip.Prefix{{}}}}}, "invalid prefix"},
	} {
		got := ""
		if err := tt.config.Validate(); err != nil {
			got = err.Error()
		}
		if tt.want == "" && got != "" || !strings.Contains(got, tt.want) {
			t.Errorf("%+v: error %q, want %q", tt.config, got, tt.want)
		}
	}
}

func TestPrefixSpans(t *testing.T) {
	tests := []struct{ prefixes, want string }{
		{"", ""},
		{"10.0.0.0/8", "0a000000-0affffff"},
		{"10.1.2.3/8 10.0.0.0/9 11.0.0.0/8", "0a000000-0bffffff"},
		{"0.0.0.0/0 1.2.3.4/32", "00000000-ffffffff"},
		{"255.255.255.255/32 255.255.255.0/25 1.2.3.4/32", "01020304-01020304 ffffff00-ffffff7f ffffffff-ffffffff"},
		{"::ffff:1.2.3.0/120 1.2.3.4/32", "01020300-010203ff"},
		{"2001:db8::/127 ::1/128", "00000000000000000000000000000001-00000000000000000000000000000001 20010db8000000000000000000000000-20010db8000000000000000000000001"},
	}
	for _, tt := range tests {
		var prefixes []netip.Prefix
		for p := range strings.FieldsSeq(tt.prefixes) {
			prefixes = append(prefixes, prefix(p))
		}
		four, six := prefixSpans(prefixes)
		var got []string
		for _, s := range append(four, six...) {
			got = append(got, fmt.Sprintf("%x-%x", s.from, s.to))
		}
		if diff := cmp.Diff(tt.want, strings.Join(got, " ")); diff != "" {
			t.Errorf("%s: %s", tt.prefixes, diff)
		}
	}
}

func TestInterfaceSpans(t *testing.T) {
	in := func(spans []span, name string) bool {
		key := make([]byte, 16)
		copy(key, name)
		for _, s := range spans {
			if bytes.Compare(s.from, key) <= 0 && bytes.Compare(key, s.to) <= 0 {
				return true
			}
		}
		return false
	}
	spans := interfaceSpans([]string{"lo", "cni*", "cni0", "br-*", "wg0"})
	for name, want := range map[string]bool{
		"lo": true, "lo0": false, "l": false, "cni": true, "cni0": true, "cnixyz123456789": true, "cnh": false, "cnj": false,
		"br-1": true, "br": false, "wg0": true, "wg1": false, "eth0": false,
	} {
		if in(spans, name) != want {
			t.Errorf("%s is exempt: %t, want %t", name, !want, want)
		}
	}
	if !in(interfaceSpans([]string{"*"}), "eth0") {
		t.Error("* leaves eth0 out")
	}
}

// The union of intervals of single bytes, against a naive one.
func FuzzMerge(f *testing.F) {
	f.Add([]byte{1, 5, 3, 9, 11, 11, 10, 10, 0, 0, 250, 255})
	f.Add([]byte{0, 255, 7, 7})
	f.Fuzz(func(t *testing.T, data []byte) {
		var spans []span
		var want [256]bool
		for i := 0; i+1 < len(data); i += 2 {
			from, to := min(data[i], data[i+1]), max(data[i], data[i+1])
			spans = append(spans, span{[]byte{from}, []byte{to}})
			for k := int(from); k <= int(to); k++ {
				want[k] = true
			}
		}
		var got [256]bool
		last := -2
		for _, s := range merge(spans) {
			if int(s.from[0]) <= last+1 {
				t.Fatalf("interval %v touches the one before, which ends at %d", s, last)
			}
			last = int(s.to[0])
			for k := int(s.from[0]); k <= last; k++ {
				got[k] = true
			}
		}
		if got != want {
			t.Fatalf("union of %v is %v", data, merge(spans))
		}
	})
}

func FuzzNames(f *testing.F) {
	for _, s := range []string{"ban/CAPI", "ban/lists:firehol_level1", "ban/a.b c", "ban/é\x00", strings.Repeat("long:", 99), ".", "/ipv6"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if got := unescape(escape(name)); got != name {
			t.Fatalf("%q became %q and %q", name, escape(name), got)
		}
		if name == "" {
			return
		}
		for _, six := range []bool{false, true} {
			s := counterName(Banned, name, six)
			if len(s) > 255 || strings.ContainsAny(s, " \x00\"{};:") {
				t.Fatalf("counter %q", s)
			}
			k, got, is6, ok := parseCounter(s)
			if !ok || k != Banned || is6 != six || got != unescape(word(name)) {
				t.Fatalf("counter %q is %v %q %t %t", s, k, got, is6, ok)
			}
		}
		parseCounter(name)
		generationOf(name)
	})
}

// What the kernel says is taken apart without harm, whatever it is.
func FuzzAnswers(f *testing.F) {
	var b batch
	b.uint32(1, 7)
	b.string(3, "nft")
	f.Add(b.buf)
	b = batch{}
	list := b.nest(3)
	elem := b.nest(1)
	b.value(1, []byte{203, 0, 113, 66})
	b.value(2, []byte{1, 0, 0, 0})
	b.uint64(5, 1<<63)
	b.string(9, "banned/ban/CAPI/ipv4")
	b.close(elem)
	b.close(list)
	f.Add(b.buf)
	// A row of attempts.
	b = batch{}
	list = b.nest(3)
	elem = b.nest(1)
	b.value(1, append(pod6.AsSlice(), target(pod6, TCP, 80)...))
	counter := b.nest(unix.NFTA_SET_ELEM_EXPR)
	numbers := b.nest(unix.NFTA_EXPR_DATA)
	b.uint64(unix.NFTA_COUNTER_PACKETS, 7)
	b.close(numbers)
	b.close(counter)
	b.uint64(unix.NFTA_SET_ELEM_EXPIRATION, 1<<40)
	b.close(elem)
	b.close(list)
	f.Add(b.buf)
	f.Add([]byte{0, 5, 'h', 'e', 'l', 'l', 0})
	f.Add([]byte{4, 0, 3, 128})
	// A chain, a rule, a set and a counter, as they are sent and so answered.
	for _, write := range []func(*batch){
		func(b *batch) { b.newChain(chain{name: "prerouting_1", hook: 0, priority: -300}) },
		func(b *batch) { b.newRule("prerouting_1", rule(isSYN, accept), "edgeward layout 0") },
		func(b *batch) { b.newSet(set{name: "bans4_1", key: typeIPv4, keyLen: 4, timeout: true}) },
		func(b *batch) { b.newCounter(counterName(Banned, "ban/CAPI", true)) },
	} {
		b := batch{table: TableName}
		write(&b)
		f.Add(b.buf[headerLen:])
	}
	// An interface with an XDP program, and a filter.
	b = batch{buf: make([]byte, unix.SizeofIfInfomsg)}
	b.string(unix.IFLA_IFNAME, "eth0")
	xdp := b.nest(unix.IFLA_XDP)
	b.bytes(unix.IFLA_XDP_ATTACHED, []byte{2})
	b.close(xdp)
	f.Add(b.buf)
	b = batch{buf: make([]byte, tcMessage)}
	b.string(1, "bpf")
	f.Add(b.buf)
	f.Fuzz(func(t *testing.T, data []byte) {
		parseGeneration(data)
		var found Found
		if _, err := parseElement(data, &found); err == nil && found.Left < 0 {
			t.Fatalf("%v left", found.Left)
		}
		commentOf(data)
		parseFlowtable(data)
		parseTable(data)
		parseCounterObject(data)
		parseLink(data)
		parseFilter(data)
		parseDefault(data)
		parseNamedCounter(data)
		parseNoted(data, time.Hour, func(key []byte, a Attempt) error {
			if a.Ago < 0 {
				t.Fatalf("%v ago", a.Ago)
			}
			_, err := parseAttempt(key, a)
			return err
		})
		s := &state{generations: map[uint32]*generation{}}
		for _, lists := range [][3][][]byte{{{data}, nil, nil}, {nil, {data}, nil}, {nil, nil, {data}}} {
			if err := s.take(lists[0], lists[1], lists[2]); err != nil {
				continue
			}
			for _, g := range s.generations {
				for _, n := range g.counts {
					if n < 0 {
						t.Fatalf("%d elements", n)
					}
				}
			}
		}
	})
}

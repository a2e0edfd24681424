package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/edgeward/edgeward/bouncer"
	"github.com/edgeward/edgeward/internal/decision"
	"github.com/edgeward/edgeward/internal/nft"
	"github.com/edgeward/edgeward/test/benchmark/figures"
)

// layout is who shapes the table that a packet meets.
type layout int

const (
	none  layout = iota
	ours         // edgeward's, at prerouting
	peers        // one set for each origin, asked in turn, at input and forward
)

// variant is a table, in a world of its own.
type variant struct {
	layout  layout
	bans    int
	origins int
	ranges  int
}

// kind is a sort of packet.
type kind struct {
	name   string
	banned bool
	syn    bool
	inner  bool // to an address behind the node, forwarded
}

var kinds = []kind{
	{name: "clean UDP for the node"},
	{name: "clean UDP, forwarded", inner: true},
	{name: "clean TCP SYN, forwarded", syn: true, inner: true},
	{name: "banned UDP for the node", banned: true},
	{name: "banned TCP SYN, forwarded", banned: true, syn: true, inner: true},
}

// field is a variant, built, and the packets that meet it.
type field struct {
	variant
	world  *world
	frames [][][]byte        // by kind
	least  [][]time.Duration // by kind, for each batch of frames
}

// batch is how many packets are timed together: few enough that a machine with
// other work leaves them alone at one turn or another.
const batch = 256

// cost is that of a packet: each batch at its quickest.
func (f *field) cost(kind int) time.Duration {
	var all time.Duration
	for _, took := range f.least[kind] {
		all += took
	}
	return all / time.Duration(len(f.frames[kind]))
}

// packetGoal is the most that a clean packet may cost over no table.
const packetGoal = 700 * time.Nanosecond

func packetsPart(ctx context.Context, opts options) (text string, err error) {
	err = within(ctx, func(s *scope) error {
		fields, err := buildFields(s, opts)
		if err != nil {
			return err
		}
		if err := blast(s, opts, fields); err != nil {
			return err
		}
		text = packetsTable(fields, opts) + fmt.Sprintf(`
What a packet costs the processor that takes it in, over the same packet where no
table is: %s packets in batches of %d, each batch at its quickest in %d turns, the
tables taking turns. They are sent between namespaces over a veth pair, from as many
random addresses, with connection tracking on, as on a k3s node, which forgets them
between the tables' turns, because all share one table of connections. A second world without
a table shows how far alike things differ. "Ours" is the table of
edgeward-bouncer at prerouting with its usual options; "the peer's" has one set for
each origin, asked one after the other at input and forward, as later releases of
crowdsec-firewall-bouncer make it.
`, figures.Thousands(opts.sources), batch, opts.turns)
		return nil
	})
	return text, err
}

// twin is a second world without a table.
var twin = variant{layout: none, origins: 1}

func variants(opts options) []variant {
	// Two worlds without a table: what differs between them is the measure's error.
	all := []variant{{layout: none}, twin}
	for _, n := range opts.tables {
		for _, o := range opts.origins {
			all = append(all, variant{layout: ours, bans: n, origins: o}, variant{layout: peers, bans: n, origins: o})
		}
	}
	return append(all, variant{layout: ours, bans: slices.Max(opts.tables), origins: 1, ranges: opts.ranges})
}

// buildFields makes a world for each variant, and proves that its packets pass or
// are stopped as they should.
func buildFields(s *scope, opts options) ([]*field, error) {
	random := rand.New(rand.NewPCG(5, 0))
	seen := map[uint32]bool{}
	drawn := func(n int) []netip.Addr {
		list := make([]netip.Addr, 0, n)
		for len(list) < n {
			addr := drawn4(random)
			if key := binary.BigEndian.Uint32(addr.AsSlice()); !seen[key] {
				seen[key] = true
				list = append(list, addr)
			}
		}
		return list
	}
	banned := drawn(slices.Max(opts.tables))
	clean := drawn(opts.sources)
	var fields []*field
	for _, v := range variants(opts) {
		began := time.Now()
		f := &field{variant: v, world: newWorld(s), least: make([][]time.Duration, len(kinds))}
		if err := f.fill(s, banned[:v.bans]); err != nil {
			return nil, fmt.Errorf("build %+v: %w", v, err)
		}
		refused := sample(banned[:max(v.bans, 2)], opts.sources)
		for _, k := range kinds {
			from, to := clean, node4
			if k.banned {
				from = refused
			}
			if k.inner {
				to = inner4
			}
			var frames [][]byte
			for i := range opts.sources {
				// In no order that a processor could guess.
				addr := from[(i*4099+17)%len(from)]
				if k.syn {
					frames = append(frames, synFrame(f.world.mac, addr, to))
				} else {
					frames = append(frames, udpFrame(f.world.mac, addr, to, make([]byte, 18)))
				}
			}
			f.frames = append(f.frames, frames)
		}
		if err := f.prove(); err != nil {
			return nil, fmt.Errorf("prove %+v: %w", v, err)
		}
		fields = append(fields, f)
		opts.say("packets: %+v ready after %v", v, time.Since(began).Round(time.Millisecond))
	}
	return fields, nil
}

// fill gives the node its table, and what every node has: connection tracking.
func (f *field) fill(s *scope, banned []netip.Addr) error {
	if err := f.load(s, "table inet tracking {\n\tchain input { type filter hook input priority 0; ct state established accept; }\n"+
		"\tchain forward { type filter hook forward priority 0; ct state established accept; }\n}\n"); err != nil {
		return err
	}
	// Nobody reads what arrives: it is to be dropped at the end of its way, at no
	// cost that depends on how much there is.
	if err := refuseAll(f.world.sink); err != nil {
		return err
	}
	switch f.layout {
	case ours:
		return f.fillOurs(s, banned)
	case peers:
		return f.load(s, peersRuleset(banned, f.origins))
	}
	return nil
}

func (f *field) fillOurs(s *scope, banned []netip.Addr) error {
	const life = 24 * time.Hour
	conn, err := nft.Open(nft.Options{NetNS: f.world.node.FD()})
	if err != nil {
		return err
	}
	s.Cleanup(func() { conn.Close() })
	content := nft.Content{Size: len(banned), Protected: []netip.Prefix{netip.PrefixFrom(node4, 32)}}
	for _, word := range []string{"cloudflare", "private"} {
		known, _ := decision.Known(word)
		content.Protected = append(content.Protected, known...)
	}
	for i := range f.origins {
		content.Classes = append(content.Classes, nft.Class{Mark: uint32(i + 1), Name: fmt.Sprintf("ban/lists:%d", i)})
	}
	content.Elements = func(yield func(nft.Element) bool) {
		for i, addr := range banned {
			if !yield(nft.Element{Addr: addr, Class: uint32(i%f.origins + 1), Timeout: life}) {
				return
			}
		}
	}
	content.Ranges = func(yield func(nft.Range) bool) {
		for i := range f.ranges {
			p := spareRange(i)
			last := p.Addr().As4()
			last[3] = 255
			if !yield(nft.Range{From: p.Addr(), To: netip.AddrFrom4(last), Class: 1, Timeout: life}) {
				return
			}
		}
	}
	return conn.Install(nft.Config{Exempt: bouncer.Defaults().Firewall.Exempt}, content)
}

// peersRuleset is a table with a set for each origin.
func peersRuleset(banned []netip.Addr, origins int) string {
	var b strings.Builder
	b.WriteString("table ip peer {\n\tcounter processed { }\n")
	for o := range origins {
		fmt.Fprintf(&b, "\tcounter origin%d { }\n\tset origin%d { type ipv4_addr; flags timeout; }\n", o, o)
	}
	for _, hook := range []string{"input", "forward"} {
		fmt.Fprintf(&b, "\tchain %s {\n\t\ttype filter hook %s priority -10; policy accept;\n\t\tcounter name processed\n", hook, hook)
		for o := range origins {
			fmt.Fprintf(&b, "\t\tip saddr @origin%d counter name origin%d drop\n", o, o)
		}
		b.WriteString("\t}\n")
	}
	b.WriteString("}\n")
	for o := range origins {
		var mine []string
		for i := o; i < len(banned); i += origins {
			mine = append(mine, banned[i].String()+" timeout 24h")
		}
		if len(mine) > 0 {
			fmt.Fprintf(&b, "add element ip peer origin%d { %s }\n", o, strings.Join(mine, ", "))
		}
	}
	return b.String()
}

// load gives a ruleset to the node.
func (f *field) load(s *scope, ruleset string) error {
	dir, err := os.MkdirTemp("", "edgeward-bench-")
	if err != nil {
		return fmt.Errorf("write a ruleset: %w", err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "ruleset.nft")
	if err := os.WriteFile(path, []byte(ruleset), 0o600); err != nil {
		return fmt.Errorf("write a ruleset: %w", err)
	}
	_, err = f.world.node.Exec("nft", "-f", path)
	return err
}

// refuseAll makes a socket drop what comes for it.
func refuseAll(fd int) error {
	nothing := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K}}
	err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &nothing[0]})
	if err != nil {
		return fmt.Errorf("filter a socket: %w", err)
	}
	return nil
}

// prove sends each packet once and counts those that pass.
func (f *field) prove() error {
	for i, k := range kinds {
		local, forwarded, err := f.world.passed()
		if err != nil {
			return err
		}
		if err := f.send(f.frames[i]); err != nil {
			return err
		}
		want := uint64(len(f.frames[i]))
		if k.banned && f.layout != none && f.bans > 0 {
			want = 0
		}
		for began := time.Now(); ; {
			nowLocal, nowForwarded, err := f.world.passed()
			if err != nil {
				return err
			}
			got := nowLocal - local
			if k.inner {
				got = nowForwarded - forwarded
			}
			if got == want && (want > 0 || time.Since(began) > 20*time.Millisecond) {
				break
			}
			if got > want || time.Since(began) > patience {
				return fmt.Errorf("of %d packets, %s, %d passed, not %d", len(f.frames[i]), k.name, got, want)
			}
			if err := wait(f.world.scope, time.Millisecond); err != nil {
				return err
			}
		}
	}
	return nil
}

// send sends packets. Each is taken in by the node before its system call returns,
// on the same processor.
func (f *field) send(frames [][]byte) error {
	for _, frame := range frames {
		if _, err := unix.Write(f.world.raw, frame); err != nil {
			if errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.EINTR) {
				continue // the queue was full, because the machine is busy elsewhere
			}
			return fmt.Errorf("send a packet: %w", err)
		}
	}
	return nil
}

// blast sends all packets again and again, in changing order, so that whatever
// disturbs the machine disturbs all alike, and keeps the least of each batch: what
// is more was a disturbance.
func blast(ctx context.Context, opts options, fields []*field) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	random := rand.New(rand.NewPCG(6, 0))
	for turn := range opts.turns {
		for _, i := range random.Perm(len(fields)) {
			f := fields[i]
			for k, frames := range f.frames {
				// Once to have everything at hand again that belongs to this world.
				if err := f.send(frames); err != nil {
					return err
				}
				n := 0
				for some := range slices.Chunk(frames, batch) {
					began := time.Now()
					if err := f.send(some); err != nil {
						return err
					}
					took := time.Since(began)
					if turn == 0 {
						f.least[k] = append(f.least[k], took)
					} else if took < f.least[k][n] {
						f.least[k][n] = took
					}
					n++
				}
			}
			// All worlds share one table of connections, where those of the others
			// would stand in the way.
			f.world.node.Forget()
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
		}
		opts.say("packets: turn %d of %d", turn+1, opts.turns)
	}
	return nil
}

func packetsTable(fields []*field, opts options) string {
	of := map[variant]*field{}
	for _, f := range fields {
		of[f.variant] = f
	}
	head := []string{"ns over no table"}
	for _, side := range []string{"ours", "the peer's"} {
		for _, o := range opts.origins {
			of := "origins"
			if o == 1 {
				of = "origin"
			}
			head = append(head, fmt.Sprintf("%s, %d %s", side, o, of))
		}
	}
	rows := [][]string{append(head, "goal")}
	largest := slices.Max(opts.tables)
	for i, k := range kinds {
		base := of[variant{layout: none}].cost(i)
		rows = append(rows, append([]string{fmt.Sprintf("**%s**: %d without a table", k.name, base.Nanoseconds())}, make([]string, len(head))...))
		over := func(v variant) time.Duration { return of[v].cost(i) - base }
		alike := make([]string, len(head)+1)
		alike[0], alike[1] = "none, in another world", fmt.Sprint(over(twin).Nanoseconds())
		rows = append(rows, alike)
		for _, n := range opts.tables {
			if k.banned && n == 0 {
				continue
			}
			row := []string{figures.Thousands(n) + " bans"}
			var worst time.Duration
			for _, side := range []layout{ours, peers} {
				for _, o := range opts.origins {
					d := over(variant{layout: side, bans: n, origins: o})
					if side == ours {
						worst = max(worst, d)
					}
					row = append(row, fmt.Sprint(d.Nanoseconds()))
				}
			}
			goal := ""
			if n == largest && !k.banned {
				goal = fmt.Sprintf("%d: %s", packetGoal.Nanoseconds(), figures.Held(worst <= packetGoal))
			}
			rows = append(rows, append(row, goal))
		}
		with := make([]string, len(head)+1)
		with[0] = fmt.Sprintf("%s bans, %s ranges", figures.Thousands(largest), figures.Thousands(opts.ranges))
		with[1] = fmt.Sprint(over(variant{ours, largest, 1, opts.ranges}).Nanoseconds())
		rows = append(rows, with)
	}
	return figures.Table(rows)
}

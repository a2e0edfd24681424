package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/edgeward/edgeward/bouncer"
	"github.com/edgeward/edgeward/internal/decision"
	"github.com/edgeward/edgeward/internal/nft"
	"github.com/edgeward/edgeward/test/benchmark/figures"
	"github.com/edgeward/edgeward/test/benchmark/stage"
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
	world   *stage.World
	streams []*stage.Stream // by kind
}

// packetGoal is the most that a clean packet may cost over no table.
const packetGoal = 700 * time.Nanosecond

func packetsPart(ctx context.Context, opts options) (text string, err error) {
	err = stage.Within(ctx, func(s *stage.Scope) error {
		fields, err := buildFields(s, opts)
		if err != nil {
			return err
		}
		var streams [][]*stage.Stream
		for _, f := range fields {
			streams = append(streams, f.streams)
		}
		if err := stage.Blast(s, opts.turns, streams, opts.say); err != nil {
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
`, figures.Thousands(opts.sources), stage.Batch, opts.turns)
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
func buildFields(s *stage.Scope, opts options) ([]*field, error) {
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
		f := &field{variant: v, world: stage.NewWorld(s, "up0")}
		if err := f.fill(s, banned[:v.bans]); err != nil {
			return nil, fmt.Errorf("build %+v: %w", v, err)
		}
		refused := sample(banned[:max(v.bans, 2)], opts.sources)
		for _, k := range kinds {
			from, to := clean, stage.Node4
			if k.banned {
				from = refused
			}
			if k.inner {
				to = stage.Inner4
			}
			var frames [][]byte
			for i := range opts.sources {
				// In no order that a processor could guess.
				addr := from[(i*4099+17)%len(from)]
				if k.syn {
					frames = append(frames, stage.SYNFrame(f.world.MAC, addr, to, stage.SinkPort))
				} else {
					frames = append(frames, stage.UDPFrame(f.world.MAC, addr, to, stage.SinkPort, make([]byte, 18)))
				}
			}
			stream := &stage.Stream{World: f.world, Frames: frames, Inner: k.inner}
			if err := stream.Prove(!k.banned || f.layout == none || f.bans == 0); err != nil {
				return nil, fmt.Errorf("prove %+v, %s: %w", v, k.name, err)
			}
			f.streams = append(f.streams, stream)
		}
		fields = append(fields, f)
		opts.say("packets: %+v ready after %v", v, time.Since(began).Round(time.Millisecond))
	}
	return fields, nil
}

// fill gives the node its table, and what every node has: connection tracking.
func (f *field) fill(s *stage.Scope, banned []netip.Addr) error {
	if err := f.world.Track(); err != nil {
		return err
	}
	// Nobody reads what arrives.
	if err := stage.RefuseAll(f.world.Sink); err != nil {
		return err
	}
	switch f.layout {
	case ours:
		return f.fillOurs(s, banned)
	case peers:
		return f.world.Load(peersRuleset(banned, f.origins))
	}
	return nil
}

func (f *field) fillOurs(s *stage.Scope, banned []netip.Addr) error {
	const life = 24 * time.Hour
	conn, err := nft.Open(nft.Options{NetNS: f.world.Node.FD()})
	if err != nil {
		return err
	}
	s.Cleanup(func() { conn.Close() })
	content := nft.Content{Size: len(banned), Protected: []netip.Prefix{netip.PrefixFrom(stage.Node4, 32)}}
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
		base := of[variant{layout: none}].streams[i].Cost()
		rows = append(rows, append([]string{fmt.Sprintf("**%s**: %d without a table", k.name, base.Nanoseconds())}, make([]string, len(head))...))
		over := func(v variant) time.Duration { return of[v].streams[i].Cost() - base }
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

package main

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/edgeward/edgeward/internal/netns"
	"github.com/edgeward/edgeward/internal/nft"
	"github.com/edgeward/edgeward/test/benchmark/figures"
	"github.com/edgeward/edgeward/test/benchmark/stage"
)

// manyPeers is an Access of n peers of two addresses each, in groups of a hundred
// that may reach ten services of two addresses each, and more.
func manyPeers(n int, more ...nft.Reach) nft.Access {
	network4, network6 := netip.MustParsePrefix("10.66.0.0/16"), netip.MustParsePrefix("fd66::/64")
	resolver := func(at netip.Addr) nft.Reach { return nft.Reach{To: host(at), Proto: nft.UDP, First: 53, Last: 53} }
	a := nft.Access{
		Interface: "edgeward0", Networks: []netip.Prefix{network4, network6},
		Everyone: []nft.Reach{resolver(network4.Addr().Next()), resolver(network6.Addr().Next())},
	}
	for g := range max(n/100, 1) {
		group := nft.Group{Name: fmt.Sprintf("group-%d", g), Reach: more}
		for i := range 10 {
			for _, base := range []string{"10.43.0.0", "fd43::"} {
				to := host(numbered(netip.MustParseAddr(base), g*10+i))
				group.Reach = append(group.Reach, nft.Reach{To: to, Proto: nft.TCP, First: 443, Last: 443})
			}
		}
		a.Groups = append(a.Groups, group)
	}
	for i := range n {
		a.Sources = append(a.Sources, sourcesOf(a, i)...)
	}
	return a
}

// sourcesOf are those of the peer number i of an Access.
func sourcesOf(a nft.Access, i int) []nft.Source {
	group := a.Groups[i%len(a.Groups)].Name
	return []nft.Source{{Prefix: host(numbered(peers4, i)), Group: group}, {Prefix: host(numbered(peers6, i)), Group: group}}
}

// rulesPart measures changes of the access rules.
func rulesPart(s *stage.Scope, opts options) (string, error) {
	rows := [][]string{
		heads("ms for access rules", opts.grants),
		{"one peer more, or less"}, {"the same again"}, {"the same again, when others have changed tables"}, {"all anew, beside what enforces"},
	}
	for _, n := range opts.grants {
		times, err := measureRules(s, opts, n)
		if err != nil {
			return "", fmt.Errorf("with %d peers: %w", n, err)
		}
		opts.say("rules: %d peers: %v", n, times)
		for i, took := range times {
			rows[i+1] = append(rows[i+1], ms(took))
		}
	}
	for i := range rows {
		rows[i] = rows[i][:len(opts.grants)+1] // there are no goals
	}
	return figures.Table(rows), nil
}

func measureRules(s *stage.Scope, opts options, n int) (times [4]time.Duration, err error) {
	ns := netns.New(s)
	conn, err := nft.OpenAccess(nft.Options{NetNS: ns.FD()})
	if err != nil {
		return times, err
	}
	defer conn.Close()
	a := manyPeers(n)
	if _, err := conn.Apply(a); err != nil {
		return times, err
	}
	more := a
	more.Sources = append(a.Sources[:len(a.Sources):len(a.Sources)], sourcesOf(a, n)...)
	// time applies an Access and says how long that took, if it did what it should.
	apply := func(a nft.Access, want nft.Applied) (time.Duration, error) {
		began := time.Now()
		done, err := conn.Apply(a)
		took := time.Since(began)
		if err == nil && done != want {
			err = fmt.Errorf("it did %+v, not %+v", done, want)
		}
		return took, errors.Join(err, s.Err())
	}
	var changed, same, looked, replaced []time.Duration
	note := func(into *[]time.Duration, a nft.Access, want nft.Applied) {
		if err == nil {
			var took time.Duration
			took, err = apply(a, want)
			*into = append(*into, took)
		}
	}
	for range opts.changes {
		note(&changed, more, nft.Applied{Changed: true})
		note(&changed, a, nft.Applied{Changed: true})
		note(&same, a, nft.Applied{})
		ns.MustExec("nft", "add table ip other; delete table ip other")
		note(&looked, a, nft.Applied{})
	}
	for range opts.changes {
		a.Masquerade = !a.Masquerade
		note(&replaced, a, nft.Applied{Changed: true, Replaced: true})
	}
	if err != nil {
		return times, err
	}
	return [4]time.Duration{middle(changed), middle(same), middle(looked), middle(replaced)}, nil
}

// A kind of packet is sent by peers.
var kinds = []struct {
	name    string
	syn     bool
	refused bool
}{
	{name: "granted UDP, forwarded"},
	{name: "granted TCP SYN, forwarded", syn: true},
	{name: "UDP that is not granted", refused: true},
}

// A field is a world whose packets meet access rules, or none.
type field struct{ streams []*stage.Stream } // by kind

// refusedPort is granted to nobody.
const refusedPort = 5000

// packetsPart measures what a packet pays for access rules.
func packetsPart(s *stage.Scope, opts options) (string, error) {
	var fields []*field
	var streams [][]*stage.Stream
	for _, n := range opts.tables {
		for _, rules := range []bool{false, false, true} { // how far alike things differ shows too
			f, err := buildField(s, opts, n, rules)
			if err != nil {
				return "", fmt.Errorf("build a world with %d peers: %w", n, err)
			}
			fields, streams = append(fields, f), append(streams, f.streams)
		}
	}
	if err := stage.Blast(s, opts.blasts, streams, opts.say); err != nil {
		return "", err
	}
	head := []string{"ns for a packet, over the same without rules"}
	for _, n := range opts.tables {
		head = append(head, "rules for "+figures.Thousands(n)+" peers")
	}
	rows := [][]string{append(head, "none, in another world")}
	for k, kind := range kinds {
		cost := func(i int) int { return int(fields[i].streams[k].Cost().Nanoseconds()) }
		last := 3 * (len(opts.tables) - 1)
		row := []string{fmt.Sprintf("%s (%s without)", kind.name, figures.Thousands(cost(last)))}
		for i := range opts.tables {
			row = append(row, figures.Thousands(cost(3*i+2)-cost(3*i)))
		}
		rows = append(rows, append(row, figures.Thousands(cost(last+1)-cost(last))))
	}
	return figures.Table(rows) + fmt.Sprintf(`
%s packets of as many peers as there are, between namespaces with connection tracking on,
in batches of %d, each at its quickest in %d turns; each packet is the first of its
connection or a later one without an answer yet. What is refused is answered, as far as
the kernel lets ICMP.
`, figures.Thousands(opts.sources), stage.Batch, opts.blasts), nil
}

func buildField(s *stage.Scope, opts options, n int, rules bool) (*field, error) {
	// A cable stands in for WireGuard, which adds the same to all of them.
	f := &field{}
	w := stage.NewWorld(s, "edgeward0")
	if err := errors.Join(w.Track(), stage.RefuseAll(w.Sink)); err != nil {
		return nil, err
	}
	if rules {
		conn, err := nft.OpenAccess(nft.Options{NetNS: w.Node.FD()})
		if err != nil {
			return nil, err
		}
		s.Cleanup(func() { conn.Close() })
		to := nft.Reach{To: host(stage.Inner4), First: stage.SinkPort, Last: stage.SinkPort}
		udp, tcp := to, to
		udp.Proto, tcp.Proto = nft.UDP, nft.TCP
		if _, err := conn.Apply(manyPeers(n, udp, tcp)); err != nil {
			return nil, err
		}
	}
	for _, k := range kinds {
		var frames [][]byte
		for i := range opts.sources {
			from := numbered(peers4, (i*4099+17)%n) // in no order that a processor could guess
			switch {
			case k.syn:
				frames = append(frames, stage.SYNFrame(w.MAC, from, stage.Inner4, stage.SinkPort))
			case k.refused:
				frames = append(frames, stage.UDPFrame(w.MAC, from, stage.Inner4, refusedPort, make([]byte, 18)))
			default:
				frames = append(frames, stage.UDPFrame(w.MAC, from, stage.Inner4, stage.SinkPort, make([]byte, 18)))
			}
		}
		stream := &stage.Stream{World: w, Frames: frames, Inner: true}
		if err := stream.Prove(!k.refused || !rules); err != nil {
			return nil, fmt.Errorf("%s: %w", k.name, err)
		}
		f.streams = append(f.streams, stream)
	}
	return f, nil
}

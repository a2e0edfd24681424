package nft

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/edgeward/edgeward/internal/netns"
)

// fire sends from addresses that stay banned, to the node and through it, and
// opens connections from one that is not, until check says whether a packet of
// the former passed or an attempt of the latter failed.
type fire struct {
	w        *world
	blasters []*netns.Blaster
	sources  []netip.Addr
	stop     chan struct{}
	clean    chan error
}

var (
	fireRange4 = banRange("203.0.113.100", "203.0.113.103")
	fireRange6 = banRange("2001:db8:f00::1000", "2001:db8:f00::1fff")
)

func (w *world) fire() *fire {
	w.t.Helper()
	f := &fire{w: w, sources: []netip.Addr{bad4, fireRange4.To, bad6, fireRange6.To}, stop: make(chan struct{}), clean: make(chan error, 1)}
	for _, s := range []*netns.Server{w.host, w.inPod} {
		f.blasters = append(f.blasters,
			w.client.Blast(w.to(s, bad4), f.sources[:2]...), w.client.Blast(w.to(s, bad6), f.sources[2:]...))
	}
	clean := w.client.Patient()
	go func() {
		for n := 0; ; n++ {
			select {
			case <-f.stop:
				f.clean <- nil
				return
			default:
			}
			from := []netip.Addr{peer4, peer6}[n%2]
			for _, s := range []*netns.Server{w.host, w.inPod} {
				if err := clean.TCP(from, w.to(s, from)); err != nil {
					f.clean <- fmt.Errorf("a clean connection: %w", err)
					return
				}
			}
		}
	}()
	return f
}

// check ends the fire and returns how many packets were fired.
func (f *fire) check() int {
	f.w.t.Helper()
	sent := 0
	for _, b := range f.blasters {
		n, err := b.Stop()
		if err != nil {
			f.w.t.Error(err)
		}
		sent += n
	}
	close(f.stop)
	if err := <-f.clean; err != nil {
		f.w.t.Error(err)
	}
	time.Sleep(50 * time.Millisecond) // what is on its way
	for name, s := range map[string]*netns.Server{"node": f.w.host, "pod": f.w.inPod} {
		for from, n := range s.Received() {
			if slices.Contains(f.sources, from) {
				f.w.t.Errorf("%d packets from %v reached the %s", n, from, name)
			}
		}
	}
	return sent
}

func fireContent(n int) Content {
	c := content(nil, fireRange4, fireRange6)
	c.Elements = func(yield func(Element) bool) {
		_ = yield(ban(bad4)) && yield(ban(bad6))
		for e := range numbered(n, time.Hour) {
			if !yield(e) {
				return
			}
		}
	}
	return c
}

// A generation takes over from another, whatever differs, and nothing passes.
func TestSwitchUnderFire(t *testing.T) {
	w := newWorld(t)
	w.install(config(), fireContent(20_000))
	f := w.fire()
	for i := range 24 {
		cfg := config()
		switch i % 8 {
		case 1:
			cfg.DropReplies = true
		case 2:
			cfg.Points = []Point{Input, Forward}
		case 3:
			cfg.SYNPriority, cfg.Priority = -290, -140
		case 4:
			cfg.Exempt = append(cfg.Exempt, "docker*")
		case 5:
			cfg.Locks = []Lock{{Name: "web", Ports: []uint16{443}}}
		case 6:
			cfg.SYNPriority, cfg.Priority = -310, -160
		}
		w.install(cfg, fireContent(1000*i))
		if h := w.read(); int(h.Generation) != i+2 || !h.Intact || h.Bans4 != 1000*i+1 {
			t.Errorf("after switch %d: %+v", i, h)
		}
	}
	sent := f.check()
	var dropped uint64
	for _, six := range []bool{false, true} {
		dropped += w.counter(Banned, "ban/crowdsec", six)
	}
	if int(dropped) < sent*99/100 || sent < 1000 {
		t.Errorf("fired %d packets, dropped %d", sent, dropped)
	}
	t.Logf("fired %d packets through 24 switches", sent)
}

// Bans are renewed, reclassified and replaced around the banned, and nothing
// passes.
func TestUpdateUnderFire(t *testing.T) {
	w := newWorld(t)
	mine := prefix("203.0.113.7/32") // banned and protected
	start := fireContent(5000)
	start.Protected = []netip.Prefix{mine}
	w.install(config(), start)
	w.update(Changes{Put: []Element{ban(peer4)}})
	f := w.fire()
	wide4, wide6 := banRange("203.0.113.96", "203.0.113.111"), banRange("2001:db8:f00::800", "2001:db8:f00::2000")
	for i := range 2000 {
		c := Changes{Put: []Element{{bad4, uint32(i%3) + 1, time.Hour}, {bad6, 1, time.Duration(i+60) * time.Second}, ban(peer4)}}
		switch i % 4 {
		case 0: // wider
			c.DeleteRanges, c.PutRanges = []Range{fireRange4, fireRange6}, []Range{wide4, wide6}
		case 1: // cut in two, with the class of one changed
			c.DeleteRanges = []Range{wide4, wide6}
			c.PutRanges = []Range{banRange("203.0.113.96", "203.0.113.101"), {addr("203.0.113.102"), addr("203.0.113.111"), 2, time.Hour},
				banRange("2001:db8:f00::800", "2001:db8:f00::fff"), {addr("2001:db8:f00::1000"), addr("2001:db8:f00::2000"), 3, Forever}}
		case 2: // and back
			c.DeleteRanges = []Range{banRange("203.0.113.96", "203.0.113.101"), banRange("203.0.113.102", "203.0.113.111"),
				banRange("2001:db8:f00::800", "2001:db8:f00::fff"), banRange("2001:db8:f00::1000", "2001:db8:f00::2000")}
			c.PutRanges = []Range{fireRange4, fireRange6}
		case 3: // renewed
			c.PutRanges = []Range{fireRange4, fireRange6}
			if i%8 == 3 { // and the whole map is written again, until this is over
				c.PutRanges = append(c.PutRanges, Range{addr("203.0.113.200"), addr("203.0.113.201"), 1, caution})
				c.DeleteRanges = append(c.DeleteRanges, c.PutRanges[2])
			} else {
				c.DeleteRanges = append(c.DeleteRanges, banRange("203.0.113.200", "203.0.113.201"))
			}
			c.Protected = []netip.Prefix{mine, netip.PrefixFrom(addr("198.51.100.0"), 24+i%8)}
		}
		w.update(c)
	}
	t.Logf("fired %d packets through 2000 changes", f.check())
}

// A process goes, another comes, and finds the bans still enforced; then one
// comes that leaves the table open to others, and one that does not.
func TestRestartUnderFire(t *testing.T) {
	w := newWorld(t)
	w.install(config(), fireContent(20_000))
	f := w.fire()
	for i := range 5 {
		w.conn.Close()
		time.Sleep(20 * time.Millisecond)
		w.conn = w.open(Options{Shared: i == 3})
		h := w.read()
		if !h.Enforcing || h.Intact || h.Owner != (i != 3 && i != 4) || h.Layout != config().Layout() || h.Bans4 != 20_001 {
			t.Errorf("start %d finds %+v", i, h)
		}
		cfg := config()
		if i%2 == 0 {
			cfg.DropReplies = true
			w.install(cfg, fireContent(20_000)) // an upgrade
		}
		w.install(config(), fireContent(20_000))
		if h := w.read(); h.Owner != (i != 3) || h.Persist != (i != 3) || !h.Intact {
			t.Errorf("start %d has %+v", i, h)
		}
	}
	t.Logf("fired %d packets through 5 starts", f.check())
}

// An Install that dies half-way leaves what was, and no trace in the next.
func TestCutInstall(t *testing.T) {
	w := newWorld(t)
	w.install(config(), fireContent(100))
	f := w.fire()
	cut := fireContent(50_000)
	all := cut.Elements
	cut.Elements = func(yield func(Element) bool) {
		n := 0
		for e := range all {
			if n++; n == 30_000 {
				w.conn.sock.close() // as the kernel does for the dead
			}
			if !yield(e) {
				return
			}
		}
	}
	if err := w.conn.Install(config(), cut); err == nil {
		t.Fatal("no error")
	} else {
		t.Log(err)
	}
	if h := w.read(); !h.Enforcing || h.Generation != 1 || h.Intact {
		t.Errorf("after the cut: %+v", h)
	}
	if err := w.conn.Update(Changes{Put: []Element{ban(peer4)}}); !errors.Is(err, ErrNotInstalled) {
		t.Errorf("update after the cut: %v", err)
	}
	w.install(config(), fireContent(10))
	if h := w.read(); h.Generation != 3 || !h.Intact {
		t.Errorf("after the next: %+v", h)
	}
	if text := w.nft(); strings.Count(text, "map bans4_") != 1 {
		t.Error("a half generation is left")
	}
	f.check()
}

func TestOwnership(t *testing.T) {
	w := newWorld(t)
	w.load("table ip mine {\n chain c { }\n }")
	w.install(config(), content(nil, ban(bad4)))
	// nft 1.0.6 takes the refusal for success where it only flushes.
	w.node.Exec("nft", "flush", "ruleset")
	for _, cmd := range []string{"flush table inet edgeward", "delete table inet edgeward", "delete chain inet edgeward source4_1"} {
		if _, err := w.node.Exec("nft", strings.Fields(cmd)...); err == nil {
			t.Errorf("nft %s: no error", cmd)
		}
	}
	w.stopped(true, bad4)
	if h := w.read(); !h.Intact {
		t.Errorf("after the attack: %+v", h)
	}
	w.load("table ip mine {\n chain c { }\n }")
	if err := w.conn.Remove(); err != nil {
		t.Fatal(err)
	}
	if err := w.conn.Remove(); err != nil {
		t.Errorf("remove what is gone: %v", err)
	}
	w.stopped(false, bad4)
	if text := w.nft(); strings.Contains(text, "edgeward") || !strings.Contains(text, "table ip mine") {
		t.Errorf("removal leaves:\n%s", text)
	}
	w.install(config(), content(nil, ban(bad4)))
	w.conn.Close()
	last := w.open(Options{}) // claims the orphan
	if err := last.Remove(); err != nil {
		t.Error(err)
	}
}

// Where others may change the table, their changes are seen, ours are not, and
// an Install repairs.
func TestWatch(t *testing.T) {
	w := newWorld(t)
	w.conn.Close()
	w.conn = w.open(Options{Shared: true})
	ctx, cancel := context.WithCancel(t.Context())
	events, err := w.conn.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	quiet := func(why string) {
		t.Helper()
		select {
		case e := <-events:
			t.Errorf("%s: %+v", why, e)
		case <-time.After(50 * time.Millisecond):
		}
	}
	heard := func(why string) Event {
		t.Helper()
		select {
		case e := <-events:
			return e
		case <-time.After(time.Second):
			t.Fatalf("%s: not heard", why)
		}
		return Event{}
	}
	w.install(config(), fireContent(100_000))
	w.update(Changes{Put: []Element{ban(peer4)}, Delete: []netip.Addr{peer4}})
	quiet("our own changes")

	w.load("table ip mine {\n chain c { }\n }")
	if e := heard("another's table"); e.Process != "nft" || e.PID == 0 || e.Ruleset != w.read().Ruleset || e.Lost {
		t.Errorf("event %+v", e)
	}
	if h := w.read(); !h.Intact {
		t.Errorf("another table is not ours: %+v", h)
	}
	for _, cmd := range []string{"flush chain inet edgeward source4_1", "delete element inet edgeward classes_2 { 1 }", "insert rule inet edgeward prerouting_3 accept", "flush ruleset"} {
		w.node.MustExec("nft", strings.Fields(cmd)...)
		heard(cmd)
		if h := w.read(); h.Intact || h.Present != (cmd != "flush ruleset") {
			t.Errorf("after %s: %+v", cmd, h)
		}
		f := time.Now()
		w.install(config(), fireContent(100_000))
		t.Logf("repaired %q with 100000 elements in %v", cmd, time.Since(f))
		if h := w.read(); !h.Intact {
			t.Errorf("after repair: %+v", h)
		}
		w.stopped(true, bad4)
		quiet("the repair")
	}
	// Nobody listens for a while: one event stands for all.
	for range 20 {
		w.node.MustExec("nft", "add", "table", "ip", "mine")
		w.node.MustExec("nft", "delete", "table", "ip", "mine")
	}
	if e := heard("many changes"); e.Ruleset != w.read().Ruleset {
		t.Errorf("an old event: %+v, want the last", e)
	}
	quiet("after the last")
	cancel()
	if _, ok := <-events; ok {
		t.Error("the channel is not closed")
	}
}

// What others put into the table does not stand in the way of an Install.
func TestForeignObjects(t *testing.T) {
	w := newWorld(t)
	w.conn.Close()
	w.conn = w.open(Options{Shared: true})
	w.install(config(), content(nil, ban(bad4)))
	w.load(`table inet edgeward {
		set friends {
			type ipv4_addr
			elements = { 203.0.113.66 }
		}
		chain theirs {
			ip saddr @friends accept
		}
		chain hooked {
			type filter hook prerouting priority -500
			jump theirs
		}
		chain source4_1 {
			jump theirs
		}
	}
	insert rule inet edgeward source4_1 ip saddr @friends jump theirs`)
	if h := w.read(); h.Intact {
		t.Errorf("not noticed: %+v", h)
	}
	w.install(config(), content(nil, ban(bad4)))
	w.stopped(true, bad4)
	if h := w.read(); !h.Intact || h.Generation != 2 {
		t.Errorf("after the repair: %+v", h)
	}
	if text := w.nft(); strings.Contains(text, "theirs") || strings.Contains(text, "friends") {
		t.Errorf("left:\n%s", text)
	}
}

func TestFlowtables(t *testing.T) {
	w := newWorld(t)
	// Few kernels that tests run on can make one.
	if got, err := w.conn.Flowtables(); err != nil || len(got) != 0 {
		t.Errorf("%v, %v", got, err)
	}
	var b batch
	b.string(attrFlowtableTable, "fast")
	b.string(attrFlowtableName, "ft")
	if got, err := parseFlowtable(b.buf); err != nil || got != "fast ft" {
		t.Errorf("%q, %v", got, err)
	}
}

// cell is what the model of TestChurn holds for an address.
type cell struct {
	class uint32
	until time.Time
}

// end is when a ban ends; for ever is a year here.
func end(now time.Time, timeout time.Duration) time.Time {
	return now.Add(min(timeout, 365*24*time.Hour))
}

// Ranges and addresses come, go, change, overlap and time out at random, and the
// kernel holds what a naive model holds.
func TestChurn(t *testing.T) {
	t.Parallel()
	ms := time.Millisecond
	for name, timeouts := range map[string][]time.Duration{
		"lasting":    {time.Hour, Forever},
		"timing out": {150 * ms, 500 * ms, time.Hour},
		"both":       {2300 * ms, 2400 * ms, time.Hour, time.Hour, time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // mostly waiting
			churn(t, timeouts)
		})
	}
}

func churn(t *testing.T, timeouts []time.Duration) {
	w := newWorld(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	w.install(config(), content(nil))
	const cells = 96
	at := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}) }
	var nets, bans [cells]cell
	var put []Range // the ranges in the kernel
	var until []time.Time
	all := make([]netip.Addr, cells)
	for i := range all {
		all[i] = at(i)
	}
	var late time.Duration // how much later the kernel began to count than the model
	for step := range 250 {
		now := time.Now()
		var c Changes
		for range rng.IntN(4) {
			from := rng.IntN(cells)
			to := min(cells-1, from+rng.IntN(20))
			v := cell{uint32(rng.IntN(4)), end(now, timeouts[rng.IntN(len(timeouts))])}
			for i := from; i <= to; i++ {
				nets[i] = v
			}
		}
		for i := range nets {
			if !nets[i].until.After(now) {
				nets[i] = cell{}
			}
		}
		var want []Range
		var ends []time.Time
		for i := 0; i < cells; {
			j := i
			for j < cells && nets[j] == nets[i] {
				j++
			}
			if nets[i].class != 0 {
				want = append(want, Range{at(i), at(j - 1), nets[i].class, nets[i].until.Sub(now)})
				ends = append(ends, nets[i].until)
			}
			i = j
		}
		same := func(a, b Range) bool { return a.From == b.From && a.To == b.To }
		for _, r := range put {
			if !slices.ContainsFunc(want, func(x Range) bool { return same(r, x) && x.Class == r.Class }) {
				c.DeleteRanges = append(c.DeleteRanges, r) // those that timed out among them
			}
		}
		for n, r := range want {
			i := slices.IndexFunc(put, func(x Range) bool { return same(r, x) && x.Class == r.Class })
			if i < 0 || !until[i].Equal(ends[n]) || rng.IntN(3) == 0 {
				c.PutRanges = append(c.PutRanges, r)
			}
		}
		put, until = want, ends
		for range rng.IntN(4) {
			i := rng.IntN(cells)
			if rng.IntN(3) == 0 {
				bans[i] = cell{}
				c.Delete = append(c.Delete, at(i))
				continue
			}
			bans[i] = cell{uint32(rng.IntN(3)) + 1, end(now, timeouts[rng.IntN(len(timeouts))])}
			c.Put = append(c.Put, Element{at(i), bans[i].class, bans[i].until.Sub(now)})
		}
		// What is in both ends up as it is put; the model has the last word.
		c.Put = slices.DeleteFunc(c.Put, func(e Element) bool {
			i := int(e.Addr.As4()[3])
			return bans[i].class != e.Class || !bans[i].until.Equal(now.Add(e.Timeout))
		})
		seen := map[netip.Addr]bool{}
		c.Put = slices.DeleteFunc(c.Put, func(e Element) bool {
			was := seen[e.Addr]
			seen[e.Addr] = true
			return was
		})
		if err := w.conn.Update(c); err != nil {
			t.Fatalf("step %d: %v\n%+v", step, err, c)
		}
		late = max(late, time.Since(now))
		if step%3 == 0 {
			time.Sleep(time.Duration(rng.IntN(60)) * time.Millisecond)
		}
		before := time.Now()
		found, err := w.conn.Sample(all)
		if err != nil {
			t.Fatal(err)
		}
		after := time.Now()
		for i, f := range found {
			v := bans[i]
			// The kernel's clock ticks every few milliseconds.
			const tick = 20 * time.Millisecond
			near := func(v cell) bool {
				return v.class != 0 && v.until.After(before.Add(-tick-late)) && v.until.Before(after.Add(tick))
			}
			if near(bans[i]) || near(nets[i]) {
				continue
			}
			if !v.until.After(before) {
				v = nets[i]
			}
			if !v.until.After(before) {
				v = cell{}
			}
			bounds := Range{From: f.Addr, To: f.Addr}
			if v != bans[i] && v.class != 0 {
				n := slices.IndexFunc(put, func(r Range) bool { return !f.Addr.Less(r.From) && !r.To.Less(f.Addr) })
				bounds = put[n]
			}
			if v.class != 0 && !same(bounds, Range{From: f.From, To: f.To}) {
				t.Fatalf("step %d: %v lies in %v to %v, want %v to %v", step, f.Addr, f.From, f.To, bounds.From, bounds.To)
			}
			if f.Class != v.class {
				t.Fatalf("step %d: %v has class %d, want %d until %v", step, f.Addr, f.Class, v.class, v.until)
			}
		}
	}
	// nft sees no more and no less.
	var listing struct {
		Nftables []struct {
			Map *struct {
				Name string
				Elem []json.RawMessage
			}
		}
	}
	time.Sleep(3 * time.Second) // the short ones are over and collected
	if err := json.Unmarshal([]byte(w.node.MustExec("nft", "-j", "list", "ruleset")), &listing); err != nil {
		t.Fatal(err)
	}
	live := 0
	for _, r := range put {
		if r.Timeout > time.Minute {
			live++
		}
	}
	for _, o := range listing.Nftables {
		if o.Map != nil && strings.HasPrefix(o.Map.Name, "nets4_") && len(o.Map.Elem) != live {
			t.Errorf("nft lists %d ranges, want %d", len(o.Map.Elem), live)
		}
	}
}

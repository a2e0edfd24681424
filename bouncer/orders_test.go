package bouncer

import (
	"bytes"
	"context"
	"log/slog"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/edgeward/edgeward/internal/lapi"
)

// ordered is a node with bans on which a test gives orders through the socket.
type ordered struct {
	*node
	t      *testing.T
	log    *bytes.Buffer
	socket string
}

func newOrdered(t *testing.T, dir string) *ordered {
	o := &ordered{node: newNode(t, dir, nil), t: t, log: &bytes.Buffer{}}
	o.restart()
	o.answer(true, o.bans()...)
	return o
}

func (o *ordered) bans() []lapi.Row {
	return []lapi.Row{
		decided(1, "203.0.113.66", "ban", "crowdsec", "ssh"), decided(2, "198.51.100.0/24", "ban", "CAPI", "x"),
		decided(3, "2001:db8::/32", "ban", "CAPI", "x"),
	}
}

// restart makes the agent anew, which takes over what the kernel has.
func (o *ordered) restart() {
	o.t.Helper()
	o.boot(o.t)
	log := slog.New(slog.NewTextHandler(o.log, nil))
	o.Bouncer.log, o.enforcer.log = log, log
	o.listen()
}

// listen serves the socket.
func (o *ordered) listen() {
	o.t.Helper()
	log := slog.New(slog.DiscardHandler)
	o.socket = filepath.Join(o.t.TempDir(), "bouncer.sock")
	c, err := ListenControl(o.socket, o.Bouncer, log)
	if err != nil {
		o.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	o.t.Cleanup(func() { cancel(); <-done })
}

// ask gives an order and demands that its answer, or its error, says want.
func (o *ordered) ask(order Order, want string) {
	o.t.Helper()
	a, err := Ask(o.t.Context(), o.socket, order)
	said := a.Says + " " + a.Note
	if err != nil {
		said = err.Error()
	}
	if !strings.Contains(said, want) {
		o.t.Errorf("%+v: %q, want %q", order, said, want)
	}
}

// drops demands which of some addresses are dropped.
func (o *ordered) drops(want bool, addrs ...string) {
	o.t.Helper()
	for _, a := range addrs {
		if got := o.memory.drops(netip.MustParseAddr(a)); got != want {
			o.t.Errorf("%s is dropped: %v", a, got)
		}
	}
}

func (o *ordered) why(addr, verdict, says string) {
	o.t.Helper()
	w, err := o.Why(netip.MustParseAddr(addr))
	if err != nil {
		o.t.Fatal(err)
	}
	text := w.Says
	for _, d := range w.Decisions {
		text += "; " + d.Because
	}
	if w.Verdict != verdict || !strings.Contains(text, says) {
		o.t.Errorf("why %s: %s: %s, want %s: %s", addr, w.Verdict, text, verdict, says)
	}
}

func TestAllow(t *testing.T) {
	o := newOrdered(t, t.TempDir())
	installs, updates := o.memory.installs, o.memory.updates
	o.drops(true, "203.0.113.66", "198.51.100.9", "198.51.100.200", "2001:db8::1")
	o.ask(Order{Verb: "allow", Address: "203.0.113.66", For: time.Hour, Because: "my phone"}, "no ban stops 203.0.113.66 on this node until ")
	o.ask(Order{Verb: "allow", Address: "198.51.100.0/25", For: time.Hour}, "no ban stops 198.51.100.0/25")
	o.ask(Order{Verb: "allow", Address: "198.51.100.8/29", For: 2 * time.Hour}, "no ban stops")
	o.ask(Order{Verb: "allow", Address: "::ffff:198.51.100.255", For: time.Hour}, "no ban stops 198.51.100.255")
	o.drops(false, "203.0.113.66", "198.51.100.9", "198.51.100.255")
	o.drops(true, "198.51.100.200", "2001:db8::1")
	if o.memory.installs != installs || o.memory.updates != updates {
		t.Error("an order wrote bans again")
	}
	o.why("203.0.113.66", "pass", "decisions hold it, but 203.0.113.66 is allowed on this node until ")
	o.why("203.0.113.66", "pass", "because: my phone")
	for _, want := range []string{"the operator gave an order", "order=allow", "value=203.0.113.66", `because="my phone"`, "process "} {
		if !strings.Contains(o.log.String(), want) {
			t.Errorf("the log does not say %s: %s", want, o.log)
		}
	}
	// A ban that is made now does not beat it.
	o.answer(false, decided(9, "203.0.113.66", "ban", "cscli", "x"))
	o.drops(false, "203.0.113.66")
	o.ask(Order{Verb: "allow", Address: "203.0.113.66", End: true}, "what bans it counts again")
	o.drops(true, "203.0.113.66")
	o.ask(Order{Verb: "allow", Address: "203.0.113.66", End: true}, "203.0.113.66 is not allowed for a time")
	// Each ends at its time, before anybody looks.
	o.at = o.at.Add(59 * time.Minute)
	o.answer(true, o.bans()...)
	o.at = o.at.Add(2 * time.Minute)
	o.drops(false, "198.51.100.9")
	o.drops(true, "198.51.100.1", "198.51.100.255")
	if _, err := o.turn(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s := o.Status(); len(s.Orders.Allows) != 1 || s.Ready != "yes" {
		t.Errorf("status %+v", s)
	}
	if !strings.Contains(o.log.String(), "an order has ended") {
		t.Error("the log does not say that an order ended")
	}
}

func TestUnban(t *testing.T) {
	o := newOrdered(t, t.TempDir())
	o.ask(Order{Verb: "unban", Address: "198.51.100.9"}, "1 decision counts no more for 198.51.100.9 on this node alone, until ")
	o.ask(Order{Verb: "unban", Address: "2001:db8::1"},
		"to lift it everywhere: cscli decisions delete --range 2001:db8::/32 ")
	o.drops(false, "198.51.100.9", "2001:db8::1")
	o.drops(true, "198.51.100.8", "2001:db8::2", "203.0.113.66")
	o.why("198.51.100.9", "pass", "waived: it is unbanned on this node until ")
	// The same decisions again, from LAPI or after a restart, change nothing.
	o.answer(true, o.bans()...)
	o.answer(false, o.bans()...)
	o.drops(false, "198.51.100.9", "2001:db8::1")
	o.save(true)
	o.restart()
	o.answer(true, o.bans()...)
	o.drops(false, "198.51.100.9", "2001:db8::1")
	// A newer one counts, whatever it covers, and for who is asked alone.
	o.answer(false, decided(7, "198.51.100.8/30", "ban", "crowdsec", "ssh"))
	o.drops(true, "198.51.100.9")
	o.drops(false, "2001:db8::1")
	if want := "a newer decision holds an unbanned address"; !strings.Contains(o.log.String(), want) || !strings.Contains(o.log.String(), "decision=7") {
		t.Error("the log does not say that the address is banned again")
	}
	// One that is not for the kernel does not.
	o.answer(false, decided(8, "2001:db8::1", "captcha", "crowdsec", "ssh"))
	o.drops(false, "2001:db8::1")
	o.ask(Order{Verb: "unban", Address: "198.51.100.9"}, "2 decisions count no more")
	o.drops(false, "198.51.100.9")
	o.ask(Order{Verb: "unban", Address: "198.51.100.9", End: true}, "counts again")
	o.drops(true, "198.51.100.9")
	o.ask(Order{Verb: "unban", Address: "198.51.100.9", End: true}, "was not unbanned here")
	o.ask(Order{Verb: "unban", Address: "192.0.2.7"}, "no decision that this node enforces holds 192.0.2.7")
}

func TestPause(t *testing.T) {
	o := newOrdered(t, t.TempDir())
	installs := o.memory.installs
	o.ask(Order{Verb: "allow", Address: "203.0.113.66", For: time.Hour}, "no ban stops")
	o.ask(Order{Verb: "pause", For: 10 * time.Minute}, "this node drops nothing until ")
	o.drops(false, "203.0.113.66", "198.51.100.9", "2001:db8::1")
	o.why("198.51.100.9", "pass", "; would be enforced: this node is paused until ")
	if o.memory.installs != installs {
		t.Error("a pause installed everything again")
	}
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(o.Collector())
	page := httptest.NewRecorder()
	promhttp.HandlerFor(registry, promhttp.HandlerOpts{}).ServeHTTP(page, httptest.NewRequest("GET", "/metrics", nil))
	for _, want := range []string{`edgeward_orders{order="allow"} 1`, `edgeward_orders{order="pause"} 1`, `edgeward_orders{order="unban"} 0`, `edgeward_stood_down 0`} {
		if !strings.Contains(page.Body.String(), "\n"+want+"\n") {
			t.Errorf("no metric says %s", want)
		}
	}
	o.ask(Order{Verb: "pause"}, "this node enforces again")
	o.drops(true, "198.51.100.9", "2001:db8::1")
	o.drops(false, "203.0.113.66")
	o.ask(Order{Verb: "pause"}, "this node is not paused")
	// It ends by itself, and with the agent dead: time alone passes here.
	o.ask(Order{Verb: "pause", For: 10 * time.Minute}, "drops nothing")
	o.at = o.at.Add(10 * time.Minute)
	o.drops(true, "198.51.100.9", "2001:db8::1")
	o.drops(false, "203.0.113.66")
	if o.Status().Orders.Pause != nil {
		t.Error("status says that the node is paused")
	}
}

// TestOrdersSurvive a restart, a kernel that was emptied, and a LAPI that is away.
func TestOrdersSurvive(t *testing.T) {
	o := newOrdered(t, t.TempDir())
	o.ask(Order{Verb: "allow", Address: "203.0.113.66", For: time.Hour}, "no ban stops")
	o.ask(Order{Verb: "unban", Address: "198.51.100.9"}, "counts no more")
	o.save(true)
	o.memory.flush()
	o.restart()
	if _, err := o.turn(t.Context()); err != nil {
		t.Fatal(err)
	}
	o.drops(false, "203.0.113.66", "198.51.100.9")
	o.drops(true, "198.51.100.8")
	// A successor that has installed nothing yet is obeyed at once.
	o.restart()
	o.ask(Order{Verb: "pause", For: time.Minute}, "drops nothing")
	o.drops(false, "198.51.100.8")
	// What the kernel does not take is not in force, and not said to be.
	o.memory.fails = 1
	o.ask(Order{Verb: "pause"}, errKernel.Error())
	if o.Status().Orders.Pause == nil {
		t.Error("an order that failed is said to be in force")
	}
	// Where nothing can be saved the answer says so.
	o.config.StateDir = ""
	o.restart()
	o.ask(Order{Verb: "pause", For: time.Minute}, "a restart of the agent would end this")
}

// TestOrdersOverAnOlderRelease: what enforces may know no waivers.
func TestOrdersOverAnOlderRelease(t *testing.T) {
	o := newOrdered(t, t.TempDir())
	o.memory.older = true
	o.restart()
	o.ask(Order{Verb: "pause", For: time.Hour}, "an older release's bans are enforced until LAPI answers")
	o.answer(true, o.bans()...)
	o.memory.older = true
	o.ask(Order{Verb: "pause", For: time.Hour}, "drops nothing")
	o.drops(false, "203.0.113.66", "198.51.100.9")
}

func TestOrdersThatMakeNoSense(t *testing.T) {
	o := newOrdered(t, t.TempDir())
	for _, c := range []struct {
		order Order
		want  string
	}{
		{Order{Verb: "allow", Address: "home", For: time.Hour}, `"home": want an address or a range`},
		{Order{Verb: "allow", Address: "203.0.113.66"}, "0s: want a duration above zero"},
		{Order{Verb: "allow", Address: "203.0.113.66", For: -time.Hour}, "-1h0m0s: want a duration above zero"},
		{Order{Verb: "allow", Address: "203.0.113.66", For: 721 * time.Hour}, "721h0m0s: want at most 720h0m0s"},
		{Order{Verb: "allow", Address: "0.0.0.0/0", For: time.Hour}, "that is what pause is for"},
		{Order{Verb: "allow", Address: "203.0.113.66", For: time.Hour, Because: strings.Repeat("x", 201)}, "want at most 200"},
		{Order{Verb: "unban", Address: "198.51.100.0/24"}, "want an address such as"},
		{Order{Verb: "unban", Address: "fe80::1%eth0"}, "want an address such as"},
		{Order{Verb: "pause", For: 25 * time.Hour}, "25h0m0s: want at most 24h0m0s"},
		{Order{Verb: "pause", For: -1}, "want a duration above zero"},
		{Order{Verb: "ban", Address: "192.0.2.1"}, "404"},
	} {
		o.ask(c.order, c.want)
	}
	if n := o.Status().Orders.count(); n != 0 {
		t.Errorf("%d orders are in force", n)
	}
	o.drops(true, "203.0.113.66", "198.51.100.9")
	o.config.Mode = Observe
	o.restart()
	o.ask(Order{Verb: "pause", For: time.Hour}, "the mode is observe")
}

// TestKernelHoldsWhatOrdersSay gives orders at random among random decisions, time
// that passes, writes that fail and foreign flushes, and compares the kernel with
// an oracle after each.
func TestKernelHoldsWhatOrdersSay(t *testing.T) {
	t.Parallel()
	for seed := range int64(30) {
		var m *memory
		s := newStream(t, seed, func(now func() time.Time) kernel { m = newMemory(now); return m })
		e := s.enforcer
		if err := e.verify(); err != nil {
			t.Fatal(err)
		}
		allowed := map[netip.Prefix]time.Time{}
		var paused time.Time
		accepted := 0
		for step := range 50 {
			what := ""
			var err error
			switch s.Intn(8) {
			case 0, 1:
				what, err = "delta", s.delta()
			case 2:
				what, err = "full pull", s.full()
			case 3:
				what = "flush"
				m.flush()
				err = e.verify()
			case 4:
				what = "time"
				s.at = s.at.Add(time.Duration(s.Intn(600)) * time.Second)
				err = e.verify() // the loop would: something may have ended
			case 5:
				what = "pause"
				d := time.Duration(s.Intn(4)) * time.Minute
				m.fails = s.Intn(3) / 2
				if _, _, refused := e.pause(d, "", "test"); refused == nil {
					accepted++
					paused = s.at.Add(d)
				}
				m.fails = 0
				err = e.verify()
			default:
				what = "allow"
				p := s.prefix()
				d := time.Duration(1+s.Intn(1200)) * time.Second
				if s.Intn(3) == 0 {
					d = 0
				}
				m.fails = s.Intn(3) / 2
				if _, _, refused := e.allow(p, d, "", "test"); refused == nil {
					accepted++
					allowed[p] = s.at.Add(d)
				}
				m.fails = 0
				err = e.verify()
			}
			if err != nil {
				t.Fatalf("seed %d step %d, %s: %v", seed, step, what, err)
			}
			for _, base := range bases {
				b := netip.MustParseAddr(base).AsSlice()
				for i := range 66 {
					b[len(b)-1] = byte(i)
					a, _ := netip.AddrFromSlice(b)
					want := s.want(a) && !paused.After(s.at)
					for p, until := range allowed {
						want = want && !(p.Contains(a) && until.After(s.at))
					}
					if got := m.drops(a); got != want {
						t.Fatalf("seed %d step %d, after a %s: %v is dropped: %v, want %v; allowed %v, paused until %v", seed, step, what, a, got, want, allowed, paused)
					}
				}
			}
		}
		if accepted == 0 {
			t.Errorf("seed %d: no order was ever accepted", seed)
		}
	}
}

// TestUnbanEnds when the decisions that it set aside are gone, and not before
// that is known.
func TestUnbanEnds(t *testing.T) {
	o := newOrdered(t, t.TempDir())
	o.ask(Order{Verb: "unban", Address: "203.0.113.66"}, "to lift it everywhere: cscli decisions delete --ip 203.0.113.66 ")
	o.restart()
	if _, err := o.turn(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := len(o.Status().Orders.Unbans); n != 1 {
		t.Errorf("%d unbans before LAPI has answered", n)
	}
	o.answer(true, o.bans()...)
	o.answer(false, lapi.Row{ID: 1})
	if n := len(o.Status().Orders.Unbans); n != 0 || !strings.Contains(o.log.String(), "no decision holds the address any more") {
		t.Errorf("%d unbans of what nothing holds", n)
	}
}

// TestUnbanFromAList: what a file names cscli cannot lift, and it has no end.
func TestUnbanFromAList(t *testing.T) {
	s := newShelf(t, t.TempDir(), true)
	s.answer(true, decided(1, "203.0.113.9", "ban", "crowdsec", "ssh"))
	s.put("203.0.113.0/24")
	o := &ordered{node: s.node, t: t, log: &s.log}
	o.listen()
	o.ask(Order{Verb: "unban", Address: "203.0.113.8"}, "1 decision counts no more for 203.0.113.8 on this node alone, for as long as the list mine names it; "+
		"one that is made later counts again; to lift it for good take 203.0.113.0/24 out of "+s.path+" ")
	o.ask(Order{Verb: "unban", Address: "203.0.113.9"}, "; to lift it everywhere: cscli decisions delete --ip 203.0.113.9; to lift it for good take ")
	o.why("203.0.113.8", "pass", "it is unbanned on this node for as long as the list mine names it")
	o.drops(false, "203.0.113.8", "203.0.113.9")
	s.put("203.0.113.77")
	s.put("203.0.113.77", "203.0.113.0/24")
	o.drops(true, "203.0.113.8")
}

// TestUnbanAtTheAuthEndpoint: what proxies alone are told to refuse can be
// lifted, too.
func TestUnbanAtTheAuthEndpoint(t *testing.T) {
	o := newOrdered(t, t.TempDir())
	captcha := decided(8, "192.0.2.8", "captcha", "crowdsec", "http")
	o.answer(false, captcha)
	o.ask(Order{Verb: "unban", Address: "192.0.2.8"}, "no decision that this node enforces holds 192.0.2.8")
	o.why("192.0.2.8", "pass", "; left to the upper layers: captcha")
	o.config.Auth = AuthConfig{Listen: netip.MustParseAddrPort("127.0.0.1:1"), Remediations: []Remediation{"ban", "captcha"}}
	o.restart()
	o.answer(true, append(o.bans(), captcha)...)
	o.why("192.0.2.8", "pass", "the kernel leaves it alone, and /v1/auth refuses it; left by the kernel, refused by /v1/auth")
	o.ask(Order{Verb: "unban", Address: "192.0.2.8"}, "1 decision counts no more for 192.0.2.8")
	o.why("192.0.2.8", "pass", "waived: it is unbanned on this node until ")
	if v, _ := o.Bouncer.auth.judge(netip.MustParseAddr("192.0.2.8"), true); v.ID != 0 {
		t.Errorf("a proxy is told %+v", v)
	}
}

// TestCleanupStandsDown: the agent lets go, says so, and takes nothing up again.
func TestCleanupStandsDown(t *testing.T) {
	o := newOrdered(t, t.TempDir())
	o.memory.fails = 1
	o.ask(Order{Verb: "cleanup"}, errKernel.Error())
	o.drops(true, "203.0.113.66")
	if err := o.Ready(); err != nil {
		t.Error(err)
	}
	o.ask(Order{Verb: "cleanup"}, "the agent removed the table inet edgeward")
	o.answer(false, decided(9, "192.0.2.66", "ban", "crowdsec", "ssh"))
	o.answer(true, o.bans()...)
	for range 2 {
		if _, err := o.turn(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	o.drops(false, "203.0.113.66", "192.0.2.66")
	if o.memory.enforcing {
		t.Error("the table is back")
	}
	s := o.Status()
	if !s.StoodDown || s.Kernel.Enforcing || !strings.Contains(s.Ready, "until the agent is restarted") {
		t.Errorf("status %+v", s)
	}
	o.why("203.0.113.66", "pass", "nothing is enforced: cleanup removed the table until the agent is restarted; would be enforced")
	o.ask(Order{Verb: "pause", For: time.Hour}, "the table is removed")
	o.restart()
	o.answer(true, o.bans()...)
	o.drops(true, "203.0.113.66")
}

// TestOrdersFile: what does not make sense is refused as a whole.
func TestOrdersFile(t *testing.T) {
	for name, c := range map[string]struct {
		text  string
		now   time.Duration // after the writing
		want  string        // the error
		count int
	}{
		"empty":           {``, 0, "EOF", 0},
		"cut":             {`{"format":1,"wri`, 0, "unexpected EOF", 0},
		"another format":  {`{"format":2}`, 0, "format 2, not 1", 0},
		"unknown key":     {`{"format":1,"allow":[]}`, 0, `unknown field "allow"`, 0},
		"more":            {`{"format":1}{}`, 0, "more follows", 0},
		"everybody":       {`{"format":1,"written":"2027-01-15T08:00:00Z","allows":[{"prefix":"0.0.0.0/0","until":"2027-01-15T09:00:00Z"}]}`, 0, "an order to allow makes no sense", 0},
		"too long":        {`{"format":1,"written":"2027-01-15T08:00:00Z","pause":{"until":"2027-01-17T09:00:00Z"}}`, 0, "an order to pause makes no sense", 0},
		"of no decision":  {`{"format":1,"written":"2027-01-15T08:00:00Z","unbans":[{"address":"192.0.2.1","until":"2027-01-15T09:00:00Z"}]}`, 0, "an order to unban makes no sense", 0},
		"right":           {`{"format":1,"written":"2027-01-15T08:00:00Z","pause":{"until":"2027-01-15T09:00:00Z"}}`, 0, "", 1},
		"over":            {`{"format":1,"written":"2027-01-15T08:00:00Z","pause":{"until":"2027-01-15T09:00:00Z"}}`, time.Hour, "", 0},
		"before its time": {`{"format":1,"written":"2027-01-15T08:00:00Z","pause":{"until":"2027-01-15T09:00:00Z"}}`, -1000 * time.Hour, "", 1},
	} {
		written := time.Date(2027, 1, 15, 8, 0, 0, 0, time.UTC)
		now := written.Add(c.now)
		o, err := parseOrders([]byte(c.text), now)
		if got := errorText(err); got != c.want && (c.want == "" || !strings.Contains(got, c.want)) || o.count() != c.count {
			t.Errorf("%s: %d orders, error %q, want %d, %q", name, o.count(), got, c.count, c.want)
		}
		if o.Pause != nil && o.Pause.Until.Sub(now) != time.Hour {
			t.Errorf("%s: paused for another %v", name, o.Pause.Until.Sub(now))
		}
	}
	// A broken file keeps nobody from starting, and is said once.
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, ordersName), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	n := newNode(t, "", nil)
	n.config.StateDir = dir
	if _, err := newBouncer(n.config, n.memory, n.guard, n.clock.now, slog.New(slog.NewTextHandler(&log, nil))); err != nil {
		t.Error(err)
	}
	if strings.Count(log.String(), "cannot read the operator's orders") != 1 {
		t.Error(log.String())
	}
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func FuzzOrders(f *testing.F) {
	f.Add([]byte(`{"format":1,"written":"2027-01-15T08:00:00Z","allows":[{"prefix":"198.51.100.0/24","until":"2027-01-15T09:00:00Z"}],` +
		`"unbans":[{"address":"2001:db8::1","decisions":[1],"until":"2027-01-15T09:00:00Z"}],"pause":{"until":"2027-01-15T09:00:00Z"}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		now := time.Date(2027, 1, 15, 8, 30, 0, 0, time.UTC)
		o, err := parseOrders(text, now)
		if err != nil {
			return
		}
		m := newMemory(func() time.Time { return now })
		m.waive(o.waivers(now)) // panics where they overlap
		for _, w := range m.waived {
			if !w.until.After(now) || w.to.Less(w.from) {
				t.Fatalf("%+v", w)
			}
		}
	})
}

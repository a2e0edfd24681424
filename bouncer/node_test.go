package bouncer

import (
	"context"
	"log/slog"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/edgeward/edgeward/internal/crowdsec"
	"github.com/edgeward/edgeward/internal/lapi"
	"github.com/edgeward/edgeward/internal/nft"
)

// node is a bouncer on a kernel in memory, whose LAPI is the test.
type node struct {
	*Bouncer
	clock
	memory *memory
	sink   lapi.Sink
	config Config
}

func newNode(t testing.TB, dir string, change func(*Config)) *node {
	t.Helper()
	n := &node{clock: clock{epoch}, config: Defaults()}
	n.config.StateDir = dir
	n.config.LAPI.URL = "http://192.0.2.9:8080"
	n.config.Protect.Addresses = []netip.Prefix{netip.MustParsePrefix("203.0.113.7/32")}
	if change != nil {
		change(&n.config)
	}
	n.memory = newMemory(n.clock.now)
	n.boot(t)
	return n
}

// boot makes the bouncer anew, on the kernel as it is.
func (n *node) boot(t testing.TB) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	g := newGuard(&n.config, func(string) string { return "" }, log)
	b, err := newBouncer(n.config, n.memory, g, n.clock.now, log)
	if err != nil {
		t.Fatal(err)
	}
	n.Bouncer = b
	b.seenLists() // no goroutine does
	n.sink = b.Sink()
	if n.memory.intact {
		n.memory.intact = false // what is there was another process's
	}
}

// answer is an answer of LAPI.
func (n *node) answer(full bool, rows ...lapi.Row) bool {
	n.sink.Begin(full, n.at)
	for i := range rows {
		if rows[i].Type == "" {
			n.sink.Delete(rows[i].ID)
		} else {
			n.sink.Add(&rows[i])
		}
	}
	return n.sink.Commit()
}

func decided(id int, value, typ, origin, scenario string) lapi.Row {
	scope := "Ip"
	if strings.Contains(value, "/") {
		scope = "Range"
	}
	return lapi.Row{ID: id, Scope: scope, Value: value, Type: typ, Origin: origin, Scenario: scenario, Duration: "1h"}
}

func TestFeedReachesKernelAndBack(t *testing.T) {
	n := newNode(t, "", nil)
	if err := n.Ready(); err == nil || !strings.Contains(err.Error(), "no decisions yet") {
		t.Error(err)
	}
	n.memory.bypasses = []nft.Bypass{{Kind: "xdp", Name: "eth0"}}
	if _, err := n.turn(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.answer(true,
		decided(1, "203.0.113.66", "ban", "crowdsec", "ssh"),
		decided(2, "203.0.113.67", "captcha", "crowdsec", "http"),
		decided(3, "198.51.100.0/24", "ban", "lists", "firehol"),
		decided(4, "203.0.113.7", "ban", "CAPI", "ssh"),
		decided(5, "10.9.9.9", "ban", "CAPI", "ssh"),
		decided(6, "2001:db8::66", "ban", "CAPI", "ssh"),
		decided(7, "nonsense", "ban", "CAPI", "ssh"),
	)
	for addr, want := range map[string]bool{"203.0.113.66": true, "203.0.113.67": false, "198.51.100.9": true,
		"203.0.113.7": false, "10.9.9.9": false, "2001:db8::66": true, "198.18.0.77": false} {
		if got := n.memory.drops(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s is dropped: %v", addr, got)
		}
	}
	if err := n.Ready(); err != nil {
		t.Error(err)
	}
	for addr, want := range map[string][]string{
		"203.0.113.66": {"drop", "its packets are dropped for another 1h0m0s"},
		"203.0.113.67": {"pass", "decisions hold it, and none of them is enforced here", "left to the upper layers: captcha"},
		"198.51.100.9": {"drop", "lists:firehol"},
		"203.0.113.7":  {"pass", "decisions hold it, but it is protected: protect.addresses", "the address is protected"},
		"10.9.9.9":     {"pass", "the address is private, and the decision was made elsewhere"},
		"127.0.0.2":    {"pass", "nothing holds it, and it is protected: loopback"},
		"198.18.0.77":  {"pass", "no decision holds it"}, // of no test network: machines have addresses in those
	} {
		w, err := n.Why(netip.MustParseAddr(addr))
		if err != nil {
			t.Fatal(err)
		}
		text := w.Verdict + ": " + w.Says
		for _, d := range w.Decisions {
			text += "; " + d.Origin + " " + d.Because
		}
		for _, piece := range want {
			if !strings.Contains(text, piece) {
				t.Errorf("why %s: %s, want %s", addr, text, piece)
			}
		}
	}
	n.memory.dropped = []nft.Counter{
		{Kind: nft.Banned, Name: "ban/crowdsec", Packets: 3, Bytes: 180},
		{Kind: nft.Banned, Name: "ban/lists:firehol", IPv6: true, Packets: 1, Bytes: 80},
		{Kind: nft.Seen, Packets: 100, Bytes: 9000},
		{Kind: nft.Protected, Packets: 2, Bytes: 90},
		{Kind: nft.Locked, Name: "ingress", Packets: 5, Bytes: 300},
		{Kind: nft.Unclassified, Packets: 0},
		{Kind: nft.Resumed, Packets: 6, Bytes: 400},
	}
	s := n.Status()
	if s.Ready != "yes" || !s.LAPI.Answering || len(s.Covered) != 1 || s.Covered[0].Protects != "protect.addresses" || s.Skipped["value"] != 1 ||
		!slices.Equal(s.Bypasses, n.memory.bypasses) {
		t.Errorf("status %+v", s)
	}
	want := []Count{
		{"CAPI", "ban", "ipv4", true, 2}, {"CAPI", "ban", "ipv6", true, 1},
		{"crowdsec", "ban", "ipv4", true, 1}, {"crowdsec", "captcha", "ipv4", false, 1}, {"lists:firehol", "ban", "ipv4", true, 1},
	}
	if d := cmp.Diff(want, s.Decisions); d != "" {
		t.Error(d)
	}
	totals, err := n.Totals()
	if err != nil {
		t.Fatal(err)
	}
	wantTotals := crowdsec.Totals{
		{Name: "dropped", Unit: "packet", Origin: "crowdsec", Remediation: "ban", IPType: "ipv4"}:           3,
		{Name: "dropped", Unit: "byte", Origin: "crowdsec", Remediation: "ban", IPType: "ipv4"}:             180,
		{Name: "dropped", Unit: "packet", Origin: "lists:firehol", Remediation: "ban", IPType: "ipv6"}:      1,
		{Name: "dropped", Unit: "byte", Origin: "lists:firehol", Remediation: "ban", IPType: "ipv6"}:        80,
		{Name: "processed", Unit: "packet", IPType: "ipv4"}:                                                 100,
		{Name: "processed", Unit: "byte", IPType: "ipv4"}:                                                   9000,
		{Name: "active_decisions", Unit: "ip", Origin: "CAPI", Remediation: "ban", IPType: "ipv4"}:          2,
		{Name: "active_decisions", Unit: "ip", Origin: "CAPI", Remediation: "ban", IPType: "ipv6"}:          1,
		{Name: "active_decisions", Unit: "ip", Origin: "crowdsec", Remediation: "ban", IPType: "ipv4"}:      1,
		{Name: "active_decisions", Unit: "ip", Origin: "lists:firehol", Remediation: "ban", IPType: "ipv4"}: 1,
	}
	if d := cmp.Diff(wantTotals, totals, cmpopts.EquateEmpty()); d != "" {
		t.Error(d)
	}
	if _, err := n.turn(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.Pulled(lapi.ErrRefused)
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(n.Collector())
	page := httptest.NewRecorder()
	promhttp.HandlerFor(registry, promhttp.HandlerOpts{}).ServeHTTP(page, httptest.NewRequest("GET", "/metrics", nil))
	for _, want := range []string{
		`edgeward_decisions{enforced="false",ip_type="ipv4",origin="crowdsec",remediation="captcha"} 1`,
		`edgeward_dropped_packets_total{ip_type="ipv4",origin="crowdsec",remediation="ban"} 3`,
		`edgeward_dropped_bytes_total{ip_type="ipv6",origin="lists:firehol",remediation="ban"} 80`,
		`edgeward_processed_packets_total{ip_type="ipv4"} 100`,
		`edgeward_protected_packets_total{ip_type="ipv4"} 2`,
		`edgeward_locked_packets_total{ip_type="ipv4",lock="ingress"} 5`,
		`edgeward_kernel_elements{set="bans4"} 1`, `edgeward_kernel_elements{set="ranges4"} 1`, `edgeward_kernel_intact 1`,
		`edgeward_kernel_transactions_total{kind="install"} 1`, `edgeward_pulls_total{kind="full"} 1`, `edgeward_failed_pulls_total 1`,
		`edgeward_decisions_skipped_total{reason="value"} 1`, `edgeward_covered_decisions 1`, `edgeward_bypasses{kind="xdp"} 1`, `edgeward_bypasses{kind="tc"} 0`, `edgeward_bypasses{kind="exempt"} 0`, `edgeward_resumed_packets_total{ip_type="ipv4"} 6`, `edgeward_mode{mode="enforce"} 1`,
	} {
		if !strings.Contains(page.Body.String(), "\n"+want+"\n") {
			t.Errorf("no metric says %s:\n%s", want, page.Body)
		}
	}
}

// TestReadyMeansTheKernel: ready is what the kernel holds, not that the process
// lives.
func TestReadyMeansTheKernel(t *testing.T) {
	n := newNode(t, "", nil)
	n.answer(true, decided(1, "203.0.113.66", "ban", "crowdsec", "ssh"))
	if err := n.Ready(); err != nil {
		t.Fatal(err)
	}
	n.memory.flush()
	n.memory.fails = 1
	if _, err := n.turn(t.Context()); err == nil || n.Ready() == nil {
		t.Error("ready, with an empty kernel that takes nothing")
	}
	if _, err := n.turn(t.Context()); err != nil || n.Ready() != nil {
		t.Error("not ready after the repair", err, n.Ready())
	}
	n.memory.fails = 1
	n.answer(false, decided(2, "203.0.113.67", "ban", "crowdsec", "ssh"))
	if n.Ready() == nil {
		t.Error("ready, with a ban that the kernel did not take")
	}
	if !n.memory.drops(netip.MustParseAddr("203.0.113.66")) {
		t.Error("a failed write cost a ban")
	}
	if _, err := n.turn(t.Context()); err != nil || n.Ready() != nil || !n.memory.drops(netip.MustParseAddr("203.0.113.67")) {
		t.Error("not mended", err, n.Ready())
	}
	n.at = n.at.Add(4 * verifyInterval)
	if n.Ready() == nil {
		t.Error("ready, and nobody has looked for minutes")
	}
}

// TestEmptyAnswerIsDoubted: a LAPI that forgets everything deletes nothing.
func TestEmptyAnswerIsDoubted(t *testing.T) {
	n := newNode(t, "", nil)
	var rows []lapi.Row
	for i := range 500 {
		rows = append(rows, decided(i, netip.AddrFrom4([4]byte{20, 0, byte(i >> 8), byte(i)}).String(), "ban", "CAPI", "ssh"))
	}
	n.answer(true, rows...)
	if doubt := n.answer(true); !doubt || len(n.memory.elements) != 500 {
		t.Errorf("doubted: %v, %d bans left", doubt, len(n.memory.elements))
	}
}

// TestRestartsGoOnFromTheSnapshot saves, boots with an empty kernel and no LAPI,
// and enforces.
func TestRestartsGoOnFromTheSnapshot(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	n := newNode(t, dir, nil)
	n.answer(true, decided(1, "203.0.113.66", "ban", "crowdsec", "ssh"), decided(2, "198.51.100.0/24", "ban", "CAPI", "x"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	close(n.memory.events)
	if err := n.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if !n.memory.drops(netip.MustParseAddr("203.0.113.66")) {
		t.Fatal("the end of the agent took the ban with it")
	}
	n.memory.flush()
	n.boot(t)
	if _, err := n.turn(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !n.memory.drops(netip.MustParseAddr("203.0.113.66")) || !n.memory.drops(netip.MustParseAddr("198.51.100.1")) || n.Ready() != nil {
		t.Error("the snapshot is not enforced", n.Ready())
	}
	// LAPI's word replaces it, and an id of the snapshot can be deleted.
	n.answer(false, lapi.Row{ID: 1})
	if n.memory.drops(netip.MustParseAddr("203.0.113.66")) {
		t.Error("what LAPI deleted is still enforced")
	}
}

func TestControlSocket(t *testing.T) {
	n := newNode(t, "", nil)
	n.answer(true, decided(1, "203.0.113.66", "ban", "crowdsec", "ssh"))
	path := filepath.Join(t.TempDir(), "run", "bouncer.sock")
	log := slog.New(slog.DiscardHandler)
	if _, err := AskStatus(t.Context(), path); err == nil || !strings.Contains(err.Error(), "nobody answers at "+path) {
		t.Error(err)
	}
	c, err := ListenControl(path, n.Bouncer, log)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	if _, err := ListenControl(path, n.Bouncer, log); err != nil { // which waits for its turn, and takes nothing
		t.Error(err)
	}
	s, err := AskStatus(t.Context(), path)
	if err != nil || s.Mode != Enforce || !slices.ContainsFunc(s.Decisions, func(c Count) bool { return c.Count == 1 }) {
		t.Errorf("%+v %v", s, err)
	}
	w, err := AskWhy(t.Context(), path, netip.MustParseAddr("203.0.113.66"))
	if err != nil || w.Verdict != "drop" {
		t.Errorf("%+v %v", w, err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// BenchmarkDelta is one ban on top of many, without the kernel.
func BenchmarkDelta(b *testing.B) {
	n := newNode(b, "", nil)
	var rows []lapi.Row
	for i := range 100_000 {
		rows = append(rows, decided(i, netip.AddrFrom4([4]byte{20, byte(i >> 16), byte(i >> 8), byte(i)}).String(), "ban", "CAPI", "ssh"))
	}
	n.answer(true, rows...)
	id := 1_000_000
	for b.Loop() {
		id++
		n.answer(false, decided(id, "203.0.113.66", "ban", "crowdsec", "ssh"), lapi.Row{ID: id - 1})
	}
}

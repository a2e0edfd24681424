package bouncer

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"testing"
	"time"

	"github.com/edgeward/edgeward/internal/config"
	"github.com/edgeward/edgeward/internal/decision"
	"github.com/edgeward/edgeward/internal/lapi"
	"github.com/edgeward/edgeward/internal/nft"
)

func locks() []LockConfig {
	return []LockConfig{{Name: "ingress", Ports: []config.Port{80, 443}, From: []Source{{Prefixes: []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}}}}}
}

// TestWhyAndStatusKnowLocks: who meets a lock is told so, and who does not is not.
func TestWhyAndStatusKnowLocks(t *testing.T) {
	n := newNode(t, t.TempDir(), func(c *Config) { c.Firewall.Locks = locks() })
	n.answer(true, decided(1, "203.0.113.66", "ban", "crowdsec", "ssh"))
	if _, err := n.turn(t.Context()); err != nil {
		t.Fatal(err)
	}
	meets := func(what, addr string, want bool) {
		t.Helper()
		w, err := n.Why(netip.MustParseAddr(addr))
		if err != nil || (len(w.Locks) == 1 && w.Locks[0].Closed && slices.Equal(w.Locks[0].Ports, []uint16{80, 443})) != want {
			t.Errorf("%s: %s meets %+v %v", what, addr, w.Locks, err)
		}
	}
	meets("a stranger", "203.0.113.9", true)
	meets("one of from", "198.51.100.7", false)
	meets("a protected address", "203.0.113.7", false)
	if _, _, err := n.enforcer.unban(netip.MustParseAddr("203.0.113.66"), false, "", "test"); err != nil {
		t.Fatal(err)
	}
	meets("who is unbanned", "203.0.113.66", true) // which opens no lock
	if _, _, err := n.enforcer.allow(netip.MustParsePrefix("203.0.113.9/32"), time.Hour, "", "test"); err != nil {
		t.Fatal(err)
	}
	meets("who is allowed", "203.0.113.9", false)
	n.memory.dropped = []nft.Counter{{Kind: nft.Locked, Name: "ingress", Packets: 5, Bytes: 300}, {Kind: nft.Locked, Name: "ingress", IPv6: true, Packets: 1, Bytes: 80}}
	if s := n.Status().Locks; len(s) != 1 || s[0].Packets != 6 || s[0].Bytes != 380 || s[0].Name != "ingress" {
		t.Errorf("status %+v", s)
	}
}

// TestStatusTellsOfARefusedKey from the pull that was refused on.
func TestStatusTellsOfARefusedKey(t *testing.T) {
	n := newNode(t, "", nil)
	n.answer(true)
	n.Pulled(nil)
	if s := n.Status().LAPI; !s.Answering || s.Error != "" {
		t.Errorf("%+v", s)
	}
	since := n.at
	n.Pulled(lapi.ErrRefused)
	n.at = n.at.Add(time.Second)
	n.Pulled(lapi.ErrRefused)
	if s := n.Status().LAPI; s.Answering || s.Error != lapi.ErrRefused.Error() || !s.Failing.Equal(since) {
		t.Errorf("%+v", s)
	}
	n.Pulled(fmt.Errorf("pull decisions: %w", &url.Error{Op: "Get", URL: "http://lapi/v1", Err: errors.New("connection refused")}))
	if s := n.Status().LAPI; s.Error != "connection refused" {
		t.Errorf("%+v", s)
	}
	n.Pulled(nil)
	if s := n.Status().LAPI; !s.Answering || s.Error != "" || !s.Failing.IsZero() {
		t.Errorf("%+v", s)
	}
}

// TestObserveSaysThatItDoesNotEnforce.
func TestObserveSaysThatItDoesNotEnforce(t *testing.T) {
	n := newNode(t, "", func(c *Config) { c.Mode = Observe; c.Firewall.Locks = locks() })
	n.answer(true, decided(1, "203.0.113.66", "ban", "crowdsec", "ssh"))
	w, err := n.Why(netip.MustParseAddr("203.0.113.66"))
	if err != nil || w.Verdict != "observe" || w.Decisions[0].Enforced || w.Decisions[0].Because != "would be enforced: the mode is observe" ||
		len(w.Locks) != 1 || w.Locks[0].Closed {
		t.Errorf("%+v %v", w, err)
	}
	enforces := n.config
	enforces.Mode = Enforce
	for _, c := range []Config{n.config, enforces} {
		if is := c.ModeOf(n.memory.layout); is != Observe {
			t.Errorf("the kernel's rules are said to %q", is)
		}
	}
	if is := n.config.ModeOf("another"); is != "" {
		t.Errorf("rules that nobody knows are said to %q", is)
	}
}

// TestUnreadableRowsDeleteNothing: a full pull with a row that cannot be read
// is not believed, and the decision that it may have been stays for one more.
func TestUnreadableRowsDeleteNothing(t *testing.T) {
	n := newNode(t, "", nil)
	rows := []lapi.Row{decided(1, "203.0.113.66", "ban", "crowdsec", "ssh"), decided(2, "203.0.113.67", "ban", "crowdsec", "ssh"), decided(3, "203.0.113.68", "ban", "crowdsec", "ssh")}
	n.answer(true, rows...)
	for pull := range 2 {
		n.sink.Begin(true, n.at)
		for i := range rows[:2] {
			n.sink.Add(&rows[i])
		}
		n.sink.Unreadable() // the third
		if doubt := n.sink.Commit(); !doubt || !n.memory.drops(netip.MustParseAddr("203.0.113.68")) {
			t.Errorf("pull %d: doubted: %v, or a ban is gone", pull, doubt)
		}
	}
}

// TestSaveBetweenAnAnswerAndItsTable: what comes in while a snapshot is written
// is in the next one.
func TestSaveBetweenAnAnswerAndItsTable(t *testing.T) {
	dir := t.TempDir()
	n := newNode(t, dir, nil)
	n.answer(true, decided(1, "203.0.113.66", "ban", "crowdsec", "ssh"), decided(2, "203.0.113.67", "ban", "crowdsec", "ssh"))
	n.at = n.at.Add(10 * time.Minute)
	n.save(false)
	n.at = n.at.Add(saveInterval + time.Minute)
	n.answer(false, decided(4, "203.0.113.70", "ban", "crowdsec", "ssh")) // a save is due
	asked := false
	n.Bouncer.now = func() time.Time { // first by the answer, before its table counts
		now := n.at
		if !asked {
			asked = true
			n.at = n.at.Add(time.Second)
			n.Bouncer.now = n.clock.now
			n.save(false)
		}
		return now
	}
	n.answer(false, lapi.Row{ID: 2})
	if !asked {
		t.Fatal("nothing was saved meanwhile")
	}
	n.at = n.at.Add(time.Minute)
	n.save(true)
	store := decision.NewStore()
	if _, _, err := loadSnapshot(dir, store, n.at); err != nil {
		t.Fatal(err)
	}
	left := map[int]bool{}
	store.Compile().Each(n.at, func(id int, _ netip.Prefix, _ time.Time, _ decision.Class) bool { left[id] = true; return true })
	if left[2] || !left[1] || !left[4] {
		t.Errorf("the last snapshot has %v", left)
	}
}

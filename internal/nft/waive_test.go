package nft

import (
	"errors"
	"testing"
	"time"
)

func waive(from, to string, d time.Duration) Range {
	return Range{From: addr(from), To: addr(to), Timeout: d}
}

// Waivers let packets pass whatever bans them, at once, and leave bans, locks and
// the look at what is intact alone.
func TestWaivers(t *testing.T) {
	t.Parallel()
	for _, observe := range []bool{false, true} {
		w := newWorld(t)
		cfg := config()
		cfg.Observe = observe
		cfg.Locks = []Lock{{Name: "nobody", Ports: []uint16{w.host.Addr.Port()}}}
		w.install(cfg, content(nil, ban(bad4), ban(bad6), banRange("198.51.100.0", "198.51.100.255")))
		reaches := func(from string, want bool) {
			t.Helper()
			// The pod is not locked.
			client := w.client
			if want || observe {
				client = client.Patient()
			}
			if err := client.UDP(addr(from), w.to(w.inPod, addr(from))); (err == nil) != (want || observe) {
				t.Errorf("observe %t: from %s: %v", observe, from, err)
			}
		}
		reaches(bad4.String(), false)
		if err := w.conn.Waive(Waivers{Bans: []Range{
			waive("198.51.100.8", "198.51.100.8", time.Hour), waive(bad4.String(), bad4.String(), time.Hour),
			waive(bad6.String(), bad6.String(), time.Hour)}}); err != nil {
			t.Fatal(err)
		}
		for _, from := range []string{bad4.String(), bad6.String(), "198.51.100.8"} {
			reaches(from, true)
		}
		reaches("198.51.100.9", false)
		if !observe && w.client.UDP(peer4, w.to(w.host, peer4)) == nil {
			t.Error("a waived ban opened a lock")
		}
		if h := w.read(); !h.Intact || h.Bans4 != 1 {
			t.Errorf("after a waiver: %+v", h)
		}
		if n := w.counter(Waived, "", false); n == 0 != observe {
			t.Errorf("observe %t: %d packets are counted as waived", observe, n)
		}
		// Everything, as a pause does, and locks too.
		all := []Range{waive("0.0.0.0", "255.255.255.255", time.Hour), waive("::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", time.Hour)}
		if err := w.conn.Waive(Waivers{Bans: all, Locks: all}); err != nil {
			t.Fatal(err)
		}
		w.stopped(false, bad4, bad6, peer4, addr("198.51.100.9"))
		w.nft()
		if err := w.conn.Waive(Waivers{}); err != nil {
			t.Fatal(err)
		}
		reaches(bad4.String(), false)
	}
}

// A waiver ends at its time with nobody there to end it, a successor may change
// what it did not install, and a new generation has waivers from the start.
func TestWaiversOutliveTheirProcess(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	if err := w.conn.Waive(Waivers{}); !errors.Is(err, ErrNotInstalled) {
		t.Errorf("without a table: %v", err)
	}
	all := content(nil, ban(bad4), ban(bad6))
	all.Waivers.Bans = []Range{waive("203.0.113.0", "203.0.113.255", 2*time.Second)}
	w.install(config(), all)
	w.conn.Close()
	w.stopped(false, bad4)
	w.stopped(true, bad6)
	time.Sleep(2 * time.Second)
	w.stopped(true, bad4)

	w.conn = w.open(Options{})
	// Again, over what has timed out.
	if err := w.conn.Waive(Waivers{Bans: []Range{waive("203.0.113.64", "203.0.113.255", time.Hour)}}); err != nil {
		t.Fatal(err)
	}
	w.stopped(false, bad4)
	w.install(config(), content(nil, ban(bad4)))
	w.stopped(true, bad4)
}

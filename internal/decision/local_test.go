package decision

import (
	"net/netip"
	"testing"
	"time"
)

var listed = Class{Type: "ban", Origin: "lists", Scenario: "mine"}

// hold puts local decisions on these prefixes into s, with ids from the given
// one on.
func hold(s *Store, first int, prefixes ...string) {
	d := s.NewDelta(false, epoch)
	for i, p := range prefixes {
		d.Hold(first+i, netip.MustParsePrefix(p), Forever, listed)
	}
	s.Apply(d, epoch)
}

func remediationAt(s *Store, addr string, now time.Time) Remediation {
	t := s.Compile()
	return NewView(t, Policy{Fallback: Ban}).Lookup(t, netip.MustParseAddr(addr), now).Remediation
}

// TestLocalDecisionsAreNotForLAPI: whatever LAPI says, local decisions stay,
// from base and overlay alike, and do not count as missing from its pulls.
func TestLocalDecisionsAreNotForLAPI(t *testing.T) {
	local := []string{"203.0.113.9", "198.51.100.77", "2001:db8::9", "2001:db8:1::7"}
	s := NewStore()
	hold(s, FirstLocal, "203.0.113.9/32", "2001:db8::9/128")
	s.Fold(epoch)
	hold(s, FirstLocal+2, "198.51.100.0/24", "2001:db8:1::/48")
	for round := 0; round < 4; round++ {
		d := s.NewDelta(true, epoch)
		if round == 0 {
			for id := 1; id <= 3; id++ {
				d.Add(&Row{ID: id, Scope: "Ip", Value: "192.0.2." + string(rune('0'+id)), Type: "ban", Origin: "crowdsec", Duration: "1h"})
			}
		}
		out := s.Apply(d, epoch)
		wantHad, wantGot := 3, 0
		if round == 0 {
			wantHad, wantGot = 0, 3
		}
		// Three empty pulls are believed: then LAPI has nothing any more.
		if out.Had != wantHad || out.Got != wantGot || out.Doubt != (round == 1 || round == 2) {
			t.Errorf("pull %d: %+v", round, out)
		}
		for _, addr := range local {
			if got := remediationAt(s, addr, epoch.Add(100*365*24*time.Hour)); got != Ban {
				t.Errorf("after pull %d: %s: %s", round, addr, got.Name())
			}
		}
	}
	if got := remediationAt(s, "192.0.2.1", epoch); got != Allow {
		t.Errorf("what LAPI dropped three times: %s", got.Name())
	}

	d := s.NewDelta(false, epoch)
	d.Delete(FirstLocal)
	d.Add(&Row{ID: FirstLocal + 1, Scope: "Ip", Value: "192.0.2.5", Type: "ban", Origin: "crowdsec", Duration: "1h"})
	s.Apply(d, epoch)
	if d.Skipped[SkipID] != 1 || d.Deleted() != 0 || remediationAt(s, "203.0.113.9", epoch) != Ban || remediationAt(s, "2001:db8::9", epoch) != Ban {
		t.Errorf("LAPI reached a local decision: %v", d.Skipped)
	}

	d = s.NewDelta(false, epoch)
	d.Release(FirstLocal)
	d.Release(FirstLocal + 2)
	d.Release(1)
	s.Apply(d, epoch)
	if d.Deleted() != 2 || remediationAt(s, "203.0.113.9", epoch) != Allow || remediationAt(s, "198.51.100.77", epoch) != Allow || remediationAt(s, "2001:db8::9", epoch) != Ban {
		t.Errorf("release: %d", d.Deleted())
	}
	s.Apply(s.NewDelta(true, epoch), epoch)
	if remediationAt(s, "203.0.113.9", epoch) != Allow || remediationAt(s, "2001:db8:1::1", epoch) != Ban {
		t.Error("a full pull brings back what was released, or takes what was not")
	}
}

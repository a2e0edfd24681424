package main

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/edgeward/edgeward/bouncer"
	"github.com/edgeward/edgeward/internal/daemon"
)

// TestTables shows what operators read.
func TestTables(t *testing.T) {
	at := time.Date(2026, 3, 1, 12, 0, 0, 0, time.FixedZone("CET", 3600))
	lock := bouncer.LockStatus{Name: "ingress", Ports: []uint16{80, 443}, Packets: 6}
	forKernel := []bouncer.Count{{Origin: "CAPI", Remediation: "ban", IPType: "ipv4", Enforced: true, Count: 2}}
	failing := bouncer.LAPIStatus{URL: "http://lapi", Error: "pull decisions: 403: LAPI refuses the credentials", Failing: at}
	list := bouncer.List{Name: "firehol", Entries: 1, Error: "it is gone"}
	why := bouncer.Why{Address: netip.MustParseAddr("192.0.2.1"), Verdict: "pass", Says: "no decision holds it",
		Decisions: []bouncer.Holder{{ID: 1 << 40, List: "firehol", Prefix: netip.MustParsePrefix("192.0.2.0/24"), Enforced: true}, {ID: 7, Until: at, Prefix: netip.MustParsePrefix("192.0.2.1/32")}},
		Locks:     []bouncer.Locked{{Name: "ingress", Ports: []uint16{80, 443}, Closed: true}}}
	dead := alone{}
	dead.Kernel.Enforcing, dead.Kernel.Bans4, dead.Kernel.Ranges4, dead.Kernel.Ranges6 = true, 1, -1, 2
	dead.Kernel.Mode = bouncer.Observe
	other := dead
	other.Kernel.Mode = ""
	for name, c := range map[string]struct {
		value any
		want  []string
	}{
		"stood down": {bouncer.Status{Ready: "nothing", StoodDown: true}, []string{"ready no: nothing", "kernel no table: cleanup removed it"}},
		"enforcing": {bouncer.Status{Ready: "yes", LAPI: failing, Lists: []bouncer.List{list}, Locks: []bouncer.LockStatus{lock}, Decisions: forKernel,
			Kernel: bouncer.Kernel{Enforcing: true, Bans4: 1, Ranges6: 2}, Orders: bouncer.Orders{Pause: &bouncer.Asked{Until: at, By: "me"}}},
			[]string{"ready yes", "failing since 2026-03-01 11:00:00 UTC: pull decisions: 403: LAPI refuses the credentials", "firehol, 1 entry, 0 unreadable lines",
				"the list firehol counts as it was: it is gone", "lock ingress: ports 80, 443; 6 packets dropped", "1 address, 2 ranges", "FOR THE KERNEL",
				"CAPI ban ipv4 2 yes", "paused until 2026-03-01 11:00:00 UTC, by me"}},
		"observing": {bouncer.Status{Ready: "yes", Mode: bouncer.Observe, Lists: []bouncer.List{{Name: "firehol", Error: "it is gone"}}, Locks: []bouncer.LockStatus{lock},
			Covered: []bouncer.Covered{{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Origin: "lists:firehol", Protects: "LAPI"}}},
			[]string{"6 packets would be dropped", "the list firehol holds nothing yet: it is gone", "note 10.0.0.0/8 (lists:firehol) names protected addresses, which stay reachable: LAPI"}},
		"why": {why, []string{"192.0.2.1: pass, but for locked ports: no decision holds it", "lock ingress: ports 80, 443 are closed to it", "list firehol 192.0.2.0/24",
			"as long as listed", "until 2026-03-01 11:00:00 UTC"}},
		"observed without an agent": {dead, []string{"no agent runs; the kernel counts the packets of 1 banned address and an unknown number of ranges and drops nothing"}},
		"of nobody knows whom":      {other, []string{"no agent runs; the kernel holds 1 banned address and", "whether they drop or count"}},
	} {
		var out bytes.Buffer
		w := tabwriter.NewWriter(&out, 0, 8, 2, ' ', 0)
		switch v := c.value.(type) {
		case bouncer.Status:
			statusTable(w, v)
		case bouncer.Why:
			whyTable(w, v)
		case alone:
			aloneTable(w, v)
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		text := strings.Join(strings.Fields(out.String()), " ")
		for _, want := range c.want {
			if !strings.Contains(text, want) {
				t.Errorf("%s: does not say %q:\n%s", name, want, out.String())
			}
		}
	}
}

// TestNoAgentSaysWhatToDo: start it, or be root.
func TestNoAgentSaysWhatToDo(t *testing.T) {
	for want, why := range map[string]error{
		"nobody answers at /s: is it running? (systemctl status edgeward-bouncer)": os.ErrNotExist,
		"nobody answers: only root may ask the agent at /s: use sudo":              os.ErrPermission,
	} {
		err := noAgent("/s", fmt.Errorf("ask: %w: %w", daemon.ErrNotRunning, why))
		if err.Error() != want || !errors.Is(err, daemon.ErrNotRunning) {
			t.Errorf("%v, want %s", err, want)
		}
	}
	if err := noAgent("/s", os.ErrPermission); err != os.ErrPermission {
		t.Errorf("an answer of the agent becomes %v", err)
	}
}

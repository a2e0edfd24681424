package bouncer

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/edgeward/edgeward/internal/decision"
	"github.com/edgeward/edgeward/internal/nft"
)

// saw takes in that somebody else changed the ruleset of this machine.
func (e *enforcer) saw(ev nft.Event) {
	e.state.Lock()
	defer e.state.Unlock()
	e.event = &ev
}

// How often the kernel is looked at closely: by itself, and where others may
// write to the table and did write to some table.
const (
	deepInterval = 10 * time.Minute
	deepShared   = time.Minute
)

// verify looks at what the kernel holds, and mends it.
func (e *enforcer) verify() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.state.Lock()
	event := e.event
	e.event = nil
	e.state.Unlock()

	have, err := e.kernel.Read()
	if err != nil {
		e.note(func(r *report) { r.Err = err; r.Failures++ })
		return fmt.Errorf("read what the kernel holds: %w", err)
	}
	now := e.now()
	e.note(func(r *report) { r.Have, r.Looked, r.Installed = have, now, e.installed && have.Intact })
	if drift := now.Round(0).Sub(e.looked.Round(0)) - now.Sub(e.looked); !e.looked.IsZero() && (drift > 5*time.Second || drift < -5*time.Second) {
		e.jumped = true
	}
	e.looked = now
	if e.stoodDown {
		return nil
	}
	e.review()
	if e.jumped && e.installed && !e.config.hasLAPI() {
		e.jumped = false // no full pull is on its way
		return e.install("the clock jumped")
	}
	if !e.installed {
		switch {
		case e.ever:
			return e.install("a write had failed")
		case !have.Enforcing:
			return e.install("nothing was enforced")
		case !e.fed || now.Before(e.keepUntil):
			return nil
		}
		return e.install("LAPI does not answer: bans as they were saved")
	}
	if !have.Intact {
		return e.repair(event, "another program changed the table")
	}
	if !e.lent.IsZero() && now.Sub(e.lent) > lease/2 {
		return e.install("what has no end is held for another day")
	}
	if err := e.turn(now); err != nil {
		return err
	}
	total := max(have.Bans4, 0) + max(have.Bans6, 0) + max(have.Nets4, 0) + max(have.Nets6, 0)
	fell := e.held >= 0 && total < e.held-e.held/100-16
	e.held = total
	since := now.Sub(e.deep)
	if since > deepInterval || event != nil && !have.Owner && (since > deepShared || fell) {
		e.deep = now
		if !e.jumped { // what ended, and when, is then anybody's guess
			doubt, err := e.compare(have, now)
			if err != nil {
				e.note(func(r *report) { r.Err = err })
				return err
			}
			if doubt != "" {
				return e.repair(event, doubt)
			}
		}
	}
	e.note(func(r *report) { r.Err = nil })
	return nil
}

// repair installs everything again because somebody interfered.
func (e *enforcer) repair(event *nft.Event, what string) error {
	e.note(func(r *report) { r.Interference++ })
	process, pid := "", uint32(0)
	if event != nil {
		process, pid = event.Process, event.PID
	}
	if now := e.now(); now.Sub(e.told) > deepInterval {
		e.told = now
		e.log.Warn("the kernel does not hold what was written, restoring it", "why", what, "process", process, "pid", pid)
	}
	err := e.install("restored: " + what)
	if err == nil {
		e.note(func(r *report) { r.Repairs++ })
	}
	return err
}

// compare looks closely at what the kernel holds: how many there are, as far as
// what ends about now leaves that open, and some of them one by one. It returns
// what is wrong, if anything is.
func (e *enforcer) compare(have nft.Have, now time.Time) (string, error) {
	const samples = 16
	// What timed out is counted until the kernel collects it.
	uncollected := now.Add(-3 * time.Minute)
	sure := now.Add(slack)
	r := e.reading.Load()
	var least, most [2]int
	var asked []decision.Held
	seen := 0
	family := func(a netip.Addr) int {
		if a.Is4() {
			return 0
		}
		return 1
	}
	r.all.Walk(r.table, uncollected, func(h decision.Held) bool {
		if !h.Prefix.IsSingleIP() {
			return true
		}
		r.place(h, uncollected, func(h decision.Held) {
			f := family(h.Prefix.Addr())
			most[f]++
			if !h.Until.After(sure) {
				return
			}
			least[f]++
			seen++
			if len(asked) < samples {
				asked = append(asked, h)
			} else if i := rand.IntN(seen); i < samples {
				asked[i] = h
			}
		})
		return true
	})
	for f, n := range []int{have.Bans4, have.Bans6} {
		if e.probed.After(uncollected) {
			most[f]++ // a test ban
		}
		if n >= 0 && (n < least[f] || n > most[f]) {
			return fmt.Sprintf("%d addresses of IPv%d are banned there, not %d to %d", n, 4+2*f, least[f], most[f]), nil
		}
	}
	addrs := make([]netip.Addr, 0, samples+8)
	until := make([]time.Time, 0, samples+8)
	for _, h := range asked {
		addrs = append(addrs, h.Prefix.Addr())
		until = append(until, h.Until)
	}
	for range min(8, len(e.spans)) {
		s := e.spans[rand.IntN(len(e.spans))]
		// A single address may be banned for itself, and end otherwise.
		if _, banned := r.all.Exactly(r.table, single(s.from), now); !banned && s.until.After(sure) {
			addrs = append(addrs, s.from)
			until = append(until, s.until)
		}
	}
	if len(addrs) == 0 {
		return "", nil
	}
	found, err := e.kernel.Sample(addrs)
	if errors.Is(err, nft.ErrNotInstalled) {
		return "nothing is enforced", nil
	}
	if err != nil {
		return "", fmt.Errorf("sample what the kernel holds: %w", err)
	}
	for i, f := range found {
		left := until[i].Sub(e.now())
		if !until[i].Before(decision.Forever) {
			left = e.lent.Add(lease).Sub(e.now())
		}
		if !f.Banned() || f.Left < left-10*time.Second {
			return fmt.Sprintf("%v is banned for another %v there, not %v", addrs[i], f.Left.Round(time.Second), left.Round(time.Second)), nil
		}
	}
	return "", nil
}

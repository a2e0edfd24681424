package bouncer

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"time"

	"github.com/edgeward/edgeward/internal/decision"
	"github.com/edgeward/edgeward/internal/nft"
)

// Status is what /v1/status and the status command show.
type Status struct {
	Version string    `json:"version"`
	Mode    Mode      `json:"mode"`
	Since   time.Time `json:"since"`
	Ready   string    `json:"ready"` // "yes", or why not
	// StoodDown says that cleanup was asked for: nothing is enforced.
	StoodDown bool `json:"stoodDown,omitempty"`
	// Orders are what the operator asked for and what has not ended.
	Orders Orders     `json:"orders"`
	LAPI   LAPIStatus `json:"lapi"`
	Lists  []List     `json:"lists,omitempty"`
	Kernel Kernel     `json:"kernel"`
	// Decisions are all live ones on addresses, enforced here or not.
	Decisions []Count `json:"decisions"`
	// Locks are those of the configuration, with the packets that met them.
	Locks   []LockStatus `json:"locks,omitempty"`
	Skipped Skipped      `json:"skipped,omitempty"`
	Dropped []Drop       `json:"dropped"`
	// Protected is what no decision stops, Covered are decisions that would.
	Protected []Protected `json:"protected"`
	Covered   []Covered   `json:"covered"`
	// Bypasses may carry packets past the bans.
	Bypasses []nft.Bypass   `json:"bypasses,omitempty"`
	Snapshot SnapshotStatus `json:"snapshot"`
	// Unserved says which addresses could not be taken yet, and why.
	Unserved []string `json:"unserved,omitempty"`
}

// Skipped counts rows of LAPI that made no sense, by reason.
type Skipped map[string]uint64

// LAPIStatus is how the stream of decisions stands.
type LAPIStatus struct {
	URL          string    `json:"url"`
	LastPull     time.Time `json:"lastPull,omitzero"`
	LastFullPull time.Time `json:"lastFullPull,omitzero"`
	// Answering says that the last pull came in, within three intervals.
	Answering bool `json:"answering"`
	// Error is how the last pull failed, and Failing since when they all do.
	Error   string    `json:"error,omitempty"`
	Failing time.Time `json:"failing,omitzero"`
}

// LockStatus is a lock and what it dropped; in observe mode, would have.
type LockStatus struct {
	Name    string   `json:"name"`
	Ports   []uint16 `json:"ports"`
	Packets uint64   `json:"packets"`
	Bytes   uint64   `json:"bytes"`
}

// Kernel is what the kernel holds.
type Kernel struct {
	Enforcing  bool   `json:"enforcing"`
	Intact     bool   `json:"intact"`
	Owner      bool   `json:"owner"`
	Persist    bool   `json:"persist"`
	Generation uint32 `json:"generation"`
	// Elements count what has timed out until the kernel collects it; -1 where
	// the kernel does not tell.
	Bans4        int       `json:"bans4"`
	Bans6        int       `json:"bans6"`
	Ranges4      int       `json:"ranges4"`
	Ranges6      int       `json:"ranges6"`
	Looked       time.Time `json:"looked,omitzero"`
	Installs     uint64    `json:"installs"`
	Updates      uint64    `json:"updates"`
	Failures     uint64    `json:"failures"`
	Repairs      uint64    `json:"repairs"`
	Interference uint64    `json:"interference"`
	Error        string    `json:"error,omitempty"`
}

// Count is how many decisions there are of an origin and remediation.
type Count struct {
	Origin      string `json:"origin"`
	Remediation string `json:"remediation"`
	IPType      string `json:"ipType"`
	// Enforced says that they are for the kernel, whatever it does at present.
	Enforced bool `json:"enforced"`
	Count    int  `json:"count"`
}

// Drop is how many packets were dropped; in observe mode, would have been.
type Drop struct {
	Origin      string `json:"origin"`
	Remediation string `json:"remediation"`
	IPType      string `json:"ipType"`
	Packets     uint64 `json:"packets"`
	Bytes       uint64 `json:"bytes"`
}

// SnapshotStatus is when decisions were saved last, by this process.
type SnapshotStatus struct {
	Saved time.Time `json:"saved,omitzero"`
	Rows  int       `json:"rows,omitempty"`
	Error string    `json:"error,omitempty"`
}

// tally counts the live decisions.
func (b *Bouncer) tally() []Count {
	counts := map[Count]int{}
	for _, t := range b.enforcer.reading.Load().table.Tally(b.now()) {
		means := t.Class.Remediation
		if means == decision.Unknown {
			means, _ = decision.ParseFallback(string(b.config.Decisions.Fallback))
		}
		enforced, _ := b.config.enforced(t.Class)
		c := Count{Origin: originOf(t.Class), Remediation: means.Name(), Enforced: enforced}
		for six, n := range map[bool]int{false: t.IPv4, true: t.IPv6} {
			if c.IPType = ipType(six); n > 0 {
				counts[c] += n
			}
		}
	}
	out := make([]Count, 0, len(counts))
	for c, n := range counts {
		c.Count = n
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b Count) int {
		return cmp.Or(cmp.Compare(a.Origin, b.Origin), cmp.Compare(a.Remediation, b.Remediation), cmp.Compare(a.IPType, b.IPType))
	})
	return out
}

// Serves lets status show why an address is not served; missing returns nil once
// it is.
func (b *Bouncer) Serves(missing func() error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.serves = append(b.serves, missing)
}

// Status tells how everything stands.
func (b *Bouncer) Status() Status {
	report := b.enforcer.stands()
	b.mu.Lock()
	feed, saved, passing, serves := b.feed, b.saved, b.passing, b.serves
	skipped := Skipped{}
	for reason, n := range feed.Skipped {
		skipped[reason] = n
	}
	b.mu.Unlock()
	s := Status{
		Version: Version, Mode: b.config.Mode, Since: b.began, Ready: "yes",
		LAPI: LAPIStatus{
			URL: b.config.LAPI.URL, LastPull: feed.Last, LastFullPull: feed.LastFull,
			Answering: b.config.hasLAPI() && feed.Err == nil && b.now().Sub(feed.Last) < 3*b.config.LAPI.Interval+b.config.LAPI.Timeout,
			Failing:   feed.Failing,
		},
		Lists:     b.listStatus(),
		Kernel:    kernelOf(report.Have),
		StoodDown: report.StoodDown,
		Orders:    b.enforcer.orders.Load().live(b.now()),
		Decisions: b.tally(),
		Skipped:   skipped,
		Dropped:   []Drop{},
		Protected: b.enforcer.reading.Load().protected,
		Covered:   *b.enforcer.covering.Load(),
		Bypasses:  passing,
		Snapshot:  SnapshotStatus{Saved: saved.At, Rows: saved.Rows},
	}
	if err := b.Ready(); err != nil {
		s.Ready = err.Error()
	}
	if feed.Err != nil {
		s.LAPI.Error = feed.Err.Error()
		if asked := (*url.Error)(nil); errors.As(feed.Err, &asked) {
			s.LAPI.Error = asked.Err.Error() // the URL is shown beside it
		}
	}
	for _, missing := range serves {
		if err := missing(); err != nil {
			s.Unserved = append(s.Unserved, err.Error())
		}
	}
	k := &s.Kernel
	k.Looked, k.Installs, k.Updates, k.Failures = report.Looked, report.Installs, report.Updates, report.Failures
	k.Repairs, k.Interference = report.Repairs, report.Interference
	if report.Err != nil {
		k.Error = report.Err.Error()
	}
	if saved.Err != nil {
		s.Snapshot.Error = saved.Err.Error()
	}
	counters, err := b.kernel.Counters()
	if err != nil && k.Error == "" {
		k.Error = err.Error()
	}
	s.Dropped = dropsOf(counters)
	s.Locks = b.lockStatus(counters)
	return s
}

func (b *Bouncer) lockStatus(counters []nft.Counter) []LockStatus {
	var out []LockStatus
	for _, l := range b.config.nft().Locks {
		s := LockStatus{Name: l.Name, Ports: l.Ports}
		for _, c := range counters {
			if c.Kind == nft.Locked && c.Name == l.Name {
				s.Packets += c.Packets
				s.Bytes += c.Bytes
			}
		}
		out = append(out, s)
	}
	return out
}

func dropsOf(counters []nft.Counter) []Drop {
	out := []Drop{}
	for _, c := range counters {
		if c.Kind == nft.Banned {
			d := Drop{IPType: ipType(c.IPv6), Packets: c.Packets, Bytes: c.Bytes}
			d.Remediation, d.Origin = splitClass(c.Name)
			out = append(out, d)
		}
	}
	return out
}

func kernelOf(h nft.Have) Kernel {
	return Kernel{
		Enforcing: h.Enforcing, Intact: h.Intact, Owner: h.Owner, Persist: h.Persist, Generation: h.Generation,
		Bans4: h.Bans4, Bans6: h.Bans6, Ranges4: h.Nets4, Ranges6: h.Nets6,
	}
}

// Why is the whole answer to why packets from an address are treated as they
// are.
type Why struct {
	Address netip.Addr `json:"address"`
	// Verdict is drop, pass or observe, and Says the same as a sentence.
	Verdict string `json:"verdict"`
	Says    string `json:"says"`
	// Protected is why no decision stops the address; empty if they do.
	Protected string `json:"protected,omitempty"`
	// Waived is the order of the operator that lets it pass for a time, if any.
	Waived    string   `json:"waived,omitempty"`
	Decisions []Holder `json:"decisions"`
	// Kernel is what the kernel holds, nil where it holds nothing.
	Kernel *Held `json:"kernel,omitempty"`
	// Locks are those that do not let the address in.
	Locks []Locked `json:"locks,omitempty"`
}

// Locked is a lock that an address meets.
type Locked struct {
	Name  string   `json:"name"`
	Ports []uint16 `json:"ports"`
	// Closed is false in observe mode, where a lock counts only.
	Closed bool `json:"closed"`
}

// Holder is a live decision that holds the address.
type Holder struct {
	ID          int          `json:"id"`
	Prefix      netip.Prefix `json:"prefix"`
	Remediation string       `json:"remediation"`
	Type        string       `json:"type"`
	Origin      string       `json:"origin"`
	Scenario    string       `json:"scenario"`
	Until       time.Time    `json:"until,omitzero"` // zero: as long as its list names it
	// List names the file list that the decision is of, if it is of one.
	List     string `json:"list,omitempty"`
	Enforced bool   `json:"enforced"`
	// Because says why it is not enforced here.
	Because string `json:"because,omitempty"`
}

// Held is an element or range of the kernel.
type Held struct {
	From  netip.Addr `json:"from"`
	To    netip.Addr `json:"to"`
	Class string     `json:"class"`
	Left  string     `json:"left"`
}

// Why tells what applies to an address. It asks the kernel, too.
func (b *Bouncer) Why(addr netip.Addr) (Why, error) {
	addr = addr.Unmap().WithZone("")
	r := b.enforcer.reading.Load()
	now := b.now()
	w := Why{Address: addr, Decisions: []Holder{}}
	if r.guarded.holds(single(addr)) {
		w.Protected = whyProtected(r.protected, single(addr))
	}
	orders := b.enforcer.orders.Load()
	w.Waived = orders.why(addr, now)
	// Not enforced at present, though for the kernel.
	stands := b.enforcer.stands()
	idle := ""
	switch {
	case stands.StoodDown:
		idle = "would be enforced: the agent stood down after cleanup"
	case b.config.Mode == Observe && (w.Waived == "" || orders.pauses(addr, now)):
		idle = "would be enforced: the mode is observe"
	case orders.pauses(addr, now):
		idle = "would be enforced: " + w.Waived
	}
	private := r.private.holds(single(addr))
	fallback, _ := decision.ParseFallback(string(b.config.Decisions.Fallback))
	every := decision.NewView(r.table, decision.Policy{Fallback: fallback})
	banned, lasts, refused := false, false, false
	for _, v := range every.Holders(r.table, addr, now) {
		class := decision.Class{Type: v.Type, Origin: v.Origin, Scenario: v.Scenario, Remediation: v.Remediation}
		h := Holder{ID: v.ID, Prefix: v.Prefix, Remediation: v.Remediation.Name(), Type: v.Type, Origin: originOf(class), Scenario: v.Scenario, Until: v.Until}
		h.Enforced, h.Because = b.config.enforced(class)
		if !v.Until.Before(decision.Forever) {
			h.Until = time.Time{}
		}
		if v.ID >= decision.FirstLocal {
			h.List = v.Scenario
		}
		asked := false // at /v1/auth alone
		if !h.Enforced && b.config.Auth.Listen.IsValid() {
			asked, _ = b.config.counts(class, b.config.Auth.Remediations)
		}
		switch {
		case w.Protected != "":
			h.Enforced, h.Because = false, "the address is protected"
		case (h.Enforced || asked) && private && foreign(v.Origin):
			h.Enforced, h.Because = false, "the address is private, and the decision was made elsewhere"
		case h.Enforced && idle != "":
			banned = banned || w.Waived == ""
			h.Enforced, h.Because = false, idle
		case (h.Enforced || asked) && w.Waived != "":
			h.Enforced, h.Because = false, "waived: "+w.Waived
		case asked && b.config.Mode == Observe:
			h.Because = "left by the kernel, would be refused by " + AuthPath + ": the mode is observe"
		case asked:
			refused = true
			h.Because = "left by the kernel, refused by " + AuthPath
		}
		banned = banned || h.Enforced
		lasts = lasts || h.Enforced && h.Until.IsZero()
		w.Decisions = append(w.Decisions, h)
	}
	found, err := b.kernel.Sample([]netip.Addr{addr})
	if errors.Is(err, nft.ErrNotInstalled) {
		found, err = []nft.Found{{}}, nil // as after cleanup
	}
	if err != nil {
		return w, fmt.Errorf("ask the kernel about %v: %w", addr, err)
	}
	if f := found[0]; f.Banned() {
		left := "for ever"
		if f.Left != nft.Forever {
			left = f.Left.Round(time.Second).String()
		}
		w.Kernel = &Held{From: f.From, To: f.To, Class: f.Name, Left: left}
	}
	w.Verdict, w.Says = verdict(w, banned, b.config.Mode)
	switch {
	case stands.StoodDown:
		w.Verdict, w.Says = "pass", "nothing is enforced: cleanup removed the table until the agent is restarted"
	case w.Verdict == "drop" && lasts:
		w.Says = "its packets are dropped for as long as a list names it"
	case w.Verdict == "pass" && refused && !banned:
		w.Says = "the kernel leaves it alone, and " + AuthPath + " refuses it"
	}
	if w.Protected == "" && !stands.StoodDown && !orders.opens(addr, now) {
		w.Locks = b.config.locked(addr)
	}
	return w, nil
}

// locked returns the locks that do not let addr in.
func (c *Config) locked(addr netip.Addr) []Locked {
	var out []Locked
	for _, l := range c.nft().Locks {
		if !slices.ContainsFunc(l.From, func(p netip.Prefix) bool { return p.Contains(addr) }) {
			out = append(out, Locked{Name: l.Name, Ports: l.Ports, Closed: c.Mode == Enforce})
		}
	}
	return out
}

func verdict(w Why, banned bool, mode Mode) (verdict, says string) {
	switch {
	case w.Protected != "" && len(w.Decisions) > 0:
		return "pass", fmt.Sprintf("decisions hold it, but it is protected: %s", w.Protected)
	case w.Protected != "":
		return "pass", fmt.Sprintf("nothing holds it, and it is protected: %s", w.Protected)
	case w.Waived != "" && len(w.Decisions) > 0:
		return "pass", "decisions hold it, but " + w.Waived
	case w.Waived != "":
		return "pass", "no decision holds it, and " + w.Waived
	case banned && w.Kernel == nil:
		return "pass", "it is banned, and the kernel does not hold the ban yet"
	case w.Kernel != nil && mode == Observe:
		return "observe", "its packets are counted and pass: the mode is observe"
	case w.Kernel != nil && !banned:
		return "drop", "its packets are dropped, as the kernel was told before this agent knew better"
	case w.Kernel != nil:
		return "drop", fmt.Sprintf("its packets are dropped for another %s", w.Kernel.Left)
	case len(w.Decisions) > 0:
		return "pass", "decisions hold it, and none of them is enforced here"
	}
	return "pass", "no decision holds it"
}

package bouncer

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/edgeward/edgeward/internal/decision"
	"github.com/edgeward/edgeward/internal/nft"
)

// Orders are what the operator asked of this node, each for a time. They go to
// the kernel as waivers that end by themselves there, so that none outlasts its
// time because the agent died. A value of Orders never changes.
type Orders struct {
	Allows []Allow `json:"allows"`
	Unbans []Unban `json:"unbans"`
	Pause  *Asked  `json:"pause,omitempty"`
}

// Asked is what all orders have.
type Asked struct {
	Since   time.Time `json:"since"`
	Until   time.Time `json:"until"`
	Because string    `json:"because,omitempty"`
	// By is the user and process that asked, as the kernel told.
	By string `json:"by,omitempty"`
	// List names the file list that an unban sets aside: it lasts as long as
	// the list names the address.
	List string `json:"list,omitempty"`
}

// Allow protects addresses until its end.
type Allow struct {
	Prefix netip.Prefix `json:"prefix"`
	Asked
}

// Unban lets the decisions that held an address when it was asked for count no
// more for it, on this node. A decision that came later ends it.
type Unban struct {
	Address   netip.Addr `json:"address"`
	Decisions []int      `json:"decisions"`
	Asked
}

// Bounds of orders.
const (
	allowLimit   = 30 * 24 * time.Hour
	pauseLimit   = 24 * time.Hour
	ordersLimit  = 1000
	becauseLimit = 200 // bytes
)

var errStoodDown = errors.New("cleanup was asked for: the table is removed, and this node enforces nothing until the agent is restarted")

// without returns o without the orders that drop says.
func (o Orders) without(drop func(what string, of netip.Prefix, a Asked) bool) Orders {
	out := Orders{Allows: []Allow{}, Unbans: []Unban{}}
	for _, a := range o.Allows {
		if !drop("allow", a.Prefix, a.Asked) {
			out.Allows = append(out.Allows, a)
		}
	}
	for _, u := range o.Unbans {
		if !drop("unban", single(u.Address), u.Asked) {
			out.Unbans = append(out.Unbans, u)
		}
	}
	if o.Pause != nil && !drop("pause", netip.Prefix{}, *o.Pause) {
		out.Pause = o.Pause
	}
	return out
}

// live returns the orders that have not ended.
func (o Orders) live(now time.Time) Orders {
	return o.without(func(_ string, _ netip.Prefix, a Asked) bool { return !a.Until.After(now) })
}

// count is how many orders there are.
func (o Orders) count() int {
	n := len(o.Allows) + len(o.Unbans)
	if o.Pause != nil {
		n++
	}
	return n
}

// waivers are what the kernel is told of o. Who is unbanned is not let through
// locks, which are no bans.
func (o Orders) waivers(now time.Time) nft.Waivers {
	var locks []decision.Held
	hold := func(p netip.Prefix, until time.Time) decision.Held {
		return decision.Held{Prefix: p, Until: until}
	}
	if o.Pause != nil {
		for _, all := range []string{"0.0.0.0/0", "::/0"} {
			locks = append(locks, hold(netip.MustParsePrefix(all), o.Pause.Until))
		}
	}
	for _, a := range o.Allows {
		locks = append(locks, hold(a.Prefix, a.Until))
	}
	bans := slices.Clone(locks)
	for _, u := range o.Unbans {
		bans = append(bans, hold(single(u.Address), u.Until))
	}
	ranges := func(list []decision.Held) []nft.Range {
		slices.SortFunc(list, func(a, b decision.Held) int { return comparePrefixes(a.Prefix, b.Prefix) })
		var out []nft.Range
		for _, s := range spansOf(list) {
			out = append(out, nft.Range{From: s.from, To: s.to, Timeout: s.until.Sub(now)})
		}
		return out
	}
	return nft.Waivers{Bans: ranges(bans), Locks: ranges(locks)}
}

// waives returns the order that lets packets from addr pass at now, whatever
// bans it, and what to call it.
func (o Orders) waives(addr netip.Addr, now time.Time) (is string, a Asked, ok bool) {
	for _, a := range o.Allows {
		if a.Prefix.Contains(addr) && a.Until.After(now) {
			return valueOf(a.Prefix) + " is allowed on this node", a.Asked, true
		}
	}
	for _, u := range o.Unbans {
		if u.Address == addr && u.Until.After(now) {
			return "it is unbanned on this node", u.Asked, true
		}
	}
	if o.Pause != nil && o.Pause.Until.After(now) {
		return "this node is paused", *o.Pause, true
	}
	return "", Asked{}, false
}

// why says why packets from addr pass whatever bans it, or nothing.
func (o Orders) why(addr netip.Addr, now time.Time) string {
	is, a, ok := o.waives(addr, now)
	if !ok {
		return ""
	}
	says := fmt.Sprintf("%s %s (asked for by %s", is, a.Lasts(), a.By)
	if a.Because != "" {
		says += ", because: " + a.Because
	}
	return says + ")"
}

// opens reports whether an order lets addr pass locks too.
func (o Orders) opens(addr netip.Addr, now time.Time) bool {
	o.Unbans = nil
	_, _, ok := o.waives(addr, now)
	return ok
}

// pauses reports whether a pause, and no order of its own, lets addr pass.
func (o Orders) pauses(addr netip.Addr, now time.Time) bool {
	_, _, ok := o.waives(addr, now)
	o.Pause = nil
	_, _, own := o.waives(addr, now)
	return ok && !own
}

// Lasts says how long an order lasts.
func (a Asked) Lasts() string {
	if !a.Until.Before(decision.Forever) {
		return "for as long as the list " + a.List + " names it"
	}
	return "until " + moment(a.Until)
}

// order puts next in the place of the orders in force: in the kernel first, then
// on disk. note says what about it will not last. The caller holds e.mu.
func (e *enforcer) order(next Orders) (note string, err error) {
	if e.stoodDown {
		return "", errStoodDown
	}
	before := *e.orders.Load()
	now := e.now()
	err = e.kernel.Waive(next.waivers(now))
	if errors.Is(err, nft.ErrNotInstalled) {
		if !e.fed && e.stands().Have.Enforcing {
			return "", errors.New("an older release's bans are enforced until LAPI answers, and they cannot be waived; cleanup removes them")
		}
		e.orders.Store(&next)
		err = e.install("the operator asked")
	}
	if err != nil {
		e.orders.Store(&before)
		// What the kernel holds of it is not known: our doing, and nobody else's.
		e.installed = false
		return "", err
	}
	e.orders.Store(&next)
	if err := saveOrders(e.config.StateDir, next, now); err != nil {
		return "a restart of the agent would end this: " + err.Error(), nil
	}
	return "", nil
}

// review ends the orders whose time is over, and the unbans of addresses that a
// newer decision holds, or none any more. The caller holds e.mu.
func (e *enforcer) review() {
	orders := *e.orders.Load()
	if orders.count() == 0 || e.stoodDown {
		return
	}
	now := e.now()
	r := e.reading.Load()
	newer := map[netip.Addr]decision.Verdict{}
	gone := map[netip.Addr]bool{}
	for _, u := range orders.Unbans {
		holders := e.holders(r, u.Address, now)
		gone[u.Address] = e.fed && len(holders) == 0 // before that nothing is known
		for _, v := range holders {
			if !slices.Contains(u.Decisions, v.ID) {
				newer[u.Address] = v
			}
		}
	}
	var lines []func()
	next := orders.without(func(what string, of netip.Prefix, a Asked) bool {
		v, again := newer[of.Addr()]
		switch {
		case !a.Until.After(now):
			lines = append(lines, func() { e.log.Info("an order has ended", "order", what, "value", valueOf(of)) })
			return true
		case what == "unban" && again:
			lines = append(lines, func() {
				e.log.Info("a newer decision holds an unbanned address, which is banned again", "value", valueOf(of),
					"decision", v.ID, "origin", v.Origin, "scenario", v.Scenario)
			})
			return true
		case what == "unban" && gone[of.Addr()]:
			lines = append(lines, func() {
				e.log.Info("an order has ended: no decision holds the address any more", "order", what, "value", valueOf(of))
			})
			return true
		}
		return false
	})
	if len(lines) == 0 {
		return
	}
	note, err := e.order(next)
	if err != nil { // then the next turn tries again
		e.log.Warn("cannot end orders in the kernel, which ends them at their time", "err", err)
		return
	}
	for _, line := range lines {
		line()
	}
	if note != "" {
		e.log.Warn("cannot save orders", "note", note)
	}
}

// holders are the decisions that count on addr here: in the kernel, and at the
// auth endpoint where there is one.
func (e *enforcer) holders(r *reading, addr netip.Addr, now time.Time) []decision.Verdict {
	enforced, refused := r.all, r.refused
	if r.private.holds(single(addr)) {
		enforced, refused = r.local, r.refusedLocal
	}
	out := enforced.Holders(r.table, addr, now)
	if !e.config.Auth.Listen.IsValid() {
		return out
	}
	for _, v := range refused.Holders(r.table, addr, now) {
		if !slices.ContainsFunc(out, func(o decision.Verdict) bool { return o.ID == v.ID }) {
			out = append(out, v)
		}
	}
	return out
}

// valueOf writes an address without its length, and everything as everything.
func valueOf(p netip.Prefix) string {
	switch {
	case !p.IsValid():
		return "everything"
	case p.IsSingleIP():
		return p.Addr().String()
	}
	return p.String()
}

// asked makes the start of an order.
func (e *enforcer) asked(d, limit time.Duration, because, by string) (Asked, error) {
	// Without the monotonic part: it is to be the same after a restart.
	now := e.now().Round(0)
	switch {
	case d <= 0:
		return Asked{}, fmt.Errorf("%v: want a duration above zero", d)
	case d > limit:
		return Asked{}, fmt.Errorf("%v: want at most %v", d, limit)
	case len(because) > becauseLimit:
		return Asked{}, fmt.Errorf("a reason of %d bytes: want at most %d", len(because), becauseLimit)
	}
	return Asked{Since: now, Until: now.Add(d), Because: because, By: by}, nil
}

// allow protects p for d; zero ends that.
func (e *enforcer) allow(p netip.Prefix, d time.Duration, because, by string) (until time.Time, note string, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	orders := e.orders.Load().live(e.now())
	next := orders.without(func(what string, of netip.Prefix, _ Asked) bool { return what == "allow" && of == p })
	if d == 0 {
		if next.count() == orders.count() {
			return until, "", fmt.Errorf("%v is not allowed for a time", valueOf(p))
		}
		note, err = e.order(next)
		return until, note, err
	}
	a, err := e.asked(d, allowLimit, because, by)
	switch {
	case err != nil:
		return until, "", err
	case p.Bits() == 0:
		return until, "", fmt.Errorf("%v would allow everybody: that is what pause is for", p)
	case next.count() >= ordersLimit:
		return until, "", errors.New("too many orders are in force: end some")
	}
	next.Allows = append(next.Allows, Allow{p, a})
	note, err = e.order(next)
	return a.Until, note, err
}

// unban lets what holds addr now count no more; with end it counts again.
func (e *enforcer) unban(addr netip.Addr, end bool, because, by string) (u Unban, note string, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := e.now().Round(0)
	orders := e.orders.Load().live(now)
	next := orders.without(func(what string, of netip.Prefix, _ Asked) bool { return what == "unban" && of == single(addr) })
	if end {
		if next.count() == orders.count() {
			return u, "", fmt.Errorf("%v was not unbanned here", addr)
		}
		note, err = e.order(next)
		return u, note, err
	}
	u = Unban{Address: addr, Asked: Asked{Since: now, Because: because, By: by}}
	for _, v := range e.holders(e.reading.Load(), addr, now) {
		u.Decisions = append(u.Decisions, v.ID)
		if v.Until.After(u.Until) {
			u.Until = v.Until
		}
		if v.ID >= decision.FirstLocal {
			u.List = v.Scenario
		}
	}
	switch {
	case len(u.Decisions) == 0:
		return u, "", fmt.Errorf("no decision that this node enforces holds %v; if its packets are dropped all the same, allow lets them in", addr)
	case len(because) > becauseLimit:
		return u, "", fmt.Errorf("a reason of %d bytes: want at most %d", len(because), becauseLimit)
	case next.count() >= ordersLimit:
		return u, "", errors.New("too many orders are in force: end some")
	}
	next.Unbans = append(next.Unbans, u)
	note, err = e.order(next)
	return u, note, err
}

// pause lets everything pass for d; zero ends that.
func (e *enforcer) pause(d time.Duration, because, by string) (until time.Time, note string, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	next := e.orders.Load().live(e.now())
	if d == 0 {
		if next.Pause == nil {
			return until, "", errors.New("this node is not paused")
		}
		next.Pause = nil
		note, err = e.order(next)
		return until, note, err
	}
	a, err := e.asked(d, pauseLimit, because, by)
	switch {
	case err != nil:
		return until, "", err
	case e.config.Mode == Observe:
		return until, "", errors.New("the mode is observe: nothing is dropped that a pause could let pass")
	}
	next.Pause = &a
	note, err = e.order(next)
	return a.Until, note, err
}

// standDown removes the table, and keeps it away until the process is another.
func (e *enforcer) standDown() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.kernel.Remove(); err != nil {
		return err
	}
	e.stoodDown, e.installed = true, false
	have, err := e.kernel.Read()
	if err != nil {
		have = nft.Have{} // it was removed
	}
	e.note(func(r *report) { r.StoodDown, r.Installed, r.Have, r.Err = true, false, have, nil })
	return nil
}

// ordersName is the file in the state directory.
const ordersName = "orders.json"

// ordersFormat is its version.
const ordersFormat = 1

// savedOrders is what the file holds.
type savedOrders struct {
	Format  int       `json:"format"`
	Written time.Time `json:"written"`
	Orders
}

// saveOrders replaces the orders in dir, all of them or nothing.
func saveOrders(dir string, o Orders, now time.Time) error {
	if dir == "" {
		return errors.New("save orders: there is no stateDir")
	}
	text, err := json.MarshalIndent(savedOrders{ordersFormat, now.Round(0), o}, "", "  ")
	if err == nil {
		err = replaceFile(dir, ordersName, func(w io.Writer) error {
			_, err := w.Write(append(text, '\n'))
			return err
		})
	}
	if err != nil {
		return fmt.Errorf("save orders: %w", err)
	}
	return nil
}

// loadOrders reads what saveOrders wrote; that there is nothing is no error.
func loadOrders(dir string, now time.Time) (Orders, error) {
	path := filepath.Join(dir, ordersName)
	f, err := os.Open(path)
	if dir == "" || errors.Is(err, os.ErrNotExist) {
		return Orders{}, nil
	}
	if err != nil {
		return Orders{}, fmt.Errorf("load orders: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, 4<<20))
	if err != nil {
		return Orders{}, fmt.Errorf("load orders: %w", err)
	}
	o, err := parseOrders(text, now)
	if err != nil {
		return Orders{}, fmt.Errorf("load orders %s: %w", path, err)
	}
	return o, nil
}

// parseOrders reads the text of the file. Where the clock now stands before the
// time of writing, orders last from now as long as they did from then.
func parseOrders(text []byte, now time.Time) (Orders, error) {
	var s savedOrders
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return Orders{}, err
	}
	if _, err := d.Token(); err != io.EOF {
		return Orders{}, errors.New("more follows after the orders")
	}
	if s.Format != ordersFormat {
		return Orders{}, fmt.Errorf("format %d, not %d", s.Format, ordersFormat)
	}
	bad := ""
	back := max(0, s.Written.Sub(now))
	check := func(a *Asked, limit time.Duration, what string) {
		if a.Until.Sub(s.Written) > limit || len(a.Because) > becauseLimit {
			bad = what
		}
		a.Until = a.Until.Add(-back)
	}
	for i := range s.Allows {
		a := &s.Allows[i]
		if a.Prefix.Bits() <= 0 || a.Prefix != a.Prefix.Masked() || a.Prefix.Addr().Is4In6() {
			bad = "allow"
		}
		check(&a.Asked, allowLimit, "allow")
	}
	for i := range s.Unbans {
		u := &s.Unbans[i]
		if !u.Address.IsValid() || u.Address.Zone() != "" || u.Address.Is4In6() || len(u.Decisions) == 0 {
			bad = "unban"
		}
		// As long as a decision lasts, which may be for years.
		check(&u.Asked, 1<<63-1, "unban")
	}
	if s.Pause != nil {
		check(s.Pause, pauseLimit, "pause")
	}
	if bad != "" {
		return Orders{}, fmt.Errorf("an order to %s makes no sense", bad)
	}
	if s.count() > ordersLimit+1 {
		return Orders{}, fmt.Errorf("%d orders are too many", s.count())
	}
	return s.live(now), nil
}

// Package gateway keeps the VPN as it is declared: it brings the access rules,
// the WireGuard device and the resolver into step with the configuration, at
// once when that changes, to the second when a peer expires, and on an interval
// for what nobody reported.
//
// Access is narrowed before anything else and widened after it: the rules are
// there, and refuse everybody, before the device has a peer or is up; what an
// earlier process left on it counts as enforced; a right that is taken away
// is gone from the rules first; an address that goes to another peer is nobody's
// while the device still knows it as the former one's. What fails leaves what
// was enforced before and is tried again.
//
// It decides nothing (package wireguard compiles what is wanted), and knows no
// netlink, no nftables and no DNS: packages device, names and internal/nft do.
// When it ends, the rules stay, and a device of the kernel's too. The program
// edgeward-tunnel calls it.
package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/edgeward/edgeward/internal/nft"
	"github.com/edgeward/edgeward/internal/reconcile"
	"github.com/edgeward/edgeward/tunnel/wireguard"
	"github.com/edgeward/edgeward/tunnel/wireguard/device"
	"github.com/edgeward/edgeward/tunnel/wireguard/names"
)

// Options are what a gateway is made with.
type Options struct {
	// Config is what is declared at the start.
	Config wireguard.Config
	// StateDir keeps leases and what the device remembers; empty keeps nothing.
	StateDir string
	// Alone says that the process is nothing but the gateway.
	Alone bool
	Log   *slog.Logger
}

const (
	// interval is the longest time between looks at everything.
	interval = 30 * time.Second
	// mostEvents is how many peers may differ for the device to be told of each
	// on its own, without being read.
	mostEvents = 32
	// openTimeout bounds the wait for an earlier process to let go.
	openTimeout = 20 * time.Second
	// again is the time before what is amiss is looked at again, and the longest
	// before a turn that failed is.
	again = 10 * time.Second
)

// warnings are how long before the end of a peer it is warned of, the shortest
// first.
var warnings = []time.Duration{24 * time.Hour, 7 * 24 * time.Hour}

// link is the device; *device.Device is one.
type link interface {
	Mode() device.Mode
	Have() (device.Have, error)
	Reconcile(device.Config) (device.Changes, error)
	Upsert(device.Peer) error
	Remove(device.Key) error
	Peers() ([]device.PeerState, error)
	Gone() []device.PeerState
	Close() error
}

// rules are the access rules in the kernel; *nft.AccessConn is one.
type rules interface {
	Apply(nft.Access) (nft.Applied, error)
	Counters() (nft.AccessCounters, error)
	Sources() ([]nft.SourceCount, error)
	Denied() ([]nft.Attempt, error)
	Granted() ([]nft.Attempt, error)
	Watch(context.Context) (<-chan nft.Event, error)
	Close() error
}

// Gateway is the VPN. Make it with New; it is a daemon.Task.
type Gateway struct {
	options  Options
	log      *slog.Logger
	loop     *reconcile.Loop
	resolver *names.Resolver
	now      func() time.Time
	began    time.Time
	demand   atomic.Bool     // the same was stated again, to be sure: the device is read
	life     context.Context // Run's
	// What a turn opens when it first needs it.
	openRules  func() (rules, error)
	openDevice func(context.Context, device.Options) (link, error)
	conflicts  func(name string, networks []netip.Prefix) ([]device.Conflict, error)
	resolvConf string

	// Of the loop alone.
	leases  wireguard.Leases
	loaded  bool                // leases are
	unsaved bool                // leases are newer than their file
	looked  time.Time           // when the device was last read; zero: it has to be
	done    int                 // the wish that was enforced
	next    time.Time           // when that comes to something else; zero: never
	failed  []wireguard.Desired // wishes that failed since the last good turn
	latest  time.Time           // the latest that the clock said
	servers []netip.AddrPort    // of the machine, that stand in for upstreams; nil: none are asked for
	said    said
	alarm   *time.Timer // wakes the loop when a peer ends though turns fail

	mu      sync.Mutex
	wish    wish
	have    wireguard.Desired // what was last enforced, whole
	settled bool              // something was
	device  link              // nil before it is open
	rules   rules             // nil before they are
	amiss   error             // what of the last good turn is not as it should be
	tally   tally
	names   map[netip.Addr]wireguard.Name // whose an address is or was

	counting sync.Mutex // count; taken before mu
}

// wish is a configuration with what its files hold.
type wish struct {
	number  int // of those that were applied
	config  wireguard.Config
	secrets wireguard.Secrets
}

// New makes a gateway, which does nothing until Run. It reads the key files, and
// makes the gateway's private key where it is missing.
func New(options Options) (*Gateway, error) {
	g := &Gateway{
		options: options, log: options.Log.With("component", "vpn"), resolver: names.New(options.Log), now: time.Now, began: time.Now(),
		openRules:  func() (rules, error) { return nft.OpenAccess(nft.Options{}) },
		openDevice: func(ctx context.Context, o device.Options) (link, error) { return device.Open(ctx, o) },
		conflicts:  device.Conflicts,
		resolvConf: "/etc/resolv.conf",
		said:       newSaid(), tally: newTally(),
	}
	g.loop = reconcile.New(reconcile.Config{Name: "vpn", Turn: g.turn, Interval: interval, LongestRetry: again, Log: options.Log})
	g.alarm = time.AfterFunc(interval, g.loop.Trigger)
	g.alarm.Stop()
	g.resolver.OnListening(g.loop.Trigger)
	if err := g.Apply(options.Config); err != nil {
		return nil, err
	}
	return g, nil
}

// String names the task.
func (g *Gateway) String() string { return "vpn" }

// Apply states what is declared from now on, and has it enforced at once. What it
// refuses, because the gateway's own key cannot be read, leaves what was declared
// before. The interface, its mode and where the state is are what they were at
// the start.
func (g *Gateway) Apply(c wireguard.Config) error {
	g.mu.Lock()
	was := g.wish
	g.mu.Unlock()
	secrets, made, err := wireguard.ReadSecrets(&c, was.secrets, was.config.PrivateKeyFile)
	if err != nil {
		return err
	}
	switch {
	case made && len(c.Peers) > 0:
		g.log.Warn("the gateway's private key was missing, and a new one is made: devices that know the old one do not get in; put that back, or give every peer a new configuration",
			"file", c.PrivateKeyFile, "publicKey", secrets.PrivateKey.Public(), "peers", len(c.Peers))
	case made:
		g.log.Info("made the gateway's private key", "file", c.PrivateKeyFile, "publicKey", secrets.PrivateKey.Public())
	}
	if c.Interface != g.options.Config.Interface || c.Mode != g.options.Config.Mode {
		g.log.Warn("the interface and its mode take effect at the next start", "interface", c.Interface, "mode", c.Mode)
		c.Interface, c.Mode = g.options.Config.Interface, g.options.Config.Mode
	}
	g.mu.Lock()
	next := wish{g.wish.number, c, secrets}
	if reflect.DeepEqual(g.wish, next) {
		g.demand.Store(true)
	}
	next.number++
	g.wish = next
	g.mu.Unlock()
	g.loop.Trigger()
	return nil
}

// Run keeps the VPN until ctx ends. The rules stay then, and a device of the
// kernel's.
func (g *Gateway) Run(ctx context.Context) error {
	var parts sync.WaitGroup
	var answers, turns error
	g.life = ctx
	parts.Go(func() { answers = g.resolver.Run(ctx) })
	parts.Go(func() { turns = g.loop.Run(ctx) })
	parts.Wait()
	errs := []error{answers, turns}
	g.mu.Lock()
	open, rules, have, settled := g.device, g.rules, g.have, g.settled
	g.device, g.rules = nil, nil
	g.mu.Unlock()
	if open != nil && rules != nil && settled && open.Mode() == device.Kernel {
		// Peers go on without us, and without the resolver: nobody else is to
		// answer in its place.
		if _, err := rules.Apply(accessOf(have, have.Access, nil)); err != nil {
			errs = append(errs, fmt.Errorf("take the resolver out of the access rules: %w", err))
		}
	}
	if open != nil {
		if err := open.Close(); err != nil {
			errs = append(errs, fmt.Errorf("let go of the device: %w", err))
		}
	}
	if rules != nil {
		if err := rules.Close(); err != nil {
			errs = append(errs, fmt.Errorf("let go of the access rules: %w", err))
		}
	}
	return errors.Join(errs...)
}

// turn brings everything into step.
func (g *Gateway) turn(ctx context.Context) (time.Time, error) {
	g.mu.Lock()
	w, have, settled, amiss := g.wish, g.have, g.settled, g.amiss
	g.mu.Unlock()
	now := g.time()
	sinceLook := now.Sub(g.looked)
	fresh := sinceLook >= 0 && sinceLook < interval*4/5
	if fresh && settled && !g.demand.Load() && g.behind(now) == nil && w.number == g.done && amiss == nil && len(g.failed) == 0 && (g.next.IsZero() || now.Before(g.next)) {
		// It can only be that others changed rules.
		if g.rule(have, have.Access) == nil {
			return g.next, nil
		}
	}
	assigned, leasesErr := g.assign(&w.config, now)
	if assigned == nil {
		return time.Time{}, leasesErr
	}
	now = g.time() // leases tell what it was already
	behind := g.behind(now)
	secrets := w.secrets
	var crossed, taken error
	secrets.Refused, crossed, taken = g.crossings(&w.config, have)
	want := wireguard.Compile(&w.config, assigned, secrets, now)
	var partly error
	err := taken
	if err != nil {
		// Nothing of it is applied, but for peers that go.
		err = errors.Join(err, g.drop(have, want))
	} else if partly, err = g.enforce(ctx, have, &want, now, fresh, settled); err != nil && g.device != nil {
		if !slices.ContainsFunc(g.failed, func(f wireguard.Desired) bool { return reflect.DeepEqual(f, want) }) {
			g.failed = append(g.failed, want)
		}
	}
	if err != nil {
		// Peers that go were taken off the device all the same.
		g.done, g.looked = 0, time.Time{}
		if !want.Next.IsZero() { // what a turn that fails asks for does not count
			g.alarm.Reset(want.Next.Sub(now))
		}
		return time.Time{}, errors.Join(err, leasesErr)
	}
	g.failed = nil
	if w.secrets.Lost != nil {
		crossed = errors.Join(crossed, fmt.Errorf("%w: the key that was last read stays until the next start; put it back before that", w.secrets.Lost))
	}
	g.mu.Lock()
	g.have, g.settled = want, true
	g.mu.Unlock()
	g.audit(have, want, settled)
	g.done, g.next = w.number, earliest(want.Next, g.warn(want, now))
	next := g.next
	g.count()
	if amiss := errors.Join(crossed, behind, partly, leasesErr, g.resolver.Apply(g.namesFor(ctx, want))); g.note(amiss) {
		next = earliest(next, now.Add(again))
	}
	return next, nil
}

const (
	// latestEvery is how far the time that leases remember may be behind.
	latestEvery = time.Hour
	// slack is how far a clock may be set back without a word.
	slack = time.Minute
)

// time is what the clock says, or, where that was set back, the latest time that
// was seen: who has expired stays so.
func (g *Gateway) time() time.Time {
	now := g.now()
	if g.leases.Latest.After(g.latest) {
		g.latest = g.leases.Latest
	}
	wall := now.Round(0) // not by what has passed since the start, which knows nothing of the clock
	if wall.Before(g.latest.Add(-slack)) {
		return g.latest
	}
	if wall.After(g.latest) {
		g.latest = wall
	}
	return now
}

// behind tells of a clock that was set back.
func (g *Gateway) behind(now time.Time) error {
	if is := g.now().Round(0); is.Before(now.Round(0).Add(-slack)) {
		return fmt.Errorf("the clock says %s, and it was %s already, by which peers expire until it is later: set the clock; if it was wrong then, stop the gateway and take `latest` out of %s",
			is.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339), wireguard.LeasesPath(g.options.StateDir))
	}
	return nil
}

// note keeps what is amiss though everybody has the access that was declared,
// and reports whether anything is. A new reason is logged, once.
func (g *Gateway) note(amiss error) bool {
	g.mu.Lock()
	before := g.amiss
	g.amiss = amiss
	g.mu.Unlock()
	switch {
	case amiss != nil && (before == nil || before.Error() != amiss.Error()):
		g.log.Warn("not all is as declared, trying until it is", "err", amiss)
	case amiss == nil && before != nil:
		g.log.Info("all is as declared")
	}
	return amiss != nil
}

// assign returns the addresses of all peers; nil where that cannot be told
// without the risk to give one twice. What cannot be written down is enforced
// all the same, and is an error.
func (g *Gateway) assign(c *wireguard.Config, now time.Time) (wireguard.Assigned, error) {
	path := wireguard.LeasesPath(g.options.StateDir)
	keeps := g.options.StateDir != ""
	if keeps && !g.loaded {
		leases, err := wireguard.LoadLeases(path)
		if err != nil {
			return nil, err
		}
		g.leases, g.loaded = leases, true
	}
	assigned, changed, err := g.leases.Assign(c, now)
	if latest := now.UTC().Truncate(time.Second); latest.Sub(g.leases.Latest) >= latestEvery {
		g.leases.Latest, changed = latest, true
	}
	known := make(map[netip.Addr]wireguard.Name, 2*len(g.leases.ByName))
	for name, lease := range g.leases.ByName {
		for _, a := range lease.Addresses {
			known[a] = name
		}
	}
	g.mu.Lock()
	g.names = known
	g.mu.Unlock()
	if keeps && (changed || g.unsaved) {
		saveErr := g.leases.Save(path)
		g.unsaved = saveErr != nil
		err = errors.Join(err, saveErr)
	}
	return assigned, err
}

// crossings finds networks of the VPN in which this machine is at home otherwise:
// the rules would drop all that comes from there. A peer with such a network is
// refused, with the reason; others go on. taken says that it is so for the VPN's own
// network, which then must not come into force; where it did so before the machine
// moved there, that is crossed.
func (g *Gateway) crossings(c *wireguard.Config, have wireguard.Desired) (refused map[wireguard.Name]string, crossed, taken error) {
	own := c.Networks()
	behind := map[netip.Prefix]wireguard.Name{}
	all := slices.Clone(own)
	for i := range c.Peers {
		for _, n := range c.Peers[i].AllowedIPs {
			behind[n.Masked()] = c.Peers[i].Name
			all = append(all, n)
		}
	}
	found, err := g.conflicts(c.Interface, all)
	if err != nil {
		return nil, nil, fmt.Errorf("look for conflicts on this machine: %w", err)
	}
	for _, conflict := range found {
		name, isPeers := behind[conflict.Network]
		switch err := fmt.Errorf("%s", crossing(conflict, name)); {
		case isPeers:
			if refused == nil {
				refused = map[wireguard.Name]string{}
			}
			refused[name] = err.Error()
		case slices.Contains(have.Access.Networks, conflict.Network):
			crossed = errors.Join(crossed, err)
		default:
			taken = errors.Join(taken, err)
		}
	}
	return refused, crossed, taken
}

// crossing is a conflict in a sentence with its cure; name is the peer's that the
// network lies behind, empty for the VPN's own.
func crossing(c device.Conflict, name wireguard.Name) string {
	if name == "" {
		return fmt.Sprintf("%v of the VPN overlaps %s: give the VPN another network (wireguard.addresses)", c.Network, c.Uses)
	}
	return fmt.Sprintf("%v overlaps %s: take it out of peer %s's allowedIPs", c.Network, c.Uses, name)
}

// Crossings says, a sentence each, which networks of a configuration this machine
// uses otherwise, as far as that can be seen from here.
func Crossings(c *wireguard.Config) []string {
	g := &Gateway{conflicts: device.Conflicts}
	refused, _, taken := g.crossings(c, wireguard.Desired{})
	var out []string
	if taken != nil {
		out = append(out, strings.Split(taken.Error(), "\n")...)
	}
	for _, name := range slices.Sorted(maps.Keys(refused)) {
		out = append(out, fmt.Sprintf("peer %s cannot be let in on this machine: %s", name, refused[name]))
	}
	return out
}

// mostFailed is how many wishes that failed are remembered before the device is
// asked which of them it holds.
const mostFailed = 8

// enforce makes rules and device what want says, in the order that never lets
// anybody reach more than have or want does. partly is what the device lacks
// beside its peers, who are all as wanted; want then says of it what is.
// fresh says that the device was read a short time ago, settled that have is what
// was enforced: otherwise an earlier process may have left a device.
func (g *Gateway) enforce(ctx context.Context, have wireguard.Desired, want *wireguard.Desired, now time.Time, fresh, settled bool) (partly, err error) {
	if err := g.open(ctx, *want); err != nil {
		return nil, errors.Join(err, g.drop(have, *want))
	}
	if !settled || len(g.failed) >= mostFailed {
		left, err := g.left(*want)
		if err != nil {
			return nil, errors.Join(err, g.drop(have, *want))
		}
		g.failed = []wireguard.Desired{left}
	}
	narrow := want.Access
	for _, before := range append([]wireguard.Desired{have}, g.failed...) {
		narrow.Sources = keepers(before, *want, narrow.Sources)
	}
	if err := g.rule(*want, narrow); err != nil {
		// To take peers away is right even so: nothing is wider for it.
		return nil, errors.Join(err, g.drop(have, *want))
	}
	if partly, err = g.connect(have, want, now, fresh); err != nil {
		return nil, err
	}
	if len(narrow.Sources) == len(want.Access.Sources) {
		return partly, nil
	}
	return partly, g.rule(*want, want.Access)
}

// left is what the device holds, as far as it matters to keepers: whose each
// address is. A key that want does not know is nobody's.
func (g *Gateway) left(want wireguard.Desired) (wireguard.Desired, error) {
	is, err := g.device.Have()
	if err != nil {
		return wireguard.Desired{}, err
	}
	owners := make(map[device.Key]wireguard.Name, len(want.Peers))
	for _, p := range want.Peers {
		owners[device.Key(p.PublicKey)] = p.Name
		if !p.Next.IsZero() {
			owners[device.Key(p.Next)] = p.Name
		}
	}
	var d wireguard.Desired
	for _, p := range is.Peers {
		for _, ip := range p.AllowedIPs {
			d.Access.Sources = append(d.Access.Sources, wireguard.Source{Prefix: ip, Peer: owners[p.PublicKey]})
		}
	}
	return d, nil
}

// keepers returns those of sources, which want has, that are not another peer's
// in have: the device may still know them as that one's.
func keepers(have, want wireguard.Desired, sources []wireguard.Source) []wireguard.Source {
	// A peer with another key is another, but for one whose key rotates.
	other := func(s, was wireguard.Source) bool {
		if s.Peer != was.Peer {
			return true
		}
		a, b := peerOf(have, s.Peer), peerOf(want, s.Peer)
		return a != nil && b != nil && a.PublicKey != b.PublicKey && a.Next != b.PublicKey
	}
	single := make(map[netip.Prefix]wireguard.Source, len(have.Access.Sources))
	var wide []wireguard.Source
	for _, was := range have.Access.Sources {
		if was.Prefix.IsSingleIP() {
			single[was.Prefix] = was
		} else {
			wide = append(wide, was)
		}
	}
	out := make([]wireguard.Source, 0, len(sources))
	for _, s := range sources {
		was, known := single[s.Prefix]
		moves := known && other(s, was)
		for _, w := range wide {
			moves = moves || w.Prefix.Overlaps(s.Prefix) && other(s, w)
		}
		if !s.Prefix.IsSingleIP() {
			for _, was := range single {
				moves = moves || s.Prefix.Contains(was.Prefix.Addr()) && other(s, was)
			}
		}
		if !moves {
			out = append(out, s)
		}
	}
	return out
}

// peerOf finds a live peer; they are sorted by name.
func peerOf(d wireguard.Desired, name wireguard.Name) *wireguard.DesiredPeer {
	i, ok := slices.BinarySearchFunc(d.Peers, name, func(p wireguard.DesiredPeer, n wireguard.Name) int { return cmp.Compare(p.Name, n) })
	if !ok {
		return nil
	}
	return &d.Peers[i]
}

// open takes hold of rules and device where that was not done; it changes neither.
func (g *Gateway) open(ctx context.Context, want wireguard.Desired) error {
	if g.rules == nil {
		opened, err := g.openRules()
		if err != nil {
			return fmt.Errorf("take hold of the access rules: %w", held(err, "another edgeward-tunnel keeps the VPN of this machine: stop it first"))
		}
		// Without events everything is found by the interval all the same.
		if events, err := opened.Watch(g.life); err != nil {
			g.log.Warn("cannot watch for changes of the rules by others", "err", err)
		} else {
			go g.follow(events)
		}
		before := refusals(opened)
		g.mu.Lock()
		g.rules, g.tally.before = opened, before
		g.mu.Unlock()
	}
	if g.device != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	opened, err := g.openDevice(ctx, device.Options{
		Name: want.Device.Interface, Mode: device.Mode(want.Device.Mode), StateDir: g.options.StateDir,
		Want: deviceOf(want), Rotated: g.rotated, Lost: g.lost, Alone: g.options.Alone, Log: g.options.Log,
	})
	if err != nil {
		return fmt.Errorf("open the device: %w", err)
	}
	g.mu.Lock()
	g.device = opened
	g.mu.Unlock()
	return nil
}

// rule has the kernel enforce a, whatever it did. The same again costs little, and
// repairs what others changed.
func (g *Gateway) rule(want wireguard.Desired, a wireguard.Access) error {
	done, err := g.rules.Apply(accessOf(want, a, g.resolver.Status().Listening))
	if err != nil {
		return fmt.Errorf("apply access rules: %w", held(err, "another edgeward-tunnel keeps the VPN of this machine: stop it first"))
	}
	if done.Repaired {
		g.log.Warn("access rules were not as they were left, and are again")
	}
	return nil
}

// held is err, or, where that is that the rules are another process's, what to say
// of it.
func held(err error, says string) error {
	if errors.Is(err, nft.ErrOwned) {
		return errors.New(says)
	}
	return err
}

// follow has the rules looked at when others changed any; who changes his own all
// the time costs us four looks a second at most.
func (g *Gateway) follow(events <-chan nft.Event) {
	for range events {
		g.loop.Trigger()
		time.Sleep(250 * time.Millisecond)
	}
}

// drop takes from the device the peers that want has no more.
func (g *Gateway) drop(have, want wireguard.Desired) error {
	if g.device == nil {
		return nil
	}
	var errs []error
	for _, p := range have.Peers {
		is := peerOf(want, p.Name)
		for _, k := range []wireguard.PublicKey{p.PublicKey, p.Next} {
			if !k.IsZero() && (is == nil || is.PublicKey != k && is.Next != k && is.PublicKey != p.Next) {
				errs = append(errs, g.device.Remove(device.Key(k)))
			}
		}
	}
	return errors.Join(errs...)
}

// connect makes the device what want says: by events where few peers differ, and
// otherwise, and now and then, by reading it. partly, fresh and what becomes of
// want are as enforce has them.
func (g *Gateway) connect(have wireguard.Desired, want *wireguard.Desired, now time.Time, fresh bool) (partly, err error) {
	wish := deviceOf(*want)
	demanded := g.demand.Swap(false)
	if events, few := differences(have, *want); few && fresh && !demanded && len(g.failed) == 0 {
		for _, e := range events {
			if err := e(g.device); err != nil {
				return nil, fmt.Errorf("change a peer: %w", err)
			}
		}
		return nil, nil
	}
	changes, err := g.device.Reconcile(wish)
	// What nobody declared anew was changed by another hand.
	repaired := len(g.failed) == 0 && len(changes.Rotated) == 0 && reflect.DeepEqual(have, *want)
	for _, line := range changes.Lines() {
		if repaired {
			g.log.Warn("the device was not as it was left, and is again", "change", line)
		} else {
			g.log.Debug("device changed", "change", line)
		}
	}
	if err == nil {
		g.looked = now
		return nil, nil
	}
	g.looked = time.Time{}
	err = fmt.Errorf("apply to the device: %w", err)
	is, readErr := g.device.Have()
	if readErr != nil {
		return nil, errors.Join(err, readErr)
	}
	if left := device.Diff(is, wish); len(left.Remove)+len(left.Update)+len(left.Add) > 0 {
		return nil, err
	}
	if is.ListenPort != 0 {
		want.Device.ListenPort = is.ListenPort
	}
	return err, nil
}

// differences returns what to tell the device of the peers that differ. few is
// false where the device has to be read: more than peers differ, or many of them.
func differences(have, want wireguard.Desired) (events []func(link) error, few bool) {
	if !reflect.DeepEqual(have.Device, want.Device) {
		return nil, false
	}
	remove := func(p wireguard.DesiredPeer) {
		events = append(events, func(l link) error { return l.Remove(device.Key(p.PublicKey)) })
		if !p.Next.IsZero() { // it may have taken over
			events = append(events, func(l link) error { return l.Remove(device.Key(p.Next)) })
		}
	}
	var sets []func(link) error
	i, j := 0, 0
	for (i < len(have.Peers) || j < len(want.Peers)) && len(events)+len(sets) <= mostEvents {
		switch {
		case j == len(want.Peers) || i < len(have.Peers) && have.Peers[i].Name < want.Peers[j].Name:
			remove(have.Peers[i])
			i++
		case i == len(have.Peers) || want.Peers[j].Name < have.Peers[i].Name:
			p := peerFor(want.Peers[j])
			sets = append(sets, func(l link) error { return l.Upsert(p) })
			j++
		default:
			was, is := have.Peers[i], want.Peers[j]
			i, j = i+1, j+1
			same := was.PublicKey == is.PublicKey && was.Next == is.Next
			if same && was.PresharedKey == is.PresharedKey && was.NextPresharedKey == is.NextPresharedKey && slices.Equal(was.AllowedIPs(), is.AllowedIPs()) {
				continue
			}
			if !same {
				return nil, false // keys that rotate are for the device to compare
			}
			p := peerFor(is)
			sets = append(sets, func(l link) error { return l.Upsert(p) })
		}
	}
	events = append(events, sets...)
	return events, len(events) <= mostEvents
}

// lost is told by the device that another hand took the interface away or down.
func (g *Gateway) lost() {
	g.note(fmt.Errorf("the interface %s was taken away or down by another hand, and is brought back", g.options.Config.Interface))
	g.demand.Store(true)
	g.loop.Trigger()
}

// rotated is told by the device that a peer uses its next key.
func (g *Gateway) rotated(r device.Rotation) {
	g.log.Info("a peer uses its next key, and the one before is void", "peer", r.Name)
}

// audit writes a line for each change that was enforced.
func (g *Gateway) audit(have, want wireguard.Desired, settled bool) {
	if !settled {
		g.log.Info("the VPN is up", "interface", want.Device.Interface, "port", want.Device.ListenPort, "peers", len(want.Peers), "idle", len(want.Idle))
		return
	}
	for _, c := range wireguard.NewPlan(have, want).Changes {
		attrs := []any{"change", c.What}
		if c.Peer != "" {
			attrs = append(attrs, "peer", c.Peer)
		}
		if c.Service != "" {
			attrs = append(attrs, "service", c.Service)
		}
		if len(c.Gains) > 0 {
			attrs = append(attrs, "gains", c.Gains)
		}
		if len(c.Loses) > 0 {
			attrs = append(attrs, "loses", c.Loses)
		}
		g.log.Info("vpn changed", attrs...)
	}
}

// said is what was said in the log and is not said again.
type said struct {
	ends    map[wireguard.Name]time.Duration // the last warning of each peer
	unready map[wireguard.Name]string
	problem map[wireguard.Name]string
}

func newSaid() said {
	return said{map[wireguard.Name]time.Duration{}, map[wireguard.Name]string{}, map[wireguard.Name]string{}}
}

// namesFor is namesOf, where no upstreams are declared with the machine's own.
func (g *Gateway) namesFor(ctx context.Context, want wireguard.Desired) names.Config {
	c := namesOf(want)
	if len(c.Listen) == 0 || len(c.Upstreams) > 0 {
		g.servers = nil
		return c
	}
	servers, err := names.Machine(ctx, g.resolvConf, slices.Concat(want.Access.Networks, want.Device.Routes))
	c.Upstreams = servers
	if g.servers != nil && slices.Equal(servers, g.servers) {
		return c
	}
	g.servers = append([]netip.AddrPort{}, servers...)
	if len(servers) == 0 {
		g.log.Warn("no names.upstreams are declared, and this machine has no DNS server that can be asked: peers resolve the hosts of services alone", "file", g.resolvConf, "err", err)
	} else {
		g.log.Info("no names.upstreams are declared: this machine's DNS servers answer for them", "file", g.resolvConf, "servers", servers)
	}
	return c
}

// warn tells of the peers that end soon, at each of the warnings, and of those
// that cannot be made live, and returns when there is more to tell.
func (g *Gateway) warn(want wireguard.Desired, now time.Time) (next time.Time) {
	again := newSaid()
	for _, p := range want.Peers {
		if p.Problem == "" {
			continue
		}
		if again.problem[p.Name] = p.Problem; g.said.problem[p.Name] != p.Problem {
			g.log.Warn("a peer is let in, but not all is as declared", "peer", p.Name, "err", p.Problem)
		}
	}
	for _, p := range want.Peers {
		if p.Expires.IsZero() {
			continue
		}
		remains := p.Expires.Sub(now)
		for i, before := range warnings {
			if remains > before {
				continue
			}
			if g.said.ends[p.Name] != before {
				g.log.Warn("a peer expires soon", "peer", p.Name, "expires", p.Expires, "in", remains.Round(time.Second).String())
			}
			again.ends[p.Name] = before
			if i > 0 {
				next = earliest(next, p.Expires.Add(-warnings[i-1]))
			}
			break
		}
		if _, warned := again.ends[p.Name]; !warned {
			next = earliest(next, p.Expires.Add(-warnings[len(warnings)-1]))
		}
	}
	for _, p := range want.Idle {
		if p.State != wireguard.Unready {
			continue
		}
		if again.unready[p.Name] = p.Why; g.said.unready[p.Name] != p.Why {
			g.log.Error("a peer cannot be let in", "peer", p.Name, "err", p.Why)
		}
	}
	g.said = again
	return next
}

// earliest is the earlier of two times, of which the zero time is never.
func earliest(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// Cleanup removes what a gateway that has ended left behind: the device, and then
// the access rules, so that at no moment there is one without the other. Keys and
// leases stay. It refuses while a gateway is at work.
func Cleanup(options Options) error {
	name := options.Config.Interface
	rules, err := nft.OpenAccess(nft.Options{})
	if err != nil {
		return fmt.Errorf("take hold of the access rules: %w", held(err, "the gateway still runs: stop it first"))
	}
	if err := device.Cleanup(name, options.StateDir); err != nil {
		return errors.Join(fmt.Errorf("remove %s: %w", name, err), rules.Close())
	}
	return errors.Join(rules.Delete(), rules.Close())
}

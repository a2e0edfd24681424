// Package names is the resolver that the peers of the VPN ask, at the gateway's
// own VPN addresses. It answers the declared internal hosts from memory and
// forwards the rest to resolvers that are configured, with a bounded cache.
//
// It answers peers alone. What it was told of a host or a zone never leaves it:
// no question about them is forwarded, whatever its type. It resolves nothing
// from the root itself, validates nothing (it hands on what a validating client
// needs), keeps no log of who asked what, and knows nothing of WireGuard or
// nftables. The gateway calls it.
package names

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/time/rate"
)

// Config is all that the resolver is told; it is a plain value and is stated
// whole each time.
type Config struct {
	// Listen is where peers ask, by UDP and TCP. The addresses need not exist
	// yet: the resolver is there when they come.
	Listen []netip.AddrPort
	// Hosts are the declared hosts with their addresses, IPv4 and IPv6 in any
	// order. A name is a host name without its last dot; *.example.com stands
	// for all names below example.com that are not there themselves.
	Hosts map[string][]netip.Addr
	// Zones are domains that are wholly internal: a name in them that no host
	// declares does not exist.
	Zones []string
	// TTL is how long clients may keep what they were told of hosts, 30 seconds
	// unless given. A host that moves is at its old address for that long.
	TTL time.Duration
	// Upstreams are asked for all else, the first that answers. Without any, all
	// else is refused.
	Upstreams []netip.AddrPort
	// Peers are the addresses that may ask.
	Peers []netip.Prefix
	// Owners says whose each of Peers is: what one owner has is bounded together.
	// One that is not in it is bounded on its own.
	Owners map[netip.Prefix]string
	// Rate is how many questions a second each owner of Peers may ask in the long
	// run, 100 unless given, and Burst how many at once, 500 unless given. What
	// is over is dropped.
	Rate  float64
	Burst int
}

// defaultTTL, defaultRate and defaultBurst are for what a Config leaves out.
const (
	defaultTTL   = 30 * time.Second
	defaultRate  = 100
	defaultBurst = 500
	// longestTTL is what a declared host may be kept at most.
	longestTTL = time.Hour
)

// Counts are how questions fared since the start.
type Counts struct {
	Declared  uint64 // answered from the declared hosts and zones
	Cached    uint64 // answered from what an upstream said before
	Forwarded uint64 // answered by an upstream
	Failed    uint64 // no upstream answered
	Refused   uint64 // asked by nobody that may, or what is never answered
	Limited   uint64 // dropped: over the asker's rate
}

// Status is how a resolver stands.
type Status struct {
	// Listening are the addresses at which it answers now, by UDP and TCP.
	Listening []netip.AddrPort
	// Missing says why it does not answer at some address; nil if it answers at
	// all of them.
	Missing error
	// Upstreams are those of the Config in force.
	Upstreams []netip.AddrPort
	// Down are the upstreams that did not answer when they were last asked.
	Down   []netip.AddrPort
	Hosts  int
	Counts Counts
}

// Resolver answers. Make it with New; it is a daemon.Task.
type Resolver struct {
	log   *slog.Logger
	setup atomic.Pointer[setup]
	news  chan struct{} // there may be other addresses to listen at
	now   func() time.Time

	// Order matters to nobody, but each is counted on its own.
	declared, cached, forwarded, failed, refused, limited atomic.Uint64

	mu        sync.Mutex
	listening map[netip.AddrPort]*listener
	missing   error
	changed   func()
}

// setup is one Config, made ready to answer by. It is never changed.
type setup struct {
	config Config
	// hosts are found by canonical name: lower case, with the last dot. Below a
	// wildcard's domain it stands in wild.
	hosts map[string]host
	wild  map[string]host
	zones map[string]bool
	ttl   uint32 // in seconds
	// askers are the Peers; bits4 and bits6 are the prefix lengths among them,
	// the longest first.
	askers       map[netip.Prefix]*asker
	owners       map[netip.Prefix]string // of askers
	bits4, bits6 []int
	ahead        *forwarder // nil without upstreams
}

// host is what a declared name has.
type host struct{ v4, v6 []netip.Addr }

// asker is one of the Peers.
type asker struct {
	limiter *rate.Limiter
	conns   atomic.Int32 // TCP connections that it holds
	ahead   atomic.Int32 // questions that wait for an upstream
}

// New makes a resolver that refuses everybody until Apply.
func New(log *slog.Logger) *Resolver {
	r := &Resolver{log: log.With("component", "names"), news: make(chan struct{}, 1), now: time.Now, listening: map[netip.AddrPort]*listener{}}
	r.setup.Store(&setup{})
	return r
}

// String names the task.
func (r *Resolver) String() string { return "names" }

// OnListening says what is called, by the goroutine of Run, when Listening has come
// to be another; it must not wait. It must be set before Run.
func (r *Resolver) OnListening(changed func()) { r.changed = changed }

// Apply puts a Config in force. Questions are answered by it from the moment
// that Apply returns; addresses that are new are listened at soon after. What it
// refuses leaves the last Config in force. It is safe to call at any time, and
// with a Config that is in force already.
func (r *Resolver) Apply(c Config) error {
	was := r.setup.Load()
	next, err := prepare(c, was, r.now)
	if err != nil {
		return fmt.Errorf("set up names: %w", err)
	}
	r.setup.Store(next)
	if !slices.Equal(was.config.Listen, next.config.Listen) {
		select {
		case r.news <- struct{}{}:
		default:
		}
	}
	return nil
}

// prepare makes a Config ready. What of was stays good is kept: the cache while
// the upstreams are the same, and how much each asker asked.
func prepare(c Config, was *setup, now func() time.Time) (*setup, error) {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	c.Listen, c.Upstreams = slices.Clone(c.Listen), slices.Clone(c.Upstreams)
	slices.SortFunc(c.Listen, netip.AddrPort.Compare)
	if c.TTL <= 0 {
		c.TTL = defaultTTL
	}
	if c.Rate <= 0 {
		c.Rate = defaultRate
	}
	if c.Burst <= 0 {
		c.Burst = defaultBurst
	}
	s := &setup{
		config: c, hosts: map[string]host{}, wild: map[string]host{}, zones: map[string]bool{},
		ttl: uint32(min(c.TTL, longestTTL).Seconds()), askers: make(map[netip.Prefix]*asker, len(c.Peers)), owners: map[netip.Prefix]string{},
	}
	for name, addrs := range c.Hosts {
		canonical, into := dns.CanonicalName(name), s.hosts
		if domain, ok := strings.CutPrefix(canonical, "*."); ok {
			canonical, into = domain, s.wild
		}
		if _, ok := dns.IsDomainName(canonical); !ok || canonical == "." {
			fail("%q is no host name", name)
			continue
		}
		h := into[canonical]
		for _, a := range addrs {
			if a = a.Unmap().WithZone(""); a.Is4() {
				h.v4 = append(h.v4, a)
			} else {
				h.v6 = append(h.v6, a)
			}
		}
		into[canonical] = h
	}
	for _, z := range c.Zones {
		canonical := dns.CanonicalName(strings.TrimPrefix(z, "*."))
		if _, ok := dns.IsDomainName(canonical); !ok || canonical == "." {
			fail("%q is no zone", z)
		}
		s.zones[canonical] = true
	}
	for _, u := range c.Upstreams {
		switch {
		case !u.IsValid() || u.Port() == 0 || u.Addr().IsUnspecified():
			fail("upstream %s is no address and port", u)
		case slices.Contains(c.Listen, u):
			fail("upstream %s is this resolver: questions would go round in circles", u)
		}
	}
	owned := map[string]*asker{}
	for _, p := range c.Peers {
		if !p.IsValid() {
			fail("%s is no peer's address", p)
			continue
		}
		owner := c.Owners[p]
		p = p.Masked()
		a := was.askers[p]
		if owned[owner] != nil {
			a = owned[owner]
		} else if a == nil || was.owners[p] != owner || was.config.Rate != c.Rate || was.config.Burst != c.Burst {
			a = &asker{limiter: rate.NewLimiter(rate.Limit(c.Rate), c.Burst)}
		}
		if owner != "" {
			owned[owner], s.owners[p] = a, owner
		}
		s.askers[p] = a
		bits := &s.bits6
		if p.Addr().Is4() {
			bits = &s.bits4
		}
		if !slices.Contains(*bits, p.Bits()) {
			*bits = append(*bits, p.Bits())
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	for _, bits := range [][]int{s.bits4, s.bits6} {
		slices.SortFunc(bits, func(a, b int) int { return b - a })
	}
	switch {
	case len(c.Upstreams) == 0:
	case was.ahead != nil && slices.Equal(was.config.Upstreams, c.Upstreams):
		s.ahead = was.ahead
	default:
		s.ahead = newForwarder(c.Upstreams, now)
	}
	return s, nil
}

// asks returns who asks from addr; nil if nobody may.
func (s *setup) asks(addr netip.Addr) *asker {
	bits := s.bits6
	if addr.Is4() {
		bits = s.bits4
	}
	for _, length := range bits {
		if p, err := addr.Prefix(length); err == nil && s.askers[p] != nil {
			return s.askers[p]
		}
	}
	return nil
}

// Status tells how the resolver stands.
func (r *Resolver) Status() Status {
	s := r.setup.Load()
	out := Status{Upstreams: slices.Clone(s.config.Upstreams), Hosts: len(s.config.Hosts), Counts: Counts{
		Declared: r.declared.Load(), Cached: r.cached.Load(), Forwarded: r.forwarded.Load(),
		Failed: r.failed.Load(), Refused: r.refused.Load(), Limited: r.limited.Load(),
	}}
	if s.ahead != nil {
		out.Down = s.ahead.down()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	out.Listening = slices.SortedFunc(maps.Keys(r.listening), netip.AddrPort.Compare)
	out.Missing = r.missing
	return out
}

// Run answers until ctx ends.
func (r *Resolver) Run(ctx context.Context) error {
	again := time.NewTimer(time.Hour)
	defer again.Stop()
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		for at, l := range r.listening {
			l.close()
			delete(r.listening, at)
		}
	}()
	for {
		if err := r.listen(); err != nil {
			again.Reset(bindRetry)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-r.news:
		case <-again.C:
		}
	}
}

// bindRetry is the time between tries to listen where something is in the way.
const bindRetry = 2 * time.Second

// listen brings the listeners into step with the Config in force.
func (r *Resolver) listen() error {
	want := r.setup.Load().config.Listen
	r.mu.Lock()
	defer r.mu.Unlock()
	were := slices.Collect(maps.Keys(r.listening))
	defer func() {
		same := len(were) == len(r.listening) && !slices.ContainsFunc(were, func(at netip.AddrPort) bool { return r.listening[at] == nil })
		if !same && r.changed != nil {
			r.changed()
		}
	}()
	for at, l := range r.listening {
		if !slices.Contains(want, at) || l.ended.Load() {
			l.close()
			delete(r.listening, at)
		}
	}
	var errs []error
	for _, at := range want {
		if r.listening[at] != nil {
			continue
		}
		l, err := r.open(at)
		if err != nil {
			errs = append(errs, fmt.Errorf("answer at %s: %w", at, err))
			continue
		}
		r.listening[at] = l
	}
	before := r.missing
	r.missing = errors.Join(errs...)
	switch {
	case r.missing != nil && (before == nil || before.Error() != r.missing.Error()):
		r.log.Warn("cannot answer at every address, trying until it works", "err", r.missing)
	case r.missing == nil && before != nil:
		r.log.Info("answering at every address")
	}
	return r.missing
}

package tunnel

import (
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/edgeward/edgeward/internal/crowdsec"
	"github.com/edgeward/edgeward/internal/decision"
	"github.com/edgeward/edgeward/internal/lapi"
)

// feed follows LAPI's decisions and holds what requests see of them.
type feed struct {
	seen  atomic.Pointer[sight]
	known chan struct{} // closed when LAPI has answered
	log   *slog.Logger
	now   func() time.Time

	// Of the goroutine that feeds the Sink.
	delta *decision.Delta
	row   decision.Row

	mu     sync.Mutex // what follows, and publishing
	store  *decision.Store
	policy decision.Policy
	told   told
}

// told is what is known of LAPI.
type told struct {
	Pulls, Fulls, Doubts uint64
	Failures             uint64 // pulls that brought nothing
	Trouble              string // why the last one did; empty if it did not
	Last, LastFull       time.Time
	Skipped              map[string]uint64
}

// sight is what requests see: a table, how to read it, and the decisions on
// countries. It never changes.
type sight struct {
	table     *decision.Table
	view      *decision.View
	allow     *decision.Ranges
	countries map[string][]decision.Verdict // strongest first
	pulled    time.Time                     // zero: never
}

// Scopes are the scopes of decisions that the tunnel enforces.
var Scopes = []string{"ip", "range", "country"}

func newFeed(policy decision.Policy, now func() time.Time, log *slog.Logger) *feed {
	f := &feed{known: make(chan struct{}), log: log, now: now, store: decision.NewStore(), policy: policy, told: told{Skipped: map[string]uint64{}}}
	f.publish()
	return f
}

// adopt reads the table by another policy.
func (f *feed) adopt(p decision.Policy) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.policy = p
	f.publish()
}

// publish puts what the store holds in force.
func (f *feed) publish() {
	table := f.store.Compile()
	s := &sight{table: table, allow: f.policy.Allow, countries: map[string][]decision.Verdict{}, pulled: f.told.Last}
	s.view = decision.NewView(table, f.policy)
	for _, d := range f.store.Scoped(f.now()) {
		if v, ok := f.onCountry(d); ok {
			name := strings.ToUpper(d.Value)
			s.countries[name] = append(s.countries[name], v)
		}
	}
	for _, list := range s.countries {
		slices.SortFunc(list, func(a, b decision.Verdict) int {
			if a.Remediation != b.Remediation {
				return int(b.Remediation) - int(a.Remediation)
			}
			return b.Until.Compare(a.Until)
		})
	}
	f.seen.Store(s)
}

// onCountry is a decision on a country as the policy reads it.
func (f *feed) onCountry(d decision.Scoped) (decision.Verdict, bool) {
	if d.Scope != "country" || f.policy.Accept != nil && !f.policy.Accept(d.Class) {
		return decision.Verdict{}, false
	}
	v := decision.Verdict{Remediation: d.Class.Remediation, ID: d.ID, Until: d.Until, Type: d.Class.Type, Origin: d.Class.Origin, Scenario: d.Class.Scenario}
	if v.Remediation == decision.Unknown {
		v.Remediation = f.policy.Fallback
	}
	return v, v.Remediation != decision.Allow
}

// lookup is the verdict on a visitor: the stronger of what holds its address
// and what holds its country. An allowed address is touched by neither.
func (s *sight) lookup(addr netip.Addr, country string, now time.Time) decision.Verdict {
	v := s.view.Lookup(s.table, addr, now)
	if v.Remediation == decision.Ban || len(s.countries) == 0 {
		return v
	}
	for _, c := range s.countries[country] {
		if c.Until.After(now) {
			if c.Remediation > v.Remediation && !decision.Contains(s.allow, addr.AsSlice()) {
				return c
			}
			break
		}
	}
	return v
}

// stale reports whether nothing can be known: no good pull within maxAge.
func (s *sight) stale(now time.Time, maxAge time.Duration) bool {
	return s.pulled.IsZero() || now.Sub(s.pulled) > maxAge
}

// sink takes in the decision stream.
func (f *feed) sink() lapi.Sink {
	return lapi.Sink{
		Begin: func(full bool, _ time.Time) { // the stream goes by the time of day
			f.mu.Lock()
			defer f.mu.Unlock()
			f.delta = f.store.NewDelta(full, f.now())
		},
		Add: func(r *lapi.Row) {
			f.row = decision.Row(*r)
			f.delta.Add(&f.row)
		},
		Delete:     func(id int) { f.delta.Delete(id) },
		Unreadable: func() { f.delta.Unreadable() },
		Commit:     f.commit,
	}
}

// commit applies the answer that has arrived whole.
func (f *feed) commit() (doubt bool) {
	now := f.now()
	d := f.delta
	f.delta = nil
	f.mu.Lock()
	defer f.mu.Unlock()
	outcome := f.store.Apply(d, now)
	if f.told.Pulls++; f.told.Pulls == 1 {
		defer close(f.known) // once it is in force
	}
	f.told.Last = now
	if d.Full {
		f.told.Fulls++
		f.told.LastFull = now
	}
	if outcome.Doubt {
		f.told.Doubts++
		f.log.Warn("a full pull lacks decisions that no delta ended, deleting nothing yet, asking again",
			"had", outcome.Had, "got", outcome.Got, "missing", outcome.Missing)
	}
	for reason, n := range d.Skipped {
		f.told.Skipped[reason] += uint64(n)
		f.log.Warn("decisions skipped", "reason", reason, "count", n)
	}
	if f.store.Due() {
		f.store.Fold(now)
	}
	f.publish()
	return outcome.Doubt
}

// Count is how many live decisions there are of an origin and remediation.
type Count struct {
	Origin      string `json:"origin"`
	Remediation string `json:"remediation"`
	IPType      string `json:"ipType"`
	Count       int    `json:"count"`
}

// tally counts the live decisions on addresses that the policy accepts.
func (f *feed) tally() []Count {
	f.mu.Lock()
	policy := f.policy
	f.mu.Unlock()
	counts := map[Count]int{}
	for _, t := range f.seen.Load().table.Tally(f.now()) {
		means := t.Class.Remediation
		if means == decision.Unknown {
			means = policy.Fallback
		}
		if means == decision.Allow || policy.Accept != nil && !policy.Accept(t.Class) {
			continue
		}
		for kind, n := range map[string]int{crowdsec.IPv4: t.IPv4, crowdsec.IPv6: t.IPv6} {
			if n > 0 {
				counts[Count{Origin: originOf(t.Class.Origin, t.Class.Scenario), Remediation: means.Name(), IPType: kind}] += n
			}
		}
	}
	out := make([]Count, 0, len(counts))
	for c, n := range counts {
		c.Count = n
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b Count) int {
		return strings.Compare(a.Origin+" "+a.Remediation+" "+a.IPType, b.Origin+" "+b.Remediation+" "+b.IPType)
	})
	return out
}

// originOf names an origin as CrowdSec's console does: a blocklist has its name
// in the scenario.
func originOf(origin, scenario string) string {
	if strings.EqualFold(origin, "lists") && scenario != "" {
		return "lists:" + scenario
	}
	return origin
}

func ipType(addr netip.Addr) string {
	if addr.Is4() {
		return crowdsec.IPv4
	}
	return crowdsec.IPv6
}

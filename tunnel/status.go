package tunnel

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/edgeward/edgeward/internal/decision"
)

// Link is how the connector of one tunnel stands.
type Link struct {
	Tunnel string `json:"tunnel"`
	ID     string `json:"id,omitempty"`
	// Protocol is what is used, or what is being tried.
	Protocol string `json:"protocol,omitempty"`
	Wanted   int    `json:"wanted"`
	// Refused says why the edge refuses the credentials for good, and what to
	// do; empty while it does not.
	Refused string `json:"refused,omitempty"`
	// Trouble says why the connections are not what the configuration wants.
	Trouble string `json:"trouble,omitempty"`
	// Note is what Cloudflare's API says of the tunnel that is to be known, such
	// as that other connectors serve it too.
	Note     string `json:"note,omitempty"`
	InFlight int    `json:"inFlight"`
	// Counts since the start: connections that were registered, lost, given up
	// because nothing came through them, and let go in good order.
	Registrations uint64       `json:"registrations"`
	Lost          uint64       `json:"lost"`
	Recycled      uint64       `json:"recycled"`
	Drains        uint64       `json:"drains"`
	Connections   []Connection `json:"connections"`
}

// Connection is one connection to the edge.
type Connection struct {
	Index      int       `json:"index"`
	State      string    `json:"state"`
	Registered bool      `json:"registered"`
	Protocol   string    `json:"protocol,omitempty"`
	Address    string    `json:"address,omitempty"`
	Location   string    `json:"location,omitempty"`
	Since      time.Time `json:"since,omitzero"`
	// KeyExchange is how the connection's keys were agreed on; X25519MLKEM768
	// withstands quantum computers.
	KeyExchange string `json:"keyExchange,omitempty"`
	// Canary is when the edge last answered through it; zero if it has not yet.
	Canary time.Time `json:"canary,omitzero"`
	Error  string    `json:"error,omitempty"`
}

// Calls are the calls of Cloudflare's API that were made.
type Calls struct {
	Made map[Call]uint64
	Left int // until the quota ends; -1 where that is not known
}

// Call is a kind of call.
type Call struct{ What, Outcome string }

// Status is what /v1/status and the status command show.
type Status struct {
	Version string     `json:"version"`
	Mode    Mode       `json:"mode"`
	Since   time.Time  `json:"since"`
	Ready   string     `json:"ready"` // "yes", or why not
	LAPI    LAPIStatus `json:"lapi"`
	Links   []Link     `json:"links"`
	Hosts   []HostInfo `json:"hosts"`
	// Decisions are the live ones on addresses that count here.
	Decisions []Count `json:"decisions"`
	// Countries are the live ones on countries that count here.
	Countries []Country `json:"countries,omitempty"`
	// Cloudflare is what was found and done through the API.
	Cloudflare any `json:"cloudflare,omitempty"`
	// Trouble says why the configuration in force is not the file's; empty if
	// it is.
	Trouble string `json:"trouble,omitempty"`
}

// LAPIStatus is how the stream of decisions stands.
type LAPIStatus struct {
	URL          string            `json:"url,omitempty"` // empty without LAPI
	LastPull     time.Time         `json:"lastPull,omitzero"`
	LastFullPull time.Time         `json:"lastFullPull,omitzero"`
	Skipped      map[string]uint64 `json:"skipped,omitempty"`
	// Answering is false where the last pull failed, or none has come in for
	// three intervals; Error says why.
	Answering bool   `json:"answering"`
	Error     string `json:"error,omitempty"`
}

// Country is a decision on all visitors from a country.
type Country struct {
	Country     string    `json:"country"` // two letters
	Remediation string    `json:"remediation"`
	Origin      string    `json:"origin"`
	Until       time.Time `json:"until"`
}

// HostInfo is a host as it is routed.
type HostInfo struct {
	Host     Host     `json:"host"`
	Path     string   `json:"path,omitempty"`
	Tunnel   string   `json:"tunnel,omitempty"`
	Service  Service  `json:"service"`
	Fail     Fail     `json:"fail"`
	Exposure Exposure `json:"exposure"`
}

// knows returns what is known of LAPI.
func (f *feed) knows() told {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := f.told
	out.Skipped = maps.Clone(out.Skipped)
	return out
}

// Status tells how the gate stands, with the connectors that links reports.
func (g *Gate) Status(links []Link) Status {
	c := g.setup.Load().config
	told := g.feed.knows()
	s := Status{
		Version: Version, Mode: c.Mode, Since: g.clock.shown(g.began), Ready: "yes", Links: links, Hosts: []HostInfo{}, Decisions: g.feed.tally(), Countries: g.countries(),
	}
	if c.hasLAPI {
		s.LAPI = LAPIStatus{
			URL: c.LAPI.URL, LastPull: g.clock.shown(told.Last), LastFullPull: g.clock.shown(told.LastFull), Skipped: told.Skipped,
			Answering: told.Trouble == "" && g.clock.now().Sub(told.Last) < 3*c.LAPI.Interval+c.LAPI.Timeout, Error: told.Trouble,
		}
	}
	for _, h := range c.Hosts {
		s.Hosts = append(s.Hosts, HostInfo{h.Host, h.Path, h.Tunnel, h.Service, h.Fail, h.Exposure})
	}
	if err := Ready(links); err != nil {
		s.Ready = err.Error()
	}
	return s
}

// Ready returns nil where at least one connection of any tunnel is registered;
// otherwise why not.
func Ready(links []Link) error {
	var why []string
	for _, l := range links {
		reason := cmp.Or(l.Refused, l.Trouble)
		for _, c := range l.Connections {
			if c.Registered {
				return nil
			}
			reason = cmp.Or(reason, c.Error)
		}
		if reason != "" {
			why = append(why, fmt.Sprintf("tunnel %s: %s", l.Tunnel, reason))
		}
	}
	if len(why) == 0 {
		return errors.New("no connection to the edge is registered")
	}
	return fmt.Errorf("no connection to the edge is registered: %s", strings.Join(why, "; "))
}

// countries are the live decisions on countries.
func (g *Gate) countries() []Country {
	var out []Country
	s, now := g.feed.seen.Load(), g.clock.now()
	for _, name := range slices.Sorted(maps.Keys(s.countries)) {
		for _, v := range s.countries[name] {
			if v.Until.After(now) {
				out = append(out, Country{name, v.Remediation.Name(), originOf(v.Origin, v.Scenario), g.clock.shown(v.Until)})
			}
		}
	}
	return out
}

// Why is the whole answer to why requests of a visitor are treated as they are.
type Why struct {
	Address netip.Addr `json:"address"`
	// Country is the one that was asked about, empty for none.
	Country string `json:"country,omitempty"`
	// Verdict is allow, throttle, captcha or ban, and Says the same as a
	// sentence.
	Verdict   string   `json:"verdict"`
	Says      string   `json:"says"`
	Decisions []Holder `json:"decisions"`
}

// Holder is a live decision that holds the address, or its country.
type Holder struct {
	ID          int          `json:"id"`
	Prefix      netip.Prefix `json:"prefix"`            // zero for a country
	Country     string       `json:"country,omitempty"` // that is decided on
	Remediation string       `json:"remediation"`
	Type        string       `json:"type"`
	Origin      string       `json:"origin"`
	Scenario    string       `json:"scenario"`
	Until       time.Time    `json:"until"`
	Enforced    bool         `json:"enforced"`
	// Because says why it is not enforced here.
	Because string `json:"because,omitempty"`
}

// Why tells what applies to an address in a country. Only the edge can tell which
// country that is; where it is empty, the answer names those that are decided on.
func (g *Gate) Why(addr netip.Addr, country string) Why {
	addr = addr.Unmap().WithZone("")
	country = strings.ToUpper(country)
	c := g.setup.Load().config
	s := g.feed.seen.Load()
	now := g.clock.now()
	policy := c.policy()
	verdict := s.lookup(addr, country, now)
	w := Why{Address: addr, Country: country, Verdict: verdict.Remediation.Name(), Decisions: []Holder{}}
	every := decision.NewView(s.table, decision.Policy{Fallback: policy.Fallback})
	allowed := decision.Contains(policy.Allow, addr.AsSlice())
	holders := every.Holders(s.table, addr, now)
	for _, v := range s.countries[country] {
		if v.Until.After(now) {
			holders = append(holders, v)
		}
	}
	for _, v := range holders {
		class := decision.Class{Type: v.Type, Origin: v.Origin, Scenario: v.Scenario, Remediation: v.Remediation}
		h := Holder{
			ID: v.ID, Prefix: v.Prefix, Remediation: v.Remediation.Name(), Type: v.Type, Origin: originOf(v.Origin, v.Scenario),
			Scenario: v.Scenario, Until: g.clock.shown(v.Until), Enforced: true,
		}
		if !v.Prefix.IsValid() {
			h.Country = country
		}
		switch {
		case allowed:
			h.Enforced, h.Because = false, "the address is in decisions.allow"
		case !policy.Accept(class):
			h.Enforced, h.Because = false, "left out by configuration"
		case c.Mode == Observe:
			h.Enforced, h.Because = false, "counted, and not enforced: the mode is observe"
		}
		w.Decisions = append(w.Decisions, h)
	}
	switch {
	case !c.hasLAPI:
		w.Says = "there is no lapi in the configuration: nobody is refused"
	case s.pulled.IsZero():
		w.Says = "nothing is known yet, LAPI has not answered: hosts that fail closed refuse it"
	case verdict.Remediation == decision.Allow && len(w.Decisions) == 0:
		w.Says = "no decision holds it"
	case verdict.Remediation == decision.Allow:
		w.Says = "decisions hold it, and none of them is enforced here"
	default:
		w.Says = fmt.Sprintf("its requests are answered %d", c.Ban.Status)
		if verdict.Remediation == decision.Throttle {
			w.Says = "30 of its requests a minute pass, and more are answered 429"
		}
		if c.Mode == Observe {
			w.Says = "its requests are counted and pass, because the mode is observe,"
		}
		w.Says += " until " + g.clock.shown(verdict.Until).Format(time.DateTime)
	}
	if !c.hasLAPI || allowed || verdict.Remediation == decision.Ban {
		return w
	}
	refused := "are refused"
	if c.Mode == Observe {
		refused = "would be refused"
	}
	if !s.pulled.IsZero() && s.stale(now, c.Decisions.MaxAge) && slices.ContainsFunc(c.Hosts, func(h HostConfig) bool { return h.Fail == "closed" && h.Exposure == Public }) {
		w.Says += fmt.Sprintf("; but the last pull is older than decisions.maxAge, so that requests for hosts that fail closed %s with 503", refused)
	}
	if names := slices.Compact(names(g.countries())); country == "" && len(names) > 0 {
		w.Says += fmt.Sprintf("; there are decisions on visitors from %s: name the country of this one with --country", strings.Join(names, ", "))
	}
	return w
}

func names(countries []Country) []string {
	var out []string
	for _, c := range countries {
		out = append(out, c.Country)
	}
	return out
}

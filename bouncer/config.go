package bouncer

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/edgeward/edgeward/internal/config"
	"github.com/edgeward/edgeward/internal/crowdsec"
	"github.com/edgeward/edgeward/internal/decision"
	"github.com/edgeward/edgeward/internal/nft"
)

// Config is bouncer.yaml. Load returns one that has been checked.
type Config struct {
	// LAPI may be left out where there are lists.
	LAPI  crowdsec.Config `yaml:"lapi"`
	Lists []ListConfig    `yaml:"lists"`
	// Mode is enforce, or observe: count what would be dropped, drop nothing.
	Mode      Mode            `yaml:"mode"`
	Decisions DecisionsConfig `yaml:"decisions"`
	Protect   ProtectConfig   `yaml:"protect"`
	Firewall  FirewallConfig  `yaml:"firewall"`
	Auth      AuthConfig      `yaml:"auth"`
	// Listen is where /metrics, /healthz, /readyz and /v1/status are served.
	Listen netip.AddrPort `yaml:"listen"`
	// Socket is where the command line asks the agent; empty for nowhere.
	Socket string `yaml:"socket"`
	// StateDir keeps the snapshot of the decisions; empty keeps none.
	StateDir string `yaml:"stateDir"`
	// LogFormat is json or text.
	LogFormat LogFormat `yaml:"logFormat"`
}

// DecisionsConfig says which decisions the kernel enforces; the others are left
// to the upper layers.
type DecisionsConfig struct {
	Remediations []Remediation `yaml:"remediations"`
	// Origins, if any, are the only ones that count; ExceptOrigins never do.
	// lists means lists:NAME as well.
	Origins       []string `yaml:"origins"`
	ExceptOrigins []string `yaml:"exceptOrigins"`
	// Scenarios, if any, are pieces of text of which a decision's scenario
	// must hold one; it must hold none of ExceptScenarios.
	Scenarios       []string `yaml:"scenarios"`
	ExceptScenarios []string `yaml:"exceptScenarios"`
	// Fallback is what a decision of unknown type means.
	Fallback Fallback `yaml:"fallback"`
}

// ProtectConfig says what no decision may stop, beside what the node finds out
// by itself: its own addresses, gateway, DNS servers and VPNs, LAPI, the API
// server, and the servers of k3s where it sees their addresses.
type ProtectConfig struct {
	// Addresses are the operator's.
	Addresses []netip.Prefix `yaml:"addresses"`
	// Cluster holds the ranges of pods and services.
	Cluster []netip.Prefix `yaml:"cluster"`
	// Cloudflare protects the ranges that Cloudflare publishes.
	Cloudflare bool `yaml:"cloudflare"`
	// Private keeps decisions that others made (CAPI and blocklists) off
	// private ranges; those made here count there too.
	Private bool `yaml:"private"`
}

// FirewallConfig shapes the ruleset.
type FirewallConfig struct {
	Points []Point `yaml:"points"`
	Action Action  `yaml:"action"`
	// Replies are packets of a banned address that answer this machine or one
	// behind it: keep them, so that connections to it work, or drop them.
	Replies     Replies `yaml:"replies"`
	SYNPriority int32   `yaml:"synPriority"`
	Priority    int32   `yaml:"priority"`
	// Exempt names the interfaces whose packets are never stopped; a
	// trailing * stands for any ending.
	Exempt []string     `yaml:"exempt"`
	Log    LogConfig    `yaml:"log"`
	Locks  []LockConfig `yaml:"locks"`
	// Shared leaves the table open to other programs: foreign changes then
	// are found and repaired, instead of refused by the kernel.
	Shared bool `yaml:"shared"`
}

// LogConfig writes dropped packets to the kernel log, so many a second for each
// origin.
type LogConfig struct {
	Enabled   bool   `yaml:"enabled"`
	PerSecond uint32 `yaml:"perSecond"`
	Burst     uint32 `yaml:"burst"`
	Group     uint16 `yaml:"group"`
}

// LockConfig closes ports to all but some sources.
type LockConfig struct {
	Name  string         `yaml:"name"`
	Ports []config.Port  `yaml:"ports"`
	From  []Source       `yaml:"from"`
	To    []netip.Prefix `yaml:"to"`
}

// Mode is enforce or observe.
type Mode string

// The modes.
const (
	Enforce Mode = "enforce"
	Observe Mode = "observe"
)

// UnmarshalText reads a mode.
func (m *Mode) UnmarshalText(text []byte) error { return choose(m, text, Enforce, Observe) }

// Remediation is the word for one.
type Remediation string

// UnmarshalText reads a remediation.
func (r *Remediation) UnmarshalText(text []byte) error {
	return choose(r, text, "ban", "captcha", "throttle")
}

// Fallback is ban, captcha or ignore.
type Fallback string

// UnmarshalText reads a fallback.
func (f *Fallback) UnmarshalText(text []byte) error {
	return choose(f, text, "ban", "captcha", "ignore")
}

// Point is prerouting, input or forward.
type Point string

// UnmarshalText reads a point.
func (p *Point) UnmarshalText(text []byte) error {
	return choose(p, text, "prerouting", "input", "forward")
}

// Action is drop or reject.
type Action string

// UnmarshalText reads an action.
func (a *Action) UnmarshalText(text []byte) error { return choose(a, text, "drop", "reject") }

// Replies is keep or drop.
type Replies string

// UnmarshalText reads what happens to replies.
func (r *Replies) UnmarshalText(text []byte) error { return choose(r, text, "keep", "drop") }

// LogFormat is json or text.
type LogFormat string

// UnmarshalText reads a format.
func (f *LogFormat) UnmarshalText(text []byte) error { return choose(f, text, "json", "text") }

// Source is an address, a range, or a word that stands for several.
type Source struct {
	Text     string
	Prefixes []netip.Prefix
}

// UnmarshalText reads a source.
func (s *Source) UnmarshalText(text []byte) error {
	s.Text = string(text)
	if known, ok := decision.Known(s.Text); ok {
		s.Prefixes = known
		return nil
	}
	p, err := decision.ParsePrefix(s.Text)
	if err != nil {
		return fmt.Errorf("%q: want an address, a range, or cloudflare or private", s.Text)
	}
	s.Prefixes = []netip.Prefix{p}
	return nil
}

// MarshalText is what was read.
func (s Source) MarshalText() ([]byte, error) { return []byte(s.Text), nil }

func choose[T ~string](to *T, text []byte, words ...T) error {
	if slices.Contains(words, T(text)) {
		*to = T(text)
		return nil
	}
	var list []string
	for _, w := range words {
		list = append(list, string(w))
	}
	last := len(list) - 1
	return fmt.Errorf("%q: want %s or %s", text, strings.Join(list[:last], ", "), list[last])
}

// Defaults is the Config that a file changes. The ranges of pods and services
// are those of k3s.
func Defaults() Config {
	return Config{
		LAPI:      crowdsec.Defaults(),
		Mode:      Enforce,
		Decisions: DecisionsConfig{Remediations: []Remediation{"ban"}, Fallback: "ban"},
		Protect: ProtectConfig{
			Cluster:    []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("10.43.0.0/16")},
			Cloudflare: true,
			Private:    true,
		},
		Firewall: FirewallConfig{
			Points:  []Point{"prerouting"},
			Action:  "drop",
			Replies: "keep",
			Exempt: []string{"lo", "cni*", "flannel*", "cali*", "cilium*", "lxc*", "veth*",
				"docker*", "br-*", "podman*", "virbr*", "edgeward0"},
			Log: LogConfig{PerSecond: 1, Burst: 5},
		},
		Listen:    netip.MustParseAddrPort("127.0.0.1:9477"),
		Socket:    "/run/edgeward/bouncer.sock",
		StateDir:  "/var/lib/edgeward",
		Auth:      AuthConfig{Remediations: []Remediation{"ban", "captcha"}},
		LogFormat: "json",
	}
}

// Load reads the file at path.
func Load(path string) (Config, error) {
	return config.Load(path, Defaults(), (*Config).check)
}

// Parse reads text, the content of the file called name.
func Parse(name string, text []byte) (Config, error) {
	return config.Parse(name, text, Defaults(), (*Config).check)
}

// check reports what does not fit together.
func (c *Config) check(check *config.Check) {
	c.checkLists(check)
	if check.Has("lapi") || len(c.Lists) == 0 {
		c.LAPI.Check(check, "lapi")
	}
	if len(c.Decisions.Remediations) == 0 {
		check.Fail("decisions.remediations", "is empty: nothing would be enforced; leave it out to enforce bans")
	}
	for i, p := range c.Protect.Addresses {
		if p.Bits() == 0 {
			check.Fail(fmt.Sprintf("protect.addresses[%d]", i), "protects everybody: nothing would be enforced; use mode: observe for that")
		}
	}
	if !c.Listen.IsValid() || c.Listen.Port() == 0 {
		check.Fail("listen", "want an address and a port such as 127.0.0.1:9477")
	}
	c.Auth.check(check)
	for key, path := range map[string]string{"socket": c.Socket, "stateDir": c.StateDir} {
		if path != "" && !filepath.IsAbs(path) {
			check.Fail(key, "%q: want an absolute path", path)
		}
	}
	// What is left to say is about the firewall: one word for it is enough.
	if err := c.nft().Validate(); err != nil {
		check.Fail("firewall", "%v", err)
	}
}

// nft is the ruleset that c asks for.
func (c *Config) nft() nft.Config {
	f := c.Firewall
	points := map[Point]nft.Point{"prerouting": nft.Prerouting, "input": nft.Input, "forward": nft.Forward}
	out := nft.Config{
		SYNPriority: f.SYNPriority,
		Priority:    f.Priority,
		DropReplies: f.Replies == "drop",
		Observe:     c.Mode == Observe,
		Exempt:      f.Exempt,
	}
	for _, p := range f.Points {
		out.Points = append(out.Points, points[p])
	}
	if f.Action == "reject" {
		out.Action = nft.Reject
	}
	if f.Log.Enabled {
		out.Log = &nft.Log{PerSecond: f.Log.PerSecond, Burst: f.Log.Burst, Group: f.Log.Group}
	}
	for _, l := range f.Locks {
		lock := nft.Lock{Name: l.Name, To: l.To}
		for _, p := range l.Ports {
			lock.Ports = append(lock.Ports, uint16(p))
		}
		for _, s := range l.From {
			lock.From = append(lock.From, s.Prefixes...)
		}
		out.Locks = append(out.Locks, lock)
	}
	return out
}

// ModeOf returns the mode that makes c the ruleset of a layout that the kernel
// has, or nothing where neither does.
func (c *Config) ModeOf(layout string) Mode {
	for _, mode := range []Mode{Enforce, Observe} {
		is := *c
		is.Mode = mode
		if is.nft().Layout() == layout {
			return mode
		}
	}
	return ""
}

// enforced reports whether decisions of a class are for the kernel, and if not,
// why.
func (c *Config) enforced(class decision.Class) (bool, string) {
	return c.counts(class, c.Decisions.Remediations)
}

// counts reports whether decisions of a class count where these remediations do.
func (c *Config) counts(class decision.Class, remediations []Remediation) (bool, string) {
	d := c.Decisions
	means := class.Remediation
	if means == decision.Unknown {
		means, _ = decision.ParseFallback(string(d.Fallback))
	}
	switch {
	case !slices.Contains(remediations, Remediation(means.Name())):
		return false, "left to the upper layers: " + means.Name()
	case len(d.Origins) > 0 && !originIn(class.Origin, d.Origins), originIn(class.Origin, d.ExceptOrigins):
		return false, "its origin is left out by configuration"
	case len(d.Scenarios) > 0 && !holdsOne(class.Scenario, d.Scenarios), holdsOne(class.Scenario, d.ExceptScenarios):
		return false, "its scenario is left out by configuration"
	}
	return true, ""
}

// policy is how the kernel reads tables; local leaves out what others decided.
func (c *Config) policy(local bool) decision.Policy {
	return c.policyFor(c.Decisions.Remediations, local)
}

// policyFor is how tables are read where these remediations count.
func (c *Config) policyFor(remediations []Remediation, local bool) decision.Policy {
	fallback, _ := decision.ParseFallback(string(c.Decisions.Fallback)) // one of the words
	return decision.Policy{
		Fallback: fallback,
		Accept: func(class decision.Class) bool {
			ok, _ := c.counts(class, remediations)
			return ok && !(local && foreign(class.Origin))
		},
	}
}

// foreign reports whether decisions of an origin were made elsewhere and for
// everybody: by CrowdSec's community, or on a blocklist.
func foreign(origin string) bool { return originIn(origin, []string{"CAPI", "lists"}) }

func originIn(origin string, list []string) bool {
	for _, o := range list {
		if strings.EqualFold(origin, o) || len(origin) > len(o) && origin[len(o)] == ':' && strings.EqualFold(origin[:len(o)], o) {
			return true
		}
	}
	return false
}

func holdsOne(text string, pieces []string) bool {
	return slices.ContainsFunc(pieces, func(p string) bool { return strings.Contains(text, p) })
}

// originOf names the origin of a class as CrowdSec's console does: a blocklist
// has its name in the scenario.
func originOf(c decision.Class) string {
	if strings.EqualFold(c.Origin, "lists") && c.Scenario != "" {
		return "lists:" + c.Scenario
	}
	return c.Origin
}

// patience is how long a predecessor's bans are left alone after a start, so
// that LAPI can answer: what it enforces is newer than our snapshot.
const patience = 15 * time.Second

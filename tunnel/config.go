package tunnel

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/edgeward/edgeward/internal/config"
	"github.com/edgeward/edgeward/internal/crowdsec"
	"github.com/edgeward/edgeward/internal/decision"
	"github.com/edgeward/edgeward/tunnel/wireguard"
)

// Config is tunnel.yaml. Load returns one that has been checked. It is for the
// role cloudflare (tunnels, hosts and what goes with them), for the role
// wireguard (wireguard, peers, services, grants), or for both.
type Config struct {
	// LAPI says where decisions come from. Without the section there are none,
	// and the gate only routes.
	LAPI crowdsec.Config `yaml:"lapi"`
	// Mode is enforce, or observe: log and count what would be refused, refuse
	// nothing.
	Mode      Mode            `yaml:"mode"`
	Decisions DecisionsConfig `yaml:"decisions"`
	Ban       BanConfig       `yaml:"ban"`
	Tunnels   []TunnelConfig  `yaml:"tunnels"`
	Hosts     []HostConfig    `yaml:"hosts"`
	// InternalHosts are never public, whatever else says so: *.home.example.com
	// stands for all below home.example.com.
	InternalHosts []Host           `yaml:"internalHosts"`
	Identity      IdentityConfig   `yaml:"identity"`
	Cloudflare    CloudflareConfig `yaml:"cloudflare"`
	Edge          EdgeConfig       `yaml:"edge"`
	Drain         DrainConfig      `yaml:"drain"`
	// WireGuard is the VPN's gateway; Peers may reach those of Services that
	// Grants name.
	WireGuard wireguard.Settings  `yaml:"wireguard"`
	Peers     []wireguard.Peer    `yaml:"peers"`
	Services  []wireguard.Service `yaml:"services"`
	Grants    []wireguard.Grant   `yaml:"grants"`
	// Listen is where /metrics, /healthz, /readyz and /v1/status are served.
	Listen netip.AddrPort `yaml:"listen"`
	// Socket is where the command line asks the program; empty for nowhere.
	Socket string `yaml:"socket"`
	// StateDir keeps what is worth knowing at the next start, such as the
	// protocol that last worked; empty keeps nothing.
	StateDir string `yaml:"stateDir"`
	// LogFormat is json or text.
	LogFormat LogFormat `yaml:"logFormat"`

	hasLAPI    bool `yaml:"-"`
	hasTunnels bool `yaml:"-"`
	hasVPN     bool `yaml:"-"`
}

// DecisionsConfig says which decisions count in the tunnel and what they mean.
type DecisionsConfig struct {
	// Allow lists addresses and ranges that no decision touches.
	Allow []netip.Prefix `yaml:"allow"`
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
	// Captcha is what a captcha decision means here, where there is none to
	// solve: ban, or ignore, which leaves it to the plugin.
	Captcha Captcha `yaml:"captcha"`
	// MaxAge is how old the last good pull may be before hosts that fail closed
	// count nothing as known.
	MaxAge time.Duration `yaml:"maxAge"`
}

// BanConfig shapes the refusal of banned visitors.
type BanConfig struct {
	// Status is the HTTP status, 400 to 599.
	Status int `yaml:"status"`
	// PageFile is an html/template for browsers, with .Status, .Reason, .Address
	// and .Decision.
	PageFile config.File `yaml:"pageFile"`
}

// TunnelConfig names a tunnel and its credentials: a token or a credentials
// file; with neither, the tunnel is made or adopted by its name through the API.
type TunnelConfig struct {
	Name            string      `yaml:"name"`
	TokenFile       config.File `yaml:"tokenFile"`
	CredentialsFile config.File `yaml:"credentialsFile"`
	// Protocol is auto, http2 or quic.
	Protocol Protocol `yaml:"protocol"`
	// Connections is how many connections to the edge are held, 1 to 8.
	Connections int `yaml:"connections"`
}

// HostConfig says where requests to one host, or one path of it, go.
type HostConfig struct {
	Host Host `yaml:"host"`
	// Path is a prefix in whole segments; empty for all paths. It chooses a
	// service, and is no way to keep anybody out.
	Path string `yaml:"path"`
	// Tunnel names one of the tunnels; it may be left out where there is one.
	Tunnel  string       `yaml:"tunnel"`
	Service Service      `yaml:"service"`
	Origin  OriginConfig `yaml:"origin"`
	// Fail says what happens while nothing is known of decisions: open lets
	// visitors pass, closed answers 503.
	Fail Fail `yaml:"fail"`
	// Exposure is public, or internal: known here, and never reachable through
	// a tunnel.
	Exposure Exposure `yaml:"exposure"`
}

// OriginConfig shapes the connections to an origin service.
type OriginConfig struct {
	// HostHeader replaces the host that the origin service sees.
	HostHeader Host `yaml:"hostHeader"`
	// ServerName is the name to verify in the service's certificate, where it is
	// not the service's host.
	ServerName string `yaml:"serverName"`
	// CAFile, if given, is the only authority that is trusted.
	CAFile config.File `yaml:"caFile"`
	// InsecureSkipVerify takes any certificate: whoever sits between can read
	// and change everything.
	InsecureSkipVerify bool `yaml:"insecureSkipVerify"`
	// ConnectTimeout bounds the making of a connection with its handshake.
	ConnectTimeout time.Duration `yaml:"connectTimeout"`
	// ResponseTimeout bounds the wait for the head of a response; 0 is for ever.
	ResponseTimeout time.Duration `yaml:"responseTimeout"`
	// HTTP2 speaks HTTP/2 to the service: over TLS where the service offers it,
	// in clear text by prior knowledge.
	HTTP2 bool `yaml:"http2"`
	// GRPC is HTTP2, and has the tunnel speak a protocol that carries trailers:
	// over QUIC cloudflared drops them.
	GRPC bool `yaml:"grpc"`
	// Connections bounds the idle connections that are kept.
	Connections int `yaml:"idleConnections"`
}

// IdentityConfig names the keys that sign the identity header; each file holds
// one text of 32 characters or more.
type IdentityConfig struct {
	KeyFile config.File `yaml:"keyFile"`
	// PreviousKeyFile signs beside KeyFile while keys rotate, so that the order
	// in which the plugin and the tunnel learn the new one does not matter.
	PreviousKeyFile config.File `yaml:"previousKeyFile"`
}

// CloudflareConfig is for what is done through Cloudflare's API. Without the
// section nothing is: tunnels and DNS records are then made by hand.
type CloudflareConfig struct {
	// Account is the account id, 32 hexadecimal digits.
	Account string `yaml:"account"`
	// Owner tells this installation's records from those of another.
	Owner  string `yaml:"owner"`
	Policy Policy `yaml:"policy"`
	// TunnelTokenFile holds an API token that may edit tunnels.
	TunnelTokenFile config.File `yaml:"tunnelTokenFile"`
	// Zones are the DNS zones that records may be written in, each with an API
	// token that may edit its records.
	Zones []ZoneConfig `yaml:"zones"`
	// Adopt names hosts whose record is there already, made by hand: it is taken
	// over and kept from now on.
	Adopt []Host `yaml:"adopt"`
	// Relinquish names hosts that are let go: the record stays as it is, and is
	// nobody's of ours any more.
	Relinquish []Host `yaml:"relinquish"`
	// Interval is the time between looks at what Cloudflare has.
	Interval time.Duration `yaml:"interval"`
	// URL is the API's base address.
	URL string `yaml:"url"`
}

// ZoneConfig is a DNS zone.
type ZoneConfig struct {
	Name      Host        `yaml:"name"`
	TokenFile config.File `yaml:"tokenFile"`
}

// EdgeConfig says where Cloudflare's edge is; empty, it is found by DNS.
type EdgeConfig struct {
	// Addresses are HOST:PORT.
	Addresses []string `yaml:"addresses"`
	// CAFile is an authority to trust beside the system's and Cloudflare's.
	CAFile config.File `yaml:"caFile"`
	// Region is us, or empty for all.
	Region string `yaml:"region"`
}

// DrainConfig shapes how connections are let go.
type DrainConfig struct {
	// LameDuck is how long requests are still served after the edge was told
	// that no more should come: it hears that with some delay.
	LameDuck time.Duration `yaml:"lameDuck"`
	// Grace bounds the wait for requests under way after that.
	Grace time.Duration `yaml:"grace"`
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

// Fallback is ban, captcha or ignore.
type Fallback string

// UnmarshalText reads a fallback.
func (f *Fallback) UnmarshalText(text []byte) error {
	return choose(f, text, "ban", "captcha", "ignore")
}

// Captcha is ban or ignore.
type Captcha string

// UnmarshalText reads what a captcha means.
func (c *Captcha) UnmarshalText(text []byte) error { return choose(c, text, "ban", "ignore") }

// Protocol is auto, http2 or quic.
type Protocol string

// The protocols.
const (
	Auto  Protocol = "auto"
	HTTP2 Protocol = "http2"
	QUIC  Protocol = "quic"
)

// UnmarshalText reads a protocol.
func (p *Protocol) UnmarshalText(text []byte) error { return choose(p, text, Auto, HTTP2, QUIC) }

// Fail is open or closed.
type Fail string

// UnmarshalText reads how to fail.
func (f *Fail) UnmarshalText(text []byte) error { return choose(f, text, "open", "closed") }

// Exposure is public or internal.
type Exposure string

// The exposures.
const (
	Public   Exposure = "public"
	Internal Exposure = "internal"
)

// UnmarshalText reads an exposure.
func (e *Exposure) UnmarshalText(text []byte) error { return choose(e, text, Public, Internal) }

// Policy is upsert-only, sync or dry-run.
type Policy string

// The policies: UpsertOnly never deletes, DryRun writes nothing.
const (
	UpsertOnly Policy = "upsert-only"
	Sync       Policy = "sync"
	DryRun     Policy = "dry-run"
)

// UnmarshalText reads a policy.
func (p *Policy) UnmarshalText(text []byte) error { return choose(p, text, UpsertOnly, Sync, DryRun) }

// LogFormat is json or text.
type LogFormat string

// UnmarshalText reads a format.
func (f *LogFormat) UnmarshalText(text []byte) error { return choose(f, text, "json", "text") }

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

// Host is a host name in small letters, or *.DOMAIN for all names below a domain.
type Host string

// UnmarshalText reads a host.
func (h *Host) UnmarshalText(text []byte) error {
	name := strings.ToLower(strings.TrimSuffix(string(text), "."))
	if !config.IsHost(strings.TrimPrefix(name, "*.")) {
		return fmt.Errorf("%q: want a host name such as app.example.com, or *.example.com, without scheme, port and path", text)
	}
	*h = Host(name)
	return nil
}

// Wildcard reports whether h stands for all names below a domain, and returns
// .DOMAIN if it does.
func (h Host) Wildcard() (suffix string, ok bool) {
	if strings.HasPrefix(string(h), "*.") {
		return string(h[1:]), true
	}
	return "", false
}

// Covers reports whether all that other stands for is h, or below it.
func (h Host) Covers(other Host) bool {
	suffix, ok := h.Wildcard()
	return h == other || ok && strings.HasSuffix(string(other), suffix)
}

// Service is where an origin service listens.
type Service struct {
	Scheme string // http or https
	Host   string // with its port, where one was given
}

var errService = errors.New("want http://HOST:PORT or https://HOST:PORT")

// UnmarshalText reads a service.
func (s *Service) UnmarshalText(text []byte) error {
	u, err := url.Parse(string(text))
	switch {
	case err != nil || u.User != nil:
		return errService // without the text, which may hold a password
	case u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "":
		return fmt.Errorf("%q: %w", text, errService)
	case u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "":
		return fmt.Errorf("%q: %w, without a path: requests keep theirs", text, errService)
	}
	if port := u.Port(); port != "" {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return fmt.Errorf("%q: %w", text, errService)
		}
	}
	*s = Service{Scheme: u.Scheme, Host: strings.ToLower(u.Host)}
	return nil
}

// String is the service as a URL.
func (s Service) String() string {
	if s == (Service{}) {
		return ""
	}
	return s.Scheme + "://" + s.Host
}

// MarshalText is the service as a URL.
func (s Service) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// APIURL is Cloudflare's.
const APIURL = "https://api.cloudflare.com/client/v4"

// Defaults is the Config that a file changes.
func Defaults() Config {
	return Config{
		LAPI:       crowdsec.Defaults(),
		Mode:       Enforce,
		Decisions:  DecisionsConfig{Fallback: "ban", Captcha: "ban", MaxAge: 10 * time.Minute},
		Ban:        BanConfig{Status: 403},
		Cloudflare: CloudflareConfig{Policy: UpsertOnly, Interval: 10 * time.Minute, URL: APIURL},
		Drain:      DrainConfig{LameDuck: 4 * time.Second, Grace: 20 * time.Second},
		WireGuard:  wireguard.Defaults(),
		Listen:     netip.MustParseAddrPort("127.0.0.1:9478"),
		Socket:     "/run/edgeward/tunnel.sock",
		LogFormat:  "json",
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

// check reports what does not fit together, and fills in what may be left out.
func (c *Config) check(check *config.Check) {
	if c.hasLAPI = check.Has("lapi"); c.hasLAPI {
		c.LAPI.Check(check, "lapi")
	}
	c.checkDecisions(check)
	c.checkVPN(check)
	// A file for the VPN alone needs no tunnel.
	if c.hasTunnels = !c.HasVPN() || slices.ContainsFunc([]string{"tunnels", "hosts", "cloudflare", "identity", "edge"}, check.Has); c.hasTunnels {
		c.checkHosts(check, c.checkTunnels(check))
	}
	if c.Identity.PreviousKeyFile != "" && c.Identity.KeyFile == "" {
		check.Fail("identity.previousKeyFile", "needs a keyFile beside it")
	}
	c.checkCloudflare(check)
	for i, a := range c.Edge.Addresses {
		if _, port, err := net.SplitHostPort(a); err != nil || port == "" || port == "0" {
			check.Fail(fmt.Sprintf("edge.addresses[%d]", i), "%q: want HOST:PORT", a)
		}
	}
	if c.Edge.Region != "" && c.Edge.Region != "us" {
		check.Fail("edge.region", "%q: want us, or nothing for all regions", c.Edge.Region)
	}
	within(check, "drain.lameDuck", c.Drain.LameDuck, 100*time.Millisecond, time.Minute)
	within(check, "drain.grace", c.Drain.Grace, 100*time.Millisecond, 10*time.Minute)
	if !c.Listen.IsValid() || c.Listen.Port() == 0 {
		check.Fail("listen", "want an address and a port such as 127.0.0.1:9478")
	}
	for _, p := range []struct{ key, path string }{{"socket", c.Socket}, {"stateDir", c.StateDir}} {
		if p.path != "" && !filepath.IsAbs(p.path) {
			check.Fail(p.key, "%q: want an absolute path", p.path)
		}
	}
}

func (c *Config) checkVPN(check *config.Check) {
	if c.hasVPN = check.Has("wireguard"); c.hasVPN {
		vpn := c.VPN()
		vpn.Check(check)
		c.WireGuard, c.Peers, c.Services, c.Grants = vpn.Settings, vpn.Peers, vpn.Services, vpn.Grants
		return
	}
	for _, key := range []string{"peers", "services", "grants"} {
		if check.Has(key) {
			c.hasVPN = true
			check.Fail(key, "is of no use without the section wireguard: give the gateway its addresses there")
			return
		}
	}
}

func (c *Config) checkDecisions(check *config.Check) {
	if check.Has("decisions") && !c.hasLAPI {
		check.Fail("decisions", "is of no use without lapi: say where decisions come from")
	}
	for i, p := range c.Decisions.Allow {
		if p.Bits() == 0 {
			check.Fail(fmt.Sprintf("decisions.allow[%d]", i), "allows everybody: nothing would be enforced; use mode: observe for that")
		}
	}
	for _, list := range []struct {
		key   string
		words []string
	}{
		{"origins", c.Decisions.Origins}, {"exceptOrigins", c.Decisions.ExceptOrigins},
		{"scenarios", c.Decisions.Scenarios}, {"exceptScenarios", c.Decisions.ExceptScenarios},
	} {
		if slices.Contains(list.words, "") {
			check.Fail("decisions."+list.key, "has an empty entry, which would match everything: take it out")
		}
	}
	within(check, "decisions.maxAge", c.Decisions.MaxAge, 2*c.LAPI.Interval, 365*24*time.Hour)
	if c.Ban.Status < 400 || c.Ban.Status > 599 {
		check.Fail("ban.status", "%d: want 400 to 599", c.Ban.Status)
	}
}

func (c *Config) checkTunnels(check *config.Check) (names []string) {
	if len(c.Tunnels) == 0 {
		check.Fail("tunnels", "is missing: name a tunnel and the file that holds its token, or, to be a VPN's gateway alone, give the section wireguard")
	}
	c.Tunnels = slices.Clone(c.Tunnels)
	for i := range c.Tunnels {
		t := &c.Tunnels[i]
		at := fmt.Sprintf("tunnels[%d].", i)
		switch {
		case t.Name == "":
			check.Fail(at+"name", "is missing")
		case len(t.Name) > 100 || strings.ContainsFunc(t.Name, func(r rune) bool { return r < ' ' || r == 0x7f }):
			check.Fail(at+"name", "want at most 100 characters in one line")
		case slices.Contains(names, t.Name):
			check.Fail(at+"name", "%q is taken by another tunnel", t.Name)
		}
		names = append(names, t.Name)
		switch {
		case t.TokenFile != "" && t.CredentialsFile != "":
			check.Fail(at+"credentialsFile", "excludes tokenFile: keep one of them")
		case t.TokenFile == "" && t.CredentialsFile == "" && c.Cloudflare.TunnelTokenFile == "":
			check.Fail(at+"tokenFile", "is missing: name the file that holds the tunnel's token, or give cloudflare.tunnelTokenFile to have the tunnel made")
		}
		if t.Protocol == "" {
			t.Protocol = Auto
		}
		if !check.Has(at + "connections") {
			t.Connections = 4
		}
		if t.Connections < 1 || t.Connections > 8 {
			check.Fail(at+"connections", "%d: want 1 to 8", t.Connections)
		}
	}
	return names
}

func (c *Config) checkHosts(check *config.Check, tunnels []string) {
	type place struct {
		host Host
		path string
	}
	taken := map[place]string{} // keys
	first := map[Host]*HostConfig{}
	firstAt := map[Host]string{}
	internalAt := func(internal Host) (line int) {
		for i, h := range c.InternalHosts {
			if h == internal {
				return check.Line(fmt.Sprintf("internalHosts[%d]", i))
			}
		}
		i := slices.IndexFunc(c.Hosts, func(h HostConfig) bool { return h.Exposure == Internal && h.Host == internal })
		return check.Line(fmt.Sprintf("hosts[%d].host", i))
	}
	c.Hosts = slices.Clone(c.Hosts)
	for i := range c.Hosts {
		h := &c.Hosts[i]
		at := fmt.Sprintf("hosts[%d].", i)
		if h.Host == "" {
			check.Fail(at+"host", "is missing")
		}
		if h.Exposure == "" {
			h.Exposure = Public
		}
		if h.Fail == "" {
			h.Fail = "open"
		}
		switch {
		case h.Tunnel == "" && len(tunnels) == 1:
			h.Tunnel = tunnels[0]
		case len(tunnels) == 0: // which has been said
		case h.Tunnel == "" && h.Exposure == Public:
			check.Fail(at+"tunnel", "is missing: there are several (%s)", strings.Join(tunnels, ", "))
		case h.Tunnel != "" && !slices.Contains(tunnels, h.Tunnel):
			check.Fail(at+"tunnel", "%q is none of the tunnels (%s)", h.Tunnel, strings.Join(tunnels, ", "))
		}
		if h.Path == "/" {
			h.Path = ""
		}
		if h.Path != "" && (h.Path[0] != '/' || strings.ContainsAny(h.Path, "?#*%\\ ") || cleaned(h.Path) != strings.TrimSuffix(h.Path, "/")) {
			check.Fail(at+"path", "%q: want a plain prefix such as /api", h.Path)
		}
		h.Path = strings.TrimSuffix(h.Path, "/")
		other := first[h.Host]
		switch where := taken[place{h.Host, h.Path}]; {
		case other == nil:
			first[h.Host], firstAt[h.Host] = h, at+"host"
		case h.Host == "":
		case other.Exposure != h.Exposure:
			check.Fail(at+"exposure", "%s is %s on line %d: one host is public or internal, whatever the path", h.Host, other.Exposure, check.Line(firstAt[h.Host]))
		case where != "":
			check.Fail(at+"host", "%s%s is there already, on line %d", h.Host, h.Path, check.Line(where))
		case other.Tunnel != h.Tunnel:
			check.Fail(at+"tunnel", "%s is in tunnel %s on line %d: one host has one DNS record, and so one tunnel", h.Host, other.Tunnel, check.Line(firstAt[h.Host]))
		}
		taken[place{h.Host, h.Path}] = at + "host"
		if h.Service == (Service{}) {
			check.Fail(at+"service", "is missing: %v", errService)
		}
		h.Origin.check(check, at+"origin.", h.Service)
		if h.Origin.GRPC && c.protocolOf(h.Tunnel) == QUIC {
			check.Fail(at+"origin.grpc", "needs trailers, which quic drops: give tunnel %s protocol auto or http2", h.Tunnel)
		}
		if h.Fail == "closed" && !c.hasLAPI {
			check.Fail(at+"fail", "closed would refuse everybody: there is no lapi to know decisions from")
		}
		if h.Exposure == Public {
			for _, internal := range c.internal() {
				if h.Origin.HostHeader != "" && internal.Covers(h.Origin.HostHeader) {
					check.Fail(at+"origin.hostHeader", "%s is internal (%s), and a public host would show it: name another host, or take it out of the internal ones", h.Origin.HostHeader, internal)
				}
				if internal.Covers(h.Host) {
					check.Fail(at+"host", "%s is internal (%s, line %d) and cannot be public: take it out of one of the lists", h.Host, internal, internalAt(internal))
					break
				}
			}
		}
	}
}

func (c *Config) protocolOf(tunnel string) Protocol {
	for _, t := range c.Tunnels {
		if t.Name == tunnel {
			return t.Protocol
		}
	}
	return ""
}

// NeedsTrailers reports whether a public host of a tunnel does.
func (c *Config) NeedsTrailers(tunnel string) bool {
	return slices.ContainsFunc(c.Hosts, func(h HostConfig) bool {
		return h.Tunnel == tunnel && h.Exposure == Public && h.Origin.GRPC
	})
}

// HasTunnels reports whether c is for the role cloudflare.
func (c *Config) HasTunnels() bool { return c.hasTunnels }

// HasVPN reports whether c is for the role wireguard.
func (c *Config) HasVPN() bool { return c.hasVPN }

// VPN is what c says of the VPN; nothing is declared in it where HasVPN is
// false.
func (c *Config) VPN() *wireguard.Config {
	return &wireguard.Config{Settings: c.WireGuard, Peers: c.Peers, Services: c.Services, Grants: c.Grants}
}

// HasLAPI reports whether there is a source of decisions.
func (c *Config) HasLAPI() bool { return c.hasLAPI }

// KeepLAPI makes the source of decisions that of another configuration, which
// only a start can change.
func (c *Config) KeepLAPI(was *Config) { c.LAPI, c.hasLAPI = was.LAPI, was.hasLAPI }

func (o *OriginConfig) check(check *config.Check, at string, s Service) {
	if _, wild := o.HostHeader.Wildcard(); wild {
		check.Fail(at+"hostHeader", "%q: want one host", o.HostHeader)
	}
	if s.Scheme == "http" {
		for key, given := range map[string]bool{"serverName": o.ServerName != "", "caFile": o.CAFile != "", "insecureSkipVerify": o.InsecureSkipVerify} {
			if given {
				check.Fail(at+key, "is of no use, the service is not https")
			}
		}
	} else if o.InsecureSkipVerify && (o.CAFile != "" || o.ServerName != "") {
		check.Fail(at+"insecureSkipVerify", "makes caFile and serverName of no use: keep one of them")
	}
	if !check.Has(at + "connectTimeout") {
		o.ConnectTimeout = 10 * time.Second
	}
	within(check, at+"connectTimeout", o.ConnectTimeout, 10*time.Millisecond, 10*time.Minute)
	within(check, at+"responseTimeout", o.ResponseTimeout, 0, 24*time.Hour)
	if !check.Has(at + "idleConnections") {
		o.Connections = 64
	}
	if o.Connections < 1 || o.Connections > 10000 {
		check.Fail(at+"idleConnections", "%d: want 1 to 10000", o.Connections)
	}
}

func (c *Config) checkCloudflare(check *config.Check) {
	if !check.Has("cloudflare") {
		return
	}
	f := &c.Cloudflare
	const at = "cloudflare."
	if len(f.Account) != 32 || strings.Trim(f.Account, "0123456789abcdef") != "" {
		check.Fail(at+"account", "want the account id, 32 hexadecimal digits, from the overview page of any zone")
	}
	if f.Owner == "" && len(f.Zones) > 0 {
		check.Fail(at+"owner", "is missing: a word of your own, by which this installation knows its DNS records")
	}
	if strings.Trim(f.Owner, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") != "" || len(f.Owner) > 64 {
		check.Fail(at+"owner", "%q: want letters, digits, dots, hyphens and underscores, at most 64", f.Owner)
	}
	if f.TunnelTokenFile == "" && len(f.Zones) == 0 {
		check.Fail("cloudflare", "has nothing to do: give tunnelTokenFile, zones or both")
	}
	seen := map[Host]bool{}
	for i, z := range f.Zones {
		at := fmt.Sprintf("cloudflare.zones[%d].", i)
		if _, wild := z.Name.Wildcard(); wild || z.Name == "" {
			check.Fail(at+"name", "want a zone such as example.com")
		}
		if seen[z.Name] {
			check.Fail(at+"name", "%s is there already", z.Name)
		}
		seen[z.Name] = true
		if z.TokenFile == "" {
			check.Fail(at+"tokenFile", "is missing: name the file that holds an API token for this zone")
		}
	}
	for i, h := range f.Relinquish {
		if slices.Contains(f.Adopt, h) {
			check.Fail(fmt.Sprintf("cloudflare.relinquish[%d]", i), "%s is in adopt, too: keep one of them", h)
		}
	}
	within(check, at+"interval", f.Interval, 10*time.Second, 24*time.Hour)
	if u, err := url.Parse(f.URL); err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil {
		check.Fail(at+"url", "want the base address of the API, such as %s", APIURL)
	}
}

func within(check *config.Check, key string, d, least, longest time.Duration) {
	if d < least || d > longest {
		check.Fail(key, "%v: want %v to %v", d, least, longest)
	}
}

// Enabled reports whether the API is used.
func (f CloudflareConfig) Enabled() bool { return f.Account != "" }

// internal are the hosts that are never public.
func (c *Config) internal() []Host {
	out := slices.Clone(c.InternalHosts)
	for _, h := range c.Hosts {
		if h.Exposure == Internal {
			out = append(out, h.Host)
		}
	}
	return out
}

// PublicHost is one host that visitors reach through a tunnel.
type PublicHost struct {
	Host   Host
	Tunnel string
	// Services are the origin services behind it, by path.
	Services []string
}

// PublicHosts returns the hosts that are public, sorted, each once: what the
// connectors route and DNS should name. No internal host is among them.
func (c *Config) PublicHosts() []PublicHost {
	var out []PublicHost
	internal := c.internal()
	for _, h := range c.Hosts {
		if h.Exposure != Public || slices.ContainsFunc(internal, func(i Host) bool { return i.Covers(h.Host) }) {
			continue
		}
		service := h.Path + " " + h.Service.String()
		if h.Path == "" {
			service = h.Service.String()
		}
		i := slices.IndexFunc(out, func(p PublicHost) bool { return p.Host == h.Host })
		if i < 0 {
			out = append(out, PublicHost{Host: h.Host, Tunnel: h.Tunnel, Services: []string{service}})
			continue
		}
		out[i].Services = append(out[i].Services, service)
	}
	slices.SortFunc(out, func(a, b PublicHost) int { return cmp.Compare(a.Host, b.Host) })
	return out
}

// Files are the files that c names. Their content is part of the configuration:
// a key that is rotated is a change.
func (c *Config) Files() []config.File {
	all := []config.File{c.Ban.PageFile, c.Identity.KeyFile, c.Identity.PreviousKeyFile, c.Cloudflare.TunnelTokenFile, c.Edge.CAFile}
	for _, t := range c.Tunnels {
		all = append(all, t.TokenFile, t.CredentialsFile)
	}
	for _, h := range c.Hosts {
		all = append(all, h.Origin.CAFile)
	}
	for _, z := range c.Cloudflare.Zones {
		all = append(all, z.TokenFile)
	}
	all = append(all, c.VPN().Files()...)
	slices.Sort(all)
	return slices.DeleteFunc(slices.Compact(all), func(f config.File) bool { return f == "" })
}

// Warnings says what is allowed and might not be meant, a sentence each.
func (c *Config) Warnings() []string {
	out, public := c.VPN().Warnings(), c.PublicHosts()
	for _, s := range c.Services {
		if slices.ContainsFunc(public, func(p PublicHost) bool { return s.Host != "" && p.Host.Covers(Host(s.Host)) }) {
			out = append(out, fmt.Sprintf("service %s: its host %s is public, too: visitors reach it through the tunnel", s.Name, s.Host))
		}
	}
	if c.hasVPN && c.StateDir == "" && slices.ContainsFunc(c.Peers, func(p wireguard.Peer) bool { return len(p.Addresses) < len(c.WireGuard.Addresses) }) {
		out = append(out, "there is no stateDir, and peers without addresses of their own: those that they are given may change when others come and go")
	}
	if !c.hasTunnels {
		return out
	}
	if !c.hasLAPI {
		out = append(out, "there is no lapi: nobody is ever refused")
	}
	if c.Identity.KeyFile == "" {
		out = append(out, "there is no identity.keyFile: Traefik cannot tell requests of the tunnel from those of any pod")
	}
	if len(c.Hosts) == 0 {
		out = append(out, "there are no hosts: every request is answered 404")
	}
	for _, p := range public {
		if len(c.Cloudflare.Zones) > 0 && !slices.ContainsFunc(c.Cloudflare.Zones, func(z ZoneConfig) bool {
			return string(p.Host) == string(z.Name) || strings.HasSuffix(string(p.Host), "."+string(z.Name))
		}) {
			out = append(out, fmt.Sprintf("%s is in none of cloudflare.zones: nobody makes a DNS record for it", p.Host))
		}
	}
	for _, h := range c.Cloudflare.Adopt {
		if !slices.ContainsFunc(public, func(p PublicHost) bool { return p.Host == h }) {
			out = append(out, fmt.Sprintf("%s is in cloudflare.adopt and is no public host: there is nothing to take over for", h))
		}
	}
	for _, h := range c.Hosts {
		if h.Origin.InsecureSkipVerify {
			out = append(out, fmt.Sprintf("%s%s takes any certificate of %s (insecureSkipVerify): whoever sits between can read everything", h.Host, h.Path, h.Service))
		}
		for _, internal := range c.internal() {
			if _, wild := h.Host.Wildcard(); wild && h.Exposure == Public && h.Host.Covers(internal) {
				out = append(out, fmt.Sprintf("%s covers %s, which is internal: its name resolves, and the tunnel answers 404", h.Host, internal))
			}
		}
	}
	return out
}

// policy is how c reads tables.
func (c *Config) policy() decision.Policy {
	fallback, _ := decision.ParseFallback(string(c.Decisions.Fallback)) // one of the words
	d := c.Decisions
	return decision.Policy{
		Allow:    decision.NewRanges(d.Allow),
		Fallback: fallback,
		Accept: func(class decision.Class) bool {
			means := class.Remediation
			if means == decision.Unknown {
				means = fallback
			}
			return (means != decision.Captcha || d.Captcha != "ignore") &&
				(len(d.Origins) == 0 || originIn(class.Origin, d.Origins)) && !originIn(class.Origin, d.ExceptOrigins) &&
				(len(d.Scenarios) == 0 || holdsOne(class.Scenario, d.Scenarios)) && !holdsOne(class.Scenario, d.ExceptScenarios)
		},
	}
}

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

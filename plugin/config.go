package plugin

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"reflect"
	"sort"
	"strings"
	"time"

	"github.com/edgeward/edgeward/internal/decision"
)

// Config is what an operator writes under the plugin's name in a Traefik
// middleware. Option names are the field names with a small first letter; an
// option that does not exist is an error. Durations are Go's ("10s", "15m").
type Config struct {
	// Mode is enforce (the default) or observe, which logs and counts what
	// would be refused and refuses nothing.
	Mode string `json:"mode,omitempty"`
	// LAPI says where decisions come from.
	LAPI LAPIConfig `json:"lapi,omitempty"`
	// Decisions says which decisions count here and what they mean.
	Decisions DecisionsConfig `json:"decisions,omitempty"`
	// Client says how the client's address is found.
	Client ClientConfig `json:"client,omitempty"`
	// Ban shapes the answer to a banned client.
	Ban BanConfig `json:"ban,omitempty"`
	// RateLimits are the limits on requests; each that matches a request
	// counts it, in the order written, and the first that is exceeded
	// refuses it.
	RateLimits []RateLimitConfig `json:"rateLimits,omitempty"`
	// Log shapes what the plugin says on standard output.
	Log LogConfig `json:"log,omitempty"`

	Unknown map[string]any `json:"-" mapstructure:",remain"`
}

// LAPIConfig names CrowdSec's Local API and how to reach it.
type LAPIConfig struct {
	// URL is http://HOST:PORT, https://HOST:PORT or unix:///PATH/TO/SOCKET.
	// Without it the middleware knows no decisions and only limits rates.
	URL string `json:"url,omitempty"`
	// Key is the bouncer's API key, meant for a reference that Traefik
	// resolves (urn:k8s:secret:NAME:KEY); KeyFile is a file that holds it,
	// read again at each pull.
	Key     string `json:"key,omitempty"`
	KeyFile string `json:"keyFile,omitempty"`
	// TLS holds a custom authority and a client certificate.
	TLS TLSConfig `json:"tls,omitempty"`
	// Interval is the time between pulls: 10s unless given.
	Interval string `json:"interval,omitempty"`
	// Timeout is the longest silence on a pull: 10s unless given.
	Timeout string `json:"timeout,omitempty"`
	// Resync is the time between full pulls: 12m unless given.
	Resync string `json:"resync,omitempty"`

	Unknown map[string]any `json:"-" mapstructure:",remain"`
}

// TLSConfig is the TLS side of a connection to LAPI. Each part is PEM, given
// itself or by file.
type TLSConfig struct {
	CA         string `json:"ca,omitempty"`
	CAFile     string `json:"caFile,omitempty"`
	Cert       string `json:"cert,omitempty"`
	CertFile   string `json:"certFile,omitempty"`
	Key        string `json:"key,omitempty"`
	KeyFile    string `json:"keyFile,omitempty"`
	ServerName string `json:"serverName,omitempty"`

	Unknown map[string]any `json:"-" mapstructure:",remain"`
}

// DecisionsConfig is this middleware's view of the decisions that all share.
type DecisionsConfig struct {
	// Allow lists addresses and ranges that no decision touches.
	Allow []string `json:"allow,omitempty"`
	// Origins, if any, are the only origins that count; ExceptOrigins never
	// do. Examples: crowdsec, cscli, CAPI, lists.
	Origins       []string `json:"origins,omitempty"`
	ExceptOrigins []string `json:"exceptOrigins,omitempty"`
	// Scenarios, if any, are pieces of text of which a decision's scenario
	// must contain one; it must contain none of ExceptScenarios.
	Scenarios       []string `json:"scenarios,omitempty"`
	ExceptScenarios []string `json:"exceptScenarios,omitempty"`
	// Fallback is what a decision of unknown type means: ban (the default),
	// captcha or ignore.
	Fallback string `json:"fallback,omitempty"`
	// FailClosed refuses, with 503, clients of whom nothing can be known:
	// before the first pull, and when the last good one is older than
	// MaxAge (10m unless given). Otherwise the last good table stays in
	// force and unknown clients pass.
	FailClosed bool   `json:"failClosed,omitempty"`
	MaxAge     string `json:"maxAge,omitempty"`

	Unknown map[string]any `json:"-" mapstructure:",remain"`
}

// ClientConfig says whom to believe about a client's address.
type ClientConfig struct {
	// TrustedProxies lists the addresses and ranges whose Header is
	// believed; the words cloudflare and private stand for Cloudflare's
	// published ranges and for private, loopback and link-local ones.
	// Without any, the client is whoever made the connection.
	TrustedProxies []string `json:"trustedProxies,omitempty"`
	// Header carries the address: X-Forwarded-For (the default), walked
	// from the right over trusted proxies, or one that holds a single
	// address, such as CF-Connecting-IP or X-Real-IP.
	Header string `json:"header,omitempty"`
	// Preset edgeward-tunnel believes what edgeward's tunnel signs, and nothing
	// and nobody else: it takes the place of TrustedProxies and Header. A
	// request without a good signature is from whoever made the connection.
	Preset string `json:"preset,omitempty"`
	// Key is the key that the tunnel signs with, meant for a reference that
	// Traefik resolves (urn:k8s:secret:NAME:KEY); KeyFile is a file that holds
	// it, read again every 15 seconds or so. PreviousKey is believed as well
	// while keys rotate.
	Key             string `json:"key,omitempty"`
	KeyFile         string `json:"keyFile,omitempty"`
	PreviousKey     string `json:"previousKey,omitempty"`
	PreviousKeyFile string `json:"previousKeyFile,omitempty"`
	// MaxAge is how old a signature may be, and how far clocks may differ: 1m
	// unless given.
	MaxAge string `json:"maxAge,omitempty"`

	Unknown map[string]any `json:"-" mapstructure:",remain"`
}

// BanConfig shapes the refusal.
type BanConfig struct {
	// Status is the HTTP status, 403 unless given: 4xx or 5xx.
	Status int `json:"status,omitempty"`
	// PageFile is an html/template for browsers, with .Status, .Reason,
	// .Address and .Decision.
	PageFile string `json:"pageFile,omitempty"`

	Unknown map[string]any `json:"-" mapstructure:",remain"`
}

// RateLimitConfig is one named rate limit: Average requests per Period, and up
// to Burst at once. The middlewares and routers that use the same policy share
// its counts.
type RateLimitConfig struct {
	Name    string `json:"name,omitempty"`
	Average int    `json:"average,omitempty"`
	// Period is 1s unless given.
	Period string `json:"period,omitempty"`
	// Burst is Average unless given.
	Burst int `json:"burst,omitempty"`
	// Match says which requests count; empty means all.
	Match MatchConfig `json:"match,omitempty"`
	// Key says what shares a count; empty means the client's address.
	Key KeyConfig `json:"key,omitempty"`
	// Exempt lists client addresses and ranges that the limit leaves alone.
	Exempt []string `json:"exempt,omitempty"`
	// HideHeaders leaves RateLimit and RateLimit-Policy out of answers.
	HideHeaders bool `json:"hideHeaders,omitempty"`
	// MaxKeys bounds the table of counts: 65536 unless given.
	MaxKeys int `json:"maxKeys,omitempty"`

	Unknown map[string]any `json:"-" mapstructure:",remain"`
}

// MatchConfig picks requests; each list that is not empty must match.
type MatchConfig struct {
	// Hosts are host names; *.example.com stands for all below example.com.
	Hosts []string `json:"hosts,omitempty"`
	// PathPrefixes match whole path segments: /login is a prefix of
	// /login/x, not of /loginx.
	PathPrefixes []string `json:"pathPrefixes,omitempty"`
	Methods      []string `json:"methods,omitempty"`

	Unknown map[string]any `json:"-" mapstructure:",remain"`
}

// KeyConfig says what shares one count.
type KeyConfig struct {
	// Header counts by a request header's value; a request without it is
	// counted by address.
	Header string `json:"header,omitempty"`
	// IPv4Prefix and IPv6Prefix are the lengths of the ranges that share a
	// count: 32 and 64 unless given.
	IPv4Prefix int `json:"ipv4Prefix,omitempty"`
	IPv6Prefix int `json:"ipv6Prefix,omitempty"`

	Unknown map[string]any `json:"-" mapstructure:",remain"`
}

// LogConfig shapes the log.
type LogConfig struct {
	// Level is debug, info (the default), warn or error.
	Level string `json:"level,omitempty"`
	// Format is json (the default) or text.
	Format string `json:"format,omitempty"`

	Unknown map[string]any `json:"-" mapstructure:",remain"`
}

// CreateConfig returns the configuration that Traefik fills in.
func CreateConfig() *Config { return &Config{} }

// settings is a Config understood: nothing in it needs checking again.
type settings struct {
	observe    bool
	lapi       source
	policy     decision.Policy
	failClosed bool
	maxAge     time.Duration
	trusted    *decision.Ranges // nil: nobody is believed
	header     string           // canonical; "" for X-Forwarded-For
	tunnel     *tunnelSource    // nil: nobody signs
	status     int
	pageFile   string
	limits     []limitRule
	logLevel   string
	logText    bool
}

// limitRule is a rate limit and the requests it is for.
type limitRule struct {
	policy   limitPolicy
	hosts    map[string]bool // exact ones
	suffixes []string        // ".example.com"
	prefixes []string
	methods  map[string]bool
	header   string
	bits4    int
	bits6    int
	exempt   *decision.Ranges
	hide     bool
	always   bool // for every request
	simple   bool // counts by single IPv4 addresses
}

// checker gathers what is wrong, so that all of it is reported at once.
type checker struct{ errs []error }

func (c *checker) fail(format string, args ...any) {
	c.errs = append(c.errs, fmt.Errorf(format, args...))
}

// understand checks a configuration and returns what it means.
func understand(config *Config) (*settings, error) {
	c := &checker{}
	s := &settings{status: 403, maxAge: 10 * time.Minute, logLevel: "info"}

	unknown(c, "", config.Unknown, *config)
	switch config.Mode {
	case "", "enforce":
	case "observe":
		s.observe = true
	default:
		c.fail("mode %q: want enforce or observe", config.Mode)
	}

	understandLAPI(c, s, &config.LAPI)
	understandDecisions(c, s, &config.Decisions)

	understandClient(c, s, &config.Client)

	unknown(c, "ban.", config.Ban.Unknown, config.Ban)
	if config.Ban.Status != 0 {
		s.status = config.Ban.Status
	}
	if s.status < 400 || s.status > 599 {
		c.fail("ban.status %d: want 400 to 599", s.status)
	}
	s.pageFile = config.Ban.PageFile

	names := map[string]bool{}
	for i := range config.RateLimits {
		understandLimit(c, s, fmt.Sprintf("rateLimits[%d]", i), &config.RateLimits[i], names)
	}

	unknown(c, "log.", config.Log.Unknown, config.Log)
	switch strings.ToLower(config.Log.Level) {
	case "":
	case "debug", "info", "warn", "error":
		s.logLevel = strings.ToLower(config.Log.Level)
	default:
		c.fail("log.level %q: want debug, info, warn or error", config.Log.Level)
	}
	switch config.Log.Format {
	case "", "json":
	case "text":
		s.logText = true
	default:
		c.fail("log.format %q: want json or text", config.Log.Format)
	}
	if len(c.errs) == 0 && s.lapi.url == "" && len(s.limits) == 0 && config.Client.Preset == "" {
		c.fail("there is nothing to enforce: give lapi.url for CrowdSec's decisions, or rateLimits")
	}
	return s, errors.Join(c.errs...)
}

func understandLAPI(c *checker, s *settings, l *LAPIConfig) {
	unknown(c, "lapi.", l.Unknown, *l)
	unknown(c, "lapi.tls.", l.TLS.Unknown, l.TLS)
	s.lapi = source{
		key: l.Key, keyFile: l.KeyFile,
		tls: tlsSource{
			ca: l.TLS.CA, caFile: l.TLS.CAFile, cert: l.TLS.Cert, certFile: l.TLS.CertFile,
			key: l.TLS.Key, keyFile: l.TLS.KeyFile, serverName: l.TLS.ServerName,
		},
		interval: duration(c, "lapi.interval", l.Interval, 10*time.Second, time.Second, time.Hour),
		timeout:  duration(c, "lapi.timeout", l.Timeout, 10*time.Second, 100*time.Millisecond, 5*time.Minute),
		resync:   duration(c, "lapi.resync", l.Resync, 12*time.Minute, time.Second, 24*time.Hour),
	}
	both(c, "lapi.key", l.Key, "lapi.keyFile", l.KeyFile)
	both(c, "lapi.tls.ca", l.TLS.CA, "lapi.tls.caFile", l.TLS.CAFile)
	both(c, "lapi.tls.cert", l.TLS.Cert, "lapi.tls.certFile", l.TLS.CertFile)
	both(c, "lapi.tls.key", l.TLS.Key, "lapi.tls.keyFile", l.TLS.KeyFile)
	hasKey := l.Key != "" || l.KeyFile != ""
	hasCert := l.TLS.Cert != "" || l.TLS.CertFile != ""
	if hasCert != (l.TLS.Key != "" || l.TLS.KeyFile != "") {
		c.fail("lapi.tls: a client certificate needs both its cert and its key")
	}
	if l.URL == "" {
		if hasKey || hasCert || l.TLS.CA != "" || l.TLS.CAFile != "" {
			c.fail("lapi.url is missing: give LAPI's address, for instance http://crowdsec-service.crowdsec:8080")
		}
		return
	}
	if strings.HasPrefix(l.Key, "urn:k8s:secret:") {
		c.fail("lapi.key is still a reference (%s): Traefik resolves it in Kubernetes only, from a Secret in the middleware's namespace", l.Key)
	}
	if !hasKey && !hasCert && len(l.Unknown)+len(l.TLS.Unknown) == 0 { // else a name is misspelt, which was said
		c.fail("lapi has no credentials: give lapi.keyFile, lapi.key or a client certificate in lapi.tls (cscli bouncers add NAME makes a key)")
	}
	u, err := url.Parse(l.URL)
	switch {
	case err != nil:
		// Without the text, which may hold a password.
		c.fail("lapi.url is not a URL: want http://HOST:PORT, https://HOST:PORT or unix:///PATH")
	case u.User != nil:
		c.fail("lapi.url must not hold a user or password: use lapi.keyFile")
	case u.RawQuery != "" || u.Fragment != "":
		c.fail("lapi.url %q must end with its path", l.URL)
	case u.Scheme == "unix":
		if u.Host != "" || u.Path == "" {
			c.fail("lapi.url %q: want unix:///path/to/socket", l.URL)
		}
		if s.lapi.tls != (tlsSource{}) {
			c.fail("lapi.tls is of no use with a unix socket: remove it, and give a key")
		}
		s.lapi.socket = u.Path
		s.lapi.url = "http://lapi"
	case u.Scheme == "http" || u.Scheme == "https":
		if u.Host == "" {
			c.fail("lapi.url %q has no host", l.URL)
		}
		s.lapi.url = u.Scheme + "://" + strings.ToLower(u.Host) + strings.TrimRight(u.Path, "/")
		if s.lapi.tls != (tlsSource{}) && u.Scheme == "http" {
			c.fail("lapi.tls is of no use with http: make lapi.url https, or remove it")
		}
	default:
		c.fail("lapi.url %q: want http://, https:// or unix://", l.URL)
	}
}

func understandClient(c *checker, s *settings, l *ClientConfig) {
	unknown(c, "client.", l.Unknown, *l)
	if len(l.TrustedProxies) > 0 {
		s.trusted = ranges(c, "client.trustedProxies", l.TrustedProxies, true)
	}
	header := l.Header
	if header != "" && len(l.TrustedProxies) == 0 {
		c.fail("client.header %q is of no use without client.trustedProxies: name the proxies that set it (for instance cloudflare)", header)
	}
	if !token(header) {
		c.fail("client.header %q is not a header name", header)
	}
	if !strings.EqualFold(header, "X-Forwarded-For") {
		s.header = canonical(header)
	}
	understandPreset(c, s, l)
}

func understandPreset(c *checker, s *settings, l *ClientConfig) {
	keys := l.Key != "" || l.KeyFile != "" || l.PreviousKey != "" || l.PreviousKeyFile != ""
	switch l.Preset {
	case "":
		if keys || l.MaxAge != "" {
			c.fail("client.keyFile and client.maxAge are of no use without client.preset: edgeward-tunnel")
		}
		return
	case tunnelPreset:
	default:
		c.fail("client.preset %q: want edgeward-tunnel", l.Preset)
		return
	}
	if len(l.TrustedProxies) > 0 || l.Header != "" {
		c.fail("client.preset excludes client.trustedProxies and client.header: it believes signatures alone")
	}
	both(c, "client.key", l.Key, "client.keyFile", l.KeyFile)
	both(c, "client.previousKey", l.PreviousKey, "client.previousKeyFile", l.PreviousKeyFile)
	if l.Key == "" && l.KeyFile == "" {
		c.fail("client.preset needs client.keyFile or client.key: the key that edgeward-tunnel signs with")
	}
	for _, k := range []struct{ name, text string }{{"key", l.Key}, {"previousKey", l.PreviousKey}} {
		if strings.HasPrefix(k.text, "urn:k8s:secret:") {
			c.fail("client.%s is still a reference (%s): Traefik resolves it in Kubernetes only, from a Secret in the middleware's namespace", k.name, k.text)
		} else if k.text != "" && tunnelKeyFits(strings.TrimSpace(k.text)) != nil {
			c.fail("client.%s: %v", k.name, errTunnelKey)
		}
	}
	s.tunnel = &tunnelSource{
		key: l.Key, keyFile: l.KeyFile, previous: l.PreviousKey, previousFile: l.PreviousKeyFile,
		maxAge: int64(duration(c, "client.maxAge", l.MaxAge, time.Minute, 5*time.Second, time.Hour) / time.Second),
	}
}

func understandDecisions(c *checker, s *settings, d *DecisionsConfig) {
	unknown(c, "decisions.", d.Unknown, *d)
	fallback, err := decision.ParseFallback(d.Fallback)
	if err != nil {
		c.fail("decisions.fallback: %v", err)
	}
	s.policy.Fallback = fallback
	if len(d.Allow) > 0 {
		s.policy.Allow = ranges(c, "decisions.allow", d.Allow, false)
	}
	words(c, "decisions.origins", d.Origins)
	words(c, "decisions.exceptOrigins", d.ExceptOrigins)
	words(c, "decisions.scenarios", d.Scenarios)
	words(c, "decisions.exceptScenarios", d.ExceptScenarios)
	if len(d.Origins)+len(d.ExceptOrigins)+len(d.Scenarios)+len(d.ExceptScenarios) > 0 {
		s.policy.Accept = acceptor(d)
	}
	s.failClosed = d.FailClosed
	if d.FailClosed && s.lapi.url == "" {
		c.fail("decisions.failClosed is of no use without lapi.url")
	}
	s.maxAge = duration(c, "decisions.maxAge", d.MaxAge, 10*time.Minute, time.Second, 365*24*time.Hour)
	if d.MaxAge != "" && !d.FailClosed {
		c.fail("decisions.maxAge is of no use without decisions.failClosed: true")
	}
	if d.FailClosed && s.maxAge < 2*s.lapi.interval {
		c.fail("decisions.maxAge %s: want at least twice lapi.interval, or every pull comes too late", s.maxAge)
	}
}

// words trims the entries of a list, which Traefik may have cut out of one string
// at its commas. An empty one would match everything.
func words(c *checker, at string, list []string) {
	for i, w := range list {
		list[i] = strings.TrimSpace(w)
		if list[i] == "" {
			c.fail("%s has an empty entry: remove it, or a comma too many", at)
		}
	}
}

// acceptor returns the filter on origins and scenarios. LAPI writes the origin
// of a blocklist as lists:NAME or plain lists; the filter "lists" means both.
func acceptor(d *DecisionsConfig) func(decision.Class) bool {
	origins, exceptOrigins := d.Origins, d.ExceptOrigins
	scenarios, exceptScenarios := d.Scenarios, d.ExceptScenarios
	return func(class decision.Class) bool {
		return (len(origins) == 0 || originIn(class.Origin, origins)) &&
			!originIn(class.Origin, exceptOrigins) &&
			(len(scenarios) == 0 || containsOne(class.Scenario, scenarios)) &&
			!containsOne(class.Scenario, exceptScenarios)
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

func containsOne(text string, pieces []string) bool {
	for _, p := range pieces {
		if strings.Contains(text, p) {
			return true
		}
	}
	return false
}

func understandLimit(c *checker, s *settings, at string, r *RateLimitConfig, names map[string]bool) {
	unknown(c, at+".", r.Unknown, *r)
	unknown(c, at+".match.", r.Match.Unknown, r.Match)
	unknown(c, at+".key.", r.Key.Unknown, r.Key)
	if names[r.Name] {
		c.fail("%s.name %q is taken by another rate limit", at, r.Name)
	}
	names[r.Name] = true
	burst := r.Burst
	if burst == 0 {
		burst = r.Average
	}
	rule := limitRule{
		policy: limitPolicy{
			Name:    r.Name,
			Average: r.Average,
			Period:  duration(c, at+".period", r.Period, time.Second, 0, limitMaxPeriod),
			Burst:   burst,
			Keys:    r.MaxKeys,
		},
		header: canonical(r.Key.Header),
		bits4:  32,
		bits6:  64,
		hide:   r.HideHeaders,
	}
	if err := rule.policy.check(); err != nil {
		c.fail("%s: %s", at, strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	if !token(r.Key.Header) {
		c.fail("%s.key.header %q is not a header name", at, r.Key.Header)
	}
	if rule.header == "Host" {
		c.fail("%s.key.header: Host is no header to a Go server; use match.hosts", at)
	}
	if r.Key.IPv4Prefix != 0 {
		rule.bits4 = r.Key.IPv4Prefix
	}
	if r.Key.IPv6Prefix != 0 {
		rule.bits6 = r.Key.IPv6Prefix
	}
	if rule.bits4 < 8 || rule.bits4 > 32 {
		c.fail("%s.key.ipv4Prefix %d: want 8 to 32", at, rule.bits4)
	}
	if rule.bits6 < 16 || rule.bits6 > 128 {
		c.fail("%s.key.ipv6Prefix %d: want 16 to 128", at, rule.bits6)
	}
	if len(r.Exempt) > 0 {
		rule.exempt = ranges(c, at+".exempt", r.Exempt, false)
	}
	words(c, at+".match.hosts", r.Match.Hosts)
	words(c, at+".match.pathPrefixes", r.Match.PathPrefixes)
	words(c, at+".match.methods", r.Match.Methods)
	for _, h := range r.Match.Hosts {
		h = strings.TrimSuffix(strings.ToLower(h), ".")
		switch {
		case strings.LastIndexByte(h, ':') > strings.LastIndexByte(h, ']'):
			c.fail("%s.match.hosts %q: a host is matched without its port", at, h)
		case strings.HasPrefix(h, "*.") && len(h) > 2 && !strings.ContainsAny(h[2:], "*/ "):
			rule.suffixes = append(rule.suffixes, h[1:])
		case h != "" && !strings.ContainsAny(h, "*/ "):
			if rule.hosts == nil {
				rule.hosts = map[string]bool{}
			}
			rule.hosts[h] = true
		default:
			c.fail("%s.match.hosts %q: want a host name or *.domain", at, h)
		}
	}
	for _, p := range r.Match.PathPrefixes {
		if !strings.HasPrefix(p, "/") {
			c.fail("%s.match.pathPrefixes %q must begin with /", at, p)
		}
		rule.prefixes = append(rule.prefixes, p)
	}
	for _, m := range r.Match.Methods {
		if m == "" || !token(m) {
			c.fail("%s.match.methods %q is not a method", at, m)
		}
		if rule.methods == nil {
			rule.methods = map[string]bool{}
		}
		rule.methods[strings.ToUpper(m)] = true
	}
	rule.always = rule.hosts == nil && rule.suffixes == nil && rule.prefixes == nil && rule.methods == nil && rule.exempt == nil
	rule.simple = rule.header == "" && rule.bits4 == 32
	s.limits = append(s.limits, rule)
}

// ranges reads a list of addresses and ranges; presets allows the words
// cloudflare and private.
func ranges(c *checker, at string, list []string, presets bool) *decision.Ranges {
	var out []netip.Prefix
	for _, word := range list {
		text := strings.TrimSpace(word)
		if presets {
			if known, ok := decision.Known(strings.ToLower(text)); ok {
				out = append(out, known...)
				continue
			}
		}
		p, err := decision.ParsePrefix(text)
		if err != nil {
			hint := "want an address such as 192.0.2.1 or a range such as 10.0.0.0/8"
			if presets {
				hint += ", or cloudflare or private"
			}
			c.fail("%s %q: %s", at, word, hint)
			continue
		}
		out = append(out, p)
	}
	return decision.NewRanges(out)
}

func duration(c *checker, at, text string, otherwise, low, high time.Duration) time.Duration {
	if text == "" {
		return otherwise
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		c.fail("%s %q: want a duration such as 10s or 15m", at, text)
		return otherwise
	}
	if d < low || d > high {
		c.fail("%s %s: want %s to %s", at, d, low, high)
		return otherwise
	}
	return d
}

func both(c *checker, a, av, b, bv string) {
	if av != "" && bv != "" {
		c.fail("%s and %s exclude each other: give one", a, b)
	}
}

// token reports whether text has only the characters of a header name or
// method; the empty text is left to the caller.
func token(text string) bool {
	for _, r := range text {
		if !strings.ContainsRune("!#$%&'*+-.^_`|~", r) && (r < '0' || r > '9') && (r < 'A' || r > 'Z') && (r < 'a' || r > 'z') {
			return false
		}
	}
	return true
}

// unknown reports the options that a section does not have, each with the
// nearest one that it has.
func unknown(c *checker, at string, found map[string]any, section any) {
	if len(found) == 0 {
		return
	}
	var known []string
	t := reflect.TypeOf(section)
	for i := 0; i < t.NumField(); i++ {
		name := strings.Split(t.Field(i).Tag.Get("json"), ",")[0]
		if name != "" && name != "-" {
			known = append(known, name)
		}
	}
	var names []string
	for name := range found {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		best, least := "", len(name)/2+2
		for _, k := range known {
			if d := distance(strings.ToLower(name), strings.ToLower(k)); d < least {
				best, least = k, d
			}
		}
		if best != "" {
			c.fail("unknown option %s%s: did you mean %s%s?", at, name, at, best)
		} else {
			c.fail("unknown option %s%s: the options here are %s", at, name, strings.Join(known, ", "))
		}
	}
}

// distance is the number of letters to insert, remove or change between a and b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			least := diagonal
			if a[i-1] != b[j-1] {
				least++
			}
			if row[j]+1 < least {
				least = row[j] + 1
			}
			if row[j-1]+1 < least {
				least = row[j-1] + 1
			}
			diagonal = row[j]
			row[j] = least
		}
	}
	return row[len(b)]
}

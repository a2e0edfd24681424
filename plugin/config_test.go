package plugin

import (
	"strings"
	"testing"
	"time"

	"github.com/edgeward/edgeward/internal/decision"
)

// good returns a configuration that makes sense, for tests to spoil.
func good() *Config {
	c := CreateConfig()
	c.LAPI.URL = "http://127.0.0.1:1"
	c.LAPI.Key = "secret"
	return c
}

func TestConfigurationsThatMakeSense(t *testing.T) {
	for _, c := range []struct {
		name  string
		spoil func(c *Config)
		want  func(s *settings) bool
	}{
		{"defaults", func(c *Config) {}, func(s *settings) bool {
			return !s.observe && s.status == 403 && s.lapi.interval == 10*time.Second && s.lapi.resync == 12*time.Minute && s.lapi.timeout == 10*time.Second && s.trusted == nil && s.header == ""
		}},
		{"a limit alone", func(c *Config) {
			*c = Config{RateLimits: []RateLimitConfig{{Name: "all", Average: 1}}}
		}, func(s *settings) bool { return s.lapi.url == "" }},
		{"a trailing slash and capitals", func(c *Config) { c.LAPI.URL = "http://CrowdSec:8080/" }, func(s *settings) bool { return s.lapi.url == "http://crowdsec:8080" }},
		{"a path", func(c *Config) { c.LAPI.URL = "https://host/lapi/" }, func(s *settings) bool { return s.lapi.url == "https://host/lapi" }},
		{"a socket", func(c *Config) { c.LAPI.URL = "unix:///run/crowdsec/lapi.sock" }, func(s *settings) bool {
			return s.lapi.socket == "/run/crowdsec/lapi.sock" && s.lapi.url == "http://lapi"
		}},
		{"X-Forwarded-For in small letters", func(c *Config) {
			c.Client.TrustedProxies = []string{"10.0.0.0/8"}
			c.Client.Header = "x-forwarded-for"
		}, func(s *settings) bool { return s.header == "" && s.trusted != nil }},
		{"another header", func(c *Config) {
			c.Client.TrustedProxies = []string{"Cloudflare", "private"}
			c.Client.Header = "cf-connecting-ip"
		}, func(s *settings) bool { return s.header == "Cf-Connecting-Ip" }},
		{"the preset", func(c *Config) {
			c.Client.Preset = "edgeward-tunnel"
			c.Client.KeyFile = "/k"
			c.Client.PreviousKey = "0123456789abcdef0123456789abcdef"
			c.Client.MaxAge = "30s"
		}, func(s *settings) bool {
			return s.tunnel != nil && s.tunnel.keyFile == "/k" && s.tunnel.maxAge == 30 && s.trusted == nil
		}},
		{"a limit", func(c *Config) {
			c.RateLimits = []RateLimitConfig{{Name: "all", Average: 60, Period: "1m"}}
		}, func(s *settings) bool {
			l := s.limits[0]
			return l.policy.Burst == 60 && l.policy.Period == time.Minute && l.always && l.simple && l.bits6 == 64
		}},
		{"words around commas", func(c *Config) { c.Decisions.Origins = []string{" cscli", "crowdsec "} }, func(s *settings) bool {
			return s.policy.Accept(decision.Class{Origin: "cscli"}) && s.policy.Accept(decision.Class{Origin: "crowdsec"}) && !s.policy.Accept(decision.Class{Origin: "CAPI"})
		}},
		{"a limit for some", func(c *Config) {
			c.RateLimits = []RateLimitConfig{{Name: "some", Average: 1, Burst: 3, Match: MatchConfig{Hosts: []string{"A.example", "*.b.example"}, Methods: []string{"post"}}}}
		}, func(s *settings) bool {
			l := s.limits[0]
			return !l.always && l.hosts["a.example"] && l.suffixes[0] == ".b.example" && l.methods["POST"] && l.policy.Burst == 3 && l.policy.Period == time.Second
		}},
	} {
		config := good()
		c.spoil(config)
		s, err := understand(config)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
		} else if !c.want(s) {
			t.Errorf("%s: understood as %+v", c.name, s)
		}
	}
}

func TestConfigurationsThatMakeNoSense(t *testing.T) {
	limit := func(c *Config) *RateLimitConfig {
		c.RateLimits = []RateLimitConfig{{Name: "l", Average: 1}}
		return &c.RateLimits[0]
	}
	for _, c := range []struct {
		spoil func(c *Config)
		want  string
	}{
		{func(c *Config) { *c = Config{} }, "there is nothing to enforce: give lapi.url"},
		{func(c *Config) { c.Unknown = map[string]any{"lappi": 1} }, "unknown option lappi: did you mean lapi?"},
		{func(c *Config) { c.Unknown = map[string]any{"crowdsecLapiKey": 1} }, "unknown option crowdsecLapiKey: the options here are mode, lapi, decisions"},
		{func(c *Config) { c.LAPI.Unknown = map[string]any{"keyfil": 1} }, "unknown option lapi.keyfil: did you mean lapi.keyFile?"},
		{func(c *Config) { c.LAPI.TLS.Unknown = map[string]any{"insecure": true} }, "unknown option lapi.tls.insecure"},
		{func(c *Config) { c.Decisions.Unknown = map[string]any{"alow": 1} }, "did you mean decisions.allow?"},
		{func(c *Config) { c.Client.Unknown = map[string]any{"trustedProxy": 1} }, "did you mean client.trustedProxies?"},
		{func(c *Config) { c.Ban.Unknown = map[string]any{"statuscode": 1} }, "did you mean ban.status?"},
		{func(c *Config) { c.Log.Unknown = map[string]any{"lvl": 1} }, "did you mean log.level?"},
		{func(c *Config) { limit(c).Unknown = map[string]any{"avrage": 1} }, "did you mean rateLimits[0].average?"},
		{func(c *Config) { limit(c).Match.Unknown = map[string]any{"host": 1} }, "did you mean rateLimits[0].match.hosts?"},
		{func(c *Config) { limit(c).Key.Unknown = map[string]any{"headers": 1} }, "did you mean rateLimits[0].key.header?"},
		{func(c *Config) { c.Mode = "block" }, `mode "block": want enforce or observe`},
		{func(c *Config) { c.LAPI.URL = "" }, "lapi.url is missing"},
		{func(c *Config) { c.LAPI.URL = "crowdsec:8080" }, "lapi.url"},
		{func(c *Config) { c.LAPI.URL = "ftp://crowdsec" }, "want http://, https:// or unix://"},
		{func(c *Config) { c.LAPI.URL = "http://" }, "has no host"},
		{func(c *Config) { c.LAPI.URL = "http://me:pw@host" }, "must not hold a user"},
		{func(c *Config) { c.LAPI.URL = "http://host/?a=b" }, "must end with its path"},
		{func(c *Config) { c.LAPI.URL = "unix://run/sock" }, "want unix:///path/to/socket"},
		{func(c *Config) { c.LAPI.Key = "" }, "lapi has no credentials"},
		{func(c *Config) { c.LAPI.Key = "urn:k8s:secret:a:b" }, "still a reference"},
		{func(c *Config) { c.LAPI.KeyFile = "/k" }, "lapi.key and lapi.keyFile exclude each other"},
		{func(c *Config) { c.LAPI.TLS.CertFile = "/c" }, "needs both its cert and its key"},
		{func(c *Config) { c.LAPI.TLS.CertFile, c.LAPI.TLS.KeyFile = "/c", "/k" }, "is of no use with http"},
		{func(c *Config) { c.LAPI.TLS.CA, c.LAPI.TLS.CAFile = "x", "/c" }, "exclude each other"},
		{func(c *Config) { c.LAPI.Interval = "10" }, `lapi.interval "10": want a duration such as 10s`},
		{func(c *Config) { c.LAPI.Interval = "1ms" }, "lapi.interval 1ms: want 1s to 1h0m0s"},
		{func(c *Config) { c.LAPI.Timeout = "1h" }, "lapi.timeout"},
		{func(c *Config) { c.LAPI.Resync = "-1s" }, "lapi.resync"},
		{func(c *Config) { c.Decisions.Fallback = "allow" }, `decisions.fallback: read fallback "allow": want ban, captcha or ignore`},
		{func(c *Config) { c.Decisions.Allow = []string{"10.0.0.0/8", "home"} }, `decisions.allow "home": want an address`},
		{func(c *Config) { c.Decisions.Allow = []string{"cloudflare"} }, `decisions.allow "cloudflare"`},
		{func(c *Config) { c.Decisions.MaxAge = "1m" }, "decisions.maxAge is of no use without decisions.failClosed"},
		{func(c *Config) { c.Client.Header = "X-Real-IP" }, "of no use without client.trustedProxies"},
		{func(c *Config) {
			c.Client.Header = "X Real"
			c.Client.TrustedProxies = []string{"private"}
		}, "is not a header name"},
		{func(c *Config) { c.Client.TrustedProxies = []string{"fe80::1%eth0"} }, "or cloudflare or private"},
		{func(c *Config) { c.Client.Preset = "cloudflared" }, `client.preset "cloudflared": want edgeward-tunnel`},
		{func(c *Config) { c.Client.Preset = "edgeward-tunnel" }, "client.preset needs client.keyFile or client.key"},
		{func(c *Config) { c.Client.KeyFile = "/k" }, "are of no use without client.preset"},
		{func(c *Config) {
			c.Client.Preset = "edgeward-tunnel"
			c.Client.KeyFile = "/k"
			c.Client.TrustedProxies = []string{"private"}
		}, "it believes signatures alone"},
		{func(c *Config) {
			c.Client.Preset = "edgeward-tunnel"
			c.Client.Key = "a secret too short"
		}, "client.key: want one line of 32 characters or more"},
		{func(c *Config) {
			c.Client.Preset = "edgeward-tunnel"
			c.Client.Key = "urn:k8s:secret:edgeward:key"
		}, "client.key is still a reference"},
		{func(c *Config) {
			c.Client.Preset = "edgeward-tunnel"
			c.Client.KeyFile = "/k"
			c.Client.MaxAge = "2h"
		}, "client.maxAge 2h0m0s: want 5s to 1h0m0s"},
		{func(c *Config) { c.Ban.Status = 200 }, "ban.status 200: want 400 to 599"},
		{func(c *Config) { c.Log.Level = "loud" }, `log.level "loud"`},
		{func(c *Config) { c.Log.Format = "xml" }, `log.format "xml"`},
		{func(c *Config) { c.LAPI.URL = "http://user:s3cret#@[host" }, "lapi.url is not a URL"},
		{func(c *Config) { c.LAPI.TLS.CAFile = "/ca" }, "lapi.tls is of no use with http"},
		{func(c *Config) {
			c.LAPI.URL = "unix:///sock"
			c.LAPI.TLS.CAFile = "/ca"
		}, "of no use with a unix socket"},
		{func(c *Config) { c.Decisions.Origins = []string{"crowdsec", " "} }, "decisions.origins has an empty entry"},
		{func(c *Config) { c.Decisions.ExceptScenarios = []string{""} }, "decisions.exceptScenarios has an empty entry"},
		{func(c *Config) {
			*c = Config{}
			c.Decisions.FailClosed = true
		}, "decisions.failClosed is of no use without lapi.url"},
		{func(c *Config) {
			c.Decisions.FailClosed = true
			c.Decisions.MaxAge = "15s"
		}, "want at least twice lapi.interval"},
		{func(c *Config) { limit(c).Match.Hosts = []string{"a.example:8443"} }, "without its port"},
		{func(c *Config) { limit(c).Match.PathPrefixes = []string{""} }, "has an empty entry"},
		{func(c *Config) { limit(c).Key.Header = "host" }, "Host is no header"},
		{func(c *Config) { limit(c).Name = "" }, "rateLimits[0]: name is empty"},
		{func(c *Config) { limit(c).Average = 0 }, "rateLimits[0]: average 0 is not within"},
		{func(c *Config) { limit(c).Period = "soon" }, `rateLimits[0].period "soon"`},
		{func(c *Config) { limit(c).Burst = -1 }, "burst -1"},
		{func(c *Config) { limit(c).Key.IPv4Prefix = 33 }, "ipv4Prefix 33: want 8 to 32"},
		{func(c *Config) { limit(c).Key.IPv6Prefix = 4 }, "ipv6Prefix 4: want 16 to 128"},
		{func(c *Config) { limit(c).Key.Header = "a b" }, "key.header"},
		{func(c *Config) { limit(c).Match.Hosts = []string{"*"} }, "match.hosts"},
		{func(c *Config) { limit(c).Match.PathPrefixes = []string{"login"} }, "must begin with /"},
		{func(c *Config) { limit(c).Match.Methods = []string{"GET POST"} }, "is not a method"},
		{func(c *Config) { limit(c).Exempt = []string{"10.0.0.0/33"} }, "rateLimits[0].exempt"},
		{func(c *Config) {
			limit(c)
			c.RateLimits = append(c.RateLimits, c.RateLimits[0])
		}, `rateLimits[1].name "l" is taken`},
	} {
		config := good()
		c.spoil(config)
		_, err := understand(config)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("got %v, want it to say %q", err, c.want)
		}
		if err != nil && strings.Contains(err.Error(), "secret") && !strings.Contains(c.want, "reference") {
			t.Errorf("the key is in the error: %v", err)
		}
	}
}

func TestAllThatIsWrongIsReportedAtOnce(t *testing.T) {
	config := good()
	config.Mode = "x"
	config.Ban.Status = 1
	config.LAPI.Interval = "y"
	_, err := understand(config)
	for _, want := range []string{"mode", "ban.status", "lapi.interval"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not mention %s", err, want)
		}
	}
}

func TestDistance(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"a", "", 1}, {"ulr", "url", 2}, {"keyfil", "keyfile", 1}, {"abc", "abc", 0}, {"abc", "xyz", 3}} {
		if got := distance(c.a, c.b); got != c.want {
			t.Errorf("distance(%q, %q) = %d, want %d", c.a, c.b, got, c.want)
		}
	}
}

// Package crowdsec is the way to CrowdSec's Local API for compiled programs:
// an HTTP client that carries the credentials, the decision stream over it,
// and the usage metrics that CrowdSec wants in return. It is the only importer
// of CrowdSec's own libraries, go-cs-bouncer and apiclient.
//
// Key, certificate and authority are files, read again for each request, so
// that a rotated secret takes effect by itself; where a rotation fails half
// way, the last good credentials stay in use and the log says so once.
//
// It does not use the library's clients and stream loop: they read credentials
// once, know no deadline, never ask for the whole picture again and hold each
// answer in memory whole. The loop is internal/lapi's. It does not look at
// decisions, makes no decisions of its own, and lets nothing of the library's
// logging and counting into ours. The bouncer and the tunnel call it.
package crowdsec

import (
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/edgeward/edgeward/internal/config"
	"github.com/edgeward/edgeward/internal/lapi"
)

// Config names a Local API and says how to ask it. It is the lapi section of
// bouncer.yaml and tunnel.yaml; the keys are those of the Traefik plugin.
type Config struct {
	// URL is http://HOST:PORT, https://HOST:PORT or unix:///PATH/TO/SOCKET.
	URL string `yaml:"url"`
	// KeyFile holds the bouncer's API key, which nothing else may use.
	KeyFile config.File `yaml:"keyFile"`
	TLS     TLS         `yaml:"tls"`
	// Interval is the time between pulls, Timeout the longest silence on one,
	// Resync the time between full pulls.
	Interval time.Duration `yaml:"interval"`
	Timeout  time.Duration `yaml:"timeout"`
	Resync   time.Duration `yaml:"resync"`
}

// TLS is the TLS side of a connection to LAPI; each file is PEM.
type TLS struct {
	// CAFile, if given, is the only authority that is trusted.
	CAFile config.File `yaml:"caFile"`
	// CertFile and KeyFile are a client certificate, in place of an API key.
	CertFile config.File `yaml:"certFile"`
	KeyFile  config.File `yaml:"keyFile"`
	// ServerName is the name to verify where it is not the URL's host.
	ServerName string `yaml:"serverName"`
}

// Defaults is the Config that a file changes.
func Defaults() Config {
	return Config{Interval: 10 * time.Second, Timeout: 10 * time.Second, Resync: 12 * time.Minute}
}

// Check reports what in the section called key does not fit together.
func (c *Config) Check(check *config.Check, key string) {
	fail := func(name, format string, args ...any) { check.Fail(key+"."+name, format, args...) }
	if c.URL == "" {
		fail("url", "is missing: give LAPI's address, for instance http://crowdsec-service.crowdsec:8080")
	} else if where, err := parseURL(c.URL); err != nil {
		fail("url", "%v", err)
	} else if tls := where.base.Scheme == "https"; !tls && c.TLS != (TLS{}) {
		fail("tls", "is of no use, url is not https")
	}
	hasCert, hasKey := c.TLS.CertFile != "", c.TLS.KeyFile != ""
	switch {
	case hasCert && !hasKey:
		fail("tls.certFile", "needs a keyFile beside it")
	case hasKey && !hasCert:
		fail("tls.keyFile", "needs a certFile beside it")
	case hasCert && c.KeyFile != "":
		fail("keyFile", "excludes a client certificate in tls: keep one of them")
	case !hasCert && c.KeyFile == "":
		fail("keyFile", "is missing: name the file that holds the API key (cscli bouncers add NAME makes one), or give a client certificate in tls")
	}
	for _, d := range []struct {
		name           string
		value          time.Duration
		least, longest time.Duration
	}{
		{"interval", c.Interval, time.Second, time.Hour},
		{"timeout", c.Timeout, 100 * time.Millisecond, 5 * time.Minute},
		{"resync", c.Resync, time.Minute, 24 * time.Hour},
	} {
		if d.value < d.least || d.value > d.longest {
			fail(d.name, "%v: want %v to %v", d.value, d.least, d.longest)
		}
	}
}

// place is a URL understood.
type place struct {
	base   *url.URL // ends in a slash, as the library wants it
	socket string   // of a unix socket; base then is of no meaning
}

func parseURL(text string) (place, error) {
	u, err := url.Parse(text)
	switch {
	case err != nil:
		// The error would repeat the text, with a password perhaps in it.
		return place{}, fmt.Errorf("not a URL: want http://HOST:PORT, https://HOST:PORT or unix:///PATH/TO/SOCKET")
	case u.User != nil:
		return place{}, fmt.Errorf("must not hold a user or password: use keyFile")
	case u.RawQuery != "" || u.Fragment != "":
		return place{}, fmt.Errorf("%q must end with its path", text)
	case u.Scheme == "unix" && u.Host == "" && u.Path != "":
		return place{base: &url.URL{Scheme: "http", Host: "lapi", Path: "/"}, socket: u.Path}, nil
	case u.Scheme == "unix":
		return place{}, fmt.Errorf("%q: want unix:///PATH/TO/SOCKET", text)
	case u.Scheme != "http" && u.Scheme != "https":
		return place{}, fmt.Errorf("%q: want http://, https:// or unix://", text)
	case u.Host == "":
		return place{}, fmt.Errorf("%q has no host", text)
	}
	return place{base: &url.URL{Scheme: u.Scheme, Host: strings.ToLower(u.Host), Path: strings.TrimRight(u.Path, "/") + "/"}}, nil
}

// Agent is who asks: LAPI lists it, and shows usage metrics, under this type.
type Agent struct {
	Type    string // crowdsec-edgeward-nftables-bouncer
	Version string // v1.2.3
}

// String is the User-Agent header, in the only form that LAPI takes.
func (a Agent) String() string { return a.Type + "/" + a.Version }

// LAPI is one Local API, reached by one set of credentials.
type LAPI struct {
	// Client sends requests with the credentials. It sets no deadline, follows
	// no redirect and uses no proxy; do not use it for anything else.
	Client *http.Client
	// URL is the base address for Client, without a trailing slash.
	URL string

	config Config
	agent  Agent
	base   *url.URL
	log    *slog.Logger
}

// New returns the way to a LAPI. It reads no file and connects to nothing:
// that happens with each request. The config must have passed its Check.
func New(c Config, agent Agent, log *slog.Logger) (*LAPI, error) {
	where, err := parseURL(c.URL)
	if err != nil {
		return nil, fmt.Errorf("read LAPI's url: %w", err)
	}
	return &LAPI{
		Client: &http.Client{
			Transport: newCredentials(c, where.socket, log.With("component", "lapi")),
			// LAPI never redirects; following one would carry the key away.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		URL:    strings.TrimSuffix(where.base.String(), "/"),
		config: c,
		agent:  agent,
		base:   where.base,
		log:    log,
	}, nil
}

// Stream returns the decision stream for these scopes ("ip", "range"). LAPI
// keeps one cursor per key and address, so there must be no second one.
func (l *LAPI) Stream(scopes []string, sink lapi.Sink, log *slog.Logger) *lapi.Stream {
	return &lapi.Stream{
		Client:    l.Client,
		URL:       l.URL,
		UserAgent: l.agent.String(),
		Interval:  l.config.Interval,
		Timeout:   l.config.Timeout,
		Resync:    l.config.Resync,
		Scopes:    scopes,
		Sink:      sink,
		Log:       func() *slog.Logger { return log },
	}
}

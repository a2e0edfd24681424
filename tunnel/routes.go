package tunnel

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/edgeward/edgeward/internal/config"
)

// routes say where requests go. They never change; a new configuration makes
// new ones, and takes over the connections to the services that stay.
type routes struct {
	exact    map[Host][]*route
	wild     []wildcard // longest suffix first
	internal []Host
	origins  map[originKey]*origin
}

type wildcard struct {
	suffix string
	routes []*route
}

// route is one host, or one path of it.
type route struct {
	name   string // the host as configured: what logs and metrics call it
	tunnel string
	path   string // "" for all
	to     Service
	origin *origin
	header string // host header for the service, "" for the visitor's
	closed bool
}

// origin are the connections to services that are reached in the same way.
type origin struct {
	plain *http.Transport
	// streams speaks HTTP/2, nil where it is not asked for; upgrades always
	// need plain.
	streams *http.Transport
}

// originKey tells whether two configurations can share connections.
type originKey struct {
	serverName string
	ca         config.Secret // what the file holds
	insecure   bool
	connect    time.Duration
	response   time.Duration
	http2      bool
	clear      bool // no TLS
	idle       int
}

// newRoutes makes the routes of a configuration, with the connections of those
// that were there before where nothing about them changed.
func newRoutes(c *Config, before *routes) (*routes, error) {
	r := &routes{exact: map[Host][]*route{}, internal: c.internal(), origins: map[originKey]*origin{}}
	wild := map[string][]*route{}
	var errs []error
	for _, h := range c.Hosts {
		// Refused when the configuration was read, and here once more: a host
		// that is internal must not come to light by any other way of making a
		// Config.
		if h.Exposure != Public || slices.ContainsFunc(r.internal, func(i Host) bool { return i.Covers(h.Host) }) {
			continue
		}
		o, err := r.origin(&h, before)
		if err != nil {
			errs = append(errs, fmt.Errorf("connect %s%s to %s: %w", h.Host, h.Path, h.Service, err))
			continue
		}
		one := &route{
			name: string(h.Host), tunnel: h.Tunnel, path: h.Path, to: h.Service, origin: o,
			header: string(h.Origin.HostHeader), closed: h.Fail == "closed",
		}
		if suffix, ok := h.Host.Wildcard(); ok {
			wild[suffix] = append(wild[suffix], one)
		} else {
			r.exact[h.Host] = append(r.exact[h.Host], one)
		}
	}
	for _, list := range r.exact {
		longestPath(list)
	}
	for suffix, list := range wild {
		longestPath(list)
		r.wild = append(r.wild, wildcard{suffix, list})
	}
	slices.SortFunc(r.wild, func(a, b wildcard) int { return cmp.Compare(len(b.suffix), len(a.suffix)) })
	return r, errors.Join(errs...)
}

func longestPath(list []*route) {
	slices.SortFunc(list, func(a, b *route) int { return cmp.Compare(len(b.path), len(a.path)) })
}

// find returns the route of a request that came through a tunnel, or nil. The
// exact host comes before wildcards, the longer wildcard before the shorter,
// the longer path before the shorter; a host that is configured leaves nothing
// to a wildcard around it. An internal host has no route, whatever covers it.
func (r *routes) find(tunnel, host, urlPath string) *route {
	list, exact := r.exact[Host(host)]
	if !exact {
		for _, w := range r.wild {
			if strings.HasSuffix(host, w.suffix) && len(host) > len(w.suffix) {
				list = w.routes
				break
			}
		}
		if list == nil {
			return nil
		}
		for _, i := range r.internal {
			if i.Covers(Host(host)) {
				return nil
			}
		}
	}
	if len(list) > 1 || list[0].path != "" {
		urlPath = cleaned(urlPath)
	}
	for _, one := range list {
		if one.tunnel == tunnel && underPath(urlPath, one.path) {
			return one
		}
	}
	return nil
}

// cleaned is a path without dot segments and double slashes.
func cleaned(p string) string { return path.Clean("/" + p) }

// underPath reports whether p is prefix, or below it in whole segments.
func underPath(p, prefix string) bool {
	return strings.HasPrefix(p, prefix) && (len(p) == len(prefix) || prefix == "" || p[len(prefix)] == '/')
}

// hosts are the names of hosts for metrics: as configured, so that strangers
// cannot add to them.
func (r *routes) hosts() []string {
	var out []string
	for h := range r.exact {
		out = append(out, string(h))
	}
	for _, w := range r.wild {
		out = append(out, "*"+w.suffix)
	}
	slices.Sort(out)
	return out
}

// origin returns the connections for a host: those that are there already where
// they fit, new ones otherwise.
func (r *routes) origin(h *HostConfig, before *routes) (*origin, error) {
	key := originKey{
		serverName: h.Origin.ServerName, insecure: h.Origin.InsecureSkipVerify,
		connect: h.Origin.ConnectTimeout, response: h.Origin.ResponseTimeout,
		http2: h.Origin.HTTP2 || h.Origin.GRPC, clear: h.Service.Scheme == "http", idle: h.Origin.Connections,
	}
	if h.Origin.CAFile != "" {
		text, err := h.Origin.CAFile.Read()
		if err != nil {
			return nil, fmt.Errorf("read origin.caFile: %w", err)
		}
		key.ca = text
	}
	if o := r.origins[key]; o != nil {
		return o, nil
	}
	if before != nil {
		if o := before.origins[key]; o != nil {
			r.origins[key] = o
			return o, nil
		}
	}
	o, err := newOrigin(key)
	if err != nil {
		return nil, fmt.Errorf("read origin.caFile: %s %w", h.Origin.CAFile, err)
	}
	r.origins[key] = o
	return o, nil
}

// newOrigin makes connections; its one error is of the authority.
func newOrigin(key originKey) (*origin, error) {
	secure := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: key.serverName, InsecureSkipVerify: key.insecure}
	if key.ca != (config.Secret{}) {
		secure.RootCAs = x509.NewCertPool()
		if !secure.RootCAs.AppendCertsFromPEM([]byte(key.ca.Reveal())) {
			return nil, errors.New("holds no PEM certificate")
		}
	}
	dialer := &net.Dialer{Timeout: key.connect, KeepAlive: 30 * time.Second}
	transport := func(http2 bool) *http.Transport {
		protocols := new(http.Protocols)
		protocols.SetHTTP1(!http2 || !key.clear)
		protocols.SetHTTP2(http2 && !key.clear)
		protocols.SetUnencryptedHTTP2(http2 && key.clear)
		return &http.Transport{
			Proxy:                 nil, // the services are the operator's own
			DialContext:           dialer.DialContext,
			TLSClientConfig:       secure.Clone(),
			TLSHandshakeTimeout:   key.connect,
			ResponseHeaderTimeout: key.response,
			ExpectContinueTimeout: time.Second,
			IdleConnTimeout:       90 * time.Second,
			MaxIdleConns:          0, // bounded for each service
			MaxIdleConnsPerHost:   key.idle,
			DisableCompression:    true, // bodies go through as they are
			Protocols:             protocols,
			HTTP2: &http.HTTP2Config{
				// A service that is gone without a word is found out.
				SendPingTimeout: 30 * time.Second, PingTimeout: 15 * time.Second,
			},
		}
	}
	o := &origin{plain: transport(false)}
	if key.http2 {
		o.streams = transport(true)
	}
	return o, nil
}

// transport returns what carries a request, or an upgrade.
func (o *origin) transport(upgrade bool) http.RoundTripper {
	if o.streams != nil && !upgrade {
		return o.streams
	}
	return o.plain
}

// retire lets go of what after does not use any more. Requests under way keep
// their connections to the end.
func (r *routes) retire(after *routes) {
	if r == nil {
		return
	}
	for key, o := range r.origins {
		if after == nil || after.origins[key] != o {
			o.plain.CloseIdleConnections()
			if o.streams != nil {
				o.streams.CloseIdleConnections()
			}
		}
	}
}

// dialTimedOut reports whether err says that a service did not answer in time.
func dialTimedOut(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout() && !errors.Is(err, context.Canceled)
}

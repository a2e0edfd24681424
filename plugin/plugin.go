// Package plugin is edgeward's Traefik middleware: for each HTTP request it
// finds the client's address, looks it up among CrowdSec's decisions and counts
// it against the rate limits, and then either answers itself or lets the
// request go on, untouched.
//
// Traefik interprets it with Yaegi, which shapes the code: an interpreted
// statement costs about a hundred times a compiled one, and a method call
// several times a function call. So the request's path is short and leans on
// compiled calls of the standard library, and everything else is made ready
// when a middleware or a table is built. New starts nothing that can block or
// fail because something else is away; the engine that follows LAPI is shared
// by all middlewares of the process and outlives Traefik's reloads. A request
// that is let through gets the ResponseWriter that came, never a wrapped one,
// so that upgrades, streams and trailers work as without the plugin.
//
// It imports the standard library, golang.org/x/time/rate and edgeward's engine
// only, and nothing imports it.
package plugin

import (
	"context"
	"fmt"
	"html/template"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/edgeward/edgeward/internal/decision"
)

// epoch is the zero of the limiters' monotonic clock.
var epoch = time.Now()

// handler is one middleware on one router. It is right for every configuration;
// direct, limited, proxied, proxiedLimited and tunnelled are short ways for the
// most common.
type handler struct {
	next     http.Handler
	name     string
	settings *settings
	engine   *engine       // nil without LAPI
	sight    *atomic.Value // of *sight
	view     atomic.Value  // *decision.View of the table seen last
	trusted  *decision.Ranges
	tunnel   *tunnel      // nil without the preset
	peers    atomic.Value // *texts: connections of trusted proxies
	closed   bool         // refuse whom nothing can be known of
	limits   []*limit
	throttle *limiter
	page     *template.Template
	log      *blockLog
}

// limit is a rate limit's rule with the limiter that counts for it.
type limit struct {
	rule    limitRule
	limiter *limiter
	shown   []string // the RateLimit-Policy header, nil where headers are hidden
}

// throttlePolicy is what a throttle decision means.
var throttlePolicy = limitPolicy{Name: "throttle", Average: 30, Period: time.Minute, Burst: 10}

// New builds a middleware. It fails only on a configuration that makes no
// sense. ctx ends when Traefik drops the middleware.
func New(ctx context.Context, next http.Handler, config *Config, name string) (http.Handler, error) {
	if strconv.IntSize < 64 {
		return nil, fmt.Errorf("%s: edgeward needs a 64-bit Traefik", name)
	}
	s, err := understand(config)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	log := newLogger(os.Stdout, s)
	h := &handler{
		next:     next,
		name:     name,
		settings: s,
		trusted:  s.trusted,
		page:     page(s.pageFile, log),
		log:      newBlockLog(log, name, s.observe),
		sight:    &atomic.Value{},
	}
	announce(log, name, s)
	h.peers.Store(&texts{})
	if s.tunnel != nil {
		h.tunnel = newTunnel(*s.tunnel, log)
	}
	now := int64(time.Since(epoch))
	for _, rule := range s.limits {
		l := &limit{rule: rule, limiter: limiters.acquire(rule.policy, now)}
		if !rule.hide && !s.observe {
			l.shown = []string{l.limiter.policyValue}
		}
		h.limits = append(h.limits, l)
	}
	if s.lapi.url == "" {
		h.sight.Store(newSight(decision.NewStore().Compile()))
	} else {
		h.engine = engines.acquire(s.lapi, log)
		h.sight = &h.engine.sight
		h.closed = s.failClosed
		h.throttle = limiters.acquire(throttlePolicy, now)
	}
	context.AfterFunc(ctx, func() {
		defer func() { _ = recover() }()
		h.close()
	})
	return shortest(h), nil
}

// shortest returns the quickest handler that does what h does.
func shortest(h *handler) http.Handler {
	var one *limit
	if len(h.limits) == 1 && h.limits[0].rule.always && h.limits[0].rule.simple {
		one = h.limits[0]
	}
	if h.closed || one == nil && len(h.limits) > 0 || h.tunnel != nil && one != nil {
		return h
	}
	if h.tunnel != nil {
		return &tunnelled{next: h.next, sight: h.sight, tunnel: h.tunnel, all: h}
	}
	header := h.settings.header
	if header == "" {
		header = "X-Forwarded-For"
	}
	if h.trusted != nil && one != nil {
		return &proxiedLimited{next: h.next, sight: h.sight, peers: &h.peers, header: header, limiter: one.limiter, shown: one.shown, all: h}
	}
	if h.trusted != nil {
		return &proxied{next: h.next, sight: h.sight, peers: &h.peers, header: header, all: h}
	}
	if one != nil {
		return &limited{next: h.next, sight: h.sight, limiter: one.limiter, shown: one.shown, all: h}
	}
	return &direct{next: h.next, sight: h.sight, all: h}
}

// close gives back what New acquired. Requests still under way keep what they
// hold.
func (h *handler) close() {
	now := int64(time.Since(epoch))
	for _, l := range h.limits {
		limiters.release(l.limiter, now)
	}
	if h.engine != nil {
		limiters.release(h.throttle, now)
		engines.release(h.engine, h.settings.lapi)
	}
}

// ServeHTTP implements http.Handler for every configuration.
func (h *handler) ServeHTTP(rw http.ResponseWriter, req *http.Request) {
	parsed, _ := netip.ParseAddrPort(req.RemoteAddr)
	peer := bare(req, parsed.Addr().AsSlice())
	octets := peer
	text := req.RemoteAddr
	if h.trusted != nil {
		octets = clientOf(h.trusted, h.settings.header, req, peer)
		text = h.remembered(req, peer)
	} else if h.tunnel != nil {
		octets = identified(h.tunnel, req, peer)
		text = req.RemoteAddr
	}
	s := h.sight.Load().(*sight)
	if h.closed || decision.Covered(s.table, octets) {
		if judge(h, rw, req, octets) {
			return
		}
	} else if text != "" && len(octets) > 0 {
		note(h.sight, s, text, octets)
	}
	if h.limits != nil && overLimit(h, rw, req, octets) {
		return
	}
	h.next.ServeHTTP(rw, req)
}

// remembered returns the text by which a client behind a trusted proxy can be
// known again, a header that holds its address alone, and remembers the proxy's
// connection. It returns "" where there is no such text.
func (h *handler) remembered(req *http.Request, peer []byte) string {
	if !decision.Contains(h.trusted, peer) {
		return ""
	}
	header := h.settings.header
	if header == "" {
		header = "X-Forwarded-For"
	}
	values := req.Header[header]
	if len(values) != 1 || strings.IndexByte(values[0], ',') >= 0 || hop(values[0]) == nil {
		return ""
	}
	if peers := h.peers.Load().(*texts); !peers.remember(req.RemoteAddr, peer) {
		h.peers.CompareAndSwap(peers, &texts{})
	}
	return values[0]
}

// direct is the short way for a middleware that only enforces decisions on
// whoever makes the connection. It knows the connections that were found free
// under the table in force; all others are the handler's. It is the hot path.
type direct struct {
	next  http.Handler
	sight *atomic.Value
	all   *handler
}

// ServeHTTP implements http.Handler.
func (h *direct) ServeHTTP(rw http.ResponseWriter, req *http.Request) {
	if _, free := h.sight.Load().(*sight).free.octets.Load(req.RemoteAddr); free {
		h.next.ServeHTTP(rw, req)
		return
	}
	h.all.ServeHTTP(rw, req)
}

// limited is direct with one rate limit that counts every request by address.
// The four short ways repeat each other's lines, because a call would cost as
// much as they do.
type limited struct {
	next    http.Handler
	sight   *atomic.Value
	limiter *limiter
	shown   []string
	all     *handler
}

// ServeHTTP implements http.Handler.
func (h *limited) ServeHTTP(rw http.ResponseWriter, req *http.Request) {
	known, free := h.sight.Load().(*sight).free.octets.Load(req.RemoteAddr)
	if !free || len(known.(string)) != 4 {
		h.all.ServeHTTP(rw, req)
		return
	}
	retry, value := limitTake(h.limiter, int64(time.Since(epoch)), known.(string), "")
	if retry > 0 && exceeded(h.all, h.all.limits[0], rw, req, []byte(known.(string)), retry, value) {
		return
	}
	if h.shown != nil {
		header := rw.Header()
		header["Ratelimit-Policy"] = h.shown
		header["Ratelimit"] = value
	}
	h.next.ServeHTTP(rw, req)
}

// proxied is the short way behind trusted proxies. It knows the connections of
// trusted proxies, and the clients whose address, alone in the header, was found
// free under the table in force.
type proxied struct {
	next   http.Handler
	sight  *atomic.Value
	peers  *atomic.Value // of *texts
	header string
	all    *handler
}

// ServeHTTP implements http.Handler.
func (h *proxied) ServeHTTP(rw http.ResponseWriter, req *http.Request) {
	values := req.Header[h.header]
	if _, trusted := h.peers.Load().(*texts).octets.Load(req.RemoteAddr); trusted && len(values) == 1 {
		if _, free := h.sight.Load().(*sight).free.octets.Load(values[0]); free {
			h.next.ServeHTTP(rw, req)
			return
		}
	}
	h.all.ServeHTTP(rw, req)
}

// proxiedLimited is proxied with one rate limit that counts every request by
// address.
type proxiedLimited struct {
	next    http.Handler
	sight   *atomic.Value
	peers   *atomic.Value // of *texts
	header  string
	limiter *limiter
	shown   []string
	all     *handler
}

// ServeHTTP implements http.Handler.
func (h *proxiedLimited) ServeHTTP(rw http.ResponseWriter, req *http.Request) {
	values := req.Header[h.header]
	if _, trusted := h.peers.Load().(*texts).octets.Load(req.RemoteAddr); !trusted || len(values) != 1 {
		h.all.ServeHTTP(rw, req)
		return
	}
	known, free := h.sight.Load().(*sight).free.octets.Load(values[0])
	if !free || len(known.(string)) != 4 {
		h.all.ServeHTTP(rw, req)
		return
	}
	retry, value := limitTake(h.limiter, int64(time.Since(epoch)), known.(string), "")
	if retry > 0 && exceeded(h.all, h.all.limits[0], rw, req, []byte(known.(string)), retry, value) {
		return
	}
	if h.shown != nil {
		header := rw.Header()
		header["Ratelimit-Policy"] = h.shown
		header["Ratelimit"] = value
	}
	h.next.ServeHTTP(rw, req)
}

// bare makes the octets of a peer's address those of the one form that the
// engine knows.
func bare(req *http.Request, octets []byte) []byte {
	if len(octets) == 0 {
		// Not an address with a port; perhaps another plugin put one without.
		addr, _ := netip.ParseAddr(req.RemoteAddr)
		octets = addr.AsSlice()
	}
	if len(octets) == 16 {
		addr, _ := netip.AddrFromSlice(octets)
		octets = addr.Unmap().AsSlice()
	}
	return octets
}

// judge looks an address up for good and answers the request if it must not
// pass; it reports whether it did.
func judge(h *handler, rw http.ResponseWriter, req *http.Request, octets []byte) bool {
	now := time.Now()
	addr, _ := netip.AddrFromSlice(octets)
	// Asked before the table is taken, which only gets better after.
	unknown := h.closed && (len(octets) == 0 || h.engine.stale(now, h.settings.maxAge))
	table := h.sight.Load().(*sight).table
	view, _ := h.view.Load().(*decision.View)
	if view == nil || !view.Reads(table) {
		view = decision.NewView(table, h.settings.policy)
		h.view.Store(view)
	}
	verdict := view.Lookup(table, addr, now)
	switch verdict.Remediation {
	case decision.Allow:
		if !unknown || decision.Contains(h.settings.policy.Allow, octets) {
			return false
		}
		if !h.settings.observe {
			rw.Header().Set("Retry-After", "60")
		}
		return refuse(h, rw, req, refusal{Status: 503, Reason: "This site cannot check visitors just now. Try again in a minute.", Address: addr.String(), slug: "stale"}, decision.Verdict{})
	case decision.Throttle:
		key, group := limitKey(octets, 32, 64)
		retry, _ := limitTake(h.throttle, int64(time.Since(epoch)), key, group)
		if retry == 0 {
			return false
		}
		if !h.settings.observe {
			rw.Header().Set("Retry-After", strconv.Itoa(retry))
		}
		return refuse(h, rw, req, refusal{Status: 429, Reason: "Too many requests.", Address: addr.String(), Decision: verdict.ID, slug: "throttle"}, verdict)
	}
	// A captcha is a ban until there is one to solve.
	return refuse(h, rw, req, refusal{Status: h.settings.status, Reason: "Access from your network is blocked.", Address: addr.String(), Decision: verdict.ID, slug: "decision"}, verdict)
}

// refuse logs a refusal and, unless the middleware only observes, makes it.
func refuse(h *handler, rw http.ResponseWriter, req *http.Request, r refusal, v decision.Verdict) bool {
	h.log.block(req, r, v)
	if h.settings.observe {
		return false
	}
	answer(rw, req, r, h.page)
	return true
}

// overLimit counts a request against each limit that is for it and answers it
// if one is exceeded; it reports whether it did.
func overLimit(h *handler, rw http.ResponseWriter, req *http.Request, octets []byte) bool {
	now := int64(time.Since(epoch))
	policies, values := "", ""
	for _, l := range h.limits {
		if !l.rule.always && !limitApplies(&l.rule, req, octets) {
			continue
		}
		key, group := "", ""
		if l.rule.simple && len(octets) == 4 {
			key = string(octets)
		} else {
			key, group = requestKey(&l.rule, req, octets)
		}
		retry, value := limitTake(l.limiter, now, key, group)
		if retry > 0 {
			if exceeded(h, l, rw, req, octets, retry, value) {
				return true
			}
			continue
		}
		if l.shown == nil {
			continue
		}
		if policies == "" {
			policies = l.shown[0]
			values = value[0]
		} else {
			policies += ", " + l.shown[0]
			values += ", " + value[0]
		}
	}
	if policies != "" {
		header := rw.Header()
		header["Ratelimit-Policy"] = []string{policies}
		header["Ratelimit"] = []string{values}
	}
	return false
}

// requestKey names the count of a request, and the network whose counts are
// bounded together. A header's value is the client's to choose, so its counts
// are bounded by the client's own network.
func requestKey(rule *limitRule, req *http.Request, octets []byte) (key, group string) {
	key, group = limitKey(octets, rule.bits4, rule.bits6)
	if rule.header == "" {
		return key, group
	}
	value := req.Header.Get(rule.header)
	if value == "" {
		return key, group
	}
	if group == "" {
		group = key
	}
	if len(value) > limitMaxKey/2 {
		value = limitHash(value)
	}
	return "header " + rule.header + " " + value, group
}

// exceeded answers a request that is over a limit, or lets an observer note it.
func exceeded(h *handler, l *limit, rw http.ResponseWriter, req *http.Request, octets []byte, retry int, value []string) bool {
	if !h.settings.observe {
		header := rw.Header()
		header["Retry-After"] = []string{strconv.Itoa(retry)}
		if l.shown != nil {
			header["Ratelimit-Policy"] = l.shown
			header["Ratelimit"] = value
		}
	}
	addr, _ := netip.AddrFromSlice(octets)
	r := refusal{Status: 429, Reason: "Too many requests. Try again in " + strconv.Itoa(retry) + " s.", Address: addr.String(), slug: "rate limit", logged: l.rule.policy.Name}
	return refuse(h, rw, req, r, decision.Verdict{})
}

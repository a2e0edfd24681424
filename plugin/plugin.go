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
	"sync/atomic"
	"time"

	"github.com/edgeward/edgeward/internal/decision"
)

// epoch is the zero of the limiters' monotonic clock.
var epoch = time.Now()

// handler is one middleware on one router.
type handler struct {
	next     http.Handler
	name     string
	settings *settings
	engine   *engine // nil without LAPI
	table    *atomic.Value
	view     atomic.Value // *decision.View of the table seen last
	trusted  *decision.Ranges
	closed   bool // refuse whom nothing can be known of
	limits   []*limit
	throttle *limiter
	page     *template.Template
	log      *blockLog
}

// limit is a rate limit's rule with the limiter that counts for it.
type limit struct {
	rule    limitRule
	limiter *limiter
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
	}
	now := int64(time.Since(epoch))
	for _, rule := range s.limits {
		h.limits = append(h.limits, &limit{rule: rule, limiter: limiters.acquire(rule.policy, now)})
	}
	if s.lapi.url != "" {
		h.engine = engines.acquire(s.lapi, log)
		h.table = &h.engine.table
		h.closed = s.failClosed
		h.throttle = limiters.acquire(throttlePolicy, now)
	}
	context.AfterFunc(ctx, func() {
		defer func() { _ = recover() }()
		h.close()
	})
	return h, nil
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
		engines.release(h.settings.lapi)
	}
}

// ServeHTTP implements http.Handler. It is the hot path: most requests see one
// parsed address and one binary search.
func (h *handler) ServeHTTP(rw http.ResponseWriter, req *http.Request) {
	peer, err := netip.ParseAddrPort(req.RemoteAddr)
	addr := peer.Addr()
	if !addr.Is4() {
		addr = addr.Unmap().WithZone("")
	}
	if h.trusted != nil {
		addr = clientAddr(h.trusted, h.settings.header, req, addr)
	}
	if h.table != nil && (h.closed || decision.Covered(h.table.Load().(*decision.Table), addr)) {
		if judge(h, rw, req, addr) {
			return
		}
	}
	if h.limits != nil && err == nil && overLimit(h, rw, req, addr) {
		return
	}
	h.next.ServeHTTP(rw, req)
}

// judge looks an address up for good and answers the request if it must not
// pass; it reports whether it did.
func judge(h *handler, rw http.ResponseWriter, req *http.Request, addr netip.Addr) bool {
	now := time.Now()
	table := h.engine.current()
	view, _ := h.view.Load().(*decision.View)
	if view == nil || view.Table() != table {
		view = decision.NewView(table, h.settings.policy)
		h.view.Store(view)
	}
	verdict := view.Lookup(addr, now)
	switch verdict.Remediation {
	case decision.Allow:
		if !h.closed || !h.engine.stale(now, h.settings.maxAge) || decision.Contains(h.settings.policy.Allow, addr) {
			return false
		}
		return refuse(h, rw, req, refusal{Status: 503, Reason: "This site cannot tell friend from foe just now. Try again in a minute.", Address: addr.String(), slug: "stale"}, decision.Verdict{})
	case decision.Throttle:
		key, group := limitKey(addr, 32, 64)
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
func overLimit(h *handler, rw http.ResponseWriter, req *http.Request, addr netip.Addr) bool {
	now := int64(time.Since(epoch))
	policies, values := "", ""
	for _, l := range h.limits {
		if !limitApplies(&l.rule, req) || decision.Contains(l.rule.exempt, addr) {
			continue
		}
		key, group := "", ""
		if l.rule.header != "" {
			key = req.Header.Get(l.rule.header)
		}
		if key != "" {
			key = "\x00h" + key
			if len(key) > limitMaxKey {
				key = limitHash(key)
			}
		} else {
			key, group = limitKey(addr, l.rule.bits4, l.rule.bits6)
		}
		retry, value := limitTake(l.limiter, now, key, group)
		if retry > 0 {
			if !h.settings.observe {
				header := rw.Header()
				header["Retry-After"] = []string{strconv.Itoa(retry)}
				if !l.rule.hide {
					header["Ratelimit-Policy"] = []string{l.limiter.policyValue}
					header["Ratelimit"] = []string{value}
				}
			}
			r := refusal{Status: 429, Reason: "Too many requests. Try again in " + strconv.Itoa(retry) + " s.", Address: addr.String(), slug: "rate limit", logged: l.rule.policy.Name}
			if refuse(h, rw, req, r, decision.Verdict{}) {
				return true
			}
			continue
		}
		if l.rule.hide {
			continue
		}
		if policies == "" {
			policies, values = l.limiter.policyValue, value
		} else {
			policies += ", " + l.limiter.policyValue
			values += ", " + value
		}
	}
	if policies != "" && !h.settings.observe {
		header := rw.Header()
		header["Ratelimit-Policy"] = []string{policies}
		header["Ratelimit"] = []string{values}
	}
	return false
}

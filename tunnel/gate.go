package tunnel

import (
	"context"
	"errors"
	"html/template"
	"log/slog"
	"net/http"
	"net/textproto"
	"net/url"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/edgeward/edgeward/internal/daemon"
	"github.com/edgeward/edgeward/internal/decision"
	"github.com/edgeward/edgeward/internal/lapi"
)

// Gate is what every request of a tunnel goes through before it leaves the
// process. Make it with New, give its Sink to a decision stream, and hand For's
// transports to the connectors. It may be used by any number of goroutines.
type Gate struct {
	setup     atomic.Pointer[setup]
	feed      *feed
	throttle  *throttle
	counts    *counts
	exchanges exchanges
	refusals  *paced // lines on refused requests
	oddities  *paced // lines on requests as the edge sends none
	troubles  *paced // lines on services that do not answer
	log       *slog.Logger
	clock     clock
	began     time.Time

	mu sync.Mutex // one Apply at a time
}

// setup is a configuration ready for use.
type setup struct {
	config *Config
	routes *routes
	signer *Signer
	page   *template.Template
}

// New makes the gate of a configuration. Without a good key, authority or page
// where the configuration names one it fails: nothing is in force yet that could
// stay.
func New(c Config, log *slog.Logger) (*Gate, error) {
	return newGate(c, newClock(), log)
}

func newGate(c Config, clock clock, log *slog.Logger) (*Gate, error) {
	log = log.With("component", "gate")
	g := &Gate{
		feed: newFeed(c.policy(), clock.now, log), throttle: newThrottle(), counts: newCounts(),
		refusals: newPaced(log, slog.LevelInfo), oddities: newPaced(log, slog.LevelWarn), troubles: newPaced(log, slog.LevelWarn),
		log: log, clock: clock, began: clock.now(),
	}
	if err := g.Apply(c); err != nil {
		return nil, err
	}
	return g, nil
}

// Apply puts a configuration in force, at once and for every tunnel; requests
// under way end as they began, but for those of visitors whom it bans. On an
// error nothing changes. What lapi, listen, socket and logFormat say is for the
// next start. Applying the same configuration again reads the files that it
// names again.
func (g *Gate) Apply(c Config) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	before := g.setup.Load()
	var had *routes
	if before != nil {
		had = before.routes
	}
	next := &setup{config: &c}
	var errs [3]error
	next.routes, errs[0] = newRoutes(&c, had)
	next.page, errs[1] = readPage(c.Ban.PageFile)
	next.signer, errs[2] = NewSigner(c.Identity)
	if err := errors.Join(errs[:]...); err != nil {
		return err
	}
	g.setup.Store(next)
	g.feed.adopt(c.policy())
	g.counts.name(next.routes.hosts())
	had.retire(next.routes)
	g.cutBanned()
	return nil
}

// Pulled takes in how a pull of the decision stream ended.
func (g *Gate) Pulled(err error) {
	g.feed.mu.Lock()
	defer g.feed.mu.Unlock()
	if g.feed.told.Trouble = ""; err != nil {
		g.feed.told.Failures++
		g.feed.told.Trouble = daemon.OneLine(err)
	}
}

// Sink takes in the decision stream of the scopes in Scopes. A ban holds for the
// next request of a visitor, and cuts what is under way.
func (g *Gate) Sink() lapi.Sink {
	s := g.feed.sink()
	commit := s.Commit
	s.Commit = func() bool {
		doubt := commit()
		g.cutBanned()
		return doubt
	}
	return s
}

// Known is closed when decisions are known, or at once where nobody makes any.
// A connector does well to wait a little for that: hosts that fail closed would
// refuse their first visitors.
func (g *Gate) Known() <-chan struct{} {
	if !g.setup.Load().config.hasLAPI {
		now := make(chan struct{})
		close(now)
		return now
	}
	return g.feed.known
}

// For returns the way through the gate for the connector of one tunnel. It
// routes only the hosts of that tunnel. It answers every request that it can
// and returns an error only where the visitor is gone or a stream broke.
func (g *Gate) For(tunnel string) http.RoundTripper { return entrance{g, tunnel} }

type entrance struct {
	gate   *Gate
	tunnel string
}

// RoundTrip is http.RoundTripper.
func (e entrance) RoundTrip(req *http.Request) (*http.Response, error) {
	g := e.gate
	set := g.setup.Load()
	res, label, err := g.pass(set, e.tunnel, req)
	switch {
	case err != nil:
		g.counts.request(label, 0)
	default:
		g.counts.request(label, res.StatusCode)
	}
	return res, err
}

// Hosts of requests that have no route, as metrics call them.
const noHost = "none"

// pass is the way of one request; label is what metrics call its host.
func (g *Gate) pass(set *setup, tunnel string, req *http.Request) (res *http.Response, label string, err error) {
	in, reason := read(req)
	if reason != "" {
		g.counts.malformed(reason)
		g.oddities.line("request refused, it is not as the edge sends them", "reason", reason, "tunnel", tunnel,
			"host", shortened(req.Host), "ray", shortened(req.Header.Get("Cf-Ray")))
		return g.answer(set, req, refusal{Status: malformedStatus(reason), Reason: "This request makes no sense."}), noHost, nil
	}
	to := set.routes.find(tunnel, in.host, req.URL.Path)
	label = noHost
	if to != nil {
		label = to.name
	}
	seen := g.feed.seen.Load()
	if set.config.hasLAPI {
		if refused := g.judge(set, seen, req, in, to); refused != nil {
			return refused, label, nil
		}
	}
	if to == nil {
		return g.answer(set, req, refusal{Status: http.StatusNotFound, Reason: "There is no such site here.", Address: in.addr.String()}), label, nil
	}
	e, ok := g.exchanges.begin(req, in)
	if !ok {
		return g.overloaded(set, req, to), label, nil
	}
	handed := false // to the connector, which closes it
	defer func() {
		if !handed {
			e.end()
		}
	}()
	if g.feed.seen.Load() != seen || g.setup.Load() != set {
		g.recheck(e) // news that came since it was judged, and before it could be found
		if e.cut.Load() {
			return g.answer(set, req, e.banned(set)), label, nil
		}
	}
	out := in.outgoing(e.ctx, req, to)
	if out.Body != nil && out.Body != http.NoBody {
		e.request = out.Body
		out.Body = upload{e}
	}
	if set.signer != nil {
		in.set(IdentityHeader, set.signer.Sign(g.clock.wall(), in.scheme, in.addr, out.Method, out.Host))
	}
	res, err = e.roundTrip(to.origin.transport(in.upgrade), out)
	switch {
	case err == nil:
	case e.cut.Load():
		return g.answer(set, req, e.banned(set)), label, nil
	case req.Context().Err() != nil:
		return nil, label, err // nobody is there to be told
	default:
		return g.unanswered(set, req, to, err), label, nil
	}
	scrub(res)
	if res.StatusCode == http.StatusSwitchingProtocols && !in.upgrade {
		res.Body.Close()
		return g.unanswered(set, req, to, errUnasked), label, nil
	}
	if body := e.answered(res.Body); body != nil {
		res.Body, handed = body, true
		return res, label, nil
	}
	res.Body.Close()
	return g.answer(set, req, e.banned(set)), label, nil
}

// errUnasked is why the answer to a plain request is not passed on.
var errUnasked = errors.New("it switches protocols unasked")

// overloaded is what a visitor sees of a site when too much is going on.
func (g *Gate) overloaded(set *setup, req *http.Request, to *route) *http.Response {
	g.counts.unanswered(to.name, "overload")
	g.troubles.line("too many requests are under way", "host", to.name, "most", mostExchanges)
	res := g.answer(set, req, refusal{Status: http.StatusServiceUnavailable, Reason: "Too much is going on here just now. Try again in a moment."})
	res.Header.Set("Retry-After", "5")
	return res
}

// unanswered is what a visitor sees of a service that does not answer.
func (g *Gate) unanswered(set *setup, req *http.Request, to *route, err error) *http.Response {
	r := refusal{Status: http.StatusBadGateway, Reason: "The service behind this site does not answer."}
	kind := "refused"
	if dialTimedOut(err) {
		r.Status, r.Reason, kind = http.StatusGatewayTimeout, "The service behind this site takes too long to answer.", "timeout"
	}
	g.counts.unanswered(to.name, kind)
	g.troubles.line("origin service does not answer", "host", to.name, "service", to.to.String(), "err", err)
	return g.answer(set, req, r)
}

// judge answers a request that must not pass, and returns nil for all others.
func (g *Gate) judge(set *setup, s *sight, req *http.Request, in *incoming, to *route) *http.Response {
	now := g.clock.now()
	g.counts.processed(in.addr)
	verdict := s.lookup(in.addr, in.country, now)
	var r refusal
	wait := 0
	switch verdict.Remediation {
	case decision.Allow:
		if to == nil || !to.closed || !s.stale(now, set.config.Decisions.MaxAge) || decision.Contains(s.allow, in.addr.AsSlice()) {
			return nil
		}
		wait = 60
		r = refusal{Status: http.StatusServiceUnavailable, Reason: "This site cannot tell friend from foe just now. Try again in a minute.", slug: "stale"}
	case decision.Throttle:
		if wait = g.throttle.take(in.addr, now); wait == 0 {
			return nil
		}
		r = refusal{Status: http.StatusTooManyRequests, Reason: "Too many requests.", slug: "throttle"}
	default:
		// A captcha is a ban where there is none to solve.
		r = blocked(set)
	}
	r.Address, r.Decision = in.addr.String(), verdict.ID
	observe := set.config.Mode == Observe
	g.counts.refused(verdict, in.addr, r.slug, observe)
	message := "request refused"
	if observe {
		message = "request would be refused"
	}
	attrs := []any{
		"layer", "tunnel", "reason", r.slug, "status", r.Status, "address", r.Address, "method", shortened(req.Method),
		"host", shortened(in.host), "path", shortened(req.URL.Path),
	}
	if verdict.Remediation != decision.Allow {
		attrs = append(attrs, g.provenance(verdict, in.country)...)
	}
	g.refusals.line(message, attrs...)
	if observe {
		return nil
	}
	res := g.answer(set, req, r)
	if wait > 0 {
		res.Header.Set("Retry-After", strconv.Itoa(wait))
	}
	return res
}

// blocked is what a visitor is told who is banned.
func blocked(set *setup) refusal {
	return refusal{Status: set.config.Ban.Status, Reason: "Access from your network is blocked.", slug: "decision"}
}

// provenance is what a log line says of a decision on a visitor from country.
func (g *Gate) provenance(v decision.Verdict, country string) []any {
	value := v.Prefix.String()
	if !v.Prefix.IsValid() {
		value = country
	}
	return []any{
		"decision", v.ID, "remediation", v.Remediation.Name(), "type", shortened(v.Type), "value", value,
		"origin", shortened(v.Origin), "scenario", shortened(v.Scenario), "until", g.clock.shown(v.Until).UTC().Format(time.RFC3339),
	}
}

// outgoing is the request as the origin service gets it.
func (in *incoming) outgoing(ctx context.Context, req *http.Request, to *route) *http.Request {
	out := req.WithContext(ctx) // a copy
	out.URL = &url.URL{
		Scheme: to.to.Scheme, Host: to.to.Host,
		Path: req.URL.Path, RawPath: req.URL.RawPath, RawQuery: req.URL.RawQuery, ForceQuery: req.URL.ForceQuery,
	}
	out.Host = req.Host
	if to.header != "" {
		out.Host = to.header
	}
	// The map stays the one that the connector fills in after the body.
	for name := range out.Trailer {
		if canonical := textproto.CanonicalMIMEHeaderKey(name); claimsIdentity(canonical) || hopByHop[canonical] {
			delete(out.Trailer, name)
		}
	}
	out.RequestURI, out.Close, out.TransferEncoding, out.Header = "", false, nil, in.header
	address := in.addr.String()
	in.set("Cf-Connecting-Ip", address)
	in.set("X-Forwarded-For", address)
	in.set("X-Real-Ip", address)
	in.set("X-Forwarded-Proto", in.scheme)
	in.set("X-Forwarded-Host", req.Host)
	if in.upgrade {
		in.set("Connection", "Upgrade")
		in.set("Upgrade", "websocket")
		out.Body, out.ContentLength = nil, 0
	} else {
		if in.trailers {
			in.set("Te", "trailers")
		}
		if req.ContentLength == 0 {
			out.Body = http.NoBody // as a server reads a request without a length
		}
	}
	if _, ok := in.header["User-Agent"]; !ok {
		in.set("User-Agent", "") // or the transport would name itself
	}
	return out
}

// set sets a header that the gate stands for, whose name is in its usual form.
// The values lie side by side, each with no room for another, which spares the
// request an allocation for each.
func (in *incoming) set(name, value string) {
	if in.values == nil {
		in.values = make([]string, 0, 9) // an upgrade has the most
	}
	n := len(in.values)
	in.values = append(in.values, value)
	in.header[name] = in.values[n : n+1 : n+1]
}

package bouncer

import (
	"bytes"
	"encoding/json"
	"html/template"
	"log/slog"
	"mime"
	"net/http"
	"net/netip"
	"net/textproto"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/edgeward/edgeward/internal/config"
	"github.com/edgeward/edgeward/internal/crowdsec"
	"github.com/edgeward/edgeward/internal/decision"
)

// AuthConfig is the auth endpoint: where proxies (ingress-nginx, Traefik) ask
// whether their client may pass. It is off without Listen.
type AuthConfig struct {
	Listen netip.AddrPort `yaml:"listen"`
	// TrustedProxies are those whose word on the client's address counts.
	TrustedProxies []Source `yaml:"trustedProxies"`
	// Header is where they say it; X-Forwarded-For unless given.
	Header string `yaml:"header"`
	// Remediations are those that a request is refused for: no page can be shown
	// and nothing counted there, so a captcha is a ban or nothing.
	Remediations []Remediation `yaml:"remediations"`
	// FailClosed refuses everybody until the first decisions are known, and
	// whomever a trusted proxy does not name.
	FailClosed bool `yaml:"failClosed"`
}

func (a *AuthConfig) check(check *config.Check) {
	if !a.Listen.IsValid() {
		if check.Has("auth") && !check.Has("auth.listen") {
			check.Fail("auth.listen", "is missing: give the address and port where proxies ask, such as 192.168.1.10:9478")
		}
		return
	}
	if a.Listen.Port() == 0 {
		check.Fail("auth.listen", "want an address and a port such as 192.168.1.10:9478")
	}
	if len(a.TrustedProxies) == 0 {
		check.Fail("auth.trustedProxies", "is missing: name the addresses from which the proxies ask, such as 10.42.0.0/16, or no client is ever known")
	}
	for i, s := range a.TrustedProxies {
		for _, p := range s.Prefixes {
			if p.Bits() == 0 {
				check.Fail("auth.trustedProxies["+strconv.Itoa(i)+"]", "trusts everybody, and so whatever address a client gives itself")
			}
		}
	}
	for _, r := range a.Header {
		if r <= ' ' || r >= 0x7f || strings.ContainsRune(`"(),/:;<=>?@[\]{}`, r) {
			check.Fail("auth.header", "%q is not the name of a header", a.Header)
			break
		}
	}
	if len(a.Remediations) == 0 {
		check.Fail("auth.remediations", "is empty: nobody would be refused; leave it out to refuse for a ban or a captcha")
	}
}

// AuthPath is where proxies ask.
const AuthPath = "/v1/auth"

// What proxies are told, in the header X-Edgeward-Verdict and in metrics.
const (
	toldPass = iota // pass
	toldRefuse
	toldObserve
	toldUnknown // decisions, or the client, are not known, and the endpoint fails closed
	tellings
)

var toldWords = [tellings]string{"pass", "refuse", "observe", "unknown"}

// verdictHeader tells a proxy's log what was decided. It names no origin and no
// scenario, because a proxy may hand it on to the client.
const verdictHeader = "X-Edgeward-Verdict"

var (
	passValue = []string{"pass"}
	noLength  = []string{"0"}
)

// auth answers proxies from the enforcer's table. It waits for nothing.
type auth struct {
	config   *Config
	enforcer *enforcer
	trusted  *decision.Ranges
	header   string
	now      func() time.Time
	log      *slog.Logger

	told [2][tellings]atomic.Uint64 // by family

	mu      sync.Mutex
	refused map[offence]uint64
	second  int64 // of the lines that follow
	lines   int
	untold  int // refusals since the last line
	timer   *time.Timer
	strays  rarely // of peers that are not trusted
	unnamed rarely // of trusted ones that name nobody
}

// rarely is for a warning that comes once in a while, with how often it was meant.
type rarely struct {
	last time.Time
	n    int
}

// due counts, and returns the count where it is time to say it, else 0.
func (r *rarely) due(now time.Time) int {
	r.n++
	if !r.last.IsZero() && now.Sub(r.last) < listPatience {
		return 0
	}
	n := r.n
	r.last, r.n = now, 0
	return n
}

// offence is what refusals are counted by.
type offence struct{ origin, remediation, ipType string }

func newAuth(c *Config, e *enforcer, now func() time.Time, log *slog.Logger) *auth {
	a := &auth{config: c, enforcer: e, now: now, log: log.With("component", "auth", "layer", "auth"), refused: map[offence]uint64{}}
	var prefixes []netip.Prefix
	for _, s := range c.Auth.TrustedProxies {
		prefixes = append(prefixes, s.Prefixes...)
	}
	a.trusted = decision.NewRanges(prefixes)
	if h := textproto.CanonicalMIMEHeaderKey(c.Auth.Header); h != "X-Forwarded-For" {
		a.header = h
	}
	return a
}

// Auth is the handler of the auth endpoint, for any number of requests at once.
func (b *Bouncer) Auth() http.Handler { return b.auth }

// ServeHTTP answers with 200 where the client may pass and 403 where not,
// whatever the method.
func (a *auth) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != AuthPath {
		http.NotFound(w, r)
		return
	}
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil { // net/http gives nothing else
		http.Error(w, "no address", http.StatusInternalServerError)
		return
	}
	peer := bare(from.Addr())
	client, named := clientOf(a.trusted, a.header, r.Header, peer)
	if !named {
		a.misses(peer)
	}
	v, known := a.judge(client, named)
	family := 0
	if client.Is6() {
		family = 1
	}
	switch {
	case v.Remediation == decision.Allow && known:
		a.told[family][toldPass].Add(1)
		header := w.Header()
		header[verdictHeader] = passValue
		header["Content-Length"] = noLength
		w.WriteHeader(http.StatusOK)
	case v.Remediation == decision.Allow:
		a.told[family][toldUnknown].Add(1)
		refuse(w, r, "unknown", refusal{Reason: "This site cannot check visitors just now. Try again in a minute.", Address: client})
	default:
		a.refuse(w, r, client, peer, v, family)
	}
}

// judge returns what applies to an address, Allow where it may pass, and whether
// that is known. Where the client is not named, the address is its proxy's.
func (a *auth) judge(client netip.Addr, named bool) (decision.Verdict, bool) {
	closed := a.config.Auth.FailClosed
	known := !closed || named && a.enforcer.known.Load() // asked before the table is taken, which only gets better
	r := a.enforcer.reading.Load()
	covered := covers(r.table, client)
	if known && !covered {
		return decision.Verdict{}, true
	}
	if (named || !closed) && r.guarded.holds(single(client)) {
		return decision.Verdict{}, true
	}
	if _, _, waived := a.enforcer.orders.Load().waives(client, a.now()); waived {
		return decision.Verdict{}, true
	}
	if !covered {
		return decision.Verdict{}, false
	}
	view := r.refused
	if r.private.holds(single(client)) {
		view = r.refusedLocal
	}
	return view.Lookup(r.table, client, a.now()), known
}

func (a *auth) refuse(w http.ResponseWriter, r *http.Request, client, peer netip.Addr, v decision.Verdict, family int) {
	observe := a.config.Mode == Observe
	a.count(v, family)
	a.note(r, client, peer, v, observe)
	verdict := v.Remediation.Name() + " " + strconv.Itoa(v.ID)
	if observe {
		a.told[family][toldObserve].Add(1)
		header := w.Header()
		header[verdictHeader] = []string{"observe " + verdict}
		header["Content-Length"] = noLength
		w.WriteHeader(http.StatusOK)
		return
	}
	a.told[family][toldRefuse].Add(1)
	refuse(w, r, verdict, refusal{Reason: "Access from your network is blocked.", Address: client, Decision: v.ID})
}

func (a *auth) count(v decision.Verdict, family int) {
	class := decision.Class{Origin: v.Origin, Scenario: v.Scenario}
	o := offence{strings.ToValidUTF8(originOf(class), "?"), v.Remediation.Name(), ipType(family == 1)}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.refused[o]++
}

// eachRefused calls visit for what was refused, or in observe mode would have
// been.
func (a *auth) eachRefused(visit func(offence, uint64)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for o, n := range a.refused {
		visit(o, n)
	}
}

// counts are the answers so far.
func (a *auth) counts() map[string]uint64 {
	out := map[string]uint64{}
	for i, word := range toldWords {
		out[word] = a.told[0][i].Load() + a.told[1][i].Load()
	}
	return out
}

// totals adds the requests to the usage metrics for LAPI.
func (a *auth) totals(out crowdsec.Totals) {
	if !a.config.Auth.Listen.IsValid() {
		return
	}
	for family := range a.told {
		s := crowdsec.Series{Name: crowdsec.Processed, Unit: crowdsec.Request, IPType: ipType(family == 1)}
		for i := range a.told[family] {
			out[s] += a.told[family][i].Load()
		}
	}
	if a.config.Mode == Observe {
		return
	}
	a.eachRefused(func(o offence, n uint64) {
		out[crowdsec.Series{Name: crowdsec.Dropped, Unit: crowdsec.Request, Origin: o.origin, Remediation: o.remediation, IPType: o.ipType}] += n
	})
}

// A flood of refused requests must not become a flood of log lines.
const (
	linesPerSecond = 20
	untoldAfter    = 10 * time.Second
	shownBytes     = 200
)

// note logs a refusal, within the bound on lines. What is left out is told with
// the next line, or on its own a little later.
func (a *auth) note(r *http.Request, client, peer netip.Addr, v decision.Verdict, observe bool) {
	now := a.now()
	a.mu.Lock()
	if second := now.Unix(); second != a.second {
		a.second, a.lines = second, 0
	}
	if a.lines++; a.lines > linesPerSecond {
		a.untold++
		if a.timer == nil {
			a.timer = time.AfterFunc(untoldAfter, a.tell)
		}
		a.mu.Unlock()
		return
	}
	untold := a.untold
	a.untold = 0
	a.mu.Unlock()
	message := "request refused"
	if observe {
		message = "request would be refused"
	}
	attrs := []any{"reason", "decision", "status", http.StatusForbidden, "address", client, "proxy", peer, "decision", v.ID, "remediation", v.Remediation.Name(), "type", shortened(v.Type),
		"value", v.Prefix.String(), "origin", shortened(originOf(decision.Class{Origin: v.Origin, Scenario: v.Scenario})), "scenario", shortened(v.Scenario)}
	if v.Until.Before(decision.Forever) {
		attrs = append(attrs, "until", v.Until.UTC().Format(time.RFC3339))
	}
	if holds(a.trusted, peer) { // which says what it was asked for
		for _, f := range [][3]string{{"method", "X-Forwarded-Method", "X-Original-Method"}, {"host", "X-Forwarded-Host", ""}, {"path", "X-Forwarded-Uri", "X-Original-Url"}} {
			text := r.Header.Get(f[1])
			if text == "" {
				text = r.Header.Get(f[2])
			}
			if text != "" {
				attrs = append(attrs, f[0], shortened(text))
			}
		}
	}
	if untold > 0 {
		attrs = append(attrs, "suppressed", untold)
	}
	a.log.Info(message, attrs...)
}

func (a *auth) tell() {
	a.mu.Lock()
	untold := a.untold
	a.untold, a.timer = 0, nil
	a.mu.Unlock()
	if untold > 0 {
		a.log.Info("more refusals than are logged", "suppressed", untold)
	}
}

// Admits reports whether a peer may ask the auth endpoint. It says, now and then,
// who may not: most often that is our proxy, and nobody was told so.
func (b *Bouncer) Admits(peer netip.Addr) bool {
	a := b.auth
	if holds(a.trusted, peer) {
		return true
	}
	a.mu.Lock()
	n := a.strays.due(a.now())
	a.mu.Unlock()
	if n > 0 {
		a.log.Warn("a peer that is not in auth.trustedProxies is turned away", "peer", peer, "connections", n)
	}
	return false
}

// misses says, now and then, that a trusted proxy does not name its client.
func (a *auth) misses(peer netip.Addr) {
	a.mu.Lock()
	n := a.unnamed.due(a.now())
	a.mu.Unlock()
	if n == 0 {
		return
	}
	means := "its clients pass unless it is refused itself"
	if a.config.Auth.FailClosed {
		means = "its clients are refused"
	}
	header := a.header
	if header == "" {
		header = "X-Forwarded-For"
	}
	a.log.Warn("a trusted proxy names no client that can be read", "proxy", peer, "header", header, "requests", n, "means", means)
}

func shortened(text string) string {
	if len(text) > shownBytes {
		return text[:shownBytes] + "..."
	}
	return text
}

// refusal is what a refused client is told: nothing that is the operator's.
type refusal struct {
	Reason   string
	Address  netip.Addr
	Decision int // 0 for none
}

var refusalPage = template.Must(template.New("page").Parse(`<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex"><title>403</title></head>
<body><h1>{{.Reason}}</h1>
<p>If you think this is a mistake, tell the owner of this site: address {{.Address}}{{if .Decision}}, decision {{.Decision}}{{end}}.</p></body></html>
`))

// refuse answers with 403, the one status that auth_request hands on, in the form
// that the client asked for: Traefik shows it, nginx shows its own page.
func refuse(w http.ResponseWriter, r *http.Request, verdict string, is refusal) {
	header := w.Header()
	header.Set(verdictHeader, verdict)
	header.Set("Cache-Control", "no-store")
	header.Set("Vary", "Accept")
	header.Set("X-Content-Type-Options", "nosniff")
	var body bytes.Buffer
	switch preferred(r.Header.Get("Accept")) {
	case "text/html":
		header.Set("Content-Type", "text/html; charset=utf-8")
		header.Set("Content-Security-Policy", "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
		_ = refusalPage.Execute(&body, is) // into memory, of two fields
	case "application/json":
		header.Set("Content-Type", "application/problem+json")
		problem := map[string]any{"type": "about:blank", "title": "Forbidden", "status": http.StatusForbidden, "detail": is.Reason}
		if is.Decision != 0 {
			problem["decision"] = is.Decision
		}
		_ = json.NewEncoder(&body).Encode(problem)
	default:
		header.Set("Content-Type", "text/plain; charset=utf-8")
		body.WriteString(is.Reason + "\n")
	}
	header.Set("Content-Length", strconv.Itoa(body.Len()))
	w.WriteHeader(http.StatusForbidden)
	_, _ = w.Write(body.Bytes()) // net/http leaves it out for HEAD
}

// preferred picks one of text/html, application/json and text/plain by an Accept
// header: the highest quality wins, in this order among equals; who names none of
// them gets text.
func preferred(accept string) string {
	const longest = 512 // each item costs, and strangers write them
	best, top := "text/plain", 0.0
	for item := range strings.SplitSeq(accept[:min(len(accept), longest)], ",") {
		media, params, err := mime.ParseMediaType(item)
		if err != nil {
			continue
		}
		quality := 1.0
		if q, ok := params["q"]; ok {
			if quality, err = strconv.ParseFloat(q, 64); err != nil || !(quality <= 1) {
				continue
			}
		}
		kind, rank := "", 0.0
		switch {
		case media == "text/html" || media == "application/xhtml+xml":
			kind, rank = "text/html", 0.0002
		case media == "application/json" || strings.HasSuffix(media, "+json"):
			kind, rank = "application/json", 0.0001
		case media == "text/plain":
			kind = media
		default:
			continue
		}
		if quality > 0 && quality+rank > top {
			best, top = kind, quality+rank
		}
	}
	return best
}

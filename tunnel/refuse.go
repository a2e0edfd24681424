package tunnel

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"html/template"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/edgeward/edgeward/internal/config"
)

// refusal is what a visitor is told whose request goes no further. It never
// names the scenario or the origin: those are the operator's, in the log, under
// the decision's id.
type refusal struct {
	Status   int
	Reason   string // one sentence
	Address  string
	Decision int // 0 for none
	slug     string
}

// longestPage is as much as a watched file may hold, in bytes; everybody who is
// refused gets it.
const longestPage = 1 << 20

// builtinPage is shown to browsers unless ban.pageFile gives another. It is the
// plugin's, so that a visitor sees no difference.
const builtinPage = `<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex"><title>{{.Status}}</title>
<style>body{font-family:system-ui,sans-serif;max-width:34rem;margin:18vh auto 0;padding:0 1.5rem;color:#222;background:#fff}
h1{font-size:1.4rem;margin:0 0 .6rem}p{line-height:1.5}small{color:#666}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#161616}small{color:#999}}</style></head>
<body><h1>{{.Reason}}</h1>
<p>If you think this is a mistake, tell the owner of this site the line below.</p>
<p><small>{{if .Address}}address {{.Address}}{{end}}{{if .Decision}} &middot; decision {{.Decision}}{{end}}</small></p></body></html>
`

// readPage returns the template for browsers.
func readPage(file config.File) (*template.Template, error) {
	if file == "" {
		return template.New("page").Parse(builtinPage)
	}
	text, err := os.ReadFile(string(file))
	if err != nil {
		return nil, fmt.Errorf("read ban.pageFile: %w", err)
	}
	if len(text) > longestPage {
		return nil, fmt.Errorf("read ban.pageFile: %s is over 1 MiB: make it smaller", file)
	}
	if len(bytes.TrimSpace(text)) == 0 {
		return nil, fmt.Errorf("read ban.pageFile: %s is empty: leave the key out for the page that is built in", file)
	}
	page, err := template.New("page").Parse(string(text))
	if err == nil {
		err = page.Execute(io.Discard, refusal{Status: 403, Reason: "test", Address: "192.0.2.1", Decision: 1})
	}
	if err != nil {
		return nil, fmt.Errorf("read ban.pageFile: %s: %w", file, err)
	}
	return page, nil
}

// answer makes the response that a request gets from the gate itself, in the
// form that the visitor asked for. No cache may keep it: the next visitor is
// another one.
func (g *Gate) answer(set *setup, req *http.Request, r refusal) *http.Response {
	header := http.Header{
		"Cache-Control":          {"no-store"},
		"Vary":                   {"Accept"},
		"X-Content-Type-Options": {"nosniff"},
	}
	var body bytes.Buffer
	switch preferred(req.Header.Get("Accept")) {
	case "html":
		header.Set("Content-Type", "text/html; charset=utf-8")
		header.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
		if err := set.page.Execute(&body, r); err != nil {
			body.Reset()
			body.WriteString(strconv.Itoa(r.Status))
		}
	case "json":
		header.Set("Content-Type", "application/problem+json")
		problem := map[string]any{"type": "about:blank", "title": http.StatusText(r.Status), "status": r.Status, "detail": r.Reason}
		if r.Decision != 0 {
			problem["decision"] = r.Decision
		}
		text, _ := json.Marshal(problem) // texts and numbers
		body.Write(text)
		body.WriteByte('\n')
	default:
		header.Set("Content-Type", "text/plain; charset=utf-8")
		body.WriteString(r.Reason)
		if r.Decision != 0 {
			fmt.Fprintf(&body, " (decision %d)", r.Decision)
		}
		body.WriteByte('\n')
	}
	header.Set("Content-Length", strconv.Itoa(body.Len()))
	res := &http.Response{
		Status: strconv.Itoa(r.Status) + " " + http.StatusText(r.Status), StatusCode: r.Status,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: header, ContentLength: int64(body.Len()), Body: io.NopCloser(&body), Request: req,
	}
	if req.Method == http.MethodHead {
		res.Body = http.NoBody
	}
	if req.Body != nil {
		_ = req.Body.Close() // as a RoundTripper must
	}
	return res
}

// preferred picks html, json or text by an Accept header: the highest quality
// wins, html before json before text among equals; who names none of them gets
// text.
func preferred(accept string) string {
	// Longer than any browser's; each item costs, and strangers write them.
	accept = accept[:min(len(accept), 512)]
	best, top := "text", 0.0
	for _, item := range strings.SplitN(accept, ",", 17) {
		media, params, _ := strings.Cut(item, ";")
		quality := 1.0
		for p := range strings.SplitSeq(params, ";") {
			if text, ok := strings.CutPrefix(strings.TrimSpace(p), "q="); ok {
				quality, _ = strconv.ParseFloat(text, 64) // what is no number is no wish
			}
		}
		kind, rank := "", 0.0
		switch media = strings.ToLower(strings.TrimSpace(media)); {
		case media == "text/html" || media == "application/xhtml+xml":
			kind, rank = "html", 0.002
		case media == "application/json" || strings.HasSuffix(media, "+json"):
			kind, rank = "json", 0.001
		case media == "text/plain":
			kind = "text"
		default:
			continue
		}
		if quality > 0 && quality+rank > top {
			best, top = kind, quality+rank
		}
	}
	return best
}

// throttle holds the buckets of visitors whom a decision throttles.
type throttle struct {
	mu      sync.Mutex
	buckets map[netip.Prefix]*rate.Limiter
	rest    *rate.Limiter // shared by all for whom there is no room
	swept   time.Time
}

// What a throttle decision means, as in the plugin: 30 requests a minute, 10 at
// once. An IPv6 visitor is its /64.
const (
	throttleEvery  = 2 * time.Second
	throttleBurst  = 10
	throttleBounds = 65536
)

func newThrottle() *throttle {
	return &throttle{buckets: map[netip.Prefix]*rate.Limiter{}, rest: rate.NewLimiter(rate.Every(throttleEvery), throttleBurst)}
}

// take counts a request and returns 0 if it may pass, or after how many seconds
// it may be tried again.
func (t *throttle) take(addr netip.Addr, now time.Time) (wait int) {
	bits := 32
	if addr.Is6() {
		bits = 64
	}
	key, _ := addr.Prefix(bits)
	t.mu.Lock()
	defer t.mu.Unlock()
	bucket := t.buckets[key]
	if bucket == nil {
		if len(t.buckets) >= throttleBounds && now.Sub(t.swept) >= throttleEvery {
			t.swept = now
			for k, b := range t.buckets {
				if b.TokensAt(now) >= throttleBurst { // as good as new
					delete(t.buckets, k)
				}
			}
		}
		if bucket = t.rest; len(t.buckets) < throttleBounds {
			bucket = rate.NewLimiter(rate.Every(throttleEvery), throttleBurst)
			t.buckets[key] = bucket
		}
	}
	if bucket.AllowN(now, 1) {
		return 0
	}
	missing := 1 - bucket.TokensAt(now)
	return max(1, int((time.Duration(missing*float64(throttleEvery))+time.Second-1)/time.Second))
}

// paced writes log lines, so many a second: a flood of requests must not become
// a flood of lines. What is left out is told with the next line, or on its own
// ten seconds later.
type paced struct {
	log   *slog.Logger
	level slog.Level
	pace  *rate.Limiter

	mu     sync.Mutex
	untold int
	timer  *time.Timer
}

const linesPerSecond = 20

func newPaced(log *slog.Logger, level slog.Level) *paced {
	return &paced{log: log, level: level, pace: rate.NewLimiter(linesPerSecond, linesPerSecond)}
}

func (p *paced) line(message string, attrs ...any) {
	p.mu.Lock()
	if !p.pace.Allow() {
		if p.untold++; p.timer == nil {
			p.timer = time.AfterFunc(10*time.Second, p.tell)
		}
		p.mu.Unlock()
		return
	}
	untold := p.untold
	p.untold = 0
	p.mu.Unlock()
	if untold > 0 {
		attrs = append(attrs, "suppressed", untold)
	}
	p.log.Log(context.Background(), p.level, message, attrs...)
}

func (p *paced) tell() {
	p.mu.Lock()
	untold := p.untold
	p.untold, p.timer = 0, nil
	p.mu.Unlock()
	if untold > 0 {
		p.log.Log(context.Background(), p.level, "more such lines than are logged", "suppressed", untold)
	}
}

package plugin

import (
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/edgeward/edgeward/internal/decision"
)

// newLogger returns the log of one middleware.
func newLogger(w io.Writer, s *settings) *slog.Logger {
	options := &slog.HandlerOptions{}
	switch s.logLevel {
	case "debug":
		options.Level = slog.LevelDebug
	case "warn":
		options.Level = slog.LevelWarn
	case "error":
		options.Level = slog.LevelError
	default:
		options.Level = slog.LevelInfo
	}
	if s.logText {
		return slog.New(slog.NewTextHandler(w, options))
	}
	return slog.New(slog.NewJSONHandler(w, options))
}

// linesPerSecond bounds the block lines of the whole process: a flood of
// refused requests must not become a flood of log lines.
const linesPerSecond = 20

// linePace counts the lines of the running second for all middlewares.
type linePace struct {
	mu     sync.Mutex
	second int64
	lines  int
}

var blockPace linePace

// grant reports whether one more line may be written in the second of now.
func (p *linePace) grant(now time.Time) bool {
	second := now.Unix()
	p.mu.Lock()
	defer p.mu.Unlock()
	if second != p.second {
		p.second = second
		p.lines = 0
	}
	p.lines++
	return p.lines <= linesPerSecond
}

// blockCount counts the refusals of one middleware, over all its routers and
// over Traefik's reloads.
type blockCount struct {
	mu     sync.Mutex
	total  int // so far
	untold int // since the last line
	timer  *time.Timer
}

// blockCounts holds the counts by the middleware's name.
var blockCounts sync.Map

// blockLog writes one line for each refusal of one middleware on one router.
type blockLog struct {
	log     *slog.Logger
	pace    *linePace
	name    string
	message string
	count   *blockCount
}

func newBlockLog(log *slog.Logger, name string, observe bool) *blockLog {
	count, _ := blockCounts.LoadOrStore(name, &blockCount{})
	b := &blockLog{log: log, pace: &blockPace, name: name, message: "request refused", count: count.(*blockCount)}
	if observe {
		b.message = "request would be refused"
	}
	return b
}

// block counts a refusal and, within the bound on lines, logs it. What is left
// out is told with the next line, or on its own ten seconds later.
func (b *blockLog) block(req *http.Request, r refusal, v decision.Verdict) {
	c := b.count
	c.mu.Lock()
	c.total++
	if !b.pace.grant(time.Now()) {
		c.untold++
		if c.timer == nil {
			c.timer = time.AfterFunc(10*time.Second, func() {
				defer func() { _ = recover() }()
				b.tell()
			})
		}
		c.mu.Unlock()
		return
	}
	total, untold := c.total, c.untold
	c.untold = 0
	c.mu.Unlock()
	attrs := []any{
		"component", "plugin", "layer", "ingress", "middleware", b.name, "reason", r.slug, "status", r.Status,
		"address", r.Address, "method", shortened(req.Method), "host", shortened(req.Host), "path", shortened(req.URL.Path), "total", total,
	}
	if v.Remediation != decision.Allow {
		attrs = append(attrs, "decision", v.ID, "remediation", v.Remediation.Name(), "type", shortened(v.Type), "value", v.Prefix.String(), "origin", shortened(v.Origin), "scenario", shortened(v.Scenario), "until", v.Until.UTC().Format(time.RFC3339))
	}
	if r.logged != "" {
		attrs = append(attrs, "limit", r.logged)
	}
	if untold > 0 {
		attrs = append(attrs, "suppressed", untold)
	}
	b.log.Info(b.message, attrs...)
}

// tell logs how many refusals went unlogged.
func (b *blockLog) tell() {
	c := b.count
	c.mu.Lock()
	total, untold := c.total, c.untold
	c.untold = 0
	c.timer = nil
	c.mu.Unlock()
	if untold > 0 {
		b.log.Info("more refusals than are logged", "component", "plugin", "layer", "ingress", "middleware", b.name, "suppressed", untold, "total", total)
	}
}

// shortened bounds what a stranger can put into a log line.
func shortened(text string) string {
	if len(text) > 200 {
		return text[:200] + "..."
	}
	return text
}

// told holds what each middleware last said of itself, by its name.
var told sync.Map

// announce says what a middleware enforces, once for each change of it and not
// for each of its routers.
func announce(log *slog.Logger, name string, s *settings) {
	mode := "enforce"
	if s.observe {
		mode = "observe"
	}
	from := s.lapi.url
	if s.lapi.socket != "" {
		from = "unix://" + s.lapi.socket
	}
	limits := []string{}
	for _, rule := range s.limits {
		limits = append(limits, rule.policy.Name)
	}
	says := mode + " " + from + " " + strings.Join(limits, ",")
	if before, ok := told.Load(name); ok && before.(string) == says {
		return
	}
	told.Store(name, says)
	log.Info("middleware in force", "component", "plugin", "version", Version, "middleware", name, "mode", mode, "lapi", from,
		"interval", s.lapi.interval.String(), "failClosed", s.failClosed, "rateLimits", limits, "trustedProxies", s.trusted != nil)
}

package plugin

import (
	"io"
	"log/slog"
	"net/http"
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

// blockLog writes one line for each refusal of one middleware on one router.
type blockLog struct {
	log     *slog.Logger
	pace    *linePace
	name    string
	message string

	mu     sync.Mutex
	total  int // refusals so far
	untold int // refusals since the last line
	timer  *time.Timer
}

func newBlockLog(log *slog.Logger, name string, observe bool) *blockLog {
	b := &blockLog{log: log, pace: &blockPace, name: name, message: "request refused"}
	if observe {
		b.message = "request would be refused"
	}
	return b
}

// block counts a refusal and, within the bound on lines, logs it. What is left
// out is told with the next line, or on its own ten seconds later.
func (b *blockLog) block(req *http.Request, r refusal, v decision.Verdict) {
	b.mu.Lock()
	b.total++
	if !b.pace.grant(time.Now()) {
		b.untold++
		if b.timer == nil {
			b.timer = time.AfterFunc(10*time.Second, func() {
				defer func() { _ = recover() }()
				b.tell()
			})
		}
		b.mu.Unlock()
		return
	}
	total, untold := b.total, b.untold
	b.untold = 0
	b.mu.Unlock()
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
	b.mu.Lock()
	total, untold := b.total, b.untold
	b.untold = 0
	b.timer = nil
	b.mu.Unlock()
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

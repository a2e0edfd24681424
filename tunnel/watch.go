package tunnel

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/edgeward/edgeward/internal/config"
	"github.com/edgeward/edgeward/internal/daemon"
)

// Watcher keeps what is in force in step with a configuration file and the files
// that it names. It reads them again every few seconds, because that works for
// mounts of every kind and costs nothing. It is a daemon.Task.
type Watcher struct {
	path  string
	apply func(context.Context, Config) error
	log   *slog.Logger
	every time.Duration
	now   chan struct{}

	// What the file last said, of the one goroutine that reads it: to take ten
	// thousand peers apart costs more than to see that nothing changed.
	text   []byte
	parsed Config
	bad    []byte // what was refused last
	why    error
	good   bool // something was applied whole
	asked  bool // for this turn, by Reload: what is still wrong is said again

	mu      sync.Mutex
	seen    [sha256.Size]byte // what was applied last, or refused last
	trouble string            // why it was refused
	pause   time.Duration     // before it is tried again
	again   time.Time
}

// watchInterval is how often files are looked at, and how long the first pause
// is before what was refused is tried again; the pauses double up to
// longestPause.
const (
	watchInterval = 5 * time.Second
	longestPause  = 5 * time.Minute
)

// NewWatcher reads the file at path, which must be right, and returns what it
// says with the watcher of what it becomes. The log is what logger makes of that;
// the file is not read twice, because after a restart peers wait for it.
func NewWatcher(path string, logger func(Config) (*slog.Logger, error)) (*Watcher, Config, error) {
	w := &Watcher{path: path, every: watchInterval, now: make(chan struct{}, 1)}
	c, _, err := w.load()
	if err != nil {
		return nil, Config{}, err
	}
	log, err := logger(c)
	if err != nil {
		return nil, Config{}, err
	}
	w.log = log.With("component", "config")
	return w, c, nil
}

// OnChange says what is called, by one goroutine, with the configuration at the
// start and each that comes after and is right. What it refuses leaves the last
// good state and is tried again, ever more slowly; each reason is logged once.
// It must be set before Run.
func (w *Watcher) OnChange(apply func(context.Context, Config) error) { w.apply = apply }

// String names the task.
func (w *Watcher) String() string { return "configuration" }

// Reload has the files read now, and applied whether they changed or not: what
// somebody wishes to be tried again is.
func (w *Watcher) Reload() {
	select {
	case w.now <- struct{}{}:
	default:
	}
}

// Trouble says why the configuration in force is not the file's; empty if it is.
func (w *Watcher) Trouble() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.trouble
}

// Run looks until ctx ends.
func (w *Watcher) Run(ctx context.Context) error {
	ticker := time.NewTicker(w.every)
	defer ticker.Stop()
	for {
		w.turn(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		case <-w.now:
			w.asked = true
			w.mu.Lock()
			w.seen = [sha256.Size]byte{}
			w.mu.Unlock()
		}
	}
}

// turn applies what changed, and again what was refused: the reason may lie
// outside of the files.
func (w *Watcher) turn(ctx context.Context) {
	c, sum, err := w.load()
	read := err == nil
	if read {
		w.mu.Lock()
		known := sum == w.seen && (w.trouble == "" || time.Now().Before(w.again))
		w.mu.Unlock()
		if known {
			return
		}
		err = w.apply(ctx, c)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	before := w.trouble
	if w.asked {
		w.asked, before = false, ""
	}
	w.good = w.good || err == nil
	w.pause = max(w.every, min(2*w.pause, longestPause))
	if sum != w.seen || err == nil {
		w.pause = w.every
	}
	w.trouble, w.seen, w.again = "", sum, time.Now().Add(w.pause)
	if err != nil {
		w.trouble = daemon.OneLine(err)
	}
	var problems config.Problems
	switch {
	case err != nil && w.trouble == before || ctx.Err() != nil:
	case errors.As(err, &problems):
		for _, p := range problems {
			w.log.Error("configuration is wrong, keeping the last good one", "err", p.String())
		}
	case !read:
		w.log.Error("cannot read the configuration, keeping the last good one", "err", err)
	case err != nil && !w.good:
		w.log.Error("cannot apply all of the configuration, trying again", "err", err)
	case err != nil:
		w.log.Error("cannot apply all of the configuration, what was good before stays", "err", err)
	default:
		w.log.Info("configuration accepted", "hosts", len(c.Hosts), "tunnels", len(c.Tunnels), "peers", len(c.Peers))
	}
}

// load reads the configuration, with a sum that tells it and the files that it
// names from others.
func (w *Watcher) load() (c Config, sum [sha256.Size]byte, err error) {
	text, err := os.ReadFile(w.path)
	if err != nil {
		return c, sum, fmt.Errorf("read configuration: %w", err)
	}
	if w.why != nil && bytes.Equal(text, w.bad) {
		return c, sum, w.why
	}
	if w.text == nil || !bytes.Equal(text, w.text) {
		if c, err = Parse(w.path, text); err != nil {
			w.bad, w.why = text, err
			return c, sum, err // with no sum: whatever is right after that is news
		}
		w.text, w.parsed = text, c
	}
	w.bad, w.why = nil, nil
	c = w.parsed
	h := sha256.New()
	fmt.Fprintf(h, "%d\n%s", len(text), text)
	for _, f := range c.Files() {
		secret, err := f.Read()
		fmt.Fprintf(h, "%s\n%d\n%s\n%v\n", f, len(secret.Reveal()), secret.Reveal(), err)
	}
	h.Sum(sum[:0])
	return c, sum, nil
}

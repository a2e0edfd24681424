// Package reconcile is the loop that keeps what is in step with what is wished.
// It decides when: at once after a trigger, at the moment that the last turn
// asked for (the next expiry, say), and on an interval, so that what nobody
// reported is found all the same. What a turn does is the caller's: read,
// diff, apply, from the start each time.
//
// A turn that fails, panics or overruns is tried again after a pause that
// grows, with jitter, so that many nodes do not march in step. The loop never
// gives up and never undoes anything: what the last good turn left stays as it
// is. It does no I/O, keeps no history beyond one State, and knows nothing of
// decisions, kernels or clouds. The bouncer and the tunnel call it, one Loop
// for each thing that they keep.
package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime/debug"
	"sync"
	"time"
)

// Turn brings one thing into step. It returns the time at which it wants to be
// called again at the latest; the zero time leaves that to the interval. With
// an error that time does not count. ctx ends when the loop does, and at the
// Limit.
type Turn func(ctx context.Context) (next time.Time, err error)

// Config says how a Loop turns. What is zero has the default named with it.
type Config struct {
	// Name says in the log what is kept in step.
	Name string
	// Turn is called by one goroutine, never twice at once.
	Turn Turn
	// Interval is the longest time between turns, 10 minutes. Each wait is
	// shortened at random by up to a tenth.
	Interval time.Duration
	// Limit is the longest that a turn may take, 1 minute.
	Limit time.Duration
	// Retry is the pause after a first failure, 1 second; each further one
	// doubles it, up to LongestRetry, 1 minute. Each is shortened at random by
	// up to a fifth. A trigger ends a longer pause, never the first one: a
	// turn that fails at once must not run hot on a stream of triggers.
	Retry        time.Duration
	LongestRetry time.Duration
	// Log is told when turns begin to fail, when the reason changes, and when
	// they succeed again.
	Log *slog.Logger
}

// soonest is the least time between the end of a turn and the time that it may
// ask for, so that a turn that asks for the past does not run hot.
const soonest = 10 * time.Millisecond

// State is how a loop stands.
type State struct {
	Turns    uint64        // turns that ended, well or not
	Failures uint64        // those that failed
	InARow   int           // failures since the last good turn
	LastGood time.Time     // end of the last good turn; zero: none yet
	LastTook time.Duration // what the last turn took
	Err      error         // of the last turn
}

// Loop turns until its context ends. Make it with New.
type Loop struct {
	config    Config
	triggered chan struct{} // holds one: triggers that come together are one

	mu    sync.Mutex
	state State
}

// New makes a loop; it does nothing until Run.
func New(config Config) *Loop {
	orElse := func(d *time.Duration, otherwise time.Duration) {
		if *d <= 0 {
			*d = otherwise
		}
	}
	orElse(&config.Interval, 10*time.Minute)
	orElse(&config.Limit, time.Minute)
	orElse(&config.Retry, time.Second)
	orElse(&config.LongestRetry, time.Minute)
	return &Loop{config: config, triggered: make(chan struct{}, 1)}
}

// String is the loop's name.
func (l *Loop) String() string { return l.config.Name }

// Trigger asks for a turn at once, or for one more after the turn that is
// running. It never waits and may be called from anywhere, before Run too.
func (l *Loop) Trigger() {
	select {
	case l.triggered <- struct{}{}:
	default:
	}
}

// State returns how the loop stands.
func (l *Loop) State() State {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state
}

// Run turns until ctx ends, the first time at once, and returns nil.
func (l *Loop) Run(ctx context.Context) error {
	retry := l.config.Retry
	for ctx.Err() == nil {
		// This turn answers every trigger so far.
		select {
		case <-l.triggered:
		default:
		}
		start := time.Now()
		next, err := l.turn(ctx)
		if ctx.Err() != nil {
			return nil
		}
		l.note(time.Since(start), err)

		if err == nil {
			retry = l.config.Retry
			l.wait(ctx, 0, l.until(next))
			continue
		}
		pause := shortened(retry, 5)
		l.wait(ctx, min(pause, l.config.Retry), pause)
		retry = min(2*retry, max(l.config.LongestRetry, l.config.Retry))
	}
	return nil
}

// until is how long to wait after a good turn.
func (l *Loop) until(next time.Time) time.Duration {
	wait := shortened(l.config.Interval, 10)
	if !next.IsZero() {
		wait = min(wait, max(time.Until(next), soonest))
	}
	return wait
}

// shortened takes up to a part of d away, at random.
func shortened(d time.Duration, part int64) time.Duration {
	return d - time.Duration(rand.Int64N(int64(d)/part+1))
}

// wait returns after longest, or at a trigger but not before least, or when
// ctx ends.
func (l *Loop) wait(ctx context.Context, least, longest time.Duration) {
	if least > 0 {
		floor := time.NewTimer(least)
		defer floor.Stop()
		select {
		case <-ctx.Done():
			return
		case <-floor.C:
		}
	}
	if longest <= least {
		return
	}
	ceiling := time.NewTimer(longest - least)
	defer ceiling.Stop()
	select {
	case <-ctx.Done():
	case <-ceiling.C:
	case <-l.triggered:
	}
}

// turn calls Turn; a panic in it is an error like another.
func (l *Loop) turn(ctx context.Context) (next time.Time, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, l.config.Limit, errOverrun)
	defer cancel()
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("panic: %v", v)
			l.config.Log.Error("turn panicked", "component", l.config.Name, "err", err, "stack", string(debug.Stack()))
		}
		if err != nil && context.Cause(ctx) == errOverrun {
			err = fmt.Errorf("%w of %v: %w", errOverrun, l.config.Limit, err)
		}
	}()
	return l.config.Turn(ctx)
}

var errOverrun = errors.New("overran the limit")

// note keeps the outcome of a turn and logs where it differs from the last.
func (l *Loop) note(took time.Duration, err error) {
	l.mu.Lock()
	before := l.state
	l.state.Turns++
	l.state.LastTook = took
	l.state.Err = err
	if err != nil {
		l.state.Failures++
		l.state.InARow++
	} else {
		l.state.InARow = 0
		l.state.LastGood = time.Now()
	}
	l.mu.Unlock()

	log := l.config.Log.With("component", l.config.Name)
	switch {
	case err != nil && (before.Err == nil || before.Err.Error() != err.Error()):
		if before.LastGood.IsZero() {
			log.Error("cannot bring it into force yet, trying again", "err", err)
		} else {
			log.Warn("cannot bring it into force, trying again; what was in force before stays", "err", err)
		}
	case err == nil && before.Err != nil:
		log.Info("it is in force again", "failures", before.InARow, "took", took)
	}
}

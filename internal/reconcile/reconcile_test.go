package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// turns runs a loop for a while of pretended time and returns when its turns
// began, in milliseconds since the start. Waits come out without jitter where
// within is used to compare.
func turns(t *testing.T, config Config, life time.Duration, during func(*Loop)) (began []int64, loop *Loop, log string) {
	t.Helper()
	var text strings.Builder
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		inner := config.Turn
		config.Name = "kernel"
		config.Log = slog.New(slog.NewTextHandler(&text, nil))
		config.Turn = func(ctx context.Context) (time.Time, error) {
			began = append(began, time.Since(start).Milliseconds())
			return inner(ctx)
		}
		loop = New(config)
		ctx, cancel := context.WithTimeout(t.Context(), life)
		defer cancel()
		if during != nil {
			go during(loop)
		}
		if err := loop.Run(ctx); err != nil {
			t.Errorf("Run returned %v", err)
		}
		if took := time.Since(start); took != life {
			t.Errorf("Run ended after %v, its context after %v", took, life)
		}
	})
	return began, loop, text.String()
}

// within says whether each time is at most jitter, a part of its own wait,
// before the one wanted.
func within(got, want []int64, part int64) error {
	if len(got) != len(want) {
		return fmt.Errorf("turned at %v ms, want about %v", got, want)
	}
	var before, wantBefore int64
	for i := range want {
		wait, full := got[i]-before, want[i]-wantBefore
		if wait > full || wait < full-full/part-1 {
			return fmt.Errorf("turn %d came %d ms after the one before, want up to a %dth less than %d (all: %v)", i, wait, part, full, got)
		}
		before, wantBefore = got[i], want[i]
	}
	return nil
}

func good(context.Context) (time.Time, error) { return time.Time{}, nil }

func TestIntervalHasJitter(t *testing.T) {
	got, _, log := turns(t, Config{Turn: good, Interval: 10 * time.Second}, 30*time.Second, nil)
	if err := within(got, []int64{0, 10000, 20000, 30000}[:len(got)], 10); err != nil || len(got) < 3 {
		t.Error(got, err)
	}
	if log != "" {
		t.Errorf("a loop at peace logged %s", log)
	}
}

func TestAsksForItsNextTurn(t *testing.T) {
	var count int
	asks := []time.Duration{3 * time.Second, time.Hour, -time.Hour, 7 * time.Second}
	got, _, _ := turns(t, Config{Interval: 40 * time.Second, Turn: func(context.Context) (time.Time, error) {
		count++
		if count > len(asks) {
			return time.Time{}, nil
		}
		return time.Now().Add(asks[count-1]), nil
	}}, 53*time.Second, nil)
	// The second waits for the interval, the third asks for the past.
	if len(got) != 5 || got[0] != 0 || got[1] != 3000 || got[2] < 39000 || got[2] > 43000 || got[3]-got[2] != 10 || got[4]-got[3] != 7000 {
		t.Errorf("turned at %v ms", got)
	}
}

func TestTriggersCoalesce(t *testing.T) {
	got, loop, _ := turns(t, Config{
		Turn: func(ctx context.Context) (time.Time, error) {
			time.Sleep(100 * time.Millisecond)
			return time.Time{}, nil
		},
		Interval: time.Hour,
	}, 10*time.Second, func(l *Loop) {
		for range 50 { // during the first turn: one more after it
			time.Sleep(time.Millisecond)
			l.Trigger()
		}
		time.Sleep(5*time.Second - 50*time.Millisecond)
		for range 50 { // at rest: one at once
			l.Trigger()
		}
	})
	if diff := cmp.Diff([]int64{0, 100, 5000}, got); diff != "" {
		t.Error(diff)
	}
	if s := loop.State(); s.Turns != 3 || s.Failures != 0 || s.LastTook != 100*time.Millisecond || s.LastGood.IsZero() {
		t.Errorf("state %+v", s)
	}
}

func TestTriggerBeforeRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		count := 0
		l := New(Config{Name: "kernel", Log: slog.New(slog.DiscardHandler), Turn: func(context.Context) (time.Time, error) {
			count++
			return time.Time{}, nil
		}})
		l.Trigger()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_ = l.Run(ctx)
		if count != 1 {
			t.Errorf("the first turn and a trigger before it made %d turns", count)
		}
	})
}

func TestBacksOff(t *testing.T) {
	fails := func(context.Context) (time.Time, error) {
		return time.Now().Add(time.Millisecond), errors.New("apply ruleset: no such device")
	}
	got, loop, log := turns(t, Config{Turn: fails, Retry: time.Second, LongestRetry: 8 * time.Second}, 50*time.Second, nil)
	full := []int64{0, 1000, 3000, 7000, 15000, 23000, 31000, 39000, 47000, 55000, 63000}
	if err := within(got, full[:min(len(got), len(full))], 5); err != nil || len(got) < 8 {
		t.Error(got, err)
	}
	if n := strings.Count(log, "cannot bring it into force"); n != 1 {
		t.Errorf("one trouble was logged %d times:\n%s", n, log)
	}
	if s := loop.State(); s.InARow != len(got) || s.Failures != uint64(len(got)) || s.Err == nil || !s.LastGood.IsZero() {
		t.Errorf("state %+v", s)
	}
}

func TestTriggersDoNotHeatAFailingLoop(t *testing.T) {
	var count int
	got, _, log := turns(t, Config{
		Turn: func(context.Context) (time.Time, error) {
			if count++; count > 5 {
				return time.Time{}, nil
			}
			return time.Time{}, errors.New("broken")
		},
		Retry: time.Second, LongestRetry: time.Minute, Interval: time.Hour,
	}, 60*time.Second, func(l *Loop) {
		for range 200 {
			time.Sleep(50 * time.Millisecond)
			l.Trigger()
		}
	})
	// Five failures, each followed by the shortest pause; then triggers count
	// at once again: 50 ms apart until 10 s.
	for i := 1; i <= 5; i++ {
		if wait := got[i] - got[i-1]; wait < 800 || wait > 1050 {
			t.Errorf("turn %d came %d ms after a failure", i, wait)
		}
	}
	if len(got) < 50 {
		t.Errorf("only %d turns: triggers no longer count", len(got))
	}
	if !strings.Contains(log, "it is in force again") || !strings.Contains(log, "failures=5") {
		t.Errorf("recovery is not logged:\n%s", log)
	}
}

func TestFailuresOfAllKinds(t *testing.T) {
	for _, c := range []struct {
		name string
		turn Turn
		want string // the error; "" for none
	}{
		{"good", good, ""},
		{"error", func(context.Context) (time.Time, error) { return time.Time{}, errors.New("no") }, "no"},
		{"panic", func(context.Context) (time.Time, error) { panic("index out of range") }, "panic: index out of range"},
		{"overrun", func(ctx context.Context) (time.Time, error) {
			<-ctx.Done()
			return time.Time{}, fmt.Errorf("pull: %w", ctx.Err())
		}, "overran the limit of 5s: pull: context deadline exceeded"},
		{"slow, but done", func(ctx context.Context) (time.Time, error) { <-ctx.Done(); return time.Time{}, nil }, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, loop, log := turns(t, Config{Turn: c.turn, Limit: 5 * time.Second, Retry: time.Minute}, 10*time.Second, nil)
			got := ""
			if err := loop.State().Err; err != nil {
				got = err.Error()
			}
			if got != c.want || loop.State().Turns != 1 {
				t.Errorf("%d turns, error %q, want one with %q", loop.State().Turns, got, c.want)
			}
			if strings.Contains(log, "stack=") != (c.name == "panic") {
				t.Errorf("logged %s", log)
			}
		})
	}
}

func TestEndsInTheMiddleOfATurn(t *testing.T) {
	_, loop, log := turns(t, Config{Turn: func(ctx context.Context) (time.Time, error) {
		<-ctx.Done()
		return time.Time{}, ctx.Err()
	}}, time.Second, nil)
	if s := loop.State(); s.Turns != 0 || log != "" {
		t.Errorf("an end that was asked for counts as a failure: %+v\n%s", s, log)
	}
}

// TestManyCallers is for the race detector.
func TestManyCallers(t *testing.T) {
	loop := New(Config{Name: "kernel", Turn: good, Log: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(t.Context())
	var callers sync.WaitGroup
	callers.Go(func() { _ = loop.Run(ctx) })
	for range 4 {
		callers.Go(func() {
			for range 100 {
				loop.Trigger()
				_ = loop.State()
			}
		})
	}
	for loop.State().Turns == 0 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	callers.Wait()
}

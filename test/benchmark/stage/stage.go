// Package stage is where the benchmarks of the kernel's part play: namespaces that
// end with a measurement, a node between a client and what is behind it, and
// packets that are timed in batches. What a packet meets there, and what its cost
// is worth, is for the programs beside it, which call it.
package stage

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/edgeward/edgeward/internal/netns"
)

// Scope is whose the namespaces and processes of a measurement are: what a test
// would be. A failure inside ends the measurement, by a panic that Within turns
// back into an error.
type Scope struct {
	context.Context
	ends []func()
}

type failure struct{ err error }

// Within calls f with a Scope and ends everything that was begun in it.
func Within(ctx context.Context, f func(*Scope) error) (err error) {
	s := &Scope{Context: ctx}
	defer func() {
		for i := len(s.ends) - 1; i >= 0; i-- {
			s.ends[i]()
		}
	}()
	defer func() {
		switch r := recover().(type) {
		case nil:
		case failure:
			err = r.err
		default:
			panic(r)
		}
	}()
	return f(s)
}

// Helper is there because a test has it.
func (s *Scope) Helper() {}

// Cleanup has f called when the Scope ends, the last first.
func (s *Scope) Cleanup(f func()) { s.ends = append(s.ends, f) }

// Fatal ends the measurement.
func (s *Scope) Fatal(args ...any) { panic(failure{errors.New(fmt.Sprint(args...))}) }

// Fatalf ends the measurement; an error among args is wrapped by %w.
func (s *Scope) Fatalf(format string, args ...any) { panic(failure{fmt.Errorf(format, args...)}) }

var _ netns.TB = (*Scope)(nil)

// Wait waits, and no longer than ctx lasts.
func Wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}

// Package daemon is the process around the work of a node agent or a tunnel:
// its life, its signals, its log, its HTTP endpoints, the socket for its command
// line and its version. A program makes its parts, hands them over as Tasks, and
// Run does the rest, so that a main function reads as a table of contents.
//
// It knows nothing of what the tasks do, restarts none of them (whoever
// supervises the process does that, with a clean start), changes nothing in
// the process outside what it is given, and reads one environment variable,
// EDGEWARD_LOG_LEVEL. The main packages under cmd call it.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Task is one part of a process, running from its start to its end.
type Task interface {
	// Run works until ctx ends and then returns nil, soon. To return nil
	// earlier means that the task is done; an error ends the process.
	Run(ctx context.Context) error
	// String names the task in logs and errors.
	String() string
}

// Options shape a process.
type Options struct {
	Log *slog.Logger
	// Reload is called on SIGHUP, by one goroutine; nil ignores the signal.
	Reload func()
	// Grace is how long tasks may take to end, 15 seconds unless given: less
	// than the 30 after which Kubernetes kills. Run does not wait longer.
	Grace time.Duration
}

// ErrGrace means that some task did not end when it should have.
var ErrGrace = errors.New("tasks do not end")

// Run runs tasks side by side until all are done, one fails, ctx ends, or
// SIGINT or SIGTERM comes; then it ends the rest and returns what failed, each
// error with the name of its task. An end that was asked for is no error. A
// panic in a task fails that task. A second signal ends the process at once.
func Run(ctx context.Context, options Options, tasks ...Task) error {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	// Once it stops, a signal has its usual effect again, which is the end.
	release := func() { signal.Stop(signals) }
	defer release()
	err := run(ctx, options, signals, release, tasks)
	options.Log.Info("stopped")
	return err
}

func run(ctx context.Context, options Options, signals <-chan os.Signal, release func(), tasks []Task) error {
	if options.Grace <= 0 {
		options.Grace = 15 * time.Second
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	p := &process{log: options.Log, running: map[Task]int{}, stop: stop}
	for _, task := range tasks {
		p.start(ctx, task)
	}
	ended := make(chan struct{})
	go func() {
		p.tasks.Wait()
		close(ended)
	}()

	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-ended:
			return p.failed()
		case sig := <-signals:
			if sig == syscall.SIGHUP {
				p.reload(options.Reload)
				continue
			}
			options.Log.Info("stopping", "signal", sig.String())
			stop()
		}
	}
	release()
	select {
	case <-ended:
		return p.failed()
	case <-time.After(options.Grace):
		return errors.Join(p.failed(), fmt.Errorf("%w within %v: %s", ErrGrace, options.Grace, p.remaining()))
	}
}

// process is what Run keeps of its tasks.
type process struct {
	log   *slog.Logger
	stop  context.CancelFunc
	tasks sync.WaitGroup

	mu      sync.Mutex
	running map[Task]int
	errs    []error
}

func (p *process) start(ctx context.Context, task Task) {
	p.mu.Lock()
	p.running[task]++
	p.mu.Unlock()
	p.tasks.Go(func() {
		err := p.contained(task.String(), func() error { return task.Run(ctx) })
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.running[task]--; p.running[task] == 0 {
			delete(p.running, task)
		}
		// Asked to end, a task may say so: that is no failure.
		if err != nil && (ctx.Err() == nil || !errors.Is(err, context.Cause(ctx))) {
			p.errs = append(p.errs, fmt.Errorf("%s: %w", task, err))
			p.stop()
		}
	})
}

// contained makes a panic an error, and logs where it came from.
func (p *process) contained(name string, run func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("panic: %v", v)
			p.log.Error("task panicked", "component", name, "err", err, "stack", string(debug.Stack()))
		}
	}()
	return run()
}

func (p *process) reload(reload func()) {
	if reload == nil {
		p.log.Info("nothing to reload", "signal", syscall.SIGHUP.String())
		return
	}
	p.log.Info("reloading", "signal", syscall.SIGHUP.String())
	_ = p.contained("reload", func() error { reload(); return nil })
}

func (p *process) failed() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return errors.Join(p.errs...)
}

func (p *process) remaining() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var names []string
	for task := range p.running {
		names = append(names, task.String())
	}
	return strings.Join(names, ", ")
}

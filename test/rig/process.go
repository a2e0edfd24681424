package rig

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// pollEvery is how often a condition of a process is looked at again.
const pollEvery = 10 * time.Millisecond

// stopWithin is how long a process may take to end after SIGTERM.
const stopWithin = 10 * time.Second

// errAddressInUse tells a start that lost the race for its port from one that
// failed for good.
var errAddressInUse = errors.New("address already in use")

// process is one real server: a command line that can be started, stopped and
// started again on the same ports, with one log for its whole life.
type process struct {
	name  string
	args  []string
	dir   string                     // working directory
	env   []string                   // beside this process's own
	logs  string                     // file that takes standard output and standard error
	life  context.Context            // bounds every run
	ready func(context.Context) bool // whether it serves, once it listens on all ports
	ports []int

	mu   sync.Mutex
	cmd  *exec.Cmd
	done chan struct{} // closed when the run in cmd has ended
	err  error         // how it ended; read after done
}

// startAnywhere starts the server on n free ports, which bind writes into its
// configuration. Another process may take one of them in between: it is then
// tried again with others.
func (p *process) startAnywhere(ctx context.Context, n int, bind func(ports []int) error) error {
	for try := 1; ; try++ {
		var err error
		if p.ports, err = freePorts(n); err != nil {
			return err
		}
		if err := bind(p.ports); err != nil {
			return err
		}
		err = p.Start(ctx)
		if err == nil {
			return nil
		}
		p.Kill()
		if !errors.Is(err, errAddressInUse) || try == startTries {
			return err
		}
	}
}

// Start starts the server, again after Stop or Kill: same ports, same data. It
// returns when the server answers. ctx bounds that wait alone; the server's life
// is bound to the context with which it was started first.
func (p *process) Start(ctx context.Context) error {
	logged := len(p.Log())
	if err := p.fork(); err != nil {
		return fmt.Errorf("start %s: %w", p.name, err)
	}
	for !p.listens() || !p.ready(ctx) {
		select {
		case <-p.exited():
			said := p.Log()[logged:]
			if strings.Contains(said, errAddressInUse.Error()) {
				return fmt.Errorf("start %s: %w", p.name, errAddressInUse)
			}
			return fmt.Errorf("start %s: it ended before it served (%v): %s", p.name, p.err, tail(said, 2000))
		default:
		}
		if err := sleep(ctx, pollEvery); err != nil {
			p.Kill()
			return fmt.Errorf("start %s: %w: %s", p.name, err, tail(p.Log()[logged:], 2000))
		}
	}
	return nil
}

// fork begins a run.
func (p *process) fork() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.done != nil {
		select {
		case <-p.done:
		default:
			return errors.New("it is running")
		}
	}
	logs, err := os.OpenFile(p.logs, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer logs.Close()
	cmd := exec.CommandContext(p.life, p.args[0], p.args[1:]...)
	cmd.Dir = p.dir
	cmd.Env = append(os.Environ(), p.env...)
	cmd.Stdout, cmd.Stderr = logs, logs
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = stopWithin

	started := make(chan error, 1)
	done := make(chan struct{})
	go func() {
		// The kernel's parent death signal follows the thread that forked, not
		// the process, so that thread has to outlive the child.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		p.err = cmd.Wait()
		close(done)
	}()
	if err := <-started; err != nil {
		return err
	}
	p.cmd, p.done = cmd, done
	return nil
}

// listens tells whether the server itself listens on all its ports. That
// something answers there is not enough: it may be another test's server, on a
// port that this one has just lost to it.
func (p *process) listens() bool {
	proc := filepath.Join("/proc", strconv.Itoa(p.PID()))
	sockets := make(map[string]bool) // links of its descriptors
	fds, err := os.ReadDir(filepath.Join(proc, "fd"))
	if err != nil {
		return false // it has ended
	}
	for _, fd := range fds {
		if link, err := os.Readlink(filepath.Join(proc, "fd", fd.Name())); err == nil {
			sockets[link] = true
		}
	}
	table, err := os.ReadFile(filepath.Join(proc, "net", "tcp"))
	if err != nil {
		return false
	}
	mine := make(map[string]bool) // local addresses, as the kernel writes them
	for line := range strings.Lines(string(table)) {
		const listen = "0A"
		if f := strings.Fields(line); len(f) > 9 && f[3] == listen && sockets["socket:["+f[9]+"]"] {
			mine[f[1]] = true
		}
	}
	for _, port := range p.ports {
		var address [4]byte
		binary.NativeEndian.PutUint32(address[:], binary.BigEndian.Uint32([]byte{127, 0, 0, 1}))
		if !mine[fmt.Sprintf("%X:%04X", address, port)] {
			return false
		}
	}
	return true
}

// exited returns a channel that is closed once the server does not run.
func (p *process) exited() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.done == nil {
		ended := make(chan struct{})
		close(ended)
		return ended
	}
	return p.done
}

// Stop asks the server to end, and kills it when it has not done so in time.
// Stopping what does not run is no error.
func (p *process) Stop(ctx context.Context) error {
	done := p.exited()
	select {
	case <-done:
		return nil
	default:
	}
	if err := p.signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop %s: %w", p.name, err)
	}
	timer := time.NewTimer(stopWithin)
	defer timer.Stop()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		p.Kill()
		return fmt.Errorf("stop %s: killed, because %w", p.name, context.Cause(ctx))
	case <-timer.C:
		p.Kill()
		return fmt.Errorf("stop %s: killed, because it ran on for %s after SIGTERM", p.name, stopWithin)
	}
}

// Kill ends the server at once, as a crash would, and returns when it is gone.
func (p *process) Kill() {
	done := p.exited()
	select {
	case <-done:
		return
	default:
	}
	// Killing fails only where there is nothing left to kill.
	_ = p.signal(syscall.SIGKILL)
	<-done
}

// signal sends a signal to the present run; one that has just ended is no error.
func (p *process) signal(sig os.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// Log returns what the server has written so far, over all its runs.
func (p *process) Log() string {
	data, err := os.ReadFile(p.logs)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err.Error()
	}
	return string(data)
}

// WaitLog waits until the server's log holds text.
func (p *process) WaitLog(ctx context.Context, text string) error {
	for !strings.Contains(p.Log(), text) {
		if err := sleep(ctx, pollEvery); err != nil {
			return fmt.Errorf("wait for %s to log %q: %w: %s", p.name, text, err, tail(p.Log(), 2000))
		}
	}
	return nil
}

// PID returns the process id of the present or last run.
func (p *process) PID() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cmd.Process.Pid
}

// CPU returns the processor time of the present run so far, user and system
// together. The kernel counts it in steps of 10 ms.
func (p *process) CPU() (time.Duration, error) {
	stat, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(p.PID()), "stat"))
	if err != nil {
		return 0, fmt.Errorf("read the processor time of %s: %w", p.name, err)
	}
	// The second field is the program's name and may hold anything; what
	// follows its closing parenthesis starts at field three.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("read the processor time of %s: %q is too short", p.name, stat)
	}
	var ticks int64
	for _, field := range fields[11:13] {
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read the processor time of %s: %w", p.name, err)
		}
		ticks += n
	}
	const tick = time.Second / 100 // USER_HZ, fixed by Linux's interface
	return time.Duration(ticks) * tick, nil
}

// RSS returns the memory that the present run holds resident, in bytes.
func (p *process) RSS() (int64, error) { return p.memory("VmRSS:") }

// PeakRSS returns the most memory that the present run ever held resident, in
// bytes.
func (p *process) PeakRSS() (int64, error) { return p.memory("VmHWM:") }

func (p *process) memory(field string) (int64, error) {
	status, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(p.PID()), "status"))
	if err != nil {
		return 0, fmt.Errorf("read the memory of %s: %w", p.name, err)
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, field); ok {
			kB, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			if err != nil {
				return 0, fmt.Errorf("read the memory of %s: %w", p.name, err)
			}
			return kB << 10, nil
		}
	}
	return 0, fmt.Errorf("read the memory of %s: no %s in its status", p.name, field)
}

// freePorts finds n loopback ports that nothing listens on. Another process can
// take one before it is used: whoever starts a server tries again then.
func freePorts(n int) ([]int, error) {
	ports := make([]int, n)
	for i := range ports {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, fmt.Errorf("find a free port: %w", err)
		}
		// Held until all are found, so that no port comes twice.
		defer listener.Close()
		ports[i] = listener.Addr().(*net.TCPAddr).Port
	}
	return ports, nil
}

// startTries is how many times a server is moved to another port.
const startTries = 5

// sleep waits, but no longer than ctx lives.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}

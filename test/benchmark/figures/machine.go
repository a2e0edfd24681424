package figures

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// WatchMachine begins to watch who uses the machine. The function it returns
// tells what share of all processors went, since then, to others than this
// process, its children that have ended, and those processes: figures from a busy
// machine are not worth much.
func WatchMachine(pids ...int) (others func() (float64, error), err error) {
	read := func() (foreign time.Duration, err error) {
		if foreign, err = machineCPU(); err != nil {
			return 0, err
		}
		for _, pid := range pids {
			measured, err := CPU(pid)
			if err != nil {
				return 0, err
			}
			foreign -= measured
		}
		for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
			var own syscall.Rusage
			if err := syscall.Getrusage(who, &own); err != nil {
				return 0, fmt.Errorf("read the processor time of this process: %w", err)
			}
			foreign -= time.Duration(own.Utime.Nano() + own.Stime.Nano())
		}
		return foreign, nil
	}
	before, err := read()
	if err != nil {
		return nil, err
	}
	began := time.Now()
	return func() (float64, error) {
		after, err := read()
		return max(0, float64(after-before)/float64(time.Since(began))/float64(runtime.NumCPU())), err
	}, nil
}

// machineCPU returns the time that all processors have spent at work.
func machineCPU() (time.Duration, error) {
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, fmt.Errorf("read the processor time of the machine: %w", err)
	}
	line, _, _ := strings.Cut(string(stat), "\n")
	fields := strings.Fields(line) // cpu user nice system idle iowait irq softirq ...
	if len(fields) < 8 {
		return 0, fmt.Errorf("read the processor time of the machine: %q is too short", line)
	}
	var ticks int64
	for i, field := range fields[1:8] {
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read the processor time of the machine: %w", err)
		}
		if i != 3 && i != 4 {
			ticks += n
		}
	}
	const tick = time.Second / 100 // USER_HZ, fixed by Linux's interface
	return time.Duration(ticks) * tick, nil
}

// CPU returns the processor time of a process, user and system together, to
// the nanosecond: /proc/PID/stat counts in steps of 10 ms, too coarse for a
// turn. Threads that have ended are missing; a Go program keeps its own.
func CPU(pid int) (time.Duration, error) {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil || len(threads) == 0 {
		return 0, fmt.Errorf("read the processor time of process %d: it has no threads: %w", pid, err)
	}
	var total time.Duration
	for _, thread := range threads {
		text, err := os.ReadFile(thread)
		if err != nil {
			return 0, fmt.Errorf("read the processor time of process %d: %w", pid, err)
		}
		var ns int64
		if _, err := fmt.Sscan(string(text), &ns); err != nil {
			return 0, fmt.Errorf("read the processor time of process %d: %w", pid, err)
		}
		total += time.Duration(ns)
	}
	return total, nil
}

// Machine says what the processors are.
func Machine() (string, error) {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "", fmt.Errorf("read what the machine is: %w", err)
	}
	model := runtime.GOARCH // not every architecture names its processors
	for line := range strings.Lines(string(info)) {
		if key, value, _ := strings.Cut(line, ":"); strings.TrimSpace(key) == "model name" {
			model = strings.TrimSpace(value)
		}
	}
	return fmt.Sprintf("%s with %d processors", model, runtime.NumCPU()), nil
}

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// engineFigures are the benchmarks of the decision engine.
type engineFigures struct {
	rows    []string                      // such as Delta/add
	columns []string                      // such as "100k" and "100k interpreted"
	cells   map[string]map[string]measure // by row and column
}

type measure struct {
	value float64
	unit  string // "ns/op", or what the benchmark reports beside it
}

// measureEngine runs the decision engine's own benchmarks, compiled as in the
// daemons to come and interpreted as in Traefik.
func measureEngine(ctx context.Context, opts options) (*engineFigures, error) {
	const pkg = "./internal/decision"
	f := &engineFigures{cells: map[string]map[string]measure{}}
	for _, run := range []struct {
		mark string
		args []string
	}{
		{"", []string{"test"}},
		{" interpreted", []string{"run", "./test/interpreted"}},
	} {
		opts.say("engine%s: running its benchmarks", run.mark)
		args := append(run.args, "-run=^$", "-bench=.", "-benchtime="+opts.benchtime, "-timeout=10m", pkg)
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Dir = opts.root
		cmd.Stderr = os.Stderr
		// To let go run end what it runs.
		cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
		var out bytes.Buffer
		cmd.Stdout = io.MultiWriter(&out, opts.log)
		if err := cmd.Run(); err != nil {
			return nil, fmt.Errorf("run the engine's benchmarks: go %s: %w", strings.Join(args, " "), err)
		}
		f.read(out.String(), run.mark)
	}
	return f, nil
}

var benchmarkLine = regexp.MustCompile(`^Benchmark(\S+)/(\w+?)(?:-\d+)?\s+\d+\s+(.*)$`)

// read takes in what go test printed.
func (f *engineFigures) read(out, mark string) {
	for line := range strings.Lines(out) {
		match := benchmarkLine.FindStringSubmatch(strings.TrimSpace(line))
		if match == nil {
			continue
		}
		row, column := match[1], match[2]+mark
		fields := strings.Fields(match[3])
		// The last pair is the benchmark's own unit, where it has one.
		value, err := strconv.ParseFloat(fields[len(fields)-2], 64)
		if err != nil {
			continue
		}
		if f.cells[row] == nil {
			f.cells[row] = map[string]measure{}
			f.rows = append(f.rows, row)
		}
		if !slices.Contains(f.columns, column) {
			f.columns = append(f.columns, column)
		}
		f.cells[row][column] = measure{value, fields[len(fields)-1]}
	}
}

// String writes a time as short as its three digits allow.
func (m measure) String() string {
	if m.unit != "ns/op" {
		return fmt.Sprintf("%.0f %s", m.value, strings.TrimSuffix(m.unit, "/decision"))
	}
	value, unit := m.value, "ns"
	for _, next := range []string{"µs", "ms", "s"} {
		if value < 1000 {
			break
		}
		value, unit = value/1000, next
	}
	switch {
	case value < 10:
		return fmt.Sprintf("%.2f %s", value, unit)
	case value < 100:
		return fmt.Sprintf("%.1f %s", value, unit)
	}
	return fmt.Sprintf("%.0f %s", value, unit)
}

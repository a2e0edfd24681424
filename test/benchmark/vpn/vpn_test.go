package main

import (
	"bytes"
	"context"
	"os"
	"regexp"
	"slices"
	"testing"
	"time"
)

// TestMain makes the test binary what the benchmark asks of itself.
func TestMain(m *testing.M) {
	if slices.Contains(os.Args, "-inside") || slices.Contains(os.Args, "-gateway") {
		main()
		return
	}
	os.Exit(m.Run())
}

func TestQuickRun(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute) // the first time it builds the program
	defer cancel()
	opts := quick
	var out, log bytes.Buffer
	opts.quick, opts.only, opts.log = true, regexp.MustCompile(""), &log
	if err := run(ctx, opts, &out); err != nil {
		t.Fatalf("%v; it said:\n%s", err, log.String())
	}
	for _, line := range []string{
		`\| a turn: read, compare, nothing to change \| [\d.]+ \| 100: (held|missed) \|`,
		`\| one peer set, without reading \| [\d.]+ \| 1: (held|missed) \|`,
		`\| all anew, beside what enforces \| [\d.]+ \|`,
		`\| resident then, MB \| [\d.]+ \|`,
		`\| ms without an answer \| [\d.,]+ \| [\d.,]+ \| 250 in the median: (held|missed) \|`,
		`\| edgeward's device, access rules over edgeward's device \| [\d.]+ `,
		`\| granted UDP, forwarded \([\d,]+ without\) \| -?[\d,]+ \| -?[\d,]+ \|`,
		`\| a declared host \| [\d,]+ \| [\d.,]+ \|`,
		`everything else, the kernel's own threads included, used\n\d+ % of the machine`,
	} {
		if !regexp.MustCompile(line).MatchString(out.String()) {
			t.Errorf("no line %s in:\n%s", line, out.String())
		}
	}
}

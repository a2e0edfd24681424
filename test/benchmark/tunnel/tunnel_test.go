package main

import (
	"bytes"
	"context"
	"os"
	"regexp"
	"testing"
	"time"
)

// TestMain makes the test binary a connector where the benchmark asks for one.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "-connector" {
		main()
		return
	}
	os.Exit(m.Run())
}

func TestQuickRun(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	opts := quick
	var out, log bytes.Buffer
	opts.log = &log
	if err := measure(ctx, opts, &out); err != nil {
		t.Fatalf("%v; it said:\n%s", err, log.String())
	}
	for _, line := range []string{
		`\| edgeward, with verdicts and signature \| [\d,]+ \| [\d.]+ µs \| [\d,]+ \| [\d.]+ µs \|`,
		`\| cloudflared as a library \| quic \| [1-9]\d* MiB \| [1-9]\d* MiB \| [1-9]\d* MiB \|`,
		`\| edgeward, with verdicts and signature \| quic \| [1-9]\d* MiB/s \| [\d.]+ ms \| [1-9]\d* MiB/s \| [\d.]+ ms \| [1-9]\d* MiB \|`,
		`With verdicts and signature the requests a second differ by [-+]\d+ % over http2 and [-+]\d+ % over QUIC`,
		`everything else used \d+ % of the machine`,
	} {
		if !regexp.MustCompile(line).MatchString(out.String()) {
			t.Errorf("no line %s in:\n%s", line, out.String())
		}
	}
}

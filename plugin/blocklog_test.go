package plugin

import (
	"bytes"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/edgeward/edgeward/internal/decision"
)

func TestTheBlockLogIsBounded(t *testing.T) {
	out := &bytes.Buffer{}
	b := newBlockLog(slog.New(slog.NewJSONHandler(out, nil)), "m", false)
	b.pace = &linePace{}
	req := httptest.NewRequest(http.MethodGet, "http://h.example/"+strings.Repeat("a", 500), nil)
	for i := 0; i < 1000; i++ {
		b.block(req, refusal{Status: 403, Address: "192.0.2.1", slug: "decision"}, decision.Verdict{})
	}
	lines := strings.Count(out.String(), "\n")
	if lines > 3*linesPerSecond || lines < 1 {
		t.Errorf("1,000 refusals made %d lines", lines)
	}
	b.tell()
	if !strings.Contains(out.String(), `"total":1000`) || !strings.Contains(out.String(), "more refusals than are logged") {
		t.Error("what was left out was never told")
	}
	if strings.Contains(out.String(), strings.Repeat("a", 300)) {
		t.Error("a long path is logged in full")
	}
}

func TestRefusalsAreCountedOverReloads(t *testing.T) {
	out := &bytes.Buffer{}
	log := slog.New(slog.NewJSONHandler(out, nil))
	req := httptest.NewRequest(http.MethodGet, "http://h.example/", nil)
	for i := 0; i < 3; i++ {
		b := newBlockLog(log, "reloaded@file", false)
		b.pace = &linePace{}
		b.block(req, refusal{Status: 403, slug: "decision"}, decision.Verdict{})
	}
	if !strings.Contains(out.String(), `"total":3`) {
		t.Errorf("three refusals over three loads of one middleware are counted as:\n%s", out.String())
	}
}

func TestAMiddlewareSaysOnceWhatItEnforces(t *testing.T) {
	out := &bytes.Buffer{}
	log := slog.New(slog.NewJSONHandler(out, nil))
	config := good()
	for _, c := range []struct {
		mode string
		want int
	}{{"enforce", 1}, {"enforce", 1}, {"observe", 2}, {"observe", 2}, {"enforce", 3}} {
		config.Mode = c.mode
		s, err := understand(config)
		if err != nil {
			t.Fatal(err)
		}
		announce(log, "announced@file", s)
		if n := strings.Count(out.String(), "middleware in force"); n != c.want {
			t.Errorf("after %s it was said %d times, want %d", c.mode, n, c.want)
		}
	}
	if strings.Contains(out.String(), config.LAPI.Key) {
		t.Error("the key is in the log")
	}
}

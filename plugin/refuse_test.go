package plugin

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

func TestRefusalsFollowAccept(t *testing.T) {
	lapi := startLAPI(decisionRow(77, "192.0.2.1", "ban", "crowdsec"))
	defer lapi.Close()
	file := filepath.Join(t.TempDir(), "page.html")
	if err := os.WriteFile(file, []byte(`<p>{{.Status}} {{.Address}} {{.Decision}}</p>`), 0o600); err != nil {
		t.Fatal(err)
	}
	config := pulling(lapi, "refusals")
	config.Ban.Status = 451
	config.Ban.PageFile = file
	s := open(t, config)
	s.becomes("192.0.2.1", 451)
	for _, c := range []struct{ accept, contentType, contains string }{
		{"", "text/plain; charset=utf-8", "decision 77"},
		{"*/*", "text/plain; charset=utf-8", "decision 77"},
		{"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "text/html; charset=utf-8", "<p>451 192.0.2.1 77</p>"},
		{"application/json", "application/problem+json", `"decision":77`},
		{"application/problem+json", "application/problem+json", `"status":451`},
		{"text/html;q=0.5, application/json", "application/problem+json", `"status":451`},
		{"text/html;q=0, text/plain", "text/plain; charset=utf-8", "blocked"},
		{"image/png", "text/plain; charset=utf-8", "blocked"},
		{"text/html;q=banana", "text/plain; charset=utf-8", "blocked"},
	} {
		accept := c.accept
		rec := s.get("192.0.2.1", func(r *http.Request) { r.Header.Set("Accept", accept) })
		if got := rec.Header().Get("Content-Type"); got != c.contentType || !strings.Contains(rec.Body.String(), c.contains) {
			t.Errorf("Accept %q: %s %q", c.accept, got, rec.Body.String())
		}
		if rec.Header().Get("Cache-Control") != "no-store" || rec.Header().Get("Content-Length") != strconv.Itoa(rec.Body.Len()) {
			t.Errorf("Accept %q: headers %v", c.accept, rec.Header())
		}
		if strings.Contains(c.contentType, "json") && !json.Valid(rec.Body.Bytes()) {
			t.Errorf("Accept %q: not JSON: %q", c.accept, rec.Body.String())
		}
		if strings.Contains(rec.Body.String(), "crowdsec") {
			t.Errorf("Accept %q: the origin is told to the client", c.accept)
		}
	}
	if rec := s.get("192.0.2.1", func(r *http.Request) { r.Method = http.MethodHead }); rec.Code != 451 || rec.Body.Len() != 0 {
		t.Errorf("HEAD: %d %q", rec.Code, rec.Body.String())
	}
}

func TestAPageThatCannotBeUsed(t *testing.T) {
	dir := t.TempDir()
	broken := filepath.Join(dir, "broken.html")
	if err := os.WriteFile(broken, []byte(`{{.Nonsense}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{filepath.Join(dir, "missing.html"), broken} {
		log := &bytes.Buffer{}
		html := page(file, slog.New(slog.NewJSONHandler(log, nil)))
		rec := httptest.NewRecorder()
		req := httptest.NewRequest(http.MethodGet, "/", nil)
		req.Header.Set("Accept", "text/html")
		answer(rec, req, refusal{Status: 403, Reason: "No <b>.", Address: "192.0.2.1"}, html)
		if !strings.Contains(rec.Body.String(), "No &lt;b&gt;.") || !strings.Contains(log.String(), "cannot use ban.pageFile") {
			t.Errorf("%s: page %q, log %q", file, rec.Body.String(), log.String())
		}
	}
}

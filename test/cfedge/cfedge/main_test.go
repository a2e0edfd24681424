package main

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// Everything that the program says is there when it says so.
func TestRun(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	dir := t.TempDir()
	said, out := io.Pipe()
	in, say := io.Pipe()
	done := make(chan error, 1)
	go func() {
		done <- run(ctx, []string{"-dir", dir, "-host", "app.example.org"}, in, out, io.Discard)
		out.Close()
	}()
	lines := bufio.NewScanner(said)
	until := func(start string) string {
		t.Helper()
		for lines.Scan() {
			if strings.HasPrefix(lines.Text(), start) {
				return lines.Text()
			}
		}
		t.Fatalf("it does not say %q: %v", start, lines.Err())
		return ""
	}
	url := regexp.MustCompile(`http://\S+[^,\s]`)
	api := url.FindString(until("api"))
	front := url.FindString(until("visitors"))
	until("say")
	for _, file := range []string{"ca.pem", "tunnel-token", "api-token"} {
		if text, err := os.ReadFile(filepath.Join(dir, file)); err != nil || len(text) == 0 {
			t.Errorf("%s: %v", file, err)
		}
	}
	token, _ := os.ReadFile(filepath.Join(dir, "api-token"))
	for _, tt := range []struct {
		url, host, authorization string
		want                     int
	}{
		{api + "/zones", "", "Bearer " + string(token), http.StatusOK},
		{front, "app.example.org", "", 530},
	} {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, tt.url, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = tt.host
		req.Header.Set("Authorization", tt.authorization)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if resp.Body.Close(); resp.StatusCode != tt.want {
			t.Errorf("%s: %s, want %d", tt.url, resp.Status, tt.want)
		}
	}
	go io.WriteString(say, "refuse go away\nadmit\nstatus\nnonsense\n")
	if line := until("{"); !strings.Contains(line, "NoTunnel:1") {
		t.Errorf("status: %s", line)
	}
	until(`"nonsense"`)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

package plugin

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestARedirectIsNotFollowed(t *testing.T) {
	followed := false
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { followed = true }))
	defer elsewhere.Close()
	redirecting := httptest.NewServer(http.RedirectHandler(elsewhere.URL, http.StatusFound))
	defer redirecting.Close()
	client, authorize := connect(source{url: redirecting.URL, key: "secret", timeout: time.Second}, func(string) {})
	req, err := http.NewRequest(http.MethodGet, redirecting.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := authorize(req); err != nil {
		t.Fatal(err)
	}
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	if res.StatusCode != http.StatusFound || followed {
		t.Errorf("status %d, followed %v", res.StatusCode, followed)
	}
}

func TestAKeyFileIsReadForEachPull(t *testing.T) {
	lapi := startLAPI()
	defer lapi.Close()
	file := filepath.Join(t.TempDir(), "key")
	config := pulling(lapi, "")
	config.LAPI.KeyFile = file
	open(t, config) // the file is not there yet: no error
	if err := os.WriteFile(file, []byte("first\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	wait := func(want string) {
		t.Helper()
		for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
			if _, _, key := lapi.pulls(); key == want {
				return
			}
		}
		t.Fatalf("the key never became %q", want)
	}
	wait("first")
	if err := os.WriteFile(file, []byte("second"), 0o600); err != nil {
		t.Fatal(err)
	}
	wait("second")
}

func TestAMissingFileIsNamedUnlessItMayBeASecret(t *testing.T) {
	for name, want := range map[string]string{
		"/tmp/edgeward/lapi-key": " /tmp/edgeward/lapi-key",
		"/nowhere/lapi-key":      "",
		"/lapi-key":              "",
		"s3cret/with/slashes":    "",
		"":                       "",
	} {
		if got := shownPath(name); got != want {
			t.Errorf("shownPath(%q) = %q, want %q", name, got, want)
		}
	}
}

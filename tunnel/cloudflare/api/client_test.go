package api

import (
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/edgeward/edgeward/test/cfedge"
)

// TestWhatGoesWrongIsOneLine breaks one thing at a time and asks for a line
// that says what, and how to mend it, and for no call that cannot help.
func TestWhatGoesWrongIsOneLine(t *testing.T) {
	for _, c := range []struct {
		name   string
		broken func(*world)
		says   []string
		calls  int // at most, of the zone
	}{
		{"a wrong token", func(w *world) { w.token("example.org", "cfut_0123456789012345678901234567") },
			[]string{"find zone of example.org: Cloudflare refuses the token in ", "/example.org: Invalid access token (9109): it must be valid and have the permission Zone / Zone / Read for the zone"}, 1},
		{"a token of the wrong form", func(w *world) { w.token("example.org", "short") }, []string{"Invalid request headers (6003)"}, 1},
		{"a token that ended", func(w *world) { w.cloud.EndToken(w.tokens["example.org"]) }, []string{"Invalid access token (9109)"}, 1},
		{"a token for another zone", func(w *world) {
			w.token("example.org", w.cloud.AddToken("x", cfedge.ZoneRead("example.net"), cfedge.DNSEdit("example.net")))
		}, []string{"find zone of example.org: there is none that the token in ", "may see: is it at Cloudflare, and does the token have the permission Zone / Zone / Read for the zone?"}, 1},
		{"a token that may only look at the zone", func(w *world) { w.token("example.org", w.cloud.AddToken("x", cfedge.ZoneRead("example.org"))) },
			[]string{"list records of example.org: Cloudflare refuses the token", "Authentication error (10000): it must be valid and have the permission Zone / DNS / Edit for the zone"}, 2},
		{"a token that may not write", func(w *world) {
			w.token("example.org", w.cloud.AddToken("x", cfedge.ZoneRead("example.org"), cfedge.DNSRead("example.org")))
		}, []string{"write records of example.org: Cloudflare refuses the token", "Zone / DNS / Edit"}, 3},
		{"a zone that is gone", func(w *world) { w.cloud.RemoveZone("example.org") }, []string{"is it at Cloudflare"}, 1},
		{"no token", func(w *world) { _ = os.Remove(string(w.want.ZoneTokens["example.org"])) }, []string{"open ", "no such file"}, 0},
		{"an empty token", func(w *world) { w.token("example.org", "") }, []string{"it is empty"}, 0},
		{"two tokens", func(w *world) { w.token("example.org", "a b") }, []string{"it holds more than one word"}, 0},
		{"an API that is out of order", func(w *world) {
			w.api.SetFault(func(c cfedge.Call) cfedge.Fault {
				if strings.HasPrefix(c.Path, "/zones") {
					return cfedge.Fault{Status: 502}
				}
				return cfedge.Fault{}
			})
		}, []string{"find zone of example.org: the API answers 502 Bad Gateway without saying why"}, 1},
		{"a connection that breaks", func(w *world) {
			w.api.SetFault(func(c cfedge.Call) cfedge.Fault { return cfedge.Fault{Cut: strings.HasPrefix(c.Path, "/zones")} })
		}, []string{"find zone of example.org: connection reset"}, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, "example.org")
			w.hosts("app.example.org")
			c.broken(w)
			k := w.keeper()
			_, err := k.Turn(context.Background())
			if err == nil {
				t.Fatal("no error")
			}
			for _, s := range c.says {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("%q does not say %q", err, s)
				}
			}
			for _, token := range w.tokens {
				if token != "" && token != "short" && token != "a b" && strings.Contains(err.Error(), token) {
					t.Errorf("%q repeats a token", err)
				}
			}
			if strings.Contains(err.Error(), "\n") || k.Report().Error != err.Error() {
				t.Errorf("%q is more than a line, or not in the report", err)
			}
			n := 0
			for _, call := range w.api.Calls() {
				if strings.HasPrefix(call.Path, "/zones") {
					n++
				}
			}
			if n > c.calls {
				t.Errorf("%d calls were made: %v", n, w.api.Calls())
			}
			w.expect()
		})
	}
}

// TestARotatedTokenIsUsedAtOnce keeps one process.
func TestARotatedTokenIsUsedAtOnce(t *testing.T) {
	w := newWorld(t, "example.org")
	w.hosts("app.example.org")
	k := w.keeper()
	w.cloud.EndToken(w.tokens["example.org"])
	if _, err := k.Turn(context.Background()); err == nil {
		t.Fatal("a token that ended is taken")
	}
	w.token("example.org", w.cloud.AddToken("new", cfedge.ZoneRead("example.org"), cfedge.DNSEdit("example.org")))
	if _, err := k.Turn(context.Background()); err != nil {
		t.Fatal(err)
	}
	w.expect(pair("app.example.org", "main")...)
}

// TestTheLimitIsKept has Cloudflare refuse, then checks that nothing is asked
// until it is time, and that the quota is left alone before it is used up.
func TestTheLimitIsKept(t *testing.T) {
	w := newWorld(t, "example.org")
	w.hosts("app.example.org")
	w.api.SetLimit(2, 5*time.Minute)
	k := w.keeper()
	_, err := k.Turn(context.Background())
	if err == nil || !strings.Contains(err.Error(), "too many calls: none is made before ") {
		t.Fatalf("the error is %v", err)
	}
	asked := len(w.api.Calls())
	for range 10 {
		if _, err := k.Turn(context.Background()); err == nil {
			t.Fatal("a turn went through")
		}
	}
	if n := len(w.api.Calls()); n != asked {
		t.Errorf("%d calls were made while none was to be", n-asked)
	}
	w.api.SetLimit(1200, 5*time.Minute)
	k.client.now = func() time.Time { return time.Now().Add(5*time.Minute + time.Second) }
	if _, err := k.Turn(context.Background()); err != nil {
		t.Fatal(err)
	}
	w.expect(pair("app.example.org", "main")...)

	w.api.SetLimit(reserve+3, 5*time.Minute)
	k = w.keeper()
	for range 10 {
		_, err = k.Turn(context.Background())
	}
	w.api.Forget()
	_, again := k.Turn(context.Background())
	if err == nil || again == nil || len(w.api.Calls()) > 0 || k.Usage().Left != reserve-1 {
		t.Errorf("the last of the quota is used: %v, %v, %d left", err, again, k.Usage().Left)
	}
	for _, c := range w.api.Calls() {
		if c.Status == http.StatusTooManyRequests {
			t.Error("Cloudflare had to refuse")
		}
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	for after, want := range map[string]time.Duration{
		"30": 30 * time.Second, "": penalty, "soon": penalty, "-1": penalty, "0": penalty, "999999999": time.Hour,
		"Fri, 01 May 2026 12:02:00 GMT": 2 * time.Minute, "Fri, 01 May 2026 11:00:00 GMT": time.Second,
	} {
		c := newClient("test")
		c.now = func() time.Time { return now }
		if got := c.block(after).Sub(now); got != want {
			t.Errorf("Retry-After %q blocks for %v, want %v", after, got, want)
		}
	}
}

func TestQuota(t *testing.T) {
	now := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	for header, want := range map[string]struct {
		left    int
		blocked time.Duration
	}{
		`"default";r=1190;t=300`:                   {1190, 0},
		`"default";r=49;t=120`:                     {49, 2 * time.Minute},
		`"burst";r=3;t=1, "default";r=900;t=200`:   {900, 0},
		`"default";q=1200;r=7;t=30, "burst";r=9`:   {7, 30 * time.Second},
		`default; r = 1; t = 2`:                    {-1, 0},
		`"default";r=-1;t=5`:                       {-1, 0},
		`"default";r=99999999999999999999999;t=30`: {-1, 0},
		``: {-1, 0},
	} {
		c := newClient("test")
		c.now = func() time.Time { return now }
		c.quota(&http.Response{Header: http.Header{"Ratelimit": {header}}})
		blocked := time.Duration(0)
		if until := c.blockedUntil(); !until.IsZero() {
			blocked = until.Sub(now)
		}
		if got := c.used().Left; got != want.left || blocked != want.blocked {
			t.Errorf("%s: %d left, blocked for %v, want %+v", header, got, blocked, want)
		}
	}
}

// TestOverTheNetwork makes a turn as it is made in earnest, budget and all, and
// shows that a redirect does not carry a token away.
func TestOverTheNetwork(t *testing.T) {
	w := newWorld(t, "example.org")
	w.hosts("app.example.org")
	var seen []string
	server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		seen = append(seen, r.UserAgent())
		w.api.ServeHTTP(rw, r)
	}))
	defer server.Close()
	w.want.URL = server.URL + "/client/v4/"
	k := New(w.want, "edgeward-tunnel/v1", slog.New(slog.DiscardHandler))
	defer k.client.http.CloseIdleConnections()
	if _, err := k.Turn(context.Background()); err != nil {
		t.Fatal(err)
	}
	w.expect(pair("app.example.org", "main")...)
	if len(seen) != 5 || seen[0] != "edgeward-tunnel/v1" {
		t.Errorf("the calls come from %q", seen)
	}
	redirect := httptest.NewServer(http.RedirectHandler(server.URL, http.StatusTemporaryRedirect))
	defer redirect.Close()
	seen = nil
	w.want.URL = redirect.URL
	k = New(w.want, "test", slog.New(slog.DiscardHandler))
	defer k.client.http.CloseIdleConnections()
	if _, err := k.Turn(context.Background()); err == nil || len(seen) > 0 {
		t.Errorf("a redirect is followed: %v", err)
	}
	server.Close()
	w.want.URL = server.URL
	if _, err := New(w.want, "test", slog.New(slog.DiscardHandler)).Turn(context.Background()); err == nil || !strings.Contains(err.Error(), "connection refused") || strings.Contains(err.Error(), "http://") {
		t.Errorf("nobody there: %v", err)
	}
}

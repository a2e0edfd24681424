package e2e

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/edgeward/edgeward/test/rig"
	"github.com/edgeward/edgeward/test/rig/rigtest"
)

// The lines that tell of trouble with LAPI and of its end.
const (
	cannotPull = "cannot pull decisions, keeping the last ones"
	pulled     = "decisions pulled"
	again      = "decisions pulled, LAPI answers again"
)

// stream answers as LAPI does: all on a full pull, nothing new on a delta.
func stream(all []rig.FakeDecision) http.HandlerFunc {
	full, delta := rig.AnswerStream(all, nil), rig.AnswerStream(nil, nil)
	return func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("startup") == "true" {
			full(w, r)
		} else {
			delta(w, r)
		}
	}
}

// linesOf counts the lines with a message that concern a LAPI.
func (g *gateway) linesOf(message, url string) (found []line) {
	for _, l := range g.lines(message) {
		if l["url"] == url {
			found = append(found, l)
		}
	}
	return found
}

// TestFaults: whatever LAPI does, clients do not notice. A dozen middlewares
// follow a LAPI each, all LAPIs fail at once, every one in its own way, and
// recover, under a steady load that must be answered rightly and as fast as
// before. The bans of before stay in force throughout.
func TestFaults(t *testing.T) {
	g := newGateway(t, rig.TraefikOptions{TrustForwarded: true})
	const banned, later, free = "192.0.2.66", "192.0.2.67", "192.0.2.1"
	ban := func(id int64, value string) rig.FakeDecision {
		return rig.FakeDecision{ID: id, Origin: "crowdsec", Type: "ban", Scope: "Ip", Value: value, Duration: "3h59m59s", Scenario: "test"}
	}
	var before []rig.FakeDecision
	for i := range int64(100) {
		before = append(before, ban(i+1, fmt.Sprintf("198.51.100.%d", i)))
	}
	before = append(before, ban(1000, banned))
	after := append(before[:len(before):len(before)], ban(1001, later))
	page := []byte("<!DOCTYPE html><html><head><title>Log in</title></head><body>{\"new\":[],\"deleted\":[]}</body></html>")

	faults := []struct {
		name   string
		answer []http.HandlerFunc // the last one for good
		said   []string           // in the lines of the log, which are as many
	}{
		{"500", []http.HandlerFunc{rig.AnswerWith(500, "application/json", []byte(`{"message":"database is locked"}`))}, []string{"500 Internal Server Error"}},
		{"502 with a page", []http.HandlerFunc{rig.AnswerWith(502, "text/html", page)}, []string{"502 Bad Gateway"}},
		{"404", []http.HandlerFunc{rig.AnswerWith(404, "text/plain", []byte("404 page not found"))}, []string{"404 Not Found"}},
		{"a redirect", []http.HandlerFunc{http.RedirectHandler("/login", http.StatusFound).ServeHTTP}, []string{"302 Found"}},
		{"HTML", []http.HandlerFunc{rig.AnswerWith(200, "text/html", page)}, []string{"not a decision stream"}},
		{"garbage", []http.HandlerFunc{rig.AnswerWith(200, "application/json", []byte("\x00\xff\x1f\x8b garbage"))}, []string{"not a decision stream"}},
		{"another JSON", []http.HandlerFunc{rig.AnswerWith(200, "application/json", []byte(`{"status":"up"}`))}, []string{"not a decision stream"}},
		{"nothing", []http.HandlerFunc{rig.AnswerWith(200, "application/json", nil)}, []string{"not a decision stream"}},
		{"a list cut in a row", []http.HandlerFunc{rig.AnswerWith(200, "application/json", []byte(`{"deleted":null,"new":[{"id":1,"value":"1.2.3.4"},{"id":`))}, []string{"ends in the middle"}},
		{"half a body", []http.HandlerFunc{rig.AnswerHalf(before)}, []string{"unexpected EOF|connection reset|ends in the middle"}},
		{"30 s of silence", []http.HandlerFunc{rig.AnswerAfter(30*time.Second, rig.AnswerStream(nil, nil))}, []string{"silent for 1s"}},
		{"403", []http.HandlerFunc{rig.AnswerWith(403, "application/json", []byte(`{"message":"access forbidden"}`))}, []string{"refuses the credentials"}},
		{"one after another", []http.HandlerFunc{
			rig.AnswerWith(500, "text/plain", nil), rig.AnswerWith(200, "text/html", page), rig.AnswerWith(403, "text/plain", nil), stream(after),
		}, []string{"500", "not a decision stream", "refuses the credentials"}},
	}
	fakes := make([]*rig.FakeLAPI, len(faults))
	conf := site{plugins: map[string]object{}}
	var round []expected
	guard := func(router string, config object) {
		config["interval"], config["timeout"] = interval.String(), "1s"
		conf.plugins[router] = object{"lapi": config, "client": posing}
		round = append(round, expected{router, banned, 403}, expected{router, free, 200}, expected{router, free, 200})
	}
	for i := range faults {
		fakes[i] = rigtest.FakeLAPI(t)
		fakes[i].Answer(stream(before))
		guard(fmt.Sprintf("fault%d", i), object{"url": fakes[i].URL, "key": fmt.Sprintf("any%d", i)})
	}
	// What the real one does by itself: it goes away, and it refuses a key.
	gone, strict := newLAPI(t, rig.LAPIOptions{}), newLAPI(t, rig.LAPIOptions{})
	gone.ban(t, banned)
	strict.ban(t, banned)
	keyFile := filepath.Join(t.TempDir(), "key")
	setKey := func(key string) {
		if err := os.WriteFile(keyFile, []byte(key), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	setKey(strict.key)
	guard("gone", object{"url": gone.URL, "key": gone.key})
	guard("strict", object{"url": strict.URL, "keyFile": keyFile})
	g.serve(t, conf)
	for router := range conf.plugins {
		g.becomes(t, banned, router, 403, promise)
	}

	// The faults end before the fourth attempt of a plugin that doubles its
	// waits from a second, so that recovery is soon.
	const quiet, trouble = 6 * time.Second, 5 * time.Second
	load := g.startLoad(t, 300, round)
	time.Sleep(time.Second)
	load.cut(t, "warming up")
	time.Sleep(quiet)
	first := load.cut(t, "quiet before")

	asked := make([]int, len(faults)) // requests to each fake before its fault
	for i, fault := range faults {
		asked[i] = len(fakes[i].Requests())
		last := len(fault.answer) - 1
		fakes[i].Answer(fault.answer[last])
		fakes[i].Next(fault.answer[:last]...)
	}
	setKey("wrong")
	if err := gone.Stop(soon(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(trouble)
	troubled := load.cut(t, "in trouble")

	for i := range faults {
		fakes[i].Answer(stream(after))
	}
	setKey(strict.key)
	if err := gone.Start(soon(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	gone.ban(t, later)
	strict.ban(t, later)
	ended := time.Now()
	for router := range conf.plugins {
		g.becomes(t, later, router, 403, 20*time.Second)
	}
	t.Logf("all recovered %s after the end of the faults", time.Since(ended).Round(time.Millisecond))
	recovering := load.cut(t, "recovering")
	time.Sleep(quiet)
	second := load.cut(t, "quiet after")
	load.stop()

	// Noise: on two shared processors a phase of some seconds may well be
	// twice as slow as another. A request that waited for LAPI would have
	// taken a second.
	allowed := 2*max(first.at(0.99), second.at(0.99)) + 5*time.Millisecond
	for name, phase := range map[string]figures{"in trouble": troubled, "recovering": recovering} {
		if p99 := phase.at(0.99); p99 > allowed {
			t.Errorf("%s: p99 is %s, want at most %s, by the quiet phases", name, p99, allowed)
		}
	}

	for i, fault := range faults {
		t.Run(fault.name, func(t *testing.T) {
			requests := fakes[i].Requests()[asked[i]:]
			if len(requests) < 3 {
				t.Errorf("LAPI was asked %d times from the fault on, want 3 or more", len(requests))
			}
			// Nothing is certain after a fault but a full pull.
			for j, r := range requests[1:] {
				if got := r.Query["startup"]; j < max(1, len(fault.answer)-1) && (len(got) != 1 || got[0] != "true") {
					t.Errorf("request %d after the fault has startup=%q, want a full pull", j+1, got)
				}
			}
			wantLines(t, g, fakes[i].URL, fault.said...)
		})
	}
	t.Run("LAPI stopped and started", func(t *testing.T) { wantLines(t, g, gone.URL, "connection refused") })
	t.Run("a wrong key, then the right one", func(t *testing.T) { wantLines(t, g, strict.URL, "refuses the credentials") })
}

// wantLines checks that the log tells of the trouble with a LAPI once, or once
// for each kind of it, and once of its end; the start was told before.
func wantLines(t *testing.T, g *gateway, url string, said ...string) {
	t.Helper()
	troubles := g.linesOf(cannotPull, url)
	if len(troubles) != len(said) {
		t.Errorf("the log tells %d times of trouble, want %d: %v", len(troubles), len(said), troubles)
		return
	}
	for i, l := range troubles {
		ok := false
		for want := range strings.SplitSeq(said[i], "|") {
			ok = ok || strings.Contains(fmt.Sprint(l["err"]), want)
		}
		if !ok {
			t.Errorf("the log says %q, want %q", l["err"], said[i])
		}
		if l["level"] != "WARN" {
			t.Errorf("level is %v, want WARN", l["level"])
		}
	}
	if starts := g.linesOf(pulled, url); len(starts) != 1 {
		t.Errorf("the log tells %d times that decisions were pulled, want once, at the start: %v", len(starts), starts)
	}
	if ends := g.linesOf(again, url); len(ends) != 1 || ends[0]["away"] == "" {
		t.Errorf("the log tells %d times that LAPI answers again, want once, with how long it was away: %v", len(ends), ends)
	}
}

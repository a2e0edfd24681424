package e2e

import (
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/edgeward/edgeward/test/rig"
	"github.com/edgeward/edgeward/test/rig/rigtest"
)

// footprint is what a Traefik holds on to.
type footprint struct {
	goroutines int
	heap, rss  int64 // bytes; the heap as a collection leaves it
}

func (f footprint) String() string {
	return fmt.Sprintf("%d goroutines, %.1f MB live, %.1f MB resident", f.goroutines, float64(f.heap)/(1<<20), float64(f.rss)/(1<<20))
}

// footprint measures g once what the last reload dropped is gone.
func (g *gateway) footprint(t *testing.T) footprint {
	t.Helper()
	time.Sleep(2 * time.Second) // connections and handlers that are being dropped
	var f footprint
	var err error
	// The second collection takes what the first one's finalizers let go.
	for range 2 {
		resp, err := http.Get(g.APIURL + "/debug/pprof/heap?gc=1&debug=1")
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		match := regexp.MustCompile(`(?m)^# HeapAlloc = (\d+)`).FindSubmatch(text)
		if match == nil {
			t.Fatal("the heap profile does not tell HeapAlloc")
		}
		if f.heap, err = strconv.ParseInt(string(match[1]), 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	if f.goroutines, err = g.Goroutines(soon(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	if f.rss, err = g.RSS(); err != nil {
		t.Fatal(err)
	}
	return f
}

// TestReloads: a thousand configurations later Traefik weighs what it weighed
// before, one poller asks LAPI at its old pace, nobody was let through or
// refused by mistake meanwhile, and counts are kept.
func TestReloads(t *testing.T) {
	const reloads, warm, routers = 1000, 100, 5
	g := newGateway(t, rig.TraefikOptions{TrustForwarded: true})
	f := rigtest.FakeLAPI(t)
	var all []rig.FakeDecision
	for i := range int64(1000) {
		all = append(all, rig.FakeDecision{ID: i + 1, Origin: "crowdsec", Type: "ban", Scope: "Ip", Value: fmt.Sprintf("198.18.%d.%d", i/250, i%250), Duration: "4h", Scenario: "test"})
	}
	f.Answer(stream(all))
	const banned, greedy, free = "198.18.0.7", "192.0.2.9", "192.0.2.1"
	pki, err := rig.NewPKI(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	cert, key, err := pki.Server("gateway")
	if err != nil {
		t.Fatal(err)
	}
	conf := func(revision int) site {
		s := site{cert: cert, key: key, plugins: map[string]object{}, routers: map[string][]string{}, others: map[string]object{
			"mark": {"headers": object{"customResponseHeaders": object{"X-Revision": strconv.Itoa(revision)}}},
		}}
		// Two middlewares that change each time, shared by the routers.
		for _, name := range []string{"a", "b"} {
			s.plugins[name] = object{
				"lapi":       object{"url": f.URL, "key": "any", "interval": interval.String()},
				"client":     posing,
				"decisions":  object{"allow": []string{fmt.Sprintf("203.0.113.%d", revision%250)}},
				"rateLimits": []object{{"name": "sparse", "average": 1, "period": "24h", "burst": 1, "exempt": []string{free}}},
				"log":        object{"level": "warn"},
			}
		}
		for i := range routers {
			s.routers[fmt.Sprintf("r%d", i)] = []string{"mark", string("ab"[i%2])}
		}
		return s
	}
	g.serve(t, conf(0))
	g.becomes(t, banned, "r0", 403, promise)
	g.want(t, greedy, 200, "r0")
	g.want(t, greedy, 429, "r0")

	load := g.startLoad(t, 100, []expected{{"r1", banned, 403}, {"r2", greedy, 429}, {"r3", free, 200}, {"plain", banned, 200}})
	began := time.Now()
	asked := len(f.Requests())
	var before footprint
	for revision := 1; revision <= reloads; revision++ {
		if err := g.SetDynamic(soon(t, time.Minute), conf(revision).yaml(g.origin.URL)); err != nil {
			t.Fatal(err)
		}
		if revision == warm {
			before = g.footprint(t)
			t.Logf("after %d reloads: %v", revision, before)
		}
	}
	took := time.Since(began)
	requests := f.Requests()[asked:]
	t.Logf("a reload took %s", (took / reloads).Round(time.Millisecond))
	if got := g.ask(t, as(free, "r4")).header.Get("X-Revision"); got != strconv.Itoa(reloads) {
		t.Errorf("revision in force is %s, want %d", got, reloads)
	}
	load.cut(t, "during the reloads")
	load.stop()
	// What the last reloads dropped lives on for some seconds, in timers that
	// are still to tell of refusals gone unlogged.
	after := g.footprint(t)
	const leak = 4 << 20 // bytes; more of them than that are not noise
	for settled := time.Now().Add(15 * time.Second); after.heap-before.heap > leak && time.Now().Before(settled); {
		after = g.footprint(t)
	}
	t.Logf("after %d reloads: %v", reloads, after)

	// What may come and go by itself; a leak of one thing a reload would show
	// as 900 of it.
	if more := after.goroutines - before.goroutines; more > 50 {
		t.Errorf("%d reloads left %d goroutines more: %v, before %v", reloads-warm, more, after, before)
		if profile, err := g.GoroutineProfile(soon(t, time.Minute)); err == nil {
			t.Logf("%.6000s", profile)
		}
	}
	if more := after.heap - before.heap; more > leak {
		t.Errorf("%d reloads left %d bytes each: %v, before %v", reloads-warm, more/(reloads-warm), after, before)
	}
	if after.rss > before.rss*3/2 {
		t.Errorf("%d reloads made %v of %v", reloads-warm, after, before)
	}
	pace := took.Seconds() / interval.Seconds()
	t.Logf("LAPI was asked %d times in %s", len(requests), took.Round(time.Millisecond))
	if n := float64(len(requests)); n > 1.2*pace+2 || n < 0.8*pace-2 {
		t.Errorf("LAPI was asked %.0f times in %s, want once every %s", n, took, interval)
	}
	for _, r := range requests {
		if r.Query["startup"][0] == "true" {
			t.Error("a reload made the plugin pull everything again")
			break
		}
	}
}

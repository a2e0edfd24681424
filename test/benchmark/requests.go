package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/edgeward/edgeward/test/benchmark/figures"
	"github.com/edgeward/edgeward/test/rig"
)

// object is a piece of configuration.
type object = map[string]any

// route is a router of the Traefik that is measured: a middleware before the
// origin.
type route struct {
	name    string // in the table
	host    string // name of router and middleware, too
	through object // the middleware; nil for none
	proxied bool   // its requests come through a trusted proxy
	over    string // the route that it is compared with
	goal    time.Duration
	limited bool            // its answers carry RateLimit headers
	held    []rig.Decision  // what must be refused
	took    []time.Duration // CPU per request, by round
}

const (
	overlaySize = 400
	// The plugin's limit and Traefik's own, which no client here ever meets.
	limitAverage, limitBurst = 100, 200
	// turnLength is how many requests a route gets before it is the next one's
	// turn.
	turnLength = 5000
	// disturbed is the share of the machine that others may use during a turn.
	// Beyond it, a turn is made again while there is patience: work beside it
	// evicts what Traefik has in the processor's caches.
	disturbed = 0.1

	decisionsGoal  = 7 * time.Microsecond
	everythingGoal = 15 * time.Microsecond
)

// routesOf returns all that is compared. settled is a LAPI's key whose engine
// has decided before anything else; fresh one whose engine has overlay beside
// them.
func routesOf(lapi *rig.LAPI, settled, fresh string, base, overlay []rig.Decision) []*route {
	ours := func(key, interval string, more object) object {
		config := object{"lapi": object{"url": lapi.URL, "key": key, "interval": interval}}
		for name, value := range more {
			config[name] = value
		}
		return object{"plugin": object{"edgeward": config}}
	}
	// The one has its next pull after the run, so that it never sees the overlay.
	steady := func(more object) object { return ours(settled, "1h", more) }
	recent := func(more object) object { return ours(fresh, "10s", more) }
	limits := []object{{"name": "all", "average": limitAverage, "burst": limitBurst}}
	proxies := object{"trustedProxies": []string{"cloudflare", "127.0.0.1"}}
	both := slices.Concat(base, overlay)
	return []*route{
		{name: "no middleware", host: "none"},
		{name: "a plugin that only calls next", host: "empty", through: object{"plugin": object{"empty": object{}}}},
		{name: "decisions", host: "decisions", through: steady(nil), held: base, over: "empty", goal: decisionsGoal},
		{name: fmt.Sprintf("decisions, %d of them new", len(overlay)), host: "overlay", through: recent(nil), held: both, over: "empty", goal: decisionsGoal},
		{name: "decisions, rate limit, its headers", host: "limited", through: steady(object{"rateLimits": limits}), held: base, limited: true, over: "empty", goal: everythingGoal},
		{name: "Traefik's own rateLimit", host: "traefik", through: object{"rateLimit": object{"average": limitAverage, "burst": limitBurst}}, over: "empty"},
		{name: "proxied: no middleware", host: "proxied-none", proxied: true},
		{name: "proxied: a plugin that only calls next", host: "proxied-empty", proxied: true, through: object{"plugin": object{"empty": object{}}}},
		{name: "proxied: decisions", host: "proxied", proxied: true, through: steady(object{"client": proxies}), held: base, over: "proxied-empty", goal: decisionsGoal},
		{name: fmt.Sprintf("proxied: decisions, %d of them new, rate limit, its headers", len(overlay)), host: "proxied-everything", proxied: true, through: recent(object{"client": proxies, "rateLimits": limits}), held: both, limited: true, over: "proxied-empty", goal: everythingGoal},
	}
}

// site is the dynamic configuration with a router for each route.
func site(routes []*route, origin string) (string, error) {
	routers, middlewares := object{}, object{}
	for _, r := range routes {
		router := object{"rule": "Host(`" + r.host + ".test`)", "service": "origin"}
		if r.through != nil {
			router["middlewares"] = []string{r.host}
			middlewares[r.host] = r.through
		}
		routers[r.host] = router
	}
	http := object{"routers": routers, "services": object{"origin": object{"loadBalancer": object{"servers": []object{{"url": origin}}}}}}
	if len(middlewares) > 0 {
		http["middlewares"] = middlewares
	}
	text, err := json.Marshal(http)
	if err != nil {
		return "", fmt.Errorf("configure the routes: %w", err)
	}
	return "http: " + string(text) + "\n", nil
}

// requestFigures is the outcome of measureRequests.
type requestFigures struct {
	routes  []*route
	options options
	idle    float64 // CPU of Traefik without requests, as a share of one processor
	others  float64 // CPU of everything but this run, as a share of the machine
}

// measureRequests measures the CPU time of a request, side by side: all routes
// in one Traefik, whose heap and garbage collector they share; in rounds, and in
// turns of a fraction of a second within a round, in changing order, so that
// whatever disturbs the machine disturbs all alike.
func measureRequests(ctx context.Context, opts options) (*requestFigures, error) {
	base, overlay := draw(opts.decisions, 1), draw(overlaySize, 2)
	addresses, err := spare(opts.clients, base, overlay)
	if err != nil {
		return nil, err
	}
	origin, err := startOrigin(ctx)
	if err != nil {
		return nil, err
	}
	lapi, err := rig.StartLAPI(ctx, rig.LAPIOptions{Seed: base})
	if err != nil {
		return nil, err
	}
	defer lapi.Close()
	settled, err := lapi.AddBouncer(ctx, "settled")
	if err != nil {
		return nil, err
	}
	fresh, err := lapi.AddBouncer(ctx, "fresh")
	if err != nil {
		return nil, err
	}
	all := routesOf(lapi, settled, fresh, base, overlay)
	routes := chosen(all, opts.only)
	if len(routes) == 0 {
		return nil, nil
	}
	traefik, err := rig.StartTraefik(ctx, rig.TraefikOptions{Plugins: map[string]string{"empty": filepath.Join(opts.root, "test", "emptyplugin")}, TrustForwarded: true})
	if err != nil {
		return nil, err
	}
	defer traefik.Close()
	if err := withoutProfiles(ctx, traefik); err != nil {
		return nil, err
	}
	yaml, err := site(routes, origin)
	if err != nil {
		return nil, err
	}
	if err := traefik.SetDynamic(ctx, yaml); err != nil {
		return nil, err
	}
	// First what every engine has from the start, then what one of them learns.
	for _, r := range routes {
		if err := prove(ctx, traefik, r, base); err != nil {
			return nil, err
		}
	}
	if err := lapi.Import(ctx, overlay); err != nil {
		return nil, err
	}
	for _, r := range routes {
		if err := prove(ctx, traefik, r, r.held); err != nil {
			return nil, err
		}
	}

	to := strings.TrimPrefix(traefik.URL, "http://")
	direct, err := dial(ctx, to, addresses, false)
	if err != nil {
		return nil, err
	}
	defer direct.close()
	proxied, err := dial(ctx, to, addresses, true)
	if err != nil {
		return nil, err
	}
	defer proxied.close()
	turn := func(r *route, n int) (took time.Duration, others float64, err error) {
		s := direct
		if r.proxied {
			s = proxied
		}
		before, err := figures.CPU(traefik.PID())
		if err != nil {
			return 0, 0, err
		}
		watch, err := figures.WatchMachine(traefik.PID())
		if err != nil {
			return 0, 0, err
		}
		if err := s.run(r.host+".test", n); err != nil {
			return 0, 0, err
		}
		after, err := figures.CPU(traefik.PID())
		if err != nil {
			return 0, 0, err
		}
		others, err = watch()
		return after - before, others, err
	}
	for _, r := range routes {
		if _, _, err := turn(r, opts.requests/4); err != nil {
			return nil, err
		}
	}
	f := &requestFigures{routes: routes, options: opts}
	// A turn holds some garbage collections, and one more or less decides by
	// chance. In a fixed order it would not be chance: the same route would pay
	// for its neighbours.
	random := rand.New(rand.NewPCG(4, 0))
	turns := max(1, opts.requests/turnLength)
	patience := opts.patience
	for round := range opts.rounds {
		spent := make([]time.Duration, len(routes))
		for range turns {
			for _, i := range random.Perm(len(routes)) {
				took, others, err := turn(routes[i], opts.requests/turns)
				for err == nil && others > disturbed && patience > 0 {
					began := time.Now()
					if err = wait(ctx, time.Second); err == nil {
						took, others, err = turn(routes[i], opts.requests/turns)
					}
					patience -= time.Since(began)
				}
				if err != nil {
					return nil, err
				}
				spent[i] += took
				f.others += others / float64(turns*opts.rounds*len(routes))
			}
		}
		for i, r := range routes {
			r.took = append(r.took, spent[i]/time.Duration(opts.requests/turns*turns))
			opts.say("round %d: %s: %.1f µs", round+1, r.name, micro(r.took[round]))
		}
	}
	f.idle, err = idleShare(ctx, traefik, opts.settle)
	return f, err
}

// withoutProfiles starts Traefik again without its debugging API, on whose
// account it takes down each time a goroutine has to wait: a twentieth of what a
// request costs.
func withoutProfiles(ctx context.Context, traefik *rig.Traefik) error {
	path := filepath.Join(traefik.Dir, "traefik.yml")
	text, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("configure Traefik: %w", err)
	}
	const on, off = `"debug": true`, `"debug": false`
	if !bytes.Contains(text, []byte(on)) {
		return fmt.Errorf("configure Traefik: no %s in its configuration", on)
	}
	if err := traefik.Stop(ctx); err != nil {
		return err
	}
	if err := os.WriteFile(path, bytes.Replace(text, []byte(on), []byte(off), 1), 0o644); err != nil {
		return fmt.Errorf("configure Traefik: %w", err)
	}
	return traefik.Start(ctx)
}

// prove waits until a route refuses the banned and then checks that it is what
// it says: it lets others pass, and shows its limit.
func prove(ctx context.Context, traefik *rig.Traefik, r *route, held []rig.Decision) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if len(r.held) > 0 {
		addresses, err := banned(held)
		if err != nil {
			return err
		}
		last, err := banned(held[len(held)-min(len(held), overlaySize):])
		if err != nil {
			return err
		}
		for _, address := range slices.Concat(addresses, last) {
			if !r.proxied && !address.Is4() {
				continue // no such client can be had on loopback
			}
			for {
				resp, err := get(ctx, traefik.URL, r.host+".test", address, r.proxied)
				if err == nil && resp.StatusCode == http.StatusForbidden {
					break
				}
				if err := wait(ctx, 50*time.Millisecond); err != nil {
					return fmt.Errorf("wait until %s refuses %s: %w", r.host, address, err)
				}
			}
		}
	}
	free, err := spare(1, held)
	if err != nil {
		return err
	}
	resp, err := get(ctx, traefik.URL, r.host+".test", free[0], r.proxied)
	if err != nil {
		return fmt.Errorf("ask %s: %w", r.host, err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("ask %s: it answers %d to a client that nothing holds", r.host, resp.StatusCode)
	}
	if shown := resp.Header.Get("RateLimit") != ""; shown != r.limited {
		return fmt.Errorf("ask %s: it shows a rate limit: %v, want %v", r.host, shown, r.limited)
	}
	return nil
}

// liveHeap makes Traefik collect its garbage and returns what is left, in bytes.
func liveHeap(ctx context.Context, traefik *rig.Traefik) (int64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, traefik.APIURL+"/debug/pprof/heap?gc=1&debug=1", nil)
	if err != nil {
		return 0, fmt.Errorf("read Traefik's heap: %w", err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, fmt.Errorf("read Traefik's heap: %w", err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, fmt.Errorf("read Traefik's heap: %w", err)
	}
	match := heapAlloc.FindSubmatch(text)
	if match == nil {
		return 0, errors.New("read Traefik's heap: its profile does not say")
	}
	return strconv.ParseInt(string(match[1]), 10, 64)
}

var heapAlloc = regexp.MustCompile(`(?m)^# HeapAlloc = (\d+)$`)

// idleShare measures what Traefik uses while nobody asks, polls of LAPI
// included, as a share of one processor.
func idleShare(ctx context.Context, traefik *rig.Traefik, d time.Duration) (float64, error) {
	before, err := figures.CPU(traefik.PID())
	if err != nil {
		return 0, err
	}
	if err := wait(ctx, d); err != nil {
		return 0, err
	}
	after, err := figures.CPU(traefik.PID())
	return float64(after-before) / float64(d), err
}

func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

func micro(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

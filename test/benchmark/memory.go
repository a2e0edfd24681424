package main

import (
	"context"
	"fmt"
	"time"

	"github.com/edgeward/edgeward/test/benchmark/figures"
	"github.com/edgeward/edgeward/test/rig"
)

// memory is what a Traefik of its own holds.
type memory struct {
	name     string
	resident int64 // settled, in bytes
	peak     int64 // resident, while loading
	live     int64 // heap, without garbage
}

// measureMemory measures Traefiks with tables of different sizes, one after the
// other, each settled after its first pull.
func measureMemory(ctx context.Context, opts options) ([]memory, error) {
	type size struct {
		name string
		n    int // decisions; less than none: no plugin
	}
	sizes := []size{{"Traefik without plugins", -1}}
	for _, n := range []int{0, opts.decisions * 15 / 100, opts.decisions} {
		sizes = append(sizes, size{"with the plugin, " + figures.Thousands(n) + " decisions", n})
	}
	var all []memory
	for _, s := range sizes {
		if !opts.only.MatchString(s.name) {
			continue
		}
		m, err := memoryOf(ctx, s.n, opts.settle)
		if err != nil {
			return nil, fmt.Errorf("measure the memory of Traefik %s: %w", s.name, err)
		}
		m.name = s.name
		opts.say("memory: %s: %d MB", m.name, m.resident>>20)
		all = append(all, m)
	}
	return all, nil
}

func memoryOf(ctx context.Context, n int, settle time.Duration) (m memory, err error) {
	traefik, err := rig.StartTraefik(ctx, rig.TraefikOptions{Bare: n < 0})
	if err != nil {
		return m, err
	}
	defer traefik.Close()
	if n >= 0 {
		if err := loadTable(ctx, traefik, n); err != nil {
			return m, err
		}
	}
	if m.live, err = liveHeap(ctx, traefik); err != nil {
		return m, err
	}
	// Go gives memory back to the system little by little.
	if err := wait(ctx, settle); err != nil {
		return m, err
	}
	if m.peak, err = traefik.PeakRSS(); err != nil {
		return m, err
	}
	m.resident, err = traefik.RSS()
	return m, err
}

// loadTable gives a Traefik a router with the plugin and returns when n
// decisions are in force there. LAPI is gone then.
func loadTable(ctx context.Context, traefik *rig.Traefik, n int) error {
	held := draw(n, 1)
	lapi, err := rig.StartLAPI(ctx, rig.LAPIOptions{Seed: held})
	if err != nil {
		return err
	}
	defer lapi.Close()
	key, err := lapi.AddBouncer(ctx, "memory")
	if err != nil {
		return err
	}
	origin, err := startOrigin(ctx)
	if err != nil {
		return err
	}
	r := &route{host: "memory", held: held, through: object{"plugin": object{"edgeward": object{
		"lapi": object{"url": lapi.URL, "key": key, "interval": "1h"},
	}}}}
	yaml, err := site([]*route{r}, origin)
	if err != nil {
		return err
	}
	if err := traefik.SetDynamic(ctx, yaml); err != nil {
		return err
	}
	return prove(ctx, traefik, r, held)
}

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/edgeward/edgeward/test/benchmark/figures"
	"github.com/edgeward/edgeward/test/benchmark/stage"
	"github.com/edgeward/edgeward/test/rig"
)

// course is what one program did in one round, from its start with an empty
// kernel.
type course struct {
	late        *lateError    // it did not get that far in time; the rest is not known
	enforced    time.Duration // from the start until the kernel stops all
	startCPU    time.Duration
	ban, unban  time.Duration // from the arrival of the delta until the kernel does it
	banCPU      time.Duration
	unbanCPU    time.Duration
	scrape      time.Duration
	scrapeCPU   time.Duration
	idle        float64 // of a processor
	memory, max int64   // resident, in bytes
}

// conduct is what a program does where bans could be lost.
type conduct struct {
	ranges  string // a banned range
	flushed string // another program flushes the ruleset
	ended   string // the program ends
}

// contest is all courses with as many decisions.
type contest struct {
	decisions int
	courses   map[string][]course // by program, in order of rounds
}

// slow is a start that is not waited for a second time.
const slow = time.Minute

// sampled is how many of the banned addresses are asked whether they are stopped.
const sampled = 64

// compare runs the programs side by side: each in a namespace of its own, on the
// same LAPI, in rounds with changing order.
func compare(ctx context.Context, opts options, programs []program) (contests []contest, conducts map[string]conduct, err error) {
	conducts = map[string]conduct{}
	for _, n := range opts.sizes {
		c, err := hold(ctx, opts, programs, n, conducts)
		if err != nil {
			return nil, nil, err
		}
		contests = append(contests, c)
	}
	return contests, conducts, nil
}

// hold holds a contest. It adds to conducts those that are not known yet.
func hold(ctx context.Context, opts options, programs []program, n int, conducts map[string]conduct) (contest, error) {
	banned := draw(n, 1)
	c := contest{n, map[string][]course{}}
	lapi, err := rig.StartLAPI(ctx, rig.LAPIOptions{Seed: seeds(banned)})
	if err != nil {
		return c, err
	}
	defer lapi.Close()
	keys := map[string]string{}
	for _, p := range programs {
		if keys[p.name], err = lapi.AddBouncer(ctx, p.name); err != nil {
			return c, err
		}
	}
	for round := range opts.rounds {
		order := slices.Clone(programs)
		if round%2 == 1 {
			slices.Reverse(order)
		}
		for _, p := range order {
			if past := c.courses[p.name]; len(past) > 0 && past[0].enforced >= slow {
				continue // it would be so again
			}
			err := stage.Within(ctx, func(s *stage.Scope) error {
				l, err := launch(s, p, lapi, keys[p.name], banned)
				if err != nil {
					return err
				}
				one, err := l.course(opts, spareAddr(round))
				if err != nil {
					return l.agent.explain(err)
				}
				c.courses[p.name] = append(c.courses[p.name], one)
				if one.late != nil {
					opts.say("%s, %s decisions: %v", p.name, figures.Thousands(n), one.late)
					return nil
				}
				opts.say("%s, %s decisions, round %d: enforced in %v, one ban in %v with %v of CPU, %d MB",
					p.name, figures.Thousands(n), round+1, one.enforced, one.ban, one.banCPU, one.memory>>20)
				if _, known := conducts[p.name]; !known {
					conducts[p.name], err = l.conduct(opts.soon)
				}
				return l.agent.explain(err)
			})
			if err != nil {
				return c, err
			}
		}
	}
	return c, nil
}

// launched is a program that follows a LAPI.
type launched struct {
	*world
	agent  *agent
	lapi   *rig.LAPI
	relay  *relay
	banned []netip.Addr
}

func launch(s *stage.Scope, p program, lapi *rig.LAPI, key string, banned []netip.Addr) (*launched, error) {
	w := newWorld(s)
	to, err := url.Parse(lapi.URL)
	if err != nil {
		return nil, fmt.Errorf("read LAPI's url: %w", err)
	}
	r := newRelay(to)
	at, err := w.serve(r)
	if err != nil {
		return nil, err
	}
	a, err := w.start(p, at, key)
	return &launched{w, a, lapi, r, banned}, err
}

// course measures a program from its start.
func (l *launched) course(opts options, victim netip.Addr) (c course, err error) {
	ctx, a := l.Scope, l.agent
	at, err := l.stopped(true, opts.limit, sample(l.banned, sampled)...)
	c.enforced = at.Sub(a.began)
	if errors.As(err, &c.late) {
		c.startCPU, err = a.cpu()
		if err == nil {
			c.memory, c.max, err = a.memory()
		}
		return c, err
	}
	if err != nil {
		return c, err
	}
	if c.startCPU, err = a.rest(ctx, opts.quiet); err != nil {
		return c, err
	}
	before, began := c.startCPU, time.Now()
	if err := stage.Wait(ctx, opts.settle); err != nil {
		return c, err
	}
	after, err := a.cpu()
	if err != nil {
		return c, err
	}
	c.idle = float64(after-before) / float64(time.Since(began))
	if c.memory, c.max, err = a.memory(); err != nil {
		return c, err
	}
	if c.ban, c.banCPU, err = l.change(opts, c.idle, victim.String(), true, victim); err != nil {
		return c, err
	}
	if c.unban, c.unbanCPU, err = l.change(opts, c.idle, victim.String(), false, victim); err != nil {
		return c, err
	}
	c.scrape, c.scrapeCPU, err = a.scrapes(ctx, opts.scrapes)
	return c, err
}

// change bans a value, or unbans it, and returns what it took from the arrival
// of the delta until the kernel stops the address, or lets it pass, and what
// processor time until the program rests again, its usual idleness not counted.
func (l *launched) change(opts options, idle float64, value string, ban bool, addr netip.Addr) (took, cpu time.Duration, err error) {
	before, err := l.agent.cpu()
	if err != nil {
		return 0, 0, err
	}
	began := time.Now()
	found := l.relay.expect(value)
	if ban {
		err = l.lapi.Ban(l.Scope, value, time.Hour)
	} else {
		err = l.lapi.Unban(l.Scope, value)
	}
	if err != nil {
		return 0, 0, err
	}
	var arrived time.Time
	select {
	case arrived = <-found:
	case <-time.After(time.Minute):
		return 0, 0, fmt.Errorf("wait for the decision on %s: no pull brought it", value)
	case <-l.Scope.Done():
		return 0, 0, context.Cause(l.Scope)
	}
	at, err := l.stopped(ban, time.Minute, addr)
	if err != nil {
		return 0, 0, fmt.Errorf("after a change of %s: %w", value, err)
	}
	after, err := l.agent.rest(l.Scope, opts.quiet)
	spent := after - before - time.Duration(idle*float64(time.Since(began)))
	return at.Sub(arrived), max(0, spent), err
}

// scrapes returns the middle of what some scrapes took, and the processor time of
// one.
func (a *agent) scrapes(ctx context.Context, n int) (took, cpu time.Duration, err error) {
	before, err := a.cpu()
	if err != nil {
		return 0, 0, err
	}
	var all []time.Duration
	for range n {
		_, d, err := a.scrape(ctx)
		if err != nil {
			return 0, 0, err
		}
		all = append(all, d)
	}
	after, err := a.cpu()
	return figures.SpreadOf(all).Median, (after - before) / time.Duration(n), err
}

// conduct finds out what becomes of bans in three situations, soon after.
func (l *launched) conduct(soon time.Duration) (c conduct, err error) {
	some := sample(l.banned, sampled)
	word := func(done func() error) string {
		if done() == nil {
			return "yes"
		}
		return "no"
	}
	ranged := spareRange(0)
	found := l.relay.expect(ranged.String())
	if err := l.lapi.Ban(l.Scope, ranged.String(), time.Hour); err != nil {
		return c, err
	}
	select {
	case <-found:
	case <-time.After(10 * pollEvery):
		return c, fmt.Errorf("wait for the decision on %s: no pull brought it", ranged)
	}
	c.ranges = word(func() error {
		_, err := l.stopped(true, soon, ranged.Addr().Next(), ranged.Addr().Next().Next())
		return err
	})
	if err := l.lapi.Unban(l.Scope, ranged.String()); err != nil {
		return c, err
	}
	if _, err := l.Node.Exec("nft", "flush", "ruleset"); err != nil {
		return c, err
	}
	c.flushed = word(func() error {
		_, err := l.stopped(true, soon, some...)
		return err
	})
	if err := l.agent.end(l.Scope); err != nil {
		return c, err
	}
	passed, err := l.passing(some...)
	c.ended = map[bool]string{true: "yes", false: "no"}[len(passed) == 0]
	return c, err
}

// contestTable compares the programs with as many decisions.
func contestTable(c contest, programs []program) string {
	rows := [][]string{{figures.Thousands(c.decisions) + " decisions: median (least to most)"}}
	for _, p := range programs {
		rows[0] = append(rows[0], strings.TrimSpace(p.name+" "+p.version))
	}
	rows[0] = append(rows[0], "ratio", "goal")
	seconds := func(d time.Duration) float64 { return d.Seconds() }
	millis := func(d time.Duration) float64 { return 1000 * d.Seconds() }
	const mega = 1 << 20
	residentGoal := 0.0
	if c.decisions == 100_000 {
		residentGoal = 45
	}
	for _, line := range []struct {
		name  string
		of    func(course) float64
		goal  float64
		early bool // known of a program that is late as well
	}{
		{"start until all are enforced, s", func(c course) float64 { return seconds(c.enforced) }, 0, true},
		{"processor time for that, s", func(c course) float64 { return seconds(c.startCPU) }, 0, true},
		{"resident then, MB", func(c course) float64 { return float64(c.memory) / mega }, residentGoal, true},
		{"at most, MB", func(c course) float64 { return float64(c.max) / mega }, 0, true},
		{"one ban, delta to kernel, ms", func(c course) float64 { return millis(c.ban) }, 5, false},
		{"processor time for that, ms", func(c course) float64 { return millis(c.banCPU) }, 0, false},
		{"one unban, delta to kernel, ms", func(c course) float64 { return millis(c.unban) }, 5, false},
		{"processor time for that, ms", func(c course) float64 { return millis(c.unbanCPU) }, 0, false},
		{"a scrape of the metrics, ms", func(c course) float64 { return millis(c.scrape) }, 5, false},
		{"processor time for that, ms", func(c course) float64 { return millis(c.scrapeCPU) }, 0, false},
		{"idle, polls included, ‰ of a processor", func(c course) float64 { return 1000 * c.idle }, 0, false},
	} {
		row := []string{line.name}
		var medians []float64
		more := "" // than the last median
		for _, p := range programs {
			late := c.courses[p.name][0].late
			if late != nil && !line.early {
				row = append(row, "")
				continue
			}
			var all []float64
			for _, run := range c.courses[p.name] {
				all = append(all, line.of(run))
			}
			s := figures.SpreadOf(all)
			medians = append(medians, s.Median)
			more = ""
			if late != nil {
				more = "> "
			}
			row = append(row, more+shown(s))
		}
		ratio := ""
		if len(medians) > 1 && medians[0] > 0 {
			ratio = "1 : " + more + short(medians[1]/medians[0])
		}
		row = append(row, ratio, "")
		if line.goal > 0 {
			row[len(row)-1] = short(line.goal) + ": " + figures.Held(medians[0] <= line.goal)
		}
		rows = append(rows, row)
	}
	text := figures.Table(rows)
	for _, p := range programs {
		first := c.courses[p.name][0]
		if late := first.late; late != nil {
			text += fmt.Sprintf("\nAfter %v, when %s was stopped, packets from %d of %d banned addresses still passed.\n", late.after, p.name, late.passing, late.of)
		} else if first.enforced >= slow {
			text += fmt.Sprintf("\n%s was run once, because it takes so long.\n", p.name)
		}
	}
	return text
}

func conductTable(conducts map[string]conduct, programs []program, soon time.Duration) string {
	rows := [][]string{{"bans hold"}, {"for the addresses of a banned range"}, {fmt.Sprintf("within %v of a foreign `nft flush ruleset`", soon)}, {"after the program has ended"}}
	for _, p := range programs {
		c := conducts[p.name]
		for i, word := range []string{p.name, c.ranges, c.flushed, c.ended} {
			rows[i] = append(rows[i], word)
		}
	}
	return figures.Table(rows)
}

// short writes a number with two or three digits that count.
func short(v float64) string {
	switch {
	case v != 0 && v < 0.1 && v > -0.1:
		return fmt.Sprintf("%.3f", v)
	case v < 1 && v > -1:
		return fmt.Sprintf("%.2f", v)
	case v < 100 && v > -100:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.0f", v)
}

func shown(s figures.Spread[float64]) string {
	if s.Least == s.Most {
		return short(s.Median)
	}
	return fmt.Sprintf("%s (%s to %s)", short(s.Median), short(s.Least), short(s.Most))
}

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/edgeward/edgeward/test/benchmark/figures"
	"github.com/edgeward/edgeward/test/benchmark/stage"
)

// solo is what our bouncer does alone with many decisions.
type solo struct {
	decisions    int
	enforced     time.Duration
	startCPU     time.Duration
	memory, peak int64 // resident, in bytes
	scrape       time.Duration
	bans, ranges []time.Duration // from the arrival of the delta until the kernel stops it
	same         resync          // nothing has changed
	other        resync          // one in a hundred was replaced: the new ones count
	second       resync          // the same once more: the old ones end
	memoryAfter  int64
	peakAfter    int64
}

// resync is a full pull.
type resync struct {
	took time.Duration // from the request until all of it counts
	cpu  time.Duration
}

func alonePart(ctx context.Context, opts options, ours func() (program, error)) (string, error) {
	mine, err := ours()
	if err != nil {
		return "", err
	}
	var all []solo
	for _, n := range opts.alone {
		err := stage.Within(ctx, func(s *stage.Scope) error {
			one, err := measureAlone(s, opts, mine, n)
			all = append(all, one)
			return err
		})
		if err != nil {
			return "", fmt.Errorf("with %d decisions: %w", n, err)
		}
	}
	return soloTable(all, opts) + fmt.Sprintf(`
The stream comes from a generator that writes what LAPI would, because LAPI takes
minutes to be filled with as much; %s of the decisions are ranges (/24), a fifth of the
others IPv6. A delta's arrival is when the generator begins to write it. A
ban that a full pull lacks ends when the next one lacks it too.
`, figures.Thousands(opts.ranges)), nil
}

func measureAlone(s *stage.Scope, opts options, ours program, n int) (one solo, err error) {
	const part = 100 // one in so many changes
	addrs := draw(n+n/part, 2)
	later := addrs[n:]
	addrs = addrs[:n]
	values := make([]netip.Prefix, 0, n+opts.ranges)
	for _, addr := range addrs {
		values = append(values, netip.PrefixFrom(addr, addr.BitLen()))
	}
	for i := range opts.ranges {
		values = append(values, spareRange(i))
	}
	from := newStream(values)
	values = nil
	w := newWorld(s)
	url, err := w.serve(from)
	if err != nil {
		return one, err
	}
	a, err := w.start(ours, url, "key")
	if err != nil {
		return one, err
	}
	defer func() { err = a.explain(err) }()
	some := append(sample(addrs, sampled), spareRange(0).Addr(), spareRange(opts.ranges-1).Addr())
	at, err := w.stopped(true, 3*time.Minute, some...)
	if err != nil {
		return one, err
	}
	one.decisions, one.enforced = n, at.Sub(a.began)
	if one.startCPU, err = a.rest(s, opts.quiet); err != nil {
		return one, err
	}
	if err := stage.Wait(s, opts.settle); err != nil {
		return one, err
	}
	if one.memory, one.peak, err = a.memory(); err != nil {
		return one, err
	}
	if one.scrape, _, err = a.scrapes(s, opts.scrapes); err != nil {
		return one, err
	}
	opts.say("alone, %s: enforced in %v, %d MB", figures.Thousands(n), one.enforced, one.memory>>20)
	<-from.pulled

	deltas := func(value func(int) netip.Prefix) (all []time.Duration, err error) {
		for i := range opts.bans {
			v := value(i)
			from.add(v)
			var arrived time.Time
			select {
			case arrived = <-from.served:
			case <-time.After(10 * pollEvery):
				return nil, errors.New("it does not pull")
			case <-s.Done():
				return nil, context.Cause(s)
			}
			at, err := w.stopped(true, 10*time.Second, v.Addr())
			if err != nil {
				return nil, err
			}
			all = append(all, at.Sub(arrived))
		}
		return all, nil
	}
	if one.bans, err = deltas(func(i int) netip.Prefix { return netip.PrefixFrom(spareAddr(i), 32) }); err != nil {
		return one, err
	}
	if one.ranges, err = deltas(func(i int) netip.Prefix { return spareRange(opts.ranges + i) }); err != nil {
		return one, err
	}
	opts.say("alone, %s: bans in %v, ranges in %v", figures.Thousands(n), one.bans, one.ranges)

	if one.same, err = w.resync(opts, a, from, 2); err != nil {
		return one, fmt.Errorf("resync unchanged: %w", err)
	}
	changed := map[int]netip.Prefix{}
	var freed []netip.Addr
	for i, addr := range later {
		changed[i*part] = netip.PrefixFrom(addr, addr.BitLen())
		freed = append(freed, addrs[i*part])
	}
	from.replace(changed)
	if one.other, err = w.resync(opts, a, from, 3); err != nil {
		return one, fmt.Errorf("resync with changes: %w", err)
	}
	few := min(sampled, len(later))
	if _, err := w.stopped(true, time.Second, sample(later, few)...); err != nil {
		return one, err
	}
	if one.second, err = w.resync(opts, a, from, 4); err != nil {
		return one, fmt.Errorf("resync with the same changes: %w", err)
	}
	if _, err := w.stopped(false, time.Second, sample(freed, few)...); err != nil {
		return one, err
	}
	opts.say("alone, %s: resync unchanged %+v, changed %+v, and again %+v", figures.Thousands(n), one.same, one.other, one.second)
	if err := stage.Wait(s, opts.settle); err != nil {
		return one, err
	}
	one.memoryAfter, one.peakAfter, err = a.memory()
	return one, err
}

// resync makes the agent pull everything and returns when that is its nth full
// pull.
func (w *world) resync(opts options, a *agent, from *stream, nth int) (r resync, err error) {
	from.resync()
	var asked time.Time
	before, err := a.cpu()
	if err != nil {
		return r, err
	}
	select {
	case asked = <-from.pulled:
	case <-time.After(time.Minute):
		return r, errors.New("it does not pull everything")
	case <-w.Scope.Done():
		return r, context.Cause(w.Scope)
	}
	want := fmt.Sprintf("edgeward_pulls_total{kind=\"full\"} %d\n", nth)
	for began := time.Now(); ; {
		text, _, err := a.scrape(w.Scope)
		if err != nil {
			return r, err
		}
		if strings.Contains(text, want) {
			break
		}
		if time.Since(began) > time.Minute {
			return r, errors.New("the full pull does not come to an end")
		}
		if err := stage.Wait(w.Scope, 20*time.Millisecond); err != nil {
			return r, err
		}
	}
	r.took = time.Since(asked)
	after, err := a.rest(w.Scope, opts.quiet)
	r.cpu = after - before
	return r, err
}

func soloTable(all []solo, opts options) string {
	rows := [][]string{{"edgeward-bouncer alone"}}
	for _, one := range all {
		rows[0] = append(rows[0], figures.Thousands(one.decisions)+" decisions")
	}
	rows[0] = append(rows[0], "goal")
	middle := func(all []time.Duration) string {
		var list []float64
		for _, d := range all {
			list = append(list, 1000*d.Seconds())
		}
		return shown(figures.SpreadOf(list))
	}
	slowest := func(of func(solo) []time.Duration) (worst time.Duration) {
		for _, one := range all {
			worst = max(worst, figures.SpreadOf(of(one)).Median)
		}
		return worst
	}
	bans := func(s solo) []time.Duration { return s.bans }
	ranges := func(s solo) []time.Duration { return s.ranges }
	scrape := func(s solo) []time.Duration { return []time.Duration{s.scrape} }
	const fast = 5 * time.Millisecond
	const largest, most = 1_000_000, 250 << 20
	memoryGoal := ""
	for _, one := range all {
		if one.decisions == largest {
			memoryGoal = "250 at 1,000,000: " + figures.Held(max(one.memory, one.memoryAfter) <= most)
		}
	}
	megabytes := func(n int64) string { return fmt.Sprintf("%.0f", float64(n)/(1<<20)) }
	for _, line := range []struct {
		name, goal string
		of         func(solo) string
	}{
		{"start until all are enforced, s", "", func(s solo) string { return short(s.enforced.Seconds()) }},
		{"processor time for that, s", "", func(s solo) string { return short(s.startCPU.Seconds()) }},
		{"resident then, MB", memoryGoal, func(s solo) string { return megabytes(s.memory) }},
		{"at most until then, MB", "", func(s solo) string { return megabytes(s.peak) }},
		{"one ban, delta to kernel, ms", "5: " + figures.Held(slowest(bans) <= fast), func(s solo) string { return middle(s.bans) }},
		{"one range more, delta to kernel, ms", "5: " + figures.Held(slowest(ranges) <= fast), func(s solo) string { return middle(s.ranges) }},
		{"a scrape of the metrics, ms", "5: " + figures.Held(slowest(scrape) <= fast), func(s solo) string { return middle(scrape(s)) }},
		{"full pull, nothing changed: request to end, s", "", func(s solo) string { return short(s.same.took.Seconds()) }},
		{"processor time for that, s", "", func(s solo) string { return short(s.same.cpu.Seconds()) }},
		{"full pull, 1 % replaced, so that new bans count: request to end, s", "", func(s solo) string { return short(s.other.took.Seconds()) }},
		{"processor time for that, s", "", func(s solo) string { return short(s.other.cpu.Seconds()) }},
		{"the next full pull, by which the old ones end: request to end, s", "", func(s solo) string { return short(s.second.took.Seconds()) }},
		{"processor time for that, s", "", func(s solo) string { return short(s.second.cpu.Seconds()) }},
		{"resident after all that, MB", "", func(s solo) string { return megabytes(s.memoryAfter) }},
		{"at most during all, MB", "", func(s solo) string { return megabytes(s.peakAfter) }},
	} {
		row := []string{line.name}
		for _, one := range all {
			row = append(row, line.of(one))
		}
		rows = append(rows, append(row, line.goal))
	}
	return figures.Table(rows)
}

package main

import (
	"fmt"
	"slices"
	"time"

	"github.com/edgeward/edgeward/test/benchmark/figures"
)

type spread = figures.Spread[time.Duration]

// show writes a spread in microseconds.
func show(s spread) string {
	return fmt.Sprintf("%.1f (%.1f to %.1f)", micro(s.Median), micro(s.Least), micro(s.Most))
}

// over is the spread of what one route took beyond another, round by round: what
// the machine did in a round, it did to both.
func (f *requestFigures) over(r *route) (s spread, ok bool) {
	i := slices.IndexFunc(f.routes, func(other *route) bool { return other.host == r.over })
	if i < 0 {
		return spread{}, false
	}
	var more []time.Duration
	for round, took := range r.took {
		more = append(more, took-f.routes[i].took[round])
	}
	return figures.SpreadOf(more), true
}

func (f *requestFigures) markdown() string {
	rows := [][]string{{"µs of CPU for a request", "median (least to most)", "over the empty plugin", "goal"}}
	for _, r := range f.routes {
		row := []string{r.name, show(figures.SpreadOf(r.took)), "", ""}
		if s, ok := f.over(r); ok {
			row[2] = show(s)
			if r.goal > 0 {
				row[3] = fmt.Sprintf("%.0f: ", micro(r.goal)) + figures.Held(s.Median <= r.goal)
			}
		}
		rows = append(rows, row)
	}
	return figures.Table(rows)
}

// note says what the table rests on.
func (f *requestFigures) note() string {
	return fmt.Sprintf(`CPU time of the Traefik process, user and system: %d rounds of %s requests from
%s clients on each line, side by side in one Traefik, with %s decisions, a
tenth of them ranges and a fifth IPv6. Proxied requests carry X-Forwarded-For and
are compared with the empty plugin under the same. While this was measured,
everything else used %.0f %% of the machine. Without requests this Traefik used
%.2f %% of a processor, polls of LAPI included.`,
		f.options.rounds, figures.Thousands(f.options.requests), figures.Thousands(f.options.clients), figures.Thousands(f.options.decisions), 100*f.others, 100*f.idle)
}

func memoryMarkdown(all []memory) string {
	rows := [][]string{{"MB of memory", "resident", "its peak", "live heap"}}
	for _, m := range all {
		rows = append(rows, []string{m.name, megabytes(m.resident), megabytes(m.peak), megabytes(m.live)})
	}
	return figures.Table(rows)
}

func megabytes(n int64) string { return fmt.Sprintf("%.0f", float64(n)/(1<<20)) }

func (f *engineFigures) markdown() string {
	rows := [][]string{append([]string{"decision engine"}, f.columns...)}
	for _, name := range f.rows {
		row := []string{name}
		for _, column := range f.columns {
			cell := ""
			if m, ok := f.cells[name][column]; ok {
				cell = m.String()
			}
			row = append(row, cell)
		}
		rows = append(rows, row)
	}
	return figures.Table(rows)
}

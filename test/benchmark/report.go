package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// table writes a Markdown table.
func table(rows [][]string) string {
	var b strings.Builder
	for i, row := range rows {
		fmt.Fprintf(&b, "| %s |\n", strings.Join(row, " | "))
		if i == 0 {
			b.WriteString("|---" + strings.Repeat("|---:", len(row)-1) + "|\n")
		}
	}
	return b.String()
}

// spread is the middle, least and most of some durations.
type spread struct{ median, least, most time.Duration }

func spreadOf(all []time.Duration) spread {
	all = slices.Sorted(slices.Values(all))
	middle := all[len(all)/2]
	if len(all)%2 == 0 {
		middle = (all[len(all)/2-1] + middle) / 2
	}
	return spread{middle, all[0], all[len(all)-1]}
}

func (s spread) String() string {
	return fmt.Sprintf("%.1f (%.1f to %.1f)", micro(s.median), micro(s.least), micro(s.most))
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
	return spreadOf(more), true
}

func (f *requestFigures) markdown() string {
	rows := [][]string{{"µs of CPU for a request", "median (least to most)", "over the empty plugin", "goal"}}
	for _, r := range f.routes {
		row := []string{r.name, spreadOf(r.took).String(), "", ""}
		if s, ok := f.over(r); ok {
			row[2] = s.String()
			if r.goal > 0 {
				row[3] = fmt.Sprintf("%.0f: ", micro(r.goal)) + held(s.median <= r.goal)
			}
		}
		rows = append(rows, row)
	}
	return table(rows)
}

func held(ok bool) string {
	if ok {
		return "held"
	}
	return "missed"
}

// note says what the table rests on.
func (f *requestFigures) note() string {
	return fmt.Sprintf(`CPU time of the Traefik process, user and system: %d rounds of %s requests from
%s clients on each line, side by side in one Traefik, with %s decisions, a
tenth of them ranges and a fifth IPv6. Proxied requests carry X-Forwarded-For and
are compared with the empty plugin under the same. While this was measured,
everything else used %.0f %% of the machine. Without requests this Traefik used
%.2f %% of a processor, polls of LAPI included.`,
		f.options.rounds, thousands(f.options.requests), thousands(f.options.clients), thousands(f.options.decisions), 100*f.others, 100*f.idle)
}

func memoryMarkdown(all []memory) string {
	rows := [][]string{{"MB of memory", "resident", "its peak", "live heap"}}
	for _, m := range all {
		rows = append(rows, []string{m.name, megabytes(m.resident), megabytes(m.peak), megabytes(m.live)})
	}
	return table(rows)
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
	return table(rows)
}

const blockBegin, blockEnd = "<!-- bench -->\n", "<!-- /bench -->"

// replaceBlock puts text between the marks of a document.
func replaceBlock(document []byte, text string) ([]byte, error) {
	before, rest, ok := bytes.Cut(document, []byte(blockBegin))
	if !ok {
		return nil, errors.New("it has no " + strings.TrimSpace(blockBegin))
	}
	_, after, ok := bytes.Cut(rest, []byte(blockEnd))
	if !ok {
		return nil, errors.New("it has no " + blockEnd)
	}
	return slices.Concat(before, []byte(blockBegin), []byte(strings.TrimSpace(text)+"\n"), []byte(blockEnd), after), nil
}

// writeReadme rewrites what the README says about costs.
func writeReadme(root, text string) error {
	path := filepath.Join(root, "README.md")
	document, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("rewrite the README: %w", err)
	}
	if document, err = replaceBlock(document, text); err != nil {
		return fmt.Errorf("rewrite the README: %w", err)
	}
	if err := os.WriteFile(path, document, 0o644); err != nil {
		return fmt.Errorf("rewrite the README: %w", err)
	}
	return nil
}

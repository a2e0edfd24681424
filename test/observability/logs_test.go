package observability

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// logQueries are the expressions in Loki's language, of the page, the rules and the
// dashboard.
func logQueries(t testing.TB) (all []shown) {
	t.Helper()
	for _, match := range regexp.MustCompile("(?s)```logql\n(.*?)\n```").FindAllStringSubmatch(read(t, page), -1) {
		all = append(all, shown{page, match[1]})
	}
	for _, r := range alerts(t, folder+"loki-rules.yaml") {
		all = append(all, shown{"rule " + r.Alert, r.Expr})
	}
	for _, p := range board(t).Panels {
		for _, target := range p.Targets {
			if target.Datasource.Type == "loki" {
				all = append(all, shown{"panel " + p.Title, target.Expr})
			}
		}
	}
	return all
}

// wants is what a line has to have for a part of a query to be of use: texts, and
// fields, some with a value.
type wants struct {
	texts  []string
	fields map[string]func(string) bool
}

// parts reads a query: each selector of streams with its filters is a part. The
// fields in by (...) and in templates are wanted of each.
func parts(t testing.TB, q shown) (all []wants) {
	t.Helper()
	var everywhere []string
	for _, match := range regexp.MustCompile(`\bby \(([^)]*)\)`).FindAllStringSubmatch(q.expr, -1) {
		everywhere = append(everywhere, regexp.MustCompile(`\w+`).FindAllString(match[1], -1)...)
	}
	for _, match := range regexp.MustCompile(`\{\{\.(\w+)\}\}`).FindAllStringSubmatch(q.expr, -1) {
		everywhere = append(everywhere, match[1])
	}
	for _, piece := range regexp.MustCompile(`\{namespace[^}]*\}`).Split(q.expr, -1)[1:] {
		w := wants{fields: map[string]func(string) bool{}}
		for _, match := range regexp.MustCompile("\\|= (?:`([^`]*)`|\"([^\"]*)\")").FindAllStringSubmatch(piece, -1) {
			w.texts = append(w.texts, match[1]+match[2])
		}
		if strings.Contains(piece, "| json") {
			for _, name := range everywhere {
				w.fields[name] = func(string) bool { return true }
			}
		}
		for _, match := range regexp.MustCompile(`\| (\w+) (=~|=) "([^"]*)"`).FindAllStringSubmatch(piece, -1) {
			want := regexp.MustCompile("^(?:" + match[3] + ")$").MatchString
			if match[2] == "=" {
				want = func(value string) bool { return value == match[3] }
			}
			w.fields[match[1]] = want
		}
		if len(w.texts) == 0 {
			t.Errorf("%s: a part of a query looks for no text, and so reads all there is: %s", q.at, q.expr)
		}
		all = append(all, w)
	}
	if len(all) == 0 {
		t.Errorf("%s: nothing is asked for by {namespace...}: %s", q.at, q.expr)
	}
	return all
}

// in reports whether a line has all that is wanted.
func (w wants) in(line string) bool {
	for _, text := range w.texts {
		if !strings.Contains(line, text) {
			return false
		}
	}
	var fields map[string]any
	if json.Unmarshal([]byte(line), &fields) != nil {
		return false
	}
	for name, is := range w.fields {
		if value, ok := fields[name]; !ok || !is(fmt.Sprint(value)) {
			return false
		}
	}
	return true
}

// logged has LAPI go and come back, an operator give an order, and then holds every
// query of the log to the lines that were written.
func (w *world) logged() {
	w.t.Helper()
	if said, err := w.node.Exec(w.bouncer.Program, "allow", good, "--for", "1m", "--config", w.bouncer.ConfigFile); err != nil {
		w.t.Fatal(err, said)
	}
	lines := func() []string {
		return slices.Concat(strings.Split(w.bouncer.Log(), "\n"), strings.Split(w.tunnel.Log(), "\n"), strings.Split(w.traefik.Log(), "\n"), vpnLines)
	}
	w.must(w.lapi.Stop(w.t.Context()))
	for name, log := range map[string]func() string{"bouncer": w.bouncer.Log, "tunnel": w.tunnel.Log, "Traefik": w.traefik.Log} {
		w.until(10*time.Second, name+" misses LAPI", func() bool { return strings.Contains(log(), `"msg":"cannot pull decisions, keeping the last ones"`) })
	}
	w.until(5*time.Second, "counted by Prometheus", func() bool {
		found, err := w.series(`edgeward_failed_pulls_total{job="edgeward-bouncer"} > 0`)
		return err == nil && len(found) == 1
	})
	w.must(w.lapi.Start(w.t.Context()))
	w.until(20*time.Second, "answering again for the plugin", func() bool {
		return strings.Contains(w.traefik.Log(), `"msg":"decisions pulled, LAPI answers again"`)
	})
	written, queries := lines(), logQueries(w.t)
	for _, q := range queries {
		for _, part := range parts(w.t, q) {
			if !slices.ContainsFunc(written, part.in) {
				w.t.Errorf("%s: no line has %q and its fields: %s", q.at, part.texts, q.expr)
			}
		}
	}
	if len(queries) < 10 {
		w.t.Errorf("%d queries of the log were found, want 10 or more", len(queries))
	}
	// The judge bites.
	for _, wrong := range []string{
		"sum by (scenery) (count_over_time({namespace=\"a\"} |= `\"msg\":\"request refused\"` | json [1h]))",
		"{namespace=\"a\"} |= `\"msg\":\"request denied\"` | json",
		"{namespace=\"a\"} |= `\"msg\":\"request refused\"` | json | reason = \"whim\"",
	} {
		for _, part := range parts(w.t, shown{"fixture", wrong}) {
			if slices.ContainsFunc(written, part.in) {
				w.t.Errorf("%s is let through", wrong)
			}
		}
	}
}

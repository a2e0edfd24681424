package observability

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/edgeward/edgeward/bouncer"
	"github.com/edgeward/edgeward/test/rig"
	"github.com/edgeward/edgeward/tunnel"
)

// collectors are all that our programs register of their own, by the heading under
// which the page explains them. What they describe hangs on nothing that has to run.
var collectors = map[string]prometheus.Collector{
	"The node bouncer":             new(bouncer.Bouncer).Collector(),
	"The tunnel":                   new(tunnel.Gate).Collector(nil, nil),
	"The VPN gateway":              vpnCollector,
	"Tunnel and VPN gateway alike": roleCollector,
}

// foreign are the metrics of others that are shown, with their labels; the live
// test looks at the real ones.
var foreign = map[string][]string{
	"up":                                {},
	"ALERTS":                            {"alertname", "alertstate", "severity"},
	"process_resident_memory_bytes":     {},
	"process_cpu_seconds_total":         {},
	"traefik_entrypoint_requests_total": {"code", "entrypoint", "method", "protocol"},
	"cs_lapi_request_duration_seconds_bucket": {"endpoint", "le", "method"},
	"cs_lapi_bouncer_requests_total":          {"bouncer", "method", "route"},
}

// given are the labels that come with the target.
var given = []string{"instance", "job", "namespace", "node", "pod"}

// described returns the metrics of a collector, with their labels.
func described(t testing.TB, c prometheus.Collector) map[string][]string {
	t.Helper()
	ch := make(chan *prometheus.Desc, 1000)
	c.Describe(ch)
	close(ch)
	all := map[string][]string{}
	for d := range ch {
		match := regexp.MustCompile(`^Desc\{fqName: "(\w+)", .*variableLabels: \{([\w,]*)\}\}$`).FindStringSubmatch(d.String())
		if match == nil {
			t.Fatalf("cannot read %v", d)
		}
		labels := []string{}
		if match[2] != "" {
			labels = strings.Split(match[2], ",")
		}
		slices.Sort(labels)
		all[match[1]] = labels
	}
	return all
}

// known returns all metrics that may be shown, with every label that one of our
// programs gives them.
func known(t testing.TB) map[string][]string {
	t.Helper()
	all := map[string][]string{}
	for name, labels := range foreign {
		all[name] = labels
	}
	for _, c := range collectors {
		for name, labels := range described(t, c) {
			all[name] = slices.Compact(slices.Sorted(slices.Values(append(slices.Clone(all[name]), labels...))))
		}
	}
	return all
}

// query is what an expression asks for.
type query struct {
	metrics  map[string][]matcher
	grouping []string // labels in by, on and their like
}

type matcher struct{ label, op, value string }

var (
	lexeme = regexp.MustCompile(`^(?:\s+|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|\d+(?:\.\d+)?(?:ms|[smhdwy])?|[a-zA-Z_:][\w:]*|=~|!~|!=|==|>=|<=|.)`)
	word   = regexp.MustCompile(`^[a-zA-Z_:][\w:]*$`)
)

// asked reads an expression that promtool has accepted.
func asked(expr string) query {
	var tokens []string
	for rest := expr; rest != ""; {
		next := lexeme.FindString(rest)
		rest = rest[len(next):]
		if strings.TrimSpace(next) != "" {
			tokens = append(tokens, next)
		}
	}
	at := func(i int) string {
		if i < len(tokens) {
			return tokens[i]
		}
		return ""
	}
	q := query{metrics: map[string][]matcher{}}
	for i := 0; i < len(tokens); i++ {
		switch name := tokens[i]; {
		case name == "[":
			for at(i) != "]" && i < len(tokens) {
				i++
			}
		case !word.MatchString(name), slices.Contains([]string{"and", "or", "unless", "offset", "bool", "inf", "nan"}, strings.ToLower(name)):
		case slices.Contains([]string{"by", "without", "on", "ignoring", "group_left", "group_right"}, name):
			for i++; at(i) != ")" && i < len(tokens); i++ {
				if word.MatchString(at(i)) {
					q.grouping = append(q.grouping, at(i))
				}
			}
		case at(i+1) == "(", (name == "sum" || name == "max" || name == "min" || name == "count") && at(i+1) == "by":
		default:
			matchers := q.metrics[name]
			if at(i+1) == "{" {
				for i += 2; at(i) != "}" && i < len(tokens); i++ {
					if word.MatchString(at(i)) {
						value, err := strconv.Unquote(at(i + 2))
						if err != nil {
							value = at(i + 2)
						}
						matchers = append(matchers, matcher{at(i), at(i + 1), value})
						i += 2
					}
				}
			}
			q.metrics[name] = matchers
		}
	}
	return q
}

func TestExpressionsAreRead(t *testing.T) {
	for expr, want := range map[string]query{
		`sum by (a, b) (rate(m{c="x,y}",d=~"(z|w)"}[5m])) / on (e) group_left (f) n > 0.5`: {
			map[string][]matcher{"m": {{"c", "=", "x,y}"}, {"d", "=~", "(z|w)"}}, "n": nil}, []string{"a", "b", "e", "f"}},
		`time() - m offset 1h unless n == 1 or vector(0)`: {map[string][]matcher{"m": nil, "n": nil}, nil},
		`count(m{} == 0)`: {map[string][]matcher{"m": nil}, nil},
	} {
		if diff := cmp.Diff(want, asked(expr), cmp.AllowUnexported(query{}, matcher{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", expr, diff)
		}
	}
}

// TestEveryMetricExists: rules and dashboard name no metric, no label and no value
// of a label that is not there.
func TestEveryMetricExists(t *testing.T) {
	all, words := known(t), spoken(t)
	judge := func(e shown) (bad []string) {
		q := asked(e.expr)
		labels := slices.Clone(given)
		for name, matchers := range q.metrics {
			has, ok := all[name]
			if !ok {
				bad = append(bad, fmt.Sprintf("%s: there is no metric %s", e.at, name))
				continue
			}
			labels = append(labels, has...)
			for _, m := range matchers {
				if !slices.Contains(has, m.label) && !slices.Contains(given, m.label) {
					bad = append(bad, fmt.Sprintf("%s: %s has no label %s, but %v", e.at, name, m.label, has))
				}
				if strings.HasPrefix(name, "edgeward_") && (m.op == "=" || m.op == "!=") && !words[m.value] {
					bad = append(bad, fmt.Sprintf("%s: no program says %s of %s", e.at, m.value, m.label))
				}
			}
		}
		for _, label := range q.grouping {
			if !slices.Contains(labels, label) {
				bad = append(bad, fmt.Sprintf("%s: none of its metrics has a label %s: %s", e.at, label, e.expr))
			}
		}
		return bad
	}
	for _, e := range expressions(t) {
		for _, bad := range judge(e) {
			t.Error(bad)
		}
	}
	for _, wrong := range []string{`edgeward_blocks_total`, `edgeward_mode{state="enforce"}`, `edgeward_mode{mode="pondering"}`, `sum by (origin) (edgeward_mode)`} {
		if len(judge(shown{"fixture", wrong})) != 1 {
			t.Errorf("%s is let through", wrong)
		}
	}
}

// spoken are the texts in the code of our programs: what a label may say is one of
// them.
func spoken(t testing.TB) map[string]bool {
	t.Helper()
	all := map[string]bool{}
	texts, _ := literals(t)
	for _, lit := range texts {
		all[lit] = true
	}
	for _, said := range vpnValues {
		all[said] = true
	}
	return all
}

// literals are the string literals of the code of our programs, tests aside, and
// those among them that name a metric where one is made.
func literals(t testing.TB) (all, metrics []string) {
	t.Helper()
	root, err := rig.Root()
	if err != nil {
		t.Fatal(err)
	}
	for _, top := range []string{"bouncer", "tunnel", "internal", "cmd"} {
		err := filepath.WalkDir(filepath.Join(root, top), func(path string, d fs.DirEntry, err error) error {
			if err != nil || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") || strings.Contains(path, "testdata") {
				return err
			}
			file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
			if err != nil {
				return err
			}
			ast.Inspect(file, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.BasicLit:
					if text, err := strconv.Unquote(n.Value); err == nil && n.Kind == token.STRING {
						all = append(all, text)
					}
				case *ast.CallExpr, *ast.KeyValueExpr:
					if name := metricMade(n); name != "" {
						metrics = append(metrics, name)
					}
				}
				return true
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return all, metrics
}

// metricMade is the name in desc("edgeward_up", ...), prometheus.NewDesc(...) and
// Name: "edgeward_up".
func metricMade(n ast.Node) string {
	var at ast.Expr
	switch n := n.(type) {
	case *ast.CallExpr:
		if f, ok := n.Fun.(*ast.Ident); len(n.Args) > 0 && ok && f.Name == "desc" {
			at = n.Args[0]
		} else if f, ok := n.Fun.(*ast.SelectorExpr); len(n.Args) > 0 && ok && f.Sel.Name == "NewDesc" {
			at = n.Args[0]
		}
	case *ast.KeyValueExpr:
		if key, ok := n.Key.(*ast.Ident); ok && key.Name == "Name" {
			at = n.Value
		}
	}
	if lit, ok := at.(*ast.BasicLit); ok {
		if text, err := strconv.Unquote(lit.Value); err == nil && strings.HasPrefix(text, "edgeward_") {
			return text
		}
	}
	return ""
}

// TestEveryMetricIsExplained: the page has a table for each program, with all of
// its metrics and their labels, and no others; and there is no metric of which this
// suite does not know.
func TestEveryMetricIsExplained(t *testing.T) {
	text := read(t, page)
	all := known(t)
	for heading, c := range collectors {
		_, section, _ := strings.Cut(text, "\n### "+heading+"\n")
		section, _, _ = strings.Cut(section, "\n#")
		listed := map[string][]string{}
		for _, row := range regexp.MustCompile("(?m)^\\| `(edgeward_\\w+)` \\| ([^|]*) \\| [^|]+ \\|$").FindAllStringSubmatch(section, -1) {
			labels := regexp.MustCompile(`\w+`).FindAllString(row[2], -1)
			slices.Sort(labels)
			if labels == nil {
				labels = []string{}
			}
			listed[row[1]] = labels
		}
		if diff := cmp.Diff(described(t, c), listed); diff != "" {
			t.Errorf("%s, section %s (-exist +listed):\n%s", page, heading, diff)
		}
	}
	_, made := literals(t)
	for _, name := range made {
		if _, ok := all[name]; !ok {
			t.Errorf("%s is a metric of no collector that this suite knows", name)
		}
	}
	if len(made) < 50 {
		t.Errorf("%d metrics were found in the code, want 50 or more", len(made))
	}
	for _, name := range regexp.MustCompile(`\bedgeward_[a-z]\w+`).FindAllString(text, -1) {
		if _, ok := all[name]; !ok {
			t.Errorf("%s names %s, which is no metric", page, name)
		}
	}
}

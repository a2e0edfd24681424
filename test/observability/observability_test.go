// Package observability holds what deploy/observability and docs/observability.md
// show of edgeward to what is there: every metric, label and log field that a rule,
// a dashboard or a query names is one that the programs really have, every metric
// that they have is explained, and the rules do what they say. The judges are the
// real Prometheus with its promtool, the collectors of our programs, and the
// programs themselves, running. It has no opinion on thresholds, and nobody imports
// it.
package observability

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/edgeward/edgeward/test/rig"
	"github.com/edgeward/edgeward/test/rig/rigtest"
)

var update = flag.Bool("update", false, "write the copies of the rules anew")

const (
	folder = "deploy/observability/"
	page   = "docs/observability.md"
)

// read returns a file of the repository.
func read(t testing.TB, name string) string {
	t.Helper()
	root, err := rig.Root()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(name)))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// promtool runs Prometheus' own checker in a directory of its own that holds files.
func promtool(t testing.TB, files map[string]string, args ...string) (string, error) {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), rigtest.Debian(t, "prometheus", "usr/bin/promtool"), args...)
	cmd.Dir = dir
	said, err := cmd.CombinedOutput()
	return string(said), err
}

// rules are the groups of a file of rules, Prometheus' or Loki's.
type rules struct {
	Groups []struct {
		Name  string `yaml:"name"`
		Rules []rule `yaml:"rules"`
	} `yaml:"groups"`
}

type rule struct {
	Alert       string            `yaml:"alert"`
	Expr        string            `yaml:"expr"`
	For         string            `yaml:"for"`
	Labels      map[string]string `yaml:"labels"`
	Annotations map[string]string `yaml:"annotations"`
}

// alerts returns the rules of a file.
func alerts(t testing.TB, name string) []rule {
	t.Helper()
	var file rules
	if err := yaml.NewDecoder(strings.NewReader(read(t, name)), yaml.Strict()).Decode(&file); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	var all []rule
	for _, g := range file.Groups {
		all = append(all, g.Rules...)
	}
	return all
}

// panel is what of a panel of the dashboard is looked at.
type panel struct {
	ID          int
	Type        string
	Title       string
	Description string
	GridPos     struct{ H, W, X, Y int }
	Datasource  datasource
	Targets     []struct {
		RefID      string
		Expr       string
		Datasource datasource
	}
}

type datasource struct{ Type, UID string }

type dashboard struct {
	UID        string
	Title      string
	Templating struct {
		List []struct{ Name, Type, Definition string }
	}
	Panels []panel
}

func board(t testing.TB) (d dashboard) {
	t.Helper()
	if err := json.Unmarshal([]byte(read(t, folder+"grafana/edgeward.json")), &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// shown is an expression in Prometheus' language, and where it stands.
type shown struct{ at, expr string }

// expressions are those of the dashboard and of the rules; what Grafana puts in is
// put in.
func expressions(t testing.TB) (all []shown) {
	t.Helper()
	fill := strings.NewReplacer("$__rate_interval", "5s", "$node", ".*", "$tunnel", ".*", "$peer", ".*")
	d := board(t)
	for _, p := range d.Panels {
		for _, target := range p.Targets {
			if target.Datasource.Type == "prometheus" {
				all = append(all, shown{"panel " + p.Title, fill.Replace(target.Expr)})
			}
		}
	}
	for _, v := range d.Templating.List {
		if match := regexp.MustCompile(`^label_values\((.+), (\w+)\)$`).FindStringSubmatch(v.Definition); match != nil {
			all = append(all, shown{"variable " + v.Name, "count by (" + match[2] + ") (" + match[1] + ")"})
		} else if v.Type == "query" {
			t.Errorf("variable %s: %q is no label_values(metric, label)", v.Name, v.Definition)
		}
	}
	for _, r := range alerts(t, folder+"rules.yaml") {
		all = append(all, shown{"rule " + r.Alert, r.Expr})
	}
	return all
}

func TestPromtoolAcceptsAll(t *testing.T) {
	t.Parallel()
	files := map[string]string{"rules.yaml": read(t, folder+"rules.yaml"), "prometheus.yaml": read(t, folder+"prometheus.yaml")}
	// Each expression becomes a rule, because promtool reads those.
	var text strings.Builder
	text.WriteString("groups:\n  - name: all\n    rules:\n")
	all := expressions(t)
	for _, e := range all {
		quoted, err := yaml.Marshal(e.expr)
		if err != nil {
			t.Fatal(err)
		}
		text.WriteString("      - record: it\n        expr: " + strings.ReplaceAll(strings.TrimSpace(string(quoted)), "\n", "\n          ") + "\n        labels: {at: \"" + e.at + "\"}\n")
	}
	files["expressions.yaml"] = text.String()
	if said, err := promtool(t, files, "check", "rules", "--lint-fatal", "rules.yaml"); err != nil {
		t.Errorf("rules: %v\n%s", err, said)
	}
	if said, err := promtool(t, files, "check", "rules", "--lint=none", "expressions.yaml"); err != nil {
		t.Errorf("expressions: %v\n%s", err, said)
	}
	if said, err := promtool(t, files, "check", "config", "prometheus.yaml"); err != nil {
		t.Errorf("example of a configuration: %v\n%s", err, said)
	}
	if len(all) < 120 {
		t.Errorf("%d expressions were found, want 120 or more", len(all))
	}
	// The judge bites.
	files["expressions.yaml"] = "groups: [{name: all, rules: [{record: it, expr: 'sum by instance (up)'}]}]"
	if said, err := promtool(t, files, "check", "rules", "expressions.yaml"); err == nil {
		t.Errorf("promtool takes nonsense: %s", said)
	}
}

// TestRulesDoWhatTheySay has promtool run each rule on what is wrong and on what is
// well.
func TestRulesDoWhatTheySay(t *testing.T) {
	t.Parallel()
	units := map[string]string{"rules_test.yaml": "", "rules_days_test.yaml": ""}
	files := map[string]string{"rules.yaml": read(t, folder+"rules.yaml")}
	args := []string{"test", "rules"}
	tested := map[string][]string{} // the labels of what fired, by alert
	for name := range units {
		files[name] = read(t, "test/observability/testdata/"+name)
		args = append(args, name)
		for _, fired := range regexp.MustCompile(`ALERTS\{alertname="(\w+)",([^}]*)\}'`).FindAllStringSubmatch(files[name], -1) {
			for _, label := range regexp.MustCompile(`(\w+)="`).FindAllStringSubmatch(fired[2], -1) {
				tested[fired[1]] = append(tested[fired[1]], label[1])
			}
		}
	}
	if said, err := promtool(t, files, args...); err != nil {
		t.Errorf("%v\n%s", err, said)
	}
	for _, r := range alerts(t, folder+"rules.yaml") {
		labels, ok := tested[r.Alert]
		if !ok {
			t.Errorf("%s fires in no test", r.Alert)
		}
		for _, text := range r.Annotations {
			for _, used := range regexp.MustCompile(`\$labels\.(\w+)`).FindAllStringSubmatch(text, -1) {
				if ok && !slices.Contains(labels, used[1]) {
					t.Errorf("%s: %q names the label %s, which the alert does not have: %v", r.Alert, text, used[1], labels)
				}
			}
		}
	}
	files["rules.yaml"] = strings.Replace(files["rules.yaml"], `edgeward_mode{mode="observe"} == 1`, `edgeward_mode{mode="observe"} == 2`, 1)
	if said, err := promtool(t, files, "test", "rules", "rules_days_test.yaml"); err == nil {
		t.Errorf("a rule that is broken passes: %s", said)
	}
}

// TestEachAlertHasARunbook: severity, words, and a section that its link leads to.
func TestEachAlertHasARunbook(t *testing.T) {
	text := read(t, page)
	var names []string
	for _, file := range []string{"rules.yaml", "loki-rules.yaml"} {
		for _, r := range alerts(t, folder+file) {
			names = append(names, r.Alert)
			if !slices.Contains([]string{"critical", "warning", "info"}, r.Labels["severity"]) {
				t.Errorf("%s has the severity %q", r.Alert, r.Labels["severity"])
			}
			if r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
				t.Errorf("%s has no summary or no description", r.Alert)
			}
			want := "https://github.com/edgeward/edgeward/blob/main/" + page + "#" + strings.ToLower(r.Alert)
			if r.Annotations["runbook_url"] != want {
				t.Errorf("%s: runbook_url is %q, want %q", r.Alert, r.Annotations["runbook_url"], want)
			}
			if !strings.Contains(text, "\n### "+r.Alert+"\n") {
				t.Errorf("%s has no section %s", page, r.Alert)
			}
		}
	}
	for _, heading := range regexp.MustCompile(`(?m)^### (Edgeward\w+)$`).FindAllStringSubmatch(text, -1) {
		if !slices.Contains(names, heading[1]) {
			t.Errorf("%s explains %s, which is no alert", page, heading[1])
		}
	}
}

// TestAlertmanagerRoutes: the real one takes the example, and every alert that it
// names is one.
func TestAlertmanagerRoutes(t *testing.T) {
	t.Parallel()
	root, err := rig.Root()
	if err != nil {
		t.Fatal(err)
	}
	const name = folder + "alertmanager.yaml"
	ask := func(args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), rigtest.Debian(t, "prometheus-alertmanager", "usr/bin/amtool"), args...)
		cmd.Dir = root
		said, err := cmd.Output()
		if err != nil {
			t.Errorf("amtool %v: %v: %s", args, err, said)
		}
		return strings.TrimSpace(string(said))
	}
	ask("check-config", name)
	all := append(alerts(t, folder+"rules.yaml"), alerts(t, folder+"loki-rules.yaml")...)
	for severity, receiver := range map[string]string{"critical": "gotify", "warning": "gotify", "info": "gotify-quiet"} {
		i := slices.IndexFunc(all, func(r rule) bool { return r.Labels["severity"] == severity })
		if got := ask("config", "routes", "test", "--config.file="+name, "alertname="+all[i].Alert, "severity="+severity); got != receiver {
			t.Errorf("%s, which is %s, goes to %q, want %q", all[i].Alert, severity, got, receiver)
		}
	}
	named := regexp.MustCompile(`alertname =~? "?(Edgeward[^\]"]*)`).FindAllStringSubmatch(read(t, name), -1)
	for _, match := range named {
		pattern := regexp.MustCompile("^(?:" + match[1] + ")$")
		if !slices.ContainsFunc(all, func(r rule) bool { return pattern.MatchString(r.Alert) }) {
			t.Errorf("%s names %s, which is no alert", name, match[1])
		}
	}
	if len(named) < 4 {
		t.Errorf("%d alerts were found in %s, want 4 or more", len(named), name)
	}
}

// TestOperatorsHaveTheSameRules: PrometheusRule and VMRule are rules.yaml, letter
// by letter.
func TestOperatorsHaveTheSameRules(t *testing.T) {
	spec := regexp.MustCompile(`(?m)^(.)`).ReplaceAllString(read(t, folder+"rules.yaml"), "  $1")
	for name, kind := range map[string]string{
		"prometheus-operator/prometheusrule.yaml": "apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\n",
		"victoriametrics/vmrule.yaml":             "apiVersion: operator.victoriametrics.com/v1beta1\nkind: VMRule\n",
	} {
		want := kind + "metadata:\n  name: edgeward\nspec:\n" + spec
		if *update {
			root, err := rig.Root()
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(root, folder, name), []byte(want), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if read(t, folder+name) != want {
			t.Errorf("%s differs from rules.yaml; mend it with: go test ./test/observability -run TestOperatorsHaveTheSameRules -update", name)
		}
	}
}

func TestDashboardIsSound(t *testing.T) {
	d := board(t)
	if d.UID == "" || d.Title == "" {
		t.Error("the dashboard has no uid or no title")
	}
	known := map[string]bool{"__rate_interval": true}
	for _, v := range d.Templating.List {
		known[v.Name] = true
	}
	for _, used := range regexp.MustCompile(`\$\{?(\w+)`).FindAllStringSubmatch(read(t, folder+"grafana/edgeward.json"), -1) {
		if !known[used[1]] && used[1] != "__all" {
			t.Errorf("there is no variable %s", used[1])
		}
	}
	ids, cells := map[int]string{}, map[[2]int]string{}
	for _, p := range d.Panels {
		if other, taken := ids[p.ID]; taken {
			t.Errorf("%s and %s have the id %d", other, p.Title, p.ID)
		}
		ids[p.ID] = p.Title
		g := p.GridPos
		if g.W < 1 || g.X+g.W > 24 {
			t.Errorf("%s does not fit into the grid", p.Title)
		}
		for x := g.X; x < g.X+g.W; x++ {
			for y := g.Y; y < g.Y+g.H; y++ {
				if other, taken := cells[[2]int{x, y}]; taken {
					t.Fatalf("%s lies upon %s", p.Title, other)
				}
				cells[[2]int{x, y}] = p.Title
			}
		}
		if p.Type == "row" {
			continue
		}
		if p.Title == "" || p.Description == "" || len(p.Targets) == 0 {
			t.Errorf("panel %d (%s) lacks a title, a description or a query", p.ID, p.Title)
		}
		refs := map[string]bool{}
		for _, target := range p.Targets {
			if target.Expr == "" || refs[target.RefID] || target.Datasource != p.Datasource {
				t.Errorf("%s: query %q is empty, there twice, or of another source than its panel", p.Title, target.RefID)
			}
			refs[target.RefID] = true
		}
	}
}

// document is what of a manifest is looked at.
type document struct {
	APIVersion string `yaml:"apiVersion"`
	Kind       string
	Metadata   struct{ Name, Namespace string }
	Spec       struct {
		JobLabel          string `yaml:"jobLabel"`
		NamespaceSelector struct {
			MatchNames []string `yaml:"matchNames"`
		} `yaml:"namespaceSelector"`
		Selector struct {
			MatchLabels map[string]string `yaml:"matchLabels"`
		}
		PodMetricsEndpoints []struct{ Port string } `yaml:"podMetricsEndpoints"`
	}
}

// documents are those of a file, as far as they are looked at.
func documents(t testing.TB, name string) (all []document) {
	t.Helper()
	for part := range strings.SplitSeq(read(t, name), "\n---\n") {
		var d document
		if err := yaml.NewDecoder(bytes.NewReader([]byte(part))).Decode(&d); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		all = append(all, d)
	}
	return all
}

// TestMonitorsFindThePods: the labels, namespaces and jobs of both operators'
// objects are the same, and those that rules ask for.
func TestMonitorsFindThePods(t *testing.T) {
	wanted := map[string]string{"edgeward-bouncer": "edgeward-node", "edgeward-tunnel": "edgeward", "edgeward-vpn": "edgeward-node"}
	for _, name := range []string{"prometheus-operator/podmonitors.yaml", "victoriametrics/vmpodscrapes.yaml"} {
		found := map[string]string{}
		for _, d := range documents(t, folder+name) {
			const label = "app.kubernetes.io/name"
			app := d.Spec.Selector.MatchLabels[label]
			if app == "" {
				continue // LAPI's
			}
			if d.Spec.JobLabel != label || len(d.Spec.NamespaceSelector.MatchNames) != 1 || len(d.Spec.PodMetricsEndpoints) != 1 || d.Spec.PodMetricsEndpoints[0].Port != "http" {
				t.Errorf("%s: %+v", name, d)
				continue
			}
			found[app] = d.Spec.NamespaceSelector.MatchNames[0]
		}
		for app, namespace := range wanted {
			if found[app] != namespace {
				t.Errorf("%s looks for %s in %q, want %q", name, app, found[app], namespace)
			}
		}
	}
	for app, namespace := range wanted {
		for _, w := range workloads(t, app) {
			if got := w.Spec.Template.Metadata.Labels["app.kubernetes.io/name"]; got != app {
				t.Errorf("the pods of %s have the name %q", app, got)
			}
			if w.Metadata.Namespace != "" && w.Metadata.Namespace != namespace {
				t.Errorf("%s is in %s, and looked for in %s", app, w.Metadata.Namespace, namespace)
			}
			if !slices.ContainsFunc(w.Spec.Template.Spec.Containers, func(c container) bool {
				return slices.ContainsFunc(c.Ports, func(p port) bool { return p.Name == "http" })
			}) {
				t.Errorf("%s has no port called http, which is looked for", app)
			}
		}
	}
}

// workload is what of a DaemonSet or Deployment is looked at.
type workload struct {
	Kind     string
	Metadata struct{ Name, Namespace string }
	Spec     struct {
		Template struct {
			Metadata struct{ Labels map[string]string }
			Spec     struct{ Containers []container }
		}
	}
}

type (
	container struct{ Ports []port }
	port      struct{ Name string }
)

// workloads are those of a name, wherever below deploy they are.
func workloads(t testing.TB, name string) (all []workload) {
	t.Helper()
	root, err := rig.Root()
	if err != nil {
		t.Fatal(err)
	}
	err = filepath.WalkDir(filepath.Join(root, "deploy"), func(path string, _ fs.DirEntry, err error) error {
		if err != nil || filepath.Ext(path) != ".yaml" {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for part := range strings.SplitSeq(string(text), "\n---\n") {
			if !regexp.MustCompile(`(?m)^kind: (DaemonSet|Deployment)$`).MatchString(part) || !regexp.MustCompile(`(?m)^  name: `+name+`$`).MatchString(part) {
				continue
			}
			var w workload
			if err := yaml.Unmarshal([]byte(part), &w); err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			all = append(all, w)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(all) == 0 && name != "edgeward-vpn" {
		t.Errorf("deploy has no workload %s", name)
	}
	return all
}

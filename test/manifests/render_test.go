// Package manifests holds what deploy/kubernetes makes of a cluster to what is true:
// kustomize renders every overlay; the schemas of Kubernetes, of Traefik and of k3s
// accept every object, without a field that they do not know; the programs accept the
// configurations in it, and the real Traefik the plugin and the routes; and laws of our
// own hold for all of it. It starts no cluster and proves nothing about one. Nobody
// imports it.
package manifests

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/edgeward/edgeward/test/rig"
	"github.com/edgeward/edgeward/test/rig/rigtest"
)

// overlays are what users apply, from deploy/kubernetes.
var overlays = []string{"overlays/k3s", "overlays/k3s-gitops", "overlays/generic", "overlays/ingress-nginx", "base", vpn}

// vpn is applied beside one of the others, which has its namespace too.
const vpn = "../tunnel/vpn"

// composed is the name of a kustomization that the test makes.
const composed = "a user's own"

// rendering is what came of a directory or a file.
type rendering struct {
	Objects    []object `json:"objects"`
	Complaints []string `json:"complaints"`
}

// schemas are files of modules, which are downloaded when the cache of modules lacks
// them. The sum pins the content.
var schemas = []struct{ flag, module, sum, file string }{
	{"-swagger", "k8s.io/kubernetes@v1.36.3", "h1:qDQdoMiluAE2Eab6Fa52YV+WjiGz9mZFFoagEA6cI+o=", "api/openapi-spec/swagger.json"},
	{"-crds", "github.com/k3s-io/helm-controller@v0.16.13", "h1:jMD5lI4Mzo9uclZjLgJ8Yak6wSnXaL/tuTU+dEEx69Q=", "pkg/crds/yaml/generated/helm.cattle.io_helmchartconfigs.yaml"},
	{"-crds", "github.com/traefik/traefik/v3@v3.7.5", "h1:hWj4lXVj8avem926gXkTN8WAOzQ1Fkfqg0zbh3vSxEE=", "docs/content/reference/dynamic-configuration/kubernetes-crd-definition-v1.yml"},
}

// arguments are the schemas as the tool wants them.
var arguments = sync.OnceValues(func() ([]string, error) {
	var args []string
	for _, s := range schemas {
		dir, err := moduleDir(s.module, s.sum)
		if err != nil {
			return nil, err
		}
		args = append(args, s.flag, filepath.Join(dir, filepath.FromSlash(s.file)))
	}
	return args, nil
})

// render renders directories and judges what comes out.
func render(t *testing.T, paths ...string) map[string]rendering {
	t.Helper()
	args, err := arguments()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), rigtest.Tool(t, "manifests"), append(args, paths...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %s", err, stderr.Bytes())
	}
	var all map[string]rendering
	if err := json.Unmarshal(stdout.Bytes(), &all); err != nil {
		t.Fatal(err)
	}
	return all
}

// deployed is the directory of the manifests.
func deployed(t *testing.T) string {
	t.Helper()
	root, err := rig.Root()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(root, "deploy", "kubernetes")
}

var rendered struct {
	sync.Once
	all map[string]rendering
}

// all returns what comes of each overlay.
func all(t *testing.T) map[string]rendering {
	t.Helper()
	rendered.Do(func() {
		dir := deployed(t)
		var paths []string
		for _, name := range overlays {
			paths = append(paths, filepath.Join(dir, name))
		}
		// And what a user puts together of the parts that no overlay has.
		own := t.TempDir()
		to, err := filepath.Rel(own, dir)
		if err != nil {
			t.Fatal(err)
		}
		text := fmt.Sprintf("kind: Kustomization\nresources: [%[1]s/overlays/generic, %[1]s/tunnel]\ncomponents: [%[1]s/components/cloudflare]\n", filepath.ToSlash(to))
		if err := os.WriteFile(filepath.Join(own, "kustomization.yaml"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		rendered.all = map[string]rendering{}
		for path, r := range render(t, append(paths, own)...) {
			name, err := filepath.Rel(dir, path)
			if err != nil {
				t.Fatal(err)
			}
			if path == own {
				name = composed
			}
			rendered.all[filepath.ToSlash(name)] = r
		}
		beside := rendered.all[vpn]
		for _, o := range rendered.all["base"].Objects {
			if !slices.ContainsFunc(beside.Objects, func(has object) bool { return has.name() == o.name() }) {
				beside.Objects = append(beside.Objects, o)
			}
		}
		rendered.all[vpn] = beside
	})
	if len(rendered.all) != len(overlays)+1 {
		t.Fatalf("%d overlays were rendered, want %d and one more", len(rendered.all), len(overlays))
	}
	return rendered.all
}

func TestSchemasAcceptEveryObject(t *testing.T) {
	for name, r := range all(t) {
		if len(r.Objects) < 5 {
			t.Errorf("%s: %d objects", name, len(r.Objects))
		}
		for _, complaint := range r.Complaints {
			t.Errorf("%s: %s", name, complaint)
		}
	}
}

// TestSchemasBite shows that what the schemas are to find is found, in each of them.
func TestSchemasBite(t *testing.T) {
	for name, test := range map[string]struct{ yaml, want string }{
		"an unknown field":            {"apiVersion: v1\nkind: Pod\nmetadata: {name: x}\nspec: {hostNetwrk: true, containers: [{name: x}]}\n", "hostNetwrk"},
		"a missing field":             {"apiVersion: v1\nkind: Pod\nmetadata: {name: x}\nspec: {containers: [{image: x}]}\n", "name"},
		"a wrong type":                {"apiVersion: v1\nkind: Pod\nmetadata: {name: x}\nspec: {hostNetwork: 3, containers: [{name: x}]}\n", "hostNetwork"},
		"an unknown field of a route": {"apiVersion: traefik.io/v1alpha1\nkind: IngressRoute\nmetadata: {name: x}\nspec: {routes: [{match: x, priorty: 1}]}\n", "priorty"},
		"an unknown middleware":       {"apiVersion: traefik.io/v1alpha1\nkind: Middleware\nmetadata: {name: x}\nspec: {ipAllowlist: {}}\n", "ipAllowlist"},
		"a wrong chart configuration": {"apiVersion: helm.cattle.io/v1\nkind: HelmChartConfig\nmetadata: {name: x}\nspec: {valuesContent: {a: b}}\n", "valuesContent"},
		"an unknown kind":             {"apiVersion: v2\nkind: Pod\nmetadata: {name: x}\n", "no schema"},
		"a metadata typo":             {"apiVersion: v1\nkind: Namespace\nmetadata: {name: x, label: {}}\n", "label"},
	} {
		file := filepath.Join(t.TempDir(), "object.yaml")
		if err := os.WriteFile(file, []byte(test.yaml), 0o644); err != nil {
			t.Fatal(err)
		}
		complaints := render(t, file)[file].Complaints
		if !strings.Contains(strings.Join(complaints, "\n"), test.want) {
			t.Errorf("%s: the complaints are %q, want one with %q", name, complaints, test.want)
		}
	}
}

// TestExamplesFitTheSchemas judges the examples of kinds whose schema there is; those
// of Flux, Argo CD and External Secrets are read as YAML alone.
func TestExamplesFitTheSchemas(t *testing.T) {
	dir := deployed(t)
	names, err := filepath.Glob(filepath.Join(dir, "examples", "*.yaml"))
	if err != nil || len(names) < 3 {
		t.Fatalf("%d examples, %v", len(names), err)
	}
	names = append(names, filepath.Join(dir, "overlays/k3s-gitops/flux.yaml"), filepath.Join(dir, "overlays/k3s-gitops/argocd.yaml"))
	for name, r := range render(t, names...) {
		if len(r.Objects) == 0 {
			t.Errorf("%s holds nothing", name)
		}
		for _, complaint := range r.Complaints {
			if !slices.ContainsFunc([]string{"kustomize.toolkit.fluxcd.io/", "argoproj.io/", "external-secrets.io/"}, func(group string) bool { return strings.HasPrefix(complaint, group) }) {
				t.Errorf("%s: %s", name, complaint)
			}
		}
	}
}

// moduleDir returns where a module lies, downloaded if it must be.
func moduleDir(module, sum string) (string, error) {
	cmd := exec.Command("go", "mod", "download", "-json", module)
	cmd.Dir = os.TempDir() // no module's, so that none is changed
	cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=")
	out, _ := cmd.Output() // what went wrong is in what it prints
	var got struct{ Dir, Sum, Error string }
	if err := json.Unmarshal(out, &got); err != nil {
		return "", fmt.Errorf("get %s for its schemas: %w; mend it with: go mod download %s", module, err, module)
	}
	if got.Error != "" {
		return "", fmt.Errorf("get %s for its schemas: %s", module, got.Error)
	}
	if got.Sum != sum {
		return "", fmt.Errorf("get %s for its schemas: its sum is %s, want %s", module, got.Sum, sum)
	}
	return got.Dir, nil
}

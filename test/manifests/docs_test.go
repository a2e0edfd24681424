package manifests

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/edgeward/edgeward/plugin"
)

// TestPageNamesWhatExists compares docs/kubernetes.md with the manifests: the
// directories that it applies, the Secrets that it makes and the figures that it gives.
func TestPageNamesWhatExists(t *testing.T) {
	dir := deployed(t)
	root := filepath.Join(dir, "..", "..")
	text := string(must(os.ReadFile(filepath.Join(root, "docs", "kubernetes.md"))))
	applied := regexp.MustCompile(`kubectl (?:apply|delete) -k (\S+)`).FindAllStringSubmatch(text, -1)
	for _, match := range applied {
		if !slices.Contains(overlays, strings.TrimPrefix(match[1], "deploy/kubernetes/")) {
			t.Errorf("%s is applied, and none of what is tested: %q", match[1], overlays)
		}
	}
	example := filepath.Join(dir, "examples", "sops.yaml")
	has := map[string]object{}
	for _, o := range render(t, example)[example].Objects {
		has[o.at("metadata").text("namespace")+"/"+o.at("metadata").text("name")] = o.at("stringData")
	}
	made := regexp.MustCompile(`kubectl -n (\S+) create secret generic (\S+) --from-file=([a-z-]+)=`).FindAllStringSubmatch(text, -1)
	for _, match := range made {
		if _, ok := has[match[1]+"/"+match[2]][match[3]]; !ok {
			t.Errorf("%s: the examples have no such key", match[0])
		}
	}
	listed := regexp.MustCompile("(?m)^\\| `([a-z-]+/[a-z-]+)` \\| (`.*`) \\|").FindAllStringSubmatch(text, -1)
	for _, match := range listed {
		for _, key := range regexp.MustCompile("`([a-z-]+)`").FindAllStringSubmatch(match[2], -1) {
			if _, ok := has[match[1]][key[1]]; !ok {
				t.Errorf("%s has no key %s in the examples", match[1], key[1])
			}
		}
	}
	if len(applied) < 2 || len(made) != 2 || len(listed) != len(has) {
		t.Errorf("%d commands that apply, %d that make Secrets and %d Secrets were found", len(applied), len(made), len(listed))
	}
	for _, p := range pods(all(t)["overlays/k3s-gitops"].Objects) {
		r := p.spec.list("containers")[0].at("resources")
		requests, limits := r.at("requests"), r.at("limits")
		if row := "| " + requests.text("cpu") + ", " + requests.text("memory") + " | " + limits.text("memory") + " |"; !strings.Contains(text, row) {
			t.Errorf("the page does not say of %s: %s", p.of.name(), row)
		}
	}
}

// TestOneVersionEverywhere holds what a release changes together: the tags of images,
// the annotation that has Traefik load a new plugin, and the URLs in comments.
func TestOneVersionEverywhere(t *testing.T) {
	dir, found := filepath.Dir(deployed(t)), 0
	version := regexp.MustCompile(`(?:newTag: |ref=|edgeward\.dev/plugin: |VERSION=|image: ghcr\.io/edgeward/[a-z-]+:|"version", ")(v[0-9][0-9.]*)`)
	err := filepath.WalkDir(dir, func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		for _, match := range version.FindAllStringSubmatch(string(must(os.ReadFile(name))), -1) {
			found++
			if match[1] != plugin.Version {
				t.Errorf("%s says %s, and the release is %s", name, match[1], plugin.Version)
			}
		}
		return nil
	})
	if err != nil || found < 7 {
		t.Errorf("%d versions were found, %v", found, err)
	}
}

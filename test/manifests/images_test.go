package manifests

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/edgeward/edgeward/test/rig/rigtest"
)

// TestImages makes the images twice of a binary that stands in for both programs, and
// reads what came of it as containerd would: by names, by sums, layer by layer.
func TestImages(t *testing.T) {
	tool, dir := rigtest.Tool(t, "images"), t.TempDir()
	binary, err := os.ReadFile(tool)
	if err != nil {
		t.Fatal(err)
	}
	wants := map[string]struct{ user, reference string }{}
	for _, p := range pods(all(t)["overlays/k3s-gitops"].Objects) {
		container := p.spec.list("containers")[0]
		reference := container.text("image")
		name, _, _ := strings.Cut(reference[strings.LastIndex(reference, "/")+1:], ":")
		user := container.at("securityContext")["runAsUser"]
		if user == nil {
			user = p.spec.at("securityContext")["runAsUser"]
		}
		wants[name] = struct{ user, reference string }{fmt.Sprintf("%v:%v", user, user), reference}
		put(t, filepath.Join(dir, runtime.GOARCH, name), binary)
	}
	archives := map[string][]byte{}
	for _, out := range []string{"one", "two"} {
		cmd := exec.CommandContext(t.Context(), tool, "-o", filepath.Join(dir, out), "-arch", runtime.GOARCH, "-binaries", dir)
		if said, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, said)
		}
		names, err := filepath.Glob(filepath.Join(dir, out, "*"))
		if err != nil || len(names) != 2*len(wants) { // an archive and a list each
			t.Fatalf("%q, %v", names, err)
		}
		for _, name := range names {
			text, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if first, ok := archives[filepath.Base(name)]; ok && !bytes.Equal(first, text) {
				t.Errorf("%s differs from one run to the next", filepath.Base(name))
			}
			archives[filepath.Base(name)] = text
		}
	}
	for name, want := range wants {
		files := untar(t, archives[name+".oci.tar"])
		var index struct {
			Manifests []struct {
				Digest      string
				Annotations map[string]string
			}
		}
		decode(t, files["index.json"], &index)
		if len(index.Manifests) != 1 || index.Manifests[0].Annotations["io.containerd.image.name"] != want.reference {
			t.Errorf("%s is named %+v, and the manifests say %s", name, index, want.reference)
			continue
		}
		blob := func(digest string) []byte {
			hash := strings.TrimPrefix(digest, "sha256:")
			data := files["blobs/sha256/"+hash]
			if sum := sha256.Sum256(data); hex.EncodeToString(sum[:]) != hash {
				t.Fatalf("%s: the blob %s is another", name, digest)
			}
			return data
		}
		var archs struct {
			Manifests []struct {
				Digest   string
				Platform struct{ OS, Architecture string }
			}
		}
		decode(t, blob(index.Manifests[0].Digest), &archs)
		if len(archs.Manifests) != 1 || archs.Manifests[0].Platform.OS != "linux" || archs.Manifests[0].Platform.Architecture != runtime.GOARCH {
			t.Fatalf("%s is for %+v", name, archs)
		}
		var manifest struct {
			Config struct{ Digest string }
			Layers []struct{ MediaType, Digest string }
		}
		decode(t, blob(archs.Manifests[0].Digest), &manifest)
		var config struct {
			OS, Architecture string
			Config           struct {
				User       string
				Entrypoint []string
			}
		}
		decode(t, blob(manifest.Config.Digest), &config)
		if config.OS != "linux" || config.Architecture != runtime.GOARCH || config.Config.User != want.user || !slices.Equal(config.Config.Entrypoint, []string{"/usr/bin/" + name}) {
			t.Errorf("%s: the configuration is %+v, and the manifests say user %s", name, config, want.user)
		}
		holds := map[string]int{}
		for _, layer := range manifest.Layers {
			if layer.MediaType != "application/vnd.oci.image.layer.v1.tar+gzip" {
				t.Errorf("%s: a layer is %s", name, layer.MediaType)
			}
			unzipped, err := gzip.NewReader(bytes.NewReader(blob(layer.Digest)))
			if err != nil {
				t.Fatal(err)
			}
			text := must(io.ReadAll(unzipped))
			if len(text)%512 != 0 || !bytes.HasSuffix(text, make([]byte, 1024)) {
				t.Errorf("%s: a layer has no end, which Go's reader forgives and others do not", name)
			}
			for file, data := range untar(t, text) {
				holds[file] = len(data)
				if block, _ := pem.Decode(data); strings.HasSuffix(file, ".crt") && block == nil {
					t.Errorf("%s: %s holds no certificate", name, file)
				}
			}
		}
		certificates := holds["etc/ssl/certs/ca-certificates.crt"]
		if diff := cmp.Diff(map[string]int{"etc/ssl/certs/ca-certificates.crt": certificates, "usr/bin/" + name: len(binary)}, holds); diff != "" || certificates < 50_000 {
			t.Errorf("%s holds other files (-want +have):\n%s", name, diff)
		}
		var bom struct {
			BOMFormat  string
			Components []struct{ Name, Version, PURL string }
		}
		decode(t, archives[name+"-"+runtime.GOARCH+".cdx.json"], &bom)
		if bom.BOMFormat != "CycloneDX" || !slices.ContainsFunc(bom.Components, func(c struct{ Name, Version, PURL string }) bool {
			return c.Name == "github.com/google/go-containerregistry" && c.PURL == "pkg:golang/github.com/google/go-containerregistry@"+c.Version
		}) {
			t.Errorf("%s: the list of contents is %+v", name, bom)
		}
	}
	// What is not static and for the architecture goes into no image.
	other := map[string]string{"amd64": "arm64", "arm64": "amd64"}[runtime.GOARCH]
	for name := range wants {
		put(t, filepath.Join(dir, other, name), binary)
	}
	said, err := exec.CommandContext(t.Context(), tool, "-o", filepath.Join(dir, "three"), "-arch", other, "-binaries", dir).CombinedOutput()
	if err == nil || !strings.Contains(string(said), "not static for linux/"+other) {
		t.Errorf("a binary for %s becomes an image for %s: %v, %s", runtime.GOARCH, other, err, said)
	}
}

// TestDockerfileMakesTheSame compares the two recipes, of which Docker's is not run here.
func TestDockerfileMakesTheSame(t *testing.T) {
	dir := filepath.Join(filepath.Dir(deployed(t)), "images")
	recipe, text := string(must(os.ReadFile(filepath.Join(dir, "main.go")))), string(must(os.ReadFile(filepath.Join(dir, "Dockerfile"))))
	found := regexp.MustCompile(`(?m)^\t\{"([a-z-]+)", "(\d+:\d+)"`).FindAllStringSubmatch(recipe, -1)
	if len(found) != 2 {
		t.Fatalf("%d programs were found", len(found))
	}
	for _, program := range found {
		_, stage, ok := strings.Cut(text, "FROM scratch AS "+program[1]+"\n")
		stage, _, _ = strings.Cut(stage, "\nFROM")
		if !ok || !strings.Contains(stage, "\nUSER "+program[2]+"\n") || !strings.Contains(stage, `ENTRYPOINT ["/usr/bin/`+program[1]+`"]`) {
			t.Errorf("the Dockerfile makes another image of %s, as %s", program[1], program[2])
		}
	}
	version := regexp.MustCompile(`(?m)^go (\S+)$`).FindSubmatch(must(os.ReadFile(filepath.Join(dir, "..", "..", "go.mod"))))
	if builder := regexp.MustCompile(`golang:(\d+\.\d+)`).FindStringSubmatch(text); builder == nil || !strings.HasPrefix(string(version[1]), builder[1]) {
		t.Errorf("the Dockerfile builds with Go %v, and go.mod says %s", builder, version[1])
	}
}

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func put(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, data, 0o755); err != nil {
		t.Fatal(err)
	}
}

func decode(t *testing.T, text []byte, into any) {
	t.Helper()
	if err := json.Unmarshal(text, into); err != nil {
		t.Fatalf("%v, in %.200s", err, text)
	}
}

// untar returns the files of an archive.
func untar(t *testing.T, text []byte) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(text)); ; {
		header, err := r.Next()
		if err == io.EOF {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if header.Typeflag == tar.TypeReg {
			files[header.Name] = must(io.ReadAll(r))
		}
	}
}

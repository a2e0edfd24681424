package manifests

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/edgeward/edgeward/internal/bundle"
	"github.com/edgeward/edgeward/test/rig"
	"github.com/edgeward/edgeward/test/rig/rigtest"
)

// layOut does below dir what a kubelet does with the values' mounts of ConfigMaps: the
// files are links into a directory whose name changes, but for those mounted alone.
func layOut(t *testing.T, dir string, v values, maps map[string]object) {
	t.Helper()
	write := func(name, text string) {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	link := func(to, name string) {
		if err := os.Symlink(to, name); err != nil {
			t.Fatal(err)
		}
	}
	for _, mount := range v.AdditionalVolumeMounts {
		if !mount.ReadOnly {
			t.Errorf("%s can be written", mount.MountPath)
		}
		for _, volume := range v.Deployment.AdditionalVolumes {
			if volume.Name != mount.Name || volume.ConfigMap.Name == "" {
				continue
			}
			at, data := filepath.Join(dir, mount.MountPath), maps[volume.ConfigMap.Name]
			if mount.SubPath != "" {
				write(at, data.text(mount.SubPath))
				continue
			}
			for name := range data {
				write(filepath.Join(at, "..2026_11_21", name), data.text(name))
			}
			link("..2026_11_21", filepath.Join(at, "..data"))
			for name := range data {
				link(filepath.Join("..data", name), filepath.Join(at, name))
			}
		}
	}
}

// TestPluginIsTheBundle compares what Traefik's pod is given with what the bundle
// holds, which the other suites judge.
func TestPluginIsTheBundle(t *testing.T) {
	root, err := rig.Root()
	if err != nil {
		t.Fatal(err)
	}
	want, have := t.TempDir(), t.TempDir()
	if err := bundle.Assemble(t.Context(), root, filepath.Join(want, "plugins-local"), bundle.Options{}); err != nil {
		t.Fatal(err)
	}
	v, maps, _ := chart(t, all(t)["overlays/k3s"].Objects)
	layOut(t, have, v, maps)
	files := func(dir string) map[string]string {
		all := map[string]string{}
		err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() && strings.HasPrefix(entry.Name(), "..") {
				return fs.SkipDir
			}
			// Those are for Go and for lawyers, and Traefik reads neither; links to
			// directories are the kubelet's.
			if entry.IsDir() || entry.Name() == "go.mod" || entry.Name() == "modules.txt" || entry.Name() == "LICENSE" || entry.Name() == "..data" {
				return nil
			}
			text, err := os.ReadFile(path)
			all[strings.TrimPrefix(path, dir)] = string(text)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return all
	}
	if diff := cmp.Diff(files(want), files(have)); diff != "" {
		t.Errorf("the ConfigMaps differ from the bundle (-bundle +ConfigMaps): list new files in the kustomization.yaml beside them, and copy traefik.yml and rate.go.txt again:\n%s", diff)
	}
}

// TestTraefikServesWhatIsDeployed runs the real Traefik with the arguments, the plugin,
// the middlewares and the routes of an overlay. Its file provider stands in for the one
// that reads Kubernetes, so names end in @file; addresses and keys are this test's.
func TestTraefikServesWhatIsDeployed(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	objects := all(t)["overlays/k3s"].Objects
	v, maps, _ := chart(t, objects)
	dir := t.TempDir()
	layOut(t, dir, v, maps)
	origin, lapi := rigtest.Origin(t), rigtest.FakeLAPI(t)
	lapi.Answer(rig.AnswerStream([]rig.FakeDecision{{ID: 1, Origin: "cscli", Type: "ban", Scope: "Ip", Value: "127.0.0.1", Duration: "4h", Scenario: "manual"}}, nil))
	key := filepath.Join(dir, "lapi-key")
	if err := os.WriteFile(key, []byte("the-key-of-a-test"), 0o600); err != nil {
		t.Fatal(err)
	}

	middlewares, routers := map[string]any{}, map[string]any{
		"site": map[string]any{"rule": "Host(`app.example.com`)", "entryPoints": []string{"web"}, "service": "origin"},
	}
	for _, o := range objects {
		namespace := o.at("metadata").text("namespace") + "-"
		name := namespace + o.at("metadata").text("name")
		switch o.text("kind") {
		case "Middleware":
			middlewares[name] = map[string]any(o.at("spec"))
		case "IngressRoute":
			for _, route := range o.at("spec").list("routes") {
				router := map[string]any{"rule": route["match"], "priority": route["priority"], "entryPoints": o.at("spec")["entryPoints"], "service": route.list("services")[0]["name"]}
				if tls, ok := o.at("spec")["tls"]; ok {
					router["tls"] = tls
				}
				var names []string
				for _, m := range route.list("middlewares") {
					names = append(names, namespace+m.text("name"))
				}
				router["middlewares"] = names
				routers[name] = router
			}
		}
	}
	options := object(middlewares["edgeward-edgeward"].(map[string]any)).at("plugin", "edgeward")
	options.at("lapi")["url"], options.at("lapi")["keyFile"] = lapi.URL, key
	configure := func() {
		text, err := json.Marshal(map[string]any{"http": map[string]any{"middlewares": middlewares, "routers": routers,
			"services": map[string]any{"origin": map[string]any{"loadBalancer": map[string]any{"servers": []any{map[string]any{"url": origin.URL}}}}}}})
		if err != nil {
			t.Fatal(err)
		}
		// In one step, or Traefik may read a half.
		if err := os.WriteFile(filepath.Join(dir, "next"), text, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "next"), filepath.Join(dir, "dynamic", "all.yml")); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "dynamic"), 0o755); err != nil {
		t.Fatal(err)
	}
	configure()

	args := []string{"--providers.file.directory=" + filepath.Join(dir, "dynamic"), "--providers.file.watch=true"}
	for _, arg := range v.AdditionalArguments {
		args = append(args, strings.ReplaceAll(arg, "@kubernetescrd", "@file"))
	}
	urls := map[string]string{}
	for _, entrypoint := range []string{"web", "websecure", "internal"} {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		args = append(args, fmt.Sprintf("--entryPoints.%s.address=%s", entrypoint, listener.Addr()))
		urls[entrypoint] = "https://" + listener.Addr().String()
		listener.Close()
	}
	urls["web"] = strings.Replace(urls["web"], "https", "http", 1)
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(rigtest.Tool(t, "traefik"), args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // with the error that it was killed
	})

	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	// eventually asks until the status is the one that is wanted.
	eventually := func(entrypoint, host string, want int) {
		t.Helper()
		for {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, urls[entrypoint], nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Host = host
			status := 0
			resp, err := client.Do(req)
			if err == nil {
				resp.Body.Close()
				status = resp.StatusCode
			}
			if status == want {
				return
			}
			if ctx.Err() != nil {
				text, _ := os.ReadFile(log.Name())
				t.Fatalf("%s on %s answers %d (%v), want %d; Traefik said:\n%s", host, entrypoint, status, err, want, text)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	// The first day: observed, and what nobody routes is not found, as without us.
	eventually("web", "app.example.com", http.StatusOK)
	for entrypoint := range urls {
		eventually(entrypoint, "nobody.example.com", http.StatusNotFound)
	}
	// The default backend of an Ingress, whose router has the least priority that
	// Traefik gives, still gets what no host of its own gets.
	routers["default"] = map[string]any{"rule": "PathPrefix(`/`)", "priority": -2147483648, "entryPoints": []string{"web"}, "service": "origin"}
	options["mode"] = "observe"
	configure()
	eventually("web", "nobody.example.com", http.StatusOK)
	// Then bans hold, for sites and for what nobody routes, on each entrypoint.
	delete(routers, "default")
	options["mode"] = "enforce"
	configure()
	eventually("web", "app.example.com", http.StatusForbidden)
	for entrypoint := range urls {
		eventually(entrypoint, "nobody.example.com", http.StatusForbidden)
	}
}

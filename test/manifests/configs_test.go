package manifests

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/edgeward/edgeward/bouncer"
	"github.com/edgeward/edgeward/plugin"
	"github.com/edgeward/edgeward/tunnel"
)

// program is what a configuration in a ConfigMap says about the pod that reads it.
type program struct {
	role   []string // the arguments that it is for
	listen uint16
	dirs   []string          // that must be mounted
	keys   map[string]string // files with secrets, and what they are for
	ports  []uint16          // beside listen
}

// read has the program's own strict parser read its configuration.
func read(file, text string) (program, error) {
	switch file {
	case "bouncer.yaml":
		c, err := bouncer.Parse(file, []byte(text))
		if err != nil {
			return program{}, err
		}
		p := program{role: []string{"run"}, listen: c.Listen.Port(), dirs: []string{c.StateDir, path.Dir(c.Socket)},
			keys: map[string]string{"lapi.keyFile": string(c.LAPI.KeyFile)}}
		if c.Auth.Listen.IsValid() {
			p.ports = append(p.ports, c.Auth.Listen.Port())
		}
		return p, nil
	case "tunnel.yaml":
		c, err := tunnel.Parse(file, []byte(text))
		if err != nil {
			return program{}, err
		}
		if warnings := c.Warnings(); len(warnings) > 0 {
			return program{}, fmt.Errorf("%s: %v", file, warnings)
		}
		return program{role: []string{"run", "--role", "cloudflare"}, listen: c.Listen.Port(), dirs: []string{c.StateDir, path.Dir(c.Socket)},
			keys: map[string]string{"lapi.keyFile": string(c.LAPI.KeyFile), "tunnels[0].tokenFile": string(c.Tunnels[0].TokenFile), "identity.keyFile": string(c.Identity.KeyFile)}}, nil
	case "vpn.yaml":
		c, err := tunnel.Parse(file, []byte(text))
		if err != nil {
			return program{}, err
		}
		return program{role: []string{"run", "--role", "wireguard", "--config", "/etc/edgeward/vpn.yaml"}, listen: c.Listen.Port(),
			dirs: []string{c.StateDir, path.Dir(c.Socket), path.Dir(string(c.WireGuard.PrivateKeyFile))}}, nil
	}
	return program{}, fmt.Errorf("no program reads %s", file)
}

// TestProgramsAcceptTheirConfigurations has each configuration read by the program it
// is for, and compares it with the pod around it: what it listens on is probed, what it
// writes is mounted, and each key is in a Secret that the examples have.
func TestProgramsAcceptTheirConfigurations(t *testing.T) {
	secrets := map[string][]string{} // keys by namespace and name
	for _, o := range render(t, filepath.Join(deployed(t), "examples", "sops.yaml"))[filepath.Join(deployed(t), "examples", "sops.yaml")].Objects {
		for key, value := range o.at("stringData") {
			if value != "" {
				t.Errorf("%s: an example has a secret in it", o.name())
			}
			secrets[o.name()] = append(secrets[o.name()], key)
		}
	}
	judged := 0
	for name, r := range all(t) {
		for _, p := range pods(r.Objects) {
			container := p.spec.list("containers")[0]
			mounts := map[string]object{} // volumes by where they are
			for _, m := range container.list("volumeMounts") {
				for _, v := range p.spec.list("volumes") {
					if v["name"] == m["name"] {
						mounts[m.text("mountPath")] = v
					}
				}
			}
			config := mounts["/etc/edgeward"].at("configMap").text("name")
			for _, o := range r.Objects {
				if o.name() != fmt.Sprintf("ConfigMap %s/%s", p.namespace, config) {
					continue
				}
				for file := range o.at("data") {
					judged++
					has, err := read(file, o.at("data").text(file))
					if err != nil {
						t.Errorf("%s: %s: %v", name, o.name(), err)
						continue
					}
					if args := container.words("args"); !slices.Equal(args, has.role) {
						t.Errorf("%s: %s runs %q with %s", name, p.of.name(), args, file)
					}
					for _, dir := range has.dirs {
						if v := mounts[dir]; v == nil || v["emptyDir"] == nil && v["hostPath"] == nil {
							t.Errorf("%s: %s cannot write %s", name, p.of.name(), dir)
						}
					}
					for of, file := range has.keys {
						secret := mounts[path.Dir(file)].at("secret").text("secretName")
						if !slices.Contains(secrets[fmt.Sprintf("Secret %s/%s", p.namespace, secret)], path.Base(file)) {
							t.Errorf("%s: %s: %s is %s, which no Secret of the examples has", name, p.of.name(), of, file)
						}
					}
					for _, probe := range []string{"livenessProbe", "readinessProbe"} {
						if port := container.at(probe, "httpGet")["port"]; !samePort(container, port, has.listen) {
							t.Errorf("%s: %s asks port %v, and the program listens on %d", p.of.name(), probe, port, has.listen)
						}
					}
					for _, port := range has.ports {
						if !hasPort(p, port) {
							t.Errorf("%s: %s does not declare port %d", name, p.of.name(), port)
						}
					}
				}
			}
		}
	}
	if judged < 6 {
		t.Errorf("%d configurations were found, want 6 or more", judged)
	}
}

// samePort tells whether a port, by number or by a container's name for it, is listen.
func samePort(container object, port any, listen uint16) bool {
	for _, has := range container.list("ports") {
		if has["name"] == port {
			port = has["containerPort"]
		}
	}
	return fmt.Sprint(port) == fmt.Sprint(listen)
}

// TestPeersReachTheInternalEntrypoint compares the address that the VPN grants with the
// one that k3s' Service has.
func TestPeersReachTheInternalEntrypoint(t *testing.T) {
	address, granted := "", ""
	for _, o := range all(t)["overlays/k3s"].Objects {
		if o.name() == "Service kube-system/edgeward-internal" {
			address = o.at("spec").text("clusterIP")
		}
	}
	for _, o := range all(t)[vpn].Objects {
		if o.name() == "ConfigMap edgeward-node/edgeward-vpn" {
			granted = o.at("data").text("vpn.yaml")
		}
	}
	if address == "" || !strings.Contains(granted, "["+address+"]") {
		t.Errorf("the entrypoint internal is at %q, which the VPN does not grant:\n%s", address, granted)
	}
}

// TestPluginAcceptsItsMiddlewares makes a handler of each, as Traefik would.
func TestPluginAcceptsItsMiddlewares(t *testing.T) {
	judged := 0
	for name, r := range all(t) {
		for _, o := range r.Objects {
			options := o.at("spec", "plugin", "edgeward")
			if options == nil {
				continue
			}
			judged++
			text, err := json.Marshal(options)
			if err != nil {
				t.Fatal(err)
			}
			decoder := json.NewDecoder(bytes.NewReader(text))
			decoder.DisallowUnknownFields()
			config := plugin.CreateConfig()
			if err := decoder.Decode(config); err != nil {
				t.Errorf("%s: %s: %v", name, o.name(), err)
				continue
			}
			if _, err := plugin.New(t.Context(), http.NotFoundHandler(), config, o.name()); err != nil {
				t.Errorf("%s: %s: %v", name, o.name(), err)
			}
		}
	}
	if judged < 3 {
		t.Errorf("%d middlewares were found, want 3 or more", judged)
	}
}

// values are what Traefik's chart is given.
type values struct {
	Deployment struct {
		PodAnnotations    map[string]string
		AdditionalVolumes []struct {
			Name      string
			ConfigMap struct{ Name string }
			Secret    struct {
				SecretName string
				Optional   bool
			}
		}
	}
	AdditionalVolumeMounts []struct {
		Name, MountPath, SubPath string
		ReadOnly                 bool
	}
	AdditionalArguments []string
	Ports               map[string]struct {
		Port     int
		Protocol string
		Expose   map[string]bool
	}
	Service struct {
		Spec struct{ ExternalTrafficPolicy string }
	}
}

// chart reads the values that an overlay hands to Traefik, strictly, and returns what
// else is beside Traefik: ConfigMaps by name, and the namespace.
func chart(t *testing.T, objects []object) (v values, maps map[string]object, namespace string) {
	t.Helper()
	text := ""
	for _, o := range objects {
		if o.text("kind") == "ConfigMap" && o.at("metadata").text("name") == "edgeward-traefik-values" {
			text, namespace = o.at("data").text("values.yaml"), o.at("metadata").text("namespace")
		}
	}
	if text == "" {
		t.Fatal("there are no values for Traefik's chart")
	}
	asJSON, err := yaml.YAMLToJSON([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	decoder := json.NewDecoder(bytes.NewReader(asJSON))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&v); err != nil {
		t.Fatal(err)
	}
	maps = map[string]object{}
	for _, o := range objects {
		if o.text("kind") == "ConfigMap" && o.at("metadata").text("namespace") == namespace {
			maps[o.at("metadata").text("name")] = o.at("data")
		}
		if o.text("kind") == "HelmChartConfig" && (o.at("spec").text("valuesContent") != text || o.name() != "HelmChartConfig kube-system/traefik") {
			t.Errorf("%s does not hold the values", o.name())
		}
	}
	return v, maps, namespace
}

// TestTraefikIsGivenWhatExists compares the values with the objects beside them.
func TestTraefikIsGivenWhatExists(t *testing.T) {
	for _, name := range []string{"overlays/k3s", "overlays/k3s-gitops", "overlays/generic", composed} {
		objects := all(t)[name].Objects
		v, maps, namespace := chart(t, objects)
		if v.Service.Spec.ExternalTrafficPolicy != "Local" || v.Deployment.PodAnnotations["edgeward.dev/plugin"] == "" {
			t.Errorf("%s: clients' addresses are lost, or a new plugin is not loaded: %+v", name, v)
		}
		for _, volume := range v.Deployment.AdditionalVolumes {
			if volume.Secret.SecretName != "" {
				if !volume.Secret.Optional {
					t.Errorf("%s: without the Secret %s Traefik would not start", name, volume.Secret.SecretName)
				}
			} else if maps[volume.ConfigMap.Name] == nil {
				t.Errorf("%s: there is no ConfigMap %s in %s", name, volume.ConfigMap.Name, namespace)
			}
		}
		entrypoints := []string{"web", "websecure"} // the chart's own
		for entrypoint := range v.Ports {
			entrypoints = append(entrypoints, entrypoint)
		}
		exists := func(kind, name string) bool {
			return slices.ContainsFunc(objects, func(o object) bool {
				return o.text("kind") == kind && o.at("metadata").text("namespace")+"-"+o.at("metadata").text("name") == name
			})
		}
		covered := map[string]bool{}
		for _, arg := range v.AdditionalArguments {
			option, value, _ := strings.Cut(strings.TrimPrefix(arg, "--"), "=")
			parts := strings.Split(option, ".")
			if parts[0] != "entryPoints" {
				continue
			}
			if !slices.Contains(entrypoints, parts[1]) {
				t.Errorf("%s: %s: there is no such entrypoint", name, arg)
			}
			if middleware, ok := strings.CutSuffix(value, "@kubernetescrd"); ok {
				covered[parts[1]] = exists("Middleware", middleware)
			}
		}
		caught := map[string]int{}
		for _, o := range objects {
			switch o.text("kind") {
			case "IngressRoute":
				for _, entrypoint := range o.at("spec").words("entryPoints") {
					if !slices.Contains(entrypoints, entrypoint) {
						t.Errorf("%s: %s: there is no entrypoint %s", name, o.name(), entrypoint)
					}
					caught[entrypoint]++
				}
				for _, route := range o.at("spec").list("routes") {
					for _, m := range route.list("middlewares") {
						if !exists("Middleware", o.at("metadata").text("namespace")+"-"+m.text("name")) {
							t.Errorf("%s: %s: there is no Middleware %s", name, o.name(), m.text("name"))
						}
					}
				}
			case "Service":
				if o.at("metadata").text("namespace") != namespace {
					continue
				}
				for _, port := range o.at("spec").list("ports") {
					if _, ok := v.Ports[port.text("targetPort")]; !ok {
						t.Errorf("%s: %s: Traefik has no port %v", name, o.name(), port["targetPort"])
					}
				}
			}
		}
		for _, entrypoint := range entrypoints {
			if !covered[entrypoint] || caught[entrypoint] != 1 {
				t.Errorf("%s: the entrypoint %s has a middleware: %t, and %d last routers", name, entrypoint, covered[entrypoint], caught[entrypoint])
			}
		}
	}
}

package main

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/edgeward/edgeward/tunnel"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"edgeward-tunnel": func() { os.Exit(program(os.Args[1:])) }})
}

// TestScripts runs the command line as an operator would. What needs an edge is
// proved in test/tunnel.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata", Setup: func(env *testscript.Env) error {
		// A command that is built to find races sleeps for a second at its end.
		env.Setenv("GORACE", "atexit_sleep_ms=0")
		return nil
	}})
}

const (
	deployed   = "../../deploy/tunnel"
	kubernetes = "../../deploy/kubernetes/tunnel"
)

// TestExamplesAreAccepted checks the configurations that are shipped.
func TestExamplesAreAccepted(t *testing.T) {
	for _, name := range []string{deployed + "/tunnel.yaml", kubernetes + "/tunnel.yaml", deployed + "/vpn.yaml", deployed + "/vpn/vpn.yaml"} {
		c, err := tunnel.Load(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range c.Warnings() {
			if !strings.Contains(w, "nobody is in group") { // peers are for the command line to add
				t.Errorf("%s: %v", name, w)
			}
		}
	}
}

// TestManifestAsksForNothing holds the Deployment to what the restricted level
// of pod security allows, and to the paths and times of its configuration.
func TestManifestAsksForNothing(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(kubernetes, "deployment.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	first, second, ok := strings.Cut(string(text), "\n---\n")
	if !ok || !strings.Contains(second, "kind: PodDisruptionBudget") || !strings.Contains(second, "minAvailable: 1") {
		t.Error("there is no disruption budget of one")
	}
	var set struct {
		Spec struct {
			Replicas int `yaml:"replicas"`
			Strategy struct {
				RollingUpdate struct {
					MaxUnavailable *int `yaml:"maxUnavailable"`
				} `yaml:"rollingUpdate"`
			} `yaml:"strategy"`
			Template struct {
				Spec struct {
					HostNetwork bool           `yaml:"hostNetwork"`
					Automount   *bool          `yaml:"automountServiceAccountToken"`
					Grace       int            `yaml:"terminationGracePeriodSeconds"`
					Affinity    map[string]any `yaml:"affinity"`
					Security    struct {
						NonRoot *bool `yaml:"runAsNonRoot"`
						User    int   `yaml:"runAsUser"`
						Seccomp struct {
							Type string `yaml:"type"`
						} `yaml:"seccompProfile"`
					} `yaml:"securityContext"`
					Containers []struct {
						Security struct {
							Escalation *bool `yaml:"allowPrivilegeEscalation"`
							ReadOnly   bool  `yaml:"readOnlyRootFilesystem"`
							Can        struct {
								Drop []string `yaml:"drop"`
								Add  []string `yaml:"add"`
							} `yaml:"capabilities"`
						} `yaml:"securityContext"`
						Mounts []struct {
							Path string `yaml:"mountPath"`
						} `yaml:"volumeMounts"`
						Liveness struct {
							Get struct {
								Path string `yaml:"path"`
							} `yaml:"httpGet"`
						} `yaml:"livenessProbe"`
					} `yaml:"containers"`
					Volumes []map[string]any `yaml:"volumes"`
				} `yaml:"spec"`
			} `yaml:"template"`
		} `yaml:"spec"`
	}
	if err := yaml.Unmarshal([]byte(first), &set); err != nil {
		t.Fatal(err)
	}
	pod := set.Spec.Template.Spec
	if set.Spec.Replicas != 2 || set.Spec.Strategy.RollingUpdate.MaxUnavailable == nil || *set.Spec.Strategy.RollingUpdate.MaxUnavailable != 0 || pod.Affinity["podAntiAffinity"] == nil {
		t.Errorf("the deployment is %+v", set.Spec)
	}
	if pod.HostNetwork || pod.Automount == nil || *pod.Automount || pod.Security.NonRoot == nil || !*pod.Security.NonRoot || pod.Security.User == 0 || pod.Security.Seccomp.Type != "RuntimeDefault" {
		t.Errorf("the pod is %+v", pod)
	}
	container := pod.Containers[0]
	s := container.Security
	if s.Escalation == nil || *s.Escalation || !s.ReadOnly || !slices.Equal(s.Can.Drop, []string{"ALL"}) || len(s.Can.Add) > 0 {
		t.Errorf("the container may %+v", s)
	}
	if container.Liveness.Get.Path != "/healthz" {
		t.Error("liveness must not hang on the edge")
	}
	for _, v := range pod.Volumes {
		if v["hostPath"] != nil {
			t.Errorf("the restricted level has no place for %v", v)
		}
	}
	c, err := tunnel.Load(filepath.Join(kubernetes, "tunnel.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if least := int((c.Drain.LameDuck + c.Drain.Grace + drainMargin).Seconds()); pod.Grace <= least {
		t.Errorf("a pod is killed after %d s, and may take %d to drain", pod.Grace, least)
	}
	var mounted []string
	for _, m := range container.Mounts {
		mounted = append(mounted, m.Path)
	}
	for _, path := range []string{filepath.Dir(string(c.LAPI.KeyFile)), filepath.Dir(string(c.Identity.KeyFile)), filepath.Dir(c.Socket), c.StateDir, "/etc/edgeward"} {
		if !slices.Contains(mounted, path) {
			t.Errorf("nothing is mounted at %s, only at %v", path, mounted)
		}
	}
}

// TestUnitAsksForNothing does the same for the unit of systemd.
func TestUnitAsksForNothing(t *testing.T) {
	unit, err := os.ReadFile(filepath.Join(deployed, "edgeward-tunnel.service"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := tunnel.Load(filepath.Join(deployed, "tunnel.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"User=edgeward", "CapabilityBoundingSet=", "NoNewPrivileges=yes", "ProtectSystem=strict", "LimitCORE=0",
		"RuntimeDirectory=" + filepath.Base(filepath.Dir(c.Socket)), "StateDirectory=" + filepath.Base(c.StateDir),
	} {
		if !strings.Contains(string(unit), "\n"+line+"\n") {
			t.Errorf("the unit does not say %s", line)
		}
	}
}

// TestGatewayAsksForOnePrivilege holds the manifest of the VPN's gateway to the one
// privilege that it needs, and to the paths of its configuration.
func TestGatewayAsksForOnePrivilege(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(deployed, "vpn", "deployment.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var set struct {
		Spec struct {
			Replicas int `yaml:"replicas"`
			Strategy struct {
				Type string `yaml:"type"`
			} `yaml:"strategy"`
			Template struct {
				Spec struct {
					HostNetwork bool  `yaml:"hostNetwork"`
					HostPID     bool  `yaml:"hostPID"`
					Automount   *bool `yaml:"automountServiceAccountToken"`
					Containers  []struct {
						Args     []string `yaml:"args"`
						Security struct {
							Privileged bool  `yaml:"privileged"`
							Escalation *bool `yaml:"allowPrivilegeEscalation"`
							ReadOnly   bool  `yaml:"readOnlyRootFilesystem"`
							Seccomp    struct {
								Type string `yaml:"type"`
							} `yaml:"seccompProfile"`
							Can struct {
								Drop []string `yaml:"drop"`
								Add  []string `yaml:"add"`
							} `yaml:"capabilities"`
						} `yaml:"securityContext"`
						Mounts []struct {
							Path string `yaml:"mountPath"`
						} `yaml:"volumeMounts"`
						Liveness struct {
							Get struct {
								Port int    `yaml:"port"`
								Path string `yaml:"path"`
							} `yaml:"httpGet"`
						} `yaml:"livenessProbe"`
					} `yaml:"containers"`
				} `yaml:"spec"`
			} `yaml:"template"`
		} `yaml:"spec"`
	}
	if err := yaml.Unmarshal(text, &set); err != nil {
		t.Fatal(err)
	}
	pod := set.Spec.Template.Spec
	if set.Spec.Replicas != 1 || set.Spec.Strategy.Type != "Recreate" || !pod.HostNetwork || pod.HostPID || pod.Automount == nil || *pod.Automount {
		t.Errorf("the deployment is %+v", set.Spec)
	}
	container := pod.Containers[0]
	s := container.Security
	if s.Privileged || s.Escalation == nil || *s.Escalation || !s.ReadOnly || s.Seccomp.Type != "RuntimeDefault" || !slices.Equal(s.Can.Drop, []string{"ALL"}) || !slices.Equal(s.Can.Add, []string{"NET_ADMIN"}) {
		t.Errorf("the container may %+v", s)
	}
	c, err := tunnel.Load(filepath.Join(deployed, "vpn", "vpn.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if g := container.Liveness.Get; g.Path != "/healthz" || g.Port != int(c.Listen.Port()) || !c.Listen.Addr().IsLoopback() {
		t.Errorf("the probe asks %+v, and the gateway answers at %v", g, c.Listen)
	}
	var mounted []string
	for _, m := range container.Mounts {
		mounted = append(mounted, m.Path)
	}
	for _, path := range []string{filepath.Dir(string(c.WireGuard.PrivateKeyFile)), c.WireGuard.PresharedKeyDir, filepath.Dir(c.Socket), c.StateDir, "/etc/edgeward", "/var/run/wireguard", "/dev/net/tun"} {
		if !slices.Contains(mounted, path) {
			t.Errorf("nothing is mounted at %s, only at %v", path, mounted)
		}
	}

	unit, err := os.ReadFile(filepath.Join(deployed, "edgeward-vpn.service"))
	if err != nil {
		t.Fatal(err)
	}
	if c, err = tunnel.Load(filepath.Join(deployed, "vpn.yaml")); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"CapabilityBoundingSet=CAP_NET_ADMIN", "NoNewPrivileges=yes", "ProtectSystem=strict", "LimitCORE=0",
		"RuntimeDirectory=" + filepath.Base(filepath.Dir(c.Socket)) + " wireguard", "StateDirectory=" + filepath.Base(c.StateDir),
	} {
		if !strings.Contains(string(unit), "\n"+line+"\n") {
			t.Errorf("the unit does not say %s", line)
		}
	}
}

// TestRoles has a process be what it is told, or what its file is for.
func TestRoles(t *testing.T) {
	const public, vpn = "tunnels: [{name: home, tokenFile: /t}]\n", "wireguard: {addresses: [10.66.0.1/24]}\n"
	for _, c := range []struct{ flag, file, want, wrong string }{
		{"", public, "cloudflare", ""},
		{"", vpn, "wireguard", ""},
		{"", public + vpn, "cloudflare,wireguard", ""},
		{"wireguard", public + vpn, "wireguard", ""},
		{"cloudflare", public + vpn, "cloudflare", ""},
		{"wireguard,cloudflare", public + vpn, "cloudflare,wireguard", ""},
		{"wireguard", public, "", "has no section wireguard"},
		{"cloudflare,wireguard", vpn, "", "has no tunnels"},
		{"both", vpn, "", "want cloudflare, wireguard, or both with a comma"},
	} {
		config, err := tunnel.Parse("tunnel.yaml", []byte(c.file))
		if err != nil {
			t.Fatal(err)
		}
		var role roles
		if c.flag != "" {
			err = role.Set(c.flag)
		}
		if err == nil {
			role, err = role.of("tunnel.yaml", &config)
		}
		if c.wrong != "" {
			if err == nil || !strings.Contains(err.Error(), c.wrong) {
				t.Errorf("--role %s on %q: %v", c.flag, c.file, err)
			}
		} else if err != nil || role.String() != c.want {
			t.Errorf("--role %s on %q is %s %v, want %s", c.flag, c.file, &role, err, c.want)
		}
	}
}

// TestMainIsATableOfContents holds main.go to what can be read at a glance.
func TestMainIsATableOfContents(t *testing.T) {
	text, err := os.ReadFile("main.go")
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(text), "\n"); n > 120 {
		t.Errorf("main.go has %d lines", n)
	}
}

// TestPolicyDeniesTheRest holds the NetworkPolicy to the pods of the Deployment,
// both directions, and what the tunnel's configuration reaches.
func TestPolicyDeniesTheRest(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(kubernetes, "networkpolicy.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	type side struct {
		To []struct {
			Block struct {
				CIDR   string         `yaml:"cidr"`
				Except []netip.Prefix `yaml:"except"`
			} `yaml:"ipBlock"`
			Namespace any `yaml:"namespaceSelector"`
			Pods      any `yaml:"podSelector"`
		} `yaml:"to"`
		From  []any `yaml:"from"`
		Ports []struct {
			Protocol string `yaml:"protocol"`
			Port     any    `yaml:"port"`
		} `yaml:"ports"`
	}
	var policy struct {
		Spec struct {
			Selects struct {
				Labels map[string]string `yaml:"matchLabels"`
			} `yaml:"podSelector"`
			Types   []string `yaml:"policyTypes"`
			Ingress []side   `yaml:"ingress"`
			Egress  []side   `yaml:"egress"`
		} `yaml:"spec"`
	}
	if err := yaml.Unmarshal(text, &policy); err != nil {
		t.Fatal(err)
	}
	spec := policy.Spec
	if spec.Selects.Labels["app.kubernetes.io/name"] != "edgeward-tunnel" || len(spec.Selects.Labels) != 1 || !slices.Equal(spec.Types, []string{"Ingress", "Egress"}) {
		t.Errorf("the policy is on %v, for %v", spec.Selects.Labels, spec.Types)
	}
	var open []string
	for _, s := range slices.Concat(spec.Ingress, spec.Egress) {
		if len(s.Ports) == 0 || len(s.To)+len(s.From) == 0 {
			t.Errorf("everything is allowed: %+v", s)
		}
		world := false
		for _, to := range s.To {
			world = world || to.Block.CIDR != ""
			if to.Block.CIDR == "" && (to.Namespace == nil || to.Pods == nil) {
				t.Errorf("a whole namespace is open: %+v", to)
			}
			if to.Block.CIDR == "0.0.0.0/0" {
				for _, inside := range []string{"10.42.0.5", "10.43.0.1", "192.168.1.20", "172.17.0.2", "169.254.169.254", "100.100.0.1"} {
					if !slices.ContainsFunc(to.Block.Except, func(p netip.Prefix) bool { return p.Contains(netip.MustParseAddr(inside)) }) {
						t.Errorf("%s is open", inside)
					}
				}
			}
		}
		for _, p := range s.Ports {
			if world {
				open = append(open, fmt.Sprint(p.Protocol, " ", p.Port))
			}
		}
	}
	if want := []string{"UDP 7844", "TCP 7844", "TCP 443"}; !slices.Equal(open, want) {
		t.Errorf("towards the Internet there are %v, want %v", open, want)
	}
}

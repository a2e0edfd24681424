package main

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/edgeward/edgeward/bouncer"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"edgeward-bouncer": func() { os.Exit(program(os.Args[1:])) }})
}

// TestScripts runs the command line as an operator would. The verbs that need a
// kernel are proved in test/node, in a namespace.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata", Setup: func(env *testscript.Env) error {
		// A command that is built to find races sleeps for a second at its end.
		env.Setenv("GORACE", "atexit_sleep_ms=0")
		return nil
	}})
}

const (
	deployed   = "../../deploy/bouncer"
	kubernetes = "../../deploy/kubernetes/base"
)

// TestExamplesAreAccepted checks the configurations that are shipped as check
// does.
func TestExamplesAreAccepted(t *testing.T) {
	for _, name := range []string{deployed + "/bouncer.yaml", kubernetes + "/bouncer.yaml"} {
		c, err := bouncer.Load(name)
		if err != nil {
			t.Fatal(err)
		}
		if c.Mode != bouncer.Observe { // the first day
			t.Errorf("%s: mode %s", name, c.Mode)
		}
		var out bytes.Buffer
		if err := check(&out, name, &c, func(string) string { return "198.51.100.4 1 22" }); err != nil {
			t.Error(err)
		}
		if want := name + ": ok\nyou are connected from 198.51.100.4"; !strings.HasPrefix(out.String(), want) {
			t.Errorf("check says %q", out.String())
		}
	}
}

// TestManifestAsksForNoMore holds the DaemonSet and the unit to the privileges
// that the bouncer needs, and to the paths of its configuration.
func TestManifestAsksForNoMore(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(kubernetes, "daemonset.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var set struct {
		Spec struct {
			UpdateStrategy struct {
				RollingUpdate struct {
					MaxUnavailable int `yaml:"maxUnavailable"`
				} `yaml:"rollingUpdate"`
			} `yaml:"updateStrategy"`
			Template struct {
				Spec struct {
					HostNetwork bool             `yaml:"hostNetwork"`
					HostPID     bool             `yaml:"hostPID"`
					DNSPolicy   string           `yaml:"dnsPolicy"`
					Automount   *bool            `yaml:"automountServiceAccountToken"`
					Tolerations []map[string]any `yaml:"tolerations"`
					Volumes     []struct {
						Name string `yaml:"name"`
					} `yaml:"volumes"`
					Containers []struct {
						SecurityContext struct {
							Privileged               bool  `yaml:"privileged"`
							AllowPrivilegeEscalation *bool `yaml:"allowPrivilegeEscalation"`
							ReadOnlyRootFilesystem   bool  `yaml:"readOnlyRootFilesystem"`
							Capabilities             struct {
								Drop []string `yaml:"drop"`
								Add  []string `yaml:"add"`
							} `yaml:"capabilities"`
						} `yaml:"securityContext"`
						Resources struct {
							Requests map[string]string `yaml:"requests"`
							Limits   map[string]string `yaml:"limits"`
						} `yaml:"resources"`
						VolumeMounts []struct {
							Name      string `yaml:"name"`
							MountPath string `yaml:"mountPath"`
						} `yaml:"volumeMounts"`
					} `yaml:"containers"`
				} `yaml:"spec"`
			} `yaml:"template"`
		} `yaml:"spec"`
	}
	if err := yaml.Unmarshal(text, &set); err != nil {
		t.Fatal(err)
	}
	pod := set.Spec.Template.Spec
	if set.Spec.UpdateStrategy.RollingUpdate.MaxUnavailable != 1 || !pod.HostNetwork || pod.HostPID || pod.DNSPolicy != "ClusterFirstWithHostNet" ||
		pod.Automount == nil || *pod.Automount || len(pod.Tolerations) != 1 || pod.Tolerations[0]["operator"] != "Exists" || len(pod.Containers) != 1 {
		t.Errorf("the pod is %+v", pod)
	}
	container := pod.Containers[0]
	s := container.SecurityContext
	if s.Privileged || s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation || !s.ReadOnlyRootFilesystem ||
		!slices.Equal(s.Capabilities.Drop, []string{"ALL"}) || !slices.Equal(s.Capabilities.Add, []string{"NET_ADMIN"}) {
		t.Errorf("the container may %+v", s)
	}
	if container.Resources.Requests["memory"] == "" || container.Resources.Limits["memory"] == "" {
		t.Error("the container has no memory limit")
	}
	c, err := bouncer.Load(filepath.Join(kubernetes, "bouncer.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var mounted []string
	for _, m := range container.VolumeMounts {
		mounted = append(mounted, m.MountPath)
	}
	for _, path := range []string{filepath.Dir(string(c.LAPI.KeyFile)), filepath.Dir(c.Socket), c.StateDir, "/etc/edgeward"} {
		if !slices.Contains(mounted, path) {
			t.Errorf("nothing is mounted at %s, only at %v", path, mounted)
		}
	}

	unit, err := os.ReadFile(filepath.Join(deployed, "edgeward-bouncer.service"))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"Before=network-pre.target shutdown.target", "Wants=network-pre.target", "DefaultDependencies=no", "StartLimitIntervalSec=0",
		"SystemCallFilter=@system-service", "ProtectKernelTunables=yes", "RestrictSUIDSGID=yes", "UMask=0077", "LimitCORE=0", "CapabilityBoundingSet=CAP_NET_ADMIN", "NoNewPrivileges=yes", "ProtectSystem=strict", "StateDirectory=edgeward", "RuntimeDirectory=edgeward"} {
		if !strings.Contains(string(unit), "\n"+line+"\n") {
			t.Errorf("the unit does not say %s", line)
		}
	}
}

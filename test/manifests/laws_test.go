package manifests

import (
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// object is a Kubernetes object. at and its kin read parts of it; what is not there
// reads as nothing.
type object map[string]any

func (o object) at(keys ...string) object {
	for _, key := range keys {
		next, _ := o[key].(map[string]any)
		o = next
	}
	return o
}

func (o object) text(key string) string { s, _ := o[key].(string); return s }

func (o object) list(key string) []object {
	var all []object
	items, _ := o[key].([]any)
	for _, item := range items {
		if of, ok := item.(map[string]any); ok {
			all = append(all, of)
		}
	}
	return all
}

func (o object) words(key string) []string {
	var all []string
	items, _ := o[key].([]any)
	for _, item := range items {
		all = append(all, fmt.Sprint(item))
	}
	return all
}

func (o object) name() string {
	return fmt.Sprintf("%s %s/%s", o.text("kind"), o.at("metadata").text("namespace"), o.at("metadata").text("name"))
}

// pod is a workload's template.
type pod struct {
	of        object
	namespace string
	labels    object
	spec      object
}

func pods(objects []object) []pod {
	var all []pod
	for _, o := range objects {
		template := o.at("spec", "template")
		if o.text("kind") == "CronJob" {
			template = o.at("spec", "jobTemplate", "spec", "template")
		}
		if template != nil && template.at("spec") != nil {
			all = append(all, pod{o, o.at("metadata").text("namespace"), template.at("metadata", "labels"), template.at("spec")})
		}
	}
	return all
}

// selects tells whether all labels are the pod's.
func selects(labels object, p pod) bool {
	for key, value := range labels {
		if p.labels[key] != value {
			return false
		}
	}
	return true
}

var pinned = regexp.MustCompile(`^[a-z0-9./-]+(:v\d+\.\d+\.\d+|@sha256:[0-9a-f]{64})$`)

// breaches are the laws that objects break, which are applied together.
func breaches(objects []object) []string {
	var bad []string
	say := func(o object, format string, args ...any) {
		bad = append(bad, o.name()+": "+fmt.Sprintf(format, args...))
	}
	ours := map[string]string{} // namespaces, and their level of pod security
	for _, o := range objects {
		if o.text("kind") == "Namespace" {
			ours[o.at("metadata").text("name")] = o.at("metadata", "labels").text("pod-security.kubernetes.io/enforce")
		}
	}
	for name, level := range ours {
		if level != "restricted" && (level != "privileged" || name != "edgeward-node") {
			bad = append(bad, fmt.Sprintf("namespace %s has level %q of pod security", name, level))
		}
		denies := slices.ContainsFunc(objects, func(o object) bool {
			return o.text("kind") == "NetworkPolicy" && o.at("metadata").text("namespace") == name && len(o.at("spec", "podSelector")) == 0 &&
				slices.Equal(o.at("spec").words("policyTypes"), []string{"Ingress", "Egress"}) && o.at("spec")["ingress"] == nil && o.at("spec")["egress"] == nil
		})
		if !denies {
			bad = append(bad, fmt.Sprintf("namespace %s does not deny by default", name))
		}
	}
	all := pods(objects)
	for _, p := range all {
		for _, breach := range podBreaches(p, ours[p.namespace], objects) {
			say(p.of, "%s", breach)
		}
	}
	for _, o := range objects {
		namespace := o.at("metadata").text("namespace")
		if o.text("kind") == "Secret" {
			say(o, "a secret is referred to, not shipped")
		}
		// Names of other namespaces are others': the two of Traefik's own pods.
		if namespace != "" && ours[namespace] == "" && namespace != "kube-system" && namespace != "traefik" {
			say(o, "there is no such namespace")
		}
		switch o.text("kind") {
		case "NetworkPolicy", "PodDisruptionBudget":
			selector := o.at("spec", "podSelector")
			if o.text("kind") == "PodDisruptionBudget" {
				selector = o.at("spec", "selector")
			}
			var matched []pod
			for _, p := range all {
				if p.namespace == namespace && selects(selector.at("matchLabels"), p) {
					matched = append(matched, p)
				}
			}
			if len(selector) > 0 && len(matched) == 0 {
				say(o, "selects no pod")
			}
			for _, rule := range o.at("spec").list("ingress") {
				if len(rule.list("from")) == 0 {
					say(o, "lets everybody in")
				}
				for _, port := range rule.list("ports") {
					for _, p := range matched {
						if !hasPort(p, port["port"]) {
							say(o, "port %v is none of %s", port["port"], p.of.name())
						}
					}
				}
			}
			for _, rule := range o.at("spec").list("egress") {
				if len(rule.list("to")) == 0 || len(rule.list("ports")) == 0 {
					say(o, "lets pods go everywhere, or to every port")
				}
			}
		case "Service":
			for _, port := range o.at("spec").list("ports") {
				if ours[namespace] == "" {
					continue // Traefik's pods; TestServicesOfTraefik has them
				}
				if !slices.ContainsFunc(all, func(p pod) bool {
					return p.namespace == namespace && selects(o.at("spec", "selector"), p) && hasPort(p, port["targetPort"])
				}) {
					say(o, "no pod has its port %v", port["targetPort"])
				}
			}
		}
	}
	slices.Sort(bad)
	return bad
}

// hasPort tells whether a container declares a port, by number or by name.
func hasPort(p pod, port any) bool {
	for _, container := range p.spec.list("containers") {
		for _, has := range container.list("ports") {
			if fmt.Sprint(has["containerPort"]) == fmt.Sprint(port) || has["name"] == port {
				return true
			}
		}
	}
	return false
}

func podBreaches(p pod, level string, objects []object) []string {
	var bad []string
	say := func(format string, args ...any) { bad = append(bad, fmt.Sprintf(format, args...)) }
	if p.spec["automountServiceAccountToken"] != false {
		say("mounts a token of the API server")
	}
	if p.spec["hostPID"] != nil || p.spec["hostIPC"] != nil {
		say("sees the node's processes")
	}
	if p.spec.text("priorityClassName") == "" {
		say("has no priority")
	}
	if level == "restricted" && (p.spec["hostNetwork"] == true || p.spec.at("securityContext")["runAsNonRoot"] != true) {
		say("is on the node's network, or may be root")
	}
	for _, volume := range p.spec.list("volumes") {
		if level == "restricted" && volume["hostPath"] != nil {
			say("mounts %v of the node", volume["hostPath"])
		}
		if name := volume.at("configMap").text("name"); name != "" && !slices.ContainsFunc(objects, func(o object) bool {
			return o.name() == fmt.Sprintf("ConfigMap %s/%s", p.namespace, name)
		}) {
			say("there is no ConfigMap %s", name)
		}
	}
	for _, c := range append(p.spec.list("containers"), p.spec.list("initContainers")...) {
		if !pinned.MatchString(c.text("image")) {
			say("image %q is not pinned", c.text("image"))
		}
		// A limit of CPU would slow down who guards when it is busiest.
		requests, limits := c.at("resources", "requests"), c.at("resources", "limits")
		if requests["cpu"] == nil || requests["memory"] == nil || limits["memory"] == nil {
			say("container %s lacks requests or a limit of memory", c.text("name"))
		}
		s := c.at("securityContext")
		if s["privileged"] != nil || s["allowPrivilegeEscalation"] != false || s["readOnlyRootFilesystem"] != true {
			say("container %s may more than it needs", c.text("name"))
		}
		if s.at("seccompProfile").text("type") != "RuntimeDefault" && p.spec.at("securityContext", "seccompProfile").text("type") != "RuntimeDefault" {
			say("container %s has no seccomp profile", c.text("name"))
		}
		added := s.at("capabilities").words("add")
		if !slices.Equal(s.at("capabilities").words("drop"), []string{"ALL"}) || len(added) > 0 && (level == "restricted" || !slices.Equal(added, []string{"NET_ADMIN"})) {
			say("container %s keeps capabilities %v", c.text("name"), added)
		}
		if c["livenessProbe"] == nil || c["readinessProbe"] == nil {
			say("container %s lacks a probe", c.text("name"))
		}
		for _, mount := range c.list("volumeMounts") {
			if !slices.ContainsFunc(p.spec.list("volumes"), func(v object) bool { return v["name"] == mount["name"] }) {
				say("there is no volume %s", mount.text("name"))
			}
			if !path.IsAbs(mount.text("mountPath")) {
				say("%s is mounted at %q", mount.text("name"), mount.text("mountPath"))
			}
		}
	}
	return bad
}

func TestLawsHold(t *testing.T) {
	for name, r := range all(t) {
		for _, breach := range breaches(r.Objects) {
			t.Errorf("%s: %s", name, breach)
		}
	}
}

// TestLawsBite breaks what holds, one thing at a time.
func TestLawsBite(t *testing.T) {
	find := func(objects []object, kind, name string) object {
		for _, o := range objects {
			if o.text("kind") == kind && o.at("metadata").text("name") == name {
				return o
			}
		}
		t.Fatalf("there is no %s %s", kind, name)
		return nil
	}
	container := func(objects []object) object {
		return find(objects, "Deployment", "edgeward-tunnel").at("spec", "template", "spec").list("containers")[0]
	}
	spec := func(objects []object) object {
		return find(objects, "Deployment", "edgeward-tunnel").at("spec", "template", "spec")
	}
	for want, breach := range map[string]func([]object){
		"a token":            func(os []object) { delete(spec(os), "automountServiceAccountToken") },
		"the node's network": func(os []object) { spec(os)["hostNetwork"] = true },
		"has no priority":    func(os []object) { delete(spec(os), "priorityClassName") },
		"no ConfigMap":       func(os []object) { find(os, "ConfigMap", "edgeward-tunnel").at("metadata")["name"] = "x" },
		"is not pinned":      func(os []object) { container(os)["image"] = "ghcr.io/edgeward/edgeward-tunnel:latest" },
		"a limit of memory":  func(os []object) { delete(container(os).at("resources", "limits"), "memory") },
		"may more":           func(os []object) { container(os).at("securityContext")["privileged"] = true },
		"keeps capabilities": func(os []object) { container(os).at("securityContext", "capabilities")["add"] = []any{"NET_ADMIN"} },
		"no seccomp":         func(os []object) { delete(spec(os).at("securityContext"), "seccompProfile") },
		"lacks a probe":      func(os []object) { delete(container(os), "livenessProbe") },
		"is none of":         func(os []object) { container(os).list("ports")[0]["name"] = "other" },
		"selects no pod": func(os []object) {
			find(os, "PodDisruptionBudget", "edgeward-tunnel").at("spec", "selector", "matchLabels")["x"] = "y"
		},
		"does not deny by default": func(os []object) {
			find(os, "NetworkPolicy", "default-deny").at("spec")["policyTypes"] = []any{"Ingress"}
		},
		"level \"\" of pod security": func(os []object) { delete(find(os, "Namespace", "edgeward").at("metadata"), "labels") },
		"go everywhere": func(os []object) {
			delete(find(os, "NetworkPolicy", "edgeward-tunnel").at("spec").list("egress")[0], "to")
		},
		"no volume": func(os []object) { container(os).list("volumeMounts")[0]["name"] = "x" },
	} {
		var objects []object
		for _, o := range all(t)["overlays/k3s-gitops"].Objects {
			objects = append(objects, deepCopy(map[string]any(o)).(map[string]any))
		}
		breach(objects)
		if got := breaches(objects); len(got) == 0 || !strings.Contains(strings.Join(got, "\n"), want) {
			t.Errorf("%q: the breaches are %q", want, got)
		}
	}
}

func deepCopy(value any) any {
	switch value := value.(type) {
	case map[string]any:
		made := maps.Clone(value)
		for key := range made {
			made[key] = deepCopy(made[key])
		}
		return made
	case []any:
		made := slices.Clone(value)
		for i := range made {
			made[i] = deepCopy(made[i])
		}
		return made
	default:
		return value
	}
}

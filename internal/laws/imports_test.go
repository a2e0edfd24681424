package laws

import (
	"fmt"
	"path"
	"slices"
	"strings"
)

// edges are the enforcement points. They share the core, not each other.
var edges = []string{"plugin", "bouncer", "tunnel"}

// interpreted are the packages that Traefik loads as source, and what each may
// import beside the standard library.
var interpreted = map[string][]string{
	"plugin":            {"golang.org/x/time/rate", module + "/internal/decision", module + "/internal/lapi"},
	"internal/decision": nil,
	"internal/lapi":     nil,
}

// gates are the modules that one package alone may import, so that the rest of
// the code meets our words and not theirs. Where the map of the repository
// names that package, home does. What stands for the other side in tests, or
// measures ours against the original, speaks the same language and is beside it.
var gates = []struct {
	modules []string
	home    string
	beside  []string
}{
	{[]string{"github.com/google/nftables"}, "internal/nft", nil},
	{[]string{"github.com/crowdsecurity/go-cs-bouncer"}, "internal/crowdsec", nil},
	{[]string{"github.com/cloudflare/cloudflared"}, "tunnel/cloudflare", []string{"test/cfedge", "test/benchmark/tunnel"}},
	{[]string{"golang.zx2c4.com/wireguard"}, "tunnel/wireguard/device", []string{"test/benchmark/vpn"}}, // wgctrl too
	{[]string{"github.com/vishvananda/netlink"}, "internal/netns", []string{"tunnel/wireguard/device"}},
	{[]string{"k8s.io/client-go", "sigs.k8s.io/controller-runtime"}, "", nil},
}

func judgeImports(t tree) []violation {
	files, bad := goFiles(t)
	for _, f := range files {
		from := top(f.dir)
		for _, imp := range f.imports() {
			target, ours := strings.CutPrefix(imp.path, module+"/")
			if !ours {
				continue
			}
			to := top(target)
			switch {
			case to == "cmd":
				bad = append(bad, f.at(imp.pos, "imports a command, %s", target))
			case to == "test" && from != "test" && !f.test:
				bad = append(bad, f.at(imp.pos, "imports the test bench, %s", target))
			case from == "internal" && slices.Contains(edges, to):
				bad = append(bad, f.at(imp.pos, "the core imports an edge, %s", target))
			case slices.Contains(edges, from) && slices.Contains(edges, to) && from != to:
				bad = append(bad, f.at(imp.pos, "an edge imports another, %s", target))
			}
		}
	}
	return bad
}

func judgeInterpretedImports(t tree) []violation {
	files, bad := goFiles(t)
	for _, f := range files {
		allowed, ok := interpreted[f.dir]
		if !ok {
			// A package below would be interpreted with its parent.
			for dir := range interpreted {
				if under(f.dir, dir) {
					bad = append(bad, f.at(f.syntax.Package, "a package below %s: it is not part of what Traefik loads", dir))
				}
			}
			continue
		}
		if f.test && !t.isInterpreted(f) {
			continue
		}
		for _, imp := range f.imports() {
			if standard(imp.path) || slices.Contains(allowed, imp.path) {
				continue
			}
			bad = append(bad, f.at(imp.pos, "%s may not import %s", f.dir, imp.path))
		}
	}
	return bad
}

// standard says whether an import path is the standard library's: the first
// element of any other has a dot.
func standard(p string) bool { return !strings.Contains(top(p), ".") }

func judgeGates(t tree) []violation {
	files, bad := goFiles(t)
	for _, gate := range gates {
		holder := gate.home
		for _, f := range files {
			if f.test {
				continue // a test may ask the foreign interface what came of it
			}
			for _, imp := range f.imports() {
				if !slices.ContainsFunc(gate.modules, func(m string) bool { return under(imp.path, m) }) {
					continue
				}
				if holder == "" {
					holder = f.dir
				}
				if f.dir != holder && !slices.Contains(gate.beside, f.dir) {
					bad = append(bad, f.at(imp.pos, "imports %s, which belongs to %s", imp.path, holder))
				}
			}
		}
	}
	return bad
}

// lean are the programs that have no use for a connector: the agent that runs on
// every node, and the operators' command line.
var lean = []string{"cmd/edgeward-bouncer", "cmd/edgeward"}

// judgeLinks keeps cloudflared, most of the weight of all dependencies, out of
// the lean programs.
func judgeLinks(t tree) []violation {
	const client = "github.com/cloudflare/cloudflared"
	files, bad := goFiles(t)
	imports := map[string][]string{} // by package directory, without tests
	for _, f := range files {
		if f.test {
			continue
		}
		for _, imp := range f.imports() {
			imports[f.dir] = append(imports[f.dir], strings.TrimPrefix(imp.path, module+"/"))
		}
	}
	seen := map[string]bool{}
	var links func(string) bool
	links = func(p string) bool {
		if under(p, client) {
			return true
		}
		if done, ok := seen[p]; ok {
			return done
		}
		seen[p] = false
		seen[p] = slices.ContainsFunc(imports[p], links)
		return seen[p]
	}
	for _, f := range files {
		if !slices.Contains(lean, f.dir) || f.test {
			continue
		}
		for _, imp := range f.imports() {
			if links(strings.TrimPrefix(imp.path, module+"/")) {
				bad = append(bad, f.at(imp.pos, "links cloudflared through %s", imp.path))
			}
		}
	}
	return bad
}

// replacements are the only replace lines that the root module may have: what
// cloudflared needs to build.
var replacements = []string{
	"github.com/quic-go/quic-go => github.com/quic-go/quic-go v0.49.1",
}

// refused are the modules that the root may not require, not even indirectly:
// Traefik's plugin catalog turns such a plugin away. The tests have them in
// modules of their own.
var refused = []string{"github.com/traefik/traefik", "github.com/traefik/yaegi"}

func judgeGoMod(t tree) []violation {
	var bad []violation
	block := ""
	for i, line := range strings.Split(t["go.mod"], "\n") {
		line, _, _ = strings.Cut(line, "//")
		line = strings.TrimSpace(line)
		verb, rest, _ := strings.Cut(line, " ")
		switch {
		case line == "":
			continue
		case rest == "(":
			block = verb
			continue
		case line == ")":
			block = ""
			continue
		case block != "":
			verb, rest = block, line
		}
		at := func(format string, args ...any) {
			bad = append(bad, violation{"go.mod", i + 1, fmt.Sprintf(format, args...)})
		}
		switch verb {
		case "require":
			for _, m := range refused {
				if under(modulePath(rest), m) {
					at("requires %s, which belongs in a module under test/", rest)
				}
			}
		case "replace":
			if !slices.Contains(replacements, rest) {
				at("replaces what need not be replaced: %s", rest)
			}
		case "tool":
			at("names a tool, %s: tools are pinned in modules under test/", rest)
		}
	}
	for _, p := range t.paths() {
		switch {
		case top(p) == "vendor":
			bad = append(bad, violation{p, 1, "the root has no vendor directory: make bundle assembles one"})
		case path.Base(p) == "go.work":
			bad = append(bad, violation{p, 1, "a workspace would mix the modules that are kept apart"})
		}
	}
	return bad
}

// modulePath is the module path of a require line.
func modulePath(line string) string {
	p, _, _ := strings.Cut(line, " ")
	return p
}

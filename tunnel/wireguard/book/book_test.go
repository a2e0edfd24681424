package book

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/edgeward/edgeward/tunnel"
	"github.com/edgeward/edgeward/tunnel/wireguard"
)

// key is a public key of its own for every number.
func key(n int) wireguard.PublicKey {
	var k wireguard.PublicKey
	k[0], k[1], k[31] = byte(n), byte(n>>8), 1
	return k
}

var carol = wireguard.Peer{
	Name: "carol", PublicKey: key(9), PresharedKeyFile: "/etc/edgeward/peers/carol.psk",
	Addresses: []netip.Addr{netip.MustParseAddr("10.66.0.9"), netip.MustParseAddr("fd66::9")},
	Groups:    []wireguard.Name{"family", "007"}, Enabled: true,
	Expires: wireguard.Expiry{Time: time.Date(2027, 1, 31, 18, 0, 0, 0, time.UTC)},
}

const carolInLines = `  - name: carol
    publicKey: CQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=
    presharedKeyFile: /etc/edgeward/peers/carol.psk
    addresses: [10.66.0.9, "fd66::9"]
    groups: [family, "007"]
    expires: "2027-01-31T18:00:00Z"
`

// page says everything twice, in blocks and in braces.
const written1 = `# The door of the house.
wireguard:
  addresses: [10.66.0.1/24, "fd66::1/64"]   # ours

peers:   # people, then things
  # Alice got a new phone in May.
  - name: alice
    publicKey: AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=  # from her app
    groups:
      - family   # of course
    # nothing else

  - {name: "bob", publicKey: 'AgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=', enabled: false} # away
  - publicKey: AwAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=
    nextPublicKey: BAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=   # staged
    name: tv
    nextPresharedKeyFile: /etc/edgeward/peers/tv.next.psk
    presharedKeyFile: /etc/edgeward/peers/tv.psk
  # no more peers

# What they reach.
services:
- name: grafana
  addresses: [10.43.0.7]
  ports: [443/tcp]
grants:
- to: [group:family, peer:alice, "peer:tv"]
  services: [grafana]
- to:
  - peer:alice   # for a week
  services: [grafana]
- {to: [peer:alice], services: [grafana]}
- {to: [peer:tv, peer:alice], services: [grafana]}   # the end`

// replaced is a text with pieces of it replaced, each of which it must hold once.
func replaced(t *testing.T, text string, pairs ...string) string {
	t.Helper()
	for i := 0; i < len(pairs); i += 2 {
		if strings.Count(text, pairs[i]) != 1 {
			t.Fatalf("%q is %d times in the text", pairs[i], strings.Count(text, pairs[i]))
		}
		text = strings.Replace(text, pairs[i], pairs[i+1], 1)
	}
	return text
}

func TestEditsTouchNothingElse(t *testing.T) {
	const (
		aliceKey = "publicKey: AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE="
		nine     = "CQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE="
		four     = "BAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE="
	)
	for _, c := range []struct {
		name string
		edit func(text []byte) ([]byte, error)
		want []string // pairs of what is replaced
	}{
		{"add", func(text []byte) ([]byte, error) { return Add(text, carol) },
			[]string{"  # no more peers\n", "  # no more peers\n" + carolInLines}},
		{"disable in a block", func(text []byte) ([]byte, error) { return SetEnabled(text, "alice", false) },
			[]string{"      - family   # of course\n", "      - family   # of course\n    enabled: false\n"}},
		{"disable in braces again", func(text []byte) ([]byte, error) { return SetEnabled(text, "bob", false) }, nil},
		{"enable in braces", func(text []byte) ([]byte, error) { return SetEnabled(text, "bob", true) },
			[]string{", enabled: false}", "}"}},
		{"enable what is", func(text []byte) ([]byte, error) { return SetEnabled(text, "alice", true) }, nil},
		{"stage", func(text []byte) ([]byte, error) {
			return SetNext(text, "alice", key(9), "/etc/edgeward/peers/alice.next.psk")
		},
			[]string{"      - family   # of course\n", "      - family   # of course\n    nextPublicKey: " + nine + "\n    nextPresharedKeyFile: /etc/edgeward/peers/alice.next.psk\n"}},
		{"stage in braces", func(text []byte) ([]byte, error) { return SetNext(text, "bob", key(9), "") },
			[]string{"enabled: false}", "enabled: false, nextPublicKey: " + nine + "}"}},
		{"stage another", func(text []byte) ([]byte, error) { return SetNext(text, "tv", key(9), "") },
			[]string{"BAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=   # staged", nine + "   # staged", "    nextPresharedKeyFile: /etc/edgeward/peers/tv.next.psk\n", ""}},
		{"cancel", func(text []byte) ([]byte, error) { return SetNext(text, "tv", wireguard.PublicKey{}, "") },
			[]string{"    nextPublicKey: BAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=   # staged\n", "", "    nextPresharedKeyFile: /etc/edgeward/peers/tv.next.psk\n", ""}},
		{"finish", func(text []byte) ([]byte, error) { return Finish(text, "tv") },
			[]string{
				"publicKey: AwAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=", "publicKey: " + four,
				"    nextPublicKey: BAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=   # staged\n", "",
				"    nextPresharedKeyFile: /etc/edgeward/peers/tv.next.psk\n", "",
				"presharedKeyFile: /etc/edgeward/peers/tv.psk", "presharedKeyFile: /etc/edgeward/peers/tv.next.psk",
			}},
		{"remove the first", func(text []byte) ([]byte, error) { return Remove(text, "alice") },
			[]string{
				"  - name: alice\n    " + aliceKey + "  # from her app\n    groups:\n      - family   # of course\n", "",
				"[group:family, peer:alice, \"peer:tv\"]", "[group:family, \"peer:tv\"]",
				"- to:\n  - peer:alice   # for a week\n  services: [grafana]\n", "",
				"- {to: [peer:alice], services: [grafana]}\n", "",
				"[peer:tv, peer:alice]", "[peer:tv]",
			}},
		{"remove in braces", func(text []byte) ([]byte, error) { return Remove(text, "bob") },
			[]string{"  - {name: \"bob\", publicKey: 'AgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=', enabled: false} # away\n", ""}},
		{"remove the last", func(text []byte) ([]byte, error) { return Remove(text, "tv") },
			[]string{
				"  - publicKey: AwAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=\n    nextPublicKey: BAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=   # staged\n    name: tv\n    nextPresharedKeyFile: /etc/edgeward/peers/tv.next.psk\n    presharedKeyFile: /etc/edgeward/peers/tv.psk\n", "",
				", \"peer:tv\"]", "]",
				"[peer:tv, peer:alice]", "[peer:alice]",
			}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, eol := range []string{"\n", "\r\n"} {
				on := func(text string) string { return strings.ReplaceAll(text, "\n", eol) }
				got, err := c.edit([]byte(on(written1)))
				if err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff(on(replaced(t, written1, c.want...)), string(got)); d != "" {
					t.Error(d)
				}
				if _, err := tunnel.Parse("tunnel.yaml", got); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func TestAdd(t *testing.T) {
	const wg = "wireguard: {addresses: [10.66.0.1/24, 'fd66::1/64']}"
	dave := wireguard.Peer{Name: "dave", PublicKey: key(8), Keepalive: 10 * time.Second, FullTunnel: true, DNS: []netip.Addr{}, AllowedIPs: []netip.Prefix{netip.MustParsePrefix("192.168.7.0/24")}}
	const daveInBraces = `{name: dave, publicKey: CAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=, enabled: false, dns: [], keepalive: 10s, fullTunnel: true, allowedIPs: [192.168.7.0/24]}`
	for _, c := range []struct{ name, text, want string }{
		{"no peers", wg + "\n", wg + "\n\npeers:\n" + carolInLines},
		{"no end of line", wg, wg + "\n\npeers:\n" + carolInLines},
		{"nothing under the key", wg + "\npeers:   # none yet\nservices: []\n", wg + "\npeers:   # none yet\n" + carolInLines + "services: []\n"},
		{"an empty list", wg + "\npeers: [] # none yet\nservices: []\n", wg + "\npeers: # none yet\n" + carolInLines + "services: []\n"},
		{"a list that is not indented", wg + "\npeers:\n- name: a\n  publicKey: " + key(1).String() + "\n# next\nservices: []\n",
			wg + "\npeers:\n- name: a\n  publicKey: " + key(1).String() + "\n" + strings.ReplaceAll(carolInLines[2:], "\n  ", "\n") + "# next\nservices: []\n"},
		{"the end of the file", wg + "\npeers:\n    -   name: a\n        publicKey: " + key(1).String(),
			wg + "\npeers:\n    -   name: a\n        publicKey: " + key(1).String() + "\n  " + strings.TrimSuffix(strings.ReplaceAll(carolInLines, "\n", "\n  "), "  ")},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := Add([]byte(c.text), carol)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(c.want, string(got)); d != "" {
				t.Error(d)
			}
		})
	}
	for _, c := range []struct{ name, text, want string }{
		{"below braces", wg + "\npeers:\n  - {name: a, publicKey: " + key(1).String() + "}\n", wg + "\npeers:\n  - {name: a, publicKey: " + key(1).String() + "}\n  - " + daveInBraces + "\n"},
		{"in brackets", wg + "\npeers: [{name: a, publicKey: " + key(1).String() + "}] # one\n", wg + "\npeers: [{name: a, publicKey: " + key(1).String() + "}, " + daveInBraces + "] # one\n"},
		{"in brackets on lines", wg + "\npeers: [\n  {name: a, publicKey: " + key(1).String() + "},\n]\n", wg + "\npeers: [\n  {name: a, publicKey: " + key(1).String() + "}, " + daveInBraces + "\n]\n"},
		{"JSON", `{"wireguard": {"addresses": ["10.66.0.1/24"]}, "peers": [{"name": "a", "publicKey": "` + key(1).String() + `"}]}`, `{"wireguard": {"addresses": ["10.66.0.1/24"]}, "peers": [{"name": "a", "publicKey": "` + key(1).String() + `"}, ` + daveInBraces + `]}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := Add([]byte(c.text), dave)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(c.want, string(got)); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	with := func(peers string) string { return "wireguard: {addresses: [10.66.0.1/24]}\npeers:\n" + peers }
	one := with("  - name: a\n    publicKey: " + key(1).String() + "\n")
	for _, c := range []struct {
		name, text string
		edit       func([]byte) ([]byte, error)
		want       string
	}{
		{"a peer that is not there", one, func(b []byte) ([]byte, error) { return Remove(b, "b") }, "remove b: there is no peer b in the file"},
		{"no peers", "wireguard: {}\n", func(b []byte) ([]byte, error) { return SetEnabled(b, "b", true) }, "enable b: there is no peer b in the file"},
		{"an empty file", "", func(b []byte) ([]byte, error) { return SetEnabled(b, "b", false) }, "disable b: there is no peer b in the file"},
		{"nothing staged", one, func(b []byte) ([]byte, error) { return Finish(b, "a") }, "finish the rotation of a: there is no staged key"},
		{"not YAML", "peers: [\n", func(b []byte) ([]byte, error) { return Remove(b, "a") }, "remove a: read YAML: "},
		{"an anchor", with("  - &x {name: a}\n"), func(b []byte) ([]byte, error) { return Remove(b, "a") }, "edit it by hand"},
		{"two documents", one + "---\npeers: []\n", func(b []byte) ([]byte, error) { return Remove(b, "a") }, "edit it by hand"},
		{"a value on lines", with("  - name: a\n    enabled: |\n      true\n"), func(b []byte) ([]byte, error) { return SetEnabled(b, "a", false) }, "edit it by hand"},
		{"braces without peers", "{wireguard: {}}\n", func(b []byte) ([]byte, error) { return Add(b, carol) }, "edit it by hand"},
		{"a comment before the bracket", "peers: [{name: a} # one\n]\n", func(b []byte) ([]byte, error) { return Add(b, carol) }, "edit it by hand"},
		{"a list of lists", "peers:\n  - - name: a\n", func(b []byte) ([]byte, error) { return Remove(b, "a") }, "edit it by hand"},
	} {
		got, err := c.edit([]byte(c.text))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: have %v, want %s\n%s", c.name, err, c.want, got)
		}
	}
}

// FuzzEdits holds that an edit of any configuration changes what it should, and
// nothing else, or is refused.
func FuzzEdits(f *testing.F) {
	f.Add(written1)
	f.Add("wireguard: {addresses: [10.66.0.1/24]}\npeers: [{name: a, publicKey: " + key(1).String() + ", enabled: true}, {publicKey: " + key(2).String() + ",\n name: b}]\ngrants: [{to: [peer:b, peer:a, peer:b], services: [s]}]\nservices: [{name: s, addresses: [10.43.0.1], ports: [80/tcp]}]\n")
	f.Add("# ü\r\nwireguard:\r\n  addresses:\r\n  - 10.66.0.1/24 # ö\r\npeers:\r\n-\r\n  name: a\r\n  publicKey: \"" + key(1).String() + "\"\r\n  presharedKeyFile: /ä # ä\r\n")
	f.Add("{wireguard: {addresses: ['fd66::1/64']}, peers: []}")
	f.Add("wireguard:\n  addresses: [10.66.0.1/24]\npeers:\n  - ? name\n    : a\n    publicKey: >-\n      " + key(1).String() + "\n# end\n")
	f.Fuzz(func(t *testing.T, text string) { judge(t, text) })
}

// judge makes every edit of a configuration, parses what comes of it, and returns
// those that were refused.
func judge(t *testing.T, text string) (refused []error) {
	options := cmp.Options{
		cmpopts.EquateEmpty(), cmpopts.IgnoreUnexported(tunnel.Config{}),
		cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
		cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
	}
	was, err := tunnel.Parse("f", []byte(text))
	if err != nil || !was.HasVPN() {
		return []error{err}
	}
	compare := func(edited []byte, err error, change func(c *tunnel.Config)) {
		t.Helper()
		if err != nil {
			refused = append(refused, err)
			return
		}
		now, err := tunnel.Parse("f", edited)
		if err != nil && (strings.Contains(err.Error(), "carol") || strings.Contains(err.Error(), "is the key of")) {
			return // it was there before
		}
		if err != nil {
			t.Fatalf("%v\n%s", err, edited)
		}
		want, _ := tunnel.Parse("f", []byte(text))
		change(&want)
		if d := cmp.Diff(want, now, options); d != "" {
			t.Fatalf("%s\n%s", d, edited)
		}
	}
	added := carol
	added.Addresses = nil // the networks are any
	edited, err := Add([]byte(text), added)
	compare(edited, err, func(c *tunnel.Config) {
		added.Keepalive = c.WireGuard.Keepalive
		c.Peers = append(c.Peers, added)
	})
	for i, p := range was.Peers {
		edited, err := SetEnabled([]byte(text), p.Name, !p.Enabled)
		compare(edited, err, func(c *tunnel.Config) { c.Peers[i].Enabled = !p.Enabled })
		edited, err = SetNext([]byte(text), p.Name, key(1234), "/next")
		compare(edited, err, func(c *tunnel.Config) {
			c.Peers[i].NextPublicKey, c.Peers[i].NextPresharedKeyFile = key(1234), "/next"
		})
		if err == nil {
			finished, err := Finish(edited, p.Name)
			compare(finished, err, func(c *tunnel.Config) {
				c.Peers[i].PublicKey, c.Peers[i].PresharedKeyFile = key(1234), "/next"
				c.Peers[i].NextPublicKey, c.Peers[i].NextPresharedKeyFile = wireguard.PublicKey{}, ""
			})
			cancelled, err := SetNext(edited, p.Name, wireguard.PublicKey{}, "")
			compare(cancelled, err, func(c *tunnel.Config) {
				c.Peers[i].NextPublicKey, c.Peers[i].NextPresharedKeyFile = wireguard.PublicKey{}, ""
			})
		}
		edited, err = Remove([]byte(text), p.Name)
		compare(edited, err, func(c *tunnel.Config) {
			c.Peers = slices.Delete(c.Peers, i, i+1)
			c.Grants = slices.DeleteFunc(c.Grants, func(g wireguard.Grant) bool {
				return len(g.To) > 0 && !slices.ContainsFunc(g.To, func(s wireguard.Subject) bool { return s.Group || s.Name != p.Name })
			})
			for g := range c.Grants {
				c.Grants[g].To = slices.DeleteFunc(c.Grants[g].To, func(s wireguard.Subject) bool { return !s.Group && s.Name == p.Name })
			}
		})
	}
	return refused
}

// TestEditsOfManyStyles writes configurations in the styles that people use, and
// holds that no edit of them is refused.
func TestEditsOfManyStyles(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 12 {
		text := styled(r)
		added, err := Add([]byte(text), carol)
		if err != nil {
			t.Fatal(err)
		}
		same := 0 // what stands before and after the one place where carol is
		for same < len(text) && text[same] == added[same] {
			same++
		}
		if !strings.HasSuffix(string(added), text[same:]) {
			t.Fatalf("more changed than was added:\n%s\n%s", text, added)
		}
		if refused := judge(t, text); refused != nil {
			t.Fatalf("refused: %v\n%s", errors.Join(refused...), text)
		}
	}
}

// styled is a configuration in some style.
func styled(r *rand.Rand) string {
	maybe := func(yes string) string {
		if r.IntN(3) == 0 {
			return yes
		}
		return ""
	}
	quoted := func(text string) string { return []string{text, `"` + text + `"`, "'" + text + "'"}[r.IntN(3)] }
	var b strings.Builder
	eol := []string{"\n", "\r\n"}[r.IntN(2)]
	line := func(indent int, text string) {
		b.WriteString(maybe(eol))
		b.WriteString(maybe(strings.Repeat(" ", r.IntN(6)) + "# käse: [a, {b" + eol))
		b.WriteString(strings.Repeat(" ", indent) + text + maybe("   # über "+quoted("all")) + eol)
	}
	sections := []func(){
		func() {
			line(0, "wireguard: {addresses: [10.66.0.1/24, 'fd66::1/64'], endpoint: vpn.example.com:51830}")
		},
		func() {
			dash := r.IntN(4)
			line(0, "peers:")
			for i := range 3 {
				name, key := fmt.Sprintf("p%d", i), key(i).String()
				fields := []string{"name: " + quoted(name), "publicKey: " + quoted(key)}
				for _, more := range []string{maybe("enabled: true"), maybe("enabled: false"), maybe("presharedKeyFile: " + quoted("/keys/"+name)), maybe("groups: [family]"), maybe("keepalive: 10s")} {
					if more != "" && !strings.Contains(strings.Join(fields, " "), "enabled") || more != "" && !strings.HasPrefix(more, "enabled") {
						fields = append(fields, more)
					}
				}
				r.Shuffle(len(fields), func(i, j int) { fields[i], fields[j] = fields[j], fields[i] })
				if r.IntN(3) == 0 {
					line(dash, "- {"+strings.Join(fields, ", ")+maybe(" ")+"}")
					continue
				}
				indent := dash + 2 + r.IntN(2)
				for j, f := range fields {
					if j == 0 {
						line(dash, "-"+strings.Repeat(" ", indent-dash-1)+f)
					} else {
						line(indent, f)
					}
				}
				if r.IntN(2) == 0 {
					line(indent, "expires: 2027-01-31T18:00:00Z")
				} else if !strings.Contains(strings.Join(fields, " "), "groups") {
					line(indent, "groups:")
					line(indent+r.IntN(3), "- guests")
				}
			}
		},
		func() { line(0, "services: [{name: s, addresses: [10.43.0.1], ports: [80/tcp]}]") },
		func() {
			line(0, "grants:")
			for range 2 {
				var to []string
				for i := range 1 + r.IntN(3) {
					to = append(to, fmt.Sprintf("peer:p%d", i))
				}
				to = append(to, maybe("group:family"))
				r.Shuffle(len(to), func(i, j int) { to[i], to[j] = to[j], to[i] })
				to = slices.DeleteFunc(to, func(s string) bool { return s == "" })
				switch r.IntN(3) {
				case 0:
					line(2, "- {to: ["+strings.Join(to, ", ")+"], services: [s]}")
				case 1:
					line(2, "- services: [s]")
					line(4, "to: ["+quoted(to[0])+strings.Join(append([]string{""}, to[1:]...), ",")+"]")
				case 2:
					line(2, "- to:")
					dash := 4 + 2*r.IntN(2)
					for _, s := range to {
						line(dash, "- "+quoted(s))
					}
					line(4, "services: [s]")
				}
			}
		},
	}
	r.Shuffle(len(sections), func(i, j int) { sections[i], sections[j] = sections[j], sections[i] })
	for _, section := range sections {
		section()
	}
	return strings.TrimSuffix(b.String(), maybe(eol))
}

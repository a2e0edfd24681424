package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// settings has a field of every kind that can be decoded.
type settings struct {
	Mode     mode               `yaml:"mode"`
	LAPI     source             `yaml:"lapi"`
	Listen   netip.AddrPort     `yaml:"listen"`
	Allow    []netip.Prefix     `yaml:"allow"`
	Resolver netip.Addr         `yaml:"resolver"`
	Ports    []Port             `yaml:"ports"`
	Labels   map[string]string  `yaml:"labels"`
	Services map[string]service `yaml:"services"`
	Hooks    []hook             `yaml:"hooks"`
	Limit    *limit             `yaml:"limit"`
	Name     string             `yaml:"name"`
	Ratio    float64            `yaml:"ratio"`
	Mark     uint32             `yaml:"mark"`
	Log      bool               `yaml:"log"`
	Derived  string             `yaml:"-"`
}

type source struct {
	URL      string        `yaml:"url"`
	KeyFile  File          `yaml:"keyFile"`
	Interval time.Duration `yaml:"interval"`
	Timeout  time.Duration `yaml:"timeout"`
}

type service struct {
	Port Port `yaml:"port"`
}

type hook struct {
	Name     string `yaml:"name"`
	Priority int8   `yaml:"priority"`
}

type limit struct {
	Burst int `yaml:"burst"`
	Rate  int `yaml:"rate"`
}

type mode string

func (m *mode) UnmarshalText(text []byte) error {
	switch mode(text) {
	case "enforce", "observe":
		*m = mode(text)
		return nil
	}
	return fmt.Errorf("%q: want enforce or observe", text)
}

func defaults() settings {
	return settings{
		Mode:    "enforce",
		LAPI:    source{Interval: 10 * time.Second, Timeout: 5 * time.Second},
		Allow:   []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")},
		Limit:   &limit{Burst: 5, Rate: 1},
		Derived: "kept",
	}
}

func check(s *settings, c *Check) {
	if s.LAPI.URL == "" {
		c.Fail("lapi.url", "is missing: give LAPI's address")
	}
	for i, h := range s.Hooks {
		if h.Name == "" {
			c.Fail(fmt.Sprintf("hooks[%d].name", i), "is missing")
		}
	}
	if s.Log && !c.Has("limit") {
		c.Fail("log", "needs a limit")
	}
}

var comparable = cmp.Options{
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
	cmp.Comparer(func(a, b Secret) bool { return a == b }),
}

func TestParse(t *testing.T) {
	const url = "lapi: {url: x}\n"
	with := func(change func(*settings)) settings {
		s := defaults()
		s.LAPI.URL = "x"
		change(&s)
		return s
	}
	for _, c := range []struct {
		name, text string
		want       settings
	}{
		{"the least", url, with(func(*settings) {})},
		{"nothing given keeps the default", url + "allow:\nmode: ~\nlimit: null\n", with(func(*settings) {})},
		{"a section keeps its other defaults", "lapi:\n  url: x\n  interval: 1m30s\n", with(func(s *settings) { s.LAPI.Interval = 90 * time.Second })},
		{"a list replaces the default", url + "allow: []\n", with(func(s *settings) { s.Allow = []netip.Prefix{} })},
		{"colons in a list in braces", "{lapi: {url: x}, allow: [2001:db8::/32, 2001:db9::1]}", with(func(s *settings) {
			s.Allow = []netip.Prefix{netip.MustParsePrefix("2001:db8::/32"), netip.MustParsePrefix("2001:db9::1/128")}
		})},
		{"every kind", `# settings
lapi:
  url: "x" # comment
  keyFile: /etc/edgeward//lapi-key
mode: observe
listen: 127.0.0.1:9100
allow:
  - 192.168.7.9/16
  - 2001:DB8::1
  - ::ffff:198.51.100.0/120
resolver: ::ffff:192.0.2.53
ports: [22, "443"]
labels: {node: pi-1, rack: 7, 8: eight, "on": true}
services:
  web: {port: 80}
  empty:
hooks:
  - name: prerouting
    priority: -100
  - {name: "output", priority: +5}
limit: {rate: 3}
name: |
  two
  lines
ratio: 0.5
mark: 0xff00
log: true
`, with(func(s *settings) {
			s.LAPI.KeyFile = "/etc/edgeward/lapi-key"
			s.Mode = "observe"
			s.Listen = netip.MustParseAddrPort("127.0.0.1:9100")
			s.Allow = []netip.Prefix{netip.MustParsePrefix("192.168.0.0/16"), netip.MustParsePrefix("2001:db8::1/128"), netip.MustParsePrefix("198.51.100.0/24")}
			s.Resolver = netip.MustParseAddr("192.0.2.53")
			s.Ports = []Port{22, 443}
			s.Labels = map[string]string{"node": "pi-1", "rack": "7", "8": "eight", "on": "true"}
			s.Services = map[string]service{"web": {Port: 80}, "empty": {}}
			s.Hooks = []hook{{"prerouting", -100}, {"output", 5}}
			s.Limit = &limit{Burst: 5, Rate: 3}
			s.Name = "two\nlines\n"
			s.Ratio = 0.5
			s.Mark = 0xff00
			s.Log = true
		})},
		{"a port on every address", url + "listen: :9100\n", with(func(s *settings) { s.Listen = netip.MustParseAddrPort("[::]:9100") })},
		{"numbers as text stay as written", url + "name: 1.10\n", with(func(s *settings) { s.Name = "1.10" })},
		{"a whole number for a fraction", url + "ratio: 2\nmark: 0\n", with(func(s *settings) { s.Ratio = 2 })},
		{"windows line ends", "lapi:\r\n  url: x\r\nname: n\r\n", with(func(s *settings) { s.Name = "n" })},
		{"marks around a document", "---\n" + url + "...\n", with(func(*settings) {})},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := defaults()
			got, err := Parse("b.yaml", []byte(c.text), before, check)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, got, comparable); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(defaults(), before, comparable); diff != "" {
				t.Errorf("the defaults themselves changed: %s", diff)
			}
		})
	}
}

func TestProblems(t *testing.T) {
	for _, c := range []struct {
		name, text string
		want       []string // after "b.yaml:"
	}{
		{"empty", "", []string{"1:1: lapi.url: is missing: give LAPI's address"}},
		{"only comments", "# nothing\n", []string{"1:1: lapi.url: is missing: give LAPI's address"}},
		{"unknown key", "lapi:\n  url: x\n  intervall: 1s\n", []string{`3:3: lapi: unknown key "intervall": did you mean "interval"?`}},
		{"unknown key in a list", "lapi: {url: x}\nhooks:\n  - name: a\n    prio: 1\n  - nam: b\n", []string{
			`4:5: hooks[0]: unknown key "prio": did you mean "priority"?`,
			`5:5: hooks[1]: unknown key "nam": did you mean "name"?`,
		}},
		{"unknown key beside a missing one", "lapi:\n  intervall: 1s\n", []string{
			`2:3: lapi: unknown key "intervall": did you mean "interval"?`,
			`2:3: lapi.url: is missing: give LAPI's address`,
		}},
		{"unknown key unlike any", "lapi: {url: x}\nlimit:\n  somethingelse: 1\n", []string{`3:3: limit: unknown key "somethingelse": the keys here are burst, rate`}},
		{"what is computed is no key", "lapi: {url: x}\nderived: x\n", []string{`2:1: unknown key "derived": the keys here are allow, hooks, labels, lapi, limit, listen, log, mark, mode, name, ports, ratio, resolver, services`}},
		{"missing in a section", "mode: observe\nlapi:\n  timeout: 1s\n", []string{"3:3: lapi.url: is missing: give LAPI's address"}},
		{"everything at once", "mode: enforced\nlapi: {url: x, interval: 10}\nports: [0, 22, ssh]\nallow: [10.0.0.0/33]\nlog: yes\n", []string{
			`1:7: mode: "enforced": want enforce or observe`,
			`2:26: lapi.interval: "10": want a duration such as 10s, 15m or 1h30m`,
			`3:9: ports[0]: "0": want a port from 1 to 65535`,
			`3:16: ports[2]: "ssh": want a port from 1 to 65535`,
			`4:9: allow[0]: "10.0.0.0/33": want a range such as 10.0.0.0/8 or 2001:db8::/32, or an address`,
			`5:6: log: "yes": want true or false`,
		}},
		{"unreadable is not also missing", "lapi:\n  url: [x]\n", []string{`2:8: lapi.url: want a text, have a list`}},
		{"wrong shapes", "lapi: http://x\nports: 22\nmode: {a: b}\nlabels: [x]\nname:\n  a: b\n", []string{
			`1:7: lapi: want keys and values, have "http://x"`,
			`2:8: ports: want a list, have "22": write [it] or put it after a dash`,
			`3:7: mode: want a single value, have keys and values`,
			`4:9: labels: want keys and values, have a list`,
			`6:3: name: want a text, have keys and values`,
		}},
		{"texts that want quotes", "{lapi: {url: x},\nallow: [127.0.0.1:80, {a: b}, a: b, 'a':b, {c:d}],\nname: {a:1}}\n", []string{
			`2:9: allow[0]: "127.0.0.1:80": want a range such as 10.0.0.0/8 or 2001:db8::/32, or an address`,
			`2:23: allow[1]: want a single value, have keys and values`,
			`2:31: allow[2]: want a single value, have keys and values`,
			`2:37: allow[3]: want a single value, have keys and values: put it in quotes, "a:b"`,
			`2:44: allow[4]: want a single value, have keys and values: put it in quotes, "c:d"`,
			`3:7: name: want a text, have keys and values: put it in quotes, "a:1"`,
		}},
		{"brackets that want quotes", "{allow: [[::1]:80]}\n", []string{`1:11: not YAML: found an invalid key for this map: put a text that has colons or brackets in quotes`}},
		{"a list for a file", "- a\n- b\n", []string{"1:1: want keys and values, have a list", "1:1: lapi.url: is missing: give LAPI's address"}},
		{"numbers", "lapi: {url: x}\nhooks:\n  - {name: a, priority: 128}\n  - {name: b, priority: 1.5}\n  - {name: c, priority: \"7\"}\nmark: -1\nratio: high\nlimit: {rate: 010}\n", []string{
			`3:25: hooks[0].priority: "128": want a whole number from -128 to 127`,
			`4:25: hooks[1].priority: "1.5": want a whole number from -128 to 127`,
			`5:25: hooks[2].priority: "7": want a whole number from -128 to 127`,
			`6:7: mark: "-1": want a whole number from 0 to 4294967295`,
			`7:8: ratio: "high": want a number`,
			`8:15: limit.rate: "010": want a whole number from -9223372036854775808 to 9223372036854775807`,
		}},
		{"addresses", "lapi: {url: x}\nresolver: fe80::1%eth0\nlisten: localhost:80\nallow: [10.0.0.1, 10.0.0]\n", []string{
			`2:11: resolver: "fe80::1%eth0": want an address such as 192.0.2.1 or 2001:db8::1`,
			`3:9: listen: "localhost:80": want an address and a port such as 127.0.0.1:9100, [::1]:9100, or :9100 for every address`,
			`4:19: allow[1]: "10.0.0": want a range such as 10.0.0.0/8 or 2001:db8::/32, or an address`,
		}},
		{"an empty entry", "lapi: {url: x}\nports:\n  - 22\n  -\n", []string{"4:5: ports[1]: an empty entry: fill it in or take it out"}},
		{"given twice", "lapi: {url: x}\nmode: enforce\nmode: observe\n", []string{"3:1: mode: given twice, first on line 2: keep one"}},
		{"given twice in a map", "lapi: {url: x}\nlabels: {a: 1, a: 2}\n", []string{"2:16: labels.a: given twice, first on line 2: keep one"}},
		{"what a terminal obeys", "lapi:\n  url: \"\\e[2J\"\n  keyFile: \"/etc/a\\nrm -rf\"\n", []string{
			"2:8: lapi.url: holds a control character: no path and no name has one",
			"3:12: lapi.keyFile: holds a control character: no path and no name has one",
		}},
		{"a key where its file belongs", "lapi:\n  url: x\n  keyFile: mN3geheim\n", []string{"3:12: lapi.keyFile: want the absolute path of a file that holds it, such as /etc/edgeward/NAME.key"}},
		{"anchors", "lapi: &a {url: x}\nname: *a\n", []string{
			"1:7: lapi: anchors, aliases and merge keys are not supported: write the value out",
			"2:7: name: anchors, aliases and merge keys are not supported: write the value out",
		}},
		{"a star without quotes", "lapi: {url: x}\nname: *.example.org\n", []string{`2:7: name: "*.example.org": a text that begins with * has to be in quotes`}},
		{"a byte order mark", "\ufefflapi: {url: x}\nnome: x\n", []string{`2:1: unknown key "nome": did you mean "name"?`}},
		{"merge keys", "lapi: {url: x}\nlabels:\n  <<: {a: b}\n", []string{"3:3: labels: anchors, aliases and merge keys are not supported: write the value out"}},
		{"tags", "lapi: {url: x}\nname: !!binary aGk=\n", []string{"2:7: name: tags are not supported: leave it out"}},
		{"directives", "%YAML 1.1\n---\nlapi: {url: x}\n", []string{"1:1: directives are not supported: leave the line out"}},
		{"two documents", "lapi: {url: x}\n---\nmode: observe\n", []string{"3:1: a second document: a configuration is one"}},
		{"a bracket left open", "allow: [10.0.0.0/8\nmode: observe\n", []string{"2:1: not YAML: ',' or ']' must be specified"}},
		{"tabs", "lapi:\n\turl: x\n", []string{"2:1: not YAML: a tab: YAML indents with spaces"}},
		{"lines that end in two bytes", "# a\r\nmode: # b\r\n  enforced\r\n\r\nlog: 1\r\n", []string{
			`1:1: lapi.url: is missing: give LAPI's address`, `3:3: mode: "enforced": want enforce or observe`, `5:6: log: "1": want true or false`}},
		{"not text", "mode: observe\nname: \xff\n", []string{"2:1: not UTF-8 text"}},
		{"nested without end", strings.Repeat("[", 100000), []string{"1:1: nested too deeply"}},
		{"nested without brackets", "a:\n" + strings.Repeat("- ", 100000), []string{"2:1: nested too deeply"}},
		{"keys without end", strings.Repeat("a:\n- b: 1\n  c: 2\n", 10001), []string{"29989:1: too many keys in one section: this is not a configuration"}},
		{"too large", "# " + strings.Repeat("x", fileLimit), []string{"1:1: larger than 4194304 bytes: this is not a configuration"}},
		{"what the check says of two keys", "lapi: {url: x}\nlog: true\n", []string{"2:6: log: needs a limit"}},
		{"a long value is cut", "lapi: {url: x}\nmark: " + strings.Repeat("9", 500) + "\n", []string{`2:7: mark: "` + strings.Repeat("9", 60) + `...": want a whole number from 0 to 4294967295`}},
		{"a value of two lines is told in one", "lapi: {url: x}\nlog: |\n  a\n  b\n", []string{`2:6: log: "a\nb\n": want true or false`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Parse("b.yaml", []byte(c.text), defaults(), check)
			if err == nil {
				t.Fatal("no error")
			}
			var got []string
			for line := range strings.Lines(err.Error()) {
				got = append(got, strings.TrimPrefix(strings.TrimSuffix(line, "\n"), "b.yaml:"))
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
			if problems, ok := errors.AsType[Problems](err); !ok || len(problems) != len(got) {
				t.Errorf("error of type %T with %d lines", err, len(got))
			}
		})
	}
}

func TestLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "b.yaml")
	_, err := Load(path, defaults(), check)
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), path) {
		t.Errorf("a file that is not there: %v", err)
	}
	if err := os.WriteFile(path, []byte("lapi: {url: x}\nmode: observe\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := Load(path, defaults(), check)
	if err != nil || got.Mode != "observe" {
		t.Errorf("mode %q, %v", got.Mode, err)
	}
	if err := os.WriteFile(path, []byte("mood: observe\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err = Load(path, defaults(), nil); err == nil || err.Error() != path+`:1:1: unknown key "mood": did you mean "mode"?` {
		t.Errorf("%v", err)
	}
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	f := File(path)
	write := func(text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.Read(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	write(" \n")
	if _, err := f.Read(); err == nil || err.Error() != "read "+path+": it is empty" {
		t.Errorf("an empty file: %v", err)
	}
	for _, key := range []string{"first", "second"} { // read at each use
		write(key + "\n")
		if got, err := f.Read(); err != nil || got.Reveal() != key {
			t.Errorf("read %q, %v; want %q", got.Reveal(), err, key)
		}
	}
	write(strings.Repeat("x", secretLimit+1))
	if _, err := f.Read(); err == nil || !strings.Contains(err.Error(), "larger") {
		t.Errorf("a huge file: %v", err)
	}
}

func TestSecretsAreNotShown(t *testing.T) {
	s := Secret{"mN3geheim"}
	holder := struct {
		Key    Secret
		Secret *Secret
	}{s, &s}
	var shown bytes.Buffer
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d", "%T"} {
		fmt.Fprintf(&shown, verb+"\n", s)
		fmt.Fprintf(&shown, verb+"\n", holder)
	}
	fmt.Fprintln(&shown, s, &s, s.String(), fmt.Errorf("send %v", s))
	log := slog.New(slog.NewJSONHandler(&shown, nil))
	log.Info("x", "secret", s, "in", holder)
	slog.New(slog.NewTextHandler(&shown, nil)).Info("x", "secret", s)
	if err := json.NewEncoder(&shown).Encode(holder); err != nil {
		t.Fatal(err)
	}
	if text := shown.String(); strings.Contains(text, "geheim") || strings.Contains(text, fmt.Sprintf("%x", "geheim")) || !strings.Contains(text, redacted) {
		t.Errorf("shown:\n%s", text)
	}
}

// FuzzParse feeds anything: no panic, either a value or problems, each in one
// line with a place that is in the file, and the same for the same text.
func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		"lapi: {url: x}\nmode: observe\nallow: [10.0.0.0/8, ::1]\nports: [22]\n",
		"services:\n  web: {port: 80}\nhooks:\n  - name: a\n    priority: -1\nlimit:\n  rate: 010\n",
		"a: &x 1\nb: *x\n<<: *x\n? y\n: z\n", "name: >-\n  x\n\n  y\nlog: !!bool yes\n", "---\n%YAML\n...\n'", "{a: [b, {c}]}", "\t- :",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		value, err := Parse("f", text, defaults(), check)
		again, err2 := Parse("f", text, defaults(), check)
		if diff := cmp.Diff(value, again, comparable, cmp.Comparer(func(a, b float64) bool { return a == b || a != a && b != b })); diff != "" || fmt.Sprint(err) != fmt.Sprint(err2) {
			t.Fatalf("read twice, differently: %s\n%v\n%v", diff, err, err2)
		}
		if err == nil {
			return
		}
		problems, ok := errors.AsType[Problems](err)
		if !ok || len(problems) == 0 {
			t.Fatalf("%T: %v", err, err)
		}
		lines := bytes.Count(text, []byte("\n")) + bytes.Count(text, []byte("\r")) + 1
		for _, p := range problems {
			if p.Line < 1 || p.Line > lines || p.Column < 1 || strings.ContainsAny(p.What, "\n\r") || p.What == "" {
				t.Errorf("%+q of a file of %d lines", p, lines)
			}
		}
	})
}

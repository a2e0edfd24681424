package wgquick

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/edgeward/edgeward/internal/config"
	"github.com/edgeward/edgeward/tunnel/wireguard"
)

// File is an existing configuration.
type File struct {
	// Name is the file's, without its directory and ending.
	Name string
	// Interface is the machine's own part.
	Interface Interface
	Peers     []Peer
	// Ignored are settings that have no place here, in the order of lines.
	Ignored []Ignored
}

// Interface is the section [Interface].
type Interface struct {
	PrivateKey wireguard.PrivateKey
	Addresses  []netip.Prefix // as written, host bits and all
	ListenPort uint16
	DNS        []netip.Addr
	Search     []string
	MTU        int
}

// Peer is a section [Peer].
type Peer struct {
	// Name is from the comment beside the section, made fit for ours, or empty.
	Name wireguard.Name
	// Enabled is false for a section that is commented out whole, as PiVPN
	// does it.
	Enabled      bool
	PublicKey    wireguard.PublicKey
	PresharedKey wireguard.PresharedKey
	AllowedIPs   []netip.Prefix
	Endpoint     string
	Keepalive    time.Duration
	Line         int
}

// Ignored is a setting that is not taken over.
type Ignored struct {
	Line int
	Key  string
	Why  string
}

// parser reads a file line by line.
type parser struct {
	name     string
	file     File
	problems config.Problems
	// comments are those above the next section, without anything between.
	comments []string
	// live is the section that lines belong to, shut the one that is commented
	// out, which lines that are commented out belong to.
	live, shut *section
	peers      []*section
	opened     bool // there was a section
}

// section is one under way.
type section struct {
	peer       *Peer // nil for [Interface]
	line       int
	candidates []string // comments that may hold its name, the likeliest first
	broken     bool     // a line of it that is commented out makes no sense
}

// Parse reads text, the content of the file called name. The error is of type
// config.Problems and names every line that is wrong; it repeats no key.
func Parse(name string, text []byte) (File, error) {
	base := filepath.Base(name)
	p := &parser{name: name, file: File{Name: strings.TrimSuffix(base, filepath.Ext(base))}}
	n := 0
	for line := range strings.Lines(strings.TrimPrefix(string(text), "\ufeff")) {
		n++
		p.read(n, strings.TrimRight(line, "\r\n"))
	}
	if !p.opened && len(p.problems) != 1 { // what else is wrong with it says nothing more
		p.problems = nil
		p.fail(1, 1, "there is no section [Interface] or [Peer]: this is no configuration of WireGuard")
	}
	taken := map[wireguard.Name]bool{}
	for _, s := range p.peers {
		switch {
		case !s.peer.Enabled && (s.broken || s.peer.PublicKey.IsZero()):
			p.file.Ignored = append(p.file.Ignored, Ignored{s.line, "[Peer]", "is commented out, and makes no whole peer"})
			continue
		case s.peer.PublicKey.IsZero():
			p.fail(s.line, 1, "this peer has no PublicKey")
		}
		s.peer.Name = unique(nameIn(s.candidates), taken)
		p.file.Peers = append(p.file.Peers, *s.peer)
	}
	slices.SortStableFunc(p.file.Ignored, func(a, b Ignored) int { return a.Line - b.Line })
	if len(p.problems) > 0 {
		return File{}, p.problems
	}
	return p.file, nil
}

func (p *parser) fail(line, column int, format string, args ...any) {
	p.problems = append(p.problems, config.Problem{File: p.name, Line: line, Column: column, What: fmt.Sprintf(format, args...)})
}

// marks begin a line that is commented out; the first is PiVPN's.
var marks = regexp.MustCompile(`^\s*(#\[disabled\]|#+)\s*`)

func (p *parser) read(n int, line string) {
	before, comment, commented := strings.Cut(line, "#")
	code := strings.TrimSpace(before)
	switch {
	case code == "" && !commented:
		p.comments = nil
	case code == "":
		p.comment(n, line)
	case code[0] == '[':
		p.shut = nil
		p.open(n, code, true)
		if p.live != nil && commented {
			p.live.candidates = append([]string{comment}, p.live.candidates...)
		}
	default:
		p.comments, p.shut = nil, nil
		if p.live == nil {
			if len(p.problems) == 0 || p.problems[len(p.problems)-1].Line < n-1 {
				p.fail(n, 1, "this setting is in no section: want [Interface] or [Peer] before it")
			}
			return
		}
		if commented {
			p.live.candidates = append(p.live.candidates, comment)
		}
		p.set(p.live, n, before)
	}
}

// comment reads a line that is nothing else.
func (p *parser) comment(n int, line string) {
	inner := strings.TrimSpace(marks.ReplaceAllString(line, ""))
	key, _, isSetting := strings.Cut(inner, "=")
	switch {
	case strings.EqualFold(inner, "[Peer]"):
		p.open(n, inner, false)
	case p.shut != nil && isSetting && known(p.shut, key):
		p.set(p.shut, n, inner)
	case inner == "":
		p.comments = nil
	default:
		p.comments = append(p.comments, inner)
		s := p.live
		if p.shut != nil {
			s = p.shut
		}
		if s != nil && s.peer != nil && s.peer.PublicKey.IsZero() {
			// Between the head of a section and its settings.
			s.candidates = append(s.candidates, inner)
		}
	}
}

// open begins a section.
func (p *parser) open(n int, head string, live bool) {
	s := &section{line: n}
	// The nearest comment is the likeliest.
	for _, c := range slices.Backward(p.comments) {
		s.candidates = append(s.candidates, c)
	}
	p.comments = nil
	switch {
	case strings.EqualFold(head, "[Interface]"):
		p.opened = true
	case strings.EqualFold(head, "[Peer]"):
		p.opened = true
		s.peer = &Peer{Enabled: live, Line: n}
		p.peers = append(p.peers, s)
	default:
		p.fail(n, 1, "there is no such section: want [Interface] or [Peer]")
	}
	if live {
		p.live = s
	} else {
		p.shut = s
	}
}

// settings are those of the two sections, and ignored those that are read over,
// in small letters, with the reason.
var (
	settings = map[bool][]string{
		false: {"PrivateKey", "Address", "ListenPort", "DNS", "MTU"},
		true:  {"PublicKey", "PresharedKey", "AllowedIPs", "Endpoint", "PersistentKeepalive"},
	}
	ignored = map[string]string{
		"preup": "is not run", "postup": "is not run", "predown": "is not run", "postdown": "is not run",
		"table": "has no place here: routes are made from allowedIPs", "fwmark": "has no place here", "saveconfig": "has no place here: the file says what is",
	}
)

func known(s *section, key string) bool {
	return slices.ContainsFunc(settings[s.peer != nil], func(k string) bool { return strings.EqualFold(k, strings.TrimSpace(key)) })
}

// set reads KEY = VALUE into a section. What is wrong in a section that is
// commented out makes that none.
func (p *parser) set(s *section, n int, line string) {
	key, value, ok := strings.Cut(line, "=")
	column := len(key) + 2
	if ok {
		column += len(value) - len(strings.TrimLeft(value, " \t"))
	}
	key, value = strings.TrimSpace(key), strings.TrimSpace(value)
	fail := func(format string, args ...any) {
		if s.peer != nil && !s.peer.Enabled {
			s.broken = true
			return
		}
		p.fail(n, column, "%s: %s", key, fmt.Sprintf(format, args...))
	}
	if why, is := ignored[strings.ToLower(key)]; is && s.peer == nil {
		p.file.Ignored = append(p.file.Ignored, Ignored{n, key, why})
		return
	}
	if !ok || !plain(key) {
		// It may be a key that stands where it should not, so it is not repeated.
		p.fail(n, 1, "want a setting and its value, such as MTU = 1420")
		return
	}
	if !strings.HasSuffix(strings.ToLower(key), "key") && slices.ContainsFunc(strings.FieldsFunc(value, func(r rune) bool { return r == ',' || r == ' ' }), isKey) {
		fail("a key does not belong here")
		return
	}
	var err error
	i, own := &p.file.Interface, s.peer
	switch name := strings.ToLower(key); {
	case own == nil && name == "privatekey":
		i.PrivateKey, err = wireguard.ParsePrivateKey(value)
	case own == nil && name == "address":
		err = each(value, func(text string) error {
			a, err := prefix(text)
			i.Addresses = append(i.Addresses, a)
			return err
		})
	case own == nil && name == "listenport":
		var v uint64
		if v, err = strconv.ParseUint(value, 10, 16); err != nil {
			err = fmt.Errorf("%s: want a port", quoted(value))
		}
		i.ListenPort = uint16(v)
	case own == nil && name == "dns":
		err = each(value, func(text string) error {
			if a, err := netip.ParseAddr(text); err == nil {
				i.DNS = append(i.DNS, a)
			} else {
				i.Search = append(i.Search, text)
			}
			return nil
		})
	case own == nil && name == "mtu":
		if i.MTU, err = strconv.Atoi(value); err != nil || i.MTU < 0 {
			err = fmt.Errorf("%s: want a number of bytes", quoted(value))
		}
	case own != nil && name == "publickey":
		own.PublicKey, err = wireguard.ParsePublicKey(value)
	case own != nil && name == "presharedkey":
		own.PresharedKey, err = wireguard.ParsePresharedKey(value)
	case own != nil && name == "allowedips":
		err = each(value, func(text string) error {
			a, err := prefix(text)
			own.AllowedIPs = append(own.AllowedIPs, a.Masked())
			return err
		})
	case own != nil && name == "endpoint":
		var e wireguard.Endpoint
		err = e.UnmarshalText([]byte(value))
		own.Endpoint = string(e)
	case own != nil && name == "persistentkeepalive":
		var v uint64
		if v, err = strconv.ParseUint(value, 10, 16); err != nil && !strings.EqualFold(value, "off") {
			err = fmt.Errorf("%s: want seconds, or off", quoted(value))
		} else {
			err = nil
		}
		own.Keepalive = time.Duration(v) * time.Second
	default:
		column = 1
		if meant := config.Nearest(key, settings[own != nil]); meant != "" {
			fail("there is no such setting: did you mean %s?", meant)
		} else {
			fail("there is no such setting: the settings here are %s", strings.Join(settings[own != nil], ", "))
		}
		return
	}
	if err != nil {
		fail("%v", err)
	}
}

// each reads a list with commas.
func each(value string, read func(string) error) error {
	var errs []error
	for text := range strings.SplitSeq(value, ",") {
		if text = strings.TrimSpace(text); text != "" {
			errs = append(errs, read(text))
		}
	}
	return errors.Join(errs...)
}

// prefix reads an address, with the length of its network or without.
func prefix(text string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(text)
	if err != nil {
		a, addrErr := netip.ParseAddr(text)
		p, err = netip.PrefixFrom(a, a.BitLen()), addrErr
	}
	if err != nil || p.Addr().Zone() != "" || p.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("%s: want an address or a network, such as 10.66.0.2/32", quoted(text))
	}
	return p, nil
}

// quoted is a value for a message, short and in one line.
func quoted(text string) string {
	if len(text) > 60 {
		text = strings.ToValidUTF8(text[:60], "") + "..."
	}
	return strconv.Quote(text)
}

// plain reports whether a text is a word that can be the name of a setting.
func plain(key string) bool {
	return len(key) < 32 && !strings.ContainsFunc(key, func(r rune) bool { return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') })
}

// isKey reports whether a text looks like a key of WireGuard, or most of one.
func isKey(text string) bool {
	return len(text) >= 32 && !strings.ContainsFunc(text, func(r rune) bool { return !plain(string(r)) && !strings.ContainsRune("+/=", r) })
}

// label is what programs write before a name: wg-easy, PiVPN, wg-portal,
// wireguard-ui, WGDashboard, and scripts.
var label = regexp.MustCompile(`(?i)^(?:begin(?:_peer)?|client|friendly_name|friendly_json|(?:display[ -]?|peer)?name#?|peer|user|-wgp-\s+(?:display name|peer):?)(?:\s*[:=]\s*|\s+)(.+)$`)

// closing ends what a label began, and is nobody's name.
var closing = regexp.MustCompile(`(?i)^end(_peer)?\b`)

// aside is what programs put behind a name, such as an id.
var aside = regexp.MustCompile(`\s*\([^)]*\)\s*$`)

// nameIn finds the name in comments, a labelled one first.
func nameIn(comments []string) wireguard.Name {
	var plain wireguard.Name
	for _, c := range comments {
		c = strings.TrimSpace(strings.Trim(strings.TrimSpace(c), "#"))
		if closing.MatchString(c) {
			continue
		}
		if m := label.FindStringSubmatch(c); m != nil {
			if name := fit(aside.ReplaceAllString(m[1], "")); name != "" {
				return name
			}
		}
		// What is longer is a remark.
		if plain == "" && len(c) <= 40 && !strings.Contains(c, "=") {
			plain = fit(aside.ReplaceAllString(c, ""))
		}
	}
	return plain
}

// unfit is what a name of ours cannot hold.
var unfit = regexp.MustCompile(`[^a-z0-9._]+`)

// fit makes a name of ours out of one of theirs; there may be none.
func fit(text string) wireguard.Name {
	text = strings.Trim(unfit.ReplaceAllString(strings.ToLower(text), "-"), "-._")
	name, err := wireguard.ParseName(strings.TrimRight(text[:min(len(text), 50)], "-._"))
	if err != nil {
		return ""
	}
	return name
}

// unique is a name that is not taken: the second alice is alice-2.
func unique(name wireguard.Name, taken map[wireguard.Name]bool) wireguard.Name {
	out := name
	for n := 2; out != "" && taken[out]; n++ {
		out = wireguard.Name(fmt.Sprintf("%s-%d", name, n))
	}
	taken[out] = true
	return out
}

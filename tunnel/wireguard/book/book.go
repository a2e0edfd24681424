// Package book edits the peers in the file that declares them, as a person would:
// the lines that say something else stay, byte for byte, with their comments,
// order and format.
//
// It edits text and knows nothing of devices or of what an edit costs. Each edit
// is made twice, on the text and on what the text means; where the two do not
// agree, because the file is written in a way that nobody thought of, the edit
// is refused and the file stays. It never writes a file that the caller's check
// refuses, and never a key but a public one. The command line calls it.
package book

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"

	"github.com/edgeward/edgeward/tunnel/wireguard"
)

// Add declares peers, in order, at the end of those that are there. Only what is
// not zero is written, and enabled where it is false.
func Add(text []byte, peers ...wireguard.Peer) ([]byte, error) {
	for _, peer := range peers {
		var err error
		if text, err = add(text, peer); err != nil {
			return nil, fmt.Errorf("add %s: %w", peer.Name, err)
		}
	}
	return text, nil
}

// Remove takes a peer out, and out of the grants that name it; a grant that names
// nobody else goes with it. Comments above them stay.
func Remove(text []byte, name wireguard.Name) ([]byte, error) {
	out, err := remove(text, name)
	if err != nil {
		return nil, fmt.Errorf("remove %s: %w", name, err)
	}
	return out, nil
}

// SetEnabled shuts a peer out, or lets it in.
func SetEnabled(text []byte, name wireguard.Name, enabled bool) ([]byte, error) {
	value := &[]string{"false"}[0]
	verb := "disable"
	if enabled {
		value, verb = nil, "enable"
	}
	out, err := change(text, name, func(fields) []setting { return []setting{{"enabled", value}} })
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", verb, name, err)
	}
	return out, nil
}

// SetNext stages a key that takes over from the present one, with a preshared key
// in a file, or with none where that is empty. The zero key takes a staged one
// out again.
func SetNext(text []byte, name wireguard.Name, key wireguard.PublicKey, presharedKeyFile string) ([]byte, error) {
	out, err := change(text, name, func(fields) []setting {
		return []setting{{"nextPublicKey", scalar(key.String())}, {"nextPresharedKeyFile", scalar(presharedKeyFile)}}
	})
	if err != nil {
		return nil, fmt.Errorf("stage a key for %s: %w", name, err)
	}
	return out, nil
}

// Finish puts the staged key, with its preshared key, in the place of the present
// one.
func Finish(text []byte, name wireguard.Name) ([]byte, error) {
	staged := true
	out, err := change(text, name, func(peer fields) []setting {
		next, ok := peer.get("nextPublicKey").(string)
		if staged = ok; !ok {
			return nil
		}
		file, _ := peer.get("nextPresharedKeyFile").(string)
		return []setting{
			{"publicKey", scalar(strings.TrimPrefix(next, "text "))},
			{"presharedKeyFile", scalar(strings.TrimPrefix(file, "text "))},
			{"nextPublicKey", nil}, {"nextPresharedKeyFile", nil},
		}
	})
	if !staged {
		err = fmt.Errorf("there is no staged key")
	}
	if err != nil {
		return nil, fmt.Errorf("finish the rotation of %s: %w", name, err)
	}
	return out, nil
}

// setting is a key of a peer and its value in YAML; nil takes it out.
type setting struct {
	name  string
	value *string
}

// scalar is a text in YAML, in quotes where they could be needed; nothing is
// nil.
func scalar(text string) *string {
	if text == "" {
		return nil
	}
	const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/+"
	if strings.Trim(text, plain+"._=-") != "" || !strings.Contains(plain, text[:1]) || ambiguous(text) {
		text = strconv.Quote(text)
	}
	return &text
}

// ambiguous reports whether some reader of YAML takes a text for something else.
func ambiguous(text string) bool {
	if slices.Contains([]string{"true", "false", "yes", "no", "on", "off", "y", "n", "null", "nan", "inf"}, strings.ToLower(text)) {
		return true
	}
	_, err := strconv.ParseFloat(text, 64) // 1e5, 0x1p-2, infinity
	_, err2 := strconv.ParseInt(text, 0, 64)
	return err == nil || err2 == nil
}

// written is a peer in YAML: keys with their values, each on one line.
func written(p wireguard.Peer) []setting {
	var out []setting
	put := func(name string, value *string) {
		if value != nil {
			out = append(out, setting{name, value})
		}
	}
	put("name", scalar(string(p.Name)))
	put("publicKey", scalar(p.PublicKey.String()))
	put("presharedKeyFile", scalar(string(p.PresharedKeyFile)))
	put("nextPublicKey", scalar(p.NextPublicKey.String()))
	put("nextPresharedKeyFile", scalar(string(p.NextPresharedKeyFile)))
	put("addresses", sequence(p.Addresses, netip.Addr.String))
	put("groups", sequence(p.Groups, func(n wireguard.Name) string { return string(n) }))
	if !p.Enabled {
		no := "false"
		put("enabled", &no)
	}
	if !p.Expires.IsZero() {
		put("expires", scalar(p.Expires.UTC().Format(time.RFC3339)))
	}
	put("dns", sequence(p.DNS, netip.Addr.String))
	if p.Keepalive != 0 {
		put("keepalive", scalar(p.Keepalive.String()))
	}
	if p.FullTunnel {
		yes := "true"
		put("fullTunnel", &yes)
	}
	put("allowedIPs", sequence(p.AllowedIPs, netip.Prefix.String))
	return out
}

// sequence is a list in YAML; nil where there is none, which is not the same as
// an empty one.
func sequence[T any](list []T, text func(T) string) *string {
	if list == nil {
		return nil
	}
	var all []string
	for _, x := range list {
		all = append(all, *scalar(text(x)))
	}
	out := "[" + strings.Join(all, ", ") + "]"
	return &out
}

// inBraces is a peer on one line.
func inBraces(peer []setting) string {
	var all []string
	for _, s := range peer {
		all = append(all, s.name+": "+*s.value)
	}
	return "{" + strings.Join(all, ", ") + "}"
}

// inLines is a peer as an element of a block, whose dash is indented so far.
func inLines(peer []setting, indent int) []string {
	var out []string
	lead := strings.Repeat(" ", indent) + "- "
	for _, s := range peer {
		out = append(out, lead+s.name+": "+*s.value)
		lead = strings.Repeat(" ", indent+2)
	}
	return out
}

// meaning is what a piece of YAML means, as tree says it.
func meaning(yaml string) (any, error) {
	file, err := parser.ParseBytes([]byte(yaml), 0)
	if err != nil || len(file.Docs) != 1 {
		return nil, errByHand
	}
	return tree(file.Docs[0].Body), nil
}

// add declares a peer.
func add(text []byte, peer wireguard.Peer) ([]byte, error) {
	p, err := read(text)
	if err != nil {
		return nil, err
	}
	entries := written(peer)
	said, err := meaning(inBraces(entries))
	if err != nil {
		return nil, err
	}
	var root mapping
	before := fields{}
	if p.root != nil {
		if root, err = p.mapping(p.root); err != nil {
			return nil, err
		}
		before = tree(p.root).(fields)
	}
	peers, _ := before.get("peers").([]any)
	want := before.with("peers", append(slices.Clone(peers), said))

	out, err := p.insert(root, entries)
	if err != nil {
		return nil, err
	}
	if !agree(out, want) {
		return nil, errByHand
	}
	return out, nil
}

// insert puts a peer at the end of the peers, or at the end of a file that has
// none.
func (p *page) insert(root mapping, peer []setting) ([]byte, error) {
	owner := root.find("peers")
	if owner == nil {
		if root.flow {
			return nil, errByHand
		}
		lines := append([]string{"peers:"}, inLines(peer, 2)...)
		if len(p.text) > 0 {
			lines = append([]string{""}, lines...)
		}
		return p.insertLines(len(p.text), lines), nil
	}
	if _, null := owner.value.(*ast.NullNode); null {
		return p.underKey(root, owner, owner.colon+1, owner.colon+1, peer)
	}
	l, err := p.list(owner.value)
	if err != nil {
		return nil, err
	}
	switch {
	case l.flow && len(l.items) == 0 && !root.flow:
		return p.underKey(root, owner, owner.colon+1, l.end+1, peer)
	case l.flow:
		end := len(strings.TrimRight(string(p.text[:l.end]), " \t\r\n"))
		text := inBraces(peer)
		if c := p.text[end-1]; c == ',' {
			text = " " + text
		} else if c != '[' {
			text = ", " + text
		}
		return p.splice(end, end, text), nil
	}
	last := l.items[len(l.items)-1]
	end := p.comments(p.blockEnd(last.start, l.indent), l.indent)
	lines := inLines(peer, l.indent)
	if m, ok := last.node.(*ast.MappingNode); ok && m.IsFlowStyle {
		lines = []string{strings.Repeat(" ", l.indent) + "- " + inBraces(peer)}
	}
	return p.insertLines(end, lines), nil
}

// underKey puts the first peer below the key, in place of an empty list.
func (p *page) underKey(root mapping, owner *entry, from, to int, peer []setting) ([]byte, error) {
	if root.flow {
		return nil, errByHand
	}
	cut, err := read(p.splice(from, to, ""))
	if err != nil {
		return nil, err
	}
	return cut.insertLines(cut.nextLine(owner.colon), inLines(peer, root.indent+2)), nil
}

// errNoPeer is for a name that the file does not declare.
func errNoPeer(name wireguard.Name) error { return fmt.Errorf("there is no peer %s in the file", name) }

// find reads the text and finds a peer in it.
func find(text []byte, name wireguard.Name) (p *page, owner *entry, l list, i int, err error) {
	if p, err = read(text); err != nil {
		return nil, nil, l, 0, err
	}
	if p.root == nil {
		return nil, nil, l, 0, errNoPeer(name)
	}
	root, err := p.mapping(p.root)
	if err != nil {
		return nil, nil, l, 0, err
	}
	if owner = root.find("peers"); owner == nil {
		return nil, nil, l, 0, errNoPeer(name)
	}
	if l, err = p.list(owner.value); err != nil {
		return nil, nil, l, 0, errNoPeer(name)
	}
	for i, it := range l.items {
		m, err := p.mapping(it.node)
		if err != nil {
			return nil, nil, l, 0, err
		}
		if e := m.find("name"); e != nil {
			if text, ok := p.scalar(e.value, m.flow); ok && text == string(name) {
				return p, owner, l, i, nil
			}
		}
	}
	return nil, nil, l, 0, errNoPeer(name)
}

// change sets keys of a peer, one after the other.
func change(text []byte, name wireguard.Name, wanted func(peer fields) []setting) ([]byte, error) {
	p, _, l, i, err := find(text, name)
	if err != nil {
		return nil, err
	}
	root := tree(p.root).(fields)
	peers := root.get("peers").([]any)
	peer := tree(l.items[i].node).(fields)
	settings := wanted(peer)
	for _, s := range settings {
		if s.value == nil {
			peer = peer.without(s.name)
			continue
		}
		value, err := meaning(*s.value)
		if err != nil {
			return nil, err
		}
		peer = peer.with(s.name, value)
	}
	peers[i] = peer
	for _, s := range settings {
		p, _, l, i, err := find(text, name)
		if err != nil {
			return nil, err
		}
		m, err := p.mapping(l.items[i].node)
		if err != nil {
			return nil, err
		}
		if s.value == nil {
			text, err = p.unset(m, s.name)
		} else {
			text, err = p.set(m, s.name, *s.value)
		}
		if err != nil {
			return nil, err
		}
	}
	if !agree(text, root) {
		return nil, errByHand
	}
	return text, nil
}

// remove takes a peer out, and out of the grants.
func remove(text []byte, name wireguard.Name) ([]byte, error) {
	p, owner, l, i, err := find(text, name)
	if err != nil {
		return nil, err
	}
	want := tree(p.root).(fields)
	want = want.with("peers", slices.Delete(slices.Clone(want.get("peers").([]any)), i, i+1))
	if text, err = p.remove(owner, l, i); err != nil {
		return nil, err
	}
	for {
		p, err := read(text)
		if err != nil {
			return nil, err
		}
		owner, l, grant, subject, err := p.grantTo(name)
		if err != nil {
			return nil, err
		}
		if owner == nil {
			break
		}
		grants := slices.Clone(want.get("grants").([]any))
		if len(l.items) == 1 {
			grants, subject = slices.Delete(grants, grant, grant+1), grant
			if owner, l, err = p.grants(); err != nil {
				return nil, err
			}
		} else {
			g := grants[grant].(fields)
			grants[grant] = g.with("to", slices.Delete(slices.Clone(g.get("to").([]any)), subject, subject+1))
		}
		want = want.with("grants", grants)
		if text, err = p.remove(owner, l, subject); err != nil {
			return nil, err
		}
	}
	if !agree(text, want) {
		return nil, errByHand
	}
	return text, nil
}

// grants is the list of grants, which there is, and its key.
func (p *page) grants() (owner *entry, all list, err error) {
	root, err := p.mapping(p.root)
	if err != nil {
		return nil, list{}, err
	}
	owner = root.find("grants")
	all, err = p.list(owner.value)
	return owner, all, err
}

// grantTo finds the first subject of a grant that is a peer; there is none where
// owner is nil.
func (p *page) grantTo(name wireguard.Name) (owner *entry, to list, grant, subject int, err error) {
	if p.root == nil {
		return nil, list{}, 0, 0, nil
	}
	root, err := p.mapping(p.root)
	if err != nil {
		return nil, list{}, 0, 0, err
	}
	grants := root.find("grants")
	if grants == nil {
		return nil, list{}, 0, 0, nil
	}
	all, ok := grants.value.(*ast.SequenceNode)
	if !ok {
		return nil, list{}, 0, 0, nil
	}
	for g, node := range all.Values {
		m, err := p.mapping(node)
		if err != nil {
			return nil, list{}, 0, 0, err
		}
		owner := m.find("to")
		if owner == nil {
			continue
		}
		if _, ok := owner.value.(*ast.SequenceNode); !ok {
			continue
		}
		l, err := p.list(owner.value)
		if err != nil {
			return nil, list{}, 0, 0, err
		}
		for s, it := range l.items {
			if text, ok := p.scalar(it.node, l.flow); ok && text == "peer:"+string(name) {
				return owner, l, g, s, nil
			}
		}
	}
	return nil, list{}, 0, 0, nil
}

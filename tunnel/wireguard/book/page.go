package book

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"unicode/utf8"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// page is a text and the YAML that it holds. Places in the text come from the
// tokens; what is inserted or cut is ours, byte by byte. Whether that did what
// was meant is for the caller to compare: see tree.
type page struct {
	text  []byte
	lines []int    // where each begins
	eol   string   // what ends a line
	root  ast.Node // nil for a file without content
}

// errByHand is for what YAML allows and no splice here handles.
var errByHand = errors.New("the file is written in a way that is not edited safely here: edit it by hand")

func read(text []byte) (*page, error) {
	p := &page{text: text, eol: "\n", lines: []int{0}}
	if i := bytes.IndexByte(text, '\n'); i > 0 && text[i-1] == '\r' {
		p.eol = "\r\n"
	}
	for i, b := range text {
		if b == '\n' {
			p.lines = append(p.lines, i+1)
		}
	}
	// The library counts lines wrongly where they end in two bytes.
	file, err := parser.ParseBytes(bytes.ReplaceAll(text, []byte("\r\n"), []byte("\n")), 0)
	if err != nil {
		return nil, fmt.Errorf("read YAML: %w", err)
	}
	for _, doc := range file.Docs {
		if doc.Body == nil {
			continue
		}
		if p.root != nil {
			return nil, errByHand
		}
		p.root = doc.Body
	}
	return p, nil
}

// entry is a key with its value, in a block or in braces.
type entry struct {
	name  string
	value ast.Node
	start int // of the key
	colon int
}

// mapping is a mapping of either style.
type mapping struct {
	entries []entry
	indent  int // of the keys of a block, in bytes
	flow    bool
	start   int // of the first key, or of the brace
	end     int // of the closing brace
}

// item is an element of a list.
type item struct {
	node  ast.Node
	start int // of the dash in a block
}

// list is a list of either style.
type list struct {
	items  []item
	indent int // of the dashes
	flow   bool
	start  int // of the first dash, or of the bracket
	end    int // of the closing bracket
}

// place is where a token stands in the text.
func (p *page) place(t *token.Token) (int, error) {
	if t == nil || t.Position == nil || t.Position.Line < 1 || t.Position.Line > len(p.lines) {
		return 0, errByHand
	}
	at := p.lines[t.Position.Line-1]
	for range t.Position.Column - 1 { // columns count runes
		_, size := utf8.DecodeRune(p.text[at:])
		at += size
	}
	if at >= len(p.text) {
		return 0, errByHand
	}
	return at, nil
}

// placeOf is where a node begins.
func (p *page) placeOf(node ast.Node) (int, error) {
	switch n := node.(type) {
	case *ast.MappingNode:
		if !n.IsFlowStyle && len(n.Values) > 0 {
			return p.placeOf(n.Values[0].Key)
		}
	case *ast.MappingValueNode:
		return p.placeOf(n.Key)
	}
	return p.place(node.GetToken())
}

// column is how far a place is from the beginning of its line, in bytes.
func (p *page) column(at int) int { return at - p.lineOf(at) }

// lineOf is the beginning of the line of a place.
func (p *page) lineOf(at int) int { return bytes.LastIndexByte(p.text[:at], '\n') + 1 }

// nextLine is the beginning of the line after a place, or the end of the text.
func (p *page) nextLine(at int) int {
	if i := bytes.IndexByte(p.text[at:], '\n'); i >= 0 {
		return at + i + 1
	}
	return len(p.text)
}

// mapping reads a node as a mapping.
func (p *page) mapping(node ast.Node) (m mapping, err error) {
	n, ok := node.(ast.MapNode)
	if !ok {
		return m, errByHand
	}
	if braces, ok := node.(*ast.MappingNode); ok && braces.IsFlowStyle {
		m.flow = true
		if m.start, err = p.place(braces.Start); err != nil {
			return m, err
		}
		if m.end, err = p.place(braces.End); err != nil || p.text[m.end] != '}' {
			return m, errByHand
		}
	}
	for i := n.MapRange(); i.Next(); {
		e := entry{value: i.KeyValue().Value}
		if e.start, err = p.placeOf(i.KeyValue().Key); err != nil {
			return m, err
		}
		if e.colon, err = p.place(i.KeyValue().Start); err != nil || p.text[e.colon] != ':' {
			return m, errByHand
		}
		e.name, _ = unquote(p.text[e.start:e.colon])
		m.entries = append(m.entries, e)
	}
	if !m.flow {
		if len(m.entries) == 0 {
			return m, errByHand
		}
		m.start = m.entries[0].start
		m.indent = p.column(m.start)
	}
	return m, nil
}

// find returns the entry of a name, or nil.
func (m *mapping) find(name string) *entry {
	for i := range m.entries {
		if m.entries[i].name == name {
			return &m.entries[i]
		}
	}
	return nil
}

// list reads a node as a list.
func (p *page) list(node ast.Node) (l list, err error) {
	n, ok := node.(*ast.SequenceNode)
	if !ok {
		return l, errByHand
	}
	if l.flow = n.IsFlowStyle; l.flow {
		if l.start, err = p.place(n.Start); err != nil {
			return l, err
		}
		if l.end, err = p.place(n.End); err != nil || p.text[l.end] != ']' {
			return l, errByHand
		}
		for _, value := range n.Values {
			at, err := p.placeOf(value)
			if err != nil {
				return l, err
			}
			l.items = append(l.items, item{value, at})
		}
		return l, nil
	}
	if len(n.Entries) != len(n.Values) || len(n.Entries) == 0 {
		return l, errByHand
	}
	for i, e := range n.Entries {
		at, err := p.place(e.Start)
		if err != nil || p.text[at] != '-' {
			return l, errByHand
		}
		l.items = append(l.items, item{n.Values[i], at})
	}
	l.start = l.items[0].start
	l.indent = p.column(l.start)
	return l, nil
}

// blockEnd is where the lines of what begins at a place end: before the next line
// that is indented no deeper than its column, without the blank lines and the
// comments before that. What belongs to a key may be a list whose dashes are
// indented no deeper than the key.
func (p *page) blockEnd(start, column int) int {
	key := p.text[start] != '-'

	end := p.nextLine(start)
	for at := end; at < len(p.text); {
		next := p.nextLine(at)
		line := bytes.TrimRight(p.text[at:next], "\r\n")
		content := bytes.TrimLeft(line, " ")
		if len(content) > 0 && content[0] != '#' {
			indent := len(line) - len(content)
			if indent < column || indent == column && !(key && content[0] == '-') {
				break
			}
			end = next
		}
		at = next
	}
	return end
}

// comments is where the comments that follow a place at the beginning of a line,
// indented as far as a column, end.
func (p *page) comments(at, column int) int {
	for at < len(p.text) {
		next := p.nextLine(at)
		line := p.text[at:next]
		content := bytes.TrimLeft(line, " ")
		if len(content) == 0 || content[0] != '#' || len(line)-len(content) < max(column, 1) {
			break
		}
		at = next
	}
	return at
}

// scalarEnd is where a single value that begins at a place ends.
func (p *page) scalarEnd(start int, flow bool) (int, error) {
	text := p.text
	switch text[start] {
	case '"':
		for i := start + 1; i < len(text); i++ {
			switch text[i] {
			case '\\':
				i++
			case '"':
				return i + 1, nil
			}
		}
		return 0, errByHand
	case '\'':
		for i := start + 1; i < len(text); i++ {
			if text[i] == '\'' {
				if i+1 == len(text) || text[i+1] != '\'' {
					return i + 1, nil
				}
				i++
			}
		}
		return 0, errByHand
	case '|', '>', '&', '*', '!', '[', '{':
		return 0, errByHand
	}
	end := start
	for i := start; i < len(text) && text[i] != '\n' && text[i] != '\r'; i++ {
		if flow && strings.IndexByte(",]}", text[i]) >= 0 || text[i] == '#' && i > start && (text[i-1] == ' ' || text[i-1] == '\t') {
			break
		}
		if text[i] != ' ' && text[i] != '\t' {
			end = i + 1
		}
	}
	if end == start {
		return 0, errByHand
	}
	return end, nil
}

// scalar is the text of a single value.
func (p *page) scalar(node ast.Node, flow bool) (string, bool) {
	start, err := p.placeOf(node)
	if err != nil {
		return "", false
	}
	end, err := p.scalarEnd(start, flow)
	if err != nil {
		return "", false
	}
	return unquote(p.text[start:end])
}

// unquote is the text of a value as it stands in the file.
func unquote(raw []byte) (string, bool) {
	text := strings.TrimSpace(string(raw))
	if text == "" {
		return "", false
	}
	if text[0] == '"' || text[0] == '\'' {
		file, err := parser.ParseBytes([]byte(text), 0)
		if err != nil || len(file.Docs) != 1 {
			return "", false
		}
		s, ok := file.Docs[0].Body.(*ast.StringNode)
		if !ok {
			return "", false
		}
		return s.Value, true
	}
	return text, true
}

// splice returns the text with a part of it replaced.
func (p *page) splice(from, to int, by string) []byte {
	out := make([]byte, 0, len(p.text)-(to-from)+len(by))
	out = append(out, p.text[:from]...)
	out = append(out, by...)
	return append(out, p.text[to:]...)
}

// insertLines puts lines, each with its end, before a place that begins one or is
// the end of the text.
func (p *page) insertLines(at int, lines []string) []byte {
	text := strings.Join(lines, p.eol) + p.eol
	if at > 0 && p.text[at-1] != '\n' {
		text = p.eol + text
	}
	return p.splice(at, at, text)
}

// set gives an entry of a mapping a value, which is YAML on one line.
func (p *page) set(m mapping, name, value string) ([]byte, error) {
	if e := m.find(name); e != nil {
		if _, null := e.value.(*ast.NullNode); null {
			return nil, errByHand
		}
		start, err := p.placeOf(e.value)
		if err != nil {
			return nil, err
		}
		end, err := p.scalarEnd(start, m.flow)
		if err != nil {
			return nil, err
		}
		return p.splice(start, end, value), nil
	}
	if m.flow {
		end := len(bytes.TrimRight(p.text[:m.end], " \t\r\n"))
		text := name + ": " + value
		if c := p.text[end-1]; c == ',' {
			text = " " + text
		} else if c != '{' {
			text = ", " + text
		}
		return p.splice(end, end, text), nil
	}
	// After the last entry, wherever it ends.
	last := m.entries[len(m.entries)-1]
	end := p.blockEnd(last.start, m.indent)
	return p.insertLines(end, []string{strings.Repeat(" ", m.indent) + name + ": " + value}), nil
}

// unset takes an entry out of a mapping that has others.
func (p *page) unset(m mapping, name string) ([]byte, error) {
	if len(m.entries) < 2 {
		return nil, errByHand
	}
	for i, e := range m.entries {
		if e.name != name {
			continue
		}
		switch first, last := i == 0, i == len(m.entries)-1; {
		case m.flow && !last:
			return p.splice(e.start, m.entries[i+1].start, ""), nil
		case m.flow:
			comma := bytes.TrimRight(p.text[:e.start], " \t\r\n")
			if len(comma) == 0 || comma[len(comma)-1] != ',' {
				return nil, errByHand
			}
			end := len(bytes.TrimRight(p.text[:m.end], " \t\r\n"))
			return p.splice(len(comma)-1, end, ""), nil
		case first && len(bytes.TrimLeft(p.text[p.lineOf(e.start):e.start], " ")) > 0: // it shares its line with a dash
			return p.splice(e.start, m.entries[1].start, ""), nil
		default:
			return p.splice(p.lineOf(e.start), p.blockEnd(e.start, m.indent), ""), nil
		}
	}
	return p.text, nil
}

// remove takes an element out of a list, which is the value of owner.
func (p *page) remove(owner *entry, l list, i int) ([]byte, error) {
	last := i == len(l.items)-1
	it := l.items[i]
	switch {
	case l.flow && !last:
		return p.splice(it.start, l.items[i+1].start, ""), nil
	case l.flow && i > 0:
		comma := bytes.TrimRight(p.text[:it.start], " \t\r\n")
		if comma[len(comma)-1] != ',' {
			return nil, errByHand
		}
		return p.splice(len(comma)-1, len(bytes.TrimRight(p.text[:l.end], " \t\r\n")), ""), nil
	case l.flow:
		return p.splice(l.start+1, l.end, ""), nil
	case len(l.items) == 1:
		cut := &page{text: p.splice(it.start-l.indent, p.blockEnd(it.start, l.indent), "")}
		return cut.splice(owner.colon+1, owner.colon+1, " []"), nil
	}
	if p.lineOf(it.start)+l.indent != it.start || len(bytes.TrimLeft(p.text[p.lineOf(it.start):it.start], " ")) > 0 {
		return nil, errByHand
	}
	return p.splice(p.lineOf(it.start), p.blockEnd(it.start, l.indent), ""), nil
}

// tree is what a node means, for comparison: texts with their type, lists, and
// lists of named values.
func tree(node ast.Node) any {
	switch n := node.(type) {
	case nil:
		return nil
	case *ast.SequenceNode:
		out := []any{}
		for _, value := range n.Values {
			out = append(out, tree(value))
		}
		return out
	case ast.MapNode:
		out := fields{}
		for i := n.MapRange(); i.Next(); {
			out = append(out, field{fmt.Sprint(tree(i.KeyValue().Key)), tree(i.KeyValue().Value)})
		}
		return out
	case *ast.StringNode:
		return "text " + n.Value
	case *ast.LiteralNode:
		return "text " + n.Value.Value
	case *ast.NullNode:
		return nil
	}
	return fmt.Sprintf("%s %s", node.Type(), node.GetToken().Value)
}

type (
	fields []field
	field  struct {
		name  string
		value any
	}
)

func (f fields) get(name string) any {
	for _, x := range f {
		if x.name == "text "+name {
			return x.value
		}
	}
	return nil
}

// with returns f with a value set, in its place or at the end.
func (f fields) with(name string, value any) fields {
	out := fields{}
	done := false
	for _, x := range f {
		if x.name == "text "+name {
			x.value, done = value, true
		}
		out = append(out, x)
	}
	if !done {
		out = append(out, field{"text " + name, value})
	}
	return out
}

func (f fields) without(name string) fields {
	out := fields{}
	for _, x := range f {
		if x.name != "text "+name {
			out = append(out, x)
		}
	}
	return out
}

// agree reports whether a text means what it was to mean.
func agree(text []byte, want any) bool {
	p, err := read(text)
	return err == nil && reflect.DeepEqual(tree(p.root), want)
}

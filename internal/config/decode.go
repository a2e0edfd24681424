package config

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"

	"github.com/edgeward/edgeward/internal/decision"
)

// The library parses; the walk from its tree to our values is our own, because
// its decoder stops at the first error and coerces where we refuse.

// read parses text and decodes it into the struct dst.
func (c *Check) read(text []byte, dst reflect.Value) {
	start := position{1, 1}
	unreadable := func(at position, format string, args ...any) {
		c.unreadable = true
		c.problem(at, "", format, args...)
	}
	if len(text) > fileLimit {
		unreadable(start, "larger than %d bytes: this is not a configuration", fileLimit)
		return
	}
	if line, ok := invalidText(text); ok {
		unreadable(position{line, 1}, "not UTF-8 text")
		return
	}
	if line, what := overloaded(text); what != "" {
		unreadable(position{line, 1}, "%s", what)
		return
	}
	text = bytes.TrimPrefix(text, []byte("\ufeff")) // a byte order mark, as some editors write
	// The library counts lines wrongly where they end in two bytes.
	text = bytes.ReplaceAll(text, []byte("\r\n"), []byte("\n"))
	file, err := parser.ParseBytes(text, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		at, says := start, err.Error()
		var located yaml.Error
		if errors.As(err, &located) {
			says = located.GetMessage()
			if token := located.GetToken(); token != nil && token.Position != nil {
				at = position{token.Position.Line, token.Position.Column}
			}
		}
		if strings.Contains(says, "'\t'") {
			says = "a tab: YAML indents with spaces"
		}
		if strings.Contains(says, "invalid key for this map") {
			says += ": put a text that has colons or brackets in quotes"
		}
		unreadable(at, "not YAML: %s", says)
		return
	}
	var body ast.Node
	for _, doc := range file.Docs {
		switch {
		case doc.Body == nil:
		case doc.Body.Type() == ast.DirectiveType:
			unreadable(positionOf(doc.Body), "directives are not supported: leave the line out")
			return
		case body != nil:
			unreadable(positionOf(doc.Body), "a second document: a configuration is one")
			return
		default:
			body = doc.Body
		}
	}
	if body != nil {
		c.decode(body, dst, "")
	}
}

// deepest is how many brackets may be open at once. The library recurses into
// each, so a file of nothing else would exhaust the stack.
const deepest = 64

// mostSteps bounds the library's work: its time grows with the square of the keys
// of one section, and this is what 10,000 of them cost, one second or two.
const mostSteps = 10000 * 10000 / 2

// overloaded returns the line on which the text asks too much of the library, and
// what that is: more than deepest brackets, braces or spaces of indentation
// beyond all reason, or too many keys beside each other. It does not know what
// is quoted: no setting holds that many brackets or lines.
func overloaded(text []byte) (line int, what string) {
	line, depth, indent, leading := 1, 0, 0, true
	var beside [8*deepest + 1]int // lines, by their indentation, since one that was indented less
	steps := 0
	for _, b := range text {
		switch b {
		case '\n':
			line, indent, leading = line+1, 0, true
			continue
		case '[', '{':
			depth++
		case ']', '}':
			depth = max(depth-1, 0)
		}
		if depth > deepest || indent >= 8*deepest {
			return line, "nested too deeply"
		}
		// "- - - -" and "? ? ?" nest within one line.
		switch {
		case !leading:
		case b == ' ' || b == '?':
			indent++
		case b == '-':
			indent++
			clear(beside[indent:])
		default:
			leading = false
			beside[indent]++
			clear(beside[indent+1:])
			if steps += beside[indent]; steps > mostSteps {
				return line, "too many keys in one section: this is not a configuration"
			}
		}
	}
	return 0, ""
}

// invalidText returns the line of the first byte that is not UTF-8.
func invalidText(text []byte) (line int, ok bool) {
	if utf8.Valid(text) {
		return 0, false
	}
	line = 1
	for len(text) > 0 {
		r, size := utf8.DecodeRune(text)
		if r == utf8.RuneError && size == 1 {
			break
		}
		if r == '\n' {
			line++
		}
		text = text[size:]
	}
	return line, true
}

// positionOf is where a node begins.
func positionOf(node ast.Node) position {
	switch n := node.(type) {
	case *ast.MappingNode:
		// The token of a block mapping is its first colon.
		if !n.IsFlowStyle && len(n.Values) > 0 {
			return positionOf(n.Values[0].Key)
		}
	case *ast.MappingValueNode:
		return positionOf(n.Key)
	}
	if token := node.GetToken(); token != nil && token.Position != nil {
		return position{token.Position.Line, token.Position.Column}
	}
	return position{1, 1}
}

var (
	durationType = reflect.TypeFor[time.Duration]()
	addrType     = reflect.TypeFor[netip.Addr]()
	prefixType   = reflect.TypeFor[netip.Prefix]()
	addrPortType = reflect.TypeFor[netip.AddrPort]()
)

// decode puts a node into dst. It can fill
//
//   - time.Duration ("10s"), netip.Addr, netip.Prefix (a single address is a
//     range of one), netip.AddrPort (":9100" is port 9100 on every address);
//   - every type with UnmarshalText, whose error ends the line of the problem;
//   - strings, booleans, whole numbers, numbers;
//   - structs, pointers, lists, and maps from strings to any of these.
func (c *Check) decode(node ast.Node, dst reflect.Value, key string) {
	at := positionOf(node)
	switch n := node.(type) {
	case *ast.AliasNode:
		if n.Value != nil && strings.HasPrefix(n.Value.String(), ".") { // no name that an anchor has
			c.problem(at, key, "%s: a text that begins with * has to be in quotes", quoted("*"+n.Value.String()))
			return
		}
		c.problem(at, key, "%v", errAnchors)
		return
	case *ast.AnchorNode, *ast.MergeKeyNode:
		c.problem(at, key, "%v", errAnchors)
		return
	case *ast.TagNode:
		c.problem(at, key, "%v", errTags)
		return
	case *ast.NullNode:
		return
	}
	if dst.Kind() == reflect.Pointer {
		// Not into what the default points at: others may hold it.
		fresh := reflect.New(dst.Type().Elem())
		if !dst.IsNil() {
			fresh.Elem().Set(dst.Elem())
		}
		c.decode(node, fresh.Elem(), key)
		dst.Set(fresh)
		return
	}
	c.at[key] = at
	if readsText(dst.Type()) {
		text, ok := textOf(node)
		if !ok {
			c.problem(at, key, "want a single value, have %s%s", kindOf(node), unquoted(node))
			return
		}
		if err := setText(dst, text); err != nil {
			c.problem(at, key, "%v", err)
		}
		return
	}
	switch dst.Kind() {
	case reflect.Struct:
		c.decodeStruct(node, dst, key)
	case reflect.Map:
		c.decodeMap(node, dst, key)
	case reflect.Slice:
		c.decodeList(node, dst, key)
	default:
		c.decodeScalar(node, dst, key)
	}
}

// entries are the keys and values of a mapping, without those that cannot be
// a key and those given twice, which are problems.
func (c *Check) entries(node ast.Node, key string) (names []string, values []*ast.MappingValueNode, ok bool) {
	mapping, ok := node.(ast.MapNode)
	if !ok {
		c.problem(positionOf(node), key, "want keys and values, have %s", kindOf(node))
		return nil, nil, false
	}
	lines := map[string]int{}
	for i := mapping.MapRange(); i.Next(); {
		value := i.KeyValue()
		at := positionOf(value.Key)
		if value.Key.IsMergeKey() {
			c.problem(at, key, "%v", errAnchors)
			continue
		}
		name, ok := textOf(value.Key)
		if !ok {
			c.problem(at, key, "a key must be a single word")
			continue
		}
		if line, twice := lines[name]; twice {
			c.problem(at, join(key, name), "given twice, first on line %d: keep one", line)
			continue
		}
		lines[name] = at.line
		names = append(names, name)
		values = append(values, value)
	}
	return names, values, true
}

func (c *Check) decodeStruct(node ast.Node, dst reflect.Value, key string) {
	fields := map[string]int{}
	for i := range dst.NumField() {
		name, _, _ := strings.Cut(dst.Type().Field(i).Tag.Get("yaml"), ",")
		if name == "" {
			panic(fmt.Sprintf("config: field %s of %s has no yaml tag", dst.Type().Field(i).Name, dst.Type()))
		}
		if name != "-" {
			fields[name] = i
		}
	}
	names, values, ok := c.entries(node, key)
	if !ok {
		return
	}
	for i, name := range names {
		field, known := fields[name]
		if !known {
			c.unknown(positionOf(values[i].Key), key, name, slices.Sorted(maps.Keys(fields)))
			continue
		}
		c.decode(values[i].Value, dst.Field(field), join(key, name))
	}
}

func (c *Check) decodeMap(node ast.Node, dst reflect.Value, key string) {
	if dst.Type().Key().Kind() != reflect.String {
		panic(fmt.Sprintf("config: %s at %s: keys must be strings", dst.Type(), key))
	}
	names, values, ok := c.entries(node, key)
	if !ok {
		return
	}
	filled := reflect.MakeMapWithSize(dst.Type(), len(names))
	for i, name := range names {
		value := reflect.New(dst.Type().Elem()).Elem()
		c.decode(values[i].Value, value, join(key, name))
		filled.SetMapIndex(reflect.ValueOf(name).Convert(dst.Type().Key()), value)
	}
	dst.Set(filled)
}

func (c *Check) decodeList(node ast.Node, dst reflect.Value, key string) {
	list, ok := node.(*ast.SequenceNode)
	if !ok {
		c.problem(positionOf(node), key, "want a list, have %s: write [it] or put it after a dash", kindOf(node))
		return
	}
	filled := reflect.MakeSlice(dst.Type(), len(list.Values), len(list.Values))
	for i, value := range list.Values {
		at := fmt.Sprintf("%s[%d]", key, i)
		if value.Type() == ast.NullType {
			c.problem(positionOf(value), at, "an empty entry: fill it in or take it out")
			continue
		}
		c.decode(value, filled.Index(i), at)
	}
	dst.Set(filled)
}

func (c *Check) decodeScalar(node ast.Node, dst reflect.Value, key string) {
	at := positionOf(node)
	text, single := textOf(node)
	number := node.Type() == ast.IntegerType
	wrong := func(want string) {
		if single {
			c.problem(at, key, "%s: want %s", quoted(text), want)
		} else {
			c.problem(at, key, "want %s, have %s%s", want, kindOf(node), unquoted(node))
		}
	}
	// 010 is 8 to some readers of YAML and 10 to others.
	octal := len(text) > 1 && strings.TrimLeft(text, "+-")[0] == '0' && strings.Trim(text, "+-0123456789") == "" && strings.Trim(text, "+-0") != ""
	switch kind := dst.Kind(); kind {
	case reflect.String:
		if !single {
			wrong("a text")
			return
		}
		if control(strings.NewReplacer("\n", "", "\t", "").Replace(text)) { // several lines may be meant
			c.problem(at, key, "%v", errControl)
			return
		}
		dst.SetString(text)
	case reflect.Bool:
		value, ok := node.(*ast.BoolNode)
		if !ok {
			wrong("true or false")
			return
		}
		dst.SetBool(value.Value)
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		bits := dst.Type().Bits()
		value, err := strconv.ParseInt(text, 0, bits)
		if !number || octal || err != nil {
			wrong(fmt.Sprintf("a whole number from %d to %d", int64(-1)<<(bits-1), int64(1)<<(bits-1)-1))
			return
		}
		dst.SetInt(value)
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		bits := dst.Type().Bits()
		value, err := strconv.ParseUint(text, 0, bits)
		if !number || octal || err != nil {
			wrong(fmt.Sprintf("a whole number from 0 to %d", uint64(math.MaxUint64)>>(64-bits)))
			return
		}
		dst.SetUint(value)
	case reflect.Float32, reflect.Float64:
		value, err := strconv.ParseFloat(text, dst.Type().Bits())
		if !number && node.Type() != ast.FloatType || octal || err != nil {
			wrong("a number")
			return
		}
		dst.SetFloat(value)
	default:
		panic(fmt.Sprintf("config: cannot decode into %s at %s", dst.Type(), key))
	}
}

// readsText says whether a type is filled from one piece of text.
func readsText(t reflect.Type) bool {
	switch t {
	case durationType, addrType, prefixType, addrPortType:
		return true
	}
	return reflect.PointerTo(t).Implements(reflect.TypeFor[encoding.TextUnmarshaler]())
}

// setText fills a value of a type for which readsText.
func setText(dst reflect.Value, text string) error {
	switch dst.Type() {
	case durationType:
		d, err := time.ParseDuration(text)
		if err != nil {
			return fmt.Errorf("%s: want a duration such as 10s, 15m or 1h30m", quoted(text))
		}
		dst.SetInt(int64(d))
	case addrType:
		addr, err := netip.ParseAddr(text)
		if err != nil || addr.Zone() != "" {
			return fmt.Errorf("%s: want an address such as 192.0.2.1 or 2001:db8::1", quoted(text))
		}
		dst.Set(reflect.ValueOf(addr.Unmap()))
	case prefixType:
		prefix, err := decision.ParsePrefix(text)
		if err != nil {
			return fmt.Errorf("%s: want a range such as 10.0.0.0/8 or 2001:db8::/32, or an address", quoted(text))
		}
		dst.Set(reflect.ValueOf(prefix))
	case addrPortType:
		addrPort, err := parseAddrPort(text)
		if err != nil {
			return err
		}
		dst.Set(reflect.ValueOf(addrPort))
	default:
		return dst.Addr().Interface().(encoding.TextUnmarshaler).UnmarshalText([]byte(text))
	}
	return nil
}

// parseAddrPort reads an address with its port; without the address it stands
// for every address of both families.
func parseAddrPort(text string) (netip.AddrPort, error) {
	full := text
	if strings.HasPrefix(text, ":") {
		full = "[::]" + text
	}
	addrPort, err := netip.ParseAddrPort(full)
	if err != nil || addrPort.Addr().Zone() != "" {
		return netip.AddrPort{}, fmt.Errorf("%s: want an address and a port such as 127.0.0.1:9100, [::1]:9100, or :9100 for every address", quoted(text))
	}
	return netip.AddrPortFrom(addrPort.Addr().Unmap(), addrPort.Port()), nil
}

// textOf is the text of a single value, as it was written.
func textOf(node ast.Node) (string, bool) {
	switch n := node.(type) {
	case *ast.StringNode:
		return n.Value, true
	case *ast.LiteralNode:
		return n.Value.Value, true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
		return n.GetToken().Value, true
	case *ast.MappingNode:
		if !n.IsFlowStyle {
			return torn(n)
		}
	case *ast.MappingValueNode:
		return torn(n)
	}
	return "", false
}

// torn is a text that the library took for a key and its value, as it does with
// 127.0.0.1:80 in a list in braces: to YAML a colon is one only where a space
// follows.
func torn(mapping ast.MapNode) (string, bool) {
	i := mapping.MapRange()
	if !i.Next() {
		return "", false
	}
	entry := i.KeyValue()
	name, single := plainText(entry.Key)
	value, alone := plainText(entry.Value)
	colon := entry.Start
	if !single || !alone || i.Next() || colon.Next == nil || colon.Next.Position.Offset != colon.Position.Offset+1 {
		return "", false
	}
	return name + ":" + value, true
}

// plainText is the text of a single value that stands without quotes.
func plainText(node ast.Node) (string, bool) {
	if node, ok := node.(*ast.StringNode); ok && node.Token.Type != token.StringType {
		return "", false
	}
	return textOf(node)
}

// kindOf names what stands where something else was wanted.
func kindOf(node ast.Node) string {
	switch node.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		return "keys and values"
	case *ast.SequenceNode:
		return "a list"
	}
	if text, ok := textOf(node); ok {
		return quoted(text)
	}
	return "something else"
}

// unquoted is a hint for a text that YAML takes for a key and its value, as it
// does with [127.0.0.1:80]; empty where node can be none.
func unquoted(node ast.Node) string {
	mapping, ok := node.(ast.MapNode)
	if !ok {
		return ""
	}
	for i := mapping.MapRange(); i.Next(); {
		colon := i.KeyValue().Start
		name, single := textOf(i.KeyValue().Key)
		value, alone := textOf(i.KeyValue().Value)
		if single && alone && colon.Next != nil && colon.Next.Position.Offset == colon.Position.Offset+1 {
			return ": put it in quotes, " + quoted(name+":"+value)
		}
	}
	return ""
}

// quoted is a value for a message, short and in one line.
func quoted(text string) string {
	if len(text) > 60 {
		text = strings.ToValidUTF8(text[:60], "") + "..."
	}
	return strconv.Quote(text)
}

func join(key, name string) string {
	if key == "" {
		return name
	}
	return key + "." + name
}

// unknown reports a key that the section does not have, and proposes the one
// that was probably meant: whether that one is there can then not be told.
func (c *Check) unknown(at position, key, name string, known []string) {
	meant := Nearest(name, known)
	if meant == "" {
		c.say(at, key, "unknown key %q: the keys here are %s", name, strings.Join(known, ", "))
		return
	}
	c.failed = append(c.failed, join(key, meant))
	c.say(at, key, "unknown key %q: did you mean %q?", name, meant)
}

// Nearest is the known name that a mistyped or shortened one probably stands
// for, or empty.
func Nearest(name string, known []string) string {
	name = strings.ToLower(name)
	best, least := "", len(name)/4+2
	for _, k := range known {
		d := distance(name, strings.ToLower(k))
		if len(name) > 2 && strings.HasPrefix(strings.ToLower(k), name) {
			d = 1
		}
		if d < least {
			best, least = k, d
		}
	}
	return best
}

// distance is the number of letters to insert, remove or change between a and b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			change := diagonal
			if a[i-1] != b[j-1] {
				change++
			}
			diagonal = row[j]
			row[j] = min(change, row[j]+1, row[j-1]+1)
		}
	}
	return row[len(b)]
}

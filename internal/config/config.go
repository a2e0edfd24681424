// Package config turns a YAML file into a value that needs no more checking.
// It is strict: a key that does not exist, a key given twice, a value of the
// wrong kind are errors, and each says where it stands, what is wrong and how
// to mend it, in one line:
//
//	/etc/edgeward/bouncer.yaml:4:3: lapi: unknown key "intervall": did you mean "interval"?
//
// All that is wrong with a file is said at once. Text becomes durations,
// addresses, ranges and ports here and nowhere later; what one key demands of
// another is the caller's to say, in a check that runs with the rest.
//
// It reads the one file that it is given and nothing else: no environment, no
// second file merged over the first, no variables. Secrets are not in that
// file: a File names where one is, and is read when it is used. YAML's anchors,
// aliases, merge keys, tags and directives are refused, because a setting
// should stand where it is read. The programs under cmd and the packages that
// have settings of their own (internal/crowdsec, bouncer, tunnel) call it.
package config

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"slices"
	"strings"
)

// fileLimit is more than any configuration weighs, that of a VPN with ten
// thousand peers (2 MB) included; longer lists of addresses are sources of
// decisions, not settings.
const fileLimit = 4 << 20

// Problem is one thing that is wrong with a file.
type Problem struct {
	File   string
	Line   int
	Column int
	// What says what is wrong and how to mend it.
	What string
}

// String is FILE:LINE:COLUMN: what, in one line.
func (p Problem) String() string {
	return fmt.Sprintf("%s:%d:%d: %s", p.File, p.Line, p.Column, p.What)
}

// Problems is the error for a file that was read and is wrong, in the order of
// its lines.
type Problems []Problem

// Error has one line for each problem.
func (ps Problems) Error() string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

// Load reads the file at path into a copy of defaults, as Parse does.
func Load[T any](path string, defaults T, check func(*T, *Check)) (T, error) {
	f, err := os.Open(path)
	if err != nil {
		return defaults, fmt.Errorf("read configuration: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, fileLimit+1))
	if err != nil {
		return defaults, fmt.Errorf("read configuration: %w", err)
	}
	return Parse(path, text, defaults, check)
}

// Parse reads text, the content of the file called name, into a copy of
// defaults: keys that are not there, or have no value, keep the default; lists
// and maps that are there replace it. T is a struct whose fields have yaml
// tags; what they may hold is told at decode. The error is of type Problems.
//
// check, if any, sees the whole value, with defaults where the file is wrong,
// and reports what does not fit together.
func Parse[T any](name string, text []byte, defaults T, check func(*T, *Check)) (T, error) {
	value := defaults
	c := &Check{file: name, at: map[string]position{}}
	c.read(text, reflect.ValueOf(&value).Elem())
	// After a syntax error nothing is known of the values: to find fault with
	// the defaults would only distract.
	if check != nil && !c.unreadable {
		check(&value, c)
	}
	if len(c.problems) > 0 {
		slices.SortStableFunc(c.problems, func(a, b Problem) int {
			return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
		})
		return defaults, c.problems
	}
	return value, nil
}

// position is a place in the file.
type position struct{ line, column int }

// Check takes in what is wrong with a file and knows where its keys stand. A
// key is written as in the problems: lapi.url, services[2].port.
type Check struct {
	file       string
	at         map[string]position // keys that are in the file
	failed     []string            // keys that have a problem
	problems   Problems
	unreadable bool
}

// Has says whether the file gives the key a value.
func (c *Check) Has(key string) bool {
	_, ok := c.at[key]
	return ok
}

// Line is the line on which a key stands, or the nearest key around it.
func (c *Check) Line(key string) int {
	return c.place(key).line
}

func (c *Check) place(key string) position {
	for ; key != ""; key = parent(key) {
		if at, ok := c.at[key]; ok {
			return at
		}
	}
	return position{1, 1}
}

// Fail reports what is wrong with a key, at its place, or where it is missing
// at that of the nearest key around it. A key whose value could not even be
// read has had its problem; Fail then adds nothing.
func (c *Check) Fail(key, format string, args ...any) {
	for _, failed := range c.failed {
		if within(failed, key) || within(key, failed) {
			return
		}
	}
	c.problem(c.place(key), key, format, args...)
}

// problem reports what is wrong with the value of a key.
func (c *Check) problem(at position, key, format string, args ...any) {
	if key != "" {
		c.failed = append(c.failed, key)
	}
	c.say(at, key, format, args...)
}

func (c *Check) say(at position, key, format string, args ...any) {
	what := fmt.Sprintf(format, args...)
	if key != "" {
		what = key + ": " + what
	}
	// One line each, whatever a file or a library says.
	what = strings.Join(strings.FieldsFunc(what, func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
	c.problems = append(c.problems, Problem{c.file, at.line, at.column, what})
}

// within says whether a key is another or stands in it.
func within(key, other string) bool {
	rest, ok := strings.CutPrefix(key, other)
	return ok && (rest == "" || rest[0] == '.' || rest[0] == '[')
}

// parent is the key around a key, empty at the top.
func parent(key string) string { return key[:max(strings.LastIndexAny(key, ".["), 0)] }

// errAnchors and errTags are for what YAML has and this package does not.
var (
	errAnchors = errors.New("anchors, aliases and merge keys are not supported: write the value out")
	errTags    = errors.New("tags are not supported: leave it out")
)

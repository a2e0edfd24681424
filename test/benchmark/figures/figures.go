// Package figures is what the benchmarks share: who uses the machine meanwhile,
// how figures become Markdown, and where a document keeps it. It measures nothing
// of edgeward itself, and judges nothing. The programs in the directories above
// and beside it call it.
package figures

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Table writes a Markdown table; the first row is its head.
func Table(rows [][]string) string {
	var b strings.Builder
	for i, row := range rows {
		fmt.Fprintf(&b, "| %s |\n", strings.Join(row, " | "))
		if i == 0 {
			b.WriteString("|---" + strings.Repeat("|---:", len(row)-1) + "|\n")
		}
	}
	return b.String()
}

// Spread is the middle, least and most of some figures.
type Spread[T cmp.Ordered] struct{ Median, Least, Most T }

// SpreadOf returns the spread of at least one figure.
func SpreadOf[T interface{ ~int64 | ~float64 }](all []T) Spread[T] {
	all = slices.Sorted(slices.Values(all))
	middle := all[len(all)/2]
	if len(all)%2 == 0 {
		middle = (all[len(all)/2-1] + middle) / 2
	}
	return Spread[T]{middle, all[0], all[len(all)-1]}
}

// Held is the word for whether a goal was reached.
func Held(ok bool) string {
	if ok {
		return "held"
	}
	return "missed"
}

// Thousands writes 15000 as 15,000.
func Thousands(n int) string {
	text := strconv.Itoa(n)
	for i := len(text) - 3; i > 0 && text[i-1] != '-'; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

// WriteReadme rewrites what stands between the marks called name, <!-- name -->
// and <!-- /name -->, in docs/benchmarks.md of the repository at root.
func WriteReadme(root, name, text string) error {
	path := filepath.Join(root, "docs", "benchmarks.md")
	document, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("rewrite the figures: %w", err)
	}
	if document, err = ReplaceBlock(document, name, text); err != nil {
		return fmt.Errorf("rewrite the figures: %w", err)
	}
	if err := os.WriteFile(path, document, 0o644); err != nil {
		return fmt.Errorf("rewrite the figures: %w", err)
	}
	return nil
}

// ReplaceBlock puts text between the marks of a document.
func ReplaceBlock(document []byte, name, text string) ([]byte, error) {
	begin, end := "<!-- "+name+" -->", "<!-- /"+name+" -->"
	before, rest, ok := bytes.Cut(document, []byte(begin+"\n"))
	if !ok {
		return nil, fmt.Errorf("it has no %s", begin)
	}
	_, after, ok := bytes.Cut(rest, []byte(end))
	if !ok {
		return nil, fmt.Errorf("it has no %s", end)
	}
	return slices.Concat(before, []byte(begin+"\n"), []byte(strings.TrimSpace(text)+"\n"), []byte(end), after), nil
}

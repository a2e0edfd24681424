package main

import (
	"strings"
	"testing"

	"rsc.io/qr/coding"
)

// TestQRSaysTheText reads the code off the screen again, as a scanner does.
func TestQRSaysTheText(t *testing.T) {
	for name, text := range map[string]string{
		"short":    "[Interface]\nPrivateKey = aGVsbG8=\n",
		"a config": "[Interface]\nPrivateKey = " + strings.Repeat("k", 44) + "\nAddress = 10.66.0.10/32, fd66::10/128\n" + strings.Repeat("AllowedIPs = 10.66.0.0/24, fd66::/64\n", 12),
	} {
		screen, lines, err := drawQR(text, 0)
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(screen, "\n"); n != lines {
			t.Errorf("%s: takes %d lines, and says %d", name, n, lines)
		}
		dark := offScreen(t, screen)
		size := len(dark[0]) - 2*quiet
		for y, row := range dark {
			for x, black := range row {
				if black && (x < quiet || y < quiet || x >= size+quiet || y >= size+quiet) {
					t.Fatalf("%s: the quiet zone is dark at %d, %d", name, x, y)
				}
			}
		}
		if got := scan(t, size, func(x, y int) bool { return dark[y+quiet][x+quiet] }); got != text {
			t.Errorf("%s: says %q, want %q", name, got, text)
		}
		if _, _, err := drawQR(text, size+2*quiet); err != nil {
			t.Error(err)
		}
		if _, _, err := drawQR(text, size+2*quiet-1); err == nil || !strings.Contains(err.Error(), "make it wider") {
			t.Errorf("%s: drawn where it does not fit: %v", name, err)
		}
	}
	if _, _, err := drawQR(strings.Repeat("x", 3000), 0); err == nil {
		t.Error("draws what no code can hold")
	}
}

// offScreen makes modules of what is on the screen, true for dark ones. It takes
// no more than a white line as well as the last: a code has an odd size.
func offScreen(t *testing.T, screen string) [][]bool {
	t.Helper()
	var dark [][]bool
	for line := range strings.Lines(screen) {
		text, ok := strings.CutPrefix(strings.TrimSuffix(line, usual+"\n"), blackOnWhite)
		if !ok {
			t.Fatalf("the line %q is not black on white", line)
		}
		var upper, lower []bool
		for _, c := range text {
			switch c {
			case '█':
				upper, lower = append(upper, true), append(lower, true)
			case '▀':
				upper, lower = append(upper, true), append(lower, false)
			case '▄':
				upper, lower = append(upper, false), append(lower, true)
			case ' ':
				upper, lower = append(upper, false), append(lower, false)
			default:
				t.Fatalf("%q is no half block", c)
			}
		}
		dark = append(dark, upper, lower)
	}
	return dark
}

// scan reads the text of a code in byte mode at level L, of which mask 0 is the
// only one that the encoder uses. Nothing is mended: a screen loses no module.
func scan(t *testing.T, size int, dark func(x, y int) bool) string {
	t.Helper()
	version := coding.Version((size - 17) / 4)
	plan, err := coding.NewPlan(version, coding.L, 0)
	if err != nil {
		t.Fatal(err)
	}
	bits := make([]byte, plan.DataBytes*8)
	for y, row := range plan.Pixel {
		for x, p := range row {
			switch p.Role() {
			case coding.Data:
				bits[p.Offset()] = 0
				if dark(x, y) != (p&coding.Invert != 0) {
					bits[p.Offset()] = 1
				}
			case coding.Check, coding.Extra:
			default: // what finds and describes the code
				if dark(x, y) != (p&coding.Black != 0) {
					t.Fatalf("module %d, %d is wrong", x, y)
				}
			}
		}
	}
	number := func(n int) (v int) {
		for _, b := range bits[:n] {
			v = v<<1 | int(b)
		}
		bits = bits[n:]
		return v
	}
	if mode := number(4); mode != 4 {
		t.Fatalf("the mode is %d, want bytes", mode)
	}
	lengthBits := 8
	if version > 9 {
		lengthBits = 16
	}
	text := make([]byte, number(lengthBits))
	for i := range text {
		text[i] = byte(number(8))
	}
	return string(text)
}

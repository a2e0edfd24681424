package main

import (
	"fmt"
	"io"
	"strings"

	"golang.org/x/sys/unix"
	"rsc.io/qr"
)

// quiet is how many light modules a scanner wants around a code.
const quiet = 4

// The code brings its own black and white: a scanner fails on one that is light
// on dark, as it would be in the colours of many terminals.
const (
	blackOnWhite = "\x1b[38;5;16;48;5;231m"
	usual        = "\x1b[0m"
)

// drawQR returns text as a QR code for a terminal, two modules to a character,
// and how many lines it takes. columns is how wide the terminal is, or 0 if nobody
// knows; a code that does not fit is an error, because a wrapped one cannot be
// scanned.
func drawQR(text string, columns int) (screen string, lines int, err error) {
	code, err := qr.Encode(text, qr.L) // a screen has no scratches
	if err != nil {
		return "", 0, fmt.Errorf("draw QR code: %w: do without, with --qr never", err)
	}
	if width := code.Size + 2*quiet; columns > 0 && width > columns {
		return "", 0, fmt.Errorf("draw QR code: it takes %d columns, and the terminal has %d: make it wider, or its letters smaller, or do without, with --qr never", width, columns)
	}
	var b strings.Builder
	for y := -quiet; y < code.Size+quiet; y += 2 {
		b.WriteString(blackOnWhite)
		for x := -quiet; x < code.Size+quiet; x++ {
			// Outside of the code all is light.
			switch upper, lower := code.Black(x, y), code.Black(x, y+1); {
			case upper && lower:
				b.WriteString("█")
			case upper:
				b.WriteString("▀")
			case lower:
				b.WriteString("▄")
			default:
				b.WriteString(" ")
			}
		}
		b.WriteString(usual + "\n")
		lines++
	}
	return b.String(), lines, nil
}

// terminal returns the size of the terminal at w, in characters, and whether there
// is one; a terminal that does not tell its size has 0.
func terminal(w io.Writer) (columns, lines int, ok bool) {
	file, ok := w.(interface{ Fd() uintptr })
	if !ok {
		return 0, 0, false
	}
	size, err := unix.IoctlGetWinsize(int(file.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0, 0, false
	}
	return int(size.Col), int(size.Row), true
}

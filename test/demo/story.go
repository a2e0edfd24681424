package main

import (
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"time"
)

// width is the number of columns that a line of the story keeps to.
const width = 80

// story prints the storyboard as it happens. A step is its title, then commands
// and what came of each:
//
//	2  A ban, and its end
//	    cscli decisions add --ip 127.0.0.3 --duration 4h
//	 ok 403 for it                                                     640 ms
type story struct {
	out                    io.Writer
	bold, good, bad, plain string // escape sequences, or nothing
}

// newStory colours only a terminal, and none that asks not to.
func newStory(out io.Writer) *story {
	s := &story{out: out}
	file, ok := out.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return s
	}
	if info, err := file.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
		s.bold, s.good, s.bad, s.plain = "\x1b[1m", "\x1b[32m", "\x1b[1;31m", "\x1b[0m"
	}
	return s
}

// say prints lines as they are.
func (s *story) say(format string, args ...any) {
	fmt.Fprintf(s.out, format+"\n", args...)
}

func (s *story) title(n int, title string) {
	s.say("\n%s%d  %s%s", s.bold, n, title, s.plain)
}

// does prints a command that the user could type, or what is done instead.
func (s *story) does(command string) { s.say("    %s", command) }

// held prints what came, as it should, and the time that it took.
func (s *story) held(took time.Duration, format string, args ...any) {
	s.say("%s ok%s %-*s %9s", s.good, s.plain, width-14, fmt.Sprintf(format, args...), spoken(took))
}

// shows prints what a result consists of, below it.
func (s *story) shows(format string, args ...any) { s.say("       "+format, args...) }

// gaps are what is between the columns of a table.
var gaps = regexp.MustCompile(` {3,}`)

// colours are the escape sequences that choose them.
var colours = regexp.MustCompile(`\x1b\[[0-9;]*m`)

// draws prints a line of a picture, without colours where the story has none.
func (s *story) draws(line string) {
	if s.plain == "" {
		line = colours.ReplaceAllString(line, "")
	}
	s.say("%s", line)
}

// quotes prints what a command wrote, and folds what is wider than the story.
func (s *story) quotes(text string) {
	const room = width - 7 // as shows indents
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, " \n")
		if len(line) > room {
			line = gaps.ReplaceAllString(line, "  ") // columns are lost anyway
		}
		for first := true; line != ""; first = false {
			if !first {
				line = "  " + line
			}
			rest := ""
			if len(line) > room {
				if at := strings.LastIndexByte(line[:room+1], ' '); at > 2 {
					line, rest = strings.TrimRight(line[:at], " "), strings.TrimLeft(line[at:], " ")
				}
			}
			s.shows("%s", line)
			line = rest
		}
	}
}

// failed prints why a step did not hold, as long as that may be.
func (s *story) failed(err error) {
	s.say("%s FAILED%s %s", s.bad, s.plain, strings.ReplaceAll(err.Error(), "\n", "\n        "))
}

// spoken is a duration as one would say it.
func spoken(d time.Duration) string {
	switch {
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

package tunnel

import (
	"os"
	"strings"
)

// SocketOf is where the program that runs by the file at path is asked, as far as
// that can be told of a file that may be wrong or gone: what a line with the key
// socket says, or else where it is by default. It is for questions about how a
// running program fares with such a file; all else takes the socket of Load.
func SocketOf(path string) string {
	socket := Defaults().Socket
	text, err := os.ReadFile(path)
	if err != nil {
		return socket
	}
	for line := range strings.Lines(string(text)) {
		value, ok := strings.CutPrefix(line, "socket:")
		if !ok {
			continue
		}
		value, _, _ = strings.Cut(value, " #")
		if value = strings.Trim(strings.TrimSpace(value), `"'`); strings.HasPrefix(value, "/") {
			socket = value
		}
	}
	return socket
}

package daemon

import (
	"fmt"
	"io"
	"log/slog"
	"strings"
)

// levelVariable is the one environment variable that edgeward reads.
const levelVariable = "EDGEWARD_LOG_LEVEL"

// NewLog makes the process's log, written to w in one line per record: JSON,
// or with format "text" the form that is easier on the eye. getenv is
// os.Getenv, where EDGEWARD_LOG_LEVEL may say debug, info, warn or error.
func NewLog(w io.Writer, format string, getenv func(string) string) (*slog.Logger, error) {
	var level slog.Level
	switch word := getenv(levelVariable); strings.ToLower(word) {
	case "", "info":
	case "debug":
		level = slog.LevelDebug
	case "warn":
		level = slog.LevelWarn
	case "error":
		level = slog.LevelError
	default:
		return nil, fmt.Errorf("read %s %q: want debug, info, warn or error", levelVariable, word)
	}
	options := &slog.HandlerOptions{Level: level, ReplaceAttr: readable}
	switch format {
	case "", "json":
		return slog.New(slog.NewJSONHandler(w, options)), nil
	case "text":
		return slog.New(slog.NewTextHandler(w, options)), nil
	}
	return nil, fmt.Errorf("read log format %q: want json or text", format)
}

// readable writes errors in one line, and times that pass as people do.
func readable(_ []string, a slog.Attr) slog.Attr {
	switch {
	case a.Value.Kind() == slog.KindDuration:
		a.Value = slog.StringValue(a.Value.Duration().String())
	case a.Value.Kind() == slog.KindAny:
		if err, ok := a.Value.Any().(error); ok {
			a.Value = slog.StringValue(OneLine(err))
		}
	}
	return a
}

// OneLine is what an error says, in one line where several were joined.
func OneLine(err error) string {
	lines := strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' || r == '\r' })
	return strings.Join(lines, "; ")
}

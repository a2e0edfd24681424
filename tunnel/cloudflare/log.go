package cloudflare

import (
	"context"
	"encoding/json"
	"log/slog"

	"github.com/rs/zerolog"
)

// libraryLog hands what cloudflared logs to log, as debug messages: what matters
// of it is reported here in our own words, and one failed request is no error
// of ours.
func libraryLog(log *slog.Logger) *zerolog.Logger {
	if !log.Enabled(context.Background(), slog.LevelDebug) {
		l := zerolog.Nop()
		return &l
	}
	l := zerolog.New(libraryWriter{log})
	return &l
}

type libraryWriter struct{ log *slog.Logger }

func (w libraryWriter) Write(line []byte) (int, error) {
	fields := map[string]any{}
	if err := json.Unmarshal(line, &fields); err != nil {
		fields["message"] = string(line)
	}
	w.log.Debug("cloudflared", "said", fields)
	return len(line), nil
}

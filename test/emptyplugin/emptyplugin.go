// Package emptyplugin is a Traefik plugin that does nothing but call the next
// handler. The benchmark measures what being a plugin costs by it, and the
// bench's own tests load it.
package emptyplugin

import (
	"context"
	"errors"
	"net/http"
)

// Config is the middleware's configuration.
type Config struct {
	// Fail makes New fail, to see how Traefik reports it.
	Fail bool
}

// CreateConfig returns the default configuration.
func CreateConfig() *Config { return &Config{} }

type handler struct{ next http.Handler }

// New returns a handler that calls next.
func New(_ context.Context, next http.Handler, config *Config, _ string) (http.Handler, error) {
	if config.Fail {
		return nil, errors.New("build the empty plugin: told to fail")
	}
	return &handler{next: next}, nil
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) { h.next.ServeHTTP(w, r) }

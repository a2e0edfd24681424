// Package ext stands in for the extension point that Traefik's module archive
// leaves out: two empty structs that its dynamic configuration embeds.
package ext

// HTTP extends the HTTP service configuration with nothing.
type HTTP struct{}

// Router extends the router configuration with nothing.
type Router struct{}

package api

import "github.com/edgeward/edgeward/internal/config"

// Settings are what a Keeper works by.
type Settings struct {
	URL     string
	Account string
	// TunnelToken holds the token for tunnels; without it none is made, and only
	// those whose ID is known get records.
	TunnelToken config.File
	// ZoneTokens hold a token for each zone, by its name.
	ZoneTokens map[string]config.File
	// Unread says why the id of a tunnel that has a token or credentials file is
	// not known, by the tunnel's name.
	Unread  map[string]error
	Desired Desired
}

package api

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/google/uuid"

	"github.com/edgeward/edgeward/internal/config"
	"github.com/edgeward/edgeward/tunnel"
)

// From takes the settings out of tunnel.yaml. It reads the id of a tunnel out of
// the token or credentials file that was given for it; a file that cannot be
// read is an error, unless there is no section cloudflare, and the settings are
// good without that id.
func From(c *tunnel.Config) (Settings, error) {
	f := c.Cloudflare
	s := Settings{
		URL:         f.URL,
		Account:     f.Account,
		TunnelToken: f.TunnelTokenFile,
		ZoneTokens:  map[string]config.File{},
		Unread:      map[string]error{},
		Desired:     Desired{Owner: f.Owner, Policy: Policy(f.Policy)},
	}
	var errs []error
	for _, t := range c.Tunnels {
		want := Tunnel{Name: t.Name}
		if file := t.TokenFile + t.CredentialsFile; file != "" {
			var err error
			if want.ID, err = tunnelID(file); err != nil {
				s.Unread[t.Name] = fmt.Errorf("read the id of tunnel %s: %w", t.Name, err)
				if f.Enabled() {
					errs = append(errs, s.Unread[t.Name])
				}
				continue // not made by its name: it is another that is meant
			}
		}
		s.Desired.Tunnels = append(s.Desired.Tunnels, want)
	}
	for _, h := range c.PublicHosts() {
		s.Desired.Hosts = append(s.Desired.Hosts, Host{Name: string(h.Host), Tunnel: h.Tunnel})
	}
	for _, h := range c.InternalHosts {
		s.Desired.Internal = append(s.Desired.Internal, string(h))
	}
	for _, h := range c.Hosts {
		if h.Exposure == tunnel.Internal {
			s.Desired.Internal = append(s.Desired.Internal, string(h.Host))
		}
	}
	for _, z := range f.Zones {
		s.Desired.Zones = append(s.Desired.Zones, string(z.Name))
		s.ZoneTokens[string(z.Name)] = z.TokenFile
	}
	for _, h := range f.Adopt {
		s.Desired.Adopt = append(s.Desired.Adopt, string(h))
	}
	for _, h := range f.Relinquish {
		s.Desired.Relinquish = append(s.Desired.Relinquish, string(h))
	}
	slices.Sort(s.Desired.Internal)
	return s, errors.Join(errs...)
}

// readSecret reads a file with a token; the error says what to do where that is
// plain.
func readSecret(file config.File) (config.Secret, error) {
	text, err := file.Read()
	switch {
	case errors.Is(err, fs.ErrPermission):
		err = fmt.Errorf("%w: run this as a user who may read it, such as root", err)
	case errors.Is(err, fs.ErrNotExist):
		err = fmt.Errorf("%w: make it, or mend its name in the configuration", err)
	}
	return text, err
}

// tunnelID reads the id out of a token, which is a credentials file in base64
// with short names, or of a credentials file. The errors repeat nothing of it.
func tunnelID(file config.File) (string, error) {
	text, err := readSecret(file)
	if err != nil {
		return "", err
	}
	plain := []byte(text.Reveal())
	if !strings.HasPrefix(text.Reveal(), "{") {
		if plain, err = base64.StdEncoding.DecodeString(text.Reveal()); err != nil {
			return "", fmt.Errorf("read %s: it holds neither a tunnel's token nor its credentials", file)
		}
	}
	var holds struct {
		Token       string `json:"t"`
		Credentials string `json:"TunnelID"`
	}
	_ = json.Unmarshal(plain, &holds) // what it does not hold is missed below
	id, err := uuid.Parse(holds.Token + holds.Credentials)
	if err != nil {
		return "", fmt.Errorf("read %s: it names no tunnel", file)
	}
	return id.String(), nil
}

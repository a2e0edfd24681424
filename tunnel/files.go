package tunnel

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/edgeward/edgeward/internal/config"
	"github.com/edgeward/edgeward/tunnel/wireguard"
)

// CheckFiles reads the files that c names for a role, on this machine and as this
// user, and says what is wrong with each: that it is missing, or is not what it
// should be. ofTunnel reads the credentials of a tunnel, whose form is none of this
// package's business.
func (c *Config) CheckFiles(cloudflare, vpn bool, ofTunnel func(TunnelConfig) error) []error {
	var out []error
	note := func(err error) {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			out = append(out, fmt.Errorf("%w: make it, or mend its name in the configuration", err))
		case errors.Is(err, fs.ErrPermission):
			out = append(out, fmt.Errorf("%w: run this as a user who may read it, such as the program's", err))
		case err != nil:
			out = append(out, err)
		}
	}
	if cloudflare {
		if c.hasLAPI {
			for _, err := range c.LAPI.CheckFiles() {
				note(err)
			}
		}
		_, err := readPage(c.Ban.PageFile)
		note(err)
		for _, f := range c.Identity.keys() {
			_, err := f.read()
			note(err)
		}
		_, err = c.Edge.Roots()
		note(err)
		for _, t := range c.Tunnels {
			if t.TokenFile+t.CredentialsFile != "" {
				note(ofTunnel(t))
			}
		}
		said := map[config.File]bool{"": true}
		for _, h := range c.Hosts {
			if file := h.Origin.CAFile; !said[file] {
				said[file] = true
				_, err := authorities("origin.caFile", file)
				note(err)
			}
		}
		note(checkToken("cloudflare.tunnelTokenFile", c.Cloudflare.TunnelTokenFile))
		for _, z := range c.Cloudflare.Zones {
			note(checkToken("token of zone "+string(z.Name), z.TokenFile))
		}
	}
	if vpn && c.hasVPN {
		for _, file := range c.VPN().Files() {
			text, err := file.Read()
			switch {
			case file == c.WireGuard.PrivateKeyFile && errors.Is(err, fs.ErrNotExist):
				continue // it is made at the first start
			case err != nil:
			case file == c.WireGuard.PrivateKeyFile:
				_, err = wireguard.ParsePrivateKey(text.Reveal())
			default:
				_, err = wireguard.ParsePresharedKey(text.Reveal())
			}
			if err != nil {
				err = fmt.Errorf("read %s: %w", file, err)
			}
			note(err)
		}
	}
	return out
}

// checkToken says what is wrong with the file of an API token, which is one word.
func checkToken(key string, file config.File) error {
	if file == "" {
		return nil
	}
	text, err := file.Read()
	switch {
	case err != nil:
		return fmt.Errorf("read %s: %w", key, err)
	case strings.ContainsFunc(text.Reveal(), func(r rune) bool { return r <= ' ' || r > '~' }):
		return fmt.Errorf("read %s: %s holds more than one word: a token has no spaces", key, file)
	}
	return nil
}

// authorities reads certificates to trust.
func authorities(key string, file config.File) (*x509.CertPool, error) {
	text, err := file.Read()
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", key, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(text.Reveal())) {
		return nil, fmt.Errorf("read %s: %s holds no PEM certificate", key, file)
	}
	return pool, nil
}

// Roots are the authorities that verify the edge; nil stands for the system's and
// Cloudflare's.
func (e EdgeConfig) Roots() (*x509.CertPool, error) {
	if e.CAFile == "" {
		return nil, nil
	}
	return authorities("edge.caFile", e.CAFile)
}

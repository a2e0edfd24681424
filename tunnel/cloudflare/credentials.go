package cloudflare

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"regexp"

	"github.com/google/uuid"
)

// Credentials let a connector run one tunnel. They print as the tunnel's id.
type Credentials struct {
	Account string // the account's id, 32 hexadecimal digits
	Tunnel  uuid.UUID
	Secret  []byte
}

// String is the tunnel's id.
func (c Credentials) String() string { return c.Tunnel.String() }

// LogValue is the tunnel's id, so that no log ever shows the secret.
func (c Credentials) LogValue() slog.Value { return slog.StringValue(c.Tunnel.String()) }

// GoString is the tunnel's id too.
func (c Credentials) GoString() string { return "cloudflare.Credentials(" + c.Tunnel.String() + ")" }

func (c Credentials) equal(o Credentials) bool {
	return c.Account == o.Account && c.Tunnel == o.Tunnel && bytes.Equal(c.Secret, o.Secret)
}

// ParseToken reads a tunnel token, the base64 text that Cloudflare's dashboard
// and API show for a tunnel. Errors never quote the text.
func ParseToken(text []byte) (Credentials, error) {
	text = bytes.TrimSpace(text)
	if len(text) == 0 {
		return Credentials{}, errors.New("read tunnel token: it is empty")
	}
	if text[0] == '{' {
		return Credentials{}, errors.New("read tunnel token: this is JSON, as a credentials file holds: name it as one")
	}
	raw := make([]byte, base64.StdEncoding.DecodedLen(len(text)))
	n, err := base64.StdEncoding.Strict().Decode(raw, text)
	if err != nil {
		return Credentials{}, errors.New("read tunnel token: it is not base64: copy the whole token, and nothing but the token")
	}
	var token struct {
		Account string `json:"a"`
		Tunnel  string `json:"t"`
		Secret  []byte `json:"s"`
		// Endpoint is set for tunnels of Cloudflare's separate networks.
		Endpoint string `json:"e"`
	}
	if err := json.Unmarshal(raw[:n], &token); err != nil {
		return Credentials{}, errors.New("read tunnel token: it decodes to something else than a token: copy the whole token")
	}
	if token.Endpoint != "" {
		return Credentials{}, errors.New("read tunnel token: it is for a separate network of Cloudflare's, which is not supported")
	}
	c, err := checked(token.Account, token.Tunnel, token.Secret)
	if err != nil {
		return Credentials{}, fmt.Errorf("read tunnel token: %w", err)
	}
	return c, nil
}

// ParseCredentials reads a credentials file, the JSON that `cloudflared tunnel
// create` writes and the API returns for a new tunnel. Keys that it does not
// know are Cloudflare's to add. Errors never quote the text.
func ParseCredentials(text []byte) (Credentials, error) {
	text = bytes.TrimSpace(text)
	if len(text) == 0 {
		return Credentials{}, errors.New("read credentials file: it is empty")
	}
	if text[0] != '{' {
		return Credentials{}, errors.New("read credentials file: it is not JSON: if it is a tunnel token, name it as one")
	}
	var file struct {
		AccountTag   string
		TunnelSecret []byte
		TunnelID     string
		TunnelName   string
		Endpoint     string
	}
	if err := json.Unmarshal(text, &file); err != nil {
		return Credentials{}, errors.New("read credentials file: it is not the JSON of a tunnel's credentials (AccountTag, TunnelSecret, TunnelID)")
	}
	if file.Endpoint != "" {
		return Credentials{}, errors.New("read credentials file: it is for a separate network of Cloudflare's, which is not supported")
	}
	c, err := checked(file.AccountTag, file.TunnelID, file.TunnelSecret)
	if err != nil {
		return Credentials{}, fmt.Errorf("read credentials file: %w", err)
	}
	return c, nil
}

var accountID = regexp.MustCompile(`^[0-9a-f]{32}$`)

func checked(account, tunnel string, secret []byte) (Credentials, error) {
	if !accountID.MatchString(account) {
		return Credentials{}, errors.New("its account is not 32 hexadecimal digits")
	}
	id, err := uuid.Parse(tunnel)
	if err != nil || id == uuid.Nil || len(tunnel) != 36 {
		return Credentials{}, errors.New("its tunnel is not a UUID")
	}
	// Cloudflare demands 32 bytes at least of those who choose a secret.
	if len(secret) < 32 {
		return Credentials{}, fmt.Errorf("its secret has %d bytes, and a tunnel's has 32 or more", len(secret))
	}
	return Credentials{Account: account, Tunnel: id, Secret: secret}, nil
}

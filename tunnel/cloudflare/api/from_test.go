package api

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/edgeward/edgeward/internal/config"
	"github.com/edgeward/edgeward/tunnel"
)

// TestFrom takes settings out of a whole configuration.
func TestFrom(t *testing.T) {
	w := newWorld(t, "example.org")
	info := w.cloud.AddTunnel(w.account, "token", nil)
	token := w.token("connector", info.Token())
	credentials := w.token("credentials", fmt.Sprintf(`{"AccountTag": %q, "TunnelID": "5F1C7A52-0000-4000-8000-000000000000", "TunnelSecret": "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0"}`, w.account))
	broken := w.token("broken", "aGVsbG8gd29ybGQ=")
	text := fmt.Sprintf(`
tunnels:
  - {name: named}
  - {name: token, tokenFile: %s}
  - {name: credentials, credentialsFile: %s}
  - {name: broken, tokenFile: %s}
  - {name: missing, tokenFile: %s}
hosts:
  - {host: a.example.org, tunnel: named, service: http://a:80}
  - {host: a.example.org, path: /x, tunnel: named, service: http://x:80}
  - {host: "*.example.org", tunnel: token, service: http://b:80}
  - {host: nas.example.org, exposure: internal, service: http://nas:80}
internalHosts: ["*.home.example.org"]
cloudflare:
  account: %s
  owner: home
  policy: sync
  tunnelTokenFile: %s
  zones: [{name: example.org, tokenFile: %s}]
  adopt: [a.example.org]
  relinquish: [b.example.org]
`, token, credentials, broken, filepath.Join(w.dir, "nothing"), w.account, w.want.TunnelToken, w.want.ZoneTokens["example.org"])
	c, err := tunnel.Parse("tunnel.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	got, err := From(&c)
	for _, name := range []string{"broken", "missing"} {
		if got.Unread[name] == nil {
			t.Errorf("why the id of tunnel %s is not known is not said", name)
		}
	}
	got.Unread = nil
	want := Settings{
		URL: tunnel.APIURL, Account: w.account, TunnelToken: w.want.TunnelToken,
		ZoneTokens: map[string]config.File{"example.org": w.want.ZoneTokens["example.org"]},
		Desired: Desired{
			Owner: "home", Policy: Sync,
			Tunnels:  []Tunnel{{Name: "named"}, {Name: "token", ID: info.ID.String()}, {Name: "credentials", ID: "5f1c7a52-0000-4000-8000-000000000000"}},
			Hosts:    []Host{{"*.example.org", "token"}, {"a.example.org", "named"}},
			Internal: []string{"*.home.example.org", "nas.example.org"},
			Adopt:    []string{"a.example.org"}, Relinquish: []string{"b.example.org"},
			Zones: []string{"example.org"},
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if err == nil || !strings.Contains(err.Error(), "read the id of tunnel broken: read "+string(broken)+": it names no tunnel") ||
		!strings.Contains(err.Error(), "read the id of tunnel missing: open ") || strings.Contains(err.Error(), "hello") {
		t.Errorf("the error is %v", err)
	}
}

// TestFromWithoutTheAPI has nobody told of a file that the connector will miss.
func TestFromWithoutTheAPI(t *testing.T) {
	c, err := tunnel.Parse("tunnel.yaml", []byte("tunnels: [{name: main, tokenFile: /nowhere/at/all}]\n"))
	if err != nil {
		t.Fatal(err)
	}
	if s, err := From(&c); err != nil || len(s.Desired.Tunnels) > 0 || len(s.ZoneTokens) > 0 || s.Unread["main"] == nil {
		t.Errorf("%+v, %v", s, err)
	}
}

// FuzzTunnelID reads whatever is in a file that is taken for a token.
func FuzzTunnelID(f *testing.F) {
	f.Add("eyJhIjoiMDEiLCJ0IjoiNWYxYzdhNTItMDAwMC00MDAwLTgwMDAtMDAwMDAwMDAwMDAwIiwicyI6IiJ9")
	f.Add(`{"TunnelID": "5f1c7a52-0000-4000-8000-000000000000"}`)
	f.Add(`{"TunnelID": 7}`)
	path := filepath.Join(f.TempDir(), "token")
	f.Fuzz(func(t *testing.T, text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		id, err := tunnelID(config.File(path))
		if err == nil && (len(id) != 36 || strings.ContainsAny(id, ". \n")) {
			t.Errorf("%q names the tunnel %q", text, id)
		}
	})
}

package tunnel

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const (
	lapiSection = "lapi: {url: http://lapi:8080, keyFile: /k}\n"
	oneTunnel   = "tunnels: [{name: home, tokenFile: /t}]\n"
	small       = lapiSection + oneTunnel + "hosts: [{host: app.example.com, service: http://traefik.kube-system}]\n"
)

func TestConfigFillsIn(t *testing.T) {
	c, err := Parse("tunnel.yaml", []byte(small))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]TunnelConfig{{Name: "home", TokenFile: "/t", Protocol: Auto, Connections: 4}}, c.Tunnels); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]HostConfig{{
		Host: "app.example.com", Tunnel: "home", Service: Service{"http", "traefik.kube-system"}, Fail: "open", Exposure: Public,
		Origin: OriginConfig{ConnectTimeout: 10 * time.Second, Connections: 64},
	}}, c.Hosts); d != "" {
		t.Error(d)
	}
	if !c.HasLAPI() || c.Cloudflare.Enabled() || c.Mode != Enforce {
		t.Errorf("the configuration is %+v", c)
	}
	if d := cmp.Diff([]PublicHost{{Host: "app.example.com", Tunnel: "home", Services: []string{"http://traefik.kube-system"}}}, c.PublicHosts()); d != "" {
		t.Error(d)
	}
}

func TestConfigOfManyParts(t *testing.T) {
	c, err := Parse("tunnel.yaml", []byte(lapiSection+`
tunnels:
  - {name: home, credentialsFile: /c, protocol: http2, connections: 2}
  - {name: made}
hosts:
  - {host: APP.example.com., tunnel: home, service: "https://10.0.0.1:8443/", origin: {serverName: app, grpc: true}, fail: closed}
  - {host: app.example.com, path: /api/, tunnel: home, service: http://api:9000}
  - {host: "*.example.com", tunnel: made, service: http://rest}
  - {host: nas.example.com, service: http://nas, exposure: internal}
internalHosts: ["*.home.example.com"]
cloudflare:
  account: 0123456789abcdef0123456789abcdef
  owner: home
  policy: sync
  tunnelTokenFile: /api
  zones: [{name: example.com, tokenFile: /zone}]
  adopt: [old.example.com]
identity: {keyFile: /key, previousKeyFile: /before}
`))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]PublicHost{
		{Host: "*.example.com", Tunnel: "made", Services: []string{"http://rest"}},
		{Host: "app.example.com", Tunnel: "home", Services: []string{"https://10.0.0.1:8443", "/api http://api:9000"}},
	}, c.PublicHosts()); d != "" {
		t.Error(d)
	}
	if !c.NeedsTrailers("home") || c.NeedsTrailers("made") {
		t.Error("gRPC needs trailers, in its own tunnel")
	}
	if got := strings.Join(c.Warnings(), "\n"); !strings.Contains(got, "*.example.com covers nas.example.com, which is internal") || !strings.Contains(got, "covers *.home.example.com") {
		t.Errorf("the warnings are %s", got)
	}
	if d := cmp.Diff([]string{"/api", "/before", "/c", "/key", "/zone"}, files(&c)); d != "" {
		t.Error(d)
	}
}

func files(c *Config) []string {
	var out []string
	for _, f := range c.Files() {
		out = append(out, string(f))
	}
	return out
}

// TestConfigOfTheVPN has files for the VPN alone, and for both roles.
func TestConfigOfTheVPN(t *testing.T) {
	const vpn = `
wireguard: {addresses: [10.66.0.1/24], endpoint: vpn.example.com}
peers:
  - {name: alice, publicKey: AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=, presharedKeyFile: /psk, groups: [family]}
services: [{name: app, host: app.example.com, addresses: [10.43.0.1], ports: [443/tcp]}]
grants: [{to: [group:family], services: [app]}]
`
	alone, err := Parse("tunnel.yaml", []byte(vpn))
	if err != nil {
		t.Fatal(err)
	}
	if alone.HasTunnels() || !alone.HasVPN() || !alone.Peers[0].Enabled || alone.VPN().Endpoint != "vpn.example.com:51830" {
		t.Errorf("the configuration is %+v", alone)
	}
	if d := cmp.Diff([]string{"/psk", "/var/lib/edgeward/wireguard-key"}, files(&alone)); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]string{
		"there are no wireguard.names.upstreams: all names but the hosts of services are asked of the DNS servers in the gateway's own /etc/resolv.conf",
		"there is no stateDir, and peers without addresses of their own: those that they are given may change when others come and go",
	}, alone.Warnings()); d != "" {
		t.Error(d)
	}
	both, err := Parse("tunnel.yaml", []byte(small+vpn))
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(both.Warnings(), "\n"); !both.HasTunnels() || !both.HasVPN() || !strings.Contains(got, "service app: its host app.example.com is public, too") || !strings.Contains(got, "no identity.keyFile") {
		t.Errorf("the warnings are %s", got)
	}
	if c, err := Parse("tunnel.yaml", []byte(small)); err != nil || !c.HasTunnels() || c.HasVPN() || c.VPN().Declared() {
		t.Errorf("a file without a VPN: %v", err)
	}
}

func TestConfigSaysWhatIsWrong(t *testing.T) {
	host := func(rest string) string { return lapiSection + oneTunnel + "hosts: [{" + rest + "}]" }
	const good = "host: a.example.com, service: http://a"
	for text, want := range map[string]string{
		"":          "tunnels: is missing",
		"peers: []": "peers: is of no use without the section wireguard",
		"wireguard: {addresses: [10.66.0.1]}\nhosts: []":                                      "tunnels: is missing",
		oneTunnel + "services: [{name: a}]":                                                   "services: is of no use without the section wireguard",
		oneTunnel + "wireguard: {addresses: [10.66.0.0/24]}":                                  "wireguard.addresses[0]: 10.66.0.0 is the first or last address",
		oneTunnel + "mode: blocc":                                                             `mode: "blocc": want enforce or observe`,
		oneTunnel + "hoste: []":                                                               `unknown key "hoste": did you mean "hosts"?`,
		"tunnels: [{tokenFile: /t}]":                                                          "tunnels[0].name: is missing",
		"tunnels: [{name: a}]":                                                                "tunnels[0].tokenFile: is missing",
		"tunnels: [{name: a, tokenFile: t}]":                                                  "want the absolute path of a file",
		"tunnels: [{name: a, tokenFile: /t, credentialsFile: /c}]":                            "tunnels[0].credentialsFile: excludes tokenFile",
		"tunnels: [{name: a, tokenFile: /t}, {name: a, tokenFile: /t}]":                       `tunnels[1].name: "a" is taken`,
		"tunnels: [{name: a, tokenFile: /t, connections: 9}]":                                 "tunnels[0].connections: 9: want 1 to 8",
		"tunnels: [{name: a, tokenFile: /t, protocol: h3}]":                                   `tunnels[0].protocol: "h3": want auto, http2 or quic`,
		oneTunnel + "decisions: {fallback: ban}":                                              "decisions: is of no use without lapi",
		lapiSection + oneTunnel + "decisions: {allow: [0.0.0.0/0]}":                           "decisions.allow[0]: allows everybody",
		lapiSection + oneTunnel + "decisions: {maxAge: 1s}":                                   "decisions.maxAge: 1s: want 20s",
		oneTunnel + "ban: {status: 200}":                                                      "ban.status: 200: want 400 to 599",
		oneTunnel + "identity: {previousKeyFile: /k}":                                         "identity.previousKeyFile: needs a keyFile",
		oneTunnel + "edge: {addresses: [somewhere]}":                                          `edge.addresses[0]: "somewhere": want HOST:PORT`,
		oneTunnel + "edge: {region: eu}":                                                      `edge.region: "eu": want us`,
		oneTunnel + "socket: here":                                                            `socket: "here": want an absolute path`,
		oneTunnel + "listen: 127.0.0.1:0":                                                     "listen: want an address and a port",
		oneTunnel + "drain: {grace: 1h}":                                                      "drain.grace: 1h0m0s: want",
		oneTunnel + "cloudflare: {account: x, tunnelTokenFile: /t}":                           "cloudflare.account: want the account id",
		oneTunnel + "cloudflare: {account: 0123456789abcdef0123456789abcdef}":                 "cloudflare: has nothing to do",
		oneTunnel + "cloudflare: {zones: [{name: example.com, tokenFile: /z}]}":               "cloudflare.owner: is missing",
		oneTunnel + "cloudflare: {owner: a b, tunnelTokenFile: /t}":                           `cloudflare.owner: "a b": want letters`,
		oneTunnel + "cloudflare: {owner: a, zones: [{name: '*.example.com', tokenFile: /z}]}": "cloudflare.zones[0].name: want a zone",
		oneTunnel + "cloudflare: {adopt: [a.b], relinquish: [a.b], tunnelTokenFile: /t}":      "cloudflare.relinquish[0]: a.b is in adopt, too",
		oneTunnel + "cloudflare: {url: 'ftp://x', tunnelTokenFile: /t}":                       "cloudflare.url: want the base address",

		host("service: http://a"):                                                                              "hosts[0].host: is missing",
		host("host: a.example.com"):                                                                            "hosts[0].service: is missing",
		host("host: https://a.example.com, service: http://a"):                                                 "want a host name such as app.example.com",
		host("host: 'a.example.com:443', service: http://a"):                                                   "without scheme, port and path",
		host("host: 'a.*.example.com', service: http://a"):                                                     "want a host name",
		host("host: '*', service: http://a"):                                                                   "want a host name",
		host("host: 'bücher.example', service: http://a"):                                                      "want a host name",
		host("host: a.example.com, service: a"):                                                                `hosts[0].service: "a": want http://HOST:PORT`,
		host("host: a.example.com, service: 'http://a/path'"):                                                  "without a path",
		host("host: a.example.com, service: 'http://u:geheim@a'"):                                              "hosts[0].service: want http://HOST:PORT or https://HOST:PORT",
		host("host: a.example.com, service: 'http://a:99999'"):                                                 "want http://HOST:PORT",
		host(good + ", tunnel: other"):                                                                         `hosts[0].tunnel: "other" is none of the tunnels (home)`,
		host(good + ", path: api"):                                                                             `hosts[0].path: "api": want a plain prefix`,
		host(good + ", path: /a/../b"):                                                                         "want a plain prefix",
		host(good + ", path: '/a*'"):                                                                           "want a plain prefix",
		host(good + ", exposure: secret"):                                                                      `"secret": want public or internal`,
		host(good + ", fail: maybe"):                                                                           `"maybe": want open or closed`,
		host(good + ", origin: {caFile: /ca}"):                                                                 "hosts[0].origin.caFile: is of no use, the service is not https",
		host(good + ", origin: {insecureSkipVerify: true}"):                                                    "is of no use, the service is not https",
		host(good + ", origin: {connectTimeout: 1ns}"):                                                         "hosts[0].origin.connectTimeout: 1ns: want 10ms",
		host(good + ", origin: {hostHeader: '*.a'}"):                                                           `"*.a": want one host`,
		host(good+", origin: {hostHeader: nas.example.org}") + "\ninternalHosts: ['*.example.org']":            "hosts[0].origin.hostHeader: nas.example.org is internal (*.example.org), and a public host would show it",
		host(good + "}, {" + good):                                                                             "hosts[1].host: a.example.com is there already, on line 3",
		host(good + "}, {" + good + ", path: /x, exposure: internal"):                                          "one host is public or internal",
		host("host: a.example.com, service: https://a, origin: {insecureSkipVerify: true, caFile: /ca}"):       "makes caFile and serverName of no use",
		host(good) + "\ninternalHosts: [a.example.com]":                                                        "hosts[0].host: a.example.com is internal (a.example.com, line 4) and cannot be public",
		host(good) + "\ninternalHosts: ['*.example.com']":                                                      "a.example.com is internal (*.example.com, line 4) and cannot be public",
		oneTunnel + "hosts: [{" + good + ", fail: closed}]":                                                    "hosts[0].fail: closed would refuse everybody",
		lapiSection + "tunnels: [{name: a, tokenFile: /t}, {name: b, tokenFile: /t}]\nhosts: [{" + good + "}]": "hosts[0].tunnel: is missing: there are several (a, b)",
		lapiSection + "tunnels: [{name: a, tokenFile: /t}, {name: b, tokenFile: /t}]\nhosts: [{" + good + ", tunnel: a}, {" + good + ", path: /x, tunnel: b}]": "one host has one DNS record, and so one tunnel",
		lapiSection + "tunnels: [{name: a, tokenFile: /t, protocol: quic}]\nhosts: [{" + good + ", origin: {grpc: true}}]":                                     "hosts[0].origin.grpc: needs trailers, which quic drops",
	} {
		_, err := Parse("tunnel.yaml", []byte(text))
		got := ""
		if err != nil {
			got = err.Error()
		}
		if !strings.Contains(got, want) {
			t.Errorf("%s\nsays %q, want %q", text, got, want)
		}
		if strings.Contains(got, "geheim") {
			t.Errorf("a password is in %q", got)
		}
	}
}

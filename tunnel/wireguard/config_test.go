package wireguard

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/edgeward/edgeward/internal/config"
)

// file is what package tunnel has in its own.
type file struct {
	WireGuard Settings  `yaml:"wireguard"`
	Peers     []Peer    `yaml:"peers"`
	Services  []Service `yaml:"services"`
	Grants    []Grant   `yaml:"grants"`
}

func parse(text string) (*Config, error) {
	f, err := config.Parse("tunnel.yaml", []byte(text), file{WireGuard: Defaults()}, func(f *file, check *config.Check) {
		c := Config{f.WireGuard, f.Peers, f.Services, f.Grants}
		c.Check(check)
		*f = file{c.Settings, c.Peers, c.Services, c.Grants}
	})
	return &Config{f.WireGuard, f.Peers, f.Services, f.Grants}, err
}

func mustParse(t testing.TB, text string) *Config {
	t.Helper()
	c, err := parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// key is a public key of its own for every number.
func key(n int) PublicKey {
	var k PublicKey
	k[0], k[1], k[31] = byte(n), byte(n>>8), 1
	return k
}

var plain = cmp.Options{
	cmpopts.EquateEmpty(),
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	cmp.Comparer(func(a, b PrivateKey) bool { return a == b }),
	cmp.Comparer(func(a, b PresharedKey) bool { return a == b }),
}

const section = "wireguard: {addresses: [10.66.0.1/24, fd66::1/64], endpoint: vpn.example.com}\n"

func peer(n int, rest string) string {
	return fmt.Sprintf("  - {name: p%d, publicKey: '%s'%s}\n", n, key(n), rest)
}

func TestConfigOfManyParts(t *testing.T) {
	c := mustParse(t, `
wireguard:
  addresses: [fd66::1/64, 10.66.0.1/24]
  endpoint: "[2001:DB8::1]"
  listenPort: 51831
  reserved: [10.66.0.2-10.66.0.9, 10.66.0.128/25, "fd66::5"]
  names: {upstreams: [10.43.0.10, "192.168.1.2:5353", "[fd00::53]:54"], zones: [home.example.com]}
peers:
  - name: alice-phone
    publicKey: `+key(1).String()+`
    presharedKeyFile: /etc/edgeward/peers/alice-phone.psk
    addresses: [fd66::10, 10.66.0.10]
    groups: [family]
    expires: 2027-01-31T19:00:00+01:00
  - {name: cabin, publicKey: "`+key(2).String()+`", enabled: false, allowedIPs: [192.168.7.0/24], keepalive: 0s, dns: []}
  - {name: tv, publicKey: "`+key(3).String()+`", fullTunnel: true, dns: [9.9.9.9]}
services:
  - {name: grafana, host: Grafana.Home.example.com., addresses: [10.66.0.100, "fd66::100"], targets: [10.42.0.7, "fd42::7"], ports: [443/tcp, 8000-8010/udp]}
  - {name: dns, addresses: [10.43.0.10], ports: [53/udp]}
  - {name: lan, addresses: [192.168.1.0/24], ports: [22/tcp]}
  - {name: cabin-nas, addresses: [192.168.7.5], ports: [445/tcp]}
grants:
  - {to: [group:family, peer:cabin], services: [grafana]}
  - {to: [peer:alice-phone], services: [dns]}
`)
	if d := cmp.Diff(Ports{8000, 8010, UDP}, c.Services[0].Ports[1]); d != "" {
		t.Error(d)
	}
	for _, x := range []struct {
		what      string
		got, want any
	}{
		{"endpoint", c.Endpoint, Endpoint("[2001:db8::1]:51831")},
		{"host", c.Services[0].Host, Host("grafana.home.example.com")},
		{"expiry", c.Peers[0].Expires.Format(time.RFC3339), "2027-01-31T18:00:00Z"},
		{"enabled", fmt.Sprint(c.Peers[0].Enabled, c.Peers[1].Enabled), "true false"},
		{"keepalive", fmt.Sprint(c.Peers[0].Keepalive, c.Peers[1].Keepalive), "25s 0s"},
		{"routes", list(c.RoutesFor(&c.Peers[0])), "10.43.0.10/32, 10.66.0.0/24, 192.168.1.0/24, 192.168.7.5/32, fd66::/64"},
		{"routes of a site", list(c.RoutesFor(&c.Peers[1])), "10.43.0.10/32, 10.66.0.0/24, 192.168.1.0/24, fd66::/64"},
		{"routes of all", list(c.RoutesFor(&c.Peers[2])), "0.0.0.0/0, ::/0"},
		{"dns", fmt.Sprint(c.DNSFor(&c.Peers[0]), c.DNSFor(&c.Peers[1]), c.DNSFor(&c.Peers[2])), "[10.66.0.1 fd66::1] [] [9.9.9.9]"},
		{"upstreams", fmt.Sprint(c.Names.Upstreams), "[10.43.0.10:53 192.168.1.2:5353 [fd00::53]:54]"},
		{"files", fmt.Sprint(c.Files()), "[/var/lib/edgeward/wireguard-key /etc/edgeward/peers/alice-phone.psk]"},
		{"granted", fmt.Sprint(c.Granted("alice-phone", []Name{"family"})), "map[dns:[peer:alice-phone] grafana:[group:family]]"},
	} {
		if d := cmp.Diff(x.want, x.got); d != "" {
			t.Errorf("%s: %s", x.what, d)
		}
	}
	if got, want := strings.Join(c.Warnings(), "\n"), `service lan is granted to nobody
service cabin-nas is granted to nobody
tv is granted nothing
tv: fullTunnel sends everything here, and no service that is granted holds the internet (0.0.0.0/0, ::/0): it reaches what is granted and nothing else`; got != want {
		t.Errorf("the warnings are\n%s", got)
	}
}

func TestEndpoint(t *testing.T) {
	for text, want := range map[string]string{
		"vpn.example.com":       "vpn.example.com",
		"VPN.example.com:51830": "vpn.example.com:51830",
		"192.0.2.1:1":           "192.0.2.1:1",
		"2001:db8::1":           "[2001:db8::1]",
		"[2001:db8::1]":         "[2001:db8::1]",
		"[2001:db8::1]:65535":   "[2001:db8::1]:65535",
		"::1":                   "[::1]",
		"[]":                    "",
		"":                      "",
		"a b":                   "",
		"vpn.example.com:":      "",
		"vpn.example.com:0":     "",
		"vpn.example.com:65536": "",
		"https://vpn":           "",
		"[vpn.example.com]:1":   "",
		"[2001:db8::1":          "",
		"[192.0.2.1]:1":         "",
		"fe80::1%eth0":          "",
		":51830":                "",
	} {
		var e Endpoint
		if err := e.UnmarshalText([]byte(text)); string(e) != want || (err == nil) != (want != "") {
			t.Errorf("%q: have %q, %v; want %q", text, e, err, want)
		}
	}
}

func TestConfigSaysWhatIsWrong(t *testing.T) {
	wg := func(rest string) string {
		return "wireguard: {addresses: [10.66.0.1/24, 'fd66::1/64'], " + rest + "}\n"
	}
	peers := func(all ...string) string { return section + "peers:\n" + strings.Join(all, "") }
	service := func(rest string) string {
		return section + "peers:\n" + peer(1, ", addresses: [10.66.0.5]") + "services:\n  - {name: a, " + rest + "}\n"
	}
	grant := func(rest string) string {
		return service("addresses: [10.43.0.1], ports: [80/tcp]") + "grants:\n  - {" + rest + "}\n"
	}
	for text, want := range map[string]string{
		"wireguard: {mtu: 1420}":                                          "wireguard.addresses: is missing: give the gateway an address",
		"wireguard: {addresses: [10.66.0.1]}":                             `wireguard.addresses[0]: "10.66.0.1": want the gateway's address with the length`,
		"wireguard: {addresses: [10.66.0.0/24]}":                          "wireguard.addresses[0]: 10.66.0.0 is the first or last address of 10.66.0.0/24: take another, such as 10.66.0.1/24",
		"wireguard: {addresses: [10.66.0.255/24]}":                        "is the first or last address of",
		"wireguard: {addresses: ['fd66::/64']}":                           "such as fd66::1/64",
		"wireguard: {addresses: [10.66.0.1/31]}":                          "want a network of /8 to /30",
		"wireguard: {addresses: ['fd66::1/128']}":                         "want a network of /8 to /126",
		"wireguard: {addresses: [127.0.0.1/8]}":                           "127.0.0.1 is no address for a VPN",
		"wireguard: {addresses: [10.66.0.1/24, 10.67.0.1/24]}":            "wireguard.addresses[1]: is a second one of its family",
		"wireguard: {addresses: [10.42.9.1/24]}":                          "10.42.9.0/24 overlaps 10.42.0.0/16 of clusterNetworks",
		"wireguard: {addresses: [10.0.0.1/8]}":                            "10.0.0.0/8 overlaps 10.42.0.0/16 of clusterNetworks",
		wg("interface: 'edge ward'"):                                      `wireguard.interface: "edge ward": want a name of 1 to 15`,
		wg("interface: edgeward-gateway0"):                                "want a name of 1 to 15",
		wg("mode: fast"):                                                  `wireguard.mode: "fast": want auto, kernel or userspace`,
		wg("privateKeyFile: " + key(1).String()):                          "wireguard.privateKeyFile: want the absolute path of a file",
		wg("publicKey: abc"):                                              "wireguard.publicKey: want a key of 44 characters in base64",
		wg("publicKey: " + strings.Repeat("A", 43) + "="):                 "have one of nothing but zeros",
		wg("listenPort: 0"):                                               `wireguard.listenPort: "0": want a port`,
		wg("endpoint: 'x:y'"):                                             `wireguard.endpoint: "x:y": want HOST:PORT`,
		wg("endpoint: '10.66.0.1:51830'"):                                 "lies in the VPN itself",
		wg("mtu: 1279"):                                                   "wireguard.mtu: 1279: want 1280 to 9000",
		wg("mtu: 9001"):                                                   "want 1280 to 9000",
		wg("reserved: [10.66.0.9-10.66.0.2]"):                             "the last address comes before the first",
		wg("reserved: [10.66.0.2-fd66::9]"):                               "want addresses such as",
		wg("reserved: [10.66.1.0/24]"):                                    "wireguard.reserved[0]: lies outside the VPN's networks (10.66.0.0/24, fd66::/64)",
		wg("routes: [0.0.0.0/0]"):                                         "wireguard.routes[0]: 0.0.0.0/0 is everything",
		wg("keepalive: 1500ms"):                                           "wireguard.keepalive: 1.5s: want whole seconds",
		wg("names: {upstreams: [10.66.0.1]}"):                             "10.66.0.1 is the gateway itself",
		wg("names: {upstreams: [dns.example.com]}"):                       "want the address of a DNS server",
		wg("names: {search: ['*.example.com']}"):                          "wireguard.names.search[0]: *.example.com: want a domain",
		wg("presharedKeyDir: here"):                                       `wireguard.presharedKeyDir: "here": want an absolute path`,
		wg("publicKey: '"+key(1).String()+"'") + "peers:\n" + peer(1, ""): "peers[0].publicKey: is the gateway's own",

		peers("  - {publicKey: '" + key(1).String() + "'}\n"):              "peers[0].name: is missing",
		peers("  - {name: Alice, publicKey: '" + key(1).String() + "'}\n"): `peers[0].name: "Alice": want a name of small letters`,
		peers("  - {name: ../x, publicKey: '" + key(1).String() + "'}\n"):  "want a name of small letters",
		peers("  - {name: a}\n"): "peers[0].publicKey: is missing",
		peers(peer(1, ""), peer(2, ""), "  - {name: p1, publicKey: '"+key(3).String()+"'}\n"):                      "peers[2].name: p1 is taken by peers[0]",
		peers(peer(1, ""), "  - {name: b, publicKey: '"+key(1).String()+"'}\n"):                                    "peers[1].publicKey: is the key of p1 (peers[0])",
		peers(peer(1, ", nextPublicKey: '"+key(1).String()+"'")):                                                   "peers[0].nextPublicKey: is the key of p1 (peers[0])",
		peers(peer(1, ", nextPublicKey: '"+key(2).String()+"'"), peer(2, "")):                                      "peers[1].publicKey: is the key of p1",
		peers(peer(1, ", nextPresharedKeyFile: /x")):                                                               "needs a nextPublicKey beside it",
		peers(peer(1, ", presharedKeyFile: /x"), peer(2, ", presharedKeyFile: /x")):                                "peers[1].presharedKeyFile: is that of peers[0] as well",
		peers(peer(1, ", addresses: [10.66.1.5]")):                                                                 "peers[0].addresses[0]: 10.66.1.5 is none of the VPN's (10.66.0.0/24, fd66::/64)",
		peers(peer(1, ", addresses: [10.66.0.1]")):                                                                 "10.66.0.1 is the gateway's own",
		peers(peer(1, ", addresses: [10.66.0.255]")):                                                               "10.66.0.255 is the first or last address of 10.66.0.0/24",
		peers(peer(1, ", addresses: [10.66.0.5, 10.66.0.6]")):                                                      "is a second one of its family",
		peers(peer(1, ", addresses: [10.66.0.5]"), peer(2, ", addresses: [10.66.0.5]")):                            "peers[1].addresses[0]: 10.66.0.5 is that of p1 (peers[0])",
		peers(peer(1, ", groups: [a, a]")):                                                                         "peers[0].groups[1]: a is there already",
		peers(peer(1, ", expires: 2027-01-31")):                                                                    `peers[0].expires: "2027-01-31": want a time with its zone`,
		peers(peer(1, ", keepalive: 70000s")):                                                                      "want whole seconds from 1s to 65535s",
		peers(peer(1, ", allowedIPs: [0.0.0.0/0]")):                                                                "use fullTunnel",
		peers(peer(1, ", allowedIPs: [127.0.0.0/8]")):                                                              "is no network that can lie behind a peer",
		peers(peer(1, ", allowedIPs: ['fe80::/64']")):                                                              "is no network that can lie behind a peer",
		peers(peer(1, ", allowedIPs: [224.0.0.0/24]")):                                                             "is no network that can lie behind a peer",
		peers(peer(1, ", allowedIPs: [10.66.0.128/25]")):                                                           "overlaps the VPN itself (10.66.0.0/24, fd66::/64)",
		peers(peer(1, ", allowedIPs: [10.40.0.0/13]")):                                                             "overlaps clusterNetworks",
		peers(peer(1, ", allowedIPs: [192.168.7.0/24]"), peer(2, ", allowedIPs: [192.168.0.0/16]")):                "peers[1].allowedIPs[0]: 192.168.0.0/16 overlaps 192.168.7.0/24 of p1 (peers[0])",
		peers(peer(1, ", allowedIPs: [192.168.0.0/16]"), peer(2, ", allowedIPs: [172.16.0.0/12, 192.168.2.0/24]")): "peers[1].allowedIPs[1]: 192.168.2.0/24 overlaps 192.168.0.0/16 of p1",
		peers(peer(1, ", presharedKey: x")):                                                                        `peers[0]: unknown key "presharedKey": did you mean "presharedKeyFile"?`,

		service("ports: [80/tcp]"):                                                                                                                                   "services[0].addresses: is missing",
		service("addresses: [10.43.0.1]"):                                                                                                                            "services[0].ports: is missing",
		service("addresses: [10.43.0.1], ports: [80]"):                                                                                                               `services[0].ports[0]: "80": want ports with their protocol`,
		service("addresses: [10.43.0.1], ports: [90-80/tcp]"):                                                                                                        "the last port comes before the first",
		service("addresses: [10.43.0.1], ports: [80-90/tcp, 85/tcp]"):                                                                                                "services[0].ports[1]: 85/tcp overlaps 80-90/tcp",
		service("addresses: [10.43.0.1, 10.43.0.1], ports: [80/tcp]"):                                                                                                "10.43.0.1 is there already",
		service("addresses: [10.43.0.0/16], host: a.b, ports: [80/tcp]"):                                                                                             "10.43.0.0/16 is a network, and a host has addresses",
		service("addresses: [10.66.0.0/25], targets: [10.42.0.1], ports: [80/tcp]"):                                                                                  "only single addresses can be translated",
		service("addresses: [10.43.0.1], targets: [10.42.0.1], ports: [80/tcp]"):                                                                                     "10.43.0.1 is none of the VPN's",
		service("addresses: [10.66.0.5], targets: [10.42.0.1], ports: [80/tcp]"):                                                                                     "10.66.0.5 is taken",
		service("addresses: [10.66.0.1], targets: [10.42.0.1], ports: [80/tcp]"):                                                                                     "10.66.0.1 is taken",
		service("addresses: [10.66.0.7], ports: [80/tcp]"):                                                                                                           "10.66.0.7 lies in the VPN and nobody has it",
		service("addresses: [10.66.0.7, 'fd66::7'], targets: ['fd42::1'], ports: [80/tcp]"):                                                                          "10.66.0.7 has no target of its family",
		service("addresses: [10.66.0.7], targets: [10.42.0.1, 'fd42::1'], ports: [80/tcp]"):                                                                          "services[0].targets[1]: fd42::1 has no address of its family",
		service("addresses: [10.66.0.7], targets: [10.42.0.1, 10.42.0.2], ports: [80/tcp]"):                                                                          "services[0].targets[1]: is a second one of its family",
		service("addresses: [10.66.0.7, 10.66.0.8], targets: [10.42.0.1], ports: [80/tcp]"):                                                                          "services[0].addresses[1]: is a second one of its family",
		service("addresses: [10.66.0.7], targets: [127.0.0.1], ports: [80/tcp]"):                                                                                     "127.0.0.1 cannot be reached from a peer",
		service("addresses: [10.66.0.7], targets: [10.66.0.9], ports: [80/tcp]"):                                                                                     "services[0].targets[0]: 10.66.0.9 lies in the VPN and nobody has it",
		service("host: http://x, addresses: [10.43.0.1], ports: [80/tcp]"):                                                                                           "services[0].host: \"http://x\": want a host name",
		service("host: 10.43.0.1, addresses: [10.43.0.1], ports: [80/tcp]"):                                                                                          "want a host name, have an address",
		service("addresses: [10.43.0.1], ports: [80/tcp]") + "  - {name: a, addresses: [10.43.0.1], ports: [80/tcp]}":                                                "services[1].name: a is taken by services[0]",
		service("host: a.b, addresses: [10.43.0.1], ports: [80/tcp]") + "  - {name: b, host: a.b, addresses: [10.43.0.2], ports: [80/tcp]}":                          "services[1].host: a.b is that of a, with other addresses",
		service("addresses: [10.66.0.7], targets: [10.42.0.1], ports: [80/tcp]") + "  - {name: b, addresses: [10.66.0.7], targets: [10.42.0.2], ports: [70-90/tcp]}": "10.66.0.7 sends 80/tcp to another target in a",

		grant("services: [a]"):                          "grants[0].to: is missing",
		grant("to: [peer:p1]"):                          "grants[0].services: is missing",
		grant("to: [p1], services: [a]"):                `grants[0].to[0]: "p1": want peer:NAME or group:NAME`,
		grant("to: [peer:P1], services: [a]"):           `"P1": want a name`,
		grant("to: [peer:p2], services: [a]"):           "grants[0].to[0]: there is no peer p2: did you mean p1?",
		grant("to: [peer:p1], services: [grafana]"):     "grants[0].services[0]: there is no service grafana",
		section + "grants: [{to: [], services: [abc]}]": "grants[0].services[0]: there is no service abc",
	} {
		_, err := parse(text)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s\nhave %v\nwant %s", text, err, want)
		} else if strings.Contains(err.Error(), "\n") {
			t.Errorf("%s\nhave more than %s:\n%v", text, want, err)
		}
	}
}

func TestConfigTakesWhatIsFine(t *testing.T) {
	for name, text := range map[string]string{
		"a group that nobody is in":             section + "services: [{name: a, addresses: [10.43.0.1], ports: [80/tcp]}]\ngrants: [{to: [group:nobody], services: [a]}]",
		"a grant to nobody":                     section + "services: [{name: a, addresses: [10.43.0.1], ports: [80/tcp]}]\ngrants: [{to: [], services: [a]}]",
		"one host, two services":                section + "services:\n  - {name: a, host: a.b, addresses: [10.43.0.1], ports: [80/tcp]}\n  - {name: b, host: a.b, addresses: [10.43.0.1], ports: [22/tcp]}",
		"one address, two targets":              section + "services:\n  - {name: a, addresses: [10.66.0.9], targets: [10.42.0.1], ports: [80/tcp]}\n  - {name: b, addresses: [10.66.0.9], targets: [10.42.0.2], ports: [22/tcp]}",
		"the gateway's own service":             section + "services: [{name: ssh, addresses: [10.66.0.1, 'fd66::1'], ports: [22/tcp]}]",
		"peer to peer":                          section + "peers:\n" + peer(1, ", addresses: [10.66.0.5]") + "services: [{name: ssh, addresses: [10.66.0.5], ports: [22/tcp]}, {name: all, addresses: [10.66.0.0/24], ports: [1-65535/tcp]}]",
		"an address that is reserved, declared": "wireguard: {addresses: [10.66.0.1/24], reserved: [10.66.0.0/26]}\npeers:\n" + peer(1, ", addresses: [10.66.0.5]"),
		"only IPv4 and a small mtu":             "wireguard: {addresses: [10.66.0.1/24], mtu: 1000}",
		"no cluster":                            "wireguard: {addresses: [10.42.0.1/24], clusterNetworks: []}",
		"everything":                            section + "services: [{name: internet, addresses: [0.0.0.0/0, '::/0'], ports: [1-65535/tcp]}]",
	} {
		if _, err := parse(text); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A peer in full tunnel reaches no resolver but the gateway's.
func TestResolverOfFullTunnel(t *testing.T) {
	for rest, want := range map[string]string{"": "[]", ", fullTunnel: true": "[10.66.0.1 fd66::1]", ", fullTunnel: true, dns: [9.9.9.9]": "[9.9.9.9]"} {
		c := mustParse(t, section+"peers:\n"+peer(1, rest))
		if got := fmt.Sprint(c.DNSFor(&c.Peers[0])); got != want {
			t.Errorf("%q: asks %s, want %s", rest, got, want)
		}
	}
}

func TestWarnings(t *testing.T) {
	c := mustParse(t, `
wireguard: {addresses: [100.64.0.1/16, "2001:db8::1/64"], listenPort: 51820, masquerade: true}
peers:
`+peer(1, ", groups: [family]")+peer(2, ", enabled: false")+peer(3, "")+`
services:
  - {name: a, host: a.b, addresses: [0.0.0.0/0], ports: [80/tcp]}
grants:
  - {to: [group:famly], services: [a]}
  - {to: [], services: [a]}
`[0:0]+`
services:
  - {name: a, addresses: [0.0.0.0/0], ports: [80/tcp]}
  - {name: b, host: a.b, addresses: [192.168.1.1], ports: [80/tcp]}
  - {name: c, addresses: [100.64.0.9], targets: [10.43.0.9], ports: [80/tcp]}
grants:
  - {to: [group:famly], services: [a]}
  - {to: [], services: [a, c]}
`)
	want := []string{
		"wireguard.listenPort 51820 is where flannel's wireguard-native listens: on a k3s node that runs it choose another, such as 51830",
		"wireguard.addresses: 2001:db8::/64 is not a private network: whoever owns it on the internet cannot be reached from peers",
		"wireguard.masquerade is on: services see the gateway's address, and cannot tell one peer from another",
		"there is no wireguard.endpoint: configurations for peers cannot be printed",
		"there are no wireguard.names.upstreams: all names but the hosts of services are asked of the DNS servers in the gateway's own /etc/resolv.conf",
		"grants[0].to: nobody is in group famly: did you mean family?",
		"grants[1].to is empty: nobody is granted anything there",
		"service b is granted to nobody",
		"service c: target 10.43.0.9 lies in 10.43.0.0/16, where k3s has the cluster IPs of Services, and nothing translates one of those once more: give the address of a pod or a host, or put it in addresses without targets",
		"p1, p3 are granted nothing",
	}
	if d := cmp.Diff(want, c.Warnings()); d != "" {
		t.Error(d)
	}
}

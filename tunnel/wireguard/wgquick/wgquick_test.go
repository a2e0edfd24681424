package wgquick

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/edgeward/edgeward/internal/config"
	"github.com/edgeward/edgeward/tunnel/wireguard"
)

const (
	private = "mBNKD8GpcAWxjdQ7vaVPhwV8SFmSvmgXKjGoFzXSwm0="
	shared  = "YWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWE="
	key1    = "ruZa9zbN8CjzJD9hoGJQv1iGsZxBLdD3k8UV7TFgWCc="
	key2    = "Ucm+jRTP5WmVM8bTAjzlyaAkCH1NWwkLkhdtbNQ5MmQ="
	key3    = "0E2MD1lJcKuELJCXyX2Xqz5Sl/eOt+3KcvfKIZHFVkg="
)

func public(t testing.TB, text string) wireguard.PublicKey {
	t.Helper()
	key, err := wireguard.ParsePublicKey(text)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// declared is a VPN with one peer.
func declared(t testing.TB) *wireguard.Config {
	t.Helper()
	c := &wireguard.Config{Settings: wireguard.Defaults()}
	c.PublicKey = public(t, key1)
	c.Endpoint = "vpn.example.com:51830"
	c.Names.Search = []wireguard.Host{"home.example.com"}
	for _, a := range []string{"10.66.0.1/24", "fd66::1/64"} {
		c.Settings.Addresses = append(c.Settings.Addresses, wireguard.InterfaceAddress{Prefix: netip.MustParsePrefix(a)})
	}
	c.Services = []wireguard.Service{{Name: "nas", Host: "nas.home.example.com", Addresses: []netip.Prefix{netip.MustParsePrefix("192.168.7.5/32")}}}
	c.Peers = []wireguard.Peer{{Name: "alice", PublicKey: public(t, key2), Enabled: true, Keepalive: 25 * time.Second}}
	return c
}

func TestText(t *testing.T) {
	priv, err := wireguard.ParsePrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	psk, err := wireguard.ParsePresharedKey(shared)
	if err != nil {
		t.Fatal(err)
	}
	own := []netip.Addr{netip.MustParseAddr("10.66.0.10"), netip.MustParseAddr("fd66::a")}
	c := declared(t)
	client, err := ClientOf(c, "alice", own, priv, psk, wireguard.PublicKey{})
	if err != nil {
		t.Fatal(err)
	}
	const want = `# alice
[Interface]
PrivateKey = ` + private + `
Address = 10.66.0.10/32, fd66::a/128
DNS = 10.66.0.1, fd66::1, home.example.com

[Peer]
PublicKey = ` + key1 + `
PresharedKey = ` + shared + `
AllowedIPs = 10.66.0.0/24, 192.168.7.5/32, fd66::/64
Endpoint = vpn.example.com:51830
PersistentKeepalive = 25
`
	if diff := cmp.Diff(want, client.Text()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	// What it prints it reads, as the configuration of a client.
	f, err := Parse("alice.conf", []byte(client.Text()))
	if err != nil {
		t.Fatal(err)
	}
	peers, preshared, notes, err := f.Declare(c)
	if err != nil || len(notes) > 0 {
		t.Fatal(err, notes)
	}
	back := []wireguard.Peer{{Name: "alice", PublicKey: priv.Public(), Addresses: own, Enabled: true, Keepalive: 25 * time.Second}}
	if diff := cmp.Diff(back, peers, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if preshared["alice"].Reveal() != shared {
		t.Error("the preshared key is lost")
	}

	// Of a device with its own keys; full tunnel; an MTU that was chosen.
	c.Peers[0].FullTunnel, c.Peers[0].Keepalive, c.Peers[0].DNS, c.MTU = true, 0, []netip.Addr{}, 1380
	client, err = ClientOf(c, "alice", own[:1], wireguard.PrivateKey{}, wireguard.PresharedKey{}, wireguard.PublicKey{})
	if err != nil {
		t.Fatal(err)
	}
	const bare = `# alice
[Interface]
# PrivateKey = the one that the device made
Address = 10.66.0.10/32
MTU = 1380

[Peer]
PublicKey = ` + key1 + `
AllowedIPs = 0.0.0.0/0, ::/0
Endpoint = vpn.example.com:51830
`
	if diff := cmp.Diff(bare, client.Text()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	c.PublicKey = wireguard.PublicKey{}
	if _, err := ClientOf(c, "alice", own, priv, psk, wireguard.PublicKey{}); err == nil || !strings.Contains(err.Error(), "wireguard.publicKey is missing") {
		t.Errorf("without the gateway's key: %v", err)
	}
	if client, err := ClientOf(c, "alice", own, priv, psk, public(t, key3)); err != nil || client.Server.String() != key3 {
		t.Errorf("with the gateway's key beside: %v, %v", client.Server, err)
	}
	c.Endpoint = ""
	if _, err := ClientOf(c, "alice", own, priv, psk, wireguard.PublicKey{}); err == nil || !strings.Contains(err.Error(), "wireguard.endpoint is missing") {
		t.Errorf("without an endpoint: %v", err)
	}
	if _, err := ClientOf(c, "bob", own, priv, psk, wireguard.PublicKey{}); err == nil {
		t.Error("there is no bob")
	}
}

// peer is a section with nothing but what tells it from others.
func peer(name wireguard.Name, key, allowed string, line int, t testing.TB) Peer {
	p := Peer{Name: name, Enabled: true, PublicKey: public(t, key), Line: line}
	for a := range strings.SplitSeq(allowed, " ") {
		p.AllowedIPs = append(p.AllowedIPs, netip.MustParsePrefix(a))
	}
	return p
}

// TestParseReadsWhatOthersWrite has their ways of saying names, and PiVPN's of
// shutting somebody out.
func TestParseReadsWhatOthersWrite(t *testing.T) {
	shut := peer("ben", key2, "10.6.0.3/32", 15, t)
	shut.Enabled = false
	for name, c := range map[string]struct {
		text string
		want []Peer
	}{
		"wg-easy": {"# Server\n[Interface]\nPrivateKey = " + private + "\nAddress = 10.8.0.1/24\nListenPort = 51820\nPostUp = true\n\n\n# Client: Alice's Phone (0b9f-11)\n[Peer]\nPublicKey = " + key1 +
			"\nAllowedIPs = 10.8.0.2/32\n", []Peer{peer("alice-s-phone", key1, "10.8.0.2/32", 10, t)}},
		"PiVPN": {"[Interface]\nPrivateKey = " + private + "\nAddress = 10.6.0.1/24,fd11::1/64\nMTU = 1420\nListenPort = 51820\n### begin anna ###\n[Peer]\nPublicKey = " + key1 + "\nPresharedKey = " + shared +
			"\nAllowedIPs = 10.6.0.2/32,fd11::2/128\n### end anna ###\n\n\n#[disabled] ### begin ben ###\n#[disabled] [Peer]\n#[disabled] PublicKey = " + key2 + "\n#[disabled] AllowedIPs = 10.6.0.3/32\n#[disabled] ### end ben ###\n### begin carl ###\n[Peer]\nPublicKey = " + key3 +
			"\nAllowedIPs = 10.6.0.4/32\n### end carl ###\n", []Peer{peer("anna", key1, "10.6.0.2/32 fd11::2/128", 7, t), shut, peer("carl", key3, "10.6.0.4/32", 20, t)}},
		"WGDashboard, wireguard-ui, scripts": {"[Peer]\n#Name# = Desk\nPublicKey = " + key1 + "\nAllowedIPs = 10.6.0.2\n\n# ID:           c1\n# Name:         laptop\n# Email:        a@example.com\n# Update at:    2024-01-01\n[Peer]\nPublicKey = " + key2 +
			"\nAllowedIPs = 10.6.0.3/24\n# BEGIN_PEER tab\n[Peer]\nPublicKey = " + key3 + "\nAllowedIPs = 10.6.0.4/32, 192.168.3.0/24\n# END_PEER tab",
			[]Peer{peer("desk", key1, "10.6.0.2/32", 1, t), peer("laptop", key2, "10.6.0.0/24", 10, t), peer("tab", key3, "10.6.0.4/32 192.168.3.0/24", 14, t)}},
		"by hand": {"\ufeff[interface]\r\nprivatekey=" + private + "\r\n\r\n[PEER] # anna\r\npublickey=" + key1 + " # her phone\r\nallowedips = 10.6.0.2/32\r\nAllowedIPs = 10.6.0.3/32\r\n\r\n# anna\r\n[Peer]\r\nPublicKey = " + key2 + "\r\nAllowedIPs = 10.6.0.4/32\r\n" +
			"\r\n# a remark that is far too long to be the name of anybody\r\n\r\n[Peer]\r\nPublicKey = " + key3 + "\r\nAllowedIPs = 10.6.0.5/32\r\n#[Peer]\r\n#PublicKey = nonsense\r\n",
			[]Peer{peer("anna", key1, "10.6.0.2/32 10.6.0.3/32", 4, t), peer("anna-2", key2, "10.6.0.4/32", 10, t), peer("", key3, "10.6.0.5/32", 16, t)}},
	} {
		f, err := Parse("wg0.conf", []byte(c.text))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if name == "PiVPN" && f.Peers[0].PresharedKey.Reveal() != shared {
			t.Error("a preshared key is lost")
		}
		if diff := cmp.Diff(c.want, f.Peers, cmpopts.EquateComparable(netip.Prefix{}), cmpopts.IgnoreTypes(wireguard.PresharedKey{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestParseNamesTheLine(t *testing.T) {
	for text, want := range map[string]string{
		"":                                               "wg0.conf:1:1: there is no section [Interface] or [Peer]",
		"MTU = 1420":                                     "wg0.conf:1:1: this setting is in no section",
		"a: 1\n\nb: [x]\n\n[y]\n  - c\n":                 "wg0.conf:1:1: there is no section [Interface] or [Peer]: this is no configuration of WireGuard",
		"[Interface]\nPrivateKey = x":                    "wg0.conf:2:14: PrivateKey: want a key of 44 characters",
		"[Interface]\nMTU":                               "wg0.conf:2:1: want a setting and its value",
		"[Interface]\nMTU = -1":                          `wg0.conf:2:7: MTU: "-1": want a number`,
		"[Interface]\nListenPort = 70000":                `wg0.conf:2:14: ListenPort: "70000": want a port`,
		"[Interface]\nAdress = 10.0.0.1":                 "wg0.conf:2:1: Adress: there is no such setting: did you mean Address?",
		"[Interface]\nAddress = 10.0.0.1, y":             `wg0.conf:2:11: Address: "y": want an address or a network`,
		"[Peer]\nJc = 4":                                 "wg0.conf:2:1: Jc: there is no such setting: the settings here are PublicKey",
		"[Peer]\nAllowedIPs = 10.0.0.1":                  "wg0.conf:1:1: this peer has no PublicKey",
		"[Peer]\nPersistentKeepalive = soon":             `want seconds, or off`,
		"[Peer]\nEndpoint = :1":                          "want HOST:PORT",
		"[Peers]\n":                                      "wg0.conf:1:1: there is no such section",
		"[Interface]\nAddress = " + private:              "wg0.conf:2:11: Address: a key does not belong here",
		"[Interface]\nPrivateKey " + private:             "wg0.conf:2:1: want a setting and its value",
		"[Peer]\nPublicKey = " + strings.Repeat("0", 44): "wg0.conf:2:13: PublicKey: want a key",
		"[Interface]\nPrivateKey = a" + private:          "wg0.conf:2:14: PrivateKey: want a key",
	} {
		_, err := Parse("wg0.conf", []byte(text))
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), private[:32]) {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
		if problems, _ := errors.AsType[config.Problems](err); strings.Contains(want, "this is no configuration") && len(problems) != 1 {
			t.Errorf("%q: another kind of file is %d lines", text, len(problems))
		}
	}
}

// TestForeign holds that addresses of other networks are found, and what lies
// behind a peer is none.
func TestForeign(t *testing.T) {
	c := declared(t)
	server := func(address string, allowed ...string) string {
		text := "[Interface]\nListenPort = 51820\n" + address + "\n"
		for i, a := range allowed {
			text += "[Peer]\nPublicKey = " + []string{key1, key2}[i] + "\nAllowedIPs = " + a + "\n"
		}
		return text
	}
	for text, want := range map[string]string{
		server("Address = 10.66.0.1/24", "10.66.0.7/32, 192.168.9.7/32", "fd66::7/128"):                                                                              "[]",
		server("Address = 10.8.0.1/24, fd8::1/64", "10.8.0.3/32, 192.168.9.0/24"):                                                                                    "[10.8.0.0/24]",
		server("Address = 10.8.0.1/24, fd8::1/64", "10.8.0.3/32, fd8::3/128", "10.8.0.4/32"):                                                                         "[10.8.0.0/24 fd8::/64]",
		server("", "10.8.0.3/32, 192.168.9.0/24", "10.66.0.7/32"):                                                                                                    "[10.8.0.3/32]",
		"[Interface]\nPrivateKey = " + private + "\nAddress = 10.8.0.3/24\n[Peer]\nPublicKey = " + key1 + "\nAllowedIPs = 10.8.0.0/24\nEndpoint = a.example.com:1\n": "[10.8.0.0/24]",
	} {
		f, err := Parse("wg0.conf", []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(f.Foreign(c)); got != want {
			t.Errorf("%s\n%s, want %s", text, got, want)
		}
	}
}

func TestDeclare(t *testing.T) {
	c := declared(t)
	const server = `[Interface]
PrivateKey = ` + private + `
Address = 10.8.0.1/24
ListenPort = 51820
PostUp = iptables -A FORWARD -j ACCEPT
SaveConfig = true
[Peer]
PublicKey = ` + key1 + `
AllowedIPs = 10.66.0.7/32, fd66::7/128, 192.168.9.0/24, 0.0.0.0/0, 10.66.0.8/32
[Peer]
# old
PublicKey = ` + key2 + `
PresharedKey = ` + shared + `
AllowedIPs = 10.8.0.2/32
`
	f, err := Parse("wg0.conf", []byte(server))
	if err != nil {
		t.Fatal(err)
	}
	peers, preshared, notes, err := f.Declare(c)
	if err != nil {
		t.Fatal(err)
	}
	want := []wireguard.Peer{
		{Name: "peer-1", PublicKey: public(t, key1), Enabled: true,
			Addresses: []netip.Addr{netip.MustParseAddr("10.66.0.7"), netip.MustParseAddr("fd66::7")}, AllowedIPs: []netip.Prefix{netip.MustParsePrefix("192.168.9.0/24")}},
		{Name: "old", PublicKey: public(t, key2), Enabled: true},
	}
	if diff := cmp.Diff(want, peers, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if len(preshared) != 1 || preshared["old"].Reveal() != shared {
		t.Errorf("preshared keys of %v", preshared)
	}
	wantNotes := []string{
		"line 5: PostUp is not run",
		"line 6: SaveConfig has no place here: the file says what is",
		"devices know the server by the key " + f.Interface.PrivateKey.Public().String() + ": put its private key into wireguard.privateKeyFile, or give every device a new configuration",
		"devices dial port 51820, and wireguard.listenPort is 51830: change one of them",
		"peer-1: 0.0.0.0/0 is left out: a peer speaks for networks of its own, and not for all",
		"peer-1: 10.66.0.8/32 is left out: a peer has one address of each family",
		"old: 10.8.0.2/32 is none of the VPN's (10.66.0.0/24, fd66::/64): it gets another, and its device needs a new configuration",
	}
	if diff := cmp.Diff(wantNotes, notes); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	// A client's is the machine itself; where it goes now is said.
	f, err = Parse("laptops/My Laptop.conf", []byte("[Interface]\nPrivateKey = "+private+"\nAddress = 10.66.0.40/24\nListenPort = 4444\n[Peer]\nPublicKey = "+key3+"\nAllowedIPs = 0.0.0.0/0\nEndpoint = old.example.com:51820\n"))
	if err != nil {
		t.Fatal(err)
	}
	peers, _, notes, err = f.Declare(c)
	if err != nil || len(peers) != 1 || peers[0].Name != "my-laptop" || !peers[0].FullTunnel || peers[0].PublicKey != f.Interface.PrivateKey.Public() || peers[0].Addresses[0].String() != "10.66.0.40" || len(notes) != 2 {
		t.Errorf("%+v, %q, %v", peers, notes, err)
	}

	for text, want := range map[string]string{
		"[Interface]\nListenPort = 1": "there are no peers",
		"[Interface]\nAddress = 10.0.0.2\n[Peer]\nPublicKey = " + key1 + "\nAllowedIPs = 0.0.0.0/0": "has no PrivateKey",
	} {
		f, err := Parse("x.conf", []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if _, _, _, err := f.Declare(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
}

// FuzzImport: whatever a file holds, nothing is said of its keys, and what is
// declared has names and keys of its own.
func FuzzImport(f *testing.F) {
	for _, seed := range []string{
		"[Interface]\nPrivateKey = " + private + "\nAddress = 10.66.0.1/24\nListenPort = 1\nPostUp = x\n# Client: a (1)\n[Peer]\nPublicKey = " + key1 + "\nAllowedIPs = 10.66.0.2/32, fd66::2/128, 0.0.0.0/0\n",
		"#[disabled] ### begin b ###\n#[disabled] [Peer]\n#[disabled] PublicKey = " + key2 + "\n# x\n[Peer] # a\nPublicKey=" + key1 + "\nPresharedKey=" + shared + "\n[Peer]\nPublicKey=" + key3 + "\n#[Peer]\n",
		"[Interface]\nPrivateKey " + private + "\n" + private + "\n[" + private + "]\nDNS = 1.1.1.1, home\nMTU=" + private + "\n" + private + " = 1\nAddress = ," + private + "\n",
	} {
		f.Add(seed)
	}
	c := declared(f)
	f.Fuzz(func(t *testing.T, text string) {
		file, err := Parse("wg0.conf", []byte(text))
		if err != nil {
			if strings.Contains(err.Error(), private[:32]) {
				t.Fatalf("the error repeats a key: %v", err)
			}
			return
		}
		peers, preshared, notes, err := file.Declare(c)
		if err != nil {
			return
		}
		if strings.Contains(strings.Join(notes, "\n"), private[:32]) {
			t.Fatalf("the notes repeat a key: %q", notes)
		}
		names := map[wireguard.Name]bool{}
		for _, p := range peers {
			if _, err := wireguard.ParseName(string(p.Name)); err != nil || names[p.Name] || p.PublicKey.IsZero() {
				t.Fatalf("declares %+v beside %v", p, names)
			}
			names[p.Name] = true
			for _, a := range p.Addresses {
				if !c.Networks()[0].Contains(a) && !c.Networks()[1].Contains(a) {
					t.Fatalf("declares the address %v", a)
				}
			}
		}
		for name := range preshared {
			if !names[name] {
				t.Fatalf("a preshared key of %s, who is not declared", name)
			}
		}
	})
}

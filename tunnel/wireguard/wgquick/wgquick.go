// Package wgquick writes the configuration that a peer's device takes, and reads
// what others wrote, in the format of wg-quick.
//
// It runs nothing: PostUp and its like are read over and named. It keeps no key:
// what it returns is printed or imported and forgotten. The command line calls
// it.
package wgquick

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/edgeward/edgeward/tunnel/wireguard"
)

// Client is a peer's own configuration.
type Client struct {
	// Name goes into a comment; empty for none.
	Name       string
	PrivateKey wireguard.PrivateKey
	// Addresses are the peer's in the VPN, with full length.
	Addresses []netip.Prefix
	DNS       []netip.Addr
	Search    []wireguard.Host
	MTU       int // 0 for none
	// Server is the gateway's public key.
	Server       wireguard.PublicKey
	PresharedKey wireguard.PresharedKey
	Endpoint     string
	AllowedIPs   []netip.Prefix
	Keepalive    time.Duration // 0 for none
}

// ClientOf is the configuration of a declared peer that has these addresses and
// keys. server is the gateway's public key where c does not say it. The error
// says what c lacks: an endpoint, a public key.
func ClientOf(c *wireguard.Config, peer wireguard.Name, addresses []netip.Addr, private wireguard.PrivateKey, preshared wireguard.PresharedKey, server wireguard.PublicKey) (Client, error) {
	p := c.Peer(peer)
	if p == nil {
		return Client{}, fmt.Errorf("there is no peer %s", peer)
	}
	out := Client{
		Name: string(peer), PrivateKey: private, DNS: c.DNSFor(p), MTU: c.MTU,
		Server: c.PublicKey, PresharedKey: preshared, Endpoint: string(c.Endpoint), AllowedIPs: c.RoutesFor(p), Keepalive: p.Keepalive,
	}
	if out.Server.IsZero() {
		out.Server = server
	}
	if out.MTU == wireguard.Defaults().MTU {
		// Devices choose as much or, where their network is narrow, less.
		out.MTU = 0
	}
	if len(out.DNS) > 0 {
		out.Search = c.Names.Search
	}
	for _, a := range addresses {
		out.Addresses = append(out.Addresses, netip.PrefixFrom(a, a.BitLen()))
	}
	switch {
	case out.Endpoint == "":
		return Client{}, errors.New("wireguard.endpoint is missing: say what devices dial, such as vpn.example.com:51830")
	case out.Server.IsZero():
		return Client{}, errors.New("wireguard.publicKey is missing, and the gateway's key cannot be read here: start the gateway once, or copy the public key from where it runs")
	}
	return out, nil
}

// Text is the configuration with its keys. Where PrivateKey is zero, because the
// peer keeps its own, a comment says where it belongs.
func (c *Client) Text() string {
	var b strings.Builder
	line := func(key, value string) {
		if value != "" {
			fmt.Fprintf(&b, "%s = %s\n", key, value)
		}
	}
	if c.Name != "" {
		fmt.Fprintf(&b, "# %s\n", c.Name)
	}
	b.WriteString("[Interface]\n")
	if c.PrivateKey.IsZero() {
		b.WriteString("# PrivateKey = the one that the device made\n")
	}
	line("PrivateKey", c.PrivateKey.Reveal())
	line("Address", joined(c.Addresses))
	dns := joined(c.DNS)
	for _, s := range c.Search {
		dns += ", " + string(s)
	}
	line("DNS", dns)
	if c.MTU > 0 {
		line("MTU", fmt.Sprint(c.MTU))
	}
	b.WriteString("\n[Peer]\n")
	line("PublicKey", c.Server.String())
	line("PresharedKey", c.PresharedKey.Reveal())
	line("AllowedIPs", joined(c.AllowedIPs))
	line("Endpoint", c.Endpoint)
	if c.Keepalive > 0 {
		line("PersistentKeepalive", fmt.Sprint(int(c.Keepalive.Seconds())))
	}
	return b.String()
}

func joined[T fmt.Stringer](list []T) string {
	texts := make([]string, len(list))
	for i, v := range list {
		texts[i] = v.String()
	}
	return strings.Join(texts, ", ")
}

package bouncer

import (
	"net/http"
	"net/netip"
	"strings"

	"github.com/edgeward/edgeward/internal/decision"
)

// maxHops is more proxies than anybody has in a row; a longer chain of trusted
// ones ends the walk there.
const maxHops = 64

// clientOf returns the address that a request is from, given the peer that made
// the connection, by the rules of the Traefik plugin: a peer that is not trusted
// is the client, whatever it says; in X-Forwarded-For the walk from the right
// ends at the first address that is not a trusted proxy, and an entry that cannot
// be read ends it at the proxy that wrote it; any other header must hold one
// single address. named is false where a trusted proxy names nobody that can be
// read, so that the proxy stands for all its clients.
//
// The plugin has the same rules in code of its own: it may import nothing but the
// engine, which knows no HTTP, and is written for an interpreter. The two share
// their table of cases.
func clientOf(trusted *decision.Ranges, header string, h http.Header, peer netip.Addr) (client netip.Addr, named bool) {
	if !holds(trusted, peer) {
		return peer, true
	}
	if header != "" {
		values := h[header]
		if len(values) != 1 {
			return peer, false
		}
		if client := hop(values[0]); client.IsValid() {
			return client, true
		}
		return peer, false
	}
	client = peer
	hops := 0
	values := h["X-Forwarded-For"]
	for i := len(values) - 1; i >= 0; i-- {
		rest, more := values[i], true
		for more {
			if !holds(trusted, client) {
				return client, true
			}
			entry := rest
			comma := strings.LastIndexByte(rest, ',')
			if more = comma >= 0; more {
				rest, entry = rest[:comma], rest[comma+1:]
			}
			next := hop(entry)
			hops++
			if !next.IsValid() || hops > maxHops {
				return client, false
			}
			client = next
		}
	}
	return client, hops > 0
}

// hop reads one entry of a forwarding header: an address, perhaps with a port.
// It returns the zero Addr for anything else.
func hop(text string) netip.Addr {
	text = strings.TrimSpace(text)
	addr, err := netip.ParseAddr(text)
	if err != nil {
		withPort, err := netip.ParseAddrPort(text)
		if err != nil && strings.HasPrefix(text, "[") && strings.HasSuffix(text, "]") {
			withPort, err = netip.ParseAddrPort(text + ":0")
		}
		if err != nil {
			return netip.Addr{}
		}
		addr = withPort.Addr()
	}
	return bare(addr)
}

// bare is an address in the one form that the engine knows.
func bare(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

func holds(r *decision.Ranges, a netip.Addr) bool {
	if a.Is4() {
		octets := a.As4()
		return decision.Contains(r, octets[:])
	}
	octets := a.As16()
	return a.IsValid() && decision.Contains(r, octets[:])
}

func covers(t *decision.Table, a netip.Addr) bool {
	if a.Is4() {
		octets := a.As4()
		return decision.Covered(t, octets[:])
	}
	octets := a.As16()
	return a.IsValid() && decision.Covered(t, octets[:])
}

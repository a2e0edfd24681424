package plugin

import (
	"net/http"
	"net/netip"
	"net/textproto"
	"strings"

	"github.com/edgeward/edgeward/internal/decision"
)

func canonical(header string) string { return textproto.CanonicalMIMEHeaderKey(header) }

// maxHops is more proxies than anybody has in a row; a longer chain of trusted
// ones ends the walk there.
const maxHops = 64

// clientOf returns the octets of the address that a request is from, given
// those of the peer that made the connection. A peer that is not trusted is the
// client, whatever it says. In X-Forwarded-For each proxy adds on the right the
// address that it saw, so the walk from the right ends at the first address
// that is not a trusted proxy: what stands further left is that client's own
// claim. An entry that cannot be read ends the walk at the proxy that wrote it.
// Any other header must hold one single address.
func clientOf(trusted *decision.Ranges, header string, req *http.Request, peer []byte) []byte {
	if !decision.Contains(trusted, peer) {
		return peer
	}
	if header != "" {
		values := req.Header[header]
		if len(values) != 1 {
			return peer
		}
		if client := hop(values[0]); client != nil {
			return client
		}
		return peer
	}
	values := req.Header["X-Forwarded-For"]
	client := peer
	hops := 0
	for i := len(values) - 1; i >= 0; i-- {
		rest := values[i]
		for {
			comma := strings.LastIndexByte(rest, ',')
			next := hop(rest[comma+1:])
			hops++
			if next == nil || hops > maxHops {
				return client
			}
			client = next
			if comma < 0 {
				break
			}
			if !decision.Contains(trusted, client) {
				return client
			}
			rest = rest[:comma]
		}
		if i > 0 && !decision.Contains(trusted, client) {
			return client
		}
	}
	return client
}

// hop reads one entry of a forwarding header: an address, perhaps with a port.
// It returns nil for anything else.
func hop(text string) []byte {
	addr, err := netip.ParseAddr(text)
	if err == nil && addr.Is4() {
		return addr.AsSlice()
	}
	if err != nil {
		text = strings.TrimSpace(text)
		addr, err = netip.ParseAddr(text)
	}
	if err != nil {
		withPort, err := netip.ParseAddrPort(text)
		if err != nil && strings.HasPrefix(text, "[") && strings.HasSuffix(text, "]") {
			withPort, err = netip.ParseAddrPort(text + ":0")
		}
		if err != nil {
			return nil
		}
		addr = withPort.Addr()
	}
	return addr.Unmap().AsSlice()
}

package names

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/miekg/dns"
)

// machineTimeout bounds the wait for a server on the machine itself.
const machineTimeout = 300 * time.Millisecond

// Machine returns the DNS servers that a machine's resolv.conf names, in their
// order, for a Config without Upstreams. It leaves out those in not, the VPN's own
// networks, where questions would go round in circles, and those on the machine's
// loopback that do not answer: a file that was made for another network namespace
// names such.
func Machine(ctx context.Context, path string, not []netip.Prefix) ([]netip.AddrPort, error) {
	c, err := dns.ClientConfigFromFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the machine's DNS servers: %w", err)
	}
	var out []netip.AddrPort
	for _, text := range c.Servers {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			continue // the machine itself has no use for it either
		}
		addr = addr.Unmap()
		at := netip.AddrPortFrom(addr, dnsPort)
		if addr.IsUnspecified() || slices.Contains(out, at) || slices.ContainsFunc(not, func(n netip.Prefix) bool { return n.Contains(addr) }) {
			continue
		}
		if addr.IsLoopback() && !speaks(ctx, at) {
			continue
		}
		out = append(out, at)
	}
	return out, nil
}

// dnsPort is that of all servers in a resolv.conf.
const dnsPort = 53

// speaks reports whether a server says anything at all.
func speaks(ctx context.Context, at netip.AddrPort) bool {
	ctx, cancel := context.WithTimeout(ctx, machineTimeout)
	defer cancel()
	_, err := (&upstream{addr: at}).ask(ctx, key{name: ".", qtype: dns.TypeNS})
	return err == nil
}

package gateway

import (
	"net/netip"
	"slices"

	"github.com/edgeward/edgeward/internal/nft"
	"github.com/edgeward/edgeward/tunnel/wireguard"
	"github.com/edgeward/edgeward/tunnel/wireguard/device"
	"github.com/edgeward/edgeward/tunnel/wireguard/names"
)

const (
	// namesPort is where the resolver asks the kernel for packets: port 53 takes
	// one more privilege, and a resolver of the machine's own may have it at all
	// addresses. Peers ask at port 53, which is translated.
	namesPort = 51853
	dnsPort   = 53
)

// deviceOf is what the device should be.
func deviceOf(want wireguard.Desired) device.Config {
	d := want.Device
	c := device.Config{
		PrivateKey: device.Secret(d.PrivateKey.Bytes()), ListenPort: d.ListenPort, Addresses: d.Addresses, MTU: d.MTU, Routes: d.Routes,
		Peers: make([]device.Peer, 0, len(want.Peers)),
	}
	for _, p := range want.Peers {
		c.Peers = append(c.Peers, peerFor(p))
	}
	return c
}

func peerFor(p wireguard.DesiredPeer) device.Peer {
	return device.Peer{
		Name: string(p.Name), PublicKey: device.Key(p.PublicKey), PresharedKey: device.Secret(p.PresharedKey.Bytes()), AllowedIPs: p.AllowedIPs(),
		Next: device.Key(p.Next), NextPresharedKey: device.Secret(p.NextPresharedKey.Bytes()),
	}
}

// accessOf is what the access rules should be where a stands for want's access.
// answering is where the resolver has its sockets: what is sent to its port
// elsewhere would be for whoever takes that port, which takes no privilege.
func accessOf(want wireguard.Desired, a wireguard.Access, answering []netip.AddrPort) nft.Access {
	d := want.Device
	out := nft.Access{Interface: d.Interface, Networks: append([]netip.Prefix(nil), a.Networks...), Masquerade: a.Masquerade}
	// Networks behind peers are the VPN's too: nobody else may pose as them.
	out.Networks = append(out.Networks, d.Routes...)
	for _, s := range a.Sources {
		out.Sources = append(out.Sources, nft.Source{Prefix: s.Prefix, Group: s.Group})
	}
	for _, g := range a.Groups {
		group := nft.Group{Name: g.Name}
		for _, r := range g.Reach {
			group.Reach = append(group.Reach, nft.Reach{To: r.To, Proto: protoOf(r.Ports.Protocol), First: r.Ports.First, Last: r.Ports.Last})
		}
		out.Groups = append(out.Groups, group)
	}
	for _, addr := range a.Gateway {
		to := netip.PrefixFrom(addr, addr.BitLen())
		out.Everyone = append(out.Everyone, nft.Reach{To: to, Proto: nft.Echo})
		if !a.Resolver || !slices.Contains(answering, netip.AddrPortFrom(addr, namesPort)) {
			continue
		}
		for _, proto := range []nft.Proto{nft.TCP, nft.UDP} {
			out.Everyone = append(out.Everyone, nft.Reach{To: to, Proto: proto, First: dnsPort, Last: dnsPort})
			out.Translate = append(out.Translate, nft.Translation{At: addr, Proto: proto, First: dnsPort, Last: dnsPort, To: addr, Port: namesPort})
		}
	}
	// A resolver behind a peer is asked by the gateway's own.
	for _, u := range want.Names.Upstreams {
		if !slices.ContainsFunc(out.Networks, func(n netip.Prefix) bool { return n.Contains(u.Addr()) }) {
			continue
		}
		for _, addr := range a.Gateway {
			if addr.Is4() != u.Addr().Is4() {
				continue
			}
			for _, proto := range []nft.Proto{nft.TCP, nft.UDP} {
				out.Outward = append(out.Outward, nft.Flow{
					From:  netip.PrefixFrom(addr, addr.BitLen()),
					Reach: nft.Reach{To: netip.PrefixFrom(u.Addr(), u.Addr().BitLen()), Proto: proto, First: u.Port(), Last: u.Port()},
				})
			}
		}
	}
	for _, t := range a.Translate {
		for _, p := range t.Ports {
			out.Translate = append(out.Translate, nft.Translation{At: t.From, Proto: protoOf(p.Protocol), First: p.First, Last: p.Last, To: t.To})
		}
	}
	return out
}

func protoOf(p wireguard.Protocol) nft.Proto {
	if p == wireguard.UDP {
		return nft.UDP
	}
	return nft.TCP
}

// namesOf is what the resolver should answer.
func namesOf(want wireguard.Desired) names.Config {
	a := want.Names
	c := names.Config{Hosts: make(map[string][]netip.Addr, len(a.Hosts)), Upstreams: a.Upstreams, Peers: a.Peers, Owners: make(map[netip.Prefix]string, len(a.Peers))}
	for _, s := range want.Access.Sources {
		c.Owners[s.Prefix] = string(s.Peer)
	}
	for _, addr := range a.Listen {
		c.Listen = append(c.Listen, netip.AddrPortFrom(addr, namesPort))
	}
	for host, addrs := range a.Hosts {
		c.Hosts[string(host)] = addrs
	}
	for _, zone := range a.Zones {
		c.Zones = append(c.Zones, string(zone))
	}
	return c
}

package wireguard

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/edgeward/edgeward/internal/config"
)

// Check reports what does not fit together, and fills in what may be left out.
// The keys are those of the file.
func (c *Config) Check(check *config.Check) {
	c.checkSettings(check)
	c.checkPeers(check)
	c.checkServices(check)
	c.checkGrants(check)
}

func (c *Config) checkSettings(check *config.Check) {
	const at = "wireguard."
	s := &c.Settings
	if !validInterface(s.Interface) {
		check.Fail(at+"interface", "%q: want a name of 1 to 15 characters without spaces, slashes and colons", s.Interface)
	}
	if s.PrivateKeyFile == "" {
		check.Fail(at+"privateKeyFile", "is missing: name a file, which is made at the first start")
	}
	if s.ListenPort == 0 {
		check.Fail(at+"listenPort", "is missing")
	}
	c.checkAddresses(check)
	least := 576
	if slices.ContainsFunc(s.Addresses, func(a InterfaceAddress) bool { return a.Addr().Is6() }) {
		least = 1280 // what IPv6 demands of every link
	}
	if s.MTU < least || s.MTU > 9000 {
		check.Fail(at+"mtu", "%d: want %d to 9000", s.MTU, least)
	}
	if _, _, err := net.SplitHostPort(string(s.Endpoint)); err != nil && s.Endpoint != "" {
		s.Endpoint += Endpoint(fmt.Sprintf(":%d", s.ListenPort))
	}
	if a, err := netip.ParseAddrPort(string(s.Endpoint)); err == nil && inAny(a.Addr(), c.Networks()) {
		check.Fail(at+"endpoint", "%s lies in the VPN itself: give the address under which the gateway is reached from outside", s.Endpoint)
	}
	for i, r := range s.Reserved {
		if !slices.ContainsFunc(c.Networks(), func(n netip.Prefix) bool { return n.Contains(r.First) && n.Contains(r.Last) }) {
			check.Fail(fmt.Sprintf("wireguard.reserved[%d]", i), "lies outside the VPN's networks (%s): there is nothing to reserve", list(c.Networks()))
		}
	}
	for i, r := range s.Routes {
		if r.Bits() == 0 {
			check.Fail(fmt.Sprintf("wireguard.routes[%d]", i), "%s is everything: give the peers for which that is meant fullTunnel", r)
		}
	}
	checkKeepalive(check, at+"keepalive", s.Keepalive)
	for i, u := range s.Names.Upstreams {
		if u.Port() == 53 && slices.Contains(c.gateway(), u.Addr()) {
			check.Fail(fmt.Sprintf("wireguard.names.upstreams[%d]", i), "%s is the gateway itself, which would ask itself for ever", u.Addr())
		}
	}
	for key, hosts := range map[string][]Host{"zones": s.Names.Zones, "search": s.Names.Search} {
		for i, h := range hosts {
			if strings.HasPrefix(string(h), "*.") {
				check.Fail(fmt.Sprintf("wireguard.names.%s[%d]", key, i), "%s: want a domain: the names below it are meant anyway", h)
			}
		}
	}
	if s.PresharedKeyDir != "" && (!filepath.IsAbs(s.PresharedKeyDir) || strings.ContainsFunc(s.PresharedKeyDir, unicode.IsControl)) {
		check.Fail(at+"presharedKeyDir", "%q: want an absolute path", s.PresharedKeyDir)
	}
}

func (c *Config) checkAddresses(check *config.Check) {
	s := &c.Settings
	if len(s.Addresses) == 0 {
		check.Fail("wireguard.addresses", "is missing: give the gateway an address in a network of its own, such as [10.66.0.1/24, fd66::1/64]")
	}
	for i, a := range s.Addresses {
		at := fmt.Sprintf("wireguard.addresses[%d]", i)
		if !a.IsValid() {
			continue // which was said
		}
		network, addr := a.Masked(), a.Addr()
		longest := addr.BitLen() - 2
		switch {
		case addr.IsUnspecified() || addr.IsLoopback() || addr.IsMulticast() || addr.IsLinkLocalUnicast():
			check.Fail(at, "%s is no address for a VPN: take one of a private network, such as 10.66.0.1/24 or fd66::1/64", addr)
		case a.Bits() < 8 || a.Bits() > longest:
			check.Fail(at, "%s: want a network of /8 to /%d", a, longest)
		case outer(network, addr):
			check.Fail(at, "%s is the first or last address of %s: take another, such as %s", addr, network, netip.PrefixFrom(network.Addr().Next(), a.Bits()))
		case slices.ContainsFunc(s.Addresses[:i], func(b InterfaceAddress) bool { return b.Addr().BitLen() == addr.BitLen() }):
			check.Fail(at, "is a second one of its family: keep one of IPv4 and one of IPv6")
		}
		for _, n := range s.ClusterNetworks {
			if n.Overlaps(network) {
				check.Fail(at, "%s overlaps %s of clusterNetworks, where pods and services live: choose another network", network, n)
				break
			}
		}
	}
}

func (c *Config) checkPeers(check *config.Check) {
	names, keys, files, addresses := map[Name]int{}, map[PublicKey]string{}, map[config.File]int{}, map[netip.Addr]string{}
	if !c.PublicKey.IsZero() {
		keys[c.PublicKey] = "the gateway's own"
	}
	for _, a := range c.gateway() {
		addresses[a] = "the gateway's own"
	}
	var behind []site
	networks := c.Networks()
	c.Peers = slices.Clone(c.Peers)
	for i := range c.Peers {
		p := &c.Peers[i]
		at := fmt.Sprintf("peers[%d].", i)
		if other, taken := names[p.Name]; p.Name == "" {
			check.Fail(at+"name", "is missing")
		} else if taken {
			check.Fail(at+"name", "%s is taken by peers[%d]", p.Name, other)
		} else {
			names[p.Name] = i
		}
		if p.PublicKey.IsZero() {
			check.Fail(at+"publicKey", "is missing: `edgeward peer add` makes a key pair, or the device shows its public key")
		}
		for _, k := range []struct {
			key string
			is  PublicKey
		}{{"publicKey", p.PublicKey}, {"nextPublicKey", p.NextPublicKey}} {
			if k.is.IsZero() {
				continue
			}
			if other, taken := keys[k.is]; taken {
				check.Fail(at+k.key, "is %s: every peer has its own", other)
			}
			keys[k.is] = fmt.Sprintf("the key of %s (peers[%d])", p.Name, i)
		}
		for _, f := range []struct {
			key string
			is  config.File
		}{{"presharedKeyFile", p.PresharedKeyFile}, {"nextPresharedKeyFile", p.NextPresharedKeyFile}} {
			if other, taken := files[f.is]; taken && other != i {
				check.Fail(at+f.key, "is that of peers[%d] as well: a preshared key is for one peer", other)
			} else if f.is != "" {
				files[f.is] = i
			}
		}
		if p.NextPublicKey.IsZero() && p.NextPresharedKeyFile != "" {
			check.Fail(at+"nextPresharedKeyFile", "needs a nextPublicKey beside it")
		}
		for j, a := range p.Addresses {
			at := fmt.Sprintf("%saddresses[%d]", at, j)
			n := slices.IndexFunc(networks, func(n netip.Prefix) bool { return n.Contains(a) })
			if n < 0 {
				check.Fail(at, "%s is none of the VPN's (%s); networks behind the peer go to allowedIPs", a, list(networks))
			} else if outer(networks[n], a) {
				check.Fail(at, "%s is the first or last address of %s, which no device can have", a, networks[n])
			} else if other, taken := addresses[a]; taken {
				check.Fail(at, "%s is %s", a, other)
			} else if slices.ContainsFunc(p.Addresses[:j], func(b netip.Addr) bool { return b.BitLen() == a.BitLen() }) {
				check.Fail(at, "is a second one of its family: a peer has one of IPv4 and one of IPv6")
			}
			addresses[a] = fmt.Sprintf("that of %s (peers[%d])", p.Name, i)
		}
		slices.SortFunc(p.Addresses, netip.Addr.Compare)
		for j, g := range p.Groups {
			if slices.Contains(p.Groups[:j], g) {
				check.Fail(fmt.Sprintf("%sgroups[%d]", at, j), "%s is there already", g)
			}
		}
		if !check.Has(at + "enabled") {
			p.Enabled = true
		}
		if !check.Has(at + "keepalive") {
			p.Keepalive = c.Keepalive
		}
		checkKeepalive(check, at+"keepalive", p.Keepalive)
		for j, n := range p.AllowedIPs {
			at := fmt.Sprintf("%sallowedIPs[%d]", at, j)
			switch {
			case n.Bits() == 0:
				check.Fail(at, "%s is everything, and these are the networks behind the peer: use fullTunnel to have the peer send all its traffic here", n)
			case overlapsAny(n, nowhere):
				check.Fail(at, "%s is no network that can lie behind a peer: it is for loopback, for one link, or for many receivers", n)
			case overlapsAny(n, networks):
				check.Fail(at, "%s overlaps the VPN itself (%s): the peer's own addresses go to addresses", n, list(networks))
			case overlapsAny(n, c.ClusterNetworks):
				check.Fail(at, "%s overlaps clusterNetworks (%s): pods and services there would be unreachable", n, list(c.ClusterNetworks))
			}
			behind = append(behind, site{n, i, j})
		}
	}
	checkSites(check, c.Peers, behind)
}

// nowhere are networks that every machine has for itself, or that no packet is
// routed to.
var nowhere = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("224.0.0.0/3"),
	netip.MustParsePrefix("::/127"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8"),
}

// site is a network behind a peer.
type site struct {
	network netip.Prefix
	peer, n int
}

// checkSites finds networks behind peers that overlap.
func checkSites(check *config.Check, peers []Peer, behind []site) {
	slices.SortStableFunc(behind, func(a, b site) int { return comparePrefixes(a.network, b.network) })
	// Of networks in this order one overlaps those before it only if it lies in
	// the last that was not itself inside another.
	var open site
	for i, s := range behind {
		if i > 0 && open.network.Overlaps(s.network) {
			later, earlier := s, open
			if later.peer < earlier.peer {
				later, earlier = earlier, later
			}
			check.Fail(fmt.Sprintf("peers[%d].allowedIPs[%d]", later.peer, later.n),
				"%s overlaps %s of %s (peers[%d]): a network lies behind one peer, once", later.network, earlier.network, peers[earlier.peer].Name, earlier.peer)
			continue
		}
		open = s
	}
}

func (c *Config) checkServices(check *config.Check) {
	names, hosts := map[Name]int{}, map[Host]int{}
	type claim struct {
		service int
		target  netip.Addr
		ports   []Ports
	}
	translated := map[netip.Addr][]claim{}
	networks, own := c.Networks(), map[netip.Addr]bool{}
	for _, a := range c.gateway() {
		own[a] = true
	}
	for i := range c.Peers {
		for _, a := range c.Peers[i].Addresses {
			own[a] = true
		}
	}
	for i := range c.Services {
		s := &c.Services[i]
		at := fmt.Sprintf("services[%d].", i)
		if other, taken := names[s.Name]; s.Name == "" {
			check.Fail(at+"name", "is missing")
		} else if taken {
			check.Fail(at+"name", "%s is taken by services[%d]", s.Name, other)
		} else {
			names[s.Name] = i
		}
		if len(s.Addresses) == 0 {
			check.Fail(at+"addresses", "is missing: say what peers dial")
		}
		if len(s.Ports) == 0 {
			check.Fail(at+"ports", "is missing: say which, such as [443/tcp]")
		}
		if other, taken := hosts[s.Host]; taken && !sameAddresses(s.Addresses, c.Services[other].Addresses) {
			check.Fail(at+"host", "%s is that of %s, with other addresses: one name has one answer", s.Host, c.Services[other].Name)
		} else if s.Host != "" {
			hosts[s.Host] = i
		}
		for j, p := range s.Addresses {
			at := fmt.Sprintf("%saddresses[%d]", at, j)
			a := p.Addr()
			n := slices.IndexFunc(networks, func(n netip.Prefix) bool { return n.Contains(a) })
			var target netip.Addr
			if t := slices.IndexFunc(s.Targets, func(t netip.Addr) bool { return t.BitLen() == a.BitLen() }); t >= 0 {
				target = s.Targets[t]
			}
			switch {
			case slices.Contains(s.Addresses[:j], p):
				check.Fail(at, "%s is there already", short(p))
			case !p.IsSingleIP() && s.Host != "":
				check.Fail(at, "%s is a network, and a host has addresses: take the host out, or name addresses", p)
			case !p.IsSingleIP() && len(s.Targets) > 0:
				check.Fail(at, "%s is a network, and only single addresses can be translated to targets", p)
			case len(s.Targets) > 0 && n < 0:
				check.Fail(at, "%s is none of the VPN's (%s), and only those are translated to targets", a, list(networks))
			case len(s.Targets) > 0 && (own[a] || outer(networks[n], a)):
				check.Fail(at, "%s is taken, by the gateway, a peer or the network itself: choose a free one", a)
			case len(s.Targets) > 0 && slices.ContainsFunc(s.Addresses[:j], func(b netip.Prefix) bool { return b.Addr().BitLen() == a.BitLen() }):
				check.Fail(at, "is a second one of its family, and one target cannot tell them apart")
			case len(s.Targets) > 0 && !target.IsValid():
				check.Fail(at, "%s has no target of its family: add one, or take it out", a)
			case len(s.Targets) == 0 && n >= 0 && p.IsSingleIP() && !own[a]:
				check.Fail(at, "%s lies in the VPN and nobody has it: give targets, or declare it as the address of a peer", a)
			}
			if !target.IsValid() || !p.IsSingleIP() {
				continue
			}
			for _, other := range translated[a] {
				if other.target == target {
					continue
				}
				for _, mine := range s.Ports {
					if k := slices.IndexFunc(other.ports, mine.overlaps); k >= 0 {
						check.Fail(at, "%s sends %s to another target in %s: give one of them another address", a, other.ports[k], c.Services[other.service].Name)
						break
					}
				}
			}
			translated[a] = append(translated[a], claim{i, target, s.Ports})
		}
		for j, t := range s.Targets {
			at := fmt.Sprintf("%stargets[%d]", at, j)
			switch {
			case !slices.ContainsFunc(s.Addresses, func(p netip.Prefix) bool { return p.Addr().BitLen() == t.BitLen() }):
				check.Fail(at, "%s has no address of its family to be reached by: add one, or take it out", t)
			case slices.ContainsFunc(s.Targets[:j], func(b netip.Addr) bool { return b.BitLen() == t.BitLen() }):
				check.Fail(at, "is a second one of its family: there is one target for an address")
			case t.IsUnspecified() || t.IsMulticast() || t.IsLoopback():
				check.Fail(at, "%s cannot be reached from a peer: give the address of a pod or a host", t)
			case inAny(t, networks) && !own[t]:
				check.Fail(at, "%s lies in the VPN and nobody has it: give the address of a pod or a host", t)
			}
		}
		for j, p := range s.Ports {
			if k := slices.IndexFunc(s.Ports[:j], p.overlaps); k >= 0 {
				check.Fail(fmt.Sprintf("%sports[%d]", at, j), "%s overlaps %s", p, s.Ports[k])
			}
		}
	}
}

// overlaps reports whether two ranges of ports have one in common.
func (p Ports) overlaps(q Ports) bool {
	return p.Protocol == q.Protocol && p.First <= q.Last && q.First <= p.Last
}

func (c *Config) checkGrants(check *config.Check) {
	peers, services := map[Name]bool{}, map[Name]bool{}
	for i := range c.Peers {
		peers[c.Peers[i].Name] = true
	}
	for i := range c.Services {
		services[c.Services[i].Name] = true
	}
	for i := range c.Grants {
		g := &c.Grants[i]
		at := fmt.Sprintf("grants[%d].", i)
		if len(g.To) == 0 && !check.Has(at+"to") {
			check.Fail(at+"to", "is missing: say who, such as [group:family, peer:alice-phone]")
		}
		for j, s := range g.To {
			// A group is there when a peer is in it: one that nobody is in yet,
			// or any more, is a warning. To take out its last peer must not
			// make the file a wrong one.
			if !s.Group && !peers[s.Name] {
				check.Fail(fmt.Sprintf("%sto[%d]", at, j), "there is no peer %s%s", s.Name, hint(s.Name, peers))
			}
		}
		if len(g.Services) == 0 {
			check.Fail(at+"services", "is missing: say what is granted")
		}
		for j, s := range g.Services {
			if !services[s] {
				check.Fail(fmt.Sprintf("%sservices[%d]", at, j), "there is no service %s%s", s, hint(s, services))
			}
		}
	}
}

// hint proposes the name that was probably meant.
func hint(name Name, known map[Name]bool) string {
	var names []string
	for _, k := range slices.Sorted(maps.Keys(known)) {
		names = append(names, string(k))
	}
	if meant := config.Nearest(string(name), names); meant != "" {
		return fmt.Sprintf(": did you mean %s?", meant)
	}
	return ""
}

// Warnings says what is allowed and might not be meant, a sentence each.
func (c *Config) Warnings() []string {
	if !c.Declared() {
		return nil
	}
	var out []string
	say := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	if c.ListenPort == 51820 || c.ListenPort == 51821 {
		say("wireguard.listenPort %d is where flannel's wireguard-native listens: on a k3s node that runs it choose another, such as 51830", c.ListenPort)
	}
	for _, a := range c.Settings.Addresses {
		if !a.Addr().IsPrivate() && !carrierGrade.Overlaps(a.Masked()) {
			say("wireguard.addresses: %s is not a private network: whoever owns it on the internet cannot be reached from peers", a.Masked())
		}
	}
	if c.Masquerade {
		say("wireguard.masquerade is on: services see the gateway's address, and cannot tell one peer from another")
	}
	if c.Endpoint == "" {
		say("there is no wireguard.endpoint: configurations for peers cannot be printed")
	}
	if c.resolves() && len(c.Names.Upstreams) == 0 {
		say("there are no wireguard.names.upstreams: all names but the hosts of services are asked of the DNS servers in the gateway's own /etc/resolv.conf")
	}
	members := map[Name]bool{}
	for i := range c.Peers {
		for _, g := range c.Peers[i].Groups {
			members[g] = true
		}
	}
	var granted []Name
	for i, g := range c.Grants {
		if len(g.To) == 0 {
			say("grants[%d].to is empty: nobody is granted anything there", i)
		}
		for _, s := range g.To {
			if s.Group && !members[s.Name] {
				say("grants[%d].to: nobody is in group %s%s", i, s.Name, hint(s.Name, members))
			}
		}
		granted = append(granted, g.Services...)
	}
	inner := c.inner()
	for _, s := range c.Services {
		if !slices.Contains(granted, s.Name) {
			say("service %s is granted to nobody", s.Name)
		}
		for _, t := range s.Targets {
			if clusterIPs.Contains(t) {
				say("service %s: target %s lies in %s, where k3s has the cluster IPs of Services, and nothing translates one of those once more: give the address of a pod or a host, or put it in addresses without targets", s.Name, t, clusterIPs)
			}
		}
		for _, a := range s.Addresses {
			less := slices.DeleteFunc(lacking(a, inner), netip.Prefix.IsSingleIP)
			if a.Bits() > 0 && len(less) > 0 { // everything is the internet, which is what was meant
				say("service %s: %s does not hold %s, which is another's: name it in a service as well if peers are to reach it", s.Name, a, list(less))
			}
		}
	}
	grants, everything := c.grants(), map[Name]bool{}
	for _, s := range c.Services {
		everything[s.Name] = slices.ContainsFunc(s.Addresses, func(a netip.Prefix) bool { return a.Bits() == 0 })
	}
	var without, stuck, outward []Name
	for i := range c.Peers {
		p := &c.Peers[i]
		services := grants.of(p)
		if p.Enabled && len(services) == 0 {
			without = append(without, p.Name)
		}
		if p.Enabled && slices.ContainsFunc(services, func(s Name) bool { return everything[s] }) {
			outward = append(outward, p.Name)
		} else if p.Enabled && p.FullTunnel {
			stuck = append(stuck, p.Name)
		}
	}
	switch {
	case len(without) == 1:
		say("%s is granted nothing", without[0])
	case len(without) > 1:
		say("%s are granted nothing", some(without))
	}
	if len(stuck) > 0 {
		say("%s: fullTunnel sends everything here, and no service that is granted holds the internet (0.0.0.0/0, ::/0): it reaches what is granted and nothing else", some(stuck))
	}
	if len(outward) > 0 && !c.Masquerade {
		say("%s: the internet is granted and wireguard.masquerade is off: nothing out there answers, unless the router knows the way back to %s", some(outward), list(c.Networks()))
	}
	return out
}

// some names the first of many.
func some(names []Name) string {
	if len(names) > 6 {
		return fmt.Sprintf("%s and %d others", words(names[:5]), len(names)-5)
	}
	return words(names)
}

// clusterIPs is where k3s has the addresses of Services, unless it is told otherwise.
var clusterIPs = netip.MustParsePrefix("10.43.0.0/16")

// carrierGrade is 100.64.0.0/10, which providers and other VPNs use inside.
var carrierGrade = netip.MustParsePrefix("100.64.0.0/10")

func checkKeepalive(check *config.Check, key string, d time.Duration) {
	if d != 0 && (d < time.Second || d > 65535*time.Second || d%time.Second != 0) {
		check.Fail(key, "%v: want whole seconds from 1s to 65535s, or 0 for none", d)
	}
}

// validInterface is what the kernel takes as the name of an interface.
func validInterface(name string) bool {
	return len(name) > 0 && len(name) < 16 && name != "." && name != ".." &&
		!strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r >= 0x7f || r == '/' || r == ':' || r == '"' })
}

package wireguard

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/edgeward/edgeward/internal/config"
)

// Compile returns what c wants at a time. A peer whose preshared key is not in
// secrets is unready: without it the tunnel would be weaker than declared.
// Where secrets are zero, as on a machine that is not the gateway, that is not
// asked for: such a Desired is for NewPlan.
func Compile(c *Config, addresses Assigned, secrets Secrets, now time.Time) Desired {
	d := Desired{
		Device: Device{
			Interface:  c.Interface,
			Mode:       c.Mode,
			PrivateKey: secrets.PrivateKey,
			PublicKey:  c.PublicKey,
			ListenPort: uint16(c.ListenPort),
			MTU:        c.MTU,
		},
		Access: Access{Gateway: c.gateway(), Networks: c.Networks(), Resolver: c.resolves(), Masquerade: c.Masquerade},
	}
	if public := secrets.PrivateKey.Public(); !public.IsZero() {
		d.Device.PublicKey = public
	}
	for _, a := range c.Settings.Addresses {
		d.Device.Addresses = append(d.Device.Addresses, a.Prefix)
	}
	slices.SortFunc(d.Device.Addresses, comparePrefixes)
	d.Services = slices.SortedFunc(slices.Values(c.Services), func(a, b Service) int { return cmp.Compare(a.Name, b.Name) })
	grants := c.grants()
	groups := c.newGrouping()
	for i := range c.Peers {
		p := &c.Peers[i]
		if state, why := stateOf(p, addresses[p.Name], secrets, d.Device.PublicKey, now); state != Live {
			d.Idle = append(d.Idle, IdlePeer{
				Name: p.Name, PublicKey: p.PublicKey, Addresses: addresses[p.Name],
				Groups: sorted(p.Groups), State: state, Why: why, Expires: p.Expires.Time,
			})
			continue
		}
		if e := p.Expires.Time; !e.IsZero() && (d.Next.IsZero() || e.Before(d.Next)) {
			d.Next = e
		}
		live := DesiredPeer{
			Name: p.Name, PublicKey: p.PublicKey,
			PresharedKey: secrets.Preshared[p.PresharedKeyFile], Shared: p.PresharedKeyFile != "",
			Next: p.NextPublicKey, NextPresharedKey: secrets.Preshared[p.NextPresharedKeyFile],
			Addresses: addresses[p.Name], Groups: sorted(p.Groups), Services: grants.of(p), Expires: p.Expires.Time,
		}
		live.Problem = secrets.lacks(p.NextPresharedKeyFile)
		if p.NextPublicKey == d.Device.PublicKey && !p.NextPublicKey.IsZero() {
			live.Problem = "its next public key is the gateway's own: give the device's"
		}
		if live.Problem != "" {
			live.Next, live.NextPresharedKey = PublicKey{}, PresharedKey{}
		} else {
			live.Problem = secrets.kept(p.PresharedKeyFile, p.NextPresharedKeyFile)
		}
		if live.Networks = slices.Clone(p.AllowedIPs); live.Networks != nil {
			slices.SortFunc(live.Networks, comparePrefixes)
		}
		group := groups.of(live.Services)
		for _, prefix := range live.AllowedIPs() {
			d.Access.Sources = append(d.Access.Sources, Source{prefix, p.Name, group})
		}
		d.Device.Routes = append(d.Device.Routes, live.Networks...)
		d.Peers = append(d.Peers, live)
	}
	slices.SortFunc(d.Peers, func(a, b DesiredPeer) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(d.Idle, func(a, b IdlePeer) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(d.Access.Sources, func(a, b Source) int { return comparePrefixes(a.Prefix, b.Prefix) })
	slices.SortFunc(d.Device.Routes, comparePrefixes)
	d.Access.Groups = groups.made()
	d.Access.Translate = c.translations()
	d.Names = c.answers(d.Access.Sources)
	return d
}

// stateOf is what a peer is at a time; why says more of one that is unready.
func stateOf(p *Peer, addresses []netip.Addr, secrets Secrets, gateway PublicKey, now time.Time) (state State, why string) {
	switch {
	case !p.Enabled:
		return Disabled, ""
	case !p.Expires.IsZero() && !now.Before(p.Expires.Time):
		return Expired, ""
	case len(addresses) == 0 && len(p.AllowedIPs) == 0:
		return Unready, "there is no address left for it"
	case p.PublicKey == gateway && !gateway.IsZero():
		return Unready, "its public key is the gateway's own: give the device's"
	}
	if why := secrets.Refused[p.Name]; why != "" {
		return Unready, why
	}
	if why := secrets.lacks(p.PresharedKeyFile); why != "" {
		return Unready, why
	}
	return Live, ""
}

// lacks says why the preshared key of a file is not at hand; empty where it is,
// or is not asked for.
func (s Secrets) lacks(file config.File) string {
	if _, ok := s.Preshared[file]; ok || file == "" || s.PrivateKey.IsZero() {
		return ""
	}
	if err := s.Failed[file]; err != nil {
		return err.Error()
	}
	return fmt.Sprintf("preshared key %s was not read", string(file))
}

// kept says of which of these files the key is the last that was read, because the
// file cannot be read any more; empty for none.
func (s Secrets) kept(files ...config.File) string {
	for _, file := range files {
		if err := s.Failed[file]; err != nil {
			return fmt.Sprintf("%v: the key that was last read stays", err)
		}
	}
	return ""
}

func sorted(names []Name) []Name {
	names = slices.Clone(names)
	slices.Sort(names)
	return names
}

// grantIndex finds what a peer is granted without looking at every grant.
type grantIndex map[Subject][]Name

func (c *Config) grants() grantIndex {
	out := grantIndex{}
	for _, g := range c.Grants {
		for _, s := range g.To {
			out[s] = append(out[s], g.Services...)
		}
	}
	return out
}

// of are the services that a peer may reach, sorted.
func (g grantIndex) of(p *Peer) []Name {
	out := slices.Clone(g[Subject{false, p.Name}])
	for _, group := range p.Groups {
		out = append(out, g[Subject{true, group}]...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// grouping makes groups of the sets of services that occur.
type grouping struct {
	services map[Name]*Service
	inner    []netip.Prefix
	around   map[netip.Prefix][]netip.Prefix // what a service's address comes to
	groups   map[string]Group                // by the names of their services
}

func (c *Config) newGrouping() grouping {
	g := grouping{map[Name]*Service{}, c.inner(), map[netip.Prefix][]netip.Prefix{}, map[string]Group{}}
	for i := range c.Services {
		g.services[c.Services[i].Name] = &c.Services[i]
	}
	return g
}

// of is the name of the group of peers that may reach these services; there is
// none for those that may reach nothing.
func (g grouping) of(services []Name) string {
	if len(services) == 0 {
		return ""
	}
	key := fmt.Sprint(services)
	made, ok := g.groups[key]
	if !ok {
		made.Services = services
		for _, name := range services {
			s := g.services[name]
			for _, address := range s.Addresses {
				if g.around[address] == nil {
					g.around[address] = around(address, g.inner)
				}
				for _, to := range g.around[address] {
					for _, p := range s.Ports {
						made.Reach = append(made.Reach, Reach{to, p, name})
					}
				}
			}
		}
		made.Reach = disjoint(made.Reach)
		sum := sha256.Sum256(fmt.Appendf(nil, "%v %v", made.Services, made.Reach))
		made.Name = "g" + hex.EncodeToString(sum[:6])
		g.groups[key] = made
	}
	return made.Name
}

func (g grouping) made() []Group {
	return slices.SortedFunc(maps.Values(g.groups), func(a, b Group) int { return cmp.Compare(a.Name, b.Name) })
}

// special is what is not the internet: private networks, those that lead nowhere,
// and those of IPv6 that stand for addresses of IPv4.
var special = func() []netip.Prefix {
	var out []netip.Prefix
	for _, text := range []string{
		"0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.168.0.0/16",
		"198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4",
		"::/8", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
	} {
		out = append(out, netip.MustParsePrefix(text))
	}
	return out
}()

// inner are the networks that a wider one does not hold: a service that is the
// internet, or a large network, does not lay open this house for it. They are
// reached where a service names them, or what is in them.
func (c *Config) inner() []netip.Prefix {
	out := slices.Concat(special, c.Networks(), c.ClusterNetworks)
	for _, a := range c.gateway() {
		out = append(out, single(a))
	}
	for i := range c.Peers {
		out = append(out, c.Peers[i].AllowedIPs...)
	}
	slices.SortFunc(out, comparePrefixes)
	return slices.Compact(out)
}

// lacking are those of inner that a network is wider than, without those that lie
// in another of them.
func lacking(network netip.Prefix, inner []netip.Prefix) []netip.Prefix {
	if network.IsSingleIP() {
		return nil
	}
	var out []netip.Prefix
	for _, n := range inner { // sorted, the wider first
		if n != network && covers(network, n) && (len(out) == 0 || !covers(out[len(out)-1], n)) {
			out = append(out, n)
		}
	}
	return out
}

// around returns a network without those of inner that it is wider than.
func around(network netip.Prefix, inner []netip.Prefix) []netip.Prefix {
	less := lacking(network, inner)
	var out []netip.Prefix
	var split func(p netip.Prefix, less []netip.Prefix)
	split = func(p netip.Prefix, less []netip.Prefix) {
		less = slices.DeleteFunc(slices.Clone(less), func(n netip.Prefix) bool { return !n.Overlaps(p) })
		switch {
		case len(less) == 0:
			out = append(out, p)
		case !covers(less[0], p):
			low := netip.PrefixFrom(p.Addr(), p.Bits()+1)
			high := netip.PrefixFrom(lastOf(low).Next(), p.Bits()+1)
			split(low, less)
			split(high, less)
		}
	}
	split(network.Masked(), less)
	return out
}

// disjoint returns what covers the same and does not overlap: of networks that
// lie in each other the wider keeps its ports, since either they are nested or
// have nothing in common; of the same ports, the service that comes first. A
// single address keeps its own beside a network's, which does not mean it where it
// is the machine's.
func disjoint(all []Reach) []Reach {
	slices.SortStableFunc(all, func(a, b Reach) int {
		return cmp.Or(comparePrefixes(a.To, b.To), cmp.Compare(a.Ports.Protocol, b.Ports.Protocol))
	})
	var out []Reach
	var around []netip.Prefix // networks that the present one lies in, or is
	kept := map[netip.Prefix][]Ports{}
	for _, r := range all {
		for len(around) > 0 && !covers(around[len(around)-1], r.To) {
			delete(kept, around[len(around)-1])
			around = around[:len(around)-1]
		}
		if len(around) == 0 || around[len(around)-1] != r.To {
			around = append(around, r.To)
		}
		left := []Ports{r.Ports}
		for _, n := range around {
			if r.To.IsSingleIP() && n != r.To {
				continue
			}
			for _, p := range kept[n] {
				left = without(left, p)
			}
		}
		kept[r.To] = append(kept[r.To], left...)
		for _, p := range left {
			out = append(out, Reach{r.To, p, r.Service})
		}
	}
	slices.SortFunc(out, func(a, b Reach) int {
		return cmp.Or(comparePrefixes(a.To, b.To), cmp.Compare(a.Ports.Protocol, b.Ports.Protocol), cmp.Compare(a.Ports.First, b.Ports.First))
	})
	return out
}

// without takes ports out of others.
func without(from []Ports, p Ports) []Ports {
	var out []Ports
	for _, f := range from {
		if !f.overlaps(p) {
			out = append(out, f)
			continue
		}
		if f.First < p.First {
			out = append(out, Ports{f.First, p.First - 1, f.Protocol})
		}
		if p.Last < f.Last {
			out = append(out, Ports{p.Last + 1, f.Last, f.Protocol})
		}
	}
	return out
}

// translations are those of all services: that nobody is granted one is no
// reason to lay its address open.
func (c *Config) translations() []Translation {
	var out []Translation
	for _, s := range c.Services {
		for _, from := range s.Addresses {
			for _, to := range s.Targets {
				if to.BitLen() == from.Addr().BitLen() {
					out = append(out, Translation{s.Name, from.Addr(), to, s.Ports})
				}
			}
		}
	}
	slices.SortFunc(out, func(a, b Translation) int {
		return cmp.Or(a.From.Compare(b.From), cmp.Compare(a.Service, b.Service))
	})
	return out
}

func (c *Config) answers(sources []Source) Answers {
	if !c.resolves() {
		return Answers{}
	}
	a := Answers{Listen: c.gateway(), Hosts: map[Host][]netip.Addr{}, Zones: c.Names.Zones}
	for _, s := range c.Services {
		if s.Host == "" || a.Hosts[s.Host] != nil {
			continue // the same host has the same addresses
		}
		for _, p := range s.Addresses {
			a.Hosts[s.Host] = append(a.Hosts[s.Host], p.Addr())
		}
		slices.SortFunc(a.Hosts[s.Host], netip.Addr.Compare)
	}
	for _, u := range c.Names.Upstreams {
		a.Upstreams = append(a.Upstreams, u.AddrPort)
	}
	for _, s := range sources {
		a.Peers = append(a.Peers, s.Prefix)
	}
	return a
}

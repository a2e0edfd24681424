package gateway

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/edgeward/edgeward/internal/nft"
	"github.com/edgeward/edgeward/tunnel/wireguard"
	"github.com/edgeward/edgeward/tunnel/wireguard/device"
)

// Report is what /v1/status shows of the VPN.
type Report struct {
	wireguard.Status
	Ready string `json:"ready"` // "yes", or why not
	// LastGood is when everything was last in step, Failures how many turns
	// failed since the start.
	LastGood time.Time   `json:"lastGood,omitzero"`
	Failures uint64      `json:"failures"`
	Names    NamesReport `json:"names"`
	// Denied is who tried what in the last hour and was refused, the last first.
	Denied []Attempt `json:"denied"`
}

// NamesReport is how the resolver stands.
type NamesReport struct {
	Listening []netip.AddrPort `json:"listening"`
	Missing   string           `json:"missing,omitempty"`
	// Upstreams are asked for all other names; Machine says that they are those of
	// the machine's own, because none are declared.
	Upstreams []netip.AddrPort  `json:"upstreams"`
	Machine   bool              `json:"machine,omitempty"`
	Down      []netip.AddrPort  `json:"down"` // upstreams that do not answer
	Hosts     int               `json:"hosts"`
	Questions map[string]uint64 `json:"questions"`
}

// Attempt is what a peer tried to reach.
type Attempt struct {
	Peer     wireguard.Name `json:"peer,omitempty"` // empty where the source is nobody's
	From     netip.Addr     `json:"from"`
	To       netip.Addr     `json:"to"`
	Protocol string         `json:"protocol"`
	Port     uint16         `json:"port,omitempty"`
	// Service is the declared one that is there; empty for none.
	Service wireguard.Name `json:"service,omitempty"`
	Packets uint64         `json:"packets"`
	Last    time.Time      `json:"last"`
}

// upFor is how long after a handshake a session is good; WireGuard makes a new
// one before that where there is anything to say.
const upFor = 180 * time.Second

// Desired is what was last enforced; without secrets as JSON.
func (g *Gateway) Desired() wireguard.Desired {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.have
}

// Ready returns nil when everything has been in step once; otherwise why not.
func (g *Gateway) Ready() error {
	if s := g.loop.State(); s.LastGood.IsZero() {
		return cmp.Or(s.Err, errors.New("the VPN is not up yet"))
	}
	return nil
}

// Problem says why what is enforced is not what is declared, or what else is
// amiss; empty while all is well.
func (g *Gateway) Problem() string {
	g.mu.Lock()
	amiss := g.amiss
	g.mu.Unlock()
	if err := errors.Join(g.loop.State().Err, amiss, g.resolver.Status().Missing); err != nil {
		return err.Error()
	}
	return ""
}

// Status tells how the VPN and each declared peer stand.
func (g *Gateway) Status() wireguard.Status {
	s, _ := g.status()
	return s
}

// status is Status, with the packets of each peer.
func (g *Gateway) status() (wireguard.Status, map[wireguard.Name]hits) {
	g.mu.Lock()
	have, open := g.have, g.device
	g.mu.Unlock()
	s := wireguard.Status{
		Interface: have.Device.Interface, PublicKey: have.Device.PublicKey, ListenPort: have.Device.ListenPort, Since: g.began,
		Problem: g.Problem(), Peers: []wireguard.PeerStatus{},
	}
	var states []device.PeerState
	if open != nil {
		s.Mode = wireguard.Mode(open.Mode())
		var err error
		if states, err = open.Peers(); err != nil && s.Problem == "" {
			s.Problem = fmt.Sprintf("read the device: %v", err)
		}
	}
	byKey := make(map[device.Key]device.PeerState, len(states))
	for _, state := range states {
		byKey[state.PublicKey] = state
	}
	var gone []device.PeerState
	if open != nil && len(have.Idle) > 0 {
		gone = open.Gone()
	}
	packets := g.count()
	for _, p := range have.Peers {
		status := wireguard.PeerStatus{
			Name: p.Name, State: wireguard.Live, PublicKey: p.PublicKey, Addresses: p.Addresses, Groups: p.Groups, Services: p.Services,
			Expires: p.Expires, Denied: packets[p.Name].denied, Why: p.Problem,
		}
		current, staged := byKey[device.Key(p.PublicKey)], byKey[device.Key(p.Next)]
		if p.Next != (wireguard.PublicKey{}) {
			status.Rotating = staged.Staged
			if _, there := byKey[device.Key(p.Next)]; there && !staged.Staged {
				current, status.PublicKey = staged, p.Next
			}
		}
		if current.Endpoint.IsValid() {
			status.Endpoint = current.Endpoint.String()
		}
		status.Handshake, status.Received, status.Sent = current.Handshake, current.Received, current.Sent
		s.Peers = append(s.Peers, status)
	}
	for _, p := range have.Idle {
		status := wireguard.PeerStatus{
			Name: p.Name, State: p.State, Why: p.Why, PublicKey: p.PublicKey, Addresses: p.Addresses, Groups: p.Groups, Expires: p.Expires,
			Denied: packets[p.Name].denied,
		}
		for _, was := range gone {
			if was.PublicKey == device.Key(p.PublicKey) || was.Name == string(p.Name) && was.Handshake.After(status.Handshake) {
				status.Handshake, status.Received, status.Sent = was.Handshake, was.Received, was.Sent
				if was.Endpoint.IsValid() {
					status.Endpoint = was.Endpoint.String()
				}
			}
		}
		s.Peers = append(s.Peers, status)
	}
	slices.SortFunc(s.Peers, func(a, b wireguard.PeerStatus) int { return cmp.Compare(a.Name, b.Name) })
	return s, packets
}

// Report tells all there is to tell.
func (g *Gateway) Report() Report {
	loop, resolver := g.loop.State(), g.resolver.Status()
	r := Report{
		Status: g.Status(), Ready: "yes", LastGood: loop.LastGood, Failures: loop.Failures, Denied: []Attempt{},
		Names: NamesReport{
			Listening: append([]netip.AddrPort{}, resolver.Listening...), Down: append([]netip.AddrPort{}, resolver.Down...),
			Upstreams: append([]netip.AddrPort{}, resolver.Upstreams...), Hosts: resolver.Hosts, Questions: questions(resolver.Counts),
		},
	}
	if err := g.Ready(); err != nil {
		r.Ready = err.Error()
	}
	if resolver.Missing != nil {
		r.Names.Missing = resolver.Missing.Error()
	}
	g.mu.Lock()
	have, rules, names := g.have, g.rules, g.names
	g.mu.Unlock()
	r.Names.Machine = len(r.Names.Upstreams) > 0 && len(have.Names.Upstreams) == 0
	if rules == nil {
		return r
	}
	rows, err := rules.Denied()
	if err != nil {
		r.Problem = cmp.Or(r.Problem, fmt.Sprintf("read access rules: %v", err))
	}
	view := viewOf(have, names)
	for _, row := range rows {
		r.Denied = append(r.Denied, view.attempt(row, g.now()))
	}
	slices.SortStableFunc(r.Denied, func(a, b Attempt) int { return b.Last.Compare(a.Last) })
	return r
}

// view finds peers and services by address.
type view struct {
	singles map[netip.Addr]wireguard.Name
	names   map[netip.Addr]wireguard.Name // of those that are not live, too
	wide    []wireguard.Source
	reach   []wireguard.Reach
}

func viewOf(d wireguard.Desired, names map[netip.Addr]wireguard.Name) view {
	v := view{singles: make(map[netip.Addr]wireguard.Name, len(d.Access.Sources)), names: names}
	for _, s := range d.Access.Sources {
		if s.Prefix.IsSingleIP() {
			v.singles[s.Prefix.Addr()] = s.Peer
		} else {
			v.wide = append(v.wide, s)
		}
	}
	slices.SortFunc(v.wide, func(a, b wireguard.Source) int { return cmp.Compare(b.Prefix.Bits(), a.Prefix.Bits()) })
	for _, g := range d.Access.Groups {
		v.reach = append(v.reach, g.Reach...)
	}
	return v
}

// peer is whose an address is, or was before that peer was shut out; empty for
// nobody's.
func (v view) peer(a netip.Addr) wireguard.Name {
	if name, ok := v.singles[a]; ok {
		return name
	}
	for _, s := range v.wide {
		if s.Prefix.Contains(a) {
			return s.Peer
		}
	}
	return v.names[a]
}

// service is the one that is granted to somebody at an address and port.
func (v view) service(to netip.Addr, proto uint8, port uint16) wireguard.Name {
	for _, r := range v.reach {
		if uint8(protoOf(r.Ports.Protocol)) == proto && r.Ports.First <= port && port <= r.Ports.Last && r.To.Contains(to) {
			return r.Service
		}
	}
	return ""
}

func (v view) attempt(row nft.Attempt, now time.Time) Attempt {
	protocol := fmt.Sprint(row.Proto)
	switch nft.Proto(row.Proto) {
	case nft.TCP:
		protocol = "tcp"
	case nft.UDP:
		protocol = "udp"
	case nft.Echo, icmpv6:
		protocol = "icmp"
	}
	return Attempt{
		Peer: v.peer(row.From), From: row.From, To: row.To, Protocol: protocol, Port: row.Port, Service: v.service(row.To, row.Proto, row.Port),
		Packets: row.Packets, Last: now.Add(-row.Ago).Truncate(time.Second),
	}
}

// icmpv6 is its number in IP.
const icmpv6 = 58

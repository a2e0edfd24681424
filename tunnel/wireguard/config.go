package wireguard

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/edgeward/edgeward/internal/config"
)

// Config is what tunnel.yaml says of the VPN. Package tunnel parses and checks
// it; a Config that came from there needs no more checking.
type Config struct {
	Settings
	Peers    []Peer
	Services []Service
	Grants   []Grant
}

// Settings is the section wireguard.
type Settings struct {
	// Interface is the name of the device.
	Interface string `yaml:"interface"`
	// Mode is auto, kernel or userspace.
	Mode Mode `yaml:"mode"`
	// PrivateKeyFile holds the gateway's private key; it is made at the first
	// start where it is missing.
	PrivateKeyFile config.File `yaml:"privateKeyFile"`
	// PublicKey is the gateway's. It may be left out where PrivateKeyFile can
	// be read; the configurations of peers carry it.
	PublicKey PublicKey `yaml:"publicKey"`
	// ListenPort is the UDP port.
	ListenPort config.Port `yaml:"listenPort"`
	// Endpoint is what peers dial, HOST:PORT or HOST for ListenPort.
	Endpoint Endpoint `yaml:"endpoint"`
	// Addresses are the gateway's, each with the network that peers get theirs
	// from: one of IPv4, one of IPv6, or one of them.
	Addresses []InterfaceAddress `yaml:"addresses"`
	// MTU is that of the device and of peers, in bytes.
	MTU int `yaml:"mtu"`
	// Reserved are addresses of the VPN that no peer is given.
	Reserved []Range `yaml:"reserved"`
	// ClusterNetworks are those of pods and services, which the VPN must not
	// overlap. The default is that of k3s.
	ClusterNetworks []netip.Prefix `yaml:"clusterNetworks"`
	// Routes is what peers send through the VPN beside its own networks. Left
	// out, it is the addresses of the services that lie elsewhere.
	Routes []netip.Prefix `yaml:"routes"`
	// Masquerade shows services the gateway's address in place of the peer's.
	Masquerade bool `yaml:"masquerade"`
	// Keepalive is what the configurations of peers carry; 0 is none.
	Keepalive time.Duration `yaml:"keepalive"`
	Names     Names         `yaml:"names"`
	// PresharedKeyDir is where the command line puts the preshared keys that it
	// makes, one file NAME.psk for a peer.
	PresharedKeyDir string `yaml:"presharedKeyDir"`
}

// Names shapes the resolver on the gateway's addresses. It answers the hosts of
// services, and runs where there is one, where there are upstreams, and where a
// peer sends everything here.
type Names struct {
	// Upstreams are asked for all other names, in this order. Without any the
	// servers of the gateway's machine are.
	Upstreams []Upstream `yaml:"upstreams"`
	// Zones are domains whose names are never forwarded: those that no service
	// has as its host do not exist, and internal names do not leak.
	Zones []Host `yaml:"zones"`
	// Search are the domains that peers complete short names with.
	Search []Host `yaml:"search"`
}

// Peer is somebody's device, or a site.
type Peer struct {
	Name      Name      `yaml:"name"`
	PublicKey PublicKey `yaml:"publicKey"`
	// PresharedKeyFile holds the key that is shared with the peer; empty for
	// none.
	PresharedKeyFile config.File `yaml:"presharedKeyFile"`
	// NextPublicKey, with its NextPresharedKeyFile, takes the place of
	// PublicKey when the peer first uses it: so a key rotates without a gap.
	NextPublicKey        PublicKey   `yaml:"nextPublicKey"`
	NextPresharedKeyFile config.File `yaml:"nextPresharedKeyFile"`
	// Addresses are the peer's in the VPN, at most one of each family. Those
	// that are left out are assigned, and stay.
	Addresses []netip.Addr `yaml:"addresses"`
	Groups    []Name       `yaml:"groups"`
	// Enabled is false for a peer that is declared and shut out.
	Enabled bool `yaml:"enabled"`
	// Expires is when the peer is shut out; the zero time is never.
	Expires Expiry `yaml:"expires"`
	// DNS is what the peer's configuration names in place of the gateway's
	// resolver; an empty list names none.
	DNS []netip.Addr `yaml:"dns"`
	// Keepalive is what the peer's configuration carries; 0 is none.
	Keepalive time.Duration `yaml:"keepalive"`
	// FullTunnel has the peer send all its traffic to the gateway. What it may
	// reach is for grants to say, all the same.
	FullTunnel bool `yaml:"fullTunnel"`
	// AllowedIPs are networks behind the peer, which it speaks for.
	AllowedIPs []netip.Prefix `yaml:"allowedIPs"`
}

// Service is what peers may be granted.
type Service struct {
	Name Name `yaml:"name" json:"name"`
	// Host is the name that the resolver answers with Addresses, *.DOMAIN for all
	// names below a domain; empty for none.
	Host Host `yaml:"host" json:"host,omitempty"`
	// Addresses are what peers dial: an address of each family, or networks
	// where there is no host and no targets.
	Addresses []netip.Prefix `yaml:"addresses" json:"addresses"`
	// Targets are where the service listens, an address for each family of
	// Addresses, which are then translated; ports stay. Nothing translates a
	// target once more: the cluster IP of a Service is not one, but may be
	// among Addresses.
	Targets []netip.Addr `yaml:"targets" json:"targets,omitempty"`
	Ports   []Ports      `yaml:"ports" json:"ports"`
}

// Grant lets peers, or all peers in groups, reach services.
type Grant struct {
	To       []Subject `yaml:"to"`
	Services []Name    `yaml:"services"`
}

// Mode is auto, kernel or userspace.
type Mode string

// The modes: Auto takes the kernel's WireGuard where there is one.
const (
	Auto      Mode = "auto"
	Kernel    Mode = "kernel"
	Userspace Mode = "userspace"
)

// UnmarshalText reads a mode.
func (m *Mode) UnmarshalText(text []byte) error {
	switch Mode(text) {
	case Auto, Kernel, Userspace:
		*m = Mode(text)
		return nil
	}
	return fmt.Errorf("%q: want auto, kernel or userspace", text)
}

// Name names a peer, a group or a service: small letters, digits, dots, hyphens
// and underscores, a letter or digit first, at most 63.
type Name string

// ParseName reads a name.
func ParseName(text string) (Name, error) {
	const letters = "abcdefghijklmnopqrstuvwxyz0123456789"
	if text == "" || len(text) > 63 || !strings.Contains(letters, text[:1]) || strings.Trim(text, letters+"._-") != "" {
		return "", fmt.Errorf("%s: want a name of small letters, digits, dots, hyphens and underscores, a letter or digit first, at most 63", quoted(text))
	}
	return Name(text), nil
}

// UnmarshalText reads a name.
func (n *Name) UnmarshalText(text []byte) (err error) {
	*n, err = ParseName(string(text))
	return err
}

// Host is a host name in small letters, or *.DOMAIN for all names below a domain.
type Host string

// UnmarshalText reads a host name.
func (h *Host) UnmarshalText(text []byte) error {
	name := strings.ToLower(strings.TrimSuffix(string(text), "."))
	if !config.IsHost(strings.TrimPrefix(name, "*.")) {
		return fmt.Errorf("%s: want a host name such as grafana.home.example.com", quoted(string(text)))
	}
	if _, err := netip.ParseAddr(name); err == nil {
		return fmt.Errorf("%s: want a host name, have an address", quoted(string(text)))
	}
	*h = Host(name)
	return nil
}

// Endpoint is HOST:PORT, where HOST is a name or an address, in brackets if it
// is of IPv6. The port may be left out in the file.
type Endpoint string

// UnmarshalText reads an endpoint.
func (e *Endpoint) UnmarshalText(text []byte) error {
	bad := fmt.Errorf("%s: want HOST:PORT such as vpn.example.com:51830", quoted(string(text)))
	host, port, err := net.SplitHostPort(string(text))
	if err != nil { // there is no port
		if host = string(text); strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]") {
			host = host[1 : len(host)-1]
		}
	} else if new(config.Port).UnmarshalText([]byte(port)) != nil {
		return bad
	}
	addr, err := netip.ParseAddr(host)
	switch {
	case err == nil && addr.Is6() && addr.Zone() == "":
		host = "[" + addr.String() + "]"
	case strings.HasPrefix(string(text), "["), !config.IsHost(strings.ToLower(host)):
		return bad
	default:
		host = strings.ToLower(host)
	}
	if port != "" {
		host += ":" + port
	}
	*e = Endpoint(host)
	return nil
}

// InterfaceAddress is an address with the length of its network: 10.66.0.1/24.
type InterfaceAddress struct{ netip.Prefix }

// UnmarshalText reads an address with the length of its network.
func (a *InterfaceAddress) UnmarshalText(text []byte) error {
	p, err := netip.ParsePrefix(string(text))
	if err != nil || p.Addr().Is4In6() {
		return fmt.Errorf("%s: want the gateway's address with the length of its network, such as 10.66.0.1/24 or fd66::1/64", quoted(string(text)))
	}
	a.Prefix = p
	return nil
}

// Range is all addresses from First to Last, both included and of one family.
type Range struct{ First, Last netip.Addr }

// UnmarshalText reads FIRST-LAST, a network or an address.
func (r *Range) UnmarshalText(text []byte) error {
	bad := fmt.Errorf("%s: want addresses such as 10.66.0.2-10.66.0.9, a network or an address", quoted(string(text)))
	if first, last, ok := strings.Cut(string(text), "-"); ok {
		a, err1 := netip.ParseAddr(strings.TrimSpace(first))
		b, err2 := netip.ParseAddr(strings.TrimSpace(last))
		if err1 != nil || err2 != nil || a.Zone() != "" || b.Zone() != "" || a.Is4In6() || b.Is4In6() || a.BitLen() != b.BitLen() {
			return bad
		}
		if b.Less(a) {
			return fmt.Errorf("%s: the last address comes before the first", quoted(string(text)))
		}
		*r = Range{a, b}
		return nil
	}
	p, err := parsePrefix(string(text))
	if err != nil {
		return bad
	}
	*r = Range{p.Addr(), lastOf(p)}
	return nil
}

// MarshalText is FIRST-LAST.
func (r Range) MarshalText() ([]byte, error) {
	return []byte(r.First.String() + "-" + r.Last.String()), nil
}

// Contains reports whether a is in the range.
func (r Range) Contains(a netip.Addr) bool {
	return a.BitLen() == r.First.BitLen() && !a.Less(r.First) && !r.Last.Less(a)
}

// Upstream is a DNS server, with its port.
type Upstream struct{ netip.AddrPort }

// UnmarshalText reads an address, or an address with its port; without one it is
// 53.
func (u *Upstream) UnmarshalText(text []byte) error {
	if a, err := netip.ParseAddr(string(text)); err == nil && a.Zone() == "" {
		u.AddrPort = netip.AddrPortFrom(a.Unmap(), 53)
		return nil
	}
	p, err := netip.ParseAddrPort(string(text))
	if err != nil || p.Port() == 0 || p.Addr().Zone() != "" {
		return fmt.Errorf("%s: want the address of a DNS server, such as 10.43.0.10 or 192.168.1.2:5353", quoted(string(text)))
	}
	u.AddrPort = netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
	return nil
}

// Expiry is a moment; the zero time is never.
type Expiry struct{ time.Time }

// UnmarshalText reads a time with its zone.
func (e *Expiry) UnmarshalText(text []byte) error {
	t, err := time.Parse(time.RFC3339, string(text))
	if err != nil || t.IsZero() {
		return fmt.Errorf("%s: want a time with its zone, such as 2027-01-31T18:00:00Z or 2027-01-31T18:00:00+01:00", quoted(string(text)))
	}
	e.Time = t.UTC()
	return nil
}

// Protocol is tcp or udp.
type Protocol string

// The protocols.
const (
	TCP Protocol = "tcp"
	UDP Protocol = "udp"
)

// Ports are those from First to Last, both included, of one protocol.
type Ports struct {
	First, Last uint16
	Protocol    Protocol
}

// UnmarshalText reads PORT/PROTOCOL or FIRST-LAST/PROTOCOL.
func (p *Ports) UnmarshalText(text []byte) error {
	bad := fmt.Errorf("%s: want ports with their protocol, such as 443/tcp or 8000-8010/udp", quoted(string(text)))
	ports, protocol, ok := strings.Cut(string(text), "/")
	if !ok || Protocol(protocol) != TCP && Protocol(protocol) != UDP {
		return bad
	}
	first, last, several := strings.Cut(ports, "-")
	if !several {
		last = first
	}
	var a, b config.Port
	if a.UnmarshalText([]byte(first)) != nil || b.UnmarshalText([]byte(last)) != nil {
		return bad
	}
	if b < a {
		return fmt.Errorf("%s: the last port comes before the first", quoted(string(text)))
	}
	*p = Ports{uint16(a), uint16(b), Protocol(protocol)}
	return nil
}

// String is PORT/PROTOCOL or FIRST-LAST/PROTOCOL.
func (p Ports) String() string {
	text := strconv.Itoa(int(p.First))
	if p.Last != p.First {
		text += "-" + strconv.Itoa(int(p.Last))
	}
	return text + "/" + string(p.Protocol)
}

// MarshalText is what String says.
func (p Ports) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// Subject is a peer or a group that is granted something.
type Subject struct {
	Group bool
	Name  Name
}

// UnmarshalText reads peer:NAME or group:NAME.
func (s *Subject) UnmarshalText(text []byte) error {
	kind, name, ok := strings.Cut(string(text), ":")
	if !ok || kind != "peer" && kind != "group" {
		return fmt.Errorf("%s: want peer:NAME or group:NAME", quoted(string(text)))
	}
	n, err := ParseName(name)
	if err != nil {
		return err
	}
	*s = Subject{kind == "group", n}
	return nil
}

// String is peer:NAME or group:NAME.
func (s Subject) String() string {
	if s.Group {
		return "group:" + string(s.Name)
	}
	return "peer:" + string(s.Name)
}

// MarshalText is what String says.
func (s Subject) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Defaults are the Settings that a file changes.
func Defaults() Settings {
	return Settings{
		Interface:       "edgeward0",
		Mode:            Auto,
		PrivateKeyFile:  "/var/lib/edgeward/wireguard-key",
		ListenPort:      51830,
		MTU:             1420,
		ClusterNetworks: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("10.43.0.0/16")},
		Keepalive:       25 * time.Second,
		PresharedKeyDir: "/etc/edgeward/peers",
	}
}

// Declared reports whether there is a VPN at all.
func (c *Config) Declared() bool { return len(c.Settings.Addresses) > 0 }

// Peer returns the peer of that name, or nil.
func (c *Config) Peer(name Name) *Peer {
	if i := slices.IndexFunc(c.Peers, func(p Peer) bool { return p.Name == name }); i >= 0 {
		return &c.Peers[i]
	}
	return nil
}

// Granted returns the services that a peer of that name and in these groups may
// reach, each with the subjects that the grants name.
func (c *Config) Granted(name Name, groups []Name) map[Name][]Subject {
	out := map[Name][]Subject{}
	for _, g := range c.Grants {
		for _, s := range g.To {
			if s.Group && !slices.Contains(groups, s.Name) || !s.Group && s.Name != name {
				continue
			}
			for _, service := range g.Services {
				if !slices.Contains(out[service], s) {
					out[service] = append(out[service], s)
				}
			}
		}
	}
	return out
}

// Networks are the VPN's own, one of each family at most, IPv4 first.
func (c *Config) Networks() []netip.Prefix {
	var out []netip.Prefix
	for _, a := range c.Settings.Addresses {
		if a.IsValid() { // others were refused
			out = append(out, a.Masked())
		}
	}
	slices.SortFunc(out, comparePrefixes)
	return out
}

// RoutesFor is what a peer's configuration sends to the gateway: the VPN's
// networks with Routes, or everything in full tunnel. It does not depend on
// grants, so that a grant needs no new configuration on the peer.
func (c *Config) RoutesFor(p *Peer) []netip.Prefix {
	if p.FullTunnel {
		// Both families, whatever the VPN speaks: what it does not carry must
		// not go around it.
		return []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)}
	}
	out := append(c.Networks(), c.Routes...)
	if c.Routes == nil {
		for _, s := range c.Services {
			for _, a := range s.Addresses {
				if a.Bits() > 0 {
					out = append(out, a)
				}
			}
		}
	}
	// A site is at home in what lies behind it.
	out = slices.DeleteFunc(out, func(r netip.Prefix) bool {
		return slices.ContainsFunc(p.AllowedIPs, func(n netip.Prefix) bool { return covers(n, r) })
	})
	return widest(out)
}

// DNSFor is what a peer's configuration names as its DNS servers.
func (c *Config) DNSFor(p *Peer) []netip.Addr {
	if p.DNS != nil || !c.resolves() {
		return p.DNS
	}
	return c.gateway()
}

// gateway are the gateway's own addresses, IPv4 first.
func (c *Config) gateway() []netip.Addr {
	var out []netip.Addr
	for _, a := range c.Settings.Addresses {
		if a.IsValid() {
			out = append(out, a.Addr())
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

// resolves reports whether the gateway runs a resolver.
func (c *Config) resolves() bool {
	return len(c.Names.Upstreams) > 0 || slices.ContainsFunc(c.Services, func(s Service) bool { return s.Host != "" }) ||
		slices.ContainsFunc(c.Peers, func(p Peer) bool { return p.FullTunnel }) // which reaches no resolver of its surroundings
}

// Files are the files that c names. Their content is part of the configuration:
// a key that is rotated is a change.
func (c *Config) Files() []config.File {
	if !c.Declared() {
		return nil
	}
	out := []config.File{c.PrivateKeyFile}
	for i := range c.Peers {
		for _, f := range []config.File{c.Peers[i].PresharedKeyFile, c.Peers[i].NextPresharedKeyFile} {
			if f != "" {
				out = append(out, f)
			}
		}
	}
	return out
}

package device

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// Key is the public key of a peer or of the device.
type Key [32]byte

// String is the key in base64, as wg prints it.
func (k Key) String() string { return base64.StdEncoding.EncodeToString(k[:]) }

// MarshalText is String, for JSON.
func (k Key) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText reads what String prints.
func (k *Key) UnmarshalText(text []byte) error {
	parsed, err := wgtypes.ParseKey(string(text))
	if err != nil {
		return errors.New("parse public key: not 32 bytes in base64")
	}
	*k = Key(parsed)
	return nil
}

// Secret is a private key or a preshared key. However it is printed, it does not
// show itself.
type Secret [32]byte

// String shows nothing of the secret.
func (Secret) String() string { return "[redacted]" }

// Format shows nothing of the secret, whatever the verb.
func (Secret) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte("[redacted]")) }

// MarshalText shows nothing of the secret.
func (Secret) MarshalText() ([]byte, error) { return []byte("[redacted]"), nil }

// Public is the public key that belongs to a private key.
func (s Secret) Public() Key { return Key(wgtypes.Key(s).PublicKey()) }

// clamped is a private key as the device gives it back: without the bits that the
// curve ignores, which a key from other tools may have.
func (s Secret) clamped() Secret {
	if s != (Secret{}) {
		s[0] &= 248
		s[31] = s[31]&127 | 64
	}
	return s
}

// Mode says who moves the packets.
type Mode string

// The modes. With Auto the kernel does where it has WireGuard, and this process
// where not; an open device is one of the other two.
const (
	Auto      Mode = "auto"
	Kernel    Mode = "kernel"
	Userspace Mode = "userspace"
)

// Config is what a device should be, the whole of it: what is not in it goes.
type Config struct {
	PrivateKey Secret
	ListenPort uint16
	// Addresses are the device's own, each with the network of the VPN behind it.
	Addresses []netip.Prefix
	// MTU is 1420 if zero.
	MTU int
	// Routes are the networks, beside those of Addresses, that lie behind peers.
	// A default route is refused: it would take the machine's own traffic.
	Routes []netip.Prefix
	Peers  []Peer
}

// Peer is one peer of the device.
type Peer struct {
	// Name says in the log and in Changes whom a key belongs to. It is not
	// compared.
	Name         string
	PublicKey    Key
	PresharedKey Secret // zero: none
	AllowedIPs   []netip.Prefix
	// Keepalive is the pause after which the device itself says something to a
	// silent peer, in whole seconds; zero for never, which is right for all but
	// peers with an Endpoint that must be reached from here. A client's keepalive
	// belongs in the client's configuration.
	Keepalive time.Duration
	// Endpoint is where to look for a peer that has not been heard of yet. It is
	// not compared: where the peer speaks from counts.
	Endpoint netip.AddrPort

	// Next is the key that takes PublicKey's place at its first handshake; zero:
	// none. Until then it is on the device without allowed IPs. From then on, and
	// over restarts, PublicKey is not.
	Next             Key
	NextPresharedKey Secret
}

// maxName is how long the kernel lets an interface's name be.
const maxName = 15

// defaultMTU leaves room for WireGuard's header in 1,500 bytes over IPv6.
const defaultMTU = 1420

// Check says what makes the configuration one that no device can hold: two
// claims to one key or address, what WireGuard would silently ignore, what would
// cut the machine off. Each defect is one line. Apply refuses what it refuses.
func (c Config) Check() error {
	var errs []error
	refuse := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	if c.PrivateKey == (Secret{}) {
		refuse("the device has no private key")
	}
	if c.ListenPort == 0 {
		refuse("the device has no listen port")
	}
	if c.MTU != 0 && (c.MTU < 576 || c.MTU > 65535-80) {
		refuse("an MTU of %d is not between 576 and 65455", c.MTU)
	} else if c.MTU != 0 && c.MTU < 1280 {
		for _, a := range c.Addresses {
			if a.Addr().Is6() {
				refuse("an MTU of %d leaves no IPv6, which needs 1280, but %v is wanted", c.MTU, a)
				break
			}
		}
	}
	for _, a := range c.Addresses {
		if !a.IsValid() || a.Addr().Is4In6() || a.Addr().Zone() != "" {
			refuse("%v is no address with a network", a)
		} else if a.Bits() == 0 {
			refuse("the network of %v is everything", a)
		}
	}
	for _, r := range c.Routes {
		if !r.IsValid() || r.Addr().Is4In6() {
			refuse("%v is no network", r)
		} else if r.Bits() == 0 {
			refuse("a route for %v would take the machine's own traffic", r)
		}
	}
	own := c.PrivateKey.Public()
	keys := make(map[Key]string, len(c.Peers))
	addresses := make(map[netip.Prefix]string, 2*len(c.Peers))
	claim := func(name string, k Key, what string) {
		switch other, taken := keys[k]; {
		case k == (Key{}):
			refuse("peer %s has no %s", name, what)
		case k == own:
			refuse("the %s of peer %s is the device's own", what, name)
		case taken && other == name:
			refuse("the %s of peer %s is named twice", what, name)
		case taken:
			refuse("the %s of peer %s is also that of peer %s", what, name, other)
		}
		keys[k] = name
	}
	for _, p := range c.Peers {
		name := p.label()
		claim(name, p.PublicKey, "public key")
		if p.Next != (Key{}) {
			claim(name, p.Next, "next public key")
		}
		if p.Keepalive < 0 || p.Keepalive > 65535*time.Second || p.Keepalive%time.Second != 0 {
			refuse("a keepalive of %v for peer %s is not 0 to 65535 whole seconds", p.Keepalive, name)
		}
		for _, ip := range p.AllowedIPs {
			if !ip.IsValid() || ip.Addr().Is4In6() {
				refuse("%v, an allowed IP of peer %s, is no network", ip, name)
				continue
			}
			// Of two peers with the same network the kernel keeps the latter,
			// and each turn would move it.
			if other, taken := addresses[ip.Masked()]; taken && other != name {
				refuse("%v is an allowed IP of peer %s and of peer %s", ip.Masked(), other, name)
			}
			addresses[ip.Masked()] = name
		}
	}
	return errors.Join(errs...)
}

// label is what to call the peer: its name, or its key if it has none.
func (p Peer) label() string { return label(p.Name, p.PublicKey) }

func label(name string, k Key) string {
	if name == "" {
		return k.String()
	}
	return name
}

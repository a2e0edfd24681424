package tunnel

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"hash"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/edgeward/edgeward/internal/config"
)

// IdentityHeader carries the identity of a visitor to the plugin's preset
// edgeward-tunnel:
//
//	X-Edgeward-Client: v1 TIME SCHEME ADDRESS MAC [MAC]
//
// TIME is the moment of signing in Unix seconds, SCHEME what the visitor spoke
// to the edge (http or https), ADDRESS the visitor's address in its one usual
// form, and each MAC the HMAC-SHA256, in base64url without padding, of
//
//	edgeward-client v1\nTIME\nSCHEME\nADDRESS\nMETHOD\nHOST
//
// under one key. METHOD and HOST are the request's own, HOST in small letters,
// without port and closing dot; whoever verifies takes them from the request
// that is there. None of the parts can hold a line break.
const IdentityHeader = "X-Edgeward-Client"

// identityLabel keeps a MAC made for this from being one for anything else that
// may ever be signed with the same key.
const identityLabel = "edgeward-client v1"

// shortestKey is the least a key must have, in characters.
const shortestKey = 32

// Signer signs who a visitor is. The zero of *Signer, nil, signs nothing.
//
// What it holds against. The verifier is Traefik with edgeward's plugin; the
// adversary runs pods in the cluster, reaches Traefik, and knows addresses and
// host names, but does not hold the key.
//
//   - To make up an identity, or to change a letter of one, takes the key.
//   - To replay a signature against another host, or with another method, fails:
//     both are signed.
//   - To replay it later than the verifier's window (a minute by default) fails;
//     the clocks of the nodes may differ by as much.
//   - To learn one: the plugin takes the header off before the service behind
//     Traefik sees it, and the gate takes it off what visitors send. Who can
//     read the traffic between the tunnel and Traefik, or runs a service that a
//     tunnel reaches directly and not through Traefik, sees signatures, and can
//     for one window pose as those very visitors on that very host: give the
//     service behind Traefik https where the pod network is not trusted.
//
// The path is not signed, because Traefik rewrites unusual paths before any
// middleware sees them; nor is there a memory of signatures used, because the
// retries of a proxy would be refused by it.
type Signer struct {
	// macs are of hash.Hash, ready for one key each; two while keys rotate.
	macs []*sync.Pool
}

// NewSigner reads the keys that c names. Without any it returns nil.
func NewSigner(c IdentityConfig) (*Signer, error) {
	if c.KeyFile == "" {
		return nil, nil
	}
	s := &Signer{}
	for _, f := range c.keys() {
		secret, err := f.read()
		if err != nil {
			return nil, err
		}
		s.add([]byte(secret.Reveal()))
	}
	return s, nil
}

// keyFile is one of the files that hold a key.
type keyFile struct {
	key  string // in the configuration
	file config.File
}

func (c IdentityConfig) keys() []keyFile {
	return slices.DeleteFunc([]keyFile{{"identity.keyFile", c.KeyFile}, {"identity.previousKeyFile", c.PreviousKeyFile}},
		func(f keyFile) bool { return f.file == "" })
}

func (f keyFile) read() (config.Secret, error) {
	secret, err := f.file.Read()
	if err != nil {
		return config.Secret{}, fmt.Errorf("read %s: %w", f.key, err)
	}
	if err := checkKey(secret); err != nil {
		return config.Secret{}, fmt.Errorf("read %s: %s: %w", f.key, f.file, err)
	}
	return secret, nil
}

// add makes s sign with one more key.
func (s *Signer) add(key []byte) {
	s.macs = append(s.macs, &sync.Pool{New: func() any { return hmac.New(sha256.New, key) }})
}

var errKey = fmt.Errorf("want one line of %d characters or more: openssl rand -base64 32 makes one", shortestKey)

func checkKey(s config.Secret) error {
	text := s.Reveal()
	if len(text) < shortestKey || strings.ContainsAny(text, "\r\n") {
		return errKey
	}
	return nil
}

// Sign returns the value of IdentityHeader for a request of a visitor. host is
// as the origin service will see it.
func (s *Signer) Sign(now time.Time, scheme string, addr netip.Addr, method, host string) string {
	text := make([]byte, 0, 256)
	text = append(text, identityLabel...)
	text = append(text, '\n')
	from := len(text)
	text = strconv.AppendInt(text, now.Unix(), 10)
	text = append(text, '\n')
	text = append(text, scheme...)
	text = append(text, '\n')
	text = addr.AppendTo(text)
	to := len(text)
	text = append(text, '\n')
	text = append(text, method...)
	text = append(text, '\n')
	text = append(text, bareHost(host)...)
	value := make([]byte, 0, 160)
	value = append(value, "v1 "...)
	for _, c := range text[from:to] {
		if c == '\n' {
			c = ' '
		}
		value = append(value, c)
	}
	for _, pool := range s.macs {
		mac := pool.Get().(hash.Hash)
		mac.Reset()
		mac.Write(text)
		value = append(value, ' ')
		value = base64.RawURLEncoding.AppendEncode(value, mac.Sum(text)[len(text):])
		pool.Put(mac)
	}
	return string(value)
}

// bareHost is a host as it is routed and signed: small letters, no port, no
// closing dot.
func bareHost(host string) string {
	if colon := strings.LastIndexByte(host, ':'); colon >= 0 && strings.IndexByte(host[colon:], ']') < 0 {
		host = host[:colon]
	}
	return strings.ToLower(strings.TrimSuffix(host, "."))
}

// validPort reports whether what follows the name in a host is a port, or
// nothing: it is signed, passed on and remembered with the name.
func validPort(host string) bool {
	_, port, has := strings.Cut(host, ":")
	return !has || len(port) <= 5 && !strings.ContainsFunc(port, func(r rune) bool { return r < '0' || r > '9' })
}

// errNoVisitor and its like are why a request has no identity.
var (
	errNoVisitor   = errors.New("no address")
	errTwoVisitors = errors.New("several addresses")
	errBadVisitor  = errors.New("not an address")
)

// pseudo is the range in which the edge makes up IPv4 addresses for visitors who
// have none, where the owner of a zone asked for that.
var pseudo = netip.MustParsePrefix("240.0.0.0/4")

// visitorOf returns the address that the edge vouches for. The edge sets
// Cf-Connecting-Ip on every request, whatever the visitor sent; so one that is
// missing, there twice, or no address did not come from the edge as it should,
// and nobody may be made of it. With the zone's Pseudo IPv4 option it holds a
// made-up address and Cf-Connecting-Ipv6 the true one.
func visitorOf(vouched, six []string) (netip.Addr, error) {
	addr, err := oneAddr(vouched)
	if err != nil {
		return netip.Addr{}, err
	}
	if pseudo.Contains(addr) {
		true6, err := oneAddr(six)
		if err != nil || !true6.Is6() {
			return netip.Addr{}, errBadVisitor // nobody has the made-up one
		}
		return true6, nil
	}
	return addr, nil
}

func oneAddr(values []string) (netip.Addr, error) {
	switch {
	case len(values) == 0 || len(values) == 1 && values[0] == "":
		return netip.Addr{}, errNoVisitor
	case len(values) > 1:
		return netip.Addr{}, errTwoVisitors
	}
	addr, err := netip.ParseAddr(values[0])
	if err != nil || addr.Zone() != "" || addr.IsUnspecified() {
		return netip.Addr{}, errBadVisitor
	}
	return addr.Unmap(), nil
}

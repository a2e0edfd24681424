// Package decision is the one engine that turns CrowdSec decisions into
// verdicts. It knows how decisions add up (several can hold one address, the
// strongest live one counts, allowlists beat them all, each ends at its own
// time) and answers, for any address at any moment, what applies to it and
// why. Every enforcement point searches the same Table, so that the same
// decision gives the same verdict at each of them.
//
// The way through the package:
//
//	LAPI rows → Delta → Store.Apply → Store.Compile → Table → View.Lookup → Verdict
//
// Beside LAPI's decisions there may be local ones, such as those of a file of
// addresses. They count like any other, under ids of their own, and no answer of
// LAPI touches them.
//
// A Store belongs to one goroutine. A Table and a View never change once made
// and may be read by any number of goroutines.
//
// The package does no I/O, reads no clock, starts no goroutine and imports the
// standard library only. It is written in the dialect that Yaegi, Traefik's
// plugin interpreter, understands; interpreted, a method call costs several
// times a function call, which is why the two calls on a request's path
// (Covered, Contains) are functions. It needs a 64-bit platform, because
// addresses, ids and times share machine integers.
package decision

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// Remediation is what a decision asks for, ordered by strength: the larger
// value wins where several decisions hold one address.
type Remediation uint8

// The remediations, weakest first. Allow is the verdict where no decision
// holds an address.
const (
	Allow Remediation = iota
	Throttle
	Captcha
	Ban
)

// Unknown marks a class whose type is none of ban, captcha and throttle; a
// Policy says what such a decision means.
const Unknown Remediation = 255

// Name returns the word that CrowdSec uses for the remediation.
func (r Remediation) Name() string {
	switch r {
	case Allow:
		return "allow"
	case Throttle:
		return "throttle"
	case Captcha:
		return "captcha"
	case Ban:
		return "ban"
	}
	return "unknown"
}

// remediationOf maps a LAPI decision type, in any case, to its Remediation.
func remediationOf(typ string) Remediation {
	switch strings.ToLower(typ) {
	case "ban":
		return Ban
	case "captcha":
		return Captcha
	case "throttle":
		return Throttle
	}
	return Unknown
}

// ParseFallback reads the word of a fallback policy for unknown decision
// types: "ban", "captcha", or "ignore" (Allow). The empty string means ban,
// the safe reading of a decision nobody understands.
func ParseFallback(word string) (Remediation, error) {
	switch word {
	case "", "ban":
		return Ban, nil
	case "captcha":
		return Captcha, nil
	case "ignore":
		return Allow, nil
	}
	return Allow, fmt.Errorf("read fallback %q: want ban, captcha or ignore", word)
}

// Row is one decision as LAPI sends it. Duration is the time left, in Go's
// notation ("3h59m59s"), counted from the moment LAPI wrote the answer.
type Row struct {
	ID       int
	Scope    string
	Value    string
	Type     string
	Origin   string
	Scenario string
	Duration string
}

// Class is what many decisions share: the type as LAPI wrote it, where the
// decision came from and why.
type Class struct {
	Type     string
	Origin   string
	Scenario string
	// Remediation is Type understood, or Unknown.
	Remediation Remediation
}

// Scoped is a decision on something other than an address: a country or an
// autonomous system. The Store keeps these by id; no Table enforces them.
type Scoped struct {
	ID    int
	Scope string // "country" or "as"
	Value string // as LAPI wrote it
	Class Class
	Until time.Time
}

var errZone = errors.New("zone ids are not allowed")

// ParsePrefix reads an address or a CIDR in any textual form and returns the
// one prefix that it stands for: host bits cleared, IPv4-mapped IPv6 folded
// into IPv4, upper case and zero runs of no matter. A single address is a
// prefix of full length. Zone ids, leading zeros and prefix lengths that the
// family does not have are errors.
func ParsePrefix(value string) (netip.Prefix, error) {
	if strings.IndexByte(value, '/') < 0 {
		addr, err := netip.ParseAddr(value)
		if err != nil {
			return netip.Prefix{}, fmt.Errorf("parse address %q: not an IPv4 or IPv6 address", value)
		}
		if addr.Zone() != "" {
			return netip.Prefix{}, fmt.Errorf("parse address %q: %w", value, errZone)
		}
		addr = addr.Unmap()
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	prefix, err := netip.ParsePrefix(value)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("parse range %q: not an IPv4 or IPv6 range in CIDR notation", value)
	}
	if prefix.Addr().Is4In6() && prefix.Bits() >= 96 {
		prefix = netip.PrefixFrom(prefix.Addr().Unmap(), prefix.Bits()-96)
	}
	return prefix.Masked(), nil
}

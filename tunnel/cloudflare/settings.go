package cloudflare

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"time"
)

// Protocol is what a connection to the edge speaks.
type Protocol string

// The protocols. Auto is QUIC where the network lets it through and HTTP/2
// elsewhere, and is no connection's protocol.
const (
	Auto  Protocol = "auto"
	HTTP2 Protocol = "http2"
	QUIC  Protocol = "quic"
)

// Settings shape a tunnel's connections. The zero value is good: four
// connections to Cloudflare's edge by whatever protocol gets through.
type Settings struct {
	// Protocol is Auto if empty.
	Protocol Protocol
	// Trailers says that a host needs them, as gRPC does. Over QUIC cloudflared
	// drops them, so Auto then means HTTP2, and QUIC is an error.
	Trailers bool
	// Connections is how many to hold, 1 to 8; 4 if zero.
	Connections int
	// Edge are HOST:PORT addresses of an edge; none means Cloudflare's, found
	// by DNS. If there are fewer than connections they are shared.
	Edge []string
	// Region narrows that search: "us", or empty for all.
	Region string
	// RootCAs verify the edge; nil means the system's and Cloudflare's own.
	RootCAs *x509.CertPool
	// LameDuck is how long a connection that drains serves on after the edge
	// was told: edges hear of it seconds later. 3 seconds if zero.
	LameDuck time.Duration
	// Grace bounds the wait, after that, for requests in flight; those that
	// take longer are cut. 30 seconds if zero.
	Grace time.Duration
}

// check fills in what was left out.
func (s Settings) check() (Settings, error) {
	s.Edge = slices.Clone(s.Edge)
	switch s.Protocol {
	case "", Auto:
		s.Protocol = Auto
		if s.Trailers {
			s.Protocol = HTTP2
		}
	case HTTP2:
	case QUIC:
		if s.Trailers {
			return s, errors.New("protocol quic drops trailers, which a host of this tunnel needs: set auto or http2")
		}
	default:
		return s, fmt.Errorf("protocol %q is unknown: set auto, http2 or quic", s.Protocol)
	}
	if s.Connections == 0 {
		s.Connections = 4
	}
	if s.Connections < 1 || s.Connections > 8 {
		return s, fmt.Errorf("%d connections are out of range: set 1 to 8", s.Connections)
	}
	for _, address := range s.Edge {
		_, port, err := net.SplitHostPort(address)
		if n, bad := strconv.ParseUint(port, 10, 16); err != nil || bad != nil || n == 0 {
			return s, fmt.Errorf("edge address %q is not HOST:PORT", address)
		}
	}
	if s.LameDuck == 0 {
		s.LameDuck = 3 * time.Second
	}
	if s.Grace == 0 {
		s.Grace = 30 * time.Second
	}
	if s.LameDuck < 0 || s.Grace < 0 {
		return s, errors.New("lame duck and grace cannot be negative")
	}
	return s, nil
}

func (s Settings) equal(o Settings) bool {
	return s.Protocol == o.Protocol && s.Trailers == o.Trailers && s.Connections == o.Connections &&
		slices.Equal(s.Edge, o.Edge) && s.Region == o.Region && s.RootCAs.Equal(o.RootCAs) &&
		s.LameDuck == o.LameDuck && s.Grace == o.Grace
}

// pace holds the times that nobody needs to set but a test.
type pace struct {
	firstRetry time.Duration // at most, after a connection that was good
	retry      time.Duration // the second wait; it doubles
	slowest    time.Duration // the longest wait
	refused    time.Duration // the wait after a refusal
	good       time.Duration // how long a connection lives to have been good
	stagger    time.Duration // between the first starts of connections
	patience   time.Duration // of the others with the first of them
	headStart  time.Duration // of the first protocol in a race
	dial       time.Duration // bounds a handshake
	rpc        time.Duration // bounds an answer of the edge
	canary     time.Duration // between canaries
	swap       time.Duration // bounds the wait for new connections to serve
	silence    time.Duration // over HTTP/2, before a PING
	flush      time.Duration // over QUIC, after the last response
}

var usualPace = pace{
	firstRetry: 250 * time.Millisecond,
	retry:      time.Second,
	slowest:    20 * time.Second,
	refused:    5 * time.Minute,
	good:       2 * time.Second,
	stagger:    250 * time.Millisecond,
	patience:   2 * time.Second,
	headStart:  750 * time.Millisecond,
	dial:       10 * time.Second,
	rpc:        5 * time.Second,
	canary:     10 * time.Second,
	swap:       30 * time.Second,
	silence:    5 * time.Second,
	flush:      500 * time.Millisecond,
}

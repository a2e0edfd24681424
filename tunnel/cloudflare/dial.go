package cloudflare

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/cloudflare/cloudflared/connection"
	"github.com/cloudflare/cloudflared/connection/dialopts"
	"github.com/cloudflare/cloudflared/edgediscovery"
	"github.com/cloudflare/cloudflared/edgediscovery/allregions"
	cfdquic "github.com/cloudflare/cloudflared/quic"
	"github.com/cloudflare/cloudflared/tlsconfig"
	"github.com/quic-go/quic-go"
	"golang.org/x/sys/unix"
)

// addresses hands out the edge's addresses so that slots have different ones,
// spread over its regions, as long as there are enough.
type addresses struct {
	static []string // instead of a search
	region string
	log    *slog.Logger

	mu    sync.Mutex
	edge  *edgediscovery.Edge
	found time.Time
}

// lookAgain is the age at which a failure makes the edge be looked up again.
const lookAgain = 5 * time.Minute

// take is the slot's address: the one it has, or another. When all are taken,
// one is shared.
//
// unreachable says that the slot's address did not answer, rather than that its
// connection ended.
func (a *addresses) take(ctx context.Context, slot int, another, unreachable bool) (netip.AddrPort, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.edge == nil || unreachable && len(a.static) == 0 && time.Since(a.found) > lookAgain {
		edge, err := a.find(ctx)
		if err != nil && a.edge == nil {
			return netip.AddrPort{}, err
		}
		if err == nil {
			a.edge, a.found = edge, time.Now()
		}
	}
	get := a.edge.GetAddr
	if another {
		get = func(slot int) (*allregions.EdgeAddr, error) { return a.edge.GetDifferentAddr(slot, unreachable) }
	}
	address, err := get(slot)
	if err != nil {
		address, err = a.edge.GetAddrForRPC()
	}
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("choose an edge address: %w", err)
	}
	ap := address.TCP.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()), nil
}

// find looks the edge up. cloudflared's search takes no context and may hang on
// a dead resolver, so it is left to itself when ctx ends.
func (a *addresses) find(ctx context.Context) (*edgediscovery.Edge, error) {
	library := libraryLog(a.log)
	type result struct {
		edge *edgediscovery.Edge
		err  error
	}
	found := make(chan result, 1)
	go func() {
		var r result
		if len(a.static) > 0 {
			r.edge, r.err = edgediscovery.StaticEdge(library, a.static)
		} else {
			r.edge, r.err = edgediscovery.ResolveEdge(library, a.region, allregions.Auto)
		}
		found <- r
	}()
	select {
	case r := <-found:
		if r.err != nil {
			return nil, fmt.Errorf("find the edge by DNS (does this machine resolve names?): %w", r.err)
		}
		return r.edge, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// dial connects a slot to an address by the protocol that is set. For Auto two
// race: QUIC, and HTTP/2 once QUIC has had its chance, or the other way round
// where QUIC is known not to get through.
func (s *session) dial(slot int, address netip.AddrPort) (*link, error) {
	network := networkTowards(address)
	t, err := s.transport(address, network)
	if unanswered(err) {
		return nil, fmt.Errorf("%w: may this machine reach port %d of the edge, by UDP for quic and by TCP for http2?", err, address.Port())
	}
	if err != nil {
		return nil, err
	}
	return &link{
		transport: t, session: s, slot: slot, address: address, network: network, library: libraryLog(s.log),
		unregistered: make(chan struct{}), released: make(chan struct{}), ended: make(chan struct{}),
	}, nil
}

// unanswered reports whether an edge was not reached at all, as behind a firewall.
func unanswered(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout() || errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENETUNREACH) ||
		errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.EPERM)
}

// transport makes the encrypted connection of a link.
func (s *session) transport(address netip.AddrPort, network string) (transport, error) {
	byProtocol := map[Protocol]func(context.Context, netip.AddrPort) (transport, error){HTTP2: s.dialHTTP2, QUIC: s.dialQUIC}
	if dial, fixed := byProtocol[s.settings.Protocol]; fixed {
		return dial(s.draining, address)
	}
	order := []Protocol{QUIC, HTTP2}
	memory := s.connector.memory
	if memory.quicBlocked(network) {
		slices.Reverse(order)
	}

	// Buffered for all, so that a loser ends by itself.
	type finish struct {
		protocol Protocol
		transport
		err error
	}
	finished := make(chan finish, len(order))
	ctx, cancel := context.WithCancel(s.draining)
	running := 0
	begin := func() {
		protocol := order[running]
		running++
		go func() {
			t, err := byProtocol[protocol](ctx, address)
			finished <- finish{protocol, t, err}
		}()
	}
	begin()
	head := time.NewTimer(s.pace.headStart)
	defer head.Stop()
	var failures []error
	for {
		select {
		case <-head.C:
			if running < len(order) {
				begin()
			}
		case f := <-finished:
			if f.err != nil {
				failures = append(failures, f.err)
				if running < len(order) {
					begin()
				} else if len(failures) == running {
					cancel()
					return transport{}, fmt.Errorf("%w; %w", failures[0], failures[1]) // one line
				}
				continue
			}
			memory.setQUIC(network, f.protocol == QUIC)
			if running-len(failures) > 1 {
				// The loser is heard out: QUIC that comes late is slow, not
				// blocked. One that lost to QUIC has nothing to tell.
				if f.protocol == QUIC {
					cancel()
				}
				go func() {
					defer cancel()
					if loser := <-finished; loser.err == nil {
						loser.close()
						if loser.protocol == QUIC {
							memory.setQUIC(network, true)
						}
					}
				}()
			} else {
				cancel()
			}
			return f.transport, nil
		}
	}
}

// tlsConfig is for a connection to the edge. A key exchange that withstands
// quantum computers is preferred and not demanded.
func (s *session) tlsConfig(protocol connection.Protocol) (*tls.Config, error) {
	roots := s.settings.RootCAs
	if roots == nil {
		pool, err := edgeRoots()
		if err != nil {
			return nil, err
		}
		roots = pool
	}
	settings := protocol.TLSSettings()
	return &tls.Config{
		RootCAs: roots, ServerName: settings.ServerName, NextProtos: settings.NextProtos,
		MinVersion:       tls.VersionTLS12,
		CurvePreferences: []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256},
	}, nil
}

// edgeRoots are the system's authorities and Cloudflare's own.
var edgeRoots = sync.OnceValues(func() (*x509.CertPool, error) {
	pool, err := x509.SystemCertPool()
	if err != nil {
		return nil, fmt.Errorf("read the system's certificate authorities: %w", err)
	}
	own, err := tlsconfig.GetCloudflareRootCA()
	if err != nil {
		return nil, fmt.Errorf("read Cloudflare's certificate authorities: %w", err)
	}
	for _, c := range own {
		pool.AddCert(c)
	}
	return pool, nil
})

// The kernel gives a TCP connection up when data is unacknowledged, or probes
// unanswered, for this long.
const tcpSilence = 10 * time.Second

// withoutAddresses is an error without the addresses and ports in it, which
// differ from attempt to attempt and hide that the fault does not.
func withoutAddresses(err error) error {
	if fault, ok := errors.AsType[*net.OpError](err); ok {
		return fault.Err
	}
	if fault, ok := errors.AsType[*connection.EdgeQuicDialError](err); ok {
		return fault.Cause
	}
	return err
}

func (s *session) dialHTTP2(ctx context.Context, address netip.AddrPort) (transport, error) {
	config, err := s.tlsConfig(connection.HTTP2)
	if err != nil {
		return transport{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, s.pace.dial)
	defer cancel()
	dialer := net.Dialer{
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: tcpSilence, Interval: tcpSilence / 5, Count: 5},
		Control: func(_, _ string, c syscall.RawConn) error {
			var option error
			if err := c.Control(func(fd uintptr) {
				option = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(tcpSilence.Milliseconds()))
			}); err != nil {
				return err
			}
			return option
		},
	}
	raw, err := dialer.DialContext(ctx, "tcp", address.String())
	if err != nil {
		return transport{}, fmt.Errorf("connect by http2: %w", withoutAddresses(err))
	}
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return transport{}, fmt.Errorf("connect by http2: shake hands: %w", withoutAddresses(err))
	}
	t := transport{protocol: HTTP2, tcp: &watchedConn{Conn: conn, closed: make(chan struct{})}, keyExchange: conn.ConnectionState().CurveID.String()}
	if local, ok := conn.LocalAddr().(*net.TCPAddr); ok {
		t.local = local.IP
	}
	return t, nil
}

func (s *session) dialQUIC(ctx context.Context, address netip.AddrPort) (transport, error) {
	config, err := s.tlsConfig(connection.QUIC)
	if err != nil {
		return transport{}, err
	}
	// Larger first packets do not fit where the path is itself a tunnel.
	packet := uint16(1232)
	if address.Addr().Is6() {
		packet = 1252
	}
	ctx, cancel := context.WithTimeout(ctx, s.pace.dial)
	defer cancel()
	conn, err := connection.DialQuic(ctx, &quic.Config{
		HandshakeIdleTimeout:       cfdquic.HandshakeIdleTimeout,
		MaxIdleTimeout:             cfdquic.MaxIdleTimeout,
		KeepAlivePeriod:            cfdquic.MaxIdlePingPeriod,
		MaxIncomingStreams:         cfdquic.MaxIncomingStreams,
		MaxIncomingUniStreams:      cfdquic.MaxIncomingStreams,
		EnableDatagrams:            true, // the edge expects the extension, not datagrams
		MaxConnectionReceiveWindow: 30 << 20,
		MaxStreamReceiveWindow:     6 << 20,
		InitialPacketSize:          packet,
	}, config, address, nil, 0, libraryLog(s.log), dialopts.DialOpts{SkipPortReuse: true})
	if err != nil {
		return transport{}, fmt.Errorf("connect by quic: %w", withoutAddresses(err))
	}
	t := transport{protocol: QUIC, quic: conn, keyExchange: conn.ConnectionState().TLS.CurveID.String()}
	if local, ok := conn.LocalAddr().(*net.UDPAddr); ok {
		t.local = local.IP
	}
	return t, nil
}

package names

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// What a client may hold. Peers are authenticated, but a machine among them may
// be broken or taken over.
const (
	queryTimeout = 2 * time.Second  // for a question on a connection that is open
	idleTimeout  = 10 * time.Second // between questions
	mostConns    = 16               // TCP connections of one asker
	mostPerConn  = 1000             // questions on one of them
	largestQuery = 4096
)

// listener is one address that is listened at, by UDP and TCP.
type listener struct {
	udp, tcp *dns.Server
	sockets  [2]interface{ Close() error }
	ended    atomic.Bool // one of the two ended by itself
	closed   atomic.Bool
}

// open listens at an address, whether an interface has it or not.
func (r *Resolver) open(at netip.AddrPort) (*listener, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if controlErr := c.Control(func(fd uintptr) {
			// The device comes and goes with the process that carries it; the
			// sockets need not.
			if at.Addr().Is4() {
				err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1)
			} else {
				err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_FREEBIND, 1)
			}
		}); controlErr != nil {
			return controlErr
		}
		return err
	}}
	ctx := context.Background()
	udp, err := lc.ListenPacket(ctx, "udp", at.String())
	if err != nil {
		return nil, err
	}
	tcp, err := lc.Listen(ctx, "tcp", at.String())
	if err != nil {
		_ = udp.Close()
		return nil, err
	}
	l := &listener{sockets: [2]interface{ Close() error }{udp, tcp}}
	l.udp = &dns.Server{PacketConn: udp, Handler: r, UDPSize: largestQuery}
	l.tcp = &dns.Server{
		Listener: &door{Listener: tcp, resolver: r}, Handler: r, MaxTCPQueries: mostPerConn,
		ReadTimeout: queryTimeout, WriteTimeout: queryTimeout, IdleTimeout: func() time.Duration { return idleTimeout },
	}
	for _, s := range []*dns.Server{l.udp, l.tcp} {
		go func() {
			err := s.ActivateAndServe()
			if l.closed.Load() {
				return
			}
			l.ended.Store(true)
			r.log.Warn("stopped to answer, taking the address again", "listen", at, "err", err)
			select {
			case r.news <- struct{}{}:
			default:
			}
		}()
	}
	return l, nil
}

func (l *listener) close() {
	l.closed.Store(true)
	for _, s := range l.sockets {
		_ = s.Close()
	}
	// Nobody can be answered any more; what is under way may end by itself.
	ctx, cancel := context.WithTimeout(context.Background(), queryTimeout/20)
	defer cancel()
	_ = l.udp.ShutdownContext(ctx)
	_ = l.tcp.ShutdownContext(ctx)
}

// door lets TCP connections in: of those who may ask, and few of each.
type door struct {
	net.Listener
	resolver *Resolver
}

// Accept returns the next connection that may stay.
func (d *door) Accept() (net.Conn, error) {
	for {
		conn, err := d.Listener.Accept()
		if err != nil {
			// Too many open files, say: the server would end, and all it needs
			// is a moment.
			if !errors.Is(err, net.ErrClosed) {
				time.Sleep(queryTimeout / 20)
				continue
			}
			return nil, err
		}
		a := d.resolver.setup.Load().asks(addrOf(conn.RemoteAddr()))
		if a == nil {
			d.resolver.refused.Add(1)
			_ = conn.Close()
			continue
		}
		if a.conns.Add(1) > mostConns {
			a.conns.Add(-1)
			d.resolver.limited.Add(1)
			_ = conn.Close()
			continue
		}
		return &counted{Conn: conn, asker: a}, nil
	}
}

// counted gives its place back when it closes.
type counted struct {
	net.Conn
	asker *asker
	gone  atomic.Bool
}

func (c *counted) Close() error {
	if !c.gone.Swap(true) {
		c.asker.conns.Add(-1)
	}
	return c.Conn.Close()
}

// addrOf is the address without port and zone.
func addrOf(a net.Addr) netip.Addr {
	switch a := a.(type) {
	case *net.UDPAddr:
		return a.AddrPort().Addr().Unmap().WithZone("")
	case *net.TCPAddr:
		return a.AddrPort().Addr().Unmap().WithZone("")
	}
	return netip.Addr{}
}

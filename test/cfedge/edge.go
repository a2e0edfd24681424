package cfedge

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
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/quic-go/quic-go"
)

// Options say what an edge is like. The zero value is one that is quick and
// well.
type Options struct {
	// Cloud has the tunnels and the DNS records; nil: an empty one is made.
	Cloud *Cloud
	// Listen is the address of the servers; zero: 127.0.0.1.
	Listen netip.Addr
	// Servers is how many addresses connectors can dial; zero: four. A connector
	// opens no more connections than there are.
	Servers int
	// RouteLag is for how long requests still go to a connection that has
	// unregistered. The real edge, which is many machines, takes some seconds.
	RouteLag time.Duration
	// ResponseTimeout is for how long a visitor waits for the head of a response;
	// zero: 100 s.
	ResponseTimeout time.Duration
	// Duplicates makes a server refuse a second connection of one connector with
	// EDUPCONN, so that it has to try another address.
	Duplicates bool
	// Logger hears of registrations and of failed requests; nil: nobody does.
	Logger *slog.Logger
}

// Refusal is what a connector that registers is told instead of being let in.
type Refusal struct {
	Reason string
	// Permanent says that trying again is of no use.
	Permanent bool
	// RetryAfter is what a connector that may try again is asked to wait.
	RetryAfter time.Duration
	// Times is how many registrations are refused; zero: all, until Admit.
	Times int
}

// Counts is what became of the requests of all visitors. Requests is the sum of
// the others and of those that are under way.
type Counts struct {
	Requests int64
	// Answered were answered to the last byte.
	Answered int64
	// Canceled were given up by the visitor.
	Canceled int64
	// NoTunnel found no tunnel, or none with a connection: status 530.
	NoTunnel int64
	// Refused were no HTTP, or too large: status 400 or 431.
	Refused int64
	// Lost were under way on a connection that the edge killed or fell silent on.
	Lost int64
	// Stale were sent over a connection that had unregistered, within RouteLag,
	// and that its connector no longer served.
	Stale int64
	// Failed is what else went wrong: the connector's doing.
	Failed int64
}

// Edge is the servers of an emulated Cloudflare, and the visitors' way in. It is
// safe for use by several goroutines.
type Edge struct {
	opts    Options
	cloud   *Cloud
	log     *slog.Logger
	pki     *authority
	servers []*server
	ctx     context.Context
	cancel  context.CancelFunc
	running sync.WaitGroup

	delay      atomic.Int64 // of registrations and requests, nanoseconds
	rejectQUIC atomic.Bool
	counts     struct{ requests, answered, canceled, noTunnel, refused, lost, stale, failed atomic.Int64 }

	mu          sync.Mutex
	connections []*Connection // registered, and those that have unregistered and are still routed to
	changed     chan struct{} // closed, and replaced, when connections changes
	refusal     *Refusal
	failures    []string
	gates       map[*gate]struct{}
	dark, noUDP bool
	closed      bool
}

// server is one address.
type server struct {
	edge     *Edge
	location string
	tcp      *net.TCPListener
	udp      *udpGate
	quic     *quic.Transport
}

// Start starts an edge on loopback. It ends with ctx or with Close.
func Start(ctx context.Context, opts Options) (*Edge, error) {
	if opts.Cloud == nil {
		opts.Cloud = NewCloud()
	}
	if !opts.Listen.IsValid() {
		opts.Listen = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	if opts.Servers == 0 {
		opts.Servers = 4
	}
	if opts.ResponseTimeout == 0 {
		opts.ResponseTimeout = 100 * time.Second
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	pki, err := newAuthority()
	if err != nil {
		return nil, err
	}
	e := &Edge{
		opts: opts, cloud: opts.Cloud, log: opts.Logger, pki: pki,
		changed: make(chan struct{}), gates: map[*gate]struct{}{},
	}
	e.ctx, e.cancel = context.WithCancel(ctx)
	for i := range opts.Servers {
		s, err := e.listen(i)
		if err != nil {
			e.Close()
			return nil, fmt.Errorf("start an edge: %w", err)
		}
		e.servers = append(e.servers, s)
	}
	context.AfterFunc(e.ctx, e.shut)
	e.cloud.OnConfigure(func(tunnel uuid.UUID, version int32, config []byte) {
		for _, c := range e.Connections() {
			if c.Tunnel == tunnel {
				c.configure(version, config)
			}
		}
	})
	return e, nil
}

// Close ends all connections at once and waits until nothing of the edge runs.
func (e *Edge) Close() {
	e.mu.Lock()
	e.closed = true
	e.mu.Unlock()
	e.cancel()
	e.shut()
	e.running.Wait()
}

// spawn runs f until it ends, which Close waits for, and says whether it does:
// not after Close.
func (e *Edge) spawn(f func()) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.closed {
		e.running.Go(f)
	}
	return !e.closed
}

// shut closes whatever an accepting or reading goroutine waits for.
func (e *Edge) shut() {
	for _, s := range e.servers {
		s.tcp.Close()
		s.quic.Close()
		s.udp.Close()
	}
	for _, g := range e.openGates() {
		g.Close()
	}
}

// locations are the data centres that servers say they are in, as far from each
// other as those that a real connector is given.
var locations = []string{"fra08", "ams11", "fra13", "ams04"}

// listen opens one port for both protocols.
func (e *Edge) listen(i int) (*server, error) {
	// A free TCP port need not be a free UDP port, so it may take a few.
	for attempt := 0; ; attempt++ {
		tcp, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(e.opts.Listen, 0)))
		if err != nil {
			return nil, err
		}
		address := tcp.Addr().(*net.TCPAddr)
		udp, err := net.ListenUDP("udp", &net.UDPAddr{IP: address.IP, Port: address.Port})
		if err != nil {
			tcp.Close()
			if attempt < 20 {
				continue
			}
			return nil, err
		}
		s := &server{edge: e, location: locations[i%len(locations)], tcp: tcp, udp: newUDPGate(udp)}
		s.quic = &quic.Transport{Conn: s.udp}
		listener, err := s.quic.Listen(e.tlsConfig(quicServerName, []string{"argotunnel"}), s.quicConfig())
		if err != nil {
			tcp.Close()
			udp.Close()
			return nil, err
		}
		e.running.Go(s.acceptTCP)
		e.running.Go(func() { s.acceptQUIC(listener) })
		return s, nil
	}
}

// The names by which connectors ask for a protocol.
const (
	http2ServerName = "h2.cftunnel.com"
	quicServerName  = "quic.cftunnel.com"
)

// errRejected is what the emulator itself does to a handshake.
var errRejected = errors.New("reject a handshake as the test asked for")

// tlsConfig lets in who asks for the server name of the protocol. Over HTTP/2 a
// connector asks for no application protocol at all.
func (e *Edge) tlsConfig(name string, protocols []string) *tls.Config {
	c := &tls.Config{Certificates: []tls.Certificate{e.pki.edge}, NextProtos: protocols}
	c.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		switch {
		case hello.ServerName != name:
			return nil, fmt.Errorf("refuse the server name %q: this is %s", hello.ServerName, name)
		case name == quicServerName && e.rejectQUIC.Load():
			return nil, errRejected
		}
		return nil, nil
	}
	return c
}

// Cloud returns what the edge looks tunnels and routes up in.
func (e *Edge) Cloud() *Cloud { return e.cloud }

// Addrs returns the addresses for connectors, as host:port, each for TCP and UDP.
func (e *Edge) Addrs() []string {
	all := make([]string, 0, len(e.servers))
	for _, s := range e.servers {
		all = append(all, s.tcp.Addr().String())
	}
	return all
}

// RootCAs holds the authority that connectors have to trust.
func (e *Edge) RootCAs() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(e.pki.cert)
	return pool
}

// CA returns the authority's certificate, PEM.
func (e *Edge) CA() []byte { return slices.Clone(e.pki.pem) }

// Connections returns the registered connections, oldest first.
func (e *Edge) Connections() []*Connection {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(e.connections), func(c *Connection) bool { return !c.registered.Load() })
}

// WaitConnections waits until a tunnel has n registered connections, no more and
// no less.
func (e *Edge) WaitConnections(ctx context.Context, tunnel uuid.UUID, n int) error {
	for {
		e.mu.Lock()
		changed, have := e.changed, 0
		for _, c := range e.connections {
			if c.Tunnel == tunnel && c.registered.Load() {
				have++
			}
		}
		e.mu.Unlock()
		if have == n {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("wait for %d connections, there are %d: %w", n, have, context.Cause(ctx))
		}
	}
}

// Counts returns what became of the visitors' requests so far.
func (e *Edge) Counts() Counts {
	return Counts{
		Requests: e.counts.requests.Load(), Answered: e.counts.answered.Load(), Canceled: e.counts.canceled.Load(),
		NoTunnel: e.counts.noTunnel.Load(), Refused: e.counts.refused.Load(), Lost: e.counts.lost.Load(),
		Stale: e.counts.stale.Load(), Failed: e.counts.failed.Load(),
	}
}

// Failures tells the first twenty requests that are counted as Stale or Failed.
func (e *Edge) Failures() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.failures)
}

func (e *Edge) noteFailure(text string) {
	e.log.Warn("request failed", "what", text)
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.failures) < 20 {
		e.failures = append(e.failures, text)
	}
}

// Refuse makes every registration fail, until Admit.
func (e *Edge) Refuse(r Refusal) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.refusal = &r
}

// Admit ends Refuse.
func (e *Edge) Admit() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.refusal = nil
}

// Delay makes the edge slow: each registration and each request waits so long.
func (e *Edge) Delay(d time.Duration) { e.delay.Store(int64(d)) }

func (e *Edge) pause(ctx context.Context) error {
	d := time.Duration(e.delay.Load())
	if d == 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// RejectQUIC makes every QUIC handshake end with an error, as behind a firewall
// that looks into it.
func (e *Edge) RejectQUIC(on bool) { e.rejectQUIC.Store(on) }

// BlockUDP drops every UDP packet, so that QUIC hears nothing at all.
func (e *Edge) BlockUDP(on bool) { e.silence(func() { e.noUDP = on }) }

// Dark drops every packet in both directions, of TCP and UDP, below the
// protocols: nothing is acknowledged, refused or closed. It has the last word on
// connections that were dark by themselves.
func (e *Edge) Dark(on bool) {
	e.silence(func() { e.dark = on })
	for _, s := range e.servers {
		if err := dropAll(s.tcp, on); err != nil {
			e.log.Error("darken a listener", "err", err)
		}
	}
	for _, g := range e.openGates() {
		g.dark(on)
	}
}

// silence changes what is silent, and whom that is to be blamed on.
func (e *Edge) silence(change func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	tcp, udp := e.dark, e.dark || e.noUDP
	change()
	for _, c := range e.connections {
		switch c.Protocol {
		case "http2":
			if e.dark != tcp {
				c.fault(e.dark)
			}
		default:
			if now := e.dark || e.noUDP; now != udp {
				c.fault(now)
			}
		}
	}
	for _, s := range e.servers {
		s.udp.silence(e.dark || e.noUDP)
	}
}

// Kill cuts all connections.
func (e *Edge) Kill() {
	for _, c := range e.Connections() {
		c.Kill()
	}
}

func (e *Edge) openGates() []*gate {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := make([]*gate, 0, len(e.gates))
	for g := range e.gates {
		all = append(all, g)
	}
	return all
}

// enter makes a connection one that requests are sent to.
func (e *Edge) enter(c *Connection) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.connections = append(e.connections, c)
	e.announce()
}

// leave ends that.
func (e *Edge) leave(c *Connection) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.connections = slices.DeleteFunc(e.connections, func(other *Connection) bool { return other == c })
	e.announce()
}

// announce wakes who waits for a change of connections; mu is held.
func (e *Edge) announce() {
	close(e.changed)
	e.changed = make(chan struct{})
}

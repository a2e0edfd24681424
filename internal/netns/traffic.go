package netns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"sync"
	"time"
)

// timeout is how long traffic that should pass may take, and how long one has
// to wait to be sure that none came.
const timeout = 300 * time.Millisecond

// Server answers in a namespace: a TCP connection gets back what it sends, a
// datagram is answered with itself, and who sent it is counted.
type Server struct {
	Addr netip.AddrPort // with the port, the same for TCP and UDP

	tcp net.Listener
	udp *net.UDPConn

	mu     sync.Mutex
	counts map[netip.Addr]int
}

// Serve starts a Server on addr (all of them if unspecified), port 0 meaning any.
func (ns *NS) Serve(addr netip.AddrPort) *Server {
	ns.t.Helper()
	s := &Server{counts: map[netip.Addr]int{}}
	ns.Must(func() error {
		var err error
		if s.tcp, err = new(net.ListenConfig).Listen(context.Background(), "tcp", addr.String()); err != nil {
			return err
		}
		s.Addr = netip.AddrPortFrom(addr.Addr(), s.tcp.Addr().(*net.TCPAddr).AddrPort().Port())
		pc, err := new(net.ListenConfig).ListenPacket(context.Background(), "udp", s.Addr.String())
		if err != nil {
			return err
		}
		s.udp = pc.(*net.UDPConn)
		return s.udp.SetReadBuffer(8 << 20)
	})
	ns.t.Cleanup(func() {
		s.tcp.Close()
		s.udp.Close()
	})
	go func() {
		for {
			c, err := s.tcp.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	go func() {
		buf := make([]byte, 1500)
		for {
			n, from, err := s.udp.ReadFromUDPAddrPort(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				continue // such as an unreachable sender
			}
			s.mu.Lock()
			s.counts[from.Addr().Unmap()]++
			s.mu.Unlock()
			s.udp.WriteToUDPAddrPort(buf[:n], from)
		}
	}()
	return s
}

// Received returns how many datagrams came, by sender.
func (s *Server) Received() map[netip.Addr]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.counts)
}

// Push sends datagrams to an address, one each interval, whether or not anybody
// answers, for as long as the Server lives.
func (s *Server) Push(to netip.AddrPort, interval time.Duration) {
	go func() {
		for {
			if _, err := s.udp.WriteToUDPAddrPort([]byte("pushed"), to); errors.Is(err, net.ErrClosed) {
				return
			}
			time.Sleep(interval)
		}
	}()
}

// Dial opens a TCP connection from one of the namespace's addresses.
func (ns *NS) Dial(from netip.Addr, to netip.AddrPort) (net.Conn, error) {
	var c net.Conn
	err := ns.Run(func() error {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), Timeout: ns.wait}
		var err error
		c, err = d.Dial("tcp", to.String())
		return err
	})
	return c, err
}

// Patient is the same namespace, for what has to pass at the first attempt: it waits
// for it as long as TCP does before a second one.
func (ns *NS) Patient() *NS { return &NS{t: ns.t, fd: ns.fd, wait: 900 * time.Millisecond} }

// Echo sends a few bytes over c and reports whether they came back in time.
func Echo(c net.Conn) error { return echo(c, timeout) }

func echo(c net.Conn, wait time.Duration) error {
	c.SetDeadline(time.Now().Add(wait))
	if _, err := c.Write([]byte("hello")); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 5))
	return err
}

// TCP reports whether a connection can be opened and carries data.
func (ns *NS) TCP(from netip.Addr, to netip.AddrPort) error {
	c, err := ns.Dial(from, to)
	if err != nil {
		return err
	}
	defer c.Close()
	return echo(c, ns.wait)
}

// DialUDP opens a flow of datagrams from one of the namespace's addresses.
func (ns *NS) DialUDP(from netip.Addr, to netip.AddrPort) (net.Conn, error) {
	var c *net.UDPConn
	err := ns.Run(func() error {
		var err error
		c, err = net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), net.UDPAddrFromAddrPort(to))
		return err
	})
	return c, err
}

// UDP reports whether a datagram is answered.
func (ns *NS) UDP(from netip.Addr, to netip.AddrPort) error {
	c, err := ns.DialUDP(from, to)
	if err != nil {
		return err
	}
	defer c.Close()
	return echo(c, ns.wait)
}

// Blaster sends datagrams from each of some addresses in turn, up to 64 in a
// millisecond: enough to find a gap of that length, and not so many that those
// who have to close it get no processor.
type Blaster struct {
	stop chan struct{}
	done chan error
	sent int
}

// Blast starts a Blaster, and returns when the first datagram is on its way. The
// sources have to be the namespace's own.
func (ns *NS) Blast(to netip.AddrPort, sources ...netip.Addr) *Blaster {
	ns.t.Helper()
	conns := make([]*net.UDPConn, len(sources))
	ns.Must(func() error {
		for i, from := range sources {
			var err error
			// Not connected: errors that come back do not stop a blaster.
			if conns[i], err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0))); err != nil {
				return err
			}
		}
		return nil
	})
	b := &Blaster{stop: make(chan struct{}), done: make(chan error, 1)}
	ns.t.Cleanup(func() {
		for _, c := range conns {
			c.Close()
		}
	})
	begun := make(chan struct{})
	begin := sync.OnceFunc(func() { close(begun) })
	go func() {
		defer begin()
		var payload [18]byte // the smallest that fills a frame
		for {
			for _, c := range conns {
				if b.sent&63 == 63 {
					time.Sleep(time.Millisecond)
				}
				select {
				case <-b.stop:
					b.done <- nil
					return
				default:
				}
				binary.BigEndian.PutUint64(payload[:], uint64(b.sent))
				if _, err := c.WriteToUDPAddrPort(payload[:], to); err != nil {
					b.done <- fmt.Errorf("blast: %w", err)
					return
				}
				b.sent++
				begin()
			}
		}
	}()
	<-begun
	return b
}

// Stop ends the blast and returns how many datagrams went out.
func (b *Blaster) Stop() (int, error) {
	close(b.stop)
	err := <-b.done
	return b.sent, err
}

// Scan sends a datagram to each of n ports from first on, and returns how many
// went out.
func (ns *NS) Scan(from, to netip.Addr, first uint16, n int) int {
	ns.t.Helper()
	sent := 0
	ns.Must(func() error {
		c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0)))
		if err != nil {
			return err
		}
		defer c.Close()
		for i := range n {
			if _, err := c.WriteToUDPAddrPort([]byte("scan"), netip.AddrPortFrom(to, first+uint16(i))); err == nil {
				sent++
			}
		}
		return nil
	})
	return sent
}

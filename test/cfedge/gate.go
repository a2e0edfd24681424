package cfedge

import (
	"errors"
	"maps"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// A dark network acknowledges nothing. That cannot be had by not reading, since
// the kernel answers for a socket whoever reads it; so a filter on the socket
// drops what comes in before TCP sees it, and what would go out is held back.

// gate is a TCP connection that can fall silent.
type gate struct {
	*net.TCPConn
	edge *Edge
	done chan struct{} // closed with the connection

	mu     sync.Mutex
	silent bool // packets are dropped
	wedged bool // packets are acknowledged and left lying
	broken bool // the kernel has given it up
	closed bool
	moved  *sync.Cond
}

func (e *Edge) newGate(conn *net.TCPConn) *gate {
	g := &gate{TCPConn: conn, edge: e, done: make(chan struct{})}
	g.moved = sync.NewCond(&g.mu)
	// The edge itself finds out that a connector is gone, by means that a
	// connector's protocol does not see.
	_ = conn.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: 2 * time.Second, Interval: time.Second, Count: 3})
	_ = control(conn, func(fd int) error {
		return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 5000)
	})
	e.mu.Lock()
	e.gates[g] = struct{}{}
	dark := e.dark
	e.mu.Unlock()
	if dark {
		g.dark(true)
	}
	return g
}

// dark drops all packets, or ends that.
func (g *gate) dark(on bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed || g.silent == on {
		return
	}
	if err := dropAll(g.TCPConn, on); err != nil && !errors.Is(err, net.ErrClosed) {
		g.edge.log.Error("darken a connection", "err", err)
	}
	g.silent = on
	g.moved.Broadcast()
}

// wedge leaves what comes in unread and sends nothing, or ends that.
func (g *gate) wedge(on bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.wedged = on
	g.moved.Broadcast()
}

// pass waits until the gate is open.
func (g *gate) pass() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	for (g.silent || g.wedged) && !g.closed && !g.broken {
		g.moved.Wait()
	}
	if g.closed || g.broken {
		return net.ErrClosed
	}
	return nil
}

func (g *gate) Read(b []byte) (int, error) {
	n, err := g.TCPConn.Read(b)
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		// Nobody reads what is still to be written, so nothing may wait to be.
		g.mu.Lock()
		g.broken = true
		g.moved.Broadcast()
		g.mu.Unlock()
		return n, err
	}
	if passed := g.pass(); passed != nil {
		return 0, passed
	}
	return n, err
}

func (g *gate) Write(b []byte) (int, error) {
	if err := g.pass(); err != nil {
		return 0, err
	}
	return g.TCPConn.Write(b)
}

// Close closes the connection; a silent one says no goodbye.
func (g *gate) Close() error {
	g.mu.Lock()
	if g.closed {
		g.mu.Unlock()
		return nil
	}
	g.closed = true
	silent := g.silent
	close(g.done)
	g.moved.Broadcast()
	g.mu.Unlock()

	g.edge.mu.Lock()
	delete(g.edge.gates, g)
	g.edge.mu.Unlock()
	if silent {
		// Otherwise the kernel goes on sending what it has.
		_ = g.TCPConn.SetLinger(0)
	}
	return g.TCPConn.Close()
}

// reset closes the connection as a machine does that has lost it.
func (g *gate) reset() {
	_ = g.TCPConn.SetLinger(0)
	g.Close()
}

// udpGate is the UDP socket of a server, for all its connections.
type udpGate struct {
	*net.UDPConn

	mu     sync.Mutex
	all    bool
	ports  map[uint16]bool // of connectors that hear and are heard of no longer
	silent atomic.Pointer[silence]
}

// silence is what a udpGate drops: all, or what goes to these ports.
type silence struct {
	all   bool
	ports map[uint16]bool
}

func newUDPGate(conn *net.UDPConn) *udpGate {
	g := &udpGate{UDPConn: conn, ports: map[uint16]bool{}}
	g.silent.Store(new(silence))
	return g
}

func (g *udpGate) silence(on bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.all = on
	g.apply()
}

func (g *udpGate) silencePort(port uint16, on bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if on {
		g.ports[port] = true
	} else {
		delete(g.ports, port)
	}
	g.apply()
}

func (g *udpGate) apply() {
	g.silent.Store(&silence{g.all, maps.Clone(g.ports)})
	switch {
	case g.all:
		_ = dropAll(g.UDPConn, true)
	case len(g.ports) == 0:
		_ = dropAll(g.UDPConn, false)
	default:
		// A UDP header begins with the source port.
		program := []bpf.Instruction{bpf.LoadAbsolute{Off: 0, Size: 2}}
		for port := range g.ports {
			program = append(program,
				bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: uint32(port), SkipTrue: 1},
				bpf.RetConstant{Val: 0})
		}
		_ = filter(g.UDPConn, append(program, bpf.RetConstant{Val: 1 << 16}))
	}
}

func (g *udpGate) drops(to *net.UDPAddr) bool {
	s := g.silent.Load()
	return s.all || len(s.ports) > 0 && s.ports[uint16(to.Port)]
}

// WriteMsgUDP is what QUIC sends with.
func (g *udpGate) WriteMsgUDP(b, oob []byte, to *net.UDPAddr) (int, int, error) {
	if g.drops(to) {
		return len(b), len(oob), nil
	}
	return g.UDPConn.WriteMsgUDP(b, oob, to)
}

// WriteTo is what QUIC sends with where it cannot use the other.
func (g *udpGate) WriteTo(b []byte, to net.Addr) (int, error) {
	if address, ok := to.(*net.UDPAddr); ok && g.drops(address) {
		return len(b), nil
	}
	return g.UDPConn.WriteTo(b, to)
}

// dropAll makes a socket deaf, or ends that.
func dropAll(s syscall.Conn, on bool) error {
	if on {
		return filter(s, []bpf.Instruction{bpf.RetConstant{Val: 0}})
	}
	return control(s, func(fd int) error {
		err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0)
		if errors.Is(err, unix.ENOENT) {
			return nil // there was none
		}
		return err
	})
}

// filter lets a socket hear what a program passes.
func filter(s syscall.Conn, program []bpf.Instruction) error {
	raw, err := bpf.Assemble(program)
	if err != nil {
		return err
	}
	instructions := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		instructions[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	return control(s, func(fd int) error {
		return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
			&unix.SockFprog{Len: uint16(len(instructions)), Filter: &instructions[0]})
	})
}

func control(s syscall.Conn, f func(fd int) error) error {
	raw, err := s.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = f(int(fd)) }); err != nil {
		return err
	}
	return failed
}

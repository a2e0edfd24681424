package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/edgeward/edgeward/test/benchmark/figures"
	"github.com/edgeward/edgeward/test/benchmark/stage"
)

// programPart measures the start of the built program and its memory.
func programPart(s *stage.Scope, opts options, binaries string) (string, error) {
	rows := [][]string{heads("the program, device in userspace", opts.memory), {"from start to ready, ms"}, {"resident then, MB"}, {"resident at most until then, MB"}}
	for _, n := range opts.memory {
		g, err := newProgram(s, binaries, n, 9)
		if err != nil {
			return "", err
		}
		took, err := g.start()
		if err != nil {
			return "", fmt.Errorf("with %d peers: %w", n, err)
		}
		if err := stage.Wait(s, opts.settle); err != nil {
			return "", err
		}
		now, most, err := resident(g.cmd.Process.Pid)
		if err != nil {
			return "", err
		}
		end(g.cmd, syscall.SIGKILL)
		opts.say("program: %d peers: ready after %v, %d MB, at most %d MB", n, took, now>>20, most>>20)
		for i, text := range []string{ms(took), digits(float64(now) / (1 << 20)), digits(float64(most) / (1 << 20))} {
			rows[i+1] = append(rows[i+1], text)
		}
	}
	for i := range rows {
		rows[i] = rows[i][:len(opts.memory)+1] // there are no goals
	}
	return figures.Table(rows), nil
}

// resident is the memory of a process, in bytes.
func resident(pid int) (now, most int64, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0, fmt.Errorf("read the memory of a process: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		for key, into := range map[string]*int64{"VmRSS:": &now, "VmHWM:": &most} {
			if value, ok := strings.CutPrefix(line, key); ok {
				if _, err := fmt.Sscan(value, into); err != nil {
					return 0, 0, fmt.Errorf("read the memory of a process: %w", err)
				}
				*into <<= 10
			}
		}
	}
	return now, most, nil
}

// gapGoal is the most that a restart may cost one who talks through the gateway.
const gapGoal = 250 * time.Millisecond

// restartPart kills the built program and starts it again, while somebody pings
// through it.
func restartPart(s *stage.Scope, opts options, binaries string) (string, error) {
	port, err := echo(s)
	if err != nil {
		return "", err
	}
	g, err := newProgram(s, binaries, opts.peers-1, port)
	if err != nil {
		return "", err
	}
	c, err := join(s, netip.MustParsePrefix("10.66.0.1/16"), g.key.Public(), g.port)
	if err != nil {
		return "", err
	}
	if err := g.peer(opts.peers, c.key.Public(), c.preshared, c.address); err != nil {
		return "", err
	}
	if _, err := g.start(); err != nil {
		return "", err
	}
	var gaps, ready []time.Duration
	for i := range opts.restarts {
		p, err := c.ping(s, netip.AddrPortFrom(service, port))
		if err != nil {
			return "", err
		}
		if err := g.remembers(); err != nil {
			return "", err
		}
		end(g.cmd, syscall.SIGKILL)
		took, err := g.start()
		if err == nil {
			err = p.answered()
		}
		gap := p.end()
		if err != nil {
			return "", fmt.Errorf("restart %d: %w", i+1, err)
		}
		gaps, ready = append(gaps, gap), append(ready, took)
	}
	opts.say("restart: gaps %v, ready after %v", gaps, ready)
	spread := figures.SpreadOf(gaps)
	rows := [][]string{
		{fmt.Sprintf("killed and started again, %s peers", figures.Thousands(opts.peers)), "median", "worst of " + fmt.Sprint(opts.restarts), "goal"},
		{"ms without an answer", ms(spread.Median), ms(spread.Most), "250 in the median: " + figures.Held(spread.Median <= gapGoal)},
		{"ms from start to ready", ms(middle(ready)), ms(slices.Max(ready)), ""},
	}
	return figures.Table(rows), nil
}

// remembers waits until the program has written down where its client is.
func (g *program) remembers() error {
	for began := time.Now(); ; {
		text, _ := os.ReadFile(filepath.Join(g.dir, "edgeward0.state.json"))
		if strings.Contains(string(text), "127.0.0.1:") {
			return nil
		}
		if time.Since(began) > 20*time.Second {
			return errors.New("it does not write down where its peer is")
		}
		if err := stage.Wait(g.scope, 50*time.Millisecond); err != nil {
			return err
		}
	}
}

// echo answers each datagram at a port of this machine with itself.
func echo(s *stage.Scope) (port uint16, err error) {
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(service, 0)))
	if err != nil {
		return 0, fmt.Errorf("answer pings: %w", err)
	}
	s.Cleanup(func() { c.Close() })
	go func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				_, _ = c.WriteToUDPAddrPort(buf[:n], from) // a ping that is lost is counted
			}
		}
	}()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Port(), nil
}

// pings are datagrams to an echo, one each 20 ms.
type pings struct {
	scope      *stage.Scope
	c          net.Conn
	stop, done chan struct{}

	mu    sync.Mutex
	last  time.Time     // when an answer came
	fresh time.Time     // when the ping was sent that was answered last
	gap   time.Duration // the longest between answers
}

// ping begins to ping, and returns when an answer is there.
func (c *client) ping(s *stage.Scope, to netip.AddrPort) (*pings, error) {
	p := &pings{scope: s, stop: make(chan struct{}), done: make(chan struct{})}
	err := c.ns.Run(func() (err error) {
		p.c, err = net.Dial("udp", to.String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("ping: %w", err)
	}
	go p.read()
	go p.send()
	if err := p.answered(); err != nil {
		p.end()
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gap = 0
	return p, nil
}

func (p *pings) read() {
	for {
		var b [8]byte
		n, err := p.c.Read(b[:])
		if errors.Is(err, net.ErrClosed) || errors.Is(err, io.EOF) {
			return
		}
		if n != len(b) {
			continue // a refusal
		}
		now := time.Now()
		p.mu.Lock()
		if !p.last.IsZero() {
			p.gap = max(p.gap, now.Sub(p.last))
		}
		p.last, p.fresh = now, time.Unix(0, int64(binary.BigEndian.Uint64(b[:])))
		p.mu.Unlock()
	}
}

func (p *pings) send() {
	defer close(p.done)
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	for {
		var b [8]byte
		binary.BigEndian.PutUint64(b[:], uint64(time.Now().UnixNano()))
		_, _ = p.c.Write(b[:]) // a ping that is lost is counted
		select {
		case <-p.stop:
			return
		case <-ticker.C:
		}
	}
}

// answered waits until a ping of from now on is answered.
func (p *pings) answered() error {
	for began := time.Now(); ; {
		p.mu.Lock()
		fresh := p.fresh
		p.mu.Unlock()
		if fresh.After(began) {
			return nil
		}
		if time.Since(began) > 30*time.Second {
			return errors.New("pings through the tunnel are not answered")
		}
		if err := stage.Wait(p.scope, 5*time.Millisecond); err != nil {
			return err
		}
	}
}

// end ends the pings and returns the longest time between two answers.
func (p *pings) end() time.Duration {
	close(p.stop)
	<-p.done
	p.c.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.gap
}

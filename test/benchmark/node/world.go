package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/edgeward/edgeward/test/benchmark/stage"
)

// clean4 is never banned.
var clean4 = netip.MustParseAddr("203.0.113.7")

// world is a node in which a bouncer runs.
type world struct {
	*stage.World
	nonce uint32
}

func newWorld(s *stage.Scope) *world { return &world{World: stage.NewWorld(s, "up0")} }

// passing sends one packet from each address, and returns those whose packets
// the node let in. A packet of a clean address behind them, in the same queue,
// tells when all have been through.
func (w *world) passing(from ...netip.Addr) (map[netip.Addr]bool, error) {
	w.nonce++
	passed := map[netip.Addr]bool{}
	for i, addr := range append(from[:len(from):len(from)], clean4) {
		payload := binary.BigEndian.AppendUint32(nil, w.nonce)
		payload = binary.BigEndian.AppendUint32(payload, uint32(i))
		to := stage.Node4
		if addr.Is6() {
			to = stage.Node6
		}
		if _, err := unix.Write(w.Raw, stage.UDPFrame(w.MAC, addr, to, stage.SinkPort, payload)); err != nil {
			return nil, fmt.Errorf("send a packet: %w", err)
		}
	}
	var buf [64]byte
	for began := time.Now(); ; {
		n, _, err := unix.Recvfrom(w.Sink, buf[:], 0)
		switch {
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
			if time.Since(began) > stage.Patience {
				return nil, errors.New("look at what passes: a packet of an address that nobody banned was lost")
			}
			time.Sleep(20 * time.Microsecond)
			continue
		case err != nil:
			return nil, fmt.Errorf("look at what passes: %w", err)
		}
		if n < 8 || binary.BigEndian.Uint32(buf[:]) != w.nonce {
			continue
		}
		i := int(binary.BigEndian.Uint32(buf[4:]))
		if i == len(from) {
			return passed, nil
		}
		passed[from[i]] = true
	}
}

// stopped waits until none of the addresses comes through any more, or, with
// want false, until all do, and returns when that was.
func (w *world) stopped(want bool, limit time.Duration, from ...netip.Addr) (time.Time, error) {
	began := time.Now()
	for {
		passed, err := w.passing(from...)
		now := time.Now()
		if err != nil {
			return now, err
		}
		if want && len(passed) == 0 || !want && len(passed) == len(from) {
			return now, nil
		}
		if now.Sub(began) > limit {
			return now, &lateError{limit, len(passed), len(from)}
		}
		// Closely at first, when milliseconds count.
		pause := time.Millisecond
		if now.Sub(began) < 50*time.Millisecond {
			pause = 50 * time.Microsecond
		}
		if err := stage.Wait(w.Scope, pause); err != nil {
			return now, err
		}
	}
}

// lateError says that bans, or the end of them, did not come in time.
type lateError struct {
	after       time.Duration
	passing, of int
}

func (e *lateError) Error() string {
	return fmt.Sprintf("wait for bans: after %v, packets from %d of %d addresses pass", e.after, e.passing, e.of)
}

// dial connects to the node's loopback.
func (w *world) dial(ctx context.Context, _, addr string) (c net.Conn, err error) {
	err = w.Node.Run(func() error {
		c, err = (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", addr)
		return err
	})
	return c, err
}

// listen listens on the node's loopback.
func (w *world) listen() (net.Listener, error) {
	var l net.Listener
	err := w.Node.Run(func() (err error) {
		l, err = new(net.ListenConfig).Listen(context.Background(), "tcp4", "127.0.0.1:0")
		return err
	})
	return l, err
}

// serve answers on the node's loopback until the scope ends.
func (w *world) serve(h http.Handler) (url string, err error) {
	l, err := w.listen()
	if err != nil {
		return "", fmt.Errorf("listen on the node: %w", err)
	}
	server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: h}
	// Serve always ends with an error, and Close is the reason for it.
	go func() { _ = server.Serve(l) }()
	w.Scope.Cleanup(func() { server.Close() })
	return "http://" + l.Addr().String(), nil
}

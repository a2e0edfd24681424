package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// ports are those that this Conn speaks and spoke from.
type ports struct {
	mu  sync.Mutex
	all []uint32
}

func (p *ports) add(port uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	// Events of a connection that is gone may still be on their way; older
	// ones are not.
	p.all = append(p.all[max(0, len(p.all)-8):], port)
}

func (p *ports) has(port uint32) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Contains(p.all, port)
}

// Watch tells when others change the ruleset, until ctx ends; then the channel
// is closed. An event that nobody takes gives way to the next.
func (c *Conn) Watch(ctx context.Context) (<-chan Event, error) {
	s, err := c.listen()
	if err != nil {
		return nil, err
	}
	events := make(chan Event, 1)
	go c.watch(ctx, s, events)
	return events, nil
}

// listen subscribes to the commits of the namespace, but for all they hold: a
// load of a million elements sends a million messages, and one that says that
// it is done.
func (c *Conn) listen() (*netlink.Conn, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: c.opts.NetNS})
	if err != nil {
		return nil, fmt.Errorf("watch ruleset: %w", err)
	}
	// The type is in the byte order of the machine, and BPF reads big-endian.
	var typ [2]byte
	binary.NativeEndian.PutUint16(typ[:], subsystem|unix.NFT_MSG_NEWGEN)
	filter, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: 4, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(binary.BigEndian.Uint16(typ[:])), SkipFalse: 1},
		bpf.RetConstant{Val: 0xffffffff},
		bpf.RetConstant{Val: 0},
	})
	if err == nil {
		err = conn.SetBPF(filter)
	}
	if err == nil {
		err = conn.SetReadBuffer(receiveBuffer)
	}
	if err == nil {
		err = conn.JoinGroup(unix.NFNLGRP_NFTABLES)
	}
	if err != nil {
		conn.Close()
		if errors.Is(err, unix.EPERM) {
			err = ErrPermission
		}
		return nil, fmt.Errorf("watch ruleset: %w", err)
	}
	return conn, nil
}

func (c *Conn) watch(ctx context.Context, conn *netlink.Conn, events chan Event) {
	defer close(events)
	for {
		stop := context.AfterFunc(ctx, func() { conn.Close() })
		err := c.follow(conn, events)
		if stop() {
			conn.Close()
		}
		if ctx.Err() != nil {
			return
		}
		// Whatever it was, something may have been missed.
		offer(events, Event{Lost: true})
		for err != nil {
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Second):
			}
			conn, err = c.listen()
		}
	}
}

// follow passes on the events of conn until it fails.
func (c *Conn) follow(conn *netlink.Conn, events chan Event) error {
	for {
		messages, err := conn.Receive()
		if errors.Is(err, unix.ENOBUFS) {
			offer(events, Event{Lost: true})
			continue
		}
		if err != nil {
			return err
		}
		for _, m := range messages {
			if c.ports.has(m.Header.PID) || m.Header.Type != subsystem|unix.NFT_MSG_NEWGEN || len(m.Data) < 4 {
				continue
			}
			e, err := parseGeneration(m.Data[4:])
			if err != nil {
				e = Event{Lost: true}
			}
			offer(events, e)
		}
	}
}

// offer replaces what nobody took; that something was lost stays said.
func offer(events chan Event, e Event) {
	for {
		select {
		case events <- e:
			return
		default:
		}
		select {
		case old := <-events:
			e.Lost = e.Lost || old.Lost
		default:
		}
	}
}

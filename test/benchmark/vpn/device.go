package main

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/edgeward/edgeward/test/benchmark/figures"
	"github.com/edgeward/edgeward/test/benchmark/stage"
	"github.com/edgeward/edgeward/tunnel/wireguard/device"
)

// What a turn may cost on two quiet processors, whatever the number of peers.
const (
	turnGoal   = 100 * time.Millisecond
	upsertGoal = time.Millisecond
)

// devicePart measures a device in this process.
func devicePart(s *stage.Scope, opts options) (string, error) {
	rows := [][]string{
		heads("ms for a device in userspace", opts.sizes),
		{"a turn: read, compare, nothing to change"}, {"a turn that changes one peer"},
		{"one peer set, without reading"}, {"one peer removed, without reading"}, {"from nothing to all peers"},
	}
	var nothing, upsert time.Duration
	for _, n := range opts.sizes {
		times, err := measureDevice(s, opts, n)
		if err != nil {
			return "", fmt.Errorf("with %d peers: %w", n, err)
		}
		opts.say("device: %d peers: %v", n, times)
		for i, took := range times {
			rows[i+1] = append(rows[i+1], ms(took))
		}
		nothing, upsert = max(nothing, times[0]), max(upsert, times[2])
	}
	goals := []string{"100: " + figures.Held(nothing <= turnGoal), "", "1: " + figures.Held(upsert <= upsertGoal), "", ""}
	for i, goal := range goals {
		rows[i+1] = append(rows[i+1], goal)
	}
	return figures.Table(rows), nil
}

func measureDevice(s *stage.Scope, opts options, n int) (times [5]time.Duration, err error) {
	want := someConfig(s, n)
	var d *device.Device
	var loads []time.Duration
	for range opts.loads {
		if d != nil {
			if err := d.Close(); err != nil {
				return times, err
			}
		}
		began := time.Now()
		if d, err = device.Open(s, device.Options{Name: "edgeward0", Mode: device.Userspace, Want: want, Log: slog.New(slog.DiscardHandler)}); err != nil {
			return times, err
		}
		_, err = d.Reconcile(want)
		loads = append(loads, time.Since(began))
		if err != nil {
			_ = d.Close()
			return times, err
		}
	}
	defer d.Close()
	one := &want.Peers[n/2]
	for i, do := range []func() error{
		func() error {
			c, err := d.Reconcile(want)
			if err == nil && !c.Empty() {
				err = fmt.Errorf("the same again changes %v", c)
			}
			return err
		},
		func() error {
			one.PresharedKey = secret()
			_, err := d.Reconcile(want)
			return err
		},
		func() error {
			one.PresharedKey = secret()
			return d.Upsert(*one)
		},
	} {
		var all []time.Duration
		for range opts.turns {
			if err := s.Err(); err != nil {
				return times, err
			}
			began := time.Now()
			if err := do(); err != nil {
				return times, err
			}
			all = append(all, time.Since(began))
		}
		times[i] = middle(all)
	}
	var removed []time.Duration
	for range opts.turns {
		began := time.Now()
		if err := d.Remove(one.PublicKey); err != nil {
			return times, err
		}
		removed = append(removed, time.Since(began))
		if err := d.Upsert(*one); err != nil {
			return times, err
		}
	}
	times[3], times[4] = middle(removed), middle(loads)
	return times, nil
}

// secret is a new private key, or a preshared one.
func secret() (s device.Secret) {
	_, _ = rand.Read(s[:]) // never fails
	s[0] &= 248
	s[31] = s[31]&127 | 64
	return s
}

// someConfig is a device with n peers that nobody is behind.
func someConfig(s *stage.Scope, n int) device.Config {
	c := device.Config{PrivateKey: secret(), ListenPort: freePort(s), Addresses: []netip.Prefix{
		netip.MustParsePrefix("10.66.0.1/16"), netip.MustParsePrefix("fd66::1/64"),
	}}
	for i := range n {
		c.Peers = append(c.Peers, device.Peer{
			Name: fmt.Sprintf("peer-%05d", i), PublicKey: device.Key(secret()), PresharedKey: secret(), // nobody has the private key
			AllowedIPs: []netip.Prefix{host(numbered(peers4, i)), host(numbered(peers6, i))},
		})
	}
	return c
}

// Peers have the addresses that follow these.
var (
	peers4 = netip.MustParseAddr("10.66.1.0")
	peers6 = netip.MustParseAddr("fd66::1:0")
)

// numbered is the address that many after base.
func numbered(base netip.Addr, n int) netip.Addr {
	b := base.As16()
	last := binary.BigEndian.Uint32(b[12:]) + uint32(n)
	binary.BigEndian.PutUint32(b[12:], last)
	return netip.AddrFrom16(b).Unmap()
}

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// freePort is a UDP port that nobody has.
func freePort(s *stage.Scope) uint16 {
	c, err := net.ListenUDP("udp", nil)
	if err != nil {
		s.Fatalf("find a port: %w", err)
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

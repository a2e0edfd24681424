package nft

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// has reports whether something that has no generation is there.
func (s *state) has(name string) bool {
	g := s.generations[0]
	return g != nil && (slices.Contains(g.base, name) || slices.Contains(g.chains, name) || slices.Contains(g.sets, name))
}

// hooksAre reports whether those of want that are there hang where they should.
func (s *state) hooksAre(want []chain) bool {
	for _, ch := range want {
		var b batch
		b.uint32(unix.NFTA_HOOK_HOOKNUM, uint32(ch.hook))
		b.uint32(unix.NFTA_HOOK_PRIORITY, uint32(ch.priority))
		b.buf = binary.BigEndian.AppendUint32(b.buf, chainAccepts)
		if s.has(ch.name) && s.hooks[ch.name] != string(b.buf) {
			return false
		}
	}
	return true
}

// count dumps a map of sources, for kernels that do not tell how many elements a
// set has (Linux 6.14 and before). At ten thousand that takes some 0.05 s.
func (c *AccessConn) count(set string) (int, error) {
	answers, err := c.conn.sock.get(unix.NFT_MSG_GETSETELEM, familyInet, true,
		query(unix.NFTA_SET_ELEM_LIST_TABLE, AccessTableName, unix.NFTA_SET_ELEM_LIST_SET, set))
	if err != nil {
		return 0, fmt.Errorf("read set %s: %w", set, err)
	}
	n := 0
	for _, m := range answers {
		if err := elements(m.Data, func(typ uint16, d *netlink.AttributeDecoder) {
			// The end of an interval leads nowhere.
			if typ == unix.NFTA_SET_ELEM_DATA {
				n++
			}
		}, func() error { return nil }); err != nil {
			return 0, fmt.Errorf("decode element: %w", err)
		}
	}
	return n, nil
}

// elements calls attribute for each attribute of each element of an answer, and
// done behind each element.
func elements(data []byte, attribute func(typ uint16, d *netlink.AttributeDecoder), done func() error) error {
	return attributes(data, func(typ uint16, d *netlink.AttributeDecoder) {
		if typ != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			return
		}
		d.Nested(func(d *netlink.AttributeDecoder) error {
			for d.Next() {
				d.Nested(func(d *netlink.AttributeDecoder) error {
					for d.Next() {
						attribute(d.Type(), d)
					}
					return nil
				})
				if err := done(); err != nil {
					return err
				}
			}
			return nil
		})
	})
}

// Counters returns the totals.
func (c *AccessConn) Counters() (AccessCounters, error) {
	c.conn.mu.Lock()
	defer c.conn.mu.Unlock()
	if err := c.conn.connect(); err != nil {
		return AccessCounters{}, err
	}
	answers, err := c.conn.list(AccessTableName, unix.NFT_MSG_GETOBJ, unix.NFTA_OBJ_TABLE)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return AccessCounters{}, fmt.Errorf("read counters: %w", err)
	}
	var out AccessCounters
	for _, data := range answers {
		name, n, err := parseNamedCounter(data)
		if err != nil {
			return out, err
		}
		switch name {
		case counterGranted:
			out.Granted = n.Packets
		case counterDenied:
			out.Denied = n.Packets
		case counterRevoked:
			out.Revoked = n.Packets
		case counterUnasked:
			out.Unasked = n.Packets
		case counterForged:
			out.Forged = n.Packets
		}
	}
	return out, nil
}

// Sources returns the counts of each address of the VPN that sent something,
// sorted.
func (c *AccessConn) Sources() ([]SourceCount, error) {
	var out []SourceCount
	at := map[netip.Addr]int{}
	for _, what := range []string{"granted", "denied"} {
		if err := c.noted(what, sourceLifetime, func(key []byte, a Attempt) error {
			from, ok := netip.AddrFromSlice(key)
			if !ok {
				return fmt.Errorf("a key of %d bytes", len(key))
			}
			i, ok := at[from]
			if !ok {
				i = len(out)
				at[from] = i
				out = append(out, SourceCount{Addr: from})
			}
			if what == "granted" {
				out[i].Granted = a.Packets
			} else {
				out[i].Denied = a.Packets
			}
			return nil
		}); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(out, func(a, b SourceCount) int { return a.Addr.Compare(b.Addr) })
	return out, nil
}

// Denied returns who tried what in the last hour and was refused, sorted.
func (c *AccessConn) Denied() ([]Attempt, error) { return c.attempts("denied-to") }

// Granted returns who opened what in the last hour, sorted.
func (c *AccessConn) Granted() ([]Attempt, error) { return c.attempts("granted-to") }

func (c *AccessConn) attempts(what string) ([]Attempt, error) {
	var out []Attempt
	if err := c.noted(what, attemptLifetime, func(key []byte, a Attempt) error {
		a, err := parseAttempt(key, a)
		if err == nil {
			out = append(out, a)
		}
		return err
	}); err != nil {
		return nil, err
	}
	slices.SortFunc(out, func(a, b Attempt) int {
		return cmp.Or(a.From.Compare(b.From), a.To.Compare(b.To), cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Port, b.Port))
	})
	return slices.CompactFunc(out, func(a, b Attempt) bool {
		return a.From == b.From && a.To == b.To && a.Proto == b.Proto && a.Port == b.Port
	}), nil
}

func parseAttempt(key []byte, a Attempt) (Attempt, error) {
	width := 4
	if len(key) == 40 {
		width = 16
	} else if len(key) != 16 {
		return a, fmt.Errorf("a key of %d bytes", len(key))
	}
	a.From, _ = netip.AddrFromSlice(key[:width])
	a.To, _ = netip.AddrFromSlice(key[width : 2*width])
	a.Proto = key[2*width]
	a.Port = binary.BigEndian.Uint16(key[2*width+4:])
	return a, nil
}

// noted reads the sets called what, of both families. These are of a bounded
// size, and so may be dumped. One that grows meanwhile may show an element twice
// or not at all, until it is read again.
func (c *AccessConn) noted(what string, lifetime time.Duration, f func(key []byte, a Attempt) error) error {
	c.conn.mu.Lock()
	defer c.conn.mu.Unlock()
	if err := c.conn.connect(); err != nil {
		return err
	}
	for _, six := range []bool{false, true} {
		answers, err := c.conn.sock.get(unix.NFT_MSG_GETSETELEM, familyInet, true,
			query(unix.NFTA_SET_ELEM_LIST_TABLE, AccessTableName, unix.NFTA_SET_ELEM_LIST_SET, what+familyOf(six)))
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read set %s: %w", what+familyOf(six), err)
		}
		for _, m := range answers {
			if err := parseNoted(m.Data, lifetime, f); err != nil {
				return fmt.Errorf("decode element: %w", err)
			}
		}
	}
	return nil
}

// parseNoted calls f for each element of an answer.
func parseNoted(data []byte, lifetime time.Duration, f func(key []byte, a Attempt) error) error {
	var key []byte
	var a Attempt
	return elements(data, func(typ uint16, d *netlink.AttributeDecoder) {
		switch typ {
		case unix.NFTA_SET_ELEM_KEY:
			key = bytes.Clone(dataValue(d))
		case unix.NFTA_SET_ELEM_EXPR:
			a.Packets, a.Bytes = counterExpr(d)
		case unix.NFTA_SET_ELEM_EXPIRATION:
			left := time.Duration(min(d.Uint64(), uint64(lifetime/time.Millisecond))) * time.Millisecond
			a.Ago = lifetime - left
		}
	}, func() error {
		err := f(key, a)
		key, a = nil, Attempt{}
		return err
	})
}

// counterExpr reads a counter that is part of an element.
func counterExpr(d *netlink.AttributeDecoder) (packets, bytes uint64) {
	d.Nested(func(d *netlink.AttributeDecoder) error {
		for d.Next() {
			if d.Type() == unix.NFTA_EXPR_DATA {
				d.Nested(func(d *netlink.AttributeDecoder) error {
					packets, bytes = count(d)
					return nil
				})
			}
		}
		return nil
	})
	return packets, bytes
}

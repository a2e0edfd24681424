package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Bypass is something on this machine that may carry packets past the ruleset.
type Bypass struct {
	// Kind is flowtable, xdp, tc, cilium or exempt: established connections that
	// nf_tables itself hands on; an eBPF program on an interface, before all of
	// nf_tables; the service proxy made of these; an interface that is exempt by
	// its name, and leads to the world by a default route.
	Kind string `json:"kind"`
	// Name is the flowtable, as "family table name", or the interface.
	Name string `json:"name"`
}

// Bypasses tells what may carry packets past the ruleset, sorted. Programs on
// interfaces that match a pattern of exempt, as in Config, do not count. What eBPF programs do
// nobody can tell: a counter of packets is found as well as a service proxy. It
// needs no more than CAP_NET_ADMIN, and so misses programs attached by tcx links
// whose owner is not Cilium.
func (c *Conn) Bypasses(exempt []string) ([]Bypass, error) {
	tables, err := c.Flowtables()
	var out []Bypass
	for _, name := range tables {
		out = append(out, Bypass{"flowtable", name})
	}
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		err = nil // a kernel that knows no flowtables has none
	}
	conn, dialErr := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{NetNS: c.opts.NetNS})
	if dialErr != nil {
		return out, errors.Join(err, fmt.Errorf("list interfaces: %w", dialErr))
	}
	defer conn.Close()
	answers, listErr := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETLINK, Flags: netlink.Request | netlink.Dump},
		Data:   make([]byte, unix.SizeofIfInfomsg),
	})
	if listErr != nil {
		return out, errors.Join(err, fmt.Errorf("list interfaces: %w", listErr))
	}
	uplinks, routeErr := defaultRoutes(conn)
	err = errors.Join(err, routeErr)
	for _, m := range answers {
		l, parseErr := parseLink(m.Data)
		if parseErr != nil {
			return out, errors.Join(err, parseErr)
		}
		if l.name == "cilium_host" {
			out = append(out, Bypass{"cilium", l.name})
		}
		if matches(exempt, l.name) {
			if uplinks[l.index] {
				out = append(out, Bypass{"exempt", l.name})
			}
			continue
		}
		if l.xdp {
			out = append(out, Bypass{"xdp", l.name})
		}
		some, filterErr := hasProgram(conn, l.index)
		if some {
			out = append(out, Bypass{"tc", l.name})
		}
		err = errors.Join(err, filterErr)
	}
	slices.SortFunc(out, func(a, b Bypass) int { return strings.Compare(a.Kind+" "+a.Name, b.Kind+" "+b.Name) })
	return out, err
}

// matches reports whether an interface's name is among the patterns.
func matches(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		bare, open := strings.CutSuffix(p, "*")
		return p == name || open && strings.HasPrefix(name, bare)
	})
}

// defaultRoutes returns the interfaces that default routes of any table lead out
// by.
func defaultRoutes(conn *netlink.Conn) (map[uint32]bool, error) {
	answers, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETROUTE, Flags: netlink.Request | netlink.Dump},
		Data:   make([]byte, unix.SizeofRtMsg),
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	out := map[uint32]bool{}
	for _, m := range answers {
		indices, err := parseDefault(m.Data)
		if err != nil {
			return nil, err
		}
		for _, index := range indices {
			out[index] = true
		}
	}
	return out, nil
}

// parseDefault returns the interfaces that a route leads out by, if it is a
// default one: a struct rtmsg and attributes, of which one may be a list of struct
// rtnexthop.
func parseDefault(data []byte) ([]uint32, error) {
	if len(data) < unix.SizeofRtMsg {
		return nil, fmt.Errorf("decode route: %d bytes", len(data))
	}
	if length, kind := data[1], data[7]; length != 0 || kind != unix.RTN_UNICAST {
		return nil, nil
	}
	var out []uint32
	if err := attributes(data[unix.SizeofRtMsg:], func(typ uint16, d *netlink.AttributeDecoder) {
		value := d.Bytes()
		switch {
		case typ == unix.RTA_OIF && len(value) == 4:
			out = append(out, binary.NativeEndian.Uint32(value))
		case typ == unix.RTA_MULTIPATH:
			for len(value) >= unix.SizeofRtNexthop {
				out = append(out, binary.NativeEndian.Uint32(value[4:]))
				n := (int(binary.NativeEndian.Uint16(value)) + 3) &^ 3
				value = value[min(max(n, unix.SizeofRtNexthop), len(value)):]
			}
		}
	}); err != nil {
		return nil, fmt.Errorf("decode route: %w", err)
	}
	return out, nil
}

// link is an interface.
type link struct {
	index uint32
	name  string
	xdp   bool // a program is attached
}

// parseLink reads a struct ifinfomsg and the attributes behind it.
func parseLink(data []byte) (link, error) {
	if len(data) < unix.SizeofIfInfomsg {
		return link{}, fmt.Errorf("decode interface: %d bytes", len(data))
	}
	l := link{index: binary.NativeEndian.Uint32(data[4:])}
	if err := attributes(data[unix.SizeofIfInfomsg:], func(typ uint16, d *netlink.AttributeDecoder) {
		switch typ {
		case unix.IFLA_IFNAME:
			l.name = d.String()
		case unix.IFLA_XDP:
			d.Nested(func(d *netlink.AttributeDecoder) error {
				for d.Next() {
					if d.Type() == unix.IFLA_XDP_ATTACHED {
						l.xdp = d.Uint8() != 0
					}
				}
				return nil
			})
		}
	}); err != nil {
		return link{}, fmt.Errorf("decode interface: %w", err)
	}
	return l, nil
}

// tcMessage is how long a struct tcmsg is.
const tcMessage = 20

// hasProgram reports whether an eBPF program filters what comes in at an
// interface, by way of tc.
func hasProgram(conn *netlink.Conn, index uint32) (bool, error) {
	const ingress = 0xfffffff2 // of the queueing disciplines clsact and ingress
	request := make([]byte, tcMessage)
	binary.NativeEndian.PutUint32(request[4:], index)
	binary.NativeEndian.PutUint32(request[12:], ingress)
	answers, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETTFILTER, Flags: netlink.Request | netlink.Dump},
		Data:   request,
	})
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EOPNOTSUPP) {
		return false, nil // no such discipline, or gone meanwhile
	}
	if err != nil {
		return false, fmt.Errorf("list filters: %w", err)
	}
	found := false
	for _, m := range answers {
		kind, err := parseFilter(m.Data)
		if err != nil {
			return false, err
		}
		found = found || kind == "bpf"
	}
	return found, nil
}

// parseFilter returns the kind of a filter: a struct tcmsg and attributes.
func parseFilter(data []byte) (kind string, err error) {
	const attrKind = 1
	if len(data) < tcMessage {
		return "", fmt.Errorf("decode filter: %d bytes", len(data))
	}
	if err := attributes(data[tcMessage:], func(typ uint16, d *netlink.AttributeDecoder) {
		if typ == attrKind {
			kind = d.String()
		}
	}); err != nil {
		return "", fmt.Errorf("decode filter: %w", err)
	}
	return kind, nil
}

package nft

import (
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// passXDP loads an XDP program that lets everything pass, and returns its file
// descriptor.
func passXDP(t *testing.T) int {
	t.Helper()
	const load, typeXDP = 5, 6
	program := []uint64{0x00000002_000000b7, 0x95} // r0 = XDP_PASS; exit
	license := []byte("GPL\x00")
	attr := struct {
		kind, count           uint32
		program, license      uint64
		level, size           uint32
		log                   uint64
		version, flags        uint32
		name                  [16]byte
		index, expectedAttach uint32
	}{kind: typeXDP, count: uint32(len(program)), program: uint64(uintptr(unsafe.Pointer(&program[0]))), license: uint64(uintptr(unsafe.Pointer(&license[0])))}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, load, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		t.Fatalf("this test needs root and a kernel with eBPF: load a program: %v", errno)
	}
	t.Cleanup(func() { unix.Close(int(fd)) })
	return int(fd)
}

func TestBypasses(t *testing.T) {
	w := newWorld(t)
	exempt := config().Exempt
	look := func(want ...Bypass) {
		t.Helper()
		if got, err := w.conn.Bypasses(exempt); err != nil || !slices.Equal(got, want) {
			t.Errorf("%v %v, want %v", got, err, want)
		}
	}
	look()
	xdp := passXDP(t)
	w.node.MustExec("tc", "qdisc", "add", "dev", "up0", "clsact")
	look() // filters nothing
	for _, dev := range []string{"up0", "lo"} {
		w.node.Must(func() error {
			l, err := netlink.LinkByName(dev)
			if err != nil {
				return err
			}
			const generic = 2
			return netlink.LinkSetXdpFdWithFlags(l, xdp, generic)
		})
	}
	look(Bypass{"xdp", "up0"})
	w.node.MustExec("tc", "filter", "add", "dev", "up0", "ingress", "bpf", "direct-action", "bytecode", "1,6 0 0 4294967295")
	w.node.MustExec("ip", "link", "add", "cilium_host", "type", "veth", "peer", "name", "cilium_net")
	look(Bypass{"cilium", "cilium_host"}, Bypass{"tc", "up0"}, Bypass{"xdp", "up0"})
	exempt = append(exempt, "up*")
	look(Bypass{"cilium", "cilium_host"})
}

// An uplink with the name of a bridge for containers is exempt, and says so.
func TestExemptUplink(t *testing.T) {
	for _, route := range []string{
		"-4 route add default via 192.0.2.2", "-6 route add default via 2001:db8::2", "-4 route add default dev up0 table 77",
		"-4 route add default nexthop via 10.42.0.2 nexthop via 192.0.2.2",
	} {
		w := newWorld(t)
		w.node.MustExec("ip", strings.Fields(route)...)
		for exempt, want := range map[string][]Bypass{"up*": {{"exempt", "up0"}}, "lo": nil} {
			if got, err := w.conn.Bypasses([]string{exempt}); err != nil || !slices.Equal(got, want) {
				t.Errorf("%s, exempt %s: %v %v, want %v", route, exempt, got, err, want)
			}
		}
	}
}

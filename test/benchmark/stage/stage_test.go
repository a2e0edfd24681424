package stage

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"
)

// The frames are what another stack takes for an address and a checksum.
func TestFrames(t *testing.T) {
	mac := [2]net.HardwareAddr{{2, 0, 0, 0, 0, 1}, {2, 0, 0, 0, 0, 2}}
	for _, from := range []string{"203.0.113.7", "2001:db8:f00::7"} {
		addr, to := netip.MustParseAddr(from), Node4
		header := 20
		if addr.Is6() {
			to, header = Node6, 40
		}
		for name, frame := range map[string][]byte{"udp": UDPFrame(mac, addr, to, SinkPort, []byte("odd")), "syn": SYNFrame(mac, addr, to, SinkPort)} {
			packet := frame[14:]
			if !bytes.Equal(frame[:12], append(append([]byte{}, mac[0]...), mac[1]...)) {
				t.Errorf("%s from %s: from %x", name, from, frame[:12])
			}
			if header == 20 && fold(0, packet[:20]) != 0xffff {
				t.Errorf("%s from %s: the header's checksum is wrong", name, from)
			}
			protocol := byte(17)
			if name == "syn" {
				protocol = 6
			}
			if sum := transportSum(addr, to, protocol, packet[header:]); sum != 0 {
				t.Errorf("%s from %s: the checksum is off by %#x", name, from, sum)
			}
		}
	}
}

func TestWithinEndsWhatWasBegun(t *testing.T) {
	var ended []int
	err := Within(t.Context(), func(s *Scope) error {
		s.Cleanup(func() { ended = append(ended, 1) })
		s.Cleanup(func() { ended = append(ended, 2) })
		s.Fatalf("broken: %w", errors.ErrUnsupported)
		return nil
	})
	if !errors.Is(err, errors.ErrUnsupported) || !slices.Equal(ended, []int{2, 1}) {
		t.Errorf("%v, ended %v", err, ended)
	}
}

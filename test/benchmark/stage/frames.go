package stage

import (
	"encoding/binary"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// sourcePort is where all packets come from.
const sourcePort = 40000

// UDPFrame is an Ethernet frame with a datagram to a port. mac is that of the
// receiver and of the sender.
func UDPFrame(mac [2]net.HardwareAddr, from, to netip.Addr, port uint16, payload []byte) []byte {
	udp := binary.BigEndian.AppendUint16(nil, sourcePort)
	udp = binary.BigEndian.AppendUint16(udp, port)
	udp = binary.BigEndian.AppendUint16(udp, uint16(8+len(payload)))
	udp = append(udp, 0, 0)
	udp = append(udp, payload...)
	sum := transportSum(from, to, unix.IPPROTO_UDP, udp)
	if sum == 0 {
		sum = 0xffff // zero means none
	}
	binary.BigEndian.PutUint16(udp[6:], sum)
	return ipFrame(mac, from, to, unix.IPPROTO_UDP, udp)
}

// SYNFrame is one that opens a TCP connection to a port.
func SYNFrame(mac [2]net.HardwareAddr, from, to netip.Addr, port uint16) []byte {
	tcp := binary.BigEndian.AppendUint16(nil, sourcePort)
	tcp = binary.BigEndian.AppendUint16(tcp, port)
	tcp = append(tcp, 0, 0, 0, 1, 0, 0, 0, 0) // sequence and acknowledgement
	tcp = append(tcp, 5<<4, 0x02, 0x72, 0x10, 0, 0, 0, 0)
	binary.BigEndian.PutUint16(tcp[16:], transportSum(from, to, unix.IPPROTO_TCP, tcp))
	return ipFrame(mac, from, to, unix.IPPROTO_TCP, tcp)
}

func ipFrame(mac [2]net.HardwareAddr, from, to netip.Addr, protocol byte, segment []byte) []byte {
	frame := append(append([]byte{}, mac[0]...), mac[1]...)
	if from.Is6() {
		frame = append(frame, 0x86, 0xdd)
		frame = append(frame, 0x60, 0, 0, 0)
		frame = binary.BigEndian.AppendUint16(frame, uint16(len(segment)))
		frame = append(frame, protocol, 64)
		frame = append(frame, from.AsSlice()...)
		frame = append(frame, to.AsSlice()...)
		return append(frame, segment...)
	}
	frame = append(frame, 0x08, 0x00)
	header := []byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0}
	header = append(header, from.AsSlice()...)
	header = append(header, to.AsSlice()...)
	binary.BigEndian.PutUint16(header[2:], uint16(len(header)+len(segment)))
	binary.BigEndian.PutUint16(header[10:], ^fold(0, header))
	return append(append(frame, header...), segment...)
}

// transportSum is the checksum of a segment with its pseudo header.
func transportSum(from, to netip.Addr, protocol byte, segment []byte) uint16 {
	sum := fold(0, from.AsSlice())
	sum = fold(sum, to.AsSlice())
	sum = fold(sum, []byte{0, protocol})
	sum = fold(sum, binary.BigEndian.AppendUint16(nil, uint16(len(segment))))
	return ^fold(sum, segment)
}

// fold adds data to a ones' complement sum.
func fold(sum uint16, data []byte) uint16 {
	total := uint32(sum)
	for i := 0; i < len(data); i += 2 {
		word := uint32(data[i]) << 8
		if i+1 < len(data) {
			word |= uint32(data[i+1])
		}
		total += word
	}
	for total > 0xffff {
		total = total>>16 + total&0xffff
	}
	return uint16(total)
}

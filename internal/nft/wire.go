package nft

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// What golang.org/x/sys/unix does not name.
const (
	msgDestroySetElem = 30 // Linux 6.3

	tableOwner   = 2 // Linux 5.12
	tablePersist = 4 // Linux 6.9

	attrTableOwner = 7
	attrSetCount   = 20

	attrSetFields  = 2 // NFTA_SET_DESC_CONCAT
	attrFieldLen   = 1
	attrElemKeyEnd = 10
	setConcat      = 0x80 // NFT_SET_CONCAT, Linux 5.6

	attrFlowtableTable = 1
	attrFlowtableName  = 2

	objectCounter = 1
	chainAccepts  = 1 // the policy

	familyInet = 1 // NFPROTO_INET
	subsystem  = unix.NFNL_SUBSYS_NFTABLES << 8
)

const headerLen = unix.SizeofNlMsghdr + 4 // with struct nfgenmsg

// chunk is how many elements go into one message. The length of an attribute
// is 16 bits wide, which 2340 elements exceed, and the kernel takes what is left
// of the number at its word. Beyond 1000 nothing is gained.
const chunk = 1000

// batch is one transaction, encoded. Only its last message asks for an answer:
// errors come unasked, and thousands of answers would overrun the receive
// buffer.
type batch struct {
	table string // that all messages are about
	buf   []byte
	first uint32 // sequence number of the batch's begin
	port  uint32
	what  []string // by message, the begin included, for errors
	at    int      // where the last message begins
	err   error
}

func (b *batch) reset(first, port uint32) {
	b.buf, b.what, b.err = b.buf[:0], b.what[:0], nil
	b.first, b.port = first, port
	b.header(unix.NFNL_MSG_BATCH_BEGIN, 0, 0, unix.NFNL_SUBSYS_NFTABLES, "begin transaction")
	b.finish()
}

// empty reports whether nothing follows the begin.
func (b *batch) empty() bool { return len(b.what) <= 1 }

// end closes the transaction and returns the sequence number of the message that
// is answered last.
func (b *batch) end() uint32 {
	flags := binary.NativeEndian.Uint16(b.buf[b.at+6:])
	binary.NativeEndian.PutUint16(b.buf[b.at+6:], flags|unix.NLM_F_ACK)
	last := b.first + uint32(len(b.what)) - 1
	b.header(unix.NFNL_MSG_BATCH_END, 0, 0, unix.NFNL_SUBSYS_NFTABLES, "end transaction")
	b.finish()
	return last
}

// message begins a message of nf_tables; finish ends it.
func (b *batch) message(typ uint16, flags uint16, what string) {
	b.header(subsystem|typ, flags, familyInet, 0, what)
}

func (b *batch) header(typ, flags uint16, family uint8, resource uint16, what string) {
	b.at = len(b.buf)
	b.buf = append(b.buf, make([]byte, headerLen)...)
	h := b.buf[b.at:]
	binary.NativeEndian.PutUint16(h[4:], typ)
	binary.NativeEndian.PutUint16(h[6:], flags|unix.NLM_F_REQUEST)
	binary.NativeEndian.PutUint32(h[8:], b.first+uint32(len(b.what)))
	binary.NativeEndian.PutUint32(h[12:], b.port)
	h[16] = family
	binary.BigEndian.PutUint16(h[18:], resource)
	b.what = append(b.what, what)
}

func (b *batch) finish() {
	binary.NativeEndian.PutUint32(b.buf[b.at:], uint32(len(b.buf)-b.at))
}

// nest begins an attribute made of attributes; close ends it.
func (b *batch) nest(typ uint16) int {
	at := len(b.buf)
	b.buf = binary.NativeEndian.AppendUint16(b.buf, 0)
	b.buf = binary.NativeEndian.AppendUint16(b.buf, typ|unix.NLA_F_NESTED)
	return at
}

func (b *batch) close(at int) {
	n := len(b.buf) - at
	if n > 0xffff && b.err == nil {
		b.err = fmt.Errorf("encode %s: an attribute of %d bytes", b.what[len(b.what)-1], n)
	}
	binary.NativeEndian.PutUint16(b.buf[at:], uint16(n))
}

func (b *batch) bytes(typ uint16, data []byte) {
	b.buf = binary.NativeEndian.AppendUint16(b.buf, uint16(4+len(data)))
	b.buf = binary.NativeEndian.AppendUint16(b.buf, typ)
	b.buf = append(b.buf, data...)
	for len(b.buf)&3 != 0 {
		b.buf = append(b.buf, 0)
	}
}

func (b *batch) string(typ uint16, s string) {
	b.buf = binary.NativeEndian.AppendUint16(b.buf, uint16(5+len(s)))
	b.buf = binary.NativeEndian.AppendUint16(b.buf, typ)
	b.buf = append(b.buf, s...)
	b.buf = append(b.buf, 0)
	for len(b.buf)&3 != 0 {
		b.buf = append(b.buf, 0)
	}
}

func (b *batch) uint32(typ uint16, v uint32) {
	b.buf = binary.NativeEndian.AppendUint16(b.buf, 8)
	b.buf = binary.NativeEndian.AppendUint16(b.buf, typ)
	b.buf = binary.BigEndian.AppendUint32(b.buf, v)
}

func (b *batch) uint64(typ uint16, v uint64) {
	b.buf = binary.NativeEndian.AppendUint16(b.buf, 12)
	b.buf = binary.NativeEndian.AppendUint16(b.buf, typ)
	b.buf = binary.BigEndian.AppendUint64(b.buf, v)
}

// value is a NFTA_DATA_VALUE inside an attribute of type typ.
func (b *batch) value(typ uint16, data []byte) {
	at := b.nest(typ)
	b.bytes(unix.NFTA_DATA_VALUE, data)
	b.close(at)
}

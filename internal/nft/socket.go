package nft

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// A transaction goes out in one piece, which has to fit the send buffer. The
// size is a limit and takes no memory by itself.
const (
	sendBuffer    = 128 << 20
	receiveBuffer = 8 << 20
)

// patience bounds the wait for the kernel, which may spend seconds on freeing a
// large set.
const patience = 2 * time.Minute

// socket is one netlink connection. It is in step as long as every answer was
// taken; after lost, it is to be closed, as old answers would be taken for new.
type socket struct {
	conn *netlink.Conn
	port uint32
	next uint32 // sequence number
	lost bool
}

func dial(netns int) (*socket, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: netns})
	if err != nil {
		if errors.Is(err, unix.EPROTONOSUPPORT) {
			return nil, fmt.Errorf("open netlink socket: %w: %w", ErrUnsupported, err)
		}
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	// Else an error carries back the message that caused it, 50 KiB of elements.
	if err := conn.SetOption(netlink.CapAcknowledge, true); err != nil {
		conn.Close()
		return nil, fmt.Errorf("set up netlink socket: %w", err)
	}
	// mdlayher/netlink forces the sizes where it may, and else asks.
	if err := errors.Join(conn.SetWriteBuffer(sendBuffer), conn.SetReadBuffer(receiveBuffer)); err != nil {
		conn.Close()
		return nil, fmt.Errorf("set up netlink socket: %w", err)
	}
	return &socket{conn: conn, port: conn.PID(), next: 1}, nil
}

func (s *socket) close() error { return s.conn.Close() }

// commit sends b, which holds at least one message, as one transaction. Either
// all of it took effect and the error is nil, or none, unless the socket is lost
// afterwards: then nobody knows.
func (s *socket) commit(b *batch) error {
	last := b.end()
	s.next = last + 2
	if b.err != nil {
		return b.err
	}
	if err := s.send(b.buf); err != nil {
		s.lost = true
		return fmt.Errorf("send transaction of %d bytes: %w", len(b.buf), err)
	}
	if err := s.conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		s.lost = true
		return fmt.Errorf("await answer: %w", err)
	}
	var first error
	for {
		messages, err := s.conn.Receive()
		if err == nil {
			for _, m := range messages {
				if m.Header.Sequence == last && m.Header.Type == netlink.Error {
					return first
				}
			}
			continue
		}
		var op *netlink.OpError
		if !errors.As(err, &op) || op.Sequence == 0 {
			s.lost = true // deadline, overrun, closed
			return errors.Join(first, fmt.Errorf("await answer: %w", err))
		}
		if op.Sequence < b.first || op.Sequence > last {
			continue // of an earlier transaction
		}
		what := b.what[op.Sequence-b.first]
		if op.Sequence == b.first {
			// About all of it. Answers to single messages may or may not follow.
			s.lost = true
			if errors.Is(err, unix.EPERM) {
				return fmt.Errorf("%s: %w", what, ErrPermission)
			}
			return errors.Join(first, fmt.Errorf("%s: %w", what, reason(op)))
		}
		if first == nil {
			first = fmt.Errorf("%s: %w", what, reason(op))
		}
		if op.Sequence == last {
			return first
		}
	}
}

// reason gives the kernel's errno the name that callers branch on.
func reason(op *netlink.OpError) error {
	switch {
	case errors.Is(op.Err, unix.EPERM):
		return fmt.Errorf("%w: %w", ErrOwned, op.Err)
	case errors.Is(op.Err, unix.EOPNOTSUPP):
		return fmt.Errorf("%w: %w", ErrUnsupported, op.Err)
	}
	return op.Err
}

// send writes past netlink.Conn, which would copy every message twice.
func (s *socket) send(data []byte) error {
	raw, err := s.conn.SyscallConn()
	if err != nil {
		return err
	}
	var sendErr error
	err = raw.Write(func(fd uintptr) bool {
		sendErr = unix.Sendto(int(fd), data, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		return sendErr != unix.EAGAIN && sendErr != unix.EINTR
	})
	return errors.Join(err, os.NewSyscallError("sendto", sendErr))
}

// get asks for one object, or with dump for a list of them, and returns the
// attributes of each.
func (s *socket) get(typ uint16, family uint8, dump bool, attrs []byte) ([]netlink.Message, error) {
	m := netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(subsystem | typ), Flags: netlink.Request},
		Data:   append([]byte{family, 0, 0, 0}, attrs...),
	}
	if dump {
		m.Header.Flags |= netlink.Dump
	}
	// A dump that the kernel says was interrupted mixes two states. Others
	// commit seldom enough for a few attempts to be plenty.
	for attempt := 0; ; attempt++ {
		if err := s.conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
			s.lost = true
			return nil, err
		}
		answers, err := s.conn.Execute(m)
		if err != nil {
			var op *netlink.OpError
			if !errors.As(err, &op) || op.Sequence == 0 {
				s.lost = true
			}
			if errors.Is(err, unix.EPERM) {
				return nil, ErrPermission
			}
			return nil, err
		}
		interrupted := false
		for i := range answers {
			interrupted = interrupted || answers[i].Header.Flags&netlink.DumpInterrupted != 0
			if len(answers[i].Data) < 4 {
				s.lost = true
				return nil, fmt.Errorf("decode answer: %d bytes", len(answers[i].Data))
			}
			answers[i].Data = answers[i].Data[4:]
		}
		if !interrupted {
			return answers, nil
		}
		if attempt == 10 {
			return nil, errors.New("list objects: interrupted again and again")
		}
	}
}

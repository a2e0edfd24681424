package stage

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Batch is how many packets are timed together: few enough that a machine with
// other work leaves them alone at one turn or another.
const Batch = 256

// Patience is how long a packet that passes may take, where the machine is busy
// and the kernel has put it off.
const Patience = 2 * time.Second

// Stream is packets of one kind that a World's client sends.
type Stream struct {
	World  *World
	Frames [][]byte
	Inner  bool // they are to be forwarded; else they are for the node

	least []time.Duration // for each batch
}

// Cost is that of a packet: each batch at its quickest.
func (s *Stream) Cost() time.Duration {
	var all time.Duration
	for _, took := range s.least {
		all += took
	}
	return all / time.Duration(len(s.Frames))
}

// Prove sends each packet once, and fails unless all of them pass, or none.
func (s *Stream) Prove(passes bool) error {
	local, forwarded, err := s.World.Passed()
	if err != nil {
		return err
	}
	if err := s.send(s.Frames); err != nil {
		return err
	}
	want := uint64(0)
	if passes {
		want = uint64(len(s.Frames))
	}
	for began := time.Now(); ; {
		nowLocal, nowForwarded, err := s.World.Passed()
		if err != nil {
			return err
		}
		got := nowLocal - local
		if s.Inner {
			got = nowForwarded - forwarded
		}
		if got == want && (want > 0 || time.Since(began) > 20*time.Millisecond) {
			return nil
		}
		if got > want || time.Since(began) > Patience {
			return fmt.Errorf("of %d packets %d passed, not %d", len(s.Frames), got, want)
		}
		if err := Wait(s.World.Scope, time.Millisecond); err != nil {
			return err
		}
	}
}

// send sends packets. Each is taken in by the node before its system call returns,
// on the same processor.
func (s *Stream) send(frames [][]byte) error {
	for _, frame := range frames {
		if _, err := unix.Write(s.World.Raw, frame); err != nil {
			if errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.EINTR) {
				continue // the queue was full, because the machine is busy elsewhere
			}
			return fmt.Errorf("send a packet: %w", err)
		}
	}
	return nil
}

// time sends the packets in batches and keeps the least that each has taken.
func (s *Stream) time() error {
	// Once to have everything at hand again that belongs to this world.
	if err := s.send(s.Frames); err != nil {
		return err
	}
	n := 0
	for some := range slices.Chunk(s.Frames, Batch) {
		began := time.Now()
		if err := s.send(some); err != nil {
			return err
		}
		took := time.Since(began)
		if n == len(s.least) {
			s.least = append(s.least, took)
		} else if took < s.least[n] {
			s.least[n] = took
		}
		n++
	}
	return nil
}

// Blast sends the packets of each world again and again, in changing order, so
// that whatever disturbs the machine disturbs all alike, and keeps the least of
// each batch: what is more was a disturbance.
func Blast(ctx context.Context, turns int, worlds [][]*Stream, say func(format string, args ...any)) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	random := rand.New(rand.NewPCG(6, 0))
	for turn := range turns {
		for _, i := range random.Perm(len(worlds)) {
			for _, s := range worlds[i] {
				if err := s.time(); err != nil {
					return err
				}
			}
			// All worlds share one table of connections, where those of the others
			// would stand in the way.
			worlds[i][0].World.Node.Forget()
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
		}
		say("packets: turn %d of %d", turn+1, turns)
	}
	return nil
}

// RefuseAll makes a socket drop what comes for it: at the end of its way, at no
// cost that depends on how much there is.
func RefuseAll(fd int) error {
	nothing := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K}}
	err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &nothing[0]})
	if err != nil {
		return fmt.Errorf("filter a socket: %w", err)
	}
	return nil
}

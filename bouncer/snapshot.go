package bouncer

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/edgeward/edgeward/internal/decision"
)

// A snapshot is the live decisions of a store in a file, so that a node that
// boots without LAPI is protected at once: some 15 bytes a decision. It begins
// with a line that names the format and the time of writing; each decision then
// is
//
//	length of its address, 4 or 16    1 byte
//	length of its prefix              1 byte
//	address                           4 or 16 bytes
//	id, end in ms after the writing (endless for none), number of its class
//
// the last three as varints. A number of a class that is one higher than all so
// far is followed by its type, origin and scenario, each with its length before
// it. A zero in the place of a length ends the decisions, and a SHA-256 of all
// that came before ends the file.
const snapshotHead = "edgeward decisions 1\n"

// Bounds of what a snapshot may hold: more than any real one, so that a broken
// one costs no more than it weighs.
const (
	snapshotLimit = 2 << 30
	textLimit     = 1 << 16
	centuries     = 1 << 44 // in ms
	endless       = centuries / 2
)

var errSnapshot = errors.New("not a snapshot, or a damaged one")

// writeSnapshot writes the decisions that are live at now.
func writeSnapshot(w io.Writer, t *decision.Table, now time.Time) (rows int, err error) {
	sum := sha256.New()
	out := bufio.NewWriterSize(io.MultiWriter(w, sum), 1<<16)
	buf := append([]byte(snapshotHead), binary.AppendUvarint(nil, uint64(now.UnixMilli()))...)
	numbers := map[decision.Class]uint64{}
	t.Each(now, func(id int, p netip.Prefix, until time.Time, c decision.Class) bool {
		addr := p.Addr().AsSlice()
		buf = append(buf, byte(len(addr)), byte(p.Bits()))
		buf = append(buf, addr...)
		buf = binary.AppendUvarint(buf, uint64(id))
		left := uint64(endless)
		if until.Before(decision.Forever) {
			left = uint64(until.Sub(now).Milliseconds())
		}
		buf = binary.AppendUvarint(buf, left)
		n, known := numbers[c]
		if !known {
			n = uint64(len(numbers))
			numbers[c] = n
		}
		buf = binary.AppendUvarint(buf, n)
		if !known {
			for _, text := range []string{c.Type, c.Origin, c.Scenario} {
				buf = binary.AppendUvarint(buf, uint64(min(len(text), textLimit)))
				buf = append(buf, text[:min(len(text), textLimit)]...)
			}
		}
		rows++
		_, err = out.Write(buf)
		buf = buf[:0]
		return err == nil
	})
	if err != nil {
		return 0, err
	}
	if _, err := out.Write(append(buf, 0)); err != nil {
		return 0, err
	}
	if err := out.Flush(); err != nil {
		return 0, err
	}
	_, err = w.Write(sum.Sum(nil))
	return rows, err
}

// readSnapshot reads what writeSnapshot wrote into d and returns when that was.
// Where the clock now stands before that time, as on a machine that has not yet
// learnt the time of day, decisions last from now as long as they did from then.
func readSnapshot(data []byte, d *decision.Delta, now time.Time) (written time.Time, err error) {
	body := len(data) - sha256.Size
	if body < 0 || !bytes.HasPrefix(data, []byte(snapshotHead)) {
		return written, errSnapshot
	}
	if sum := sha256.Sum256(data[:body]); !bytes.Equal(sum[:], data[body:]) {
		return written, errSnapshot
	}
	r := bytes.NewReader(data[len(snapshotHead):body])
	// A checksum says that nobody damaged it, not that we wrote it: what does
	// not make sense is refused all the same.
	var failed error
	number := func(limit uint64) uint64 {
		n, err := binary.ReadUvarint(r)
		if err != nil || n > limit {
			failed = errSnapshot
			return 0
		}
		return n
	}
	text := func() string {
		b := make([]byte, number(min(textLimit, uint64(r.Len()))))
		if _, err := io.ReadFull(r, b); err != nil {
			failed = errSnapshot
		}
		return string(b)
	}
	written = time.UnixMilli(int64(number(centuries)))
	from := written
	if now.Before(written) {
		from = now
	}
	var classes []decision.Class
	for failed == nil {
		length, err := r.ReadByte()
		switch {
		case err != nil:
			return written, errSnapshot
		case length == 0 && r.Len() == 0:
			return written, nil
		case length != 4 && length != 16:
			return written, errSnapshot
		}
		var octets [17]byte
		if _, err := io.ReadFull(r, octets[:1+length]); err != nil {
			return written, errSnapshot
		}
		addr, _ := netip.AddrFromSlice(octets[1 : 1+length])
		id := number(1<<62 - 1)
		left := number(endless)
		until := from.Add(time.Duration(left) * time.Millisecond)
		if left == endless || until.After(decision.Forever) {
			until = decision.Forever
		}
		class := number(uint64(len(classes)))
		if failed == nil && class == uint64(len(classes)) {
			classes = append(classes, decision.Class{Type: text(), Origin: text(), Scenario: text()})
		}
		if failed == nil {
			d.Hold(int(id), netip.PrefixFrom(addr, int(octets[0])), until, classes[class])
		}
	}
	return written, failed
}

// snapshotName is the file in the state directory.
const snapshotName = "decisions.snapshot"

// saveSnapshot replaces the snapshot in dir, all of it or nothing.
func saveSnapshot(dir string, t *decision.Table, now time.Time) (rows int, err error) {
	err = replaceFile(dir, snapshotName, func(w io.Writer) (err error) {
		rows, err = writeSnapshot(w, t, now)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("save snapshot: %w", err)
	}
	return rows, nil
}

// replaceFile puts what write writes in the place of a file, all of it or
// nothing, also if power is cut meanwhile.
func replaceFile(dir, name string, write func(io.Writer) error) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	path := filepath.Join(dir, name)
	f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	err = write(f)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(path+".new"))
	}
	if d, err := os.Open(dir); err == nil { // else the name may not outlive a power cut
		_ = d.Sync()
		_ = d.Close()
	}
	return nil
}

// loadSnapshot reads the snapshot in dir into store.
func loadSnapshot(dir string, store *decision.Store, now time.Time) (rows int, written time.Time, err error) {
	f, err := os.Open(filepath.Join(dir, snapshotName))
	if err != nil {
		return 0, written, fmt.Errorf("load snapshot: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, snapshotLimit))
	if err != nil {
		return 0, written, fmt.Errorf("load snapshot: %w", err)
	}
	d := store.NewDelta(true, now)
	if written, err = readSnapshot(data, d, now); err != nil {
		return 0, written, fmt.Errorf("load snapshot %s: %w", f.Name(), err)
	}
	store.Apply(d, now)
	return d.Len(), written, nil
}

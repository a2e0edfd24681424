package device

import (
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

const (
	// writeSoon is the least time between two writes of the memory, and writeLate
	// the most that counters alone may wait: they change always, and flash
	// memory wears out.
	writeSoon = 2 * time.Second
	writeLate = time.Minute
	// forgotten is when a key that is no longer on the device is.
	forgotten = 30 * 24 * time.Hour
)

// memory is what is known of each key beyond what the device says, kept over
// restarts in a file.
type memory struct {
	log  *slog.Logger
	file string // empty: kept in memory
	now  func() time.Time

	keys    map[Key]*record
	present int       // keys on the device, as far as is known
	read    time.Time // when the device was last read
	soon    bool      // something changed that a restart needs
	late    bool      // something changed
	wrote   time.Time
	failed  bool // the last write failed, and that was logged
}

// record is what is known of one key.
type record struct {
	Name      string         `json:"name,omitempty"`
	Endpoint  netip.AddrPort `json:"endpoint,omitzero"`
	Handshake time.Time      `json:"handshake,omitzero"`
	// Bytes, of all devices that the key was on.
	Received uint64 `json:"received,omitempty"`
	Sent     uint64 `json:"sent,omitempty"`
	// Those of the present one when it was last read.
	DeviceReceived uint64 `json:"deviceReceived,omitempty"`
	DeviceSent     uint64 `json:"deviceSent,omitempty"`

	on bool // is on the device
}

// newMemory reads what an earlier process left. A file that cannot be read or
// written is logged and done without: it costs a restart some seconds.
func newMemory(file string, log *slog.Logger) *memory {
	m := &memory{log: log, file: file, now: time.Now, keys: map[Key]*record{}}
	if file == "" {
		return m
	}
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return m
	}
	var kept struct {
		Keys map[Key]*record `json:"keys"`
	}
	if err == nil {
		err = json.Unmarshal(text, &kept)
	}
	if err != nil {
		log.Warn("memory of the device not read", "file", file, "error", err)
		return m
	}
	for k, r := range kept.Keys {
		if r == nil {
			continue
		}
		// A time to come is one from before the clock was set right.
		if now := m.now(); r.Handshake.After(now) {
			r.Handshake = now
		}
		m.keys[k] = r
	}
	return m
}

// of returns the record of a key, a new one if there is none.
func (m *memory) of(k Key) *record {
	r := m.keys[k]
	if r == nil {
		r = &record{}
		m.keys[k] = r
	}
	return r
}

// name says whose a key is.
func (m *memory) name(k Key, name string) {
	if r := m.of(k); r.Name != name {
		r.Name, m.late = name, true
	}
}

// on says whether a key is on the device, as far as is known.
func (m *memory) on(k Key) bool {
	r := m.keys[k]
	return r != nil && r.on
}

// begin says that the device is a new one, without a past.
func (m *memory) begin() {
	m.present = 0
	for _, r := range m.keys {
		r.on, r.DeviceReceived, r.DeviceSent = false, 0, 0
	}
}

// left says that a key was taken off the device.
func (m *memory) left(k Key) {
	r := m.keys[k]
	if r == nil {
		return
	}
	if r.on {
		m.present--
	}
	r.on, r.DeviceReceived, r.DeviceSent = false, 0, 0
	m.late = true
}

// joined says that a key was put on the device.
func (m *memory) joined(k Key) {
	if r := m.of(k); !r.on {
		r.on = true
		m.present++
	}
}

// observe takes in what the device says.
func (m *memory) observe(peers []wgtypes.Peer) {
	for _, r := range m.keys {
		r.on = false
	}
	for i := range peers {
		p := &peers[i]
		r := m.of(Key(p.PublicKey))
		r.on = true
		count := func(total, last *uint64, now int64) {
			n := uint64(now)
			if n == *last {
				return
			}
			if n < *last { // it was removed and added again
				*last = 0
			}
			*total += n - *last
			*last = n
			m.late = true
		}
		count(&r.Received, &r.DeviceReceived, p.ReceiveBytes)
		count(&r.Sent, &r.DeviceSent, p.TransmitBytes)
		if !p.LastHandshakeTime.IsZero() && !p.LastHandshakeTime.Equal(r.Handshake) {
			m.soon = m.soon || r.Handshake.IsZero()
			m.late = true
			r.Handshake = p.LastHandshakeTime
		}
		if e := addrPort(p.Endpoint); e.IsValid() && e != r.Endpoint && !p.LastHandshakeTime.IsZero() {
			m.soon = true
			r.Endpoint = e
		}
	}
	m.present = len(peers)
	m.read = m.now()
}

// keep writes what has changed, if it is time to.
func (m *memory) keep() {
	age := m.now().Sub(m.wrote)
	if m.soon && age >= writeSoon || m.late && (age >= writeLate || age < 0) {
		m.write()
	}
}

// write replaces the file if anything has changed.
func (m *memory) write() {
	if m.file == "" || !m.soon && !m.late {
		return
	}
	m.wrote = m.now()
	known := make(map[Key]*record, len(m.keys))
	for k, r := range m.keys {
		switch {
		case !r.on && m.now().Sub(r.Handshake) > forgotten:
			delete(m.keys, k)
		case !r.Handshake.IsZero() || r.Received+r.Sent > 0:
			known[k] = r
		}
	}
	text, err := json.Marshal(map[string]any{"keys": known})
	if err == nil {
		err = replace(m.file, append(text, '\n'))
	}
	if err != nil && !m.failed {
		m.log.Warn("memory of the device not kept: after a restart in userspace mode peers are without a connection for 15 seconds", "error", err)
	}
	m.failed = err != nil
	if err == nil {
		m.soon, m.late = false, false
	}
}

// replace writes a file that only its owner reads, whole or not at all.
func replace(file string, text []byte) error {
	fresh, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+"-")
	if err != nil {
		return err
	}
	_, err = fresh.Write(text)
	err = errors.Join(err, fresh.Close())
	if err == nil {
		err = os.Rename(fresh.Name(), file)
	}
	if err != nil {
		_ = os.Remove(fresh.Name())
	}
	return err
}

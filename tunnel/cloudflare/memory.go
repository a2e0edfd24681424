package cloudflare

import (
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// memoryFile is the memory's name in the state directory.
const memoryFile = "tunnel-networks.json"

// memoryTime is how long a network is believed to block QUIC. QUIC lost a race
// there, which may have been bad luck; after this time it may race again.
const memoryTime = 6 * time.Hour

// A Memory knows the networks on which QUIC does not get through, so that the
// next connection, or the next start, does not wait to find out. A network is
// the /24 or /64 of the address that the kernel sends from.
type Memory struct {
	log  *slog.Logger
	file string // empty: keep it in memory
	now  func() time.Time

	mu      sync.Mutex
	blocked map[string]time.Time // network: since when
	failed  bool                 // the last write failed, and that was logged
}

// NewMemory reads the memory that an earlier process left in dir; with an empty
// dir it lasts as long as the process. A file that cannot be read or written is
// logged and done without: it costs the next start a moment.
func NewMemory(dir string, log *slog.Logger) *Memory {
	m := &Memory{log: log, now: time.Now, blocked: map[string]time.Time{}}
	if dir == "" {
		return m
	}
	m.file = filepath.Join(dir, memoryFile)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		log.Warn("memory of networks not kept: the state directory cannot be made", "err", err)
		m.failed = true // as has been said
		return m
	}
	text, err := os.ReadFile(m.file)
	if errors.Is(err, fs.ErrNotExist) {
		return m
	}
	var kept struct {
		QUICBlocked map[string]time.Time `json:"quicBlocked"`
	}
	if err == nil {
		err = json.Unmarshal(text, &kept)
	}
	if err != nil {
		log.Warn("memory of networks not read", "file", m.file, "err", err)
		return m
	}
	for network, since := range kept.QUICBlocked {
		if _, err := netip.ParsePrefix(network); err == nil {
			m.blocked[network] = since
		}
	}
	return m
}

// quicBlocked says whether QUIC lately failed on a network where HTTP/2 worked.
func (m *Memory) quicBlocked(network string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	since, known := m.blocked[network]
	// A time to come is one from before the clock was set right.
	age := m.now().Sub(since)
	return known && age >= -time.Minute && age < memoryTime
}

// setQUIC notes whether QUIC gets through on a network.
func (m *Memory) setQUIC(network string, works bool) {
	if network == "" {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	_, known := m.blocked[network]
	if works && !known {
		return
	}
	if works {
		delete(m.blocked, network)
	} else {
		if known && m.now().Sub(m.blocked[network]).Abs() < time.Minute {
			return // several connections found out at once
		}
		m.blocked[network] = m.now()
	}
	m.write()
}

// write replaces the file. The caller holds mu.
func (m *Memory) write() {
	if m.file == "" {
		return
	}
	for network, since := range m.blocked {
		if m.now().Sub(since) > memoryTime {
			delete(m.blocked, network)
		}
	}
	text, err := json.MarshalIndent(map[string]any{"quicBlocked": m.blocked}, "", "\t")
	if err == nil {
		fresh := m.file + ".new"
		if err = os.WriteFile(fresh, append(text, '\n'), 0o600); err == nil {
			err = os.Rename(fresh, m.file)
		}
		if err != nil {
			_ = os.Remove(fresh) // half of it, on a disk that is full
		}
	}
	if err != nil && !m.failed {
		m.log.Warn("memory of networks not kept: the next start may take a second longer", "err", err)
	}
	m.failed = err != nil
}

// networkTowards names the network from which the kernel would send to an
// address; empty if it has no route there. Nothing is sent.
func networkTowards(to netip.AddrPort) string {
	conn, err := net.Dial("udp", to.String())
	if err != nil {
		return ""
	}
	defer func() { _ = conn.Close() }()
	local, err := netip.ParseAddrPort(conn.LocalAddr().String())
	if err != nil {
		return ""
	}
	addr, bits := local.Addr().Unmap(), 24
	if addr.Is6() {
		bits = 64
	}
	prefix, err := addr.WithZone("").Prefix(bits)
	if err != nil {
		return ""
	}
	return prefix.String()
}

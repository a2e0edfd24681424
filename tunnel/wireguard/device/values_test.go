package device

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

func TestCheck(t *testing.T) {
	good := func() Config {
		return Config{
			PrivateKey: Secret{1}, ListenPort: 51830, Addresses: prefixes("10.66.0.1/24", "fd66::1/64"),
			Peers: []Peer{
				{Name: "alice", PublicKey: Key{1}, AllowedIPs: prefixes("10.66.0.2/32")},
				{Name: "bob", PublicKey: Key{2}, AllowedIPs: prefixes("10.66.0.3/32", "10.66.0.3/32")},
			},
		}
	}
	tests := []struct {
		change func(*Config)
		want   string
	}{
		{func(*Config) {}, ""},
		{func(c *Config) { c.PrivateKey = Secret{} }, "the device has no private key"},
		{func(c *Config) { c.ListenPort = 0 }, "the device has no listen port"},
		{func(c *Config) { c.MTU = 100 }, "an MTU of 100 is not between 576 and 65455"},
		{func(c *Config) { c.MTU = 1000 }, "an MTU of 1000 leaves no IPv6, which needs 1280, but fd66::1/64 is wanted"},
		{func(c *Config) { c.MTU, c.Addresses = 1000, prefixes("10.66.0.1/24") }, ""},
		{func(c *Config) { c.Addresses = append(c.Addresses, netip.Prefix{}) }, "invalid Prefix is no address with a network"},
		{func(c *Config) { c.Addresses = prefixes("10.66.0.1/0") }, "the network of 10.66.0.1/0 is everything"},
		{func(c *Config) { c.Routes = prefixes("0.0.0.0/0") }, "a route for 0.0.0.0/0 would take the machine's own traffic"},
		{func(c *Config) { c.Peers[0].PublicKey = Key{} }, "peer alice has no public key"},
		{func(c *Config) { c.Peers[0].PublicKey = c.PrivateKey.Public() }, "the public key of peer alice is the device's own"},
		{func(c *Config) { c.Peers[0].PublicKey = Key{2} }, "the public key of peer bob is also that of peer alice"},
		{func(c *Config) { c.Peers[0].Next = Key{2} }, "the public key of peer bob is also that of peer alice"},
		{func(c *Config) { c.Peers[0].Next = Key{1} }, "the next public key of peer alice is named twice"},
		{func(c *Config) { c.Peers[1].AllowedIPs = prefixes("10.66.0.2/32") }, "10.66.0.2/32 is an allowed IP of peer alice and of peer bob"},
		{func(c *Config) { c.Peers[1].AllowedIPs = []netip.Prefix{{}} }, "invalid Prefix, an allowed IP of peer bob, is no network"},
		{func(c *Config) { c.Peers[1].Keepalive = 1500 * time.Millisecond }, "a keepalive of 1.5s for peer bob is not 0 to 65535 whole seconds"},
		{func(c *Config) { c.Peers[1] = Peer{} }, "peer AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA= has no public key"},
	}
	for _, tt := range tests {
		c := good()
		tt.change(&c)
		got := ""
		if err := c.Check(); err != nil {
			got = err.Error()
		}
		if got != tt.want {
			t.Errorf("got %q, want %q", got, tt.want)
		}
	}
}

// However a secret is printed, it does not show.
func TestSecretsDoNotShow(t *testing.T) {
	s := Secret(bytes.Repeat([]byte{0xAB}, 32))
	p := Peer{Name: "alice", PublicKey: Key{1}, PresharedKey: s, NextPresharedKey: s}
	c := Config{PrivateKey: s, Peers: []Peer{p}}
	changes := Diff(Have{}, c)
	text, err := json.Marshal(map[string]any{"config": c, "changes": changes})
	if err != nil {
		t.Fatal(err)
	}
	var log testLog
	log.logger().Info("said", "secret", s, "config", c, "changes", changes)
	for _, out := range []string{
		string(text), log.String(), s.String(), fmt.Sprintf("%v %+v %#v %x %s %d", s, c, c, s, &s, s), changes.String(),
		fmt.Sprint(errors.New(changes.String())),
	} {
		for _, sign := range []string{"abab", "ABAB", "171 171", "0xab", "q6ur"} {
			if strings.Contains(out, sign) {
				t.Errorf("a secret shows in %s", out)
			}
		}
	}
	var k Key
	if err := k.UnmarshalText([]byte(Key{7}.String())); err != nil || k != (Key{7}) {
		t.Errorf("a public key read back is %v: %v", k, err)
	}
	if err := k.UnmarshalText([]byte("short")); err == nil {
		t.Error("half a key was read")
	}
}

// A key that is staged is used when it was ever seen, and not before.
func TestDiffRotation(t *testing.T) {
	alice := Peer{Name: "alice", PublicKey: Key{1}, AllowedIPs: prefixes("10.66.0.2/32"), Next: Key{2}, NextPresharedKey: Secret{9}}
	on := func(keys ...Peer) Have { return Have{Config: Config{MTU: defaultMTU, Peers: keys}, Up: true} }
	old, next := Peer{Name: "alice", PublicKey: Key{1}, AllowedIPs: alice.AllowedIPs}, Peer{Name: "alice", PublicKey: Key{2}, PresharedKey: Secret{9}}
	moved := next
	moved.AllowedIPs = alice.AllowedIPs
	seen := func(h Have) Have { h.Seen = map[Key]time.Time{{2}: time.Now()}; return h }
	tests := []struct {
		name string
		have Have
		want string
	}{
		{"a device without peers", on(), "peer alice added; peer alice added"},
		{"staged", on(old, next), "no change"},
		{"used", seen(on(old, next)), "peer alice follows its next key; peer alice removed; peer alice changed: +10.66.0.2/32"},
		{"used before the device was new", seen(on()), "peer alice added"},
		{"moved by an earlier process", on(old, moved), "peer alice follows its next key; peer alice removed"},
		{"done", on(moved), "no change"},
	}
	for _, tt := range tests {
		if got := Diff(tt.have, Config{Peers: []Peer{alice}}).String(); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
}

// What is remembered of a key outlives devices, and is written rarely.
func TestMemory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "edgeward0.state.json")
	var l testLog
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	remember := func() *memory {
		m := newMemory(file, l.logger())
		m.now = func() time.Time { return now }
		return m
	}
	written := func() string { text, _ := os.ReadFile(file); return string(text) }
	peer := func(rx, tx int64, handshake time.Time, endpoint string) []wgtypes.Peer {
		p := wgtypes.Peer{PublicKey: wgtypes.Key{1}, ReceiveBytes: rx, TransmitBytes: tx, LastHandshakeTime: handshake}
		if endpoint != "" {
			p.Endpoint = net.UDPAddrFromAddrPort(netip.MustParseAddrPort(endpoint))
		}
		return []wgtypes.Peer{p, {PublicKey: wgtypes.Key{2}}}
	}
	m := remember()
	m.begin()
	m.name(Key{1}, "alice")
	m.observe(peer(0, 0, time.Time{}, ""))
	m.keep()
	if text := written(); strings.Contains(text, "alice") {
		t.Errorf("who never came is remembered: %s", text)
	}
	now = now.Add(10 * time.Second)
	m.observe(peer(100, 200, now, "192.0.2.1:1000"))
	m.keep()
	if text := written(); !strings.Contains(text, `"name":"alice","endpoint":"192.0.2.1:1000","handshake":"2026-11-21T12:00:10Z","received":100,"sent":200`) {
		t.Errorf("remembered: %s", text)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file's mode: %v: %v", info.Mode(), err)
	}

	// Counters alone wait a minute; where the peer is, two seconds.
	now = now.Add(3 * time.Second)
	m.observe(peer(300, 400, now, "192.0.2.1:1000"))
	m.keep()
	if strings.Contains(written(), `"received":300`) {
		t.Error("counters are written at once")
	}
	m.observe(peer(400, 400, now, "[2001:db8::1]:2000"))
	m.keep()
	if text := written(); !strings.Contains(text, "[2001:db8::1]:2000") || !strings.Contains(text, `"received":400`) {
		t.Errorf("a new endpoint is not written: %s", text)
	}
	now = now.Add(time.Minute)
	m.observe(peer(450, 400, now, "[2001:db8::1]:2000"))
	m.keep()
	if !strings.Contains(written(), `"received":450`) {
		t.Error("counters are not written after a minute")
	}

	// The next process goes on, with the same device or with a new one, and
	// when a peer was removed and added again.
	m = remember()
	m.observe(peer(460, 410, now, "[2001:db8::1]:2000"))
	if r := m.keys[Key{1}]; r.Received != 460 || r.Sent != 410 {
		t.Errorf("with the same device: %+v", r)
	}
	m.write()
	m = remember()
	m.begin()
	m.observe(peer(5, 6, time.Time{}, ""))
	if r := m.keys[Key{1}]; r.Received != 465 || r.Sent != 416 || !r.Handshake.Equal(now) || !r.Endpoint.IsValid() {
		t.Errorf("with a new device: %+v", r)
	}
	m.left(Key{1})
	m.observe(peer(7, 7, time.Time{}, ""))
	if r := m.keys[Key{1}]; r.Received != 472 || r.Sent != 423 {
		t.Errorf("after it was removed: %+v", r)
	}

	// Who has left is forgotten after a month.
	m.observe(nil)
	m.write()
	if !strings.Contains(written(), "alice") {
		t.Error("who has left is forgotten at once")
	}
	now = now.Add(31 * 24 * time.Hour)
	m.late = true
	m.write()
	if strings.Contains(written(), "alice") {
		t.Error("who has left is never forgotten")
	}

	// What cannot be read or written is said once and done without.
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	m = remember()
	m.file = filepath.Join(filepath.Dir(file), "none", "x.json")
	for range 3 {
		m.late = true
		m.write()
	}
	if said := l.String(); strings.Count(said, "not read") != 1 || strings.Count(said, "not kept") != 1 {
		t.Errorf("said: %s", said)
	}
	if left, err := os.ReadDir(filepath.Dir(file)); err != nil || len(left) != 1 {
		t.Errorf("there is left %v: %v", left, err)
	}
	// A handshake to come is one from before the clock was set.
	if err := os.WriteFile(file, []byte(`{"keys":{"`+Key{1}.String()+`":{"handshake":"2099-01-01T00:00:00Z"},"`+Key{2}.String()+`":null}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if m = remember(); m.keys[Key{1}].Handshake.After(time.Now()) {
		t.Errorf("a handshake at %v", m.keys[Key{1}].Handshake)
	}
}

// Of what wireguard-go says, no key and no endpoint is logged above debug, and
// each kind of message at most once a minute.
func TestLibraryLog(t *testing.T) {
	var quiet, loud testLog
	say := func(l *slog.Logger) {
		lib := (&libraryLog{log: l}).logger()
		for range 100 {
			lib.Errorf("%v - Failed to send handshake initiation: %v", "peer(abcd…wxyz)", &net.OpError{Op: "write", Err: unix.ENETUNREACH, Addr: &net.UDPAddr{IP: net.IPv4(203, 0, 113, 7), Port: 4242}})
			lib.Errorf("%v - Failed to send handshake initiation: %v", "peer(abcd…wxyz)", errors.New("no known endpoint for peer"))
			lib.Errorf("%v", errors.New("failed to parse line \"private_key=c0ffee\""))
			lib.Verbosef("%v - Received handshake initiation", "peer(abcd…wxyz)")
		}
		lib.Errorf("Trouble determining MTU, assuming default: %v", errors.New("x"))
	}
	say(quiet.logger())
	if said := quiet.String(); strings.Count(said, "\n") != 2 || !strings.Contains(said, `said="Failed to send handshake initiation" error="network is unreachable"`) ||
		strings.Contains(said, "203.0.113.7") || strings.Contains(said, "abcd") || strings.Contains(said, "c0ffee") {
		t.Errorf("said:\n%s", said)
	}
	say(slog.New(slog.NewTextHandler(&loud, &slog.HandlerOptions{Level: slog.LevelDebug})))
	if said := loud.String(); !strings.Contains(said, "Received handshake initiation") || strings.Contains(said, "c0ffee") {
		t.Errorf("at debug, said:\n%.500s", said)
	}
}

// silentTUN is a TUN device that reads one batch of packets again and again.
type silentTUN struct {
	tun.Device
	packets [][]byte
}

func (s *silentTUN) Events() <-chan tun.Event { c := make(chan tun.Event); close(c); return c }

func (s *silentTUN) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	for i, p := range s.packets {
		sizes[i] = copy(bufs[i][offset:], p)
	}
	return len(s.packets), nil
}

func (s *silentTUN) Write(bufs [][]byte, _ int) (int, error) { return len(bufs), nil }

// packet is an IP packet of 100 bytes.
func packet(from, to string) []byte {
	p := make([]byte, 100)
	src, dst := netip.MustParseAddr(from), netip.MustParseAddr(to)
	if src.Is4() {
		p[0] = 4<<4 | 5
		copy(p[12:], src.AsSlice())
		copy(p[16:], dst.AsSlice())
	} else {
		p[0] = 6 << 4
		copy(p[8:], src.AsSlice())
		copy(p[24:], dst.AsSlice())
	}
	return p
}

func TestGuard(t *testing.T) {
	s := &silentTUN{}
	g := newGuard(s)
	g.set(Key{1}, prefixes("10.66.0.2/32", "fd66::2/128"))
	g.set(Key{2}, prefixes("192.168.0.0/16"))
	g.set(Key{3}, prefixes("192.168.7.0/24"))
	bufs, sizes := [][]byte{make([]byte, 200), make([]byte, 200)}, make([]int, 2)
	// passes says how many of n packets pass.
	passes := func(n int, to string) int {
		from := "10.66.0.1"
		if strings.Contains(to, ":") {
			from = "fd66::1"
		}
		s.packets = [][]byte{packet(from, to)}
		passed := 0
		for range n {
			if _, err := g.Read(bufs, sizes, 16); err != nil {
				t.Fatal(err)
			}
			if sizes[0] > 0 {
				passed++
			}
		}
		return passed
	}
	expect := func(name string, got, want int) {
		t.Helper()
		if got != want {
			t.Errorf("%s: %d pass, want %d", name, got, want)
		}
	}
	expect("to a peer that is away", passes(1000, "10.66.0.2"), allowance)
	expect("to another address of it", passes(10, "fd66::2"), 0)
	expect("to another that is away", passes(10, "192.168.9.9"), 0)
	expect("to nobody's address", passes(10, "10.66.0.77"), 10)
	expect("what is no packet", func() int { s.packets = [][]byte{{0x45, 0}}; n, _ := g.Read(bufs, sizes, 16); return n }(), 1)

	session := func(k Key, age time.Duration) {
		g.sessions([]wgtypes.Peer{{PublicKey: wgtypes.Key(k), LastHandshakeTime: time.Now().Add(-age)}})
	}
	session(Key{1}, 170*time.Second)
	expect("to a peer with a session", passes(1000, "10.66.0.2"), 1000)
	g.set(Key{1}, prefixes("10.66.0.3/32"))
	expect("to its new address", passes(1000, "10.66.0.3"), 1000)
	expect("to its former one", passes(10, "10.66.0.2"), 10)
	// Who speaks has a session; the longer network is the nearer.
	if _, err := g.Write([][]byte{append(make([]byte, 16), packet("192.168.7.1", "10.66.0.1")...)}, 16); err != nil {
		t.Fatal(err)
	}
	expect("to who has just spoken", passes(100, "192.168.7.200"), 100)
	expect("to its neighbour", passes(100, "192.168.8.200"), 0)
	session(Key{2}, 181*time.Second)
	expect("to a peer whose session is over", passes(100, "192.168.8.200"), 0)
	// What another has taken over stays the other's.
	g.set(Key{4}, prefixes("10.66.0.3/32"))
	g.drop(Key{1})
	expect("to an address that changed hands", passes(100, "10.66.0.3"), 0)
	g.drop(Key{4})
	g.drop(Key{3})
	expect("to a removed peer", passes(100, "10.66.0.3"), 100)
	g.filled.Store(0)
	expect("later", passes(100, "192.168.7.200"), allowance)
}

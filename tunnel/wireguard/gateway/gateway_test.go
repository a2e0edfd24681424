package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/edgeward/edgeward/internal/nft"
	"github.com/edgeward/edgeward/tunnel"
	"github.com/edgeward/edgeward/tunnel/wireguard"
	"github.com/edgeward/edgeward/tunnel/wireguard/device"
)

// machine stands for device and rules together. After each step that it makes,
// and it makes as many small ones as the real ones may, watch is called.
type machine struct {
	watch func()
	trace []string
	// fails says whether a step fails; nil is never.
	fails func(what string) error

	mode    device.Mode
	peers   map[device.Key][]netip.Prefix
	open    bool
	rules   nft.Access
	ruled   bool
	counts  []nft.SourceCount
	denied  []nft.Attempt
	granted []nft.Attempt
	states  []device.PeerState
	gone    []device.PeerState
	lacks   error // what is not applied beside peers
	port    uint16
	crossed []device.Conflict
}

func newMachine() *machine {
	return &machine{watch: func() {}, mode: device.Userspace, peers: map[device.Key][]netip.Prefix{}}
}

func (m *machine) step(what string) error {
	m.trace = append(m.trace, what)
	if m.fails != nil {
		return m.fails(what)
	}
	return nil
}

// link and rules are its two sides.
type linkDouble struct{ *machine }
type rulesDouble struct{ *machine }

func (l linkDouble) Mode() device.Mode { return l.mode }

func (l linkDouble) Have() (device.Have, error) {
	var have device.Have
	for k, ips := range l.peers {
		have.Peers = append(have.Peers, device.Peer{PublicKey: k, AllowedIPs: ips})
	}
	have.ListenPort = l.port
	return have, nil
}

func (l linkDouble) Remove(k device.Key) error {
	if err := l.step("remove"); err != nil {
		return err
	}
	delete(l.peers, k)
	l.watch()
	return nil
}

func (l linkDouble) Upsert(p device.Peer) error {
	if err := l.step("upsert " + p.Name); err != nil {
		return err
	}
	l.set(p)
	return nil
}

func (l linkDouble) set(p device.Peer) {
	// An allowed IP is one peer's: the last that asked for it.
	for k, ips := range l.peers {
		l.peers[k] = slices.DeleteFunc(ips, func(a netip.Prefix) bool { return slices.Contains(p.AllowedIPs, a) })
	}
	l.peers[p.PublicKey] = slices.Clone(p.AllowedIPs)
	l.watch()
}

func (l linkDouble) Reconcile(want device.Config) (device.Changes, error) {
	if err := want.Check(); err != nil {
		return device.Changes{}, err
	}
	if err := l.step("reconcile"); err != nil {
		return device.Changes{}, err
	}
	wanted := map[device.Key]bool{}
	for _, p := range want.Peers {
		wanted[p.PublicKey] = true
	}
	for k := range l.peers {
		if !wanted[k] {
			if err := l.step("part"); err != nil {
				return device.Changes{}, err
			}
			delete(l.peers, k)
			l.watch()
		}
	}
	for _, p := range want.Peers {
		if err := l.step("part"); err != nil {
			return device.Changes{}, err
		}
		l.set(p)
	}
	if l.lacks != nil {
		return device.Changes{}, l.lacks
	}
	return device.Changes{}, nil
}

func (l linkDouble) Peers() ([]device.PeerState, error) { return l.states, nil }
func (l linkDouble) Gone() []device.PeerState           { return l.gone }
func (l linkDouble) Close() error                       { l.trace = append(l.trace, "close device"); return nil }

func (r rulesDouble) Apply(a nft.Access) (nft.Applied, error) {
	if err := r.step("rules"); err != nil {
		return nft.Applied{}, err
	}
	r.rules, r.ruled = a, true
	r.watch()
	return nft.Applied{Changed: true}, nil
}

func (r rulesDouble) Counters() (nft.AccessCounters, error) {
	return nft.AccessCounters{Granted: 5, Forged: 1}, nil
}
func (r rulesDouble) Sources() ([]nft.SourceCount, error)             { return r.counts, nil }
func (r rulesDouble) Denied() ([]nft.Attempt, error)                  { return r.denied, nil }
func (r rulesDouble) Granted() ([]nft.Attempt, error)                 { return r.granted, nil }
func (r rulesDouble) Watch(context.Context) (<-chan nft.Event, error) { return nil, errors.New("none") }
func (r rulesDouble) Close() error                                    { return nil }

// rig is a gateway on such a machine, whose turns the test makes.
type rig struct {
	*machine
	t    testing.TB
	g    *Gateway
	logs *strings.Builder
	at   time.Time
}

const head = "wireguard: {addresses: [10.66.0.1/24, fd66::1/64], privateKeyFile: DIR/key, names: {upstreams: [192.0.2.53], zones: [home.example.com]}}\nstateDir: DIR\n"

var dirs = map[testing.TB]string{}

func parse(t testing.TB, text string) wireguard.Config {
	t.Helper()
	c, err := tunnel.Parse("tunnel.yaml", []byte(strings.ReplaceAll(text, "DIR", dirs[t])))
	if err != nil {
		t.Fatal(err)
	}
	return *c.VPN()
}

func newRig(t testing.TB, text string) *rig {
	t.Helper()
	dirs[t] = t.TempDir()
	t.Cleanup(func() { delete(dirs, t) })
	r := &rig{machine: newMachine(), t: t, logs: new(strings.Builder), at: time.Date(2027, 1, 1, 12, 0, 0, 0, time.UTC)}
	g, err := New(Options{Config: parse(t, text), StateDir: dirs[t], Log: slog.New(slog.NewTextHandler(r.logs, nil))})
	if err != nil {
		t.Fatal(err)
	}
	r.g = g
	g.now = func() time.Time { return r.at }
	g.conflicts = func(string, []netip.Prefix) ([]device.Conflict, error) { return r.crossed, nil }
	g.openRules = func() (rules, error) {
		if err := r.step("open rules"); err != nil {
			return nil, err
		}
		return rulesDouble{r.machine}, nil
	}
	g.openDevice = func(context.Context, device.Options) (link, error) {
		if err := r.step("open device"); err != nil {
			return nil, err
		}
		r.open = true
		return linkDouble{r.machine}, nil
	}
	return r
}

// turn makes a turn and returns what it did, in order.
func (r *rig) turn() (did string, next time.Time, err error) {
	r.t.Helper()
	r.trace = nil
	r.logs.Reset()
	next, err = r.g.turn(r.t.Context())
	return strings.Join(r.trace, ", "), next, err
}

func (r *rig) declare(text string) {
	r.t.Helper()
	if err := r.g.Apply(parse(r.t, text)); err != nil {
		r.t.Fatal(err)
	}
}

// key is a public key of its own for every letter.
func key(c byte) string {
	var k wireguard.PublicKey
	k[0], k[31] = c, 1
	return k.String()
}

func peer(name string, rest string) string {
	return fmt.Sprintf("  - {name: %s, publicKey: '%s', addresses: [10.66.0.%d]%s}\n", name, key(name[0]), name[0]-'a'+10, rest)
}

const services = `services:
  - {name: grafana, host: grafana.home.example.com, addresses: [10.43.0.9], ports: [443/tcp]}
  - {name: printer, addresses: [192.168.7.9], ports: [631/tcp, 9000-9100/udp]}
grants:
  - {to: [group:family], services: [grafana]}
`

// declared is a file with these peers.
func declared(peers ...string) string { return head + "peers:\n" + strings.Join(peers, "") + services }

func TestOrder(t *testing.T) {
	alice, bob, carol := peer("alice", ", groups: [family]"), peer("bob", ""), peer("carol", "")
	r := newRig(t, declared(alice, bob))
	did, _, err := r.turn()
	if err != nil || did != "open rules, open device, rules, reconcile, part, part" {
		t.Errorf("the first turn: %s %v", did, err)
	}
	if len(r.rules.Sources) != 4 || !r.ruled || r.rules.Interface != "edgeward0" {
		t.Errorf("the rules are %+v", r.rules)
	}
	for _, s := range []struct{ what, text, want, logged string }{
		{"the same again, to be sure", declared(alice, bob), "rules, reconcile, part, part", ""},
		{"a peer comes", declared(alice, bob, carol), "rules, upsert carol", "peer=carol"},
		{"a peer goes", declared(alice, carol), "rules, remove", "peer=bob"},
		{"a right goes", declared(peer("alice", ""), carol), "rules", "loses=[grafana]"},
		{"a peer is shut out", declared(peer("alice", ", enabled: false"), carol), "rules, remove", "peer=alice"},
		{"a name has another key", declared(peer("alice", ", enabled: false"), strings.Replace(carol, key('c'), key('x'), 1)), "rules, reconcile, part, part, rules", "peer=carol"},
		{"an address is another's", declared(strings.Replace(peer("dora", ""), ".13", ".12", 1)), "rules, remove, upsert dora, rules", "peer=dora"},
		{"a port", strings.Replace(declared(), "wireguard: {", "wireguard: {listenPort: 51999, ", 1), "rules, reconcile, part", "51999"},
	} {
		r.declare(s.text)
		if did, _, err := r.turn(); err != nil || did != s.want || !strings.Contains(r.logs.String(), s.logged) || s.logged == "" && strings.Contains(r.logs.String(), "vpn changed") {
			t.Errorf("%s: %s %v, want %s; logged %s", s.what, did, err, s.want, r.logs)
		}
	}
	if did, _, _ := r.turn(); did != "rules" {
		t.Errorf("a turn that nobody needs: %s", did)
	}
	r.at = r.at.Add(interval)
	if did, _, _ := r.turn(); did != "rules, reconcile" {
		t.Errorf("a turn after the interval: %s", did)
	}
}

// TestFailures has each step fail: what was enforced stays, it is tried again,
// and a peer that goes is gone even if the rules cannot be changed.
func TestFailures(t *testing.T) {
	alice, bob := peer("alice", ", groups: [family]"), peer("bob", "")
	refuse := errors.New("refused on purpose")
	for _, fatal := range []string{"open rules", "rules", "open device", "reconcile", "part"} {
		r := newRig(t, declared(alice, bob))
		r.fails = func(what string) error {
			if what == fatal {
				return refuse
			}
			return nil
		}
		did, _, err := r.turn()
		if !errors.Is(err, refuse) || len(r.peers) > 0 && !r.ruled {
			t.Errorf("%s fails: %s %v; the device is open %v without rules %v", fatal, did, err, r.open, !r.ruled)
		}
		r.fails = nil
		if did, _, err := r.turn(); err != nil || len(r.peers) != 2 || len(r.rules.Sources) != 4 {
			t.Errorf("after %s failed: %s %v, %d peers, rules %+v", fatal, did, err, len(r.peers), r.rules)
		}
	}

	r := newRig(t, declared(alice, bob))
	if _, _, err := r.turn(); err != nil {
		t.Fatal(err)
	}
	r.fails = func(what string) error {
		if what == "rules" {
			return refuse
		}
		return nil
	}
	r.declare(declared(alice))
	if did, _, err := r.turn(); !errors.Is(err, refuse) || did != "rules, remove" || len(r.peers) != 1 || len(r.rules.Sources) != 4 {
		t.Errorf("a peer goes and rules fail: %s %v, %d peers", did, err, len(r.peers))
	}
	if have := r.g.Desired(); len(have.Peers) != 2 {
		t.Errorf("what is enforced is said to be %v", have.Peers)
	}
	r.fails = nil
	if did, _, err := r.turn(); err != nil || did != "rules, reconcile, part" || len(r.rules.Sources) != 2 || !strings.Contains(r.logs.String(), "peer=bob") {
		t.Errorf("tried again: %s %v", did, err)
	}
}

// TestPartly has the device lack something that is no peer's: everybody has the
// access that was declared, turns come in time, and it is told of and tried again.
func TestPartly(t *testing.T) {
	r := newRig(t, declared(peer("alice", ", expires: 2027-01-01T12:00:05Z")))
	r.lacks = errors.New("forwarding is off")
	end := r.at.Add(5 * time.Second)
	if _, next, err := r.turn(); err != nil || !next.Equal(end) || !strings.Contains(r.g.Problem(), "forwarding is off") || strings.Count(r.logs.String(), "forwarding is off") != 1 || len(r.g.Status().Peers) != 1 {
		t.Errorf("next %v, %v, %q, logged %s", next, err, r.g.Problem(), r.logs)
	}
	r.at = end
	if did, next, err := r.turn(); err != nil || !next.Equal(r.at.Add(again)) || did != "rules, reconcile, part" || strings.Contains(r.logs.String(), "forwarding") {
		t.Errorf("%s, next %v, %v, logged %s", did, next, err, r.logs)
	}
	r.lacks = nil
	if did, next, err := r.turn(); err != nil || !next.IsZero() || did != "rules, reconcile" || r.g.Problem() != "" || !strings.Contains(r.logs.String(), "all is as declared") {
		t.Errorf("%s, next %v, %v, %q, logged %s", did, next, err, r.g.Problem(), r.logs)
	}
}

// TestConflicts holds that no rule is made for a network in which the machine is at
// home: it would be cut off from there.
func TestConflicts(t *testing.T) {
	site := peer("site", ", allowedIPs: [192.168.7.0/24]")
	lan := device.Conflict{Network: netip.MustParsePrefix("192.168.7.0/24"), Uses: "192.168.7.1/24, the address of lan0"}
	own := device.Conflict{Network: netip.MustParsePrefix("10.66.0.0/24"), Uses: "10.66.0.7/24, the address of lan0"}
	ruled := func(r *rig, n string) bool { return slices.Contains(r.rules.Networks, netip.MustParsePrefix(n)) }

	r := newRig(t, declared(peer("alice", ""), site))
	r.crossed = []device.Conflict{lan}
	if did, _, err := r.turn(); err != nil || len(r.peers) != 1 || ruled(r, "192.168.7.0/24") {
		t.Errorf("a peer's network is the LAN: %s %v, rules %v", did, err, r.rules.Networks)
	}
	const says = "192.168.7.0/24 overlaps 192.168.7.1/24, the address of lan0: take it out of peer site's allowedIPs"
	if p := r.g.Desired().Idle; len(p) != 1 || p[0].State != wireguard.Unready || p[0].Why != says || !strings.Contains(r.logs.String(), says) {
		t.Errorf("the peer is %+v, logged %s", p, r.logs)
	}
	r.crossed = nil
	r.at = r.at.Add(interval)
	if _, _, err := r.turn(); err != nil || len(r.peers) != 2 || !ruled(r, "192.168.7.0/24") {
		t.Errorf("the LAN has moved: %v, %d peers", err, len(r.peers))
	}
	r.crossed = []device.Conflict{lan}
	r.at = r.at.Add(interval)
	if _, _, err := r.turn(); err != nil || len(r.peers) != 1 || ruled(r, "192.168.7.0/24") {
		t.Errorf("the LAN has come back: %v, %d peers", err, len(r.peers))
	}

	r = newRig(t, declared(peer("alice", "")))
	r.crossed = []device.Conflict{own}
	if did, _, err := r.turn(); err == nil || did != "" || !strings.Contains(err.Error(), "10.66.0.0/24 of the VPN overlaps 10.66.0.7/24, the address of lan0: give the VPN another network") {
		t.Errorf("the VPN's own network at the first start: %s %v", did, err)
	}
	r.crossed = nil
	if _, _, err := r.turn(); err != nil {
		t.Fatal(err)
	}
	// An edit brings the conflict: what was enforced stays, and who goes is gone.
	moved := device.Conflict{Network: netip.MustParsePrefix("10.67.0.0/24"), Uses: own.Uses}
	r.crossed = []device.Conflict{moved}
	r.declare(strings.NewReplacer("10.66.0.1/24", "10.67.0.1/24").Replace(head) + "peers: []\n")
	if did, _, err := r.turn(); err == nil || did != "remove" || !ruled(r, "10.66.0.0/24") || ruled(r, "10.67.0.0/24") {
		t.Errorf("an edit to the LAN's network: %s %v, rules %v", did, err, r.rules.Networks)
	}
	r.crossed = nil
	r.declare(declared(peer("alice", "")))
	if did, _, err := r.turn(); err != nil || len(r.peers) != 1 {
		t.Errorf("the edit is taken back: %s %v, %d peers", did, err, len(r.peers))
	}
	// The machine moves to where the VPN is: to stop would not help.
	r.crossed = []device.Conflict{own}
	r.declare(declared(peer("bob", "")))
	if _, _, err := r.turn(); err != nil || len(r.peers) != 1 || !strings.Contains(r.g.Problem(), "give the VPN another network") {
		t.Errorf("the LAN came to the VPN: %v, %q", err, r.g.Problem())
	}
}

// TestRestart finds a kernel's device of an earlier process, whose addresses are
// others' now: the rules are not theirs before the device says so.
func TestRestart(t *testing.T) {
	r := newRig(t, declared(peer("alice", ", groups: [family]")))
	var bob device.Key
	bob[0], bob[31] = 'b', 1
	r.peers[bob] = []netip.Prefix{netip.MustParsePrefix("10.66.0.10/32")}
	r.watch = func() {
		for _, s := range r.rules.Sources {
			if s.Group != "" && slices.Contains(r.peers[bob], s.Prefix) {
				t.Errorf("bob has %v, and the rules lead it to %q: %v", s.Prefix, s.Group, r.trace)
			}
		}
	}
	if did, _, err := r.turn(); err != nil || len(r.rules.Sources) != 2 || r.peers[bob] != nil {
		t.Errorf("%s %v, rules %+v", did, err, r.rules.Sources)
	}
}

// TestRevokeAfterRotation takes away a peer whose next key took over.
func TestRevokeAfterRotation(t *testing.T) {
	alice := peer("alice", fmt.Sprintf(", groups: [family], nextPublicKey: '%s'", key('n')))
	for _, broken := range []bool{false, true} {
		r := newRig(t, declared(alice, peer("bob", "")))
		if _, _, err := r.turn(); err != nil {
			t.Fatal(err)
		}
		var a, n device.Key
		a[0], a[31], n[0], n[31] = 'a', 1, 'n', 1
		r.peers[n] = r.peers[a]
		delete(r.peers, a)
		r.declare(declared(peer("bob", "")))
		r.fails = func(what string) error {
			if broken && what == "rules" {
				return errors.New("refused on purpose")
			}
			return nil
		}
		if did, _, err := r.turn(); (err != nil) != broken || r.peers[n] != nil {
			t.Errorf("rules fail %v: %s %v, the peer has %v", broken, did, err, r.peers[n])
		}
	}
}

// TestManyFailures holds that wishes that fail are not remembered without end, and
// that nothing is wider for it.
func TestManyFailures(t *testing.T) {
	r := newRig(t, declared(peer("alice", ", groups: [family]")))
	if _, _, err := r.turn(); err != nil {
		t.Fatal(err)
	}
	r.fails = func(what string) error {
		if what == "part" || strings.HasPrefix(what, "upsert") {
			return errors.New("refused on purpose")
		}
		return nil
	}
	for i := range 40 {
		r.declare(declared(strings.Replace(peer("bob", ""), ".11", fmt.Sprintf(".%d", 20+i), 1)))
		if _, _, err := r.turn(); err == nil || len(r.g.failed) > mostFailed {
			t.Fatalf("turn %d: %v, %d are remembered", i, err, len(r.g.failed))
		}
	}
	r.fails = nil
	if _, _, err := r.turn(); err != nil || len(r.peers) != 1 || len(r.rules.Sources) != 2 {
		t.Errorf("%v, %d peers, rules %+v", err, len(r.peers), r.rules.Sources)
	}
}

// TestClock sets the clock back: who has expired stays out, over a restart as well.
func TestClock(t *testing.T) {
	text := declared(peer("alice", ", expires: 2027-01-01T13:00:00Z"), peer("bob", ", expires: 2027-01-01T14:30:00Z"))
	r := newRig(t, text)
	turn := func(at time.Time, peers int, told bool) {
		t.Helper()
		r.at = at
		if _, _, err := r.turn(); err != nil || len(r.peers) != peers || strings.Contains(r.g.Problem(), "set the clock") != told {
			t.Errorf("at %v: %v, %d peers, %q", at, err, len(r.peers), r.g.Problem())
		}
	}
	start := r.at
	turn(start, 2, false)
	turn(start.Add(2*time.Hour), 1, false)
	turn(start.Add(-24*365*time.Hour), 1, true)
	again := *r
	g, err := New(Options{Config: parse(t, text), StateDir: dirs[t], Log: r.g.log})
	if err != nil {
		t.Fatal(err)
	}
	g.now, g.openRules, g.openDevice, g.conflicts = func() time.Time { return again.at }, r.g.openRules, r.g.openDevice, r.g.conflicts
	again.g = g
	again.at = start.Add(-24 * 365 * time.Hour)
	if _, _, err := again.turn(); err != nil || len(again.peers) != 1 || !strings.Contains(g.Problem(), "set the clock") {
		t.Errorf("after a restart: %v, %d peers, %q", err, len(again.peers), g.Problem())
	}
	turn(start.Add(3*time.Hour), 0, false)
}

// TestKeyFiles has key files come and go under a gateway at work: nobody is cut off
// for a file that is gone, a key that changes is another, and the log says both.
func TestKeyFiles(t *testing.T) {
	r := newRig(t, head)
	text := declared(peer("alice", ", presharedKeyFile: DIR/alice.psk"))
	file := filepath.Join(dirs[t], "alice.psk")
	write := func(name, key string) {
		t.Helper()
		if err := os.WriteFile(name, []byte(key), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	one, two := wireguard.NewPresharedKey(), wireguard.NewPresharedKey()
	write(file, one.Reveal())
	private := filepath.Join(dirs[t], "key")
	kept, err := os.ReadFile(private)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []struct {
		what, key string
		is        wireguard.PresharedKey
		did, said string
	}{
		{"it comes", one.Reveal(), one, "open rules, open device, rules, reconcile, part", ""},
		{"it is gone", "", one, "rules", "the key that was last read stays"},
		{"it is junk", "junk", one, "rules", "the key that was last read stays"},
		{"it is another", two.Reveal(), two, "rules, upsert alice", "preshared key changed"},
	} {
		write(file, s.key)
		if s.key == "" {
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
		}
		r.declare(text)
		did, _, err := r.turn()
		peers := r.g.Desired().Peers
		if err != nil || did != s.did || len(peers) != 1 || peers[0].PresharedKey != s.is || !strings.Contains(r.logs.String(), s.said) {
			t.Errorf("%s: %s %v, logged %s", s.what, did, err, r.logs)
		}
	}
	was := r.g.Desired().Device.PublicKey
	if err := os.Remove(private); err != nil {
		t.Fatal(err)
	}
	r.declare(text)
	if _, _, err := r.turn(); err != nil || r.g.Desired().Device.PublicKey != was || !strings.Contains(r.g.Problem(), "stays until the next start") {
		t.Errorf("the private key is gone: %v, %q", err, r.g.Problem())
	}
	if _, err := os.Stat(private); err == nil {
		t.Error("a new private key was made under a gateway at work")
	}
	write(private, string(kept))
	r.declare(text)
	if _, _, err := r.turn(); err != nil || r.g.Problem() != "" {
		t.Errorf("the private key is back: %v, %q", err, r.g.Problem())
	}
}

// TestOwnKey refuses a peer that has the gateway's own key, and lets others in.
func TestOwnKey(t *testing.T) {
	r := newRig(t, head)
	r.declare(declared(peer("alice", ""), strings.Replace(peer("bob", ""), key('b'), r.g.wish.secrets.PrivateKey.Public().String(), 1)))
	if _, _, err := r.turn(); err != nil || len(r.peers) != 1 {
		t.Fatalf("%v, %d peers", err, len(r.peers))
	}
	if p := r.g.Desired().Idle; len(p) != 1 || p[0].State != wireguard.Unready || !strings.Contains(p[0].Why, "the gateway's own") {
		t.Errorf("it is %+v", p)
	}
}

// TestPort holds that status and log tell the port that the device has.
func TestPort(t *testing.T) {
	r := newRig(t, declared())
	if _, _, err := r.turn(); err != nil {
		t.Fatal(err)
	}
	r.lacks, r.port = errors.New("UDP port 51999 is taken"), 51830
	r.declare(strings.Replace(declared(), "wireguard: {", "wireguard: {listenPort: 51999, ", 1))
	if _, _, err := r.turn(); err != nil || r.g.Status().ListenPort != 51830 || strings.Contains(r.logs.String(), "-> 51999") {
		t.Errorf("%v, port %d, logged %s", err, r.g.Status().ListenPort, r.logs)
	}
	r.lacks = nil
	if _, _, err := r.turn(); err != nil || r.g.Status().ListenPort != 51999 || !strings.Contains(r.logs.String(), "listen port 51830 -> 51999") {
		t.Errorf("%v, port %d, logged %s", err, r.g.Status().ListenPort, r.logs)
	}
}

// TestShutOut has a peer that is disabled, and then revoked, try on: what is known of
// it stays known.
func TestShutOut(t *testing.T) {
	r := newRig(t, declared(peer("alice", ", groups: [family]")))
	if _, _, err := r.turn(); err != nil {
		t.Fatal(err)
	}
	var alice device.Key
	alice[0], alice[31] = 'a', 1
	r.gone = []device.PeerState{{Name: "alice", PublicKey: alice, Endpoint: netip.MustParseAddrPort("203.0.113.7:1234"), Handshake: r.at, Received: 7}}
	r.denied = []nft.Attempt{{From: netip.MustParseAddr("10.66.0.10"), To: netip.MustParseAddr("192.168.7.9"), Proto: 6, Port: 22, Packets: 1}}
	r.declare(declared(peer("alice", ", enabled: false")))
	if _, _, err := r.turn(); err != nil || !strings.Contains(r.logs.String(), `msg="access denied" component=vpn peer=alice`) {
		t.Errorf("%v, logged %s", err, r.logs)
	}
	report := r.g.Report()
	if p := report.Peers[0]; p.State != wireguard.Disabled || !p.Handshake.Equal(r.at) || p.Endpoint != "203.0.113.7:1234" || p.Received != 7 {
		t.Errorf("a disabled peer: %+v", p)
	}
	r.declare(declared())
	if _, _, err := r.turn(); err != nil {
		t.Fatal(err)
	}
	if report := r.g.Report(); len(report.Denied) != 1 || report.Denied[0].Peer != "alice" {
		t.Errorf("a revoked peer: %+v", report.Denied)
	}
	for name := range r.metrics() {
		if strings.Contains(name, "alice") {
			t.Errorf("a revoked peer is a label: %s", name)
		}
	}
}

// TestWideSources has a network come where another had an address: it is nobody's
// while the device may know the former owner.
func TestWideSources(t *testing.T) {
	source := func(prefix string, name wireguard.Name) wireguard.Source {
		return wireguard.Source{Prefix: netip.MustParsePrefix(prefix), Peer: name}
	}
	for _, c := range []struct {
		was, is wireguard.Source
		kept    bool
	}{
		{source("192.168.7.9/32", "alice"), source("192.168.7.0/24", "bob"), false},
		{source("192.168.7.0/24", "alice"), source("192.168.7.9/32", "bob"), false},
		{source("192.168.7.9/32", "bob"), source("192.168.7.0/24", "bob"), true},
		{source("192.168.8.9/32", "alice"), source("192.168.7.0/24", "bob"), true},
		{source("192.168.7.9/32", "alice"), source("192.168.7.9/32", "bob"), false},
	} {
		have := wireguard.Desired{Access: wireguard.Access{Sources: []wireguard.Source{c.was}}}
		if kept := keepers(have, wireguard.Desired{}, []wireguard.Source{c.is}); (len(kept) == 1) != c.kept {
			t.Errorf("%+v after %+v: kept %v", c.is, c.was, kept)
		}
	}
}

// TestNotUp reads what a gateway says of itself before it did anything, as the
// command line does.
func TestNotUp(t *testing.T) {
	r := newRig(t, declared(peer("alice", "")))
	for _, c := range []struct{ is, into any }{{r.g.Report(), new(Report)}, {r.g.Status(), new(wireguard.Status)}, {r.g.Desired(), new(wireguard.Desired)}} {
		text, err := json.Marshal(c.is)
		if err == nil {
			err = json.Unmarshal(text, c.into)
		}
		if err != nil {
			t.Errorf("%T: %v", c.is, err)
		}
	}
}

// TestLost has the interface taken away: the device is read at once.
func TestLost(t *testing.T) {
	r := newRig(t, declared(peer("alice", "")))
	r.turn()
	r.g.lost()
	if !strings.Contains(r.g.Problem(), "another hand") {
		t.Errorf("the trouble is %q", r.g.Problem())
	}
	if did, _, err := r.turn(); err != nil || did != "rules, reconcile, part" || r.g.Problem() != "" {
		t.Errorf("%s %v %q", did, err, r.g.Problem())
	}
}

// TestExpiry warns, ends a peer to the second, and asks for turns at these times.
func TestExpiry(t *testing.T) {
	r := newRig(t, declared(peer("alice", ", groups: [family], expires: 2027-01-10T12:00:00Z"), peer("bob", "")))
	end := time.Date(2027, 1, 10, 12, 0, 0, 0, time.UTC)
	for _, s := range []struct {
		at       time.Time
		next     time.Time
		peers    int
		warns    bool
		expiring string
	}{
		{r.at, end.Add(-7 * 24 * time.Hour), 2, false, "0 0"},
		{end.Add(-7 * 24 * time.Hour), end.Add(-24 * time.Hour), 2, true, "0 1"},
		{end.Add(-6 * 24 * time.Hour), end.Add(-24 * time.Hour), 2, false, "0 1"},
		{end.Add(-24 * time.Hour), end, 2, true, "1 1"},
		{end.Add(-time.Millisecond), end, 2, false, "1 1"},
		{end, time.Time{}, 1, false, "0 0"},
	} {
		r.at = s.at
		_, next, err := r.turn()
		if err != nil || !next.Equal(s.next) || len(r.peers) != s.peers || strings.Contains(r.logs.String(), "expires soon") != s.warns {
			t.Errorf("at %v: the next turn is at %v (%v), %d peers, logged %s", s.at, next, err, len(r.peers), r.logs)
		}
		m := r.metrics()
		if got := m[`edgeward_vpn_peers_expiring{within="1d"}`] + " " + m[`edgeward_vpn_peers_expiring{within="7d"}`]; got != s.expiring {
			t.Errorf("at %v: expiring are %s, want %s", s.at, got, s.expiring)
		}
	}
	if !strings.Contains(r.logs.String(), "peer=alice") || r.metrics()[`edgeward_vpn_peers{state="expired"}`] != "1" {
		t.Errorf("the end is not told of: %s", r.logs)
	}
}

// metrics are all values that a scrape gets, and it must be a good one.
func (r *rig) metrics() map[string]string {
	r.t.Helper()
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(r.g.Collector())
	families, err := registry.Gather()
	if err != nil {
		r.t.Fatal(err)
	}
	out := map[string]string{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
			}
			name := f.GetName()
			if labels != nil {
				name += "{" + strings.Join(labels, ",") + "}"
			}
			out[name] = fmt.Sprint(m.GetGauge().GetValue() + m.GetCounter().GetValue())
		}
	}
	return out
}

func TestStatusAndMetrics(t *testing.T) {
	r := newRig(t, declared(peer("alice", ", groups: [family]"), peer("bob", ", enabled: false"), peer("carol", ", presharedKeyFile: DIR/missing.psk")))
	if r.g.Ready() == nil || r.g.Status().Mode != "" {
		t.Error("it is ready before it did anything")
	}
	var alice device.Key
	alice[0], alice[31] = 'a', 1
	r.states = []device.PeerState{{Name: "alice", PublicKey: alice, Endpoint: netip.MustParseAddrPort("203.0.113.7:1234"), Handshake: r.at.Add(-time.Minute), Received: 100, Sent: 200}}
	phone, nas := netip.MustParseAddr("10.66.0.10"), netip.MustParseAddr("192.168.7.9")
	r.counts = []nft.SourceCount{{Addr: phone, Granted: 7, Denied: 3}, {Addr: netip.MustParseAddr("10.66.0.99"), Denied: 9}}
	// What the kernel remembers from before was told then.
	before := nft.Attempt{From: phone, To: nas, Proto: 6, Port: 22, Packets: 8}
	r.denied = []nft.Attempt{before}
	r.fails = func(what string) error {
		if what != "open device" { // the rules are open
			return nil
		}
		r.denied = []nft.Attempt{{From: phone, To: nas, Proto: 6, Port: 631, Packets: 3, Ago: time.Minute}, {From: phone, To: nas, Proto: 1, Packets: 1}, before}
		return nil
	}
	r.granted = []nft.Attempt{{From: phone, To: netip.MustParseAddr("10.43.0.9"), Proto: 6, Port: 443, Packets: 7}}
	if _, _, err := r.turn(); err != nil {
		t.Fatal(err)
	}
	if log := r.logs.String(); strings.Count(log, "access denied") != 2 || !strings.Contains(log, "peer=alice to=192.168.7.9 protocol=tcp port=631") || !strings.Contains(log, "missing.psk") {
		t.Errorf("logged %s", log)
	}
	if r.turn(); strings.Contains(r.logs.String(), "denied") || strings.Contains(r.logs.String(), "missing.psk") {
		t.Errorf("said twice: %s", r.logs)
	}
	// Counters of the kernel that begin anew.
	r.counts = []nft.SourceCount{{Addr: phone, Granted: 2, Denied: 4}}
	r.denied[0].Packets = 5
	report := r.g.Report()
	text, err := json.Marshal(report)
	if err != nil {
		t.Fatal(err)
	}
	states := map[string]string{}
	for _, p := range report.Peers {
		states[string(p.Name)] = fmt.Sprintf("%s %d %s", p.State, p.Denied, p.Endpoint)
	}
	if want := map[string]string{"alice": "live 4 203.0.113.7:1234", "bob": "disabled 0 ", "carol": "unready 0 "}; !cmp.Equal(states, want) {
		t.Errorf("the peers are %v, want %v", states, want)
	}
	if len(report.Denied) != 3 || report.Denied[1].Peer != "alice" || report.Denied[0].Protocol != "icmp" {
		t.Errorf("denied are %+v", report.Denied)
	}
	secret, err := os.ReadFile(filepath.Join(dirs[t], "key"))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), strings.TrimSpace(string(secret))) {
		t.Error("the status tells the private key")
	}
	got := r.metrics()
	for name, want := range map[string]string{
		`edgeward_vpn_up`:                                                                      "1",
		`edgeward_vpn_mode{mode="userspace"}`:                                                  "1",
		`edgeward_vpn_mode{mode="kernel"}`:                                                     "0",
		`edgeward_vpn_peers{state="live"}`:                                                     "1",
		`edgeward_vpn_peers{state="unready"}`:                                                  "1",
		`edgeward_vpn_peer_up{peer="alice"}`:                                                   "1",
		`edgeward_vpn_peer_received_bytes_total{peer="alice"}`:                                 "100",
		`edgeward_vpn_peer_sent_bytes_total{peer="alice"}`:                                     "200",
		`edgeward_vpn_peer_granted_packets_total{peer="alice"}`:                                "9",
		`edgeward_vpn_peer_denied_packets_total{peer="alice"}`:                                 "4",
		`edgeward_vpn_peer_handshake_timestamp_seconds{peer="alice"}`:                          fmt.Sprint(float64(r.at.Add(-time.Minute).Unix())),
		`edgeward_vpn_service_packets_total{peer="alice",service="none",verdict="denied"}`:     "14",
		`edgeward_vpn_service_packets_total{peer="alice",service="grafana",verdict="granted"}`: "7",
		`edgeward_vpn_packets_total{verdict="forged"}`:                                         "1",
		`edgeward_vpn_names_questions_total{outcome="declared"}`:                               "0",
	} {
		if got[name] != want {
			t.Errorf("%s is %s, want %s", name, got[name], want)
		}
	}
	for name := range got {
		for _, forbidden := range []string{"10.66.", "203.0.", alice.String()} {
			if strings.Contains(name, forbidden) {
				t.Errorf("a label tells %s: %s", forbidden, name)
			}
		}
	}
	r.declare(declared(peer("bob", "")))
	if _, _, err := r.turn(); err != nil {
		t.Fatal(err)
	}
	for name := range r.metrics() {
		if strings.Contains(name, "alice") {
			t.Errorf("who is gone is a label still: %s", name)
		}
	}
}

// TestWishes pins what device, rules and resolver are told.
func TestWishes(t *testing.T) {
	r := newRig(t, strings.NewReplacer("addresses: [192.168.7.9]", "addresses: [10.66.0.200], targets: [192.168.7.9]", "[192.0.2.53]", "[192.0.2.53, 192.168.99.53]").Replace(
		declared(peer("alice", ", groups: [family], allowedIPs: [192.168.99.0/24]"))))
	if _, _, err := r.turn(); err != nil {
		t.Fatal(err)
	}
	want := r.g.Desired()
	if a := accessOf(want, want.Access, nil); slices.ContainsFunc(a.Everyone, func(e nft.Reach) bool { return e.Proto != nft.Echo }) {
		t.Errorf("without a resolver the rules are %+v", a.Everyone)
	}
	a := accessOf(want, want.Access, []netip.AddrPort{netip.MustParseAddrPort("10.66.0.1:51853"), netip.MustParseAddrPort("[fd66::1]:51853")})
	prefix := netip.MustParsePrefix
	group := a.Groups[0].Name
	if diff := cmp.Diff(nft.Access{
		Interface: "edgeward0",
		Networks:  []netip.Prefix{prefix("10.66.0.0/24"), prefix("fd66::/64"), prefix("192.168.99.0/24")},
		Sources:   []nft.Source{{Prefix: prefix("10.66.0.10/32"), Group: group}, {Prefix: prefix("192.168.99.0/24"), Group: group}, {Prefix: netip.PrefixFrom(want.Peers[0].Addresses[1], 128), Group: group}},
		Groups:    []nft.Group{{Name: group, Reach: []nft.Reach{{To: prefix("10.43.0.9/32"), Proto: nft.TCP, First: 443, Last: 443}}}},
		Everyone: []nft.Reach{
			{To: prefix("10.66.0.1/32"), Proto: nft.Echo}, {To: prefix("10.66.0.1/32"), Proto: nft.TCP, First: 53, Last: 53}, {To: prefix("10.66.0.1/32"), Proto: nft.UDP, First: 53, Last: 53},
			{To: prefix("fd66::1/128"), Proto: nft.Echo}, {To: prefix("fd66::1/128"), Proto: nft.TCP, First: 53, Last: 53}, {To: prefix("fd66::1/128"), Proto: nft.UDP, First: 53, Last: 53},
		},
		Outward: []nft.Flow{
			{From: prefix("10.66.0.1/32"), Reach: nft.Reach{To: prefix("192.168.99.53/32"), Proto: nft.TCP, First: 53, Last: 53}},
			{From: prefix("10.66.0.1/32"), Reach: nft.Reach{To: prefix("192.168.99.53/32"), Proto: nft.UDP, First: 53, Last: 53}},
		},
		Translate: []nft.Translation{
			{At: netip.MustParseAddr("10.66.0.1"), Proto: nft.TCP, First: 53, Last: 53, To: netip.MustParseAddr("10.66.0.1"), Port: namesPort},
			{At: netip.MustParseAddr("10.66.0.1"), Proto: nft.UDP, First: 53, Last: 53, To: netip.MustParseAddr("10.66.0.1"), Port: namesPort},
			{At: netip.MustParseAddr("fd66::1"), Proto: nft.TCP, First: 53, Last: 53, To: netip.MustParseAddr("fd66::1"), Port: namesPort},
			{At: netip.MustParseAddr("fd66::1"), Proto: nft.UDP, First: 53, Last: 53, To: netip.MustParseAddr("fd66::1"), Port: namesPort},
			{At: netip.MustParseAddr("10.66.0.200"), Proto: nft.TCP, First: 631, Last: 631, To: netip.MustParseAddr("192.168.7.9")},
			{At: netip.MustParseAddr("10.66.0.200"), Proto: nft.UDP, First: 9000, Last: 9100, To: netip.MustParseAddr("192.168.7.9")},
		},
	}, a, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("the rules (-want +got):\n%s", diff)
	}
	c := namesOf(want)
	if len(c.Listen) != 2 || c.Listen[0] != netip.MustParseAddrPort("10.66.0.1:51853") || len(c.Hosts["grafana.home.example.com"]) != 1 || !slices.Equal(c.Zones, []string{"home.example.com"}) || len(c.Peers) != 3 || len(c.Upstreams) != 2 {
		t.Errorf("the resolver is told %+v", c)
	}
}

// TestMachineServers holds that the machine's DNS servers stand in for upstreams that
// nobody declared, which log and status tell.
func TestMachineServers(t *testing.T) {
	declaration := strings.Replace(declared(peer("alice", ", groups: [family]")), "upstreams: [192.0.2.53], ", "", 1)
	r := newRig(t, declaration)
	r.g.resolvConf = filepath.Join(dirs[t], "resolv.conf")
	turn := func(servers string) (string, NamesReport) {
		t.Helper()
		if err := os.WriteFile(r.g.resolvConf, []byte(servers), 0o600); err != nil {
			t.Fatal(err)
		}
		r.logs.Reset()
		r.at = r.at.Add(interval)
		if _, _, err := r.turn(); err != nil {
			t.Fatal(err)
		}
		return r.logs.String(), r.g.Report().Names
	}
	for _, tt := range []struct{ servers, said, asked string }{
		{"nameserver 192.0.2.1\nnameserver 10.66.0.9\n", "servers=[192.0.2.1:53]", "[192.0.2.1:53]"},
		{"nameserver 192.0.2.1\n", "", "[192.0.2.1:53]"},
		{"nameserver 192.0.2.2\n", "servers=[192.0.2.2:53]", "[192.0.2.2:53]"},
		{"nameserver 10.66.0.9\n", "has no DNS server that can be asked", "[]"},
	} {
		log, names := turn(tt.servers)
		if said := strings.Contains(log, "names.upstreams"); said != (tt.said != "") || !strings.Contains(log, tt.said) {
			t.Errorf("%q: logged %s", tt.servers, log)
		}
		if fmt.Sprint(names.Upstreams) != tt.asked || names.Machine != (tt.asked != "[]") {
			t.Errorf("%q: status %+v", tt.servers, names)
		}
	}
	r.declare(declared(peer("alice", ", groups: [family]")))
	if _, names := turn("nameserver 192.0.2.1\n"); names.Machine || fmt.Sprint(names.Upstreams) != "[192.0.2.53:53]" {
		t.Errorf("with upstreams declared: %+v", names)
	}
}

// TestNeverWider declares at random, with failures at random, and has every step
// judged: no key may ever reach what neither the last thing enforced nor
// anything declared since lets it.
func TestNeverWider(t *testing.T) {
	for seed := range uint64(12) {
		random := rand.New(rand.NewPCG(seed, 1))
		r := newRig(t, declared())
		r.g.options.StateDir = "" // addresses are declared, and disks are slow
		type right struct {
			key device.Key
			to  nft.Reach
		}
		may := map[right]bool{} // by what was declared since the last good turn
		rightsOf := func(peers map[device.Key][]netip.Prefix, a nft.Access) map[right]bool {
			reach := map[string][]nft.Reach{}
			for _, g := range a.Groups {
				reach[g.Name] = g.Reach
			}
			out := map[right]bool{}
			for k, ips := range peers {
				for _, s := range a.Sources {
					if !slices.Contains(ips, s.Prefix) {
						continue
					}
					for _, to := range reach[s.Group] {
						out[right{k, to}] = true
					}
				}
			}
			return out
		}
		promise := func() map[right]bool {
			want := r.g.wish
			assigned, _, err := (&wireguard.Leases{ByName: maps.Clone(r.g.leases.ByName)}).Assign(&want.config, r.at)
			if err != nil {
				t.Fatal(err)
			}
			d := wireguard.Compile(&want.config, assigned, want.secrets, r.at)
			c := deviceOf(d)
			peers := map[device.Key][]netip.Prefix{}
			for _, p := range c.Peers {
				peers[p.PublicKey] = p.AllowedIPs
			}
			return rightsOf(peers, accessOf(d, d.Access, nil))
		}
		r.watch = func() {
			for got := range rightsOf(r.peers, r.rules) {
				if !may[got] {
					t.Fatalf("seed %d: %s reaches %+v, which nobody declared; %v", seed, got.key, got.to, r.trace)
				}
			}
		}
		if seed%2 == 1 { // an earlier process left a device, of which nothing was declared
			for i, c := range []byte("zbn") {
				var k device.Key
				k[0], k[31] = c, 1
				r.peers[k] = []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 66, 0, byte(10 + i)}), 32)}
			}
		}
		refuse := errors.New("refused at random")
		for range 30 {
			var peers []string
			addresses := random.Perm(5)
			for i, name := range []string{"alice", "bob", "carol", "dora"} {
				if random.IntN(3) == 0 {
					continue
				}
				rest := ""
				if random.IntN(2) == 0 {
					rest += ", groups: [family]"
				}
				if random.IntN(4) == 0 {
					rest += ", allowedIPs: [192.168.99.0/24]"
					if strings.Contains(strings.Join(peers, ""), "192.168.99.0") {
						rest = ""
					}
				}
				k := key(byte('a' + i))
				if random.IntN(3) == 0 {
					k = key(byte('m' + i))
				}
				peers = append(peers, fmt.Sprintf("  - {name: %s, publicKey: '%s', addresses: [10.66.0.%d, 'fd66::%d']%s}\n", name, k, 10+addresses[i], 10+addresses[i], rest))
			}
			r.declare(declared(peers...))
			for right := range promise() {
				may[right] = true
			}
			r.fails = func(string) error {
				if random.IntN(6) == 0 {
					return refuse
				}
				return nil
			}
			if random.IntN(4) == 0 {
				r.at = r.at.Add(interval)
			}
			if _, _, err := r.turn(); err == nil {
				may = promise()
				if !maps.Equal(may, rightsOf(r.peers, r.rules)) {
					t.Fatalf("seed %d: after a good turn the rights are %v, want %v", seed, rightsOf(r.peers, r.rules), may)
				}
			} else if !errors.Is(err, refuse) {
				t.Fatal(err)
			}
		}
	}
}

// TestRunEnds has the gateway end: the device is let go of, the rules stay.
func TestRunEnds(t *testing.T) {
	r := newRig(t, declared(peer("alice", "")))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.g.Run(ctx) }()
	for end := time.Now().Add(10 * time.Second); r.g.Ready() != nil; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(r.g.Ready())
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if r.trace[len(r.trace)-1] != "close device" || len(r.rules.Sources) == 0 {
		t.Errorf("it did %v", r.trace)
	}
}

// TestLeases keeps addresses over a restart, and enforces what it cannot write
// down.
func TestLeases(t *testing.T) {
	r := newRig(t, head+"peers: [{name: alice, publicKey: '"+key('a')+"'}]\n")
	if _, _, err := r.turn(); err != nil {
		t.Fatal(err)
	}
	was := r.g.Desired().Peers[0].Addresses
	path := wireguard.LeasesPath(dirs[t])
	text, err := os.ReadFile(path)
	if err != nil || !strings.Contains(string(text), was[0].String()) {
		t.Errorf("the leases are %s %v", text, err)
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	r.g.loaded = false
	r.declare(head + "peers: [{name: alice, publicKey: '" + key('a') + "'}]\n")
	if _, _, err := r.turn(); err == nil || !strings.Contains(err.Error(), path) || len(r.peers) != 1 {
		t.Errorf("leases that cannot be read: %v, %d peers", err, len(r.peers))
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(path, "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	r.g.loaded = true
	r.declare(head + "peers: [{name: alice, publicKey: '" + key('a') + "'}, {name: bob, publicKey: '" + key('b') + "'}]\n")
	if _, next, err := r.turn(); err != nil || !next.Equal(r.at.Add(again)) || len(r.peers) != 2 || !strings.Contains(r.g.Problem(), "write leases") || !strings.Contains(r.logs.String(), "write leases") {
		t.Errorf("leases that cannot be written: next %v, %v, %d peers, %q", next, err, len(r.peers), r.g.Problem())
	}
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	if _, next, err := r.turn(); err != nil || !next.IsZero() || r.g.Problem() != "" {
		t.Error(next, err, r.g.Problem())
	}
}

// BenchmarkTurn is all but the kernel's part of a turn: with nothing new, when
// others changed rules, and with one peer that goes and comes again.
func BenchmarkTurn(b *testing.B) {
	for _, n := range []int{1000, 10000} {
		r := newRig(b, declared())
		r.g.options.StateDir = ""
		c := parse(b, strings.Replace(declared(), "10.66.0.1/24", "10.66.0.1/16", 1))
		for i := range n {
			var k wireguard.PublicKey
			k[0], k[1], k[2], k[31] = byte(i), byte(i>>8), 1, 1
			c.Peers = append(c.Peers, wireguard.Peer{
				Name: wireguard.Name(fmt.Sprintf("p%d", i)), PublicKey: k, Groups: []wireguard.Name{"family"}, Enabled: true,
				Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 66, byte(1 + i>>8), byte(i)}), netip.MustParseAddr(fmt.Sprintf("fd66::1:%x", i+1))},
			})
		}
		turn := func(c wireguard.Config) {
			if err := r.g.Apply(c); err != nil {
				b.Fatal(err)
			}
			r.g.demand.Store(false)
			if _, _, err := r.turn(); err != nil {
				b.Fatal(err)
			}
		}
		turn(c)
		b.Run(fmt.Sprintf("same/%d", n), func(b *testing.B) {
			for b.Loop() {
				if _, _, err := r.turn(); err != nil {
					b.Fatal(err)
				}
			}
		})
		less := c
		less.Peers = c.Peers[:n-1]
		b.Run(fmt.Sprintf("one/%d", n), func(b *testing.B) {
			for b.Loop() {
				turn(less)
				turn(c)
			}
		})
	}
}

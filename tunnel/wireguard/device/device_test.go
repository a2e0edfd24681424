package device

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// worlds are where a device may be: the same is expected of both.
var worlds = map[string]func(testing.TB, Options) *Device{
	"kernel": func(t testing.TB, o Options) *Device {
		return openFake(t, newFakeKernel(t), o)
	},
	"userspace": func(t testing.TB, o Options) *Device {
		o.Mode = Userspace
		return mustOpen(t, o)
	},
}

func openFake(t testing.TB, k *fakeKernel, o Options) *Device {
	t.Helper()
	o.Name = "edgeward0"
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	d, err := open(context.Background(), o, k.seams())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

func TestReconcile(t *testing.T) {
	const others = 3
	tests := []struct {
		name   string
		before func(*Config) // of what is there first
		change func(*Config)
		want   []string // lines; peers are called p0, p1 …
		lost   []int    // peers that lose their session, by their numbers in the first configuration
	}{
		{name: "nothing", change: func(c *Config) {}},
		{name: "another order, host bits, twice the same", change: func(c *Config) {
			slices.Reverse(c.Peers)
			slices.Reverse(c.Addresses)
			c.Peers[0].AllowedIPs = append(prefixes("10.70.7.7/24", "10.70.7.8/24"), c.Peers[0].AllowedIPs...)
		}, before: func(c *Config) { c.Peers[2].AllowedIPs = append(c.Peers[2].AllowedIPs, prefixes("10.70.7.0/24")...) }},
		{name: "a peer comes", change: func(c *Config) {
			p := somePeer(90)
			p.Name = "p90"
			c.Peers = append(c.Peers, p)
		}, want: []string{"peer p90 added"}},
		{name: "a peer goes", change: func(c *Config) { c.Peers = c.Peers[1:] },
			want: []string{"peer p0 removed"}, lost: []int{0}},
		{name: "all peers go", change: func(c *Config) { c.Peers = nil },
			want: []string{"peer p0 removed", "peer p1 removed", "peer p2 removed"}, lost: []int{0, 1, 2}},
		{name: "a peer has a new key", change: func(c *Config) { c.Peers[1].PublicKey = secret().Public() },
			want: []string{"peer p1 removed", "peer p1 added"}, lost: []int{1}},
		{name: "a peer has a new preshared key", change: func(c *Config) { c.Peers[1].PresharedKey = secret() },
			want: []string{"peer p1 changed: preshared key"}},
		{name: "a peer has no preshared key any more", change: func(c *Config) { c.Peers[1].PresharedKey = Secret{} },
			want: []string{"peer p1 changed: preshared key"}},
		{name: "keepalive", change: func(c *Config) { c.Peers[0].Keepalive = 25 * time.Second },
			want: []string{"peer p0 changed: keepalive 25s"}},
		{name: "no keepalive any more", before: func(c *Config) { c.Peers[0].Keepalive = 25 * time.Second },
			change: func(c *Config) { c.Peers[0].Keepalive = 0 },
			want:   []string{"peer p0 changed: keepalive 0s"}},
		{name: "a network behind a peer", change: func(c *Config) {
			c.Peers[0].AllowedIPs = append(slices.Clone(c.Peers[0].AllowedIPs), prefixes("192.168.7.0/24", "fd77::/64")...)
			c.Routes = prefixes("192.168.7.0/24", "fd77::/64")
		}, want: []string{"route 192.168.7.0/24 added", "route fd77::/64 added", "peer p0 changed: +192.168.7.0/24, +fd77::/64"}},
		{name: "no network behind a peer any more", before: func(c *Config) {
			c.Peers[0].AllowedIPs = append(slices.Clone(c.Peers[0].AllowedIPs), prefixes("192.168.7.0/24")...)
			c.Routes = prefixes("192.168.7.0/24")
		}, change: func(c *Config) {
			c.Peers[0].AllowedIPs, c.Routes = c.Peers[0].AllowedIPs[:2], nil
		}, want: []string{"route 192.168.7.0/24 removed", "peer p0 changed: -192.168.7.0/24"}},
		{name: "two peers exchange their addresses", change: func(c *Config) {
			c.Peers[0].AllowedIPs, c.Peers[1].AllowedIPs = c.Peers[1].AllowedIPs, c.Peers[0].AllowedIPs
		}, want: []string{
			"peer p0 changed: +10.66.0.101/32, +fd66::65/128, -10.66.0.100/32, -fd66::64/128",
			"peer p1 changed: +10.66.0.100/32, +fd66::64/128, -10.66.0.101/32, -fd66::65/128",
		}},
		{name: "a new peer has the addresses of one that goes", change: func(c *Config) {
			c.Peers[2].Name, c.Peers[2].PublicKey = "p90", secret().Public()
		}, want: []string{"peer p2 removed", "peer p90 added"}, lost: []int{2}},
		{name: "an endpoint of a peer that has been heard of", change: func(c *Config) {
			c.Peers[0].Endpoint = netip.MustParseAddrPort("192.0.2.99:1")
		}},
		{name: "the MTU", change: func(c *Config) { c.MTU = 1380 }, want: []string{"MTU 1380"}},
		{name: "an address more", change: func(c *Config) { c.Addresses = append(c.Addresses, prefixes("10.67.0.1/24")...) },
			want: []string{"address 10.67.0.1/24 added"}},
		{name: "an address less", change: func(c *Config) { c.Addresses = c.Addresses[:1] },
			want: []string{"address fd66::1/64 removed"}},
		{name: "a wider network", change: func(c *Config) {
			c.Addresses = prefixes("10.66.0.1/15", "fd66::1/48")
		}, want: []string{"address 10.66.0.1/15 added", "address fd66::1/48 added", "address 10.66.0.1/16 removed", "address fd66::1/64 removed"}},
		{name: "other networks altogether", change: func(c *Config) {
			c.Addresses = prefixes("10.99.0.1/24", "10.99.0.2/24", "fd99::1/64")
		}, want: []string{"address 10.99.0.1/24 added", "address 10.99.0.2/24 added", "address fd99::1/64 added", "address 10.66.0.1/16 removed", "address fd66::1/64 removed"}},
		{name: "a private key with bits that the curve ignores", change: func(c *Config) {
			c.PrivateKey[0] |= 7
			c.PrivateKey[31] |= 128
		}},
		{name: "another private key", change: func(c *Config) { c.PrivateKey = secret() },
			want: []string{"private key changed"}, lost: []int{0, 1, 2}},
		{name: "another port and a peer that goes", change: func(c *Config) {
			c.ListenPort = 51999
			c.Peers = c.Peers[:2]
		}, want: []string{"listen port 51999", "peer p2 removed"}, lost: []int{2}},
		{name: "a key is staged", change: func(c *Config) {
			c.Peers[0].Next, c.Peers[0].NextPresharedKey = secret().Public(), secret()
		}, want: []string{"peer p0 added"}},
		{name: "more peers than fit a message of netlink", change: func(c *Config) {
			for i := range 40 {
				p := somePeer(100 + i)
				p.Name = fmt.Sprintf("p1%02d", i)
				c.Peers = append(c.Peers, p)
			}
		}, want: func() (all []string) {
			for i := range 40 {
				all = append(all, fmt.Sprintf("peer p1%02d added", i))
			}
			return all
		}()},
		{name: "more networks than fit a message of netlink", change: func(c *Config) {
			for i := range 300 {
				c.Peers[0].AllowedIPs = append(c.Peers[0].AllowedIPs, netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 16 + byte(i>>8), byte(i), 0}), 24))
			}
		}, want: []string{"peer p0 changed: " + func() string {
			var all []string
			for i := range 300 {
				all = append(all, fmt.Sprintf("+172.%d.%d.0/24", 16+i>>8, i&255))
			}
			return strings.Join(all, ", ")
		}()}},
	}
	for world, opened := range worlds {
		for _, tt := range tests {
			t.Run(world+"/"+tt.name, func(t *testing.T) {
				first := basics(t, others)
				for i := range first.Peers {
					first.Peers[i].Name = fmt.Sprintf("p%d", i)
				}
				if tt.before != nil {
					tt.before(&first)
				}
				d := opened(t, Options{Want: first})
				mustReconcile(t, d, first)
				// An endpoint goes with the session: it stands for it.
				for i, p := range first.Peers {
					at := &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1).To4(), Port: 1000 + i}
					if err := d.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: wgtypes.Key(p.PublicKey), UpdateOnly: true, Endpoint: at}}}); err != nil {
						t.Fatal(err)
					}
				}
				before := sessions(t, d)

				second := first
				second.Peers, second.Addresses = slices.Clone(first.Peers), slices.Clone(first.Addresses)
				tt.change(&second)
				c := mustReconcile(t, d, second)
				if diff := cmp.Diff(tt.want, c.Lines()); diff != "" {
					t.Errorf("changes (-want +got):\n%s", diff)
				}
				if c := mustReconcile(t, d, second); !c.Empty() {
					t.Errorf("a second turn still changes: %v", c)
				}
				after := sessions(t, d)
				for i, p := range first.Peers {
					if kept := after[p.PublicKey] == before[p.PublicKey]; kept == slices.Contains(tt.lost, i) {
						t.Errorf("session of %s: %q, then %q", p.Name, before[p.PublicKey], after[p.PublicKey])
					}
				}
				// What the other side says, in its own words.
				judge(t, d, second)
			})
		}
	}
}

// sessions tells the sessions of peers apart.
func sessions(t *testing.T, d *Device) map[Key]string {
	t.Helper()
	have, err := d.Have()
	if err != nil {
		t.Fatal(err)
	}
	all := map[Key]string{}
	for _, p := range have.Peers {
		all[p.PublicKey] = p.Endpoint.String()
		if k, fake := d.seams.kind.(*fakeKernel); fake {
			all[p.PublicKey] += fmt.Sprint(" ", k.sessionOf(d.options.Name, p.PublicKey))
		} else if p.Endpoint.IsValid() {
			all[p.PublicKey] += " " + have.PrivateKey.Public().String() // another key ends sessions
		}
	}
	return all
}

// judge compares a device, as its own interface and ip(8) tell it, with a wish.
func judge(t *testing.T, d *Device, want Config) {
	t.Helper()
	read, err := d.client.Device(d.options.Name)
	if err != nil {
		t.Fatal(err)
	}
	if read.ListenPort != int(want.ListenPort) || Secret(read.PrivateKey) != want.PrivateKey.clamped() {
		t.Errorf("the device has port %d", read.ListenPort)
	}
	wanted := map[string]string{}
	describe := func(psk wgtypes.Key, keepalive time.Duration, ips []netip.Prefix) string {
		return fmt.Sprint(psk.String(), keepalive, canonical(ips))
	}
	for _, p := range want.Peers {
		wanted[p.PublicKey.String()] = describe(wgtypes.Key(p.PresharedKey), p.Keepalive, p.AllowedIPs)
		if p.Next != (Key{}) {
			wanted[p.Next.String()] = describe(wgtypes.Key(p.NextPresharedKey), 0, nil)
		}
	}
	got := map[string]string{}
	for _, p := range read.Peers {
		var ips []netip.Prefix
		for _, ip := range p.AllowedIPs {
			ips = append(ips, netip.MustParsePrefix(ip.String()))
		}
		got[p.PublicKey.String()] = describe(p.PresharedKey, p.PersistentKeepaliveInterval, ips)
	}
	if diff := cmp.Diff(wanted, got); diff != "" {
		t.Errorf("peers (-want +got):\n%s", diff)
	}
	out, err := exec.Command("ip", "-o", "address", "show", "dev", d.options.Name).Output()
	if err != nil {
		t.Fatal(err)
	}
	var addresses []netip.Prefix
	for line := range strings.Lines(string(out)) {
		if fields := strings.Fields(line); !strings.HasPrefix(fields[3], "fe80") {
			addresses = append(addresses, netip.MustParsePrefix(fields[3]))
		}
	}
	if diff := cmp.Diff(fmt.Sprint(ordered(want.Addresses)), fmt.Sprint(ordered(addresses))); diff != "" {
		t.Errorf("addresses (-want +got):\n%s", diff)
	}
}

// What is random must come out as it is wished, from wherever it began, and in one
// turn.
func TestReconcileAny(t *testing.T) {
	for world, opened := range worlds {
		t.Run(world, func(t *testing.T) {
			random := rand.New(rand.NewPCG(1, 2))
			base := basics(t, 0)
			var pool []Peer
			for i := range 12 {
				pool = append(pool, somePeer(i))
			}
			networks := prefixes("10.70.0.0/24", "10.71.0.0/24", "fd70::/64", "10.66.9.9/32")
			some := func() Config {
				c := base
				c.MTU = 1280 + random.IntN(3)*70
				c.Addresses = base.Addresses[:1+random.IntN(2)]
				c.Routes = networks[:random.IntN(3)]
				for _, i := range random.Perm(len(pool))[:random.IntN(len(pool))] {
					p := pool[i]
					p.AllowedIPs = p.AllowedIPs[:random.IntN(3)]
					if random.IntN(3) == 0 {
						p.PresharedKey = Secret{1}
					}
					p.Keepalive = time.Duration(random.IntN(2)) * 10 * time.Second
					c.Peers = append(c.Peers, p)
				}
				if len(c.Peers) > 0 {
					for _, n := range networks {
						p := &c.Peers[random.IntN(len(c.Peers))]
						p.AllowedIPs = append(slices.Clone(p.AllowedIPs), n)
					}
				}
				return c
			}
			d := opened(t, Options{Want: base})
			for range 40 {
				want := some()
				mustReconcile(t, d, want)
				if c := mustReconcile(t, d, want); !c.Empty() {
					t.Fatalf("a second turn still changes: %v", c)
				}
				judge(t, d, want)
			}
		})
	}
}

// One peer's event needs no reading, and comes out as a whole turn would.
func TestOnePeer(t *testing.T) {
	for world, opened := range worlds {
		t.Run(world, func(t *testing.T) {
			want := basics(t, 3)
			d := opened(t, Options{Want: want})
			mustReconcile(t, d, want)
			upsert := func(p Peer) {
				t.Helper()
				if err := d.Upsert(p); err != nil {
					t.Fatal(err)
				}
				if c := mustReconcile(t, d, want); !c.Empty() {
					t.Errorf("a turn after it changes: %v", c)
				}
			}
			p := somePeer(9)
			want.Peers = append(want.Peers, p)
			upsert(p)
			want.Peers[0].AllowedIPs = want.Peers[0].AllowedIPs[:1]
			want.Peers[0].PresharedKey = Secret{}
			upsert(want.Peers[0])
			want.Peers[1].Next, want.Peers[1].NextPresharedKey = secret().Public(), secret()
			upsert(want.Peers[1])

			for _, p := range []Peer{want.Peers[1], somePeer(77)} { // one with a staged key, one that is not there
				if err := d.Remove(p.PublicKey); err != nil {
					t.Fatal(err)
				}
			}
			want.Peers = slices.Delete(want.Peers, 1, 2)
			if c := mustReconcile(t, d, want); !c.Empty() {
				t.Errorf("a turn after it changes: %v", c)
			}
			judge(t, d, want)
			if err := d.Upsert(Peer{Name: "nobody"}); err == nil {
				t.Error("a peer without a key was taken")
			}
		})
	}
}

// In the kernel, a failure in the middle leaves what was before it; what has to go
// goes first; the next turn finishes.
func TestKernelRefuses(t *testing.T) {
	k := newFakeKernel(t)
	want := basics(t, 100)
	d := openFake(t, k, Options{Want: want})
	mustReconcile(t, d, want)

	before := want
	want.Peers = slices.Clone(want.Peers[40:])
	for i := range 50 {
		want.Peers[i].PresharedKey = secret()
	}
	k.messages = nil
	k.refuse = func(n int, m wgtypes.Config) error {
		if m.PrivateKey != nil || m.ListenPort != nil {
			t.Error("a message says a key or a port that has not changed")
		}
		if n == 60 {
			return unix.EINVAL
		}
		return nil
	}
	if _, err := d.Reconcile(want); err == nil || !strings.Contains(err.Error(), "invalid argument") {
		t.Fatalf("the refusal is reported as: %v", err)
	}
	have, err := d.Have()
	if err != nil {
		t.Fatal(err)
	}
	left := map[Key]bool{}
	for _, p := range have.Peers {
		left[p.PublicKey] = true
	}
	for _, p := range before.Peers[:40] {
		if left[p.PublicKey] {
			t.Errorf("%s is still there, which was to go", p.Name)
		}
	}
	k.refuse = nil
	if c := mustReconcile(t, d, want); len(c.Update) != 30 || len(c.Remove)+len(c.Add) != 0 {
		t.Errorf("the next turn does: %v", c)
	}

	// A port that the kernel refuses keeps nobody on the device.
	want.Peers = want.Peers[1:]
	want.ListenPort++
	k.refuse = func(_ int, m wgtypes.Config) error {
		if m.ListenPort != nil {
			return unix.EADDRINUSE
		}
		return nil
	}
	if _, err := d.Reconcile(want); err == nil || !strings.Contains(err.Error(), "is taken by") {
		t.Errorf("a port that is in use: %v", err)
	}
	if have, err = d.Have(); err != nil || len(have.Peers) != len(want.Peers) || have.ListenPort != want.ListenPort-1 {
		t.Errorf("then it has %d peers and port %d: %v", len(have.Peers), have.ListenPort, err)
	}
	for _, errno := range []error{unix.EPERM, unix.ENOBUFS} {
		k.refuse = func(int, wgtypes.Config) error { return errno }
		if err := d.Upsert(want.Peers[0]); err == nil {
			t.Errorf("%v is not reported", errno)
		}
	}
}

// In the kernel, too, a peer that is back soon is called.
func TestKernelCalls(t *testing.T) {
	k := newFakeKernel(t)
	want := basics(t, 3)
	d := openFake(t, k, Options{Want: want})
	mustReconcile(t, d, want)
	for _, p := range want.Peers[:2] {
		if err := k.handshake("edgeward0", p.PublicKey, time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := d.Have(); err != nil {
		t.Fatal(err)
	}
	without := want
	without.Peers = nil
	mustReconcile(t, d, without)
	if err := d.Upsert(want.Peers[0]); err != nil {
		t.Fatal(err)
	}
	mustReconcile(t, d, want)
	for i, calls := range []int{1, 1, 0} { // the last has never been heard of
		at := slices.IndexFunc(k.devices["edgeward0"].peers, func(f *fakePeer) bool { return Key(f.PublicKey) == want.Peers[i].PublicKey })
		f := k.devices["edgeward0"].peers[at]
		if f.called != calls || (f.Endpoint != nil) != (calls > 0) || f.PersistentKeepaliveInterval != 0 {
			t.Errorf("peer %d was called %d times, want %d: %+v", i, f.called, calls, f)
		}
	}
	if c := mustReconcile(t, d, want); !c.Empty() {
		t.Errorf("a turn after it changes: %v", c)
	}
}

// In the kernel the interface outlives the process, with its sessions and its
// counters; cleanup removes it, and not one of somebody else's.
func TestKernelStays(t *testing.T) {
	k, dir := newFakeKernel(t), t.TempDir()
	want := basics(t, 40)
	d := openFake(t, k, Options{Want: want, StateDir: dir})
	mustReconcile(t, d, want)
	session := k.sessionOf("edgeward0", want.Peers[0].PublicKey)
	if err := k.handshake("edgeward0", want.Peers[0].PublicKey, time.Now()); err != nil {
		t.Fatal(err)
	}
	k.devices["edgeward0"].peers[0].ReceiveBytes = 1000
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	k.devices["edgeward0"].peers[0].ReceiveBytes = 1500

	d = openFake(t, k, Options{Want: want, StateDir: dir})
	if c := mustReconcile(t, d, want); !c.Empty() {
		t.Errorf("a restart changes: %v", c)
	}
	if k.sessionOf("edgeward0", want.Peers[0].PublicKey) != session {
		t.Error("a restart ended a session")
	}
	all, err := d.Peers()
	if err != nil || len(all) != 40 || all[0].Received != 1500 || all[0].Name != want.Peers[0].Name {
		t.Errorf("after a restart: %+v: %v", all[0], err)
	}
	_ = d.Close()

	other := want
	other.PrivateKey = secret()
	open2 := func(o Options) error {
		o.Name, o.Log = "edgeward0", slog.New(slog.DiscardHandler)
		d, err := open(context.Background(), o, k.seams())
		if err == nil {
			_ = d.Close()
		}
		return err
	}
	if err := open2(Options{Want: want, Mode: Userspace}); err == nil || !strings.Contains(err.Error(), "edgeward-tunnel cleanup") {
		t.Errorf("from the kernel to userspace: %v", err)
	}
	if err := open2(Options{Want: other}); err != nil {
		t.Errorf("our own with another private key: %v", err)
	}
	if out, err := exec.Command("ip", "link", "set", "edgeward0", "alias", "mine").CombinedOutput(); err != nil {
		t.Fatalf("%s%v", out, err)
	}
	if err := open2(Options{Want: other}); err == nil || !strings.Contains(err.Error(), "did not make") {
		t.Errorf("a stranger's device: %v", err)
	}
	if err := open2(Options{Want: want}); err != nil {
		t.Errorf("a device made by hand for the same gateway: %v", err)
	}
	if err := Cleanup("edgeward0", dir); err != nil {
		t.Fatal(err)
	}
	if link, err := linkByName("edgeward0"); link == nil {
		t.Errorf("cleanup took away what is not ours: %v", err)
	}
	if out, err := exec.Command("ip", "link", "set", "edgeward0", "alias", mark).CombinedOutput(); err != nil {
		t.Fatalf("%s%v", out, err)
	}
	for range 2 {
		if err := Cleanup("edgeward0", dir); err != nil {
			t.Fatal(err)
		}
	}
	if link, err := linkByName("edgeward0"); link != nil || err != nil {
		t.Errorf("after a cleanup the interface is there: %v", err)
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) != 0 {
		t.Errorf("after a cleanup there are %v: %v", files, err)
	}
}

// An interface of ours that an earlier name left is not left alone with its peers.
func TestRenamed(t *testing.T) {
	k, dir := newFakeKernel(t), t.TempDir()
	want := basics(t, 3)
	d := openFake(t, k, Options{Want: want, StateDir: dir})
	mustReconcile(t, d, want)
	if err := k.handshake("edgeward0", want.Peers[0].PublicKey, time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := Leftover("edgeward0"); err != nil {
		t.Errorf("of its own name: %v", err)
	}
	want.Addresses = prefixes("10.67.0.1/24")
	for mode, s := range map[Mode]seams{Kernel: k.seams(), Userspace: machine} {
		_, err := open(context.Background(), Options{Name: "edgeward1", Mode: mode, Want: want, Log: slog.New(slog.DiscardHandler)}, s)
		if err == nil || !strings.Contains(err.Error(), "interface edgeward0 is left from the time when the VPN's had that name") {
			t.Errorf("under another name, mode %s: %v", mode, err)
		}
	}
	if link, _ := linkByName("edgeward1"); link != nil {
		t.Error("an interface was made all the same")
	}
	if err := Cleanup("edgeward1", dir); err != nil {
		t.Fatal(err)
	}
	if link, err := linkByName("edgeward0"); link != nil || err != nil {
		t.Errorf("after a cleanup the interface is there: %v", err)
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) != 0 {
		t.Errorf("after a cleanup there are %v: %v", files, err)
	}
}

// What stands in the way is said before anything is made.
func TestOpenRefuses(t *testing.T) {
	run := func(t *testing.T, args string) {
		t.Helper()
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %s%v", args, out, err)
		}
	}
	undo := func(t *testing.T, args string) { t.Cleanup(func() { run(t, args) }) }
	taken, err := net.ListenUDP("udp", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	tests := []struct {
		name    string
		prepare func(t *testing.T)
		options func(*Options)
		want    string
	}{
		{"no name", nil, func(o *Options) { o.Name = "" }, "no name for an interface"},
		{"a name too long", nil, func(o *Options) { o.Name = "edgeward-wireguard" }, "no name for an interface"},
		{"an unknown mode", nil, func(o *Options) { o.Mode = "fast" }, `"fast" is no mode: choose auto, kernel or userspace`},
		{"the kernel, which has none", nil, func(o *Options) { o.Mode = Kernel }, "the kernel has no WireGuard: load its module on the node, or choose the mode userspace"},
		{"a bridge of that name", func(t *testing.T) { run(t, "link add br7 type bridge"); undo(t, "link del br7") },
			func(o *Options) { o.Name = "br7" }, "interface br7 is there already, a bridge"},
		{"a TUN device of that name", func(t *testing.T) { run(t, "tuntap add dev tun7 mode tun"); undo(t, "link del tun7") },
			func(o *Options) { o.Name = "tun7" }, "a TUN device of another process"},
		{"a port that is taken", nil, func(o *Options) { o.Want.ListenPort = uint16(taken.LocalAddr().(*net.UDPAddr).Port) },
			fmt.Sprintf("is taken by process %d, ", os.Getpid())},
		{"an address in the VPN", func(t *testing.T) {
			run(t, "link add cni0 type bridge")
			undo(t, "link del cni0")
			run(t, "address add 10.66.3.1/24 dev cni0")
			run(t, "link set cni0 up")
		}, nil, "10.66.0.0/16 of the VPN overlaps 10.66.3.1/24, the address of cni0, where the pods of this node are: give the VPN another network"},
		{"a route into the VPN", func(t *testing.T) {
			run(t, "link add d7 type bridge")
			undo(t, "link del d7")
			run(t, "address add 192.0.2.1/24 dev d7")
			run(t, "link set d7 up")
			run(t, "route add 10.66.128.0/17 via 192.0.2.2")
		}, nil, "10.66.0.0/16 of the VPN overlaps 10.66.128.0/17, which this machine reaches through d7"},
		{"a network around the VPN on a link", func(t *testing.T) {
			run(t, "link add d7 type bridge")
			undo(t, "link del d7")
			run(t, "address add fd66::99/48 dev d7")
			run(t, "link set d7 up")
		}, nil, "fd66::/64 of the VPN overlaps fd66::99/48, the address of d7"},
		{"routes that do no harm", func(t *testing.T) {
			run(t, "link add d7 type bridge")
			undo(t, "link del d7")
			run(t, "address add 192.0.2.1/24 dev d7")
			run(t, "link set d7 up")
			run(t, "route add default via 192.0.2.2")
			run(t, "route add 10.0.0.0/8 via 192.0.2.2")
			run(t, "route add blackhole 10.64.0.0/10")
			undo(t, "route del blackhole 10.64.0.0/10")
		}, nil, ""},
		{"a peer twice", nil, func(o *Options) { o.Want.Peers = append(o.Want.Peers, o.Want.Peers[0]) }, "the public key of peer peer-00000 is named twice"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.prepare != nil {
				tt.prepare(t)
			}
			o := Options{Name: "edgeward0", Want: basics(t, 1), Log: slog.New(slog.DiscardHandler)}
			if tt.options != nil {
				tt.options(&o)
			}
			ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
			defer cancel()
			d, err := Open(ctx, o)
			if err == nil {
				_ = d.Close()
			}
			switch {
			case tt.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("error %v, want %s", err, tt.want)
			}
			if link, _ := linkByName("edgeward0"); link != nil {
				t.Error("the interface is there afterwards")
			}
		})
	}
}

// What is taken away from under a device comes back with the next turn.
func TestTakenAway(t *testing.T) {
	want := basics(t, 5)
	m, p := join(t, "alice", want, "10.66.0.2/32", "fd66::2/128")
	want.Peers = append(want.Peers, p)
	var l testLog
	lost := make(chan time.Time, 10)
	d := mustOpen(t, Options{Want: want, Log: l.logger(), Lost: func() { lost <- time.Now() }})
	mustReconcile(t, d, want)
	port := echo(t)
	pings := m.ping("10.66.0.1", port)
	run := func(args string) {
		t.Helper()
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %s%v", args, out, err)
		}
	}
	told := func(what string) {
		t.Helper()
		select {
		case <-lost:
		case <-time.After(time.Second):
			t.Errorf("%s: nobody was told", what)
		}
	}

	const path = socketDir + "/edgeward0.sock"
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v: %v", info.Mode(), err)
	}
	for _, turn := range []func() error{
		func() error { return d.Upsert(want.Peers[0]) },
		func() error { return d.Remove(somePeer(7).PublicKey) },
		func() error { _, err := d.Reconcile(want); return err },
		func() error { _, err := d.Have(); return err },
	} {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if err := turn(); err != nil {
			t.Errorf("after the socket was removed: %v", err)
		}
	}
	other, err := wgctrl.New() // as wg(8) does
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if read, err := other.Device("edgeward0"); err != nil || len(read.Peers) != 6 {
		t.Errorf("another client reads: %+v: %v", read, err)
	}
	if lost, sent, _ := pings.end(); lost > 0 {
		t.Errorf("%d of %d pings were lost meanwhile", lost, sent)
	}

	// A port that is taken is not asked for: the device would be without.
	taken, err := net.ListenUDP("udp", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	changed := want
	changed.ListenPort = uint16(taken.LocalAddr().(*net.UDPAddr).Port)
	changed.Peers = changed.Peers[1:]
	if _, err := d.Reconcile(changed); err == nil || !strings.Contains(err.Error(), "is taken by process") {
		t.Errorf("a port that is taken: %v", err)
	}
	if have, err := d.Have(); err != nil || have.ListenPort != want.ListenPort || len(have.Peers) != len(changed.Peers) {
		t.Errorf("then: port %d, %d peers: %v", have.ListenPort, len(have.Peers), err)
	}
	pings = m.ping("10.66.0.1", port)
	pings.end()

	// The same for an address that another interface gets in the meantime.
	run("address add 10.80.0.1/24 dev lo")
	defer func() { _ = exec.Command("ip", "address", "del", "10.80.0.1/24", "dev", "lo").Run() }()
	changed = want
	changed.Addresses = append(prefixes("10.80.0.9/24"), changed.Addresses...)
	if _, err := d.Reconcile(changed); err == nil || !strings.Contains(err.Error(), "10.80.0.0/24 of the VPN overlaps 10.80.0.1/24, the address of lo") {
		t.Errorf("an address that another has: %v", err)
	}

	if len(lost) > 0 {
		t.Error("an interface is said to be lost that was there all the time")
	}
	run("link set edgeward0 down")
	told("the interface was set down")
	mustReconcile(t, d, want)
	pings = m.ping("10.66.0.1", port)
	pings.end()

	run("link del edgeward0")
	told("the interface was removed")
	if c := mustReconcile(t, d, want); len(c.Add) != 6 {
		t.Errorf("after the interface was removed: %v", c)
	}
	pings = m.ping("10.66.0.1", port)
	pings.end()
	judge(t, d, want)

	// Another that takes the name is not taken for it.
	run("link del edgeward0")
	told("the interface was removed again")
	run("link add edgeward0 type bridge")
	for range 2 {
		if _, err := d.Reconcile(want); err == nil {
			t.Error("a stranger's interface was taken")
		}
	}
	if _, err := d.Reconcile(want); err == nil || !strings.Contains(err.Error(), "interface edgeward0 has become a bridge that is not ours: remove it with `ip link del edgeward0`") {
		t.Errorf("a stranger's interface: %v", err)
	}
	run("link del edgeward0")
	mustReconcile(t, d, want)
	judge(t, d, want)
	_ = d.Close()
	time.Sleep(50 * time.Millisecond)
	if len(lost) > 0 {
		t.Error("the end of the device is said to be a loss")
	}
	for _, secret := range []string{"127.0.0.1:", want.Peers[0].PublicKey.String(), hexOf(want.PrivateKey)} {
		if strings.Contains(l.String(), secret) {
			t.Errorf("the log holds %s:\n%s", secret, l.String())
		}
	}
}

// The question whether the kernel has WireGuard leaves nothing behind, whatever
// the answer. A kind that the kernel has and one that it has not answer apart.
func TestProbe(t *testing.T) {
	if err := (wireguardKind{}).probe(); err != nil && !errors.Is(err, ErrNoKernel) {
		t.Errorf("the probe says: %v", err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = "edgeward-probe", math.MaxInt32
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); !errors.Is(err, unix.EINVAL) {
		t.Errorf("a kind that there is, with an MTU that there is not: %v", err)
	}
	if err := netlink.LinkAdd(&netlink.GenericLink{LinkAttrs: attrs, LinkType: "nosuchkind"}); !errors.Is(err, unix.EOPNOTSUPP) {
		t.Errorf("a kind that there is not: %v", err)
	}
	if link, err := linkByName(attrs.Name); link != nil || err != nil {
		t.Errorf("the probe leaves %v: %v", link, err)
	}
}

// The machine passes packets on, as far as that may be switched on without loss.
func TestForwarding(t *testing.T) {
	set := func(path, value string) {
		t.Helper()
		if err := os.WriteFile(sysctls+"/"+path, []byte(value), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	is := func(path, want string) {
		t.Helper()
		if text, err := os.ReadFile(sysctls + "/" + path); err != nil || strings.TrimSpace(string(text)) != want {
			t.Errorf("%s is %s, want %s: %v", path, text, want, err)
		}
	}
	for _, args := range []string{"link add br7 type bridge", "link set br7 up", "-6 route add default via fe80::1 dev br7 proto ra"} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %s%v", args, out, err)
		}
	}
	defer func() { _ = exec.Command("ip", "link", "del", "br7").Run() }()
	set("ipv4/ip_forward", "0")
	set("ipv6/conf/all/forwarding", "0")
	set("ipv6/conf/br7/accept_ra", "1")
	if err := forwarding(prefixes("10.66.0.1/24")); err != nil {
		t.Error(err)
	}
	is("ipv4/ip_forward", "1")
	is("ipv6/conf/all/forwarding", "0")
	if err := forwarding(prefixes("fd66::1/64")); err == nil || !strings.Contains(err.Error(), "would lose the IPv6 route that it learned on br7: set net.ipv6.conf.br7.accept_ra = 2") {
		t.Errorf("a machine that listens to a router: %v", err)
	}
	is("ipv6/conf/all/forwarding", "0")
	set("ipv6/conf/br7/accept_ra", "2")
	if err := forwarding(prefixes("fd66::1/64")); err != nil {
		t.Error(err)
	}
	is("ipv6/conf/all/forwarding", "1")
}

// A network behind a peer to which no route leads is said once.
func TestUnrouted(t *testing.T) {
	var l testLog
	want := basics(t, 2)
	want.Peers[0].AllowedIPs = append(want.Peers[0].AllowedIPs, prefixes("192.168.7.0/24", "10.66.8.0/24")...)
	d := openFake(t, newFakeKernel(t), Options{Want: want, Log: l.logger()})
	mustReconcile(t, d, want)
	if err := d.Upsert(want.Peers[0]); err != nil {
		t.Fatal(err)
	}
	if said := l.String(); strings.Count(said, "no route to a peer's network") != 1 || !strings.Contains(said, "peer=peer-00000 prefix=192.168.7.0/24") {
		t.Errorf("said: %s", said)
	}
}

// The other side of the contract that the fake kernel is held to: what an unknown
// device is.
func TestUnknownDevice(t *testing.T) {
	real, err := wgctrl.New()
	if err != nil {
		t.Fatal(err)
	}
	defer real.Close()
	for name, c := range map[string]client{"kernel": fakeClient{newFakeKernel(t)}, "userspace": real} {
		if _, err := c.Device("lo"); !os.IsNotExist(err) {
			t.Errorf("%s: read a device that is none: %v", name, err)
		}
		if err := c.ConfigureDevice("nothing0", wgtypes.Config{}); !os.IsNotExist(err) {
			t.Errorf("%s: configure a device that is not there: %v", name, err)
		}
	}
}

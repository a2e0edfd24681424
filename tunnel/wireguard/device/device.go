// Package device keeps one WireGuard interface as it should be: keys, port,
// peers, addresses, routes. The kernel moves the packets where it has WireGuard,
// and wireguard-go in this process where not; once it is open, that makes no
// difference to the caller.
//
// A turn is read, [Diff], apply, and sends what differs and nothing else, so that
// it never costs a session that was not to end: peers are not replaced to be the
// same again, the endpoints of peers that roam are theirs to say, and a port or
// a key is set when it is another. An event about one peer needs no reading
// ([Device.Upsert], [Device.Remove]). When the process ends, a kernel's device
// stays as it is. One in userspace goes with it; the next remembers in a state
// file where its peers were, and calls them, so that they lose a moment instead
// of the 15 seconds that they take to notice.
//
// It knows nothing of files of configuration, of who may reach what, or of names:
// package gateway, its caller, does. It is the only importer of wgctrl and
// wireguard-go, and needs CAP_NET_ADMIN and nothing else: no module is loaded, no
// program is run. It never logs a secret, and no endpoint above debug.
package device

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// Options are what a device is opened with.
type Options struct {
	// Name is the interface's.
	Name string
	// Mode is Auto if empty.
	Mode Mode
	// StateDir is where the device keeps what it remembers over restarts, in one
	// file, NAME.state.json: endpoints, handshakes, bytes. Empty: it does not.
	StateDir string
	// Want is what the device is going to be. Open applies nothing of it, but
	// refuses what cannot be and what would get in the way of something else on
	// this machine.
	Want Config
	// Rotated, if set, is told of each key that takes another's place, from a
	// goroutine of its own: the declared peer may now be rewritten with its next
	// key. A rotation of an earlier process is not told again; the next key then
	// is among Peers and not Staged.
	Rotated func(Rotation)
	// Lost, if set, is told, from a goroutine of its own, that another hand took
	// the interface away or down. The next Reconcile brings it back.
	Lost func()
	// Alone says that the process is there for this device and nothing else. Then
	// in userspace its heap is bounded by the number of peers; the needs of
	// others are not known here.
	Alone bool
	Log   *slog.Logger
}

// PeerState is how a key on the device stands.
type PeerState struct {
	Name      string
	PublicKey Key
	Staged    bool           // a next key that has not been used
	Endpoint  netip.AddrPort // the last, in earlier runs too; invalid: never heard of
	Handshake time.Time      // the last, in earlier runs too; zero: never
	Received  uint64         // bytes, in earlier runs too
	Sent      uint64         // bytes, in earlier runs too
}

// Device is an open device. Its methods may be called from anywhere; one waits
// for the other, but for Peers.
type Device struct {
	options Options
	log     *slog.Logger
	mode    Mode
	seams   seams

	mu     sync.Mutex
	client client
	user   *userspace // nil in the kernel
	memory *memory
	limit  memoryLimit
	port   uint16          // the last that the device is known to have had
	fresh  bool            // in userspace and not up yet
	call   []Peer          // peers to be called
	staged map[Key]Peer    // wished peers with a next key that is not used yet, by that
	next   map[Key]Key     // the next keys of wished peers, used or not, by the declared ones
	routed []netip.Prefix  // what is routed to the interface
	warned map[string]bool // what need not be said again

	shown atomic.Pointer[[]PeerState] // what Peers said last

	stop    context.CancelFunc
	wake    chan struct{} // watch is to look soon: a key is staged
	watches sync.WaitGroup
}

// client is what of wgctrl is needed.
type client interface {
	Device(name string) (*wgtypes.Device, error)
	ConfigureDevice(name string, c wgtypes.Config) error
	Close() error
}

var _ client = (*wgctrl.Client)(nil)

// seams are where tests stand in for a kernel that has WireGuard.
type seams struct {
	kind   kind
	client func() (client, error)
}

// machine is the kernel as it is. A client must be made when the kernel's first
// interface is there: an earlier one never sees any.
var machine = seams{wireguardKind{}, func() (client, error) { return wgctrl.New() }}

// Open finds or makes the interface, without an address and down if it was not
// there: nothing passes until the first Apply. ctx bounds the waiting for an
// earlier process to let go of the name. Whatever stands in the way is a line of
// the error with its cure: the name is another's, the port is taken (by whom), a
// network of the VPN is somewhere else already, a right is missing.
func Open(ctx context.Context, options Options) (*Device, error) { return open(ctx, options, machine) }

func open(ctx context.Context, options Options, s seams) (*Device, error) {
	name := options.Name
	if name == "" || len(name) > maxName || strings.ContainsAny(name, "/ \t\n") || name == "." || name == ".." {
		return nil, fmt.Errorf("%q is no name for an interface: it has 1 to %d characters, without space or slash", name, maxName)
	}
	if err := options.Want.Check(); err != nil {
		return nil, err
	}
	d := &Device{
		options: options, log: options.Log.With("interface", name), seams: s,
		staged: map[Key]Peer{}, next: map[Key]Key{}, warned: map[string]bool{}, wake: make(chan struct{}, 1),
	}
	d.shown.Store(new([]PeerState))
	var err error
	if d.mode, err = choose(options.Mode, s.kind); err != nil {
		return nil, err
	}
	if err := Leftover(name); err != nil {
		return nil, err
	}
	existing, err := d.find()
	if err == nil && d.mode == Userspace {
		// A TUN device that is there is either an ending process's, and goes
		// with it, or a stranger's, and is not ours to attach to.
		err = waitGone(ctx, name)
	}
	if err != nil {
		return nil, err
	}
	err = overlaps(name, options.Want.Addresses, options.Want.Routes)
	if !existing {
		err = errors.Join(err, eventually(func() error { return portFree(options.Want.ListenPort) }))
	}
	if err != nil {
		return nil, err
	}
	file := ""
	if options.StateDir != "" {
		file = stateFile(options.StateDir, name)
	}
	d.memory = newMemory(file, d.log)
	if err := d.acquire(existing); err != nil {
		return nil, err
	}
	d.log.Info("WireGuard device opened", "mode", d.mode, "found", existing)

	ctx, d.stop = context.WithCancel(context.Background())
	d.watches.Go(func() { d.watch(ctx) })
	if options.Lost != nil {
		d.watches.Go(func() { d.watchLink(ctx) })
	}
	return d, nil
}

func stateFile(dir, name string) string { return filepath.Join(dir, name+".state.json") }

// choose decides who moves the packets.
func choose(mode Mode, k kind) (Mode, error) {
	switch mode {
	case Userspace:
		return Userspace, nil
	case Kernel, Auto, "":
	default:
		return "", fmt.Errorf("%q is no mode: choose %s, %s or %s", mode, Auto, Kernel, Userspace)
	}
	err := k.probe()
	switch {
	case err == nil:
		return Kernel, nil
	case errors.Is(err, ErrNoKernel) && mode != Kernel:
		return Userspace, nil
	case errors.Is(err, ErrNoKernel):
		return "", fmt.Errorf("%w: load its module on the node, or choose the mode %s", err, Userspace)
	}
	return "", err
}

// find looks for an interface of the name, and says whether it is one to go on
// with. One that is not ours is an error.
func (d *Device) find() (bool, error) {
	name := d.options.Name
	link, err := linkByName(name)
	if err != nil || link == nil {
		return false, err
	}
	switch {
	case link.Type() == "tuntap" && d.mode == Userspace:
		return false, nil // perhaps one that is just going
	case !d.seams.kind.is(link):
		return false, fmt.Errorf("interface %s is there already, a %s: choose another name for the interface", name, link.Type())
	case d.mode == Userspace && link.Attrs().Alias == mark:
		return false, fmt.Errorf("interface %s is in the kernel since a run in the mode %s: run `edgeward-tunnel cleanup` first, or go on in that mode", name, Kernel)
	case d.mode == Userspace:
		return false, fmt.Errorf("interface %s is there already, in the kernel: choose another name for the interface", name)
	case link.Attrs().Alias == mark:
		return true, nil
	}
	// It may have been made by other means for this very gateway.
	c, err := d.seams.client()
	if err != nil {
		return false, fmt.Errorf("speak to WireGuard: %w", rights(err))
	}
	defer func() { _ = c.Close() }()
	have, err := c.Device(name)
	if err != nil {
		return false, fmt.Errorf("read device %s: %w", name, rights(err))
	}
	if Secret(have.PrivateKey) != d.options.Want.PrivateKey.clamped() {
		return false, fmt.Errorf("interface %s is a WireGuard device that edgeward did not make, with another private key: "+
			"choose another name for the interface, or remove that one with `ip link del %s`", name, name)
	}
	return true, nil
}

// acquire makes the interface if it does not exist, and a client for it.
func (d *Device) acquire(existing bool) error {
	name := d.options.Name
	if !existing {
		if d.mode == Kernel {
			if err := makeKernelLink(d.seams.kind, name); err != nil {
				return err
			}
		} else {
			u, err := openUserspace(name, d.log)
			if err != nil {
				return err
			}
			d.user, d.fresh = u, true
		}
		d.memory.begin()
		d.port = 0
		if link, err := linkByName(name); err == nil && link != nil {
			quiet(link)
		}
	}
	if d.client != nil {
		_ = d.client.Close()
	}
	var err error
	if d.client, err = d.seams.client(); err != nil {
		if d.user != nil {
			d.user.close()
		}
		return fmt.Errorf("speak to WireGuard: %w", rights(err))
	}
	return nil
}

// ensure makes what has been taken away since the last turn.
func (d *Device) ensure() error {
	link, err := linkByName(d.options.Name)
	if err != nil {
		return err
	}
	if d.user != nil && (link == nil || d.user.closed()) {
		d.log.Warn("interface was taken away: making it anew")
		d.user.close()
		d.user = nil
		return d.acquire(false)
	}
	if link == nil {
		d.log.Warn("interface was taken away: making it anew")
		return d.acquire(false)
	}
	if d.user == nil && (d.mode == Userspace || !d.seams.kind.is(link)) {
		return fmt.Errorf("interface %s has become a %s that is not ours: remove it with `ip link del %s`", d.options.Name, link.Type(), d.options.Name)
	}
	return d.socketAgain()
}

// socketAgain makes the socket of a device in userspace anew if it has been
// taken away.
func (d *Device) socketAgain() error {
	if d.user == nil || d.user.socket.intact() {
		return nil
	}
	d.log.Warn("socket of the device was taken away: making it anew")
	return d.user.socket.again()
}

// Mode is Kernel or Userspace.
func (d *Device) Mode() Mode { return d.mode }

// Have reads what the device is. If the interface or its socket has been taken
// away, it makes a new one first.
func (d *Device) Have() (Have, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.have()
}

func (d *Device) have() (Have, error) {
	if err := d.ensure(); err != nil {
		return Have{}, err
	}
	var have Have
	link, err := linkByName(d.options.Name)
	if err != nil {
		return Have{}, err
	}
	if link == nil {
		return Have{}, fmt.Errorf("read interface %s: %w", d.options.Name, fs.ErrNotExist)
	}
	if err := readLink(link, &have); err != nil {
		return Have{}, err
	}
	have.Up = have.Up && (d.user == nil || d.user.up)
	d.routed = slices.Concat(have.Addresses, have.Routes)

	read, err := d.read()
	if err != nil {
		return Have{}, err
	}
	have.PrivateKey, have.ListenPort = Secret(read.PrivateKey), uint16(read.ListenPort)
	have.Peers = make([]Peer, len(read.Peers))
	ips := 0
	for i := range read.Peers {
		ips += len(read.Peers[i].AllowedIPs)
	}
	all := make([]netip.Prefix, 0, ips) // one piece of memory for those of all peers
	for i := range read.Peers {
		p := &read.Peers[i]
		begin := len(all)
		for j := range p.AllowedIPs {
			all = append(all, prefix(&p.AllowedIPs[j]))
		}
		have.Peers[i] = Peer{
			Name:         d.memory.of(Key(p.PublicKey)).Name,
			PublicKey:    Key(p.PublicKey),
			PresharedKey: Secret(p.PresharedKey),
			AllowedIPs:   canonical(all[begin:len(all):len(all)]),
			Keepalive:    p.PersistentKeepaliveInterval,
			Endpoint:     addrPort(p.Endpoint),
		}
	}
	have.Seen = make(map[Key]time.Time, len(d.memory.keys))
	for k, r := range d.memory.keys {
		if !r.Handshake.IsZero() {
			have.Seen[k] = r.Handshake
		}
	}
	return have, nil
}

// read asks the device, and remembers what it says.
func (d *Device) read() (*wgtypes.Device, error) {
	read, err := d.client.Device(d.options.Name)
	if err != nil {
		err = fmt.Errorf("read device %s: %w", d.options.Name, rights(err))
		return nil, errors.Join(err, d.revive())
	}
	d.memory.observe(read.Peers)
	if d.user != nil {
		d.user.guard.sessions(read.Peers)
	}
	if read.ListenPort != 0 {
		d.port = uint16(read.ListenPort)
	}
	return read, nil
}

// Reconcile is Check, Have, Diff and Apply: it makes the device what want says
// and returns what that took, or would have. Between turns it watches want's
// peers for handshakes with their next keys.
func (d *Device) Reconcile(want Config) (Changes, error) {
	if err := want.Check(); err != nil {
		return Changes{}, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	have, err := d.have()
	if err != nil {
		return Changes{}, err
	}
	c := Diff(have, want)
	clear(d.staged)
	clear(d.next)
	for _, p := range want.Peers {
		d.memory.name(p.PublicKey, p.Name)
		if p.Next == (Key{}) {
			continue
		}
		d.next[p.PublicKey] = p.Next
		if _, used := have.Seen[p.Next]; !used {
			d.stage(p)
		}
	}
	if !c.Empty() {
		err = d.apply(c)
		d.routed = slices.Concat(want.Addresses, want.Routes)
		d.unrouted(want.Peers)
	}
	return c, errors.Join(err, forwarding(want.Addresses))
}

// stage has watch wait for a peer's next key.
func (d *Device) stage(p Peer) {
	d.staged[p.Next] = p
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// unrouted says once of each peer with a network that has no way back: the kernel
// drops what comes from there, with the reverse path filter, or answers elsewhere.
func (d *Device) unrouted(peers []Peer) {
	for _, p := range peers {
		for _, ip := range p.AllowedIPs {
			inside := slices.ContainsFunc(d.routed, func(n netip.Prefix) bool {
				return n.Bits() <= ip.Bits() && n.Contains(ip.Addr())
			})
			if key := p.label() + ip.String(); !inside && !d.warned[key] {
				d.warned[key] = true
				d.log.Warn("no route to a peer's network: its packets are dropped or answered elsewhere", "peer", p.label(), "prefix", ip)
			}
		}
	}
}

// Upsert adds a peer or makes it what p says, without reading the device, which
// takes no longer for many peers than for few. It holds until a Reconcile.
func (d *Device) Upsert(p Peer) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if p.PublicKey == (Key{}) || p.PublicKey == p.Next {
		return fmt.Errorf("set peer %s: it needs a public key, and another for its next", p.label())
	}
	have := Have{Seen: map[Key]time.Time{}}
	if r := d.memory.keys[p.Next]; r != nil && !r.Handshake.IsZero() {
		have.Seen[p.Next] = r.Handshake
	}
	var c Changes
	now, staged, _ := have.stage(p, nil)
	if now.PublicKey != p.PublicKey && d.memory.on(p.PublicKey) {
		c.Remove = append(c.Remove, Removal{p.Name, p.PublicKey})
	}
	c.Add = append(c.Add, now)
	if d.memory.on(now.PublicKey) {
		c.Add[0].Endpoint = netip.AddrPort{} // the peer says where it is
	} else if first, _ := d.recent(c.Add); len(first) > 0 {
		c.Add = first
		d.call = append(d.call, now)
	}
	if staged != nil {
		c.Add = append(c.Add, *staged)
		d.stage(p)
	}
	err := d.configure(wgtypes.Config{Peers: peerConfigs(c)})
	d.settle(c)
	d.follows(p)
	d.unrouted([]Peer{p})
	if d.user == nil || d.user.up {
		err = errors.Join(err, d.callPeers())
	}
	return err
}

// follows notes the next key of one peer that was set.
func (d *Device) follows(p Peer) {
	// What was another's next key is a peer's own now.
	maps.DeleteFunc(d.next, func(_, next Key) bool { return next == p.PublicKey })
	delete(d.next, p.PublicKey)
	if p.Next != (Key{}) {
		d.next[p.PublicKey] = p.Next
	}
}

// Remove removes the peer that was declared with a key, and its next key with it,
// whether that waits or has taken over, without reading the device. That it is not
// there is no error.
func (d *Device) Remove(k Key) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var name string
	if r := d.memory.keys[k]; r != nil {
		name = r.Name
	}
	c := Changes{Remove: []Removal{{name, k}}}
	next, rotates := d.next[k]
	if rotates {
		c.Remove = append(c.Remove, Removal{name, next})
		delete(d.staged, next)
	}
	err := d.configure(wgtypes.Config{Peers: peerConfigs(c)})
	d.settle(c)
	if err == nil {
		delete(d.next, k)
	}
	return err
}

const (
	// staleness is how old what Peers says may be.
	staleness = time.Second
	// patience is how long Peers waits while the device is at work.
	patience = 250 * time.Millisecond
)

// Peers says how each key on the device stands, sorted by name and key. What it
// says may be a second old. While the device is at work, as with thousands of
// peers for seconds, it is what was said last, and nothing before that.
func (d *Device) Peers() ([]PeerState, error) {
	for begin := time.Now(); !d.mu.TryLock(); time.Sleep(2 * time.Millisecond) {
		if time.Since(begin) > patience {
			return slices.Clone(*d.shown.Load()), nil
		}
	}
	defer d.mu.Unlock()
	if age := d.memory.now().Sub(d.memory.read); age < 0 || age > staleness {
		if _, err := d.read(); err != nil {
			return nil, err
		}
	}
	var all []PeerState
	for k, r := range d.memory.keys {
		if !r.on {
			continue
		}
		_, staged := d.staged[k]
		all = append(all, PeerState{r.Name, k, staged && r.Handshake.IsZero(), r.Endpoint, r.Handshake, r.Received, r.Sent})
	}
	slices.SortFunc(all, func(a, b PeerState) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), bytes.Compare(a.PublicKey[:], b.PublicKey[:]))
	})
	d.shown.Store(&all)
	return slices.Clone(all), nil
}

// Gone says of the keys that are not on the device any more how they stood when
// they were last seen, sorted by name and key. While the device is at work there
// are none.
func (d *Device) Gone() []PeerState {
	if !d.mu.TryLock() {
		return nil
	}
	defer d.mu.Unlock()
	var all []PeerState
	for k, r := range d.memory.keys {
		if !r.on && !r.Handshake.IsZero() {
			all = append(all, PeerState{r.Name, k, false, r.Endpoint, r.Handshake, r.Received, r.Sent})
		}
	}
	slices.SortFunc(all, func(a, b PeerState) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), bytes.Compare(a.PublicKey[:], b.PublicKey[:]))
	})
	return all
}

// Close lets go of the device and writes what is to be remembered. In the kernel
// it stays as it is, peers, addresses and all; in userspace it is gone.
func (d *Device) Close() error {
	d.stop()
	d.watches.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.client == nil {
		return nil
	}
	_, err := d.read()
	d.memory.write()
	err = errors.Join(err, d.client.Close())
	d.client = nil
	if d.user != nil {
		d.user.close()
		d.limit.lift()
	}
	return err
}

// Cleanup removes what earlier processes left: the kernel's interfaces that
// edgeward made, of this name and of earlier ones, and what was remembered about
// them. What is not there is no error; an interface that is somebody else's stays.
func Cleanup(name, stateDir string) error {
	links, err := ours()
	errs := []error{err}
	names := []string{name}
	for _, link := range links {
		if is := link.Attrs().Name; is != name {
			names = append(names, is)
		}
		if err := delLink(link); err != nil {
			errs = append(errs, fmt.Errorf("remove interface %s: %w", link.Attrs().Name, rights(err)))
		}
	}
	for _, name := range names {
		if stateDir == "" {
			break
		}
		if err := os.Remove(stateFile(stateDir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove what is remembered: %w", err))
		}
	}
	return errors.Join(errs...)
}

// Leftover fails if the kernel keeps an interface of ours of another name, as it
// does when that was changed in the configuration: its peers go on, while the
// access rules go by the name. Ask before the rules are given a new one.
func Leftover(name string) error {
	links, err := ours()
	errs := []error{err}
	for _, link := range links {
		if is := link.Attrs().Name; is != name {
			errs = append(errs, fmt.Errorf("interface %s is left from the time when the VPN's had that name: "+
				"stop the gateway and run `edgeward-tunnel cleanup`, or name the interface %s again", is, is))
		}
	}
	return errors.Join(errs...)
}

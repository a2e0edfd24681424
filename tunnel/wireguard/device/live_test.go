package device

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// Someone who talks through the tunnel does not notice what happens to the others,
// nor that the same is applied again and again.
func TestNothingIsLost(t *testing.T) {
	want := basics(t, 1000)
	m, p := join(t, "alice", want, "10.66.0.2/32", "fd66::2/128")
	want.Peers[0] = p
	d := mustOpen(t, Options{Want: want})
	mustReconcile(t, d, want)
	port := echo(t)
	v4, v6 := m.ping("10.66.0.1", port), m.ping("fd66::1", port)

	pools := [2][]Peer{slices.Clone(want.Peers), nil}
	for i := range want.Peers {
		pools[1] = append(pools[1], somePeer(2000+i))
	}
	random := rand.New(rand.NewPCG(3, 4))
	for round := range 3 {
		for i := 10; i < len(want.Peers); i++ { // 990 of them
			q := &want.Peers[i]
			switch random.IntN(4) {
			case 0: // another in its place
				*q = pools[(round+1)%2][i]
			case 1:
				q.PresharedKey = secret()
			case 2:
				// Not for many: one without an endpoint is called again and again.
				q.Keepalive = time.Duration(i%16/15) * time.Duration(1+random.IntN(2)) * time.Minute
			case 3:
				q.AllowedIPs = q.AllowedIPs[:1+random.IntN(len(q.AllowedIPs))]
			}
		}
		c := mustReconcile(t, d, want)
		t.Logf("round %d: %d removed, %d changed, %d added", round, len(c.Remove), len(c.Update), len(c.Add))
		if len(c.Remove) < 50 || len(c.Remove) != len(c.Add) || len(c.Update) < 300 {
			t.Error("that is too little to show anything")
		}
	}
	for range 100 {
		if c := mustReconcile(t, d, want); !c.Empty() {
			t.Fatalf("the same again changes: %v", c)
		}
	}
	// Nor what happens to one's own peer that is not its end.
	own := &want.Peers[0]
	for _, change := range []func(){
		func() { own.AllowedIPs = append(slices.Clone(own.AllowedIPs), prefixes("10.70.0.0/24")...) },
		func() { own.AllowedIPs = own.AllowedIPs[:2] },
		func() { want.MTU = 1380 },
		func() { want.Addresses = append(slices.Clone(want.Addresses), prefixes("10.67.0.1/24")...) },
	} {
		change()
		mustReconcile(t, d, want)
		if err := d.Upsert(*own); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range []*pings{v4, v6} {
		lost, sent, gap := p.end()
		t.Logf("%d of %d pings lost, longest gap %v", lost, sent, gap)
		if lost > 0 {
			t.Errorf("%d of %d pings were lost", lost, sent)
		}
	}

	// Its end is an end at once.
	last := m.ping("10.66.0.1", port)
	if err := d.Remove(own.PublicKey); err != nil {
		t.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond)
	last.mu.Lock()
	answered := len(last.back)
	last.mu.Unlock()
	time.Sleep(300 * time.Millisecond)
	last.mu.Lock()
	defer last.mu.Unlock()
	if len(last.back) != answered {
		t.Error("a removed peer is still answered")
	}
}

// process is a gateway in a process of its own.
type process struct {
	cmd   *exec.Cmd
	stdin io.Closer
}

// start runs a gateway and returns when it is ready, or with what it says. It ends
// with this process, when its input does; the kernel's signal for that would come
// with the end of the thread that started it, and threads end here.
func start(t testing.TB, file string, under ...string) (*process, error) {
	t.Helper()
	args := append(under, "/proc/self/exe")
	if len(under) > 0 {
		args[len(args)-1] = program(t)
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), role+"=gateway", wish+"="+file)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v (setpriv is of util-linux)", err)
	}
	p := &process{cmd, stdin}
	t.Cleanup(func() { p.kill() })
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if line = strings.TrimSpace(line); line != "ready" {
		p.kill()
		return nil, fmt.Errorf("%s (%v)", line, err)
	}
	return p, nil
}

func mustStart(t testing.TB, file string) *process {
	t.Helper()
	p, err := start(t, file)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *process) kill() {
	if p.cmd.ProcessState == nil {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	}
}

// end has the process end itself.
func (p *process) end(t testing.TB) {
	t.Helper()
	_ = p.stdin.Close()
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("a gateway ended badly: %v", err)
	}
}

// program is where any user may run this test binary.
var program = func() func(testing.TB) string {
	var once sync.Once
	const path = "/run/device.test"
	return func(t testing.TB) string {
		once.Do(func() {
			text, err := os.ReadFile("/proc/self/exe")
			if err == nil {
				err = os.WriteFile(path, text, 0o755)
			}
			if err != nil {
				t.Fatal(err)
			}
		})
		return path
	}
}()

// A gateway that is killed and started again takes up the sessions that it had,
// and so does one that ends as it should, which takes nothing away from what it
// knows.
func TestKilledAndRestarted(t *testing.T) {
	const n = 1000
	want := basics(t, n)
	m, p := join(t, "alice", want, "10.66.0.2/32", "fd66::2/128")
	want.Peers[n/2] = p
	dir := t.TempDir()
	file := wishFile(t, "edgeward0", dir, want)
	port := echo(t)
	g := mustStart(t, file)
	again := func(end func()) (gap time.Duration) {
		pings := m.ping("10.66.0.1", port)
		// What is to be remembered is written within seconds.
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
			if text, _ := os.ReadFile(stateFile(dir, "edgeward0")); strings.Contains(string(text), "127.0.0.1:") {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("it does not write down where its peer is")
			}
		}
		end()
		g = mustStart(t, file)
		time.Sleep(time.Second)
		lost, sent, gap := pings.end()
		t.Logf("%d of %d pings lost, gap %v", lost, sent, gap)
		return gap
	}
	if gap := again(func() { g.kill() }); gap > time.Second {
		t.Errorf("one who talks through the tunnel was without an answer for %v", gap)
	}
	// Ending as it should, it takes its peers off one by one.
	gap := again(func() {
		g.end(t)
		if _, err := os.Stat(socketDir + "/edgeward0.sock"); !os.IsNotExist(err) {
			t.Errorf("it leaves its socket: %v", err)
		}
	})
	if gap > 3*time.Second {
		t.Errorf("when it was ended, one who talks through the tunnel was without an answer for %v", gap)
	}
	g.end(t)
}

// A next key takes over at its first handshake, and not before.
func TestRotation(t *testing.T) {
	want := basics(t, 20)
	old, p := join(t, "alice", want, "10.66.0.2/32", "fd66::2/128")
	fresh, q := join(t, "alice", want, "10.66.0.2/32", "fd66::2/128")
	want.Peers[5] = p
	rotated := make(chan Rotation, 10)
	options := Options{Want: want, StateDir: t.TempDir(), Rotated: func(r Rotation) { rotated <- r }}
	d := mustOpen(t, options)
	mustReconcile(t, d, want)
	port := echo(t)
	pings := old.ping("10.66.0.1", port)

	want.Peers[5].Next, want.Peers[5].NextPresharedKey = q.PublicKey, q.PresharedKey
	mustReconcile(t, d, want)
	mustReconcile(t, d, want)
	states := map[Key]PeerState{}
	all, err := d.Peers()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		states[s.PublicKey] = s
	}
	if !states[q.PublicKey].Staged || states[p.PublicKey].Staged {
		t.Errorf("staged: %+v, %+v", states[q.PublicKey], states[p.PublicKey])
	}
	if lost, sent, _ := pings.end(); lost > 0 {
		t.Errorf("%d of %d pings were lost while the key was staged", lost, sent)
	}

	begin := time.Now()
	after := fresh.ping("10.66.0.1", port)
	took := time.Since(begin)
	t.Logf("the next key is answered %v after its first packet", took)
	if took > time.Second {
		t.Errorf("the next key was answered after %v", took)
	}
	if r := <-rotated; r != (Rotation{"alice", p.PublicKey, q.PublicKey}) {
		t.Errorf("told of %+v", r)
	}
	for _, s := range func() []PeerState { all, _ := d.Peers(); return all }() {
		if s.PublicKey == p.PublicKey || s.PublicKey == q.PublicKey && (s.Staged || s.Name != "alice") {
			t.Errorf("afterwards there is %+v", s)
		}
	}
	if c := mustReconcile(t, d, want); !c.Empty() {
		t.Errorf("a turn after it changes: %v", c)
	}

	// The old key does not come back with a restart, nor when one peer is set.
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = mustOpen(t, options)
	mustReconcile(t, d, want)
	if err := d.Upsert(want.Peers[5]); err != nil {
		t.Fatal(err)
	}
	have, err := d.Have()
	if err != nil || slices.ContainsFunc(have.Peers, func(h Peer) bool { return h.PublicKey == p.PublicKey }) {
		t.Errorf("the old key is back after a restart: %v", err)
	}
	// When the declared peer has followed, nothing changes.
	q.Name = "alice"
	want.Peers[5] = q
	if c := mustReconcile(t, d, want); !c.Empty() {
		t.Errorf("the declared key changes: %v", c)
	}
	if _, _, gap := after.end(); gap > time.Second {
		t.Errorf("the next key was without an answer for %v", gap)
	}
	select {
	case r := <-rotated:
		t.Errorf("told twice, of %+v", r)
	default:
	}
}

// Who is removed by the key that was declared is gone, whichever key counts now.
func TestRemoveAfterRotation(t *testing.T) {
	want := basics(t, 3)
	_, p := join(t, "alice", want, "10.66.0.2/32", "fd66::2/128")
	fresh, q := join(t, "alice", want, "10.66.0.2/32", "fd66::2/128")
	p.Next, p.NextPresharedKey = q.PublicKey, q.PresharedKey
	want.Peers[2] = p
	options := Options{Want: want, StateDir: t.TempDir()}
	d := mustOpen(t, options)
	mustReconcile(t, d, want)
	port := echo(t)
	gone := func(when string) {
		t.Helper()
		pings := fresh.ping("10.66.0.1", port)
		if err := d.Remove(p.PublicKey); err != nil {
			t.Fatal(err)
		}
		have, err := d.Have()
		if err != nil || len(have.Peers) != 2 {
			t.Errorf("%s: %d peers are on the device: %v", when, len(have.Peers), err)
		}
		time.Sleep(100 * time.Millisecond) // what is on its way
		pings.mu.Lock()
		before := len(pings.back)
		pings.mu.Unlock()
		pings.end()
		if n := len(pings.back) - before; n > 0 {
			t.Errorf("%s: %d pings were answered afterwards", when, n)
		}
	}
	gone("after the next key took over")
	if err := d.Upsert(p); err != nil {
		t.Fatal(err)
	}
	gone("after the peer was set again")
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = mustOpen(t, options)
	mustReconcile(t, d, want)
	gone("after a restart")

	// Once the next key is the declared one, the old one says nothing about it.
	mustReconcile(t, d, want)
	q.Name = "alice"
	if err := d.Upsert(q); err != nil {
		t.Fatal(err)
	}
	if err := d.Remove(p.PublicKey); err != nil {
		t.Fatal(err)
	}
	if have, err := d.Have(); err != nil || len(have.Peers) != 3 {
		t.Errorf("%d peers are on the device: %v", len(have.Peers), err)
	}
}

// stubborn is a device that takes no changes for a while.
type stubborn struct {
	client
	refuses *atomic.Bool
	refused *atomic.Int32
}

func (s stubborn) ConfigureDevice(name string, c wgtypes.Config) error {
	if s.refuses.Load() {
		s.refused.Add(1)
		return errors.New("refused on purpose")
	}
	return s.client.ConfigureDevice(name, c)
}

// A rotation that the device refuses is not told of until it is done, which is
// tried again.
func TestRotationRefused(t *testing.T) {
	want := basics(t, 3)
	_, p := join(t, "alice", want, "10.66.0.2/32", "fd66::2/128")
	fresh, q := join(t, "alice", want, "10.66.0.2/32", "fd66::2/128")
	p.Next, p.NextPresharedKey = q.PublicKey, q.PresharedKey
	want.Peers[2] = p
	rotated := make(chan Rotation, 10)
	var l testLog
	d := mustOpen(t, Options{Want: want, Rotated: func(r Rotation) { rotated <- r }, Log: l.logger()})
	mustReconcile(t, d, want)
	s := stubborn{d.client, new(atomic.Bool), new(atomic.Int32)}
	s.refuses.Store(true)
	d.mu.Lock()
	d.client = s
	d.mu.Unlock()
	port := echo(t)
	answered := make(chan *pings, 1)
	go func() { answered <- fresh.ping("10.66.0.1", port) }()
	for s.refused.Load() < 3 {
		time.Sleep(20 * time.Millisecond)
	}
	if len(rotated) > 0 || strings.Contains(l.String(), "follows") {
		t.Errorf("a rotation that was refused is told of:\n%s", l.String())
	}
	s.refuses.Store(false)
	(<-answered).end()
	if r := <-rotated; r != (Rotation{"alice", p.PublicKey, q.PublicKey}) {
		t.Errorf("told of %+v", r)
	}
	if c := mustReconcile(t, d, want); !c.Empty() {
		t.Errorf("a turn after it changes: %v", c)
	}
}

// It takes CAP_NET_ADMIN and no more, and says what is missing where it is.
func TestUnprivileged(t *testing.T) {
	want := basics(t, 10)
	m, p := join(t, "alice", want, "10.66.0.2/32", "fd66::2/128")
	want.Peers[0] = p
	state := t.TempDir()
	file := wishFile(t, "edgeward0", state, want)
	for dir := filepath.Dir(file); dir != filepath.Clean(os.TempDir()); dir = filepath.Dir(dir) { // the test's own
		if err := os.Chmod(dir, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(state, 65532, 65532); err != nil {
		t.Fatal(err)
	}
	as := func(capabilities string) []string {
		return []string{"setpriv", "--reuid=65532", "--regid=65532", "--clear-groups", "--no-new-privs",
			"--inh-caps=" + capabilities, "--ambient-caps=" + capabilities, "--bounding-set=" + capabilities}
	}
	if _, err := start(t, file, as("-all")...); err == nil || !strings.Contains(err.Error(), "give the process CAP_NET_ADMIN") {
		t.Errorf("without the right: %v", err)
	}
	if err := os.RemoveAll(socketDir); err != nil {
		t.Fatal(err)
	}
	admin := as("-all,+net_admin")
	if _, err := start(t, file, admin...); err == nil || !strings.Contains(err.Error(), "mount an empty directory that the process may write to at "+socketDir) {
		t.Errorf("without a directory for the socket: %v", err)
	}
	if err := os.Mkdir(socketDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(socketDir, 65532, 65532); err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(socketDir)

	// Where /proc/sys is read-only, as in a container, it says what to do on the
	// node; where it is done, or may be, it goes on.
	const forward = "/proc/sys/net/ipv4/ip_forward"
	if err := os.WriteFile(forward, []byte("0"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("/proc/sys", "/proc/sys", "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", "/proc/sys", "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	_, err := start(t, file, admin...)
	if err := unix.Unmount("/proc/sys", unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if err == nil || !strings.Contains(err.Error(), "set net.ipv4.ip_forward = 1 in /etc/sysctl.d on the node") {
		t.Errorf("where settings are read-only: %v", err)
	}
	if err := os.WriteFile(forward, []byte("1"), 0o644); err != nil {
		t.Fatal(err)
	}
	g, err := start(t, file, admin...)
	if err != nil {
		t.Fatal(err)
	}
	port := echo(t)
	pings, six := m.ping("10.66.0.1", port), m.ping("fd66::1", port)
	pings.end()
	six.end()
	g.end(t)
	if text, err := os.ReadFile(stateFile(state, "edgeward0")); err != nil || !strings.Contains(string(text), `"name":"alice"`) {
		t.Errorf("it remembers: %s: %v", text, err)
	}
}

// Who sprays packets at peers that are away fills neither the memory nor the way
// of those that are there.
func TestSpray(t *testing.T) {
	want := basics(t, 1000)
	m, p := join(t, "alice", want, "10.66.0.2/32", "fd66::2/128")
	want.Peers[0] = p
	d := mustOpen(t, Options{Want: want})
	mustReconcile(t, d, want)
	pings := m.ping("10.66.0.1", echo(t))

	c, err := net.ListenUDP("udp", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var before, after runtime.MemStats
	debug.FreeOSMemory()
	runtime.ReadMemStats(&before)
	packet := make([]byte, 1000)
	sent := 0
	for end := time.Now().Add(time.Second); time.Now().Before(end); sent++ {
		if sent%64 == 63 {
			time.Sleep(time.Millisecond)
		}
		ip := want.Peers[1+sent%999].AllowedIPs[sent/999%2]
		if _, err := c.WriteToUDPAddrPort(packet, netip.AddrPortFrom(ip.Addr(), 9)); err != nil {
			t.Fatal(err)
		}
	}
	debug.FreeOSMemory()
	runtime.ReadMemStats(&after)
	held := (int64(after.HeapAlloc) - int64(before.HeapAlloc)) >> 20
	t.Logf("%d packets sprayed, %d dropped, %d MiB held", sent, d.user.guard.dropped.Load(), held)
	if dropped := d.user.guard.dropped.Load(); dropped < uint64(sent)/4 {
		t.Errorf("%d of %d packets were dropped", dropped, sent)
	}
	if held > 64 {
		t.Errorf("%d MiB are held for peers that are away", held)
	}
	if lost, sent, gap := pings.end(); gap > time.Second {
		t.Errorf("meanwhile %d of %d pings were lost, gap %v", lost, sent, gap)
	}
}

// The limit of the memory follows the number of peers, and gives way to the
// operator's and to what else the process does.
func TestMemoryLimit(t *testing.T) {
	before := debug.SetMemoryLimit(-1)
	want := basics(t, 100)
	d := mustOpen(t, Options{Want: want, Alone: true})
	mustReconcile(t, d, want)
	if got := debug.SetMemoryLimit(-1); got != memoryBase+128*memoryPerPeer {
		t.Errorf("with 100 peers the limit is %d", got)
	}
	_ = d.Close()
	if got := debug.SetMemoryLimit(-1); got != before {
		t.Errorf("after the device the limit is %d, and was %d", got, before)
	}
	d = mustOpen(t, Options{Want: want})
	mustReconcile(t, d, want)
	if got := debug.SetMemoryLimit(-1); got != before {
		t.Errorf("a process that does more is limited to %d", got)
	}
	_ = d.Close()

	// What the process may have in all bounds it.
	files := map[string]string{
		"v2":                      "0::/kubepods/pod7/x\n",
		"v1":                      "5:devices:/x\n4:cpu,memory:/docker/x\n0::/\n",
		"none":                    "0::/\n",
		"elsewhere":               "0::/../../not/here\n",
		"sys/kubepods/memory.max": "max\n", "sys/kubepods/pod7/memory.max": "209715200\n", "sys/kubepods/pod7/x/memory.max": "max\n",
		"sys/memory/memory.limit_in_bytes": "9223372036854771712\n", "sys/memory/docker/x/memory.limit_in_bytes": "419430400\n",
	}
	dir := t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		mine  string
		peers int
		want  int64
		warns bool
	}{
		{"none", 10000, memoryBase + 10048*memoryPerPeer, false}, {"elsewhere", 64, memoryBase + 64*memoryPerPeer, false}, {"missing", 64, memoryBase + 64*memoryPerPeer, false},
		{"v2", 10000, 170 << 20, true}, {"v1", 64, memoryBase + 64*memoryPerPeer, false}, {"v1", 10000, 340 << 20, true},
	} {
		var l testLog
		var m memoryLimit
		for range 2 {
			m.peers(tt.peers, cgroups{filepath.Join(dir, tt.mine), filepath.Join(dir, "sys")}, l.logger())
		}
		got := debug.SetMemoryLimit(-1)
		if off := got - tt.want; off < -100 || off > 100 {
			t.Errorf("%s, %d peers: the limit is %d, want %d", tt.mine, tt.peers, got, tt.want)
		}
		if warns := strings.Count(l.String(), "raise its limit"); warns > 1 || warns == 1 != tt.warns {
			t.Errorf("%s, %d peers: it is said %s", tt.mine, tt.peers, l.String())
		}
		m.lift()
	}
	if got := debug.SetMemoryLimit(-1); got != before {
		t.Errorf("afterwards the limit is %d, and was %d", got, before)
	}
	t.Setenv("GOMEMLIMIT", "1GiB")
	d = mustOpen(t, Options{Want: want, Alone: true})
	mustReconcile(t, d, want)
	if got := debug.SetMemoryLimit(-1); got != before {
		t.Errorf("the operator's limit became %d", got)
	}
}

// A peer that is taken off and comes back within the life of its session is called,
// and does not wait until it finds out. One that was away for longer is not.
func TestBack(t *testing.T) {
	want := basics(t, 3)
	m, p := join(t, "alice", want, "10.66.0.2/32", "fd66::2/128")
	want.Peers[1] = p
	d := mustOpen(t, Options{Want: want})
	mustReconcile(t, d, want)
	pings := m.ping("10.66.0.1", echo(t))
	without := want
	without.Peers = slices.Delete(slices.Clone(want.Peers), 1, 2)
	for name, again := range map[string]func() error{
		"by itself":   func() error { return errors.Join(d.Remove(p.PublicKey), d.Upsert(p)) },
		"by the turn": func() error { mustReconcile(t, d, without); mustReconcile(t, d, want); return nil },
	} {
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			all, err := d.Peers()
			if err != nil || time.Now().After(deadline) {
				t.Fatalf("%s: %+v, %v", name, all, err)
			}
			if slices.ContainsFunc(all, func(s PeerState) bool { return s.Name == "alice" && s.Endpoint.IsValid() }) {
				break
			}
		}
		begin := time.Now()
		if err := again(); err != nil {
			t.Fatal(err)
		}
		for {
			pings.mu.Lock()
			last := pings.last
			pings.mu.Unlock()
			if last.After(begin.Add(50 * time.Millisecond)) { // nothing of before is under way
				break
			}
			if time.Since(begin) > 4*time.Second {
				t.Fatalf("%s: no answer after %v", name, time.Since(begin))
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Logf("%s: answered after %v", name, time.Since(begin))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.memory.keys[p.PublicKey].Handshake = time.Now().Add(-recently - time.Second)
	if first, _ := d.recent([]Peer{p}); len(first) > 0 {
		t.Errorf("called long after: %+v", first)
	}
}

// Who asks while the device is at work is told what was known before that.
func TestPeersWhileAtWork(t *testing.T) {
	want := basics(t, 5)
	d := mustOpen(t, Options{Want: want})
	mustReconcile(t, d, want)
	for _, known := range []int{0, 5} {
		d.mu.Lock()
		begin := time.Now()
		all, err := d.Peers()
		took := time.Since(begin)
		d.mu.Unlock()
		if err != nil || len(all) != known || took > time.Second {
			t.Errorf("%d peers, %v, after %v; want %d", len(all), err, took, known)
		}
		if all, err := d.Peers(); err != nil || len(all) != 5 {
			t.Errorf("afterwards %d peers, %v", len(all), err)
		}
	}
}

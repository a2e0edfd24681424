package device

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	wg "golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
)

// userspace is wireguard-go in this process.
type userspace struct {
	name   string
	dev    *wg.Device
	guard  *guard
	socket *socket
	log    *slog.Logger
	up     bool
}

// openUserspace makes a TUN device and has wireguard-go serve it, down.
func openUserspace(name string, log *slog.Logger) (*userspace, error) {
	device, err := tun.CreateTUN(name, defaultMTU)
	switch {
	case err == nil:
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return nil, fmt.Errorf("open /dev/net/tun: %w: give the process CAP_NET_ADMIN and a /dev/net/tun that it may open", err)
	case strings.Contains(err.Error(), "does not exist"), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return nil, fmt.Errorf("%w: WireGuard in userspace needs it: mount it into the container, or `modprobe tun` on the node", err)
	default:
		return nil, fmt.Errorf("make TUN device %s: %w", name, err)
	}
	u := &userspace{name: name, log: log, guard: newGuard(device)}
	u.dev = wg.NewDevice(u.guard, conn.NewDefaultBind(), (&libraryLog{log: log}).logger())
	if u.socket, err = listen(name, u.dev.IpcHandle); err != nil {
		u.dev.Close()
		return nil, err
	}
	return u, nil
}

// bringUp opens the UDP port, once the interface is up.
func (u *userspace) bringUp(port uint16) error {
	if err := u.dev.Up(); err != nil {
		u.up = false
		if errors.Is(err, unix.EADDRINUSE) {
			return portTaken(port)
		}
		return fmt.Errorf("receive on UDP port %d: %w", port, err)
	}
	u.up = true
	return nil
}

// closed says whether wireguard-go has given up, as it does when its interface is
// taken away.
func (u *userspace) closed() bool {
	select {
	case <-u.dev.Wait():
		return true
	default:
		return false
	}
}

// call sends each peer a keepalive at its endpoint, and with it a handshake.
func (u *userspace) call(peers []Peer) {
	for _, p := range peers {
		if p := u.dev.LookupPeer(wg.NoisePublicKey(p.PublicKey)); p != nil {
			p.SendKeepalive()
		}
	}
}

func (u *userspace) close() {
	u.socket.close()
	u.dev.Close()
}

// socketDir is where wg and wgctrl look for devices in userspace.
const socketDir = "/var/run/wireguard"

// socket is where a device in userspace is configured. Who may open it reads the
// keys: it is for root and for this process.
type socket struct {
	path  string
	file  fs.FileInfo
	l     net.Listener
	serve func(net.Conn)
}

// listen opens the socket of a device. One that a killed process left is
// replaced; one that answers belongs to a device of the same name, in another
// network namespace perhaps, and is not.
func listen(name string, serve func(net.Conn)) (*socket, error) {
	s := &socket{path: filepath.Join(socketDir, name+".sock"), serve: serve}
	if err := eventually(func() error {
		c, err := net.Dial("unix", s.path)
		if err != nil {
			return nil
		}
		_ = c.Close()
		return fmt.Errorf("%s is answered by another process: end that, choose another name for the interface, or give this process a %s of its own", s.path, socketDir)
	}); err != nil {
		return nil, err
	}
	return s, s.open()
}

// open makes the socket where nobody else gets at it and moves it into place, so
// that there is no moment in which it has the wrong mode.
func (s *socket) open() error {
	if err := os.MkdirAll(socketDir, 0o700); err != nil {
		return fmt.Errorf("make the directory of WireGuard's sockets: %w: mount an empty directory that the process may write to at %s", err, socketDir)
	}
	dir, err := os.MkdirTemp(socketDir, ".new-")
	if err != nil {
		return fmt.Errorf("make a socket: %w: mount an empty directory that the process may write to at %s", err, socketDir)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	fresh := filepath.Join(dir, "sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: fresh, Net: "unix"})
	if err != nil {
		return fmt.Errorf("make a socket: %w", err)
	}
	l.SetUnlinkOnClose(false)
	err = os.Chmod(fresh, 0o600)
	if err == nil {
		err = os.Rename(fresh, s.path)
	}
	if err == nil {
		s.file, err = os.Lstat(s.path)
	}
	if err != nil {
		_ = l.Close()
		return fmt.Errorf("make a socket: %w", err)
	}
	s.l = l
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go s.serve(c)
		}
	}()
	return nil
}

// intact says whether the socket is still the one at its place.
func (s *socket) intact() bool {
	now, err := os.Lstat(s.path)
	return err == nil && os.SameFile(s.file, now)
}

// again makes the socket anew.
func (s *socket) again() error {
	_ = s.l.Close()
	return s.open()
}

func (s *socket) close() {
	_ = s.l.Close()
	if s.intact() { // not that of a process that has taken over
		_ = os.Remove(s.path)
	}
}

// memoryLimit bounds the Go heap by the number of peers: in userspace each packet
// on its way has a buffer of 64 KiB, and without a limit they pile up between two
// collections. With less than this the collector runs all the time: with 64 MiB less
// a byte costs twice the processor time. That is why a process that does other
// things as well has none: what those need, a table of bans for one, would count
// against it. Who sets GOMEMLIMIT knows better.
type memoryLimit struct {
	before, set int64
	peersOf     int  // how many it was set for
	warned      bool // that this is more than the process may have
}

const (
	memoryBase    = 192 << 20
	memoryPerPeer = 40 << 10
)

// memoryShare is the percentage of what the process may have in all that the heap
// gets: the rest is the program, its stacks and what the kernel keeps for it.
const memoryShare = 85

// peers sets the limit for a number of peers, within that of the process's group of
// memory: over that it would be killed, under it the collector only works harder.
func (m *memoryLimit) peers(n int, groups cgroups, log *slog.Logger) {
	n = (n + 63) / 64 * 64 // a change stops the world
	if _, theirs := os.LookupEnv("GOMEMLIMIT"); theirs || m.set != 0 && n == m.peersOf {
		return
	}
	m.peersOf = n
	limit := int64(memoryBase + n*memoryPerPeer)
	bound := groups.memory()
	if most := bound / 100 * memoryShare; most < limit {
		if !m.warned {
			log.Warn("the process may not have the memory that its peers take under load: raise its limit, or every packet costs more",
				"peers", n, "limitMiB", bound>>20, "neededMiB", (limit/memoryShare*100)>>20)
		}
		m.warned, limit = true, most
	} else {
		m.warned = false
	}
	if limit == m.set {
		return
	}
	before := debug.SetMemoryLimit(limit)
	if m.set == 0 {
		m.before = before
	}
	m.set = limit
}

func (m *memoryLimit) lift() {
	if m.set != 0 {
		debug.SetMemoryLimit(m.before)
		m.set = 0
	}
}

// libraryLog hands what wireguard-go logs to log. What it has to say about peers
// holds their endpoints, so that above debug only the constant part of a message
// is logged, each at most once a minute.
type libraryLog struct {
	log *slog.Logger

	mu    sync.Mutex
	said  map[string]time.Time // by format
	since map[string]int       // how often it was held back since
}

// often is how often one kind of message is logged.
const often = time.Minute

func (l *libraryLog) logger() *wg.Logger {
	ctx := context.Background()
	l.said, l.since = map[string]time.Time{}, map[string]int{}
	verbose := wg.DiscardLogf
	if l.log.Enabled(ctx, slog.LevelDebug) {
		verbose = func(format string, args ...any) { l.log.Debug("wireguard-go", "said", fmt.Sprintf(format, args...)) }
	}
	return &wg.Logger{Verbosef: verbose, Errorf: func(format string, args ...any) {
		kind := strings.Trim(verbs.Replace(format), " -:")
		if kind == "" {
			return // an answer on the socket: who asked has it, and it may hold a key
		}
		verbose(format, args...)
		for _, a := range args {
			if err, ok := a.(error); ok && strings.Contains(err.Error(), "no known endpoint") {
				return // a packet for a peer that has not come yet
			}
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		now := time.Now()
		if now.Sub(l.said[kind]) < often {
			l.since[kind]++
			return
		}
		attrs := []any{"said", kind}
		for _, a := range args {
			var errno syscall.Errno
			if err, ok := a.(error); ok && errors.As(err, &errno) {
				attrs = append(attrs, "error", errno)
			}
		}
		l.log.Warn("wireguard-go reports an error", append(attrs, "heldBack", l.since[kind])...)
		l.said[kind], l.since[kind] = now, 0
	}}
}

// verbs takes the changing parts out of a format.
var verbs = strings.NewReplacer("%v", "", "%s", "", "%d", "", "%q", "", "%w", "")

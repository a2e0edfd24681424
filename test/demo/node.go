package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/edgeward/edgeward/bouncer"
	"github.com/edgeward/edgeward/internal/netns"
	"github.com/edgeward/edgeward/test/rig"
)

// The node has addresses that are kept for documentation, and so have its
// visitors: whatever the machine's own network is, nothing here is of it.
var (
	node4    = netip.MustParseAddr("203.0.113.1")
	node6    = netip.MustParseAddr("2001:db8::1")
	gateway4 = netip.MustParseAddr("203.0.113.2")
	gateway6 = netip.MustParseAddr("2001:db8::2")

	owner    = netip.MustParseAddr("192.0.2.7")  // protected by configuration
	guest    = netip.MustParseAddr("192.0.2.5")  // whom nobody bans
	banned   = netip.MustParseAddr("192.0.2.66") // from the first step in the kernel to the last
	stranger = netip.MustParseAddr("198.51.100.9")
)

// port is where ssh would be. What listens there answers with what it hears.
const port = 22

// node is a machine in a network namespace of its own, with the node bouncer,
// and the visitors at the other end of its only cable, in another.
type node struct {
	*gateway
	stage

	machine, visitors *netns.NS
	service           *netns.Server
	agent             *rig.NodeBouncer
	holds             bool // the ban of banned
}

// closedDoor is why network namespaces cannot be had here; nil if they can.
func closedDoor(ctx context.Context) error {
	if out, err := exec.CommandContext(ctx, "unshare", "--net", "true").CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// knock gives the demo of a user who is not root a user namespace, in which it is
// root over the networks that it makes, and over nothing else. Where the system
// does not let users do that, it returns, and the demo goes on without.
func knock() {
	const tried = "EDGEWARD_DEMO_KNOCKED"
	if os.Geteuid() == 0 || os.Getenv(tried) != "" {
		return
	}
	unshare, err := exec.LookPath("unshare")
	if err != nil {
		return
	}
	self, err := os.Executable()
	if err != nil || exec.Command(unshare, "--map-root-user", "--net", "true").Run() != nil {
		return
	}
	// The same process goes on, so that signals and parent stay what they are.
	args := append([]string{unshare, "--map-root-user", self}, os.Args[1:]...)
	_ = syscall.Exec(unshare, args, append(os.Environ(), tried+"=1"))
}

// openNode makes the two networks and starts the bouncer in the node's. life
// bounds the bouncer.
func openNode(ctx, life context.Context, g *gateway) (*node, error) {
	if err := rig.CheckPrograms(); err != nil {
		return nil, err
	}
	n := &node{gateway: g}
	err := n.try(func() {
		n.machine, n.visitors = netns.New(n), netns.New(n)
		prefix := netip.MustParsePrefix
		netns.Cable(
			netns.End{NS: n.visitors, Name: "visitors0", Addrs: []netip.Prefix{netip.PrefixFrom(gateway4, 24), netip.PrefixFrom(gateway6, 64)}},
			netns.End{NS: n.machine, Name: "uplink0", Addrs: []netip.Prefix{netip.PrefixFrom(node4, 24), netip.PrefixFrom(node6, 64)}})
		n.machine.Route(prefix("0.0.0.0/0"), gateway4)
		n.machine.Route(prefix("::/0"), gateway6)
		for _, p := range []string{"192.0.2.0/24", "198.51.100.0/24", "2001:db8:bad::/48", "2001:db8:cafe::/48"} {
			n.visitors.Own(prefix(p))
		}
		n.service = n.machine.Serve(netip.AddrPortFrom(netip.IPv6Unspecified(), port))
	})
	if err != nil {
		return n, err
	}
	key, err := g.lapi.AddBouncer(ctx, "demo-node")
	if err != nil {
		return n, err
	}
	n.agent, err = rig.StartNodeBouncer(life, rig.NodeBouncerOptions{NetNS: n.file(n.machine), LAPI: g.lapi, Key: key, Config: n.config("")})
	return n, err
}

// config is the bouncer's configuration, beside what has to be in it.
func (n *node) config(firewall string) string {
	return fmt.Sprintf("protect: {addresses: [%s]}\nfirewall: {%s}\n", owner, firewall)
}

// file names a network for other processes, for as long as this one lives.
func (n *node) file(ns *netns.NS) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.FD()) }

// addCommands adds to the directory for the user's PATH what works on the node
// and from outside of it.
func (n *node) addCommands() error {
	return errors.Join(
		n.command("on-node", "PATH=$PATH:/usr/sbin\n"+n.enter(n.machine, "")),
		n.command("outside", n.enter(n.visitors, "")),
		n.command("edgeward-bouncer", fmt.Sprintf("set -- \"$@\" --config '%s'\n%s '%s'", n.agent.ConfigFile, n.enter(n.machine, ""), n.agent.Program)),
	)
}

// enter is a line of shell that goes on as a command in a network, and in what else
// there is to enter.
func (n *node) enter(ns *netns.NS, also string) string {
	// Whoever is not root here has a user namespace to enter first.
	return fmt.Sprintf("[ \"$(id -u)\" = 0 ] || as='--user=/proc/%d/ns/user --preserve-credentials'\nexec nsenter $as --net=%s%s", os.Getpid(), n.file(ns), also)
}

// invite says what there is to play with; nothing where there is no node.
func (n *node) invite() string {
	if n == nil {
		return ""
	}
	return fmt.Sprintf(`  edgeward-bouncer status
  cscli decisions add --ip %[1]s --duration 5m
  edgeward-bouncer why %[1]s
  echo hello | outside curl -sm 1 --interface %[1]s telnet://%[2]s
  edgeward-bouncer unban %[1]s
  edgeward-bouncer check --probe
  on-node nft list table inet edgeward
  on-node ip address

  node bouncer   %[3]s
                 with its log beside it
`, guest, at(guest), n.agent.ConfigFile)
}

// close ends the bouncer, and with the last that knows them the networks.
func (n *node) close() error {
	var err error
	if n.agent != nil {
		err = n.agent.Close()
	}
	n.stage.close()
	return err
}

// follows waits until the bouncer's last pull is fresh: while LAPI was away, in an
// earlier step, it was asked ever more rarely.
func (n *node) follows(ctx context.Context) error {
	for began := time.Now(); ; {
		status, err := bouncer.AskStatus(ctx, n.agent.SocketPath)
		switch {
		case err != nil:
			return err
		case time.Since(status.LAPI.LastPull) < 2*pollInterval:
			return nil
		case time.Since(began) > 30*time.Second:
			return fmt.Errorf("the node bouncer has not asked LAPI since %s", status.LAPI.LastPull.Format(time.TimeOnly))
		}
		if err := pause(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
}

// at is where a visitor finds the service.
func at(from netip.Addr) netip.AddrPort {
	if from.Is6() {
		return netip.AddrPortFrom(node6, port)
	}
	return netip.AddrPortFrom(node4, port)
}

// answered demands that a visitor gets through, and says so.
func (n *node) answered(from netip.Addr, format string, args ...any) error {
	n.does(fmt.Sprintf("outside curl --interface %s telnet://%s", from, at(from)))
	var err error
	for range 3 { // a machine that is busy may be late
		began := time.Now()
		if err = n.visitors.TCP(from, at(from)); err == nil {
			n.held(time.Since(began), format, args...)
			return nil
		}
	}
	return fmt.Errorf("%v is not answered on port %d: %w", from, port, err)
}

// silence demands that a visitor gets no word at all, and says so.
func (n *node) silence(from netip.Addr, format string, args ...any) error {
	n.does(fmt.Sprintf("outside curl --interface %s telnet://%s", from, at(from)))
	began := time.Now()
	err := n.visitors.TCP(from, at(from))
	if late := net.Error(nil); !errors.As(err, &late) || !late.Timeout() {
		return fmt.Errorf("%v on port %d: got %v, want no answer", from, port, err)
	}
	n.held(time.Since(began), format, args...)
	return nil
}

// lost tells whether a datagram of a visitor stays unanswered, and the next one
// too: one alone may have been unlucky.
func (n *node) lost(from netip.Addr) bool {
	for range 2 {
		if n.visitors.UDP(from, at(from)) == nil {
			return false
		}
	}
	return true
}

// drops has cscli make a decision, while a visitor sends a datagram every few
// milliseconds, and returns how long after the command was entered the first of
// them was dropped.
func (n *node) drops(ctx context.Context, from netip.Addr, args ...string) (time.Duration, error) {
	n.does("cscli " + strings.Join(args, " "))
	type end struct {
		at  time.Duration
		err error
	}
	ended := make(chan end, 1)
	began := time.Now()
	go func() {
		_, err := n.lapi.Cscli(ctx, args...)
		ended <- end{time.Since(began), err}
	}()
	var cscli *end
	for {
		sent := time.Since(began)
		if n.lost(from) {
			if cscli == nil {
				e := <-ended
				cscli = &e
			}
			return sent, cscli.err
		}
		if cscli == nil {
			select {
			case e := <-ended:
				cscli = &e
			default:
			}
		}
		if cscli != nil && (cscli.err != nil || sent > cscli.at+prompt) {
			return sent, errors.Join(cscli.err, fmt.Errorf("packets of %v still arrive %s after the ban", from, spoken(sent)))
		}
		if err := pause(ctx, 2*time.Millisecond); err != nil {
			return sent, err
		}
	}
}

// returns waits until a visitor gets through.
func (n *node) returns(ctx context.Context, from netip.Addr) (time.Duration, error) {
	began := time.Now()
	for n.visitors.UDP(from, at(from)) != nil {
		if time.Since(began) > prompt+time.Second {
			return 0, fmt.Errorf("packets of %v still do not arrive after %s", from, spoken(time.Since(began)))
		}
		if err := pause(ctx, 2*time.Millisecond); err != nil {
			return 0, err
		}
	}
	return time.Since(began), nil
}

// blast is packets of the banned visitor without a pause.
type blast struct {
	node    *node
	blaster *netns.Blaster
	before  int
}

func (n *node) blast() *blast {
	return &blast{n, n.visitors.Blast(at(banned), banned), n.service.Received()[banned]}
}

// stop ends it and returns how many packets were sent, and how many passed.
func (b *blast) stop() (sent, passed int, err error) {
	sent, err = b.blaster.Stop()
	// What passed may wait in the service's socket.
	for last := -1; passed != last; {
		last = passed
		time.Sleep(50 * time.Millisecond)
		passed = b.node.service.Received()[banned] - b.before
	}
	return sent, passed, err
}

// none demands that not one of the packets passed, and says so.
func (b *blast) none(took time.Duration, meanwhile string) error {
	sent, passed, err := b.stop()
	switch {
	case err != nil:
		return err
	case sent < 1000:
		return fmt.Errorf("only %d packets of %v were sent: they show nothing", sent, banned)
	case passed > 0:
		return fmt.Errorf("%d of %d packets of %v passed %s", passed, sent, banned, meanwhile)
	}
	b.node.held(took, "%d packets of %v sent %s, not one passed", sent, banned, meanwhile)
	return nil
}

// stage is to package netns what a test is: it ends what was begun.
type stage struct{ ends []func() }

// broken is how Fatal gets out.
type broken struct{ error }

// Helper is for tests.
func (s *stage) Helper() {}

// Cleanup has f called at the end.
func (s *stage) Cleanup(f func()) { s.ends = append(s.ends, f) }

// Fatal leaves what try called.
func (s *stage) Fatal(args ...any) { panic(broken{errors.New(fmt.Sprint(args...))}) }

// Fatalf leaves what try called.
func (s *stage) Fatalf(format string, args ...any) { panic(broken{fmt.Errorf(format, args...)}) }

// try calls f and returns what it left with.
func (s *stage) try(f func()) (err error) {
	defer func() {
		switch r := recover().(type) {
		case nil:
		case broken:
			err = r.error
		default:
			panic(r)
		}
	}()
	f()
	return nil
}

func (s *stage) close() {
	for i := len(s.ends) - 1; i >= 0; i-- {
		s.ends[i]()
	}
	s.ends = nil
}

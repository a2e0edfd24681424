package bouncer

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/edgeward/edgeward/internal/daemon"
	"github.com/edgeward/edgeward/internal/decision"
	"github.com/edgeward/edgeward/internal/netns"
	"github.com/edgeward/edgeward/internal/nft"
)

// A probe shows that this node drops what is banned, with packets: from a
// namespace that is a stranger to the node, over a cable of its own, from
// addresses that are nobody's because they are kept for documentation.
var probed = []struct {
	ipType    string
	near, far netip.Prefix // the node's end and the stranger's
}{
	{"ipv4", netip.MustParsePrefix("198.51.100.249/30"), netip.MustParsePrefix("198.51.100.250/30")},
	{"ipv6", netip.MustParsePrefix("2001:db8:edfe::1/126"), netip.MustParsePrefix("2001:db8:edfe::2/126")},
}

const (
	// probeLink is the node's end of the cable. No pattern for the interfaces
	// of containers covers it, or the probe would show nothing.
	probeLink   = "ewprobe0"
	probeOrigin = "edgeward-probe"
	probeClass  = "ban/" + probeOrigin
	// probeBan is how long the kernel keeps a test ban that nobody lifts.
	probeBan = 15 * time.Second
	// probeWait is how long a packet that passes may take.
	probeWait = 400 * time.Millisecond
)

// probe bans the test addresses for a few seconds, or lifts that.
func (b *Bouncer) probe(q url.Values, _ string) (Answer, error) {
	if err := b.Ready(); err != nil {
		return Answer{}, fmt.Errorf("probe: %w", err)
	}
	if err := b.enforcer.probe(q.Get("end") == ""); err != nil {
		return Answer{}, fmt.Errorf("probe: %w", err)
	}
	return Answer{Says: "done"}, nil
}

func (e *enforcer) probe(on bool) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.installed {
		return nft.ErrNotInstalled
	}
	r := e.reading.Load()
	now := e.now()
	changes := nft.Changes{}
	for _, p := range probed {
		addr := p.far.Addr()
		if _, held := r.all.Exactly(r.table, single(addr), now); held {
			return fmt.Errorf("a decision holds the test address %v", addr)
		}
		if on {
			class := decision.Class{Type: "ban", Origin: probeOrigin, Remediation: decision.Ban}
			changes.Put = append(changes.Put, nft.Element{Addr: addr, Class: e.mark(class, decision.Ban), Timeout: probeBan})
		} else {
			changes.Delete = append(changes.Delete, addr)
		}
	}
	if on {
		changes.Classes = e.classes
		e.probed = now
	}
	if err := e.kernel.Update(changes); err != nil {
		e.installed = false
		e.note(func(r *report) { r.Failures++; r.Installed, r.Err = false, err })
		return err
	}
	e.held = -1
	return nil
}

// ErrNotDropped says that a probe ended, and did not show that this node drops.
var ErrNotDropped = errors.New("this node does not drop what is banned")

// Probe is what a probe showed.
type Probe struct {
	// Drops says that packets of each family that the node has came through
	// without a ban, and were counted and dropped with it.
	Drops    bool           `json:"drops"`
	Families []ProbedFamily `json:"families"`
}

// ProbedFamily is what a probe showed of IPv4 or IPv6.
type ProbedFamily struct {
	IPType string `json:"ipType"`
	Drops  bool   `json:"drops"`
	// Counted is how many packets the ban met.
	Counted uint64 `json:"counted"`
	Says    string `json:"says"`
}

// RunProbe asks the agent at the socket to ban test addresses, and sends packets
// from them. c is the agent's configuration. It needs root, with CAP_SYS_ADMIN,
// because it makes a network namespace; nothing of it stays, also if ctx or the
// process ends.
func RunProbe(ctx context.Context, c *Config, socket string) (p Probe, err error) {
	status, err := AskStatus(ctx, socket)
	switch {
	case err != nil:
		return p, fmt.Errorf("probe: %w", err)
	case status.Ready != "yes":
		return p, fmt.Errorf("probe: the agent is not ready: %s", status.Ready)
	}
	for _, pattern := range c.Firewall.Exempt {
		if bare, any := strings.CutSuffix(pattern, "*"); pattern == probeLink || any && strings.HasPrefix(probeLink, bare) {
			return p, fmt.Errorf("probe: firewall.exempt has %q, which covers the probe's interface %s: it would show nothing", pattern, probeLink)
		}
	}
	own, err := net.InterfaceAddrs()
	if err != nil {
		return p, fmt.Errorf("probe: %w", err)
	}
	for _, a := range own {
		for _, f := range probed {
			if n, err := netip.ParsePrefix(a.String()); err == nil && n.Overlaps(f.near) {
				return p, fmt.Errorf("probe: this node has the address %v, in a range for documentation that the probe needs", n)
			}
		}
	}
	stranger, err := netns.Attach(probeLink)
	if err != nil {
		return p, fmt.Errorf("probe: %w", err)
	}
	defer func() {
		if end := stranger.Close(); end != nil {
			err = errors.Join(err, fmt.Errorf("probe: %w", end))
		}
	}()
	p.Drops = true
	var tries []*try
	for i, f := range probed {
		t := &try{stranger: stranger, ProbedFamily: ProbedFamily{IPType: f.ipType}, from: f.far.Addr()}
		if err := stranger.Address(f.near, f.far); err != nil {
			if i == 0 {
				return p, fmt.Errorf("probe: %w", err)
			}
			p.Families = append(p.Families, ProbedFamily{IPType: f.ipType, Drops: true, Says: "not probed, because this node has no IPv6: " + err.Error()})
			continue
		}
		if err := t.listen(f.near.Addr()); err != nil {
			return p, fmt.Errorf("probe: %w", err)
		}
		defer t.close()
		tries = append(tries, t)
	}
	together := func(f func(*try)) {
		var wg sync.WaitGroup
		for _, t := range tries {
			wg.Go(func() { f(t) })
		}
		wg.Wait()
	}
	together(func(t *try) {
		// The first packets may be lost while the cable comes up.
		for attempt := 0; attempt < 2 && !t.free; attempt++ {
			t.free = t.passes(ctx)
		}
		if !t.free {
			t.Says = "test packets do not arrive even without a ban: another firewall on this node stops them, or a ban or lock of ours does"
		}
	})
	if ctx.Err() == nil {
		before := counted(status)
		if err := askProbe(ctx, socket, true); err != nil {
			return p, err
		}
		// Lifted even if ctx has ended; else the kernel does it.
		defer func() { err = errors.Join(err, askProbe(context.WithoutCancel(ctx), socket, false)) }()
		together(func(t *try) { t.banned = !t.passes(ctx) })
		if status, err = AskStatus(ctx, socket); err != nil {
			return p, fmt.Errorf("probe: %w", err)
		}
		for _, t := range tries {
			t.Counted = counted(status)[t.IPType] - before[t.IPType]
			t.judge(c, status)
		}
	}
	for _, t := range tries {
		p.Families = append(p.Families, t.ProbedFamily)
	}
	slices.SortFunc(p.Families, func(a, b ProbedFamily) int { return strings.Compare(a.IPType, b.IPType) })
	for _, f := range p.Families {
		p.Drops = p.Drops && f.Drops
	}
	if ctx.Err() != nil {
		return p, fmt.Errorf("probe: %w", ctx.Err())
	}
	if !p.Drops {
		return p, ErrNotDropped
	}
	return p, nil
}

func askProbe(ctx context.Context, socket string, on bool) error {
	form := url.Values{}
	if !on {
		form.Set("end", "true")
	}
	return daemon.Order(ctx, socket, "/v1/probe", form, &Answer{})
}

// counted is how many packets met the test ban, by family.
func counted(s Status) map[string]uint64 {
	out := map[string]uint64{}
	for _, d := range s.Dropped {
		if d.Origin == probeOrigin {
			out[d.IPType] += d.Packets
		}
	}
	return out
}

// try is the probe of one family.
type try struct {
	ProbedFamily
	stranger *netns.Stranger
	from     netip.Addr
	tcp      net.Listener
	udp      net.PacketConn
	free     bool // packets arrived without a ban
	banned   bool // and with it they did not
}

func (t *try) listen(addr netip.Addr) error {
	var err error
	at := netip.AddrPortFrom(addr, 0).String()
	if t.tcp, err = net.Listen("tcp", at); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	if t.udp, err = net.ListenPacket("udp", at); err != nil {
		return errors.Join(fmt.Errorf("listen: %w", err), t.tcp.Close())
	}
	return nil
}

func (t *try) close() {
	_ = t.tcp.Close()
	_ = t.udp.Close()
}

// passes sends from the stranger, over UDP and TCP, and reports whether any of it
// arrives.
func (t *try) passes(ctx context.Context) bool {
	token := []byte(rand.Text())
	err := t.stranger.Run(func() error {
		c, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(t.from, 0)), t.udp.LocalAddr().(*net.UDPAddr))
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write(token)
		return err
	})
	buf := make([]byte, 64)
	_ = t.udp.SetReadDeadline(time.Now().Add(probeWait))
	for err == nil {
		var n int
		if n, _, err = t.udp.ReadFrom(buf); err == nil && string(buf[:n]) == string(token) {
			return true
		}
	}
	return t.stranger.Run(func() error {
		dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(t.from, 0)), Timeout: probeWait}
		c, err := dialer.DialContext(ctx, "tcp", t.tcp.Addr().String())
		if err == nil {
			_ = c.Close()
		}
		return err
	}) == nil
}

// judge says what the family's packets have shown.
func (t *try) judge(c *Config, s Status) {
	protected := whyProtected(s.Protected, single(t.from))
	waived := s.Orders.why(t.from, time.Now())
	switch {
	case t.free && t.banned && t.Counted > 0:
		t.Drops = true
		t.Says = "packets arrive without a ban, and are dropped with it"
	case !t.free && t.Counted > 0 && s.Mode == Enforce && t.banned:
		t.Says += "; the test ban met them all the same"
	case !t.free:
	case t.banned:
		t.Says = "packets stop arriving with a ban, but the ban did not meet them: is the agent in another network namespace?"
	case s.StoodDown:
		t.Says = "the agent stood down after cleanup"
	case s.Mode == Observe:
		t.Says = "packets arrive in spite of a ban, because the mode is observe: they are counted and pass"
	case protected != "":
		t.Says = "packets arrive in spite of a ban, because the test address is protected: " + protected
	case waived != "":
		t.Says = "packets arrive in spite of a ban, because " + waived
	case !slices.Contains(c.Firewall.Points, "prerouting") && !slices.Contains(c.Firewall.Points, "input"):
		t.Says = "packets for this machine arrive in spite of a ban, because firewall.points leaves them out"
	default:
		t.Says = "packets arrive in spite of a ban, and nothing that this agent knows of explains it: look at nft list table inet edgeward"
	}
}

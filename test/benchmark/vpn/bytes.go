package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"sync/atomic"
	"time"

	"github.com/edgeward/edgeward/internal/nft"
	"github.com/edgeward/edgeward/test/benchmark/figures"
	"github.com/edgeward/edgeward/test/benchmark/stage"
)

// A carrier is a gateway that bytes go through, with its one client.
type carrier struct {
	name    string
	pid     int
	client  *client
	at      netip.AddrPort // of the server, on the gateway
	rates   [2][]float64   // MiB/s, up and down
	costs   [2][]float64   // seconds of the gateway's processor for a GiB
	sending atomic.Bool
	got     atomic.Int64
}

var ways = [2]string{"up", "down"}

// bytesPart moves bytes through wireguard-go as it is, through our device, and
// through that with access rules, by turns.
func bytesPart(s *stage.Scope, opts options) (string, error) {
	// All have connection tracking, as on a node of k3s.
	if out, err := exec.Command("nft", "add table inet tracking; add chain inet tracking input { type filter hook input priority 0; }; add rule inet tracking input ct state established accept").CombinedOutput(); err != nil {
		return "", fmt.Errorf("track connections: %w: %s", err, out)
	}
	var all []*carrier
	for i, name := range []string{"wireguard-go", "edgeward's device", "edgeward's device, access rules"} {
		c, err := newCarrier(s, opts, name, i)
		if err != nil {
			return "", fmt.Errorf("%s: %w", name, err)
		}
		all = append(all, c)
	}
	for round := range opts.rounds + 1 {
		order := slices.Clone(all)
		if round%2 == 1 {
			slices.Reverse(order) // so that none always comes after the same
		}
		for way := range ways {
			for _, c := range order {
				if err := c.move(s, way, opts.spell); err != nil {
					return "", fmt.Errorf("%s, %s: %w", c.name, ways[way], err)
				}
				last := len(c.rates[way]) - 1
				opts.say("bytes: %s, %s: %.0f MiB/s, %.2f s/GiB", c.name, ways[way], c.rates[way][last], c.costs[way][last])
				if round == 0 { // to warm up
					c.rates[way], c.costs[way] = nil, nil
				}
			}
		}
	}
	rows := [][]string{{"TCP through userspace", "up, MiB/s", "CPU, s/GiB", "down, MiB/s", "CPU, s/GiB", "resident at most, MB"}}
	for _, c := range all {
		row := []string{c.name}
		for way := range ways {
			row = append(row, digits(figures.SpreadOf(c.rates[way]).Median), fmt.Sprintf("%.2f", figures.SpreadOf(c.costs[way]).Median))
		}
		_, most, err := resident(c.pid)
		if err != nil {
			return "", err
		}
		rows = append(rows, append(row, digits(float64(most)/(1<<20))))
	}
	for _, pair := range [][2]int{{1, 0}, {2, 1}} {
		a, b := all[pair[0]], all[pair[1]]
		row := []string{fmt.Sprintf("%s over %s", a.name, b.name)}
		for way := range ways {
			row = append(row, ratio(a.rates[way], b.rates[way]), ratio(a.costs[way], b.costs[way]))
		}
		rows = append(rows, append(row, ""))
	}
	return figures.Table(rows) + fmt.Sprintf(`
One connection for %v each way, median of %d rounds by turns; the last lines are ratios
within a round, the median, least and most. Each gateway has %s peers and is a process of
its own, whose CPU this is; client and server share the processors with it.
`, opts.spell, opts.rounds, figures.Thousands(opts.peers)), nil
}

// ratio is the median of the rounds' ratios, with the least and the most.
func ratio(a, b []float64) string {
	var all []float64
	for i := range a {
		all = append(all, a[i]/b[i])
	}
	s := figures.SpreadOf(all)
	return fmt.Sprintf("%.2f (%.2f to %.2f)", s.Median, s.Least, s.Most)
}

// newCarrier starts a gateway with a network of its own, and joins it.
func newCarrier(s *stage.Scope, opts options, name string, i int) (*carrier, error) {
	c := &carrier{name: name}
	gateway := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(70 + i), 0, 1}), 16)
	p := plan{Name: fmt.Sprintf("edgeward%d", i), Plain: i == 0, Port: freePort(s), Address: gateway}
	key := secret()
	p.Key = hexOf(key)
	for n := range opts.peers - 1 {
		p.Peers = append(p.Peers, planned{Key: hexOf(secret()), Preshared: hexOf(secret()), Allowed: []netip.Prefix{host(numbered(gateway.Addr(), n+256))}})
	}
	var err error
	if c.client, err = join(s, gateway, key.Public(), p.Port); err != nil {
		return nil, err
	}
	p.Peers = append(p.Peers, planned{
		Key: hexOf(c.client.key.Public()), Preshared: hexOf(c.client.preshared), Allowed: []netip.Prefix{host(c.client.address)},
	})
	if c.pid, err = start(s, p); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", netip.AddrPortFrom(gateway.Addr(), 0).String())
	if err != nil {
		return nil, fmt.Errorf("serve: %w", err)
	}
	s.Cleanup(func() { l.Close() })
	c.at = l.Addr().(*net.TCPAddr).AddrPort()
	go c.serve(l)
	if i < 2 {
		return c, nil
	}
	conn, err := nft.OpenAccess(nft.Options{})
	if err != nil {
		return nil, err
	}
	s.Cleanup(func() { conn.Close() })
	a := manyPeers(opts.peers, nft.Reach{To: host(gateway.Addr()), Proto: nft.TCP, First: c.at.Port(), Last: c.at.Port()})
	a.Interface, a.Networks = p.Name, []netip.Prefix{gateway.Masked()}
	a.Sources = append(a.Sources, nft.Source{Prefix: host(c.client.address), Group: a.Groups[0].Name})
	if _, err := conn.Apply(a); err != nil {
		return nil, err
	}
	// What is not granted does not pass, so these rules are the ones that judge.
	other, err := net.Listen("tcp", netip.AddrPortFrom(gateway.Addr(), 0).String())
	if err != nil {
		return nil, fmt.Errorf("serve: %w", err)
	}
	defer other.Close()
	if conn, err := c.dial(s, other.Addr().String()); err == nil {
		conn.Close()
		return nil, errors.New("it lets in what is not granted")
	}
	return c, nil
}

func (c *carrier) dial(ctx context.Context, to string) (conn net.Conn, err error) {
	err = c.client.ns.Run(func() error {
		conn, err = (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, "tcp", to)
		return err
	})
	return conn, err
}

// serve sends, or takes, as much as it can over each connection.
func (c *carrier) serve(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			if c.sending.Load() {
				pour(conn)
			} else {
				c.drain(conn)
			}
		}()
	}
}

func pour(w io.Writer) {
	buf := make([]byte, 256<<10)
	for {
		if _, err := w.Write(buf); err != nil {
			return // it was closed: that is enough
		}
	}
}

func (c *carrier) drain(r io.Reader) {
	buf := make([]byte, 256<<10)
	for {
		n, err := r.Read(buf)
		c.got.Add(int64(n))
		if err != nil {
			return // likewise
		}
	}
}

// move moves bytes one way for some time, after a moment in which TCP finds its
// pace.
func (c *carrier) move(s *stage.Scope, way int, spell time.Duration) error {
	c.sending.Store(way == 1)
	conn, err := c.dial(s, c.at.String())
	if err != nil {
		return err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if way == 1 {
			c.drain(conn)
		} else {
			pour(conn)
		}
	}()
	defer func() { conn.Close(); <-done }()
	if err := stage.Wait(s, 250*time.Millisecond); err != nil {
		return err
	}
	before, err := figures.CPU(c.pid)
	if err != nil {
		return err
	}
	began, had := time.Now(), c.got.Load()
	if err := stage.Wait(s, spell); err != nil {
		return err
	}
	mib := float64(c.got.Load()-had) / (1 << 20)
	took := time.Since(began)
	after, err := figures.CPU(c.pid)
	if err != nil {
		return err
	}
	if mib == 0 {
		return errors.New("nothing arrives")
	}
	c.rates[way] = append(c.rates[way], mib/took.Seconds())
	c.costs[way] = append(c.costs[way], (after-before).Seconds()/mib*1024)
	return nil
}

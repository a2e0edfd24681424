package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/edgeward/edgeward/internal/daemon"
	"github.com/edgeward/edgeward/internal/netns"
	"github.com/edgeward/edgeward/test/rig"
	"github.com/edgeward/edgeward/tunnel/wireguard"
)

// vpn is the way in for those who are at home here: edgeward-tunnel is a gateway of
// WireGuard on the node, behind which there is a network of internal apps, and a
// phone that is somewhere else has the configuration that `edgeward peer add`
// prints.
type vpn struct {
	*gateway
	stage

	away, home *netns.NS
	laid       bool // the cables to them
	process    *rig.VPN
	phone      *phone // as what it is connected; nil for not yet
}

// What the VPN is made of. Both names end at the resolver of the gateway.
const (
	grafana = "grafana.home.arpa"
	nas     = "nas.home.arpa"

	vpnConfig = `  endpoint: NODE:51830
  addresses: [10.66.0.1/24]
  names: {zones: [home.arpa]}
services:
  - {name: grafana, host: grafana.home.arpa, addresses: [192.168.7.9], ports: [80/tcp]}
  - {name: nas, host: nas.home.arpa, addresses: [192.168.7.10], ports: [80/tcp]}
grants:
  - {to: [group:family], services: [grafana]}
peers: []
`
)

// layVPN makes what the VPN needs and starts nothing; it begins in the story. barred
// is why this machine cannot have it.
func layVPN(ctx, life context.Context, g *gateway) (v *vpn, barred, err error) {
	v = &vpn{gateway: g}
	v.process, err = rig.NewVPN(life, rig.VPNOptions{
		Program: filepath.Join(g.tunnel.programs, "edgeward-tunnel"), NetNS: g.node.file(g.node.machine),
		Config: strings.ReplaceAll(vpnConfig, "NODE", node4.String()),
	})
	if err != nil {
		return v, nil, err
	}
	if err := v.try(func() { v.away, v.home = netns.New(v), netns.New(v) }); err != nil {
		return v, nil, err
	}
	if barred = v.closedDoor(ctx); barred != nil {
		return nil, barred, v.close()
	}
	return v, nil, nil
}

// closedDoor is why no WireGuard can be had here; nil if it can.
func (v *vpn) closedDoor(ctx context.Context) error {
	if err := v.away.Run(func() error {
		tun, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open /dev/net/tun: %w", err)
		}
		defer unix.Close(tun)
		request, err := unix.NewIfreq("door")
		if err == nil {
			request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
			err = unix.IoctlIfreq(tun, unix.TUNSETIFF, request)
		}
		if err != nil {
			return fmt.Errorf("make an interface with /dev/net/tun: %w", err)
		}
		return nil
	}); err != nil {
		return err
	}
	// Our files may be where the processes have another /run.
	line := rig.OwnRun(v.node.file(v.away), "ls", v.process.Dir, v.tunnel.programs)
	if out, err := exec.CommandContext(ctx, line[0], line[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("give WireGuard a /run of its own: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// close ends the phone and the gateway, and with the last that knows them their
// networks.
func (v *vpn) close() error {
	if v.phone != nil {
		v.phone.close()
	}
	err := v.process.Close()
	v.stage.close()
	return err
}

// steps are those of the VPN. Without it they are left out and keep their numbers.
func (v *vpn) steps() []step {
	if v == nil {
		return make([]step, 3)
	}
	return []step{
		{"A VPN: a phone is let in, and reaches what was granted, by name", v.letIn},
		{"Who is there, and who tried what", v.listed},
		{"A phone is lost: its running transfer is cut", v.lost},
	}
}

// invite says what there is to play with; nothing where there is no VPN.
func (v *vpn) invite() string {
	if v == nil {
		return ""
	}
	return fmt.Sprintf(`
  phone curl http://%[1]s/
  phone curl http://%[2]s/
  edgeward peer list
  edgeward peer add tablet --group family
  phone curl -m 30 -o /dev/null http://%[1]s/backup &     # shows its speed
  edgeward peer revoke new-phone
  edgeward-tunnel status --config %[3]s

  VPN            %[3]s
                 with its log beside it
`, grafana, nas, v.process.ConfigFile)
}

// begin lays the cables and starts the gateway, unless that was done.
func (v *vpn) begin(ctx context.Context) error {
	if !v.laid {
		if err := v.try(v.lay); err != nil {
			return err
		}
		v.laid = true
	}
	if err := daemon.Ask(ctx, v.process.SocketPath, "/v1/vpn", nil, &wireguard.Status{}); err == nil {
		return nil
	}
	bounded, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	return v.process.Start(bounded)
}

func (v *vpn) lay() {
	prefix, addr := netip.MustParsePrefix, netip.MustParseAddr
	node := v.node.machine
	netns.Cable(
		netns.End{NS: v.away, Name: "mobile0", Addrs: []netip.Prefix{prefix("203.0.113.130/30")}},
		netns.End{NS: node, Name: "far0", Addrs: []netip.Prefix{prefix("203.0.113.129/30")}})
	v.away.Route(netip.PrefixFrom(node4, 32), addr("203.0.113.129"))
	netns.Cable(
		netns.End{NS: v.home, Name: "eth0", Addrs: []netip.Prefix{prefix("192.168.7.9/24"), prefix("192.168.7.10/24")}},
		netns.End{NS: node, Name: "lan0", Addrs: []netip.Prefix{prefix("192.168.7.1/24")}})
	v.home.Route(prefix("10.66.0.0/24"), addr("192.168.7.1"))
	for name, at := range map[string]string{"Grafana": "192.168.7.9:80", "the NAS": "192.168.7.10:80"} {
		app := &http.Server{Handler: app(name), ReadHeaderTimeout: 10 * time.Second}
		v.home.Must(func() error {
			listener, err := new(net.ListenConfig).Listen(context.Background(), "tcp", at)
			if err == nil {
				go func() { _ = app.Serve(listener) }() // ends when it is closed
			}
			return err
		})
		v.Cleanup(func() { _ = app.Close() })
	}
}

// app greets whoever asks, and /backup is without an end.
func app(name string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/backup" {
			from, _, _ := net.SplitHostPort(r.RemoteAddr)
			fmt.Fprintf(w, "%s welcomes %s\n", name, from)
			return
		}
		piece := make([]byte, 32<<10)
		for r.Context().Err() == nil {
			if _, err := w.Write(piece); err != nil {
				return
			}
			time.Sleep(2 * time.Millisecond) // the machine is to do other things as well
		}
	})
}

// peer shows an order about peers and gives it; a configuration that it prints goes
// to a file of ours.
func (v *vpn) peer(ctx context.Context, draws bool, args ...string) (file string, err error) {
	command := "edgeward peer " + strings.Join(args, " ")
	if args[0] == "add" {
		file = filepath.Join(v.process.Dir, args[1]+".conf")
		command += " >" + filepath.Base(file)
	}
	v.does(command)
	out, said, err := v.call(ctx, "edgeward", append([]string{"peer"}, args...)...)
	if err != nil {
		return "", err
	}
	drawn := 0
	for line := range strings.Lines(said) {
		if line = strings.TrimSuffix(line, "\n"); strings.HasPrefix(line, "\x1b[") {
			v.draws(line)
			drawn++
			continue
		}
		v.quotes(strings.ReplaceAll(line, v.process.Dir+"/", ""))
	}
	if draws && drawn < 20 {
		return "", fmt.Errorf("no QR code was drawn, but %q", said)
	}
	if file == "" {
		return "", nil
	}
	if err := os.WriteFile(file, []byte(out), 0o600); err != nil {
		return "", fmt.Errorf("keep the phone's configuration: %w", err)
	}
	return file, nil
}

// join lets the phone in under a name and has it connect, as one that scans the
// code does.
func (v *vpn) join(ctx context.Context, name, qr string) error {
	file, err := v.peer(ctx, qr == "always", "add", name, "--group", "family", "--qr", qr)
	if err != nil {
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	began := time.Now()
	// The gateway reads its file while the command returns, and WireGuard asks a
	// gateway that does not know it again after 5 s only.
	if err := v.until(bounded, name, func(p wireguard.PeerStatus) bool { return p.State == wireguard.Live }); err != nil {
		return err
	}
	if v.phone != nil {
		v.phone.close()
		v.phone = nil
	}
	if v.phone, err = connect(bounded, v.away, v.node.file(v.away), v.process.Dir, file); err != nil {
		return err
	}
	if err := v.command("phone", v.node.enter(v.away, fmt.Sprintf(" --mount=/proc/%d/ns/mnt", v.phone.cmd.Process.Pid))); err != nil {
		return err
	}
	v.does("# the phone, which is in another network, reads that and connects")
	// A datagram to the resolver and back is a handshake and a packet.
	if _, err := v.get(bounded, "http://"+grafana+"/"); err != nil {
		return err
	}
	v.held(time.Since(began), "connected by UDP to %s:51830, after", node4)
	return nil
}

// until waits until the gateway says something of a peer.
func (v *vpn) until(ctx context.Context, name string, says func(wireguard.PeerStatus) bool) error {
	for {
		var s wireguard.Status
		if err := daemon.Ask(ctx, v.process.SocketPath, "/v1/vpn", nil, &s); err != nil {
			return err
		}
		if slices.ContainsFunc(s.Peers, func(p wireguard.PeerStatus) bool { return string(p.Name) == name && says(p) }) {
			return nil
		}
		if err := pause(ctx, 5*time.Millisecond); err != nil {
			return fmt.Errorf("wait for what the gateway says of %s: %w", name, err)
		}
	}
}

// present has the phone connected, if it is not.
func (v *vpn) present(ctx context.Context) error {
	if err := v.begin(ctx); err != nil || v.phone != nil {
		return err
	}
	return v.join(ctx, "phone", "never")
}

// get asks from the phone.
func (v *vpn) get(ctx context.Context, url string) (answer, error) {
	return fetch(ctx, v.phone.browser(), url)
}

// answered shows a request of the phone and demands its answer.
func (v *vpn) answered(ctx context.Context, host, says string) error {
	v.does("phone curl http://" + host + "/")
	a, err := v.get(ctx, "http://"+host+"/")
	if err != nil {
		return err
	}
	if want := "Grafana welcomes " + v.phone.addr.String(); a.status != http.StatusOK || strings.TrimSpace(a.body) != want {
		return fmt.Errorf("%s answers %d: %s: want 200: %s", host, a.status, strings.TrimSpace(a.body), want)
	}
	v.held(a.took, "%s", says)
	v.quotes(a.body)
	return nil
}

// refused shows an attempt of the phone and demands that it is refused, not
// ignored.
func (v *vpn) refused(ctx context.Context, to, typed, says string) error {
	v.does("phone curl " + typed)
	bounded, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	began := time.Now()
	conn, err := v.phone.dial(bounded, "tcp", to)
	took := time.Since(began)
	if err == nil {
		return errors.Join(fmt.Errorf("the phone reaches %s, which nobody granted it", to), conn.Close())
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("the phone is to be refused %s at once: %w", to, err)
	}
	v.held(took, "%s", says)
	return nil
}

func (v *vpn) letIn(ctx context.Context) error {
	v.does("edgeward-tunnel run --role wireguard    # on the node, before internal apps")
	began := time.Now()
	if err := v.begin(ctx); err != nil {
		return err
	}
	v.held(time.Since(began), "the gateway is up, and lets nobody in, after")
	if err := v.join(ctx, "phone", "always"); err != nil {
		return err
	}
	if err := v.answered(ctx, grafana, "200: by a name that the gateway answers"); err != nil {
		return err
	}
	if err := v.refused(ctx, nas+":80", "http://"+nas+"/", "refused at once: nobody granted it the NAS"); err != nil {
		return err
	}
	return v.refused(ctx, "10.66.0.1:22", "telnet://10.66.0.1:22", "refused: nor the node's own ssh")
}

func (v *vpn) listed(ctx context.Context) error {
	if err := v.present(ctx); err != nil {
		return err
	}
	if err := v.refused(ctx, nas+":80", "http://"+nas+"/", "refused at once"); err != nil {
		return err
	}
	// What the gateway says of traffic may be a second old.
	bounded, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := v.until(bounded, "phone", func(p wireguard.PeerStatus) bool { return !p.Handshake.IsZero() }); err != nil {
		return err
	}
	began := time.Now()
	out, err := v.types(ctx, "edgeward", "peer", "list")
	if err != nil {
		return err
	}
	for _, want := range []string{"phone", "live", " ago", "203.0.113.130:", "refused"} {
		if !strings.Contains(out, want) {
			return fmt.Errorf("the list does not say %q: %s", want, out)
		}
	}
	v.held(time.Since(began), "handshake, traffic, endpoint, and what was refused")
	v.quotes(out)
	if out, err = v.types(ctx, "edgeward", "peer", "show", "phone"); err != nil {
		return err
	}
	_, services, found := strings.Cut(out, "\n\n")
	if !found || !strings.Contains(services, grafana) || strings.Contains(services, nas) {
		return fmt.Errorf("what the phone reaches is shown as %s", out)
	}
	v.shows("...")
	v.quotes(services)
	return nil
}

func (v *vpn) lost(ctx context.Context) error {
	if err := v.present(ctx); err != nil {
		return err
	}
	v.does("phone curl http://" + grafana + "/backup >/dev/null &")
	running, cancel := context.WithCancel(ctx)
	defer cancel()
	x, err := v.transfer(running, "http://"+grafana+"/backup")
	if err != nil {
		return err
	}
	before := x.bytes.Load()
	began := time.Now()
	if err := pause(ctx, 200*time.Millisecond); err != nil {
		return err
	}
	v.held(time.Since(began), "it runs: %.1f MB in", float64(x.bytes.Load()-before)/1e6)
	began = time.Now()
	if _, err := v.peer(ctx, false, "revoke", "phone"); err != nil {
		return err
	}
	last, err := x.silent(ctx, began)
	if err != nil {
		return err
	}
	if last > prompt {
		return fmt.Errorf("the transfer ran for %s after the revocation, want at most %s", spoken(last), prompt)
	}
	v.held(last, "cut: the last byte came, counted from the command, after")
	v.does("phone curl -m 1 http://192.168.7.9/")
	bounded, done := context.WithTimeout(ctx, 300*time.Millisecond)
	defer done()
	began = time.Now()
	if conn, err := v.phone.dial(bounded, "tcp", "192.168.7.9:80"); err == nil {
		return errors.Join(errors.New("a phone that was revoked is connected again"), conn.Close())
	} else if late := net.Error(nil); !errors.As(err, &late) || !late.Timeout() {
		return fmt.Errorf("a phone that was revoked is to get no word, but %w", err)
	}
	v.held(time.Since(began), "no answer: to the gateway its key is nobody's; waited")
	// Whoever plays along afterwards has one that is let in.
	if err := v.join(ctx, "new-phone", "never"); err != nil {
		return err
	}
	return v.answered(ctx, grafana, "200: a new one has new keys")
}

// transfer is an answer that does not end.
type transfer struct {
	bytes atomic.Int64
	last  atomic.Int64 // when bytes last came, in Unix nanoseconds
}

// transfer begins one, and returns when it runs. It ends with ctx.
func (v *vpn) transfer(ctx context.Context, url string) (*transfer, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, fmt.Errorf("begin a transfer: %w", err)
	}
	res, err := v.phone.browser().Do(req)
	if err != nil {
		return nil, fmt.Errorf("begin a transfer: %w", err)
	}
	x := new(transfer)
	go func() {
		defer res.Body.Close()
		_, _ = io.Copy(x, res.Body) // it is cut
	}()
	for began := time.Now(); x.bytes.Load() < 100<<10; {
		if time.Since(began) > 5*time.Second {
			return nil, fmt.Errorf("the transfer has brought %d bytes in 5 s", x.bytes.Load())
		}
		if err := pause(ctx, 5*time.Millisecond); err != nil {
			return nil, err
		}
	}
	return x, nil
}

// Write takes what came.
func (x *transfer) Write(p []byte) (int, error) {
	x.bytes.Add(int64(len(p)))
	x.last.Store(time.Now().UnixNano())
	return len(p), nil
}

// silent waits until nothing has come for a while, and returns how long after since
// the last byte came.
func (x *transfer) silent(ctx context.Context, since time.Time) (time.Duration, error) {
	for {
		last := time.Unix(0, x.last.Load())
		switch {
		case time.Since(last) > 500*time.Millisecond:
			return max(0, last.Sub(since)), nil
		case time.Since(since) > 5*time.Second:
			return 0, fmt.Errorf("the transfer still runs %s after it was to end", spoken(time.Since(since)))
		}
		if err := pause(ctx, 10*time.Millisecond); err != nil {
			return 0, err
		}
	}
}

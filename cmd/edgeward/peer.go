package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/edgeward/edgeward/internal/command"
	"github.com/edgeward/edgeward/internal/config"
	"github.com/edgeward/edgeward/internal/daemon"
	"github.com/edgeward/edgeward/tunnel"
	"github.com/edgeward/edgeward/tunnel/wireguard"
	"github.com/edgeward/edgeward/tunnel/wireguard/book"
)

// socketFlag names the flag for another socket than the file's.
const socketFlag = "socket"

// peerCommands are the verbs on peers. path is where the flag --config is kept.
func peerCommands(path *string) *cobra.Command {
	peer := &cobra.Command{Use: "peer", Short: "Peers of the VPN: who they are, how they fare, what they may reach"}
	peer.PersistentFlags().String(socketFlag, "", "ask the gateway at the socket `FILE` (default: what the configuration says)")
	peer.AddCommand(
		addCommand(path),
		rotateCommand(path),
		importCommand(path),
		revokeCommand(path),
		onPeer(path, &cobra.Command{Use: "enable NAME", Short: "Let in a peer that was shut out"}, setEnabled(true)),
		onPeer(path, &cobra.Command{Use: "disable NAME", Short: "Shut a peer out, and keep all that is declared of it"}, setEnabled(false)),
		showCommand(path),
		&cobra.Command{
			Use: "list", Short: "Show all peers, with what the gateway knows of them", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				v, err := openVPN(cmd, *path)
				if err != nil {
					return listRunning(cmd, *path, err)
				}
				return listPeers(cmd, v)
			},
		},
		planCommand(path),
	)
	return peer
}

// onPeer makes a verb of what is done with one peer, which is declared.
func onPeer(path *string, cmd *cobra.Command, do func(*cobra.Command, *vpn, *wireguard.Peer) error) *cobra.Command {
	cmd.Args = command.One("name", "alice-phone")
	cmd.ValidArgsFunction = func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		var names []string
		if c, err := tunnel.Load(*path); err == nil && len(args) == 0 {
			for _, p := range c.VPN().Peers {
				names = append(names, string(p.Name))
			}
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		v, err := openVPN(cmd, *path)
		if err != nil {
			return err
		}
		p, err := v.peer(args[0])
		if err != nil {
			return err
		}
		return do(cmd, v, p)
	}
	return cmd
}

// vpn is the VPN as the file declares it and, where it answers, as the gateway
// has it.
type vpn struct {
	path     string
	text     []byte // of the file, as it was read
	config   *wireguard.Config
	warnings []string
	socket   string
	// status is nil where the gateway was not reached, and silent says why.
	status *wireguard.Status
	silent error
	leases wireguard.Leases
	// inForce says that the gateway has taken over the last change.
	inForce bool
}

func openVPN(cmd *cobra.Command, path string) (*vpn, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	c, err := tunnel.Parse(path, text)
	if err != nil {
		return nil, err
	}
	v := &vpn{path: path, text: text, config: c.VPN(), warnings: c.Warnings(), socket: cmp.Or(cmd.Flag(socketFlag).Value.String(), c.Socket)}
	if !v.config.Declared() {
		return nil, fmt.Errorf("%s declares no VPN: give it a section wireguard with the gateway's addresses, such as [10.66.0.1/24, fd66::1/64]", path)
	}
	v.askStatus(cmd.Context())
	// The addresses that the gateway gave to peers without any: from its file and,
	// where it answers, from itself. On another machine neither is at hand, and
	// most are the same all the same.
	if c.StateDir != "" {
		if v.leases, err = wireguard.LoadLeases(wireguard.LeasesPath(c.StateDir)); err != nil && !errors.Is(err, fs.ErrPermission) {
			return nil, err
		}
	}
	if v.leases.ByName == nil {
		v.leases.ByName = map[wireguard.Name]wireguard.Lease{}
	}
	if v.status != nil {
		for _, p := range v.status.Peers {
			v.leases.ByName[p.Name] = wireguard.Lease{Addresses: p.Addresses}
		}
	}
	return v, nil
}

// askStatus asks the gateway how it fares.
func (v *vpn) askStatus(ctx context.Context) {
	var s wireguard.Status
	v.status = nil
	if v.silent = v.ask(ctx, "/v1/vpn", &s); v.silent == nil {
		v.status = &s
	}
}

// elsewhere reports whether the gateway that answers follows another file than
// this one. One that does not say so is taken to follow this one.
func (v *vpn) elsewhere() bool {
	if v.status == nil || v.status.File == "" {
		return false
	}
	mine, err := os.Stat(v.path)
	if err != nil {
		return false
	}
	theirs, err := os.Stat(v.status.File)
	return err != nil || !os.SameFile(mine, theirs)
}

// ask puts a question to the gateway.
func (v *vpn) ask(ctx context.Context, question string, into any) error {
	if v.socket == "" {
		return fmt.Errorf("%s names no socket to ask at", v.path)
	}
	switch err := daemon.Ask(ctx, v.socket, question, nil, into); {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("only root may ask it at %s: use sudo", v.socket)
	case errors.Is(err, daemon.ErrNotRunning):
		return fmt.Errorf("%w at %s", daemon.ErrNotRunning, v.socket)
	default:
		return err
	}
}

// peer finds a peer that is declared.
func (v *vpn) peer(name string) (*wireguard.Peer, error) {
	if p := v.config.Peer(wireguard.Name(name)); p != nil {
		return p, nil
	}
	var names []string
	for _, p := range v.config.Peers {
		names = append(names, string(p.Name))
	}
	if meant := config.Nearest(name, names); meant != "" {
		return nil, fmt.Errorf("there is no peer %q: did you mean %q?", name, meant)
	}
	return nil, fmt.Errorf("there is no peer %q: edgeward peer list shows those that there are", name)
}

// of returns what the gateway says of a peer, or nil.
func (v *vpn) of(name wireguard.Name) *wireguard.PeerStatus {
	if v.status == nil {
		return nil
	}
	if i := slices.IndexFunc(v.status.Peers, func(p wireguard.PeerStatus) bool { return p.Name == name }); i >= 0 {
		return &v.status.Peers[i]
	}
	return nil
}

// desired is what c wants now, without its secrets. A peer for which there is no
// address left is unready in it.
func (v *vpn) desired(c *wireguard.Config) wireguard.Desired {
	leases := wireguard.Leases{ByName: maps.Clone(v.leases.ByName)}
	now := time.Now()
	addresses, _, _ := leases.Assign(c, now)
	known := *c
	known.PublicKey = v.server(c)
	return wireguard.Compile(&known, addresses, wireguard.Secrets{}, now)
}

// server is the gateway's public key: as declared, from its private key, where
// that can be read here, or as the gateway says it.
func (v *vpn) server(c *wireguard.Config) wireguard.PublicKey {
	if !c.PublicKey.IsZero() {
		return c.PublicKey
	}
	if key, err := wireguard.ReadPrivateKey(c.PrivateKeyFile); err == nil {
		return key.Public()
	}
	if v.status != nil {
		return v.status.PublicKey
	}
	return wireguard.PublicKey{}
}

// editTimeout is how long another edit of the file may take, and settleTimeout how
// long the gateway may take to have an edit in force before something is amiss.
const (
	editTimeout   = 10 * time.Second
	settleTimeout = 3 * time.Second
)

// change edits the file, once accepted, if any, has seen what it comes to, and
// says what that does to peers and sessions. What edit gets is the file as it is
// by then: another edit may have come before.
func (v *vpn) change(cmd *cobra.Command, edit func(text []byte, c *wireguard.Config) ([]byte, error), accepted func(*wireguard.Config) error) error {
	ctx, cancel := context.WithTimeout(cmd.Context(), editTimeout)
	defer cancel()
	was := v.config
	err := book.Edit(ctx, v.path, func(text []byte) ([]byte, error) {
		if !bytes.Equal(text, v.text) { // ten thousand peers take a while to read
			c, err := tunnel.Parse(v.path, text)
			if err != nil {
				return nil, err
			}
			was = c.VPN()
		}
		return edit(text, was)
	}, func(text []byte) error {
		c, err := tunnel.Parse(v.path, text)
		if err == nil {
			err = v.ownKey(was, c.VPN())
		}
		if err != nil {
			return errors.Join(errors.New("nothing is written, because the file would be wrong"), err)
		}
		v.config = c.VPN()
		if accepted == nil {
			return nil
		}
		return accepted(v.config)
	})
	if err != nil {
		return err
	}
	plan := wireguard.NewPlan(v.desired(was), v.desired(v.config))
	if v.status != nil && !v.elsewhere() {
		plan = plan.Among(v.connected())
	}
	say(cmd, "%s: %s", v.path, plan)
	v.settle(cmd, plan)
	return nil
}

// ownKey fails if a peer is given the gateway's own key, which the file need not
// hold. The words are those of the file's check, which knows only what does.
func (v *vpn) ownKey(was, now *wireguard.Config) error {
	own := v.server(now)
	has := func(p *wireguard.Peer) bool {
		return p != nil && !own.IsZero() && (p.PublicKey == own || p.NextPublicKey == own)
	}
	for i := range now.Peers {
		if p := &now.Peers[i]; has(p) && !has(was.Peer(p.Name)) {
			key := "publicKey"
			if p.NextPublicKey == own {
				key = "nextPublicKey"
			}
			return fmt.Errorf("peers[%d].%s: is the gateway's own: every peer has its own", i, key)
		}
	}
	return nil
}

// connected are the peers that have a session.
func (v *vpn) connected() map[wireguard.Name]bool {
	out := map[wireguard.Name]bool{}
	if v.status != nil {
		for i := range v.status.Peers {
			out[v.status.Peers[i].Name] = connected(&v.status.Peers[i], time.Now())
		}
	}
	return out
}

// settle has the gateway read the file, and says what came of the changes.
func (v *vpn) settle(cmd *cobra.Command, plan wireguard.Plan) {
	switch {
	case v.status == nil:
		say(cmd, "it takes effect where a gateway reads this file: %v", v.silent)
		return
	case v.elsewhere():
		say(cmd, "it takes effect where a gateway reads this file: the one at %s reads %s", v.socket, v.status.File)
		return
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), settleTimeout)
	defer cancel()
	if err := daemon.Order(ctx, v.socket, "/v1/reload", nil, &struct{}{}); err != nil {
		say(cmd, "the gateway could not be told, and reads the file within seconds: %v", err)
		return
	}
	touched := map[wireguard.Name]bool{}
	for _, c := range plan.Changes {
		touched[c.Peer] = c.Peer != ""
	}
	want := v.desired(v.config)
	kept := 0 // how often what was missing was a peer that the gateway keeps out
	for pause := 20 * time.Millisecond; !v.inForce && kept < 6 && ctx.Err() == nil; pause *= 2 {
		var d wireguard.Desired
		if err := v.ask(ctx, "/v1/vpn/desired", &d); err == nil {
			v.inForce = !slices.ContainsFunc(wireguard.NewPlan(d, want).Changes, func(c wireguard.Change) bool { return touched[c.Peer] })
			if slices.ContainsFunc(d.Idle, func(p wireguard.IdlePeer) bool { return touched[p.Name] && p.State == wireguard.Unready }) {
				kept++
			}
		}
		if !v.inForce {
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
		}
	}
	if v.askStatus(cmd.Context()); v.status == nil {
		say(cmd, "the gateway does not answer any more: %v", v.silent)
		return
	}
	trouble := cmp.Or(v.status.FileProblem, v.status.Problem)
	for i := range v.status.Peers {
		if p := &v.status.Peers[i]; touched[p.Name] && p.State == wireguard.Unready {
			trouble = cmp.Or(trouble, fmt.Sprintf("%s is unready: %s", p.Name, p.Why))
		}
	}
	switch {
	case v.inForce && trouble == "":
		say(cmd, "the gateway has it in force")
	case v.inForce:
		say(cmd, "the gateway has it in force, and a trouble: %s", trouble)
	case trouble != "":
		say(cmd, "the gateway has not got it in force: %s", trouble)
	default:
		say(cmd, "the gateway has not got it in force yet: edgeward-tunnel status tells when")
	}
}

// say tells what is not the output that was asked for.
func say(cmd *cobra.Command, format string, args ...any) {
	fmt.Fprintln(cmd.ErrOrStderr(), command.Printable(fmt.Sprintf(format, args...)))
}

// reached is a service that a peer may reach.
type reached struct {
	Service   wireguard.Name `json:"service"`
	Host      wireguard.Host `json:"host,omitempty"`
	Addresses []string       `json:"addresses"`
	Ports     []string       `json:"ports"`
	// Through are the subjects of the grants, such as group:family.
	Through []string `json:"through,omitempty"`
}

// String is the service, and why it is reached.
func (r reached) String() string {
	return fmt.Sprintf("%s (%s)", r.Service, strings.Join(r.Through, ", "))
}

// reaches returns what a peer may reach, and why.
func reaches(c *wireguard.Config, p *wireguard.Peer) []reached {
	out := []reached{}
	granted := c.Granted(p.Name, p.Groups)
	for _, s := range c.Services {
		through, ok := granted[s.Name]
		if !ok {
			continue
		}
		out = append(out, reachedBy(&s, through))
	}
	return out
}

func reachedBy(s *wireguard.Service, through []wireguard.Subject) reached {
	r := reached{Service: s.Name, Host: s.Host}
	for _, a := range s.Addresses {
		r.Addresses = append(r.Addresses, strings.TrimSuffix(strings.TrimSuffix(a.String(), "/32"), "/128"))
	}
	for _, p := range s.Ports {
		r.Ports = append(r.Ports, p.String())
	}
	for _, t := range through {
		r.Through = append(r.Through, t.String())
	}
	return r
}

// tellReach says in a line what a peer may reach.
func tellReach(cmd *cobra.Command, c *wireguard.Config, p *wireguard.Peer) {
	all := reaches(c, p)
	if len(all) == 0 {
		say(cmd, "%s reaches nothing yet: no grant names it or one of its groups", p.Name)
		return
	}
	say(cmd, "%s reaches %s", p.Name, joined(all))
}

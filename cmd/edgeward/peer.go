package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
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

// peerCommands are the verbs on peers. path is where the flag --config is kept.
func peerCommands(path *string) *cobra.Command {
	peer := &cobra.Command{Use: "peer", Short: "Peers of the VPN: who they are, how they fare, what they may reach"}
	peer.AddCommand(
		addCommand(path),
		rotateCommand(path),
		importCommand(path),
		onPeer(path, &cobra.Command{Use: "revoke NAME", Short: "Take a peer out of the file: it is cut off at once"}, revoke),
		onPeer(path, &cobra.Command{Use: "enable NAME", Short: "Let in a peer that was shut out"}, setEnabled(true)),
		onPeer(path, &cobra.Command{Use: "disable NAME", Short: "Shut a peer out, and keep all that is declared of it"}, setEnabled(false)),
		onPeer(path, &cobra.Command{Use: "show NAME", Short: "Show all about a peer but its secrets, and what it reaches and why"}, showPeer),
		&cobra.Command{
			Use: "list", Short: "Show all peers, with what the gateway knows of them", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				v, err := openVPN(cmd, *path)
				if err != nil {
					return err
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
	path   string
	config *wireguard.Config
	socket string
	// status is nil where the gateway was not reached, and silent says why.
	status *wireguard.Status
	silent error
	leases wireguard.Leases
}

func openVPN(cmd *cobra.Command, path string) (*vpn, error) {
	c, err := tunnel.Load(path)
	if err != nil {
		return nil, err
	}
	v := &vpn{path: path, config: c.VPN(), socket: c.Socket}
	if !v.config.Declared() {
		return nil, fmt.Errorf("%s declares no VPN: give it a section wireguard with the gateway's addresses, such as [10.66.0.1/24, fd66::1/64]", path)
	}
	var s wireguard.Status
	if v.silent = v.ask(cmd.Context(), "/v1/vpn", &s); v.silent == nil {
		v.status = &s
	}
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

// editTimeout is how long another edit of the file may take.
const editTimeout = 10 * time.Second

// change edits the file, once accepted, if any, has seen what it comes to, and
// says what that does to peers and sessions. What edit gets is the file as it is
// by then: another edit may have come before.
func (v *vpn) change(cmd *cobra.Command, edit func(text []byte, c *wireguard.Config) ([]byte, error), accepted func(*wireguard.Config) error) error {
	ctx, cancel := context.WithTimeout(cmd.Context(), editTimeout)
	defer cancel()
	was := v.config
	err := book.Edit(ctx, v.path, func(text []byte) ([]byte, error) {
		c, err := tunnel.Parse(v.path, text)
		if err != nil {
			return nil, err
		}
		was = c.VPN()
		return edit(text, was)
	}, func(text []byte) error {
		c, err := tunnel.Parse(v.path, text)
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
	say(cmd, "%s: %s", v.path, wireguard.NewPlan(v.desired(was), v.desired(v.config)))
	if v.status == nil {
		say(cmd, "it takes effect where a gateway reads this file: %v", v.silent)
	} else if err := daemon.Order(cmd.Context(), v.socket, "/v1/reload", nil, &struct{}{}); err != nil {
		say(cmd, "the gateway reads it within seconds")
	} else {
		say(cmd, "the gateway reads it now")
	}
	return nil
}

// say tells what is not the output that was asked for.
func say(cmd *cobra.Command, format string, args ...any) {
	fmt.Fprintf(cmd.ErrOrStderr(), format+"\n", args...)
}

// reached is a service that a peer may reach.
type reached struct {
	Service   wireguard.Name `json:"service"`
	Host      wireguard.Host `json:"host,omitempty"`
	Addresses []string       `json:"addresses"`
	Ports     []string       `json:"ports"`
	// Through are the subjects of the grants, such as group:family.
	Through []string `json:"through"`
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
		out = append(out, r)
	}
	return out
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

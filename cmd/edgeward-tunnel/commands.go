package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/edgeward/edgeward/internal/command"
	"github.com/edgeward/edgeward/internal/daemon"
	"github.com/edgeward/edgeward/tunnel"
	"github.com/edgeward/edgeward/tunnel/wireguard"
	"github.com/edgeward/edgeward/tunnel/wireguard/gateway"
)

// commands is the command line.
func commands() *cobra.Command {
	var path, socket string
	var role roles
	root := command.New("edgeward-tunnel", "Keep public hosts reachable through Cloudflare without banned visitors, and internal ones through a VPN")
	root.PersistentFlags().StringVar(&path, "config", "/etc/edgeward/tunnel.yaml", "configuration `FILE`")
	root.PersistentFlags().StringVar(&socket, "socket", "", "unix socket `FILE` at which the running program is asked (default: what the configuration says)")
	root.PersistentFlags().Var(&role, "role", "what to be: cloudflare, wireguard, or both with a comma (default: what the file has sections for)")
	root.AddCommand(
		&cobra.Command{
			Use: "run", Short: "Be the tunnel, the gateway of the VPN, or both", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), path, role) },
		},
		cleanupCommand(&path, &role),
		checkCommand(&path, &role),
		&cobra.Command{
			Use: "status", Short: "Show tunnels, connections and hosts, and the VPN", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				var s standing
				return ask(cmd, path, socket, "/v1/status", nil, &s, statusTable)
			},
		},
		whyCommand(&path, &socket),
	)
	return root
}

// whyCommand is the verb that explains a verdict.
func whyCommand(path, socket *string) *cobra.Command {
	var country string
	command := &cobra.Command{
		Use: "why ADDR", Short: "Show what applies to a visitor's address, and why", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			addr, err := netip.ParseAddr(args[0])
			if err != nil {
				return fmt.Errorf("%q: want an address such as 192.0.2.1 or 2001:db8::1", args[0])
			}
			if country != "" && len(country) != 2 {
				return fmt.Errorf("%q: want the two letters of a country", country)
			}
			var w tunnel.Why
			return ask(cmd, *path, *socket, "/v1/why", url.Values{"address": {addr.String()}, "country": {country}}, &w, whyTable)
		},
	}
	command.Flags().StringVar(&country, "country", "", "two letters of the visitor's country, which only Cloudflare knows")
	return command
}

// checkCommand is the verb that checks a configuration before it is run.
func checkCommand(path *string, role *roles) *cobra.Command {
	var noFiles bool
	command := &cobra.Command{
		Use: "check", Short: "Check the configuration and the files that it names, and change nothing", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := tunnel.Load(*path)
			if err != nil {
				return err
			}
			role, err := role.of(*path, &c)
			if err != nil {
				return err
			}
			if !noFiles {
				err = errors.Join(c.CheckFiles(role.cloudflare, role.wireguard, func(t tunnel.TunnelConfig) error {
					if _, err := fromFile(t); err != nil {
						return fmt.Errorf("tunnel %s: %w", t.Name, err)
					}
					return nil
				})...)
			}
			warnings := c.Warnings()
			if role.wireguard && !noFiles {
				if keyErr := c.VPN().CheckKey(); keyErr != nil {
					err = errors.Join(err, fmt.Errorf("%s: %w", *path, keyErr))
				}
				warnings = slices.Concat(warnings, gateway.Crossings(c.VPN()))
				if err == nil { // what else is wrong with files has been said
					warnings = slices.Concat(warnings, c.VPN().FileWarnings())
				}
			}
			if err == nil {
				fmt.Fprintf(cmd.OutOrStdout(), "%s: ok\n", *path)
			}
			for _, w := range warnings {
				fmt.Fprintf(cmd.OutOrStdout(), "warning: %s\n", w)
			}
			return err
		},
	}
	command.Flags().BoolVar(&noFiles, "no-files", false, "do not read the files that the configuration names: they are on another machine")
	return command
}

// ask puts a question to the running program and shows the answer. A file that is
// wrong or gone does not keep it from that, and is an error all the same.
func ask[T any](cmd *cobra.Command, path, socket, question string, query url.Values, into *T, table func(io.Writer, T)) error {
	var wrong error
	if socket == "" {
		c, err := tunnel.Load(path)
		if socket, wrong = c.Socket, err; err != nil {
			socket = tunnel.SocketOf(path)
		}
	}
	if socket == "" {
		return fmt.Errorf("%s names no socket to ask at", path)
	}
	if err := daemon.Ask(cmd.Context(), socket, question, query, into); err != nil {
		return errors.Join(wrong, err)
	}
	return errors.Join(command.Show(cmd, *into, table), wrong)
}

// lines writes lines of a table, each a name and what it stands for.
func lines(w io.Writer) func(name, format string, args ...any) {
	return func(name, format string, args ...any) { fmt.Fprintf(w, "%s\t%s\n", name, fmt.Sprintf(format, args...)) }
}

func statusTable(w io.Writer, s standing) {
	line := lines(w)
	line("role", "%s", s.Role)
	line("ready", "%s", s.Ready)
	if s.Trouble != "" {
		line("trouble", "%s", s.Trouble)
	}
	if s.Status != nil {
		publicTable(w, s.Status)
	}
	if s.VPN != nil {
		vpnTable(w, s.VPN)
	}
}

// mostDenied is how many attempts that were refused a table has; json has all.
const mostDenied = 20

// vpnTable is the gateway; edgeward peer list shows its peers.
func vpnTable(w io.Writer, v *gateway.Report) {
	line := lines(w)
	states := map[wireguard.State]int{}
	connected := 0
	for _, p := range v.Peers {
		states[p.State]++
		if !p.Handshake.IsZero() && time.Since(p.Handshake) < 3*time.Minute {
			connected++
		}
	}
	fmt.Fprintln(w)
	line("vpn", "%s by %s, port %d, last in step %s", command.OrDash(v.Interface), command.OrDash(string(v.Mode)), v.ListenPort, command.Ago(v.LastGood))
	line("public key", "%s", v.PublicKey)
	line("peers", "%d live, %d of them connected, %d disabled, %d expired, %d unready", states[wireguard.Live], connected, states[wireguard.Disabled], states[wireguard.Expired], states[wireguard.Unready])
	for _, p := range v.Peers {
		if p.State == wireguard.Unready {
			line("unready", "%s: %s", p.Name, p.Why)
		}
	}
	line("names", "%d hosts, answering at %d addresses", v.Names.Hosts, len(v.Names.Listening))
	if len(v.Names.Upstreams) > 0 {
		whose := ""
		if v.Names.Machine {
			whose = ", which are this machine's own"
		}
		line("names", "all others from %s%s", strings.Trim(fmt.Sprint(v.Names.Upstreams), "[]"), whose)
	}
	for _, u := range v.Names.Down {
		line("names", "%s does not answer", u)
	}
	if len(v.Denied) == 0 {
		return
	}
	fmt.Fprintf(w, "\nDENIED\tTO\tPORT\tSERVICE\tPACKETS\tLAST\n")
	for _, a := range v.Denied[:min(len(v.Denied), mostDenied)] {
		port := a.Protocol
		if a.Port != 0 {
			port = fmt.Sprintf("%d/%s", a.Port, a.Protocol)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\n", command.OrDash(string(a.Peer)), a.To, port, command.OrDash(string(a.Service)), a.Packets, command.Ago(a.Last))
	}
	if more := len(v.Denied) - mostDenied; more > 0 {
		fmt.Fprintf(w, "and %d before\n", more)
	}
}

func publicTable(w io.Writer, s *tunnel.Status) {
	line := lines(w)
	line("mode", "%s", s.Mode)
	switch {
	case s.LAPI.URL == "":
		line("lapi", "none: nobody is refused")
	case s.LAPI.Answering:
		line("lapi", "%s, answering, last pull %s", s.LAPI.URL, command.Ago(s.LAPI.LastPull))
	default:
		line("lapi", "%s, not answering, last pull %s", s.LAPI.URL, command.Ago(s.LAPI.LastPull))
		if s.LAPI.Error != "" {
			line("", "%s", s.LAPI.Error)
		}
	}
	fmt.Fprintf(w, "\nTUNNEL\tCONNECTION\tSTATE\tPROTOCOL\tLOCATION\tSINCE\n")
	for _, l := range s.Links {
		if trouble := cmp.Or(l.Refused, l.Trouble, l.Note); trouble != "" {
			fmt.Fprintf(w, "%s\t\t%s\n", l.Tunnel, trouble)
		}
		for _, c := range l.Connections {
			fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\n", l.Tunnel, c.Index, c.State, c.Protocol, c.Location, command.Ago(c.Since))
			if c.Error != "" && l.Refused == "" {
				fmt.Fprintf(w, "\t\t%s\n", c.Error)
			}
		}
	}
	fmt.Fprintf(w, "\nHOST\tEXPOSURE\tTUNNEL\tSERVICE\tFAIL\n")
	for _, h := range s.Hosts {
		fmt.Fprintf(w, "%s%s\t%s\t%s\t%s\t%s\n", h.Host, h.Path, h.Exposure, h.Tunnel, h.Service, h.Fail)
	}
	fmt.Fprintf(w, "\nORIGIN\tREMEDIATION\tFAMILY\tDECISIONS\n")
	for _, d := range s.Decisions {
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\n", d.Origin, d.Remediation, d.IPType, d.Count)
	}
	if len(s.Countries) > 0 {
		fmt.Fprintf(w, "\nCOUNTRY\tREMEDIATION\tORIGIN\tUNTIL\n")
		for _, c := range s.Countries {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", c.Country, c.Remediation, c.Origin, c.Until.Format(time.DateTime))
		}
	}
}

func whyTable(w io.Writer, y tunnel.Why) {
	fmt.Fprintf(w, "%v: %s: %s\n", y.Address, y.Verdict, y.Says)
	for _, d := range y.Decisions {
		because := "enforced here"
		if !d.Enforced {
			because = d.Because
		}
		on := d.Prefix.String()
		if d.Country != "" {
			on = "country " + d.Country
		}
		fmt.Fprintf(w, "decision %d\t%s\t%s\t%s\t%s\tuntil %s\t%s\n", d.ID, on, d.Remediation, d.Origin, d.Scenario,
			d.Until.Format(time.DateTime), because)
	}
}

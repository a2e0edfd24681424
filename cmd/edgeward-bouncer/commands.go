package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"

	"github.com/edgeward/edgeward/bouncer"
	"github.com/edgeward/edgeward/internal/daemon"
	"github.com/edgeward/edgeward/internal/nft"
)

// commands is the command line.
func commands() *cobra.Command {
	var path, format, socket string
	var withProbe bool
	root := &cobra.Command{
		Use:               "edgeward-bouncer",
		Short:             "Hold CrowdSec's bans in this node's kernel",
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	root.PersistentFlags().StringVar(&path, "config", "/etc/edgeward/bouncer.yaml", "configuration `FILE`")
	root.PersistentFlags().StringVar(&format, "output", "table", "json, yaml or table")
	root.PersistentFlags().StringVar(&socket, "socket", "", "ask the agent at `PATH`, not where the configuration says")
	root.PersistentPreRunE = func(*cobra.Command, []string) error {
		if format != "json" && format != "yaml" && format != "table" {
			return fmt.Errorf("output %q: want json, yaml or table", format)
		}
		return nil
	}
	verify := &cobra.Command{
		Use: "check", Short: "Check the configuration, and change nothing", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := bouncer.Load(path)
			if err != nil {
				return err
			}
			if withProbe {
				return probe(cmd.Context(), cmd.OutOrStdout(), format, &c, socket)
			}
			return check(cmd.OutOrStdout(), path, &c, os.Getenv)
		},
	}
	verify.Flags().BoolVar(&withProbe, "probe", false,
		"prove with packets from a test address, banned for seconds, that this node drops (as root with CAP_SYS_ADMIN, beside a running agent)")
	root.AddCommand(orders(&socket, &path, &format)...)
	root.AddCommand(
		verify,
		&cobra.Command{
			Use: "run", Short: "Be the agent", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				c, err := bouncer.Load(path)
				if err != nil {
					return err
				}
				return run(cmd.Context(), c)
			},
		},
		&cobra.Command{
			Use: "cleanup", Short: "Remove the nftables table inet edgeward, and so all bans", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				at, why := socketOf(socket, path)
				return cleanup(cmd.Context(), cmd.OutOrStdout(), at, why)
			},
		},
		&cobra.Command{
			Use: "status", Short: "Show what the agent knows and the kernel holds", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				at, err := socketOf(socket, path)
				if err != nil {
					return err
				}
				s, err := bouncer.AskStatus(cmd.Context(), at)
				if errors.Is(err, bouncer.ErrNoAgent) {
					return kernelAlone(cmd.OutOrStdout(), format, err)
				}
				if err != nil {
					return err
				}
				return show(cmd.OutOrStdout(), format, s, statusTable)
			},
		},
		&cobra.Command{
			Use: "why ADDR", Short: "Show what applies to an address, and why", Args: cobra.ExactArgs(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				addr, err := netip.ParseAddr(args[0])
				if err != nil {
					return fmt.Errorf("%q: want an address such as 192.0.2.1 or 2001:db8::1", args[0])
				}
				at, err := socketOf(socket, path)
				if err != nil {
					return err
				}
				w, err := bouncer.AskWhy(cmd.Context(), at, addr)
				if err != nil {
					return err
				}
				return show(cmd.OutOrStdout(), format, w, whyTable)
			},
		},
		&cobra.Command{
			Use: "version", Short: "Show the version", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				return show(cmd.OutOrStdout(), format, daemon.Version(), func(w io.Writer, v daemon.Build) {
					fmt.Fprintf(w, "edgeward-bouncer %s\n", v)
				})
			},
		},
	)
	return root
}

// check says that the configuration is right, and what might be forgotten.
func check(w io.Writer, path string, c *bouncer.Config, getenv func(string) string) error {
	fmt.Fprintf(w, "%s: ok\n", path)
	for _, l := range c.TryLists() {
		if l.Error != "" {
			fmt.Fprintf(w, "the list %s cannot be read as it is: %s\n", l.Name, l.Error)
			continue
		}
		fmt.Fprintf(w, "the list %s has %d entries and %d lines that are none\n", l.Name, l.Entries, l.Unreadable)
	}
	// Nobody is let through for being connected: but whoever configures a
	// firewall from afar should think of it.
	if from, _, _ := strings.Cut(getenv("SSH_CLIENT"), " "); from != "" {
		addr, err := netip.ParseAddr(from)
		named := false
		for _, p := range c.Protect.Addresses {
			named = named || p.Contains(addr.Unmap())
		}
		if err == nil && !named {
			fmt.Fprintf(w, "you are connected from %v: add it to protect.addresses if no ban may ever shut you out\n", addr)
		}
	}
	bypasses(w, c)
	return nil
}

// bypasses says what on this machine may carry packets past the bans.
func bypasses(w io.Writer, c *bouncer.Config) {
	conn, err := nft.Open(nft.Options{ReadOnly: true})
	if err == nil {
		defer conn.Close()
		var found []nft.Bypass
		found, err = conn.Bypasses(c.Firewall.Exempt)
		for _, p := range found {
			fmt.Fprintf(w, "%s %s: %s\n", p.Kind, p.Name, bouncer.Means(p))
		}
	}
	if err != nil {
		fmt.Fprintf(w, "not looked at: what may carry packets past the bans: %v\n", err)
	}
}

// kernelAlone shows what the kernel enforces where no agent runs, and fails with
// the reason why the agent did not answer.
func kernelAlone(w io.Writer, format string, reason error) error {
	conn, err := nft.Open(nft.Options{ReadOnly: true})
	if err != nil {
		return errors.Join(reason, fmt.Errorf("read what the kernel holds: %w", err))
	}
	defer conn.Close()
	have, err := conn.Read()
	if err != nil {
		return errors.Join(reason, fmt.Errorf("read what the kernel holds: %w", err))
	}
	if err := show(w, format, have, func(w io.Writer, h nft.Have) {
		if !h.Enforcing {
			fmt.Fprintln(w, "no agent runs, and the kernel enforces nothing")
			return
		}
		fmt.Fprintf(w, "no agent runs; the kernel enforces %d banned addresses and %d ranges until each of them ends,\nbut for what an allow, an unban or a pause lets pass until its own end\n",
			h.Bans4+h.Bans6, h.Nets4+h.Nets6)
	}); err != nil {
		return err
	}
	return reason
}

// show writes a value in the chosen form.
func show[T any](w io.Writer, format string, value T, table func(io.Writer, T)) error {
	if format == "table" {
		t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
		table(t, value)
		return t.Flush()
	}
	text, err := json.MarshalIndent(value, "", "  ")
	if err == nil && format == "yaml" {
		text, err = yaml.JSONToYAML(text)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", format, err)
	}
	_, err = fmt.Fprintf(w, "%s\n", strings.TrimRight(string(text), "\n"))
	return err
}

func statusTable(w io.Writer, s bouncer.Status) {
	line := func(name, format string, args ...any) { fmt.Fprintf(w, "%s\t%s\n", name, fmt.Sprintf(format, args...)) }
	line("ready", "%s", s.Ready)
	line("mode", "%s", s.Mode)
	if p := s.Orders.Pause; p != nil {
		line("paused", "%s", asked(*p))
	}
	for _, a := range s.Orders.Allows {
		line("allowed", "%v %s", a.Prefix, asked(a.Asked))
	}
	for _, u := range s.Orders.Unbans {
		line("unbanned", "%v %s", u.Address, asked(u.Asked))
	}
	lapi := "answering"
	if !s.LAPI.Answering {
		lapi = "not answering"
	}
	if s.LAPI.URL != "" {
		line("lapi", "%s, %s, last pull %s", s.LAPI.URL, lapi, ago(s.LAPI.LastPull))
	}
	for _, l := range s.Lists {
		line("list", "%s, %d entries, %d unreadable lines, read %s", l.Name, l.Entries, l.Unreadable, ago(l.Read))
		if l.Error != "" {
			line("warning", "the list %s counts as it was: %s", l.Name, l.Error)
		}
	}
	k := s.Kernel
	held := "shared with others"
	if k.Owner {
		held = "owned by the agent"
	}
	line("kernel", "generation %d, %s, %d addresses, %d ranges, looked at %s", k.Generation, held,
		k.Bans4+k.Bans6, k.Ranges4+k.Ranges6, ago(k.Looked))
	if k.Interference > 0 {
		line("interference", "%d times, repaired %d times", k.Interference, k.Repairs)
	}
	if k.Error != "" {
		line("error", "%s", k.Error)
	}
	line("protected", "%d addresses and ranges", len(s.Protected))
	for _, p := range s.Bypasses {
		line("warning", "%s %s: %s", p.Kind, p.Name, bouncer.Means(p))
	}
	for _, c := range s.Covered {
		line("warning", "%v (%s, %s) covers %s, which stays reachable", c.Prefix, c.Origin, c.Scenario, c.Protects)
	}
	fmt.Fprintf(w, "\nORIGIN\tREMEDIATION\tFAMILY\tDECISIONS\tENFORCED HERE\n")
	for _, d := range s.Decisions {
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%v\n", d.Origin, d.Remediation, d.IPType, d.Count, d.Enforced)
	}
	what := "DROPPED"
	if s.Mode == bouncer.Observe {
		what = "WOULD BE DROPPED"
	}
	fmt.Fprintf(w, "\nORIGIN\tREMEDIATION\tFAMILY\t%s\tBYTES\n", what)
	for _, d := range s.Dropped {
		if d.Packets > 0 {
			fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\n", d.Origin, d.Remediation, d.IPType, d.Packets, d.Bytes)
		}
	}
}

// asked says until when an order is in force, who gave it, and why.
func asked(a bouncer.Asked) string {
	says := fmt.Sprintf("until %s, by %s", a.Until.Format(time.DateTime), a.By)
	if a.Because != "" {
		says += ", because: " + a.Because
	}
	return says
}

func whyTable(w io.Writer, y bouncer.Why) {
	fmt.Fprintf(w, "%v: %s: %s\n", y.Address, y.Verdict, y.Says)
	for _, d := range y.Decisions {
		because := "enforced here"
		if !d.Enforced {
			because = d.Because
		}
		until := "until " + d.Until.Format(time.DateTime)
		if d.Until.IsZero() {
			until = "as long as listed"
		}
		fmt.Fprintf(w, "decision %d\t%v\t%s\t%s\t%s\t%s\t%s\n", d.ID, d.Prefix, d.Remediation, d.Origin, d.Scenario, until, because)
	}
	if k := y.Kernel; k != nil {
		what := k.From.String()
		if k.From != k.To {
			what = fmt.Sprintf("%v to %v", k.From, k.To)
		}
		fmt.Fprintf(w, "kernel\t%s\t%s\tfor another %s\n", what, k.Class, k.Left)
	}
}

func ago(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return time.Since(t).Round(time.Second).String() + " ago"
}

package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"net/url"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"

	"github.com/edgeward/edgeward/internal/daemon"
	"github.com/edgeward/edgeward/tunnel"
)

// commands is the command line.
func commands() *cobra.Command {
	var path, format, role string
	root := &cobra.Command{
		Use:               "edgeward-tunnel",
		Short:             "Keep public hosts reachable through Cloudflare, and stop banned visitors there",
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	root.PersistentFlags().StringVar(&path, "config", "/etc/edgeward/tunnel.yaml", "configuration `FILE`")
	root.PersistentFlags().StringVar(&format, "output", "table", "json, yaml or table")
	root.PersistentFlags().StringVar(&role, "role", "cloudflare", "what to be: cloudflare")
	root.PersistentPreRunE = func(*cobra.Command, []string) error {
		if format != "json" && format != "yaml" && format != "table" {
			return fmt.Errorf("output %q: want json, yaml or table", format)
		}
		if role != "cloudflare" {
			return fmt.Errorf("role %q: want cloudflare", role)
		}
		return nil
	}
	root.AddCommand(
		&cobra.Command{
			Use: "run", Short: "Be the tunnel", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				c, err := tunnel.Load(path)
				if err != nil {
					return err
				}
				return run(cmd.Context(), path, c.LogFormat)
			},
		},
		&cobra.Command{
			Use: "check", Short: "Check the configuration, and change nothing", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				c, err := tunnel.Load(path)
				if err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s: ok\n", path)
				for _, w := range c.Warnings() {
					fmt.Fprintf(cmd.OutOrStdout(), "warning: %s\n", w)
				}
				return nil
			},
		},
		&cobra.Command{
			Use: "status", Short: "Show tunnels, connections and hosts", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				var s tunnel.Status
				return ask(cmd, path, format, "/v1/status", nil, &s, statusTable)
			},
		},
		&cobra.Command{
			Use: "why ADDR", Short: "Show what applies to a visitor's address, and why", Args: cobra.ExactArgs(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				addr, err := netip.ParseAddr(args[0])
				if err != nil {
					return fmt.Errorf("%q: want an address such as 192.0.2.1 or 2001:db8::1", args[0])
				}
				var w tunnel.Why
				return ask(cmd, path, format, "/v1/why", url.Values{"address": {addr.String()}}, &w, whyTable)
			},
		},
		cleanupCommand(&path),
		&cobra.Command{
			Use: "version", Short: "Show the version", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				return show(cmd.OutOrStdout(), format, daemon.Version(), func(w io.Writer, v daemon.Build) {
					fmt.Fprintf(w, "edgeward-tunnel %s\n", v)
				})
			},
		},
	)
	return root
}

// ask puts a question to the running program and shows the answer.
func ask[T any](cmd *cobra.Command, path, format, question string, query url.Values, into *T, table func(io.Writer, T)) error {
	c, err := tunnel.Load(path)
	if err != nil {
		return err
	}
	if c.Socket == "" {
		return fmt.Errorf("%s names no socket to ask at", path)
	}
	if err := daemon.Ask(cmd.Context(), c.Socket, question, query, into); err != nil {
		return err
	}
	return show(cmd.OutOrStdout(), format, *into, table)
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

func statusTable(w io.Writer, s tunnel.Status) {
	line := func(name, format string, args ...any) { fmt.Fprintf(w, "%s\t%s\n", name, fmt.Sprintf(format, args...)) }
	line("ready", "%s", s.Ready)
	line("mode", "%s", s.Mode)
	switch {
	case s.LAPI.URL == "":
		line("lapi", "none: nobody is refused")
	case s.LAPI.Answering:
		line("lapi", "%s, answering, last pull %s", s.LAPI.URL, ago(s.LAPI.LastPull))
	default:
		line("lapi", "%s, not answering, last pull %s", s.LAPI.URL, ago(s.LAPI.LastPull))
	}
	if s.Trouble != "" {
		line("trouble", "%s", s.Trouble)
	}
	fmt.Fprintf(w, "\nTUNNEL\tCONNECTION\tSTATE\tPROTOCOL\tLOCATION\tSINCE\n")
	for _, l := range s.Links {
		if trouble := cmp.Or(l.Refused, l.Trouble, l.Note); trouble != "" {
			fmt.Fprintf(w, "%s\t\t%s\n", l.Tunnel, trouble)
		}
		for _, c := range l.Connections {
			fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\n", l.Tunnel, c.Index, c.State, c.Protocol, c.Location, ago(c.Since))
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
}

func whyTable(w io.Writer, y tunnel.Why) {
	fmt.Fprintf(w, "%v: %s: %s\n", y.Address, y.Verdict, y.Says)
	for _, d := range y.Decisions {
		because := "enforced here"
		if !d.Enforced {
			because = d.Because
		}
		fmt.Fprintf(w, "decision %d\t%v\t%s\t%s\t%s\tuntil %s\t%s\n", d.ID, d.Prefix, d.Remediation, d.Origin, d.Scenario,
			d.Until.Format(time.DateTime), because)
	}
}

func ago(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return time.Since(t).Round(time.Second).String() + " ago"
}

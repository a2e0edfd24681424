// Command edgeward is for operators: it shows which hosts are public and why,
// and what would be written at Cloudflare before it is. It reads the
// configuration that edgeward-tunnel runs by and writes nothing anywhere; it
// asks Cloudflare's API with the tokens that the configuration names.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"

	"github.com/edgeward/edgeward/internal/config"
	"github.com/edgeward/edgeward/internal/daemon"
	"github.com/edgeward/edgeward/tunnel"
)

func main() { os.Exit(program(os.Args[1:])) }

// program runs one command line and returns its exit code.
func program(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := commands()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	var problems config.Problems
	switch {
	case errors.As(err, &problems):
		fmt.Fprintln(os.Stderr, problems) // a line each, which begins with its place
	case err != nil:
		for line := range strings.SplitSeq(err.Error(), "\n") {
			fmt.Fprintln(os.Stderr, "edgeward:", line)
		}
	default:
		return 0
	}
	return 1
}

// commands is the command line.
func commands() *cobra.Command {
	var path, format string
	root := &cobra.Command{
		Use:               "edgeward",
		Short:             "Look at what edgeward makes public",
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	root.PersistentFlags().StringVar(&path, "config", "/etc/edgeward/tunnel.yaml", "configuration `FILE` of the tunnel")
	root.PersistentFlags().StringVar(&format, "output", "table", "json, yaml or table")
	root.PersistentPreRunE = func(*cobra.Command, []string) error {
		if format != "json" && format != "yaml" && format != "table" {
			return fmt.Errorf("output %q: want json, yaml or table", format)
		}
		return nil
	}
	// on runs a verb on the configuration, which is read when it runs.
	on := func(do func(context.Context, io.Writer, string, tunnel.Config) error) func(*cobra.Command, []string) error {
		return func(cmd *cobra.Command, _ []string) error {
			c, err := tunnel.Load(path)
			if err != nil {
				return err
			}
			return do(cmd.Context(), cmd.OutOrStdout(), format, c)
		}
	}
	host := &cobra.Command{Use: "host", Short: "Public hosts, their DNS records and their tunnels"}
	host.AddCommand(
		&cobra.Command{
			Use: "list", Short: "Show each public host, its origin service, tunnel and DNS state", Args: cobra.NoArgs,
			RunE: on(list),
		},
		&cobra.Command{
			Use: "plan", Short: "Show every write at Cloudflare that is due, and make none", Args: cobra.NoArgs,
			RunE: on(plan),
		},
	)
	root.AddCommand(
		host,
		&cobra.Command{
			Use: "check", Short: "Check the configuration, and change nothing", Args: cobra.NoArgs,
			RunE: on(func(_ context.Context, w io.Writer, _ string, c tunnel.Config) error {
				fmt.Fprintf(w, "%s: ok\n", path)
				for _, warning := range c.Warnings() {
					fmt.Fprintf(w, "warning: %s\n", warning)
				}
				return nil
			}),
		},
		&cobra.Command{
			Use: "version", Short: "Show the version", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				return show(cmd.OutOrStdout(), format, daemon.Version(), func(w io.Writer, v daemon.Build) {
					fmt.Fprintf(w, "edgeward %s\n", v)
				})
			},
		},
	)
	return root
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

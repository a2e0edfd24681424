package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/edgeward/edgeward/tunnel"
	"github.com/edgeward/edgeward/tunnel/cloudflare/api"
)

// cleanupCommand is the verb that undoes what was made through the API.
func cleanupCommand(path *string) *cobra.Command {
	var yes, tunnels bool
	c := &cobra.Command{
		Use: "cleanup", Short: "Remove our DNS records at Cloudflare, for good", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := tunnel.Load(*path)
			if err != nil {
				return err
			}
			return cleanup(cmd.Context(), cmd.OutOrStdout(), &c, tunnels, yes)
		},
	}
	c.Flags().BoolVar(&yes, "yes", false, "do it: without this it is only said")
	c.Flags().BoolVar(&tunnels, "tunnels", false, "delete the tunnels, too, that come from the API by their names")
	return c
}

// cleanup says what is ours in the zones of the configuration and then, if that
// is wished, removes it.
func cleanup(ctx context.Context, w io.Writer, c *tunnel.Config, tunnels, yes bool) error {
	if !c.Cloudflare.Enabled() {
		return errors.New("there is no section cloudflare: nothing was made through the API")
	}
	s, err := api.From(c)
	if err != nil {
		return err
	}
	dry := s.Desired.Policy == api.DryRun
	s.Desired = s.Desired.Nothing(tunnels)
	keeper := api.New(s, api.Product+tunnel.Version, slog.New(slog.DiscardHandler))
	changes, err := keeper.Plan(ctx)
	out := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	for _, write := range changes.Writes {
		fmt.Fprintln(out, write)
	}
	for _, t := range changes.Tunnels {
		if t.Says != "" {
			fmt.Fprintf(out, "note: tunnel %s: %s\n", t.Name, t.Says)
		}
	}
	if flushed := out.Flush(); err == nil {
		err = flushed
	}
	if err != nil {
		return err // half of the truth is not enough to delete by
	}
	if len(changes.Writes) == 0 {
		fmt.Fprintln(w, "nothing is ours")
		return nil
	}
	for _, t := range changes.Tunnels {
		if t.Ours > 0 {
			return fmt.Errorf("tunnel %s is served (connections: %d): stop edgeward-tunnel first, or it makes all of this again", t.Name, t.Ours)
		}
	}
	switch {
	case !yes:
		fmt.Fprintf(w, "%d writes, of which none is made without --yes\n", len(changes.Writes))
		return nil
	case dry:
		return errors.New("cloudflare.policy is dry-run, by which nothing is written: change it first")
	}
	_, err = keeper.Turn(ctx)
	fmt.Fprintf(w, "%d writes made\n", keeper.Report().Written)
	return err
}

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
	"github.com/edgeward/edgeward/tunnel/wireguard/gateway"
)

// cleanupCommand is the verb that undoes what the roles leave behind.
func cleanupCommand(path *string, role *roles) *cobra.Command {
	var yes, tunnels bool
	command := &cobra.Command{
		Use: "cleanup", Short: "Remove our DNS records at Cloudflare, and the VPN's interface and access rules, for good", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := tunnel.Load(*path)
			if err != nil {
				return err
			}
			role, err := role.of(*path, &c)
			if err != nil {
				return err
			}
			if role.wireguard {
				if err := gateway.Cleanup(gateway.Options{Config: *c.VPN(), StateDir: c.StateDir}); err != nil {
					return fmt.Errorf("clean up: %w", err)
				}
			}
			switch {
			case role.cloudflare && c.Cloudflare.Enabled():
				return atCloudflare(cmd.Context(), cmd.OutOrStdout(), &c, tunnels, yes)
			case role.cloudflare && !role.wireguard:
				return errors.New("there is no section cloudflare: nothing was made through the API, and nothing is left on this machine")
			}
			return nil
		},
	}
	command.Flags().BoolVar(&yes, "yes", false, "make the writes at Cloudflare: without this they are only said")
	command.Flags().BoolVar(&tunnels, "tunnels", false, "delete the tunnels, too, that come from the API by their names")
	return command
}

// atCloudflare says what is ours in the zones of the configuration and then, if
// that is wished, removes it.
func atCloudflare(ctx context.Context, w io.Writer, c *tunnel.Config, tunnels, yes bool) error {
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

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/edgeward/edgeward/internal/command"
	"github.com/edgeward/edgeward/internal/daemon"
	"github.com/edgeward/edgeward/tunnel"
	"github.com/edgeward/edgeward/tunnel/cloudflare/api"
)

// look asks Cloudflare how things stand. Without a section cloudflare nobody is
// asked, and the records are the operator's to make.
func look(ctx context.Context, c *tunnel.Config) (api.Settings, api.Changes, error) {
	s, err := api.From(c)
	if !c.Cloudflare.Enabled() {
		for _, name := range slices.Sorted(maps.Keys(s.Unread)) {
			err = errors.Join(err, s.Unread[name])
		}
		return s, byHand(s), err
	}
	k := api.New(s, api.Product+daemon.Version().Version, slog.New(slog.DiscardHandler))
	changes, asked := k.Plan(ctx)
	return s, changes, errors.Join(err, asked)
}

// byHand says which records to make where there is no API to make them with.
func byHand(s api.Settings) api.Changes {
	var out api.Changes
	for _, h := range s.Desired.Hosts {
		state := api.HostState{Host: h.Name, Tunnel: h.Tunnel, State: api.Unknown, Says: "there is no section cloudflare"}
		for _, t := range s.Desired.Tunnels {
			if t.Name == h.Tunnel && t.ID != "" {
				state.Says += ": make a proxied CNAME to " + api.Target(t.ID) + " by hand"
			}
		}
		if s.Unread[h.Tunnel] != nil {
			state.Says += ", and where its record must lead is not known, as the id of its tunnel could not be read"
		}
		out.Hosts = append(out.Hosts, state)
	}
	return out
}

// row is a host as list shows it.
type row struct {
	api.HostState
	Services []string `json:"services,omitempty"`
	// TunnelSays is what is to be said of its tunnel.
	TunnelSays string `json:"tunnelSays,omitempty"`
}

func list(cmd *cobra.Command, c tunnel.Config) error {
	_, changes, failed := look(cmd.Context(), &c)
	notes := map[string]string{}
	for _, t := range changes.Tunnels {
		notes[t.Name] = t.Says
	}
	rows := make([]row, len(changes.Hosts))
	public := c.PublicHosts()
	for i, h := range changes.Hosts {
		rows[i].HostState, rows[i].TunnelSays = h, notes[h.Tunnel]
		if at := slices.IndexFunc(public, func(p tunnel.PublicHost) bool { return string(p.Host) == h.Host }); at >= 0 {
			rows[i].Services = public[at].Services
		}
	}
	return errors.Join(failed, command.Show(cmd, rows, func(w io.Writer, rows []row) {
		fmt.Fprintf(w, "HOST\tSERVICE\tTUNNEL\tDNS\tOWNER\tNOTE\n")
		for _, r := range rows {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", r.Host, command.OrDash(strings.Join(r.Services, ", ")), command.OrDash(r.Tunnel), r.State,
				command.OrDash(r.Owner), command.OrDash(strings.Join(remarks(r.HostState), "; ")))
		}
		for _, t := range changes.Tunnels {
			if t.Says != "" {
				fmt.Fprintf(w, "note: tunnel %s: %s\n", t.Name, t.Says)
			}
		}
	}))
}

func plan(cmd *cobra.Command, c tunnel.Config) error {
	s, changes, failed := look(cmd.Context(), &c)
	return errors.Join(failed, command.Show(cmd, changes, func(w io.Writer, c api.Changes) {
		for _, write := range c.Writes {
			fmt.Fprintln(w, write)
		}
		said := map[string]bool{} // why a tunnel is not known, of its hosts too
		for _, t := range c.Tunnels {
			if t.Says != "" {
				fmt.Fprintf(w, "note: tunnel %s: %s\n", t.Name, t.Says)
				said[api.NoID(t.Name)] = true
			}
		}
		for _, h := range c.Hosts {
			for _, says := range remarks(h) {
				if said[says] {
					continue
				}
				fmt.Fprintf(w, "note: %s: %s\n", h.Host, says)
			}
		}
		if n := len(c.Writes); n == 0 && failed != nil {
			fmt.Fprintln(w, "nothing to write is known, as not all could be read")
		} else if n == 0 {
			fmt.Fprintln(w, "nothing to write")
		} else if s.Desired.Policy == api.DryRun {
			fmt.Fprintf(w, "%d writes, of which policy dry-run makes none\n", n)
		} else {
			fmt.Fprintf(w, "%d writes, policy %s\n", n, s.Desired.Policy)
		}
	}))
}

// remarks are all that is to be said about a host.
func remarks(h api.HostState) []string {
	var out []string
	if h.Says != "" {
		out = append(out, h.Says)
	}
	return append(out, h.Notes...)
}

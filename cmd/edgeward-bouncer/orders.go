package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/edgeward/edgeward/bouncer"
	"github.com/edgeward/edgeward/internal/command"
	"github.com/edgeward/edgeward/internal/daemon"
	"github.com/edgeward/edgeward/internal/nft"
)

// socketOf is where to ask the agent: at the socket that was named, or else the
// one that the configuration names. Orders are for bad days: without a
// configuration that can be read they go where the agent listens by default, and
// why says so.
func socketOf(named, path string) (socket string, why error) {
	if named != "" {
		return named, nil
	}
	c, err := bouncer.Load(path)
	if err != nil {
		return bouncer.Defaults().Socket, err
	}
	return c.Socket, nil
}

// askAt is socketOf for who only asks; where the configuration cannot be read, a
// warning says so.
func askAt(cmd *cobra.Command, named, path string) string {
	socket, why := socketOf(named, path)
	if why != nil {
		fmt.Fprintf(cmd.ErrOrStderr(), "warning: asking at %s, because the configuration cannot be used: %v\n", socket, why)
	}
	return socket
}

// noAgent says what to do where no agent answers at socket.
func noAgent(socket string, err error) error {
	switch {
	case !errors.Is(err, daemon.ErrNotRunning):
		return err
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%w: only root may ask the agent at %s: use sudo", daemon.ErrNotRunning, socket)
	}
	return fmt.Errorf("%w at %s: is it running? (systemctl status edgeward-bouncer)", daemon.ErrNotRunning, socket)
}

// orders are the verbs that change what the node enforces, for a time. named and
// path are where the flags --socket and --config are kept.
func orders(named, path *string) []*cobra.Command {
	var o bouncer.Order
	var duration string
	give := func(cmd *cobra.Command) error {
		socket, why := socketOf(*named, *path)
		answer, err := bouncer.Ask(cmd.Context(), socket, o)
		if errors.Is(err, daemon.ErrNotRunning) {
			return errors.Join(noAgent(socket, err), why)
		}
		if err != nil {
			return err
		}
		return command.Show(cmd, answer, answerTable)
	}
	allow := &cobra.Command{
		Use: "allow ADDR|RANGE --for 1h", Short: "Let no ban stop an address or range on this node, for a time", Args: command.One("address or range", "192.0.2.1 --for 1h"),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			o.Verb, o.Address = "allow", args[0]
			if !o.End && duration == "" {
				return errors.New("allow: want --for and how long, such as --for 1h, or --end")
			}
			if duration != "" {
				if o.For, err = parseDuration(duration); err != nil {
					return err
				}
			}
			return give(cmd)
		},
	}
	allow.Flags().StringVar(&duration, "for", "", "how long, such as 90s, 10m or 72h, at most 720h")
	unban := &cobra.Command{
		Use: "unban ADDR", Short: "Let the decisions that hold an address count no more for it on this node", Args: command.One("address", "192.0.2.1"),
		RunE: func(cmd *cobra.Command, args []string) error {
			addr, err := netip.ParseAddr(args[0])
			if err != nil {
				return fmt.Errorf("%q: want an address such as 192.0.2.1 or 2001:db8::1; a range can be allowed", args[0])
			}
			o.Verb, o.Address = "unban", addr.String()
			return give(cmd)
		},
	}
	pause := &cobra.Command{
		Use: "pause D", Short: "Drop nothing for a time, such as 10m, at most 24h; 0 ends a pause", Args: command.One("duration", "10m"),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			o.Verb = "pause"
			if o.For, err = parseDuration(args[0]); err != nil {
				return err
			}
			return give(cmd)
		},
	}
	for _, cmd := range []*cobra.Command{allow, unban} {
		cmd.Flags().BoolVar(&o.End, "end", false, "end one that is in force")
	}
	allow.MarkFlagsMutuallyExclusive("for", "end")
	out := []*cobra.Command{allow, unban, pause}
	for _, cmd := range out {
		cmd.Flags().StringVar(&o.Because, "because", "", "a `TEXT` for the log and status")
	}
	return out
}

func parseDuration(text string) (time.Duration, error) {
	d, err := time.ParseDuration(text)
	if err != nil {
		return 0, fmt.Errorf("%q: want a duration such as 90s, 10m or 72h", text)
	}
	return d, nil
}

func answerTable(w io.Writer, a bouncer.Answer) {
	fmt.Fprintln(w, a.Says)
	if a.Note != "" {
		fmt.Fprintln(w, "note: "+a.Note)
	}
}

// cleanup removes the table. A table that a living agent holds the agent removes
// itself, and lets go: else it would only restore it.
func cleanup(ctx context.Context, w io.Writer, socket string, why error) error {
	if socket != "" {
		answer, err := bouncer.Ask(ctx, socket, bouncer.Order{Verb: "cleanup"})
		if err == nil {
			answerTable(w, answer)
			return nil
		}
		if !errors.Is(err, daemon.ErrNotRunning) {
			return err
		}
	}
	conn, err := nft.Open(nft.Options{})
	if errors.Is(err, nft.ErrOwned) {
		return errors.Join(fmt.Errorf("clean up: %w, and no agent answers at %q: name its socket with --socket, or stop it", err, socket), why)
	}
	if err != nil {
		return fmt.Errorf("clean up: %w", err)
	}
	defer conn.Close()
	have, err := conn.Read()
	if err != nil {
		return fmt.Errorf("clean up: %w", err)
	}
	if err := conn.Remove(); err != nil {
		return fmt.Errorf("clean up: %w", err)
	}
	if have.Present {
		fmt.Fprintln(w, "removed the table inet edgeward: no ban is enforced on this node any more")
	} else {
		fmt.Fprintln(w, "there is no table inet edgeward on this node")
	}
	return nil
}

// probe proves by packets that the node drops, or says why it does not. As orders
// do, it goes by the defaults where the configuration cannot be read, and why says
// so: beside an agent in a pod the node has none.
func probe(cmd *cobra.Command, c *bouncer.Config, why error, socket string) error {
	if why != nil {
		*c = bouncer.Defaults()
	}
	ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if socket == "" {
		socket = c.Socket
	}
	p, err := bouncer.RunProbe(ctx, c, socket)
	if errors.Is(err, daemon.ErrNotRunning) {
		return errors.Join(fmt.Errorf("probe: %w", noAgent(socket, err)), why)
	}
	if len(p.Families) > 0 {
		err = errors.Join(command.Show(cmd, p, func(w io.Writer, p bouncer.Probe) {
			for _, f := range p.Families {
				fmt.Fprintf(w, "probe\t%s\t%s\t%s met the ban\n", f.IPType, f.Says, command.Number(int(f.Counted), "packet", "packets"))
			}
			if p.Drops {
				fmt.Fprintln(w, "this node drops what is banned")
			}
		}), err)
	}
	return err
}

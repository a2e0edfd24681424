package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/edgeward/edgeward/bouncer"
	"github.com/edgeward/edgeward/internal/command"
	"github.com/edgeward/edgeward/internal/config"
	"github.com/edgeward/edgeward/internal/daemon"
	"github.com/edgeward/edgeward/internal/nft"
)

// commands is the command line.
func commands() *cobra.Command {
	var path, socket string
	var withProbe bool
	root := command.New("edgeward-bouncer", "Hold CrowdSec's bans in this node's kernel")
	root.PersistentFlags().StringVar(&path, "config", "/etc/edgeward/bouncer.yaml", "configuration `FILE`")
	root.PersistentFlags().StringVar(&socket, "socket", "", "ask the agent at `PATH`, not where the configuration says")
	verify := &cobra.Command{
		Use: "check", Short: "Check the configuration, and change nothing", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := bouncer.Load(path)
			if withProbe {
				return probe(cmd, &c, err, socket)
			}
			if err != nil {
				return err
			}
			return check(cmd.OutOrStdout(), path, &c, os.Getenv)
		},
	}
	verify.Flags().BoolVar(&withProbe, "probe", false,
		"prove with packets from a test address, banned for seconds, that this node drops (as root with CAP_SYS_ADMIN, beside a running agent)")
	root.AddCommand(orders(&socket, &path)...)
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
				at := askAt(cmd, socket, path)
				s, err := bouncer.AskStatus(cmd.Context(), at)
				if errors.Is(err, daemon.ErrNotRunning) {
					return kernelAlone(cmd, path, noAgent(at, err))
				}
				if err != nil {
					return err
				}
				return command.Show(cmd, s, statusTable)
			},
		},
		&cobra.Command{
			Use: "why ADDR", Short: "Show what applies to an address, and why", Args: command.One("address", "192.0.2.1"),
			RunE: func(cmd *cobra.Command, args []string) error {
				addr, err := netip.ParseAddr(args[0])
				if err != nil {
					return fmt.Errorf("%q: want an address such as 192.0.2.1 or 2001:db8::1", args[0])
				}
				at := askAt(cmd, socket, path)
				w, err := bouncer.AskWhy(cmd.Context(), at, addr)
				if err != nil {
					return noAgent(at, err)
				}
				return command.Show(cmd, w, whyTable)
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
		fmt.Fprintf(w, "the list %s has %s and %s\n", l.Name, command.Number(l.Entries, "entry", "entries"), command.Number(l.Unreadable, "line that is none", "lines that are none"))
	}
	connected(w, c, getenv)
	secrets(w, c)
	bypasses(w, c)
	return nil
}

// connected says what may shut out whoever is connected by SSH. Nobody is let
// through for that: but whoever configures a firewall from afar should think of
// it.
func connected(w io.Writer, c *bouncer.Config, getenv func(string) string) {
	// ADDRESS PORT PORT, or ADDRESS PORT ADDRESS PORT; ours is the last.
	fields := strings.Fields(getenv("SSH_CLIENT"))
	if len(fields) == 0 {
		fields = strings.Fields(getenv("SSH_CONNECTION"))
	}
	if len(fields) == 0 {
		return
	}
	addr, err := netip.ParseAddr(fields[0])
	if err != nil {
		return
	}
	addr = addr.Unmap().WithZone("")
	holds := func(p netip.Prefix) bool { return p.Contains(addr) }
	if slices.ContainsFunc(c.Protect.Addresses, holds) {
		return
	}
	fmt.Fprintf(w, "you are connected from %v: add it to protect.addresses if no ban may ever shut you out\n", addr)
	port, err := strconv.ParseUint(fields[len(fields)-1], 10, 16)
	if err != nil || len(fields) < 3 {
		port = 22
	}
	for _, l := range c.Firewall.Locks {
		opens := slices.ContainsFunc(l.From, func(s bouncer.Source) bool { return slices.ContainsFunc(s.Prefixes, holds) })
		if !opens && slices.Contains(l.Ports, config.Port(port)) {
			fmt.Fprintf(w, "you are connected from %v, and the lock %s closes port %d to it: put it in its from or in protect.addresses\n", addr, l.Name, port)
		}
	}
}

// secrets says which files cannot be what they should be: no agent fails to start
// for them, because they are read again at each pull.
func secrets(w io.Writer, c *bouncer.Config) {
	for _, path := range []config.File{c.LAPI.KeyFile, c.LAPI.TLS.KeyFile} {
		if path == "" {
			continue
		}
		makes := ""
		if path == c.LAPI.KeyFile {
			makes = ": cscli bouncers add NAME -o raw makes a key, which belongs there"
		}
		text, err := os.ReadFile(string(path))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			fmt.Fprintf(w, "%s is missing%s\n", path, makes)
			continue
		case err != nil:
			fmt.Fprintf(w, "%s cannot be read: %v\n", path, err)
			continue
		case len(bytes.TrimSpace(text)) == 0:
			fmt.Fprintf(w, "%s is empty%s\n", path, makes)
		}
		if info, err := os.Stat(string(path)); err == nil && info.Mode().Perm()&0o004 != 0 {
			fmt.Fprintf(w, "others on this machine can read %s: chmod 600 it\n", path)
		}
	}
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

// alone is what can be told where no agent runs.
type alone struct {
	Agent  bool `json:"agent"` // false
	Kernel struct {
		Enforcing bool `json:"enforcing"`
		// Mode is enforce or observe, empty where other rules are in force than
		// the configuration asks for.
		Mode       bouncer.Mode `json:"mode,omitempty"`
		Owner      bool         `json:"owner"`
		Persist    bool         `json:"persist"`
		Generation uint32       `json:"generation"`
		Bans4      int          `json:"bans4"`
		Bans6      int          `json:"bans6"`
		Ranges4    int          `json:"ranges4"`
		Ranges6    int          `json:"ranges6"`
	} `json:"kernel"`
}

// kernelAlone shows what the kernel enforces where no agent runs, and fails with
// the reason why the agent did not answer. path is the configuration's, which
// tells rules that drop from rules that count.
func kernelAlone(cmd *cobra.Command, path string, reason error) error {
	conn, err := nft.Open(nft.Options{ReadOnly: true})
	if err != nil {
		return errors.Join(reason, fmt.Errorf("read what the kernel holds: %w", err))
	}
	defer conn.Close()
	have, err := conn.Read()
	if err != nil {
		return errors.Join(reason, fmt.Errorf("read what the kernel holds: %w", err))
	}
	a := alone{}
	k := &a.Kernel
	k.Enforcing, k.Owner, k.Persist, k.Generation = have.Enforcing, have.Owner, have.Persist, have.Generation
	k.Bans4, k.Bans6, k.Ranges4, k.Ranges6 = have.Bans4, have.Bans6, have.Nets4, have.Nets6
	if c, err := bouncer.Load(path); err == nil {
		k.Mode = c.ModeOf(have.Layout)
	}
	if err := command.Show(cmd, a, aloneTable); err != nil {
		return err
	}
	return reason
}

func aloneTable(w io.Writer, a alone) {
	k := a.Kernel
	what := elements(k.Bans4, k.Bans6, "banned address", "banned addresses") + " and " + elements(k.Ranges4, k.Ranges6, "range", "ranges")
	const lasts = "until each of them ends,\nbut for what an allow, an unban or a pause lets pass until its own end"
	switch {
	case !k.Enforcing:
		fmt.Fprintln(w, "no agent runs, and the kernel enforces nothing")
	case k.Mode == bouncer.Enforce:
		fmt.Fprintf(w, "no agent runs; the kernel enforces %s %s\n", what, lasts)
	case k.Mode == bouncer.Observe:
		fmt.Fprintf(w, "no agent runs; the kernel counts the packets of %s and drops nothing\n", what)
	default:
		fmt.Fprintf(w, "no agent runs; the kernel holds %s %s;\nits rules are of another configuration or release: nft list table inet edgeward shows whether they drop or count\n", what, lasts)
	}
}

func statusTable(w io.Writer, s bouncer.Status) {
	line := func(name, format string, args ...any) { fmt.Fprintf(w, "%s\t%s\n", name, fmt.Sprintf(format, args...)) }
	if s.Ready == "yes" {
		line("ready", "yes")
	} else {
		line("ready", "no: %s", s.Ready)
	}
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
	switch {
	case s.LAPI.Error != "":
		lapi = fmt.Sprintf("failing since %s: %s", command.Moment(s.LAPI.Failing), s.LAPI.Error)
	case !s.LAPI.Answering:
		lapi = "not answering"
	}
	if s.LAPI.URL != "" {
		line("lapi", "%s, last pull %s, %s", s.LAPI.URL, command.Ago(s.LAPI.LastPull), lapi)
	}
	for _, l := range s.Lists {
		line("list", "%s, %s, %s, read %s", l.Name, command.Number(l.Entries, "entry", "entries"), command.Number(l.Unreadable, "unreadable line", "unreadable lines"), command.Ago(l.Read))
		switch {
		case l.Error != "" && l.Entries == 0:
			line("warning", "the list %s holds nothing yet: %s", l.Name, l.Error)
		case l.Error != "":
			line("warning", "the list %s counts as it was: %s", l.Name, l.Error)
		}
	}
	dropped := "dropped"
	if s.Mode == bouncer.Observe {
		dropped = "would be dropped"
	}
	for _, l := range s.Locks {
		line("lock", "%s: %s; %s %s", l.Name, ports(l.Ports), command.Number(int(l.Packets), "packet", "packets"), dropped)
	}
	k := s.Kernel
	held := "shared with others"
	if k.Owner {
		held = "owned by the agent"
	}
	switch {
	case s.StoodDown:
		line("kernel", "no table: cleanup removed it")
	case !k.Enforcing:
		line("kernel", "no table yet, looked at %s", command.Ago(k.Looked))
	default:
		line("kernel", "generation %d, %s, %s, %s, looked at %s", k.Generation, held,
			elements(k.Bans4, k.Bans6, "address", "addresses"), elements(k.Ranges4, k.Ranges6, "range", "ranges"), command.Ago(k.Looked))
	}
	if k.Interference > 0 {
		line("interference", "%s, repaired %s", command.Number(int(k.Interference), "time", "times"), command.Number(int(k.Repairs), "time", "times"))
	}
	if k.Error != "" {
		line("error", "%s", k.Error)
	}
	for _, u := range s.Unserved {
		line("warning", "not served yet: %s", u)
	}
	line("protected", "%s", command.Number(len(s.Protected), "address or range", "addresses and ranges"))
	for _, p := range s.Bypasses {
		line("warning", "%s %s: %s", p.Kind, p.Name, bouncer.Means(p))
	}
	for _, c := range s.Covered {
		if strings.HasPrefix(c.Origin, "lists:") {
			line("note", "%v (%s) names protected addresses, which stay reachable: %s", c.Prefix, c.Origin, c.Protects)
			continue
		}
		line("warning", "%v (%s, %s) covers %s, which stays reachable", c.Prefix, c.Origin, c.Scenario, c.Protects)
	}
	fmt.Fprintf(w, "\nORIGIN\tREMEDIATION\tFAMILY\tDECISIONS\tFOR THE KERNEL\n")
	for _, d := range s.Decisions {
		kernel := "no"
		if d.Enforced {
			kernel = "yes"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\n", d.Origin, d.Remediation, d.IPType, d.Count, kernel)
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
	says := fmt.Sprintf("%s, by %s", a.Lasts(), a.By)
	if a.Because != "" {
		says += ", because: " + a.Because
	}
	return says
}

func whyTable(w io.Writer, y bouncer.Why) {
	verdict := y.Verdict
	if slices.ContainsFunc(y.Locks, func(l bouncer.Locked) bool { return l.Closed }) && verdict == "pass" {
		verdict = "pass, but for locked ports"
	}
	fmt.Fprintf(w, "%v: %s: %s\n", y.Address, verdict, y.Says)
	for _, l := range y.Locks {
		are := "are closed to it"
		if !l.Closed {
			are = "would be closed to it: the mode is observe"
		}
		fmt.Fprintf(w, "lock %s: %s %s\n", l.Name, ports(l.Ports), are)
	}
	for _, d := range y.Decisions {
		because := "enforced here"
		if !d.Enforced {
			because = d.Because
		}
		until := "until " + command.Moment(d.Until)
		if d.Until.IsZero() {
			until = "as long as listed"
		}
		name := fmt.Sprintf("decision %d", d.ID)
		if d.List != "" {
			name = "list " + d.List
		}
		fmt.Fprintf(w, "%s\t%v\t%s\t%s\t%s\t%s\t%s\n", name, d.Prefix, d.Remediation, d.Origin, d.Scenario, until, because)
	}
	if k := y.Kernel; k != nil {
		what := k.From.String()
		if k.From != k.To {
			what = fmt.Sprintf("%v to %v", k.From, k.To)
		}
		fmt.Fprintf(w, "kernel\t%s\t%s\tfor another %s\n", what, k.Class, k.Left)
	}
}

// elements writes how many the kernel holds of both families, where it tells.
func elements(four, six int, one, many string) string {
	if four < 0 || six < 0 {
		return "an unknown number of " + many
	}
	return command.Number(four+six, one, many)
}

// ports writes the ports of a lock.
func ports(list []uint16) string {
	var texts []string
	for _, p := range list {
		texts = append(texts, strconv.Itoa(int(p)))
	}
	if len(texts) == 1 {
		return "port " + texts[0]
	}
	return "ports " + strings.Join(texts, ", ")
}

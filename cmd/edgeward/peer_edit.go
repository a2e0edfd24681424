package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/edgeward/edgeward/internal/command"
	"github.com/edgeward/edgeward/internal/config"
	"github.com/edgeward/edgeward/tunnel"
	"github.com/edgeward/edgeward/tunnel/wireguard"
	"github.com/edgeward/edgeward/tunnel/wireguard/book"
	"github.com/edgeward/edgeward/tunnel/wireguard/wgquick"
)

func addCommand(path *string) *cobra.Command {
	var h handover
	var groups, addresses, behind []string
	var expires string
	p := wireguard.Peer{Enabled: true}
	cmd := &cobra.Command{
		Use: "add NAME", Short: "Declare a new peer, and print the configuration for its device", Args: command.One("name", "alice-phone --group family"),
		Long: "Declare a new peer, and print the configuration for its device: the text on\nstandard output, a QR code beside it in a terminal. The private key is made here\nand is in that configuration alone.",
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			v, err := openVPN(cmd, *path)
			if err != nil {
				return err
			}
			if p.Name, err = wireguard.ParseName(args[0]); err != nil {
				return err
			}
			if v.config.Peer(p.Name) != nil {
				return fmt.Errorf("there is a peer %s already: edgeward peer rotate %s gives it new keys", p.Name, p.Name)
			}
			if p.Expires.Time, err = expiry(expires, time.Now()); err != nil {
				return err
			}
			if err := errors.Join(parseAll(groups, "--group", wireguard.ParseName, &p.Groups),
				parseAll(addresses, "--address", parseAddress, &p.Addresses),
				parseAll(behind, "--allowed-ips", parseNetwork, &p.AllowedIPs)); err != nil {
				return err
			}
			if err := h.keys(v, p.Name); err != nil {
				return err
			}
			p.PublicKey, p.PresharedKeyFile = h.key, config.File(h.presharedFile)
			var m made
			if err := v.change(cmd, func(text []byte, c *wireguard.Config) (_ []byte, err error) {
				if p.Addresses, err = v.leases.Pick(c, p, time.Now()); err != nil {
					return nil, err
				}
				return book.Add(text, p)
			}, func(c *wireguard.Config) (err error) {
				m, err = h.files(cmd, v, c, p.Name)
				return err
			}); err != nil {
				return h.regret(err)
			}
			tellReach(cmd, v.config, &p)
			if !p.Expires.IsZero() {
				say(cmd, "%s expires at %s", p.Name, command.Moment(p.Expires.Time))
			}
			return h.show(cmd, m)
		},
	}
	h.flags(cmd)
	f := cmd.Flags()
	f.StringArrayVar(&groups, "group", nil, "put it into a `GROUP`; may be given again")
	f.StringVar(&expires, "expires", "", "shut it out `WHEN`: in 30d or 12h, after 2027-01-31, at 2027-01-31T18:00:00Z")
	f.StringArrayVar(&addresses, "address", nil, "give it this `ADDRESS`, and not the next free one; one of each family")
	f.BoolVar(&p.FullTunnel, "full-tunnel", false, "have the device send all its traffic to the gateway")
	f.StringArrayVar(&behind, "allowed-ips", nil, "a `NETWORK` behind the peer, for which it speaks; may be given again")
	// The flag was made above, so there is nothing to fail.
	_ = cmd.RegisterFlagCompletionFunc("group", completeGroups(path))
	return cmd
}

// completeGroups proposes the groups that the file names.
func completeGroups(path *string) cobra.CompletionFunc {
	return func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		var out []string
		if c, err := tunnel.Load(*path); err == nil {
			for _, p := range c.VPN().Peers {
				for _, g := range p.Groups {
					out = append(out, string(g))
				}
			}
			for _, g := range c.VPN().Grants {
				for _, s := range g.To {
					if s.Group {
						out = append(out, string(s.Name))
					}
				}
			}
		}
		slices.Sort(out)
		return slices.Compact(out), cobra.ShellCompDirectiveNoFileComp
	}
}

// parseAll parses the values of a flag, each of which may hold several with
// commas.
func parseAll[T any](texts []string, flag string, parse func(string) (T, error), into *[]T) error {
	for _, several := range texts {
		for text := range strings.SplitSeq(several, ",") {
			v, err := parse(strings.TrimSpace(text))
			if err != nil {
				return fmt.Errorf("%s: %w", flag, err)
			}
			*into = append(*into, v)
		}
	}
	return nil
}

// parseAddress reads an address that a peer may have.
func parseAddress(text string) (netip.Addr, error) {
	a, err := netip.ParseAddr(text)
	if err != nil || a.Zone() != "" || a.Is4In6() {
		return netip.Addr{}, fmt.Errorf("%q: want an address of the VPN such as 10.66.0.9 or fd66::9", text)
	}
	return a, nil
}

// parseNetwork reads a network, or an address, which is a network of one.
func parseNetwork(text string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(text); err == nil && a.Zone() == "" && !a.Is4In6() {
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(text)
	switch {
	case err != nil || p.Addr().Is4In6():
		return netip.Prefix{}, fmt.Errorf("%q: want a network behind the peer such as 192.168.9.0/24 or fd99::/64", text)
	case p != p.Masked():
		return netip.Prefix{}, fmt.Errorf("%q: has an address in it: want the network, %s", text, p.Masked())
	}
	return p, nil
}

// expiry reads when a peer expires: after a time, at the end of a day here, or at
// a moment. Nothing is never.
func expiry(text string, now time.Time) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	bad := fmt.Errorf("--expires %s: want 30d, 12h, a day such as 2027-01-31 or a time such as 2027-01-31T18:00:00Z", text)
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		if at, err = time.ParseInLocation(time.DateOnly, text, now.Location()); err == nil {
			at = at.AddDate(0, 0, 1)
		} else if days, ok := strings.CutSuffix(text, "d"); ok {
			n, err := strconv.ParseUint(days, 10, 16)
			if err != nil {
				return time.Time{}, bad
			}
			at = now.AddDate(0, 0, int(n))
		} else if d, err := time.ParseDuration(text); err == nil {
			at = now.Add(d)
		} else {
			return time.Time{}, bad
		}
	}
	if !at.After(now) {
		return time.Time{}, fmt.Errorf("--expires %s: that is over", text)
	}
	return at.UTC().Truncate(time.Second), nil
}

func rotateCommand(path *string) *cobra.Command {
	var h handover
	var finish, cancel, force bool
	cmd := onPeer(path, &cobra.Command{
		Use: "rotate NAME", Short: "Give a peer new keys, which count from when it first uses them",
		Long: "Give a peer new keys, and print the configuration with them. The old keys count\nuntil the device first uses the new ones; then --finish makes the new ones the\nonly ones in the file.",
	}, func(cmd *cobra.Command, v *vpn, p *wireguard.Peer) error {
		switch {
		case p.NextPublicKey.IsZero() && (finish || cancel):
			return fmt.Errorf("%s has no new key: edgeward peer rotate %s makes one", p.Name, p.Name)
		case cancel:
			return cancelRotation(cmd, v, p)
		case finish:
			return finishRotation(cmd, v, p, force)
		case !p.NextPublicKey.IsZero():
			return fmt.Errorf("%s has a new key already: --finish makes it the only one, --cancel drops it", p.Name)
		case !p.Enabled:
			return fmt.Errorf("%s is disabled, and no key of it counts: edgeward peer enable %s comes first", p.Name, p.Name)
		case !p.Expires.IsZero() && !p.Expires.After(time.Now()):
			return fmt.Errorf("%s expired at %s, and no key of it counts: change expires in the file first", p.Name, command.Moment(p.Expires.Time))
		}
		if err := h.keys(v, p.Name); err != nil {
			return err
		}
		var m made
		if err := v.change(cmd, func(text []byte, _ *wireguard.Config) ([]byte, error) {
			return book.SetNext(text, p.Name, h.key, h.presharedFile)
		}, func(c *wireguard.Config) (err error) {
			m, err = h.files(cmd, v, c, p.Name)
			return err
		}); err != nil {
			return h.regret(err)
		}
		if err := h.show(cmd, m); err != nil {
			return err
		}
		say(cmd, "when %s uses it: edgeward peer rotate %s --finish", p.Name, p.Name)
		return nil
	})
	h.flags(cmd)
	cmd.Flags().BoolVar(&finish, "finish", false, "make the new keys the only ones")
	cmd.Flags().BoolVar(&cancel, "cancel", false, "drop the new keys again")
	cmd.Flags().BoolVar(&force, "force", false, "finish although the gateway does not say that the new keys are in use")
	cmd.MarkFlagsMutuallyExclusive("finish", "cancel")
	return cmd
}

func finishRotation(cmd *cobra.Command, v *vpn, p *wireguard.Peer, force bool) error {
	old := p.PresharedKeyFile
	switch s := v.of(p.Name); {
	case force:
	case v.status == nil:
		return fmt.Errorf("nobody knows whether %s uses its new key: %w; --force cuts the old key off all the same", p.Name, v.silent)
	case s == nil || s.PublicKey != p.NextPublicKey:
		return fmt.Errorf("%s has not used its new key yet: give it the configuration that rotate printed; --force cuts the old key off all the same", p.Name)
	}
	if err := v.change(cmd, func(text []byte, _ *wireguard.Config) ([]byte, error) { return book.Finish(text, p.Name) }, nil); err != nil {
		return err
	}
	return spent(cmd, v, old)
}

func cancelRotation(cmd *cobra.Command, v *vpn, p *wireguard.Peer) error {
	if s := v.of(p.Name); s != nil && s.PublicKey == p.NextPublicKey {
		return fmt.Errorf("%s uses its new key already: --finish makes it the only one", p.Name)
	}
	next := p.NextPresharedKeyFile
	if err := v.change(cmd, func(text []byte, _ *wireguard.Config) ([]byte, error) {
		return book.SetNext(text, p.Name, wireguard.PublicKey{}, "")
	}, nil); err != nil {
		return err
	}
	return spent(cmd, v, next)
}

// spent removes files of preshared keys that no peer needs any more, where they are
// those that this program makes and the gateway has let go of them; of others it
// says what to do.
func spent(cmd *cobra.Command, v *vpn, files ...config.File) error {
	var errs []error
	for _, file := range files {
		if file == "" || slices.Contains(v.config.Files(), file) {
			continue
		}
		if v.inForce && filepath.Dir(string(file)) == filepath.Clean(v.config.PresharedKeyDir) && filepath.Ext(string(file)) == ".psk" {
			switch err := os.Remove(string(file)); {
			case err == nil:
				say(cmd, "removed %s, which nothing needs any more", file)
			case !errors.Is(err, fs.ErrNotExist):
				errs = append(errs, fmt.Errorf("remove a preshared key: %w", err))
			}
			continue
		}
		say(cmd, "when the gateway has read the file, nothing needs the preshared key any more: rm %s", command.Shell(string(file)))
	}
	return errors.Join(errs...)
}

func revokeCommand(path *string) *cobra.Command {
	var keep bool
	cmd := onPeer(path, &cobra.Command{
		Use: "revoke NAME", Short: "Take a peer out of the file: it is cut off at once",
		Long: "Take a peer out of the file, and out of grants: it is cut off at once. A grant\nthat was for it alone goes with it, and so does its preshared key.",
	}, func(cmd *cobra.Command, v *vpn, p *wireguard.Peer) error {
		files := []config.File{p.PresharedKeyFile, p.NextPresharedKeyFile}
		var alone []string
		if err := v.change(cmd, func(text []byte, c *wireguard.Config) ([]byte, error) {
			for _, g := range c.Grants {
				if !slices.ContainsFunc(g.To, func(s wireguard.Subject) bool { return s.Group || s.Name != p.Name }) && len(g.To) > 0 {
					alone = append(alone, joined(g.Services))
				}
			}
			return book.Remove(text, p.Name)
		}, nil); err != nil {
			return err
		}
		for _, services := range alone {
			say(cmd, "took out the grant of %s, which was for %s alone", services, p.Name)
		}
		if keep {
			return nil
		}
		return spent(cmd, v, files...)
	})
	cmd.Flags().BoolVar(&keep, "keep-key", false, "leave the file of its preshared key where it is")
	return cmd
}

func setEnabled(enabled bool) func(*cobra.Command, *vpn, *wireguard.Peer) error {
	return func(cmd *cobra.Command, v *vpn, p *wireguard.Peer) error {
		name := p.Name
		if err := v.change(cmd, func(text []byte, _ *wireguard.Config) ([]byte, error) { return book.SetEnabled(text, name, enabled) }, nil); err != nil {
			return err
		}
		if p := v.config.Peer(name); enabled && !p.Expires.IsZero() && !p.Expires.After(time.Now()) {
			say(cmd, "%s expired at %s: change expires in the file to let it in", name, command.Moment(p.Expires.Time))
		}
		return nil
	}
}

func importCommand(path *string) *cobra.Command {
	var groups []string
	var name, presharedTo string
	var readdress bool
	cmd := &cobra.Command{
		Use: "import FILE", Short: "Declare the peers of a configuration of wg-quick", Args: command.One("file", "/etc/wireguard/wg0.conf"),
		Long: "Declare the peers of a configuration of wg-quick: those of a server, or the\nmachine itself of a client's. Preshared keys go into files of presharedKeyDir;\nwhat does not carry over is named. Nothing that the file would run is run.",
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return []string{"conf"}, cobra.ShellCompDirectiveFilterFileExt
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			v, err := openVPN(cmd, *path)
			if err != nil {
				return err
			}
			text, err := os.ReadFile(args[0])
			if err != nil {
				return fmt.Errorf("import: %w", err)
			}
			file, err := wgquick.Parse(args[0], text)
			if err != nil {
				return err
			}
			declared := *v.config
			declared.PublicKey = v.server(v.config)
			if foreign := file.Foreign(&declared); len(foreign) > 0 && !readdress {
				return fmt.Errorf("%s: devices have addresses in %s, which is none of the VPN's (%s), and keep them until they get new configurations: put the server's address there, with the length of its network, into wireguard.addresses, or give the devices others with --readdress", args[0], joined(foreign), joined(declared.Networks()))
			}
			peers, preshared, notes, err := file.Declare(&declared)
			if err != nil {
				return err
			}
			if name != "" {
				if len(peers) != 1 {
					return fmt.Errorf("--name: %s has %s, which one is meant?", args[0], command.Number(len(peers), "peer", "peers"))
				}
				was := peers[0].Name
				if peers[0].Name, err = wireguard.ParseName(name); err != nil {
					return fmt.Errorf("--name: %w", err)
				}
				if key, ok := preshared[was]; ok {
					preshared = map[wireguard.Name]wireguard.PresharedKey{peers[0].Name: key}
				}
			}
			var in []wireguard.Name
			if err := parseAll(groups, "--group", wireguard.ParseName, &in); err != nil {
				return err
			}
			// here is where a preshared key is written.
			here := func(declared config.File) string {
				if presharedTo == "" {
					return string(declared)
				}
				return filepath.Join(presharedTo, filepath.Base(string(declared)))
			}
			var h handover
			for i := range peers {
				p := &peers[i]
				p.Groups = append(p.Groups, in...)
				if _, ok := preshared[p.Name]; ok {
					file, err := v.presharedFile(p.Name)
					if err != nil {
						return err
					}
					p.PresharedKeyFile = config.File(file)
				}
			}
			var assigned wireguard.Assigned
			if err := v.change(cmd, func(text []byte, _ *wireguard.Config) ([]byte, error) { return book.Add(text, peers...) }, func(c *wireguard.Config) error {
				leases := wireguard.Leases{ByName: maps.Clone(v.leases.ByName)}
				assigned, _, _ = leases.Assign(c, time.Now()) // who gets none is unready, as list says
				for _, p := range peers {
					if key, ok := preshared[p.Name]; ok {
						if err := h.write(cmd, v, p.Name, here(p.PresharedKeyFile), key); err != nil {
							return err
						}
					}
				}
				return nil
			}); err != nil {
				return h.regret(err)
			}
			for _, n := range notes {
				say(cmd, "note: %s", n)
			}
			var rows []made
			for _, p := range peers {
				if f := p.PresharedKeyFile; f != "" {
					tellPreshared(cmd, here(f), string(f))
				}
				rows = append(rows, made{
					Name: p.Name, PublicKey: p.PublicKey, Addresses: assigned[p.Name], Groups: p.Groups, PresharedKeyFile: string(p.PresharedKeyFile), Services: reaches(v.config, &p),
				})
			}
			return command.Show(cmd, rows, func(w io.Writer, rows []made) {
				fmt.Fprintf(w, "NAME\tADDRESSES\tGROUPS\tSERVICES\n")
				for _, r := range rows {
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", r.Name, joined(r.Addresses), command.OrDash(joined(r.Groups)), command.OrDash(joined(r.Services)))
				}
			})
		},
	}
	cmd.Flags().StringArrayVar(&groups, "group", nil, "put them into a `GROUP`; may be given again")
	cmd.Flags().StringVar(&presharedTo, "preshared-key-dir", "", "write preshared keys to `DIRECTORY`, for a gateway elsewhere that is to find them in its presharedKeyDir")
	cmd.Flags().BoolVar(&readdress, "readdress", false, "give devices whose addresses are none of the VPN's others: they need new configurations")
	cmd.Flags().StringVar(&name, "name", "", "call the only peer `NAME`")
	// The flag was made above, so there is nothing to fail.
	_ = cmd.RegisterFlagCompletionFunc("group", completeGroups(path))
	return cmd
}

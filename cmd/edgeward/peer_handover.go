package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/edgeward/edgeward/internal/command"
	"github.com/edgeward/edgeward/internal/config"
	"github.com/edgeward/edgeward/tunnel/wireguard"
	"github.com/edgeward/edgeward/tunnel/wireguard/wgquick"
)

// handover is how a peer gets its keys and its configuration.
type handover struct {
	// The flags.
	publicKey   string
	presharedTo string
	noPreshared bool
	qr          string
	out         string

	private   wireguard.PrivateKey // zero where the device made its own
	key       wireguard.PublicKey
	preshared wireguard.PresharedKey
	// presharedFile is where the gateway finds the preshared key.
	presharedFile string
	code          string // the QR code, if one is to be drawn
	codeLines     int
	undo          []string // files that were made, in vain if what follows fails
}

func (h *handover) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&h.publicKey, "public-key", "", "the peer made its own key pair: this is the public `KEY`")
	f.StringVar(&h.presharedTo, "preshared-key-file", "", "write the preshared key to `FILE`, for a gateway elsewhere that is to find it in its presharedKeyDir")
	f.BoolVar(&h.noPreshared, "no-preshared-key", false, "do without a preshared key")
	f.StringVar(&h.qr, "qr", "auto", "draw a QR code `WHEN`: always, never, or auto, which is in a terminal")
	f.StringVar(&h.out, "out", "", "write the configuration to the new `FILE`, readable by its owner alone, and not to standard output")
	cmd.MarkFlagsMutuallyExclusive("preshared-key-file", "no-preshared-key")
	// The flag was made above, so there is nothing to fail.
	_ = cmd.RegisterFlagCompletionFunc("qr", cobra.FixedCompletions([]string{"auto", "always", "never"}, cobra.ShellCompDirectiveNoFileComp))
}

// keys makes the key pair, unless the peer has one, and the preshared key.
func (h *handover) keys(v *vpn, name wireguard.Name) (err error) {
	if !slices.Contains([]string{"auto", "always", "never"}, h.qr) {
		return fmt.Errorf("--qr %s: want auto, always or never", h.qr)
	}
	if h.publicKey == "" {
		h.private = wireguard.NewPrivateKey()
		h.key = h.private.Public()
	} else if h.key, err = wireguard.ParsePublicKey(h.publicKey); err != nil {
		return fmt.Errorf("--public-key: %w", err)
	} else if h.qr == "always" {
		return errors.New("--qr always: the app takes no configuration without a private key, and that is the peer's own")
	}
	if h.noPreshared {
		return nil
	}
	h.preshared = wireguard.NewPresharedKey()
	h.presharedFile, err = v.presharedFile(name)
	return err
}

// presharedFile is where the gateway finds a new preshared key of a peer: NAME.psk,
// or while that one is in use NAME.2.psk, and so on.
func (v *vpn) presharedFile(name wireguard.Name) (string, error) {
	if v.config.PresharedKeyDir == "" {
		return "", errors.New("wireguard.presharedKeyDir is empty: say where the gateway finds preshared keys, or do without, with --no-preshared-key")
	}
	path := filepath.Join(v.config.PresharedKeyDir, string(name)+".psk")
	for n := 2; slices.Contains(v.config.Files(), config.File(path)); n++ {
		path = filepath.Join(v.config.PresharedKeyDir, fmt.Sprintf("%s.%d.psk", name, n))
	}
	return path, nil
}

// made is what was done for one peer. As JSON it holds the secrets of the
// configuration, which were asked for.
type made struct {
	Name             wireguard.Name      `json:"name"`
	PublicKey        wireguard.PublicKey `json:"publicKey"`
	Addresses        []netip.Addr        `json:"addresses"`
	Groups           []wireguard.Name    `json:"groups,omitempty"`
	Expires          time.Time           `json:"expires,omitzero"`
	PresharedKeyFile string              `json:"presharedKeyFile,omitempty"`
	Services         []reached           `json:"services"`
	// Config is the configuration for wg-quick and the apps; File is where it
	// was written instead.
	Config string `json:"config,omitempty"`
	File   string `json:"file,omitempty"`
}

// files writes what the declaration names before it is made, so that the gateway
// finds it, and the configuration, so that no key is declared that nobody has.
func (h *handover) files(cmd *cobra.Command, v *vpn, c *wireguard.Config, name wireguard.Name) (made, error) {
	p := c.Peer(name)
	leases := wireguard.Leases{ByName: v.leases.ByName}
	all, _, err := leases.Assign(c, time.Now())
	if len(all[name]) == 0 { // that others are short of addresses is not about this one
		return made{}, err
	}
	client, err := wgquick.ClientOf(c, name, all[name], h.private, h.preshared, v.server(c))
	if err != nil {
		return made{}, err
	}
	m := made{
		Name: name, PublicKey: h.key, Addresses: all[name], Groups: p.Groups, Expires: p.Expires.Time,
		PresharedKeyFile: h.presharedFile, Services: reaches(c, p), Config: client.Text(),
	}
	columns, _, isTerminal := terminal(cmd.ErrOrStderr())
	if draws := h.qr == "always" || h.qr == "auto" && isTerminal && command.ForPeople(cmd); draws && !h.private.IsZero() {
		if h.code, h.codeLines, err = drawQR(m.Config, columns); err != nil {
			return made{}, err
		}
	}
	if h.presharedFile != "" {
		if err := h.write(cmd, v, name, cmp.Or(h.presharedTo, h.presharedFile), h.preshared); err != nil {
			return made{}, err
		}
	}
	if h.out != "" {
		if err := newFile(h.out, m.Config); err != nil {
			return made{}, err
		}
		h.undo = append(h.undo, h.out)
		m.Config, m.File = "", h.out
	}
	return m, nil
}

// write makes the file of a preshared key of a peer. One that is there already is
// replaced where it is in presharedKeyDir and nobody needs it.
func (h *handover) write(cmd *cobra.Command, v *vpn, name wireguard.Name, path string, key wireguard.PresharedKey) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("write preshared key: %w", err)
	}
	err := wireguard.WriteKeyFile(config.File(path), key.Reveal())
	if errors.Is(err, fs.ErrExist) {
		if !v.needless(name, path) {
			return fmt.Errorf("write preshared key: %s is there already: remove it if no peer needs it", path)
		}
		if err = os.Remove(path); err == nil {
			err = wireguard.WriteKeyFile(config.File(path), key.Reveal())
		}
		if err == nil {
			say(cmd, "%s was the preshared key of no peer, and is another now", path)
		}
	}
	if err != nil {
		return fmt.Errorf("write preshared key: %w", err)
	}
	h.undo = append(h.undo, path)
	return nil
}

// needless reports whether nobody needs the file of a preshared key, which is to
// become one of the peer: the file declares it for nobody else, or it would be
// refused, and the gateway has no such peer that may use it still.
func (v *vpn) needless(name wireguard.Name, path string) bool {
	info, err := os.Lstat(path)
	if err != nil || !info.Mode().IsRegular() && info.Mode().Type() != fs.ModeSymlink {
		return false
	}
	p := v.config.Peer(name)
	mine := p != nil && (string(p.PresharedKeyFile) == path || string(p.NextPresharedKeyFile) == path)
	staged := p != nil && !p.NextPublicKey.IsZero() // then the peer is not new to the gateway, but the file is
	return mine && (staged || v.of(name) == nil)
}

// newFile writes a file that its owner alone may read, and that was not there.
func newFile(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	_, err = f.WriteString(text)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write configuration: %w", errors.Join(err, os.Remove(path)))
	}
	return nil
}

// regret removes what was written for a declaration that was not made.
func (h *handover) regret(err error) error {
	for _, path := range h.undo {
		err = errors.Join(err, os.Remove(path))
	}
	return err
}

// tellPreshared says where a preshared key is, and where it has to be.
func tellPreshared(cmd *cobra.Command, here, there string) {
	if here == there {
		say(cmd, "wrote %s, where the gateway finds it", here)
	} else {
		say(cmd, "wrote %s: the gateway is to find it at %s", here, there)
	}
}

// show hands the configuration over.
func (h *handover) show(cmd *cobra.Command, m made) error {
	if m.File != "" {
		say(cmd, "wrote %s", m.File)
	}
	if h.presharedFile != "" {
		tellPreshared(cmd, cmp.Or(h.presharedTo, h.presharedFile), h.presharedFile)
	}
	if m.File == "" || !command.ForPeople(cmd) {
		if err := command.Show(cmd, m, func(w io.Writer, m made) { fmt.Fprint(w, m.Config) }); err != nil {
			return err
		}
		if f, ok := cmd.OutOrStdout().(*os.File); ok && !h.private.IsZero() {
			if info, err := f.Stat(); err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o077 != 0 {
				say(cmd, "others on this machine can read the file with the private key: chmod 600 it, or use --out")
			}
		}
	}
	if h.code == "" {
		return nil
	}
	fmt.Fprint(cmd.ErrOrStderr(), h.code)
	say(cmd, "scan it with the WireGuard app: +, Scan from QR code; the private key in it is kept nowhere else")
	if _, lines, _ := terminal(cmd.ErrOrStderr()); lines > 0 && lines <= h.codeLines {
		say(cmd, "it takes %d lines, and the terminal has %d: make it taller to see all of it", h.codeLines, lines)
	}
	return nil
}

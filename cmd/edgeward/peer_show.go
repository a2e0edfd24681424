package main

import (
	"cmp"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/edgeward/edgeward/internal/command"
	"github.com/edgeward/edgeward/internal/config"
	"github.com/edgeward/edgeward/tunnel"
	"github.com/edgeward/edgeward/tunnel/wireguard"
)

// peers returns every peer that is declared: as the gateway has it, or, where that
// was not asked or knows nothing of it, as the file has it. After them come those
// that the gateway has still and the file no longer.
func (v *vpn) peers() []wireguard.PeerStatus {
	d := v.desired(v.config)
	known := map[wireguard.Name]wireguard.PeerStatus{}
	why := ""
	if v.status != nil {
		why = "the gateway has not read it yet"
	}
	for _, p := range d.Peers {
		known[p.Name] = wireguard.PeerStatus{
			Name: p.Name, State: wireguard.Live, Why: why, PublicKey: p.PublicKey, Addresses: p.Addresses, Groups: p.Groups, Services: p.Services,
			Expires: p.Expires, Rotating: !p.Next.IsZero(),
		}
	}
	for _, p := range d.Idle {
		known[p.Name] = wireguard.PeerStatus{
			Name: p.Name, State: p.State, Why: cmp.Or(p.Why, why), PublicKey: p.PublicKey, Addresses: p.Addresses, Groups: p.Groups, Expires: p.Expires,
		}
	}
	var gone []wireguard.PeerStatus
	if v.status != nil {
		for _, p := range v.status.Peers {
			if _, declared := known[p.Name]; declared {
				known[p.Name] = p
				continue
			}
			p.Why = "the file declares it no longer"
			gone = append(gone, p)
		}
	}
	out := []wireguard.PeerStatus{}
	for i := range v.config.Peers {
		out = append(out, known[v.config.Peers[i].Name])
	}
	return append(out, gone...)
}

// listing is what list shows.
type listing struct {
	// Asked says that the gateway answered. Otherwise handshakes, traffic and
	// endpoints are not known, and Why says why.
	Asked bool                   `json:"asked"`
	Why   string                 `json:"why,omitempty"`
	Peers []wireguard.PeerStatus `json:"peers"`
}

func listPeers(cmd *cobra.Command, v *vpn) error {
	l := listing{Asked: v.status != nil, Peers: v.peers()}
	if !l.Asked {
		l.Why = v.silent.Error()
		say(cmd, "the gateway was not asked, so this is the file alone: %s", l.Why)
	} else if v.status.Problem != "" {
		say(cmd, "the gateway could not apply all: %s", v.status.Problem)
	}
	return command.Show(cmd, l, func(w io.Writer, l listing) { listTable(w, l, time.Now()) })
}

func listTable(w io.Writer, l listing, now time.Time) {
	fmt.Fprintf(w, "NAME\tSTATE\tGROUPS\tADDRESSES")
	if l.Asked {
		fmt.Fprintf(w, "\tHANDSHAKE\tRECEIVED\tSENT\tENDPOINT")
	}
	fmt.Fprintf(w, "\tEXPIRES\tNOTE\n")
	for _, p := range l.Peers {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s", p.Name, p.State, command.OrDash(joined(p.Groups)), command.OrDash(joined(p.Addresses)))
		if l.Asked {
			fmt.Fprintf(w, "\t%s\t%s\t%s\t%s", age(p.Handshake, now), size(p.Received), size(p.Sent), command.OrDash(p.Endpoint))
		}
		fmt.Fprintf(w, "\t%s\t%s\n", expires(p.Expires, now), command.OrDash(strings.Join(notes(&p), "; ")))
	}
}

// notes are what is to be said of a peer beside its state.
func notes(p *wireguard.PeerStatus) []string {
	var out []string
	if p.Why != "" {
		out = append(out, p.Why)
	}
	if p.Rotating {
		out = append(out, "has a new key to use")
	}
	if p.Denied > 0 {
		out = append(out, command.Number(int(p.Denied), "packet refused", "packets refused"))
	}
	return out
}

// shown is what show shows.
type shown struct {
	wireguard.PeerStatus
	Asked            bool                `json:"asked"`
	NextPublicKey    wireguard.PublicKey `json:"nextPublicKey,omitzero"`
	PresharedKeyFile config.File         `json:"presharedKeyFile,omitempty"`
	FullTunnel       bool                `json:"fullTunnel"`
	// Routes are what the peer's configuration sends to the gateway.
	Routes []netip.Prefix `json:"routes"`
	DNS    []netip.Addr   `json:"dns,omitempty"`
	Behind []netip.Prefix `json:"allowedIPs,omitempty"`
	// Reaches takes the place of the services' names.
	Reaches []reached `json:"reaches"`
}

func showPeer(cmd *cobra.Command, v *vpn, p *wireguard.Peer) error {
	all := v.peers()
	s := shown{
		PeerStatus: all[slices.IndexFunc(all, func(s wireguard.PeerStatus) bool { return s.Name == p.Name })],
		Asked:      v.status != nil, NextPublicKey: p.NextPublicKey, PresharedKeyFile: p.PresharedKeyFile, FullTunnel: p.FullTunnel,
		Routes: v.config.RoutesFor(p), DNS: v.config.DNSFor(p), Behind: p.AllowedIPs, Reaches: reaches(v.config, p),
	}
	if !s.Asked {
		say(cmd, "the gateway was not asked, so this is the file alone: %v", v.silent)
	}
	return command.Show(cmd, s, func(w io.Writer, s shown) { showTable(w, s, time.Now()) })
}

func showTable(w io.Writer, s shown, now time.Time) {
	line := func(name, value string) {
		if value != "" {
			fmt.Fprintf(w, "%s\t%s\n", name, value)
		}
	}
	line("name", string(s.Name))
	line("state", string(s.State))
	line("note", strings.Join(notes(&s.PeerStatus), "; "))
	line("public key", s.PublicKey.String())
	line("next key", s.NextPublicKey.String())
	if s.PresharedKeyFile == "" {
		line("preshared key", "none")
	} else {
		line("preshared key", "in "+string(s.PresharedKeyFile))
	}
	line("addresses", joined(s.Addresses))
	line("behind it", joined(s.Behind))
	line("groups", joined(s.Groups))
	line("expires", expires(s.Expires, now))
	line("sends here", joined(s.Routes))
	line("dns", joined(s.DNS))
	if s.Asked {
		line("handshake", age(s.Handshake, now))
		line("received", size(s.Received))
		line("sent", size(s.Sent))
		line("endpoint", command.OrDash(s.Endpoint))
	}
	fmt.Fprintf(w, "\nSERVICE\tHOST\tADDRESSES\tPORTS\tTHROUGH\n")
	for _, r := range s.Reaches {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", r.Service, command.OrDash(string(r.Host)), strings.Join(r.Addresses, ", "), strings.Join(r.Ports, ", "), strings.Join(r.Through, ", "))
	}
	if len(s.Reaches) == 0 {
		fmt.Fprintln(w, "none: no grant names the peer or one of its groups")
	}
}

func planCommand(path *string) *cobra.Command {
	var from string
	cmd := &cobra.Command{
		Use: "plan", Short: "Show what the file would change at the running gateway, and what it costs", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v, err := openVPN(cmd, *path)
			if err != nil {
				return err
			}
			was, err := v.running(cmd, from)
			if err != nil {
				return err
			}
			plan := wireguard.NewPlan(was, v.desired(v.config))
			plan.Changes = append([]wireguard.Change{}, plan.Changes...) // a list for programs, empty or not
			return command.Show(cmd, plan, planTable)
		},
	}
	cmd.Flags().StringVar(&from, "from", "", "compare with the configuration in `FILE`, and not with the running gateway; - is standard input")
	return cmd
}

// running is what is in force: at the gateway, or by the file from.
func (v *vpn) running(cmd *cobra.Command, from string) (wireguard.Desired, error) {
	if from == "" {
		var d wireguard.Desired
		if v.status == nil {
			return d, fmt.Errorf("ask for what is in force: %w; or name it with --from FILE", v.silent)
		}
		return d, v.ask(cmd.Context(), "/v1/vpn/desired", &d)
	}
	text, err := []byte(nil), error(nil)
	if from == "-" {
		text, err = io.ReadAll(cmd.InOrStdin())
	} else {
		text, err = os.ReadFile(from)
	}
	if err != nil {
		return wireguard.Desired{}, fmt.Errorf("read what is in force: %w", err)
	}
	c, err := tunnel.Parse(from, text)
	if err != nil {
		return wireguard.Desired{}, err
	}
	return v.desired(c.VPN()), nil
}

func planTable(w io.Writer, p wireguard.Plan) {
	for _, c := range p.Changes {
		what := slices.Clone(c.What)
		if len(c.Gains) > 0 {
			what = append(what, "gains "+joined(c.Gains))
		}
		if len(c.Loses) > 0 {
			what = append(what, "loses "+joined(c.Loses))
		}
		if c.Session {
			what = append(what, "its session ends")
		}
		name := string(c.Peer)
		if name == "" {
			name = "gateway"
		}
		fmt.Fprintf(w, "%s\t%s\n", name, strings.Join(what, "; "))
	}
	fmt.Fprintln(w, p)
}

// joined writes a list for people.
func joined[T any](list []T) string {
	var texts []string
	for _, v := range list {
		texts = append(texts, fmt.Sprint(v))
	}
	return strings.Join(texts, ", ")
}

// age writes how long ago a handshake was: one every two minutes is usual while
// there is traffic.
func age(t, now time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return span(now.Sub(t)) + " ago"
}

// expires writes when a peer expires.
func expires(t, now time.Time) string {
	switch {
	case t.IsZero():
		return "never"
	case !t.After(now):
		return command.Moment(t)
	}
	return command.Moment(t) + " (in " + span(t.Sub(now)) + ")"
}

// span writes a duration as people read it, in its two largest units.
func span(d time.Duration) string {
	d = max(d, 0)
	switch {
	case d >= 48*time.Hour:
		return fmt.Sprintf("%dd", int(d.Hours()/24))
	case d >= time.Hour:
		return fmt.Sprintf("%dh%dm", int(d.Hours()), int(d.Minutes())%60)
	case d >= time.Minute:
		return fmt.Sprintf("%dm%ds", int(d.Minutes()), int(d.Seconds())%60)
	}
	return fmt.Sprintf("%ds", int(d.Seconds()))
}

// size writes a number of bytes.
func size(n uint64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	value, unit := float64(n), ""
	for _, unit = range []string{"KiB", "MiB", "GiB", "TiB"} {
		if value /= 1024; value < 1024 {
			break
		}
	}
	return fmt.Sprintf("%.1f %s", value, unit)
}

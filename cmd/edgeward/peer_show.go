package main

import (
	"cmp"
	"errors"
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
	if v.elsewhere() {
		why = "the gateway reads another file"
	} else if v.status != nil {
		why = "the gateway has not got it in force yet"
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
	Asked bool     `json:"asked"`
	Why   string   `json:"why,omitempty"`
	Peers []listed `json:"peers"`
}

// listed is a peer in a list.
type listed struct {
	wireguard.PeerStatus
	// Connected says that there is a session, and not only that there may be one.
	Connected bool `json:"connected"`
}

// sessionLasts is how long after a handshake a session does; where there is
// anything to say there is another handshake before that.
const sessionLasts = 3 * time.Minute

// connected reports whether a peer has a session.
func connected(p *wireguard.PeerStatus, now time.Time) bool {
	return p.State == wireguard.Live && !p.Handshake.IsZero() && now.Sub(p.Handshake) < sessionLasts
}

// state is a peer's for people.
func (p *listed) state() string {
	if p.Connected {
		return string(p.State) + ", connected"
	}
	return string(p.State)
}

func listOf(peers []wireguard.PeerStatus) []listed {
	out := []listed{}
	for _, p := range peers {
		out = append(out, listed{p, connected(&p, time.Now())})
	}
	return out
}

func listPeers(cmd *cobra.Command, v *vpn) error {
	l := listing{Asked: v.status != nil, Peers: listOf(v.peers())}
	if !l.Asked {
		l.Why = v.silent.Error()
		say(cmd, "the gateway was not asked, so this is the file alone: %s", l.Why)
	}
	v.tellTrouble(cmd)
	return command.Show(cmd, l, func(w io.Writer, l listing) { listTable(w, l, time.Now()) })
}

// tellTrouble says why the gateway that answers may not do what the file says.
func (v *vpn) tellTrouble(cmd *cobra.Command) {
	if v.status == nil {
		return
	}
	if v.elsewhere() {
		say(cmd, "the gateway that answers reads %s, and not %s", v.status.File, v.path)
	}
	if v.status.FileProblem != "" {
		say(cmd, "the gateway keeps the last good state: %s", v.status.FileProblem)
	}
	if v.status.Problem != "" {
		say(cmd, "the gateway could not apply all: %s", v.status.Problem)
	}
}

// asRunning is the VPN as the gateway has it, for a file at path that says
// nothing, because it is wrong or gone; fault is what it is. Where the gateway
// does not answer, that is all there is to say.
func asRunning(cmd *cobra.Command, path string, fault error) (*vpn, error) {
	v := &vpn{path: path, socket: cmp.Or(cmd.Flag(socketFlag).Value.String(), tunnel.SocketOf(path))}
	if v.askStatus(cmd.Context()); v.status == nil {
		return nil, fault
	}
	say(cmd, "this is what the gateway at %s has in force; of the file nothing is known:", v.socket)
	return v, nil
}

// listRunning is listPeers without a file to go by, whose fault it returns.
func listRunning(cmd *cobra.Command, path string, fault error) error {
	v, err := asRunning(cmd, path, fault)
	if err != nil {
		return err
	}
	l := listing{Asked: true, Peers: listOf(v.status.Peers)}
	return errors.Join(command.Show(cmd, l, func(w io.Writer, l listing) { listTable(w, l, time.Now()) }), fault)
}

func listTable(w io.Writer, l listing, now time.Time) {
	fmt.Fprintf(w, "NAME\tSTATE\tGROUPS\tADDRESSES")
	if l.Asked {
		fmt.Fprintf(w, "\tHANDSHAKE\tRECEIVED\tSENT\tENDPOINT")
	}
	fmt.Fprintf(w, "\tEXPIRES\tNOTE\n")
	for _, p := range l.Peers {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s", p.Name, p.state(), command.OrDash(joined(p.Groups)), command.OrDash(joined(p.Addresses)))
		if l.Asked {
			fmt.Fprintf(w, "\t%s\t%s\t%s\t%s", age(p.Handshake, now), size(p.Received), size(p.Sent), command.OrDash(p.Endpoint))
		}
		fmt.Fprintf(w, "\t%s\t%s\n", expires(p.Expires, now), command.OrDash(strings.Join(notes(&p.PeerStatus), "; ")))
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
	listed
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

func showCommand(path *string) *cobra.Command {
	cmd := onPeer(path, &cobra.Command{Use: "show NAME", Short: "Show all about a peer but its secrets, and what it reaches and why"}, nil)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		v, err := openVPN(cmd, *path)
		if err != nil {
			return showRunning(cmd, *path, args[0], err)
		}
		p, err := v.peer(args[0])
		if err != nil {
			return err
		}
		return showPeer(cmd, v, p)
	}
	return cmd
}

// showRunning is showPeer without a file to go by, whose fault it returns.
func showRunning(cmd *cobra.Command, path, name string, fault error) error {
	v, err := asRunning(cmd, path, fault)
	if err != nil {
		return err
	}
	p := v.of(wireguard.Name(name))
	if p == nil {
		return errors.Join(fmt.Errorf("the gateway has no peer %q", name), fault)
	}
	var d wireguard.Desired
	if err := v.ask(cmd.Context(), "/v1/vpn/desired", &d); err != nil {
		return errors.Join(err, fault)
	}
	s := inForce{listed: listOf([]wireguard.PeerStatus{*p})[0], Reaches: []reached{}}
	for i := range d.Services {
		if slices.Contains(p.Services, d.Services[i].Name) {
			s.Reaches = append(s.Reaches, reachedBy(&d.Services[i], nil))
		}
	}
	return errors.Join(command.Show(cmd, s, func(w io.Writer, s inForce) {
		line := liner(w)
		s.begin(line)
		line("addresses", joined(s.Addresses))
		line("groups", joined(s.Groups))
		s.end(line, time.Now())
		reachTable(w, s.Reaches)
	}), fault)
}

// inForce is what show shows where there is only the gateway to ask.
type inForce struct {
	listed
	// Reaches takes the place of the services' names.
	Reaches []reached `json:"reaches"`
}

func showPeer(cmd *cobra.Command, v *vpn, p *wireguard.Peer) error {
	all := v.peers()
	s := shown{
		listed: listOf(all[slices.IndexFunc(all, func(s wireguard.PeerStatus) bool { return s.Name == p.Name }):])[0],
		Asked:  v.status != nil, NextPublicKey: p.NextPublicKey, PresharedKeyFile: p.PresharedKeyFile, FullTunnel: p.FullTunnel,
		Routes: v.config.RoutesFor(p), DNS: v.config.DNSFor(p), Behind: p.AllowedIPs, Reaches: reaches(v.config, p),
	}
	if !s.Asked {
		say(cmd, "the gateway was not asked, so this is the file alone: %v", v.silent)
	}
	v.tellTrouble(cmd)
	return command.Show(cmd, s, func(w io.Writer, s shown) { showTable(w, s, time.Now()) })
}

// liner writes lines of a table, each a name and what it stands for; one without
// a value is left out.
func liner(w io.Writer) func(name, value string) {
	return func(name, value string) {
		if value != "" {
			fmt.Fprintf(w, "%s\t%s\n", name, value)
		}
	}
}

// begin and end are the lines on what is known of every peer.
func (p *listed) begin(line func(name, value string)) {
	line("name", string(p.Name))
	line("state", p.state())
	line("note", strings.Join(notes(&p.PeerStatus), "; "))
	line("public key", p.PublicKey.String())
}

func (p *listed) end(line func(name, value string), now time.Time) {
	line("handshake", age(p.Handshake, now))
	line("received", size(p.Received))
	line("sent", size(p.Sent))
	line("endpoint", command.OrDash(p.Endpoint))
}

func showTable(w io.Writer, s shown, now time.Time) {
	line := liner(w)
	s.begin(line)
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
		s.end(line, now)
	}
	reachTable(w, s.Reaches)
}

func reachTable(w io.Writer, all []reached) {
	fmt.Fprintf(w, "\nSERVICE\tHOST\tADDRESSES\tPORTS\tTHROUGH\n")
	for _, r := range all {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", r.Service, command.OrDash(string(r.Host)), strings.Join(r.Addresses, ", "), strings.Join(r.Ports, ", "), command.OrDash(strings.Join(r.Through, ", ")))
	}
	if len(all) == 0 {
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
			if from == "" {
				plan = plan.Among(v.connected())
			}
			for _, w := range v.warnings {
				say(cmd, "warning: %s", w)
			}
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

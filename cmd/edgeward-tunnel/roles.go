package main

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/edgeward/edgeward/internal/daemon"
	"github.com/edgeward/edgeward/tunnel"
	"github.com/edgeward/edgeward/tunnel/cloudflare/api"
	"github.com/edgeward/edgeward/tunnel/wireguard"
	"github.com/edgeward/edgeward/tunnel/wireguard/gateway"
)

// roles is what one process is, as the flag --role says it: cloudflare,
// wireguard, or both with a comma. None is what the file has sections for.
type roles struct{ cloudflare, wireguard bool }

// Set reads the flag.
func (r *roles) Set(text string) error {
	*r = roles{}
	for name := range strings.SplitSeq(text, ",") {
		switch name {
		case "cloudflare":
			r.cloudflare = true
		case "wireguard":
			r.wireguard = true
		default:
			return errors.New("want cloudflare, wireguard, or both with a comma")
		}
	}
	return nil
}

// String is the flag.
func (r *roles) String() string {
	var names []string
	if r.cloudflare {
		names = append(names, "cloudflare")
	}
	if r.wireguard {
		names = append(names, "wireguard")
	}
	return strings.Join(names, ",")
}

// Type names the flag's type.
func (r *roles) Type() string { return "ROLE" }

// of returns what the process is, given the configuration at path.
func (r roles) of(path string, c *tunnel.Config) (roles, error) {
	switch {
	case r == roles{}:
		return roles{c.HasTunnels(), c.HasVPN()}, nil
	case r.cloudflare && !c.HasTunnels():
		return r, fmt.Errorf("role cloudflare: %s has no tunnels", path)
	case r.wireguard && !c.HasVPN():
		return r, fmt.Errorf("role wireguard: %s has no section wireguard", path)
	}
	return r, nil
}

// process holds what the roles of this process need; nil is for a role that it does
// not have.
type process struct {
	file    string // the whole path of the configuration
	watcher *tunnel.Watcher
	role    roles
	public  *public
	vpn     *gateway.Gateway
}

// enforce puts a configuration in force. What one role cannot use does not keep
// the other from it.
func (p *process) enforce(c tunnel.Config) error {
	var errs []error
	if p.public != nil {
		if c.HasTunnels() {
			errs = append(errs, p.public.enforce(&c))
		} else {
			errs = append(errs, errors.New("the tunnels are gone from the file: stop this process, or give it another role"))
		}
	}
	if p.vpn != nil {
		if c.HasVPN() {
			errs = append(errs, p.vpn.Apply(*c.VPN()))
		} else {
			errs = append(errs, errors.New("the section wireguard is gone from the file: to end the VPN, stop this process and run cleanup"))
		}
	}
	return errors.Join(errs...)
}

// ready returns nil where every role does its work.
func (p *process) ready() error {
	var errs []error
	if p.public != nil {
		errs = append(errs, tunnel.Ready(p.public.connectors.links()))
	}
	if p.vpn != nil {
		errs = append(errs, p.vpn.Ready())
	}
	return errors.Join(errs...)
}

// standing is the whole of /v1/status. What it says of itself stands for all
// roles.
type standing struct {
	Version string `json:"version"`
	Role    string `json:"role"`
	Ready   string `json:"ready"` // "yes", or why not
	// Trouble is all that is wrong, but for what has a place of its own in the
	// rest; empty for nothing.
	Trouble string `json:"trouble,omitempty"`
	*tunnel.Status
	VPN *gateway.Report `json:"vpn,omitempty"`
}

func (p *process) standing() standing {
	s := standing{Version: tunnel.Version, Role: p.role.String(), Ready: "yes"}
	if err := p.ready(); err != nil {
		s.Ready = daemon.OneLine(err)
	}
	troubles := []string{p.watcher.Trouble()}
	if p.public != nil {
		status := p.public.gate.Status(p.public.connectors.links())
		troubles = append(troubles, p.public.connectors.troubled())
		if p.public.records.on() {
			report := p.public.records.keeper.Report()
			status.Cloudflare = report
			troubles = append(troubles, wrong(report)...)
			for _, t := range report.Tunnels {
				if at := slices.IndexFunc(status.Links, func(l tunnel.Link) bool { return l.Tunnel == t.Name }); at >= 0 {
					status.Links[at].Note = t.Says
				}
			}
		}
		s.Status = &status
	}
	if p.vpn != nil {
		report := p.vpn.Report()
		troubles = append(troubles, report.Problem)
		s.VPN = &report
	}
	s.Trouble = strings.Join(slices.DeleteFunc(troubles, func(t string) bool { return t == "" }), "; ")
	return s
}

// outline is standing without what tells of single peers: any user of the machine
// may ask for it.
func (p *process) outline() standing {
	s := p.standing()
	if s.VPN != nil {
		s.VPN.Peers, s.VPN.Denied = []wireguard.PeerStatus{}, []gateway.Attempt{}
	}
	return s
}

// wrong is what the last turn at Cloudflare could not do, and what it found that
// only the operator can mend.
func wrong(r api.Report) []string {
	out := []string{strings.ReplaceAll(r.Error, "\n", "; ")}
	for _, h := range r.Hosts {
		if h.State == api.Conflict || h.State == api.Refused {
			out = append(out, h.Host+" "+h.Says)
		}
	}
	return out
}

// answers are what the command line may ask.
func (p *process) answers() daemon.Answers {
	all := daemon.Answers{"/v1/status": func(url.Values) (any, error) { return p.standing(), nil }}
	all["/v1/why"] = func(url.Values) (any, error) {
		return nil, errors.New("this gateway serves the VPN alone, and judges no visitors; `edgeward peer show NAME` says what a peer may reach")
	}
	if p.public != nil {
		all["/v1/why"] = func(query url.Values) (any, error) {
			addr, err := netip.ParseAddr(query.Get("address"))
			if err != nil {
				return nil, err
			}
			return p.public.gate.Why(addr, query.Get("country")), nil
		}
	}
	if p.vpn != nil {
		all["/v1/vpn"] = func(url.Values) (any, error) {
			s := p.vpn.Status()
			s.File, s.FileProblem = p.file, p.watcher.Trouble()
			return s, nil
		}
		all["/v1/vpn/desired"] = func(url.Values) (any, error) { return p.vpn.Desired(), nil }
	}
	return all
}

// orders are what the command line may have done: edgeward peer, which edits the
// file, has it read at once.
func (p *process) orders() daemon.Orders {
	return daemon.Orders{"/v1/reload": func(url.Values, string) (any, error) {
		p.reload()
		return struct{}{}, nil
	}}
}

// reload has the file read now, and says again what is wrong.
func (p *process) reload() {
	if p.public != nil {
		p.public.connectors.repeat()
	}
	p.watcher.Reload()
}

// inForce is a metric of all roles.
func (p *process) inForce() prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "edgeward_configuration_in_force", Help: "1 if the configuration in force is the file's.",
	}, func() float64 {
		if p.watcher.Trouble() != "" {
			return 0
		}
		return 1
	})
}

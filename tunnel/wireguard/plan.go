package wireguard

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Plan is what going from one Desired to another does.
type Plan struct {
	// Changes are those of the device, then of services, then of peers by name.
	Changes []Change `json:"changes"`
	// Sessions is how many peers that are live lose the session that they may have:
	// they end, or have to shake hands anew.
	Sessions int `json:"sessions"`

	live []Name // those of Sessions
}

// Change is about one peer or one service, or about the gateway where both are
// empty.
type Change struct {
	Peer    Name `json:"peer,omitempty"`
	Service Name `json:"service,omitempty"`
	// What is done, such as "added" or "next key staged".
	What []string `json:"what,omitempty"`
	// Session says that the peer, or of the gateway's changes every peer, loses
	// its session: it ends, or has to shake hands anew.
	Session bool `json:"session,omitempty"`
	// Removed says that the peer is not declared any more.
	Removed bool `json:"removed,omitempty"`
	// Gains and Loses are services that the peer may reach from now on, or no
	// longer.
	Gains []Name `json:"gains,omitempty"`
	Loses []Name `json:"loses,omitempty"`
}

// NewPlan compares two wishes. Of preshared keys it knows whether there is one,
// and whether it changed where both wishes hold it.
func NewPlan(was, now Desired) Plan {
	var p Plan
	device := deviceChange(was, now)
	if device.What != nil {
		p.Changes = append(p.Changes, device)
	}
	p.Changes = append(p.Changes, serviceChanges(was.Services, now.Services)...)
	p.Changes = append(p.Changes, peerChanges(was, now)...)
	lost := map[Name]bool{}
	for _, c := range p.Changes {
		if c.Session && c.Peer != "" {
			lost[c.Peer] = true
		}
	}
	for _, peer := range was.Peers {
		if device.Session {
			lost[peer.Name] = true
		}
	}
	p.live = slices.Sorted(maps.Keys(lost))
	p.Sessions = len(p.live)
	return p
}

// Among is the plan with Sessions counted among those peers alone that are
// connected.
func (p Plan) Among(connected map[Name]bool) Plan {
	p.live = slices.DeleteFunc(slices.Clone(p.live), func(n Name) bool { return !connected[n] })
	p.Sessions = len(p.live)
	return p
}

// became is "WHAT A -> B", or nothing where they are the same.
func became[T any](what string, a, b T) []string {
	from, to := fmt.Sprint(a), fmt.Sprint(b)
	if from == to {
		return nil
	}
	return []string{fmt.Sprintf("%s %s -> %s", what, cmp.Or(from, "none"), cmp.Or(to, "none"))}
}

func deviceChange(was, now Desired) Change {
	a, b := was.Device, now.Device
	var c Change
	for _, what := range [][]string{
		became("interface", a.Interface, b.Interface),
		became("mode", a.Mode, b.Mode),
		became("public key", a.PublicKey, b.PublicKey),
		became("listen port", a.ListenPort, b.ListenPort),
	} {
		c.What = append(c.What, what...)
	}
	c.Session = c.What != nil // all of these
	for _, what := range [][]string{
		became("addresses", texts(a.Addresses), texts(b.Addresses)),
		became("mtu", a.MTU, b.MTU),
		became("masquerade", was.Access.Masquerade, now.Access.Masquerade),
		became("resolver on", texts(was.Names.Listen), texts(now.Names.Listen)),
		became("upstreams", texts(was.Names.Upstreams), texts(now.Names.Upstreams)),
		became("zones", words(was.Names.Zones), words(now.Names.Zones)),
	} {
		c.What = append(c.What, what...)
	}
	return c
}

func serviceChanges(was, now []Service) []Change {
	before, after := map[Name]Service{}, map[Name]Service{}
	for _, s := range was {
		before[s.Name] = s
	}
	for _, s := range now {
		after[s.Name] = s
	}
	var out []Change
	for _, name := range bothOf(before, after) {
		a, wasThere := before[name]
		b, isThere := after[name]
		c := Change{Service: name}
		switch {
		case !wasThere:
			c.What = []string{"declared"}
		case !isThere:
			c.What = []string{"removed"}
		default:
			for _, what := range [][]string{
				became("host", a.Host, b.Host),
				became("addresses", networks(a.Addresses), networks(b.Addresses)),
				became("targets", texts(a.Targets), texts(b.Targets)),
				became("ports", texts(a.Ports), texts(b.Ports)),
			} {
				c.What = append(c.What, what...)
			}
		}
		if c.What != nil {
			out = append(out, c)
		}
	}
	return out
}

// party is a peer, live or idle.
type party struct {
	live *DesiredPeer
	idle *IdlePeer
}

func parties(d Desired) map[Name]party {
	out := map[Name]party{}
	for i := range d.Peers {
		out[d.Peers[i].Name] = party{live: &d.Peers[i]}
	}
	for i := range d.Idle {
		out[d.Idle[i].Name] = party{idle: &d.Idle[i]}
	}
	return out
}

func (p party) key() PublicKey {
	if p.live != nil {
		return p.live.PublicKey
	}
	return p.idle.PublicKey
}

func peerChanges(was, now Desired) []Change {
	before, after := parties(was), parties(now)
	// A name that is gone and one that is new with the same key are one peer.
	gone := map[PublicKey]Name{}
	for name, p := range before {
		if _, stays := after[name]; !stays {
			gone[p.key()] = name
		}
	}
	renamed := map[Name]Name{} // new to old
	for name, p := range after {
		if old, ok := gone[p.key()]; ok {
			if _, there := before[name]; !there {
				renamed[name] = old
			}
		}
	}
	for name, old := range renamed {
		before[name] = before[old]
		delete(before, old)
	}
	var out []Change
	for _, name := range bothOf(before, after) {
		a, wasThere := before[name]
		b, isThere := after[name]
		c := Change{Peer: name}
		if old := renamed[name]; old != "" {
			c.What = append(c.What, "renamed from "+string(old))
		}
		switch {
		case !wasThere && b.live == nil:
			c.What = append(c.What, "declared, "+b.idle.told())
		case !wasThere:
			c.What = append(c.What, "added")
			c.Gains = b.live.Services
		case !isThere:
			c.What, c.Removed = append(c.What, "removed"), true
			if a.live != nil {
				c.Loses, c.Session = a.live.Services, true
			}
		case a.live != nil && b.live != nil:
			c.compare(a.live, b.live)
		case a.live != nil:
			c.What = append(c.What, b.idle.told())
			c.Loses, c.Session = a.live.Services, true
		case b.live != nil:
			c.What = append(c.What, fmt.Sprintf("live, was %s", a.idle.State))
			c.Gains = b.live.Services
		default:
			c.What = append(c.What, became("state", a.idle.State, b.idle.State)...)
		}
		if c.What != nil || c.Gains != nil || c.Loses != nil {
			out = append(out, c)
		}
	}
	return out
}

// told is the state with what more there is to say.
func (p *IdlePeer) told() string {
	if p.Why != "" {
		return fmt.Sprintf("%s: %s", p.State, p.Why)
	}
	return string(p.State)
}

// compare says what is done to a peer that is live before and after.
func (c *Change) compare(a, b *DesiredPeer) {
	say := func(what ...string) { c.What = append(c.What, what...) }
	switch {
	case a.PublicKey == b.PublicKey:
	case a.Next == b.PublicKey:
		say("rotation finished")
	default:
		say("key replaced")
		c.Session = true
	}
	switch {
	case a.Next == b.Next || a.Next == b.PublicKey && b.Next.IsZero():
	case b.Next.IsZero():
		say("staged key taken out")
	default:
		say("next key staged")
	}
	if a.PublicKey == b.PublicKey {
		switch {
		case a.Shared && !b.Shared:
			say("preshared key taken out: the peer needs a new configuration")
		case !a.Shared && b.Shared:
			say("preshared key added: the peer needs a new configuration")
		case !a.PresharedKey.IsZero() && !b.PresharedKey.IsZero() && a.PresharedKey != b.PresharedKey:
			say("preshared key changed: the peer needs a new configuration")
		}
	}
	say(became("addresses", texts(a.Addresses), texts(b.Addresses))...)
	say(became("networks", networks(a.Networks), networks(b.Networks))...)
	say(became("groups", words(a.Groups), words(b.Groups))...)
	say(became("expiry", moment(a.Expires), moment(b.Expires))...)
	c.Gains, c.Loses = missing(b.Services, a.Services), missing(a.Services, b.Services)
}

// missing are the names in a that are not in b.
func missing(a, b []Name) []Name {
	var out []Name
	for _, n := range a {
		if !slices.Contains(b, n) {
			out = append(out, n)
		}
	}
	return out
}

func moment(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return t.UTC().Format(time.RFC3339)
}

func texts[T fmt.Stringer](list []T) string {
	var out []string
	for _, x := range list {
		out = append(out, x.String())
	}
	return strings.Join(out, ", ")
}

func networks(list []netip.Prefix) string {
	var out []string
	for _, p := range list {
		out = append(out, short(p))
	}
	return strings.Join(out, ", ")
}

func words[T ~string](list []T) string {
	var out []string
	for _, x := range list {
		out = append(out, string(x))
	}
	return strings.Join(out, ", ")
}

// bothOf are the keys of two maps, sorted.
func bothOf[V any](a, b map[Name]V) []Name {
	all := maps.Clone(a)
	maps.Copy(all, b)
	return slices.Sorted(maps.Keys(all))
}

// Empty reports whether nothing changes.
func (p Plan) Empty() bool { return len(p.Changes) == 0 }

// told is how many peers a plan's one line names.
const told = 5

// String is the plan in one line: "2 peers change, 0 sessions reset, alice loses
// grafana".
func (p Plan) String() string {
	if p.Empty() {
		return "nothing changes"
	}
	var parts, more []string
	peers := 0
	for _, c := range p.Changes {
		switch {
		case c.Peer == "" && c.Service == "":
			parts = append(parts, "the gateway changes")
		case c.Service != "":
			more = append(more, fmt.Sprintf("service %s: %s", c.Service, strings.Join(c.What, ", ")))
		default:
			peers++
			if c.Removed {
				more = append(more, string(c.Peer)+" is removed")
				continue
			}
			if c.Loses != nil {
				more = append(more, fmt.Sprintf("%s loses %s", c.Peer, words(c.Loses)))
			}
			if c.Gains != nil {
				more = append(more, fmt.Sprintf("%s gains %s", c.Peer, words(c.Gains)))
			}
		}
	}
	parts = append(parts, count(peers, "peer changes", "peers change"), count(p.Sessions, "session reset", "sessions reset"))
	if n := len(more); n > told {
		more = append(more[:told], fmt.Sprintf("and %d more", n-told))
	}
	return strings.Join(append(parts, more...), ", ")
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

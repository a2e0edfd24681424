package api

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Desired is all that is wished.
type Desired struct {
	// Owner is the id in our ownership records.
	Owner  string
	Policy Policy
	// Tunnels are made, or adopted by their names.
	Tunnels []Tunnel
	// Hosts are public.
	Hosts []Host
	// Internal are hosts, or *.DOMAIN, that are never public: a host that is
	// here as well gets no record, and loses the one that is ours.
	Internal []string
	// Adopt are hosts whose CNAME others made, to be taken over. Relinquish are
	// hosts to let go: the ownership record is deleted and the CNAME stays.
	Adopt, Relinquish []string
	// Zones are those that may be written in; a host in none of them is
	// reported and left.
	Zones []string
	// Gone wishes for nothing: what is ours in the zones is deleted, and nothing
	// is made. DropTunnels has the tunnels that have no ID here deleted as well,
	// but for those that something of others leads to.
	Gone, DropTunnels bool
}

// Nothing is the wish that all that is ours in the zones of d were gone, with the
// tunnels too if they are to be dropped. What is to be relinquished stays.
func (d Desired) Nothing(tunnels bool) Desired {
	return Desired{
		Owner: d.Owner, Policy: Sync, Tunnels: d.Tunnels, Relinquish: d.Relinquish, Zones: d.Zones, Gone: true, DropTunnels: tunnels,
	}
}

// Policy says what may be written.
type Policy string

// The policies: UpsertOnly deletes nothing that is no more desired; DryRun
// writes nothing and plans as Sync does.
const (
	Sync       Policy = "sync"
	UpsertOnly Policy = "upsert-only"
	DryRun     Policy = "dry-run"
)

// Tunnel is one, desired or found. A desired one whose ID is known, from a token
// that was given, is neither made nor adopted.
type Tunnel struct {
	Name string
	ID   string
	// Connections are those that are registered, as far as was asked.
	Connections int
	// Ours are those of them that this program holds, here or elsewhere.
	Ours int
	// Others are the versions of connectors that are not this program's and
	// serve the tunnel as well, one for each, sorted.
	Others []string
}

// Host is a public host, or *.DOMAIN, and the name of its tunnel. Names are in
// small letters and without a final dot.
type Host struct{ Name, Tunnel string }

// Have is what Cloudflare holds. Trouble, where it is not empty, says why
// something could not be read: nothing is then concluded from its absence.
type Have struct {
	Tunnels        []Tunnel
	TunnelsTrouble string
	Zones          []Zone
}

// Zone is a DNS zone and all of its records.
type Zone struct {
	Name, ID, Status, Trouble string
	Records                   []Record
}

// Record is a DNS record as the API has it: the name complete, the text of a TXT
// record in quotes, a TTL of 1 for automatic.
type Record struct {
	ID      string `json:"id,omitempty"`
	Type    string `json:"type"`
	Name    string `json:"name"`
	Content string `json:"content"`
	Proxied bool   `json:"proxied"`
	TTL     int    `json:"ttl"`
	Comment string `json:"comment,omitempty"`
}

// Changes is what a turn will write, and how each tunnel and host stands. It is
// sorted, so that equal worlds give equal changes.
type Changes struct {
	Tunnels []TunnelState `json:"tunnels"`
	Hosts   []HostState   `json:"hosts"`
	Writes  []Write       `json:"writes"`
}

// Write is one thing that is written.
type Write struct {
	Verb Verb   `json:"verb"`
	Zone string `json:"zone,omitempty"`
	Host string `json:"host,omitempty"`
	// Type is tunnel, CNAME or TXT.
	Type string `json:"type"`
	Name string `json:"name"`
	// Content is empty for a CNAME to a tunnel that must be made first; Tunnel
	// then names it.
	Content string `json:"content,omitempty"`
	Tunnel  string `json:"tunnel,omitempty"`
	// Was is what is replaced or deleted.
	Was string `json:"was,omitempty"`
	// ID is that of the record that is updated or deleted.
	ID string `json:"id,omitempty"`
}

// String is the write in a line: + is made, ~ changed, - deleted. Its parts are
// parted by tabs.
func (w Write) String() string {
	to := w.Content
	if w.Type == "CNAME" && to == "" {
		to = "the new tunnel " + w.Tunnel
	}
	switch {
	case w.Type == "tunnel" && w.Verb == Create:
		return "+ tunnel\t" + w.Name
	case w.Verb == Create:
		return fmt.Sprintf("+ %s\t%s\t%s", w.Type, w.Name, to)
	case w.Verb == Update:
		return fmt.Sprintf("~ %s\t%s\t%s (was %s)", w.Type, w.Name, to, w.Was)
	}
	return fmt.Sprintf("- %s\t%s\t%s", w.Type, w.Name, w.Was)
}

// Verb is create, update or delete.
type Verb string

// The verbs.
const (
	Create Verb = "create"
	Update Verb = "update"
	Delete Verb = "delete"
)

// State says in one word how a tunnel or a host stands.
type State string

// The states.
const (
	OK       State = "ok"       // as desired
	Pending  State = "pending"  // written by the next turn
	Conflict State = "conflict" // something of others is in the way
	Foreign  State = "foreign"  // right, but not ours to keep
	Leftover State = "leftover" // no more desired, kept by the policy
	Refused  State = "refused"  // Cloudflare did not take it
	Unknown  State = "unknown"  // could not be read
)

// TunnelState is how a tunnel stands.
type TunnelState struct {
	Name        string `json:"name"`
	ID          string `json:"id,omitempty"`
	State       State  `json:"state"`
	Connections int    `json:"connections"`
	// Ours are those of them that this program holds, here or elsewhere.
	Ours int `json:"ours"`
	// Says is what the state does not, and what to do.
	Says string `json:"says,omitempty"`
}

// HostState is how a host stands.
type HostState struct {
	Host   string `json:"host"`
	Zone   string `json:"zone,omitempty"`
	Tunnel string `json:"tunnel,omitempty"` // empty: not desired any more
	State  State  `json:"state"`
	// Owner is whose the record is, as its ownership record has it.
	Owner string `json:"owner,omitempty"`
	// Target is what the host's CNAME holds.
	Target string `json:"target,omitempty"`
	// Says is what the state does not, and what to do.
	Says string `json:"says,omitempty"`
	// Notes are warnings about a host that is right otherwise.
	Notes []string `json:"notes,omitempty"`
}

// Diff works out the changes from what there is to what is desired.
func Diff(d Desired, have Have) Changes {
	p := plan{desired: d, targets: map[string]string{}, making: map[string]bool{},
		out: Changes{Tunnels: []TunnelState{}, Hosts: []HostState{}, Writes: []Write{}}}
	p.tunnels(have)
	hosts := map[string]map[string]Host{} // by zone and name
	for _, h := range d.Hosts {
		zone, ok := zoneOf(h.Name, d.Zones)
		switch {
		case !ok:
			p.host(HostState{Host: h.Name, Tunnel: h.Tunnel, State: Unknown,
				Says: "no zone of cloudflare.zones ends its name: add the zone, or make the record by hand"})
			continue
		case len(h.Name) > longestHost:
			p.host(HostState{Host: h.Name, Zone: zone, Tunnel: h.Tunnel, State: Conflict,
				Says: fmt.Sprintf("is longer than %d letters: its ownership record would not fit into DNS", longestHost)})
			continue
		case hosts[zone] == nil:
			hosts[zone] = map[string]Host{}
		}
		hosts[zone][h.Name] = h
	}
	for _, z := range have.Zones {
		p.zone(z, hosts[z.Name])
	}
	if d.DropTunnels {
		p.drop(have)
	}
	slices.SortFunc(p.out.Tunnels, func(a, b TunnelState) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(p.out.Hosts, func(a, b HostState) int { return cmp.Compare(a.Host, b.Host) })
	slices.SortStableFunc(p.out.Writes, func(a, b Write) int {
		return cmp.Or(cmp.Compare(a.Zone, b.Zone), cmp.Compare(a.Host, b.Host), cmp.Compare(a.Type, b.Type),
			cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID))
	})
	return p.out
}

// plan is a Diff under way.
type plan struct {
	desired Desired
	targets map[string]string // tunnel to its name in DNS
	making  map[string]bool   // tunnels that will be made
	out     Changes
}

func (p *plan) host(h HostState) { p.out.Hosts = append(p.out.Hosts, h) }

func (p *plan) tunnels(have Have) {
	for _, t := range p.desired.Tunnels {
		at := slices.IndexFunc(have.Tunnels, func(h Tunnel) bool { return t.ID != "" && h.ID == t.ID || t.ID == "" && h.Name == t.Name })
		state := TunnelState{Name: t.Name, ID: t.ID, State: OK}
		switch {
		case at >= 0:
			state.ID, state.Connections, state.Ours = have.Tunnels[at].ID, have.Tunnels[at].Connections, have.Tunnels[at].Ours
			state.Says = shared(have.Tunnels[at].Others)
		case have.TunnelsTrouble != "" && t.ID != "":
		case have.TunnelsTrouble != "":
			state.State, state.Says = Unknown, have.TunnelsTrouble
		case t.ID != "":
			state.State, state.Says = Conflict, "the account has no tunnel of the id that its token names: get the token of one that it has"
		case p.desired.Gone:
		default:
			state.State = Pending
			p.making[t.Name] = true
			p.out.Writes = append(p.out.Writes, Write{Verb: Create, Type: "tunnel", Name: t.Name, Tunnel: t.Name})
		}
		// An id that was given is good for records, whoever's account it is in.
		if state.ID != "" {
			p.targets[t.Name] = Target(state.ID)
		}
		p.out.Tunnels = append(p.out.Tunnels, state)
	}
}

// drop deletes the tunnels that are there by their names, once nothing leads to
// them any more.
func (p *plan) drop(have Have) {
	for i, t := range p.out.Tunnels {
		named := slices.ContainsFunc(p.desired.Tunnels, func(d Tunnel) bool { return d.Name == t.Name && d.ID == "" })
		if !named || t.ID == "" {
			continue
		}
		if left := p.leading(have, Target(t.ID)); left != "" {
			p.out.Tunnels[i].Says = "stays: " + left
			continue
		}
		p.out.Tunnels[i].State = Pending
		p.out.Writes = append(p.out.Writes, Write{Verb: Delete, Type: "tunnel", Name: t.Name, Tunnel: t.Name, Was: t.ID, ID: t.ID})
	}
}

// leading says what will lead to target after the writes; empty for nothing that
// can be seen.
func (p *plan) leading(have Have, target string) string {
	for _, z := range have.Zones {
		if z.Trouble != "" {
			return z.Trouble
		}
		for _, r := range z.Records {
			deleted := func(w Write) bool { return w.Verb == Delete && w.Zone == z.Name && w.ID == r.ID }
			if r.Type == "CNAME" && r.Content == target && !slices.ContainsFunc(p.out.Writes, deleted) {
				return r.Name + " leads to it, made by others or let go"
			}
		}
	}
	return ""
}

// shared warns of connectors that are not this program's. Cloudflare hands each
// request to any connector of the tunnel.
func shared(others []string) string {
	if len(others) == 0 {
		return ""
	}
	return fmt.Sprintf("is served by other connectors too (%s): what they get is judged by no decision, and routed by their rules: end them, or give them a tunnel of their own",
		strings.Join(slices.Compact(slices.Clone(others)), ", "))
}

// zone goes through the hosts of a zone that are desired, and those that are
// ours.
func (p *plan) zone(z Zone, desired map[string]Host) {
	if z.Trouble != "" {
		for _, h := range desired {
			p.host(HostState{Host: h.Name, Zone: z.Name, Tunnel: h.Tunnel, State: Unknown, Says: z.Trouble})
		}
		return
	}
	names := map[string]*found{}
	at := func(host string) *found {
		if names[host] == nil {
			names[host] = &found{}
		}
		return names[host]
	}
	for host := range desired {
		at(host)
	}
	for _, r := range z.Records {
		host, isClaim := hostOf(r.Name)
		// A claim on a host that is in a zone of its own is not looked at here:
		// that zone has the host's records.
		if zone, _ := zoneOf(host, p.desired.Zones); isClaim && zone != z.Name {
			continue
		}
		if owner, ok := ownerIn(r.Content); isClaim && ok && r.Type == "TXT" {
			f := at(host)
			if owner == p.desired.Owner && owner != "" {
				f.mine = append(f.mine, r)
			} else {
				f.others = append(f.others, owner)
			}
		}
	}
	for _, r := range z.Records {
		f := names[r.Name]
		switch {
		case f == nil:
		case r.Type == "CNAME":
			f.cname = &r
		case r.Type == "A", r.Type == "AAAA", r.Type == "NS" && r.Name != z.Name:
			f.blocking = r.Type
		}
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		f := names[name]
		want, wanted := desired[name]
		if !wanted && len(f.mine) == 0 {
			continue // another's
		}
		h := decide{plan: p, zone: z, found: f, host: HostState{Host: name, Zone: z.Name, Tunnel: want.Tunnel, State: OK}}
		h.decide(wanted)
		p.host(h.host)
	}
}

// found is what a zone has for a host.
type found struct {
	mine     []Record // our ownership records
	others   []string // owners in those of others
	cname    *Record
	blocking string // the type of a record that shuts out a CNAME
}

// decide is the decision on one host.
type decide struct {
	*plan
	*found
	zone Zone
	host HostState
}

func (h *decide) decide(wanted bool) {
	name := h.host.Host
	if h.cname != nil {
		h.host.Target = h.cname.Content
	}
	switch {
	case len(h.mine) > 0:
		h.host.Owner = h.desired.Owner
	case len(h.others) > 0:
		h.host.Owner = h.others[0]
	}
	internal := slices.ContainsFunc(h.desired.Internal, func(pattern string) bool { return covers(pattern, name) })
	switch {
	case slices.Contains(h.desired.Relinquish, name):
		h.letGo(wanted)
	case internal && len(h.mine) > 0:
		h.remove("is internal: its public record is taken away")
	case internal:
		h.host.State, h.host.Says = Conflict, "is internal: it gets no public record"
	case !wanted && h.desired.Policy == UpsertOnly:
		h.host.State, h.host.Says = Leftover, "is not desired any more, and policy upsert-only keeps it: use policy sync, or relinquish it"
	case !wanted:
		h.remove("is not desired any more")
	default:
		h.keep()
	}
}

// keep has the host lead to its tunnel.
func (h *decide) keep() {
	name, tunnel := h.host.Host, h.host.Tunnel
	target := h.targets[tunnel]
	adopt := slices.Contains(h.desired.Adopt, name)
	right := h.cname != nil && h.cname.Content == target && h.cname.Proxied && target != ""
	conflict := func(format string, args ...any) {
		h.host.State, h.host.Says = Conflict, fmt.Sprintf(format, args...)
	}
	switch {
	case len(h.others) > 0:
		conflict("belongs to owner %q: take it out there, or delete the TXT record %s", h.others[0], ownerName(name))
		return
	case h.blocking != "":
		conflict("has a record of type %s, made by others: delete it, and the host is made", h.blocking)
		return
	case target == "" && !h.making[tunnel]:
		h.host.State, h.host.Says = Unknown, NoID(tunnel)
		return
	case h.cname == nil, adopt, len(h.mine) > 0 && h.madeIt():
	case len(h.mine) > 0:
		conflict("was led to %s by others: delete that record, name the host under cloudflare.adopt, or under cloudflare.relinquish", h.cname.Content)
		return
	case right:
		h.host.State, h.host.Says = Foreign, "leads here, made by others: name it under cloudflare.adopt to have it kept"
		h.notes()
		return
	default:
		conflict("leads to %s, made by others: delete that record, or name the host under cloudflare.adopt", h.cname.Content)
		return
	}
	h.notes()
	switch {
	case h.cname == nil:
		h.write(Write{Verb: Create, Type: "CNAME", Name: name, Content: target, Tunnel: tunnel})
	case !right:
		was := h.cname.Content
		if !h.cname.Proxied {
			was += ", not proxied"
		}
		h.write(Write{Verb: Update, Type: "CNAME", Name: name, Content: target, Tunnel: tunnel, ID: h.cname.ID, Was: was})
	}
	if len(h.mine) == 0 {
		h.write(Write{Verb: Create, Type: "TXT", Name: ownerName(name), Content: ownership(h.desired.Owner)})
		return
	}
	// One is enough. All name us, so it does not matter which stays; the order
	// of their ids makes two instances choose the same one.
	slices.SortFunc(h.mine, func(a, b Record) int { return cmp.Compare(a.ID, b.ID) })
	if h.desired.Policy != UpsertOnly {
		h.deleteRecords(h.mine[1:])
	}
}

// NoID is what is said of a host whose tunnel's id is not known.
func NoID(tunnel string) string { return fmt.Sprintf("the id of tunnel %q is not known", tunnel) }

// madeIt reports whether the alias of a host that is ours is as we would have
// made it: it leads to a tunnel of ours, or to any with our comment on it. Others
// have tunnels, too, and may have led the host there.
func (h *decide) madeIt() bool {
	if h.cname.Comment == comment(h.desired.Owner) {
		return strings.HasSuffix(h.cname.Content, targetSuffix)
	}
	return slices.Contains(slices.Collect(maps.Values(h.targets)), h.cname.Content)
}

// comment is what a record says that we write.
func comment(owner string) string { return "kept by edgeward, owner " + owner }

// remove takes away what is ours of a host.
func (h *decide) remove(says string) {
	h.host.Says = says
	if h.cname != nil && len(h.others) == 0 {
		if h.madeIt() {
			h.write(Write{Verb: Delete, Type: "CNAME", Name: h.cname.Name, ID: h.cname.ID, Was: h.cname.Content})
		} else {
			h.host.Says += "; its CNAME was led to " + h.cname.Content + " by others and stays"
		}
	}
	h.deleteRecords(h.mine)
}

// letGo deletes our ownership record and no more.
func (h *decide) letGo(wanted bool) {
	h.deleteRecords(h.mine)
	h.host.Says = "is relinquished: the record is nobody's of ours"
	if len(h.mine) == 0 {
		h.host.State = Foreign
	}
	if wanted && h.cname == nil && h.blocking == "" {
		h.host.State, h.host.Says = Conflict, "is relinquished and has no record: make one, or take it out of cloudflare.relinquish"
	}
}

func (h *decide) deleteRecords(records []Record) {
	for _, r := range records {
		h.write(Write{Verb: Delete, Type: r.Type, Name: r.Name, ID: r.ID, Was: r.Content})
	}
}

func (h *decide) write(w Write) {
	w.Zone, w.Host = h.zone.Name, h.host.Host
	h.out.Writes = append(h.out.Writes, w)
	if h.host.State == OK {
		h.host.State = Pending
	}
}

// notes warns about what the records cannot mend.
func (h *decide) notes() {
	note := func(n string) {
		if n != "" {
			h.host.Notes = append(h.host.Notes, n)
		}
	}
	name := h.host.Host
	note(certificateNote(name, h.zone.Name))
	if h.zone.Status != "" && h.zone.Status != "active" {
		note(fmt.Sprintf("zone %s is %s at Cloudflare: no record of it is served", h.zone.Name, h.zone.Status))
	}
	for _, i := range h.desired.Internal {
		if covers(name, i) {
			note(fmt.Sprintf("covers %s, which is internal: the name resolves, and the connector refuses it", i))
		}
	}
}

package api

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"
)

// Keeper brings tunnels and records into step with what is desired, a turn at a
// time; internal/reconcile calls the turns. Its methods may be called at any
// time by several goroutines.
type Keeper struct {
	client *client
	log    *slog.Logger

	turn  chan struct{}     // holds one while somebody asks and writes
	zones map[string]string // ids, which never change; under turn

	mu       sync.Mutex
	settings Settings
	report   Report
	fights   map[string]*fight // by host
}

// Report is what the last turn found and did.
type Report struct {
	Time    time.Time     `json:"time"`
	Policy  Policy        `json:"policy"`
	Tunnels []TunnelState `json:"tunnels"`
	Hosts   []HostState   `json:"hosts"`
	// Written counts what the turn wrote.
	Written int `json:"written"`
	// Error says what went wrong, empty for nothing.
	Error string `json:"error,omitempty"`
}

// The permissions that tokens need, as the dashboard names them.
const (
	mayTunnels = "the permission Account / Cloudflare Tunnel / Edit"
	mayZone    = "the permission Zone / Zone / Read for the zone"
	mayRecords = "the permission Zone / DNS / Edit for the zone"
)

// The sizes of pages: the largest that is sure to be taken, so that a list is
// read in one call where that can be.
const (
	tunnelsPage = 1000
	zonesPage   = 50
	recordsPage = 5000
	// batchSize is what a free zone takes in one transaction.
	batchSize = 200
)

// Product begins the version that this program's connectors and calls give, by
// which it tells its own connectors, in whatever pod they are, from others.
const Product = "edgeward/"

// New makes a Keeper; it asks nothing until it is told to.
func New(s Settings, agent string, log *slog.Logger) *Keeper {
	return &Keeper{
		client:   newClient(agent),
		turn:     make(chan struct{}, 1),
		log:      log,
		zones:    map[string]string{},
		fights:   map[string]*fight{},
		settings: s,
		report:   Report{Policy: s.Desired.Policy},
	}
}

// take waits for the turn of the caller, who gives it back by reading one.
func (k *Keeper) take(ctx context.Context) error {
	select {
	case k.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for calls under way: %w", ctx.Err())
	}
}

// Update takes other settings, from the next turn on.
func (k *Keeper) Update(s Settings) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.wish(s.Desired)
	k.settings = s
}

func (k *Keeper) current() Settings {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.settings
}

// Report returns what the last turn found and did.
func (k *Keeper) Report() Report {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.report
}

// Usage returns what the API was asked.
func (k *Keeper) Usage() Usage { return k.client.used() }

// Plan reads and returns what a turn would write. The changes are good as far as
// they go even where there is an error.
func (k *Keeper) Plan(ctx context.Context) (Changes, error) {
	if err := k.take(ctx); err != nil {
		return Changes{Tunnels: []TunnelState{}, Hosts: []HostState{}, Writes: []Write{}}, err
	}
	defer func() { <-k.turn }()
	s := k.current()
	have, err := k.read(ctx, s)
	return Diff(s.Desired, have), err
}

// Turn reads, works out the changes and applies them, unless the policy is to
// write nothing. What one zone or tunnel lacks does not stop the others; what
// could not be written stays as it was. It is a reconcile.Turn, and leaves the
// next time to the interval.
func (k *Keeper) Turn(ctx context.Context) (next time.Time, err error) {
	if err := k.take(ctx); err != nil {
		return time.Time{}, err
	}
	defer func() { <-k.turn }()
	s := k.current()
	have, err := k.read(ctx, s)
	changes := k.yield(Diff(s.Desired, have), s.Desired.Owner)
	report := Report{Policy: s.Desired.Policy, Tunnels: changes.Tunnels, Hosts: changes.Hosts}
	if s.Desired.Policy != DryRun {
		a := apply{k: k, settings: s, have: have, report: &report}
		err = errors.Join(err, a.apply(ctx, changes))
	}
	k.conclude(report, err)
	return time.Time{}, err
}

// conclude keeps the report, and logs what is new in it.
func (k *Keeper) conclude(r Report, err error) {
	r.Time = time.Now()
	if err != nil {
		r.Error = err.Error()
	}
	k.mu.Lock()
	before := k.report
	k.report = r
	k.mu.Unlock()
	for _, h := range r.Hosts {
		same := func(b HostState) bool { return reflect.DeepEqual(b, h) }
		if h.State == OK && len(h.Notes) == 0 || h.State == Unknown && err != nil || slices.ContainsFunc(before.Hosts, same) {
			continue
		}
		level := slog.LevelInfo
		if h.State == Conflict || h.State == Refused || h.State == Unknown {
			level = slog.LevelWarn
		}
		k.log.Log(context.Background(), level, "state of a host", "host", h.Host, "state", string(h.State), "says", h.Says, "notes", h.Notes)
	}
	for _, t := range r.Tunnels {
		same := func(b TunnelState) bool { return b.Name == t.Name && b.State == t.State && b.Says == t.Says }
		if (t.State == Conflict || t.State == OK && t.Says != "") && !slices.ContainsFunc(before.Tunnels, same) {
			k.log.Warn("state of a tunnel", "tunnel", t.Name, "state", string(t.State), "says", t.Says)
		}
	}
}

// Token returns the connector's token of a tunnel that has none of its own,
// making the tunnel if there is none of that name. It is a secret.
func (k *Keeper) Token(ctx context.Context, name string) (string, error) {
	if err := k.take(ctx); err != nil {
		return "", err
	}
	defer func() { <-k.turn }()
	s := k.current()
	if s.TunnelToken == "" {
		return "", fmt.Errorf("get the token of tunnel %s: there is no cloudflare.tunnelTokenFile", name)
	}
	tunnels, err := k.readTunnels(ctx, s)
	if err != nil {
		return "", err
	}
	at := slices.IndexFunc(tunnels, func(t Tunnel) bool { return t.Name == name })
	if at < 0 {
		if s.Desired.Policy == DryRun {
			return "", fmt.Errorf("get the token of tunnel %s: there is none of that name, and policy dry-run makes none", name)
		}
		id, err := k.createTunnel(ctx, s, name)
		if err != nil {
			return "", err
		}
		tunnels, at = []Tunnel{{Name: name, ID: id}}, 0
	}
	var token string
	_, err = k.client.do(ctx, call{base: s.URL, what: "get token", of: "tunnel " + name, needs: mayTunnels, token: s.TunnelToken,
		method: http.MethodGet, path: "/accounts/" + s.Account + "/cfd_tunnel/" + tunnels[at].ID + "/token"}, &token)
	return token, err
}

// read asks for all that Diff needs. What could not be read is in the result, as
// trouble, and the error says why.
func (k *Keeper) read(ctx context.Context, s Settings) (Have, error) {
	var have Have
	var errs []error
	switch {
	case s.TunnelToken == "":
		have.TunnelsTrouble = "there is no cloudflare.tunnelTokenFile to look it up with"
	case len(s.Desired.Tunnels) > 0:
		var err error
		if have.Tunnels, err = k.readTunnels(ctx, s); err != nil {
			errs = append(errs, err)
			have.TunnelsTrouble = "the tunnels of the account could not be listed"
		}
	}
	for _, name := range s.Desired.Zones {
		zone, err := k.readZone(ctx, s, name)
		if err != nil {
			errs = append(errs, err)
			zone = Zone{Name: name, Trouble: "zone " + name + " could not be read"}
		}
		have.Zones = append(have.Zones, zone)
	}
	return have, errors.Join(errs...)
}

func (k *Keeper) readTunnels(ctx context.Context, s Settings) ([]Tunnel, error) {
	type tunnel struct {
		ID          string `json:"id"`
		Name        string `json:"name"`
		Connections []struct {
			Client  string `json:"client_id"`
			Version string `json:"client_version"`
		} `json:"connections"`
	}
	all, err := list[tunnel](ctx, k.client, call{base: s.URL, what: "list tunnels", of: "account " + s.Account, needs: mayTunnels, token: s.TunnelToken,
		path: "/accounts/" + s.Account + "/cfd_tunnel", query: url.Values{"is_deleted": {"false"}}}, tunnelsPage)
	var out []Tunnel
	for _, t := range all {
		found := Tunnel{Name: t.Name, ID: t.ID, Connections: len(t.Connections)}
		others := map[string]string{} // client to version
		for _, c := range t.Connections {
			if strings.HasPrefix(c.Version, Product) {
				found.Ours++
			} else {
				others[c.Client] = cmp.Or(c.Version, "of no version")
			}
		}
		found.Others = slices.Sorted(maps.Values(others))
		out = append(out, found)
	}
	return out, err
}

func (k *Keeper) createTunnel(ctx context.Context, s Settings, name string) (string, error) {
	// Without a secret of ours Cloudflare makes one up. A configuration that is
	// kept there is what the dashboard expects; nobody writes one.
	var made struct{ ID string }
	_, err := k.client.do(ctx, call{base: s.URL, what: "create tunnel", of: "account " + s.Account, needs: mayTunnels, token: s.TunnelToken,
		method: http.MethodPost, path: "/accounts/" + s.Account + "/cfd_tunnel",
		body: map[string]string{"name": name, "config_src": "cloudflare"}}, &made)
	switch {
	case err != nil:
		return "", fmt.Errorf("make tunnel %s: %w", name, err)
	case made.ID == "":
		return "", fmt.Errorf("make tunnel %s: the answer has no id", name)
	}
	k.log.Info("tunnel created", "tunnel", name, "id", made.ID)
	return made.ID, nil
}

func (k *Keeper) deleteTunnel(ctx context.Context, s Settings, w Write) error {
	_, err := k.client.do(ctx, call{base: s.URL, what: "delete tunnel", of: "account " + s.Account, needs: mayTunnels, token: s.TunnelToken,
		method: http.MethodDelete, path: "/accounts/" + s.Account + "/cfd_tunnel/" + w.ID}, nil)
	if err != nil {
		return fmt.Errorf("delete tunnel %s: %w", w.Name, err)
	}
	k.log.Info("tunnel deleted", "tunnel", w.Name, "id", w.ID)
	return nil
}

func (k *Keeper) readZone(ctx context.Context, s Settings, name string) (Zone, error) {
	zone := Zone{Name: name, ID: k.zones[name]}
	token := s.ZoneTokens[name]
	if zone.ID == "" {
		type found struct{ ID, Name, Status string }
		all, err := list[found](ctx, k.client, call{base: s.URL, what: "find zone", of: name, needs: mayZone, token: token,
			path: "/zones", query: url.Values{"name": {name}}}, zonesPage)
		if err != nil {
			return zone, err
		}
		at := slices.IndexFunc(all, func(f found) bool { return f.Name == name })
		if at < 0 {
			return zone, fmt.Errorf("find zone of %s: there is none that the token in %s may see: is it at Cloudflare, and does the token have %s?", name, token, mayZone)
		}
		zone.ID, zone.Status = all[at].ID, all[at].Status
	}
	records, err := list[Record](ctx, k.client, call{base: s.URL, what: "list records", of: name, needs: mayRecords, token: token,
		path: "/zones/" + zone.ID + "/dns_records"}, recordsPage)
	var refused *refusal
	switch {
	case errors.As(err, &refused):
		delete(k.zones, name) // it may have been taken out and put in again
	case err == nil && (zone.Status == "active" || zone.Status == ""):
		k.zones[name] = zone.ID // asked again as long as it is not active
	}
	zone.Records = records
	return zone, err
}

// apply writes the changes of one turn.
type apply struct {
	k        *Keeper
	settings Settings
	have     Have
	report   *Report
}

func (a *apply) apply(ctx context.Context, c Changes) error {
	var errs []error
	targets := map[string]string{} // of tunnels that were made
	zones := map[string][]Write{}
	for _, w := range c.Writes {
		if w.Type != "tunnel" {
			zones[w.Zone] = append(zones[w.Zone], w)
			continue
		}
		if w.Verb == Delete {
			continue // last
		}
		id, err := a.k.createTunnel(ctx, a.settings, w.Name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		targets[w.Name] = Target(id)
		a.report.Written++
		for i, t := range a.report.Tunnels {
			if t.Name == w.Name {
				a.report.Tunnels[i].ID, a.report.Tunnels[i].State = id, OK
			}
		}
	}
	for _, z := range a.have.Zones {
		var hosts [][]Write // what belongs together
		for _, w := range zones[z.Name] {
			if n := len(hosts); n > 0 && hosts[n-1][0].Host == w.Host {
				hosts[n-1] = append(hosts[n-1], w)
			} else {
				hosts = append(hosts, []Write{w})
			}
		}
		ready := hosts[:0]
		for _, host := range hosts {
			if a.resolve(host, targets) {
				ready = append(ready, host)
			}
		}
		for len(ready) > 0 {
			n, size := 0, 0
			for n < len(ready) && size+len(ready[n]) <= batchSize {
				size += len(ready[n])
				n++
			}
			n = max(n, 1)
			err := a.batch(ctx, z, ready[:n])
			errs = append(errs, err)
			var refused *refusal
			if err != nil && !errors.As(err, &refused) {
				break // the zone is left to the next turn
			}
			ready = ready[n:]
		}
	}
	for _, w := range c.Writes {
		if w.Type != "tunnel" || w.Verb != Delete || errors.Join(errs...) != nil {
			continue // a record that is left would lead to nothing
		}
		if err := a.k.deleteTunnel(ctx, a.settings, w); err != nil {
			errs = append(errs, err)
			continue
		}
		a.report.Written++
	}
	return errors.Join(errs...)
}

// resolve fills in the names of tunnels that were made in this turn; without
// one, the host has to wait.
func (a *apply) resolve(host []Write, targets map[string]string) bool {
	for i, w := range host {
		if w.Type == "CNAME" && w.Verb != Delete && w.Content == "" {
			host[i].Content = targets[w.Tunnel]
			if host[i].Content == "" {
				return false
			}
		}
	}
	return true
}

// batch writes the records of some hosts in one transaction. Where Cloudflare
// refuses it, one host is at fault, and the others must not suffer: each half is
// tried by itself. A refused batch has written nothing.
func (a *apply) batch(ctx context.Context, z Zone, hosts [][]Write) error {
	body := struct {
		Deletes []map[string]string `json:"deletes,omitempty"`
		Patches []Record            `json:"patches,omitempty"`
		Posts   []Record            `json:"posts,omitempty"`
	}{}
	var all []Write
	for _, host := range hosts {
		all = append(all, host...)
	}
	for _, w := range all {
		record := Record{ID: w.ID, Type: w.Type, Name: w.Name, Content: w.Content, Proxied: w.Type == "CNAME", TTL: 1, Comment: comment(a.settings.Desired.Owner)}
		switch w.Verb {
		case Delete:
			body.Deletes = append(body.Deletes, map[string]string{"id": w.ID})
		case Update:
			body.Patches = append(body.Patches, record)
		case Create:
			body.Posts = append(body.Posts, record)
		}
	}
	_, err := a.k.client.do(ctx, call{base: a.settings.URL, what: "write records", of: z.Name, needs: mayRecords, token: a.settings.ZoneTokens[z.Name],
		method: http.MethodPost, path: "/zones/" + z.ID + "/dns_records/batch", body: body}, nil)
	var refused *refusal
	if errors.As(err, &refused) && !tokenRefused(refused) {
		if len(hosts) > 1 {
			half := len(hosts) / 2
			err := a.batch(ctx, z, hosts[:half])
			if err != nil && !errors.As(err, &refused) {
				return err
			}
			return errors.Join(err, a.batch(ctx, z, hosts[half:]))
		}
		a.state(hosts[0][0].Host, Refused, refused.says)
		return fmt.Errorf("write the records of host %s: %w", hosts[0][0].Host, err)
	}
	if err != nil {
		return err
	}
	a.report.Written += len(all)
	for _, w := range all {
		a.k.log.Info("record written", "verb", string(w.Verb), "type", w.Type, "name", w.Name, "content", w.Content, "was", w.Was, "zone", w.Zone)
	}
	for _, host := range hosts {
		a.k.wrote(host[0].Host)
		a.done(host)
	}
	return nil
}

// done makes the report say what is now.
func (a *apply) done(host []Write) {
	name := host[0].Host
	a.report.Hosts = slices.DeleteFunc(a.report.Hosts, func(h HostState) bool {
		return h.Host == name && h.Tunnel == "" // it was desired no more
	})
	for i := range a.report.Hosts {
		if h := &a.report.Hosts[i]; h.Host == name {
			if h.State == Pending {
				h.State = OK
			}
			for _, w := range host {
				if w.Type == "CNAME" && w.Verb != Delete {
					h.Target = w.Content
				}
				if w.Type == "TXT" && w.Verb == Create {
					h.Owner = a.settings.Desired.Owner
				}
			}
		}
	}
}

func (a *apply) state(host string, s State, says string) {
	for i := range a.report.Hosts {
		if a.report.Hosts[i].Host == host {
			a.report.Hosts[i].State, a.report.Hosts[i].Says = s, says
		}
	}
}

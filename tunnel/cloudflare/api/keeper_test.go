package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"golang.org/x/time/rate"

	"github.com/edgeward/edgeward/internal/config"
	"github.com/edgeward/edgeward/test/cfedge"
)

// world is an account at Cloudflare with a token for tunnels and one for each
// zone, as the documentation asks for.
type world struct {
	t       *testing.T
	cloud   *cfedge.Cloud
	api     *cfedge.API
	account string
	dir     string
	tokens  map[string]string // by the name of a zone, or tunnels
	want    Settings
}

func newWorld(t *testing.T, zones ...string) *world {
	t.Helper()
	w := &world{t: t, cloud: cfedge.NewCloud(), dir: t.TempDir(), tokens: map[string]string{}}
	w.api = cfedge.NewAPI(w.cloud)
	w.account = w.cloud.AddAccount("home")
	w.want = Settings{
		URL:         "http://api.invalid/client/v4",
		Account:     w.account,
		TunnelToken: w.token("tunnels", w.cloud.AddToken("tunnels", cfedge.TunnelEdit(w.account))),
		ZoneTokens:  map[string]config.File{},
		Desired:     Desired{Owner: "home", Policy: Sync, Tunnels: []Tunnel{{Name: "main"}}, Zones: zones},
	}
	for _, z := range zones {
		w.cloud.AddZone(w.account, z)
		w.want.ZoneTokens[z] = w.token(z, w.cloud.AddToken(z, cfedge.ZoneRead(z), cfedge.DNSEdit(z)))
	}
	return w
}

// token writes one to its file.
func (w *world) token(name, text string) config.File {
	w.t.Helper()
	w.tokens[name] = text
	path := filepath.Join(w.dir, name)
	if err := os.WriteFile(path, []byte(text+"\n"), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return config.File(path)
}

// hosts wishes for hosts at the tunnel main, or for HOST@TUNNEL.
func (w *world) hosts(names ...string) {
	w.want.Desired.Hosts = nil
	for _, n := range names {
		host, tunnel, ok := strings.Cut(n, "@")
		if !ok {
			tunnel = "main"
		}
		w.want.Desired.Hosts = append(w.want.Desired.Hosts, Host{host, tunnel})
	}
}

// direct carries requests to the emulated API without a network.
type direct struct{ http.Handler }

func (d direct) RoundTrip(r *http.Request) (resp *http.Response, err error) {
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	defer func() {
		if p := recover(); p != nil {
			resp, err = nil, errors.New("connection reset by peer")
		}
		if r.Context().Err() != nil { // the process is gone before it hears the answer
			resp, err = nil, r.Context().Err()
		}
	}()
	if r.Body == nil {
		r.Body = http.NoBody
	}
	recorder := httptest.NewRecorder()
	d.ServeHTTP(recorder, r)
	return recorder.Result(), nil
}

// keeper is a new process, with no bound to its calls but the emulator's.
func (w *world) keeper() *Keeper {
	k := New(w.want, "edgeward-test", slog.New(slog.DiscardHandler))
	k.client.http.Transport = direct{w.api}
	k.client.spend = rate.NewLimiter(rate.Inf, 0)
	return k
}

// turn is one by a new process, which must succeed.
func (w *world) turn() Report {
	w.t.Helper()
	k := w.keeper()
	if _, err := k.Turn(context.Background()); err != nil {
		w.t.Fatal(err)
	}
	return k.Report()
}

// settled fails unless nothing is left to write.
func (w *world) settled() {
	w.t.Helper()
	changes, err := w.keeper().Plan(context.Background())
	if err != nil || len(changes.Writes) > 0 {
		w.t.Fatalf("a second turn would write %v, %v", changes.Writes, err)
	}
}

func (w *world) id(tunnel string) string {
	for _, t := range w.cloud.Tunnels(w.account) {
		if t.Name == tunnel {
			return t.ID.String()
		}
	}
	w.t.Fatalf("there is no tunnel %s", tunnel)
	return ""
}

// has is what zones hold, a line each, with the names of tunnels for their ids.
func (w *world) has() []string {
	var out []string
	for _, z := range w.want.Desired.Zones {
		for _, r := range w.cloud.Records(z) {
			content := r.Content
			for _, t := range w.cloud.Tunnels(w.account) {
				content = strings.ReplaceAll(content, t.ID.String()+targetSuffix, "@"+t.Name)
			}
			line := r.Name + " " + r.Type + " " + content
			if r.Proxied {
				line += " proxied"
			}
			out = append(out, line)
		}
	}
	slices.Sort(out)
	return out
}

func (w *world) expect(lines ...string) {
	w.t.Helper()
	slices.Sort(lines)
	if diff := cmp.Diff(lines, w.has()); diff != "" {
		w.t.Fatalf("records (-want +have):\n%s", diff)
	}
}

// pair is what a host of ours has.
func pair(host, tunnel string) []string {
	return []string{host + " CNAME @" + tunnel + " proxied", ownerName(host) + ` TXT "heritage=edgeward,edgeward/owner=home"`}
}

func pairs(tunnel string, hosts ...string) (out []string) {
	for _, h := range hosts {
		out = append(out, pair(h, tunnel)...)
	}
	return out
}

func states(r Report) map[string]State {
	out := map[string]State{}
	for _, h := range r.Hosts {
		out[h.Host] = h.State
	}
	return out
}

func TestTheLifeOfAHost(t *testing.T) {
	w := newWorld(t, "example.org", "lab.example.org", "example.net")
	w.want.Desired.Tunnels = []Tunnel{{Name: "main"}, {Name: "lab"}}
	w.hosts("app.example.org", "example.org", "*.example.net", "grafana.lab.example.org@lab", "deep.er.example.org")

	report := w.turn()
	made := append(pairs("main", "app.example.org", "example.org", "*.example.net", "deep.er.example.org"), pair("grafana.lab.example.org", "lab")...)
	w.expect(made...)
	if report.Written != 12 || report.Error != "" {
		t.Errorf("the report is %+v", report)
	}
	for _, h := range report.Hosts {
		if h.State != OK || h.Owner != "home" || !strings.HasSuffix(h.Target, targetSuffix) {
			t.Errorf("host %+v", h)
		}
		if noted := len(h.Notes) > 0; noted != (h.Host == "deep.er.example.org") {
			t.Errorf("host %s has the notes %q", h.Host, h.Notes)
		}
	}
	w.settled()

	// A turn with nothing to do reads, and no more: tunnels, and a zone each.
	k := w.keeper()
	for range 2 {
		w.api.Forget()
		if _, err := k.Turn(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	if calls := w.api.Calls(); len(calls) != 4 {
		t.Errorf("a turn makes the calls %v", calls)
	}

	// A host is renamed, one moves to another tunnel, one is gone.
	w.hosts("new.example.org", "example.org", "*.example.net@lab", "grafana.lab.example.org@lab")
	w.turn()
	w.expect(append(pairs("main", "new.example.org", "example.org"), pairs("lab", "*.example.net", "grafana.lab.example.org")...)...)
	w.settled()

	// A tunnel is deleted in the dashboard: it is made anew, and what led to the
	// old one is mended.
	old := w.id("lab")
	for _, tunnel := range w.cloud.Tunnels(w.account) {
		if tunnel.Name == "lab" {
			w.cloud.RemoveTunnel(tunnel.ID)
		}
	}
	w.turn()
	if w.id("lab") == old {
		t.Error("the tunnel is the deleted one")
	}
	w.expect(append(pairs("main", "new.example.org", "example.org"), pairs("lab", "*.example.net", "grafana.lab.example.org")...)...)

	w.hosts()
	w.turn()
	w.expect()
	if n := len(w.cloud.Tunnels(w.account)); n != 2 {
		t.Errorf("there are %d tunnels: none is ever deleted", n)
	}
}

func TestATurnAdoptsATunnelByItsName(t *testing.T) {
	w := newWorld(t, "example.org")
	other := w.cloud.AddAccount("other")
	w.cloud.AddTunnel(other, "main", nil)
	gone := w.cloud.AddTunnel(w.account, "main", nil)
	w.cloud.RemoveTunnel(gone.ID)
	kept := w.cloud.AddTunnel(w.account, "main", nil)
	w.hosts("app.example.org")
	w.turn()
	w.expect(pair("app.example.org", "main")...)
	if id := w.id("main"); id != kept.ID.String() {
		t.Errorf("the tunnel is %s", id)
	}
	token, err := w.keeper().Token(context.Background(), "main")
	if err != nil || token != kept.Token() {
		t.Errorf("its token is %q, %v", token, err)
	}
	token, err = w.keeper().Token(context.Background(), "second")
	if err != nil || w.id("second") == "" || token == "" {
		t.Errorf("a tunnel that is not there: %v", err)
	}
	w.want.Desired.Policy = DryRun
	if _, err = w.keeper().Token(context.Background(), "third"); err == nil || len(w.cloud.Tunnels(w.account)) != 2 {
		t.Errorf("a dry run makes a tunnel: %v", err)
	}
}

// written is the name of a record that was written.
func written(r cfedge.RecordWrite) string {
	if r.After != nil {
		return r.After.Name
	}
	return r.Before.Name
}

// TestTwoWishesOfOneOwner has two instances take turns that want different things
// under one owner: they stop, say why, and go on when they want the same.
func TestTwoWishesOfOneOwner(t *testing.T) {
	w := newWorld(t, "example.org")
	w.api.SetLimit(100_000, time.Minute) // its clock does not run along
	now := time.Now()
	instance := func(hosts ...string) *Keeper {
		w.hosts(hosts...)
		k := w.keeper()
		k.client.now = func() time.Time { return now }
		return k
	}
	turn := func(k *Keeper) {
		t.Helper()
		if _, err := k.Turn(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	older, newer := instance("app.example.org", "old.example.org"), instance("app.example.org", "new.example.org")
	conflicts := map[string]int{}
	for range 7 * 24 * 6 { // a week
		for _, k := range []*Keeper{older, newer} {
			turn(k)
			for _, h := range k.Report().Hosts {
				if h.State == Conflict && strings.Contains(h.Says, `another edgeward has the owner "home"`) {
					conflicts[h.Host]++
				}
			}
			now = now.Add(5 * time.Minute)
		}
	}
	writes := map[string]int{}
	for _, r := range w.cloud.History() {
		writes[strings.TrimPrefix(written(r), "_edgeward.")]++
	}
	// Each writes two records three times at once, then five times within a day
	// and once a day.
	for _, host := range []string{"old.example.org", "new.example.org"} {
		if n := writes[host]; n > 2*2*(3+5+7) || conflicts[host] == 0 {
			t.Errorf("%d records of %s were written, and it is a conflict %d times", n, host, conflicts[host])
		}
	}
	if writes["app.example.org"] != 2 {
		t.Errorf("what both want was written %d times", writes["app.example.org"])
	}
	// The older one hears of the newer wish.
	older.Update(newer.settings)
	turn(older)
	now = now.Add(25 * time.Hour)
	turn(newer)
	turn(older)
	for _, k := range []*Keeper{older, newer} {
		if hosts := k.Report().Hosts; len(hosts) != 2 || hosts[0].State != OK || hosts[1].State != OK {
			t.Errorf("in the end the hosts are %+v", hosts)
		}
	}
	w.hosts("app.example.org", "new.example.org")
	w.settled()
}

// TestNothingIsLeft takes away what is ours, and nothing else; the tunnel only
// where that is wished and nothing of others leads to it.
func TestNothingIsLeft(t *testing.T) {
	w := newWorld(t, "example.org", "example.net")
	w.hosts("app.example.org", "let.example.org", "*.example.net")
	w.turn()
	w.cloud.Put(cfedge.Record{Type: "CNAME", Name: "theirs.example.net", Content: Target(w.id("main")), Proxied: true})
	desired := w.want.Desired
	desired.Relinquish = []string{"let.example.org"}
	names := func() (out []string) {
		for _, zone := range []string{"example.org", "example.net"} {
			for _, r := range w.cloud.Records(zone) {
				out = append(out, r.Type+" "+r.Name)
			}
		}
		return out
	}
	w.want.Desired = desired.Nothing(true)
	if changes, err := w.keeper().Plan(t.Context()); err != nil || len(changes.Writes) != 5 || changes.Tunnels[0].Says != "stays: let.example.org leads to it, made by others or let go" {
		t.Errorf("the plan is %+v, %v", changes, err)
	}
	w.turn()
	if diff := cmp.Diff([]string{"CNAME let.example.org", "CNAME theirs.example.net"}, names()); diff != "" {
		t.Error(diff)
	}
	w.settled()
	w.id("main")
	// With nothing leading there it goes, if it is not served and that is wished.
	w = newWorld(t, "example.org")
	w.hosts("app.example.org")
	w.turn()
	desired = w.want.Desired
	w.want.Desired = desired.Nothing(false)
	w.turn()
	w.settled()
	w.want.Desired = desired.Nothing(true)
	end := w.cloud.Connect(w.cloud.Tunnels(w.account)[0].ID, cfedge.CloudConnection{ID: uuid.New(), ConnectorID: uuid.New(), Version: Product + "v1"})
	if _, err := w.keeper().Turn(t.Context()); err == nil || !strings.Contains(err.Error(), "delete tunnel main: ") {
		t.Errorf("a tunnel that is served is deleted: %v", err)
	}
	end()
	w.turn()
	if all := w.cloud.Tunnels(w.account); len(all) != 0 {
		t.Errorf("there are tunnels: %v", all)
	}
	w.settled()
}

// TestOtherConnectorsAreSaid has a tunnel that is adopted and served by a stock
// connector still: what goes that way nobody judges.
func TestOtherConnectorsAreSaid(t *testing.T) {
	w := newWorld(t, "example.org")
	w.hosts("app.example.org")
	info := w.cloud.AddTunnel(w.account, "main", nil)
	connect := func(version string, client uuid.UUID) func() {
		return w.cloud.Connect(info.ID, cfedge.CloudConnection{ID: uuid.New(), ConnectorID: client, Version: version})
	}
	var log strings.Builder
	k := w.keeper()
	k.log = slog.New(slog.NewTextHandler(&log, nil))
	says := func() string {
		t.Helper()
		if _, err := k.Turn(t.Context()); err != nil {
			t.Fatal(err)
		}
		all := k.Report().Tunnels
		if len(all) != 1 || all[0].State != OK {
			t.Fatalf("the tunnels are %+v", all)
		}
		return all[0].Says
	}
	// Two replicas of ours, of different versions.
	connect(Product+"v0.1.0", uuid.New())
	connect(Product+"v0.2.0", uuid.New())
	if got := says(); got != "" {
		t.Errorf("of our own connectors it says %q", got)
	}
	stock := uuid.New()
	gone := []func(){connect("2026.7.0", stock), connect("2026.7.0", stock), connect("2025.1.0", uuid.New())}
	for range 3 {
		if got := says(); !strings.HasPrefix(got, "is served by other connectors too (2025.1.0, 2026.7.0): ") {
			t.Errorf("of others it says %q", got)
		}
		connect(Product+"v0.2.0", uuid.New())
	}
	if n := strings.Count(log.String(), "is served by other connectors too"); n != 1 {
		t.Errorf("it is logged %d times: %s", n, log.String())
	}
	for _, end := range gone {
		end()
	}
	if got := says(); got != "" {
		t.Errorf("when they are gone it says %q", got)
	}
}

// TestWhatOthersMadeStays goes through all that can be in the way of a host.
func TestWhatOthersMadeStays(t *testing.T) {
	const host, claim = "app.example.org", "_edgeward.app.example.org"
	mine, theirs := `"heritage=edgeward,edgeward/owner=home"`, `"heritage=edgeward,edgeward/owner=cabin"`
	record := func(kind, name, content string) cfedge.Record {
		return cfedge.Record{Type: kind, Name: name, Content: content, Proxied: kind == "CNAME"}
	}
	const stale = "5f1c7a52-0000-4000-8000-000000000000" + targetSuffix
	kept := cfedge.Record{Type: "CNAME", Name: host, Content: stale, Proxied: true, Comment: "kept by edgeward, owner home"}
	for _, c := range []struct {
		name    string
		there   []cfedge.Record // @main stands for the tunnel
		change  func(*Desired)
		state   State
		says    string
		records []string // nil: as they were
	}{
		{"an address", []cfedge.Record{record("A", host, "192.0.2.1")}, nil, Conflict, "record of type A, made by others: delete it", nil},
		{"an address, to be adopted", []cfedge.Record{record("AAAA", host, "2001:db8::1")}, func(d *Desired) { d.Adopt = []string{host} }, Conflict, "type AAAA", nil},
		{"a delegation", []cfedge.Record{record("NS", host, "ns.example.net")}, nil, Conflict, "type NS", nil},
		{"an alias", []cfedge.Record{record("CNAME", host, "pages.example.net")}, nil, Conflict, "leads to pages.example.net, made by others", nil},
		{"an alias, adopted", []cfedge.Record{record("CNAME", host, "pages.example.net")}, func(d *Desired) { d.Adopt = []string{host} }, OK, "", pair(host, "main")},
		{"the right alias", []cfedge.Record{record("CNAME", host, "@main")}, nil, Foreign, "name it under cloudflare.adopt", nil},
		{"the right alias, adopted", []cfedge.Record{record("CNAME", host, "@main")}, func(d *Desired) { d.Adopt = []string{host} }, OK, "", pair(host, "main")},
		{"another tunnel", []cfedge.Record{record("CNAME", host, "5f1c7a52-0000-4000-8000-000000000000"+targetSuffix)}, nil, Conflict, "made by others", nil},
		{"another owner", []cfedge.Record{record("CNAME", host, "@main"), record("TXT", claim, theirs)}, nil, Conflict, `belongs to owner "cabin": take it out there, or delete the TXT record ` + claim, nil},
		{"another owner, to be adopted", []cfedge.Record{record("CNAME", host, "@main"), record("TXT", claim, theirs)}, func(d *Desired) { d.Adopt = []string{host} }, Conflict, "cabin", nil},
		{"another owner without an alias", []cfedge.Record{record("TXT", claim, theirs)}, nil, Conflict, "cabin", nil},
		{"two owners", []cfedge.Record{record("CNAME", host, "@main"), record("TXT", claim, mine), record("TXT", claim, theirs)}, nil, Conflict, "cabin", nil},
		{"a claim without an owner", []cfedge.Record{record("TXT", claim, `"heritage=edgeward"`)}, nil, Conflict, `owner ""`, nil},
		{"a text of another kind", []cfedge.Record{record("TXT", claim, `"heritage=external-dns,external-dns/owner=home"`)}, nil, OK, "",
			append(pair(host, "main"), claim+` TXT "heritage=external-dns,external-dns/owner=home"`)},
		{"mail beside it", []cfedge.Record{record("MX", host, "mail.example.net"), record("TXT", host, `"v=spf1 -all"`)}, nil, OK, "",
			append(pair(host, "main"), host+" MX mail.example.net", host+` TXT "v=spf1 -all"`)},
		{"ours, led elsewhere by hand", []cfedge.Record{record("CNAME", host, "pages.example.net"), record("TXT", claim, mine)}, nil, Conflict, "was led to pages.example.net by others", nil},
		{"ours, led elsewhere, taken back", []cfedge.Record{record("CNAME", host, "pages.example.net"), record("TXT", claim, mine)}, func(d *Desired) { d.Adopt = []string{host} }, OK, "", pair(host, "main")},
		{"ours, led to a stale tunnel", []cfedge.Record{kept, record("TXT", claim, mine)}, nil, OK, "", pair(host, "main")},
		{"ours, led to a tunnel of others", []cfedge.Record{record("CNAME", host, stale), record("TXT", claim, mine)}, nil, Conflict, "was led to " + stale + " by others: delete that record, name the host under cloudflare.adopt", nil},
		{"ours, led to a tunnel of others, taken back", []cfedge.Record{record("CNAME", host, stale), record("TXT", claim, mine)}, func(d *Desired) { d.Adopt = []string{host} }, OK, "", pair(host, "main")},
		{"ours, led to a tunnel of others, not desired", []cfedge.Record{record("CNAME", host, stale), record("TXT", claim, mine)}, func(d *Desired) { d.Hosts = nil }, "", "", []string{host + " CNAME " + stale + " proxied"}},
		{"ours, led to a tunnel of others, internal", []cfedge.Record{record("CNAME", host, stale), record("TXT", claim, mine)}, func(d *Desired) { d.Hosts, d.Internal = nil, []string{host} }, "", "", []string{host + " CNAME " + stale + " proxied"}},
		{"ours, stale, not desired", []cfedge.Record{kept, record("TXT", claim, mine)}, func(d *Desired) { d.Hosts = nil }, "", "", []string{}},
		{"ours, not proxied", []cfedge.Record{{Type: "CNAME", Name: host, Content: "@main"}, record("TXT", claim, mine)}, nil, OK, "", pair(host, "main")},
		{"ours, its alias deleted", []cfedge.Record{record("TXT", claim, mine)}, nil, OK, "", pair(host, "main")},
		{"ours, said twice", []cfedge.Record{record("CNAME", host, "@main"), record("TXT", claim, mine), record("TXT", claim, `"heritage=edgeward, edgeward/owner=home"`)}, nil, OK, "", nil},
		{"ours, said twice, upsert-only", []cfedge.Record{record("CNAME", host, "@main"), record("TXT", claim, mine), record("TXT", claim, `"heritage=edgeward, edgeward/owner=home"`)}, func(d *Desired) { d.Policy = UpsertOnly }, OK, "", nil},
		{"ours, in the way an address", []cfedge.Record{record("A", host, "192.0.2.1"), record("TXT", claim, mine)}, nil, Conflict, "type A", nil},
		{"ours, not desired", []cfedge.Record{record("CNAME", host, "@main"), record("TXT", claim, mine)}, func(d *Desired) { d.Hosts = nil }, "", "", []string{}},
		{"ours, not desired, led elsewhere", []cfedge.Record{record("CNAME", host, "pages.example.net"), record("TXT", claim, mine)}, func(d *Desired) { d.Hosts = nil }, "", "", []string{host + " CNAME pages.example.net proxied"}},
		{"ours, not desired, two owners", []cfedge.Record{record("CNAME", host, "@main"), record("TXT", claim, mine), record("TXT", claim, theirs)}, func(d *Desired) { d.Hosts = nil }, "", "",
			[]string{host + " CNAME @main proxied", claim + " TXT " + theirs}},
		{"ours, not desired, upsert-only", []cfedge.Record{record("CNAME", host, "@main"), record("TXT", claim, mine)}, func(d *Desired) { d.Hosts, d.Policy = nil, UpsertOnly }, Leftover, "use policy sync", nil},
		{"another's, not desired", []cfedge.Record{record("CNAME", host, "@main"), record("TXT", claim, theirs)}, func(d *Desired) { d.Hosts = nil }, "", "", nil},
		{"ours, relinquished", []cfedge.Record{record("CNAME", host, "@main"), record("TXT", claim, mine)}, func(d *Desired) { d.Relinquish = []string{host} }, OK, "is relinquished", []string{host + " CNAME @main proxied"}},
		{"relinquished before", []cfedge.Record{record("CNAME", host, "@main")}, func(d *Desired) { d.Relinquish = []string{host} }, Foreign, "is relinquished", nil},
		{"relinquished, not there", nil, func(d *Desired) { d.Relinquish = []string{host} }, Conflict, "has no record: make one", nil},
		{"internal", nil, func(d *Desired) { d.Internal = []string{"*.example.org"} }, Conflict, "is internal", nil},
		{"internal, ours of before", []cfedge.Record{record("CNAME", host, "@main"), record("TXT", claim, mine)}, func(d *Desired) { d.Hosts, d.Internal, d.Policy = nil, []string{host}, UpsertOnly }, "", "", []string{}},
		{"a dry run", nil, func(d *Desired) { d.Policy = DryRun }, Pending, "", nil},
		{"no zone", nil, func(d *Desired) { d.Hosts[0].Name = "app.example.com" }, Unknown, "no zone of cloudflare.zones ends its name", nil},
		{"a long name", nil, func(d *Desired) { d.Hosts[0].Name = strings.Repeat("a23456789.", 23) + "example.org" }, Conflict, "longer than 234", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, "example.org")
			tunnel := w.cloud.AddTunnel(w.account, "main", nil)
			for _, r := range c.there {
				r.Content = strings.ReplaceAll(r.Content, "@main", tunnel.ID.String()+targetSuffix)
				w.cloud.Put(r)
			}
			before := w.has()
			w.hosts(host)
			if c.change != nil {
				c.change(&w.want.Desired)
			}
			report := w.turn()
			want := c.records
			if want == nil {
				want = before
			}
			if c.name == "ours, said twice" { // whichever stays
				if len(w.has()) != 2 {
					t.Errorf("there is %q", w.has())
				}
			} else {
				slices.Sort(want)
				if diff := cmp.Diff(want, w.has(), cmp.Transformer("", func(s []string) string { return strings.Join(s, "\n") })); diff != "" {
					t.Errorf("records (-want +have):\n%s", diff)
				}
			}
			switch {
			case c.state == "" && len(report.Hosts) > 0:
				t.Errorf("the report has %+v", report.Hosts)
			case c.state != "" && (len(report.Hosts) != 1 || report.Hosts[0].State != c.state || !strings.Contains(report.Hosts[0].Says, c.says)):
				t.Errorf("the report has %+v, want %s: %s", report.Hosts, c.state, c.says)
			}
			if w.want.Desired.Policy != DryRun {
				w.settled()
			}
		})
	}
}

// TestOneRefusalDoesNotStopOthers has a record made between the look and the
// write, which Cloudflare answers by refusing the whole batch.
func TestOneRefusalDoesNotStopOthers(t *testing.T) {
	w := newWorld(t, "example.org")
	var names []string
	for i := range 9 {
		names = append(names, fmt.Sprintf("h%d.example.org", i))
	}
	w.hosts(names...)
	raced := false
	w.api.SetFault(func(c cfedge.Call) cfedge.Fault {
		if c.Method == "POST" && strings.HasSuffix(c.Path, "/batch") && !raced {
			raced = true
			w.cloud.Put(cfedge.Record{Type: "A", Name: "h4.example.org", Content: "192.0.2.1"})
		}
		return cfedge.Fault{}
	})
	k := w.keeper()
	_, err := k.Turn(context.Background())
	const want = "write the records of host h4.example.org: write records of example.org: Cloudflare refuses: An A, AAAA, or CNAME record with that host already exists."
	if err == nil || !strings.HasPrefix(err.Error(), want) || strings.Contains(err.Error(), "\n") {
		t.Errorf("the error is %v", err)
	}
	w.expect(append(pairs("main", append(names[:4:4], names[5:]...)...), "h4.example.org A 192.0.2.1")...)
	if s := states(k.Report()); s["h4.example.org"] != Refused || s["h3.example.org"] != OK {
		t.Errorf("the report is %v", s)
	}
	if s := states(w.turn()); s["h4.example.org"] != Conflict {
		t.Errorf("the next turn says %v", s)
	}
}

func TestManyHostsAreWrittenInBatches(t *testing.T) {
	w := newWorld(t, "example.org")
	var names []string
	for i := range 250 {
		names = append(names, fmt.Sprintf("h%d.example.org", i))
	}
	w.hosts(names...)
	w.turn()
	w.expect(pairs("main", names...)...)
	batches := 0
	for _, c := range w.api.Calls() {
		if strings.HasSuffix(c.Path, "/batch") {
			batches++
		}
	}
	if batches != 3 {
		t.Errorf("500 records took %d batches", batches)
	}
	w.hosts()
	w.turn()
	w.expect()
}

// TestOnePartThatFailsLeavesTheOthers cuts each token off in turn.
func TestOnePartThatFailsLeavesTheOthers(t *testing.T) {
	w := newWorld(t, "example.org", "example.net")
	w.hosts("a.example.org", "a.example.net")
	w.turn()
	w.hosts("b.example.org", "b.example.net")
	w.cloud.EndToken(w.tokens["example.org"])
	k := w.keeper()
	_, err := k.Turn(context.Background())
	if err == nil || !strings.Contains(err.Error(), "list records of example.org") && !strings.Contains(err.Error(), "find zone of example.org") {
		t.Errorf("the error is %v", err)
	}
	w.expect(append(pair("a.example.org", "main"), pair("b.example.net", "main")...)...)
	if s := states(k.Report()); s["b.example.org"] != Unknown || s["b.example.net"] != OK {
		t.Errorf("the report is %v", s)
	}

	// Without the tunnel's id nothing is pointed anywhere, and nothing removed.
	w.want.ZoneTokens["example.org"] = w.token("example.org", w.cloud.AddToken("new", cfedge.ZoneRead("example.org"), cfedge.DNSEdit("example.org")))
	w.cloud.EndToken(w.tokens["tunnels"])
	w.hosts("a.example.org", "c.example.net", "b.example.net")
	k = w.keeper()
	if _, err = k.Turn(context.Background()); err == nil || !strings.Contains(err.Error(), "list tunnels of account") {
		t.Errorf("the error is %v", err)
	}
	w.expect(append(pair("a.example.org", "main"), pair("b.example.net", "main")...)...)

	// A tunnel whose token was given needs no look.
	w.want.Desired.Tunnels[0].ID = w.id("main")
	w.want.TunnelToken = ""
	w.turn()
	w.expect(pairs("main", "a.example.org", "b.example.net", "c.example.net")...)
}

func TestUpdateAndUsage(t *testing.T) {
	w := newWorld(t, "example.org")
	w.hosts("a.example.org")
	k := w.keeper()
	turn := func() {
		t.Helper()
		if _, err := k.Turn(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	turn()
	w.hosts("b.example.org")
	k.Update(w.want)
	turn()
	w.expect(pair("b.example.org", "main")...)
	if again := k.Report(); again.Written != 4 || again.Time.IsZero() {
		t.Errorf("the report is %+v", again)
	}
	u := k.Usage()
	want := map[Call]uint64{{"list tunnels", "ok"}: 2, {"create tunnel", "ok"}: 1, {"find zone", "ok"}: 1, {"list records", "ok"}: 2, {"write records", "ok"}: 2}
	if diff := cmp.Diff(want, u.Calls); diff != "" || u.Left != 1200-8 || time.Until(u.Resets) < 4*time.Minute {
		t.Errorf("usage %+v: %s", u, diff)
	}
	w.want.URL = "http://elsewhere.invalid/v5"
	k.Update(w.want)
	if _, err := k.Turn(context.Background()); err == nil || !strings.Contains(err.Error(), "404") && !strings.Contains(err.Error(), "without saying why") {
		t.Errorf("another address is not used: %v", err)
	}
}

// TestALongListIsReadWhole bounds the pages: what is missing from a list would
// pass for deleted.
func TestALongListIsReadWhole(t *testing.T) {
	w := newWorld(t, "example.org")
	w.api.SetPage(7)
	var names []string
	for i := range 30 {
		names = append(names, fmt.Sprintf("h%d.example.org", i))
	}
	w.hosts(names...)
	w.turn()
	w.settled()

	// A record that goes while the pages are read shifts the others.
	pages := 0
	w.api.SetFault(func(c cfedge.Call) cfedge.Fault {
		if strings.HasSuffix(c.Path, "/dns_records") {
			if pages++; pages == 2 {
				for _, r := range w.cloud.Records("example.org") {
					if r.Name == "_edgeward.h0.example.org" {
						w.cloud.Remove(r.ID)
					}
				}
			}
		}
		return cfedge.Fault{}
	})
	if _, err := w.keeper().Turn(context.Background()); err == nil || !strings.Contains(err.Error(), "list records of example.org: the list changed while it was read") {
		t.Errorf("the error is %v", err)
	}
	w.api.SetFault(nil)
	w.expect(slices.DeleteFunc(pairs("main", names...), func(line string) bool { return strings.HasPrefix(line, "_edgeward.h0.") })...)
}

// TestTwoAtOnce has two instances turn together, as replicas do when they start:
// one may run into what the other wrote, and both end in step.
func TestTwoAtOnce(t *testing.T) {
	w := newWorld(t, "example.org", "example.net")
	for range 20 {
		w.hosts("a.example.org", "b.example.org", "*.example.net")
		both(w)
		w.turn()
		w.expect(pairs("main", "a.example.org", "b.example.org", "*.example.net")...)
		w.hosts("b.example.org", "c.example.org")
		both(w)
		w.turn()
		w.expect(pairs("main", "b.example.org", "c.example.org")...)
	}
	if n := len(w.cloud.Tunnels(w.account)); n != 1 {
		t.Errorf("there are %d tunnels", n)
	}
}

func both(w *world) {
	var turns sync.WaitGroup
	for range 2 {
		k := w.keeper()
		turns.Go(func() { _, _ = k.Turn(context.Background()) })
	}
	turns.Wait()
}

// TestATunnelIsNotMadeBlindly has the list of tunnels fail where making one
// would go through.
func TestATunnelIsNotMadeBlindly(t *testing.T) {
	w := newWorld(t, "example.org")
	w.hosts("a.example.org")
	w.api.SetFault(func(c cfedge.Call) cfedge.Fault {
		if c.Method == "GET" && strings.HasSuffix(c.Path, "/cfd_tunnel") {
			return cfedge.Fault{Status: 500}
		}
		return cfedge.Fault{}
	})
	if _, err := w.keeper().Turn(context.Background()); err == nil || len(w.cloud.Tunnels(w.account)) > 0 {
		t.Errorf("a tunnel was made, %v", err)
	}
	if _, err := w.keeper().Token(context.Background(), "main"); err == nil || len(w.cloud.Tunnels(w.account)) > 0 {
		t.Errorf("a tunnel was made for its token, %v", err)
	}
	w.expect()
}

// TestAZoneThatComesBack has an id of its own.
func TestAZoneThatComesBack(t *testing.T) {
	w := newWorld(t, "example.org")
	w.hosts("a.example.org")
	k := w.keeper()
	if _, err := k.Turn(context.Background()); err != nil {
		t.Fatal(err)
	}
	w.cloud.RemoveZone("example.org")
	w.cloud.AddZone(w.account, "example.org")
	if _, err := k.Turn(context.Background()); err == nil {
		t.Error("the zone of before is there")
	}
	if _, err := k.Turn(context.Background()); err != nil {
		t.Error(err)
	}
	w.expect(pair("a.example.org", "main")...)
}

// TestAnInnerZoneHasItsOwnRecords keeps the outer zone from a host of the inner
// one, for which it has records of before.
func TestAnInnerZoneHasItsOwnRecords(t *testing.T) {
	target := "5f1c7a52-0000-4000-8000-000000000000" + targetSuffix
	both := []Record{{ID: "1", Type: "CNAME", Name: "a.lab.example.org", Content: target, Proxied: true},
		{ID: "2", Type: "TXT", Name: "_edgeward.a.lab.example.org", Content: ownership("home")}}
	d := Desired{Owner: "home", Policy: Sync, Tunnels: []Tunnel{{Name: "main", ID: strings.TrimSuffix(target, targetSuffix)}},
		Hosts: []Host{{"a.lab.example.org", "main"}}, Zones: []string{"example.org", "lab.example.org"}}
	got := Diff(d, Have{Zones: []Zone{{Name: "example.org", Records: both}, {Name: "lab.example.org"}}})
	want := []Write{
		{Verb: Create, Zone: "lab.example.org", Host: "a.lab.example.org", Type: "CNAME", Name: "a.lab.example.org", Content: target, Tunnel: "main"},
		{Verb: Create, Zone: "lab.example.org", Host: "a.lab.example.org", Type: "TXT", Name: "_edgeward.a.lab.example.org", Content: ownership("home")},
	}
	if diff := cmp.Diff(want, slices.DeleteFunc(got.Writes, func(w Write) bool { return w.Type == "tunnel" })); diff != "" || len(got.Hosts) != 1 {
		t.Errorf("hosts %+v, writes: %s", got.Hosts, diff)
	}
}

// TestNotes has hosts that are right by their records, and may not work all the
// same.
func TestNotes(t *testing.T) {
	d := Desired{Owner: "home", Policy: Sync, Tunnels: []Tunnel{{Name: "main", ID: "5f1c7a52-0000-4000-8000-000000000000"}},
		Hosts:    []Host{{"*.example.org", "main"}, {"a.b.example.net", "main"}},
		Internal: []string{"nas.example.org", "*.cam.example.org", "nas.example.net"}, Zones: []string{"example.org", "example.net"}}
	got := Diff(d, Have{Zones: []Zone{{Name: "example.org", Status: "active"}, {Name: "example.net", Status: "pending"}}})
	want := []string{
		"covers nas.example.org, which is internal: the name resolves, and the connector refuses it",
		"covers *.cam.example.org, which is internal: the name resolves, and the connector refuses it",
		"Universal SSL covers example.net and one label below it: order a certificate for a.b.example.net, or use one label",
		"zone example.net is pending at Cloudflare: no record of it is served",
	}
	var have []string
	for _, h := range got.Hosts {
		have = append(have, h.Notes...)
	}
	if diff := cmp.Diff(want, have); diff != "" {
		t.Error(diff)
	}
}

// TestNobodyWaitsForATurnWithoutEnd asks while another's calls are under way.
func TestNobodyWaitsForATurnWithoutEnd(t *testing.T) {
	w := newWorld(t, "example.org")
	k := w.keeper()
	k.turn <- struct{}{}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := k.Token(ctx, "main"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a token: %v", err)
	}
	if _, err := k.Turn(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a turn: %v", err)
	}
}

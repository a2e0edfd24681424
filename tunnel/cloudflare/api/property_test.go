package api

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/edgeward/edgeward/test/cfedge"
)

// history is a world in which everything happens: wishes change, others write
// records, tunnels vanish, calls fail, the process dies.
type history struct {
	*world
	*rand.Rand
	wrong float64 // how often a call goes wrong
}

var (
	someHosts = []string{"example.org", "*.example.org", "a.example.org", "b.example.org", "x.a.example.org",
		"lab.example.org", "a.lab.example.org", "*.lab.example.org", "example.net", "c.example.net", "d.example.com"}
	someTunnels = []string{"main", "side"}
)

func (h *history) pick(from []string) string { return from[h.IntN(len(from))] }

func (h *history) some(from []string) (out []string) {
	for _, s := range from {
		if h.IntN(2) == 0 {
			out = append(out, s)
		}
	}
	return out
}

// wish changes what is desired.
func (h *history) wish() {
	d := &h.want.Desired
	d.Hosts = nil
	for _, name := range h.some(someHosts) {
		d.Hosts = append(d.Hosts, Host{name, h.pick(someTunnels)})
	}
	d.Internal, d.Adopt, d.Relinquish = nil, nil, nil
	switch h.IntN(5) {
	case 0:
		d.Adopt = h.some(someHosts)
	case 1:
		d.Relinquish = h.some(someHosts)
	case 2:
		d.Internal = []string{"*.lab.example.org", h.pick(someHosts)}
	}
	d.Policy = []Policy{Sync, Sync, Sync, UpsertOnly, DryRun}[h.IntN(5)]
}

// others write what they like, over what is ours too; the API refuses some.
func (h *history) others() {
	name := h.pick(someHosts[:len(someHosts)-1])
	switch h.IntN(8) {
	case 0:
		h.try(cfedge.Record{Type: "A", Name: name, Content: "192.0.2.1", Proxied: true})
	case 1:
		h.try(cfedge.Record{Type: "CNAME", Name: name, Content: "pages.example.com"})
	case 2:
		h.try(cfedge.Record{Type: "CNAME", Name: name, Content: "5f1c7a52-0000-4000-8000-000000000000" + targetSuffix, Proxied: true})
	case 3:
		h.try(cfedge.Record{Type: "TXT", Name: ownerName(name), Content: h.pick([]string{
			`"heritage=edgeward,edgeward/owner=cabin"`, `"heritage=edgeward"`, `"v=spf1 -all"`, `"heritage=external-dns,external-dns/owner=home"`})})
	case 4, 5: // somebody changes a record
		if all := h.all(); len(all) > 0 {
			r := all[h.IntN(len(all))]
			if r.Type == "CNAME" {
				r.Content = h.pick([]string{"pages.example.com", "5f1c7a52-0000-4000-8000-000000000000" + targetSuffix, r.Content})
				r.Proxied = h.IntN(2) == 0
				h.try(r)
			}
		}
	case 6:
		if all := h.all(); len(all) > 0 {
			h.cloud.Remove(all[h.IntN(len(all))].ID)
		}
	case 7:
		if all := h.cloud.Tunnels(h.account); len(all) > 0 {
			h.cloud.RemoveTunnel(all[h.IntN(len(all))].ID)
		}
	}
}

// try puts a record, unless the API refuses it.
func (h *history) try(r cfedge.Record) {
	defer func() { _ = recover() }()
	h.cloud.Put(r)
}

func (h *history) all() (out []cfedge.Record) {
	for _, z := range h.want.Desired.Zones {
		out = append(out, h.cloud.Records(z)...)
	}
	return out
}

// break1 has a call go wrong now and then, in one of the ways in which calls
// do: refused before anything happens, the answer lost, the process gone.
func (h *history) break1(die func()) {
	h.api.SetFault(func(cfedge.Call) cfedge.Fault {
		if h.Float64() >= h.wrong {
			return cfedge.Fault{}
		}
		return fault(h.IntN(faults), die)
	})
}

const faults = 6

func fault(kind int, die func()) cfedge.Fault {
	f := cfedge.Fault{After: kind%2 == 1}
	switch kind / 2 {
	case 0:
		f.Cut = true
	case 1:
		f.Status = 503
	case 2:
		f.Cut = true
		die()
	}
	return f
}

// turn is one by a process of its own, under faults; it is held to the plan that
// is shown before it, and to what is not ours.
func (h *history) turn() error {
	h.t.Helper()
	h.api.SetFault(nil)
	plan, err := h.keeper().Plan(context.Background())
	if err != nil {
		h.t.Fatal(err)
	}
	before, tunnels, seen := h.all(), h.cloud.Tunnels(h.account), len(h.cloud.History())
	ctx, die := context.WithCancel(context.Background())
	defer die()
	h.break1(die)
	_, err = h.keeper().Turn(ctx)
	h.api.SetFault(nil)

	planned := slices.Clone(plan.Writes)
	take := func(match func(Write) bool) bool {
		at := slices.IndexFunc(planned, match)
		if at >= 0 {
			planned = slices.Delete(planned, at, at+1)
		}
		return at >= 0
	}
	made := map[string]string{}
	for _, t := range h.cloud.Tunnels(h.account) {
		if !slices.ContainsFunc(tunnels, func(b cfedge.TunnelInfo) bool { return b.ID == t.ID }) {
			made[t.Name] = t.ID.String() + targetSuffix
			if !take(func(w Write) bool { return w.Type == "tunnel" && w.Name == t.Name }) {
				h.t.Fatalf("tunnel %s was made and not planned", t.Name)
			}
		}
	}
	for _, done := range h.cloud.History()[seen:] {
		if h.want.Desired.Policy == DryRun {
			h.t.Fatalf("a dry run wrote %+v", done)
		}
		if !take(func(w Write) bool {
			switch {
			case done.Before == nil:
				return w.Verb == Create && w.Type == done.After.Type && w.Name == done.After.Name &&
					(w.Content == done.After.Content || w.Content == "" && made[w.Tunnel] == done.After.Content)
			case done.After == nil:
				return w.Verb == Delete && w.ID == done.Before.ID
			}
			return w.Verb == Update && w.ID == done.Before.ID && w.Name == done.After.Name &&
				(w.Content == done.After.Content || w.Content == "" && made[w.Tunnel] == done.After.Content)
		}) {
			h.t.Fatalf("this was written and not planned: %+v %+v; planned is %+v", done.Before, done.After, plan.Writes)
		}
		if done.Before != nil && !h.ours(*done.Before, before) {
			h.t.Fatalf("this is not ours: %+v", done.Before)
		}
		if done.After != nil {
			h.sensible(*done.After)
		}
	}
	return err
}

// ours is what the keeper may change, told anew: text that names us, an alias to
// a tunnel of ours, or with our comment, with such a text and no other beside it, or an alias to be adopted.
func (h *history) ours(r cfedge.Record, all []cfedge.Record) bool {
	const mine = `"heritage=edgeward,edgeward/owner=home"`
	if r.Type == "TXT" {
		return strings.HasPrefix(r.Name, "_edgeward") && r.Content == mine
	}
	claimed, disputed := false, false
	for _, t := range all {
		if t.Type == "TXT" && t.Name == ownerName(r.Name) && strings.Contains(t.Content, "heritage=edgeward") {
			claimed = claimed || t.Content == mine
			disputed = disputed || t.Content != mine
		}
	}
	adopted := slices.Contains(h.want.Desired.Adopt, r.Name)
	made := r.Comment == "kept by edgeward, owner home" && strings.HasSuffix(r.Content, targetSuffix)
	for _, t := range h.cloud.Tunnels(h.account) {
		made = made || r.Content == t.ID.String()+targetSuffix
	}
	return r.Type == "CNAME" && !disputed && (adopted || claimed && made)
}

// sensible fails unless a record that was written is one for a host that is
// desired and not internal.
func (h *history) sensible(r cfedge.Record) {
	host, isText := hostOf(r.Name)
	if !isText {
		host = r.Name
	}
	if !slices.ContainsFunc(h.want.Desired.Hosts, func(w Host) bool { return w.Name == host }) ||
		slices.ContainsFunc(h.want.Desired.Internal, func(p string) bool { return covers(p, host) }) {
		h.t.Fatalf("a record of a host that is not to be public: %+v", r)
	}
	if len(r.Comment) > 100 || r.Proxied != (r.Type == "CNAME") || r.TTL != 1 {
		h.t.Fatalf("the record is %+v", r)
	}
}

// converge takes the faults away and expects one turn to be enough, and the
// next to find nothing to do.
func (h *history) converge() {
	h.t.Helper()
	h.wrong = 0
	if err := h.turn(); err != nil {
		h.t.Fatal(err)
	}
	report := h.world.turn()
	if h.want.Desired.Policy == DryRun {
		return
	}
	h.settled()
	all := h.all()
	records := map[string]cfedge.Record{}
	var claims []string
	for _, r := range all {
		if r.Type == "CNAME" || r.Type == "A" {
			records[r.Name] = r
		}
		if host, ok := hostOf(r.Name); ok && r.Content == ownership("home") {
			claims = append(claims, host)
		}
	}
	for _, s := range report.Hosts {
		i := slices.IndexFunc(h.want.Desired.Hosts, func(w Host) bool { return w.Name == s.Host })
		switch {
		case s.State == OK:
			if r := records[s.Host]; r.Content != h.id(h.want.Desired.Hosts[i].Tunnel)+targetSuffix || !r.Proxied || !slices.Contains(claims, s.Host) {
				h.t.Fatalf("host %s is said to be well, and has %+v", s.Host, r)
			}
		case s.State == Pending, s.State == Refused:
			h.t.Fatalf("host %+v", s)
		}
		// Only what others did may be in the way.
		if s.State == Conflict && !slices.ContainsFunc(h.want.Desired.Internal, func(p string) bool { return covers(p, s.Host) }) &&
			!slices.Contains(h.want.Desired.Relinquish, s.Host) && records[s.Host].ID == "" &&
			!slices.ContainsFunc(all, func(r cfedge.Record) bool {
				return r.Name == ownerName(s.Host) && strings.Contains(r.Content, "heritage=edgeward") && r.Content != ownership("home")
			}) {
			h.t.Fatalf("nothing of others is in the way of %+v", s)
		}
	}
	if h.want.Desired.Policy == Sync {
		for _, c := range claims {
			if !slices.ContainsFunc(h.want.Desired.Hosts, func(w Host) bool { return w.Name == c }) {
				h.t.Fatalf("%s is not desired, and still ours", c)
			}
		}
	}
}

// TestHistories is the property: whatever happens, what is written was shown
// before, nothing of others is touched, and it converges.
func TestHistories(t *testing.T) {
	for seed := range uint64(30) {
		if !t.Run(fmt.Sprint(seed), func(t *testing.T) { play(t, seed) }) {
			return
		}
	}
}

func play(t *testing.T, seed uint64) {
	h := &history{world: newWorld(t, "example.org", "lab.example.org", "example.net"), Rand: rand.New(rand.NewPCG(seed, 1))}
	h.want.Desired.Tunnels = []Tunnel{{Name: "main"}, {Name: "side"}}
	for range 12 {
		h.wish()
		for range h.IntN(4) {
			h.others()
		}
		h.wrong = []float64{0, 0.1, 0.5}[h.IntN(3)]
		for range h.IntN(3) {
			_ = h.turn() // what it could not do, the next one does
		}
		if h.IntN(3) == 0 {
			h.converge()
		}
	}
	h.converge()
}

// TestACrashAtEveryCall lets each call of a turn that has everything to do go
// wrong in each way, and has the next process finish the work.
func TestACrashAtEveryCall(t *testing.T) {
	for kind := range faults {
		for at := 0; ; at++ {
			h := &history{world: newWorld(t, "example.org", "example.net"), Rand: rand.New(rand.NewPCG(1, 1))}
			h.want.Desired.Tunnels = []Tunnel{{Name: "main"}, {Name: "side"}}
			h.hosts("old.example.org", "moved.example.org", "kept.example.net")
			h.world.turn()
			h.hosts("new.example.org", "moved.example.org@side", "kept.example.net", "*.example.net@side")
			for _, tunnel := range h.cloud.Tunnels(h.account) {
				if tunnel.Name == "side" {
					h.cloud.RemoveTunnel(tunnel.ID)
				}
			}
			ctx, die := context.WithCancel(context.Background())
			calls, hit := 0, false
			h.api.SetFault(func(cfedge.Call) cfedge.Fault {
				calls++
				if calls == at+1 {
					hit = true
					return fault(kind, die)
				}
				return cfedge.Fault{}
			})
			_, _ = h.keeper().Turn(ctx)
			die()
			h.converge()
			h.expect(slices.Concat(pairs("main", "new.example.org", "kept.example.net"), pairs("side", "moved.example.org", "*.example.net"))...)
			names := map[string]int{}
			for _, tunnel := range h.cloud.Tunnels(h.account) {
				names[tunnel.Name]++
			}
			if !maps.Equal(names, map[string]int{"main": 1, "side": 1}) {
				t.Fatalf("fault %d at call %d: the tunnels are %v", kind, at, names)
			}
			if !hit {
				if at < 8 {
					t.Fatalf("the turn has but %d calls", at)
				}
				break
			}
		}
	}
}

package main

import (
	"bytes"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/edgeward/edgeward/test/rig"
)

// TestRun measures a little of everything on the real tools, so that the
// benchmark works on the day it is needed.
func TestRun(t *testing.T) {
	var out, said bytes.Buffer
	opts := options{
		rounds: 2, requests: 300, clients: 100, decisions: 2000, settle: 10 * time.Millisecond,
		only: regexp.MustCompile("plugin|decisions|middleware|Traefik"), log: &said,
	}
	if err := run(t.Context(), opts, &out); err != nil {
		t.Fatalf("%v\n%s", err, said.String())
	}
	for _, want := range []string{
		"| no middleware | ", "| decisions, 400 of them new | ", "| Traefik's own rateLimit | ",
		"| proxied: decisions, 400 of them new, rate limit, its headers | ", "2,000 decisions", "| Traefik without plugins | ",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in:\n%s", want, out.String())
		}
	}
}

func TestDraw(t *testing.T) {
	const n = 100000
	list := draw(n, 1)
	if diff := cmp.Diff(list, draw(n, 1)); diff != "" {
		t.Error("the same seed gives other decisions")
	}
	var ranges, six int
	for _, d := range list {
		prefix, err := netip.ParsePrefix(d.Value)
		if err == nil {
			ranges++
		} else {
			prefix = netip.PrefixFrom(netip.MustParseAddr(d.Value), 0)
		}
		if prefix.Addr().Is6() {
			six++
		}
	}
	if ranges != n/10 || six != n/5 {
		t.Errorf("%d ranges and %d IPv6, want a tenth and a fifth", ranges, six)
	}
}

func TestSpareHoldsNobodyAndBannedEveryone(t *testing.T) {
	list := draw(2000, 1)
	free, err := spare(1000, list[:1000], list[1000:])
	if err != nil {
		t.Fatal(err)
	}
	refused, err := banned(list)
	if err != nil {
		t.Fatal(err)
	}
	if len(free) != 1000 || len(refused) != 4 {
		t.Errorf("%d clients and %d banned, want 1000 and 4", len(free), len(refused))
	}
	held := func(addr netip.Addr) bool {
		for _, d := range list {
			if prefix, err := netip.ParsePrefix(d.Value); err == nil && prefix.Contains(addr) || d.Value == addr.String() {
				return true
			}
		}
		return false
	}
	for _, addr := range free {
		if held(addr) {
			t.Errorf("%s is held", addr)
		}
	}
	for _, addr := range refused {
		if !held(addr) {
			t.Errorf("%s is not held", addr)
		}
	}
}

func TestChosenBringsWhatItIsComparedWith(t *testing.T) {
	var hosts []string
	for _, r := range chosen(routesOf(&rig.LAPI{}, "", "", nil, nil), regexp.MustCompile("^proxied: decisions$")) {
		hosts = append(hosts, r.host)
	}
	if diff := cmp.Diff([]string{"proxied-empty", "proxied"}, hosts); diff != "" {
		t.Errorf("chosen (-want +got):\n%s", diff)
	}
}

func TestOverComparesRoundByRound(t *testing.T) {
	us := func(all ...time.Duration) []time.Duration {
		for i := range all {
			all[i] *= time.Microsecond
		}
		return all
	}
	ours := &route{host: "ours", over: "empty", took: us(75, 95, 81)}
	f := &requestFigures{routes: []*route{{host: "empty", took: us(70, 90, 75)}, ours}}
	got, ok := f.over(ours)
	if want := "5.0 (5.0 to 6.0)"; !ok || show(got) != want {
		t.Errorf("%s, want %s", show(got), want)
	}
}

func TestEngineTable(t *testing.T) {
	f := &engineFigures{cells: map[string]map[string]measure{}}
	f.read("goos: linux\nBenchmarkDelta/add-to-overlay/100k-2 \t 20\t 108058 ns/op\nBenchmarkMemory/100k-2  1  372705072 ns/op  98.25 B/decision\nPASS\n", "")
	f.read("BenchmarkDelta/add-to-overlay/100k  20  5427516 ns/op\n", " interpreted")
	want := "| decision engine | 100k | 100k interpreted |\n|---|---:|---:|\n" +
		"| Delta/add-to-overlay | 108 µs | 5.43 ms |\n| Memory | 98 B |  |\n"
	if diff := cmp.Diff(want, f.markdown()); diff != "" {
		t.Errorf("table (-want +got):\n%s", diff)
	}
}

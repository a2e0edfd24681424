package main

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/edgeward/edgeward/test/rig"
)

// TestRun measures a little of everything, with the real LAPI, the real peer and
// the real kernel, so that the benchmark works on the day it is needed.
func TestRun(t *testing.T) {
	if err := rig.CheckPrograms(); err != nil {
		t.Fatal(err)
	}
	for part, wants := range map[string][]string{
		"compare": {
			"| 1,000 decisions: median (least to most) | edgeward-bouncer | crowdsec-firewall-bouncer 0.",
			"| one ban, delta to kernel, ms | ",
			"| for the addresses of a banned range | yes | ",
		},
		"alone": {
			"| edgeward-bouncer alone | 2,000 decisions | goal |",
			"| full pull, nothing changed: request to end, s | ",
		},
		"packets": {
			"| ns over no table | ours, 1 origin | ours, 3 origins | the peer's, 1 origin | ",
			"| 1,000 bans, 100 ranges | ",
		},
	} {
		t.Run(part, func(t *testing.T) {
			t.Parallel() // most of it is waiting
			var out, said bytes.Buffer
			opts := quick
			opts.only, opts.log = regexp.MustCompile(part), &said
			if err := run(t.Context(), opts, &out); err != nil {
				t.Fatalf("%v\n%s", err, said.String())
			}
			for _, want := range append(wants, "% of the machine") {
				if !strings.Contains(out.String(), want) {
					t.Errorf("no %q in:\n%s", want, out.String())
				}
			}
		})
	}
}

func TestDrawnAddressesAreDifferentAndSpareOnesNoneOfThem(t *testing.T) {
	const n = 50_000
	list := draw(n, 1)
	if !slices.Equal(list, draw(n, 1)) {
		t.Error("the same seed gives other addresses")
	}
	seen := map[netip.Addr]bool{}
	six := 0
	for _, addr := range list {
		if seen[addr] {
			t.Fatalf("%v comes twice", addr)
		}
		seen[addr] = true
		if addr.Is6() {
			six++
		}
	}
	if six != n/5 {
		t.Errorf("%d IPv6, want a fifth", six)
	}
	for i := range 10_000 {
		if seen[spareAddr(i)] {
			t.Errorf("%v is drawn", spareAddr(i))
		}
		if i > 0 && spareRange(i-1).Masked().Overlaps(spareRange(i)) {
			t.Errorf("%v overlaps the one before", spareRange(i))
		}
		if spareRange(i) != spareRange(i).Masked() {
			t.Errorf("%v is not a range's own address", spareRange(i))
		}
	}
}

func TestSampleHasBothEnds(t *testing.T) {
	list := draw(1000, 1)
	some := sample(list, 64)
	if len(some) != 64 || some[0] != list[0] || some[63] != list[999] {
		t.Errorf("%d of them, from %v to %v", len(some), some[0], some[63])
	}
}

// The generator says what LAPI would.
func TestStream(t *testing.T) {
	values := []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("2001:db8::1/128")}
	s := newStream(values)
	ask := func(startup string) (int, [][3]string) {
		t.Helper()
		w := httptest.NewRecorder()
		s.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/v1/decisions/stream?startup="+startup, nil))
		var body struct{ New, Deleted []rig.FakeDecision }
		if w.Code == http.StatusOK {
			if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil {
				t.Fatalf("%v: %s", err, w.Body)
			}
		}
		var got [][3]string
		for _, d := range body.New {
			if left, err := time.ParseDuration(d.Duration); err != nil || left < 6*24*time.Hour || d.ID == 0 || d.Origin == "" {
				t.Errorf("%+v", d)
			}
			got = append(got, [3]string{d.Scope, d.Value, d.Type})
		}
		return w.Code, got
	}
	all := [][3]string{{"Ip", "192.0.2.1", "ban"}, {"Range", "198.51.100.0/24", "ban"}, {"Ip", "2001:db8::1", "ban"}}
	if _, got := ask("true"); !cmp.Equal(got, all) {
		t.Error(cmp.Diff(all, got))
	}
	if _, got := ask("false"); got != nil {
		t.Errorf("a delta without news brings %v", got)
	}
	s.add(netip.MustParsePrefix("203.0.113.0/24"))
	if _, got := ask("false"); !cmp.Equal(got, [][3]string{{"Range", "203.0.113.0/24", "ban"}}) {
		t.Errorf("a delta brings %v", got)
	}
	s.replace(map[int]netip.Prefix{0: netip.MustParsePrefix("192.0.2.9/32")})
	s.resync()
	if code, _ := ask("false"); code != http.StatusInternalServerError {
		t.Errorf("%d, want an error that makes the client pull everything", code)
	}
	if _, got := ask("true"); len(got) != 4 || got[0][1] != "192.0.2.9" {
		t.Errorf("after a change everything is %v", got)
	}
}

func TestContestTableOfOneThatIsLate(t *testing.T) {
	programs := []program{{name: "ours"}, {name: "peer", version: "1"}}
	c := contest{100_000, map[string][]course{
		"ours": {{enforced: time.Second, ban: 2 * time.Millisecond, memory: 25 << 20}, {enforced: 3 * time.Second, ban: 4 * time.Millisecond, memory: 47 << 20}},
		"peer": {{late: &lateError{time.Minute, 7, 64}, enforced: time.Minute, memory: 100 << 20}},
	}}
	got := contestTable(c, programs)
	for _, want := range []string{
		"| start until all are enforced, s | 2.0 (1.0 to 3.0) | > 60.0 | 1 : > 30.0 |  |\n",
		"| resident then, MB | 36.0 (25.0 to 47.0) | > 100 | 1 : > 2.8 | 45.0: held |\n",
		"| one ban, delta to kernel, ms | 3.0 (2.0 to 4.0) |  |  | 5.0: held |\n",
		"\nAfter 1m0s, when peer was stopped, packets from 7 of 64 banned addresses still passed.\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in:\n%s", want, got)
		}
	}
}

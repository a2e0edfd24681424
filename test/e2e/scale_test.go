package e2e

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/edgeward/edgeward/test/rig"
)

// population is the decisions of the large tests: n of them, a tenth ranges
// (nested and overlapping ones among them), a fifth IPv6. It is the same each
// time, because LAPI's filled database is kept for the next run.
func population(n int) []netip.Prefix {
	random := rand.New(rand.NewPCG(1, 2))
	seen := map[netip.Prefix]bool{}
	var all []netip.Prefix
	for i := 0; len(all) < n; i++ {
		var p netip.Prefix
		if i%5 == 0 {
			bits := 128
			if i%50 == 0 {
				bits = 36 + 4*random.IntN(19) // 36 to 108
			}
			p = netip.PrefixFrom(randomSix(random), bits)
		} else {
			bits := 32
			if i%25 == 1 || i%25 == 12 {
				bits = 15 + random.IntN(16) // 15 to 30
			}
			p = netip.PrefixFrom(randomFour(random), bits)
		}
		if p = p.Masked(); !seen[p] {
			seen[p] = true
			all = append(all, p)
		}
	}
	return all
}

// randomFour returns an address that is nobody's on this machine.
func randomFour(random *rand.Rand) netip.Addr {
	var a [4]byte
	binary.BigEndian.PutUint32(a[:], random.Uint32())
	a[0] = 1 + a[0]%99 // 1 to 99
	return netip.AddrFrom4(a)
}

// randomSix returns an address from a part of the documentation prefix small
// enough for prefixes to fall into one another.
func randomSix(random *rand.Rand) netip.Addr {
	a := netip.MustParseAddr("2001:db8::").As16()
	a[4] = byte(random.IntN(4))
	binary.BigEndian.PutUint64(a[5:13], random.Uint64())
	a[15] = byte(random.IntN(256))
	return netip.AddrFrom16(a)
}

// oracle knows who is banned, in the plainest way: a set of prefixes, asked
// for each length.
type oracle map[netip.Prefix]bool

func (o oracle) banned(a netip.Addr) bool {
	for bits := a.BitLen(); bits >= 0; bits-- {
		if o[netip.PrefixFrom(a, bits).Masked()] {
			return true
		}
	}
	return false
}

// last returns the last address of a prefix.
func last(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// middle returns an address from within a prefix.
func middle(random *rand.Rand, p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= byte(random.IntN(2)) * (0x80 >> (i % 8))
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// TestEveryAddress: with 100,000 decisions, every banned address, both edges of
// every range and what lies beyond them, and 10,000 random addresses get the
// right answer.
func TestEveryAddress(t *testing.T) {
	t.Parallel()
	const decisions, strangers, connections, batch = 100000, 10000, 8, 64
	prefixes := population(decisions)
	judge := oracle{}
	var seed []rig.Decision
	ranges, six := 0, 0
	for _, p := range prefixes {
		judge[p] = true
		d := rig.Decision{Value: p.String(), Duration: 365 * 24 * time.Hour}
		if p.IsSingleIP() {
			d.Value = p.Addr().String()
		} else {
			ranges++
		}
		if p.Addr().Is6() {
			six++
		}
		seed = append(seed, d)
	}
	random := rand.New(rand.NewPCG(3, 4))
	asked := map[netip.Addr]bool{}
	for _, p := range prefixes {
		asked[p.Addr()] = true
		if !p.IsSingleIP() {
			for _, a := range []netip.Addr{last(p), middle(random, p), p.Addr().Prev(), last(p).Next()} {
				asked[a] = true
			}
		}
	}
	for i := range strangers {
		if i%2 == 0 {
			asked[randomFour(random)] = true
		} else {
			asked[randomSix(random)] = true
		}
	}

	began := time.Now()
	l := newLAPI(t, rig.LAPIOptions{Seed: seed})
	g := newGateway(t, rig.TraefikOptions{TrustForwarded: true})
	t.Logf("LAPI with %d decisions, %d ranges, %d IPv6, and Traefik started in %s", len(prefixes), ranges, six, time.Since(began).Round(time.Millisecond))
	began = time.Now()
	g.serve(t, site{plugins: map[string]object{"guard": {"lapi": l.config(), "client": posing, "log": object{"level": "warn"}}}})
	single := prefixes[3].Addr().String()
	g.becomes(t, single, "guard", 403, time.Minute)
	t.Logf("in force after %s", time.Since(began).Round(time.Millisecond))

	addresses := make(chan []netip.Addr)
	go func() {
		defer close(addresses)
		var next []netip.Addr
		for a := range asked {
			if next = append(next, a); len(next) == batch {
				addresses <- next
				next = nil
			}
		}
		addresses <- next
	}()
	began = time.Now()
	var mu sync.Mutex
	counts := map[int]int{}
	var wrong []string
	var wait sync.WaitGroup
	for range connections {
		wait.Go(func() {
			conn, err := net.Dial("tcp", strings.TrimPrefix(g.URL, "http://"))
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			answers := bufio.NewReader(conn)
			for some := range addresses {
				// A batch goes out at once and is answered in order.
				var out strings.Builder
				for _, a := range some {
					fmt.Fprintf(&out, "GET / HTTP/1.1\r\nHost: guard.test\r\nX-Forwarded-For: %s\r\n\r\n", a)
				}
				if _, err := io.WriteString(conn, out.String()); err != nil {
					t.Error(err)
					return
				}
				for _, a := range some {
					resp, err := http.ReadResponse(answers, nil)
					if err != nil {
						t.Errorf("read the answer for %s: %v", a, err)
						return
					}
					io.Copy(io.Discard, resp.Body)
					want := 200
					if judge.banned(a) {
						want = 403
					}
					mu.Lock()
					counts[resp.StatusCode]++
					if resp.StatusCode != want {
						wrong = append(wrong, fmt.Sprintf("%s got %d, want %d", a, resp.StatusCode, want))
					}
					mu.Unlock()
				}
			}
		})
	}
	wait.Wait()
	t.Logf("%d addresses asked for in %s: %d", len(asked), time.Since(began).Round(time.Millisecond), counts)
	if len(wrong) > 0 {
		t.Errorf("%d of %d answers are wrong, among them %s", len(wrong), len(asked), strings.Join(wrong[:min(10, len(wrong))], "; "))
	}
	// The next delta finds its place among them as fast as in an empty table.
	l.ban(t, "100.64.0.1")
	l.unban(t, single)
	t.Logf("403 %s after a ban", g.becomes(t, "100.64.0.1", "guard", 403, promise))
	g.becomes(t, single, "guard", 200, promise)

	if counts[200]+counts[403] != len(asked) || counts[200] < strangers/2 {
		t.Errorf("answers by status are %d, want %d in all, a good part of them 200", counts, len(asked))
	}
}

package cloudflare

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/edgeward/edgeward/test/cfedge"
)

// quick makes a bench's times short.
func quick(p *pace) {
	p.stagger, p.retry, p.slowest, p.good = 10*time.Millisecond, 50*time.Millisecond, 500*time.Millisecond, 100*time.Millisecond
	p.flush = 100 * time.Millisecond
	p.firstRetry, p.refused, p.swap = 20*time.Millisecond, 300*time.Millisecond, 20*time.Second
}

func TestRegistration(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, p Protocol) {
		t.Parallel()
		b := newBench(t, benchOptions{settings: Settings{Protocol: p, Connections: 4}, edge: cfedge.Options{Duplicates: true}, pace: quick})
		servers := map[string]bool{}
		for _, c := range b.Connections() {
			servers[c.Server] = true
			if c.Protocol != string(p) || c.Version != "edgeward-test" || !c.PostQuantum || c.Connector != b.connector.Status().Connector {
				t.Errorf("the edge sees %+v", c)
			}
		}
		if len(servers) != 4 {
			t.Errorf("connected to %v, want four servers", servers)
		}
		s := b.connector.Status()
		for i, c := range s.Connections {
			if c.Index != i || c.State != Registered || c.Protocol != p || c.Location == "" || c.KeyExchange != "X25519MLKEM768" || c.Error != "" {
				t.Errorf("connection %+v", c)
			}
		}
		if s.Registered() != 4 || s.Tunnel != b.tunnel.ID || s.Protocol != p {
			t.Errorf("status %+v", s)
		}
		for _, c := range b.Connections() {
			applied, err := c.PushConfig(t.Context(), 7, []byte(`{"ingress":[{"service":"http_status:418"}]}`))
			if err != nil || applied != 7 {
				t.Errorf("pushed configuration: %d, %v", applied, err)
			}
		}
		if got := b.mustGet(t, "https://app.example.org/x"); got != "GET app.example.org /x 203.0.113.9" {
			t.Errorf("after a push: %q", got)
		}
	})
}

func TestSharesTheOneAddress(t *testing.T) {
	t.Parallel()
	b := newBench(t, benchOptions{settings: Settings{Protocol: HTTP2, Connections: 3}, edge: cfedge.Options{Servers: 1}, pace: quick})
	if n := b.connector.Status().Registered(); n != 3 {
		t.Errorf("%d connections, want 3", n)
	}
}

// TestRace is about which protocol is taken, how soon, and what is remembered.
func TestRace(t *testing.T) {
	dir := t.TempDir()
	memory := func() *Memory { return NewMemory(dir, slog.New(slog.DiscardHandler)) }
	for _, c := range []struct {
		name   string
		edge   func(*cfedge.Edge)
		want   Protocol
		within time.Duration
		forget bool
	}{
		{"quic gets through", func(*cfedge.Edge) {}, QUIC, 2 * time.Second, false},
		{"udp is dropped", func(e *cfedge.Edge) { e.BlockUDP(true) }, HTTP2, 6 * time.Second, false},
		{"and that is remembered", func(e *cfedge.Edge) { e.BlockUDP(true) }, HTTP2, time.Second, true},
		{"quic is rejected", func(e *cfedge.Edge) { e.RejectQUIC(true) }, HTTP2, 6 * time.Second, false},
		{"that too", func(e *cfedge.Edge) { e.RejectQUIC(true) }, HTTP2, time.Second, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, benchOptions{stopped: true, memory: memory()})
			c.edge(b.Edge)
			start := time.Now()
			b.apply(t, Settings{})
			b.serves(t, 1)
			b.mustGet(t, "https://app.example.org/")
			took := time.Since(start)
			if got := b.connector.Status().Connections[0].Protocol; got != c.want || took > c.within {
				t.Errorf("served by %s after %v, want %s within %v", got, took, c.want, c.within)
			}
			t.Log("served by", b.connector.Status().Connections[0].Protocol, "after", took)
		})
		if c.forget {
			if err := os.Remove(filepath.Join(dir, memoryFile)); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestMemory(t *testing.T) {
	dir, now := t.TempDir(), time.Now()
	log := &lockedBuffer{}
	open := func(dir string) *Memory {
		m := NewMemory(dir, slog.New(slog.NewTextHandler(log, nil)))
		m.now = func() time.Time { return now }
		return m
	}
	m := open(dir)
	m.setQUIC("192.0.2.0/24", false)
	m.setQUIC("2001:db8::/64", false)
	m.setQUIC("2001:db8::/64", true)
	m.setQUIC("", false)
	check := func(m *Memory, network string, want bool) {
		t.Helper()
		if got := m.quicBlocked(network); got != want {
			t.Errorf("%s blocked: %v, want %v", network, got, want)
		}
	}
	check(open(dir), "192.0.2.0/24", true)
	check(open(dir), "2001:db8::/64", false)
	check(open(dir), "198.51.100.0/24", false)
	now = now.Add(memoryTime + time.Second)
	check(open(dir), "192.0.2.0/24", false)
	now = now.Add(-memoryTime - time.Hour) // the clock was set back
	check(open(dir), "192.0.2.0/24", false)
	if log.String() != "" {
		t.Errorf("logged %s", log)
	}

	if err := os.WriteFile(filepath.Join(dir, memoryFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	check(open(dir), "192.0.2.0/24", false)
	check(open(filepath.Join(dir, "made", "for", "it")), "192.0.2.0/24", false)
	full := open(filepath.Join(dir, memoryFile, "sub")) // below a file
	full.setQUIC("192.0.2.0/24", false)
	full.setQUIC("198.51.100.0/24", false)
	check(full, "192.0.2.0/24", true)
	if n := strings.Count(log.String(), "\n"); n != 2 || !strings.Contains(log.String(), "not read") || !strings.Contains(log.String(), "not kept") {
		t.Errorf("want one line each for what cannot be read and written:\n%s", log)
	}
}

func TestRefusal(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, p Protocol) {
		t.Parallel()
		b := newBench(t, benchOptions{stopped: true, pace: func(p *pace) {
			quick(p)
			p.patience = time.Minute
		}})
		wrong := b.credentials()
		wrong.Secret = []byte(strings.Repeat("x", 32))
		settings := b.here(Settings{Protocol: p, Connections: 4})
		if err := b.connector.Apply(t.Context(), wrong, settings); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		eventually(t, "the refusal shows, again and again", 10*time.Second, func() bool {
			s := b.connector.Status()
			return s.Refused != "" && s.Connections[0].Attempts >= 3
		})
		s := b.connector.Status()
		if !strings.Contains(s.Refused, "Unauthorized") || !s.Connections[0].Refused || s.Registered() != 0 {
			t.Errorf("status %+v", s)
		}
		// At 150 to 300 ms between attempts, and only by the first connection.
		if took := time.Since(start); took < 300*time.Millisecond || s.Connections[1].Attempts > 0 {
			t.Errorf("three attempts in %v, and %d by the next", took, s.Connections[1].Attempts)
		}
		log := b.log.String()
		if n := strings.Count(log, "level=ERROR"); n != 1 || !strings.Contains(log, "tunnel refused") || !strings.Contains(log, "mend=") {
			t.Errorf("want one line that says what to do:\n%s", log)
		}
		if strings.Contains(log, string(wrong.Secret)) {
			t.Error("the secret was logged")
		}
		b.apply(t, Settings{Protocol: p, Connections: 4})
		b.serves(t, 4)
		if s := b.connector.Status(); s.Refused != "" {
			t.Errorf("still refused: %s", s.Refused)
		}
	})
}

// TestPutOff is about the edge that asks to come back later.
func TestPutOff(t *testing.T) {
	t.Parallel()
	b := newBench(t, benchOptions{stopped: true, pace: quick})
	b.Refuse(cfedge.Refusal{Reason: "the region is being drained", RetryAfter: time.Second, Times: 1})
	start := time.Now()
	b.apply(t, Settings{Protocol: HTTP2})
	b.serves(t, 1)
	if took := time.Since(start); took < time.Second || took > 5*time.Second {
		t.Errorf("registered after %v, and was asked to wait 1s", took)
	}
	if log := b.log.String(); !strings.Contains(log, "the region is being drained") || strings.Contains(log, "ERROR") {
		t.Errorf("log:\n%s", log)
	}
}

func TestApplyKeepsWhatServes(t *testing.T) {
	t.Parallel()
	b := newBench(t, benchOptions{settings: Settings{Protocol: HTTP2, Connections: 2}, pace: quick})
	before := b.connector.Status().Connector
	wrong := b.credentials()
	wrong.Secret = []byte(strings.Repeat("x", 32))
	err := b.connector.Apply(t.Context(), wrong, b.here(Settings{Protocol: HTTP2, Connections: 2}))
	if !errors.Is(err, ErrRefused) {
		t.Errorf("wrong credentials: %v", err)
	}
	b.connector.pace.swap = time.Second
	nowhere := b.here(Settings{Protocol: HTTP2, Connections: 2})
	nowhere.Edge = []string{"127.0.0.1:1"}
	if err := b.connector.Apply(t.Context(), b.credentials(), nowhere); err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("an edge that is not there: %v", err)
	}
	if err := b.connector.Apply(t.Context(), b.credentials(), Settings{Protocol: "h2mux"}); err == nil {
		t.Error("an unknown protocol was taken")
	}
	if err := b.connector.Apply(t.Context(), b.credentials(), b.here(Settings{Protocol: HTTP2, Connections: 2})); err != nil {
		t.Errorf("the same wish: %v", err)
	}
	if s := b.connector.Status(); s.Connector != before || s.Registered() != 2 {
		t.Errorf("status %+v", s)
	}
	eventually(t, "what was tried is gone", 5*time.Second, func() bool { return len(b.connector.Status().Connections) == 2 })
	b.mustGet(t, "https://app.example.org/")
}

// TestRotationWhileTheEdgeIsAway has wrong credentials applied when nobody can
// say that they are: the good ones serve again when the edge is back, and go when
// others that are good take over.
func TestRotationWhileTheEdgeIsAway(t *testing.T) {
	t.Parallel()
	b := newBench(t, benchOptions{settings: Settings{Protocol: HTTP2}, pace: quick})
	b.Dark(true)
	eventually(t, "the connection is lost", 30*time.Second, func() bool { return b.connector.Status().Registered() == 0 })
	for i := range 3 {
		wrong := b.credentials()
		wrong.Secret = []byte(strings.Repeat(string(rune('x'+i)), 32))
		if err := b.connector.Apply(t.Context(), wrong, b.here(Settings{Protocol: HTTP2})); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "one good and one wished for are kept", 10*time.Second, func() bool { return len(b.connector.Status().Connections) == 2 })
	b.Dark(false)
	eventually(t, "the good credentials serve again", 30*time.Second, func() bool {
		s := b.connector.Status()
		return s.Registered() == 1 && s.Refused != ""
	})
	b.mustGet(t, "https://app.example.org/")
	if err := b.connector.Apply(t.Context(), b.credentials(), b.here(Settings{Protocol: HTTP2})); err != nil {
		t.Fatal(err)
	}
	eventually(t, "only what is wished for is left", 20*time.Second, func() bool {
		s := b.connector.Status()
		return s.Registered() == 1 && s.Refused == "" && len(s.Connections) == 1
	})
}

// TestNoHotLoop counts how often an edge that hangs up is dialled.
func TestNoHotLoop(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	var dialled atomic.Int64
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			dialled.Add(1)
			_ = conn.Close()
		}
	}()
	b := newBench(t, benchOptions{stopped: true})
	settings := b.here(Settings{Protocol: HTTP2, Connections: 4})
	settings.Edge = []string{listener.Addr().String()}
	start := time.Now()
	if err := b.connector.Apply(t.Context(), b.credentials(), settings); err != nil {
		t.Fatal(err)
	}
	failed := func() int { return strings.Count(b.log.String(), "connection failed") }
	eventually(t, "each connection says so", 15*time.Second, func() bool { return failed() >= 4 })
	time.Sleep(time.Second)
	if n, took := dialled.Load(), time.Since(start); n < 4 || float64(n) > 4*took.Seconds() {
		t.Errorf("dialled %d times in %v", n, took)
	}
	if n := failed(); n != 4 {
		t.Errorf("%d lines about it, want one of each connection:\n%s", n, b.log)
	}
}

// TestSilence is about connections that end without a word.
func TestSilence(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, p Protocol) {
		t.Parallel()
		for _, c := range []struct {
			name   string
			silent func(*cfedge.Connection)
			within time.Duration
			why    string
		}{
			// Over QUIC the transport and the canary notice at about the same time.
			{"dark", func(c *cfedge.Connection) { c.Dark(true) }, 9 * time.Second,
				map[Protocol]string{HTTP2: "fell silent", QUIC: "the edge"}[p]},
			{"wedged", func(c *cfedge.Connection) { c.Wedge(true) }, 9 * time.Second,
				map[Protocol]string{HTTP2: "fell silent", QUIC: "does not answer any more: recycled"}[p]},
			{"killed", func(c *cfedge.Connection) { c.Kill() }, 5 * time.Second, "the edge closed the connection"},
		} {
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				b := newBench(t, benchOptions{settings: Settings{Protocol: p, Connections: 2}, pace: func(p *pace) {
					quick(p)
					p.silence, p.canary, p.rpc = time.Second, time.Second, 5*time.Second
				}})
				eventually(t, "the canary is answered", 5*time.Second, func() bool { return !b.connector.Status().Connections[0].Canary.IsZero() })
				b.mustGet(t, "https://app.example.org/")
				first := b.Connections()[0]
				c.silent(first)
				start := time.Now()
				eventually(t, "another takes its place", c.within, func() bool {
					n := 0
					for _, o := range b.Connections() {
						if o.ID != first.ID {
							n++
						}
					}
					return n == 2
				})
				s := b.connector.Status()
				if s.Totals.Lost != 1 {
					t.Errorf("totals %+v", s.Totals)
				}
				t.Log("replaced after", time.Since(start))
				if line := lastLine(b.log.String(), "connection lost"); !strings.Contains(line, c.why) {
					t.Errorf("logged %q, want %q", line, c.why)
				}
			})
		}
	})
}

func lastLine(text, with string) (last string) {
	for line := range strings.Lines(text) {
		if strings.Contains(line, with) {
			last = line
		}
	}
	return last
}

func TestDrain(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, p Protocol) {
		t.Parallel()
		b := newBench(t, benchOptions{settings: Settings{Protocol: p, Connections: 2, LameDuck: 500 * time.Millisecond, Grace: 20 * time.Second},
			edge: cfedge.Options{RouteLag: 300 * time.Millisecond}, pace: quick})
		slow := make(chan error, 1)
		go func() {
			status, body, err := get(context.WithoutCancel(t.Context()), b.visitor(), "https://app.example.org/slow?d=1500ms")
			if err == nil && (status != 200 || body != "done") {
				err = fmt.Errorf("%d %q", status, body)
			}
			slow <- err
		}()
		eventually(t, "the request arrives", 5*time.Second, func() bool { return b.connector.Status().Totals.Requests == 1 })
		drained := make(chan error, 1)
		start := time.Now()
		go func() { drained <- b.connector.Drain(context.WithoutCancel(t.Context())) }()
		b.serves0(t)
		b.mustGet(t, "https://app.example.org/") // the edge has not heard of it everywhere
		if s := b.connector.Status(); s.Registered() != 0 || s.Connections[0].State != Draining {
			t.Errorf("status %+v", s)
		}
		if err := <-slow; err != nil {
			t.Errorf("the request in flight: %v", err)
		}
		if err := <-drained; err != nil {
			t.Error(err)
		}
		// 1.5 s for the request, and up to a second to say goodbye; not the grace.
		if took := time.Since(start); took > 10*time.Second {
			t.Errorf("drained in %v", took)
		}
		b.lossless(t)
		if err := b.connector.Apply(t.Context(), b.credentials(), Settings{}); !errors.Is(err, errDrained) {
			t.Errorf("apply after drain: %v", err)
		}
	})
}

func (b *bench) serves0(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if err := b.WaitConnections(ctx, b.tunnel.ID, 0); err != nil {
		t.Fatal(err)
	}
}

func TestDrainIsBounded(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, p Protocol) {
		t.Parallel()
		settings := Settings{Protocol: p, LameDuck: 100 * time.Millisecond, Grace: 500 * time.Millisecond}
		for _, c := range []struct {
			name string
			ctx  time.Duration
			cut  bool
		}{{"by grace", time.Minute, false}, {"by its context", 200 * time.Millisecond, true}} {
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				b := newBench(t, benchOptions{settings: settings})
				ended := make(chan struct{})
				go func() {
					defer close(ended)
					_, _, _ = get(context.WithoutCancel(t.Context()), b.visitor(), "https://app.example.org/slow?d=1m")
				}()
				eventually(t, "the request arrives", 5*time.Second, func() bool { return b.connector.Status().Totals.Requests == 1 })
				ctx, cancel := context.WithTimeout(t.Context(), c.ctx)
				defer cancel()
				start := time.Now()
				err := b.connector.Drain(ctx)
				if (err != nil) != c.cut || time.Since(start) > 10*time.Second {
					t.Errorf("drained in %v: %v", time.Since(start), err)
				}
				<-ended
			})
		}
	})
}

// TestEdgeDrains is about the edge that lets connections go, one after another,
// as when it restarts: others take their place, and what is in flight ends well.
func TestEdgeDrains(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, p Protocol) {
		t.Parallel()
		b := newBench(t, benchOptions{settings: Settings{Protocol: p, Connections: 2}, pace: quick})
		v := b.load(t, 100)
		for _, c := range b.Connections() {
			c.Drain()
			eventually(t, "it is replaced", 5*time.Second, func() bool { return !c.Registered() && len(b.Connections()) == 2 })
		}
		v.stop(t)
		b.lossless(t)
	})
}

// A load asks for something so many times a second until it is stopped: most
// requests are short, some take their time, some bring much.
type load struct {
	end    context.CancelFunc
	all    sync.WaitGroup
	sent   atomic.Int64
	failed sync.Map // what: true
	odd    atomic.Int64
}

func (b *bench) load(t *testing.T, perSecond int) *load {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	l := &load{end: cancel}
	l.all.Go(func() {
		client, start := b.visitor(), time.Now()
		room := make(chan struct{}, 100) // a machine that is too slow for the rate is not buried
		for i := 0; ctx.Err() == nil; i++ {
			// Paced by what is due, as a busy machine skips ticks.
			time.Sleep(time.Until(start.Add(time.Duration(i) * time.Second / time.Duration(perSecond))))
			room <- struct{}{}
			l.all.Go(func() {
				defer func() { <-room }()
				l.sent.Add(1)
				target := fmt.Sprintf("https://app.example.org/%d", i)
				switch i % 10 {
				case 3:
					target = "https://app.example.org/slow?d=200ms"
				case 7:
					target = "https://app.example.org/down?n=100000"
				}
				status, _, err := get(context.WithoutCancel(ctx), client, target)
				if err != nil || status != http.StatusOK {
					l.odd.Add(1)
					l.failed.Store(fmt.Sprint(target, " ", status, " ", err), true)
				}
			})
		}
	})
	return l
}

// stop waits for all answers and demands that all were good.
func (l *load) stop(t *testing.T) {
	t.Helper()
	if n := l.stopAny(); n > 0 {
		l.failed.Range(func(what, _ any) bool { t.Log(what); return true })
		t.Errorf("%d of %d requests failed", n, l.sent.Load())
	}
}

func (l *load) stopAny() int64 {
	l.end()
	l.all.Wait()
	return l.odd.Load()
}

// TestSwapLosesNothing replaces everything there is to replace, under load.
func TestSwapLosesNothing(t *testing.T) {
	t.Parallel()
	b := newBench(t, benchOptions{settings: Settings{Protocol: QUIC, Connections: 4},
		edge: cfedge.Options{RouteLag: 200 * time.Millisecond}, pace: quick})
	v := b.load(t, 200)
	for i, s := range []Settings{{Protocol: HTTP2, Connections: 4}, {Protocol: HTTP2, Connections: 1}, {Protocol: QUIC, Connections: 3}, {Connections: 4}} {
		b.tunnel.Secret = b.Cloud().RotateSecret(b.tunnel.ID)
		id := b.connector.Status().Connector
		b.apply(t, s)
		if got := b.connector.Status(); got.Connector == id || got.Registered() < 1 {
			t.Errorf("swap %d: %+v", i, got)
		}
	}
	v.stop(t)
	b.lossless(t)
	eventually(t, "the old connections are gone", 5*time.Second, func() bool { return len(b.connector.Status().Connections) == 4 })
}

// TestStorm is the tunnel's life in short: connections are killed at random, the
// edge goes dark and returns, credentials rotate, the protocol changes, the
// process rolls over. What was in flight on a link that the emulator cut is
// counted as lost; nothing else may fail, but while the edge is dark.
func TestStorm(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, p Protocol) {
		t.Parallel()
		b := newBench(t, benchOptions{settings: Settings{Protocol: p, Connections: 4, LameDuck: time.Second},
			edge: cfedge.Options{RouteLag: 200 * time.Millisecond},
			pace: func(p *pace) { p.stagger, p.silence = 20*time.Millisecond, 3*time.Second }})
		other := map[Protocol]Protocol{HTTP2: QUIC, QUIC: HTTP2}[p]
		v := b.load(t, 200)
		kill := func(times int) {
			for range times {
				time.Sleep(200 * time.Millisecond)
				if all := b.Connections(); len(all) > 2 {
					all[rand.IntN(len(all))].Kill()
				}
			}
		}
		kill(8)
		b.tunnel.Secret = b.Cloud().RotateSecret(b.tunnel.ID)
		b.apply(t, Settings{Protocol: p, Connections: 4, LameDuck: time.Second})
		kill(4)
		b.apply(t, Settings{Protocol: other, Connections: 4, LameDuck: time.Second})
		kill(4)

		// The next process starts, and the old one drains.
		next := New(Options{Name: "home", Version: "next", Log: b.base, Handler: b.connector.handler})
		next.pace = b.connector.pace
		if err := next.Apply(t.Context(), b.credentials(), b.here(Settings{Protocol: p, Connections: 4, LameDuck: time.Second})); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the next process serves", 20*time.Second, func() bool { return next.Status().Registered() == 4 })
		if err := b.connector.Drain(t.Context()); err != nil {
			t.Error(err)
		}
		kill(4)
		if failed, lost := v.stopAny(), b.Counts().Lost; failed > lost {
			v.failed.Range(func(what, _ any) bool { t.Log(what); return true })
			t.Errorf("%d requests of %d failed, of which %d were in flight on a killed link", failed, v.sent.Load(), lost)
		}
		b.lossless(t)
		t.Logf("%d requests: %+v", v.sent.Load(), b.Counts())

		// Dark: nobody gets through, and all return by themselves.
		b.Dark(true)
		eventually(t, "the darkness is noticed", 15*time.Second, func() bool { return next.Status().Registered() == 0 })
		b.Dark(false)
		start := time.Now()
		eventually(t, "all are back", 30*time.Second, func() bool { return next.Status().Registered() == 4 })
		t.Log("back after", time.Since(start))
		b.connector = next // for its drain
		// The edge's own ends of the dark connections are gone a little later.
		eventually(t, "visitors get through", 10*time.Second, func() bool {
			status, _, err := get(t.Context(), b.visitor(), "https://app.example.org/")
			return err == nil && status == http.StatusOK
		})
	})
}

// TestCycles starts and stops a connector, and cuts its connections, many times:
// nothing may stay behind. What stays behind is counted for the whole process, so
// no other test runs beside this one. QUIC comes first: while HTTP/2 has its turn,
// quic-go forgets what it keeps of closed connections for some seconds.
func TestCycles(t *testing.T) {
	const cycles, reconnects, connections = 50, 500, 8 // over each protocol
	handler := roundTripper(func(r *http.Request) (*http.Response, error) {
		return &http.Response{StatusCode: 200, Header: http.Header{}, Body: http.NoBody}, nil
	})
	log := slog.New(slog.DiscardHandler)
	benches := map[Protocol]*bench{}
	start := func(t *testing.T, b *bench, p Protocol) {
		b.connector = New(Options{Name: "home", Log: log, Handler: handler})
		quick(&b.connector.pace)
		b.connector.pace.stagger, b.connector.pace.good, b.connector.pace.firstRetry = 0, 0, 0
		b.apply(t, Settings{Protocol: p, Connections: connections, LameDuck: time.Millisecond})
		b.serves(t, connections)
		b.mustGet(t, "https://app.example.org/")
	}
	stop := func(t *testing.T, b *bench) {
		if err := b.connector.Drain(t.Context()); err != nil {
			t.Error(err)
		}
	}
	for _, p := range []Protocol{HTTP2, QUIC} {
		e, err := cfedge.Start(context.WithoutCancel(t.Context()), cfedge.Options{Servers: connections})
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		b := &bench{Edge: e, log: &lockedBuffer{}, tunnel: e.Cloud().AddTunnel(e.Cloud().AddAccount("home"), "home", nil)}
		start(t, b, p)
		stop(t, b)
		benches[p] = b
	}
	idle, heap := usage()
	for _, p := range []Protocol{QUIC, HTTP2} {
		t.Run(string(p), func(t *testing.T) {
			b := benches[p]
			begin := time.Now()
			// The edge of HTTP/2 takes a second to let a connection go: side by side.
			var turns sync.WaitGroup
			for range 10 {
				turns.Go(func() {
					one := &bench{Edge: b.Edge, log: b.log, tunnel: b.Cloud().AddTunnel(b.tunnel.Account, fmt.Sprint(rand.Uint64()), nil)}
					for range cycles / 10 {
						one.connector = New(Options{Name: "home", Log: log, Handler: handler})
						quick(&one.connector.pace)
						one.apply(t, Settings{Protocol: p, Connections: 2, LameDuck: time.Millisecond})
						eventually(t, "it serves", 10*time.Second, func() bool { return one.connector.Status().Registered() == 2 })
						stop(t, one)
					}
				})
			}
			turns.Wait()
			t.Log("starts and stops took", time.Since(begin))

			start(t, b, p)
			for begun := 0; b.connector.Status().Totals.Lost < reconnects; begun++ {
				if begun > reconnects {
					t.Fatalf("%d kills cost %d connections", begun, b.connector.Status().Totals.Lost)
				}
				b.Kill()
				b.serves(t, connections)
			}
			b.mustGet(t, "https://app.example.org/")
			t.Log("reconnects too", time.Since(begin))
			stop(t, b)
		})
	}
	flat(t, fmt.Sprintf("%d starts and stops, %d reconnects", 2*cycles, 2*reconnects), idle, heap)
}

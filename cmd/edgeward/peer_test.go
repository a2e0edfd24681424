package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/edgeward/edgeward/internal/daemon"
	"github.com/edgeward/edgeward/tunnel"
	"github.com/edgeward/edgeward/tunnel/wireguard"
)

// running is the gateway of a script.
type running struct{ stop func() }

// TestPeerScripts runs the verbs of peer as an operator would. $WORK is filled in
// in the files of a script, $KEY1 to $KEY4 are public keys, and these commands are
// there beside edgeward: gateway FILE [NAME...] has a gateway answer that runs by
// FILE, at which the named peers use their next keys; gateway - is its end.
func TestPeerScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/peer",
		Setup: func(env *testscript.Env) error {
			env.Setenv("GORACE", hasty)
			now := &running{stop: func() {}}
			env.Values["gateway"] = now
			env.Defer(func() { now.stop() })
			words := []string{"$WORK", env.WorkDir}
			for i := range 4 {
				name, key := fmt.Sprintf("KEY%d", i+1), wireguard.NewPrivateKey().Public().String()
				env.Setenv(name, key)
				words = append(words, "$"+name, key)
			}
			fill := strings.NewReplacer(words...)
			return filepath.WalkDir(env.WorkDir, func(path string, d os.DirEntry, err error) error {
				if err != nil || !d.Type().IsRegular() {
					return err
				}
				text, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				return os.WriteFile(path, []byte(fill.Replace(string(text))), 0o644)
			})
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"gateway": func(ts *testscript.TestScript, _ bool, args []string) {
				now := ts.Value("gateway").(*running)
				now.stop()
				if now.stop = func() {}; args[0] == "-" {
					return
				}
				stop, err := pretend(ts.MkAbs(args[0]), args[1:])
				ts.Check(err)
				now.stop = stop
			},
		},
	})
}

// pretend answers at the socket of the configuration at path as a gateway does that
// runs by it, and reads it again when it is told to; the peers called moved use
// their next keys, and one called shunned is unready. It is the gateway's word that
// matters here; test/vpn has a real one.
func pretend(path string, moved []string) (stop func(), err error) {
	c, err := tunnel.Load(path)
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	var leases wireguard.Leases
	var desired wireguard.Desired
	key := wireguard.NewPrivateKey().Public() // where the file has none the gateway alone knows it
	follow := func(c *wireguard.Config) {
		known := *c
		if known.PublicKey.IsZero() {
			known.PublicKey = key
		}
		addresses, _, _ := leases.Assign(&known, time.Now())
		desired = wireguard.Compile(&known, addresses, wireguard.Secrets{}, time.Now())
		for i, p := range desired.Peers {
			if p.Name == "shunned" {
				desired.Peers = slices.Delete(desired.Peers, i, i+1)
				desired.Idle = append(desired.Idle, wireguard.IdlePeer{Name: p.Name, PublicKey: p.PublicKey, Addresses: p.Addresses, State: wireguard.Unready, Why: "nobody likes it"})
				break
			}
		}
	}
	follow(c.VPN())
	status := func() wireguard.Status {
		status := wireguard.Status{Interface: "edgeward0", Mode: wireguard.Kernel, PublicKey: desired.Device.PublicKey, File: path}
		for _, p := range desired.Peers {
			s := wireguard.PeerStatus{Name: p.Name, State: wireguard.Live, PublicKey: p.PublicKey, Addresses: p.Addresses, Groups: p.Groups, Services: p.Services, Expires: p.Expires,
				Rotating: !p.Next.IsZero()}
			if p.Name == "bob" {
				s.Endpoint, s.Handshake, s.Received, s.Sent, s.Denied = netip.MustParseAddrPort("203.0.113.9:40000").String(), time.Now().Add(-95*time.Second), 1536, 5<<30, 3
			}
			if slices.Contains(moved, string(p.Name)) && !p.Next.IsZero() {
				s.PublicKey, s.Rotating = p.Next, false
			}
			status.Peers = append(status.Peers, s)
		}
		for _, p := range desired.Idle {
			status.Peers = append(status.Peers, wireguard.PeerStatus{Name: p.Name, State: p.State, Why: p.Why, PublicKey: p.PublicKey, Addresses: p.Addresses, Groups: p.Groups, Expires: p.Expires})
		}
		return status
	}
	locked := func(do func() any) func(url.Values) (any, error) {
		return func(url.Values) (any, error) {
			mu.Lock()
			defer mu.Unlock()
			return do(), nil
		}
	}
	socket, err := daemon.ListenSocket(c.Socket, daemon.Answers{
		"/v1/vpn":         locked(func() any { return status() }),
		"/v1/vpn/desired": locked(func() any { return desired }),
	}, daemon.Orders{
		"/v1/reload": func(url.Values, string) (any, error) {
			mu.Lock()
			defer mu.Unlock()
			if c, err := tunnel.Load(path); err == nil { // or the last good state stays
				follow(c.VPN())
			}
			return struct{}{}, nil
		},
	}, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- socket.Run(ctx) }()
	return func() { cancel(); <-ended }, nil
}

func TestExpiry(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 500, time.FixedZone("CET", 3600))
	for text, want := range map[string]string{
		"":                          "0001-01-01T00:00:00Z",
		"30d":                       "2026-12-21T11:00:00Z",
		"12h":                       "2026-11-21T23:00:00Z",
		"2027-01-31":                "2027-01-31T23:00:00Z", // the whole day, where the operator is
		"2027-01-31T18:00:00+01:00": "2027-01-31T17:00:00Z",
		"2026-11-21":                "2026-11-21T23:00:00Z",
		"2026-11-20":                "that is over",
		"0d":                        "that is over",
		"-1h":                       "that is over",
		"soon":                      "want 30d, 12h",
		"-3d":                       "want 30d, 12h",
	} {
		got, err := expiry(text, now)
		if err != nil {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q: %v, want %s", text, err, want)
			}
		} else if got.Format(time.RFC3339) != want {
			t.Errorf("%q is %v, want %s", text, got, want)
		}
	}
}

func TestFigures(t *testing.T) {
	now := time.Now()
	for got, want := range map[string]string{
		size(0):                                    "0 B",
		size(1023):                                 "1023 B",
		size(1536):                                 "1.5 KiB",
		size(5 << 30):                              "5.0 GiB",
		size(3 << 50):                              "3072.0 TiB",
		age(time.Time{}, now):                      "never",
		age(now.Add(-95*time.Second), now):         "1m35s ago",
		age(now.Add(time.Second), now):             "0s ago",
		span(26*time.Hour + 5*time.Minute):         "26h5m",
		span(30 * 24 * time.Hour):                  "30d",
		expires(time.Time{}, now):                  "never",
		expires(time.Unix(0, 0), now):              "1970-01-01 00:00:00 UTC",
		expires(time.Unix(90, 0), time.Unix(0, 0)): "1970-01-01 00:01:30 UTC (in 1m30s)",
	} {
		if got != want {
			t.Errorf("says %q, want %q", got, want)
		}
	}
}

// Package lapiclient proves internal/crowdsec on the real CrowdSec LAPI, by
// every way that leads to it: a key over HTTP, a client certificate over TLS,
// a unix socket. It asks CrowdSec itself what arrived: which bouncer it knows,
// what cscli shows of the usage metrics. Faults are not its business, the unit
// tests inject them. It holds tests alone; make test-real calls it.
package lapiclient

import (
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/edgeward/edgeward/internal/config"
	"github.com/edgeward/edgeward/internal/crowdsec"
	"github.com/edgeward/edgeward/internal/lapi"
	"github.com/edgeward/edgeward/test/rig"
	"github.com/edgeward/edgeward/test/rig/rigtest"
)

var agent = crowdsec.Agent{Type: "crowdsec-edgeward-nftables-bouncer", Version: "v1.2.3"}

// way is one way to LAPI.
type way struct {
	name string
	opts rig.LAPIOptions
	// config says how to connect, given what LAPI was started with.
	config func(t *testing.T, l *rig.LAPI, c *crowdsec.Config)
}

var ways = []way{
	{"key", rig.LAPIOptions{}, func(t *testing.T, l *rig.LAPI, c *crowdsec.Config) {
		c.URL, c.KeyFile = l.URL, key(t, l)
	}},
	{"socket", rig.LAPIOptions{Socket: true}, func(t *testing.T, l *rig.LAPI, c *crowdsec.Config) {
		c.URL, c.KeyFile = "unix://"+l.SocketPath, key(t, l)
	}},
	{"certificate", rig.LAPIOptions{TLS: true}, func(t *testing.T, l *rig.LAPI, c *crowdsec.Config) {
		cert, certKey, err := l.PKI.Client("node-1", rig.BouncerOU)
		if err != nil {
			t.Fatal(err)
		}
		c.URL = l.URL
		c.TLS = crowdsec.TLS{CAFile: config.File(l.PKI.CAFile), CertFile: config.File(cert), KeyFile: config.File(certKey)}
	}},
	{"key over TLS", rig.LAPIOptions{TLS: true}, func(t *testing.T, l *rig.LAPI, c *crowdsec.Config) {
		c.URL, c.KeyFile, c.TLS.CAFile = l.URL, key(t, l), config.File(l.PKI.CAFile)
	}},
}

// key makes an API key and puts it into a file.
func key(t *testing.T, l *rig.LAPI) config.File {
	t.Helper()
	k, err := l.AddBouncer(t.Context(), "node-1")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, []byte(k+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return config.File(file)
}

func TestWays(t *testing.T) {
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel() // most of it is waiting
			server := rigtest.LAPI(t, w.opts)
			c := crowdsec.Defaults()
			c.Interval = time.Second
			w.config(t, server, &c)
			client, err := crowdsec.New(c, agent, slog.New(slog.NewTextHandler(t.Output(), nil)))
			if err != nil {
				t.Fatal(err)
			}
			pull(t, server, client)
			report(t, server, client)
		})
	}
}

// pull follows the stream until a ban shows and ends.
func pull(t *testing.T, server *rig.LAPI, client *crowdsec.LAPI) {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := server.Ban(ctx, "192.0.2.1", time.Hour); err != nil {
		t.Fatal(err)
	}
	seen := make(chan string, 100)
	var held, ended []string
	stream := client.Stream([]string{"ip", "range"}, lapi.Sink{
		Begin:      func(bool, time.Time) { held, ended = nil, nil },
		Add:        func(row *lapi.Row) { held = append(held, row.Value) },
		Delete:     func(int) { ended = append(ended, "ended") },
		Unreadable: func() { t.Error("an unreadable row") },
		Commit:     func() bool { seen <- strings.Join(append(held, ended...), " "); return false },
	}, slog.New(slog.NewTextHandler(t.Output(), nil)))
	stopped := make(chan struct{})
	go func() { defer close(stopped); stream.Run(ctx) }()
	expect := func(want string) {
		t.Helper()
		for {
			select {
			case got := <-seen:
				if got == want {
					return
				}
				if got != "" {
					t.Fatalf("pulled %q, want %q", got, want)
				}
			case <-ctx.Done():
				t.Fatalf("never pulled %q", want)
			}
		}
	}
	expect("192.0.2.1")
	if err := server.Ban(ctx, "203.0.113.0/24", time.Hour); err != nil {
		t.Fatal(err)
	}
	expect("203.0.113.0/24")
	if err := server.Unban(ctx, "192.0.2.1"); err != nil {
		t.Fatal(err)
	}
	expect("ended")
	cancel()
	<-stopped

	bouncers, err := server.Bouncers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, b := range bouncers {
		found = found || b.Type == agent.Type && b.Version == agent.Version
	}
	if !found {
		t.Errorf("LAPI knows %+v, and no %s", bouncers, agent)
	}
}

// report sends usage metrics twice and compares what CrowdSec makes of them.
func report(t *testing.T, server *rig.LAPI, client *crowdsec.LAPI) {
	dropped := func(unit, origin, remediation, ip string) crowdsec.Series {
		return crowdsec.Series{Name: crowdsec.Dropped, Unit: unit, Origin: origin, Remediation: remediation, IPType: ip}
	}
	held := func(origin, remediation, ip string) crowdsec.Series {
		return crowdsec.Series{Name: crowdsec.ActiveDecisions, Unit: crowdsec.IP, Origin: origin, Remediation: remediation, IPType: ip}
	}
	// A reporter reports once more when it ends: that is when these speak.
	send := func(before, after crowdsec.Totals) {
		t.Helper()
		readings := make(chan crowdsec.Totals)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		usage := client.Usage(time.Now(), func() (crowdsec.Totals, error) { return <-readings, nil })
		go func() { ended <- usage.Run(ctx) }()
		readings <- before
		cancel()
		readings <- after
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
	}
	first := crowdsec.Totals{
		dropped(crowdsec.Packet, "CAPI", "ban", crowdsec.IPv4):                                 1007,
		dropped(crowdsec.Byte, "CAPI", "ban", crowdsec.IPv4):                                   420,
		dropped(crowdsec.Packet, "CAPI", "captcha", crowdsec.IPv4):                             7, // as many as were banned
		dropped(crowdsec.Packet, "cscli", "ban", crowdsec.IPv6):                                2,
		dropped(crowdsec.Packet, "lists:"+strings.Repeat("firehol", 60), "ban", crowdsec.IPv4): 1,
		{Name: crowdsec.Processed, Unit: crowdsec.Packet, IPType: crowdsec.IPv4}:               90000,
		held("CAPI", "ban", crowdsec.IPv4):                                                     15000,
		held("CAPI", "captcha", crowdsec.IPv4):                                                 5,
		held("cscli", "ban", crowdsec.IPv6):                                                    1,
	}
	send(crowdsec.Totals{dropped(crowdsec.Packet, "CAPI", "ban", crowdsec.IPv4): 1000}, first)
	time.Sleep(2 * time.Second) // two processes do not report in one second
	send(first, crowdsec.Totals{
		dropped(crowdsec.Packet, "CAPI", "ban", crowdsec.IPv4): 5, // the counters began again
		held("CAPI", "ban", crowdsec.IPv4):                     14000,
	})

	text, err := server.Cscli(t.Context(), "-c", showing(t, server), "metrics", "show", "bouncers", "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	// bouncer, origin, name, unit
	var shown struct {
		Bouncers map[string]map[string]map[string]map[string]int64
	}
	if err := json.Unmarshal(text, &shown); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	if len(shown.Bouncers) != 1 {
		t.Fatalf("cscli shows %d bouncers: %s", len(shown.Bouncers), text)
	}
	for name, got := range shown.Bouncers {
		for origin := range got {
			if strings.HasPrefix(origin, "lists:") {
				delete(got, origin)
			}
		}
		want := map[string]map[string]map[string]int64{
			"CAPI":  {"dropped": {"packet": 7 + 7 + 5, "byte": 420}, "active_decisions": {"ip": 14000}},
			"cscli": {"dropped": {"packet": 2}, "active_decisions": {"ip": 0}},
			"":      {"processed": {"packet": 90000}},
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("cscli shows for %s: %s", name, diff)
		}
	}
}

// showing returns LAPI's configuration changed so that cscli is willing to show
// usage metrics, which are in the database: it wants CrowdSec's own metrics to
// be served as well, and only warns when they cannot be had.
func showing(t *testing.T, server *rig.LAPI) string {
	t.Helper()
	etc := filepath.Join(server.Dir, "etc")
	text, err := os.ReadFile(filepath.Join(etc, "config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	const off, on = "prometheus: {enabled: false}", "prometheus: {enabled: true, listen_addr: 127.0.0.1, listen_port: 1}"
	if !strings.Contains(string(text), off) {
		t.Fatalf("LAPI's configuration does not say %q", off)
	}
	changed := filepath.Join(etc, "metrics.yaml")
	if err := os.WriteFile(changed, []byte(strings.Replace(string(text), off, on, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	return changed
}

package main

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/edgeward/edgeward/tunnel"
)

// parts are the program without its endpoints, and with an API that hangs.
type parts struct {
	*public
	t        *testing.T
	dir, api string
}

func newParts(t *testing.T, config string) *parts {
	api := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		<-r.Context().Done()
	}))
	t.Cleanup(api.Close)
	p := &parts{t: t, dir: t.TempDir(), api: api.URL}
	credentials, err := json.Marshal(map[string]any{"AccountTag": strings.Repeat("a", 32), "TunnelID": "5f1c7a52-0000-4000-8000-000000000000", "TunnelSecret": []byte(strings.Repeat("x", 32))})
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"credentials": string(credentials), "page": "banned {{.Status}}", "token": "abc"} {
		if err := os.WriteFile(filepath.Join(p.dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c, log := p.parse(config), slog.New(slog.DiscardHandler)
	if p.public, err = newPublic(&c, log); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.connectors.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	if err := p.enforce(config); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *parts) parse(config string) tunnel.Config {
	p.t.Helper()
	text := "edge: {addresses: [\"127.0.0.1:1\"]}\nstateDir: \"\"\ndrain: {lameDuck: 100ms, grace: 1s}\n" + strings.NewReplacer("DIR", p.dir, "API", p.api).Replace(config)
	c, err := tunnel.Parse("tunnel.yaml", []byte(text))
	if err != nil {
		p.t.Fatal(err)
	}
	return c
}

func (p *parts) enforce(config string) error {
	c := p.parse(config)
	return p.public.enforce(&c)
}

// tunnels waits for as many connectors and returns their names.
func (p *parts) tunnels(n int) string {
	p.t.Helper()
	var names []string
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		names = nil
		for _, l := range p.connectors.links() {
			names = append(names, l.Tunnel)
		}
		if len(names) == n {
			break
		}
	}
	return strings.Join(names, " ")
}

func (p *parts) status(via string) int {
	p.t.Helper()
	req := httptest.NewRequest(http.MethodGet, "http://app.example.com/", nil)
	req.RequestURI = ""
	req.Header.Set("Cf-Connecting-Ip", "203.0.113.9")
	res, err := p.gate.For(via).RoundTrip(req)
	if err != nil {
		p.t.Fatal(err)
	}
	_ = res.Body.Close()
	return res.StatusCode
}

const (
	tunnelA = "tunnels: [{name: a, credentialsFile: DIR/credentials}]\n"
	tunnelB = "tunnels: [{name: a, credentialsFile: DIR/credentials}, {name: b, credentialsFile: DIR/credentials}]\n"
	fromAPI = "tunnels: [{name: a, credentialsFile: DIR/credentials}, {name: b}, {name: c}]\n" +
		"cloudflare: {account: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa, owner: me, tunnelTokenFile: DIR/token, url: API}\n"
)

// TestWhatTheGateRefusesGoesToNobody takes a tunnel away in a configuration that
// the gate cannot use.
func TestWhatTheGateRefusesGoesToNobody(t *testing.T) {
	p := newParts(t, tunnelB+"hosts: [{host: app.example.com, tunnel: b, service: \"http://127.0.0.1:1\"}]\nban: {pageFile: DIR/page}\n")
	if got := p.tunnels(2); got != "a b" {
		t.Fatalf("there are the tunnels %q", got)
	}
	if err := p.enforce(tunnelA + "hosts: [{host: app.example.com, tunnel: a, service: \"http://127.0.0.1:1\"}]\nban: {pageFile: DIR/missing}\n"); err == nil {
		t.Error("a page that is missing was taken")
	}
	time.Sleep(200 * time.Millisecond)
	if got := p.tunnels(2); got != "a b" || p.status("b") != 502 {
		t.Errorf("after what was refused there are the tunnels %q, and b answers %d", got, p.status("b"))
	}
}

// TestTheGateWaitsForNobody makes a host internal while the API hangs, and then
// has the connectors follow a wish that needs no API.
func TestTheGateWaitsForNobody(t *testing.T) {
	const host = "hosts: [{host: app.example.com, tunnel: a, service: \"http://127.0.0.1:1\"}]\n"
	p := newParts(t, fromAPI+host)
	if got := p.tunnels(3); got != "a b c" {
		t.Fatalf("there are the tunnels %q", got)
	}
	start := time.Now()
	if err := p.enforce(fromAPI + strings.Replace(host, "tunnel: a", "tunnel: a, exposure: internal", 1)); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took > 2*time.Second || p.status("a") != 404 {
		t.Errorf("after %s the host that became internal answers %d", took, p.status("a"))
	}
	if err := p.enforce(tunnelA + host); err != nil {
		t.Fatal(err)
	}
	if got := p.tunnels(1); got != "a" {
		t.Errorf("after %s there are the tunnels %q", time.Since(start), got)
	}
	if trouble := p.connectors.troubled(); trouble != "" {
		t.Error(trouble)
	}
}

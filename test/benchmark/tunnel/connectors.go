package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/cloudflare/cloudflared/client"
	"github.com/cloudflare/cloudflared/config"
	"github.com/cloudflare/cloudflared/connection"
	"github.com/cloudflare/cloudflared/features"
	"github.com/cloudflare/cloudflared/ingress"
	"github.com/cloudflare/cloudflared/ingress/origins"
	"github.com/cloudflare/cloudflared/orchestration"
	"github.com/cloudflare/cloudflared/signal"
	"github.com/cloudflare/cloudflared/supervisor"
	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"github.com/edgeward/edgeward/internal/lapi"
	"github.com/edgeward/edgeward/tunnel"
	"github.com/edgeward/edgeward/tunnel/cloudflare"
)

// serve is a connector's process: it reads its plan, says where it tells its
// usage, and connects.
func serve(ctx context.Context, name string) error {
	var p plan
	if err := json.NewDecoder(os.Stdin).Decode(&p); err != nil {
		return errNoPlan
	}
	id, err := uuid.Parse(p.Tunnel)
	if err != nil {
		return errNoPlan
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(p.Authority) {
		return errNoPlan
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("tell usage: %w", err)
	}
	server := &http.Server{Handler: http.HandlerFunc(tellUsage), ReadHeaderTimeout: time.Minute}
	go func() { _ = server.Serve(listener) }()
	defer server.Close()
	fmt.Println("http://" + listener.Addr().String())
	var answers http.RoundTripper
	switch name {
	case bare:
		answers, err = newBare(p)
	case routing:
		answers, err = newGate(p, false)
	case deciding:
		answers, err = newGate(p, true)
	default:
		return runStock(ctx, p, id, roots)
	}
	if err != nil {
		return err
	}
	return runOurs(ctx, p, id, roots, answers)
}

func tellUsage(w http.ResponseWriter, _ *http.Request) {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	u := usage{CPU: time.Duration(r.Utime.Nano() + r.Stime.Nano())}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	for line := range strings.Lines(string(status)) {
		for key, into := range map[string]*int64{"VmRSS:": &u.Memory, "VmHWM:": &u.Peak} {
			if text, ok := strings.CutPrefix(line, key); ok {
				_, _ = fmt.Sscan(text, into)
				*into <<= 10
			}
		}
	}
	_ = json.NewEncoder(w).Encode(u)
}

// newBare is the least that can stand behind our connector: a transport to the
// origin service, as large as cloudflared's.
func newBare(p plan) (http.RoundTripper, error) {
	origin, err := url.Parse(p.Origin)
	if err != nil {
		return nil, errNoPlan
	}
	transport := &http.Transport{MaxIdleConns: p.Sockets, MaxIdleConnsPerHost: p.Sockets, DisableCompression: true}
	return handler(func(r *http.Request) (*http.Response, error) {
		r.URL.Scheme, r.URL.Host = origin.Scheme, origin.Host
		return transport.RoundTrip(r)
	}), nil
}

// decisions are about as many as a bouncer has that follows the community's
// blocklist.
const decisions = 15_000

// newGate is the gate as edgeward-tunnel makes it: with routes and, if it is to
// decide, with decisions and a key that signs.
func newGate(p plan, decides bool) (http.RoundTripper, error) {
	dir, err := os.MkdirTemp("", "edgeward-benchmark-")
	if err != nil {
		return nil, fmt.Errorf("keep a key: %w", err)
	}
	defer os.RemoveAll(dir) // the gate has read it by then
	key := filepath.Join(dir, "key")
	if err := os.WriteFile(key, []byte(strings.Repeat("k", 44)), 0o600); err != nil {
		return nil, fmt.Errorf("keep a key: %w", err)
	}
	text := fmt.Appendf(nil, `
tunnels: [{name: benchmark, tokenFile: %q}]
hosts: [{host: app.example.org, service: %q, origin: {idleConnections: %d}}]
`, key, p.Origin, p.Sockets)
	if decides {
		text = fmt.Appendf(text, "lapi: {url: 'http://127.0.0.1:8080', keyFile: %[1]q}\nidentity: {keyFile: %[1]q}\n", key)
	}
	c, err := tunnel.Parse("benchmark", text)
	if err != nil {
		return nil, err
	}
	gate, err := tunnel.New(c, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	if decides {
		sink := gate.Sink()
		sink.Begin(true, time.Now())
		for i := range decisions {
			address := netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)})
			sink.Add(&lapi.Row{ID: i + 1, Scope: "Ip", Value: address.String(), Type: "ban", Origin: "CAPI", Scenario: "benchmark", Duration: "4h"})
		}
		sink.Commit()
	}
	return gate.For("benchmark"), nil
}

// runOurs runs our connector before what answers its requests.
func runOurs(ctx context.Context, p plan, id uuid.UUID, roots *x509.CertPool, answers http.RoundTripper) error {
	c := cloudflare.New(cloudflare.Options{Name: "benchmark", Version: "benchmark", Log: slog.New(slog.DiscardHandler), Handler: answers})
	err := c.Apply(ctx, cloudflare.Credentials{Account: p.Account, Tunnel: id, Secret: p.Secret}, cloudflare.Settings{
		Protocol: cloudflare.Protocol(p.Protocol), Connections: p.Connections, Edge: p.Edge, RootCAs: roots,
	})
	if err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

type handler func(*http.Request) (*http.Response, error)

func (h handler) RoundTrip(r *http.Request) (*http.Response, error) { return h(r) }

// runStock runs cloudflared's own supervisor as its command line sets it up,
// but for what would ask Cloudflare's DNS.
func runStock(ctx context.Context, p plan, id uuid.UUID, roots *x509.CertPool) error {
	log := zerolog.Nop()
	rules, err := ingress.ParseIngress(&config.Configuration{Ingress: []config.UnvalidatedIngressRule{{Service: p.Origin}}})
	if err != nil {
		return err
	}
	protocol := map[string]connection.Protocol{"http2": connection.HTTP2, "quic": connection.QUIC}[p.Protocol]
	warp := ingress.NewWarpRoutingConfig(&config.WarpRoutingConfig{})
	dialer := ingress.NewOriginDialer(ingress.OriginConfig{DefaultDialer: ingress.NewDialer(warp)}, &log)
	orchestrator, err := orchestration.NewOrchestrator(ctx,
		&orchestration.Config{Ingress: &rules, WarpRouting: warp, OriginDialerService: dialer}, nil, nil, &log)
	if err != nil {
		return err
	}
	identity, err := client.NewConfig("2026.7.0", "linux_amd64", fixedFeatures{
		DatagramVersion: features.DatagramV2,
		FeaturesList:    []string{"allow_remote_config", "serialized_headers", "support_datagram_v2", "support_quic_eof"},
	})
	if err != nil {
		return err
	}
	trust := map[connection.Protocol]*tls.Config{}
	for _, p := range []connection.Protocol{connection.HTTP2, connection.QUIC} {
		s := p.TLSSettings()
		trust[p] = &tls.Config{RootCAs: roots, ServerName: s.ServerName, NextProtos: s.NextProtos}
	}
	return supervisor.StartTunnelDaemon(ctx, &supervisor.TunnelConfig{
		ClientConfig: identity, GracePeriod: time.Second, EdgeAddrs: p.Edge, HAConnections: p.Connections,
		Log: &log, LogTransport: &log, Observer: connection.NewObserver(&log, &log), Retries: 5, MaxEdgeAddrRetries: 8, NoPrechecks: true,
		NamedTunnel: &connection.TunnelProperties{Credentials: connection.Credentials{
			AccountTag: p.Account, TunnelSecret: p.Secret, TunnelID: id,
		}},
		ProtocolSelector: fixedProtocol(protocol), EdgeTLSConfigs: trust,
		OriginDNSService:    origins.NewStaticDNSResolverService(nil, origins.NewDNSDialer(), &log, origins.NewMetrics(prometheus.NewRegistry())),
		OriginDialerService: dialer, RPCTimeout: 5 * time.Second,
		QUICConnectionLevelFlowControlLimit: 30 << 20, QUICStreamLevelFlowControlLimit: 6 << 20,
	}, orchestrator, signal.New(make(chan struct{})), make(chan supervisor.ReconnectSignal, p.Connections), make(chan struct{}))
}

type fixedProtocol connection.Protocol

func (p fixedProtocol) Current() connection.Protocol          { return connection.Protocol(p) }
func (p fixedProtocol) Fallback() (connection.Protocol, bool) { return 0, false }

type fixedFeatures features.FeatureSnapshot

func (f fixedFeatures) Snapshot() features.FeatureSnapshot { return features.FeatureSnapshot(f) }

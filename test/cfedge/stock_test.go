package cfedge_test

import (
	"context"
	"crypto/tls"
	"errors"
	"os"
	"sync"
	"testing"
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
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"github.com/edgeward/edgeward/test/cfedge"
)

// The judge of the emulator is the connector that everybody runs: cloudflared's
// own supervisor, unchanged, as its command line would set it up.

func TestMain(m *testing.M) {
	// A second supervisor in one process would panic over its metrics.
	prometheus.DefaultRegisterer = forgiving{prometheus.NewRegistry()}
	os.Exit(m.Run())
}

// forgiving lets a metric be registered twice.
type forgiving struct{ prometheus.Registerer }

func (f forgiving) Register(c prometheus.Collector) error {
	err := f.Registerer.Register(c)
	if errors.As(err, new(prometheus.AlreadyRegisteredError)) {
		return nil
	}
	return err
}

func (f forgiving) MustRegister(all ...prometheus.Collector) {
	for _, c := range all {
		if err := f.Register(c); err != nil {
			panic(err)
		}
	}
}

// stock is a running cloudflared.
type stock struct {
	orchestrator *orchestration.Orchestrator
	drain        func() // what SIGTERM does
	kill         func()
	ended        chan struct{}
}

type stockOptions struct {
	protocol    connection.Protocol
	connections int
	grace       time.Duration
	origin      string
	curves      features.PostQuantumMode
}

type fixedProtocol connection.Protocol

func (p fixedProtocol) Current() connection.Protocol          { return connection.Protocol(p) }
func (p fixedProtocol) Fallback() (connection.Protocol, bool) { return 0, false }

type fixedFeatures features.FeatureSnapshot

func (f fixedFeatures) Snapshot() features.FeatureSnapshot { return features.FeatureSnapshot(f) }

// observer is one for all: its goroutine cannot be stopped.
var observer = sync.OnceValue(func() *connection.Observer {
	log := zerolog.Nop()
	return connection.NewObserver(&log, &log)
})

func startStock(t *testing.T, e *cfedge.Edge, info cfedge.TunnelInfo, opts stockOptions) *stock {
	t.Helper()
	log := zerolog.Nop()
	if testing.Verbose() {
		log = zerolog.New(t.Output()).Level(zerolog.InfoLevel)
	}
	if opts.connections == 0 {
		opts.connections = 1
	}
	if opts.grace == 0 {
		opts.grace = 2 * time.Second
	}
	if opts.origin == "" {
		opts.origin = "http_status:204"
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	rules, err := ingress.ParseIngress(&config.Configuration{Ingress: []config.UnvalidatedIngressRule{{Service: opts.origin}}})
	must(err)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	warp := ingress.NewWarpRoutingConfig(&config.WarpRoutingConfig{})
	dialer := ingress.NewOriginDialer(ingress.OriginConfig{DefaultDialer: ingress.NewDialer(warp)}, &log)
	orchestrator, err := orchestration.NewOrchestrator(ctx,
		&orchestration.Config{Ingress: &rules, WarpRouting: warp, OriginDialerService: dialer}, nil, nil, &log)
	must(err)
	identity, err := client.NewConfig("2026.7.0", "linux_amd64", fixedFeatures{
		PostQuantum: opts.curves, DatagramVersion: features.DatagramV2,
		FeaturesList: []string{"allow_remote_config", "serialized_headers", "support_datagram_v2", "support_quic_eof"},
	})
	must(err)
	trust := map[connection.Protocol]*tls.Config{}
	for _, p := range []connection.Protocol{connection.HTTP2, connection.QUIC} {
		s := p.TLSSettings()
		trust[p] = &tls.Config{RootCAs: e.RootCAs(), ServerName: s.ServerName, NextProtos: s.NextProtos}
	}
	graceful := make(chan struct{})
	stop := sync.OnceFunc(func() { close(graceful) })
	s := &stock{orchestrator: orchestrator, drain: stop, kill: cancel, ended: make(chan struct{})}
	daemon := &supervisor.TunnelConfig{
		ClientConfig: identity, GracePeriod: opts.grace, EdgeAddrs: e.Addrs(), HAConnections: opts.connections,
		Log: &log, LogTransport: &log, Observer: observer(), Retries: 5, MaxEdgeAddrRetries: 8, NoPrechecks: true,
		NamedTunnel: &connection.TunnelProperties{Credentials: connection.Credentials{
			AccountTag: info.Account, TunnelSecret: info.Secret, TunnelID: info.ID,
		}},
		ProtocolSelector: fixedProtocol(opts.protocol), EdgeTLSConfigs: trust,
		OriginDNSService:    origins.NewStaticDNSResolverService(nil, origins.NewDNSDialer(), &log, origins.NewMetrics(prometheus.DefaultRegisterer)),
		OriginDialerService: dialer, RPCTimeout: 5 * time.Second,
		QUICConnectionLevelFlowControlLimit: 30 << 20, QUICStreamLevelFlowControlLimit: 6 << 20,
	}
	go func() {
		defer close(s.ended)
		// How it ends shows at the edge.
		_ = supervisor.StartTunnelDaemon(ctx, daemon, orchestrator, signal.New(make(chan struct{})), make(chan supervisor.ReconnectSignal, opts.connections), graceful)
	}()
	t.Cleanup(func() {
		cancel()
		select {
		case <-s.ended:
		case <-time.After(10 * time.Second):
			t.Error("cloudflared does not end")
		}
	})
	return s
}

// each runs a test over both protocols.
func each(t *testing.T, test func(t *testing.T, p connection.Protocol)) {
	for _, p := range []connection.Protocol{connection.HTTP2, connection.QUIC} {
		t.Run(p.String(), func(t *testing.T) { test(t, p) })
	}
}

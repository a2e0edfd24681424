package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/edgeward/edgeward/internal/crowdsec"
	"github.com/edgeward/edgeward/internal/daemon"
	"github.com/edgeward/edgeward/internal/lapi"
	"github.com/edgeward/edgeward/internal/reconcile"
	"github.com/edgeward/edgeward/tunnel"
	"github.com/edgeward/edgeward/tunnel/cloudflare"
	"github.com/edgeward/edgeward/tunnel/cloudflare/api"
)

// drainMargin is what the end may take beyond the wait for requests under way.
const drainMargin = 5 * time.Second

// firstPull is how long connectors wait for the first decisions before they
// register without any. It is waited for again with each configuration as long
// as LAPI has never answered, which costs nothing but that much delay.
const firstPull = 5 * time.Second

// stream is LAPI's decision stream as a task.
type stream struct{ *lapi.Stream }

func (s stream) String() string { return "decision stream" }

func (s stream) Run(ctx context.Context) error {
	s.Stream.Run(ctx)
	return nil
}

// restartOnly returns next with what only a start can change as it is, and says
// so where the file wants it otherwise.
func restartOnly(was, next tunnel.Config, log *slog.Logger) tunnel.Config {
	var kept []string
	keep := func(name string, same bool) {
		if !same {
			kept = append(kept, name)
		}
	}
	keep("lapi", was.LAPI == next.LAPI && was.HasLAPI() == next.HasLAPI())
	keep("listen", was.Listen == next.Listen)
	keep("socket", was.Socket == next.Socket)
	keep("stateDir", was.StateDir == next.StateDir)
	keep("logFormat", was.LogFormat == next.LogFormat)
	keep("drain", was.Drain == next.Drain) // the process was told how long it may take to end
	if len(kept) > 0 {
		log.Warn("some settings take effect at the next start", "keys", kept)
	}
	next.KeepLAPI(&was)
	next.Drain = was.Drain
	return next
}

// public is the role cloudflare: LAPI's stream goes into the gate, and the
// connectors bring requests to it. The gate comes first and waits for nobody;
// connectors and DNS follow it.
type public struct {
	gate       *tunnel.Gate
	connectors *connectors
	records    *records
}

func newPublic(c *tunnel.Config, log *slog.Logger) (*public, error) {
	gate, err := tunnel.New(*c, log)
	if err != nil {
		return nil, err
	}
	records := newRecords(c, log)
	return &public{gate, newConnectors(gate, records, c, log), records}, nil
}

// tasks are what runs: with LAPI, its stream and the report of usage too.
func (p *public) tasks(c *tunnel.Config, start time.Time, log *slog.Logger) ([]daemon.Task, error) {
	tasks := []daemon.Task{p.connectors, p.records}
	if !c.HasLAPI() {
		return tasks, nil
	}
	agent := crowdsec.Agent{Type: "crowdsec-edgeward-tunnel-bouncer", Version: tunnel.Version}
	from, err := crowdsec.New(c.LAPI, agent, log)
	if err != nil {
		return nil, err
	}
	decisions := from.Stream(tunnel.Scopes, p.gate.Sink(), log)
	decisions.Ended = p.gate.Pulled
	return append(tasks, stream{decisions}, from.Usage(start, p.gate.Totals)), nil
}

func (p *public) collector() prometheus.Collector {
	return p.gate.Collector(p.connectors.links, p.records.calls)
}

// enforce puts a configuration in force, the gate before all else. What the gate
// refuses goes to nobody: a host must not be led where there is no route for it.
func (p *public) enforce(c *tunnel.Config) error {
	if err := p.gate.Apply(*c); err != nil {
		return err
	}
	p.connectors.wishFor(c)
	return p.records.apply(c)
}

// connectors keeps one connector for each tunnel. It is a task that ends when
// all have drained.
type connectors struct {
	gate    *tunnel.Gate
	records *records
	memory  *cloudflare.Memory
	log     *slog.Logger

	news chan struct{} // there is something to do

	mu      sync.Mutex
	wish    *tunnel.Config     // the last one
	newer   context.CancelFunc // of what is done for an older one; nil for nothing
	trouble string             // why the last wish is not fulfilled
	said    string             // the trouble that was logged last
	tunnels map[string]*holder
	drain   time.Duration
	leaving sync.WaitGroup // connectors of tunnels that are no longer wished for
	ended   bool
}

// holder is the connector of one tunnel and what it should be.
type holder struct {
	connector *cloudflare.Connector
	wanted    int
	trouble   string // why it could not be made what it should be
	refused   bool   // the trouble is that the edge refuses the credentials
}

func newConnectors(gate *tunnel.Gate, records *records, c *tunnel.Config, log *slog.Logger) *connectors {
	all := &connectors{
		gate: gate, records: records, memory: cloudflare.NewMemory(c.StateDir, log), log: log,
		tunnels: map[string]*holder{}, news: make(chan struct{}, 1),
	}
	records.after = all.renew
	return all
}

func (c *connectors) String() string { return "connectors" }

// wishFor states what is wished and returns at once: to bring connectors into
// step takes calls of the API and connections to the edge, and the gate must not
// wait for them. The latest wish counts; what is under way for an older one ends.
func (c *connectors) wishFor(next *tunnel.Config) {
	c.mu.Lock()
	c.wish = next
	if c.newer != nil {
		c.newer()
	}
	c.mu.Unlock()
	c.wake()
}

func (c *connectors) wake() {
	select {
	case c.news <- struct{}{}:
	default:
	}
}

// The pauses before what went wrong is tried again.
const (
	firstAgain   = 5 * time.Second
	longestAgain = 5 * time.Minute
)

// follow brings the connectors into step with the last wish until ctx ends.
func (c *connectors) follow(ctx context.Context) {
	again := time.NewTimer(longestAgain)
	again.Stop() // until something goes wrong
	pause := firstAgain
	var last *tunnel.Config
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.news:
		case <-again.C:
		}
		turn, cancel := context.WithCancel(ctx)
		c.mu.Lock()
		wish := c.wish
		c.newer = cancel
		c.mu.Unlock()
		if wish == nil {
			cancel()
			continue
		}
		err := c.apply(turn, wish)
		outdated := turn.Err() != nil
		cancel()
		if outdated {
			continue // there is news, or this is the end
		}
		if wish != last || err == nil {
			pause = firstAgain
		}
		last = wish
		c.mu.Lock()
		if c.trouble = ""; err != nil {
			c.trouble = daemon.OneLine(err)
		}
		news := c.trouble != c.said
		c.said = c.trouble
		c.mu.Unlock()
		if err != nil {
			if news {
				c.log.Error("not all tunnels are as configured: what they had stays, and the rest is tried again", "component", "tunnel", "err", err)
			}
			if allRefused(err) {
				pause = longestAgain // the edge has said its last word; another token is news
			}
			again.Reset(pause)
			pause = min(2*pause, longestAgain)
		} else {
			again.Stop()
		}
	}
}

// allRefused reports whether nothing went wrong but that the edge refuses
// credentials.
func allRefused(err error) bool {
	if all, ok := err.(interface{ Unwrap() []error }); ok {
		return !slices.ContainsFunc(all.Unwrap(), func(err error) bool { return !errors.Is(err, cloudflare.ErrRefused) })
	}
	return false
}

// repeat has what is wrong logged again, if it still is at the next turn: somebody
// has asked.
func (c *connectors) repeat() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.said = ""
}

// troubled says why the last wish is not fulfilled; empty if it is.
func (c *connectors) troubled() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.trouble
}

// apply brings the connectors into step with a configuration. What one of them
// lacks does not stop the others, and leaves its connections as they were.
func (c *connectors) apply(ctx context.Context, next *tunnel.Config) error {
	roots, err := next.Edge.Roots()
	if err != nil {
		return err
	}
	// At the start visitors wait a moment for decisions, or for the process
	// before this one; only then is there no time to lose.
	timeout := time.NewTimer(firstPull)
	defer timeout.Stop()
	select {
	case <-c.gate.Known():
	case <-timeout.C:
	case <-ctx.Done():
		return nil
	}
	c.mu.Lock()
	if c.ended {
		c.mu.Unlock()
		return nil
	}
	drain := next.Drain.LameDuck + next.Drain.Grace
	c.drain = drain
	for name, h := range c.tunnels {
		if !slices.ContainsFunc(next.Tunnels, func(t tunnel.TunnelConfig) bool { return t.Name == name }) {
			delete(c.tunnels, name)
			c.leaving.Go(func() { c.end(h.connector, drain) })
		}
	}
	errs := make([]error, len(next.Tunnels))
	var turns sync.WaitGroup
	for i, t := range next.Tunnels {
		h := c.tunnels[t.Name]
		if h == nil {
			h = &holder{connector: cloudflare.New(cloudflare.Options{
				Name: t.Name, Version: api.Product + tunnel.Version, Log: c.log, Handler: c.gate.For(t.Name), Memory: c.memory,
			})}
			c.tunnels[t.Name] = h
		}
		h.wanted = t.Connections
		turns.Go(func() { errs[i] = c.connect(ctx, h, next, t, roots) })
	}
	c.mu.Unlock()
	turns.Wait()
	return errors.Join(errs...)
}

// renew tries again the tunnels whose token comes from the API and that have
// none, or one that the edge refuses: nobody can watch a token that is rotated
// there.
func (c *connectors) renew() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.wish == nil {
		return
	}
	for _, t := range c.wish.Tunnels {
		h := c.tunnels[t.Name]
		if h != nil && t.TokenFile == "" && t.CredentialsFile == "" && (h.trouble != "" || h.connector.Status().Refused != "") {
			c.wake()
			return
		}
	}
}

// connect brings one connector into step.
func (c *connectors) connect(ctx context.Context, h *holder, next *tunnel.Config, t tunnel.TunnelConfig, roots *x509.CertPool) error {
	credentials, err := c.credentials(ctx, t)
	if err == nil {
		err = h.connector.Apply(ctx, credentials, cloudflare.Settings{
			Protocol: cloudflare.Protocol(t.Protocol), Trailers: next.NeedsTrailers(t.Name), Connections: t.Connections,
			Edge: next.Edge.Addresses, Region: next.Edge.Region, RootCAs: roots,
			LameDuck: next.Drain.LameDuck, Grace: next.Drain.Grace,
		})
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	h.refused = errors.Is(err, cloudflare.ErrRefused)
	if h.trouble = ""; err != nil {
		h.trouble = daemon.OneLine(err)
		err = fmt.Errorf("tunnel %s: %w", t.Name, err)
	}
	return err
}

// credentials reads a tunnel's: from the file that is named, or else from the
// API, by the tunnel's name.
func (c *connectors) credentials(ctx context.Context, t tunnel.TunnelConfig) (cloudflare.Credentials, error) {
	if t.CredentialsFile+t.TokenFile != "" {
		return fromFile(t)
	}
	token, err := c.records.keeper.Token(ctx, t.Name)
	if err != nil {
		return cloudflare.Credentials{}, err
	}
	return cloudflare.ParseToken([]byte(token))
}

// fromFile reads the credentials of a tunnel from the file that is named.
func fromFile(t tunnel.TunnelConfig) (cloudflare.Credentials, error) {
	key, file, parse := "tokenFile", t.TokenFile, cloudflare.ParseToken
	if t.CredentialsFile != "" {
		key, file, parse = "credentialsFile", t.CredentialsFile, cloudflare.ParseCredentials
	}
	secret, err := file.Read()
	if err != nil {
		return cloudflare.Credentials{}, fmt.Errorf("read %s: %w", key, err)
	}
	credentials, err := parse([]byte(secret.Reveal()))
	if err != nil {
		return cloudflare.Credentials{}, fmt.Errorf("read %s: %s: %w", key, file, err)
	}
	return credentials, nil
}

// Run follows the wishes until the end and then drains all tunnels side by side.
func (c *connectors) Run(ctx context.Context) error {
	c.follow(ctx)
	c.mu.Lock()
	c.ended = true
	all, drain := c.tunnels, c.drain
	c.mu.Unlock()
	var ends sync.WaitGroup
	for _, h := range all {
		ends.Go(func() { c.end(h.connector, drain) })
	}
	ends.Wait()
	c.leaving.Wait()
	return nil
}

func (c *connectors) end(connector *cloudflare.Connector, drain time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), drain+drainMargin/2)
	defer cancel()
	if err := connector.Drain(ctx); err != nil {
		c.log.Warn("requests were cut at the end", "component", "tunnel", "err", err)
	}
}

// links tells how the connectors stand, in the order of their names.
func (c *connectors) links() []tunnel.Link {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := []tunnel.Link{}
	for name, h := range c.tunnels {
		s := h.connector.Status()
		l := tunnel.Link{
			Tunnel: name, Protocol: string(s.Protocol), Wanted: h.wanted, Refused: s.Refused, Trouble: h.trouble,
			Drains: s.Totals.Drained, Registrations: s.Totals.Registered, Lost: s.Totals.Lost, Recycled: s.Totals.Recycled,
			Connections: []tunnel.Connection{},
		}
		if h.refused { // while connections serve that were made with those before
			l.Refused, l.Trouble = cmp.Or(l.Refused, h.trouble), ""
		}
		if s.Tunnel != [16]byte{} {
			l.ID = s.Tunnel.String()
		}
		for _, conn := range s.Connections {
			l.InFlight += conn.InFlight
			one := tunnel.Connection{
				Index: conn.Index, State: string(conn.State), Registered: conn.State == cloudflare.Registered, Protocol: string(conn.Protocol),
				Location: conn.Location, Since: conn.Since, KeyExchange: conn.KeyExchange, Canary: conn.Canary, Error: conn.Error,
			}
			if conn.Address != (netip.AddrPort{}) {
				one.Address = conn.Address.String()
			}
			l.Connections = append(l.Connections, one)
		}
		out = append(out, l)
	}
	slices.SortFunc(out, func(a, b tunnel.Link) int { return cmp.Compare(a.Tunnel, b.Tunnel) })
	return out
}

// records keeps tunnels and DNS records through Cloudflare's API, where the
// configuration has a section for it. It is a task.
type records struct {
	keeper *api.Keeper
	loop   *reconcile.Loop
	after  func() // each good turn; set before Run

	mu      sync.Mutex
	enabled bool
}

func newRecords(c *tunnel.Config, log *slog.Logger) *records {
	// It is told what to do when the configuration is applied, and not before.
	r := &records{keeper: api.New(api.Settings{}, api.Product+tunnel.Version, log.With("component", "cloudflare"))}
	r.loop = reconcile.New(reconcile.Config{Name: "cloudflare", Turn: r.turn, Interval: c.Cloudflare.Interval, Limit: 5 * time.Minute, Retry: 5 * time.Second, LongestRetry: time.Minute, Log: log})
	return r
}

func (r *records) String() string { return "cloudflare" }

// Run keeps the records in step until ctx ends. Nothing is removed then.
func (r *records) Run(ctx context.Context) error { return r.loop.Run(ctx) }

func (r *records) turn(ctx context.Context) (time.Time, error) {
	if !r.on() {
		return time.Time{}, nil
	}
	next, err := r.keeper.Turn(ctx)
	if err != nil {
		return next, err
	}
	r.after()
	return next, nil
}

func (r *records) on() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.enabled
}

func (r *records) apply(c *tunnel.Config) error {
	settings, err := api.From(c)
	if err != nil {
		return err
	}
	r.mu.Lock()
	r.enabled = c.Cloudflare.Enabled()
	r.mu.Unlock()
	r.keeper.Update(settings)
	r.loop.Trigger()
	return nil
}

func (r *records) calls() tunnel.Calls {
	usage := r.keeper.Usage()
	out := tunnel.Calls{Made: map[tunnel.Call]uint64{}, Left: usage.Left}
	for call, n := range usage.Calls {
		out.Made[tunnel.Call{What: call.What, Outcome: call.Outcome}] = n
	}
	return out
}

package gateway

import (
	"net/netip"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/edgeward/edgeward/internal/nft"
	"github.com/edgeward/edgeward/tunnel/wireguard"
	"github.com/edgeward/edgeward/tunnel/wireguard/names"
)

// Metrics that dashboards hang on. A peer is named as it is declared; no label is
// a key, an endpoint or an address.
var (
	descUp         = desc("edgeward_vpn_up", "1 if rules, device and resolver were in step when they were last brought there.")
	descMode       = desc("edgeward_vpn_mode", "1 for who moves the packets: the kernel, or this process.", "mode")
	descPeers      = desc("edgeward_vpn_peers", "Declared peers.", "state")
	descExpiring   = desc("edgeward_vpn_peers_expiring", "Live peers that expire within that time.", "within")
	descExpires    = desc("edgeward_vpn_peer_expiry_timestamp_seconds", "When a peer expires.", "peer")
	descHandshake  = desc("edgeward_vpn_peer_handshake_timestamp_seconds", "When a peer last completed a handshake.", "peer")
	descPeerUp     = desc("edgeward_vpn_peer_up", "1 if a peer completed a handshake within the last three minutes.", "peer")
	descReceived   = desc("edgeward_vpn_peer_received_bytes_total", "Bytes that came from a peer.", "peer")
	descSent       = desc("edgeward_vpn_peer_sent_bytes_total", "Bytes that went to a peer.", "peer")
	descGranted    = desc("edgeward_vpn_peer_granted_packets_total", "First packets of connections of a peer that were granted.", "peer")
	descDenied     = desc("edgeward_vpn_peer_denied_packets_total", "Packets of a peer that were refused.", "peer")
	descHits       = desc("edgeward_vpn_service_packets_total", "Packets by peer, service and verdict, as far as the kernel keeps them apart; service none is what no service is at.", "peer", "service", "verdict")
	descPackets    = desc("edgeward_vpn_packets_total", "Packets by what the access rules made of them.", "verdict")
	descTurns      = desc("edgeward_vpn_reconciles_total", "Times that everything was brought into step, by how that ended.", "result")
	descLastGood   = desc("edgeward_vpn_reconciled_timestamp_seconds", "When everything was last in step.")
	descTook       = desc("edgeward_vpn_reconcile_seconds", "What the last turn took.")
	descQuestions  = desc("edgeward_vpn_names_questions_total", "Questions to the resolver, by how they fared.", "outcome")
	descUpstreams  = desc("edgeward_vpn_names_upstreams_down", "Upstream resolvers that did not answer when they were last asked.")
	descUnanswered = desc("edgeward_vpn_names_missing", "1 if the resolver does not answer at all of its addresses.")
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

// tally turns the kernel's counts, which begin anew now and then, into ones that
// only grow. It is guarded by the gateway's mu.
type tally struct {
	addrs map[netip.Addr]nft.SourceCount // as last seen
	rows  map[row]uint64                 // as last seen
	peers map[wireguard.Name]*hits
	hits  map[hit]uint64
	// before are refusals that an earlier process told of.
	before map[row]bool
}

// hits are packets of a peer.
type hits struct{ granted, denied uint64 }

// hit is a peer at a service.
type hit struct {
	peer, service wireguard.Name
	verdict       string
}

// row tells attempts apart.
type row struct {
	from, to netip.Addr
	proto    uint8
	port     uint16
	verdict  string
}

func newTally() tally {
	return tally{map[netip.Addr]nft.SourceCount{}, map[row]uint64{}, map[wireguard.Name]*hits{}, map[hit]uint64{}, nil}
}

// grown is by how much a count that may begin anew has grown.
func grown(was, is uint64) uint64 {
	if is < was {
		return is
	}
	return is - was
}

// mostSaid is how many denied attempts are written to the log at once.
const mostSaid = 20

// readings are what the rules counted at one time; a part that could not be read is
// nil.
type readings struct {
	sources         []nft.SourceCount
	granted, denied []nft.Attempt
}

func read(r rules) (out readings) {
	var err error
	if out.sources, err = r.Sources(); err != nil {
		out.sources = nil
	} else if out.sources == nil {
		out.sources = []nft.SourceCount{}
	}
	all := func(attempts func() ([]nft.Attempt, error)) []nft.Attempt {
		rows, err := attempts()
		if err != nil {
			return nil
		}
		return append([]nft.Attempt{}, rows...)
	}
	out.granted, out.denied = all(r.Granted), all(r.Denied)
	return out
}

// refusals are the attempts that the kernel remembers from before this process, and
// that were told then.
func refusals(r rules) map[row]bool {
	rows, err := r.Denied()
	if err != nil {
		return nil
	}
	out := make(map[row]bool, len(rows))
	for _, a := range rows {
		out[row{a.From, a.To, a.Proto, a.Port, "denied"}] = true
	}
	return out
}

// count brings the tally up to date, writes a line for each attempt that was
// refused for the first time, and returns the counts by peer. What cannot be read
// is as it was.
func (g *Gateway) count() map[wireguard.Name]hits {
	g.counting.Lock() // what was read first is counted first
	defer g.counting.Unlock()
	g.mu.Lock()
	open, have, names := g.rules, g.have, g.names
	g.mu.Unlock()
	var now readings
	if open != nil {
		now = read(open) // thousands of rows, for which nobody else waits
	}
	view := viewOf(have, names)
	g.mu.Lock()
	defer g.mu.Unlock()
	t := &g.tally
	if now.sources != nil {
		seen := make(map[netip.Addr]nft.SourceCount, len(now.sources))
		for _, c := range now.sources {
			was := t.addrs[c.Addr]
			seen[c.Addr] = c
			if name := view.peer(c.Addr); name != "" {
				p := t.peers[name]
				if p == nil {
					p = &hits{}
					t.peers[name] = p
				}
				p.granted += grown(was.Granted, c.Granted)
				p.denied += grown(was.Denied, c.Denied)
			}
		}
		t.addrs = seen
	}
	g.attempts(view, now)
	// Whoever is not declared any more is no label.
	declared := map[wireguard.Name]bool{}
	for _, p := range g.have.Peers {
		declared[p.Name] = true
	}
	for _, p := range g.have.Idle {
		declared[p.Name] = true
	}
	out := make(map[wireguard.Name]hits, len(t.peers))
	for name, p := range t.peers {
		if !declared[name] {
			delete(t.peers, name)
			continue
		}
		out[name] = *p
	}
	for h := range t.hits {
		if !declared[h.peer] {
			delete(t.hits, h)
		}
	}
	return out
}

// attempts is the part of count that knows services.
func (g *Gateway) attempts(view view, now readings) {
	t := &g.tally
	seen := make(map[row]uint64, len(t.rows))
	said := 0
	for verdict, rows := range map[string][]nft.Attempt{"granted": now.granted, "denied": now.denied} {
		if rows == nil {
			for r, n := range t.rows {
				if r.verdict == verdict {
					seen[r] = n
				}
			}
			continue
		}
		for _, a := range rows {
			r := row{a.From, a.To, a.Proto, a.Port, verdict}
			was, known := t.rows[r]
			seen[r] = a.Packets
			attempt := view.attempt(a, g.now())
			if attempt.Peer == "" {
				continue
			}
			service := attempt.Service
			if service == "" {
				service = "none"
			}
			t.hits[hit{attempt.Peer, service, verdict}] += grown(was, a.Packets)
			if verdict != "denied" || known || t.before[r] {
				continue
			}
			if said++; said <= mostSaid {
				g.log.Info("access denied", "peer", attempt.Peer, "to", attempt.To, "protocol", attempt.Protocol, "port", attempt.Port, "service", attempt.Service)
			}
		}
	}
	if said > mostSaid {
		g.log.Info("access denied to more than is told one by one", "attempts", said-mostSaid)
	}
	for r := range t.before { // what the kernel forgot is new when it comes again
		if _, there := seen[r]; !there && now.denied != nil {
			delete(t.before, r)
		}
	}
	t.rows = seen
}

// questions are counts by outcome.
func questions(c names.Counts) map[string]uint64 {
	return map[string]uint64{
		"declared": c.Declared, "cached": c.Cached, "forwarded": c.Forwarded, "failed": c.Failed, "refused": c.Refused, "limited": c.Limited,
	}
}

// Collector returns what /metrics shows of the VPN.
func (g *Gateway) Collector() prometheus.Collector { return collector{g} }

type collector struct{ g *Gateway }

// Describe sends the descriptions that never change.
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		descUp, descMode, descPeers, descExpiring, descExpires, descHandshake, descPeerUp, descReceived, descSent, descGranted, descDenied,
		descHits, descPackets, descTurns, descLastGood, descTook, descQuestions, descUpstreams, descUnanswered,
	} {
		ch <- d
	}
}

// Collect sends the values.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	g := c.g
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	count := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	truth := map[bool]float64{true: 1}

	s, packets := g.status()
	gauge(descUp, truth[s.Problem == "" && s.Mode != ""])
	for _, mode := range []wireguard.Mode{wireguard.Kernel, wireguard.Userspace} {
		gauge(descMode, truth[s.Mode == mode], string(mode))
	}
	states := map[wireguard.State]int{wireguard.Live: 0, wireguard.Disabled: 0, wireguard.Expired: 0, wireguard.Unready: 0}
	ending := make([]int, len(warnings))
	now := g.now()
	for _, p := range s.Peers {
		states[p.State]++
		name := string(p.Name)
		if !p.Expires.IsZero() {
			gauge(descExpires, float64(p.Expires.Unix()), name)
		}
		if p.State == wireguard.Live {
			for i, within := range warnings {
				if !p.Expires.IsZero() && p.Expires.Sub(now) <= within {
					ending[i]++
				}
			}
			gauge(descPeerUp, truth[now.Sub(p.Handshake) < upFor], name)
			if !p.Handshake.IsZero() {
				gauge(descHandshake, float64(p.Handshake.UnixMilli())/1000, name)
			}
			count(descReceived, p.Received, name)
			count(descSent, p.Sent, name)
		}
		count(descGranted, packets[p.Name].granted, name)
		count(descDenied, packets[p.Name].denied, name)
	}
	for state, n := range states {
		gauge(descPeers, float64(n), string(state))
	}
	for i, within := range warnings {
		gauge(descExpiring, float64(ending[i]), days(within))
	}
	g.mu.Lock()
	hits := make(map[hit]uint64, len(g.tally.hits))
	for h, n := range g.tally.hits {
		hits[h] = n
	}
	rules := g.rules
	g.mu.Unlock()
	for h, n := range hits {
		count(descHits, n, string(h.peer), string(h.service), h.verdict)
	}
	if rules != nil {
		if total, err := rules.Counters(); err != nil {
			ch <- prometheus.NewInvalidMetric(descPackets, err)
		} else {
			for verdict, n := range map[string]uint64{"granted": total.Granted, "denied": total.Denied, "revoked": total.Revoked, "unasked": total.Unasked, "forged": total.Forged} {
				count(descPackets, n, verdict)
			}
		}
	}

	loop := g.loop.State()
	count(descTurns, loop.Turns-loop.Failures, "ok")
	count(descTurns, loop.Failures, "failed")
	gauge(descTook, loop.LastTook.Seconds())
	if !loop.LastGood.IsZero() {
		gauge(descLastGood, float64(loop.LastGood.UnixMilli())/1000)
	}
	resolver := g.resolver.Status()
	for outcome, n := range questions(resolver.Counts) {
		count(descQuestions, n, outcome)
	}
	gauge(descUpstreams, float64(len(resolver.Down)))
	gauge(descUnanswered, truth[resolver.Missing != nil])
}

// days is a time as a label: 7d.
func days(d time.Duration) string { return strconv.Itoa(int(d/(24*time.Hour))) + "d" }

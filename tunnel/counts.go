package tunnel

import (
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/edgeward/edgeward/internal/crowdsec"
	"github.com/edgeward/edgeward/internal/decision"
)

// counts is what the gate has seen and done.
type counts struct {
	processed4, processed6 atomic.Uint64

	mu       sync.RWMutex
	requests map[string]*classes // by host
	verdicts map[verdictKey]*atomic.Uint64
	badly    map[string]*atomic.Uint64 // malformed requests, by reason
	unserved map[[2]string]*atomic.Uint64
}

// classes counts requests by the first digit of their status; 0 are those that
// ended without one.
type classes [6]atomic.Uint64

type verdictKey struct {
	remediation, origin, ipType, reason string
	observed                            bool
}

func newCounts() *counts {
	return &counts{
		requests: map[string]*classes{noHost: new(classes)}, verdicts: map[verdictKey]*atomic.Uint64{},
		badly: map[string]*atomic.Uint64{}, unserved: map[[2]string]*atomic.Uint64{},
	}
}

// name makes room for hosts. Hosts that are gone keep their counts: a counter
// that disappears is a gap in every graph, and there are only as many as were
// ever configured.
func (c *counts) name(hosts []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, h := range hosts {
		if c.requests[h] == nil {
			c.requests[h] = new(classes)
		}
	}
}

func (c *counts) request(host string, status int) {
	c.mu.RLock()
	n := c.requests[host]
	c.mu.RUnlock()
	if n == nil {
		return
	}
	n[min(status/100, 5)].Add(1)
}

func (c *counts) processed(addr netip.Addr) {
	if addr.Is4() {
		c.processed4.Add(1)
	} else {
		c.processed6.Add(1)
	}
}

func (c *counts) refused(v decision.Verdict, addr netip.Addr, reason string, observed bool) {
	remediation := ""
	if v.Remediation != decision.Allow {
		remediation = v.Remediation.Name()
	}
	add(c, c.verdicts, verdictKey{remediation, originOf(v.Origin, v.Scenario), ipType(addr), reason, observed})
}

func (c *counts) malformed(reason string)        { add(c, c.badly, reason) }
func (c *counts) unanswered(host, reason string) { add(c, c.unserved, [2]string{host, reason}) }

func add[K comparable](c *counts, in map[K]*atomic.Uint64, key K) {
	c.mu.RLock()
	n := in[key]
	c.mu.RUnlock()
	if n == nil {
		c.mu.Lock()
		if n = in[key]; n == nil {
			n = new(atomic.Uint64)
			in[key] = n
		}
		c.mu.Unlock()
	}
	n.Add(1)
}

// Totals are the usage metrics for LAPI: requests that were refused, by the
// origin of the decision, and all that were looked at.
func (g *Gate) Totals() (crowdsec.Totals, error) {
	out := crowdsec.Totals{
		{Name: crowdsec.Processed, Unit: crowdsec.Request, IPType: crowdsec.IPv4}: g.counts.processed4.Load(),
		{Name: crowdsec.Processed, Unit: crowdsec.Request, IPType: crowdsec.IPv6}: g.counts.processed6.Load(),
	}
	g.counts.mu.RLock()
	for k, n := range g.counts.verdicts {
		if !k.observed && k.remediation != "" {
			out[crowdsec.Series{Name: crowdsec.Dropped, Unit: crowdsec.Request, Origin: k.origin, Remediation: k.remediation, IPType: k.ipType}] += n.Load()
		}
	}
	g.counts.mu.RUnlock()
	for _, d := range g.feed.tally() {
		out[crowdsec.Series{Name: crowdsec.ActiveDecisions, Unit: crowdsec.IP, Origin: d.Origin, Remediation: d.Remediation, IPType: d.IPType}] += uint64(d.Count)
	}
	return out, nil
}

// Metrics that dashboards hang on. No label ever is an address.
var (
	descRequests  = desc("edgeward_tunnel_requests_total", "Requests that came through a tunnel, by host as configured and class of the answer; none is a host without a route, lost an answer that never was.", "host", "code")
	descProcessed = desc("edgeward_processed_requests_total", "Requests whose visitor was looked up among the decisions.", "ip_type")
	descRefused   = desc("edgeward_refused_requests_total", "Requests that were refused, by the decision's origin and remediation, or because nothing could be known.", "origin", "remediation", "ip_type", "reason")
	descObserved  = desc("edgeward_observed_requests_total", "Requests that would have been refused if the mode were not observe.", "origin", "remediation", "ip_type", "reason")
	descMalformed = desc("edgeward_malformed_requests_total", "Requests refused because they are not as the edge sends them.", "reason")
	descUnserved  = desc("edgeward_origin_failures_total", "Requests that an origin service did not answer, or did not get because too many were under way.", "host", "reason")
	descDecisions = desc("edgeward_decisions", "Live decisions on addresses that count here.", "origin", "remediation", "ip_type")
	descPulls     = desc("edgeward_pulls_total", "Answers of LAPI that came in whole.", "kind")
	descFailed    = desc("edgeward_failed_pulls_total", "Pulls of LAPI's decisions that brought no whole answer.")
	descDoubts    = desc("edgeward_doubted_pulls_total", "Full pulls that held implausibly few decisions, by which nothing was deleted.")
	descPulled    = desc("edgeward_last_pull_timestamp_seconds", "When an answer of LAPI last came in whole.")
	descSkipped   = desc("edgeward_decisions_skipped_total", "Decisions of LAPI that made no sense.", "reason")
	descMode      = desc("edgeward_mode", "1 for the mode that is on.", "mode")
	descLinks     = desc("edgeward_tunnel_connections", "Connections to the edge that are registered, by where they lead.", "tunnel", "protocol", "location")
	descUp        = desc("edgeward_tunnel_connections_registered", "Connections to the edge that are registered.", "tunnel")
	descWanted    = desc("edgeward_tunnel_connections_wanted", "Connections to the edge that there should be.", "tunnel")
	descInFlight  = desc("edgeward_tunnel_requests_in_flight", "Requests under way.", "tunnel")
	descRefusedBy = desc("edgeward_tunnel_credentials_refused", "1 if the edge refuses the tunnel's credentials for good.", "tunnel")
	descDrains    = desc("edgeward_tunnel_drains_total", "Connections that were let go in good order.", "tunnel")
	descGained    = desc("edgeward_tunnel_registrations_total", "Connections that the edge registered.", "tunnel")
	descLost      = desc("edgeward_tunnel_connections_lost_total", "Registered connections that ended by themselves.", "tunnel")
	descRecycled  = desc("edgeward_tunnel_connections_recycled_total", "Connections that were given up because nothing came through them; they count as lost.", "tunnel")
	descCalls     = desc("edgeward_cloudflare_calls_total", "Calls of Cloudflare's API.", "call", "outcome")
	descQuota     = desc("edgeward_cloudflare_quota_left", "Calls that Cloudflare last said may still be made in the present five minutes.")
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

// Collector returns what /metrics shows: of the gate, and of what links and
// calls, either of which may be nil, say of the connectors and the API.
func (g *Gate) Collector(links func() []Link, calls func() Calls) prometheus.Collector {
	return collector{g, links, calls}
}

type collector struct {
	g     *Gate
	links func() []Link
	calls func() Calls
}

// Describe sends the descriptions that never change.
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		descRequests, descProcessed, descRefused, descObserved, descMalformed, descUnserved, descDecisions, descPulls, descFailed, descDoubts,
		descPulled, descSkipped, descMode, descLinks, descUp, descWanted, descInFlight, descRefusedBy, descDrains, descGained, descLost, descRecycled, descCalls, descQuota,
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

	n := g.counts
	count(descProcessed, n.processed4.Load(), crowdsec.IPv4)
	count(descProcessed, n.processed6.Load(), crowdsec.IPv6)
	n.mu.RLock()
	for host, by := range n.requests {
		for class := range by {
			count(descRequests, by[class].Load(), host, [...]string{"lost", "1xx", "2xx", "3xx", "4xx", "5xx"}[class])
		}
	}
	for k, v := range n.verdicts {
		d := descRefused
		if k.observed {
			d = descObserved
		}
		count(d, v.Load(), k.origin, k.remediation, k.ipType, k.reason)
	}
	for reason, v := range n.badly {
		count(descMalformed, v.Load(), reason)
	}
	for k, v := range n.unserved {
		count(descUnserved, v.Load(), k[0], k[1])
	}
	n.mu.RUnlock()
	for _, d := range g.feed.tally() {
		gauge(descDecisions, float64(d.Count), d.Origin, d.Remediation, d.IPType)
	}
	told := g.feed.knows()
	count(descPulls, told.Fulls, "full")
	count(descPulls, told.Pulls-told.Fulls, "delta")
	count(descFailed, told.Failures)
	count(descDoubts, told.Doubts)
	if !told.Last.IsZero() {
		gauge(descPulled, float64(g.clock.shown(told.Last).UnixMilli())/1000)
	}
	for reason, v := range told.Skipped {
		count(descSkipped, v, reason)
	}
	for _, m := range []Mode{Enforce, Observe} {
		gauge(descMode, truth[g.setup.Load().config.Mode == m], string(m))
	}
	if c.links != nil {
		for _, l := range c.links() {
			gauge(descWanted, float64(l.Wanted), l.Tunnel)
			gauge(descInFlight, float64(l.InFlight), l.Tunnel)
			gauge(descRefusedBy, truth[l.Refused != ""], l.Tunnel)
			count(descDrains, l.Drains, l.Tunnel)
			count(descGained, l.Registrations, l.Tunnel)
			count(descLost, l.Lost, l.Tunnel)
			count(descRecycled, l.Recycled, l.Tunnel)
			type place struct{ protocol, location string }
			at, up := map[place]int{}, 0
			for _, conn := range l.Connections {
				if conn.Registered {
					at[place{conn.Protocol, conn.Location}]++
					up++
				}
			}
			gauge(descUp, float64(up), l.Tunnel)
			for p, n := range at {
				gauge(descLinks, float64(n), l.Tunnel, p.protocol, p.location)
			}
		}
	}
	if c.calls != nil {
		calls := c.calls()
		for k, v := range calls.Made {
			count(descCalls, v, k.What, k.Outcome)
		}
		if calls.Left >= 0 {
			gauge(descQuota, float64(calls.Left))
		}
	}
}

package bouncer

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/edgeward/edgeward/internal/nft"
)

// Metrics that dashboards hang on. No label ever is an address.
var (
	byOrigin = []string{"origin", "remediation", "ip_type"}

	descDecisions  = desc("edgeward_decisions", "Live decisions on addresses.", "origin", "remediation", "ip_type", "enforced")
	descDropped    = desc("edgeward_dropped_packets_total", "Packets of banned addresses that were dropped.", byOrigin...)
	descDroppedB   = desc("edgeward_dropped_bytes_total", "Bytes of banned addresses that were dropped.", byOrigin...)
	descObserved   = desc("edgeward_observed_packets_total", "Packets that would have been dropped if the mode were not observe.", byOrigin...)
	descObservedB  = desc("edgeward_observed_bytes_total", "Bytes that would have been dropped if the mode were not observe.", byOrigin...)
	descSeen       = desc("edgeward_processed_packets_total", "Packets that were looked at.", "ip_type")
	descSeenB      = desc("edgeward_processed_bytes_total", "Bytes that were looked at.", "ip_type")
	descProtected  = desc("edgeward_protected_packets_total", "Packets of protected addresses that a ban or a lock would have stopped.", "ip_type")
	descWaived     = desc("edgeward_waived_packets_total", "Packets that a ban or a lock would have stopped, but for an allow, an unban or a pause.", "ip_type")
	descLocked     = desc("edgeward_locked_packets_total", "Packets to locked ports from sources that may not use them.", "lock", "ip_type")
	descStray      = desc("edgeward_unclassified_packets_total", "Packets of banned addresses of no known class, dropped too.", "ip_type")
	descResumed    = desc("edgeward_resumed_packets_total", "Packets of this node to banned addresses, dropped as they would resume a connection that a ban ended.", "ip_type")
	descElements   = desc("edgeward_kernel_elements", "Addresses and ranges that the kernel holds, some of which may have just timed out.", "set")
	descIntact     = desc("edgeward_kernel_intact", "1 if the kernel held all that was written when it was last looked at.")
	descLooked     = desc("edgeward_kernel_verified_timestamp_seconds", "When the kernel was last looked at.")
	descWrites     = desc("edgeward_kernel_transactions_total", "Writes to the kernel: install replaces everything, update changes some.", "kind")
	descFailures   = desc("edgeward_kernel_failures_total", "Writes to the kernel, or looks at it, that failed.")
	descRepairs    = desc("edgeward_repairs_total", "Times that everything was installed again because the kernel did not hold it.")
	descMeddling   = desc("edgeward_interference_total", "Times that the kernel did not hold what was written.")
	descPulls      = desc("edgeward_pulls_total", "Answers of LAPI that came in whole.", "kind")
	descFailed     = desc("edgeward_failed_pulls_total", "Pulls of LAPI's decisions that brought no whole answer.")
	descDoubts     = desc("edgeward_doubted_pulls_total", "Full pulls that held implausibly few decisions, by which nothing was deleted.")
	descPulled     = desc("edgeward_last_pull_timestamp_seconds", "When an answer of LAPI last came in whole.")
	descSkipped    = desc("edgeward_decisions_skipped_total", "Decisions of LAPI that made no sense.", "reason")
	descCovered    = desc("edgeward_covered_decisions", "Decisions that cover protected addresses, up to 100.")
	descBypasses   = desc("edgeward_bypasses", "Things on this node that may carry packets past the bans.", "kind")
	descMode       = desc("edgeward_mode", "1 for the mode that is on.", "mode")
	descOrders     = desc("edgeward_orders", "Orders of the operator in force.", "order")
	descStoodDown  = desc("edgeward_stood_down", "1 if cleanup was asked for, and nothing is enforced until the agent is restarted.")
	descList       = desc("edgeward_list_entries", "Addresses and ranges that a list holds.", "list")
	descListBad    = desc("edgeward_list_unreadable_lines", "Lines of a list, as it was last read, that are neither an address nor a range.", "list")
	descListRead   = desc("edgeward_list_read_timestamp_seconds", "When a list was last read whole.", "list")
	descListStale  = desc("edgeward_list_stale", "1 where a list cannot be used as it is and counts as it was.", "list")
	descAuth       = desc("edgeward_auth_requests_total", "Requests that proxies asked about, by what they were told.", "verdict")
	descRefused    = desc("edgeward_auth_refused_total", "Requests that proxies were told to refuse.", byOrigin...)
	descWouldbe    = desc("edgeward_auth_observed_total", "Requests that proxies would have been told to refuse if the mode were not observe.", byOrigin...)
	descLastChange = desc("edgeward_kernel_last_write_seconds", "What the last write to the kernel took.")
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

// Collector returns what /metrics shows of b. A scrape costs the same however
// many decisions there are, but for counting them, milliseconds at a million.
func (b *Bouncer) Collector() prometheus.Collector { return collector{b} }

type collector struct{ b *Bouncer }

// Describe sends the descriptions that never change.
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		descDecisions, descDropped, descDroppedB, descObserved, descObservedB, descSeen, descSeenB, descProtected,
		descLocked, descStray, descResumed, descElements, descIntact, descLooked, descWrites, descFailures, descRepairs, descMeddling,
		descPulls, descFailed, descDoubts, descPulled, descSkipped, descCovered, descBypasses, descMode, descLastChange,
		descWaived, descOrders, descStoodDown,
		descList, descListBad, descListRead, descListStale, descAuth, descRefused, descWouldbe,
	} {
		ch <- d
	}
}

// Collect sends the values.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	b := c.b
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	count := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	stamp := func(d *prometheus.Desc, t time.Time, labels ...string) {
		if !t.IsZero() {
			gauge(d, float64(t.UnixMilli())/1000, labels...)
		}
	}
	truth := map[bool]float64{true: 1}

	for _, d := range b.tally() {
		enforced := "false"
		if d.Enforced {
			enforced = "true"
		}
		gauge(descDecisions, float64(d.Count), d.Origin, d.Remediation, d.IPType, enforced)
	}
	counters, err := b.kernel.Counters()
	if err != nil {
		ch <- prometheus.NewInvalidMetric(descDropped, err)
	}
	packets, bytes := descDropped, descDroppedB
	if b.config.Mode == Observe {
		packets, bytes = descObserved, descObservedB
	}
	for _, n := range counters {
		family := ipType(n.IPv6)
		switch n.Kind {
		case nft.Banned:
			remediation, origin := splitClass(n.Name)
			count(packets, n.Packets, origin, remediation, family)
			count(bytes, n.Bytes, origin, remediation, family)
		case nft.Seen:
			count(descSeen, n.Packets, family)
			count(descSeenB, n.Bytes, family)
		case nft.Protected:
			count(descProtected, n.Packets, family)
		case nft.Waived:
			count(descWaived, n.Packets, family)
		case nft.Locked:
			count(descLocked, n.Packets, n.Name, family)
		case nft.Unclassified:
			count(descStray, n.Packets, family)
		case nft.Resumed:
			count(descResumed, n.Packets, family)
		}
	}

	r := b.enforcer.stands()
	for set, n := range map[string]int{"bans4": r.Have.Bans4, "bans6": r.Have.Bans6, "ranges4": r.Have.Nets4, "ranges6": r.Have.Nets6} {
		if n >= 0 {
			gauge(descElements, float64(n), set)
		}
	}
	gauge(descIntact, truth[r.Installed])
	stamp(descLooked, r.Looked)
	count(descWrites, r.Installs, "install")
	count(descWrites, r.Updates, "update")
	count(descFailures, r.Failures)
	count(descRepairs, r.Repairs)
	count(descMeddling, r.Interference)
	gauge(descLastChange, r.LastTook.Seconds())
	gauge(descStoodDown, truth[r.StoodDown])
	orders := b.enforcer.orders.Load().live(b.now())
	gauge(descOrders, float64(len(orders.Allows)), "allow")
	gauge(descOrders, float64(len(orders.Unbans)), "unban")
	gauge(descOrders, truth[orders.Pause != nil], "pause")

	for _, l := range b.listStatus() {
		gauge(descList, float64(l.Entries), l.Name)
		gauge(descListBad, float64(l.Unreadable), l.Name)
		stamp(descListRead, l.Read, l.Name)
		gauge(descListStale, truth[l.Error != ""], l.Name)
	}

	if b.config.Auth.Listen.IsValid() {
		for verdict, n := range b.auth.counts() {
			count(descAuth, n, verdict)
		}
		refused := descRefused
		if b.config.Mode == Observe {
			refused = descWouldbe
		}
		b.auth.eachRefused(func(o offence, n uint64) { count(refused, n, o.origin, o.remediation, o.ipType) })
	}

	b.mu.Lock()
	defer b.mu.Unlock()
	count(descPulls, b.feed.Fulls, "full")
	count(descPulls, b.feed.Pulls-b.feed.Fulls, "delta")
	count(descFailed, b.feed.Failures)
	count(descDoubts, b.feed.Doubts)
	stamp(descPulled, b.feed.Last)
	for reason, n := range b.feed.Skipped {
		count(descSkipped, n, reason)
	}
	gauge(descCovered, float64(len(*b.enforcer.covering.Load())))
	for _, kind := range []string{"cilium", "exempt", "flowtable", "tc", "xdp"} {
		n := 0
		for _, p := range b.passing {
			if p.Kind == kind {
				n++
			}
		}
		gauge(descBypasses, float64(n), kind)
	}
	for _, m := range []Mode{Enforce, Observe} {
		gauge(descMode, truth[b.config.Mode == m], string(m))
	}
}

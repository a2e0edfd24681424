package bouncer

import (
	"net/netip"
	"time"

	"github.com/edgeward/edgeward/internal/decision"
)

// reading is a table and how it is read here. It never changes.
type reading struct {
	table     *decision.Table
	all       *decision.View // what the kernel enforces
	local     *decision.View // that, without what others decided
	protected []Protected
	guarded   zone // of protected
	private   zone // where only local decisions count
	watched   zone // both

	// What the auth endpoint refuses, and that without what others decided.
	refused, refusedLocal *decision.View
}

// place calls visit for what the kernel is to hold because h is held: h itself,
// nothing where all of it is protected, or, where it reaches into private
// ranges, its pieces as far as they count. What is protected within a wider
// range the kernel lets pass by its own list.
func (r *reading) place(h decision.Held, now time.Time, visit func(decision.Held)) {
	if !r.watched.meets(h.Prefix) {
		visit(h)
		return
	}
	if r.guarded.holds(h.Prefix) {
		return
	}
	local, some := r.local.Exactly(r.table, h.Prefix, now)
	if some && local == h {
		visit(h)
		return
	}
	r.private.divide(h.Prefix, func(piece netip.Prefix, inside bool) {
		part := h
		if inside {
			if !some {
				return
			}
			part = local
		}
		part.Prefix = piece
		visit(part)
	})
}

// read returns r with another table.
func (e *enforcer) read(r *reading, t *decision.Table) *reading {
	next := *r
	next.table = t
	if r.all == nil || !r.all.Reads(t) {
		next.all = decision.NewView(t, e.config.policy(false))
		next.local = decision.NewView(t, e.config.policy(true))
		next.refused = decision.NewView(t, e.config.policyFor(e.config.Auth.Remediations, false))
		next.refusedLocal = decision.NewView(t, e.config.policyFor(e.config.Auth.Remediations, true))
	}
	return &next
}

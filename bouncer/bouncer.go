// Package bouncer enforces CrowdSec's bans in the kernel of one node. It follows
// LAPI's decision stream, and files of addresses beside it or in its place, into
// internal/decision's Store, writes what the store holds into the nftables table
// of internal/nft, and sees to it that the kernel goes on holding it: through
// restarts, foreign firewall reloads and a LAPI that is away.
//
// The way of a ban:
//
//	LAPI → lapi.Stream → feed → decision.Store → Enforcer → nft.Conn
//
// A delta writes the prefixes that it touches, in one transaction, whatever the
// table weighs; a full pull writes the difference between two tables; the first
// content, and all repair, is a generation beside the old one. What the kernel
// refuses to write leaves what it enforced before, and is tried again.
//
// The guard knows the addresses that must stay reachable (this node's own, its
// gateway, LAPI, the cluster, Cloudflare's edge, the operator's): decisions on
// them are let pass in the kernel, and said aloud, because they usually mean
// that CrowdSec is told wrong client addresses.
//
// What the operator orders (allow, unban, pause) lies over all that as waivers,
// which the kernel itself ends at their time, agent or no agent.
//
// Proxies may ask Auth about their clients: it answers from the same table, and
// believes trusted proxies alone on who a client is.
//
// It never removes protection when it ends; Cleanup does, and only when asked.
// It decides nothing about decisions that internal/decision does not say, knows
// no netlink and no errno, and links nothing of the tunnel's or the plugin's.
// cmd/edgeward-bouncer calls it.
package bouncer

import "github.com/edgeward/edgeward/internal/daemon"

// Version is the bouncer's release, as LAPI is told it.
var Version = daemon.Version().Version

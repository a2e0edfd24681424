// Package api keeps tunnels and DNS records at Cloudflare as they are wished:
// each tunnel made, or adopted by its name; for each public host a proxied CNAME
// that leads to its tunnel, and beside it a TXT record that says whose it is.
//
// A turn of the Keeper reads what is there, has Diff work out the Changes, which
// are plain data, and applies them: what a plan shows is what a turn writes. It
// keeps no state of its own. Whoever made a record is written in DNS, tunnels
// are known by their names, so a new machine with the same configuration goes on
// where the old one ended, and a crash at any point leaves nothing to mend but
// the next turn. CNAME and TXT of a host are written in one transaction.
//
// What it did not make it does not touch. A record is ours if it is a CNAME to a
// tunnel and the TXT record beside it names our owner id; all else in the way is
// a conflict, which is reported with what to do. Two instances of one owner that
// wish for different things cannot be told apart; they notice, and yield. It
// deletes no tunnel but where that is what was asked for, writes no
// configuration of a tunnel (routes live in the connector, so the rules that
// others keep there stay theirs), creates no zone, buys no certificate.
//
// Cloudflare refuses all calls for five minutes to whom makes more than 1,200 in
// five; this client stays below that of itself, and when it is told to wait it
// asks nothing until then. It never repeats a write by itself: the next turn
// looks first.
//
// It speaks to the API with net/http. Seven calls are needed: the official library
// for them takes longer to build than all the rest, changes what it exports in
// minor releases, and repeats writes of itself unless it is told not to. This
// package imports nothing of the connector's, so that the operators' command
// line, cmd/edgeward, shows plans without linking it; cmd/edgeward-tunnel turns
// the Keeper.
package api

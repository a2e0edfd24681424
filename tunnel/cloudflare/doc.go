// Package cloudflare holds a tunnel's connections to Cloudflare's edge and hands
// every request that comes through them to an http.RoundTripper.
//
// It drives cloudflared's connection layer (its wire formats, its RPC, its way
// to find the edge) under a supervisor of its own. That supervisor lets several
// tunnels live in one process, tells a refusal from a fault, races QUIC against
// HTTP/2 and remembers which network blocks UDP, notices a connection that is
// up and yet dead, and replaces connections without losing a request:
//
//	Connector ── session (one generation: credentials, settings)
//	               └─ slot 0..n-1 ── link (one connection, QUIC or HTTP/2)
//	                                   ├─ control: registers, canary, unregisters
//	                                   └─ serve ── Options.Handler
//
// A change of credentials or settings makes a new session beside the old one,
// which drains once the new one serves. What a request's host leads to is the
// handler's business alone: routes change without anything here noticing, and
// a configuration that the edge pushes is acknowledged and ignored.
//
// # What proves a connection alive
//
// The edge sends nothing by itself. QUIC keeps alive at the transport and gives
// up after 5 seconds of silence. Over HTTP/2 a PING goes out when the edge has
// been silent for 5 seconds, and the kernel is told to give up on data that
// nobody acknowledges. Both prove the link and the edge's transport, not that
// the edge's tunnel service is well. For that there is a canary: every 10
// seconds the RPC session over which the connection registered is asked for its
// bootstrap capability, a question without effect that a Cap'n Proto peer must
// answer. A connection whose canary is silent is recycled, provided that the
// edge has answered one before, in this session: an edge that never answers
// that question is not held against its connections. What no question from here
// can prove is that the edge routes visitors to a connection; that takes a
// request through the public name of a host.
//
// The package knows no hosts, decisions or DNS records, keeps no metrics (those
// that cloudflared registers globally are in no registry of ours; Status and
// Options.Served are what there is to count), and serves HTTP and WebSocket
// only: private networks, TCP and UDP through the tunnel are refused. It is the
// one package that imports cloudflared. The program edgeward-tunnel calls it.
package cloudflare

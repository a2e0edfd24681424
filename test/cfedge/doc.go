// Package cfedge emulates Cloudflare: the edge that connectors dial, over HTTP/2
// and QUIC, the visitors whose requests the edge sends through them, and the API
// by which tunnels and DNS records are made. What is on the wire is made by
// cloudflared's own packages, and cloudflared runs on it unchanged. What the
// service behind the wire does is what we believe of the real one:
// docs/cloudflare-checklist.md says why, and how to find out.
//
// An Edge is some servers on loopback ports. A connector registers with a tunnel
// that the Cloud knows; a Visitor's request goes to one of the connections of
// the tunnel that the DNS records of the Cloud lead to. The edge can refuse,
// delay, kill, fall silent and push a configuration, and it counts what became
// of every request, so that a test can demand that none was lost but those that
// were under way on a connection that the test itself cut.
//
// It knows nothing of the connector under test, nor of package testing. The
// suites, the demo and the benchmark call it; it is not made to face a network.
package cfedge

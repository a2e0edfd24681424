// Package tunnel is what stands between Cloudflare's edge and the services of a
// cluster: the desired exposure, read from tunnel.yaml, and the Gate that every
// request of a tunnel goes through inside the connector, before anything in the
// cluster sees it.
//
// The way of a request:
//
//	connector → Gate: identity → verdict → route → signed headers → origin service
//
// The Gate believes one thing about a visitor: the address that Cloudflare's edge
// vouches for, in a header that the edge sets anew on every request. What
// CrowdSec decided about that address is looked up in the same table as in the
// plugin and the node agent. What goes on to the origin service carries forwarding
// headers of the Gate's own making and no others, and a signature by which the
// plugin knows the Gate from a pod that poses as it; see Signer for what that
// holds against.
//
// It holds no connection to Cloudflare (tunnel/cloudflare does), writes no DNS
// record (tunnel/cloudflare/api does), imports neither, and so costs a program
// that only reads the configuration nothing of their weight. A configuration that
// is wrong leaves the last good one in force. The programs edgeward-tunnel and
// edgeward call it.
package tunnel

import "github.com/edgeward/edgeward/internal/daemon"

// Version is the tunnel's release, as LAPI and Cloudflare are told it.
var Version = daemon.Version().Version

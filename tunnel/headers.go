package tunnel

import (
	"net/http"
	"net/netip"
	"net/textproto"
	"strings"

	"golang.org/x/net/http/httpguts"

	"github.com/edgeward/edgeward/internal/config"
)

// incoming is what a request of the tunnel says, once nothing in it is left to
// doubt.
type incoming struct {
	addr     netip.Addr
	host     string // as it is routed
	scheme   string // what the visitor spoke to the edge
	country  string // two letters, or empty
	upgrade  bool   // to a WebSocket
	trailers bool   // TE: trailers
	header   http.Header
	values   []string // of the headers that set has set
}

// headerLimit is as much as the edge passes on, in bytes.
const headerLimit = 128 << 10

// Reasons why a request is refused whatever it is for, as logs and metrics name
// them. The edge sends none of these.
const (
	badHost    = "host"
	badTarget  = "target"
	badHeader  = "header"
	badSize    = "size"
	badVisitor = "address"
	badMethod  = "method"
)

func malformedStatus(reason string) int {
	switch reason {
	case badSize:
		return http.StatusRequestHeaderFieldsTooLarge
	case badMethod:
		return http.StatusMethodNotAllowed
	}
	return http.StatusBadRequest
}

// read takes a request apart. Its header is copied: names in their one usual
// form, so that none hides another; without what is for one hop alone, what
// claims to know who the visitor is, and what is for cloudflared.
func read(req *http.Request) (*incoming, string) {
	in := &incoming{host: bareHost(req.Host), scheme: "https"}
	if !httpguts.ValidHostHeader(req.Host) || !config.IsHost(in.host) || !validPort(req.Host) {
		return nil, badHost
	}
	if req.Method == http.MethodConnect || req.Method == http.MethodTrace {
		return nil, badMethod // a tunnel through the service, or an echo of what the gate adds
	}
	u := req.URL
	if u == nil || u.Opaque != "" || !strings.HasPrefix(u.Path, "/") || strings.ContainsFunc(u.RawQuery, notInTarget) ||
		len(req.Method) > 32 || !httpguts.ValidHeaderFieldName(req.Method) {
		return nil, badTarget
	}
	// Room for what outgoing adds: it replaces at least three that the edge sends.
	in.header = make(http.Header, len(req.Header)+4)
	size := 0
	var visitor, visitor6, country, proto, connection []string
	for name, values := range req.Header {
		if !httpguts.ValidHeaderFieldName(name) {
			return nil, badHeader
		}
		for _, v := range values {
			if !httpguts.ValidHeaderFieldValue(v) {
				return nil, badHeader
			}
			size += len(name) + len(v) + 4
		}
		if size > headerLimit {
			return nil, badSize
		}
		name = textproto.CanonicalMIMEHeaderKey(name)
		switch name {
		case "Cf-Connecting-Ip":
			visitor = append(visitor, values...)
			continue
		case "Cf-Connecting-Ipv6":
			visitor6 = append(visitor6, values...)
			continue
		case "X-Forwarded-Proto":
			proto = append(proto, values...)
			continue
		case "Cf-Ipcountry":
			country = append(country, values...)
		case "Connection":
			connection = append(connection, values...)
			continue
		case "Upgrade":
			in.upgrade = len(values) == 1 && strings.EqualFold(values[0], "websocket")
			continue
		case "Te":
			in.trailers = httpguts.HeaderValuesContainsToken(values, "trailers")
			continue
		}
		if claimsIdentity(name) || hopByHop[name] {
			continue
		}
		if have := in.header[name]; have != nil {
			values = append(have[:len(have):len(have)], values...)
		}
		in.header[name] = values
	}
	addr, err := visitorOf(visitor, visitor6)
	if err != nil {
		return nil, badVisitor
	}
	in.addr = addr
	in.upgrade = in.upgrade && httpguts.HeaderValuesContainsToken(connection, "Upgrade")
	// What a hop asks to be dropped is dropped, but for what the gate sets.
	for _, list := range connection {
		for name := range strings.SplitSeq(list, ",") {
			delete(in.header, textproto.CanonicalMIMEHeaderKey(strings.TrimSpace(name)))
		}
	}
	if len(country) == 1 && len(country[0]) == 2 {
		in.country = strings.ToUpper(country[0])
	}
	if len(proto) == 1 && proto[0] == "http" {
		in.scheme = "http"
	}
	return in, ""
}

func notInTarget(r rune) bool { return r <= ' ' || r == 0x7f }

// hopByHop are the headers that are for one connection, or that the transport
// makes from what it knows.
var hopByHop = map[string]bool{
	"Connection": true, "Keep-Alive": true, "Proxy-Connection": true, "Proxy-Authenticate": true, "Proxy-Authorization": true,
	"Te": true, "Trailer": true, "Transfer-Encoding": true, "Upgrade": true, "Http2-Settings": true,
	"Content-Length": true, "Host": true,
}

// identityNames are headers by which services learn who a visitor is. The gate
// sets those that it stands for; whatever else came in is a claim of the
// visitor's own.
var identityNames = map[string]bool{
	"Forwarded": true, "X-Real-Ip": true, "True-Client-Ip": true, "X-Client-Ip": true, "X-Cluster-Client-Ip": true, "Client-Ip": true,
	"X-Original-Forwarded-For": true, "X-Envoy-External-Address": true, "X-Proxyuser-Ip": true, "Fastly-Client-Ip": true, "X-Remote-Ip": true, "X-Remote-Addr": true,
}

// claimsIdentity reports whether a header is one that visitors may not set. Some
// services read an underscore as a hyphen, so both are the same here.
func claimsIdentity(name string) bool {
	under := strings.IndexByte(name, '_') >= 0
	if under {
		name = textproto.CanonicalMIMEHeaderKey(strings.ReplaceAll(name, "_", "-"))
	}
	return identityNames[name] || strings.HasPrefix(name, "X-Forwarded-") || strings.HasPrefix(name, "X-Edgeward-") ||
		strings.HasPrefix(name, "Cf-Cloudflared-") || strings.HasPrefix(name, "Cf-Connecting-") || under && hopByHop[name]
}

// scrub takes off a response what is for one hop alone, and what an origin
// service might echo of the identity.
func scrub(res *http.Response) {
	delete(res.Header, IdentityHeader)
	if res.StatusCode == http.StatusSwitchingProtocols {
		return
	}
	for _, list := range res.Header["Connection"] {
		for name := range strings.SplitSeq(list, ",") {
			delete(res.Header, textproto.CanonicalMIMEHeaderKey(strings.TrimSpace(name)))
		}
	}
	for _, name := range []string{"Connection", "Keep-Alive", "Proxy-Connection", "Proxy-Authenticate", "Te", "Transfer-Encoding", "Upgrade"} {
		delete(res.Header, name)
	}
}

// shortened bounds what a stranger can put into a log line.
func shortened(text string) string {
	if len(text) > 200 {
		return text[:200] + "..."
	}
	return text
}

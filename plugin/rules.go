package plugin

import (
	"net/http"
	pathpkg "path"
	"strings"

	"github.com/edgeward/edgeward/internal/decision"
)

// limitApplies reports whether a request of a client is one that a rule is for.
func limitApplies(rule *limitRule, req *http.Request, octets []byte) bool {
	if rule.exempt != nil && decision.Contains(rule.exempt, octets) {
		return false
	}
	if rule.methods != nil && !rule.methods[strings.ToUpper(req.Method)] {
		return false
	}
	if rule.prefixes != nil && !underOne(req.URL.Path, rule.prefixes) {
		// Some servers read more paths as the same than Traefik does, and a
		// limit that can be written around is none.
		path := strings.ReplaceAll(req.URL.Path, "\\", "/")
		if semicolon := strings.IndexByte(path, ';'); semicolon >= 0 {
			path = withoutParameters(path)
		}
		if cleaned := pathpkg.Clean("/" + path); cleaned == req.URL.Path || !underOne(cleaned, rule.prefixes) {
			return false
		}
	}
	if rule.hosts != nil || rule.suffixes != nil {
		host := hostOf(req.Host)
		if !rule.hosts[host] && !endsInOne(host, rule.suffixes) {
			return false
		}
	}
	return true
}

// withoutParameters drops what stands behind a semicolon in each segment.
func withoutParameters(path string) string {
	segments := strings.Split(path, "/")
	for i, s := range segments {
		if semicolon := strings.IndexByte(s, ';'); semicolon >= 0 {
			segments[i] = s[:semicolon]
		}
	}
	return strings.Join(segments, "/")
}

// underOne reports whether path is one of the prefixes or lies below one, in
// small or capital letters.
func underOne(path string, prefixes []string) bool {
	for _, p := range prefixes {
		if len(path) >= len(p) && strings.EqualFold(path[:len(p)], p) && (len(path) == len(p) || p[len(p)-1] == '/' || path[len(p)] == '/') {
			return true
		}
	}
	return false
}

func endsInOne(host string, suffixes []string) bool {
	for _, s := range suffixes {
		if strings.HasSuffix(host, s) && len(host) > len(s) {
			return true
		}
	}
	return false
}

// hostOf returns the bare name in a Host header: no port, no closing dot, small
// letters.
func hostOf(host string) string {
	if colon := strings.LastIndexByte(host, ':'); colon >= 0 && strings.IndexByte(host[colon:], ']') < 0 {
		host = host[:colon]
	}
	return strings.ToLower(strings.TrimSuffix(host, "."))
}

// limitKey names the count of a client: its address, or the range of the given
// length around it. group names the larger network that keeps an IPv6 client
// from having any number of counts: the /48 around ranges smaller than that.
func limitKey(octets []byte, bits4, bits6 int) (key, group string) {
	if len(octets) == 4 {
		if bits4 == 32 {
			return string(octets), ""
		}
		return "ipv4 " + network(octets, bits4), ""
	}
	if bits6 > 48 && len(octets) == 16 {
		group = string(octets[:6])
	}
	return "ipv6 " + network(octets, bits6), group
}

// network returns the octets of the range of the given length around an
// address.
func network(octets []byte, bits int) string {
	whole := bits / 8
	if len(octets) <= whole {
		return string(octets)
	}
	if bits%8 == 0 {
		return string(octets[:whole])
	}
	rest := uint(8 - bits%8)
	last := int(octets[whole]) >> rest << rest
	return string(octets[:whole]) + string([]byte{byte(last)})
}

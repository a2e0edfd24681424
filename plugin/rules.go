package plugin

import (
	"net/http"
	"net/netip"
	"strings"
)

// limitApplies reports whether a request is one that a rule is for.
func limitApplies(rule *limitRule, req *http.Request) bool {
	if rule.methods != nil && !rule.methods[req.Method] {
		return false
	}
	if rule.prefixes != nil && !underOne(req.URL.Path, rule.prefixes) {
		return false
	}
	if rule.hosts != nil || rule.suffixes != nil {
		host := hostOf(req.Host)
		if !rule.hosts[host] && !endsInOne(host, rule.suffixes) {
			return false
		}
	}
	return true
}

// underOne reports whether path is one of the prefixes or lies below one.
func underOne(path string, prefixes []string) bool {
	for _, p := range prefixes {
		if strings.HasPrefix(path, p) && (len(path) == len(p) || p[len(p)-1] == '/' || path[len(p)] == '/') {
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
func limitKey(addr netip.Addr, bits4, bits6 int) (key, group string) {
	if addr.Is4() {
		if bits4 == 32 {
			return addr.String(), ""
		}
		return network(addr, bits4), ""
	}
	if bits6 > 48 {
		group = network(addr, 48)
	}
	return network(addr, bits6), group
}

func network(addr netip.Addr, bits int) string {
	prefix, err := addr.Prefix(bits)
	if err != nil {
		return ""
	}
	return prefix.String()
}

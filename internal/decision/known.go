package decision

import "net/netip"

// cloudflare are the ranges from which Cloudflare connects to its customers, as
// published at cloudflare.com/ips.
var cloudflare = []string{
	"173.245.48.0/20", "103.21.244.0/22", "103.22.200.0/22", "103.31.4.0/22", "141.101.64.0/18",
	"108.162.192.0/18", "190.93.240.0/20", "188.114.96.0/20", "197.234.240.0/22", "198.41.128.0/17",
	"162.158.0.0/15", "104.16.0.0/13", "104.24.0.0/14", "172.64.0.0/13", "131.0.72.0/22",
	"2400:cb00::/32", "2606:4700::/32", "2803:f800::/32", "2405:b500::/32", "2405:8100::/32",
	"2a06:98c0::/29", "2c0f:f248::/32",
}

// private are the ranges of RFC 1918, RFC 6598 and RFC 4193, loopback and
// link-local.
var private = []string{
	"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16",
	"fc00::/7", "::1/128", "fe80::/10",
}

// Known returns the ranges that a word stands for where addresses are
// configured, and whether it stands for any: cloudflare for those that
// Cloudflare publishes, private for private, loopback and link-local ones.
func Known(word string) ([]netip.Prefix, bool) {
	var list []string
	switch word {
	case "cloudflare":
		list = cloudflare
	case "private":
		list = private
	default:
		return nil, false
	}
	out := make([]netip.Prefix, len(list))
	for i, text := range list {
		out[i] = netip.MustParsePrefix(text)
	}
	return out, true
}

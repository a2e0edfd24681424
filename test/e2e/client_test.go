package e2e

import (
	"testing"

	"github.com/edgeward/edgeward/test/rig"
)

// TestClientAddress: who a request is from. Everywhere 203.0.113.0/24 and
// 2001:db8:bad::/48 are banned and nobody else, so an answer tells what address
// the plugin saw.
func TestClientAddress(t *testing.T) {
	t.Parallel()
	// Traefik itself passes on what 127.0.0.1 says in X-Forwarded-For, and
	// takes it from everyone else; who is believed is the plugin's business.
	g := newGateway(t, rig.TraefikOptions{TrustForwarded: true})
	l := newLAPI(t, rig.LAPIOptions{})
	l.ban(t, "203.0.113.0/24", "2001:db8:bad::/48", "127.66.0.0/16")
	client := func(trusted []string, header string) object {
		config := object{"lapi": l.config()}
		if len(trusted) > 0 {
			who := object{"trustedProxies": trusted}
			if header != "" {
				who["header"] = header
			}
			config["client"] = who
		}
		return config
	}
	// 10.0.0.0/8 stands for proxies further out; 127.0.0.1 is the last one.
	chain := []string{"127.0.0.1", "10.0.0.0/8", "2001:db8:10::/64"}
	g.serve(t, site{plugins: map[string]object{
		"nobody":     client(nil, ""),
		"elsewhere":  client([]string{"10.0.0.0/8", "cloudflare"}, ""),
		"chain":      client(chain, ""),
		"cloudflare": client([]string{"127.0.0.1"}, "CF-Connecting-IP"),
		"foreign":    client([]string{"cloudflare"}, "CF-Connecting-IP"),
		"real":       client([]string{"private"}, "x-real-ip"),
	}})
	g.becomes(t, "127.66.0.1", "nobody", 403, promise)

	const good, bad = "192.0.2.1", "203.0.113.9"
	tests := []struct {
		name   string
		to     string
		from   string
		header []string
		want   int
	}{
		// A header from an untrusted peer never changes the verdict.
		{"the peer counts", "nobody", "127.66.0.1", nil, 403},
		{"a banned client claims another address", "nobody", "127.66.0.1", []string{"X-Forwarded-For: " + good, "X-Real-IP: " + good, "CF-Connecting-IP: " + good, "Forwarded: for=" + good, "True-Client-IP: " + good}, 403},
		{"a client is not banned by what it claims", "nobody", "127.0.0.1", []string{"X-Forwarded-For: " + bad, "X-Real-IP: " + bad, "CF-Connecting-IP: " + bad}, 200},
		{"a client that trusts itself is not believed", "elsewhere", "127.0.0.1", []string{"X-Forwarded-For: 10.0.0.1, " + bad}, 200},
		{"a banned client poses as a proxy", "elsewhere", "127.66.0.1", []string{"X-Forwarded-For: " + good + ", 10.0.0.1"}, 403},
		{"a banned client poses as Cloudflare's", "foreign", "127.66.0.1", []string{"CF-Connecting-IP: " + good}, 403},
		{"nobody is banned by posing as Cloudflare", "foreign", "127.0.0.1", []string{"CF-Connecting-IP: " + bad}, 200},
		{"a banned client next to a trusted proxy", "chain", "127.66.0.1", []string{"X-Forwarded-For: " + good}, 403},

		// From the right over trusted hops to the first that is none.
		{"one hop", "chain", "", []string{"X-Forwarded-For: " + bad}, 403},
		{"the rightmost is the client", "chain", "", []string{"X-Forwarded-For: " + good + ", " + bad}, 403},
		{"what the client wrote itself does not count", "chain", "", []string{"X-Forwarded-For: " + bad + ", " + good}, 200},
		{"over trusted hops", "chain", "", []string{"X-Forwarded-For: " + good + ", " + bad + ", 10.1.2.3, 2001:db8:10::1"}, 403},
		{"over trusted hops, the claim aside", "chain", "", []string{"X-Forwarded-For: " + bad + "," + good + ",10.1.2.3"}, 200},
		{"trusted hops alone", "chain", "", []string{"X-Forwarded-For: 10.0.0.7, 10.0.0.8"}, 200},
		{"several headers are one list", "chain", "", []string{"X-Forwarded-For: " + good, "X-Forwarded-For: " + bad, "X-Forwarded-For: 10.0.0.1"}, 403},
		{"several headers, the claim in the first", "chain", "", []string{"X-Forwarded-For: " + bad, "X-Forwarded-For: " + good + ", 10.0.0.1"}, 200},
		{"no header: the proxy itself", "chain", "", nil, 200},
		{"an empty header: the proxy itself", "chain", "", []string{"X-Forwarded-For:"}, 200},

		// Forms.
		{"with a port", "chain", "", []string{"X-Forwarded-For: " + bad + ":61234"}, 403},
		{"IPv6", "chain", "", []string{"X-Forwarded-For: 2001:db8:bad::1"}, 403},
		{"IPv6 beside the range", "chain", "", []string{"X-Forwarded-For: 2001:db8:bae::1"}, 200},
		{"IPv6 in capitals and in full", "chain", "", []string{"X-Forwarded-For: 2001:0DB8:0BAD:0000:0000:0000:0000:0001"}, 403},
		{"IPv6 with a port", "chain", "", []string{"X-Forwarded-For: [2001:db8:bad::1]:61234"}, 403},
		{"IPv6 with a zone", "chain", "", []string{"X-Forwarded-For: 2001:db8:bad::1%eth0"}, 403},
		{"IPv4 mapped", "chain", "", []string{"X-Forwarded-For: ::ffff:" + bad}, 403},
		{"a mapped proxy", "chain", "", []string{"X-Forwarded-For: " + bad + ", ::ffff:10.0.0.1"}, 403},
		{"spaces and tabs", "chain", "", []string{"X-Forwarded-For:  \t" + bad + " \t,\t 10.0.0.1  "}, 403},

		// What cannot be read ends the walk at the proxy that wrote it.
		{"garbage on the right hides nothing", "chain", "", []string{"X-Forwarded-For: " + bad + ", unknown"}, 200},
		{"garbage on the left is never reached", "chain", "", []string{"X-Forwarded-For: <script>, " + bad}, 403},
		{"garbage behind a trusted hop", "chain", "", []string{"X-Forwarded-For: " + bad + ", _hidden, 10.0.0.1"}, 200},
		{"an empty entry", "chain", "", []string{"X-Forwarded-For: " + bad + ",,10.0.0.1"}, 200},
		{"octal is no address", "chain", "", []string{"X-Forwarded-For: 0313.0.0161.011"}, 200},
		{"a range is no address", "chain", "", []string{"X-Forwarded-For: 203.0.113.9/32"}, 200},

		// A header that holds one address.
		{"the named header", "cloudflare", "", []string{"CF-Connecting-IP: " + bad}, 403},
		{"the named header, IPv6", "cloudflare", "", []string{"CF-Connecting-IP: 2001:db8:bad::1"}, 403},
		{"another header does not count", "cloudflare", "", []string{"X-Forwarded-For: " + bad, "X-Real-IP: " + bad, "CF-Connecting-IP: " + good}, 200},
		{"the named header twice is believed neither time", "cloudflare", "", []string{"CF-Connecting-IP: " + good, "CF-Connecting-IP: " + bad}, 200},
		{"a list where one address belongs", "cloudflare", "", []string{"CF-Connecting-IP: " + good + ", " + bad}, 200},
		{"garbage where an address belongs", "cloudflare", "", []string{"CF-Connecting-IP: localhost"}, 200},
		{"X-Real-IP, in any case", "real", "127.0.0.1", []string{"x-real-ip: " + bad}, 403},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			a := g.ask(t, request{to: test.to, from: test.from, header: test.header})
			if a.status != test.want {
				t.Errorf("router %s answers %d to a request from %q with %q, want %d", test.to, a.status, test.from, test.header, test.want)
			}
		})
	}
	t.Run("the origin is told what Traefik knows, not what the plugin read", func(t *testing.T) {
		with := arrived(t, g.ask(t, request{to: "chain", header: []string{"X-Forwarded-For: " + good}}))
		without := arrived(t, g.ask(t, request{to: "plain", header: []string{"X-Forwarded-For: " + good}}))
		for _, name := range []string{"X-Forwarded-For", "X-Real-Ip", "Cf-Connecting-Ip", "Forwarded"} {
			if got, want := with.Header.Get(name), without.Header.Get(name); got != want {
				t.Errorf("%s is %q at the origin, want %q as without the plugin", name, got, want)
			}
		}
	})
}

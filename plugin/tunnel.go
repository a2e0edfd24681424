package plugin

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// The preset edgeward-tunnel: the client is whom edgeward's tunnel signs for.
// Addresses of connectors change, and any pod can take one, so no address is
// believed; a signature under the shared key is, for the host and method that it
// was made for and a short while. The header that carries it ends here, seen by
// no service, so that none can use it again.

const (
	tunnelPreset = "edgeward-tunnel"
	// tunnelHeader holds "v1 TIME SCHEME ADDRESS MAC [MAC]", the second MAC
	// under the key before while keys rotate.
	tunnelHeader = "X-Edgeward-Client"
	tunnelLabel  = "edgeward-client v1\n"
	// tunnelLongest is longer than any value that the tunnel writes.
	tunnelLongest = 256
	// tunnelLongestHost is as long as a name and its port can be.
	tunnelLongestHost = 260
	// tunnelReread is how old, in seconds, keys may be before their files are
	// read again.
	tunnelReread = 15
	// tunnelShortestKey is the least a key must have, in characters.
	tunnelShortestKey = 32
	// tunnelQuiet is the time between two log lines about bad signatures.
	tunnelQuiet = int64(30)
)

// tunnelSource says where the keys are; each is a text or a file that holds one.
type tunnelSource struct {
	key, keyFile           string
	previous, previousFile string
	maxAge                 int64 // seconds
}

// tunnel is the preset of one middleware.
type tunnel struct {
	source  tunnelSource
	log     *slog.Logger
	keys    atomic.Value // *tunnelBelief
	read    atomic.Int64 // when the keys were read, in Unix seconds
	told    atomic.Int64 // when a bad signature was last logged
	untold  atomic.Int64 // bad signatures since
	trouble atomic.Value // string: why the keys cannot be read, as logged
}

// tunnelBelief is what there is to believe: the keys, and what was found signed
// by them. A visitor's requests of one second carry one signature, and to look
// it up costs a tenth of verifying it.
type tunnelBelief struct {
	keys  [][]byte
	known sync.Map // value, method and host of a request → *tunnelClient
	n     atomic.Int32
}

// tunnelKnown bounds what is remembered; then it begins anew.
const tunnelKnown = 8192

// tunnelClient is a visitor that the tunnel signed for, made ready for headers.
type tunnelClient struct {
	octets  []byte
	at      int64 // when it was signed, in Unix seconds
	address []string
	scheme  []string
	port    []string
	remote  string
}

// newTunnel reads the keys. Without any there is no signature to believe, which
// is no reason to take a site down: the peers are the clients until there is.
func newTunnel(source tunnelSource, log *slog.Logger) *tunnel {
	t := &tunnel{source: source, log: log}
	t.keys.Store(&tunnelBelief{})
	t.trouble.Store("")
	t.reread(time.Now().Unix())
	return t
}

// reread reads the keys. Those that were read last stay where files cannot be
// used.
func (t *tunnel) reread(now int64) {
	t.read.Store(now)
	keys, err := tunnelKeys(t.source)
	trouble := ""
	if err != nil {
		trouble = err.Error()
	} else if !sameKeys(keys, t.keys.Load().(*tunnelBelief).keys) {
		t.keys.Store(&tunnelBelief{keys: keys})
	}
	if before := t.trouble.Load().(string); trouble != before {
		t.trouble.Store(trouble)
		if trouble != "" {
			t.log.Error("cannot read the keys of the tunnel, keeping the last good ones; without any, whoever connects is the client", "component", "plugin", "err", trouble)
		} else {
			t.log.Info("the keys of the tunnel can be read again", "component", "plugin")
		}
	}
}

// tunnelKeys returns the keys of a source, the present one first.
func tunnelKeys(s tunnelSource) ([][]byte, error) {
	var keys [][]byte
	for _, k := range []struct{ name, text, file string }{{"client.key", s.key, s.keyFile}, {"client.previousKey", s.previous, s.previousFile}} {
		text := k.text
		if k.file != "" {
			b, err := os.ReadFile(k.file)
			if err != nil {
				return nil, fmt.Errorf("read %sFile: %w", k.name, reasonOf(err))
			}
			text = string(b)
		}
		text = strings.TrimSpace(text)
		if text == "" && k.file == "" {
			continue
		}
		if err := tunnelKeyFits(text); err != nil {
			return nil, fmt.Errorf("read %s: %w", k.name, err)
		}
		keys = append(keys, []byte(text))
	}
	return keys, nil
}

func sameKeys(a, b [][]byte) bool {
	if len(a) != len(b) {
		return false
	}
	for i, key := range a {
		if !hmac.Equal(key, b[i]) {
			return false
		}
	}
	return true
}

var errTunnelKey = errors.New("want one line of 32 characters or more: openssl rand -base64 32 makes one")

func tunnelKeyFits(text string) error {
	if len(text) < tunnelShortestKey || strings.ContainsAny(text, "\r\n") {
		return errTunnelKey
	}
	return nil
}

// identified returns the octets of the address that the tunnel signed for, or
// else the peer's, and makes the request say the same: what else is in Traefik
// and what services behind it read must not be what a pod made up. A visitor of
// the tunnel looks as if it had connected to Traefik itself, so that a second
// middleware, Traefik's own among them, knows it too.
func identified(t *tunnel, req *http.Request, peer []byte) []byte {
	header := req.Header
	values := header[tunnelHeader]
	now := time.Now().Unix()
	if now-t.read.Load() >= tunnelReread {
		refresh(t, now)
	}
	if len(values) == 0 {
		disown(header, peer)
		return peer
	}
	delete(header, tunnelHeader)
	belief := t.keys.Load().(*tunnelBelief)
	key := ""
	if len(values) == 1 && len(req.Host) <= tunnelLongestHost {
		key = values[0] + " " + req.Method + " " + req.Host
	}
	var client *tunnelClient
	why := ""
	if known, ok := belief.known.Load(key); ok && key != "" {
		client = known.(*tunnelClient)
		why = fresh(client.at, now, t.source.maxAge)
	} else if client, why = believed(belief.keys, t.source.maxAge, now, values, req.Method, req.Host); client != nil {
		if key == "" {
			// Not remembered: what is known is bounded in bytes, too.
		} else if belief.n.Add(1) > tunnelKnown {
			t.keys.CompareAndSwap(belief, &tunnelBelief{keys: belief.keys})
		} else {
			belief.known.Store(strings.Clone(key), client)
		}
	}
	if why != "" {
		suspect(t, now, why, req)
		disown(header, peer)
		return peer
	}
	introduce(req, header, client)
	return client.octets
}

// introduce makes a request that of a visitor.
func introduce(req *http.Request, header http.Header, client *tunnelClient) {
	header["X-Real-Ip"] = client.address
	header["Cf-Connecting-Ip"] = client.address
	header["X-Forwarded-Proto"] = client.scheme
	header["X-Forwarded-Port"] = client.port
	// Traefik adds the peer, which from here on is the visitor.
	delete(header, "X-Forwarded-For")
	req.RemoteAddr = client.remote
}

// tunnelled is the short way behind the tunnel for a middleware that only
// enforces decisions. It knows the signatures that were believed, and the
// visitors that were found free under the table in force.
type tunnelled struct {
	next   http.Handler
	sight  *atomic.Value
	tunnel *tunnel
	all    *handler
}

// ServeHTTP implements http.Handler.
func (h *tunnelled) ServeHTTP(rw http.ResponseWriter, req *http.Request) {
	header := req.Header
	values := header[tunnelHeader]
	if len(values) != 1 {
		h.all.ServeHTTP(rw, req)
		return
	}
	known, ok := h.tunnel.keys.Load().(*tunnelBelief).known.Load(values[0] + " " + req.Method + " " + req.Host)
	if !ok {
		h.all.ServeHTTP(rw, req)
		return
	}
	client := known.(*tunnelClient)
	now := time.Now().Unix()
	_, free := h.sight.Load().(*sight).free.octets.Load(client.remote)
	if !free || now-client.at > h.tunnel.source.maxAge || client.at-now > h.tunnel.source.maxAge || now-h.tunnel.read.Load() >= tunnelReread {
		h.all.ServeHTTP(rw, req)
		return
	}
	delete(header, tunnelHeader)
	introduce(req, header, client)
	h.next.ServeHTTP(rw, req)
}

// disown takes off a request whatever says that it is from somebody else than
// the peer. Traefik adds the peer to X-Forwarded-For by itself.
func disown(header http.Header, peer []byte) {
	text := ""
	if addr, ok := netip.AddrFromSlice(peer); ok {
		text = addr.String()
	}
	delete(header, "X-Forwarded-For")
	delete(header, "Forwarded")
	delete(header, "True-Client-Ip")
	delete(header, "Cf-Connecting-Ipv6")
	if text == "" || header.Get("Cf-Connecting-Ip") != text {
		delete(header, "Cf-Connecting-Ip")
	}
	header["X-Real-Ip"] = []string{text}
}

// refresh has the keys read again, beside the request, by one goroutine.
func refresh(t *tunnel, now int64) {
	before := t.read.Load()
	if now-before < tunnelReread || !t.read.CompareAndSwap(before, now) {
		return
	}
	go func() {
		defer func() { _ = recover() }()
		t.reread(now)
	}()
}

// believed verifies the values of the header and returns whom they are for, or
// nil and why they are not believed.
func believed(keys [][]byte, maxAge, now int64, values []string, method, host string) (client *tunnelClient, why string) {
	if len(values) != 1 {
		return nil, "it is there more than once"
	}
	if len(values[0]) > tunnelLongest {
		return nil, "it is too long"
	}
	parts := strings.Split(values[0], " ")
	if len(parts) < 5 || len(parts) > 6 || parts[0] != "v1" {
		return nil, "it is not of this version"
	}
	message := []byte(tunnelLabel + parts[1] + "\n" + parts[2] + "\n" + parts[3] + "\n" + method + "\n" + hostOf(host))
	if !signed(keys, message, parts[4:]) {
		return nil, "its signature is not by a key of ours, or for another host or method"
	}
	at, err := strconv.ParseInt(parts[1], 10, 64)
	if err != nil {
		return nil, "it has no time"
	}
	if why := fresh(at, now, maxAge); why != "" {
		return nil, why
	}
	addr, err := netip.ParseAddr(parts[3])
	if err != nil || addr.Zone() != "" {
		return nil, "it has no address"
	}
	port := ""
	switch parts[2] {
	case "https":
		port = "443"
	case "http":
		port = "80"
	default:
		return nil, "it has no scheme"
	}
	text := addr.Unmap().String()
	return &tunnelClient{
		octets: addr.Unmap().AsSlice(), at: at, address: []string{text}, scheme: []string{strings.Clone(parts[2])}, port: []string{port},
		remote: net.JoinHostPort(text, "0"),
	}, ""
}

// fresh returns why a signature of the time at is of no use now, or "".
func fresh(at, now, maxAge int64) string {
	if now-at > maxAge || at-now > maxAge {
		return "it is from another time: it is used again, or the clocks of the nodes differ"
	}
	return ""
}

// signed reports whether one of the MACs is that of the message under one of the
// keys.
func signed(keys [][]byte, message []byte, macs []string) bool {
	for _, key := range keys {
		mac := hmac.New(sha256.New, key)
		_, _ = mac.Write(message)
		want := []byte(base64.RawURLEncoding.EncodeToString(mac.Sum(nil)))
		for _, m := range macs {
			if hmac.Equal(want, []byte(m)) {
				return true
			}
		}
	}
	return false
}

// suspect logs a signature that is not believed, now and then.
func suspect(t *tunnel, now int64, why string, req *http.Request) {
	t.untold.Add(1)
	last := t.told.Load()
	if now-last < tunnelQuiet || !t.told.CompareAndSwap(last, now) {
		return
	}
	t.log.Warn("the signature of the tunnel is not believed, whoever connects is the client", "component", "plugin", "reason", why,
		"peer", req.RemoteAddr, "host", shortened(req.Host), "count", t.untold.Swap(0))
}

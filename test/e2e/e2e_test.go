package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/edgeward/edgeward/test/rig"
	"github.com/edgeward/edgeward/test/rig/rigtest"
)

// interval is the time between pulls in every test: the shortest there is.
const interval = time.Second

// TestMain lets tests that mostly wait for LAPI do so together, however few
// processors there are. Tests that measure, or count seconds from what LAPI was
// told, never run beside another.
func TestMain(m *testing.M) {
	flag.Parse()
	if err := flag.Set("test.parallel", "16"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// object is a piece of configuration.
type object = map[string]any

// gateway is a Traefik with an origin behind it.
type gateway struct {
	*rig.Traefik
	origin *rig.Origin

	mu      sync.Mutex
	clients map[string]*http.Client // by local address
}

func newGateway(t *testing.T, opts rig.TraefikOptions) *gateway {
	t.Helper()
	g := &gateway{origin: rigtest.Origin(t), Traefik: rigtest.Traefik(t, opts), clients: map[string]*http.Client{}}
	t.Cleanup(func() {
		for _, c := range g.clients {
			c.CloseIdleConnections()
		}
	})
	return g
}

// site is a dynamic configuration. A router named x answers for the host
// x.test and leads to the gateway's origin unless told otherwise.
type site struct {
	plugins map[string]object   // middlewares of edgeward's, each with a router of its name
	others  map[string]object   // Traefik's own middlewares
	routers map[string][]string // further routers and their middlewares
	origins map[string]string   // URLs of other origins, by router
	// Files of the default certificate. Without one Traefik makes another
	// RSA key with each configuration, which takes most of the time of a
	// reload.
	cert, key string
}

// yaml writes the site in Traefik's terms. A router plain, without any
// middleware, is always there.
func (s site) yaml(origin string) string {
	middlewares := object{}
	routers := object{}
	services := object{}
	add := func(name string, through []string) {
		url := s.origins[name]
		if url == "" {
			url = origin
		}
		services[name] = object{"loadBalancer": object{"servers": []object{{"url": url}}}}
		router := object{"rule": "Host(`" + name + ".test`)", "service": name}
		if len(through) > 0 {
			router["middlewares"] = through
		}
		routers[name] = router
	}
	add("plain", nil)
	for name, config := range s.plugins {
		middlewares[name] = object{"plugin": object{"edgeward": config}}
		add(name, []string{name})
	}
	for name, config := range s.others {
		middlewares[name] = config
	}
	for name, through := range s.routers {
		add(name, through)
	}
	http := object{"routers": routers, "services": services}
	if len(middlewares) > 0 {
		http["middlewares"] = middlewares
	}
	text, err := json.MarshalIndent(http, "  ", "  ")
	if err != nil {
		panic(err) // a test wrote something that is no configuration
	}
	written := "http:\n  " + string(text) + "\n"
	if s.cert != "" {
		written += fmt.Sprintf("tls: {stores: {default: {defaultCertificate: {certFile: %q, keyFile: %q}}}}\n", s.cert, s.key)
	}
	return written
}

// serve puts a site in force and fails the test if Traefik complains.
func (g *gateway) serve(t *testing.T, s site) {
	t.Helper()
	if err := g.SetDynamic(soon(t, time.Minute), s.yaml(g.origin.URL)); err != nil {
		t.Fatal(err)
	}
}

// soon bounds a wait that has no bound of its own to prove.
func soon(t testing.TB, limit time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}

// client returns the client whose connections come from a loopback address.
func (g *gateway) client(local string) *http.Client {
	g.mu.Lock()
	defer g.mu.Unlock()
	c := g.clients[local]
	if c == nil {
		dialer := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(local)}}
		c = &http.Client{
			Transport:     &http.Transport{DialContext: dialer.DialContext, DisableCompression: true},
			Timeout:       10 * time.Second,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}
		g.clients[local] = c
	}
	return c
}

// request is one request to a router.
type request struct {
	to     string // the router
	from   string // address of the connection; 127.0.0.1 unless given
	method string
	path   string
	header []string // "Name: value", each added
	body   string
}

// reply is an answer read to its end.
type reply struct {
	status int
	header http.Header
	body   string
}

// try makes a request.
func (g *gateway) try(ctx context.Context, r request) (reply, error) {
	method, path, from := r.method, r.path, r.from
	if method == "" {
		method = http.MethodGet
	}
	if path == "" {
		path = "/"
	}
	if from == "" {
		from = "127.0.0.1"
	}
	req, err := http.NewRequestWithContext(ctx, method, g.URL+path, strings.NewReader(r.body))
	if err != nil {
		return reply{}, err
	}
	req.Host = r.to + ".test"
	for _, line := range r.header {
		name, value, _ := strings.Cut(line, ":")
		req.Header.Add(name, strings.TrimSpace(value))
	}
	resp, err := g.client(from).Do(req)
	if err != nil {
		return reply{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return reply{resp.StatusCode, resp.Header, string(body)}, err
}

// ask makes a request that must be answered.
func (g *gateway) ask(t testing.TB, r request) reply {
	t.Helper()
	a, err := g.try(t.Context(), r)
	if err != nil {
		t.Fatalf("%s %s from %s: %v", r.method, r.to, r.from, err)
	}
	return a
}

// posing is the part of a plugin's configuration with which clients on
// 127.0.0.1 may pose as any address; Traefik needs TrustForwarded beside it.
var posing = object{"trustedProxies": []string{"127.0.0.1"}}

// as makes a request from an address: by a connection from it if it is on
// loopback, otherwise posing as it.
func as(address, router string) request {
	if strings.HasPrefix(address, "127.") {
		return request{to: router, from: address}
	}
	return request{to: router, header: []string{"X-Forwarded-For: " + address}}
}

// status returns the status with which a router answers an address.
func (g *gateway) status(t testing.TB, address, router string) int {
	t.Helper()
	return g.ask(t, as(address, router)).status
}

// want checks the answers for an address, by router.
func (g *gateway) want(t testing.TB, address string, want int, routers ...string) {
	t.Helper()
	for _, router := range routers {
		if got := g.status(t, address, router); got != want {
			t.Errorf("router %s answers %s with %d, want %d", router, address, got, want)
		}
	}
}

// becomes waits until a router answers an address with a status, which must be
// within limit from now, and returns how long it took.
func (g *gateway) becomes(t testing.TB, address, router string, want int, limit time.Duration) time.Duration {
	t.Helper()
	began := time.Now()
	got := 0
	for {
		asked := time.Now()
		if got = g.status(t, address, router); got == want {
			return asked.Sub(began)
		}
		if asked.Sub(began) > limit {
			t.Fatalf("router %s still answers %s with %d, want %d within %s", router, address, got, want, limit)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// stays checks that a router answers an address with a status all the time
// until then.
func (g *gateway) stays(t testing.TB, address, router string, want int, until time.Time) {
	t.Helper()
	for time.Now().Before(until) {
		if got := g.status(t, address, router); got != want {
			t.Fatalf("router %s answers %s with %d, want %d for another %s", router, address, got, want, time.Until(until).Round(time.Millisecond))
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// lapi is a LAPI with a bouncer's key.
type lapi struct {
	*rig.LAPI
	key string
}

func newLAPI(t *testing.T, opts rig.LAPIOptions) lapi {
	t.Helper()
	l := lapi{LAPI: rigtest.LAPI(t, opts)}
	l.key = l.newKey(t, "edge")
	return l
}

// newKey registers a bouncer.
func (l lapi) newKey(t testing.TB, name string) string {
	t.Helper()
	key, err := l.AddBouncer(soon(t, time.Minute), name)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// config is the section lapi of a plugin that follows l.
func (l lapi) config() object {
	return object{"url": l.URL, "key": l.key, "interval": interval.String()}
}

// decide adds a decision; origin is cscli.
func (l lapi) decide(t testing.TB, d rig.Decision) {
	t.Helper()
	if err := l.Decide(soon(t, time.Minute), d); err != nil {
		t.Fatal(err)
	}
}

// ban adds bans of an hour.
func (l lapi) ban(t testing.TB, values ...string) {
	t.Helper()
	for _, value := range values {
		l.decide(t, rig.Decision{Value: value, Duration: time.Hour})
	}
}

func (l lapi) unban(t testing.TB, value string) {
	t.Helper()
	if err := l.Unban(soon(t, time.Minute), value); err != nil {
		t.Fatal(err)
	}
}

// line is a line of the plugin's log.
type line map[string]any

// lines returns the plugin's log lines with a message. What Traefik says
// itself has its text under another name.
func (g *gateway) lines(message string) []line {
	var found []line
	for text := range strings.Lines(g.Log()) {
		var l line
		if strings.Contains(text, message) && json.Unmarshal([]byte(text), &l) == nil && l["msg"] == message {
			found = append(found, l)
		}
	}
	return found
}

// figures are durations of which a test speaks.
type figures []time.Duration

// at returns the quantile q of f, which must not be empty.
func (f figures) at(q float64) time.Duration {
	sorted := slices.Sorted(slices.Values(f))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

func (f figures) String() string {
	if len(f) == 0 {
		return "none"
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "%d: median %s", len(f), f.at(0.5).Round(10*time.Microsecond))
	for _, q := range []float64{0.99, 0.999} {
		fmt.Fprintf(&b, ", p%g %s", q*100, f.at(q).Round(10*time.Microsecond))
	}
	fmt.Fprintf(&b, ", most %s", f.at(1).Round(10*time.Microsecond))
	return b.String()
}

// arrived reads the origin's answer: the request as it got there.
func arrived(t testing.TB, a reply) rig.Arrived {
	t.Helper()
	var there rig.Arrived
	if err := json.Unmarshal([]byte(a.body), &there); err != nil {
		t.Fatalf("read the origin's answer: %v: status %d, body %q", err, a.status, a.body)
	}
	return there
}

// waitLine waits for a line with this message whose error contains text.
func (g *gateway) waitLine(t testing.TB, message, text string) {
	t.Helper()
	end := time.Now().Add(15 * time.Second)
	for {
		for _, l := range g.lines(message) {
			if strings.Contains(fmt.Sprint(l["err"]), text) {
				return
			}
		}
		if time.Now().After(end) {
			t.Fatalf("no line %q with %q in its err: %v", message, text, g.lines(message))
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// watch asks a router for an address all the time and fails the test at the
// first answer with another status; stop ends it.
func (g *gateway) watch(t testing.TB, address, router string, want int) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	began := time.Now()
	asked, wrong := 0, 0
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			a, err := g.try(ctx, as(address, router))
			if ctx.Err() != nil {
				return
			}
			asked++
			if err != nil || a.status != want {
				if wrong++; wrong == 1 {
					t.Errorf("router %s answers %s with %d (%v) after %s, want %d all the time", router, address, a.status, err, time.Since(began).Round(time.Millisecond), want)
				}
			}
			time.Sleep(time.Millisecond)
		}
	}()
	return func() {
		t.Helper()
		cancel()
		<-done
		if asked == 0 || wrong > 0 {
			t.Errorf("of %d answers to %s %d were not %d", asked, address, wrong, want)
		}
	}
}

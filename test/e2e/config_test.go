package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/edgeward/edgeward/test/rig"
)

// TestMisconfiguration: a middleware that makes no sense is named in Traefik's
// log with what is wrong, its router does not serve, and all others do.
func TestMisconfiguration(t *testing.T) {
	t.Parallel()
	g := newGateway(t, rig.TraefikOptions{})
	l := newLAPI(t, rig.LAPIOptions{})
	l.ban(t, "127.0.0.66")
	with := func(name string, value any) object {
		config := l.config()
		config[name] = value
		return config
	}
	limit := func(more object) []object {
		more["name"] = "some"
		return []object{more}
	}
	tests := map[string]struct {
		config object
		want   []string
	}{
		"typo":      {object{"lappi": l.config()}, []string{"unknown option lappi: did you mean lapi?"}},
		"nested":    {object{"lapi": with("intervall", "1s")}, []string{"unknown option lapi.intervall: did you mean lapi.interval?"}},
		"old":       {object{"lapi": l.config(), "crowdsecLapiKey": "x"}, []string{"unknown option crowdsecLapiKey"}},
		"ratelimit": {object{"rateLimits": limit(object{"averge": 5, "average": 5})}, []string{"unknown option rateLimits[0].averge: did you mean rateLimits[0].average?"}},
		"mode":      {object{"lapi": l.config(), "mode": "dry-run"}, []string{`mode "dry-run": want enforce or observe`}},
		"nokey":     {object{"lapi": object{"url": l.URL}}, []string{"lapi has no credentials", "cscli bouncers add"}},
		"url":       {object{"lapi": with("url", "crowdsec:8080")}, []string{"lapi.url", "want http://, https:// or unix://"}},
		"interval":  {object{"lapi": with("interval", "10")}, []string{`lapi.interval "10": want a duration such as 10s`}},
		"proxies":   {object{"client": object{"trustedProxies": []string{"cloudflair"}}}, []string{`client.trustedProxies "cloudflair"`, "cloudflare or private"}},
		"header":    {object{"client": object{"header": "CF-Connecting-IP"}}, []string{"client.header", "client.trustedProxies"}},
		"zero":      {object{"rateLimits": limit(object{"average": 0})}, []string{"rateLimits[0]", "average 0"}},
		"two":       {object{"mode": "both", "log": object{"level": "loud"}}, []string{`mode "both"`, `log.level "loud"`}},
	}
	conf := site{plugins: map[string]object{"good": {"lapi": l.config()}}}
	for name, test := range tests {
		conf.plugins[name] = test.config
	}
	err := g.SetDynamic(soon(t, time.Minute), conf.yaml(g.origin.URL))
	if err == nil {
		t.Fatal("Traefik has no complaint, want one on each router but good and plain")
	}
	log := g.Log()
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			if got := g.ask(t, request{to: name}).status; got != 404 {
				t.Errorf("router %s answers %d, want 404 as without it", name, got)
			}
			said := ""
			for text := range strings.Lines(log) {
				var entry struct{ Level, RouterName, Error string }
				if unmarshal(text, &entry) == nil && entry.Level == "error" && entry.RouterName == name+"@file" {
					said = entry.Error
				}
			}
			for _, want := range append(test.want, name+"@file") {
				if !strings.Contains(said, want) {
					t.Errorf("Traefik's log says %q of router %s, want it to say %q", said, name, want)
				}
			}
			if strings.Contains(log, l.key) {
				t.Error("the log holds the API key")
			}
		})
	}
	t.Run("others serve", func(t *testing.T) {
		g.becomes(t, "127.0.0.66", "good", 403, promise)
		g.want(t, "127.0.0.1", 200, "good", "plain")
	})
	t.Run("mended", func(t *testing.T) {
		g.serve(t, site{plugins: map[string]object{"good": {"lapi": l.config()}, "typo": {"lapi": l.config()}}})
		g.want(t, "127.0.0.66", 403, "typo")
		g.want(t, "127.0.0.1", 200, "typo")
	})
}

// TestConnection: the ways to reach and to convince a real LAPI.
func TestConnection(t *testing.T) {
	t.Parallel()
	g := newGateway(t, rig.TraefikOptions{})
	secure := newLAPI(t, rig.LAPIOptions{TLS: true})
	local := newLAPI(t, rig.LAPIOptions{Socket: true, Chunked: true})
	for _, l := range []lapi{secure, local} {
		l.ban(t, "127.0.0.66", "127.0.66.0/24")
	}
	certFile, keyFile, err := secure.PKI.Client("edge", rig.BouncerOU)
	if err != nil {
		t.Fatal(err)
	}
	strangerCert, strangerKey, err := secure.PKI.Client("stranger", "strangers")
	if err != nil {
		t.Fatal(err)
	}
	read := func(file string) string {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	secret := filepath.Join(t.TempDir(), "key")
	write := func(text string) {
		if err := os.WriteFile(secret, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("not yet\n")
	config := func(url string, more object) object {
		more["url"], more["interval"] = url, interval.String()
		return object{"lapi": more}
	}
	tls := func(options ...string) object {
		section := object{}
		for i := 0; i < len(options); i += 2 {
			section[options[i]] = options[i+1]
		}
		return section
	}
	socket := "unix://" + local.SocketPath
	conf := site{plugins: map[string]object{
		"certificate": config(secure.URL, object{"tls": tls("caFile", secure.PKI.CAFile, "certFile", certFile, "keyFile", keyFile)}),
		"inline":      config(secure.URL, object{"tls": tls("ca", read(secure.PKI.CAFile), "cert", read(certFile), "key", read(keyFile))}),
		"authority":   config(secure.URL, object{"key": secure.key, "tls": tls("caFile", secure.PKI.CAFile)}),
		"socket":      config(socket, object{"key": local.key}),
		// And the ways not to.
		"stranger": config(secure.URL, object{"tls": tls("caFile", secure.PKI.CAFile, "certFile", strangerCert, "keyFile", strangerKey)}),
		"nobody":   config(secure.URL, object{"key": secure.newKey(t, "nobody")}),
		"rotated":  config(local.URL, object{"keyFile": secret}),
	}}
	conf.plugins["nobody"]["decisions"] = object{"failClosed": true}
	g.serve(t, conf)

	for _, router := range []string{"certificate", "inline", "authority", "socket"} {
		t.Run(router, func(t *testing.T) {
			took := g.becomes(t, "127.0.0.66", router, 403, promise)
			t.Logf("403 after %s", took.Round(time.Millisecond))
			g.want(t, "127.0.66.7", 403, router)
			g.want(t, "127.0.0.1", 200, router)
		})
	}
	t.Run("a stranger's certificate is refused and clients pass", func(t *testing.T) {
		g.want(t, "127.0.0.66", 200, "stranger")
		g.waitLine(t, "cannot pull decisions yet, asking again", "refuses the credentials")
	})
	t.Run("an unknown authority is not trusted and failClosed refuses", func(t *testing.T) {
		g.want(t, "127.0.0.1", 503, "nobody")
		g.waitLine(t, "cannot pull decisions yet, asking again", "certificate signed by unknown authority")
	})
	t.Run("a key file that changes takes effect by itself", func(t *testing.T) {
		g.want(t, "127.0.0.66", 200, "rotated")
		write(local.newKey(t, "rotated") + "\n")
		took := g.becomes(t, "127.0.0.66", "rotated", 403, 10*time.Second)
		t.Logf("403 after %s", took.Round(time.Millisecond))
	})
	t.Run("no secret is logged", func(t *testing.T) {
		log := g.Log()
		for _, secret := range []string{secure.key, local.key, "PRIVATE KEY"} {
			if strings.Contains(log, secret) {
				t.Errorf("the log holds %.12s...", secret)
			}
		}
	})
}

// TestConnectionChange: credentials and addresses of LAPI can be changed while
// all runs, and a banned client never finds the door open meanwhile.
func TestConnectionChange(t *testing.T) {
	t.Parallel()
	g := newGateway(t, rig.TraefikOptions{})
	l := newLAPI(t, rig.LAPIOptions{Socket: true})
	const old, young = "127.0.0.66", "127.0.0.67"
	l.ban(t, old)
	serve := func(config object) {
		g.serve(t, site{plugins: map[string]object{"guard": {"lapi": config}}})
	}
	serve(l.config())
	g.becomes(t, old, "guard", 403, promise)

	for _, test := range []struct {
		name    string
		config  object
		follows bool // whether LAPI can be heard this way
	}{
		{"another key", object{"url": l.URL, "key": l.newKey(t, "second"), "interval": "1s"}, true},
		{"a wrong key", object{"url": l.URL, "key": "wrong", "interval": "1s"}, false},
		{"the first key again", l.config(), true},
		{"another interval", object{"url": l.URL, "key": l.key, "interval": "1500ms"}, true},
		{"another way to the same LAPI", object{"url": "unix://" + l.SocketPath, "key": l.key, "interval": "1s"}, true},
		{"an address where nobody is", object{"url": "http://127.0.0.1:9", "key": l.key, "interval": "1s"}, false},
		{"back again", l.config(), true},
	} {
		t.Run(test.name, func(t *testing.T) {
			stop := g.watch(t, old, "guard", 403)
			serve(test.config)
			l.ban(t, young)
			if test.follows {
				// The new settings of a running engine wait a second.
				g.becomes(t, young, "guard", 403, 2*promise)
			} else {
				time.Sleep(promise)
			}
			stop()
			l.unban(t, young)
			if test.follows {
				g.becomes(t, young, "guard", 200, 2*promise)
			}
		})
	}
}

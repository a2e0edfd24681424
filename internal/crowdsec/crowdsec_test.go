package crowdsec

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/edgeward/edgeward/internal/config"
	"github.com/edgeward/edgeward/internal/lapi"
	"github.com/edgeward/edgeward/test/rig"
)

var agent = Agent{Type: "crowdsec-edgeward-test-bouncer", Version: "v1.2.3"}

func TestConfig(t *testing.T) {
	const key = "keyFile: /k"
	for _, c := range []struct {
		name, text string
		want       []string
	}{
		{"by key", "url: http://lapi:8080\n" + key, nil},
		{"by certificate", "url: https://lapi:8080/crowdsec/\ntls: {caFile: /ca, certFile: /c, keyFile: /k, serverName: lapi}", nil},
		{"by key over TLS", "url: https://lapi:8080\n" + key + "\ntls: {caFile: /ca}", nil},
		{"by socket", "url: unix:///run/crowdsec.sock\n" + key, nil},
		{"every time", "url: http://lapi\n" + key + "\ninterval: 1s\ntimeout: 2s\nresync: 10m", nil},
		{"nothing", "", []string{
			"lapi.url: is missing: give LAPI's address, for instance http://crowdsec-service.crowdsec:8080",
			"lapi.keyFile: is missing: name the file that holds the API key (cscli bouncers add NAME makes one), or give a client certificate in tls",
		}},
		{"no scheme", "url: lapi:8080\n" + key, []string{`lapi.url: "lapi:8080": want http://, https:// or unix://`}},
		{"no URL", "url: \"http://a b:x\"\n" + key, []string{`lapi.url: not a URL: want http://HOST:PORT, https://HOST:PORT or unix:///PATH/TO/SOCKET`}},
		{"no host", "url: http:///v1\n" + key, []string{`lapi.url: "http:///v1" has no host`}},
		{"a relative socket", "url: unix://run/crowdsec.sock\n" + key, []string{`lapi.url: "unix://run/crowdsec.sock": want unix:///PATH/TO/SOCKET`}},
		{"a password", "url: http://me:geheim@lapi\n" + key, []string{"lapi.url: must not hold a user or password: use keyFile"}},
		{"a query", "url: http://lapi/?x=y\n" + key, []string{`lapi.url: "http://lapi/?x=y" must end with its path`}},
		{"key and certificate", "url: https://lapi\n" + key + "\ntls: {certFile: /c, keyFile: /k}", []string{"lapi.keyFile: excludes a client certificate in tls: keep one of them"}},
		{"half a certificate", "url: https://lapi\n" + key + "\ntls: {certFile: /c}", []string{"lapi.tls.certFile: needs a keyFile beside it"}},
		{"the other half", "url: https://lapi\n" + key + "\ntls: {keyFile: /c}", []string{"lapi.tls.keyFile: needs a certFile beside it"}},
		{"TLS without TLS", "url: http://lapi\n" + key + "\ntls: {caFile: /ca}", []string{"lapi.tls: is of no use, url is not https"}},
		{"times", "url: http://lapi\n" + key + "\ninterval: 0s\ntimeout: 1h\nresync: 1s", []string{
			"lapi.interval: 0s: want 1s to 1h0m0s",
			"lapi.timeout: 1h0m0s: want 100ms to 5m0s",
			"lapi.resync: 1s: want 1m0s to 24h0m0s",
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			type file struct {
				LAPI Config `yaml:"lapi"`
			}
			text := "lapi:\n  " + strings.ReplaceAll(c.text, "\n", "\n  ") + "\n"
			got, err := config.Parse("f", []byte(text), file{Defaults()}, func(f *file, check *config.Check) { f.LAPI.Check(check, "lapi") })
			var says []string
			if err != nil {
				for line := range strings.Lines(err.Error()) {
					_, what, _ := strings.Cut(strings.TrimSpace(line), ": ")
					says = append(says, what)
				}
			}
			if diff := cmp.Diff(c.want, says); diff != "" {
				t.Error(diff)
			}
			if err == nil {
				if _, err := New(got.LAPI, agent, quiet()); err != nil {
					t.Errorf("passes its check, and then: %v", err)
				}
			}
		})
	}
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// logs is a log that a test may read while others write.
type logs struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// take returns what was logged since it was last asked.
func (l *logs) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.text.Reset()
	return l.text.String()
}

// folder is a directory with secrets.
type folder struct {
	t   *testing.T
	dir string
}

func (f folder) path(name string) config.File { return config.File(filepath.Join(f.dir, name)) }

func (f folder) write(name, text string) config.File {
	f.t.Helper()
	if err := os.WriteFile(string(f.path(name)), []byte(text), 0o600); err != nil {
		f.t.Fatal(err)
	}
	return f.path(name)
}

func (f folder) copy(name, from string) {
	f.t.Helper()
	text, err := os.ReadFile(from)
	if err != nil {
		f.t.Fatal(err)
	}
	f.write(name, string(text))
}

// ask sends one request and returns the answer's body, or the error.
func ask(t *testing.T, l *LAPI) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, l.URL+"/x", nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := l.Client.Do(req)
	if err != nil {
		return err.Error()
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return err.Error()
	}
	if req.Header.Get("X-Api-Key") != "" {
		t.Error("the caller's own request was changed")
	}
	return string(body)
}

// echo answers with the key and the path that it was asked for.
func echo(w http.ResponseWriter, r *http.Request) {
	_, _ = io.WriteString(w, r.Header.Get("X-Api-Key")+" "+r.URL.Path)
}

func TestKey(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(echo))
	defer server.Close()
	secrets := folder{t, t.TempDir()}
	log := &logs{}
	c := Defaults()
	c.URL, c.KeyFile = server.URL+"/crowdsec/", secrets.path("key")
	l, err := New(c, agent, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		name   string
		do     func()
		answer string // contained in it
		logged string // contained in it; "" for nothing
	}{
		{"no file yet", func() {}, "read lapi.keyFile: open " + string(c.KeyFile), ""},
		{"an empty file", func() { secrets.write("key", "\n") }, "it is empty", ""},
		{"the key", func() { secrets.write("key", "one\n") }, "one /crowdsec/x", ""},
		{"the same", func() {}, "one /crowdsec/x", ""},
		{"rotated", func() { secrets.write("key", "two") }, "two /crowdsec/x", "credentials changed"},
		{"half written", func() { secrets.write("key", "") }, "two /crowdsec/x", "keeping the last good ones"},
		{"still half written", func() {}, "two /crowdsec/x", ""},
		{"gone", func() { _ = os.Remove(string(c.KeyFile)) }, "two /crowdsec/x", "no such file"},
		{"not a key", func() { secrets.write("key", "geheim\nsecret") }, "two /crowdsec/x", "not an API key"},
		{"back as it was", func() { secrets.write("key", "two") }, "two /crowdsec/x", "can be read again"},
		{"and new", func() { secrets.write("key", "three") }, "three /crowdsec/x", "credentials changed"},
	} {
		step.do()
		if got := ask(t, l); !strings.Contains(got, step.answer) {
			t.Errorf("%s: %q, want %q", step.name, got, step.answer)
		}
		logged := log.take()
		if !strings.Contains(logged, step.logged) || (logged == "") != (step.logged == "") || strings.Contains(logged, "geheim") {
			t.Errorf("%s: logged %q, want %q", step.name, logged, step.logged)
		}
	}
}

// TestKeyStaysWithLAPI: a redirect must not carry the key to another host, and
// a proxy in the environment must not see it.
func TestKeyStaysWithLAPI(t *testing.T) {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		t.Errorf("%s got key %q", r.Host, r.Header.Get("X-Api-Key"))
	}))
	defer elsewhere.Close()
	t.Setenv("HTTP_PROXY", elsewhere.URL)
	server := httptest.NewServer(http.RedirectHandler(elsewhere.URL, http.StatusTemporaryRedirect))
	defer server.Close()
	c := Defaults()
	c.URL, c.KeyFile = server.URL, folder{t, t.TempDir()}.write("key", "geheim")
	l, err := New(c, agent, quiet())
	if err != nil {
		t.Fatal(err)
	}
	ask(t, l)
	if err := l.Usage(time.Now(), nil).push(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "307") {
		t.Errorf("a redirected report: %v", err)
	}
}

func TestSocket(t *testing.T) {
	secrets := folder{t, t.TempDir()}
	path := filepath.Join(secrets.dir, "lapi.sock")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := &httptest.Server{Listener: listener, Config: &http.Server{Handler: http.HandlerFunc(echo)}}
	server.Start()
	defer server.Close()
	c := Defaults()
	c.URL, c.KeyFile = "unix://"+path, secrets.write("key", "one")
	l, err := New(c, agent, quiet())
	if err != nil {
		t.Fatal(err)
	}
	if got := ask(t, l); got != "one /x" {
		t.Errorf("%q", got)
	}
}

// TestCertificates rotates the client's certificate and both sides' authority
// under a server that demands them.
func TestCertificates(t *testing.T) {
	authority := func() *rig.PKI {
		pki, err := rig.NewPKI(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		return pki
	}
	secrets := folder{t, t.TempDir()}
	issue := func(pki *rig.PKI, name string) {
		cert, key, err := pki.Client(name, rig.BouncerOU)
		if err != nil {
			t.Fatal(err)
		}
		secrets.copy("cert", cert)
		secrets.copy("key", key)
	}
	var mu sync.Mutex
	var serve tls.Config
	present := func(pki *rig.PKI) {
		cert, key, err := pki.Server("lapi")
		if err != nil {
			t.Fatal(err)
		}
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		mu.Lock()
		defer mu.Unlock()
		serve = tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: pki.Pool(), ClientAuth: tls.RequireAndVerifyClientCert}
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.TLS.PeerCertificates[0].Subject.CommonName)
	}))
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	server.TLS = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		mu.Lock()
		defer mu.Unlock()
		return serve.Clone(), nil
	}}
	first, second := authority(), authority()
	present(first)
	server.StartTLS()
	defer server.Close()

	log := &logs{}
	c := Defaults()
	c.URL = server.URL
	c.TLS = TLS{CAFile: secrets.path("ca"), CertFile: secrets.path("cert"), KeyFile: secrets.path("key")}
	l, err := New(c, agent, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		name   string
		do     func()
		answer string
		logged string
	}{
		{"an authority that is none", func() { secrets.write("ca", "x"); issue(first, "one") }, "holds no PEM certificate", ""},
		{"as it should be", func() { secrets.copy("ca", first.CAFile) }, "one", ""},
		{"a new certificate, at once", func() { issue(first, "two") }, "two", "credentials changed"},
		{"half a rotation", func() {
			cert, _, err := first.Client("three", rig.BouncerOU)
			if err != nil {
				t.Fatal(err)
			}
			secrets.copy("cert", cert)
		}, "two", "keeping the last good ones"},
		{"the whole", func() { issue(first, "three") }, "three", "credentials changed"},
		{"an unknown server", func() { server.CloseClientConnections(); present(second) }, "certificate signed by unknown authority", ""},
		{"known again", func() { secrets.copy("ca", second.CAFile); issue(second, "four") }, "four", "credentials changed"},
	} {
		step.do()
		if got := ask(t, l); !strings.Contains(got, step.answer) {
			t.Errorf("%s: %q, want %q", step.name, got, step.answer)
		}
		if logged := log.take(); !strings.Contains(logged, step.logged) || step.logged == "" && logged != "" || strings.Contains(logged, "BEGIN") {
			t.Errorf("%s: logged %q, want %q", step.name, logged, step.logged)
		}
	}
}

// TestStream is the stream of internal/lapi over the client.
func TestStream(t *testing.T) {
	asked := make(chan *http.Request, 10)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- r
		_, _ = io.WriteString(w, `{"new":[{"id":1,"value":"192.0.2.1"}],"deleted":null}`)
	}))
	defer server.Close()
	c := Defaults()
	c.URL, c.KeyFile = server.URL, folder{t, t.TempDir()}.write("key", "one")
	l, err := New(c, agent, quiet())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	added := 0
	l.Stream([]string{"ip", "range"}, lapi.Sink{
		Begin:      func(bool, time.Time) {},
		Add:        func(*lapi.Row) { added++ },
		Delete:     func(int) {},
		Unreadable: func() {},
		Commit:     func() bool { cancel(); return false },
	}, quiet()).Run(ctx)
	r := <-asked
	if added != 1 || r.Header.Get("X-Api-Key") != "one" || r.UserAgent() != "crowdsec-edgeward-test-bouncer/v1.2.3" || r.URL.Query().Get("scopes") != "ip,range" {
		t.Errorf("%d added; asked %s as %s", added, r.URL, r.UserAgent())
	}
}

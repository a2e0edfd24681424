package crowdsec

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/edgeward/edgeward/internal/config"
)

// credentials is a transport that reads its credentials from their files for
// every request. A request comes every few seconds, so it costs nothing, needs
// no watcher, and works for mounts of every kind.
type credentials struct {
	config Config
	socket string
	log    *slog.Logger

	mu      sync.Mutex
	have    contents        // that worked last
	inner   *http.Transport // made from have
	trouble string          // why the files cannot be used now, as logged
}

// contents is what the files hold. It is comparable: a change is a change of
// content, whatever the file system says of times.
type contents struct{ key, ca, cert, certKey config.Secret }

func newCredentials(c Config, socket string, log *slog.Logger) *credentials {
	return &credentials{config: c, socket: socket, log: log}
}

// RoundTrip sends a request with the credentials of this moment.
func (t *credentials) RoundTrip(req *http.Request) (*http.Response, error) {
	inner, key, err := t.current()
	if err != nil {
		if req.Body != nil {
			_ = req.Body.Close()
		}
		return nil, err
	}
	if t.config.KeyFile != "" {
		req = req.Clone(req.Context()) // a transport must not change what it is given
		req.Header.Set("X-Api-Key", key.Reveal())
	}
	return inner.RoundTrip(req)
}

// CloseIdleConnections is what http.Client calls.
func (t *credentials) CloseIdleConnections() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.inner != nil {
		t.inner.CloseIdleConnections()
	}
}

// current returns the connections and the key to use: those of the files, or
// the last good ones while the files cannot be used.
func (t *credentials) current() (*http.Transport, config.Secret, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now, err := t.read()
	if err == nil && (t.inner == nil || now != t.have) {
		err = t.use(now)
	}
	switch {
	case err != nil && t.inner == nil:
		return nil, config.Secret{}, err
	case err != nil && err.Error() != t.trouble:
		t.trouble = err.Error()
		t.log.Warn("cannot read credentials, keeping the last good ones", "err", err)
	case err == nil && t.trouble != "":
		t.trouble = ""
		t.log.Info("credentials can be read again")
	}
	return t.inner, t.have.key, nil
}

func (t *credentials) read() (contents, error) {
	c, errs := t.config.read()
	if len(errs) > 0 {
		return contents{}, errs[0]
	}
	return c, nil
}

// read reads the files, as far as that can be done.
func (c *Config) read() (have contents, errs []error) {
	for _, f := range []struct {
		name string
		file config.File
		into *config.Secret
	}{
		{"keyFile", c.KeyFile, &have.key},
		{"tls.caFile", c.TLS.CAFile, &have.ca},
		{"tls.certFile", c.TLS.CertFile, &have.cert},
		{"tls.keyFile", c.TLS.KeyFile, &have.certKey},
	} {
		if f.file == "" {
			continue
		}
		text, err := f.file.Read()
		if err != nil {
			errs = append(errs, fmt.Errorf("read lapi.%s: %w", f.name, err))
		}
		*f.into = text
	}
	return have, errs
}

// CheckFiles reads the files that c names and says what is wrong with each.
func (c *Config) CheckFiles() []error {
	have, errs := c.read()
	if len(errs) > 0 {
		return errs
	}
	if err := headerSafe(have.key.Reveal()); err != nil {
		errs = append(errs, fmt.Errorf("read lapi.keyFile: %s: %w", c.KeyFile, err))
	}
	if _, err := (&credentials{config: *c}).connections(have); err != nil {
		errs = append(errs, err)
	}
	return errs
}

// use makes the connections for new credentials. With other certificates, what
// was connected under the old ones is let go: a connection that is kept alive
// would otherwise outlive them by months.
func (t *credentials) use(now contents) error {
	if err := headerSafe(now.key.Reveal()); err != nil {
		return fmt.Errorf("read lapi.keyFile: %s: %w", t.config.KeyFile, err)
	}
	before := t.have
	before.key = now.key
	if t.inner == nil || before != now {
		inner, err := t.connections(now)
		if err != nil {
			return err
		}
		if t.inner != nil {
			t.inner.CloseIdleConnections()
		}
		t.inner = inner
	}
	if t.have != (contents{}) {
		t.log.Info("credentials changed, using the new ones")
	}
	t.have = now
	return nil
}

// headerSafe refuses a key that net/http would refuse: its error repeats it.
func headerSafe(key string) error {
	for _, r := range key {
		if r <= ' ' || r > '~' {
			return errors.New("it holds more than one line of plain text: this is not an API key")
		}
	}
	return nil
}

func (t *credentials) connections(c contents) (*http.Transport, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: t.config.TLS.ServerName}
	if t.config.TLS.CAFile != "" {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM([]byte(c.ca.Reveal())) {
			return nil, fmt.Errorf("read lapi.tls.caFile: %s holds no PEM certificate", t.config.TLS.CAFile)
		}
	}
	if t.config.TLS.CertFile != "" {
		pair, err := tls.X509KeyPair([]byte(c.cert.Reveal()), []byte(c.certKey.Reveal()))
		if err != nil {
			return nil, fmt.Errorf("read lapi.tls client certificate: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	dialer := &net.Dialer{Timeout: t.config.Timeout}
	return &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if t.socket != "" {
				network, addr = "unix", t.socket
			}
			return dialer.DialContext(ctx, network, addr)
		},
		TLSClientConfig:     config,
		TLSHandshakeTimeout: t.config.Timeout,
		MaxIdleConnsPerHost: 1,
		// Longer than the pause between pulls, shorter than that between
		// reports of usage: a report is not sent again over a new connection
		// when the server has just closed the old one.
		IdleConnTimeout: min(2*t.config.Interval+30*time.Second, 5*time.Minute),
	}, nil
}

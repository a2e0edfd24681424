package plugin

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
)

// tlsSource is a TLSConfig understood. Each part is PEM, given itself or by
// file.
type tlsSource struct {
	ca, caFile, cert, certFile, key, keyFile, serverName string
}

// connect returns the HTTP client for a source, and what adds the API key to a
// request and tells learn a hash of the credentials. Nothing is read or dialled
// before the first request, and key files are read for each, so that a rotated
// secret takes effect by itself.
func connect(s source, learn func(secret string)) (*http.Client, func(*http.Request) error) {
	dialer := &net.Dialer{Timeout: s.timeout}
	transport := &http.Transport{
		MaxIdleConnsPerHost:   1,
		IdleConnTimeout:       2*s.interval + 30*time.Second,
		TLSHandshakeTimeout:   s.timeout,
		ExpectContinueTimeout: time.Second,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if s.socket != "" {
				return dialer.DialContext(ctx, "unix", s.socket)
			}
			return dialer.DialContext(ctx, network, addr)
		},
		DialTLSContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			config, err := tlsConfig(s.tls, addr)
			if err != nil {
				return nil, err
			}
			conn, err := dialer.DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			client := tls.Client(conn, config)
			if err := client.HandshakeContext(ctx); err != nil {
				_ = conn.Close()
				return nil, err
			}
			return client, nil
		},
	}
	client := &http.Client{
		Transport: transport,
		// LAPI never redirects; following one would carry the key away.
		// (Yaegi misplaces the parameters of a literal that leaves them unnamed.)
		CheckRedirect: func(_ *http.Request, _ []*http.Request) error { return http.ErrUseLastResponse },
	}
	return client, func(req *http.Request) error {
		if s.key == "" && s.keyFile == "" {
			cert, err := pemOf("cert", s.tls.cert, s.tls.certFile)
			if err == nil {
				learn(hashed(string(cert)))
			}
			return err
		}
		key := s.key
		if s.keyFile != "" {
			text, err := os.ReadFile(s.keyFile)
			if err != nil {
				return fmt.Errorf("read lapi.keyFile%s: %w", shownPath(s.keyFile), reasonOf(err))
			}
			key = string(text)
		}
		key = strings.TrimSpace(key)
		if key == "" {
			return errors.New("read lapi key: it is empty")
		}
		learn(hashed(key))
		req.Header.Set("X-Api-Key", key)
		return nil
	}
}

// reasonOf returns why a file cannot be read, without its name: somebody may
// have written the secret itself where its file's name belongs.
func reasonOf(err error) error {
	if path, ok := err.(*os.PathError); ok {
		return path.Err
	}
	return err
}

// shownPath is a file's name for an error, after a space: one that begins with a
// directory of this machine, which no secret does by chance.
func shownPath(name string) string {
	parts := strings.Split(name, "/")
	if len(parts) < 3 || parts[0] != "" || parts[1] == "" {
		return ""
	}
	if info, err := os.Stat("/" + parts[1]); err != nil || !info.IsDir() {
		return ""
	}
	return " " + name
}

func tlsConfig(t tlsSource, addr string) (*tls.Config, error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		host = addr
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: host}
	if t.serverName != "" {
		config.ServerName = t.serverName
	}
	ca, err := pemOf("ca", t.ca, t.caFile)
	if err != nil {
		return nil, err
	}
	if len(ca) > 0 {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(ca) {
			return nil, errors.New("read lapi.tls.ca: no PEM certificate in it")
		}
	}
	cert, err := pemOf("cert", t.cert, t.certFile)
	if err != nil {
		return nil, err
	}
	if len(cert) > 0 {
		key, err := pemOf("key", t.key, t.keyFile)
		if err != nil {
			return nil, err
		}
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			return nil, fmt.Errorf("read lapi.tls client certificate: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}

func pemOf(what, text, file string) ([]byte, error) {
	if file == "" {
		return []byte(text), nil
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read lapi.tls.%sFile%s: %w", what, shownPath(file), reasonOf(err))
	}
	return b, nil
}

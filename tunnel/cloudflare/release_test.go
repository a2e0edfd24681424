package cloudflare

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/cloudflare/cloudflared/connection"
	"github.com/cloudflare/cloudflared/tunnelrpc"
	"github.com/cloudflare/cloudflared/tunnelrpc/pogs"
	"github.com/google/uuid"
)

// A fickle edge does over HTTP/2 what the emulator does not: it ends control
// streams and keeps connections, and opens more of them than there may be.
type fickle struct {
	listener net.Listener
	accepted chan *fickleConn
}

type fickleConn struct {
	client  *http.ClientConn
	release func() // ends the control stream
}

func newFickle(t *testing.T) (*fickle, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"h2.cftunnel.com"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	f := &fickle{listener, make(chan *fickleConn, 8)}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go f.serve(conn)
		}
	}()
	return f, roots
}

func (f *fickle) serve(conn net.Conn) {
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true) // TLS is under it
	transport := &http.Transport{Protocols: protocols, DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil }}
	client, err := transport.NewClientConn(context.Background(), "http", "edge:80")
	if err != nil {
		return
	}
	body, control, err := openControl(client)
	if err != nil {
		return
	}
	registered := make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		<-registered
		f.accepted <- &fickleConn{client, func() { cancel(); _ = control.Close(); _ = body.Close() }}
	}()
	_ = tunnelrpc.NewRegistrationServer(registrar{registered}).Serve(ctx, struct {
		io.ReadCloser
		io.Writer
	}{body, control})
}

func openControl(client *http.ClientConn) (io.ReadCloser, *io.PipeWriter, error) {
	out, in := io.Pipe()
	request, err := http.NewRequest(http.MethodGet, "http://edge/", out)
	if err != nil {
		return nil, nil, err
	}
	request.Header.Set(connection.InternalUpgradeHeader, connection.ControlStreamUpgrade)
	response, err := client.RoundTrip(request)
	if err != nil {
		return nil, nil, err
	}
	return response.Body, in, nil
}

type registrar struct{ registered chan struct{} }

func (r registrar) RegisterConnection(context.Context, pogs.TunnelAuth, uuid.UUID, byte, *pogs.ConnectionOptions) (*pogs.ConnectionDetails, error) {
	close(r.registered)
	return &pogs.ConnectionDetails{UUID: uuid.New(), Location: "xxx01", TunnelIsRemotelyManaged: true}, nil
}
func (registrar) UnregisterConnection(context.Context)                   {}
func (registrar) UpdateLocalConfiguration(context.Context, []byte) error { return nil }

// TestReleasedConnection is about an edge that ends the control stream of a
// connection and not the connection: another is made beside it, and what is in
// flight on the first is served to its end.
func TestReleasedConnection(t *testing.T) {
	t.Parallel()
	edge, roots := newFickle(t)
	c := New(Options{Name: "home", Log: slog.New(slog.DiscardHandler), Handler: originService(t)})
	quick(&c.pace)
	err := c.Apply(t.Context(), Credentials{Account: someAccount, Tunnel: uuid.New(), Secret: make([]byte, 32)},
		Settings{Protocol: HTTP2, Connections: 1, Edge: []string{edge.listener.Addr().String()}, RootCAs: roots, LameDuck: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Drain(t.Context()) }()
	var first *fickleConn
	select {
	case first = <-edge.accepted:
	case <-time.After(5 * time.Second):
		t.Fatalf("not registered: %+v", c.Status())
	}

	// Whoever could open a second control stream would be told the secret.
	if body, _, err := openControl(first.client); err == nil {
		if text, err := io.ReadAll(body); len(text) > 0 || err != nil {
			t.Errorf("a second control stream said %q, %v", text, err)
		}
	}

	slow := make(chan error, 1)
	go func() {
		request, _ := http.NewRequest(http.MethodGet, "http://app.example.org/slow?d=1s", nil)
		response, err := first.client.RoundTrip(request)
		if err == nil {
			var text []byte
			if text, err = io.ReadAll(response.Body); string(text) != "done" {
				err = errors.Join(err, errors.New(string(text)))
			}
		}
		slow <- err
	}()
	eventually(t, "the request arrives", 5*time.Second, func() bool { return c.Status().Totals.Requests == 1 })
	first.release()
	select {
	case <-edge.accepted:
	case <-time.After(5 * time.Second):
		t.Fatal("no other connection was made")
	}
	if len(slow) > 0 {
		t.Error("only after the request had ended")
	}
	if err := <-slow; err != nil {
		t.Errorf("the request in flight: %v", err)
	}
	eventually(t, "the first ends", 5*time.Second, func() bool { return first.client.Err() != nil })
}

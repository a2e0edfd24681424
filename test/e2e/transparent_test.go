package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/edgeward/edgeward/test/rig"
)

// big is the size of the large transfers, in bytes.
const big = 100 << 20

// talker is an origin that uses HTTP to its corners.
func talker() http.Handler {
	mux := http.NewServeMux()
	// In the way of gRPC: each piece is answered as it comes, the status
	// follows in a trailer.
	mux.HandleFunc("/grpc", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set("Trailer", "Grpc-Status")
		http.NewResponseController(w).Flush()
		piece := make([]byte, 1024)
		for {
			n, err := r.Body.Read(piece)
			w.Write(piece[:n])
			http.NewResponseController(w).Flush()
			if err != nil {
				break
			}
		}
		w.Header().Set("Grpc-Status", "0")
		w.Header().Set(http.TrailerPrefix+"Grpc-Message", "unannounced")
	})
	mux.HandleFunc("/upload", func(w http.ResponseWriter, r *http.Request) {
		sum := sha256.New()
		n, err := io.Copy(sum, r.Body)
		fmt.Fprintf(w, "%d bytes, %x, error %v, length %d, encoding %q, trailer %q\n",
			n, sum.Sum(nil), err, r.ContentLength, r.TransferEncoding, r.Trailer.Get("Sum"))
	})
	mux.HandleFunc("/download", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(big))
		io.Copy(w, io.LimitReader(pattern{}, big))
	})
	mux.HandleFunc("/hints", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Link", "</style.css>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		io.WriteString(w, "after the hints")
	})
	mux.HandleFunc("/headers", func(w http.ResponseWriter, r *http.Request) {
		w.Header()["Set-Cookie"] = []string{"a=1", "b=2; HttpOnly"}
		w.Header()["x-lower"] = []string{"as it was written"}
		w.Header().Set("Content-Encoding", "br")
		w.Header().Set("Content-Length", "7")
		w.WriteHeader(http.StatusPartialContent)
		if r.Method != http.MethodHead {
			io.WriteString(w, "content")
		}
	})
	mux.HandleFunc("/empty", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusNoContent) })
	mux.HandleFunc("/cut", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(1<<20))
		io.Copy(w, io.LimitReader(pattern{}, 1<<19))
		panic(http.ErrAbortHandler)
	})
	return mux
}

// pattern is an endless body that tells when a piece is missing or doubled.
type pattern struct{}

func (pattern) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(i * 7 >> 3)
	}
	return len(p), nil
}

// heard is all that a client notices of an exchange.
type heard struct {
	Err     string
	Proto   string
	Status  int
	Header  http.Header
	Trailer http.Header
	Length  int64
	Size    int64
	Sum     string
	Said    string // what fits on a line of it
	Interim []int  // 1xx statuses before the answer
}

// hear makes a request and notes everything about the answer but its date.
func hear(client *http.Client, req *http.Request) heard {
	var h heard
	trace := &httptrace.ClientTrace{Got1xxResponse: func(code int, _ textproto.MIMEHeader) error {
		h.Interim = append(h.Interim, code)
		return nil
	}}
	resp, err := client.Do(req.WithContext(httptrace.WithClientTrace(req.Context(), trace)))
	if err != nil {
		h.Err = "no answer"
		return h
	}
	defer resp.Body.Close()
	sum := sha256.New()
	var start bytes.Buffer
	size, err := io.Copy(io.MultiWriter(sum, &start), resp.Body)
	if err != nil {
		h.Err = err.Error()
	}
	resp.Header.Del("Date")
	h.Proto, h.Status, h.Header, h.Trailer = resp.Proto, resp.StatusCode, resp.Header, resp.Trailer
	h.Length, h.Size, h.Sum = resp.ContentLength, size, hex.EncodeToString(sum.Sum(nil))
	h.Said = string(start.Bytes()[:min(200, start.Len())])
	return h
}

// TestTransparent: what is let through goes through as if the plugin were not
// there. Every exchange is made through a router without and one with the
// plugin, with decisions and limits, and must be heard alike.
func TestTransparent(t *testing.T) {
	g := newGateway(t, rig.TraefikOptions{TLS: true})
	l := newLAPI(t, rig.LAPIOptions{})
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	origin := httptest.NewUnstartedServer(talker())
	origin.Config.Protocols = protocols
	origin.Start()
	t.Cleanup(origin.Close)
	h2c := strings.Replace(origin.URL, "http://", "h2c://", 1)
	g.serve(t, site{
		plugins: map[string]object{"with": {
			"lapi":       l.config(),
			"decisions":  object{"failClosed": true},
			"rateLimits": []object{{"name": "plenty", "average": 100000, "hideHeaders": true}, {"name": "sign-in", "average": 1, "match": object{"pathPrefixes": []string{"/never"}}}},
		}},
		routers: map[string][]string{"without": nil, "talk-without": nil, "talk-with": {"with"}, "h2c-without": nil, "h2c-with": {"with"}},
		origins: map[string]string{"talk-without": origin.URL, "talk-with": origin.URL, "h2c-without": h2c, "h2c-with": h2c},
	})
	l.ban(t, "127.9.9.9", "192.0.2.0/24")
	g.becomes(t, "127.9.9.9", "with", 403, promise)

	client := func(configure func(*http.Transport)) *http.Client {
		transport := &http.Transport{
			TLSClientConfig:       &tls.Config{InsecureSkipVerify: true}, // Traefik's own making
			ExpectContinueTimeout: 5 * time.Second,
			DisableCompression:    true,
		}
		if configure != nil {
			configure(transport)
		}
		t.Cleanup(transport.CloseIdleConnections)
		return &http.Client{Transport: transport, Timeout: time.Minute}
	}
	one := client(nil)
	two := client(func(tr *http.Transport) { tr.ForceAttemptHTTP2 = true })
	clear := client(func(tr *http.Transport) {
		tr.Protocols = new(http.Protocols)
		tr.Protocols.SetUnencryptedHTTP2(true)
	})
	send := func(method, base, to, path string, body io.Reader, header ...string) *http.Request {
		req, err := http.NewRequestWithContext(t.Context(), method, base+path, body)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = to + ".test"
		for i := 0; i < len(header); i += 2 {
			req.Header.Add(header[i], header[i+1])
		}
		return req
	}
	unsized := func(n int64) io.Reader { return io.MultiReader(io.LimitReader(pattern{}, n)) }

	for _, test := range []struct {
		name string
		hear func(t *testing.T, with string) any
		want int // 0: whatever it is without the plugin
	}{
		{"GET", func(t *testing.T, with string) any {
			return hear(one, send("GET", g.URL, "talk-"+with, "/headers", nil))
		}, 206},
		{"HEAD", func(t *testing.T, with string) any {
			return hear(one, send("HEAD", g.URL, "talk-"+with, "/headers", nil))
		}, 206},
		{"an answer without a body", func(t *testing.T, with string) any {
			return hear(one, send("DELETE", g.URL, "talk-"+with, "/empty", nil))
		}, 204},
		{"an error of the origin", func(t *testing.T, with string) any {
			return hear(one, send("OPTIONS", g.URL, "talk-"+with, "/none/../such", nil))
		}, 0},
		{"an answer cut short", func(t *testing.T, with string) any {
			h := hear(one, send("GET", g.URL, "talk-"+with, "/cut", nil))
			// How much of it arrives is a matter of chance.
			return []any{h.Status, h.Err}
		}, 0},
		{"early hints", func(t *testing.T, with string) any {
			h := hear(one, send("GET", g.URL, "talk-"+with, "/hints", nil))
			if len(h.Interim) != 1 || h.Interim[0] != 103 {
				t.Errorf("%s the plugin the interim answers are %d, want one 103", with, h.Interim)
			}
			return h
		}, 200},
		{"100 MB down", func(t *testing.T, with string) any {
			h := hear(one, send("GET", g.URL, "talk-"+with, "/download", nil))
			if h.Size != big {
				t.Errorf("%s the plugin %d bytes arrived, want %d", with, h.Size, big)
			}
			return h
		}, 200},
		{"100 MB down over HTTP/2", func(t *testing.T, with string) any {
			return hear(two, send("GET", g.TLSURL, "h2c-"+with, "/download", nil))
		}, 200},
		{"100 MB up, of unknown length", func(t *testing.T, with string) any {
			return hear(one, send("POST", g.URL, "talk-"+with, "/upload", unsized(big)))
		}, 200},
		{"an upload over HTTP/2 and TLS", func(t *testing.T, with string) any {
			h := hear(two, send("PUT", g.TLSURL, "h2c-"+with, "/upload", unsized(10<<20)))
			if h.Proto != "HTTP/2.0" {
				t.Errorf("%s the plugin the protocol is %q, want HTTP/2.0", with, h.Proto)
			}
			return h
		}, 200},
		{"a request with a trailer", func(t *testing.T, with string) any {
			req := send("POST", g.URL, "talk-"+with, "/upload", unsized(1<<20))
			req.Trailer = http.Header{"Sum": {"of what came before"}}
			return hear(one, req)
		}, 200},
		{"Expect: 100-continue", func(t *testing.T, with string) any {
			h := hear(one, send("POST", g.URL, "talk-"+with, "/upload", bytes.NewReader(make([]byte, 5000)), "Expect", "100-continue"))
			if len(h.Interim) != 1 || h.Interim[0] != 100 {
				t.Errorf("%s the plugin the interim answers are %d, want one 100", with, h.Interim)
			}
			return h
		}, 200},
		{"a gRPC call over h2c", func(t *testing.T, with string) any {
			return grpc(t, clear, send("POST", g.URL, "h2c-"+with, "/grpc", nil, "Te", "trailers", "Content-Type", "application/grpc"))
		}, 0},
		{"a gRPC call over TLS", func(t *testing.T, with string) any {
			return grpc(t, two, send("POST", g.TLSURL, "h2c-"+with, "/grpc", nil, "Te", "trailers", "Content-Type", "application/grpc"))
		}, 0},
		{"server-sent events", func(t *testing.T, with string) any {
			return events(t, one, send("GET", g.URL, with, "/sse", nil, "Accept", "text/event-stream"))
		}, 0},
		{"server-sent events over HTTP/2", func(t *testing.T, with string) any {
			return events(t, two, send("GET", g.TLSURL, with, "/sse", nil, "Accept", "text/event-stream"))
		}, 0},
		{"a WebSocket", func(t *testing.T, with string) any {
			return webSocket(t, g.URL, with+".test")
		}, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			began := time.Now()
			without := test.hear(t, "without")
			took := time.Since(began)
			with := test.hear(t, "with")
			t.Logf("without the plugin %s, with it %s", took.Round(time.Millisecond), (time.Since(began) - took).Round(time.Millisecond))
			if diff := cmp.Diff(without, with); diff != "" {
				t.Errorf("the plugin changes the exchange (- without, + with):\n%s", diff)
			}
			if h, ok := without.(heard); ok && test.want != 0 && h.Status != test.want {
				t.Errorf("status without the plugin is %d, want %d: %+v", h.Status, test.want, h)
			}
		})
	}

	t.Run("a refused client is not asked for its body", func(t *testing.T) {
		banned := client(func(tr *http.Transport) {
			tr.DialContext = (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 9, 9, 9)}}).DialContext
		})
		h := hear(banned, send("POST", g.URL, "talk-with", "/upload", bytes.NewReader(make([]byte, 5000)), "Expect", "100-continue"))
		if h.Status != 403 || h.Interim != nil {
			t.Errorf("answer is %d after interim answers %d, want 403 after none", h.Status, h.Interim)
		}
	})
}

// grpc exchanges three messages, each only once the one before is answered,
// and returns what was said, header and trailer.
func grpc(t *testing.T, client *http.Client, req *http.Request) any {
	t.Helper()
	reader, writer := io.Pipe()
	req.Body, req.ContentLength = reader, -1
	ctx, cancel := context.WithTimeout(req.Context(), 10*time.Second)
	defer cancel()
	resp, err := client.Do(req.WithContext(ctx))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var said []string
	for _, message := range []string{"first", "second", "third"} {
		go io.WriteString(writer, message)
		echo := make([]byte, len(message))
		if _, err := io.ReadFull(resp.Body, echo); err != nil {
			t.Fatalf("read the answer to message %q: %v", message, err)
		}
		said = append(said, string(echo))
	}
	writer.Close()
	rest, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("read the end of the call: %v", err)
	}
	if got := resp.Trailer.Get("Grpc-Status"); got != "0" {
		t.Errorf("trailer Grpc-Status is %q, want 0", got)
	}
	resp.Header.Del("Date")
	return []any{resp.Proto, resp.StatusCode, resp.Header, said, string(rest), resp.Trailer}
}

// events reads ten events, which the origin sends 10 ms apart, and fails the
// test if they came in a heap.
func events(t *testing.T, client *http.Client, req *http.Request) any {
	t.Helper()
	ctx, cancel := context.WithTimeout(req.Context(), 10*time.Second)
	defer cancel()
	resp, err := client.Do(req.WithContext(ctx))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var said []string
	var first time.Time
	lines := bufio.NewScanner(resp.Body)
	for len(said) < 10 && lines.Scan() {
		if lines.Text() == "" {
			continue
		}
		if said = append(said, lines.Text()); len(said) == 1 {
			first = time.Now()
		}
	}
	if spread := time.Since(first); len(said) != 10 || spread < 50*time.Millisecond {
		t.Errorf("%d events came within %s, want 10 over some 90ms", len(said), spread)
	}
	resp.Header.Del("Date")
	return []any{resp.Proto, resp.StatusCode, resp.Header, said}
}

// webSocket makes a handshake, says things in both directions and leaves.
func webSocket(t *testing.T, url, host string) any {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	key := base64.StdEncoding.EncodeToString([]byte("sixteen bytes ok"))
	fmt.Fprintf(conn, "GET /ws HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\n\r\n", host, key)
	reader := bufio.NewReader(conn)
	resp, err := http.ReadResponse(reader, nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("answer to the handshake is %d, want 101", resp.StatusCode)
	}
	for _, size := range []int{1, 125, 100000} {
		message := make([]byte, size)
		pattern{}.Read(message)
		go conn.Write(message)
		echo := make([]byte, size)
		if _, err := io.ReadFull(reader, echo); err != nil {
			t.Fatalf("read an echo of %d bytes: %v", size, err)
		}
		if !bytes.Equal(echo, message) {
			t.Errorf("echo of %d bytes is not what was sent", size)
		}
	}
	resp.Header.Del("Date")
	return []any{resp.StatusCode, resp.Header}
}

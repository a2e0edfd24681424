package rig

import (
	"bufio"
	"context"
	"crypto/sha1"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// Origin is an HTTP server that stands behind the gateway, in the test's own
// process. It speaks HTTP/1.1 and h2c, and answers
//
//	/ws      with a WebSocket handshake, then echoes every byte: it does not look
//	         at frames, and a client must not mask what it wants to recognise
//	/sse     with an event every 10 ms, until the client leaves
//	/stream  by reading the body, saying after each piece how much has come
//	/slow    after the time in ?for= (a duration such as 500ms; one second)
//	others   with what arrived, as JSON: see Arrived
type Origin struct {
	URL string

	requests atomic.Int64
	server   *http.Server
}

// Arrived is a request as the origin saw it.
type Arrived struct {
	Method string      `json:"method"`
	Host   string      `json:"host"`
	URL    string      `json:"url"`
	Proto  string      `json:"proto"`
	Remote string      `json:"remote"`
	Header http.Header `json:"header"`
}

// StartOrigin starts an origin on loopback; it ends with ctx or with Close.
func StartOrigin(ctx context.Context) (*Origin, error) {
	o := new(Origin)
	mux := http.NewServeMux()
	mux.HandleFunc("/", o.echo)
	mux.HandleFunc("/ws", o.webSocket)
	mux.HandleFunc("/sse", o.events)
	mux.HandleFunc("/stream", o.stream)
	mux.HandleFunc("/slow", o.slow)
	counted := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		o.requests.Add(1)
		mux.ServeHTTP(w, r)
	})
	var err error
	o.server, o.URL, err = serve(ctx, counted)
	return o, err
}

// Requests returns how many requests have reached the origin.
func (o *Origin) Requests() int64 { return o.requests.Load() }

// Close ends the origin and every connection to it.
func (o *Origin) Close() error { return o.server.Close() }

func (o *Origin) echo(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(Arrived{
		Method: r.Method, Host: r.Host, URL: r.URL.String(), Proto: r.Proto, Remote: r.RemoteAddr, Header: r.Header,
	})
}

func (o *Origin) webSocket(w http.ResponseWriter, r *http.Request) {
	hijacker, ok := w.(http.Hijacker)
	if !ok || !strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
		http.Error(w, "a WebSocket handshake belongs here", http.StatusUpgradeRequired)
		return
	}
	conn, buffered, err := hijacker.Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer conn.Close()
	// The key's magic companion is RFC 6455's.
	accept := sha1.Sum([]byte(r.Header.Get("Sec-WebSocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n",
		base64.StdEncoding.EncodeToString(accept[:]))
	io.Copy(conn, bufio.NewReader(buffered))
}

func (o *Origin) events(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream")
	control := http.NewResponseController(w)
	for i := 0; ; i++ {
		fmt.Fprintf(w, "data: %d\n\n", i)
		if control.Flush() != nil || sleep(r.Context(), 10*time.Millisecond) != nil {
			return
		}
	}
}

func (o *Origin) stream(w http.ResponseWriter, r *http.Request) {
	control := http.NewResponseController(w)
	// Over HTTP/2 this is how it is anyway.
	_ = control.EnableFullDuplex()
	piece := make([]byte, 32<<10)
	total := 0
	for {
		n, err := r.Body.Read(piece)
		total += n
		if n > 0 {
			fmt.Fprintln(w, total)
			if control.Flush() != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func (o *Origin) slow(w http.ResponseWriter, r *http.Request) {
	wait := time.Second
	if asked := r.URL.Query().Get("for"); asked != "" {
		var err error
		if wait, err = time.ParseDuration(asked); err != nil {
			http.Error(w, strconv.Quote(asked)+" is no duration", http.StatusBadRequest)
			return
		}
	}
	if sleep(r.Context(), wait) == nil {
		o.echo(w, r)
	}
}

// serve runs handler on a free loopback port until ctx ends.
func serve(ctx context.Context, handler http.Handler) (*http.Server, string, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, "", fmt.Errorf("listen on loopback: %w", err)
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{Handler: handler, Protocols: protocols, ReadHeaderTimeout: 10 * time.Second}
	// Serve always ends with an error, and Close is the reason for it.
	go func() { _ = server.Serve(listener) }()
	context.AfterFunc(ctx, func() { server.Close() })
	return server, "http://" + listener.Addr().String(), nil
}

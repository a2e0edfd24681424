package main

import (
	"bytes"
	"io"
	"log"
	"net/http"
	"net/http/httputil"
	"net/url"
	"sync"
	"time"
)

// relay carries a node's requests to a LAPI outside its namespace, and tells when
// an answer brings news.
type relay struct {
	proxy *httputil.ReverseProxy

	mu     sync.Mutex
	needle []byte
	found  chan time.Time
}

func newRelay(to *url.URL) *relay {
	r := &relay{}
	r.proxy = &httputil.ReverseProxy{
		Rewrite: func(p *httputil.ProxyRequest) {
			p.SetURL(to)
			// To be read on the way.
			p.Out.Header.Del("Accept-Encoding")
		},
		Transport:     &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 4},
		FlushInterval: -1,
		ErrorLog:      log.New(io.Discard, "", 0), // LAPI and bouncer say it themselves
		ModifyResponse: func(resp *http.Response) error {
			resp.Body = &relayed{ReadCloser: resp.Body, relay: r}
			return nil
		},
	}
	return r
}

func (r *relay) ServeHTTP(w http.ResponseWriter, req *http.Request) { r.proxy.ServeHTTP(w, req) }

// expect returns a channel that gets the time at which the next decision on value
// passes.
func (r *relay) expect(value string) <-chan time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.needle, r.found = []byte(`"`+value+`"`), make(chan time.Time, 1)
	return r.found
}

// relayed is an answer on its way.
type relayed struct {
	io.ReadCloser
	relay *relay
	tail  []byte
}

func (b *relayed) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.relay.mu.Lock()
	defer b.relay.mu.Unlock()
	if b.relay.found != nil {
		b.tail = append(b.tail, p[:n]...)
		if bytes.Contains(b.tail, b.relay.needle) {
			b.relay.found <- time.Now()
			b.relay.found = nil
		}
		b.tail = b.tail[max(0, len(b.tail)-64):]
	}
	return n, err
}

package cfedge

import (
	"crypto/tls"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"sync"
)

// VisitorHeader lets whoever stands at a Front pose as any visitor, by address.
// It goes no further than the front.
const VisitorHeader = "Cfedge-Visitor"

// Front returns the visitors' side of the edge as an HTTP server's handler, for
// browsers and curl: a request is a visitor's, from the address that it comes
// from or that VisitorHeader names, to the host that it asks for.
func (e *Edge) Front() http.Handler {
	quiet := log.New(io.Discard, "", 0) // what fails is counted, and told by Failures
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		visitor := Visitor{Edge: e}
		address, err := netip.ParseAddrPort(r.RemoteAddr)
		if err == nil {
			visitor.Addr = address.Addr()
		}
		if posed := r.Header.Get(VisitorHeader); posed != "" {
			if visitor.Addr, err = netip.ParseAddr(posed); err != nil {
				http.Error(w, VisitorHeader+": "+err.Error(), http.StatusBadRequest)
				return
			}
		}
		proxy := &httputil.ReverseProxy{
			Transport: visitor, FlushInterval: -1, ErrorLog: quiet,
			Rewrite: func(p *httputil.ProxyRequest) {
				p.Out.Host = p.In.Host
				p.Out.URL.Host = p.In.Host
				p.Out.URL.Scheme = "http"
				if p.In.TLS != nil {
					p.Out.URL.Scheme = "https"
				}
				// The proxy would take out what an edge does not.
				p.Out.URL.RawQuery = p.In.URL.RawQuery
				for _, name := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
					if values, ok := p.In.Header[name]; ok {
						p.Out.Header[name] = values
					}
				}
				p.Out.Header.Del(VisitorHeader)
			},
		}
		proxy.ServeHTTP(w, r)
	})
}

// FrontTLS has a certificate of the edge's authority for every host that is
// asked for by name, and for loopback.
func (e *Edge) FrontTLS() *tls.Config {
	var mu sync.Mutex
	issued := map[string]*tls.Certificate{}
	return &tls.Config{
		NextProtos: []string{"h2", "http/1.1"},
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			name := hello.ServerName
			if name == "" {
				name, _, _ = net.SplitHostPort(hello.Conn.LocalAddr().String())
			}
			mu.Lock()
			defer mu.Unlock()
			if c := issued[name]; c != nil {
				return c, nil
			}
			c, err := e.pki.issue(name)
			if err != nil {
				return nil, err
			}
			issued[name] = &c
			return &c, nil
		},
	}
}

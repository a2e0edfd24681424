package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"
)

// busy is how many requests are under way at once: enough that Traefik never
// waits for the next one.
const busy = 16

// answerEnd is how every answer of the origin ends.
const answerEnd = "\r\n\r\nok"

// startOrigin answers every request with two bytes, so that next to nothing of
// what is measured is the body's. It ends with ctx.
func startOrigin(ctx context.Context) (url string, err error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("start the origin: %w", err)
	}
	server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "ok")
	})}
	// Serve always ends with an error, and Close is the reason for it.
	go func() { _ = server.Serve(listener) }()
	context.AfterFunc(ctx, func() { server.Close() })
	return "http://" + listener.Addr().String(), nil
}

// client is one client of the gateway: a connection that stays open and, where
// it comes through a proxy, the address that the proxy vouches for.
type client struct {
	conn      net.Conn
	forwarded string // X-Forwarded-For, or ""
	request   []byte
	answer    []byte // room for one
}

// swarm is many clients. It writes requests and looks at answers with as little
// work as can be, because it shares the machine with what it measures.
type swarm []*client

// dial opens a connection for each address: from that address or, if proxied,
// from 127.0.0.1 in its name.
func dial(ctx context.Context, to string, addresses []netip.Addr, proxied bool) (swarm, error) {
	var s swarm
	for _, address := range addresses {
		c := &client{answer: make([]byte, 4096)}
		from := address
		if proxied {
			from = netip.MustParseAddr("127.0.0.1")
			c.forwarded = address.String()
		}
		dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
		var err error
		if c.conn, err = dialer.DialContext(ctx, "tcp", to); err != nil {
			s.close()
			return nil, fmt.Errorf("connect from %s: %w", from, err)
		}
		s = append(s, c)
	}
	return s, nil
}

func (s swarm) close() {
	for _, c := range s {
		c.conn.Close()
	}
}

// run makes n requests to a host, the clients taking turns, and returns when the
// last is answered. An answer other than the origin's is an error.
func (s swarm) run(host string, n int) error {
	for _, c := range s {
		c.request = []byte("GET / HTTP/1.1\r\nHost: " + host + "\r\nUser-Agent: benchmark\r\nAccept: */*\r\n")
		if c.forwarded != "" {
			c.request = append(c.request, "X-Forwarded-For: "+c.forwarded+"\r\n"...)
		}
		c.request = append(c.request, "\r\n"...)
		if err := c.conn.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
			return fmt.Errorf("ask %s: %w", host, err)
		}
	}
	var workers sync.WaitGroup
	errs := make([]error, busy)
	for w := range busy {
		mine := s[w*len(s)/busy : (w+1)*len(s)/busy]
		workers.Go(func() {
			for i := range (n + w) / busy {
				c := mine[i%len(mine)]
				if err := c.ask(); err != nil {
					errs[w] = fmt.Errorf("ask %s from %s: %w", host, c.conn.LocalAddr(), err)
					return
				}
			}
		})
	}
	workers.Wait()
	return errors.Join(errs...)
}

// ask makes one request.
func (c *client) ask() error {
	if _, err := c.conn.Write(c.request); err != nil {
		return err
	}
	n := 0
	for {
		got, err := c.conn.Read(c.answer[n:])
		n += got
		if bytes.HasSuffix(c.answer[:n], []byte(answerEnd)) && bytes.HasPrefix(c.answer, []byte("HTTP/1.1 200 ")) {
			return nil
		}
		if n == len(c.answer) || n > 13 && !bytes.HasPrefix(c.answer, []byte("HTTP/1.1 200 ")) {
			return fmt.Errorf("it answers %.40q", c.answer[:n])
		}
		if err != nil {
			return err
		}
	}
}

// get makes one request from an address, or in its name, on a connection of its
// own.
func get(ctx context.Context, url, host string, address netip.Addr, proxied bool) (*http.Response, error) {
	dialer := &net.Dialer{}
	if !proxied {
		dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(address, 0))
	}
	c := &http.Client{Transport: &http.Transport{DialContext: dialer.DialContext, DisableKeepAlives: true}, Timeout: 10 * time.Second}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	req.Host = host
	if proxied {
		req.Header.Set("X-Forwarded-For", address.String())
	}
	resp, err := c.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return resp, err
}

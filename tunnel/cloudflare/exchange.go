package cloudflare

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime/debug"
	"sync"
	"time"

	"github.com/cloudflare/cloudflared/connection"
)

// exchange hands one request to the handler and its response to the edge. An
// error before the response began becomes a 502, one after resets the stream.
// A panic must not get further than here: over QUIC it would end the process.
func (l *link) exchange(w connection.ResponseWriter, r *http.Request, websocket bool) (err error) {
	c := l.session.connector
	l.inFlight.Add(1)
	defer l.inFlight.Add(-1)
	c.totals.requests.Add(1)
	start, status := time.Now(), 0
	defer func() {
		if p := recover(); p != nil {
			err = http.ErrAbortHandler
			if p != any(http.ErrAbortHandler) {
				err = fmt.Errorf("handler panicked: %v", p)
				c.panicked(p, r.Host)
			}
		}
		if err != nil {
			c.totals.failed.Add(1)
			if status == 0 && r.Context().Err() == nil {
				status = http.StatusBadGateway
			}
		}
		if c.served != nil {
			c.served(Exchange{r, status, time.Since(start), err})
		}
	}()

	r.RequestURI, r.URL.Scheme, r.URL.Host = "", "http", r.Host
	body := r.Body
	if websocket {
		// The edge takes these off, and the origin service must see them.
		r.Header.Set("Connection", "Upgrade")
		r.Header.Set("Upgrade", "websocket")
		if r.Header.Get("Sec-Websocket-Version") == "" {
			r.Header.Set("Sec-Websocket-Version", "13")
		}
		r.ContentLength, r.Body = 0, http.NoBody // what follows is the stream's
	}
	response, err := c.handler.RoundTrip(r)
	if err != nil {
		if r.Context().Err() == nil {
			c.log.Debug("request failed", "host", r.Host, "err", err)
		}
		return fmt.Errorf("serve request: %w", err)
	}
	defer func() { _ = response.Body.Close() }()
	if response.StatusCode == http.StatusSwitchingProtocols {
		status = response.StatusCode
		return l.upgrade(w, body, response, r.Host)
	}
	if err := w.WriteRespHeaders(response.StatusCode, response.Header); err != nil {
		return fmt.Errorf("send response: %w", err)
	}
	status = response.StatusCode
	if err := copyBody(w, response.Body, response.ContentLength); err != nil {
		return fmt.Errorf("send response: %w", err)
	}
	for name, values := range response.Trailer {
		for _, value := range values {
			w.AddTrailer(name, value)
		}
	}
	return nil
}

// upgrade joins the visitor's stream with the origin service's, until either
// ends.
func (l *link) upgrade(w connection.ResponseWriter, visitor io.Reader, response *http.Response, host string) error {
	origin, ok := response.Body.(io.ReadWriteCloser)
	if !ok {
		return errors.New("switch protocols: the response cannot be written to")
	}
	if err := w.WriteRespHeaders(response.StatusCode, response.Header); err != nil {
		return fmt.Errorf("send response: %w", err)
	}
	go func() {
		defer func() {
			if p := recover(); p != nil {
				l.session.connector.panicked(p, host)
			}
		}()
		defer origin.Close()
		_ = copyBody(origin, visitor, -1) // until the exchange is over, and the stream with it
	}()
	_ = copyBody(w, origin, -1) // both ends may end it as they like
	return nil
}

// panicked notes a panic that a request caught. It is called where it recovers.
func (c *Connector) panicked(p any, host string) {
	c.totals.panics.Add(1)
	c.log.Error("panic in a request", "panic", fmt.Sprint(p), "host", host, "stack", string(debug.Stack()))
}

// What is in flight costs a buffer and no more, whatever its size. What trickles,
// such as events and most pages, has a small one; what fills that gets a large
// one.
var (
	small = sync.Pool{New: func() any { return new([smallBuffer]byte) }}
	large = sync.Pool{New: func() any { return new([largeBuffer]byte) }}
)

const (
	smallBuffer = 4 << 10
	largeBuffer = 32 << 10
)

// copyBody copies length bytes, or as many as there are where length is -1.
func copyBody(to io.Writer, from io.Reader, length int64) error {
	if length <= smallBuffer {
		buffer := small.Get().(*[smallBuffer]byte)
		more, err := copyThrough(to, from, buffer[:], true)
		small.Put(buffer)
		if !more {
			return err
		}
	}
	buffer := large.Get().(*[largeBuffer]byte)
	defer large.Put(buffer)
	_, err := copyThrough(to, from, buffer[:], false)
	return err
}

// copyThrough copies to the end, or, where it is to be on trial, until one read
// fills the buffer; more says that it was the latter.
func copyThrough(to io.Writer, from io.Reader, buffer []byte, trial bool) (more bool, err error) {
	for {
		n, err := from.Read(buffer)
		if n > 0 {
			if _, err := to.Write(buffer[:n]); err != nil {
				return false, err
			}
		}
		switch {
		case err == io.EOF:
			return false, nil
		case err != nil:
			return false, err
		case trial && n == len(buffer):
			return true, nil
		}
	}
}

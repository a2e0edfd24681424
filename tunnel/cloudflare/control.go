package cloudflare

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"time"

	"github.com/cloudflare/cloudflared/connection"
	"github.com/cloudflare/cloudflared/tunnelrpc"
	"github.com/cloudflare/cloudflared/tunnelrpc/pogs"
	capnp "zombiezen.com/go/capnproto2"
	"zombiezen.com/go/capnproto2/rpc"
)

// features are those of cloudflared's that this connector has. That it accepts
// pushed configurations is one: without it the edge takes a tunnel that is
// configured at Cloudflare for an old client.
var features = []string{"allow_remote_config", "serialized_headers", "support_quic_eof"}

// localConfiguration is what the edge is told of a tunnel that is not
// configured at Cloudflare: that all is answered by one service. Where hosts
// lead is nobody's business there.
const localConfiguration = `{"ingress":[{"service":"http_status:404"}],"warp-routing":{}}`

// A refusedError is the edge's last word about credentials.
type refusedError struct{ reason string }

func (e refusedError) Error() string { return "refused by the edge: " + e.reason }

// A retryLaterError is the edge's word to come back.
type retryLaterError struct {
	reason string
	after  time.Duration // zero if the edge named no time
}

func (e retryLaterError) Error() string { return "put off by the edge: " + e.reason }

var (
	errSecondControlStream = errors.New("a second control stream is not served")
	errWedged              = errors.New("the edge's tunnel service does not answer any more: recycled")
	errReleased            = errors.New("the edge let the connection go")
)

// ServeControlStream registers the link and keeps it registered. Over QUIC it
// returns when the link ends, as cloudflared then ends the link; over HTTP/2
// when it has nothing more to say.
func (l *link) ServeControlStream(ctx context.Context, stream io.ReadWriteCloser, _ *pogs.ConnectionOptions, _ connection.TunnelConfigJSONGetter) error {
	// What is said here is said once per link: whoever could open a second
	// stream, by a header that the edge did not strip, would be told the secret.
	if l.asked.Swap(true) {
		return errSecondControlStream
	}
	err := l.control(ctx, stream)
	if err != nil {
		l.fail(err)
		return err
	}
	if l.quic != nil {
		<-ctx.Done()
	}
	return nil
}

// IsStopped tells cloudflared that an end of the connection is no error.
func (l *link) IsStopped() bool { return l.session.draining.Err() != nil }

func (l *link) control(ctx context.Context, stream io.ReadWriteCloser) error {
	s := l.session
	transport := tunnelrpc.SafeTransport(stream)
	conn := tunnelrpc.NewClientConn(transport)
	service := pogs.NewRegistrationServer_PogsClient(conn.Bootstrap(ctx), conn)
	defer func() {
		_ = service.Close()
		_ = transport.Close()
	}()

	// A drain does not cut this short: the edge may send requests before its
	// answer is here, and has to be told goodbye first.
	call, cancel := context.WithTimeout(ctx, s.pace.rpc)
	details, err := service.RegisterConnection(call,
		pogs.TunnelAuth{AccountTag: s.credentials.Account, TunnelSecret: s.credentials.Secret},
		s.credentials.Tunnel, byte(l.slot), &pogs.ConnectionOptions{
			Client: pogs.ClientInfo{
				ClientID: s.id[:], Features: features, Version: s.connector.version,
				Arch: runtime.GOOS + "_" + runtime.GOARCH,
			},
			OriginLocalIP: l.local, NumPreviousAttempts: uint8(min(s.attempts(l.slot), 255)),
		})
	cancel()
	if err != nil {
		err = judgeRegistration(err)
		_, refused := errors.AsType[refusedError](err)
		_, later := errors.AsType[retryLaterError](err)
		if !refused && !later && l.protocol == QUIC {
			// The handshake got through and what followed did not, as where
			// larger packets are dropped.
			s.connector.memory.setQUIC(l.network, false)
		}
		return err
	}
	l.registered(details)
	if l.slot == 0 && !details.TunnelIsRemotelyManaged {
		call, cancel := context.WithTimeout(ctx, s.pace.rpc)
		if err := service.SendLocalConfiguration(call, []byte(localConfiguration)); err != nil {
			s.log.Debug("local configuration not taken", "err", err)
		}
		cancel()
	}
	return l.keep(ctx, conn, service)
}

// judgeRegistration tells what the edge said from what went wrong on the way.
func judgeRegistration(err error) error {
	if failure, ok := errors.AsType[*pogs.RPCError](err); ok {
		return fmt.Errorf("register: %w", failure)
	}
	if later, ok := errors.AsType[*pogs.RetryableError](err); ok {
		return retryLaterError{later.Error(), later.Delay}
	}
	if err.Error() == connection.DuplicateConnectionError {
		return retryLaterError{reason: "it has a connection of this tunnel already"}
	}
	return refusedError{err.Error()}
}

// registered notes that the edge now sends requests.
func (l *link) registered(details *pogs.ConnectionDetails) {
	s := l.session
	now := time.Now()
	l.mu.Lock()
	l.since = now
	l.mu.Unlock()
	s.connector.totals.registered.Add(1)
	s.note(l.slot, func(c *Connection) {
		*c = Connection{
			Index: l.slot, State: Registered, Since: now, ID: details.UUID, Protocol: l.protocol,
			Address: l.address, Location: details.Location, KeyExchange: l.keyExchange,
		}
	})
	s.log.Info("connection registered", "connection", l.slot, "protocol", l.protocol, "location", details.Location,
		"address", l.address, "keyExchange", l.keyExchange)
}

// keep watches over a registered link, and unregisters it when the session
// drains.
func (l *link) keep(ctx context.Context, conn *rpc.Conn, service pogs.RegistrationServer_PogsClient) error {
	s := l.session
	tick := time.NewTicker(s.pace.canary)
	defer tick.Stop()
	answered := l.canary(ctx, conn)
	for {
		select {
		case <-ctx.Done():
			return l.controlEnded()
		case <-conn.Done():
			return l.controlEnded()
		case ok := <-answered:
			answered = nil
			if ok {
				s.canaryAnswered(l.slot)
			} else if s.canaryTrusted() && ctx.Err() == nil {
				s.connector.totals.recycled.Add(1)
				return errWedged
			}
		case <-tick.C:
			if answered == nil {
				answered = l.canary(ctx, conn)
			}
		case <-s.draining.Done():
			call, cancel := context.WithTimeout(ctx, s.pace.rpc)
			defer cancel()
			if err := service.UnregisterConnection(call); err != nil {
				s.log.Debug("connection not unregistered", "connection", l.slot, "err", err)
			}
			close(l.unregistered)
			return nil
		}
	}
}

// controlEnded tells the end of the connection, which ends the control stream
// too, from that of the control stream alone. After the latter the edge has
// nothing to send requests for, and what it has sent is served.
func (l *link) controlEnded() error {
	// Which of the two ends is heard of first is chance.
	for range 20 {
		if l.over() {
			return l.transport.cause()
		}
		time.Sleep(5 * time.Millisecond)
	}
	l.mu.Lock()
	l.why = errReleased
	l.mu.Unlock()
	close(l.unregistered)
	close(l.released)
	return nil
}

// canary asks the edge a question without effect: for the capability that it
// gave when the link registered. The channel tells whether it was answered in
// time.
func (l *link) canary(ctx context.Context, conn *rpc.Conn) <-chan bool {
	answered := make(chan bool, 1)
	go func() {
		ask, cancel := context.WithTimeout(ctx, l.session.pace.rpc)
		defer cancel()
		question, ok := conn.Bootstrap(ask).(*capnp.PipelineClient)
		if !ok { // the RPC session is ending, or nothing can be sent
			answered <- ask.Err() == nil
			return
		}
		_, _ = (*capnp.Pipeline)(question).Struct() // an answer that it cannot be had is one too
		answered <- ask.Err() == nil
		_ = question.Close()
	}()
	return answered
}

// attempts are those of the slot that failed in a row.
func (s *session) attempts(slot int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held[slot].Attempts
}

// longestPush is more than any configuration has, in bytes.
const longestPush = 4 << 20

// acknowledge answers a pushed configuration over HTTP/2.
func acknowledge(w io.Writer, pushed io.Reader) error {
	var update connection.ConfigurationUpdateBody
	if err := json.NewDecoder(io.LimitReader(pushed, longestPush)).Decode(&update); err != nil {
		return fmt.Errorf("read pushed configuration: %w", err)
	}
	return json.NewEncoder(w).Encode(pogs.UpdateConfigurationResponse{LastAppliedVersion: update.Version})
}

package cfedge

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"sync/atomic"
	"time"

	"github.com/cloudflare/cloudflared/connection"
	"github.com/cloudflare/cloudflared/tunnelrpc"
	"github.com/cloudflare/cloudflared/tunnelrpc/pogs"
	"github.com/google/uuid"
)

// registrar answers what a connector says on its control stream.
type registrar struct {
	server      *server
	link        link
	remote      net.Addr
	postQuantum bool
	connection  atomic.Pointer[Connection]
}

// serve speaks with a connector on the control stream of its link until either
// ends.
func (r *registrar) serve(ctx context.Context, control io.ReadWriteCloser) {
	err := tunnelrpc.NewRegistrationServer(r).Serve(ctx, control)
	c := r.connection.Load()
	if c == nil {
		// What does not register has no business here.
		r.link.abort()
		return
	}
	if !c.unregistered.Load() {
		r.server.edge.log.Info("control stream ended", "connection", c.ID, "err", err)
		c.gone()
		if c.settle() {
			r.link.close()
		}
	}
}

// RegisterConnection lets a connector in, or not.
func (r *registrar) RegisterConnection(ctx context.Context, auth pogs.TunnelAuth, tunnel uuid.UUID, index byte, options *pogs.ConnectionOptions) (*pogs.ConnectionDetails, error) {
	e := r.server.edge
	if err := e.pause(ctx); err != nil {
		return nil, err
	}
	info, err := e.admit(auth, tunnel)
	if err != nil {
		e.log.Info("registration refused", "tunnel", tunnel, "index", index, "protocol", r.link.protocol(), "err", err)
		return nil, err
	}
	connector, err := uuid.FromBytes(options.Client.ClientID)
	if err != nil {
		return nil, errors.New("bad request: client id is not a UUID")
	}
	c := &Connection{
		ID: uuid.New(), Tunnel: tunnel, Connector: connector, Index: index,
		Protocol: r.link.protocol(), Server: r.server.tcp.Addr().String(), Location: r.server.location,
		Version: options.Client.Version, Arch: options.Client.Arch, Features: slices.Clone(options.Client.Features),
		Since: time.Now(), Replace: options.ReplaceExisting, Attempts: options.NumPreviousAttempts,
		PostQuantum: r.postQuantum,
		edge:        e, link: r.link, landed: make(chan struct{}),
	}
	if e.opts.Duplicates && e.duplicate(c) {
		return nil, errors.New(connection.DuplicateConnectionError)
	}
	if !r.connection.CompareAndSwap(nil, c) {
		return nil, errors.New("bad request: this connection is registered")
	}
	originIP := ""
	if host, _, err := net.SplitHostPort(r.remote.String()); err == nil {
		originIP = host
	}
	c.disconnect = e.cloud.Connect(tunnel, CloudConnection{
		ID: c.ID, ConnectorID: connector, Location: c.Location, Version: c.Version, OriginIP: originIP, Opened: c.Since,
	})
	c.registered.Store(true)
	e.enter(c)
	e.spawn(c.watch)
	if version, config, ok := e.cloud.Configuration(tunnel); ok && info.Remote {
		c.configure(version, config)
	}
	e.log.Info("connection registered", "connection", c.ID, "index", index, "protocol", c.Protocol, "location", c.Location)
	return &pogs.ConnectionDetails{UUID: c.ID, Location: c.Location, TunnelIsRemotelyManaged: info.Remote}, nil
}

// UnregisterConnection hears a connector's goodbye.
func (r *registrar) UnregisterConnection(context.Context) {
	if c := r.connection.Load(); c != nil {
		c.unregister()
	}
}

// UpdateLocalConfiguration keeps what a locally managed connector reports.
func (r *registrar) UpdateLocalConfiguration(_ context.Context, config []byte) error {
	c := r.connection.Load()
	if c == nil {
		return errors.New("bad request: register first")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.local = slices.Clone(config)
	return nil
}

// admit judges a registration as the test wishes, and then by its credentials.
// An error that is not retryable is permanent to a connector.
func (e *Edge) admit(auth pogs.TunnelAuth, tunnel uuid.UUID) (TunnelInfo, error) {
	e.mu.Lock()
	refusal := e.refusal
	if refusal != nil && refusal.Times > 0 {
		if refusal.Times--; refusal.Times == 0 {
			e.refusal = nil
		}
	}
	e.mu.Unlock()
	switch {
	case refusal == nil:
		return e.cloud.Authenticate(auth.AccountTag, tunnel, auth.TunnelSecret)
	case refusal.Permanent:
		return TunnelInfo{}, errors.New(refusal.Reason)
	default:
		return TunnelInfo{}, pogs.RetryErrorAfter(errors.New(refusal.Reason), refusal.RetryAfter)
	}
}

// duplicate says whether the connector is already connected to the server.
func (e *Edge) duplicate(c *Connection) bool {
	return slices.ContainsFunc(e.Connections(), func(other *Connection) bool {
		return other.Connector == c.Connector && other.Tunnel == c.Tunnel && other.Server == c.Server
	})
}

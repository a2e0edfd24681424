package cfedge

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
)

// TargetSuffix ends the name that a tunnel has in DNS: <id>.cfargotunnel.com.
const TargetSuffix = ".cfargotunnel.com"

// Cloud is what an Edge and an API know together: accounts, tunnels, zones,
// records and tokens. It holds the rules of the real thing that do not depend
// on how it is asked. Make it with NewCloud. It is safe for use by several
// goroutines, and by several edges.
type Cloud struct {
	mu       sync.Mutex
	now      func() time.Time
	accounts map[string]string // id to name
	tunnels  map[uuid.UUID]*tunnelState
	zones    map[string]*zoneState // by id
	tokens   map[string]*tokenState
	history  []RecordWrite
	pushes   []func(uuid.UUID, int32, []byte)
}

// TunnelInfo is a tunnel as those know it who made it.
type TunnelInfo struct {
	ID      uuid.UUID
	Account string
	Name    string
	Secret  []byte
	// Remote says that its configuration is kept at Cloudflare (config_src
	// cloudflare), and pushed to connectors.
	Remote  bool
	Created time.Time
	Deleted time.Time // zero while it is there
}

// Token is what a connector is given to run the tunnel.
func (t TunnelInfo) Token() string {
	text, _ := json.Marshal(map[string]any{"a": t.Account, "t": t.ID, "s": t.Secret})
	return base64.StdEncoding.EncodeToString(text)
}

// CloudConnection is one connection of a connector, as the API shows it.
type CloudConnection struct {
	ID          uuid.UUID
	ConnectorID uuid.UUID
	Location    string
	Version     string
	OriginIP    string
	Opened      time.Time
}

type tunnelState struct {
	TunnelInfo
	connections   map[uuid.UUID]CloudConnection
	configuration json.RawMessage
	version       int32
}

// Record is a DNS record. A name is complete, lower case and without a final
// dot; a TXT record's content is in quotes.
type Record struct {
	ID       string    `json:"id"`
	Name     string    `json:"name"`
	Type     string    `json:"type"`
	Content  string    `json:"content"`
	Proxied  bool      `json:"proxied"`
	TTL      int       `json:"ttl"`
	Comment  string    `json:"comment,omitempty"`
	Created  time.Time `json:"created_on"`
	Modified time.Time `json:"modified_on"`
}

// RecordWrite is one record that was changed: created without Before, deleted
// without After.
type RecordWrite struct {
	Zone   string // its name
	Before *Record
	After  *Record
	// Token is the name of the token that wrote; empty for Put and Remove.
	Token string
}

type zoneState struct {
	id, name, account, status string
	records                   map[string]Record
}

// NewCloud makes one with nothing in it.
func NewCloud() *Cloud {
	return &Cloud{
		now:      time.Now,
		accounts: map[string]string{},
		tunnels:  map[uuid.UUID]*tunnelState{},
		zones:    map[string]*zoneState{},
		tokens:   map[string]*tokenState{},
	}
}

// identifier is what accounts, zones and records have for an id.
func identifier() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// AddAccount makes an account and returns its id.
func (c *Cloud) AddAccount(name string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	id := identifier()
	c.accounts[id] = name
	return id
}

// refusal is an error in Cloudflare's words, which begin as sentences do.
type refusal string

func (r refusal) Error() string { return string(r) }

// What refuses a tunnel.
const (
	errTunnelName  refusal = "You already have a tunnel with this name. Delete the existing tunnel, or choose a different name for your new tunnel"
	errTunnelInUse refusal = "Cannot delete tunnel because it has active connections"
)

// AddTunnel makes a tunnel as a user would by hand; a secret of nil is made up.
// It panics if the account has one of that name, as only a test can be wrong.
func (c *Cloud) AddTunnel(account, name string, secret []byte) TunnelInfo {
	c.mu.Lock()
	defer c.mu.Unlock()
	t, err := c.addTunnel(account, name, secret, true)
	if err != nil {
		panic(err)
	}
	return t
}

func (c *Cloud) addTunnel(account, name string, secret []byte, remote bool) (TunnelInfo, error) {
	for _, t := range c.tunnels {
		if t.Account == account && t.Name == name && t.Deleted.IsZero() {
			return TunnelInfo{}, errTunnelName
		}
	}
	if secret == nil {
		secret = make([]byte, 32)
		_, _ = rand.Read(secret)
	}
	t := &tunnelState{
		TunnelInfo:  TunnelInfo{ID: uuid.New(), Account: account, Name: name, Secret: secret, Remote: remote, Created: c.now()},
		connections: map[uuid.UUID]CloudConnection{},
	}
	c.tunnels[t.ID] = t
	return t.TunnelInfo, nil
}

// SetRemote says where a tunnel's configuration is kept: at Cloudflare, or in a
// file beside the connector.
func (c *Cloud) SetRemote(id uuid.UUID, remote bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := c.tunnels[id]; t != nil {
		t.Remote = remote
	}
}

// RotateSecret gives a tunnel a new secret: tokens handed out before are of no
// use to new connections, while those that are there live on.
func (c *Cloud) RotateSecret(id uuid.UUID) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	secret := make([]byte, 32)
	_, _ = rand.Read(secret)
	if t := c.tunnels[id]; t != nil {
		t.Secret = secret
	}
	return secret
}

// RemoveTunnel deletes a tunnel whatever is connected, as somebody does in the
// dashboard.
func (c *Cloud) RemoveTunnel(id uuid.UUID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := c.tunnels[id]; t != nil && t.Deleted.IsZero() {
		t.Deleted = c.now()
		clear(t.connections)
	}
}

// Tunnel returns a tunnel, deleted ones too.
func (c *Cloud) Tunnel(id uuid.UUID) (TunnelInfo, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := c.tunnels[id]; t != nil {
		return t.TunnelInfo, true
	}
	return TunnelInfo{}, false
}

// Tunnels returns the tunnels of an account that are not deleted, by name.
func (c *Cloud) Tunnels(account string) []TunnelInfo {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []TunnelInfo
	for _, t := range c.tunnels {
		if t.Account == account && t.Deleted.IsZero() {
			all = append(all, t.TunnelInfo)
		}
	}
	slices.SortFunc(all, func(a, b TunnelInfo) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// What the edge answers to a connector that it does not let in.
const (
	errUnauthorized   refusal = "Unauthorized: Invalid tunnel secret"
	errTunnelNotFound refusal = "Unauthorized: Tunnel not found"
)

// Authenticate checks what a connector registers with. The error's text is what
// it is told.
func (c *Cloud) Authenticate(account string, id uuid.UUID, secret []byte) (TunnelInfo, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.tunnels[id]
	if t == nil || t.Account != account || !t.Deleted.IsZero() {
		return TunnelInfo{}, errTunnelNotFound
	}
	if subtle.ConstantTimeCompare(t.Secret, secret) != 1 {
		return TunnelInfo{}, errUnauthorized
	}
	return t.TunnelInfo, nil
}

// Connect notes a registered connection; the caller calls what it returns when
// that is gone.
func (c *Cloud) Connect(id uuid.UUID, connection CloudConnection) (disconnect func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.tunnels[id]
	if t == nil {
		return func() {}
	}
	if connection.Opened.IsZero() {
		connection.Opened = c.now()
	}
	t.connections[connection.ID] = connection
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(t.connections, connection.ID)
	}
}

// Configuration returns what was put at the API for a tunnel; ok is false where
// nothing was.
func (c *Cloud) Configuration(id uuid.UUID) (version int32, config []byte, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := c.tunnels[id]; t != nil && t.configuration != nil {
		return t.version, t.configuration, true
	}
	return 0, nil, false
}

// OnConfigure has a hook told of every configuration that is put at the API,
// from a goroutine of its own: an edge pushes it to the connectors.
func (c *Cloud) OnConfigure(hook func(id uuid.UUID, version int32, config []byte)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pushes = append(c.pushes, hook)
}

// AddRoute leads a host to a tunnel as its proxied CNAME does, making a zone of
// the host's own where there is none.
func (c *Cloud) AddRoute(host string, id uuid.UUID) {
	c.mu.Lock()
	zone := c.zoneOf(host)
	c.mu.Unlock()
	if zone == nil {
		c.AddZone(identifier(), strings.TrimPrefix(host, "*."))
	}
	c.Put(Record{Type: "CNAME", Name: host, Content: id.String() + TargetSuffix, Proxied: true})
}

// Route returns the tunnel that serves a host: its own proxied CNAME, or that of
// the nearest wildcard above it. A name that is there without a record to
// follow is not caught by a wildcard.
func (c *Cloud) Route(host string) (uuid.UUID, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	z := c.zoneOf(host)
	if z == nil {
		return uuid.UUID{}, false
	}
	for name, at := host, host; ; {
		there := false
		for _, r := range z.records {
			if r.Name == name {
				there = true
				if target, ok := strings.CutSuffix(r.Content, TargetSuffix); ok && r.Type == "CNAME" && r.Proxied {
					id, err := uuid.Parse(target)
					return id, err == nil
				}
			}
			there = there || r.Name == at || strings.HasSuffix(r.Name, "."+at)
		}
		if there || at == z.name {
			return uuid.UUID{}, false
		}
		_, at, _ = strings.Cut(at, ".")
		name = "*." + at
	}
}

// zoneOf returns the zone with the longest name that a host is in.
func (c *Cloud) zoneOf(host string) *zoneState {
	var best *zoneState
	for _, z := range c.zones {
		if (host == z.name || strings.HasSuffix(host, "."+z.name)) && (best == nil || len(z.name) > len(best.name)) {
			best = z
		}
	}
	return best
}

// AddZone makes an active zone and returns its id.
func (c *Cloud) AddZone(account, name string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	z := &zoneState{id: identifier(), name: name, account: account, status: "active", records: map[string]Record{}}
	c.zones[z.id] = z
	return z.id
}

// RemoveZone takes a zone away, by name.
func (c *Cloud) RemoveZone(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.DeleteFunc(c.zones, func(_ string, z *zoneState) bool { return z.name == name })
}

// Put writes a record as somebody else does: with an ID it replaces that one.
// The rules of the API hold; it panics where they refuse.
func (c *Cloud) Put(record Record) Record {
	c.mu.Lock()
	defer c.mu.Unlock()
	z := c.zoneOf(record.Name)
	if z == nil {
		panic(fmt.Sprintf("no zone for %s", record.Name))
	}
	if record.TTL == 0 {
		record.TTL = 1
	}
	next := maps.Clone(z.records)
	done, refused := c.write(z, next, record)
	if refused != nil {
		panic(refused.Message)
	}
	c.commit(z, next, []RecordWrite{done}, "")
	return *done.After
}

// Remove deletes a record as somebody else does.
func (c *Cloud) Remove(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, z := range c.zones {
		if r, ok := z.records[id]; ok {
			next := maps.Clone(z.records)
			delete(next, id)
			c.commit(z, next, []RecordWrite{{Zone: z.name, Before: &r}}, "")
		}
	}
}

// Records returns all records of a zone, by name, type and content.
func (c *Cloud) Records(zone string) []Record {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, z := range c.zones {
		if z.name == zone {
			return z.sorted()
		}
	}
	return nil
}

// History returns every record that was written, in order.
func (c *Cloud) History() []RecordWrite {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.history)
}

func (z *zoneState) sorted() []Record {
	return slices.SortedFunc(maps.Values(z.records), func(a, b Record) int {
		for _, d := range []int{strings.Compare(a.Name, b.Name), strings.Compare(a.Type, b.Type), strings.Compare(a.Content, b.Content)} {
			if d != 0 {
				return d
			}
		}
		return strings.Compare(a.ID, b.ID)
	})
}

func (c *Cloud) commit(z *zoneState, next map[string]Record, done []RecordWrite, token string) {
	z.records = next
	for _, w := range done {
		w.Token = token
		c.history = append(c.history, w)
	}
}

// write checks a record against next and puts it there. Without an id it is a
// new one.
func (c *Cloud) write(z *zoneState, next map[string]Record, record Record) (RecordWrite, *apiError) {
	done := RecordWrite{Zone: z.name}
	if record.ID != "" {
		before, ok := next[record.ID]
		if !ok {
			return done, &apiError{81044, "Record does not exist."}
		}
		done.Before = &before
		record.Created = before.Created
	} else {
		record.ID = identifier()
		record.Created = c.now()
	}
	record.Modified = c.now()
	record.Name = strings.ToLower(strings.TrimSuffix(record.Name, "."))
	switch {
	case record.Name == "@":
		record.Name = z.name
	case record.Name != z.name && !strings.HasSuffix(record.Name, "."+z.name):
		record.Name += "." + z.name // as the real one does: a name in no zone is taken for a relative one
	}
	if refused := judge(&record); refused != nil {
		return done, refused
	}
	for id, other := range next {
		if id == record.ID || other.Name != record.Name {
			continue
		}
		address := func(t string) bool { return t == "A" || t == "AAAA" }
		switch {
		case other.Type == record.Type && other.Content == record.Content:
			return done, &apiError{81058, "An identical record already exists."}
		case record.Type == "CNAME" && (address(other.Type) || other.Type == "CNAME"):
			return done, &apiError{81053, "An A, AAAA, or CNAME record with that host already exists. For more details, refer to <https://developers.cloudflare.com/dns/manage-dns-records/troubleshooting/records-with-same-name/>."}
		case address(record.Type) && other.Type == "CNAME":
			return done, &apiError{81054, "A CNAME record with that host already exists. For more details, refer to <https://developers.cloudflare.com/dns/manage-dns-records/troubleshooting/records-with-same-name/>."}
		case other.Type == "NS" && record.Name != z.name && (address(record.Type) || record.Type == "CNAME"), record.Type == "NS" && other.Type != "NS" && record.Name != z.name:
			return done, &apiError{81056, "An NS record with that host already exists."}
		}
	}
	next[record.ID] = record
	done.After = &record
	return done, nil
}

// judge refuses a record that is wrong in itself, and writes it as the API
// would give it back.
func judge(r *Record) *apiError {
	invalid := &apiError{9000, "DNS name is invalid."}
	if len(r.Name) > 255 {
		return &apiError{9001, "DNS name is too long."}
	}
	for i, label := range strings.Split(r.Name, ".") {
		if label == "" || len(label) > 63 || strings.Contains(label, "*") && (i > 0 || label != "*") {
			return invalid
		}
	}
	if len(r.Comment) > 100 {
		return &apiError{9010, "DNS record comment is too long: the limit is 100 characters."}
	}
	if r.Proxied {
		r.TTL = 1
	}
	if r.TTL != 1 && (r.TTL < 60 || r.TTL > 86400) {
		return &apiError{9021, "Invalid TTL. Must be between 60 and 86400 seconds, or 1 for Automatic."}
	}
	switch r.Type {
	case "A", "AAAA":
	case "CNAME":
		r.Content = strings.ToLower(strings.TrimSuffix(r.Content, "."))
		if r.Content == "" {
			return &apiError{9007, "Content for CNAME record is invalid."}
		}
		if r.Content == r.Name {
			return &apiError{9039, "A CNAME record cannot reference itself."}
		}
		return nil
	case "TXT":
		if r.Content == "" {
			return &apiError{9207, "Content for TXT record is missing."}
		}
		if !strings.HasPrefix(r.Content, `"`) {
			r.Content = `"` + r.Content + `"`
		}
		fallthrough
	default:
		if r.Proxied {
			return &apiError{9004, "This record type cannot be proxied."}
		}
	}
	return nil
}

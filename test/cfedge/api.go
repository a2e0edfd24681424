package cfedge

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
)

// API answers as Cloudflare's API does, under /client/v4, from what a Cloud
// holds. It knows the calls that a tunnel's operator makes: tunnels, their
// tokens, configurations and connections; zones; records, one by one and in
// batches. The contract that it keeps, with where each part is known from, is
// written at the calls. Make it with NewAPI.
type API struct {
	cloud *Cloud
	mux   *http.ServeMux

	mu      sync.Mutex
	fault   func(Call) Fault
	calls   []Call
	limit   int
	window  time.Duration
	used    int
	resets  time.Time
	blocked time.Time
	batch   int
	most    int // records in a page
}

// Call is a request that the API was sent.
type Call struct {
	Method string
	Path   string // after /client/v4
	Query  url.Values
	Token  string // its name, as AddToken was told; empty for none that is known
	Status int    // of the answer; 0 in a Fault's hook, and for a connection that was cut
	// Codes are the errors of the answer.
	Codes []int
}

// Write says whether the call asks for a change.
func (c Call) Write() bool { return c.Method != http.MethodGet }

// Fault is what goes wrong with a call; the zero value is nothing.
type Fault struct {
	// Status, if any, is answered instead, with a page in HTML as a proxy in
	// front of the API writes it.
	Status int
	// Cut ends the connection without an answer.
	Cut bool
	// After lets the call take effect first, so that only the answer is lost.
	After bool
	Delay time.Duration
}

// NewAPI makes the API of a cloud, with Cloudflare's limits for a free zone:
// 1,200 calls in five minutes, batches of 200 records.
func NewAPI(cloud *Cloud) *API {
	a := &API{cloud: cloud, mux: http.NewServeMux(), limit: 1200, window: 5 * time.Minute, batch: 200, most: 5_000_000}
	for pattern, handle := range map[string]handler{
		"GET /accounts/{account}/cfd_tunnel":                     a.listTunnels,
		"POST /accounts/{account}/cfd_tunnel":                    a.createTunnel,
		"GET /accounts/{account}/cfd_tunnel/{id}":                a.getTunnel,
		"DELETE /accounts/{account}/cfd_tunnel/{id}":             a.deleteTunnel,
		"GET /accounts/{account}/cfd_tunnel/{id}/token":          a.tunnelToken,
		"GET /accounts/{account}/cfd_tunnel/{id}/configurations": a.getConfiguration,
		"PUT /accounts/{account}/cfd_tunnel/{id}/configurations": a.putConfiguration,
		"GET /accounts/{account}/cfd_tunnel/{id}/connections":    a.listConnections,
		"DELETE /accounts/{account}/cfd_tunnel/{id}/connections": a.cutConnections,
		"GET /zones":                                a.listZones,
		"GET /zones/{zone}/dns_records":             a.listRecords,
		"POST /zones/{zone}/dns_records":            a.createRecord,
		"GET /zones/{zone}/dns_records/{record}":    a.getRecord,
		"PUT /zones/{zone}/dns_records/{record}":    a.putRecord,
		"PATCH /zones/{zone}/dns_records/{record}":  a.patchRecord,
		"DELETE /zones/{zone}/dns_records/{record}": a.deleteRecord,
		"POST /zones/{zone}/dns_records/batch":      a.batchRecords,
	} {
		a.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) { a.answer(w, r, handle) })
	}
	a.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		a.answer(w, r, func(*request) reply {
			return refuse(http.StatusNotFound, 7003, "Could not route to "+r.URL.Path+", perhaps your object identifier is invalid?")
		})
	})
	return a
}

// SetFault has a hook asked before each call; nil for none.
func (a *API) SetFault(hook func(Call) Fault) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.fault = hook
}

// SetLimit changes how many calls may be made in a window before all are
// refused for one.
func (a *API) SetLimit(calls int, window time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.limit, a.window, a.used, a.resets, a.blocked = calls, window, 0, time.Time{}, time.Time{}
}

// SetPage bounds the pages in which records are listed, whatever is asked for.
func (a *API) SetPage(most int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.most = most
}

// Calls returns what was asked since the last Forget.
func (a *API) Calls() []Call {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.calls)
}

// Forget empties what Calls returns.
func (a *API) Forget() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.calls = nil
}

// ServeHTTP is the API.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	http.StripPrefix("/client/v4", a.mux).ServeHTTP(w, r)
}

// apiError is one of the errors in an answer.
type apiError struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
}

type handler func(*request) reply

// request is a call with its token.
type request struct {
	*http.Request
	token *tokenState
	body  []byte
}

func (r *request) decode(into any) bool { return json.Unmarshal(r.body, into) == nil }

// reply is what becomes the envelope.
type reply struct {
	status int
	errors []apiError
	result any
	info   *resultInfo
}

type resultInfo struct {
	Page       int `json:"page"`
	PerPage    int `json:"per_page"`
	Count      int `json:"count"`
	TotalCount int `json:"total_count"`
	TotalPages int `json:"total_pages,omitempty"`
}

func result(v any) reply { return reply{status: http.StatusOK, result: v} }

func refuse(status, code int, message string) reply {
	return reply{status: status, errors: []apiError{{code, message}}}
}

// page cuts one page out of all. Known: the API's reference, "page" and
// "per_page" of each list.
func page[T any](r *request, all []T, normal, most int) reply {
	number := func(key string, otherwise int) int {
		if n, err := strconv.Atoi(r.URL.Query().Get(key)); err == nil && n > 0 {
			return n
		}
		return otherwise
	}
	per := min(number("per_page", normal), most)
	at := number("page", 1)
	from := min((at-1)*per, len(all))
	part := all[from:min(from+per, len(all))]
	if part == nil {
		part = []T{}
	}
	out := result(part)
	out.info = &resultInfo{Page: at, PerPage: per, Count: len(part), TotalCount: len(all), TotalPages: (len(all) + per - 1) / per}
	return out
}

// answer does what is the same for every call: the limit, the token, the fault,
// the envelope, the log.
func (a *API) answer(w http.ResponseWriter, r *http.Request, handle handler) {
	body, _ := io.ReadAll(io.LimitReader(r.Body, 8<<20))
	req := &request{Request: r, body: body}
	call := Call{Method: r.Method, Path: r.URL.Path, Query: r.URL.Query()}
	var out reply
	req.token, out = a.cloud.authenticate(r)
	if req.token != nil {
		call.Token = req.token.name
	}

	a.mu.Lock()
	hook := a.fault
	left, reset, limited := a.count()
	limit, window := a.limit, a.window
	a.mu.Unlock()
	var fault Fault
	if hook != nil {
		fault = hook(call)
	}
	time.Sleep(fault.Delay)
	broken := fault.Cut || fault.Status != 0
	if limited {
		// Known: "Rate limits" in Cloudflare's fundamentals: what goes over is
		// blocked for the next five minutes, with 429 and Retry-After.
		out = refuse(http.StatusTooManyRequests, 971, "Please wait and consider throttling your request speed")
	} else if out.errors == nil && (!broken || fault.After) {
		out = handle(req)
	}
	for _, e := range out.errors {
		call.Codes = append(call.Codes, e.Code)
	}
	call.Status = out.status
	if broken {
		call.Status, call.Codes = fault.Status, nil
	}
	a.mu.Lock()
	a.calls = append(a.calls, call)
	a.mu.Unlock()

	if fault.Cut {
		panic(http.ErrAbortHandler)
	}
	seconds := int(math.Ceil(time.Until(reset).Seconds()))
	w.Header().Set("Ratelimit", fmt.Sprintf(`"default";r=%d;t=%d`, left, seconds))
	w.Header().Set("Ratelimit-Policy", fmt.Sprintf(`"default";q=%d;w=%d`, limit, int(window.Seconds())))
	if fault.Status != 0 {
		w.Header().Set("Content-Type", "text/html; charset=UTF-8")
		w.WriteHeader(fault.Status)
		fmt.Fprintf(w, "<html><head><title>%d</title></head><body>error code: %[1]d</body></html>\n", fault.Status)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if limited {
		w.Header().Set("Retry-After", strconv.Itoa(max(seconds, 1)))
	}
	w.WriteHeader(out.status)
	envelope := struct {
		Success  bool        `json:"success"`
		Errors   []apiError  `json:"errors"`
		Messages []apiError  `json:"messages"`
		Result   any         `json:"result"`
		Info     *resultInfo `json:"result_info,omitempty"`
	}{len(out.errors) == 0, out.errors, []apiError{}, out.result, out.info}
	if envelope.Errors == nil {
		envelope.Errors = []apiError{}
	}
	_ = json.NewEncoder(w).Encode(envelope) // a client that went away
}

// count takes one call from the quota.
func (a *API) count() (left int, reset time.Time, limited bool) {
	now := a.cloud.now()
	if now.Before(a.blocked) {
		return 0, a.blocked, true
	}
	if !now.Before(a.resets) {
		a.used, a.resets = 0, now.Add(a.window)
	}
	if a.used >= a.limit {
		a.blocked = now.Add(a.window)
		return 0, a.blocked, true
	}
	a.used++
	return a.limit - a.used, a.resets, false
}

// Scope is one permission of a token.
type Scope struct{ permission, resource string }

// TunnelEdit is Account / Cloudflare Tunnel / Edit, by account id.
func TunnelEdit(account string) Scope { return Scope{"tunnel", account} }

// ZoneRead is Zone / Zone / Read, by the zone's name.
func ZoneRead(zone string) Scope { return Scope{"zone", zone} }

// DNSRead is Zone / DNS / Read, by the zone's name.
func DNSRead(zone string) Scope { return Scope{"dns:read", zone} }

// DNSEdit is Zone / DNS / Edit, by the zone's name.
func DNSEdit(zone string) Scope { return Scope{"dns", zone} }

type tokenState struct {
	name    string
	scopes  []Scope
	expires time.Time
}

// AddToken makes a token for the API; name is what calls and writes are logged
// under.
func (c *Cloud) AddToken(name string, scopes ...Scope) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	text := "cfut_" + identifier() // as recent ones begin
	c.tokens[text] = &tokenState{name: name, scopes: scopes}
	return text
}

// EndToken lets a token expire, or be revoked, now.
func (c *Cloud) EndToken(token string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := c.tokens[token]; t != nil {
		t.expires = c.now()
	}
}

// authenticate finds the token of a request. Known: threads about the API's
// errors 6003 with 6111 (a header of the wrong form), 9106 (no header), 9109
// (a token that is not, or not any more), 10000 (not allowed here).
func (c *Cloud) authenticate(r *http.Request) (*tokenState, reply) {
	c.mu.Lock()
	defer c.mu.Unlock()
	header := r.Header.Get("Authorization")
	if header == "" {
		return nil, refuse(http.StatusBadRequest, 9106, "Missing X-Auth-Key, X-Auth-Email or Authorization headers")
	}
	text, ok := strings.CutPrefix(header, "Bearer ")
	if !ok || len(text) < 20 || strings.ContainsAny(text, " \t") {
		return nil, refuse(http.StatusBadRequest, 6003, "Invalid request headers")
	}
	t := c.tokens[text]
	if t == nil || !t.expires.IsZero() && !c.now().Before(t.expires) {
		return t, refuse(http.StatusForbidden, 9109, "Invalid access token")
	}
	return t, reply{}
}

func (t *tokenState) may(permission, resource string) bool {
	return slices.Contains(t.scopes, Scope{permission, resource}) ||
		permission == "dns:read" && slices.Contains(t.scopes, Scope{"dns", resource})
}

var forbidden = refuse(http.StatusForbidden, 10000, "Authentication error")

// inAccount runs a call on tunnels, if the token may.
func (a *API) inAccount(r *request, do func(account string) reply) reply {
	c := a.cloud
	c.mu.Lock()
	defer c.mu.Unlock()
	account := r.PathValue("account")
	if _, ok := c.accounts[account]; !ok {
		return refuse(http.StatusNotFound, 7003, "Could not route to "+r.URL.Path+", perhaps your object identifier is invalid?")
	}
	if !r.token.may("tunnel", account) {
		return forbidden
	}
	return do(account)
}

// onTunnel runs a call on one tunnel. A deleted one can still be looked at, and
// nothing else.
func (a *API) onTunnel(r *request, do func(*tunnelState) reply) reply {
	return a.inAccount(r, func(account string) reply {
		id, err := uuid.Parse(r.PathValue("id"))
		t := a.cloud.tunnels[id]
		if err != nil || t == nil || t.Account != account || !t.Deleted.IsZero() && (r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, id.String())) {
			return refuse(http.StatusNotFound, 1003, "Tunnel not found")
		}
		return do(t)
	})
}

type tunnelJSON struct {
	ID          uuid.UUID        `json:"id"`
	AccountTag  string           `json:"account_tag"`
	Name        string           `json:"name"`
	Created     time.Time        `json:"created_at"`
	Deleted     *time.Time       `json:"deleted_at"`
	Status      string           `json:"status"`
	Type        string           `json:"tun_type"`
	Remote      bool             `json:"remote_config"`
	ConfigSrc   string           `json:"config_src"`
	Metadata    struct{}         `json:"metadata"`
	Connections []connectionJSON `json:"connections"`
}

type connectionJSON struct {
	ID            uuid.UUID `json:"id"`
	ClientID      uuid.UUID `json:"client_id"`
	ClientVersion string    `json:"client_version"`
	Colo          string    `json:"colo_name"`
	OriginIP      string    `json:"origin_ip"`
	Opened        time.Time `json:"opened_at"`
	Pending       bool      `json:"is_pending_reconnect"`
}

// shown is a tunnel as the API shows it. Known: the reference of cfd_tunnel;
// the words for its status are those of "Tunnel status" in the documentation.
func (t *tunnelState) shown() tunnelJSON {
	out := tunnelJSON{ID: t.ID, AccountTag: t.Account, Name: t.Name, Created: t.Created, Type: "cfd_tunnel", Remote: t.Remote, ConfigSrc: "local", Status: "inactive", Connections: []connectionJSON{}}
	if t.Remote {
		out.ConfigSrc = "cloudflare"
	}
	if !t.Deleted.IsZero() {
		out.Deleted = &t.Deleted
	}
	for _, c := range t.connections {
		out.Connections = append(out.Connections, connectionJSON{ID: c.ID, ClientID: c.ConnectorID, ClientVersion: c.Version, Colo: c.Location, OriginIP: c.OriginIP, Opened: c.Opened})
		out.Status = "healthy"
	}
	slices.SortFunc(out.Connections, func(x, y connectionJSON) int { return strings.Compare(x.ID.String(), y.ID.String()) })
	return out
}

func (a *API) listTunnels(r *request) reply {
	return a.inAccount(r, func(account string) reply {
		q := r.URL.Query()
		var all []tunnelJSON
		for _, t := range a.cloud.tunnels {
			deleted := q.Get("is_deleted")
			if t.Account != account || q.Get("name") != "" && t.Name != q.Get("name") || q.Get("uuid") != "" && t.ID.String() != q.Get("uuid") ||
				deleted == "false" && !t.Deleted.IsZero() || deleted == "true" && t.Deleted.IsZero() {
				continue
			}
			all = append(all, t.shown())
		}
		slices.SortFunc(all, func(x, y tunnelJSON) int {
			if c := x.Created.Compare(y.Created); c != 0 {
				return c
			}
			return strings.Compare(x.ID.String(), y.ID.String())
		})
		return page(r, all, 20, 1000)
	})
}

// createTunnel. Known: the reference (name, config_src, tunnel_secret of at
// least 32 bytes in base64; the answer has credentials_file and token), and
// error 1013 with status 409 for a name that is taken, which cloudflared
// branches on.
func (a *API) createTunnel(r *request) reply {
	return a.inAccount(r, func(account string) reply {
		var asked struct {
			Name      string `json:"name"`
			ConfigSrc string `json:"config_src"`
			Secret    []byte `json:"tunnel_secret"`
		}
		if !r.decode(&asked) || asked.Name == "" || asked.Secret != nil && len(asked.Secret) < 32 ||
			!slices.Contains([]string{"", "local", "cloudflare"}, asked.ConfigSrc) {
			return refuse(http.StatusBadRequest, 1003, "Invalid request body")
		}
		made, err := a.cloud.addTunnel(account, asked.Name, asked.Secret, asked.ConfigSrc == "cloudflare")
		if err != nil {
			return refuse(http.StatusConflict, 1013, err.Error())
		}
		return result(struct {
			tunnelJSON
			Credentials map[string]any `json:"credentials_file"`
			Token       string         `json:"token"`
		}{a.cloud.tunnels[made.ID].shown(), map[string]any{
			"AccountTag": account, "TunnelID": made.ID, "TunnelName": made.Name, "TunnelSecret": made.Secret,
		}, made.Token()})
	})
}

func (a *API) getTunnel(r *request) reply {
	return a.onTunnel(r, func(t *tunnelState) reply { return result(t.shown()) })
}

// deleteTunnel. Known: error 1022 for a tunnel with connections, from those who
// ran into it; nothing that is connected is cut.
func (a *API) deleteTunnel(r *request) reply {
	return a.onTunnel(r, func(t *tunnelState) reply {
		if len(t.connections) > 0 {
			return refuse(http.StatusBadRequest, 1022, errTunnelInUse.Error())
		}
		t.Deleted = a.cloud.now()
		return result(t.shown())
	})
}

func (a *API) tunnelToken(r *request) reply {
	return a.onTunnel(r, func(t *tunnelState) reply { return result(t.Token()) })
}

type configurationJSON struct {
	TunnelID uuid.UUID       `json:"tunnel_id"`
	Version  int32           `json:"version"`
	Config   json.RawMessage `json:"config"`
	Source   string          `json:"source"`
}

func (t *tunnelState) shownConfiguration() reply {
	config := t.configuration
	if config == nil {
		config = json.RawMessage("null")
	}
	return result(configurationJSON{t.ID, t.version, config, t.shown().ConfigSrc})
}

func (a *API) getConfiguration(r *request) reply {
	return a.onTunnel(r, (*tunnelState).shownConfiguration)
}

// putConfiguration replaces the whole and counts the version up. Known:
// cloudflared's issue 1437 and the reference.
func (a *API) putConfiguration(r *request) reply {
	return a.onTunnel(r, func(t *tunnelState) reply {
		var asked struct {
			Config json.RawMessage `json:"config"`
		}
		if !r.decode(&asked) || len(asked.Config) == 0 {
			return refuse(http.StatusBadRequest, 1056, "Bad Configuration")
		}
		t.configuration = asked.Config
		t.version++
		for _, push := range a.cloud.pushes {
			go push(t.ID, t.version, t.configuration)
		}
		return t.shownConfiguration()
	})
}

func (a *API) listConnections(r *request) reply {
	return a.onTunnel(r, func(t *tunnelState) reply {
		type client struct {
			ID       uuid.UUID        `json:"id"`
			Version  string           `json:"version"`
			Arch     string           `json:"arch"`
			Features []string         `json:"features"`
			RunAt    time.Time        `json:"run_at"`
			Conns    []connectionJSON `json:"conns"`
		}
		clients := []client{}
		for _, c := range t.shown().Connections {
			i := slices.IndexFunc(clients, func(have client) bool { return have.ID == c.ClientID })
			if i < 0 {
				clients = append(clients, client{ID: c.ClientID, Version: c.ClientVersion, Features: []string{}, RunAt: c.Opened})
				i = len(clients) - 1
			}
			clients[i].Conns = append(clients[i].Conns, c)
		}
		return result(clients)
	})
}

// cutConnections forgets connections, as "tunnel cleanup" does; the edge is not
// told, which is as far as the real one is known.
func (a *API) cutConnections(r *request) reply {
	return a.onTunnel(r, func(t *tunnelState) reply {
		client := r.URL.Query().Get("client_id")
		for id, c := range t.connections {
			if client == "" || c.ConnectorID.String() == client {
				delete(t.connections, id)
			}
		}
		return result(nil)
	})
}

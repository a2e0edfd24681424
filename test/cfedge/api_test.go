package cfedge

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cloudflare/cloudflared/cfapi"
	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/rs/zerolog"
)

// TestCloudflaredsOwnClient drives the calls on tunnels with the client that
// cloudflared has for them: what it reads without complaint is the shape of the
// real answers.
func TestCloudflaredsOwnClient(t *testing.T) {
	cloud := NewCloud()
	account := cloud.AddAccount("home")
	server := httptest.NewServer(NewAPI(cloud))
	defer server.Close()
	quiet := zerolog.Nop()
	client := func(token string) *cfapi.RESTClient {
		c, err := cfapi.NewRESTClient(server.URL+"/client/v4", account, "zone", token, "test", &quiet)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	c := client(cloud.AddToken("tunnels", TunnelEdit(account)))
	secret := bytes.Repeat([]byte{7}, 32)
	made, err := c.CreateTunnel("main", secret)
	if err != nil || made.Name != "main" {
		t.Fatalf("made %+v, %v", made, err)
	}
	if _, err := cloud.Authenticate(account, made.ID, secret); err != nil {
		t.Errorf("the edge refuses its secret: %v", err)
	}
	if _, err := c.CreateTunnel("main", secret); !errors.Is(err, cfapi.ErrTunnelNameConflict) {
		t.Errorf("a second one of the name: %v", err)
	}
	for i := range 25 { // more than a page
		cloud.AddTunnel(account, fmt.Sprint("t", i), nil)
	}
	filter := cfapi.NewTunnelFilter()
	filter.NoDeleted()
	if all, err := c.ListTunnels(filter); err != nil || len(all) != 26 || all[0].Name != "main" {
		t.Errorf("%d tunnels, %v", len(all), err)
	}
	filter.ByName("main")
	if all, err := c.ListTunnels(filter); err != nil || len(all) != 1 || all[0].ID != made.ID {
		t.Errorf("%d tunnels of the name, %v", len(all), err)
	}
	token, err := c.GetTunnelToken(made.ID)
	if info, _ := cloud.Tunnel(made.ID); err != nil || token != made.Token || token != info.Token() {
		t.Errorf("the token is %q, %v", token, err)
	}

	connector := uuid.New()
	gone := cloud.Connect(made.ID, CloudConnection{ID: uuid.New(), ConnectorID: connector, Location: "dft01", Version: "2026.5.0", OriginIP: "198.51.100.4"})
	cloud.Connect(made.ID, CloudConnection{ID: uuid.New(), ConnectorID: connector, Location: "dft02"})
	clients, err := c.ListActiveClients(made.ID)
	if err != nil || len(clients) != 1 || clients[0].ID != connector || len(clients[0].Connections) != 2 {
		t.Errorf("clients %+v, %v", clients, err)
	}
	gone()
	if err := c.DeleteTunnel(made.ID, false); err == nil || !strings.Contains(err.Error(), "1022") {
		t.Errorf("a tunnel in use is deleted: %v", err)
	}
	if err := c.CleanupConnections(made.ID, cfapi.NewCleanupParams()); err != nil {
		t.Error(err)
	}
	if err := c.DeleteTunnel(made.ID, false); err != nil {
		t.Error(err)
	}
	if left, err := c.GetTunnel(made.ID); err != nil || left.DeletedAt.IsZero() {
		t.Errorf("the deleted tunnel is %+v, %v", left, err)
	}
	if _, err := c.GetTunnelToken(made.ID); err == nil || !strings.Contains(err.Error(), "not found") {
		t.Errorf("a deleted tunnel has a token: %v", err)
	}
	if _, err := cloud.Authenticate(account, made.ID, secret); err == nil {
		t.Error("the edge lets a deleted tunnel in")
	}
	if _, err := client(cloud.AddToken("other", TunnelEdit(cloud.AddAccount("other")))).GetTunnelToken(made.ID); err == nil {
		t.Error("a token of another account is good here")
	}
}

// asker asks the API and returns status, codes of errors and result.
type asker struct {
	*testing.T
	api   *API
	token string
}

func (a asker) ask(method, path string, body any) (status int, codes []int, result json.RawMessage, header http.Header) {
	a.Helper()
	text, _ := json.Marshal(body)
	req := httptest.NewRequest(method, "/client/v4"+path, bytes.NewReader(text))
	if a.token != "" {
		req.Header.Set("Authorization", "Bearer "+a.token)
	}
	recorder := httptest.NewRecorder()
	a.api.ServeHTTP(recorder, req)
	var envelope struct {
		Success bool
		Errors  []apiError
		Result  json.RawMessage
	}
	if err := json.Unmarshal(recorder.Body.Bytes(), &envelope); err != nil || envelope.Success != (len(envelope.Errors) == 0) || envelope.Success != (recorder.Code == 200) {
		a.Fatalf("%s %s: %d %s", method, path, recorder.Code, recorder.Body)
	}
	for _, e := range envelope.Errors {
		codes = append(codes, e.Code)
	}
	return recorder.Code, codes, envelope.Result, recorder.Header()
}

func zoneWorld(t *testing.T) (*Cloud, asker, string) {
	cloud := NewCloud()
	zone := cloud.AddZone(cloud.AddAccount("home"), "example.org")
	return cloud, asker{t, NewAPI(cloud), cloud.AddToken("dns", DNSEdit("example.org"), ZoneRead("example.org"))}, "/zones/" + zone + "/dns_records"
}

// TestRecordRules are the refusals that a client must live with.
func TestRecordRules(t *testing.T) {
	for _, c := range []struct {
		name   string
		there  []Record
		record Record
		code   int
	}{
		{"an alias", nil, Record{Type: "CNAME", Name: "a.example.org", Content: "b.example.org", Proxied: true}, 0},
		{"beside an address", []Record{{Type: "A", Name: "a.example.org", Content: "192.0.2.1"}}, Record{Type: "CNAME", Name: "A.example.org.", Content: "b.example.org"}, 81053},
		{"beside an alias", []Record{{Type: "CNAME", Name: "a.example.org", Content: "c.example.org"}}, Record{Type: "CNAME", Name: "a.example.org", Content: "b.example.org"}, 81053},
		{"an address beside an alias", []Record{{Type: "CNAME", Name: "a.example.org", Content: "c.example.org"}}, Record{Type: "A", Name: "a.example.org", Content: "192.0.2.1"}, 81054},
		{"beside a delegation", []Record{{Type: "NS", Name: "a.example.org", Content: "ns.example.net"}}, Record{Type: "CNAME", Name: "a.example.org", Content: "b.example.org"}, 81056},
		{"beside text and mail", []Record{{Type: "TXT", Name: "a.example.org", Content: `"x"`}, {Type: "MX", Name: "a.example.org", Content: "m.example.org"}}, Record{Type: "CNAME", Name: "a.example.org", Content: "b.example.org"}, 0},
		{"at the apex, which is flattened", nil, Record{Type: "CNAME", Name: "@", Content: "b.example.net"}, 0},
		{"the same again", []Record{{Type: "TXT", Name: "a.example.org", Content: `"x"`}}, Record{Type: "TXT", Name: "a.example.org", Content: "x"}, 81058},
		{"to itself", nil, Record{Type: "CNAME", Name: "a.example.org", Content: "a.example.org"}, 9039},
		{"a star within", nil, Record{Type: "TXT", Name: "_x.*.example.org", Content: "x"}, 9000},
		{"a long label", nil, Record{Type: "TXT", Name: strings.Repeat("a", 64) + ".example.org", Content: "x"}, 9000},
		{"a long comment", nil, Record{Type: "TXT", Name: "a.example.org", Content: "x", Comment: strings.Repeat("c", 101)}, 9010},
		{"text through the proxy", nil, Record{Type: "TXT", Name: "a.example.org", Content: "x", Proxied: true}, 9004},
		{"a short life", nil, Record{Type: "TXT", Name: "a.example.org", Content: "x", TTL: 5}, 9021},
	} {
		t.Run(c.name, func(t *testing.T) {
			cloud, a, path := zoneWorld(t)
			a.T = t
			for _, r := range c.there {
				cloud.Put(r)
			}
			if c.record.TTL == 0 {
				c.record.TTL = 1
			}
			_, codes, _, _ := a.ask("POST", path, c.record)
			if c.code == 0 && codes != nil || c.code != 0 && !slices.Equal(codes, []int{c.code}) {
				t.Errorf("codes %v, want %d", codes, c.code)
			}
			if n := len(cloud.Records("example.org")); n != len(c.there) && c.code != 0 {
				t.Errorf("there are %d records", n)
			}
		})
	}
}

func TestBatchIsAllOrNothing(t *testing.T) {
	cloud, a, path := zoneWorld(t)
	alias := cloud.Put(Record{Type: "CNAME", Name: "a.example.org", Content: "b.example.net", Comment: "kept"})
	text := cloud.Put(Record{Type: "TXT", Name: "t.example.org", Content: "x"})
	before := cloud.Records("example.org")
	if status, codes, _, _ := a.ask("POST", path+"/batch", map[string]any{
		"deletes": []any{map[string]string{"id": text.ID}},
		"posts":   []any{Record{Type: "A", Name: "a.example.org", Content: "192.0.2.1", TTL: 1}},
	}); status != 400 || !slices.Equal(codes, []int{81054}) {
		t.Errorf("%d %v", status, codes)
	}
	if diff := cmp.Diff(before, cloud.Records("example.org")); diff != "" {
		t.Errorf("a refused batch wrote: %s", diff)
	}
	// Deletes go first, so the name is free; a patch keeps what it leaves out.
	status, codes, result, _ := a.ask("POST", path+"/batch", map[string]any{
		"deletes": []any{map[string]string{"id": text.ID}},
		"patches": []any{map[string]string{"id": alias.ID, "content": "c.example.net"}},
		"posts":   []any{Record{Type: "CNAME", Name: "t.example.org", Content: "d.example.net", TTL: 1}},
	})
	var out map[string][]Record
	if err := json.Unmarshal(result, &out); err != nil || status != 200 || codes != nil || len(out["deletes"]) != 1 || len(out["posts"]) != 1 || out["posts"][0].ID == "" || out["patches"][0].Comment != "kept" {
		t.Errorf("%d %v %s", status, codes, result)
	}
	var lines []string
	for _, r := range cloud.Records("example.org") {
		lines = append(lines, r.Name+" "+r.Content)
	}
	if diff := cmp.Diff([]string{"a.example.org c.example.net", "t.example.org d.example.net"}, lines); diff != "" {
		t.Error(diff)
	}
	if n := len(cloud.History()); n != 2+3 {
		t.Errorf("the history has %d writes", n)
	}
	many := make([]any, 201)
	for i := range many {
		many[i] = Record{Type: "TXT", Name: fmt.Sprintf("n%d.example.org", i), Content: "x", TTL: 1}
	}
	if status, _, _, _ := a.ask("POST", path+"/batch", map[string]any{"posts": many}); status != 400 {
		t.Errorf("a batch of 201 is answered %d", status)
	}
	if status, _, _, _ := a.ask("DELETE", path+"/"+alias.ID, nil); status != 200 {
		t.Errorf("a delete is answered %d", status)
	}
	if status, codes, _, _ := a.ask("GET", path+"/"+alias.ID, nil); status != 404 || !slices.Equal(codes, []int{81044}) {
		t.Errorf("what is deleted is answered %d %v", status, codes)
	}
}

// TestSingleWrites goes through the calls on one record.
func TestSingleWrites(t *testing.T) {
	cloud, a, path := zoneWorld(t)
	one := cloud.Put(Record{Type: "TXT", Name: "a.example.org", Content: "x", Comment: "kept"})
	at := path + "/" + one.ID
	for _, c := range []struct {
		method string
		body   any
		status int
		want   Record
	}{
		{"PATCH", map[string]any{"content": `"y"`}, 200, Record{Type: "TXT", Name: "a.example.org", Content: `"y"`, TTL: 1, Comment: "kept"}},
		{"PUT", Record{Type: "TXT", Name: "a.example.org", Content: `"z"`, TTL: 300}, 200, Record{Type: "TXT", Name: "a.example.org", Content: `"z"`, TTL: 300}},
		{"PATCH", map[string]any{"ttl": 2}, 400, Record{Type: "TXT", Name: "a.example.org", Content: `"z"`, TTL: 300}},
		{"PUT", "text", 400, Record{Type: "TXT", Name: "a.example.org", Content: `"z"`, TTL: 300}},
	} {
		status, codes, _, _ := a.ask(c.method, at, c.body)
		_, _, result, _ := a.ask("GET", at, nil)
		var have Record
		if err := json.Unmarshal(result, &have); err != nil || status != c.status {
			t.Errorf("%s is answered %d %v, %v", c.method, status, codes, err)
		}
		have.ID, have.Created, have.Modified = "", time.Time{}, time.Time{}
		if diff := cmp.Diff(c.want, have); diff != "" {
			t.Errorf("after %s: %s", c.method, diff)
		}
	}
	if status, codes, _, _ := a.ask("PUT", path+"/0123", Record{}); status != 404 || !slices.Equal(codes, []int{81044}) {
		t.Errorf("a record that is not there is answered %d %v", status, codes)
	}
	for i := range 5 {
		cloud.Put(Record{Type: "A", Name: fmt.Sprintf("p%d.example.org", i), Content: "192.0.2.1"})
	}
	for query, want := range map[string]int{"?type=TXT": 1, "?name=p3.example.org": 1, "?per_page=4": 4, "?per_page=4&page=2": 2, "?per_page=4&page=3": 0} {
		_, _, result, _ := a.ask("GET", path+query, nil)
		var list []Record
		if err := json.Unmarshal(result, &list); err != nil || len(list) != want {
			t.Errorf("%s lists %d records, %v", query, len(list), err)
		}
	}
}

// TestConfigurationsArePutAndPushed counts versions, and tells the edge.
func TestConfigurationsArePutAndPushed(t *testing.T) {
	cloud := NewCloud()
	account := cloud.AddAccount("home")
	tunnel := cloud.AddTunnel(account, "main", nil)
	a := asker{t, NewAPI(cloud), cloud.AddToken("tunnels", TunnelEdit(account))}
	path := "/accounts/" + account + "/cfd_tunnel/" + tunnel.ID.String() + "/configurations"
	pushed := make(chan int32, 2)
	cloud.OnConfigure(func(id uuid.UUID, version int32, config []byte) {
		if id == tunnel.ID && string(config) == `{"ingress":[]}` {
			pushed <- version
		}
	})
	if _, _, ok := cloud.Configuration(tunnel.ID); ok {
		t.Error("there is a configuration before one was put")
	}
	for _, version := range []int32{1, 2} {
		if status, _, _, _ := a.ask("PUT", path, map[string]any{"config": map[string]any{"ingress": []any{}}}); status != 200 || <-pushed != version {
			t.Errorf("a configuration is answered %d", status)
		}
	}
	if version, config, ok := cloud.Configuration(tunnel.ID); !ok || version != 2 || string(config) != `{"ingress":[]}` {
		t.Errorf("there is version %d: %s", version, config)
	}
	if _, _, result, _ := a.ask("GET", path, nil); !strings.Contains(string(result), `"version":2`) || !strings.Contains(string(result), `"source":"cloudflare"`) {
		t.Errorf("the API shows %s", result)
	}
	if status, _, _, _ := a.ask("PUT", path, "text"); status != 400 {
		t.Errorf("what is no configuration is answered %d", status)
	}
}

func TestTokensAndLimits(t *testing.T) {
	cloud, a, path := zoneWorld(t)
	cloud.AddZone(cloud.AddAccount("x"), "example.net")
	if _, _, result, _ := a.ask("GET", "/zones", nil); strings.Count(string(result), `"id"`) != 2 || !strings.Contains(string(result), "example.org") {
		t.Errorf("the token sees %s", result)
	}
	reader := asker{t, a.api, cloud.AddToken("reader", DNSRead("example.org"))}
	for _, c := range []struct {
		asker
		method, path string
		status, code int
	}{
		{a, "GET", path, 200, 0},
		{reader, "GET", path, 200, 0},
		{reader, "POST", path, 403, 10000},
		{reader, "GET", "/accounts/" + cloud.AddAccount("y") + "/cfd_tunnel", 403, 10000},
		{asker{t, a.api, "cfut_01234567890123456789"}, "GET", path, 403, 9109},
		{asker{t, a.api, "short"}, "GET", path, 400, 6003},
		{asker{t, a.api, ""}, "GET", path, 400, 9106},
		{a, "GET", "/zones/0123/dns_records", 404, 7003},
		{a, "GET", "/nothing", 404, 7003},
	} {
		status, codes, _, _ := c.ask(c.method, c.path, Record{})
		if status != c.status || c.code != 0 && !slices.Equal(codes, []int{c.code}) {
			t.Errorf("%s %s is answered %d %v, want %d %d", c.method, c.path, status, codes, c.status, c.code)
		}
	}
	cloud.EndToken(reader.token)
	if status, _, _, _ := reader.ask("GET", path, nil); status != 403 {
		t.Errorf("a token that ended is answered %d", status)
	}

	a.api.SetLimit(2, time.Minute)
	for _, want := range []int{200, 200, 429, 429} {
		status, _, _, header := a.ask("GET", path, nil)
		if status != want || (want == 429) != (header.Get("Retry-After") == "60") {
			t.Errorf("answered %d, Retry-After %q, Ratelimit %q", status, header.Get("Retry-After"), header.Get("Ratelimit"))
		}
	}
	now := time.Now().Add(time.Minute + time.Second)
	cloud.now = func() time.Time { return now }
	if status, _, _, header := a.ask("GET", path, nil); status != 200 || !strings.HasPrefix(header.Get("Ratelimit"), `"default";r=1;t=`) {
		t.Errorf("after the minute: %d, %q", status, header.Get("Ratelimit"))
	}
}

func TestCallsThatGoWrong(t *testing.T) {
	cloud, _, path := zoneWorld(t)
	api := NewAPI(cloud)
	server := httptest.NewServer(api)
	defer server.Close()
	token := cloud.AddToken("dns", DNSEdit("example.org"))
	for i, fault := range []Fault{{Cut: true}, {Cut: true, After: true}, {Status: 502}, {Status: 502, After: true}} {
		api.SetFault(func(Call) Fault { return fault })
		text, _ := json.Marshal(Record{Type: "TXT", Name: fmt.Sprintf("n%d.example.org", i), Content: "x", TTL: 1})
		req, _ := http.NewRequest("POST", server.URL+"/client/v4"+path, bytes.NewReader(text))
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := http.DefaultClient.Do(req)
		if fault.Cut != (err != nil) {
			t.Errorf("%+v: %v", fault, err)
		}
		if err == nil {
			_, _ = io.Copy(io.Discard, resp.Body)
			_ = resp.Body.Close()
			if resp.StatusCode != 502 || strings.Contains(resp.Header.Get("Content-Type"), "json") {
				t.Errorf("%+v is answered %v", fault, resp)
			}
		}
		if n := len(cloud.Records("example.org")); (n == 1) != fault.After {
			t.Errorf("%+v leaves %d records", fault, n)
		}
		for _, r := range cloud.Records("example.org") {
			cloud.Remove(r.ID)
		}
	}
	http.DefaultClient.CloseIdleConnections()
	if calls := api.Calls(); len(calls) != 4 || calls[0].Token != "dns" || !calls[0].Write() {
		t.Errorf("the calls are %+v", calls)
	}
}

func TestRoute(t *testing.T) {
	cloud := NewCloud()
	account := cloud.AddAccount("home")
	cloud.AddZone(account, "example.org")
	exact, wild, deep := uuid.New(), uuid.New(), uuid.New()
	cloud.AddRoute("app.example.org", exact)
	cloud.AddRoute("*.example.org", wild)
	cloud.AddRoute("*.lab.example.org", deep)
	cloud.AddRoute("host.example.net", deep)
	cloud.Put(Record{Type: "CNAME", Name: "direct.example.org", Content: exact.String() + TargetSuffix})
	cloud.Put(Record{Type: "TXT", Name: "_x.empty.example.org", Content: "x"})
	for host, want := range map[string]uuid.UUID{
		"app.example.org": exact, "App.Example.org.": exact, "other.example.org": wild, "a.b.example.org": wild,
		"x.lab.example.org": deep, "host.example.net": deep,
		"example.org": {}, "lab.example.org": {}, "direct.example.org": {}, "empty.example.org": {}, "x.app.example.org": {}, "nowhere.example.com": {},
	} {
		if got, ok := cloud.Route(host); got != want || ok != (want != uuid.UUID{}) {
			t.Errorf("%s leads to %v, %v", host, got, ok)
		}
	}
}

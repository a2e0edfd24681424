package rig_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/edgeward/edgeward/test/rig"
	"github.com/edgeward/edgeward/test/rig/rigtest"
)

// within fails the test when what began at start took longer than limit.
func within(t *testing.T, start time.Time, limit time.Duration, what string) {
	t.Helper()
	took := time.Since(start)
	t.Logf("%s took %s", what, took.Round(time.Millisecond))
	if took > limit {
		t.Errorf("%s took %s, want at most %s", what, took, limit)
	}
}

// bench gives a test the time that a busy machine may need, and no more.
func bench(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// pull asks for the decision stream as a bouncer does and returns the values of
// the new decisions.
func pull(t *testing.T, client *http.Client, url, key string) []string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url+"/v1/decisions/stream?startup=true&dedup=false", nil)
	if err != nil {
		t.Fatal(err)
	}
	if key != "" {
		req.Header.Set("X-Api-Key", key)
	}
	req.Header.Set("User-Agent", "rig-test/v1.2.3")
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("pull: status %d, error %v: %s", resp.StatusCode, err, body)
	}
	var stream struct{ New []struct{ Value string } }
	if err := json.Unmarshal(body, &stream); err != nil {
		t.Fatal(err)
	}
	var values []string
	for _, d := range stream.New {
		values = append(values, d.Value)
	}
	slices.Sort(values)
	return values
}

func wantValues(t *testing.T, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("stream holds %q, want %q", got, want)
	}
}

func TestLAPI(t *testing.T) {
	t.Parallel()
	ctx := bench(t)
	rigtest.Tool(t, "crowdsec")
	rigtest.Tool(t, "cscli")
	began := time.Now()
	l := rigtest.LAPI(t, rig.LAPIOptions{})
	within(t, began, 2*time.Second, "starting LAPI")

	key, err := l.AddBouncer(ctx, "bouncer")
	if err != nil {
		t.Fatal(err)
	}
	wantValues(t, pull(t, http.DefaultClient, l.URL, key))
	for _, value := range []string{"192.0.2.1", "198.51.100.0/24", "2001:db8::1"} {
		if err := l.Ban(ctx, value, time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	wantValues(t, pull(t, http.DefaultClient, l.URL, key), "192.0.2.1", "198.51.100.0/24", "2001:db8::1")
	if err := l.Unban(ctx, "198.51.100.0/24"); err != nil {
		t.Fatal(err)
	}
	wantValues(t, pull(t, http.DefaultClient, l.URL, key), "192.0.2.1", "2001:db8::1")
	if err := l.Import(ctx, []rig.Decision{{Value: "203.0.113.7", Duration: time.Hour}, {Value: "203.0.113.128/25", Type: "captcha", Duration: time.Hour}}); err != nil {
		t.Fatal(err)
	}
	wantValues(t, pull(t, http.DefaultClient, l.URL, key), "192.0.2.1", "2001:db8::1", "203.0.113.128/25", "203.0.113.7")

	bouncers, err := l.Bouncers(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(bouncers) != 1 || bouncers[0].Name != "bouncer" || bouncers[0].IP != "127.0.0.1" ||
		bouncers[0].Type != "rig-test" || bouncers[0].Version != "v1.2.3" || time.Since(bouncers[0].LastPull) > time.Minute {
		t.Errorf("bouncers are %+v, want one that has just pulled as rig-test/v1.2.3", bouncers)
	}

	for _, test := range []struct {
		name string
		end  func() error
	}{
		{"stop", func() error { return l.Stop(ctx) }},
		{"kill", func() error { l.Kill(); return nil }},
	} {
		url := l.URL
		if err := test.end(); err != nil {
			t.Fatalf("%s: %v", test.name, err)
		}
		if resp, err := http.Get(l.URL + "/health"); err == nil {
			resp.Body.Close()
			t.Fatalf("%s: LAPI still answers", test.name)
		}
		http.DefaultClient.CloseIdleConnections()
		if err := l.Start(ctx); err != nil {
			t.Fatalf("start after %s: %v", test.name, err)
		}
		if l.URL != url {
			t.Errorf("start after %s: URL is %s, was %s", test.name, l.URL, url)
		}
		wantValues(t, pull(t, http.DefaultClient, l.URL, key), "192.0.2.1", "2001:db8::1", "203.0.113.128/25", "203.0.113.7")
	}
	if _, err := l.Cscli(ctx, "decisions", "list", "--no-such-flag"); err == nil || !strings.Contains(err.Error(), "no-such-flag") {
		t.Errorf("error of a wrong command is %v, want what cscli says", err)
	}
	dir := l.Dir
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("directory after Close: error is %v, want none there", err)
	}
}

func TestLAPISocket(t *testing.T) {
	t.Parallel()
	ctx := bench(t)
	l := rigtest.LAPI(t, rig.LAPIOptions{Socket: true, Chunked: true})
	key, err := l.AddBouncer(ctx, "bouncer")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Ban(ctx, "192.0.2.1", time.Hour); err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", l.SocketPath)
	}}
	defer transport.CloseIdleConnections()
	wantValues(t, pull(t, &http.Client{Transport: transport}, "http://unix", key), "192.0.2.1")
}

func TestLAPITLS(t *testing.T) {
	t.Parallel()
	ctx := bench(t)
	l := rigtest.LAPI(t, rig.LAPIOptions{TLS: true})
	if err := l.Ban(ctx, "192.0.2.1", time.Hour); err != nil {
		t.Fatal(err)
	}
	client := func(name, ou string) *http.Client {
		cert, key, err := l.PKI.Client(name, ou)
		if err != nil {
			t.Fatal(err)
		}
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: l.PKI.Pool(), Certificates: []tls.Certificate{pair}}}
		t.Cleanup(transport.CloseIdleConnections)
		return &http.Client{Transport: transport}
	}
	wantValues(t, pull(t, client("bouncer", rig.BouncerOU), l.URL, ""), "192.0.2.1")

	resp, err := client("stranger", "strangers").Get(l.URL + "/v1/decisions/stream?startup=true")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusForbidden {
		t.Errorf("status for a stranger's certificate is %d, want 403", resp.StatusCode)
	}
}

func TestLAPISeed(t *testing.T) {
	t.Parallel()
	ctx := bench(t)
	var seed []rig.Decision
	var want []string
	for i := range 200 {
		value := fmt.Sprintf("192.0.2.%d", i)
		want = append(want, value)
		seed = append(seed, rig.Decision{Value: value, Duration: 8760 * time.Hour})
	}
	slices.Sort(want)
	for range 2 {
		l := rigtest.LAPI(t, rig.LAPIOptions{Seed: seed})
		key, err := l.AddBouncer(ctx, "bouncer")
		if err != nil {
			t.Fatal(err)
		}
		wantValues(t, pull(t, http.DefaultClient, l.URL, key), want...)
		// The cache must not see what happens to a copy.
		if _, err := l.Cscli(ctx, "decisions", "delete", "--all"); err != nil {
			t.Fatal(err)
		}
	}
}

func TestTraefik(t *testing.T) {
	t.Parallel()
	ctx := bench(t)
	rigtest.Tool(t, "traefik")
	origin := rigtest.Origin(t)
	began := time.Now()
	tr := rigtest.Traefik(t, rig.TraefikOptions{
		Bare: true, Plugins: map[string]string{"empty": "../emptyplugin"},
		Alt: true, TLS: true, AccessLog: true, Env: []string{"GOMAXPROCS=1"},
	})
	within(t, began, 5*time.Second, "starting Traefik")

	dynamic := func(router, plugin string) string {
		return `
http:
  routers:
    ` + router + `: {rule: "PathPrefix(` + "`/`" + `)", service: origin, middlewares: [empty]}
  services:
    origin: {loadBalancer: {servers: [{url: "` + origin.URL + `"}]}}
  middlewares:
    empty: {plugin: {` + plugin + `}}
`
	}
	for _, test := range []struct {
		name    string
		yaml    string
		wantErr string
	}{
		{"a good configuration", dynamic("all", "empty: {}"), ""},
		{"the same again", dynamic("all", "empty: {}"), ""},
		{"a plugin that fails", dynamic("all", "empty: {fail: true}"), "told to fail"},
		{"an unknown plugin", dynamic("all", "none: {}"), "none"},
		{"broken YAML", "http: [", "yaml"},
		{"an unknown field", "http: {rooters: {}}", "rooters"},
		{"a good one after the bad", dynamic("every", "empty: {}"), ""},
	} {
		began := time.Now()
		err := tr.SetDynamic(ctx, test.yaml)
		if test.wantErr == "" && err != nil || test.wantErr != "" && (err == nil || !strings.Contains(err.Error(), test.wantErr)) {
			t.Errorf("%s: error is %v, want one with %q", test.name, err, test.wantErr)
		}
		within(t, began, 5*time.Second, "applying "+test.name)
	}

	insecure := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	defer insecure.CloseIdleConnections()
	for _, url := range []string{tr.URL, tr.AltURL, tr.TLSURL} {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/some/path?q=1", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Forwarded-For", "192.0.2.1")
		resp, err := (&http.Client{Transport: insecure}).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		var arrived rig.Arrived
		err = json.NewDecoder(resp.Body).Decode(&arrived)
		resp.Body.Close()
		if err != nil || arrived.Method != "GET" || arrived.URL != "/some/path?q=1" {
			t.Errorf("%s: origin saw %+v, error %v", url, arrived, err)
		}
		if got := arrived.Header.Get("X-Forwarded-For"); got != "127.0.0.1" {
			t.Errorf("%s: X-Forwarded-For is %q, want the true client alone", url, got)
		}
	}
	if got := origin.Requests(); got != 3 {
		t.Errorf("origin counts %d requests, want 3", got)
	}

	if cpu, err := tr.CPU(); err != nil || cpu <= 0 || cpu > time.Minute {
		t.Errorf("CPU is %s, error %v", cpu, err)
	}
	if rss, err := tr.RSS(); err != nil || rss < 10<<20 || rss > 1<<30 {
		t.Errorf("RSS is %d bytes, error %v", rss, err)
	}
	if n, err := tr.Goroutines(ctx); err != nil || n < 5 {
		t.Errorf("goroutines are %d, error %v", n, err)
	}
	if err := tr.WaitLog(ctx, "Starting provider aggregator"); err != nil {
		t.Error(err)
	}
	began = time.Now()
	if err := tr.Stop(ctx); err != nil {
		t.Error(err)
	}
	within(t, began, 5*time.Second, "stopping Traefik")
	if log, err := os.ReadFile(tr.Dir + "/access.log"); err != nil || strings.Count(string(log), "/some/path") < 3 {
		t.Errorf("access log is %q, error %v", log, err)
	}
}

func TestTraefikTrustForwarded(t *testing.T) {
	t.Parallel()
	ctx := bench(t)
	origin := rigtest.Origin(t)
	tr := rigtest.Traefik(t, rig.TraefikOptions{Bare: true, TrustForwarded: true})
	err := tr.SetDynamic(ctx, `
http:
  routers: {all: {rule: "PathPrefix(`+"`/`"+`)", service: origin}}
  services: {origin: {loadBalancer: {servers: [{url: "`+origin.URL+`"}]}}}
`)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, tr.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Forwarded-For", "192.0.2.1")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var arrived rig.Arrived
	if err := json.NewDecoder(resp.Body).Decode(&arrived); err != nil {
		t.Fatal(err)
	}
	if got := arrived.Header.Get("X-Forwarded-For"); got != "192.0.2.1, 127.0.0.1" {
		t.Errorf("X-Forwarded-For is %q, want the posed client first", got)
	}
}

// TestContextEnds shows that what is started does not outlive its context.
func TestContextEnds(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(bench(t))
	l, err := rig.StartLAPI(ctx, rig.LAPIOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	pid := l.PID()
	cancel()
	waitGone(t, pid)
}

// TestParentDies shows that what is started does not outlive this process, even
// when it is killed.
func TestParentDies(t *testing.T) {
	if os.Getenv("RIG_PARENT") != "" {
		l, err := rig.StartLAPI(t.Context(), rig.LAPIOptions{})
		if err != nil {
			t.Fatal(err)
		}
		fmt.Printf("\n%d %s\n", l.PID(), l.Dir)
		select {}
	}
	t.Parallel()
	cmd := exec.CommandContext(bench(t), os.Args[0], "-test.run=^TestParentDies$")
	cmd.Env = append(os.Environ(), "RIG_PARENT=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	var dir string
	for scanner := bufio.NewScanner(out); pid == 0 && scanner.Scan(); {
		fmt.Sscanf(scanner.Text(), "%d %s", &pid, &dir)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // with the error that it was killed
	if pid == 0 {
		t.Fatal("the child started no LAPI")
	}
	defer os.RemoveAll(dir)
	waitGone(t, pid)
}

// waitGone waits until a process is gone or a zombie: who reaps orphans may be
// slow about it.
func waitGone(t *testing.T, pid int) {
	t.Helper()
	deadline := time.Now().Add(15 * time.Second)
	for {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %d runs on", pid)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// TestPortTaken shows that a server which finds its port taken is recognised as
// such, even when what took it answers in its place.
func TestPortTaken(t *testing.T) {
	t.Parallel()
	ctx := bench(t)
	for _, test := range []struct {
		name   string
		server interface {
			Start(context.Context) error
			Stop(context.Context) error
		}
	}{
		{name: "crowdsec", server: rigtest.LAPI(t, rig.LAPIOptions{})},
		{name: "traefik", server: rigtest.Traefik(t, rig.TraefikOptions{Bare: true})},
	} {
		url := ""
		switch server := test.server.(type) {
		case *rig.LAPI:
			url = server.URL
		case *rig.Traefik:
			url = server.APIURL
		}
		if err := test.server.Stop(ctx); err != nil {
			t.Fatal(err)
		}
		listener, err := net.Listen("tcp", strings.TrimPrefix(url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		go http.Serve(listener, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
		err = test.server.Start(ctx)
		if err == nil || !strings.Contains(err.Error(), "address already in use") {
			t.Errorf("%s: error is %v, want that the address is in use", test.name, err)
		}
		listener.Close()
		if err := test.server.Start(ctx); err != nil {
			t.Errorf("%s: start on the port when it is free again: %v", test.name, err)
		}
	}
}

func TestOrigin(t *testing.T) {
	t.Parallel()
	origin := rigtest.Origin(t)
	address := strings.TrimPrefix(origin.URL, "http://")

	t.Run("ws", func(t *testing.T) {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		// The key and the answer to it are RFC 6455's own example.
		fmt.Fprint(conn, "GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\nping")
		reader := bufio.NewReader(conn)
		resp, err := http.ReadResponse(reader, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := resp.Header.Get("Sec-WebSocket-Accept"); resp.StatusCode != 101 || got != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" {
			t.Errorf("status is %d, Sec-WebSocket-Accept is %q", resp.StatusCode, got)
		}
		for _, want := range []string{"ping", "pong"} {
			if want == "pong" {
				fmt.Fprint(conn, want)
			}
			got := make([]byte, len(want))
			if _, err := io.ReadFull(reader, got); err != nil || string(got) != want {
				t.Errorf("echo is %q, error %v, want %q", got, err, want)
			}
		}
	})
	t.Run("sse", func(t *testing.T) {
		resp, err := http.Get(origin.URL + "/sse")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		reader := bufio.NewReader(resp.Body)
		for i := range 3 {
			line, err := reader.ReadString('\n')
			if want := fmt.Sprintf("data: %d\n", i); err != nil || line != want {
				t.Fatalf("event is %q, error %v, want %q", line, err, want)
			}
			reader.ReadString('\n')
		}
	})
	t.Run("stream", func(t *testing.T) {
		body, writer := io.Pipe()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, origin.URL+"/stream", body)
		if err != nil {
			t.Fatal(err)
		}
		go writer.Write([]byte("12345"))
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		reader := bufio.NewReader(resp.Body)
		if line, err := reader.ReadString('\n'); err != nil || line != "5\n" {
			t.Fatalf("first answer is %q, error %v", line, err)
		}
		writer.Write([]byte("678"))
		if line, err := reader.ReadString('\n'); err != nil || line != "8\n" {
			t.Fatalf("second answer is %q, error %v", line, err)
		}
		writer.Close()
	})
	t.Run("slow", func(t *testing.T) {
		began := time.Now()
		resp, err := http.Get(origin.URL + "/slow?for=50ms")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if took := time.Since(began); took < 50*time.Millisecond {
			t.Errorf("answered after %s", took)
		}
	})
}

func TestFakeLAPI(t *testing.T) {
	t.Parallel()
	f := rigtest.FakeLAPI(t)
	get := func() (int, string, error) {
		resp, err := http.Get(f.URL + "/v1/decisions/stream?startup=true")
		if err != nil {
			return 0, "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return resp.StatusCode, string(body), err
	}
	decisions := []rig.FakeDecision{{ID: 1, Origin: "cscli", Type: "ban", Scope: "Ip", Value: "192.0.2.1", Duration: "1h", Scenario: "x"}}
	f.Next(rig.AnswerWith(500, "text/html", []byte("<h1>no</h1>")), rig.AnswerStream(decisions, nil), rig.AnswerHalf(decisions),
		rig.AnswerAfter(20*time.Millisecond, rig.AnswerWith(403, "text/plain", nil)))
	for i, want := range []struct {
		status int
		body   string
		cut    bool
	}{
		{500, "<h1>no</h1>", false},
		{200, `{"new":[{"id":1,"origin":"cscli","type":"ban","scope":"Ip","value":"192.0.2.1","duration":"1h","scenario":"x"}],"deleted":null}`, false},
		{200, `{"new":[{"id":1,"origin":"cscli","type":"ban","scope":"Ip","val`, true},
		{403, "", false},
		{200, `{"new":null,"deleted":null}`, false},
	} {
		status, body, err := get()
		if status != want.status || body != want.body || (err != nil) != want.cut {
			t.Errorf("answer %d is %d %q, error %v, want %+v", i, status, body, err, want)
		}
	}
	requests := f.Requests()
	if len(requests) != 5 || requests[0].Path != "/v1/decisions/stream" || requests[4].Query["startup"][0] != "true" {
		t.Errorf("requests are %+v", requests)
	}
}

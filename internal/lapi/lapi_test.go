package lapi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"
)

// recorder is a sink that writes down what it is given.
type recorder struct {
	mu    sync.Mutex
	open  []string
	done  []string
	doubt bool
}

func newRecorder() *recorder { return &recorder{} }

// since returns what was committed after the first n answers.
func (r *recorder) since(n int) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string(nil), r.done[n:]...)
}

func (r *recorder) sink() Sink {
	return Sink{
		Begin: func(full bool, at time.Time) {
			r.open = nil
			if full {
				r.open = append(r.open, "full")
			}
		},
		Add: func(row *Row) {
			r.open = append(r.open, fmt.Sprintf("+%d %s %s %s %s %s %s", row.ID, row.Scope, row.Value, row.Type, row.Origin, row.Scenario, row.Duration))
		},
		Delete:     func(id int) { r.open = append(r.open, fmt.Sprintf("-%d", id)) },
		Unreadable: func() { r.open = append(r.open, "?") },
		Commit: func() bool {
			answer := strings.Join(r.open, "; ")
			r.mu.Lock()
			r.done = append(r.done, answer)
			doubt := r.doubt
			r.mu.Unlock()
			return doubt
		},
	}
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(new(bytes.Buffer), nil)) }

func stream(url string, r *recorder) *Stream {
	return &Stream{
		Client:    &http.Client{},
		URL:       url,
		Authorize: func(req *http.Request) error { req.Header.Set("X-Api-Key", "secret"); return nil },
		UserAgent: "crowdsec-edgeward-test/v0",
		Interval:  10 * time.Millisecond,
		Timeout:   200 * time.Millisecond,
		Resync:    time.Hour,
		Scopes:    []string{"ip", "range"},
		Sink:      r.sink(),
		Log:       quiet,
	}
}

const oneBan = `{"id":1,"uuid":"x","scope":"Ip","value":"192.0.2.1","type":"ban","origin":"cscli","scenario":"manual","duration":"3h59m59s"}`
const oneBanRead = "+1 Ip 192.0.2.1 ban cscli manual 3h59m59s"

func TestAnswers(t *testing.T) {
	for _, c := range []struct {
		name, body string
		want       string // what was committed, "" for nothing
		err        error
	}{
		{"empty", `{"new":null,"deleted":null}`, "nothing", nil},
		{"empty lists", `{"deleted":[],"new":[]}`, "nothing", nil},
		{"one ban", `{"new":[` + oneBan + `],"deleted":null}`, oneBanRead, nil},
		{"deleted first", `{"deleted":[{"id":7}],"new":[` + oneBan + `]}`, "-7; " + oneBanRead, nil},
		{"unknown keys", `{"more":{"a":[1,{"b":2}]},"new":[],"deleted":[{"id":7,"duration":"-3s"}]}`, "-7", nil},
		{"an unreadable row", `{"new":[{"id":"seven"},` + oneBan + `,17],"deleted":[]}`, "?; " + oneBanRead + "; ?", nil},
		{"fields do not linger", `{"new":[` + oneBan + `,{"id":2}],"deleted":[]}`, oneBanRead + "; +2      ", nil},
		{"html", `<html><body>Bad Gateway</body></html>`, "", ErrAnswer},
		{"nothing at all", ``, "", ErrAnswer},
		{"half a body", `{"new":[` + oneBan + `,{"id":2,"val`, "", ErrAnswer},
		{"cut between rows", `{"new":[` + oneBan, "", ErrAnswer},
		{"cut before the end", `{"new":[` + oneBan + `],"deleted":null`, "", ErrAnswer},
		{"another service's JSON", `{"message":"hello"}`, "", ErrAnswer},
		{"only one list", `{"new":[]}`, "", ErrAnswer},
		{"a list", `[]`, "", ErrAnswer},
		{"a string for a list", `{"new":"none","deleted":[]}`, "", ErrAnswer},
	} {
		body := c.body
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = w.Write([]byte(body))
		}))
		rec := newRecorder()
		_, _, err := stream(srv.URL, rec).pull(context.Background(), false)
		got := strings.Join(rec.done, " | ")
		if len(rec.done) > 0 && got == "" {
			got = "nothing"
		}
		if !errors.Is(err, c.err) || (err == nil) != (c.err == nil) || got != c.want {
			t.Errorf("%s: committed %q, error %v; want %q, %v", c.name, got, err, c.want, c.err)
		}
		srv.Close()
	}
}

func TestRefusalsAndSilence(t *testing.T) {
	for _, c := range []struct {
		name    string
		handler http.HandlerFunc
		kind    string
		says    string
	}{
		{"wrong key", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusForbidden) }, "refused", "403"},
		{"no key", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusUnauthorized) }, "refused", "cscli"},
		{"broken", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusInternalServerError) }, "pull decisions: LAPI answers 500 Internal Server Error", "500"},
		{"silent", func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, "unreachable", "silent for 200ms"},
		{"silent half way", func(w http.ResponseWriter, r *http.Request) {
			_, _ = w.Write([]byte(`{"new":[` + oneBan + `,`))
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}, "unreachable", "silent for 200ms"},
	} {
		srv := httptest.NewServer(c.handler)
		rec := newRecorder()
		_, _, err := stream(srv.URL, rec).pull(context.Background(), false)
		if err == nil || kindOf(err) != c.kind || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v (%s); want it to say %q and be %s", c.name, err, kindOf(err), c.says, c.kind)
		}
		if strings.Contains(fmt.Sprint(err), "secret") {
			t.Errorf("%s: the key is in the error", c.name)
		}
		if len(rec.done) > 0 {
			t.Errorf("%s: committed %q", c.name, rec.done)
		}
		srv.Close()
	}
}

func TestSlowButSteadyIsNotSilent(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write([]byte(`{"new":[` + oneBan))
		for i := 0; i < 6; i++ {
			time.Sleep(80 * time.Millisecond)
			_, _ = w.Write([]byte("," + oneBan))
			w.(http.Flusher).Flush()
		}
		_, _ = w.Write([]byte(`],"deleted":null}`))
	}))
	defer srv.Close()
	rec := newRecorder()
	count, _, err := stream(srv.URL, rec).pull(context.Background(), false)
	if err != nil || count != 7 {
		t.Errorf("read %d rows, %v", count, err)
	}
}

func TestRun(t *testing.T) {
	var mu sync.Mutex
	var asked []string
	answer := ""
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		asked = append(asked, r.URL.RawQuery)
		a := answer
		answer = ""
		mu.Unlock()
		if r.URL.Path != "/v1/decisions/stream" || r.Header.Get("X-Api-Key") != "secret" || r.UserAgent() != "crowdsec-edgeward-test/v0" {
			w.WriteHeader(http.StatusTeapot)
			return
		}
		if a == "500" {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		if a == "" {
			a = `{"new":null,"deleted":null}`
		}
		_, _ = w.Write([]byte(a))
	}))
	defer srv.Close()
	rec := newRecorder()
	log := new(syncBuffer)
	s := stream(srv.URL, rec)
	logger := slog.New(slog.NewTextHandler(log, nil))
	s.Log = func() *slog.Logger { return logger }
	var failures []string
	pulls := 0
	s.Ended = func(err error) {
		mu.Lock()
		defer mu.Unlock()
		if pulls++; err != nil {
			failures = append(failures, err.Error())
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	stopped := make(chan struct{})
	go func() {
		defer func() { _ = recover() }()
		s.Run(ctx)
		close(stopped)
	}()
	told := 0
	expect := func(want string) {
		t.Helper()
		for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
			for _, got := range rec.since(told) {
				told++
				if got == want {
					return
				}
				if got != "" {
					t.Fatalf("committed %q, want %q", got, want)
				}
			}
		}
		t.Fatalf("%q was never committed", want)
	}
	next := func(a string) {
		mu.Lock()
		defer mu.Unlock()
		answer = a
	}
	expect("full")
	next(`{"new":[` + oneBan + `],"deleted":null}`)
	expect(oneBanRead)
	next("500")
	expect("full") // after a failure the picture is asked for again
	if n := strings.Count(log.String(), "cannot pull decisions"); n != 1 {
		t.Errorf("one outage was logged %d times:\n%s", n, log.String())
	}
	if n := strings.Count(log.String(), "decisions pulled"); n != 2 {
		t.Errorf("the first pull and the recovery were logged %d times:\n%s", n, log.String())
	}
	cancel()
	<-stopped
	mu.Lock()
	defer mu.Unlock()
	if asked[0] != "dedup=false&scopes=ip,range&startup=true" || asked[1] != "dedup=false&scopes=ip,range&startup=false" {
		t.Errorf("asked %q", asked[:2])
	}
	if len(failures) != 1 || !strings.Contains(failures[0], "LAPI answers 500") || pulls < 3 {
		t.Errorf("of %d pulls these are said to have failed: %q", pulls, failures)
	}
}

// TestStreamsDoNotWaitForEachOther runs several at once, because what one
// goroutine waits for must not be mixed up with what another does.
func TestStreamsDoNotWaitForEachOther(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write([]byte(`{"new":null,"deleted":null}`))
	}))
	defer srv.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	var all []*recorder
	var wg sync.WaitGroup
	for i := 0; i < 8; i++ {
		rec := newRecorder()
		all = append(all, rec)
		s := stream(srv.URL, rec)
		s.Interval = 20 * time.Millisecond
		wg.Add(1)
		go func() {
			defer func() { _ = recover() }()
			defer wg.Done()
			s.Run(ctx)
		}()
	}
	wg.Wait()
	for i, rec := range all {
		if n := len(rec.since(0)); n < 5 {
			t.Errorf("stream %d of 8 pulled %d times in a second", i, n)
		}
	}
}

func TestResync(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write([]byte(`{"new":null,"deleted":null}`))
	}))
	defer srv.Close()
	rec := newRecorder()
	s := stream(srv.URL, rec)
	s.Resync = 100 * time.Millisecond
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	s.Run(ctx)
	rec.mu.Lock()
	defer rec.mu.Unlock()
	fulls := 0
	for _, a := range rec.done {
		if a == "full" {
			fulls++
		}
	}
	if fulls < 3 || fulls > 11 || fulls*2 > len(rec.done) {
		t.Errorf("%d of %d pulls were full", fulls, len(rec.done))
	}
}

func TestJumped(t *testing.T) {
	for _, c := range []struct {
		wall, passed time.Duration
		want         bool
	}{
		{10 * time.Second, 10 * time.Second, false},
		{11 * time.Second, 10 * time.Second, false},
		{50 * 365 * 24 * time.Hour, 10 * time.Second, true},
		{-time.Hour, 10 * time.Second, true},
	} {
		if got := jumped(c.wall, c.passed); got != c.want {
			t.Errorf("jumped(%v, %v) = %v", c.wall, c.passed, got)
		}
	}
}

// syncBuffer is a buffer that the test may read while the stream logs.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"new":[` + oneBan + `],"deleted":null}`))
	f.Add([]byte(`{"deleted":[{"id":7}],"new":[{"id":"x"},7,null]}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		s := stream("", newRecorder())
		s.Sink.Begin(true, time.Now())
		_, _ = s.decode(&pacedReader{from: bytes.NewReader(body), watch: time.NewTimer(time.Hour), silence: time.Hour})
	})
}

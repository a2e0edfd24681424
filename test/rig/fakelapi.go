package rig

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"slices"
	"sync"
	"time"
)

// FakeLAPI is a LAPI that misbehaves on command. It is for the faults that the
// real one cannot be made to show; everything else is tested on the real one.
//
// Until told otherwise it answers every request with an empty decision stream.
type FakeLAPI struct {
	URL string

	server *http.Server

	mu       sync.Mutex
	answer   http.HandlerFunc
	next     []http.HandlerFunc
	requests []FakeRequest
}

// FakeRequest is a request as FakeLAPI saw it.
type FakeRequest struct {
	At     time.Time
	Method string
	Path   string
	Query  map[string][]string
	Header http.Header
	Body   []byte
}

// FakeDecision is a decision in the form of LAPI's stream.
type FakeDecision struct {
	ID       int64  `json:"id"`
	UUID     string `json:"uuid,omitempty"`
	Origin   string `json:"origin"`
	Type     string `json:"type"`
	Scope    string `json:"scope"`
	Value    string `json:"value"`
	Duration string `json:"duration"`
	Scenario string `json:"scenario"`
}

// StartFakeLAPI starts a FakeLAPI; it ends with ctx or with Close.
func StartFakeLAPI(ctx context.Context) (*FakeLAPI, error) {
	f := &FakeLAPI{answer: AnswerStream(nil, nil)}
	var err error
	f.server, f.URL, err = serve(ctx, f)
	return f, err
}

// Close ends the server and every connection to it.
func (f *FakeLAPI) Close() error { return f.server.Close() }

// Answer sets how every request is answered from now on.
func (f *FakeLAPI) Answer(h http.HandlerFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answer = h
}

// Next sets how the next requests are answered, one each, before Answer's turn.
func (f *FakeLAPI) Next(h ...http.HandlerFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.next = append(f.next, h...)
}

// Requests returns what has arrived so far, in order.
func (f *FakeLAPI) Requests() []FakeRequest {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.requests)
}

func (f *FakeLAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // the client has gone
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	f.mu.Lock()
	f.requests = append(f.requests, FakeRequest{
		At: time.Now(), Method: r.Method, Path: r.URL.Path, Query: r.URL.Query(), Header: r.Header.Clone(), Body: body,
	})
	answer := f.answer
	if len(f.next) > 0 {
		answer, f.next = f.next[0], f.next[1:]
	}
	f.mu.Unlock()
	answer(w, r)
}

// AnswerStream answers as LAPI's stream does: with these decisions as new and
// these as deleted, and null in place of none.
func AnswerStream(added, deleted []FakeDecision) http.HandlerFunc {
	return AnswerWith(http.StatusOK, "application/json", streamBody(added, deleted))
}

// AnswerHalf announces a whole stream of these decisions, sends half of it and
// cuts the connection.
func AnswerHalf(added []FakeDecision) http.HandlerFunc {
	body := streamBody(added, nil)
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Write(body[:len(body)/2])
		// Flushed first, or the client would see no answer at all.
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}
}

// AnswerWith answers with a status and a body: an error, a page, garbage.
func AnswerWith(status int, contentType string, body []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", contentType)
		w.WriteHeader(status)
		w.Write(body)
	}
}

// AnswerAfter waits before it answers, or until the client gives up.
func AnswerAfter(d time.Duration, h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if sleep(r.Context(), d) == nil {
			h(w, r)
		}
	}
}

func streamBody(added, deleted []FakeDecision) []byte {
	// A struct of strings and numbers always marshals.
	body, _ := json.Marshal(struct {
		New     []FakeDecision `json:"new"`
		Deleted []FakeDecision `json:"deleted"`
	}{added, deleted})
	return body
}

package main

import (
	"fmt"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"time"
)

// stream answers as LAPI's decision stream does, with more decisions than LAPI
// itself would send in the time of a benchmark. It knows nothing else of LAPI.
type stream struct {
	until time.Time // when all decisions end

	mu     sync.Mutex
	held   []ban
	news   []ban
	broken bool           // the next delta is an error, which makes the client pull everything
	served chan time.Time // when a delta with news went out
	pulled chan time.Time // when the last whole answer was asked for, once it is out
}

// ban is a decision of a stream.
type ban struct {
	id    int
	value netip.Prefix
}

func newStream(values []netip.Prefix) *stream {
	s := &stream{until: time.Now().Add(7 * 24 * time.Hour), served: make(chan time.Time, 1), pulled: make(chan time.Time, 1)}
	for i, value := range values {
		s.held = append(s.held, ban{i + 1, value})
	}
	return s
}

// add makes the next delta bring a ban.
func (s *stream) add(value netip.Prefix) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := ban{len(s.held) + 1, value}
	s.held = append(s.held, b)
	s.news = append(s.news, b)
}

// replace puts others in the place of some of those held, to be told of by the
// next whole answer.
func (s *stream) replace(values map[int]netip.Prefix) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, value := range values {
		s.held[i] = ban{10_000_000 + i, value}
	}
}

// resync makes the client ask for everything.
func (s *stream) resync() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.broken = true
}

func (s *stream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/v1/decisions/stream" {
		http.NotFound(w, r)
		return
	}
	asked := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.URL.Query().Get("startup") == "true" {
		s.answer(w, s.held)
		select {
		case <-s.pulled: // nobody asked for it
		default:
		}
		s.pulled <- asked
		return
	}
	if s.broken {
		s.broken = false
		http.Error(w, "not today", http.StatusInternalServerError)
		return
	}
	news := s.news
	s.news = nil
	if len(news) > 0 {
		s.served <- time.Now()
	}
	s.answer(w, news)
}

// answer writes rows of the length that LAPI's have.
func (s *stream) answer(w http.ResponseWriter, news []ban) {
	w.Header().Set("Content-Type", "application/json")
	if len(news) == 0 {
		fmt.Fprint(w, `{"deleted":null,"new":null}`)
		return
	}
	left := time.Until(s.until).Round(time.Second).String()
	const flushAt = 64 << 10
	out := make([]byte, 0, flushAt+1024)
	out = append(out, `{"deleted":null,"new":[`...)
	for i, b := range news {
		if i > 0 {
			out = append(out, ',')
		}
		out = b.appendTo(out, left)
		if len(out) > flushAt {
			w.Write(out) // a client that has gone asks again
			out = out[:0]
		}
	}
	w.Write(append(out, "]}"...))
}

// origins of a community's node: most of it from elsewhere.
var origins = []string{"CAPI", "CAPI", "CAPI", "lists", "lists", "crowdsec", "cscli"}

func (b ban) appendTo(out []byte, left string) []byte {
	out = append(out, `{"duration":"`...)
	out = append(out, left...)
	out = append(out, `","id":`...)
	out = strconv.AppendInt(out, int64(b.id), 10)
	out = append(out, `,"origin":"`...)
	out = append(out, origins[b.id%len(origins)]...)
	out = append(out, `","scenario":"crowdsecurity/scenario-`...)
	out = strconv.AppendInt(out, int64(b.id%20), 10)
	out = append(out, `","scope":"`...)
	if b.value.IsSingleIP() {
		out = append(out, `Ip","type":"ban","uuid":"`...)
	} else {
		out = append(out, `Range","type":"ban","uuid":"`...)
	}
	out = fmt.Appendf(out, "00000000-0000-4000-8000-%012x", b.id)
	out = append(out, `","value":"`...)
	if b.value.IsSingleIP() {
		out = b.value.Addr().AppendTo(out)
	} else {
		out = b.value.AppendTo(out)
	}
	return append(out, `"}`...)
}

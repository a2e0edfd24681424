// Package lapi keeps one client of CrowdSec's Local API in step with its
// decision stream. It is the one loop by which decisions reach edgeward: a full
// pull at the start, deltas at an interval, and a full pull again now and then
// and after any doubt, because LAPI forgets to mention extended decisions in
// deltas and moves its cursor on even when an answer is lost on the way.
//
// Answers are read row by row, so that a large list is never held twice, and
// handed to a Sink; only an answer that arrived whole is committed. The package
// knows nothing of what decisions mean, makes no connections of its own kind
// (an http.Client is passed in) and imports the standard library only. It is
// written in the dialect that Yaegi, Traefik's plugin interpreter, understands.
//
// LAPI keeps one delta cursor per API key and address: a key that feeds a
// Stream must never be used for another one from the same address.
package lapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand"
	"net/http"
	"strings"
	"time"
)

// Row is a decision as LAPI sends it. Duration is the time left when the answer
// was written.
type Row struct {
	ID       int    `json:"id"`
	Scope    string `json:"scope"`
	Value    string `json:"value"`
	Type     string `json:"type"`
	Origin   string `json:"origin"`
	Scenario string `json:"scenario"`
	Duration string `json:"duration"`
}

// Sink takes in the answers of a Stream, all from one goroutine. Each answer
// is one Begin, any number of Add and Delete, and one Commit; where Commit does
// not come before the next Begin, the answer was cut short and must not count.
type Sink struct {
	// Begin opens an answer that LAPI wrote at the given time; full means
	// that it is the whole picture.
	Begin func(full bool, at time.Time)
	// Add is given a new decision. The row is reused; keep no pointer to it.
	Add func(row *Row)
	// Delete is given the id of a decision that has ended.
	Delete func(id int)
	// Unreadable counts a row that is not a decision at all.
	Unreadable func()
	// Commit closes a complete answer. It returns true to ask for a full
	// pull soon, because what it was given is hard to believe.
	Commit func() (doubt bool)
}

// Stream follows the decision stream of one LAPI.
type Stream struct {
	// Client sends the requests. Its Timeout should be zero: the stream
	// sets its own deadlines.
	Client *http.Client
	// URL is LAPI's base address, without a trailing slash.
	URL string
	// Authorize adds credentials to a request; nil where the client
	// certificate in Client says it all.
	Authorize func(*http.Request) error
	// UserAgent has the form type/version, as LAPI lists it.
	UserAgent string
	// Interval is the time between pulls. Each wait is shortened at random
	// by up to a tenth, so that many clients do not march in step.
	Interval time.Duration
	// Timeout is the longest silence that a delta request may meet, before
	// the answer or within it; in a full pull it may be six times as long. Ten
	// silences are the longest that a request may take at all.
	Timeout time.Duration
	// Resync is the time after which a full pull replaces a delta. Each is
	// lengthened at random by up to a quarter.
	Resync time.Duration
	// Scopes are the decision scopes to ask for, such as ip and range.
	Scopes []string
	// Sink takes the answers in.
	Sink Sink
	// Full, if not nil, is asked before each pull whether it has to be a full
	// one.
	Full func() bool
	// Ended, if not nil, is told how each pull ended.
	Ended func(err error)
	// Log returns the log, which is told once when LAPI goes away and once
	// when it is back.
	Log func() *slog.Logger
}

// Waits after failures: the first, and the longest unless Interval is longer.
const (
	firstRetry   = time.Second
	longestRetry = 30 * time.Second
)

// Bounds on an answer: some 200 bytes a decision are usual.
const (
	bodyLimit = 1 << 30
	rowLimit  = 4 << 20 // between the ends of two rows
)

// Errors that callers and logs tell apart. ErrCredentials means that there are
// none to send; ErrRefused that LAPI answered and does not accept them;
// ErrAnswer that what came is not a decision stream.
var (
	ErrCredentials = errors.New("cannot read the credentials for LAPI")
	ErrRefused     = errors.New("LAPI refuses the credentials: check the API key or client certificate (cscli bouncers list)")
	ErrAnswer      = errors.New("LAPI's answer is not a decision stream: check that the URL is LAPI's and not another service's")
)

// reminder is how often a trouble that lasts is told again.
const reminder = time.Hour

// Run pulls until ctx ends. It never gives up: a LAPI that is away, slow,
// confused or refusing is asked again after a pause that grows to half a
// minute, or to Interval where that is longer.
func (s *Stream) Run(ctx context.Context) {
	full := true
	trouble := ""
	retry := firstRetry
	ever := false
	var failing, told time.Time // since when, and last said so
	nextFull := time.Now()
	before := time.Now()
	for {
		now := time.Now()
		if jumped(now.Round(0).Sub(before.Round(0)), now.Sub(before)) {
			s.Log().Warn("clock jumped, pulling all decisions again", "component", "lapi")
			full = true
		}
		before = now
		if !now.Before(nextFull) || s.Full != nil && s.Full() {
			full = true
		}
		start := time.Now()
		count, doubt, err := s.pull(ctx, full)
		if ctx.Err() != nil {
			return
		}
		if s.Ended != nil {
			s.Ended(err)
		}
		wait := s.Interval - time.Duration(rand.Float64()*float64(s.Interval)/10)
		if err != nil {
			// LAPI may have moved its cursor over an answer that we
			// never read, so only a full pull is sure.
			full = true
			kind := kindOf(err)
			if trouble == "" {
				failing = start
			}
			if kind != trouble || now.Sub(told) > reminder {
				trouble = kind
				told = now
				message := "cannot pull decisions, keeping the last ones"
				if !ever {
					message = "cannot pull decisions yet, asking again"
				}
				s.Log().Warn(message, "component", "lapi", "url", s.URL, "err", err.Error(), "since", failing.UTC().Format(time.RFC3339))
			}
			wait = retry - time.Duration(rand.Float64()*float64(retry)/5)
			retry *= 2
			limit := longestRetry
			if s.Interval > limit {
				limit = s.Interval
			}
			if retry > limit {
				retry = limit
			}
		} else {
			retry = firstRetry
			if trouble != "" {
				s.Log().Info("decisions pulled, LAPI answers again", "component", "lapi", "url", s.URL, "added", count, "away", time.Since(failing).Round(time.Second).String())
			} else if !ever {
				s.Log().Info("decisions pulled", "component", "lapi", "url", s.URL, "added", count, "took", time.Since(start).Round(time.Millisecond).String())
			}
			trouble = ""
			ever = true
			if full {
				nextFull = time.Now().Add(s.Resync + time.Duration(rand.Float64()*float64(s.Resync)/4))
			}
			full = false
			if doubt {
				nextFull = time.Now().Add(longestRetry)
			}
		}
		if !pause(ctx, wait) {
			return
		}
	}
}

// pause waits, and reports whether it did so to the end, ctx still going on. It
// has no select statement, because Yaegi shares the cases of one among all
// goroutines that are in it: a stream would wait for another one's timer.
func pause(ctx context.Context, wait time.Duration) bool {
	timed, cancel := context.WithTimeout(ctx, wait)
	<-timed.Done()
	cancel()
	return ctx.Err() == nil
}

// jumped reports whether the wall clock moved otherwise than time passed, as on
// a machine that learns the time of day after its start: ends of decisions
// that were reckoned by the old clock are wrong then.
func jumped(wall, passed time.Duration) bool {
	drift := wall - passed
	return drift > 5*time.Second || drift < -5*time.Second
}

// kindOf names the sort of failure, so that a log line marks each change of it.
func kindOf(err error) string {
	if errors.Is(err, ErrRefused) {
		return "refused"
	}
	if errors.Is(err, ErrAnswer) {
		return "answer"
	}
	if errors.Is(err, ErrCredentials) {
		return "credentials"
	}
	if status, ok := err.(*statusError); ok {
		return status.Error()
	}
	return "unreachable"
}

type statusError struct{ code int }

func (e *statusError) Error() string {
	return fmt.Sprintf("pull decisions: LAPI answers %d %s", e.code, http.StatusText(e.code))
}

// pull makes one request and feeds the sink; count is the number of rows added.
func (s *Stream) pull(ctx context.Context, full bool) (count int, doubt bool, err error) {
	silence := s.Timeout
	if full {
		silence *= 6
	}
	ctx, cancel := context.WithTimeout(ctx, 10*silence)
	defer cancel()
	watch := time.AfterFunc(silence, cancel)
	defer watch.Stop()

	url := s.URL + "/v1/decisions/stream?dedup=false&scopes=" + strings.Join(s.Scopes, ",") + "&startup=false"
	if full {
		url = strings.TrimSuffix(url, "false") + "true"
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, false, fmt.Errorf("pull decisions: %w", err)
	}
	req.Header.Set("User-Agent", s.UserAgent)
	req.Header.Set("Accept", "application/json")
	if s.Authorize != nil {
		if err := s.Authorize(req); err != nil {
			return 0, false, fmt.Errorf("%w: %w", ErrCredentials, err)
		}
	}
	res, err := s.Client.Do(req)
	if err != nil {
		return 0, false, fmt.Errorf("pull decisions: %w", silent(ctx, err, silence))
	}
	defer res.Body.Close()
	watch.Reset(silence)
	switch res.StatusCode {
	case http.StatusOK:
	case http.StatusUnauthorized, http.StatusForbidden:
		drain(res.Body)
		return 0, false, fmt.Errorf("pull decisions: %d: %w", res.StatusCode, ErrRefused)
	default:
		drain(res.Body)
		return 0, false, &statusError{res.StatusCode}
	}
	s.Sink.Begin(full, time.Now())
	body := &pacedReader{from: io.LimitReader(res.Body, bodyLimit), watch: watch, silence: silence}
	count, err = s.decode(body)
	if err != nil {
		if body.failed != nil && body.failed != io.ErrUnexpectedEOF {
			err = silent(ctx, body.failed, silence)
		}
		return 0, false, fmt.Errorf("pull decisions: %w", err)
	}
	drain(res.Body) // to its end, so that the connection can be used again
	return count, s.Sink.Commit(), nil
}

// silent explains a request that was given up because nothing came.
func silent(ctx context.Context, err error, silence time.Duration) error {
	if ctx.Err() != nil {
		return fmt.Errorf("LAPI was silent for %v: %w", silence, ctx.Err())
	}
	return err
}

func drain(body io.Reader) { _, _ = io.CopyN(io.Discard, body, 4096) }

// pacedReader puts the deadline off each time something arrives and remembers
// how reading ended, because the decoder hides it.
type pacedReader struct {
	from    io.Reader
	watch   *time.Timer
	silence time.Duration
	failed  error
	unread  int // bytes since the last whole row
}

func (r *pacedReader) Read(p []byte) (int, error) {
	n, err := r.from.Read(p)
	if n > 0 {
		r.watch.Reset(r.silence)
	}
	if r.unread += n; r.unread > rowLimit {
		return 0, errTooLong
	}
	if err != nil && err != io.EOF {
		r.failed = err
	}
	return n, err
}

var errTooLong = errors.New("a row has no end")

// decode reads {"new": [...], "deleted": [...]}, in any order, either list
// possibly null, and hands each row to the sink.
func (s *Stream) decode(body *pacedReader) (count int, err error) {
	dec := json.NewDecoder(body)
	open, err := dec.Token()
	if err != nil {
		return 0, answerError(err)
	}
	if open != json.Delim('{') {
		return 0, answerError(nil)
	}
	seen := 0
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return 0, answerError(err)
		}
		if key == "new" {
			seen |= 1
			n, err := s.list(dec, body, true)
			if err != nil {
				return 0, err
			}
			count += n
		} else if key == "deleted" {
			seen |= 2
			if _, err := s.list(dec, body, false); err != nil {
				return 0, err
			}
		} else {
			var other json.RawMessage
			if err := dec.Decode(&other); err != nil {
				return 0, answerError(err)
			}
		}
	}
	if _, err := dec.Token(); err != nil {
		return 0, answerError(err)
	}
	if seen != 3 {
		return 0, answerError(nil)
	}
	return count, nil
}

// list reads one list of rows.
func (s *Stream) list(dec *json.Decoder, body *pacedReader, added bool) (count int, err error) {
	open, err := dec.Token()
	if err != nil {
		return 0, answerError(err)
	}
	if open == nil {
		return 0, nil
	}
	if open != json.Delim('[') {
		return 0, answerError(nil)
	}
	add := s.Sink.Add
	row := &Row{}
	for dec.More() {
		*row = Row{}
		body.unread = 0
		if err := dec.Decode(row); err != nil {
			if _, ok := err.(*json.UnmarshalTypeError); ok {
				s.Sink.Unreadable()
				continue
			}
			return 0, answerError(err)
		}
		if added {
			add(row)
			count++
		} else {
			s.Sink.Delete(row.ID)
		}
	}
	if _, err := dec.Token(); err != nil {
		return 0, answerError(err)
	}
	return count, nil
}

// answerError says that an answer is not what it should be.
func answerError(err error) error {
	if err == nil {
		return ErrAnswer
	}
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("the answer ends in the middle: %w", ErrAnswer)
	}
	return fmt.Errorf("%s: %w", err.Error(), ErrAnswer)
}

package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/edgeward/edgeward/internal/config"
)

// Cloudflare allows 1,200 calls in five minutes to a user, over all of his
// tokens, and the dashboard counts too. In any five minutes this client makes
// at most burst + 300 s × perSecond of them.
const (
	perSecond = 2
	burst     = 200
	// reserve is how many of the quota that Cloudflare tells are left to others.
	reserve = 50
	// penalty is how long calls are blocked by one that was too many, where the
	// answer does not say.
	penalty = 5 * time.Minute
)

// The bounds of one call.
const (
	callTimeout = 30 * time.Second
	answerLimit = 64 << 20 // a hundred thousand records
)

// client makes calls, one token for each, within the budget.
type client struct {
	agent string
	http  *http.Client
	spend *rate.Limiter
	now   func() time.Time

	mu      sync.Mutex
	blocked time.Time // no call before
	usage   Usage
}

// Usage is what the API was asked, for metrics.
type Usage struct {
	// Calls counts by what was asked and how it ended.
	Calls map[Call]uint64
	// Left is what Cloudflare last said to be left of the quota, until Resets;
	// -1 as long as it said nothing.
	Left   int
	Resets time.Time
}

// Call is a kind of call, such as list records, and its outcome: ok, refused
// (Cloudflare says no), limited (too many), failed (no sensible answer).
type Call struct{ What, Outcome string }

func newClient(agent string) *client {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = 2
	return &client{
		agent: agent,
		http: &http.Client{
			Transport: transport,
			Timeout:   callTimeout,
			// The API does not redirect; a token goes nowhere else.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		spend: rate.NewLimiter(perSecond, burst),
		now:   time.Now,
		usage: Usage{Calls: map[Call]uint64{}, Left: -1},
	}
}

// call is one request.
type call struct {
	what  string // list records, for metrics
	of    string // example.com, for errors
	needs string // the permission, for the error of a token that lacks it
	token config.File

	base   string // address of the API
	method string
	path   string
	query  url.Values
	body   any
}

// refusal is an error that Cloudflare reported: asking again would not help.
type refusal struct {
	status int
	codes  []code
	says   string
}

func (r *refusal) Error() string { return r.says }

type code struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
	Chain   []code `json:"error_chain"`
}

// limited is the error of a call that may not be made now.
type limited struct{ until time.Time }

func (l *limited) Error() string {
	return "too many calls: none is made before " + l.until.Format(time.TimeOnly)
}

// envelope is what every answer has.
type envelope struct {
	Success bool            `json:"success"`
	Errors  []code          `json:"errors"`
	Result  json.RawMessage `json:"result"`
	Info    struct {
		Page       int `json:"page"`
		Count      int `json:"count"`
		TotalCount int `json:"total_count"`
	} `json:"result_info"`
}

// do makes a call. The error says what was asked and is of type *refusal where
// Cloudflare said no.
func (c *client) do(ctx context.Context, call call, into any) (envelope, error) {
	answer, err := c.try(ctx, call)
	if err == nil && into != nil {
		if err = json.Unmarshal(answer.Result, into); err != nil {
			err = fmt.Errorf("read the answer: %w", err)
		}
	}
	outcome := "ok"
	var refused *refusal
	var tooMany *limited
	switch {
	case errors.As(err, &tooMany):
		outcome = "limited"
	case errors.As(err, &refused):
		outcome = "refused"
	case err != nil:
		outcome = "failed"
	}
	c.mu.Lock()
	c.usage.Calls[Call{call.what, outcome}]++
	c.mu.Unlock()
	if err != nil {
		err = fmt.Errorf("%s of %s: %w", call.what, call.of, err)
	}
	return answer, err
}

func (c *client) try(ctx context.Context, call call) (envelope, error) {
	// The file is read for each call, so that a rotated token is used at once.
	token, err := readSecret(call.token)
	if err != nil {
		return envelope{}, err
	}
	if strings.ContainsFunc(token.Reveal(), func(r rune) bool { return r <= ' ' || r > '~' }) {
		return envelope{}, fmt.Errorf("read %s: it holds more than one word: a token has no spaces", call.token)
	}
	if until := c.blockedUntil(); !until.IsZero() {
		return envelope{}, &limited{until}
	}
	if err := c.spend.Wait(ctx); err != nil {
		return envelope{}, fmt.Errorf("wait for the budget of calls: %w", err)
	}
	var body io.Reader
	if call.body != nil {
		text, err := json.Marshal(call.body)
		if err != nil {
			return envelope{}, err
		}
		body = bytes.NewReader(text)
	}
	target := strings.TrimSuffix(call.base, "/") + call.path
	if len(call.query) > 0 {
		target += "?" + call.query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, call.method, target, body)
	if err != nil {
		return envelope{}, err
	}
	req.Header.Set("Authorization", "Bearer "+token.Reveal())
	req.Header.Set("User-Agent", c.agent)
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		var at *url.Error
		if errors.As(err, &at) {
			err = at.Err // the address says nothing that what and of do not
		}
		return envelope{}, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, answerLimit))
	if err != nil {
		return envelope{}, fmt.Errorf("read the answer: %w", err)
	}
	c.quota(resp)
	if resp.StatusCode == http.StatusTooManyRequests {
		return envelope{}, &limited{c.block(resp.Header.Get("Retry-After"))}
	}
	var answer envelope
	if err := json.Unmarshal(text, &answer); err != nil || !answer.Success && len(answer.Errors) == 0 {
		return envelope{}, fmt.Errorf("the API answers %s without saying why", resp.Status)
	}
	if answer.Success && resp.StatusCode < 300 {
		return answer, nil
	}
	says := describe(answer.Errors)
	if says == "" {
		says = resp.Status
	}
	if resp.StatusCode >= 500 {
		return envelope{}, fmt.Errorf("the API answers %d: %s", resp.StatusCode, says)
	}
	if slices.ContainsFunc(answer.Errors, func(c code) bool { return c.Code == noRoute }) && strings.HasPrefix(call.path, "/accounts/") {
		says += ": is cloudflare.account the id of the account?"
	}
	refused := &refusal{status: resp.StatusCode, codes: answer.Errors, says: "Cloudflare refuses: " + says}
	if tokenRefused(refused) {
		refused.says = fmt.Sprintf("Cloudflare refuses the token in %s: %s: it must be valid and have %s", call.token, says, call.needs)
	}
	return envelope{}, refused
}

// noRoute is the code by which Cloudflare says that there is no such path, as with
// an account that there is not.
const noRoute = 7003

// tokenRefused reports whether it is the token that is wrong, not the request.
func tokenRefused(r *refusal) bool {
	if r.status == http.StatusUnauthorized || r.status == http.StatusForbidden {
		return true
	}
	for _, c := range r.codes {
		switch c.Code {
		case 6003, 6111, 9106, 9109, 10000:
			return true
		}
	}
	return false
}

// describe writes the errors of an answer in one line.
func describe(codes []code) string {
	var out []string
	for _, c := range codes {
		out = append(out, fmt.Sprintf("%s (%d)", strings.Join(strings.Fields(c.Message), " "), c.Code))
		if len(c.Chain) > 0 {
			out = append(out, describe(c.Chain))
		}
	}
	return strings.Join(out, ", ")
}

// quota takes in what Cloudflare says is left: "default";r=1190;t=300, and maybe
// more of the kind after a comma. The longest is the one that is meant here:
// short ones fill up again before the next turn.
func (c *client) quota(resp *http.Response) {
	left, seconds := -1, -1
	for item := range strings.SplitSeq(resp.Header.Get("Ratelimit"), ",") {
		r, t := -1, -1
		for part := range strings.SplitSeq(item, ";") {
			name, value, _ := strings.Cut(strings.TrimSpace(part), "=")
			n, err := strconv.Atoi(value)
			switch {
			case err != nil:
			case name == "r":
				r = n
			case name == "t":
				t = n
			}
		}
		if r >= 0 && t > seconds {
			left, seconds = r, t
		}
	}
	if left < 0 {
		return
	}
	resets := c.now().Add(time.Duration(seconds) * time.Second)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.usage.Left, c.usage.Resets = left, resets
	if left < reserve && resets.After(c.blocked) {
		c.blocked = resets
	}
}

// block stops all calls for what Retry-After says.
func (c *client) block(after string) time.Time {
	pause := penalty
	if n, err := strconv.Atoi(after); err == nil && n > 0 {
		pause = min(time.Duration(n)*time.Second, time.Hour)
	} else if at, err := http.ParseTime(after); err == nil {
		pause = min(max(at.Sub(c.now()), time.Second), time.Hour)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if until := c.now().Add(pause); until.After(c.blocked) {
		c.blocked = until
	}
	return c.blocked
}

func (c *client) blockedUntil() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.now().Before(c.blocked) {
		return c.blocked
	}
	return time.Time{}
}

func (c *client) used() Usage {
	c.mu.Lock()
	defer c.mu.Unlock()
	u := c.usage
	u.Calls = maps.Clone(u.Calls)
	return u
}

// list makes a call for each page. A list that changes between two pages is an
// error, since what slips through would pass for deleted.
func list[T any](ctx context.Context, c *client, base call, per int) ([]T, error) {
	var all []T
	total := -1
	for page := 1; ; page++ {
		next := base
		next.method = http.MethodGet
		next.query = maps.Clone(base.query)
		if next.query == nil {
			next.query = url.Values{}
		}
		next.query.Set("page", strconv.Itoa(page))
		next.query.Set("per_page", strconv.Itoa(per))
		var part []T
		answer, err := c.do(ctx, next, &part)
		if err != nil {
			return nil, err
		}
		all = append(all, part...)
		before := total
		if total = answer.Info.TotalCount; before >= 0 && before != total || len(all) > total || len(part) == 0 && len(all) < total {
			return nil, fmt.Errorf("%s of %s: the list changed while it was read", base.what, base.of)
		}
		if len(all) == total {
			return all, nil
		}
	}
}

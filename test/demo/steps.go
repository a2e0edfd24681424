package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/edgeward/edgeward/test/rig"
)

// visitor is the client that nobody bans.
const visitor = "127.0.0.2"

func (g *gateway) passes(ctx context.Context) error {
	a, err := g.curl(ctx, http.StatusOK, visitor, "/")
	if err != nil {
		return err
	}
	var arrived rig.Arrived
	if err := json.Unmarshal([]byte(a.body), &arrived); err != nil {
		return fmt.Errorf("read the origin's answer: %w", err)
	}
	if got := arrived.Header.Get("X-Forwarded-For"); got != visitor {
		return fmt.Errorf("the origin was told of client %q, want %s", got, visitor)
	}
	g.held(a.took, "200 from the origin, which sees client %s", visitor)
	return nil
}

func (g *gateway) banAndUnban(ctx context.Context) error {
	const client = "127.0.0.3"
	if err := g.cscli(ctx, "decisions", "add", "--ip", client, "--duration", "4h"); err != nil {
		return err
	}
	took, err := g.await(ctx, http.StatusForbidden, client, prompt)
	if err != nil {
		return err
	}
	g.held(took, "403 for it, asked every 10 ms; the first came after")
	if err := g.cscli(ctx, "decisions", "delete", "--ip", client); err != nil {
		return err
	}
	if took, err = g.await(ctx, http.StatusOK, client, prompt); err != nil {
		return err
	}
	g.held(took, "200 again, after")
	return nil
}

func (g *gateway) rangeBan(ctx context.Context) error {
	const inside, outside = "127.0.3.77", "127.0.4.77"
	if err := g.cscli(ctx, "decisions", "add", "--range", "127.0.3.0/24", "--duration", "4h"); err != nil {
		return err
	}
	took, err := g.await(ctx, http.StatusForbidden, inside, prompt)
	if err != nil {
		return err
	}
	g.held(took, "403 for %s, inside, after", inside)
	a, err := g.curl(ctx, http.StatusOK, outside, "")
	if err != nil {
		return err
	}
	g.held(a.took, "200 for %s, outside", outside)
	return nil
}

// decisionNamed finds the id of the decision in the answer to a banned client.
var decisionNamed = regexp.MustCompile(`\(decision (\d+)\)`)

func (g *gateway) overlap(ctx context.Context) error {
	const client = "127.0.0.4"
	for _, duration := range []string{"4h", "1h"} {
		if err := g.cscli(ctx, "decisions", "add", "--ip", client, "--duration", duration); err != nil {
			return err
		}
	}
	longer, shorter, err := g.decisionsOn(ctx, client)
	if err != nil {
		return err
	}
	took, err := g.await(ctx, http.StatusForbidden, client, prompt)
	if err != nil {
		return err
	}
	g.held(took, "403, decisions %d and %d hold it, after", longer, shorter)
	if err := g.cscli(ctx, "decisions", "delete", "--id", strconv.Itoa(longer)); err != nil {
		return err
	}
	// Two polls and a bit: the deletion has arrived by then. Not one request
	// may pass in the meantime.
	began := time.Now()
	var last string
	for time.Since(began) < 2*pollInterval+pollInterval/2 {
		a, err := g.get(ctx, client, "/")
		if err != nil {
			return err
		}
		match := decisionNamed.FindStringSubmatch(a.body)
		if a.status != http.StatusForbidden || match == nil {
			return fmt.Errorf("%s got %d after the longer ban was deleted, want 403 by decision %d: %s", client, a.status, shorter, strings.TrimSpace(a.body))
		}
		last = match[1]
		if err := pause(ctx, 10*time.Millisecond); err != nil {
			return err
		}
	}
	if last != strconv.Itoa(shorter) {
		return fmt.Errorf("%s is refused by decision %s, want %d: the deletion has not arrived", client, last, shorter)
	}
	g.held(time.Since(began), "still 403, now by decision %s, asked for", last)
	return nil
}

// decisionsOn returns the ids of the two bans on an address. It asks for the
// alerts that brought them, because cscli lists one decision for each address.
func (g *gateway) decisionsOn(ctx context.Context, client string) (longer, shorter int, err error) {
	out, err := g.lapi.Cscli(ctx, "alerts", "list", "--ip", client, "-o", "json")
	if err != nil {
		return 0, 0, err
	}
	var alerts []struct {
		Decisions []struct {
			ID       int    `json:"id"`
			Duration string `json:"duration"`
		} `json:"decisions"`
	}
	if err := json.Unmarshal(out, &alerts); err != nil {
		return 0, 0, fmt.Errorf("read the list of alerts: %w", err)
	}
	for _, alert := range alerts {
		for _, d := range alert.Decisions {
			left, err := time.ParseDuration(d.Duration)
			switch {
			case err != nil:
				return 0, 0, fmt.Errorf("read the list of alerts: %w", err)
			case left > 2*time.Hour:
				longer = d.ID
			default:
				shorter = d.ID
			}
		}
	}
	if longer == 0 || shorter == 0 {
		return 0, 0, fmt.Errorf("find the two bans on %s among %d alerts: found decisions %d and %d", client, len(alerts), longer, shorter)
	}
	return longer, shorter, nil
}

func (g *gateway) expiry(ctx context.Context) error {
	const client = "127.0.0.5"
	const duration = 5 * time.Second
	// cscli dates a decision back to the whole second, and LAPI rounds the time
	// left to one: the end may be up to a second off that second's.
	earliest := time.Now().Truncate(time.Second).Add(duration - time.Second)
	if err := g.cscli(ctx, "decisions", "add", "--ip", client, "--duration", duration.String()); err != nil {
		return err
	}
	banned := time.Now()
	latest := banned.Truncate(time.Second).Add(duration + time.Second)
	took, err := g.await(ctx, http.StatusForbidden, client, prompt)
	if err != nil {
		return err
	}
	g.held(took, "403 for it, after")
	g.does(fmt.Sprintf("kill %d    # LAPI", g.lapi.PID()))
	stopping := time.Now()
	if err := g.lapi.Stop(ctx); err != nil {
		return err
	}
	defer func() {
		// A failure must not take LAPI from the steps that follow; to start what
		// runs is an error and does nothing.
		_ = g.lapi.Start(ctx)
	}()

	var slowest time.Duration
	requests := 0
	for {
		free, err := g.get(ctx, client, "/")
		if err != nil {
			return err
		}
		now := time.Now()
		a, err := g.get(ctx, visitor, "/")
		if err != nil {
			return err
		}
		if a.status != http.StatusOK {
			return fmt.Errorf("%s got %d with LAPI away, want 200: %s", visitor, a.status, strings.TrimSpace(a.body))
		}
		requests++
		slowest = max(slowest, a.took)
		since := spoken(now.Sub(banned))
		if free.status == http.StatusOK {
			if now.Before(earliest) || now.After(latest) {
				return fmt.Errorf("%s was free %s after its ban, want %s, give or take a second", client, since, duration)
			}
			g.held(now.Sub(banned), "200 again, by itself (LAPI counts in whole seconds), after")
			break
		}
		if now.After(latest.Add(5 * time.Second)) {
			return fmt.Errorf("%s still gets %d, %s after its ban of %s", client, free.status, since, duration)
		}
		if err := pause(ctx, 10*time.Millisecond); err != nil {
			return err
		}
	}
	g.held(time.Since(stopping), "the site stayed up: %d requests, none failed, slowest %s", requests, spoken(slowest))

	g.does("# LAPI is started again")
	if err := g.lapi.Start(ctx); err != nil {
		return err
	}
	if err := g.cscli(ctx, "decisions", "add", "--ip", client, "--duration", "1m"); err != nil {
		return err
	}
	// While LAPI is away it is asked ever more rarely, up to 30 s apart.
	if took, err = g.await(ctx, http.StatusForbidden, client, 30*time.Second); err != nil {
		return err
	}
	g.held(took, "403: the plugin follows LAPI again, after")
	return nil
}

func (g *gateway) spoof(ctx context.Context) error {
	const banned = "127.0.0.6"
	if err := g.cscli(ctx, "decisions", "add", "--ip", banned, "--duration", "4h"); err != nil {
		return err
	}
	if _, err := g.await(ctx, http.StatusForbidden, banned, prompt); err != nil {
		return err
	}
	for _, test := range []struct {
		from, header, claim string
		want                int
		means               string
	}{
		{banned, "X-Forwarded-For", visitor, 403, "403: the banned client cannot claim to be another"},
		{banned, "CF-Connecting-IP", visitor, 403, "403: nor with the header of the proxy"},
		{visitor, "CF-Connecting-IP", banned, 200, "200: nor can one client have another refused"},
		{trustedProxy, "CF-Connecting-IP", banned, 403, "403: the trusted proxy is believed"},
		{trustedProxy, "CF-Connecting-IP", visitor, 200, "200: either way"},
	} {
		a, err := g.curl(ctx, test.want, test.from, "", test.header, test.claim)
		if err != nil {
			return err
		}
		g.held(a.took, "%s", test.means)
	}
	return nil
}

func (g *gateway) rateLimit(ctx context.Context) error {
	const client, burst = "127.0.0.7", 3
	began := time.Now()
	for range burst {
		if _, err := g.curl(ctx, http.StatusOK, client, "/login"); err != nil {
			return err
		}
	}
	g.held(time.Since(began), "200 for each")
	a, err := g.curl(ctx, http.StatusTooManyRequests, client, "/login")
	if err != nil {
		return err
	}
	g.held(a.took, "429 for one more, with")
	for _, name := range []string{"Retry-After", "RateLimit", "RateLimit-Policy"} {
		if a.header.Get(name) == "" {
			return fmt.Errorf("the refusal has no %s header", name)
		}
		g.shows("%s: %s", name, a.header.Get(name))
	}
	wait, err := strconv.Atoi(a.header.Get("Retry-After"))
	if err != nil || wait < 1 || wait > 2 {
		return fmt.Errorf("Retry-After is %q, want 1 or 2: a login is admitted every 2 s", a.header.Get("Retry-After"))
	}
	g.does(fmt.Sprintf("sleep %d", wait))
	began = time.Now()
	if err := pause(ctx, time.Duration(wait)*time.Second); err != nil {
		return err
	}
	if _, err := g.curl(ctx, http.StatusOK, client, "/login"); err != nil {
		return err
	}
	g.held(time.Since(began), "200 again")
	return nil
}

func (g *gateway) observe(ctx context.Context) error {
	const client = "127.0.0.8"
	if err := g.cscli(ctx, "decisions", "add", "--ip", client, "--duration", "4h", "--reason", "demo"); err != nil {
		return err
	}
	if _, err := g.await(ctx, http.StatusForbidden, client, prompt); err != nil {
		return err
	}
	a, err := g.curl(ctx, http.StatusOK, client, "/observed")
	if err != nil {
		return err
	}
	g.held(a.took, "200: this router's middleware is in observe mode, and")
	bounded, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	const message = "request would be refused"
	if err := g.traefik.WaitLog(bounded, message); err != nil {
		return err
	}
	for line := range strings.Lines(g.traefik.Log()) {
		var entry struct {
			Message  string `json:"msg"`
			Address  string `json:"address"`
			Decision int    `json:"decision"`
			Origin   string `json:"origin"`
			Scenario string `json:"scenario"`
		}
		if json.Unmarshal([]byte(line), &entry) == nil && entry.Message == message && entry.Address == client {
			if entry.Decision == 0 || entry.Origin != "cscli" || entry.Scenario != "demo" {
				return fmt.Errorf("the log line names decision %d, origin %q, scenario %q: %s", entry.Decision, entry.Origin, entry.Scenario, line)
			}
			g.shows("log: %s (decision %d, origin %s, scenario %s)", message, entry.Decision, entry.Origin, entry.Scenario)
			return nil
		}
	}
	return fmt.Errorf("the log has no line %q for %s", message, client)
}

func (g *gateway) reload(ctx context.Context) error {
	const reloads, workers, banned = 20, 4, "127.0.0.6"
	// Banned already, unless the story begins here.
	if a, err := g.get(ctx, banned, "/"); err == nil && a.status != http.StatusForbidden {
		if err := g.cscli(ctx, "decisions", "add", "--ip", banned, "--duration", "4h"); err != nil {
			return err
		}
		if _, err := g.await(ctx, http.StatusForbidden, banned, prompt); err != nil {
			return err
		}
	}
	g.does(fmt.Sprintf("# %d clients without pause, one of them banned; %d reloads", workers+1, reloads))
	var requests atomic.Int64
	var group sync.WaitGroup
	var wrong [workers + 1]error
	done := make(chan struct{})
	began := time.Now()
	for i := range wrong {
		client, want := g.client(visitor), http.StatusOK
		if i == workers {
			client, want = g.client(banned), http.StatusForbidden
		}
		group.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				a, err := fetch(ctx, client, g.traefik.URL+"/")
				if err == nil && a.status != want {
					err = fmt.Errorf("a client got %d, want %d: %s", a.status, want, strings.TrimSpace(a.body))
				}
				if err != nil {
					wrong[i] = err
					return
				}
				requests.Add(1)
			}
		})
	}
	var failed error
	for range reloads {
		if failed = g.configure(ctx); failed != nil {
			break
		}
	}
	took := time.Since(began)
	close(done)
	group.Wait()
	if err := errors.Join(append(wrong[:], failed)...); err != nil {
		return err
	}
	g.held(took, "%d requests, not one failed, and the banned client never passed", requests.Load())
	a, err := g.get(ctx, visitor, "/")
	if err != nil {
		return err
	}
	if got := a.header.Get("X-Revision"); got != strconv.Itoa(g.revision) {
		return fmt.Errorf("configuration %q is in force, want %d", got, g.revision)
	}
	return nil
}

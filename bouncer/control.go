package bouncer

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/edgeward/edgeward/internal/daemon"
	"github.com/edgeward/edgeward/internal/decision"
)

// ListenControl takes the socket at path, on which the agent answers the command
// line; see daemon.ListenSocket.
func ListenControl(path string, b *Bouncer, log *slog.Logger) (*daemon.Socket, error) {
	order := func(do func(url.Values, string) (Answer, error)) func(url.Values, string) (any, error) {
		return func(q url.Values, by string) (any, error) { return do(q, by) }
	}
	return daemon.ListenSocket(path, daemon.Answers{
		"/v1/status": func(url.Values) (any, error) { return b.Status(), nil },
		"/v1/why": func(q url.Values) (any, error) {
			addr, err := netip.ParseAddr(q.Get("address"))
			if err != nil {
				return nil, err
			}
			return b.Why(addr)
		},
	}, daemon.Orders{
		"/v1/allow": order(b.allow), "/v1/unban": order(b.unban), "/v1/pause": order(b.pause),
		"/v1/cleanup": order(b.cleanup), "/v1/probe": order(b.probe),
	}, log)
}

// Answer is what the agent says to an order that it has carried out.
type Answer struct {
	Says string `json:"says"`
	// Note is what about it will not last, or what else to know; may be empty.
	Note string `json:"note,omitempty"`
}

// duration reads the duration of an order.
func duration(q url.Values) (time.Duration, error) {
	d, err := time.ParseDuration(q.Get("for"))
	if err != nil {
		return 0, fmt.Errorf("%q: want a duration such as 90s, 10m or 72h", q.Get("for"))
	}
	return d, nil
}

// told logs an order, and who gave it.
func (b *Bouncer) told(q url.Values, by, order, value string, until time.Time) {
	attrs := []any{"order", order, "value", value, "by", by}
	if !until.IsZero() && until.Before(decision.Forever) {
		attrs = append(attrs, "until", until.Format(time.RFC3339))
	}
	if because := q.Get("because"); because != "" {
		attrs = append(attrs, "because", because)
	}
	b.log.Warn("the operator gave an order", attrs...)
}

// moment writes a time for people.
func moment(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 MST") }

func (b *Bouncer) allow(q url.Values, by string) (Answer, error) {
	p, err := decision.ParsePrefix(q.Get("address"))
	if err != nil {
		return Answer{}, fmt.Errorf("%q: want an address or a range such as 192.0.2.1 or 2001:db8::/32", q.Get("address"))
	}
	d, end := time.Duration(0), q.Get("end") != ""
	if !end {
		if d, err = duration(q); err != nil {
			return Answer{}, err
		}
		if d <= 0 {
			return Answer{}, fmt.Errorf("%v: want a duration above zero; --end ends an allow", d)
		}
	}
	until, note, err := b.enforcer.allow(p, d, q.Get("because"), by)
	if err != nil {
		return Answer{}, fmt.Errorf("allow: %w", err)
	}
	if end {
		b.told(q, by, "end allow", valueOf(p), until)
		return Answer{fmt.Sprintf("%v is allowed no longer: what bans it counts again", valueOf(p)), note}, nil
	}
	b.told(q, by, "allow", valueOf(p), until)
	return Answer{fmt.Sprintf("no ban stops %v on this node until %s", valueOf(p), moment(until)), note}, nil
}

func (b *Bouncer) unban(q url.Values, by string) (Answer, error) {
	addr, err := netip.ParseAddr(q.Get("address"))
	if err != nil || addr.Zone() != "" {
		return Answer{}, fmt.Errorf("%q: want an address such as 192.0.2.1 or 2001:db8::1", q.Get("address"))
	}
	addr = addr.Unmap()
	end := q.Get("end") != ""
	u, note, err := b.enforcer.unban(addr, end, q.Get("because"), by)
	if err != nil {
		return Answer{}, fmt.Errorf("unban: %w", err)
	}
	if end {
		b.told(q, by, "end unban", addr.String(), u.Until)
		return Answer{fmt.Sprintf("what bans %v counts again on this node", addr), note}, nil
	}
	b.told(q, by, "unban", addr.String(), u.Until)
	what := "1 decision counts"
	if n := len(u.Decisions); n > 1 {
		what = fmt.Sprintf("%d decisions count", n)
	}
	return Answer{
		fmt.Sprintf("%s no more for %v on this node alone, %s; one that is made later counts again%s",
			what, addr, u.Lasts(), forGood(b.enforcer, addr)), note,
	}, nil
}

// forGood is how to lift what holds addr, on all nodes and for good.
func forGood(e *enforcer, addr netip.Addr) string {
	var commands, lines []string
	add := func(to *[]string, text string) {
		if len(*to) < 4 && !slices.Contains(*to, text) {
			*to = append(*to, text)
		}
	}
	for _, v := range e.holders(e.reading.Load(), addr, e.now()) {
		i := slices.IndexFunc(e.config.Lists, func(l ListConfig) bool { return l.Name == v.Scenario })
		switch {
		case v.ID >= decision.FirstLocal && i >= 0:
			add(&lines, fmt.Sprintf("take %v out of %s", valueOf(v.Prefix), e.config.Lists[i].Path))
		case v.ID >= decision.FirstLocal:
		case v.Prefix.IsSingleIP():
			add(&commands, "cscli decisions delete --ip "+addr.String())
		default:
			add(&commands, "cscli decisions delete --range "+v.Prefix.String())
		}
	}
	slices.Sort(commands) // addresses before ranges
	says := ""
	if len(commands) > 0 {
		says = "; to lift it everywhere: " + strings.Join(commands, " and ")
	}
	if len(lines) > 0 {
		says += "; to lift it for good " + strings.Join(lines, " and ")
	}
	return says
}

func (b *Bouncer) pause(q url.Values, by string) (Answer, error) {
	d, err := duration(q)
	if err != nil {
		return Answer{}, err
	}
	until, note, err := b.enforcer.pause(d, q.Get("because"), by)
	if err != nil {
		return Answer{}, fmt.Errorf("pause: %w", err)
	}
	if d == 0 {
		b.told(q, by, "end pause", valueOf(netip.Prefix{}), until)
		return Answer{"this node enforces again", note}, nil
	}
	b.told(q, by, "pause", valueOf(netip.Prefix{}), until)
	return Answer{fmt.Sprintf("this node drops nothing until %s, and enforces again by itself then", moment(until)), note}, nil
}

func (b *Bouncer) cleanup(q url.Values, by string) (Answer, error) {
	if err := b.enforcer.standDown(); err != nil {
		return Answer{}, fmt.Errorf("clean up: %w", err)
	}
	b.told(q, by, "cleanup", valueOf(netip.Prefix{}), time.Time{})
	return Answer{
		"the agent removed the table inet edgeward: no ban is enforced on this node any more",
		"the agent goes on without it, and enforces again when it is restarted: stop it if that is not wanted",
	}, nil
}

// Order is what to ask of an agent. What does not apply is zero.
type Order struct {
	Verb    string // allow, unban, pause or cleanup
	Address string // or range
	For     time.Duration
	End     bool // an allow or unban that is in force
	Because string
}

// Ask gives an order to the agent at the socket, and returns when the kernel has
// it. The error is daemon.ErrNotRunning where there is none.
func Ask(ctx context.Context, socket string, o Order) (Answer, error) {
	form := url.Values{"address": {o.Address}, "for": {o.For.String()}, "because": {o.Because}}
	if o.End {
		form.Set("end", strconv.FormatBool(true))
	}
	var a Answer
	err := daemon.Order(ctx, socket, "/v1/"+o.Verb, form, &a)
	return a, err
}

// AskStatus asks the agent at the socket how it stands.
func AskStatus(ctx context.Context, socket string) (Status, error) {
	var s Status
	err := daemon.Ask(ctx, socket, "/v1/status", nil, &s)
	return s, err
}

// AskWhy asks the agent at the socket about an address.
func AskWhy(ctx context.Context, socket string, addr netip.Addr) (Why, error) {
	var w Why
	err := daemon.Ask(ctx, socket, "/v1/why", url.Values{"address": {addr.String()}}, &w)
	return w, err
}

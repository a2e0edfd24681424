package bouncer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/edgeward/edgeward/internal/decision"
)

// Control answers the command line on a unix socket that root alone may use. It
// is a daemon.Task.
type Control struct {
	bouncer *Bouncer
	path    string
	server  *http.Server
	listen  net.Listener
}

// controlTimeout is how long a question may take on the way in, and its answer
// on the way out.
const controlTimeout = 10 * time.Second

// orderTimeout is how long an order may take: its answer comes when the kernel
// has it, and may have to wait for all bans to be written.
const orderTimeout = time.Minute

// ListenControl takes the socket at path; what a predecessor that is gone left
// there makes way.
func ListenControl(path string, b *Bouncer, log *slog.Logger) (*Control, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("listen for the command line: %w", err)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		_ = c.Close()
		return nil, fmt.Errorf("listen for the command line: another agent answers at %s", path)
	}
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() == os.ModeSocket {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("listen for the command line: %w", err)
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen for the command line: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("listen for the command line: %w", err), l.Close())
	}
	c := &Control{bouncer: b, path: path, listen: l}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) { answer(w, b.Status(), nil) })
	mux.HandleFunc("GET /v1/why", func(w http.ResponseWriter, r *http.Request) {
		addr, err := netip.ParseAddr(r.FormValue("address"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		why, err := b.Why(addr)
		answer(w, why, err)
	})
	order := func(path string, do func(*http.Request, string) (Answer, error)) {
		mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
			by, err := askedBy(r.Context())
			if err != nil {
				http.Error(w, err.Error(), http.StatusForbidden)
				return
			}
			r.Body = http.MaxBytesReader(w, r.Body, 16<<10)
			said, err := do(r, by)
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			answer(w, said, nil)
		})
	}
	order("/v1/allow", b.allow)
	order("/v1/unban", b.unban)
	order("/v1/pause", b.pause)
	order("/v1/cleanup", b.cleanup)
	order("/v1/probe", b.probe)
	c.server = &http.Server{
		Handler: mux, ReadTimeout: controlTimeout, WriteTimeout: orderTimeout, MaxHeaderBytes: 16 << 10,
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, conn)
		},
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	return c, nil
}

func answer(w http.ResponseWriter, value any, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(value)
}

// String names the task.
func (c *Control) String() string { return "control socket" }

// Run answers until ctx ends.
func (c *Control) Run(ctx context.Context) error {
	stopped := make(chan error, 1)
	go func() { stopped <- c.server.Serve(c.listen) }()
	select {
	case err := <-stopped:
		return fmt.Errorf("answer the command line: %w", err)
	case <-ctx.Done():
		err := c.server.Close() // removes the socket
		<-stopped
		return err
	}
}

// connKey is under what a request's context has its connection.
type connKey struct{}

// askedBy is who asks, as the kernel tells it of the connection. Root alone may
// give orders: the mode of the socket says so, and this once more.
func askedBy(ctx context.Context) (string, error) {
	conn, ok := ctx.Value(connKey{}).(*net.UnixConn)
	if !ok {
		return "", errors.New("orders are for the socket alone")
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return "", fmt.Errorf("ask who asks: %w", err)
	}
	var who *unix.Ucred
	if controlErr := raw.Control(func(fd uintptr) {
		who, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); controlErr != nil || err != nil {
		return "", fmt.Errorf("ask who asks: %w", errors.Join(controlErr, err))
	}
	if who.Uid != 0 && int(who.Uid) != os.Getuid() {
		return "", fmt.Errorf("orders are for root alone, not for user %d", who.Uid)
	}
	return fmt.Sprintf("user %d, process %d", who.Uid, who.Pid), nil
}

// Answer is what the agent says to an order that it has carried out.
type Answer struct {
	Says string `json:"says"`
	// Note is what about it will not last, or what else to know; may be empty.
	Note string `json:"note,omitempty"`
}

// duration reads the duration of an order.
func duration(r *http.Request) (time.Duration, error) {
	d, err := time.ParseDuration(r.FormValue("for"))
	if err != nil {
		return 0, fmt.Errorf("%q: want a duration such as 90s, 10m or 72h", r.FormValue("for"))
	}
	return d, nil
}

// told logs an order, and who gave it.
func (b *Bouncer) told(r *http.Request, by, order, value string, until time.Time) {
	attrs := []any{"order", order, "value", value, "by", by}
	if !until.IsZero() && until.Before(decision.Forever) {
		attrs = append(attrs, "until", until.Format(time.RFC3339))
	}
	if because := r.FormValue("because"); because != "" {
		attrs = append(attrs, "because", because)
	}
	b.log.Warn("the operator gave an order", attrs...)
}

// moment writes a time for people.
func moment(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 MST") }

func (b *Bouncer) allow(r *http.Request, by string) (Answer, error) {
	p, err := decision.ParsePrefix(r.FormValue("address"))
	if err != nil {
		return Answer{}, fmt.Errorf("%q: want an address or a range such as 192.0.2.1 or 2001:db8::/32", r.FormValue("address"))
	}
	d, end := time.Duration(0), r.FormValue("end") != ""
	if !end {
		if d, err = duration(r); err != nil {
			return Answer{}, err
		}
		if d <= 0 {
			return Answer{}, fmt.Errorf("%v: want a duration above zero; --end ends an allow", d)
		}
	}
	until, note, err := b.enforcer.allow(p, d, r.FormValue("because"), by)
	if err != nil {
		return Answer{}, fmt.Errorf("allow: %w", err)
	}
	if end {
		b.told(r, by, "end allow", valueOf(p), until)
		return Answer{fmt.Sprintf("%v is allowed no longer: what bans it counts again", valueOf(p)), note}, nil
	}
	b.told(r, by, "allow", valueOf(p), until)
	return Answer{fmt.Sprintf("no ban stops %v on this node until %s", valueOf(p), moment(until)), note}, nil
}

func (b *Bouncer) unban(r *http.Request, by string) (Answer, error) {
	addr, err := netip.ParseAddr(r.FormValue("address"))
	if err != nil || addr.Zone() != "" {
		return Answer{}, fmt.Errorf("%q: want an address such as 192.0.2.1 or 2001:db8::1", r.FormValue("address"))
	}
	addr = addr.Unmap()
	end := r.FormValue("end") != ""
	u, note, err := b.enforcer.unban(addr, end, r.FormValue("because"), by)
	if err != nil {
		return Answer{}, fmt.Errorf("unban: %w", err)
	}
	if end {
		b.told(r, by, "end unban", addr.String(), u.Until)
		return Answer{fmt.Sprintf("what bans %v counts again on this node", addr), note}, nil
	}
	b.told(r, by, "unban", addr.String(), u.Until)
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

func (b *Bouncer) pause(r *http.Request, by string) (Answer, error) {
	d, err := duration(r)
	if err != nil {
		return Answer{}, err
	}
	until, note, err := b.enforcer.pause(d, r.FormValue("because"), by)
	if err != nil {
		return Answer{}, fmt.Errorf("pause: %w", err)
	}
	if d == 0 {
		b.told(r, by, "end pause", valueOf(netip.Prefix{}), until)
		return Answer{"this node enforces again", note}, nil
	}
	b.told(r, by, "pause", valueOf(netip.Prefix{}), until)
	return Answer{fmt.Sprintf("this node drops nothing until %s, and enforces again by itself then", moment(until)), note}, nil
}

func (b *Bouncer) cleanup(r *http.Request, by string) (Answer, error) {
	if err := b.enforcer.standDown(); err != nil {
		return Answer{}, fmt.Errorf("clean up: %w", err)
	}
	b.told(r, by, "cleanup", valueOf(netip.Prefix{}), time.Time{})
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
// it.
func Ask(ctx context.Context, socket string, o Order) (Answer, error) {
	form := url.Values{"address": {o.Address}, "for": {o.For.String()}, "because": {o.Because}}
	if o.End {
		form.Set("end", strconv.FormatBool(true))
	}
	var a Answer
	err := ask(ctx, socket, http.MethodPost, "/v1/"+o.Verb, form, &a)
	return a, err
}

// ErrNoAgent says that no agent answers at the socket.
var ErrNoAgent = errors.New("no agent answers")

// AskStatus asks the agent at the socket how it stands.
func AskStatus(ctx context.Context, socket string) (Status, error) {
	var s Status
	err := ask(ctx, socket, http.MethodGet, "/v1/status", nil, &s)
	return s, err
}

// AskWhy asks the agent at the socket about an address.
func AskWhy(ctx context.Context, socket string, addr netip.Addr) (Why, error) {
	var w Why
	err := ask(ctx, socket, http.MethodGet, "/v1/why", url.Values{"address": {addr.String()}}, &w)
	return w, err
}

func ask(ctx context.Context, socket, method, path string, query url.Values, into any) error {
	limit := controlTimeout
	if method == http.MethodPost {
		limit = orderTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, "unix", socket)
			if err != nil {
				return nil, fmt.Errorf("%w at %s: %w", ErrNoAgent, socket, err)
			}
			return c, nil
		},
	}}
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path+"?"+query.Encode(), nil)
	if err != nil {
		return fmt.Errorf("ask the agent: %w", err)
	}
	res, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("ask the agent: %w", err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, 16<<20))
	if err != nil {
		return fmt.Errorf("ask the agent: %w", err)
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("ask the agent: %s", strings.TrimSpace(string(body)))
	}
	if err := json.Unmarshal(body, into); err != nil {
		return fmt.Errorf("ask the agent: %w", err)
	}
	return nil
}

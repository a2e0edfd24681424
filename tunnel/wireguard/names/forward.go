package names

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

// How upstreams are asked. A client waits about five seconds before it asks
// somebody else, and gives up on the VPN's names with all others.
const (
	tryTimeout = 1500 * time.Millisecond // for one upstream, by UDP and TCP together
	askTimeout = 4500 * time.Millisecond // for all of them together
	// downFor is how long an upstream that did not answer is asked last.
	downFor = 10 * time.Second
	// mostAhead bounds the questions under way to upstreams, and mostOfOne those
	// that one asker waits for: who asks what no server answers takes nothing from
	// others.
	mostAhead = 1024
	mostOfOne = 64
)

// forwarder asks upstreams, and remembers what they said. It belongs to one list
// of upstreams: another list may say other things of the same names.
type forwarder struct {
	upstreams []*upstream
	cache     *cache
	ahead     chan struct{} // one for each question under way
	now       func() time.Time

	mu      sync.Mutex
	flights map[key]*flight
}

// upstream is a resolver that is asked.
type upstream struct {
	addr netip.AddrPort
	// downUntil is when it is asked in its turn again, in Unix nanoseconds; zero
	// while it answers.
	downUntil atomic.Int64
}

// key is a question as an upstream is asked it.
type key struct {
	name   string // canonical
	qtype  uint16
	do, cd bool // the client validates, or wants no validation
}

func keyOf(q *dns.Msg, question dns.Question) key {
	k := key{name: dns.CanonicalName(question.Name), qtype: question.Qtype, cd: q.CheckingDisabled}
	if opt := q.IsEdns0(); opt != nil {
		k.do = opt.Do()
	}
	return k
}

// flight is a question under way, for all who ask it meanwhile.
type flight struct {
	landed chan struct{}
	told   *dns.Msg // not to be changed
	err    error
}

func newForwarder(addrs []netip.AddrPort, now func() time.Time) *forwarder {
	f := &forwarder{cache: newCache(), ahead: make(chan struct{}, mostAhead), flights: map[key]*flight{}, now: now}
	for _, a := range addrs {
		f.upstreams = append(f.upstreams, &upstream{addr: a})
	}
	return f
}

var errBusy = errors.New("too many questions are under way")

// ask returns what an upstream says, which the caller may change, and whether it
// was asked because of this question.
func (f *forwarder) ask(k key) (told *dns.Msg, fresh bool, err error) {
	if m, err := f.cache.get(k, f.now()); m != nil || err != nil {
		return m, false, err
	}
	f.mu.Lock()
	under := f.flights[k]
	if under == nil {
		select {
		case f.ahead <- struct{}{}:
		default:
			f.mu.Unlock()
			return nil, false, errBusy
		}
		under, fresh = &flight{landed: make(chan struct{})}, true
		f.flights[k] = under
	}
	f.mu.Unlock()
	if fresh {
		f.fly(k, under)
	}
	<-under.landed
	if under.err != nil {
		return nil, fresh, under.err
	}
	return under.told.Copy(), fresh, nil
}

// fly asks the upstreams and lands, whatever happens.
func (f *forwarder) fly(k key, under *flight) {
	defer func() {
		v := recover()
		if v != nil {
			under.told, under.err = nil, fmt.Errorf("panic: %v", v)
		}
		f.mu.Lock()
		delete(f.flights, k)
		f.mu.Unlock()
		<-f.ahead
		close(under.landed)
		if v != nil {
			panic(v) // it is logged where the question came in
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), askTimeout)
	defer cancel()
	under.told, under.err = f.askAll(ctx, k)
	f.cache.put(k, under.told, under.err, f.now())
}

// askAll asks one upstream after the other until one answers. An answer that
// tells of trouble of theirs counts where no other has a better one.
func (f *forwarder) askAll(ctx context.Context, k key) (*dns.Msg, error) {
	var worse *dns.Msg
	var errs []error
	order := f.order()
	if len(order) == 1 {
		order = append(order, order[0]) // a packet may be lost
	}
	for i, u := range order {
		if i > 0 && u == order[0] && worse != nil {
			break // it was not the packet
		}
		m, err := u.ask(ctx, k)
		if err != nil {
			errs = append(errs, err)
			u.downUntil.Store(f.now().Add(downFor).UnixNano())
			if ctx.Err() != nil {
				break
			}
			continue
		}
		u.downUntil.Store(0)
		if m.Rcode == dns.RcodeSuccess || m.Rcode == dns.RcodeNameError {
			return m, nil
		}
		if worse == nil {
			worse = m
		}
	}
	if worse != nil {
		return worse, nil
	}
	return nil, fmt.Errorf("ask upstreams: %w", errors.Join(errs...))
}

// order is the upstreams as they are asked: those that answer first. One whose
// pause is over is asked in its turn by one question, and by the others only
// once it has answered that.
func (f *forwarder) order() []*upstream {
	var up, down []*upstream
	now := f.now()
	for _, u := range f.upstreams {
		until := u.downUntil.Load()
		if until == 0 || now.UnixNano() >= until && u.downUntil.CompareAndSwap(until, now.Add(downFor).UnixNano()) {
			up = append(up, u)
		} else {
			down = append(down, u)
		}
	}
	return append(up, down...)
}

// down are the upstreams that did not answer when they were last asked.
func (f *forwarder) down() []netip.AddrPort {
	var out []netip.AddrPort
	for _, u := range f.upstreams {
		if u.downUntil.Load() != 0 {
			out = append(out, u.addr)
		}
	}
	return out
}

// ask puts one question to the upstream, by UDP, and by TCP where the answer
// does not fit.
func (u *upstream) ask(ctx context.Context, k key) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	q := new(dns.Msg)
	q.SetQuestion(k.name, k.qtype)
	q.CheckingDisabled = k.cd
	q.AuthenticatedData = true // tell whether it is; RFC 6840
	q.SetEdns0(largestUDP, k.do)
	for _, network := range []string{"udp", "tcp"} {
		// A socket for each question: the port is as hard to guess as the id.
		client := &dns.Client{Net: network, Timeout: tryTimeout, UDPSize: largestUDP}
		m, _, err := client.ExchangeContext(ctx, q, u.addr.String())
		if err != nil {
			return nil, fmt.Errorf("ask %s by %s: %w", u.addr, network, err)
		}
		if !m.Response || len(m.Question) != 1 || m.Question[0].Qtype != k.qtype || !strings.EqualFold(m.Question[0].Name, k.name) {
			return nil, fmt.Errorf("ask %s by %s: the answer is to another question", u.addr, network)
		}
		if m.Truncated && network == "udp" {
			continue
		}
		m.Extra = withoutOPT(m.Extra)
		return m, nil
	}
	return nil, fmt.Errorf("ask %s: the answer does not end", u.addr)
}

// withoutOPT leaves out what concerns one hop alone.
func withoutOPT(extra []dns.RR) []dns.RR {
	var out []dns.RR
	for _, rr := range extra {
		if rr.Header().Rrtype != dns.TypeOPT {
			out = append(out, rr)
		}
	}
	return out
}

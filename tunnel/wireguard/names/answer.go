package names

import (
	"fmt"
	"net"
	"runtime/debug"

	"github.com/miekg/dns"
)

// largestUDP is the largest answer by UDP, whatever a client allows: it passes
// any tunnel in one piece. What is larger is asked for again by TCP.
const largestUDP = 1232

// ServeDNS answers one question; the listeners call it, one goroutine each.
func (r *Resolver) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	defer func() {
		if v := recover(); v != nil {
			r.log.Error("an answer panicked", "err", fmt.Sprint(v), "stack", string(debug.Stack()))
			r.send(w, q, failure(q, dns.RcodeServerFailure))
		}
	}()
	s := r.setup.Load()
	a := s.asks(addrOf(w.RemoteAddr()))
	switch {
	case a == nil:
		r.refused.Add(1)
		r.send(w, q, failure(q, dns.RcodeRefused))
	case !a.limiter.Allow():
		r.limited.Add(1) // dropped: to ask again later is what it should do
	default:
		r.send(w, q, r.answer(s, a, q))
	}
}

// answer makes the answer to a question of somebody who may ask.
func (r *Resolver) answer(s *setup, a *asker, q *dns.Msg) *dns.Msg {
	if len(q.Question) != 1 || q.Opcode != dns.OpcodeQuery {
		return failure(q, dns.RcodeNotImplemented)
	}
	if opt := q.IsEdns0(); opt != nil && opt.Version() != 0 {
		return failure(q, dns.RcodeBadVers)
	}
	question := q.Question[0]
	if m := s.declared(q, question); m != nil {
		r.declared.Add(1)
		return m
	}
	switch {
	case s.ahead == nil, question.Qclass != dns.ClassINET, question.Qtype == dns.TypeAXFR, question.Qtype == dns.TypeIXFR:
		r.refused.Add(1)
		return failure(q, dns.RcodeRefused)
	}
	key := keyOf(q, question)
	if a.ahead.Add(1) > mostOfOne {
		a.ahead.Add(-1)
		r.limited.Add(1)
		return failure(q, dns.RcodeServerFailure)
	}
	told, fresh, err := s.ahead.ask(key)
	a.ahead.Add(-1)
	switch {
	case err != nil:
		r.failed.Add(1)
		return failure(q, dns.RcodeServerFailure)
	case fresh:
		r.forwarded.Add(1)
	default:
		r.cached.Add(1)
	}
	m := failure(q, told.Rcode)
	m.Answer, m.Ns, m.Extra = told.Answer, told.Ns, told.Extra
	m.AuthenticatedData = told.AuthenticatedData && (key.do || q.AuthenticatedData)
	m.CheckingDisabled = q.CheckingDisabled
	return m
}

// declared answers from the declared hosts and zones; nil where they say nothing.
func (s *setup) declared(q *dns.Msg, question dns.Question) *dns.Msg {
	name := dns.CanonicalName(question.Name)
	h, ok := s.hosts[name]
	apex := name
	inside := s.zones[name]
	for rest := name; !ok; {
		i, end := dns.NextLabel(rest, 0)
		if end || rest == "." {
			break
		}
		rest = rest[i:]
		if h, ok = s.wild[rest]; !ok && s.zones[rest] && !inside {
			apex, inside = rest, true
		}
	}
	if !ok && !inside {
		return nil
	}
	m := failure(q, dns.RcodeSuccess)
	m.Authoritative = true
	if !ok && name != apex {
		m.Rcode = dns.RcodeNameError
		// A name below which there are others exists, with nothing at it.
		for other := range s.hosts {
			if dns.IsSubDomain(name, other) {
				m.Rcode = dns.RcodeSuccess
				break
			}
		}
	}
	head := dns.RR_Header{Name: question.Name, Class: dns.ClassINET, Ttl: s.ttl}
	if question.Qclass == dns.ClassINET || question.Qclass == dns.ClassANY {
		if question.Qtype == dns.TypeA || question.Qtype == dns.TypeANY {
			for _, a := range h.v4 {
				head.Rrtype = dns.TypeA
				m.Answer = append(m.Answer, &dns.A{Hdr: head, A: net.IP(a.AsSlice())})
			}
		}
		if question.Qtype == dns.TypeAAAA || question.Qtype == dns.TypeANY {
			for _, a := range h.v6 {
				head.Rrtype = dns.TypeAAAA
				m.Answer = append(m.Answer, &dns.AAAA{Hdr: head, AAAA: net.IP(a.AsSlice())})
			}
		}
	}
	if len(m.Answer) == 0 {
		// How long to remember that there is nothing is told by the start of
		// authority.
		m.Ns = []dns.RR{&dns.SOA{
			Hdr: dns.RR_Header{Name: apex, Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: s.ttl},
			Ns:  apex, Mbox: "hostmaster." + apex, Serial: 1, Refresh: s.ttl, Retry: s.ttl, Expire: s.ttl, Minttl: s.ttl,
		}}
		if len("hostmaster.")+len(apex) > 250 {
			m.Ns[0].(*dns.SOA).Mbox = apex
		}
	}
	return m
}

// failure is an answer that says only how it went.
func failure(q *dns.Msg, rcode int) *dns.Msg {
	m := new(dns.Msg)
	m.SetRcode(q, rcode)
	m.RecursionAvailable = true
	return m
}

// send writes an answer in the size that the client takes.
func (r *Resolver) send(w dns.ResponseWriter, q *dns.Msg, m *dns.Msg) {
	size := dns.MaxMsgSize
	opt := q.IsEdns0()
	if _, udp := w.RemoteAddr().(*net.UDPAddr); udp {
		size = dns.MinMsgSize
		if opt != nil {
			size = min(max(int(opt.UDPSize()), dns.MinMsgSize), largestUDP)
		}
	}
	if opt != nil {
		m.SetEdns0(largestUDP, opt.Do())
	}
	m.Compress = true
	m.Truncate(size)
	// The asker may be gone; there is nobody to tell.
	_ = w.WriteMsg(m)
}

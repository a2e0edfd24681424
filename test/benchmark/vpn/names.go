package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"

	"github.com/edgeward/edgeward/test/benchmark/figures"
	"github.com/edgeward/edgeward/test/benchmark/stage"
	"github.com/edgeward/edgeward/tunnel/wireguard/names"
)

// askers are how many ask at once.
const askers = 16

// namesPart measures the resolver by UDP on loopback.
func namesPart(s *stage.Scope, opts options) (string, error) {
	upstream, err := answering(s)
	if err != nil {
		return "", err
	}
	loopback := netip.MustParseAddr("127.0.0.1")
	at := netip.AddrPortFrom(loopback, freePort(s))
	r := names.New(slog.New(slog.DiscardHandler))
	err = r.Apply(names.Config{
		Listen: []netip.AddrPort{at}, Hosts: map[string][]netip.Addr{"grafana.home.example.com": {service}},
		Upstreams: []netip.AddrPort{upstream}, Peers: []netip.Prefix{host(loopback)}, Rate: 1e9, Burst: 1e9,
	})
	if err != nil {
		return "", err
	}
	ctx, stop := context.WithCancel(s)
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	s.Cleanup(func() { stop(); <-done })
	for began := time.Now(); len(r.Status().Listening) == 0; {
		if time.Since(began) > 10*time.Second {
			return "", fmt.Errorf("the resolver does not listen: %w", r.Status().Missing)
		}
		if err := stage.Wait(s, time.Millisecond); err != nil {
			return "", err
		}
	}
	rows := [][]string{{"names, by UDP", "answers/s to " + fmt.Sprint(askers) + " at once", "µs for one alone", "99 of 100 within, µs"}}
	for _, of := range []struct {
		what string
		name func(int64) string
	}{
		{"a declared host", func(int64) string { return "grafana.home.example.com." }},
		{"kept from an upstream", func(int64) string { return "public.example.com." }},
		{"asked of an upstream on this machine", func(i int64) string { return fmt.Sprintf("n%d.example.com.", i) }},
	} {
		rate, alone, late, err := ask(s, at, of.name, opts.questions)
		if err != nil {
			return "", fmt.Errorf("%s: %w", of.what, err)
		}
		opts.say("names: %s: %.0f answers/s, %v, %v", of.what, rate, alone, late)
		us := func(d time.Duration) string { return digits(float64(d) / float64(time.Microsecond)) }
		rows = append(rows, []string{of.what, figures.Thousands(int(rate)), us(alone), us(late)})
	}
	return figures.Table(rows) + "\nWho asks shares the processors with the resolver.\n", nil
}

// numbers are of names that nobody has asked for.
var numbers atomic.Int64

// ask asks questions one after the other, and then many at once.
func ask(s *stage.Scope, at netip.AddrPort, name func(int64) string, n int) (rate float64, alone, late time.Duration, err error) {
	some := func(n int) (took []time.Duration, err error) {
		c, err := dns.Dial("udp", at.String())
		if err != nil {
			return nil, err
		}
		defer c.Close()
		for range n {
			q := new(dns.Msg)
			q.SetQuestion(name(numbers.Add(1)), dns.TypeA)
			began := time.Now()
			if err := c.SetDeadline(began.Add(5 * time.Second)); err != nil {
				return nil, err
			}
			if err := c.WriteMsg(q); err != nil {
				return nil, err
			}
			m, err := c.ReadMsg()
			if err != nil {
				return nil, fmt.Errorf("no answer: %w", err)
			}
			took = append(took, time.Since(began))
			if m.Rcode != dns.RcodeSuccess || len(m.Answer) != 1 {
				return nil, fmt.Errorf("%s: %s with %d answers", q.Question[0].Name, dns.RcodeToString[m.Rcode], len(m.Answer))
			}
		}
		return took, s.Err()
	}
	took, err := some(n)
	if err != nil {
		return 0, 0, 0, err
	}
	slices.Sort(took)
	alone, late = took[len(took)/2], took[len(took)*99/100]
	errs := make([]error, askers)
	began := time.Now()
	var all sync.WaitGroup
	for i := range errs {
		all.Go(func() { _, errs[i] = some(n / askers) })
	}
	all.Wait()
	return float64(n/askers*askers) / time.Since(began).Seconds(), alone, late, errors.Join(errs...)
}

// answering is an upstream that knows all names.
func answering(s *stage.Scope) (netip.AddrPort, error) {
	c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:0")))
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("answer as an upstream: %w", err)
	}
	server := &dns.Server{PacketConn: c, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(q)
		m.Answer = []dns.RR{&dns.A{
			Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 600}, A: net.IPv4(192, 0, 2, 1),
		}}
		_ = w.WriteMsg(m) // who asks asks again
	})}
	go func() { _ = server.ActivateAndServe() }()
	s.Cleanup(func() { _ = server.Shutdown() })
	return c.LocalAddr().(*net.UDPAddr).AddrPort(), nil
}

package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/edgeward/edgeward/bouncer"
	"github.com/edgeward/edgeward/internal/crowdsec"
	"github.com/edgeward/edgeward/internal/daemon"
	"github.com/edgeward/edgeward/internal/lapi"
)

// follow returns the tasks that follow LAPI into the bouncer and report to it;
// there are none without a LAPI.
func follow(c bouncer.Config, b *bouncer.Bouncer, start time.Time, log *slog.Logger) ([]daemon.Task, error) {
	if c.LAPI.URL == "" {
		return nil, nil
	}
	from, err := crowdsec.New(c.LAPI, crowdsec.Agent{Type: "crowdsec-edgeward-nftables-bouncer", Version: bouncer.Version}, log)
	if err != nil {
		return nil, err
	}
	decisions := from.Stream([]string{"ip", "range"}, b.Sink(), log)
	decisions.Ended = b.Pulled
	return []daemon.Task{stream{decisions}, from.Usage(start, b.Totals)}, nil
}

// stream is LAPI's decision stream as a task.
type stream struct{ *lapi.Stream }

func (s stream) String() string { return "decision stream" }

func (s stream) Run(ctx context.Context) error {
	s.Stream.Run(ctx)
	return nil
}

package crowdsec

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/crowdsecurity/crowdsec/pkg/apiclient"
	"github.com/crowdsecurity/crowdsec/pkg/models"
	csbouncer "github.com/crowdsecurity/go-cs-bouncer"
	"github.com/sirupsen/logrus"
)

// Names and units of CrowdSec's usage metrics, as cscli and the console show
// them.
const (
	Dropped         = "dropped"          // what was refused, by origin
	Processed       = "processed"        // all that was looked at, of no origin
	ActiveDecisions = "active_decisions" // decisions in force: a gauge

	Packet  = "packet"
	Byte    = "byte"
	Request = "request"
	IP      = "ip" // of ActiveDecisions

	IPv4 = "ipv4"
	IPv6 = "ipv6"
)

// Series is one usage metric. What does not apply is empty.
type Series struct {
	Name        string
	Unit        string
	Origin      string
	Remediation string
	IPType      string
}

// Totals are usage metrics as they stand: counts since whenever, but for
// ActiveDecisions, which is what there is. They are all there are: a series
// that is missing has ended, and one that is lower than it was began again.
type Totals map[Series]uint64

// Usage reports usage metrics to LAPI: first after a minute, so that an
// operator sees the new bouncer, then every quarter of an hour, less up to a
// tenth at random, and once more at the end. Make it with LAPI.Usage.
//
// A report says what was counted since the last one that LAPI accepted. What a
// failed one held is in the next; where LAPI took a report and its answer was
// lost, those counts are there twice.
type Usage struct {
	lapi  *LAPI
	read  func() (Totals, error)
	start time.Time
	log   *slog.Logger

	began    bool      // accepted is valid
	accepted Totals    // as of the last report that LAPI accepted
	since    time.Time // of accepted
	stamp    int64     // latest time given to a report
	trouble  string    // as logged
}

const (
	firstReport    = time.Minute
	reportInterval = 15 * time.Minute
	lastReport     = 5 * time.Second // longest, at the end
	reportTimeout  = 15 * time.Second
)

// Usage returns the reporter of what read returns. What read returns first is
// where counting begins: counters that outlive the process, as the kernel's
// do, were the former process's to report; where the first reading fails, the
// first that succeeds counts. read is called by one goroutine.
// start is when the process began.
func (l *LAPI) Usage(start time.Time, read func() (Totals, error)) *Usage {
	return &Usage{lapi: l, read: read, start: start, log: l.log.With("component", "usage")}
}

// String names the reporter.
func (u *Usage) String() string { return "usage metrics" }

// Run reports until ctx ends, and returns nil.
func (u *Usage) Run(ctx context.Context) error {
	if totals, err := u.read(); err == nil {
		u.begin(totals)
	}
	for wait := firstReport; ; wait = reportInterval {
		timer := time.NewTimer(wait - rand.N(wait/10))
		select {
		case <-ctx.Done():
			timer.Stop()
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastReport)
			defer cancel()
			u.note(u.report(last))
			return nil
		case <-timer.C:
			err := u.report(ctx)
			if ctx.Err() == nil {
				u.note(err)
			}
		}
	}
}

func (u *Usage) begin(totals Totals) {
	u.began, u.accepted, u.since = true, maps.Clone(totals), time.Now()
}

// note logs where reports begin to fail, fail otherwise, and succeed again.
func (u *Usage) note(err error) {
	switch {
	case err != nil && err.Error() != u.trouble:
		u.trouble = err.Error()
		u.log.Warn("cannot report usage metrics, keeping the counts", "err", err)
	case err == nil && u.trouble != "":
		u.trouble = ""
		u.log.Info("usage metrics reported again")
	}
}

// report sends what was counted since the last report.
func (u *Usage) report(ctx context.Context) error {
	totals, err := u.read()
	if err != nil {
		return fmt.Errorf("read usage metrics: %w", err)
	}
	if !u.began {
		u.begin(totals)
	}
	now := time.Now()
	metrics := u.metrics(totals, now)
	if err := u.push(ctx, metrics); err != nil {
		return err
	}
	u.accepted, u.since = maps.Clone(totals), now
	return nil
}

// changes is what to report of each series: of a counter what was added, of a
// gauge its value, and once more 0 where it is gone, because CrowdSec would
// show its last value for ever. Decisions of one origin and family are one
// gauge, whatever they ask for: CrowdSec keeps one.
func changes(accepted, totals Totals) Totals {
	out := Totals{}
	for series, value := range accepted {
		if series.Name == ActiveDecisions && value > 0 {
			series.Remediation = ""
			out[series] = 0
		}
	}
	for series, value := range totals {
		if series.Name == ActiveDecisions {
			series.Remediation = ""
			out[series] += value
			continue
		}
		// A counter that is lower than it was began again.
		if before := accepted[series]; before <= value {
			value -= before
		}
		if value > 0 {
			out[series] = value
		}
	}
	return out
}

// metrics puts the changes into CrowdSec's form. cscli takes items of one
// second that differ in nothing but their remediation, and happen to have the
// same value, for one and the same. So each remediation is reported under a
// second of its own.
func (u *Usage) metrics(totals Totals, now time.Time) []*models.DetailedMetrics {
	byRemediation := map[string][]*models.MetricsDetailItem{}
	out := changes(u.accepted, totals)
	for _, series := range slices.SortedFunc(maps.Keys(out), compareSeries) {
		value := float64(out[series])
		labels := models.MetricsLabels{}
		for name, label := range map[string]string{"origin": series.Origin, "remediation": series.Remediation, "ip_type": series.IPType} {
			if label != "" {
				labels[name] = strings.ToValidUTF8(label[:min(len(label), labelLimit)], "")
			}
		}
		byRemediation[series.Remediation] = append(byRemediation[series.Remediation],
			&models.MetricsDetailItem{Name: &series.Name, Unit: &series.Unit, Value: &value, Labels: labels})
	}
	window := max(int64(now.Sub(u.since).Round(time.Second)/time.Second), 1)
	u.stamp = max(now.Unix(), u.stamp+int64(len(byRemediation)))
	var metrics []*models.DetailedMetrics
	for i, remediation := range slices.Sorted(maps.Keys(byRemediation)) {
		stamp := u.stamp - int64(i)
		metrics = append(metrics, &models.DetailedMetrics{
			Items: byRemediation[remediation],
			Meta:  &models.MetricsMeta{UtcNowTimestamp: &stamp, WindowSizeSeconds: &window},
		})
	}
	return metrics
}

// labelLimit is the longest label, in bytes, that LAPI takes; a longer one
// would cost the whole report.
const labelLimit = 255

func compareSeries(a, b Series) int {
	return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Unit, b.Unit), cmp.Compare(a.Origin, b.Origin),
		cmp.Compare(a.Remediation, b.Remediation), cmp.Compare(a.IPType, b.IPType))
}

// push has the library's MetricsProvider send one report. The provider sends
// at each tick for as long as its context lives, without jitter, not at the
// end, and tells a logger alone how it went, so that counts are lost with
// each failure. Here a provider lives for one report: its first tick comes at
// once, and an exchange that stands in its transport sees the answer and ends
// its context.
func (u *Usage) push(ctx context.Context, metrics []*models.DetailedMetrics) error {
	ctx, cancel := context.WithTimeout(ctx, reportTimeout)
	defer cancel()
	one := &exchange{next: u.lapi.Client.Transport, end: cancel}
	base := *u.lapi.base
	client, err := apiclient.NewDefaultClient(&base, "v1", u.lapi.agent.String(), &http.Client{Transport: one, CheckRedirect: u.lapi.Client.CheckRedirect})
	if err != nil {
		return fmt.Errorf("report usage metrics: %w", err)
	}
	fill := func(report *models.RemediationComponentsMetrics, _ time.Duration) {
		startup := u.start.Unix() // the provider takes its own
		report.UtcStartupTimestamp = &startup
		report.Version = &u.lapi.agent.Version
		report.Metrics = metrics
	}
	mute := logrus.New()
	mute.SetOutput(io.Discard)
	provider, err := csbouncer.NewMetricsProvider(client, u.lapi.agent.Type, fill, mute)
	if err != nil {
		return fmt.Errorf("report usage metrics: %w", err)
	}
	provider.Interval = time.Millisecond
	err = provider.Run(ctx) // no more than that its context ended
	if one.done {
		err = one.err
	}
	if err != nil {
		return fmt.Errorf("report usage metrics: %w", err)
	}
	return nil
}

// exchange is a transport for one request: it keeps how that went and ends
// the context once the answer has been read.
type exchange struct {
	next http.RoundTripper
	end  context.CancelFunc
	done bool
	err  error
}

var errExchanged = errors.New("reported already")

// RoundTrip sends the first request and refuses any other.
func (e *exchange) RoundTrip(req *http.Request) (*http.Response, error) {
	if e.done {
		if req.Body != nil {
			_ = req.Body.Close()
		}
		return nil, errExchanged
	}
	res, err := e.next.RoundTrip(req)
	e.done, e.err = true, err
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) {
			e.err = fmt.Errorf("LAPI was silent: %w", err)
		}
		e.end()
		return nil, err
	}
	switch {
	case res.StatusCode == http.StatusNotFound:
		e.err = errors.New("LAPI answers 404 Not Found: it is older than 1.6.3, or the URL is not LAPI's")
	case res.StatusCode < 200 || res.StatusCode > 299:
		e.err = fmt.Errorf("LAPI answers %s", res.Status)
	}
	res.Body = &lastRead{res.Body, e.end}
	return res, nil
}

// lastRead is an answer's body that tells when it is closed.
type lastRead struct {
	io.ReadCloser
	end context.CancelFunc
}

// Close closes the body.
func (b *lastRead) Close() error {
	defer b.end()
	return b.ReadCloser.Close()
}

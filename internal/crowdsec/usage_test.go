package crowdsec

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
)

// wire is a LAPI that is not there: it keeps the reports that reach it and
// answers as told.
type wire struct {
	answer  func() (*http.Response, error) // nil: 201
	reports []report
}

// report is a body as LAPI gets it.
type report struct {
	at     time.Time
	Remedy []struct {
		Type    string
		Version string
		Startup int64 `json:"utc_startup_timestamp"`
		OS      struct{ Name, Version string }
		Metrics []struct {
			Meta struct {
				Now    int64 `json:"utc_now_timestamp"`
				Window int64 `json:"window_size_seconds"`
			}
			Items []struct {
				Name, Unit string
				Value      float64
				Labels     map[string]string
			}
		}
	} `json:"remediation_components"`
}

// lines are the items, each as "name unit value labels".
func (r *report) lines() []string {
	var lines []string
	for _, remedy := range r.Remedy {
		for _, m := range remedy.Metrics {
			for _, i := range m.Items {
				labels := ""
				for _, name := range slices.Sorted(maps.Keys(i.Labels)) {
					labels += " " + name + "=" + i.Labels[name]
				}
				lines = append(lines, fmt.Sprintf("%s %s %v%s", i.Name, i.Unit, i.Value, labels))
			}
		}
	}
	return lines
}

func (w *wire) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Method != http.MethodPost || req.URL.Path != "/v1/usage-metrics" || req.UserAgent() != agent.String() {
		return nil, fmt.Errorf("asked %s %s as %s", req.Method, req.URL, req.UserAgent())
	}
	body := io.Reader(req.Body)
	if req.Header.Get("Content-Encoding") == "gzip" {
		unzipped, err := gzip.NewReader(body)
		if err != nil {
			return nil, err
		}
		body = unzipped
	}
	r := report{at: time.Now()}
	if err := json.NewDecoder(body).Decode(&r); err != nil {
		return nil, err
	}
	w.reports = append(w.reports, r)
	if w.answer != nil {
		return w.answer()
	}
	return response(http.StatusCreated, ""), nil
}

func response(status int, body string) *http.Response {
	return &http.Response{StatusCode: status, Status: fmt.Sprintf("%d %s", status, http.StatusText(status)), Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body))}
}

func usage(w *wire, log *slog.Logger, read func() (Totals, error)) *Usage {
	c := Defaults()
	c.URL, c.KeyFile = "http://lapi", "/k"
	l, err := New(c, agent, log)
	if err != nil {
		panic(err) // the URL is above
	}
	l.Client.Transport = w
	return l.Usage(time.Unix(1700000000, 0), read)
}

func dropped(unit, origin, remediation, ip string) Series {
	return Series{Name: Dropped, Unit: unit, Origin: origin, Remediation: remediation, IPType: ip}
}

func active(origin, remediation, ip string) Series {
	return Series{Name: ActiveDecisions, Unit: IP, Origin: origin, Remediation: remediation, IPType: ip}
}

func TestChanges(t *testing.T) {
	capi, cscli := dropped(Packet, "CAPI", "ban", IPv4), dropped(Packet, "cscli", "ban", IPv4)
	held := active("CAPI", "", IPv4)
	for _, c := range []struct {
		name                   string
		accepted, totals, want Totals
	}{
		{"nothing", Totals{}, Totals{}, Totals{}},
		{"first counts", Totals{}, Totals{capi: 5}, Totals{capi: 5}},
		{"more", Totals{capi: 5, cscli: 1}, Totals{capi: 8, cscli: 1}, Totals{capi: 3}},
		{"a new origin", Totals{capi: 5}, Totals{capi: 5, cscli: 2}, Totals{cscli: 2}},
		{"began again", Totals{capi: 500}, Totals{capi: 8}, Totals{capi: 8}},
		{"began again at nothing", Totals{capi: 500}, Totals{capi: 0}, Totals{}},
		{"ended", Totals{capi: 500}, Totals{}, Totals{}},
		{"a gauge is told as it is", Totals{held: 7}, Totals{held: 7}, Totals{held: 7}},
		{"a gauge that fell", Totals{held: 7}, Totals{held: 0}, Totals{held: 0}},
		{"a gauge that is gone is told once", Totals{held: 7}, Totals{}, Totals{held: 0}},
		{"and then no more", Totals{}, Totals{}, Totals{}},
		{"gauges of one origin are one", Totals{active("CAPI", "captcha", IPv4): 1},
			Totals{active("CAPI", "ban", IPv4): 7, active("CAPI", "throttle", IPv4): 2, active("CAPI", "ban", IPv6): 4},
			Totals{held: 9, active("CAPI", "", IPv6): 4}},
	} {
		if diff := cmp.Diff(c.want, changes(c.accepted, c.totals)); diff != "" {
			t.Errorf("%s: %s", c.name, diff)
		}
	}
}

// TestReports lives through an afternoon: what goes to LAPI, and when.
func TestReports(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &wire{}
		var mu sync.Mutex                                            // what the reporter meets at its next turn
		totals := Totals{dropped(Packet, "CAPI", "ban", IPv4): 1000} // of the process before
		var unreadable, away error
		status := http.StatusCreated
		w.answer = func() (*http.Response, error) {
			mu.Lock()
			defer mu.Unlock()
			if away != nil {
				return nil, away
			}
			return response(status, "{}"), nil
		}
		log := &bytes.Buffer{}
		u := usage(w, slog.New(slog.NewTextHandler(log, nil)), func() (Totals, error) {
			mu.Lock()
			defer mu.Unlock()
			return maps.Clone(totals), unreadable
		})
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- u.Run(ctx) }()
		pass := func(d time.Duration, change func()) {
			mu.Lock()
			change()
			mu.Unlock()
			time.Sleep(d)
			synctest.Wait()
		}

		pass(time.Millisecond, func() {})
		pass(firstReport, func() {
			totals = Totals{
				dropped(Packet, "CAPI", "ban", IPv4):                 1003,
				dropped(Byte, "CAPI", "ban", IPv4):                   180,
				dropped(Packet, "CAPI", "captcha", IPv4):             3,
				dropped(Packet, "cscli", "ban", IPv6):                3,
				{Name: Processed, Unit: Packet, IPType: IPv4}:        1 << 40,
				active("CAPI", "ban", IPv4):                          15000,
				dropped(Packet, strings.Repeat("é", 200), "ban", ""): 1,
			}
		})
		pass(reportInterval, func() { // fails
			away = errors.New("connection refused")
			totals[dropped(Packet, "CAPI", "ban", IPv4)] = 1010
		})
		pass(reportInterval, func() { // fails otherwise
			away, status = nil, http.StatusInternalServerError
			totals[dropped(Packet, "CAPI", "ban", IPv4)] = 1013
		})
		pass(reportInterval, func() { // tells all that was missed
			status = http.StatusCreated
			totals[dropped(Packet, "CAPI", "ban", IPv4)] = 1015
		})
		pass(reportInterval, func() { unreadable = errors.New("netlink is gone") })
		pass(time.Minute, func() {
			unreadable = nil
			totals = Totals{dropped(Packet, "CAPI", "ban", IPv4): 4} // the table was made anew
		})
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}

		capi := "dropped packet %d ip_type=ipv4 origin=CAPI remediation=ban"
		held := "active_decisions ip 15000 ip_type=ipv4 origin=CAPI"
		want := [][]string{{
			held,
			"processed packet 1.099511627776e+12 ip_type=ipv4",
			"dropped byte 180 ip_type=ipv4 origin=CAPI remediation=ban",
			fmt.Sprintf(capi, 3),
			"dropped packet 3 ip_type=ipv6 origin=cscli remediation=ban",
			"dropped packet 1 origin=" + strings.Repeat("é", 127) + " remediation=ban",
			"dropped packet 3 ip_type=ipv4 origin=CAPI remediation=captcha",
		}, {
			held, fmt.Sprintf(capi, 7),
		}, {
			held, fmt.Sprintf(capi, 10),
		}, {
			held, fmt.Sprintf(capi, 12),
		}, {
			"active_decisions ip 0 ip_type=ipv4 origin=CAPI", fmt.Sprintf(capi, 4),
		}}
		var got [][]string
		for _, r := range w.reports {
			got = append(got, r.lines())
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatal(diff)
		}
		first, last := w.reports[0].Remedy[0], w.reports[4].Remedy[0]
		if first.Type != agent.Type || first.Version != agent.Version || first.Startup != 1700000000 || first.OS.Name == "" {
			t.Errorf("the report is from %+v", first)
		}
		// cscli does not tell remediations apart: each has its own second.
		seconds := map[int64]bool{}
		for _, r := range w.reports {
			for _, m := range r.Remedy[0].Metrics {
				if seconds[m.Meta.Now] {
					t.Errorf("two groups of items for the second %d", m.Meta.Now)
				}
				seconds[m.Meta.Now] = true
			}
		}
		if window := first.Metrics[0].Meta.Window; window < 54 || window > 60 {
			t.Errorf("the first report covers %d s", window)
		}
		if window := w.reports[3].Remedy[0].Metrics[0].Meta.Window; window < 3*810 || window > 3*900 {
			t.Errorf("the report after two failures covers %d s", window)
		}
		if window := last.Metrics[0].Meta.Window; window < 810 || window > 2*900 {
			t.Errorf("the last report covers %d s", window)
		}
		for i := 1; i <= 3; i++ {
			if wait := w.reports[i].at.Sub(w.reports[i-1].at); wait > reportInterval || wait < reportInterval*9/10 {
				t.Errorf("report %d came after %v", i, wait)
			}
		}
		for line, times := range map[string]int{"connection refused": 1, "LAPI answers 500": 1, "netlink is gone": 1, "reported again": 2} {
			if n := strings.Count(log.String(), line); n != times {
				t.Errorf("%q is in the log %d times, not %d:\n%s", line, n, times, log)
			}
		}
	})
}

func TestPush(t *testing.T) {
	for _, c := range []struct {
		name   string
		answer func() (*http.Response, error)
		want   string
	}{
		{"taken", nil, ""},
		{"taken with 200", func() (*http.Response, error) { return response(http.StatusOK, "{}"), nil }, ""},
		{"an old LAPI", func() (*http.Response, error) { return response(http.StatusNotFound, "404 page not found"), nil }, "LAPI answers 404 Not Found: it is older"},
		{"refused", func() (*http.Response, error) { return response(http.StatusForbidden, `{"message":"x"}`), nil }, "LAPI answers 403 Forbidden"},
		{"a page", func() (*http.Response, error) {
			return response(http.StatusBadGateway, strings.Repeat("<html>", 1000)), nil
		}, "LAPI answers 502 Bad Gateway"},
		{"no connection", func() (*http.Response, error) { return nil, errors.New("connection refused") }, "connection refused"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := &wire{answer: c.answer}
			err := usage(w, quiet(), nil).push(t.Context(), nil)
			if err == nil != (c.want == "") || err != nil && !strings.Contains(err.Error(), "report usage metrics: "+c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if len(w.reports) != 1 {
				t.Errorf("sent %d times", len(w.reports))
			}
		})
	}
}

// silence is a LAPI that takes a request and never answers.
type silence struct{}

func (silence) RoundTrip(req *http.Request) (*http.Response, error) {
	<-req.Context().Done()
	return nil, req.Context().Err()
}

func TestSilentLAPI(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &bytes.Buffer{}
		u := usage(&wire{}, slog.New(slog.NewTextHandler(log, nil)), func() (Totals, error) { return Totals{}, nil })
		u.lapi.Client.Transport = silence{}
		start := time.Now()
		if err := u.push(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "LAPI was silent") || time.Since(start) > reportTimeout {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		// The process's end waits for it no longer than it may.
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		start = time.Now()
		if err := u.Run(ctx); err != nil || time.Since(start) > lastReport {
			t.Errorf("ended with %v after %v", err, time.Since(start))
		}
	})
}

// TestLibraryIsSilent: what the library logs and counts is not ours to show.
func TestLibraryIsSilent(t *testing.T) {
	var global bytes.Buffer
	logrus.SetOutput(&global)
	t.Cleanup(func() { logrus.SetOutput(os.Stderr) })
	for _, answer := range []func() (*http.Response, error){
		nil,
		func() (*http.Response, error) { return nil, errors.New("connection refused") },
		func() (*http.Response, error) { return response(http.StatusNotFound, ""), nil },
		func() (*http.Response, error) { return response(http.StatusUnprocessableEntity, "no"), nil },
	} {
		_ = usage(&wire{answer: answer}, quiet(), nil).push(t.Context(), nil)
	}
	if global.Len() > 0 {
		t.Errorf("the library logged %s", global.String())
	}
	families, err := prometheus.DefaultGatherer.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if strings.HasPrefix(f.GetName(), "lapi_") {
			t.Errorf("the library registered %s", f.GetName())
		}
	}
}

package e2e

import (
	"fmt"
	"io"
	"net/http"
	"sync"
	"testing"
	"time"
)

// load is a steady stream of requests. Each is due at a fixed time, whether or
// not those before it have been answered, and its latency counts from then: a
// server that stands still for a moment cannot hide it by not being asked.
type load struct {
	stop func()

	mu     sync.Mutex
	took   figures
	wrong  int
	sample string // the first wrong answer
}

// expected is a request of a load and the status it must get.
type expected struct {
	router, address string
	status          int
}

// loadWorkers is more requests than are ever under way at once, unless
// something stalls.
const loadWorkers = 64

// startLoad makes rate requests a second, going round those given.
func (g *gateway) startLoad(t *testing.T, rate int, round []expected) *load {
	t.Helper()
	l := &load{}
	transport := &http.Transport{MaxIdleConnsPerHost: loadWorkers}
	client := &http.Client{Transport: transport, Timeout: 10 * time.Second}
	type job struct {
		due time.Time
		expected
	}
	jobs := make(chan job, 100*loadWorkers)
	quit := make(chan struct{})
	var workers sync.WaitGroup
	for range loadWorkers {
		workers.Go(func() {
			for j := range jobs {
				complaint := ""
				if status, err := ask(client, g.URL, j.expected); err != nil {
					complaint = fmt.Sprintf("%s for %s: %v", j.router, j.address, err)
				} else if status != j.status {
					complaint = fmt.Sprintf("%s for %s: %d, want %d", j.router, j.address, status, j.status)
				}
				l.mu.Lock()
				l.took = append(l.took, time.Since(j.due))
				if complaint != "" {
					if l.wrong++; l.sample == "" {
						l.sample = complaint
					}
				}
				l.mu.Unlock()
			}
		})
	}
	workers.Go(func() {
		defer close(jobs)
		due := time.Now()
		for i := 0; ; i++ {
			select {
			case <-quit:
				return
			case <-time.After(time.Until(due)):
			}
			jobs <- job{due, round[i%len(round)]}
			due = due.Add(time.Second / time.Duration(rate))
		}
	})
	l.stop = sync.OnceFunc(func() {
		close(quit)
		workers.Wait()
		transport.CloseIdleConnections()
	})
	t.Cleanup(l.stop)
	return l
}

func ask(client *http.Client, url string, e expected) (status int, err error) {
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return 0, err
	}
	req.Host = e.router + ".test"
	req.Header.Set("X-Forwarded-For", e.address)
	resp, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, err
}

// cut returns the latencies since the last cut, after failing the test if any
// request since then was answered wrongly.
func (l *load) cut(t *testing.T, phase string) figures {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	took := l.took
	t.Logf("%s: %v", phase, took)
	if l.wrong > 0 {
		t.Errorf("%s: %d of %d requests were answered wrongly, the first %s", phase, l.wrong, len(took), l.sample)
	}
	l.took, l.wrong, l.sample = nil, 0, ""
	return took
}

package plugin

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestReloadsShareOneEngine(t *testing.T) {
	lapi := startLAPI(decisionRow(1, "192.0.2.1", "ban", "crowdsec"))
	defer lapi.Close()
	config := pulling(lapi, "reloads")
	s := open(t, config)
	s.becomes("192.0.2.1", 403)
	for i := 0; i < 50; i++ {
		s.cancel()
		s = open(t, config)
		s.is("192.0.2.1", 403)
	}
	if _, full, _ := lapi.pulls(); full != 1 {
		t.Errorf("50 reloads made %d full pulls", full)
	}
}

func TestANewKeyKeepsTheTable(t *testing.T) {
	lapi := startLAPI(decisionRow(1, "192.0.2.1", "ban", "crowdsec"))
	defer lapi.Close()
	s := open(t, pulling(lapi, "old"))
	s.becomes("192.0.2.1", 403)
	s.cancel()
	lapi.set(true)
	s = open(t, pulling(lapi, "new"))
	s.is("192.0.2.1", 403)
	_, before, _ := lapi.pulls()
	lapi.set(false, decisionRow(2, "192.0.2.2", "ban", "crowdsec"))
	s.becomes("192.0.2.2", 403)
	if _, full, key := lapi.pulls(); key != "new" || full <= before {
		t.Errorf("pulled with key %q, %d full pulls", key, full-before)
	}
	// A first answer that lacks what was held is not believed at once.
	s.is("192.0.2.1", 403)
}

func TestAnotherAddressKeepsTheTable(t *testing.T) {
	lapi := startLAPI(decisionRow(1, "192.0.2.1", "ban", "crowdsec"))
	defer lapi.Close()
	s := open(t, pulling(lapi, "moves"))
	s.becomes("192.0.2.1", 403)
	other := startOther(lapi, "127.0.0.1:1")
	elsewhere := open(t, other)
	elsewhere.is("192.0.2.1", 418) // while the first LAPI is in use, it is another
	s.cancel()
	elsewhere.becomes("192.0.2.1", 403)
	other.Decisions.FailClosed = true
	closed := open(t, other)
	closed.is("192.0.2.1", 403)
	closed.is("192.0.2.2", 503)
}

// startOther returns a configuration for a LAPI elsewhere, with a key of its own.
func startOther(lapi *lapiStub, host string) *Config {
	c := pulling(lapi, "elsewhere")
	c.LAPI.URL = "http://" + host
	return c
}

// TestTheSameKeyUnderTwoNames: one key, given in two ways, means two engines that
// take deltas away from each other; both must know everything all the same.
func TestTheSameKeyUnderTwoNames(t *testing.T) {
	lapi := startLAPI(decisionRow(1, "192.0.2.1", "ban", "crowdsec"))
	defer lapi.Close()
	file := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, []byte("shared\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	byFile := pulling(lapi, "")
	byFile.LAPI.KeyFile = file
	a := open(t, pulling(lapi, "shared"))
	b := open(t, byFile)
	a.becomes("192.0.2.1", 403)
	b.becomes("192.0.2.1", 403)
	all, full, _ := lapi.pulls()
	time.Sleep(2500 * time.Millisecond)
	if all2, full2, _ := lapi.pulls(); full2-full < all2-all || all2-all < 3 {
		t.Errorf("of %d pulls, %d were full", all2-all, full2-full)
	}
	count := func() int {
		engines.mu.Lock()
		defer engines.mu.Unlock()
		return len(engines.all)
	}
	// One of them goes: it must not linger.
	a.cancel()
	for end := time.Now().Add(2 * time.Second); count() > 1 && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
	}
	if n := count(); n != 1 {
		t.Errorf("%d engines pull with one key", n)
	}
	b.is("192.0.2.1", 403)
}

// TestSettingsThatDiffer: two middlewares with one key and different intervals;
// reloads in any order must not restart the stream.
func TestSettingsThatDiffer(t *testing.T) {
	lapi := startLAPI(decisionRow(1, "192.0.2.1", "ban", "crowdsec"))
	defer lapi.Close()
	slow, quick := pulling(lapi, "differ"), pulling(lapi, "differ")
	slow.LAPI.Interval = "1h"
	a := open(t, slow)
	b := open(t, quick)
	a.becomes("192.0.2.1", 403)
	time.Sleep(settleTime + 300*time.Millisecond)
	_, before, _ := lapi.pulls()
	for i := 0; i < 4; i++ {
		a.cancel()
		b.cancel()
		if i%2 == 0 {
			b = open(t, quick)
			a = open(t, slow)
		} else {
			a = open(t, slow)
			b = open(t, quick)
		}
		time.Sleep(settleTime + 100*time.Millisecond)
	}
	if _, full, _ := lapi.pulls(); full != before {
		t.Errorf("four reloads made %d full pulls", full-before)
	}
	a.is("192.0.2.1", 403)
	b.is("192.0.2.1", 403)
}

// TestARestartForgetsNothing: after a change of settings an empty answer is as
// hard to believe as before.
func TestARestartForgetsNothing(t *testing.T) {
	lapi := startLAPI(decisionRow(1, "192.0.2.1", "ban", "crowdsec"))
	defer lapi.Close()
	config := pulling(lapi, "restart")
	config.LAPI.Interval = "1h"
	s := open(t, config)
	s.becomes("192.0.2.1", 403)
	s.cancel()
	lapi.set(false)
	s = open(t, pulling(lapi, "restart"))
	for end := time.Now().Add(settleTime + 1500*time.Millisecond); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if s.get("192.0.2.1", nil).Code != 403 {
			t.Fatal("an empty answer after a restart of the stream lifted a ban")
		}
	}
	if _, full, _ := lapi.pulls(); full < 2 {
		t.Errorf("%d full pulls: the new interval did not take effect", full)
	}
}

// TestClosedMeansClosed: a banned client may be told that nothing is known yet,
// and then that it is banned, and nothing else in between.
func TestClosedMeansClosed(t *testing.T) {
	rows := []string{decisionRow(1, "192.0.2.1", "ban", "crowdsec")}
	for i := 0; i < 3000; i++ {
		rows = append(rows, decisionRow(i+2, fmt.Sprintf("10.%d.%d.1", i/250, i%250), "ban", "lists"))
	}
	lapi := startLAPI(rows...)
	defer lapi.Close()
	config := pulling(lapi, "closed means closed")
	config.Decisions.FailClosed = true
	s := open(t, config)
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); {
		code := s.get("192.0.2.1", nil).Code
		if code == 403 {
			return
		}
		if code != 503 {
			t.Fatalf("a banned client got %d", code)
		}
	}
	t.Fatal("the ban never came")
}

func TestNewSettingsRestartTheStreamOnly(t *testing.T) {
	lapi := startLAPI(decisionRow(1, "192.0.2.1", "ban", "crowdsec"))
	defer lapi.Close()
	config := pulling(lapi, "settings")
	config.LAPI.Interval = "1h"
	s := open(t, config)
	s.becomes("192.0.2.1", 403)
	lapi.set(false, decisionRow(1, "192.0.2.1", "ban", "crowdsec"), decisionRow(2, "192.0.2.2", "ban", "crowdsec"))
	config = pulling(lapi, "settings")
	s2 := open(t, config)
	s2.is("192.0.2.1", 403)
	s2.becomes("192.0.2.2", 403)
	s.is("192.0.2.2", 403)
}

func TestAnEngineEndsAfterItsLinger(t *testing.T) {
	lapi := startLAPI()
	defer lapi.Close()
	registry := &engineRegistry{all: map[string]*engine{}, linger: 50 * time.Millisecond}
	src := source{url: lapi.URL, key: "linger", interval: 10 * time.Millisecond, timeout: time.Second, resync: time.Hour}
	log := slog.New(slog.NewTextHandler(&bytes.Buffer{}, nil))
	e := registry.acquire(src, log)
	if again := registry.acquire(src, log); again != e {
		t.Fatal("two engines for one source")
	}
	registry.release(e, src)
	registry.release(e, src)
	if again := registry.acquire(src, log); again != e {
		t.Fatal("the engine did not wait for the next user")
	}
	registry.release(e, src)
	ended := func() bool {
		registry.mu.Lock()
		defer registry.mu.Unlock()
		return len(registry.all) == 0
	}
	for end := time.Now().Add(3 * time.Second); !ended() && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
	}
	if !ended() {
		t.Fatal("the engine never ended")
	}
	time.Sleep(50 * time.Millisecond)
	before, _, _ := lapi.pulls()
	time.Sleep(100 * time.Millisecond)
	if after, _, _ := lapi.pulls(); after != before {
		t.Errorf("an ended engine pulled %d times", after-before)
	}
}

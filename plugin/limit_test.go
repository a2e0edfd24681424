package plugin

import (
	"fmt"
	"math"
	"math/big"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/time/rate"
)

// limitExact is the reference: a token bucket in whole numbers, without
// rounding. Its unit is the period'th part of a token, of which average arrive
// each nanosecond.
type limitExact struct {
	level, cost, full *big.Int
	average           int64
	at                int64
}

func newLimitExact(p limitPolicy) *limitExact {
	cost := big.NewInt(int64(p.Period))
	full := new(big.Int).Mul(cost, big.NewInt(int64(p.Burst)))
	return &limitExact{level: new(big.Int).Set(full), cost: cost, full: full, average: int64(p.Average)}
}

// after is the level when d ns have passed, not capped.
func (e *limitExact) after(d int64) *big.Int {
	grown := new(big.Int).Mul(big.NewInt(d), big.NewInt(e.average))
	return grown.Add(grown, e.level)
}

func (e *limitExact) advance(now int64) {
	e.level = e.after(now - e.at)
	if e.level.Cmp(e.full) > 0 {
		e.level.Set(e.full)
	}
	e.at = now
}

// slack is twice the rounding limitTake forgives, in units, at least one.
func (e *limitExact) slack() *big.Int {
	return big.NewInt(int64(2*limitGrain*float64(e.cost.Int64())) + 2*e.average + 1)
}

// limitCheck asks l for one request and holds the answer against both
// references: the exact bucket, and a rate.Limiter entered for each request.
func limitCheck(l *limiter, e *limitExact, naive *rate.Limiter, now int64) error {
	retry, value := limitTake(l, now, "k", "")
	e.advance(now)
	slack := e.slack()
	tokens := naive.TokensAt(time.Unix(0, now))
	if retry == 0 {
		if new(big.Int).Add(e.level, slack).Cmp(e.cost) < 0 {
			return fmt.Errorf("admitted with %s of %s units in the bucket", e.level, e.cost)
		}
		if tokens < 1-3*(1-l.need) {
			return fmt.Errorf("admitted, x/time/rate holds %v", tokens)
		}
		e.level.Sub(e.level, e.cost)
		naive.ReserveN(time.Unix(0, now), 1)
	} else {
		if e.level.Cmp(e.cost) >= 0 {
			return fmt.Errorf("refused with %s of %s units in the bucket", e.level, e.cost)
		}
		if tokens >= 1+3*(1-l.need) {
			return fmt.Errorf("refused, x/time/rate holds %v", tokens)
		}
	}

	r, t, err := limitParse(value)
	if err != nil {
		return err
	}
	// r whole tokens are there, r+1 are not.
	have := new(big.Int).Mul(big.NewInt(int64(r)), e.cost)
	next := new(big.Int).Add(have, e.cost)
	if r > 0 && new(big.Int).Add(e.level, slack).Cmp(have) < 0 || e.level.Cmp(next) >= 0 {
		return fmt.Errorf("remaining %d with %s units of %s", r, e.level, e.cost)
	}
	// They are after t seconds, and are not after t-1.
	second := int64(time.Second)
	if new(big.Int).Add(e.after(int64(t)*second), slack).Cmp(next) < 0 {
		return fmt.Errorf("reset %d is too soon at %s units of %s", t, e.level, e.cost)
	}
	if t > 1 && e.after(int64(t-1)*second).Cmp(next) >= 0 {
		return fmt.Errorf("reset %d is too late at %s units of %s", t, e.level, e.cost)
	}
	if retry != 0 && (r != 0 || retry != t) {
		return fmt.Errorf("refused with %q and Retry-After %d", value, retry)
	}
	return nil
}

// limitParse reads r and t of a RateLimit value.
func limitParse(values []string) (r, t int, err error) {
	value := values[0]
	i := strings.LastIndex(value, ";r=")
	j := strings.LastIndex(value, ";t=")
	if i < 0 || j < i {
		return 0, 0, fmt.Errorf("parse %q", value)
	}
	if r, err = strconv.Atoi(value[i+3 : j]); err != nil {
		return 0, 0, err
	}
	t, err = strconv.Atoi(value[j+3:])
	return r, t, err
}

// limitLive returns the number of buckets held.
func limitLive(l *limiter) int {
	l.mu.Lock()
	n := len(l.young) + len(l.old)
	l.mu.Unlock()
	return n
}

func limitNaive(p limitPolicy) *rate.Limiter {
	return rate.NewLimiter(rate.Limit(float64(p.Average)/p.Period.Seconds()), p.Burst)
}

var limitTestPolicies = []limitPolicy{
	{Average: 1, Period: time.Hour, Burst: 1},
	{Average: 1, Period: time.Hour, Burst: 10},
	{Average: 1, Period: 31 * 24 * time.Hour, Burst: 1000000},
	{Average: 100, Period: time.Minute, Burst: 100},
	{Average: 100, Period: time.Minute, Burst: 7},
	{Average: 7, Period: 11 * time.Second, Burst: 13},
	{Average: 3, Period: time.Second, Burst: 5},
	{Average: 1, Period: time.Second, Burst: 1},
	{Average: 10, Period: time.Second, Burst: 50},
	{Average: 999983, Period: time.Second, Burst: 50},
	{Average: 1000000, Period: time.Second, Burst: 1},
	{Average: 1000000, Period: time.Second, Burst: 2000},
	{Average: 1000000, Period: time.Second, Burst: 1000000},
	{Average: 1, Period: time.Microsecond, Burst: 3},
}

// limitGap draws the time to the next request: the clock stands still, ticks,
// runs at about the rate, hits a token's arrival to the nanosecond, rests.
func limitGap(rnd *rand.Rand, p limitPolicy, mode int) int64 {
	token := int64(p.Period) / int64(p.Average)
	switch mode {
	case 0:
		return 0
	case 1:
		return rnd.Int64N(1000000)
	case 2:
		return rnd.Int64N(2*token + 1)
	case 3:
		return token * rnd.Int64N(3)
	case 4:
		return token + rnd.Int64N(3) - 1
	case 5:
		return int64(math.Min(float64(token)*float64(p.Burst)*rnd.Float64()*1.5, 1e16))
	case 6:
		return int64(time.Second) * rnd.Int64N(5)
	}
	return rnd.Int64N(int64(240 * time.Hour))
}

func TestLimitEqualsReference(t *testing.T) {
	for _, p := range limitTestPolicies {
		p.Name = "n"
		t.Run(fmt.Sprintf("%d per %s burst %d", p.Average, p.Period, p.Burst), func(t *testing.T) {
			if err := p.check(); err != nil {
				t.Fatal(err)
			}
			for seed := uint64(1); seed <= 8; seed++ {
				rnd := rand.New(rand.NewPCG(seed, 0))
				l, e, naive := newLimiter(p), newLimitExact(p), limitNaive(p)
				now := int64(0)
				mode := 0
				for step := 0; step < 400; step++ {
					if rnd.IntN(30) == 0 {
						mode = rnd.IntN(8)
					}
					now += limitGap(rnd, p, mode)
					if now > math.MaxInt64/4 {
						break
					}
					if err := limitCheck(l, e, naive, now); err != nil {
						t.Fatalf("seed %d step %d at %d: %v", seed, step, now, err)
					}
				}
			}
		})
	}
}

// A client that hammers for long passes through many leases: what it gets in
// any window is bounded, and not a token is lost on the way.
func TestLimitAdmitsRateInAnyWindow(t *testing.T) {
	p := limitPolicy{Name: "n", Average: 7, Period: time.Second, Burst: 10}
	l := newLimiter(p)
	perNs := float64(p.Average) / float64(p.Period)
	least := math.Inf(1) // over earlier admissions i: i - rate*t(i)
	admitted := 0
	const gap, steps = int64(13 * time.Millisecond), 20000
	for i := 0; i < steps; i++ {
		now := int64(i) * gap
		if retry, _ := limitTake(l, now, "k", ""); retry != 0 {
			continue
		}
		x := float64(admitted) - perNs*float64(now)
		least = math.Min(least, x)
		admitted++
		if x+1-least > float64(p.Burst)+1e-6 {
			t.Fatalf("at %d ns a window admits %v over its rate", now, x+1-least)
		}
	}
	want := float64(p.Burst) + perNs*float64((steps-1)*gap)
	if float64(admitted) < want-1 || float64(admitted) > want {
		t.Errorf("admitted %d of %v due", admitted, want)
	}
}

// Traefik's own limiter lets this client pass 800 times in 17 s: it forgets a
// bucket after 2 s and starts it full.
func TestLimitDoesNotRestartAfterIdleSeconds(t *testing.T) {
	l := newLimiter(limitPolicy{Name: "n", Average: 100, Period: time.Minute, Burst: 100})
	admitted := 0
	for now := int64(0); now <= int64(17*time.Second); now += int64(2400 * time.Millisecond) {
		for i := 0; i < 100; i++ {
			if retry, _ := limitTake(l, now, "k", ""); retry == 0 {
				admitted++
			}
		}
	}
	// The last round is at 16.8 s, by which 28 tokens have come back.
	if admitted != 128 {
		t.Errorf("admitted %d in 17 s, want 128", admitted)
	}
}

func TestLimitBelowRateIsNeverRefused(t *testing.T) {
	for _, p := range limitTestPolicies {
		p.Name = "n"
		l := newLimiter(p)
		token := (int64(p.Period) + int64(p.Average) - 1) / int64(p.Average)
		now := int64(0)
		for i := 0; i < p.Burst && i < 500; i++ { // spend the burst first
			limitTake(l, now, "k", "")
		}
		for i := 0; i < 500; i++ {
			now += token
			if retry, value := limitTake(l, now, "k", ""); retry != 0 {
				t.Errorf("%+v: request %d refused, %s", p, i, value)
				break
			}
		}
	}
}

func TestLimitRetryAfterIsKept(t *testing.T) {
	for _, p := range limitTestPolicies {
		if p.Burst > 5000 {
			continue
		}
		p.Name = "n"
		l := newLimiter(p)
		now := int64(12345)
		for round := 0; round < 20; round++ {
			retry := 0
			for i := 0; retry == 0; i++ {
				if i > p.Burst+1 {
					t.Fatalf("%+v: %d admitted at one instant", p, i)
				}
				retry, _ = limitTake(l, now, "k", "")
			}
			now += int64(retry) * int64(time.Second)
			if again, value := limitTake(l, now, "k", ""); again != 0 {
				t.Errorf("%+v: refused after %d s, %s", p, retry, value)
			}
		}
	}
}

// The policy header is a promise: q requests in any w seconds always pass.
func TestLimitPolicyPromiseHolds(t *testing.T) {
	for _, p := range limitTestPolicies {
		if p.Burst > 5000 {
			continue
		}
		p.Name = "n"
		l := newLimiter(p)
		q, w := 0, int64(0)
		if _, err := fmt.Sscanf(l.policyValue, `"n";q=%d;w=%d`, &q, &w); err != nil {
			t.Fatalf("read %q: %v", l.policyValue, err)
		}
		for round := int64(0); round < 3; round++ {
			for i := 0; i < q; i++ {
				if retry, _ := limitTake(l, round*w*int64(time.Second), "k", ""); retry != 0 {
					t.Fatalf("%s: request %d of window %d refused", l.policyValue, i, round)
				}
			}
		}
	}
}

func TestLimitHeaderValues(t *testing.T) {
	for _, c := range []struct {
		policy limitPolicy
		taken  int
		wantP  string
		want   string
		retry  int
	}{
		{limitPolicy{Name: "login", Average: 100, Period: time.Minute, Burst: 100}, 1, `"login";q=100;w=60`, `"login";r=99;t=1`, 0},
		{limitPolicy{Name: "login", Average: 100, Period: time.Minute, Burst: 2}, 3, `"login";q=2;w=2`, `"login";r=0;t=1`, 1},
		{limitPolicy{Name: "slow", Average: 1, Period: time.Hour, Burst: 3}, 1, `"slow";q=3;w=10800`, `"slow";r=2;t=3600`, 0},
		{limitPolicy{Name: "slow", Average: 1, Period: time.Hour, Burst: 3}, 4, `"slow";q=3;w=10800`, `"slow";r=0;t=3600`, 3600},
		{limitPolicy{Name: "wide", Average: 50, Period: time.Second, Burst: 5000}, 1, `"wide";q=5000;w=100`, `"wide";r=4999;t=1`, 0},
		{limitPolicy{Name: "wide", Average: 1, Period: time.Minute, Burst: 5000}, 1, `"wide";q=5000;w=300000`, `"wide";r=4999;t=60`, 0},
		{limitPolicy{Name: "fast", Average: 1000000, Period: time.Second, Burst: 1}, 1, `"fast";q=1;w=1`, `"fast";r=0;t=1`, 0},
		{limitPolicy{Name: `a "b" \c`, Average: 1, Period: time.Second, Burst: 1}, 1, `"a \"b\" \\c";q=1;w=1`, `"a \"b\" \\c";r=0;t=1`, 0},
	} {
		l := newLimiter(c.policy)
		retry, value := 0, []string(nil)
		for i := 0; i < c.taken; i++ {
			retry, value = limitTake(l, 5, "k", "")
		}
		if l.policyValue != c.wantP || value[0] != c.want || retry != c.retry {
			t.Errorf("%d taken of %+v: %s, %s, retry %d; want %s, %s, %d",
				c.taken, c.policy, l.policyValue, value, retry, c.wantP, c.want, c.retry)
		}
	}
}

func TestLimitPolicyCheck(t *testing.T) {
	good := limitPolicy{Name: "n", Average: 1, Period: time.Second, Burst: 1}
	for _, c := range []struct {
		change func(p *limitPolicy)
		want   string // part of the error; "" is none
	}{
		{func(p *limitPolicy) {}, ""},
		{func(p *limitPolicy) { p.Average, p.Period = 1000, time.Millisecond }, ""},
		{func(p *limitPolicy) { p.Keys = 2; p.Members = 1 }, ""},
		{func(p *limitPolicy) { p.Name = "" }, "name is empty"},
		{func(p *limitPolicy) { p.Name = "é" }, "not printable ASCII"},
		{func(p *limitPolicy) { p.Name = "a\nb" }, "not printable ASCII"},
		{func(p *limitPolicy) { p.Average = 0 }, "average 0"},
		{func(p *limitPolicy) { p.Average = -3 }, "average -3"},
		{func(p *limitPolicy) { p.Average = 1001; p.Period = time.Millisecond }, "more than 1000000 per second"},
		{func(p *limitPolicy) { p.Period = 0 }, "period 0s"},
		{func(p *limitPolicy) { p.Period = 32 * 24 * time.Hour }, "period 768h"},
		{func(p *limitPolicy) { p.Burst = 0 }, "burst 0"},
		{func(p *limitPolicy) { p.Burst = 1000001 }, "burst 1000001"},
		{func(p *limitPolicy) { p.Keys = 1 }, "maxKeys 1"},
		{func(p *limitPolicy) { p.Members = -1 }, "members -1"},
	} {
		p := good
		c.change(&p)
		err := p.check()
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("check %+v: %v, want %q", p, err, c.want)
		}
	}
}

func TestLimitOvertakenTimes(t *testing.T) {
	l := newLimiter(limitPolicy{Name: "n", Average: 1000, Period: time.Second, Burst: 3})
	now := int64(time.Hour)
	for i, at := range []int64{now, now - 900, now - int64(time.Second)} {
		if retry, _ := limitTake(l, at, "k", ""); retry != 0 {
			t.Errorf("request %d of a burst of 3 refused", i+1)
		}
	}
	for _, at := range []int64{now, now - int64(time.Minute), now + 1} {
		if retry, value := limitTake(l, at, "k", ""); retry == 0 || !strings.HasPrefix(value[0], `"n";r=0;t=`) {
			t.Errorf("request after the burst: retry %d, %s", retry, value)
		}
	}
	if retry, _ := limitTake(l, now+int64(time.Millisecond), "k", ""); retry != 0 {
		t.Error("refused though a token arrived")
	}
}

// TestLimitLateCallers: every other caller hands in a time that is 5 ms old, as
// goroutines that read the clock and then wait for the lock do.
func TestLimitLateCallers(t *testing.T) {
	for _, burst := range []int{1, 2, 10} {
		l := newLimiter(limitPolicy{Name: "n", Average: 100, Period: time.Second, Burst: burst})
		admitted := 0
		const step, total = int64(time.Millisecond), int64(10 * time.Second)
		for now := int64(time.Hour); now < int64(time.Hour)+total; now += step {
			for _, at := range []int64{now, now - 5*step} {
				if retry, _ := limitTake(l, at, "k", ""); retry == 0 {
					admitted++
				}
			}
		}
		if due := 1000 + burst; admitted > due || admitted < due-burst-2 {
			t.Errorf("burst %d: %d admitted in 10 s, %d are due", burst, admitted, due)
		}
	}
}

func TestLimitConcurrentCallers(t *testing.T) {
	const callers, each, burst = 8, 400, 1000
	l := newLimiter(limitPolicy{Name: "n", Average: 1, Period: time.Hour, Burst: burst})
	epoch := time.Now()
	var mu sync.Mutex
	var wg sync.WaitGroup
	admitted := map[string]int{}
	for c := 0; c < callers; c++ {
		wg.Add(1)
		go func() {
			defer wg.Done()
			mine := map[string]int{}
			for i := 0; i < each; i++ {
				key := "k" + strconv.Itoa(i%2)
				if retry, _ := limitTake(l, int64(time.Since(epoch)), key, ""); retry == 0 {
					mine[key]++
				}
			}
			mu.Lock()
			for key, n := range mine {
				admitted[key] += n
			}
			mu.Unlock()
		}()
	}
	wg.Wait()
	for _, key := range []string{"k0", "k1"} {
		if admitted[key] != burst {
			t.Errorf("%s: admitted %d of %d, want %d", key, admitted[key], callers*each/2, burst)
		}
	}
}

func TestLimitTableIsBounded(t *testing.T) {
	const keys = 64
	l := newLimiter(limitPolicy{Name: "n", Average: 1, Period: time.Hour, Burst: 2, Keys: keys})
	limitTake(l, 0, "held", "")
	limitTake(l, 0, "held", "")
	for i := 0; i < 50*keys; i++ {
		limitTake(l, int64(i), "flood"+strconv.Itoa(i), "")
		if n := limitLive(l); n > keys {
			t.Fatalf("%d buckets, want at most %d", n, keys)
		}
		// A key that keeps coming stays, however many pass by.
		if i%(keys/2-1) == 0 {
			if retry, _ := limitTake(l, int64(i), "held", ""); retry == 0 {
				t.Fatalf("evicted after %d other keys", keys/2-1)
			}
		}
	}
}

func TestLimitTurnsLoseNothingWhenIdle(t *testing.T) {
	// 10 s to fill, so the table turns once a minute.
	l := newLimiter(limitPolicy{Name: "n", Average: 1, Period: time.Second, Burst: 10})
	now := int64(0)
	for i := 0; i < 200; i++ {
		limitTake(l, now, "idle"+strconv.Itoa(i), "")
	}
	for minute := 0; minute < 3; minute++ {
		now += limitMinTurn
		limitTake(l, now, "k"+strconv.Itoa(minute), "")
	}
	if n := limitLive(l); n > 3 {
		t.Errorf("%d buckets after minutes of rest, want at most 3", n)
	}

	// An hour to fill: a bucket must outlive the minute.
	l = newLimiter(limitPolicy{Name: "n", Average: 1, Period: time.Hour, Burst: 1})
	limitTake(l, 0, "k", "")
	for now = limitMinTurn; now < int64(time.Hour); now += limitMinTurn {
		limitTake(l, now, "other"+strconv.Itoa(int(now/limitMinTurn)), "")
	}
	if retry, _ := limitTake(l, int64(time.Hour)-int64(time.Second), "k", ""); retry != 1 {
		t.Errorf("retry %d a second before the token, want 1", retry)
	}
}

func TestLimitAggregateShares(t *testing.T) {
	const members = 16
	p := limitPolicy{Name: "n", Average: 1, Period: time.Hour, Burst: 3, Keys: 1000, Members: members}
	l := newLimiter(p)
	admitted := 0
	for i := 0; i < 5000; i++ {
		key := fmt.Sprintf("2001:db8:1:%x::/64", i)
		if retry, _ := limitTake(l, int64(i), key, "2001:db8:1::/48"); retry == 0 {
			admitted++
		}
	}
	// One request for each of the members, and the burst of the shared bucket.
	if admitted != members+p.Burst {
		t.Errorf("the prefix had %d requests, want %d", admitted, members+p.Burst)
	}
	if n := limitLive(l); n != members+1 {
		t.Errorf("%d buckets, want %d", n, members+1)
	}
	for _, c := range []struct {
		key, aggregate string
		pass           bool
		why            string
	}{
		{"2001:db8:1:3::/64", "2001:db8:1::/48", true, "a member keeps its own bucket"},
		{"2001:db8:2:3::/64", "2001:db8:2::/48", true, "another prefix is not touched"},
		{"192.0.2.1", "", true, "no aggregate"},
		{"2001:db8:1::/48", "", true, "a key cannot name the shared bucket"},
		{"2001:db8:1:ffff::/64", "2001:db8:1::/48", false, "one more member shares the empty bucket"},
	} {
		if retry, _ := limitTake(l, 5000, c.key, c.aggregate); (retry == 0) != c.pass {
			t.Errorf("%s: retry %d", c.why, retry)
		}
	}

	// The flood over and its members full again, the prefix is as any other. Its
	// /64s kept missing, so the table kept turning.
	now := int64(0)
	for i := 1; i <= 4; i++ {
		now = int64(i) * int64(3*time.Hour+time.Minute)
		limitTake(l, now, "2001:db8:1:ffff::/64", "2001:db8:1::/48")
	}
	for i := 0; i < 3; i++ {
		if retry, _ := limitTake(l, now, "2001:db8:1:aaaa::/64", "2001:db8:1::/48"); retry != 0 {
			t.Error("refused after the flood")
		}
	}
}

// A member that moves between the generations is counted once.
func TestLimitAggregateCountsMembersOnce(t *testing.T) {
	l := newLimiter(limitPolicy{Name: "n", Average: 1, Period: time.Second, Burst: 1, Members: 2})
	limitTake(l, 0, "a", "group")
	for i := int64(1); i <= 5; i++ {
		limitTake(l, i*limitMinTurn, "turn"+strconv.Itoa(int(i)), "") // a is old now
		limitTake(l, i*limitMinTurn, "a", "group")
	}
	limitTake(l, 5*limitMinTurn, "b", "group")
	if retry, _ := limitTake(l, 5*limitMinTurn, "c", "group"); retry != 0 {
		t.Error("the third member does not find the shared bucket full: the second was sent there")
	}
}

func TestLimitLongKeys(t *testing.T) {
	l := newLimiter(limitPolicy{Name: "n", Average: 1, Period: time.Hour, Burst: 1})
	long := strings.Repeat("x", 100000)
	for _, c := range []struct {
		key  string
		pass bool
	}{{long + "a", true}, {long + "b", true}, {long + "a", false}, {"", true}, {"", false}} {
		if retry, _ := limitTake(l, 0, c.key, ""); (retry == 0) != c.pass {
			t.Errorf("key of %d bytes: retry %d", len(c.key), retry)
		}
	}
	for key := range l.young {
		if len(key) > limitMaxKey {
			t.Errorf("a key of %d bytes is kept", len(key))
		}
	}
}

func TestLimitRegistry(t *testing.T) {
	r := limitRegistry{all: map[limitPolicy]*limiter{}}
	p := limitPolicy{Name: "n", Average: 1, Period: time.Hour, Burst: 1}
	same := p
	same.Keys = limitDefaultKeys
	changed := p
	changed.Burst = 2

	a := r.acquire(p, 0)
	if r.acquire(same, 0) != a {
		t.Error("equal policies do not share")
	}
	limitTake(a, 0, "k", "")
	other := r.acquire(changed, 0)
	if other == a {
		t.Error("different policies share")
	}
	if retry, _ := limitTake(other, 0, "k", ""); retry != 0 {
		t.Error("a changed policy does not start full")
	}

	// A reload: the old handlers end first.
	r.release(a, 10)
	r.release(a, 20)
	if r.acquire(p, 30) != a {
		t.Error("a reload forgets the buckets")
	}
	r.release(a, 40)
	r.release(other, 40)
	if len(r.all) != 2 {
		t.Errorf("%d limiters linger, want 2", len(r.all))
	}
	b := r.acquire(p, 40+limitLinger)
	if b == a || len(r.all) != 1 {
		t.Errorf("a limiter unused for %s is kept", time.Duration(limitLinger))
	}
}

// BenchmarkLimitTake is limitTake over addresses that each come now and then.
func BenchmarkLimitTake(b *testing.B) {
	for _, n := range []int{1, 1000, 20000} {
		keys := make([]string, n)
		for i := range keys {
			keys[i] = fmt.Sprintf("10.0.%d.%d", i>>8, i&255)
		}
		b.Run("lease-"+strconv.Itoa(n), func(b *testing.B) {
			l := newLimiter(limitPolicy{Name: "n", Average: 100, Period: time.Second, Burst: 100})
			epoch := time.Now()
			b.ReportAllocs()
			for i := 0; i < b.N; i++ {
				limitTake(l, int64(time.Since(epoch)), keys[i%n], "")
			}
		})
		b.Run("naive-"+strconv.Itoa(n), func(b *testing.B) {
			var mu sync.Mutex
			all := map[string]*rate.Limiter{}
			b.ReportAllocs()
			for i := 0; i < b.N; i++ {
				mu.Lock()
				l := all[keys[i%n]]
				if l == nil {
					l = rate.NewLimiter(100, 100)
					all[keys[i%n]] = l
				}
				mu.Unlock()
				l.Allow()
			}
		})
	}
}

package plugin

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// The rate limiter: named token buckets, one per key, in a bounded table.
//
// The bucket is the one of golang.org/x/time/rate. That package is interpreted
// along with this one, and one call costs more than all the rest of a request;
// so a bucket LEASES burst tokens from its rate.Limiter at a time and hands
// them out itself. That is exact, not approximate:
//
//	level(t) = left + rate*(t-empty)
//
// is the true bucket: what is left of the lease, plus what the rate.Limiter
// holds, which grows in a straight line through zero at the time empty (before
// it, the lease reaches into the future and the limiter is in debt). A request
// passes if level(t) >= 1, and takes one from left. Two things end a line:
//
//   - It reaches burst: the true bucket is full, and a full bucket is a new
//     rate.Limiter by definition. All of it is leased at once, so left = burst
//     and empty = now. No call is needed: that Limiter is made when asked.
//   - left is used up: the rate.Limiter, which was charged the whole lease when
//     the line began and has not overflowed since, holds the level. It is read,
//     the next burst is reserved from it, and a new line begins.
//
// Nothing accumulates along a line, so rounding does not either. The greediest
// client enters rate once per burst requests, and one whose bucket fills up in
// between, which is nearly everyone, never.
//
// All times are nanoseconds of one monotonic clock, handed in by the caller.
// The hot path is functions, not methods, and the rare cases have functions of
// their own: interpreted, a method call costs three times a function call, and
// each expression of a body costs an allocation per call, run or not.

const (
	// limitGrain is the rounding forgiven, in tokens: a level this much short of
	// a token, or what arrives in one more nanosecond, counts as that token. It
	// is ten times what floats lose at the largest burst. It is forgiven, not
	// given: the level is lower by as much afterwards, so no window ever admits
	// more than burst + rate*(window + 1 ns) + limitGrain.
	limitGrain = 1e-8

	limitMaxCount  = 1000000 // average, burst, keys, and average per second
	limitMaxPeriod = 31 * 24 * time.Hour
	limitMaxKey    = 64   // bytes; longer keys are hashed
	limitMaxTable  = 1024 // prepared values of the RateLimit header

	limitDefaultKeys    = 65536
	limitDefaultMembers = 256

	// limitMinTurn is the least time, in ns, between two turns of the table that
	// no shortage of room forces.
	limitMinTurn = int64(time.Minute)
)

// limitPolicy is what an operator writes. It is comparable: limiters are shared
// by equal policies.
type limitPolicy struct {
	Name    string        // printable ASCII, shown to clients
	Average int           // requests per Period, sustained
	Period  time.Duration // up to 31 days
	Burst   int           // requests at once, after a rest; 1 or more
	Keys    int           // table bound; 0 means 65,536
	Members int           // keys of one aggregate before they share; 0 means 256
}

// check returns all that is wrong with p, or nil.
func (p limitPolicy) check() error {
	var errs []error
	if p.Name == "" {
		errs = append(errs, errors.New("name is empty"))
	}
	for i := 0; i < len(p.Name); i++ {
		if p.Name[i] < 0x20 || p.Name[i] > 0x7e {
			errs = append(errs, fmt.Errorf("name %q is not printable ASCII", p.Name))
			break
		}
	}
	if p.Average < 1 || p.Average > limitMaxCount {
		errs = append(errs, fmt.Errorf("average %d is not within 1 and %d", p.Average, limitMaxCount))
	}
	if p.Period <= 0 || p.Period > limitMaxPeriod {
		errs = append(errs, fmt.Errorf("period %s is not within 1ns and %s", p.Period, limitMaxPeriod))
	} else if float64(p.Average) > limitMaxCount*p.Period.Seconds() {
		errs = append(errs, fmt.Errorf("average %d per %s is more than %d per second", p.Average, p.Period, limitMaxCount))
	}
	if p.Burst < 1 || p.Burst > limitMaxCount {
		errs = append(errs, fmt.Errorf("burst %d is not within 1 and %d", p.Burst, limitMaxCount))
	}
	if p.Keys != 0 && (p.Keys < 2 || p.Keys > limitMaxCount) {
		errs = append(errs, fmt.Errorf("maxKeys %d is not within 2 and %d", p.Keys, limitMaxCount))
	}
	if p.Members < 0 || p.Members > limitMaxCount {
		errs = append(errs, fmt.Errorf("members %d is not within 1 and %d", p.Members, limitMaxCount))
	}
	return errors.Join(errs...)
}

// withDefaults makes policies that mean the same equal.
func (p limitPolicy) withDefaults() limitPolicy {
	if p.Keys == 0 {
		p.Keys = limitDefaultKeys
	}
	if p.Members == 0 {
		p.Members = limitDefaultMembers
	}
	return p
}

// limitBucket is one key's bucket, see level(t) above.
type limitBucket struct {
	left   float64       // tokens of the lease not yet handed out, a whole number
	empty  int64         // when ledger holds nothing, ns
	ledger *rate.Limiter // nil: a new one, all of it leased at time empty
	since  int64         // when ledger was last entered, ns
	group  string        // aggregate it is counted under, or ""
}

// limiter applies one policy. It is safe for concurrent use; limitTake holds
// its mutex for a map lookup and some arithmetic.
//
// The table has two generations. A request moves its bucket to the young one;
// when that holds half the bound, it becomes the old one, and the old one is
// dropped: the table turns. So at most Keys buckets exist, and one is evicted
// only after Keys/2 other keys came since its last request. An evicted bucket
// is full when its key returns. A flood can thus hand out at most one extra
// burst per victim for each Keys/2 keys it brings, each of which was due a
// burst of its own. The table also turns when a key is missed and the last turn
// is as long ago as a bucket takes to fill: all that is dropped then is full,
// and nothing is lost.
type limiter struct {
	ratio  float64 // tokens per ns
	burst  float64
	need   float64 // one token, less the rounding forgiven
	wait   float64 // seconds per token
	tokens int     // burst
	limit  rate.Limit

	policyValue string     // RateLimit-Policy field value
	prefix      string     // `"name";r=`
	values      [][]string // RateLimit field values by r, up to t
	table       float64    // len(values) if they are whole, since t is always 1, else 0

	half    int   // keys in a generation
	members int   // keys in an aggregate
	fill    int64 // ns between turns that lose nothing

	mu        sync.Mutex
	young     map[string]*limitBucket
	old       map[string]*limitBucket
	youngSize map[string]int // live keys by aggregate
	oldSize   map[string]int
	turned    int64

	// The registry's.
	policy limitPolicy
	users  int
	idle   int64
}

// newLimiter prepares a limiter for a policy that passed check.
func newLimiter(p limitPolicy) *limiter {
	p = p.withDefaults()
	l := &limiter{
		ratio:     float64(p.Average) / float64(p.Period),
		burst:     float64(p.Burst),
		wait:      p.Period.Seconds() / float64(p.Average),
		tokens:    p.Burst,
		limit:     rate.Limit(float64(p.Average) / p.Period.Seconds()),
		half:      p.Keys / 2,
		members:   p.Members,
		young:     map[string]*limitBucket{},
		old:       map[string]*limitBucket{},
		youngSize: map[string]int{},
		oldSize:   map[string]int{},
		policy:    p,
	}
	l.need = 1 - limitGrain - l.ratio
	l.fill = int64(math.Min(l.burst/l.ratio, math.MaxInt64/2)) + 1
	if l.fill < limitMinTurn {
		l.fill = limitMinTurn
	}
	limitRender(l, p)
	return l
}

// limitTake asks for one request of key at time now. It returns 0 if the
// request may pass, else the seconds to wait for the Retry-After header, at
// least 1: a client that rests so long is admitted, one that comes back more
// than a second sooner is not. value is the RateLimit header's, see limitValue.
//
// aggregate names the group whose keys share their fate, such as the /48 of an
// IPv6 /64, or the client's prefix if key is a header value, which it chooses
// freely. While policy.Members keys of a group are live, further ones share one
// bucket. Empty means none.
//
// Racing callers may hand in times slightly out of order; the decision is then
// the one due at the later time, or at most that much stricter.
func limitTake(l *limiter, now int64, key, aggregate string) (retryAfter int, value []string) {
	l.mu.Lock()
	b := l.young[key]
	if b == nil {
		b = limitFind(l, now, key, aggregate)
	}
	level := b.left + float64(now-b.empty)*l.ratio
	if level >= l.burst {
		level = l.burst
		b.left = level
		b.empty = now
		b.ledger = nil
	} else if b.left < 1 || level < l.need {
		return limitTakeLocked(l, b, now, level)
	}
	b.left--
	l.mu.Unlock()
	level -= l.need
	if level < l.table {
		return 0, l.values[int(level)]
	}
	return 0, limitValue(l, level)
}

// limitTakeLocked is the rest of limitTake for a bucket without a token or
// without a lease. It unlocks l.
func limitTakeLocked(l *limiter, b *limitBucket, now int64, level float64) (retryAfter int, value []string) {
	if b.left < 1 {
		level = limitRenew(l, b, now)
	} else if b.ledger == nil && now < b.empty {
		level = b.left // a line that began full never held less: now was overtaken
	}
	level -= l.need
	if level >= 0 {
		b.left--
		l.mu.Unlock()
		return 0, limitValue(l, level)
	}
	l.mu.Unlock()
	retryAfter = int(math.Ceil(-level * l.wait))
	return retryAfter, []string{l.prefix + "0;t=" + strconv.Itoa(retryAfter)}
}

// limitRenew begins a new line at time now: it reads the level from the ledger
// and leases the next burst. It is called when the lease is used up.
func limitRenew(l *limiter, b *limitBucket, now int64) float64 {
	if b.ledger == nil {
		b.ledger = rate.NewLimiter(l.limit, l.tokens)
		b.ledger.AllowN(time.Unix(0, b.empty), l.tokens)
		b.since = b.empty
	}
	// A rate.Limiter that is entered with an earlier time than before counts the
	// time between twice.
	if now < b.since {
		now = b.since
	}
	b.since = now
	t := time.Unix(0, now)
	level := b.ledger.TokensAt(t)
	b.ledger.ReserveN(t, l.tokens)
	b.left = l.burst
	b.empty = now + int64(math.Round((l.burst-level)/l.ratio))
	return level
}

// limitValue returns the RateLimit field value at a level, in the terms of
// draft-ietf-httpapi-ratelimit-headers: "name";r=REMAINING;t=SECONDS. r is the
// number of requests that would pass at once. t is the draft's effective
// window, the time within which the client can use no more than r: the seconds,
// rounded up, until r has grown by one if the client rests. At r=0 it equals
// Retry-After, as the draft wants it.
func limitValue(l *limiter, level float64) []string {
	r := int(level)
	if level < l.table {
		return l.values[r]
	}
	t := strconv.Itoa(int(math.Ceil((float64(r+1) - level) * l.wait)))
	if r < len(l.values) {
		return []string{l.values[r][0] + t}
	}
	return []string{l.prefix + strconv.Itoa(r) + ";t=" + t}
}

// limitRender prepares the header values.
//
// RateLimit-Policy is "name";q=BURST;w=SECONDS. A token bucket has no window,
// so the pair is chosen to be a promise that holds: a client that makes no more
// than q requests in any w seconds is never refused. That is so when w is the
// time an empty bucket takes to fill (rounded up, it errs to the safe side).
// Average per period would be no such promise: with a smaller burst, a client
// that trusted it would be refused.
func limitRender(l *limiter, p limitPolicy) {
	name := `"` + strings.ReplaceAll(strings.ReplaceAll(p.Name, `\`, `\\`), `"`, `\"`) + `"`
	window := int64(math.Ceil(float64(p.Burst) * float64(p.Period) / float64(p.Average) / 1e9))
	l.policyValue = name + ";q=" + strconv.Itoa(p.Burst) + ";w=" + strconv.FormatInt(window, 10)
	l.prefix = name + ";r="
	tail := ";t="
	if l.wait <= 1 {
		tail = ";t=1"
	}
	for r := 0; r < p.Burst && r < limitMaxTable; r++ {
		l.values = append(l.values, []string{l.prefix + strconv.Itoa(r) + tail})
	}
	if l.wait <= 1 {
		l.table = float64(len(l.values))
	}
}

// limitFind brings the bucket of a key that is not in the young generation into
// it: from the old one, or anew and full, or the one its aggregate shares. Long
// keys always come here, since the table knows them by their hash.
func limitFind(l *limiter, now int64, key, aggregate string) *limitBucket {
	if len(key) > limitMaxKey {
		key = limitHash(key)
		if b := l.young[key]; b != nil {
			return b
		}
	}
	b := limitLeave(l, key)
	if len(l.young) >= l.half || now-l.turned >= l.fill {
		l.old = l.young
		l.oldSize = l.youngSize
		l.young = map[string]*limitBucket{}
		l.youngSize = map[string]int{}
		l.turned = now
	}
	if b == nil && aggregate != "" && l.youngSize[aggregate]+l.oldSize[aggregate] >= l.members {
		// No prefix and no header value can name this key: it holds a NUL.
		key = "\x00" + aggregate
		aggregate = ""
		if b = l.young[key]; b != nil {
			return b
		}
		b = limitLeave(l, key)
	}
	// The key may be a piece of a long string (all headers of a request are one):
	// only copies go into the table.
	if b == nil {
		b = &limitBucket{left: l.burst, empty: now, group: strings.Clone(aggregate)}
	}
	l.young[strings.Clone(key)] = b
	if b.group != "" {
		l.youngSize[b.group]++
	}
	return b
}

// limitLeave takes the bucket of key out of the old generation; nil if it is not there.
func limitLeave(l *limiter, key string) *limitBucket {
	b := l.old[key]
	if b != nil {
		delete(l.old, key)
		if b.group != "" {
			l.oldSize[b.group]--
		}
	}
	return b
}

// limitHash bounds the length of a key. It is cryptographic because clients
// choose keys: no two they can find share a bucket.
func limitHash(key string) string {
	sum := sha256.Sum256([]byte(key))
	return "\x00#" + string(sum[:])
}

package plugin

import "sync"

// limitLinger is how long a limiter nobody uses is kept, in ns. A reload ends
// the old handlers before it builds the new ones, so without it every reload
// would forget every bucket.
const limitLinger = int64(60e9)

// limiters holds the limiters of the process. It is a package variable because
// that is what outlives a reload: the plugin is interpreted once per process,
// its middlewares are built anew for each router and each reload.
var limiters = limitRegistry{all: map[limitPolicy]*limiter{}}

// limitRegistry shares one limiter between all users of equal policies: same
// name, same settings. A policy whose settings changed is another policy: its
// buckets start full, and those of the old one end with it.
type limitRegistry struct {
	mu  sync.Mutex
	all map[limitPolicy]*limiter
}

// acquire returns the limiter of a policy that passed check. Each acquire is
// paired with one release. now is on the clock of limitTake.
func (r *limitRegistry) acquire(p limitPolicy, now int64) *limiter {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sweep(now)
	p = p.withDefaults()
	l := r.all[p]
	if l == nil {
		l = newLimiter(p)
		r.all[p] = l
	}
	l.users++
	return l
}

// release gives l back. Its buckets are kept for limitLinger after the last
// user is gone and then freed by the next acquire or release.
func (r *limitRegistry) release(l *limiter, now int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l.users--
	l.idle = now
	r.sweep(now)
}

func (r *limitRegistry) sweep(now int64) {
	for p, l := range r.all {
		if l.users == 0 && now-l.idle >= limitLinger {
			delete(r.all, p)
		}
	}
}

package api

import (
	"fmt"
	"reflect"
	"slices"
	"time"
)

// Two instances with one owner and different wishes would undo each other's
// records for ever: each takes what the other made for its own. Nothing in DNS
// could tell which of them is right, so both yield. What was written once under a
// wish has to be written again only where somebody changed it since; who finds
// that more than twice leaves the host as it is for a while, and says so.
const (
	patience   = 3 // writes of a host under one wish that are made at once
	firstHold  = time.Hour
	longestOne = 24 * time.Hour
	// forgotten is after how long a write counts no more.
	forgotten = 48 * time.Hour
)

// fight is what was written of a host under the present wish.
type fight struct {
	times       int
	last, until time.Time
}

// wish notes what is wished, and forgets the fights over another wish. The caller
// holds mu.
func (k *Keeper) wish(d Desired) {
	if !reflect.DeepEqual(k.settings.Desired, d) {
		clear(k.fights)
	}
}

// wrote notes that a host was written.
func (k *Keeper) wrote(host string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := k.client.now()
	f := k.fights[host]
	if f == nil || now.Sub(f.last) > forgotten {
		f = &fight{}
		k.fights[host] = f
	}
	f.times++
	f.last = now
	if f.times >= patience {
		f.until = now.Add(min(firstHold<<min(f.times-patience, 8), longestOne))
	}
}

// yield takes out the writes of hosts that somebody else changes again and again.
func (k *Keeper) yield(c Changes, owner string) Changes {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := k.client.now()
	for host, f := range k.fights {
		ours := func(w Write) bool { return w.Host == host }
		if !f.until.After(now) || !slices.ContainsFunc(c.Writes, ours) {
			continue
		}
		c.Writes = slices.DeleteFunc(c.Writes, ours)
		for i := range c.Hosts {
			if c.Hosts[i].Host == host {
				c.Hosts[i].State = Conflict
				c.Hosts[i].Says = fmt.Sprintf("was written %d times, and changed by others each time: if another edgeward has the owner %q and another configuration, "+
					"end it or give it an owner of its own; left as it is until %s", f.times, owner, f.until.Format(time.DateTime))
			}
		}
	}
	return c
}

package tunnel

import "time"

// A clock has two faces. LAPI says for how long a decision still holds, so ends
// are reckoned by now, which starts with the time of day and then goes by what
// time passes: a machine that learns the time of day after its start lets no
// banned visitor in because of that. The wall is what people and signatures read.
type clock struct{ now, wall func() time.Time }

func newClock() clock {
	start := time.Now()
	day := start.Round(0)
	return clock{now: func() time.Time { return day.Add(time.Since(start)) }, wall: time.Now}
}

// shown is a time of now's as the wall has it.
func (c clock) shown(t time.Time) time.Time {
	if t.IsZero() {
		return t
	}
	return t.Add(c.wall().Round(0).Sub(c.now()))
}

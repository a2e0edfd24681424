package bouncer

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/edgeward/edgeward/internal/decision"
)

type row struct {
	ID     int
	Prefix string
	Left   time.Duration
	Class  decision.Class
}

func rowsOf(t *decision.Table, now time.Time) []row {
	var out []row
	t.Each(now, func(id int, p netip.Prefix, until time.Time, c decision.Class) bool {
		out = append(out, row{id, p.String(), until.Sub(now), c})
		return true
	})
	return out
}

func filled(t testing.TB) *decision.Store {
	t.Helper()
	s := decision.NewStore()
	d := s.NewDelta(true, epoch)
	for _, r := range []decision.Row{
		{ID: 1, Scope: "Ip", Value: "203.0.113.5", Type: "ban", Origin: "crowdsec", Scenario: "ssh", Duration: "1h"},
		{ID: 2, Scope: "Ip", Value: "203.0.113.6", Type: "captcha", Origin: "lists", Scenario: "firehol", Duration: "2h"},
		{ID: 3, Scope: "Range", Value: "198.51.0.0/16", Type: "ban", Origin: "crowdsec", Scenario: "ssh", Duration: "30m"},
		{ID: 4, Scope: "Range", Value: "2001:db8::/32", Type: "ban", Origin: "CAPI", Duration: "876000h"},
		{ID: 5, Scope: "Range", Value: "::/0", Type: "ban", Origin: "cscli", Duration: time.Duration(math.MaxInt64).String()},
	} {
		d.Add(&r)
	}
	s.Apply(d, epoch)
	return s
}

func TestSnapshotBringsEverythingBack(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state", "edgeward")
	table := filled(t).Compile()
	if n, err := saveSnapshot(dir, table, epoch); n != 5 || err != nil {
		t.Fatal(n, err)
	}
	for _, c := range []struct {
		name string
		now  time.Time
		want []row
	}{
		{"at once", epoch, rowsOf(table, epoch)},
		{"after a while", epoch.Add(40 * time.Minute), rowsOf(table, epoch.Add(40*time.Minute))},
		{"before the clock is set", time.Unix(1000, 0), rowsOf(table, epoch)},
	} {
		store := decision.NewStore()
		n, written, err := loadSnapshot(dir, store, c.now)
		if err != nil || !written.Equal(epoch) || n != len(c.want) {
			t.Errorf("%s: %d rows of %v, %v", c.name, n, written, err)
		}
		got := rowsOf(store.Compile(), c.now)
		for i := range got {
			// What ends in centuries may be cut.
			if i < len(c.want) && got[i].Left > 200*365*24*time.Hour {
				got[i].Left = c.want[i].Left
			}
		}
		if d := cmp.Diff(c.want, got); d != "" {
			t.Errorf("%s: %s", c.name, d)
		}
	}
	info, err := os.Stat(filepath.Join(dir, snapshotName))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Error(info.Mode(), err)
	}
	if _, err := os.Stat(filepath.Join(dir, snapshotName+".new")); !os.IsNotExist(err) {
		t.Error("a draft is left behind")
	}
}

func TestSnapshotDamaged(t *testing.T) {
	var whole bytes.Buffer
	if _, err := writeSnapshot(&whole, filled(t).Compile(), epoch); err != nil {
		t.Fatal(err)
	}
	for i := range whole.Len() {
		flipped := bytes.Clone(whole.Bytes())
		flipped[i] ^= 1
		for name, data := range map[string][]byte{"flipped": flipped, "cut": whole.Bytes()[:i]} {
			if _, err := readSnapshot(data, decision.NewStore().NewDelta(true, epoch), epoch); !errors.Is(err, errSnapshot) {
				t.Fatalf("%s at %d: %v", name, i, err)
			}
		}
	}
	store := decision.NewStore()
	if _, _, err := loadSnapshot(t.TempDir(), store, epoch); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// FuzzSnapshot reads bodies with a right checksum, whatever they hold.
func FuzzSnapshot(f *testing.F) {
	var whole bytes.Buffer
	if _, err := writeSnapshot(&whole, filled(f).Compile(), epoch); err != nil {
		f.Fatal(err)
	}
	f.Add(whole.Bytes()[len(snapshotHead) : whole.Len()-sha256.Size])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, body []byte) {
		data := append([]byte(snapshotHead), body...)
		sum := sha256.Sum256(data)
		store := decision.NewStore()
		d := store.NewDelta(true, epoch)
		if _, err := readSnapshot(append(data, sum[:]...), d, epoch); err == nil {
			store.Apply(d, epoch)
			store.Compile().Tally(epoch)
		}
	})
}

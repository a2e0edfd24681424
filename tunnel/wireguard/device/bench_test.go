package device

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// BenchmarkReconcile measures a turn over devices in userspace. What it measures
// is what a kernel's device costs at most: it answers faster.
func BenchmarkReconcile(b *testing.B) {
	for _, n := range []int{10, 1000, 10000} {
		want := basics(b, n)
		d := mustOpen(b, Options{Want: want, Mode: Userspace})
		mustReconcile(b, d, want)
		b.Run(fmt.Sprintf("peers=%d/nothing", n), func(b *testing.B) {
			begin := processorTime(b)
			for b.Loop() {
				if c := mustReconcile(b, d, want); !c.Empty() {
					b.Fatal(c)
				}
			}
			b.ReportMetric(float64((processorTime(b)-begin).Microseconds())/1000/float64(b.N), "cpu-ms/op")
		})
		b.Run(fmt.Sprintf("peers=%d/one", n), func(b *testing.B) {
			for b.Loop() {
				want.Peers[n/2].PresharedKey = secret()
				mustReconcile(b, d, want)
			}
		})
		b.Run(fmt.Sprintf("peers=%d/upsert", n), func(b *testing.B) {
			for b.Loop() {
				want.Peers[n/2].PresharedKey = secret()
				if err := d.Upsert(want.Peers[n/2]); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(fmt.Sprintf("peers=%d/remove-add", n), func(b *testing.B) {
			for b.Loop() {
				if err := d.Remove(want.Peers[n/2].PublicKey); err != nil {
					b.Fatal(err)
				}
				if err := d.Upsert(want.Peers[n/2]); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(fmt.Sprintf("peers=%d/diff", n), func(b *testing.B) {
			have, err := d.Have()
			if err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				Diff(have, want)
			}
		})
		_ = d.Close()
	}
}

// processorTime is what this process has used so far: unlike the time that passes,
// it hardly depends on what else the machine does.
func processorTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkLoad measures how long a new device takes from nothing to all of its
// peers.
func BenchmarkLoad(b *testing.B) {
	for _, n := range []int{10, 1000, 10000} {
		b.Run(fmt.Sprintf("peers=%d", n), func(b *testing.B) {
			want := basics(b, n)
			for b.Loop() {
				d := mustOpen(b, Options{Want: want, Mode: Userspace})
				mustReconcile(b, d, want)
				b.StopTimer()
				_ = d.Close()
				b.StartTimer()
			}
		})
	}
}

// BenchmarkRestart measures how long one of 1,000 peers is without an answer when
// a gateway in userspace is killed and started again: the median of 10.
func BenchmarkRestart(b *testing.B) {
	for b.Loop() {
		gaps := restarts(b, 1000, 10)[:10]
		slices.Sort(gaps)
		b.ReportMetric(float64(gaps[len(gaps)/2].Milliseconds()), "ms-gap-median")
		b.ReportMetric(float64(gaps[len(gaps)-1].Milliseconds()), "ms-gap-max")
	}
}

// BenchmarkGuard measures what the guard adds to a batch of 128 packets, to one
// peer and each to another.
func BenchmarkGuard(b *testing.B) {
	for _, name := range []string{"one", "each"} {
		b.Run(name, func(b *testing.B) {
			s := &silentTUN{}
			g := newGuard(s)
			bufs, sizes := make([][]byte, 128), make([]int, 128)
			for i := range 1000 {
				p := somePeer(i)
				g.set(p.PublicKey, p.AllowedIPs)
				g.sessions([]wgtypes.Peer{{PublicKey: wgtypes.Key(p.PublicKey), LastHandshakeTime: time.Now().Add(time.Hour)}})
				if i < len(bufs) {
					bufs[i] = make([]byte, 200)
					to := p.AllowedIPs[0].Addr().String()
					if name == "one" && i > 0 {
						s.packets = append(s.packets, s.packets[0])
					} else {
						s.packets = append(s.packets, packet("10.66.0.1", to))
					}
				}
			}
			b.Run("with", func(b *testing.B) {
				for b.Loop() {
					_, _ = g.Read(bufs, sizes, 16)
				}
			})
			b.Run("without", func(b *testing.B) {
				for b.Loop() {
					_, _ = s.Read(bufs, sizes, 16)
				}
			})
		})
	}
}

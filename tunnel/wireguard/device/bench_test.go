package device

import (
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

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

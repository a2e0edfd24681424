package vpn_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/edgeward/edgeward/tunnel/wireguard"
)

// TestMovesInAndRotates takes over the peers of a server of wg-quick, whose devices
// go on as they are, and gives one of them new keys without a gap.
func TestMovesInAndRotates(t *testing.T) {
	w := newWorld(t)
	server, device, shared := wireguard.NewPrivateKey(), wireguard.NewPrivateKey(), wireguard.NewPresharedKey()
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(filepath.Join(w.dir, "key"), server.Reveal()+"\n")
	theirs := filepath.Join(w.dir, "wg0.conf")
	write(theirs, "[Interface]\nPrivateKey = "+server.Reveal()+"\nAddress = 10.66.0.1/24, fd66::1/64\nListenPort = 51830\nPostUp = touch "+w.dir+"/ran\n\n"+
		"# Client: Alice (0b9f)\n[Peer]\nPublicKey = "+device.Public().String()+"\nPresharedKey = "+shared.Reveal()+"\nAllowedIPs = 10.66.0.2/32, fd66::2/128\n")
	alice := &client{NS: w.outside["alice"], w: w, link: interfaceName(), addrs: []netip.Addr{netip.MustParseAddr("10.66.0.2"), netip.MustParseAddr("fd66::2")}}
	alice.conf = filepath.Join(w.dir, alice.link+".conf")
	old := "[Interface]\nPrivateKey = " + device.Reveal() + "\nAddress = 10.66.0.2/32, fd66::2/128\n[Peer]\nPublicKey = " + server.Public().String() + "\nPresharedKey = " + shared.Reveal() +
		"\nAllowedIPs = 10.66.0.0/24, 192.168.7.0/24\nEndpoint = " + endpoint + ":51830\n"
	write(alice.conf, old)

	w.start()
	if out := w.edgeward("peer", "import", theirs, "--group", "family"); !strings.Contains(out, "alice  10.66.0.2, fd66::2  family  grafana (group:family)") {
		t.Errorf("import says %s", out)
	}
	if _, err := os.Stat(filepath.Join(w.dir, "ran")); err == nil {
		t.Error("what the file would run was run")
	}
	alice.up()
	web := at("192.168.7.9:80")
	alice.reaches(web)

	// The old keys go on until the device has the new ones.
	printed := w.edgeward("peer", "rotate", "alice", "--qr", "never")
	mine := alice.transfer(web)
	w.until("the new keys wait", func() bool {
		show := w.edgeward("peer", "show", "alice")
		return strings.Contains(show, "has a new key to use") && strings.Contains(show, device.Public().String())
	})
	if running := time.Since(time.Unix(0, mine.last.Load())); running > time.Second {
		t.Errorf("a transfer by the old keys has stood still for %v", running)
	}
	change := func(text string) {
		t.Helper()
		alice.quick("down")
		write(alice.conf, text)
		alice.quick("up")
	}
	change(printed)
	began := time.Now()
	alice.reaches(web)
	t.Logf("reached by the new keys after %v", time.Since(began).Round(time.Millisecond))

	// From then on they are the only ones, and to write that down costs nothing.
	mine = alice.transfer(web)
	w.until("the gateway says so", func() bool { return !strings.Contains(w.edgeward("peer", "show", "alice"), device.Public().String()) })
	w.edgeward("peer", "rotate", "alice", "--finish")
	if plan := w.edgeward("peer", "plan"); !strings.HasPrefix(plan, "nothing changes") {
		t.Errorf("after the end of the rotation there is something left to do: %s", plan)
	}
	finished := time.Now()
	w.until("the transfer goes on", func() bool { return time.Unix(0, mine.last.Load()).After(finished.Add(300 * time.Millisecond)) })
	change(old)
	for range 3 {
		if err := alice.ping(netip.MustParseAddr("10.66.0.1")); err == nil {
			t.Fatal("the old keys still count")
		}
	}
}

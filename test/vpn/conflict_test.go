package vpn_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/edgeward/edgeward/tunnel/wireguard"
)

// TestOwnNetworks declares networks in which the gateway's machine is at home, for a
// peer and for the VPN: whoever is there goes on reaching the machine.
func TestOwnNetworks(t *testing.T) {
	w := newWorld(t)
	w.start()
	reached := func(when string) {
		t.Helper()
		for i := range 20 {
			if err := w.lan.TCP(netip.MustParseAddr("192.168.7.9"), at("192.168.7.1:22")); err != nil {
				t.Errorf("%s, try %d: the LAN and the machine: %v", when, i, err)
				return
			}
			if err := w.outside["alice"].TCP(netip.MustParseAddr("10.9.1.2"), at(endpoint+":22")); err != nil {
				t.Errorf("%s, try %d: the other network and the machine: %v", when, i, err)
				return
			}
		}
	}
	declare := func(text string) {
		t.Helper()
		w.write(text)
		if err := w.program.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
	}
	peers := "peers:\n"
	for name, rest := range map[string]string{"phone": "", "site": ", allowedIPs: [192.168.7.0/24]"} {
		peers += fmt.Sprintf("  - {name: %s, publicKey: '%s'%s}\n", name, wireguard.NewPrivateKey().Public(), rest)
	}
	declare(w.config(peers))
	w.until("one peer is let in, and the other is not", func() bool {
		states := map[string]string{}
		for _, p := range w.status().VPN.Peers {
			states[p.Name] = p.State
		}
		return states["phone"] == "live" && states["site"] == "unready"
	})
	reached("a peer has the LAN")
	if logs := w.logs.String(); !strings.Contains(logs, "192.168.7.0/24 overlaps 192.168.7.1/24, the address of lan0: take it out of peer site's allowedIPs") {
		t.Errorf("the gateway wrote\n%s", logs)
	}

	bad := strings.NewReplacer("10.66.0.1/24", "10.9.1.9/24", "10.66.0.100", "10.9.1.100").Replace(w.config(""))
	told := func() bool { return strings.Contains(w.status().Trouble, "give the VPN another network") }
	check := func(says string) {
		t.Helper()
		out, err := w.gateway.Exec(filepath.Join(programs(t), "edgeward-tunnel"), "check", "--config", w.file)
		if err != nil || !strings.Contains(out, says) {
			t.Errorf("check says %s %v, not %q", out, err, says)
		}
	}
	check("peer site cannot be let in on this machine: 192.168.7.0/24 overlaps 192.168.7.1/24, the address of lan0")
	declare(bad)
	check("10.9.1.0/24 of the VPN overlaps 10.9.1.1/30, the address of out0: give the VPN another network")
	w.until("the trouble is told", told)
	reached("the VPN has a network of the machine")
	declare(w.config(""))
	w.until("all is well", func() bool { return w.status().Trouble == "" })

	w.stop(syscall.SIGTERM)
	if err := w.cleanup(); err != nil {
		t.Fatal(err)
	}
	w.write(bad)
	w.launch()
	w.until("the trouble is told", told)
	reached("the first start")
	if tables := w.gateway.MustExec("nft", "list", "tables"); strings.Contains(tables, "edgeward_vpn") {
		t.Errorf("there are rules: %s", tables)
	}
}

// TestCommandLineBesideGateway holds that a running gateway is asked whatever its
// file has become, and that what is not for it is refused in words.
func TestCommandLineBesideGateway(t *testing.T) {
	w := newWorld(t)
	w.start()
	program := filepath.Join(programs(t), "edgeward-tunnel")
	if _, err := w.gateway.Exec(program, "why", "192.0.2.1", "--config", w.file); err == nil || !strings.Contains(err.Error(), "edgeward peer show") {
		t.Errorf("why: %v", err)
	}
	for what, text := range map[string]string{"wrong": "nonsense: 1\nsocket: " + w.dir + "/t.sock\n", "gone": ""} {
		w.write(text)
		args := []string{program, "status", "--config", w.file}
		if text == "" {
			args = append(args, "--socket", w.dir+"/t.sock")
			if err := os.Remove(w.file); err != nil {
				t.Fatal(err)
			}
		}
		out, err := w.gateway.Exec(args[0], args[1:]...)
		if !strings.Contains(out, w.link+" by userspace") || what == "wrong" && (err == nil || !strings.Contains(err.Error(), "nonsense")) {
			t.Errorf("the file is %s: %s %v", what, out, err)
		}
	}
	w.until("the trouble is told", func() bool { return strings.Contains(w.status().Trouble, w.file) })
}

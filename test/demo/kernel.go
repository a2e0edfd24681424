package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/edgeward/edgeward/bouncer"
	"github.com/edgeward/edgeward/internal/netns"
)

// steps are those in the kernel. Without a node they are left out and keep their
// numbers.
func (n *node) steps() []step {
	titles := []step{
		{"In the kernel: a ban closes every port of a node, not only the web's", n.everyPort},
		{"In the kernel: a ban of an IPv6 range", n.rangeOfSix},
		{"In the kernel: the owner stays in, even if everybody is banned", n.ownerStays},
		{"In the kernel: another program flushes the firewall", n.flush},
		{"In the kernel: the agent is killed, and started again", n.killed},
	}
	steps := make([]step, len(titles))
	if n == nil {
		return steps
	}
	for i, s := range titles {
		steps[i] = step{s.title, func(ctx context.Context) (err error) {
			if broken := n.try(func() { err = s.act(ctx) }); broken != nil {
				return broken
			}
			return err
		}}
	}
	return steps
}

func (n *node) everyPort(ctx context.Context) error {
	n.does(fmt.Sprintf("# %v is a node in a network of its own; edgeward-bouncer runs on it", node4))
	if err := n.follows(ctx); err != nil {
		return err
	}
	if err := n.answered(banned, "answered: port %d, where ssh would be", port); err != nil {
		return err
	}
	open, err := n.visitors.Dial(banned, at(banned))
	if err == nil {
		err = netns.Echo(open)
	}
	if err != nil {
		return fmt.Errorf("keep a connection open: %w", err)
	}
	defer open.Close()
	took, err := n.ban(ctx)
	if err != nil {
		return err
	}
	n.held(took, "its first packet was dropped; from the command to there")
	began := time.Now()
	if netns.Echo(open) == nil {
		return fmt.Errorf("a connection of %v that was open before the ban still works", banned)
	}
	n.held(time.Since(began), "a connection that it had open is dead; waited")
	if err := n.silence(banned, "no answer: a new one does not get through; waited"); err != nil {
		return err
	}
	if err := n.answered(guest, "answered: others do"); err != nil {
		return err
	}
	// The plugin asks LAPI at its own pace.
	for began = time.Now(); time.Since(began) < prompt; {
		a, err := n.get(ctx, trustedProxy, "/", "CF-Connecting-IP", banned.String())
		if err != nil {
			return err
		}
		if a.status == http.StatusForbidden {
			break
		}
		if err := pause(ctx, 10*time.Millisecond); err != nil {
			return err
		}
	}
	a, err := n.curl(ctx, http.StatusForbidden, trustedProxy, "", "CF-Connecting-IP", banned.String())
	if err != nil {
		return err
	}
	n.held(a.took, "403: the same decision at the ingress, if it came by a proxy")
	out, err := n.types(ctx, "edgeward-bouncer", "status")
	if err != nil {
		return err
	}
	_, counters, found := strings.Cut(out, "DROPPED")
	if !found || !strings.Contains(counters, "cscli") {
		return fmt.Errorf("status shows no dropped packet: %s", out)
	}
	n.shows("...")
	n.quotes(out[strings.LastIndex(out[:len(out)-len(counters)], "\n")+1:])
	return nil
}

// ban bans the visitor that stays banned, if that was not done yet: the steps do
// not need each other.
func (n *node) ban(ctx context.Context) (took time.Duration, err error) {
	if !n.holds {
		took, err = n.drops(ctx, banned, "decisions", "add", "--ip", banned.String(), "--duration", "4h", "--reason", "demo")
		n.holds = err == nil
	}
	return took, err
}

func (n *node) rangeOfSix(ctx context.Context) error {
	const value = "2001:db8:bad::/48"
	inside, outside := netip.MustParseAddr("2001:db8:bad:42::1"), netip.MustParseAddr("2001:db8:cafe::1")
	took, err := n.drops(ctx, inside, "decisions", "add", "--range", value, "--duration", "4h", "--reason", "demo")
	if err != nil {
		return err
	}
	n.held(took, "%v, inside, is dropped; from the command to there", inside)
	if err := n.answered(outside, "answered: outside of the range"); err != nil {
		return err
	}
	status, err := bouncer.AskStatus(ctx, n.agent.SocketPath)
	if err != nil {
		return err
	}
	if k := status.Kernel; k.Ranges6 != 1 || k.Bans6 != 0 {
		return fmt.Errorf("the kernel holds %d ranges and %d addresses of IPv6, want one range", k.Ranges6, k.Bans6)
	}
	began := time.Now()
	out, err := n.types(ctx, "edgeward-bouncer", "why", inside.String())
	if err != nil {
		return err
	}
	if !strings.Contains(out, value) || !strings.Contains(out, ": drop: ") {
		return fmt.Errorf("why does not name the range that is dropped: %s", out)
	}
	n.held(time.Since(began), "2^80 addresses are one range in the kernel")
	n.quotes(out)
	return nil
}

func (n *node) ownerStays(ctx context.Context) (err error) {
	if _, err := n.ban(ctx); err != nil {
		return err
	}
	const everybody = "0.0.0.0/0"
	n.does(fmt.Sprintf("# bouncer.yaml says protect: {addresses: [%v]}", owner))
	if err := n.cscli(ctx, "decisions", "add", "--ip", gateway4.String(), "--duration", "1m", "--reason", "demo"); err != nil {
		return err
	}
	took, err := n.drops(ctx, stranger, "decisions", "add", "--range", everybody, "--duration", "4h", "--reason", "demo")
	defer func() {
		if err != nil {
			// The other steps are not to suffer from it.
			_, end := n.lapi.Cscli(ctx, "decisions", "delete", "--range", everybody)
			err = errors.Join(err, end)
		}
	}()
	if err != nil {
		return err
	}
	n.held(took, "%v, a stranger, is dropped, after", stranger)
	if err := n.answered(owner, "answered: the owner gets in"); err != nil {
		return err
	}
	if err := n.answered(gateway4, "answered: so does the gateway, which the agent finds out"); err != nil {
		return err
	}
	out, err := n.types(ctx, "edgeward-bouncer", "status")
	if err != nil {
		return err
	}
	warnings := map[string]string{}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "warning" {
			warnings[f[1]] = line
		}
	}
	warning := warnings[gateway4.String()+"/32"]
	if warning == "" || warnings[everybody] == "" {
		return fmt.Errorf("status does not warn of the bans of everybody and the gateway: %s", out)
	}
	n.shows("...")
	n.quotes(warning)
	for _, order := range []struct {
		addr netip.Addr
		args []string
		says string
	}{
		{stranger, []string{"unban", stranger.String()}, "answered at once: what held it counts no more"},
		{banned, []string{"allow", banned.String(), "--for", "1h", "--because", "my phone"}, "answered at once: no ban stops it, for an hour"},
	} {
		if out, err = n.types(ctx, "edgeward-bouncer", order.args...); err != nil {
			return err
		}
		n.quotes(out)
		if err := n.answered(order.addr, "%s", order.says); err != nil {
			return err
		}
	}
	if out, err = n.types(ctx, "edgeward-bouncer", "allow", "--end", banned.String()); err != nil {
		return err
	}
	n.quotes(out)
	if err := n.silence(banned, "no answer: the allow has ended; waited"); err != nil {
		return err
	}
	if err := n.cscli(ctx, "decisions", "delete", "--range", everybody); err != nil {
		return err
	}
	took, err = n.returns(ctx, guest)
	if err != nil {
		return err
	}
	n.held(took, "everybody else is back, after")
	return nil
}

func (n *node) flush(ctx context.Context) error {
	if _, err := n.ban(ctx); err != nil {
		return err
	}
	status, err := bouncer.AskStatus(ctx, n.agent.SocketPath)
	if err != nil {
		return err
	}
	n.does(fmt.Sprintf("# %v sends without pause from here on", banned))
	if status.Kernel.Owner {
		blast := n.blast()
		began := time.Now()
		_, err := n.types(ctx, "on-node", "nft", "flush", "ruleset")
		if err == nil {
			_, err = n.types(ctx, "on-node", "nft", "delete", "table", "inet", "edgeward")
			const refused = "Operation not permitted"
			switch {
			case err == nil:
				err = errors.New("the kernel let another program delete the table of the agent")
			case strings.Contains(err.Error(), refused):
				n.shows("%s: the agent owns the table, and the kernel knows", refused)
				err = pause(ctx, 200*time.Millisecond)
			}
		}
		if err != nil {
			_, _, end := blast.stop()
			return errors.Join(err, end)
		}
		if err := blast.none(time.Since(began), "meanwhile"); err != nil {
			return err
		}
	} else {
		n.shows("this kernel cannot keep a table for its owner; newer ones (6.9) refuse the flush")
	}

	n.does("# the agent again with firewall.shared: true, as it is on older kernels")
	if err := n.restart(ctx, "shared: true"); err != nil {
		return err
	}
	if status, err = bouncer.AskStatus(ctx, n.agent.SocketPath); err != nil {
		return err
	}
	blast := n.blast()
	installs := status.Kernel.Installs
	began := time.Now()
	_, err = n.types(ctx, "on-node", "nft", "flush", "ruleset")
	for err == nil && (status.Kernel.Installs == installs || status.Ready != "yes") {
		if time.Since(began) > 5*time.Second {
			err = errors.New("the agent has not repaired the table for 5 s")
		} else if err = pause(ctx, time.Millisecond); err == nil {
			status, err = bouncer.AskStatus(ctx, n.agent.SocketPath)
		}
	}
	took := time.Since(began)
	if err == nil {
		err = pause(ctx, 300*time.Millisecond)
	}
	sent, passed, end := blast.stop()
	if err = errors.Join(err, end); err != nil {
		return err
	}
	if took > time.Second {
		return fmt.Errorf("the agent repaired the table after %s, want at most 1 s", spoken(took))
	}
	n.held(took, "gone, and repaired: %d of %d packets passed in between", passed, sent)
	if err := n.silence(banned, "no answer: the ban holds; waited"); err != nil {
		return err
	}
	return n.restart(ctx, "")
}

// restart ends the agent as a service would, and starts it with another
// configuration of the firewall.
func (n *node) restart(ctx context.Context, firewall string) error {
	if err := n.agent.Stop(ctx); err != nil {
		return err
	}
	if err := n.agent.Configure(n.config(firewall)); err != nil {
		return err
	}
	return n.agent.Start(ctx)
}

func (n *node) killed(ctx context.Context) error {
	if _, err := n.ban(ctx); err != nil {
		return err
	}
	blast := n.blast()
	began := time.Now()
	err := func() error {
		n.does(fmt.Sprintf("kill -9 %d    # the agent", n.agent.PID()))
		n.agent.Kill()
		out, err := n.types(ctx, "edgeward-bouncer", "status")
		if err == nil {
			return errors.New("status answers without an agent")
		}
		if !strings.Contains(out, "no agent runs") {
			return err
		}
		n.quotes(out)
		if err := n.silence(banned, "no answer: the kernel needs no agent; waited"); err != nil {
			return err
		}
		n.does("edgeward-bouncer run")
		again := time.Now()
		if err := n.agent.Start(ctx); err != nil {
			return err
		}
		n.held(time.Since(again), "a new agent holds the table, in step with LAPI, after")
		return n.answered(guest, "answered: others pass as ever")
	}()
	if err != nil {
		_, _, end := blast.stop()
		return errors.Join(err, end)
	}
	return blast.none(time.Since(began), "meanwhile")
}

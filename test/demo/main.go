// Command demo shows the gateway at work on one machine. The ingress is the real
// CrowdSec LAPI, the real Traefik with the bundled plugin, and an origin behind
// them, all on loopback. The kernel layer is the real node bouncer on the same
// LAPI, in a network namespace that is the node, with visitors in another. The
// tunnel is the real edgeward-tunnel before that Traefik; Cloudflare's edge and API
// are emulated (test/cfedge), and nothing leaves the machine. The VPN is the same
// program on the node, with a phone in a network of its own. The demo plays a
// storyboard of bans, limits, reloads and accidents, each with the command that a
// user would type, what came of it and how long it took, and then stays up to be
// played with until Ctrl-C.
//
// With -once it does not stay: it exits 0 only if every step held, and names
// those that did not. It leaves no process, no network and no file behind. Who is
// not root is given a user namespace to make the networks in; where neither is to
// be had, the kernel layer and the VPN are left out, and so is the VPN alone without
// /dev/net/tun; -once then fails after the other steps.
//
// It proves what it shows and no more: the suites under test/e2e are the proof
// of the rest. `make demo` calls it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

func main() {
	if file := os.Getenv(asPhone); file != "" {
		if err := bePhone(file); err != nil {
			fmt.Fprintln(os.Stderr, "phone:", err)
			os.Exit(1)
		}
		return
	}
	once := flag.Bool("once", false, "end after the last step, with an error if one did not hold")
	from := flag.Int("from", 1, "begin with step `N`; those in the kernel begin with 10, those of the tunnel with 15, those of the VPN with 18")
	programs := flag.String("programs", "", "`directory` of edgeward and edgeward-tunnel; without it they are built")
	flag.Parse()
	knock()
	// SIGPIPE, so that a reader of the output that goes away ends the demo
	// cleanly too.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	defer stop()
	ctx, cancel := untilOrphaned(ctx)
	defer cancel()
	if err := run(ctx, os.Stdout, *once, *from, *programs); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// run opens the gateway, plays the storyboard from a step on and, unless once,
// stays until ctx ends.
func run(ctx context.Context, out io.Writer, once bool, from int, programs string) (err error) {
	s := newStory(out)
	s.say("edgeward: starting CrowdSec's LAPI, Traefik with the plugin, a node, a tunnel\nand a VPN")
	g, err := open(ctx, s, programs)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.close()) }()

	g.introduce(once)
	steps := []step{
		{"A request goes through", g.passes},
		{"A ban, and its end", g.banAndUnban},
		{"A ban of a range", g.rangeBan},
		{"Two bans on one address, the longer one deleted", g.overlap},
		{"A ban ends by itself, even while LAPI is away", g.expiry},
		{"Headers decide who a client is only when a trusted proxy sends them", g.spoof},
		{"A rate limit: 3 logins at once, then one every 2 s", g.rateLimit},
		{"Observe mode logs what it would refuse, and refuses nothing", g.observe},
		{"Traefik reloads its configuration under load", g.reload},
	}
	steps = append(steps, g.node.steps()...)
	steps = append(steps, g.tunnel.steps()...)
	steps = append(steps, g.vpn.steps()...)
	failed := play(ctx, s, steps, from)
	if ctx.Err() != nil {
		if once {
			return errors.New("interrupted before the last step")
		}
		return nil
	}
	if once {
		if len(failed) > 0 {
			return fmt.Errorf("%d of the steps did not hold: %s", len(failed), strings.Join(failed, "; "))
		}
		if g.barred != nil {
			return fmt.Errorf("the steps in the kernel and of the VPN were not played: they need root and network namespaces: %w", g.barred)
		}
		if g.closed != nil {
			return fmt.Errorf("the steps of the VPN were not played: %w", g.closed)
		}
		s.say("\nEvery step held.")
		return nil
	}
	// A story that began later has not begun it.
	if err := g.tunnel.begin(ctx); err != nil && ctx.Err() == nil {
		s.failed(err)
	}
	g.invite(failed)
	<-ctx.Done()
	s.say("\nStopping.")
	return nil
}

// step is one scene: its title, and what is done and demanded in it; nil where it
// is left out.
type step struct {
	title string
	act   func(context.Context) error
}

// play plays every step beginning with number from, whatever became of those
// before it, and returns the titles of those that did not hold. It ends early only
// when ctx does.
func play(ctx context.Context, s *story, steps []step, from int) (failed []string) {
	for i, step := range steps {
		if i+1 < from || step.act == nil {
			continue
		}
		s.title(i+1, step.title)
		err := step.act(ctx)
		if ctx.Err() != nil {
			return failed
		}
		if err != nil {
			s.failed(err)
			failed = append(failed, fmt.Sprintf("%d (%s)", i+1, step.title))
		}
	}
	return failed
}

// untilOrphaned ends with ctx or when the parent process ends: make does not hand
// SIGTERM on, and would leave the demo behind.
func untilOrphaned(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	parent := os.Getppid()
	go func() {
		ticker := time.NewTicker(500 * time.Millisecond)
		defer ticker.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
				if os.Getppid() != parent {
					cancel()
				}
			}
		}
	}()
	return ctx, cancel
}

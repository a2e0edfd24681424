package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/edgeward/edgeward/test/benchmark/figures"
	"github.com/edgeward/edgeward/test/benchmark/stage"
	"github.com/edgeward/edgeward/test/rig"
)

// pollEvery is the time between pulls of LAPI, the same for all.
const pollEvery = time.Second

// program is a node bouncer that is measured.
type program struct {
	name    string
	binary  string
	version string
	metrics string // URL on the node
	// config writes what makes it follow the LAPI at url, and returns its
	// arguments.
	config func(dir, url, key string) ([]string, error)
}

// build compiles our own bouncer, as make build does.
func build(ctx context.Context, root, dir string) (program, error) {
	p := program{name: "edgeward-bouncer", binary: filepath.Join(dir, "edgeward-bouncer"), metrics: "http://127.0.0.1:9477/metrics", config: configureOurs}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", p.binary, "./cmd/edgeward-bouncer")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return p, fmt.Errorf("build the bouncer: %w: %s", err, out)
	}
	return p, nil
}

func configureOurs(dir, url, key string) ([]string, error) {
	path := filepath.Join(dir, "bouncer.yaml")
	text := fmt.Sprintf("lapi: {url: %q, keyFile: %q, interval: %v}\nsocket: %q\nstateDir: %q\n",
		url, filepath.Join(dir, "key"), pollEvery, filepath.Join(dir, "bouncer.sock"), filepath.Join(dir, "state"))
	err := errors.Join(os.WriteFile(filepath.Join(dir, "key"), []byte(key), 0o600), os.WriteFile(path, []byte(text), 0o600))
	return []string{"run", "--config", path}, err
}

const peerPackage = "crowdsec-firewall-bouncer"

// fetchPeer brings the bouncer that Debian packages.
func fetchPeer(ctx context.Context) (program, error) {
	dir, version, err := rig.Debian(ctx, peerPackage)
	if err != nil {
		return program{}, err
	}
	return program{
		name: peerPackage, binary: filepath.Join(dir, "usr", "bin", peerPackage), version: version,
		metrics: "http://127.0.0.1:60601/metrics", config: configurePeer,
	}, nil
}

// configurePeer writes what Debian ships, in nftables mode, in the foreground.
func configurePeer(dir, url, key string) ([]string, error) {
	path := filepath.Join(dir, "peer.yaml")
	text := fmt.Sprintf(`mode: nftables
pid_dir: %s
update_frequency: %v
daemonize: false
log_mode: stdout
log_level: info
api_url: %s/
api_key: %s
insecure_skip_verify: false
disable_ipv6: false
deny_action: DROP
deny_log: false
supported_decisions_types: [ban]
nftables:
  ipv4: {enabled: true, set-only: false, table: crowdsec, chain: crowdsec-chain}
  ipv6: {enabled: true, set-only: false, table: crowdsec6, chain: crowdsec6-chain}
prometheus: {enabled: true, listen_addr: 127.0.0.1, listen_port: 60601}
`, dir, pollEvery, url, key)
	return []string{"-c", path}, os.WriteFile(path, []byte(text), 0o600)
}

// agent is a program that runs on a node.
type agent struct {
	world   *world
	program program
	began   time.Time
	log     string
	cmd     *exec.Cmd
	done    chan struct{}
	err     error // how it ended; read after done
	http    *http.Client
}

// start starts a program on the node; it ends with the scope.
func (w *world) start(p program, url, key string) (*agent, error) {
	dir, err := os.MkdirTemp("", "edgeward-bench-")
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	w.Scope.Cleanup(func() { os.RemoveAll(dir) })
	args, err := p.config(dir, url, key)
	if err != nil {
		return nil, fmt.Errorf("configure %s: %w", p.name, err)
	}
	a := &agent{world: w, program: p, log: filepath.Join(dir, "log"), done: make(chan struct{})}
	a.http = &http.Client{Timeout: time.Minute, Transport: &http.Transport{DialContext: w.dial, DisableCompression: true}}
	w.Scope.Cleanup(a.http.CloseIdleConnections)
	log, err := os.Create(a.log)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	a.cmd = exec.Command(p.binary, args...)
	a.cmd.Stdout, a.cmd.Stderr = log, log
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error, 1)
	a.began = time.Now()
	go func() {
		defer close(a.done)
		defer log.Close()
		// The thread that forks has to outlive the child, or it gets the
		// parent's death signal.
		entered := false
		err := w.Node.Run(func() error {
			entered = true
			err := a.cmd.Start()
			started <- err
			if err == nil {
				a.err = a.cmd.Wait()
			}
			return nil
		})
		if !entered {
			started <- err
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	w.Scope.Cleanup(func() {
		// Killing fails only where there is nothing left to kill.
		_ = a.cmd.Process.Kill()
		<-a.done
	})
	return a, nil
}

// explain adds to an error what the program logged last.
func (a *agent) explain(err error) error {
	if err == nil {
		return nil
	}
	text, _ := os.ReadFile(a.log)
	said := strings.TrimSpace(string(text))
	return fmt.Errorf("%s: %w; it logged: %s", a.program.name, err, said[max(0, len(said)-1500):])
}

func (a *agent) cpu() (time.Duration, error) { return figures.CPU(a.cmd.Process.Pid) }

// memory returns what is resident, and was at most, in bytes.
func (a *agent) memory() (resident, peak int64, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.cmd.Process.Pid))
	if err != nil {
		return 0, 0, fmt.Errorf("read the memory of %s: %w", a.program.name, err)
	}
	for line := range strings.Lines(string(text)) {
		for field, to := range map[string]*int64{"VmRSS:": &resident, "VmHWM:": &peak} {
			if rest, ok := strings.CutPrefix(line, field); ok {
				if _, err := fmt.Sscan(rest, to); err != nil {
					return 0, 0, fmt.Errorf("read the memory of %s: %w", a.program.name, err)
				}
			}
		}
	}
	return resident << 10, peak << 10, nil
}

// scrape gets the program's metrics.
func (a *agent) scrape(ctx context.Context) (string, time.Duration, error) {
	began := time.Now()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.program.metrics, nil)
	if err != nil {
		return "", 0, fmt.Errorf("scrape %s: %w", a.program.name, err)
	}
	resp, err := a.http.Do(req)
	if err != nil {
		return "", 0, fmt.Errorf("scrape %s: %w", a.program.name, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(resp.Status)
	}
	if err != nil {
		return "", 0, fmt.Errorf("scrape %s: %w", a.program.name, err)
	}
	return string(text), time.Since(began), nil
}

// idle is what a program may use in a second without being at work: a poll that
// brings nothing, and the machine's mood.
const idle = 20 * time.Millisecond

// rest waits until the program has done what it had to do, and returns the
// processor time that it has used in all; a program that never rests is left
// alone after half a minute.
func (a *agent) rest(ctx context.Context, d time.Duration) (time.Duration, error) {
	for began := time.Now(); ; {
		before, err := a.cpu()
		if err != nil {
			return 0, a.explain(err)
		}
		if err := stage.Wait(ctx, d); err != nil {
			return 0, err
		}
		after, err := a.cpu()
		if err != nil {
			return 0, a.explain(err)
		}
		if (after-before).Seconds()/d.Seconds() <= idle.Seconds() || time.Since(began) > 30*time.Second {
			return after, nil
		}
	}
}

// end asks the program to end and returns when it has.
func (a *agent) end(ctx context.Context) error {
	if err := a.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop %s: %w", a.program.name, err)
	}
	select {
	case <-a.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(20 * time.Second):
		return a.explain(errors.New("it does not end"))
	}
}

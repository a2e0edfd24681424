package rig

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/csv"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// BouncerOU is the organisational unit that a LAPI with TLS takes for a
// bouncer's client certificate. Any other is refused.
const BouncerOU = "bouncers"

// seedLife is how long a filled database is used again. Expiry is absolute in
// it, so the decisions in a copy live that much shorter than was asked.
const seedLife = 48 * time.Hour

// LAPIOptions says how a LAPI differs from the plainest one: HTTP on loopback,
// an empty database.
type LAPIOptions struct {
	// TLS serves HTTPS and takes client certificates of BouncerOU instead of
	// keys; see LAPI.PKI.
	TLS bool
	// Socket listens on a unix socket as well; see LAPI.SocketPath.
	Socket bool
	// Metrics serves CrowdSec's metrics; see LAPI.MetricsURL.
	Metrics bool
	// Chunked turns on CrowdSec's chunked decision stream.
	Chunked bool
	// Seed is in the database before LAPI starts. The filled database is kept
	// in the cache, as importing 100,000 decisions takes some 12 s; the same
	// seed starts at once the next time. Durations may come out up to two days
	// short, so let them be long (a year).
	Seed []Decision

	// oneFile keeps the database free of a write-ahead log, which LAPI does not
	// fold in when it stops: a copy of the file is then the whole database.
	oneFile bool
}

// Decision is one decision to hand to LAPI. Its origin will be cscli-import.
type Decision struct {
	Value    string        // address, prefix, country or AS number
	Scope    string        // "ip", "range", "country" or "as"; empty: told from Value
	Type     string        // remediation; empty: ban
	Duration time.Duration // from the moment of the import
	Scenario string        // empty: "test"
}

// LAPI is a running CrowdSec Local API, and nothing else of CrowdSec: no agent,
// no AppSec, no central API.
type LAPI struct {
	*process

	URL        string // http://127.0.0.1:PORT, or https://
	SocketPath string // set when asked for
	MetricsURL string // of /metrics, when asked for
	Dir        string // configuration, database and log
	PKI        *PKI   // authority behind the certificates, when TLS was asked for

	cscli  string
	client *http.Client
}

// StartLAPI starts a LAPI and returns when it answers. ctx bounds its life;
// Close ends it and removes its directory.
func StartLAPI(ctx context.Context, opts LAPIOptions) (*LAPI, error) {
	server, err := Tool(ctx, "crowdsec")
	if err != nil {
		return nil, err
	}
	cscli, err := Tool(ctx, "cscli")
	if err != nil {
		return nil, err
	}
	var seed string
	if len(opts.Seed) > 0 {
		if seed, err = seedDatabase(ctx, server, opts.Seed); err != nil {
			return nil, err
		}
	}
	dir, err := os.MkdirTemp("", "edgeward-lapi-")
	if err != nil {
		return nil, fmt.Errorf("make a directory for LAPI: %w", err)
	}
	l := &LAPI{Dir: dir, cscli: cscli, client: &http.Client{Timeout: time.Second}}
	l.process = &process{
		name: "crowdsec",
		args: []string{server, "-c", l.config()},
		dir:  dir,
		logs: filepath.Join(dir, "crowdsec.log"),
		life: ctx,
	}
	l.ready = l.answers
	if opts.Chunked {
		l.env = append(l.env, "CROWDSEC_FEATURE_CHUNKED_DECISIONS_STREAM=true")
	}
	if err := l.prepare(opts, seed); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	ports := 1
	if opts.Metrics {
		ports = 2
	}
	if err := l.startAnywhere(ctx, ports, func(ports []int) error { return l.bind(ctx, opts, ports) }); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return l, nil
}

func (l *LAPI) config() string { return filepath.Join(l.Dir, "etc", "config.yaml") }

// prepare lays out all that does not depend on the port.
func (l *LAPI) prepare(opts LAPIOptions, seed string) error {
	for _, sub := range []string{"etc/hub", "etc/notifications", "etc/plugins", "data"} {
		if err := os.MkdirAll(filepath.Join(l.Dir, sub), 0o755); err != nil {
			return fmt.Errorf("lay out LAPI's directory: %w", err)
		}
	}
	for name, content := range map[string]string{
		"hub/.index.json":            "{}\n",
		"simulation.yaml":            "",
		"local_api_credentials.yaml": "",
		"profiles.yaml": "name: ban\n" +
			"filters: ['Alert.Remediation == true && Alert.GetScope() == \"Ip\"']\n" +
			"decisions: [{type: ban, duration: 4h}]\n" +
			"on_success: break\n",
	} {
		if err := os.WriteFile(filepath.Join(l.Dir, "etc", name), []byte(content), 0o600); err != nil {
			return fmt.Errorf("lay out LAPI's directory: %w", err)
		}
	}
	if opts.TLS {
		pki, err := NewPKI(filepath.Join(l.Dir, "tls"))
		if err != nil {
			return err
		}
		if _, _, err := pki.Server("lapi"); err != nil {
			return err
		}
		l.PKI = pki
		l.client.Transport = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pki.Pool()}}
	}
	if opts.Socket {
		l.SocketPath = filepath.Join(l.Dir, "lapi.sock")
	}
	if seed != "" {
		if err := copyFile(filepath.Join(l.Dir, "data", "crowdsec.db"), seed); err != nil {
			return fmt.Errorf("copy the seeded database: %w", err)
		}
	}
	return nil
}

// bind writes the configuration that holds the ports.
func (l *LAPI) bind(ctx context.Context, opts LAPIOptions, ports []int) error {
	listen := fmt.Sprintf("127.0.0.1:%d", ports[0])
	l.URL = "http://" + listen
	server := "    listen_uri: " + listen + "\n"
	if l.SocketPath != "" {
		server += "    listen_socket: " + l.SocketPath + "\n"
	}
	if opts.TLS {
		l.URL = "https://" + listen
		server += fmt.Sprintf("    tls:\n      cert_file: %s\n      key_file: %s\n      ca_cert_path: %s\n      bouncers_allowed_ou: [%s]\n",
			l.PKI.path("lapi.crt"), l.PKI.path("lapi.key"), l.PKI.CAFile, BouncerOU)
	}
	metrics := "{enabled: false}"
	if opts.Metrics {
		metrics = fmt.Sprintf("{enabled: true, level: full, listen_addr: 127.0.0.1, listen_port: %d}", ports[1])
		l.MetricsURL = fmt.Sprintf("http://127.0.0.1:%d/metrics", ports[1])
	}
	config := strings.NewReplacer("METRICS", metrics, "DIR", l.Dir, "WAL", strconv.FormatBool(!opts.oneFile)).Replace(`common: {log_media: stdout, log_level: info}
config_paths:
  config_dir: DIR/etc/
  data_dir: DIR/data/
  simulation_path: DIR/etc/simulation.yaml
  hub_dir: DIR/etc/hub/
  index_path: DIR/etc/hub/.index.json
  notification_dir: DIR/etc/notifications/
  plugin_dir: DIR/etc/plugins/
crowdsec_service: {enable: false}
cscli: {output: human}
db_config: {type: sqlite, db_path: DIR/data/crowdsec.db, use_wal: WAL, flush: {max_items: 1000000, max_age: 7d}}
prometheus: METRICS
api:
  client: {credentials_path: DIR/etc/local_api_credentials.yaml}
  server:
    profiles_path: DIR/etc/profiles.yaml
`) + server
	if err := os.WriteFile(l.config(), []byte(config), 0o600); err != nil {
		return fmt.Errorf("configure LAPI: %w", err)
	}
	credentials := filepath.Join(l.Dir, "etc", "local_api_credentials.yaml")
	if _, err := l.Cscli(ctx, "machines", "add", "rig", "--password", "rig", "--file", credentials, "--url", l.URL, "--force"); err != nil {
		return err
	}
	if opts.TLS {
		file, err := os.OpenFile(credentials, os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return fmt.Errorf("configure cscli: %w", err)
		}
		_, err = fmt.Fprintf(file, "ca_cert_path: %s\n", l.PKI.CAFile)
		if err := errors.Join(err, file.Close()); err != nil {
			return fmt.Errorf("configure cscli: %w", err)
		}
	}
	return nil
}

// answers tells whether LAPI says that it is well.
func (l *LAPI) answers(ctx context.Context) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, l.URL+"/health", nil)
	if err != nil {
		return false
	}
	resp, err := l.client.Do(req)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// Close stops LAPI and removes its directory.
func (l *LAPI) Close() error {
	err := l.Stop(context.Background())
	l.client.CloseIdleConnections()
	return errors.Join(err, os.RemoveAll(l.Dir))
}

// Cscli runs CrowdSec's own command line on this LAPI and returns its standard
// output. Commands on bouncers, machines and allowlists work while LAPI is
// down; those on decisions do not.
func (l *LAPI) Cscli(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, l.cscli, append([]string{"-c", l.config()}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("run cscli %s: %w: %s", strings.Join(args, " "), err, tail(stderr.String()+stdout.String(), 2000))
	}
	return stdout.Bytes(), nil
}

// AddBouncer registers a bouncer and returns its key.
func (l *LAPI) AddBouncer(ctx context.Context, name string) (key string, err error) {
	random := make([]byte, 16)
	rand.Read(random)
	key = hex.EncodeToString(random)
	if _, err := l.Cscli(ctx, "bouncers", "add", name, "--key", key); err != nil {
		return "", err
	}
	return key, nil
}

// Bouncer is a bouncer as LAPI lists it. One key used from a second address
// shows as a second bouncer, NAME@ADDRESS.
type Bouncer struct {
	Name     string    `json:"name"`
	IP       string    `json:"ip_address"`
	Type     string    `json:"type"`
	Version  string    `json:"version"`
	AuthType string    `json:"auth_type"`
	LastPull time.Time `json:"last_pull"` // zero: never
}

// Bouncers lists the bouncers that LAPI knows.
func (l *LAPI) Bouncers(ctx context.Context) ([]Bouncer, error) {
	out, err := l.Cscli(ctx, "bouncers", "list", "-o", "json")
	if err != nil {
		return nil, err
	}
	var bouncers []Bouncer
	if err := json.Unmarshal(out, &bouncers); err != nil {
		return nil, fmt.Errorf("read the list of bouncers: %w", err)
	}
	return bouncers, nil
}

// Ban adds a ban of one address or prefix, as an operator would.
func (l *LAPI) Ban(ctx context.Context, value string, d time.Duration) error {
	return l.Decide(ctx, Decision{Value: value, Duration: d})
}

// Decide adds one decision, as an operator would; its origin is cscli.
func (l *LAPI) Decide(ctx context.Context, d Decision) error {
	d = d.withDefaults()
	_, err := l.Cscli(ctx, "decisions", "add", "--scope", d.Scope, "--value", d.Value, "--type", d.Type,
		"--duration", d.Duration.String(), "--reason", d.Scenario)
	return err
}

// Unban deletes every decision on exactly this address or prefix.
func (l *LAPI) Unban(ctx context.Context, value string) error {
	_, err := l.Cscli(ctx, "decisions", "delete", "--value", value)
	return err
}

// Import adds many decisions at once: some 8,000 a second on an idle machine.
func (l *LAPI) Import(ctx context.Context, decisions []Decision) error {
	path := filepath.Join(l.Dir, "import.csv")
	if err := writeCSV(path, decisions); err != nil {
		return fmt.Errorf("import decisions: %w", err)
	}
	_, err := l.Cscli(ctx, "decisions", "import", "--input", path, "--format", "csv", "--batch", "1000")
	return err
}

func (d Decision) withDefaults() Decision {
	if d.Scope == "" {
		d.Scope = "ip"
		if strings.Contains(d.Value, "/") {
			d.Scope = "range"
		}
	}
	if d.Type == "" {
		d.Type = "ban"
	}
	if d.Scenario == "" {
		d.Scenario = "test"
	}
	return d
}

func writeCSV(path string, decisions []Decision) error {
	var buf bytes.Buffer
	w := csv.NewWriter(&buf)
	w.Write([]string{"duration", "reason", "scope", "type", "value"})
	for _, d := range decisions {
		d = d.withDefaults()
		w.Write([]string{d.Duration.String(), d.Scenario, d.Scope, d.Type, d.Value})
	}
	w.Flush()
	if err := w.Error(); err != nil {
		return err
	}
	return os.WriteFile(path, buf.Bytes(), 0o600)
}

// seedDatabase returns the path of a database that holds the decisions,
// filling one by way of a LAPI of its own unless the cache has it fresh.
func seedDatabase(ctx context.Context, server string, decisions []Decision) (string, error) {
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	sum := sha256.New()
	// The tool's directory carries the hash of its build.
	fmt.Fprintln(sum, filepath.Base(filepath.Dir(server)))
	for _, d := range decisions {
		fmt.Fprintf(sum, "%q\n", d.withDefaults())
	}
	path := filepath.Join(cache, "seeds", hex.EncodeToString(sum.Sum(nil))[:12]+".db")
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", fmt.Errorf("make the cache of seeds: %w", err)
	}
	unlock, err := lock(ctx, path+".lock")
	if err != nil {
		return "", fmt.Errorf("lock the cache of seeds: %w", err)
	}
	defer unlock()
	if info, err := os.Stat(path); err == nil && time.Since(info.ModTime()) < seedLife {
		return path, nil
	}
	if err := dropOldSeeds(filepath.Dir(path)); err != nil {
		return "", fmt.Errorf("clear the cache of seeds: %w", err)
	}

	began := time.Now()
	l, err := StartLAPI(ctx, LAPIOptions{oneFile: true})
	if err != nil {
		return "", fmt.Errorf("seed a database: %w", err)
	}
	defer l.Close()
	if err := l.Import(ctx, decisions); err != nil {
		return "", fmt.Errorf("seed a database: %w", err)
	}
	if err := l.Stop(ctx); err != nil {
		return "", fmt.Errorf("seed a database: %w", err)
	}
	filled := filepath.Join(l.Dir, "data", "crowdsec.db")
	for _, rest := range []string{"-wal", "-journal"} {
		if info, err := os.Stat(filled + rest); err == nil && info.Size() > 0 {
			return "", fmt.Errorf("seed a database: LAPI left %d bytes beside it, in crowdsec.db%s", info.Size(), rest)
		}
	}
	if err := copyFile(path+".partial", filled); err != nil {
		return "", fmt.Errorf("seed a database: %w", err)
	}
	if err := os.Chtimes(path+".partial", began, began); err != nil {
		return "", fmt.Errorf("seed a database: %w", err)
	}
	if err := os.Rename(path+".partial", path); err != nil {
		return "", fmt.Errorf("seed a database: %w", err)
	}
	return path, nil
}

// dropOldSeeds keeps the cache from growing with every change of a test.
func dropOldSeeds(dir string) error {
	seeds, err := filepath.Glob(filepath.Join(dir, "*.db"))
	if err != nil {
		return err
	}
	for _, seed := range seeds {
		if info, err := os.Stat(seed); err == nil && time.Since(info.ModTime()) > seedLife {
			if err := os.Remove(seed); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

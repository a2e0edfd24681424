package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/edgeward/edgeward/test/cfedge"
	"github.com/edgeward/edgeward/tunnel"
	"github.com/edgeward/edgeward/tunnel/cloudflare/api"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"edgeward": func() { os.Exit(program(os.Args[1:])) }})
}

// hasty has commands end at once that are built to find races: by default each
// sleeps for a second first.
const hasty = "atexit_sleep_ms=0"

// TestScripts runs the command line as an operator would, against an emulated
// Cloudflare of each script's own. It has the account $ACCOUNT and the zones
// example.org and example.net; the API is at $API, the tokens are in
// $WORK/tokens, and the files of a script have these words filled in. The
// commands beside edgeward: record TYPE NAME CONTENT makes a record as somebody
// else does, turn FILE brings Cloudflare into step, records ZONE shows it.
func TestScripts(t *testing.T) {
	type world struct {
		cloud   *cfedge.Cloud
		account string
	}
	of := func(ts *testscript.TestScript) world { return ts.Value(world{}).(world) }
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			env.Setenv("GORACE", hasty)
			w := world{cloud: cfedge.NewCloud()}
			w.account = w.cloud.AddAccount("home")
			server := httptest.NewServer(cfedge.NewAPI(w.cloud))
			env.Defer(server.Close)
			env.Values[world{}] = w
			tokens := filepath.Join(env.WorkDir, "tokens")
			if err := os.Mkdir(tokens, 0o700); err != nil {
				return err
			}
			given := map[string]string{"tunnels": w.cloud.AddToken("tunnels", cfedge.TunnelEdit(w.account)), "wrong": "cfut_0123456789012345678901234567"}
			for _, zone := range []string{"example.org", "example.net"} {
				w.cloud.AddZone(w.account, zone)
				given[zone] = w.cloud.AddToken(zone, cfedge.ZoneRead(zone), cfedge.DNSEdit(zone))
			}
			given["connector"] = w.cloud.AddTunnel(w.cloud.AddAccount("other"), "other", nil).Token()
			for name, text := range given {
				if err := os.WriteFile(filepath.Join(tokens, name), []byte(text), 0o600); err != nil {
					return err
				}
			}
			env.Setenv("API", server.URL+"/client/v4")
			fill := strings.NewReplacer("$API", server.URL+"/client/v4", "$WORK", env.WorkDir, "$ACCOUNT", w.account)
			files, err := filepath.Glob(filepath.Join(env.WorkDir, "*.yaml"))
			if err != nil {
				return err
			}
			for _, f := range files {
				text, err := os.ReadFile(f)
				if err != nil {
					return err
				}
				if err := os.WriteFile(f, []byte(fill.Replace(string(text))), 0o600); err != nil {
					return err
				}
			}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"record": func(ts *testscript.TestScript, _ bool, args []string) {
				of(ts).cloud.Put(cfedge.Record{Type: args[0], Name: args[1], Content: args[2]})
			},
			"records": func(ts *testscript.TestScript, _ bool, args []string) {
				w := of(ts)
				fmt.Fprintf(ts.Stdout(), "%d records\n", len(w.cloud.Records(args[0])))
				for _, r := range w.cloud.Records(args[0]) {
					for _, t := range w.cloud.Tunnels(w.account) {
						r.Content = strings.ReplaceAll(r.Content, t.ID.String(), t.Name)
					}
					fmt.Fprintf(ts.Stdout(), "%s %s %s\n", r.Type, r.Name, r.Content)
				}
			},
			"turn": func(ts *testscript.TestScript, _ bool, args []string) {
				c, err := tunnel.Load(ts.MkAbs(args[0]))
				ts.Check(err)
				s, err := api.From(&c)
				ts.Check(err)
				_, err = api.New(s, "test", slog.New(slog.DiscardHandler)).Turn(context.Background())
				ts.Check(err)
			},
		},
	})
}

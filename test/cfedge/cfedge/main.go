// Command cfedge runs an emulated Cloudflare on loopback, to try a connector by
// hand: the edge that it dials, a front for the visitors' curl, and the API. It
// prints where everything is and what to say to it, writes the authority that
// both sides must trust to a file, and takes what the edge is to do to its
// connectors as lines on standard input. It keeps nothing and faces no network.
//
//	go run ./test/cfedge/cfedge -host app.example.org
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/edgeward/edgeward/test/cfedge"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "cfedge:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, in io.Reader, out, logs io.Writer) error {
	flags := flag.NewFlagSet("cfedge", flag.ContinueOnError)
	flags.SetOutput(logs)
	listen := flags.String("listen", "127.0.0.1", "address to listen on")
	dir := flags.String("dir", "", "where to write ca.pem and the tokens (default: a new temporary directory)")
	name := flags.String("tunnel", "home", "name of the tunnel to make")
	zone := flags.String("zone", "example.org", "zone to make")
	hosts := flags.String("host", "", "hosts whose DNS records lead to the tunnel, with commas between")
	lag := flags.Duration("route-lag", 3*time.Second, "how long requests still go to a connection that has unregistered")
	if err := flags.Parse(args); err != nil {
		return err
	}
	address, err := netip.ParseAddr(*listen)
	if err != nil {
		return fmt.Errorf("read -listen: %w", err)
	}
	if *dir == "" {
		if *dir, err = os.MkdirTemp("", "cfedge-"); err != nil {
			return err
		}
		defer os.RemoveAll(*dir)
	}

	e, err := cfedge.Start(ctx, cfedge.Options{Listen: address, RouteLag: *lag, Logger: slog.New(slog.NewTextHandler(logs, nil))})
	if err != nil {
		return err
	}
	defer e.Close()
	cloud := e.Cloud()
	account := cloud.AddAccount("trial")
	cloud.AddZone(account, *zone)
	tunnel := cloud.AddTunnel(account, *name, nil)
	for host := range strings.SplitSeq(*hosts, ",") {
		if host = strings.TrimSpace(host); host != "" {
			cloud.AddRoute(host, tunnel.ID)
		}
	}
	token := cloud.AddToken("trial", cfedge.TunnelEdit(account), cfedge.ZoneRead(*zone), cfedge.DNSEdit(*zone))

	plain, err := serve(ctx, address, e.Front(), nil)
	if err != nil {
		return err
	}
	secure, err := serve(ctx, address, e.Front(), e)
	if err != nil {
		return err
	}
	api, err := serve(ctx, address, cfedge.NewAPI(cloud), nil)
	if err != nil {
		return err
	}
	files := map[string]string{"ca.pem": string(e.CA()), "tunnel-token": tunnel.Token(), "api-token": token}
	for file, text := range files {
		if err := os.WriteFile(filepath.Join(*dir, file), []byte(text), 0o600); err != nil {
			return err
		}
	}
	fmt.Fprintf(out, "edge      %s\n", strings.Join(e.Addrs(), " "))
	fmt.Fprintf(out, "ca        %s\n", filepath.Join(*dir, "ca.pem"))
	fmt.Fprintf(out, "tunnel    %s, token in %s\n", tunnel.ID, filepath.Join(*dir, "tunnel-token"))
	fmt.Fprintf(out, "api       http://%s/client/v4, account %s, zone %s, token in %s\n", api, account, *zone, filepath.Join(*dir, "api-token"))
	fmt.Fprintf(out, "visitors  curl -H 'Host: app.%s' -H '%s: 203.0.113.9' http://%s/\n", *zone, cfedge.VisitorHeader, plain)
	fmt.Fprintf(out, "          curl --cacert %s --connect-to ::%s https://app.%s/\n", filepath.Join(*dir, "ca.pem"), secure, *zone)
	fmt.Fprintf(out, "say       %s\n", strings.Join(words, ", "))

	go obey(e, in, out)
	<-ctx.Done()
	return nil
}

// words are what the edge can be told on standard input.
var words = []string{"status", "kill", "drain", "dark", "light", "no-udp", "udp", "refuse REASON", "admit", "slow DURATION"}

// obey does what it is told until there is nothing more.
func obey(e *cfedge.Edge, in io.Reader, out io.Writer) {
	for lines := bufio.NewScanner(in); lines.Scan(); {
		word, rest, _ := strings.Cut(strings.TrimSpace(lines.Text()), " ")
		switch word {
		case "":
		case "status":
			for _, c := range e.Connections() {
				fmt.Fprintf(out, "connection %d  %s  %s  %s  requests %d  in flight %d\n", c.Index, c.Protocol, c.Location, c.Version, c.Requests(), c.InFlight())
			}
			fmt.Fprintf(out, "%+v\n", e.Counts())
			for _, failure := range e.Failures() {
				fmt.Fprintln(out, failure)
			}
		case "kill":
			e.Kill()
		case "drain":
			for _, c := range e.Connections() {
				c.Drain()
			}
		case "dark", "light":
			e.Dark(word == "dark")
		case "no-udp", "udp":
			e.BlockUDP(word == "no-udp")
		case "refuse":
			e.Refuse(cfedge.Refusal{Reason: rest, Permanent: true})
		case "admit":
			e.Admit()
		case "slow":
			d, err := time.ParseDuration(rest)
			if err != nil {
				fmt.Fprintln(out, err)
				continue
			}
			e.Delay(d)
		default:
			fmt.Fprintf(out, "%q is none of: %s\n", word, strings.Join(words, ", "))
		}
	}
}

// serve runs a handler on a free port until ctx ends, over TLS if there is an
// edge to answer for its name.
func serve(ctx context.Context, address netip.Addr, handler http.Handler, secure *cfedge.Edge) (string, error) {
	listener, err := net.Listen("tcp", netip.AddrPortFrom(address, 0).String())
	if err != nil {
		return "", err
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)}
	// Both end with an error when the server is closed, which is what ends them.
	if secure == nil {
		go func() { _ = server.Serve(listener) }()
	} else {
		server.TLSConfig = secure.FrontTLS()
		go func() { _ = server.ServeTLS(listener, "", "") }()
	}
	context.AfterFunc(ctx, func() { server.Close() })
	return listener.Addr().String(), nil
}

// Command edgeward is for operators: it shows which hosts are public and why,
// and what would be written at Cloudflare before it is; and it keeps the peers of
// the VPN, from the key to the QR code. It reads the configuration that
// edgeward-tunnel runs by. The verbs of peer edit the peers in it; nothing else
// is written anywhere, and no private key is but on request. It asks Cloudflare's
// API with the tokens that the configuration names, and the running gateway at
// its socket.
package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/edgeward/edgeward/internal/command"
	"github.com/edgeward/edgeward/tunnel"
)

func main() { os.Exit(program(os.Args[1:])) }

// program runs one command line and returns its exit code.
func program(args []string) int { return command.Run(commands(), args) }

// commands is the command line.
func commands() *cobra.Command {
	var path string
	root := command.New("edgeward", "See what edgeward makes public, and keep the peers of the VPN")
	root.PersistentFlags().StringVar(&path, "config", "/etc/edgeward/tunnel.yaml", "configuration `FILE` of the tunnel")
	// on runs a verb on the configuration, which is read when it runs.
	on := func(do func(*cobra.Command, tunnel.Config) error) func(*cobra.Command, []string) error {
		return func(cmd *cobra.Command, _ []string) error {
			c, err := tunnel.Load(path)
			if err != nil {
				return err
			}
			return do(cmd, c)
		}
	}
	host := &cobra.Command{Use: "host", Short: "Public hosts, their DNS records and their tunnels"}
	host.AddCommand(
		&cobra.Command{
			Use: "list", Short: "Show each public host, its origin service, tunnel and DNS state", Args: cobra.NoArgs,
			RunE: on(list),
		},
		&cobra.Command{
			Use: "plan", Short: "Show every write at Cloudflare that is due, and make none", Args: cobra.NoArgs,
			RunE: on(plan),
		},
	)
	root.AddCommand(
		host,
		peerCommands(&path),
		&cobra.Command{
			Use: "check", Short: "Check the configuration, without the files that it names, and change nothing", Args: cobra.NoArgs,
			RunE: on(func(cmd *cobra.Command, c tunnel.Config) error {
				fmt.Fprintf(cmd.OutOrStdout(), "%s: ok\n", path)
				for _, warning := range c.Warnings() {
					fmt.Fprintf(cmd.OutOrStdout(), "warning: %s\n", warning)
				}
				return nil
			}),
		},
	)
	return root
}

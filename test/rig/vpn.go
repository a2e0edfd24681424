package rig

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// VPNOptions says where a gateway of the VPN runs.
type VPNOptions struct {
	// Program is the built edgeward-tunnel; see Build.
	Program string
	// NetNS is a file of the network namespace that is the node, which must stay
	// there for as long as the gateway may be started.
	NetNS string
	// Config is what its configuration says beside socket, stateDir and the place
	// of keys; its first lines are those of the section wireguard.
	Config string
}

// VPN is the real edgeward-tunnel in its role wireguard, in a network namespace
// with the one privilege that the manifests give it.
type VPN struct {
	*process

	ConfigFile string // peers are declared in it
	SocketPath string // of the command line
	Dir        string // all of its files
}

// OwnRun is a command line in a network namespace, with an empty /run. The sockets
// of WireGuard devices lie there, by names that would be another's elsewhere; this
// way they go with the process.
func OwnRun(netNS string, args ...string) []string {
	const script = `mount -t tmpfs -o mode=755 tmpfs "$(readlink -f /var/run)" && exec "$@"`
	return append([]string{"nsenter", "--net=" + netNS, "unshare", "--mount", "sh", "-c", script, "sh"}, args...)
}

// NewVPN writes the configuration of a gateway that does not run yet; Start returns
// when peers may come. ctx bounds the life of what Start starts; Close ends it and
// removes its directory.
func NewVPN(ctx context.Context, opts VPNOptions) (*VPN, error) {
	dir, err := os.MkdirTemp("", "edgeward-vpn-")
	if err != nil {
		return nil, fmt.Errorf("make a directory for the VPN: %w", err)
	}
	v := &VPN{ConfigFile: filepath.Join(dir, "tunnel.yaml"), SocketPath: filepath.Join(dir, "vpn.sock"), Dir: dir}
	v.process = &process{
		name: "edgeward-tunnel",
		args: OwnRun(opts.NetNS,
			"setpriv", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all,+net_admin",
			opts.Program, "run", "--role", "wireguard", "--config", v.ConfigFile),
		dir:   dir,
		logs:  filepath.Join(dir, "vpn.log"),
		life:  ctx,
		ready: func(ctx context.Context) bool { return saysReady(ctx, v.SocketPath) },
	}
	text := fmt.Sprintf("wireguard:\n  privateKeyFile: %s\n  presharedKeyDir: %s\n%ssocket: %s\nstateDir: %s\n",
		filepath.Join(dir, "wireguard-key"), filepath.Join(dir, "peers"), opts.Config, v.SocketPath, filepath.Join(dir, "state"))
	// As systemd makes it.
	err = os.Mkdir(filepath.Join(dir, "state"), 0o700)
	if err == nil {
		err = os.WriteFile(v.ConfigFile, []byte(text), 0o600)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("configure the VPN: %w", err), os.RemoveAll(dir))
	}
	return v, nil
}

// Close stops the gateway and removes its directory.
func (v *VPN) Close() error {
	err := v.Stop(context.Background())
	return errors.Join(err, os.RemoveAll(v.Dir))
}

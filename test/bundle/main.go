// Command bundle makes what is released of the plugin and proves it with the
// interpreter that Traefik embeds:
//
//	DIR/plugins-local/         to lay beside Traefik, for experimental.localPlugins
//	DIR/edgeward-plugin.zip    the same, to unpack in Traefik's working directory
//	DIR/catalog/               the tree of a release tag, for the plugin catalog
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/edgeward/edgeward/internal/bundle"
	"github.com/edgeward/edgeward/test/rig"
)

func main() {
	out := flag.String("o", "dist", "directory to write to; what it holds of an older bundle is replaced")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root, err := rig.Root()
	if err == nil {
		err = run(ctx, root, *out)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bundle:", err)
		os.Exit(1)
	}
}

// run bundles the repository in root into out.
func run(ctx context.Context, root, out string) error {
	local, catalog := filepath.Join(out, "plugins-local"), filepath.Join(out, "catalog")
	for _, old := range []string{local, catalog} {
		if err := os.RemoveAll(old); err != nil {
			return fmt.Errorf("remove the older bundle: %w", err)
		}
	}
	if err := bundle.Assemble(ctx, root, local, bundle.Options{}); err != nil {
		return err
	}
	if err := bundle.Catalog(ctx, root, catalog); err != nil {
		return err
	}
	var archive bytes.Buffer
	if err := bundle.Archive(&archive, local, "plugins-local"); err != nil {
		return err
	}
	zip := filepath.Join(out, "edgeward-plugin.zip")
	if err := os.WriteFile(zip, archive.Bytes(), 0o644); err != nil {
		return fmt.Errorf("write the archive: %w", err)
	}
	interpreter, err := rig.Tool(ctx, "interpreter")
	if err != nil {
		return err
	}
	if said, err := exec.CommandContext(ctx, interpreter, "check", local, rig.ModulePath).CombinedOutput(); err != nil {
		return fmt.Errorf("check the bundle: %w: %s", err, bytes.TrimSpace(said))
	}
	fmt.Printf("bundle: Yaegi imports it, and New accepts the manifest's testData\nbundle: %s\nbundle: %s\nbundle: %s\n", local, zip, catalog)
	return nil
}

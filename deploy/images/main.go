// Command images makes the container images of edgeward without a Docker daemon and
// without a registry: for each program an OCI archive of all architectures, and for each
// architecture a CycloneDX list of what is in the binary.
//
//	go run -C deploy/images . -o DIR
//
// An image holds one static binary and the authorities that sign certificates, and
// nothing else: no shell, no package manager, nothing to update. The same sources make
// the same bytes. It pushes nothing: `k3s ctr images import` takes the archives as they
// are, and so do skopeo, crane and podman, which push.
package main

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/buildinfo"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	cyclonedx "github.com/CycloneDX/cyclonedx-go"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

const (
	registry = "ghcr.io/edgeward/"
	source   = "https://github.com/edgeward/edgeward"
	license  = "Apache-2.0"
	// authorities is where Go, curl and most others look first.
	authorities = "etc/ssl/certs/ca-certificates.crt"
)

// programs are what has an image, and whom it runs as where the manifest says nothing:
// a capability of the node's firewall is in the effective set of uid 0 alone.
var programs = []struct{ name, user, title string }{
	{"edgeward-bouncer", "0:0", "edgeward's node bouncer"},
	{"edgeward-tunnel", "65532:65532", "edgeward's tunnel and VPN gateway"},
}

func main() {
	out := flag.String("o", "dist/images", "directory to write to")
	version := flag.String("version", "v0.1.0", "tag of the images, which the binaries report")
	archs := flag.String("arch", "amd64,arm64", "architectures")
	binaries := flag.String("binaries", "", "directory with ARCH/PROGRAM to take instead of building")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *out, *version, strings.Split(*archs, ","), *binaries); err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, out, version string, archs []string, binaries string) error {
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	out, err := filepath.Abs(out)
	if err != nil {
		return err
	}
	if binaries == "" {
		binaries = filepath.Join(out, "binaries")
		for _, arch := range archs {
			if err := build(ctx, filepath.Join(binaries, arch), version, arch); err != nil {
				return err
			}
		}
	}
	roots, err := certificates()
	if err != nil {
		return err
	}
	for _, program := range programs {
		var index v1.ImageIndex = mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
		for _, arch := range archs {
			binary := filepath.Join(binaries, arch, program.name)
			bom, err := contents(binary, program.name, version, arch)
			if err != nil {
				return fmt.Errorf("look into %s for %s: %w", program.name, arch, err)
			}
			if err := os.WriteFile(filepath.Join(out, program.name+"-"+arch+".cdx.json"), bom, 0o644); err != nil {
				return err
			}
			img, err := image(binary, roots, program.name, program.user, program.title, version, arch)
			if err != nil {
				return fmt.Errorf("make the image of %s for %s: %w", program.name, arch, err)
			}
			index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
		}
		archive := filepath.Join(out, program.name+".oci.tar")
		if err := write(archive, index, registry+program.name+":"+version, version); err != nil {
			return fmt.Errorf("write %s: %w", archive, err)
		}
		digest, err := index.Digest()
		if err != nil {
			return err
		}
		fmt.Printf("%s %s%s:%s@%s\n", archive, registry, program.name, version, digest)
	}
	return nil
}

// build compiles the programs for an architecture, static and without a trace of where.
func build(ctx context.Context, dir, version, arch string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	args := []string{"build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -buildid= -X github.com/edgeward/edgeward/internal/daemon.linked=" + version, "-o", dir + "/"}
	for _, program := range programs {
		args = append(args, "./cmd/"+program.name)
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = filepath.Join("..", "..") // the root, seen from this module
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "GOWORK=off", "GOFLAGS=")
	if said, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the programs for %s: %w: %s", arch, err, bytes.TrimSpace(said))
	}
	return nil
}

// certificates are Mozilla's authorities, as a pinned module has them, without those
// that are trusted in part alone, which a file cannot say.
func certificates() ([]byte, error) {
	var text bytes.Buffer
	for root := range bundle.Roots() {
		if root.Constraint != nil {
			continue
		}
		if err := pem.Encode(&text, &pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate}); err != nil {
			return nil, err
		}
	}
	if text.Len() == 0 {
		return nil, errors.New("the module of authorities holds none")
	}
	return text.Bytes(), nil
}

// contents lists the modules that a binary was made of, and refuses one that is not what
// an image is to hold: static, and for this architecture.
func contents(binary, name, version, arch string) ([]byte, error) {
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		return nil, err
	}
	settings := map[string]string{}
	for _, setting := range info.Settings {
		settings[setting.Key] = setting.Value
	}
	if settings["GOOS"] != "linux" || settings["GOARCH"] != arch || settings["CGO_ENABLED"] != "0" {
		return nil, fmt.Errorf("it was built for %s/%s with CGO_ENABLED=%s, not static for linux/%s", settings["GOOS"], settings["GOARCH"], settings["CGO_ENABLED"], arch)
	}
	purl := func(path, version string) string { return "pkg:golang/" + path + "@" + version }
	components := []cyclonedx.Component{{
		Type: cyclonedx.ComponentTypeLibrary, BOMRef: purl("std", info.GoVersion), Name: "std", Version: info.GoVersion,
		PackageURL: purl("std", strings.TrimPrefix(info.GoVersion, "go")),
	}}
	for _, module := range info.Deps {
		if module.Replace != nil {
			module = module.Replace
		}
		components = append(components, cyclonedx.Component{
			Type: cyclonedx.ComponentTypeLibrary, BOMRef: purl(module.Path, module.Version), Name: module.Path, Version: module.Version,
			PackageURL: purl(module.Path, module.Version),
		})
	}
	slices.SortFunc(components, func(a, b cyclonedx.Component) int { return strings.Compare(a.BOMRef, b.BOMRef) })
	bom := cyclonedx.NewBOM()
	bom.Metadata = &cyclonedx.Metadata{Component: &cyclonedx.Component{
		Type: cyclonedx.ComponentTypeApplication, BOMRef: purl(info.Main.Path, version) + "#" + name, Name: name, Version: version,
		PackageURL: purl(info.Main.Path, version),
		Licenses:   &cyclonedx.Licenses{{License: &cyclonedx.License{ID: license}}},
	}}
	bom.Components = &components
	var text bytes.Buffer
	err = cyclonedx.NewBOMEncoder(&text, cyclonedx.BOMFileFormatJSON).SetPretty(true).Encode(bom)
	return text.Bytes(), err
}

// image makes the image of one architecture: a layer that seldom changes, and one with
// the binary.
func image(binary string, roots []byte, name, user, title, version, arch string) (v1.Image, error) {
	program, err := os.ReadFile(binary)
	if err != nil {
		return nil, err
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	for _, file := range []struct {
		name string
		mode int64
		data []byte
	}{{authorities, 0o644, roots}, {"usr/bin/" + name, 0o755, program}} {
		text, err := layer(file.name, file.mode, file.data)
		if err != nil {
			return nil, err
		}
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(text)), nil }, tarball.WithMediaType(types.OCILayer))
		if err != nil {
			return nil, err
		}
		if img, err = mutate.AppendLayers(img, l); err != nil {
			return nil, err
		}
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", arch
	config.Config.Entrypoint, config.Config.User, config.Config.WorkingDir = []string{"/usr/bin/" + name}, user, "/"
	config.Config.Labels = map[string]string{
		"org.opencontainers.image.title": title, "org.opencontainers.image.version": version,
		"org.opencontainers.image.source": source, "org.opencontainers.image.licenses": license,
	}
	return mutate.ConfigFile(img, config)
}

// layer is a tar of one file and the directories above it, whose bytes depend on nothing
// else.
func layer(name string, mode int64, data []byte) ([]byte, error) {
	var text bytes.Buffer
	w := tar.NewWriter(&text)
	var dirs []string
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		dirs = append(dirs, dir)
	}
	slices.Reverse(dirs)
	for _, dir := range dirs {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: time.Unix(0, 0)}); err != nil {
			return nil, err
		}
	}
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(data)), ModTime: time.Unix(0, 0)}); err != nil {
		return nil, err
	}
	if _, err := w.Write(data); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil { // which writes the end
		return nil, err
	}
	return text.Bytes(), nil
}

// write lays the index out as OCI says and puts that into one archive.
func write(archive string, index v1.ImageIndex, reference, version string) error {
	dir, err := os.MkdirTemp("", "edgeward-image-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	to, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	// The first name is containerd's, the second everybody's.
	names := map[string]string{"io.containerd.image.name": reference, "org.opencontainers.image.ref.name": version}
	if err := to.AppendIndex(index, layout.WithAnnotations(names)); err != nil {
		return err
	}
	file, err := os.Create(archive)
	if err != nil {
		return err
	}
	w := tar.NewWriter(file)
	// WalkDir goes in lexical order.
	err = filepath.WalkDir(dir, func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		data, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: filepath.ToSlash(rel), Mode: 0o644, Size: int64(len(data)), ModTime: time.Unix(0, 0)}); err != nil {
			return err
		}
		_, err = w.Write(data)
		return err
	})
	return errors.Join(err, w.Close(), file.Close())
}

package daemon

import (
	"fmt"
	"regexp"
	"runtime"
	"runtime/debug"
	"strings"
)

// linked is the version of a release, set by the linker and by nothing else:
//
//	go build -ldflags "-X github.com/edgeward/edgeward/internal/daemon.linked=v1.2.3"
var linked string

// coming is the version of what nobody gave one.
const coming = "v0.1.0"

// pseudo ends the versions that the go command makes up for commits.
var pseudo = regexp.MustCompile(`[-.]\d{14}-[0-9a-f]{12}(\+.*)?$`)

// Build says what is running.
type Build struct {
	// Version is v1.2.3; where nobody said, that of the release to come.
	Version string `json:"version"`
	// Commit is the revision that was built, with + where it had been changed;
	// empty where it is not known.
	Commit   string `json:"commit,omitempty"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

// Version reads what the linker and the go command left in this binary.
func Version() Build {
	info, _ := debug.ReadBuildInfo()
	return version(linked, info)
}

func version(linked string, info *debug.BuildInfo) Build {
	b := Build{Version: linked, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	if info != nil {
		if main := info.Main.Version; b.Version == "" && main != "(devel)" && !pseudo.MatchString(main) {
			b.Version, _, _ = strings.Cut(main, "+")
		}
		changed := ""
		for _, s := range info.Settings {
			switch {
			case s.Key == "vcs.revision":
				b.Commit = s.Value[:min(12, len(s.Value))]
			case s.Key == "vcs.modified" && s.Value == "true":
				changed = "+"
			}
		}
		if b.Commit != "" {
			b.Commit += changed
		}
	}
	if b.Version == "" {
		b.Version = coming
	}
	return b
}

// String is the build in one line.
func (b Build) String() string {
	commit := ""
	if b.Commit != "" {
		commit = " (" + b.Commit + ")"
	}
	return fmt.Sprintf("%s%s %s %s", b.Version, commit, b.Go, b.Platform)
}

package device

import (
	"bufio"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// cgroups is where the kernel tells and keeps what groups of processes may use.
type cgroups struct{ mine, root string }

var kernelGroups = cgroups{"/proc/self/cgroup", "/sys/fs/cgroup"}

// memory returns how much memory this process's group may have, in bytes; the
// largest number for no bound. It reads version 2, and version 1 where that has
// the memory. Each group bounds those in it. In a container the path may be the
// machine's, and the files those of the container's own group.
func (c cgroups) memory() int64 {
	bound := int64(math.MaxInt64)
	f, err := os.Open(c.mine)
	if err != nil {
		return bound
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		fields := strings.SplitN(lines.Text(), ":", 3)
		if len(fields) < 3 {
			continue
		}
		mount, file := c.root, "memory.max"
		switch {
		case fields[0] == "0" && fields[1] == "":
		case strings.Contains(","+fields[1]+",", ",memory,"):
			mount, file = filepath.Join(c.root, "memory"), "memory.limit_in_bytes"
		default:
			continue
		}
		for path := filepath.Clean("/" + fields[2]); ; path = filepath.Dir(path) {
			text, err := os.ReadFile(filepath.Join(mount, path, file))
			if n, parse := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64); err == nil && parse == nil {
				bound = min(bound, n)
			}
			if path == "/" {
				break
			}
		}
	}
	return bound
}

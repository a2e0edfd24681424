package config

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unicode"
)

// File names a file whose content is read when it is used, not with the
// configuration: a Secret that Kubernetes mounts or systemd hands over changes
// while the program runs. The empty File names none.
//
// The path may be logged; what it holds may not, and Read returns it as a
// Secret. A File is absolute, so that a key written where its file belongs is
// refused, and never repeated by the error.
type File string

// secretLimit is more than any key or chain of certificates weighs.
const secretLimit = 1 << 20

var errControl = errors.New("holds a control character: no path and no name has one")

// control reports whether a text holds what a terminal would obey, or what would
// end its line, and not show.
func control(text string) bool { return strings.ContainsFunc(text, unicode.IsControl) }

var errNotAbsolute = errors.New("want the absolute path of a file that holds it, such as /etc/edgeward/NAME.key")

// UnmarshalText takes an absolute path.
func (f *File) UnmarshalText(text []byte) error {
	if !filepath.IsAbs(string(text)) {
		return errNotAbsolute
	}
	if control(string(text)) {
		return errControl
	}
	*f = File(filepath.Clean(string(text)))
	return nil
}

// Read returns the file's content now, without the white space around it. A
// file that holds nothing else is an error.
func (f File) Read() (Secret, error) {
	file, err := os.Open(string(f))
	if err != nil {
		return Secret{}, err // it names the file and what was tried
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, secretLimit+1))
	if err != nil {
		return Secret{}, err
	}
	if len(text) > secretLimit {
		return Secret{}, fmt.Errorf("read %s: larger than %d bytes", string(f), secretLimit)
	}
	secret := Secret{strings.TrimSpace(string(text))}
	if secret.text == "" {
		return Secret{}, fmt.Errorf("read %s: it is empty", string(f))
	}
	return secret, nil
}

// Secret is a text that no log, error or dump shows: whatever prints it prints
// [redacted] instead. Secrets compare with ==.
type Secret struct{ text string }

const redacted = "[redacted]"

// Reveal returns the text itself, for the one call that needs it.
func (s Secret) Reveal() string { return s.text }

// String hides the text.
func (s Secret) String() string { return redacted }

// Format hides the text from every verb of fmt.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// MarshalText hides the text from encoders and structured logs.
func (s Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// Port is a TCP or UDP port, 1 to 65535; 0 is none.
type Port uint16

// UnmarshalText takes a port in decimal digits.
func (p *Port) UnmarshalText(text []byte) error {
	n, err := strconv.ParseUint(string(text), 10, 16)
	if err != nil || n == 0 || text[0] == '0' {
		return fmt.Errorf("%s: want a port from 1 to 65535", quoted(string(text)))
	}
	*p = Port(n)
	return nil
}

// IsHost reports whether name is a DNS name of letters, digits, hyphens and
// underscores, in small letters.
func IsHost(name string) bool {
	if name == "" || len(name) > 253 {
		return false
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for i := 0; i < len(label); i++ {
			c := label[i]
			if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
				return false
			}
		}
	}
	return true
}

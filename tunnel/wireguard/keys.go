package wireguard

import (
	"crypto/ecdh"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/edgeward/edgeward/internal/config"
)

// keySize is that of every key of WireGuard, in bytes.
const keySize = 32

// PublicKey tells a peer, or the gateway, from all others. The zero key is none.
type PublicKey [keySize]byte

// PrivateKey is the secret half of a key pair. Whatever prints it prints
// [redacted]. The zero key is none.
type PrivateKey struct{ key [keySize]byte }

// PresharedKey is a secret that one peer and the gateway share beside their key
// pairs. Whatever prints it prints [redacted]. The zero key is none.
type PresharedKey struct{ key [keySize]byte }

// NewPrivateKey makes a key pair and returns its secret half.
func NewPrivateKey() PrivateKey {
	k := PrivateKey{random()}
	// As WireGuard's own tools write it; the curve ignores these bits.
	k.key[0] &= 248
	k.key[31] = k.key[31]&127 | 64
	return k
}

// NewPresharedKey makes a preshared key.
func NewPresharedKey() PresharedKey { return PresharedKey{random()} }

func random() (key [keySize]byte) {
	_, _ = rand.Read(key[:]) // it never fails
	return key
}

// ParsePublicKey reads a key in base64, as `wg` prints it.
func ParsePublicKey(text string) (PublicKey, error) {
	key, err := parseKey(text)
	if err == nil && key == [keySize]byte{} {
		err = errors.New("want a public key, have one of nothing but zeros")
	}
	return PublicKey(key), err
}

// ParsePrivateKey reads a key in base64. Its error does not repeat the text.
func ParsePrivateKey(text string) (PrivateKey, error) {
	key, err := parseKey(text)
	if err == nil && key == [keySize]byte{} {
		err = errors.New("want a private key, have one of nothing but zeros")
	}
	return PrivateKey{key}, err
}

// ParsePresharedKey reads a key in base64. Its error does not repeat the text.
func ParsePresharedKey(text string) (PresharedKey, error) {
	key, err := parseKey(text)
	if err == nil && key == [keySize]byte{} {
		err = errors.New("want a preshared key, have one of nothing but zeros, which is the same as none")
	}
	return PresharedKey{key}, err
}

var errKey = errors.New("want a key of 44 characters in base64, as wg prints it")

// parseKey never repeats the text: a private key may stand where a public one
// belongs.
func parseKey(text string) (key [keySize]byte, err error) {
	if len(text) != base64.StdEncoding.EncodedLen(keySize) {
		return key, errKey
	}
	// Without its padding a text of that length holds a byte more.
	decoded, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil || len(decoded) != keySize {
		return key, errKey
	}
	return [keySize]byte(decoded), nil
}

// IsZero reports whether k is no key.
func (k PublicKey) IsZero() bool { return k == PublicKey{} }

// String is the key in base64, empty for the zero key.
func (k PublicKey) String() string {
	if k.IsZero() {
		return ""
	}
	return base64.StdEncoding.EncodeToString(k[:])
}

// MarshalText is the key in base64.
func (k PublicKey) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText reads a key in base64; nothing is the zero key.
func (k *PublicKey) UnmarshalText(text []byte) (err error) {
	if len(text) == 0 {
		*k = PublicKey{}
		return nil
	}
	*k, err = ParsePublicKey(string(text))
	return err
}

// IsZero reports whether k is no key.
func (k PrivateKey) IsZero() bool { return k == PrivateKey{} }

// Public is the other half of the pair; that of the zero key is the zero key.
func (k PrivateKey) Public() PublicKey {
	if k.IsZero() {
		return PublicKey{}
	}
	pair, err := ecdh.X25519().NewPrivateKey(k.key[:])
	if err != nil {
		panic(fmt.Sprintf("wireguard: a private key of %d bytes: %v", len(k.key), err)) // it has the right size
	}
	return PublicKey(pair.PublicKey().Bytes())
}

// Reveal is the key in base64, for the one file or device that needs it; empty
// for the zero key.
func (k PrivateKey) Reveal() string { return reveal(k.key) }

// Bytes are the key itself, for the device.
func (k PrivateKey) Bytes() [keySize]byte { return k.key }

// IsZero reports whether k is no key.
func (k PresharedKey) IsZero() bool { return k == PresharedKey{} }

// Reveal is the key in base64, for the one file or device that needs it; empty
// for the zero key.
func (k PresharedKey) Reveal() string { return reveal(k.key) }

// Bytes are the key itself, for the device.
func (k PresharedKey) Bytes() [keySize]byte { return k.key }

func reveal(key [keySize]byte) string {
	if key == [keySize]byte{} {
		return ""
	}
	return base64.StdEncoding.EncodeToString(key[:])
}

const redacted = "[redacted]"

// String hides the key.
func (PrivateKey) String() string { return redacted }

// Format hides the key from every verb of fmt.
func (PrivateKey) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// MarshalText hides the key from encoders and structured logs.
func (PrivateKey) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// String hides the key.
func (PresharedKey) String() string { return redacted }

// Format hides the key from every verb of fmt.
func (PresharedKey) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// MarshalText hides the key from encoders and structured logs.
func (PresharedKey) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// ReadPrivateKey reads the key in a file. Where there is no such file the error
// is fs.ErrNotExist and says how to make one.
func ReadPrivateKey(file config.File) (PrivateKey, error) {
	secret, err := file.Read()
	if errors.Is(err, fs.ErrNotExist) {
		return PrivateKey{}, fmt.Errorf("read private key: %w: make it with wg genkey, mode 0600", err)
	}
	if err != nil {
		return PrivateKey{}, fmt.Errorf("read private key: %w", err)
	}
	key, err := ParsePrivateKey(secret.Reveal())
	if err != nil {
		return PrivateKey{}, fmt.Errorf("read private key: %s: %w", string(file), err)
	}
	return key, nil
}

// readPresharedKey reads the key in a file.
func readPresharedKey(file config.File) (PresharedKey, error) {
	secret, err := file.Read()
	if err != nil {
		return PresharedKey{}, fmt.Errorf("read preshared key: %w", err)
	}
	key, err := ParsePresharedKey(secret.Reveal())
	if err != nil {
		return PresharedKey{}, fmt.Errorf("read preshared key: %s: %w", string(file), err)
	}
	return key, nil
}

// Leftover are the files of preshared keys in PresharedKeyDir that no peer names:
// those of peers that were taken out of the file, and of keys that rotated. A
// directory that cannot be read has none.
func (c *Config) Leftover() []string {
	entries, err := os.ReadDir(c.PresharedKeyDir)
	if err != nil {
		return nil
	}
	named := map[string]bool{}
	for _, f := range c.Files() {
		named[filepath.Clean(string(f))] = true
	}
	var out []string
	for _, e := range entries {
		if path := filepath.Join(c.PresharedKeyDir, e.Name()); strings.HasSuffix(e.Name(), ".psk") && !named[path] {
			out = append(out, path)
		}
	}
	return out
}

// EnsurePrivateKey reads the key in a file, which it makes, with mode 0600,
// where it is missing; made says that it did. Two programs that start at once
// end up with the same key.
func EnsurePrivateKey(file config.File) (key PrivateKey, made bool, err error) {
	key, err = ReadPrivateKey(file)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, false, err
	}
	missing := err
	key = NewPrivateKey()
	if err := WriteKeyFile(file, key.Reveal()); errors.Is(err, fs.ErrExist) {
		key, err = ReadPrivateKey(file)
		return key, false, err
	} else if err != nil {
		return PrivateKey{}, false, fmt.Errorf("%w (it could not be made here: %w)", missing, err)
	}
	return key, true, nil
}

// WriteKeyFile puts a key, in base64, into a new file of mode 0600, whole or not
// at all. A file that is there is left alone: the error is fs.ErrExist. The file
// belongs to whom its directory belongs to, where the process is root: what root
// writes for a program is for that program to read.
func WriteKeyFile(file config.File, text string) error {
	dir := filepath.Dir(string(file))
	fresh, err := os.CreateTemp(dir, "."+filepath.Base(string(file))+".*")
	if err != nil {
		return fmt.Errorf("write key: %w", err)
	}
	defer os.Remove(fresh.Name())
	_, err = fresh.WriteString(text + "\n")
	if err == nil {
		err = belongTo(fresh, dir)
	}
	if err == nil {
		err = fresh.Sync()
	}
	if err = errors.Join(err, fresh.Close()); err == nil {
		// A link, not a rename, which would replace a key that appeared meanwhile.
		err = os.Link(fresh.Name(), string(file))
	}
	if err != nil {
		return fmt.Errorf("write key: %w", err)
	}
	return nil
}

// belongTo gives an open file the owner of a directory. It goes by what is open
// and not by a name: whoever owns the directory can have that lead elsewhere.
func belongTo(file *os.File, dir string) error {
	if os.Getuid() != 0 {
		return nil
	}
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	if !ok || owner.Uid == 0 {
		return nil
	}
	return file.Chown(int(owner.Uid), int(owner.Gid))
}

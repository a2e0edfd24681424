package wireguard

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/edgeward/edgeward/internal/config"
)

// TestPublic has the pair of RFC 7748, section 6.1.
func TestPublic(t *testing.T) {
	private, err := ParsePrivateKey("dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := private.Public().String(), "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo="; got != want {
		t.Errorf("have %s, want %s", got, want)
	}
	if !(PrivateKey{}).Public().IsZero() {
		t.Error("no key has a public one")
	}
	a, b := NewPrivateKey(), NewPrivateKey()
	if a == b || a.key[0]&7 != 0 || a.key[31]&0xc0 != 0x40 || (NewPresharedKey() == PresharedKey{}) {
		t.Error("keys are not as they should be")
	}
	if again, err := ParsePrivateKey(a.Reveal()); err != nil || again != a {
		t.Errorf("a key that was revealed reads %v", err)
	}
}

func TestParseKey(t *testing.T) {
	good := base64.StdEncoding.EncodeToString([]byte("0123456789abcdef0123456789abcdef"))
	for _, text := range []string{
		"", "x", good + "=", good[:43], " " + good, good[:42] + "==", strings.Repeat("A", 44), good[:42] + "B=", strings.ReplaceAll(good, "M", "-"), strings.Repeat("A", 43) + "=",
	} {
		if k, err := ParsePublicKey(text); err == nil || len(text) > 9 && strings.Contains(err.Error(), text) {
			t.Errorf("%q reads %v, %v", text, k, err)
		}
		if _, err := ParsePrivateKey(text); err == nil {
			t.Errorf("%q is a private key", text)
		}
		if _, err := ParsePresharedKey(text); err == nil {
			t.Errorf("%q is a preshared key", text)
		}
	}
	if k, err := ParsePublicKey(good); err != nil || k.String() != good {
		t.Errorf("%v, %v", k, err)
	}
}

func TestSecretKeysAreNotShown(t *testing.T) {
	private, preshared := NewPrivateKey(), NewPresharedKey()
	holder := struct {
		A PrivateKey
		B *PresharedKey
	}{private, &preshared}
	var shown bytes.Buffer
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&shown, verb+"\n", private)
		fmt.Fprintf(&shown, verb+"\n", &preshared)
		fmt.Fprintf(&shown, verb+"\n", holder)
	}
	slog.New(slog.NewJSONHandler(&shown, nil)).Info("x", "a", private, "b", preshared, "in", holder)
	slog.New(slog.NewTextHandler(&shown, nil)).Info("x", "a", private, "b", preshared, "in", holder)
	if err := json.NewEncoder(&shown).Encode(holder); err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{private.Reveal(), preshared.Reveal(), fmt.Sprintf("%x", private.Bytes()), fmt.Sprint(preshared.Bytes())} {
		if strings.Contains(shown.String(), secret) {
			t.Errorf("%s is shown", secret)
		}
	}
	if !strings.Contains(shown.String(), redacted) {
		t.Errorf("shown:\n%s", shown.String())
	}
}

func TestKeyFiles(t *testing.T) {
	dir := t.TempDir()
	file := config.File(filepath.Join(dir, "key"))
	if _, err := ReadPrivateKey(file); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "wg genkey") {
		t.Errorf("a key that is not there: %v", err)
	}
	key, made, err := EnsurePrivateKey(file)
	if err != nil || !made {
		t.Fatalf("%v, %v", made, err)
	}
	if info, err := os.Stat(string(file)); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if again, made, err := EnsurePrivateKey(file); err != nil || made || again != key {
		t.Errorf("made again: %v, %v", made, err)
	}
	if err := WriteKeyFile(file, NewPresharedKey().Reveal()); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a key was overwritten: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	nowhere := config.File(filepath.Join(dir, "nowhere", "key"))
	if _, _, err := EnsurePrivateKey(nowhere); err == nil || !strings.Contains(err.Error(), "wg genkey") {
		t.Errorf("a directory that is not there: %v", err)
	}
	bad := config.File(filepath.Join(dir, "bad"))
	if err := os.WriteFile(string(bad), []byte("geheim"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readPresharedKey(bad); err == nil || strings.Contains(err.Error(), "geheim") || !strings.Contains(err.Error(), string(bad)) {
		t.Errorf("a bad key: %v", err)
	}
	if _, made, err := EnsurePrivateKey(bad); err == nil || made {
		t.Errorf("a bad key was replaced: %v", err)
	}
}

// TestKeyFilesBelongToTheirDirectory holds that root gives a key to the owner of
// its directory, and nothing else of whatever that one puts in its way.
func TestKeyFilesBelongToTheirDirectory(t *testing.T) {
	const nobody = 65534
	dir, precious := t.TempDir(), filepath.Join(t.TempDir(), "precious")
	err := errors.Join(os.WriteFile(precious, []byte("root's"), 0o600), os.Chown(dir, nobody, nobody), os.Symlink(precious, filepath.Join(dir, "taken.psk")))
	if err != nil {
		t.Fatal(err)
	}
	owner := func(path string) uint32 {
		t.Helper()
		info, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		return info.Sys().(*syscall.Stat_t).Uid
	}
	key := NewPresharedKey().Reveal()
	if err := WriteKeyFile(config.File(filepath.Join(dir, "fresh.psk")), key); err != nil {
		t.Fatal(err)
	}
	if got := owner(filepath.Join(dir, "fresh.psk")); got != nobody {
		t.Errorf("the key is of user %d", got)
	}
	if err := WriteKeyFile(config.File(filepath.Join(dir, "taken.psk")), key); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a link was followed: %v", err)
	}
	if text, err := os.ReadFile(precious); err != nil || string(text) != "root's" || owner(precious) != 0 {
		t.Errorf("%q of user %d, %v", text, owner(precious), err)
	}
}

func TestLeftover(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"alice.psk", "alice.next.psk", "gone.psk", "README", "private"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := mustParse(t, fmt.Sprintf("wireguard: {addresses: [10.66.0.1/24], presharedKeyDir: %[1]s/, privateKeyFile: %[1]s/private}\npeers:\n", dir)+
		peer(1, fmt.Sprintf(", presharedKeyFile: %[1]s/alice.psk, nextPublicKey: '%[2]s', nextPresharedKeyFile: %[1]s/./alice.next.psk", dir, key(11))))
	if got := fmt.Sprint(c.Leftover()); got != fmt.Sprintf("[%s/gone.psk]", dir) {
		t.Errorf("%s are left", got)
	}
	c.PresharedKeyDir += "none"
	if got := c.Leftover(); got != nil {
		t.Errorf("%s are left where nothing is", got)
	}
}

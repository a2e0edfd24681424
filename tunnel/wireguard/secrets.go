package wireguard

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/edgeward/edgeward/internal/config"
)

// Secrets are what the key files of a configuration hold, and what else is known
// on the gateway alone.
type Secrets struct {
	PrivateKey PrivateKey
	Preshared  map[config.File]PresharedKey
	// Failed are the files that could not be read, and why.
	Failed map[config.File]error
	// Lost is why the private key is the one that was last read; nil where it is
	// the file's.
	Lost error
	// Refused are peers that this machine cannot let in, and why.
	Refused map[Name]string
}

// ReadSecrets reads the key files of c, and makes the gateway's private key where
// it is missing; made says that it did. The error is about that key; a
// preshared key that cannot be read is in Failed, and costs only its peer.
//
// was is what was read before, with the private key's file of then; the zero
// Secrets for nothing. A key whose file is gone or cannot be read stays what it
// was: files come and go in any order, and nobody is to be cut off for that.
func ReadSecrets(c *Config, was Secrets, wasFile config.File) (s Secrets, made bool, err error) {
	s = Secrets{Preshared: map[config.File]PresharedKey{}, Failed: map[config.File]error{}}
	if was.PrivateKey.IsZero() || wasFile != c.PrivateKeyFile {
		s.PrivateKey, made, err = EnsurePrivateKey(c.PrivateKeyFile)
	} else if s.PrivateKey, err = ReadPrivateKey(c.PrivateKeyFile); err != nil {
		var open *fs.PathError
		if errors.As(err, &open) { // without the advice to make one
			err = fmt.Errorf("read private key: %w", open)
		}
		s.PrivateKey, s.Lost, err = was.PrivateKey, err, nil
	}
	if err != nil {
		return Secrets{}, false, err
	}
	if public := s.PrivateKey.Public(); !c.PublicKey.IsZero() && c.PublicKey != public {
		return Secrets{}, made, fmt.Errorf("read private key: %s belongs to public key %s, and wireguard.publicKey is %s: peers would be told the wrong one; mend one of the two", string(c.PrivateKeyFile), public, c.PublicKey)
	}
	for _, file := range c.Files() {
		if file == c.PrivateKeyFile {
			continue
		}
		key, err := readPresharedKey(file)
		if err != nil {
			s.Failed[file] = err
			key = was.Preshared[file]
		}
		if !key.IsZero() {
			s.Preshared[file] = key
		}
	}
	return s, made, nil
}

// FileWarnings says what is wrong with the key files that c names, as far as that
// can be seen from here, a sentence each. Files in a directory that cannot be read
// here are not judged.
func (c *Config) FileWarnings() []string {
	if !c.Declared() {
		return nil
	}
	var out []string
	say := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	switch _, err := ReadPrivateKey(c.PrivateKeyFile); {
	case err == nil || !visible(c.PrivateKeyFile):
	case errors.Is(err, fs.ErrNotExist) && len(c.Peers) == 0:
	case errors.Is(err, fs.ErrNotExist):
		say("%s, the gateway's private key, is missing, and a new one is made at the next start: no device of a peer knows that one; put the old key back, or give every peer a new configuration", string(c.PrivateKeyFile))
	default:
		say("%s, the gateway's private key, cannot be read here: %v", string(c.PrivateKeyFile), err)
	}
	for i := range c.Peers {
		p := &c.Peers[i]
		for _, f := range []config.File{p.PresharedKeyFile, p.NextPresharedKeyFile} {
			if f == "" || !visible(f) {
				continue
			}
			if _, err := readPresharedKey(f); err != nil {
				say("peer %s: its preshared key cannot be read here, and without it the peer is not let in: %v", p.Name, err)
			}
		}
	}
	for _, f := range c.Leftover() {
		say("%s is the preshared key of no peer: remove it if it is not to be used again", f)
	}
	return out
}

// visible reports whether the directory of a file can be read here, so that what is
// missing there is missing.
func visible(f config.File) bool {
	_, err := os.ReadDir(filepath.Dir(string(f)))
	return err == nil
}

// CheckKey fails if a peer has the public key that belongs to the gateway's private
// one; where that cannot be read it does not.
func (c *Config) CheckKey() error {
	key, err := ReadPrivateKey(c.PrivateKeyFile)
	if err != nil {
		return nil
	}
	var errs []error
	for i := range c.Peers {
		for _, k := range []struct {
			key string
			is  PublicKey
		}{{"publicKey", c.Peers[i].PublicKey}, {"nextPublicKey", c.Peers[i].NextPublicKey}} {
			if k.is == key.Public() {
				errs = append(errs, fmt.Errorf("peers[%d].%s is the gateway's own: every peer has its own", i, k.key))
			}
		}
	}
	return errors.Join(errs...)
}

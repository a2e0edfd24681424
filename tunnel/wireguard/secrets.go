package wireguard

import (
	"fmt"

	"github.com/edgeward/edgeward/internal/config"
)

// Secrets are what the key files of a configuration hold.
type Secrets struct {
	PrivateKey PrivateKey
	Preshared  map[config.File]PresharedKey
	// Failed are the files that could not be read, and why.
	Failed map[config.File]error
}

// ReadSecrets reads the key files of c, and makes the gateway's private key where
// it is missing; made says that it did. The error is about that key; a
// preshared key that cannot be read is in Failed, and costs only its peer.
func ReadSecrets(c *Config) (s Secrets, made bool, err error) {
	s = Secrets{Preshared: map[config.File]PresharedKey{}, Failed: map[config.File]error{}}
	if s.PrivateKey, made, err = EnsurePrivateKey(c.PrivateKeyFile); err != nil {
		return Secrets{}, false, err
	}
	if public := s.PrivateKey.Public(); !c.PublicKey.IsZero() && c.PublicKey != public {
		return Secrets{}, made, fmt.Errorf("read private key: %s belongs to public key %s, and wireguard.publicKey is %s: peers would be told the wrong one; mend one of the two", string(c.PrivateKeyFile), public, c.PublicKey)
	}
	for _, file := range c.Files() {
		if file == c.PrivateKeyFile {
			continue
		}
		if key, err := readPresharedKey(file); err != nil {
			s.Failed[file] = err
		} else {
			s.Preshared[file] = key
		}
	}
	return s, made, nil
}

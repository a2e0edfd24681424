package tunnel

import (
	"os"
	"path/filepath"
	"testing"
)

func TestSocketOf(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tunnel.yaml")
	if got, want := SocketOf(path), Defaults().Socket; got != want {
		t.Errorf("without a file: %s, want %s", got, want)
	}
	for text, want := range map[string]string{
		"":                                      Defaults().Socket,
		"socket: /run/x.sock\npeers: [\n":       "/run/x.sock",
		"nonsense\nsocket:  \"/run/x\"  # mine": "/run/x",
		"socket: '/run/x'\r\n}{":                "/run/x",
		"socket:\n":                             Defaults().Socket,
		"socket: relative\n":                    Defaults().Socket,
		"a:\n  socket: /run/x\n":                Defaults().Socket,
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := SocketOf(path); got != want {
			t.Errorf("%q: %s, want %s", text, got, want)
		}
	}
}

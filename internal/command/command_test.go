package command

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/edgeward/edgeward/internal/config"
)

func TestReport(t *testing.T) {
	problems := config.Problems{{File: "a.yaml", Line: 1, Column: 2, What: "one"}, {File: "a.yaml", Line: 3, Column: 4, What: "two"}}
	for name, c := range map[string]struct {
		err  error
		want string
	}{
		"one":                      {errors.New("it fails"), "prog: it fails\n"},
		"several":                  {errors.Join(errors.New("this"), fmt.Errorf("that: %w", io.EOF)), "prog: this\nprog: that: EOF\n"},
		"a file":                   {problems, "a.yaml:1:2: one\na.yaml:3:4: two\n"},
		"a file, and what it cost": {errors.Join(errors.New("nobody answers"), problems), "prog: nobody answers\na.yaml:1:2: one\na.yaml:3:4: two\n"},
	} {
		var out bytes.Buffer
		report(&out, "prog", c.err)
		if out.String() != c.want {
			t.Errorf("%s: says %q, want %q", name, out.String(), c.want)
		}
	}
}

func TestTexts(t *testing.T) {
	for got, want := range map[string]string{
		Printable("a\tb\nkäse"):        "a\tb\nkäse",
		Printable("\x1b[2J\r\u009b1m"): "\ufffd[2J\ufffd\ufffd1m",
		Shell("/etc/edgeward/a.2.psk"): "/etc/edgeward/a.2.psk",
		Shell("a b; rm -rf /"):         "'a b; rm -rf /'",
		Shell("it's"):                  `'it'\''s'`,
		Shell(""):                      "''",
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestShow(t *testing.T) {
	type value struct {
		Name string `json:"name"`
	}
	for form, want := range map[string]string{
		"table": "NAME   AGE\nalice  1\n", "json": "{\n  \"name\": \"alice\"\n}\n", "yaml": "name: alice\n",
	} {
		root := New("prog", "A program")
		root.AddCommand(&cobra.Command{Use: "list", Args: One("name", "alice"), RunE: func(cmd *cobra.Command, args []string) error {
			return Show(cmd, value{args[0]}, func(w io.Writer, v value) { fmt.Fprintf(w, "NAME\tAGE\n%s\t1\n", v.Name) })
		}})
		var out bytes.Buffer
		root.SetOut(&out)
		if code := Run(root, []string{"list", "alice", "--output", form}); code != 0 || out.String() != want {
			t.Errorf("%s: %d, %q, want %q", form, code, out.String(), want)
		}
	}
}

// TestUnknownVerb holds that what is no verb is an error at every depth, and that
// help stays what it is.
func TestUnknownVerb(t *testing.T) {
	for line, want := range map[string]string{
		"peer rvoke x1":                   `unknown command "rvoke" for "prog peer": did you mean "revoke"?`,
		"peer --output json rvoke x1":     `unknown command "rvoke" for "prog peer": did you mean "revoke"?`,
		"pear":                            `unknown command "pear" for "prog"`,
		"peer frobnicate":                 `unknown command "frobnicate" for "prog peer": there are list, revoke`,
		"peer revoke x1":                  "",
		"peer":                            "help",
		"":                                "help",
		"peer rvoke --help":               "help",
		"help peer":                       "help",
		"__complete peer re":              "revoke",
		"peer revoke --no-such-flag what": "unknown flag: --no-such-flag",
	} {
		root := New("prog", "A program")
		peer := &cobra.Command{Use: "peer"}
		for _, verb := range []string{"list", "revoke"} {
			peer.AddCommand(&cobra.Command{Use: verb, Run: func(*cobra.Command, []string) {}})
		}
		root.AddCommand(peer)
		var out bytes.Buffer
		root.SetOut(&out)
		root.SetErr(io.Discard)
		demandVerbs(root)
		root.SetArgs(strings.Fields(line))
		err := root.ExecuteContext(t.Context())
		got := ""
		switch {
		case err != nil:
			got, _, _ = strings.Cut(err.Error(), "\n") // cobra's suggestion is a line of its own
		case strings.Contains(out.String(), "Usage:"):
			got = "help"
		case strings.HasPrefix(out.String(), "revoke"):
			got = "revoke"
		}
		if got != want {
			t.Errorf("%q: %q, want %q\n%s", line, got, want, out.String())
		}
		if err != nil && out.Len() > 0 {
			t.Errorf("%q: shows help beside the error: %s", line, out.String())
		}
	}
}

package command

import (
	"bytes"
	"errors"
	"fmt"
	"io"
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

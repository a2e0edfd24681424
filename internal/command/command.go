// Package command is what the command lines of all programs share: how a program
// begins and with which exit code it ends, how errors are told, how a value is
// shown to people and to programs, and how times and numbers are written.
//
// It knows no verb but version and no program's configuration, and it never ends
// the process. The programs under cmd call it.
package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"

	"github.com/edgeward/edgeward/internal/config"
	"github.com/edgeward/edgeward/internal/daemon"
)

// New begins the command line of the program called name: with --output, the form
// in which Show shows values, and the verb version.
func New(name, short string) *cobra.Command {
	root := &cobra.Command{Use: name, Short: short, SilenceUsage: true, SilenceErrors: true}
	out := form(forms[0])
	root.PersistentFlags().Var(&out, outputFlag, strings.Join(forms, ", "))
	// The flag was made a line above, so there is nothing to fail.
	_ = root.RegisterFlagCompletionFunc(outputFlag, cobra.FixedCompletions(forms, cobra.ShellCompDirectiveNoFileComp))
	root.AddCommand(&cobra.Command{
		Use: "version", Short: "Show the version", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return Show(cmd, daemon.Version(), func(w io.Writer, v daemon.Build) { fmt.Fprintf(w, "%s %s\n", name, v) })
		},
	})
	return root
}

// Run runs one command line and returns its exit code: 0, or 1 after it has said
// on standard error what failed.
func Run(root *cobra.Command, args []string) int {
	demandVerbs(root)
	root.SetArgs(args)
	if err := root.ExecuteContext(context.Background()); err != nil {
		report(os.Stderr, root.Name(), err)
		return 1
	}
	return 0
}

// demandVerbs has each command that only groups others refuse what is none of
// them; cobra would show its help and call that success.
func demandVerbs(group *cobra.Command) {
	for _, sub := range group.Commands() {
		demandVerbs(sub)
		if !sub.HasSubCommands() || sub.Runnable() {
			continue
		}
		sub.RunE = func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			var verbs []string
			for _, v := range cmd.Commands() {
				if v.IsAvailableCommand() {
					verbs = append(verbs, v.Name())
				}
			}
			if meant := config.Nearest(args[0], verbs); meant != "" {
				return fmt.Errorf("unknown command %q for %q: did you mean %q?", args[0], cmd.CommandPath(), meant)
			}
			return fmt.Errorf("unknown command %q for %q: there are %s", args[0], cmd.CommandPath(), strings.Join(verbs, ", "))
		}
	}
}

// report tells of an error, in lines that begin with the program's name. What is
// wrong with a file begins with its place instead.
func report(w io.Writer, name string, err error) {
	var problems config.Problems
	errors.As(err, &problems)
	placed := strings.Split(problems.Error(), "\n")
	for line := range strings.SplitSeq(err.Error(), "\n") {
		if !slices.Contains(placed, line) {
			line = name + ": " + line
		}
		fmt.Fprintln(w, Printable(line))
	}
}

const outputFlag = "output"

var forms = []string{"table", "json", "yaml"}

// form is one of forms, as a flag.
type form string

func (f *form) String() string { return string(*f) }
func (f *form) Type() string   { return "string" }
func (f *form) Set(text string) error {
	if !slices.Contains(forms, text) {
		return errors.New("want " + strings.Join(forms[:2], ", ") + " or " + forms[2])
	}
	*f = form(text)
	return nil
}

// ForPeople says whether --output asks for a table, and not for what programs
// read.
func ForPeople(cmd *cobra.Command) bool { return cmd.Flag(outputFlag).Value.String() == forms[0] }

// Show writes a value to cmd's standard output as --output asks. table writes it
// for people, with a tab between columns.
func Show[T any](cmd *cobra.Command, value T, table func(io.Writer, T)) error {
	if ForPeople(cmd) {
		var text strings.Builder
		w := tabwriter.NewWriter(&text, 0, 8, 2, ' ', 0)
		table(w, value)
		_ = w.Flush() // to a builder, which takes everything
		_, err := io.WriteString(cmd.OutOrStdout(), Printable(text.String()))
		return err
	}
	text, err := json.MarshalIndent(value, "", "  ")
	if err == nil && cmd.Flag(outputFlag).Value.String() == "yaml" {
		text, err = yaml.JSONToYAML(text)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", cmd.Flag(outputFlag).Value, err)
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s\n", strings.TrimRight(string(text), "\n"))
	return err
}

// Printable is a text without what a terminal would obey and not show: it may
// come from a file or a program of somebody else's.
func Printable(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) && r != '\n' && r != '\t' {
			return unicode.ReplacementChar
		}
		return r
	}, text)
}

// Shell is a text as one word of a shell's command line, in quotes where it needs
// them.
func Shell(text string) string {
	const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+=:,@%"
	if text != "" && strings.Trim(text, plain) == "" {
		return text
	}
	return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
}

// One demands a single argument, and shows what it may look like.
func One(what, example string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return fmt.Errorf("%s: want one %s, such as: %s %s", cmd.Name(), what, cmd.CommandPath(), example)
		}
		return nil
	}
}

// Ago writes how long ago a time is; never for none.
func Ago(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return time.Since(t).Round(time.Second).String() + " ago"
}

// Moment writes a time.
func Moment(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 MST") }

// Number writes a number of things.
func Number(n int, one, many string) string {
	if n == 1 {
		many = one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// OrDash writes a dash for no text, so that a column is never empty.
func OrDash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}

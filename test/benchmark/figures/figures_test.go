package figures

import "testing"

func TestReplaceBlock(t *testing.T) {
	for _, tt := range []struct{ document, want, err string }{
		{"a\n<!-- bench -->\nold\n<!-- /bench -->\nb\n", "a\n<!-- bench -->\nnew\n<!-- /bench -->\nb\n", ""},
		{"a\n", "", "it has no <!-- bench -->"},
		{"<!-- bench -->\nold\n", "", "it has no <!-- /bench -->"},
	} {
		got, err := ReplaceBlock([]byte(tt.document), "bench", "\nnew\n\n")
		said := ""
		if err != nil {
			said = err.Error()
		}
		if string(got) != tt.want || said != tt.err {
			t.Errorf("%q: %q, %q; want %q, %q", tt.document, got, said, tt.want, tt.err)
		}
	}
}

func TestThousands(t *testing.T) {
	for n, want := range map[int]string{0: "0", 999: "999", 1000: "1,000", -123: "-123", -1234: "-1,234", 1234567: "1,234,567"} {
		if got := Thousands(n); got != want {
			t.Errorf("%d is written %s, want %s", n, got, want)
		}
	}
}

package api

import (
	"strings"
	"testing"
)

func TestOwnerNames(t *testing.T) {
	for host, want := range map[string]string{
		"app.example.org":   "_edgeward.app.example.org",
		"example.org":       "_edgeward.example.org",
		"*.example.org":     "_edgeward-wildcard.example.org",
		"*.lab.example.org": "_edgeward-wildcard.lab.example.org",
		"_x.example.org":    "_edgeward._x.example.org",
	} {
		name := ownerName(host)
		if back, ok := hostOf(name); name != want || !ok || back != host {
			t.Errorf("the owner of %s is at %s, which is of %s", host, name, back)
		}
	}
	for _, name := range []string{"example.org", "_edgeward", "edgeward.example.org", "_edgewardx.example.org"} {
		if host, ok := hostOf(name); ok {
			t.Errorf("%s is taken for the owner of %s", name, host)
		}
	}
}

func TestOwnerIn(t *testing.T) {
	for _, c := range []struct {
		content, owner string
		ok             bool
	}{
		{`"heritage=edgeward,edgeward/owner=home"`, "home", true},
		{`heritage=edgeward,edgeward/owner=home`, "home", true},
		{`"heritage=edgeward," "edgeward/owner=home"`, "home", true},
		{`"heritage=edgeward, edgeward/host=x , edgeward/owner=home "`, "home", true},
		{`"heritage=edgeward,edgeward/owner=h\"\\m"`, `h"\m`, true},
		{`"heritage=edgeward"`, "", true},
		{`"heritage=edgeward,external-dns/owner=home"`, "", true},
		{`"heritage=external-dns,external-dns/owner=home"`, "", false},
		{`"heritage=edgewardx,edgeward/owner=home"`, "", false},
		{`"edgeward/owner=home"`, "", false},
		{`"`, "", false},
		{"", "", false},
	} {
		if owner, ok := ownerIn(c.content); owner != c.owner || ok != c.ok {
			t.Errorf("%s: owner %q, %v", c.content, owner, ok)
		}
	}
}

// FuzzOwnerIn reads what anybody may write into DNS.
func FuzzOwnerIn(f *testing.F) {
	f.Add(`"heritage=edgeward,edgeward/owner=home"`, "home")
	f.Add(`"a" "\`, "a.b-c_d")
	f.Fuzz(func(t *testing.T, content, owner string) {
		ownerIn(content)
		if strings.Trim(owner, "abcdefghijklmnopqrstuvwxyz0123456789._-") != "" {
			return
		}
		if got, ok := ownerIn(ownership(owner)); got != owner || !ok {
			t.Errorf("owner %q is read as %q", owner, got)
		}
	})
}

func TestZonesAndCertificates(t *testing.T) {
	zones := []string{"example.org", "lab.example.org", "example.net"}
	for _, c := range []struct {
		host, zone string
		noted      bool
	}{
		{"example.org", "example.org", false},
		{"app.example.org", "example.org", false},
		{"*.example.org", "example.org", false},
		{"a.b.example.org", "example.org", true},
		{"*.b.example.org", "example.org", true},
		{"lab.example.org", "lab.example.org", false},
		{"a.lab.example.org", "lab.example.org", false},
		{"*.lab.example.org", "lab.example.org", false},
		{"notexample.org", "", false},
		{"example.com", "", false},
	} {
		zone, ok := zoneOf(c.host, zones)
		if zone != c.zone || ok != (c.zone != "") {
			t.Errorf("%s is in zone %q", c.host, zone)
		}
		if noted := ok && certificateNote(c.host, zone) != ""; noted != c.noted {
			t.Errorf("%s has a note: %v", c.host, noted)
		}
	}
}

func TestCovers(t *testing.T) {
	for _, c := range []struct {
		pattern, host string
		want          bool
	}{
		{"nas.example.org", "nas.example.org", true},
		{"nas.example.org", "x.nas.example.org", false},
		{"*.example.org", "nas.example.org", true},
		{"*.example.org", "a.b.example.org", true},
		{"*.example.org", "*.example.org", true},
		{"*.example.org", "example.org", false},
		{"*.example.org", "nasexample.org", false},
	} {
		if got := covers(c.pattern, c.host); got != c.want {
			t.Errorf("%s covers %s: %v", c.pattern, c.host, got)
		}
	}
}

package api

import (
	"fmt"
	"strings"
)

// targetSuffix ends the name that a tunnel has in DNS.
const targetSuffix = ".cfargotunnel.com"

// Target is the name that a tunnel has in DNS, to which a host's CNAME leads.
func Target(id string) string { return id + targetSuffix }

// heritage begins the text of an ownership record, in the form that
// external-dns made known: comma-separated words, the owner among them.
const (
	heritage = "heritage=edgeward"
	ownerKey = "edgeward/owner="
)

// Where the ownership record of a host stands: below it, so that it is in the
// host's zone even if the host is the zone; a wildcard's has a name of its own,
// as a star may only be the first label.
const (
	ownerLabel    = "_edgeward."
	wildcardLabel = "_edgeward-wildcard."
	longestHost   = 253 - len(wildcardLabel)
)

// ownerName is the name of a host's ownership record.
func ownerName(host string) string {
	if rest, wild := strings.CutPrefix(host, "*."); wild {
		return wildcardLabel + rest
	}
	return ownerLabel + host
}

// hostOf is the host whose ownership record has the name, if any has.
func hostOf(name string) (host string, ok bool) {
	if rest, ok := strings.CutPrefix(name, wildcardLabel); ok {
		return "*." + rest, true
	}
	return strings.CutPrefix(name, ownerLabel)
}

// ownership is the text of an ownership record, in quotes as DNS has it.
func ownership(owner string) string { return `"` + heritage + "," + ownerKey + owner + `"` }

// ownerIn reads the text of an ownership record. One that says edgeward without
// an owner belongs to nobody we know: its owner is empty.
func ownerIn(content string) (owner string, ok bool) {
	words := strings.Split(unquote(content), ",")
	if strings.TrimSpace(words[0]) != heritage {
		return "", false
	}
	for _, w := range words[1:] {
		if owner, ok := strings.CutPrefix(strings.TrimSpace(w), ownerKey); ok {
			return owner, true
		}
	}
	return "", true
}

// unquote joins the strings of a TXT record: "a" "b", or a without quotes.
func unquote(content string) string {
	if !strings.HasPrefix(content, `"`) {
		return content
	}
	var out strings.Builder
	inside := false
	for i := 0; i < len(content); i++ {
		switch c := content[i]; {
		case c == '\\' && i+1 < len(content):
			i++
			out.WriteByte(content[i])
		case c == '"':
			inside = !inside
		case inside:
			out.WriteByte(c)
		}
	}
	return out.String()
}

// zoneOf is the zone that a host is in: of those that end its name the longest.
func zoneOf(host string, zones []string) (zone string, ok bool) {
	for _, z := range zones {
		if (host == z || strings.HasSuffix(host, "."+z)) && len(z) > len(zone) {
			zone, ok = z, true
		}
	}
	return zone, ok
}

// covers reports whether a pattern, a host or *.DOMAIN, stands for a host.
func covers(pattern, host string) bool {
	rest, wild := strings.CutPrefix(pattern, "*")
	return pattern == host || wild && strings.HasSuffix(host, rest)
}

// certificateNote warns of a host that no certificate covers unless one was
// ordered: those that Cloudflare gives every zone name it and one label below.
func certificateNote(host, zone string) string {
	below := strings.TrimSuffix(strings.TrimSuffix(host, zone), ".")
	if !strings.Contains(below, ".") {
		return ""
	}
	return fmt.Sprintf("Universal SSL covers %s and one label below it: order a certificate for %s, or use one label", zone, host)
}

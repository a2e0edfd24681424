package bouncer

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/edgeward/edgeward/internal/decision"
	"github.com/edgeward/edgeward/internal/nft"
)

const lapiSection = "lapi:\n  url: http://lapi:8080\n  keyFile: /etc/edgeward/lapi-key\n"

func TestConfigBecomesRuleset(t *testing.T) {
	c, err := Parse("bouncer.yaml", []byte(lapiSection+`
mode: observe
firewall:
  points: [input, forward]
  action: reject
  replies: drop
  synPriority: -310
  priority: -140
  exempt: [lo, "cni*"]
  log: {enabled: true, perSecond: 2, burst: 9, group: 5}
  shared: true
  locks:
    - name: ingress
      ports: [80, 443]
      from: [cloudflare, 192.0.2.0/24]
      to: [198.51.100.1]
`))
	if err != nil {
		t.Fatal(err)
	}
	cloudflare, _ := decision.Known("cloudflare")
	want := nft.Config{
		Points: []nft.Point{nft.Input, nft.Forward}, SYNPriority: -310, Priority: -140, DropReplies: true, Observe: true,
		Action: nft.Reject, Exempt: []string{"lo", "cni*"}, Log: &nft.Log{PerSecond: 2, Burst: 9, Group: 5},
		Locks: []nft.Lock{{
			Name: "ingress", Ports: []uint16{80, 443}, From: append(cloudflare, netip.MustParsePrefix("192.0.2.0/24")),
			To: []netip.Prefix{netip.MustParsePrefix("198.51.100.1/32")},
		}},
	}
	if d := cmp.Diff(want, c.nft(), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); d != "" {
		t.Error(d)
	}
	if c, err = Parse("bouncer.yaml", []byte(lapiSection)); err != nil {
		t.Fatal(err)
	}
	if got := c.nft(); got.Observe || got.DropReplies || got.Log != nil || len(got.Points) != 1 || len(got.Exempt) == 0 || c.Firewall.Shared {
		t.Errorf("by default the ruleset is %+v", got)
	}
}

func TestConfigSaysWhatIsWrong(t *testing.T) {
	for text, want := range map[string]string{
		"":                             `lapi.url: is missing`,
		lapiSection + "mode: blocc":    `mode: "blocc": want enforce or observe`,
		lapiSection + "modus: observe": `unknown key "modus": did you mean "mode"?`,
		lapiSection + "decisions: {remediations: []}":                                           `decisions.remediations: is empty`,
		lapiSection + "decisions: {remediations: [bann]}":                                       `want ban, captcha or throttle`,
		lapiSection + "decisions: {fallback: drop}":                                             `want ban, captcha or ignore`,
		lapiSection + "protect: {addresses: [0.0.0.0/0]}":                                       `protects everybody`,
		lapiSection + "protect: {addresses: [lan]}":                                             `want a range such as`,
		lapiSection + "firewall: {points: [ingress]}":                                           `want prerouting, input or forward`,
		lapiSection + "firewall: {action: deny}":                                                `want drop or reject`,
		lapiSection + "firewall: {replies: no}":                                                 `want keep or drop`,
		lapiSection + "firewall: {priority: -250}":                                              `firewall: priority -250 is not after connection tracking`,
		lapiSection + "firewall: {exempt: [\"a*b\"]}":                                           `no interface is called`,
		lapiSection + "firewall: {locks: [{name: x, from: [cloudflare]}]}":                      `lock "x" has no ports`,
		lapiSection + "firewall: {locks: [{name: x, ports: [80], from: [a]}]}":                  `want an address, a range, or cloudflare or private`,
		lapiSection + "socket: bouncer.sock":                                                    `want an absolute path`,
		lapiSection + "stateDir: state":                                                         `want an absolute path`,
		lapiSection + "listen: 127.0.0.1:0":                                                     `listen: `,
		"lists: [{name: a, path: lists/a}]":                                                     `lists[0].path: "lists/a": want the absolute path of a file`,
		"lists: [{name: a/b, path: /a}]":                                                        `lists[0].name: "a/b": want letters, digits`,
		"lists: [{path: /a}]":                                                                   `lists[0].name: "": want letters, digits`,
		"lists: [{name: a, path: /a}, {name: a, path: /b}]":                                     `lists[1].name: "a": another list has this name`,
		"lists: [{name: a, path: /a, remediation: drop}]":                                       `want ban, captcha or throttle`,
		"lists: [{name: a, path: /a}]\nlapi: {keyFile: /k}":                                     `lapi.url: is missing`,
		lapiSection + "auth: {trustedProxies: [10.42.0.0/16]}":                                  `auth.listen: is missing`,
		lapiSection + "auth: {listen: 10.0.0.1:9478}":                                           `auth.trustedProxies: is missing`,
		lapiSection + "auth: {listen: 10.0.0.1:0, trustedProxies: [private]}":                   `auth.listen: `,
		lapiSection + "auth: {listen: 10.0.0.1:1, trustedProxies: [0.0.0.0/0]}":                 `auth.trustedProxies[0]: trusts everybody`,
		lapiSection + "auth: {listen: 10.0.0.1:1, trustedProxies: [lan]}":                       `want an address, a range, or cloudflare or private`,
		lapiSection + "auth: {listen: 10.0.0.1:1, trustedProxies: [private], header: \"a b\"}":  `auth.header: "a b" is not the name of a header`,
		lapiSection + "auth: {listen: 10.0.0.1:1, trustedProxies: [private], remediations: []}": `auth.remediations: is empty`,
		lapiSection + "logFormat: xml":                                                          `want json or text`,
	} {
		_, err := Parse("bouncer.yaml", []byte(text))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
}

func TestWhatIsEnforced(t *testing.T) {
	c, err := Parse("bouncer.yaml", []byte(lapiSection+`
decisions:
  remediations: [ban, captcha]
  origins: [crowdsec, lists, CAPI]
  exceptOrigins: ["lists:noisy"]
  exceptScenarios: [http]
  fallback: ban
`))
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []struct {
		class decision.Class
		all   bool
		local bool
	}{
		{decision.Class{Remediation: decision.Ban, Origin: "crowdsec", Scenario: "ssh"}, true, true},
		{decision.Class{Remediation: decision.Captcha, Origin: "crowdsec", Scenario: "ssh"}, true, true},
		{decision.Class{Remediation: decision.Throttle, Origin: "crowdsec", Scenario: "ssh"}, false, false},
		{decision.Class{Remediation: decision.Unknown, Origin: "crowdsec", Scenario: "ssh"}, true, true},
		{decision.Class{Remediation: decision.Ban, Origin: "crowdsec", Scenario: "http-bf"}, false, false},
		{decision.Class{Remediation: decision.Ban, Origin: "cscli", Scenario: "manual"}, false, false},
		{decision.Class{Remediation: decision.Ban, Origin: "capi", Scenario: "ssh"}, true, false},
		{decision.Class{Remediation: decision.Ban, Origin: "lists:good", Scenario: "x"}, true, false},
		{decision.Class{Remediation: decision.Ban, Origin: "lists:noisy", Scenario: "x"}, false, false},
	} {
		if got := c.policy(false).Accept(d.class); got != d.all {
			t.Errorf("%+v counts: %v", d.class, got)
		}
		if got := c.policy(true).Accept(d.class); got != d.local {
			t.Errorf("%+v counts on private addresses: %v", d.class, got)
		}
	}
	if got := originOf(decision.Class{Origin: "lists", Scenario: "firehol"}); got != "lists:firehol" {
		t.Error(got)
	}
}

// TestListsStandInForLAPI: either is enough.
func TestListsStandInForLAPI(t *testing.T) {
	c, err := Parse("bouncer.yaml", []byte("lists: [{name: mine, path: /etc/edgeward/lists/mine.netset}, {name: x, path: /x, remediation: captcha}]"))
	if err != nil {
		t.Fatal(err)
	}
	want := []ListConfig{{"mine", "/etc/edgeward/lists/mine.netset", "ban"}, {"x", "/x", "captcha"}}
	if d := cmp.Diff(want, c.Lists); d != "" || c.hasLAPI() {
		t.Error(d, c.hasLAPI())
	}
}

package cloudflare

import (
	"encoding/base64"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

const (
	someAccount = "0123456789abcdef0123456789abcdef"
	someTunnel  = "6f1c1c3e-4f0a-4d3c-9a3e-0123456789ab"
	someSecret  = "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2U=" // 32 bytes
)

func TestCredentials(t *testing.T) {
	token := func(json string) string { return base64.StdEncoding.EncodeToString([]byte(json)) }
	good := fmt.Sprintf(`{"a":%q,"t":%q,"s":%q}`, someAccount, someTunnel, someSecret)
	file := fmt.Sprintf(`{"AccountTag":%q,"TunnelID":%q,"TunnelSecret":%q,"TunnelName":"home"}`, someAccount, someTunnel, someSecret)
	for _, c := range []struct {
		name  string
		parse func([]byte) (Credentials, error)
		text  string
		want  string // in the error; empty: none
	}{
		{"token", ParseToken, token(good), ""},
		{"token with a line end", ParseToken, token(good) + "\n", ""},
		{"token with a new key", ParseToken, token(good[:len(good)-1] + `,"x":1}`), ""},
		{"empty token", ParseToken, " \n", "it is empty"},
		{"credentials as token", ParseToken, file, "name it as one"},
		{"half a token", ParseToken, token(good)[:40], "whole token"},
		{"token in a sentence", ParseToken, "cloudflared tunnel run --token " + token(good), "nothing but the token"},
		{"token without secret", ParseToken, token(fmt.Sprintf(`{"a":%q,"t":%q}`, someAccount, someTunnel)), "its secret has 0 bytes"},
		{"token with a bad tunnel", ParseToken, token(strings.Replace(good, someTunnel, "home", 1)), "not a UUID"},
		{"token with a bad account", ParseToken, token(strings.Replace(good, someAccount, "home", 1)), "32 hexadecimal"},
		{"token of another network", ParseToken, token(good[:len(good)-1] + `,"e":"fed"}`), "separate network"},
		{"file", ParseCredentials, file, ""},
		{"empty file", ParseCredentials, "", "it is empty"},
		{"token as file", ParseCredentials, token(good), "if it is a tunnel token"},
		{"half a file", ParseCredentials, file[:60], "not the JSON"},
		{"file without tunnel", ParseCredentials, strings.Replace(file, someTunnel, "", 1), "not a UUID"},
		{"file twice", ParseCredentials, file + file, "not the JSON"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := c.parse([]byte(c.text))
			if c.want == "" {
				if err != nil || got.Account != someAccount || got.Tunnel.String() != someTunnel || len(got.Secret) != 32 {
					t.Errorf("%v, %v", got, err)
				}
			} else if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "c2Vjc") {
				t.Errorf("error %q, want %q and no secret", err, c.want)
			}
		})
	}

	c, _ := ParseToken([]byte(token(good)))
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "c", c)
	for _, text := range []string{log.String(), fmt.Sprint(c), fmt.Sprintf("%+v %#v %s", c, c, c), fmt.Sprintf("%v", &c)} {
		if strings.Contains(text, "secret") || strings.Contains(text, "115") || !strings.Contains(text, someTunnel) {
			t.Errorf("printed as %s", text)
		}
	}
}

func FuzzCredentials(f *testing.F) {
	f.Add(fmt.Sprintf(`{"a":%q,"t":%q,"s":%q}`, someAccount, someTunnel, someSecret))
	f.Add(fmt.Sprintf(`{"AccountTag":%q,"TunnelID":%q,"TunnelSecret":%q}`, someAccount, someTunnel, someSecret))
	f.Fuzz(func(t *testing.T, text string) {
		for _, parse := range []func([]byte) (Credentials, error){ParseToken, ParseCredentials} {
			for _, text := range []string{text, base64.StdEncoding.EncodeToString([]byte(text))} {
				c, err := parse([]byte(text))
				if err == nil && (len(c.Secret) < 32 || len(c.Account) != 32) {
					t.Errorf("took %q", text)
				}
				if err != nil && len(text) > 12 && strings.Contains(err.Error(), text) {
					t.Errorf("quoted %q", text)
				}
			}
		}
	})
}

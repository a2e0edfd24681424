package plugin

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const (
	tunnelKeyA = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa="
	tunnelKeyB = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb="
)

// tunnelMAC signs, as written down in package tunnel.
func tunnelMAC(key, at, scheme, addr, method, host string) string {
	mac := hmac.New(sha256.New, []byte(key))
	_, _ = fmt.Fprintf(mac, "edgeward-client v1\n%s\n%s\n%s\n%s\n%s", at, scheme, addr, method, host)
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// tunnelValue is the header for a GET of site.example.
func tunnelValue(key string, at time.Time, addr string) string {
	unix := fmt.Sprint(at.Unix())
	return "v1 " + unix + " https " + addr + " " + tunnelMAC(key, unix, "https", addr, "GET", "site.example")
}

func TestTunnelIsBelievedForWhatItSigned(t *testing.T) {
	now := time.Now()
	good := tunnelValue(tunnelKeyA, now, "203.0.113.7")
	for _, c := range []struct {
		name   string
		values []string
		method string
		host   string
		want   string // the address, or "" for not believed
	}{
		{"what was signed", []string{good}, "GET", "site.example", "203.0.113.7"},
		{"a host in other letters, with a port", []string{good}, "GET", "Site.Example:8443", "203.0.113.7"},
		{"IPv6", []string{tunnelValue(tunnelKeyA, now, "2001:db8::7")}, "GET", "site.example", "2001:db8::7"},
		{"the key before", []string{tunnelValue(tunnelKeyB, now, "203.0.113.7")}, "GET", "site.example", "203.0.113.7"},
		{"two signatures, the second known", []string{strings.Replace(good, " https 203.0.113.7 ", " https 203.0.113.7 AAAA ", 1)}, "GET", "site.example", "203.0.113.7"},
		{"nearly too old", []string{tunnelValue(tunnelKeyA, now.Add(-59*time.Second), "203.0.113.7")}, "GET", "site.example", "203.0.113.7"},
		{"a clock that is ahead", []string{tunnelValue(tunnelKeyA, now.Add(59*time.Second), "203.0.113.7")}, "GET", "site.example", "203.0.113.7"},

		{"another host", []string{good}, "GET", "admin.example", ""},
		{"another method", []string{good}, "POST", "site.example", ""},
		{"another address", []string{strings.Replace(good, "203.0.113.7", "203.0.113.8", 1)}, "GET", "site.example", ""},
		{"another scheme", []string{strings.Replace(good, "https", "http", 1)}, "GET", "site.example", ""},
		{"another key", []string{tunnelValue("cccccccccccccccccccccccccccccccccccc", now, "203.0.113.7")}, "GET", "site.example", ""},
		{"an empty key", []string{tunnelValue("", now, "203.0.113.7")}, "GET", "site.example", ""},
		{"too old", []string{tunnelValue(tunnelKeyA, now.Add(-62*time.Second), "203.0.113.7")}, "GET", "site.example", ""},
		{"from the future", []string{tunnelValue(tunnelKeyA, now.Add(62*time.Second), "203.0.113.7")}, "GET", "site.example", ""},
		{"twice", []string{good, good}, "GET", "site.example", ""},
		{"a list", []string{good + ", " + good}, "GET", "site.example", ""},
		{"nothing", []string{""}, "GET", "site.example", ""},
		{"an address alone", []string{"203.0.113.7"}, "GET", "site.example", ""},
		{"no signature", []string{good[:strings.LastIndexByte(good, ' ')]}, "GET", "site.example", ""},
		{"an empty signature", []string{good[:strings.LastIndexByte(good, ' ')+1]}, "GET", "site.example", ""},
		{"half a signature", []string{good[:len(good)-10]}, "GET", "site.example", ""},
		{"another version", []string{"v2" + good[2:]}, "GET", "site.example", ""},
		{"more spaces", []string{strings.Replace(good, " https", "  https", 1)}, "GET", "site.example", ""},
		{"very long", []string{good + " " + strings.Repeat("A", 1000)}, "GET", "site.example", ""},
		{"a zone, signed", []string{tunnelValue(tunnelKeyA, now, "fe80::1%eth0")}, "GET", "site.example", ""},
		{"no address, signed", []string{tunnelValue(tunnelKeyA, now, "home")}, "GET", "site.example", ""},
	} {
		client, why := believed([][]byte{[]byte(tunnelKeyA), []byte(tunnelKeyB)}, 60, now.Unix(), c.values, c.method, c.host)
		got := ""
		if client != nil {
			got = client.address[0]
			if addr, _ := netip.AddrFromSlice(client.octets); addr.String() != c.want {
				t.Errorf("%s: the octets are %v", c.name, client.octets)
			}
		}
		if got != c.want || (why == "") != (c.want != "") {
			t.Errorf("%s: %q because %q, want %q", c.name, got, why, c.want)
		}
	}
	if _, why := believed([][]byte{}, 60, now.Unix(), []string{tunnelValue("", now, "203.0.113.7")}, "GET", "site.example"); why == "" {
		t.Error("without a key anything is believed")
	}
}

// TestTunnelValueIsTheWritersOwn holds the reader to a value that package tunnel
// wrote: its test has the same.
func TestTunnelValueIsTheWritersOwn(t *testing.T) {
	keys := [][]byte{[]byte(tunnelKeyA)}
	value := "v1 1700000000 https 203.0.113.7 " + tunnelMAC(tunnelKeyA, "1700000000", "https", "203.0.113.7", "GET", "app.example.com")
	if value != tunnelWritten {
		t.Errorf("the value is %q", value)
	}
	if _, why := believed(keys, 60, 1700000030, []string{tunnelWritten}, "GET", "App.example.com:443"); why != "" {
		t.Error(why)
	}
}

const tunnelWritten = "v1 1700000000 https 203.0.113.7 nBFdIYWrFfKCw76tK85cTrpV4sNO8uWkUvsfYtsmnNE"

// echo answers with what the middleware left of a request.
var echo = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	w.Header()["Remote"] = []string{r.RemoteAddr}
	for name, values := range r.Header {
		w.Header()["Got-"+name] = values
	}
	w.WriteHeader(http.StatusTeapot)
})

// followed puts a handler behind a middleware with the preset and returns the
// whole of it.
func followed(s *site, next http.Handler) *handler {
	if short, ok := s.h.(*tunnelled); ok {
		short.next = next
		short.all.next = next
		return short.all
	}
	h := s.h.(*handler)
	h.next = next
	return h
}

func TestPreset(t *testing.T) {
	lapi := startLAPI(decisionRow(1, "203.0.113.66", "ban", "crowdsec"), decisionRow(2, "10.42.0.9", "ban", "crowdsec"))
	defer lapi.Close()
	config := pulling(lapi, "preset")
	config.Client.Preset = tunnelPreset
	config.Client.Key = tunnelKeyA
	s := open(t, config)
	forged := func(r *http.Request) {
		r.Header.Set("X-Forwarded-For", "203.0.113.66")
		r.Header.Set("X-Real-Ip", "203.0.113.66")
		r.Header.Set("Cf-Connecting-Ip", "203.0.113.66")
		r.Header.Set("Forwarded", "for=203.0.113.66")
	}
	by := func(addr string) func(r *http.Request) {
		return func(r *http.Request) {
			forged(r)
			r.Header.Set(tunnelHeader, tunnelValue(tunnelKeyA, time.Now(), addr))
		}
	}
	for end := time.Now().Add(5 * time.Second); s.get("10.42.0.5", by("203.0.113.66")).Code != 403; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("a banned visitor of the tunnel is never refused")
		}
	}
	for _, c := range []struct {
		name string
		peer string
		edit func(*http.Request)
		want int
	}{
		{"a visitor of the tunnel", "10.42.0.5", by("203.0.113.7"), 418},
		{"behind the same connection, a banned one", "10.42.0.5", by("203.0.113.66"), 403},
		{"a pod that poses as the tunnel", "10.42.0.9", forged, 403},
		{"a pod that claims to be a banned visitor is itself", "10.42.0.8", forged, 418},
		{"a banned pod that made a signature up", "10.42.0.9", func(r *http.Request) {
			r.Header.Set(tunnelHeader, tunnelValue(tunnelKeyB, time.Now(), "203.0.113.7"))
		}, 403},
		{"a banned pod that uses one for another host", "10.42.0.9", func(r *http.Request) {
			by("203.0.113.7")(r)
			r.Host = "other.example"
		}, 403},
		{"a banned peer that the tunnel signs for", "10.42.0.9", by("203.0.113.7"), 418},
	} {
		if got := s.get(c.peer, c.edit).Code; got != c.want {
			t.Errorf("%s gets %d, want %d", c.name, got, c.want)
		}
	}

	// What is behind the middleware sees the same.
	followed(s, echo)
	got := s.get("10.42.0.5", by("203.0.113.7"))
	for name, want := range map[string]string{
		"Remote": "203.0.113.7:0", "Got-X-Real-Ip": "203.0.113.7", "Got-Cf-Connecting-Ip": "203.0.113.7", "Got-X-Forwarded-Proto": "https", "Got-X-Forwarded-Port": "443",
		"Got-X-Forwarded-For": "", "Got-" + tunnelHeader: "",
	} {
		if values := got.Header()[name]; strings.Join(values, "|") != want {
			t.Errorf("a visitor's %s is %q, want %q", name, values, want)
		}
	}
	got = s.get("10.42.0.8", func(r *http.Request) {
		by("203.0.113.7")(r)
		r.Header.Set(tunnelHeader, tunnelValue(tunnelKeyB, time.Now(), "203.0.113.7"))
	})
	for name, want := range map[string]string{
		"Remote": "10.42.0.8:4711", "Got-X-Real-Ip": "10.42.0.8", "Got-Cf-Connecting-Ip": "", "Got-X-Forwarded-For": "", "Got-Forwarded": "", "Got-" + tunnelHeader: "",
	} {
		if values := got.Header()[name]; strings.Join(values, "|") != want {
			t.Errorf("a forger's %s is %q, want %q", name, values, want)
		}
	}

	// A second middleware knows the visitor that the first made known.
	again := open(t, config)
	followed(again, echo)
	followed(s, again.h)
	got = s.get("10.42.0.5", by("2001:db8::7"))
	if remote, shown := got.Header().Get("Remote"), got.Header().Get("Got-X-Real-Ip"); remote != "[2001:db8::7]:0" || shown != "2001:db8::7" || got.Header().Get("Got-Cf-Connecting-Ip") != "2001:db8::7" {
		t.Errorf("behind two middlewares the visitor is %s and %s", remote, shown)
	}
	followed(s, passed)
}

func TestPresetLimitsVisitorsNotTheTunnel(t *testing.T) {
	forgetLimits()
	config := CreateConfig()
	config.Log.Level = "error"
	config.Client.Preset = tunnelPreset
	config.Client.Key = tunnelKeyA
	config.RateLimits = []RateLimitConfig{{Name: "two", Average: 2, Period: "1h"}}
	s := open(t, config)
	for _, c := range []struct {
		addr string
		want int
	}{{"203.0.113.1", 418}, {"203.0.113.1", 418}, {"203.0.113.1", 429}, {"203.0.113.2", 418}} {
		c := c
		got := s.get("10.42.0.5", func(r *http.Request) { r.Header.Set(tunnelHeader, tunnelValue(tunnelKeyA, time.Now(), c.addr)) })
		if got.Code != c.want {
			t.Errorf("%s gets %d, want %d", c.addr, got.Code, c.want)
		}
	}
}

func TestKeysRotate(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "key")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	config := CreateConfig()
	config.Log.Level = "error"
	config.Client.Preset = tunnelPreset
	config.Client.KeyFile = file
	s := open(t, config)
	h := followed(s, echo)
	known := func(key string) bool {
		h.tunnel.reread(time.Now().Unix())
		got := s.get("10.42.0.5", func(r *http.Request) { r.Header.Set(tunnelHeader, tunnelValue(key, time.Now(), "203.0.113.7")) })
		return got.Header().Get("Remote") == "203.0.113.7:0"
	}
	if known(tunnelKeyA) || known("") {
		t.Error("a signature is believed without any key")
	}
	write(tunnelKeyA + "\n")
	if !known(tunnelKeyA) {
		t.Error("the key is not read when it comes")
	}
	for _, bad := range []string{"short", "", strings.Repeat("two lines\n", 9)} {
		write(bad)
		if !known(tunnelKeyA) {
			t.Errorf("%q takes the last good key away", bad)
		}
	}
	write(tunnelKeyB)
	if known(tunnelKeyA) || !known(tunnelKeyB) {
		t.Error("the new key does not take the old one's place")
	}
	// Beside a request, once it is time.
	write(tunnelKeyA)
	h.tunnel.read.Store(time.Now().Unix() - tunnelReread)
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		got := s.get("10.42.0.5", func(r *http.Request) { r.Header.Set(tunnelHeader, tunnelValue(tunnelKeyA, time.Now(), "203.0.113.7")) })
		if got.Header().Get("Remote") == "203.0.113.7:0" {
			break
		}
		if time.Now().After(end) {
			t.Fatal("keys are not read again")
		}
	}
}

// FuzzBelieved demands that nothing but what was signed is believed.
func FuzzBelieved(f *testing.F) {
	f.Add(tunnelValue(tunnelKeyA, time.Unix(1700000000, 0), "203.0.113.7"), "GET", "site.example", int64(1700000000))
	f.Add("v1 1 https 1.2.3.4 AAAA AAAA", "GET", "x", int64(0))
	f.Add("v1\n1", "G\nT", "\xff", int64(-1))
	f.Fuzz(func(t *testing.T, value, method, host string, now int64) {
		client, why := believed([][]byte{[]byte(tunnelKeyA)}, 60, now, []string{value}, method, host)
		if (client == nil) != (why != "") {
			t.Fatal("believed, or not?")
		}
		if why != "" {
			return
		}
		parts := strings.Split(value, " ")
		want := tunnelMAC(tunnelKeyA, parts[1], parts[2], parts[3], method, hostOf(host))
		if parts[len(parts)-1] != want && parts[4] != want {
			t.Fatalf("%q is believed", value)
		}
	})
}

// BenchmarkPreset is what a request costs that the tunnel signed; compiled, and
// interpreted as in Traefik: of a visitor who made one this second, and of
// another.
func BenchmarkPreset(b *testing.B) {
	for _, again := range []bool{true, false} {
		again := again
		b.Run(map[bool]string{true: "again", false: "first"}[again], func(b *testing.B) {
			config := CreateConfig()
			config.Client.Preset = tunnelPreset
			config.Client.Key = tunnelKeyA
			config.Log.Level = "error"
			h, err := New(context.Background(), passed, config, "edgeward@bench")
			if err != nil {
				b.Fatal(err)
			}
			rec := httptest.NewRecorder()
			req := httptest.NewRequest(http.MethodGet, "http://site.example/", nil)
			values := [][]string{}
			for i := 0; i < 4096; i++ {
				addr := netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)}).String()
				values = append(values, []string{tunnelValue(tunnelKeyA, time.Now(), addr)})
			}
			b.ResetTimer()
			for i := 0; i < b.N; i++ {
				req.RemoteAddr = "10.42.0.5:4711"
				if again {
					req.Header[tunnelHeader] = values[0]
				} else {
					if i&4095 == 0 {
						h.(*tunnelled).tunnel.keys.Store(&tunnelBelief{keys: [][]byte{[]byte(tunnelKeyA)}})
					}
					req.Header[tunnelHeader] = values[i&4095]
				}
				h.ServeHTTP(rec, req)
			}
		})
	}
}

// TestWhatIsKnownGrowsOld demands that a signature which was believed is not for
// ever, nor after its key has gone.
func TestWhatIsKnownGrowsOld(t *testing.T) {
	config := CreateConfig()
	config.Log.Level = "error"
	config.Client.Preset = tunnelPreset
	config.Client.Key = tunnelKeyA
	config.Client.MaxAge = "5s"
	s := open(t, config)
	h := followed(s, echo)
	ask := func(value, host string) string {
		return s.get("10.42.0.5", func(r *http.Request) {
			r.Header.Set(tunnelHeader, value)
			r.Host = host
		}).Header().Get("Remote")
	}
	value := tunnelValue(tunnelKeyA, time.Now().Add(-3*time.Second), "203.0.113.7")
	for i := 0; i < 2; i++ {
		if got := ask(value, "site.example"); got != "203.0.113.7:0" {
			t.Fatalf("turn %d: the visitor is %s", i, got)
		}
		if got := ask(value, "other.example"); got != "10.42.0.5:4711" {
			t.Errorf("turn %d: on another host the visitor is %s", i, got)
		}
	}
	h.tunnel.source.key = tunnelKeyB
	h.tunnel.reread(time.Now().Unix())
	if got := ask(value, "site.example"); got != "10.42.0.5:4711" {
		t.Errorf("under a new key the visitor is %s", got)
	}
	h.tunnel.source.key = tunnelKeyA
	h.tunnel.reread(time.Now().Unix())
	if got := ask(value, "site.example"); got != "203.0.113.7:0" {
		t.Errorf("under the old key the visitor is %s", got)
	}
	h.tunnel.source.maxAge = 1
	if got := ask(value, "site.example"); got != "10.42.0.5:4711" {
		t.Errorf("too late the visitor is %s", got)
	}
	for i := 0; i < tunnelKnown+10; i++ {
		h.tunnel.keys.Load().(*tunnelBelief).n.Add(1)
	}
	h.tunnel.source.maxAge = 60
	if ask(tunnelValue(tunnelKeyA, time.Now(), "203.0.113.8"), "site.example"); h.tunnel.keys.Load().(*tunnelBelief).n.Load() != 0 {
		t.Error("what is known grows without end")
	}
}

// TestWhatIsKnownIsSmall sends one signature with ports as no tunnel lets them
// through: they must not be remembered by the megabyte.
func TestWhatIsKnownIsSmall(t *testing.T) {
	config := CreateConfig()
	config.Log.Level = "error"
	config.Client.Preset = tunnelPreset
	config.Client.Key = tunnelKeyA
	s := open(t, config)
	h := followed(s, echo)
	value := tunnelValue(tunnelKeyA, time.Now(), "203.0.113.7")
	ask := func(host string) int32 {
		got := s.get("10.42.0.5", func(r *http.Request) {
			r.Header.Set(tunnelHeader, value)
			r.Host = host
		}).Header().Get("Remote")
		if got != "203.0.113.7:0" {
			t.Errorf("at %.40s the visitor is %s", host, got)
		}
		return h.tunnel.keys.Load().(*tunnelBelief).n.Load()
	}
	if n := ask("site.example:443"); n != 1 {
		t.Fatalf("%d are known", n)
	}
	if n := ask("site.example:" + strings.Repeat("9", 60000)); n != 1 {
		t.Errorf("%d are known, one of them with a port of 60000 digits", n)
	}
}

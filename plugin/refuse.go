package plugin

import (
	"bytes"
	"encoding/json"
	"html/template"
	"log/slog"
	"net/http"
	"os"
	"strconv"
	"strings"
)

// refusal is what a refused client is told. It never names the scenario or the
// origin: those are the operator's, in the log, under the decision's id.
type refusal struct {
	Status   int
	Reason   string // one sentence
	Address  string
	Decision int // 0 for none
	slug     string
	logged   string
}

// builtinPage is shown to browsers unless ban.pageFile gives another.
const builtinPage = `<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex"><title>{{.Status}}</title>
<style>body{font-family:system-ui,sans-serif;max-width:34rem;margin:18vh auto 0;padding:0 1.5rem;color:#222;background:#fff}
h1{font-size:1.4rem;margin:0 0 .6rem}p{line-height:1.5}small{color:#666}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#161616}small{color:#999}}</style></head>
<body><h1>{{.Reason}}</h1>
<p>If you think this is a mistake, tell the owner of this site the line below.</p>
<p><small>address {{.Address}}{{if .Decision}} &middot; decision {{.Decision}}{{end}}</small></p></body></html>
`

// page returns the template for browsers: the operator's file, or the built-in
// page where there is none or it cannot be used, which is logged. A page is no
// reason to take a site down.
func page(file string, log *slog.Logger) *template.Template {
	builtin := template.Must(template.New("page").Parse(builtinPage))
	if file == "" {
		return builtin
	}
	text, err := os.ReadFile(file)
	if err == nil {
		var own *template.Template
		own, err = template.New("page").Parse(string(text))
		if err == nil {
			if err = own.Execute(new(bytes.Buffer), refusal{Status: 403, Reason: "test", Address: "192.0.2.1", Decision: 1}); err == nil {
				return own
			}
		}
	}
	log.Error("cannot use ban.pageFile, showing the built-in page", "component", "plugin", "file", file, "err", err.Error())
	return builtin
}

// answer writes a refusal in the form that the client asked for. No cache may
// keep it: the next visitor is another one.
func answer(rw http.ResponseWriter, req *http.Request, r refusal, html *template.Template) {
	header := rw.Header()
	header.Set("Cache-Control", "no-store")
	header.Set("Vary", "Accept")
	header.Set("X-Content-Type-Options", "nosniff")
	var body bytes.Buffer
	switch preferred(req.Header.Get("Accept")) {
	case "html":
		header.Set("Content-Type", "text/html; charset=utf-8")
		header.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
		if err := html.Execute(&body, r); err != nil {
			body.Reset()
			_, _ = body.WriteString(strconv.Itoa(r.Status))
		}
	case "json":
		header.Set("Content-Type", "application/problem+json")
		problem := map[string]any{"type": "about:blank", "title": http.StatusText(r.Status), "status": r.Status, "detail": r.Reason}
		if r.Decision != 0 {
			problem["decision"] = r.Decision
		}
		text, _ := json.Marshal(problem)
		_, _ = body.Write(text)
		_ = body.WriteByte('\n')
	default:
		header.Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = body.WriteString(r.Reason)
		if r.Decision != 0 {
			_, _ = body.WriteString(" (decision " + strconv.Itoa(r.Decision) + ")")
		}
		_ = body.WriteByte('\n')
	}
	header.Set("Content-Length", strconv.Itoa(body.Len()))
	rw.WriteHeader(r.Status)
	if req.Method != http.MethodHead {
		_, _ = rw.Write(body.Bytes())
	}
}

// preferred picks html, json or text by an Accept header: the highest quality
// wins, html before json before text among equals; who names none of them gets
// text.
func preferred(accept string) string {
	// Longer than any browser's; each item costs, and strangers write them.
	if len(accept) > 512 {
		accept = accept[:512]
	}
	best, top := "text", 0.0
	for _, item := range strings.SplitN(accept, ",", 17) {
		parts := strings.SplitN(item, ";", 5)
		quality := 1.0
		for _, p := range parts[1:] {
			p = strings.TrimSpace(p)
			if strings.HasPrefix(p, "q=") {
				q, err := strconv.ParseFloat(p[2:], 64)
				if err != nil {
					q = 0
				}
				quality = q
			}
		}
		kind, rank := "", 0.0
		media := strings.ToLower(strings.TrimSpace(parts[0]))
		switch {
		case media == "text/html" || media == "application/xhtml+xml":
			kind, rank = "html", 0.002
		case media == "application/json" || strings.HasSuffix(media, "+json"):
			kind, rank = "json", 0.001
		case media == "text/plain":
			kind, rank = "text", 0
		default:
			continue
		}
		if quality > 0 && quality+rank > top {
			best, top = kind, quality+rank
		}
	}
	return best
}

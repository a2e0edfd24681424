// Package laws keeps the rules of this repository that no compiler knows: who
// may import whom, which words and files have no place here, and what the code
// that Traefik interprets must not say. Each law is a pure function from the
// tree of files to its violations, and each is shown to bite on a fixture tree
// under testdata, so that a law cannot go soft unseen.
//
// The package holds tests alone and exports nothing: go test ./internal/laws is
// its only caller. It judges what can be read off the source and refuses to
// guess at the rest; what the code does is for the other tests.
package laws

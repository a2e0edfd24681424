// Package e2e proves what edgeward promises where it counts: clients that talk
// to the real Traefik, with the plugin interpreted as users run it, fed by the
// real CrowdSec LAPI. FakeLAPI stands in only where a fault, a bulk or a count
// is asked for that the real one does not give.
//
// Each file is one theme. Nothing here looks inside the plugin: a test knows
// requests, answers, cscli and the log, and holds for any other implementation
// of the same promises. Nothing imports the package.
package e2e

// Package rig is the test bench: it starts the real CrowdSec LAPI and the real
// Traefik on loopback, on free ports and in directories of their own, our node
// bouncer and our VPN in network namespaces and our tunnel at an edge, waits until
// they serve, captures what they log, and stops them cleanly. Beside them stand two
// servers that live in the test's own process: an origin that tells what reached
// it, and a LAPI that misbehaves on command.
//
// Each thing it starts ends when its context ends, and at the latest when the
// process that started it dies. Any number may run at once.
//
// Nothing here imitates what can be had for real: FakeLAPI exists to inject
// faults, never to stand in for CrowdSec. Nothing here knows package testing
// either: the suites use package rigtest for that, while the demo and the
// benchmark, which are programs, call this package directly.
package rig

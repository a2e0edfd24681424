// Package wireguard says what the VPN should be, as plain values: the sections
// wireguard, peers, services and grants of tunnel.yaml with their checks
// ([Config]), the keys, the addresses that peers are given ([Leases]), and what
// follows from all that at a time ([Desired]): the device, the peers that are
// live, what each may reach, and the names that the resolver answers. [Plan]
// tells what going from one Desired to the next costs.
//
// It does no I/O but for reading the key files that the configuration names,
// making the gateway's own at the first start, and keeping the leases in one
// file. It touches no device, no kernel table and no socket; packages device,
// names and gateway below it, and internal/nft, do. It never holds a peer's
// private key.
//
// The gateway, the command line and package tunnel, whose Config carries the
// sections, call it.
package wireguard

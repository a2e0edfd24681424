package wireguard

import (
	"net/netip"
	"time"
)

// Status is what the gateway says of itself and its peers, at /v1/vpn.
type Status struct {
	Interface string `json:"interface"`
	// Mode is kernel or userspace, empty before the device is up.
	Mode       Mode      `json:"mode,omitempty"`
	PublicKey  PublicKey `json:"publicKey"`
	ListenPort uint16    `json:"listenPort"`
	Since      time.Time `json:"since"`
	// File is the whole path of the configuration that the gateway follows, and
	// FileProblem why what is in force is not what that says; empty where it is.
	File        string `json:"file,omitempty"`
	FileProblem string `json:"fileProblem,omitempty"`
	// Problem is why the last apply failed; empty while all is well.
	Problem string       `json:"problem,omitempty"`
	Peers   []PeerStatus `json:"peers"`
}

// PeerStatus is a declared peer as the gateway sees it.
type PeerStatus struct {
	Name      Name         `json:"name"`
	State     State        `json:"state"`
	Why       string       `json:"why,omitempty"`
	PublicKey PublicKey    `json:"publicKey"`
	Addresses []netip.Addr `json:"addresses"`
	Groups    []Name       `json:"groups,omitempty"`
	Services  []Name       `json:"services,omitempty"`
	Expires   time.Time    `json:"expires,omitzero"`
	// Rotating says that a next key waits for its first handshake.
	Rotating bool `json:"rotating,omitempty"`
	// Endpoint is where the peer was last heard from; empty for never.
	Endpoint  string    `json:"endpoint,omitempty"`
	Handshake time.Time `json:"handshake,omitzero"`
	// Received and Sent are bytes, counted by the gateway.
	Received uint64 `json:"received"`
	Sent     uint64 `json:"sent"`
	// Denied counts packets that access refused.
	Denied uint64 `json:"denied"`
}

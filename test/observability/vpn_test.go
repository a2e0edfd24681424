package observability

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/edgeward/edgeward/tunnel/wireguard/gateway"
)

// vpnCollector describes what the VPN gateway shows.
var vpnCollector = new(gateway.Gateway).Collector()

// vpnValues are what its labels say that no text in the code says as it is.
var vpnValues = []string{"7d"}

// vpnLines are lines of its log.
var vpnLines = []string{`{"level":"INFO","msg":"access denied","component":"vpn","peer":"tv","to":"192.168.1.5","protocol":"tcp","port":22,"service":""}`}

// roleCollector describes what the program of the tunnel shows in every role.
var roleCollector = descriptions{prometheus.NewDesc("edgeward_configuration_in_force", "1 if the configuration in force is the file's.", nil, nil)}

// elsewhere are the beginnings of metrics that the live test does not have.
var elsewhere = []string{"edgeward_vpn_"}

type descriptions []*prometheus.Desc

func (d descriptions) Describe(ch chan<- *prometheus.Desc) {
	for _, one := range d {
		ch <- one
	}
}

func (d descriptions) Collect(chan<- prometheus.Metric) {}

module github.com/edgeward/edgeward/test/yaegi

go 1.26.0

tool github.com/edgeward/edgeward/test/yaegi/interpreter

require (
	github.com/mitchellh/mapstructure v1.5.0
	github.com/traefik/yaegi v0.16.1
	gopkg.in/yaml.v3 v3.0.1
)

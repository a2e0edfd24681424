# The commands of edgeward. `make` alone lists them: each is the line after its
# double hash. `make demo` and `make test` need Go and nothing else; what they
# miss they install or name.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# The suites measure times, and the tools are built once: no two commands run
# beside each other. What may, go test runs together, and tells one by one.
.NOTPARALLEL:

GO ?= go
# How long `make fuzz` stays with each target.
FUZZTIME ?= 20s
# The linters are pinned in a module of their own, away from what users import.
LINTER := $(GO) tool -modfile=test/lint/go.mod
# Everything but the suites on the real tools and those on the real kernel.
# Expanded where it is used, so that `make` alone asks Go nothing; backwards,
# because the slowest come last.
UNIT = $$($(GO) list ./... | grep -v -e '/edgeward/test/' -e '/internal/nft$$' -e '/internal/netns$$' -e '/edgeward/bouncer$$' -e '/wireguard/device$$' -e '/wireguard/names$$' | sort -r)
KERNEL := ./internal/netns ./internal/nft ./bouncer ./tunnel/wireguard/device ./tunnel/wireguard/names
# The suites on the real tools that judge what was measured, and those that do not.
MEASURING := ./test/e2e ./test/node
WAITING = $$($(GO) list ./test/... | grep -v -e '/test/e2e$$' -e '/test/node$$')

.PHONY: help
help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: tools ## Run the whole gateway on this machine; ONCE=1 proves it and exits, FROM=10 is the kernel, FROM=15 the tunnel, FROM=18 the VPN
	@$(GO) build -o dist/demo ./test/demo
	@CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o dist/ ./cmd/edgeward ./cmd/edgeward-tunnel
	@exec dist/demo -programs dist $(if $(ONCE),-once) $(if $(FROM),-from $(FROM))

.PHONY: test
test: test-plan tools lint test-race test-real ## Prove everything on the real tools: 9 minutes, 40 the first time

.PHONY: test-plan
test-plan:
	@echo 'make test: the tools, then lint, then the units with -race, then the suites on the real Traefik,'
	@echo 'make test: CrowdSec and Yaegi. On two cores about 9 minutes, and up to 30 more the first time,'
	@echo 'make test: to build the tools; cut short, it resumes where it was.'

.PHONY: test-quick
test-quick: ## Run the unit tests alone: no real tools, no root, no C compiler, under a minute
	@$(GO) test $(UNIT)

.PHONY: test-race
test-race: ## Run the unit tests with the race detector, those on the kernel after the others
	@$(GO) test -race -p 4 $(UNIT)
	@$(GO) test -race -parallel 8 $(KERNEL)

.PHONY: test-interpreted
test-interpreted: ## Run the plugin's tests inside Yaegi, as Traefik would
	@$(GO) run ./test/interpreted

# Most suites wait more than they compute, and so run beside each other; those
# that measure run alone. Never from the cache, because what they judge is the
# machine as it is.
.PHONY: test-real
test-real: ## Run the suites on the real Traefik, CrowdSec and Yaegi
	@$(GO) test -count=1 -p 3 -timeout 30m $(WAITING)
	@$(GO) test -count=1 -p 1 -timeout 30m $(MEASURING)

.PHONY: bench
bench: tools ## Measure requests in the real Traefik, bans and packets on a node (as root), the tunnel, the VPN (as root); side by side
	@$(GO) run ./test/benchmark
	@$(GO) run ./test/benchmark/node
	@$(GO) run ./test/benchmark/tunnel
	@$(GO) run ./test/benchmark/vpn

.PHONY: fuzz
fuzz: ## Give each fuzz target a short run; FUZZTIME=20s
	@packages=$$($(GO) list ./...); \
	for package in $$packages; do \
		tests=$$($(GO) test -list '^Fuzz' "$$package"); \
		for target in $$(sed -n '/^Fuzz/p' <<<"$$tests"); do \
			echo "fuzz: $$target in $$package for $(FUZZTIME)"; \
			$(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) "$$package"; \
		done; \
	done

.PHONY: lint
lint: ## Check format, go vet, staticcheck, and known vulnerabilities where their data can be had
	@unformatted=$$(gofmt -s -l .); \
	if [ -n "$$unformatted" ]; then echo "lint: gofmt -s would change:"; echo "$$unformatted"; exit 1; fi
	@$(GO) vet ./...
	@$(LINTER) staticcheck ./...
	@status=0; said=$$(timeout 5m $(LINTER) govulncheck ./... 2>&1) || status=$$?; \
	case "$$status:$$said" in \
	0:*) ;; \
	124:* | *'fetching vulnerabilities:'*) echo 'lint: known vulnerabilities not checked: the Go vulnerability database does not answer here';; \
	*) echo "$$said"; exit 1;; \
	esac

.PHONY: build
build: ## Compile every package, and the programs into dist/, static; the plugin is loaded as source
	@$(GO) build ./...
	@CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o dist/ ./cmd/...

.PHONY: bundle
bundle: ## Assemble in dist/ what Traefik loads, and check it with the real Yaegi
	@$(GO) run ./test/bundle -o dist

.PHONY: images
images: ## Make the container images for amd64 and arm64 in dist/images/, without Docker
	@$(GO) run -C deploy/images . -o "$(CURDIR)/dist/images"

.PHONY: tools
tools: ## Build the real Traefik, CrowdSec and Yaegi that the tests use; a second run costs nothing
	@$(GO) run ./test/tools

.PHONY: clean
clean: ## Remove dist/; the built tools stay in their cache
	@rm -rf dist

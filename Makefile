# Caisson: what can be done here. `make` alone lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory --no-builtin-rules
export PATH := $(HOME)/.cargo/bin:$(PATH)

PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
MUSL := x86_64-unknown-linux-musl
BIN := $(CURDIR)/target/$(MUSL)/release
IMAGE := $(CURDIR)/target/image
OCI := $(CURDIR)/target/oci
SUITES := $(CURDIR)/target/suites
# What needs a host with KVM. Everything is compiled as one selection (--workspace), hence once.
SUITE_TESTS := (package(caisson-vm-tests) | package(caisson-e2e)) & kind(test)
PROGRAMS := caisson-vmm caisson-fsd containerd-shim-caisson-v2 caisson caisson-agent
NESTED := $(BIN)/nested-host

.PHONY: help
help: ## List the targets
	@echo "make TARGET, where TARGET is one of:"
	@sed -nE 's/^([a-z][a-z0-9-]*):.*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

.PHONY: demo
demo: deps build image oci host ## Show real images running in microVMs on a private containerd
	@$(NESTED) --direct-if-possible --mem 4096 --timeout 900 --env CAISSON_BIN_DIR=$(BIN) --env CAISSON_IMAGE_DIR=$(IMAGE) \
		--env CAISSON_OCI_DIR=$(OCI) -- tests/demo/run

.PHONY: build
build: tools ## Build the programs: static, optimised
	cargo build --locked --release --target $(MUSL) -p caisson-vmm -p caisson-fsd -p caisson-runtime -p caisson-agent \
		$(PROGRAMS:%=--bin %)
	@cd $(BIN) && ls -l $(PROGRAMS) | awk '{ printf "build: %-28s %6.2f MiB\n", $$NF, $$5 / 1048576 }'

.PHONY: image
image: build ## Build the guest kernel and the initramfs
	@mkdir -p $(IMAGE)
	@kernel=$$(guest-image/kernel/build) && ln -sfn "$$kernel" $(IMAGE)/vmlinux
	cargo build --locked -p caisson-guest-image
	@target/debug/mkinitramfs $(BIN)/caisson-agent $(IMAGE)/initramfs
	@cd $(IMAGE) && stat -L -c '%n %s' vmlinux initramfs | awk '{ printf "image: %-28s %6.2f MiB\n", $$1, $$2 / 1048576 }'

.PHONY: test
test: deps unit suites ## Prove that it works: unit tests here, VM and containerd tests on a KVM host (nested where needed)
	@tests/suite caisson-vm-tests 900
	@tests/suite caisson-e2e 2700

.PHONY: lint
lint: tools ## Check format, lints and documentation; warnings are errors
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings -A rustdoc::private_intra_doc_links' cargo doc --quiet --locked --workspace --no-deps --document-private-items
	for script in $$(git grep -lE '^#!/bin/(ba)?sh' -- . ':!*.rs'); do bash -n "$$script"; done

.PHONY: bench
bench: deps build image oci host ## Measure in exact virtual time: target/bench/report.json and report.svg; PARTS="alone crowd storage network" for some of it
	cargo build --locked --release --target $(MUSL) -p caisson-e2e-probe
	@tests/bench/run $(PARTS)

.PHONY: soak
soak: deps suites ## The containerd and VM tests in every full size: takes hours where KVM is emulated
	@CAISSON_FULL=1 tests/suite caisson-vm-tests 3600 --profile soak
	@CAISSON_FULL=1 tests/suite caisson-e2e 20000 --profile soak

.PHONY: intel
intel: deps suites ## All VM tests and a container on an emulated Intel processor
	@.ci/deps intel
	@tests/processors skylake

.PHONY: processors
processors: deps suites ## Some VM tests on other emulated processors, Intel's and AMD's; NAMES="penryn epyc ..." for some of them
	@.ci/deps intel
	@.ci/deps nested
	@tests/processors $(or $(NAMES),others)

.PHONY: containerd
containerd: deps suites ## The containerd tests on Debian 13's containerd 1.7, unpacked beside; TESTS="lifecycle:: ..." for some of them
	@directory=$$(tests/containerd/get trixie); CAISSON_CONTAINERD_DIR=$$directory tests/suite caisson-e2e 2400 $(TESTS)

.PHONY: install
install: build image ## Install below PREFIX (/usr/local), with /etc/caisson/config.toml if there is none
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/caisson $(DESTDIR)$(SYSCONFDIR)/caisson
	install $(addprefix $(BIN)/,$(filter-out caisson-agent,$(PROGRAMS))) $(DESTDIR)$(PREFIX)/bin
	install -m 644 $(IMAGE)/vmlinux $(IMAGE)/initramfs $(DESTDIR)$(PREFIX)/share/caisson
	config=$(DESTDIR)$(SYSCONFDIR)/caisson/config.toml; \
	if [[ -e $$config ]]; then echo "install: $$config is kept"; else \
	  printf 'kernel = "%s"\ninitramfs = "%s"\nmonitor = "%s"\nfile_server = "%s"\n' \
	    $(PREFIX)/share/caisson/{vmlinux,initramfs} $(PREFIX)/bin/{caisson-vmm,caisson-fsd} > $$config; fi

.PHONY: uninstall
uninstall: ## Remove what install has put there; the configuration stays
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/bin/,$(filter-out caisson-agent,$(PROGRAMS)))
	rm -rf $(DESTDIR)$(PREFIX)/share/caisson

.PHONY: clean
clean: ## Remove what was built here (the cache in ~/.cache/caisson stays)
	rm -rf target

.PHONY: tools
tools:
	@.ci/deps --check build

.PHONY: deps
deps: ## Install what is missing: Debian packages, Rust, its musl target, cargo-nextest
	@.ci/deps build

# The host that has a KVM: this machine, or what emulates one.
.PHONY: host
host: tools
	cargo build --locked --release --target $(MUSL) -p caisson-nested-host
	@$(NESTED) --probe || .ci/deps nested

# The images that the tests and the demo run.
.PHONY: oci
oci: tools
	@tests/images/make $(OCI)

.PHONY: unit
unit: tools ## Run the unit and property tests, which need no virtual machine
	cargo nextest run --locked --workspace -E 'not ($(SUITE_TESTS))'

# No cargo is needed where they run.
.PHONY: suites
suites: build image oci host ## Build the test programs of the VM and containerd suites, which tests/suite runs
	cargo build --locked --release --target $(MUSL) -p caisson-e2e-probe -p caisson-vm-guest
	@mkdir -p $(SUITES)
	cargo nextest list --locked --workspace --list-type binaries-only --message-format json > $(SUITES)/binaries.json
	cargo metadata --locked --format-version 1 > $(SUITES)/cargo.json

# The only interface: people and CI run the same targets. `make help` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/bascule
# Build results live outside the checkout; nothing depends on finding them there.
export CARGO_TARGET_DIR ?= $(CACHE)/target
TARGET := x86_64-unknown-linux-gnu
STATIC := $(CARGO_TARGET_DIR)/static
# One static image holds them all.
PROGRAMS := bascule-operator bascule-node bascule-import bascule-hold bascule-vm bascule-volume bascule-watchdog
PACKAGES := bascule-operator bascule-node bascule-vmm bascule-volume bascule-watchdog
IMAGE := $(CARGO_TARGET_DIR)/bascule-image.tar
LAB := $(STATIC)/$(TARGET)/release/lab
# Scenarios share one machine's /dev/kvm, bridges and time: one after the other.
SERIAL := -- --test-threads=1
# Their errors say what was waited for; stack traces only push that and the logs out of sight.
SCENARIOS = RUST_BACKTRACE=0 BASCULE_LAB_IMAGES=$(IMAGE) BASCULE_LAB_BIN=$(LAB) cargo test --quiet --locked -p bascule-e2e
# The probe guest is a workspace of its own; its target directory is the one that tests build it in.
GUEST_CARGO := env CARGO_TARGET_DIR=$(CARGO_TARGET_DIR)/probe-guest cargo

.PHONY: help
help: ## This list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: packages image ## A three-node cluster, a VM on it, a drain, a power cut: the whole story, with figures
	BASCULE_LAB_IMAGES=$(IMAGE) BASCULE_LAB_BIN=$(LAB) cargo run --quiet --locked -p bascule-e2e --bin bascule-demo

.PHONY: demo-down
demo-down: lab ## Remove every trace of the demo
	$(LAB) down --all

.PHONY: test
test: setup lint unit kvm e2e e2e-emulated ## All set-up and all tests
	@echo "make test: everything passed"

.PHONY: setup
setup: packages ## Install what building and testing needs (Debian packages, cargo-deny)
	@command -v cargo-deny >/dev/null || { echo "setup: installing cargo-deny (a few minutes, once)"; \
	  CARGO_TARGET_DIR=$(CARGO_TARGET_DIR)/deny cargo install --quiet --locked cargo-deny; }

.PHONY: packages
packages:
	@missing=(); for p in build-essential pkg-config qemu-system-x86 qemu-utils iproute2 iputils-ping nftables; do \
	  dpkg -s $$p >/dev/null 2>&1 || missing+=($$p); done; \
	if [ $${#missing[@]} -gt 0 ]; then echo "setup: installing $${missing[*]}"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $${missing[*]} >/dev/null; fi

# Cargo tells two checkouts that share a target directory apart by their files' times alone, and takes
# results of the other one for its own when these are the newer ones.
.PHONY: checkout
checkout:
	@mkdir -p $(CARGO_TARGET_DIR); stamp=$(CARGO_TARGET_DIR)/checkout; \
	[ "$$(cat $$stamp 2>/dev/null)" = "$(CURDIR)" ] || { \
	  find . \( -name '*.rs' -o -name Cargo.toml \) -exec touch {} +; echo "$(CURDIR)" >$$stamp; }

.PHONY: lint
lint: checkout ## Formatting, clippy, docs, licences, structure
	cargo fmt --all --check
	cargo clippy --quiet --workspace --all-targets --locked -- -D warnings
	cd e2e/probe && cargo fmt --all --check && $(GUEST_CARGO) clippy --quiet --workspace --locked --release -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --quiet --workspace --no-deps --locked
	cargo deny --log-level error check bans licenses sources
	cargo test --quiet --locked -p bascule-e2e --test tidy

.PHONY: unit
unit: checkout ## Pure tests, models, simulations and crash enumeration: no root, no KVM
	cargo test --quiet --locked --workspace --exclude bascule-e2e
	cd e2e/probe && $(GUEST_CARGO) test --quiet --locked -p bascule-probe-wire

.PHONY: kvm
kvm: checkout ## The VM process on this machine's /dev/kvm, with the probe guest
	cargo test --quiet --locked -p bascule-e2e --lib --bins
	for t in $(sort $(basename $(notdir $(wildcard e2e/tests/kvm_*.rs)))); do \
	  cargo test --quiet --locked -p bascule-e2e --test $$t $(SERIAL); done

.PHONY: e2e
e2e: image ## Real Kubernetes on native nodes: the lab itself, then the scenarios with the probe guest
	BASCULE_LAB_BIN=$(LAB) cargo test --quiet --locked -p bascule-lab --test native $(SERIAL) --ignored
	$(SCENARIOS) --test cluster_native $(SERIAL) --nocapture

.PHONY: e2e-emulated
e2e-emulated: image ## Real Kubernetes on emulated nodes: the scenarios with an unmodified Debian guest
	$(SCENARIOS) --test cluster_emulated $(SERIAL) --nocapture

.PHONY: bench
bench: packages image ## The figures, each beside a baseline of the same run
	BASCULE_BIN_DIR=$(STATIC)/image BASCULE_LAB_IMAGES=$(IMAGE) BASCULE_LAB_BIN=$(LAB) \
	  cargo run --quiet --release -p bascule-e2e --bin bascule-bench

.PHONY: lab
lab: checkout ## The lab's command line, static, so that it runs inside its nodes too
	@$(call static_build,-p bascule-lab)

.PHONY: image
image: lab ## One static OCI image of all programs, without a container daemon
	@$(call static_build,$(foreach p,$(PACKAGES),-p $(p)))
	@rm -rf $(STATIC)/image && mkdir -p $(STATIC)/image
	@for p in $(PROGRAMS); do cp $(STATIC)/$(TARGET)/release/$$p $(STATIC)/image/; strip $(STATIC)/image/$$p; done
	$(LAB) image --bin-dir $(STATIC)/image --out $(IMAGE)

.PHONY: crds
crds: checkout ## Write the CustomResourceDefinitions into the chart
	cargo run --quiet -p bascule-crds --bin bascule-crds

define static_build
RUSTFLAGS="-C target-feature=+crt-static" cargo build --quiet --locked --release --target $(TARGET) --target-dir $(STATIC) $(1)
endef

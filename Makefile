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
PACKAGES := bascule-operator bascule-kubectl bascule-node bascule-vmm bascule-volume bascule-watchdog
IMAGE := $(CARGO_TARGET_DIR)/bascule-image.tar
# The guests' UEFI firmware and its licence.
FIRMWARE := $(CACHE)/firmware
LAB := $(STATIC)/$(TARGET)/release/lab
# The plugin of kubectl, which is a user's and not in the image.
PLUGIN := $(STATIC)/$(TARGET)/release/kubectl-bascule
# Scenarios share one machine's /dev/kvm, bridges and time: one after the other.
SERIAL := --test-threads=1
# A failure ends a run only after all its tests, so that one run names all that fail. Of the whole
# workspace, because cargo would build every dependency anew for the features of one package alone.
TEST_FLAGS := --quiet --locked --no-fail-fast
# `make unit P=CRATE T=FILTER`, `make kvm T=NAME`, `make scenario T=NAME TIER=native|emulated KEEP=1`.
P ?=
T ?=
TIER ?= native
KEEP ?=
KVM_TESTS = $(sort $(basename $(notdir $(wildcard e2e/tests/kvm_*.rs))))
# Their errors say what was waited for; stack traces only push that and the logs out of sight.
SCENARIOS = RUST_BACKTRACE=0 BASCULE_LAB_KEEP=$(KEEP) BASCULE_LAB_IMAGES=$(IMAGE) BASCULE_LAB_BIN=$(LAB) \
  BASCULE_PLUGIN_BIN=$(PLUGIN) cargo test $(TEST_FLAGS) --workspace
# Says what happens, how long it usually takes (on 2 cores) and how long it took. STEP numbers the line.
STEP ?=
WITH_PROGRESS = STEP='$(STEP)' e2e/step.sh
# Builds show cargo's own progress on a terminal.
CARGO_QUIET ?= $(shell [ -t 2 ] || echo --quiet)
test: CARGO_QUIET := --quiet
# The probe guest is a workspace of its own; its target directory is the one that tests build it in.
GUEST_CARGO := env CARGO_TARGET_DIR=$(CARGO_TARGET_DIR)/probe-guest cargo

.PHONY: help
help: ## This list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: ## Three-node cluster, a VM, a drain and a power cut, with figures (usually 30 min the first time)
	@+for n in 1:packages 2:lab 3:programs 4:firmware 5:demo-program; do \
	  $(MAKE) --no-print-directory CARGO_QUIET= STEP="[$${n%:*}/12] " $${n#*:}; done
	@$(pack)
	@BASCULE_LAB_IMAGES=$(IMAGE) BASCULE_LAB_BIN=$(LAB) $(CARGO_TARGET_DIR)/debug/bascule-demo --steps 6/12

.PHONY: demo-down
demo-down: lab ## Remove every trace of the demo
	$(LAB) down --all

.PHONY: test
test: setup lint unit kvm e2e e2e-emulated ## All set-up and all tests
	@echo "make test: everything passed"

.PHONY: setup
setup: packages ## Install what building and testing needs (Debian packages, cargo-deny)
	@command -v cargo-deny >/dev/null || CARGO_TARGET_DIR=$(CARGO_TARGET_DIR)/deny $(WITH_PROGRESS) \
	  "installing cargo-deny (usually 5 min, once)" cargo install --quiet --locked cargo-deny

# .devcontainer and CI install this list through this target.
DEBIAN_PACKAGES := build-essential pkg-config qemu-system-x86 qemu-utils xz-utils zstd iproute2 iputils-ping nftables systemd \
  acpica-tools nasm python3 uuid-dev
.PHONY: packages
packages:
	@missing=(); for p in $(DEBIAN_PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || missing+=($$p); done; \
	$(WITH_PROGRESS) "installing Debian packages (usually 1 min the first time)" bash -c '[ $$# = 0 ] || { \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$$@" >/dev/null; }' - $${missing[*]}

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
	cargo test $(TEST_FLAGS) --workspace --test tidy

.PHONY: unit
unit: checkout ## Pure tests, models, simulations, crash enumeration: no root, no KVM. One crate or test: P=CRATE T=FILTER
	$(if $(P),cargo test $(TEST_FLAGS) -p $(P) -- $(T), \
	  cargo test $(TEST_FLAGS) --workspace --lib --bins -- $(T))
	$(if $(P),,cargo test $(TEST_FLAGS) --workspace --exclude bascule-e2e --test '*' -- $(T))
	$(if $(P)$(T),,cd e2e/probe && $(GUEST_CARGO) test --quiet --locked -p bascule-probe-wire)

SEEDS ?= 1000
FROM ?= 0
JOBS ?= 1
.PHONY: soak
soak: checkout ## The real drivers of volume and disks in simulation: SEEDS seeds (0.4 s each) in each of JOBS processes, from FROM on
	cargo test --release --quiet --locked -p bascule-volume -p bascule-devices --test sim --no-run
	seq 0 $$(($(JOBS) - 1)) | TMPDIR=$(or $(wildcard /dev/shm),/tmp) BASCULE_SIM_SEEDS=$(SEEDS) xargs -P $(JOBS) -I {} \
	  sh -c 'BASCULE_SIM_FROM=$$(($(FROM) + {} * $(SEEDS))) \
	    cargo test --release --quiet --locked -p bascule-volume -p bascule-devices --test sim -- --nocapture of_every_seed'

TIME ?= 60
.PHONY: fuzz
fuzz: checkout ## Every parser of foreign bytes under libFuzzer, TIME seconds (60) each. One target: T=NAME
	fuzz/run.sh $(TIME) $(T)

.PHONY: fuzz-corpus
fuzz-corpus: checkout ## Write what `make fuzz` has found into fuzz/corpus, a few KiB for each target
	fuzz/run.sh minimise $(T)

.PHONY: kvm
kvm: checkout ## The VM process on this machine's /dev/kvm, with the probe guest. One test: T=NAME
	@$(call selects,cargo test $(TEST_FLAGS) --workspace $(KVM_TESTS:%=--test %))
	cargo test $(TEST_FLAGS) --workspace $(KVM_TESTS:%=--test %) -- $(SERIAL) $(T)

.PHONY: e2e
e2e: image ## Real Kubernetes on native nodes: the lab itself, then the scenarios with the probe guest
	BASCULE_LAB_BIN=$(LAB) cargo test $(TEST_FLAGS) --workspace --test native -- $(SERIAL) --ignored
	$(SCENARIOS) --test cluster_native -- $(SERIAL) --nocapture
	$(SCENARIOS) --test cluster_dual_stack -- $(SERIAL) --nocapture

.PHONY: e2e-emulated
e2e-emulated: image ## Real Kubernetes on emulated nodes: the scenarios with an unmodified Debian guest
	$(SCENARIOS) --test cluster_emulated -- $(SERIAL) --nocapture

.PHONY: soak-storage
soak-storage: image ## Storage outages on the lab's SAN that are too long for CI: paths away, bad blocks, bascule-watchdog killed (30 min)
	BASCULE_LAB_SAN=1 $(SCENARIOS) --test cluster_emulated -- $(SERIAL) --nocapture --ignored san::

STEPS ?= 100000
.PHONY: soak-hostile
soak-hostile: SEEDS := 5
soak-hostile: FROM := 1
soak-hostile: checkout ## A guest that attacks its devices, beside another one: SEEDS seeds (5) from FROM on, STEPS steps (100000, some minutes) each
	BASCULE_HOSTILE_SEEDS=$(SEEDS) BASCULE_HOSTILE_FROM=$(FROM) BASCULE_HOSTILE_STEPS=$(STEPS) \
	  cargo test $(TEST_FLAGS) --workspace --test kvm_hostile_guest -- $(SERIAL) --nocapture

.PHONY: scenario
scenario: image ## One scenario: T=NAME, TIER=native, dual_stack or emulated; KEEP=1 leaves the lab up for the next KEEP=1
	@$(call selects,$(SCENARIOS) --test cluster_$(TIER))
	$(SCENARIOS) --test cluster_$(TIER) -- $(SERIAL) --nocapture $(T)

.PHONY: lab-down
lab-down: lab ## Remove the lab that `make scenario KEEP=1` left up
	$(LAB) --lab $(or $(BASCULE_LAB),test) down

.PHONY: bench
bench: DEBIAN_PACKAGES += fio
bench: packages image ## Benchmarks, each figure beside a baseline of the same run
	BASCULE_BIN_DIR=$(STATIC)/image BASCULE_LAB_IMAGES=$(IMAGE) BASCULE_LAB_BIN=$(LAB) \
	  cargo run $(CARGO_QUIET) --release -p bascule-e2e --bin bascule-bench

.PHONY: lab
lab: checkout ## The lab's command line, static, so that it runs inside its nodes too
	@$(WITH_PROGRESS) "building the lab (usually 2 min the first time)" $(call static_build,-p bascule-lab)

.PHONY: programs
programs: checkout
	@$(WITH_PROGRESS) "building the programs (usually 7 min the first time)" \
	  $(call static_build,$(foreach p,$(PACKAGES),-p $(p)))

.PHONY: firmware
firmware: ## The guests' UEFI firmware, from Debian's source of edk2, kept outside the checkout
	@$(WITH_PROGRESS) "building the firmware (usually 5 min the first time)" node-daemon/vmm/firmware/build.sh $(FIRMWARE)

.PHONY: demo-program
demo-program: checkout
	@$(WITH_PROGRESS) "building the demo (usually 3 min the first time)" \
	  cargo build $(CARGO_QUIET) --locked -p bascule-e2e --bin bascule-demo

.PHONY: image
image: lab programs firmware ## One static OCI image of all programs, without a container daemon
	@$(pack)

.PHONY: crds
crds: checkout ## Write the CustomResourceDefinitions into the chart
	cargo run --quiet -p bascule-crds --bin bascule-crds

.PHONY: state-machines
state-machines: checkout ## Write docs/state-machines.md from the diagrams in the code
	BASCULE_WRITE_STATE_MACHINES=1 cargo test $(TEST_FLAGS) --workspace --test tidy state_machines

define static_build
env RUSTFLAGS="-C target-feature=+crt-static" cargo build $(CARGO_QUIET) --locked --release --target $(TARGET) \
  --target-dir $(STATIC) $(1)
endef

define pack
rm -rf $(STATIC)/image && mkdir -p $(STATIC)/image && for p in $(PROGRAMS); do \
  cp $(STATIC)/$(TARGET)/release/$$p $(STATIC)/image/; strip $(STATIC)/image/$$p; done; \
cp $(FIRMWARE)/bascule-firmware $(FIRMWARE)/bascule-firmware.copyright $(STATIC)/image/; \
$(LAB) image --bin-dir $(STATIC)/image --out $(IMAGE)
endef

# Fails when T selects no test, so that a misspelt name does not pass for a success.
define selects
{ [ -z "$(T)" ] || $(1) -- --list $(T) | grep ': test$$' >/dev/null || { echo "no test matches T=$(T)"; exit 1; }; }
endef

# gpusnap: `make demo` and `make test` do everything on a fresh Debian bookworm machine, as root.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

TESTBED := tests/testbed/testbed
TRIPLE := $(shell rustc -vV | sed -n 's/^host: //p')
# Test programs that need containerd, runc or a root of their own run inside the test bed.
RUN_IN_BED := CARGO_TARGET_$(shell echo $(TRIPLE) | tr 'a-z-' 'A-Z_')_RUNNER="$(CURDIR)/$(TESTBED) in"
SHIM := target/release/containerd-shim-gpusnap-v2
CLI := target/release/gpusnap
TOOLS := $(or $(GPUSNAP_TOOLS),/var/tmp/gpusnap-tools)
CARGO_DENY_VERSION := 0.20.2

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sort | sed -E 's/^([a-z0-9-]+):.*## (.*)/  \1\t\2/' | expand -t 20

.PHONY: demo
demo: build testbed ## Build all, start the test bed and show a container's life under the shim
	examples/demo/demo.sh

.PHONY: test
test: lint test-unit test-registry test-fake-cuda test-contract test-criu test-e2e ## Everything that can be tested without a GPU

.PHONY: build
build: deps ## Build the shim and the command line: target/release/containerd-shim-gpusnap-v2 and gpusnap
	cargo build --release --locked -p service
	cargo build --release --locked -p cli

.PHONY: install
install: build ## Install the shim where containerd finds it, and gpusnap with its completions and manual pages
	install -D -m 755 $(SHIM) $(DESTDIR)/usr/local/bin/containerd-shim-gpusnap-v2
	install -D -m 755 $(CLI) $(DESTDIR)/usr/local/bin/gpusnap
	$(CLI) man $(DESTDIR)/usr/local/share/man/man1
	install -d $(addprefix $(DESTDIR)/usr/local/share/,bash-completion/completions zsh/site-functions fish/vendor_completions.d)
	$(CLI) completion bash > $(DESTDIR)/usr/local/share/bash-completion/completions/gpusnap
	$(CLI) completion zsh > $(DESTDIR)/usr/local/share/zsh/site-functions/_gpusnap
	$(CLI) completion fish > $(DESTDIR)/usr/local/share/fish/vendor_completions.d/gpusnap.fish

.PHONY: deps
deps: ## Install the Debian packages that the build needs
	packaging/build-deps

.PHONY: testbed
testbed: ## Build (once) and start the test bed
	$(TESTBED) build
	$(TESTBED) up

.PHONY: lint
lint: deps $(TOOLS)/bin/cargo-deny ## Formatting, clippy, dependencies, shell scripts
	cargo fmt --all --check
	cargo fmt --manifest-path fuzz/Cargo.toml --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	cargo fetch --locked # cargo-deny looks at what other platforms need as well
	$(TOOLS)/bin/cargo-deny --offline check bans licenses sources
	cargo fetch --locked --manifest-path fuzz/Cargo.toml
	$(TOOLS)/bin/cargo-deny --offline --manifest-path fuzz/Cargo.toml --config deny.toml check bans licenses sources
	git ls-files -z | xargs -0 grep -lE '^#!.*\bbash' -- | xargs shellcheck -x

$(TOOLS)/bin/cargo-deny:
	cargo install --debug cargo-deny --locked --version $(CARGO_DENY_VERSION) --root $(TOOLS)

.PHONY: test-unit
test-unit: deps ## Tests that need nothing but this machine
	cargo test --workspace --exclude e2e --locked --lib --bins

.PHONY: test-fake-cuda
test-fake-cuda: deps ## The simulated GPU driver that the tests below use
	cargo test --locked -p fake-cuda --test '*'

.PHONY: test-contract
test-contract: deps testbed ## What every OCI runtime must do, on libcontainer, runc and crun
	$(RUN_IN_BED) cargo test --locked -p runtime --test contract

.PHONY: test-criu
test-criu: deps testbed ## The criu crate against the real CRIU
	$(RUN_IN_BED) cargo test --locked -p criu --test real

# docker-registry is unpacked only: installed, it would be started as a service.
DOCKER_REGISTRY := $(TOOLS)/docker-registry/usr/bin/docker-registry
$(DOCKER_REGISTRY):
	rm -rf $(TOOLS)/docker-registry && mkdir -p $(TOOLS)/docker-registry
	cd $(TOOLS)/docker-registry && apt-get update -qq && apt-get download -qq docker-registry && dpkg -x docker-registry_*.deb .

.PHONY: test-registry
test-registry: deps $(DOCKER_REGISTRY) ## gpusnap push and pull against Debian's docker-registry, and skopeo beside it
	packaging/build-deps skopeo
	GPUSNAP_DOCKER_REGISTRY=$(DOCKER_REGISTRY) cargo test --locked -p cli --test registry

# Of the eight cells of the matrix, three in which each of our shim's names and runtimes and each containerd is
# seen; `make test-e2e E2E_TARGETS=` runs all, and `make test-e2e-stock` those of containerd's own shim, which say
# whether a new test is right.
E2E_TARGETS := 2.1/gpusnap,2.1/gpusnap-runc,2.4/as-runc
# Those of them for the tests of checkpoint and restore, 3 minutes each; empty for all.
E2E_CHECKPOINT_TARGETS := 2.1/gpusnap

# The simulated driver under the names of the real one, for the shim and for containers.
FAKE_CUDA := $(CURDIR)/target/fake-cuda
.PHONY: fake-cuda
fake-cuda: deps
	cargo build --release --locked -p fake-cuda
	install -D target/release/libfake_cuda.so $(FAKE_CUDA)/libcuda.so.1
	ln -sf libcuda.so.1 $(FAKE_CUDA)/libnvidia-ml.so.1

.PHONY: test-e2e
test-e2e: build fake-cuda testbed ## ctr, nerdctl and the CRI on both containerds, under our shim and under Debian's
	$(RUN_IN_BED) GPUSNAP_E2E_TARGETS=$(E2E_TARGETS) GPUSNAP_E2E_CHECKPOINT_TARGETS=$(E2E_CHECKPOINT_TARGETS) \
		GPUSNAP_E2E_FAKE_CUDA=$(FAKE_CUDA) cargo test --locked -p e2e --test suite

.PHONY: test-e2e-stock
test-e2e-stock: deps testbed ## The same suite under containerd's own shim only
	$(RUN_IN_BED) GPUSNAP_E2E_TARGETS=stock cargo test --locked -p e2e --test suite

# Not part of `test`: the first build of Kubernetes takes ten minutes on two cores. `GPUSNAP_K8S_TARGETS=2.4/gpusnap` runs one cell.
.PHONY: test-k8s
test-k8s: build ## Pods, and the kubelet's checkpoint API, on a one-node Kubernetes in the test bed
	tests/k8s/cluster build
	tests/k8s/test

.PHONY: test-gpu
test-gpu: build fake-cuda ## GPU programs and failures on this machine's GPU; GPU_ARGS='--fake' without one (tests/gpu/README.md)
	[ -e .gpu-carry/bed.tar.xz ] || $(TESTBED) build
	tests/gpu/run $(GPU_ARGS)

.PHONY: gpu-carry
gpu-carry: build fake-cuda ## .gpu-carry/: what a bare GPU machine without network needs for tests/gpu/run
	$(TESTBED) build
	tests/gpu/pack

# Not part of `test`: what it finds depends on how long it runs.
.PHONY: fuzz
fuzz: deps ## Parsers of bytes from elsewhere, fuzzed for FUZZ_SECONDS (30) each (fuzz/README.md)
	packaging/build-deps g++
	fuzz/run

.PHONY: bench
bench: build testbed ## Lifecycle, checkpoint and restore of a container, ours against runc's shim, interleaved
	$(TESTBED) in $(CURDIR)/tests/bench/lifecycle.sh
	$(TESTBED) in $(CURDIR)/tests/bench/checkpoint.sh

.PHONY: clean
clean: ## Stop and remove the test bed, remove build results
	$(TESTBED) clean
	cargo clean

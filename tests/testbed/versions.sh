# shellcheck shell=bash disable=SC2034  # sourced: every version the test bed pins, and nothing else
#
# Changing a Go version rebuilds that tool at the next `testbed build`; changing the suite or a package list rebuilds the root.

DEBIAN_SUITE=forky

# Packages of the root. The first list is also what a pack carries; the second stays on machines that build.
ROOT_PACKAGES=(
  containerd runc crun criu libcriu2 containernetworking-plugins
  iptables nftables iproute2 procps jq ca-certificates busybox-static python3-minimal strace
)
BUILD_PACKAGES=(umoci docker-registry gcc libc6-dev libpython3-stdlib)

# What forky had when the tests were written: another version is reported, not refused.
EXPECTED_DEBIAN=(
  containerd=2.1.9 runc=1.3.6 crun= criu=4.2.1 umoci= containernetworking-plugins=1.9.1 docker-registry=2.8.3
)

GO_VERSION=1.26.8       # used when the machine's own Go is missing or older than GO_MINIMUM
GO_MINIMUM=1.26.6       # what the go.mod files of the modules below ask for
CONTAINERD_VERSION=2.4.2
NERDCTL_VERSION=2.3.5
CRICTL_VERSION=1.37.0

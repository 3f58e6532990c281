#!/usr/bin/env bash
# Times the whole life of a trivial container (ctr run --rm: create, start, wait, delete) under runc's shim and under
# ours, interleaved, so that noise of the machine meets all alike. Runs inside the test bed.
#
#   lifecycle.sh [ROUNDS]          default 40; prints a table with medians, quartiles and the ratio to runc's shim
set -euo pipefail

rounds=${1:-40}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
testbed=$root/tests/testbed/testbed
# shellcheck source=tests/bench/row.sh
source "$here/row.sh"
shims=${GPUSNAP_SHIM_DIR:-$root/target/release}
work=$(mktemp -d)
instance=bench
trap '"$testbed" stop "$instance" >/dev/null 2>&1 || :; rm -rf "$work"' EXIT

[ -x "$shims/containerd-shim-gpusnap-v2" ] || { echo "no shim in $shims: make build" >&2; exit 1; }
mkdir "$work/shims"
ln -s "$shims/containerd-shim-gpusnap-v2" "$work/shims/"
echo 'BinaryName = "runc"' >"$work/runc.toml"

run() { # NAME: one life under that variant
  local runtime=()
  case $1 in
    runc-shim) runtime=(--runtime io.containerd.runc.v2) ;;
    gpusnap-libcontainer) runtime=(--runtime io.containerd.gpusnap.v2) ;;
    gpusnap-runc) runtime=(--runtime io.containerd.gpusnap.v2 --runtime-config-path "$work/runc.toml") ;;
  esac
  ctr --address "/run/$instance/containerd.sock" run --rm "${runtime[@]}" docker.io/test/bb:1 "bench-$1" /bin/true
}

variants=(runc-shim gpusnap-libcontainer gpusnap-runc)
for containerd in 2.1 2.4; do
  "$testbed" start "$instance" --containerd "$containerd" --shims "$work/shims" >/dev/null
  for variant in "${variants[@]}"; do run "$variant"; done # warm the page cache
  for variant in "${variants[@]}"; do : >"$work/$variant"; done
  for ((round = 0; round < rounds; round++)); do
    for variant in "${variants[@]}"; do
      begin=${EPOCHREALTIME/./}
      run "$variant"
      end=${EPOCHREALTIME/./}
      echo $((end - begin)) >>"$work/$variant"
    done
  done
  "$testbed" stop "$instance" >/dev/null
  echo "containerd $containerd, $rounds rounds: ctr run --rm of /bin/true"
  for variant in "${variants[@]}"; do
    row "$variant" "$work/$variant" "$work/reference"
  done
done

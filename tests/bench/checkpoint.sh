#!/usr/bin/env bash
# Times checkpoint and restore of a container under runc's shim and under ours, interleaved, so that noise of the
# machine meets all alike. Runs inside the test bed.
#
#   checkpoint.sh [ROUNDS [SIZE...]]      default 10 rounds, 10 and 1024 MB of memory that is not zero
#
# to folder   ctr task checkpoint --image-path: what the shim does, and nothing else
# to image   ctr container checkpoint --task: containerd packs the folder into its content store as well
# restore       ctr container restore --live: containerd unpacks it, and the shim restores
set -euo pipefail

rounds=${1:-10}
shift || :
sizes=("${@:-10}")
[ $# -gt 0 ] || sizes=(10 1024)
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
testbed=$root/tests/testbed/testbed
# shellcheck source=tests/bench/row.sh
source "$here/row.sh"
shims=${GPUSNAP_SHIM_DIR:-$root/target/release}
work=$(mktemp -d)
trap '"$testbed" stop bench-stock >/dev/null 2>&1 || :; "$testbed" stop bench-ours >/dev/null 2>&1 || :; rm -rf "$work"' EXIT

[ -x "$shims/containerd-shim-gpusnap-v2" ] || { echo "no shim in $shims: make build" >&2; exit 1; }
mkdir "$work/shims"
# Under runc's name: clients do more work with others, because they do not know that there is nothing else to save.
ln -s "$shims/containerd-shim-gpusnap-v2" "$work/shims/containerd-shim-runc-v2"

ctr() { command ctr --address "/run/$instance/containerd.sock" "$@"; }

start() { # VARIANT ID MEGABYTES
  local binary=()
  [ "$1" != gpusnap-runc ] || binary=(--runc-binary runc)
  ctr run --detach --null-io --runtime io.containerd.runc.v2 "${binary[@]}" docker.io/test/python:1 "$2" python3 -c "
import os, time
memory = os.urandom(1 << 20) * $3
open('/ready', 'w').close()
while True: time.sleep(1)"
  until ctr task exec --exec-id ready "$2" test -e /ready 2>/dev/null; do sleep 0.05; done
}

timed() { # SERIES COMMAND...: microseconds to the series
  local series=$1 begin end
  shift
  begin=${EPOCHREALTIME/./}
  "$@" >/dev/null
  end=${EPOCHREALTIME/./}
  echo $((end - begin)) >>"$work/$series"
}

remove() { # ID
  ctr task rm --force "$1" >/dev/null 2>&1 || :
  ctr container rm "$1"
}

round() { # VARIANT ID MEGABYTES
  case $1 in
    runc-shim) instance=bench-stock ;;
    *) instance=bench-ours ;;
  esac
  start "$1" "$2" "$3"
  timed "$1.to-folder" ctr task checkpoint --image-path "$work/images" "$2"
  rm -rf "$work/images"
  timed "$1.to-image" ctr container checkpoint --task "$2" "bench/$2"
  remove "$2"
  # A file that the container wrote is not in the image without --rw; nothing has it open.
  timed "$1.restore" ctr container restore --live "$2" "bench/$2"
  remove "$2"
  ctr image rm --sync "bench/$2" >/dev/null
  rm -rf /tmp/ctrd-checkpoint*
}

report() { # SERIES
  local variant
  for variant in "${variants[@]}"; do
    row "$variant" "$work/$variant.$1" "$work/reference"
  done
}

variants=(runc-shim gpusnap-libcontainer gpusnap-runc)
"$testbed" start bench-stock >/dev/null
"$testbed" start bench-ours --shims "$work/shims" >/dev/null
for size in "${sizes[@]}"; do
  rm -f "$work"/*.to-folder "$work"/*.to-image "$work"/*.restore
  for ((n = 0; n < rounds; n++)); do
    for variant in "${variants[@]}"; do round "$variant" "bench-$variant" "$size"; done
  done
  echo "containerd 2.1, a Python process of $size MB, $rounds rounds"
  for series in to-folder to-image restore; do
    echo "  ${series//-/ }"
    report "$series"
  done
done

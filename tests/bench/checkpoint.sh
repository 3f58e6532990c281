#!/usr/bin/env bash
# Times checkpoint and restore of a container under runc's shim and under ours, interleaved, so that noise of the
# machine meets all alike. Runs inside the test bed.
#
#   checkpoint.sh [ROUNDS [SIZE...]]      default 10 rounds, 10 and 1024 MB of random memory
#
# With FORKS=7 in its environment (`testbed in env FORKS=7 ...`) the container is a tree of 8 processes that share the memory;
# each changes an eighth. With SHARED=1 the memory is shared and anonymous, as pinned memory is. VARIANTS chooses from runc-shim, gpusnap-libcontainer (big memory in the node store), gpusnap-images
# (all memory in CRIU's images) and gpusnap-runc. Images and store are on the same disk; its cache is warm.
#
# to folder   ctr task checkpoint --image-path: the shim's work alone
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
forks=${FORKS:-0}
read -r -a variants <<<"${VARIANTS:-runc-shim gpusnap-libcontainer gpusnap-images gpusnap-runc}"
mkdir -p /var/lib/gpusnap-bench
work=$(mktemp -d -p /var/lib/gpusnap-bench)
trap '"$testbed" stop bench-stock >/dev/null 2>&1 || :; "$testbed" stop bench-ours >/dev/null 2>&1 || :; rm -rf "$work"' EXIT

[ -x "$shims/containerd-shim-gpusnap-v2" ] || { echo "no shim in $shims: make build" >&2; exit 1; }
mkdir "$work/shims"
# Under runc's name: clients do more work with other shims, unaware that nothing else is to be saved.
ln -s "$shims/containerd-shim-gpusnap-v2" "$work/shims/containerd-shim-runc-v2"

ctr() { command ctr --address "/run/$instance/containerd.sock" "$@"; }

start() { # VARIANT ID MEGABYTES
  local options=()
  case $1 in
    gpusnap-runc) options=(--runc-binary runc) ;;
    gpusnap-images) options=(--annotation gpusnap.dev/memory=images) ;;
  esac
  ctr run --detach --null-io --runtime io.containerd.runc.v2 "${options[@]}" docker.io/test/python:1 "$2" python3 -c "
import mmap, os, time
memory = mmap.mmap(-1, $3 << 20) if ${SHARED:-0} else bytearray($3 << 20)
for at in range(0, len(memory), 1 << 20): memory[at : at + (1 << 20)] = os.urandom(1 << 20)
processes = $forks + 1
own = 0
for child in range(1, processes):
    if os.fork() == 0:
        own = child
        break
part = len(memory) // processes
if processes > 1:
    for at in range(own * part, own * part + part, 4096): memory[at] ^= 1
open(f'/ready-{own}', 'w').close()
while True: time.sleep(1)"
  until ctr task exec --exec-id ready "$2" sh -c "cd / && [ \$(ls -d ready-* | wc -l) = $((forks + 1)) ]" 2>/dev/null; do sleep 0.05; done
}

timed() { # SERIES COMMAND...: microseconds to the series
  local series=$1 begin end
  shift
  begin=${EPOCHREALTIME/./}
  "$@" >/dev/null
  end=${EPOCHREALTIME/./}
  echo $((end - begin)) >>"$work/$series"
}

kept() { # VARIANT FOLDER: what a checkpoint takes, in MB
  local store=()
  [ ! -e "$work/store" ] || store=("$work/store")
  du -scm "$2" "${store[@]}" | sed -n '$s/\t.*//p' >"$work/$1.kept"
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
  kept "$1" "$work/images"
  rm -rf "$work/images" "$work/store"
  timed "$1.to-image" ctr container checkpoint --task "$2" "bench/$2"
  remove "$2"
  # A file that the container wrote is not in the image without --rw; nothing has it open.
  timed "$1.restore" ctr container restore --live "$2" "bench/$2"
  remove "$2"
  ctr image rm --sync "bench/$2" >/dev/null
  rm -rf /tmp/ctrd-checkpoint* "$work/store"
}

report() { # SERIES
  local variant
  for variant in "${variants[@]}"; do
    row "$variant" "$work/$variant.$1" "$work/reference"
  done
}

"$testbed" start bench-stock >/dev/null
"$testbed" start bench-ours --shims "$work/shims" --env "GPUSNAP_STORE=$work/store" >/dev/null
for size in "${sizes[@]}"; do
  rm -f "$work"/*.to-folder "$work"/*.to-image "$work"/*.restore
  for ((n = 0; n < rounds; n++)); do
    for variant in "${variants[@]}"; do round "$variant" "bench-$variant" "$size"; done
  done
  echo "containerd 2.1, Python with $size MB, $((forks + 1)) processes, $rounds rounds"
  for variant in "${variants[@]}"; do echo "  kept by $variant: $(<"$work/$variant.kept") MB"; done
  for series in to-folder to-image restore; do
    echo "  ${series//-/ }"
    report "$series"
  done
done

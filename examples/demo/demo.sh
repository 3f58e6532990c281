#!/usr/bin/env bash
# A container's life under gpusnap, by nerdctl, in the test bed. `make demo` prepares everything this needs.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
testbed=$root/tests/testbed/testbed
# Inside the bed, where nerdctl and containerd are.
if [ "${GPUSNAP_DEMO_INSIDE:-}" != 1 ]; then
  exec "$testbed" in env GPUSNAP_DEMO_INSIDE=1 "$root/examples/demo/demo.sh"
fi

instance=demo
container=gpusnap-demo
work=$(mktemp -d)
nerdctl() { command nerdctl --address "/run/$instance/containerd.sock" "$@"; }
clean_up() {
  nerdctl rm -f "$container" >/dev/null 2>&1 || :
  "$testbed" stop "$instance" >/dev/null 2>&1 || :
  rm -rf "$work"
}
trap clean_up EXIT

show() {
  printf '\n\033[1m$ %s\033[0m\n' "$*"
  "$@"
}

mkdir "$work/shims"
ln -s "$root/target/release/containerd-shim-gpusnap-v2" "$work/shims/"
"$testbed" start "$instance" --shims "$work/shims"

# shellcheck disable=SC2016 # the container's shell expands it
show nerdctl run -d --name "$container" --runtime io.containerd.gpusnap.v2 --memory 64m --net host docker.io/test/bb:1 \
  sh -c 'n=0; while :; do n=$((n+1)); echo "counted to $n"; sleep 1; done'
sleep 3
show nerdctl ps
show nerdctl exec "$container" ps
show nerdctl logs "$container"
show nerdctl stats --no-stream "$container"
show nerdctl pause "$container"
show nerdctl ps
show nerdctl unpause "$container"
show nerdctl stop "$container"
show nerdctl rm "$container"
printf '\nThe shim that served it: '
"$work/shims/containerd-shim-gpusnap-v2" -v | sed -n 's/^ *Version: */gpusnap /p'

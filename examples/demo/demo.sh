#!/usr/bin/env bash
# Containers' lives under gpusnap, by nerdctl, in the test bed: first an ordinary one, then two that are checkpointed, end,
# and go on where they were. `make demo` prepares everything this needs.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
testbed=$root/tests/testbed/testbed
# Inside the bed, where nerdctl and containerd are.
if [ "${GPUSNAP_DEMO_INSIDE:-}" != 1 ]; then
  exec "$testbed" in env GPUSNAP_DEMO_INSIDE=1 "$root/examples/demo/demo.sh"
fi

instance=demo
container=gpusnap-demo
server=gpusnap-demo-server
port=18080
work=$(mktemp -d)
nerdctl() { command nerdctl --address "/run/$instance/containerd.sock" "$@"; }
clean_up() {
  nerdctl rm -f "$container" "$server" >/dev/null 2>&1 || :
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

say() { printf '\n\033[1;34m# %s\033[0m\n' "$*"; }
ask() { python3 -c 'import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1]).read().decode())' "http://127.0.0.1:$port/"; }

say "A counter: checkpointed, which ends it, and started from the checkpoint"
# nerdctl tells only runc's shim that a checkpoint is to end the container; here the annotation says so.
# shellcheck disable=SC2016 # the container's shell expands it
show nerdctl run -d --name "$container" --runtime io.containerd.gpusnap.v2 --net none \
  --annotation gpusnap.dev/on-checkpoint=exit docker.io/test/bb:1 \
  sh -c 'n=0; while :; do n=$((n+1)); echo "counted to $n"; sleep 1; done'
sleep 3
show nerdctl checkpoint create --checkpoint-dir "$work/checkpoints" "$container" warm
show nerdctl ps -a
show nerdctl checkpoint ls --checkpoint-dir "$work/checkpoints" "$container"
show nerdctl start --checkpoint warm --checkpoint-dir "$work/checkpoints" "$container"
sleep 3
show nerdctl logs "$container"
show nerdctl rm -f "$container"

say "A Python HTTP server that counts its requests"
show nerdctl run -d --name "$server" --runtime io.containerd.gpusnap.v2 --net host \
  --annotation gpusnap.dev/on-checkpoint=exit docker.io/test/python:1 python3 -c "
from http.server import BaseHTTPRequestHandler, HTTPServer
requests = 0
class Count(BaseHTTPRequestHandler):
    def do_GET(self):
        global requests
        requests += 1
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'request %d since the start' % requests)
HTTPServer(('127.0.0.1', $port), Count).serve_forever()"
until ask >/dev/null 2>&1; do sleep 0.1; done
show ask
show nerdctl checkpoint create --checkpoint-dir "$work/checkpoints" "$server" server
show nerdctl start --checkpoint server --checkpoint-dir "$work/checkpoints" "$server"
show ask
show nerdctl rm -f "$server"

printf '\nThe shim that served them: '
"$work/shims/containerd-shim-gpusnap-v2" -v | sed -n 's/^ *Version: */gpusnap /p'

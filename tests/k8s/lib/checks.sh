# shellcheck shell=bash
# The checks. Each says what it saw on standard output or error, which is shown when it fails.

# eventually CMD...: until CMD succeeds, with its last words when it never does
eventually() {
  local end=$((SECONDS + 60)) words
  until words=$("$@" 2>&1); do
    [ "$SECONDS" -lt "$end" ] || { echo "$words"; echo "not within 60 s: $*"; return 1; }
    sleep 0.2
  done
}

says() { echo "$*"; false; }

field() { kubectl get pod "$1" --output "jsonpath={$2}"; } # POD PATH
of_container() { field "$1" ".status.containerStatuses[?(@.name==\"$2\")].$3"; } # POD CONTAINER PATH
container_id() { of_container "$1" "$2" containerID | sed 's|containerd://||'; }

ready() { kubectl wait --for condition=Ready --timeout 60s "pod/$1" || { kubectl describe pod "$1" | tail -n 12; false; }; }

# The shim that containerd started for the pod is that of the class, not its default.
served_by() { # POD SHIM
  pgrep -f "/containerd-shim-$2-v2 -namespace k8s.io -id $(crictl pods --quiet --no-trunc --name "^$1\$")" || { pgrep -af containerd-shim; false; }
}

has_annotation() {
  local spec
  spec=/run/k8s/io.containerd.runtime.v2.task/k8s.io/$(container_id "$1" "$2")/config.json
  jq -e '.annotations["gpusnap.dev/gpu-patience"] == "61"' "$spec" || { jq .annotations "$spec"; false; }
}

exec_works() {
  local status=0
  echo input | kubectl exec -i "$1" -- sh -c 'cat; echo error >&2; exit 7' >"$work/exec.out" 2>"$work/exec.err" || status=$?
  cat "$work/exec.out" "$work/exec.err"
  [ "$status" = 7 ] || says "exit code $status"
  grep -qx input "$work/exec.out" && grep -qx error "$work/exec.err"
}

# The container's log is 1, 2, 3, ... without a gap, so it is still the first process, and the log grows.
counts_on() {
  local before
  before=$(counted "$1" "$2")
  eventually counts_above "$1" "$2" "$before"
  [ "$(of_container "$1" "$2" restartCount)" = 0 ] || says "restarted"
}

counted() {
  kubectl logs "$1" --container "$2" | tr -d '\r' |
    awk '$1 != NR { print "line " NR " of the log is " $1; exit 1 } END { print NR }'
}

counts_above() {
  local now
  now=$(counted "$1" "$2") && [ "$now" -gt "$3" ] || says "counted to $now, after $3"
}

ended() { # POD PHASE CODE REASON (an expression)
  local state
  kubectl wait --for "jsonpath={.status.phase}=$2" --timeout 60s "pod/$1" || { kubectl describe pod "$1" | tail -n 12; false; }
  state=$(of_container "$1" main state.terminated.exitCode)/$(of_container "$1" main state.terminated.reason)
  [[ $state =~ ^$3/($4)$ ]] || says "$state"
}

restarted() { eventually restarts "$1"; }
restarts() { [ "$(of_container "$1" main restartCount)" -ge 1 ]; }

# By way of the API server, as one does who is not on the node. The answer names the file on the node.
ask_for_checkpoint() { kubectl create --raw "/api/v1/nodes/$node/proxy/checkpoint/default/$1/$2" -f /dev/null; }

checkpoint() { # POD CONTAINER
  local answer archive
  rm -f "$work/archive-$1"
  ready "$1"
  answer=$(ask_for_checkpoint "$1" "$2")
  archive=$(jq -re '.items[0]' <<<"$answer") && [ -s "$archive" ] || says "$answer"
  mv "$archive" "$work/archive-$1"
}

# several times: whether the two meet is luck
checkpoints() { # POD CONTAINER FILE
  for _ in 1 2 3 4 5; do
    checkpoint "$1" "$2"
    archive_is_whole "$1" "$2"
    # runc's shim leaves it out
    [ "$class" = runc ] || archive_has_shm "$1" "$3"
  done
}

archive_is_whole() { # POD [CONTAINER that is still the one that was checkpointed]
  local file
  mkdir -p "$work/archive"
  tar -xf "$work/archive-$1" -C "$work/archive"
  for file in checkpoint/{inventory,pstree,core-1,mm-1,pagemap-1,pages-1,files}.img config.dump spec.dump status.dump container.log; do
    [ -s "$work/archive/$file" ] || says "no $file, but: $(cd "$work/archive" && echo ./* checkpoint/*)"
  done
  [ -z "${2:-}" ] || [ "$(jq -r .id "$work/archive/config.dump")" = "$(container_id "$1" "$2")" ] || says "config.dump is another container's"
  # INVENTORY_MAGIC of CRIU
  [ "$(head -c 4 "$work/archive/checkpoint/inventory.img" | od -An -tx1 | tr -d ' ')" = 16313158 ] || says "inventory.img is not CRIU's"
  [ "$1" != counter ] || tar -tzf "$work/archive/rootfs-diff.tar" | grep -x 'tmp/n'
  rm -rf "$work/archive"
}

archive_has_shm() {
  tar -xOf "$work/archive-$1" checkpoint/dev-shm.tar | tar -tf - | grep -x "$2"
}

no_checkpoint() { # POD CONTAINER WHY (an expression that the message matches)
  local answer
  ! answer=$(ask_for_checkpoint "$1" "$2" 2>&1) || says "$answer"
  [[ $answer =~ $3 ]] || says "$answer"
}

# A connection has to be there first; and nothing may come of it that either side notices.
refuses() {
  ready connected
  counts_on connected client
  no_checkpoint connected main "$1"
  counts_on connected main
  counts_on connected client
}

keeps_connection() {
  ready keeps
  counts_on keeps client
  checkpoint keeps main
  counts_on keeps main
  counts_on keeps client
}

leaves() {
  checkpoint leaves main
  archive_is_whole leaves
  restarted leaves
}

shares_shm() {
  ready shared
  counts_on shared writer
  eventually reader_follows
}

reader_follows() {
  local read written
  written=$(counted shared writer)
  read=$(kubectl exec shared --container reader -- cat /dev/shm/n) && [ "$read" -ge "$written" ] &&
    [ "$(kubectl logs shared --container reader --tail 1)" -ge "$written" ] || says "written $written, read $read"
}

# (the kubelet removes a pod's sandbox, which has ended by then, within a minute: we need not wait for that)
all_deleted() {
  kubectl delete pods --all --timeout 60s
  eventually nothing_runs
  crictl rmp --all --force || :
}

nothing_runs() {
  local left
  left=$(ctr --namespace k8s.io tasks ls --quiet; pgrep -af containerd-shim || :)
  [ -z "$left" ] || says "$left"
}

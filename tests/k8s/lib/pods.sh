# shellcheck shell=bash
# The objects that the test makes. The class and the counter are those that we show to users.

runtime_class() { sed "s/gpusnap\$/$1/" "$root/examples/kubernetes/runtimeclass.yaml"; }

pod_counter() {
  sed -e "s/^\( *runtimeClassName:\).*/\1 $1/" -e "s|^\( *image:\).*|\1 $image|" \
    -e 's|^  name: counter$|&\n  annotations: {gpusnap.dev/gpu-patience: "61"}|' "$root/examples/kubernetes/pod.yaml"
}

annotated() { sed "s|^metadata: {name: [^}]*|&, annotations: {$1}|"; } # ANNOTATION: of the pod on standard input

# pod NAME CLASS [FIELD]...: the head of a pod; its containers follow
pod() {
  local name=$1 class=$2 field; shift 2
  printf 'apiVersion: v1\nkind: Pod\nmetadata: {name: %s}\nspec:\n  runtimeClassName: %s\n  terminationGracePeriodSeconds: 1\n' "$name" "$class"
  for field in "$@"; do echo "  $field"; done
  echo "  containers:"
}

# container NAME SCRIPT [FIELD]...
container() {
  local name=$1 script=$2 field; shift 2
  printf '  - name: %s\n    image: %s\n    command: [sh, -c, %s]\n' "$name" "$image" "$(jq -n --arg script "$script" '$script')"
  for field in "$@"; do echo "    $field"; done
}

pod_shared() {
  pod shared "$1"
  # shellcheck disable=SC2016 # the container's shell expands it
  container writer 'n=0; while :; do n=$((n+1)); echo $n; echo $n >/dev/shm/new; mv /dev/shm/new /dev/shm/n; sleep 0.2; done'
  container reader 'while :; do cat /dev/shm/n; sleep 0.2; done'
}

# The pod's /dev/shm is a volume, as PyTorch's users make it, and files in it come, grow, shrink and go all the time.
pod_churns() {
  local mount='volumeMounts: [{name: shm, mountPath: /dev/shm}]'
  pod churns "$1" 'volumes: [{name: shm, emptyDir: {medium: Memory}}]'
  # shellcheck disable=SC2016
  container main 'echo kept >/dev/shm/kept; n=0; while :; do n=$((n+1)); echo $n; sleep 0.2; done' "$mount"
  # shellcheck disable=SC2016
  container comes 'n=0; while :; do n=$(((n+1)%300)); echo $n >/dev/shm/$n; rm -f /dev/shm/$(((n+150)%300)); done' "$mount"
  container grows 'while :; do cat /bin/busybox >/dev/shm/grows; done' "$mount"
}

# Each line that the client writes comes back over the connection.
pod_connected() {
  pod "${2:-connected}" "$1"
  # shellcheck disable=SC2016
  container main 'nc -ll -p 8080 -e cat & n=0; while :; do n=$((n+1)); echo $n; sleep 0.2; done'
  # shellcheck disable=SC2016
  container client 'until nc 127.0.0.1 8080 -e true; do sleep 0.1; done
    n=0; while :; do n=$((n+1)); echo $n; sleep 0.2; done | nc 127.0.0.1 8080'
}

pod_keeps() { pod_connected "$1" keeps | annotated "gpusnap.dev/tcp: keep"; }

pod_leaves() {
  pod leaves "$1" | annotated "gpusnap.dev/on-checkpoint: exit"
  # shellcheck disable=SC2016
  container main 'n=0; while :; do n=$((n+1)); echo $n; sleep 0.2; done'
}

pod_ends() {
  pod ends "$1" "restartPolicy: Never"
  container main 'exit 3'
}

pod_crashes() {
  pod crashes "$1"
  container main 'sleep 0.2; exit 1'
}

pod_hungry() {
  pod hungry "$1" "restartPolicy: Never"
  container main 'exec tail /dev/zero' 'resources: {limits: {memory: 32Mi}}'
}

pod_terminal() {
  pod terminal "$1"
  # shellcheck disable=SC2016
  container main 'n=0; while :; do n=$((n+1)); echo $n; sleep 0.2; done' 'tty: true' 'stdin: true'
}

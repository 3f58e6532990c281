# shellcheck shell=bash
# The objects that the test makes. The class and the counter are those that we show to users.

runtime_class() { sed "s/gpusnap\$/$1/" "$root/examples/kubernetes/runtimeclass.yaml"; }

pod_counter() {
  sed -e "s/^\( *runtimeClassName:\).*/\1 $1/" -e "s|^\( *image:\).*|\1 $image|" \
    -e 's|^  name: counter$|&\n  annotations: {gpusnap.dev/test: "reached"}|' "$root/examples/kubernetes/pod.yaml"
}

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

# Its /dev/shm is a volume, as PyTorch's users do it, and files in it come, grow and go all the time.
pod_churns() {
  local mount='volumeMounts: [{name: shm, mountPath: /dev/shm}]'
  pod churns "$1" 'volumes: [{name: shm, emptyDir: {medium: Memory}}]'
  # shellcheck disable=SC2016
  container main 'echo kept >/dev/shm/kept; n=0; while :; do n=$((n+1)); echo $n; sleep 0.2; done' "$mount"
  # shellcheck disable=SC2016
  container other 'n=0; while :; do n=$(((n+1)%300)); echo $n >>/dev/shm/log; echo $n >/dev/shm/$n; rm -f /dev/shm/$(((n+150)%300)); done' "$mount"
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

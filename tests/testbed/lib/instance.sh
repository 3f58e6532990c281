# shellcheck shell=bash
# The containerd instances, from inside the bed. What an instance NAME has:
#   /run/NAME                     containerd's state; its socket is /run/NAME/containerd.sock
#   /var/lib/gpusnap-bed/NAME     containerd's root
#   /var/log/containerd-NAME.log  its log
#   $BED_RUN/instances/NAME       launch (what starts it), options, config.toml, pid, index, cni/

# shellcheck source=leaks.sh
. "$TESTBED_DIR/lib/leaks.sh"

instance() { # NAME: sets NAME and DIR
  NAME=${1:-}
  [[ $NAME =~ ^[a-z0-9][a-z0-9-]{0,19}$ ]] || die "an instance's name is up to 20 of a-z, 0-9 and '-': '$NAME'"
  case $NAME in containerd | gpusnap* | lock | netns | runc | crun | user) die "'$NAME' is taken, below /run" ;; esac
  DIR=$BED_RUN/instances/$NAME
}

alive() { # sets PID
  [ -s "$DIR/pid" ] || return 1
  local started
  read -r PID started <"$DIR/pid"
  [ "$(start_time "$PID")" = "$started" ]
}

not_alive() { ! alive; }

cmd_start() {
  local version=2.1 shims=() env=() path= options
  instance "${1:-}"; shift
  while [ "$#" -gt 0 ]; do
    [ "$#" -gt 1 ] || die "$1 wants a value"
    case $1 in
      --containerd) version=$2 ;;
      --shims) shims+=("$(cd "$2" && pwd)") ;;
      --env) env+=("$2") ;;
      *) die "start: what is $1?" ;;
    esac
    shift 2
  done
  case $version in
    2.1) path=/usr/bin ;;
    2.4) path=/opt/containerd-2.4/bin ;;
    *) die "containerd is 2.1 or 2.4, not $version" ;;
  esac
  [ -x "$path/containerd" ] || die "this bed has no containerd $version (it came from a pack without it)"
  [ "${#shims[@]}" = 0 ] || path=$(IFS=:; echo "${shims[*]}"):$path
  options="$path ${env[*]}"
  if alive; then
    [ "$(cat "$DIR/options")" = "$options" ] || die "$NAME runs already, with other options: stop it first"
    return 0
  fi
  mkdir -p "$DIR/cni"
  echo "$options" >"$DIR/options"
  make_launcher "$path:$BED_PATH" "${env[@]}" >"$DIR/launch"
  take_index
  make_config >"$DIR/config.toml"
  make_cni >"$DIR/cni/10-$NAME.conflist"
  launch
  import_images
}

cmd_restart() {
  instance "${1:-}"
  alive || die "$NAME does not run"
  kill -KILL "$PID"
  retry 10 not_alive || die "containerd $PID does not end"
  launch
}

# The environment of containerd is that of its shims: GPUSNAP_* and RUST_* of the caller, and what --env says.
make_launcher() {
  local path=$1 entry env=(); shift
  while IFS= read -r -d '' entry; do
    case $entry in GPUSNAP_*=* | RUST_*=*) env+=("$entry") ;; esac
  done < <(env -0 | sort -z)
  echo "exec setsid env -i HOME=/root LANG=C.UTF-8 PATH=$(printf '%q ' "$path" "${env[@]}" "$@")containerd --config $DIR/config.toml --log-level debug"
}

# A small number that no other instance has, for addresses.
take_index() {
  [ ! -s "$DIR/index" ] || return 0
  local i
  for i in $(seq 1 250); do
    if mkdir "$BED_RUN/index/$i" 2>/dev/null; then
      echo "$i" >"$DIR/index"
      return 0
    fi
  done
  die "too many instances"
}

make_config() {
  local root=$BED_DATA/$NAME
  cat <<TOML
version = 3
root = "$root"
state = "/run/$NAME"
# nri: one socket for the whole machine, so only one instance could have it
disabled_plugins = ["io.containerd.nri.v1.nri"]

[grpc]
  address = "/run/$NAME/containerd.sock"

[plugins.'io.containerd.internal.v1.opt']
  path = "$root/opt"

[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "docker.io/test/pause:1"

[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true  # root without CAP_SYS_RESOURCE cannot lower oom_score_adj
  disable_apparmor = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "$DIR/cni"
  [plugins.'io.containerd.cri.v1.runtime'.containerd]
    default_runtime_name = "runc"
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      pod_annotations = ["gpusnap.dev/*"]
      container_annotations = ["gpusnap.dev/*"]
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.gpusnap]
      runtime_type = "io.containerd.gpusnap.v2"
      pod_annotations = ["gpusnap.dev/*"]
      container_annotations = ["gpusnap.dev/*"]
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.gpusnap-runc]
      runtime_type = "io.containerd.gpusnap.v2"
      pod_annotations = ["gpusnap.dev/*"]
      container_annotations = ["gpusnap.dev/*"]
      [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.gpusnap-runc.options]
        BinaryName = "runc"
TOML
}

# The CRI's network of this instance: a bridge of its own.
make_cni() {
  local index
  index=$(cat "$DIR/index")
  cat <<JSON
{ "cniVersion": "1.0.0", "name": "$NAME", "plugins": [
  { "type": "bridge", "bridge": "cri$index", "isGateway": true,
    "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.88.$index.0/24" }]], "routes": [{ "dst": "0.0.0.0/0" }] } },
  { "type": "portmap", "capabilities": { "portMappings": true } } ] }
JSON
}

# The ctr that belongs to this instance's containerd.
instance_ctr() { PATH=$(sed -n 's/.* PATH=\([^ ]*\).*/\1/p' "$DIR/launch") ctr --address "/run/$NAME/containerd.sock" "$@"; }

launch() {
  mkdir -p "/run/$NAME" "$BED_DATA/$NAME"
  (
    close_fds
    cd /
    # shellcheck source=/dev/null
    . "$DIR/launch"
  ) </dev/null >>"/var/log/containerd-$NAME.log" 2>&1 &
  echo "$! $(start_time $!)" >"$DIR/pid"
  retry 20 ready || { tail -n 5 "/var/log/containerd-$NAME.log" >&2; die "containerd $NAME does not answer"; }
}

ready() {
  alive || { tail -n 5 "/var/log/containerd-$NAME.log" >&2; die "containerd $NAME ended"; }
  [ -S "/run/$NAME/containerd.sock" ] && crictl --timeout 2s --runtime-endpoint "unix:///run/$NAME/containerd.sock" info >/dev/null 2>&1
}

import_images() {
  local namespace file pids=() pid
  for namespace in default k8s.io; do
    for file in images python; do
      [ -e "/opt/gpusnap-bed/$file.tar" ] || continue # (a pack may lack Python)
      instance_ctr -n "$namespace" image import "/opt/gpusnap-bed/$file.tar" >"$DIR/import-$namespace-$file.log" 2>&1 &
      pids+=($!)
    done
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || { cat "$DIR"/import-*.log >&2; die "cannot import the images into $NAME"; }
  done
}

cmd_stop() {
  instance "${1:-}"
  if alive; then
    kill -TERM "$PID"
    retry 5 not_alive || kill -KILL "$PID"
    retry 5 not_alive || die "containerd $PID does not end"
  fi
  retry 10 no_processes || die "some processes of $NAME do not end"
  clear_state
  if [ "${2:-}" != --keep ]; then
    rm -rf "${BED_DATA:?}/$NAME"
    [ ! -s "$DIR/index" ] || rmdir "$BED_RUN/index/$(cat "$DIR/index")"
    rm -rf "$DIR" "/var/lib/cni/networks/$NAME"
  fi
}

# Kill the shims of this instance, and the processes whose root lies in its snapshots; true when there were none.
no_processes() {
  local proc pid none=0
  for proc in /proc/[0-9]*; do
    pid=${proc#/proc/}
    [ "$pid" != 1 ] || continue
    if tr '\0' '\n' <"$proc/cmdline" 2>/dev/null | grep -qxF "/run/$NAME/containerd.sock" &&
      [[ $(readlink "$proc/exe") == *containerd-shim* ]] ||
      { [ ! "$proc/ns/mnt" -ef /proc/1/ns/mnt ] && grep -qF "$BED_DATA/$NAME/" "$proc/mountinfo" 2>/dev/null; }; then
      kill -KILL "$pid" 2>/dev/null || continue
      none=1
    fi
  done
  return $none
} 2>/dev/null

# What containerd and the shims keep on disk of containers that are no more.
clear_state() {
  local bundle id namespace path
  for bundle in "/run/$NAME"/io.containerd.runtime.v2.task/*/*; do
    [ -d "$bundle" ] || continue
    id=${bundle##*/}; namespace=${bundle%/*}; namespace=${namespace##*/}
    for path in $(jq -r '.linux.namespaces[]? | select(.type == "network") | .path // empty' "$bundle/config.json" 2>/dev/null); do
      case $path in
        /run/netns/* | /var/run/netns/*) umount -l "$path" 2>/dev/null || :; rm -f "$path" ;;
      esac
    done
    # (a restored container's cgroup is the one its spec names, not one of its own id)
    path=$(jq -r '.linux.cgroupsPath // empty' "$bundle/config.json" 2>/dev/null) || path=
    [ -z "$path" ] || find /sys/fs/cgroup -depth -type d \( -path "*$path" -o -path "*$path/*" \) -exec rmdir {} \; 2>/dev/null || :
    rm -rf "/run/containerd/runc/$namespace/$id" "/run/containerd/gpusnap/$namespace/$id"
  done
  # the last mounted first
  for path in $(cut -d' ' -f5 /proc/self/mountinfo | grep -E "^(/run/$NAME|$BED_DATA/$NAME)/" | tac); do
    umount -l "$path" || :
  done
  rm -rf "/run/$NAME"
  for path in /run/containerd/s/*; do
    grep -qF " $path" /proc/net/unix || rm -f "$path"
  done
}

cmd_status() {
  local dir
  for dir in "$BED_RUN"/instances/*; do
    [ -d "$dir" ] || continue
    instance "${dir##*/}"
    if alive; then
      echo "$NAME: containerd $PID, $(instance_ctr version | awk '/^Server/ { s = 1 } s && /Version/ { print $2; exit }'), $(grep -c . < <(instance_ctr -n default task ls -q; instance_ctr -n k8s.io task ls -q)) tasks"
    else
      echo "$NAME: no containerd"
    fi
  done
  echo "the bed is up"
}

cmd_registry() {
  local pid=$BED_RUN/registry.pid
  case ${1:-} in
    start)
      ! kill -0 "$(cat "$pid" 2>/dev/null || echo x)" 2>/dev/null || return 0
      command -v docker-registry >/dev/null || die "this bed has no docker-registry (it came from a pack)"
      mkdir -p /var/lib/registry
      cat >"$BED_RUN/registry.yml" <<'YAML'
version: 0.1
storage: { filesystem: { rootdirectory: /var/lib/registry }, delete: { enabled: true } }
http: { addr: "127.0.0.1:5000" }
YAML
      (
        close_fds
        exec setsid docker-registry serve "$BED_RUN/registry.yml"
      ) </dev/null >/var/log/registry.log 2>&1 &
      echo $! >"$pid"
      # shellcheck disable=SC2016
      retry 10 bash -c 'exec 3<>/dev/tcp/127.0.0.1/5000' 2>/dev/null || { tail -n 5 /var/log/registry.log >&2; die "the registry does not answer"; }
      ;;
    stop)
      [ ! -s "$pid" ] || kill "$(cat "$pid")" 2>/dev/null || :
      rm -rf "$pid" /var/lib/registry
      ;;
    *) die "registry start, or registry stop" ;;
  esac
}

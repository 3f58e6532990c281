# shellcheck shell=bash
# `testbed leaks`: what containers have left in the bed, one thing a line, sorted. A test compares it with what it was
# before. Lines say what a thing is by names, not by numbers that change from run to run.

cmd_leaks() {
  { leaked_processes; leaked_mounts; leaked_cgroups; leaked_files; } | LC_ALL=C sort
}

# Every process but the daemons that `testbed` started and what runs by `testbed in` (its parent is outside: 0).
leaked_processes() {
  local proc pid parent daemons args kind
  daemons=" $(sed -s 's/ .*//' "$BED_RUN"/instances/*/pid "$BED_RUN"/registry.pid | tr '\n' ' ' || :)"
  for proc in /proc/[0-9]*; do
    pid=${proc#/proc/}
    case $daemons in *" $pid "*) continue ;; esac
    args=$(tr '\0' ' ' <"$proc/cmdline") && [ -n "$args" ] && [ -e "$proc/ns/mnt" ] || continue
    parent=$(sed 's/.*) . //; s/ .*//' "$proc/stat") || continue
    if [[ $args == *containerd-shim-* && $args == *"-address "* ]]; then
      kind=shim
    elif [ ! "$proc/ns/mnt" -ef /proc/1/ns/mnt ]; then
      kind=container
    elif [ "$parent" = 1 ]; then
      kind=orphan
    else
      continue
    fi
    echo "process $kind ${args% }"
  done
} 2>/dev/null

leaked_mounts() {
  cut -d' ' -f5 /proc/1/mountinfo | sort | comm -13 "$BED_RUN/mounts" - | sed 's/^/mount /'
}

# All but the roots, the leaf that the bed itself runs in, and empty cgroups at the top (one per containerd namespace).
leaked_cgroups() {
  local dir name
  for dir in $(cgroup_dirs); do
    find "$dir" -mindepth 1 -type d | while read -r name; do
      case ${name#"$dir"/} in
        init) continue ;;
        */*) ;;
        *) grep -q . "$name/cgroup.procs" || continue ;;
      esac
      echo "cgroup ${name#/sys/fs/cgroup/}"
    done
  done
}

cgroup_dirs() { awk '{ for (i = 7; $i != "-"; i++); if ($(i+1) ~ /^cgroup2?$/) print $5 }' /proc/self/mountinfo; }

leaked_files() {
  local path
  find /run -type s ! -path '/run/*/containerd.sock' ! -path '/run/*/containerd.sock.ttrpc' -printf 'socket %p\n'
  for path in /run/*/io.containerd.runtime.v2.task/*/*; do
    [ ! -e "$path" ] || echo "bundle $path"
  done
  for path in /run/containerd/runc/*/* /run/runc/* /run/crun/*; do
    [ ! -e "$path" ] || echo "runtime-state $path"
  done
  for path in /run/netns/*; do
    [ ! -e "$path" ] || echo "netns $path"
  done
}

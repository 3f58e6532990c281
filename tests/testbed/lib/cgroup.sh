# shellcheck shell=bash
# The bed's own cgroup, in every mounted hierarchy, as seen from the host. A cgroup namespace shows it to the bed as the
# root, so all that containers leave in cgroups lies below one folder per hierarchy.
#
# Version 2 gives controllers only to children of a cgroup without processes: the bed's own processes therefore sit in
# a leaf, init. Version 1 does not mind.

BED_ID=gpusnap-bed-$(cksum <<<"$STATE" | cut -d' ' -f1)   # the cgroup's name

# "mountpoint fstype options" of each hierarchy
cgroup_mounts() {
  awk '{ for (i = 7; $i != "-"; i++); if ($(i+1) ~ /^cgroup2?$/ && $5 ~ /^\/sys\/fs\/cgroup/) print $5, $(i+1), $(i+3) }' /proc/self/mountinfo
}

make_cgroups() {
  local dir type bed file
  cgroup_mounts | grep -q . || die "no cgroup hierarchy is mounted below /sys/fs/cgroup"
  while read -r dir type _; do
    bed=$dir/$BED_ID
    if [ "$type" = cgroup2 ]; then
      mkdir -p "$bed/init"
      enable_controllers "$dir"
    else
      mkdir -p "$bed"
      for file in cpuset.cpus cpuset.mems; do
        [ ! -e "$bed/$file" ] || cat "$dir/$file" >"$bed/$file"
      done
    fi
  done < <(cgroup_mounts)
}

enable_controllers() {
  local controller
  for controller in $(cat "$1/cgroup.controllers"); do
    echo "+$controller" 2>/dev/null >"$1/cgroup.subtree_control" || say "cannot enable the cgroup controller $controller below $1"
  done
}

# Before the cgroup namespace is made: what a process is in then becomes the namespace's root.
enter_cgroup_roots() {
  local dir
  while read -r dir _; do
    echo 0 >"$dir/$BED_ID/cgroup.procs"
  done < <(cgroup_mounts)
}

# Afterwards: everything into the leaf, and controllers for the others. Prints the files to enter the bed by.
settle_cgroups() {
  local dir type bed pid
  while read -r dir type _; do
    bed=$dir/$BED_ID
    if [ "$type" = cgroup2 ]; then
      while read -r pid; do
        echo "$pid" 2>/dev/null >"$bed/init/cgroup.procs" || :
      done < <(cat "$bed/cgroup.procs")
      enable_controllers "$bed"
      echo "$bed/init/cgroup.procs"
    else
      echo "$bed/cgroup.procs"
    fi
  done < <(cgroup_mounts)
}

# On version 1 a frozen process does not die: one that was being checkpointed when its test was killed.
thaw_cgroups() {
  local dir state
  while read -r dir _; do
    while read -r state; do
      echo THAWED 2>/dev/null >"$state" || :
    done < <(find "$dir/$BED_ID" -name freezer.state 2>/dev/null)
  done < <(cgroup_mounts)
}

# Kill what is left in the bed's cgroups and remove them.
remove_cgroups() {
  local dir
  while read -r dir _; do
    [ -d "$dir/$BED_ID" ] || continue
    retry 10 remove_cgroup "$dir/$BED_ID" || say "cannot remove $dir/$BED_ID"
  done < <(cgroup_mounts)
}

remove_cgroup() {
  local procs pid
  find "$1" -depth -type d -exec rmdir {} \; 2>/dev/null || :
  [ -d "$1" ] || return 0
  procs=$(find "$1" -name cgroup.procs -exec cat {} + 2>/dev/null) || :
  for pid in $procs; do
    kill -KILL "$pid" 2>/dev/null || :
  done
  return 1
}

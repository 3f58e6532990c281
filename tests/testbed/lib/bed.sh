# shellcheck shell=bash
# The bed as the host sees it: a process (bed-init) in namespaces of its own. `up` makes it, `in` enters it, and
# killing it ends all that was ever started in the bed.

# shellcheck source=cgroup.sh
. "$TESTBED_DIR/lib/cgroup.sh"

BED=$STATE/bed            # init: "PID START-TIME REPO"; procs: the cgroup.procs files to enter by

# Sets BED_PID and BED_REPO if the bed is up.
bed_alive() {
  local started
  [ -s "$BED/init" ] || return 1
  read -r BED_PID started BED_REPO <"$BED/init"
  [ "$(start_time "$BED_PID")" = "$started" ]
}

cmd_up() {
  [ -e "$STATE/.built" ] || die "run 'testbed build' first"
  locked "$STATE/bed.lock" bed_up
}

bed_up() {
  if bed_alive; then
    [ "$BED_REPO" = "$REPO" ] || die "the bed is up for the checkout $BED_REPO: 'testbed down' first, or set GPUSNAP_TESTBED"
    return 0
  fi
  bed_clear
  mkdir -p "$BED" "$SCRATCH"/{var-lib,var-log,var-tmp,root}
  chmod 1777 "$SCRATCH/var-tmp"; chmod 700 "$SCRATCH/root"
  cp -a "$ROOT/etc" "$SCRATCH/etc"
  bed_etc "$SCRATCH/etc"
  make_cgroups
  bed_boot </dev/null >"$BED/boot.log" 2>&1 &
  retry 20 bed_settled $! || :
  bed_booted || { cat "$BED/boot.log" >&2; bed_clear; die "the bed did not start"; }
  settle_cgroups >"$BED/procs"
  mv "$BED/init.new" "$BED/init"
}

bed_etc() {
  local etc=$1
  mkdir -p "$etc"/cni/net.d "$etc"/nerdctl "$etc"/gpusnap
  echo gpusnap-bed >"$etc/hostname"
  printf '127.0.0.1 localhost gpusnap-bed\n::1 localhost\n' >"$etc/hosts"
  echo 'nameserver 192.0.2.1' >"$etc/resolv.conf" # nobody; but nerdctl puts public ones where there is none
  printf 'cgroup_manager = "cgroupfs"\ncni_path = "/usr/lib/cni"\n' >"$etc/nerdctl/nerdctl.toml"
  echo 'timeout: 20' >"$etc/crictl.yaml"
}

bed_boot() {
  close_fds
  enter_cgroup_roots
  TESTBED_MOUNTS=$(cgroup_mounts) GPUSNAP_TESTBED=$STATE exec setsid \
    unshare --mount --net --pid --cgroup --uts --ipc --fork --propagation private bash "$TESTBED_DIR/lib/boot.sh"
}

# boot.sh writes its pid (as the host sees it) and becomes bed-init when all is ready.
bed_booted() {
  local pid
  read -r pid _ 2>/dev/null <"$BED/init.new" && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = bed-init ]
}

bed_settled() { bed_booted || ! kill -0 "$1" 2>/dev/null; }

# Run a command in the bed, as a child of this process that ends when this process does.
cmd_in() {
  local entry env=() cwd=/
  bed_alive || die "the bed is not up"
  while IFS= read -r -d '' entry; do
    case $entry in
      RUST_*=* | GPUSNAP_*=* | CARGO_MANIFEST_DIR=* | CARGO_BIN_EXE_*=* | CARGO_PKG_*=* | CARGO_TARGET_TMPDIR=* | LLVM_PROFILE_FILE=* | TERM=* | NO_COLOR=* | CI=*)
        env+=("$entry")
        ;;
    esac
  done <"/proc/$$/environ"
  case $PWD/ in "$BED_REPO"/*) cwd=$PWD ;; esac
  while read -r entry; do
    echo 0 >"$entry"
  done <"$BED/procs"
  close_fds
  cd /
  exec nsenter --target "$BED_PID" --mount --net --pid --cgroup --uts --ipc \
    /usr/bin/env --ignore-environment --chdir="$cwd" HOME=/root LANG=C.UTF-8 TERM=dumb PATH="$BED_PATH:$TESTBED_DIR" "${env[@]}" GPUSNAP_IN_TESTBED=1 \
    /usr/bin/setpriv --pdeathsig KILL -- "$@"
}

cmd_down() {
  mkdir -p "$STATE"
  locked "$STATE/bed.lock" bed_clear
}

# End a bed, or what one that was killed half-way left.
bed_clear() {
  if bed_alive; then
    kill -KILL "$BED_PID"
    retry 10 bed_gone || die "process $BED_PID of the bed does not end"
  fi
  rm -f "$BED/init"
  remove_cgroups
  rm -rf --one-file-system "$SCRATCH"
}

bed_gone() {
  thaw_cgroups
  ! bed_alive
}

cmd_clean() {
  [ -d "$STATE" ] || return 0
  cmd_down
  rm_root "$STATE"
}

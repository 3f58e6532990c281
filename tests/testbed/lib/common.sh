# shellcheck shell=bash
# Names and small helpers that both sides of the test bed share (the host, and the inside of the bed).

STATE=${GPUSNAP_TESTBED:-/var/tmp/gpusnap-testbed}
ROOT=$STATE/root             # the Debian root, as built
TOOLS=$STATE/tools           # what is compiled from Go: containerd, nerdctl, crictl
IMAGES=$STATE/images         # the container images, and bed-init
SCRATCH=$STATE/scratch       # what a running bed writes; emptied by `down`
REPO=$(cd "$TESTBED_DIR/../.." && pwd -P)

BED_RUN=/run/gpusnap-testbed # inside the bed: its own bookkeeping
BED_DATA=/var/lib/gpusnap-bed
BED_TOOLS=/opt/gpusnap-tools # $TOOLS, as the bed sees it
BED_PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin

say() { echo "testbed: $*" >&2; }
die() { say "$*"; exit 1; }

# Are we inside a bed already?
inside_bed() { [ -e "$BED_RUN/inside" ]; }

# retry SECONDS CMD...: until CMD succeeds
retry() {
  local end=$((SECONDS + $1)); shift
  until "$@"; do
    [ "$SECONDS" -lt "$end" ] || return 1
    sleep 0.05
  done
}

# Close every descriptor above 2. One that points into another mount namespace makes criu fail
# ("Can't lookup mount=N for fd=M"), and one that is inherited keeps locks and pipes alive.
close_fds() {
  local fd
  for fd in /proc/"$BASHPID"/fd/*; do
    fd=${fd##*/}
    [ "$fd" -le 2 ] || eval "exec $fd>&-" 2>/dev/null || :
  done
}

# locked FILE CMD...: run CMD (a function) in a subshell that holds FILE's lock; what stays must close_fds
locked() {
  local file=$1; shift
  (
    exec {lock_fd}>"$file"
    flock "$lock_fd"
    "$@"
  )
}

# When PID was started (it and the pid name one process for ever); nothing for one that has ended.
start_time() {
  local stat=()
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  read -ra stat <<<"${stat##*) }" # from the third field on: the state, ...
  [ "${stat[0]}" != Z ] && echo "${stat[19]}"
}

# rm_root DIR: remove a tree that nothing may be mounted in (rm -rf would follow a mount)
rm_root() {
  [ -e "$1" ] || return 0
  ! grep -qF " $1/" /proc/self/mountinfo || die "$1 has something mounted in it"
  rm -rf --one-file-system "$1"
}

# in_chroot ROOT CMD...: with /proc, in a mount namespace that ends with the command
in_chroot() {
  local root=$1; shift
  # shellcheck disable=SC2016
  unshare -m --propagation private sh -c 'mount -t proc proc "$1/proc" && root=$1 && shift && exec chroot "$root" "$@"' sh "$root" "$@"
}

# host_packages NAME...: install Debian packages on this machine
host_packages() {
  say "installing on this machine: $*"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } >"$STATE/host-apt.log" 2>&1 ||
    { tail -n 20 "$STATE/host-apt.log" >&2; die "cannot install $*"; }
}

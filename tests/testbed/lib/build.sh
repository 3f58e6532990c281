# shellcheck shell=bash
# `testbed build`: the Debian root, the tools, the images. Everything is made under a temporary name and renamed when
# whole, and carries a stamp of what it was made from.

# shellcheck source=../versions.sh
. "$TESTBED_DIR/versions.sh"
# shellcheck source=golang.sh
. "$TESTBED_DIR/lib/golang.sh"
# shellcheck source=tools.sh
. "$TESTBED_DIR/lib/tools.sh"

ROOT_FORMAT=1     # raise to have every root rebuilt

# The mirror this machine's own apt uses for Debian.
debian_mirror() {
  local found
  found=$(sed -n -E 's|^URIs: *(http[^ ]*/debian/?)( .*)?$|\1|p; s|^deb (\[[^]]*\] )?(http[^ ]*/debian/?) .*|\2|p' \
    /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | head -n 1)
  echo "${GPUSNAP_TESTBED_MIRROR:-${found:-http://deb.debian.org/debian}}"
}

root_stamp() { echo "$ROOT_FORMAT $DEBIAN_SUITE ${ROOT_PACKAGES[*]} ${BUILD_PACKAGES[*]}"; }

build_root() {
  local new=$STATE/root.new keyring=/usr/share/keyrings/debian-archive-keyring.gpg
  [ "$(cat "$ROOT/.stamp" 2>/dev/null)" != "$(root_stamp)" ] || return 0
  ! bed_alive || die "the root must be rebuilt and the bed is up: 'testbed down' first"
  command -v debootstrap >/dev/null && [ -e $keyring ] || host_packages debootstrap debian-archive-keyring
  say "debootstrap $DEBIAN_SUITE"
  rm_root "$new"
  # Bookworm's debootstrap has no script for forky, which is made like sid. Bookworm's key also signs forky.
  # (A mount namespace of its own: what debootstrap mounts must not stay if it is killed.)
  unshare --mount --propagation private debootstrap --variant=minbase --keyring=$keyring "$DEBIAN_SUITE" "$new" "$(debian_mirror)" /usr/share/debootstrap/scripts/sid \
    >"$STATE/debootstrap.log" 2>&1 || { tail -n 5 "$STATE/debootstrap.log" >&2; die "debootstrap failed"; }
  # A frozen mirror's Release file can be past its Valid-Until.
  echo 'Acquire::Check-Valid-Until "false";' >"$new/etc/apt/apt.conf.d/99testbed"
  cp /etc/apt/apt.conf.d/*proxy* "$new/etc/apt/apt.conf.d/" 2>/dev/null || :
  printf '#!/bin/sh\nexit 101\n' >"$new/usr/sbin/policy-rc.d"; chmod +x "$new/usr/sbin/policy-rc.d"
  cp /etc/resolv.conf "$new/etc/resolv.conf"
  say "installing the root's packages"
  in_chroot "$new" sh -c "apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends ${ROOT_PACKAGES[*]} ${BUILD_PACKAGES[*]} && apt-get clean" \
    >"$STATE/root-apt.log" 2>&1 || { tail -n 20 "$STATE/root-apt.log" >&2; die "cannot install the root's packages"; }
  prepare_root "$new"
  in_chroot "$new" dpkg-query -W -f '${Package}=${Version}\n' >"$new/.packages"
  root_stamp >"$new/.stamp"
  rm_root "$ROOT"
  mv "$new" "$ROOT"
}

# What a running bed expects of its (read-only) root.
prepare_root() {
  local root=$1
  mkdir -p "$root"/opt/gpusnap-bed "$root"/opt/containerd-2.4/bin
  rm -rf "$root"/usr/local/bin; mkdir -p "$root"/usr/local/bin
  rm -rf "${root:?}"/var/lib/apt/lists/* "${root:?}"/var/cache/apt/*
}

check_versions() {
  local pin name want have
  for pin in "${EXPECTED_DEBIAN[@]}"; do
    name=${pin%%=*} want=${pin#*=}
    have=$(sed -n "s/^$name=//p" "$ROOT/.packages")
    case ${have#*:} in
      "$want"*) ;;
      *) say "WARNING: Debian's $name is $have, the tests were written for $want" ;;
    esac
  done
}

# The two images and bed-init come from the root's own gcc, busybox and umoci.
build_images() {
  local stamp
  stamp=$(cat "$TESTBED_DIR/pause.c" "$TESTBED_DIR/lib/images.sh" "$ROOT/.stamp" | cksum)
  [ "$(cat "$IMAGES/.stamp" 2>/dev/null)" != "$stamp" ] || return 0
  say "building the images"
  rm -rf "$IMAGES.tmp"; mkdir -p "$IMAGES.tmp"
  cp "$TESTBED_DIR/pause.c" "$TESTBED_DIR/lib/images.sh" "$IMAGES.tmp/"
  # shellcheck disable=SC2016
  unshare -m --propagation private sh -ec 'mount --bind "$2" "$1/mnt"; mount -t proc proc "$1/proc"; exec chroot "$1" bash /mnt/images.sh /mnt' \
    sh "$ROOT" "$IMAGES.tmp" >"$STATE/images.log" 2>&1 || { tail -n 20 "$STATE/images.log" >&2; die "cannot build the images"; }
  echo "$stamp" >"$IMAGES.tmp/.stamp"
  rm -rf "$IMAGES"
  mv "$IMAGES.tmp" "$IMAGES"
}

build_all() {
  # A packed bed (see pack.sh) is complete and cannot be rebuilt: there is no network where it is used.
  [ ! -e "$STATE/.packed" ] || return 0
  build_root
  check_versions
  build_tools
  build_images
  touch "$STATE/.built"
}

cmd_build() {
  mkdir -p "$STATE"
  locked "$STATE/build.lock" build_all
}

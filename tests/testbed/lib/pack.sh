# shellcheck shell=bash
# `testbed pack` and `unpack`: the bed for a machine that has no network and need not be Debian. A pack is an
# xz-compressed tar of (parts of) a state folder, with a root trimmed to what runs; xz, because Python alone can read it.
#
# Parts: base (the root, runc, crun, criu, the images), 2.1 and 2.4 (the containerds), cni, nerdctl, crictl, python (the
# image with it).

# shellcheck source=../versions.sh
. "$TESTBED_DIR/versions.sh"

ALL_PARTS=base,2.1,2.4,cni,nerdctl,crictl,python
CNI_PLUGINS=(bridge host-local loopback portmap firewall tuning)

# What a Debian root cannot do without; ROOT_PACKAGES say the rest.
PACK_ESSENTIALS=(base-files bash coreutils dash diffutils findutils grep gzip hostname libc-bin mawk mount sed tar util-linux)
PACK_WITHOUT='^(ca-certificates|containernetworking-plugins|debconf|gcc-.*-base|libc-gconv-modules-extra|libdb5.3t64|libpam-modules|libpam-modules-bin|libpam-runtime|openssl|openssl-provider-legacy|perl-base)$'
PACK_WITHOUT_FILES='^/usr/(games|include|lib/(containerd|systemd|udev|tmpfiles.d|.*/gconv|.*/perl.*)|share/(base-files|bash-completion|bug|common-licenses|debconf|doc|fish|gdb|i18n|info|lintian|locale|man|menu|pam|pam-configs|perl5|pixmaps|polkit-1|zsh))(/|$)|\.(a|o)$|/__pycache__|^/usr/s?bin/(containerd.*|ctr|fs-idmap|pidfd-kill|recvtty|remap-rootfs|sd-helper|seccompagent)$'

cmd_pack() {
  local file parts=$ALL_PARTS stage=$STATE/pack.tmp
  [ "$#" -ge 1 ] || die "pack FILE [--only PART,...], of $ALL_PARTS"
  file=$(realpath "$1"); shift
  [ "${1:-}" != --only ] || { parts=$2; shift 2; }
  [ "$#" = 0 ] || die "pack: what is $1?"
  [ -e "$STATE/.built" ] && [ ! -e "$STATE/.packed" ] || die "run 'testbed build' first"
  command -v xz >/dev/null || host_packages xz-utils
  rm -rf "$stage"; mkdir -p "$stage"
  touch "$stage/.packed"
  pack_files "$parts" >"$stage/files"
  say "packing $parts"
  # A dictionary as large as several of these binaries: they have much in common.
  tar -C "$STATE" --numeric-owner --no-recursion --verbatim-files-from -T "$stage/files" -cf - -C "$stage" .packed |
    nice -n 5 xz --threads=1 --x86 --lzma2=preset=6,dict=192MiB >"$file.tmp"
  mv "$file.tmp" "$file"
  rm -rf "$stage"
  say "$file: $(($(stat -c %s "$file") / 1048576)) MiB"
}

# pack_files PARTS: the files and folders of the state folder that these parts consist of
pack_files() {
  local part
  cd "$STATE"
  for part in ${1//,/ }; do
    case $part in
      base) pack_base ;;
      2.1) printf 'root/usr/bin/%s\n' containerd ctr containerd-shim-runc-v2 ;;
      2.4) find tools/containerd ;;
      cni) printf 'root/usr/lib/cni/%s\n' "${CNI_PLUGINS[@]}" ;;
      nerdctl | crictl) find "tools/$part" ;;
      python) echo images/python.tar ;;
      *) die "a pack has no part $part, only $ALL_PARTS" ;;
    esac
  done
}

# Of the root: the packages that ROOT_PACKAGES need, without what nobody reads there; the links that alternatives made;
# the configuration; empty folders for what is mounted.
pack_base() {
  local info=root/var/lib/dpkg/info package
  echo .built
  # Only a bed that has been up has them.
  mkdir -p root/host root/opt/gpusnap-bed root/opt/containerd-2.4/bin
  find images ! -name python.tar
  printf 'root/%s\n' .packages .stamp bin sbin lib lib64 boot dev home host media mnt opt opt/containerd-2.4 opt/containerd-2.4/bin opt/gpusnap-bed \
    proc root run srv sys tmp usr usr/local usr/local/bin var var/lib var/log var/tmp var/cache
  find root/usr/bin root/usr/sbin -lname '/etc/alternatives/*'
  find root/etc -path root/etc/ssl -prune -o -path root/etc/apt -prune -o -print
  packed_packages | while read -r package; do
    cat "$info/$package.list" 2>/dev/null || cat "$info/$package:amd64.list"
  done | sort -u | sed -E 's#^/(bin|sbin|lib|lib64)/#/usr/\1/#; s#^/\.$##' | grep -vE "$PACK_WITHOUT_FILES" | grep -vE '^(/etc/|/run/|$)' |
    while read -r package; do
      [ ! -e "root$package" ] && [ ! -L "root$package" ] || echo "root$package"
    done
}

packed_packages() {
  # shellcheck disable=SC2046
  in_chroot "$ROOT" apt-cache depends --recurse --installed --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances \
    "${ROOT_PACKAGES[@]}" "${PACK_ESSENTIALS[@]}" | grep '^[a-z]' | sort -u | grep -vE "$PACK_WITHOUT"
}

# Several packs may be unpacked into one state folder, one after the other.
cmd_unpack() {
  [ "$#" = 1 ] || die "unpack FILE"
  local new=$STATE/unpack.tmp
  ! bed_alive || die "the bed is up: 'testbed down' first"
  rm -rf "$new"; mkdir -p "$new"
  if command -v xz >/dev/null; then
    xz -dc "$1"
  else
    python3 -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), sys.stdout.buffer, 1 << 20)' "$1"
  fi | tar -C "$new" --numeric-owner -xpf -
  cp -a --link --force "$new/." "$STATE/"
  rm -rf "$new"
}

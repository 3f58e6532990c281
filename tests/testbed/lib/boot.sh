# shellcheck shell=bash
# Process 1 of the bed: in new namespaces, makes the root and becomes bed-init. A plain chroot would not do: criu wants
# "/" to be a mount point, /run to be a tmpfs, and runc wants to pivot_root.
set -euo pipefail
TESTBED_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=common.sh
. "$TESTBED_DIR/lib/common.sh"
BED=$STATE/bed

# /proc is still the host's: this is our pid there
read -r pid _ </proc/self/stat
echo "$pid $(start_time "$pid") $REPO" >"$BED/init.new"

bind() { # FROM TO [ro]: bind FROM (file or folder, with what is mounted in it) at TO below the new root
  local to=$ROOT$2
  if [ -d "$1" ]; then mkdir -p "$to"; else mkdir -p "${to%/*}"; [ -e "$to" ] || : >"$to"; fi
  mount --rbind "$1" "$to"
  [ "${3:-}" != ro ] || mount -o remount,bind,ro "$to"
}

mount --bind "$ROOT" "$ROOT"
mount -t tmpfs -o mode=755 tmpfs "$ROOT/run"
mount -t tmpfs -o mode=1777 tmpfs "$ROOT/tmp"

# What may be written: everything else of the root is read-only, so that no test can spoil it for the next.
bind "$SCRATCH/etc" /etc
bind "$SCRATCH/var-lib" /var/lib
bind "$SCRATCH/var-log" /var/log
bind "$SCRATCH/var-tmp" /var/tmp
bind "$SCRATCH/root" /root

bind "$IMAGES" /opt/gpusnap-bed ro
# (a pack may lack some of these)
[ ! -e "$TOOLS/containerd" ] || bind "$TOOLS/containerd" /opt/containerd-2.4/bin ro
for tool in nerdctl crictl; do
  [ ! -e "$TOOLS/$tool" ] || bind "$TOOLS/$tool/$tool" "/usr/local/bin/$tool" ro
done
# the whole folder, so that what is built while the bed is up shows in it
mkdir -p "$TOOLS"
bind "$TOOLS" "$BED_TOOLS" ro
bind "$REPO" "$REPO"
for path in ${GPUSNAP_TESTBED_BIND:-}; do # FROM[:TO] ..., for what the tests need besides the checkout
  bind "${path%%:*}" "${path#*:}"
done
[ ! -d /usr/local/nvidia ] || bind /usr/local/nvidia /usr/local/nvidia ro

# containerd's overlayfs cannot lie on another overlay.
if [ "$(stat -f -c %T "$SCRATCH")" = overlayfs ]; then
  mount -t tmpfs -o mode=755 tmpfs "$ROOT/var/lib"
fi
mkdir -p "$ROOT$BED_DATA"

dev=$ROOT/dev
mount -t tmpfs -o mode=755 tmpfs "$dev"
while read -r name major minor; do
  mknod -m 666 "$dev/$name" c "$major" "$minor"
done <<'NODES'
null 1 3
zero 1 5
full 1 7
random 1 8
urandom 1 9
tty 5 0
fuse 10 229
NODES
mkdir -p "$dev"/{pts,shm,mqueue,net}
mknod -m 666 "$dev/net/tun" c 10 200
[ ! -e /dev/nvidiactl ] || [ -n "${GPUSNAP_TESTBED_NO_GPU:-}" ] || cp -a /dev/nvidia* "$dev/"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$dev/shm"
mount -t mqueue mqueue "$dev/mqueue"
ln -s pts/ptmx "$dev/ptmx"
ln -s /proc/self/fd "$dev/fd"
for i in 0:stdin 1:stdout 2:stderr; do ln -s "/proc/self/fd/${i%%:*}" "$dev/${i#*:}"; done

mount -t sysfs sysfs "$ROOT/sys"
cgroup=$ROOT/sys/fs/cgroup
[ "$(cut -d' ' -f1,2 <<<"$TESTBED_MOUNTS")" = "/sys/fs/cgroup cgroup2" ] || mount -t tmpfs -o mode=755 tmpfs "$cgroup"
while read -r dir type options; do
  dir=$ROOT$dir
  mkdir -p "$dir"
  if [ "$type" = cgroup2 ]; then
    mount -t cgroup2 cgroup2 "$dir"
  else
    # of the options only the controllers and the name choose a hierarchy
    options=$(tr , '\n' <<<"$options" | grep -vxE 'rw|xattr|noprefix|clone_children|cpuset_v2_mode|release_agent=.*' | paste -sd,)
    mount -t cgroup -o "$options" cgroup "$dir"
    case ${dir##*/} in
      *,*) for name in $(tr , ' ' <<<"${dir##*/}"); do ln -s "${dir##*/}" "$cgroup/$name"; done ;;
    esac
  fi
done <<<"$TESTBED_MOUNTS"

mount -t proc proc "$ROOT/proc"
mount -o remount,bind,ro "$ROOT"
cd "$ROOT"
./usr/bin/busybox pivot_root . .
umount -l .
cd /

hostname gpusnap-bed
ip link set lo up
if [ -d /usr/local/nvidia ]; then
  printf '/usr/local/nvidia/lib64\n/usr/local/nvidia/lib\n' >/etc/ld.so.conf.d/nvidia.conf
  ldconfig || :
fi
mkdir -p "$BED_RUN/instances" "$BED_RUN/index" /run/containerd /run/lock
# what `testbed leaks` takes as given
cut -d' ' -f5 /proc/1/mountinfo | sort >"$BED_RUN/mounts"
touch "$BED_RUN/inside"

exec /opt/gpusnap-bed/bed-init </dev/null >/dev/null 2>&1

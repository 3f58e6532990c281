# shellcheck shell=bash
# A kubelet's requirements of a machine, made in the bed and removed again.

# The kubelet sets these, and they are the whole machine's. Files with the values that it wants lie over them.
SYSCTLS=(
  vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1
  kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000
)

make_sandbox() {
  local entry file
  mkdir -p "$RUN/sysctl"
  for entry in "${SYSCTLS[@]}"; do
    file=$RUN/sysctl/$(tr / . <<<"${entry%=*}")
    echo "${entry#*=}" >"$file"
    mount --bind "$file" "/proc/sys/${entry%=*}"
  done
  [ -e /dev/kmsg ] || mknod -m 644 /dev/kmsg c 1 11
  # a node's address may not be one of lo's
  ip link add node type dummy 2>/dev/null || ip link add node type bridge
  ip address add "$NODE_IP/24" dev node
  ip link set node up
  ip route add default via "${NODE_IP%.*}.254" dev node
}

clear_sandbox() {
  local path
  # (The kubelet binds its folder on itself; the last mounted first)
  for path in $(cut -d' ' -f5 /proc/self/mountinfo | grep -E "^($KUBELET(/|$)|/proc/sys/.)" | tac); do
    umount -l "$path"
  done
  ip link delete node 2>/dev/null || :
  rm -f /dev/kmsg
  rm -rf --one-file-system "$KUBELET"
  find /sys/fs/cgroup -depth -type d \( -name kubepods -o -path '*/kubepods/*' \) -exec rmdir {} \;
}

# shellcheck shell=bash
# Runs in the root at build time: images.sh DIR makes DIR/images.tar (an OCI layout with docker.io/test/bb:1 and
# docker.io/test/pause:1), DIR/python.tar (the same with docker.io/test/python:1) and DIR/bed-init.
set -euo pipefail
cd "$1"

gcc -O2 -Wall -static -s -o bed-init pause.c

mkdir -p bb/{bin,tmp,proc,sys,dev,etc,run,var/tmp,root,home/app,usr} pause/{proc,sys,dev,etc}
cp /usr/bin/busybox bb/bin/busybox
for dir in sbin usr/bin usr/sbin; do ln -s "$([ "$dir" = sbin ] && echo bin || echo ../bin)" bb/$dir; done
for applet in $(/usr/bin/busybox --list); do
  [ "$applet" = busybox ] || ln -s busybox "bb/bin/$applet"
done
printf 'root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/home/app:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n' >bb/etc/passwd
printf 'root:x:0:\ntty:x:5:\napp:x:1000:\nnogroup:x:65534:\n' >bb/etc/group
chmod 1777 bb/tmp bb/var/tmp; chmod 700 bb/root; chown -R 1000:1000 bb/home/app
cp bed-init pause/pause

# The root's own Python, without what no container here needs, on top of bb. Compiled only: importing half a library from
# source takes longer than the rest of a container's start.
mkdir -p python/usr/bin
version=$(readlink /usr/bin/python3)
dpkg -L "$version-minimal" "lib$version-minimal" "lib$version-stdlib" | sort -u | grep -E '^/usr/(bin|lib)/' |
  grep -vE '/(__pycache__|test|idlelib|tkinter|turtledemo|pydoc_data|ensurepip|lib2to3|sqlite3|curses|venv|dbm|config-[^/]*|_pyrepl|unittest|turtle.py)(/|$)' |
  grep -vE '/lib-dynload/(_(ssl|hashlib|sqlite3|dbm|gdbm|curses|test|ctypes_test|xx|interp|remote_debugging|codecs|zstd)|readline|xx)' |
  while read -r path; do [ -d "$path" ] || echo "$path"; done >python.files
grep '\.so$' python.files | xargs ldd "/usr/bin/$version" |
  sed -n -E 's|.* => (/[^ ]*) .*|\1|p; s|^\s*(/lib64/[^ ]*) .*|\1|p' | sort -u >python.libs
# Of an older C library, which NVIDIA's driver still asks for.
libc=$(grep '/libc\.so\.6$' python.libs)
printf '%s\n' "${libc%/*}"/{libdl.so.2,libpthread.so.0,librt.so.1} >>python.libs
while read -r path; do
  mkdir -p "python/$(dirname "$path")"
  cp -L "$path" "python/$path"
done < <(cat python.files python.libs)
"$version" -m compileall -q -b -s python "python/usr/lib/$version"
find python -name '*.py' -delete
ln -s "$version" python/usr/bin/python3

# layout DIR IMAGE...: starts an OCI layout with these empty images
layout() {
  local dir=$1 image; shift
  umoci init --layout "$dir"
  for image; do umoci new --image "$dir:$image"; done
}

# pack_layout DIR FILE: the layout as a tar, its images by their full names. An annotation that containerd's import takes
# as it is: no --base-name needed, and no second name is left behind that the CRI's image store would stumble over.
pack_layout() {
  umoci gc --layout "$1"
  jq -c '.manifests |= map(.annotations["io.containerd.image.name"] = "docker.io/test/" + .annotations["org.opencontainers.image.ref.name"] + ":1"
    | .annotations["org.opencontainers.image.ref.name"] = "1")' "$1/index.json" >index.new
  mv index.new "$1/index.json"
  tar -C "$1" -cf "$2" .
}

layout oci bb pause
umoci insert --image oci:bb bb /
umoci insert --image oci:pause pause /
umoci config --image oci:pause --config.entrypoint /pause
layout oci-python python
umoci insert --image oci-python:python bb /
umoci insert --image oci-python:python python /
for image in oci:bb oci-python:python; do
  umoci config --image "$image" --config.cmd /bin/sh --config.env PATH=/bin:/usr/bin:/sbin:/usr/sbin
done
pack_layout oci images.tar
pack_layout oci-python python.tar
rm -rf oci oci-python bb pause python python.files python.libs pause.c images.sh

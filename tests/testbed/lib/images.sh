# shellcheck shell=bash
# Runs in the root at build time: images.sh DIR makes DIR/images.tar (an OCI layout with docker.io/test/bb:1 and
# docker.io/test/pause:1) and DIR/bed-init.
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

umoci init --layout oci
umoci new --image oci:bb
umoci insert --image oci:bb bb /
umoci config --image oci:bb --config.cmd /bin/sh --config.env PATH=/bin:/usr/bin:/sbin:/usr/sbin
umoci new --image oci:pause
umoci insert --image oci:pause pause /
umoci config --image oci:pause --config.entrypoint /pause
umoci gc --layout oci

# The full name, as an annotation that containerd's import takes as it is: no --base-name needed, and no second name
# is left behind that the CRI's image store would stumble over.
jq -c '.manifests |= map(.annotations["io.containerd.image.name"] = "docker.io/test/" + .annotations["org.opencontainers.image.ref.name"] + ":1"
  | .annotations["org.opencontainers.image.ref.name"] = "1")' oci/index.json >index.new
mv index.new oci/index.json
tar -C oci -cf images.tar .
rm -rf oci bb pause pause.c images.sh

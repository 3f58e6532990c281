# shellcheck shell=bash
# `cluster build`: the test bed, and beside its Go tools those of Kubernetes, built and stamped the same way.

# shellcheck source=../../testbed/versions.sh
. "$TESTBED_DIR/versions.sh"
# shellcheck source=../../testbed/lib/golang.sh
. "$TESTBED_DIR/lib/golang.sh"
# shellcheck source=../../testbed/lib/tools.sh
. "$TESTBED_DIR/lib/tools.sh"
# shellcheck source=../versions.sh
. "$CLUSTER_DIR/versions.sh"

# k8s.io/kubernetes requires its staging modules at v0.0.0, which its own go.work provides. They are published as
# v0.MINOR.PATCH too: the wrapper replaces each, and only those at exactly v0.0.0 (others of k8s.io have real versions).
kubernetes_module() {
  local dir=$1 src=$2
  mkdir -p "$dir"
  {
    echo "module testbed.invalid/wrapper"
    grep -E '^(go|godebug) ' "$src/go.mod"
    echo "require k8s.io/kubernetes v$KUBERNETES_VERSION"
    echo "replace ("
    sed -nE 's/^\s+(k8s\.io\/\S+) v0\.0\.0( .*)?$/\t\1 => \1 v0.'"${KUBERNETES_VERSION#1.}"'/p' "$src/go.mod"
    echo ")"
  } >"$dir/go.mod"
  cp "$src/go.sum" "$dir/go.sum"
  chmod u+w "$dir/go.sum"
}

build_kubernetes() {
  local out=$1 work=$2 src cmd flags version=k8s.io/component-base/version
  src=$(module_dir "k8s.io/kubernetes@v$KUBERNETES_VERSION")
  kubernetes_module "$work" "$src"
  flags="-X $version.gitVersion=v$KUBERNETES_VERSION -X $version.gitMajor=1 -X $version.gitMinor=$(cut -d. -f2 <<<"$KUBERNETES_VERSION") -X $version.gitTreeState=clean"
  for cmd in kubelet kube-apiserver kube-scheduler kube-controller-manager kubectl; do
    go_build "$work" "$out/$cmd" "$flags" "k8s.io/kubernetes/cmd/$cmd"
  done
}

build_etcd() {
  local out=$1 work=$2 module=go.etcd.io/etcd/server/v3
  wrapper "$work" $module "v$ETCD_VERSION"
  go_build "$work" "$out/etcd" "" $module
}

build_kubernetes_tools() {
  # A packed bed has no tool chain beside it, and what it holds is what there is.
  [ ! -e "$STATE/.packed" ] || die "this bed came from a pack: Kubernetes is built where there is a network"
  mkdir -p "$TOOLS"
  tool etcd "$ETCD_VERSION"
  tool kubernetes "$KUBERNETES_VERSION"
}

cmd_build() {
  "$TESTBED_DIR/testbed" build
  locked "$STATE/build.lock" build_kubernetes_tools
}

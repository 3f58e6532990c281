# shellcheck shell=bash
# The Go tools, built on the host and kept outside the root: a new version rebuilds only its own tool.

# go_build DIR OUT LDFLAGS PACKAGE
go_build() (
  cd "$1"
  GOFLAGS=-mod=mod GOWORK=off CGO_ENABLED=0 nice -n 5 "$GO" build -p 2 -trimpath -buildvcs=false -ldflags "-s -w $3" -o "$2" "$4"
)

# The folder of a module in the module cache, fetched if need be.
module_dir() {
  local json
  json=$(cd / && "$GO" mod download -json "$1") || die "cannot fetch $1: $json"
  sed -n 's/^\t"Dir": "\(.*\)",\{0,1\}$/\1/p' <<<"$json"
}

# A module that only requires another: what `go install module/cmd@version` does, but cached and with link flags.
wrapper() {
  local dir=$1 module=$2 version=$3
  mkdir -p "$dir"
  printf 'module testbed.invalid/wrapper\ngo %s\nrequire %s %s\n' "$GO_MINIMUM" "$module" "$version" >"$dir/go.mod"
}

build_containerd() {
  local out=$1 work=$2 module=github.com/containerd/containerd/v2 cmd
  wrapper "$work" $module "v$CONTAINERD_VERSION"
  for cmd in containerd ctr containerd-shim-runc-v2; do
    go_build "$work" "$out/$cmd" "-X $module/version.Version=v$CONTAINERD_VERSION" $module/cmd/$cmd
  done
}

build_crictl() {
  local out=$1 work=$2 module=sigs.k8s.io/cri-tools
  wrapper "$work" $module "v$CRICTL_VERSION"
  go_build "$work" "$out/crictl" "-X $module/pkg/version.Version=v$CRICTL_VERSION" $module/cmd/crictl
}

# nerdctl's go.mod replaces a helper module (mod/tigron) by a folder that its published module lacks; only test helpers
# import it. So: a copy of the module without them.
build_nerdctl() {
  local out=$1 work=$2 module=github.com/containerd/nerdctl/v2 src
  src=$(module_dir "$module@v$NERDCTL_VERSION")
  rm -rf "$work"; cp -r "$src" "$work"; chmod -R u+w "$work"
  rm -f "$work"/cmd/nerdctl/helpers/testing*.go
  go_build "$work" "$out/nerdctl" "-X $module/pkg/version.Version=v$NERDCTL_VERSION" ./cmd/nerdctl
}

# tool NAME VERSION: build NAME with build_NAME into $TOOLS/NAME unless that version is there
tool() {
  local name=$1 version=$2 dir=$TOOLS/$1
  [ "$(cat "$dir/.version" 2>/dev/null)" != "$version" ] || return 0
  [ -n "${GO:-}" ] || ensure_go
  say "building $name $version"
  rm -rf "$dir.tmp" "$TOOLS/.work-$name"; mkdir -p "$dir.tmp"
  "build_$name" "$dir.tmp" "$TOOLS/.work-$name"
  echo "$version" >"$dir.tmp/.version"
  rm -rf "$dir" "$TOOLS/.work-$name"
  mv "$dir.tmp" "$dir"
}

build_tools() {
  mkdir -p "$TOOLS"
  tool containerd "$CONTAINERD_VERSION"
  tool nerdctl "$NERDCTL_VERSION"
  tool crictl "$CRICTL_VERSION"
}

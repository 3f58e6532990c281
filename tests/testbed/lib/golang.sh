# shellcheck shell=bash
# A Go tool chain that is new enough, whatever the machine has.

# version_ge A B: A >= B, both dotted numbers
version_ge() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]; }

go_version_of() { "$1" env GOVERSION 2>/dev/null | sed 's/^go//'; }

# Sets GO to a go command of at least GO_MINIMUM.
ensure_go() {
  local have own=$STATE/go/$GO_VERSION/bin/go
  GO=$(command -v go || :)
  if [ -n "$GO" ] && have=$(cd / && go_version_of "$GO") && [ -n "$have" ] && version_ge "$have" "$GO_MINIMUM"; then
    return 0
  fi
  [ -x "$own" ] || fetch_go "$own"
  GO=$own
  export GOTOOLCHAIN=local
}

# The tool chain is an ordinary Go module, so any older Go can fetch it, checked against the checksum database.
# Modules carry no execute bits: they are set on the copy.
fetch_go() {
  local own=$1 top=${1%/bin/go} json dir
  [ -n "$GO" ] || { say "no Go here: installing Debian's, to fetch Go $GO_VERSION with"; host_packages golang-go; GO=/usr/bin/go; }
  say "fetching Go $GO_VERSION"
  json=$(cd / && GOTOOLCHAIN=local GOFLAGS=-mod=mod "$GO" mod download -json "golang.org/toolchain@v0.0.1-go$GO_VERSION.linux-amd64") ||
    die "cannot fetch Go $GO_VERSION: $json"
  dir=$(sed -n 's/^\t"Dir": "\(.*\)",\{0,1\}$/\1/p' <<<"$json")
  rm -rf "$top.tmp"; mkdir -p "$top.tmp"
  cp -r "$dir/." "$top.tmp/"
  chmod -R u+w "$top.tmp"
  chmod +x "$top.tmp"/bin/* "$top.tmp"/pkg/tool/*/*
  mv "$top.tmp" "$top"
  [ "$(cd / && go_version_of "$own")" = "$GO_VERSION" ] || die "Go $GO_VERSION does not run"
}

# shellcheck shell=bash
# The cluster, from inside the bed: etcd, the control plane and a kubelet beside a containerd instance of the test bed.
# The bed's namespaces are ours alone, so everything has its usual port and folder.

# shellcheck source=sandbox.sh
. "$CLUSTER_DIR/lib/sandbox.sh"
# shellcheck source=config.sh
. "$CLUSTER_DIR/lib/config.sh"

INSTANCE=k8s                      # the test bed's name for our containerd
NODE=gpusnap
NODE_IP=10.99.0.1
RUN=/run/gpusnap-k8s              # pid files, configuration
DATA=/var/lib/gpusnap-k8s         # etcd, certificates
KUBELET=/var/lib/kubelet
LOGS=/var/log/k8s
BIN=$BED_TOOLS/kubernetes
DAEMONS=(kubelet kube-controller-manager kube-scheduler kube-apiserver etcd) # in the order to end them

export KUBECONFIG=$RUN/kubeconfig CONTAINER_RUNTIME_ENDPOINT=unix:///run/$INSTANCE/containerd.sock
export CONTAINERD_ADDRESS=/run/$INSTANCE/containerd.sock PATH=$BIN:$PATH

cmd_in() {
  [ "$#" -gt 0 ] || die "in CMD..."
  exec "$@"
}

cmd_up() {
  [ -x "$BIN/kubelet" ] || missing_tools
  [ ! -e "$RUN" ] || die "a cluster is up, or was: 'cluster down' first"
  mkdir -p "$RUN" "$DATA" "$LOGS"
  trap 'up_failed' ERR EXIT
  "$TESTBED_DIR/testbed" start "$INSTANCE" "$@"
  make_sandbox
  start_control_plane
  start_kubelet
  trap - ERR EXIT
}

missing_tools() {
  [ -d "$BED_TOOLS" ] || die "the bed was started by an older checkout: 'testbed down' first"
  die "run 'cluster build' first"
}

# (what is half up is left for inspection: `cluster down` knows how to end it)
up_failed() {
  trap - ERR EXIT
  cmd_logs
  die "the cluster did not start"
}

start_control_plane() {
  make_kubeconfig >"$KUBECONFIG"
  echo 'token,admin,admin,system:masters' >"$RUN/tokens.csv"
  openssl genrsa -out "$RUN/service-accounts.key" 2048 2>/dev/null
  daemon etcd "$BED_TOOLS/etcd/etcd" --data-dir "$DATA/etcd" --unsafe-no-fsync
  daemon kube-apiserver "$BIN/kube-apiserver" --etcd-servers http://127.0.0.1:2379 --bind-address 127.0.0.1 --advertise-address "$NODE_IP" \
    --cert-dir "$DATA/certificates" --token-auth-file "$RUN/tokens.csv" --authorization-mode RBAC --service-cluster-ip-range 10.96.0.0/24 \
    --service-account-issuer https://gpusnap.invalid --service-account-signing-key-file "$RUN/service-accounts.key" \
    --service-account-key-file "$RUN/service-accounts.key" --kubelet-preferred-address-types InternalIP --allow-privileged
  wait_for 60 kube-apiserver kubectl get --raw /readyz
  daemon kube-scheduler "$BIN/kube-scheduler" --kubeconfig "$KUBECONFIG" --leader-elect=false
  daemon kube-controller-manager "$BIN/kube-controller-manager" --kubeconfig "$KUBECONFIG" --leader-elect=false \
    --service-account-private-key-file "$RUN/service-accounts.key"
}

start_kubelet() {
  make_kubelet_config >"$RUN/kubelet.yaml"
  daemon kubelet "$BIN/kubelet" --config "$RUN/kubelet.yaml" --kubeconfig "$KUBECONFIG" --root-dir "$KUBELET" \
    --hostname-override "$NODE" --node-ip "$NODE_IP" -v=2
  wait_for 60 kubelet node_ready
  wait_for 60 kube-controller-manager kubectl get serviceaccount default
}

node_ready() { kubectl wait --for condition=Ready --timeout 1s "node/$NODE"; }

# daemon NAME CMD...: in a separate session, logging to $LOGS/NAME.log
daemon() {
  local name=$1; shift
  (
    close_fds
    cd /
    exec setsid "$@"
  ) </dev/null >"$LOGS/$name.log" 2>&1 &
  echo "$! $(start_time $!)" >"$RUN/$name.pid"
}

alive() { # NAME: sets PID
  local started
  [ -s "$RUN/$1.pid" ] || return 1
  read -r PID started <"$RUN/$1.pid"
  [ "$(start_time "$PID")" = "$started" ]
}

not_alive() { ! alive "$1"; }

# wait_for SECONDS DAEMON CMD...: until CMD succeeds, as long as DAEMON lives
wait_for() {
  local seconds=$1 daemon=$2; shift 2
  retry "$seconds" ended_or "$daemon" "$@" && alive "$daemon" || die "$daemon: no success in $seconds s with: $*"
}

ended_or() {
  local daemon=$1; shift
  not_alive "$daemon" || "$@" >/dev/null 2>&1
}

cmd_status() {
  local name
  for name in "${DAEMONS[@]}"; do
    if alive "$name"; then echo "$name: $PID"; else echo "$name: not running"; fi
  done
  "$TESTBED_DIR/testbed" status
  [ ! -e "$KUBECONFIG" ] || kubectl get nodes,pods --all-namespaces --output wide --request-timeout 5s
}

cmd_logs() {
  local log
  for log in "$LOGS"/*.log "/var/log/containerd-$INSTANCE.log"; do
    [ ! -s "$log" ] || { echo "== $log"; tail -n 8 "$log"; } >&2
  done
}

# Pods are not deleted first: it must also work for a cluster that answers nobody.
cmd_down() {
  local name
  for name in "${DAEMONS[@]}"; do
    end "$name"
  done
  "$TESTBED_DIR/testbed" stop "$INSTANCE"
  clear_sandbox
  rm -rf "$RUN" "$DATA" "$LOGS" /var/log/pods /var/log/containers
}

end() {
  alive "$1" || return 0
  kill -TERM "$PID"
  retry 5 not_alive "$1" || kill -KILL "$PID"
  retry 5 not_alive "$1" || die "$1 ($PID) does not end"
}

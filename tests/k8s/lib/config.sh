# shellcheck shell=bash
# The files that Kubernetes's programs read.

make_kubeconfig() {
  cat <<'YAML'
apiVersion: v1
kind: Config
clusters:
- {name: bed, cluster: {server: "https://127.0.0.1:6443", insecure-skip-tls-verify: true}}
users:
- {name: admin, user: {token: token}}
contexts:
- {name: bed, context: {cluster: bed, user: admin}}
current-context: bed
YAML
}

# Open to all: who can reach it is in the bed. Eviction and image removal are off, whatever the machine's disk is like.
make_kubelet_config() {
  cat <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: $CONTAINER_RUNTIME_ENDPOINT
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
makeIPTablesUtilChains: false
localStorageCapacityIsolation: false
imageGCHighThresholdPercent: 100
evictionHard: {nodefs.available: "0%", nodefs.inodesFree: "0%", imagefs.available: "0%", memory.available: "0%"}
resolvConf: ""
YAML
}

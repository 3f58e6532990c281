# shellcheck shell=bash disable=SC2034  # sourced: every version the cluster pins beside those of the test bed
#
# Changing one rebuilds that tool at the next `cluster build`.

KUBERNETES_VERSION=1.37.2
ETCD_VERSION=3.6.16

#!/bin/sh
# Writes the .json files of ../pods and ../admit.json: what the stock kubelet makes of
# the .yaml beside each. The functions asked are the kubelet's own and not exported:
# they are called from two files that are added to a copy of its module. The host
# must have huge pages of 2 MiB and 1 GiB and no AppArmor, as the node of the tests.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../../../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
stock=$(cd "$root/tools/devcluster" && go list -m -f '{{.Dir}}' k8s.io/kubernetes)
cp -r "$stock" "$work/kubernetes" && chmod -R u+w "$work/kubernetes"
cp "$here/kubelet.go.txt" "$work/kubernetes/pkg/kubelet/zz_stock.go"
cp "$here/kuberuntime.go.txt" "$work/kubernetes/pkg/kubelet/kuberuntime/zz_stock.go"
mkdir "$work/generate" && cp -r "$here/pods" "$here/admit" "$work/generate"
cd "$work/generate"
sed 's/^module .*/module stock/' "$root/tools/devcluster/go.mod" >go.mod
cp "$root/tools/devcluster/go.sum" .
go mod edit -replace "k8s.io/kubernetes=$work/kubernetes"
go run -mod=mod ./pods "$here/../pods"
go run -mod=mod ./admit "$here/.."

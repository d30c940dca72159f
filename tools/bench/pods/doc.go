// Command bench-pods measures the node's pod engine beside the stock kubelet of
// tools/devcluster: each node has a containerd of its own, and both are in the
// same cluster.
//
//	go tool task bench:pods                          # all of it
//	go tool task bench:pods -- --only create -n 20   # one part
//
// The kubelet is a binary of its own here, so that it shares no memory with the
// control plane beside it.
package main

// Package pods holds the tests of pods at the edge, in which all parts are real:
// a Kubernetes API server, the cloud, the agent, containerd, and the stock
// kubelet beside them. A manifest is applied twice, once on the kubelet's node
// and once on the agent's, and what Kubernetes gets to see of both (phases,
// conditions, states of containers, events) must be the same. There is nothing
// to import.
//
//	go test ./tools/e2e/pods -run 'Lifecycle/crash-loop' -v      # FAIRLEAD_BIN must be set
//	go test ./tools/e2e/pods -args -twice                        # the kubelet against itself: how steady the comparison is
//	go test ./tools/e2e/pods -run Churn -args -churn 2000 -seed 7
package pods

package gc

import (
	"cmp"
	"slices"

	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The labels by which the kubelet's containers are known.
const (
	labelPodUID    = "io.kubernetes.pod.uid"
	labelPodName   = "io.kubernetes.pod.name"
	labelNamespace = "io.kubernetes.pod.namespace"
	labelContainer = "io.kubernetes.container.name"
)

// keepDead is how many dead instances of a container of a living pod stay.
const keepDead = 1

// Input is what Decide looks at.
type Input struct {
	Containers []*runtimeapi.Container  // all, whatever their state
	Sandboxes  []*runtimeapi.PodSandbox // all
	// Gone tells that nothing of a pod shall stay: it is not wanted any more and
	// has been stopped, or nobody knows it. Where not all pods are known yet, it
	// says no.
	Gone func(types.UID) bool
}

// Plan is what has to go: first the containers, then the sandboxes, the oldest
// of each first.
type Plan struct {
	Containers []*runtimeapi.Container
	Sandboxes  []*runtimeapi.PodSandbox
}

// Decide says what has to be removed. Running containers, ready sandboxes and
// sandboxes with containers that stay are never in it.
func Decide(in Input) Plan {
	type unit struct {
		uid  types.UID
		name string
	}
	dead := map[unit][]*runtimeapi.Container{}
	for _, c := range in.Containers {
		if c.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
			u := unit{types.UID(c.GetLabels()[labelPodUID]), c.GetMetadata().GetName()}
			dead[u] = append(dead[u], c)
		}
	}
	goes := map[string]bool{}
	for u, cs := range dead {
		slices.SortFunc(cs, byAge[*runtimeapi.Container])
		slices.Reverse(cs)
		if !in.Gone(u.uid) {
			// One that was created last is about to be started: the dead one that
			// stays is the one before it.
			if cs[0].GetState() == runtimeapi.ContainerState_CONTAINER_CREATED {
				cs = cs[1:]
			}
			cs = cs[min(keepDead, len(cs)):]
		}
		for _, c := range cs {
			goes[c.GetId()] = true
		}
	}
	var plan Plan
	used := map[string]bool{} // sandboxes with containers that stay
	for _, c := range in.Containers {
		if goes[c.GetId()] {
			plan.Containers = append(plan.Containers, c)
		} else {
			used[c.GetPodSandboxId()] = true
		}
	}
	slices.SortFunc(plan.Containers, byAge[*runtimeapi.Container])

	// The newest sandbox of a living pod stays, though it is dead: the next one
	// counts its attempts from there.
	newest := map[types.UID]*runtimeapi.PodSandbox{}
	for _, s := range in.Sandboxes {
		uid := types.UID(s.GetMetadata().GetUid())
		if n := newest[uid]; n == nil || s.GetCreatedAt() > n.GetCreatedAt() {
			newest[uid] = s
		}
	}
	for _, s := range in.Sandboxes {
		uid := types.UID(s.GetMetadata().GetUid())
		if s.GetState() != runtimeapi.PodSandboxState_SANDBOX_READY && !used[s.GetId()] && (newest[uid] != s || in.Gone(uid)) {
			plan.Sandboxes = append(plan.Sandboxes, s)
		}
	}
	slices.SortFunc(plan.Sandboxes, byAge[*runtimeapi.PodSandbox])
	return plan
}

func byAge[T interface{ GetCreatedAt() int64 }](a, b T) int {
	return cmp.Compare(a.GetCreatedAt(), b.GetCreatedAt())
}

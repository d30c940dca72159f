package podstatus

import (
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	resources "k8s.io/component-helpers/resource"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The kernel's floors: below them the value of the cgroup is not the one asked
// for, and the one asked for is reported.
const (
	minShares    = 2
	minCPULimit  = 10 // milli
	sharesPerCPU = 1024
)

// containerResources is what the container really has: the runtime's word where it
// gives one, else what the spec wants.
func containerResources(spec *corev1.Container, c *Container, old *corev1.ContainerStatus, id string) *corev1.ResourceRequirements {
	r := spec.Resources.DeepCopy()
	if c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return r
	}
	has := inForce(c.Resources)
	keep := old != nil && old.State.Running != nil && old.ContainerID == id && old.Resources != nil
	set := func(into corev1.ResourceList, name corev1.ResourceName, v *resource.Quantity, previous func() corev1.ResourceList, floor int64) {
		switch {
		case into == nil:
		case v != nil && (floor == 0 || v.MilliValue() > floor || into.Name(name, resource.DecimalSI).MilliValue() > floor):
			if have, ok := into[name]; !ok || have.Cmp(*v) != 0 { // equal amounts keep the spec's notation
				into[name] = *v
			}
		case v == nil && keep:
			if q, ok := previous()[name]; ok && c.Resources != nil {
				into[name] = q.DeepCopy()
			}
		}
	}
	limits := func() corev1.ResourceList { return old.Resources.Limits }
	requests := func() corev1.ResourceList { return old.Resources.Requests }
	set(r.Limits, corev1.ResourceCPU, has.cpuLimit, limits, minCPULimit)
	set(r.Limits, corev1.ResourceMemory, has.memoryLimit, limits, 0)
	set(r.Requests, corev1.ResourceCPU, has.cpuRequest, requests, minShares)
	return r
}

type enforced struct{ cpuLimit, cpuRequest, memoryLimit *resource.Quantity }

func inForce(l *runtimeapi.LinuxContainerResources) (e enforced) {
	if l == nil {
		return e
	}
	if l.CpuPeriod > 0 && l.CpuQuota > 0 {
		e.cpuLimit = resource.NewMilliQuantity(l.CpuQuota*1000/l.CpuPeriod, resource.DecimalSI)
	}
	if l.CpuShares >= minShares {
		milli := (l.CpuShares*1000 + sharesPerCPU - 1) / sharesPerCPU
		e.cpuRequest = resource.NewMilliQuantity(milli, resource.DecimalSI)
	}
	if l.MemoryLimitInBytes > 0 {
		e.memoryLimit = resource.NewQuantity(l.MemoryLimitInBytes, resource.BinarySI)
	}
	return e
}

// podResources is what the pod as a whole has and was promised. While it runs
// that is what its cgroup enforces: limits count only where every container, or
// the pod itself, has them.
func podResources(pod *corev1.Pod, running bool) (r *corev1.ResourceRequirements, allocated corev1.ResourceList) {
	// The helpers look at pod.Status too, which is not ours to trust.
	plain := &corev1.Pod{Spec: pod.Spec}
	requests := resources.PodRequests(plain, resources.PodResourcesOptions{})
	limits := resources.PodLimits(plain, resources.PodResourcesOptions{})
	allocated = requests
	r = &corev1.ResourceRequirements{}
	if pod.Spec.Resources != nil {
		r = pod.Spec.Resources.DeepCopy()
	}
	if !running {
		r.Requests, r.Limits = requests.DeepCopy(), limits
		return r, allocated
	}
	if r.Requests == nil {
		r.Requests = corev1.ResourceList{}
	}
	if r.Limits == nil {
		r.Limits = corev1.ResourceList{}
	}
	if q, ok := requests[corev1.ResourceCPU]; ok && q.MilliValue() > minShares {
		r.Requests[corev1.ResourceCPU] = q.DeepCopy()
	}
	if q, ok := requests[corev1.ResourceMemory]; ok {
		r.Requests[corev1.ResourceMemory] = q.DeepCopy()
	}
	for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
		if q, ok := limits[name]; ok && limitedAll(pod, name) {
			r.Limits[name] = q.DeepCopy()
		}
	}
	return r, allocated
}

func limitedAll(pod *corev1.Pod, name corev1.ResourceName) bool {
	if pod.Spec.Resources != nil {
		if _, ok := pod.Spec.Resources.Limits[name]; ok {
			return true
		}
	}
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			if q, ok := list[i].Resources.Limits[name]; !ok || q.IsZero() {
				return false
			}
		}
	}
	return true
}

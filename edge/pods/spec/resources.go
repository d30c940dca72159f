package spec

import (
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	resourcehelper "k8s.io/component-helpers/resource"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	minShares = 2
	maxShares = 262144

	cfsPeriod   = 100_000 // µs
	minCFSQuota = 1_000   // µs
)

// QOS is the pod's quality of service class: what its status says, else what
// follows from its resources.
func QOS(pod *corev1.Pod) corev1.PodQOSClass {
	if pod.Status.QOSClass != "" {
		return pod.Status.QOSClass
	}
	if resourcehelper.IsPodLevelResourcesSet(pod) {
		return qosOf(pod.Spec.Resources)
	}
	var class corev1.PodQOSClass
	for c := range containers(pod, initContainers|mainContainers) {
		switch q := qosOf(&c.Resources); {
		case class == "":
			class = q
		case class != q:
			return corev1.PodQOSBurstable
		}
	}
	if class == "" {
		return corev1.PodQOSBestEffort
	}
	return class
}

func qosOf(r *corev1.ResourceRequirements) corev1.PodQOSClass {
	var class corev1.PodQOSClass
	for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
		request, limit := r.Requests[name], r.Limits[name]
		q := corev1.PodQOSBurstable
		switch {
		case !request.Equal(limit):
		case request.IsZero():
			q = corev1.PodQOSBestEffort
		default:
			q = corev1.PodQOSGuaranteed
		}
		if class != "" && class != q {
			return corev1.PodQOSBurstable
		}
		class = q
	}
	return class
}

// Resources are the limits of a container for the runtime: CPU shares and quota,
// memory, huge pages, the OOM score, and on cgroup v2 what only the unified
// hierarchy has.
func Resources(pod *corev1.Pod, c *corev1.Container, node *Node) *runtimeapi.LinuxContainerResources {
	cpuLimit, memoryLimit := c.Resources.Limits.Cpu(), c.Resources.Limits.Memory()
	if resourcehelper.IsPodLevelResourcesSet(pod) {
		if cpuLimit.IsZero() {
			cpuLimit = pod.Spec.Resources.Limits.Cpu()
		}
		if memoryLimit.IsZero() {
			memoryLimit = pod.Spec.Resources.Limits.Memory()
		}
	}
	cpuRequest := cpuLimit
	if q, ok := c.Resources.Requests[corev1.ResourceCPU]; ok {
		cpuRequest = &q
	}
	r := linuxResources(cpuRequest, cpuLimit, memoryLimit, node)
	if !node.NoOOMScore {
		r.OomScoreAdj = OOMScoreAdj(pod, c, node)
	}
	r.HugepageLimits = hugePageLimits(pod, c, node)
	if node.Swap && node.CgroupVersion != 2 {
		// Memory and swap together: no swap. Without a limit it does not count.
		r.MemorySwapLimitInBytes = r.MemoryLimitInBytes
	}
	if node.CgroupVersion == 2 {
		if node.Swap {
			setUnified(r, "memory.swap.max", "0")
		}
		// The kubelet 1.37 has memory QoS on, with a policy that reserves nothing and
		// a throttling factor that is not set: so memory.high is left alone.
		setUnified(r, "memory.min", "0")
		setUnified(r, "memory.low", "0")
	}
	return r
}

func setUnified(r *runtimeapi.LinuxContainerResources, key, value string) {
	if r.Unified == nil {
		r.Unified = map[string]string{}
	}
	r.Unified[key] = value
}

func linuxResources(cpuRequest, cpuLimit, memoryLimit *resource.Quantity, node *Node) *runtimeapi.LinuxContainerResources {
	r := &runtimeapi.LinuxContainerResources{
		CpuShares:          int64(Shares(cpuRequest.MilliValue())),
		MemoryLimitInBytes: memoryLimit.Value(),
		CpuPeriod:          cfsPeriod,
		CpuQuota:           Quota(cpuLimit.MilliValue()),
	}
	if node.CgroupVersion == 2 {
		// Out of memory, all of a container goes, not one process of it. Cgroup v1 has
		// no such thing.
		setUnified(r, "memory.oom.group", "1")
	}
	return r
}

// Shares converts thousandths of a CPU to the cpu.shares of cgroup v1, 2 to 262144.
func Shares(milliCPU int64) uint64 {
	return uint64(min(max(milliCPU*1024/1000, minShares), maxShares))
}

// Quota converts thousandths of a CPU to the CFS quota in µs for a period of
// 100 ms; 0, which is none, for 0.
func Quota(milliCPU int64) int64 {
	if milliCPU == 0 {
		return 0
	}
	return max(milliCPU*cfsPeriod/1000, minCFSQuota)
}

// hugePageLimits has a limit for each page size of the host: what the container,
// else the pod has, else 0.
func hugePageLimits(pod *corev1.Pod, c *corev1.Container, node *Node) []*runtimeapi.HugepageLimit {
	limits := map[string]uint64{}
	add := func(list corev1.ResourceList) {
		for name, q := range list {
			size, ok := hugePageSize(name)
			if ok {
				limits[pageSizeName(size)] = uint64(q.Value())
			}
		}
	}
	if resourcehelper.IsPodLevelResourcesSet(pod) {
		add(pod.Spec.Resources.Limits)
	}
	add(c.Resources.Limits)
	var out []*runtimeapi.HugepageLimit
	for _, size := range node.HugePageSizes {
		name := pageSizeName(size)
		out = append(out, &runtimeapi.HugepageLimit{PageSize: name, Limit: limits[name]})
	}
	return out
}

func hugePageSize(name corev1.ResourceName) (int64, bool) {
	s, ok := strings.CutPrefix(string(name), corev1.ResourceHugePagesPrefix)
	if !ok {
		return 0, false
	}
	q, err := resource.ParseQuantity(s)
	return q.Value(), err == nil && q.Value() > 0
}

// pageSizeName writes a page size as cgroup files are named: 2MB, 1GB.
func pageSizeName(size int64) string {
	units := []string{"B", "KB", "MB", "GB", "TB", "PB"}
	i := 0
	for size%1024 == 0 && i < len(units)-1 {
		size /= 1024
		i++
	}
	return strconv.FormatInt(size, 10) + units[i]
}

// OOM scores: who the kernel kills first when memory runs out.
const (
	guaranteedScore = -997
	bestEffortScore = 1000
)

// OOMScoreAdj is the oom_score_adj of a container: the less memory it asks for
// relative to the node's, the higher; -997 for Guaranteed and system-node-critical
// pods, 1000 for BestEffort ones.
func OOMScoreAdj(pod *corev1.Pod, c *corev1.Container, node *Node) int64 {
	if Critical(pod) && pod.Spec.PriorityClassName == nodeCritical {
		return guaranteedScore
	}
	switch QOS(pod) {
	case corev1.PodQOSGuaranteed:
		return guaranteedScore
	case corev1.PodQOSBestEffort:
		return bestEffortScore
	}
	if node.Memory <= 0 {
		return bestEffortScore - 1
	}
	// What the pod asks for beyond its containers is shared by them.
	var share int64
	if resourcehelper.IsPodLevelRequestsSet(pod) {
		asked := resourcehelper.AggregateContainerRequests(pod, resourcehelper.PodResourcesOptions{})
		rest := pod.Spec.Resources.Requests.Memory().Value() - asked.Memory().Value()
		share = max(rest, 0) / int64(max(len(pod.Spec.Containers)+len(pod.Spec.InitContainers), 1))
	}
	request := c.Resources.Requests.Memory().Value()
	if isSidecarOf(pod, c) && len(pod.Spec.Containers) > 0 {
		// A sidecar does not go before the containers that it serves.
		least := pod.Spec.Containers[0].Resources.Requests.Memory().Value()
		for _, m := range pod.Spec.Containers[1:] {
			least = min(least, m.Resources.Requests.Memory().Value())
		}
		request = max(request, least)
	}
	score := 1000 - 1000*(request+share)/node.Memory
	return min(max(score, 1000+guaranteedScore), bestEffortScore-1)
}

func isSidecarOf(pod *corev1.Pod, c *corev1.Container) bool {
	if !sidecar(c) {
		return false
	}
	for i := range pod.Spec.InitContainers {
		if pod.Spec.InitContainers[i].Name == c.Name {
			return true
		}
	}
	return false
}

// PodCgroup are the limits of a pod's own cgroup. What is nil is not limited.
type PodCgroup struct {
	CPUShares uint64
	CPUQuota  *int64 // µs per CPUPeriod; 0 is none
	CPUPeriod *uint64
	Memory    *int64 // bytes
	PIDs      *int64
	HugePages map[int64]int64 // page size to limit, both in bytes
}

// PodResources are the limits of the pod's cgroup.
func PodResources(pod *corev1.Pod, node *Node) PodCgroup {
	requests := resourcehelper.PodRequests(pod, resourcehelper.PodResourcesOptions{})
	limits := resourcehelper.PodLimits(pod, resourcehelper.PodResourcesOptions{})
	cpuLimited, memoryLimited := true, true
	for c := range containers(pod, initContainers|mainContainers) {
		cpuLimited = cpuLimited && !c.Resources.Limits.Cpu().IsZero()
		memoryLimited = memoryLimited && !c.Resources.Limits.Memory().IsZero()
	}
	if resourcehelper.IsPodLevelResourcesSet(pod) {
		cpuLimited = cpuLimited || !pod.Spec.Resources.Limits.Cpu().IsZero()
		memoryLimited = memoryLimited || !pod.Spec.Resources.Limits.Memory().IsZero()
	}

	p := PodCgroup{CPUShares: minShares, HugePages: map[int64]int64{}}
	for name, q := range requests {
		if size, ok := hugePageSize(name); ok {
			p.HugePages[size] += q.Value()
		}
	}
	if node.PodPIDLimit > 0 {
		p.PIDs = new(node.PodPIDLimit)
	}
	class := QOS(pod)
	if class == corev1.PodQOSBestEffort {
		return p
	}
	p.CPUShares = Shares(requests.Cpu().MilliValue())
	if class == corev1.PodQOSGuaranteed || cpuLimited {
		p.CPUQuota, p.CPUPeriod = new(Quota(limits.Cpu().MilliValue())), new(uint64(cfsPeriod))
	}
	if class == corev1.PodQOSGuaranteed || memoryLimited {
		p.Memory = new(limits.Memory().Value())
	}
	return p
}

// sandboxResources tell the runtime what the whole pod has, and what it costs
// beyond its containers.
func sandboxResources(pod *corev1.Pod, node *Node) (resources, overhead *runtimeapi.LinuxContainerResources) {
	options := resourcehelper.PodResourcesOptions{ExcludeOverhead: true}
	requests, limits := resourcehelper.PodRequests(pod, options), resourcehelper.PodLimits(pod, options)
	cpuRequest := limits.Cpu()
	if q, ok := requests[corev1.ResourceCPU]; ok {
		cpuRequest = &q
	}
	resources = linuxResources(cpuRequest, limits.Cpu(), limits.Memory(), node)
	overhead = &runtimeapi.LinuxContainerResources{}
	if o := pod.Spec.Overhead; o != nil {
		overhead = linuxResources(o.Cpu(), o.Cpu(), o.Memory(), node)
	}
	return resources, overhead
}

// quantity of a resource as the scheduler counts: thousandths of a CPU, else units.
func quantity(list corev1.ResourceList, name corev1.ResourceName) int64 {
	q := list[name]
	if name == corev1.ResourceCPU {
		return q.MilliValue()
	}
	return q.Value()
}

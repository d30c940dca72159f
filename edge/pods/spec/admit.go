package spec

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	resourcehelper "k8s.io/component-helpers/resource"
	schedulinghelper "k8s.io/component-helpers/scheduling/corev1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
	"k8s.io/klog/v2"
)

// Rejection is why a pod is not admitted: it fails with Reason and the message
// "Pod was rejected: <Message>", and a Warning event has Reason and Message.
type Rejection struct {
	Reason, Message string
	// Insufficient is what the node has too little of, where a Critical pod lacks
	// nothing else: it is admitted once other pods made way, see Preempt.
	Insufficient []Insufficient
}

const unexpectedAdmission = "UnexpectedAdmissionError"

func (r *Rejection) Error() string { return r.Message }

// Insufficient is a resource that the node has too little of, in thousandths of a
// CPU, bytes or units.
type Insufficient struct {
	Resource                  corev1.ResourceName
	Requested, Used, Capacity int64
}

// missing is how much other pods would have to free.
func (i Insufficient) missing() int64 { return i.Requested - (i.Capacity - i.Used) }

// Admit decides whether the node runs the pod beside the active ones (all that are
// not terminated; the pod itself may be among them), nil where it does. The first
// of the stock kubelet's reasons that applies is given. It is for pods that do not
// run yet.
func Admit(pod *corev1.Pod, active []*corev1.Pod, node *corev1.Node, host *Node) *Rejection {
	others := slices.DeleteFunc(slices.Clone(active), func(p *corev1.Pod) bool { return p.UID == pod.UID })
	for _, check := range []func() *Rejection{
		func() *Rejection { return admitSysctls(pod, host) },
		func() *Rejection { return admitDevices(pod, others, node, host) },
		func() *Rejection { return admitOS(pod) },
		func() *Rejection { return admitGroups(pod, host) },
		func() *Rejection { return admitGeneral(pod, others, node) },
		func() *Rejection { return admitAppArmor(pod, host) },
		func() *Rejection { return admitFeatures(pod) },
	} {
		if r := check(); r != nil {
			return r
		}
	}
	return nil
}

// admitDevices refuses a pod whose device is not declared, not plugged in, or taken.
func admitDevices(pod *corev1.Pod, others []*corev1.Pod, node *corev1.Node, host *Node) *Rejection {
	unexpected := func(format string, args ...any) *Rejection {
		return &Rejection{Reason: unexpectedAdmission, Message: "Allocate failed due to " + fmt.Sprintf(format, args...) + ", which is unexpected"}
	}
	requests := resourcehelper.PodRequests(pod, resourcehelper.PodResourcesOptions{})
	for _, name := range slices.Sorted(maps.Keys(requests)) {
		devices, declared := host.Devices[name]
		want := quantity(requests, name)
		switch {
		case want == 0 || !declared && !ours(name):
			continue
		case !declared:
			return unexpected("cannot allocate unregistered device %s", name)
		}
		if slices.ContainsFunc(devices, func(d Device) bool { return d.HostPath == "" }) {
			return unexpected("no healthy devices present; cannot allocate unhealthy devices %s", name)
		}
		available := quantity(node.Status.Allocatable, name)
		for _, p := range others {
			available -= quantity(resourcehelper.PodRequests(p, resourcehelper.PodResourcesOptions{}), name)
		}
		if want > available {
			return unexpected("requested number of devices unavailable for %s. Requested: %d, Available: %d", name, want, max(available, 0))
		}
	}
	return nil
}

func admitOS(pod *corev1.Pod) *Rejection {
	if v, ok := pod.Labels[corev1.LabelOSStable]; ok && v != string(corev1.Linux) {
		return &Rejection{Reason: "PodOSSelectorNodeLabelDoesNotMatch", Message: "Failed to admit pod as the `kubernetes.io/os` label doesn't match node label"}
	}
	if pod.Spec.OS != nil && pod.Spec.OS.Name != corev1.Linux {
		return &Rejection{Reason: "PodOSNotSupported", Message: "Failed to admit pod as the OS field doesn't match node OS"}
	}
	return nil
}

func admitGroups(pod *corev1.Pod, host *Node) *Rejection {
	sc := pod.Spec.SecurityContext
	if sc == nil || sc.SupplementalGroupsPolicy == nil || *sc.SupplementalGroupsPolicy != corev1.SupplementalGroupsPolicyStrict || host.Runtime.SupplementalGroupsPolicy {
		return nil
	}
	return &Rejection{Reason: "SupplementalGroupsPolicyNotSupported", Message: "SupplementalGroupsPolicy=Strict is not supported in this node"}
}

// admitGeneral is what the scheduler would check too: resources, then what
// preemption does not help with.
func admitGeneral(pod *corev1.Pod, others []*corev1.Pod, node *corev1.Node) *Rejection {
	insufficient := fit(pod, others, node)
	var other *Rejection
	predicate := func(name, why string) {
		if other == nil {
			other = &Rejection{Reason: name, Message: fmt.Sprintf("Predicate %s failed: %s", name, why)}
		}
	}
	if ok, _ := nodeaffinity.GetRequiredNodeAffinity(pod).Match(node); !ok {
		predicate("NodeAffinity", "node(s) didn't match Pod's node affinity/selector")
	}
	if pod.Spec.NodeName != "" && pod.Spec.NodeName != node.Name {
		predicate("NodeName", "node(s) didn't match the requested node name")
	}
	if portConflict(pod, others) {
		predicate("NodePorts", "node(s) didn't have free ports for the requested pod ports")
	}
	if !Static(pod) {
		_, untolerated := schedulinghelper.FindMatchingUntoleratedTaint(klog.Background(), node.Spec.Taints, pod.Spec.Tolerations,
			func(t *corev1.Taint) bool { return t.Effect == corev1.TaintEffectNoExecute }, false)
		if untolerated {
			predicate("TaintToleration", "node(s) had taints that the pod didn't tolerate")
		}
	}
	switch {
	case len(insufficient) == 0:
		return other
	case Critical(pod) && other != nil:
		return other
	}
	i := insufficient[0]
	r := &Rejection{
		Reason: "OutOf" + string(i.Resource),
		Message: fmt.Sprintf("Node didn't have enough resource: %s, requested: %d, used: %d, capacity: %d",
			i.Resource, i.Requested, i.Used, i.Capacity),
	}
	if Critical(pod) {
		r.Insufficient = insufficient
	}
	return r
}

// fit compares the pod's requests with what the others leave. Extended resources
// that the node does not know are not its own, and not counted.
func fit(pod *corev1.Pod, others []*corev1.Pod, node *corev1.Node) []Insufficient {
	var out []Insufficient
	allocatable := node.Status.Allocatable
	if most := quantity(allocatable, corev1.ResourcePods); int64(len(others))+1 > most {
		out = append(out, Insufficient{corev1.ResourcePods, 1, int64(len(others)), most})
	}
	requests := resourcehelper.PodRequests(pod, resourcehelper.PodResourcesOptions{})
	used := corev1.ResourceList{}
	for _, p := range others {
		for name, q := range resourcehelper.PodRequests(p, resourcehelper.PodResourcesOptions{}) {
			sum := used[name]
			sum.Add(q)
			used[name] = sum
		}
	}
	common := []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory, corev1.ResourceEphemeralStorage}
	names := slices.Clone(common)
	for _, name := range slices.Sorted(maps.Keys(requests)) {
		_, known := allocatable[name]
		if !slices.Contains(common, name) && scalar(name) && (known || !extended(name)) {
			names = append(names, name)
		}
	}
	for _, name := range names {
		i := Insufficient{name, quantity(requests, name), quantity(used, name), quantity(allocatable, name)}
		if i.Requested > 0 && i.missing() > 0 {
			out = append(out, i)
		}
	}
	return out
}

// extended says whether a resource is one outside Kubernetes' own names, such as
// fairlead.dev/meter.
func extended(name corev1.ResourceName) bool {
	s := string(name)
	return strings.Contains(s, "/") && !strings.Contains(s, corev1.ResourceDefaultNamespacePrefix) &&
		!strings.HasPrefix(s, corev1.DefaultResourceRequestsPrefix) &&
		len(validation.IsQualifiedName(corev1.DefaultResourceRequestsPrefix+s)) == 0
}

// scalar says whether the scheduler counts a resource besides the common ones.
func scalar(name corev1.ResourceName) bool {
	s := string(name)
	return extended(name) || strings.HasPrefix(s, corev1.ResourceHugePagesPrefix) ||
		strings.Contains(s, corev1.ResourceDefaultNamespacePrefix) || strings.HasPrefix(s, corev1.ResourceAttachableVolumesPrefix)
}

func portConflict(pod *corev1.Pod, others []*corev1.Pod) bool {
	want := hostPorts(pod)
	if len(want) == 0 {
		return false
	}
	for _, p := range others {
		for _, taken := range hostPorts(p) {
			if slices.ContainsFunc(want, func(w hostPort) bool { return w.conflicts(taken) }) {
				return true
			}
		}
	}
	return false
}

type hostPort struct {
	ip       string
	protocol corev1.Protocol
	port     int32
}

func (a hostPort) conflicts(b hostPort) bool {
	const every = "0.0.0.0"
	return a.port == b.port && a.protocol == b.protocol && (a.ip == b.ip || a.ip == every || b.ip == every)
}

// hostPorts are the host's ports that the pod takes while it runs.
func hostPorts(pod *corev1.Pod) []hostPort {
	var out []hostPort
	add := func(c *corev1.Container) {
		for _, p := range c.Ports {
			if p.HostPort <= 0 {
				continue
			}
			h := hostPort{p.HostIP, p.Protocol, p.HostPort}
			if h.ip == "" {
				h.ip = "0.0.0.0"
			}
			if h.protocol == "" {
				h.protocol = corev1.ProtocolTCP
			}
			out = append(out, h)
		}
	}
	for c := range containers(pod, initContainers) {
		if sidecar(c) {
			add(c)
		}
	}
	for c := range containers(pod, mainContainers) {
		add(c)
	}
	return out
}

func admitAppArmor(pod *corev1.Pod, host *Node) *Rejection {
	refuse := func(why string) *Rejection {
		return &Rejection{Reason: "AppArmor", Message: "Cannot enforce AppArmor: " + why}
	}
	if !wantsAppArmor(pod) {
		return nil
	}
	if !host.AppArmor {
		return refuse("AppArmor is not enabled on the host")
	}
	for c := range containers(pod, allContainers) {
		p := appArmorProfile(pod, c)
		if p != nil && p.Type == corev1.AppArmorProfileTypeLocalhost && (p.LocalhostProfile == nil || strings.TrimSpace(*p.LocalhostProfile) == "") {
			return refuse("invalid empty AppArmor profile name of container " + c.Name)
		}
	}
	return nil
}

func wantsAppArmor(pod *corev1.Pod) bool {
	confined := func(p *corev1.AppArmorProfile) bool {
		return p != nil && p.Type != corev1.AppArmorProfileTypeUnconfined
	}
	if sc := pod.Spec.SecurityContext; sc != nil && confined(sc.AppArmorProfile) {
		return true
	}
	for c := range containers(pod, allContainers) {
		if c.SecurityContext != nil && confined(c.SecurityContext.AppArmorProfile) {
			return true
		}
	}
	for key, value := range pod.Annotations {
		if strings.HasPrefix(key, corev1.DeprecatedAppArmorBetaContainerAnnotationKeyPrefix) && value != corev1.DeprecatedAppArmorBetaProfileNameUnconfined {
			return true
		}
	}
	return false
}

// admitFeatures refuses what this agent has not, and what would else be left out
// silently.
func admitFeatures(pod *corev1.Pod) *Rejection {
	var missing []string
	if len(pod.Spec.ResourceClaims) > 0 {
		missing = append(missing, "DynamicResourceAllocation")
	}
	for c := range containers(pod, allContainers) {
		if slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return len(m.BindMountOptions) > 0 }) {
			missing = append(missing, "VolumeBindMountOptions")
			break
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return &Rejection{Reason: "PodFeatureUnsupported", Message: "Pod requires node features that are not available: " + strings.Join(missing, ", ")}
}

// Preempt chooses active pods to be killed so that a Critical pod fits, which Admit
// found insufficient resources for: BestEffort ones before Burstable ones before
// Guaranteed ones, as few and as small as possible. Where no choice would do, it
// gives the rejection that the pod fails with.
func Preempt(pod *corev1.Pod, active []*corev1.Pod, insufficient []Insufficient) ([]*corev1.Pod, *Rejection) {
	need := map[corev1.ResourceName]int64{}
	for _, i := range insufficient {
		need[i.Resource] = i.missing()
	}
	var classes [3][]*corev1.Pod // Guaranteed, Burstable, BestEffort
	for _, p := range active {
		if p.UID == pod.UID || !preemptable(pod, p) {
			continue
		}
		switch QOS(p) {
		case corev1.PodQOSGuaranteed:
			classes[0] = append(classes[0], p)
		case corev1.PodQOSBurstable:
			classes[1] = append(classes[1], p)
		default:
			classes[2] = append(classes[2], p)
		}
	}
	// Of each class only those that are needed if all of the lesser classes went.
	var victims []*corev1.Pod
	for i, class := range classes {
		rest := without(need, victims)
		for _, lesser := range classes[i+1:] {
			rest = without(rest, lesser)
		}
		chosen, missing := nearest(class, rest)
		if len(missing) > 0 {
			var list strings.Builder
			for _, name := range slices.Sorted(maps.Keys(missing)) {
				fmt.Fprintf(&list, "(res: %v, q: %d), ", name, missing[name])
			}
			return nil, &Rejection{Reason: unexpectedAdmission, Message: fmt.Sprintf("Unexpected error while attempting to recover from admission failure: "+
				"preemption: error finding a set of pods to preempt: no set of running pods found to reclaim resources: [%s]", list.String())}
		}
		victims = append(chosen, victims...)
	}
	return victims, nil
}

func preemptable(by, p *corev1.Pod) bool {
	if Critical(by) && !Critical(p) {
		return true
	}
	return by.Spec.Priority != nil && p.Spec.Priority != nil && *by.Spec.Priority > *p.Spec.Priority
}

// nearest takes pods until need is met, each time the one that meets most of it,
// and gives what of it cannot be met.
func nearest(pods []*corev1.Pod, need map[corev1.ResourceName]int64) (chosen []*corev1.Pod, missing map[corev1.ResourceName]int64) {
	pods = slices.Clone(pods)
	for len(need) > 0 {
		best, least := -1, 0.0
		for i, p := range pods {
			distance := 0.0
			for name, n := range need {
				if rest := float64(n - requestOf(p, name)); rest > 0 {
					distance += math.Pow(rest/float64(n), 2)
				}
			}
			if best < 0 || distance < least || distance == least && smaller(p, pods[best]) {
				best, least = i, distance
			}
		}
		if best < 0 {
			return chosen, need
		}
		need = without(need, pods[best:best+1])
		chosen = append(chosen, pods[best])
		pods = slices.Delete(pods, best, best+1)
	}
	return chosen, nil
}

func without(need map[corev1.ResourceName]int64, pods []*corev1.Pod) map[corev1.ResourceName]int64 {
	rest := map[corev1.ResourceName]int64{}
	for name, n := range need {
		for _, p := range pods {
			n -= requestOf(p, name)
		}
		if n > 0 {
			rest[name] = n
		}
	}
	return rest
}

func smaller(a, b *corev1.Pod) bool {
	for _, name := range []corev1.ResourceName{corev1.ResourceMemory, corev1.ResourceCPU} {
		if x, y := requestOf(a, name), requestOf(b, name); x != y {
			return x < y
		}
	}
	return true
}

func requestOf(pod *corev1.Pod, name corev1.ResourceName) int64 {
	if name == corev1.ResourcePods {
		return 1
	}
	return quantity(resourcehelper.PodRequests(pod, resourcehelper.PodResourcesOptions{}), name)
}

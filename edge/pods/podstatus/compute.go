package podstatus

import (
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Compute gives the status to report, and whether the pod is at its end: then the
// engine stops what still runs of it, and calls Compute again with Stopped. Until
// that the phase (with its reason and message) stays what it was: a pod that may
// still use the node is never reported as Failed or Succeeded.
//
// Conditions that others have set are not in it.
func Compute(in Input) (status corev1.PodStatus, terminal bool) {
	pod, old := in.Pod, &in.Previous
	rejected := in.Failed != nil && in.Failed.Rejected && !terminalPhase(old.Phase)
	s := corev1.PodStatus{
		ObservedGeneration: max(pod.Generation, old.ObservedGeneration),
		QOSClass:           in.QOS, NominatedNodeName: old.NominatedNodeName,
		StartTime: old.StartTime.DeepCopy(),
	}
	if old.QOSClass != "" {
		s.QOSClass = old.QOSClass
	}
	if s.StartTime.IsZero() {
		now := seconds(in.Now)
		s.StartTime = &now
	}
	if rejected {
		s.Phase, s.Reason, s.Message = corev1.PodFailed, in.Failed.Reason, in.Failed.Message
		return s, true
	}
	if terminalPhase(old.Phase) && len(old.ContainerStatuses) == 0 { // rejected earlier
		s.Phase, s.Reason, s.Message = old.Phase, old.Reason, old.Message
		return s, true
	}
	s.ContainerStatuses = in.containerStatuses(pod.Spec.Containers, old.ContainerStatuses, regular)
	s.InitContainerStatuses = in.containerStatuses(pod.Spec.InitContainers, old.InitContainerStatuses, initial)
	s.EphemeralContainerStatuses = in.containerStatuses(ephemeralContainers(pod), old.EphemeralContainerStatuses, ephemeral)
	in.decidePhase(&s)
	if in.Stopped {
		in.settle(&s)
	}
	if s.Conditions = in.conditions(&s); in.Stopped && len(old.Conditions) > 0 && !in.everStarted() {
		// As with the kubelet, the end of a pod that never began is no news of its
		// readiness.
		for i, c := range s.Conditions {
			if was := condition(old.Conditions, c.Type); was != nil && (c.Type == corev1.PodReady || c.Type == corev1.ContainersReady) {
				s.Conditions[i] = *was
			}
		}
	}
	terminal = terminalPhase(s.Phase)
	if terminal && !terminalPhase(old.Phase) && in.couldRun() {
		s.Phase, s.Reason, s.Message = old.Phase, old.Reason, old.Message
		if s.Phase == "" {
			s.Phase = corev1.PodPending
		}
	}
	s.Resources, s.AllocatedResources = podResources(pod, s.Phase == corev1.PodRunning)
	s.Conditions = in.disruption(&s)
	in.addresses(&s)
	in.trim(&s)
	in.date(&s)
	return s, terminal
}

// Deadline is when the pod's activeDeadlineSeconds are over; zero where there are
// none, or the pod has not been reported yet.
func Deadline(pod *corev1.Pod, status *corev1.PodStatus) time.Time {
	if pod.Spec.ActiveDeadlineSeconds == nil || status.StartTime.IsZero() {
		return time.Time{}
	}
	return status.StartTime.Add(time.Duration(*pod.Spec.ActiveDeadlineSeconds) * time.Second)
}

// decidePhase sets phase, reason and message. A terminal phase is never left.
func (in *Input) decidePhase(s *corev1.PodStatus) {
	old := &in.Previous
	all := append(append([]corev1.ContainerStatus{}, s.ContainerStatuses...), s.InitContainerStatuses...)
	s.Phase = Phase(in.Pod, all, in.Stopped, in.regularActive())
	if terminalPhase(old.Phase) {
		s.Phase, s.Reason, s.Message = old.Phase, old.Reason, old.Message
		return
	}
	if s.Phase == old.Phase {
		s.Reason, s.Message = old.Reason, old.Message
	}
	if d := Deadline(in.Pod, old); !d.IsZero() && !in.Now.Before(d) {
		s.Phase, s.Reason, s.Message = corev1.PodFailed, DeadlineExceeded, DeadlineExceededMessage
	}
	if in.Failed != nil {
		s.Phase, s.Reason, s.Message = corev1.PodFailed, in.Failed.Reason, in.Failed.Message
	}
}

// everStarted: some container of the pod was started.
func (in *Input) everStarted() bool {
	return slices.ContainsFunc(in.Containers, func(c Container) bool { return !c.Started.IsZero() })
}

// settle gives a stopped pod its end: what nobody has seen end counts as failed,
// so that no pod is called successful by mistake, and the phase is terminal.
func (in *Input) settle(s *corev1.PodStatus) {
	if in.everRan(s) {
		for i := range s.ContainerStatuses {
			settleContainer(&s.ContainerStatuses[i])
		}
	}
	// The init containers after the last one that was ever started keep waiting.
	last := 0
	for i := range s.InitContainerStatuses {
		if c := &s.InitContainerStatuses[i]; c.State.Waiting == nil || c.LastTerminationState.Terminated != nil {
			last = i
		}
	}
	for i := range s.InitContainerStatuses {
		if i <= last {
			settleContainer(&s.InitContainerStatuses[i])
		}
	}
	if !static(in.Pod) && !terminalPhase(s.Phase) {
		s.Phase = corev1.PodFailed
	}
}

func settleContainer(c *corev1.ContainerStatus) {
	if c.State.Terminated == nil {
		c.State = corev1.ContainerState{Terminated: lost(ContainerStatusUnknown, lostMessage)}
		c.Ready = false
		*c.Started = false
	}
}

// everRan: the pod got as far as its regular containers. Those of a rejected pod
// keep waiting, as nothing of it ever was.
func (in *Input) everRan(s *corev1.PodStatus) bool {
	if len(in.Pod.Spec.InitContainers) == 0 {
		return true
	}
	for i := range s.ContainerStatuses {
		if c := &s.ContainerStatuses[i]; c.State.Waiting == nil || c.LastTerminationState.Terminated != nil {
			return true
		}
	}
	n := len(s.InitContainerStatuses) - 1
	c := &s.InitContainerStatuses[n]
	if Sidecar(&in.Pod.Spec.InitContainers[n]) {
		return c.State.Running != nil && *c.Started
	}
	zero := func(t *corev1.ContainerStateTerminated) bool { return t != nil && t.ExitCode == 0 }
	return zero(c.State.Terminated) || zero(c.LastTerminationState.Terminated)
}

// disruption puts DisruptionTarget first: once there, it stays; it comes with the
// terminal phase, not before.
func (in *Input) disruption(s *corev1.PodStatus) []corev1.PodCondition {
	c := condition(in.Previous.Conditions, corev1.DisruptionTarget)
	if c == nil && in.Failed != nil && in.Failed.Disruption && terminalPhase(s.Phase) {
		c = &corev1.PodCondition{
			Type: corev1.DisruptionTarget, ObservedGeneration: in.Pod.Generation, Status: corev1.ConditionTrue,
			Reason: corev1.PodReasonTerminationByKubelet, Message: in.Failed.Message,
		}
	}
	if c == nil {
		return s.Conditions
	}
	return append([]corev1.PodCondition{*c}, s.Conditions...)
}

// addresses: the node's, and the pod's: one per family, the node's family first.
// An ended pod keeps its addresses.
func (in *Input) addresses(s *corev1.PodStatus) {
	host := addresses(in.HostIPs)
	for _, a := range host {
		s.HostIPs = append(s.HostIPs, corev1.HostIP{IP: a.String()})
	}
	if len(s.HostIPs) > 0 {
		s.HostIP = s.HostIPs[0].IP
	}
	var ips []netip.Addr
	switch {
	case in.Pod.Spec.HostNetwork && len(in.Previous.PodIPs) > 0:
		ips = podAddresses(in.Previous.PodIPs)
		if len(ips) == 1 && len(host) == 2 && ips[0].Is4() != host[1].Is4() {
			ips = append(ips, host[1])
		}
	case in.Pod.Spec.HostNetwork:
		ips = host
	case in.activeSandbox() == "":
		ips = podAddresses(in.Previous.PodIPs)
	default:
		ips = sorted(in.sandboxIPs(), host)
	}
	for _, a := range ips {
		s.PodIPs = append(s.PodIPs, corev1.PodIP{IP: a.String()})
	}
	if len(s.PodIPs) > 0 {
		s.PodIP = s.PodIPs[0].IP
	}
}

func (in *Input) sandboxIPs() []string {
	n := in.Sandboxes[0].GetNetwork()
	list := []string{n.GetIp()}
	for _, a := range n.GetAdditionalIps() {
		list = append(list, a.GetIp())
	}
	return list
}

// PodIPs are a pod's addresses as reported, the primary first.
func PodIPs(status *corev1.PodStatus) []string {
	list := make([]string, 0, len(status.PodIPs))
	for _, ip := range status.PodIPs {
		list = append(list, ip.IP)
	}
	return list
}

func sorted(ips []string, host []netip.Addr) []netip.Addr {
	v4 := len(host) == 0 || host[0].Is4()
	list := make([]netip.Addr, 0, 2)
	for _, want := range []bool{v4, !v4} {
		for _, a := range addresses(ips) {
			if a.Is4() == want {
				list = append(list, a)
				break
			}
		}
	}
	return list
}

func addresses(ips []string) []netip.Addr {
	list := make([]netip.Addr, 0, len(ips))
	for _, ip := range ips {
		if a, err := netip.ParseAddr(ip); err == nil {
			list = append(list, a.Unmap())
		}
	}
	return list
}

func podAddresses(ips []corev1.PodIP) []netip.Addr {
	list := make([]string, 0, len(ips))
	for _, ip := range ips {
		list = append(list, ip.IP)
	}
	return addresses(list)
}

// trim bounds the messages of all the containers together.
func (in *Input) trim(s *corev1.PodStatus) {
	n := len(s.ContainerStatuses) + len(s.InitContainerStatuses) + len(s.EphemeralContainerStatuses)
	if n == 0 {
		return
	}
	limit := maxPodMessage / n
	for _, list := range [][]corev1.ContainerStatus{s.ContainerStatuses, s.InitContainerStatuses, s.EphemeralContainerStatuses} {
		for i := range list {
			for _, t := range []*corev1.ContainerStateTerminated{list[i].State.Terminated, list[i].LastTerminationState.Terminated} {
				if t != nil && len(t.Message) > limit {
					t.Message = t.Message[:limit]
				}
			}
		}
	}
}

// date gives each condition the time since when its status holds.
func (in *Input) date(s *corev1.PodStatus) {
	for i := range s.Conditions {
		c := &s.Conditions[i]
		if old := condition(in.Previous.Conditions, c.Type); old != nil && old.Status == c.Status && !old.LastTransitionTime.IsZero() {
			c.LastTransitionTime = metav1.Time{Time: old.LastTransitionTime.UTC()}
		} else {
			c.LastTransitionTime = seconds(in.Now)
		}
	}
}

func ephemeralContainers(pod *corev1.Pod) []corev1.Container {
	list := make([]corev1.Container, 0, len(pod.Spec.EphemeralContainers))
	for i := range pod.Spec.EphemeralContainers {
		list = append(list, corev1.Container(pod.Spec.EphemeralContainers[i].EphemeralContainerCommon))
	}
	return list
}

package podstatus

import (
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Reasons of conditions.
const (
	PodCompleted                = "PodCompleted"
	PodFailed                   = "PodFailed"
	ContainersNotReady          = "ContainersNotReady"
	ContainersNotInitialized    = "ContainersNotInitialized"
	ReadinessGatesNotReady      = "ReadinessGatesNotReady"
	RestartAllContainersStarted = "RestartAllContainersStarted"
	PodSandboxNotReady          = "PodSandboxNotReady"
)

// conditions gives the conditions that the node owns, without times, in the
// kubelet's order. s has a status of every container of the spec.
func (in *Input) conditions(s *corev1.PodStatus) []corev1.PodCondition {
	all := make([]corev1.ContainerStatus, 0, len(s.InitContainerStatuses)+len(s.ContainerStatuses))
	all = append(append(all, s.InitContainerStatuses...), s.ContainerStatuses...)
	containers := in.containersReady(all, s.Phase)
	list := []corev1.PodCondition{in.readyToStart(), in.initialized(all, s.Phase)}
	list = append(list, in.ready(containers, list), containers, corev1.PodCondition{Type: corev1.PodScheduled, Status: corev1.ConditionTrue})
	for i := range list {
		list[i].ObservedGeneration = in.Pod.Generation
	}
	if canRestartAll(&in.Pod.Spec) {
		list = append(list, in.allRestarting(s.Phase))
	}
	return list
}

func (in *Input) readyToStart() corev1.PodCondition {
	c := corev1.PodCondition{Type: corev1.PodReadyToStartContainers, Status: corev1.ConditionTrue}
	if why := in.sandboxWanted(); why != "" {
		c.Status, c.Reason, c.Message = corev1.ConditionFalse, PodSandboxNotReady, why
	}
	return c
}

// sandboxWanted says why the pod needs a new sandbox; "" where it does not.
func (in *Input) sandboxWanted() string {
	if len(in.Sandboxes) == 0 {
		return "no pod sandbox exists"
	}
	ready := 0
	for _, s := range in.Sandboxes {
		if s.State == runtimeapi.PodSandboxState_SANDBOX_READY {
			ready++
		}
	}
	s := in.Sandboxes[0]
	switch {
	case ready > 1:
		return "multiple pod sandboxes are ready and need to be reconciled"
	case s.State != runtimeapi.PodSandboxState_SANDBOX_READY:
		return "pod sandbox is not ready"
	case (s.GetLinux().GetNamespaces().GetOptions().GetNetwork() == runtimeapi.NamespaceMode_NODE) != in.Pod.Spec.HostNetwork:
		return "network namespace mode changed and sandbox needs to be recreated"
	case !in.Pod.Spec.HostNetwork && s.Network != nil && s.Network.Ip == "":
		return "pod sandbox has no IP address"
	}
	return ""
}

func (in *Input) initialized(all []corev1.ContainerStatus, phase corev1.PodPhase) corev1.PodCondition {
	yes := corev1.PodCondition{Type: corev1.PodInitialized, Status: corev1.ConditionTrue}
	var incomplete []string
	for i := range in.Pod.Spec.InitContainers {
		c := &in.Pod.Spec.InitContainers[i]
		if s := statusOf(all, c.Name); Sidecar(c) && !*s.Started || !Sidecar(c) && !s.Ready {
			incomplete = append(incomplete, c.Name)
		}
	}
	if phase == corev1.PodSucceeded {
		yes.Reason = PodCompleted
		return yes
	}
	// A regular container that has run, or runs: sidecars may restart, the pod
	// stays initialized.
	for i := range in.Pod.Spec.Containers {
		if s := statusOf(all, in.Pod.Spec.Containers[i].Name); s.State.Running != nil || s.State.Terminated != nil {
			return yes
		}
	}
	if old := condition(in.Previous.Conditions, corev1.PodInitialized); len(incomplete) == 0 || old != nil && old.Status == corev1.ConditionTrue {
		return yes
	}
	return corev1.PodCondition{
		Type: corev1.PodInitialized, Status: corev1.ConditionFalse, Reason: ContainersNotInitialized,
		Message: fmt.Sprintf("containers with incomplete status: %s", incomplete),
	}
}

func (in *Input) containersReady(all []corev1.ContainerStatus, phase corev1.PodPhase) corev1.PodCondition {
	no := corev1.PodCondition{Type: corev1.ContainersReady, Status: corev1.ConditionFalse}
	var unready []string
	check := func(c *corev1.Container) {
		if !statusOf(all, c.Name).Ready {
			unready = append(unready, c.Name)
		}
	}
	for i := range in.Pod.Spec.InitContainers {
		if c := &in.Pod.Spec.InitContainers[i]; Sidecar(c) {
			check(c)
		}
	}
	for i := range in.Pod.Spec.Containers {
		check(&in.Pod.Spec.Containers[i])
	}
	switch {
	case phase == corev1.PodSucceeded:
		no.Reason = PodCompleted
		return no
	case phase == corev1.PodFailed:
		no.Reason = PodFailed
		return no
	case len(unready) > 0:
		no.Reason, no.Message = ContainersNotReady, fmt.Sprintf("containers with unready status: %s", unready)
		return no
	}
	return corev1.PodCondition{Type: corev1.ContainersReady, Status: corev1.ConditionTrue}
}

func (in *Input) ready(containers corev1.PodCondition, before []corev1.PodCondition) corev1.PodCondition {
	c := containers
	c.Type = corev1.PodReady
	if c.Status != corev1.ConditionTrue {
		return c
	}
	var missing []string
	for _, g := range in.Pod.Spec.ReadinessGates {
		status, ok := in.Gates[g.ConditionType]
		if own := condition(before, g.ConditionType); own != nil {
			status, ok = own.Status, true
		}
		switch {
		case !ok:
			missing = append(missing, fmt.Sprintf("corresponding condition of pod readiness gate %q does not exist.", g.ConditionType))
		case status != corev1.ConditionTrue:
			missing = append(missing, fmt.Sprintf("the status of pod readiness gate %q is not \"True\", but %v", g.ConditionType, status))
		}
	}
	if len(missing) > 0 {
		c.Status, c.Reason, c.Message = corev1.ConditionFalse, ReadinessGatesNotReady, strings.Join(missing, ", ")
	}
	return c
}

func (in *Input) allRestarting(phase corev1.PodPhase) corev1.PodCondition {
	c := corev1.PodCondition{Type: corev1.AllContainersRestarting, Status: corev1.ConditionFalse}
	switch {
	case phase == corev1.PodSucceeded:
		c.Reason = PodCompleted
	case phase == corev1.PodFailed:
		c.Reason = PodFailed
	case in.shouldRestartAll() && !in.restartAllCleaned():
		c.Status, c.Reason, c.Message = corev1.ConditionTrue, RestartAllContainersStarted, "container exited with restart policy rule"
	}
	return c
}

package podstatus

import (
	"slices"

	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Sidecar tells whether a container is a restartable init container (where it is
// an init container).
func Sidecar(c *corev1.Container) bool {
	return c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
}

// RestartOnExit says whether a container that ended with the code is started again:
// its own restart rules first, then its own policy, then the pod's.
func RestartOnExit(spec *corev1.PodSpec, c *corev1.Container, code int32) bool {
	if c.RestartPolicy == nil {
		return restartByPolicy(string(spec.RestartPolicy), code)
	}
	if r := matchingRule(c, code); r != nil {
		switch r.Action {
		case corev1.ContainerRestartRuleActionRestart, corev1.ContainerRestartRuleActionRestartAllContainers:
			return true
		}
	}
	switch p := *c.RestartPolicy; p {
	case corev1.ContainerRestartPolicyAlways, corev1.ContainerRestartPolicyOnFailure, corev1.ContainerRestartPolicyNever:
		return restartByPolicy(string(p), code)
	}
	return restartByPolicy(string(spec.RestartPolicy), code)
}

func restartByPolicy(policy string, code int32) bool {
	switch policy {
	case string(corev1.RestartPolicyNever):
		return false
	case string(corev1.RestartPolicyOnFailure):
		return code != 0
	}
	return true // Always, and the default
}

func matchingRule(c *corev1.Container, code int32) *corev1.ContainerRestartRule {
	for i := range c.RestartPolicyRules {
		r := &c.RestartPolicyRules[i]
		if r.ExitCodes == nil {
			continue
		}
		in := slices.Contains(r.ExitCodes.Values, code)
		switch r.ExitCodes.Operator {
		case corev1.ContainerRestartRuleOnExitCodesOpIn:
			if in {
				return r
			}
		case corev1.ContainerRestartRuleOnExitCodesOpNotIn:
			if !in {
				return r
			}
		}
	}
	return nil
}

func restartsAll(c *corev1.Container, code int32) bool {
	r := matchingRule(c, code)
	return r != nil && r.Action == corev1.ContainerRestartRuleActionRestartAllContainers
}

// canRestartAll: some container of the pod has a rule that restarts all of them.
func canRestartAll(spec *corev1.PodSpec) bool {
	has := func(c corev1.Container) bool {
		return slices.ContainsFunc(c.RestartPolicyRules, func(r corev1.ContainerRestartRule) bool {
			return r.Action == corev1.ContainerRestartRuleActionRestartAllContainers
		})
	}
	return slices.ContainsFunc(spec.InitContainers, has) || slices.ContainsFunc(spec.Containers, has)
}

// shouldRestart says whether a container has to be started: it never was, its state
// is not known, or it ended and its policy wants it back. Never once the pod is
// being deleted.
func (in *Input) shouldRestart(c *corev1.Container) bool {
	if in.Pod.DeletionTimestamp != nil {
		return false
	}
	s := in.latest(c.Name)
	if s == nil {
		return true
	}
	switch s.State {
	case runtimeapi.ContainerState_CONTAINER_RUNNING:
		return false
	case runtimeapi.ContainerState_CONTAINER_EXITED:
		return RestartOnExit(&in.Pod.Spec, c, s.ExitCode)
	}
	return true
}

// shouldRestartAll says whether a container's exit asks for a restart of all the
// pod's containers, or such a restart is under way.
func (in *Input) shouldRestartAll() bool {
	if !canRestartAll(&in.Pod.Spec) {
		return false
	}
	if c := condition(in.Previous.Conditions, corev1.AllContainersRestarting); c != nil && c.Status == corev1.ConditionTrue {
		return true
	}
	check := func(c *corev1.Container, reported []corev1.ContainerStatus) bool {
		s := in.latest(c.Name)
		if s == nil || s.State != runtimeapi.ContainerState_CONTAINER_EXITED {
			return false
		}
		if restartsAll(c, s.ExitCode) {
			return true
		}
		old := statusOf(reported, c.Name)
		return old != nil && old.State.Terminated != nil && restartsAll(c, old.State.Terminated.ExitCode)
	}
	for i := range in.Pod.Spec.InitContainers {
		if check(&in.Pod.Spec.InitContainers[i], in.Previous.InitContainerStatuses) {
			return true
		}
	}
	for i := range in.Pod.Spec.Containers {
		if check(&in.Pod.Spec.Containers[i], in.Previous.ContainerStatuses) {
			return true
		}
	}
	return false
}

// restartAllCleaned: no container of the spec is left in the runtime.
func (in *Input) restartAllCleaned() bool {
	gone := func(cs []corev1.Container) bool {
		return !slices.ContainsFunc(cs, func(c corev1.Container) bool { return in.latest(c.Name) != nil })
	}
	return gone(in.Pod.Spec.InitContainers) && gone(in.Pod.Spec.Containers)
}

// Attempt is the restart count that the next container of that name gets.
func Attempt(in Input, name string) int32 {
	var n int32
	for _, list := range [][]corev1.ContainerStatus{
		in.Previous.InitContainerStatuses, in.Previous.ContainerStatuses, in.Previous.EphemeralContainerStatuses,
	} {
		if s := statusOf(list, name); s != nil {
			n = s.RestartCount
			if s.State.Terminated != nil || s.State.Running != nil {
				n++
			}
		}
	}
	if c := in.latest(name); c != nil {
		n = max(n, c.Restarts+1)
	}
	return n
}

func statusOf(list []corev1.ContainerStatus, name string) *corev1.ContainerStatus {
	for i := range list {
		if list[i].Name == name {
			return &list[i]
		}
	}
	return nil
}

func condition(list []corev1.PodCondition, t corev1.PodConditionType) *corev1.PodCondition {
	for i := range list {
		if list[i].Type == t {
			return &list[i]
		}
	}
	return nil
}

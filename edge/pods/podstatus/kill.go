package podstatus

import (
	"slices"

	corev1 "k8s.io/api/core/v1"
)

// MinimumGrace is the least time, in seconds, that StopContainer is given.
const MinimumGrace int64 = 2

// Grace is the time, in seconds, that a container gets to end, from the preStop
// hook to SIGKILL. The engine takes off what the hook used, and keeps at least
// MinimumGrace for the signal.
func Grace(pod *corev1.Pod, c *corev1.Container, reason KillReason) int64 {
	if g := pod.DeletionGracePeriodSeconds; g != nil {
		return *g
	}
	g := pod.Spec.TerminationGracePeriodSeconds
	if g == nil {
		return MinimumGrace
	}
	var p *corev1.Probe
	switch {
	case c == nil:
	case reason == StartupProbe:
		p = c.StartupProbe
	case reason == LivenessProbe:
		p = c.LivenessProbe
	}
	if p != nil && p.TerminationGracePeriodSeconds != nil {
		return *p.TerminationGracePeriodSeconds
	}
	return *g
}

// KillAfter says, for each of the running containers (by name), which other
// running ones have to be gone before it gets its signal: sidecars go after all
// the regular containers, and among each other in the reverse of their order. All
// else goes at once. The wait counts against the container's grace.
func KillAfter(pod *corev1.Pod, running []string) map[string][]string {
	after := map[string][]string{}
	var first []string
	for i := range pod.Spec.Containers {
		if n := pod.Spec.Containers[i].Name; slices.Contains(running, n) {
			first = append(first, n)
		}
	}
	for _, c := range slices.Backward(pod.Spec.InitContainers) {
		if !Sidecar(&c) || !slices.Contains(running, c.Name) {
			continue
		}
		after[c.Name] = slices.Clone(first)
		first = append(first, c.Name)
	}
	return after
}

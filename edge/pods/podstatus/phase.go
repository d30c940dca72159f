package podstatus

import (
	corev1 "k8s.io/api/core/v1"
)

// Phase is the phase that the containers' statuses (init containers' included)
// amount to. stopped: nothing of the pod will be started again. initialized: a
// regular container was created in the sandbox in use, so that sidecars that
// restart do not bring the pod back to Pending.
func Phase(pod *corev1.Pod, statuses []corev1.ContainerStatus, stopped, initialized bool) corev1.PodPhase {
	spec := &pod.Spec
	n := countInit(spec, statuses)
	if n.initFailed > 0 {
		return corev1.PodFailed
	}
	n.addRegular(spec, statuses)
	switch {
	case n.initPending > 0, n.sidecarPending > 0 && !initialized, n.waiting > 0:
		return corev1.PodPending
	case n.running > 0 && n.unknown == 0:
		return corev1.PodRunning
	case n.running == 0 && n.stopped > 0 && n.unknown == 0:
		if n.restartable > 0 && !(stopped && !static(pod)) {
			return corev1.PodRunning
		}
		if n.stopped == n.succeeded {
			return corev1.PodSucceeded
		}
		return corev1.PodFailed
	}
	return corev1.PodPending
}

// counts is how many containers are in which state. Sidecars count as running,
// waiting or unknown; ended ones do not count.
type counts struct {
	initPending, initFailed, sidecarPending                    int
	running, waiting, unknown, stopped, succeeded, restartable int
}

func countInit(spec *corev1.PodSpec, statuses []corev1.ContainerStatus) (n counts) {
	for i := range spec.InitContainers {
		c := &spec.InitContainers[i]
		s := statusOf(statuses, c.Name)
		if Sidecar(c) {
			n.addSidecar(s)
			continue
		}
		if s == nil {
			n.initPending++
			continue
		}
		switch ended, last := s.State.Terminated, s.LastTerminationState.Terminated; {
		case ended != nil:
			n.addInitExit(spec, c, ended)
		case s.State.Waiting != nil && last != nil:
			n.addInitExit(spec, c, last)
		default:
			n.initPending++
		}
	}
	return n
}

func (n *counts) addInitExit(spec *corev1.PodSpec, c *corev1.Container, t *corev1.ContainerStateTerminated) {
	if t.ExitCode != 0 && !restartable(spec, c, t) {
		n.initFailed++
	}
}

func (n *counts) addSidecar(s *corev1.ContainerStatus) {
	switch {
	case s == nil:
		n.unknown++
	case s.State.Running != nil:
		if s.Started == nil || !*s.Started {
			n.sidecarPending++
		}
		n.running++
	case s.State.Terminated != nil:
	case s.State.Waiting != nil:
		if s.LastTerminationState.Terminated == nil {
			n.sidecarPending++
			n.waiting++
		}
	default:
		n.sidecarPending++
		n.unknown++
	}
}

func (n *counts) addRegular(spec *corev1.PodSpec, statuses []corev1.ContainerStatus) {
	for i := range spec.Containers {
		c := &spec.Containers[i]
		s := statusOf(statuses, c.Name)
		switch {
		case s == nil:
			n.unknown++
		case s.State.Running != nil:
			n.running++
		case s.State.Terminated != nil:
			n.addExit(spec, c, s.State.Terminated)
			if s.State.Terminated.ExitCode == 0 {
				n.succeeded++
			}
		case s.State.Waiting != nil && s.LastTerminationState.Terminated != nil:
			n.addExit(spec, c, s.LastTerminationState.Terminated)
		case s.State.Waiting != nil:
			n.waiting++
		default:
			n.unknown++
		}
	}
}

func (n *counts) addExit(spec *corev1.PodSpec, c *corev1.Container, t *corev1.ContainerStateTerminated) {
	n.stopped++
	if restartable(spec, c, t) {
		n.restartable++
	}
}

func restartable(spec *corev1.PodSpec, c *corev1.Container, t *corev1.ContainerStateTerminated) bool {
	return t.Reason == RestartingAllContainers || RestartOnExit(spec, c, t.ExitCode)
}

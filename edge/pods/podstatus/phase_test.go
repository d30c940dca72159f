package podstatus

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// TestPhase has what the stories of the other tests do not come to.
func TestPhase(t *testing.T) {
	yes, no := true, false
	run := func(name string, started *bool) corev1.ContainerStatus {
		return corev1.ContainerStatus{Name: name, Started: started, State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}
	}
	waits := func(name string) corev1.ContainerStatus {
		return corev1.ContainerStatus{Name: name, State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{}}}
	}
	ended := func(name string, code int32) corev1.ContainerStatus {
		return corev1.ContainerStatus{Name: name, State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: code}}}
	}
	again := func(name string, code int32) corev1.ContainerStatus { // it waits for its restart
		s := waits(name)
		s.LastTerminationState = ended(name, code).State
		return s
	}
	bare := func(name string) corev1.ContainerStatus { return corev1.ContainerStatus{Name: name} }
	init, side, main := []corev1.Container{container("i")}, []corev1.Container{container("s", sidecar)}, []corev1.Container{container("a"), container("b")}
	for _, tc := range []struct {
		name                 string
		policy               corev1.RestartPolicy
		inits                []corev1.Container
		statuses             []corev1.ContainerStatus
		stopped, initialized bool
		want                 corev1.PodPhase
	}{
		{"nothing is known", corev1.RestartPolicyAlways, nil, nil, false, false, corev1.PodPending},
		{"one is not known", corev1.RestartPolicyAlways, nil, []corev1.ContainerStatus{run("a", &yes)}, false, true, corev1.PodPending},
		{"one has no state", corev1.RestartPolicyAlways, nil, []corev1.ContainerStatus{run("a", &yes), bare("b")}, false, true, corev1.PodPending},
		{"one waits", corev1.RestartPolicyAlways, nil, []corev1.ContainerStatus{run("a", &yes), waits("b")}, false, true, corev1.PodPending},
		{"one waits for its restart", corev1.RestartPolicyAlways, nil, []corev1.ContainerStatus{run("a", &yes), again("b", 1)}, false, true, corev1.PodRunning},
		{"both wait for their restarts", corev1.RestartPolicyAlways, nil, []corev1.ContainerStatus{again("a", 0), again("b", 1)}, false, true, corev1.PodRunning},
		{"both wait, and will not come", corev1.RestartPolicyAlways, nil, []corev1.ContainerStatus{again("a", 0), again("b", 1)}, true, true, corev1.PodFailed},
		{"ended and stopped", corev1.RestartPolicyAlways, nil, []corev1.ContainerStatus{ended("a", 0), ended("b", 0)}, true, true, corev1.PodSucceeded},
		{"init is not known", corev1.RestartPolicyNever, init, []corev1.ContainerStatus{run("a", &yes), run("b", &yes)}, false, true, corev1.PodPending},
		{"init failed, never", corev1.RestartPolicyNever, init, []corev1.ContainerStatus{ended("i", 1), waits("a"), waits("b")}, false, false, corev1.PodFailed},
		{"init failed, comes again", corev1.RestartPolicyAlways, init, []corev1.ContainerStatus{again("i", 1), waits("a"), waits("b")}, false, false, corev1.PodPending},
		{"init failed, waits, never", corev1.RestartPolicyNever, init, []corev1.ContainerStatus{again("i", 1), waits("a"), waits("b")}, false, false, corev1.PodFailed},
		{"sidecar is not known", corev1.RestartPolicyAlways, side, []corev1.ContainerStatus{run("a", &yes), run("b", &yes)}, false, true, corev1.PodPending},
		{"sidecar has no state", corev1.RestartPolicyAlways, side, []corev1.ContainerStatus{bare("s"), run("a", &yes), run("b", &yes)}, false, true, corev1.PodPending},
		{"sidecar has not started", corev1.RestartPolicyAlways, side, []corev1.ContainerStatus{run("s", &no), run("a", &yes), run("b", &yes)}, false, false, corev1.PodPending},
		{"sidecar starts again", corev1.RestartPolicyAlways, side, []corev1.ContainerStatus{run("s", &no), run("a", &yes), run("b", &yes)}, false, true, corev1.PodRunning},
		{"sidecar waits", corev1.RestartPolicyAlways, side, []corev1.ContainerStatus{waits("s"), run("a", &yes), run("b", &yes)}, false, true, corev1.PodPending},
		{"sidecar waits for its restart", corev1.RestartPolicyAlways, side, []corev1.ContainerStatus{again("s", 1), run("a", &yes), run("b", &yes)}, false, true, corev1.PodRunning},
		{"sidecar ended", corev1.RestartPolicyAlways, side, []corev1.ContainerStatus{ended("s", 1), run("a", &yes), run("b", &yes)}, false, true, corev1.PodRunning},
		{"sidecar runs after all the others", corev1.RestartPolicyNever, side, []corev1.ContainerStatus{run("s", &yes), ended("a", 0), ended("b", 0)}, false, true, corev1.PodRunning},
		{"sidecar failed in the end", corev1.RestartPolicyNever, side, []corev1.ContainerStatus{ended("s", 137), ended("a", 0), ended("b", 0)}, false, true, corev1.PodSucceeded},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pod := &corev1.Pod{Spec: corev1.PodSpec{RestartPolicy: tc.policy, InitContainers: tc.inits, Containers: main}}
			if got := Phase(pod, tc.statuses, tc.stopped, tc.initialized); got != tc.want {
				t.Errorf("%s, want %s", got, tc.want)
			}
		})
	}
}

package pods

import (
	"context"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestLifecycle(t *testing.T) {
	t.Parallel()
	sameOnBoth(t, []scenario{
		{name: "completes", do: phase(corev1.PodSucceeded)},
		{name: "fails", do: phase(corev1.PodFailed)},
		{name: "message-from-log", do: phase(corev1.PodFailed)},
		{name: "crash-loop", do: crashLoop("c")},
		{name: "on-failure", do: phase(corev1.PodSucceeded)},
		{name: "init", do: ready},
		{name: "init-fails", do: phase(corev1.PodFailed)},
		{name: "init-crash-loop", do: crashLoop("one")},
		{name: "sidecar", do: phase(corev1.PodSucceeded), differs: oneByOne},
		{name: "sidecar-startup", do: ready, differs: oneByOne},
		{name: "two-containers", do: func(s *side) {
			s.until("the first container ends", func() bool { c := s.status("a", "c"); return c != nil && c.State.Terminated != nil })
		}},
		{name: "deadline", do: phase(corev1.PodFailed)},
		{name: "pre-stop", do: ready},
		{name: "pre-stop-fails", do: ready},
		{name: "killed", do: ready},
		{name: "post-start", do: phase(corev1.PodSucceeded)},
		{name: "post-start-fails", do: ended},
		{name: "restart-rules", do: phase(corev1.PodFailed)},
		{name: "readiness-gate", do: then(condition(corev1.ContainersReady, corev1.ConditionTrue), (*side).rest, openGate, ready)},
		{name: "stop-signal", do: ready},
		{name: "image-change", do: then(ready, changeImage, func(s *side) {
			s.until("the container is another", func() bool {
				c := s.status("a", "c")
				return c != nil && c.RestartCount == 1 && c.Ready
			})
		})},
		{name: "ephemeral", do: then(ready, debugContainer, func(s *side) {
			s.until("the ephemeral container ends", func() bool { c := s.status("a", "debug"); return c != nil && c.State.Terminated != nil })
		})},
	})
}

// openGate says what a controller would say for a readiness gate.
func openGate(s *side) {
	p, err := kube.CoreV1().Pods(s.ns).Get(s.ctx, "a", metav1.GetOptions{})
	if err != nil {
		s.Fatal(err)
	}
	s.poll("the condition of the gate", func(ctx context.Context) error {
		if p, err = kube.CoreV1().Pods(s.ns).Get(ctx, "a", metav1.GetOptions{}); err != nil {
			return err
		}
		p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: "example.com/ok", Status: corev1.ConditionTrue})
		_, err = kube.CoreV1().Pods(s.ns).UpdateStatus(ctx, p, metav1.UpdateOptions{})
		return err
	})
}

func changeImage(s *side) {
	s.poll("the image changes", func(ctx context.Context) error {
		p, err := kube.CoreV1().Pods(s.ns).Get(ctx, "a", metav1.GetOptions{})
		if err != nil {
			return err
		}
		p.Spec.Containers[0].Image = "fairlead.test/image-change:1"
		_, err = kube.CoreV1().Pods(s.ns).Update(ctx, p, metav1.UpdateOptions{})
		return err
	})
}

// debugContainer is what kubectl debug does.
func debugContainer(s *side) {
	s.poll("the ephemeral container is added", func(ctx context.Context) error {
		p, err := kube.CoreV1().Pods(s.ns).Get(ctx, "a", metav1.GetOptions{})
		if err != nil {
			return err
		}
		p.Spec.EphemeralContainers = append(p.Spec.EphemeralContainers, corev1.EphemeralContainer{
			TargetContainerName: "c",
			EphemeralContainerCommon: corev1.EphemeralContainerCommon{
				Name: "debug", Image: "fairlead.test/busybox:1", ImagePullPolicy: corev1.PullIfNotPresent,
				Command: []string{"sh", "-c", "sleep 2; cat /proc/1/cmdline | tr '\\0' ' ' | cut -c1-10 > /dev/termination-log"},
			},
		})
		_, err = kube.CoreV1().Pods(s.ns).UpdateEphemeralContainers(ctx, "a", p, metav1.UpdateOptions{})
		return err
	})
}

func TestProbes(t *testing.T) {
	t.Parallel()
	sameOnBoth(t, []scenario{
		{name: "readiness-exec", do: then(ready, condition(corev1.PodReady, corev1.ConditionFalse))},
		{name: "liveness-exec", do: crashLoop("c")},
		{name: "liveness-http", do: ended},
		{name: "probe-tcp", do: ready, differs: notYetOpen},
		{name: "probe-grpc", do: event("Unhealthy")},
		{name: "probe-timeout", do: event("Unhealthy"), differs: []differs{
			{aspect: "Unhealthy .* probe failed: $", why: "the command of a probe ends with its container"},
		}},
		{name: "startup", do: ready},
		{name: "startup-fails", do: ended},
	})
}

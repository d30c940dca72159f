package pods

import (
	"context"
	"fmt"
	"net"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestConfiguration(t *testing.T) {
	t.Parallel()
	sameOnBoth(t, []scenario{
		{name: "env", do: phase(corev1.PodSucceeded)},
		{name: "env-absent", do: then(waiting("c", "CreateContainerConfigError"), (*side).rest, late, ready)},
		{name: "env-key-absent", do: waiting("c", "CreateContainerConfigError")},
		{name: "volume-configmap", do: phase(corev1.PodSucceeded)},
		{name: "volume-absent", do: then(event("FailedMount"), (*side).rest, late, ready)},
		{name: "volume-update", do: then(ready, changeLive, phase(corev1.PodSucceeded))},
		{name: "projected", do: phase(corev1.PodSucceeded)},
		{name: "empty-dir", do: phase(corev1.PodSucceeded)},
		{name: "sub-path", do: phase(corev1.PodSucceeded)},
		{name: "host-path", do: phase(corev1.PodSucceeded)},
		{name: "host-path-absent", do: event("FailedMount")},
		{name: "propagation", do: phase(corev1.PodSucceeded)},
	})
}

// late creates what a pod waits for.
func late(s *side) {
	s.apply("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: late}\ndata: {k: v}\n")
}

func changeLive(s *side) {
	s.poll("the ConfigMap changes", func(ctx context.Context) error {
		cm, err := kube.CoreV1().ConfigMaps(s.ns).Get(ctx, "live", metav1.GetOptions{})
		if err != nil {
			return err
		}
		cm.Data["word"] = "after"
		_, err = kube.CoreV1().ConfigMaps(s.ns).Update(ctx, cm, metav1.UpdateOptions{})
		return err
	})
}

func TestSecurityContext(t *testing.T) {
	t.Parallel()
	sameOnBoth(t, []scenario{
		{name: "identity", do: phase(corev1.PodSucceeded), differs: oneByOne},
		{name: "privileges", do: phase(corev1.PodSucceeded), differs: oneByOne},
		{name: "sysctl", do: phase(corev1.PodSucceeded)},
		{name: "sysctl-forbidden", do: phase(corev1.PodFailed)},
		{name: "non-root", do: waiting("c", "CreateContainerConfigError")},
		{name: "share-processes", do: phase(corev1.PodSucceeded)},
		{name: "seccomp-absent", do: event("Failed")},
	})
}

func TestResources(t *testing.T) {
	t.Parallel()
	sameOnBoth(t, []scenario{
		{name: "burstable", do: phase(corev1.PodSucceeded)},
		{name: "guaranteed", do: phase(corev1.PodSucceeded)},
		{name: "best-effort", do: phase(corev1.PodSucceeded)},
		{name: "oom", do: phase(corev1.PodFailed)},
		{name: "resize", do: then(ready, resize, func(s *side) {
			if s.node == agent {
				return
			}
			s.until("the new limit is in effect", func() bool {
				c := s.status("a", "c")
				return c != nil && c.Resources != nil && c.Resources.Limits.Memory().String() == "96Mi"
			})
		}), differs: []differs{{
			aspect: "^a (condition PodResize|container c|resources|allocated)|^event .*Resize",
			why:    "the agent does not resize in place: the status goes on to say what is in effect",
		}}},
		{name: "ephemeral-storage", do: ended},
		{name: "size-limit", do: ended},
	})
}

// resize is what kubectl patch --subresource resize does.
func resize(s *side) {
	s.poll("the pod is resized", func(ctx context.Context) error {
		p, err := kube.CoreV1().Pods(s.ns).Get(ctx, "a", metav1.GetOptions{})
		if err != nil {
			return err
		}
		p.Spec.Containers[0].Resources.Limits[corev1.ResourceMemory] = resource.MustParse("96Mi")
		_, err = kube.CoreV1().Pods(s.ns).UpdateResize(ctx, "a", p, metav1.UpdateOptions{})
		return err
	})
}

func TestNetwork(t *testing.T) {
	t.Parallel()
	sameOnBoth(t, []scenario{
		{name: "names", do: phase(corev1.PodSucceeded)},
		{name: "dns-default", do: phase(corev1.PodSucceeded)},
		{name: "dns-cluster-first", do: phase(corev1.PodSucceeded)},
		{name: "host-network", do: phase(corev1.PodSucceeded)},
		{name: "host-port", do: then(ready, dialHostPort), differs: notYetOpen},
		{name: "service-env", do: phase(corev1.PodSucceeded)},
		{name: "host-aliases-host-network", do: phase(corev1.PodSucceeded)},
	})
}

func dialHostPort(s *side) {
	s.poll("the host's port answers", func(ctx context.Context) error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", fmt.Sprintf("%s:%d", hostIP(), s.port))
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

func TestImages(t *testing.T) {
	t.Parallel()
	sameOnBoth(t, []scenario{
		{name: "never-pull", do: waiting("c", "ErrImageNeverPull")},
		{name: "image-name", do: waiting("c", "InvalidImageName")},
		{name: "image-absent", do: pullLoop},
		{name: "pull", do: phase(corev1.PodSucceeded)},
		{name: "pull-always", do: phase(corev1.PodSucceeded), differs: oneByOne},
		{name: "pull-private", do: phase(corev1.PodSucceeded)},
		{name: "pull-forbidden", do: pullLoop},
	})
}

func TestBadInput(t *testing.T) {
	t.Parallel()
	sameOnBoth(t, []scenario{
		{name: "out-of-cpu", do: phase(corev1.PodFailed)},
		{name: "wrong-os", do: phase(corev1.PodFailed)},
		{name: "wrong-node", do: func(s *side) {
			if s.node == agent {
				ready(s)
				return
			}
			phase(corev1.PodFailed)(s)
		}, differs: []differs{{
			aspect: "",
			why:    "the node knows the labels that it gives itself, not those that others gave its Node: a pod that was put there past the scheduler runs",
		}}},
		{name: "port-in-use", do: then(ready, func(s *side) {
			s.until("b fails", func() bool { p, _ := s.pod("b"); return p != nil && p.Status.Phase == corev1.PodFailed })
		})},
		{name: "no-command", do: phase(corev1.PodFailed)},
		{name: "no-command-loop", do: crashLoop("c")},
		{name: "image-volume", do: event("Failed"), differs: []differs{{
			aspect: "^a (condition PodReadyToStartContainers|container c|pod IPs)$|^event ",
			why:    "the kubelet asks a runtime without image volumes for one and passes on what that says; the agent says what is missing",
		}}},
		{name: "runtime-class", do: event("FailedCreatePodSandBox")},
		{name: "working-dir-absent", do: phase(corev1.PodSucceeded)},
		{name: "host-users", do: event("Failed")},
		{name: "device-absent", do: func(s *side) {
			if s.node == agent {
				phase(corev1.PodFailed)(s)
				return
			}
			ready(s)
		}, differs: []differs{{
			aspect: "",
			why:    "the kubelet runs the pod without a device that nobody registered; the agent refuses it, as it does one that is unplugged",
		}}},
	})
}

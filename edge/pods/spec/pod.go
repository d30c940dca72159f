package spec

import (
	"errors"
	"fmt"
	"iter"

	corev1 "k8s.io/api/core/v1"
)

// ConfigError is why a container cannot be made. The container waits with Reason
// and Message, and is tried again.
type ConfigError struct {
	// Reason is the reason of the waiting state, such as CreateContainerConfigError.
	Reason  string
	Message string
	err     error
}

// CreateContainerConfigError is the reason of the errors of Env and Container.
const CreateContainerConfigError = "CreateContainerConfigError"

func (e *ConfigError) Error() string { return e.Message }

// Unwrap gives source.ErrNotFound where the pod waits for an object.
func (e *ConfigError) Unwrap() error { return e.err }

// configError makes err a ConfigError, unless it is one or nil.
func configError(err error) error {
	var ce *ConfigError
	if err == nil || errors.As(err, &ce) {
		return err
	}
	return &ConfigError{Reason: CreateContainerConfigError, Message: err.Error(), err: err}
}

// Event is a Warning about the pod that a person should see as a Kubernetes event.
type Event struct {
	Reason, Message string
}

// Which containers to go over.
const (
	initContainers = 1 << iota
	mainContainers
	ephemeralContainers
	allContainers = initContainers | mainContainers | ephemeralContainers
)

// containers goes over the pod's containers of the given kinds, in the kubelet's order.
func containers(pod *corev1.Pod, kinds int) iter.Seq[*corev1.Container] {
	return func(yield func(*corev1.Container) bool) {
		if kinds&initContainers != 0 {
			for i := range pod.Spec.InitContainers {
				if !yield(&pod.Spec.InitContainers[i]) {
					return
				}
			}
		}
		if kinds&mainContainers != 0 {
			for i := range pod.Spec.Containers {
				if !yield(&pod.Spec.Containers[i]) {
					return
				}
			}
		}
		if kinds&ephemeralContainers != 0 {
			for i := range pod.Spec.EphemeralContainers {
				if !yield((*corev1.Container)(&pod.Spec.EphemeralContainers[i].EphemeralContainerCommon)) {
					return
				}
			}
		}
	}
}

// sidecar says whether an init container keeps running beside the others.
func sidecar(c *corev1.Container) bool {
	return c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
}

const (
	configSource = "kubernetes.io/config.source" // annotation: where the pod comes from; "api", else it is static
	nodeCritical = "system-node-critical"

	// criticalPriority is the lowest priority of the two system classes.
	criticalPriority = 2_000_000_000
)

// Static says whether the pod comes from the node itself, not from the API server.
func Static(pod *corev1.Pod) bool {
	from, ok := pod.Annotations[configSource]
	return ok && from != "api"
}

// Critical says whether the pod is one that others make way for, and that is
// evicted last: a static pod, or one of the system priority classes.
func Critical(pod *corev1.Pod) bool {
	_, mirror := pod.Annotations[corev1.MirrorPodAnnotationKey]
	return mirror || Static(pod) || pod.Spec.Priority != nil && *pod.Spec.Priority >= criticalPriority
}

// describe names the pod in errors as the kubelet does.
func describe(pod *corev1.Pod) string {
	return fmt.Sprintf("%s_%s(%s)", pod.Name, pod.Namespace, pod.UID)
}

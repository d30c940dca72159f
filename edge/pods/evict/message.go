package evict

import (
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	resourcehelper "k8s.io/component-helpers/resource"
)

// The annotations of the event Evicted, as the kubelet's.
const (
	offendingContainers      = "offending_containers"
	offendingContainersUsage = "offending_containers_usage"
	offendingPod             = "offending_pod"
	offendingPodUsage        = "offending_pod_usage"
	starvedResource          = "starved_resource"
)

// explain says in the kubelet's words why the pod goes.
func explain(name corev1.ResourceName, p *corev1.Pod, u usages, ts []Threshold, o Observations) (message string, annotations map[string]string) {
	var b strings.Builder
	fmt.Fprintf(&b, "The node was low on resource: %v. ", name)
	for _, t := range ts {
		now, ok := o[t.Signal]
		if !ok || t.Signal.resource() != name {
			continue
		}
		q := t.Value.of(now.Capacity)
		fmt.Fprintf(&b, "Threshold quantity: %v, available: %v. ", &q, resource.NewQuantity(now.Available, format(name)))
		break
	}
	annotations = map[string]string{starvedResource: string(name)}
	use, ok := u[p.UID]
	if !ok {
		return b.String(), annotations
	}
	if name == corev1.ResourceMemory && resourcehelper.IsPodLevelResourcesSet(p) {
		if req, ok := p.Spec.Resources.Requests[name]; ok {
			q := resource.NewQuantity(use.Memory, resource.BinarySI)
			fmt.Fprintf(&b, "Pod %s was using %s, request is %s, has larger consumption of %v. ", p.Name, q, req.String(), name)
			annotations[offendingPod], annotations[offendingPodUsage] = p.Name, q.String()
		}
	}
	var names, amounts []string
	for _, cs := range [][]corev1.Container{p.Spec.Containers, p.Spec.InitContainers} {
		for i := range cs {
			c, ok := use.Containers[cs[i].Name]
			if !ok {
				continue
			}
			var q *resource.Quantity
			switch name {
			case corev1.ResourceEphemeralStorage:
				q = resource.NewQuantity(c.Root.Bytes+c.Logs.Bytes, resource.BinarySI)
			case corev1.ResourceMemory:
				q = resource.NewQuantity(c.Memory, resource.BinarySI)
			default:
				continue
			}
			if req := cs[i].Resources.Requests[name]; q.Cmp(req) > 0 {
				fmt.Fprintf(&b, "Container %s was using %s, request is %s, has larger consumption of %v. ", cs[i].Name, q, req.String(), name)
				names, amounts = append(names, cs[i].Name), append(amounts, q.String())
			}
		}
	}
	annotations[offendingContainers] = strings.Join(names, ",")
	annotations[offendingContainersUsage] = strings.Join(amounts, ",")
	return b.String(), annotations
}

func format(name corev1.ResourceName) resource.Format {
	if name == corev1.ResourceMemory || name == corev1.ResourceEphemeralStorage {
		return resource.BinarySI
	}
	return resource.DecimalSI
}

package spec

import (
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation"
	resourcehelper "k8s.io/component-helpers/resource"
)

// FieldValue gives a field of the pod's metadata, as downwardAPI volumes have it:
// metadata.name, .namespace, .uid, .labels, .annotations, and one label or
// annotation as metadata.labels['key'].
func FieldValue(pod *corev1.Pod, path string) (string, error) {
	if field, key, ok := subscript(path); ok {
		var of map[string]string
		name := key
		switch field {
		case "metadata.annotations":
			of, name = pod.Annotations, strings.ToLower(key)
		case "metadata.labels":
			of = pod.Labels
		default:
			return "", fmt.Errorf("fieldPath %q does not support subscript", path)
		}
		if errs := validation.IsQualifiedName(name); len(errs) != 0 {
			return "", fmt.Errorf("invalid key subscript in %s: %s", path, strings.Join(errs, ";"))
		}
		return of[key], nil
	}
	switch path {
	case "metadata.annotations":
		return formatMap(pod.Annotations), nil
	case "metadata.labels":
		return formatMap(pod.Labels), nil
	case "metadata.name":
		return pod.Name, nil
	case "metadata.namespace":
		return pod.Namespace, nil
	case "metadata.uid":
		return string(pod.UID), nil
	}
	return "", fmt.Errorf("unsupported fieldPath: %v", path)
}

// subscript takes metadata.labels['key'] apart.
func subscript(path string) (field, key string, ok bool) {
	s, ok := strings.CutSuffix(path, "']")
	if !ok {
		return "", "", false
	}
	field, key, ok = strings.Cut(s, "['")
	return field, key, ok && field != ""
}

// formatMap has a line of key="value" for each entry, in the order of the keys.
func formatMap(m map[string]string) string {
	var b strings.Builder
	for i, k := range slices.Sorted(maps.Keys(m)) {
		if i > 0 {
			b.WriteByte('\n')
		}
		fmt.Fprintf(&b, "%s=%q", k, m[k])
	}
	return b.String()
}

// envField is what a fieldRef of an environment variable gives: FieldValue and
// what else is known of a pod that runs.
func envField(ref *corev1.ObjectFieldSelector, pod *corev1.Pod, node *Node, podIPs []string) (string, error) {
	if ref.APIVersion != "v1" && ref.APIVersion != "" {
		return "", fmt.Errorf("unsupported pod version: %s", ref.APIVersion)
	}
	podIPs = node.SortIPs(podIPs)
	switch ref.FieldPath {
	case "spec.nodeName", "spec.host":
		return pod.Spec.NodeName, nil
	case "spec.serviceAccountName":
		return pod.Spec.ServiceAccountName, nil
	case "status.hostIP", "status.hostIPs":
		if len(node.HostIPs) == 0 {
			return "", fmt.Errorf("cannot resolve %s: the node has no IP address", ref.FieldPath)
		}
		if ref.FieldPath == "status.hostIP" {
			return node.HostIPs[0], nil
		}
		return strings.Join(node.HostIPs, ","), nil
	case "status.podIP":
		if len(podIPs) == 0 {
			return "", nil
		}
		return podIPs[0], nil
	case "status.podIPs":
		return strings.Join(podIPs, ","), nil
	case "spec.restartPolicy", "spec.schedulerName", "status.phase":
		return "", fmt.Errorf("unsupported fieldPath: %v", ref.FieldPath)
	}
	if field, _, ok := subscript(ref.FieldPath); ok && field != "metadata.annotations" && field != "metadata.labels" {
		return "", fmt.Errorf("field label does not support subscript: %s", ref.FieldPath)
	}
	v, err := FieldValue(pod, ref.FieldPath)
	if err != nil && !strings.HasSuffix(ref.FieldPath, "']") {
		return "", fmt.Errorf("field label not supported: %s", ref.FieldPath)
	}
	return v, err
}

// SortIPs gives at most one address of each family, that of the node's primary
// address first: the order in which a pod's addresses are shown.
func (n *Node) SortIPs(ips []string) []string {
	var v4, v6 string
	for _, s := range ips {
		ip, err := netip.ParseAddr(s)
		switch {
		case err != nil:
		case ip.Unmap().Is4():
			if v4 == "" {
				v4 = ip.Unmap().String()
			}
		case v6 == "":
			v6 = ip.String()
		}
	}
	out := []string{v4, v6}
	if primary, err := netip.ParseAddr(n.hostIP()); err == nil && !primary.Unmap().Is4() {
		slices.Reverse(out)
	}
	return slices.DeleteFunc(out, func(s string) bool { return s == "" })
}

// ResourceValue gives what a resourceFieldRef refers to, in units of its divisor,
// rounded up. Limits of CPU, memory and ephemeral storage that the container does
// not have are the pod's and else what allocatable says. The reference is to
// container, unless it names one of the pod's.
func ResourceValue(ref *corev1.ResourceFieldSelector, pod *corev1.Pod, container *corev1.Container, allocatable corev1.ResourceList) (string, error) {
	if ref.ContainerName != "" {
		container = nil
		for c := range containers(pod, initContainers|mainContainers) {
			if c.Name == ref.ContainerName {
				container = c
			}
		}
		if container == nil {
			return "", fmt.Errorf("container %s not found", ref.ContainerName)
		}
	}
	if container == nil {
		return "", fmt.Errorf("resourceFieldRef %s names no container", ref.Resource)
	}
	kind, name, _ := strings.Cut(ref.Resource, ".")
	var of corev1.ResourceList
	switch kind {
	case "limits":
		of = container.Resources.Limits
	case "requests":
		of = container.Resources.Requests
	}
	resourceName := corev1.ResourceName(name)
	q := of[resourceName]
	common := false
	switch resourceName {
	case corev1.ResourceCPU, corev1.ResourceMemory, corev1.ResourceEphemeralStorage:
		common = true
	}
	if of == nil && kind != "limits" && kind != "requests" || !common && !strings.HasPrefix(name, corev1.ResourceHugePagesPrefix) {
		return "", fmt.Errorf("unsupported container resource : %v", ref.Resource)
	}
	if kind == "limits" && common && q.IsZero() {
		q = allocatable[resourceName]
		if pod.Spec.Resources != nil && resourcehelper.IsPodLevelLimitsSet(pod) && resourcehelper.IsSupportedPodLevelResource(resourceName) {
			if l := pod.Spec.Resources.Limits[resourceName]; !l.IsZero() {
				q = l
			}
		}
	}
	divisor := ref.Divisor
	if divisor.IsZero() {
		divisor = resource.MustParse("1")
	}
	if resourceName == corev1.ResourceCPU {
		return ceil(q.MilliValue(), divisor.MilliValue()), nil
	}
	return ceil(q.Value(), divisor.Value()), nil
}

func ceil(value, divisor int64) string {
	return strconv.FormatInt(int64(math.Ceil(float64(value)/float64(divisor))), 10)
}

package volume

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	"k8s.io/apimachinery/pkg/util/validation"
)

// downwardAPI adds what the pod asks to know of itself.
func (c *collector) downwardAPI(items []corev1.DownwardAPIVolumeFile) error {
	var errs []error
	for _, i := range items {
		var text string
		var err error
		switch {
		case i.FieldRef != nil:
			text, err = podField(c.pod, i.FieldRef.FieldPath)
		case i.ResourceFieldRef != nil:
			text, err = c.v.resourceField(c.pod, i.ResourceFieldRef)
		}
		if err == nil {
			err = c.put(i.Path, []byte(text), i.Mode, i.User)
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	return utilerrors.NewAggregate(errs)
}

// podField is the field of the pod as a text, in the stock kubelet's form.
func podField(pod *corev1.Pod, field string) (string, error) {
	if name, key, ok := strings.Cut(field, "['"); ok && strings.HasSuffix(key, "']") {
		key = strings.TrimSuffix(key, "']")
		values, subject := pod.Labels, key
		switch name {
		case "metadata.annotations":
			values, subject = pod.Annotations, strings.ToLower(key)
		case "metadata.labels":
		default:
			return "", fmt.Errorf("fieldPath %q does not support subscript", field)
		}
		if errs := validation.IsQualifiedName(subject); len(errs) > 0 {
			return "", fmt.Errorf("invalid key subscript in %s: %s", field, strings.Join(errs, ";"))
		}
		return values[key], nil
	}
	switch field {
	case "metadata.annotations":
		return lines(pod.Annotations), nil
	case "metadata.labels":
		return lines(pod.Labels), nil
	case "metadata.name":
		return pod.Name, nil
	case "metadata.namespace":
		return pod.Namespace, nil
	case "metadata.uid":
		return string(pod.UID), nil
	}
	return "", fmt.Errorf("unsupported fieldPath: %v", field)
}

// lines writes key="value" on a line each, in order.
func lines(m map[string]string) string {
	var b strings.Builder
	for i, k := range slices.Sorted(maps.Keys(m)) {
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(k + "=" + strconv.Quote(m[k]))
	}
	return b.String()
}

// resourceField is a container's request or limit in units of the divisor, rounded
// up. A limit that the container does not have is what the node can give.
func (v *Volumes) resourceField(pod *corev1.Pod, ref *corev1.ResourceFieldSelector) (string, error) {
	var c *corev1.Container
	for _, list := range [][]corev1.Container{pod.Spec.Containers, pod.Spec.InitContainers} {
		for i := range list {
			if c == nil && list[i].Name == ref.ContainerName {
				c = &list[i]
			}
		}
	}
	if c == nil {
		return "", fmt.Errorf("container %s not found", ref.ContainerName)
	}
	which, name, _ := strings.Cut(ref.Resource, ".")
	res := corev1.ResourceName(name)
	var q resource.Quantity
	native := false
	switch res {
	case corev1.ResourceCPU, corev1.ResourceMemory, corev1.ResourceEphemeralStorage:
		native = true
	default:
		if !strings.HasPrefix(name, corev1.ResourceHugePagesPrefix) {
			which = ""
		}
	}
	switch which {
	case "limits":
		q = c.Resources.Limits[res]
		if native && q.IsZero() && v.Allocatable != nil {
			q = v.Allocatable()[res]
		}
	case "requests":
		q = c.Resources.Requests[res]
	default:
		return "", fmt.Errorf("unsupported container resource : %v", ref.Resource)
	}
	divisor := ref.Divisor
	if divisor.IsZero() {
		divisor = resource.MustParse("1")
	}
	value, unit := q.Value(), divisor.Value()
	if res == corev1.ResourceCPU {
		value, unit = q.MilliValue(), divisor.MilliValue()
	}
	return strconv.FormatInt(int64(math.Ceil(float64(value)/float64(unit))), 10), nil
}

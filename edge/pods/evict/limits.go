package evict

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	resourcehelper "k8s.io/component-helpers/resource"
)

// The names of the limits in metrics, as the kubelet's.
const (
	emptyDirLimit  = "emptydirfs.limit"
	podLimit       = "ephemeralpodfs.limit"
	containerLimit = "ephemeralcontainerfs.limit"
)

// limited tells whether the pod has a limit of local storage.
func limited(p *corev1.Pod) bool {
	for i := range p.Spec.Volumes {
		if e := p.Spec.Volumes[i].EmptyDir; e != nil && e.SizeLimit != nil && e.SizeLimit.Sign() > 0 {
			return true
		}
	}
	for _, cs := range [][]corev1.Container{p.Spec.InitContainers, p.Spec.Containers} {
		for i := range cs {
			if _, ok := cs[i].Resources.Limits[corev1.ResourceEphemeralStorage]; ok {
				return true
			}
		}
	}
	if r := p.Spec.Resources; r != nil {
		_, ok := r.Limits[corev1.ResourceEphemeralStorage]
		return ok
	}
	return false
}

// limits evicts the pods that exceed limits of local storage, and tells whether
// there was one.
func (m *Manager) limits(ctx context.Context, pods []*corev1.Pod, dedicated bool) (gone bool) {
	var ps []*corev1.Pod
	for _, p := range pods {
		if limited(p) {
			ps = append(ps, p)
		}
	}
	if len(ps) == 0 {
		return false
	}
	us := m.cfg.Usage(ctx, ps, Disk)
	for _, p := range ps {
		u, ok := us[p.UID]
		if !ok {
			continue
		}
		if kind, message := exceeded(p, u, dedicated); kind != "" {
			gone = m.evict(ctx, kind, Eviction{Pod: p, Message: message, Grace: hardGrace}) || gone
		}
	}
	return gone
}

// exceeded says which limit the pod exceeds, if any.
func exceeded(p *corev1.Pod, u PodUsage, dedicated bool) (limit, message string) {
	for i := range p.Spec.Volumes {
		v := &p.Spec.Volumes[i]
		if v.EmptyDir == nil || v.EmptyDir.SizeLimit == nil || v.EmptyDir.SizeLimit.Sign() <= 0 {
			continue
		}
		if v.EmptyDir.SizeLimit.CmpInt64(u.Volumes[v.Name].Bytes) < 0 {
			return emptyDirLimit, fmt.Sprintf("Usage of EmptyDir volume %q exceeds the limit %q. ", v.Name, v.EmptyDir.SizeLimit.String())
		}
	}
	if l, ok := resourcehelper.PodLimits(p, resourcehelper.PodResourcesOptions{})[corev1.ResourceEphemeralStorage]; ok {
		if t := u.total(p); t.Cmp(l) > 0 {
			return podLimit, fmt.Sprintf("Pod ephemeral local storage usage exceeds the total limit of containers %s. ", l.String())
		}
	}
	for _, cs := range [][]corev1.Container{p.Spec.Containers, p.Spec.InitContainers} {
		for i := range cs {
			c, running := u.Containers[cs[i].Name]
			l, ok := cs[i].Resources.Limits[corev1.ResourceEphemeralStorage]
			if !running || !ok || l.IsZero() {
				continue
			}
			used := c.Logs.Bytes
			if !dedicated {
				used += c.Root.Bytes
			}
			if resource.NewQuantity(used, resource.BinarySI).Cmp(l) > 0 {
				return containerLimit, fmt.Sprintf("Container %s exceeded its local ephemeral storage limit %q. ", cs[i].Name, l.String())
			}
		}
	}
	return "", ""
}

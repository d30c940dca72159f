package evict

import (
	"cmp"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/types"
	resourcehelper "k8s.io/component-helpers/resource"
)

// Files is the use of a file system.
type Files struct {
	Bytes, Inodes int64
}

func (f Files) plus(g Files) Files { return Files{f.Bytes + g.Bytes, f.Inodes + g.Inodes} }

// ContainerUsage is what one container uses.
type ContainerUsage struct {
	Memory int64 // working set in bytes
	Root   Files // the writable layer
	Logs   Files
}

// PodUsage is what one pod uses. Only what was asked for is filled in.
type PodUsage struct {
	Memory int64 // working set in bytes
	PIDs   int64 // processes and threads
	// Containers are those that run, by name.
	Containers map[string]ContainerUsage
	// Volumes are the volumes on the node itself, by name.
	Volumes map[string]Files
	// Other is what else the pod has on the node's disk, such as its hosts file.
	Other Files
}

// What of a pod's use is to be measured.
type What int

// The parts of PodUsage: memory with that of the containers; PIDs; and files, for
// which folders are walked.
const (
	Memory What = 1 << iota
	PIDs
	Disk
)

// what a disk signal counts.
const (
	roots = 1 << iota
	logs
	volumes
)

type usages map[types.UID]PodUsage

// order compares pods; the one to go first is the least.
type order func(a, b *corev1.Pod) int

// rank sorts pods in the order in which they go for the signal.
func rank(pods []*corev1.Pod, s Signal, u usages, dedicatedImageFS bool) {
	var by []order
	switch s.resource() {
	case corev1.ResourceMemory:
		use := func(p *corev1.Pod) int64 { return u[p.UID].Memory }
		by = []order{u.exceeding(use, corev1.ResourceMemory), priority, u.above(use, corev1.ResourceMemory)}
	case pids:
		by = []order{priority, u.above(func(p *corev1.Pod) int64 { return u[p.UID].PIDs }, "")}
	default:
		count := roots | logs | volumes
		if dedicatedImageFS {
			count = logs | volumes
			if s == ImageFSAvailable || s == ImageFSInodes {
				count = roots
			}
		}
		use := func(p *corev1.Pod) int64 { return u[p.UID].files(p, count).Bytes }
		name := s.resource()
		if name == inodes {
			use = func(p *corev1.Pod) int64 { return u[p.UID].files(p, count).Inodes }
		}
		// Nobody requests inodes, so that whoever has one exceeds. That the bytes
		// requested are then taken off the inodes is the kubelet's way too.
		by = []order{u.exceeding(use, name), priority, u.above(use, corev1.ResourceEphemeralStorage)}
	}
	slices.SortStableFunc(pods, func(a, b *corev1.Pod) int {
		for _, o := range by {
			if c := o(a, b); c != 0 {
				return c
			}
		}
		return 0
	})
}

// exceeding puts pods first that use more than they requested, and before them
// those whose use is unknown.
func (u usages) exceeding(use func(*corev1.Pod) int64, name corev1.ResourceName) order {
	return u.known(func(a, b *corev1.Pod) int {
		return first(use(a) > request(a, name), use(b) > request(b, name))
	})
}

// above puts pods first that use the most beyond their request.
func (u usages) above(use func(*corev1.Pod) int64, name corev1.ResourceName) order {
	return u.known(func(a, b *corev1.Pod) int {
		return cmp.Compare(use(b)-request(b, name), use(a)-request(a, name))
	})
}

func (u usages) known(o order) order {
	return func(a, b *corev1.Pod) int {
		_, ka := u[a.UID]
		_, kb := u[b.UID]
		if !ka || !kb {
			return first(!ka, !kb)
		}
		return o(a, b)
	}
}

func priority(a, b *corev1.Pod) int {
	of := func(p *corev1.Pod) int32 {
		if p.Spec.Priority == nil {
			return 0
		}
		return *p.Spec.Priority
	}
	return cmp.Compare(of(a), of(b))
}

func first(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	default:
		return 1
	}
}

// request is what the pod requests of a resource, overhead included.
func request(p *corev1.Pod, name corev1.ResourceName) int64 {
	if name != corev1.ResourceMemory && name != corev1.ResourceEphemeralStorage {
		return 0
	}
	rs := resourcehelper.PodRequests(p, resourcehelper.PodResourcesOptions{
		SkipContainerLevelResources: resourcehelper.IsPodLevelResourcesSet(p), ExcludeOverhead: true,
	})
	q := rs[name]
	if o, ok := p.Spec.Overhead[name]; ok && !q.IsZero() {
		q.Add(o)
	}
	return q.Value()
}

// files sums the pod's files of the kinds to count.
func (u PodUsage) files(p *corev1.Pod, count int) (f Files) {
	for _, c := range u.Containers {
		if count&roots != 0 {
			f = f.plus(c.Root)
		}
		if count&logs != 0 {
			f = f.plus(c.Logs)
		}
	}
	if count&volumes != 0 {
		for i := range p.Spec.Volumes {
			if v := &p.Spec.Volumes[i]; v.HostPath != nil || onDisk(v) {
				f = f.plus(u.Volumes[v.Name])
			}
		}
	}
	return f
}

// onDisk tells the volumes that are the pod's own and lie on the node's disk.
func onDisk(v *corev1.Volume) bool {
	return v.ConfigMap != nil || v.EmptyDir != nil && v.EmptyDir.Medium == corev1.StorageMediumDefault
}

// total is the pod's ephemeral storage: layers, logs, own volumes and the rest.
func (u PodUsage) total(p *corev1.Pod) resource.Quantity {
	f := u.files(p, roots|logs).plus(u.Other)
	for i := range p.Spec.Volumes {
		if v := &p.Spec.Volumes[i]; onDisk(v) {
			f = f.plus(u.Volumes[v.Name])
		}
	}
	return *resource.NewQuantity(f.Bytes, resource.BinarySI)
}

// Package cgroup keeps the cgroups of pods as the stock kubelet does: kubepods,
// below it burstable and besteffort, below these one per pod, which the runtime
// puts the containers into. Guaranteed pods are directly below kubepods.
//
//	tree, err := cgroup.Open(cgroup.Config{Driver: spec.Systemd})
//	err = tree.Setup(ctx, cgroup.Limits{MilliCPU: 4000, Memory: 4 << 30})
//	err = tree.EnsurePod(ctx, pod.UID, corev1.PodQOSBurstable, spec.PodResources(pod, node))
//	sandbox.Linux.CgroupParent = tree.PodParent(pod.UID, corev1.PodQOSBurstable)
//	…
//	err = tree.RemovePod(ctx, pod.UID)
//
// Both versions of cgroups are served, hybrid hosts as version 1, and both
// drivers: cgroupfs, and systemd, which is told by D-Bus of every cgroup.
package cgroup

package spec

import (
	"path"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// Kubepods is the cgroup that holds those of all pods.
const Kubepods = "kubepods"

// CgroupParent is the cgroup of the pod, which its containers are put into:
// /kubepods/burstable/pod<uid>, or with the systemd driver
// /kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid with _>.slice.
// Guaranteed pods have no level of their own.
func CgroupParent(pod *corev1.Pod, node *Node) string {
	names := []string{Kubepods}
	switch QOS(pod) {
	case corev1.PodQOSBurstable:
		names = append(names, "burstable")
	case corev1.PodQOSBestEffort:
		names = append(names, "besteffort")
	}
	return CgroupPath(node, append(names, "pod"+string(pod.UID))...)
}

// CgroupPath is the path of a cgroup below CgroupRoot, as the cgroup file systems
// have it, whatever the driver.
func CgroupPath(node *Node, names ...string) string {
	if node.CgroupDriver != Systemd {
		return path.Join(append([]string{"/", node.CgroupRoot}, names...)...)
	}
	if root := strings.Trim(node.CgroupRoot, "/"); root != "" {
		names = append(strings.Split(root, "/"), names...)
	}
	// A slice's name has the names of all that hold it, with - between them: so
	// a - of a name itself is written _.
	out, slice := "/", ""
	for _, n := range names {
		if slice != "" {
			slice += "-"
		}
		slice += strings.ReplaceAll(n, "-", "_")
		out = path.Join(out, slice+".slice")
	}
	return out
}

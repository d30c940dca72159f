package spec

import (
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	utilsysctl "k8s.io/component-helpers/node/util/sysctl"
)

// safeSysctls belong to a namespace and touch no other pod: any pod may set them,
// from the kernel on that has them in its namespaces.
var safeSysctls = []struct {
	name         string
	major, minor int
}{
	{"kernel.shm_rmid_forced", 0, 0},
	{"net.ipv4.ip_local_port_range", 0, 0},
	{"net.ipv4.tcp_syncookies", 0, 0},
	{"net.ipv4.ping_group_range", 0, 0},
	{"net.ipv4.ip_unprivileged_port_start", 0, 0},
	{"net.ipv4.ip_local_reserved_ports", 3, 16},
	{"net.ipv4.tcp_keepalive_time", 4, 5},
	{"net.ipv4.tcp_fin_timeout", 4, 6},
	{"net.ipv4.tcp_keepalive_intvl", 4, 5},
	{"net.ipv4.tcp_keepalive_probes", 4, 5},
	{"net.ipv4.tcp_rmem", 4, 15},
	{"net.ipv4.tcp_wmem", 4, 15},
	{"net.ipv4.tcp_slow_start_after_idle", 4, 15},
	{"net.ipv4.tcp_notsent_lowat", 4, 6},
}

// admitSysctls refuses sysctls that are neither safe nor allowed on the node, and
// those of a namespace that the pod shares with the host.
func admitSysctls(pod *corev1.Pod, host *Node) *Rejection {
	if pod.Spec.SecurityContext == nil {
		return nil
	}
	for _, s := range pod.Spec.SecurityContext.Sysctls {
		name := utilsysctl.NormalizeName(s.Name)
		ns, ok := host.sysctl(name)
		why := ""
		switch {
		case !ok:
			why = "not allowlisted"
		case ns == utilsysctl.IPCNamespace && pod.Spec.HostIPC,
			ns == utilsysctl.NetNamespace && pod.Spec.HostNetwork,
			ns == utilsysctl.UserNamespace && !OwnUsers(pod):
			why = fmt.Sprintf("not allowed with host %s enabled", ns)
		default:
			continue
		}
		return &Rejection{Reason: "SysctlForbidden", Message: fmt.Sprintf("forbidden sysctl: %q %s", name, why)}
	}
	return nil
}

// sysctl gives the namespace of a sysctl that pods may set.
func (n *Node) sysctl(name string) (utilsysctl.Namespace, bool) {
	for _, s := range safeSysctls {
		if s.name == name && (s.major == 0 || n.KernelMajor > s.major || n.KernelMajor == s.major && n.KernelMinor >= s.minor) {
			ns, _, _ := utilsysctl.GetNamespace(name)
			return ns, true
		}
	}
	for _, pattern := range n.UnsafeSysctls {
		ns, allowed, prefix := utilsysctl.GetNamespace(pattern)
		if ns == utilsysctl.UnknownNamespace {
			continue // not in a namespace: it would change the host
		}
		if allowed == name || prefix && strings.HasPrefix(name, allowed) {
			return ns, true
		}
	}
	return utilsysctl.UnknownNamespace, false
}

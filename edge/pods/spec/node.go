package spec

import (
	corev1 "k8s.io/api/core/v1"
)

// Names of the cgroup drivers, as the runtime and the kubelet write them.
const (
	CgroupFS = "cgroupfs"
	Systemd  = "systemd"
)

// Node is what pod specifications are turned into CRI requests with: facts about
// the host and its runtime, and the settings of the pod engine. It is read only,
// so one value may serve every goroutine; a changed fact is a new value.
type Node struct {
	// Name is the node's name in Kubernetes.
	Name string
	// HostIPs are the node's addresses, the primary one first; at most one of each
	// family. Empty where the host has no address (yet).
	HostIPs []string

	// Resolv is the host's resolv.conf, see ParseResolvConf. Nil stands for "there
	// is none": pods with the host's DNS then ask the node's own loopback.
	Resolv *Resolv
	// ClusterDNS are the addresses of the cluster's name servers; empty makes
	// ClusterFirst fall back to Default, as under the stock kubelet.
	ClusterDNS []string
	// ClusterDomain is the DNS domain of the cluster, such as cluster.local.
	ClusterDomain string
	// CgroupVersion is 1 or 2. A hybrid host is 1.
	CgroupVersion int
	// CgroupDriver is CgroupFS or Systemd: the one the runtime has. Empty is CgroupFS.
	CgroupDriver string
	// CgroupRoot is the cgroup below which kubepods is, in the form of cgroupfs: "/"
	// or "/fairlead". Empty is "/".
	CgroupRoot string
	// NoOOMScore leaves oom_score_adj of containers at 0: for runtimes that lack
	// CAP_SYS_RESOURCE and do not restrict the score to what they may set.
	NoOOMScore bool
	// PodPIDLimit bounds the processes of one pod; <= 0 is no bound.
	PodPIDLimit int64

	// CPUs is the number of the host's logical CPUs.
	CPUs int
	// Memory is the host's memory in bytes.
	Memory int64
	// Swap says that the memory controller accounts swap, so that containers
	// can be kept from it.
	Swap bool
	// HugePageSizes are the sizes of huge pages in bytes that the kernel offers.
	HugePageSizes []int64
	// Allocatable is what pods may have: the default of resourceFieldRef and the
	// base of admission.
	Allocatable corev1.ResourceList

	// LogRoot holds the log folders of the pods, such as /var/log/pods.
	LogRoot string
	// DataRoot holds the folders of the pods, <DataRoot>/<uid>.
	DataRoot string
	// SeccompRoot holds the profiles that seccompProfile type Localhost names.
	SeccompRoot string
	// SeccompDefault gives containers that name no profile RuntimeDefault, not Unconfined.
	SeccompDefault bool
	// AppArmor says that the kernel confines with AppArmor.
	AppArmor bool
	// UnsafeSysctls are sysctls, or prefixes that end in *, that pods may set
	// besides the safe ones.
	UnsafeSysctls []string
	// KernelMajor and KernelMinor are the kernel's version: some sysctls are safe
	// only from a version on. 0.0 stands for unknown, where those are not safe.
	KernelMajor, KernelMinor int

	// MaskedPaths are masked in containers besides the usual ones. The stock kubelet
	// has /sys/devices/system/cpu/cpu<n>/thermal_throttle here, where they exist.
	MaskedPaths []string

	// Devices are the declared devices by the name of their extended resource, such
	// as fairlead.dev/meter. A container that asks for the resource gets every device
	// node of it; how many containers may have it at a time says the resource's
	// quantity in the node's allocatable (usually 1).
	Devices map[corev1.ResourceName][]Device

	// Runtime is what the container runtime can do.
	Runtime Runtime
}

// Device is one device node of a declared device.
type Device struct {
	// Path is what was declared and what containers see, such as
	// /dev/serial/by-id/usb-FTDI_A50285BI-if00-port0.
	Path string
	// HostPath is the device node that Path leads to, such as /dev/ttyUSB0: Path with
	// its symlinks resolved. Empty where the device is not plugged in now.
	HostPath string
	// Permissions are the cgroup's: letters of "rwm". Empty is "rw".
	Permissions string
}

// Runtime is what the container runtime said of itself, by CRI Version and Status.
type Runtime struct {
	// Name and Version are those of CRI Version, such as containerd and 1.6.20.
	Name, Version string
	// Handlers are the runtime handlers by name; "" is the default one. Nil where
	// the runtime does not list them: any handler is then tried.
	Handlers map[string]Handler
	// Classes gives the handlers of the RuntimeClasses by name. A class that is not
	// here is tried as a handler of that name.
	Classes map[string]string
	// SupplementalGroupsPolicy says that the policy Strict is kept.
	SupplementalGroupsPolicy bool
	// ImageVolumes says that the runtime mounts images.
	ImageVolumes bool
}

// Handler is what one runtime handler can do.
type Handler struct {
	RecursiveReadOnly bool
	UserNamespaces    bool
}

// Service is one that a pod gets environment variables of.
type Service struct {
	Name      string
	ClusterIP string
	Ports     []ServicePort
}

// ServicePort is one port of a Service. An empty Protocol is TCP.
type ServicePort struct {
	Name     string
	Port     int32
	Protocol corev1.Protocol
}

func (n *Node) hostIP() string {
	if len(n.HostIPs) == 0 {
		return ""
	}
	return n.HostIPs[0]
}

// handler is what the pod's runtime handler can do.
func (n *Node) handler(pod *corev1.Pod) Handler {
	return n.Runtime.Handlers[n.RuntimeHandler(pod)]
}

// RuntimeHandler is the runtime handler of the pod's RuntimeClass, "" the default one.
func (n *Node) RuntimeHandler(pod *corev1.Pod) string {
	name := pod.Spec.RuntimeClassName
	if name == nil || *name == "" {
		return ""
	}
	if h, ok := n.Runtime.Classes[*name]; ok {
		return h
	}
	return *name
}

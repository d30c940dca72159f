package spec

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

func admitNode() (*corev1.Node, *Node) {
	allocatable := corev1.ResourceList{
		"cpu": resource.MustParse("2"), "memory": resource.MustParse("1Gi"), "ephemeral-storage": resource.MustParse("10Gi"), "pods": resource.MustParse("4"),
		"hugepages-2Mi": resource.MustParse("8Mi"), "example.com/meter": resource.MustParse("1"), "fairlead.dev/meter": resource.MustParse("1"),
	}
	node := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: "edge-1", Labels: map[string]string{"kubernetes.io/os": "linux", "zone": "a"}},
		Status:     corev1.NodeStatus{Allocatable: allocatable},
	}
	host := &Node{Name: "edge-1", Allocatable: allocatable, KernelMajor: 6, KernelMinor: 1, UnsafeSysctls: []string{"net.core.*", "kernel.msgmax", "user.*"}}
	return node, host
}

// Every case of testdata/admit.yaml is decided as by the stock kubelet 1.37.2, whose
// handlers' answers are in the .json file, with the pods' defaults.
func TestAdmitLikeStock(t *testing.T) {
	var cases []struct {
		Name            string
		Taints          []corev1.Taint
		Pod             *corev1.Pod
		Others          []*corev1.Pod
		Admit           bool
		Reason, Message string
		Victims         []string
	}
	readJSON(t, "testdata/admit.json", &cases)
	for _, c := range cases {
		t.Run(c.Name, func(t *testing.T) {
			node, host := admitNode()
			node.Spec.Taints = c.Taints
			// The pod itself, already among the active ones, does not count twice.
			r := Admit(c.Pod, append(c.Others, c.Pod), node, host)
			var victims []string
			if r != nil && r.Insufficient != nil {
				var pods []*corev1.Pod
				pods, r = Preempt(c.Pod, c.Others, r.Insufficient)
				for _, p := range pods {
					victims = append(victims, p.Name)
				}
			}
			if r == nil {
				r = &Rejection{}
			}
			if (r.Reason == "") != c.Admit || r.Reason != c.Reason || r.Message != c.Message {
				t.Errorf("\ngot  %s: %s\nwant %s: %s", r.Reason, r.Message, c.Reason, c.Message)
			}
			if d := cmp.Diff(c.Victims, victims); d != "" {
				t.Errorf("victims (-stock +ours):\n%s", d)
			}
		})
	}
}

// pod gives a pod of one container.
func pod(name string, change ...func(*corev1.Pod, *corev1.Container)) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default", UID: types.UID("uid-" + name)},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "a", Image: "fairlead.test/a"}}},
	}
	for _, f := range change {
		f(p, &p.Spec.Containers[0])
	}
	return p
}

func meters(n string) func(*corev1.Pod, *corev1.Container) {
	return func(_ *corev1.Pod, c *corev1.Container) {
		list := corev1.ResourceList{"fairlead.dev/meter": resource.MustParse(n)}
		c.Resources = corev1.ResourceRequirements{Requests: list, Limits: list}
	}
}

// Declared devices are refused as the stock kubelet's device manager does.
func TestAdmitDevices(t *testing.T) {
	plugged := []Device{{Path: "/dev/serial/by-id/m", HostPath: "/dev/ttyUSB0"}}
	for _, c := range []struct {
		name    string
		devices []Device
		want    string // of the resource
		others  []*corev1.Pod
		message string
	}{
		{"plugged in", plugged, "1", nil, ""},
		{"not plugged in", []Device{{Path: "/dev/serial/by-id/m"}}, "1", nil,
			"Allocate failed due to no healthy devices present; cannot allocate unhealthy devices fairlead.dev/meter, which is unexpected"},
		{"one of its nodes is not there", append([]Device{{Path: "/dev/x"}}, plugged...), "1", nil,
			"Allocate failed due to no healthy devices present; cannot allocate unhealthy devices fairlead.dev/meter, which is unexpected"},
		{"taken", plugged, "1", []*corev1.Pod{pod("other", meters("1"))},
			"Allocate failed due to requested number of devices unavailable for fairlead.dev/meter. Requested: 1, Available: 0, which is unexpected"},
		{"more than there are", plugged, "2", nil,
			"Allocate failed due to requested number of devices unavailable for fairlead.dev/meter. Requested: 2, Available: 1, which is unexpected"},
		{"none wanted", []Device{{Path: "/dev/x"}}, "0", nil, ""},
		{"not declared", nil, "1", nil, "Allocate failed due to cannot allocate unregistered device fairlead.dev/meter, which is unexpected"},
	} {
		t.Run(c.name, func(t *testing.T) {
			node, host := admitNode()
			if c.devices != nil {
				host.Devices = map[corev1.ResourceName][]Device{"fairlead.dev/meter": c.devices}
			}
			r := Admit(pod("p", meters(c.want)), c.others, node, host)
			if r == nil {
				r = &Rejection{}
			}
			if r.Message != c.message || (r.Reason == "UnexpectedAdmissionError") != (c.message != "") {
				t.Errorf("\ngot  %s: %s\nwant %s", r.Reason, r.Message, c.message)
			}
		})
	}
}

// What this agent or its host can do is not refused, what it cannot do is.
func TestAdmitFeatures(t *testing.T) {
	claims := func(p *corev1.Pod, _ *corev1.Container) {
		p.Spec.ResourceClaims = []corev1.PodResourceClaim{{Name: "c"}}
	}
	options := func(_ *corev1.Pod, c *corev1.Container) {
		c.VolumeMounts = []corev1.VolumeMount{{Name: "v", BindMountOptions: []string{"noexec"}}}
	}
	strict := func(p *corev1.Pod, _ *corev1.Container) {
		p.Spec.SecurityContext = &corev1.PodSecurityContext{SupplementalGroupsPolicy: new(corev1.SupplementalGroupsPolicyStrict)}
	}
	armored := func(profile string) func(*corev1.Pod, *corev1.Container) {
		return func(_ *corev1.Pod, c *corev1.Container) {
			c.SecurityContext = &corev1.SecurityContext{AppArmorProfile: &corev1.AppArmorProfile{Type: corev1.AppArmorProfileTypeLocalhost, LocalhostProfile: &profile}}
		}
	}
	rmem := func(p *corev1.Pod, _ *corev1.Container) {
		p.Spec.SecurityContext = &corev1.PodSecurityContext{Sysctls: []corev1.Sysctl{{Name: "net.ipv4.tcp_rmem", Value: "1"}}}
	}
	for _, c := range []struct {
		name string
		pod  *corev1.Pod
		host func(*Node)
		want string
	}{
		{"resource claims", pod("p", claims), nil, "PodFeatureUnsupported: Pod requires node features that are not available: DynamicResourceAllocation"},
		{"bind mount options", pod("p", options, claims), nil,
			"PodFeatureUnsupported: Pod requires node features that are not available: DynamicResourceAllocation, VolumeBindMountOptions"},
		{"strict groups", pod("p", strict), func(n *Node) { n.Runtime.SupplementalGroupsPolicy = true }, ""},
		{"apparmor", pod("p", armored("tight")), func(n *Node) { n.AppArmor = true }, ""},
		{"apparmor without a name", pod("p", armored(" ")), func(n *Node) { n.AppArmor = true },
			"AppArmor: Cannot enforce AppArmor: invalid empty AppArmor profile name of container a"},
		{"sysctl of a newer kernel", pod("p", rmem), func(n *Node) { n.KernelMajor, n.KernelMinor = 4, 14 },
			`SysctlForbidden: forbidden sysctl: "net.ipv4.tcp_rmem" not allowlisted`},
		{"sysctl of this kernel", pod("p", rmem), func(n *Node) { n.KernelMajor, n.KernelMinor = 4, 15 }, ""},
		{"an allowed sysctl that is not namespaced", pod("p", func(p *corev1.Pod, _ *corev1.Container) {
			p.Spec.SecurityContext = &corev1.PodSecurityContext{Sysctls: []corev1.Sysctl{{Name: "vm.swappiness", Value: "1"}}}
		}), func(n *Node) { n.UnsafeSysctls = []string{"vm.*"} }, `SysctlForbidden: forbidden sysctl: "vm.swappiness" not allowlisted`},
	} {
		t.Run(c.name, func(t *testing.T) {
			node, host := admitNode()
			if c.host != nil {
				c.host(host)
			}
			got := ""
			if r := Admit(c.pod, nil, node, host); r != nil {
				got = r.Reason + ": " + r.Message
			}
			if got != c.want {
				t.Errorf("\ngot  %s\nwant %s", got, c.want)
			}
		})
	}
}

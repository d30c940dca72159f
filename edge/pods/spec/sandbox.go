package spec

import (
	"maps"
	"path/filepath"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	utilsysctl "k8s.io/component-helpers/node/util/sysctl"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Labels of sandboxes and containers: whose they are. They are the kubelet's, so
// that tools such as crictl know them.
const (
	LabelPodName       = "io.kubernetes.pod.name"
	LabelPodNamespace  = "io.kubernetes.pod.namespace"
	LabelPodUID        = "io.kubernetes.pod.uid"
	LabelContainerName = "io.kubernetes.container.name"
)

// Sandbox makes the configuration of the pod's sandbox; attempt counts the pod's
// sandboxes from 0. It is run with node.RuntimeHandler(pod).
//
// Where the pod has OwnUsers, the caller gives it ids: with those of the sandbox
// that there is, else with UserNamespace, it sets
// Linux.SecurityContext.NamespaceOptions.UsernsOptions.
func Sandbox(pod *corev1.Pod, node *Node, attempt uint32) (*runtimeapi.PodSandboxConfig, error) {
	if err := userNamespaces(pod, node); err != nil {
		return nil, err
	}
	dns, _ := DNS(pod, node)
	cfg := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: pod.Name, Namespace: pod.Namespace, Uid: string(pod.UID), Attempt: attempt},
		Labels:       podLabels(pod, maps.Clone(pod.Labels)),
		Annotations:  maps.Clone(pod.Annotations),
		DnsConfig:    dns,
		LogDirectory: LogDirectory(pod, node),
	}
	var err error
	if !pod.Spec.HostNetwork {
		if cfg.Hostname, err = kernelHostname(pod, node); err != nil {
			return nil, err
		}
	}
	for i := range pod.Spec.Containers {
		cfg.PortMappings = append(cfg.PortMappings, portMappings(&pod.Spec.Containers[i])...)
	}
	privileged := false
	for c := range containers(pod, allContainers) {
		privileged = privileged || c.SecurityContext != nil && isTrue(c.SecurityContext.Privileged)
	}
	security := &runtimeapi.LinuxSandboxSecurityContext{
		Privileged:       privileged,
		NamespaceOptions: namespaces(pod),
		// The sandbox's own process needs no more, whatever its containers have.
		Seccomp: &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault},
	}
	cfg.Linux = &runtimeapi.LinuxPodSandboxConfig{
		CgroupParent:    CgroupParent(pod, node),
		SecurityContext: security,
		Sysctls:         map[string]string{},
	}
	if sc := pod.Spec.SecurityContext; sc != nil {
		for _, s := range sc.Sysctls {
			cfg.Linux.Sysctls[utilsysctl.NormalizeName(s.Name)] = s.Value
		}
		if sc.RunAsUser != nil {
			security.RunAsUser = &runtimeapi.Int64Value{Value: *sc.RunAsUser}
		}
		if sc.RunAsGroup != nil {
			security.RunAsGroup = &runtimeapi.Int64Value{Value: *sc.RunAsGroup}
		}
		security.SelinuxOptions = selinux(sc.SELinuxOptions)
	}
	if security.SupplementalGroups, security.SupplementalGroupsPolicy, err = groups(pod); err != nil {
		return nil, err
	}
	cfg.Linux.Resources, cfg.Linux.Overhead = sandboxResources(pod, node)
	return cfg, nil
}

// podLabels adds the labels of the pod's identity to labels.
func podLabels(pod *corev1.Pod, labels map[string]string) map[string]string {
	if labels == nil {
		labels = map[string]string{}
	}
	labels[LabelPodName], labels[LabelPodNamespace], labels[LabelPodUID] = pod.Name, pod.Namespace, string(pod.UID)
	return labels
}

// LogDirectory holds the folders of the containers' logs.
func LogDirectory(pod *corev1.Pod, node *Node) string {
	return filepath.Join(node.LogRoot, pod.Namespace+"_"+pod.Name+"_"+string(pod.UID))
}

// LogPath is the log of a container below its pod's LogDirectory; attempt is its
// restart count.
func LogPath(container string, attempt uint32) string {
	return filepath.Join(container, strconv.FormatUint(uint64(attempt), 10)+".log")
}

// portMappings are the container's ports, each name, or port without one, once.
func portMappings(c *corev1.Container) []*runtimeapi.PortMapping {
	var out []*runtimeapi.PortMapping
	seen := map[any]bool{}
	for _, p := range c.Ports {
		var key any = p
		if p.Name != "" {
			key = p.Name
		}
		if seen[key] {
			continue
		}
		seen[key] = true
		m := &runtimeapi.PortMapping{ContainerPort: p.ContainerPort, HostPort: p.HostPort, HostIp: p.HostIP}
		switch p.Protocol {
		case corev1.ProtocolUDP:
			m.Protocol = runtimeapi.Protocol_UDP
		case corev1.ProtocolSCTP:
			m.Protocol = runtimeapi.Protocol_SCTP
		}
		out = append(out, m)
	}
	return out
}

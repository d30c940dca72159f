package spec

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Paths that containers do not see, or cannot write to, unless procMount is
// Unmasked.
var (
	maskedPaths = []string{
		"/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
		"/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
	}
	readonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

// effective is the container's security context with what it leaves open taken
// from the pod's.
func effective(pod *corev1.Pod, c *corev1.Container) corev1.SecurityContext {
	var sc corev1.SecurityContext
	if c.SecurityContext != nil {
		sc = *c.SecurityContext
	}
	if p := pod.Spec.SecurityContext; p != nil {
		if sc.SELinuxOptions == nil {
			sc.SELinuxOptions = p.SELinuxOptions
		}
		if sc.RunAsUser == nil {
			sc.RunAsUser = p.RunAsUser
		}
		if sc.RunAsGroup == nil {
			sc.RunAsGroup = p.RunAsGroup
		}
		if sc.RunAsNonRoot == nil {
			sc.RunAsNonRoot = p.RunAsNonRoot
		}
	}
	return sc
}

// Security is the container's security context for the runtime. image says as
// whom its image runs; nil is root.
func Security(pod *corev1.Pod, c *corev1.Container, node *Node, image *runtimeapi.Image) (*runtimeapi.LinuxContainerSecurityContext, error) {
	sc := effective(pod, c)
	uid, username := imageUser(image)
	if err := nonRoot(pod, c, &sc, uid, username); err != nil {
		return nil, err
	}
	out := &runtimeapi.LinuxContainerSecurityContext{
		Privileged:       isTrue(sc.Privileged),
		ReadonlyRootfs:   isTrue(sc.ReadOnlyRootFilesystem),
		SelinuxOptions:   selinux(sc.SELinuxOptions),
		NamespaceOptions: namespaces(pod),
		NoNewPrivs:       sc.AllowPrivilegeEscalation != nil && !*sc.AllowPrivilegeEscalation,
	}
	if caps := sc.Capabilities; caps != nil {
		out.Capabilities = &runtimeapi.Capability{}
		for _, name := range caps.Add {
			out.Capabilities.AddCapabilities = append(out.Capabilities.AddCapabilities, string(name))
		}
		for _, name := range caps.Drop {
			out.Capabilities.DropCapabilities = append(out.Capabilities.DropCapabilities, string(name))
		}
	}
	if sc.RunAsUser != nil {
		out.RunAsUser = &runtimeapi.Int64Value{Value: *sc.RunAsUser}
	} else {
		if uid != nil {
			out.RunAsUser = &runtimeapi.Int64Value{Value: *uid}
		}
		out.RunAsUsername = username
	}
	if sc.RunAsGroup != nil {
		out.RunAsGroup = &runtimeapi.Int64Value{Value: *sc.RunAsGroup}
	}
	var err error
	if out.SupplementalGroups, out.SupplementalGroupsPolicy, err = groups(pod); err != nil {
		return nil, err
	}
	profile := sc.SeccompProfile
	if profile == nil && pod.Spec.SecurityContext != nil {
		profile = pod.Spec.SecurityContext.SeccompProfile
	}
	if out.Seccomp, err = seccomp(profile, node); err != nil {
		return nil, err
	}
	if out.Apparmor, out.ApparmorProfile, err = appArmor(pod, c); err != nil { //nolint:staticcheck // older runtimes read only this field
		return nil, err
	}
	if sc.ProcMount == nil || *sc.ProcMount != corev1.UnmaskedProcMount {
		out.MaskedPaths = slices.Concat(maskedPaths, node.MaskedPaths)
		out.ReadonlyPaths = slices.Clone(readonlyPaths)
	}
	return out, nil
}

// imageUser gives the user of an image, by number or by name.
func imageUser(image *runtimeapi.Image) (*int64, string) {
	switch {
	case image.GetUid() != nil:
		return new(image.GetUid().GetValue()), ""
	case image.GetUsername() != "":
		return nil, image.GetUsername()
	}
	return new(int64(0)), ""
}

// nonRoot enforces runAsNonRoot.
func nonRoot(pod *corev1.Pod, c *corev1.Container, sc *corev1.SecurityContext, uid *int64, username string) error {
	if !isTrue(sc.RunAsNonRoot) {
		return nil
	}
	where := fmt.Sprintf("(pod: %q, container: %s)", describe(pod), c.Name)
	switch {
	case sc.RunAsUser != nil:
		if *sc.RunAsUser == 0 {
			return fmt.Errorf("container's runAsUser breaks non-root policy %s", where)
		}
	case uid == nil:
		return fmt.Errorf("container has runAsNonRoot and image has non-numeric user (%s), cannot verify user is non-root %s", username, where)
	case *uid == 0:
		return fmt.Errorf("container has runAsNonRoot and image will run as root %s", where)
	default:
		if msgs := validation.IsValidUserID(*uid); len(msgs) > 0 {
			return fmt.Errorf("container has runAsNonRoot and image has an invalid user id (%d). (Must be 1-(2147483647)): %s %s",
				*uid, strings.Join(msgs, "; "), where)
		}
	}
	return nil
}

func selinux(o *corev1.SELinuxOptions) *runtimeapi.SELinuxOption {
	if o == nil {
		return nil
	}
	return &runtimeapi.SELinuxOption{User: o.User, Role: o.Role, Type: o.Type, Level: o.Level}
}

// groups are the pod's fsGroup and supplementalGroups.
func groups(pod *corev1.Pod) ([]int64, runtimeapi.SupplementalGroupsPolicy, error) {
	sc := pod.Spec.SecurityContext
	if sc == nil {
		return nil, 0, nil
	}
	var gids []int64
	if sc.FSGroup != nil {
		gids = append(gids, *sc.FSGroup)
	}
	gids = append(gids, sc.SupplementalGroups...)
	if sc.SupplementalGroupsPolicy == nil {
		return gids, 0, nil
	}
	policy, ok := runtimeapi.SupplementalGroupsPolicy_value[string(*sc.SupplementalGroupsPolicy)]
	if !ok {
		return nil, 0, fmt.Errorf("unsupported supplementalGroupsPolicy: %s", *sc.SupplementalGroupsPolicy)
	}
	return gids, runtimeapi.SupplementalGroupsPolicy(policy), nil
}

func seccomp(p *corev1.SeccompProfile, node *Node) (*runtimeapi.SecurityProfile, error) {
	switch {
	case p == nil && node.SeccompDefault, p != nil && p.Type == corev1.SeccompProfileTypeRuntimeDefault:
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}, nil
	case p != nil && p.Type == corev1.SeccompProfileTypeLocalhost:
		if p.LocalhostProfile == nil || *p.LocalhostProfile == "" {
			return nil, errors.New("localhostProfile must be set if seccompProfile type is Localhost.") //nolint:revive,staticcheck // the kubelet's words
		}
		return &runtimeapi.SecurityProfile{
			ProfileType:  runtimeapi.SecurityProfile_Localhost,
			LocalhostRef: filepath.Join(node.SeccompRoot, *p.LocalhostProfile),
		}, nil
	}
	return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}, nil
}

// appArmorProfile is the container's, else what the pod's annotation has for it,
// else the pod's. Nil is the runtime's choice.
func appArmorProfile(pod *corev1.Pod, c *corev1.Container) *corev1.AppArmorProfile {
	if c.SecurityContext != nil && c.SecurityContext.AppArmorProfile != nil {
		return c.SecurityContext.AppArmorProfile
	}
	switch value := pod.Annotations[corev1.DeprecatedAppArmorBetaContainerAnnotationKeyPrefix+c.Name]; {
	case value == corev1.DeprecatedAppArmorBetaProfileRuntimeDefault:
		return &corev1.AppArmorProfile{Type: corev1.AppArmorProfileTypeRuntimeDefault}
	case value == corev1.DeprecatedAppArmorBetaProfileNameUnconfined:
		return &corev1.AppArmorProfile{Type: corev1.AppArmorProfileTypeUnconfined}
	case strings.HasPrefix(value, corev1.DeprecatedAppArmorBetaProfileNamePrefix):
		return &corev1.AppArmorProfile{
			Type:             corev1.AppArmorProfileTypeLocalhost,
			LocalhostProfile: new(strings.TrimPrefix(value, corev1.DeprecatedAppArmorBetaProfileNamePrefix)),
		}
	}
	if pod.Spec.SecurityContext != nil {
		return pod.Spec.SecurityContext.AppArmorProfile
	}
	return nil
}

// appArmor gives the profile in today's form and in the one older runtimes read.
func appArmor(pod *corev1.Pod, c *corev1.Container) (*runtimeapi.SecurityProfile, string, error) {
	p := appArmorProfile(pod, c)
	switch {
	case p == nil:
		return nil, "", nil
	case p.Type == corev1.AppArmorProfileTypeRuntimeDefault:
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}, corev1.DeprecatedAppArmorBetaProfileRuntimeDefault, nil
	case p.Type == corev1.AppArmorProfileTypeUnconfined:
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}, corev1.DeprecatedAppArmorBetaProfileNameUnconfined, nil
	case p.Type != corev1.AppArmorProfileTypeLocalhost:
		return nil, "", fmt.Errorf("unknown apparmor profile type: %q", p.Type)
	case p.LocalhostProfile == nil:
		return nil, "", errors.New("missing localhost apparmor profile name")
	}
	return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: *p.LocalhostProfile},
		corev1.DeprecatedAppArmorBetaProfileNamePrefix + *p.LocalhostProfile, nil
}

// namespaces says which kernel namespaces the pod's containers share: with the
// node, with one another, or with none. Of a pod with a user namespace of its own
// it has the mode, not the ids.
func namespaces(pod *corev1.Pod) *runtimeapi.NamespaceOption {
	n := &runtimeapi.NamespaceOption{
		Network: runtimeapi.NamespaceMode_POD, Ipc: runtimeapi.NamespaceMode_POD, Pid: runtimeapi.NamespaceMode_CONTAINER,
		UsernsOptions: &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_NODE},
	}
	if pod.Spec.HostNetwork {
		n.Network = runtimeapi.NamespaceMode_NODE
	}
	if pod.Spec.HostIPC {
		n.Ipc = runtimeapi.NamespaceMode_NODE
	}
	switch {
	case pod.Spec.HostPID:
		n.Pid = runtimeapi.NamespaceMode_NODE
	case isTrue(pod.Spec.ShareProcessNamespace):
		n.Pid = runtimeapi.NamespaceMode_POD
	}
	if OwnUsers(pod) {
		n.UsernsOptions.Mode = runtimeapi.NamespaceMode_POD
	}
	return n
}

// OwnUsers says whether the pod has a user namespace of its own (hostUsers: false).
func OwnUsers(pod *corev1.Pod) bool {
	return pod.Spec.HostUsers != nil && !*pod.Spec.HostUsers
}

// IDsPerPod is how many users and groups a pod with a user namespace has.
const IDsPerPod = 65536

// UserNamespace gives a pod that has OwnUsers the ids of the host that its users
// are: the lowest block of IDsPerPod that no mapping in taken touches. The first
// block is the host's own.
func UserNamespace(taken []*runtimeapi.UserNamespace) (*runtimeapi.UserNamespace, error) {
	used := map[uint32]bool{0: true}
	for _, t := range taken {
		for _, m := range slices.Concat(t.GetUids(), t.GetGids()) {
			first, end := uint64(m.HostId), uint64(m.HostId)+uint64(m.Length)
			for b := first / IDsPerPod; b*IDsPerPod < end; b++ {
				used[uint32(b)] = true
			}
		}
	}
	for b := range uint32(1 << 16) {
		if !used[b] {
			ids := func() []*runtimeapi.IDMapping {
				return []*runtimeapi.IDMapping{{HostId: b * IDsPerPod, Length: IDsPerPod}}
			}
			return &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: ids(), Gids: ids()}, nil
		}
	}
	return nil, errors.New("create user namespace: no block of ids is free")
}

// userNamespaces says why the pod cannot have a user namespace of its own here.
func userNamespaces(pod *corev1.Pod, node *Node) error {
	if !OwnUsers(pod) || node.handler(pod).UserNamespaces {
		return nil
	}
	if handler := node.RuntimeHandler(pod); handler != "" {
		return fmt.Errorf("can't set `spec.hostUsers: false`, RuntimeClass handler %q does not support user namespaces", handler)
	}
	return errors.New("can't set `spec.hostUsers: false`, runtime does not support user namespaces")
}

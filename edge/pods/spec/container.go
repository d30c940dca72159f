package spec

import (
	"encoding/json"
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Annotations of containers: what of the specification is needed when only the
// container is left.
const (
	AnnotationHash                     = "io.kubernetes.container.hash"
	AnnotationRestartCount             = "io.kubernetes.container.restartCount"
	AnnotationTerminationMessagePath   = "io.kubernetes.container.terminationMessagePath"
	AnnotationTerminationMessagePolicy = "io.kubernetes.container.terminationMessagePolicy"
	AnnotationPreStop                  = "io.kubernetes.container.preStopHandler" // JSON of a corev1.LifecycleHandler
	AnnotationPorts                    = "io.kubernetes.container.ports"          // JSON of []corev1.ContainerPort
	AnnotationDeletionGracePeriod      = "io.kubernetes.pod.deletionGracePeriod"
	AnnotationTerminationGracePeriod   = "io.kubernetes.pod.terminationGracePeriod"
)

// ContainerInput is what a container is made of.
type ContainerInput struct {
	Node      *Node
	Pod       *corev1.Pod
	Container *corev1.Container // of the pod; an ephemeral one converted
	// Attempt is the container's restart count.
	Attempt uint32
	// ImageRef is what the runtime knows the image by, Image what it says of it.
	ImageRef string
	Image    *runtimeapi.Image
	// Env is that of the container, see Env.
	Env []*runtimeapi.KeyValue
	// Mounts are those of the container's volumes, its hosts file and its
	// termination log. Container takes them over.
	Mounts []*runtimeapi.Mount
	// TargetID is that of the container that an ephemeral one looks into.
	TargetID string
	// UserNamespace is the sandbox's, where the pod has OwnUsers.
	UserNamespace *runtimeapi.UserNamespace
}

// Container makes the configuration of a container. Its errors are *ConfigError.
func Container(in ContainerInput) (*runtimeapi.ContainerConfig, error) {
	cfg, err := container(in)
	return cfg, configError(err)
}

func container(in ContainerInput) (*runtimeapi.ContainerConfig, error) {
	c, pod, node := in.Container, in.Pod, in.Node
	if _, _, err := Hostname(pod, node); err != nil {
		return nil, err
	}
	if err := userNamespaces(pod, node); err != nil {
		return nil, err
	}
	security, err := Security(pod, c, node, in.Image)
	if err != nil {
		return nil, err
	}
	if in.TargetID != "" && security.NamespaceOptions.Pid == runtimeapi.NamespaceMode_CONTAINER {
		security.NamespaceOptions.Pid = runtimeapi.NamespaceMode_TARGET
		security.NamespaceOptions.TargetId = in.TargetID
	}
	devices, err := devices(c, node)
	if err != nil {
		return nil, err
	}
	if OwnUsers(pod) {
		if len(in.UserNamespace.GetUids()) == 0 {
			return nil, fmt.Errorf("the sandbox of pod %q has no user namespace", describe(pod))
		}
		security.NamespaceOptions.UsernsOptions = in.UserNamespace
		for _, m := range in.Mounts {
			m.UidMappings, m.GidMappings = in.UserNamespace.Uids, in.UserNamespace.Gids
		}
	}
	annotations, err := annotations(pod, c, in.Attempt)
	if err != nil {
		return nil, err
	}
	cfg := &runtimeapi.ContainerConfig{
		Metadata:    &runtimeapi.ContainerMetadata{Name: c.Name, Attempt: in.Attempt},
		Image:       &runtimeapi.ImageSpec{Image: in.ImageRef, UserSpecifiedImage: c.Image},
		Command:     command(c.Command, in.Env),
		Args:        command(c.Args, in.Env),
		WorkingDir:  c.WorkingDir,
		Envs:        in.Env,
		Mounts:      in.Mounts,
		Devices:     devices,
		Labels:      podLabels(pod, map[string]string{LabelContainerName: c.Name}),
		Annotations: annotations,
		LogPath:     LogPath(c.Name, in.Attempt),
		Stdin:       c.Stdin,
		StdinOnce:   c.StdinOnce,
		Tty:         c.TTY,
		Linux: &runtimeapi.LinuxContainerConfig{
			Resources:       Resources(pod, c, node),
			SecurityContext: security,
		},
	}
	if c.Lifecycle != nil && c.Lifecycle.StopSignal != nil {
		cfg.StopSignal = stopSignal(*c.Lifecycle.StopSignal)
	}
	return cfg, nil
}

func annotations(pod *corev1.Pod, c *corev1.Container, attempt uint32) (map[string]string, error) {
	a := map[string]string{
		AnnotationHash:                     Hash(c),
		AnnotationRestartCount:             strconv.FormatUint(uint64(attempt), 10),
		AnnotationTerminationMessagePath:   c.TerminationMessagePath,
		AnnotationTerminationMessagePolicy: string(c.TerminationMessagePolicy),
	}
	if s := pod.DeletionGracePeriodSeconds; s != nil {
		a[AnnotationDeletionGracePeriod] = strconv.FormatInt(*s, 10)
	}
	if s := pod.Spec.TerminationGracePeriodSeconds; s != nil {
		a[AnnotationTerminationGracePeriod] = strconv.FormatInt(*s, 10)
	}
	add := func(name string, v any) error {
		text, err := json.Marshal(v)
		if err != nil {
			return fmt.Errorf("annotation %s of container %s: %w", name, c.Name, err)
		}
		a[name] = string(text)
		return nil
	}
	if c.Lifecycle != nil && c.Lifecycle.PreStop != nil {
		if err := add(AnnotationPreStop, c.Lifecycle.PreStop); err != nil {
			return nil, err
		}
	}
	if len(c.Ports) > 0 {
		if err := add(AnnotationPorts, c.Ports); err != nil {
			return nil, err
		}
	}
	return a, nil
}

// Hash tells versions of a container apart that need another container: those
// with another name or image. It is the stock kubelet's own hash.
func Hash(c *corev1.Container) string {
	text, err := json.Marshal(map[string]string{"name": c.Name, "image": c.Image})
	if err != nil {
		panic(err) // two strings
	}
	h := fnv.New32a()
	fmt.Fprintf(h, "([]uint8)%d", text) // how the kubelet's dump of Go values has it
	return strconv.FormatUint(uint64(h.Sum32()), 16)
}

// stopSignal converts SIGTERM, SIGRTMIN+1 and the like; the runtime's choice for
// what is none of them.
func stopSignal(s corev1.Signal) runtimeapi.Signal {
	name := strings.NewReplacer("+", "PLUS", "-", "MINUS").Replace(string(s))
	return runtimeapi.Signal(runtimeapi.Signal_value["SIGNAL_"+name])
}

// DeviceDomain begins the names of the resources that devices are declared as.
const DeviceDomain = "fairlead.dev/"

// ours says whether only a declared device can be the resource of that name. Other
// extended resources may be none of the node's business.
func ours(name corev1.ResourceName) bool { return strings.HasPrefix(string(name), DeviceDomain) }

// devices are the device nodes of the extended resources that the container has.
func devices(c *corev1.Container, node *Node) ([]*runtimeapi.Device, error) {
	var out []*runtimeapi.Device
	for _, name := range slices.Sorted(maps.Keys(c.Resources.Limits)) {
		if q := c.Resources.Limits[name]; q.IsZero() {
			continue
		}
		declared, ok := node.Devices[name]
		if !ok && ours(name) {
			return nil, fmt.Errorf("no device of this node is declared as resource %s", name)
		}
		for _, d := range declared {
			if d.HostPath == "" {
				return nil, fmt.Errorf("device %s of resource %s is not plugged in", d.Path, name)
			}
			permissions := d.Permissions
			if permissions == "" {
				permissions = "rw"
			}
			out = append(out, &runtimeapi.Device{HostPath: d.HostPath, ContainerPath: d.Path, Permissions: permissions})
		}
	}
	return out, nil
}

package pods

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	resourcehelper "k8s.io/component-helpers/resource"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/edge/pods/cgroup"
	"github.com/fairlead-io/fairlead/edge/pods/cri"
	"github.com/fairlead-io/fairlead/edge/pods/events"
	"github.com/fairlead-io/fairlead/edge/pods/evict"
	"github.com/fairlead-io/fairlead/edge/pods/gc"
	"github.com/fairlead-io/fairlead/edge/pods/image"
	"github.com/fairlead-io/fairlead/edge/pods/logs"
	"github.com/fairlead-io/fairlead/edge/pods/probe"
	"github.com/fairlead-io/fairlead/edge/pods/spec"
	"github.com/fairlead-io/fairlead/edge/pods/volume"
	"github.com/fairlead-io/fairlead/schemas/payload"
)

// connect makes the parts that need no answer of the runtime.
func (e *Engine) connect() (err error) {
	if e.cri, err = cri.Dial(e.cfg.Runtime, e.log); err != nil {
		return err
	}
	n := e.cfg.Host()
	e.fill(&n, nil, nil)
	e.node.Store(&n)
	e.volumes, err = volume.New(volume.Config{
		Dir: e.podsDir(), Objects: e.objects,
		Allocatable:       func() corev1.ResourceList { return e.node.Load().Allocatable },
		ImageVolumes:      func() bool { return e.node.Load().Runtime.ImageVolumes },
		RecursiveReadOnly: e.recursiveReadOnly,
		Log:               e.log,
	})
	if err != nil {
		return err
	}
	e.images, err = image.New(image.Config{
		Runtime: e.cri, Parallel: e.cfg.ParallelPulls, UsePresent: true, Desired: e.desiredImages,
		Fetching: image.ContainerdFetching(e.cfg.Runtime),
		Event: func(pod *corev1.Pod, c *corev1.Container, typ, reason, message string) {
			e.events.Event(containerRef(pod, c), typ, reason, message)
		},
		NodeEvent: e.nodeEvent,
		Logger:    e.log, Metrics: e.cfg.Metrics,
	})
	if err != nil {
		return err
	}
	e.logs, err = logs.New(logs.Config{Live: e.liveLogs, Reopen: e.cri.ReopenContainerLog, Logger: e.log, Metrics: e.cfg.Metrics})
	if err != nil {
		return err
	}
	e.gc = &gc.Collector{
		Runtime: e.cri, Labels: map[string]string{labelNode: e.cfg.Node}, LogRoot: e.cfg.LogRoot, LinkDir: e.cfg.LogLinks,
		Gone: e.gone, Logger: e.log,
	}
	e.probes, err = probe.New(probe.Config{Exec: e.execCode, Changed: e.wake, Event: e.probeEvent, Logger: e.log, Metrics: e.cfg.Metrics})
	return err
}

// open asks the runtime what it is and makes the cgroups.
func (e *Engine) open(ctx context.Context) error {
	v, err := e.cri.Version(ctx)
	if err != nil {
		return err
	}
	st, err := e.cri.Status(ctx, true)
	if err != nil {
		return err
	}
	driver, err := e.cgroupDriver(ctx, st)
	if err != nil {
		return err
	}
	e.driver = driver
	n := e.cfg.Host()
	e.fill(&n, v, st)
	e.tree, err = cgroup.Open(cgroup.Config{Driver: driver, Root: e.cfg.CgroupRoot, Log: e.log})
	if err != nil {
		return err
	}
	n.CgroupVersion, n.Swap = e.tree.Version(), e.tree.Swap()
	e.node.Store(&n)
	e.limits = e.podsLimits(&n)
	err = e.tree.Setup(ctx, e.limits)
	if errors.Is(err, cgroup.ErrLimits) {
		e.nodeEvent(corev1.EventTypeWarning, "FailedNodeAllocatableEnforcement", err.Error())
		err = nil
	}
	if err != nil {
		return fmt.Errorf("cgroups: %w", err)
	}
	e.evictor, e.shutdown = e.watchPressure(), e.watchShutdown()
	e.pressure.Store(e.evictor)
	e.log.Info("pods", "runtime", v.RuntimeName+"://"+v.RuntimeVersion, "cgroups", e.tree.Version(), "driver", driver)
	return nil
}

// podsLimits bound all pods together: what the node has less what is reserved. What
// eviction keeps free is not taken off: it is to act before the kernel does.
func (e *Engine) podsLimits(n *spec.Node) cgroup.Limits {
	r := e.cfg.Reserved
	pids := r["pid"]
	return cgroup.Limits{
		MilliCPU: int64(n.CPUs)*1000 - r.Cpu().MilliValue(),
		Memory:   n.Memory - r.Memory().Value(),
		PIDs:     max(0, evict.MaxPIDs()-pids.Value()),
	}
}

// shareBurstable gives the class of burstable pods the share of what they request.
func (e *Engine) shareBurstable(ctx context.Context) {
	var cpu int64
	for _, p := range e.Active() {
		if spec.QOS(p) == corev1.PodQOSBurstable {
			r := resourcehelper.PodRequests(p, resourcehelper.PodResourcesOptions{})
			cpu += r.Cpu().MilliValue()
		}
	}
	if err := e.tree.SetBurstable(ctx, cpu); err != nil && ctx.Err() == nil {
		e.log.Warn("the share of burstable pods could not be set", "error", err)
	}
}

// fill adds what the engine and the runtime know to the facts of the host.
func (e *Engine) fill(n *spec.Node, v *runtimeapi.VersionResponse, st *runtimeapi.StatusResponse) {
	n.Name, n.LogRoot, n.DataRoot = e.cfg.Node, e.cfg.LogRoot, e.podsDir()
	n.CgroupRoot, n.CgroupDriver = e.cfg.CgroupRoot, e.driver
	n.ClusterDNS, n.ClusterDomain = e.cfg.ClusterDNS, e.cfg.ClusterDomain
	if v == nil {
		if old := e.node.Load(); old != nil {
			n.Runtime, n.CgroupVersion, n.Swap = old.Runtime, old.CgroupVersion, old.Swap
		}
		return
	}
	version, _, _ := strings.Cut(v.RuntimeVersion, "~") // without Debian's
	n.Runtime = spec.Runtime{Name: v.RuntimeName, Version: version}
	for _, h := range st.GetRuntimeHandlers() {
		if n.Runtime.Handlers == nil {
			n.Runtime.Handlers = map[string]spec.Handler{}
		}
		n.Runtime.Handlers[h.Name] = spec.Handler{
			RecursiveReadOnly: h.GetFeatures().GetRecursiveReadOnlyMounts(), UserNamespaces: h.GetFeatures().GetUserNamespaces(),
		}
	}
	n.Runtime.SupplementalGroupsPolicy = st.GetFeatures().GetSupplementalGroupsPolicy()
	n.Runtime.ImageVolumes = imageVolumes(v)
}

// imageVolumes tells whether the runtime mounts images: no field of the CRI says it.
func imageVolumes(v *runtimeapi.VersionResponse) bool {
	var major, minor int
	if _, err := fmt.Sscanf(strings.TrimPrefix(v.RuntimeVersion, "v"), "%d.%d", &major, &minor); err != nil {
		return false
	}
	switch v.RuntimeName {
	case "containerd":
		return major > 2 || major == 2 && minor >= 1
	case "cri-o":
		return major > 1 || major == 1 && minor >= 31
	}
	return false
}

// cgroupDriver asks the runtime which driver it has. One too old to say shows it in
// its configuration (containerd), else it is cgroupfs.
func (e *Engine) cgroupDriver(ctx context.Context, st *runtimeapi.StatusResponse) (string, error) {
	r, err := e.cri.RuntimeConfig(ctx)
	switch {
	case err == nil && r.GetLinux().GetCgroupDriver() == runtimeapi.CgroupDriver_SYSTEMD:
		return spec.Systemd, nil
	case err == nil:
		return spec.CgroupFS, nil
	case !cri.IsUnimplemented(err):
		return "", err
	}
	var info struct {
		SystemdCgroup bool `json:"systemdCgroup"`
		Containerd    struct {
			DefaultRuntimeName string `json:"defaultRuntimeName"`
			Runtimes           map[string]struct {
				Options map[string]any `json:"options"`
			} `json:"runtimes"`
		} `json:"containerd"`
	}
	if c, ok := st.GetInfo()["config"]; ok && json.Unmarshal([]byte(c), &info) == nil {
		o := info.Containerd.Runtimes[info.Containerd.DefaultRuntimeName].Options
		if yes, _ := o["SystemdCgroup"].(bool); yes || info.SystemdCgroup {
			return spec.Systemd, nil
		}
	}
	return spec.CgroupFS, nil
}

// refreshNode takes the facts about the host anew.
func (e *Engine) refreshNode() {
	n := e.cfg.Host()
	e.fill(&n, nil, nil)
	e.node.Store(&n)
}

// nodeFor is the node as it is for a pod: with the handler of the pod's RuntimeClass.
func (e *Engine) nodeFor(pod *corev1.Pod) *spec.Node {
	n, class := e.node.Load(), pod.Spec.RuntimeClassName
	if class == nil || *class == "" {
		return n
	}
	p := e.lookup(pod.UID)
	if p == nil {
		return n
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.handler == "" {
		return n
	}
	out := *n
	out.Runtime.Classes = map[string]string{*class: p.mu.handler}
	return &out
}

// recursiveReadOnly tells whether the pod's runtime handler has recursive
// read-only mounts.
func (e *Engine) recursiveReadOnly(pod *corev1.Pod) bool {
	n := e.nodeFor(pod)
	return n.Runtime.Handlers[n.RuntimeHandler(pod)].RecursiveReadOnly
}

// ensureCgroup makes the pod's cgroup.
func (e *Engine) ensureCgroup(ctx context.Context, pod *corev1.Pod) error {
	n := e.node.Load()
	e.shareBurstable(ctx)
	return e.tree.EnsurePod(ctx, pod.UID, spec.QOS(pod), spec.PodResources(pod, n))
}

// nodeEvent records an event about the node.
func (e *Engine) nodeEvent(typ, reason, message string) {
	e.events.Event(events.Ref{Kind: "Node", Name: e.cfg.Node}, typ, reason, message)
}

// services gives those of the payload.
func services(in []payload.Service) []spec.Service {
	var out []spec.Service
	for _, s := range in {
		x := spec.Service{Name: s.Name, ClusterIP: s.IP}
		for _, p := range s.Ports {
			x.Ports = append(x.Ports, spec.ServicePort{Name: p.Name, Port: p.Port, Protocol: corev1.Protocol(p.Protocol)})
		}
		out = append(out, x)
	}
	return out
}

// probeEvent records what a probe found.
func (e *Engine) probeEvent(pod *corev1.Pod, container, reason, message string) {
	e.events.Event(containerRef(pod, &corev1.Container{Name: container}), corev1.EventTypeWarning, reason, message)
}

// userNamespace finds IDs that no other pod of the runtime has.
func (e *Engine) userNamespace(ctx context.Context) (*runtimeapi.UserNamespace, error) {
	sandboxes, err := e.cri.ListPodSandbox(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("list the sandboxes: %w", err)
	}
	var taken []*runtimeapi.UserNamespace
	for _, s := range sandboxes {
		st, err := e.cri.PodSandboxStatus(ctx, s.Id)
		if err != nil {
			continue // it goes away
		}
		if u := st.GetLinux().GetNamespaces().GetOptions().GetUsernsOptions(); u != nil {
			taken = append(taken, u)
		}
	}
	return spec.UserNamespace(taken)
}

package pods

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/edge/pods/image"
	"github.com/fairlead-io/fairlead/edge/pods/logs"
	"github.com/fairlead-io/fairlead/edge/pods/podstatus"
	"github.com/fairlead-io/fairlead/edge/pods/spec"
	"github.com/fairlead-io/fairlead/edge/pods/volume"
)

// run is the sandbox that containers are started in.
type run struct {
	id     string
	config *runtimeapi.PodSandboxConfig
	ips    []string // the sandbox's, or the host's where the pod has its network
	users  *runtimeapi.UserNamespace
}

// said gives a runtime's error as the runtime said it, without grpc's words.
func said(err error) string { return status.Convert(err).Message() }

// sandbox gives the sandbox to start containers in, and makes it where it is not there.
func (p *pod) sandbox(ctx context.Context, w *want, s *seen, a *podstatus.Actions) (*run, error) {
	pod := w.pod
	n := p.e.nodeFor(pod)
	cfg, err := spec.Sandbox(pod, n, a.Attempt)
	// The cloud names the handlers of the classes that there are; for a static pod
	// nobody does, and the class's name is tried.
	if class := pod.Spec.RuntimeClassName; a.CreateSandbox && !p.static && class != nil && *class != "" && n.Runtime.Classes[*class] == "" {
		err = fmt.Errorf("runtimeclass.node.k8s.io %q not found", *class)
	}
	if err != nil {
		p.event(podRef(pod), corev1.EventTypeWarning, "FailedCreatePodSandBox", fmt.Sprintf("Failed to create pod sandbox: %v", err))
		return nil, err
	}
	cfg.Labels[labelNode] = p.e.cfg.Node
	r := &run{id: a.SandboxID, config: cfg, ips: p.addresses(w, s)}
	if !a.CreateSandbox {
		if len(s.sandboxes) > 0 {
			r.users = s.sandboxes[0].GetLinux().GetNamespaces().GetOptions().GetUsernsOptions()
		}
		return r, nil
	}
	if spec.OwnUsers(pod) {
		if r.users, err = p.e.userNamespace(ctx); err != nil {
			return nil, err
		}
		cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions = r.users
	}
	if _, notes := spec.DNS(pod, n); len(notes) > 0 {
		for _, x := range notes {
			p.event(podRef(pod), corev1.EventTypeWarning, x.Reason, x.Message)
		}
	}
	if err := p.e.ensureLogs(cfg.LogDirectory); err != nil {
		return nil, err
	}
	if err := p.e.gate.enter(ctx, toBegin); err != nil {
		return nil, err
	}
	r.id, err = p.e.cri.RunPodSandbox(ctx, cfg, n.RuntimeHandler(pod))
	p.e.gate.leave()
	if err != nil {
		if ctx.Err() == nil {
			p.event(podRef(pod), corev1.EventTypeWarning, "FailedCreatePodSandBox", "Failed to create pod sandbox: "+err.Error())
		}
		return nil, fmt.Errorf("create the sandbox: %w", err)
	}
	p.progress = true
	st, err := p.e.cri.PodSandboxStatus(ctx, r.id)
	if err != nil {
		p.event(podRef(pod), corev1.EventTypeWarning, "FailedPodSandBoxStatus", fmt.Sprintf("Unable to get pod sandbox status: %v", err))
		return nil, fmt.Errorf("status of the new sandbox: %w", err)
	}
	if !pod.Spec.HostNetwork {
		r.ips = sandboxIPs(st)
	}
	return r, nil
}

// imageLook is how often a container whose image cannot be had is looked at again.
const imageLook = 10 * time.Second

// startAll starts the containers that are due.
func (p *pod) startAll(ctx context.Context, w *want, s *seen, a *podstatus.Actions, r *run) (next time.Time, err error) {
	var errs []error
	start := func(c *corev1.Container, target string) bool {
		if at, wait := p.backOff(w.pod, c, s); wait {
			next = sooner(next, at)
			return false
		}
		err := p.start(ctx, w, s, r, c, target)
		var img *image.Error
		switch {
		case errors.As(err, &img) && img.Until.After(time.Now()):
			// The back-off lasts longer, but shows only to who asks within it.
			next = sooner(next, sooner(img.Until, time.Now().Add(imageLook)))
			return false
		case err != nil:
			errs = append(errs, fmt.Errorf("container %s: %w", c.Name, err))
			return false
		}
		p.progress = true
		return true
	}
	for _, c := range a.StartEphemeral {
		start((*corev1.Container)(&c.EphemeralContainerCommon), c.TargetContainerName)
	}
	for _, c := range a.StartInit {
		if !start(c, "") && !podstatus.Sidecar(c) {
			return next, errors.Join(errs...)
		}
	}
	for _, c := range a.Start {
		start(c, "")
	}
	return next, errors.Join(errs...)
}

// backOff tells whether a container that ended has to wait, and until when.
func (p *pod) backOff(pod *corev1.Pod, c *corev1.Container, s *seen) (until time.Time, wait bool) {
	var ended *podstatus.Container
	for i := range s.containers {
		if x := &s.containers[i]; x.Name == c.Name && x.State == runtimeapi.ContainerState_CONTAINER_EXITED {
			ended = x
			break
		}
	}
	if ended == nil {
		return until, false
	}
	key := c.Name + "/" + spec.Hash(c) // another definition is another container
	b := p.backoffs[key]
	if b == nil {
		maps.DeleteFunc(p.backoffs, func(k string, _ *backoff) bool { return strings.HasPrefix(k, c.Name+"/") })
		b = &backoff{}
		p.backoffs[key] = b
	}
	now := time.Now()
	if left := b.left(ended.Finished, now); left > 0 {
		p.event(containerRef(pod, c), corev1.EventTypeWarning, "BackOff",
			fmt.Sprintf("Back-off restarting failed container %s in pod %s", c.Name, formatPod(pod)))
		p.waits(c.Name, "CrashLoopBackOff", fmt.Sprintf("back-off %s restarting failed container=%s pod=%s", b.delay, c.Name, formatPod(pod)))
		return now.Add(left), true
	}
	b.next(ended.Finished, now)
	return until, false
}

// start pulls the image, makes the container and starts it. What fails is in the
// container's waiting state and in an event; the error is only for the retry.
func (p *pod) start(ctx context.Context, w *want, s *seen, r *run, c *corev1.Container, target string) error {
	pod, about := w.pod, containerRef(w.pod, c)
	fail := func(reason, event, message string, err error) error {
		if ctx.Err() != nil {
			return ctx.Err() // interrupted, which is no reason for anything
		}
		p.waits(c.Name, reason, message)
		if event != "" {
			p.event(about, corev1.EventTypeWarning, event, "Error: "+message)
		}
		return fmt.Errorf("%s: %w", reason, err)
	}
	secrets, missing := p.pullSecrets(pod)
	ref, err := p.e.images.Ensure(ctx, pod, c, secrets, r.config)
	if err != nil {
		var e *image.Error
		if len(missing) > 0 && errors.As(err, &e) && e.Reason == image.ErrImagePull {
			p.event(podRef(pod), corev1.EventTypeWarning, "FailedToRetrieveImagePullSecret",
				fmt.Sprintf("Unable to retrieve some image pull secrets (%s); attempting to pull the image may not succeed.", strings.Join(missing, ", ")))
		}
		if !errors.As(err, &e) {
			return fail(image.ErrImagePull, "Failed", said(err), err)
		}
		p.waits(c.Name, e.Reason, e.Message)
		p.event(about, corev1.EventTypeWarning, "Failed", "Error: "+e.Reason)
		return err
	}
	img, err := p.e.cri.ImageStatus(ctx, &runtimeapi.ImageSpec{Image: ref})
	if err != nil {
		return fail(image.ImageInspectError, "Failed", said(err), err)
	}
	n := p.e.nodeFor(pod)
	env, err := spec.Env(spec.EnvInput{Node: n, Pod: pod, Container: c, Objects: p.e.objects, PodIPs: r.ips, Services: services(w.services),
		File: func(vol, path string) ([]byte, error) { return p.e.volumes.ReadFile(pod, vol, path) }})
	if err != nil {
		return p.configError(err, fail)
	}
	mounts, err := p.mounts(ctx, pod, c, r, env)
	if err != nil {
		return p.configError(err, fail)
	}
	in := spec.ContainerInput{
		Node: n, Pod: pod, Container: c, Attempt: p.attempt(s, c), ImageRef: ref, Image: img,
		Env: env, Mounts: mounts, UserNamespace: r.users,
	}
	if target != "" {
		t, ok := s.latest(target)
		if !ok {
			return fail("CreateContainerConfigError", "Failed", fmt.Sprintf("unable to find target container %s", target), errors.New("no target"))
		}
		in.TargetID = t.ID
	}
	cfg, err := spec.Container(in)
	if err != nil {
		return p.configError(err, fail)
	}
	cfg.Labels[labelNode] = p.e.cfg.Node
	if err := p.e.ensureContainerLogs(r.config.LogDirectory, cfg.LogPath); err != nil {
		return fail("CreateContainerConfigError", "Failed", err.Error(), err)
	}
	if err := p.e.gate.enter(ctx, toStart); err != nil {
		return err
	}
	id, err := p.e.cri.CreateContainer(ctx, r.id, cfg, r.config)
	if err != nil {
		p.e.gate.leave()
		return fail("CreateContainerError", "Failed", said(err), err)
	}
	p.event(about, corev1.EventTypeNormal, "Created", "Container created")
	err = p.e.cri.StartContainer(ctx, id)
	p.e.gate.leave()
	if err != nil {
		return fail("RunContainerError", "Failed", said(err), err)
	}
	p.e.metrics.started.Inc()
	p.event(about, corev1.EventTypeNormal, "Started", "Container started")
	p.runs(c.Name)
	if dir := p.e.cfg.LogLinks; dir != "" {
		if err := logs.Link(logs.LinkPath(dir, pod.Namespace, pod.Name, c.Name, id), filepath.Join(r.config.LogDirectory, cfg.LogPath)); err != nil {
			p.log.Warn("the container's log has no link for log collectors", "container", c.Name, "error", err)
		}
	}
	if c.Lifecycle == nil || c.Lifecycle.PostStart == nil {
		return nil
	}
	message, err := p.hook(ctx, pod, c, id, r.ips, c.Lifecycle.PostStart)
	if err == nil {
		return nil
	}
	p.event(about, corev1.EventTypeWarning, "FailedPostStartHook", "PostStartHook failed")
	st := podstatus.Container{Name: c.Name, ID: id}
	if err := p.kill(ctx, pod, st, r.ips, podstatus.FailedPostStartHook, "FailedPostStartHook", nil, nil); err != nil {
		return err
	}
	p.waits(c.Name, "PostStartHookError", message)
	return errors.New("PostStartHookError")
}

// mounts gives the container's mounts: its volumes, /etc/hosts, the file for its
// last words.
func (p *pod) mounts(ctx context.Context, pod *corev1.Pod, c *corev1.Container, r *run, env []*runtimeapi.KeyValue) ([]*runtimeapi.Mount, error) {
	host, domain, err := spec.Hostname(pod, p.e.node.Load())
	if err != nil {
		return nil, err
	}
	hosts, err := p.e.volumes.Hosts(pod, r.ips, host, domain)
	if err != nil {
		return nil, err
	}
	images, err := p.imageVolumes(ctx, pod, c, r)
	if err != nil {
		return nil, err
	}
	return p.e.volumes.Mounts(volume.MountInput{
		Pod: pod, Container: c, Hosts: hosts, Images: images,
		Expand: func(s string) (string, error) { return spec.ExpandPath(s, env) },
	})
}

// imageVolumes pulls the images that the container mounts.
func (p *pod) imageVolumes(ctx context.Context, pod *corev1.Pod, c *corev1.Container, r *run) (map[string]*runtimeapi.ImageSpec, error) {
	var out map[string]*runtimeapi.ImageSpec
	for _, m := range c.VolumeMounts {
		for i := range pod.Spec.Volumes {
			v := &pod.Spec.Volumes[i]
			if v.Name != m.Name || v.Image == nil || out[v.Name] != nil {
				continue
			}
			as := *c
			as.Image, as.ImagePullPolicy = v.Image.Reference, v.Image.PullPolicy
			secrets, _ := p.pullSecrets(pod)
			ref, err := p.e.images.Ensure(ctx, pod, &as, secrets, r.config)
			if err != nil {
				var e *image.Error
				if errors.As(err, &e) {
					err = &spec.ConfigError{Reason: e.Reason, Message: e.Message}
				}
				return nil, err
			}
			if out == nil {
				out = map[string]*runtimeapi.ImageSpec{}
			}
			out[v.Name] = &runtimeapi.ImageSpec{Image: ref, UserSpecifiedImage: v.Image.Reference}
		}
	}
	return out, nil
}

// configError notes a container that cannot be made as described.
func (p *pod) configError(err error, fail func(reason, event, message string, err error) error) error {
	if p.arriving(err) {
		return errArriving
	}
	var e *spec.ConfigError
	if errors.As(err, &e) {
		return fail(e.Reason, "Failed", e.Message, err)
	}
	return fail(spec.CreateContainerConfigError, "Failed", err.Error(), err)
}

// attempt is the container's restart count: one more than that of the container
// before, which the runtime has, or, where it lost it, the last report.
func (p *pod) attempt(s *seen, c *corev1.Container) uint32 {
	if old, ok := s.latest(c.Name); ok {
		return uint32(old.Restarts) + 1
	}
	for _, list := range [][]corev1.ContainerStatus{p.status.InitContainerStatuses, p.status.ContainerStatuses, p.status.EphemeralContainerStatuses} {
		for i := range list {
			st := &list[i]
			if st.Name != c.Name || st.ContainerID == "" {
				continue
			}
			if st.State.Waiting != nil && st.LastTerminationState.Terminated == nil {
				return uint32(st.RestartCount)
			}
			return uint32(st.RestartCount) + 1
		}
	}
	return 0
}

// pullSecrets are the pod's image pull secrets that have arrived, and the names of
// those that have not.
func (p *pod) pullSecrets(pod *corev1.Pod) (secrets []*corev1.Secret, missing []string) {
	for _, ref := range pod.Spec.ImagePullSecrets {
		if ref.Name == "" {
			continue
		}
		s, err := p.e.objects.Secret(pod.Namespace, ref.Name)
		if err != nil {
			missing = append(missing, ref.Name)
			continue
		}
		secrets = append(secrets, s)
	}
	return secrets, missing
}

package podstatus

import (
	"cmp"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	lostMessage       = "The container could not be located when the pod was terminated"
	goneMessage       = "The container could not be located when the pod was deleted.  The container used to be Running"
	restartAllMessage = "The container is removed because RestartAllContainers in place"
	skippedMessage    = "Unable to get init container status from container runtime and pod has been initialized, treat it as exited normally"
	lostCode          = 137
)

// kind is where in the spec a container stands.
type kind int

const (
	regular kind = iota
	initial
	ephemeral
)

// containerStatuses gives the statuses of containers of one kind: init containers
// in the spec's order, others by name.
func (in *Input) containerStatuses(specs []corev1.Container, previous []corev1.ContainerStatus, k kind) []corev1.ContainerStatus {
	if len(specs) == 0 {
		return nil
	}
	all := in.shouldRestartAll()
	list := make([]corev1.ContainerStatus, 0, len(specs))
	for i := range specs {
		s := in.containerStatus(&specs[i], statusOf(previous, specs[i].Name), all)
		in.explain(&s, &specs[i], k)
		if k != ephemeral {
			in.probed(&s, &specs[i], statusOf(previous, specs[i].Name), k)
		}
		list = append(list, s)
	}
	if k != initial {
		slices.SortStableFunc(list, func(a, b corev1.ContainerStatus) int { return cmp.Compare(a.Name, b.Name) })
	}
	return list
}

// containerStatus is the status by what the runtime has of the container, and, if
// that is nothing, by what was reported last.
func (in *Input) containerStatus(spec *corev1.Container, old *corev1.ContainerStatus, restartAll bool) corev1.ContainerStatus {
	var found []*Container
	for i := range in.Containers {
		if in.Containers[i].Name == spec.Name {
			found = append(found, &in.Containers[i])
		}
	}
	if len(found) == 0 {
		return in.absent(spec, old, restartAll)
	}
	slices.SortStableFunc(found, func(a, b *Container) int { return b.Created.Compare(a.Created) })
	s := in.present(spec, found[0], old, restartAll)
	if len(found) > 1 {
		s.LastTerminationState = in.state(found[1], old, restartAll)
	}
	return s
}

// absent is the status of a container that the runtime does not have.
func (in *Input) absent(spec *corev1.Container, old *corev1.ContainerStatus, restartAll bool) corev1.ContainerStatus {
	waiting := ContainerCreating
	if len(in.Pod.Spec.InitContainers) > 0 {
		waiting = PodInitializing
	}
	s := corev1.ContainerStatus{
		Name: spec.Name, Image: spec.Image, VolumeMounts: in.volumeMounts(spec, nil),
		State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: waiting}},
	}
	if old == nil {
		return s
	}
	_, restarts := in.waits(spec)
	switch {
	case old.State.Terminated == nil:
		s.RestartCount, s.LastTerminationState = old.RestartCount, *old.LastTerminationState.DeepCopy()
	case restarts: // it waits for its restart, as it will the next time
		s.RestartCount, s.LastTerminationState = old.RestartCount, *old.State.DeepCopy()
	default:
		s = *old.DeepCopy()
	}
	switch {
	case restartAll && old.State.Waiting == nil:
		s.State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: RestartingAllContainers, Message: restartAllMessage}}
		s.LastTerminationState = corev1.ContainerState{Terminated: lost(RestartingAllContainers, restartAllMessage)}
		s.RestartCount = old.RestartCount + 1
	case old.State.Running != nil && s.LastTerminationState.Terminated == nil:
		// It ran and is gone: without an end of some kind the pod would fall back
		// to Pending as if it had never run.
		s.LastTerminationState.Terminated = lost(ContainerStatusUnknown, goneMessage)
		if in.Pod.DeletionTimestamp == nil {
			s.RestartCount++
		}
	}
	return s
}

func (in *Input) present(spec *corev1.Container, c *Container, old *corev1.ContainerStatus, restartAll bool) corev1.ContainerStatus {
	s := corev1.ContainerStatus{
		Name: c.Name, Image: c.Image, ImageID: c.ImageRef, ContainerID: in.id(c), RestartCount: c.Restarts,
		State: in.state(c, old, restartAll), VolumeMounts: in.volumeMounts(spec, old),
		AllocatedResources: spec.Resources.DeepCopy().Requests, Resources: containerResources(spec, c, old, in.id(c)), User: user(c),
	}
	if old == nil {
		return s
	}
	another := old.ContainerID != s.ContainerID
	s.RestartCount = max(s.RestartCount, old.RestartCount)
	switch {
	case another && old.State.Terminated != nil:
		s.LastTerminationState.Terminated = old.State.Terminated.DeepCopy()
	case old.LastTerminationState.Terminated != nil:
		s.LastTerminationState.Terminated = old.LastTerminationState.Terminated.DeepCopy()
	}
	switch {
	case s.State.Running != nil && another && old.State.Terminated != nil && old.RestartCount >= c.Restarts:
		s.RestartCount = old.RestartCount + 1
	case c.State == runtimeapi.ContainerState_CONTAINER_UNKNOWN && old.State.Running != nil:
		s.RestartCount = old.RestartCount + 1
	}
	return s
}

func (in *Input) id(c *Container) string { return in.Runtime + "://" + c.ID }

func (in *Input) state(c *Container, old *corev1.ContainerStatus, restartAll bool) corev1.ContainerState {
	switch c.State {
	case runtimeapi.ContainerState_CONTAINER_RUNNING:
		return corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: seconds(c.Started)}}
	case runtimeapi.ContainerState_CONTAINER_EXITED:
		return corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{
			ExitCode: c.ExitCode, Reason: c.Reason, Message: c.Message,
			StartedAt: seconds(c.Started), FinishedAt: seconds(c.Finished), ContainerID: in.id(c),
		}}
	case runtimeapi.ContainerState_CONTAINER_UNKNOWN:
		if old == nil {
			break
		}
		if old.State.Running != nil {
			reason := ContainerStatusUnknown
			if restartAll {
				reason = RestartingAllContainers
			}
			return corev1.ContainerState{Terminated: lost(reason, lostMessage)}
		}
		if t := old.State.Terminated; t != nil && old.ContainerID == in.id(c) {
			return *old.State.DeepCopy() // still not known: what was said stands
		}
	}
	return corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{}}
}

// explain says why a container that has to be started has not been.
func (in *Input) explain(s *corev1.ContainerStatus, spec *corev1.Container, k kind) {
	if k == initial {
		c := in.latest(spec.Name)
		if c != nil && c.State == runtimeapi.ContainerState_CONTAINER_EXITED && c.ExitCode == 0 {
			return
		}
		if c == nil && !Sidecar(spec) && s.State.Waiting != nil && in.regularCreated() {
			s.State = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{Reason: "Completed", Message: skippedMessage}}
			return
		}
	}
	w, ok := in.waits(spec)
	if !ok {
		return
	}
	if s.State.Terminated != nil {
		s.LastTerminationState = s.State
	}
	s.State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: w.Reason, Message: w.Message}}
}

// waits gives the reason why a container that has to be started has not been. In a
// stopped pod nothing waits: there its end counts.
func (in *Input) waits(spec *corev1.Container) (w Waiting, ok bool) {
	w, ok = in.Waiting[spec.Name]
	return w, ok && !in.Stopped && in.shouldRestart(spec)
}

// regularCreated: a regular container exists, so that initialization was over.
func (in *Input) regularCreated() bool {
	return slices.ContainsFunc(in.Pod.Spec.Containers, func(c corev1.Container) bool {
		s := in.latest(c.Name)
		return s != nil && s.State != runtimeapi.ContainerState_CONTAINER_UNKNOWN
	})
}

// regularActive: a regular container exists in the sandbox in use.
func (in *Input) regularActive() bool {
	return slices.ContainsFunc(in.Pod.Spec.Containers, func(c corev1.Container) bool { return in.active(c.Name) != nil })
}

// probed fills in started and ready.
func (in *Input) probed(s *corev1.ContainerStatus, spec *corev1.Container, old *corev1.ContainerStatus, k kind) {
	running := s.State.Running != nil
	same := old != nil && running && old.State.Running != nil && old.ContainerID == s.ContainerID
	started := running && in.started(spec, s, old, same)
	s.Started = &started
	switch {
	case k == initial && !Sidecar(spec):
		s.Ready = s.State.Terminated != nil && s.State.Terminated.ExitCode == 0
	default:
		s.Ready = started && in.isReady(spec, s, old, same)
	}
}

func (in *Input) started(spec *corev1.Container, s, old *corev1.ContainerStatus, same bool) bool {
	if spec.StartupProbe == nil {
		return true
	}
	if in.Probes != nil {
		if started, known := in.Probes.Started(in.plain(s)); known {
			return started
		}
	}
	return same && old.Started != nil && *old.Started
}

func (in *Input) isReady(spec *corev1.Container, s, old *corev1.ContainerStatus, same bool) bool {
	if spec.ReadinessProbe == nil {
		return true
	}
	if in.Probes != nil {
		if ready, known := in.Probes.Ready(in.plain(s)); known {
			return ready
		}
	}
	return same && old.Ready
}

// plain is the id without the scheme.
func (in *Input) plain(s *corev1.ContainerStatus) string {
	return strings.TrimPrefix(s.ContainerID, in.Runtime+"://")
}

// volumeMounts says how the volumes are mounted. It does not change in a
// container's life.
func (in *Input) volumeMounts(spec *corev1.Container, old *corev1.ContainerStatus) []corev1.VolumeMountStatus {
	if old != nil && len(old.VolumeMounts) > 0 {
		return old.VolumeMounts
	}
	var list []corev1.VolumeMountStatus
	for _, m := range spec.VolumeMounts {
		v := corev1.VolumeMountStatus{Name: m.Name, MountPath: m.MountPath, ReadOnly: m.ReadOnly}
		if m.ReadOnly {
			mode := corev1.RecursiveReadOnlyDisabled
			if in.recursive(m) {
				mode = corev1.RecursiveReadOnlyEnabled
			}
			v.RecursiveReadOnly = &mode
		}
		list = append(list, v)
	}
	return list
}

func (in *Input) recursive(m corev1.VolumeMount) bool {
	if m.RecursiveReadOnly == nil || !in.RecursiveReadOnly || m.MountPropagation != nil && *m.MountPropagation != corev1.MountPropagationNone {
		return false
	}
	return *m.RecursiveReadOnly == corev1.RecursiveReadOnlyEnabled || *m.RecursiveReadOnly == corev1.RecursiveReadOnlyIfPossible
}

func user(c *Container) *corev1.ContainerUser {
	if c.User == nil {
		return nil
	}
	return &corev1.ContainerUser{Linux: &corev1.LinuxContainerUser{
		UID: c.User.Uid, GID: c.User.Gid, SupplementalGroups: slices.Clone(c.User.SupplementalGroups),
	}}
}

// lost is the end of a container that nobody has seen.
func lost(reason, message string) *corev1.ContainerStateTerminated {
	return &corev1.ContainerStateTerminated{Reason: reason, Message: message, ExitCode: lostCode}
}

// seconds is the precision of the API.
func seconds(t time.Time) metav1.Time {
	return metav1.Time{Time: t.UTC().Truncate(time.Second)}
}

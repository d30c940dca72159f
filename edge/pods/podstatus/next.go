package podstatus

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Actions is what has to be done for a pod, in the order of the fields. Back-off
// is the engine's: it skips what is not due.
type Actions struct {
	// KillPod: stop all containers (KillAfter) and then the sandboxes.
	KillPod bool
	// Kill are single containers to stop. Not with KillPod.
	Kill []Kill
	// Reset are containers to stop (Kill) and remove, in this order, their logs
	// kept: all containers restart. Nothing else is to be done then.
	Reset []Reset
	// Prune are ids of old init containers that are no longer of use: to remove.
	Prune []string
	// CreateSandbox: make a new sandbox, after KillPod, with Attempt. The init
	// containers of the old one are in Prune.
	CreateSandbox bool
	Attempt       uint32
	// SandboxID is the sandbox to start containers in; with CreateSandbox the one
	// that it replaces, "" for a new pod.
	SandboxID string

	StartEphemeral []*corev1.EphemeralContainer
	StartInit      []*corev1.Container // in this order
	Start          []*corev1.Container
}

// None tells whether nothing has to be done.
func (a *Actions) None() bool {
	return !a.KillPod && !a.CreateSandbox && len(a.Kill)+len(a.Reset)+len(a.Prune)+len(a.StartEphemeral)+len(a.StartInit)+len(a.Start) == 0
}

// Kill is a container to stop.
type Kill struct {
	ID        string // the runtime's, without a scheme
	Container *corev1.Container
	Reason    KillReason // for Grace
	Message   string     // of the event Killing
}

// Reset is a container to remove, after it was stopped without grace where Kill is set.
type Reset struct {
	ID        string
	Container *corev1.Container
	Kill      bool
}

// Next gives what has to be done. status is what Compute has just given for the
// same input.
func Next(in Input, status corev1.PodStatus) Actions {
	pod := in.Pod
	a := Actions{}
	wanted := in.sandboxWanted() != ""
	if len(in.Sandboxes) > 0 {
		a.SandboxID, a.Attempt = in.Sandboxes[0].Id, in.Sandboxes[0].GetMetadata().GetAttempt()
		if wanted {
			a.Attempt++
		}
	}
	if pod.DeletionTimestamp != nil || in.Failed != nil || in.Stopped || terminalPhase(status.Phase) || in.pastDeadline() {
		a.KillPod = in.couldRun()
		return a
	}
	if c := condition(status.Conditions, corev1.AllContainersRestarting); c != nil && c.Status == corev1.ConditionTrue {
		a.Reset = in.resets()
		return a
	}
	if wanted {
		in.renew(&a)
		return a
	}
	a.Prune = in.stale(1)
	for i := range pod.Spec.EphemeralContainers {
		if c := &pod.Spec.EphemeralContainers[i]; in.latest(c.Name) == nil {
			a.StartEphemeral = append(a.StartEphemeral, c)
		}
	}
	if !in.nextInit(&a) || a.KillPod {
		return a
	}
	in.nextRegular(&a)
	return a
}

func (in *Input) pastDeadline() bool {
	d := Deadline(in.Pod, &in.Previous)
	return !d.IsZero() && !in.Now.Before(d)
}

// renew replaces the sandbox, unless the pod has done what it was to do.
func (in *Input) renew(a *Actions) {
	pod := in.Pod
	a.KillPod = len(in.Sandboxes)+len(in.Containers) > 0
	if pod.Spec.RestartPolicy == corev1.RestartPolicyNever && a.Attempt != 0 && len(in.Containers) > 0 {
		return
	}
	var start []*corev1.Container
	for i := range pod.Spec.Containers {
		c := &pod.Spec.Containers[i]
		policy := string(pod.Spec.RestartPolicy)
		if c.RestartPolicy != nil {
			policy = string(*c.RestartPolicy)
		}
		s := in.latest(c.Name)
		if policy == string(corev1.RestartPolicyOnFailure) && s != nil && s.State == runtimeapi.ContainerState_CONTAINER_EXITED && s.ExitCode == 0 {
			continue
		}
		start = append(start, c)
	}
	if len(start) == 0 && in.regularCreated() {
		return
	}
	a.CreateSandbox = true
	a.Prune = in.stale(0)
	if len(pod.Spec.InitContainers) > 0 {
		a.StartInit = []*corev1.Container{&pod.Spec.InitContainers[0]}
		return
	}
	a.Start = start
}

// stale gives the ended init containers but the newest `keep` of each name.
func (in *Input) stale(keep int) []string {
	var ids []string
	for i := range in.Pod.Spec.InitContainers {
		n := 0
		for j := range in.Containers {
			c := &in.Containers[j]
			if c.Name != in.Pod.Spec.InitContainers[i].Name {
				continue
			}
			if keep > 0 && c.State != runtimeapi.ContainerState_CONTAINER_EXITED && c.State != runtimeapi.ContainerState_CONTAINER_UNKNOWN {
				continue
			}
			if n++; n > keep {
				ids = append(ids, c.ID)
			}
		}
	}
	return ids
}

// resets orders the removal of all containers: those whose exit asked for it last.
func (in *Input) resets() []Reset {
	var targets, sources []Reset
	for _, list := range [][]corev1.Container{in.Pod.Spec.Containers, in.Pod.Spec.InitContainers} {
		for i := range list {
			for j := range in.Containers {
				c := &in.Containers[j]
				if c.Name != list[i].Name {
					continue
				}
				exited := c.State == runtimeapi.ContainerState_CONTAINER_EXITED
				r := Reset{ID: c.ID, Container: &list[i], Kill: !exited}
				if exited && restartsAll(&list[i], c.ExitCode) {
					sources = append(sources, r)
				} else {
					targets = append(targets, r)
				}
			}
		}
	}
	return append(targets, sources...)
}

// nextInit decides on the init containers, and says whether the pod is
// initialized. It looks at them from the last to the first, as those that are done
// may have been removed: the last one that exists tells how far the pod is.
func (in *Input) nextInit(a *Actions) bool {
	inits := in.Pod.Spec.InitContainers
	if len(inits) == 0 {
		return true
	}
	done := in.regularActive()
	reached := done // this init container, or a later one, was reached
	var start []int
	for i := len(inits) - 1; i >= 0; i-- {
		c, s := &inits[i], in.active(inits[i].Name)
		if s == nil {
			if reached && Sidecar(c) {
				start = append(start, i)
			}
			continue
		}
		if reached && !Sidecar(c) {
			continue
		}
		step := in.initStep(c, s)
		switch {
		case step.fail:
			a.KillPod = true
			return false
		case step.passed && i == len(inits)-1:
			done = true
		case step.passed && !reached:
			start = append(start, i+1)
		}
		if step.kill != nil {
			a.Kill = append(a.Kill, *step.kill)
		}
		if step.start {
			start = append(start, i)
		}
		reached = true
	}
	if !reached {
		start = append(start, 0)
	}
	slices.Sort(start)
	for _, i := range slices.Compact(start) {
		a.StartInit = append(a.StartInit, &inits[i])
	}
	return done
}

type initStep struct {
	passed bool // the next init container may start
	start  bool // (again)
	fail   bool // the pod fails
	kill   *Kill
}

func (in *Input) initStep(c *corev1.Container, s *Container) (step initStep) {
	kill := func(reason KillReason, message string) *Kill {
		return &Kill{ID: s.ID, Container: c, Reason: reason, Message: message}
	}
	switch s.State {
	case runtimeapi.ContainerState_CONTAINER_CREATED:
		step.start = true // its start failed
	case runtimeapi.ContainerState_CONTAINER_RUNNING:
		if !Sidecar(c) {
			break
		}
		failed := in.probeFailed(s.ID)
		if c.StartupProbe != nil {
			if failed == StartupProbe {
				step.kill, step.start = kill(StartupProbe, fmt.Sprintf("Init container %s failed startup probe", c.Name)), true
				break
			}
			if !in.hasStarted(s) {
				break
			}
		}
		step.passed = true
		switch {
		case in.changed(c, s):
			step.kill, step.start = kill(Unspecified, fmt.Sprintf("Init container %s definition changed", c.Name)), true
		case failed == LivenessProbe:
			step.kill, step.start = kill(LivenessProbe, fmt.Sprintf("Init container %s failed liveness probe", c.Name)), true
		}
	case runtimeapi.ContainerState_CONTAINER_EXITED:
		switch {
		case Sidecar(c):
			step.start = true
		case s.ExitCode == 0 && s.Reason != "OOMKilled":
			step.passed = true
		case in.shouldRestart(c):
			step.start = true
		default:
			step.fail = true
		}
	default:
		restart := in.Pod.Spec.RestartPolicy != corev1.RestartPolicyNever
		if c.RestartPolicy != nil {
			restart = *c.RestartPolicy != corev1.ContainerRestartPolicyNever
		}
		if !restart {
			step.fail = true
			break
		}
		step.kill, step.start = kill(Unspecified, fmt.Sprintf("Init container is in %q state, try killing it before restart", stateName(s.State))), true
	}
	return step
}

func (in *Input) nextRegular(a *Actions) {
	keep := 0
	for i := range in.Pod.Spec.Containers {
		c := &in.Pod.Spec.Containers[i]
		s := in.latest(c.Name)
		if s == nil || s.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
			if !in.shouldRestart(c) {
				continue
			}
			a.Start = append(a.Start, c)
			if s != nil && s.State == runtimeapi.ContainerState_CONTAINER_UNKNOWN {
				// It may be running after all, and must not run twice.
				a.Kill = append(a.Kill, Kill{ID: s.ID, Container: c, Reason: Unspecified,
					Message: fmt.Sprintf("Container is in %q state, try killing it before restart", stateName(s.State))})
			}
			continue
		}
		restart := in.Pod.Spec.RestartPolicy != corev1.RestartPolicyNever
		if c.RestartPolicy != nil {
			restart = *c.RestartPolicy != corev1.ContainerRestartPolicyNever
		}
		k := Kill{ID: s.ID, Container: c}
		switch failed := in.probeFailed(s.ID); {
		case in.changed(c, s):
			k.Message, restart = fmt.Sprintf("Container %s definition changed", c.Name), true
		case failed == LivenessProbe:
			k.Message, k.Reason = fmt.Sprintf("Container %s failed liveness probe", c.Name), LivenessProbe
		case failed == StartupProbe:
			k.Message, k.Reason = fmt.Sprintf("Container %s failed startup probe", c.Name), StartupProbe
		default:
			keep++
			continue
		}
		if restart {
			k.Message += ", will be restarted"
			a.Start = append(a.Start, c)
		}
		a.Kill = append(a.Kill, k)
	}
	if keep == 0 && len(a.Start) == 0 {
		a.KillPod = true // sidecars do not keep a pod alive
		a.StartInit, a.Kill, a.StartEphemeral = nil, nil, nil
	}
}

func (in *Input) changed(c *corev1.Container, s *Container) bool {
	return in.Hash != nil && s.Hash != in.Hash(c)
}

func (in *Input) probeFailed(id string) KillReason {
	if in.Probes == nil {
		return Unspecified
	}
	return in.Probes.Failed(id)
}

// hasStarted: the startup probe has succeeded, by the probe's word or, before it
// has one, by what was reported of the same container.
func (in *Input) hasStarted(s *Container) bool {
	if in.Probes != nil {
		if started, known := in.Probes.Started(s.ID); known {
			return started
		}
	}
	old := statusOf(in.Previous.InitContainerStatuses, s.Name)
	return old != nil && old.ContainerID == in.id(s) && old.Started != nil && *old.Started
}

func stateName(s runtimeapi.ContainerState) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "CONTAINER_"))
}

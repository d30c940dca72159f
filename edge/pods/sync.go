package pods

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/edge/pods/cri"
	"github.com/fairlead-io/fairlead/edge/pods/podstatus"
	"github.com/fairlead-io/fairlead/edge/pods/probe"
	"github.com/fairlead-io/fairlead/edge/pods/source"
	"github.com/fairlead-io/fairlead/edge/pods/spec"
	"github.com/fairlead-io/fairlead/edge/pods/volume"
)

// input gathers what the decisions about the pod rest on.
func (p *pod) input(w *want, s *seen) podstatus.Input {
	n := p.e.node.Load()
	in := podstatus.Input{
		Pod: w.pod, Previous: p.status, Sandboxes: s.sandboxes, Containers: s.containers,
		Runtime: n.Runtime.Name, RecursiveReadOnly: p.e.recursiveReadOnly(w.pod),
		HostIPs: n.HostIPs, QOS: spec.QOS(w.pod), Hash: spec.Hash,
		Waiting: p.waiting, Probes: p.e.probes, Now: time.Now(),
	}
	if len(w.gates) > 0 {
		in.Gates = map[corev1.PodConditionType]corev1.ConditionStatus{}
		for k, v := range w.gates {
			in.Gates[corev1.PodConditionType(k)] = corev1.ConditionStatus(v)
		}
	}
	if w.ending != nil {
		in.Failed = &w.ending.Failure
	}
	return in
}

// sync brings the pod one step nearer to what is wanted. next is when to look again
// though nothing happens; zero is never.
func (p *pod) sync(ctx context.Context) (next time.Time, err error) {
	w := p.want()
	if p.done || p.closed && !w.deleting() {
		return next, nil
	}
	if w.ending != nil && w.ending.rejected && !w.deleting() && len(p.ids) == 0 {
		in := p.input(&w, &seen{})
		status, _ := podstatus.Compute(in)
		p.report(&w, status, false)
		p.end()
		return next, nil
	}
	if p.gone && w.wanted && w.deleting() { // it waits for the cloud's word
		p.report(&w, p.status, true)
		return next, nil
	}
	if p.static && !w.deleting() && p.e.inTurn(p) {
		return next, nil // the one before has the ports and the folders
	}
	s, err := p.look(ctx)
	if err != nil {
		return next, err
	}
	if !w.deleting() {
		if err := p.discard(ctx, s); err != nil {
			return next, err
		}
	}
	in := p.input(&w, s)
	status, terminal := podstatus.Compute(in)
	if d := podstatus.Deadline(w.pod, &in.Previous); terminal && !p.late && !d.IsZero() && !in.Now.Before(d) && !ended(in.Previous.Phase) {
		p.late = true
		p.event(podRef(w.pod), corev1.EventTypeNormal, podstatus.DeadlineExceeded, podstatus.DeadlineExceededMessage)
	}
	if w.deleting() || w.ending != nil || terminal {
		return next, p.finish(ctx, &w, s, status)
	}
	if w.halt != nil || p.e.halting.Load() && !alive(s) {
		return next, p.stand(ctx, &w, s)
	}
	p.report(&w, status, false)
	if d := podstatus.Deadline(w.pod, &status); !d.IsZero() {
		next = d
	}
	actions := podstatus.Next(in, status)
	p.watchProbes(&w, s) // what runs is probed though something else is missing
	due, err := p.prepare(ctx, &w)
	next = sooner(next, due)
	if err != nil {
		return next, err
	}
	if actions.None() {
		return p.clearLater(ctx, s, next)
	}
	due, err = p.act(ctx, &w, s, &actions)
	next = sooner(next, due)
	if ctx.Err() != nil {
		return next, ctx.Err()
	}
	// What was done is seen by looking; what could not be done yet waits for next.
	after, lookErr := p.look(ctx)
	if lookErr != nil {
		return next, errors.Join(err, lookErr)
	}
	in = p.input(&w, after)
	status, terminal = podstatus.Compute(in)
	p.watchProbes(&w, after)
	if terminal {
		p.wake()
		return next, err
	}
	p.report(&w, status, false)
	if p.progress {
		if err == nil {
			p.wake() // there may be more to do, such as the next init container
		}
		return next, err
	}
	next, clearErr := p.clearLater(ctx, after, next)
	return next, errors.Join(err, clearErr)
}

// discard removes containers that were made and never started, by an agent that was
// killed or a sync that was interrupted. Nobody will start them any more, they must
// not count as restarts, and one that the runtime starts after all must not run
// beside its successor.
func (p *pod) discard(ctx context.Context, s *seen) error {
	var left []podstatus.Container
	for _, c := range s.containers {
		if c.State != runtimeapi.ContainerState_CONTAINER_CREATED {
			left = append(left, c)
			continue
		}
		if err := p.remove(ctx, c.ID); err != nil {
			return err
		}
	}
	s.containers = left
	return nil
}

// sooner gives the earlier of two times, of which zero is never.
func sooner(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// prepare makes what containers need beside the sandbox: cgroup and volumes.
func (p *pod) prepare(ctx context.Context, w *want) (next time.Time, err error) {
	pod := w.pod
	if !p.prepared {
		if err := p.e.ensureCgroup(ctx, pod); err != nil {
			p.event(podRef(pod), corev1.EventTypeWarning, "FailedCreatePodContainer", fmt.Sprintf("unable to ensure pod container exists: %v", err))
			return next, err
		}
		if err := p.e.volumes.SetUp(ctx, pod); err != nil {
			missing := volume.Missing(err)
			if p.arriving(err) {
				return next, errArriving
			}
			for _, m := range missing {
				p.event(podRef(pod), corev1.EventTypeWarning, "FailedMount", m.Message)
			}
			if len(missing) == 0 {
				p.event(podRef(pod), corev1.EventTypeWarning, "FailedMount", "Unable to attach or mount volumes: "+err.Error())
			}
			return next, fmt.Errorf("volumes: %w", err)
		}
		p.prepared, p.stale = true, true
	}
	if p.stale || !p.refreshAt.IsZero() && !time.Now().Before(p.refreshAt) {
		p.stale = false
		if p.refreshAt, err = p.e.volumes.Update(pod); err != nil {
			// What the containers have stays.
			for _, m := range volume.Missing(err) {
				p.event(podRef(pod), corev1.EventTypeWarning, "FailedMount", m.Message)
			}
			p.refreshAt = sooner(p.refreshAt, time.Now().Add(retryMost))
		}
	}
	return p.refreshAt, nil
}

// arrival is how long what a new pod refers to may be on its way behind it before
// anybody is told that it is missing.
const arrival = 3 * time.Second

// errArriving is the error of a sync that waits for it.
var errArriving = errors.New("what the pod refers to has not arrived yet")

// arriving tells whether an error is no news yet: what is missing may be about to come.
func (p *pod) arriving(err error) bool {
	return errors.Is(err, source.ErrNotFound) && time.Since(p.since) < arrival
}

// refresh looks at the volumes again: what they are made of has changed.
func (p *pod) refresh() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mu.refresh = true
	p.wakeLocked()
}

// act carries the actions out. next is when a back-off ends.
func (p *pod) act(ctx context.Context, w *want, s *seen, a *podstatus.Actions) (next time.Time, err error) {
	p.progress = false
	pod := w.pod
	switch {
	case a.KillPod && a.CreateSandbox && !alive(s) && !hostPorts(pod):
		// The sandbox is dead already, as after a reboot: the new one does not wait
		// until the old one's network is taken down.
		p.event(podRef(pod), corev1.EventTypeNormal, "SandboxChanged", "Pod sandbox changed, it will be killed and re-created.")
	case a.KillPod:
		if a.CreateSandbox {
			p.event(podRef(pod), corev1.EventTypeNormal, "SandboxChanged", "Pod sandbox changed, it will be killed and re-created.")
		}
		if err := p.stop(ctx, pod, s, nil); err != nil {
			p.event(podRef(pod), corev1.EventTypeWarning, "FailedKillPod", "error killing pod: "+err.Error())
			return next, err
		}
		p.progress = true
	default:
		for _, k := range a.Kill {
			c, ok := byID(s, k.ID)
			if !ok {
				continue
			}
			if err := p.kill(ctx, pod, c, s.ips(), k.Reason, k.Message, nil, nil); err != nil {
				return next, err
			}
			p.progress = true
		}
		for _, r := range a.Reset {
			if c, ok := byID(s, r.ID); ok && r.Kill {
				zero := int64(0)
				if err := p.kill(ctx, pod, c, s.ips(), podstatus.RestartAll, "", &zero, nil); err != nil {
					return next, err
				}
			}
			if err := p.remove(ctx, r.ID); err != nil {
				return next, err
			}
			p.progress = true
		}
	}
	for _, id := range a.Prune {
		if err := p.remove(ctx, id); err != nil {
			return next, err
		}
	}
	if !a.CreateSandbox && len(a.Start)+len(a.StartInit)+len(a.StartEphemeral) == 0 {
		return next, nil
	}
	run, err := p.sandbox(ctx, w, s, a)
	if err != nil {
		return next, err
	}
	return p.startAll(ctx, w, s, a, run)
}

// clearAfter is how long dead sandboxes are left alone after the agent's start: after
// a reboot, every pod that runs is worth more than an address that is free.
const clearAfter = 10 * time.Second

// clearLater is clear, but not in the first moments of the agent.
func (p *pod) clearLater(ctx context.Context, s *seen, next time.Time) (time.Time, error) {
	at := p.e.began.Add(clearAfter)
	if time.Now().After(at) {
		return next, p.clear(ctx, s)
	}
	for _, b := range s.sandboxes {
		if !ready(b) && !p.down[b.Id] {
			return sooner(next, at), nil
		}
	}
	return next, nil
}

// clear gives back the network of sandboxes that died by themselves, as in a power
// cut: each once, whoever made it.
func (p *pod) clear(ctx context.Context, s *seen) error {
	down := map[string]bool{}
	for _, b := range s.sandboxes {
		if ready(b) {
			continue
		}
		if !p.down[b.Id] {
			if err := p.e.gate.enter(ctx, toClear); err != nil {
				return err
			}
			err := p.e.cri.StopPodSandbox(ctx, b.Id)
			p.e.gate.leave()
			if err != nil && !cri.IsNotFound(err) {
				return fmt.Errorf("stop sandbox %.12s: %w", b.Id, err)
			}
		}
		down[b.Id] = true
	}
	p.down = down
	return nil
}

// hostPorts tells whether a container has a port of the host, which two sandboxes
// cannot have at once.
func hostPorts(pod *corev1.Pod) bool {
	for c := range containersOf(pod) {
		for _, port := range c.Ports {
			if port.HostPort != 0 {
				return true
			}
		}
	}
	return false
}

func byID(s *seen, id string) (podstatus.Container, bool) {
	for _, c := range s.containers {
		if c.ID == id {
			return c, true
		}
	}
	return podstatus.Container{}, false
}

// remove removes a container that does not run.
func (p *pod) remove(ctx context.Context, id string) error {
	if err := p.e.cri.RemoveContainer(ctx, id); err != nil && !cri.IsNotFound(err) {
		return fmt.Errorf("remove container %.12s: %w", id, err)
	}
	return nil
}

// watchProbes tells the prober what runs.
func (p *pod) watchProbes(w *want, s *seen) {
	var running []probe.Running
	for _, c := range s.running() {
		running = append(running, probe.Running{Name: c.Name, ID: c.ID, Since: c.Started, Started: p.started(c.ID)})
	}
	p.e.probes.Set(w.pod, first(p.addresses(w, s)), running)
	p.e.watchLogs(p, s)
}

// started tells whether the container was reported as started before.
func (p *pod) started(id string) bool {
	for _, list := range [][]corev1.ContainerStatus{p.status.InitContainerStatuses, p.status.ContainerStatuses} {
		for i := range list {
			if c := &list[i]; strings.HasSuffix(c.ContainerID, "://"+id) {
				return c.Started != nil && *c.Started
			}
		}
	}
	return false
}

// addresses are what the containers know as the pod's.
func (p *pod) addresses(w *want, s *seen) []string {
	if w.pod.Spec.HostNetwork {
		return p.e.node.Load().HostIPs
	}
	return s.ips()
}

func first(s []string) string {
	if len(s) == 0 {
		return ""
	}
	return s[0]
}

// finish ends the pod: its containers, its sandbox, its volumes and its cgroup,
// and, where it is deleted, every trace of it.
func (p *pod) finish(ctx context.Context, w *want, s *seen, status corev1.PodStatus) error {
	if w.wanted {
		p.report(w, status, false)
	}
	pod := w.pod
	p.e.probes.Ending(p.uid)
	var grace *int64
	if w.ending != nil && w.ending.grace != nil {
		g := w.grace() // the user may have asked for less meanwhile
		grace = &g
	}
	if alive(s) {
		if err := p.stop(ctx, pod, s, grace); err != nil {
			if ctx.Err() == nil {
				p.event(podRef(pod), corev1.EventTypeWarning, "FailedKillPod", "error killing pod: "+err.Error())
			}
			return err
		}
		var err error
		if s, err = p.look(ctx); err != nil {
			return err
		}
		if len(s.running()) > 0 {
			return errors.New("a container began while the pod was ended")
		}
	}
	p.e.probes.Forget(p.uid)
	p.e.watchLogs(p, s)
	in := p.input(w, s)
	in.Stopped = true
	status, _ = podstatus.Compute(in)
	if w.wanted {
		p.report(w, status, false)
	}
	if err := p.clear(ctx, s); err != nil {
		return err
	}
	if err := p.e.volumes.TearDown(ctx, p.uid); err != nil {
		return fmt.Errorf("volumes: %w", err)
	}
	if err := p.e.tree.RemovePod(ctx, p.uid); err != nil {
		return fmt.Errorf("cgroup: %w", err)
	}
	p.prepared = false
	p.e.images.Forget(p.uid)
	p.end()
	if !w.deleting() {
		return nil // its dead containers stay for their logs, until it is deleted
	}
	if w.wanted { // what the status was made from goes only once that is stored
		if err := p.e.out.settle(ctx, p.topic); err != nil {
			return err
		}
	}
	for _, c := range s.containers {
		if err := p.remove(ctx, c.ID); err != nil {
			return err
		}
	}
	for _, b := range s.sandboxes {
		if err := p.e.cri.RemovePodSandbox(ctx, b.Id); err != nil && !cri.IsNotFound(err) {
			return fmt.Errorf("remove sandbox %.12s: %w", b.Id, err)
		}
	}
	if err := p.e.removeLogs(pod); err != nil {
		return err
	}
	p.e.learn(p, nil)
	if w.wanted {
		p.gone = true
		p.report(w, status, true)
		return nil
	}
	// What is still to be stored must not come after the end.
	if err := p.e.out.settle(ctx, p.topic); err != nil {
		return err
	}
	p.retract()
	if err := p.e.out.settle(ctx, p.topic); err != nil { // else it would look like an orphan's
		return err
	}
	p.done = true
	return nil
}

// alive tells whether something of the pod may still run.
func alive(s *seen) bool {
	for _, b := range s.sandboxes {
		if ready(b) {
			return true
		}
	}
	for _, c := range s.containers {
		if c.State == runtimeapi.ContainerState_CONTAINER_RUNNING || c.State == runtimeapi.ContainerState_CONTAINER_UNKNOWN {
			return true
		}
	}
	return false
}

// waits notes why a container does not run.
func (p *pod) waits(name, reason, message string) {
	if p.waiting[name] == (podstatus.Waiting{Reason: reason, Message: message}) {
		return
	}
	p.waiting = maps.Clone(p.waiting) // the input of a decision keeps the old one
	p.waiting[name] = podstatus.Waiting{Reason: reason, Message: message}
}

func (p *pod) runs(name string) {
	if _, ok := p.waiting[name]; ok {
		p.waiting = maps.Clone(p.waiting)
		delete(p.waiting, name)
	}
}

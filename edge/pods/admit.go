package pods

import (
	"context"
	"maps"
	"path/filepath"
	"runtime"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-io/fairlead/edge/pods/logs"
	"github.com/fairlead-io/fairlead/edge/pods/podstatus"
	"github.com/fairlead-io/fairlead/edge/pods/spec"
)

// admit decides on a pod that is new to this node, before its worker begins. One
// that was reported before was admitted then: a restart of the agent refuses nobody.
func (e *Engine) admit(p *pod, pod *corev1.Pod) {
	if p.known && p.status.Phase != "" || pod.DeletionTimestamp != nil {
		return
	}
	var active []*corev1.Pod
	for _, o := range e.all() {
		if o == p {
			continue
		}
		w := o.want()
		if w.ending == nil && !w.deleting() && !o.over() {
			active = append(active, w.pod)
		}
	}
	r := spec.Admit(knownOnly(pod), active, e.nodeObject(), e.node.Load())
	if r == nil {
		if reason, message := e.evictor.Admit(pod); reason != "" {
			r = &spec.Rejection{Reason: reason, Message: message}
		}
	}
	if r != nil && len(r.Insufficient) > 0 {
		var others []*corev1.Pod
		if others, r = spec.Preempt(pod, active, r.Insufficient); r == nil {
			e.makeWay(others)
		}
	}
	if r == nil {
		return
	}
	p.log.Warn("pod refused", "reason", r.Reason, "message", r.Message)
	e.events.Event(podRef(pod), corev1.EventTypeWarning, r.Reason, r.Message)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mu.ending = &ending{Failure: podstatus.Failure{Reason: r.Reason, Message: "Pod was rejected: " + r.Message, Rejected: true}, rejected: true}
}

// makeWay ends pods in whose place a critical one runs.
func (e *Engine) makeWay(others []*corev1.Pod) {
	const reason, message = "Preempting", "Preempted in order to admit critical pod"
	for _, o := range others {
		e.events.Event(podRef(o), corev1.EventTypeWarning, reason, message)
		if p := e.lookup(o.UID); p != nil {
			p.update(func() {
				if p.mu.ending == nil {
					p.mu.ending = &ending{Failure: podstatus.Failure{Reason: reason, Message: message, Disruption: true}}
				}
			})
		}
	}
}

// over tells whether the pod has ended, as far as was reported.
func (p *pod) over() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mu.over
}

// knownLabels are the labels of the Node that the node itself gives it.
var knownLabels = map[string]bool{corev1.LabelHostname: true, corev1.LabelOSStable: true, corev1.LabelArchStable: true}

// knownOnly leaves out of a pod what only the cloud can judge: the scheduler has
// seen all labels of the Node, the node knows its own.
func knownOnly(p *corev1.Pod) *corev1.Pod {
	foreign := func(terms []corev1.NodeSelectorTerm) bool {
		for _, t := range terms {
			for _, r := range t.MatchExpressions {
				if !knownLabels[r.Key] {
					return true
				}
			}
		}
		return false
	}
	out := *p
	out.Spec.NodeSelector = maps.Clone(p.Spec.NodeSelector)
	maps.DeleteFunc(out.Spec.NodeSelector, func(k, _ string) bool { return !knownLabels[k] })
	if a := p.Spec.Affinity; a != nil && a.NodeAffinity != nil {
		if r := a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution; r != nil && foreign(r.NodeSelectorTerms) {
			out.Spec.Affinity = nil
		}
	}
	return &out
}

// nodeObject is the node as admission sees it.
func (e *Engine) nodeObject() *corev1.Node {
	n := e.node.Load()
	labels := map[string]string{corev1.LabelHostname: n.Name, corev1.LabelOSStable: "linux", corev1.LabelArchStable: runtime.GOARCH}
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: n.Name, Labels: labels},
		Status:     corev1.NodeStatus{Allocatable: n.Allocatable},
	}
}

// Evict ends a pod for good. It returns when nothing of it runs any more and its
// volumes are gone.
func (e *Engine) Evict(ctx context.Context, uid types.UID, f podstatus.Failure, grace *int64) error {
	p := e.lookup(uid)
	if p == nil {
		return nil
	}
	p.update(func() {
		if p.mu.ending == nil {
			p.mu.ending = &ending{Failure: f, grace: grace}
		}
	})
	select {
	case <-p.ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Active lists the pods that have not ended.
func (e *Engine) Active() []*corev1.Pod {
	var out []*corev1.Pod
	for _, p := range e.all() {
		if !p.over() {
			out = append(out, p.spec())
		}
	}
	return out
}

// desiredImages lists what the pods name, so that it is not collected.
func (e *Engine) desiredImages() []string {
	var out []string
	for _, p := range e.all() {
		if p.over() {
			continue
		}
		pod := p.spec()
		for c := range containersOf(pod) {
			out = append(out, c.Image)
		}
		for i := range pod.Spec.Volumes {
			if v := pod.Spec.Volumes[i].Image; v != nil {
				out = append(out, v.Reference)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// gone tells whether nobody wants a pod: only then what is left of it may go.
func (e *Engine) gone(uid types.UID) bool {
	spared := e.spared.Load()
	return e.settled() && e.lookup(uid) == nil && spared != nil && !(*spared)[uid]
}

// watchLogs notes whose logs are written.
func (e *Engine) watchLogs(p *pod, s *seen) {
	dir := spec.LogDirectory(p.spec(), e.node.Load())
	e.mu.Lock()
	defer e.mu.Unlock()
	var live []logs.Live
	for _, c := range s.running() {
		live = append(live, logs.Live{ContainerID: c.ID, Path: filepath.Join(dir, spec.LogPath(c.Name, uint32(c.Restarts)))})
	}
	if e.mu.logs[p.uid] = live; live == nil {
		delete(e.mu.logs, p.uid)
	}
}

// liveLogs lists the logs that are written.
func (e *Engine) liveLogs() []logs.Live {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []logs.Live
	for _, live := range e.mu.logs {
		out = append(out, live...)
	}
	return out
}

func (e *Engine) wake(uid types.UID) {
	if p := e.lookup(uid); p != nil {
		p.wake()
	}
}

// RuntimeErr is why the container runtime cannot be used; nil while it can.
func (e *Engine) RuntimeErr() error {
	if p := e.runtimeErr.Load(); p != nil {
		return *p
	}
	return nil
}

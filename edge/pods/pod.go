package pods

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"maps"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-io/fairlead/edge/pods/podstatus"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// pod is one pod by its UID: what is wanted of it, and the worker that brings it
// there. A worker has a goroutine only while there is something to do.
type pod struct {
	e   *Engine
	log *slog.Logger
	uid types.UID
	// topic is where it is reported.
	topic topic.Topic
	// static is a pod from the node's own folder.
	static bool
	// ended is closed once nothing of it runs any more and its volumes are gone.
	ended chan struct{}

	mu struct {
		sync.Mutex
		spec *corev1.Pod // the newest description; never changed in place
		rev  int64       // of it
		// more of the payload
		services []payload.Service
		gates    map[string]string
		handler  string
		// wanted is false once the description is gone.
		wanted bool
		// ending is why the pod has to end although it is wanted; it never goes away.
		ending *ending

		// again is the topic of a description that came while the pod, no longer
		// wanted, was ended: its turn is after the end.
		again topic.Topic

		over bool // it has ended: the last report says so
		// halt is the grace, in seconds, with which it has to stand still while the
		// node goes down; nil is not at all. halted is once it does.
		halt   *int64
		halted bool

		dirty, working bool
		refresh        bool               // see pod.refresh
		interrupt      context.CancelFunc // of what the worker does now
		timer          *time.Timer
	}

	// The fields below belong to the worker.
	since     time.Time        // when this process first saw it
	status    corev1.PodStatus // reported last
	known     bool             // status was reported by somebody: the pod is not new
	backoffs  map[string]*backoff
	waiting   map[string]podstatus.Waiting // by container, why it does not run; replaced, not changed
	failures  int                          // syncs in a row that failed
	dead      map[string]podstatus.Container
	ids       []string        // what the runtime has of it, as the engine was told
	prepared  bool            // cgroup and volumes are there
	stale     bool            // what the volumes are made of may have changed
	refreshAt time.Time       // when the volumes want to be looked at again; zero is never
	progress  bool            // the last sync did something
	down      map[string]bool // dead sandboxes whose network was given back
	gone      bool            // it was reported as gone, and waits to be withdrawn
	late      bool            // its deadline has passed, and the event says so
	closed    bool            // it had ended before this node lost its memory: never again
	done      bool            // nothing of it is left
}

// ending is why a pod has to end for good.
type ending struct {
	podstatus.Failure
	// grace is how long it has; nil is what the pod asks for.
	grace *int64
	// rejected pods never began: their containers are not looked at.
	rejected bool
}

// want is a copy of what is wanted.
type want struct {
	pod      *corev1.Pod
	rev      int64
	services []payload.Service
	gates    map[string]string
	wanted   bool
	ending   *ending
	halt     *int64
}

func (p *pod) want() want {
	p.mu.Lock()
	defer p.mu.Unlock()
	return want{p.mu.spec, p.mu.rev, p.mu.services, maps.Clone(p.mu.gates), p.mu.wanted, p.mu.ending, p.mu.halt}
}

// deleting tells that the pod goes away: nobody starts anything of it any more.
func (w *want) deleting() bool { return !w.wanted || w.pod.DeletionTimestamp != nil }

// grace is how many seconds the pod's containers have to end.
func (w *want) grace() int64 {
	g := int64(corev1.DefaultTerminationGracePeriodSeconds)
	if s := w.pod.Spec.TerminationGracePeriodSeconds; s != nil {
		g = *s
	}
	if d := w.pod.DeletionGracePeriodSeconds; w.pod.DeletionTimestamp != nil && d != nil {
		g = *d
	}
	if w.ending != nil && w.ending.grace != nil {
		g = min(g, *w.ending.grace)
	}
	if w.halt != nil {
		g = min(g, *w.halt)
	}
	return max(g, 0)
}

// update changes what is wanted and wakes the worker. Where the pod shall end, or
// sooner than before, it interrupts what the worker does.
func (p *pod) update(change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	before := want{pod: p.mu.spec, wanted: p.mu.wanted, ending: p.mu.ending, halt: p.mu.halt}
	change()
	after := want{pod: p.mu.spec, wanted: p.mu.wanted, ending: p.mu.ending, halt: p.mu.halt}
	ends := func(w *want) bool { return w.deleting() || w.ending != nil || w.halt != nil }
	if ends(&after) && (!ends(&before) || after.grace() < before.grace()) && p.mu.interrupt != nil {
		p.mu.interrupt()
	}
	p.wakeLocked()
}

// wake lets the worker look at the pod.
func (p *pod) wake() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wakeLocked()
}

func (p *pod) wakeLocked() {
	p.mu.dirty = true
	if p.mu.working || p.e.stopping() {
		return
	}
	p.mu.working = true
	p.e.workers.Go(p.work)
}

// wakeAt wakes the worker at a time, unless something else does before. It
// replaces the time that was set.
func (p *pod) wakeAt(at time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.timer != nil {
		p.mu.timer.Stop()
		p.mu.timer = nil
	}
	if at.IsZero() || p.e.stopping() {
		return
	}
	p.mu.timer = time.AfterFunc(time.Until(at), p.wake)
}

// work syncs the pod until there is nothing to do.
func (p *pod) work() {
	for {
		p.mu.Lock()
		if !p.mu.dirty || p.e.stopping() {
			p.mu.working = false
			p.mu.Unlock()
			return
		}
		p.mu.dirty = false
		p.stale, p.mu.refresh = p.stale || p.mu.refresh, false
		ctx, cancel := context.WithCancel(p.e.ctx)
		p.mu.interrupt = cancel
		p.mu.Unlock()

		next, err := p.sync(ctx)
		interrupted := ctx.Err() != nil
		cancel()
		now := time.Now()
		switch {
		case p.done:
			p.e.forget(p)
			p.wakeAt(time.Time{})
			if again := p.again(); again != "" {
				p.e.in.put(again)
			}
			return // and never works again: another one may have its UID now
		case err != nil && interrupted:
			p.wake() // there is something else to do now
		case errors.Is(err, errArriving):
			p.failures = 0
			p.wakeAt(sooner(next, p.since.Add(arrival)))
		case err != nil:
			p.failures++
			p.e.metrics.syncErrors.Inc()
			at := now.Add(retry(p.failures))
			if next.IsZero() || at.Before(next) {
				next = at
			}
			p.log.Warn("pod not in sync, trying again", "error", err, "in", time.Until(next).Round(time.Millisecond))
			p.wakeAt(next)
		default:
			p.failures = 0
			p.wakeAt(next)
		}
		p.mu.Lock()
		p.mu.interrupt = nil
		p.mu.Unlock()
	}
}

func (p *pod) again() topic.Topic {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mu.again
}

// end says that nothing of the pod runs any more and its volumes are gone.
func (p *pod) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mu.over = true
	select {
	case <-p.ended:
	default:
		close(p.ended)
	}
}

// report says how the pod is.
func (p *pod) report(w *want, s corev1.PodStatus, gone bool) {
	p.status, p.known = s, true
	p.mu.Lock()
	p.mu.over = s.Phase == corev1.PodFailed || s.Phase == corev1.PodSucceeded
	p.mu.Unlock()
	if !p.e.owner(p) {
		return // another pod has its name, and so its topic
	}
	b, err := json.Marshal(s)
	if err != nil {
		p.log.Error("status not reported", "error", err)
		return
	}
	r := payload.ReportedPod{UID: string(p.uid), Rev: w.rev, Status: b, Gone: gone}
	if p.static {
		if r.Static, err = staticOf(w.pod); err != nil {
			p.log.Error("status not reported", "error", err)
			return
		}
	}
	p.e.out.report(p.topic, payload.Encode(r))
}

// ended tells whether a phase is a pod's last.
func ended(p corev1.PodPhase) bool { return p == corev1.PodFailed || p == corev1.PodSucceeded }

// retract says nothing of the pod any more, unless another pod of its name has
// taken the topic over.
func (p *pod) retract() {
	if !p.e.owner(p) {
		return
	}
	b, ok := p.e.bus.Retained(p.topic)
	if !ok {
		return
	}
	var r payload.ReportedPod
	if payload.Decode(b, &r) == nil && r.UID != string(p.uid) {
		return
	}
	p.e.out.report(p.topic, nil)
}

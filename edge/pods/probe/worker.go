package probe

import (
	"context"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// worker is one probe of one running container. Its fields are guarded by the
// Prober's mutex.
type worker struct {
	p    *Prober
	t    *target
	kind Kind
	spec *corev1.Probe

	result Result // after the thresholds
	last   Result // of the latest run
	run    int    // how often in a row

	base   time.Time // the ticks are base + n*period
	next   time.Time // when it is due; zero before it was first armed
	timer  *time.Timer
	cancel context.CancelFunc // of the run in flight
	hold   bool               // nothing more to find out about this container
	gone   bool               // the container is not there any more
}

func newWorker(p *Prober, t *target, k Kind, s *corev1.Probe, started bool) *worker {
	w := &worker{p: p, t: t, kind: k, spec: s, base: t.since}
	switch k {
	case Startup:
		if started {
			w.result = Success
		}
	case Readiness:
		if !started {
			w.result = Failure
		}
	case Liveness:
		w.result = Success
	}
	return w
}

func (w *worker) period() time.Duration {
	return time.Duration(max(w.spec.PeriodSeconds, 1)) * time.Second
}

// armLocked sets the timer for the first run, or for the next.
func (w *worker) armLocked() {
	if w.hold || w.gone || w.timer != nil || w.cancel != nil {
		return
	}
	now := time.Now()
	if w.next.IsZero() {
		w.next = w.firstLocked(now)
	}
	w.timer = time.AfterFunc(w.next.Sub(now), w.fire)
}

// firstLocked is when the first run is due.
func (w *worker) firstLocked(now time.Time) time.Time {
	delay := w.t.since.Add(time.Duration(w.spec.InitialDelaySeconds) * time.Second)
	if w.t.since.Before(w.p.began) && now.Sub(w.p.began) < w.period() {
		// The agent was restarted: not all the node's probes at once.
		at := now.Add(random(w.period()))
		if at.Before(delay) {
			return delay
		}
		return at
	}
	if w.kind == Readiness {
		if delay.After(now) {
			return delay
		}
		return now
	}
	earliest := w.base.Add(w.period())
	if delay.After(earliest) {
		earliest = delay
	}
	if !now.Before(earliest) {
		earliest = now.Add(1) // the tick that comes
	}
	n := (earliest.Sub(w.base) + w.period() - 1) / w.period()
	return w.base.Add(n * w.period())
}

func (w *worker) stopLocked() {
	if w.timer != nil {
		w.timer.Stop()
		w.timer = nil
	}
	if w.cancel != nil {
		w.cancel()
	}
}

// fire runs the probe once. It is called by the timer, in a goroutine of its own.
func (w *worker) fire() {
	p := w.p
	p.mu.Lock()
	if w.timer == nil || w.gone || w.hold || p.mu.closed {
		p.mu.Unlock()
		return
	}
	w.timer = nil
	ctx, cancel := context.WithCancel(p.ctx)
	defer cancel()
	w.cancel = cancel
	pod, container, id, ip := w.t.pod, w.t.spec, w.t.id, w.t.ip
	p.flights.Add(1)
	defer p.flights.Done()
	p.mu.Unlock()

	began := time.Now()
	v := p.runWithRetries(ctx, w.spec, container, id, ip)
	took := time.Since(began)

	p.mu.Lock()
	w.cancel = nil
	ended := ctx.Err() != nil || w.gone
	changed := false
	if !ended {
		if v.err == nil {
			changed = w.takeLocked(v.outcome != failed)
		}
		// A tick that was missed while the probe ran is made up for at once.
		w.next = began.Add(w.period())
		if changed && w.kind == Startup {
			w.t.scheduleLocked()
		}
		w.armLocked()
	}
	p.mu.Unlock()
	if ended {
		return
	}
	p.say(pod, container.Name, w.kind, v, took)
	if changed {
		p.cfg.Changed(pod.UID)
	}
}

// takeLocked counts a run and tells whether the result is another one now.
func (w *worker) takeLocked(success bool) (changed bool) {
	r, threshold := Failure, max(w.spec.FailureThreshold, 1)
	if success {
		r, threshold = Success, max(w.spec.SuccessThreshold, 1)
	}
	if w.last == r {
		w.run++
	} else {
		w.last, w.run = r, 1
	}
	if w.run < int(threshold) {
		return false
	}
	changed = w.result != r
	w.result = r
	if w.kind == Startup || w.kind == Liveness && r == Failure {
		// It has started, or it will be killed: nothing more to ask this container.
		w.hold = true
	}
	return changed
}

func (p *Prober) say(pod *corev1.Pod, container string, k Kind, v verdict, took time.Duration) {
	result := "success"
	switch {
	case v.err != nil:
		result = "error"
		p.cfg.Event(pod, container, Unhealthy, string(k)+" probe errored and resulted in unknown state: "+v.err.Error())
	case v.outcome == failed:
		result = "failure"
		p.cfg.Event(pod, container, Unhealthy, string(k)+" probe failed: "+v.output)
	case v.outcome == warned:
		p.cfg.Event(pod, container, Warned, string(k)+" probe warning: "+v.output)
	}
	p.results.WithLabelValues(string(k), result).Inc()
	p.duration.WithLabelValues(string(k)).Observe(took.Seconds())
	p.log.Debug("probe", "pod", pod.Namespace+"/"+pod.Name, "container", container, "kind", string(k), "result", result)
}

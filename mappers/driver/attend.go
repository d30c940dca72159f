package driver

import (
	"context"
	"time"

	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
)

const (
	// A write that failed for a passing reason is tried again after retryFirst,
	// doubled up to retryLimit.
	retryFirst = 100 * time.Millisecond
	retryLimit = 2 * time.Second
)

// target is a wish that is not finished with.
type target struct {
	payload.Target
	arrived  time.Time
	attempts int
	after    time.Time // not before
}

// setTarget hands over a target. One that is not newer than what was finished
// with is ignored: a mapper's restart or a reconnect replays them all.
func (w *worker) setTarget(name string, t payload.Target) {
	w.mu.Lock()
	defer w.mu.Unlock()
	p := w.mu.props[name]
	switch {
	case p == nil:
		w.log.Warn("target ignored: the model has no such property", "property", name, "rev", t.Rev)
		return
	case t.UID != w.dev.UID:
		w.log.Debug("target ignored: it is another device's of the same name", "property", name, "rev", t.Rev)
		return
	case t.Rev <= p.ack:
		delete(w.mu.targets, name)
		return
	}
	if old := w.mu.targets[name]; old != nil && old.Rev >= t.Rev {
		return
	}
	w.mu.targets[name] = &target{Target: t, arrived: time.Now()}
	signal(w.attendNow)
}

// dropTarget forgets a target that was withdrawn.
func (w *worker) dropTarget(name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.mu.targets, name)
}

// attend applies targets and marks values that grew too old, until ctx ends.
func (w *worker) attend(ctx context.Context, sess Session) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.attendNow:
		case <-timer.C:
		}
		for {
			p, t := w.nextTarget(time.Now())
			if p == nil || ctx.Err() != nil {
				break
			}
			w.apply(ctx, sess, p, t)
		}
		timer.Reset(w.age(time.Now()))
	}
}

// nextTarget picks the target that waits longest, and drops expired ones.
func (w *worker) nextTarget(now time.Time) (*property, *target) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var best *target
	var prop *property
	for name, t := range w.mu.targets {
		if t.Exp != 0 && payload.Millis(now) >= t.Exp {
			w.log.Info("target expired before it could be applied", "property", name, "rev", t.Rev)
			w.metrics.writes.WithLabelValues("expired").Inc()
			delete(w.mu.targets, name)
			continue
		}
		if !t.after.After(now) && (best == nil || t.arrived.Before(best.arrived)) {
			best, prop = t, w.mu.props[name]
		}
	}
	return prop, best
}

// apply carries one target out and acknowledges it, or schedules another try.
func (w *worker) apply(ctx context.Context, sess Session, p *property, t *target) {
	v, f := w.admit(p, t)
	var readback any
	if f == nil {
		var err error
		readback, err = sess.Write(ctx, p.Property, v)
		if ctx.Err() != nil {
			return // not acknowledged: it is applied after the restart
		}
		if err != nil {
			f = faultOf(err)
		}
	}
	now := time.Now()
	w.mu.Lock()
	defer w.mu.Unlock()
	newer := w.mu.targets[p.Name] != t // or withdrawn
	if f != nil && f.transient() {
		w.metrics.writes.WithLabelValues("retry").Inc()
		if t.attempts == 0 {
			w.log.Warn("write failed; trying again", "property", p.Name, "rev", t.Rev, "error", f)
		}
		t.after = now.Add(min(retryFirst<<min(t.attempts, 10), retryLimit))
		t.attempts++
		if f.silent() && !p.Access.Readable() { // polling tells about the others
			w.takeLocked(p, nil, f, now)
			if !w.anyReadable() {
				w.mu.silent, w.mu.silence = true, f.Error()
			}
			w.statusLocked(now)
		}
		return
	}
	if !newer {
		delete(w.mu.targets, p.Name)
	}
	p.written++
	var why device.Reason
	if f != nil {
		why = f.reason()
		w.log.Warn("target refused", "property", p.Name, "rev", t.Rev, "reason", why, "error", f)
		w.metrics.writes.WithLabelValues(string(why)).Inc()
	} else {
		w.metrics.writes.WithLabelValues("ok").Inc()
		w.log.Debug("target applied", "property", p.Name, "rev", t.Rev)
		delete(w.mu.fault, p.Name)
		if !w.anyReadable() {
			w.mu.silent = false
		}
	}
	w.metrics.delay.Observe(now.Sub(t.arrived).Seconds())
	p.acked(t.Rev, why, readback, now)
	w.publishLocked(p, true)
	w.statusLocked(now)
}

// admit checks a target as the twin engine has done before: the mapper trusts
// nobody with a pump.
func (w *worker) admit(p *property, t *target) (any, *Fault) {
	if !p.Access.Writable() {
		return nil, faultOf(device.Refuse(device.ReasonAccess, "property %s is read only", p.Name))
	}
	v, err := p.Decode(t.V)
	if err != nil {
		return nil, faultOf(err)
	}
	return v, nil
}

func (w *worker) anyReadable() bool {
	for _, p := range w.mu.order { // never changes
		if p.Access.Readable() {
			return true
		}
	}
	return false
}

// age marks values that are too old and gives the time until attend has
// something to do again.
func (w *worker) age(now time.Time) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	next := now.Add(time.Hour)
	stale := false
	for _, p := range w.mu.order {
		at := p.staleAt()
		switch {
		case at.IsZero():
		case at.After(now):
			if at.Before(next) {
				next = at
			}
		case p.bad(payload.QualityStale, now):
			stale = true
			w.mu.fault[p.Name] = "no value within its maximum age"
			w.publishLocked(p, false)
		}
	}
	if stale {
		w.log.Warn("values grew older than their maximum age")
		w.statusLocked(now)
	}
	for _, t := range w.mu.targets {
		if t.after.Before(next) {
			next = t.after
		}
		if t.Exp != 0 && time.UnixMilli(t.Exp).Before(next) {
			next = time.UnixMilli(t.Exp)
		}
	}
	return max(next.Sub(now), 0)
}

package pods

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/fairlead-io/fairlead/edge/pods/podstatus"
	"github.com/fairlead-io/fairlead/edge/pods/shutdown"
)

// Graceful shutdown of the node. The stock kubelet makes every pod Failed, and the
// cloud makes new ones. Without the cloud nobody would: so a pod that is restarted
// anyway is only stopped here, and the next boot starts it as after a power cut. One
// that is never restarted becomes Failed, as with the kubelet.

// watchShutdown makes what listens to logind.
func (e *Engine) watchShutdown() *shutdown.Manager {
	return shutdown.New(shutdown.Config{
		Periods: e.cfg.Shutdown, Pods: e.Active, Kill: e.stopForShutdown,
		Event: e.nodeEvent, Changed: e.shutdownChanged, Log: e.log,
	})
}

// shutdownChanged hears that the node goes down, or that it does not after all.
func (e *Engine) shutdownChanged() {
	down := e.shutdown.ShuttingDown()
	e.halting.Store(down)
	if !down {
		for _, p := range e.all() {
			p.update(func() { p.mu.halt = nil })
		}
	}
	if e.cfg.Changed != nil {
		e.cfg.Changed()
	}
}

// stopForShutdown ends a pod as long as the node is down. It returns when nothing
// of it runs any more.
func (e *Engine) stopForShutdown(ctx context.Context, t shutdown.Termination) error {
	p := e.lookup(t.Pod.UID)
	if p == nil {
		return nil
	}
	if t.Pod.Spec.RestartPolicy == corev1.RestartPolicyNever {
		return e.Evict(ctx, t.Pod.UID, podstatus.Failure{Reason: t.Reason, Message: t.Message, Disruption: true}, &t.Grace)
	}
	p.update(func() { p.mu.halt, p.mu.halted = &t.Grace, false }) // it may have stood still before, for a shutdown that was called off
	for !p.over() && !p.halted() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
	return nil
}

// halted tells whether the pod stands still until the next boot.
func (p *pod) halted() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mu.halted
}

// stand stops what runs of the pod and says how it is.
func (p *pod) stand(ctx context.Context, w *want, s *seen) error {
	p.e.probes.Ending(p.uid)
	if alive(s) {
		if err := p.stop(ctx, w.pod, s, w.halt); err != nil {
			return fmt.Errorf("stop for the node's shutdown: %w", err)
		}
		var err error
		if s, err = p.look(ctx); err != nil {
			return err
		}
	}
	p.e.watchLogs(p, s)
	status, _ := podstatus.Compute(p.input(w, s))
	p.report(w, status, false)
	p.mu.Lock()
	p.mu.halted = true
	p.mu.Unlock()
	return nil
}

package pods

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/fairlead-io/fairlead/edge/pods/cri"
	"github.com/fairlead-io/fairlead/edge/pods/podstatus"
)

// stop ends all containers of a pod, sidecars last, and then its sandboxes. The
// grace is the pod's where it is nil.
func (p *pod) stop(ctx context.Context, spec *corev1.Pod, s *seen, grace *int64) error {
	running := s.running()
	var names []string
	gone, left := map[string]chan struct{}{}, map[string]int{} // two of a name should not run, but must not hurt
	for _, c := range running {
		if left[c.Name]++; left[c.Name] == 1 {
			names, gone[c.Name] = append(names, c.Name), make(chan struct{})
		}
	}
	var mu sync.Mutex // of left
	ended := func(name string) {
		mu.Lock()
		defer mu.Unlock()
		if left[name]--; left[name] == 0 {
			close(gone[name])
		}
	}
	after := podstatus.KillAfter(spec, names)
	var wg sync.WaitGroup
	errs := make([]error, len(running))
	for i, c := range running {
		wg.Go(func() {
			turn := func(ctx context.Context) {
				for _, n := range after[c.Name] {
					select {
					case <-gone[n]:
					case <-ctx.Done():
						return
					}
				}
			}
			if errs[i] = p.kill(ctx, spec, c, s.ips(), podstatus.Unspecified, "", grace, turn); errs[i] == nil {
				ended(c.Name)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, b := range s.sandboxes {
		if err := p.e.cri.StopPodSandbox(ctx, b.Id); err != nil && !cri.IsNotFound(err) {
			return fmt.Errorf("stop sandbox %.12s: %w", b.Id, err)
		}
		p.down[b.Id] = true
	}
	return nil
}

// kill ends one container: preStop hook, its turn (nil: at once), SIGTERM, and at
// the end of the grace SIGKILL. The message is the event's; empty is the usual one.
func (p *pod) kill(ctx context.Context, spec *corev1.Pod, st podstatus.Container, ips []string, reason podstatus.KillReason, message string, override *int64, turn func(context.Context)) error {
	c := containerOf(spec, st.Name)
	if c == nil {
		c = &corev1.Container{Name: st.Name} // of a pod whose description is lost
	}
	if message == "" {
		message = "Stopping container " + st.Name
	}
	grace := podstatus.Grace(spec, c, reason)
	p.event(containerRef(spec, c), corev1.EventTypeNormal, "Killing", message)
	if override != nil {
		grace = *override
	}
	end := time.Now().Add(time.Duration(grace) * time.Second)
	if c.Lifecycle != nil && c.Lifecycle.PreStop != nil && grace > 0 {
		hook, cancel := context.WithDeadline(ctx, end)
		if _, err := p.hook(hook, spec, c, st.ID, ips, c.Lifecycle.PreStop); err != nil && hook.Err() == nil {
			// The error may hold what a secret says.
			p.event(containerRef(spec, c), corev1.EventTypeWarning, "FailedPreStopHook", "PreStopHook failed")
		}
		cancel()
	}
	if turn != nil && grace > 0 {
		wait, cancel := context.WithDeadline(ctx, end)
		turn(wait)
		cancel()
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	left := max(time.Until(end), time.Duration(podstatus.MinimumGrace)*time.Second)
	if err := p.e.cri.StopContainer(ctx, st.ID, left); err != nil && !cri.IsNotFound(err) {
		return fmt.Errorf("stop container %s: %w", st.Name, err)
	}
	return nil
}

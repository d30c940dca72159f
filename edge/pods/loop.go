package pods

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/edge/pods/spec"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// loop does what is about all pods, until ctx ends.
func (e *Engine) loop(ctx context.Context) error {
	if !e.start(ctx) {
		return nil
	}
	stop, err := e.watchBus(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	defer stop()
	static := &manifests{e: e, files: map[string]manifest{}}
	var staticTick <-chan time.Time
	if e.cfg.StaticPods != "" {
		static.scan()
		t := time.NewTicker(staticEvery)
		defer t.Stop()
		staticTick = t.C
	}
	for _, t := range e.in.take() { // the broker has told of all that is retained
		e.changed(t)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { e.cri.Watch(ctx, e.runtimeChanged) })
	wg.Go(func() { e.watchRuntime(ctx) })
	wg.Go(func() { e.logs.Run(ctx) })
	wg.Go(func() { e.images.Run(ctx) })
	wg.Go(func() { e.evictor.Run(ctx) })
	wg.Go(func() { e.shutdown.Run(ctx) })
	defer e.host.Close()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-e.in.signal:
			for _, t := range e.in.take() {
				e.changed(t)
			}
		case <-staticTick:
			static.scan()
		}
	}
}

// watchRuntime compares what is wanted with what the runtime has, from time to time
// and when asked to, and clears away what is left over.
func (e *Engine) watchRuntime(ctx context.Context) {
	t := time.NewTimer(0)
	defer t.Stop()
	swept := time.Now()
	var observed time.Time
	for {
		full := false
		select {
		case <-ctx.Done():
			return
		case <-e.relistNow:
			full = true
		case <-t.C:
		}
		if full = full || time.Since(observed) >= observeEvery; full {
			e.refreshNode()
		}
		look, cancel := context.WithTimeout(ctx, lookTimeout)
		err := e.relist(look)
		cancel()
		if ctx.Err() != nil {
			return
		}
		before := e.RuntimeErr()
		if err != nil {
			if before == nil { // not once a second for as long as it is away
				e.log.Warn("the container runtime does not answer as it should, trying again", "runtime", e.cfg.Runtime, "error", err)
			}
			e.runtimeErr.Store(&err)
		} else {
			if before != nil {
				e.log.Info("the container runtime answers again", "runtime", e.cfg.Runtime)
			}
			e.runtimeErr.Store(nil)
		}
		if full || (before == nil) != (err == nil) {
			observed = time.Now()
			e.observe(ctx)
		}
		if err == nil && time.Since(swept) >= relistEvery {
			swept = time.Now()
			if err := e.gc.Collect(ctx); err != nil && ctx.Err() == nil {
				e.log.Warn("not all that is left of pods could be removed, trying again", "error", err)
			}
		}
		t.Reset(e.relistAfter())
	}
}

// relistAfter is when the runtime is to be asked again.
func (e *Engine) relistAfter() time.Duration {
	switch {
	case e.runtimeErr.Load() != nil || !e.cri.Eventful():
		return relistBlind
	case len(e.State().Problems) > 0: // such as a network that is not ready yet: nothing tells when it is
		return observeEvery
	default:
		return relistEvery
	}
}

// start waits for the runtime and makes the cgroups. It tells whether ctx lives.
func (e *Engine) start(ctx context.Context) bool {
	for n := 1; ; n++ {
		err := e.open(ctx)
		if err == nil {
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		e.runtimeErr.Store(&err)
		e.observe(ctx)
		e.log.Warn("pods wait for the container runtime", "runtime", e.cfg.Runtime, "error", err)
		select {
		case <-ctx.Done():
			return false
		case <-time.After(retry(n)):
		}
	}
}

// restore makes a description of a pod that is nowhere described any more, as far
// as its end needs one, from what its containers say.
func (e *Engine) restore(ctx context.Context, o *orphan) (*corev1.Pod, error) {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: o.namespace, Name: o.name, UID: o.uid}}
	containers, err := e.cri.ListContainers(ctx, &runtimeapi.ContainerFilter{LabelSelector: map[string]string{labelUID: string(o.uid), labelNode: e.cfg.Node}})
	if err != nil {
		return nil, fmt.Errorf("list the containers of pod %s: %w", o.uid, err)
	}
	for _, c := range containers {
		if g, err := strconv.ParseInt(c.Annotations[spec.AnnotationTerminationGracePeriod], 10, 64); err == nil {
			p.Spec.TerminationGracePeriodSeconds = &g
		}
		pc := corev1.Container{Name: c.Labels[labelContainer]}
		if text, ok := c.Annotations[spec.AnnotationPreStop]; ok {
			var h corev1.LifecycleHandler
			if json.Unmarshal([]byte(text), &h) == nil {
				pc.Lifecycle = &corev1.Lifecycle{PreStop: &h}
			}
		}
		if containerOf(p, pc.Name) == nil {
			p.Spec.Containers = append(p.Spec.Containers, pc)
		}
	}
	return p, nil
}

// traces adds what is on the disk, in the cgroups and on the bus of pods that
// nobody knows.
func (e *Engine) traces(orphans map[types.UID]*orphan) error {
	note := func(uid types.UID, namespace, name string) {
		if uid == "" || e.lookup(uid) != nil {
			return
		}
		o := orphans[uid]
		if o == nil {
			o = &orphan{uid: uid}
			orphans[uid] = o
		}
		o.namespace, o.name = cmp.Or(o.namespace, namespace), cmp.Or(o.name, name)
	}
	folders, err := e.volumes.Pods()
	for _, uid := range folders {
		note(uid, "", "")
	}
	cgroups, err2 := e.tree.Pods()
	for uid := range cgroups {
		note(uid, "", "")
	}
	for _, m := range e.bus.RetainedMatch(topic.Filter(fmt.Sprintf("%s/%s/%s/#", topic.Root, e.cfg.Node, topic.KindReportedPod))) {
		var r payload.ReportedPod
		at, err := topic.Parse(string(m.Topic))
		if err == nil && payload.Decode(m.Payload, &r) == nil {
			note(types.UID(r.UID), at.Namespace, at.Name)
		}
	}
	return errors.Join(err, err2)
}

// removeLogs removes the log folder of a deleted pod.
func (e *Engine) removeLogs(p *corev1.Pod) error {
	if p.Name == "" {
		return nil // its name is lost; gc finds the folder
	}
	if err := os.RemoveAll(spec.LogDirectory(p, e.node.Load())); err != nil {
		return fmt.Errorf("logs: %w", err)
	}
	return nil
}

func (e *Engine) ensureLogs(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("logs: %w", err)
	}
	return nil
}

func (e *Engine) ensureContainerLogs(dir, path string) error {
	return e.ensureLogs(filepath.Join(dir, filepath.Dir(path)))
}

// execCode runs a command in a container and gives its exit code.
func (e *Engine) execCode(ctx context.Context, id string, cmd []string, timeout time.Duration) ([]byte, int, error) {
	r, err := e.cri.ExecSync(ctx, id, cmd, timeout)
	if err != nil {
		return nil, 0, err
	}
	return append(r.Stdout, r.Stderr...), int(r.ExitCode), nil
}

func joinArgs(cmd []string) string { return strings.Join(cmd, " ") }

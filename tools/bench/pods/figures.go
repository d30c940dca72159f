package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fairlead-io/fairlead/tools/bench/machine"
	"github.com/fairlead-io/fairlead/tools/testruntime"
)

// create measures one pod at a time, the nodes in turn: from the call of the API
// until a watch sees it Running. The image is present.
func (b *bench) create(ctx context.Context) error {
	took := map[string][]time.Duration{}
	for i := range b.n + 1 {
		for _, node := range []string{edgeNode, stockNode} {
			d, err := b.createAndWait(ctx, node, 1)
			if err != nil {
				return fmt.Errorf("%s: %w", node, err)
			}
			if i > 0 { // the first fills caches
				took[node] = append(took[node], d...)
			}
			if err := b.deleteAll(ctx, node); err != nil {
				return err
			}
		}
	}
	theirs := median(took[stockNode])
	b.r.add(figure{
		Name: "create → Running, image present", Unit: "s", Ours: median(took[edgeNode]), Kubelet: &theirs, RatioBound: 0.8,
		Detail: fmt.Sprintf("median of %d, in turn; ours %s, kubelet %s", b.n, extremes(took[edgeNode]), extremes(took[stockNode])),
	})
	return nil
}

// fill runs b.pods pods on a node.
func (b *bench) fill(ctx context.Context, node string) error {
	_, err := b.createAndWait(ctx, node, b.pods)
	return err
}

// settle is what a node gets after a burst before it counts as idle.
const settle = 30 * time.Second

// idleFigures measures memory and CPU time of a node whose pods only run.
func (b *bench) idleFigures(ctx context.Context) error {
	type result struct {
		memory machine.Memory
		cpu    float64 // of a core, in percent
	}
	got := map[string]result{}
	for node, pid := range map[string]int{edgeNode: b.edge.PID(), stockNode: b.stock.KubeletPID} {
		if err := b.fill(ctx, node); err != nil {
			return fmt.Errorf("%s: %w", node, err)
		}
		if err := sleep(ctx, settle); err != nil {
			return err
		}
		before, err := machine.CPUOf(pid)
		if err != nil {
			return err
		}
		began := time.Now()
		if err := sleep(ctx, b.idle); err != nil {
			return err
		}
		after, err := machine.CPUOf(pid)
		if err != nil {
			return err
		}
		r := result{cpu: 100 * (after - before) / time.Since(began).Seconds()}
		if r.memory, err = machine.MemoryOf(pid); err != nil {
			return err
		}
		got[node] = r
		if err := b.deleteAll(ctx, node); err != nil {
			return err
		}
	}
	ours, theirs := got[edgeNode], got[stockNode]
	mb := func(kb float64) float64 { return kb / 1000 * 1.024 }
	pss, anon := mb(theirs.memory.PSS), mb(theirs.memory.Anon)
	b.r.add(figure{Name: fmt.Sprintf("agent PSS, %d pods", b.pods), Unit: "MB", Ours: mb(ours.memory.PSS), Bound: 42, Kubelet: &pss, RatioBound: 0.35})
	b.r.add(figure{Name: "  of which anonymous", Unit: "MB", Ours: mb(ours.memory.Anon), Bound: 15, Kubelet: &anon})
	b.r.add(figure{Name: fmt.Sprintf("idle CPU, %d pods", b.pods), Unit: "%", Ours: ours.cpu, Bound: 0.5, Kubelet: &theirs.cpu, Detail: fmt.Sprintf("of a core, over %s", b.idle)})
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// restart kills the agent with running pods. One container ends meanwhile, so
// that there is something to notice.
func (b *bench) restart(ctx context.Context) error {
	if err := b.fill(ctx, edgeNode); err != nil {
		return err
	}
	one := newPod(edgeNode, "notice")
	one.Spec.RestartPolicy = corev1.RestartPolicyNever
	if _, err := b.kube.CoreV1().Pods(namespace).Create(ctx, one, metav1.CreateOptions{}); err != nil {
		return err
	}
	if _, _, err := waitLive(ctx, b.edge.Runtime, time.Now(), b.pods+1); err != nil {
		return err
	}
	var id string
	if err := poll(ctx, 50*time.Millisecond, func(ctx context.Context) error {
		p, err := b.kube.CoreV1().Pods(namespace).Get(ctx, one.Name, metav1.GetOptions{})
		if err != nil || p.Status.Phase != corev1.PodRunning {
			return errors.Join(err, errors.New("the pod that is to end is not Running"))
		}
		id = strings.TrimPrefix(p.Status.ContainerStatuses[0].ContainerID, "containerd://")
		return nil
	}); err != nil {
		return err
	}
	before, err := live(ctx, b.edge.Runtime)
	if err != nil {
		return err
	}
	b.edge.Kill()
	if err := killContainer(b.edge.Runtime, id); err != nil {
		return err
	}
	delete(before, id)
	if err := poll(ctx, 20*time.Millisecond, func(ctx context.Context) error {
		now, err := live(ctx, b.edge.Runtime)
		if err == nil && len(now) != len(before) {
			err = fmt.Errorf("%d containers run, want %d", len(now), len(before))
		}
		return err
	}); err != nil {
		return err
	}
	cctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	w, err := b.kube.CoreV1().Pods(namespace).Watch(cctx, metav1.ListOptions{FieldSelector: "metadata.name=" + one.Name})
	if err != nil {
		return err
	}
	defer w.Stop()
	began := time.Now()
	if err := b.startEdge(ctx); err != nil {
		return err
	}
	right := time.Duration(0)
	for right == 0 {
		select {
		case ev := <-w.ResultChan():
			if p, ok := ev.Object.(*corev1.Pod); ok && p.Status.Phase == corev1.PodFailed || ok && p.Status.Phase == corev1.PodSucceeded {
				right = time.Since(began)
			}
		case <-cctx.Done():
			return fmt.Errorf("no word in Kubernetes that the container has ended: %w", cctx.Err())
		}
	}
	// Whatever the agent does to what it finds, it has done by now.
	if err := sleep(ctx, 5*time.Second); err != nil {
		return err
	}
	after, err := live(ctx, b.edge.Runtime)
	if err != nil {
		return err
	}
	touched := len(before)
	for id, created := range before {
		if after[id] == created {
			touched--
		}
	}
	for id := range maps.Keys(after) {
		if _, ok := before[id]; !ok {
			touched++
		}
	}
	if touched > 0 {
		b.r.Failed = append(b.r.Failed, fmt.Sprintf("restart: %d containers were touched", touched))
	}
	b.r.add(figure{
		Name: "agent restart → status right in Kubernetes", Unit: "s", Ours: right.Seconds(), Bound: 1,
		Detail: fmt.Sprintf("from exec until the end of a container is known that ended meanwhile; of %d other containers %d were touched", len(before), touched),
	})
	return b.deleteAll(ctx, edgeNode)
}

// killContainer kills a container's first process with SIGKILL.
func killContainer(rt *testruntime.Runtime, id string) error {
	files, err := filepath.Glob(filepath.Join(rt.Dir, "state", "io.containerd.runtime.v2.task", "k8s.io", id, "init.pid"))
	if err != nil || len(files) != 1 {
		return errors.Join(err, fmt.Errorf("no process of container %s", id))
	}
	b, err := os.ReadFile(files[0])
	if err != nil {
		return err
	}
	var pid int
	if _, err := fmt.Sscan(string(b), &pid); err != nil {
		return err
	}
	p, err := os.FindProcess(pid)
	if err != nil {
		return err
	}
	return p.Kill()
}

// restore kills the agent and all containers while the cloud is down, and then
// starts the agent.
func (b *bench) restore(ctx context.Context) error {
	if err := b.fill(ctx, edgeNode); err != nil {
		return err
	}
	if _, _, err := waitLive(ctx, b.edge.Runtime, time.Now(), b.pods); err != nil {
		return err
	}
	var first, all []time.Duration
	b.s.Cloud.Kill()
	for range restores {
		b.edge.Kill()
		if err := b.edge.Runtime.KillContainers(); err != nil {
			return err
		}
		if err := poll(ctx, 20*time.Millisecond, func(ctx context.Context) error {
			m, err := live(ctx, b.edge.Runtime)
			if err == nil && len(m) > 0 {
				err = fmt.Errorf("%d containers still run", len(m))
			}
			return err
		}); err != nil {
			return err
		}
		began := time.Now()
		if err := b.startEdge(ctx); err != nil {
			return err
		}
		f, a, err := waitLive(ctx, b.edge.Runtime, began, b.pods)
		if err != nil {
			return err
		}
		first, all = append(first, f), append(all, a)
	}
	b.r.add(figure{Name: "offline restore, first pod", Unit: "s", Ours: median(first), Bound: 1, Detail: fmt.Sprintf("median of %d; %s; agent and containers killed, cloud down; from exec until its container runs", restores, extremes(first))})
	b.r.add(figure{Name: fmt.Sprintf("offline restore, %d pods", b.pods), Unit: "s", Ours: median(all), Bound: 2, Detail: extremes(all)})
	if err := b.s.StartCloud(ctx); err != nil {
		return err
	}
	return b.deleteAll(ctx, edgeNode)
}

const restores = 5

// cloudReturns creates pods while the cloud's process is down.
func (b *bench) cloudReturns(ctx context.Context) error {
	b.s.Cloud.Kill()
	if err := sleep(ctx, settle); err != nil { // an outage that the node has noticed, with its pauses between attempts
		return err
	}
	for i := range b.pods {
		if _, err := b.kube.CoreV1().Pods(namespace).Create(ctx, newPod(edgeNode, fmt.Sprintf("%s-%d", edgeNode, i)), metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	cctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	w, err := b.kube.CoreV1().Pods(namespace).Watch(cctx, metav1.ListOptions{LabelSelector: "bench=" + edgeNode})
	if err != nil {
		return err
	}
	defer w.Stop()
	began := time.Now()
	if err := b.s.StartCloud(ctx); err != nil {
		return err
	}
	up := time.Since(began)
	took, err := running(cctx, w, began, b.pods)
	if err != nil {
		return err
	}
	b.r.add(figure{
		Name: fmt.Sprintf("cloud process back → %d new pods Running", b.pods), Unit: "s", Ours: took[len(took)-1].Seconds(), Bound: 5,
		Detail: fmt.Sprintf("from its exec after %s away; it served after %.2f s; the first pod after %.2f s", settle, up.Seconds(), took[0].Seconds()),
	})
	return b.deleteAll(ctx, edgeNode)
}

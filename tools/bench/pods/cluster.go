package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/tools/stack"
	"github.com/fairlead-io/fairlead/tools/testruntime"
)

// patience bounds every wait; nothing is measured by it.
const patience = 3 * time.Minute

const namespace = metav1.NamespaceDefault

// newPod is a pod with one container that does nothing, as small as one gets.
func newPod(node, name string) *corev1.Pod {
	grace := int64(1)
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"bench": node}},
		Spec: corev1.PodSpec{
			NodeName:                      node,
			TerminationGracePeriodSeconds: &grace,
			DNSPolicy:                     corev1.DNSDefault,
			Containers: []corev1.Container{{
				Name: "c", Image: testruntime.Busybox, ImagePullPolicy: corev1.PullIfNotPresent,
				Command:   []string{"sh", "-c", "trap 'exit 0' TERM; sleep 1000000 & wait"},
				Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("8Mi")}},
			}},
		},
	}
}

// poll repeats f until it gives no error.
func poll(ctx context.Context, every time.Duration, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		err := f(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not in %s: %w", patience, err)
		case <-time.After(every):
		}
	}
}

func (b *bench) waitNode(ctx context.Context, name string) error {
	return poll(ctx, 100*time.Millisecond, func(ctx context.Context) error {
		n, err := b.kube.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range n.Status.Conditions {
			if c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue {
				return nil
			}
		}
		return fmt.Errorf("node %s is not Ready: %v", name, n.Status.Conditions)
	})
}

// waitNamespace waits for what every pod needs of its namespace.
func (b *bench) waitNamespace(ctx context.Context) error {
	return poll(ctx, 100*time.Millisecond, func(ctx context.Context) error {
		_, err := b.kube.CoreV1().ServiceAccounts(namespace).Get(ctx, "default", metav1.GetOptions{})
		_, err2 := b.kube.CoreV1().ConfigMaps(namespace).Get(ctx, "kube-root-ca.crt", metav1.GetOptions{})
		return errors.Join(err, err2)
	})
}

// createAndWait creates pods on a node at once and gives, for each that is
// Running, how long after begin that was seen by a watch.
func (b *bench) createAndWait(ctx context.Context, node string, count int) ([]time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	w, err := b.kube.CoreV1().Pods(namespace).Watch(ctx, metav1.ListOptions{LabelSelector: "bench=" + node})
	if err != nil {
		return nil, err
	}
	defer w.Stop()
	begin := time.Now()
	for i := range count {
		if _, err := b.kube.CoreV1().Pods(namespace).Create(ctx, newPod(node, fmt.Sprintf("%s-%d", node, i)), metav1.CreateOptions{}); err != nil {
			return nil, err
		}
	}
	return running(ctx, w, begin, count)
}

func running(ctx context.Context, w watch.Interface, begin time.Time, count int) ([]time.Duration, error) {
	seen := map[string]bool{}
	var took []time.Duration
	for len(seen) < count {
		select {
		case ev, ok := <-w.ResultChan():
			if !ok {
				return nil, fmt.Errorf("the watch ended with %d of %d pods Running", len(seen), count)
			}
			p, ok := ev.Object.(*corev1.Pod)
			if ok && ev.Type != watch.Deleted && p.Status.Phase == corev1.PodRunning && !seen[p.Name] {
				seen[p.Name] = true
				took = append(took, time.Since(begin))
			}
		case <-ctx.Done():
			return nil, fmt.Errorf("%d of %d pods are Running: %w", len(seen), count, ctx.Err())
		}
	}
	return took, nil
}

// deleteAll deletes a node's pods and waits until they are gone.
func (b *bench) deleteAll(ctx context.Context, node string) error {
	opts := metav1.ListOptions{LabelSelector: "bench=" + node}
	if err := b.kube.CoreV1().Pods(namespace).DeleteCollection(ctx, metav1.DeleteOptions{}, opts); err != nil {
		return err
	}
	return poll(ctx, 50*time.Millisecond, func(ctx context.Context) error {
		l, err := b.kube.CoreV1().Pods(namespace).List(ctx, opts)
		if err != nil {
			return err
		}
		if len(l.Items) > 0 {
			return fmt.Errorf("%d pods of %s are still there", len(l.Items), node)
		}
		return nil
	})
}

// live are the running containers of a runtime: id → when it was made.
func live(ctx context.Context, rt *testruntime.Runtime) (map[string]int64, error) {
	l, err := stack.Containers(ctx, rt)
	if err != nil {
		return nil, err
	}
	m := map[string]int64{}
	for _, c := range l {
		if c.State == runtimeapi.ContainerState_CONTAINER_RUNNING {
			m[c.Id] = c.CreatedAt
		}
	}
	return m, nil
}

// waitLive waits for the first running container and for count of them, asking
// the runtime every 50 ms; times are since begin.
func waitLive(ctx context.Context, rt *testruntime.Runtime, begin time.Time, count int) (first, all time.Duration, err error) {
	err = poll(ctx, 50*time.Millisecond, func(ctx context.Context) error {
		m, err := live(ctx, rt)
		if err != nil {
			return err
		}
		if len(m) > 0 && first == 0 {
			first = time.Since(begin)
		}
		if len(m) < count {
			return fmt.Errorf("%d of %d containers run", len(m), count)
		}
		all = time.Since(begin)
		return nil
	})
	return first, all, err
}

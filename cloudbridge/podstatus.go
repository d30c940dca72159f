package cloudbridge

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"sync"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// written remembers what was written last, by object.
type written[T any] struct {
	mu   sync.Mutex
	last map[string]T
}

func (w *written[T]) get(name string) (T, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	v, ok := w.last[name]
	return v, ok
}

func (w *written[T]) put(name string, v T) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.last == nil {
		w.last = map[string]T{}
	}
	w.last[name] = v
}

func (w *written[T]) drop(name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.last, name)
}

// writePod carries a pod's reported status into Kubernetes.
func (s *status) writePod(ctx context.Context, name string) error {
	p, ok := get[corev1.Pod](s.in.pods, name)
	if !ok {
		s.pods.drop(name)
		return nil
	}
	r, ok := s.mirror.pod(p.Spec.NodeName, name)
	if !ok || r.UID != string(p.UID) || len(r.Status) == 0 {
		return nil // a pod of the same name that was before, or nothing to say
	}
	if last, ok := s.pods.get(name); ok && last.UID == r.UID && bytes.Equal(last.Status, r.Status) {
		return nil
	}
	// The uid makes the API server refuse a patch of another pod of that name.
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": p.UID}, "status": r.Status})
	if err != nil {
		return fmt.Errorf("pod status: %w", err)
	}
	_, err = s.kube.CoreV1().Pods(p.Namespace).Patch(ctx, p.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	err = s.count("pod", err)
	switch {
	case apierrors.IsInvalid(err) || apierrors.IsBadRequest(err):
		s.log.Error("kubernetes refuses a pod's status as the node reports it", "pod", name, "node", p.Spec.NodeName, "error", err)
	case err != nil:
		return fmt.Errorf("patch pod status: %w", err)
	}
	s.pods.put(name, r)
	return nil
}

// endPod finishes the deletion of a pod on a node whose agent runs no pods:
// nobody there will ever say that it ended, and it would hang in Terminating.
func (s *status) endPod(ctx context.Context, name string) error {
	p, ok := get[corev1.Pod](s.in.pods, name)
	if !ok || p.DeletionTimestamp == nil {
		return nil
	}
	v := s.mirror.node(p.Spec.NodeName)
	if v.node == nil || v.node.Pods {
		return nil
	}
	now := int64(0)
	err := s.kube.CoreV1().Pods(p.Namespace).Delete(ctx, p.Name, metav1.DeleteOptions{
		GracePeriodSeconds: &now, Preconditions: &metav1.Preconditions{UID: &p.UID},
	})
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil
	}
	if s.count("pod", err) != nil {
		return fmt.Errorf("finish deletion of pod: %w", err)
	}
	return nil
}

package pods

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/edge/pods/logs"
	"github.com/fairlead-io/fairlead/edge/pods/podstatus"
	"github.com/fairlead-io/fairlead/edge/pods/spec"
)

// TestBackoffClock: the clock of a node without a battery is set back after
// containers have ended; they do not wait for the time that was.
func TestBackoffClock(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	b := backoff{delay: backoffFirst, at: now.Add(24 * time.Hour)}
	if got := b.left(now.Add(24*time.Hour), now); got != backoffFirst {
		t.Errorf("waits %s", got)
	}
}

// TestLiveLogs: the log of a container that the runtime has no more is not written.
func TestLiveLogs(t *testing.T) {
	e := &Engine{}
	e.node.Store(&spec.Node{LogRoot: t.TempDir()})
	e.mu.pods, e.mu.desired, e.mu.ids = map[types.UID]*pod{}, map[string]*pod{}, map[string]types.UID{}
	e.mu.logs = map[types.UID][]logs.Live{}
	p := &pod{e: e, uid: "u"}
	p.mu.spec = &corev1.Pod{}
	p.mu.spec.Namespace, p.mu.spec.Name, p.mu.spec.UID = "default", "a", "u"
	e.mu.pods["u"] = p
	show := func(ids ...string) {
		s := &seen{}
		for _, id := range ids {
			s.containers = append(s.containers, podstatus.Container{Name: "main", ID: id, State: runtimeapi.ContainerState_CONTAINER_RUNNING})
		}
		e.learn(p, ids)
		e.watchLogs(p, s)
	}
	show("one")
	show("two")
	if l := e.liveLogs(); len(l) != 1 || l[0].ContainerID != "two" {
		t.Errorf("logs: %v", l)
	}
	e.forget(p)
	if l := e.liveLogs(); len(l) != 0 {
		t.Errorf("logs of nobody: %v", l)
	}
}

// TestNodeFor: what the runtime can do for a pod is what its class's handler can,
// and one pod's handler is nobody else's.
func TestNodeFor(t *testing.T) {
	e := &Engine{}
	e.node.Store(&spec.Node{Runtime: spec.Runtime{Handlers: map[string]spec.Handler{"slim": {RecursiveReadOnly: true}}}})
	e.mu.pods = map[types.UID]*pod{}
	class := func(uid types.UID, handler string) *corev1.Pod {
		p := &pod{}
		p.mu.handler = handler
		e.mu.pods[uid] = p
		out := &corev1.Pod{Spec: corev1.PodSpec{RuntimeClassName: new("fast")}}
		out.UID = uid
		return out
	}
	if !e.recursiveReadOnly(class("a", "slim")) {
		t.Error("the handler's abilities do not count")
	}
	if e.recursiveReadOnly(class("b", "")) || e.recursiveReadOnly(&corev1.Pod{}) || e.node.Load().Runtime.Classes != nil {
		t.Error("another pod has the handler's abilities")
	}
}

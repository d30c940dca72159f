package cloudbridge

import (
	"context"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"

	"github.com/fairlead-io/fairlead/schemas/topic"
)

// statusWorkers write to the API server, each one at a time.
const statusWorkers = 8

// status brings Kubernetes in line with what the nodes report.
type status struct {
	kube   kubernetes.Interface
	dyn    dynamic.Interface
	in     *informers
	mirror *mirror
	truth  *truth
	pace   *pace
	log    *slog.Logger
	now    clock
	queue  queue
	writes *prometheus.CounterVec

	// written holds objects that were written and that the informers do not
	// show yet.
	devices written[deviceObject]
	pods    written[podWritten]
	statics written[string] // why a static pod gets no mirror pod
}

func newStatus(kube kubernetes.Interface, dyn dynamic.Interface, in *informers, m *mirror, t *truth, p *pace, log *slog.Logger) *status {
	return &status{kube: kube, dyn: dyn, in: in, mirror: m, truth: t, pace: p, log: log, now: time.Now, queue: newQueue()}
}

func (s *status) shutDown() { s.queue.ShutDown() }

// settled follows the computing of a device's topics, so that its status knows
// the revs of its wishes.
func (s *status) settled(name string, changed bool) {
	d, ok := get[deviceObject](s.in.devices, name)
	if !ok {
		s.queue.Add(key{kindDevice, name}) // to forget it
		return
	}
	// Not after every event: each write of a status is one.
	if changed || d.Status.ObservedGeneration != d.Generation || d.Status.State == "" {
		s.device(name, true)
	}
}

// device plans a device's status.
func (s *status) device(name string, urgent bool) {
	if wait, ok := s.pace.plan(name, urgent, s.now()); ok {
		s.queue.AddAfter(key{kindDevice, name}, wait)
	}
}

// node plans everything about a node whose link changed.
func (s *status) node(name string) {
	s.queue.Add(key{kindNode, name})
	s.queue.Add(key{kindLease, name})
	for _, d := range indexed(s.in.devices, byNode, name) {
		s.device(d, true)
	}
}

// reported plans what a report changes.
func (s *status) reported(n news) {
	switch n.kind {
	case topic.KindReportedLink:
		if n.linkChanged {
			s.node(n.node)
		} else {
			s.queue.Add(key{kindNode, n.node})
		}
	case topic.KindReportedNode:
		s.queue.Add(key{kindNode, n.node})
		for _, p := range indexed(s.in.pods, byNode, n.node) {
			s.queue.Add(key{kindPodEnded, p})
		}
	case topic.KindReportedPod:
		s.queue.Add(key{kindPod, n.object})
		p, _ := get[corev1.Pod](s.in.pods, n.object)
		if _, static := s.mirror.static(n.node, n.object); static || p != nil && isMirrorPod(p) && p.Spec.NodeName == n.node {
			s.queue.Add(key{kindStatic, n.node + "/" + n.object})
		}
	default:
		s.device(n.object, n.urgent)
	}
}

// everything plans all there is, for the start and after a reconnect.
func (s *status) everything() {
	nodes := map[string]struct{}{}
	for _, n := range s.in.nodes.GetIndexer().ListKeys() {
		nodes[n] = struct{}{}
	}
	for _, n := range s.mirror.nodes() {
		nodes[n] = struct{}{}
	}
	for n := range nodes {
		s.queue.Add(key{kindNode, n})
		s.queue.Add(key{kindLease, n})
		if s.mirror.node(n).state == linkUnknown {
			// Once more when the time to come back is over.
			s.queue.AddAfter(key{kindGrace, n}, s.mirror.grace+time.Second)
		}
	}
	for _, d := range s.in.devices.GetIndexer().ListKeys() {
		s.device(d, true)
	}
	for n := range nodes {
		s.podsOf(n)
	}
}

// pod plans what concerns a pod on an edge node.
func (s *status) pod(name string) {
	p, ok := get[corev1.Pod](s.in.pods, name)
	if !ok || !s.in.isEdge(p.Spec.NodeName) {
		s.queue.Add(key{kindPod, name}) // to forget it
		return
	}
	if p.DeletionTimestamp != nil {
		s.queue.Add(key{kindPodEnded, name})
	}
	if isMirrorPod(p) {
		s.queue.Add(key{kindStatic, p.Spec.NodeName + "/" + name})
	}
	s.queue.Add(key{kindPod, name})
}

// podsOf plans what concerns all pods of a node.
func (s *status) podsOf(node string) {
	for _, p := range indexed(s.in.pods, byNode, node) {
		s.pod(p)
	}
	for _, p := range s.mirror.staticPods(node) {
		s.queue.Add(key{kindStatic, node + "/" + p})
	}
}

// watch registers the handlers that fill the queue, but for devices: see settled.
func (s *status) watch() error {
	if err := s.in.handle(s.in.pods, func(name string, was, is any) {
		if p, ok := was.(*corev1.Pod); ok && is == nil && s.in.isEdge(p.Spec.NodeName) {
			s.queue.Add(key{kindStatic, p.Spec.NodeName + "/" + name}) // what is still there gets its mirror again
		}
		if s.concernsEdge(was) || s.concernsEdge(is) {
			s.pod(name)
		}
	}); err != nil {
		return err
	}
	return s.in.handle(s.in.nodes, func(name string, was, is any) {
		s.queue.Add(key{kindNode, name})
		if was == nil {
			s.queue.Add(key{kindLease, name})
		}
		if was == nil || readyChanged(was, is) {
			s.podsOf(name)
		}
	})
}

// concernsEdge tells whether a pod is on an edge node.
func (s *status) concernsEdge(o any) bool {
	p, ok := o.(*corev1.Pod)
	return ok && s.in.isEdge(p.Spec.NodeName)
}

// readyChanged tells whether a Node became Ready or stopped being so.
func readyChanged(was, is any) bool {
	a, ok := was.(*corev1.Node)
	b, ok2 := is.(*corev1.Node)
	if !ok || !ok2 {
		return false
	}
	ca, cb := nodeCondition(&a.Status, corev1.NodeReady), nodeCondition(&b.Status, corev1.NodeReady)
	return ca.Status != cb.Status || ca.Reason != cb.Reason
}

// run is one worker.
func (s *status) run(ctx context.Context) {
	for {
		k, stop := s.queue.Get()
		if stop {
			return
		}
		err := s.do(ctx, k)
		switch {
		case err == nil, apierrors.IsNotFound(err):
			// What is gone needs no status; an event tells if it comes back.
			s.queue.Forget(k)
		case ctx.Err() != nil:
		default:
			if s.queue.NumRequeues(k) == 0 {
				s.log.Warn("cannot write to kubernetes, will retry", "kind", k.kind.String(), "object", k.name, "error", err)
			}
			s.queue.AddRateLimited(k)
		}
		s.queue.Done(k)
	}
}

func (s *status) do(ctx context.Context, k key) error {
	switch k.kind {
	case kindNode:
		return s.writeNode(ctx, k.name)
	case kindLease:
		return s.renew(ctx, k.name)
	case kindGrace:
		s.node(k.name)
		return nil
	case kindDevice:
		return s.writeDevice(ctx, k.name)
	case kindPod:
		return s.writePod(ctx, k.name)
	case kindPodEnded:
		return s.endPod(ctx, k.name)
	case kindStatic:
		return s.writeStatic(ctx, k.name)
	default:
		return nil
	}
}

// count records a write and passes its error on.
func (s *status) count(what string, err error) error {
	outcome := "ok"
	if err != nil {
		outcome = "error"
	}
	s.writes.WithLabelValues(what, outcome).Inc()
	return err
}

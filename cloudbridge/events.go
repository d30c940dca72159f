package cloudbridge

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/flowcontrol"

	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

const (
	// eventWorkers write Events, each one at a time, eventRate of them a second
	// together, so that Leases and statuses do not wait for them.
	eventWorkers = 2
	eventRate    = 50
	eventBurst   = 100
	// maxEvents and maxNodeEvents bound the Events that wait, of all nodes and of
	// one. One that comes beyond is dropped and counted; one with the id of an Event
	// that waits takes its place.
	maxEvents     = 8192
	maxNodeEvents = 256
	// eventTries is how often one Event is tried again, as by the kubelet: for more
	// than two minutes.
	eventTries = 12
	// maxEventMessage bounds an Event's message in bytes.
	maxEventMessage = 4096
)

// Why an Event was dropped.
const (
	eventMalformed   = "malformed"    // it cannot be read, or says another thing than its topic
	eventForeign     = "foreign"      // about an object that is not the node's
	eventFull        = "full"         // too many wait
	eventNoNamespace = "no_namespace" // its namespace is gone, or going
	eventRefused     = "refused"      // the API server does not take it
	eventFailed      = "failed"       // the API server could not be reached
)

// events carries the nodes' Kubernetes events into Kubernetes.
type events struct {
	kube  kubernetes.Interface
	in    *informers
	log   *slog.Logger
	queue queue
	limit flowcontrol.RateLimiter
	count func(what string, err error) error
	drops *prometheus.CounterVec

	mu struct {
		sync.Mutex
		waiting map[string]nodeEvent // by namespace/id
		nodes   map[string]int       // how many of a node wait
	}
}

// nodeEvent is an event with the node that told of it.
type nodeEvent struct {
	node string
	payload.KubernetesEvent
}

func newEvents(kube kubernetes.Interface, in *informers, log *slog.Logger, count func(string, error) error, drops *prometheus.CounterVec) *events {
	e := &events{kube: kube, in: in, log: log, queue: newQueue(), limit: flowcontrol.NewTokenBucketRateLimiter(eventRate, eventBurst), count: count, drops: drops}
	e.mu.waiting, e.mu.nodes = map[string]nodeEvent{}, map[string]int{}
	return e
}

func (e *events) shutDown() { e.queue.ShutDown() }

func (e *events) drop(reason string) { e.drops.WithLabelValues(reason).Inc() }

// put takes an event from a node. It does not wait.
func (e *events) put(p topic.Parsed, b []byte) {
	ev := nodeEvent{node: p.Node}
	if err := ev.read(p, b); err != nil {
		e.drop(eventMalformed)
		e.log.Warn("a node's event ignored", "node", p.Node, "topic", p.Topic(), "error", err)
		return
	}
	if err := e.mayTell(ev); err != nil {
		e.drop(eventForeign)
		e.log.Warn("a node's event ignored", "node", p.Node, "topic", p.Topic(), "error", err)
		return
	}
	name := p.Namespace + "/" + ev.ID
	e.mu.Lock()
	was, again := e.mu.waiting[name]
	full := !again && (len(e.mu.waiting) >= maxEvents || e.mu.nodes[p.Node] >= maxNodeEvents)
	switch {
	case full:
	case again && was.node != p.Node:
		full = true // two nodes with one id: the first counts
	default:
		if !again {
			e.mu.nodes[p.Node]++
		}
		e.mu.waiting[name] = ev
	}
	e.mu.Unlock()
	if full {
		e.drop(eventFull)
		return
	}
	e.queue.Add(key{kindEvent, name})
}

// read decodes an event and holds it against its topic.
func (ev *nodeEvent) read(p topic.Parsed, b []byte) error {
	if err := payload.Decode(b, &ev.KubernetesEvent); err != nil {
		return err
	}
	ns := ev.Namespace
	if ns == "" {
		ns = metav1.NamespaceDefault
	}
	switch {
	case ns != p.Namespace || ev.Kind != p.Regarding || ev.Name != p.Name:
		return fmt.Errorf("it is about %s %s/%s", ev.Kind, ns, ev.Name)
	case topic.CheckName("id", ev.ID) != nil:
		return topic.CheckName("id", ev.ID)
	case ev.Type != corev1.EventTypeNormal && ev.Type != corev1.EventTypeWarning:
		return fmt.Errorf("type %.40q: want Normal or Warning", ev.Type)
	case ev.Reason == "" || len(ev.Reason) > 128:
		return errors.New("it has no reason, or one of more than 128 bytes")
	case len(ev.Component) > 128 || len(ev.FieldPath) > 512 || len(ev.UID) > 128:
		return errors.New("its component, fieldPath or uid is too long")
	}
	if len(ev.Message) > maxEventMessage {
		ev.Message = strings.ToValidUTF8(ev.Message[:maxEventMessage], "")
	}
	return nil
}

// mayTell refuses an event that is not the node's to tell: it may speak of itself
// and of its pods. A pod that is not known any more, by that uid, shows no events.
func (e *events) mayTell(ev nodeEvent) error {
	switch ev.Kind {
	case "Node":
		if ev.Name != ev.node || ev.Namespace != "" && ev.Namespace != metav1.NamespaceDefault {
			return errors.New("a node tells of itself only")
		}
		return nil
	case "Pod":
		p, ok := get[corev1.Pod](e.in.pods, ev.Namespace+"/"+ev.Name)
		switch {
		case ev.Namespace == "" || ev.UID == "":
			return errors.New("a pod has a namespace and a uid")
		case ok && p.Spec.NodeName != ev.node && (ev.UID == string(p.UID) || ev.UID == podUID(p)):
			return fmt.Errorf("the pod is bound to node %s", p.Spec.NodeName)
		}
		return nil
	default:
		return fmt.Errorf("a node tells of itself and of pods, not of a %s", ev.Kind)
	}
}

// length is how many events wait.
func (e *events) length() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.mu.waiting)
}

// take gives the event of a key, its newest form.
func (e *events) take(name string) (nodeEvent, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	ev, ok := e.mu.waiting[name]
	if ok {
		delete(e.mu.waiting, name)
		if e.mu.nodes[ev.node]--; e.mu.nodes[ev.node] == 0 {
			delete(e.mu.nodes, ev.node)
		}
	}
	return ev, ok
}

// putBack lets an event wait again, unless a newer form does.
func (e *events) putBack(name string, ev nodeEvent) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if _, ok := e.mu.waiting[name]; !ok {
		e.mu.waiting[name] = ev
		e.mu.nodes[ev.node]++
	}
}

// run is one worker.
func (e *events) run(ctx context.Context) {
	for {
		k, stop := e.queue.Get()
		if stop {
			return
		}
		if e.limit.Wait(ctx) != nil {
			e.queue.Done(k)
			return
		}
		ev, ok := e.take(k.name)
		var err error
		if ok {
			err = e.count("event", e.write(ctx, ev))
		}
		switch {
		case err == nil:
			e.queue.Forget(k)
		case ctx.Err() != nil:
		case apierrors.IsNotFound(err), apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
			e.drop(eventNoNamespace)
			e.queue.Forget(k)
		case apierrors.IsInvalid(err), apierrors.IsBadRequest(err), apierrors.IsForbidden(err):
			e.drop(eventRefused)
			e.log.Warn("kubernetes refuses a node's event", "node", ev.node, "event", k.name, "error", err)
			e.queue.Forget(k)
		case e.queue.NumRequeues(k) >= eventTries:
			e.drop(eventFailed)
			e.log.Warn("an event could not be written, it is dropped", "node", ev.node, "event", k.name, "error", err)
			e.queue.Forget(k)
		default:
			e.putBack(k.name, ev)
			e.queue.AddRateLimited(k)
		}
		e.queue.Done(k)
	}
}

// write creates an Event, or brings the one there is up to date.
func (e *events) write(ctx context.Context, ev nodeEvent) error {
	ns := ev.Namespace
	if ns == "" {
		ns = metav1.NamespaceDefault
	}
	api := e.kube.CoreV1().Events(ns)
	update := func() error {
		type step struct {
			Op    string `json:"op"`
			Path  string `json:"path"`
			Value any    `json:"value"`
		}
		patch, err := json.Marshal([]step{
			{"test", "/reportingInstance", ev.node}, // an Event of somebody else's may have the name
			{"add", "/count", ev.Count},
			{"add", "/lastTimestamp", metav1.NewTime(time.UnixMilli(ev.Last))},
			{"add", "/message", ev.Message},
		})
		if err != nil {
			return err
		}
		_, err = api.Patch(ctx, ev.ID, types.JSONPatchType, patch, metav1.PatchOptions{})
		return err
	}
	if ev.Count > 1 { // most likely it is there
		if err := update(); !apierrors.IsNotFound(err) {
			return err
		}
	}
	_, err := api.Create(ctx, ev.object(ns), metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return update()
	}
	return err
}

// object is the Event as the kubelet's would be.
func (ev *nodeEvent) object(ns string) *corev1.Event {
	first := time.UnixMilli(ev.First)
	return &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: ev.ID},
		InvolvedObject: corev1.ObjectReference{
			APIVersion: "v1", Kind: ev.Kind, Namespace: ev.Namespace, Name: ev.Name, UID: types.UID(ev.UID), FieldPath: ev.FieldPath,
		},
		Reason: ev.Reason, Message: ev.Message, Type: ev.Type,
		FirstTimestamp: metav1.NewTime(first), LastTimestamp: metav1.NewTime(time.UnixMilli(ev.Last)), Count: max(ev.Count, 1),
		Source: corev1.EventSource{Component: ev.Component, Host: ev.node}, ReportingController: ev.Component, ReportingInstance: ev.node,
	}
}

package pods

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/edge/pods/podstatus"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// Bus is the node's broker, in the same process. *broker.Broker is one.
type Bus interface {
	Retained(t topic.Topic) ([]byte, bool)
	RetainedMatch(f topic.Filter) []broker.Message
	Publish(ctx context.Context, msgs ...broker.Message) error
	Watch(ctx context.Context, f topic.Filter, fn func(broker.Message)) (stop func(), err error)
}

// inbox holds what changed on the bus, by topic: the reader looks at the newest
// state, so a topic waits once however often it changed.
type inbox struct {
	mu     sync.Mutex
	topics map[topic.Topic]struct{}
	order  []topic.Topic
	signal chan struct{}
}

func newInbox() *inbox {
	return &inbox{topics: map[topic.Topic]struct{}{}, signal: make(chan struct{}, 1)}
}

// put never blocks: it is called on the broker's core.
func (i *inbox) put(t topic.Topic) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if _, ok := i.topics[t]; ok {
		return
	}
	i.topics[t] = struct{}{}
	i.order = append(i.order, t)
	select {
	case i.signal <- struct{}{}:
	default:
	}
}

func (i *inbox) take() []topic.Topic {
	i.mu.Lock()
	defer i.mu.Unlock()
	out := i.order
	i.order, i.topics = nil, map[topic.Topic]struct{}{}
	return out
}

// watchBus keeps the pods and what they refer to up to date, from the bus.
func (e *Engine) watchBus(ctx context.Context) (stop func(), err error) {
	var stops []func()
	stop = func() {
		for _, s := range stops {
			s()
		}
	}
	for _, k := range []topic.Kind{topic.KindDesiredPod, topic.KindDesiredConfigMap, topic.KindDesiredSecret, topic.KindDesiredToken} {
		s, err := e.bus.Watch(ctx, topic.Filter(fmt.Sprintf("%s/%s/%s/#", topic.Root, e.cfg.Node, k)), func(m broker.Message) { e.in.put(m.Topic) })
		if err != nil {
			stop()
			return nil, fmt.Errorf("watch %s: %w", k, err)
		}
		stops = append(stops, s)
	}
	return stop, nil
}

// changed looks at a topic of the bus again.
func (e *Engine) changed(t topic.Topic) {
	parsed, err := topic.Parse(string(t))
	if err != nil {
		return
	}
	if parsed.Kind == topic.KindDesiredPod {
		e.desired(t, parsed)
		return
	}
	ref := reference{parsed.Kind, parsed.Namespace, parsed.Name}
	for _, p := range e.all() {
		p.mu.Lock()
		spec := p.mu.spec
		p.mu.Unlock()
		if refersTo(spec, ref) {
			p.refresh()
		}
	}
}

// reference names something on the bus that pods refer to.
type reference struct {
	kind            topic.Kind
	namespace, name string
}

// refersTo tells whether a pod refers to what changed.
func refersTo(p *corev1.Pod, r reference) bool {
	if p.Namespace != r.namespace {
		return false
	}
	if r.kind == topic.KindDesiredToken {
		return p.Name == r.name
	}
	cm := r.kind == topic.KindDesiredConfigMap
	for _, s := range p.Spec.ImagePullSecrets {
		if !cm && s.Name == r.name {
			return true
		}
	}
	for i := range p.Spec.Volumes {
		v := &p.Spec.Volumes[i]
		if cm && v.ConfigMap != nil && v.ConfigMap.Name == r.name || !cm && v.Secret != nil && v.Secret.SecretName == r.name {
			return true
		}
		if v.Projected == nil {
			continue
		}
		for _, s := range v.Projected.Sources {
			if cm && s.ConfigMap != nil && s.ConfigMap.Name == r.name || !cm && s.Secret != nil && s.Secret.Name == r.name {
				return true
			}
		}
	}
	for c := range containersOf(p) {
		for _, f := range c.EnvFrom {
			if cm && f.ConfigMapRef != nil && f.ConfigMapRef.Name == r.name || !cm && f.SecretRef != nil && f.SecretRef.Name == r.name {
				return true
			}
		}
		for _, v := range c.Env {
			if v.ValueFrom == nil {
				continue
			}
			if k := v.ValueFrom.ConfigMapKeyRef; cm && k != nil && k.Name == r.name {
				return true
			}
			if k := v.ValueFrom.SecretKeyRef; !cm && k != nil && k.Name == r.name {
				return true
			}
		}
	}
	return false
}

// containersOf goes through all containers of a pod: init, main and ephemeral ones.
func containersOf(p *corev1.Pod) func(yield func(*corev1.Container) bool) {
	return func(yield func(*corev1.Container) bool) {
		for i := range p.Spec.InitContainers {
			if !yield(&p.Spec.InitContainers[i]) {
				return
			}
		}
		for i := range p.Spec.Containers {
			if !yield(&p.Spec.Containers[i]) {
				return
			}
		}
		for i := range p.Spec.EphemeralContainers {
			if !yield((*corev1.Container)(&p.Spec.EphemeralContainers[i].EphemeralContainerCommon)) {
				return
			}
		}
	}
}

// containerOf finds a container by its name; nil where there is none.
func containerOf(p *corev1.Pod, name string) *corev1.Container {
	for c := range containersOf(p) {
		if c.Name == name {
			return c
		}
	}
	return nil
}

// desired takes what the bus says of a pod.
func (e *Engine) desired(t topic.Topic, at topic.Parsed) {
	key := at.Namespace + "/" + at.Name
	e.mu.Lock()
	old := e.mu.desired[key]
	e.mu.Unlock()
	if old != nil && old.static {
		return // the node's own; what the cloud has of that name is its mirror
	}
	b, ok := e.bus.Retained(t)
	if !ok {
		e.drop(key, old)
		return
	}
	spec, w, err := decodePod(b)
	if err == nil && (spec.Namespace != at.Namespace || spec.Name != at.Name || spec.UID == "") {
		err = fmt.Errorf("it describes %s/%s, uid %q", spec.Namespace, spec.Name, spec.UID)
	}
	if err != nil {
		// What runs goes on as it was described before.
		e.metrics.badPods.Inc()
		e.log.Error("pod description cannot be read", "topic", t, "error", err)
		return
	}
	if _, mirror := spec.Annotations[corev1.MirrorPodAnnotationKey]; mirror {
		return // of one of our own static pods
	}
	if old != nil && old.uid != spec.UID {
		e.drop(key, old)
	}
	e.put(key, spec, w, false)
}

// drop says that the description of a pod is gone.
func (e *Engine) drop(key string, p *pod) {
	if p == nil {
		return
	}
	e.mu.Lock()
	delete(e.mu.desired, key)
	e.mu.Unlock()
	p.update(func() { p.mu.wanted = false })
}

// decodePod reads the payload of a desired pod.
func decodePod(b []byte) (*corev1.Pod, payload.Pod, error) {
	var w payload.Pod
	if err := payload.Decode(b, &w); err != nil {
		return nil, w, err
	}
	p := &corev1.Pod{}
	if err := json.Unmarshal(w.Metadata, &p.ObjectMeta); err != nil {
		return nil, w, fmt.Errorf("metadata: %w", err)
	}
	if err := json.Unmarshal(w.Spec, &p.Spec); err != nil {
		return nil, w, fmt.Errorf("spec: %w", err)
	}
	if strings.HasPrefix(w.UID, ".") || strings.ContainsAny(w.UID, "/\x00") {
		return nil, w, fmt.Errorf("uid %q: want one that can name a folder", w.UID)
	}
	p.UID = types.UID(w.UID)
	w.Metadata, w.Spec = nil, nil // read; not to be kept a second time
	return p, w, nil
}

// put takes a pod's newest description.
func (e *Engine) put(key string, spec *corev1.Pod, w payload.Pod, static bool) {
	e.mu.Lock()
	p, ok := e.mu.pods[spec.UID]
	if !ok {
		p = e.newPodLocked(spec, static)
		ended := corev1.PodPhase(w.Phase)
		p.closed = !p.known && (ended == corev1.PodSucceeded || ended == corev1.PodFailed)
		p.mu.over = p.mu.over || p.closed
		p.mu.working = true // nobody begins before it was admitted
	} else if p.ends(topic.DesiredPod(e.cfg.Node, spec.Namespace, spec.Name)) {
		e.mu.Unlock()
		return
	}
	e.mu.desired[key] = p
	e.mu.Unlock()
	if !ok {
		e.admit(p, spec)
		p.mu.Lock()
		p.mu.working = false
		p.mu.Unlock()
	}
	p.update(func() {
		p.mu.spec, p.mu.rev, p.mu.services, p.mu.gates, p.mu.handler, p.mu.wanted = spec, w.Rev, w.Services, w.Gates, w.Handler, true
		p.mu.refresh = true // its labels and annotations may be in a volume
	})
}

// ends tells whether the pod is no longer wanted, and notes that it is again: it ends
// nevertheless, as much of it is gone, and then begins anew.
func (p *pod) ends(again topic.Topic) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.wanted {
		return false
	}
	p.mu.again = again
	return true
}

// newPodLocked makes the record of a pod, with what was reported of it before.
func (e *Engine) newPodLocked(spec *corev1.Pod, static bool) *pod {
	p := &pod{
		e: e, uid: spec.UID, static: static, ended: make(chan struct{}), down: map[string]bool{},
		topic: topic.ReportedPod(e.cfg.Node, spec.Namespace, spec.Name),
		log:   e.log.With("pod", spec.Namespace+"/"+spec.Name, "uid", spec.UID),
	}
	p.mu.spec, p.mu.wanted, p.since = spec, true, time.Now()
	p.backoffs, p.waiting = map[string]*backoff{}, map[string]podstatus.Waiting{}
	if b, ok := e.bus.Retained(p.topic); ok {
		var r payload.ReportedPod
		if payload.Decode(b, &r) == nil && r.UID == string(p.uid) && len(r.Status) > 0 {
			p.known = json.Unmarshal(r.Status, &p.status) == nil
			p.gone = r.Gone
			p.mu.over = p.status.Phase == corev1.PodFailed || p.status.Phase == corev1.PodSucceeded
		}
	}
	e.mu.pods[p.uid] = p
	return p
}

// all lists the pods.
func (e *Engine) all() []*pod {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := make([]*pod, 0, len(e.mu.pods))
	for _, p := range e.mu.pods {
		out = append(out, p)
	}
	return out
}

// lookup finds a pod by its UID; nil where there is none.
func (e *Engine) lookup(uid types.UID) *pod {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.mu.pods[uid]
}

// forget drops the record of a pod of which nothing is left.
func (e *Engine) forget(p *pod) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.mu.pods[p.uid] == p {
		delete(e.mu.pods, p.uid)
		delete(e.mu.logs, p.uid)
	}
	for k, o := range e.mu.desired {
		if o == p {
			delete(e.mu.desired, k)
		}
	}
	spec := p.spec()
	for _, o := range e.mu.pods {
		if s := o.spec(); o.static && s.Namespace == spec.Namespace && s.Name == spec.Name {
			o.wake() // it may have waited for this one
		}
	}
}

// inTurn tells whether a static pod has to wait until another one of its name, in
// whose place it is, has ended.
func (e *Engine) inTurn(p *pod) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	spec := p.spec()
	for _, o := range e.mu.pods {
		if o == p {
			continue
		}
		if w := o.want(); !w.wanted && w.pod.Namespace == spec.Namespace && w.pod.Name == spec.Name {
			return true
		}
	}
	return false
}

// owner tells whether the pod is the one that its name stands for: another one of
// that name, which came after it, has the topic then.
func (e *Engine) owner(p *pod) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	spec := p.spec()
	o := e.mu.desired[spec.Namespace+"/"+spec.Name]
	return o == nil || o == p
}

func (p *pod) spec() *corev1.Pod {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mu.spec
}

// staticOf describes a static pod to the cloud.
func staticOf(p *corev1.Pod) (*payload.StaticPod, error) {
	m := metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name, Labels: p.Labels, Annotations: p.Annotations}
	mb, err := json.Marshal(m)
	sb, err2 := json.Marshal(p.Spec)
	if err = errors.Join(err, err2); err != nil {
		return nil, fmt.Errorf("static pod: %w", err)
	}
	return &payload.StaticPod{Metadata: mb, Spec: sb}, nil
}

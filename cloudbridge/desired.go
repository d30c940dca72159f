package cloudbridge

import (
	"context"
	"log/slog"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"

	"github.com/fairlead-io/fairlead/schemas/topic"
)

// podWorkers read ConfigMaps and Secrets from the API server and have it issue
// tokens, each one at a time.
const podWorkers = 4

type queue = workqueue.TypedRateLimitingInterface[key]

func newQueue() queue {
	return workqueue.NewTypedRateLimitingQueue(
		workqueue.NewTypedItemExponentialFailureRateLimiter[key](100*time.Millisecond, 30*time.Second))
}

// desired keeps the truth in line with Kubernetes.
type desired struct {
	in    *informers
	kube  kubernetes.Interface
	log   *slog.Logger
	now   clock
	truth *truth
	refs  *references
	// touch tells the outbox of topics that changed.
	touch func(...topic.Topic)
	// targetRev is the rev of what the node drives a property to, or 0.
	targetRev func(node, device, prop string) int64
	// settled is told that a device was looked at. changed: its topics, or it
	// cannot be resolved, for whatever reason now.
	settled func(device string, changed bool)
	// sealKey is the key that a node reported, linkUp tells whether its link is up.
	sealKey func(node string) sealTo
	linkUp  func(node string) bool
	// count records a write and passes its error on.
	count func(what string, err error) error
	// heal looks again at a topic that somebody else wrote.
	heal func(topic.Topic)

	// devices holds devices and topics to heal: work without a wait, so that a
	// wish is on its way within a millisecond. pods holds pods, ConfigMaps, Secrets
	// and tokens, which may have to be read from the API server.
	devices, pods queue
}

func (d *desired) shutDown() {
	d.devices.ShutDown()
	d.pods.ShutDown()
}

// set records an object's topics and tells whether they changed.
func (d *desired) set(owner key, want map[topic.Topic][]byte) bool {
	changed := d.truth.replace(owner, want)
	if len(changed) > 0 {
		d.touch(changed...)
	}
	return len(changed) > 0
}

// keep leaves topics as the broker has them while the API server cannot be
// asked: what is not known must not be cleared.
func (d *desired) keep(owner key, topics ...topic.Topic) {
	want := map[topic.Topic][]byte{}
	for _, tp := range topics {
		if p, ok := d.truth.before(tp); ok {
			want[tp] = p
		}
	}
	d.set(owner, want)
}

// first looks at everything once, so that what is on the broker and in no
// object can be told from what was not looked at yet.
func (d *desired) first(ctx context.Context) error {
	for _, name := range d.in.devices.GetIndexer().ListKeys() {
		d.device(name)
	}
	referred := map[key]struct{}{}
	for _, name := range d.in.pods.GetIndexer().ListKeys() {
		touched, err := d.pod(ctx, name)
		if err != nil {
			d.again(d.pods, key{kindPod, name}, err)
		}
		for _, o := range touched {
			referred[o] = struct{}{}
		}
	}
	for o := range referred {
		if o.kind == kindToken { // issuing them all would take a while
			if _, _, _, err := d.holdToken(ctx, o.name); err != nil {
				d.again(d.pods, o, err)
			}
			continue
		}
		if err := d.look(ctx, o); err != nil {
			d.again(d.pods, o, err)
		}
	}
	return ctx.Err()
}

// again tries a key later.
func (d *desired) again(q queue, k key, err error) {
	if q.NumRequeues(k) == 0 {
		d.log.Warn("cannot compute what is desired, will retry", "kind", k.kind.String(), "object", k.name, "error", err)
	}
	q.AddRateLimited(k)
}

// runDevices is the one worker of the devices' queue.
func (d *desired) runDevices() {
	for {
		k, stop := d.devices.Get()
		if stop {
			return
		}
		switch k.kind {
		case kindDevice:
			d.settled(k.name, d.device(k.name))
		case kindHeal:
			d.heal(topic.Topic(k.name))
		}
		d.devices.Done(k)
	}
}

// runPods is one worker of the pods' queue.
func (d *desired) runPods(ctx context.Context) {
	for {
		k, stop := d.pods.Get()
		if stop {
			return
		}
		err := d.look(ctx, k)
		switch {
		case err == nil:
			d.pods.Forget(k)
		case ctx.Err() == nil:
			d.again(d.pods, k, err)
		}
		d.pods.Done(k)
	}
}

// look brings what comes of one object up to date.
func (d *desired) look(ctx context.Context, k key) error {
	switch k.kind {
	case kindPod:
		touched, err := d.pod(ctx, k.name)
		for _, o := range touched {
			d.pods.Add(o)
		}
		return err
	case kindConfigMap:
		return d.configMap(ctx, k.name)
	case kindSecret:
		return d.secret(ctx, k.name)
	case kindToken:
		return d.token(ctx, k.name)
	default:
		return nil
	}
}

// watch registers the handlers that fill the queues.
func (d *desired) watch() error {
	if err := d.in.handle(d.in.devices, func(name string, _, _ any) {
		d.devices.Add(key{kindDevice, name})
	}); err != nil {
		return err
	}
	if err := d.in.handle(d.in.models, func(name string, _, _ any) {
		for _, dev := range indexed(d.in.devices, byModel, name) {
			d.devices.Add(key{kindDevice, dev})
		}
	}); err != nil {
		return err
	}
	if err := d.in.handle(d.in.pods, func(name string, was, is any) {
		if d.concernsEdge(was) || d.concernsEdge(is) {
			d.pods.Add(key{kindPod, name})
		}
	}); err != nil {
		return err
	}
	for k, i := range map[kind]cache.SharedIndexInformer{kindConfigMap: d.in.configMaps, kindSecret: d.in.secrets} {
		if err := d.in.handle(i, func(name string, _, _ any) {
			if len(d.refs.nodes(key{k, name})) > 0 {
				d.pods.Add(key{k, name})
			}
		}); err != nil {
			return err
		}
	}
	return d.in.handle(d.in.nodes, func(name string, was, is any) {
		if was != nil && is != nil {
			return // only coming and going matters to the pods
		}
		for _, pod := range indexed(d.in.pods, byNode, name) {
			d.pods.Add(key{kindPod, pod})
		}
	})
}

// concernsEdge tells whether a pod is, or its topic may be, on an edge node.
func (d *desired) concernsEdge(o any) bool {
	p, ok := o.(*corev1.Pod)
	return ok && (!stripped(p) || d.in.isEdge(p.Spec.NodeName))
}

package cloudbridge

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// encodePod trims a pod to what its node needs.
func encodePod(p *corev1.Pod, services []payload.Service, handler string, rev int64) []byte {
	m := metav1.ObjectMeta{
		Namespace: p.Namespace, Name: p.Name, UID: p.UID, Labels: p.Labels, Generation: p.Generation,
		CreationTimestamp: p.CreationTimestamp, DeletionTimestamp: p.DeletionTimestamp,
		DeletionGracePeriodSeconds: p.DeletionGracePeriodSeconds, OwnerReferences: p.OwnerReferences,
	}
	if len(p.Annotations) > 0 {
		m.Annotations = maps.Clone(p.Annotations)
		delete(m.Annotations, lastApplied) // the whole pod once more
	}
	out := payload.Pod{UID: string(p.UID), Rev: rev, Metadata: payload.Encode(m), Spec: payload.Encode(p.Spec), Services: services, Handler: handler}
	if terminal(p.Status.Phase) {
		out.Phase = string(p.Status.Phase)
	}
	for _, g := range p.Spec.ReadinessGates {
		for _, c := range p.Status.Conditions {
			if c.Type != g.ConditionType {
				continue
			}
			if out.Gates == nil {
				out.Gates = map[string]string{}
			}
			out.Gates[string(c.Type)] = string(c.Status)
		}
	}
	return payload.Encode(out)
}

func terminal(p corev1.PodPhase) bool { return p == corev1.PodSucceeded || p == corev1.PodFailed }

// isMirrorPod tells that a pod stands for one that its node has from a file.
func isMirrorPod(p *corev1.Pod) bool {
	_, ok := p.Annotations[corev1.MirrorPodAnnotationKey]
	return ok
}

// pod brings the pod's topic up to date and gives what has to be looked at with it.
func (d *desired) pod(ctx context.Context, name string) (touched []key, err error) {
	owner, tokens := key{kindPod, name}, key{kindToken, name}
	p, ok := get[corev1.Pod](d.in.pods, name)
	// A mirror pod says what runs at the node, not what should, and a node that
	// made one must not get at the Secrets that it names.
	if !ok || !d.in.isEdge(p.Spec.NodeName) || isMirrorPod(p) {
		d.set(owner, nil)
		return append(d.refs.set(name, "", nil), tokens), nil
	}
	node := p.Spec.NodeName
	tp := topic.DesiredPod(node, p.Namespace, p.Name)
	p, err = d.whole(ctx, p)
	switch {
	case err != nil:
		d.keep(owner, tp)
		return nil, err
	case p == nil:
		return nil, nil // an event follows
	case isMirrorPod(p):
		d.set(owner, nil)
		return nil, nil
	}
	prev, _ := d.truth.before(tp)
	uid := string(p.UID)
	services, handler := d.in.servicesFor(p), ""
	// Only what was so when the pod came counts, as only new containers see it: a
	// Service that changes must not send every pod of its namespace again.
	var was payload.Pod
	if len(prev) > 0 && payload.Decode(prev, &was) == nil && was.UID == uid {
		services, handler = was.Services, was.Handler
	}
	// A class's handler cannot change: who has it need not ask again.
	if handler == "" && p.DeletionTimestamp == nil && !terminal(p.Status.Phase) {
		if handler, err = d.runtimeHandler(ctx, p); err != nil {
			d.keep(owner, tp)
			return nil, err
		}
	}
	d.set(owner, map[topic.Topic][]byte{
		tp: steady(prev, uid, rev(p.ResourceVersion), func(r int64) []byte { return encodePod(p, services, handler, r) }),
	})
	return append(d.refs.set(name, node, referencesOf(p)), tokens), nil
}

// whole gives a pod as it is, where the informer kept its key only: its node became
// an edge node after the informer had seen it. nil is one that is gone.
func (d *desired) whole(ctx context.Context, p *corev1.Pod) (*corev1.Pod, error) {
	if !stripped(p) {
		return p, nil
	}
	full, err := d.kube.CoreV1().Pods(p.Namespace).Get(ctx, p.Name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err) || err == nil && full.UID != p.UID:
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("get pod %s/%s: %w", p.Namespace, p.Name, err)
	}
	return full, nil
}

// classRetry is how often a RuntimeClass that does not exist is asked for again.
const classRetry = time.Minute

// runtimeHandler gives the handler of the pod's RuntimeClass, "" where it names none
// or one that does not exist.
func (d *desired) runtimeHandler(ctx context.Context, p *corev1.Pod) (string, error) {
	name := p.Spec.RuntimeClassName
	if name == nil || *name == "" {
		return "", nil
	}
	c, err := d.kube.NodeV1().RuntimeClasses().Get(ctx, *name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err): // the API server admits no such pod; the class went afterwards
		d.pods.AddAfter(key{kindPod, p.Namespace + "/" + p.Name}, classRetry)
		return "", nil
	case err != nil:
		return "", fmt.Errorf("pod %s/%s: get runtimeclass %s: %w", p.Namespace, p.Name, *name, err)
	}
	return c.Handler, nil
}

// servicesFor lists the Services that a pod's containers get environment variables
// of, as the kubelet chooses them: those of the pod's namespace, unless it does
// not want them, and the API server's, sorted by name.
func (in *informers) servicesFor(p *corev1.Pod) []payload.Service {
	found := map[string]payload.Service{}
	add := func(key string) {
		s, ok := get[corev1.Service](in.services, key)
		if !ok || s.Spec.ClusterIP == "" || s.Spec.ClusterIP == corev1.ClusterIPNone {
			return
		}
		out := payload.Service{Name: s.Name, IP: s.Spec.ClusterIP}
		for _, port := range s.Spec.Ports {
			out.Ports = append(out.Ports, payload.ServicePort{Name: port.Name, Port: port.Port, Protocol: string(port.Protocol)})
		}
		found[s.Name] = out
	}
	add(metav1.NamespaceDefault + "/kubernetes")
	if p.Spec.EnableServiceLinks == nil || *p.Spec.EnableServiceLinks {
		for _, key := range indexed(in.services, cache.NamespaceIndex, p.Namespace) {
			add(key)
		}
	}
	var out []payload.Service
	for _, name := range slices.Sorted(maps.Keys(found)) {
		out = append(out, found[name])
	}
	return out
}

// configMap brings the topics of a ConfigMap up to date, one per node that
// needs it.
func (d *desired) configMap(ctx context.Context, name string) error {
	owner := key{kindConfigMap, name}
	nodes := d.refs.nodes(owner)
	m, ok := get[metav1.PartialObjectMetadata](d.in.configMaps, name)
	if len(nodes) == 0 || !ok {
		d.set(owner, nil)
		return nil
	}
	ns, short, err := cache.SplitMetaNamespaceKey(name)
	if err != nil {
		return nil //nolint:nilerr // no ConfigMap can be called so
	}
	topics := make([]topic.Topic, 0, len(nodes))
	for n := range nodes {
		topics = append(topics, topic.DesiredConfigMap(n, ns, short))
	}
	body, ok := d.sameConfigMap(m, topics)
	if !ok {
		cm, err := d.kube.CoreV1().ConfigMaps(ns).Get(ctx, short, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			d.set(owner, nil)
			return nil
		case err != nil:
			d.keep(owner, topics...)
			return fmt.Errorf("get configmap %s: %w", name, err)
		}
		body = payload.Encode(payload.ConfigMap{
			UID: string(cm.UID), Rev: rev(cm.ResourceVersion), Namespace: ns, Name: short,
			Data: cm.Data, BinaryData: cm.BinaryData,
		})
	}
	want := map[topic.Topic][]byte{}
	for _, tp := range topics {
		want[tp] = body
	}
	d.set(owner, want)
	return nil
}

// sameConfigMap finds the payload of the ConfigMap's present resource version
// among its topics, so that neither a second node nor a restart reads it again.
func (d *desired) sameConfigMap(m *metav1.PartialObjectMetadata, topics []topic.Topic) ([]byte, bool) {
	for _, tp := range topics {
		prev, ok := d.truth.before(tp)
		var p payload.ConfigMap
		if ok && payload.Decode(prev, &p) == nil && p.UID == string(m.UID) && p.Rev == rev(m.ResourceVersion) {
			return prev, true
		}
	}
	return nil, false
}

package cloudbridge

import (
	"context"
	"fmt"
	"maps"
	"sync"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// podPayload is fl/<node>/desired/pod/<ns>/<name>.
type podPayload struct {
	UID      string            `json:"uid"`
	Rev      int64             `json:"rev"`
	Metadata metav1.ObjectMeta `json:"metadata"`
	Spec     corev1.PodSpec    `json:"spec"`
}

// configMapPayload is fl/<node>/desired/configmap/<ns>/<name>.
type configMapPayload struct {
	UID        string            `json:"uid"`
	Rev        int64             `json:"rev"`
	Namespace  string            `json:"namespace"`
	Name       string            `json:"name"`
	Data       map[string]string `json:"data,omitempty"`
	BinaryData map[string][]byte `json:"binaryData,omitempty"`
}

// encodePod trims a pod to what its node needs.
func encodePod(p *corev1.Pod, rev int64) []byte {
	m := metav1.ObjectMeta{
		Namespace: p.Namespace, Name: p.Name, UID: p.UID, Labels: p.Labels,
		DeletionTimestamp: p.DeletionTimestamp, DeletionGracePeriodSeconds: p.DeletionGracePeriodSeconds,
		OwnerReferences: p.OwnerReferences,
	}
	if len(p.Annotations) > 0 {
		m.Annotations = maps.Clone(p.Annotations)
		delete(m.Annotations, lastApplied) // the whole pod once more
	}
	return payload.Encode(podPayload{UID: string(p.UID), Rev: rev, Metadata: m, Spec: p.Spec})
}

// configMapsOf lists the ConfigMaps, as namespace/name, that a pod refers to.
func configMapsOf(p *corev1.Pod) map[string]struct{} {
	out := map[string]struct{}{}
	add := func(name string) {
		if name != "" {
			out[p.Namespace+"/"+name] = struct{}{}
		}
	}
	for _, v := range p.Spec.Volumes {
		if v.ConfigMap != nil {
			add(v.ConfigMap.Name)
		}
		if v.Projected != nil {
			for _, s := range v.Projected.Sources {
				if s.ConfigMap != nil {
					add(s.ConfigMap.Name)
				}
			}
		}
	}
	env := func(vars []corev1.EnvVar, from []corev1.EnvFromSource) {
		for _, e := range vars {
			if e.ValueFrom != nil && e.ValueFrom.ConfigMapKeyRef != nil {
				add(e.ValueFrom.ConfigMapKeyRef.Name)
			}
		}
		for _, f := range from {
			if f.ConfigMapRef != nil {
				add(f.ConfigMapRef.Name)
			}
		}
	}
	for i := range p.Spec.InitContainers {
		env(p.Spec.InitContainers[i].Env, p.Spec.InitContainers[i].EnvFrom)
	}
	for i := range p.Spec.Containers {
		env(p.Spec.Containers[i].Env, p.Spec.Containers[i].EnvFrom)
	}
	for i := range p.Spec.EphemeralContainers {
		env(p.Spec.EphemeralContainers[i].Env, p.Spec.EphemeralContainers[i].EnvFrom)
	}
	return out
}

// references remembers which pod refers to which ConfigMaps on which node.
type references struct {
	mu struct {
		sync.Mutex
		pods map[string]reference
		// users holds the pods of a ConfigMap.
		users map[string]map[string]struct{}
	}
}

type reference struct {
	node       string
	configMaps map[string]struct{}
}

func newReferences() *references {
	r := &references{}
	r.mu.pods = map[string]reference{}
	r.mu.users = map[string]map[string]struct{}{}
	return r
}

// set records a pod's references and gives the ConfigMaps that have to be
// looked at again. An empty node forgets the pod.
func (r *references) set(pod, node string, configMaps map[string]struct{}) (touched []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	old := r.mu.pods[pod]
	if node == "" {
		configMaps = nil
	}
	for cm := range old.configMaps {
		if _, ok := configMaps[cm]; ok && old.node == node {
			continue
		}
		delete(r.mu.users[cm], pod)
		if len(r.mu.users[cm]) == 0 {
			delete(r.mu.users, cm)
		}
		touched = append(touched, cm)
	}
	for cm := range configMaps {
		if r.mu.users[cm] == nil {
			r.mu.users[cm] = map[string]struct{}{}
		}
		if _, ok := r.mu.users[cm][pod]; !ok {
			r.mu.users[cm][pod] = struct{}{}
			touched = append(touched, cm)
		}
	}
	if len(configMaps) == 0 {
		delete(r.mu.pods, pod)
	} else {
		r.mu.pods[pod] = reference{node, configMaps}
	}
	return touched
}

// nodes lists the nodes that need the ConfigMap.
func (r *references) nodes(configMap string) map[string]struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := map[string]struct{}{}
	for pod := range r.mu.users[configMap] {
		out[r.mu.pods[pod].node] = struct{}{}
	}
	return out
}

// pod brings the pod's topic up to date and gives the ConfigMaps to look at.
func (d *desired) pod(ctx context.Context, name string) (touched []string, err error) {
	owner := key{kindPod, name}
	p, ok := get[corev1.Pod](d.in.pods, name)
	if !ok || !d.in.isEdge(p.Spec.NodeName) {
		d.set(owner, nil)
		return d.refs.set(name, "", nil), nil
	}
	node := p.Spec.NodeName
	tp := topic.DesiredPod(node, p.Namespace, p.Name)
	if stripped(p) {
		// Its node became an edge node after the informer had seen the pod.
		full, err := d.kube.CoreV1().Pods(p.Namespace).Get(ctx, p.Name, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err) || err == nil && full.UID != p.UID:
			return nil, nil // an event follows
		case err != nil:
			d.keep(owner, tp)
			return nil, fmt.Errorf("get pod %s: %w", name, err)
		}
		p = full
	}
	prev, _ := d.truth.before(tp)
	uid := string(p.UID)
	d.set(owner, map[topic.Topic][]byte{
		tp: steady(prev, uid, rev(p.ResourceVersion), func(r int64) []byte { return encodePod(p, r) }),
	})
	return d.refs.set(name, node, configMapsOf(p)), nil
}

// configMap brings the topics of a ConfigMap up to date, one per node that
// needs it.
func (d *desired) configMap(ctx context.Context, name string) error {
	owner := key{kindConfigMap, name}
	nodes := d.refs.nodes(name)
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
		body = payload.Encode(configMapPayload{
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
		var p configMapPayload
		if ok && payload.Decode(prev, &p) == nil && p.UID == string(m.UID) && p.Rev == rev(m.ResourceVersion) {
			return prev, true
		}
	}
	return nil, false
}

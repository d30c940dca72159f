package cloudbridge

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fairlead-io/fairlead/schemas/payload"
)

// writeStatic keeps the mirror pod of a pod that a node has from a file: made,
// made anew where the file changed, and removed with it. key is node/namespace/name.
func (s *status) writeStatic(ctx context.Context, key string) error {
	node, name, _ := strings.Cut(key, "/")
	r, want := s.mirror.static(node, name)
	if want = want && !r.Gone; !want {
		s.statics.drop(key)
	}
	p, ok := get[corev1.Pod](s.in.pods, name)
	if ok && stripped(p) { // it may be a mirror pod of a node that has just come
		full, err := s.kube.CoreV1().Pods(p.Namespace).Get(ctx, p.Name, metav1.GetOptions{})
		if err != nil {
			return fmt.Errorf("get pod %s: %w", name, err)
		}
		p = full
	}
	switch {
	case ok && (!isMirrorPod(p) || p.Spec.NodeName != node):
		if want {
			s.refusedStatic(node, name, errors.New("another pod has its name"))
		}
		return nil
	case ok && p.DeletionTimestamp == nil && want && podUID(p) == r.UID:
		return nil
	case ok && !want && p.DeletionTimestamp == nil && s.mirror.node(node).state != linkUp:
		return nil // not reported is not gone: the broker may have lost it
	case ok:
		return s.remove(ctx, p) // its event brings what is wanted
	case !want:
		return nil
	}
	n, ok := get[corev1.Node](s.in.nodes, node)
	if !ok {
		return nil // its coming asks again
	}
	made, err := mirrorPod(n, name, r)
	if err != nil {
		s.refusedStatic(node, name, err)
		return nil
	}
	_, err = s.kube.CoreV1().Pods(made.Namespace).Create(ctx, made, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return nil // the informer has not told yet; it will
	}
	if err = s.count("mirror-pod", err); apierrors.IsInvalid(err) || apierrors.IsBadRequest(err) {
		s.refusedStatic(node, name, err)
		return nil
	}
	if err != nil {
		return fmt.Errorf("create mirror pod: %w", err)
	}
	return nil
}

// refusedStatic says once why a static pod gets no mirror pod.
func (s *status) refusedStatic(node, name string, err error) {
	if was, _ := s.statics.get(node + "/" + name); was == err.Error() {
		return
	}
	s.statics.put(node+"/"+name, err.Error())
	s.log.Error("a static pod gets no mirror pod", "node", node, "pod", name, "error", err)
}

// mirrorPod is the pod that stands for a static one, as the kubelet makes it.
func mirrorPod(n *corev1.Node, name string, r payload.ReportedPod) (*corev1.Pod, error) {
	p := &corev1.Pod{}
	var m metav1.ObjectMeta
	if err := json.Unmarshal(r.Static.Metadata, &m); err != nil {
		return nil, fmt.Errorf("metadata: %w", err)
	}
	if err := json.Unmarshal(r.Static.Spec, &p.Spec); err != nil {
		return nil, fmt.Errorf("spec: %w", err)
	}
	if name != m.Namespace+"/"+m.Name {
		return nil, fmt.Errorf("its metadata names %s/%s", m.Namespace, m.Name)
	}
	if !strings.HasSuffix(m.Name, "-"+n.Name) {
		return nil, fmt.Errorf("its name does not end with -%s", n.Name) // it could take any other pod's
	}
	if what := refersTo(&p.Spec); what != "" {
		return nil, fmt.Errorf("it refers to %s: pods from files stand alone", what)
	}
	controller := true
	p.ObjectMeta = metav1.ObjectMeta{
		Namespace: m.Namespace, Name: m.Name, Labels: m.Labels, Annotations: map[string]string{},
		OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: n.Name, UID: n.UID, Controller: &controller}},
	}
	for k, v := range m.Annotations {
		p.Annotations[k] = v
	}
	p.Annotations[corev1.MirrorPodAnnotationKey] = r.UID
	p.Spec.NodeName = n.Name
	return p, nil
}

// refersTo names an object that a pod refers to, as the API server's NodeRestriction
// forbids it to a mirror pod: a node must not get at what it names itself.
func refersTo(s *corev1.PodSpec) string {
	switch {
	case s.ServiceAccountName != "" || s.DeprecatedServiceAccount != "":
		return "a service account"
	case len(s.ImagePullSecrets) > 0:
		return "image pull secrets"
	case len(s.ResourceClaims) > 0:
		return "resource claims"
	}
	for k := range referencesOf(&corev1.Pod{Spec: *s}) {
		return "a " + k.kind.String()
	}
	for _, v := range s.Volumes {
		switch {
		case v.PersistentVolumeClaim != nil:
			return "a persistent volume claim"
		case v.Ephemeral != nil:
			return "an ephemeral volume"
		case v.CSI != nil:
			return "a CSI volume"
		case v.Projected != nil:
			for _, p := range v.Projected.Sources {
				if p.ServiceAccountToken != nil || p.ClusterTrustBundle != nil || p.PodCertificate != nil {
					return "a token, trust bundle or certificate"
				}
			}
		}
	}
	return ""
}

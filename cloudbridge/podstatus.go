package cloudbridge

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-io/fairlead/schemas/payload"
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

// ourConditions are the conditions of a pod that its node decides. Others write
// PodScheduled, those that readiness gates name, and their own.
var ourConditions = []corev1.PodConditionType{
	corev1.PodReadyToStartContainers, corev1.PodInitialized, corev1.ContainersReady, corev1.PodReady,
	corev1.PodResizePending, corev1.PodResizeInProgress, corev1.AllContainersRestarting,
}

// podState stands for the part of a pod's status that its node decides.
type podState struct {
	digest string // of all but Ready
	ready  corev1.PodCondition
}

// stateOf sums up a status. ready of an absent condition is empty.
func stateOf(s *corev1.PodStatus) podState {
	if d, ok := strings.CutPrefix(s.Message, trimmedStatus); ok { // the informer did so already
		st := podState{digest: d}
		if c := podCondition(s, corev1.PodReady); c != nil {
			st.ready = *c
		}
		return st
	}
	ours := *s
	ours.NominatedNodeName, ours.QOSClass, ours.Resize = "", "", ""
	ours.ResourceClaimStatuses, ours.ExtendedResourceClaimStatus, ours.NodeAllocatableResourceClaimStatuses = nil, nil, nil
	ours.Conditions = nil
	var st podState
	for _, t := range slices.Concat(ourConditions, []corev1.PodConditionType{corev1.DisruptionTarget}) {
		c := podCondition(s, t)
		switch {
		case c == nil:
		case t == corev1.PodReady:
			st.ready = *c
		case t != corev1.DisruptionTarget || c.Reason == corev1.PodReasonTerminationByKubelet:
			ours.Conditions = append(ours.Conditions, *c)
		}
	}
	sum := sha256.Sum256(payload.Encode(ours))
	st.digest = hex.EncodeToString(sum[:12])
	return st
}

func podCondition(s *corev1.PodStatus, t corev1.PodConditionType) *corev1.PodCondition {
	for i := range s.Conditions {
		if s.Conditions[i].Type == t {
			return &s.Conditions[i]
		}
	}
	return nil
}

// trimmedStatus begins the message of a status of which the informer keeps a sum.
const trimmedStatus = "\x00"

// trimPodStatus keeps of a status what is looked at here: phase, reason, Ready,
// PodScheduled, the conditions of the readiness gates, and in place of the message
// the sum of what the node decides.
func trimPodStatus(p *corev1.Pod) {
	if strings.HasPrefix(p.Status.Message, trimmedStatus) {
		return
	}
	was := p.Status
	p.Status = corev1.PodStatus{Phase: was.Phase, Reason: was.Reason, Message: trimmedStatus + stateOf(&was).digest}
	for _, c := range was.Conditions {
		if c.Type == corev1.PodReady || c.Type == corev1.PodScheduled || isGate(p, c.Type) {
			p.Status.Conditions = append(p.Status.Conditions, c)
		}
	}
}

func isGate(p *corev1.Pod, t corev1.PodConditionType) bool {
	return slices.ContainsFunc(p.Spec.ReadinessGates, func(g corev1.PodReadinessGate) bool { return g.ConditionType == t })
}

// podWritten is the last status that was written of a pod.
type podWritten struct {
	uid   types.UID
	patch [sha256.Size]byte
	rev   int64    // the resource version that it made
	state podState // what the API server made of it
}

const (
	// offlineReason is what Kubernetes says of a pod whose node does not answer.
	offlineReason = "NodeLost"
	// offlineDelay spares the API server a write per pod for a link that is back soon.
	offlineDelay = 10 * time.Second
)

// offline tells since when, as its Node object says, a node has been out of reach.
func (in *informers) offline(node string) (since time.Time, ok bool) {
	n, ok := get[corev1.Node](in.nodes, node)
	if !ok {
		return since, false
	}
	c := nodeCondition(&n.Status, corev1.NodeReady)
	return c.LastTransitionTime.Time, c.Reason == reasonLinkDown
}

// writePod brings a pod's status in Kubernetes in line with what its node
// reported. While the node is out of reach its last report stands, but the pod is
// not Ready, and its reason and message say why and since when. The node lifecycle
// controller does not see to that: it looks after pods only where it is itself who
// finds that the node is away.
func (s *status) writePod(ctx context.Context, name string) error {
	p, ok := get[corev1.Pod](s.in.pods, name)
	if !ok {
		s.pods.drop(name)
		return nil
	}
	node := p.Spec.NodeName
	last, wrote := s.pods.get(name)
	if wrote && last.uid == p.UID && rev(p.ResourceVersion) < last.rev {
		return nil // the informer is behind our own write, whose event follows
	}
	r, reported := s.mirror.pod(node, name)
	if reported = reported && r.UID == podUID(p) && len(r.Status) > 0; !reported && stripped(p) {
		return nil
	}
	v := s.mirror.node(node)
	var away time.Time
	if since, down := s.in.offline(node); v.state == linkDown && down && !terminal(p.Status.Phase) {
		if wait := since.Add(offlineDelay).Sub(s.now()); wait > 0 {
			s.queue.AddAfter(key{kindPod, name}, wait)
		} else {
			away = since
		}
	}
	var patch map[string]any
	var err error
	if reported {
		patch, err = s.reportedPatch(p, r, v, away)
	} else {
		patch = unreportedPatch(p, v, away)
	}
	if err != nil {
		s.refused(p, err)
		return nil
	}
	if patch != nil {
		if err := s.patchPod(ctx, p, patch); err != nil {
			return err
		}
	}
	if r.Gone && reported && p.DeletionTimestamp != nil {
		return s.remove(ctx, p)
	}
	return nil
}

// podUID is the uid under which a pod's node knows it.
func podUID(p *corev1.Pod) string {
	if hash, ok := p.Annotations[corev1.MirrorPodAnnotationKey]; ok {
		return hash
	}
	return string(p.UID)
}

// refused says once that a pod's status cannot be read.
func (s *status) refused(p *corev1.Pod, err error) {
	name, sum := p.Namespace+"/"+p.Name, sha256.Sum256([]byte(err.Error()))
	if last, ok := s.pods.get(name); ok && last.uid == p.UID && last.patch == sum {
		return
	}
	s.log.Error("the node reports a pod's status that cannot be read", "pod", name, "node", p.Spec.NodeName, "error", err)
	s.pods.put(name, podWritten{uid: p.UID, patch: sum})
}

// reportedPatch is the patch to the status that a node reported, nil where
// Kubernetes has it.
func (s *status) reportedPatch(p *corev1.Pod, r payload.ReportedPod, v nodeView, away time.Time) (map[string]any, error) {
	var want corev1.PodStatus
	if err := json.Unmarshal(r.Status, &want); err != nil {
		return nil, err
	}
	if !away.IsZero() && !terminal(want.Phase) && want.Reason == "" {
		want.Reason, want.Message = offlineReason, offlineMessage(p, away)
		if c := podCondition(&want, corev1.PodReady); c != nil && c.Status == corev1.ConditionTrue {
			c.Status, c.Reason, c.Message, c.LastTransitionTime = corev1.ConditionFalse, offlineReason, want.Message, metav1.NewTime(away)
		}
	}
	state, is := stateOf(&want), stateOf(&p.Status)
	// A link that may come back at once leaves Ready as it is.
	asserts := v.state == linkUp || !away.IsZero()
	unscheduled := podCondition(&want, corev1.PodScheduled) != nil && podCondition(&p.Status, corev1.PodScheduled) == nil
	if state.digest == is.digest && !unscheduled && (!asserts || sameCondition(state.ready, is.ready)) {
		return nil, nil
	}
	return podPatch(p, &want, asserts || is.ready.Type == ""), nil
}

// unreportedPatch is that of a pod that its node has said nothing about.
func unreportedPatch(p *corev1.Pod, v nodeView, away time.Time) map[string]any {
	switch {
	case v.node != nil && v.node.Pods && !away.IsZero() && p.Status.Reason == "":
		return map[string]any{"reason": offlineReason, "message": fmt.Sprintf("Node %s to which pod %s is bound is unresponsive since %s: it has reported nothing of the pod",
			p.Spec.NodeName, p.Name, away.UTC().Format(time.RFC3339))}
	case v.state == linkUp && p.Status.Reason == offlineReason:
		return map[string]any{"reason": nil, "message": nil}
	}
	return nil
}

func offlineMessage(p *corev1.Pod, since time.Time) string {
	return fmt.Sprintf("Node %s which was running pod %s is unresponsive since %s: the status is the last that it reported; the node goes on by itself",
		p.Spec.NodeName, p.Name, since.UTC().Format(time.RFC3339))
}

// sameCondition compares but for the times of probes, which nobody sets.
func sameCondition(a, b corev1.PodCondition) bool {
	return a.Status == b.Status && a.Reason == b.Reason && a.Message == b.Message &&
		a.ObservedGeneration == b.ObservedGeneration && a.LastTransitionTime.Equal(&b.LastTransitionTime)
}

// podPatch is the strategic merge patch that makes a pod's status want, whatever
// it is, but for what others write there: their conditions, the QoS class, claims.
func podPatch(p *corev1.Pod, want *corev1.PodStatus, ready bool) map[string]any {
	const replace, remove = "replace", "delete"
	directive := func(d string) map[string]any { return map[string]any{"$patch": d} }
	out := map[string]any{
		"phase": want.Phase, "startTime": want.StartTime, "observedGeneration": null(want.ObservedGeneration),
		"message": null(want.Message), "reason": null(want.Reason), "hostIP": null(want.HostIP), "podIP": null(want.PodIP),
		// Lists without a merge key are replaced as they are.
		"containerStatuses":          nullList(want.ContainerStatuses),
		"initContainerStatuses":      nullList(want.InitContainerStatuses),
		"ephemeralContainerStatuses": nullList(want.EphemeralContainerStatuses),
		"allocatedResources":         nil, "resources": nil,
	}
	if want.Phase == "" {
		delete(out, "phase") // a pod always has one
	}
	if want.QOSClass != "" {
		out["qosClass"] = want.QOSClass
	}
	list := func(n int, at func(int) any) []any {
		l := []any{directive(replace)}
		for i := range n {
			l = append(l, at(i))
		}
		return l
	}
	out["hostIPs"] = list(len(want.HostIPs), func(i int) any { return want.HostIPs[i] })
	out["podIPs"] = list(len(want.PodIPs), func(i int) any { return want.PodIPs[i] })
	if len(want.AllocatedResources) > 0 {
		out["allocatedResources"] = quantities(want.AllocatedResources)
	}
	if r := want.Resources; r != nil {
		out["resources"] = map[string]any{"requests": quantities(r.Requests), "limits": quantities(r.Limits), "claims": nullList(r.Claims)}
	}
	conditions := []any{} // by type; of an element every field is said, as they merge
	named := map[corev1.PodConditionType]bool{}
	for i := range want.Conditions {
		c := &want.Conditions[i]
		// PodScheduled is the scheduler's, the node's where no scheduler saw the pod.
		foreign := c.Type == corev1.PodScheduled && podCondition(&p.Status, c.Type) != nil || isGate(p, c.Type)
		if named[c.Type] || foreign || c.Type == corev1.PodReady && !ready {
			continue
		}
		named[c.Type] = true
		conditions = append(conditions, map[string]any{
			"type": c.Type, "status": c.Status, "reason": null(c.Reason), "message": null(c.Message),
			"lastProbeTime": nil, "lastTransitionTime": c.LastTransitionTime, "observedGeneration": null(c.ObservedGeneration),
		})
	}
	for _, t := range ourConditions {
		if !named[t] && (t != corev1.PodReady || ready) {
			m := directive(remove)
			m["type"] = t
			conditions = append(conditions, m)
		}
	}
	out["conditions"] = conditions
	return out
}

// quantities names the resources that a pod as a whole can have, those that are
// not there as null: maps merge by key, and a directive to replace one that was not
// there makes it empty.
func quantities(l corev1.ResourceList) any {
	if len(l) == 0 {
		return nil
	}
	out := map[string]any{"cpu": nil, "memory": nil, "hugepages-2Mi": nil, "hugepages-1Gi": nil}
	for k, q := range l {
		out[string(k)] = q
	}
	return out
}

// null is v, or JSON's null, which removes the field, where it is zero.
func null[T comparable](v T) any {
	var zero T
	if v == zero {
		return nil
	}
	return v
}

func nullList[T any](l []T) any {
	if len(l) == 0 {
		return nil
	}
	return l
}

// patchPod writes a status, unless the same was written before and Kubernetes has
// what the API server made of it.
func (s *status) patchPod(ctx context.Context, p *corev1.Pod, status map[string]any) error {
	name := p.Namespace + "/" + p.Name
	// The uid makes the API server refuse a patch of another pod of that name.
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": p.UID}, "status": status})
	if err != nil {
		return fmt.Errorf("pod status: %w", err)
	}
	w := podWritten{uid: p.UID, patch: sha256.Sum256(patch)}
	is := stateOf(&p.Status)
	last, ok := s.pods.get(name)
	if ok && last.uid == w.uid && last.patch == w.patch && last.state.digest == is.digest && sameCondition(last.state.ready, is.ready) {
		return nil
	}
	got, err := s.kube.CoreV1().Pods(p.Namespace).Patch(ctx, p.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	switch err = s.count("pod", err); {
	case apierrors.IsInvalid(err) || apierrors.IsBadRequest(err):
		s.log.Error("kubernetes refuses a pod's status as the node reports it", "pod", name, "node", p.Spec.NodeName, "error", err)
		w.state = is
	case err != nil:
		return fmt.Errorf("patch pod status: %w", err)
	default:
		w.rev, w.state = rev(got.ResourceVersion), stateOf(&got.Status)
	}
	s.pods.put(name, w)
	return nil
}

// remove takes a pod out of Kubernetes that is no more on its node.
func (s *status) remove(ctx context.Context, p *corev1.Pod) error {
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
	return s.remove(ctx, p)
}

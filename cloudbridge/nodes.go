package cloudbridge

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"

	"github.com/fairlead-io/fairlead/schemas/payload"
)

const (
	// leaseInterval and leaseDuration are the kubelet's.
	leaseInterval = 10 * time.Second
	leaseDuration = 40 * time.Second

	// maxPods is the kubelet's default, for a node whose agent runs pods.
	maxPods = 110

	// maxImages is the kubelet's default of the images that a Node lists.
	maxImages = 50

	// managedByAnnotation marks the Nodes that this program created.
	managedByAnnotation = "fairlead.dev/managed-by"

	reasonLinkUp   = "EdgeLinkUp"
	reasonLinkDown = "EdgeLinkDown"
	// conditionStore is True while the node cannot store anything.
	conditionStore corev1.NodeConditionType = "EdgeStoreProblem"
)

// newNode is the object of a node that has none.
func newNode(name string, r *payload.Node) *corev1.Node {
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{
			Name: name,
			Labels: map[string]string{
				EdgeLabel:              "",
				corev1.LabelHostname:   name,
				corev1.LabelOSStable:   r.OS,
				corev1.LabelArchStable: r.Arch,
			},
			Annotations: map[string]string{managedByAnnotation: "fairlead-cloud"},
		},
		Spec: corev1.NodeSpec{Taints: []corev1.Taint{{Key: EdgeLabel, Effect: corev1.TaintEffectNoSchedule}}},
	}
}

// nodeStatus is what the status of a Node should be. It keeps what others wrote.
func nodeStatus(prev *corev1.NodeStatus, v nodeView, now time.Time) *corev1.NodeStatus {
	s := prev.DeepCopy()
	if r := v.node; r != nil {
		s.NodeInfo.MachineID, s.NodeInfo.SystemUUID, s.NodeInfo.BootID = r.MachineID, r.SystemUUID, r.BootID
		s.NodeInfo.KernelVersion, s.NodeInfo.OSImage = r.Kernel, r.OSImage
		s.NodeInfo.OperatingSystem, s.NodeInfo.Architecture = r.OS, r.Arch
		s.NodeInfo.KubeletVersion = "fairlead-" + strings.TrimPrefix(r.Agent, "fairlead-")
		s.NodeInfo.ContainerRuntimeVersion = r.Runtime
		s.NodeInfo.Swap = nil
		if r.SwapBytes > 0 {
			swap := int64(r.SwapBytes)
			s.NodeInfo.Swap = &corev1.NodeSwapStatus{Capacity: &swap}
		}
		s.Capacity = resources(s.Capacity, r, r.Capacity)
		s.Allocatable = s.Capacity.DeepCopy()
		if len(r.Allocatable) > 0 {
			s.Allocatable = resources(prev.Allocatable, r, r.Allocatable)
		}
		s.Addresses = addresses(r)
		s.Images, s.VolumesInUse = images(r), nil
		for _, v := range r.VolumesInUse {
			s.VolumesInUse = append(s.VolumesInUse, corev1.UniqueVolumeName(v))
		}
		store := corev1.NodeCondition{Type: conditionStore, Status: corev1.ConditionFalse, Reason: "StoreWorks", Message: "the node stores what it is sent"}
		if r.StoreError != "" {
			store.Status, store.Reason, store.Message = corev1.ConditionTrue, "StoreFails", r.StoreError
		}
		setCondition(s, store, now)
	}
	switch v.state {
	case linkUp:
		ready := corev1.NodeCondition{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: reasonLinkUp, Message: "the node's link is up"}
		reported := map[corev1.NodeConditionType]bool{}
		if v.node != nil {
			for _, c := range v.node.Conditions {
				nc := corev1.NodeCondition{Type: corev1.NodeConditionType(c.Type), Status: corev1.ConditionStatus(c.Status), Reason: c.Reason, Message: c.Message}
				switch {
				case nc.Type == conditionStore || nc.Type == "" || nc.Status == "":
				case nc.Type != corev1.NodeReady:
					reported[nc.Type] = true
					// What it has been for a while, it has been for Kubernetes since
					// the link is up.
					setCondition(s, nc, earlier(now, later(time.UnixMilli(c.Since), v.since)))
				case nc.Status != corev1.ConditionTrue:
					ready.Status, ready.Reason, ready.Message = nc.Status, c.Reason, c.Message
				}
			}
		}
		setCondition(s, ready, now)
		s.Conditions = slices.DeleteFunc(s.Conditions, func(c corev1.NodeCondition) bool {
			return slices.Contains(pressures, c.Type) && !reported[c.Type]
		})
	case linkDown:
		const text = "the node's link is down; it goes on by itself with what it was sent"
		setCondition(s, corev1.NodeCondition{Type: corev1.NodeReady, Status: corev1.ConditionUnknown, Reason: reasonLinkDown, Message: text}, now)
		for _, t := range pressures {
			if nodeCondition(s, t).Type != "" {
				setCondition(s, corev1.NodeCondition{Type: t, Status: corev1.ConditionUnknown, Reason: reasonLinkDown, Message: text}, now)
			}
		}
	}
	return s
}

// pressures are the conditions that only the node can judge.
var pressures = []corev1.NodeConditionType{corev1.NodeMemoryPressure, corev1.NodeDiskPressure, corev1.NodePIDPressure}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// resources are a node's capacity or allocatable: as it reports them, and what
// others wrote. What it cannot mean is left out.
func resources(prev corev1.ResourceList, r *payload.Node, reported map[string]string) corev1.ResourceList {
	out := corev1.ResourceList{}
	for name, q := range prev {
		if strings.Contains(string(name), "/") && !strings.HasPrefix(string(name), Group+"/") {
			out[name] = q // somebody else's extended resource
		}
	}
	pods := int64(0)
	if r.Pods {
		pods = maxPods
	}
	out[corev1.ResourceCPU] = *resource.NewQuantity(int64(r.CPUs), resource.DecimalSI)
	out[corev1.ResourceMemory] = *resource.NewQuantity(int64(r.MemoryBytes), resource.BinarySI)
	out[corev1.ResourcePods] = *resource.NewQuantity(pods, resource.DecimalSI)
	for name, text := range reported {
		if q, err := resource.ParseQuantity(text); err == nil && q.Sign() >= 0 && name != "" {
			out[corev1.ResourceName(name)] = q
		}
	}
	return out
}

func addresses(r *payload.Node) []corev1.NodeAddress {
	var out []corev1.NodeAddress
	for _, a := range r.Addresses {
		out = append(out, corev1.NodeAddress{Type: corev1.NodeAddressType(a.Type), Address: a.Address})
	}
	if len(out) > 0 {
		return out
	}
	if r.InternalAddress != "" {
		out = append(out, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: r.InternalAddress})
	}
	if r.Hostname != "" {
		out = append(out, corev1.NodeAddress{Type: corev1.NodeHostName, Address: r.Hostname})
	}
	return out
}

func images(r *payload.Node) []corev1.ContainerImage {
	var out []corev1.ContainerImage
	for _, i := range r.Images[:min(len(r.Images), maxImages)] {
		out = append(out, corev1.ContainerImage{Names: i.Names, SizeBytes: i.Size})
	}
	return out
}

// imagesSum stands for a node's images where the informer keeps the node.
func imagesSum(images []corev1.ContainerImage) []corev1.ContainerImage {
	if len(images) == 0 || len(images) == 1 && len(images[0].Names) == 0 {
		return images // none, or a sum already
	}
	sum := sha256.Sum256(payload.Encode(images))
	return []corev1.ContainerImage{{SizeBytes: int64(binary.BigEndian.Uint64(sum[:]) >> 1)}}
}

// nodeCondition gives a condition, the zero value where there is none.
func nodeCondition(s *corev1.NodeStatus, t corev1.NodeConditionType) corev1.NodeCondition {
	for _, c := range s.Conditions {
		if c.Type == t {
			return c
		}
	}
	return corev1.NodeCondition{}
}

// setCondition sets a condition, which became so at now. Times move only with the
// rest: a heartbeat without news is the Lease's business.
func setCondition(s *corev1.NodeStatus, c corev1.NodeCondition, now time.Time) {
	c.LastHeartbeatTime = metav1.NewTime(now)
	c.LastTransitionTime = metav1.NewTime(now)
	for i := range s.Conditions {
		old := &s.Conditions[i]
		if old.Type != c.Type {
			continue
		}
		if old.Status == c.Status {
			if old.Reason == c.Reason && old.Message == c.Message {
				return
			}
			c.LastTransitionTime = old.LastTransitionTime
		}
		*old = c
		return
	}
	s.Conditions = append(s.Conditions, c)
}

// writeNode creates a node's object when the node comes, and keeps its status.
func (s *status) writeNode(ctx context.Context, name string) error {
	v := s.mirror.node(name)
	n, ok := get[corev1.Node](s.in.nodes, name)
	if !ok {
		// Somebody who deletes the object of a node that is there gets his
		// way until the node connects again or has something new to say.
		if !v.mayCreate || v.state != linkUp || v.node == nil {
			return nil
		}
		_, err := s.kube.CoreV1().Nodes().Create(ctx, newNode(name, v.node), metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			if n, err := s.kube.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{}); err == nil {
				if _, edge := n.Labels[EdgeLabel]; edge {
					return nil // the informer has not told yet; it will
				}
			}
			s.mirror.created(name)
			s.log.Error("an edge node has the name of a Node that is none: give it another name, or label the Node", "node", name, "label", EdgeLabel)
			return nil
		}
		if s.count("node", err) != nil {
			return fmt.Errorf("create node: %w", err)
		}
		s.mirror.created(name)
		s.log.Info("node enrolled", "node", name)
		return nil
	}
	if !v.ever && v.node == nil && n.Annotations[managedByAnnotation] == "" {
		return nil // labelled by hand, or another system's: not ours to judge
	}
	want := n.DeepCopy()
	want.Status = *nodeStatus(&n.Status, v, s.now())
	if equality.Semantic.DeepEqual(imagesSum(want.Status.Images), n.Status.Images) {
		want.Status.Images = n.Status.Images
	}
	if equality.Semantic.DeepEqual(want.Status, n.Status) {
		s.mirror.created(name)
		return nil
	}
	patch, err := twoWay(n, want)
	if err != nil {
		return err
	}
	_, err = s.kube.CoreV1().Nodes().Patch(ctx, name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	if apierrors.IsNotFound(err) {
		return nil // deleted a moment ago; what there is to say may create it again
	}
	s.mirror.created(name)
	if s.count("node", err) != nil {
		return fmt.Errorf("patch node status: %w", err)
	}
	return nil
}

// twoWay is the patch that makes one status of the other. Conditions merge by
// type, so those of other writers stay. Addresses would too, though a node can
// have several of a type: they are replaced.
func twoWay(was, is *corev1.Node) ([]byte, error) {
	a, err := json.Marshal(corev1.Node{Status: was.Status})
	if err != nil {
		return nil, fmt.Errorf("node status: %w", err)
	}
	b, err := json.Marshal(corev1.Node{ObjectMeta: metav1.ObjectMeta{UID: is.UID}, Status: is.Status})
	if err != nil {
		return nil, fmt.Errorf("node status: %w", err)
	}
	patch, err := strategicpatch.CreateTwoWayMergePatch(a, b, corev1.Node{})
	if err != nil {
		return nil, fmt.Errorf("node status: %w", err)
	}
	if equality.Semantic.DeepEqual(was.Status.Addresses, is.Status.Addresses) {
		return patch, nil
	}
	var m struct {
		Metadata json.RawMessage            `json:"metadata,omitempty"`
		Status   map[string]json.RawMessage `json:"status"`
	}
	if err := json.Unmarshal(patch, &m); err != nil {
		return nil, fmt.Errorf("node status: %w", err)
	}
	delete(m.Status, "$setElementOrder/addresses")
	list := []any{map[string]any{"$patch": "replace"}}
	for _, a := range is.Status.Addresses {
		list = append(list, a)
	}
	if m.Status["addresses"], err = json.Marshal(list); err != nil {
		return nil, fmt.Errorf("node status: %w", err)
	}
	if patch, err = json.Marshal(m); err != nil {
		return nil, fmt.Errorf("node status: %w", err)
	}
	return patch, nil
}

// renew renews the node's Lease while its link is up, and plans the next time.
func (s *status) renew(ctx context.Context, name string) error {
	n, ok := get[corev1.Node](s.in.nodes, name)
	if !ok || s.mirror.node(name).state != linkUp {
		return nil // the link's return, or the node's, begins again
	}
	now := metav1.NewMicroTime(s.now())
	leases := s.kube.CoordinationV1().Leases(corev1.NamespaceNodeLease)
	// A merge patch needs no read before it: one request per node and interval.
	patch, err := json.Marshal(map[string]any{"spec": map[string]any{
		"holderIdentity": name, "leaseDurationSeconds": int(leaseDuration / time.Second), "renewTime": now,
	}})
	if err != nil {
		return fmt.Errorf("lease: %w", err)
	}
	_, err = leases.Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{})
	if apierrors.IsNotFound(err) {
		seconds := int32(leaseDuration / time.Second)
		_, err = leases.Create(ctx, &coordinationv1.Lease{
			ObjectMeta: metav1.ObjectMeta{
				Name: name, Namespace: corev1.NamespaceNodeLease,
				// It goes with its node.
				OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: name, UID: n.UID}},
			},
			Spec: coordinationv1.LeaseSpec{HolderIdentity: &name, LeaseDurationSeconds: &seconds, RenewTime: &now},
		}, metav1.CreateOptions{})
	}
	if s.count("lease", err) != nil {
		return fmt.Errorf("renew lease: %w", err)
	}
	s.queue.AddAfter(key{kindLease, name}, leaseInterval)
	return nil
}

package cloudbridge

import (
	"encoding/json"
	"fmt"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/fairlead-io/fairlead/schemas/device"
)

// Group and Version of Fairlead's own kinds.
const (
	Group   = "fairlead.dev"
	Version = "v1alpha1"
)

var (
	devicesGVR    = schema.GroupVersionResource{Group: Group, Version: Version, Resource: "devices"}
	modelsGVR     = schema.GroupVersionResource{Group: Group, Version: Version, Resource: "devicemodels"}
	secretsGVR    = schema.GroupVersionResource{Version: "v1", Resource: "secrets"}
	configMapsGVR = schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}
)

const (
	// EdgeLabel marks the Nodes that Fairlead serves.
	EdgeLabel = "node-role.kubernetes.io/edge"

	lastApplied = "kubectl.kubernetes.io/last-applied-configuration"
)

// deviceObject is a Device as the informer keeps it.
type deviceObject struct {
	metav1.ObjectMeta `json:"metadata"`

	Spec   device.Spec   `json:"spec"`
	Status device.Status `json:"status"`
	// broken is why the object could not be read.
	broken error
}

// modelObject is a DeviceModel as the informer keeps it.
type modelObject struct {
	metav1.ObjectMeta `json:"metadata"`

	Spec   device.ModelSpec `json:"spec"`
	broken error
}

// trimDevice makes a deviceObject of what the watch gave. Like every transform
// it may meet its own result.
func trimDevice(o any) (any, error) {
	u, ok := o.(*unstructured.Unstructured)
	if !ok {
		return o, nil
	}
	d := &deviceObject{}
	if err := reread(u, d); err != nil {
		// The CRD lets nothing else through, so only another version of it can
		// cause this. An error here would stop the informer for everybody.
		d = &deviceObject{ObjectMeta: metaOf(u), broken: fmt.Errorf("cannot read the device: %w", err)}
	}
	trimMeta(&d.ObjectMeta)
	return d, nil
}

func trimModel(o any) (any, error) {
	u, ok := o.(*unstructured.Unstructured)
	if !ok {
		return o, nil
	}
	m := &modelObject{}
	if err := reread(u, m); err != nil {
		m = &modelObject{ObjectMeta: metaOf(u), broken: fmt.Errorf("cannot read the model: %w", err)}
	}
	trimMeta(&m.ObjectMeta)
	return m, nil
}

// reread converts by way of JSON: values stay as they were written.
func reread(u *unstructured.Unstructured, into any) error {
	b, err := json.Marshal(u.Object)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, into)
}

func metaOf(u *unstructured.Unstructured) metav1.ObjectMeta {
	return metav1.ObjectMeta{
		Namespace: u.GetNamespace(), Name: u.GetName(), UID: u.GetUID(),
		ResourceVersion: u.GetResourceVersion(), Generation: u.GetGeneration(),
	}
}

// trimMeta keeps of the metadata what identifies the object.
func trimMeta(m *metav1.ObjectMeta) {
	*m = metav1.ObjectMeta{
		Namespace: m.Namespace, Name: m.Name, UID: m.UID,
		ResourceVersion: m.ResourceVersion, Generation: m.Generation,
	}
}

// trimNode drops what nobody reads here.
func trimNode(o any) (any, error) {
	if n, ok := o.(*corev1.Node); ok {
		n.ManagedFields = nil
		n.Status.Images, n.Status.VolumesAttached = imagesSum(n.Status.Images), nil
	}
	return o, nil
}

// trimPod drops managed fields and most of the status, see trimPodStatus. Of a pod on a node that is no edge node nothing is left but its
// key; should the node become one later, the pod is read again (see stripped).
func trimPod(edge func(node string) bool) func(any) (any, error) {
	return func(o any) (any, error) {
		p, ok := o.(*corev1.Pod)
		if !ok {
			return o, nil
		}
		p.ManagedFields = nil
		if edge(p.Spec.NodeName) {
			trimPodStatus(p)
			return p, nil
		}
		trimMeta(&p.ObjectMeta)
		p.Spec, p.Status = corev1.PodSpec{NodeName: p.Spec.NodeName}, corev1.PodStatus{}
		return p, nil
	}
}

// stripped tells that the informer kept the pod's key only: every pod has a container.
func stripped(p *corev1.Pod) bool { return len(p.Spec.Containers) == 0 }

func trimMetadata(o any) (any, error) {
	if m, ok := o.(*metav1.PartialObjectMetadata); ok {
		trimMeta(&m.ObjectMeta)
	}
	return o, nil
}

// trimService keeps what a container's environment says of a Service.
func trimService(o any) (any, error) {
	if s, ok := o.(*corev1.Service); ok {
		trimMeta(&s.ObjectMeta)
		s.Spec = corev1.ServiceSpec{ClusterIP: s.Spec.ClusterIP, Ports: s.Spec.Ports}
		s.Status = corev1.ServiceStatus{}
	}
	return o, nil
}

// rev is a resource version as a number. Kubernetes promises since 1.35 that
// they are decimal numbers that grow per resource; all servers did so before.
func rev(resourceVersion string) int64 {
	n, _ := strconv.ParseInt(resourceVersion, 10, 64)
	return n
}

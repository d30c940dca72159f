package payload

import "encoding/json"

// Pod is fl/<node>/desired/pod/<ns>/<name>.
type Pod struct {
	UID string `json:"uid"`
	// Rev grows with every change that concerns the node.
	Rev int64 `json:"rev"`
	// Metadata is the pod's ObjectMeta, trimmed, Spec its whole PodSpec.
	Metadata json.RawMessage `json:"metadata"`
	Spec     json.RawMessage `json:"spec"`
	// Phase is Succeeded or Failed where Kubernetes has it so: the pod is not run
	// again, even by a node that has forgotten it. Else it is empty.
	Phase string `json:"phase,omitempty"`
	// Gates are the conditions that the pod's readiness gates name, type → status.
	// One that is absent is not set.
	Gates map[string]string `json:"gates,omitempty"`
	// Services are those that the pod's containers get environment variables of, as
	// they were when the pod was bound to the node.
	Services []Service `json:"services,omitempty"`
	// Handler is the runtime handler of the RuntimeClass that the spec names. It is
	// empty where the spec names none, or one that does not exist.
	Handler string `json:"handler,omitempty"`
}

// Service is what a container's environment says of a Service.
type Service struct {
	Name string `json:"name"`
	// IP is the cluster IP.
	IP    string        `json:"ip"`
	Ports []ServicePort `json:"ports,omitempty"`
}

// ServicePort is one port of a Service.
type ServicePort struct {
	Name     string `json:"name,omitempty"`
	Port     int32  `json:"port"`
	Protocol string `json:"protocol"` // TCP, UDP or SCTP
}

// ConfigMap is fl/<node>/desired/configmap/<ns>/<name>.
type ConfigMap struct {
	UID        string            `json:"uid"`
	Rev        int64             `json:"rev"`
	Namespace  string            `json:"namespace"`
	Name       string            `json:"name"`
	Data       map[string]string `json:"data,omitempty"`
	BinaryData map[string][]byte `json:"binaryData,omitempty"`
}

// Sealed is fl/<node>/desired/secret/<ns>/<name> and fl/<node>/desired/token/<ns>/<pod>:
// a plaintext that only the node can read. Package seal makes and opens it.
type Sealed struct {
	// UID is the Secret's, or the pod's whose tokens these are.
	UID string `json:"uid"`
	Rev int64  `json:"rev"`
	// Key is the id of the node's key that it was sealed to.
	Key string `json:"key"`
	// Sealed is the encapsulated key and the ciphertext.
	Sealed []byte `json:"sealed"`
	// Exp is, of tokens, when the first of them expires, and Renew when the cloud,
	// which cannot open what it sealed, issues them anew.
	Exp   int64 `json:"exp,omitempty"`
	Renew int64 `json:"renew,omitempty"`
}

// SecretData is the plaintext of a sealed Secret.
type SecretData struct {
	// Type is the Secret's type, such as kubernetes.io/dockerconfigjson.
	Type string            `json:"type"`
	Data map[string][]byte `json:"data"`
}

// PodTokens is the plaintext of a pod's sealed service account tokens.
type PodTokens struct {
	Tokens []PodToken `json:"tokens"`
}

// PodToken is a token for one audience and lifetime that the pod asks for.
type PodToken struct {
	// Audience is as the pod's spec has it; empty is the API server's.
	Audience string `json:"audience"`
	// Seconds is the lifetime that the pod's spec asks for.
	Seconds int64  `json:"seconds"`
	Token   string `json:"token"`
	// Exp is when it expires.
	Exp int64 `json:"exp"`
}

// ReportedPod is fl/<node>/reported/pod/<ns>/<name>.
type ReportedPod struct {
	UID string `json:"uid"`
	// Rev is the rev of the desired pod that the report is about.
	Rev int64 `json:"rev"`
	// Status is the pod's PodStatus.
	Status json.RawMessage `json:"status,omitempty"`
	// Gone: nothing of a deleted pod is left on the node.
	Gone bool `json:"gone,omitempty"`
	// Static describes a pod that is the node's own.
	Static *StaticPod `json:"static,omitempty"`
}

// StaticPod is a pod from a file on the node. Its uid is made by the node.
type StaticPod struct {
	Metadata json.RawMessage `json:"metadata"`
	Spec     json.RawMessage `json:"spec"`
}

// KubernetesEvent is fl/<node>/event/kubernetes/<ns>/<kind>/<name>. The cloud makes
// a core/v1 Event of it. A later one with the same id takes the place of the one
// before: of something that happens again, count and last grow.
type KubernetesEvent struct {
	// ID is unique within the namespace, and the Event's name: a Kubernetes name.
	ID string `json:"id"`
	// Kind, Namespace, Name, UID and FieldPath name the object, such as a Pod and
	// spec.containers{web}.
	Kind      string `json:"kind"`
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name"`
	UID       string `json:"uid,omitempty"`
	FieldPath string `json:"fieldPath,omitempty"`
	Reason    string `json:"reason"`
	Message   string `json:"message"`
	// Type is "Normal" or "Warning".
	Type string `json:"type"`
	// First and Last are when it happened first and last, Count how often.
	First int64 `json:"first"`
	Last  int64 `json:"last"`
	Count int32 `json:"count"`
	// Component is what reports it, such as kubelet.
	Component string `json:"component"`
}

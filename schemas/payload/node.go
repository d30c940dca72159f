package payload

// Node is fl/<node>/reported/node: what the cloud needs to fill a Node object.
type Node struct {
	// Agent is the version of the edge agent.
	Agent           string `json:"agent"`
	Hostname        string `json:"hostname,omitempty"`
	OS              string `json:"os"`
	Arch            string `json:"arch"`
	Kernel          string `json:"kernel,omitempty"`
	OSImage         string `json:"osImage,omitempty"`
	MachineID       string `json:"machineID,omitempty"`
	SystemUUID      string `json:"systemUUID,omitempty"`
	BootID          string `json:"bootID,omitempty"`
	CPUs            int    `json:"cpus"`
	MemoryBytes     uint64 `json:"memoryBytes"`
	InternalAddress string `json:"internalAddress,omitempty"`
	// Pods tells whether the agent is set up to run pods. It stays true while the
	// container runtime is down: of a node without pods the cloud takes deleted pods
	// away by itself.
	Pods bool `json:"pods"`
	// StoreError is why nothing can be stored any more; empty while all is well.
	StoreError string `json:"storeError,omitempty"`
	// SealKey is the public key that secrets for the node are sealed to: 32 bytes
	// X25519 in base64. Nothing secret is sent to a node without one.
	SealKey string `json:"sealKey,omitempty"`
	// Capacity and Allocatable are quantities as Kubernetes writes them, by resource.
	Capacity    map[string]string `json:"capacity,omitempty"`
	Allocatable map[string]string `json:"allocatable,omitempty"`
	// Conditions are those that the node judges itself: MemoryPressure, DiskPressure,
	// PIDPressure, and Ready, which says whether it can run pods.
	Conditions []NodeCondition `json:"conditions,omitempty"`
	// Addresses are all of them; InternalAddress and Hostname are used where there are none.
	Addresses []NodeAddress `json:"addresses,omitempty"`
	// Runtime is the container runtime, such as containerd://1.6.20.
	Runtime string `json:"runtime,omitempty"`
	// Images are those on the node, the largest first.
	Images []NodeImage `json:"images,omitempty"`
	// VolumesInUse are unique volume names.
	VolumesInUse []string `json:"volumesInUse,omitempty"`
	// SwapBytes is the node's swap space.
	SwapBytes uint64 `json:"swapBytes,omitempty"`
}

// NodeCondition is a condition of the Node object.
type NodeCondition struct {
	Type    string `json:"type"`
	Status  string `json:"status"` // True, False or Unknown
	Reason  string `json:"reason"`
	Message string `json:"message"`
	// Since is when the status became what it is.
	Since int64 `json:"since"`
}

// NodeAddress is an address of the node.
type NodeAddress struct {
	Type    string `json:"type"` // InternalIP, ExternalIP or Hostname
	Address string `json:"address"`
}

// NodeImage is a container image on the node.
type NodeImage struct {
	Names []string `json:"names"`
	Size  int64    `json:"size"` // bytes
}

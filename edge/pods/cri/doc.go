// Package cri is the client of a container runtime's CRI socket: containerd's,
// CRI-O's.
//
//	c, err := cri.Dial("unix:///run/containerd/containerd.sock", log)
//	go c.Watch(ctx, func(id string) { … look at the container or sandbox … })
//	id, err := c.RunPodSandbox(ctx, config, "")
//
// Errors are the runtime's own (gRPC statuses, not wrapped): their text is what
// Kubernetes events show. [IsNotFound], [IsDeadline] and [IsUnavailable] tell
// them apart.
package cri

// Package pods is a small kubelet: it runs the pods that the node's bus describes in
// a container runtime (containerd, or another one with a CRI socket), and reports
// them on the bus. The cloud may be gone for as long as it likes.
//
//	e, err := pods.New(pods.Config{Node: "plant-7", Dir: dir, Bus: bus, Runtime: "unix:///run/containerd/containerd.sock", Key: key, Host: host})
//	err = e.Run(ctx) // until ctx ends; the containers live on
//
// It reads desired/pod, and desired/configmap, secret and token as pods refer to
// them; it writes reported/pod and event/kubernetes. The bus and the runtime are its
// only state: after a restart it looks at both and goes on.
//
// A pod is a [pod] with a worker, which has a goroutine only while there is
// something to do: it looks at what the runtime has, lets podstatus decide, and does
// that. What happens outside wakes it: a change on the bus, an event of the runtime,
// a probe, a timer.
//
// The folders below are the parts: cri speaks to the runtime, spec makes its requests
// of a pod's description, podstatus decides and says how a pod is, volume makes
// volumes, probe probes, image pulls and collects, logs rotates, gc clears, cgroup and
// evict keep the node alive, events tells.
package pods

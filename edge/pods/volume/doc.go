// Package volume makes the volumes of pods: on disk, in memory, and bound into
// containers.
//
//	volumes, err := volume.New(volume.Config{Dir: data + "/pods", Objects: objects, Log: log})
//	err = volumes.SetUp(ctx, pod)          // before the first container; *Waiting says what is missing
//	hosts, err := volumes.Hosts(pod, ips, hostname, domain)
//	mounts, err := volumes.Mounts(volume.MountInput{Pod: pod, Container: c, Hosts: hosts})
//	next, err := volumes.Update(pod)       // a ConfigMap, Secret, token or label has changed
//	err = volumes.TearDown(ctx, pod.UID)   // after the last container is gone
//
// The folder of a pod is laid out as the stock kubelet's, so that tools which look
// for volumes there find them:
//
//	<Dir>/<uid>/volumes/kubernetes.io~configmap/<volume>
//	<Dir>/<uid>/volumes/kubernetes.io~secret/<volume>      a tmpfs
//	<Dir>/<uid>/volumes/kubernetes.io~projected/<volume>   a tmpfs
//	<Dir>/<uid>/volumes/kubernetes.io~downward-api/<volume>
//	<Dir>/<uid>/volumes/kubernetes.io~empty-dir/<volume>   a tmpfs or hugetlbfs where the pod says so
//	<Dir>/<uid>/subpaths/<volume>/<container>/<index>      what a subPath leads to, bound
//	<Dir>/<uid>/containers/<container>/<id>                termination messages
//	<Dir>/<uid>/etc-hosts
//
// There is no other state. What is half made when the agent is killed is completed
// or cleared by the next call, whichever that is.
//
// What a pod's volumes hold is in the hands of its containers. Nothing here follows
// a symlink that a container may have planted, and nothing is deleted through a mount.
//
// The mounts are made in the agent's own mount namespace: the runtime must share
// it, or get the mounts below Dir by propagation.
package volume

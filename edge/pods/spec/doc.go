// Package spec turns a pod's specification into what the container runtime is
// asked for by CRI, as the stock kubelet would: sandbox and container
// configurations, environment, resources, security, DNS. It also decides whether
// a pod is admitted. Its functions are pure: they do no I/O and change nothing
// they are given; all they need to know of the host is in Node.
//
//	if r := spec.Admit(pod, others, node, host); r != nil { … the pod fails with r … }
//	sandbox, err := spec.Sandbox(pod, host, attempt)
//	env, err := spec.Env(spec.EnvInput{Node: host, Pod: pod, Container: c, Objects: objects, PodIPs: ips})
//	config, err := spec.Container(spec.ContainerInput{Node: host, Pod: pod, Container: c, Env: env, …})
//
// The errors of Env and Container are *ConfigError: what the container's state
// shows while it waits.
package spec

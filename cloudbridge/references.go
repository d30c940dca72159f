package cloudbridge

import (
	"sync"

	corev1 "k8s.io/api/core/v1"
)

// referencesOf lists the ConfigMaps and Secrets that a pod refers to.
func referencesOf(p *corev1.Pod) map[key]struct{} {
	out := map[key]struct{}{}
	add := func(k kind, name string) {
		if name != "" {
			out[key{k, p.Namespace + "/" + name}] = struct{}{}
		}
	}
	for _, s := range p.Spec.ImagePullSecrets {
		add(kindSecret, s.Name)
	}
	for _, v := range p.Spec.Volumes {
		if v.ConfigMap != nil {
			add(kindConfigMap, v.ConfigMap.Name)
		}
		if v.Secret != nil {
			add(kindSecret, v.Secret.SecretName)
		}
		if v.Projected != nil {
			for _, s := range v.Projected.Sources {
				if s.ConfigMap != nil {
					add(kindConfigMap, s.ConfigMap.Name)
				}
				if s.Secret != nil {
					add(kindSecret, s.Secret.Name)
				}
			}
		}
	}
	env := func(vars []corev1.EnvVar, from []corev1.EnvFromSource) {
		for _, e := range vars {
			if e.ValueFrom == nil {
				continue
			}
			if r := e.ValueFrom.ConfigMapKeyRef; r != nil {
				add(kindConfigMap, r.Name)
			}
			if r := e.ValueFrom.SecretKeyRef; r != nil {
				add(kindSecret, r.Name)
			}
		}
		for _, f := range from {
			if f.ConfigMapRef != nil {
				add(kindConfigMap, f.ConfigMapRef.Name)
			}
			if f.SecretRef != nil {
				add(kindSecret, f.SecretRef.Name)
			}
		}
	}
	for i := range p.Spec.InitContainers {
		env(p.Spec.InitContainers[i].Env, p.Spec.InitContainers[i].EnvFrom)
	}
	for i := range p.Spec.Containers {
		env(p.Spec.Containers[i].Env, p.Spec.Containers[i].EnvFrom)
	}
	for i := range p.Spec.EphemeralContainers {
		env(p.Spec.EphemeralContainers[i].Env, p.Spec.EphemeralContainers[i].EnvFrom)
	}
	return out
}

// references remembers which pod refers to which ConfigMaps and Secrets on which node.
type references struct {
	mu struct {
		sync.Mutex
		pods map[string]reference
		// users holds the pods of an object.
		users map[key]map[string]struct{}
	}
}

type reference struct {
	node    string
	objects map[key]struct{}
}

func newReferences() *references {
	r := &references{}
	r.mu.pods = map[string]reference{}
	r.mu.users = map[key]map[string]struct{}{}
	return r
}

// set records a pod's references and gives the objects that have to be looked at
// again. An empty node forgets the pod.
func (r *references) set(pod, node string, objects map[key]struct{}) (touched []key) {
	r.mu.Lock()
	defer r.mu.Unlock()
	old := r.mu.pods[pod]
	if node == "" {
		objects = nil
	}
	for o := range old.objects {
		if _, ok := objects[o]; ok && old.node == node {
			continue
		}
		delete(r.mu.users[o], pod)
		if len(r.mu.users[o]) == 0 {
			delete(r.mu.users, o)
		}
		touched = append(touched, o)
	}
	for o := range objects {
		if r.mu.users[o] == nil {
			r.mu.users[o] = map[string]struct{}{}
		}
		if _, ok := r.mu.users[o][pod]; !ok {
			r.mu.users[o][pod] = struct{}{}
			touched = append(touched, o)
		}
	}
	if len(objects) == 0 {
		delete(r.mu.pods, pod)
	} else {
		r.mu.pods[pod] = reference{node, objects}
	}
	return touched
}

// of lists what a pod refers to. Nobody changes it.
func (r *references) of(pod string) map[key]struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.mu.pods[pod].objects
}

// nodes lists the nodes that need the object.
func (r *references) nodes(object key) map[string]struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := map[string]struct{}{}
	for pod := range r.mu.users[object] {
		out[r.mu.pods[pod].node] = struct{}{}
	}
	return out
}

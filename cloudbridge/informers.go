package cloudbridge

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/tools/cache"
)

// Names of the informers' indices.
const (
	byNode  = "node"
	byModel = "model"
)

// informers are the watches on Kubernetes.
type informers struct {
	nodes, pods, devices, models cache.SharedIndexInformer
	// configMaps and secrets hold metadata only: a cluster has many, and the
	// nodes need few of them. Those are read one by one when they change.
	configMaps, secrets cache.SharedIndexInformer
	// services are trimmed to what a container's environment says of them.
	services cache.SharedIndexInformer

	synced []cache.InformerSynced
}

func newInformers(kube kubernetes.Interface, dyn dynamic.Interface, meta metadata.Interface) (*informers, error) {
	core := kube.CoreV1().RESTClient()
	in := &informers{}
	in.nodes = cache.NewSharedIndexInformerWithOptions(
		cache.ToListWatcherWithWatchListSemantics(cache.NewFilteredListWatchFromClient(core, "nodes", "", func(o *metav1.ListOptions) { o.LabelSelector = EdgeLabel }), kube),
		&corev1.Node{}, cache.SharedIndexInformerOptions{})
	in.pods = cache.NewSharedIndexInformerWithOptions(
		cache.ToListWatcherWithWatchListSemantics(cache.NewListWatchFromClient(core, "pods", "", fields.OneTermNotEqualSelector("spec.nodeName", "")), kube),
		&corev1.Pod{}, cache.SharedIndexInformerOptions{Indexers: cache.Indexers{byNode: func(o any) ([]string, error) {
			return []string{o.(*corev1.Pod).Spec.NodeName}, nil
		}}})
	in.devices = cache.NewSharedIndexInformerWithOptions(watchDynamic(dyn, devicesGVR), &unstructured.Unstructured{}, cache.SharedIndexInformerOptions{
		ObjectDescription: devicesGVR.String(),
		Indexers: cache.Indexers{
			byNode: func(o any) ([]string, error) { return []string{o.(*deviceObject).Spec.NodeName}, nil },
			byModel: func(o any) ([]string, error) {
				d := o.(*deviceObject)
				return []string{d.Namespace + "/" + d.Spec.Model}, nil
			},
		},
	})
	in.models = cache.NewSharedIndexInformerWithOptions(watchDynamic(dyn, modelsGVR), &unstructured.Unstructured{},
		cache.SharedIndexInformerOptions{ObjectDescription: modelsGVR.String()})
	in.configMaps = cache.NewSharedIndexInformerWithOptions(watchMetadata(meta, configMapsGVR), &metav1.PartialObjectMetadata{},
		cache.SharedIndexInformerOptions{ObjectDescription: configMapsGVR.String()})
	in.secrets = cache.NewSharedIndexInformerWithOptions(watchMetadata(meta, secretsGVR), &metav1.PartialObjectMetadata{},
		cache.SharedIndexInformerOptions{ObjectDescription: secretsGVR.String()})
	in.services = cache.NewSharedIndexInformerWithOptions(
		cache.ToListWatcherWithWatchListSemantics(cache.NewListWatchFromClient(core, "services", "", fields.Everything()), kube),
		&corev1.Service{}, cache.SharedIndexInformerOptions{Indexers: cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc}})
	in.synced = append(in.synced, in.services.HasSynced)

	for _, t := range []struct {
		i cache.SharedIndexInformer
		f cache.TransformFunc
	}{
		{in.nodes, trimNode}, {in.pods, trimPod(in.isEdge)}, {in.devices, trimDevice}, {in.models, trimModel},
		{in.configMaps, trimMetadata}, {in.secrets, trimMetadata}, {in.services, trimService},
	} {
		if err := t.i.SetTransform(t.f); err != nil {
			return nil, fmt.Errorf("informer: %w", err)
		}
	}
	return in, nil
}

func watchDynamic(c dynamic.Interface, r schema.GroupVersionResource) cache.ListerWatcher {
	return cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			return c.Resource(r).List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			return c.Resource(r).Watch(ctx, o)
		},
	}, c)
}

func watchMetadata(c metadata.Interface, r schema.GroupVersionResource) cache.ListerWatcher {
	return cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			return c.Resource(r).List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			return c.Resource(r).Watch(ctx, o)
		},
	}, c)
}

// handle calls fn with the key of every object that is added, changed or
// deleted. was is nil for an added one, is for a deleted one.
func (in *informers) handle(i cache.SharedIndexInformer, fn func(key string, was, is any)) error {
	call := func(was, is any) {
		o := is
		if o == nil {
			o = was
		}
		key, err := cache.DeletionHandlingMetaNamespaceKeyFunc(o)
		if err != nil {
			return // no object: cannot happen with the informers above
		}
		if d, ok := was.(cache.DeletedFinalStateUnknown); ok {
			was = d.Obj
		}
		fn(key, was, is)
	}
	h, err := i.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(o any) { call(nil, o) },
		UpdateFunc: func(was, is any) { call(was, is) },
		DeleteFunc: func(o any) { call(o, nil) },
	})
	if err != nil {
		return fmt.Errorf("informer: %w", err)
	}
	in.synced = append(in.synced, h.HasSynced)
	return nil
}

// run watches until ctx ends. Pods wait for the nodes, so that a pod's
// transform knows the edge nodes.
func (in *informers) run(ctx context.Context, spawn func(func())) {
	for _, i := range []cache.SharedIndexInformer{in.nodes, in.devices, in.models, in.configMaps, in.secrets, in.services} {
		spawn(func() { i.RunWithContext(ctx) })
	}
	spawn(func() {
		if cache.WaitForCacheSync(ctx.Done(), in.nodes.HasSynced) {
			in.pods.RunWithContext(ctx)
		}
	})
}

func get[T any](i cache.SharedIndexInformer, key string) (*T, bool) {
	o, ok, err := i.GetIndexer().GetByKey(key)
	if err != nil || !ok {
		return nil, false
	}
	t, ok := o.(*T)
	return t, ok
}

func (in *informers) isEdge(node string) bool {
	_, ok := get[corev1.Node](in.nodes, node)
	return node != "" && ok
}

// indexed lists the keys of the objects under an index's value.
func indexed(i cache.SharedIndexInformer, index, value string) []string {
	keys, err := i.GetIndexer().IndexKeys(index, value)
	if err != nil {
		return nil
	}
	return keys
}

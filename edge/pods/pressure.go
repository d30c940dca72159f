package pods

import (
	"context"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/edge/pods/evict"
	"github.com/fairlead-io/fairlead/edge/pods/podstatus"
	"github.com/fairlead-io/fairlead/edge/pods/spec"
)

// watchPressure makes what watches the node's memory, disks and processes.
func (e *Engine) watchPressure() *evict.Manager {
	n := e.node.Load()
	e.host = &evict.Host{
		Tree: e.tree, MemoryCapacity: n.Memory, PodsMemory: e.limits.Memory,
		NodeFS: e.cfg.Dir, ImageFS: e.imageFS, Thresholds: e.cfg.Thresholds, Log: e.log,
	}
	return evict.New(evict.Config{
		Thresholds: e.cfg.Thresholds, MaxGrace: e.cfg.EvictionGrace,
		Observe: e.host.Observe, Wake: e.host.Wake(), Pods: e.Active, Usage: e.usage,
		Evict: func(ctx context.Context, v evict.Eviction) error {
			e.events.Event(podRef(v.Pod), corev1.EventTypeWarning, v.Reason, v.Message)
			return e.Evict(ctx, v.Pod.UID, podstatus.Failure{Reason: v.Reason, Message: v.Message, Disruption: v.Condition != nil}, &v.Grace)
		},
		FreeContainers: func(ctx context.Context) error {
			return e.gc.CollectAll(ctx, func(uid types.UID) bool { p := e.lookup(uid); return p != nil && p.over() })
		},
		FreeImages: func(ctx context.Context) error {
			_, err := e.images.FreeSpace(ctx, everything)
			return err
		},
		Event: e.nodeEvent, Changed: e.cfg.Changed, Metrics: e.cfg.Metrics, Log: e.log,
	})
}

// everything is more than any disk has.
const everything = 1 << 62

// imageFS is where the runtime keeps its images; empty while it does not say.
func (e *Engine) imageFS() string {
	if s := e.imageFolder.Load(); s != nil {
		return *s
	}
	ctx, cancel := context.WithTimeout(e.ctx, 5*time.Second)
	defer cancel()
	r, err := e.cri.ImageFsInfo(ctx)
	if err != nil || len(r.GetImageFilesystems()) == 0 {
		return ""
	}
	dir := r.ImageFilesystems[0].GetFsId().GetMountpoint()
	e.imageFolder.Store(&dir)
	return dir
}

// usage measures what pods use.
func (e *Engine) usage(ctx context.Context, pods []*corev1.Pod, what evict.What) map[types.UID]evict.PodUsage {
	out := map[types.UID]evict.PodUsage{}
	byUID := map[types.UID]*corev1.Pod{}
	for _, p := range pods {
		byUID[p.UID] = p
		u := evict.PodUsage{Containers: map[string]evict.ContainerUsage{}}
		if what&(evict.Memory|evict.PIDs) != 0 {
			c, err := e.tree.PodUsage(p.UID, spec.QOS(p))
			if err != nil {
				continue // it has not begun, or is ending
			}
			u.Memory, u.PIDs = c.Memory, c.PIDs
		}
		out[p.UID] = u
	}
	if what&(evict.Memory|evict.Disk) != 0 {
		stats, err := e.cri.ListContainerStats(ctx, &runtimeapi.ContainerStatsFilter{LabelSelector: map[string]string{labelNode: e.cfg.Node}})
		if err != nil {
			e.log.Warn("what containers use is not known", "error", err)
		}
		for _, s := range stats {
			uid := types.UID(s.GetAttributes().GetLabels()[labelUID])
			u, ok := out[uid]
			if !ok {
				continue
			}
			u.Containers[s.GetAttributes().GetMetadata().GetName()] = evict.ContainerUsage{
				Memory: int64(s.GetMemory().GetWorkingSetBytes().GetValue()),
				Root: evict.Files{
					Bytes:  int64(s.GetWritableLayer().GetUsedBytes().GetValue()),
					Inodes: int64(s.GetWritableLayer().GetInodesUsed().GetValue()),
				},
			}
		}
	}
	if what&evict.Disk == 0 {
		return out
	}
	n := e.node.Load()
	for uid, u := range out {
		u.Volumes = map[string]evict.Files{}
		vols, err := e.volumes.Usage(uid)
		if err != nil {
			e.log.Warn("what volumes use is not known", "uid", uid, "error", err)
		}
		for name, v := range vols {
			u.Volumes[name] = evict.Files{Bytes: v.Bytes, Inodes: v.Inodes}
		}
		logs := spec.LogDirectory(byUID[uid], n)
		for name, c := range u.Containers {
			if c.Logs, err = evict.Measure(filepath.Join(logs, strings.ReplaceAll(name, "/", ""))); err != nil {
				e.log.Warn("what logs use is not known", "uid", uid, "container", name, "error", err)
			}
			u.Containers[name] = c
		}
		out[uid] = u
	}
	return out
}

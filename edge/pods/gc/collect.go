package gc

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/edge/pods/logs"
)

// Runtime is what the collector needs of the container runtime. Removing what is
// not there is no error.
type Runtime interface {
	ListContainers(ctx context.Context, filter *runtimeapi.ContainerFilter) ([]*runtimeapi.Container, error)
	ListPodSandbox(ctx context.Context, filter *runtimeapi.PodSandboxFilter) ([]*runtimeapi.PodSandbox, error)
	ContainerStatus(ctx context.Context, id string) (*runtimeapi.ContainerStatus, error)
	StopContainer(ctx context.Context, id string, grace time.Duration) error
	RemoveContainer(ctx context.Context, id string) error
	StopPodSandbox(ctx context.Context, id string) error
	RemovePodSandbox(ctx context.Context, id string) error
}

// Collector removes what is left over.
type Collector struct {
	Runtime Runtime
	// Labels are what the agent's own sandboxes and containers have; others are
	// not looked at. Empty is all.
	Labels map[string]string
	// LogRoot has the log folders of the agent's pods and of nobody else's. Those
	// with names of another kind are left alone.
	LogRoot string
	// LinkDir has the links of [logs.LinkPath]; empty where none are made.
	LinkDir string
	// Gone is that of Input. It is asked several times in a collection.
	Gone   func(types.UID) bool
	Logger *slog.Logger
}

// Collect removes what Decide says, and the log folders and links of pods and
// containers that are gone. It goes on after an error and returns all of them.
// Containers that nobody knows are removed with their logs.
func (c *Collector) Collect(ctx context.Context) error { return c.collect(ctx, c.Gone) }

// CollectAll is Collect for a disk that is filling up: pods that finished lose
// all their containers too, with what kubectl logs would show of them.
func (c *Collector) CollectAll(ctx context.Context, finished func(types.UID) bool) error {
	return c.collect(ctx, func(uid types.UID) bool { return c.Gone(uid) || finished(uid) })
}

func (c *Collector) collect(ctx context.Context, gone func(types.UID) bool) error {
	// Sandboxes first: a pod that starts meanwhile has no sandbox in the list.
	sandboxes, err := c.Runtime.ListPodSandbox(ctx, &runtimeapi.PodSandboxFilter{LabelSelector: c.Labels})
	if err != nil {
		return fmt.Errorf("list sandboxes: %w", err)
	}
	containers, err := c.Runtime.ListContainers(ctx, &runtimeapi.ContainerFilter{LabelSelector: c.Labels})
	if err != nil {
		return fmt.Errorf("list containers: %w", err)
	}
	plan := Decide(Input{Containers: containers, Sandboxes: sandboxes, Gone: gone})
	var errs []error
	stays := map[string]bool{} // a sandbox is removed with its containers, so not before them
	for _, ct := range plan.Containers {
		if err := c.removeContainer(ctx, ct); err != nil {
			stays[ct.GetPodSandboxId()] = true
			errs = append(errs, fmt.Errorf("remove container %s: %w", ct.GetId(), err))
		}
	}
	for _, s := range plan.Sandboxes {
		if stays[s.GetId()] {
			continue
		}
		// Stopped again, in case it was not: the network is given back there.
		err := c.Runtime.StopPodSandbox(ctx, s.GetId())
		if err == nil {
			err = c.Runtime.RemovePodSandbox(ctx, s.GetId())
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("remove sandbox %s of pod %s/%s: %w", s.GetId(), s.GetMetadata().GetNamespace(), s.GetMetadata().GetName(), err))
		}
	}
	if n := len(plan.Containers) + len(plan.Sandboxes); n > 0 && c.Logger != nil {
		c.Logger.Debug("removed dead containers and sandboxes", "containers", len(plan.Containers), "sandboxes", len(plan.Sandboxes), "failed", len(errs))
	}
	return errors.Join(append(errs, c.folders(), c.links())...)
}

// removeContainer removes a container and, as the kubelet does, its logs.
func (c *Collector) removeContainer(ctx context.Context, ct *runtimeapi.Container) error {
	if ct.GetState() == runtimeapi.ContainerState_CONTAINER_UNKNOWN { // it may run
		if err := c.Runtime.StopContainer(ctx, ct.GetId(), 2*time.Second); err != nil {
			return fmt.Errorf("stop it, as the runtime does not know its state: %w", err)
		}
	}
	st, err := c.Runtime.ContainerStatus(ctx, ct.GetId())
	if status.Code(err) == codes.NotFound {
		return nil
	}
	if err != nil {
		return fmt.Errorf("ask for its log: %w", err)
	}
	if p := st.GetLogPath(); p != "" {
		if err := logs.Remove(p); err != nil {
			return err
		}
	}
	if l := ct.GetLabels(); c.LinkDir != "" {
		link := logs.LinkPath(c.LinkDir, l[labelNamespace], l[labelPodName], l[labelContainer], ct.GetId())
		if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return c.Runtime.RemoveContainer(ctx, ct.GetId())
}

// folders removes the log folders of pods that are gone.
func (c *Collector) folders() error {
	entries, err := os.ReadDir(c.LogRoot)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		// Not those of pods that have finished: their last words are wanted.
		if uid, ok := logs.PodUID(e.Name()); ok && c.Gone(uid) {
			errs = append(errs, os.RemoveAll(filepath.Join(c.LogRoot, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// links removes the links into log folders that are no more. While a log is
// rotated it is missing for a moment, its folder is not.
func (c *Collector) links() error {
	if c.LinkDir == "" {
		return nil
	}
	entries, err := os.ReadDir(c.LinkDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		link := filepath.Join(c.LinkDir, e.Name())
		to, err := os.Readlink(link)
		if err != nil || !filepath.IsAbs(to) || filepath.Dir(filepath.Dir(filepath.Dir(to))) != filepath.Clean(c.LogRoot) {
			continue // not ours
		}
		if _, err := os.Stat(filepath.Dir(to)); errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, os.Remove(link))
		}
	}
	return errors.Join(errs...)
}
